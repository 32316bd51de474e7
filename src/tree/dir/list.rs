//! Directories: opening them and listing their entries by the file system's own cookies, so that a position stays good while
//! entries come and go.

use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;
use rustix::fs::{self, Mode, OFlags};

use super::files::Open;
use super::found::{self, DIRECTORY};
use super::handover::HandleNote;
use super::stream::Item;
use super::{Attr, Caller, DirItem, DirTree, Entry, Errno, Fit, Handle, ListMode, Node, Opened, Result};
use crate::tree::{Caching, ROOT, Timespec};

/// Directories that are being read without having been opened: as many as a few parallel walks need.
const SHARED_READERS: usize = 16;

/// The readers of directories that were not opened.
#[derive(Debug)]
pub(super) struct Readers(Mutex<LruCache<Node, Arc<Open>>>);

impl Default for Readers {
    fn default() -> Self {
        Readers(Mutex::new(LruCache::new(NonZeroUsize::new(SHARED_READERS).expect("not zero"))))
    }
}

impl DirTree {
    /// The reader of a directory that was not opened: of an immutable tree, or by a tree over this one.
    fn shared_reader(&self, node: Node) -> Result<Arc<Open>> {
        let readers = || self.readers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = readers().get(&node) {
            return Ok(Arc::clone(open));
        }
        let place = self.place(node)?;
        let fd = fs::openat(&place, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let open = Arc::new(Open::new(self.pool.hold(fd)?, OFlags::RDONLY));
        let evicted = readers().push(node, Arc::clone(&open));
        drop(evicted); // closed here, after the lock
        Ok(open)
    }

    pub(super) fn open_directory(&self, caller: &Caller, node: Node) -> Result<Opened> {
        self.pool.room()?;
        let place = self.place(node)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        // Not "." in it: that would take the right to search, where reading is enough.
        let fd = self.options.act_as.run(caller, || self.pool.reopen(&place, flags))?;
        let handle = self.handles.add(Open::new(self.pool.hold(fd)?, OFlags::RDONLY));
        self.note_handle(handle, HandleNote { node, flags: 0, directory: true });
        let cache = if self.options.immutable { Caching::Keep } else { Caching::Fresh };
        Ok(Opened { handle, cache, closes_silently: true })
    }

    pub(super) fn list(
        &self,
        node: Node,
        handle: Handle,
        cookie: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        let open = match self.handle(handle) {
            Some(open) => open,
            None if handle == 0 => self.shared_reader(node)?,
            None => return Err(Errno::BADF),
        };
        let dev = self.nodes.reach(node)?.identity.dev;
        let held = open.any();
        let fd = held.fd();
        let mut stream = open.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.seek(fd, cookie)?;
        let mut given = false;
        while let Some((item, name)) = stream.next(fd)? {
            let answer = match (name, mode) {
                (b"." | b"..", _) | (_, ListMode::Names) => {
                    let entry = self.plain(dev, node, &item, name)?;
                    Some(out(&entry))
                }
                (_, ListMode::Plus) => match self.counted(fd, dev, node, &item, name, out) {
                    Ok(answer) => answer,
                    // The page ends before an entry that cannot be told; the next one begins with the error.
                    Err(e) if !given => return Err(e),
                    Err(_) => break,
                },
            };
            match answer {
                Some(Fit::Full) => break,
                Some(Fit::Taken) => given = true,
                None => {} // vanished since
            }
            stream.taken();
        }
        Ok(())
    }

    /// An entry with its name, number and type alone.
    fn plain<'a>(&self, dev: u64, node: Node, item: &Item, name: &'a [u8]) -> Result<DirItem<'a>> {
        let number = match name {
            b"." => node,
            // What lies above the root is not ours.
            b".." if node == ROOT => ROOT,
            _ => self.nodes.id(dev, item.ino)?,
        };
        Ok(DirItem { name: OsStr::from_bytes(name), node: number, kind: item.kind, cookie: item.cookie, entry: None })
    }

    /// An entry with attributes, which counts as a lookup if it is taken. None: it is not there any more.
    fn counted(
        &self,
        fd: &OwnedFd,
        dev: u64,
        parent: Node,
        item: &Item,
        name: &[u8],
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<Option<Fit>> {
        let entry = match found::stat_name(fd, name) {
            Ok(found) => {
                let node = self.nodes.remember(&found, parent, name)?;
                self.entry(&found, node)
            }
            Err(Errno::NOENT) => return Ok(None),
            // A directory that may be read but not searched: its names show, and asking more of them is refused.
            Err(Errno::ACCESS) if item.kind != 0 => self.unknown(dev, parent, item, name)?,
            Err(e) => return Err(e),
        };
        let node = entry.attr.node;
        let answer = out(&DirItem {
            name: OsStr::from_bytes(name),
            node,
            kind: entry.attr.mode & found::TYPE_BITS,
            cookie: item.cookie,
            entry: Some(entry),
        });
        if answer == Fit::Full {
            self.forget_one(node);
        }
        Ok(Some(answer))
    }

    fn forget_one(&self, node: Node) {
        super::Tree::forget(self, node, 1);
    }

    /// An entry of which only type and number are known. Nothing of it may be kept, so nobody sees the attributes.
    fn unknown(&self, dev: u64, parent: Node, item: &Item, name: &[u8]) -> Result<Entry> {
        let time = Timespec::default();
        let found = found::Found {
            identity: found::Identity { dev, ino: item.ino, generation: 0 },
            mount: 0,
            attr: Attr {
                node: 0,
                mode: item.kind,
                nlink: if item.kind == DIRECTORY { 2 } else { 1 },
                uid: 0,
                gid: 0,
                rdev: 0,
                size: 0,
                blocks: 0,
                blksize: 4096,
                atime: time,
                mtime: time,
                ctime: time,
            },
        };
        let node = self.nodes.remember(&found, parent, name)?;
        let mut entry = self.entry(&found, node);
        entry.entry_ttl = Duration::ZERO;
        entry.attr_ttl = Duration::ZERO;
        Ok(entry)
    }
}
