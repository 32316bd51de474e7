//! Names: looking them up, making, linking, moving and removing them.
//!
//! What is removed while the kernel still knows it is pinned by one descriptor first, so that a file unlinked but in use, or a
//! removed working directory, keeps answering.

use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags};

use super::fds::{Held, fd_name, open_place};
use super::found::{self, DIRECTORY, Found, Identity, REGULAR, TYPE_BITS};
use super::handover::Intent;
use super::identity::with_umask;
use super::{Caller, DirTree, Entry, Errno, Lookup, New, Node, Opened, Result};
use crate::tree::ROOT;

/// Permission bits, setuid, setgid and sticky among them.
pub(super) const PERMISSION_BITS: u32 = 0o7777;
/// Set-group-id.
pub(super) const SET_GID: u32 = 0o2000;

/// A name in a directory.
type Name<'a> = (Node, &'a [u8]);

/// What is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    File,
    Directory,
}

/// How long ago a request may have come first: a server is back within seconds, a machine that swaps takes longer.
const RECENT_S: u64 = 300;

/// The name is taken: by this request, when an earlier server began to carry it out?
fn made_before(earlier: Option<Intent>, dir: &OwnedFd, name: &[u8], is_it: impl Fn(&Found) -> bool) -> bool {
    earlier.is_some() && found::stat_name(dir, name).is_ok_and(|found| is_it(&found))
}

fn is_young(found: &Found) -> bool {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    now.abs_diff(found.attr.ctime.secs) <= RECENT_S
}

fn is_empty(dir: &OwnedFd, name: &[u8]) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(fd) = fs::openat(dir, name, flags, Mode::empty()) else { return false };
    let mut buffer = [std::mem::MaybeUninit::uninit(); 256];
    let mut entries = fs::RawDir::new(fd, &mut buffer);
    while let Some(entry) = entries.next() {
        match entry {
            Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => {}
            _ => return false,
        }
    }
    true
}

impl DirTree {
    pub(super) fn find(&self, parent: Node, name: &[u8]) -> Result<Lookup> {
        let dir = self.place(parent)?;
        match found::stat_name(&dir, name) {
            Ok(found) => self.known_as(&found, parent, name).map(Lookup::Found),
            Err(Errno::NOENT) => Ok(Lookup::Absent(self.options.negative_ttl)),
            Err(e) => Err(e),
        }
    }

    fn known_as(&self, found: &Found, parent: Node, name: &[u8]) -> Result<Entry> {
        let node = self.nodes.remember(found, parent, name)?;
        self.nodes.tidy();
        Ok(self.entry(found, node))
    }

    /// Make something at `parent`/`name` as the caller, then look it up.
    fn make(
        &self,
        caller: &Caller,
        (parent, name): (Node, &[u8]),
        new: New,
        work: impl Fn(&OwnedFd, Mode) -> Result<()>,
        is_it: impl Fn(&OwnedFd, &Found) -> bool,
    ) -> Result<Entry> {
        let dir = self.place(parent)?;
        let earlier = self.intend(Intent::default);
        let made = with_umask(new.umask, |take| {
            let mode = Mode::from_raw_mode(new.mode & PERMISSION_BITS & !take);
            self.as_maker(caller, new.mode, || work(&dir, mode))
        });
        match made {
            Err(Errno::EXIST) if made_before(earlier, &dir, name, |found| is_it(&dir, found)) => {}
            other => other?,
        }
        self.known_as(&found::stat_name(&dir, name)?, parent, name)
    }

    fn as_maker<T>(&self, caller: &Caller, mode: u32, work: impl Fn() -> Result<T>) -> Result<T> {
        if mode & SET_GID == 0 {
            self.options.act_as.run(caller, work)
        } else {
            // Set-group-id stays only if the caller is in the group (inode_init_owner in fs/inode.c).
            self.options.act_as.run_with_groups(caller, work)
        }
    }

    pub(super) fn make_node(&self, caller: &Caller, parent: Node, name: &[u8], new: New) -> Result<Entry> {
        let kind = FileType::from_raw_mode(new.mode & TYPE_BITS);
        if matches!(kind, FileType::Unknown | FileType::Directory | FileType::Symlink) {
            return Err(Errno::INVAL);
        }
        self.make(
            caller,
            (parent, name),
            new,
            |dir, mode| fs::mknodat(dir, name, kind, mode, super::device(new.rdev)),
            |_, found| found.kind() == new.mode & TYPE_BITS && found.attr.size == 0 && is_young(found),
        )
    }

    pub(super) fn make_directory(&self, caller: &Caller, parent: Node, name: &[u8], new: New) -> Result<Entry> {
        self.make(
            caller,
            (parent, name),
            new,
            |dir, mode| fs::mkdirat(dir, name, mode),
            |dir, found| found.kind() == DIRECTORY && is_young(found) && is_empty(dir, name),
        )
    }

    pub(super) fn make_symlink(&self, caller: &Caller, parent: Node, name: &[u8], target: &OsStr) -> Result<Entry> {
        let new = New { mode: 0, umask: 0, rdev: 0 };
        self.make(
            caller,
            (parent, name),
            new,
            |dir, _| fs::symlinkat(target.as_bytes(), dir, name),
            |dir, _| fs::readlinkat(dir, name, Vec::new()).is_ok_and(|there| there.as_bytes() == target.as_bytes()),
        )
    }

    pub(super) fn make_link(&self, caller: &Caller, node: Node, parent: Node, name: &[u8]) -> Result<Entry> {
        let (file, linked) = self.fd(node)?;
        let source = fd_name(&file);
        let new = New { mode: 0, umask: 0, rdev: 0 };
        // AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH; the magic link needs nothing (open(2), O_TMPFILE).
        self.make(
            caller,
            (parent, name),
            new,
            |dir, _| match fs::linkat(self.pool.proc_fd(), source.as_str(), dir, name, AtFlags::SYMLINK_FOLLOW) {
                // Open since before the last worker died, through that one's copy of the mount: again by its name.
                Err(Errno::XDEV) => {
                    let file = self.fd_by_name(node)?;
                    let source = fd_name(&file);
                    fs::linkat(self.pool.proc_fd(), source.as_str(), dir, name, AtFlags::SYMLINK_FOLLOW)
                }
                other => other,
            },
            |_, found| found.identity == linked.identity,
        )
    }

    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: Node,
        name: &[u8],
        new: New,
        flags: OFlags,
    ) -> Result<(Entry, Opened)> {
        self.pool.room()?;
        let dir = self.place(parent)?;
        let backing = self.backing_flags(flags);
        let earlier = self.intend(Intent::default);
        let made = with_umask(new.umask, |take| {
            let mode = Mode::from_raw_mode(new.mode & PERMISSION_BITS & !take);
            // Always exclusive: what is there already may be a FIFO or a device, which must not be opened.
            let flags = backing.difference(OFlags::TRUNC)
                | OFlags::CREATE
                | OFlags::EXCL
                | OFlags::NOFOLLOW
                | OFlags::NONBLOCK
                | OFlags::CLOEXEC;
            self.as_maker(caller, new.mode, || fs::openat(&dir, name, flags, mode))
        });
        match made {
            Ok(fd) => {
                let found = found::stat_fd(&fd)?;
                let entry = self.known_as(&found, parent, name)?;
                match self.opened(entry.attr.node, fd, flags, &found) {
                    Ok(opened) => Ok((entry, opened)),
                    Err(e) => {
                        crate::tree::Tree::forget(self, entry.attr.node, 1);
                        Err(e)
                    }
                }
            }
            Err(Errno::EXIST)
                if !flags.contains(OFlags::EXCL)
                    || made_before(earlier, &dir, name, |f| f.kind() == REGULAR && f.attr.size == 0 && is_young(f)) =>
            {
                // Made on the host since the kernel looked, or by this request when it came first.
                let found = found::stat_name(&dir, name)?;
                if found.kind() != REGULAR {
                    return Err(if found.kind() == DIRECTORY { Errno::ISDIR } else { Errno::NXIO });
                }
                let entry = self.known_as(&found, parent, name)?;
                match self.open_file(caller, entry.attr.node, flags) {
                    Ok(opened) => Ok((entry, opened)),
                    Err(e) => {
                        crate::tree::Tree::forget(self, entry.attr.node, 1);
                        Err(e)
                    }
                }
            }
            Err(e) => Err(e),
        }
    }

    pub(super) fn remove(&self, caller: &Caller, parent: Node, name: &[u8], what: Removal) -> Result<()> {
        let dir = self.place(parent)?;
        let there = found::stat_name(&dir, name);
        let intent = || Intent { first: there.ok().map(|found| found.identity), ..Intent::default() };
        if let Some(earlier) = self.intend(intent)
            && let gone @ (Err(Errno::NOENT) | Ok(_)) = there
            && gone.ok().is_none_or(|found| earlier.first.is_some_and(|first| first != found.identity))
        {
            // It is gone, as this request wants it; what has the name now is somebody else's.
            if let Some(node) = earlier.first.and_then(|first| self.nodes.known_by(first)) {
                self.lost(node, parent, name, None);
            }
            return Ok(());
        }
        let known = self.will_lose(&dir, parent, name)?;
        let flags = match what {
            Removal::File => AtFlags::empty(),
            Removal::Directory => AtFlags::REMOVEDIR,
        };
        let removed = self.options.act_as.run(caller, || fs::unlinkat(&dir, name, flags));
        if let Err(e) = removed {
            self.still_named(known.as_ref());
            return Err(e);
        }
        if let Some((node, pin)) = known {
            self.lost(node, parent, name, pin);
        }
        Ok(())
    }

    /// Did an earlier server carry this move out, of what lay at `from` and `to` before? Then the names change for the nodes.
    fn moved_before(
        &self,
        earlier: Intent,
        now: [Option<Identity>; 2],
        from: Name<'_>,
        to: Name<'_>,
        exchange: bool,
    ) -> bool {
        let [at_from, at_to] = now;
        let Some(first) = earlier.first else {
            // Nothing was written down: what is gone from one place and known at the other was moved.
            let node = at_to.filter(|_| at_from.is_none()).and_then(|identity| self.nodes.known_by(identity));
            if let Some(node) = node {
                self.renamed(node, from, to);
            }
            return node.is_some();
        };
        let is_done = at_to == Some(first) && if exchange { at_from == earlier.second } else { at_from != Some(first) };
        if !is_done {
            return false;
        }
        match earlier.second.and_then(|second| self.nodes.known_by(second)) {
            Some(node) if exchange => self.renamed(node, to, from),
            Some(node) => self.lost(node, to.0, to.1, None),
            None => {}
        }
        if let Some(node) = self.nodes.known_by(first) {
            self.renamed(node, from, to);
        }
        true
    }

    fn renamed(&self, node: Node, from: Name<'_>, to: Name<'_>) {
        self.nodes.add_name(node, to.0, to.1);
        self.nodes.remove_name(node, from.0, from.1, None);
    }

    /// The node that `parent`/`name` leads to, if the kernel knows it, and what holds it if that is its last name.
    fn will_lose(&self, dir: &OwnedFd, parent: Node, name: &[u8]) -> Result<Option<(Node, Option<Arc<Held>>)>> {
        let found = found::stat_name(dir, name)?;
        let Some(node) = self.nodes.known(&found).filter(|&n| n != ROOT) else {
            return Ok(None);
        };
        if !self.nodes.is_last_name(node, parent, name) {
            return Ok(Some((node, None)));
        }
        let pin = open_place(dir, name, OFlags::empty()).and_then(|fd| self.pool.hold(fd));
        // Without a pin the name still goes; only what holds the file without having it open gets ESTALE.
        let pin = pin.inspect_err(|e| log::debug!(target: "fsprov::tree::dir", "pin a removed file: {e}")).ok();
        if let (Some(handover), Some(pin)) = (&self.handover, &pin) {
            // Before the name goes: afterwards a kill would lose the file.
            handover.keep(node, pin.fd().as_fd());
        }
        Ok(Some((node, pin.map(Arc::new))))
    }

    /// What would have lost its last name did not.
    fn still_named(&self, known: Option<&(Node, Option<Arc<Held>>)>) {
        if let (Some(handover), Some((node, Some(_)))) = (&self.handover, known) {
            handover.release(*node);
        }
    }

    fn lost(&self, node: Node, parent: Node, name: &[u8], pin: Option<Arc<Held>>) {
        self.nodes.remove_name(node, parent, name, pin);
        self.pool.remove(self.number, node);
    }

    pub(super) fn move_name(&self, caller: &Caller, from: (Node, &[u8]), to: (Node, &[u8]), flags: u32) -> Result<()> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let (from_dir, to_dir) = (self.place(from.0)?, self.place(to.0)?);
        let moved = found::stat_name(&from_dir, from.1);
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let target = found::stat_name(&to_dir, to.1).ok();
        let now = [moved.ok(), target].map(|found| found.map(|f| f.identity));
        if let Some(earlier) = self.intend(|| Intent { first: now[0], second: now[1], size: None })
            && self.moved_before(earlier, now, from, to, exchange)
        {
            return Ok(());
        }
        let moved = moved?;
        let victim = match &target {
            Some(_) if !exchange => self.will_lose(&to_dir, to.0, to.1)?,
            _ => None,
        };
        let renamed = self.options.act_as.run(caller, || fs::renameat_with(&from_dir, from.1, &to_dir, to.1, flags));
        if let Err(e) = renamed {
            self.still_named(victim.as_ref());
            return Err(e);
        }
        if target.is_some_and(|t| t.identity == moved.identity) {
            return Ok(()); // two links to one file: rename(2) does nothing
        }
        if let Some((node, pin)) = victim {
            self.lost(node, to.0, to.1, pin);
        }
        if let Some(node) = self.nodes.known(&moved) {
            self.renamed(node, from, to);
        }
        if exchange && let Some(node) = target.and_then(|t| self.nodes.known(&t)) {
            self.renamed(node, to, from);
        }
        self.nodes.tidy();
        Ok(())
    }
}
