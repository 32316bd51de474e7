//! A short bounded wait for the next request before a server thread goes to sleep.
//!
//! A cold request costs its two wake-ups, not its work: the caller sleeps until the reply, the server until the request, and
//! on two CPUs each wake-up is an interrupt to a CPU that has gone to sleep (on a virtual machine: out of the guest). One of the
//! two goes away when the server looks for the next request for a while before it sleeps.
//!
//! Of two threads in read(2) the kernel wakes one for each request while the other, which looks, takes it: so a thread that has answered
//! one of a lone caller's requests and finds another thread attending steps aside. What was measured and what was tried:
//! docs/benchmarks.md.
//!
//! So it looks, steps aside, and never pins. What it must not do: burn a CPU that others want, look in vain, or keep a second
//! caller waiting. It gives its CPU away between two looks and stops where someone took it; it looks only after requests that
//! came one upon the other; and nobody is aside any more once a request was found waiting or an answer takes long.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long to look. A caller on another CPU needs 50 us and more to wake up and ask for the next thing (docs/benchmarks.md).
const LOOK: Duration = Duration::from_micros(200);
/// `FSPROV_FUSE_PACE` compares variants: `sleep`, or `look:MICROSECONDS` in place of [`LOOK`]. For measurements alone, and not
/// in the help.
const VARIANT: &str = "FSPROV_FUSE_PACE";
/// Someone else took the CPU for so long between two looks: it is wanted, go to sleep.
const TAKEN: Duration = Duration::from_micros(30);
/// Spin hints between two looks: few, so that a request is seen within a microsecond.
const HINTS: u32 = 8;
/// Requests in a row that came within [`LOOK`] of the answer before, after which looking pays.
const RUN: u32 = 8;
/// Looks in vain after which there is no looking until there is such a run again: what an interactive user costs is a
/// few hundred microseconds for each burst.
const VAIN: u32 = 3;
/// How often an aside thread sees to it that the others keep up.
const TICK: Duration = Duration::from_millis(2);
/// Without a request for so long, no caller is in a run: all threads attend.
const QUIET: Duration = Duration::from_millis(5);
/// All threads attend for so long after a request was found waiting: there are several callers.
const SEVERAL: Duration = Duration::from_millis(20);
/// And for so long after an answer took longer than a tick, as a slow disk's do: what a wake-up costs is nothing beside it.
const SLOW: Duration = Duration::from_millis(200);

/// When to look and when to step aside, for the threads of one session.
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
    /// Threads that wait for a request, in read(2) or looking.
    attending: AtomicI32,
    /// Requests taken, wrapping: whether the others keep up.
    taken: AtomicU32,
    /// No thread steps aside until then, in nanoseconds after `start`.
    all_until: AtomicU64,
    aside: Mutex<()>,
    wanted: Condvar,
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
            attending: AtomicI32::new(0),
            taken: AtomicU32::new(0),
            all_until: AtomicU64::new(0),
            aside: Mutex::new(()),
            wanted: Condvar::new(),
        }
    }
}

impl Pace {
    /// Look at this connection, which so many threads will read; until it is said, threads sleep at once.
    pub fn watch(&self, connection: impl AsFd, threads: usize) -> std::io::Result<()> {
        let connection = connection.as_fd().try_clone_to_owned()?;
        self.attending.store(i32::try_from(threads).unwrap_or(i32::MAX), Ordering::SeqCst);
        // A second call would be for the same connection: there is one in a session.
        let _ = self.connection.set(connection);
        Ok(())
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// A request came to this thread. Counts are not exact between threads, and need not be, but for `attending`.
    pub fn begin(&self) {
        self.attending.fetch_sub(1, Ordering::SeqCst);
        self.taken.fetch_add(1, Ordering::Relaxed);
        if self.now().saturating_sub(self.answered.load(Ordering::Relaxed)) < nanos(self.look) {
            self.run.fetch_add(1, Ordering::Relaxed);
        } else {
            self.run.store(0, Ordering::Relaxed);
        }
    }

    /// The request was answered: come back when there is another one for this thread, or after a while.
    /// `awaited`: the caller sleeps until the answer. Nobody does after close(2), whose caller goes on and may have asked
    /// for the next thing already.
    pub fn end(&self, awaited: bool) {
        let now = self.now();
        self.answered.store(now, Ordering::Relaxed);
        let Some(connection) = self.connection.get() else { return };
        if self.run.load(Ordering::Relaxed) < RUN || now < self.all_until.load(Ordering::Relaxed) {
            self.attending.fetch_add(1, Ordering::SeqCst);
            return;
        }
        // One caller in a run: one thread for it, which is awake when its next request comes.
        if self.attending.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            self.step_aside();
            self.attending.fetch_add(1, Ordering::SeqCst);
            return;
        }
        match look(connection, self.look) {
            Seen::Backlog if awaited => {
                self.vain.store(0, Ordering::Relaxed);
                self.all_for(SEVERAL);
            }
            Seen::Backlog | Seen::Request => self.vain.store(0, Ordering::Relaxed),
            Seen::Nothing if self.vain.fetch_add(1, Ordering::Relaxed) + 1 >= VAIN => {
                self.vain.store(0, Ordering::Relaxed);
                self.run.store(0, Ordering::Relaxed);
            }
            Seen::Nothing => {}
        }
    }

    /// Every thread is to attend for a while.
    fn all_for(&self, time: Duration) {
        self.all_until.store(self.now() + nanos(time), Ordering::Relaxed);
        drop(self.lock());
        self.wanted.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keep this thread out of read(2), where the kernel would wake it for a request that the looking thread is about to take,
    /// until there is more to do than one thread can: told by [`Pace::all_for`], or seen within two ticks.
    fn step_aside(&self) {
        let mut guard = self.lock();
        let mut taken = self.taken.load(Ordering::Relaxed);
        while self.now() >= self.all_until.load(Ordering::Relaxed) {
            guard = self.wanted.wait_timeout(guard, TICK).unwrap_or_else(PoisonError::into_inner).0;
            let before = std::mem::replace(&mut taken, self.taken.load(Ordering::Relaxed));
            if self.attending.load(Ordering::SeqCst) > 0 {
                if self.now().saturating_sub(self.answered.load(Ordering::Relaxed)) > nanos(QUIET) {
                    return;
                }
            } else if before == taken {
                drop(guard);
                return self.all_for(SLOW);
            }
        }
    }
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

/// How long to look: what the environment says, else [`LOOK`].
fn variant(text: Option<&str>) -> Duration {
    let micros = text.and_then(|t| if t == "sleep" { Some(0) } else { t.strip_prefix("look:")?.parse().ok() });
    micros.map_or(LOOK, Duration::from_micros)
}

/// What a look at the connection showed.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// A request was waiting already. Where the last caller sleeps until the answer it is another's: nobody wakes up so fast.
    Backlog,
    /// A request, or an error that the next read will tell.
    Request,
    Nothing,
}

fn look(connection: &OwnedFd, patience: Duration) -> Seen {
    const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
    let begin = Instant::now();
    let mut last = begin;
    loop {
        let mut fds = [PollFd::new(connection, PollFlags::IN)];
        if poll(&mut fds, Some(&NOW)) != Ok(0) {
            return if last == begin { Seen::Backlog } else { Seen::Request };
        }
        // The caller may be running on this core's other half...
        for _ in 0..HINTS {
            std::hint::spin_loop();
        }
        // ... or waiting for this very CPU.
        std::thread::yield_now();
        let now = Instant::now();
        if now - begin > patience || now - last > TAKEN {
            return Seen::Nothing;
        }
        last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(threads: usize) -> (Pace, OwnedFd) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let pace = Pace::default();
        pace.watch(reader, threads).unwrap();
        (pace, writer)
    }

    /// One request, in a run whatever the machine was doing meanwhile.
    fn serve(pace: &Pace) {
        pace.begin();
        pace.run.store(RUN, Ordering::Relaxed);
        pace.end(true);
    }

    #[test]
    fn it_looks_only_after_a_run_and_stops_when_it_was_in_vain() {
        let (pace, writer) = watched(1);
        let state = || (pace.vain.load(Ordering::Relaxed), pace.run.load(Ordering::Relaxed));
        pace.begin();
        pace.end(true);
        assert_eq!(state().0, 0, "no run, no look");
        for n in 1..VAIN {
            serve(&pace);
            assert_eq!(state(), (n, RUN));
        }
        serve(&pace);
        assert_eq!(state(), (0, 0));
        pace.vain.store(1, Ordering::Relaxed);
        rustix::io::write(&writer, b"x").unwrap();
        serve(&pace);
        assert_eq!(state(), (0, RUN));
        assert_eq!(pace.attending.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_thread_steps_aside_while_another_attends_and_comes_back_when_it_is_quiet() {
        let (pace, _writer) = watched(2);
        let begin = Instant::now();
        serve(&pace);
        assert!(begin.elapsed() >= QUIET, "{:?}", begin.elapsed());
        assert_eq!(pace.attending.load(Ordering::Relaxed), 2);
        assert_eq!(pace.vain.load(Ordering::Relaxed), 0, "only the thread that attends looks");
    }

    #[test]
    fn it_comes_back_when_the_attending_one_is_held_up() {
        let (pace, _writer) = watched(2);
        std::thread::scope(|scope| {
            // A request that takes for ever.
            scope.spawn(|| {
                while pace.attending.load(Ordering::Relaxed) != 1 {
                    std::thread::yield_now();
                }
                pace.begin();
            });
            serve(&pace);
        });
        assert_eq!(pace.attending.load(Ordering::Relaxed), 1);
        assert!(pace.all_until.load(Ordering::Relaxed) > 0, "and no thread steps aside for a while");
    }

    #[test]
    fn what_follows_a_close_is_the_same_callers() {
        let (pace, writer) = watched(1);
        rustix::io::write(&writer, b"x").unwrap();
        for (awaited, all) in [(false, false), (true, true)] {
            pace.begin();
            pace.run.store(RUN, Ordering::Relaxed);
            pace.end(awaited);
            assert_eq!(pace.all_until.load(Ordering::Relaxed) > 0, all);
        }
    }

    #[test]
    fn a_waiting_request_calls_all() {
        let (pace, writer) = watched(2);
        rustix::io::write(&writer, b"x").unwrap();
        let begin = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pace.begin();
                pace.begin();
                pace.run.store(RUN, Ordering::Relaxed);
                pace.end(true);
            });
        });
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert!(pace.all_until.load(Ordering::Relaxed) > 0);
        serve(&pace);
        assert_eq!(pace.attending.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_look_is_bounded_and_ends_with_the_connection() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let begin = Instant::now();
        assert_eq!(look(&reader, LOOK), Seen::Nothing);
        assert!(begin.elapsed() < Duration::from_secs(5));
        drop(writer);
        // A child that another test has just forked holds the other end too, until it begins its program.
        let patience = Timespec { tv_sec: 5, tv_nsec: 0 };
        poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(look(&reader, LOOK), Seen::Backlog);
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
        let (pace, _writer) = watched(1);
        pace.run.store(RUN, Ordering::Relaxed);
        std::thread::sleep(LOOK * 2);
        pace.begin();
        assert_eq!(pace.run.load(Ordering::Relaxed), 0);
    }
}
