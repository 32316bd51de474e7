//! Deleting a tree of ours: by directory descriptor, never through a symlink, never across a mount.

use std::cell::Cell;
use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RawDir, RenameFlags, StatxFlags, fchmod, openat, renameat_with, statx, unlinkat,
};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result, show};

/// Most directories held open at once, one a level: hard limits on open files begin at 1024. What lies deeper is moved up first.
const MAX_DEPTH: usize = 800;

/// Delete `path` and all below it. `false`: there was nothing.
///
/// Directories that we own but may not enter (mode 000, from an image) are opened up first. Refuses, having deleted what it met
/// before, where a mount lies below: what is mounted there is somebody's data (Mesos lost volumes that way, MESOS-7366).
pub fn remove_tree(path: &Path) -> Result<bool> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(Kind::Usage, "delete", show(path), "it has no name"));
    };
    let parent = match openat(CWD, parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(false),
        Err(e) => return Err(Error::sys("open", show(parent), e)),
    };
    remove_tree_at(&parent, name, path)
}

/// [`remove_tree`] of `name` in an open directory; messages call it `path`.
pub fn remove_tree_at(parent: impl AsFd, name: &OsStr, path: &Path) -> Result<bool> {
    let parent = parent.as_fd();
    let name = std::ffi::CString::new(name.as_encoded_bytes())
        .map_err(|e| Error::new(Kind::Usage, "delete", show(path), e))?;
    match entry(parent, &name, &Position { top: None, depth_left: MAX_DEPTH, moved: &Cell::new(0) }) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(Errno::XDEV) => Err(Error::new(Kind::Busy, "delete", show(path), "something is mounted below it")
            .hint("find it in /proc/self/mountinfo, unmount it and try again")),
        Err(e) => Err(Error::sys("delete", show(path), e)),
    }
}

fn mount_of(at: impl AsFd, name: &CStr) -> rustix::io::Result<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    match statx(&at, name, flags, StatxFlags::MNT_ID) {
        Err(Errno::NOSYS) => {}
        other => return other.map(|s| s.stx_mnt_id),
    }
    let fd = if name.is_empty() {
        rustix::io::fcntl_dupfd_cloexec(at, 0)?
    } else {
        openat(at, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?
    };
    super::mount::mount_id(fd).map_err(|e| e.errno().unwrap_or(Errno::IO))
}

/// Where in the tree something is deleted.
struct Position<'a> {
    /// The top directory of the tree; `None`: this is it.
    top: Option<&'a OwnedFd>,
    depth_left: usize,
    /// How many directories were moved to the top so far.
    moved: &'a Cell<u64>,
}

/// A directory too deep for our descriptors goes to the top of the tree, which is read again until it is empty.
fn move_up(parent: BorrowedFd<'_>, name: &CStr, place: &Position<'_>) -> rustix::io::Result<()> {
    let top = place.top.ok_or(Errno::NAMETOOLONG)?;
    loop {
        place.moved.set(place.moved.get() + 1);
        let free = format!(".fsprov-deep-{}", place.moved.get());
        match renameat_with(parent, name, top, &free, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            // Moving a directory writes its `..`: it must be open to us.
            Err(Errno::ACCESS) => {
                open_up(parent, name)?;
                return renameat_with(parent, name, top, &free, RenameFlags::NOREPLACE);
            }
            other => return other,
        }
    }
}

fn entry(parent: BorrowedFd<'_>, name: &CStr, place: &Position<'_>) -> rustix::io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        // Linux says EISDIR for a directory; POSIX says EPERM, which here may be a directory too.
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    if unlinkat(parent, name, AtFlags::REMOVEDIR).is_ok() {
        return Ok(());
    }
    if mount_of(parent, name)? != mount_of(parent, c"")? {
        return Err(Errno::XDEV);
    }
    if place.depth_left == 0 {
        return move_up(parent, name, place);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::ACCESS) => {
            open_up(parent, name)?;
            openat(parent, name, flags, Mode::empty())?
        }
        other => other?,
    };
    let below = Position { top: Some(place.top.unwrap_or(&dir)), depth_left: place.depth_left - 1, moved: place.moved };
    // Deleting while reading may skip entries on some file systems.
    loop {
        let seen = match children(&dir, &below) {
            Err(Errno::ACCESS) => {
                fchmod(&dir, Mode::RWXU)?;
                children(&dir, &below)?
            }
            other => other?,
        };
        match unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) if seen => {}
            other => return other,
        }
    }
}

fn open_up(parent: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<()> {
    let dir =
        openat(parent, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    // fchmod refuses O_PATH descriptors; the path through /proc names this very inode.
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&dir));
    rustix::fs::chmod(link, Mode::RWXU)
}

/// Delete what one reading of a directory gives. `false`: that was nothing.
fn children(dir: &OwnedFd, place: &Position<'_>) -> rustix::io::Result<bool> {
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut seen = false;
    rustix::fs::seek(dir, rustix::fs::SeekFrom::Start(0))?;
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(item) = entries.next() {
        let item = item?;
        let name = item.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        seen = true;
        match entry(dir.as_fd(), name, place) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn all_goes_but_what_symlinks_point_to() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let kept = dir.path().join("kept");
        std::fs::create_dir_all(tree.join("a/closed/x")).unwrap();
        std::fs::create_dir_all(&kept).unwrap();
        std::fs::write(kept.join("file"), "data").unwrap();
        for n in 0..2000 {
            std::fs::write(tree.join(format!("a/{n}")), "").unwrap();
        }
        std::os::unix::fs::symlink(&kept, tree.join("link")).unwrap();
        std::fs::set_permissions(tree.join("a/closed"), std::fs::Permissions::from_mode(0o0)).unwrap();
        assert!(remove_tree(&tree).unwrap());
        assert!(!tree.exists());
        assert!(kept.join("file").exists());
        assert!(!remove_tree(&tree).unwrap());
        // Deeper than a path may be long, and than we hold directories open.
        std::fs::create_dir(&tree).unwrap();
        let mut at = OwnedFd::from(std::fs::File::open(&tree).unwrap());
        for _ in 0..2 * MAX_DEPTH + 10 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).unwrap();
            at = openat(&at, "deep", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        drop(at);
        assert!(remove_tree(&tree).unwrap() && !tree.exists());
        assert!(!remove_tree(&tree.join("below/nothing")).unwrap());
    }
}
