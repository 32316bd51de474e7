//! Requests that end a thread of fuser's: it panics on some before our handler runs (0.18: seconds of a time near `i64::MIN`,
//! src/time.rs), the thread ends in silence, and its request is never answered.
//!
//! So the process ends with an exit code of its own as soon as that happens, and the next one, to which the kernel sends the
//! request again, first gives each request in flight to a file system of nothing: what panics there too is answered EIO and
//! never reaches a session. The others are asked for once more.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{Config, Filesystem, Session, SessionACL};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, socketpair};

use super::adapter::{self, MAX_REQUEST};
use super::session::answer_error;

const TARGET: &str = "fsprov::fuse";
/// How fuser names the threads that answer requests.
const THREAD: &str = "fuser-";
/// What is longer is a write's data, which fuser hands on as it is; a socket takes it only with a larger buffer.
const MAX_TASTED: usize = 64 * 1024;
/// Most requests looked at: as many as a dead server's threads may have had, and more.
const MAX_LOOKED_AT: usize = 256;
/// Length of `struct fuse_in_header` (linux/fuse.h): length, opcode, unique, node, ...
const HEADER: usize = 40;
const UNIQUE_RESEND: u64 = 1 << 63;
/// FUSE_FORGET, FUSE_INTERRUPT, FUSE_BATCH_FORGET: what has no answer, and is not sent again.
const UNANSWERED: [u32; 3] = [2, 36, 42];

static IS_TASTING: AtomicBool = AtomicBool::new(false);

/// End this process with `code` when a thread that answers requests panics outside of our handler, where nothing catches it.
pub fn end_with_a_lost_thread(code: i32) {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let is_fusers = std::thread::current().name().is_some_and(|name| name.starts_with(THREAD));
        if is_fusers && IS_TASTING.load(Ordering::Relaxed) {
            return;
        }
        usual(panic);
        if is_fusers && !adapter::is_answering() {
            log::error!(target: TARGET, "a request ended its thread: {panic}");
            std::process::exit(code);
        }
    }));
}

/// What was read from the connection before the session runs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sieved {
    /// Requests that were answered EIO.
    pub poisoned: usize,
    /// Nodes and how many references the kernel gave back of each: nobody else is told.
    pub forgets: Vec<(u64, u64)>,
}

/// Read what was sent again and answer what would end a thread. All the rest must be asked for again afterwards.
pub fn sieve(connection: &OwnedFd, init: &[u8]) -> Sieved {
    let mut sieved = Sieved::default();
    let mut buffer = vec![0_u8; MAX_REQUEST];
    for _ in 0..MAX_LOOKED_AT {
        let mut fds = [PollFd::new(connection, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(1) {
            break;
        }
        let size = match rustix::io::read(connection, &mut buffer[..]) {
            Ok(size) => size,
            // Another request ended meanwhile.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
            // The session's first read will say it.
            Err(_) => break,
        };
        let request = &buffer[..size];
        let (Some(opcode), Some(unique)) = (u32_at(request, 4), u64_at(request, 8)) else { break };
        if UNANSWERED.contains(&opcode) {
            forgets(request, opcode, &mut sieved.forgets);
            continue;
        }
        if size <= MAX_TASTED && ends_a_thread(request, init) {
            log::error!(target: TARGET, "request {unique:x} of kind {opcode} ends a thread: answered EIO");
            answer_error(connection, unique, Errno::IO);
            sieved.poisoned += 1;
        }
        // What was sent again comes first.
        if unique & UNIQUE_RESEND == 0 {
            break;
        }
    }
    sieved
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn forgets(request: &[u8], opcode: u32, out: &mut Vec<(u64, u64)>) {
    match opcode {
        2 => out.extend(u64_at(request, 16).zip(u64_at(request, HEADER))),
        42 => {
            let count = u32_at(request, HEADER).unwrap_or(0) as usize;
            let one = |n: usize| u64_at(request, HEADER + 8 + 16 * n).zip(u64_at(request, HEADER + 16 + 16 * n));
            out.extend((0..count).map_while(one));
        }
        _ => {}
    }
}

struct Nothing;

impl Filesystem for Nothing {}

/// Does fuser's thread end by a panic when it gets this request? Its answers go nowhere.
fn ends_a_thread(request: &[u8], init: &[u8]) -> bool {
    let tasted = || -> std::io::Result<std::io::Result<()>> {
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::io::write(&near, init)?;
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(1);
        let session = Session::from_fd(Nothing, far, SessionACL::All, config)?;
        rustix::io::write(&near, request)?;
        // What cannot be read any more reads as an empty request, which ends the session with an error. Not closed: the answer to
        // INIT is in there, and closing it unread would be the other end's ECONNRESET before it reads the request.
        rustix::net::shutdown(&near, Shutdown::Write)?;
        Ok(session.run())
    };
    IS_TASTING.store(true, Ordering::Relaxed);
    let result = tasted();
    IS_TASTING.store(false, Ordering::Relaxed);
    match result {
        // How fuser tells of a thread that panicked; an ended session is InvalidData.
        Ok(Err(e)) => e.kind() == std::io::ErrorKind::Other,
        Ok(Ok(())) => false,
        Err(e) => {
            log::warn!(target: TARGET, "try a request: {e}");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0_u8; HEADER];
        bytes[..4].copy_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
        bytes[16..24].copy_from_slice(&5_u64.to_ne_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    /// FUSE_INIT as Linux 6.18 sends it.
    fn init() -> Vec<u8> {
        let mut body = vec![0_u8; 64];
        body[..4].copy_from_slice(&7_u32.to_ne_bytes());
        body[4..8].copy_from_slice(&45_u32.to_ne_bytes());
        request(26, 2, &body)
    }

    /// FUSE_SETATTR of the access time: `struct fuse_setattr_in`, 88 bytes; valid FATTR_ATIME, the seconds at 32.
    fn set_access_time(unique: u64, seconds: i64) -> Vec<u8> {
        let mut body = vec![0_u8; 88];
        body[..4].copy_from_slice(&(1_u32 << 4).to_ne_bytes());
        body[32..40].copy_from_slice(&seconds.to_ne_bytes());
        request(4, unique, &body)
    }

    #[test]
    fn what_ends_a_thread_is_answered_and_all_else_is_left() {
        let (kernel, server) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let again = |unique: u64| UNIQUE_RESEND | unique;
        let poison = again(8);
        for sent in [
            set_access_time(again(6), -5),
            set_access_time(poison, i64::MIN),
            request(2, 0, &3_u64.to_ne_bytes()),
            // A FLUSH.
            request(25, 12, &[0; 24]),
            // Not looked at: it comes after one that was not sent again.
            set_access_time(again(14), i64::MIN),
        ] {
            rustix::io::write(&kernel, &sent).unwrap();
        }
        let sieved = sieve(&server, &init());
        assert_eq!(sieved.forgets, [(5, 3)]);
        // The panic is one of debug builds: without overflow checks the number is taken as it is.
        if cfg!(debug_assertions) {
            assert_eq!(sieved.poisoned, 1);
            let mut answer = [0_u8; 64];
            assert_eq!(rustix::io::read(&kernel, &mut answer[..]), Ok(16));
            assert_eq!(answer[4..8], (-libc::EIO).to_ne_bytes());
            assert_eq!(answer[8..16], poison.to_ne_bytes());
        } else {
            assert_eq!(sieved.poisoned, 0);
        }
    }
}
