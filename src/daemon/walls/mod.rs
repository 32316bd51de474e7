//! The walls around the worker: anyone who takes it over by a hostile image or request has what is served, and nothing else to go on
//! with: no programs, mounts, sockets or other processes.
//!
//! * an empty root of its own, its sources as copies of mounts where no device can be opened (`crate::walls::root`)
//! * `files`: nothing but what is served can be opened (landlock)
//! * `calls`: the system calls that answers need, and no others (seccomp)
//! * here: no new privileges, and of root's capabilities those that answers need
//!
//! Each stands where the others do not: landlock from Linux 5.19 on, a root of its own for root and where users may make namespaces.
//! What cannot be had is logged, and told with the statistics.

mod calls;
mod files;

use rustix::fs::{self, FlockOperation, Mode, OFlags};
use rustix::thread::CapabilitySet;
use serde::Serialize;

use super::TARGET;
use super::sources::Sources;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::sys::mountinfo::MountInfo;
use crate::tree::dir::ActAs;
use crate::volume::Access;
use crate::walls;
use crate::walls::calls::Devices;
use crate::walls::root::{self, NewUsers, Wanted};

/// What is left of the host in the empty root: the process's own descriptors; and figures of FUSE connections, for kernels that lose
/// requests (before Linux 6.9).
const KEPT: [&str; 2] = [root::OWN_DESCRIPTORS, "/sys/fs/fuse/connections"];

/// Capabilities that answers to root's and others' requests need, of those that root has, each with the request.
///
/// Not SYS_RESOURCE, which setfsuid(2) leaves in place: with it every caller would get the blocks that a file system keeps for root.
/// Root has those by its uid.
const NEEDED: [CapabilitySet; 10] = [
    // setattr of an owner, by root.
    CapabilitySet::CHOWN,
    // Everything that root's programs do with files that are not theirs: open, create, unlink, rename.
    CapabilitySet::DAC_OVERRIDE,
    // The same for lookup and readdir.
    CapabilitySet::DAC_READ_SEARCH,
    // setattr of mode and times, setxattr, removexattr, and unlink in sticky directories, by root on files of others.
    CapabilitySet::FOWNER,
    // setattr, write and fallocate by root, which leave set-group-id.
    CapabilitySet::FSETID,
    // Any request that changes something: it is done with the caller's file system ids and groups.
    CapabilitySet::SETUID,
    CapabilitySet::SETGID,
    // setxattr of security.capability, by root.
    CapabilitySet::SETFCAP,
    // mknod of a device, by root.
    CapabilitySet::MKNOD,
    // getxattr and setxattr of `trusted.` attributes, and of `security.` ones, by root (xattr(7)). Mounting and the like is refused
    // by the filter of system calls, whatever the capability says.
    CapabilitySet::SYS_ADMIN,
];

/// What stands.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Walls {
    no_new_privileges: bool,
    /// The filter of system calls.
    seccomp: bool,
    /// How many system calls it allows.
    system_calls: usize,
    /// No further thread can be started.
    threads_closed: bool,
    /// The rule that only what is served can be opened.
    landlock: bool,
    /// An empty root of its own.
    own_root: bool,
    /// No device node can be opened on volumes and layers, and nothing executed.
    devices_closed: bool,
    /// Capabilities left, by the kernel's numbers (capability.h), in hex.
    capabilities: String,
}

/// Raise them around this process, all its threads to come among it; it must have one thread. The sources are changed for copies
/// that are the same to answers.
pub(super) fn raise(plan: &Plan, sources: &mut Sources) -> Walls {
    let landlock = crate::walls::files::is_offered();
    // Asked here: in a user namespace of its own it would have every capability over its user's files.
    let acts_for_callers = rustix::process::geteuid().is_root() || ActAs::detect() == ActAs::Caller;
    // Whose files they are is told by the index, or by the disk. In a user namespace the disk tells of one user alone, so that is
    // entered only where nothing is read from the disk, or nothing else keeps the worker from the host's files.
    let from_the_index = plan.index.is_some() && plan.volumes.is_empty();
    let users = if from_the_index || !landlock { NewUsers::May } else { NewUsers::MayNot };
    let enclosed = enclose(plan, sources, users);
    // Opened between two walls: in the new root, and by a name that landlock refuses.
    super::figures::descriptors();
    // It starts no program. Should someone make it start one, that gains nothing by being setuid.
    let privileges =
        rustix::thread::set_no_new_privs(true).inspect_err(|e| log::warn!(target: TARGET, "no_new_privs: {e}"));
    let restricted = landlock
        && files::restrict(plan, sources).unwrap_or_else(|e| {
            log::warn!(target: TARGET, "no landlock: {e}");
            false
        });
    let needed = if acts_for_callers { walls::union(&NEEDED) } else { CapabilitySet::empty() };
    let capabilities = walls::drop_capabilities(needed).unwrap_or_else(|e| {
        log::warn!(target: TARGET, "drop capabilities: {e}");
        CapabilitySet::all()
    });
    let devices = if enclosed.copies { Devices::Closed } else { Devices::Refused };
    let wanted = crate::fault::point("walls.calls").map_err(|e| e.to_string());
    let filter = wanted.and_then(|()| calls::filter(devices)).and_then(|(program, allowed)| {
        seccompiler::apply_filter(&program).map(|()| allowed).map_err(|e| e.to_string())
    });
    if let Err(e) = &filter {
        log::warn!(target: TARGET, "no seccomp filter: {e}");
    }
    Walls {
        no_new_privileges: privileges.is_ok(),
        seccomp: filter.is_ok(),
        system_calls: filter.unwrap_or(0),
        threads_closed: false,
        landlock: restricted,
        own_root: enclosed.root,
        devices_closed: enclosed.copies,
        capabilities: format!("{:x}", capabilities.bits()),
    }
}

impl Walls {
    /// All threads that the worker will have stand: there will be no more.
    pub(super) fn close_threads(&mut self) {
        let closed = walls::calls::close_threads();
        self.threads_closed = closed.inspect_err(|e| log::warn!(target: TARGET, "threads can be started: {e}")).is_ok();
    }
}

/// A FUSE or overlay mount of this program.
fn is_ours(mount: &MountInfo) -> bool {
    mount.fs_type == crate::fuse::mount::FS_TYPE || mount.source.as_encoded_bytes().starts_with(b"fsprov-")
}

fn enclose(plan: &Plan, sources: &mut Sources, users: NewUsers) -> root::Enclosed {
    let image =
        sources.layers.iter_mut().chain(&mut sources.index).chain(&mut sources.in_use).map(|fd| (fd, Access::Ro));
    let volumes = sources.volumes.iter_mut().zip(&plan.volumes).map(|(fd, volume)| (fd, volume.access));
    let upper = sources.upper.iter_mut().map(|fd| (fd, Access::Rw));
    let mut each: Vec<_> = image.chain(upper).chain(volumes).collect();
    let wanted = Wanted { users, kept: &KEPT, is_foreign: is_ours, covered: Some(&plan.rootfs) };
    let enclosed = root::enclose(&mut each, &wanted);
    if enclosed.copies
        && let Err(error) = hold_again(sources)
    {
        log::warn!(target: TARGET, "{error}");
    }
    enclosed
}

/// The lock that keeps the image is one of the descriptor that was given. From that a way leads up into the store, so that one went,
/// and its copy is locked in its place.
fn hold_again(sources: &mut Sources) -> Result<()> {
    let Some(in_use) = &mut sources.in_use else { return Ok(()) };
    let fail = |e| Error::sys("make a root of its own", "the lock on the image", e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let held = fs::openat(&*in_use, ".", flags, Mode::empty()).map_err(fail)?;
    fs::flock(&held, FlockOperation::NonBlockingLockShared).map_err(fail)?;
    *in_use = held;
    Ok(())
}

/// Play one that was taken over, if the fault point `worker.escapes` says so: answered with the statistics.
#[cfg(feature = "failpoints")]
pub(super) fn attempt_escapes() -> Option<Vec<walls::escapes::Attempt>> {
    let told = || -> Option<String> {
        fail::fail_point!("worker.escapes", |told| told);
        None
    };
    told().map(|told| walls::escapes::attempt(&told))
}
