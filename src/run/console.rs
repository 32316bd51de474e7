//! The program's terminal, where the runtime hands it over (`--console-socket`): what it shows is copied to stdout, what is typed to it.
//!
//! crun copies too, but writes to its log instead of stdout what it reads after the program's end (1.8.1, `flush_fd_to_err`), and follows no
//! change of the window's size.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{ioctl_fionbio, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use super::{PAUSE, TARGET};
use crate::child::channel::receive_descriptor;
use crate::error::{Error, Result, show};
use crate::sys::fs::proc_path;
use crate::sys::process::{start_thread, timespec};

/// Its socket in the bundle.
pub(super) const SOCKET: &str = "console.sock";

/// How long somebody else may keep the terminal open, and quiet, after the program's end. Without such a one, nothing is waited for.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Most that such a one may write then: what the program wrote before lies in the kernel's buffers (64 KiB, drivers/tty/pty.c).
const MAX_LAST_WORDS: usize = 1 << 20;
const PIECE: usize = 16 << 10;

/// A terminal to come.
#[derive(Debug)]
pub(super) struct Console {
    window: Arc<Window>,
    /// Closed when the runtime has ended.
    going: OwnedFd,
    copied: Receiver<()>,
}

/// Two terminals, one showing the other.
#[derive(Debug)]
pub(super) struct Window {
    /// What this process was given.
    stdin: File,
    stdout: File,
    state: Mutex<State>,
    /// Wakes those who copy: can be read once it is over.
    over: OwnedFd,
}

#[derive(Debug)]
struct State {
    /// The program's terminal, seen from here. It hangs up when nobody has it any more.
    inner: Option<Arc<File>>,
    /// How stdin was before each key was passed on.
    before: Option<Termios>,
    /// `None`: it is over.
    open: Option<OwnedFd>,
}

impl Console {
    /// Wait for the terminal of the runtime that is started next.
    pub(super) fn expect(bundle: &Path, stdin: OwnedFd) -> Result<Self> {
        const OP: &str = "listen in";
        let fail = |e| Error::sys(OP, show(bundle), e);
        // The path may be longer than `sun_path` (unix(7)).
        let dir = open(bundle, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(fail)?;
        let socket = UnixListener::bind(Path::new(&proc_path(&dir)).join(SOCKET));
        let socket = socket.map_err(|e| Error::io(OP, show(bundle), e))?;
        let (end, going) = pipe_with(PipeFlags::CLOEXEC).map_err(fail)?;
        let (over, open) = pipe_with(PipeFlags::CLOEXEC).map_err(fail)?;
        let stdout = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 0).map_err(fail)?;
        let state = Mutex::new(State { inner: None, before: None, open: Some(open) });
        let window = Arc::new(Window { stdin: stdin.into(), stdout: stdout.into(), state, over });
        let (done, copied) = channel();
        let shown = Arc::clone(&window);
        start_thread("that shows the terminal", move || {
            let _done = done;
            // Who reads stdout may have enough (EPIPE).
            if let Err(e) = shown.show(&socket, end) {
                log::info!(target: TARGET, "the program's terminal: {e}");
            }
            shown.close();
        })?;
        Ok(Console { window, going, copied })
    }

    pub(super) fn window(&self) -> Arc<Window> {
        Arc::clone(&self.window)
    }

    /// The runtime has ended: wait until all is shown that the program wrote, unless `is_over`.
    pub(super) fn finish(self, is_over: impl Fn() -> bool) {
        drop(self.going);
        while self.copied.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) && !is_over() {}
        self.window.close();
    }
}

impl Window {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Show this terminal, and pass each key on.
    fn open(&self, inner: OwnedFd) -> Option<Arc<File>> {
        let mut state = self.state();
        state.open.as_ref()?;
        if let Ok(before) = tcgetattr(&self.stdin) {
            let mut raw = before.clone();
            raw.make_raw();
            state.before = set(&self.stdin, &raw).then_some(before);
        }
        let inner = Arc::new(File::from(inner));
        state.inner = Some(Arc::clone(&inner));
        Some(inner)
    }

    /// Let the program's terminal hang up, and leave the other as it was.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.open.take();
        state.inner.take();
        if let Some(before) = state.before.take() {
            set(&self.stdin, &before);
        }
    }

    /// Give the inner terminal the size of the outer one. `false`: nothing has changed.
    pub(super) fn fit(&self) -> bool {
        let inner = self.state().inner.clone();
        let size = size_of(&self.stdin).or_else(|| size_of(&self.stdout));
        let (Some(inner), Some(size)) = (inner, size) else { return false };
        if size_of(&*inner).is_some_and(|have| (have.ws_row, have.ws_col) == (size.ws_row, size.ws_col)) {
            return false;
        }
        tcsetwinsize(&*inner, size).inspect_err(|e| log::debug!(target: TARGET, "set the terminal's size: {e}")).is_ok()
    }

    fn show(self: &Arc<Self>, socket: &UnixListener, end: OwnedFd) -> std::io::Result<()> {
        let waits = |fd: BorrowedFd<'_>| Ok::<_, std::io::Error>(ready([fd, end.as_fd(), self.over.as_fd()], None)?[0]);
        if !waits(socket.as_fd())? {
            return Ok(());
        }
        let (stream, _) = socket.accept()?;
        if !waits(stream.as_fd())? {
            return Ok(());
        }
        let Some(inner) = receive_descriptor(&stream)? else { return Ok(()) };
        // A program that does not read must not keep its terminal from hanging up.
        ioctl_fionbio(&inner, true)?;
        let Some(inner) = self.open(inner) else { return Ok(()) };
        // It may have changed since the bundle was written.
        self.fit();
        let (typed, no_more) = (Arc::clone(self), end.try_clone()?);
        let started = start_thread("that reads the terminal", move || {
            if let Err(e) = typed.type_on(&no_more) {
                log::debug!(target: TARGET, "read the terminal: {e}");
            }
        });
        if let Err(e) = started {
            log::warn!(target: TARGET, "{e}");
        }
        self.copy_from(&inner, end)
    }

    fn copy_from(&self, mut inner: &File, end: OwnedFd) -> std::io::Result<()> {
        let (mut piece, mut end) = ([0; PIECE], Some(end));
        let (mut left, mut patience) = (MAX_LAST_WORDS, LAST_WORDS);
        loop {
            let over = self.over.as_fd();
            let (going, limit) = end.as_ref().map_or((over, Some(patience)), |going| (going.as_fd(), None));
            let begun = Instant::now();
            let [is_over, is_ready, has_ended] = ready([over, inner.as_fd(), going], limit)?;
            if limit.is_some() {
                patience = patience.saturating_sub(begun.elapsed());
            }
            if is_over || limit.is_some() && (!is_ready || left == 0) {
                return Ok(());
            }
            if has_ended {
                end = None;
            }
            if !is_ready {
                continue;
            }
            match inner.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(length) => {
                    if !put(&self.stdout, &piece[..length], &[over])? {
                        return Ok(());
                    }
                    if end.is_none() {
                        left = left.saturating_sub(length);
                    }
                }
                Err(e) if is_passing(&e) => {}
                // Nobody has it open now. Before the program's end, it may be opened again.
                Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                    let Some(going) = &end else { return Ok(()) };
                    ready([over, going.as_fd()], Some(PAUSE))?;
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn type_on(&self, end: &OwnedFd) -> std::io::Result<()> {
        let mut piece = [0; PIECE];
        let (over, end) = (self.over.as_fd(), end.as_fd());
        loop {
            // What is typed after the end is for the shell that comes next.
            let [is_over, has_ended, _] = ready([over, end, self.stdin.as_fd()], None)?;
            if is_over || has_ended {
                return Ok(());
            }
            let length = match (&self.stdin).read(&mut piece) {
                Err(e) if is_passing(&e) => continue,
                Ok(length) if length > 0 => length,
                other => {
                    // The terminal is gone: so is that of the program.
                    if self.state().before.is_some() {
                        self.close();
                    }
                    return other.map(drop);
                }
            };
            let inner = self.state().inner.clone();
            let Some(inner) = inner else { return Ok(()) };
            if !put(&inner, &piece[..length], &[over, end])? {
                return Ok(());
            }
        }
    }
}

/// Is it worth another try?
fn is_passing(e: &std::io::Error) -> bool {
    [ErrorKind::Interrupted, ErrorKind::WouldBlock].contains(&e.kind())
}

/// Wait until one of these can be read, or is closed at its other end: which.
fn ready<const N: usize>(fds: [BorrowedFd<'_>; N], patience: Option<Duration>) -> std::io::Result<[bool; N]> {
    let patience = patience.map(timespec);
    let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    retry_on_intr(|| poll(&mut fds, patience.as_ref()))?;
    Ok(fds.map(|fd| !fd.revents().is_empty()))
}

/// Write it all, also to what does not wait. `false`: one of `ends` came before.
fn put(mut to: &File, mut bytes: &[u8], ends: &[BorrowedFd<'_>]) -> std::io::Result<bool> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(e) if is_passing(&e) => {
                let mut fds: Vec<_> = ends.iter().map(|end| PollFd::from_borrowed_fd(*end, PollFlags::IN)).collect();
                fds.push(PollFd::new(&to, PollFlags::OUT));
                retry_on_intr(|| poll(&mut fds, None))?;
                if fds[..ends.len()].iter().any(|end| !end.revents().is_empty()) {
                    return Ok(false);
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// The size of a terminal. `None`: this is something else, or nobody has said.
pub(super) fn size_of(terminal: impl AsFd) -> Option<Winsize> {
    tcgetwinsize(terminal).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0)
}

/// Set a terminal at once: what was written to it may be stuck. `false`: it cannot be set.
pub(super) fn set(terminal: impl AsFd, to: &Termios) -> bool {
    tcsetattr(terminal, OptionalActions::Now, to)
        .inspect_err(|e| log::debug!(target: TARGET, "set the terminal: {e}"))
        .is_ok()
}
