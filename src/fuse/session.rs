//! Running a fuser session on a connection that somebody else holds, the first time and again after a crash.
//!
//! The kernel sends INIT once. The process that mounted reads it and keeps it; every server gets it replayed over a socket pair, because
//! `Session::from_fd` insists on one, and the real connection is put in the socket's place before a request is read. Tried with
//! fuser 0.18 on Linux 6.18.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::thread::JoinHandle;

use fuser::{Config, Filesystem, Session, SessionACL};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::buffers::Buffers;
use crate::error::{Error, Kind, Result};
use crate::sys::process::not_started;
use crate::sys::raw;

const TARGET: &str = "fsprov::fuse";
/// Smallest buffer a read of /dev/fuse takes (FUSE_MIN_READ_BUFFER, linux/fuse.h).
pub const MIN_READ_BUFFER: usize = 8192;
/// The kernel queues INIT within mount(2); this is for a machine that is very busy.
const INIT_PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// FUSE_NOTIFY_RESEND (linux/fuse.h, Linux 6.9): requests that were read and not answered are queued again.
const NOTIFY_RESEND: i32 = 7;
/// Offsets of flags and of flags2 in an INIT request: a 40-byte header, then `struct fuse_init_in` (linux/fuse.h).
const INIT_FLAGS: [usize; 2] = [40 + 12, 40 + 16];
/// Flags says that there is flags2 (linux/fuse.h).
const INIT_EXT: u32 = 1 << 30;
/// In flags2: the kernel knows FUSE_NOTIFY_RESEND.
const HAS_RESEND: u32 = 1 << 7;
/// Offset and length of flags and of flags2 in an INIT reply: a 16-byte header, then `struct fuse_init_out` (linux/fuse.h).
const REPLY_FLAGS: [std::ops::Range<usize>; 2] = [16 + 12..16 + 16, 16 + 32..16 + 36];

/// The kernel's INIT request, read from a connection just mounted.
pub fn read_init(connection: impl AsFd) -> Result<Vec<u8>> {
    const OP: &str = "read INIT from";
    let fail = |e: Errno| Error::sys(OP, "/dev/fuse", e);
    let mut fds = [PollFd::new(&connection, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&INIT_PATIENCE))).map_err(fail)?;
    if ready == 0 {
        return Err(Error::new(Kind::Io, OP, "/dev/fuse", "the kernel sent none"));
    }
    let mut buffer = vec![0_u8; MIN_READ_BUFFER];
    let size = rustix::io::retry_on_intr(|| rustix::io::read(&connection, &mut buffer[..])).map_err(fail)?;
    buffer.truncate(size);
    Ok(buffer)
}

/// Does the connection know its server already?
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// The kernel waits for the answer to INIT.
    First,
    /// An earlier server gave this answer to INIT. It holds: what was agreed cannot be changed.
    Again {
        /// That answer.
        reply: &'a [u8],
        /// Ask for the requests that the earlier server had read and not answered.
        resend: Resend,
    },
}

/// Requests that died with an earlier server: ask for them again?
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resend {
    /// Yes, where the kernel can (6.9).
    Ask,
    /// No: as on an older kernel. For tests.
    Never,
    /// No, and not even which they were is known: as when a worker dies between reading a request and noting it. For tests.
    Lose,
}

impl Resend {
    /// What FSPROV_FUSE_RESEND says: for tests alone, and not in the help.
    pub fn from_env() -> Self {
        match std::env::var("FSPROV_FUSE_RESEND").as_deref() {
            Ok("never") => Resend::Never,
            Ok("lose") => Resend::Lose,
            _ => Resend::Ask,
        }
    }

    /// Can requests in flight be asked for again on the connection that this INIT came from?
    pub fn works(self, init: &[u8]) -> bool {
        let flags =
            INIT_FLAGS.map(|at| init.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes));
        self == Resend::Ask && flags[0] & INIT_EXT != 0 && flags[1] & HAS_RESEND != 0
    }
}

/// What became of requests that died with an earlier server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InFlight {
    /// There were none, or they are queued again.
    Safe,
    /// The kernel cannot send them again. So many were answered EIO; one that was not noted yet waits until the connection is
    /// aborted.
    Failed(usize),
}

/// A session whose threads answer requests.
#[derive(Debug)]
pub struct Running {
    threads: JoinHandle<std::io::Result<()>>,
    notifier: fuser::Notifier,
    /// The answer to INIT.
    pub reply: Vec<u8>,
    /// What became of requests in flight.
    pub in_flight: InFlight,
}

/// Start a session of `filesystem` on `connection`, with as many threads as `buffers` is for. The file system's `write` leaves what is for
/// `NO_NODE` to them.
pub fn start<F: Filesystem + Send + 'static>(
    filesystem: F,
    connection: &OwnedFd,
    init: &[u8],
    start: Start<'_>,
    buffers: &Buffers,
) -> Result<Running> {
    const OP: &str = "start a FUSE session";
    let fail = |e: Errno| Error::sys(OP, "", e);
    let (near, far) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(fail)?;
    rustix::io::write(&near, init).map_err(fail)?;
    let mut config = Config::default();
    // The kernel decides who enters (allow_other, default_permissions); fuser's own check would come on top.
    config.acl = SessionACL::All;
    config.n_threads = Some(buffers.threads());
    let session = Session::from_fd(filesystem, far, SessionACL::All, config)
        .map_err(|e| Error::io(OP, "the answer to INIT", e))?;
    let mut reply = vec![0_u8; MIN_READ_BUFFER];
    let size = rustix::io::readv(&near, &mut [IoSliceMut::new(&mut reply)]).map_err(fail)?;
    reply.truncate(size);

    if let Start::Again { reply: agreed, .. } = start
        && !same_agreement(agreed, &reply)
    {
        return Err(Error::new(
            Kind::Unsupported,
            OP,
            "",
            "this version asks the kernel for other capabilities than the one that mounted",
        )
        .hint("unmount and mount again"));
    }
    let (number, notifier) = (session.as_fd().as_raw_fd(), session.notifier());
    let threads = std::thread::Builder::new()
        .name("fsprov-session".into())
        .spawn(move || session.run())
        .map_err(|e| not_started("start thread", "session", e))?;
    match buffers.fill(&near, || threads.is_finished()) {
        Ok(true) => {}
        Err(e) if e != Errno::PIPE => return Err(fail(e)),
        // It could not start them all, and is gone.
        _ => {
            let why = threads.join().ok().and_then(std::io::Result::err);
            return Err(not_started(OP, "", why.unwrap_or_else(|| std::io::Error::other("its threads ended"))));
        }
    }
    // All wait, and none reads: from here on the session's descriptor means the connection; what fuser has of it is the number alone.
    raw::dup_over(connection, number).map_err(fail)?;
    let in_flight = match start {
        Start::First => {
            rustix::io::writev(connection, &[IoSlice::new(&reply)]).map_err(|e| Error::sys(OP, "answer INIT", e))?;
            InFlight::Safe
        }
        Start::Again { resend, .. } if resend.works(init) => ask_again(connection)?,
        Start::Again { .. } => InFlight::Failed(0),
    };
    buffers.release();
    Ok(Running { threads, notifier, reply, in_flight })
}

fn same_agreement(one: &[u8], other: &[u8]) -> bool {
    REPLY_FLAGS.iter().all(|range| one.get(range.clone()) == other.get(range.clone()))
}

/// Have requests that were read and not answered queued again.
pub fn ask_again(connection: &OwnedFd) -> Result<InFlight> {
    // struct fuse_out_header: length, error (here the notification's code), unique 0.
    let mut message = [0_u8; 16];
    message[..4].copy_from_slice(&16_u32.to_ne_bytes());
    message[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    match rustix::io::write(connection, &message) {
        // A kernel that does not know the code.
        Err(Errno::INVAL) => Ok(InFlight::Failed(0)),
        // The errors: unmounted or aborted meanwhile, as the session's first read says.
        Ok(_) | Err(Errno::NODEV | Errno::PERM | Errno::NOTCONN | Errno::CONNABORTED) => Ok(InFlight::Safe),
        Err(e) => Err(Error::sys("ask for requests in flight again", "/dev/fuse", e)),
    }
}

/// Answer a request with an error, by its number. False: nobody waits for it (any more).
pub(super) fn answer_error(connection: &OwnedFd, unique: u64, errno: Errno) -> bool {
    let mut message = [0_u8; 16];
    message[..4].copy_from_slice(&16_u32.to_ne_bytes());
    message[4..8].copy_from_slice(&(-errno.raw_os_error()).to_ne_bytes());
    message[8..].copy_from_slice(&unique.to_ne_bytes());
    rustix::io::write(connection, &message).is_ok()
}

impl Running {
    /// A handle for notifications to the kernel.
    pub fn notifier(&self) -> fuser::Notifier {
        self.notifier.clone()
    }

    /// Wait until the file system is unmounted or its connection aborted. An error: it still stands, and nobody answers.
    pub fn wait(self) -> Result<()> {
        match self.threads.join().unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked"))) {
            // ECONNABORTED is how an aborted connection shows where the kernel was asked to tell it apart (FUSE_ABORT_ERROR).
            Err(e) if e.raw_os_error() != Some(libc::ECONNABORTED) => Err(Error::io("serve", "FUSE requests", e)),
            other => {
                log::debug!(target: TARGET, "the session ended: {other:?}");
                Ok(())
            }
        }
    }
}

/// Is a request queued?
pub fn is_queued(connection: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
}

/// How many requests the kernel waits for on the connection of this device minor: queued, being answered, or lost
/// (fusectl, Documentation/filesystems/fuse.rst).
pub fn waiting(minor: u32) -> Option<u64> {
    std::fs::read_to_string(format!("/sys/fs/fuse/connections/{minor}/waiting")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use fuser::{FileHandle, INodeNo, LockOwner, OpenFlags, ReplyWrite, Request, WriteFlags};

    use super::super::buffers::NO_NODE;
    use super::*;

    #[derive(Debug)]
    struct Empty(Arc<Buffers>);
    impl Filesystem for Empty {
        fn write(
            &self,
            _: &Request,
            node: INodeNo,
            _: FileHandle,
            _: u64,
            data: &[u8],
            _: WriteFlags,
            _: OpenFlags,
            _: Option<LockOwner>,
            reply: ReplyWrite,
        ) {
            assert_eq!(node.0, NO_NODE);
            let before = not_there(data);
            self.0.handle(data, reply);
            if before > 0 && not_there(data) == 0 {
                MADE.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn start_empty(connection: &OwnedFd, init: &[u8], start: Start<'_>) -> Result<Running> {
        let buffers = Arc::new(Buffers::new(2, LONGEST));
        super::start(Empty(Arc::clone(&buffers)), connection, init, start, &buffers)
    }

    const LONGEST: usize = 100 << 10;
    static MADE: AtomicUsize = AtomicUsize::new(0);

    /// Pages of the longest request that begins before this data which a read of it would find missing: bit 63 of their words in pagemap
    /// (Documentation/admin-guide/mm/pagemap.rst).
    fn not_there(data: &[u8]) -> usize {
        let pages = data.as_ptr().addr() / 4096..(data.as_ptr().addr() + LONGEST - 80).div_ceil(4096);
        let file = std::fs::File::open("/proc/self/pagemap").unwrap();
        pages
            .filter(|page| {
                let mut word = [0_u8; 8];
                std::os::unix::fs::FileExt::read_exact_at(&file, &mut word, *page as u64 * 8).unwrap();
                u64::from_ne_bytes(word) >> 63 == 0
            })
            .count()
    }

    /// FUSE_INIT as Linux 6.18 sends it: 40 bytes of header, then 64 of `struct fuse_init_in`.
    fn init_request(flags: u32) -> Vec<u8> {
        let mut bytes = vec![0_u8; 104];
        bytes[0..4].copy_from_slice(&104_u32.to_ne_bytes());
        bytes[4..8].copy_from_slice(&26_u32.to_ne_bytes());
        bytes[8..16].copy_from_slice(&2_u64.to_ne_bytes());
        bytes[40..44].copy_from_slice(&7_u32.to_ne_bytes());
        bytes[44..48].copy_from_slice(&45_u32.to_ne_bytes());
        bytes[48..52].copy_from_slice(&(128 * 1024_u32).to_ne_bytes());
        bytes[52..56].copy_from_slice(&flags.to_ne_bytes());
        bytes[56..60].copy_from_slice(&HAS_RESEND.to_ne_bytes());
        bytes
    }

    fn connection() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn message(fd: &OwnedFd) -> Vec<u8> {
        let mut buffer = [0_u8; 4096];
        let size = rustix::io::read(fd, &mut buffer[..]).unwrap();
        buffer[..size].to_vec()
    }

    #[test]
    fn the_first_server_answers_init_and_the_next_one_asks_for_what_was_lost() {
        // As in a server: the allocator takes large buffers anew from the kernel.
        raw::fix_malloc_thresholds();
        let (kernel, server) = connection();
        let init = init_request(0xffff | INIT_EXT);
        let first = start_empty(&server, &init, Start::First).unwrap();
        let both_have_theirs = || MADE.load(Ordering::Relaxed) == 2;
        assert!((0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            both_have_theirs()
        }));
        let answer = message(&kernel);
        assert_eq!(answer, first.reply);
        assert_eq!(answer[8..16], 2_u64.to_ne_bytes(), "answers the request's unique");
        drop(first);

        let again = Start::Again { reply: &answer, resend: Resend::Ask };
        let next = start_empty(&server, &init, again).unwrap();
        assert_eq!(next.in_flight, InFlight::Safe);
        let notification = message(&kernel);
        assert_eq!(notification[..8], [16, 0, 0, 0, 7, 0, 0, 0]);
        drop(next);

        let quiet = Start::Again { reply: &answer, resend: Resend::Never };
        assert_eq!(start_empty(&server, &init, quiet).unwrap().in_flight, InFlight::Failed(0));
        let old = init_request(0xffff & !INIT_EXT);
        assert!(!Resend::Ask.works(&old) && Resend::Ask.works(&init) && !Resend::Never.works(&init));

        let mut other = answer.clone();
        other[REPLY_FLAGS[0].start] ^= 1;
        let changed = Start::Again { reply: &other, resend: Resend::Ask };
        assert_eq!(start_empty(&server, &init, changed).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn a_connection_without_init_is_an_error() {
        let (kernel, server) = connection();
        drop(kernel);
        assert!(read_init(&server).is_ok_and(|init| init.is_empty()));
    }
}
