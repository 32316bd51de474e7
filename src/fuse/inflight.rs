//! Which requests a server has read and not answered, for the next one where the kernel cannot send them again (before Linux 6.9): it answers
//! each of them EIO, and who waits for one goes on.
//!
//! A memory file with a word for each thread, mapped: what was stored is there whatever kills the server. A thread that was killed after it
//! read a request and before it wrote its number down is found all the same. The kernel numbers requests in the order in which it hands
//! them out (fuse_get_unique, queue_request_and_unlock in fs/fuse/dev.c of those kernels), so such a request has a number above the highest
//! that was known when the thread went to read, and not much above the highest that is known now. An answer to a number that nobody waits
//! for is ENOENT and harmless: all numbers in between are tried.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;

use super::session::answer_error;
use crate::error::{Error, Result};
use crate::sys::raw::SharedWords;

/// Threads that have a word.
const THREADS: usize = 64;
/// Behind the threads' words: the highest number of a request that is handed out in order (all but forgets), and of any.
const IN_ORDER: usize = THREADS;
const ANY: usize = THREADS + 1;
const WORDS: usize = THREADS + 2;

/// The kernel's numbers are even (FUSE_REQ_ID_STEP); the lowest bit tells the two meanings of a thread's word apart.
const STEP: u64 = 2;
/// Not answering: what the thread reads next, or has read, has a higher number than this word without the bit.
const IDLE: u64 = 1;

/// How many numbers below the highest known one are tried: a thread that has been on its way from reading to writing down for longer than
/// that many requests take is not found. Trying them all takes some 20 ms.
const MOST_BELOW: u64 = 1 << 16;
/// And above it: as many requests may have been read and not written down as there are threads, and callers killed while theirs were queued
/// leave gaps.
const MOST_ABOVE: u64 = 1 << 12;

/// The notes of one server.
#[derive(Debug)]
pub struct Notes {
    words: SharedWords,
    next: AtomicUsize,
}

thread_local! {
    static PLACE: Cell<Option<usize>> = const { Cell::new(None) };
}

impl Notes {
    /// Notes in this memory file, with what the server before noted there.
    pub fn new(file: impl AsFd) -> Result<Self> {
        let words = SharedWords::map(&file, WORDS).map_err(|e| Error::io("map", "the notes of requests", e))?;
        Ok(Notes { words, next: AtomicUsize::new(0) })
    }

    /// So many threads will read. Before they do.
    pub fn start(&self, threads: usize) {
        let known = self.load(IN_ORDER);
        for place in 0..THREADS {
            self.words.at(place).store(if place < threads { known | IDLE } else { 0 }, Ordering::Relaxed);
        }
    }

    /// This thread has read a request of this number. `in_order`: not a forget, which gets its number when it is read.
    pub(super) fn begin(&self, unique: u64, in_order: bool) {
        self.words.at(ANY).fetch_max(unique, Ordering::Relaxed);
        if in_order {
            self.words.at(IN_ORDER).fetch_max(unique, Ordering::Relaxed);
            self.words.at(self.place()).store(unique, Ordering::Relaxed);
        }
    }

    /// It has answered and goes to read.
    pub(super) fn end(&self) {
        self.words.at(self.place()).store(self.load(IN_ORDER) | IDLE, Ordering::Relaxed);
    }

    fn load(&self, word: usize) -> u64 {
        self.words.at(word).load(Ordering::Relaxed)
    }

    fn place(&self) -> usize {
        PLACE.get().unwrap_or_else(|| {
            let place = self.next.fetch_add(1, Ordering::Relaxed) % THREADS;
            PLACE.set(Some(place));
            place
        })
    }

    /// Answer what the server before had read and not answered: nobody may have read from the connection since. Gives how many that were.
    pub fn fail_all(&self, connection: &OwnedFd) -> usize {
        let fail = |unique: &u64| answer_error(connection, *unique, Errno::IO);
        let (idle, answering): (Vec<u64>, Vec<u64>) =
            (0..THREADS).map(|place| self.load(place)).filter(|&word| word != 0).partition(|word| word & IDLE != 0);
        let highest = self.load(ANY);
        let known = idle.iter().map(|word| word & !IDLE).min().unwrap_or(highest);
        let lowest = known.max(highest.saturating_sub(MOST_BELOW * STEP)) + STEP;
        let tried = (lowest..=highest + MOST_ABOVE * STEP).step_by(STEP as usize);
        answering.into_iter().chain(tried).filter(fail).count()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn file() -> OwnedFd {
        rustix::fs::memfd_create("notes", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }

    /// The numbers that are answered: of a connection that takes every answer.
    fn answered(file: &OwnedFd) -> BTreeSet<u64> {
        let taken = file_of_answers();
        Notes::new(file).unwrap().fail_all(&taken);
        let bytes =
            std::fs::read(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&taken.as_fd()))).unwrap();
        let answer = |one: &[u8]| {
            assert_eq!(one[..8], [&16_u32.to_ne_bytes()[..], &(-libc::EIO).to_ne_bytes()].concat());
            u64::from_ne_bytes(one[8..].try_into().unwrap())
        };
        bytes.chunks_exact(16).map(answer).collect()
    }

    fn file_of_answers() -> OwnedFd {
        rustix::fs::memfd_create("answers", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn what_is_noted_and_what_may_have_been_read_is_answered() {
        let file = file();
        let first = Notes::new(&file).unwrap();
        first.start(3);
        std::thread::scope(|scope| {
            // Still answering.
            scope.spawn(|| first.begin(100, true)).join().unwrap();
            // It went to read when 200 was the highest number.
            scope
                .spawn(|| {
                    first.begin(200, true);
                    first.end();
                })
                .join()
                .unwrap();
            scope
                .spawn(|| {
                    first.begin(300, true);
                    first.end();
                    first.begin(308, false);
                })
                .join()
                .unwrap();
        });
        let numbers = answered(&file);
        assert!(numbers.contains(&100) && !numbers.contains(&102) && !numbers.contains(&200));
        let tried: BTreeSet<u64> = (202..=308 + 2 * MOST_ABOVE).step_by(2).collect();
        assert!(numbers.is_superset(&tried) && numbers.len() == tried.len() + 1);

        // The next server's threads read higher numbers than those that are known now, and one that has none yet counts too.
        let next = Notes::new(&file).unwrap();
        next.start(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                next.begin(400, true);
                next.end();
            });
        });
        assert_eq!(answered(&file).first(), Some(&302));
        // All are known to be answering: none below.
        let last = Notes::new(&file).unwrap();
        last.start(1);
        std::thread::scope(|scope| {
            scope.spawn(|| last.begin(500, true));
        });
        assert_eq!(answered(&file).iter().take(2).collect::<Vec<_>>(), [&500, &502]);
    }

    #[test]
    fn not_all_numbers_since_the_beginning_are_tried() {
        let file = file();
        let notes = Notes::new(&file).unwrap();
        notes.start(2);
        let highest = 40_000_000;
        std::thread::scope(|scope| {
            scope.spawn(|| notes.begin(highest, true));
        });
        assert_eq!(answered(&file).first(), Some(&(highest - 2 * MOST_BELOW + 2)));
    }
}
