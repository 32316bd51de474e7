//! Where downloads lie until they are imported: `cache/download/<key>/`, kept when a download breaks off, so that the next one goes
//! on where it ended.
//!
//! A directory belongs to who holds its flock. One that nobody has touched for a week goes when the next download begins;
//! `gc` takes every one that nobody holds.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;

use super::Store;
use crate::error::{Error, Kind, Result, show};
use crate::sys::remove::remove_tree;
use crate::sys::usage::bytes_on_disk;

/// How long a broken-off download is kept.
const KEEP: Duration = Duration::from_secs(7 * 24 * 3600);
/// Longest wait for another process that downloads the same. Large images on slow lines take this long.
const WAIT: Duration = Duration::from_secs(3600);
const POLL: Duration = Duration::from_millis(100);

/// A directory for one download. It stays when dropped; [`Download::done`] removes it.
#[derive(Debug)]
pub struct Download {
    path: PathBuf,
    _lock: OwnedFd,
}

impl Download {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Remove it: what it held is imported.
    pub fn done(self) -> Result<()> {
        remove_tree(&self.path).map(|_| ())
    }
}

fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

impl Store {
    /// The directory of the download `key`, a name that was validated. Waits for another process that is at the same one.
    pub fn download(&self, key: &str) -> Result<Download> {
        debug_assert!(!key.contains('/') && !key.starts_with('.'), "{key}");
        self.clean_downloads(KEEP)?;
        let path = self.paths.downloads().join(key);
        let until = Instant::now() + WAIT;
        let mut said = false;
        loop {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|e| Error::io("make download directory", show(&path), e))?;
            let fd = match open(&path) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(Error::sys("open", show(&path), e)),
            };
            match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                // The process that held it may have removed it.
                Ok(()) if is_at(&fd, &path) => return Ok(Download { path, _lock: fd }),
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                    if !std::mem::replace(&mut said, true) {
                        log::info!("another process downloads the same: waiting for it");
                    }
                    std::thread::sleep(POLL);
                }
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::new(
                        Kind::Busy,
                        "lock",
                        show(&path),
                        "another process holds it for an hour now",
                    )
                    .hint("find it in /proc/locks"));
                }
                Err(e) => return Err(Error::sys("lock", show(&path), e)),
            }
        }
    }

    /// Remove downloads that broke off and that nobody has touched for `age`. Gives how many, and the bytes that they took.
    pub(super) fn clean_downloads(&self, age: Duration) -> Result<(usize, u64)> {
        let all = self.paths.downloads();
        let entries = match std::fs::read_dir(&all) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((0, 0)),
            Err(e) => return Err(Error::io("list", show(&all), e)),
        };
        let (mut removed, mut bytes) = (0, 0);
        for entry in entries {
            let path = entry.map_err(|e| Error::io("list", show(&all), e))?.path();
            let Ok(fd) = open(&path) else { continue };
            let is_old = std::fs::metadata(&path).and_then(|m| m.modified()).is_ok_and(|at| {
                // A clock that was set back makes nothing old.
                at.elapsed().is_ok_and(|since| since >= age)
            });
            if is_old && flock(&fd, FlockOperation::NonBlockingLockExclusive).is_ok() && is_at(&fd, &path) {
                let size = bytes_on_disk(&path).unwrap_or(0);
                remove_tree(&path)?;
                removed += 1;
                bytes += size;
            }
        }
        Ok((removed, bytes))
    }
}

fn is_at(fd: &OwnedFd, path: &Path) -> bool {
    let is = rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    std::fs::symlink_metadata(path).is_ok_and(|meta| is == Ok((meta.dev(), meta.ino())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::StatePaths;

    #[test]
    fn what_broke_off_is_found_again_and_what_is_held_is_not_cleaned() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&StatePaths::new(dir.path().to_owned())).unwrap();
        let first = store.download("sha256-0a").unwrap();
        std::fs::write(first.path().join("part"), "half").unwrap();
        assert_eq!(store.clean_downloads(Duration::ZERO).unwrap().0, 0, "it is held");
        drop(first);
        let again = store.download("sha256-0a").unwrap();
        assert_eq!(std::fs::read(again.path().join("part")).unwrap(), b"half");
        again.done().unwrap();
        drop(store.download("sha256-0b").unwrap());
        assert_eq!(store.clean_downloads(KEEP).unwrap().0, 0, "it is young");
        assert_eq!(store.clean_downloads(Duration::ZERO).unwrap().0, 1);
    }
}
