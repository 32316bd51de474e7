//! The worker confined: calls that no answer to a FUSE request needs are refused for good (seccomp(2)), so that who finds a fault
//! in it by a hostile image or request has neither programs nor mounts, sockets or other processes to go on with.
//!
//! A list of what is refused, not of what is allowed: what a libc or an allocator calls tomorrow must not end a rootfs. The refusal
//! is EPERM, not death.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::TARGET;

/// What is refused, by what it would give.
const REFUSED: &[libc::c_long] = &[
    // Programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    // Mounts, namespaces, the root.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    // New sockets; it speaks on the one it was given.
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    // Much of the kernel that faults were found in.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // The machine.
    libc::SYS_reboot,
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_acct,
    libc::SYS_open_by_handle_at,
];

/// Confine this process, all its threads to come among it. What cannot be had is logged: an old kernel, or an architecture that
/// the filter is not made for.
pub(super) fn confine() {
    // It starts no program. Should someone make it start one, that gains nothing by being setuid.
    if let Err(e) = rustix::thread::set_no_new_privs(true) {
        log::warn!(target: TARGET, "no_new_privs: {e}");
    }
    if let Err(e) = filter().and_then(|program| seccompiler::apply_filter(&program).map_err(|e| e.to_string())) {
        log::warn!(target: TARGET, "no seccomp filter: {e}");
    }
}

fn filter() -> Result<BpfProgram, String> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
    // An empty chain of conditions: whatever the arguments.
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.iter().map(|&call| (call, Vec::new())).collect();
    // New namespaces are refused; a umask of a thread's own (CLONE_FS) is what a file made for a caller is made under.
    let is_other = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, libc::CLONE_FS as u64);
    let is_other = is_other.and_then(|condition| SeccompRule::new(vec![condition])).map_err(|e| e.to_string())?;
    rules.insert(libc::SYS_unshare, vec![is_other]);
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).map_err(|e| e.to_string())?;
    BpfProgram::try_from(filter).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confined_thread_starts_no_program_and_still_works_on_files() {
        let program = filter().unwrap();
        // The filter holds for the thread that sets it and those it starts: this one ends with the test.
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            seccompiler::apply_filter(&program).unwrap();
            let refused = std::process::Command::new("/bin/true").spawn().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{refused}");
            let socket = std::os::unix::net::UnixStream::connect("/nonexistent").unwrap_err();
            assert_eq!(socket.raw_os_error(), Some(libc::EPERM));
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), "x").unwrap();
            assert_eq!(std::fs::read(file.path()).unwrap(), b"x");
            std::thread::spawn(|| ()).join().unwrap();
            assert_eq!(crate::sys::raw::unshare_fs(), Ok(()), "a umask of its own");
        })
        .join()
        .unwrap();
    }
}
