//! The worker: builds the trees from descriptors it is given, and answers requests until the mount is gone.
//!
//! Its exit code speaks to the supervisor: 0 the connection is gone, anything else is a death.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::process::ExitCode;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::channel::{Begin, Channel, FromWorker, ToWorker};
use super::sources::Sources;
use super::supervise::take_stdin;
use super::{Job, TARGET, hex, settle, unhex};
use crate::error::{Error, Kind, Result, Told, show};
use crate::fuse::adapter::{AdapterOptions, FuseAdapter};
use crate::fuse::session::{self, Start};
use crate::index::Index;
use crate::plan::BackendKind;
use crate::tree::Tree;
use crate::tree::device::DeviceTree;
use crate::tree::dir::{DirOptions, DirTree, FdPool};
use crate::tree::image::{ImageTree, Trust};
use crate::tree::route::RouteTree;
use crate::volume::Form;

/// The program.
pub(super) fn main() -> ExitCode {
    settle(c"fsprov-worker");
    super::log::start("worker");
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
    let failed = |error: Error, channel: &Channel| {
        // The supervisor may be gone; our log has it too.
        let _ = channel.send(&FromWorker::Failed(Told::from(&error)), &[]);
        error
    };
    let (adapter, job) = prepare(&channel).map_err(|e| failed(e, &channel))?;
    channel.send(&FromWorker::Built, &[])?;
    let session = begin(adapter, &job, &channel).map_err(|e| failed(e, &channel))?;
    let threads = std::thread::Builder::new().name("fsprov-control".into()).spawn(move || control(&channel));
    threads.map_err(|e| Error::io("start thread", "control", e))?;
    session.run()
}

fn prepare(channel: &Channel) -> Result<(FuseAdapter, Job)> {
    raise_open_files();
    let (job, sources) = take_job(channel)?;
    let tree = build(&job, sources)?;
    // True of directory trees: they write without CAP_FSETID, so the file system below takes setuid away.
    let options = AdapterOptions { kills_privileges: true, ..AdapterOptions::default() };
    Ok((FuseAdapter::new(tree, options), job))
}

fn begin(adapter: FuseAdapter, job: &Job, channel: &Channel) -> Result<session::Ready<FuseAdapter>> {
    let Some((ToWorker::Begin { init, start }, fds)) = channel.receive()? else {
        return Err(Error::new(Kind::Helper, "begin", "", "the supervisor gave up"));
    };
    let connection = single(fds)?;
    let init = unhex(&init)?;
    let ready = match &start {
        Begin::First => session::start(adapter, &connection, &init, Start::First, job.threads)?,
        Begin::Again { reply, resend } => {
            let reply = unhex(reply)?;
            session::start(adapter, &connection, &init, Start::Again { reply: &reply, resend: *resend }, job.threads)?
        }
    };
    channel.send(&FromWorker::Serving { reply: hex(&ready.reply), in_flight: ready.in_flight }, &[])?;
    Ok(ready)
}

/// The supervisor's later wishes. Ends with the supervisor; the session does not: the rootfs goes on without one.
fn control(channel: &Channel) {
    loop {
        match channel.receive::<ToWorker>() {
            Ok(Some((ToWorker::Level(level), _))) => {
                super::log::set_level(&level);
            }
            Ok(Some((ToWorker::Stats, _))) => {
                let _ = channel.send(&FromWorker::Stats(serde_json::Value::Null), &[]);
            }
            Ok(Some((other, _))) => log::warn!(target: TARGET, "unexpected message: {other:?}"),
            Ok(None) => {
                log::warn!(target: TARGET, "the supervisor is gone: nobody starts another worker after this one");
                return;
            }
            Err(error) => {
                log::error!(target: TARGET, "{error}");
                return;
            }
        }
    }
}

fn single(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
        Error::new(Kind::Invalid, "read a message of a server process", "", format!("it has {} descriptors", fds.len()))
    })?;
    Ok(fd)
}

fn take_job(channel: &Channel) -> Result<(Job, Sources)> {
    const OP: &str = "take over a job";
    let Some((ToWorker::Job { sources: expected }, fds)) = channel.receive()? else {
        return Err(Error::new(Kind::Helper, OP, "", "the supervisor sent none"));
    };
    let file = std::fs::File::from(single(fds)?);
    let fail = |e| Error::io(OP, "", e);
    // The file's offset is shared with every other worker's descriptor of it.
    let mut text = vec![0_u8; usize::try_from(file.metadata().map_err(fail)?.len()).unwrap_or(0)];
    file.read_exact_at(&mut text, 0).map_err(fail)?;
    let job: Job = serde_json::from_slice(&text).map_err(|e| Error::new(Kind::Invalid, OP, "", e))?;
    let mut all = Vec::with_capacity(expected);
    while all.len() < expected {
        let Some((ToWorker::Sources, fds)) = channel.receive()? else {
            return Err(Error::new(Kind::Helper, OP, "", "the supervisor ended before it sent all sources"));
        };
        all.extend(fds);
    }
    let sources = Sources::sort(&job.plan, all)?;
    Ok((job, sources))
}

/// The soft limit is often 1024 for the sake of select(2), which we do not call.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        log::debug!(target: TARGET, "raise RLIMIT_NOFILE from {:?} to {:?}: {e}", limit.current, limit.maximum);
    }
}

/// The tree that the rootfs shows.
fn build(job: &Job, sources: Sources) -> Result<Arc<dyn Tree>> {
    let plan = &job.plan;
    let Sources { layers, index, volumes } = sources;
    // One pool for all directory trees: a number of volumes does not multiply descriptors.
    let pool = FdPool::new()?;
    let image: Arc<dyn Tree> = if let Some(index) = index {
        Arc::new(image_tree(job, &index, layers)?)
    } else {
        plan.single_layer(BackendKind::Fuse)?;
        let layer = layers.into_iter().next().ok_or_else(|| {
            Error::new(Kind::Invalid, "serve", show(&plan.rootfs), "the image has no filesystem layer")
        })?;
        Arc::new(DirTree::open(layer, DirOptions::image(plan.ownership.clone()), Arc::clone(&pool))?)
    };
    let mut routed: Vec<_> = Vec::with_capacity(volumes.len());
    for (volume, source) in plan.volumes.iter().zip(volumes) {
        let (tree, form): (Arc<dyn Tree>, _) = if let Some(device) = DeviceTree::of(&source, volume.access) {
            (Arc::new(device), Form::File)
        } else {
            let tree = DirTree::open(source, DirOptions::volume(volume.access), Arc::clone(&pool))?;
            (Arc::new(tree), volume.form)
        };
        routed.push((volume.target.clone(), form, volume.access, tree));
    }
    Ok(Arc::new(RouteTree::build(image, routed)?))
}

fn image_tree(job: &Job, index: &OwnedFd, layers: Vec<OwnedFd>) -> Result<ImageTree> {
    let index = Index::from_file(&reopen(index)?.into())?;
    ImageTree::open(index, layers, job.plan.ownership.clone(), Trust::default())
}

/// An O_PATH descriptor of a regular file opened again for reading, through /proc: the same file, wherever its name leads by now.
fn reopen(fd: &OwnedFd) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::sys("open index", show(crate::sys::fs::path_of(fd).unwrap_or_default()), e))
}
