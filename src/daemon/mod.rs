//! The FUSE server as a process. Must not know images.
