//! Named steps at which a test makes us fail or die. Without the `failpoints` feature every call is nothing.
//!
//! `FAILPOINTS="store.rename=return(kill)"` kills the process there with SIGKILL; `return(EIO)` (or `ENOSPC`, or an errno's
//! number) makes the step fail with that errno; `return(stop)` stops the process (SIGSTOP) and goes on when it is continued, so that
//! a test can change something at this very step. With `FSPROV_LOG=fsprov::fault=trace` every step passed is logged, which is
//! how a test enumerates them.

use crate::error::{Error, Result};

/// Pass the step `name`, or fail there.
pub fn point(name: &'static str) -> Result<()> {
    #[cfg(feature = "failpoints")]
    {
        log::trace!(target: "fsprov::fault", "{name}");
        of_tests::count(name);
        fail::fail_point!(name, |action| injected(name, action.as_deref().unwrap_or("EIO")));
    }
    let _ = (name, injected as fn(&'static str, &str) -> Result<()>);
    Ok(())
}

/// Read FAILPOINTS: the `fail` crate does so only when told to, and keeps it as long as the scenario lives.
pub fn start() {
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup());
}

fn injected(name: &'static str, action: &str) -> Result<()> {
    let errno = match action {
        #[cfg(feature = "failpoints")]
        "kill" if of_tests::is_reader() => std::process::exit(of_tests::DIED),
        "kill" => {
            let me = rustix::process::getpid();
            // The signal is certain; the loop is what the compiler wants to see after it.
            loop {
                let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
            }
        }
        "stop" => {
            let stopped = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
            return stopped.map_err(|e| Error::sys("stop at fault point", name, e));
        }
        "ENOSPC" => rustix::io::Errno::NOSPC,
        other => other.parse().map_or(rustix::io::Errno::IO, rustix::io::Errno::from_raw_os_error),
    };
    Err(Error::sys("pass fault point", name, errno))
}

/// This process reads an archive for another one, which dies in its stead: behind walls there are no signals.
pub(crate) fn in_reader_of_archives() {
    #[cfg(feature = "failpoints")]
    of_tests::READER.store(true, std::sync::atomic::Ordering::Relaxed);
}

/// A reader of archives ended with this code.
pub(crate) fn died_with(code: Option<i32>) {
    #[cfg(feature = "failpoints")]
    if code == Some(of_tests::DIED) {
        let _ = injected("a step of the reader", "kill");
    }
    let _ = code;
}

/// The steps that this process passed so far, and those whose work it goes on with.
pub(crate) fn passed() -> Vec<(String, u32)> {
    #[cfg(feature = "failpoints")]
    return of_tests::passed();
    #[cfg(not(feature = "failpoints"))]
    Vec::new()
}

/// Begin as one that passed these: the nth passing of a step is the nth in all processes of an import.
pub(crate) fn pass_before(steps: &[(String, u32)]) {
    #[cfg(feature = "failpoints")]
    of_tests::pass(steps);
    let _ = steps;
}

/// These were passed by all up to now.
pub(crate) fn add_passed(steps: &[(String, u32)]) {
    #[cfg(feature = "failpoints")]
    of_tests::pass(&of_tests::beyond(steps));
    let _ = steps;
}

#[cfg(feature = "failpoints")]
mod of_tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Mutex, PoisonError};

    /// Exit code of a reader of archives that a fault kills.
    pub(super) const DIED: i32 = 86;
    pub(super) static READER: AtomicBool = AtomicBool::new(false);
    static PASSED: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

    pub(super) fn is_reader() -> bool {
        READER.load(Ordering::Relaxed)
    }

    fn with<T>(work: impl FnOnce(&mut BTreeMap<String, u32>) -> T) -> T {
        work(&mut PASSED.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn count(name: &str) {
        with(|passed| *passed.entry(name.to_owned()).or_default() += 1);
    }

    pub(super) fn passed() -> Vec<(String, u32)> {
        with(|passed| passed.iter().map(|(name, count)| (name.clone(), *count)).collect())
    }

    /// Of these counts, what goes beyond ours.
    pub(super) fn beyond(steps: &[(String, u32)]) -> Vec<(String, u32)> {
        let mut steps = steps.to_vec();
        with(|passed| {
            for (name, count) in &mut steps {
                *count = count.saturating_sub(passed.get(name).copied().unwrap_or_default());
            }
        });
        steps
    }

    /// Pass each step so many times, whatever is to happen there: it has happened, or was survived.
    pub(super) fn pass(steps: &[(String, u32)]) {
        for (name, count) in steps {
            for _ in 0..*count {
                self::count(name);
                fail::eval(name, |_| ());
            }
        }
    }
}
