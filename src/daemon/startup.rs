//! The first steps of a server process: it belongs to nobody, and holds nothing it was not given.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;

use super::channel::Channel;
use super::{SUPERVISOR_NAME, TARGET};
use crate::error::{Error, Result};
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
    raw::fork_and_leave().map_err(|e| Error::sys(OP, "fork", e))?;
    settle(SUPERVISOR_NAME);
    take_stdin().map(Channel::from)
}

/// The socket that stdin is, and /dev/null in its place.
pub(super) fn take_stdin() -> Result<OwnedFd> {
    take_over("stdin", std::io::stdin().as_fd(), |null| rustix::stdio::dup2_stdin(null))
}

/// The same for stdout.
pub(super) fn take_stdout() -> Result<OwnedFd> {
    take_over("stdout", std::io::stdout().as_fd(), |null| rustix::stdio::dup2_stdout(null))
}

fn take_over(
    name: &str,
    socket: BorrowedFd<'_>,
    replace: impl FnOnce(&File) -> rustix::io::Result<()>,
) -> Result<OwnedFd> {
    let fail = |e| Error::io("take over the socket at", name, e);
    let socket = socket.try_clone_to_owned().map_err(fail)?;
    let null =
        File::options().read(true).write(true).open("/dev/null").map_err(|e| Error::io("open", "/dev/null", e))?;
    replace(&null).map_err(|e| fail(e.into()))?;
    Ok(socket)
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
