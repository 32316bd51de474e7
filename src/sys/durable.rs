//! Writing so that a power loss leaves the old or the new, never half: rename alone is not durability.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, fchmod, openat, renameat, unlinkat};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Error, Result, show};
use crate::fault;

/// What a write must survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// The end of this process at any step: old or new, whole. After a power loss the file may be old, absent or empty.
    Crash,
    /// A power loss too.
    PowerLoss,
}

/// Replace the file at `path` with `bytes`, mode 0600: written beside it and renamed over it; for a power loss the file is synced
/// before, and the directory after.
pub fn write_file(path: &Path, bytes: &[u8], survives: Survives) -> Result<()> {
    const OP: &str = "write";
    let dir = path.parent().unwrap_or(Path::new("."));
    let failed = |e: std::io::Error| Error::io(OP, show(path), e);
    // tempfile: mode 0600, removed again when dropped before `persist`.
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir).map_err(failed)?;
    fault::point("durable.write")?;
    file.write_all(bytes).map_err(failed)?;
    if survives == Survives::PowerLoss {
        fault::point("durable.sync")?;
        file.as_file().sync_all().map_err(failed)?;
    }
    fault::point("durable.rename")?;
    file.persist(path).map_err(|e| failed(e.error))?;
    match survives {
        Survives::Crash => Ok(()),
        Survives::PowerLoss => sync_dir(dir),
    }
}

/// Replace the file `name` in a directory that may be another user's: what has that name, a symlink too, is not followed. `mode`: of all
/// others; `None`: as the umask has it. `path` is for messages.
pub fn replace_at(dir: impl AsFd, name: &str, path: &Path, bytes: &[u8], mode: Option<Mode>) -> Result<()> {
    const OP: &str = "write";
    let fail = |e| Error::sys(OP, show(path), e);
    let mut random = [0_u8; 8];
    getrandom(&mut random, GetRandomFlags::empty()).map_err(fail)?;
    let fresh = format!(".new-{}", data_encoding::HEXLOWER.encode(&random));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = std::fs::File::from(openat(&dir, &fresh, flags, Mode::from_raw_mode(0o666)).map_err(fail)?);
    let done = file
        .write_all(bytes)
        .map_err(|e| Error::io(OP, show(path), e))
        .and_then(|()| mode.map_or(Ok(()), |mode| fchmod(&file, mode).map_err(fail)))
        .and_then(|()| renameat(&dir, &fresh, &dir, name).map_err(fail));
    if done.is_err() {
        let _ = unlinkat(&dir, &fresh, AtFlags::empty());
    }
    done
}

/// Make a new file at `path`, mode 0600, in a directory that nobody knows yet. Who makes that known brings both to the disk.
pub fn make_unknown_file(path: &Path, bytes: &[u8]) -> Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let failed = |e: std::io::Error| Error::io("write", show(path), e);
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    fault::point("durable.write")?;
    file.write_all(bytes).map_err(failed)?;
    Ok(file)
}

/// Write `bytes` into the file at `path`, from `at` on. Where it had bytes there before, and nothing else of it changed, that takes no commit of the
/// file system's journal (fdatasync(2)). A power loss may leave some of them, for who can tell by the content; an error leaves blanks.
pub fn write_over(path: &Path, at: u64, bytes: &[u8]) -> Result<std::fs::File> {
    use std::os::unix::fs::FileExt as _;
    let failed = |e: std::io::Error| Error::io("write", show(path), e);
    let file = std::fs::File::options().write(true).open(path).map_err(failed)?;
    fault::point("durable.write")?;
    let done = file.write_all_at(bytes, at).map_err(failed).and_then(|()| {
        fault::point("durable.sync")?;
        file.sync_data().map_err(failed)
    });
    match done {
        Ok(()) => Ok(file),
        Err(error) => {
            let _ = file.write_all_at(&vec![b' '; bytes.len()], at);
            Err(error)
        }
    }
}

/// Make a new file at `path` of what `write` gives, whole or not at all, also after this process was killed: it has no name until
/// it is complete (O_TMPFILE), or, where the file system cannot, one beside it. [`crate::Kind::Exists`] where there is one already.
pub fn make_file(path: &Path, write: impl FnOnce(&mut dyn std::io::Write) -> Result<()>) -> Result<()> {
    use std::os::fd::AsRawFd as _;

    use rustix::fs::{CWD, linkat};
    use rustix::io::Errno;

    const OP: &str = "make";
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |e: std::io::Error| Error::io(OP, show(path), e);
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let (mut file, named) = match openat(CWD, dir, flags, Mode::from_raw_mode(0o666)) {
        Ok(fd) => (std::fs::File::from(fd), None),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
            let (file, name) = tempfile::Builder::new().prefix(".new-").tempfile_in(dir).map_err(failed)?.into_parts();
            (file, Some(name))
        }
        Err(e) => return Err(Error::sys(OP, show(path), e)),
    };
    {
        let mut out = std::io::BufWriter::with_capacity(256 << 10, &mut file);
        write(&mut out)?;
        fault::point("durable.flush")?;
        out.flush().map_err(failed)?;
    }
    fault::point("durable.link")?;
    match named {
        Some(name) => name.persist_noclobber(path).map_err(|e| failed(e.error)),
        None => linkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), CWD, path, AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| Error::sys(OP, show(path), e)),
    }
}

/// Bring a directory's names to the disk.
pub fn sync_dir(dir: &Path) -> Result<()> {
    fault::point("durable.sync_dir")?;
    std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io("sync directory", show(dir), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_file(&path, b"one", Survives::PowerLoss).unwrap();
        write_file(&path, b"two", Survives::Crash).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_file(&dir.path().join("no/f"), b"", Survives::Crash).is_err());
    }
}
