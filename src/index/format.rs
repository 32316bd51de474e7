//! The bytes of an index file. All integers are little-endian; every record is read where it lies.
//!
//! ```text
//! block 0     header, its own CRC in it, zeros up to 4096
//! section 0   inodes       64 bytes each; row 0 is the root, a node id is its row + 1
//! section 1   names        16 bytes each; those of one directory are contiguous and sorted by their bytes
//! section 2   name bytes   in the order of the names
//! section 3   strings      symlink targets, and content paths that differ from the file's own path
//! section 4   xattr sets   16 bytes each, shared by the inodes that have the same; set 0 is empty
//! section 5   xattrs       16 bytes each, sorted by name within a set
//! section 6   xattr bytes  lists as listxattr(2) gives them, and values
//! section 7   digests      SHA-256, 32 bytes each
//! section 8   checksums    the CRC-32 of each 4096-byte block from the end of block 0 to here, 4 bytes each
//! ```
//!
//! Sections begin on a block boundary, so no record straddles two blocks. Opening checks the header, the section bounds and the
//! CRC of section 8, which is a thousandth of the file; a block is checked when it is first touched. So mounting costs
//! the same for ten files and a million, and no answer ever comes from a block that was not checked.
//!
//! The CRC is against damage, not malice: who can write the store can write the files too. A crafted file with good
//! checksums may say wrong things but cannot make a reader crash, loop or read outside the mapping: every offset, row
//! and length is checked at each use.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of every index.
pub const MAGIC: [u8; 8] = *b"fsprovIX";
/// Raised when an older reader would read nonsense. A reader takes exactly its own.
pub const VERSION: u32 = 1;
/// Features that a reader must know to read the file at all: none yet.
pub const KNOWN_INCOMPAT: u64 = 0;
/// The unit of checking, and the alignment of sections: a page of every Linux, so that checking faults in what is used.
pub const BLOCK: usize = 4096;
/// Longest index file: 32-bit offsets into the heaps leave it far below; a header that says more is damaged.
pub const MAX_FILE: u64 = 1 << 40;

/// Where a section lies.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Span {
    /// From the start of the file, a multiple of [`BLOCK`].
    pub offset: U64,
    /// Bytes.
    pub length: U64,
}

/// The sections, as positions in [`Header::sections`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Section {
    /// [`InodeRecord`]s.
    Inodes,
    /// [`NameRecord`]s.
    Names,
    /// Bytes of names.
    NameBytes,
    /// Symlink targets and content paths.
    Strings,
    /// [`XattrSetRecord`]s.
    XattrSets,
    /// [`XattrRecord`]s.
    Xattrs,
    /// Names and values of xattrs.
    XattrBytes,
    /// SHA-256 digests.
    Digests,
    /// CRC-32 of the blocks.
    Checksums,
}

/// How many sections there are.
pub const SECTIONS: usize = 9;

/// Block 0, as far as it is used.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U32,
    /// CRC-32 of block 0 with this field zero.
    pub header_crc: U32,
    /// Features without which the file is misread.
    pub incompat: U64,
    /// Features that a reader may not know.
    pub compat: U64,
    /// Length of the whole file.
    pub file_length: U64,
    /// Sum of the sizes of the regular files.
    pub content_bytes: U64,
    /// Layers that records name.
    pub layers: U32,
    /// CRC-32 of section 8.
    pub checksums_crc: U32,
    /// [`Section`]s.
    pub sections: [Span; SECTIONS],
}

/// What no row and no offset is.
pub const NONE: u32 = u32::MAX;

/// One inode.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InodeRecord {
    /// Seconds of the last change.
    pub mtime_secs: I64,
    /// Bytes of a file or a symlink's target.
    pub size: U64,
    /// Type and permissions, as st_mode.
    pub mode: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Names of it; a directory has two and one for each subdirectory.
    pub nlink: U32,
    /// Nanoseconds of the last change.
    pub mtime_nanos: U32,
    /// A device's number; a regular file's position in the digests plus 1, or 0.
    pub rdev_or_digest: U32,
    /// Row of its xattr set.
    pub xattrs: U32,
    /// Row of the directory that its first name lies in; the root: itself.
    pub parent: U32,
    /// Its first name; the root: [`NONE`].
    pub name: U32,
    /// The layer that its content lies in.
    pub layer: U16,
    /// [`IMPLIED`] or 0; indexes of before have 0.
    pub flags: U16,
    /// Directory: its first name. Symlink: target's offset in the strings. File: content path's, where it has one of its own.
    pub first: U32,
    /// Directory: how many names. Symlink: target's length. File: content path's length, 0 for the file's own path.
    pub count: U32,
}

/// A directory that no entry of its archive speaks of: merged, it leaves a lower layer's attributes as they are.
pub const IMPLIED: u16 = 1;

/// One name in a directory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct NameRecord {
    /// The first bytes of the name, zeros after its end: most comparisons of a search need no more.
    pub prefix: [u8; 4],
    /// Offset in the name bytes.
    pub offset: U32,
    /// Row of the inode.
    pub inode: U32,
    /// Length, 1 to 255.
    pub length: u8,
    /// The inode's type: `mode >> 12`, which is what d_type has.
    pub kind: u8,
    /// Zero.
    pub reserved: U16,
}

/// The xattrs of the inodes that have just these.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrSetRecord {
    /// Offset of the list: each name and a NUL.
    pub list: U32,
    /// Its length.
    pub list_length: U32,
    /// First of its xattrs.
    pub first: U32,
    /// How many.
    pub count: U32,
}

/// One extended attribute.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrRecord {
    /// Offset of the name in the xattr bytes.
    pub name: U32,
    /// Its length.
    pub name_length: U32,
    /// Offset of the value.
    pub value: U32,
    /// Its length.
    pub value_length: U32,
}

const _: () = {
    assert!(size_of::<Header>() <= BLOCK);
    // Powers of two, so that they divide a block: none may straddle two.
    assert!(size_of::<InodeRecord>() == 64 && size_of::<NameRecord>() == 16);
    assert!(size_of::<XattrSetRecord>() == 16 && size_of::<XattrRecord>() == 16);
};

/// The type bits of st_mode.
pub const S_IFMT: u32 = 0o170_000;
/// Directory.
pub const S_IFDIR: u32 = 0o040_000;
/// Regular file.
pub const S_IFREG: u32 = 0o100_000;
/// Symbolic link.
pub const S_IFLNK: u32 = 0o120_000;
/// FIFO.
pub const S_IFIFO: u32 = 0o010_000;
/// Socket.
pub const S_IFSOCK: u32 = 0o140_000;
/// Character device.
pub const S_IFCHR: u32 = 0o020_000;
/// Block device.
pub const S_IFBLK: u32 = 0o060_000;

/// The first bytes of a name, as [`NameRecord::prefix`] has them. Their order is that of the names, where they differ.
pub fn prefix(name: &[u8]) -> [u8; 4] {
    let mut prefix = [0; 4];
    let length = name.len().min(4);
    prefix[..length].copy_from_slice(&name[..length]);
    prefix
}

/// The CRC of block 0.
pub(super) fn header_crc(block: &[u8]) -> u32 {
    let at = std::mem::offset_of!(Header, header_crc);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&block[..at]);
    crc.update(&[0; 4]);
    crc.update(&block[at + 4..]);
    crc.finalize()
}
