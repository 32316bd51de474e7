//! Ctrl-C while something is made: it is taken back, and that is said.
//!
//! The work is in the middle of threads and system calls. All that it holds (locks, descriptors, scratch files) ends when this process
//! becomes another program: so it becomes this one again, as `fsprov undo`, which takes away what the rootfs's record says.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;

use super::{Global, output};
use crate::backend::Detach;
use crate::error::{Error, Kind, Result};
use crate::id::ContainerId;
use crate::provisioner::Selector;
use crate::store::Store;
use crate::sys::signals::{Termination, Woken};

/// The exit code of what SIGINT ended, as a shell has it: 128 and the signal's number.
const INTERRUPTED: i32 = 130;

/// While it lives, SIGINT and SIGTERM undo what is being made.
pub(super) struct Undoing(Arc<AtomicBool>);

impl Undoing {
    /// Undo the rootfs `id`, if one is made, and what an import has begun.
    pub(super) fn on_signal(global: &Global, id: Option<&ContainerId>) -> Result<Self> {
        let mut args: Vec<OsString> = vec!["--root".into(), global.paths()?.root().into(), "undo".into()];
        args.extend(id.into_iter().flat_map(|id| ["--id".into(), id.as_str().into()]));
        let is_over = Arc::new(AtomicBool::new(false));
        let (over, signals) = (Arc::clone(&is_over), Termination::catch()?);
        crate::sys::process::start_thread("that waits for signals", move || {
            let came = signals.wait(None).is_ok_and(|woken| woken == Woken::BySignal);
            if !came || over.load(Ordering::Relaxed) {
                return;
            }
            output::note("fsprov: interrupted; taking back what was made so far");
            let error = std::process::Command::new("/proc/self/exe").args(args).exec();
            output::note(&format!("fsprov: {error}; `fsprov recover` takes it back"));
            std::process::exit(INTERRUPTED);
        })?;
        Ok(Undoing(is_over))
    }
}

impl Drop for Undoing {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// While it lives, SIGINT and SIGTERM stop work that asks at every step, and takes back itself what it made.
pub(super) struct Stopping(Termination);

impl Stopping {
    pub(super) fn on_signal() -> Result<Self> {
        Termination::catch().map(Stopping)
    }

    /// An error once a signal came.
    pub(super) fn check(&self) -> Result<()> {
        if self.0.came() { Err(Error::new(Kind::Io, "go on", "", "interrupted")) } else { Ok(()) }
    }

    /// The work has ended: this process does too, if that was stopped.
    pub(super) fn end<T>(self, done: Result<T>) -> Result<T> {
        if done.is_err() && self.check().is_err() {
            output::note("fsprov: interrupted; nothing of it is left");
            std::process::exit(INTERRUPTED);
        }
        done
    }
}

/// `fsprov undo`, hidden.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fsprov undo --id web")]
pub(super) struct Undo {
    /// The rootfs whose making was interrupted
    #[arg(long)]
    id: Option<ContainerId>,
}

impl Undo {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        if let Some(id) = &self.id {
            global.provisioner()?.destroy(&Selector::Id(id.clone()), Detach::Lazy)?;
        }
        Store::open(&global.paths()?)?.clear_staging()?;
        output::note("fsprov: done; nothing of it is left");
        std::process::exit(INTERRUPTED)
    }
}
