//! What entries say of inodes: checked, and put into their records.

use std::hash::BuildHasher as _;

use super::build::Builder;
use super::entry::{Entry, LayerNumber, What, Xattr, check_path, refuse};
use super::format::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK};
use super::rows::{Node, Row, SetRow};
use super::{MAX_TARGET, MAX_XATTR_BYTES, MAX_XATTR_NAME};
use crate::error::{Kind, Result};

impl Builder {
    pub(super) fn set_attributes(&mut self, row: Row, entry: &Entry) -> Result<()> {
        let mut node = self.inodes.get(row)?;
        self.attribute(&mut node, entry)?;
        self.inodes.set(row, &node)
    }

    fn attribute(&mut self, node: &mut Node, entry: &Entry) -> Result<()> {
        if entry.mtime.nanos > 999_999_999 {
            return Err(refuse(Kind::Invalid, &entry.path, "its mtime has a billion nanoseconds or more"));
        }
        node.xattrs = self.xattr_set(&entry.path, &entry.xattrs)?;
        (node.mode, node.uid, node.gid) = (entry.mode & 0o7777, entry.uid, entry.gid);
        (node.mtime_secs, node.mtime_nanos, node.is_implied) = (entry.mtime.secs, entry.mtime.nanos, 0);
        Ok(())
    }

    /// An entry as an inode, checked; what it holds is not stored yet.
    pub(super) fn node_of(&mut self, entry: &Entry, layer: LayerNumber) -> Result<Node> {
        let refuse = |kind, why: &'static str| Err(refuse(kind, &entry.path, why));
        let kind = match &entry.what {
            What::Directory => S_IFDIR,
            What::File { size, content, .. } => {
                if *size > i64::MAX as u64 {
                    return refuse(Kind::Invalid, "its size is negative");
                }
                if let Some(content) = content {
                    check_path(content)?;
                    if content.is_empty() {
                        return refuse(Kind::Invalid, "its content lies at an empty path");
                    }
                }
                S_IFREG
            }
            What::Symlink(target) => {
                if target.is_empty() || target.contains(&0) {
                    return refuse(Kind::Invalid, "its symlink target is empty or holds a NUL");
                }
                if target.len() > MAX_TARGET {
                    return refuse(Kind::Limit, "its symlink target is longer than 4095 bytes");
                }
                S_IFLNK
            }
            What::Fifo => S_IFIFO,
            What::Socket => S_IFSOCK,
            What::Char(_) => S_IFCHR,
            What::Block(_) => S_IFBLK,
            What::HardLink(_) => unreachable!("add_as() took them before"),
        };
        let mut node = Node::new(kind, layer);
        self.attribute(&mut node, entry)?;
        Ok(node)
    }

    pub(super) fn fill(&mut self, node: &mut Node, entry: &Entry) -> Result<()> {
        match &entry.what {
            What::File { size, content, sha256 } => {
                node.size = *size;
                if let Some(content) = content {
                    (node.content, node.length) = (self.strings.add(content)?, content.len() as u16);
                }
                if let Some(sha256) = sha256 {
                    node.digest = self.digests.push(sha256)? + 1;
                }
            }
            What::Symlink(target) => (node.size, node.length) = (self.strings.add(target)?, target.len() as u16),
            What::Char(rdev) | What::Block(rdev) => node.size = (*rdev).into(),
            What::Directory | What::HardLink(_) | What::Fifo | What::Socket => {}
        }
        Ok(())
    }

    fn xattr_set(&mut self, path: &[u8], xattrs: &[Xattr]) -> Result<u32> {
        if xattrs.is_empty() {
            return Ok(0);
        }
        let mut set: Vec<&Xattr> = xattrs.iter().collect();
        set.sort();
        if set.windows(2).any(|w| w[0].name == w[1].name) {
            return Err(refuse(Kind::Invalid, path, "it has an extended attribute twice"));
        }
        let mut list = 0;
        let mut bytes = (set.len() as u32).to_le_bytes().to_vec();
        for xattr in &set {
            if xattr.name.is_empty() || xattr.name.contains(&0) {
                return Err(refuse(Kind::Invalid, path, "an extended attribute's name is empty or holds a NUL"));
            }
            list += xattr.name.len() + 1;
            if xattr.name.len() > MAX_XATTR_NAME || xattr.value.len() > MAX_XATTR_BYTES || list > MAX_XATTR_BYTES {
                return Err(refuse(Kind::Limit, path, "its extended attributes are larger than Linux takes"));
            }
            for part in [&xattr.name, &xattr.value] {
                bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
                bytes.extend_from_slice(part);
            }
        }
        let hash = self.hasher.hash_one(&bytes);
        if let Some(row) = self.xattr_rows.get(&hash) {
            let have = self.xattr_sets.get(*row)?;
            if have.length == bytes.len() as u64 && self.xattr_bytes.is(have.at, &bytes)? {
                return Ok(*row);
            }
        }
        let at = self.xattr_bytes.add(&bytes)?;
        let row = self.xattr_sets.push(&SetRow { at, length: bytes.len() as u64 })?;
        self.xattr_rows.insert(hash, row);
        Ok(row)
    }
}
