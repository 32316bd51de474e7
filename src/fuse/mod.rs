//! The FUSE side: mounting, and running a session of fuser. The only importer of fuser. Must not know the store.

pub mod adapter;
mod fusermount;
pub mod mount;
pub mod session;
