//! From a node to a descriptor or to what it is now. Every way ends with a comparison of device, inode number and birth time.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::fds::{Held, MAX_PIECE, Use, open_place};
use super::found::{self, DIRECTORY, Found, Identity};
use super::nodes::Reach;
use super::{DirTree, Errno, Node, Result};
use crate::tree::ROOT;

/// Deepest directory that is reached from the root in one go. The kernel has no limit but a process cannot make deeper trees
/// faster than we walk them; each level is one lookup of the table.
const MAX_DEPTH: usize = 100_000;

/// A descriptor of a node: a cached or own one, or one that is held elsewhere.
#[derive(Debug)]
pub(super) enum Fd {
    Shared(Arc<OwnedFd>),
    Held(Arc<Held>),
    Own(OwnedFd),
}

impl std::os::fd::AsFd for Fd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Fd::Shared(fd) => fd.as_fd(),
            Fd::Held(held) => held.fd().as_fd(),
            Fd::Own(fd) => fd.as_fd(),
        }
    }
}

/// The same file as was looked up? Another one in its place is ESTALE: the kernel looks the name up again.
fn same(found: Found, identity: Identity) -> Result<Found> {
    if found.identity == identity { Ok(found) } else { Err(Errno::STALE) }
}

impl DirTree {
    /// What a node is now.
    pub(super) fn stat(&self, node: Node) -> Result<Found> {
        if node == ROOT {
            return found::stat_fd(&self.root);
        }
        if let Some(fd) = self.pool.get(self.number, node, Use::Place) {
            return found::stat_fd(&fd);
        }
        let reach = self.nodes.reach(node)?;
        if let Some(pin) = &reach.pin {
            return found::stat_fd(pin.fd());
        }
        for alias in &reach.aliases {
            let found = self.place(alias.parent).and_then(|dir| found::stat_name(&dir, &alias.name));
            match found.and_then(|f| same(f, reach.identity)) {
                Err(e) if gone(e) => {}
                other => return other,
            }
        }
        match self.open_elsewhere(&reach) {
            Some(open) => open.stat(),
            None => Err(Errno::STALE),
        }
    }

    /// An O_PATH descriptor of a node, and what the node is now.
    pub(super) fn fd(&self, node: Node) -> Result<(Fd, Found)> {
        let with_stat = |fd: Fd| found::stat_fd(&fd).map(|found| (fd, found));
        if node == ROOT {
            return with_stat(Fd::Shared(Arc::clone(&self.root)));
        }
        let reach = self.nodes.reach(node)?;
        if reach.kind == DIRECTORY {
            return with_stat(Fd::Shared(self.place(node)?));
        }
        if let Some(pin) = reach.pin {
            return with_stat(Fd::Held(pin));
        }
        // Open already: a program that has just written a file sets its owner, mode and times through the same descriptor.
        if let Some(open) = self.open_elsewhere(&reach)
            && let Ok((fd, found)) = with_stat(Fd::Held(open.any()))
            && found.identity == reach.identity
        {
            return Ok((fd, found));
        }
        self.by_name(&reach).map(|(fd, found)| (Fd::Own(fd), found))
    }

    /// Like [`Self::fd`], but without a look at a file that is open: who has just written one sets its owner, mode and times one by one.
    pub(super) fn fd_and_kind(&self, node: Node) -> Result<(Fd, u32)> {
        match (self.open_now(node), self.nodes.kind(node)) {
            (Some(open), Some(kind)) => Ok((Fd::Held(open.any()), kind)),
            _ => self.fd(node).map(|(fd, found)| (fd, found.kind())),
        }
    }

    /// A file that is open.
    pub(super) fn open_now(&self, node: Node) -> Option<Arc<super::files::Open>> {
        self.handles.get(self.nodes.a_handle(node)?)
    }

    /// [`Self::fd`], also where it is open already.
    pub(super) fn fd_by_name(&self, node: Node) -> Result<OwnedFd> {
        self.by_name(&self.nodes.reach(node)?).map(|(fd, _)| fd)
    }

    fn by_name(&self, reach: &Reach) -> Result<(OwnedFd, Found)> {
        for alias in &reach.aliases {
            let opened = self.place(alias.parent).and_then(|dir| open_place(&dir, &alias.name, OFlags::empty()));
            match opened.and_then(|fd| found::stat_fd(&fd).and_then(|f| same(f, reach.identity)).map(|f| (fd, f))) {
                Err(e) if gone(e) => {}
                other => return other,
            }
        }
        Err(Errno::STALE)
    }

    fn open_elsewhere(&self, reach: &Reach) -> Option<Arc<super::files::Open>> {
        reach.handles.iter().find_map(|&h| self.handles.get(h))
    }

    /// An O_PATH descriptor of a directory, to start from. ENOTDIR: it is something else.
    pub(in crate::tree) fn place(&self, node: Node) -> Result<Arc<OwnedFd>> {
        if node == ROOT {
            return Ok(Arc::clone(&self.root));
        }
        if let Some(fd) = self.pool.get(self.number, node, Use::Place) {
            return Ok(fd);
        }
        // Up, until a directory that is open; then down in one call.
        let reach = self.nodes.reach(node)?;
        if reach.kind != DIRECTORY {
            return Err(Errno::NOTDIR);
        }
        if let Some(pin) = &reach.pin {
            return Ok(Arc::new(pin.fd().try_clone().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::NFILE))?));
        }
        let identity = reach.identity;
        let mut names: Vec<Box<[u8]>> = Vec::new();
        let mut next = reach;
        let base = loop {
            let alias = next.aliases.into_iter().next().ok_or(Errno::STALE)?;
            names.push(alias.name);
            if names.len() > MAX_DEPTH {
                return Err(Errno::LOOP);
            }
            if alias.parent == ROOT {
                break Arc::clone(&self.root);
            }
            if let Some(fd) = self.pool.get(self.number, alias.parent, Use::Place) {
                break fd;
            }
            next = self.nodes.reach(alias.parent)?;
            if let Some(pin) = &next.pin {
                break Arc::new(pin.fd().try_clone().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::NFILE))?);
            }
        };
        let fd = descend(base, &names)?;
        let found = same(found::stat_fd(&fd)?, identity)?;
        if found.mount == self.root_mount {
            // A cached descriptor in a mount below would keep the host from unmounting it.
            self.pool.put(self.number, node, Use::Place, &fd);
        }
        Ok(fd)
    }
}

/// Errors that say that a name does not lead there any more.
fn gone(e: Errno) -> bool {
    matches!(e, Errno::NOENT | Errno::NOTDIR | Errno::STALE | Errno::LOOP)
}

/// Open the directory that `names` (the last first) lead to from `base`, as many at a time as fit in a path.
fn descend(base: Arc<OwnedFd>, names: &[Box<[u8]>]) -> Result<Arc<OwnedFd>> {
    let mut at = base;
    let mut path = Vec::with_capacity(256);
    let mut left = names.iter().rev().peekable();
    while let Some(name) = left.next() {
        path.extend_from_slice(name);
        if left.peek().is_some_and(|next| path.len() + 1 + next.len() <= MAX_PIECE) {
            path.push(b'/');
            continue;
        }
        let fd = open_place(&at, &path, OFlags::DIRECTORY).map_err(|e| if gone(e) { Errno::STALE } else { e })?;
        at = Arc::new(fd);
        path.clear();
    }
    Ok(at)
}
