//! What the processes of a server say to each other, each message over a [`Channel`].
//!
//! ```text
//! caller                          supervisor                      worker
//! ToSupervisor::Order        ->
//! descriptors (Handed)       ->
//!                            <-   Report::Started
//! ToSupervisor::Go           ->
//!                                 ToWorker::Job, Sources, ...  ->
//!                                                              <- FromWorker::Built
//!                            <-   Report::Built
//! ToSupervisor::Go           ->   (mounts)
//!                                 ToWorker::Begin              ->
//!                                                              <- FromWorker::Serving
//!                            <-   Report::Ready
//! ToSupervisor::Go           ->
//!                            <-   descriptors (Handed), for the shelf
//! ```
//!
//! Every path of the host was opened by the caller: the other two get descriptors, and open nothing by a name of the host but what is
//! in /proc, /sys and /dev. Nothing of the mount is relied on before the caller has written it down: the supervisor waits for a word
//! before each step, and takes everything back when the caller dies.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::child::channel::{Channel, MAX_FDS};
use crate::error::{Error, Kind, Result, SentError};
use crate::fuse::mount::{Method, OtherUsers};
use crate::fuse::session::{InFlight, Resend};
use crate::place::{Place, Places, Point};
use crate::plan::Plan;
use crate::sys::process::ProcessId;
use crate::traces::Traces;

/// All that a server is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) plan: Plan,
    pub(super) method: Method,
    pub(super) others: OtherUsers,
    pub(super) threads: usize,
    pub(super) resend: Resend,
}

impl Job {
    /// What the mount table shows as the source: names the rootfs, holds nothing that needs an escape.
    pub(super) fn source(&self) -> String {
        super::mount_source(&self.plan)
    }

    /// Does the kernel check permissions by itself (`default_permissions`, which goes with `allow_other`)?
    pub(super) fn checks_permissions(&self) -> bool {
        match self.others {
            OtherUsers::Usual => matches!(self.method, Method::Kernel { .. }),
            OtherUsers::Allowed => true,
            OtherUsers::Refused => false,
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.plan.scratch.is_none() && self.plan.volumes.iter().all(|v| v.access == crate::volume::Access::Ro)
    }
}

/// What the supervisor is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Course {
    /// Mount.
    Mount,
    /// Mount, and hand the caller what is to be shelved.
    MountAndShelve,
    /// Go on with what the caller hands over from the shelf.
    Adopt,
}

/// What the caller tells the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToSupervisor {
    /// What to do, with a memory file that holds the job, and the directory for what a server keeps. Descriptors follow: the
    /// places ([`hand_places`]), or what a shelf kept.
    Order(Course),
    /// It is written down: go on.
    Go,
}

/// What the supervisor tells the caller.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// It runs, nothing is done yet.
    Started { supervisor: ProcessId },
    /// The trees are ready; the next step mounts.
    Built { worker: ProcessId },
    /// The rootfs answers. Everything is taken back unless the caller says that it has written this down.
    Ready(Box<Traces>),
    /// It failed, and nothing is left.
    Failed(SentError),
}

/// What the supervisor tells the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToWorker {
    /// The job, with a memory file that holds it. So many descriptors of each sort follow.
    Job { sources: usize, logs: usize, kept: usize },
    /// Some of the sources, in order: layers, index, directory for changes, volumes.
    Sources,
    /// Some of the memory files that workers leave things in: two for each tree, for its nodes, and one for requests in flight.
    Logs,
    /// Descriptors that an earlier worker gave away, by tree and node.
    Kept(Vec<(u32, u64)>),
    /// Serve, with the connection of this device minor. Bytes are hex.
    Begin { init: String, start: Begin, minor: u32 },
    /// Tell your statistics.
    Stats,
    /// Log this much from now on.
    Level(String),
}

/// See [`crate::fuse::session::Start`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Begin {
    First,
    /// With care: a request may be among those in flight that ended a thread of the last worker.
    Again {
        reply: String,
        resend: Resend,
        with_care: bool,
    },
}

/// What the worker tells the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromWorker {
    /// The trees are ready: mount.
    Built,
    /// Requests are being answered; so many were answered EIO because they would end a thread.
    Serving { reply: String, in_flight: InFlight, poisoned: usize },
    /// It cannot.
    Failed(SentError),
    /// Its statistics.
    Stats(serde_json::Value),
    /// Keep this descriptor of a file without a name, by tree and node.
    Keep(u32, u64),
    /// Let it go.
    Release(u32, u64),
}

/// One message of several descriptors.
#[derive(Serialize, Deserialize)]
struct Handed {
    /// How many follow after these.
    left: usize,
}

/// Hand over any number of descriptors.
pub(super) fn hand(to: &Channel, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let mut left = fds.len();
    fds.chunks(MAX_FDS).try_for_each(|some| {
        left -= some.len();
        to.send(&Handed { left }, some)
    })
}

/// Take over what [`hand`] handed.
pub(super) fn take(from: &Channel) -> Result<Vec<OwnedFd>> {
    let mut all = Vec::new();
    loop {
        let Some((Handed { left }, fds)) = from.receive()? else {
            return Err(Error::new(Kind::Helper, "take over descriptors", "", "the other process ended"));
        };
        all.extend(fds);
        if left == 0 {
            return Ok(all);
        }
    }
}

/// The caller's side: hand over every place that a server needs.
pub(super) fn hand_places(to: &Channel, places: &Places) -> Result<()> {
    let mut fds = vec![places.point.parent.as_fd(), places.point.place.as_fd()];
    fds.extend(places.in_use.iter().map(|fd| fd.as_fd()));
    let sources = places.layers.iter().chain(&places.index).chain(&places.scratch).chain(&places.volumes);
    fds.extend(sources.map(|place| place.as_fd()));
    hand(to, &fds)
}

/// The supervisor's side: where to mount, the lock on the image, and the descriptors of the sources.
pub(super) fn take_places(from: &Channel, plan: &Plan) -> Result<(Point, Option<OwnedFd>, Vec<OwnedFd>)> {
    let refuse = || Error::new(Kind::Invalid, "take over a job", "", "descriptors are missing");
    let mut fds = take(from)?.into_iter();
    let mut place = |path: &std::path::Path| {
        let fd = fds.next().ok_or_else(refuse)?;
        Place::new(fd, path.to_owned()).map_err(|e| Error::sys("look at", crate::error::show(path), e))
    };
    let parent = place(plan.rootfs.parent().unwrap_or(&plan.rootfs))?;
    let point = Point::of(place(&plan.rootfs)?, parent);
    let in_use = if plan.index.is_some() { Some(fds.next().ok_or_else(refuse)?) } else { None };
    Ok((point, in_use, fds.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_come_whole_however_many() {
        let (one, other) = Channel::pair().unwrap();
        let other = Channel::from(other);
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = vec![file.as_fd(); MAX_FDS + 3];
        hand(&one, &fds).unwrap();
        assert_eq!(take(&other).unwrap().len(), MAX_FDS + 3);
        drop(one);
        assert!(take(&other).is_err());
    }
}
