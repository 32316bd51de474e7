//! This program again, as another process: which program that is, and how it finds the socket it is spoken to over.
//!
//! Servers are such processes (`daemon`), and those that read archives (`store`).

pub(crate) mod channel;

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Kind, Result};

static DISPATCHES: AtomicBool = AtomicBool::new(false);

/// This program calls [`crate::dispatch`] first of all, so it can be started as one of its own processes.
pub(crate) fn note_that_it_dispatches() {
    DISPATCHES.store(true, Ordering::Relaxed);
}

/// The program to start: this one, if it calls [`crate::dispatch`], else `fsprov` on PATH. [`Kind::Unsupported`] if neither can be had.
pub(crate) fn program(op: &'static str) -> Result<PathBuf> {
    if DISPATCHES.load(Ordering::Relaxed) {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join("fsprov"))
        .find(|p| rustix::fs::access(p, rustix::fs::Access::EXEC_OK).is_ok() && p.is_file())
        .ok_or_else(|| {
            Error::new(Kind::Unsupported, op, "", "this program cannot be started as one, and fsprov is not on PATH")
                .hint("install fsprov, or call fsprov::dispatch() first in main")
        })
}

/// The socket that stdin is, and /dev/null in its place.
pub(crate) fn take_stdin() -> Result<OwnedFd> {
    take_over("stdin", std::io::stdin().as_fd(), |null| rustix::stdio::dup2_stdin(null))
}

/// The same for stdout.
pub(crate) fn take_stdout() -> Result<OwnedFd> {
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
