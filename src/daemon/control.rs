//! The control socket of a server, in its state directory: one question a connection, a line of JSON each way, for the user who
//! runs it and for root.
//!
//! The supervisor answers between two looks at its worker, so it gives a client little time.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, unlinkat};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketFlags, accept_with};
use serde::{Deserialize, Serialize};

use super::{TARGET, names};
use crate::error::{Error, Kind, Result, SentError, show};
use crate::plan::Plan;

/// Longest question: a path at most.
const MAX_QUESTION: usize = 8192;
/// How long a client may take to ask after it connected: it does so at once.
const CLIENT_PATIENCE: Duration = Duration::from_millis(200);
/// How long a client waits: a restart takes as long as building the trees.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Question {
    /// Statistics of worker and supervisor.
    Stats,
    /// Log this much from now on: `off`, `error`, `warn`, `info`, `debug`, `trace`.
    Level(String),
    /// Put a new worker in the old one's place, run from this program.
    Restart(#[serde(with = "crate::pathtext")] PathBuf),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Done(serde_json::Value),
    Failed(SentError),
}

/// Ask the server of a rootfs. [`Kind::NotFound`]: it has none that listens.
///
/// ```no_run
/// use fsprov::daemon::control::{Question, ask};
/// use fsprov::provisioner::{Provisioner, Selector};
/// let paths = fsprov::StatePaths::new("/var/lib/fsprov".into());
/// let provisioner = Provisioner::of_host(paths);
/// let plan = provisioner.inspect(&Selector::parse("web-1".as_ref()))?.record.plan;
/// let stats = ask(&plan, &Question::Stats)?;
/// println!("{stats:#}");
/// ask(&plan, &Question::Level("debug".into()))?;
/// // The worker of another program takes over; nobody who uses the rootfs notices.
/// ask(&plan, &Question::Restart("/usr/bin/fsprov".into()))?;
/// # Ok::<(), fsprov::Error>(())
/// ```
pub fn ask(plan: &Plan, question: &Question) -> Result<serde_json::Value> {
    ask_within(plan, question, ANSWER_PATIENCE)
}

/// [`ask`], of a server that may not answer.
pub fn ask_within(plan: &Plan, question: &Question, patience: Duration) -> Result<serde_json::Value> {
    const OP: &str = "ask the server of";
    let name = || show(&plan.rootfs);
    let fail = |e| Error::io(OP, name(), e);
    let dir = crate::sys::fs::open_path(&plan.state_dir).map_err(|e| Error::sys(OP, name(), e))?;
    let mut stream = UnixStream::connect(socket_path(&dir)).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
            let error = Error::new(Kind::NotFound, OP, name(), "no server listens");
            // Its socket lies in the state directory as long as nobody cleaned up after it.
            if e.kind() == std::io::ErrorKind::ConnectionRefused {
                error.hint("its supervisor has died: unmount and mount it again")
            } else {
                error.hint("only a rootfs of the fuse backend has a server")
            }
        }
        _ => fail(e),
    })?;
    stream.set_read_timeout(Some(patience)).map_err(fail)?;
    let mut line = serde_json::to_vec(question).map_err(|e| Error::new(Kind::Io, OP, name(), e))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(fail)?;
    let mut text = String::new();
    BufReader::new(stream).read_line(&mut text).map_err(fail)?;
    match serde_json::from_str(&text) {
        Ok(Answer::Done(value)) => Ok(value),
        Ok(Answer::Failed(told)) => Err(told.into()),
        Err(e) => Err(Error::new(Kind::Helper, OP, name(), format!("its answer cannot be read: {e}"))),
    }
}

/// Through a descriptor: a socket's path has 107 bytes at most (unix(7)), a state directory's may be longer.
fn socket_path(dir: &OwnedFd) -> PathBuf {
    Path::new(&crate::sys::fs::proc_path(dir)).join(names::CONTROL)
}

/// The server's end.
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    /// Where its name is. `None`: somebody else's affair.
    dir: Option<OwnedFd>,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(dir) = &self.dir else { return };
        match unlinkat(dir, names::CONTROL, AtFlags::empty()) {
            // The directory went with the record.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => log::debug!(target: TARGET, "remove {}: {e}", names::CONTROL),
        }
    }
}

/// A client that asked and waits.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) question: Question,
    stream: OwnedFd,
}

/// What was bound in another process.
impl From<OwnedFd> for Listener {
    fn from(socket: OwnedFd) -> Self {
        Listener { socket, dir: None }
    }
}

impl Listener {
    /// Listen in the directory `dir`, in an earlier server's place; messages call it `state_dir`.
    pub(super) fn bind(dir: OwnedFd, state_dir: &Path) -> Result<Self> {
        const OP: &str = "listen in";
        match unlinkat(&dir, names::CONTROL, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(Error::sys(OP, show(state_dir), e)),
        }
        let bound = UnixListener::bind(socket_path(&dir)).and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        let socket = bound.map_err(|e| Error::io(OP, show(state_dir), e))?;
        Ok(Listener { socket: socket.into(), dir: Some(dir) })
    }

    /// Who asks what. `None`: nobody, or nobody who may, or nothing that can be read.
    pub(super) fn accept(&self) -> Option<Client> {
        let stream = accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()?;
        match hear(&stream) {
            Ok(question) => Some(Client { question, stream }),
            Err(error) => {
                log::warn!(target: TARGET, "{error}");
                reply(&stream, &Answer::Failed(SentError::from(&error)));
                None
            }
        }
    }
}

impl Client {
    pub(super) fn answer(&self, answer: Result<serde_json::Value>) {
        let answer = match answer {
            Ok(value) => Answer::Done(value),
            Err(error) => Answer::Failed(SentError::from(&error)),
        };
        reply(&self.stream, &answer);
    }
}

/// By poll(2), read(2) and write(2) alone: a worker behind its filter does this too.
fn hear(stream: &OwnedFd) -> Result<Question> {
    const OP: &str = "read a question on";
    let fail = |e| Error::sys(OP, names::CONTROL, e);
    let peer = socket_peercred(stream).map_err(fail)?;
    // The directory is closed to others already; a descriptor may have been passed on.
    if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() {
        return Err(Error::new(Kind::Permission, OP, names::CONTROL, format!("user {} may not", peer.uid.as_raw())));
    }
    let mut line = Vec::new();
    let mut piece = [0; 1024];
    while !line.contains(&b'\n') && line.len() < MAX_QUESTION {
        wait_for(stream, PollFlags::IN).map_err(fail)?;
        match rustix::io::read(stream, &mut piece) {
            Ok(0) => break,
            Ok(n) => line.extend_from_slice(&piece[..n]),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(e) => return Err(fail(e)),
        }
    }
    serde_json::from_slice(&line).map_err(|e| Error::new(Kind::Invalid, OP, names::CONTROL, e))
}

/// A client has a short time for each step.
fn wait_for(stream: &OwnedFd, what: PollFlags) -> rustix::io::Result<()> {
    let patience = Timespec { tv_sec: 0, tv_nsec: CLIENT_PATIENCE.subsec_nanos().into() };
    let ready = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(stream, what)], Some(&patience)))?;
    if ready == 0 { Err(Errno::TIMEDOUT) } else { Ok(()) }
}

fn reply(stream: &OwnedFd, answer: &Answer) {
    let Ok(mut text) = serde_json::to_vec(answer) else { return };
    text.push(b'\n');
    let mut rest = &text[..];
    // A client that does not read gets no answer.
    while !rest.is_empty() && wait_for(stream, PollFlags::OUT).is_ok() {
        match rustix::io::write(stream, rest) {
            Ok(n) => rest = &rest[n..],
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ContainerId;

    fn plan(state_dir: PathBuf) -> Plan {
        Plan::new("a".parse::<ContainerId>().unwrap(), "/r".into(), state_dir)
    }

    #[test]
    fn a_question_is_answered_or_refused_and_the_socket_goes_with_the_server() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let state = dir.path().join("x".repeat(120));
        std::fs::create_dir(&state).unwrap();
        let plan = plan(state.clone());
        assert_eq!(ask(&plan, &Question::Stats).unwrap_err().kind(), Kind::NotFound);

        let listener = Listener::bind(crate::sys::fs::open_path(&state).unwrap(), &state).unwrap();
        let answers =
            [Ok(serde_json::json!({"requests": 7})), Err(Error::new(Kind::Busy, "restart", "/r", "no").hint("wait"))];
        let server = std::thread::spawn(move || {
            for answer in answers {
                let client = loop {
                    match listener.accept() {
                        Some(client) => break client,
                        None => std::thread::sleep(Duration::from_millis(5)),
                    }
                };
                client.answer(answer);
            }
            listener
        });
        assert_eq!(ask(&plan, &Question::Stats).unwrap()["requests"], 7);
        let error = ask(&plan, &Question::Restart("/p\u{e9}".into())).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Busy, "restart /r: no; wait"));
        let listener = server.join().unwrap();

        let mut raw = UnixStream::connect(state_link(&state).join(names::CONTROL)).unwrap();
        raw.write_all(b"nonsense\n").unwrap();
        assert!(listener.accept().is_none());
        let mut said = String::new();
        BufReader::new(raw).read_line(&mut said).unwrap();
        assert!(said.starts_with("{\"failed\":"), "{said}");
        drop(listener);
        assert!(!state.join(names::CONTROL).exists());
    }

    /// A short name for a long directory.
    fn state_link(state: &Path) -> PathBuf {
        let link = state.parent().unwrap().join("s");
        std::os::unix::fs::symlink(state, &link).unwrap();
        link
    }
}
