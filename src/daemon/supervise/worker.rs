//! What the supervisor knows of its worker, and says to it.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::super::control::Listener;
use super::super::protocol::{Begin, FromWorker, Job, ToWorker};
use super::super::sources::{HandoverFiles, Sources};
use super::super::{SUPERVISOR_NAME, TARGET, WORK, WORKER_NAME, hex, names, spawn, unhex};
use super::restarts::Death;
use crate::child::channel::Channel;
use crate::error::{Error, Kind, Result, show};
use crate::fuse::session::InFlight;
use crate::plan::Plan;
use crate::sys::durable::{Survives, write_file};
use crate::sys::process::{ProcessId, not_started, timespec};
use crate::traces::Traces;
use crate::tree::dir::groups;

/// Longest wait for a worker to build its trees, and for one to begin: see the caller's patience, which is longer.
const WORKER_PATIENCE: Duration = Duration::from_secs(40);
/// How long a worker may take to end once its mount is gone.
const END_PATIENCE: Duration = Duration::from_secs(3);

/// What one worker is, to us.
pub(super) struct Worker {
    pub(super) child: Child,
    pub(super) pidfd: OwnedFd,
    pub(super) channel: Channel,
    pub(super) id: ProcessId,
    /// Where it will ask which groups a caller is in, until somebody answers.
    groups: Option<UnixStream>,
    pub(super) serving_since: Option<Instant>,
    /// Requests that it answered because they would end a thread.
    pub(super) poisoned: usize,
}

impl Worker {
    pub(super) fn start(program: &OwnedFd, job: &Job) -> Result<Self> {
        const OP: &str = "start worker";
        let (channel, theirs) = Channel::pair()?;
        let (answering, asking) = groups::pair().map_err(|e| Error::io(OP, "", e))?;
        let child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
            .arg0(spawn::title(&job.plan))
            .arg(WORK)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(asking))
            .spawn()
            .map_err(|e| not_started(OP, show(&job.plan.rootfs), e))?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let raw_pid = Pid::from_raw(pid).ok_or_else(|| Error::new(Kind::Io, OP, pid, "it has no pid"))?;
        // It is our child and not waited for: the pid cannot mean anyone else.
        let pidfd = pidfd_open(raw_pid, PidfdFlags::empty()).map_err(|e| Error::sys(OP, pid, e))?;
        let id = ProcessId::of(pid)?;
        Ok(Worker { child, pidfd, channel, id, groups: Some(answering), serving_since: None, poisoned: 0 })
    }

    /// Hand it what it serves.
    pub(super) fn give(
        &mut self,
        plan: &Plan,
        job_file: &OwnedFd,
        sources: &Sources,
        control: Option<&Listener>,
        handover: &HandoverFiles,
    ) -> Result<()> {
        sources.send(job_file, control.map(Listener::as_fd), handover, &self.channel)?;
        if let Some(answering) = self.groups.take() {
            // A thread of its own, which opens nothing but /proc: a request waits for it. It ends with the worker.
            std::thread::Builder::new()
                .name("fsprov-groups".into())
                .spawn(move || groups::answer(answering))
                .map_err(|e| not_started("start thread", "groups", e))?;
        }
        if let Err(error) = note_worker(plan, self.id) {
            log::warn!(target: TARGET, "{error}: should this process die, that one may be called dead");
        }
        Ok(())
    }

    /// See its trees built, of what it was given.
    pub(super) fn built(&mut self, handover: &mut HandoverFiles) -> Result<()> {
        match self.expect("build its trees", handover)? {
            FromWorker::Built => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Its next message, while it lives and does not take too long. It may be answering already, and hand over files meanwhile.
    fn expect(&mut self, what: &str, handover: &mut HandoverFiles) -> Result<FromWorker> {
        let failed = |cause: String| Error::new(Kind::Helper, "wait for worker to", what, cause);
        let end = Instant::now() + WORKER_PATIENCE;
        loop {
            let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
            let left = timespec(end.saturating_duration_since(Instant::now()));
            let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left)))
                .map_err(|e| Error::sys("wait for worker to", what, e))?;
            if ready == 0 {
                return Err(failed(format!("it did not within {} s", WORKER_PATIENCE.as_secs())));
            }
            match self.channel.receive() {
                // A file that will not outlive the worker, nothing more.
                Err(e) if e.kind() == Kind::Limit => log::warn!(target: TARGET, "{e}"),
                Err(e) => return Err(e),
                Ok(Some((FromWorker::Failed(told), _))) => return Err(told.into()),
                Ok(Some((message, fds))) => {
                    if let Some(message) = handover.hear(message, fds) {
                        return Ok(message);
                    }
                }
                Ok(None) => {
                    let status = self.child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                    return Err(failed(format!("it ended ({status})")));
                }
            }
        }
    }

    /// What it said last, now that it is dead.
    pub(super) fn hear_last(&self, handover: &mut HandoverFiles) -> Result<()> {
        while let Some((message, fds)) = self.channel.receive_now()? {
            handover.hear(message, fds);
        }
        Ok(())
    }

    /// Let it begin to serve this connection, whose INIT this is.
    pub(super) fn begin(&self, connection: &OwnedFd, minor: u32, init: &[u8], start: Begin) -> Result<()> {
        self.channel.send(&ToWorker::Begin { init: hex(init), start, minor }, &[connection.as_fd()])
    }

    /// It has begun: its answer to INIT, and what became of requests in flight.
    pub(super) fn serving(&mut self, handover: &mut HandoverFiles) -> Result<(Vec<u8>, InFlight)> {
        match self.expect("begin", handover)? {
            FromWorker::Serving { reply, in_flight, poisoned } => {
                self.poisoned = poisoned;
                self.serving_since = Some(Instant::now());
                Ok((unhex(&reply)?, in_flight))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// It ends by itself when its mount is gone; wait for that, not for long.
    pub(super) fn end(&mut self) {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ended = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timespec(END_PATIENCE))));
        if ended.is_ok_and(|n| n > 0) {
            let _ = self.child.wait();
        } else {
            self.kill();
        }
    }

    /// End it. Gives how it died, if it had before.
    pub(super) fn kill(&mut self) -> Death {
        let death = Death::of(self.child.try_wait().ok().flatten());
        if let Err(e) = pidfd_send_signal(&self.pidfd, Signal::KILL)
            && e != Errno::SRCH
        {
            log::error!(target: TARGET, "kill worker {}: {e}", self.id);
        }
        let _ = self.child.wait();
        death
    }
}

fn unexpected(message: &FromWorker) -> Error {
    Error::new(Kind::Helper, "talk to worker", "", format!("unexpected message from the worker: {message:?}"))
}

/// Write down which process answers, before it does: where the supervisor dies, nobody else knows.
fn note_worker(plan: &Plan, worker: ProcessId) -> Result<()> {
    const OP: &str = "write down the worker in";
    let text = serde_json::to_vec(&worker).map_err(|e| Error::new(Kind::Io, OP, show(&plan.state_dir), e))?;
    write_file(&plan.state_dir.join(names::WORKER), &text, Survives::Crash)
}

/// The process that answers for a rootfs now. `None`: none does, or not that can be seen.
pub(crate) fn worker_of(plan: &Plan, traces: &Traces) -> Option<ProcessId> {
    // Of another boot there is no process, whatever has its number now.
    traces.supervisor.or(traces.worker)?;
    let written = std::fs::read(plan.state_dir.join(names::WORKER)).ok();
    let written = written.and_then(|text| serde_json::from_slice::<ProcessId>(&text).ok());
    written.or(traces.worker).filter(|worker| worker.is_alive())
}

/// Is this process a server of ours, as far as its name tells?
pub(crate) fn is_server(pid: i32) -> bool {
    let comm = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    [SUPERVISOR_NAME, WORKER_NAME].iter().any(|name| name.to_bytes() == comm.trim_ascii_end())
}
