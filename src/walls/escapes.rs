//! A process behind walls that was taken over, played by itself: what one would try from in there, one after the other. Of test builds alone;
//! a fault point asks for it.
//!
//! Nothing here harms a machine where it works: files are opened and no more, signals are 0, structures are null.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::sys::raw;

type Tried = Result<(), Errno>;

/// Where the test's own things are, told by the fault point: `SUPERVISOR:NEIGHBOUR:DIRECTORY`, two pids and a place of the host
/// with a file `secret`, which is readable by the process's user.
struct Host {
    supervisor: usize,
    neighbour: usize,
    directory: String,
}

/// One attempt.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Attempt {
    pub(crate) what: String,
    /// The errno; none: it worked.
    refused: Option<i32>,
    pub(crate) escaped: bool,
}

/// Try everything; `told` is where the test's things are ([`Host`]), or the table whose calls end the process.
pub(crate) fn attempt(told: &str) -> Vec<Attempt> {
    deadly(told);
    let mut words = told.splitn(3, ':');
    let mut number = || words.next().and_then(|word| word.parse().ok()).unwrap_or(1);
    let (supervisor, neighbour) = (number(), number());
    let host = Host { supervisor, neighbour, directory: words.next().unwrap_or("/").to_owned() };
    let mut all = files(&host);
    all.extend(calls(&host));
    let thread = std::thread::Builder::new().spawn(|| ());
    let refused = thread.as_ref().err().and_then(std::io::Error::raw_os_error);
    all.push(Attempt { what: "a thread".to_owned(), refused, escaped: thread.is_ok() });
    all
}

/// What one that has no threads, and makes files for others, would try beside that.
pub(crate) fn attempt_as_importer(told: &str) -> Vec<Attempt> {
    let mut all = attempt(told);
    let secret = text(&format!("{}/secret", told.splitn(3, ':').nth(2).unwrap_or("/")));
    let (here, times) = (libc::AT_FDCWD as usize, [0_i64; 4]);
    // By a name of the host: landlock asks for none of these.
    for (what, number, arguments) in [
        ("chmod of a file of the host", libc::SYS_fchmodat, [here, at(&secret), 0o666, 0, 0, 0]),
        ("chown of a file of the host", libc::SYS_fchownat, [here, at(&secret), usize::MAX, usize::MAX, 0, 0]),
        ("times of a file of the host", libc::SYS_utimensat, [here, at(&secret), times.as_ptr().addr(), 0, 0, 0]),
        ("attribute of a file of the host", libc::SYS_setxattr, [at(&secret), at(c"user.x"), at(c"y"), 1, 0, 0]),
        ("unlink a file of the host", libc::SYS_unlinkat, [here, at(&secret), 0, 0, 0, 0]),
    ] {
        let refused = call(number, arguments).err().map(Errno::raw_os_error);
        all.push(Attempt { what: what.to_owned(), refused, escaped: refused.is_none() });
    }
    all
}

/// What ends the process: other architectures' calls.
fn deadly(told: &str) {
    match told {
        "x32" => drop(raw::any_call(X32 | libc::SYS_getpid, [0; 6])),
        "ia32" => raw::ia32_getpid(),
        _ => {}
    }
}

const X32: libc::c_long = 0x4000_0000;

/// Attempts on files: any error is a refusal, but it must be one.
fn files(host: &Host) -> Vec<Attempt> {
    let mut all = Vec::new();
    let mut tell = |what: String, tried: Tried| {
        let refused = tried.err().map(Errno::raw_os_error);
        all.push(Attempt { what, refused, escaped: refused.is_none() });
    };
    let Host { supervisor, neighbour, directory } = host;
    let secret = format!("{directory}/secret");
    let read = libc::O_RDONLY;
    let write = libc::O_WRONLY;
    for (path, flags) in [
        ("/etc/shadow".to_owned(), read),
        ("/etc/passwd".to_owned(), read),
        ("/".to_owned() + "etc", libc::O_DIRECTORY),
        ("/etc/passwd".to_owned(), libc::O_RDWR),
        ("/usr/bin/env".to_owned(), read),
        (secret.clone(), read),
        (secret.clone(), write),
        (format!("{directory}/made"), write | libc::O_CREAT),
        (directory.clone(), libc::O_TMPFILE | libc::O_RDWR),
        ("/proc/1/root/etc/passwd".to_owned(), read),
        (format!("/proc/{supervisor}/root/etc/passwd"), read),
        (format!("/proc/{supervisor}/mem"), libc::O_RDWR),
        (format!("/proc/{supervisor}/fd/0"), read),
        (format!("/proc/{supervisor}/cwd/etc/passwd"), read),
        (format!("/proc/{neighbour}/root{secret}"), read),
        (format!("/proc/{neighbour}/mem"), libc::O_RDWR),
        (format!("/proc/{neighbour}/environ"), read),
        (format!("/proc/{neighbour}/cwd/secret"), read),
        (format!("/proc/{neighbour}/ns/mnt"), read),
        ("/proc/self/root/etc/passwd".to_owned(), read),
        ("/proc/thread-self/root/etc/passwd".to_owned(), read),
        ("/proc/self/mem".to_owned(), libc::O_RDWR),
        ("/proc/self/oom_score_adj".to_owned(), write),
        ("/proc/sys/kernel/core_pattern".to_owned(), write),
        ("/proc/sysrq-trigger".to_owned(), write),
        ("/proc/kcore".to_owned(), read),
        ("/dev/mem".to_owned(), read),
        ("/dev/kmsg".to_owned(), read),
        ("/dev/fuse".to_owned(), libc::O_RDWR),
        ("/dev/null".to_owned(), libc::O_RDWR),
        ("/dev/vda".to_owned(), read),
        ("/dev/tty".to_owned(), read),
        ("/sys/kernel/uevent_helper".to_owned(), write),
        ("/sys/power/state".to_owned(), write),
        ("/sys/fs/cgroup/cgroup.procs".to_owned(), write),
        ("/sys/fs/cgroup/memory/cgroup.procs".to_owned(), write),
        ("/run".to_owned(), libc::O_DIRECTORY),
        ("/tmp".to_owned(), libc::O_DIRECTORY),
        ("/root".to_owned(), libc::O_DIRECTORY),
    ] {
        tell(format!("open {path} ({flags:o})"), open(libc::AT_FDCWD, &path, flags).map(drop));
    }
    for connection in 0..200 {
        // Somebody's connection, where there is one: the first that says anything else than "no such".
        let path = format!("/sys/fs/fuse/connections/{connection}/abort");
        let tried = open(libc::AT_FDCWD, &path, write).map(drop);
        if tried != Err(Errno::NOENT) || connection == 199 {
            tell(format!("open {path}"), tried);
            break;
        }
    }
    // From every descriptor that it has.
    let any = |what: &dyn Fn(i32) -> Tried| {
        let tries: Vec<Tried> = (0..256).map(what).collect();
        if tries.contains(&Ok(())) {
            Ok(())
        } else {
            tries.into_iter().find(|t| *t != Err(Errno::BADF)).unwrap_or(Err(Errno::BADF))
        }
    };
    // Not etc/passwd: a layer has one, and above the root of a copy is that root again.
    for up in
        ["../host/secret".to_owned(), format!("../../../../../../../../..{secret}"), "../../host/secret".to_owned()]
    {
        tell(format!("open {up} from any descriptor"), any(&|fd| open(fd, &up, read).map(drop)));
    }
    for (kind, major, minor) in
        [(libc::S_IFCHR, 1, 3), (libc::S_IFCHR, 1, 1), (libc::S_IFCHR, 5, 0), (libc::S_IFBLK, 254, 0)]
    {
        let made = any(&|fd| {
            let name = c"device-of-a-worker";
            let device = rustix::fs::makedev(major, minor) as usize;
            call(libc::SYS_mknodat, [fd as usize, at(name), kind as usize | 0o666, device, 0, 0])?;
            let opened = open(fd, "device-of-a-worker", read).map(drop);
            call(libc::SYS_unlinkat, [fd as usize, at(name), 0, 0, 0, 0])?;
            opened
        });
        tell(format!("make device {major}:{minor} and open it"), made);
    }
    tell("open a device node of the volume".to_owned(), any(&|fd| open(fd, "device", read).map(drop)));
    tell(
        "link a file of the host into the volume".to_owned(),
        any(&|fd| {
            let from = text(&secret);
            call(libc::SYS_linkat, [libc::AT_FDCWD as usize, at(&from), fd as usize, at(c"linked"), 0, 0])
        }),
    );
    tell(
        "move a file of the volume to the host".to_owned(),
        any(&|fd| {
            let to = text(&format!("{directory}/moved"));
            call(libc::SYS_renameat2, [fd as usize, at(c"moves"), libc::AT_FDCWD as usize, at(&to), 0, 0])
        }),
    );
    tell(
        "follow a link of the volume to the host".to_owned(),
        any(&|fd| {
            let to = text(&secret);
            let _ = call(libc::SYS_symlinkat, [at(&to), fd as usize, at(c"link-of-a-worker"), 0, 0, 0]);
            let opened = open(fd, "link-of-a-worker", read).map(drop);
            let _ = call(libc::SYS_unlinkat, [fd as usize, at(c"link-of-a-worker"), 0, 0, 0, 0]);
            opened
        }),
    );
    let (shadow, mut buffer) = (text(&secret), [0_u8; 8]);
    tell("stat what else there is".to_owned(), {
        let mut stat = [0_u64; 64];
        call(libc::SYS_newfstatat, [libc::AT_FDCWD as usize, at(&shadow), stat.as_mut_ptr().addr(), 0, 0, 0])
            .and_then(|()| open(libc::AT_FDCWD, &secret, libc::O_PATH).map(drop))
            .and_then(|()| call(libc::SYS_getxattr, [at(&shadow), at(c"user.x"), buffer.as_mut_ptr().addr(), 8, 0, 0]))
    });
    let mut mapped = |what: &str, size: usize, protection, flags: libc::c_int| {
        let tried = raw::any_call(libc::SYS_mmap, [0, size, protection as usize, flags as usize, usize::MAX, 0]);
        tell(what.to_owned(), tried.and_then(|at| call(libc::SYS_munmap, [at, size, 0, 0, 0, 0])));
    };
    let (data, anonymous) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    mapped("a TiB of memory", 1 << 40, data, libc::MAP_PRIVATE | anonymous);
    mapped("a TiB of shared memory", 1 << 40, data, libc::MAP_SHARED | anonymous);
    mapped("a TiB of addresses", 1 << 40, libc::PROT_NONE, libc::MAP_PRIVATE | anonymous);
    mapped("memory to execute", 4096, libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    all
}

/// Attempts by system calls that a worker has no use for: the filter refuses them before their arguments are looked at, so any other
/// answer of the kernel than EPERM or ENOSYS is an escape.
fn calls(host: &Host) -> Vec<Attempt> {
    let Host { supervisor, neighbour, .. } = *host;
    let (shell, none) = (c"/bin/sh", c"");
    let none_of = usize::MAX;
    let any_fd = 0;
    let flags = |flags: libc::c_int| flags as usize;
    let mut list: Vec<(&str, libc::c_long, [usize; 6])> = vec![
        // Programs and processes.
        ("execve", libc::SYS_execve, [at(shell), 0, 0, 0, 0, 0]),
        ("execveat", libc::SYS_execveat, [any_fd, at(shell), 0, 0, 0, 0]),
        ("fork, by clone", libc::SYS_clone, [flags(libc::SIGCHLD), 0, 0, 0, 0, 0]),
        ("clone CLONE_NEWUSER", libc::SYS_clone, [flags(libc::CLONE_NEWUSER | libc::SIGCHLD), 0, 0, 0, 0, 0]),
        ("clone CLONE_NEWPID", libc::SYS_clone, [flags(libc::CLONE_NEWPID | libc::SIGCHLD), 0, 0, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0, 0]),
        ("unshare CLONE_NEWUSER", libc::SYS_unshare, [flags(libc::CLONE_NEWUSER), 0, 0, 0, 0, 0]),
        ("unshare CLONE_NEWNS", libc::SYS_unshare, [flags(libc::CLONE_NEWNS), 0, 0, 0, 0, 0]),
        ("unshare CLONE_NEWNET", libc::SYS_unshare, [flags(libc::CLONE_NEWNET), 0, 0, 0, 0, 0]),
        ("unshare CLONE_NEWPID", libc::SYS_unshare, [flags(libc::CLONE_NEWPID), 0, 0, 0, 0, 0]),
        ("setns", libc::SYS_setns, [any_fd, 0, 0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [libc::PTRACE_SEIZE as usize, supervisor, 0, 0, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [supervisor, 0, 0, 0, 0, 0]),
        ("process_vm_writev", libc::SYS_process_vm_writev, [supervisor, 0, 0, 0, 0, 0]),
        ("process_madvise", libc::SYS_process_madvise, [any_fd, 0, 0, 0, 0, 0]),
        ("kcmp", libc::SYS_kcmp, [supervisor, neighbour, 0, 0, 0, 0]),
        ("kill the supervisor", libc::SYS_kill, [supervisor, 0, 0, 0, 0, 0]),
        ("kill everybody", libc::SYS_kill, [none_of, 0, 0, 0, 0, 0]),
        ("tkill", libc::SYS_tkill, [neighbour, 0, 0, 0, 0, 0]),
        ("tgkill of another process", libc::SYS_tgkill, [neighbour, neighbour, 0, 0, 0, 0]),
        ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, [neighbour, 0, 0, 0, 0, 0]),
        ("pidfd_open", libc::SYS_pidfd_open, [supervisor, 0, 0, 0, 0, 0]),
        ("pidfd_send_signal", libc::SYS_pidfd_send_signal, [any_fd, 0, 0, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [any_fd, 0, 0, 0, 0, 0]),
        ("prlimit64 of pid 1", libc::SYS_prlimit64, [1, libc::RLIMIT_NOFILE as usize, 0, 0, 0, 0]),
        ("prlimit64 of its own, to be set", libc::SYS_prlimit64, [0, libc::RLIMIT_AS as usize, 1, 0, 0, 0]),
        ("setpriority", libc::SYS_setpriority, [0, supervisor, 0, 0, 0, 0]),
        ("sched_setaffinity", libc::SYS_sched_setaffinity, [supervisor, 0, 0, 0, 0, 0]),
        ("sched_setscheduler", libc::SYS_sched_setscheduler, [supervisor, 0, 0, 0, 0, 0]),
        ("ioprio_set", libc::SYS_ioprio_set, [1, supervisor, 0, 0, 0, 0]),
        ("move_pages", libc::SYS_move_pages, [supervisor, 0, 0, 0, 0, 0]),
        ("get_robust_list", libc::SYS_get_robust_list, [supervisor, 0, 0, 0, 0, 0]),
        ("setuid", libc::SYS_setuid, [0; 6]),
        ("setresgid", libc::SYS_setresgid, [0; 6]),
        ("setsid", libc::SYS_setsid, [0; 6]),
        ("personality READ_IMPLIES_EXEC", libc::SYS_personality, [flags(libc::READ_IMPLIES_EXEC), 0, 0, 0, 0, 0]),
        ("prctl PR_SET_DUMPABLE", libc::SYS_prctl, [flags(libc::PR_SET_DUMPABLE), 1, 0, 0, 0, 0]),
        ("prctl PR_SET_MM", libc::SYS_prctl, [flags(libc::PR_SET_MM), 0, 0, 0, 0, 0]),
        ("prctl PR_CAP_AMBIENT", libc::SYS_prctl, [flags(libc::PR_CAP_AMBIENT), 2, 21, 0, 0, 0]),
        ("seccomp", libc::SYS_seccomp, [1, 0, 0, 0, 0, 0]),
        // Mounts and the root.
        ("mount", libc::SYS_mount, [at(c"tmpfs"), at(c"/none"), at(c"tmpfs"), 0, 0, 0]),
        ("umount2", libc::SYS_umount2, [at(c"/none"), flags(libc::MNT_DETACH), 0, 0, 0, 0]),
        ("pivot_root", libc::SYS_pivot_root, [at(c"."), at(c"."), 0, 0, 0, 0]),
        ("chroot", libc::SYS_chroot, [at(c"/"), 0, 0, 0, 0, 0]),
        ("open_tree", libc::SYS_open_tree, [any_fd, at(none), 1, 0, 0, 0]),
        ("open_tree_attr", OPEN_TREE_ATTR, [any_fd, at(none), 1, 0, 0, 0]),
        ("move_mount", libc::SYS_move_mount, [any_fd, at(none), any_fd, at(none), 0, 0]),
        ("fsopen", libc::SYS_fsopen, [at(c"tmpfs"), 0, 0, 0, 0, 0]),
        ("fsconfig", libc::SYS_fsconfig, [any_fd, 0, 0, 0, 0, 0]),
        ("fsmount", libc::SYS_fsmount, [any_fd, 0, 0, 0, 0, 0]),
        ("fspick", libc::SYS_fspick, [any_fd, at(none), 0, 0, 0, 0]),
        ("mount_setattr", libc::SYS_mount_setattr, [any_fd, at(none), 0, 0, 0, 0]),
        ("statmount", STATMOUNT, [0; 6]),
        ("listmount", LISTMOUNT, [0; 6]),
        ("name_to_handle_at", libc::SYS_name_to_handle_at, [any_fd, at(none), 0, 0, 0, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [any_fd, 0, 0, 0, 0, 0]),
        ("fanotify_init", libc::SYS_fanotify_init, [0; 6]),
        ("inotify_init1", libc::SYS_inotify_init1, [0; 6]),
        ("quotactl", libc::SYS_quotactl, [0; 6]),
        ("quotactl_fd", libc::SYS_quotactl_fd, [0; 6]),
        ("ioctl FIFREEZE", libc::SYS_ioctl, [any_fd, FIFREEZE, 0, 0, 0, 0]),
        ("ioctl FUSE_DEV_IOC_CLONE", libc::SYS_ioctl, [any_fd, FUSE_DEV_IOC_CLONE, 0, 0, 0, 0]),
        ("ioctl FS_IOC_SETFLAGS", libc::SYS_ioctl, [any_fd, libc::FS_IOC_SETFLAGS as usize, 0, 0, 0, 0]),
        ("ioctl TIOCSTI", libc::SYS_ioctl, [2, libc::TIOCSTI as usize, 0, 0, 0, 0]),
        ("fcntl F_SETOWN, signals to others", libc::SYS_fcntl, [any_fd, flags(libc::F_SETOWN), supervisor, 0, 0, 0]),
        ("fcntl F_SETLEASE", libc::SYS_fcntl, [any_fd, flags(libc::F_SETLEASE), 0, 0, 0, 0]),
        // Sockets and descriptors of others.
        ("socket AF_INET", libc::SYS_socket, [flags(libc::AF_INET), 1, 0, 0, 0, 0]),
        ("socket AF_UNIX", libc::SYS_socket, [flags(libc::AF_UNIX), 1, 0, 0, 0, 0]),
        ("socket AF_NETLINK", libc::SYS_socket, [flags(libc::AF_NETLINK), 3, 0, 0, 0, 0]),
        ("socket AF_PACKET", libc::SYS_socket, [flags(libc::AF_PACKET), 3, 0, 0, 0, 0]),
        ("socket AF_VSOCK", libc::SYS_socket, [flags(libc::AF_VSOCK), 1, 0, 0, 0, 0]),
        ("socket AF_ALG", libc::SYS_socket, [flags(libc::AF_ALG), 5, 0, 0, 0, 0]),
        ("socketpair AF_TIPC", libc::SYS_socketpair, [30, 5, 0, 0, 0, 0]),
        ("connect", libc::SYS_connect, [any_fd, 0, 0, 0, 0, 0]),
        ("bind", libc::SYS_bind, [any_fd, 0, 0, 0, 0, 0]),
        ("listen", libc::SYS_listen, [any_fd, 0, 0, 0, 0, 0]),
        ("getsockopt, a pidfd of the peer", libc::SYS_getsockopt, [any_fd, 1, 77, 0, 0, 0]),
        ("setsockopt", libc::SYS_setsockopt, [any_fd, 1, 16, 0, 0, 0]),
        ("memfd_create", libc::SYS_memfd_create, [at(c"x"), 0, 0, 0, 0, 0]),
        ("splice", libc::SYS_splice, [any_fd, 0, any_fd, 0, 0, 0]),
        ("signalfd4", libc::SYS_signalfd4, [none_of, 0, 8, 0, 0, 0]),
        ("shmget", libc::SYS_shmget, [1, 4096, 0o1600, 0, 0, 0]),
        ("msgget", libc::SYS_msgget, [1, 0o1600, 0, 0, 0, 0]),
        ("mq_open", libc::SYS_mq_open, [at(c"x"), 0, 0, 0, 0, 0]),
        // What faults of the kernel are found in.
        ("bpf", libc::SYS_bpf, [0; 6]),
        ("perf_event_open", libc::SYS_perf_event_open, [0; 6]),
        ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0]),
        ("io_uring_enter", libc::SYS_io_uring_enter, [0; 6]),
        ("io_uring_register", libc::SYS_io_uring_register, [0; 6]),
        ("keyctl", libc::SYS_keyctl, [0; 6]),
        ("add_key", libc::SYS_add_key, [0; 6]),
        ("request_key", libc::SYS_request_key, [0; 6]),
        ("remap_file_pages", libc::SYS_remap_file_pages, [0; 6]),
        ("mprotect, to execute", libc::SYS_mprotect, [0, 4096, flags(libc::PROT_EXEC), 0, 0, 0]),
        ("pkey_mprotect", libc::SYS_pkey_mprotect, [0, 4096, flags(libc::PROT_EXEC), 0, 0, 0]),
        ("madvise MADV_HWPOISON", libc::SYS_madvise, [0, 0, flags(libc::MADV_HWPOISON), 0, 0, 0]),
        ("mbind", libc::SYS_mbind, [0; 6]),
        // The machine.
        ("reboot", libc::SYS_reboot, [0; 6]),
        ("kexec_load", libc::SYS_kexec_load, [0; 6]),
        ("kexec_file_load", libc::SYS_kexec_file_load, [none_of, none_of, 0, 0, 0, 0]),
        ("init_module", libc::SYS_init_module, [0; 6]),
        ("finit_module", libc::SYS_finit_module, [none_of, 0, 0, 0, 0, 0]),
        ("delete_module", libc::SYS_delete_module, [at(c"none"), 0, 0, 0, 0, 0]),
        ("swapon", libc::SYS_swapon, [at(none), 0, 0, 0, 0, 0]),
        ("swapoff", libc::SYS_swapoff, [at(none), 0, 0, 0, 0, 0]),
        ("acct", libc::SYS_acct, [at(none), 0, 0, 0, 0, 0]),
        ("sethostname", libc::SYS_sethostname, [0, none_of, 0, 0, 0, 0]),
        ("setdomainname", libc::SYS_setdomainname, [0, none_of, 0, 0, 0, 0]),
        ("settimeofday", libc::SYS_settimeofday, [0; 6]),
        ("clock_settime", libc::SYS_clock_settime, [0; 6]),
        ("clock_adjtime", libc::SYS_clock_adjtime, [0; 6]),
        ("adjtimex", libc::SYS_adjtimex, [0; 6]),
        ("syslog", libc::SYS_syslog, [10, 0, 0, 0, 0, 0]),
        ("vhangup", libc::SYS_vhangup, [0; 6]),
        ("a call of a later kernel", 999, [0; 6]),
    ];
    #[cfg(target_arch = "x86_64")]
    list.extend([
        ("fork", libc::SYS_fork, [0; 6]),
        ("vfork", libc::SYS_vfork, [0; 6]),
        ("iopl", libc::SYS_iopl, [3, 0, 0, 0, 0, 0]),
        ("ioperm", libc::SYS_ioperm, [0, 1, 1, 0, 0, 0]),
        ("modify_ldt", libc::SYS_modify_ldt, [0; 6]),
        ("open", libc::SYS_open, [at(c"/etc/passwd"), 0, 0, 0, 0, 0]),
        ("mknod", libc::SYS_mknod, [at(c"x"), libc::S_IFCHR as usize, 0x103, 0, 0, 0]),
        ("epoll_create", libc::SYS_epoll_create, [1, 0, 0, 0, 0, 0]),
    ]);
    let try_it = |(what, number, arguments): (&str, libc::c_long, [usize; 6])| {
        let refused = call(number, arguments).err();
        let escaped = !matches!(refused, Some(Errno::PERM | Errno::NOSYS));
        Attempt { what: what.to_owned(), refused: refused.map(Errno::raw_os_error), escaped }
    };
    let mut all: Vec<Attempt> = list.into_iter().map(try_it).collect();
    all.push(capabilities_back());
    all
}

/// All of root's capabilities again.
fn capabilities_back() -> Attempt {
    let now = rustix::thread::capabilities(None);
    let refused = now.and_then(|mut sets| {
        (sets.permitted, sets.effective) = (rustix::thread::CapabilitySet::all(), rustix::thread::CapabilitySet::all());
        rustix::thread::set_capabilities(None, sets)
    });
    let refused = refused.err().map(Errno::raw_os_error);
    Attempt { what: "capset of everything".to_owned(), refused, escaped: refused.is_none() }
}

// Numbers of Linux 6.8 and 6.15 (scripts/syscall.tbl).
const STATMOUNT: libc::c_long = 457;
const LISTMOUNT: libc::c_long = 458;
const OPEN_TREE_ATTR: libc::c_long = 467;
/// linux/fs.h
const FIFREEZE: usize = 0xc004_5877;
/// linux/fuse.h
const FUSE_DEV_IOC_CLONE: usize = 0x8004_e500;

fn at(text: &CStr) -> usize {
    text.as_ptr().addr()
}

fn text(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

fn call(number: libc::c_long, arguments: [usize; 6]) -> Tried {
    raw::any_call(number, arguments).map(drop)
}

fn open(dir: i32, path: &str, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    let path = text(path);
    let flags = (flags | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY) as usize;
    raw::opened(raw::any_call(libc::SYS_openat, [dir as usize, at(&path), flags, 0o600, 0, 0]))
}
