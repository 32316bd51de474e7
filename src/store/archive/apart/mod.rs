//! Archives are read by processes apart, behind walls: bytes from a stranger meet no decoder and no parser in the process that has all of
//! its user's power.
//!
//! ```text
//! archive -> this process -> decoder -> this process -> unpacker -> the tree, the index, the manifest
//!            hashes what                 hashes what
//!            lies in the file            is unpacked
//! ```
//!
//! * `decoder`: the decoder has a pipe to read from and a ring of memory to write to, and nothing else; an uncompressed archive needs none
//! * `unpacker`, `work`, `aci`: the unpacker has a ring of memory to read from, and may write below one directory made for it
//! * `walls`: what the two may do
//!
//! A digest is of the very bytes that the unpacker got, and no two streams meet in one unpacker. So it can give its own archive a wrong tree, and
//! no other one: to have another's digest it must be given another's bytes, and those take nobody over.
//!
//! Both are this program again ([`crate::dispatch`]). In a program that does not call that, where there is no `fsprov` on PATH, they are
//! threads without walls.

mod aci;
mod ahead;
mod decoder;
#[cfg(feature = "failpoints")]
mod played;
mod unpacker;
mod walls;
mod work;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitCode, Stdio};

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, kill_process, prlimit, waitid};
use serde::{Deserialize, Serialize};

#[cfg(feature = "containerd")]
pub(crate) use ahead::expect_more;
pub(super) use decoder::decode;
pub(in crate::store) use unpacker::{Place, peek, unpack};
pub(in crate::store) use work::{Task, one_layer};

use crate::child::{self, channel::Channel};
use crate::error::{Error, Kind, Result, SentError};
use crate::fault;
use crate::store::limits::Limits;
use crate::sys::process::not_started;
use walls::Stand;

const OP: &str = "read archive";
const TARGET: &str = "fsprov::store";
/// Hidden verb of both.
const VERB: &str = "__archive";
/// What they keep of the caller's environment: what tests say.
const ENVIRONMENT: [&str; 3] = ["FSPROV_LOG", "FAILPOINTS", "RUST_BACKTRACE"];

/// What one of them is to do; descriptors go with it.
#[derive(Serialize, Deserialize)]
enum Order {
    Decode(decoder::Job),
    Unpack(work::Job),
}

/// The order, and what holds for both.
#[derive(Serialize, Deserialize)]
struct Envelope {
    order: Order,
    memory: u64,
    /// Fault points passed so far: tests count them over all processes of an import.
    passed: Vec<(String, u32)>,
}

/// What was done.
#[derive(Serialize, Deserialize)]
enum Report {
    Decoded,
    Unpacked(work::Unpacked),
    Failed(SentError),
}

/// The report, with what tests and logs want to know.
#[derive(Serialize, Deserialize)]
struct Answer {
    report: Report,
    walls: Option<Stand>,
    passed: Vec<(String, u32)>,
    /// What it tried when it played one that was taken over.
    #[cfg(feature = "failpoints")]
    escapes: Vec<crate::walls::escapes::Attempt>,
}

/// What the unpacker asks at the end of its pipe.
#[derive(Serialize, Deserialize)]
enum End {
    /// It got all.
    Whole,
    /// Reading or decoding failed.
    Cut(SentError),
}

/// Seconds of processor time that one of them may take before anything has come, and bytes for which it gets one more. A decoder or unpacker that
/// works takes less than a tenth of that.
const CPU_SECONDS: u64 = 60;
const BYTES_A_SECOND: u64 = 1 << 20;

/// One of them at work. Dropped, it is ended.
struct Apart {
    channel: Channel,
    process: Option<Child>,
    memory: u64,
}

impl Apart {
    fn start(order: Order, memory: u64, fds: &[BorrowedFd<'_>]) -> Result<Self> {
        let started = ahead::take().map_or_else(spawn, |one| Ok(Some(one)))?;
        let (channel, process) = match started {
            Some((channel, process)) => (channel, Some(process)),
            None => (in_thread()?, None),
        };
        let apart = Apart { channel, process, memory };
        apart.allow_time(0);
        let passed = if apart.process.is_some() { fault::passed() } else { Vec::new() };
        match apart.channel.send(&Envelope { order, memory, passed }, fds) {
            // It ended already: its end says why.
            Err(e) if e.errno() == Some(Errno::PIPE) => Ok(apart),
            other => other.map(|()| apart),
        }
    }

    /// It may take processor time for so many bytes.
    fn allow_time(&self, bytes: u64) {
        let Some(pid) = self.pid() else { return };
        let seconds = cpu_seconds() + bytes / BYTES_A_SECOND;
        let hard = rustix::process::getrlimit(Resource::Cpu).maximum;
        let limit = Rlimit { current: Some(hard.map_or(seconds, |hard| hard.min(seconds))), maximum: hard };
        match prlimit(Some(pid), Resource::Cpu, limit) {
            // Ended: who waits for its report is told.
            Ok(_) | Err(Errno::SRCH) => {}
            Err(e) => log::debug!(target: TARGET, "its processor time is not bounded: {e}"),
        }
    }

    /// Wait for its report.
    fn report(&self) -> Result<Report> {
        let Some((answer, _)) = self.channel.receive::<Answer>()? else { return Err(self.died()) };
        #[cfg(feature = "failpoints")]
        played::tell(&answer);
        let Answer { report, walls, passed, .. } = answer;
        if self.process.is_some() {
            fault::add_passed(&passed);
        }
        if let Some(walls) = walls {
            log::debug!(target: TARGET, "walls around the reader of an archive: {walls:?}");
            walls.complain();
        }
        match report {
            Report::Failed(told) => Err(told.into()),
            done => Ok(done),
        }
    }

    /// Why it ended without one.
    fn died(&self) -> Error {
        let Some(pid) = self.pid() else {
            return Error::new(Kind::Helper, OP, "", "the thread that reads it panicked");
        };
        // Its number stays its own until it is dropped: others may still be raising its limits.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let status = match rustix::io::retry_on_intr(|| waitid(WaitId::Pid(pid), options)) {
            Ok(status) => status,
            Err(e) => return Error::sys("wait for", "the process that reads an archive", e),
        };
        let code = status.as_ref().and_then(rustix::process::WaitIdStatus::exit_status);
        fault::died_with(code);
        let limit = |why: String| Error::new(Kind::Limit, OP, "", why);
        match status.as_ref().and_then(rustix::process::WaitIdStatus::terminating_signal) {
            // Rust's allocator ends so where there is no more; a panic is reported.
            Some(libc::SIGABRT) => limit(format!("the archive needs more than {} MiB to be read", self.memory >> 20))
                .hint("raise what is large in [limits] of the configuration if you trust its maker"),
            Some(libc::SIGXCPU) => limit(format!(
                "the archive needs more processor time than {} s and 1 s for each MiB of it",
                cpu_seconds()
            )),
            Some(libc::SIGKILL) => Error::new(Kind::Helper, OP, "", "the process that reads it was killed")
                .hint("the kernel does that when memory runs out: see its log (dmesg)"),
            Some(signal) => {
                Error::new(Kind::Helper, OP, "", format!("signal {signal} ended the process that reads it"))
            }
            None => {
                let code = code.unwrap_or_default();
                Error::new(Kind::Helper, OP, "", format!("the process that reads it ended with {code} and no word"))
            }
        }
    }

    fn pid(&self) -> Option<Pid> {
        self.process.as_ref().and_then(|child| Pid::from_raw(child.id() as i32))
    }

    /// End it.
    fn end(&self) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        self.end();
        if let Some(child) = self.process.take() {
            ahead::bury(child);
        }
    }
}

/// Start one, which waits for its order. `None`: this program cannot be started again.
fn spawn() -> Result<Option<(Channel, Child)>> {
    let program = match child::program(OP) {
        Ok(program) => program,
        Err(error) => {
            static SAID: std::sync::Once = std::sync::Once::new();
            SAID.call_once(|| {
                log::warn!(target: TARGET, "archives are read in this process, without walls around that: {error}");
            });
            return Ok(None);
        }
    };
    let (channel, theirs) = Channel::pair()?;
    let child = Command::new(&program)
        .arg0("fsprov: archive")
        .arg(VERB)
        .env_clear()
        .envs(ENVIRONMENT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?))))
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        // What somebody who took it over would write must not come to a terminal. Its panics are reported.
        .stderr(if cfg!(feature = "failpoints") { Stdio::inherit() } else { Stdio::null() })
        .spawn()
        .map_err(|e| not_started("start the reader of archives", crate::error::show(&program), e))?;
    Ok(Some((channel, child)))
}

/// The same as a thread, without walls.
fn in_thread() -> Result<Channel> {
    let (channel, theirs) = Channel::pair()?;
    std::thread::Builder::new()
        .name("archive".into())
        .spawn(move || serve(&Channel::from(theirs), Walls::None))
        .map_err(|e| not_started("start thread", "archive", e))?;
    Ok(channel)
}

fn cpu_seconds() -> u64 {
    // A test does not wait for a minute.
    #[cfg(feature = "failpoints")]
    fail::fail_point!("archive.cpu_seconds", |told| told.and_then(|text| text.parse().ok()).unwrap_or(1));
    CPU_SECONDS
}

/// The processes that this verb means.
pub(crate) fn dispatch(verb: &str) -> Option<ExitCode> {
    (verb == VERB).then(main)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Walls {
    Raise,
    None,
}

fn main() -> ExitCode {
    // Before Linux 5.9 what the caller left open without close-on-exec stays open.
    let _ = crate::sys::raw::close_from(3);
    crate::sys::raw::fix_malloc_thresholds();
    #[cfg(feature = "failpoints")]
    let _scenario = {
        let filter = std::env::var("FSPROV_LOG").unwrap_or_default();
        env_logger::Builder::new().parse_filters(&filter).init();
        fail::FailScenario::setup()
    };
    fault::in_reader_of_archives();
    match child::take_stdin() {
        Ok(socket) => {
            serve(&Channel::from(socket), Walls::Raise);
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(channel: &Channel, walls: Walls) {
    let Ok(Some((envelope, fds))) = channel.receive::<Envelope>() else { return };
    fault::pass_before(&envelope.passed);
    let mut stand = None;
    #[cfg(feature = "failpoints")]
    let mut escapes = Vec::new();
    let work = || -> Result<Report> {
        let mut fds = fds;
        if walls == Walls::Raise {
            let raised = match &envelope.order {
                Order::Decode(_) => walls::raise_around_decoder(envelope.memory),
                Order::Unpack(job) => walls::raise_around_unpacker(job, &mut fds, envelope.memory),
            };
            stand = Some(raised?);
        }
        #[cfg(feature = "failpoints")]
        {
            escapes = played::play(&envelope.order);
            if let Some(report) = played::lie(&envelope.order) {
                return Ok(report);
            }
        }
        match envelope.order {
            Order::Decode(job) => decoder::work(&job, fds).map(|()| Report::Decoded),
            Order::Unpack(job) => aci::work(&job, fds, channel).map(Report::Unpacked),
        }
    };
    let done = if walls == Walls::Raise { told_of_panics(work) } else { work() };
    let report = done.unwrap_or_else(|error| Report::Failed(short(&error)));
    let passed = if walls == Walls::Raise { fault::passed() } else { Vec::new() };
    let answer = Answer {
        report,
        walls: stand,
        passed,
        #[cfg(feature = "failpoints")]
        escapes,
    };
    // Nobody may be there any more.
    if channel.send(&answer, &[]).is_ok() {
        // What was said and not heard would take the answer with it when this end is closed (unix(7): ECONNRESET).
        while let Ok(Some(_)) = channel.receive::<End>() {}
    }
}

/// Most bytes of an error's words that another process is told. Quoted in JSON each may take six, and a message has room for 64 KiB; one that
/// does not arrive would be waited for.
const MOST_WORDS: usize = 8 << 10;

/// An error, for another process. One that quotes too much of an archive is cut.
fn short(error: &Error) -> SentError {
    let words = error.to_string();
    if words.len() <= MOST_WORDS {
        return SentError::from(error);
    }
    let end = (0..=MOST_WORDS).rev().find(|at| words.is_char_boundary(*at)).unwrap_or_default();
    SentError::from(&Error::new(error.kind(), OP, "", format!("{}...", &words[..end])))
}

/// A panic of `work` as an error with its words.
fn told_of_panics<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    use std::sync::{Arc, Mutex, PoisonError};
    let said = Arc::new(Mutex::new(String::new()));
    let to = said.clone();
    std::panic::set_hook(Box::new(move |info| {
        *to.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
    }));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let said = said.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(Error::new(Kind::Helper, OP, "", said).hint("this is a fault of fsprov: please report it"))
    })
}

/// The descriptors of an order, one after the other.
struct Handed(std::vec::IntoIter<OwnedFd>);

impl Handed {
    fn next(&mut self) -> Result<OwnedFd> {
        self.0.next().ok_or_else(|| Error::new(Kind::Invalid, OP, "", "descriptors are missing"))
    }

    fn file(&mut self) -> Result<File> {
        self.next().map(File::from)
    }

    fn ring(&mut self) -> Result<super::ring::End> {
        Ok([self.next()?, self.next()?, self.next()?])
    }
}

/// Address space that a process of these limits takes at most, beyond what it starts with: twice what was measured, and what the
/// configuration lets an archive ask for.
fn memory_to_unpack(limits: &Limits) -> u64 {
    let held = limits.extension_bytes + limits.manifest_bytes + limits.xattr_bytes as u64;
    (48 << 20) + 4 * held + 32 * limits.sparse_pieces as u64
}

fn memory_to_decode(limits: &Limits) -> u64 {
    (16 << 20) + limits.decoder_bytes
}

fn borrow(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It did not arrive, and each end waited for the other.
    #[test]
    fn an_error_that_quotes_a_whole_record_arrives() {
        let (one, other) = Channel::pair().unwrap();
        let long = Error::new(Kind::Invalid, "read archive", "\u{1}".repeat(1 << 20), "it has no such key");
        one.send(&Report::Failed(short(&long)), &[]).unwrap();
        let (report, _) = Channel::from(other).receive::<Report>().unwrap().unwrap();
        let Report::Failed(told) = report else { panic!("another report") };
        assert_eq!(Error::from(told).kind(), Kind::Invalid);
        let plain = Error::new(Kind::Limit, "read archive", "a.aci", "it is long").hint("cut it");
        assert_eq!(Error::from(short(&plain)).to_string(), plain.to_string());
    }
}
