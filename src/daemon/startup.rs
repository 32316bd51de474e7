//! The first steps of a server process: it belongs to nobody, and holds nothing it was not given.

use std::ffi::CStr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;

use super::{SUPERVISOR_NAME, TARGET};
use crate::child::{channel::Channel, take_stdin};
use crate::error::{Error, Result};
use crate::sys::process::not_started;
use crate::sys::raw;

/// Become a process of nobody's: no descriptor but the caller's socket and the log, no terminal, not the caller's child.
pub(super) fn detach() -> Result<Channel> {
    const OP: &str = "detach server";
    if let Err(e) = raw::close_from(3) {
        // Before Linux 5.9. What the caller left open without close-on-exec stays open.
        log::debug!(target: TARGET, "close_range: {e}");
    }
    // In this order: the child of a session's leader can never get a terminal by opening one.
    rustix::process::setsid().map_err(|e| Error::sys(OP, "setsid", e))?;
    raw::fork_and_leave().map_err(|e| not_started(OP, "fork", e.into()))?;
    settle(SUPERVISOR_NAME);
    take_stdin().map(Channel::from)
}

/// First steps of a server process.
pub(super) fn settle(name: &CStr) {
    let _ = rustix::thread::set_name(name);
    // Modes of what is made through the mount are the caller's, masked by the caller's umask, not by ours.
    rustix::process::umask(rustix::fs::Mode::empty());
    let _ = std::env::set_current_dir("/");
    // The supervisor needs them too: it keeps files that programs deleted and have open.
    crate::sys::process::raise_open_files();
    // A handler that does nothing: a closing terminal must not end a server, and what it starts gets the default back.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGHUP, std::sync::Arc::new(AtomicBool::new(false)));
}

/// A socket that becomes readable when this process is asked to end.
pub(super) fn catch_signals() -> Result<UnixStream> {
    let caught = || -> std::io::Result<UnixStream> {
        let (wake, told) = UnixStream::pair()?;
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::low_level::pipe::register(signal, told.try_clone()?)?;
        }
        Ok(wake)
    };
    caught().map_err(|e| Error::io("catch signals", "SIGINT, SIGTERM", e))
}
