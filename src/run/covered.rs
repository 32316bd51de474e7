//! Volumes at or below a place where the runtime mounts something: a tmpfs, /dev, /proc or /sys. In the rootfs it would cover them.
//!
//! In the runtime's own mount namespace they are put aside, into the bundle, and config.json has the runtime mount them from there, after
//! what would cover them. What is put aside is a copy of the mount that is in the rootfs, found in it by descriptor: it has the volume's
//! flags, and the source's path is not followed again.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, StatVfsMountFlags, Uid, chmodat, chownat, fstat, fstatvfs, openat};
use rustix::io::Errno;

use super::config::Extra;
use crate::error::{Error, Kind, Result, show};
use crate::sys::fs::{open_in_root, open_resolved, path_of, proc_path};
use crate::sys::mount::{
    Depth, Unmount, attach_below, empty_tmpfs, is_mount_root, make_private, mount_id, move_mount_to, open_tree_clone,
    unmount,
};

/// Where they are put aside, in the bundle.
const NAME: &str = "volumes";
/// A container whose root is nobody here passes, too.
const PASS: u32 = 0o711;
const OP: &str = "mount volume";

/// A volume that is put aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Covered {
    /// Where it is in the rootfs, links followed.
    at: PathBuf,
    /// Its name below [`NAME`].
    name: String,
}

impl Covered {
    /// The `number`th of a bundle.
    pub(super) fn new(at: PathBuf, number: usize) -> Self {
        Covered { at, name: number.to_string() }
    }

    /// How the runtime mounts it: with the flags that it has in the rootfs.
    pub(super) fn extra(&self, root: &OwnedFd, bundle: &Path) -> Result<Extra> {
        let at = self.at.to_str().ok_or_else(|| {
            Error::new(Kind::Usage, OP, show(&self.at), "below what the runtime mounts, a path must be UTF-8")
        })?;
        let flags = self.find(root).and_then(|found| fstatvfs(&found).map_err(|e| self.fail(e)))?.f_flag;
        let all = [
            (StatVfsMountFlags::RDONLY, "ro"),
            (StatVfsMountFlags::NOSUID, "nosuid"),
            (StatVfsMountFlags::NODEV, "nodev"),
            (StatVfsMountFlags::NOEXEC, "noexec"),
        ];
        let flags = all.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| (*name).to_owned());
        let options = ["rbind", "rprivate"].map(str::to_owned).into_iter().chain(flags).collect();
        Ok(Extra::Volume { at: at.to_owned(), from: bundle.join(NAME).join(&self.name), options })
    }

    /// Its mount.
    fn find(&self, root: &OwnedFd) -> Result<OwnedFd> {
        let found = open_in_root(root, &self.at, OFlags::PATH).map_err(|e| self.fail(e))?;
        if is_mount_root(&found)? {
            return Ok(found);
        }
        Err(Error::new(Kind::Busy, OP, show(&self.at), "its mount point was moved away meanwhile"))
    }

    fn fail(&self, errno: Errno) -> Error {
        Error::sys(OP, show(&self.at), errno)
    }

    /// Out of the rootfs: a tmpfs above it is filled with what is to be seen there.
    fn detach(&self, root: &OwnedFd, found: &OwnedFd) -> Result<()> {
        let (Some(above), Some(name)) = (self.at.parent(), self.at.file_name()) else { return Ok(()) };
        let above = open_in_root(root, above, OFlags::PATH | OFlags::DIRECTORY).map_err(|e| self.fail(e))?;
        let seen = openat(&above, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| self.fail(e))?;
        if mount_id(&seen)? != mount_id(found)? {
            return Err(Error::new(Kind::Busy, OP, show(&self.at), "its mount point was moved away meanwhile"));
        }
        unmount(&Path::new(&proc_path(&above)).join(name), Unmount::Lazy).map_err(|e| self.fail(e))
    }

    /// What was made in the rootfs for it belongs to root here. A runtime whose root is another one copies it into a tmpfs, and its owner with
    /// it: that needs one that there is inside.
    fn give(&self, root: &OwnedFd, (uid, gid): (u32, u32)) -> Result<()> {
        let rootfs = mount_id(root)?;
        for at in self.at.ancestors().filter(|at| at.parent().is_some()) {
            let made = match open_in_root(root, at, OFlags::PATH) {
                // In another volume, which was put aside: it is the user's own.
                Err(Errno::NOENT) => continue,
                other => other.map_err(|e| self.fail(e))?,
            };
            if mount_id(&made)? == rootfs && fstat(&made).map_err(|e| self.fail(e))?.st_uid == 0 {
                chownat(&made, "", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::EMPTY_PATH)
                    .map_err(|e| self.fail(e))?;
            }
        }
        Ok(())
    }
}

/// How deep a path is: what is mounted on top comes after what it lies in.
pub(super) fn depth(path: &Path) -> usize {
    path.components().count()
}

/// Where a path of the rootfs leads, links followed within. What does not exist stays as it is written.
pub(super) fn resolve(root: &OwnedFd, path: &Path) -> PathBuf {
    let found = path.ancestors().find_map(|above| {
        let found = open_in_root(root, above, OFlags::PATH).ok()?;
        let below = path_of(&found).ok()?.strip_prefix(path_of(root).ok()?).ok()?.to_owned();
        Some(Path::new("/").join(below).join(path.strip_prefix(above).ok()?))
    });
    // Without what a join with nothing leaves at the end.
    found.as_deref().unwrap_or(path).components().collect()
}

/// In this mount namespace, which is the runtime's alone: from the rootfs into the bundle. They end with the namespace. `owner`: the
/// container's root, where root of this namespace is nobody there.
pub(super) fn put_aside(rootfs: &Path, bundle: &Path, volumes: &[Covered], owner: Option<(u32, u32)>) -> Result<()> {
    let aside = bundle.join(NAME);
    let fail = |e| Error::sys("put volumes aside in", show(&aside), e);
    std::fs::create_dir(&aside).map_err(|e| Error::io("make", show(&aside), e))?;
    let point = open_resolved(&aside).map_err(fail)?;
    let root = open_resolved(rootfs).map_err(|e| Error::sys("open rootfs", show(rootfs), e))?;
    let top = empty_tmpfs()?;
    chmodat(&top, ".", Mode::from_raw_mode(PASS), AtFlags::empty()).map_err(fail)?;
    move_mount_to(&top, &point).map_err(fail)?;
    make_private(&top)?;
    // The deepest first: none brings along another that lies in it.
    let mut all: Vec<&Covered> = volumes.iter().collect();
    all.sort_by_key(|volume| std::cmp::Reverse(depth(&volume.at)));
    for volume in all {
        let found = volume.find(&root)?;
        let tree = open_tree_clone(&found, Depth::Recursive).map_err(|e| volume.fail(e))?;
        volume.detach(&root, &found)?;
        attach_below(&top, Path::new(&volume.name), &tree, PASS)?;
    }
    owner.map_or(Ok(()), |owner| volumes.iter().try_for_each(|volume| volume.give(&root, owner)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_path_leads() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("run/lock")).unwrap();
        std::fs::create_dir_all(dir.path().join("var")).unwrap();
        std::os::unix::fs::symlink("/run", dir.path().join("var/run")).unwrap();
        let root = open_resolved(&dir.path().canonicalize().unwrap()).unwrap();
        for (path, want) in [
            ("/", "/"),
            ("/run", "/run"),
            ("/run/", "/run"),
            ("/var/run", "/run"),
            ("/var/run/lock/", "/run/lock"),
            ("/var/run/no/such", "/run/no/such"),
            ("/no/such", "/no/such"),
        ] {
            assert_eq!(resolve(&root, Path::new(path)).to_str(), Some(want), "{path}");
        }
    }
}
