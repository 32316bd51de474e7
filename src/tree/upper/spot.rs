//! A name in an upper directory and what hides or shows it: the steps that go around each change of a name, so that what is seen is at every
//! one of them what was before or what will be after.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::marks::{self, Above, Names};
use super::veils::Veils;
use super::{DIRECTORY, TARGET, TYPE_BITS, step};
use crate::tree::{Node, Result};

/// A name in a directory whose upper half is there.
pub(super) struct Spot<'a> {
    pub(super) veils: &'a Veils,
    /// The upper directory.
    pub(super) dir: Node,
    pub(super) place: Arc<OwnedFd>,
    pub(super) lower_dir: Option<Node>,
    pub(super) name: &'a [u8],
    pub(super) above: Above,
    /// Is what the image has hidden by a veil?
    pub(super) veiled: bool,
    /// What the image has under this name, seen or not: node and mode.
    pub(super) below: Option<(Node, u32)>,
}

pub(super) fn is_directory(mode: u32) -> bool {
    mode & TYPE_BITS == DIRECTORY
}

impl Spot<'_> {
    /// The mode of what is seen.
    pub(super) fn seen(&self) -> Option<u32> {
        match (self.above, self.below) {
            (Above::File(mode), _) => Some(mode),
            (Above::Nothing, Some((_, mode))) if !self.veiled => Some(mode),
            _ => None,
        }
    }

    pub(super) fn path(&self) -> Vec<u8> {
        marks::path_of(&self.place, self.name)
    }

    /// Has the image a directory here? Then one above is opaque, or shows it.
    pub(super) fn covers_directory(&self) -> bool {
        self.below.is_some_and(|(_, mode)| is_directory(mode))
    }

    /// Does an upper directory show what the image has here, too?
    pub(super) fn is_merged(&self) -> Result<bool> {
        let is_there = matches!(self.above, Above::File(mode) if is_directory(mode));
        Ok(is_there && self.covers_directory() && !self.veiled && !marks::is_opaque(&self.path())?)
    }

    /// Before something takes this name, which nothing is seen under: make room.
    pub(super) fn make_room(&self) -> Result<()> {
        if self.above == Above::Whiteout {
            if self.below.is_some() {
                self.veils.veil(&self.place, self.name)?;
            }
            step("upper.veiled")?;
            marks::take_whiteout(&self.place, self.name)?;
        }
        step("upper.room")
    }

    /// Something took the name: it alone is seen from now on.
    pub(super) fn taken(&self, mode: u32) -> Result<()> {
        step("upper.taken")?;
        if is_directory(mode) && self.covers_directory() {
            marks::set_opaque(&self.path())?;
        }
        if self.veiled || self.above == Above::Whiteout { self.veils.unveil(&self.place, self.name) } else { Ok(()) }
    }

    /// Nothing took it: what was hidden stays so.
    pub(super) fn not_taken(&self) {
        if self.above == Above::Whiteout && self.below.is_some() {
            let restored = self.veils.whiten(&self.place, self.name);
            let _ = restored.inspect_err(|e| log::warn!(target: TARGET, "put a whiteout back: {e}"));
        }
    }

    /// Before what is seen under this name goes: what the image has must not show in its place.
    pub(super) fn cover(&self) -> Result<()> {
        if self.below.is_some() {
            self.veils.veil(&self.place, self.name)?;
        }
        step("upper.covered")
    }

    /// It is gone.
    pub(super) fn gone(&self) -> Result<()> {
        step("upper.gone")?;
        if self.below.is_some() { self.veils.whiten(&self.place, self.name) } else { Ok(()) }
    }

    /// An upper directory that was emptied to go is not gone: hide again what its marks hid.
    pub(super) fn put_back(&self, emptied: &Names) {
        let restored =
            marks::open_directory(&self.place, self.name).and_then(|dir| self.veils.whiten_again(dir, emptied));
        match restored {
            Ok(()) => self.not_gone(),
            // Behind its veil it stays empty.
            Err(e) => log::warn!(target: TARGET, "put whiteouts back: {e}"),
        }
    }

    /// Is what is seen here and there one file with two names?
    pub(super) fn is_same_file(&self, other: &Spot<'_>) -> Result<bool> {
        match (self.above, other.above) {
            (Above::File(_), Above::File(_)) => {
                Ok(marks::inode(&self.place, self.name)? == marks::inode(&other.place, other.name)?)
            }
            (Above::Nothing, Above::Nothing) => {
                Ok(self.seen().is_some() && other.seen().is_some() && self.below == other.below)
            }
            _ => Ok(false),
        }
    }

    /// It is not gone.
    pub(super) fn not_gone(&self) {
        if self.below.is_some() && !self.veiled {
            let _ = self
                .veils
                .unveil(&self.place, self.name)
                .inspect_err(|e| log::warn!(target: TARGET, "take a veil away: {e}"));
        }
    }

    /// What is here now is all that is seen.
    pub(super) fn unveil(&self) -> Result<()> {
        step("upper.moved")?;
        if self.below.is_some() { self.veils.unveil(&self.place, self.name) } else { Ok(()) }
    }
}
