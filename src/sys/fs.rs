//! Files by descriptor: the openers (inside a root, beneath one, of a resolved path of the host), and reading no more than a limit.

use std::ffi::OsStr;
use std::fmt::Display;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::walk::{Links, open_by_steps};
use crate::error::{Error, Kind, Result, show};

/// The path of a descriptor, for calls that take none: what it was opened as, wherever its name leads by now.
pub fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// openat2(2) for a path whose `..` and symlinks must stay below `root` (RESOLVE_IN_ROOT): what is absolute starts there.
pub fn open_in_root(root: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    open_below(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// openat2(2) for a path that must stay below `root` and hold no symlink at all.
pub fn open_beneath(root: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    open_below(root, path, flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS)
}

/// The kernel answers EAGAIN when a rename raced with `..` in the path (openat2(2)); it settles in a few tries.
const RESOLVE_TRIES: u32 = 64;

static OPENAT2_MISSING: AtomicBool = AtomicBool::new(false);

fn open_below(root: impl AsFd, path: &Path, flags: OFlags, how: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    let mut last = Errno::AGAIN;
    for _ in 0..RESOLVE_TRIES {
        match fs::openat2(&root, path, flags, Mode::empty(), how) {
            Err(e @ (Errno::AGAIN | Errno::INTR)) => last = e,
            // Before Linux 5.6, or filtered by a seccomp rule that hides it.
            Err(Errno::NOSYS) => {
                if !OPENAT2_MISSING.swap(true, Ordering::Relaxed) {
                    log::warn!(target: "fsprov::fs", "this kernel has no openat2: paths are resolved step by step instead");
                }
                return open_by_steps(root.as_fd(), path, flags, how, Links::Anyones);
            }
            other => return other,
        }
    }
    Err(last)
}

/// An O_PATH descriptor of an absolute path of the host that was resolved before, as [`path_of`] gives it: a symlink on the way is a
/// change since then, and ELOOP.
pub fn open_resolved(path: &Path) -> rustix::io::Result<OwnedFd> {
    let top = fs::openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match path.strip_prefix("/") {
        Ok(below) if below.as_os_str().is_empty() => Ok(top),
        Ok(below) => open_beneath(&top, below, OFlags::PATH),
        Err(_) => Err(Errno::INVAL),
    }
}

/// An O_PATH descriptor of an absolute path that a user wrote: symlinks are followed, but as the machine's root only those of root. What
/// another user can make lead anywhere is EXDEV then: see [`explain_named`].
pub fn open_named(path: &Path) -> rustix::io::Result<OwnedFd> {
    if !super::process::is_root_of_host().unwrap_or(true) {
        return open_path(path);
    }
    let top = fs::openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    open_by_steps(top.as_fd(), path, OFlags::PATH | OFlags::CLOEXEC, how, Links::Roots)
}

/// The error for a path that [`open_named`] did not open.
pub fn explain_named(op: &'static str, path: &Path, errno: Errno) -> Error {
    match errno {
        Errno::XDEV => {
            let why = "a symlink in it belongs to another user, and root does not follow those";
            Error::new(Kind::Usage, op, show(path), why).hint("name the directory that it leads to")
        }
        e => Error::sys(op, show(path), e),
    }
}

/// The whole of `from`, which is no longer than `most` bytes: more is [`Kind::Limit`].
pub fn read_bounded(op: &'static str, name: impl Display, from: impl Read, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Err(e) = from.take(most.saturating_add(1)).read_to_end(&mut bytes) {
        return Err(Error::io(op, name, e));
    }
    if bytes.len() as u64 > most {
        return Err(Error::new(Kind::Limit, op, name, format!("it is longer than {most} bytes")));
    }
    Ok(bytes)
}

/// An O_PATH descriptor of a path of the host: opens nothing, blocks on nothing, follows symlinks. For paths that a user has just
/// written, and those of the kernel's own (/proc).
pub fn open_path(path: &Path) -> rustix::io::Result<OwnedFd> {
    fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// The absolute path of an open file, as the kernel sees it now (proc(5), /proc/PID/fd).
pub fn path_of(fd: impl AsFd) -> Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    std::fs::read_link(&link).map_err(|e| Error::io("read", link, e).hint("mount /proc"))
}

/// As [`open_in_root`], but what leads out of `root` is refused (EXDEV): symlinks are followed as long as they stay below.
pub fn open_within(root: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    open_below(root, path, flags, ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
}

/// A new directory, open for reading. EBUSY where one that is not empty was put in its place: nothing of that is given away.
pub fn make_empty(parent: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let parent = parent.as_fd();
    fs::mkdirat(parent, name, Mode::RWXU)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = fs::openat(parent, name, flags, Mode::empty())?;
    if is_empty(&made)? { Ok(made) } else { Err(Errno::BUSY) }
}

/// A new directory of ours, closed to all others. EBUSY where another one was put in its place: nothing of ours goes there.
pub fn make_private(parent: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let made = make_empty(parent, name)?;
    let stat = fs::fstat(&made)?;
    let is_ours = stat.st_uid == rustix::process::geteuid().as_raw()
        && Mode::from_raw_mode(stat.st_mode).intersection(Mode::RWXG | Mode::RWXO).is_empty();
    if is_ours { Ok(made) } else { Err(Errno::BUSY) }
}

/// Does this directory (opened for reading) hold nothing?
pub fn is_empty(dir: impl AsFd) -> rustix::io::Result<bool> {
    for entry in fs::Dir::read_from(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Hold the lock (flock(2)) on a directory that is open for reading shared, as long as the descriptor is open. For users of an image:
/// clean-up holds it for a moment only.
pub fn hold_shared(dir: OwnedFd) -> rustix::io::Result<OwnedFd> {
    fs::flock(&dir, fs::FlockOperation::LockShared)?;
    Ok(dir)
}

/// [`hold_shared`] of the directory at `dir`.
pub fn hold_directory(dir: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::openat(CWD, dir, flags, Mode::empty()).and_then(hold_shared).map_err(|e| Error::sys("lock", show(dir), e))
}
