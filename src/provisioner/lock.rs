//! Locks on directories: flock(2) on the directory itself, so that a lock leaves no file behind and ends with its holder.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, fstat, openat};
use rustix::io::Errno;

use crate::error::{Error, Result, show};

/// An exclusive lock on a directory; ends when dropped, or with the process.
#[derive(Debug)]
pub(super) struct DirLock(#[allow(dead_code, reason = "held, not used")] OwnedFd);

fn open(dir: &Path) -> rustix::io::Result<OwnedFd> {
    openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Wait for the lock on a directory. `None`: it does not exist, or was removed while we waited.
pub(super) fn directory(dir: &Path) -> Result<Option<DirLock>> {
    let fd = match open(dir) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(Error::sys("open", show(dir), e)),
    };
    let mut how = FlockOperation::NonBlockingLockExclusive;
    loop {
        match flock(&fd, how) {
            Err(Errno::WOULDBLOCK) => {
                log::info!("waiting for another process that changes {}", show(dir));
                how = FlockOperation::LockExclusive;
            }
            Ok(()) => break,
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::sys("lock", show(dir), e)),
        }
    }
    let stat = fstat(&fd).map_err(|e| Error::sys("stat", show(dir), e))?;
    Ok((stat.st_nlink > 0).then_some(DirLock(fd)))
}

/// Does somebody hold the lock on a directory right now?
pub(super) fn is_held(dir: &Path) -> Result<bool> {
    let fd = match open(dir) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(false),
        Err(e) => return Err(Error::sys("open", show(dir), e)),
    };
    match flock(&fd, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(e) => Err(Error::sys("lock", show(dir), e)),
    }
}

/// Make a directory and those above it that are missing, for the owner alone (0700).
pub(super) fn make_private_dir(dir: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| Error::io("make state directory", show(dir), e).hint("choose another with --root or FSPROV_ROOT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_released_and_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        make_private_dir(&path).unwrap();
        assert!(!is_held(&path).unwrap());
        let held = directory(&path).unwrap().unwrap();
        assert!(is_held(&path).unwrap());
        drop(held);
        assert!(!is_held(&path).unwrap());
        std::fs::remove_dir(&path).unwrap();
        assert!(directory(&path).unwrap().is_none());
        assert!(!is_held(&path).unwrap());
    }

    #[test]
    fn who_waited_for_a_directory_that_was_removed_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        make_private_dir(&path).unwrap();
        let held = directory(&path).unwrap().unwrap();
        let waiting = path.clone();
        let waiter = std::thread::spawn(move || directory(&waiting).unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(50));
        std::fs::remove_dir(&path).unwrap();
        drop(held);
        assert!(waiter.join().unwrap());
    }
}
