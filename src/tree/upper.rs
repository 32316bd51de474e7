//! The writable tree: an image below, a directory of changes above, and the two shown as one. It makes no passthrough of its own: the
//! image tree answers for what was not changed, the directory tree does every operation on what was.
//!
//! ```text
//! DIR/upper   what was changed: an upper directory as overlayfs, podman and fuse-overlayfs have them
//! DIR/work    copies on their way up; empty between requests
//! DIR/image   which image the changes belong to
//! ```
//!
//! A name is looked for above first, then below. A whiteout above hides what lies below, an opaque directory all of it (`marks`). What is
//! to be changed and lies below is copied up first, whole or not at all (`raise`).
//!
//! ```text
//! node id:  bit 55      made above: the rest is its node in the directory tree
//!           bits 0..55  of the image: its node there, before and after it was copied up
//! ```
//!
//! So an inode number stays the same when a file is copied up (`pairs` knows which upper file stands for which of the image), and an attribute
//! of the upper file keeps it for the next server. Hard links of the image go up together, so they stay one file. Programs that had a file open before
//! it was copied up see what is written to it afterwards: the kernel knows both as one file.
//!
//! * `pairs`: which upper file stands for which file of the image
//! * `marks`: whiteouts, opaque directories, and attributes of ours
//! * `veils`: the form of a whiteout that hides a name while it changes
//! * `owners`: owners and modes that this user may not set
//! * `raise`: copying up
//! * `bare`: files whose content stays below
//! * `spot`: a name, and what hides or shows it while it changes
//! * `names`: lookup, and what makes, moves and removes names
//! * `list`: directories
//!
//! Lock order: one of a file's, then the lock for directories; the maps of `pairs` last. None is held across a request to the trees that
//! could wait for another request.

mod bare;
mod give;
mod list;
pub(crate) mod marks;
mod names;
mod owners;
mod pairs;
mod raise;
mod spot;
#[cfg(test)]
mod tests;
mod veils;

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dashmap::DashSet;
use lru::LruCache;
use rustix::fs::{self, Mode, OFlags};

use super::dir::{ActAs, DirOptions, DirTree, FdPool, Handover};
use super::image::ImageTree;
use super::{
    Attr, Caller, Change, DIRECTORY, DirItem, Entry, Errno, FOREVER, Fit, Handle, ListMode, Lookup, New, Node, Opened,
    REGULAR, ROOT, Result, Statfs, TYPE_BITS, Tree, Writer,
};
use crate::error::{Error, Kind};
use crate::plan::Scratch;
use crate::volume::Access;
use give::Given;
use list::Listing;
use owners::Owners;
pub(crate) use owners::{Owner, PERMISSION_BITS};
use pairs::Pairs;
use raise::{Content, Locks};
use veils::Veils;

const TARGET: &str = "fsprov::tree::upper";
const UPPER: &str = Scratch::UPPER;
const WORK: &str = Scratch::WORK;
/// Says which image the changes belong to.
const IMAGE: &str = "image";

/// Set in the id of a node that the image does not have.
const MADE: Node = 1 << 55;

/// Who asks where nobody does.
const SERVER: Caller = Caller { uid: 0, gid: 0, pid: 0 };

/// How a writable tree is served.
#[derive(Clone, Copy, Debug)]
pub struct UpperOptions {
    /// Whose ids changes are made with.
    pub act_as: ActAs,
    /// The kernel's write-back cache is on for this mount.
    pub writeback: bool,
    /// What is copied up is on the disk before it shows: the changes outlive the rootfs.
    pub durable: bool,
}

/// An image with a directory of changes over it.
#[derive(Debug)]
pub struct UpperTree {
    lower: Arc<ImageTree>,
    upper: Arc<DirTree>,
    /// The upper directory in the directory tree, whose root is the directory for changes.
    top: Node,
    work: OwnedFd,
    pairs: Pairs,
    veils: Veils,
    owners: Owners,
    /// Counts the changes of names: the kernel lists no directory while it changes.
    changes: AtomicU64,
    /// The names of upper directories that are being listed.
    listings: Mutex<LruCache<Node, Listing>>,
    /// Upper files of which it is known that a writer takes no setuid or setgid away that is noted. Of all others it is asked.
    no_set_id: DashSet<Node>,
    durable: bool,
    locks: Locks,
    given: Given,
    /// Numbers the copies on their way up.
    staged: AtomicU64,
}

/// Where a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// In the image, unchanged.
    Lower(Node),
    /// In the upper directory.
    Upper(Node),
}

/// What a directory is made of.
#[derive(Clone, Copy, Debug)]
struct Halves {
    upper: Option<Node>,
    lower: Option<Node>,
}

impl UpperTree {
    /// Serve the image `lower` with the changes in `place`, an O_PATH descriptor of the directory for changes and what its user calls it. What
    /// an earlier server left on its way up is brought to an end.
    ///
    /// # Errors
    /// The changes there are of another image, or cannot be read or made.
    pub fn open(
        lower: Arc<ImageTree>,
        (place, shown): (OwnedFd, &str),
        options: UpperOptions,
        pool: Arc<FdPool>,
        handover: Option<Handover>,
    ) -> crate::Result<(Self, Arc<DirTree>)> {
        let fail = |e: Errno| Error::sys("open changes in", shown, e);
        check_image(&place, &lower, options.durable, shown)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::mkdirat(&place, WORK, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(fail(e)),
        }
        let work = fs::openat(&place, WORK, flags, Mode::empty()).map_err(fail)?;
        let owners = Owners::of(options.act_as);
        let veils = raise::make_top(&lower, &place, &work, owners).map_err(fail)?;
        let dir_options = DirOptions {
            ttl: FOREVER,
            negative_ttl: FOREVER,
            act_as: options.act_as,
            writeback: options.writeback,
            ..DirOptions::volume(Access::Rw)
        };
        let upper = Arc::new(DirTree::open_again(place, dir_options, pool, handover)?);
        // Held as long as the server lives.
        let top = match upper.lookup(&SERVER, ROOT, OsStr::new(UPPER)).map_err(fail)? {
            Lookup::Found(entry) if entry.attr.mode & TYPE_BITS == DIRECTORY => entry.attr.node,
            _ => return Err(fail(Errno::NOTDIR)),
        };
        let pairs = Pairs::new(lower.index().inode_count(), top);
        let given = Given::new(lower.index().inode_count());
        let tree = UpperTree {
            lower,
            upper: Arc::clone(&upper),
            top,
            work,
            pairs,
            veils,
            owners,
            changes: AtomicU64::new(0),
            listings: Mutex::new(LruCache::new(list::LISTINGS)),
            no_set_id: DashSet::new(),
            durable: options.durable,
            locks: Locks::default(),
            given,
            staged: AtomicU64::new(0),
        };
        tree.go_on();
        tree.finish_work().map_err(fail)?;
        Ok((tree, upper))
    }

    fn side(&self, node: Node) -> Side {
        if node & MADE != 0 {
            return Side::Upper(node & !MADE);
        }
        self.pairs.upper(node).map_or(Side::Lower(node), Side::Upper)
    }

    fn halves(&self, directory: Node) -> Halves {
        match self.side(directory) {
            Side::Upper(upper) => Halves { upper: Some(upper), lower: (directory & MADE == 0).then_some(directory) },
            Side::Lower(lower) => Halves { upper: None, lower: Some(lower) },
        }
    }

    /// The upper file of a node, copied up if it was not.
    fn above(&self, node: Node, content: Content) -> Result<Node> {
        let upper = match self.side(node) {
            Side::Upper(upper) => upper,
            Side::Lower(lower) => self.raise(lower, content)?,
        };
        if content != Content::Bare && self.pairs.is_bare(node) {
            self.fill(node, upper, content)?;
        }
        Ok(upper)
    }

    /// The same, for requests that come through a handle for writing.
    fn written(&self, node: Node) -> Result<Node> {
        match self.side(node) {
            Side::Upper(upper) => Ok(upper),
            Side::Lower(_) => Err(Errno::BADF),
        }
    }

    /// The attributes of an upper file as those of `node`.
    fn attr_above(&self, node: Node, upper: Node, mut attr: Attr) -> Result<Attr> {
        self.show_blocks(node, &mut attr);
        if self.owners == Owners::Noted {
            let noted = self.upper.with_path(upper, |path| Ok(self.noted(path.as_bytes(), attr.mode)))?;
            self.dress(upper, &mut attr, noted);
        }
        Ok(numbered(node, attr))
    }
}

/// The attributes under the node's own number. A directory that is in both has an unknown number of directories in it: 1 says so, as of
/// overlayfs (find(1)).
fn numbered(node: Node, mut attr: Attr) -> Attr {
    attr.node = node;
    if node & MADE == 0 && attr.mode & TYPE_BITS == DIRECTORY {
        attr.nlink = 1;
    }
    attr
}

/// Refuse changes that were made to another image: whiteouts and copies of it would hide files of this one.
fn check_image(place: &OwnedFd, lower: &ImageTree, durable: bool, shown: &str) -> crate::Result<()> {
    const OP: &str = "open changes in";
    let fail = |e: Errno| Error::sys(OP, shown, e);
    let ours = format!("{:016x}\n", lower.index().fingerprint());
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut there = [0_u8; 32];
    match fs::openat(place, IMAGE, flags, Mode::empty()) {
        Ok(file) => {
            let length = rustix::io::read(&file, &mut there[..]).map_err(fail)?;
            if there[..length] == *ours.as_bytes() {
                return Ok(());
            }
            let why = "they were made to another image";
            Err(Error::new(Kind::Usage, OP, shown, why)
                .hint("name another directory, or mount the image they belong to"))
        }
        Err(Errno::NOENT) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            // Whole or not there: an empty one that a kill or a power cut left is refused, so it gets its name when it is written.
            let staged = format!("{IMAGE}.new");
            let file = fs::openat(place, &staged, flags | OFlags::TRUNC, Mode::RUSR | Mode::WUSR).map_err(fail)?;
            rustix::io::write(&file, ours.as_bytes()).map_err(fail)?;
            if durable {
                fs::fsync(&file).map_err(fail)?;
            }
            fs::renameat(place, &staged, place, IMAGE).map_err(fail)
        }
        Err(e) => Err(fail(e)),
    }
}

/// A step at which a test ends this process.
fn step(name: &'static str) -> Result<()> {
    crate::fault::point(name).map_err(|e| e.errno().unwrap_or(Errno::IO))
}

impl Tree for UpperTree {
    fn lookup(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<Lookup> {
        self.find(caller, parent, name)
    }
    fn forget(&self, node: Node, count: u64) {
        if node & MADE != 0 {
            self.upper.forget(node & !MADE, count);
        } else if let Some(upper) = self.pairs.forget(node, count) {
            self.upper.forget(upper, 1);
        }
    }
    fn getattr(&self, node: Node, handle: Option<Handle>) -> Result<(Attr, Duration)> {
        match self.side(node) {
            Side::Lower(lower) => self.lower.getattr(lower, None),
            Side::Upper(upper) => {
                let (attr, ttl) = self.upper.getattr(upper, handle.filter(|&h| h != 0))?;
                Ok((self.attr_above(node, upper, attr)?, ttl))
            }
        }
    }
    fn readlink(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        match self.side(node) {
            Side::Lower(lower) => self.lower.readlink(lower, out),
            Side::Upper(upper) => self.upper.readlink(upper, out),
        }
    }
    fn open(&self, caller: &Caller, node: Node, flags: i32) -> Result<Opened> {
        let changes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
        if changes {
            let content = if flags & libc::O_TRUNC != 0 { Content::Empty } else { Content::Whole };
            return self.upper.open(caller, self.above(node, content)?, flags);
        }
        match (self.content_below(node), self.side(node)) {
            (Some(lower), _) | (None, Side::Lower(lower)) => self.lower.open(caller, lower, flags),
            (None, Side::Upper(upper)) => self.upper.open(caller, upper, flags),
        }
    }
    fn open_giving(&self, caller: &Caller, node: Node, flags: i32, give: &mut dyn FnMut(&[u8])) -> Result<Opened> {
        let opened = self.open(caller, node, flags)?;
        if let Some(lower) = self.content_below(node) {
            self.give_once(node, lower, give);
        }
        Ok(opened)
    }
    fn read(&self, node: Node, handle: Handle, offset: u64, size: u32, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        match (self.content_below(node), self.side(node)) {
            (Some(lower), _) | (None, Side::Lower(lower)) => self.lower.read(lower, handle, offset, size, out),
            // Handle 0: opened before it was copied up. Read by node, as the image is.
            (None, Side::Upper(upper)) => self.upper.read(upper, handle, offset, size, out),
        }
    }
    fn readdir(
        &self,
        caller: &Caller,
        node: Node,
        handle: Handle,
        cookie: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        self.list(caller, (node, handle), cookie, mode, out)
    }
    fn statfs(&self, _: Node) -> Result<Statfs> {
        self.upper.statfs(self.top)
    }
    fn getxattr(&self, caller: &Caller, node: Node, name: &OsStr, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        match self.side(node) {
            _ if marks::is_ours(name.as_bytes()) => Err(Errno::NODATA),
            Side::Lower(lower) => self.lower.getxattr(caller, lower, name, out),
            Side::Upper(upper) => self.upper.getxattr(caller, upper, name, out),
        }
    }
    fn listxattr(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut shown = |names: &[u8]| {
            let kept = names.split_inclusive(|&b| b == 0).filter(|name| !marks::is_ours(&name[..name.len() - 1]));
            out(&kept.flatten().copied().collect::<Vec<_>>());
        };
        match self.side(node) {
            Side::Lower(lower) => self.lower.listxattr(lower, &mut shown),
            Side::Upper(upper) => self.upper.listxattr(upper, &mut shown),
        }
    }
    fn access(&self, node: Node, mask: i32) -> Result<()> {
        let (attr, _) = self.getattr(node, None)?;
        if mask & libc::X_OK != 0 && attr.mode & TYPE_BITS == REGULAR && attr.mode & 0o111 == 0 {
            return Err(Errno::ACCESS);
        }
        match self.side(node) {
            // Asked where all of it is this one user's: what is changed is copied up and is the user's own then.
            Side::Lower(_) => Ok(()),
            Side::Upper(_) if self.owners == Owners::Noted => Ok(()),
            Side::Upper(upper) => self.upper.access(upper, mask),
        }
    }
    fn is_live(&self) -> bool {
        // Nothing else may change the upper directory meanwhile.
        false
    }
    fn takes_names(&self) -> bool {
        true
    }
    fn opens_directories_without_asking(&self) -> bool {
        true
    }
    fn opendir(&self, caller: &Caller, node: Node) -> Result<Opened> {
        match self.side(node) {
            Side::Lower(lower) => self.lower.opendir(caller, lower),
            Side::Upper(upper) => self.upper.opendir(caller, upper),
        }
    }
    fn releasedir(&self, node: Node, handle: Handle) {
        self.release(node, handle);
    }
    fn flush(&self, node: Node, handle: Handle) -> Result<()> {
        if handle == 0 { Ok(()) } else { self.upper.flush(self.written(node)?, handle) }
    }
    fn release(&self, node: Node, handle: Handle) {
        if handle != 0
            && let Side::Upper(upper) = self.side(node)
        {
            self.upper.release(upper, handle);
        }
    }
    fn fsync(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        match self.side(node) {
            Side::Upper(upper) if self.durable => self.upper.fsync(upper, handle, data_only),
            // What ends with the rootfs ends with a power loss.
            Side::Upper(_) | Side::Lower(_) => Ok(()),
        }
    }
    fn fsyncdir(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        match self.side(node) {
            Side::Upper(upper) if handle != 0 && self.durable => self.upper.fsyncdir(upper, handle, data_only),
            _ => Ok(()),
        }
    }
    fn lseek(&self, node: Node, handle: Handle, offset: i64, whence: i32) -> Result<i64> {
        match (self.content_below(node), self.side(node)) {
            (None, Side::Upper(upper)) => self.upper.lseek(upper, handle, offset, whence),
            (Some(lower), _) | (None, Side::Lower(lower)) => {
                // As of a file without holes. ENOSYS, which the image alone would say, is taken for all files of the mount.
                let size = self.lower.getattr(lower, None)?.0.size as i64;
                match whence {
                    _ if !(0..size).contains(&offset) => Err(Errno::NXIO),
                    libc::SEEK_DATA => Ok(offset),
                    libc::SEEK_HOLE => Ok(size),
                    _ => Err(Errno::INVAL),
                }
            }
        }
    }
    fn setattr(
        &self,
        caller: &Caller,
        node: Node,
        handle: Option<Handle>,
        change: &Change,
    ) -> Result<(Attr, Duration)> {
        if let Some(given) = self.raise_given(caller, node, change)? {
            return Ok(given);
        }
        let upper = self.above(node, bare::needed_for(change))?;
        // Not while its times are put back.
        let _alone = self.pairs.is_bare(node).then(|| self.locks.file(node));
        let handle = handle.filter(|&h| h != 0);
        let (attr, ttl) = match self.owners {
            Owners::Set => self.upper.setattr(caller, upper, handle, change)?,
            Owners::Noted => self.change_noted(caller, upper, handle, change)?,
        };
        Ok((self.attr_above(node, upper, attr)?, ttl))
    }
    fn create(&self, caller: &Caller, parent: Node, name: &OsStr, new: New, flags: i32) -> Result<(Entry, Opened)> {
        self.create_file(caller, parent, name, new, flags)
    }
    fn mknod(&self, caller: &Caller, parent: Node, name: &OsStr, new: New) -> Result<Entry> {
        if marks::is_whiteout(new.mode, new.rdev) {
            return Err(Errno::PERM); // as overlayfs says
        }
        self.make(caller, parent, name, |dir| self.upper.mknod(caller, dir, name, new))
    }
    fn mkdir(&self, caller: &Caller, parent: Node, name: &OsStr, new: New) -> Result<Entry> {
        self.make(caller, parent, name, |dir| self.upper.mkdir(caller, dir, name, new))
    }
    fn symlink(&self, caller: &Caller, parent: Node, name: &OsStr, target: &OsStr) -> Result<Entry> {
        self.make(caller, parent, name, |dir| self.upper.symlink(caller, dir, name, target))
    }
    fn link(&self, caller: &Caller, node: Node, parent: Node, name: &OsStr) -> Result<Entry> {
        self.make_link(caller, node, parent, name)
    }
    fn unlink(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        self.remove_file(caller, parent, name)
    }
    fn rmdir(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        self.remove_directory(caller, parent, name)
    }
    fn rename(&self, caller: &Caller, from: (Node, &OsStr), to: (Node, &OsStr), flags: u32) -> Result<()> {
        self.move_name(caller, from, to, flags)
    }
    fn write(
        &self,
        writer: &Writer,
        node: Node,
        handle: Handle,
        offset: u64,
        data: &[u8],
        flags: i32,
    ) -> Result<usize> {
        self.upper.write(writer, self.written(node)?, handle, offset, data, flags)
    }
    fn fallocate(
        &self,
        writer: &Writer,
        node: Node,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<()> {
        self.upper.fallocate(writer, self.written(node)?, handle, offset, length, mode)
    }
    fn copy_file_range(
        &self,
        writer: &Writer,
        from: (Node, Handle, u64),
        to: (Node, Handle, u64),
        length: u64,
    ) -> Result<usize> {
        // From the image the caller's kernel copies by itself.
        let (None, Side::Upper(source)) = (self.content_below(from.0), self.side(from.0)) else {
            return Err(Errno::XDEV);
        };
        self.upper.copy_file_range(writer, (source, from.1, from.2), (self.written(to.0)?, to.1, to.2), length)
    }
    fn lost_set_id(&self, node: Node) -> bool {
        match self.side(node) {
            Side::Upper(upper) if self.owners == Owners::Noted => self.lose_noted_set_id(upper),
            Side::Upper(upper) => self.upper.lost_set_id(upper),
            Side::Lower(_) => false,
        }
    }
    fn setxattr(&self, caller: &Caller, node: Node, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        if marks::is_ours(name.as_bytes()) {
            return Err(Errno::PERM);
        }
        let content = bare::needed_for_attribute(name.as_bytes());
        self.upper.setxattr(caller, self.above(node, content)?, name, value, flags)
    }
    fn removexattr(&self, caller: &Caller, node: Node, name: &OsStr) -> Result<()> {
        if marks::is_ours(name.as_bytes()) {
            return Err(Errno::NODATA);
        }
        // Not copied up for nothing.
        self.getxattr(caller, node, name, &mut |_| ())?;
        self.upper.removexattr(caller, self.above(node, Content::Bare)?, name)
    }
}
