//! The caller's side: start a server that belongs to nobody, and wait until the rootfs answers.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::protocol::{self, Course, Job, Report, ToSupervisor};
use super::sources::memory_file;
use super::{SUPERVISE, TARGET, has_mounts_for_volumes, names, shelf, sources};
use crate::child::channel::Channel;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::fuse::mount::{self, Method, OtherUsers};
use crate::fuse::session::Resend;
use crate::place::{Place, Places};
use crate::plan::Plan;
use crate::sys::process::{ProcessId, not_started};
use crate::traces::{Journal, Shelf, Shelved, Traces};

/// How a server runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// May users other than the one who mounts enter?
    pub others: OtherUsers,
    /// Threads that answer requests.
    pub threads: usize,
    /// The program to run as server: one whose `main` calls [`crate::dispatch`]. `None`: this one if it does, else `fsprov` on
    /// PATH.
    pub program: Option<PathBuf>,
    /// Ask for requests in flight again after a crash?
    pub resend: Resend,
}

/// More threads than this gained nothing: each costs memory once it was used.
const MAX_THREADS: usize = 8;

impl Default for Options {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(2, usize::from);
        // One more than one at least: a request that waits for the disk must not hold up all the others.
        let threads = cpus.clamp(2, MAX_THREADS);
        Options { others: OtherUsers::Usual, threads, program: None, resend: Resend::from_env() }
    }
}

/// Longest wait for one step of the server. Building a tree reads the image's top and the volumes' targets; a disk that is
/// slow to wake is the worst of it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for a server to take everything back after its caller gave up.
const UNDO_PATIENCE: Duration = Duration::from_secs(10);
/// How much of the log's end an error carries.
const LOG_TAIL: u64 = 2000;
/// What a server keeps of the caller's environment.
const ENVIRONMENT: [&str; 6] =
    ["PATH", "FSPROV_LOG", "FAILPOINTS", "RUST_BACKTRACE", "FSPROV_FUSE_MAX_NODES", "FSPROV_FUSE_PACE"];

/// What is left to do once the rootfs answers: it may add to the traces.
pub(crate) type Finish<'a> = &'a mut dyn FnMut(&mut Traces, &mut Journal<'_>) -> Result<()>;

/// Start a server for `plan`, of these places, and `finish`. What there is is noted before more is done; when this returns the rootfs answers, and on
/// an error nothing of it is left.
pub(crate) fn start(
    plan: &Plan,
    places: &Places,
    method: Method,
    options: &Options,
    journal: &mut Journal<'_>,
    finish: Finish<'_>,
) -> Result<Traces> {
    sources::check_servable(plan, places)?;
    fault::point("fuse.spawn")?;
    let job =
        Job { plan: plan.clone(), method, others: options.others, threads: options.threads, resend: options.resend };
    let course = if journal.shelf.is_some() { Course::MountAndShelve } else { Course::Mount };
    let mut link = Link::open(&job, course, &places.state, options, |to| protocol::hand_places(to, places))?;
    let mut traces = Traces::default();
    if !has_mounts_for_volumes(plan, &job.method) {
        traces.note_parts(Vec::new());
    }
    match link.follow(&mut traces, journal, finish) {
        Ok(()) => {
            link.shelve(plan, journal.shelf.as_deref());
            Ok(traces)
        }
        Err(error) => {
            // Its end of the socket closes: it takes everything back and ends.
            drop(link);
            Err(error.with_undo(wait_for_end(&traces)))
        }
    }
}

/// Start a supervisor that goes on where a dead one was, with what a [`Shelf`] kept for it. On an error the connection is ended.
pub(crate) fn adopt(
    plan: &Plan,
    traces: &Traces,
    shelved: Vec<Shelved>,
    options: &Options,
    journal: &mut Journal<'_>,
) -> Result<Traces> {
    let (job, fds) = shelf::check(plan, traces, shelved)?;
    let mut now = Traces { supervisor: None, worker: None, ..traces.clone() };
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let adopted = end_worker(traces)
        // Below the state root, which is ours.
        .and_then(|()| Place::open(&plan.state_dir).map_err(|e| Error::sys("open", show(&plan.state_dir), e)))
        .and_then(|state| Link::open(&job, Course::Adopt, &state, options, |to| protocol::hand(to, &fds)))
        .and_then(|mut link| link.follow(&mut now, journal, &mut |_, _| Ok(())));
    match adopted {
        Ok(()) => Ok(now),
        Err(error) => {
            let end = wait_for_end(&Traces { supervisor: now.supervisor, worker: now.worker, ..Traces::default() });
            // The caller that waits for an answer must not wait for the shelf to let go.
            let aborted = traces.fuse_connection.map_or(Ok(()), mount::abort);
            Err(error.with_undo(end).with_undo(aborted))
        }
    }
}

/// A worker whose supervisor died goes on; two must not.
fn end_worker(traces: &Traces) -> Result<()> {
    for process in alive(traces) {
        process.send_signal(rustix::process::Signal::KILL)?;
    }
    wait_for_end(traces)
}

fn wait_for_end(traces: &Traces) -> Result<()> {
    for process in [traces.supervisor, traces.worker].into_iter().flatten() {
        if !process.wait_gone(UNDO_PATIENCE)? {
            return Err(
                Error::new(Kind::Helper, "stop server", process, "it does not end").hint(format!("kill -9 {process}"))
            );
        }
    }
    Ok(())
}

struct Link {
    channel: Channel,
    log: PathBuf,
}

impl Link {
    /// Start the supervisor, and give it its order; `hand` hands over what goes with it.
    fn open(
        job: &Job,
        course: Course,
        state: &Place,
        options: &Options,
        hand: impl FnOnce(&Channel) -> Result<()>,
    ) -> Result<Self> {
        const OP: &str = "start server";
        let log = job.plan.state_dir.join(names::LOG);
        let program = program(options)?;
        let fail = |e| Error::io(OP, show(&program), e);
        let (channel, theirs) = Channel::pair()?;
        let log_file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log)
            .map_err(|e| Error::io("open server log", show(&log), e))?;
        let kept = ENVIRONMENT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
        let mut first = Command::new(&program)
            .arg0(title(&job.plan))
            .arg(SUPERVISE)
            .env_clear()
            .envs(kept)
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log_file))
            .spawn()
            .map_err(|e| not_started(OP, show(&program), e))?;
        // The first process forks and ends at once: its child is not ours, and no zombie is left to us.
        let status = first.wait().map_err(fail)?;
        let link = Link { channel, log };
        if !status.success() {
            let died = link.died(OP, format!("{} ended with {status}", show(&program)));
            let is_ours = !tail_of(&link.log).is_empty();
            let hint = "the program must be fsprov, or one that calls fsprov::dispatch() first";
            return Err(if is_ours { died } else { died.hint(hint) });
        }
        let text = serde_json::to_vec(job).map_err(|e| Error::new(Kind::Io, OP, show(&program), e))?;
        let job = memory_file("fsprov-job", &text)?;
        link.channel
            .send(&ToSupervisor::Order(course), &[job.as_fd(), state.as_fd()])
            .and_then(|()| hand(&link.channel))
            .map_err(|e| link.died("speak to server", e.cause()))?;
        Ok(link)
    }

    fn follow(&mut self, traces: &mut Traces, journal: &mut Journal<'_>, finish: Finish<'_>) -> Result<()> {
        loop {
            match self.next()? {
                Report::Started { supervisor } => {
                    traces.supervisor = Some(supervisor);
                    journal.note(traces)?;
                    fault::point("fuse.build")?;
                }
                Report::Built { worker } => {
                    traces.worker = Some(worker);
                    journal.note(traces)?;
                    fault::point("fuse.mount")?;
                }
                Report::Ready(all) => {
                    let parts = (traces.parts.take(), std::mem::take(&mut traces.unique_parts));
                    *traces = Traces { parts: parts.0, unique_parts: parts.1, ..*all };
                    fault::point("fuse.mounted")?;
                    journal.note(traces)?;
                    finish(traces, journal)?;
                    fault::point("fuse.ready")?;
                    log::debug!(target: TARGET, "server ready: {traces:?}");
                    return self.go();
                }
                Report::Failed(told) => return Err(told.into()),
            }
            self.go()?;
        }
    }

    /// Put what the supervisor hands over on the shelf. Without it the rootfs is served all the same.
    fn shelve(&self, plan: &Plan, shelf: Option<&dyn Shelf>) {
        let Some(shelf) = shelf else { return };
        let put = protocol::take(&self.channel)
            .and_then(|fds| shelf::names(plan).iter().zip(&fds).try_for_each(|(name, fd)| shelf.put(name, fd.as_fd())));
        if let Err(error) = put {
            log::warn!(target: TARGET, "{error}: this rootfs will not outlive its server");
        }
    }

    fn next(&self) -> Result<Report> {
        const OP: &str = "wait for server";
        match self.channel.receive_within(PATIENCE) {
            Ok(Some((report, _))) => Ok(report),
            Ok(None) => Err(self.died(OP, "it ended without a word".to_owned())),
            Err(e) => Err(self.died(OP, e.cause())),
        }
    }

    fn go(&self) -> Result<()> {
        self.channel.send(&ToSupervisor::Go, &[]).map_err(|e| self.died("speak to server", e.cause()))
    }

    /// An error with the end of the server's log: it says why.
    fn died(&self, op: &'static str, cause: String) -> Error {
        let tail = tail_of(&self.log);
        let cause = if tail.is_empty() { cause } else { format!("{cause}; its log ends: {}", tail.trim_end()) };
        Error::new(Kind::Helper, op, "", cause).hint(format!("its log is {}", show(&self.log)))
    }
}

fn tail_of(path: &Path) -> String {
    use std::io::{Seek as _, SeekFrom};
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// What `ps` shows: whose server it is.
pub(super) fn title(plan: &Plan) -> OsString {
    let mut title = OsString::from("fsprov: ");
    title.push(&plan.rootfs);
    title
}

fn program(options: &Options) -> Result<PathBuf> {
    options.program.clone().map_or_else(|| crate::child::program("start server"), Ok)
}

/// Processes of a server that still run.
pub(crate) fn alive(traces: &Traces) -> impl Iterator<Item = ProcessId> {
    [traces.supervisor, traces.worker].into_iter().flatten().filter(|p| p.is_alive())
}
