//! The index of an upper directory that does not change any more: what a server shows of it, where it is merged with others.

use std::collections::HashMap;

use rustix::fs::FileType;

use super::Upper;
use super::layer::{device, whiteout};
use super::walk::{Found, Is, Shows, Visitor};
use crate::error::Result;
use crate::index::{Builder, Entry, What, Whiteouts};

impl Upper {
    /// Put it into `index` as a layer of its own. What it hides has the names that it has in an archive (`.wh.NAME`): they take effect when the
    /// index is merged with those of the layers below.
    pub(crate) fn write_index(&self, index: &mut Builder) -> Result<()> {
        index.begin_layer(Whiteouts::Plain)?;
        self.walk(&mut Indexed { index, links: HashMap::new() })
    }
}

struct Indexed<'a> {
    index: &'a mut Builder,
    /// The first name of each file that has several.
    links: HashMap<u64, Vec<u8>>,
}

impl Visitor for Indexed<'_> {
    fn found(&mut self, found: &Found<'_>) -> Result<()> {
        let Found { path, stat, is } = found;
        if !matches!(is, Is::Directory { .. }) && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                return self.index.add(Entry::of_stat(path.to_vec(), What::HardLink(first.clone()), stat, Vec::new()));
            }
            self.links.insert(stat.st_ino, path.to_vec());
        }
        let (what, xattrs) = match is {
            Is::Directory { xattrs, .. } => (What::Directory, xattrs.clone()),
            Is::File { xattrs, .. } => {
                (What::File { size: stat.st_size.unsigned_abs(), content: None, sha256: None }, xattrs.clone())
            }
            Is::Symlink(target) => (What::Symlink(target.clone()), Vec::new()),
            Is::Special(FileType::CharacterDevice) => (What::Char(device(stat)), Vec::new()),
            Is::Special(FileType::BlockDevice) => (What::Block(device(stat)), Vec::new()),
            Is::Special(_) => (What::Fifo, Vec::new()),
        };
        self.index.add(Entry::of_stat(path.to_vec(), what, stat, xattrs))?;
        match is {
            // The top directory has nothing below it that it could hide: overlayfs does not ask it.
            Is::Directory { shows: Shows::ItselfAlone, .. } if !path.is_empty() => {
                self.index.add(Entry { path: [path, &b"/.wh..wh..opq"[..]].concat(), ..whiteout() })
            }
            _ => Ok(()),
        }
    }

    fn hidden(&mut self, path: &[u8]) -> Result<()> {
        let at = path.iter().rposition(|b| *b == b'/').map_or(0, |slash| slash + 1);
        self.index.add(Entry { path: [&path[..at], b".wh.", &path[at..]].concat(), ..whiteout() })
    }
}
