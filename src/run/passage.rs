//! A way to the rootfs for a container whose root is nobody on this host: a state root is its owner's alone (0700), and so may the
//! directories above it be.
//!
//! In the runtime's own mount namespace, the first directory on the way that others may not pass is covered by a tmpfs that they may, and
//! in it there is nothing but what the runtime needs, at the same paths. All of it is opened below that directory's descriptor.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, chmodat, fstat};

use crate::error::{Error, Result, show};
use crate::sys::fs::{open_beneath, open_resolved};
use crate::sys::mount::{Depth, attach_below, empty_tmpfs, move_mount_to, open_tree_clone};

/// Others may pass, and see nothing.
const PASS: u32 = 0o711;
const OP: &str = "open a way to";

/// In this mount namespace, which is the runtime's alone: `wanted`, all below `root`, can be reached by everyone; and `program`, too, if it is
/// covered.
pub(super) fn open(root: &Path, wanted: &[&Path], program: &Path) -> Result<()> {
    let fail = |path: &Path, e| Error::sys(OP, show(path), e);
    // The real path: the parts of it are looked at.
    let real = |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::io(OP, show(path), e));
    let real_root = real(root)?;
    let below = |path: &Path| real_root.join(path.strip_prefix(root).unwrap_or(path));
    let mut closed = first_closed(&real_root)?;
    for path in wanted {
        // A state root that others may pass has directories that they may not.
        if closed.is_none() && first_closed(&below(path))?.is_some() {
            closed = Some((open_resolved(&real_root).map_err(|e| fail(&real_root, e))?, real_root.clone()));
        }
    }
    let Some((closed, covered)) = closed else { return Ok(()) };
    let copy = |found: rustix::io::Result<OwnedFd>, path: &Path| {
        found.and_then(|fd| open_tree_clone(fd, Depth::Recursive)).map_err(|e| fail(path, e))
    };
    let mut trees = Vec::new();
    for path in wanted {
        let at = below(path);
        let place = at.strip_prefix(&covered).unwrap_or(&at).to_owned();
        trees.push((copy(open_beneath(&closed, &place, OFlags::PATH), path)?, place));
    }
    // It is started by its name, which may be a link's.
    let real_program = real(program)?;
    let names = BTreeSet::from([program, &real_program]);
    for place in names.into_iter().filter_map(|name| name.strip_prefix(&covered).ok()) {
        trees.push((copy(open_resolved(&real_program), program)?, place.to_owned()));
    }
    let empty = empty_tmpfs()?;
    chmodat(&empty, ".", Mode::from_raw_mode(PASS), AtFlags::empty()).map_err(|e| fail(&covered, e))?;
    move_mount_to(&empty, &closed).map_err(|e| fail(&covered, e))?;
    for (tree, place) in &trees {
        attach_below(&empty, place, tree, PASS)?;
    }
    Ok(())
}

/// The topmost directory on the way to this one that others may not pass.
fn first_closed(path: &Path) -> Result<Option<(OwnedFd, PathBuf)>> {
    let fail = |at: &Path, e| Error::sys("look at", show(at), e);
    let mut at = PathBuf::from("/");
    let mut dir = open_resolved(&at).map_err(|e| fail(&at, e))?;
    for part in path.components().skip(1) {
        if is_closed(&dir).map_err(|e| fail(&at, e))? {
            return Ok(Some((dir, at)));
        }
        at.push(part);
        dir = open_beneath(&dir, Path::new(&part), OFlags::PATH | OFlags::DIRECTORY).map_err(|e| fail(&at, e))?;
    }
    let closed = is_closed(&dir).map_err(|e| fail(&at, e))?;
    Ok(closed.then_some((dir, at)))
}

fn is_closed(dir: &OwnedFd) -> rustix::io::Result<bool> {
    Ok(fstat(dir)?.st_mode & 0o001 == 0)
}
