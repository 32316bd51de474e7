//! A root of its own for the worker: an empty one, and the layers and volumes as copies of their mounts that are attached nowhere.
//!
//! In the copies no program and no setuid bit counts and no device node can be opened, which is nothing to those who use the rootfs:
//! their kernel goes by the FUSE mount. What is mounted below a source while the rootfs stands is not seen, as with a bind mount.
//!
//! Only for the first steps of a process with one thread.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{self, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags};
use rustix::thread::CapabilitySet;

use super::super::sources::Sources;
use crate::error::{Error, Result, show};
use crate::plan::Plan;
use crate::sys::mount::{self, AttrSet, Depth};
use crate::sys::raw;
use crate::volume::Access;

const OP: &str = "make a root of its own";

/// What is left of the host in the empty root, at the same places: this process's descriptors, by which what is O_PATH is opened
/// again; and figures of FUSE connections, for kernels that lose requests (before Linux 6.9).
const KEPT: [&str; 2] = ["/proc/self/fd", "/sys/fs/fuse/connections"];

/// What was achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Enclosed {
    /// The sources are copies where no device can be opened.
    pub(super) copies: bool,
    /// Nothing else can be named.
    pub(super) root: bool,
}

/// May the worker go into a user namespace for it, where it has no rights in this one?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewUsers {
    May,
    /// Owners are to be told as they are: in a user namespace all but the user's own are nobody's (stat(2)).
    MayNot,
}

/// Go there, as far as this host lets us; what cannot be had is logged, and the sources are good in any case.
pub(super) fn enclose(plan: &Plan, sources: &mut Sources, users: NewUsers) -> Enclosed {
    let nothing = Enclosed { copies: false, root: false };
    // A test takes this wall away and leaves the copies.
    let root = |users| {
        crate::fault::point("walls.root")?;
        raw::unshare_mounts(users).map_err(|e| Error::sys(OP, "unshare", e).hint("landlock is left"))
    };
    let has_rights = rustix::thread::capabilities(None).is_ok_and(|c| c.effective.contains(CapabilitySet::SYS_ADMIN));
    let result = if has_rights {
        copy_all(plan, sources)
            .map(|()| Enclosed { copies: true, root: told(root(raw::Users::Same).and_then(|()| leave())) })
    } else if users == NewUsers::May {
        by_user_namespace(plan, sources, || root(raw::Users::New))
            .map(|()| Enclosed { copies: true, root: told(leave()) })
    } else {
        Ok(nothing)
    };
    let enclosed = result.unwrap_or_else(|error| {
        log::warn!(target: super::TARGET, "{error}");
        nothing
    });
    if enclosed.copies {
        told(hold_again(sources));
    }
    enclosed
}

/// The lock that keeps the image is one of the descriptor that was given. From that a way leads up into the store, so that one went,
/// and its copy is locked in its place.
fn hold_again(sources: &mut Sources) -> Result<()> {
    let Some(in_use) = &mut sources.in_use else { return Ok(()) };
    let fail = |e| Error::sys(OP, "the lock on the image", e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let held = fs::openat(&*in_use, ".", flags, Mode::empty()).map_err(fail)?;
    fs::flock(&held, FlockOperation::NonBlockingLockShared).map_err(fail)?;
    *in_use = held;
    Ok(())
}

fn told(result: Result<()>) -> bool {
    result.inspect_err(|error| log::warn!(target: super::TARGET, "{error}")).is_ok()
}

/// Each source with what may be done on it.
fn each<'a>(plan: &'a Plan, sources: &'a mut Sources) -> impl Iterator<Item = (&'a mut OwnedFd, Access)> {
    let image =
        sources.layers.iter_mut().chain(&mut sources.index).chain(&mut sources.in_use).map(|fd| (fd, Access::Ro));
    image.chain(sources.volumes.iter_mut().zip(&plan.volumes).map(|(fd, volume)| (fd, volume.access)))
}

fn copy(source: &OwnedFd, access: Access) -> Result<OwnedFd> {
    let fail = |call: &'static str| move |e| Error::sys(OP, call, e);
    let copy = mount::open_tree_clone(source, Depth::Recursive).map_err(fail("open_tree"))?;
    let closed = AttrSet {
        read_only: access == Access::Ro,
        nosuid: true,
        nodev: true,
        noexec: true,
        private: true,
        ..AttrSet::default()
    };
    mount::set_attr_recursive(&copy, &closed).map_err(fail("mount_setattr"))?;
    Ok(copy)
}

fn copy_all(plan: &Plan, sources: &mut Sources) -> Result<()> {
    let copies = each(plan, sources).map(|(fd, access)| copy(fd, access)).collect::<Result<Vec<_>>>()?;
    for ((fd, _), copy) in each(plan, sources).zip(copies) {
        *fd = copy;
    }
    Ok(())
}

/// An ordinary user: in a new user namespace, which has rights over copies of the mounts that are there, and over no descriptor of
/// the mounts that were. So the sources are opened again, by the names they have, and must be the same files.
fn by_user_namespace(plan: &Plan, sources: &mut Sources, unshare: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut again: Vec<(PathBuf, (u64, u64), Access)> = Vec::new();
    for (fd, access) in each(plan, sources) {
        let path = crate::sys::fs::path_of(&*fd)?;
        if path.starts_with(&plan.rootfs) {
            // Its name leads into our own mount by now, where nobody answers.
            return Err(Error::new(crate::Kind::Unsupported, OP, show(&path), "the rootfs lies over it"));
        }
        again.push((path, identity(fd)?, access));
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare()?;
    for (file, text) in
        [("setgroups", "deny".to_owned()), ("gid_map", format!("{gid} {gid} 1")), ("uid_map", format!("{uid} {uid} 1"))]
    {
        let path = format!("/proc/self/{file}");
        std::fs::write(&path, text).map_err(|e| Error::io(OP, path, e))?;
    }
    let copies = again.into_iter().map(|(path, was, access)| {
        let found =
            crate::sys::fs::open_beneath(root_of_host()?, path.strip_prefix("/").unwrap_or(&path), OFlags::PATH)
                .map_err(|e| Error::sys(OP, show(&path), e))?;
        if identity(&found)? != was {
            return Err(Error::new(crate::Kind::Busy, OP, show(&path), "another file has this name now"));
        }
        copy(&found, access)
    });
    let copies = copies.collect::<Result<Vec<_>>>()?;
    for ((fd, _), copy) in each(plan, sources).zip(copies) {
        *fd = copy;
    }
    Ok(())
}

fn root_of_host() -> Result<OwnedFd> {
    crate::sys::fs::open_path(Path::new("/")).map_err(|e| Error::sys(OP, "/", e))
}

fn identity(fd: &OwnedFd) -> Result<(u64, u64)> {
    fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).map_err(|e| Error::sys(OP, "a source", e))
}

/// Leave the host's root for an empty one, in a mount namespace that is this process's alone.
fn leave() -> Result<()> {
    let fail = |call: &'static str| move |e: Errno| Error::sys(OP, call, e);
    mount::make_private(root_of_host()?)?;
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(fail("fsopen"))?;
    rustix::mount::fsconfig_set_string(&context, "size", "64k").map_err(fail("fsconfig"))?;
    rustix::mount::fsconfig_create(&context).map_err(fail("fsconfig"))?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let empty = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(fail("fsmount"))?;
    for place in KEPT {
        match crate::sys::fs::open_path(Path::new(place)) {
            Ok(there) => keep(&there, place, &empty)?,
            Err(Errno::NOENT | Errno::ACCESS) if place != KEPT[0] => {}
            Err(e) => return Err(fail("open a place that is kept")(e)),
        }
    }
    mount::move_mount_to(&empty, root_of_host()?).map_err(fail("move_mount"))?;
    rustix::process::fchdir(&empty).map_err(fail("fchdir"))?;
    // The new root over the old one, and the old one over that (pivot_root(2), "." twice).
    rustix::process::pivot_root(".", ".").map_err(fail("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(fail("umount2"))?;
    rustix::process::chdir("/").map_err(fail("chdir"))?;
    let closed = AttrSet { read_only: true, ..AttrSet::default() };
    mount::set_attr_recursive(root_of_host()?, &closed).map_err(fail("mount_setattr"))
}

/// Attach a copy of what is at `there` in the root to come, at `place`.
fn keep(there: &OwnedFd, place: &str, root: &OwnedFd) -> Result<()> {
    let fail = |e: Errno| Error::sys(OP, place, e);
    let copy = mount::open_tree_clone(there, Depth::One).map_err(fail)?;
    let closed = AttrSet { nosuid: true, nodev: true, noexec: true, private: true, ..AttrSet::default() };
    mount::set_attr(&copy, &closed).map_err(fail)?;
    let mut at = PathBuf::new();
    for name in place.split('/').filter(|name| !name.is_empty()) {
        at.push(name);
        match fs::mkdirat(root, &at, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(fail(e)),
        }
    }
    let target = fs::openat(root, &at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(fail)?;
    mount::move_mount_to(&copy, &target).map_err(fail)
}
