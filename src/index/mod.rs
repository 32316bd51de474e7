//! The layer index: the immutable metadata of an image's tree, one file, read in place from a read-only mapping.
//!
//! [`Builder`] takes the entries of one layer or of several (bottom first, merged as they come) and writes the file;
//! [`Index`] maps it and answers. The index holds what an unprivileged import cannot put on disk (owners, setuid, device
//! numbers, xattrs, hard-link groups) beside what it can. Must not know FUSE, the store's layout, or who asks.
//!
//! One time is kept for each inode, its mtime in nanoseconds: atime and ctime are presented as the same. An archive has no
//! other, and the times of the files in the store are those of the import.

mod attributes;
pub mod build;
mod entry;
pub mod format;
mod merge;
mod paged;
pub mod read;
mod rows;
mod scan;
#[cfg(test)]
mod tests;
mod write;

pub use build::Builder;
pub(crate) use build::Step;
pub use entry::{Entry, LayerNumber, Time, What, Whiteouts, Xattr};
pub use read::{Damaged, Index};

/// Longest path in an index: PATH_MAX of Linux less its NUL (limits.h). Content is opened by path below its layer's root.
pub const MAX_PATH: usize = 4095;
/// Longest name: NAME_MAX of Linux.
pub const MAX_NAME: usize = 255;
/// Deepest directory: what [`MAX_PATH`] leaves room for, one byte and a slash each.
pub const MAX_DEPTH: usize = 2048;
/// Longest symlink target: PATH_MAX of Linux less its NUL; symlink(2) takes no longer one.
pub const MAX_TARGET: usize = 4095;
/// Longest xattr name: XATTR_NAME_MAX of Linux.
pub const MAX_XATTR_NAME: usize = 255;
/// Longest xattr value, and the longest list of names: XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
pub const MAX_XATTR_BYTES: usize = 65_536;
/// Mode, owner and group of a directory that no entry speaks of: as tar makes the parents of an entry where they are missing.
pub(crate) const IMPLIED_LOOKS: (u32, u32, u32) = (0o755, 0, 0);
/// Most layers in one image: umoci and docker stop at 127 and overlayfs at 500; the record has 16 bits.
pub const MAX_LAYERS: usize = 4096;
/// Most inodes, and most names, in one index: node ids are 32-bit rows, and 2^28 records are 16 GiB already.
pub const MAX_ROWS: usize = 1 << 28;
