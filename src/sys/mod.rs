//! System calls, wrapped: take `impl AsFd`, give `OwnedFd`, set close-on-exec. Must not know images, plans or records.

pub mod attrs;
pub mod durable;
pub mod fs;
pub mod holders;
pub mod mount;
pub mod mountinfo;
pub mod overlay;
pub mod process;
pub mod raw;
pub mod remove;
pub mod signals;
pub mod usage;
mod walk;
