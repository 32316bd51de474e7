//! Deleting a tree of ours: by directory descriptor, never through a symlink, never across a mount.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir, StatxFlags, fchmod, openat, statx, unlinkat};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result, show};

/// Deepest tree deleted: one descriptor is held a level, and hard limits on open files begin at 1024.
const MAX_DEPTH: usize = 800;

/// Delete `path` and all below it. `false`: there was nothing.
///
/// Directories that we own but may not enter (mode 000, from an image) are opened up first. Refuses, having deleted what it met
/// before, where a mount lies below: what is mounted there is somebody's data (Mesos lost volumes that way, MESOS-7366).
pub fn remove_tree(path: &Path) -> Result<bool> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(Kind::Usage, "delete", show(path), "it has no name"));
    };
    let name = std::ffi::CString::new(name.as_encoded_bytes())
        .map_err(|e| Error::new(Kind::Usage, "delete", show(path), e))?;
    let parent = match openat(CWD, parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(false),
        Err(e) => return Err(Error::sys("open", show(parent), e)),
    };
    match entry(&parent, &name, MAX_DEPTH) {
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

fn entry(parent: &OwnedFd, name: &CStr, depth_left: usize) -> rustix::io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        // Linux says EISDIR for a directory; POSIX says EPERM, which here may be a directory too.
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    if depth_left == 0 {
        return Err(Errno::NAMETOOLONG);
    }
    if mount_of(parent, name)? != mount_of(parent, c"")? {
        return Err(Errno::XDEV);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::ACCESS) => {
            open_up(parent, name)?;
            openat(parent, name, flags, Mode::empty())?
        }
        other => other?,
    };
    match children(&dir, depth_left) {
        Err(Errno::ACCESS) => {
            fchmod(&dir, Mode::RWXU)?;
            children(&dir, depth_left)?;
        }
        other => other?,
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

fn open_up(parent: &OwnedFd, name: &CStr) -> rustix::io::Result<()> {
    let dir =
        openat(parent, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    // fchmod refuses O_PATH descriptors; the path through /proc names this very inode.
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&dir));
    rustix::fs::chmod(link, Mode::RWXU)
}

fn children(dir: &OwnedFd, depth_left: usize) -> rustix::io::Result<()> {
    let mut buffer = Vec::with_capacity(32 << 10);
    loop {
        // A new pass after each full read: deleting while reading may skip entries on some file systems.
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
            match entry(dir, name, depth_left - 1) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
        if !seen {
            return Ok(());
        }
    }
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
        assert!(!remove_tree(&tree.join("below/nothing")).unwrap());
    }
}
