//! System calls, wrapped: take `impl AsFd`, give `OwnedFd`, set close-on-exec. Must not know images, plans or records.

pub mod fs;
pub mod mount;
pub mod mountinfo;
pub mod process;
pub mod raw;
mod walk;
