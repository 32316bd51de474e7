//! Processes: who is who, signals that cannot hit a stranger, namespaces.

use std::fmt::{self, Display};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, getrlimit, setrlimit};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use super::raw;
use crate::error::{Error, Kind, Result};

/// A process, told apart from a later one with the same pid by its start time (field 22 of /proc/PID/stat, clock ticks).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid, as the recording process saw it.
    pub pid: i32,
    /// Clock ticks after boot.
    pub start_time: u64,
}

/// How long [`ProcessId::wait_gone`] sleeps between looks where there is no pidfd (before Linux 5.3).
const POLL_INTERVAL: Duration = Duration::from_millis(10);

impl ProcessId {
    /// This process.
    pub fn current() -> Result<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// The process that has this pid now. [`Kind::NotFound`]: none has.
    pub fn of(pid: i32) -> Result<Self> {
        let stat = Stat::read(pid)?;
        Ok(ProcessId { pid, start_time: stat.start_time })
    }

    /// Is it this very process, and does it still run? A zombie does not: where pid 1 reaps late, a dead process keeps its
    /// pid for long.
    pub fn is_alive(self) -> bool {
        Stat::read(self.pid).is_ok_and(|stat| stat.start_time == self.start_time && stat.runs())
    }

    /// Was it stopped (SIGSTOP, or by a debugger)? It does nothing until it is let go on.
    pub fn is_stopped(self) -> bool {
        Stat::read(self.pid).is_ok_and(|stat| stat.start_time == self.start_time && matches!(stat.state, b'T' | b't'))
    }

    /// Send it a signal; never to another process that got its pid. `false`: it is gone.
    pub fn send_signal(self, signal: Signal) -> Result<bool> {
        const OP: &str = "signal process";
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(false) };
        // The descriptor first, the comparison after it: from then on it cannot mean another process.
        let sent = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) if self.is_alive() => rustix::process::pidfd_send_signal(fd, signal),
            Err(Errno::NOSYS) if self.is_alive() => rustix::process::kill_process(pid, signal),
            Ok(_) | Err(Errno::SRCH | Errno::INVAL | Errno::NOSYS) => return Ok(false),
            Err(e) => Err(e),
        };
        match sent {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(e) => Err(Error::sys(OP, self.pid, e)),
        }
    }

    /// Wait until it has ended (a zombie has). `false`: it still runs after `timeout`.
    pub fn wait_gone(self, timeout: Duration) -> Result<bool> {
        let end = Instant::now() + timeout;
        let fd = Pid::from_raw(self.pid).and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
        loop {
            if !self.is_alive() {
                return Ok(true);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            match &fd {
                Some(fd) => wait_readable(fd, left)?,
                None => std::thread::sleep(left.min(POLL_INTERVAL)),
            }
        }
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pid.fmt(f)
    }
}

fn wait_readable(fd: &OwnedFd, left: Duration) -> Result<()> {
    match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timespec(left))) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(Error::sys("wait for a process", "", e)),
    }
}

struct Stat {
    state: u8,
    start_time: u64,
}

impl Stat {
    fn read(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/stat");
        let text = std::fs::read(&path).map_err(|e| match e.raw_os_error() {
            // A process that ends between open and read: ESRCH.
            Some(libc::ESRCH) => Error::io("read", &path, e).with_kind(Kind::NotFound),
            _ => Error::io("read", &path, e),
        })?;
        Self::parse(&text).ok_or_else(|| Error::new(Kind::Invalid, "read", path, "it lacks fields of proc_pid_stat(5)"))
    }

    /// The name, in parentheses, may hold anything: count from its last `)`.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|&b| b == b')')?;
        let mut fields = std::str::from_utf8(&text[end + 1..]).ok()?.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        // The state is field 3, the start time field 22.
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Stat { state, start_time })
    }

    fn runs(&self) -> bool {
        !matches!(self.state, b'Z' | b'X' | b'x')
    }
}

/// A namespace: device and inode of its file in nsfs.
pub type Namespace = (u64, u64);

fn namespace(path: &str) -> Result<Namespace> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io("look at namespace", path, e))?;
    Ok((meta.dev(), meta.ino()))
}

/// The mount namespace of the calling thread.
pub fn mount_namespace() -> Result<Namespace> {
    namespace("/proc/thread-self/ns/mnt")
}

/// The mount namespace of another process; needs ptrace access to it.
pub fn mount_namespace_of(pid: i32) -> Result<Namespace> {
    namespace(&format!("/proc/{pid}/ns/mnt"))
}

/// The user namespace of a process.
#[cfg(feature = "cli")]
pub fn user_namespace_of(pid: i32) -> Result<Namespace> {
    namespace(&format!("/proc/{pid}/ns/user"))
}

/// Does this process live in the first user namespace of the machine? Its id map is the whole range onto itself there
/// (user_namespaces(7)); a container whose map looks the same has the same rights to ids.
pub fn in_initial_user_namespace() -> Result<bool> {
    let path = "/proc/self/uid_map";
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e).hint("mount /proc"))?;
    Ok(is_whole_map(&text))
}

fn is_whole_map(text: &str) -> bool {
    text.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

/// In a user namespace that nobody else lives in: it has one id, or a mount namespace of its own. In other users' mount namespaces the
/// kernel takes every mount of this one for nosuid (mnt_may_suid in fs/namespace.c). Where process 1 sees the same mounts, this is a
/// whole system with users of its own.
pub fn is_among_itself() -> bool {
    let path = "/proc/self/uid_map";
    let map = std::fs::read_to_string(path).unwrap_or_default();
    if map.is_empty() || is_whole_map(&map) {
        return false;
    }
    has_one_id(&map) || mount_namespace().is_ok_and(|ours| mount_namespace_of(1).map_or(true, |first| first != ours))
}

/// Are several ids mapped into this user namespace, which is not the first?
pub fn has_several_ids() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !map.is_empty() && !is_whole_map(&map) && !has_one_id(&map)
}

fn has_one_id(map: &str) -> bool {
    map.split_ascii_whitespace().skip(2).step_by(3).eq(["1"])
}

/// Is this process root of the machine itself, not of a user namespace?
pub fn is_root_of_host() -> Result<bool> {
    Ok(rustix::process::geteuid().is_root() && in_initial_user_namespace()?)
}

/// A thread that nobody waits for.
pub(crate) fn start_thread(what: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().spawn(work).map(drop).map_err(|e| not_started("start a thread", what, e))
}

/// A thread or a process could not be started; EAGAIN: this user may have no more of them (clone(2)).
pub(crate) fn not_started(op: &'static str, subject: impl Display, cause: std::io::Error) -> Error {
    let is_limit = Errno::from_io_error(&cause) == Some(Errno::AGAIN);
    let error = Error::io(op, subject, cause);
    if is_limit { error.hint("raise this user's limit of processes (ulimit -u)") } else { error }
}

/// As poll(2) takes it.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// The real user and group id of this process.
pub fn own_ids() -> (u32, u32) {
    (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
}

/// A process that we can see in this mount namespace, and that counts, if there is one.
pub fn in_mount_namespace(wanted: Namespace, counts: impl Fn(i32) -> bool) -> Result<Option<i32>> {
    let processes = std::fs::read_dir("/proc").map_err(|e| Error::io("list", "/proc", e))?;
    Ok(processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        // A process that has ended, or that we may not look at, is not one we can point to.
        .find(|&pid| mount_namespace_of(pid).is_ok_and(|ns| ns == wanted) && counts(pid)))
}

/// The id of this boot (proc(5)): what was mounted or running under another one is gone.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e).hint("mount /proc"))?;
    Ok(text.trim_end().to_owned())
}

/// The capabilities that this thread may use in its user namespace.
pub fn effective_caps() -> Result<CapabilitySet> {
    Ok(rustix::thread::capabilities(None).map_err(|e| Error::sys("read capabilities", "", e))?.effective)
}

/// A user namespace held open by a child process of ours that does nothing else; gone when this is dropped.
#[derive(Debug)]
pub struct UserNamespace {
    child: Pid,
    // Its closing ends the child; the option lets Drop close it before waiting.
    hold: Option<OwnedFd>,
}

impl UserNamespace {
    /// Make one. EPERM, ENOSPC, ENOSYS, EINVAL: this host does not let us.
    pub fn create() -> rustix::io::Result<Self> {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let child = raw::fork_in_user_namespace(&reader, &writer)?;
        Ok(UserNamespace { child, hold: Some(writer) })
    }

    /// Make one with these maps, lines of `inside outside count` (user_namespaces(7)).
    pub fn with_maps(uids: &str, gids: &str) -> Result<Self> {
        const OP: &str = "make a user namespace";
        let made = Self::create().map_err(|e| Error::sys(OP, "", e).hint(user_namespace_remedy(e)))?;
        for (name, map) in [("uid_map", uids), ("gid_map", gids)] {
            let path = format!("/proc/{}/{name}", made.child.as_raw_nonzero());
            // One write: the kernel takes a map whole or not at all.
            std::fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|mut file| file.write_all(map.as_bytes()))
                .map_err(|e| {
                    Error::io("write id map", format!("{path} ({})", map.trim_end().replace('\n', ", ")), e)
                })?;
        }
        Ok(made)
    }

    /// A descriptor of it.
    pub fn open(&self) -> Result<OwnedFd> {
        let path = format!("/proc/{}/ns/user", self.child.as_raw_nonzero());
        Ok(std::fs::File::open(&path).map_err(|e| Error::io("open", path, e))?.into())
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        self.hold.take();
        loop {
            match rustix::process::waitpid(Some(self.child), WaitOptions::empty()) {
                Err(Errno::INTR) => {}
                Err(e) => {
                    log::debug!(target: "fsprov::process", "wait for the child {:?}: {e}", self.child);
                    break;
                }
                Ok(_) => break,
            }
        }
    }
}

/// Switches of the kernel and of distributions that keep user namespaces, or rights in them, from ordinary users: where, the value that does,
/// and what sets it back.
const SWITCHES: [Switch; 3] = [
    ("kernel/unprivileged_userns_clone", b"0", "as root: sysctl -w kernel.unprivileged_userns_clone=1"),
    MOST_NAMESPACES,
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        b"1",
        "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with userns",
    ),
];
/// This one is for root as well.
const MOST_NAMESPACES: Switch = ("user/max_user_namespaces", b"0", "as root: sysctl -w user.max_user_namespaces=15000");

type Switch = (&'static str, &'static [u8], &'static str);

/// What sets back the switch that keeps user namespaces from ordinary users here, if one does.
pub fn user_namespace_switch() -> Option<&'static str> {
    switch_in(Path::new("/proc/sys"), &SWITCHES)
}

fn switch_in(sys: &Path, switches: &[Switch]) -> Option<&'static str> {
    let is_set = |(name, value, _): &&Switch| std::fs::read(sys.join(name)).is_ok_and(|t| t.trim_ascii() == *value);
    switches.iter().find(is_set).map(|(_, _, remedy)| *remedy)
}

/// What helps where making a user namespace failed so; empty where nothing is known.
pub fn user_namespace_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::INVAL | Errno::NOSYS => "this kernel is built without user namespaces",
        Errno::NOSPC | Errno::USERS => switch_in(Path::new("/proc/sys"), &[MOST_NAMESPACES])
            .unwrap_or("as root: raise sysctl user.max_user_namespaces; nesting ends at 32 levels"),
        Errno::PERM | Errno::ACCESS => user_namespace_switch()
            .unwrap_or("a seccomp filter, a chroot or a policy forbids it: leave that container or chroot"),
        _ => "",
    }
}

/// Where making a user namespace and mounting in it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserNamespaceStep {
    /// It could not be made.
    Create,
    /// It was made, but gave no right to mount.
    Mount,
}

/// Why [`try_mounting_in_user_namespace`] failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserNamespaceError {
    /// At which step.
    pub step: UserNamespaceStep,
    /// With which errno.
    pub errno: Errno,
}

/// Make a user and a mount namespace in a child process, change a mount's propagation there, and let both go.
pub fn try_mounting_in_user_namespace() -> std::result::Result<(), UserNamespaceError> {
    let fail = |step| move |errno| UserNamespaceError { step, errno };
    let child = raw::fork_and_mount_in_user_namespace().map_err(fail(UserNamespaceStep::Create))?;
    loop {
        match rustix::process::waitpid(Some(child), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(fail(UserNamespaceStep::Create)(e)),
            Ok(status) => {
                let code = status.and_then(|(_, status)| status.exit_status()).unwrap_or(libc::EINTR);
                return match code {
                    0 => Ok(()),
                    code => Err(fail(UserNamespaceStep::Mount)(Errno::from_raw_os_error(code))),
                };
            }
        }
    }
}

/// Allow this process as many open files as it may have. The soft limit is often 1024 for the sake of select(2), which we do not call.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        log::debug!(target: "fsprov::process", "raise RLIMIT_NOFILE from {:?} to {:?}: {e}", limit.current, limit.maximum);
    }
}

/// From now on a file that would grow beyond RLIMIT_FSIZE is an error of who writes it (EFBIG), and no end of this process (SIGXFSZ, setrlimit(2)). A
/// handler, which a program that is started does not inherit (execve(2)).
pub fn outlive_file_limit() {
    if let Err(e) = signal_hook::flag::register(libc::SIGXFSZ, std::sync::Arc::default()) {
        log::debug!(target: "fsprov::process", "SIGXFSZ: {e}");
    }
}

/// Poll whether `fd` can be read now. For tests of pipes and pidfds.
#[cfg(test)]
fn is_readable(fd: impl std::os::fd::AsFd) -> bool {
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_switch_that_forbids_user_namespaces_is_named() {
        let sys = tempfile::tempdir().unwrap();
        for dir in ["kernel", "user"] {
            std::fs::create_dir(sys.path().join(dir)).unwrap();
        }
        assert_eq!(switch_in(sys.path(), &SWITCHES), None);
        for (name, off, on) in [
            ("kernel/unprivileged_userns_clone", "0\n", "1\n"),
            ("user/max_user_namespaces", "0\n", "60000\n"),
            ("kernel/apparmor_restrict_unprivileged_userns", "1\n", "0\n"),
        ] {
            std::fs::write(sys.path().join(name), off).unwrap();
            let named = switch_in(sys.path(), &SWITCHES).unwrap();
            assert!(named.contains(&format!("sysctl -w {}=", name.replace('/', "."))), "{named}");
            std::fs::write(sys.path().join(name), on).unwrap();
            assert_eq!(switch_in(sys.path(), &SWITCHES), None, "{name}");
        }
    }

    #[test]
    fn stat_with_a_name_that_lies() {
        let tail = "1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 998877 1 2";
        let stat = Stat::parse(format!("12 (a) Z 1 (b) S 1 {tail}").as_bytes()).unwrap();
        assert_eq!((stat.state, stat.start_time, stat.runs()), (b'S', 998_877, true));
        assert!(!Stat::parse(format!("12 (x) Z 1 {tail}").as_bytes()).unwrap().runs());
        assert!(Stat::parse(b"12 (x S").is_none() && Stat::parse(b"12 (x) S 1 2").is_none());
    }

    #[test]
    fn a_process_lives_is_signalled_and_a_zombie_is_gone() {
        let me = ProcessId::current().unwrap();
        assert!(me.is_alive());
        assert!(!ProcessId { start_time: me.start_time + 1, ..me }.is_alive());
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        assert!(!id.wait_gone(Duration::from_millis(20)).unwrap());
        let stranger = ProcessId { start_time: id.start_time + 1, ..id };
        assert!(!stranger.send_signal(Signal::KILL).unwrap());
        assert!(id.is_alive(), "a stranger's signal hit it");
        assert!(id.send_signal(Signal::KILL).unwrap());
        assert!(id.wait_gone(Duration::from_secs(10)).unwrap());
        // Not reaped yet: a zombie with this pid and start time.
        assert_eq!(ProcessId::of(id.pid).unwrap(), id);
        assert!(!id.is_alive() && !id.send_signal(Signal::TERM).unwrap());
        child.wait().unwrap();
        assert_eq!(ProcessId::of(id.pid).unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn maps_of_the_first_namespace() {
        assert!(is_whole_map("         0          0 4294967295\n"));
        assert!(has_one_id("         0       1000          1\n"));
        assert!(!has_one_id("0 0 4294967295\n") && !has_one_id("0 1000 1\n1 100000 65536\n"));
        assert!(!is_whole_map("0 1000 1\n") && !is_whole_map("0 0 1000\n1000 1000 4294966295\n"));
    }

    #[test]
    fn namespaces_of_self_agree() {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        assert_eq!(mount_namespace().unwrap(), mount_namespace_of(pid).unwrap());
    }

    #[test]
    fn a_user_namespace_lasts_as_long_as_it_is_held() {
        let Ok(held) = UserNamespace::create() else { return crate::lacks("user namespaces") };
        let pid = held.child;
        let watch = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        assert_ne!(
            namespace(&format!("/proc/{}/ns/user", pid.as_raw_nonzero())).unwrap(),
            namespace("/proc/self/ns/user").unwrap()
        );
        assert!(!is_readable(&watch));
        drop(held);
        assert!(is_readable(&watch));
    }
}
