//! What an entry of an image is, and what its path may be.

use super::{MAX_DEPTH, MAX_NAME, MAX_PATH};
use crate::error::{Error, Kind, Result};

/// A name that begins so hides another (image-spec, layer.md, "Whiteouts").
pub(super) const WHITEOUT_PREFIX: &[u8] = b".wh.";

/// Position of a layer in the image, 0 at the bottom: names the root directory that a file's content lies below.
pub type LayerNumber = u16;

/// Seconds and nanoseconds since 1970; times before have negative seconds and nanoseconds that count forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub secs: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// An extended attribute: full name (`user.x`, `security.capability`) and value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Xattr {
    /// Its name with its namespace, 1 to 255 bytes, no NUL.
    pub name: Vec<u8>,
    /// Its value, at most 64 KiB.
    pub value: Vec<u8>,
}

/// One entry of a layer, as an archive or a directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path below the root, its components joined by one slash: `usr/bin/env`. Empty for the root itself.
    /// No leading slash, no `.`, `..` or empty component, no NUL.
    pub path: Vec<u8>,
    /// What it is.
    pub what: What,
    /// Permission bits with setuid, setgid and sticky (0o7777).
    pub mode: u16,
    /// Owner, as the image says.
    pub uid: u32,
    /// Group, as the image says.
    pub gid: u32,
    /// Last change.
    pub mtime: Time,
    /// Extended attributes, in any order, no name twice.
    pub xattrs: Vec<Xattr>,
}

impl Entry {
    /// What a file on the disk is, at `path` of the image.
    pub(crate) fn of_stat(path: Vec<u8>, what: What, stat: &rustix::fs::Stat, xattrs: Vec<Xattr>) -> Self {
        Entry {
            path,
            what,
            mode: (stat.st_mode & 0o7777) as u16,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: Time { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
            xattrs,
        }
    }
}

/// What an entry is. Device numbers have the kernel's 32-bit encoding
/// (`(minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A directory. One that is there already keeps its children and takes the new attributes.
    Directory,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Where its bytes lie: path below its layer's root directory. `None`: at the entry's own path.
        content: Option<Vec<u8>>,
        /// SHA-256 of its bytes, where known.
        sha256: Option<[u8; 32]>,
    },
    /// A symbolic link with its target, 1 to 4095 bytes, no NUL.
    Symlink(Vec<u8>),
    /// One more name of the inode at this path, which is there already (in this layer or below) and no directory. The
    /// entry's other fields are not looked at: the inode has its own.
    HardLink(Vec<u8>),
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    Char(u32),
    /// A block device.
    Block(u32),
}

/// Are names that begin with `.wh.` whiteouts in this layer?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// No: AppC images, plain directories, the bottom of anything.
    Plain,
    /// Yes, as OCI's layer specification has them: `.wh.NAME` hides NAME of the layers below, `.wh..wh..opq` hides
    /// everything in its directory that comes from below. Neither is an entry of the tree.
    Oci,
}

/// The names of a checked path, from the root down.
pub(super) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&b| b == b'/').filter(|name| !name.is_empty())
}

/// A checked path's parent and name; `None` for the root.
pub(super) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    Some(match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&path[..0], path),
    })
}

/// Refuse a path that is not one of [`Entry::path`]'s form.
pub(super) fn check_path(path: &[u8]) -> Result<()> {
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > MAX_PATH {
        return Err(refuse(Kind::Limit, path, "its path is longer than 4095 bytes"));
    }
    let mut depth = 0;
    for name in path.split(|&b| b == b'/') {
        check_name(name).map_err(|why| refuse(Kind::Invalid, path, why))?;
        depth += 1;
    }
    if depth > MAX_DEPTH {
        return Err(refuse(Kind::Limit, path, "it lies deeper than 2048 directories"));
    }
    Ok(())
}

/// What every name in a directory must be.
pub(super) fn check_name(name: &[u8]) -> std::result::Result<(), &'static str> {
    match name {
        b"" => Err("its path has an empty component"),
        b"." | b".." => Err("its path has a component . or .."),
        _ if name.len() > MAX_NAME => Err("its path has a component longer than 255 bytes"),
        _ if name.contains(&0) || name.contains(&b'/') => Err("a name in its path holds a NUL or a slash"),
        _ => Ok(()),
    }
}

pub(super) fn lossy(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

pub(super) fn refuse(kind: Kind, path: &[u8], why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    use std::os::unix::ffi::OsStrExt as _;
    Error::new(kind, "index", crate::error::show(std::ffi::OsStr::from_bytes(path)), why)
}
