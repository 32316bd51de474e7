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
