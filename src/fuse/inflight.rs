//! Which requests are being answered, written down for the next server where the kernel cannot send them again (before Linux
//! 6.9): it answers each of them EIO, and who waits for one goes on.
//!
//! A memory file with a number for each thread. A request that was read and not noted when its server was killed is in none:
//! whoever waits for that one waits until the connection is aborted.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::session::answer_error;

/// Threads that have a place.
const PLACES: u64 = 64;

/// The notes of one server.
#[derive(Debug)]
pub struct Notes {
    file: File,
    next: AtomicU64,
}

thread_local! {
    static PLACE: Cell<Option<u64>> = const { Cell::new(None) };
}

impl Notes {
    /// Notes in this memory file.
    pub fn new(file: OwnedFd) -> Self {
        Notes { file: file.into(), next: AtomicU64::new(0) }
    }

    /// This thread answers a request; 0: it has answered.
    pub(super) fn note(&self, unique: u64) {
        let place = PLACE.get().unwrap_or_else(|| {
            let place = self.next.fetch_add(1, Ordering::Relaxed) % PLACES;
            PLACE.set(Some(place));
            place
        });
        // A memory file: it fails only for want of memory, and then the request is as one that was not noted.
        let _ = self.file.write_all_at(&unique.to_ne_bytes(), place * 8);
    }

    /// Answer what the server before was answering. Gives how many that were.
    pub fn fail_all(&self, connection: &OwnedFd) -> usize {
        let mut failed = 0;
        for place in 0..PLACES {
            let mut bytes = [0_u8; 8];
            if self.file.read_exact_at(&mut bytes, place * 8).is_err() {
                break;
            }
            let unique = u64::from_ne_bytes(bytes);
            if unique != 0 && answer_error(connection, unique, Errno::IO) {
                failed += 1;
            }
        }
        if let Err(e) = self.file.set_len(0) {
            log::warn!(target: "fsprov::fuse", "empty the notes of requests: {e}");
        }
        failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_server_answers_what_is_noted_and_no_more() {
        let file = rustix::fs::memfd_create("notes", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let (kernel, server) = rustix::pipe::pipe().unwrap();
        let first = Notes::new(file.try_clone().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| first.note(10));
            scope.spawn(|| {
                first.note(12);
                first.note(0);
            });
        });
        let next = Notes::new(file.try_clone().unwrap());
        assert_eq!(next.fail_all(&server), 1);
        let mut answer = [0_u8; 64];
        assert_eq!(rustix::io::read(&kernel, &mut answer[..]), Ok(16));
        assert_eq!(answer[4..16], [&(-libc::EIO).to_ne_bytes()[..], &10_u64.to_ne_bytes()].concat());
        assert_eq!(next.fail_all(&server), 0);
    }
}
