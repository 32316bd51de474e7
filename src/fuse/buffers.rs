//! The memory that requests are read into is there before the first request is read.
//!
//! A server that is killed while the kernel copies a request into a page which it has never touched gets no page any more, and the request
//! ends with EIO (fuse_dev_do_read in fs/fuse/dev.c): it is not one that could be sent again. fuser gives each thread a buffer when the
//! thread begins, and keeps it to itself. So each thread is first sent a write of our own, over the socket that stands for the connection
//! until then: where its bytes lie, there lies the buffer.

use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::ReplyWrite;
use rustix::io::Errno;

use crate::sys::raw;

/// The node of our own writes: no file's (FUSE_ROOT_ID, the lowest, is 1).
pub(super) const NO_NODE: u64 = 0;
/// FUSE_WRITE (linux/fuse.h).
const WRITE: u32 = 16;
/// `struct fuse_in_header` and `struct fuse_write_in`, each 40 bytes.
const HEADERS: usize = 80;
/// What is written: something, so that it has an address.
const BYTES: &[u8; 8] = b"prefault";

/// How often is looked whether the session has ended with threads missing.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What the threads of a session and who starts it agree on.
#[derive(Debug)]
pub struct Buffers {
    threads: usize,
    bytes: usize,
    met: Mutex<Met>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Met {
    waiting: usize,
    may_read: bool,
}

impl Buffers {
    /// For so many threads, the first `bytes` of each one's buffer: the longest request.
    pub fn new(threads: usize, bytes: usize) -> Self {
        Buffers { threads, bytes, met: Mutex::default(), changed: Condvar::new() }
    }

    /// How many threads.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Send each thread its write, and return when all have theirs: they wait. False: before that, `has_ended`.
    pub(super) fn fill(&self, socket: impl AsFd, has_ended: impl Fn() -> bool) -> Result<bool, Errno> {
        for _ in 0..self.threads {
            rustix::io::write(&socket, &request())?;
        }
        let mut met = self.met();
        while met.waiting < self.threads {
            if has_ended() {
                return Ok(false);
            }
            met = self.changed.wait_timeout(met, LOOK_AGAIN).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(true)
    }

    /// They may go and read.
    pub(super) fn release(&self) {
        self.met().may_read = true;
        self.changed.notify_all();
    }

    fn met(&self) -> MutexGuard<'_, Met> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handler of such a write. Its answer goes before: to the socket, which is gone afterwards.
    pub(super) fn handle(&self, data: &[u8], reply: ReplyWrite) {
        reply.written(BYTES.len() as u32);
        let mut met = self.met();
        met.waiting += 1;
        self.changed.notify_all();
        drop(self.changed.wait_while(met, |met| !met.may_read).unwrap_or_else(PoisonError::into_inner));
        // Now, before the first read, and not earlier: the mount need not wait for it. An error is an old kernel's, before Linux 5.14: it
        // cannot send requests again either.
        let _ = raw::populate_around(data, HEADERS, self.bytes);
    }
}

fn request() -> [u8; HEADERS + BYTES.len()] {
    let mut bytes = [0_u8; HEADERS + BYTES.len()];
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..8].copy_from_slice(&WRITE.to_ne_bytes());
    // Its number: any that the kernel would give.
    bytes[8..16].copy_from_slice(&2_u64.to_ne_bytes());
    bytes[16..24].copy_from_slice(&NO_NODE.to_ne_bytes());
    bytes[56..60].copy_from_slice(&(BYTES.len() as u32).to_ne_bytes());
    bytes[HEADERS..].copy_from_slice(BYTES);
    bytes
}
