//! The FUSE side: a tree's answers to the kernel, mounting, and running a session. The only importer of fuser. Must not know
//! the store.

pub mod adapter;
pub mod buffers;
mod fusermount;
pub mod inflight;
pub mod mount;
pub mod pace;
pub mod poison;
pub mod session;
