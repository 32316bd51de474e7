//! A way to the rootfs for a container whose root is nobody on this host: a state root is its owner's alone (0700), and so may the
//! directories above it be.
//!
//! In the runtime's own mount namespace, the first directory on the way that others may not pass is covered by a tmpfs that they may, and
//! in it there is nothing but what the runtime needs, at the same paths.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat, stat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use crate::error::{Error, Result, show};
use crate::sys::fs::open_resolved;
use crate::sys::mount::{Depth, move_mount_to, open_tree_clone};
use crate::sys::raw::{self, Users};

/// Others may pass, and see nothing.
const PASS: u32 = 0o711;

/// For this thread and what it starts: `wanted`, all below `root`, can be reached by everyone; `also`, too, if it is covered. No other
/// process sees a difference.
pub(super) fn open(root: &Path, wanted: &[&Path], also: &Path) -> Result<()> {
    const OP: &str = "open a way to";
    let fail = |path: &Path, e| Error::sys(OP, show(path), e);
    raw::unshare_mounts(Users::Same).map_err(|e| fail(root, e))?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).map_err(|e| fail(root, e))?;
    // The real path: the parts of it are looked at.
    let real = std::fs::canonicalize(root).map_err(|e| Error::io(OP, show(root), e))?;
    let Some(closed) = first_closed(&real)? else { return Ok(()) };
    let mut trees = Vec::new();
    let also = std::fs::canonicalize(also).ok().filter(|path| path.starts_with(&closed));
    for path in wanted.iter().copied().chain(also.as_deref()) {
        let real = std::fs::canonicalize(path).map_err(|e| Error::io(OP, show(path), e))?;
        let tree =
            open_resolved(&real).and_then(|fd| open_tree_clone(fd, Depth::Recursive)).map_err(|e| fail(path, e))?;
        trees.push((real, tree));
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("fsprov", &closed, "tmpfs", flags, Some(c"mode=0711,size=64k")).map_err(|e| fail(&closed, e))?;
    for (path, tree) in trees {
        let dir = rustix::fs::fstat(&tree)
            .map_err(|e| fail(&path, e))
            .map(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR)?;
        let parents = if dir { Some(path.as_path()) } else { path.parent() };
        make_all(parents.unwrap_or(&path)).map_err(|e| Error::io(OP, show(&path), e))?;
        if !dir {
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(CWD, &path, flags, Mode::from_raw_mode(0o755)).map_err(|e| fail(&path, e))?;
        }
        let at = open_resolved(&path).map_err(|e| fail(&path, e))?;
        move_mount_to(tree, at).map_err(|e| fail(&path, e))?;
    }
    Ok(())
}

/// The topmost directory on the way to this one that others may not pass.
fn first_closed(path: &Path) -> Result<Option<PathBuf>> {
    let mut from_top: Vec<_> = path.ancestors().collect();
    from_top.reverse();
    for dir in from_top {
        let mode = stat(dir).map_err(|e| Error::sys("look at", show(dir), e))?.st_mode;
        if mode & 0o001 == 0 {
            return Ok(Some(dir.to_owned()));
        }
    }
    Ok(None)
}

/// With those that it lies in, whatever the umask.
fn make_all(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    if path.is_dir() {
        return Ok(());
    }
    make_all(path.parent().unwrap_or(path))?;
    std::fs::create_dir(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(PASS))
}
