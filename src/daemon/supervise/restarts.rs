//! How often a worker is started again: at once after a rare death, slower and slower when it dies as soon as it begins, and
//! never without a bound.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::process::Signal;

/// A worker that served this long did not die of beginning.
const PROVEN: Duration = Duration::from_millis(100);
/// First pause after a worker that died young; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Deaths in a row of workers that were not proven, after which it is hopeless: about five seconds.
const HOPELESS: u32 = 12;
/// The same for those that somebody killed (SIGKILL), which says nothing of the next one: on a slow machine each may be killed before it is
/// proven, and where memory is short it may come back. About a minute.
const HOPELESSLY_KILLED: u32 = 250;
/// Longest pause after those: callers wait as long, too.
const LONGEST_KILLED_PAUSE: Duration = Duration::from_millis(100);
/// Restarts at once that are allowed in a row of any kind; each second gives one back. What dies more often is slowed to that,
/// so that a request that kills its worker does not take a whole CPU.
const BURST: f64 = 200.0;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Start another after this pause.
    At(Duration),
    /// It would only die again.
    GiveUp,
}

/// How a worker died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Death {
    /// Of itself.
    Failed,
    /// By SIGKILL.
    Killed,
}

impl Death {
    /// `None`: it lives, and does not do what it should.
    pub(super) fn of(status: Option<ExitStatus>) -> Self {
        if status.and_then(|s| s.signal()) == Some(Signal::KILL.as_raw()) { Death::Killed } else { Death::Failed }
    }
}

/// The deaths so far.
#[derive(Debug)]
pub(super) struct Restarts {
    young_deaths: u32,
    allowance: f64,
    counted: Instant,
    total: u64,
}

impl Restarts {
    pub(super) fn new() -> Self {
        Restarts { young_deaths: 0, allowance: BURST, counted: Instant::now(), total: 0 }
    }

    /// A worker died after it had served this long; `None`: it never did.
    pub(super) fn after_death(&mut self, death: Death, served: Option<Duration>) -> Next {
        self.after_death_at(death, served, Instant::now())
    }

    /// A worker lost a thread to a request, which the next one answers by itself: never hopeless, since a sender of such requests
    /// must not take the rootfs away from others; but no more than the allowance.
    pub(super) fn after_a_lost_thread(&mut self) -> Next {
        self.after_death(Death::Failed, Some(PROVEN))
    }

    fn after_death_at(&mut self, death: Death, served: Option<Duration>, now: Instant) -> Next {
        self.total += 1;
        self.allowance = BURST.min(self.allowance + now.saturating_duration_since(self.counted).as_secs_f64());
        self.counted = now;
        if served.is_some_and(|s| s >= PROVEN) {
            self.young_deaths = 0;
        } else {
            self.young_deaths += 1;
        }
        let (bound, longest) = match death {
            Death::Failed => (HOPELESS, LONGEST_PAUSE),
            Death::Killed => (HOPELESSLY_KILLED, LONGEST_KILLED_PAUSE),
        };
        if self.young_deaths >= bound {
            return Next::GiveUp;
        }
        let mut pause = match self.young_deaths {
            // A single early death is bad luck: two kills in a row.
            0 | 1 => Duration::ZERO,
            n => longest.min(FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(n - 2))),
        };
        if self.allowance < 1.0 {
            pause = LONGEST_PAUSE;
        } else {
            self.allowance -= 1.0;
        }
        Next::At(pause)
    }

    /// Restarts so far.
    pub(super) fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rare_deaths_restart_at_once_and_early_ones_slower_until_hopeless() {
        let mut restarts = Restarts::new();
        let start = Instant::now();
        for n in 0..100 {
            let now = start + Duration::from_secs(n);
            assert_eq!(
                restarts.after_death_at(Death::Failed, Some(Duration::from_secs(1)), now),
                Next::At(Duration::ZERO)
            );
        }
        let now = start + Duration::from_secs(200);
        let pauses: Vec<_> = (0..HOPELESS).map(|_| restarts.after_death_at(Death::Failed, None, now)).collect();
        assert_eq!(pauses[0], Next::At(Duration::ZERO));
        assert_eq!(pauses[1], Next::At(Duration::from_millis(10)));
        assert_eq!(pauses[4], Next::At(Duration::from_millis(80)));
        assert_eq!(pauses[HOPELESS as usize - 2], Next::At(LONGEST_PAUSE));
        assert_eq!(pauses[HOPELESS as usize - 1], Next::GiveUp);
        assert_eq!(restarts.total(), 100 + u64::from(HOPELESS));
    }

    #[test]
    fn a_worker_that_somebody_kills_each_time_before_it_is_proven_is_given_longer() {
        let mut restarts = Restarts::new();
        let now = Instant::now();
        let pauses: Vec<_> =
            (0..HOPELESSLY_KILLED).map(|_| restarts.after_death_at(Death::Killed, None, now)).collect();
        assert!(pauses[HOPELESS as usize..].iter().take(20).all(|next| *next == Next::At(LONGEST_KILLED_PAUSE)));
        assert_eq!(pauses[HOPELESSLY_KILLED as usize - 2], Next::At(LONGEST_PAUSE), "the allowance is used up");
        assert_eq!(pauses.iter().position(|next| *next == Next::GiveUp), Some(HOPELESSLY_KILLED as usize - 1));
        let status = |raw| Some(ExitStatus::from_raw(raw));
        assert_eq!(
            [Death::of(status(9)), Death::of(status(11)), Death::of(status(256)), Death::of(None)],
            [Death::Killed, Death::Failed, Death::Failed, Death::Failed]
        );
    }

    #[test]
    fn frequent_deaths_are_slowed_to_one_a_second() {
        let mut restarts = Restarts::new();
        let now = Instant::now();
        let served = Some(Duration::from_millis(200));
        for _ in 0..BURST as u32 {
            assert_eq!(restarts.after_death_at(Death::Killed, served, now), Next::At(Duration::ZERO));
        }
        assert_eq!(restarts.after_death_at(Death::Killed, served, now), Next::At(LONGEST_PAUSE));
        let later = now + Duration::from_secs(2);
        assert_eq!(restarts.after_death_at(Death::Killed, served, later), Next::At(Duration::ZERO));
    }
}
