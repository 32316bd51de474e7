//! Waiting for a request to end, or for a process to end, whichever comes first.

use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::process::ProcessId;
use crate::error::{Error, Result};

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// SIGINT or SIGTERM came.
    BySignal,
    /// The process ended.
    ByProcess,
}

/// SIGINT and SIGTERM, caught since this was made: one that comes before the wait is not lost.
#[derive(Debug)]
pub struct Termination {
    wake: UnixStream,
}

impl Termination {
    /// Catch SIGINT and SIGTERM from now on, for the rest of the process's life.
    pub fn catch() -> Result<Self> {
        let caught = || -> std::io::Result<UnixStream> {
            let (wake, told) = UnixStream::pair()?;
            for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
                signal_hook::low_level::pipe::register(signal, told.try_clone()?)?;
            }
            Ok(wake)
        };
        caught().map(|wake| Termination { wake }).map_err(|e| Error::io("catch signals", "SIGINT, SIGTERM", e))
    }

    /// Did one come already? For work that can stop between two steps.
    pub fn came(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Wait for a signal, or for the end of `process`.
    pub fn wait(&self, process: Option<ProcessId>) -> Result<Woken> {
        let watched = match process.and_then(|p| Pid::from_raw(p.pid)) {
            Some(pid) => match pidfd_open(pid, PidfdFlags::empty()) {
                Ok(fd) => Some(fd),
                Err(rustix::io::Errno::SRCH) => return Ok(Woken::ByProcess),
                Err(e) => return Err(Error::sys("watch process", pid.as_raw_nonzero(), e)),
            },
            None => None,
        };
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(watched.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::sys("wait for", "a signal", e)),
            }
        }
        Ok(if fds[0].revents().is_empty() { Woken::ByProcess } else { Woken::BySignal })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_before_the_wait_and_a_process_that_ends() {
        let termination = Termination::catch().unwrap();
        let mut child = std::process::Command::new("sleep").arg("0.05").spawn().unwrap();
        let id = ProcessId { pid: i32::try_from(child.id()).unwrap(), start_time: 0 };
        assert_eq!(termination.wait(Some(id)).unwrap(), Woken::ByProcess);
        child.wait().unwrap();
        signal_hook::low_level::raise(signal_hook::consts::SIGTERM).unwrap();
        assert_eq!(termination.wait(None).unwrap(), Woken::BySignal);
    }
}
