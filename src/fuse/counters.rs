//! What is counted of requests: how many of each kind, how long they took, how many panicked.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

macro_rules! operations {
    ($($name:ident => $text:literal),+ $(,)?) => {
        /// The kinds of request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        #[allow(missing_docs)]
        pub enum Operation { $($name),+ }

        impl Operation {
            /// Every kind, in the order of its counter.
            pub const ALL: &'static [Operation] = &[$(Operation::$name),+];

            /// Its word in statistics.
            pub fn name(self) -> &'static str {
                match self { $(Operation::$name => $text),+ }
            }
        }
    };
}

operations! {
    Lookup => "lookup", Forget => "forget", GetAttr => "getattr", SetAttr => "setattr", ReadLink => "readlink",
    MkNod => "mknod", MkDir => "mkdir", Unlink => "unlink", RmDir => "rmdir", SymLink => "symlink", Rename => "rename",
    Link => "link", Open => "open", Read => "read", Write => "write", Flush => "flush", Release => "release",
    FSync => "fsync", OpenDir => "opendir", ReadDir => "readdir", ReadDirPlus => "readdirplus",
    ReleaseDir => "releasedir", FSyncDir => "fsyncdir", StatFs => "statfs", SetXattr => "setxattr",
    GetXattr => "getxattr", ListXattr => "listxattr", RemoveXattr => "removexattr", Access => "access",
    Create => "create", FAllocate => "fallocate", LSeek => "lseek", CopyFileRange => "copy_file_range",
    Other => "other",
}

const OPERATIONS: usize = Operation::ALL.len();

/// How many requests came, by kind, and how many of them panicked. Forgets count by node.
#[derive(Debug)]
pub struct Counters {
    by_kind: [AtomicU64; OPERATIONS],
    panics: AtomicU64,
    in_progress: AtomicU64,
    microseconds: AtomicU64,
    latency: [AtomicU64; LATENCIES],
}

/// Classes of latency: below 1 us, 2 us, 4 us, ... and the last one for all above 8 s.
const LATENCIES: usize = 25;

impl Default for Counters {
    fn default() -> Self {
        Counters {
            by_kind: [const { AtomicU64::new(0) }; OPERATIONS],
            panics: AtomicU64::new(0),
            in_progress: AtomicU64::new(0),
            microseconds: AtomicU64::new(0),
            latency: [const { AtomicU64::new(0) }; LATENCIES],
        }
    }
}

impl Counters {
    /// Requests of one kind.
    pub fn of(&self, operation: Operation) -> u64 {
        self.by_kind[operation as usize].load(Ordering::Relaxed)
    }

    /// All requests but forgets, which the kernel sends when it likes.
    pub fn total(&self) -> u64 {
        Operation::ALL.iter().filter(|o| **o != Operation::Forget).map(|&o| self.of(o)).sum()
    }

    /// Requests that ended in a panic, and EIO.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    /// Requests that are being answered now.
    pub fn in_progress(&self) -> u64 {
        self.in_progress.load(Ordering::Relaxed)
    }

    /// What answering all requests took together, in microseconds.
    pub fn microseconds(&self) -> u64 {
        self.microseconds.load(Ordering::Relaxed)
    }

    /// How many requests took how long to answer: the n-th is of those below 2^n microseconds and not below half of that.
    pub fn latencies(&self) -> [u64; LATENCIES] {
        std::array::from_fn(|class| self.latency[class].load(Ordering::Relaxed))
    }

    pub(super) fn panicked(&self) {
        self.panics.fetch_add(1, Ordering::Relaxed);
    }

    /// A request of this kind came, and is being answered.
    pub(super) fn begin(&self, operation: Operation) {
        self.by_kind[operation as usize].fetch_add(1, Ordering::Relaxed);
        self.in_progress.fetch_add(1, Ordering::Relaxed);
    }

    /// It was answered, in this time.
    pub(super) fn end(&self, time: Duration) {
        self.in_progress.fetch_sub(1, Ordering::Relaxed);
        let us = time.as_micros() as u64;
        self.microseconds.fetch_add(us, Ordering::Relaxed);
        let class = (u64::BITS - us.leading_zeros()) as usize;
        self.latency[class.min(LATENCIES - 1)].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_counter() {
        let counters = Counters::default();
        for &operation in Operation::ALL {
            counters.begin(operation);
            counters.end(Duration::from_micros(3));
        }
        assert!(Operation::ALL.iter().all(|&o| counters.of(o) == 1));
        assert_eq!(counters.total(), OPERATIONS as u64 - 1);
        assert_eq!((counters.in_progress(), counters.latencies()[2]), (0, OPERATIONS as u64));
    }
}
