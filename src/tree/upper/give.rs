//! Content for the first that opens a file of the image. It goes with the open, and no read follows: one request where there would be two, and
//! a third for what reading changed (fuse_invalidate_atime in fs/fuse/inode.c), which is most of the time that a small file takes.
//!
//! The kernel takes it into locked pages, and a read that waits for us has its pages locked. So nobody may be told that a file is open before its content
//! was given, and nothing is given later, or by a server that is not the first.

use std::sync::atomic::{AtomicU64, Ordering};

use super::UpperTree;
use crate::tree::{Node, ROOT, Tree as _};

/// Most that is given, in bytes: what the kernel would read at once.
const MOST: u64 = 128 << 10;

/// Which files of the image were opened, a bit for each.
#[derive(Debug)]
pub(super) struct Given(Box<[AtomicU64]>);

impl Given {
    pub(super) fn new(inodes: u32) -> Self {
        Given((0..inodes.div_ceil(u64::BITS)).map(|_| AtomicU64::new(0)).collect())
    }

    fn at(&self, lower: Node) -> Option<(&AtomicU64, u64)> {
        let number = lower.checked_sub(ROOT)?;
        let word = self.0.get(usize::try_from(number / u64::from(u64::BITS)).ok()?)?;
        Some((word, 1 << (number % u64::from(u64::BITS))))
    }

    fn has(&self, lower: Node) -> bool {
        self.at(lower).is_none_or(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    fn set(&self, lower: Node) {
        if let Some((word, bit)) = self.at(lower) {
            word.fetch_or(bit, Ordering::Release);
        }
    }
}

impl UpperTree {
    /// Give the content that `lower` has for `node`, if nobody opened it before.
    pub(super) fn give_once(&self, node: Node, lower: Node, give: &mut dyn FnMut(&[u8])) {
        if self.given.has(lower) {
            return;
        }
        let Ok((attr, _)) = self.lower.getattr(lower, None) else { return };
        if !(1..=MOST).contains(&attr.size) {
            return;
        }
        // Who opens it too waits here, and so does who changes it.
        let _alone = self.locks.file(lower);
        if self.given.has(lower) || self.content_below(node) != Some(lower) {
            return;
        }
        // An error is told to who reads it.
        let _ = self.lower.read(lower, 0, 0, attr.size as u32, give);
        self.given.set(lower);
    }
}
