//! A root of its own for a process: an empty one, and what it works on as copies of mounts.
//!
//! In the copies no program and no setuid bit counts and no device node can be opened. What is mounted below a source from now on is not
//! seen, as with a bind mount.
//!
//! Only for the first steps of a process with one thread.

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::thread::CapabilitySet;

use crate::error::{Error, Result, show};
use crate::sys::mount::{self, AttrSet, Depth};
use crate::sys::mountinfo::{self, MountInfo};
use crate::sys::raw;
use crate::volume::Access;

const OP: &str = "make a root of its own";

/// What a root is made for.
pub(crate) struct Wanted<'a> {
    /// May it be in a new user namespace, where the process has no rights in this one?
    pub(crate) users: NewUsers,
    /// What is left of the host, at the same places. The first must be there.
    pub(crate) kept: &'a [&'a str],
    /// Is it a mount that must be held by none of the copies?
    pub(crate) is_foreign: fn(&MountInfo) -> bool,
    /// A path that leads elsewhere by now: nothing below it is opened by its name.
    pub(crate) covered: Option<&'a Path>,
}

/// Each source with what may be done on it. It becomes its copy.
pub(crate) type Directories<'a> = [(&'a mut OwnedFd, Access)];

/// This process's descriptors, by which what is O_PATH is opened again.
pub(crate) const OWN_DESCRIPTORS: &str = "/proc/self/fd";

/// What was achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Enclosed {
    /// The sources are copies where no device can be opened.
    pub(crate) copies: bool,
    /// Nothing else can be named.
    pub(crate) root: bool,
}

/// May the worker go into a user namespace for it, where it has no rights in this one?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewUsers {
    May,
    /// Owners are to be told as they are: in a user namespace all but the user's own are nobody's (stat(2)).
    MayNot,
}

/// Go there, as far as this host lets us; what cannot be had is logged, and the sources are good in any case.
pub(crate) fn enclose(sources: &mut Directories<'_>, wanted: &Wanted<'_>) -> Enclosed {
    let has_rights = rustix::thread::capabilities(None).is_ok_and(|c| c.effective.contains(CapabilitySet::SYS_ADMIN));
    let result = if has_rights {
        enclose_root(sources, wanted)
    } else if wanted.users == NewUsers::May {
        enclose_user(sources, wanted)
    } else {
        Ok(NOTHING)
    };
    result.unwrap_or_else(|error| {
        log::warn!(target: super::TARGET, "{error}");
        NOTHING
    })
}

const NOTHING: Enclosed = Enclosed { copies: false, root: false };

fn enclose_root(sources: &mut Directories<'_>, wanted: &Wanted<'_>) -> Result<Enclosed> {
    let copies = sources.iter().map(|(fd, access)| copy(fd, *access)).collect::<Result<Vec<_>>>()?;
    let root = unshare(raw::Users::Same).and_then(|()| leave(&copies, wanted));
    // Without a name for what is mounted within them, copies that hold a rootfs would keep it when it is unmounted.
    let are_usable = root.is_ok() || (copies.iter().all(|c| c.is_closed) && !has_foreign_within(sources, wanted)?);
    let enclosed = Enclosed { copies: are_usable, root: told(root) };
    if are_usable {
        replace(sources, copies);
    }
    Ok(enclosed)
}

/// An ordinary user: in a new user namespace, which has rights over copies of the mounts that are there, and over no descriptor of
/// the mounts that were. So the sources are opened again, by the names they have, and must be the same files.
fn enclose_user(sources: &mut Directories<'_>, wanted: &Wanted<'_>) -> Result<Enclosed> {
    if has_foreign_within(sources, wanted)? {
        // In a copy it could not be taken away: what was mounted before the namespace was made is locked in it.
        return Err(Error::new(crate::Kind::Unsupported, OP, "", "a rootfs is mounted within a source"));
    }
    let mut again: Vec<(PathBuf, (u64, u64), Access)> = Vec::new();
    for (fd, access) in &*sources {
        let path = crate::sys::fs::path_of(&**fd)?;
        if wanted.covered.is_some_and(|covered| path.starts_with(covered)) {
            // Its name leads into our own mount by now, where nobody answers.
            return Err(Error::new(crate::Kind::Unsupported, OP, show(&path), "the rootfs lies over it"));
        }
        again.push((path, identity(fd)?, *access));
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(raw::Users::New)?;
    let maps = [
        ("setgroups", "deny".to_owned()),
        ("gid_map", format!("{gid} {gid} 1")),
        ("uid_map", format!("{uid} {uid} 1")),
    ];
    for (file, text) in maps {
        let path = format!("/proc/self/{file}");
        std::fs::write(&path, text).map_err(|e| Error::io(OP, path, e))?;
    }
    let copies = again.into_iter().map(|(path, was, access)| {
        let found = crate::sys::fs::open_beneath(root_now()?, path.strip_prefix("/").unwrap_or(&path), OFlags::PATH)
            .map_err(|e| Error::sys(OP, show(&path), e))?;
        if identity(&found)? != was {
            return Err(Error::new(crate::Kind::Busy, OP, show(&path), "another file has this name now"));
        }
        copy(&found, access)
    });
    let copies = copies.collect::<Result<Vec<_>>>()?;
    leave(&copies, wanted)?;
    replace(sources, copies);
    Ok(Enclosed { copies: true, root: true })
}

fn unshare(users: raw::Users) -> Result<()> {
    // A test takes this wall away.
    crate::fault::point("walls.root")?;
    raw::unshare_mounts(users).map_err(|e| Error::sys(OP, "unshare", e).hint("landlock is left"))
}

fn replace(sources: &mut Directories<'_>, copies: Vec<MountCopy>) {
    for ((fd, _), copy) in sources.iter_mut().zip(copies) {
        **fd = copy.fd;
    }
}

/// Is such a mount within one of the sources?
fn has_foreign_within(sources: &Directories<'_>, wanted: &Wanted<'_>) -> Result<bool> {
    let foreign: Vec<PathBuf> =
        mountinfo::read()?.into_iter().filter(wanted.is_foreign).map(|mount| mount.point).collect();
    for (fd, _) in sources {
        let path = crate::sys::fs::path_of(&**fd)?;
        if foreign.iter().any(|point| point.starts_with(&path)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn told(result: Result<()>) -> bool {
    result.inspect_err(|error| log::warn!(target: super::TARGET, "{error}")).is_ok()
}

/// A source as a copy of its mount, and of those within it.
struct MountCopy {
    fd: OwnedFd,
    attrs: AttrSet<'static>,
    /// Its attributes are set. If not (before Linux 5.12), they can be once it has a name.
    is_closed: bool,
}

fn copy(source: &OwnedFd, access: Access) -> Result<MountCopy> {
    let fail = |call: &'static str| move |e| Error::sys(OP, call, e);
    let fd = mount::open_tree_clone(source, Depth::Recursive).map_err(fail("open_tree"))?;
    let attrs = AttrSet { read_only: access == Access::Ro, private: true, ..CLOSED };
    match mount::set_attr_recursive(&fd, &attrs) {
        Ok(()) => Ok(MountCopy { fd, attrs, is_closed: true }),
        Err(Errno::NOSYS) => Ok(MountCopy { fd, attrs, is_closed: false }),
        Err(e) => Err(fail("mount_setattr")(e)),
    }
}

const CLOSED: AttrSet<'static> =
    AttrSet { read_only: false, nosuid: true, nodev: true, noexec: true, private: false, idmap: None };

fn root_now() -> Result<OwnedFd> {
    crate::sys::fs::open_path(Path::new("/")).map_err(|e| Error::sys(OP, "/", e))
}

fn identity(fd: &OwnedFd) -> Result<(u64, u64)> {
    fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).map_err(|e| Error::sys(OP, "a source", e))
}

/// Where copies lie in the empty root, by number. They are used by descriptor.
const PLACES: &str = "sources";

/// Leave the host's root for an empty one that holds the copies, in a mount namespace that is this process's alone.
fn leave(copies: &[MountCopy], wanted: &Wanted<'_>) -> Result<()> {
    let fail = |call: &'static str| move |e: Errno| Error::sys(OP, call, e);
    mount::make_private(root_now()?)?;
    let empty = mount::empty_tmpfs()?;
    let proc = crate::sys::fs::open_path(Path::new("/proc")).map_err(fail("open /proc"))?;
    // First: before Linux 6.15 nothing can be attached to what is attached nowhere.
    mount::move_mount_to(&empty, root_now()?).map_err(fail("move_mount"))?;
    for place in wanted.kept {
        match crate::sys::fs::open_path(Path::new(place)) {
            Ok(there) => {
                let kept = mount::open_tree_clone(&there, Depth::One).map_err(|e| Error::sys(OP, *place, e))?;
                mount::attach_below(&empty, Path::new(place.trim_start_matches('/')), &kept, 0o755)?;
            }
            Err(Errno::NOENT | Errno::ACCESS) if wanted.kept.first() != Some(place) => {}
            Err(e) => return Err(Error::sys(OP, *place, e)),
        }
    }
    for (number, copy) in copies.iter().enumerate() {
        mount::attach_below(&empty, &Path::new(PLACES).join(number.to_string()), &copy.fd, 0o755)?;
    }
    rustix::process::fchdir(&empty).map_err(fail("fchdir"))?;
    // The new root over the old one, and the old one over that (pivot_root(2), "." twice).
    rustix::process::pivot_root(".", ".").map_err(fail("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(fail("umount2"))?;
    rustix::process::chdir("/").map_err(fail("chdir"))?;
    close(&proc, copies, wanted.is_foreign)
}

/// Take away what must not be held, and close the rest: nothing is left of the old root but `proc`, which goes after this.
fn close(proc: &OwnedFd, copies: &[MountCopy], is_foreign: fn(&MountInfo) -> bool) -> Result<()> {
    let table = fs::openat(proc, "self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut text = Vec::new();
    table
        .map_err(std::io::Error::from)
        .and_then(|table| std::fs::File::from(table).read_to_end(&mut text))
        .map_err(|e| Error::io(OP, "mountinfo", e))?;
    for mount in mountinfo::parse(&text)? {
        let fail = |e: Errno| Error::sys(OP, show(&mount.point), e);
        let number = mount.point.strip_prefix(Path::new("/").join(PLACES)).ok().and_then(|rest| rest.iter().next());
        let copy = number.and_then(|number| copies.get(number.to_str()?.parse::<usize>().ok()?));
        let is_within = mount.point.components().count() > 3;
        if copy.is_some() && is_within && is_foreign(&mount) {
            // A rootfs, perhaps this one: held here it would go on after it is unmounted, and so would this process.
            match rustix::mount::unmount(&mount.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                // With one that it lay in.
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
                Err(e) => return Err(fail(e)),
            }
            continue;
        }
        match copy {
            Some(copy) if copy.is_closed => {}
            Some(copy) => match mount::set_attr_at(&mount, &copy.attrs) {
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) if is_within => {}
                other => other.map_err(fail)?,
            },
            None => mount::set_attr_at(&mount, &AttrSet { read_only: true, ..CLOSED }).map_err(fail)?,
        }
    }
    Ok(())
}
