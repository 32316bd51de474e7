//! The supervisor's end of the socket to who started it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::super::protocol::{Course, Job, Report, ToSupervisor};
use super::super::sources::read_memory_file;
use crate::child::channel::Channel;
use crate::error::{Error, Kind, Result};

/// Longest wait for the caller's word to go on: it writes its record in between.
const CALLER_PATIENCE: Duration = Duration::from_secs(60);
/// Longest job read: 200 volumes of two 4 KiB paths, hex-encoded, fit.
const MAX_JOB: u64 = 8 << 20;

/// Who started us, until the rootfs is ready.
pub(super) struct Caller {
    pub(super) channel: Channel,
}

/// What we are to do.
pub(super) struct Order {
    pub(super) course: Course,
    pub(super) job: Job,
    /// The memory file that the job is in.
    pub(super) job_file: OwnedFd,
    /// The directory for what a server keeps.
    pub(super) state_dir: OwnedFd,
}

impl Caller {
    pub(super) fn order(&self) -> Result<Order> {
        const OP: &str = "read order";
        let Some((ToSupervisor::Order(course), fds)) = self.channel.receive_within(CALLER_PATIENCE)? else {
            return Err(Error::new(Kind::Helper, OP, "", "the caller gave up"));
        };
        let [job_file, state_dir] = <[OwnedFd; 2]>::try_from(fds)
            .map_err(|fds| Error::new(Kind::Invalid, OP, "", format!("it has {} descriptors", fds.len())))?;
        let copy = job_file.try_clone().map_err(|e| Error::io(OP, "", e))?;
        let job = read_memory_file(copy, "fsprov-job", MAX_JOB)?;
        Ok(Order { course, job, job_file, state_dir })
    }

    pub(super) fn tell(&self, report: &Report) -> Result<()> {
        self.channel.send(report, &[]).map_err(|e| e.within("report to", "the caller"))
    }

    /// Tell, and wait for the word to go on. An error: the caller gave up or died.
    pub(super) fn ask(&self, report: &Report) -> Result<()> {
        const OP: &str = "wait for the caller's word";
        self.tell(report)?;
        match self.channel.receive_within(CALLER_PATIENCE)? {
            Some((ToSupervisor::Go, _)) => Ok(()),
            _ => Err(Error::new(Kind::Helper, OP, "", "the caller gave up")),
        }
    }
}
