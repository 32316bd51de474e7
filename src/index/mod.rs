//! The layer index. Must not know fuse.
