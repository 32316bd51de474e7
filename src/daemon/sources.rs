//! What a rootfs is made of, as descriptors opened before it is mounted: the mount may hide any of these paths, its own image's
//! too, and a worker that comes later must find the same files.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};

use super::protocol::{FromWorker, ToWorker};
use crate::child::channel::{Channel, MAX_FDS};
use crate::error::{Error, Kind, Result, show};
use crate::place::{Place, Places};
use crate::plan::Plan;
use crate::tree::device::DeviceTree;
use crate::volume::{Form, Volume};

/// O_PATH descriptors: holding them opens nothing, and closing them sends no request to anyone.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) layers: Vec<OwnedFd>,
    pub(super) index: Option<OwnedFd>,
    /// The directory for changes.
    pub(super) upper: Option<OwnedFd>,
    pub(super) volumes: Vec<OwnedFd>,
    /// A shared lock on the directory that the index lies in: a clean-up there sees that it is in use, also when the
    /// rootfs was unmounted lazily and nothing names it any more.
    pub(super) in_use: Option<OwnedFd>,
}

impl Sources {
    pub(super) fn all(&self) -> Vec<BorrowedFd<'_>> {
        self.layers.iter().chain(&self.index).chain(&self.upper).chain(&self.volumes).map(|fd| fd.as_fd()).collect()
    }

    /// Hand the job, the sources and what earlier workers left to a worker.
    ///
    /// Beside the job: what keeps the image in the store, where there is an index, and the control socket, where there is one. Both are
    /// for a worker whose supervisor dies.
    pub(super) fn send(
        &self,
        job: &OwnedFd,
        control: Option<BorrowedFd<'_>>,
        handover: &HandoverFiles,
        to: &Channel,
    ) -> Result<()> {
        let (all, logs) = (self.all(), handover.logs.iter().map(|fd| fd.as_fd()).collect::<Vec<_>>());
        let counts = ToWorker::Job { sources: all.len(), logs: logs.len(), kept: handover.kept.len() };
        let beside = self.in_use.iter().map(|fd| fd.as_fd()).chain(control);
        to.send(&counts, &std::iter::once(job.as_fd()).chain(beside).collect::<Vec<_>>())?;
        all.chunks(MAX_FDS).try_for_each(|some| to.send(&ToWorker::Sources, some))?;
        logs.chunks(MAX_FDS).try_for_each(|some| to.send(&ToWorker::Logs, some))?;
        let kept: Vec<_> = handover.kept.iter().map(|(key, fd)| (*key, fd.as_fd())).collect();
        kept.chunks(MAX_FDS).try_for_each(|some| {
            let (keys, fds): (Vec<_>, Vec<_>) = some.iter().copied().unzip();
            to.send(&ToWorker::Kept(keys), &fds)
        })
    }

    /// How many there are.
    pub(super) fn count(plan: &Plan) -> usize {
        plan.layers.len() + usize::from(plan.index.is_some()) + usize::from(plan.scratch.is_some()) + plan.volumes.len()
    }

    /// The worker's side: sort `fds` by the plan.
    pub(super) fn sort(plan: &Plan, fds: Vec<OwnedFd>) -> Result<Self> {
        let expected = Self::count(plan);
        if fds.len() != expected {
            return Err(Error::new(
                Kind::Invalid,
                "take over a job",
                "",
                format!("{} descriptors came where the plan has {expected}", fds.len()),
            ));
        }
        let mut fds = fds.into_iter();
        Ok(Sources {
            layers: fds.by_ref().take(plan.layers.len()).collect(),
            index: plan.index.as_ref().and_then(|_| fds.next()),
            upper: plan.scratch.as_ref().and_then(|_| fds.next()),
            volumes: fds.collect(),
            in_use: None,
        })
    }
}

/// A memory file that holds this.
pub(super) fn memory_file(name: &str, content: &[u8]) -> Result<OwnedFd> {
    let fail = |e: rustix::io::Errno| Error::sys("make memory file", name, e);
    let fd = memfd_create(name, MemfdFlags::CLOEXEC).map_err(fail)?;
    let mut file = std::fs::File::from(fd);
    std::io::Write::write_all(&mut file, content).map_err(|e| Error::io("write memory file", name, e))?;
    Ok(file.into())
}

/// What a memory file holds, as JSON. Its offset is shared with other processes' descriptors of it, and left alone.
pub(super) fn read_memory_file<T: serde::de::DeserializeOwned>(file: OwnedFd, name: &str, most: u64) -> Result<T> {
    const OP: &str = "read memory file";
    let fail = |e| Error::io(OP, name, e);
    let file = std::fs::File::from(file);
    let length = file.metadata().map_err(fail)?.len();
    if length > most {
        return Err(Error::new(Kind::Limit, OP, name, format!("it is longer than {most} bytes")));
    }
    let mut text = vec![0_u8; usize::try_from(length).unwrap_or(0)];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut text, 0).map_err(fail)?;
    serde_json::from_slice(&text).map_err(|e| Error::new(Kind::Invalid, OP, name, e))
}

/// Can the FUSE server serve this volume? A look, for the choice of a backend; [`check_servable`] decides.
pub(crate) fn servable(volume: &Volume) -> bool {
    volume.form != Form::Special || Place::open(&volume.source).is_ok_and(|source| is_servable(volume, &source))
}

fn is_servable(volume: &Volume, source: &Place) -> bool {
    volume.form != Form::Special || DeviceTree::of(source, volume.access).is_some()
}

/// Refuse sources that a server cannot serve: sockets, FIFOs, most devices.
pub(super) fn check_servable(plan: &Plan, places: &Places) -> Result<()> {
    let bad = plan.volumes.iter().zip(&places.volumes).find(|(volume, source)| !is_servable(volume, source));
    bad.map_or(Ok(()), |(volume, _)| Err(special(&volume.source)))
}

/// What workers leave to the next one.
#[derive(Debug)]
pub(super) struct HandoverFiles {
    /// Two memory files for each tree, the image's (or its changes'), then each volume's; and one for requests in flight.
    logs: Vec<OwnedFd>,
    /// Files without a name that are in use, by tree and node.
    kept: BTreeMap<(u32, u64), OwnedFd>,
}

/// Most descriptors of nameless files that are kept: a program can make any number of them. One that is not kept is lost with
/// the worker, and its users get ESTALE then.
const MAX_KEPT: usize = 4096;

impl HandoverFiles {
    pub(super) fn new(plan: &Plan) -> Result<Self> {
        let logs = (0..Self::count(plan)).map(|_| {
            memfd_create("fsprov-nodes", MemfdFlags::CLOEXEC)
                .map_err(|e| Error::sys("make memory file", "fsprov-nodes", e))
        });
        Ok(HandoverFiles { logs: logs.collect::<Result<_>>()?, kept: BTreeMap::new() })
    }

    /// How many memory files there are.
    pub(super) fn count(plan: &Plan) -> usize {
        2 * (1 + plan.volumes.len()) + 1
    }

    /// What workers left that a shelf kept: all but files without a name.
    pub(super) fn of_logs(logs: Vec<OwnedFd>) -> Self {
        HandoverFiles { logs, kept: BTreeMap::new() }
    }

    pub(super) fn logs(&self) -> &[OwnedFd] {
        &self.logs
    }

    /// Take what a worker says. Gives back what is not for us.
    pub(super) fn hear(&mut self, message: FromWorker, fds: Vec<OwnedFd>) -> Option<FromWorker> {
        match message {
            FromWorker::Keep(tree, node) => {
                let room = self.kept.len() < MAX_KEPT;
                if let Some(fd) = fds.into_iter().next().filter(|_| room) {
                    self.kept.insert((tree, node), fd);
                }
            }
            FromWorker::Release(tree, node) => drop(self.kept.remove(&(tree, node))),
            other => return Some(other),
        }
        None
    }

    /// How many descriptors of nameless files are kept.
    pub(super) fn kept(&self) -> usize {
        self.kept.len()
    }
}

/// The refusal of a socket, FIFO or device as a volume.
pub(crate) fn special(source: &Path) -> Error {
    Error::new(
        Kind::Unsupported,
        "open the source of volume",
        show(source),
        "the FUSE server serves regular files, directories and /dev/{null,zero,full,random,urandom}; this is another special file",
    )
    .hint("use --backend bind, or make the directory that holds it the volume")
}
