//! The system calls that a worker may make; how the rest is refused is `crate::walls::calls`.
//!
//! The list is what the worker's threads were seen to call after the filter stands, over the whole suite (tracepoint
//! raw_syscalls:sys_enter by thread name), and beside it what the C library calls on its way to an abort, where there is no vDSO, and
//! after a stop signal.

use seccompiler::{BpfProgram, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompRule};

use crate::walls::calls::{self, Call, Devices, rule, when};

/// Allowed whatever the arguments, by what needs them.
const ALLOWED: &[(&str, &[Call])] = &[
    (
        "requests, answers and notifications on the connection",
        &[libc::SYS_read, libc::SYS_readv, libc::SYS_writev, libc::SYS_write],
    ),
    (
        "waiting for a request; the supervisor's channel",
        &[libc::SYS_ppoll, libc::SYS_recvmsg, libc::SYS_sendmsg, libc::SYS_shutdown],
    ),
    (
        "lookup, getattr: places and what they are",
        &[
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_statx,
            libc::SYS_newfstatat,
            libc::SYS_fstat,
            libc::SYS_readlinkat,
            libc::SYS_close,
            libc::SYS_dup3,
        ],
    ),
    ("statfs", &[libc::SYS_fstatfs]),
    ("questions on the control socket, where the supervisor is dead", &[libc::SYS_accept4, libc::SYS_geteuid]),
    ("access", &[libc::SYS_faccessat, libc::SYS_faccessat2]),
    ("readdir", &[libc::SYS_getdents64]),
    (
        "read, write, seek, notes for the next worker",
        &[libc::SYS_pread64, libc::SYS_pwrite64, libc::SYS_pwritev2, libc::SYS_lseek, libc::SYS_copy_file_range],
    ),
    ("fallocate, truncate, fsync", &[libc::SYS_fallocate, libc::SYS_ftruncate, libc::SYS_fsync, libc::SYS_fdatasync]),
    (
        "names: mkdir, symlink, link, unlink, rename",
        &[
            libc::SYS_mkdirat,
            libc::SYS_symlinkat,
            libc::SYS_linkat,
            libc::SYS_unlinkat,
            libc::SYS_renameat,
            libc::SYS_renameat2,
        ],
    ),
    ("setattr", &[libc::SYS_fchmodat, libc::SYS_fchownat, libc::SYS_utimensat]),
    (
        "extended attributes",
        &[libc::SYS_getxattr, libc::SYS_fgetxattr, libc::SYS_listxattr, libc::SYS_setxattr, libc::SYS_removexattr],
    ),
    // Without the capabilities they give nothing.
    (
        "acting as the caller",
        &[
            libc::SYS_setfsuid,
            libc::SYS_setfsgid,
            libc::SYS_setgroups,
            libc::SYS_capget,
            libc::SYS_capset,
            libc::SYS_umask,
        ],
    ),
    ("memory, but none to be executed", &[libc::SYS_brk, libc::SYS_munmap, libc::SYS_mremap]),
    (
        "threads and locks",
        &[
            libc::SYS_futex,
            libc::SYS_set_robust_list,
            libc::SYS_rseq,
            libc::SYS_gettid,
            libc::SYS_getpid,
            libc::SYS_sched_yield,
            libc::SYS_sched_getaffinity,
            libc::SYS_exit,
            libc::SYS_exit_group,
        ],
    ),
    (
        "signals: a thread's stack for them, an abort, going on after a stop",
        &[
            libc::SYS_sigaltstack,
            libc::SYS_rt_sigaction,
            libc::SYS_rt_sigprocmask,
            libc::SYS_rt_sigreturn,
            libc::SYS_restart_syscall,
        ],
    ),
    (
        "time, where there is no vDSO",
        &[
            libc::SYS_clock_gettime,
            libc::SYS_clock_getres,
            libc::SYS_gettimeofday,
            libc::SYS_clock_nanosleep,
            libc::SYS_nanosleep,
        ],
    ),
    ("hash tables, /dev/random as a volume", &[libc::SYS_getrandom]),
    #[cfg(target_arch = "x86_64")]
    ("the same where a C library knows the older calls alone", &[libc::SYS_poll, libc::SYS_readlink]),
];

/// What pthread_create(3) asks of clone(2): glibc so, musl with a flag that means nothing since Linux 2.6.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// Allowed with some arguments alone. Each rule is enough by itself.
fn checked(devices: Devices) -> Result<Vec<(Call, Vec<SeccompRule>)>, String> {
    use Length::{Dword, Qword};
    let equals = |argument, value: libc::c_int| when(argument, Dword, Is::Eq, value as u32 as u64);
    let one_of = |argument, values: &[libc::c_int]| -> Result<Vec<SeccompRule>, String> {
        values.iter().map(|&value| rule(vec![equals(argument, value)?])).collect()
    };
    let me = rustix::process::getpid().as_raw_nonzero().get();
    Ok(vec![
        // A thread of this process, in the same namespaces, and nothing else.
        (libc::SYS_clone, vec![rule(vec![when(0, Qword, Is::MaskedEq(!(libc::CLONE_DETACHED as u64)), THREAD)?])?]),
        // A umask of a thread's own is what a file made for a caller is made under. No namespace.
        (libc::SYS_unshare, vec![rule(vec![when(0, Qword, Is::Eq, libc::CLONE_FS as u64)?])?]),
        (libc::SYS_mknodat, calls::nodes(devices)?),
        (libc::SYS_mmap, vec![calls::not_executable()?]),
        (libc::SYS_mprotect, vec![calls::not_executable()?]),
        // Giving pages back, and having them there. Not MADV_HWPOISON, with which CAP_SYS_ADMIN takes pages from the machine.
        (libc::SYS_madvise, one_of(2, &MADVICE)?),
        // Its own limits, to be read.
        (libc::SYS_prlimit64, vec![rule(vec![equals(0, 0)?, when(2, Qword, Is::Eq, 0)?])?]),
        // Names of threads; the auxiliary vector that rustix looks at; what an unprivileged filter wants first.
        (libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME, PR_GET_AUXV, libc::PR_SET_NO_NEW_PRIVS])?),
        calls::closing_threads()?,
        // A descriptor again; is it open (the standard library, in builds with debug assertions).
        (libc::SYS_fcntl, one_of(1, &[libc::F_DUPFD_CLOEXEC, libc::F_GETFD])?),
        // Where INIT is replayed, and requests are tried.
        (libc::SYS_socketpair, one_of(0, &[libc::AF_UNIX])?),
        // Who asks for statistics, where the supervisor is dead: the user id of the other end, and no descriptor of it.
        (libc::SYS_getsockopt, vec![rule(vec![equals(1, libc::SOL_SOCKET)?, equals(2, libc::SO_PEERCRED)?])?]),
        // abort(3).
        (libc::SYS_tgkill, vec![rule(vec![equals(0, me)?])?]),
    ])
}

const MADVICE: [libc::c_int; 6] = [
    libc::MADV_DONTNEED,
    libc::MADV_FREE,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_POPULATE_READ,
    libc::MADV_POPULATE_WRITE,
];

/// linux/prctl.h, Linux 6.4.
const PR_GET_AUXV: libc::c_int = 0x4155_5856;

/// The filter, and how many calls it allows.
pub(super) fn filter(devices: Devices) -> Result<(BpfProgram, usize), String> {
    calls::filter(ALLOWED, checked(devices)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` behind the filter, which holds for the thread that sets it and those it starts.
    fn behind<T: Send + 'static>(devices: Devices, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (program, _) = filter(devices).unwrap();
        let confined = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            seccompiler::apply_filter(&program).unwrap();
            work()
        });
        confined.join().unwrap()
    }

    #[test]
    fn a_confined_thread_starts_no_program_and_still_works_on_files() {
        behind(Devices::Refused, || {
            let refused = std::process::Command::new("/bin/true").spawn().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{refused}");
            let socket = std::os::unix::net::UnixStream::connect("/nonexistent").unwrap_err();
            assert_eq!(socket.raw_os_error(), Some(libc::EPERM));
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), "x").unwrap();
            assert_eq!(std::fs::read(file.path()).unwrap(), b"x");
            std::thread::spawn(|| ()).join().unwrap();
            assert_eq!(crate::sys::raw::unshare_fs(), Ok(()), "a umask of its own");
        });
    }

    #[test]
    fn a_panic_and_much_memory_behind_the_filter() {
        behind(Devices::Refused, || {
            std::panic::set_hook(Box::new(|_| ()));
            assert!(std::panic::catch_unwind(|| panic!("caught")).is_err());
            let _ = std::panic::take_hook();
            let blocks: Vec<Vec<u8>> = (0..64).map(|n| vec![1; 1 << (n % 22)]).collect();
            drop(blocks);
            crate::sys::raw::give_back_memory();
        });
    }

    #[test]
    fn devices_are_made_only_where_they_cannot_be_opened() {
        use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
        use rustix::io::Errno;
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().to_owned();
        let make = move |name: &str, kind, major| {
            let path = place.join(format!("{name}{}", rustix::thread::gettid().as_raw_nonzero()));
            mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), makedev(major, 3))
        };
        let again = make.clone();
        behind(Devices::Refused, move || {
            assert_eq!(make("null", FileType::CharacterDevice, 1), Err(Errno::PERM));
            assert_eq!(make("block", FileType::BlockDevice, 7), Err(Errno::PERM));
            assert_eq!(make("fifo", FileType::Fifo, 0), Ok(()));
        });
        let may = rustix::process::geteuid().is_root() && crate::sys::process::is_root_of_host().unwrap();
        let made = behind(Devices::Closed, move || again("null", FileType::CharacterDevice, 1));
        assert_eq!(made, if may { Ok(()) } else { Err(Errno::PERM) });
    }
}
