//! What the readers of archives may do.
//!
//! | | decoder | unpacker |
//! | --- | --- | --- |
//! | system calls | pipes, memory, its report | also files: make, write, own, mode, time, attribute |
//! | files that can be opened | none | what lies below the tree and the place for what is too much for memory |
//! | root | the host's, of which it can name nothing | an empty one, with those two |
//! | user, where root imports | one of its own | one of its own, which makes files as root |
//! | capabilities, where root imports | none | those of [`NEEDED`] |
//! | threads, processes | none | none |
//! | memory, open files, processor time | bounded | bounded |

use std::os::fd::{AsFd as _, OwnedFd};

use landlock::{Access as _, AccessFs};
use rustix::fs::{Mode, OFlags, openat};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use rustix::thread::{CapabilitySet, Gid, Uid, capabilities, set_capabilities};
use seccompiler::SeccompRule;
use serde::{Deserialize, Serialize};

use super::work::Job;
use super::{OP, TARGET};
use crate::error::{Error, Kind, Result};
use crate::sys::raw;
use crate::volume::Access;
use crate::walls::calls::{self, Call, Devices};
use crate::walls::root::{self, NewUsers, Wanted};
use crate::walls::{self, files};

/// Of root's capabilities those that placing takes, each with what for. Not SYS_ADMIN: `trusted.overlay.opaque` is set by who started it.
const NEEDED: [CapabilitySet; 6] = [
    // The owners that the archive says.
    CapabilitySet::CHOWN,
    // What is placed in a directory that belongs to another by now, and is closed to others.
    CapabilitySet::DAC_OVERRIDE,
    // Mode, time and attributes after the owner; one more name of another's file (protected_hardlinks).
    CapabilitySet::FOWNER,
    // Set-group-id for a group that it is not in.
    CapabilitySet::FSETID,
    // Devices.
    CapabilitySet::MKNOD,
    // security.capability.
    CapabilitySet::SETFCAP,
];

/// What stands around one of them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Stand {
    /// It needs no files, or has an empty root of its own.
    pub(super) own_root: bool,
    pub(super) landlock: bool,
    pub(super) own_user: bool,
    /// How many system calls are allowed.
    pub(super) system_calls: usize,
    /// The capabilities that are left, by the kernel's numbers.
    pub(super) capabilities: u64,
}

impl Stand {
    /// Say what lets it reach more than it should.
    pub(super) fn complain(self) {
        if !self.own_root && !self.landlock {
            log::warn!(
                target: TARGET,
                "an archive was read by a process that could reach your files: this kernel has no landlock, and you may not make a mount namespace"
            );
        }
    }
}

/// Calls of both.
const BOTH: &[(&str, &[Call])] = &[
    ("the pipes, the ring, the manifest", &[libc::SYS_read, libc::SYS_write, libc::SYS_close]),
    ("the order, the report", &[libc::SYS_recvmsg, libc::SYS_sendmsg]),
    ("memory, but none to be executed", &[libc::SYS_brk, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_futex]),
    // An abort asks for both numbers, for tgkill(2).
    ("the end", &[libc::SYS_exit, libc::SYS_exit_group, libc::SYS_sigaltstack, libc::SYS_getpid, libc::SYS_gettid]),
    ("hash tables, names of files", &[libc::SYS_getrandom]),
    // Not a call where vdso(7) answers; the standard library panics over an error.
    ("the time", &[libc::SYS_clock_gettime]),
    // A signal that stopped it, and its going on.
    ("going on after a stop", &[libc::SYS_restart_syscall, libc::SYS_rt_sigreturn]),
];

const UNPACKER: &[(&str, &[Call])] = &[
    (
        "parts of the tree",
        &[libc::SYS_openat, libc::SYS_openat2, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_fstat],
    ),
    (
        "making them",
        &[libc::SYS_mkdirat, libc::SYS_symlinkat, libc::SYS_linkat, libc::SYS_unlinkat, libc::SYS_ftruncate],
    ),
    (
        "owner, mode, time, attributes",
        &[
            libc::SYS_fchown,
            libc::SYS_fchownat,
            libc::SYS_fchmod,
            libc::SYS_fchmodat,
            libc::SYS_utimensat,
            libc::SYS_fsetxattr,
        ],
    ),
    ("sparse files, the index", &[libc::SYS_pwrite64, libc::SYS_pread64, libc::SYS_lseek]),
];

fn checked() -> std::result::Result<Vec<(Call, Vec<SeccompRule>)>, String> {
    use seccompiler::{SeccompCmpArgLen::Dword, SeccompCmpOp as Is};
    let one_of = |argument, values: &[libc::c_int]| -> std::result::Result<Vec<SeccompRule>, String> {
        values.iter().map(|&v| calls::rule(vec![calls::when(argument, Dword, Is::Eq, v as u32 as u64)?])).collect()
    };
    Ok(vec![
        (libc::SYS_mmap, vec![calls::not_executable()?]),
        (libc::SYS_mprotect, vec![calls::not_executable()?]),
        (libc::SYS_madvise, one_of(2, &[libc::MADV_DONTNEED, libc::MADV_FREE])?),
        // A descriptor again; is it open (the standard library, in builds with debug assertions).
        (libc::SYS_fcntl, one_of(1, &[libc::F_DUPFD_CLOEXEC, libc::F_GETFD])?),
        // abort(3).
        (libc::SYS_tgkill, one_of(0, &[rustix::process::getpid().as_raw_nonzero().get()])?),
        // The standard library looks at these two first, and then lets them end the process. No other: that its time is up must end it.
        (libc::SYS_rt_sigaction, one_of(0, &[libc::SIGSEGV, libc::SIGBUS])?),
    ])
}

fn fail(what: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
    move |e| Error::sys("raise the walls around the reader of an archive", what, e)
}

/// Around the decoder. It works on two pipes and opens nothing.
pub(super) fn raise_around_decoder(memory: u64) -> Result<Stand> {
    /// Two pipes, the channel, /dev/null thrice, and what the loader may have left.
    const FILES: u64 = 16;
    limit(memory, FILES)?;
    let own_user = become_someone_else(Makes::Nothing)?;
    finish(CapabilitySet::empty(), own_user, true, &[], &[BOTH], checked())
}

/// Around the unpacker. Its directories become copies of their mounts.
pub(super) fn raise_around_unpacker(job: &Job, fds: &mut [OwnedFd], memory: u64) -> Result<Stand> {
    /// Beside the directories that lie above one another: its descriptors, and the files that an index is put together in.
    const FILES: u64 = 64;
    // In the order that they are handed over in: the ring's three, the manifest, the tree, the place for what is too much.
    let mut directories: Vec<&mut OwnedFd> = fds.iter_mut().skip(4).take(2).collect();
    limit(memory, FILES + 2 * job.depth())?;
    let mut sources: Vec<_> = directories.iter_mut().map(|fd| (&mut **fd, Access::Rw)).collect();
    let enclosed = if sources.is_empty() {
        root::Enclosed { copies: false, root: true }
    } else {
        let kept = [root::OWN_DESCRIPTORS];
        // Nothing is mounted within what was made a moment ago.
        let wanted = Wanted { users: NewUsers::May, kept: &kept, is_foreign: |_| false, covered: None };
        root::enclose(&mut sources, &wanted)
    };
    drop(sources);
    for directory in &mut directories {
        // What is a copy is O_PATH.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        **directory = openat(&**directory, ".", flags, Mode::empty()).map_err(fail("open a directory again"))?;
    }
    let own_user = become_someone_else(if job.as_root { Makes::FilesOfRoot } else { Makes::Nothing })?;
    let nodes = calls::nodes(if enclosed.copies { Devices::Closed } else { Devices::Refused });
    let rules = checked().and_then(|mut all| {
        all.push((libc::SYS_mknodat, nodes?));
        Ok(all)
    });
    let needed = if job.as_root { walls::union(&NEEDED) } else { CapabilitySet::empty() };
    finish(needed, own_user, enclosed.root, &directories, &[BOTH, UNPACKER], rules)
}

fn limit(memory: u64, files: u64) -> Result<()> {
    let set = |resource, most: u64, what| {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(fail(what))
    };
    set(Resource::Core, 0, "RLIMIT_CORE")?;
    set(Resource::Nofile, files, "RLIMIT_NOFILE")?;
    // No more processes, where the kernel counts a user's; the filter refuses them to all.
    set(Resource::Nproc, 0, "RLIMIT_NPROC")?;
    let statm = std::fs::read_to_string("/proc/self/statm").map_err(|e| Error::io(OP, "/proc/self/statm", e))?;
    let pages: Option<u64> = statm.split(' ').next().and_then(|pages| pages.parse().ok());
    let pages = pages.ok_or_else(|| Error::new(Kind::Invalid, OP, "/proc/self/statm", "it begins with no number"))?;
    set(Resource::As, pages * rustix::param::page_size() as u64 + memory, "RLIMIT_AS")
}

/// What a user of its own makes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Makes {
    Nothing,
    /// What it makes belongs to root until its owner is set.
    FilesOfRoot,
}

/// First of the user ids that are nobody's: Linux's users, containers' and systemd's lie below (systemd.io/UIDS-GIDS). Each process has the one
/// after this by its number, so no two share one.
const NOBODYS: u32 = 0x7000_0000;

/// Where root imports: a user and group that no other process has. `false`: not root, or a user namespace that has none to spare.
fn become_someone_else(makes: Makes) -> Result<bool> {
    let mut sets = capabilities(None).map_err(fail("capget"))?;
    let both = CapabilitySet::SETUID | CapabilitySet::SETGID;
    if !rustix::process::geteuid().is_root() || !sets.effective.contains(both) {
        return Ok(false);
    }
    let number = NOBODYS + rustix::process::getpid().as_raw_nonzero().get() as u32;
    let (uid, gid) = (Uid::from_raw(number), Gid::from_raw(number));
    // Groups first: another user may not leave them.
    let left = rustix::thread::set_thread_groups(&[])
        .and_then(|()| rustix::thread::set_keep_capabilities(true))
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid));
    match left {
        Ok(()) => {}
        // With these capabilities, in a user namespace alone: it has no such ids, or `setgroups` is denied (user_namespaces(7)).
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => return Ok(false),
        Err(e) => return Err(fail("setresuid")(e)),
    }
    // They stayed permitted, and are not in effect any more.
    sets.effective = sets.permitted;
    set_capabilities(None, sets).map_err(fail("capset"))?;
    if makes == Makes::FilesOfRoot {
        raw::set_fs_gid(0);
        raw::set_fs_uid(0);
        // It gives the id in force, and no error.
        if raw::set_fs_uid(0) != 0 || raw::set_fs_gid(0) != 0 {
            return Err(Error::new(Kind::Permission, OP, "", "the unpacker cannot make files as root"));
        }
    }
    Ok(true)
}

fn finish(
    needed: CapabilitySet,
    own_user: bool,
    own_root: bool,
    directories: &[&mut OwnedFd],
    allowed: &[&[(&str, &[Call])]],
    rules: std::result::Result<Vec<(Call, Vec<SeccompRule>)>, String>,
) -> Result<Stand> {
    rustix::thread::set_no_new_privs(true).map_err(fail("no_new_privs"))?;
    // After the last change of user ids, which takes it away. Its end is that of who asked.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(fail("PR_SET_PDEATHSIG"))?;
    let below = AccessFs::from_all(files::KNOWN) & !AccessFs::Execute;
    let landlock = files::is_offered()
        && files::restrict(directories.iter().map(|fd| (fd.as_fd(), below)))
            .map_err(|e| Error::new(Kind::Unsupported, OP, "landlock", e))?;
    let capabilities = walls::drop_capabilities(needed).map_err(fail("drop capabilities"))?;
    let refuse = |e: String| Error::new(Kind::Unsupported, OP, "the filter of system calls", e);
    let (program, system_calls) = rules.and_then(|rules| calls::filter(&allowed.concat(), rules)).map_err(refuse)?;
    seccompiler::apply_filter(&program).map_err(|e| refuse(e.to_string()))?;
    Ok(Stand { own_root, landlock, own_user, system_calls, capabilities: capabilities.bits() })
}
