//! Archives: read, written, unpacked.
//!
//! * `input`, `compression`: an archive where it lies, uncompressed
//! * `stream`, `digest`, `ring`: its bytes, hashed and handed on
//! * `apart`: the processes that meet them, behind walls
//! * `read`, `pax`: entries out of bytes; `unpack`, `whiteout`: entries placed below a directory
//! * `write`: bytes out of a directory

pub(super) mod apart;
pub(crate) mod compression;
pub(super) mod digest;
pub(super) mod input;
pub(super) mod pax;
pub(super) mod read;
mod ring;
pub(super) mod stream;
pub(super) mod unpack;
pub(super) mod whiteout;
pub(super) mod write;

pub(super) use compression::Compression;
