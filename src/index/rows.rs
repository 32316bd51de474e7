//! The records of a tree in the making: fixed sizes, so that those that do not fit into memory lie in a file.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::entry::{LayerNumber, Time};
use super::format::{NONE, S_IFDIR, S_IFREG};

pub(super) type Row = u32;
pub(super) const ROOT_ROW: Row = 0;

/// An inode in the making. 64 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Node {
    pub(super) mtime_secs: i64,
    /// File: its bytes. Symlink: where its target lies in the strings. Device: its number.
    pub(super) size: u64,
    /// File: where its content path lies in the strings, if `length` is not 0.
    pub(super) content: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime_nanos: u32,
    /// Row of the xattr set, 0 for none.
    pub(super) xattrs: u32,
    /// Directory: the last of its names, from which the others are reached. File: a name that its layer has it by on the disk.
    pub(super) first: u32,
    /// Directory: the name that it has.
    pub(super) home: u32,
    /// File: position of its digest plus 1, 0 for none.
    pub(super) digest: u32,
    /// Its row in the file, once that is being laid out.
    pub(super) out: u32,
    pub(super) mode: u16,
    /// The layer its content lies in.
    pub(super) layer: LayerNumber,
    /// Bytes of the content path or target.
    pub(super) length: u16,
    /// As in st_mode, shifted by 12.
    pub(super) kind: u8,
    pub(super) is_implied: u8,
}

impl Node {
    pub(super) fn is_directory(&self) -> bool {
        self.kind == DIRECTORY
    }

    /// Does no entry speak of this directory?
    pub(super) fn is_implied(&self) -> bool {
        self.is_implied != 0
    }

    pub(super) fn mtime(&self) -> Time {
        Time { secs: self.mtime_secs, nanos: self.mtime_nanos }
    }

    /// What a directory gets that no entry speaks of.
    pub(super) fn imply(&mut self) {
        let (mode, uid, gid) = super::IMPLIED_LOOKS;
        (self.mode, self.uid, self.gid, self.xattrs) = (mode as u16, uid, gid, 0);
        (self.mtime_secs, self.mtime_nanos, self.is_implied) = (0, 0, 1);
    }

    pub(super) fn new(kind: u32, layer: LayerNumber) -> Self {
        let mut node = Node {
            mtime_secs: 0,
            size: 0,
            content: 0,
            uid: 0,
            gid: 0,
            mtime_nanos: 0,
            xattrs: 0,
            first: NONE,
            home: NONE,
            digest: 0,
            out: NONE,
            mode: 0,
            layer,
            length: 0,
            kind: (kind >> 12) as u8,
            is_implied: 0,
        };
        node.imply();
        node
    }
}

const DIRECTORY: u8 = (S_IFDIR >> 12) as u8;
pub(super) const FILE: u8 = (S_IFREG >> 12) as u8;

/// A name in a directory. Once made it stays, live or not: what it was called is asked for after it was hidden.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct NameRow {
    pub(super) parent: Row,
    pub(super) inode: Row,
    /// Another name of the directory, [`NONE`] at the end.
    pub(super) next: u32,
    /// Where its bytes lie.
    pub(super) at: u32,
    pub(super) hash: u32,
    /// The layer that put this name here.
    pub(super) layer: LayerNumber,
    pub(super) length: u8,
    pub(super) flags: u8,
}

pub(super) const LIVE: u8 = 1;
/// Listed in a whitelist.
const KEPT: u8 = 2;
pub(super) const IS_DIRECTORY: u8 = 4;
pub(super) const IS_WHITEOUT: u8 = 8;

impl NameRow {
    pub(super) fn is_live(&self) -> bool {
        self.flags & LIVE != 0
    }

    pub(super) fn is_directory(&self) -> bool {
        self.flags & IS_DIRECTORY != 0
    }

    pub(super) fn is_whiteout(&self) -> bool {
        self.flags & IS_WHITEOUT != 0
    }

    pub(super) fn kill(&mut self) {
        self.flags &= !LIVE;
    }

    /// Note that it is listed. Gives whether it was.
    pub(super) fn keep(&mut self, keep: bool) -> bool {
        let was = self.flags & KEPT != 0;
        self.flags = self.flags & !KEPT | if keep { KEPT } else { 0 };
        was
    }
}

/// A whiteout of the layer at hand: its directory, and the name that it hides (none: all).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Hidden {
    pub(super) directory: Row,
    pub(super) length: u32,
    pub(super) at: u64,
}

/// Where an xattr set lies: its count, then for each the lengths of name and value, and their bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SetRow {
    pub(super) at: u64,
    pub(super) length: u64,
}
