//! The child that reads changes in the user namespace of those who made them: this program again. It gets the job on stdin, enters the namespace, and
//! writes a list or an archive to stdout.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::{Changes, OP};
use crate::child;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::store::Change;
use crate::sys::fs::read_bounded;

/// Hidden verb of the child.
pub(crate) const READER: &str = "__changes";

/// Longest job: a few paths, and maps of ids.
const MAX_JOB_BYTES: u64 = 1 << 20;
/// Longest list: 8 million paths of some 100 bytes.
const MAX_LIST_BYTES: u64 = 1 << 30;

/// What the child is to do.
#[derive(Serialize, Deserialize)]
enum Job {
    List(Changes),
    Layer(Changes),
}

pub(super) fn list(changes: &Changes) -> Result<Vec<Change>> {
    let (mut child, out) = start(&Job::List(changes.clone()))?;
    let read = read_bounded(OP, show(&changes.at.0), out, MAX_LIST_BYTES);
    end(&mut child, changes)?;
    serde_json::from_slice(&read?).map_err(|e| Error::new(Kind::Helper, OP, show(&changes.at.0), e))
}

pub(super) fn write_layer(changes: &Changes, to: &mut dyn Write) -> Result<()> {
    let (mut child, mut out) = start(&Job::Layer(changes.clone()))?;
    let copied = std::io::copy(&mut out, to).map_err(|e| Error::io(OP, show(&changes.at.0), e));
    drop(out);
    end(&mut child, changes)?;
    copied.map(|_| ())
}

fn start(job: &Job) -> Result<(Child, std::process::ChildStdout)> {
    let fail = |e| Error::io("start", READER, e);
    let text = serde_json::to_vec(job).map_err(|e| Error::new(Kind::Io, "write", "job", e))?;
    let mut child = Command::new(child::program(OP)?)
        .arg(READER)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(fail)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let written = stdin.map_or(Ok(()), |mut stdin| stdin.write_all(&text));
    match (written, stdout) {
        (Ok(()), Some(stdout)) => Ok((child, stdout)),
        (written, _) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(fail(written.err().unwrap_or_else(|| std::io::ErrorKind::BrokenPipe.into())))
        }
    }
}

fn end(child: &mut Child, changes: &Changes) -> Result<()> {
    let status = child.wait().map_err(|e| Error::io("wait for", READER, e))?;
    if status.success() {
        return Ok(());
    }
    // It said why.
    Err(Error::new(Kind::Helper, OP, show(&changes.at.0), format!("the process that read them failed ({status})")))
}

/// What the child does. It says itself what is wrong.
pub(crate) fn read_apart() -> Result<()> {
    fault::start();
    let job = read_bounded("read job", "", std::io::stdin().lock(), MAX_JOB_BYTES)?;
    let job: Job = serde_json::from_slice(&job).map_err(|e| Error::new(Kind::Invalid, "read job", "", e))?;
    let (Job::List(changes) | Job::Layer(changes)) = &job;
    enter(changes)?;
    let mut out = std::io::BufWriter::with_capacity(256 << 10, std::io::stdout().lock());
    match &job {
        Job::List(changes) => {
            let listed = changes.list()?;
            serde_json::to_writer(&mut out, &listed).map_err(|e| Error::io("write", "list", e.into()))?;
        }
        Job::Layer(changes) => changes.open()?.write_layer(None, &mut out)?,
    }
    out.flush().map_err(|e| Error::io("write", "changes", e))
}

/// Into the user namespace: its owner has every power in it.
fn enter(changes: &Changes) -> Result<()> {
    let Some(process) = changes.inside else { return Ok(()) };
    let gone = || Error::new(Kind::Busy, OP, show(&changes.at.0), "the rootfs went away meanwhile");
    let path = format!("/proc/{}/ns/user", process.pid);
    let namespace: OwnedFd = std::fs::File::open(&path).map_err(|e| Error::io("open", &path, e))?.into();
    // It was its own when the descriptor was opened.
    if !process.is_alive() {
        return Err(gone());
    }
    move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::User))
        .map_err(|e| Error::sys("enter the user namespace of", process.pid, e))
}
