//! What was changed, as a list of paths.

use std::collections::BTreeSet;

use super::Upper;
use super::below::{Below, Seen};
use super::walk::{Found, Is, Shows, Visitor};
use crate::error::Result;
use crate::index::{Time, Xattr};
use crate::stubs::{self, Stub};

/// What became of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Changed {
    /// The image has it too.
    Changed,
    /// The image does not have it.
    Added,
    /// The image has it.
    Deleted,
}

/// A path that was changed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Change {
    /// What became of it.
    pub what: Changed,
    /// From the root: `/etc/passwd`.
    pub path: Vec<u8>,
}

impl Upper {
    /// What was changed upon `below`, in byte order. A directory is there if itself was changed, or something in it.
    pub(crate) fn list(&self, below: &Below) -> Result<Vec<Change>> {
        let mut list = Lister { below, changes: Vec::new(), open: Vec::new() };
        self.walk(&mut list)?;
        let mut changes = list.changes;
        changes.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(changes)
    }
}

/// A directory on the way.
struct Open {
    /// What came before it and its content.
    before: usize,
    /// Its own line stands, whatever is in it.
    stays: Stays,
    /// Something in it was left out: its time says nothing.
    left_out: bool,
    /// It is opaque, or lies in one that is: nothing of the layers shows through.
    shows: Shows,
    /// Names of the layers that are hidden, unless they come.
    hidden: BTreeSet<Vec<u8>>,
}

/// Does a directory's line stand?
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stays {
    Yes,
    /// Its time alone is another.
    ForItsTime,
    No,
}

struct Lister<'a> {
    below: &'a Below,
    changes: Vec<Change>,
    open: Vec<Open>,
}

impl Lister<'_> {
    fn push(&mut self, what: Changed, path: &[u8]) {
        self.changes.push(Change { what, path: [b"/", path].concat() });
    }

    /// Does a directory look other than the layers' one?
    fn stays(found: &Found<'_>, xattrs: &[Xattr], seen: &Seen) -> Stays {
        let stat = &found.stat;
        let owner = (stat.st_uid, stat.st_gid);
        let mtime = Time { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 };
        let is_same = (stat.st_mode & 0o7777, owner, xattrs) == (seen.mode, seen.owner, &*seen.xattrs);
        if !seen.is_directory || !is_same || found.has_acl {
            Stays::Yes
        } else if mtime == seen.mtime {
            Stays::No
        } else {
            Stays::ForItsTime
        }
    }

    /// The open directory has told what became of this name.
    fn told(&mut self, path: &[u8]) {
        if let Some(parent) = self.open.last_mut() {
            let name = path.iter().rposition(|b| *b == b'/').map_or(path, |slash| &path[slash + 1..]);
            parent.hidden.remove(name);
        }
    }

    fn note_left_out(&mut self) {
        if let Some(parent) = self.open.last_mut() {
            parent.left_out = true;
        }
    }
}

impl Visitor for Lister<'_> {
    fn found(&mut self, found: &Found<'_>) -> Result<()> {
        let path = found.path;
        let seen = self.below.look(path)?;
        self.told(path);
        let what = if seen.is_some() { Changed::Changed } else { Changed::Added };
        if let Is::Directory { shows, xattrs } = &found.is {
            let before = self.changes.len();
            let is_to_run = seen.is_none() && stubs::at(path).is_some();
            let stays = match &seen {
                None if is_to_run => Stays::No,
                None => Stays::Yes,
                Some(seen) => Lister::stays(found, xattrs, seen),
            };
            let shows = match self.open.last() {
                Some(Open { shows: Shows::ItselfAlone, .. }) => Shows::ItselfAlone,
                _ => *shows,
            };
            let is_hiding = shows == Shows::ItselfAlone && seen.is_some_and(|seen| seen.is_directory);
            let hidden = if is_hiding { self.below.names(path)?.into_iter().collect() } else { BTreeSet::new() };
            if !path.is_empty() {
                self.push(what, path);
            }
            self.open.push(Open { before, stays, left_out: false, shows, hidden });
            return Ok(());
        }
        // Engines make these for what they mount there: an empty one is not the program's.
        let is_to_run = match (stubs::at(path), &found.is) {
            (Some(Stub::Symlink(to)), Is::Symlink(target)) => target == to.as_bytes(),
            (Some(_), Is::File { .. }) => found.stat.st_size == 0,
            _ => false,
        };
        if seen.is_none() && is_to_run {
            self.note_left_out();
        } else {
            self.push(what, path);
        }
        Ok(())
    }

    fn hidden(&mut self, path: &[u8]) -> Result<()> {
        // An opaque directory, too, can have a whiteout: FUSE makes one where a file that it had copied is removed.
        self.told(path);
        if self.below.look(path)?.is_some() {
            self.push(Changed::Deleted, path);
        }
        Ok(())
    }

    fn end(&mut self, directory: &[u8]) -> Result<()> {
        let Some(Open { before, stays, left_out, shows: _, hidden }) = self.open.pop() else { return Ok(()) };
        for name in hidden {
            let path = if directory.is_empty() { name } else { [directory, b"/", &name].concat() };
            self.push(Changed::Deleted, &path);
        }
        let goes = stays == Stays::No || left_out && stays == Stays::ForItsTime;
        if goes && !directory.is_empty() && self.changes.len() == before + 1 {
            let gone = self.changes.pop();
            if gone.is_some_and(|gone| gone.what == Changed::Added) {
                self.note_left_out();
            }
        }
        Ok(())
    }
}
