//! FUSE: the only importers of fuser.

pub mod adapter;
