//! How often a worker is started again: at once after a rare death, slower and slower when it dies as soon as it begins, and
//! never without a bound.

use std::time::{Duration, Instant};

/// A worker that served this long did not die of beginning.
const PROVEN: Duration = Duration::from_millis(100);
/// First pause after a worker that died young; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Deaths in a row of workers that were not proven, after which it is hopeless: about five seconds.
const HOPELESS: u32 = 12;
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
    pub(super) fn after_death(&mut self, served: Option<Duration>) -> Next {
        self.after_death_at(served, Instant::now())
    }

    /// A worker lost a thread to a request, which the next one answers by itself: never hopeless, whoever sends such requests must
    /// not take the rootfs away from others; but no more than the allowance.
    pub(super) fn after_a_lost_thread(&mut self) -> Next {
        self.after_death(Some(PROVEN))
    }

    fn after_death_at(&mut self, served: Option<Duration>, now: Instant) -> Next {
        self.total += 1;
        self.allowance = BURST.min(self.allowance + now.saturating_duration_since(self.counted).as_secs_f64());
        self.counted = now;
        if served.is_some_and(|s| s >= PROVEN) {
            self.young_deaths = 0;
        } else {
            self.young_deaths += 1;
        }
        if self.young_deaths >= HOPELESS {
            return Next::GiveUp;
        }
        let mut pause = match self.young_deaths {
            // A single early death is bad luck: two kills in a row.
            0 | 1 => Duration::ZERO,
            n => LONGEST_PAUSE.min(FIRST_PAUSE * 2_u32.pow(n - 2)),
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
            assert_eq!(restarts.after_death_at(Some(Duration::from_secs(1)), now), Next::At(Duration::ZERO));
        }
        let now = start + Duration::from_secs(200);
        let pauses: Vec<_> = (0..HOPELESS).map(|_| restarts.after_death_at(None, now)).collect();
        assert_eq!(pauses[0], Next::At(Duration::ZERO));
        assert_eq!(pauses[1], Next::At(Duration::from_millis(10)));
        assert_eq!(pauses[4], Next::At(Duration::from_millis(80)));
        assert_eq!(pauses[HOPELESS as usize - 2], Next::At(LONGEST_PAUSE));
        assert_eq!(pauses[HOPELESS as usize - 1], Next::GiveUp);
        assert_eq!(restarts.total(), 100 + u64::from(HOPELESS));
    }

    #[test]
    fn frequent_deaths_are_slowed_to_one_a_second() {
        let mut restarts = Restarts::new();
        let now = Instant::now();
        let served = Some(Duration::from_millis(200));
        for _ in 0..BURST as u32 {
            assert_eq!(restarts.after_death_at(served, now), Next::At(Duration::ZERO));
        }
        assert_eq!(restarts.after_death_at(served, now), Next::At(LONGEST_PAUSE));
        let later = now + Duration::from_secs(2);
        assert_eq!(restarts.after_death_at(served, later), Next::At(Duration::ZERO));
    }
}
