//! The worker confined: calls that no answer to a FUSE request needs are refused for good (seccomp(2)), so that who finds a fault
//! in it by a hostile image or request has neither programs nor mounts, sockets or other processes to go on with.
//!
//! A list of what is refused, not of what is allowed: what a libc or an allocator calls tomorrow must not end a rootfs. The refusal
//! is EPERM, not death. Beside it: only what is served can be opened (landlock(7)), and of root's capabilities it keeps those that
//! answers need.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};
use rustix::thread::CapabilitySet;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use serde::Serialize;

use super::TARGET;
use super::sources::Sources;
use crate::plan::Plan;
use crate::volume::{Access, Form};

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

/// Capabilities that answers to requests need, of those that root has: acting as any caller on any file, and making what a
/// caller may make. SYS_ADMIN is for `trusted.` attributes, which root's programs may set on a volume (xattr(7)); mounting and the
/// like is refused above whatever the capability says. Not SYS_RESOURCE, which setfsuid(2) leaves in place: with it every caller
/// would get the blocks that a file system keeps for root. Root has those by its uid.
const NEEDED: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SYS_ADMIN);

/// What of it is in force.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Confined {
    no_new_privileges: bool,
    /// The filter of system calls.
    seccomp: bool,
    /// The rule that only what is served can be opened.
    landlock: bool,
    /// Capabilities left, by the kernel's numbers (capability.h), in hex.
    capabilities: String,
}

/// Confine this process, all its threads to come among it. What cannot be had is logged: an old kernel, or an architecture that
/// the filter is not made for.
pub(super) fn confine(plan: &Plan, sources: &Sources) -> Confined {
    // It starts no program. Should someone make it start one, that gains nothing by being setuid.
    let privileges =
        rustix::thread::set_no_new_privs(true).inspect_err(|e| log::warn!(target: TARGET, "no_new_privs: {e}"));
    let landlock = restrict_files(plan, sources).unwrap_or_else(|e| {
        log::warn!(target: TARGET, "no landlock: {e}");
        false
    });
    let capabilities = drop_capabilities().unwrap_or_else(|e| {
        log::warn!(target: TARGET, "drop capabilities: {e}");
        CapabilitySet::all()
    });
    let filter = filter().and_then(|program| seccompiler::apply_filter(&program).map_err(|e| e.to_string()));
    if let Err(e) = &filter {
        log::warn!(target: TARGET, "no seccomp filter: {e}");
    }
    Confined {
        no_new_privileges: privileges.is_ok(),
        seccomp: filter.is_ok(),
        landlock,
        capabilities: format!("{:x}", capabilities.bits()),
    }
}

fn drop_capabilities() -> rustix::io::Result<CapabilitySet> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective &= NEEDED;
    sets.permitted &= NEEDED;
    sets.inheritable = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, sets)?;
    Ok(sets.effective)
}

/// Only layers and volumes can be opened from now on, volumes for writing where they are `rw`; and of the rest /proc and fusectl for
/// reading (a caller's groups, our own descriptors and figures). `false`: this kernel has no landlock that would do.
///
/// Descriptors that are open stay good. Rights of a process below /proc/PID are the kernel's own affair (ptrace(2)).
fn restrict_files(plan: &Plan, sources: &Sources) -> Result<bool, RulesetError> {
    // Before the second version (Linux 5.19) no name can be moved between directories under any rule.
    let abi = ABI::V5;
    let all = AccessFs::from_all(abi);
    let try_it = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer);
    if let Err(e) = try_it {
        log::debug!(target: TARGET, "no landlock: {e}");
        return Ok(false);
    }
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let of_file = AccessFs::from_file(abi);
    let mut rules = Ruleset::default()
        .handle_access(all)?
        .handle_access(AccessNet::from_all(abi))?
        // No signals to processes of ours beside it (Linux 6.12).
        .scope(Scope::Signal)?
        .create()?
        // We say no_new_privs ourselves.
        .no_new_privs(false);
    for layer in &sources.layers {
        rules = rules.add_rule(PathBeneath::new(layer, read))?;
    }
    if let Some(index) = &sources.index {
        rules = rules.add_rule(PathBeneath::new(index, AccessFs::ReadFile))?;
    }
    for (volume, source) in plan.volumes.iter().zip(&sources.volumes) {
        let of_form = if volume.form == Form::Directory { all } else { of_file };
        let access = match volume.access {
            Access::Rw => of_form & !AccessFs::Execute,
            Access::Ro => of_form & read,
        };
        rules = rules.add_rule(PathBeneath::new(source, access))?;
    }
    for path in ["/proc", "/sys/fs/fuse"] {
        // Without /proc nothing works, which whoever needs it says.
        if let Ok(place) = crate::sys::fs::open_path(Path::new(path)) {
            rules = rules.add_rule(PathBeneath::new(place, read))?;
        }
    }
    Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
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

    #[test]
    fn only_what_is_served_can_be_opened_and_only_rw_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["layer", "rw", "rw/sub", "ro", "secret"] {
            std::fs::create_dir(path(name)).unwrap();
            std::fs::write(path(name).join("f"), "x").unwrap();
        }
        let open = |name: &str| crate::sys::fs::open_path(&path(name)).unwrap();
        let volumes = vec![open("rw"), open("ro")];
        let sources = Sources { layers: vec![open("layer")], index: None, volumes, in_use: None };
        let volume = |name: &str, access| crate::volume::Volume {
            source: path(name),
            target: crate::volume::ContainerPath::new(format!("/{name}").as_ref()).unwrap(),
            access,
            form: Form::Directory,
        };
        let plan = Plan {
            id: "a".parse().unwrap(),
            rootfs: "/r".into(),
            layers: Vec::new(),
            index: None,
            is_filtered: false,
            has_whiteouts: false,
            volumes: vec![volume("rw", Access::Rw), volume("ro", Access::Ro)],
            ownership: crate::plan::Ownership::default(),
            live: crate::plan::Live::default(),
            scratch: None,
            state_dir: "/s".into(),
        };
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            if !restrict_files(&plan, &sources).unwrap() {
                return; // this kernel has none
            }
            let refused = |result: std::io::Result<()>, what: &str| {
                let errno = result.unwrap_err().raw_os_error();
                assert_eq!(errno, Some(libc::EACCES), "{what}");
            };
            let root = dir.path();
            let path = |name: &str| root.join(name);
            for served in ["layer/f", "rw/f", "rw/sub/f", "ro/f"] {
                assert_eq!(std::fs::read(path(served)).unwrap(), b"x", "{served}");
            }
            refused(std::fs::read(path("secret/f")).map(drop), "read beside");
            refused(std::fs::write(path("secret/n"), "x"), "write beside");
            refused(std::fs::write(path("layer/f"), "y"), "write to a layer");
            refused(std::fs::write(path("ro/f"), "y"), "write to a ro volume");
            refused(std::fs::create_dir(path("ro/n")), "make in a ro volume");
            std::fs::write(path("rw/n"), "y").unwrap();
            std::fs::create_dir(path("rw/d")).unwrap();
            // Between directories, and through a descriptor's magic link, as the tree does.
            std::fs::rename(path("rw/n"), path("rw/d/n")).unwrap();
            let file = std::fs::File::open(path("rw/d/n")).unwrap();
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
            rustix::fs::linkat(
                rustix::fs::CWD,
                &link,
                rustix::fs::CWD,
                path("rw/sub/l"),
                rustix::fs::AtFlags::SYMLINK_FOLLOW,
            )
            .unwrap();
            std::fs::File::options().write(true).open(link).unwrap();
            std::fs::remove_file(path("rw/sub/l")).unwrap();
            assert!(std::fs::read_to_string("/proc/self/status").unwrap().contains("NoNewPrivs"));
        })
        .join()
        .unwrap();
    }
}
