//! The directory tree: live passthrough of a directory of the host, for volumes and for images given as a plain directory.
//!
//! A node is known by device, inode number and birth time, and reached by (parent, name) relative to a cached directory
//! descriptor; what is found there is compared, and a mismatch is ESTALE. No path string is kept, no descriptor per node. Only
//! regular files and directories are ever opened, and only after it is known that they are. The root's own descriptor is O_PATH.
//!
//! * `fds`: descriptors and their bounds
//! * `found`: what statx tells
//! * `nodes`: the node table (private to the tree; its guards are never held across a system call that could wait)
//! * `handover`: what the next server process needs to go on
//! * `identity`: acting as the caller; `groups`: the groups that the caller is in
//! * `reach`: from a node to a descriptor
//! * `names`: lookup, and what makes and removes names
//! * `attrs`: attributes and extended attributes
//! * `files`: open files
//! * `list`: directories
//!
//! Lock order: a handle's own lock, then the descriptor pool; a guard of the node table alone.

mod attrs;
mod fds;
mod files;
mod found;
pub mod groups;
mod handover;
mod identity;
mod list;
mod names;
mod nodes;
mod reach;
mod stream;

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FallocateFlags, OFlags};

use super::{
    Attr, Caller, Change, DirItem, Entry, Errno, FOREVER, Fit, Handle, ListMode, Lookup, New, Node, Opened, Result,
    SetTime, Statfs, Tree, Writer,
};
use crate::plan::Ownership;
use crate::volume::Access;

pub(in crate::tree) use attrs::unmap;
pub use fds::{FdPool, Shares};
pub use handover::{Handover, Keeper};
pub use identity::ActAs;
pub(crate) use identity::look_around;

/// Longest name of a directory entry: NAME_MAX of Linux. FUSE itself takes 1024.
const MAX_NAME: usize = 255;
/// Setuid and setgid.
pub(in crate::tree) const SET_ID: u32 = 0o6000;

/// How a directory is served.
#[derive(Clone, Debug)]
pub struct DirOptions {
    /// May it be changed through us?
    pub access: Access,
    /// How long the kernel may use names and attributes before it asks again.
    pub ttl: Duration,
    /// How long it may believe that a name is absent. Zero: a file made on the host is seen at once.
    pub negative_ttl: Duration,
    /// How owners are presented.
    pub ownership: Ownership,
    /// Nobody changes it while it is served (an image in the store): the kernel may keep all of it for ever.
    pub immutable: bool,
    /// Whose ids changes are made with.
    pub act_as: ActAs,
    /// The kernel's write-back cache is on for this mount: it reads through handles that were opened for writing.
    pub writeback: bool,
}

impl DirOptions {
    /// A volume: live, one second, owners as they are, acting as the caller where that is possible.
    pub fn volume(access: Access) -> Self {
        DirOptions {
            access,
            ttl: Duration::from_secs(1),
            negative_ttl: Duration::ZERO,
            ownership: Ownership::default(),
            immutable: false,
            act_as: ActAs::detect(),
            writeback: false,
        }
    }

    /// An image given as a plain directory: read-only, and never changed while it is mounted.
    pub fn image(ownership: Ownership) -> Self {
        DirOptions {
            access: Access::Ro,
            ttl: FOREVER,
            negative_ttl: FOREVER,
            ownership,
            immutable: true,
            act_as: ActAs::Server,
            writeback: false,
        }
    }
}

/// A directory (or a single regular file) of the host as a tree.
#[derive(Debug)]
pub struct DirTree {
    root: Arc<OwnedFd>,
    root_mount: u64,
    /// Closing a file on this device, the root's, has nothing to tell.
    silent_device: Option<u64>,
    options: DirOptions,
    pool: Arc<FdPool>,
    /// This tree's number in the pool.
    number: u32,
    nodes: nodes::NodeTable,
    handles: files::Handles,
    readers: list::Readers,
    handover: Option<Arc<handover::HandoverLog>>,
}

impl Drop for DirTree {
    fn drop(&mut self) {
        self.pool.remove_tree(self.number);
    }
}

impl DirTree {
    /// Serve `root`, an O_PATH descriptor of a directory or of a single regular file.
    ///
    /// # Errors
    /// It is neither.
    pub fn open(root: OwnedFd, options: DirOptions, pool: Arc<FdPool>) -> crate::Result<Self> {
        Self::open_again(root, options, pool, None)
    }

    /// [`DirTree::open`], going on with what an earlier process left and leaving what the next one needs: nodes, open files and
    /// directories, files that have no name any more.
    pub fn open_again(
        root: OwnedFd,
        options: DirOptions,
        pool: Arc<FdPool>,
        handover: Option<Handover>,
    ) -> crate::Result<Self> {
        const OP: &str = "serve directory";
        let name = || crate::sys::fs::path_of(&root).map_or_else(|_| "?".to_owned(), crate::error::show);
        let found = found::stat_fd(&root).map_err(|e| crate::Error::sys(OP, name(), e))?;
        if found.kind() != found::DIRECTORY && found.kind() != found::REGULAR {
            return Err(crate::Error::new(
                crate::Kind::Usage,
                OP,
                name(),
                "it is neither a directory nor a regular file: the FUSE server opens nothing else",
            )
            .hint("use --backend bind for a socket, FIFO or device"));
        }
        let number = pool.register();
        let (nodes, handles, handover) = match handover {
            None => (nodes::NodeTable::new(&found), files::Handles::default(), None),
            Some(handover) => {
                let (handover, inherited, kept) = handover::HandoverLog::take_over(handover);
                let handover = Arc::new(handover);
                let nodes = nodes::NodeTable::inherit(&found, &inherited, Arc::clone(&handover));
                let handles = files::Handles::inherit(&inherited);
                for (key, fd) in kept {
                    match (pool.hold(fd), key & files::HANDLE_KEY) {
                        (Ok(pin), 0) => nodes.pin(key, pin),
                        (Ok(fd), _) => {
                            let handle = key & !files::HANDLE_KEY;
                            match handles.restore(handle, fd) {
                                Some(node) => nodes.add_handle(node, handle),
                                // Closed, and the word to let it go was lost with the process.
                                None => handover.release(key),
                            }
                        }
                        (Err(e), _) => log::warn!(target: "fsprov::tree::dir", "hold a file again: {e}"),
                    }
                }
                (nodes, handles, Some(handover))
            }
        };
        Ok(DirTree {
            silent_device: found::closes_silently(&root).then_some(found.identity.dev),
            root: Arc::new(root),
            root_mount: found.mount,
            nodes,
            handles,
            readers: list::Readers::default(),
            handover,
            options,
            pool,
            number,
        })
    }

    /// Nodes that the kernel holds now, the root among them.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Files and directories open now.
    pub fn handle_count(&self) -> usize {
        self.handles.len()
    }

    fn writable(&self) -> Result<()> {
        match self.options.access {
            Access::Rw => Ok(()),
            Access::Ro => Err(Errno::ROFS),
        }
    }

    /// This request is about to change something. `Some`: an earlier server began to carry it out; what it wrote down, as far
    /// as it did.
    fn intend(&self, intent: impl FnOnce() -> handover::Intent) -> Option<handover::Intent> {
        match &self.handover {
            Some(handover) => handover.intend(intent),
            None => super::resend::is_resent().then(handover::Intent::default),
        }
    }

    /// The attributes as the kernel is shown them.
    fn shown(&self, found: &found::Found, node: Node) -> Attr {
        if found.attr.mode & SET_ID != 0 && found.kind() == found::REGULAR {
            self.nodes.show_set_id(node);
        }
        found.shown(node, &self.options.ownership)
    }

    fn entry(&self, found: &found::Found, node: Node) -> Entry {
        Entry {
            attr: self.shown(found, node),
            generation: u64::from(found.identity.generation),
            entry_ttl: self.options.ttl,
            attr_ttl: self.options.ttl,
        }
    }
}

/// A node that the kernel knows, as it was last found.
#[derive(Clone, Debug)]
pub(in crate::tree) struct Known {
    pub(in crate::tree) node: Node,
    pub(in crate::tree) kind: u32,
    /// Directory and name, if it has one.
    pub(in crate::tree) name: Option<(Node, Box<[u8]>)>,
}

/// For a tree that is made of this one and another.
impl DirTree {
    /// The nodes that are known, the root not among them.
    pub(in crate::tree) fn known(&self) -> Vec<Known> {
        self.nodes.all()
    }

    /// The node that this file would be.
    pub(in crate::tree) fn number_of(&self, file: impl std::os::fd::AsFd) -> Result<Node> {
        let identity = found::stat_fd(file)?.identity;
        self.nodes.id(identity.dev, identity.ino)
    }

    /// A path to this node for calls that take no descriptor, good until `work` returns.
    pub(in crate::tree) fn with_path<T>(&self, node: Node, work: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        let (fd, _) = self.fd(node)?;
        work(&crate::sys::fs::proc_path(&fd))
    }

    /// This node's file, opened by the server for itself.
    pub(in crate::tree) fn reopen(&self, node: Node, flags: OFlags) -> Result<OwnedFd> {
        let (fd, _) = self.fd(node)?;
        self.pool.reopen(&fd, flags)
    }
}

/// A device number as mknod(2) takes it, of the kernel's 32-bit encoding.
pub(in crate::tree) fn device(rdev: u32) -> u64 {
    let (major, minor) = found::decode_device(rdev);
    rustix::fs::makedev(major, minor)
}

/// A name that stands for one directory entry. The kernel sends no other; what it sends is checked all the same.
fn entry_name(name: &OsStr) -> Result<&[u8]> {
    match name.as_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        name if name.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
        name if name.contains(&b'/') || name.contains(&0) => Err(Errno::INVAL),
        name => Ok(name),
    }
}

impl Tree for DirTree {
    fn lookup(&self, _: &Caller, parent: Node, name: &OsStr) -> Result<Lookup> {
        self.find(parent, entry_name(name)?)
    }
    fn forget(&self, node: Node, count: u64) {
        if self.nodes.forget(node, count) {
            self.pool.remove(self.number, node);
            if let Some(handover) = &self.handover {
                handover.release(node);
            }
            self.nodes.tidy();
        }
    }
    fn getattr(&self, node: Node, handle: Option<Handle>) -> Result<(Attr, Duration)> {
        let found = match handle.and_then(|h| self.handle(h)) {
            Some(open) => open.stat()?,
            None => self.stat(node)?,
        };
        Ok((self.shown(&found, node), self.options.ttl))
    }
    fn readlink(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.read_link(node, out)
    }
    fn open(&self, caller: &Caller, node: Node, flags: i32) -> Result<Opened> {
        self.open_file(caller, node, OFlags::from_bits_retain(flags as u32))
    }
    fn read(&self, node: Node, handle: Handle, offset: u64, size: u32, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.read_file(node, handle, offset, size, out)
    }
    fn readdir(
        &self,
        _: &Caller,
        node: Node,
        handle: Handle,
        cookie: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        self.list(node, handle, cookie, mode, out)
    }
    fn statfs(&self, node: Node) -> Result<Statfs> {
        self.stat_file_system(node)
    }
    fn getxattr(&self, _: &Caller, node: Node, name: &OsStr, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.get_xattr(node, name, out)
    }
    fn listxattr(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.list_xattrs(node, out)
    }
    fn is_live(&self) -> bool {
        !self.options.immutable
    }
    fn opendir(&self, caller: &Caller, node: Node) -> Result<Opened> {
        self.open_directory(caller, node)
    }
    fn releasedir(&self, node: Node, handle: Handle) {
        self.close_handle(node, handle);
    }
    fn flush(&self, _: Node, handle: Handle) -> Result<()> {
        self.flush_file(handle)
    }
    fn release(&self, node: Node, handle: Handle) {
        self.close_handle(node, handle);
    }
    fn fsync(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        self.sync(node, handle, data_only)
    }
    fn fsyncdir(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        self.sync(node, handle, data_only)
    }
    fn access(&self, node: Node, mask: i32) -> Result<()> {
        self.check_access(node, mask)
    }
    fn lseek(&self, node: Node, handle: Handle, offset: i64, whence: i32) -> Result<i64> {
        self.seek(node, handle, offset, whence)
    }
    fn setattr(
        &self,
        caller: &Caller,
        node: Node,
        handle: Option<Handle>,
        change: &Change,
    ) -> Result<(Attr, Duration)> {
        self.writable()?;
        self.change(caller, node, handle, change)
    }
    fn create(&self, caller: &Caller, parent: Node, name: &OsStr, new: New, flags: i32) -> Result<(Entry, Opened)> {
        self.writable()?;
        self.create_file(caller, parent, entry_name(name)?, new, OFlags::from_bits_retain(flags as u32))
    }
    fn mknod(&self, caller: &Caller, parent: Node, name: &OsStr, new: New) -> Result<Entry> {
        self.writable()?;
        self.make_node(caller, parent, entry_name(name)?, new)
    }
    fn mkdir(&self, caller: &Caller, parent: Node, name: &OsStr, new: New) -> Result<Entry> {
        self.writable()?;
        self.make_directory(caller, parent, entry_name(name)?, new)
    }
    fn symlink(&self, caller: &Caller, parent: Node, name: &OsStr, target: &OsStr) -> Result<Entry> {
        self.writable()?;
        self.make_symlink(caller, parent, entry_name(name)?, target)
    }
    fn link(&self, caller: &Caller, node: Node, parent: Node, name: &OsStr) -> Result<Entry> {
        self.writable()?;
        self.make_link(caller, node, parent, entry_name(name)?)
    }
    fn unlink(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        self.writable()?;
        self.remove(caller, parent, entry_name(name)?, names::Removal::File)
    }
    fn rmdir(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        self.writable()?;
        self.remove(caller, parent, entry_name(name)?, names::Removal::Directory)
    }
    fn rename(&self, caller: &Caller, from: (Node, &OsStr), to: (Node, &OsStr), flags: u32) -> Result<()> {
        self.writable()?;
        self.move_name(caller, (from.0, entry_name(from.1)?), (to.0, entry_name(to.1)?), flags)
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
        self.writable()?;
        self.write_file(writer, node, handle, offset, data, OFlags::from_bits_retain(flags as u32))
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
        self.writable()?;
        self.allocate(writer, (node, handle), offset, length, FallocateFlags::from_bits_retain(mode as u32))
    }
    fn copy_file_range(
        &self,
        writer: &Writer,
        from: (Node, Handle, u64),
        to: (Node, Handle, u64),
        length: u64,
    ) -> Result<usize> {
        self.writable()?;
        self.copy_range(writer, from, to, length)
    }
    fn lost_set_id(&self, node: Node) -> bool {
        self.nodes.take_shown_set_id(node)
    }
    fn setxattr(&self, caller: &Caller, node: Node, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        self.writable()?;
        self.set_xattr(caller, node, name, value, flags)
    }
    fn removexattr(&self, caller: &Caller, node: Node, name: &OsStr) -> Result<()> {
        self.writable()?;
        self.remove_xattr(caller, node, name)
    }
}

#[cfg(test)]
mod attack;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
