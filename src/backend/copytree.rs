//! Copying layers over one another: everything by directory descriptor, nothing through a symlink, never across a mount.
//!
//! One thread walks and makes names (directories, links, special files); others fill regular files. Directories stay open to
//! their owner until all layers are in, then get their real attributes.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::copyindex;
use super::copyrules::{MAX_DEPTH, Rules};
use super::whiteout::{self, Mark};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::index::Index;
use crate::place::Place;
use crate::sys::attrs::{self, Fidelity, SetId};
use crate::sys::fs::open_beneath;
use crate::sys::remove::remove_tree_at;
use crate::traces::Meter;

const OP: &str = "copy";
const TARGET: &str = "fsprov::copy";

/// Files waiting to be filled; each holds a descriptor, and a share of a directory's.
const QUEUE: usize = 64;
/// Most threads filling files: beyond that one disk gets no faster.
const MAX_WORKERS: usize = 8;
/// Bytes read at once where the kernel cannot copy by itself.
const BUFFER: usize = 256 << 10;
/// Bytes asked of one copy_file_range(2): it returns to us now and then, to see whether all has been called off.
const RANGE: usize = 64 << 20;

/// Copies layers into one directory, which nobody else can enter meanwhile: names in it are ours.
pub(super) struct Copier<'a> {
    root: &'a OwnedFd,
    rules: Rules,
    /// What everything's attributes are, where the image has one; else the layers' own.
    index: Option<Index>,
    /// Directories made so far, relative to the root, each with its attributes' source.
    dirs: BTreeMap<PathBuf, Model>,
    work: Arc<Shared>,
}

/// Whose attributes a directory gets at the end.
#[derive(Clone)]
struct Model {
    layer: Arc<OwnedFd>,
    stat: Stat,
}

#[derive(Default)]
struct Shared {
    failed: Mutex<Option<Error>>,
    stop: AtomicBool,
    no_clone: AtomicBool,
    no_range: AtomicBool,
    partial: AtomicU64,
    devices: AtomicU64,
    /// Files get no attributes from the layers: the index has them.
    bare: AtomicBool,
    /// Is a file being filled, or was one?
    has_begun: AtomicBool,
    meter: OnceLock<Arc<Meter>>,
}

impl Shared {
    fn fail(&self, error: Error) {
        self.stop.store(true, Ordering::Relaxed);
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn copied(&self, bytes: u64) {
        if let Some(meter) = self.meter.get() {
            meter.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    fn noted(&self, fidelity: Fidelity) {
        if fidelity == Fidelity::Partial {
            self.partial.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One regular file to fill, which was just made: it is empty.
struct Job {
    from: Arc<OwnedFd>,
    name: OsString,
    to: OwnedFd,
    stat: Stat,
    shown: PathBuf,
}

/// One directory being copied.
struct Level {
    from: Arc<OwnedFd>,
    to: Arc<OwnedFd>,
    path: PathBuf,
}

struct LayerWalk<'a> {
    layer: &'a Place,
    fd: Arc<OwnedFd>,
    device: u64,
    /// Is there anything below that this layer may replace?
    first: bool,
    /// Has the image several layers and no index? Then `.wh.` names are not files.
    whiteouts: bool,
    links: HashMap<u64, PathBuf>,
    queue: SyncSender<Job>,
}

impl<'a> Copier<'a> {
    pub(super) fn new(root: &'a OwnedFd, rules: Rules) -> Self {
        Copier { root, rules, index: None, dirs: BTreeMap::new(), work: Arc::new(Shared::default()) }
    }

    /// Take modes, owners, times and attributes from `index` instead of the layers' files.
    pub(super) fn index(mut self, index: Option<Index>) -> Self {
        self.work.bare.store(index.is_some(), Ordering::Relaxed);
        self.index = index;
        self
    }

    /// Count what is copied.
    pub(super) fn meter(self, meter: Option<Arc<Meter>>) -> Self {
        let total = self.index.as_ref().map_or(0, Index::content_bytes);
        if let Some(meter) = meter {
            meter.total_bytes.store(total, Ordering::Relaxed);
            self.work.meter.get_or_init(|| meter);
        }
        self
    }

    /// Copy the layers, bottom first. What has the root's own attributes comes back.
    pub(super) fn run(mut self, layers: &[Place]) -> Result<Top> {
        for (n, layer) in layers.iter().enumerate() {
            // A barrier after each: the next may replace what this one brought.
            // The index knows what is hidden, and whether a name is a mark at all: what it lacks is removed at the end.
            self.layer(layer, n == 0, layers.len() > 1 && self.index.is_none())?;
        }
        let top = if let Some(index) = self.index.take() {
            let lacking = copyindex::apply(self.root, &index, &self.rules)?;
            self.work.partial.store(lacking.partial, Ordering::Relaxed);
            self.work.devices.store(lacking.devices, Ordering::Relaxed);
            Top(Whose::Index(Box::new(index), self.rules.clone()))
        } else {
            self.finish_directories()?
        };
        let (partial, devices) = (self.work.partial.load(Ordering::Relaxed), self.work.devices.load(Ordering::Relaxed));
        if partial > 0 {
            log::info!(target: TARGET, "{partial} files keep not all of their owners and attributes: this user may not set them");
        }
        if devices > 0 {
            log::warn!(target: TARGET, "{devices} device nodes are left out: this user may not make them");
        }
        Ok(top)
    }

    fn layer(&mut self, layer: &Place, first: bool, whiteouts: bool) -> Result<()> {
        let fail = |e| Error::sys(OP, show(layer.path()), e);
        let fd = layer.for_reading().map_err(fail)?;
        let stat = fs::fstat(&fd).map_err(fail)?;
        let fd = Arc::new(fd);
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
        let (queue, jobs) = sync_channel(QUEUE);
        let jobs = Mutex::new(jobs);
        let shared = Arc::clone(&self.work);
        let rules = &self.rules.clone();
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| work(&jobs, &shared, rules));
            }
            let mut walk = LayerWalk {
                layer,
                fd: Arc::clone(&fd),
                device: stat.st_dev,
                first,
                whiteouts,
                links: HashMap::new(),
                queue,
            };
            let to = self.root.try_clone().map_err(|e| Error::io(OP, show(layer.path()), e))?;
            self.dirs.insert(PathBuf::from("."), Model { layer: Arc::clone(&fd), stat });
            let top = Level { from: Arc::clone(&fd), to: Arc::new(to), path: PathBuf::new() };
            let walked = self.directory(&mut walk, &top, MAX_DEPTH);
            if let Err(error) = walked {
                shared.fail(error);
            }
            // The queue ends here, and with it the workers.
            drop(walk);
            Ok::<(), Error>(())
        })?;
        match self.work.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn directory(&mut self, walk: &mut LayerWalk<'_>, level: &Level, depth_left: usize) -> Result<()> {
        let shown = |name: &OsStr| show(walk.layer.path().join(&level.path).join(name));
        if depth_left == 0 {
            return Err(Error::new(Kind::Limit, OP, shown(OsStr::new("")), "it is more than 400 levels deep"));
        }
        let mut names = Vec::new();
        for entry in fs::Dir::read_from(&*level.from).map_err(|e| Error::sys(OP, shown(OsStr::new("")), e))? {
            let entry = entry.map_err(|e| Error::sys(OP, shown(OsStr::new("")), e))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        // Whiteouts first: they reach the layers below, not what this one brings.
        if walk.whiteouts {
            if whiteout::is_opaque(&*level.from).map_err(|e| Error::sys(OP, shown(OsStr::new("")), e))? {
                self.empty(level)?;
            }
            for name in &names {
                match whiteout::read(name) {
                    Some(Mark::Hides(hidden)) => self.remove(level, &hidden)?,
                    Some(Mark::Opaque) => self.empty(level)?,
                    Some(Mark::Meta) | None => {}
                }
            }
            names.retain(|name| whiteout::read(name).is_none());
        }
        for name in names {
            if self.work.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            self.entry(walk, level, name, depth_left)?;
        }
        Ok(())
    }

    fn entry(&mut self, walk: &mut LayerWalk<'_>, level: &Level, name: OsString, depth_left: usize) -> Result<()> {
        let path = level.path.join(&name);
        let shown = walk.layer.path().join(&path);
        let fail = |e| Error::sys(OP, show(&shown), e);
        let stat = fs::statat(&*level.from, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 && walk.whiteouts {
            // A whiteout in overlayfs's own form.
            return self.remove(level, &name);
        }
        if kind == FileType::Directory {
            let to = Self::make_directory(level, &name).map_err(fail)?;
            self.dirs.insert(path.clone(), Model { layer: Arc::clone(&walk.fd), stat });
            // What is mounted there is not part of the image.
            if stat.st_dev != walk.device {
                return Ok(());
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let from = fs::openat(&*level.from, &name, flags, Mode::empty()).map_err(fail)?;
            let below = Level { from: Arc::new(from), to: Arc::new(to), path };
            return self.directory(walk, &below, depth_left - 1);
        }
        if stat.st_dev != walk.device {
            return Ok(());
        }
        if !walk.first {
            self.remove(level, &name)?;
        }
        if stat.st_nlink > 1 {
            if let Some(first) = walk.links.get(&stat.st_ino) {
                return self.link(first, level, &name).map_err(fail);
            }
            walk.links.insert(stat.st_ino, path.clone());
        }
        if self.rules.leaves_out(kind) {
            walk.links.remove(&stat.st_ino);
            return Ok(());
        }
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let to = fs::openat(&*level.to, &name, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
                let job = Job { from: Arc::clone(&level.from), name, to, stat, shown };
                // Fails when no worker is left, which has said why.
                let _ = walk.queue.send(job);
                return Ok(());
            }
            FileType::Symlink => {
                let target = fs::readlinkat(&*level.from, &name, Vec::new()).map_err(fail)?;
                fs::symlinkat(target, &*level.to, &name).map_err(fail)?;
            }
            special => match fs::mknodat(&*level.to, &name, special, Mode::RUSR | Mode::WUSR, stat.st_rdev) {
                Ok(()) => {}
                Err(Errno::PERM) => {
                    self.work.devices.fetch_add(1, Ordering::Relaxed);
                    walk.links.remove(&stat.st_ino);
                    return Ok(());
                }
                Err(e) => return Err(fail(e)),
            },
        }
        if self.index.is_some() {
            return Ok(());
        }
        let from = open_itself(&level.from, &name, &stat, OFlags::PATH).map_err(fail)?;
        let to = open_name(&level.to, &name).map_err(fail)?;
        let fidelity = attrs::copy(from, &self.rules.presented(stat), to, self.rules.set_id).map_err(fail)?;
        self.work.noted(fidelity);
        Ok(())
    }

    fn make_directory(level: &Level, name: &OsStr) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::mkdirat(&*level.to, name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let there = fs::statat(&*level.to, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if !FileType::from_raw_mode(there.st_mode).is_dir() {
                    fs::unlinkat(&*level.to, name, AtFlags::empty())?;
                    fs::mkdirat(&*level.to, name, Mode::RWXU)?;
                }
            }
            Err(e) => return Err(e),
        }
        fs::openat(&*level.to, name, flags, Mode::empty())
    }

    fn link(&self, first: &Path, level: &Level, name: &OsStr) -> rustix::io::Result<()> {
        let (dir, file) = (first.parent().unwrap_or(Path::new("")), first.file_name().unwrap_or_default());
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let dir = open_beneath(self.root, dir, OFlags::PATH | OFlags::DIRECTORY)?;
        match fs::linkat(&dir, file, &*level.to, name, AtFlags::empty()) {
            // The first one was a device that could not be made.
            Err(Errno::NOENT) => Ok(()),
            other => other,
        }
    }

    /// Remove what lower layers brought under this name.
    fn remove(&mut self, level: &Level, name: &OsStr) -> Result<()> {
        let path = level.path.join(name);
        let fail = |e| Error::sys("remove lower", show(&path), e);
        match fs::unlinkat(&*level.to, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(e) => return Err(fail(e)),
        }
        remove_tree_at(&*level.to, name, &path)?;
        self.dirs.retain(|dir, _| !dir.starts_with(&path));
        Ok(())
    }

    fn empty(&mut self, level: &Level) -> Result<()> {
        let fail = |e| Error::sys("remove lower", show(&level.path), e);
        let names: Vec<OsString> = fs::Dir::read_from(&*level.to)
            .and_then(Iterator::collect::<rustix::io::Result<Vec<_>>>)
            .map_err(fail)?
            .into_iter()
            .map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned())
            .filter(|name| name != "." && name != "..")
            .collect();
        for name in names {
            self.remove(level, &name)?;
        }
        Ok(())
    }

    /// Innermost first: a directory's times are set when nothing more is made in it, and its mode may shut us out.
    fn finish_directories(&mut self) -> Result<Top> {
        let top = self.dirs.remove(Path::new("."));
        for (path, model) in self.dirs.iter().rev() {
            let fail = |e| Error::sys(OP, show(path), e);
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let from = open_beneath(&*model.layer, path, flags).map_err(fail)?;
            let to = open_beneath(self.root, path, flags).map_err(fail)?;
            let stat = self.rules.presented(model.stat);
            self.work.noted(attrs::copy(&from, &stat, &to, self.rules.set_id).map_err(fail)?);
        }
        let set_id = self.rules.set_id;
        Ok(Top(Whose::Layer(top.map(|model| (model.layer, self.rules.presented(model.stat))), set_id)))
    }
}

/// What the root directory of a copy looks like: said of it last, when nothing more is made in it.
pub(super) struct Top(Whose);

enum Whose {
    Index(Box<Index>, Rules),
    Layer(Option<(Arc<OwnedFd>, Stat)>, SetId),
}

impl Top {
    /// Give `root` the owner, mode, times and attributes that the image's root has.
    pub(super) fn apply(&self, root: &OwnedFd) -> Result<()> {
        match &self.0 {
            Whose::Index(index, rules) => copyindex::apply_top(root, index, rules),
            Whose::Layer(None, _) => Ok(()),
            Whose::Layer(Some((layer, stat)), set_id) => {
                attrs::copy(layer, stat, root, *set_id).map(drop).map_err(|e| Error::sys(OP, "/", e))
            }
        }
    }
}

/// `name` in a directory that nobody else can enter.
fn open_name(dir: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// `name` in a layer, which must be what it was when it was looked at. Non-blocking where it is read: should it have become a FIFO
/// meanwhile, this must not wait.
fn open_itself(dir: &OwnedFd, name: &OsStr, stat: &Stat, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let fd = fs::openat(dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let now = fs::fstat(&fd)?;
    if (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino) { Ok(fd) } else { Err(Errno::STALE) }
}

fn work(jobs: &Mutex<Receiver<Job>>, shared: &Shared, rules: &Rules) {
    let mut buffer = Vec::new();
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        // The walk may be waiting for room in the queue: drain it.
        if shared.stop.load(Ordering::Relaxed) {
            continue;
        }
        if !shared.has_begun.swap(true, Ordering::Relaxed)
            && let Err(error) = fault::point("copy.file")
        {
            shared.fail(error);
            continue;
        }
        match fill(&job, shared, rules, &mut buffer) {
            Ok(fidelity) => {
                shared.noted(fidelity);
                if let Some(meter) = shared.meter.get() {
                    meter.files.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(e) => shared.fail(Error::sys(OP, show(&job.shown), e)),
        }
    }
}

fn fill(job: &Job, shared: &Shared, rules: &Rules, buffer: &mut Vec<u8>) -> rustix::io::Result<Fidelity> {
    // An empty one need not be readable.
    let flags = if job.stat.st_size > 0 { OFlags::RDONLY | OFlags::NONBLOCK } else { OFlags::PATH };
    let from = open_itself(&job.from, &job.name, &job.stat, flags)?;
    if job.stat.st_size > 0 {
        let size = fs::fstat(&from)?.st_size as u64;
        content(&from, &job.to, size, shared, buffer)?;
    }
    if shared.bare.load(Ordering::Relaxed) {
        return Ok(Fidelity::Whole);
    }
    attrs::copy(&from, &rules.presented(job.stat), &job.to, rules.set_id)
}

/// Errnos by which copy_file_range and FICLONE say that these two files, or this kernel, cannot.
fn cannot(e: Errno) -> bool {
    matches!(e, Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::NOTTY | Errno::PERM | Errno::BADF)
}

fn content(from: &OwnedFd, to: &OwnedFd, size: u64, shared: &Shared, buffer: &mut Vec<u8>) -> rustix::io::Result<()> {
    if !shared.no_clone.load(Ordering::Relaxed) {
        match fs::ioctl_ficlone(to, from) {
            Ok(()) => {
                shared.copied(size);
                return Ok(());
            }
            Err(e) if cannot(e) => shared.no_clone.store(true, Ordering::Relaxed),
            Err(e) => return Err(e),
        }
    }
    // Holes first: what is never written stays one.
    fs::ftruncate(to, size)?;
    let mut at = 0;
    while at < size && !shared.stop.load(Ordering::Relaxed) {
        let (data, end) = match fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => (data, fs::seek(from, SeekFrom::Hole(data))?),
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => (at, size),
            Err(e) => return Err(e),
        };
        shared.copied(data - at);
        extent(from, to, data, end.min(size), shared, buffer)?;
        at = end;
    }
    Ok(())
}

fn extent(
    from: impl AsFd,
    to: impl AsFd,
    mut at: u64,
    end: u64,
    shared: &Shared,
    buffer: &mut Vec<u8>,
) -> rustix::io::Result<()> {
    while at < end && !shared.stop.load(Ordering::Relaxed) {
        let left = usize::try_from(end - at).unwrap_or(usize::MAX);
        if !shared.no_range.load(Ordering::Relaxed) {
            let (mut read_at, mut write_at) = (at, at);
            match fs::copy_file_range(&from, Some(&mut read_at), &to, Some(&mut write_at), left.min(RANGE)) {
                // It ends early: shortened meanwhile; or a file system that says 0 where it cannot (Linux 5.19 does so for
                // procfs and the like).
                Ok(0) => {}
                Ok(copied) => {
                    at += copied as u64;
                    shared.copied(copied as u64);
                    continue;
                }
                Err(Errno::INTR) => continue,
                Err(e) if cannot(e) => shared.no_range.store(true, Ordering::Relaxed),
                Err(e) => return Err(e),
            }
        }
        buffer.resize(BUFFER, 0);
        let length = rustix::io::pread(&from, &mut buffer[..left.min(BUFFER)], at)?;
        if length == 0 {
            return Err(Errno::STALE);
        }
        let mut written = 0;
        while written < length {
            written += rustix::io::pwrite(&to, &buffer[written..length], at + written as u64)?;
        }
        at += length as u64;
        shared.copied(length as u64);
    }
    Ok(())
}
