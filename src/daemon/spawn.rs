//! The caller's side: start a server that belongs to nobody, and wait until the rootfs answers.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use super::channel::Channel;
use super::{Course, GO, Job, Order, Report, SUPERVISE, TARGET, names, shelf, this_program_serves};
use crate::backend::{ProcessId, Shelf, Shelved, Traces};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::fuse::mount::{self, Method, OtherUsers};
use crate::fuse::session::Resend;
use crate::plan::Plan;

/// How a server runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// May users other than the one who mounts enter?
    pub others: OtherUsers,
    /// Threads that answer requests.
    pub threads: usize,
    /// The program to run as server: one whose `main` calls [`super::dispatch`]. `None`: this one if it does, else `fsprov` on
    /// PATH.
    pub program: Option<PathBuf>,
    /// Ask for requests in flight again after a crash?
    pub resend: Resend,
    /// Where to put what the next supervisor needs, should all processes of this server die.
    pub shelf: Option<Arc<dyn Shelf>>,
}

/// More threads than this gained nothing: each costs memory once it was used.
const MAX_THREADS: usize = 8;

impl Default for Options {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(2, usize::from);
        // One more than one at least: a request that waits for the disk must not hold up all the others.
        let threads = cpus.clamp(2, MAX_THREADS);
        Options { others: OtherUsers::Usual, threads, program: None, resend: Resend::from_env(), shelf: None }
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

/// Start a server for `plan`. `note` writes down what there is before more is done; when this returns the rootfs answers, and on
/// an error nothing of it is left.
pub fn start(
    plan: &Plan,
    method: Method,
    options: &Options,
    note: &mut dyn FnMut(&Traces) -> Result<()>,
) -> Result<Traces> {
    fault::point("fuse.spawn")?;
    let job =
        Job { plan: plan.clone(), method, others: options.others, threads: options.threads, resend: options.resend };
    let course = if options.shelf.is_some() { Course::MountAndShelve } else { Course::Mount };
    let mut link = Link::open(&Order { job, course }, options, &[])?;
    let mut traces = Traces::default();
    match link.follow(&mut traces, note) {
        Ok(()) => {
            link.shelve(plan, options);
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
pub fn adopt(
    plan: &Plan,
    traces: &Traces,
    shelved: Vec<Shelved>,
    options: &Options,
    note: &mut dyn FnMut(&Traces) -> Result<()>,
) -> Result<Traces> {
    let (job, fds) = shelf::check(plan, traces, shelved)?;
    let mut now = Traces { supervisor: None, worker: None, ..traces.clone() };
    let adopted = end_worker(traces)
        .and_then(|()| Link::open(&Order { job, course: Course::Adopt }, options, &fds))
        .and_then(|mut link| link.follow(&mut now, note));
    match adopted {
        Ok(()) => Ok(now),
        Err(error) => {
            let end = wait_for_end(&Traces { supervisor: now.supervisor, worker: now.worker, ..Traces::default() });
            // Whoever waits for an answer must not wait for the shelf to let go.
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
    stream: BufReader<UnixStream>,
    /// For descriptors, where the order has any handed over.
    channel: Option<Channel>,
    log: PathBuf,
}

impl Link {
    fn open(order: &Order, options: &Options, fds: &[OwnedFd]) -> Result<Self> {
        const OP: &str = "start server";
        let plan = &order.job.plan;
        let log = plan.state_dir.join(names::LOG);
        let program = program(options)?;
        let fail = |e| Error::io(OP, show(&program), e);
        let (ours, theirs) = UnixStream::pair().map_err(fail)?;
        ours.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
        ours.set_write_timeout(Some(PATIENCE)).map_err(fail)?;
        let log_file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log)
            .map_err(|e| Error::io("open server log", show(&log), e))?;
        let (channel, stdout) = if order.course.hands_over() {
            let (channel, theirs) = Channel::pair()?;
            (Some(channel), Stdio::from(theirs))
        } else {
            (None, Stdio::null())
        };
        let kept = ENVIRONMENT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
        let mut first = Command::new(&program)
            .arg0(title(plan))
            .arg(SUPERVISE)
            .env_clear()
            .envs(kept)
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(stdout)
            .stderr(Stdio::from(log_file))
            .spawn()
            .map_err(fail)?;
        let mut stream = BufReader::new(ours);
        // The first process forks and ends at once: its child is not ours, and no zombie is left to us.
        let status = first.wait().map_err(fail)?;
        let mut link = if status.success() {
            Link { stream, channel, log }
        } else {
            let mut rest = String::new();
            let _ = stream.get_mut().set_read_timeout(Some(Duration::from_millis(100)));
            let _ = stream.read_to_string(&mut rest);
            return Err(Error::new(Kind::Helper, OP, show(&program), format!("it ended with {status}"))
                .hint("the program must be fsprov, or one that calls fsprov::daemon::dispatch() first"));
        };
        if let (Some(channel), Course::Adopt) = (&link.channel, order.course) {
            shelf::send(channel, &fds.iter().map(|fd| fd.as_fd()).collect::<Vec<_>>())?;
        }
        let mut text = serde_json::to_vec(order).map_err(|e| Error::new(Kind::Io, OP, show(&program), e))?;
        text.push(b'\n');
        link.write(&text)?;
        Ok(link)
    }

    fn follow(&mut self, traces: &mut Traces, note: &mut dyn FnMut(&Traces) -> Result<()>) -> Result<()> {
        loop {
            match self.next()? {
                Report::Started { supervisor } => {
                    traces.supervisor = Some(supervisor);
                    note(traces)?;
                    fault::point("fuse.build")?;
                }
                Report::Built { worker } => {
                    traces.worker = Some(worker);
                    note(traces)?;
                    fault::point("fuse.mount")?;
                }
                Report::Ready(all) => {
                    *traces = all;
                    fault::point("fuse.mounted")?;
                    note(traces)?;
                    fault::point("fuse.ready")?;
                    log::debug!(target: TARGET, "server ready: {traces:?}");
                    return self.write(GO);
                }
                Report::Failed(told) => return Err(told.into()),
            }
            self.write(GO)?;
        }
    }

    /// Put what the supervisor handed over on the shelf. Without it the rootfs is served all the same.
    fn shelve(&self, plan: &Plan, options: &Options) {
        let (Some(channel), Some(shelf)) = (&self.channel, &options.shelf) else { return };
        let put = shelf::receive(channel)
            .and_then(|fds| shelf::names(plan).iter().zip(&fds).try_for_each(|(name, fd)| shelf.put(name, fd.as_fd())));
        if let Err(error) = put {
            log::warn!(target: TARGET, "{error}: this rootfs will not outlive its server");
        }
    }

    fn next(&mut self) -> Result<Report> {
        const OP: &str = "wait for server";
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err(self.died(OP, "it ended without a word".to_owned())),
            Ok(_) => serde_json::from_str(&line).map_err(|e| Error::new(Kind::Helper, OP, "", e)),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                Err(self.died(OP, format!("it did not get ready within {} s", PATIENCE.as_secs())))
            }
            Err(e) => Err(self.died(OP, e.to_string())),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let done = self.stream.get_mut().write_all(bytes);
        done.map_err(|e| self.died("speak to server", e.to_string()))
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
    if let Some(program) = &options.program {
        return Ok(program.clone());
    }
    if this_program_serves() {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join("fsprov"))
        .find(|p| rustix::fs::access(p, rustix::fs::Access::EXEC_OK).is_ok() && p.is_file())
        .ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                "start server",
                "",
                "this program cannot be one and there is no fsprov on PATH",
            )
            .hint("install fsprov, name it in Options::program, or call fsprov::daemon::dispatch() first in main")
        })
}

/// Processes of a server that still run.
pub(crate) fn alive(traces: &Traces) -> impl Iterator<Item = ProcessId> {
    [traces.supervisor, traces.worker].into_iter().flatten().filter(|p| p.is_alive())
}
