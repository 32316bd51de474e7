//! The index of an upper directory that does not change any more: what a server shows of it, where it is merged with others.

use std::collections::HashMap;

use rustix::fs::FileType;

use super::Upper;
use super::layer::whiteout;
use super::walk::{Found, Is, Shows, Visitor};
use crate::error::Result;
use crate::index::{Builder, Entry, What, Whiteouts};
use crate::store::archive::write::device;

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
        let Found { path, stat, is, .. } = found;
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};

    use super::*;
    use crate::index::Index;
    use crate::plan::Ownership;
    use crate::store::changes::Marks;
    use crate::store::{Limits, Stacked, Store, write_own_index};

    fn write(at: &Path, text: &str) {
        std::fs::create_dir_all(at.parent().unwrap()).unwrap();
        std::fs::write(at, text).unwrap();
    }

    fn index_of(at: &Path, to: &Path) {
        let upper = Upper::open(at, Marks::User, Ownership::default(), &Limits::default()).unwrap();
        write_own_index(&upper, to).unwrap();
    }

    /// Every path, and which layer has the content of a file.
    fn told(index: &Index, at: u32, path: &str, out: &mut Vec<String>) {
        use crate::index::read::InodeKind;
        let inode = index.inode(at).unwrap();
        match inode.kind {
            InodeKind::Directory { first, count } => {
                for name in first..first + count {
                    let name = index.name(name).unwrap();
                    told(index, name.row, &format!("{path}/{}", String::from_utf8_lossy(name.name)), out);
                }
            }
            InodeKind::File => out.push(format!("{path} {} x{}", inode.layer, inode.nlink)),
            _ => out.push(path.to_owned()),
        }
    }

    #[test]
    fn one_over_the_other_hides_what_overlayfs_would_hide() {
        let dir = tempfile::tempdir().unwrap();
        let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
        for name in ["gone", "dir/gone", "dir/kept", "opaque/old", "file", "becomes/a/directory", "same"] {
            write(&lower.join(name), "lower");
        }
        for name in ["dir/new", "opaque/new", "becomes", "same"] {
            write(&upper.join(name), "upper");
        }
        std::fs::hard_link(upper.join("dir/new"), upper.join("dir/again")).unwrap();
        std::fs::create_dir(upper.join("file")).unwrap();
        write(&upper.join("file/in"), "upper");
        std::os::unix::fs::symlink("same", upper.join("link")).unwrap();
        let device =
            |name: &str| mknodat(CWD, upper.join(name), FileType::CharacterDevice, Mode::empty(), makedev(0, 0));
        if device("gone").is_err()
            || setxattr(upper.join("opaque"), "user.overlay.opaque", b"y", XattrFlags::empty()).is_err()
        {
            return;
        }
        device("dir/gone").unwrap();
        let [one, two, both] = ["1", "2", "both"].map(|name| dir.path().join(name));
        index_of(&lower, &one);
        index_of(&upper, &two);
        let store = Store::open(&crate::paths::StatePaths::new(dir.path().join("root"))).unwrap();
        store.write_merged_index(&[Stacked::Other(one), Stacked::Other(two)], &both).unwrap();
        let mut found = Vec::new();
        told(&Index::open(&both).unwrap(), 0, "", &mut found);
        let want = [
            "/becomes 1 x1",
            "/dir/again 1 x2",
            "/dir/kept 0 x1",
            "/dir/new 1 x2",
            "/file/in 1 x1",
            "/link",
            "/opaque/new 1 x1",
            "/same 1 x1",
        ];
        assert_eq!(found, want);
    }
}
