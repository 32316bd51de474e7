//! The store's lock and the locks of half-made images: flock(2), which ends with its holder.
//!
//! Order: the store lock before a staging lock. The store lock is held shared while an image is used or published and
//! exclusively while one is taken away; nobody unpacks or deletes a tree under it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result, show};

/// Longest wait for the store's lock. Its holders do a few system calls, or check one image; who waits longer waits for a stopped process.
const LOCK_WAIT: Duration = Duration::from_secs(60);
/// Between two tries.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// A lock, held until dropped.
#[derive(Debug)]
pub struct StoreLock(#[allow(dead_code, reason = "held, not used")] OwnedFd);

/// Does somebody hold the lock on this directory? A server that shows an image holds it shared on the image's, as long as it
/// serves: longer than a record names the image, where a rootfs in use was unmounted lazily. So does who reads all of an image.
pub(super) fn is_held(dir: &Path) -> Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match openat(CWD, dir, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(false),
        Err(e) => return Err(Error::sys("open", show(dir), e)),
    };
    match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(e) => Err(Error::sys("lock", show(dir), e)),
    }
}

/// How a lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    Shared,
    Exclusive,
}

pub(super) fn lock_file(path: &Path, hold: Hold) -> Result<StoreLock> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd =
        openat(CWD, path, flags, Mode::from_raw_mode(0o600)).map_err(|e| Error::sys("open lock", show(path), e))?;
    lock(fd, path, hold)
}

pub(super) fn lock(fd: OwnedFd, path: &Path, hold: Hold) -> Result<StoreLock> {
    let operation = match hold {
        Hold::Shared => FlockOperation::NonBlockingLockShared,
        Hold::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match flock(&fd, operation) {
            Ok(()) => return Ok(StoreLock(fd)),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(LOCK_POLL),
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::new(Kind::Busy, "lock", show(path), "another process holds it for a minute now")
                    .hint("find it in /proc/locks"));
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::sys("lock", show(path), e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_locks_live_together_and_exclude_the_other_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let one = lock_file(&path, Hold::Shared).unwrap();
        let two = lock_file(&path, Hold::Shared).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        assert_eq!(flock(&file, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
        drop((one, two));
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
