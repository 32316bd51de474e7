//! From a [`Tree`] to fuser's `Filesystem`: every request is counted, every panic becomes EIO for that request alone.
//!
//! Must not know images, volumes or mounts. What the kernel is asked to cache follows from the tree ([`Tree::is_live`],
//! [`Tree::is_without_xattrs`]) and from [`AdapterOptions`].

use std::cell::Cell;
use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, Notifier, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::buffers::{Buffers, NO_NODE};
use super::inflight::Notes;
use super::pace::Pace;
use crate::fault;
use crate::tree::resend::{self, CurrentRequest};
use crate::tree::{
    Attr, Caching, Caller, Change, DirItem, Entry, Errno, Fit, Handle, ListMode, Lookup, New, Opened, SetTime,
    Timespec, Tree, Writer,
};

const TARGET: &str = "fsprov::fuse";

/// Largest write: the most the kernel sends in one request (FUSE_MAX_MAX_PAGES, 256 pages).
const MAX_WRITE: u32 = 1 << 20;
/// Longest request where files are written: such a write, and its header.
pub const MAX_REQUEST: usize = MAX_WRITE as usize + 4096;
/// Requests that the kernel keeps waiting in the background (readahead, direct I/O): enough for several readers at once,
/// few enough that a foreground request is not behind hundreds. The kernel's own default, 12, starves two readers.
const MAX_BACKGROUND: u16 = 64;

/// What an adapter asks of the kernel beyond what follows from the tree.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdapterOptions {
    /// Writes gather in the kernel (FUSE_WRITEBACK_CACHE): faster small writes, seen late by readers on the host.
    pub writeback: bool,
    /// The kernel evaluates POSIX ACLs (FUSE_POSIX_ACL), at the price of one request for those of each file that somebody
    /// other than its owner uses. Turns `default_permissions` on (process_init_reply in fs/fuse/inode.c): right only where
    /// that is on anyway.
    pub posix_acl: bool,
    /// The file system below takes setuid and setgid away when it should (FUSE_HANDLE_KILLPRIV_V2): true of directory trees,
    /// which write without CAP_FSETID where the kernel asks for it.
    pub kills_privileges: bool,
    /// Mounts of this one may be idmapped (FUSE_ALLOW_IDMAP, Linux 6.12). The kernel then tells who asks only where something is made: right
    /// only where that matters to no tree, and beside `default_permissions`, without which it ends the connection (process_init_reply).
    pub idmappable: bool,
}

/// An offset that means no content at all (fuse_reverse_inval_inode in fs/fuse/inode.c).
const ATTRIBUTES_ALONE: i64 = -1;

/// The bit of a request's number that says that it was sent before (FUSE_UNIQUE_RESEND, linux/fuse.h, Linux 6.9).
const UNIQUE_RESEND: u64 = 1 << 63;

macro_rules! operations {
    ($($name:ident => $text:literal),+ $(,)?) => {
        /// The kinds of request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        #[allow(missing_docs)]
        pub enum Operation { $($name),+ }

        impl Operation {
            /// Every kind, in the order of its counter.
            pub const ALL: &'static [Operation] = &[$(Operation::$name),+];

            /// Its word in statistics.
            pub fn name(self) -> &'static str {
                match self { $(Operation::$name => $text),+ }
            }
        }
    };
}

operations! {
    Lookup => "lookup", Forget => "forget", GetAttr => "getattr", SetAttr => "setattr", ReadLink => "readlink",
    MkNod => "mknod", MkDir => "mkdir", Unlink => "unlink", RmDir => "rmdir", SymLink => "symlink", Rename => "rename",
    Link => "link", Open => "open", Read => "read", Write => "write", Flush => "flush", Release => "release",
    FSync => "fsync", OpenDir => "opendir", ReadDir => "readdir", ReadDirPlus => "readdirplus",
    ReleaseDir => "releasedir", FSyncDir => "fsyncdir", StatFs => "statfs", SetXattr => "setxattr",
    GetXattr => "getxattr", ListXattr => "listxattr", RemoveXattr => "removexattr", Access => "access",
    Create => "create", FAllocate => "fallocate", LSeek => "lseek", CopyFileRange => "copy_file_range",
    Other => "other",
}

const OPERATIONS: usize = Operation::ALL.len();

/// How many requests came, by kind, and how many of them panicked. Forgets count by node.
#[derive(Debug)]
pub struct Counters {
    by_kind: [AtomicU64; OPERATIONS],
    panics: AtomicU64,
    in_progress: AtomicU64,
    microseconds: AtomicU64,
    latency: [AtomicU64; LATENCIES],
}

/// Classes of latency: below 1 us, 2 us, 4 us, ... and the last one for all above 8 s.
const LATENCIES: usize = 25;

impl Default for Counters {
    fn default() -> Self {
        Counters {
            by_kind: [const { AtomicU64::new(0) }; OPERATIONS],
            panics: AtomicU64::new(0),
            in_progress: AtomicU64::new(0),
            microseconds: AtomicU64::new(0),
            latency: [const { AtomicU64::new(0) }; LATENCIES],
        }
    }
}

impl Counters {
    /// Requests of one kind.
    pub fn of(&self, operation: Operation) -> u64 {
        self.by_kind[operation as usize].load(Ordering::Relaxed)
    }

    /// All requests but forgets, which the kernel sends when it likes.
    pub fn total(&self) -> u64 {
        Operation::ALL.iter().filter(|o| **o != Operation::Forget).map(|&o| self.of(o)).sum()
    }

    /// Requests that ended in a panic, and EIO.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    /// Requests that are being answered now.
    pub fn in_progress(&self) -> u64 {
        self.in_progress.load(Ordering::Relaxed)
    }

    /// What answering all requests took together, in microseconds.
    pub fn microseconds(&self) -> u64 {
        self.microseconds.load(Ordering::Relaxed)
    }

    /// How many requests took how long to answer: the n-th is of those below 2^n microseconds and not below half of that.
    pub fn latencies(&self) -> [u64; LATENCIES] {
        std::array::from_fn(|class| self.latency[class].load(Ordering::Relaxed))
    }

    fn took(&self, time: Duration) {
        let us = time.as_micros() as u64;
        self.microseconds.fetch_add(us, Ordering::Relaxed);
        let class = (u64::BITS - us.leading_zeros()) as usize;
        self.latency[class.min(LATENCIES - 1)].fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, operation: Operation) {
        self.by_kind[operation as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// A tree as a FUSE file system.
pub struct FuseAdapter {
    tree: Arc<dyn Tree>,
    options: AdapterOptions,
    counters: Arc<Counters>,
    /// The kernel takes ENOSYS from open for "never ask again".
    no_open: bool,
    no_opendir: bool,
    pace: Arc<Pace>,
    notes: OnceLock<Notes>,
    notifier: Arc<OnceLock<Notifier>>,
    buffers: Arc<Buffers>,
}

thread_local! {
    static IS_ANSWERING: Cell<bool> = const { Cell::new(false) };
}

/// Is this thread in a handler of ours, where a panic is caught?
pub(super) fn is_answering() -> bool {
    IS_ANSWERING.get()
}

impl std::fmt::Debug for FuseAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FuseAdapter").field("options", &self.options).finish_non_exhaustive()
    }
}

impl FuseAdapter {
    /// An adapter for a tree, in a session that is started with these buffers.
    pub fn new(tree: Arc<dyn Tree>, options: AdapterOptions, buffers: Arc<Buffers>) -> Self {
        FuseAdapter {
            tree,
            options,
            counters: Arc::default(),
            no_open: false,
            no_opendir: false,
            pace: Arc::default(),
            notes: OnceLock::new(),
            notifier: Arc::default(),
            buffers,
        }
    }

    /// Its counters, which go on counting.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// The buffers that it was made with.
    pub fn buffers(&self) -> Arc<Buffers> {
        Arc::clone(&self.buffers)
    }

    /// How its threads wait for requests: tell it the connection ([`Pace::watch`]).
    pub fn pace(&self) -> Arc<Pace> {
        Arc::clone(&self.pace)
    }

    /// Where its session's notifier belongs, before the session runs.
    pub fn notifier(&self) -> Arc<OnceLock<Notifier>> {
        Arc::clone(&self.notifier)
    }

    /// An ordinary writer changed a file, which took setuid and setgid away below; the kernel, which left that to us
    /// (FUSE_HANDLE_KILLPRIV_V2), goes on showing them, and running the file with them, until its attributes run out. Before the
    /// reply, so that nobody who has written sees or uses them.
    fn tell_lost_set_id(&self, tree: &dyn Tree, writer: &Writer, node: INodeNo) {
        if matches!(writer, Writer::Trusted) || !tree.lost_set_id(node.0) {
            return;
        }
        let told = self.notifier.get().map(|notifier| notifier.inval_inode(node, ATTRIBUTES_ALONE, 0));
        if let Some(Err(e)) = told {
            log::debug!(target: TARGET, "invalidate the attributes of {:x}: {e}", node.0);
        }
    }

    /// Write down which requests are being answered, for a server that cannot ask for them again.
    pub fn note_requests(&self, notes: Notes) {
        // A second call would be for the same connection.
        let _ = self.notes.set(notes);
    }

    /// Count a request, answer it, and keep a panic from ending the thread. A reply that is dropped unanswered while the
    /// panic unwinds says EIO by itself (fuser, `Drop for ReplyRaw`).
    fn request(&self, request: &Request, operation: Operation, work: impl FnOnce(&dyn Tree)) {
        self.counters.count(operation);
        let begun = Instant::now();
        // Forgets come in batches, many to one read: there is nothing to wait for between them.
        let paced = operation != Operation::Forget;
        if paced {
            self.pace.begin();
        }
        let unique = request.unique().0;
        let notes = self.notes.get();
        if let Some(notes) = notes {
            // An error here would be the request's, and a test has no use for that.
            let _ = fault::point("serve.read");
            notes.begin(unique, paced);
        }
        self.counters.in_progress.fetch_add(1, Ordering::Relaxed);
        IS_ANSWERING.set(true);
        let asked = CurrentRequest { unique: unique & !UNIQUE_RESEND, is_resent: unique & UNIQUE_RESEND != 0 };
        if catch_unwind(AssertUnwindSafe(|| resend::answering(asked, || work(&*self.tree)))).is_err() {
            self.counters.panics.fetch_add(1, Ordering::Relaxed);
            log::error!(target: TARGET, "{}: the handler panicked; answered EIO", operation.name());
        }
        IS_ANSWERING.set(false);
        self.counters.in_progress.fetch_sub(1, Ordering::Relaxed);
        self.counters.took(begun.elapsed());
        if paced {
            self.pace.end(!matches!(operation, Operation::Release | Operation::ReleaseDir));
            // After it may have stood aside: now it goes to read.
            if let Some(notes) = notes {
                notes.end();
            }
        }
    }
}

/// Of requests that do not say whether setuid is to be taken away.
fn writer(request: &Request) -> Writer {
    if request.uid() == 0 { Writer::Trusted } else { Writer::Ordinary(caller(request)) }
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

fn failed(operation: Operation, node: INodeNo, errno: Errno) -> fuser::Errno {
    // What programs run into all day is nobody's news.
    log::trace!(target: TARGET, "{} {:x}: {errno}", operation.name(), node.0);
    // The limit that was reached is this process's, not the caller's.
    let errno = if errno == Errno::MFILE { Errno::NFILE } else { errno };
    fuser::Errno::from_i32(errno.raw_os_error())
}

/// fuser takes a SystemTime and encodes it right, before 1970 too.
fn time_out(time: Timespec) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(time.nanos));
    let whole = if time.secs >= 0 {
        UNIX_EPOCH.checked_add(Duration::from_secs(time.secs.unsigned_abs()))
    } else {
        UNIX_EPOCH.checked_sub(Duration::from_secs(time.secs.unsigned_abs()))
    };
    whole.and_then(|t| t.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// fuser 0.18 makes of (-2 s, 800 ms) the time 2.8 s before 1970 instead of 1.2 s (src/time.rs, `system_time_from_time`):
/// the two numbers the kernel sent are read back from that.
fn time_in(time: SystemTime) -> Timespec {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timespec { secs: after.as_secs() as i64, nanos: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            Timespec { secs: 0_i64.wrapping_sub_unsigned(before.as_secs()), nanos: before.subsec_nanos() }
        }
    }
}

fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::SpecificTime(time) => SetTime::At(time_in(time)),
        TimeOrNow::Now => SetTime::Now,
    }
}

fn kind_out(mode: u32) -> FileType {
    match mode & 0o170_000 {
        0o040_000 => FileType::Directory,
        0o120_000 => FileType::Symlink,
        0o060_000 => FileType::BlockDevice,
        0o020_000 => FileType::CharDevice,
        0o010_000 => FileType::NamedPipe,
        0o140_000 => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn attr_out(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.node),
        size: attr.size,
        blocks: attr.blocks,
        atime: time_out(attr.atime),
        mtime: time_out(attr.mtime),
        ctime: time_out(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: kind_out(attr.mode),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: attr.blksize,
        flags: 0,
    }
}

fn give_entry(reply: ReplyEntry, entry: &Entry) {
    reply.entry_with_ttls(&entry.attr_ttl, &entry.entry_ttl, &attr_out(&entry.attr), Generation(entry.generation));
}

fn file_flags(opened: Opened) -> FopenFlags {
    let caching = match opened.cache {
        Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE,
        Caching::Fresh => FopenFlags::empty(),
        Caching::Direct => FopenFlags::FOPEN_DIRECT_IO,
    };
    // With the write-back cache the kernel asks all the same (fuse_flush in fs/fuse/file.c).
    if opened.closes_silently { caching | FopenFlags::FOPEN_NOFLUSH } else { caching }
}

fn directory_flags(cache: Caching) -> FopenFlags {
    match cache {
        // CACHE_DIR alone would drop the cache at each opendir.
        Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR,
        Caching::Fresh | Caching::Direct => FopenFlags::empty(),
    }
}

/// An attribute that is not there, as an entry says it: node 0 and how long that holds.
const ABSENT: Attr = Attr {
    node: 0,
    mode: 0o100_000,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    size: 0,
    blocks: 0,
    blksize: 0,
    atime: Timespec { secs: 0, nanos: 0 },
    mtime: Timespec { secs: 0, nanos: 0 },
    ctime: Timespec { secs: 0, nanos: 0 },
};

/// Answer with bytes that the tree hands over, or with its error. The reply is gone once it was given.
fn give_bytes<R>(
    reply: R,
    error: impl FnOnce(R, Errno),
    data: impl Fn(R, &[u8]),
    work: impl FnOnce(&mut dyn FnMut(&[u8])) -> Result<(), Errno>,
) {
    let mut reply = Some(reply);
    let result = work(&mut |bytes| {
        if let Some(reply) = reply.take() {
            data(reply, bytes);
        }
    });
    if let Some(reply) = reply {
        error(reply, result.err().unwrap_or(Errno::IO));
    }
}

/// Answer a getxattr or listxattr: the size where that is asked, the bytes where they fit, else ERANGE.
fn give_xattr(reply: ReplyXattr, size: u32, bytes: &[u8]) {
    if size == 0 {
        reply.size(bytes.len() as u32);
    } else if bytes.len() <= size as usize {
        reply.data(bytes);
    } else {
        reply.error(fuser::Errno::ERANGE);
    }
}

/// What listxattr(2) tells a caller: `trusted.` names only where it may read them (xattr(7)). We could read all of them for it.
fn listed(names: &[u8], may_read_trusted: impl Fn() -> bool) -> std::borrow::Cow<'_, [u8]> {
    let is_trusted = |name: &&[u8]| name.starts_with(b"trusted.");
    let all = || names.split_inclusive(|byte| *byte == 0);
    if !all().any(|name| is_trusted(&name)) || may_read_trusted() {
        return names.into();
    }
    all().filter(|name| !is_trusted(name)).flatten().copied().collect::<Vec<u8>>().into()
}

/// Has a process CAP_SYS_ADMIN (proc_pid_status(5))? One that cannot be seen has not.
fn is_admin(pid: u32) -> bool {
    const SYS_ADMIN: u32 = 21;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).is_some_and(|caps| caps >> SYS_ADMIN & 1 == 1)
}

fn handle(handle: Option<FileHandle>) -> Option<Handle> {
    handle.map(|h| h.0)
}

impl Filesystem for FuseAdapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let live = self.tree.is_live();
        let freely = self.tree.opens_without_asking();
        let offered = config.capabilities();
        let mut wanted = vec![
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DO_READDIRPLUS,
            // A symlink's target never changes, not even on a live volume: `ln -sf` makes another inode.
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            // The tree applies the umask, or the file system a default ACL in its place.
            InitFlags::FUSE_DONT_MASK,
        ];
        if live {
            // Not FUSE_ATOMIC_O_TRUNC: truncation would come with the open, before the kernel looks whether the file is a
            // running program (do_open in fs/namei.c: vfs_open, then handle_truncate, which says ETXTBSY), and a refused
            // open(O_RDONLY|O_TRUNC) would have emptied it.
            // On a live tree attributes are asked again soon: only where the reader wants them.
            wanted.push(InitFlags::FUSE_READDIRPLUS_AUTO);
        }
        if self.options.kills_privileges {
            wanted.push(InitFlags::FUSE_HANDLE_KILLPRIV_V2);
        }
        if self.options.posix_acl {
            wanted.push(InitFlags::FUSE_POSIX_ACL);
        }
        if self.options.writeback {
            wanted.push(InitFlags::FUSE_WRITEBACK_CACHE);
        }
        if self.options.idmappable {
            wanted.push(InitFlags::FUSE_ALLOW_IDMAP);
        }
        for flag in wanted {
            // One at a time: a call with several is all or nothing.
            if config.add_capabilities(flag).is_err() {
                log::debug!(target: TARGET, "the kernel does not offer {flag:?}");
            }
        }
        self.no_open = freely && offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT);
        self.no_opendir = freely && offered.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        let set = |what: &str, result: Result<(), u32>| {
            if let Err(nearest) = result {
                log::debug!(target: TARGET, "{what}: the nearest possible is {nearest}");
            }
        };
        set("max_write", config.set_max_write(MAX_WRITE).map(|_| ()));
        set("max_background", config.set_max_background(MAX_BACKGROUND).map(|_| ()).map_err(u32::from));
        if let Err(nearest) = config.set_time_granularity(Duration::from_nanos(1)) {
            log::debug!(target: TARGET, "time granularity: the nearest possible is {nearest:?}");
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.request(request, Operation::Lookup, |tree| match tree.lookup(&caller(request), parent.0, name) {
            Ok(Lookup::Found(entry)) => give_entry(reply, &entry),
            Ok(Lookup::Absent(ttl)) if ttl.is_zero() => reply.error(fuser::Errno::ENOENT),
            Ok(Lookup::Absent(ttl)) => {
                reply.entry_with_ttls(&Duration::ZERO, &ttl, &attr_out(&ABSENT), Generation(0));
            }
            Err(e) => reply.error(failed(Operation::Lookup, parent, e)),
        });
    }

    fn forget(&self, request: &Request, node: INodeNo, count: u64) {
        self.request(request, Operation::Forget, |tree| tree.forget(node.0, count));
    }

    fn getattr(&self, request: &Request, node: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        self.request(request, Operation::GetAttr, |tree| match tree.getattr(node.0, handle(fh)) {
            Ok((attr, ttl)) => reply.attr(&ttl, &attr_out(&attr)),
            Err(e) => reply.error(failed(Operation::GetAttr, node, e)),
        });
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change { mode, uid, gid, size, atime: atime.map(set_time), mtime: mtime.map(set_time) };
        self.request(request, Operation::SetAttr, |tree| {
            match tree.setattr(&caller(request), node.0, handle(fh), &change) {
                Ok((attr, ttl)) => reply.attr(&ttl, &attr_out(&attr)),
                Err(e) => reply.error(failed(Operation::SetAttr, node, e)),
            }
        });
    }

    fn readlink(&self, request: &Request, node: INodeNo, reply: ReplyData) {
        self.request(request, Operation::ReadLink, |tree| {
            give_bytes(
                reply,
                |reply, e| reply.error(failed(Operation::ReadLink, node, e)),
                ReplyData::data,
                |out| tree.readlink(node.0, out),
            );
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let new = New { mode, umask, rdev };
        self.request(request, Operation::MkNod, |tree| match tree.mknod(&caller(request), parent.0, name, new) {
            Ok(entry) => give_entry(reply, &entry),
            Err(e) => reply.error(failed(Operation::MkNod, parent, e)),
        });
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let new = New { mode, umask, rdev: 0 };
        self.request(request, Operation::MkDir, |tree| match tree.mkdir(&caller(request), parent.0, name, new) {
            Ok(entry) => give_entry(reply, &entry),
            Err(e) => reply.error(failed(Operation::MkDir, parent, e)),
        });
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.request(request, Operation::Unlink, |tree| match tree.unlink(&caller(request), parent.0, name) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed(Operation::Unlink, parent, e)),
        });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.request(request, Operation::RmDir, |tree| match tree.rmdir(&caller(request), parent.0, name) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed(Operation::RmDir, parent, e)),
        });
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        self.request(request, Operation::SymLink, |tree| {
            match tree.symlink(&caller(request), parent.0, name, target.as_os_str()) {
                Ok(entry) => give_entry(reply, &entry),
                Err(e) => reply.error(failed(Operation::SymLink, parent, e)),
            }
        });
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.request(request, Operation::Rename, |tree| {
            match tree.rename(&caller(request), (parent.0, name), (new_parent.0, new_name), flags.bits()) {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(failed(Operation::Rename, parent, e)),
            }
        });
    }

    fn link(&self, request: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.request(request, Operation::Link, |tree| match tree.link(&caller(request), node.0, parent.0, name) {
            Ok(entry) => give_entry(reply, &entry),
            Err(e) => reply.error(failed(Operation::Link, node, e)),
        });
    }

    fn open(&self, request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.request(request, Operation::Open, |tree| {
            if self.no_open {
                return reply.error(fuser::Errno::ENOSYS);
            }
            match tree.open(&caller(request), node.0, flags.0) {
                Ok(opened) => reply.opened(FileHandle(opened.handle), file_flags(opened)),
                Err(e) => reply.error(failed(Operation::Open, node, e)),
            }
        });
    }

    fn read(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.request(request, Operation::Read, |tree| {
            give_bytes(
                reply,
                |reply, e| reply.error(failed(Operation::Read, node, e)),
                ReplyData::data,
                |out| tree.read(node.0, fh.0, offset, size, out),
            );
        });
    }

    fn write(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if node.0 == NO_NODE {
            return self.buffers.handle(data, reply);
        }
        // The kernel asks to take setuid away for everybody without CAP_FSETID; and never for a page, which has no caller.
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let writer = if kill { Writer::Ordinary(caller(request)) } else { Writer::Trusted };
        let is_page = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        // A page written back has its place already: the append was decided when it entered the cache.
        let flags = if is_page { flags.0 & !libc::O_APPEND } else { flags.0 };
        self.request(request, Operation::Write, |tree| {
            let mut written = tree.write(&writer, node.0, fh.0, offset, data, flags);
            // The kernel looks at the error alone when it writes pages back (fuse_writepage_end in fs/fuse/file.c): cut short
            // by a full disk, the rest would be lost in silence. Ask for the rest, to get the error.
            while let Ok(done @ 1..) = written
                && is_page
                && done < data.len()
            {
                let rest = tree.write(&writer, node.0, fh.0, offset + done as u64, &data[done..], flags);
                written = rest.and_then(|n| if n == 0 { Err(Errno::IO) } else { Ok(done + n) });
            }
            self.tell_lost_set_id(tree, &writer, node);
            match written {
                Ok(written) => reply.written(written as u32),
                Err(e) => reply.error(failed(Operation::Write, node, e)),
            }
        });
    }

    fn flush(&self, request: &Request, node: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        self.request(request, Operation::Flush, |tree| {
            // Where opens need no asking nothing is written, so no close has anything to report: never ask again.
            if self.no_open {
                return reply.error(fuser::Errno::ENOSYS);
            }
            match tree.flush(node.0, fh.0) {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(failed(Operation::Flush, node, e)),
            }
        });
    }

    fn release(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.request(request, Operation::Release, |tree| {
            tree.release(node.0, fh.0);
            reply.ok();
        });
    }

    fn fsync(&self, request: &Request, node: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        self.request(request, Operation::FSync, |tree| match tree.fsync(node.0, fh.0, data_only) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed(Operation::FSync, node, e)),
        });
    }

    fn opendir(&self, request: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.request(request, Operation::OpenDir, |tree| {
            if self.no_opendir {
                return reply.error(fuser::Errno::ENOSYS);
            }
            match tree.opendir(&caller(request), node.0) {
                Ok(opened) => reply.opened(FileHandle(opened.handle), directory_flags(opened.cache)),
                Err(e) => reply.error(failed(Operation::OpenDir, node, e)),
            }
        });
    }

    fn readdir(&self, request: &Request, node: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.request(request, Operation::ReadDir, |tree| {
            let mut given = false;
            let mut add = |item: &DirItem<'_>| {
                if reply.add(INodeNo(item.node), item.cookie, kind_out(item.kind), item.name) {
                    Fit::Full
                } else {
                    given = true;
                    Fit::Taken
                }
            };
            match tree.readdir(&caller(request), node.0, fh.0, offset, ListMode::Names, &mut add) {
                // What was given counts; the error comes with the next page, if it is still one.
                Err(e) if !given => reply.error(failed(Operation::ReadDir, node, e)),
                _ => reply.ok(),
            }
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.request(request, Operation::ReadDirPlus, |tree| {
            let mut given = false;
            let mut add = |item: &DirItem<'_>| {
                // `.` and `..` have no entry; the kernel takes their number and type alone and counts no lookup
                // (fuse_direntplus_link in fs/fuse/readdir.c).
                let bare = Attr { node: item.node, mode: item.kind, ..ABSENT };
                let (attr, ttl, generation) = match &item.entry {
                    // fuser has one time to live for both.
                    Some(entry) => (&entry.attr, entry.entry_ttl.min(entry.attr_ttl), entry.generation),
                    None => (&bare, Duration::ZERO, 0),
                };
                let full = reply.add(
                    INodeNo(item.node),
                    item.cookie,
                    item.name,
                    &ttl,
                    &attr_out(attr),
                    Generation(generation),
                );
                if full {
                    Fit::Full
                } else {
                    given = true;
                    Fit::Taken
                }
            };
            match tree.readdir(&caller(request), node.0, fh.0, offset, ListMode::Plus, &mut add) {
                Err(e) if !given => reply.error(failed(Operation::ReadDirPlus, node, e)),
                _ => reply.ok(),
            }
        });
    }

    fn releasedir(&self, request: &Request, node: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.request(request, Operation::ReleaseDir, |tree| {
            tree.releasedir(node.0, fh.0);
            reply.ok();
        });
    }

    fn fsyncdir(&self, request: &Request, node: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        self.request(request, Operation::FSyncDir, |tree| match tree.fsyncdir(node.0, fh.0, data_only) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed(Operation::FSyncDir, node, e)),
        });
    }

    fn statfs(&self, request: &Request, node: INodeNo, reply: ReplyStatfs) {
        self.request(request, Operation::StatFs, |tree| match tree.statfs(node.0) {
            Ok(s) => reply.statfs(s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.frsize),
            Err(e) => reply.error(failed(Operation::StatFs, node, e)),
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.request(request, Operation::SetXattr, |tree| {
            match tree.setxattr(&caller(request), node.0, name, value, flags) {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(failed(Operation::SetXattr, node, e)),
            }
        });
    }

    fn getxattr(&self, request: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.request(request, Operation::GetXattr, |tree| {
            if tree.is_without_xattrs() {
                return reply.error(fuser::Errno::ENOSYS); // never asked again
            }
            give_bytes(
                reply,
                |reply, e| reply.error(failed(Operation::GetXattr, node, e)),
                |reply, bytes| give_xattr(reply, size, bytes),
                |out| tree.getxattr(&caller(request), node.0, name, out),
            );
        });
    }

    fn listxattr(&self, request: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        self.request(request, Operation::ListXattr, |tree| {
            if tree.is_without_xattrs() {
                return reply.error(fuser::Errno::ENOSYS);
            }
            give_bytes(
                reply,
                |reply, e| reply.error(failed(Operation::ListXattr, node, e)),
                |reply, bytes| give_xattr(reply, size, bytes),
                |out| {
                    let may = || request.uid() == 0 && is_admin(request.pid());
                    tree.listxattr(node.0, &mut |names| out(&listed(names, may)))
                },
            );
        });
    }

    fn removexattr(&self, request: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.request(request, Operation::RemoveXattr, |tree| match tree.removexattr(&caller(request), node.0, name) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed(Operation::RemoveXattr, node, e)),
        });
    }

    fn access(&self, request: &Request, node: INodeNo, mask: fuser::AccessFlags, reply: ReplyEmpty) {
        // Asked only where the kernel does not check by itself (default_permissions).
        self.request(request, Operation::Access, |tree| match tree.access(node.0, mask.bits()) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed(Operation::Access, node, e)),
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let new = New { mode, umask, rdev: 0 };
        self.request(request, Operation::Create, |tree| {
            match tree.create(&caller(request), parent.0, name, new, flags) {
                Ok((entry, opened)) => reply.created(
                    &entry.entry_ttl.min(entry.attr_ttl),
                    &attr_out(&entry.attr),
                    Generation(entry.generation),
                    FileHandle(opened.handle),
                    file_flags(opened),
                ),
                Err(e) => reply.error(failed(Operation::Create, parent, e)),
            }
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.request(request, Operation::FAllocate, |tree| {
            let writer = writer(request);
            let done = tree.fallocate(&writer, node.0, fh.0, offset, length, mode);
            self.tell_lost_set_id(tree, &writer, node);
            match done {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(failed(Operation::FAllocate, node, e)),
            }
        });
    }

    fn lseek(&self, request: &Request, node: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        self.request(request, Operation::LSeek, |tree| match tree.lseek(node.0, fh.0, offset, whence) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(failed(Operation::LSeek, node, e)),
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        node_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        node_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.request(request, Operation::CopyFileRange, |tree| {
            let (from, to) = ((node_in.0, fh_in.0, offset_in), (node_out.0, fh_out.0, offset_out));
            let writer = writer(request);
            let done = tree.copy_file_range(&writer, from, to, length);
            self.tell_lost_set_id(tree, &writer, node_out);
            match done {
                Ok(copied) => reply.written(copied as u32),
                Err(e) => reply.error(failed(Operation::CopyFileRange, node_in, e)),
            }
        });
    }

    // What is not served is answered ENOSYS without a warning each time; the kernel does without: locks are local (right for
    // one host), poll is always ready, ioctl and bmap are refused.
    fn getlk(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        reply: fuser::ReplyLock,
    ) {
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOSYS));
    }

    fn setlk(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOSYS));
    }

    fn bmap(&self, request: &Request, _: INodeNo, _: u32, _: u64, reply: fuser::ReplyBmap) {
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOSYS));
    }

    fn ioctl(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: fuser::ReplyIoctl,
    ) {
        // ENOTTY: "no such ioctl on this file", which programs expect (ioctl(2)).
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOTTY));
    }

    fn poll(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::PollNotifier,
        _: fuser::PollEvents,
        _: fuser::PollFlags,
        reply: fuser::ReplyPoll,
    ) {
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOSYS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trusted_names_are_listed_to_who_may_read_them() {
        let names = b"user.a\0trusted.overlay.opaque\0security.capability\0trusted.x\0";
        assert_eq!(&*listed(names, || true), names);
        assert_eq!(&*listed(names, || false), b"user.a\0security.capability\0");
        assert_eq!(&*listed(b"user.a\0", || unreachable!("nothing trusted is in it")), b"user.a\0");
        assert_eq!(
            is_admin(std::process::id()),
            rustix::thread::capabilities(None).unwrap().effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN)
        );
        assert!(!is_admin(0));
    }

    #[test]
    fn times_survive_both_ways() {
        // What fuser 0.18 makes of the two numbers of the kernel.
        let fuser_in = |secs: i64, nanos: u32| {
            if secs >= 0 {
                UNIX_EPOCH + Duration::new(secs as u64, nanos)
            } else {
                UNIX_EPOCH - Duration::new(secs.unsigned_abs(), nanos)
            }
        };
        for (secs, nanos) in [(0, 0), (1, 5), (-1, 0), (-2, 800_000_000), (-1, 999_999_999), (-5_000_000_000, 1)] {
            assert_eq!(time_in(fuser_in(secs, nanos)), Timespec { secs, nanos });
        }
        assert_eq!(time_out(Timespec { secs: -2, nanos: 800_000_000 }), UNIX_EPOCH - Duration::from_millis(1200));
        assert_eq!(
            time_out(Timespec { secs: i64::MIN, nanos: 0 }),
            UNIX_EPOCH.checked_sub(Duration::from_secs(1 << 63)).unwrap()
        );
    }

    #[test]
    fn every_operation_has_its_counter() {
        let counters = Counters::default();
        for &operation in Operation::ALL {
            counters.count(operation);
        }
        assert!(Operation::ALL.iter().all(|&o| counters.of(o) == 1));
        assert_eq!(counters.total(), OPERATIONS as u64 - 1);
    }
}
