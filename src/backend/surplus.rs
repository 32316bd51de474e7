//! What overlayfs would show of an image's layers and the image does not have, and directories that it would show otherwise: its merging is done
//! again here, name by name, and compared with the image's index.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{OsStr, OsString};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{self, OFlags};

use super::whiteout::{self, HiddenDirs, USER_OPAQUE};
use crate::error::{Error, Result, show};
use crate::index::read::{Inode, InodeKind};
use crate::index::{Damaged, Index};
use crate::sys::fs::open_beneath;

const OP: &str = "look for whiteouts in";

/// A directory of the image, and the layers (as numbers, top first) whose directories overlayfs merges into it.
struct Merged {
    path: PathBuf,
    inode: Inode,
    layers: Vec<usize>,
}

/// What overlayfs makes of one name.
enum Seen {
    /// Nothing: it is a whiteout.
    Whiteout,
    /// A directory of these layers. `closed`: something else lies below them, and ends it.
    Directory {
        layers: Vec<usize>,
        closed: bool,
    },
    Other,
}

/// What to hide and to cover in an overlay of `layers` (bottom first, no index of theirs but the image's), where it heeds `opaque_xattr`.
pub(super) fn find(index: &Index, layers: &[(BorrowedFd<'_>, &Path)], opaque_xattr: &str) -> Result<HiddenDirs> {
    let damaged = |why: Damaged| super::damaged_index(OP, Path::new("."), &why);
    let mut hidden = HiddenDirs::new();
    let top = index.inode(0).map_err(damaged)?;
    let mut waiting = vec![Merged { path: PathBuf::from("."), inode: top, layers: (0..layers.len()).rev().collect() }];
    while let Some(at) = waiting.pop() {
        let is_root = at.path == Path::new(".");
        let mut seen = HashMap::new();
        let mut looks = Vec::new();
        for &n in &at.layers {
            let fail = |e| Error::sys(OP, show(layers[n].1.join(&at.path)), e);
            let dir = open_beneath(layers[n].0, &at.path, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?;
            list(&dir, n, &mut seen).map_err(fail)?;
            looks.push((n, fs::fstat(&dir).map_err(fail)?));
            // Of its layers' own roots overlayfs does not ask whether they are opaque.
            if !is_root && whiteout::has_mark(&dir, opaque_xattr).map_err(fail)? {
                break;
            }
            // It would show the attribute that it does not heed: a directory of ours, made after this one, has it not.
            if opaque_xattr != USER_OPAQUE && whiteout::has_mark(&dir, USER_OPAQUE).map_err(fail)? {
                hidden.entry(at.path.clone()).or_default();
            }
        }
        if let Some(n) = covered(&at.inode, &looks) {
            hidden.entry(at.path.clone()).or_default().like = Some(n);
        }
        for (name, what) in seen {
            let found = index.lookup(&at.inode, name.as_bytes()).map_err(damaged)?;
            let must_hide = match (what, found) {
                // Where directories are merged a listing leaves it out; elsewhere it is a name with nothing behind it.
                (Seen::Whiteout, _) => looks.len() == 1,
                (_, None) => true,
                (Seen::Directory { layers, .. }, Some(found)) => {
                    let inode = index.inode(found.row).map_err(damaged)?;
                    if matches!(inode.kind, InodeKind::Directory { .. }) {
                        let path = if is_root { PathBuf::from(&name) } else { at.path.join(&name) };
                        waiting.push(Merged { path, inode, layers });
                    }
                    false
                }
                (Seen::Other, Some(_)) => false,
            };
            if must_hide {
                hidden.entry(at.path.clone()).or_default().names.insert(name);
            }
        }
    }
    Ok(hidden)
}

/// The layer whose directory looks as the image has it, where another's covers it: one that has it only for what it brings in it.
fn covered(inode: &Inode, looks: &[(usize, fs::Stat)]) -> Option<usize> {
    let has_mode = |stat: &fs::Stat| stat.st_mode & 0o7777 == inode.mode & 0o7777;
    let is_it = |stat: &fs::Stat| has_mode(stat) && (stat.st_uid, stat.st_gid) == (inode.uid, inode.gid);
    let at = looks
        .iter()
        .position(|(_, stat)| is_it(stat))
        // An import without root could not give it its owner.
        .or_else(|| looks.iter().position(|(_, stat)| has_mode(stat)));
    at.filter(|at| *at > 0).map(|at| looks[at].0)
}

/// Add the names in a directory of layer `n`, which lies below those added before.
fn list(dir: &OwnedFd, n: usize, seen: &mut HashMap<OsString, Seen>) -> rustix::io::Result<()> {
    for entry in fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let kind = whiteout::kind_of(dir, name, entry.file_type())?;
        match seen.entry(name.to_owned()) {
            Entry::Vacant(vacant) => {
                vacant.insert(if kind.is_dir() {
                    Seen::Directory { layers: vec![n], closed: false }
                } else if whiteout::is_whiteout_device(dir, name, kind)? {
                    Seen::Whiteout
                } else {
                    Seen::Other
                });
            }
            Entry::Occupied(mut occupied) => {
                if let Seen::Directory { layers, closed: closed @ false } = occupied.get_mut() {
                    if kind.is_dir() {
                        layers.push(n);
                    } else {
                        *closed = true;
                    }
                }
            }
        }
    }
    Ok(())
}
