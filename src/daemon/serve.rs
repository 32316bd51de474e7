//! The worker: builds the trees from descriptors it is given, and answers requests until the mount is gone.
//!
//! Its exit code speaks to the supervisor: 0 the connection is gone, anything else is a death.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::control::{Listener, Question};
use super::protocol::{Begin, FromWorker, Job, ToWorker};
use super::sources::{Sources, read_memory_file};
use super::startup::settle;
use super::walls::{self, Walls};
use super::{REQUEST_LOST, TARGET, figures, hex, unhex};
use crate::child::channel::Channel;
use crate::child::{take_stdin, take_stdout};
use crate::error::{Error, Kind, Result, SentError, show};
use crate::fuse::adapter::{AdapterOptions, FuseAdapter, MAX_REQUEST};
use crate::fuse::buffers::Buffers;
use crate::fuse::counters::{Counters, Operation};
use crate::fuse::inflight::Notes;
use crate::fuse::poison;
use crate::fuse::session::{self, InFlight, Resend, Start};
use crate::index::Index;
use crate::plan::BackendKind;
use crate::sys::process::not_started;
use crate::sys::raw;
use crate::tree::device::DeviceTree;
use crate::tree::dir::{ActAs, DirOptions, DirTree, FdPool, Handover, Keeper, Shares, groups};
use crate::tree::image::{Devices, ImageTree, Trust};
use crate::tree::route::RouteTree;
use crate::tree::upper::{UpperOptions, UpperTree};
use crate::tree::{Node, Tree};
use crate::volume::Form;

/// The program.
pub(super) fn main() -> ExitCode {
    raw::fix_malloc_thresholds();
    settle(super::WORKER_NAME);
    super::log::start("worker");
    poison::end_with_a_lost_thread(super::THREAD_LOST);
    #[cfg(feature = "failpoints")]
    let _scenario = fail::FailScenario::setup();
    let channel = match take_stdin() {
        Ok(fd) => Channel::from(fd),
        Err(error) => {
            log::error!(target: TARGET, "{error}");
            return ExitCode::FAILURE;
        }
    };
    match work(channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!(target: TARGET, "{error}");
            ExitCode::FAILURE
        }
    }
}

fn work(channel: Channel) -> Result<()> {
    let channel = Arc::new(channel);
    let failed = |error: Error| {
        // The supervisor may be gone; our log has it too.
        let _ = channel.send(&FromWorker::Failed(SentError::from(&error)), &[]);
        error
    };
    let (adapter, mut server, notes) = prepare(&channel).map_err(failed)?;
    channel.send(&FromWorker::Built, &[])?;
    let session = begin(adapter, &server, notes, &channel).map_err(failed)?;
    std::thread::Builder::new()
        .name("fsprov-control".into())
        .spawn(move || {
            server.walls.close_threads();
            control(&channel, &server);
        })
        .map_err(|e| not_started("start thread", "control", e))?;
    session.wait()
}

/// What statistics are taken from.
struct Server {
    job: Job,
    trees: Trees,
    counters: Arc<Counters>,
    started: Instant,
    walls: Walls,
    /// Answers questions once the supervisor is gone.
    control: Option<Listener>,
    /// Keeps the image in the store.
    _in_use: Option<OwnedFd>,
}

fn prepare(channel: &Arc<Channel>) -> Result<(FuseAdapter, Server, Notes)> {
    set_limits();
    let groups = take_stdout()?;
    let mut hand_over = take_job(channel)?;
    let job = hand_over.job.clone();
    let notes = hand_over
        .logs
        .pop()
        .ok_or_else(|| Error::new(Kind::Invalid, "take over a job", "", "there is no file for notes"))
        .and_then(Notes::new)?;
    let shares = Shares::of_process(job.threads, hand_over.kept.len())?;
    groups::ask_at(groups);
    figures::memory();
    crate::tree::dir::look_around();
    let drops_pages = crate::fuse::adapter::drops_written_pages();
    let walls = walls::raise(&job.plan, &mut hand_over.sources);
    let (control, in_use) = (hand_over.control.take(), hand_over.sources.in_use.take());
    let trees = Trees::build(hand_over, shares, channel)?;
    let has_live = job.plan.scratch.is_some() || !job.plan.volumes.is_empty();
    // True of directory trees: they write without CAP_FSETID, so the file system below takes setuid away.
    let options = AdapterOptions {
        kills_privileges: true,
        writeback: job.plan.live.writeback && !job.is_read_only(),
        posix_acl: job.checks_permissions() && (has_live || trees.whole.is_without_xattrs()),
        // Volumes and changes are opened as the caller.
        idmappable: job.checks_permissions() && !has_live,
        drops_pages,
    };
    let longest = if job.is_read_only() { session::MIN_READ_BUFFER } else { MAX_REQUEST };
    let buffers = Arc::new(Buffers::new(job.threads, longest));
    let adapter = FuseAdapter::new(Arc::clone(&trees.whole), options, buffers);
    let counters = adapter.counters();
    Ok((adapter, Server { job, trees, counters, started: Instant::now(), walls, control, _in_use: in_use }, notes))
}

fn begin(mut adapter: FuseAdapter, server: &Server, notes: Notes, channel: &Channel) -> Result<session::Running> {
    let job = &server.job;
    let Some((ToWorker::Begin { init, start, minor }, fds)) = channel.receive()? else {
        return Err(Error::new(Kind::Helper, "begin", "", "the supervisor gave up"));
    };
    let connection = single(fds)?;
    let init = unhex(&init)?;
    adapter.pace().watch(&connection, job.threads).map_err(|e| Error::io("watch the connection", "", e))?;
    let failed = if job.resend.works(&init) || job.resend == Resend::Lose {
        0
    } else {
        let failed = if matches!(start, Begin::Again { .. }) { notes.fail_all(&connection) } else { 0 };
        notes.start(job.threads);
        adapter.note_requests(notes);
        failed
    };
    let mut poisoned = 0;
    let (notifier, buffers) = (adapter.notifier(), adapter.buffers());
    let mut running = match &start {
        Begin::First => {
            adapter.is_first();
            session::start(adapter, &connection, &init, Start::First, &buffers)?
        }
        Begin::Again { reply, resend, with_care } => {
            let reply = unhex(reply)?;
            if *with_care && resend.works(&init) {
                session::ask_again(&connection)?;
                let sieved = poison::sieve(&connection, &init);
                poisoned = sieved.poisoned;
                for (node, count) in sieved.forgets {
                    server.trees.whole.forget(node, count);
                }
            }
            session::start(adapter, &connection, &init, Start::Again { reply: &reply, resend: *resend }, &buffers)?
        }
    };
    // Empty until now.
    let _ = notifier.set(running.notifier());
    if let InFlight::Failed(count) = &mut running.in_flight {
        *count = failed;
        watch_for_lost(connection, minor, Arc::clone(&server.counters))?;
    }
    crate::fault::point("worker.serving")?;
    channel.send(&FromWorker::Serving { reply: hex(&running.reply), in_flight: running.in_flight, poisoned }, &[])?;
    Ok(running)
}

/// Pause between two looks for lost requests.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Looks in all: who waits for a lost request waited before this worker began.
const LOOKS: u32 = 40;
/// Looks in a row, each with more requests waited for than are known, that tell a lost one.
const LOOKS_THAT_TELL: u32 = 8;

/// Where requests in flight cannot be asked for again, one that was read but not noted is lost, and the caller that waits for it waits for
/// ever. It shows as one more that the kernel waits for, while none is queued, than are being answered.
fn watch_for_lost(connection: OwnedFd, minor: u32, counters: Arc<Counters>) -> Result<()> {
    let look = move || {
        let mut in_a_row = 0;
        for _ in 0..LOOKS {
            std::thread::sleep(LOOK_EVERY);
            let Some(waiting) = session::waiting(minor) else {
                log::debug!(
                    target: TARGET,
                    "a request may have been lost with the last worker, and fusectl, which would show it, is not mounted"
                );
                return;
            };
            let lost = waiting > counters.in_progress() && !session::is_queued(&connection);
            in_a_row = if lost { in_a_row + 1 } else { 0 };
            if in_a_row == LOOKS_THAT_TELL {
                log::error!(target: TARGET, "a request was lost with the last worker: ending the connection");
                std::process::exit(REQUEST_LOST);
            }
        }
    };
    std::thread::Builder::new()
        .name("fsprov-lost".into())
        .spawn(look)
        .map(drop)
        .map_err(|e| not_started("start thread", "lost requests", e))
}

/// The supervisor's later wishes. Ends with the supervisor; the session does not: the rootfs goes on without one.
fn control(channel: &Channel, server: &Server) {
    loop {
        match channel.receive::<ToWorker>() {
            Ok(Some((ToWorker::Level(level), _))) => {
                super::log::set_level(&level);
            }
            Ok(Some((ToWorker::Stats, _))) => {
                let _ = channel.send(&FromWorker::Stats(server.stats()), &[]);
            }
            Ok(Some((other, _))) => log::warn!(target: TARGET, "unexpected message: {other:?}"),
            Ok(None) => {
                log::warn!(target: TARGET, "the supervisor is gone: nobody starts another worker after this one");
                return alone(server);
            }
            Err(error) => {
                log::error!(target: TARGET, "{error}");
                return;
            }
        }
    }
}

/// Without a supervisor: answer what can be asked of a worker.
fn alone(server: &Server) {
    let Some(control) = &server.control else { return };
    loop {
        let asked = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(control, PollFlags::IN)], None));
        if let Err(e) = asked {
            log::error!(target: TARGET, "wait for a question: {e}");
            return;
        }
        let Some(client) = control.accept() else { continue };
        client.answer(match &client.question {
            Question::Stats => Ok(serde_json::json!({
                "worker": server.stats(),
                "worker_pid": rustix::process::getpid().as_raw_nonzero(),
                "unsupervised": true,
            })),
            Question::Level(level) if super::log::set_level(level) => Ok(serde_json::Value::Null),
            Question::Level(level) => Err(super::log::no_level(level)),
            Question::Restart(_) => Err(Error::new(
                Kind::Helper,
                "restart worker of",
                show(&server.job.plan.rootfs),
                "its supervisor died, and nobody else starts one",
            )
            .hint("fsprov unmount, and mount again")),
        });
    }
}

fn single(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
        Error::new(Kind::Invalid, "read a message of a server process", "", format!("it has {} descriptors", fds.len()))
    })?;
    Ok(fd)
}

/// What the supervisor hands over.
struct HandOver {
    job: Job,
    sources: Sources,
    logs: Vec<OwnedFd>,
    kept: Vec<((u32, u64), OwnedFd)>,
    control: Option<Listener>,
}

fn take_job(channel: &Channel) -> Result<HandOver> {
    const OP: &str = "take over a job";
    let early = || Error::new(Kind::Helper, OP, "", "the supervisor ended before it sent all of it");
    let Some((ToWorker::Job { sources, logs, kept }, fds)) = channel.receive()? else { return Err(early()) };
    // From the supervisor: as long as it is.
    let mut fds = fds.into_iter();
    let job: Job = read_memory_file(fds.next().ok_or_else(early)?, "fsprov-job", u64::MAX)?;
    let in_use = job.plan.index.as_ref().and_then(|_| fds.next());
    let control = fds.next().map(Listener::from);
    let (mut all_sources, mut all_logs, mut all_kept) = (Vec::new(), Vec::new(), Vec::new());
    while all_sources.len() < sources || all_logs.len() < logs || all_kept.len() < kept {
        match channel.receive()? {
            Some((ToWorker::Sources, fds)) => all_sources.extend(fds),
            Some((ToWorker::Logs, fds)) => all_logs.extend(fds),
            Some((ToWorker::Kept(keys), fds)) => all_kept.extend(keys.into_iter().zip(fds)),
            _ => return Err(early()),
        }
    }
    let sources = Sources { in_use, ..Sources::sort(&job.plan, all_sources)? };
    Ok(HandOver { job, sources, logs: all_logs, kept: all_kept, control })
}

/// Most of the address space: 8 threads with their stacks, buffers and arenas, eight million nodes in a table that grows, and an
/// index of ten million files are less than half of it.
const MAX_ADDRESSES: u64 = 16 << 30;

fn set_limits() {
    // What its callers may write is asked of them, by the kernel.
    crate::sys::process::outlive_file_limit();
    let files = getrlimit(Resource::Fsize);
    if let Err(e) = setrlimit(Resource::Fsize, Rlimit { current: files.maximum, maximum: files.maximum }) {
        log::debug!(target: TARGET, "RLIMIT_FSIZE: {e}");
    }
    // Its memory holds what its callers read and write.
    if let Err(e) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        log::debug!(target: TARGET, "RLIMIT_CORE: {e}");
    }
    // Someone who takes it over is not to take the machine's memory.
    let most = getrlimit(Resource::As).maximum.map_or(MAX_ADDRESSES, |most| most.min(MAX_ADDRESSES));
    if let Err(e) = setrlimit(Resource::As, Rlimit { current: Some(most), maximum: Some(most) }) {
        log::debug!(target: TARGET, "RLIMIT_AS: {e}");
    }
}

/// Gives descriptors of one tree to the supervisor.
struct KeptBySupervisor {
    channel: Arc<Channel>,
    tree: u32,
}

impl Keeper for KeptBySupervisor {
    fn keep(&self, node: Node, fd: BorrowedFd<'_>) {
        if let Err(e) = self.channel.send(&FromWorker::Keep(self.tree, node), &[fd]) {
            log::debug!(target: TARGET, "a nameless file will not outlive this process: {e}");
        }
    }
    fn release(&self, node: Node) {
        if let Err(e) = self.channel.send(&FromWorker::Release(self.tree, node), &[]) {
            log::debug!(target: TARGET, "{e}");
        }
    }
}

/// What the rootfs shows, and the trees it is made of.
struct Trees {
    whole: Arc<dyn Tree>,
    image: Option<Arc<ImageTree>>,
    directories: Vec<Arc<DirTree>>,
    pool: Arc<FdPool>,
}

impl Trees {
    fn build(hand_over: HandOver, shares: Shares, channel: &Arc<Channel>) -> Result<Self> {
        let HandOver { job, sources: Sources { layers, index, upper, volumes, .. }, logs, kept, .. } = hand_over;
        let plan = &job.plan;
        // One pool for all directory trees: a number of volumes does not multiply descriptors.
        let pool = FdPool::with(shares)?;
        let mut handover = Handovers { logs: logs.into_iter(), kept, channel };
        let (mut mapped, mut directories) = (None, Vec::new());
        let directory = |root, options, handover| -> Result<Arc<DirTree>> {
            Ok(Arc::new(DirTree::open_again(root, options, Arc::clone(&pool), handover)?))
        };
        let of_image = handover.next(0);
        let image: Arc<dyn Tree> = if let Some(index) = index {
            let tree = Arc::new(image_tree(&job, &index, layers)?);
            tree.keep_open(shares.image);
            mapped = Some(Arc::clone(&tree));
            match upper {
                None => tree,
                Some(place) => {
                    let options = UpperOptions {
                        act_as: ActAs::detect(),
                        writeback: plan.live.writeback,
                        durable: plan.changes_stay,
                    };
                    // In this process's own root it has another path.
                    let shown = plan.scratch.as_ref().map(|scratch| show(&scratch.0)).unwrap_or_default();
                    let (tree, changes) = UpperTree::open(tree, (place, &shown), options, Arc::clone(&pool), of_image)?;
                    directories.push(changes);
                    Arc::new(tree)
                }
            }
        } else {
            plan.single_layer(BackendKind::Fuse)?;
            let layer = layers.into_iter().next().ok_or_else(|| {
                Error::new(Kind::Invalid, "serve", show(&plan.rootfs), "the image has no filesystem layer")
            })?;
            let tree = directory(layer, DirOptions::image(plan.ownership.clone()), of_image)?;
            directories.push(Arc::clone(&tree));
            tree
        };
        let mut routed: Vec<_> = Vec::with_capacity(volumes.len());
        for (number, (volume, source)) in (1..).zip(plan.volumes.iter().zip(volumes)) {
            let handover = handover.next(number);
            let (tree, form): (Arc<dyn Tree>, _) = if let Some(device) = DeviceTree::of(&source, volume.access) {
                (Arc::new(device), Form::File)
            } else {
                let options = DirOptions {
                    ttl: Duration::from_millis(plan.live.ttl_ms),
                    writeback: plan.live.writeback,
                    ..DirOptions::volume(volume.access)
                };
                let tree = directory(source, options, handover)?;
                directories.push(Arc::clone(&tree));
                (tree, volume.form)
            };
            routed.push((volume.target.clone(), form, volume.access, tree));
        }
        let whole = RouteTree::build(image, routed)?;
        let has_stubs = plan.stubs && plan.scratch.is_none();
        let whole = Arc::new(if has_stubs { whole.with_stubs() } else { whole });
        Ok(Trees { whole, image: mapped, directories, pool })
    }
}

/// What earlier workers left, tree by tree.
struct Handovers<'a> {
    logs: std::vec::IntoIter<OwnedFd>,
    kept: Vec<((u32, u64), OwnedFd)>,
    channel: &'a Arc<Channel>,
}

impl Handovers<'_> {
    fn next(&mut self, tree: u32) -> Option<Handover> {
        let logs = [self.logs.next()?, self.logs.next()?];
        let (ours, others) = std::mem::take(&mut self.kept).into_iter().partition(|((of, _), _)| *of == tree);
        self.kept = others;
        let kept = Vec::into_iter(ours).map(|((_, node), fd)| (node, fd)).collect();
        Some(Handover { logs, kept, keeper: Arc::new(KeptBySupervisor { channel: Arc::clone(self.channel), tree }) })
    }
}

impl Server {
    fn stats(&self) -> serde_json::Value {
        let by_kind: serde_json::Map<_, _> = Operation::ALL
            .iter()
            .map(|&o| (o, self.counters.of(o)))
            .filter(|(_, count)| *count > 0)
            .map(|(o, count)| (o.name().to_owned(), count.into()))
            .collect();
        let (held, limit) = self.trees.pool.usage();
        #[allow(unused_mut)]
        let mut stats = serde_json::json!({
            "rootfs": show(&self.job.plan.rootfs),
            "uptime_s": self.started.elapsed().as_secs(),
            "requests": by_kind,
            "requests_total": self.counters.total(),
            "panics": self.counters.panics(),
            "in_progress": self.counters.in_progress(),
            "latency_us_sum": self.counters.microseconds(),
            "walls": self.walls,
            "latency_us_below_power_of_two": self.counters.latencies().to_vec(),
            "nodes": self.trees.directories.iter().map(|t| t.node_count()).sum::<usize>(),
            "handles": self.trees.directories.iter().map(|t| t.handle_count()).sum::<usize>(),
            "image_files_open": self.trees.image.as_ref().map_or(0, |t| t.open_files()),
            "files_held": held,
            "files_limit": limit,
            "directories_cached": self.trees.pool.cached(),
            "descriptors": figures::descriptors(),
            "memory": figures::memory(),
        });
        #[cfg(feature = "failpoints")]
        if let Some(attempts) = walls::attempt_escapes() {
            stats["escapes"] = serde_json::json!(attempts);
        }
        stats
    }
}

fn image_tree(job: &Job, index: &OwnedFd, layers: Vec<OwnedFd>) -> Result<ImageTree> {
    let index = Index::from_file(&reopen(index)?.into())?;
    let devices = if job.plan.restraint.no_devices { Devices::LeftOut } else { Devices::Shown };
    Ok(ImageTree::open(index, layers, job.plan.ownership.clone(), Trust::default())?.devices(devices))
}

/// An O_PATH descriptor of a regular file opened again for reading, through /proc: the same file, wherever its name leads by now.
fn reopen(fd: &OwnedFd) -> Result<OwnedFd> {
    rustix::fs::openat(rustix::fs::CWD, crate::sys::fs::proc_path(fd), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::sys("open index", show(crate::sys::fs::path_of(fd).unwrap_or_default()), e))
}
