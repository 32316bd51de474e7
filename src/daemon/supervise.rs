//! The supervisor: mounts, holds the connection, and sees to it that somebody answers.
//!
//! One thread, and one that tells the worker which groups a caller is in. It opens nothing below its own mount and nothing of the store beyond O_PATH descriptors: whatever it did there
//! could wait for the worker, which may be the one that is dead. It does not poll the connection, which would wake it at every
//! request; the worker sees the end of it and says so by its exit code.

mod caller;
mod restarts;

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::channel::Channel;
use super::control::{Listener, Question};
use super::protocol::{self, Begin, Course, FromWorker, Job, Report, ToWorker};
use super::shelf::{self, Inheritance};
use super::sources::{Legacy, Sources};
use super::{REQUEST_LOST, TARGET, THREAD_LOST, WORK, hex, names, settle, spawn, unhex};
use crate::error::{Error, Kind, Result, Told, show};
use crate::fault;
use crate::fuse::mount::{self, Method, Mounted, Request};
use crate::fuse::session::{self, InFlight};
use crate::place::Point;
use crate::plan::Plan;
use crate::sys::mount::Unmount;
use crate::sys::mountinfo::MountInfo;
use crate::sys::process::ProcessId;
use crate::sys::raw;
use crate::traces::Traces;
use crate::tree::dir::groups;
use caller::{Caller, Order};
use restarts::{Death, Next, Restarts};

/// Longest wait for a worker to build its trees, and for one to begin: see the caller's patience, which is longer.
const WORKER_PATIENCE: Duration = Duration::from_secs(40);
/// How long a worker may take to end once its mount is gone.
const END_PATIENCE: Duration = Duration::from_secs(3);
/// How long a worker may take to tell its statistics: a thread of its own does.
const STATS_PATIENCE: Duration = Duration::from_secs(2);
/// How long an unmount may take: dirty pages are written back through the worker.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(10);

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

/// Become a process of nobody's: no descriptor but the caller's socket and the log, no terminal, not the caller's child.
fn detach() -> Result<Channel> {
    const OP: &str = "detach server";
    if let Err(e) = raw::close_from(3) {
        // Before Linux 5.9. What the caller left open without close-on-exec stays open.
        log::debug!(target: TARGET, "close_range: {e}");
    }
    // In this order: the child of a session's leader can never get a terminal by opening one.
    rustix::process::setsid().map_err(|e| Error::sys(OP, "setsid", e))?;
    raw::fork_and_leave().map_err(|e| Error::sys(OP, "fork", e))?;
    settle(super::SUPERVISOR_NAME);
    take_stdin().map(Channel::from)
}

/// The socket that stdin is, and /dev/null in its place.
pub(super) fn take_stdin() -> Result<OwnedFd> {
    take_over("stdin", std::io::stdin().as_fd(), |null| rustix::stdio::dup2_stdin(null))
}

/// The same for stdout.
pub(super) fn take_stdout() -> Result<OwnedFd> {
    take_over("stdout", std::io::stdout().as_fd(), |null| rustix::stdio::dup2_stdout(null))
}

fn take_over(
    name: &str,
    socket: BorrowedFd<'_>,
    replace: impl FnOnce(&File) -> rustix::io::Result<()>,
) -> Result<OwnedFd> {
    let fail = |e| Error::io("take over the socket at", name, e);
    let socket = socket.try_clone_to_owned().map_err(fail)?;
    let null =
        File::options().read(true).write(true).open("/dev/null").map_err(|e| Error::io("open", "/dev/null", e))?;
    replace(&null).map_err(|e| fail(e.into()))?;
    Ok(socket)
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
            caller.tell(&Report::Failed(Told::from(&error))).ok();
            ExitCode::FAILURE
        }
    }
}

/// What one worker is, to us.
struct Worker {
    child: Child,
    pidfd: OwnedFd,
    channel: Channel,
    id: ProcessId,
    serving_since: Option<Instant>,
    /// Requests that it answered because they would end a thread.
    poisoned: usize,
}

/// What a supervisor begins with.
enum Stand {
    /// A directory to mount on.
    At(Point),
    /// What a dead one left mounted.
    On(Standing),
}

/// A mount with its agreed INIT.
struct Standing {
    mounted: Mounted,
    init: Vec<u8>,
    reply: Vec<u8>,
}

struct Supervisor {
    job: Job,
    job_file: OwnedFd,
    sources: Sources,
    legacy: Legacy,
    /// The program we run: the worker is the same one, also after the file was replaced.
    program: OwnedFd,
    me: ProcessId,
    signals: UnixStream,
    standing: Standing,
    worker: Option<Worker>,
    restarts: Restarts,
    /// The last worker lost a thread to a request.
    with_care: bool,
    /// `None`: the state directory did not let us; the rootfs is served all the same.
    control: Option<Listener>,
    /// Somebody else keeps the connection too: it does not end with us.
    is_shelved: bool,
}

pub(super) fn memory_file(name: &str, content: &[u8]) -> Result<OwnedFd> {
    let fail = |e: Errno| Error::sys("make memory file", name, e);
    let fd = memfd_create(name, MemfdFlags::CLOEXEC).map_err(fail)?;
    let mut file = File::from(fd);
    file.write_all(content).map_err(|e| Error::io("write memory file", name, e))?;
    Ok(file.into())
}

fn catch_signals() -> Result<UnixStream> {
    let caught = || -> std::io::Result<UnixStream> {
        let (wake, told) = UnixStream::pair()?;
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::low_level::pipe::register(signal, told.try_clone()?)?;
        }
        Ok(wake)
    };
    caught().map_err(|e| Error::io("catch signals", "SIGINT, SIGTERM", e))
}

impl Supervisor {
    /// Everything up to a rootfs that answers and a caller who knows. On an error nothing is left.
    fn set_up(caller: &Caller) -> Result<Self> {
        let Order { course, job, job_file, state_dir } = caller.order()?;
        let me = ProcessId::current()?;
        let signals = catch_signals()?;
        let program = crate::sys::fs::open_path(Path::new("/proc/self/exe"))
            .map_err(|e| Error::sys("open", "/proc/self/exe", e).hint("mount /proc"))?;
        let (sources, legacy, stand) = if course == Course::Adopt {
            let Inheritance { sources, legacy, mounted, init, reply } =
                Inheritance::receive(&job.plan, &caller.channel)?;
            (sources, legacy, Stand::On(Standing { mounted, init, reply }))
        } else {
            let (point, in_use, fds) = protocol::take_places(&caller.channel, &job.plan)?;
            let sources = Sources { in_use, ..Sources::sort(&job.plan, fds)? };
            (sources, Legacy::new(&job.plan)?, Stand::At(point))
        };
        let control = Listener::bind(state_dir, &job.plan.state_dir)
            .inspect_err(|e| log::warn!(target: TARGET, "{e}: no statistics, no restart"))
            .ok();
        caller.ask(&Report::Started { supervisor: me })?;
        fault::point("server.worker")?;

        let mut worker = Worker::start(&program, &job)?;
        let built = worker
            .build(&job_file, &sources, control.as_ref(), &legacy)
            .and_then(|()| caller.ask(&Report::Built { worker: worker.id }));
        let standing = built.and_then(|()| match stand {
            Stand::On(standing) => go_on(&job, &mut worker, standing),
            Stand::At(point) => mount_at(&job, &mut worker, &point),
        });
        let standing = match standing {
            Ok(standing) => standing,
            Err(error) => {
                worker.kill();
                return Err(error);
            }
        };
        let supervisor = Supervisor {
            job,
            job_file,
            sources,
            legacy,
            program,
            me,
            signals,
            standing,
            worker: Some(worker),
            restarts: Restarts::new(),
            with_care: false,
            control,
            is_shelved: course != Course::Mount,
        };
        let known =
            fault::point("server.ready").and_then(|()| caller.ask(&Report::Ready(Box::new(supervisor.traces()))));
        match known {
            Ok(()) => {
                if course == Course::MountAndShelve
                    && let Err(error) = supervisor.hand_over(&caller.channel)
                {
                    log::warn!(target: TARGET, "{error}: this rootfs will not outlive its server");
                }
                log::info!(
                    target: TARGET,
                    "{} is served by worker {}",
                    show(&supervisor.job.plan.rootfs),
                    supervisor.worker.as_ref().map_or(0, |w| w.id.pid)
                );
                Ok(supervisor)
            }
            Err(error) => {
                let undo = supervisor.take_down(Unmount::Lazy);
                Err(error.with_undo(undo))
            }
        }
    }

    /// What a later supervisor needs, for the caller to put on its shelf.
    fn hand_over(&self, to: &Channel) -> Result<()> {
        let Standing { mounted, init, reply } = &self.standing;
        let state = shelf::State::new(&self.job, mounted, init, reply)?.to_bytes()?;
        let state = memory_file("fsprov-state", &state)?;
        shelf::send_all(to, &mounted.connection, &state, &self.sources, &self.legacy)
    }

    fn traces(&self) -> Traces {
        Traces {
            mount_id: Some(self.info().id),
            unique_mount_id: self.standing.mounted.unique,
            supervisor: Some(self.me),
            worker: self.worker.as_ref().map(|w| w.id),
            fuse_connection: Some(self.info().dev.1),
            ..Traces::default()
        }
    }

    fn info(&self) -> &MountInfo {
        &self.standing.mounted.info
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
                            if let Some(other) = self.legacy.hear(message, fds) {
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
        let begun = worker.build(&self.job_file, &self.sources, self.control.as_ref(), &self.legacy).and_then(|()| {
            let start =
                Begin::Again { reply: hex(&self.standing.reply), resend: self.job.resend, with_care: self.with_care };
            worker.begin(&self.standing, start)
        });
        match begun {
            Ok((_, in_flight)) => {
                self.worker = Some(worker);
                Ok(in_flight)
            }
            Err(error) => Err((error, worker.kill())),
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
                Some((message, fds)) => drop(self.legacy.hear(message, fds)),
                None => {}
            }
        };
        Ok(serde_json::json!({
            "worker": of_worker,
            "worker_pid": worker.id.pid,
            "supervisor_pid": self.me.pid,
            "supervisor_memory": super::figures::memory(),
            "restarts": self.restarts.total(),
            "nameless_files_kept": self.legacy.kept(),
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
            while let Some((message, fds)) = old.channel.receive_now()? {
                self.legacy.hear(message, fds);
            }
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
        let done = take_away(self.info(), how, &self.job.method);
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
            && let Err(error) = mount::abort(self.info().dev.1)
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

/// Mount, and let the worker begin. On an error nothing is mounted.
fn mount_at(job: &Job, worker: &mut Worker, point: &Point) -> Result<Standing> {
    fault::point("server.mount")?;
    let source = job.source();
    let held_back = super::has_mounts_for_volumes(&job.plan, &job.method);
    let request = Request {
        point,
        source: &source,
        read_only: job.is_read_only(),
        others: job.others,
        nosuid: held_back || job.plan.restraint.nosuid(),
        nodev: held_back || job.plan.restraint.nodev(),
    };
    let mounted = mount::mount(&job.method, &request)?;
    let begun = fault::point("server.mounted").and_then(|()| session::read_init(&mounted.connection));
    let mut standing = Standing { mounted, init: Vec::new(), reply: Vec::new() };
    let begun = begun.and_then(|init| {
        standing.init = init;
        worker.begin(&standing, Begin::First)
    });
    match begun {
        Ok((reply, _)) => Ok(Standing { reply, ..standing }),
        Err(error) => {
            Err(error.with_undo(mount::unmount(&standing.mounted.info, Unmount::Lazy, Some(&job.method)).map(drop)))
        }
    }
}

/// Let the worker begin on a connection that a dead supervisor held. On an error it is as before.
fn go_on(job: &Job, worker: &mut Worker, standing: Standing) -> Result<Standing> {
    let start = Begin::Again { reply: hex(&standing.reply), resend: job.resend, with_care: false };
    let (_, in_flight) = worker.begin(&standing, start)?;
    log::info!(target: TARGET, "{}: adopted, requests in flight: {in_flight:?}", show(&job.plan.rootfs));
    Ok(standing)
}

/// Unmount in a thread of its own: writing back dirty pages needs a worker, and there may be none.
fn take_away(info: &MountInfo, how: Unmount, method: &Method) -> Result<()> {
    let (send, done) = std::sync::mpsc::channel();
    let (mount, method) = (info.clone(), method.clone());
    std::thread::spawn(move || {
        let result = mount::unmount(&mount, how, Some(&method)).or_else(|e| match (e.kind(), how) {
            (Kind::Busy, Unmount::IfIdle) => {
                log::warn!(target: TARGET, "{e}: unmounting lazily");
                mount::unmount(&mount, Unmount::Lazy, Some(&method))
            }
            _ => Err(e),
        });
        // The receiver is gone only if it gave up.
        let _ = send.send(result);
    });
    match done.recv_timeout(UNMOUNT_PATIENCE) {
        Ok(result) => result.map(drop),
        Err(_) => mount::abort(info.dev.1).and_then(|()| {
            done.recv_timeout(UNMOUNT_PATIENCE)
                .map_err(|e| Error::new(Kind::Io, "unmount", show(&info.point), e))?
                .map(drop)
        }),
    }
}

impl Worker {
    fn start(program: &OwnedFd, job: &Job) -> Result<Self> {
        const OP: &str = "start worker";
        let (channel, theirs) = Channel::pair()?;
        let (answering, asking) = groups::pair().map_err(|e| Error::io(OP, "", e))?;
        let child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
            .arg0(spawn::title(&job.plan))
            .arg(WORK)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(asking))
            .spawn()
            .map_err(|e| Error::io(OP, show(&job.plan.rootfs), e))?;
        // A thread of its own, which opens nothing but /proc: a request waits for it. It ends with the worker.
        std::thread::Builder::new()
            .name("fsprov-groups".into())
            .spawn(move || groups::answer(answering))
            .map_err(|e| Error::io("start thread", "groups", e))?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let raw_pid = Pid::from_raw(pid).ok_or_else(|| Error::new(Kind::Io, OP, pid, "it has no pid"))?;
        // It is our child and not waited for: the pid cannot mean anyone else.
        let pidfd = pidfd_open(raw_pid, PidfdFlags::empty()).map_err(|e| Error::sys(OP, pid, e))?;
        let worker = Worker { child, pidfd, channel, id: ProcessId::of(pid)?, serving_since: None, poisoned: 0 };
        if let Err(error) = note_worker(&job.plan, worker.id) {
            log::warn!(target: TARGET, "{error}: should this process die, that one may be called dead");
        }
        Ok(worker)
    }

    /// Hand it what it serves, and see its trees built.
    fn build(
        &mut self,
        job_file: &OwnedFd,
        sources: &Sources,
        control: Option<&Listener>,
        legacy: &Legacy,
    ) -> Result<()> {
        sources.send(job_file, control.map(Listener::as_fd), legacy, &self.channel)?;
        match self.expect("build its trees")? {
            FromWorker::Built => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Its next message, while it lives and does not take too long.
    fn expect(&mut self, what: &str) -> Result<FromWorker> {
        let failed = |cause: String| Error::new(Kind::Helper, "wait for worker to", what, cause);
        let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timespec(WORKER_PATIENCE))))
            .map_err(|e| Error::sys("wait for worker to", what, e))?;
        if ready == 0 {
            return Err(failed(format!("it did not within {} s", WORKER_PATIENCE.as_secs())));
        }
        match self.channel.receive()? {
            Some((FromWorker::Failed(told), _)) => Err(told.into()),
            Some((message, _)) => Ok(message),
            None => {
                let status = self.child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                Err(failed(format!("it ended ({status})")))
            }
        }
    }

    fn begin(&mut self, standing: &Standing, start: Begin) -> Result<(Vec<u8>, InFlight)> {
        let minor = standing.mounted.info.dev.1;
        let word = ToWorker::Begin { init: hex(&standing.init), start, minor };
        self.channel.send(&word, &[standing.mounted.connection.as_fd()])?;
        match self.expect("begin")? {
            FromWorker::Serving { reply, in_flight, poisoned } => {
                self.poisoned = poisoned;
                self.serving_since = Some(Instant::now());
                Ok((unhex(&reply)?, in_flight))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// It ends by itself when its mount is gone; wait for that, not for long.
    fn end(&mut self) {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ended = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timespec(END_PATIENCE))));
        if ended.is_ok_and(|n| n > 0) {
            let _ = self.child.wait();
        } else {
            self.kill();
        }
    }

    /// End it. Gives how it died, if it had before.
    fn kill(&mut self) -> Death {
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
    Error::new(Kind::Helper, "talk to worker", "", format!("it says {message:?} out of turn"))
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// Write down which process answers, before it does: where the supervisor dies, nobody else knows.
fn note_worker(plan: &Plan, worker: ProcessId) -> Result<()> {
    const OP: &str = "write down the worker in";
    let fail = |e| Error::io(OP, show(&plan.state_dir), e);
    let text = serde_json::to_vec(&worker).map_err(|e| Error::new(Kind::Io, OP, show(&plan.state_dir), e))?;
    let (path, new) = (plan.state_dir.join(names::WORKER), plan.state_dir.join(format!("{}.new", names::WORKER)));
    std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)).map_err(fail)
}

/// The process that answers for a rootfs now. `None`: none does, or not that can be seen.
pub fn worker_of(plan: &Plan, traces: &Traces) -> Option<ProcessId> {
    // Of another boot there is no process, whatever has its number now.
    traces.supervisor.or(traces.worker)?;
    let written = std::fs::read(plan.state_dir.join(names::WORKER)).ok();
    let written = written.and_then(|text| serde_json::from_slice::<ProcessId>(&text).ok());
    written.or(traces.worker).filter(|worker| worker.is_alive())
}

/// Is this process a server of ours, as far as its name tells?
pub(crate) fn is_server(pid: i32) -> bool {
    let comm = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    [super::SUPERVISOR_NAME, super::WORKER_NAME].iter().any(|name| name.to_bytes() == comm.trim_ascii_end())
}
