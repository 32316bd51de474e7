//! The FUSE side: a tree's answers to the kernel, mounting, and running a session. The only importer of fuser. Must not know
//! the store.

pub mod adapter;
mod answer;
pub mod buffers;
mod convert;
pub mod counters;
mod filesystem;
mod fusermount;
pub mod inflight;
pub mod mount;
pub mod pace;
pub mod poison;
pub mod session;
