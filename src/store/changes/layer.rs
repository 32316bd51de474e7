//! The archive of a layer: what the upper directory has, and whiteouts for what it hides.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, SeekFrom, Stat};
use rustix::io::Errno;

use super::owners::capability_of_image;
use super::walk::{Found, Is, Shows, Visitor};
use super::{Marks, Upper};
use crate::error::{Error, Kind, Result};
use crate::index::{Entry, Time, What, Xattr};
use crate::store::acl::LeftOut;
use crate::store::archive::pax::Piece;
use crate::store::archive::read::BLOCK;
use crate::store::archive::write::{END, device, header, sparse_header};
use crate::sys::fs::proc_path;
use crate::tree::upper::marks;

/// Holes shorter than this are written as zeros: a sparse entry is read by fewer programs, and smaller only by that much.
const SHORTEST_HOLE: u64 = 1 << 20;
/// Bytes read of a file at once.
const CHUNK: usize = 256 << 10;

impl Upper {
    /// Write it as a layer's archive, uncompressed. No time in it is later than `latest`.
    pub(crate) fn write_layer(&self, latest: Option<Time>, out: &mut dyn Write) -> Result<()> {
        let mut layer =
            Layer { upper: self, latest, out, links: HashMap::new(), acls: LeftOut::default(), buffer: vec![0; CHUNK] };
        self.walk(&mut layer)?;
        layer.put(&END)?;
        layer.acls.warn(|path| self.shown(path));
        Ok(())
    }
}

struct Layer<'a> {
    upper: &'a Upper,
    latest: Option<Time>,
    out: &'a mut dyn Write,
    /// The first name of each file that has several.
    links: HashMap<u64, Vec<u8>>,
    acls: LeftOut,
    buffer: Vec<u8>,
}

impl Visitor for Layer<'_> {
    fn found(&mut self, found: &Found<'_>) -> Result<()> {
        let Found { path, stat, has_acl, is } = found;
        if !matches!(is, Is::Directory { .. }) && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                let bytes = header(path, first, &self.entry(stat, What::HardLink(Vec::new()), &[]));
                return self.put(&bytes);
            }
            self.links.insert(stat.st_ino, path.to_vec());
        }
        if *has_acl {
            self.acls.add(path);
        }
        match is {
            Is::Directory { xattrs, shows } => {
                let name = if path.is_empty() { b"./".to_vec() } else { [path, &b"/"[..]].concat() };
                self.put(&header(&name, b"", &self.entry(stat, What::Directory, xattrs)))?;
                if *shows == Shows::ItselfAlone && !path.is_empty() {
                    return self.put(&header(&[path, &b"/.wh..wh..opq"[..]].concat(), b"", &whiteout()));
                }
                Ok(())
            }
            Is::File { file, xattrs } => self.file(path, stat, file, xattrs),
            Is::Symlink(target) => self.put(&header(path, target, &self.entry(stat, What::Symlink(Vec::new()), &[]))),
            Is::Special(kind) => {
                let rdev = device(stat);
                let what = match kind {
                    FileType::CharacterDevice => What::Char(rdev),
                    FileType::BlockDevice => What::Block(rdev),
                    _ => What::Fifo,
                };
                self.put(&header(path, b"", &self.entry(stat, what, &[])))
            }
        }
    }

    fn hidden(&mut self, path: &[u8]) -> Result<()> {
        let at = path.iter().rposition(|b| *b == b'/').map_or(0, |slash| slash + 1);
        self.put(&header(&[&path[..at], b".wh.", &path[at..]].concat(), b"", &whiteout()))
    }
}

/// An empty file of no time and nobody's.
pub(super) fn whiteout() -> Entry {
    let what = What::File { size: 0, content: None, sha256: None };
    Entry { path: Vec::new(), what, mode: 0, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new() }
}

impl Layer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| Error::io("write", "layer", e))
    }

    fn entry(&self, stat: &Stat, what: What, xattrs: &[Xattr]) -> Entry {
        let owners = &self.upper.owners;
        let xattrs = xattrs.iter().map(|xattr| capability_of_image(owners, xattr.clone())).collect();
        let entry = Entry::of_stat(Vec::new(), what, stat, xattrs);
        let mtime = self.latest.map_or(entry.mtime, |latest| latest.min(entry.mtime));
        Entry { mtime, ..entry }
    }

    /// The image's file whose content a file of the writable tree shows.
    fn content_below(&self, path: &[u8], file: &OwnedFd) -> Result<Option<OwnedFd>> {
        let fail = |e| Error::sys("read changes", self.upper.shown(path), e);
        if self.upper.marks != Marks::Tree {
            return Ok(None);
        }
        let Some(node) = marks::content_below(proc_path(file).as_bytes()).map_err(fail)? else { return Ok(None) };
        let nowhere = "its content is in the image, which is not known";
        let image = self.upper.image.as_ref();
        let image =
            image.ok_or_else(|| Error::new(Kind::Unsupported, "read changes", self.upper.shown(path), nowhere))?;
        image.content_fd(node).map(Some).map_err(fail)
    }

    fn file(&mut self, path: &[u8], stat: &Stat, file: &OwnedFd, xattrs: &[Xattr]) -> Result<()> {
        let below = self.content_below(path, file)?;
        let file = below.as_ref().unwrap_or(file);
        let size = u64::try_from(stat.st_size).unwrap_or_default();
        let most = self.upper.limits.sparse_pieces;
        let pieces = data_of(file, size, most).map_err(|e| Error::sys("read changes", self.upper.shown(path), e))?;
        let what = |size| What::File { size, content: None, sha256: None };
        if matches!(pieces[..], [] | [Piece { offset: 0, .. }]) {
            self.put(&header(path, b"", &self.entry(stat, what(size), xattrs)))?;
            return self.data(path, file, &pieces);
        }
        let map = sparse_map(&pieces);
        let stored = map.len() as u64 + pieces.iter().map(|piece| piece.length).sum::<u64>();
        self.put(&sparse_header(path, &self.entry(stat, what(stored), xattrs), size))?;
        self.put(&map)?;
        self.data(path, file, &pieces)
    }

    /// The bytes of these pieces, and what fills the last block.
    fn data(&mut self, path: &[u8], file: &OwnedFd, pieces: &[Piece]) -> Result<()> {
        let shown = || self.upper.shown(path);
        let mut written = 0_u64;
        for piece in pieces {
            let (mut at, end) = (piece.offset, piece.offset + piece.length);
            while at < end {
                let want = self.buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
                match rustix::io::pread(file, &mut self.buffer[..want], at) {
                    Ok(0) => {
                        return Err(self.upper.changed(path));
                    }
                    Ok(count) => {
                        self.out.write_all(&self.buffer[..count]).map_err(|e| Error::io("write", "layer", e))?;
                        at += count as u64;
                    }
                    Err(Errno::INTR) => {}
                    Err(e) => return Err(Error::sys("read changes", shown(), e)),
                }
            }
            written += piece.length;
        }
        let padding = written.next_multiple_of(BLOCK as u64) - written;
        self.put(&[0; BLOCK][..padding as usize])
    }
}

/// Where a file has data, with its shorter holes: one piece of it all where there are no long ones.
fn data_of(file: &OwnedFd, size: u64, most: usize) -> rustix::io::Result<Vec<Piece>> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = 0;
    while at < size {
        let from = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(from) => from.min(size),
            // A hole up to the end.
            Err(Errno::NXIO) => size,
            // It does not know holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => 0,
            Err(e) => return Err(e),
        };
        let end = if from == size {
            size
        } else {
            match rustix::fs::seek(file, SeekFrom::Hole(from)) {
                Ok(end) => end.min(size),
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NXIO) => size,
                Err(e) => return Err(e),
            }
        };
        let is_last = pieces.len() + 1 >= most;
        match pieces.last_mut() {
            Some(last) if from - (last.offset + last.length) < SHORTEST_HOLE || is_last => {
                last.length = end - last.offset;
            }
            None if from < SHORTEST_HOLE => pieces.push(Piece { offset: 0, length: end }),
            _ if from == size => {}
            _ => pieces.push(Piece { offset: from, length: end - from }),
        }
        at = end.max(at + 1);
    }
    if pieces.last().map_or(0, |last| last.offset + last.length) < size {
        // GNU tar makes the hole at the end of this.
        pieces.push(Piece { offset: size, length: 0 });
    }
    Ok(pieces)
}

/// GNU sparse format 1.0: what comes before the data.
fn sparse_map(pieces: &[Piece]) -> Vec<u8> {
    let mut text = format!("{}\n", pieces.len());
    for piece in pieces {
        use std::fmt::Write as _;
        let _ = write!(text, "{}\n{}\n", piece.offset, piece.length);
    }
    let mut bytes = text.into_bytes();
    crate::store::archive::write::pad(&mut bytes);
    bytes
}
