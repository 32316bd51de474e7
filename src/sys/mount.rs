//! Mounts as values: detached trees, their attributes, attaching by descriptor, unmounting.
//!
//! Fallbacks: each function that has one takes it on ENOSYS alone, and says so in the log once.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    self, FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

use super::{mountinfo, raw};
use crate::error::{Error, Kind, Result, show};

const TARGET: &str = "fsprov::mount";

/// Id of the mount that `fd` (O_PATH will do) lies on.
///
/// Sends no request to a FUSE server: no field is asked for (an empty mask), and the kernel adds the mount id by itself
/// (Linux 5.8). Before that /proc/self/fdinfo tells it (3.15).
pub fn mount_id(fd: impl AsFd) -> Result<u64> {
    const OP: &str = "find the mount id of";
    let fd = fd.as_fd();
    let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    match fs::statx(fd, "", flags, StatxFlags::empty()) {
        Ok(stat) if stat.stx_mask & StatxFlags::MNT_ID.bits() != 0 => return Ok(stat.stx_mnt_id),
        Ok(_) | Err(Errno::NOSYS) => {}
        Err(e) => return Err(Error::sys(OP, "an open file", e)),
    }
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(OP, &path, e).hint("mount /proc"))?;
    fdinfo_mount_id(&text).ok_or_else(|| Error::new(Kind::Io, OP, path, "it has no mnt_id line"))
}

/// The `mnt_id:` line of a /proc/PID/fdinfo file.
pub(crate) fn fdinfo_mount_id(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// [`mount_id`] of a path of the host. A symlink in its last component is not followed.
pub fn mount_id_at(path: &Path) -> Result<u64> {
    let flags = fs::OFlags::PATH | fs::OFlags::NOFOLLOW | fs::OFlags::CLOEXEC;
    let fd = fs::openat(fs::CWD, path, flags, fs::Mode::empty())
        .map_err(|e| Error::sys("find the mount id of", show(path), e))?;
    mount_id(fd)
}

/// statx(2): STATX_MNT_ID_UNIQUE, Linux 6.8.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// The mount's id that is never used again while the machine runs (Linux 6.8). `None`: this kernel has none, or the mount's
/// file system does not talk to us.
pub fn unique_mount_id(fd: impl AsFd) -> Option<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let stat = fs::statx(fd, "", flags, MNT_ID_UNIQUE).ok()?;
    (stat.stx_mask & MNT_ID_UNIQUE.bits() != 0).then_some(stat.stx_mnt_id)
}

/// Does `fd` refer to the root of its mount? STATX_ATTR_MOUNT_ROOT tells since Linux 5.8; before that the mount table does, for
/// what is attached.
pub fn is_mount_root(fd: impl AsFd) -> Result<bool> {
    let fd = fd.as_fd();
    let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    if let Ok(stat) = fs::statx(fd, "", flags, StatxFlags::empty())
        && stat.stx_attributes_mask.contains(fs::StatxAttributes::MOUNT_ROOT)
    {
        return Ok(stat.stx_attributes.contains(fs::StatxAttributes::MOUNT_ROOT));
    }
    let point = super::fs::path_of(fd)?;
    Ok(mountinfo::by_id(mount_id(fd)?)?.is_some_and(|m| m.point == point))
}

/// With what is mounted below, or not?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// This mount alone.
    One,
    /// The mounts below it too.
    Recursive,
}

/// A detached copy of the mount tree at `fd` (open_tree(2) with OPEN_TREE_CLONE, Linux 5.2). It is nowhere to be seen until it
/// is moved into place, and gone when the descriptor is closed before that.
pub fn open_tree_clone(fd: impl AsFd, depth: Depth) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_NO_AUTOMOUNT;
    if depth == Depth::Recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    mount::open_tree(fd, "", flags)
}

/// What to change on mounts. Nothing here takes a flag away: what a source has (nosuid, nodev, noexec) stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttrSet<'a> {
    /// No writing.
    pub read_only: bool,
    /// setuid bits and file capabilities do nothing.
    pub nosuid: bool,
    /// Device nodes cannot be opened.
    pub nodev: bool,
    /// Nothing is executed.
    pub noexec: bool,
    /// Mounts made below are seen nowhere else, and those made elsewhere not here.
    pub private: bool,
    /// Show owners through the maps of this user namespace (MOUNT_ATTR_IDMAP); only on a detached tree.
    pub idmap: Option<BorrowedFd<'a>>,
}

impl AttrSet<'_> {
    fn raw(&self) -> libc::mount_attr {
        let mut attr_set = 0;
        for (wanted, flag) in [
            (self.read_only, libc::MOUNT_ATTR_RDONLY),
            (self.nosuid, libc::MOUNT_ATTR_NOSUID),
            (self.nodev, libc::MOUNT_ATTR_NODEV),
            (self.noexec, libc::MOUNT_ATTR_NOEXEC),
            (self.idmap.is_some(), libc::MOUNT_ATTR_IDMAP),
        ] {
            if wanted {
                attr_set |= flag;
            }
        }
        libc::mount_attr {
            attr_set,
            attr_clr: 0,
            propagation: if self.private { u64::from(MountPropagationFlags::PRIVATE.bits()) } else { 0 },
            userns_fd: self.idmap.map_or(0, |fd| fd.as_raw_fd() as u64),
        }
    }

    fn classic(&self) -> MountFlags {
        let mut flags = MountFlags::empty();
        flags.set(MountFlags::RDONLY, self.read_only);
        flags.set(MountFlags::NOSUID, self.nosuid);
        flags.set(MountFlags::NODEV, self.nodev);
        flags.set(MountFlags::NOEXEC, self.noexec);
        flags
    }
}

/// Set attributes on a mount and all below it, or on none of them (mount_setattr(2), Linux 5.12).
pub fn set_attr_recursive(tree: impl AsFd, attrs: &AttrSet<'_>) -> rustix::io::Result<()> {
    raw::mount_setattr(tree, true, &attrs.raw())
}

/// Set attributes on one mount (mount_setattr(2), Linux 5.12).
pub fn set_attr(tree: impl AsFd, attrs: &AttrSet<'_>) -> rustix::io::Result<()> {
    raw::mount_setattr(tree, false, &attrs.raw())
}

/// Take nosuid and nodev away from one mount of ours, which it was made with (mount_setattr(2)); before Linux 5.12 by a remount. EPERM
/// where they came with it from another user namespace.
pub fn clear_attr(root: impl AsFd, attrs: &AttrSet<'_>) -> Result<()> {
    change_attr(root.as_fd(), &AttrSet::default(), attrs)
}

/// [`set_attr`], before Linux 5.12 by a remount.
pub fn add_attr(root: impl AsFd, attrs: &AttrSet<'_>) -> Result<()> {
    change_attr(root.as_fd(), attrs, &AttrSet::default())
}

fn change_attr(root: BorrowedFd<'_>, set: &AttrSet<'_>, clear: &AttrSet<'_>) -> Result<()> {
    let fail = |e| Error::sys("change the flags of the mount", name_of(root), e);
    let raw = libc::mount_attr { attr_clr: clear.raw().attr_set, ..set.raw() };
    match raw::mount_setattr(root, false, &raw) {
        Err(Errno::NOSYS) => {}
        other => return other.map_err(fail),
    }
    let Some(mount) = mountinfo::by_id(mount_id(root)?)? else { return Err(fail(Errno::NOENT)) };
    let flags = existing_flags(&mount).difference(clear.classic()) | set.classic();
    mount::mount_remount(magic(root), MountFlags::BIND | flags, "").map_err(fail)
}

/// Cut a mount and all below it off from its peers. What is attached below a shared mount becomes shared with it
/// (mount_namespaces(7)), whatever it was before.
pub fn make_private(root: impl AsFd) -> Result<()> {
    let root = root.as_fd();
    match set_attr_recursive(root, &AttrSet { private: true, ..AttrSet::default() }) {
        Err(Errno::NOSYS) => {
            let path = format!("/proc/self/fd/{}", root.as_raw_fd());
            mount::mount_change(path, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        }
        other => other,
    }
    .map_err(|e| Error::sys("make private the mount", name_of(root), e))
}

/// Attach a detached tree on the file or directory that `target` (O_PATH) refers to (move_mount(2), Linux 5.2).
pub fn move_mount_to(tree: impl AsFd, target: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    mount::move_mount(tree, "", target, "", flags)
}

/// A tmpfs of 64 KiB that is attached nowhere yet (fsopen(2), Linux 5.2): for directories and what is attached in it.
pub(crate) fn empty_tmpfs() -> Result<OwnedFd> {
    let fail = |call: &'static str| move |e: Errno| Error::sys("make a tmpfs", call, e);
    let context = mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(fail("fsopen"))?;
    mount::fsconfig_set_string(&context, "size", "64k").map_err(fail("fsconfig"))?;
    mount::fsconfig_create(&context).map_err(fail("fsconfig"))?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(fail("fsmount"))
}

/// Attach what is detached at `place` below `root`, a file system that nobody else changes; the directory or file there is made. `mode` is that of
/// the directories, whatever the umask.
pub(crate) fn attach_below(root: &OwnedFd, place: &Path, tree: &OwnedFd, mode: u32) -> Result<()> {
    let fail = |e: Errno| Error::sys("attach", show(place), e);
    let make = |at: &Path| {
        fs::mkdirat(root, at, Mode::from_raw_mode(mode))?;
        fs::chmodat(root, at, Mode::from_raw_mode(mode), AtFlags::empty())
    };
    let mut above: Vec<&Path> = place.ancestors().skip(1).filter(|at| !at.as_os_str().is_empty()).collect();
    above.reverse();
    for at in above {
        match make(at) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(fail(e)),
        }
    }
    if FileType::from_raw_mode(fs::fstat(tree).map_err(fail)?.st_mode) == FileType::Directory {
        make(place).map_err(fail)?;
    } else {
        fs::mknodat(root, place, FileType::RegularFile, Mode::from_raw_mode(0o600), 0).map_err(fail)?;
    }
    let target = fs::openat(root, place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(fail)?;
    move_mount_to(tree, &target).map_err(fail)
}

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// EBUSY while it is used.
    IfIdle,
    /// Out of sight at once, gone with its last user (MNT_DETACH), with all that is mounted below.
    Lazy,
}

/// What is to be seen at an absolute path without symlinks: the root of the topmost mount there.
pub fn seen_at(path: &Path) -> rustix::io::Result<OwnedFd> {
    let (parent, name) = open_parent(path)?;
    open_name(&parent, name)
}

fn open_parent(path: &Path) -> rustix::io::Result<(OwnedFd, &OsStr)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::INVAL) };
    Ok((super::fs::open_resolved(parent)?, name))
}

fn open_name(parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    fs::openat(parent, name, fs::OFlags::PATH | fs::OFlags::NOFOLLOW | fs::OFlags::CLOEXEC, fs::Mode::empty())
}

/// Unmount this very mount, which must be the topmost at its place: found by the directory that it lies in, which was opened before,
/// so that a part of its path that is renamed or exchanged meanwhile leads nowhere else. EAGAIN: it does not lie there any more.
pub fn unmount_found(found: &mountinfo::MountInfo, how: Unmount) -> rustix::io::Result<()> {
    let (parent, name) = open_parent(&found.point)?;
    let seen = open_name(&parent, name)?;
    let id = mount_id(&seen).map_err(|e| e.errno().unwrap_or(Errno::IO))?;
    // A descriptor of the mount would keep it busy.
    drop(seen);
    if id != found.id {
        return Err(Errno::AGAIN);
    }
    unmount(&Path::new(&magic(parent.as_fd())).join(name), how)
}

/// Unmount the topmost mount at `point`, a place that nobody but us can change. A symlink there is not followed.
pub fn unmount(point: &Path, how: Unmount) -> rustix::io::Result<()> {
    let flags = match how {
        Unmount::IfIdle => UnmountFlags::NOFOLLOW,
        Unmount::Lazy => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    mount::unmount(point, flags)
}

/// Which of the mount calls of Linux 5.12 this kernel, or a seccomp filter, answers with ENOSYS.
pub fn missing_calls() -> Vec<&'static str> {
    // Each call's own refusal of the arguments shows that it is there; none can do anything.
    let root = fs::openat(fs::CWD, "/", fs::OFlags::PATH | fs::OFlags::CLOEXEC, fs::Mode::empty());
    let Ok(root) = root else { return Vec::new() };
    let nothing = AttrSet::default().raw();
    [
        ("open_tree", mount::open_tree(&root, "", OpenTreeFlags::all()).err()),
        ("move_mount", mount::move_mount(&root, "", &root, "", MoveMountFlags::all()).err()),
        ("mount_setattr", raw::mount_setattr(&root, false, &nothing).err()),
    ]
    .into_iter()
    .filter_map(|(name, errno)| (errno == Some(Errno::NOSYS)).then_some(name))
    .collect()
}

static NEW_CALLS_MISSING: AtomicBool = AtomicBool::new(false);

/// Say once that this kernel has not the calls.
fn note_classic(call: &str) {
    if !NEW_CALLS_MISSING.swap(true, Ordering::Relaxed) {
        log::warn!(
            target: TARGET,
            "this kernel has no {call}: bind mounts are built with mount(2), step by step, in a private place"
        );
    }
}

/// A mount that is ready to be attached.
#[derive(Debug)]
pub enum Piece {
    /// A detached tree, its attributes set.
    Detached(OwnedFd),
    /// The directory or file to bind: this kernel cannot build the mount beforehand.
    Classic {
        /// What to bind.
        source: OwnedFd,
        /// A directory of ours that nobody else can enter, where it is built.
        stage: PathBuf,
    },
}

impl Piece {
    /// What to attach for a bind mount of `source` with all that is mounted in it. `stage` is a directory of ours that nobody
    /// else can enter. Idmapping has no fallback: ENOSYS comes back then.
    pub fn bind(source: OwnedFd, stage: &Path, attrs: &AttrSet<'_>) -> rustix::io::Result<Self> {
        let detached = open_tree_clone(&source, Depth::Recursive).and_then(|tree| {
            set_attr_recursive(&tree, attrs)?;
            Ok(tree)
        });
        match detached {
            Ok(tree) => Ok(Piece::Detached(tree)),
            Err(Errno::NOSYS) if attrs.idmap.is_none() => {
                note_classic("open_tree or mount_setattr");
                Ok(Piece::Classic { source, stage: stage.to_owned() })
            }
            Err(e) => Err(e),
        }
    }

    /// Attach it on `target` and give the root of the new mount. `attrs` are those it was made with; `before` sees that root
    /// when everything is ready, and can still prevent it.
    pub fn attach(
        self,
        target: impl AsFd,
        attrs: &AttrSet<'_>,
        before: &mut dyn FnMut(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<OwnedFd> {
        const OP: &str = "mount on";
        let target = target.as_fd();
        match self {
            Piece::Detached(tree) => {
                before(tree.as_fd())?;
                move_mount_to(&tree, target).map_err(|e| Error::sys(OP, name_of(target), e))?;
                Ok(tree)
            }
            Piece::Classic { source, stage } => bind_classic(source.as_fd(), target, &stage, attrs, before),
        }
    }
}

fn name_of(fd: BorrowedFd<'_>) -> String {
    super::fs::path_of(fd).map_or_else(|_| "an open file".into(), show)
}

/// Where directories are built, in the stage.
const STAGE_DIR: &str = "stage-dir";
/// Where files are.
const STAGE_FILE: &str = "stage-file";

/// With mount(2): bind at a private place, set the attributes mount by mount, then move the whole into place. A remount reaches
/// no other namespace, and there must be no moment in which anybody sees a writable mount at the target.
fn bind_classic(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    stage: &Path,
    attrs: &AttrSet<'_>,
    before: &mut dyn FnMut(BorrowedFd<'_>) -> Result<()>,
) -> Result<OwnedFd> {
    const OP: &str = "bind mount at";
    let fail = |e: Errno| Error::sys(OP, show(stage), e);
    // What lies below a shared mount cannot be moved away (mount(2), EINVAL): a mount of its own, private.
    mount::mount_bind(stage, stage).map_err(fail)?;
    let built = mount::mount_change(stage, MountPropagationFlags::PRIVATE)
        .map_err(fail)
        .and_then(|()| build_at_stage(source, stage, attrs))
        .and_then(|(root, place)| {
            before(root.as_fd())?;
            mount::mount_move(&place, magic(target)).map_err(|e| Error::sys("mount on", name_of(target), e))?;
            Ok(root)
        });
    // Our own directory, which nobody else can enter.
    let cleared = unmount(stage, Unmount::Lazy).map_err(|e| Error::sys("unmount", show(stage), e));
    // Empty by now; what is still mounted on refuses to go.
    let _ = fs::rmdir(stage.join(STAGE_DIR));
    let _ = fs::unlink(stage.join(STAGE_FILE));
    match built {
        Ok(root) => cleared.map(|()| root),
        Err(e) => Err(e.with_undo(cleared)),
    }
}

/// A path through which a descriptor is reached: what its name resolves to may have changed since it was opened.
fn magic(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn build_at_stage(source: BorrowedFd<'_>, stage: &Path, attrs: &AttrSet<'_>) -> Result<(OwnedFd, PathBuf)> {
    const OP: &str = "bind mount at";
    let is_dir = fs::fstat(source).is_ok_and(|stat| fs::FileType::from_raw_mode(stat.st_mode).is_dir());
    let place = stage.join(if is_dir { STAGE_DIR } else { STAGE_FILE });
    let fail = |e: Errno| Error::sys(OP, show(&place), e);
    let made = if is_dir {
        fs::mkdir(&place, fs::Mode::RWXU)
    } else {
        let flags = fs::OFlags::CREATE | fs::OFlags::WRONLY | fs::OFlags::NOFOLLOW | fs::OFlags::CLOEXEC;
        fs::open(&place, flags, fs::Mode::RUSR).map(drop)
    };
    match made {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(fail(e)),
    }
    mount::mount_bind_recursive(magic(source), &place).map_err(fail)?;
    let flags = fs::OFlags::PATH | fs::OFlags::NOFOLLOW | fs::OFlags::CLOEXEC;
    let root = fs::openat(fs::CWD, &place, flags, fs::Mode::empty()).map_err(fail)?;
    if attrs.private {
        mount::mount_change(&place, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(fail)?;
    }
    for mount in mountinfo::tree_of(mountinfo::read()?, mount_id(&root)?) {
        set_attr_at(&mount, attrs).map_err(|e| Error::sys(OP, show(&mount.point), e))?;
    }
    Ok((root, place))
}

/// Set attributes, but for propagation and idmap, on an attached mount as mount(2) can since 2.6.26.
pub fn set_attr_at(mount: &mountinfo::MountInfo, attrs: &AttrSet<'_>) -> rustix::io::Result<()> {
    // A bind remount sets all flags: repeat those that are there. In a user namespace dropping a locked one is EPERM.
    let flags = MountFlags::BIND | existing_flags(mount) | attrs.classic();
    mount::mount_remount(&mount.point, flags, "")
}

fn existing_flags(mount: &mountinfo::MountInfo) -> MountFlags {
    [
        ("ro", MountFlags::RDONLY),
        ("nosuid", MountFlags::NOSUID),
        ("nodev", MountFlags::NODEV),
        ("noexec", MountFlags::NOEXEC),
        ("noatime", MountFlags::NOATIME),
        ("nodiratime", MountFlags::NODIRATIME),
        ("relatime", MountFlags::RELATIME),
    ]
    .into_iter()
    .filter(|(name, _)| mount.has_option(name))
    .fold(MountFlags::empty(), |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_id_agrees_with_the_mount_table() {
        for path in ["/", "/proc", "/tmp"] {
            let fd = super::super::fs::open_path(Path::new(path)).unwrap();
            let real = super::super::fs::path_of(&fd).unwrap();
            assert_eq!(mount_id(&fd).unwrap(), mountinfo::holding(&real).unwrap().id, "{path}");
        }
    }

    #[test]
    fn fdinfo_line() {
        assert_eq!(fdinfo_mount_id("pos:\t0\nflags:\t012\nmnt_id:\t29\nino:\t4\n"), Some(29));
        assert_eq!(fdinfo_mount_id("pos:\t0\n"), None);
    }

    #[test]
    fn attributes_as_the_kernel_takes_them() {
        let raw = AttrSet { read_only: true, nodev: true, private: true, ..AttrSet::default() }.raw();
        assert_eq!((raw.attr_set, raw.attr_clr, raw.propagation, raw.userns_fd), (1 | 4, 0, 1 << 18, 0));
    }
}
