//! What no tree has: directories on the way to a volume, and mount points for others. Nothing in it changes.

use super::{DIRECTORY, MADE_UP, tag};
use crate::stubs::Stub;
use crate::tree::{Attr, Caching, Errno, Node, Opened, REGULAR, Result, TYPE_BITS};

pub(super) const SYMLINK: u32 = 0o120_000;

/// A directory, empty file or symbolic link that no tree has.
#[derive(Debug)]
pub(super) struct MadeUp {
    pub(super) parent: Node,
    pub(super) attr: Attr,
    /// Of a symbolic link.
    target: &'static str,
}

impl MadeUp {
    /// The `number`th, in `parent`. Owner and times are those of the image's root: what was made with the image would have had them.
    pub(super) fn new(number: usize, parent: Node, root: Option<Attr>, stub: Stub) -> Self {
        let (mode, target) = match stub {
            Stub::Directory(mode) => (DIRECTORY | mode, ""),
            Stub::File => (REGULAR | 0o644, ""),
            Stub::Symlink(target) => (SYMLINK | 0o777, target),
        };
        let attr = Attr {
            node: tag(MADE_UP, number as u64 + 2),
            mode,
            nlink: if mode & TYPE_BITS == DIRECTORY { 2 } else { 1 },
            uid: root.map_or(0, |r| r.uid),
            gid: root.map_or(0, |r| r.gid),
            rdev: 0,
            size: target.len() as u64,
            blocks: 0,
            blksize: 4096,
            atime: root.map(|r| r.atime).unwrap_or_default(),
            mtime: root.map(|r| r.mtime).unwrap_or_default(),
            ctime: root.map(|r| r.ctime).unwrap_or_default(),
        };
        MadeUp { parent, attr, target }
    }

    pub(super) fn is_directory(&self) -> bool {
        self.attr.mode & TYPE_BITS == DIRECTORY
    }

    pub(super) fn readlink(&self) -> Result<&'static str> {
        if self.attr.mode & TYPE_BITS == SYMLINK { Ok(self.target) } else { Err(Errno::INVAL) }
    }

    pub(super) fn open(&self, flags: i32) -> Result<Opened> {
        if self.is_directory() {
            return Err(Errno::ISDIR);
        }
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return Err(Errno::ROFS);
        }
        Ok(Opened { handle: 0, cache: Caching::Keep, closes_silently: true })
    }
}
