//! Which upper file stands for which file of the image, and how often the kernel holds nodes of the image.
//!
//! A node of the image that is not here was not copied up: everything that the kernel knows was looked up through us, or copied up by us.
//! A pair holds one reference to the upper file in the directory tree, and lives until the kernel has forgotten the node.

use std::sync::atomic::{AtomicU32, Ordering};

use dashmap::mapref::entry::Entry as MapEntry;
use dashmap::{DashMap, DashSet};

use crate::tree::{Node, ROOT};

#[derive(Debug)]
pub(super) struct Pairs {
    up: DashMap<Node, Node>,
    down: DashMap<Node, Node>,
    /// Nodes of the image whose upper files have no content of their own.
    bare: DashSet<Node>,
    /// The kernel's references to nodes of the image, by row. Four bytes a file, and no page of memory before it is needed.
    references: Box<[AtomicU32]>,
}

/// What became of a pair that was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Joined {
    /// It was not known: the reference in the directory tree is its own from now on.
    New,
    /// It was.
    Known,
    /// Another upper file stands for this one.
    Taken,
}

impl Pairs {
    /// `top` stands for the root.
    pub(super) fn new(inodes: u32, top: Node) -> Self {
        // Zeroed by the allocator, which takes it from the kernel untouched.
        let references = vec![0_u32; inodes as usize].into_iter().map(AtomicU32::new).collect();
        let pairs = Pairs { up: DashMap::new(), down: DashMap::new(), bare: DashSet::new(), references };
        pairs.join(ROOT, top, 1, false);
        pairs
    }

    /// The upper file that stands for a node of the image.
    pub(super) fn upper(&self, lower: Node) -> Option<Node> {
        self.up.get(&lower).map(|upper| *upper)
    }

    /// The node of the image that an upper file stands for.
    pub(super) fn lower(&self, upper: Node) -> Option<Node> {
        self.down.get(&upper).map(|lower| *lower)
    }

    fn references(&self, lower: Node) -> Option<&AtomicU32> {
        self.references.get(usize::try_from(lower.checked_sub(ROOT)?).ok()?)
    }

    /// The kernel is told of a node of the image.
    pub(super) fn count(&self, lower: Node, more: u32) {
        if let Some(count) = self.references(lower) {
            let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n.saturating_add(more)));
        }
    }

    /// Does an upper file stand for this node of the image whose content the image still has?
    pub(super) fn is_bare(&self, lower: Node) -> bool {
        self.bare.contains(&lower)
    }

    /// It has its own content now.
    pub(super) fn filled(&self, lower: Node) {
        self.bare.remove(&lower);
    }

    /// `upper` stands for `lower`; the kernel is told of it so often.
    pub(super) fn join(&self, lower: Node, upper: Node, told: u32, is_bare: bool) -> Joined {
        match self.up.entry(lower) {
            MapEntry::Occupied(at) if *at.get() != upper => Joined::Taken,
            MapEntry::Occupied(at) => {
                self.count(lower, told);
                drop(at);
                Joined::Known
            }
            MapEntry::Vacant(at) => {
                self.count(lower, told);
                self.down.insert(upper, lower);
                if is_bare {
                    self.bare.insert(lower);
                }
                at.insert(upper);
                Joined::New
            }
        }
    }

    /// The kernel gives back `count` references. `Some`: those were all, and the pair is gone with its reference to this upper file.
    pub(super) fn forget(&self, lower: Node, count: u64) -> Option<Node> {
        if lower == ROOT {
            return None;
        }
        let entry = self.up.entry(lower);
        let fewer = |n: u32| Some(u32::try_from(u64::from(n).saturating_sub(count)).unwrap_or(0));
        let before = self.references(lower)?.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer);
        match entry {
            MapEntry::Occupied(at) if before.is_ok_and(|n| u64::from(n) <= count) => {
                let upper = at.remove();
                self.down.remove(&upper);
                self.bare.remove(&lower);
                Some(upper)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_lives_as_long_as_the_kernel_knows_the_node() {
        let pairs = Pairs::new(10, 77);
        assert_eq!((pairs.upper(ROOT), pairs.lower(77)), (Some(77), Some(ROOT)));
        assert_eq!(pairs.forget(ROOT, 9), None);
        // Known before it is copied up.
        pairs.count(5, 2);
        assert_eq!(pairs.join(5, 100, 0, true), Joined::New);
        assert_eq!(pairs.join(5, 100, 1, true), Joined::Known);
        assert_eq!(pairs.join(5, 101, 1, false), Joined::Taken);
        assert_eq!(pairs.forget(5, 1), None);
        assert_eq!((pairs.upper(5), pairs.lower(100)), (Some(100), Some(5)));
        assert!(pairs.is_bare(5) && !pairs.is_bare(100));
        assert_eq!(pairs.forget(5, 2), Some(100));
        assert!(!pairs.is_bare(5));
        assert_eq!((pairs.upper(5), pairs.lower(100)), (None, None));
        // Never copied up, and more than there are.
        pairs.count(6, 1);
        assert_eq!((pairs.forget(6, 9), pairs.forget(99, 1)), (None, None));
    }
}
