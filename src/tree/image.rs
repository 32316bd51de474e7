//! The image tree: answers from the layer index, which is memory-mapped; nothing in it ever changes.
//!
//! A node id is the index's row plus one, so inode numbers are the same at every mount and in every server. A question
//! about metadata makes no system call and no allocation. Content comes from the layers' files (`content`), opened when
//! read. All answers hold for ever, absence too.
//!
//! What it presents: owners through [`Ownership`]; one time for all three; directories of 4096 bytes; extended attributes
//! as the image has them but `trusted.*`, which only the first namespace's root may see and FUSE cannot tell apart
//! (listxattr names no caller), so nobody sees them. Device nodes are not there where they are to be left out.

mod content;
#[cfg(test)]
mod tests;

use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{
    Attr, Caching, Caller, DirItem, Entry, Errno, FOREVER, Fit, Handle, ListMode, Lookup, Node, Opened, ROOT, Result,
    Statfs, Timespec, Tree, access_read_only,
};
use crate::index::read::{Inode, InodeKind, Name};
use crate::index::{Damaged, Index, MAX_NAME};
use crate::plan::Ownership;

pub use content::Trust;

const TARGET: &str = "fsprov::tree::image";
/// st_blksize: what readers like cp take as their unit. One FUSE read of an unprivileged mount (its read-ahead limit).
const BLKSIZE: u32 = 128 * 1024;
/// Unit of statfs.
const STATFS_UNIT: u64 = 4096;
/// Errors that are logged one by one; after these only every thousandth, so that a damaged file read in a loop does not
/// fill the disk.
const ERRORS_LOGGED: u64 = 20;

/// An index and the layers it speaks of, as a tree.
#[derive(Debug)]
pub struct ImageTree {
    index: Index,
    content: content::Content,
    ownership: Ownership,
    devices: Devices,
    errors: AtomicU64,
}

/// Are the image's device nodes there?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// Like all other files.
    Shown,
    /// Not under any name.
    LeftOut,
}

impl ImageTree {
    /// `layers` are the layers' root directories, bottom first, as many as the index names. `trust` says how far a
    /// file's bytes are believed.
    ///
    /// Errors: [`crate::Kind::Invalid`] where the number of layers does not fit the index.
    pub fn open(index: Index, layers: Vec<OwnedFd>, ownership: Ownership, trust: Trust) -> crate::Result<Self> {
        if index.layer_count() as usize != layers.len() {
            let why = format!("it is of {} layers and the image has {}", index.layer_count(), layers.len());
            return Err(crate::Error::new(crate::Kind::Invalid, "open index", "", why)
                .hint("make it again with `fsprov image index IMAGE`"));
        }
        let content = content::Content::new(layers, trust);
        Ok(ImageTree { index, content, ownership, devices: Devices::Shown, errors: AtomicU64::new(0) })
    }

    /// With its device nodes, or without.
    #[must_use]
    pub fn devices(self, devices: Devices) -> Self {
        ImageTree { devices, ..self }
    }

    /// Is a name of a file of this type not there?
    fn leaves_out(&self, kind: u32) -> bool {
        self.devices == Devices::LeftOut && matches!(kind, libc::S_IFCHR | libc::S_IFBLK)
    }

    /// The index it answers from.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Keep no more than so many files open between requests.
    pub fn keep_open(&self, most: usize) {
        self.content.keep_open(most);
    }

    /// Files that are open at the moment.
    pub fn open_files(&self) -> usize {
        self.content.open_files()
    }

    /// The directory that a node's first name lies in, and that name.
    pub(super) fn home(&self, node: Node) -> Result<(Node, Vec<u8>)> {
        let inode = self.inode(node)?;
        let mut path = Vec::new();
        self.check(self.index.home_path(&inode, &mut path))?;
        let start = path.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
        Ok((node_of(self.index.parent(&inode)), path.split_off(start)))
    }

    /// Every name of a file, with its directory. Those with several hard links are looked for in the whole index.
    pub(super) fn names_of(&self, node: Node) -> Result<Vec<(Node, Vec<u8>)>> {
        let inode = self.inode(node)?;
        if inode.nlink < 2 {
            return Ok(vec![self.home(node)?]);
        }
        let mut names = Vec::new();
        for row in 0..self.index.inode_count() {
            let InodeKind::Directory { first, count } = self.check(self.index.inode(row))?.kind else { continue };
            for at in first..first + count {
                let name = self.check(self.index.name(at))?;
                if name.row == inode.row {
                    names.push((node_of(row), name.name.to_vec()));
                }
            }
            if names.len() >= inode.nlink as usize {
                break;
            }
        }
        Ok(names)
    }

    /// The names in a directory.
    pub(super) fn names_in(&self, node: Node) -> Result<Vec<Vec<u8>>> {
        let (_, first, count) = self.directory(node)?;
        let mut names = Vec::new();
        for at in first..first + count {
            let found = self.check(self.index.name(at))?;
            if !self.leaves_out(found.kind) {
                names.push(found.name.to_vec());
            }
        }
        Ok(names)
    }

    /// How owners are presented.
    pub(super) fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// User and group as the image has them.
    pub(super) fn owner_of(&self, node: Node) -> Result<(u32, u32)> {
        self.inode(node).map(|inode| (inode.uid, inode.gid))
    }

    /// The extended attributes that are presented, with their values.
    pub(super) fn xattrs_of(&self, node: Node) -> Result<Vec<(CString, Vec<u8>)>> {
        let inode = self.inode(node)?;
        let mut xattrs = Vec::new();
        for xattr in self.check(self.index.xattrs(&inode))? {
            let (name, value) = self.check(xattr)?;
            if is_shown(name)
                && let Ok(name) = CString::new(name)
            {
                xattrs.push((name, value.to_vec()));
            }
        }
        Ok(xattrs)
    }

    /// A regular file's content, opened for reading.
    pub(crate) fn content_fd(&self, node: Node) -> Result<OwnedFd> {
        self.content.open(&self.index, &self.inode(node)?).map_err(|refusal| self.refused(&refusal))
    }

    fn refused(&self, refusal: &content::Refusal) -> Errno {
        self.complain(format_args!("{refusal}"));
        refusal.errno()
    }

    fn inode(&self, node: Node) -> Result<Inode> {
        let row = u32::try_from(node.wrapping_sub(ROOT)).map_err(|_| Errno::STALE)?;
        if row >= self.index.inode_count() {
            return Err(Errno::STALE);
        }
        self.check(self.index.inode(row))
    }

    fn child(&self, name: &Name<'_>) -> Result<Inode> {
        self.check(self.index.inode(name.row))
    }

    fn directory(&self, node: Node) -> Result<(Inode, u32, u32)> {
        let inode = self.inode(node)?;
        match inode.kind {
            InodeKind::Directory { first, count } => Ok((inode, first, count)),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// What the index says, or EIO where it is damaged.
    fn check<T>(&self, answer: std::result::Result<T, Damaged>) -> Result<T> {
        answer.map_err(|damage| {
            self.complain(format_args!("the index is {damage}; make it again with `fsprov image index IMAGE`"));
            Errno::IO
        })
    }

    fn complain(&self, what: std::fmt::Arguments<'_>) {
        let errors = self.errors.fetch_add(1, Ordering::Relaxed);
        if errors < ERRORS_LOGGED || errors.is_multiple_of(1000) {
            log::error!(target: TARGET, "{what}");
        }
    }

    fn attr(&self, inode: &Inode) -> Attr {
        let o = &self.ownership;
        let (uid, gid) =
            o.squash.unwrap_or_else(|| (Ownership::map(&o.uids, inode.uid), Ownership::map(&o.gids, inode.gid)));
        let time = Timespec { secs: inode.mtime.secs, nanos: inode.mtime.nanos };
        Attr {
            node: node_of(inode.row),
            mode: inode.mode,
            nlink: inode.nlink,
            uid,
            gid,
            rdev: inode.rdev,
            size: inode.size,
            blocks: match inode.kind {
                InodeKind::File | InodeKind::Directory { .. } => inode.size.div_ceil(512),
                // A symlink's target lies in its inode on most file systems.
                InodeKind::Symlink | InodeKind::Special => 0,
            },
            blksize: BLKSIZE,
            atime: time,
            mtime: time,
            ctime: time,
        }
    }

    fn entry(&self, inode: &Inode) -> Entry {
        Entry { attr: self.attr(inode), generation: 0, entry_ttl: FOREVER, attr_ttl: FOREVER }
    }
}

fn node_of(row: u32) -> Node {
    Node::from(row) + ROOT
}

/// Names of xattrs that are presented.
fn is_shown(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.")
}

impl Tree for ImageTree {
    fn lookup(&self, _caller: &Caller, parent: Node, name: &OsStr) -> Result<Lookup> {
        let (directory, ..) = self.directory(parent)?;
        if name.len() > MAX_NAME {
            return Err(Errno::NAMETOOLONG);
        }
        match self.check(self.index.lookup(&directory, name.as_bytes()))? {
            Some(found) if !self.leaves_out(found.kind) => Ok(Lookup::Found(self.entry(&self.child(&found)?))),
            _ => Ok(Lookup::Absent(FOREVER)),
        }
    }

    fn getattr(&self, node: Node, _handle: Option<Handle>) -> Result<(Attr, Duration)> {
        Ok((self.attr(&self.inode(node)?), FOREVER))
    }

    fn readlink(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let inode = self.inode(node)?;
        out(self.check(self.index.target(&inode))?.ok_or(Errno::INVAL)?);
        Ok(())
    }

    fn access(&self, node: Node, mask: i32) -> Result<()> {
        access_read_only(self.inode(node)?.mode, mask)
    }

    fn open(&self, _caller: &Caller, node: Node, flags: i32) -> Result<Opened> {
        // That nothing is written is ours to see to; permissions are the kernel's (default_permissions), or all are this one user's.
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return Err(Errno::ROFS);
        }
        match self.inode(node)?.kind {
            InodeKind::File => Ok(Opened { handle: 0, cache: Caching::Keep, closes_silently: true }),
            InodeKind::Directory { .. } => Err(Errno::ISDIR),
            InodeKind::Symlink | InodeKind::Special => Err(Errno::INVAL),
        }
    }

    fn read(&self, node: Node, _handle: Handle, offset: u64, size: u32, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let inode = self.inode(node)?;
        match inode.kind {
            InodeKind::File => {}
            InodeKind::Directory { .. } => return Err(Errno::ISDIR),
            InodeKind::Symlink | InodeKind::Special => return Err(Errno::INVAL),
        }
        self.content.read(&self.index, &inode, offset, size, out).map_err(|refusal| self.refused(&refusal))
    }

    fn readdir(
        &self,
        _caller: &Caller,
        node: Node,
        _handle: Handle,
        cookie: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        let (inode, first, count) = self.directory(node)?;
        let up = node_of(self.index.parent(&inode));
        // Cookies: 1 after `.`, 2 after `..`, then the position in the directory plus 3.
        for (at, name, node) in [(0, ".", node), (1, "..", up)] {
            let item = DirItem {
                name: OsStr::new(name),
                node,
                kind: crate::index::format::S_IFDIR,
                cookie: at + 1,
                entry: None,
            };
            if cookie <= at && out(&item) == Fit::Full {
                return Ok(());
            }
        }
        let start = u32::try_from(cookie.saturating_sub(2)).unwrap_or(u32::MAX).min(count);
        let mut given = false;
        for at in start..count {
            let found = match self.check(self.index.name(first + at)) {
                Ok(found) => found,
                // A page with something in it is answered; the error comes with the next.
                Err(_) if given => break,
                Err(e) => return Err(e),
            };
            if self.leaves_out(found.kind) {
                continue;
            }
            let entry = match mode {
                ListMode::Names => None,
                ListMode::Plus => match self.child(&found) {
                    Ok(inode) => Some(self.entry(&inode)),
                    Err(_) if given => break,
                    Err(e) => return Err(e),
                },
            };
            let item = DirItem {
                name: OsStr::from_bytes(found.name),
                node: node_of(found.row),
                kind: found.kind,
                cookie: u64::from(at) + 3,
                entry,
            };
            if out(&item) == Fit::Full {
                break;
            }
            given = true;
        }
        Ok(())
    }

    fn statfs(&self, _node: Node) -> Result<Statfs> {
        Ok(Statfs {
            blocks: self.index.content_bytes().div_ceil(STATFS_UNIT),
            bfree: 0,
            bavail: 0,
            files: self.index.inode_count().into(),
            ffree: 0,
            bsize: STATFS_UNIT as u32,
            namelen: MAX_NAME as u32,
            frsize: STATFS_UNIT as u32,
        })
    }

    fn getxattr(&self, _caller: &Caller, node: Node, name: &OsStr, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let inode = self.inode(node)?;
        if !is_shown(name.as_bytes()) {
            return Err(Errno::NODATA);
        }
        out(self.check(self.index.xattr(&inode, name.as_bytes()))?.ok_or(Errno::NODATA)?);
        Ok(())
    }

    fn listxattr(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let inode = self.inode(node)?;
        let list = self.check(self.index.xattr_list(&inode))?;
        if list.split(|&b| b == 0).all(is_shown) {
            out(list);
            return Ok(());
        }
        let mut shown = Vec::with_capacity(list.len());
        for name in list.split_inclusive(|&b| b == 0).filter(|n| is_shown(n)) {
            shown.extend_from_slice(name);
        }
        out(&shown);
        Ok(())
    }

    fn is_live(&self) -> bool {
        false
    }

    fn opens_without_asking(&self) -> bool {
        true
    }

    fn is_without_xattrs(&self) -> bool {
        !self.index.has_xattrs()
    }
}
