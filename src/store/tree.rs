//! The tree of an image in the store as an archive: what export writes and flatten imports.
//!
//! Names, owners, modes, devices and links come from the index, so a plain user's store gives what root's does; contents come
//! from the layers, each checked against its SHA-256 as it passes. The form is that of `archive::write`: the archive of an image that
//! was imported from a directory is, byte for byte, the one whose SHA-512 is its id.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use sha2::{Digest as _, Sha256};

use super::archive::read::BLOCK;
use super::archive::write::{END, header, pad};
use crate::error::{Error, Kind, Result, show};
use crate::index::read::{Inode, InodeKind};
use crate::index::{Damaged, Entry, Index, What, Xattr};
use crate::sys::fs::open_beneath;

/// An index with the layers that hold its contents.
pub(super) struct Tree {
    pub(super) index: Index,
    layers: Vec<(PathBuf, OwnedFd)>,
}

pub(super) fn damaged(error: Damaged) -> Error {
    Error::new(Kind::Integrity, "read index", "", error)
}

impl Tree {
    pub(super) fn open(index: &Path, layers: &[PathBuf]) -> Result<Self> {
        let index = Index::open(index)?;
        let open = |path: &PathBuf| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = openat(CWD, path, flags, Mode::empty()).map_err(|e| Error::sys("open layer", show(path), e))?;
            Ok((path.clone(), fd))
        };
        Ok(Tree { index, layers: layers.iter().map(open).collect::<Result<_>>()? })
    }

    /// Hand a file's bytes to `take`, and check that they are what the index says.
    pub(super) fn content(&self, inode: &Inode, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut path = Vec::new();
        self.index.content_path(inode, &mut path).map_err(damaged)?;
        let shown = || format!("{:?}", String::from_utf8_lossy(&path));
        let wrong = |why: String| Error::new(Kind::Integrity, "read content of", shown(), why);
        let (_, layer) = self
            .layers
            .get(usize::from(inode.layer))
            .ok_or_else(|| wrong(format!("its layer {} is not there", inode.layer)))?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = open_beneath(layer, Path::new(OsStr::from_bytes(&path)), flags)
            .map_err(|e| wrong(std::io::Error::from(e).to_string()))?;
        let stat = rustix::fs::fstat(&file).map_err(|e| Error::sys("stat", shown(), e))?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
            return Err(wrong("not a regular file on the disk".into()));
        }
        if stat.st_size as u64 != inode.size {
            return Err(wrong(format!("it has {} bytes on the disk, not {}", stat.st_size, inode.size)));
        }
        let mut sha = Sha256::new();
        let mut buffer = vec![0; 128 << 10];
        let mut left = inode.size;
        while left > 0 {
            match rustix::io::read(&file, &mut buffer) {
                Ok(0) => return Err(wrong("it became shorter".into())),
                Ok(count) => {
                    let count = count.min(usize::try_from(left).unwrap_or(usize::MAX));
                    sha.update(&buffer[..count]);
                    take(&buffer[..count])?;
                    left -= count as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::sys("read", shown(), e)),
            }
        }
        match self.index.sha256(inode).map_err(damaged)? {
            Some(want) if want != <[u8; 32]>::from(sha.finalize()) => {
                Err(wrong("its bytes are not those imported".into()))
            }
            _ => Ok(()),
        }
    }

    fn entry(&self, inode: &Inode, what: What) -> Result<Entry> {
        let mut xattrs = Vec::new();
        for xattr in self.index.xattrs(inode).map_err(damaged)? {
            let (name, value) = xattr.map_err(damaged)?;
            xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
        }
        Ok(Entry {
            path: Vec::new(),
            what,
            mode: (inode.mode & 0o7777) as u16,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            xattrs,
        })
    }

    /// Write the tree as an archive's entries below `top` (`rootfs`, or empty), without the end marker.
    pub(super) fn write(&self, top: &[u8], out: &mut dyn Write) -> Result<()> {
        let mut links = HashMap::new();
        let root = self.index.inode(0).map_err(damaged)?;
        let name = if top.is_empty() { b"./".to_vec() } else { [top, b"/"].concat() };
        put(out, &header(&name, b"", &self.entry(&root, What::Directory)?))?;
        let mut stack = vec![(top.to_vec(), root)];
        // Depth first, in byte order: each directory's names go on the stack last first.
        while let Some((path, inode)) = stack.pop() {
            if path != top {
                self.one(&path, &inode, &mut links, out)?;
            }
            let InodeKind::Directory { first, count } = inode.kind else { continue };
            if path.len() > crate::index::MAX_PATH + top.len() {
                return Err(Error::new(Kind::Integrity, "read index", "", "a directory lies in itself"));
            }
            for at in (first..first + count).rev() {
                let name = self.index.name(at).map_err(damaged)?;
                let child = if path.is_empty() { name.name.to_vec() } else { [&*path, b"/", name.name].concat() };
                stack.push((child, self.index.inode(name.row).map_err(damaged)?));
            }
        }
        Ok(())
    }

    fn one(&self, path: &[u8], inode: &Inode, links: &mut HashMap<u32, Vec<u8>>, out: &mut dyn Write) -> Result<()> {
        crate::fault::point("store.export")?;
        let is_directory = matches!(inode.kind, InodeKind::Directory { .. });
        if !is_directory && inode.nlink > 1 {
            if let Some(first) = links.get(&inode.row) {
                let entry = Entry { xattrs: Vec::new(), ..self.entry(inode, What::HardLink(Vec::new()))? };
                return put(out, &header(path, first, &entry));
            }
            links.insert(inode.row, path.to_vec());
        }
        match inode.kind {
            InodeKind::Directory { .. } => {
                put(out, &header(&[path, b"/"].concat(), b"", &self.entry(inode, What::Directory)?))
            }
            InodeKind::Symlink => {
                let target = self.index.target(inode).map_err(damaged)?.unwrap_or_default();
                put(out, &header(path, target, &self.entry(inode, What::Symlink(Vec::new()))?))
            }
            InodeKind::File => {
                let what = What::File { size: inode.size, content: None, sha256: None };
                put(out, &header(path, b"", &self.entry(inode, what)?))?;
                self.content(inode, |data| put(out, data))?;
                let padding = inode.size.next_multiple_of(BLOCK as u64) - inode.size;
                put(out, &[0; BLOCK][..padding as usize])
            }
            InodeKind::Special => {
                let what = match rustix::fs::FileType::from_raw_mode(inode.mode) {
                    rustix::fs::FileType::CharacterDevice => What::Char(inode.rdev),
                    rustix::fs::FileType::BlockDevice => What::Block(inode.rdev),
                    _ => What::Fifo,
                };
                put(out, &header(path, b"", &self.entry(inode, what)?))
            }
        }
    }

    /// Write an ACI.
    pub(super) fn write_aci(&self, manifest: &[u8], out: &mut dyn Write) -> Result<()> {
        let entry = Entry {
            path: Vec::new(),
            what: What::File { size: manifest.len() as u64, content: None, sha256: None },
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: crate::index::Time::default(),
            xattrs: Vec::new(),
        };
        let mut bytes = header(b"manifest", b"", &entry);
        bytes.extend_from_slice(manifest);
        pad(&mut bytes);
        put(out, &bytes)?;
        self.write(b"rootfs", out)?;
        put(out, &END)
    }

    /// Write the tree alone.
    pub(super) fn write_tar(&self, out: &mut dyn Write) -> Result<()> {
        self.write(b"", out)?;
        put(out, &END)
    }
}

fn put(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|e| Error::io("write", "archive", e))
}
