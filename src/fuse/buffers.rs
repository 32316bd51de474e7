//! The memory that requests are read into is there before the first request is read.
//!
//! A server that is killed while the kernel copies a request into a page which it has never touched gets no page any more, and the request
//! ends with EIO (fuse_dev_do_read in fs/fuse/dev.c): it is not one that could be sent again. fuser gives each thread a buffer when the
//! thread begins, and keeps it to itself. So each thread is first sent a write of our own, over the socket that stands for the connection
//! until then: where its bytes lie, there lies the buffer.

use std::os::fd::AsFd;
use std::sync::Barrier;

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

/// What the threads of a session and who starts it agree on.
#[derive(Debug)]
pub struct Buffers {
    threads: usize,
    bytes: usize,
    met: Barrier,
}

impl Buffers {
    /// For so many threads, the first `bytes` of each one's buffer: the longest request.
    pub fn new(threads: usize, bytes: usize) -> Self {
        Buffers { threads, bytes, met: Barrier::new(threads + 1) }
    }

    /// How many threads.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Send each thread its write, and return when all have theirs: they wait.
    pub(super) fn fill(&self, socket: impl AsFd) -> Result<(), Errno> {
        for _ in 0..self.threads {
            rustix::io::write(&socket, &request())?;
        }
        self.met.wait();
        Ok(())
    }

    /// They may go and read.
    pub(super) fn release(&self) {
        self.met.wait();
    }

    /// The handler of such a write. Its answer goes before: to the socket, which is gone afterwards.
    pub(super) fn handle(&self, data: &[u8], reply: ReplyWrite) {
        reply.written(BYTES.len() as u32);
        self.met.wait();
        self.met.wait();
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
