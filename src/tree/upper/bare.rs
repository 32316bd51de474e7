//! Upper files without content of their own: where only attributes or names of a file changed, the image still has what is in it, and reading goes
//! there. A mark says so, and the file has its size as a hole. When it is opened to write, the content is copied first, in place.
//!
//! Not where the changes outlive the rootfs: other engines read those, and would find zeros. Nor for files that lose setuid or capabilities when they
//! are written, as they are when they are filled.

use rustix::fs::{self, AtFlags, OFlags, Timespec, Timestamps, UTIME_OMIT};

use super::marks::{self, Origin};
use super::raise::{Content, copy_content};
use super::{REGULAR, TYPE_BITS, UpperTree, step};
use crate::sys::attrs::CAPABILITY;
use crate::tree::dir::SET_ID;
use crate::tree::{Attr, Change, Node, Result, Tree as _};

/// How much of a file must be above for this change.
pub(super) fn needed_for(change: &Change) -> Content {
    match change.size {
        Some(0) => Content::Empty,
        None if change.mode.is_none_or(|mode| mode & SET_ID == 0) => Content::Bare,
        _ => Content::Whole,
    }
}

/// The same for setting an attribute.
pub(super) fn needed_for_attribute(name: &[u8]) -> Content {
    if name == CAPABILITY { Content::Whole } else { Content::Bare }
}

impl UpperTree {
    /// The node of the image whose content a node shows.
    pub(super) fn content_below(&self, node: Node) -> Option<Node> {
        match self.side(node) {
            super::Side::Lower(lower) => Some(lower),
            super::Side::Upper(_) => self.pairs.is_bare(node).then_some(node),
        }
    }

    pub(super) fn may_be_bare(&self, lower: Node, attr: &Attr) -> Result<bool> {
        let is_plain = attr.mode & TYPE_BITS == REGULAR && attr.mode & SET_ID == 0 && attr.size > 0;
        Ok(!self.durable && is_plain && !self.has_capability(lower)?)
    }

    pub(super) fn has_capability(&self, lower: Node) -> Result<bool> {
        Ok(self.lower.xattrs_of(lower)?.iter().any(|(name, _)| name.as_bytes() == CAPABILITY))
    }

    /// Give the upper file of a node the content that the image has. Its times stay, also when the server is killed meanwhile.
    pub(super) fn fill(&self, lower: Node, upper: Node, content: Content) -> Result<()> {
        let _alone = self.locks.file(lower);
        if content == Content::Bare || !self.pairs.is_bare(lower) {
            return Ok(());
        }
        let file = self.upper.reopen(upper, OFlags::RDWR)?;
        let stat = fs::fstat(&file)?;
        self.upper.with_path(upper, |path| {
            let path = path.as_bytes();
            if content == Content::Empty {
                fs::ftruncate(&file, 0)?;
            } else {
                let mtime = Timespec { tv_sec: stat.st_mtime as _, tv_nsec: stat.st_mtime_nsec as _ };
                Origin { is_bare: true, filling: Some(mtime), ..Origin::of_copy(lower, upper) }.write(path)?;
                step("upper.filling")?;
                let from = self.lower.content_fd(lower)?;
                let size = stat.st_size as u64;
                let copied = copy_content(&from, &file, size);
                if copied.is_err() {
                    // What came before the disk was full would be held, and never read.
                    fs::ftruncate(&file, 0).and_then(|()| fs::ftruncate(&file, size))?;
                }
                step("upper.filled")?;
                put_back(path, mtime).and(copied)?;
            }
            Origin::of_copy(lower, upper).write(path)
        })?;
        self.pairs.filled(lower);
        step("upper.whole")
    }

    /// What the upper file at `path` says of itself: which node of the image it stands for, and whether its content is still there. A server that was
    /// killed when it copied the content left another time.
    pub(super) fn told(&self, path: &[u8], upper: Node) -> Result<Option<(Node, bool)>> {
        let told = marks::origin(path, upper)?;
        if let Some(Origin { lower, filling: Some(_), .. }) = told {
            // Held while it is filled.
            let _alone = self.locks.file(lower);
            if let Some(Origin { filling: Some(mtime), .. }) = marks::origin(path, upper)? {
                put_back(path, mtime)?;
                Origin { is_bare: true, ..Origin::of_copy(lower, upper) }.write(path)?;
            }
        }
        Ok(told.map(|origin| (origin.lower, origin.is_bare)))
    }

    /// A pair was just made of what the file had said. Another request may have filled it, and the kernel forgotten it, since then.
    pub(super) fn check_bare(&self, lower: Node, upper: Node, path: &[u8]) {
        // What cannot be asked is as it was: filling it will say so.
        if self.told(path, upper).is_ok_and(|told| told.is_none_or(|(_, is_bare)| !is_bare)) {
            self.pairs.filled(lower);
        }
    }

    /// What it takes on the disk is what the image's file takes.
    pub(super) fn show_blocks(&self, node: Node, attr: &mut Attr) {
        if self.pairs.is_bare(node)
            && let Ok((lower, _)) = self.lower.getattr(node, None)
        {
            attr.blocks = lower.blocks;
        }
    }
}

fn put_back(path: &[u8], mtime: Timespec) -> Result<()> {
    let times = Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: mtime };
    fs::utimensat(fs::CWD, path, &times, AtFlags::empty())
}
