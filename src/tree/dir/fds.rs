//! Descriptors: the bounded cache of directory descriptors, the cap on open files and pins, and opening below a directory.
//!
//! One [`FdPool`] serves all trees of a server, so that the number of descriptors does not grow with the number of volumes.
//! Its lock is never held across a system call: descriptors that fall out are closed after it is released.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use lru::LruCache;
use rustix::fs::{self, CWD, Mode, OFlags, ResolveFlags};

use crate::tree::{Errno, Node, Result};

/// Directory descriptors kept open between requests, all trees of a server together. A walk works in a handful of
/// directories at a time; 128 leaves half of the server's 256 for its image tree, devices and log.
const CACHED_FDS: usize = 128;
/// Descriptors left free for the session: the connection twice, what its threads wait with, a look at /proc, two socket ends while
/// a request is tried ([`crate::fuse::poison`]).
const RESERVED_FDS: usize = 10;
/// And for each request being worked on: two directories, a file, and the same file opened again.
const FDS_OF_A_REQUEST: usize = 4;
/// openat2(2) answers EAGAIN when a rename or mount raced with the walk; it settles in a few tries.
const RESOLVE_TRIES: u32 = 64;
/// Longest path handed to one call: PATH_MAX less room for the terminating NUL.
pub(super) const MAX_PIECE: usize = 4000;

/// What a cached descriptor was opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Use {
    /// O_PATH of a directory: the place to start from.
    Place,
    /// O_RDONLY of a regular file of an immutable tree, which is read without open.
    Content,
}

/// The descriptors of all directory trees of one server.
pub struct FdPool {
    cache: Mutex<LruCache<(u32, Node, Use), Arc<OwnedFd>>>,
    /// O_PATH of /proc/self/fd: where an O_PATH descriptor is opened again for reading, writing or changing.
    proc_fd: OwnedFd,
    next_tree: AtomicU32,
    held: AtomicUsize,
    limit: usize,
}

impl std::fmt::Debug for FdPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FdPool").field("held", &self.held).field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// A descriptor that counts against the cap on open files for as long as it lives.
#[derive(Debug)]
pub(super) struct Held {
    fd: OwnedFd,
    pool: Arc<FdPool>,
}

impl Held {
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.pool.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How the descriptors that a server may have are shared out, so that a program that opens many files takes none that another
/// one's lookup needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Files open and pinned on behalf of programs.
    pub(super) open: usize,
    /// Directories kept open between requests.
    pub(super) directories: usize,
    /// Files of an indexed image kept open between requests.
    pub image: usize,
}

impl Shares {
    /// Of what RLIMIT_NOFILE leaves now (raise that first), for a server with `threads` threads. `kept`: descriptors that are
    /// open already and will count as open files.
    pub fn of_process(threads: usize, kept: usize) -> crate::Result<Self> {
        let soft = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let soft = soft.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
        let listed = std::fs::read_dir("/proc/self/fd")
            .map_err(|e| crate::Error::io("list", "/proc/self/fd", e).hint("mount /proc"))?;
        // One of them is the listing's own.
        let used = listed.count().saturating_sub(1 + kept);
        Self::of(soft, used + RESERVED_FDS + FDS_OF_A_REQUEST * threads).ok_or_else(|| {
            let why = format!("{soft} files may be open, and {used} are before a request came");
            crate::Error::new(crate::Kind::Limit, "share out descriptors", "", why)
                .hint("raise the limit of open files (ulimit -n)")
        })
    }

    fn of(limit: usize, reserved: usize) -> Option<Self> {
        let free = limit.checked_sub(reserved)?;
        // A quarter for each cache, until that is as much as it can use.
        let cached = CACHED_FDS.min(free / 4);
        (cached > 0).then_some(Shares { open: free - 2 * cached, directories: cached, image: cached })
    }
}

impl FdPool {
    /// The pool of a process with one thread; see [`Shares::of_process`].
    pub fn new() -> crate::Result<Arc<Self>> {
        Self::with(Shares::of_process(1, 0)?)
    }

    /// A pool of these shares.
    ///
    /// # Errors
    /// /proc is not mounted.
    pub fn with(shares: Shares) -> crate::Result<Arc<Self>> {
        let proc_fd =
            fs::openat(CWD, "/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| crate::Error::sys("open", "/proc/self/fd", e).hint("mount /proc"))?;
        Ok(Arc::new(FdPool {
            cache: Mutex::new(LruCache::new(NonZeroUsize::new(shares.directories).unwrap_or(NonZeroUsize::MIN))),
            proc_fd,
            next_tree: AtomicU32::new(0),
            held: AtomicUsize::new(0),
            limit: shares.open,
        }))
    }

    /// Open files and pins now, and the most there may be.
    pub fn usage(&self) -> (usize, usize) {
        (self.held.load(Ordering::Relaxed), self.limit)
    }

    /// Cached descriptors now.
    pub fn cached(&self) -> usize {
        self.lock().len()
    }

    pub(super) fn register(&self) -> u32 {
        self.next_tree.fetch_add(1, Ordering::Relaxed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LruCache<(u32, Node, Use), Arc<OwnedFd>>> {
        self.cache.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn get(&self, tree: u32, node: Node, role: Use) -> Option<Arc<OwnedFd>> {
        self.lock().get(&(tree, node, role)).cloned()
    }

    pub(super) fn put(&self, tree: u32, node: Node, role: Use, fd: &Arc<OwnedFd>) {
        let evicted = self.lock().push((tree, node, role), Arc::clone(fd));
        drop(evicted); // closed here, after the lock
    }

    pub(super) fn remove(&self, tree: u32, node: Node) {
        let gone = {
            let mut cache = self.lock();
            (cache.pop(&(tree, node, Use::Place)), cache.pop(&(tree, node, Use::Content)))
        };
        drop(gone);
    }

    pub(super) fn remove_tree(&self, tree: u32) {
        let mut gone = Vec::new();
        let mut cache = self.lock();
        let keys: Vec<_> = cache.iter().map(|(k, _)| *k).filter(|k| k.0 == tree).collect();
        for key in keys {
            gone.extend(cache.pop(&key));
        }
        drop(cache);
    }

    /// ENFILE: the cap on open files is reached. Asked before something is made that would have to be undone.
    pub(super) fn room(&self) -> Result<()> {
        if self.held.load(Ordering::Relaxed) < self.limit { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Count a descriptor against the cap. ENFILE: the cap is reached.
    pub(super) fn hold(self: &Arc<Self>, fd: OwnedFd) -> Result<Held> {
        if self.held.fetch_add(1, Ordering::Relaxed) >= self.limit {
            self.held.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::NFILE);
        }
        Ok(Held { fd, pool: Arc::clone(self) })
    }

    /// /proc/self/fd, for calls that take a directory and a name.
    pub(super) fn proc_fd(&self) -> &OwnedFd {
        &self.proc_fd
    }

    /// Open again what `fd` (O_PATH) stands for. It must be known to be a regular file or a directory.
    pub(super) fn reopen(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd> {
        fs::openat(
            &self.proc_fd,
            fd_name(&fd).as_str(),
            flags.difference(OFlags::NOFOLLOW) | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }
}

/// The name of a descriptor in /proc/self/fd.
pub(super) fn fd_name(fd: impl AsFd) -> String {
    fd.as_fd().as_raw_fd().to_string()
}

/// O_PATH of `path` below `dir`: relative, no `..`, no symlink on the way; the last component may be a symlink, which is opened itself.
pub(super) fn open_place(dir: impl AsFd, path: &[u8], extra: OFlags) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | extra;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    let mut last = Errno::AGAIN;
    for _ in 0..RESOLVE_TRIES {
        match fs::openat2(&dir, path, flags, Mode::empty(), how) {
            Err(e @ (Errno::AGAIN | Errno::INTR)) => last = e,
            // Before Linux 5.6, or filtered.
            Err(Errno::NOSYS) => return open_stepwise(dir, path, flags),
            other => return other,
        }
    }
    Err(last)
}

/// The same by one O_NOFOLLOW open a component: a symlink on the way is an O_PATH of a symlink, and the next step ENOTDIR.
fn open_stepwise(dir: impl AsFd, path: &[u8], flags: OFlags) -> Result<OwnedFd> {
    let mut at: Option<OwnedFd> = None;
    let mut names = path.split(|&b| b == b'/').peekable();
    while let Some(name) = names.next() {
        if matches!(name, b"" | b"." | b"..") {
            return Err(Errno::INVAL);
        }
        let flags = if names.peek().is_some() { flags | OFlags::DIRECTORY } else { flags };
        let next = match &at {
            Some(at) => fs::openat(at, name, flags, Mode::empty()),
            None => fs::openat(&dir, name, flags, Mode::empty()),
        }?;
        at = Some(next);
    }
    at.ok_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_is_a_cap_and_comes_back() {
        let small = FdPool::with(Shares { open: 1, directories: 2, image: 0 }).unwrap();
        let fd = || fs::openat(CWD, "/", OFlags::PATH, Mode::empty()).unwrap();
        let first = small.hold(fd()).unwrap();
        assert_eq!(small.hold(fd()).map(|_| ()), Err(Errno::NFILE));
        drop(first);
        assert!(small.hold(fd()).is_ok());
        for node in 0..5 {
            small.put(0, node, Use::Place, &Arc::new(fd()));
        }
        assert_eq!(small.cached(), 2);
        small.remove_tree(0);
        assert_eq!(small.cached(), 0);
    }

    #[test]
    fn shares_add_up_to_what_is_free() {
        assert_eq!(Shares::of(1024, 64), Some(Shares { open: 704, directories: 128, image: 128 }));
        assert_eq!(Shares::of(64, 32), Some(Shares { open: 16, directories: 8, image: 8 }));
        assert_eq!(Shares::of(36, 32), Some(Shares { open: 2, directories: 1, image: 1 }));
        assert_eq!((Shares::of(35, 32), Shares::of(20, 32)), (None, None));
    }

    #[test]
    fn places_are_opened_below_and_symlinks_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("l")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("out")).unwrap();
        let root = fs::openat(CWD, dir.path(), OFlags::PATH, Mode::empty()).unwrap();
        let kind =
            |path: &[u8]| open_place(&root, path, OFlags::empty()).map(|fd| fs::fstat(fd).unwrap().st_mode & 0o170_000);
        assert_eq!(kind(b"a/b"), Ok(0o040_000));
        assert_eq!(kind(b"l"), Ok(0o120_000));
        assert_eq!(kind(b"l/b"), Err(Errno::LOOP));
        assert_eq!(kind(b"out/passwd"), Err(Errno::LOOP));
        let stepwise = |path: &[u8]| open_stepwise(&root, path, OFlags::PATH | OFlags::NOFOLLOW).map(|_| ());
        assert_eq!(stepwise(b"a/b"), Ok(()));
        assert_eq!(stepwise(b"out"), Ok(()));
        for bad in [&b"out/passwd"[..], b"l/b", b"../x", b"a/../b", b"/etc", b""] {
            assert!(stepwise(bad).is_err(), "{bad:?}");
        }
        assert!(kind(b"../x").is_err());
        assert_eq!(kind(b"none"), Err(Errno::NOENT));
    }
}
