//! Lays a built tree out as an index file.
//!
//! Nothing here grows with the tree but what lies in [`super::paged`]; the sections are written one after another.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{Cursor, Seek, SeekFrom, Write};
use std::path::Path;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::MAX_ROWS;
use super::build::Builder;
use super::format::{
    BLOCK, Header, IMPLIED, InodeRecord, MAGIC, NONE, NameRecord, S_IFBLK, S_IFCHR, S_IFLNK, S_IFREG, SECTIONS,
    Section, Span, VERSION, XattrRecord, XattrSetRecord, header_crc, prefix,
};
use super::paged::{Heap, Table};
use super::rows::{NameRow, ROOT_ROW, Row};
use crate::error::{Error, Kind, Result, show};

/// What a directory's st_size says: a block of most file systems; programs read nothing into it.
const DIRECTORY_SIZE: u64 = 4096;
/// Names of one directory that are sorted at once, and their bytes; those of a larger one are sorted in runs, and the runs merged.
const SORTED_AT_ONCE: usize = 1 << 15;
const SORTED_BYTES: usize = 1 << 20;
/// Bytes held of each part: most are written once, in order.
const HELD: usize = 256 << 10;
const ROWS_HELD: usize = 2 << 20;

fn limit(why: &'static str) -> Error {
    Error::new(Kind::Limit, "write index", "", why)
}

/// Bytes addressed by 32-bit offsets.
struct Strings(Heap);

impl Strings {
    fn add(&mut self, bytes: &[u8]) -> Result<u32> {
        if self.0.len() + bytes.len() as u64 >= u64::from(NONE) {
            return Err(limit("its names or links take more than 4 GiB"));
        }
        self.0.add(bytes).map(|at| at as u32)
    }
}

/// What is known of a row of the file before it is written.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Placed {
    inode: Row,
    /// The directory of its first name, the name's position, and its row in the builder.
    parent: u32,
    name: u32,
    home: u32,
    /// Of directories: the first name and how many.
    first: u32,
    count: u32,
    nlink: u32,
}

struct Writer<'a> {
    builder: &'a mut Builder,
    rows: Table<Placed>,
    inodes: Heap,
    names: Heap,
    name_bytes: Strings,
    strings: Strings,
    content_bytes: u64,
}

impl Builder {
    /// The finished index as bytes.
    pub fn finish(self) -> Result<Vec<u8>> {
        let mut out = Cursor::new(Vec::new());
        self.finish_into(&mut out)?;
        Ok(out.into_inner())
    }

    /// Write the finished index to the beginning of `out`.
    pub fn finish_into(mut self, out: &mut (impl Write + Seek)) -> Result<()> {
        self.end_layer()?;
        let dir = self.names.dir().to_owned();
        let mut writer = Writer {
            builder: &mut self,
            rows: Table::new(&dir, ROWS_HELD),
            inodes: Heap::new(&dir, HELD),
            names: Heap::new(&dir, HELD),
            name_bytes: Strings(Heap::new(&dir, HELD)),
            strings: Strings(Heap::new(&dir, HELD)),
            content_bytes: 0,
        };
        writer.place()?;
        writer.write_inodes()?;
        let Writer { inodes, names, name_bytes, strings, content_bytes, .. } = writer;
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            header_crc: 0.into(),
            incompat: 0.into(),
            compat: 0.into(),
            file_length: 0.into(),
            content_bytes: content_bytes.into(),
            layers: (self.layer_count() as u32).into(),
            checksums_crc: 0.into(),
            sections: [Span::default(); SECTIONS],
        };
        let [sets, xattrs, xattr_bytes] = self.xattrs()?;
        let mut digests = Heap::new(&dir, HELD);
        for row in 0..self.digests.len() {
            digests.add(&self.digests.get(row)?)?;
        }
        assemble(header, [inodes, names, name_bytes.0, strings.0, sets, xattrs, xattr_bytes, digests], out)
    }

    /// Write the finished index to `path`: complete and on the disk, or not there at all. What was there is replaced.
    pub fn write_file(self, path: &Path) -> Result<()> {
        const OP: &str = "write index";
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        crate::fault::point("index.create")?;
        let mut file =
            tempfile::NamedTempFile::with_prefix_in(".index-", dir).map_err(|e| Error::io(OP, show(path), e))?;
        crate::fault::point("index.write")?;
        self.finish_into(file.as_file_mut())?;
        crate::fault::point("index.sync")?;
        file.as_file().sync_all().map_err(|e| Error::io(OP, show(path), e))?;
        crate::fault::point("index.rename")?;
        file.persist(path).map_err(|e| Error::io(OP, show(path), e.error))?;
        // A rename is on the disk when its directory is.
        std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(OP, show(dir), e))
    }

    /// Sets, attributes and their bytes.
    fn xattrs(&mut self) -> Result<[Heap; 3]> {
        let dir = self.names.dir().to_owned();
        let [mut sets, mut records] = [(); 2].map(|()| Heap::new(&dir, HELD));
        let mut bytes = Strings(Heap::new(&dir, HELD));
        let mut next = 0_u32;
        for row in 0..self.xattr_sets.len() {
            let stored = self.xattr_sets.get(row)?;
            let mut set = Vec::new();
            self.xattr_bytes.read(stored.at, stored.length as usize, &mut set)?;
            let pairs = pairs_of(&set);
            let list = bytes.0.len() as u32;
            let mut names = Vec::new();
            for (name, _) in &pairs {
                names.push(bytes.add(name)?);
                bytes.add(&[0])?;
            }
            let record = XattrSetRecord {
                list: list.into(),
                list_length: (bytes.0.len() as u32 - list).into(),
                first: next.into(),
                count: (pairs.len() as u32).into(),
            };
            sets.add(record.as_bytes())?;
            for ((name, value), at) in pairs.iter().zip(names) {
                let record = XattrRecord {
                    name: at.into(),
                    name_length: (name.len() as u32).into(),
                    value: bytes.add(value)?.into(),
                    value_length: (value.len() as u32).into(),
                };
                records.add(record.as_bytes())?;
                next += 1;
            }
        }
        Ok([sets, records, bytes.0])
    }
}

/// Names and values of a set as `xattr_set` stored it.
fn pairs_of(set: &[u8]) -> Vec<(&[u8], &[u8])> {
    let mut rest = set.get(4..).unwrap_or_default();
    let mut part = || {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (part, after) = after.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        rest = after;
        Some(part)
    };
    std::iter::from_fn(|| Some((part()?, part()?))).collect()
}

impl Writer<'_> {
    /// Rows and names, directory by directory, breadth first: what one readdirplus answers lies together.
    fn place(&mut self) -> Result<()> {
        let root = Placed { inode: ROOT_ROW, parent: 0, name: NONE, home: NONE, first: 0, count: 0, nlink: 2 };
        self.rows.push(&root)?;
        self.builder.inodes.change(ROOT_ROW, |node| node.out = 0)?;
        let mut next_name = 0_u32;
        let mut row = 0;
        // The rows are their own queue.
        while row < self.rows.len() {
            let inode = self.rows.get(row)?.inode;
            let node = self.builder.inodes.get(inode)?;
            if node.is_directory() {
                let first = next_name;
                let mut subdirectories = 0;
                self.each_child(node.first, |writer, at, link, name| {
                    subdirectories += u32::from(link.is_directory());
                    writer.place_name(row, next_name, at, link, name)?;
                    next_name += 1;
                    if next_name as usize >= MAX_ROWS {
                        return Err(limit("it has more than 268,435,456 names"));
                    }
                    Ok(())
                })?;
                self.rows.change(row, |placed| {
                    (placed.first, placed.count) = (first, next_name - first);
                    placed.nlink += subdirectories;
                })?;
            }
            row += 1;
        }
        Ok(())
    }

    fn place_name(&mut self, parent: u32, position: u32, at: u32, link: &NameRow, name: &[u8]) -> Result<()> {
        let mut node = self.builder.inodes.get(link.inode)?;
        if node.out == NONE {
            let nlink = if node.is_directory() { 2 } else { 1 };
            let placed = Placed { inode: link.inode, parent, name: position, home: at, first: 0, count: 0, nlink };
            node.out = self.rows.push(&placed)?;
            self.builder.inodes.set(link.inode, &node)?;
        } else {
            self.rows.change(node.out, |placed| placed.nlink += 1)?;
        }
        let record = NameRecord {
            prefix: prefix(name),
            offset: self.name_bytes.add(name)?.into(),
            inode: node.out.into(),
            length: name.len() as u8,
            kind: node.kind,
            reserved: 0.into(),
        };
        self.names.add(record.as_bytes()).map(drop)
    }

    /// The live names of a directory, sorted by their bytes; `first` is the name from which the others are reached.
    fn each_child(
        &mut self,
        first: u32,
        mut take: impl FnMut(&mut Self, u32, &NameRow, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut runs = Vec::new();
        let mut sorted = Table::<u32>::new(self.builder.names.dir(), HELD);
        let mut next = first;
        loop {
            let mut bytes = Vec::new();
            let mut run = Vec::new();
            while next != NONE && run.len() < SORTED_AT_ONCE && bytes.len() < SORTED_BYTES {
                let name = self.builder.names.get(next)?;
                if name.is_live() {
                    run.push((bytes.len() as u32, name.length, next));
                    self.builder.name_bytes.read(name.at.into(), name.length.into(), &mut bytes)?;
                }
                next = name.next;
            }
            let of = |(at, length, _): &(u32, u8, u32)| &bytes[*at as usize..][..usize::from(*length)];
            run.sort_unstable_by(|a, b| of(a).cmp(of(b)));
            if next == NONE && runs.is_empty() {
                for one in &run {
                    let link = self.builder.names.get(one.2)?;
                    take(self, one.2, &link, of(one))?;
                }
                return Ok(());
            }
            let start = sorted.len();
            for (_, _, at) in &run {
                sorted.push(at)?;
            }
            runs.push((start, sorted.len()));
            if next == NONE {
                break;
            }
        }
        // The head of each run, smallest first.
        let mut heads = BinaryHeap::new();
        for (run, (start, end)) in runs.iter_mut().enumerate() {
            self.push_head(&mut heads, &mut sorted, run, start, *end)?;
        }
        while let Some(Reverse((name, at, run))) = heads.pop() {
            let link = self.builder.names.get(at)?;
            take(self, at, &link, &name)?;
            let (start, end) = &mut runs[run];
            self.push_head(&mut heads, &mut sorted, run, start, *end)?;
        }
        Ok(())
    }

    fn push_head(
        &mut self,
        heads: &mut BinaryHeap<Reverse<(Vec<u8>, u32, usize)>>,
        sorted: &mut Table<u32>,
        run: usize,
        start: &mut u32,
        end: u32,
    ) -> Result<()> {
        if *start < end {
            let at = sorted.get(*start)?;
            *start += 1;
            let link = self.builder.names.get(at)?;
            let mut name = Vec::new();
            self.builder.name_bytes.read(link.at.into(), link.length.into(), &mut name)?;
            heads.push(Reverse((name, at, run)));
        }
        Ok(())
    }

    fn write_inodes(&mut self) -> Result<()> {
        let mut bytes = Vec::new();
        for row in 0..self.rows.len() {
            let placed = self.rows.get(row)?;
            let node = self.builder.inodes.get(placed.inode)?;
            let kind = u32::from(node.kind) << 12;
            let (mut first, mut count, mut size, mut rdev_or_digest) = (0, 0, 0, 0);
            match kind {
                S_IFREG => {
                    size = node.size;
                    self.content_bytes = self.content_bytes.saturating_add(size);
                    rdev_or_digest = node.digest;
                    // Of hard links, a name of the layer that has the content: it is there whatever became of the others.
                    let is_home = node.length == 0 && matches!(node.first, NONE) || node.first == placed.home;
                    if node.length > 0 || !is_home {
                        bytes.clear();
                        if node.length > 0 {
                            self.builder.strings.read(node.content, node.length.into(), &mut bytes)?;
                        } else {
                            bytes = self.builder.path_of(node.first)?;
                        }
                        if bytes != self.builder.path_of(placed.home)? {
                            (first, count) = (self.strings.add(&bytes)?, bytes.len() as u32);
                        }
                    }
                }
                S_IFLNK => {
                    bytes.clear();
                    self.builder.strings.read(node.size, node.length.into(), &mut bytes)?;
                    (first, count) = (self.strings.add(&bytes)?, node.length.into());
                    size = node.length.into();
                }
                S_IFCHR | S_IFBLK => rdev_or_digest = node.size as u32,
                _ if node.is_directory() => {
                    (first, count) = (placed.first, placed.count);
                    size = DIRECTORY_SIZE;
                }
                _ => {}
            }
            let record = InodeRecord {
                mtime_secs: node.mtime().secs.into(),
                size: size.into(),
                mode: (kind | u32::from(node.mode)).into(),
                uid: node.uid.into(),
                gid: node.gid.into(),
                nlink: placed.nlink.into(),
                mtime_nanos: node.mtime().nanos.into(),
                rdev_or_digest: rdev_or_digest.into(),
                xattrs: node.xattrs.into(),
                parent: placed.parent.into(),
                name: placed.name.into(),
                layer: U16::new(node.layer),
                flags: U16::new(if node.is_directory() && node.is_implied() { IMPLIED } else { 0 }),
                first: U32::new(first),
                count: U32::new(count),
            };
            self.inodes.add(record.as_bytes())?;
        }
        Ok(())
    }
}

fn assemble(mut header: Header, parts: [Heap; SECTIONS - 1], out: &mut (impl Write + Seek)) -> Result<()> {
    let failed = |e| Error::io("write index", "", e);
    let mut at = BLOCK;
    out.seek(SeekFrom::Start(0)).and_then(|_| out.write_all(&[0; BLOCK])).map_err(failed)?;
    let mut sums = Vec::new();
    for (section, mut part) in parts.into_iter().enumerate() {
        let length = part.len();
        header.sections[section] = Span { offset: U64::new(at as u64), length: U64::new(length) };
        // A page of a heap is a whole number of blocks.
        part.each(|bytes| {
            for block in bytes.chunks(BLOCK) {
                let mut whole = [0; BLOCK];
                whole[..block.len()].copy_from_slice(block);
                sums.extend_from_slice(&crc32fast::hash(&whole).to_le_bytes());
                out.write_all(&whole).map_err(failed)?;
            }
            Ok(())
        })?;
        at += (length as usize).next_multiple_of(BLOCK);
    }
    header.sections[Section::Checksums as usize] =
        Span { offset: U64::new(at as u64), length: U64::new(sums.len() as u64) };
    header.checksums_crc = crc32fast::hash(&sums).into();
    header.file_length = U64::new((at + sums.len()) as u64);
    out.write_all(&sums).map_err(failed)?;
    let mut first = [0; BLOCK];
    first[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    header.header_crc = header_crc(&first).into();
    first[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    out.seek(SeekFrom::Start(0)).and_then(|_| out.write_all(&first)).and_then(|()| out.flush()).map_err(failed)
}
