//! Files by descriptor: opening inside a root, making directories safely, syncing.

use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result, show};

/// openat2(2) for a path whose `..` and symlinks must stay below `root` (RESOLVE_IN_ROOT): what is absolute starts there.
pub fn open_in_root(root: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    open_resolved(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// openat2(2) for a path that must stay below `root` and hold no symlink at all.
pub fn open_beneath(root: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    open_resolved(root, path, flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS)
}

/// The kernel answers EAGAIN when a rename raced with `..` in the path (openat2(2)); it settles in a few tries.
const RESOLVE_TRIES: u32 = 64;

static OPENAT2_MISSING: AtomicBool = AtomicBool::new(false);

fn open_resolved(root: impl AsFd, path: &Path, flags: OFlags, how: ResolveFlags) -> rustix::io::Result<OwnedFd> {
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
                return super::walk::open_by_steps(root.as_fd(), path, flags, how);
            }
            other => return other,
        }
    }
    Err(last)
}

/// An O_PATH descriptor of a path of the host: opens nothing, blocks on nothing, follows symlinks.
pub fn open_path(path: &Path) -> rustix::io::Result<OwnedFd> {
    fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// The absolute path of an open file, as the kernel sees it now (proc(5), /proc/PID/fd).
pub fn path_of(fd: impl AsFd) -> Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    std::fs::read_link(&link).map_err(|e| Error::io("read", link, e).hint("mount /proc"))
}

/// Open `relative` below `sandbox`, making what is missing as directories with the sandbox's owner, mode 0755.
/// Symlinks are followed as long as they stay below the sandbox.
pub fn open_or_make_below(sandbox: &Path, relative: &Path) -> Result<OwnedFd> {
    const OP: &str = "make volume source";
    let name = || show(sandbox.join(relative));
    let root = fs::openat(CWD, sandbox, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::sys("open sandbox", show(sandbox), e).hint("--sandbox names an existing directory"))?;
    let escape = |e: Errno| match e {
        Errno::XDEV => Error::new(Kind::Usage, OP, name(), "a symlink leads out of the sandbox"),
        e => Error::sys(OP, name(), e),
    };
    let open =
        |path: &Path| open_resolved(&root, path, OFlags::PATH, ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS);
    match open(relative) {
        Err(Errno::NOENT) => {}
        other => return other.map_err(escape),
    }
    let owner = fs::fstat(&root).map_err(|e| Error::sys(OP, name(), e))?;
    let mut at = PathBuf::new();
    for part in relative.components() {
        let Component::Normal(part) = part else {
            return Err(Error::new(Kind::Usage, OP, name(), "it has a component . or .."));
        };
        let parent = if at.as_os_str().is_empty() {
            root.try_clone().map_err(|e| Error::io(OP, name(), e))?
        } else {
            open(&at).map_err(escape)?
        };
        match fs::mkdirat(&parent, part, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                let made = open_beneath(&parent, Path::new(part), OFlags::RDONLY | OFlags::DIRECTORY)
                    .map_err(|e| Error::sys(OP, name(), e))?;
                // Whoever may write to the parent may have put another directory there meanwhile. An empty one it could
                // have replaced by its own anyway; one with content would be given away by the chown below.
                if !is_empty(&made).map_err(|e| Error::sys(OP, name(), e))? {
                    return Err(Error::new(Kind::Busy, OP, name(), "it was changed while it was made"));
                }
                let mine = fs::fstat(&made).map_err(|e| Error::sys(OP, name(), e))?;
                if (mine.st_uid, mine.st_gid) != (owner.st_uid, owner.st_gid) {
                    fs::fchown(
                        &made,
                        Some(rustix::fs::Uid::from_raw(owner.st_uid)),
                        Some(rustix::fs::Gid::from_raw(owner.st_gid)),
                    )
                    .map_err(|e| Error::sys(OP, name(), e))?;
                }
            }
            Err(Errno::EXIST) => {}
            Err(e) => return Err(Error::sys(OP, name(), e)),
        }
        at.push(part);
    }
    open(relative).map_err(escape)
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

/// Hold the lock (flock(2)) on a directory shared, as long as the descriptor is open. For who uses an image: whoever cleans up
/// holds it for a moment only.
pub fn hold_directory(dir: &Path) -> Result<OwnedFd> {
    let fail = |e| Error::sys("lock", show(dir), e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = fs::openat(CWD, dir, flags, Mode::empty()).map_err(fail)?;
    fs::flock(&fd, fs::FlockOperation::LockShared).map_err(fail)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_made_and_never_outside() {
        let dir = tempfile::tempdir().unwrap();
        let made = open_or_make_below(dir.path(), Path::new("a/b/c")).unwrap();
        assert!(path_of(&made).unwrap().ends_with("a/b/c"));
        assert!(dir.path().join("a/b/c").is_dir());
        std::os::unix::fs::symlink("/etc", dir.path().join("out")).unwrap();
        std::os::unix::fs::symlink("a/b", dir.path().join("in")).unwrap();
        for bad in ["out", "out/x", "../x"] {
            let error = open_or_make_below(dir.path(), Path::new(bad)).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{bad}: {error}");
        }
        assert!(path_of(open_or_make_below(dir.path(), Path::new("in/d")).unwrap()).unwrap().ends_with("a/b/d"));
    }
}
