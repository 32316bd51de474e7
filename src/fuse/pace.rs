//! A short bounded wait for the next request before a server thread goes to sleep.
//!
//! A cold request costs its two wake-ups, not its work: the caller sleeps until the reply, the server until the request, and
//! on two CPUs each wake-up is an interrupt to a CPU that has gone to sleep (on a virtual machine: out of the guest). One of the
//! two goes away when the server looks for the next request for a while before it sleeps.
//!
//! Measured on 2 virtual CPUs (Linux 6.18, KVM), a first walk + stat of 5,023 files in 839 directories by one caller, as a
//! ratio to the same walk over a warm bind mount; medians of 16 to 19 samples during which others used less than 0.2 CPUs:
//!
//! | server | ratio |
//! | --- | --- |
//! | sleeps at once, 2 threads | 4.0 |
//! | looks for 50 us / 100 us / 200 us, 2 threads | 3.9 / 4.0 / 3.5 |
//! | looks for 200 us, 1 thread | 3.1 |
//! | server and caller pinned to one CPU by hand | 2.4 |
//!
//! And earlier, of one or two such samples each, so no more than hints: pinned to the caller's CPU as sampled from
//! /proc/TID/stat, 5.1 beside 5.4 to 6.4 unpinned, as the scheduler moves the caller to the idle CPU at each reply; pinned
//! so and SCHED_IDLE so that it does not, 2.5, but then anything else that computes starves the server; pinned to
//! different CPUs by hand, 7.3.
//!
//! Later, on a larger tree and with nothing beside it (24,000 files in 3,036 directories: 6,078 requests; 20 samples each, medians):
//! sleeps at once 3.8, looks for 200 us 3.5, looks and keeps all other threads out of read(2) while one caller is alone 3.7 (so
//! that was not kept: as many context switches, 13,000, and no less time for `find` or `tar` four times over). What remains is the
//! kernel's: `find` computes for 0.76 of that time by itself, making inodes and names; each directory is asked for twice, the second
//! time for nothing (getdents(2) must say "no more"); and a sleeping caller's CPU is woken for each answer. The server's own code is 0.02.
//!
//! So it looks, and never pins. What it must not do: burn a CPU that others want, or look in vain. It gives its CPU away
//! between two looks and stops where someone took it; and it looks only after requests that came one upon the other.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long to look. A caller on another CPU needs 50 us and more to wake up and ask for the next thing; see the table.
const LOOK: Duration = Duration::from_micros(200);
/// `FSPROV_FUSE_PACE` compares variants: `sleep`, or `look:MICROSECONDS` in place of [`LOOK`]. For measurements alone, and not
/// in the help.
const VARIANT: &str = "FSPROV_FUSE_PACE";
/// Someone else took the CPU for so long between two looks: it is wanted, go to sleep.
const TAKEN: Duration = Duration::from_micros(30);
/// Requests in a row that came within [`LOOK`] of the answer before, after which looking pays.
const RUN: u32 = 8;
/// Looks in vain after which there is no looking until there is such a run again: what an interactive user costs is a
/// few hundred microseconds for each burst.
const VAIN: u32 = 3;

/// When to look, for the threads of one session.
#[derive(Debug)]
pub struct Pace {
    connection: OnceLock<OwnedFd>,
    look: Duration,
    start: Instant,
    /// When the last answer was given, in nanoseconds after `start`.
    answered: AtomicU64,
    /// Requests in a row that came soon.
    run: AtomicU32,
    vain: AtomicU32,
    /// One thread looks at a time: the others sleep, and wake up for what comes meanwhile.
    looking: AtomicBool,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            connection: OnceLock::new(),
            look: variant(std::env::var(VARIANT).ok().as_deref()),
            start: Instant::now(),
            answered: AtomicU64::new(0),
            run: AtomicU32::new(0),
            vain: AtomicU32::new(0),
            looking: AtomicBool::new(false),
        }
    }
}

impl Pace {
    /// Look at this connection; until it is said, threads sleep at once.
    pub fn watch(&self, connection: impl AsFd) -> std::io::Result<()> {
        // A second call would be for the same connection: there is one in a session.
        let _ = self.connection.set(connection.as_fd().try_clone_to_owned()?);
        Ok(())
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// A request came to this thread. Counts are not exact between threads, and need not be.
    pub fn begin(&self) {
        if self.now().saturating_sub(self.answered.load(Ordering::Relaxed)) < self.look.as_nanos() as u64 {
            self.run.fetch_add(1, Ordering::Relaxed);
        } else {
            self.run.store(0, Ordering::Relaxed);
        }
    }

    /// The request was answered: come back when there is another one, or after a while.
    pub fn end(&self) {
        self.answered.store(self.now(), Ordering::Relaxed);
        let Some(connection) = self.connection.get() else { return };
        if self.run.load(Ordering::Relaxed) < RUN {
            return;
        }
        if self.looking.swap(true, Ordering::Acquire) {
            return;
        }
        if look(connection, self.look) {
            self.vain.store(0, Ordering::Relaxed);
        } else if self.vain.fetch_add(1, Ordering::Relaxed) + 1 >= VAIN {
            self.vain.store(0, Ordering::Relaxed);
            self.run.store(0, Ordering::Relaxed);
        }
        self.looking.store(false, Ordering::Release);
    }
}

/// How long to look: what the environment says, else [`LOOK`].
fn variant(text: Option<&str>) -> Duration {
    let micros = text.and_then(|t| if t == "sleep" { Some(0) } else { t.strip_prefix("look:")?.parse().ok() });
    micros.map_or(LOOK, Duration::from_micros)
}

/// True: there is a request, or an error that the next read will tell.
fn look(connection: &OwnedFd, patience: Duration) -> bool {
    const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
    let begin = Instant::now();
    let mut last = begin;
    loop {
        let mut fds = [PollFd::new(connection, PollFlags::IN)];
        if poll(&mut fds, Some(&NOW)) != Ok(0) {
            return true;
        }
        // The caller may be waiting for this very CPU.
        std::thread::yield_now();
        let now = Instant::now();
        if now - begin > patience || now - last > TAKEN {
            return false;
        }
        last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe().unwrap()
    }

    #[test]
    fn it_looks_only_after_a_run_and_stops_when_it_was_in_vain() {
        let (reader, writer) = connection();
        let pace = Pace::default();
        pace.watch(&reader).unwrap();
        for _ in 0..=RUN {
            pace.begin();
            pace.answered.store(pace.now(), Ordering::Relaxed);
        }
        // Slow machines may break a run: what counts is what end() does with one.
        pace.run.store(RUN, Ordering::Relaxed);
        for n in 1..VAIN {
            pace.end();
            assert_eq!((pace.vain.load(Ordering::Relaxed), pace.run.load(Ordering::Relaxed)), (n, RUN));
        }
        pace.end();
        assert_eq!((pace.vain.load(Ordering::Relaxed), pace.run.load(Ordering::Relaxed)), (0, 0));
        pace.run.store(RUN, Ordering::Relaxed);
        pace.vain.store(1, Ordering::Relaxed);
        rustix::io::write(&writer, b"x").unwrap();
        pace.end();
        assert_eq!((pace.vain.load(Ordering::Relaxed), pace.run.load(Ordering::Relaxed)), (0, RUN));
    }

    #[test]
    fn a_look_is_bounded_and_ends_with_the_connection() {
        let (reader, writer) = connection();
        let begin = Instant::now();
        assert!(!look(&reader, LOOK));
        assert!(begin.elapsed() < Duration::from_secs(5));
        drop(writer);
        assert!(look(&reader, LOOK));
    }

    #[test]
    fn variants_are_read() {
        for (text, want) in [
            (None, LOOK),
            (Some("sleep"), Duration::ZERO),
            (Some("look:250"), Duration::from_micros(250)),
            (Some("fast"), LOOK),
        ] {
            assert_eq!(variant(text), want, "{text:?}");
        }
    }

    #[test]
    fn a_pause_ends_a_run() {
        let pace = Pace::default();
        pace.run.store(RUN, Ordering::Relaxed);
        std::thread::sleep(LOOK * 2);
        pace.begin();
        assert_eq!(pace.run.load(Ordering::Relaxed), 0);
    }
}
