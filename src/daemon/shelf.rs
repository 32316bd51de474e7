//! What a supervisor needs to go on where a dead one was, as descriptors that somebody else keeps by name (systemd's descriptor
//! store): the connection, what was agreed on it, the sources, and the memory files that workers leave things in.
//!
//! Files without a name that were in use are not among them: they come and go while the rootfs is served. Their users get ESTALE.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use serde::{Deserialize, Serialize};

use super::protocol::{self, Job};
use super::sources::{HandoverFiles, Sources, read_memory_file};
use super::{hex, unhex};
use crate::child::channel::Channel;
use crate::error::{Error, Kind, Result, show};
use crate::fuse::mount::{self, Mounted};
use crate::plan::Plan;
use crate::sys::mountinfo::{Known, MountInfo};
use crate::sys::process;
use crate::traces::{Shelved, Traces};

const OP: &str = "adopt the connection of";
/// The shape of [`State`] that this program writes, and the only one it reads.
const VERSION: u32 = 1;
/// Longest state read: a job of 200 volumes of two 4 KiB paths, hex-encoded, fits.
const MAX_STATE: u64 = 8 << 20;

/// What all names begin with.
pub(crate) const PREFIX: &str = "fsprov-";

/// The names of all that is kept for a rootfs, in the order in which processes hand them to each other. Printable and without a
/// colon (sd_pid_notify_with_fds(3), FDNAME).
pub(crate) fn names(plan: &Plan) -> Vec<String> {
    let numbered = |what: &'static str, count| (0..count).map(move |n| format!("{PREFIX}{what}-{n}"));
    let single = ["connection", "state"].into_iter().chain(plan.index.as_ref().map(|_| "lock"));
    single
        .map(|what| format!("{PREFIX}{what}"))
        .chain(numbered("source", Sources::count(plan)))
        .chain(numbered("log", HandoverFiles::count(plan)))
        .collect()
}

/// What was agreed, in a memory file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    boot_id: String,
    pub(super) job: Job,
    mount_id: u64,
    #[serde(default)]
    unique: Option<u64>,
    minor: u32,
    init: String,
    reply: String,
}

impl State {
    pub(super) fn new(job: &Job, mounted: &Mounted, init: &[u8], reply: &[u8]) -> Result<Self> {
        Ok(State {
            version: VERSION,
            boot_id: process::boot_id()?,
            job: job.clone(),
            mount_id: mounted.info.id,
            unique: mounted.unique,
            minor: mounted.info.dev.1,
            init: hex(init),
            reply: hex(reply),
        })
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|e| Error::new(Kind::Io, "write", "fsprov-state", e))
    }

    fn read(fd: &OwnedFd) -> Result<Self> {
        let copy = fd.try_clone().map_err(|e| Error::io("read", "fsprov-state", e))?;
        let state: State = read_memory_file(copy, "fsprov-state", MAX_STATE)?;
        if state.version != VERSION {
            let why = format!("it has version {}, this program knows {VERSION}", state.version);
            return Err(Error::new(Kind::Invalid, "read", "fsprov-state", why));
        }
        Ok(state)
    }

    /// The mount, if it stands and is of this connection.
    fn mount(&self, connection: &OwnedFd) -> Result<MountInfo> {
        let plan = &self.job.plan;
        let refuse = |why: &str| Error::new(Kind::Invalid, OP, show(&plan.rootfs), why);
        if !answers(connection, self.minor) {
            return Err(refuse("it has ended, or is another's"));
        }
        let known = Known { id: self.mount_id, unique: self.unique };
        mount::find(known, &self.job.source())?
            .filter(|info| info.dev.1 == self.minor)
            .ok_or_else(|| refuse("it is not mounted any more"))
    }
}

/// Is it a FUSE connection that has not ended, and, where the kernel tells (fdinfo, Linux 6.16), the one of this device minor?
fn answers(connection: &OwnedFd, minor: u32) -> bool {
    let is_device = fstat(connection).is_ok_and(|s| FileType::from_raw_mode(s.st_mode).is_char_device());
    let mut fds = [PollFd::new(connection, PollFlags::empty())];
    let ended = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0);
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", connection.as_raw_fd())).unwrap_or_default();
    let told = info.lines().find_map(|l| l.strip_prefix("fuse_connection:")?.trim().parse::<u32>().ok());
    is_device && !ended && told.is_none_or(|told| told == minor)
}

/// The caller's side: what a shelf kept, found to be all of this rootfs as its record has it. The job, and the descriptors in the
/// order of [`names`].
pub(super) fn check(plan: &Plan, traces: &Traces, shelved: Vec<Shelved>) -> Result<(Job, Vec<OwnedFd>)> {
    let refuse = |why: String| Error::new(Kind::Invalid, OP, show(&plan.rootfs), why);
    let mut by_name = BTreeMap::new();
    for (name, fd) in shelved {
        if by_name.insert(name.clone(), fd).is_some() {
            return Err(refuse(format!("there are several {name}")));
        }
    }
    let mut fds = Vec::new();
    for name in names(plan) {
        fds.push(by_name.remove(&name).ok_or_else(|| refuse(format!("{name} is missing")))?);
    }
    let [connection, state, ..] = fds.as_slice() else { return Err(refuse("nothing was kept".into())) };
    let state = State::read(state)?;
    let of_record = (Some(state.mount_id), Some(state.minor)) == (traces.mount_id, traces.fuse_connection);
    if state.boot_id != process::boot_id()? || state.job.plan != *plan || !of_record {
        return Err(refuse("what was kept is of another mount".into()));
    }
    state.mount(connection)?;
    Ok((state.job, fds))
}

/// The supervisor's side: what a dead one had.
pub(super) struct Unshelved {
    pub(super) sources: Sources,
    pub(super) handover: HandoverFiles,
    pub(super) mounted: Mounted,
    pub(super) init: Vec<u8>,
    pub(super) reply: Vec<u8>,
}

impl Unshelved {
    pub(super) fn receive(plan: &Plan, from: &Channel) -> Result<Self> {
        let mut fds = protocol::take(from)?;
        if fds.len() != names(plan).len() {
            let why = format!("{} descriptors came where {} belong", fds.len(), names(plan).len());
            return Err(Error::new(Kind::Invalid, OP, show(&plan.rootfs), why));
        }
        let logs = fds.split_off(fds.len() - HandoverFiles::count(plan));
        let sources = Sources::sort(plan, fds.split_off(fds.len() - Sources::count(plan)))?;
        let mut single = fds.into_iter();
        let (Some(connection), Some(state)) = (single.next(), single.next()) else {
            return Err(Error::new(Kind::Invalid, OP, show(&plan.rootfs), "there is no connection"));
        };
        let state = State::read(&state)?;
        let info = state.mount(&connection)?;
        Ok(Unshelved {
            sources: Sources { in_use: single.next(), ..sources },
            handover: HandoverFiles::of_logs(logs),
            mounted: Mounted { connection, info, unique: state.unique },
            init: unhex(&state.init)?,
            reply: unhex(&state.reply)?,
        })
    }
}

/// The supervisor's side: hand over what the next one needs.
pub(super) fn send_all(
    to: &Channel,
    connection: &OwnedFd,
    state: &OwnedFd,
    sources: &Sources,
    handover: &HandoverFiles,
) -> Result<()> {
    let mut fds = vec![connection.as_fd(), state.as_fd()];
    fds.extend(sources.in_use.as_ref().map(|fd| fd.as_fd()));
    fds.extend(sources.all());
    fds.extend(handover.logs().iter().map(|fd| fd.as_fd()));
    protocol::hand(to, &fds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{IndexFile, Layer};

    fn plan() -> Plan {
        Plan {
            layers: vec![Layer { root: "/l".into() }],
            index: Some(IndexFile("/i/index".into())),
            ..Plan::new("a".parse().unwrap(), "/nowhere".into(), "/s".into())
        }
    }

    #[test]
    fn names_are_distinct_and_fit_the_protocol() {
        let names = names(&plan());
        assert_eq!(names.len(), 3 + 2 + 3);
        assert!(names.iter().all(|n| n.bytes().all(|b| b.is_ascii_graphic() && b != b':')));
        assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), names.len());
    }

    #[test]
    fn what_is_not_all_of_it_is_refused() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let all = || names(&plan()).into_iter().map(|n| (n, null())).collect::<Vec<_>>();
        let said = |shelved| check(&plan(), &Traces::default(), shelved).unwrap_err().to_string();
        assert!(said(Vec::new()).contains("fsprov-connection is missing"));
        assert!(
            said(all().into_iter().skip(2).chain([("fsprov-log-0".to_owned(), null())]).collect()).contains("several")
        );
        assert!(said(all()).contains("fsprov-state"), "/dev/null is no state: {}", said(all()));
        assert!(!answers(&rustix::pipe::pipe().unwrap().0, 1));
    }
}
