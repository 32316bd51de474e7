//! The supervisor: mounts, holds the connection, and sees to it that somebody answers.
//!
//! One thread, and one that tells the worker which groups a caller is in. It opens nothing below its own mount and nothing of the
//! store beyond O_PATH descriptors: whatever it did there could wait for the worker, which may be the one that is dead. It does
//! not poll the connection, which would wake it at every request; the worker sees the end of it and says so by its exit code.

mod caller;
mod live_mount;
mod restarts;
mod worker;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::control::{Listener, Question};
use super::protocol::{self, Begin, Course, FromWorker, Job, Report, ToWorker};
use super::shelf::{self, Unshelved};
use super::sources::{HandoverFiles, Sources, memory_file};
use super::startup::{catch_signals, detach};
use super::{REQUEST_LOST, TARGET, THREAD_LOST, hex};
use crate::child::channel::Channel;
use crate::error::{Error, Kind, Result, SentError, show};
use crate::fault;
use crate::fuse::mount;
use crate::fuse::session::InFlight;
use crate::place::Point;
use crate::sys::mount::Unmount;
use crate::sys::process::{ProcessId, timespec};
use crate::traces::Traces;
use caller::{Caller, Order};
use live_mount::{LiveMount, Prepared};
use restarts::{Death, Next, Restarts};
use worker::Worker;

pub(crate) use worker::is_server;
pub(crate) use worker::worker_of;

/// How long a worker may take to tell its statistics: a thread of its own does.
const STATS_PATIENCE: Duration = Duration::from_secs(2);

/// The program.
pub(super) fn main() -> ExitCode {
    match detach() {
        Ok(channel) => run(Caller { channel }),
        // The caller still waits for this process and shows what its log ends with.
        Err(error) => {
            super::log::start("supervisor");
            log::error!(target: TARGET, "{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(caller: Caller) -> ExitCode {
    super::log::start("supervisor");
    #[cfg(feature = "failpoints")]
    let _scenario = fail::FailScenario::setup();
    match Supervisor::set_up(&caller) {
        Ok(supervisor) => {
            drop(caller);
            supervisor.watch()
        }
        Err(error) => {
            log::error!(target: TARGET, "{error}");
            caller.tell(&Report::Failed(SentError::from(&error))).ok();
            ExitCode::FAILURE
        }
    }
}

/// What a supervisor begins with.
enum Start {
    /// A directory to mount on.
    Mount(Point),
    /// What a dead one left mounted.
    Adopt(LiveMount),
}

struct Supervisor {
    job: Job,
    job_file: OwnedFd,
    sources: Sources,
    handover: HandoverFiles,
    /// The program we run: the worker is the same one, also after the file was replaced.
    program: OwnedFd,
    me: ProcessId,
    signals: UnixStream,
    live: LiveMount,
    worker: Option<Worker>,
    restarts: Restarts,
    /// The last worker lost a thread to a request.
    with_care: bool,
    /// `None`: the state directory did not let us; the rootfs is served all the same.
    control: Option<Listener>,
    /// Somebody else keeps the connection too: it does not end with us.
    is_shelved: bool,
}

impl Supervisor {
    /// Everything up to a rootfs that answers and a caller who knows. On an error nothing is left.
    fn set_up(caller: &Caller) -> Result<Self> {
        let Order { course, job, job_file, state_dir } = caller.order()?;
        let program = crate::sys::fs::open_path(Path::new("/proc/self/exe"))
            .map_err(|e| Error::sys("open", "/proc/self/exe", e).hint("mount /proc"))?;
        // First of all: it starts, and raises its walls, while we take what it is to serve and the caller writes down who we are. Nothing that it
        // does is seen before `begin`.
        let mut worker = Worker::start(&program, &job)?;
        let prepare = || -> Result<_> {
            let (me, signals) = (ProcessId::current()?, catch_signals()?);
            let (sources, mut handover, start) = if course == Course::Adopt {
                let Unshelved { sources, handover, mounted, init, reply } =
                    Unshelved::receive(&job.plan, &caller.channel)?;
                (sources, handover, Start::Adopt(LiveMount { mounted, init, reply }))
            } else {
                let (point, in_use, fds) = protocol::take_places(&caller.channel, &job.plan)?;
                let sources = Sources { in_use, ..Sources::sort(&job.plan, fds)? };
                (sources, HandoverFiles::new(&job.plan)?, Start::Mount(point))
            };
            let control = Listener::bind(state_dir, &job.plan.state_dir)
                .inspect_err(|e| log::warn!(target: TARGET, "{e}: no statistics, no restart"))
                .ok();
            worker.give(&job.plan, &job_file, &sources, control.as_ref(), &handover)?;
            caller.ask(&Report::Started { supervisor: me })?;
            fault::point("server.worker")?;
            let live = match start {
                Start::Adopt(live) => {
                    worker.built(&mut handover)?;
                    caller.ask(&Report::Built { worker: worker.id })?;
                    live.adopt(&job, &mut worker, &mut handover)?
                }
                Start::Mount(point) => {
                    let prepared = Prepared::new(&job, &point)?;
                    worker.built(&mut handover)?;
                    prepared.begin(&worker)?;
                    caller.ask(&Report::Built { worker: worker.id })?;
                    LiveMount::mount(&job, &mut worker, &point, prepared, &mut handover)?
                }
            };
            Ok((me, signals, sources, handover, control, live))
        };
        let (me, signals, sources, handover, control, live) = match prepare() {
            Ok(prepared) => prepared,
            Err(error) => {
                worker.kill();
                return Err(error);
            }
        };
        let supervisor = Supervisor {
            is_shelved: course != Course::Mount,
            job,
            job_file,
            sources,
            handover,
            program,
            me,
            signals,
            live,
            worker: Some(worker),
            restarts: Restarts::new(),
            with_care: false,
            control,
        };
        supervisor.report(caller, course)
    }

    /// Tell the caller that the rootfs answers; take it back if nobody knows of it.
    fn report(self, caller: &Caller, course: Course) -> Result<Self> {
        let known = fault::point("server.ready").and_then(|()| caller.ask(&Report::Ready(Box::new(self.traces()))));
        match known {
            Ok(()) => {
                if course == Course::MountAndShelve
                    && let Err(error) = self.hand_over(&caller.channel)
                {
                    log::warn!(target: TARGET, "{error}: this rootfs will not outlive its server");
                }
                log::info!(
                    target: TARGET,
                    "{} is served by worker {}",
                    show(&self.job.plan.rootfs),
                    self.worker.as_ref().map_or(0, |w| w.id.pid)
                );
                Ok(self)
            }
            Err(error) => {
                let undo = self.take_down(Unmount::Lazy);
                Err(error.with_undo(undo))
            }
        }
    }

    /// What a later supervisor needs, for the caller to put on its shelf.
    fn hand_over(&self, to: &Channel) -> Result<()> {
        let LiveMount { mounted, init, reply } = &self.live;
        let state = shelf::State::new(&self.job, mounted, init, reply)?.to_bytes()?;
        let state = memory_file("fsprov-state", &state)?;
        shelf::send_all(to, &mounted.connection, &state, &self.sources, &self.handover)
    }

    fn traces(&self) -> Traces {
        Traces {
            mount_id: Some(self.live.info().id),
            unique_mount_id: self.live.mounted.unique,
            supervisor: Some(self.me),
            worker: self.worker.as_ref().map(|w| w.id),
            fuse_connection: Some(self.live.info().dev.1),
            ..Traces::default()
        }
    }

    /// Until the rootfs is gone.
    fn watch(mut self) -> ExitCode {
        loop {
            let worker_ended = match self.wait() {
                Ok(ended) => ended,
                Err(error) => {
                    log::error!(target: TARGET, "{error}");
                    return self.finish(Unmount::Lazy);
                }
            };
            match worker_ended {
                Event::Signal => {
                    log::info!(target: TARGET, "asked to end");
                    return self.finish(Unmount::IfIdle);
                }
                Event::Asked => {
                    if let Err(error) = self.serve_client() {
                        log::error!(target: TARGET, "{error}");
                        return self.finish(Unmount::Lazy);
                    }
                }
                Event::WorkerEnded(status) if status.success() => {
                    log::info!(target: TARGET, "{} was unmounted", show(&self.job.plan.rootfs));
                    return ExitCode::SUCCESS;
                }
                Event::WorkerEnded(status) if status.code() == Some(REQUEST_LOST) => return self.give_up_connection(),
                Event::WorkerEnded(status) => {
                    if let Err(error) = self.replace(status) {
                        log::error!(target: TARGET, "{error}");
                        return self.finish(Unmount::Lazy);
                    }
                }
            }
        }
    }

    fn wait(&mut self) -> Result<Event> {
        const OP: &str = "watch the worker";
        let worker = self.worker.as_mut().ok_or_else(|| Error::new(Kind::Helper, OP, "", "there is none"))?;
        loop {
            let mut fds = vec![
                PollFd::new(&self.signals, PollFlags::IN),
                PollFd::new(&worker.pidfd, PollFlags::IN),
                PollFd::new(&worker.channel, PollFlags::IN),
            ];
            fds.extend(self.control.as_ref().map(|control| PollFd::new(control, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(Error::sys(OP, worker.id, e)),
            }
            let is_ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            let (signal, ended, said, asked) = (is_ready(0), is_ready(1), is_ready(2), is_ready(3));
            if said {
                // What a dead worker said last is in the socket still.
                loop {
                    match worker.channel.receive_now() {
                        Ok(None) => break,
                        Ok(Some((message, fds))) => {
                            if let Some(other) = self.handover.hear(message, fds) {
                                log::warn!(target: TARGET, "worker {} says {other:?} unasked", worker.id);
                            }
                        }
                        // A file that will not outlive the worker, nothing more.
                        Err(e) if e.kind() == Kind::Limit => log::warn!(target: TARGET, "{e}"),
                        Err(e) => return Err(e),
                    }
                }
            }
            if signal {
                return Ok(Event::Signal);
            }
            if ended {
                let status = worker.child.wait().map_err(|e| Error::io(OP, worker.id, e))?;
                return Ok(Event::WorkerEnded(status));
            }
            if asked {
                return Ok(Event::Asked);
            }
            if said && worker.channel.is_closed() {
                // It closed its end and lives: wait for its end alone, or this would spin.
                let mut fds = [PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&worker.pidfd, PollFlags::IN)];
                let _ = poll(&mut fds, None);
            }
        }
    }

    /// Put a new worker in a dead one's place, as often as it takes and the limit allows.
    fn replace(&mut self, status: ExitStatus) -> Result<()> {
        let old = self.worker.take();
        let found = old.as_ref().map_or(0, |w| w.poisoned);
        let (old_pid, served) = old.map_or((0, None), |w| (w.id.pid, w.serving_since.map(|t| t.elapsed())));
        let died = Instant::now();
        log::warn!(target: TARGET, "worker {old_pid} died ({status}); starting another");
        let was_careful = std::mem::replace(&mut self.with_care, status.code() == Some(THREAD_LOST));
        // One that looked with care, found nothing and lost a thread all the same would do so again.
        let mut next = if self.with_care && (found > 0 || !was_careful) {
            self.restarts.after_a_lost_thread()
        } else {
            self.restarts.after_death(Death::of(Some(status)), served)
        };
        loop {
            match next {
                Next::At(pause) => self.pause(pause)?,
                Next::GiveUp => {
                    return Err(Error::new(
                        Kind::Helper,
                        "restart worker of",
                        show(&self.job.plan.rootfs),
                        "it dies each time as soon as it begins: giving up, the rootfs is taken away",
                    ));
                }
            }
            match self.start_again() {
                Ok(in_flight) => {
                    let worker = self.worker.as_ref().map_or(0, |w| w.id.pid);
                    log::info!(target: TARGET, "worker {worker} serves, {} ms after the last one died", died.elapsed().as_millis());
                    if let InFlight::Failed(count) = in_flight {
                        log::warn!(
                            target: TARGET,
                            "{count} requests in flight when it died were answered EIO: this kernel (before 6.9) cannot send them again"
                        );
                    }
                    return Ok(());
                }
                Err((error, death)) => {
                    log::error!(target: TARGET, "{error}");
                    next = self.restarts.after_death(death, None);
                }
            }
        }
    }

    fn start_again(&mut self) -> std::result::Result<InFlight, (Error, Death)> {
        let mut worker = Worker::start(&self.program, &self.job).map_err(|e| (e, Death::Failed))?;
        let given = worker.give(&self.job.plan, &self.job_file, &self.sources, self.control.as_ref(), &self.handover);
        let begun = given.and_then(|()| worker.built(&mut self.handover)).and_then(|()| {
            let start =
                Begin::Again { reply: hex(&self.live.reply), resend: self.job.resend, with_care: self.with_care };
            self.live.resume(&mut worker, start, &mut self.handover)
        });
        match begun {
            Ok((_, in_flight)) => {
                self.worker = Some(worker);
                Ok(in_flight)
            }
            Err(error) => {
                let death = worker.kill();
                // It may have answered some requests.
                if let Err(e) = worker.hear_last(&mut self.handover) {
                    log::warn!(target: TARGET, "{e}");
                }
                Err((error, death))
            }
        }
    }

    /// Answer one question. An error: there is no worker any more.
    fn serve_client(&mut self) -> Result<()> {
        let Some(client) = self.control.as_ref().and_then(Listener::accept) else { return Ok(()) };
        match &client.question {
            Question::Stats => client.answer(self.stats()),
            Question::Level(level) => client.answer(self.set_level(level)),
            Question::Restart(program) => {
                let before = self.worker.as_ref().map_or(0, |w| w.id.pid);
                let done = self.run_from(&program.clone());
                let after = self.worker.as_ref().map(|w| w.id.pid);
                client.answer(done.map(|()| serde_json::json!({ "worker_before": before, "worker": after })));
                if after.is_none() {
                    return Err(Error::new(
                        Kind::Helper,
                        "restart worker of",
                        show(&self.job.plan.rootfs),
                        "none starts",
                    ));
                }
            }
        }
        Ok(())
    }

    fn set_level(&mut self, level: &str) -> Result<serde_json::Value> {
        if !super::log::set_level(level) {
            return Err(super::log::no_level(level));
        }
        if let Some(worker) = &self.worker {
            worker.channel.send(&ToWorker::Level(level.to_owned()), &[])?;
        }
        Ok(serde_json::Value::Null)
    }

    fn stats(&mut self) -> Result<serde_json::Value> {
        const OP: &str = "ask the worker for its statistics";
        let worker = self.worker.as_ref().ok_or_else(|| Error::new(Kind::Helper, OP, "", "there is none"))?;
        worker.channel.send(&ToWorker::Stats, &[])?;
        let end = Instant::now() + STATS_PATIENCE;
        let of_worker = loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&worker.channel, PollFlags::IN), PollFd::new(&worker.pidfd, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&timespec(left)));
            if matches!(ready, Ok(0)) || !fds[1].revents().is_empty() {
                return Err(Error::new(Kind::Helper, OP, worker.id, "it does not answer").hint("try again"));
            }
            match worker.channel.receive_now()? {
                Some((FromWorker::Stats(value), _)) => break value,
                Some((message, fds)) => drop(self.handover.hear(message, fds)),
                None => {}
            }
        };
        Ok(serde_json::json!({
            "worker": of_worker,
            "worker_pid": worker.id.pid,
            "supervisor_pid": self.me.pid,
            "supervisor_memory": super::figures::memory(),
            "restarts": self.restarts.total(),
            "nameless_files_kept": self.handover.kept(),
        }))
    }

    /// Put a worker run from `program` in the place of the one there is; if it does not start, one of the old program.
    fn run_from(&mut self, program: &Path) -> Result<()> {
        const OP: &str = "restart worker from";
        let new = crate::sys::fs::open_path(program).map_err(|e| Error::sys(OP, show(program), e))?;
        rustix::fs::accessat(rustix::fs::CWD, program, rustix::fs::Access::EXEC_OK, rustix::fs::AtFlags::EACCESS)
            .map_err(|e| Error::sys(OP, show(program), e))?;
        log::info!(target: TARGET, "restarting the worker from {}", show(program));
        // Killed, not asked: what it was answering is sent again, which is what every death relies on.
        if let Some(mut old) = self.worker.take() {
            old.kill();
            old.hear_last(&mut self.handover)?;
        }
        let old_program = std::mem::replace(&mut self.program, new);
        let Err((error, _)) = self.start_again() else { return Ok(()) };
        self.program = old_program;
        Err(error.with_undo(self.start_again().map(drop).map_err(|(e, _)| e)))
    }

    /// Somebody waits for a request that is lost, before Linux 6.9, and would for ever: end the connection, and everyone else's
    /// work with it. The mount stays, so that nobody finds what lies beneath: `list` says dead, `unmount` and `recover` go on.
    fn give_up_connection(self) -> ExitCode {
        log::error!(
            target: TARGET,
            "{}: a request in flight was lost with a worker, and this kernel (before 6.9) cannot send it again: the connection was \
             ended, everything on it fails with ENOTCONN; fsprov unmount takes it away, fsprov recover mounts it again",
            show(&self.job.plan.rootfs)
        );
        // Our descriptor is the last one: closed, it is as good as aborted (fuse_dev_release in fs/fuse/dev.c).
        self.end_if_shelved();
        ExitCode::FAILURE
    }

    /// Sleep, but end when asked to.
    fn pause(&self, pause: Duration) -> Result<()> {
        if pause.is_zero() {
            return Ok(());
        }
        let mut fds = [PollFd::new(&self.signals, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(pause))) {
            Ok(0) | Err(_) => Ok(()),
            Ok(_) => Err(Error::new(Kind::Helper, "restart worker", "", "asked to end meanwhile")),
        }
    }

    fn finish(self, how: Unmount) -> ExitCode {
        match self.take_down(how) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                log::error!(target: TARGET, "{error}");
                ExitCode::FAILURE
            }
        }
    }

    /// Unmount, by force if it must be, and end the worker.
    fn take_down(mut self, how: Unmount) -> Result<()> {
        let done = self.live.unmount(how, &self.job.method);
        if let Some(worker) = &mut self.worker {
            worker.end();
        }
        // Our descriptor is the last one: the connection ends here whatever happened above.
        self.end_if_shelved();
        done
    }

    /// End the connection, where closing our descriptor does not.
    fn end_if_shelved(&self) {
        if self.is_shelved
            && let Err(error) = mount::abort(self.live.info().dev.1)
        {
            log::info!(target: TARGET, "{error}");
        }
    }
}

enum Event {
    Signal,
    Asked,
    WorkerEnded(ExitStatus),
}
