//! Where images are made: a directory for each maker on the file system of the store, named by boot, locked by its maker,
//! and taken away by the next process if its maker died.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, mkdirat, openat};
use rustix::io::Errno;

use super::lock::{self, Hold};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::index::Builder;
use crate::paths::StatePaths;
use crate::sys::remove::remove_tree;
use crate::sys::usage::bytes_on_disk;

const OPEN_DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A half-made image. Dropped, it and what is in it are removed.
#[derive(Debug)]
pub(super) struct Staging {
    path: PathBuf,
    /// Locked, and opened before the first write: syncfs(2) tells of errors since then.
    dir: OwnedFd,
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    openat(CWD, path, OPEN_DIR, Mode::empty()).map_err(|e| Error::sys("open", show(path), e))
}

/// Held while a staging directory is made and locked, so that no cleaner comes between the two.
fn lock_all(paths: &StatePaths) -> Result<lock::StoreLock> {
    let path = paths.staging();
    lock::lock(open_dir(&path)?, &path, Hold::Exclusive)
}

fn boot_id() -> String {
    // Where /proc is not mounted the lock alone tells the dead from the living, which is all that matters.
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(
        |_| "unknown".into(),
        |text| text.trim().chars().filter(char::is_ascii_hexdigit).take(12).collect(),
    )
}

impl Staging {
    /// A fresh directory, 0700, locked. `what` is for people who look at it.
    pub(super) fn make(paths: &StatePaths, what: &str) -> Result<Self> {
        fault::point("store.stage")?;
        let held = lock_all(paths)?;
        let mut random = [0_u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::sys("read random bytes", "", e))?;
        let name = format!("{}-{what}-{}", boot_id(), data_encoding::HEXLOWER.encode(&random));
        let path = paths.staging().join(name);
        mkdirat(CWD, &path, Mode::RWXU).map_err(|e| Error::sys("make", show(&path), e))?;
        // From here on it is removed again, whatever fails.
        let dir = open_dir(&path).map_err(|e| e.with_undo(remove_tree(&path).map(|_| ())))?;
        let staging = Staging { path, dir };
        fault::point("store.staged")?;
        flock(&staging.dir, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| Error::sys("lock", show(&staging.path), e))?;
        drop(held);
        Ok(staging)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bring everything to the disk; an error of any write since the staging directory was made is told here (Linux 5.8).
    pub(super) fn sync(&self) -> Result<()> {
        fault::point("store.sync")?;
        rustix::fs::syncfs(&self.dir).map_err(|e| Error::sys("sync the file system of", show(&self.path), e))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.path) {
            log::warn!("a half-made image stays behind and goes at the next import: {error}");
        }
    }
}

/// Remove what makers left that are no more. Gives how many, and the bytes that they took. What cannot be removed is logged and stays.
pub(super) fn clean(paths: &StatePaths) -> Result<(usize, u64)> {
    let staging = paths.staging();
    let held = lock_all(paths)?;
    let mut dead = Vec::new();
    let entries = std::fs::read_dir(&staging).map_err(|e| Error::io("list", show(&staging), e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io("list", show(&staging), e))?.path();
        match openat(CWD, &path, OPEN_DIR, Mode::empty()) {
            Ok(dir) => match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => dead.push((path, Some(dir))),
                Err(Errno::WOULDBLOCK) => {}
                Err(e) => return Err(Error::sys("lock", show(&path), e)),
            },
            // Not ours at all, but this directory is.
            Err(Errno::NOTDIR | Errno::LOOP) => dead.push((path, None)),
            Err(Errno::NOENT) => {}
            Err(e) => log::warn!("{}", Error::sys("open", show(&path), e)),
        }
    }
    // Their locks are held now: deleting, which may take long, needs no other.
    drop(held);
    let (mut removed, mut bytes) = (0, 0);
    for (path, _lock) in &dead {
        let size = bytes_on_disk(path).unwrap_or(0);
        match remove_tree(path) {
            Ok(_) => {
                removed += 1;
                bytes += size;
            }
            Err(error) => log::warn!("{error}"),
        }
    }
    if removed > 0 {
        log::info!("removed {removed} half-made images of importers that died");
    }
    Ok((removed, bytes))
}

/// Move a directory of the store away at one stroke, then delete it. What is left of it after a crash is cleaned later.
pub(super) fn remove_aside(paths: &StatePaths, path: &Path) -> Result<()> {
    move_aside(paths, path)?.remove()
}

/// A directory that left the store and is to be deleted.
#[derive(Debug)]
pub(super) struct Aside(Staging);

impl Aside {
    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn remove(self) -> Result<()> {
        fault::point("store.delete")?;
        remove_tree(self.0.path()).map(|_| ())
    }
}

/// Move a directory of the store into staging.
pub(super) fn move_aside(paths: &StatePaths, path: &Path) -> Result<Aside> {
    let staging = Staging::make(paths, "rm")?;
    let to = staging.path().join("gone");
    fault::point("store.unpublish")?;
    // Moving a directory needs write permission on it (its `..` changes).
    rustix::fs::renameat(CWD, path, CWD, &to).map_err(|e| match e {
        Errno::NOENT => Error::new(Kind::NotFound, "remove", show(path), "it is not there"),
        e => Error::sys("move away", show(path), e),
    })?;
    if let Some(parent) = path.parent()
        && let Err(error) = crate::sys::durable::sync_dir(parent)
    {
        // What may come back after a power loss must not come back half deleted.
        let back = rustix::fs::renameat_with(CWD, &to, CWD, path, rustix::fs::RenameFlags::NOREPLACE);
        return Err(error.with_undo(back.map_err(|e| Error::sys("put back", show(path), e))));
    }
    fault::point("store.unpublished")?;
    Ok(Aside(staging))
}

pub(super) fn create_new(path: &Path) -> Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    fault::point("store.write_new")?;
    let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|e| Error::io("write", show(path), e))
}

pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write as _;
    create_new(path)?.write_all(bytes).map_err(|e| Error::io("write", show(path), e))
}

pub(super) fn write_index(path: &Path, index: Builder) -> Result<()> {
    let mut out = std::io::BufWriter::with_capacity(64 << 10, create_new(path)?);
    index.finish_into(&mut out).map_err(|e| e.within("write", show(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_cleaned_and_the_living_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StatePaths::new(dir.path().to_owned());
        std::fs::create_dir(paths.staging()).unwrap();
        let living = Staging::make(&paths, "import").unwrap();
        let dead = paths.staging().join("boot-import-dead");
        std::fs::create_dir_all(dead.join("rootfs/a")).unwrap();
        std::fs::write(dead.join("rootfs/a/file"), vec![1; 100_000]).unwrap();
        let (count, bytes) = clean(&paths).unwrap();
        assert!(count == 1 && bytes >= 100_000, "{count} {bytes}");
        assert!(living.path().is_dir() && !dead.exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
        assert_eq!(clean(&paths).unwrap(), (0, 0));
    }
}
