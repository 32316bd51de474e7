//! What lies below an upper directory: the image's index, or plain layers without one.

use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::walk::OPEN_DIR;
use crate::error::{Error, Result, show};
use crate::index::read::InodeKind;
use crate::index::{Index, Time, Xattr};
use crate::store::archive::pax::is_xattr_taken;
use crate::store::archive::write::read_xattrs;
use crate::store::tree::damaged;
use crate::sys::fs::open_beneath;

/// The layers, merged.
#[derive(Debug)]
pub(crate) enum Below {
    /// By the index of an image in the store.
    Index(Index),
    /// One directory, as it lies there.
    Directory(OwnedFd),
}

/// What a directory of an upper is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) is_directory: bool,
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    pub(super) mtime: Time,
    /// Of a directory, sorted: those that an image may have.
    pub(super) xattrs: Vec<Xattr>,
}

impl Below {
    /// The directory at `at`.
    pub(crate) fn directory(at: &Path) -> Result<Self> {
        let fd = fs::openat(fs::CWD, at, OPEN_DIR, Mode::empty());
        fd.map(Below::Directory).map_err(|e| Error::sys("open layer", show(at), e))
    }

    /// What is at a path. No symlink is followed.
    pub(super) fn look(&self, path: &[u8]) -> Result<Option<Seen>> {
        match self {
            Below::Index(index) => {
                let Some(inode) = index.find(path).map_err(damaged)? else { return Ok(None) };
                let is_directory = matches!(inode.kind, InodeKind::Directory { .. });
                let mut xattrs = Vec::new();
                for xattr in index.xattrs(&inode).map_err(damaged)?.take_while(|_| is_directory) {
                    let (name, value) = xattr.map_err(damaged)?;
                    if is_xattr_taken(name) {
                        xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
                    }
                }
                xattrs.sort_unstable();
                Ok(Some(Seen {
                    is_directory,
                    mode: inode.mode & 0o7777,
                    owner: (inode.uid, inode.gid),
                    mtime: inode.mtime,
                    xattrs,
                }))
            }
            Below::Directory(root) => {
                let path = Path::new(OsStr::from_bytes(if path.is_empty() { b"." } else { path }));
                let look = || {
                    let found = open_beneath(root, path, OFlags::PATH | OFlags::NOFOLLOW)?;
                    let stat = fs::statat(&found, "", AtFlags::EMPTY_PATH)?;
                    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                    let xattrs = if is_directory {
                        read_xattrs(fs::openat(&found, ".", OPEN_DIR, Mode::empty())?.as_fd())?
                    } else {
                        Vec::new()
                    };
                    Ok((stat, is_directory, xattrs))
                };
                match look() {
                    Ok((stat, is_directory, xattrs)) => Ok(Some(Seen {
                        is_directory,
                        mode: stat.st_mode & 0o7777,
                        owner: (stat.st_uid, stat.st_gid),
                        mtime: Time { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
                        xattrs,
                    })),
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
                    Err(e) => Err(Error::sys("look at layer", show(path), e)),
                }
            }
        }
    }

    /// The names in a directory, sorted.
    pub(super) fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self {
            Below::Index(index) => {
                let Some(inode) = index.find(path).map_err(damaged)? else { return Ok(Vec::new()) };
                let InodeKind::Directory { first, count } = inode.kind else { return Ok(Vec::new()) };
                (first..first + count)
                    .map(|at| index.name(at).map(|name| name.name.to_vec()).map_err(damaged))
                    .collect()
            }
            Below::Directory(root) => {
                let path = Path::new(OsStr::from_bytes(if path.is_empty() { b"." } else { path }));
                let fail = |e| Error::sys("list layer", show(path), e);
                let dir = match open_beneath(root, path, OPEN_DIR) {
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Vec::new()),
                    other => other.map_err(fail)?,
                };
                let mut names = Vec::new();
                for item in fs::Dir::read_from(&dir).map_err(fail)? {
                    names.push(item.map_err(fail)?.file_name().to_bytes().to_vec());
                }
                names.retain(|name| !matches!(&name[..], b"." | b".."));
                names.sort_unstable();
                Ok(names)
            }
        }
    }
}
