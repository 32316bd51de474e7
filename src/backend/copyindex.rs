//! What the index says of a copied tree, put onto it. What it lacks goes: whiteouts, and what they hide. What it has is set: the layers
//! of an unprivileged import hold modes, owners, attributes and special files only as far as the importing user could set them.

use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Timespec};
use rustix::io::Errno;

use super::copyrules::{MAX_DEPTH, Rules};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::index::read::{Inode, InodeKind};
use crate::index::{Damaged, Index};
use crate::sys::attrs::{self, Fidelity};
use crate::sys::remove::remove_tree_at;

const OP: &str = "set attributes of copied";

/// What could not be done, for the log.
#[derive(Default)]
pub(super) struct Lacking {
    /// Files that keep not all of their owners and attributes.
    pub(super) partial: u64,
    /// Device nodes that could not be made.
    pub(super) devices: u64,
}

/// Give everything below `root`, a directory that nobody else can enter, the attributes that `index` has for it, and make the special files that are in the index alone.
pub(super) fn apply(root: &OwnedFd, index: &Index, rules: &Rules) -> Result<Lacking> {
    let mut pass = Pass { index, rules, done: std::collections::HashMap::new(), root, lacking: Lacking::default() };
    let top = index.inode(0).map_err(|e| damaged(Path::new("/"), e))?;
    fault::point("copy.index")?;
    pass.directory(&top, root, Path::new(""), MAX_DEPTH)?;
    Ok(pass.lacking)
}

/// Give `root` itself the attributes that the image's root has.
pub(super) fn apply_top(root: &OwnedFd, index: &Index, rules: &Rules) -> Result<()> {
    let mut pass = Pass { index, rules, done: std::collections::HashMap::new(), root, lacking: Lacking::default() };
    let top = index.inode(0).map_err(|e| damaged(Path::new("/"), e))?;
    pass.attributes(&top, root, Path::new("/"))
}

fn damaged(path: &Path, why: Damaged) -> Error {
    super::damaged_index(OP, path, &why)
}

struct Pass<'a> {
    index: &'a Index,
    rules: &'a Rules,
    root: &'a OwnedFd,
    /// First path of each inode with several names.
    done: std::collections::HashMap<u32, PathBuf>,
    lacking: Lacking,
}

impl Pass<'_> {
    /// Children before their directory: its mode may shut us out, and its times change with what is made in it.
    fn directory(&mut self, inode: &Inode, dir: &OwnedFd, path: &Path, depth_left: usize) -> Result<()> {
        let InodeKind::Directory { first, count } = inode.kind else { return Ok(()) };
        if depth_left == 0 {
            return Err(Error::new(Kind::Limit, OP, show(path), format!("it is more than {MAX_DEPTH} levels deep")));
        }
        for at in first..first + count {
            let name = self.index.name(at).map_err(|e| damaged(path, e))?;
            let child = self.index.inode(name.row).map_err(|e| damaged(path, e))?;
            let name = OsStr::from_bytes(name.name);
            self.entry(&child, dir, name, &path.join(name), depth_left)?;
        }
        self.prune(inode, dir, path)
    }

    /// Remove what the image does not have: marks of the layers, in whatever form they lie on the disk, and what those hide.
    fn prune(&self, inode: &Inode, dir: &OwnedFd, path: &Path) -> Result<()> {
        let fail = |e| Error::sys(OP, show(path), e);
        let entries =
            fs::Dir::read_from(dir).and_then(Iterator::collect::<rustix::io::Result<Vec<_>>>).map_err(fail)?;
        for entry in entries {
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") || self.index.lookup(inode, name).map_err(|e| damaged(path, e))?.is_some() {
                continue;
            }
            let name = OsStr::from_bytes(name);
            remove_tree_at(dir, name, &path.join(name))?;
        }
        Ok(())
    }

    fn entry(&mut self, inode: &Inode, dir: &OwnedFd, name: &OsStr, path: &Path, depth_left: usize) -> Result<()> {
        let fail = |e| Error::sys(OP, show(path), e);
        let kind = FileType::from_raw_mode(inode.mode);
        let mut there = fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
        // Who may not make devices imports an empty file in the place of one.
        let is_stand_in = |stat: &fs::Stat| FileType::from_raw_mode(stat.st_mode).is_file() && stat.st_size == 0;
        if inode.kind == InodeKind::Special && there.as_ref().is_ok_and(is_stand_in) {
            fs::unlinkat(dir, name, AtFlags::empty()).map_err(fail)?;
            there = Err(Errno::NOENT);
        }
        if self.rules.leaves_out(kind) {
            return Ok(());
        }
        let first = self.done.get(&inode.row);
        match there {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == kind => {}
            Err(Errno::NOENT) if inode.kind == InodeKind::Special => {
                if let Some(first) = first {
                    let made = crate::sys::fs::open_beneath(self.root, first, OFlags::PATH);
                    if made.is_ok() {
                        return self.link(first, dir, name).map_err(fail);
                    }
                }
                match fs::mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, inode.rdev.into()) {
                    Ok(()) => {}
                    Err(Errno::PERM) => {
                        self.lacking.devices += 1;
                        return Ok(());
                    }
                    Err(e) => return Err(fail(e)),
                }
            }
            Err(e) if e != Errno::NOENT => return Err(fail(e)),
            _ => {
                return Err(Error::new(
                    Kind::Integrity,
                    OP,
                    show(path),
                    "the image's layers lack it or have something else there than its index says",
                )
                .hint("see `fsprov image verify`"));
            }
        }
        if kind == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = fs::openat(dir, name, flags, Mode::empty()).map_err(fail)?;
            self.directory(inode, &below, path, depth_left - 1)?;
            return self.attributes(inode, &below, path);
        } else if inode.nlink > 1 {
            if self.done.contains_key(&inode.row) {
                return Ok(());
            }
            self.done.insert(inode.row, path.to_owned());
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(dir, name, flags, Mode::empty()).map_err(fail)?;
        self.attributes(inode, &file, path)
    }

    fn link(&self, first: &Path, dir: &OwnedFd, name: &OsStr) -> rustix::io::Result<()> {
        let (parent, file) = (first.parent().unwrap_or(Path::new("")), first.file_name().unwrap_or_default());
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let parent = crate::sys::fs::open_beneath(self.root, parent, OFlags::PATH | OFlags::DIRECTORY)?;
        fs::linkat(&parent, file, dir, name, AtFlags::empty())
    }

    fn attributes(&mut self, inode: &Inode, to: &OwnedFd, path: &Path) -> Result<()> {
        let fail = |e| Error::sys(OP, show(path), e);
        let there = fs::fstat(to).map_err(fail)?;
        // The index keeps one time for each inode.
        let time = Timespec { tv_sec: inode.mtime.secs, tv_nsec: inode.mtime.nanos.into() };
        let stat = attrs::described(there, (inode.mode, inode.uid, inode.gid), time, time);
        let mut xattrs = Vec::new();
        for xattr in self.index.xattrs(inode).map_err(|e| damaged(path, e))? {
            let (name, value) = xattr.map_err(|e| damaged(path, e))?;
            let name = CString::new(name).map_err(|_| fail(Errno::INVAL))?;
            xattrs.push((name, value));
        }
        let set = attrs::set(&xattrs, &self.rules.presented(stat), to, self.rules.set_id).map_err(fail)?;
        self.lacking.partial += u64::from(set == Fidelity::Partial);
        Ok(())
    }
}
