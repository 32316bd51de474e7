//! Lays a built tree out as an index file.

use std::collections::VecDeque;
use std::io::Write as _;
use std::path::Path;

use zerocopy::IntoBytes as _;
use zerocopy::little_endian::{U16, U32, U64};

use super::build::{Body, Builder, Inode, ROOT_ROW, Row};
use super::format::{
    BLOCK, Header, InodeRecord, MAGIC, NONE, NameRecord, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG,
    S_IFSOCK, SECTIONS, Section, Span, VERSION, XattrRecord, XattrSetRecord, header_crc, prefix,
};
use super::{MAX_PATH, MAX_ROWS};
use crate::error::{Error, Kind, Result, show};

/// What a directory's st_size says: a block of most file systems; programs read nothing into it.
const DIRECTORY_SIZE: u64 = 4096;

/// A heap of bytes addressed by 32-bit offsets.
#[derive(Default)]
struct Heap(Vec<u8>);

impl Heap {
    fn add(&mut self, bytes: &[u8]) -> Result<u32> {
        let at = self.0.len();
        if at + bytes.len() >= NONE as usize {
            return Err(limit("its names or links take more than 4 GiB"));
        }
        self.0.extend_from_slice(bytes);
        Ok(at as u32)
    }
}

fn limit(why: &'static str) -> Error {
    Error::new(Kind::Limit, "write index", "", why)
}

/// Which row of the file each inode of the builder has, and where its first name is.
struct Placed {
    /// File row by builder row; [`NONE`] where it is not in the tree (any more).
    row: Vec<u32>,
    /// Builder row by file row.
    order: Vec<Row>,
    nlink: Vec<u32>,
    /// By file row: the directory and the name.
    home: Vec<(u32, u32)>,
    /// By file row, of directories: the first name and how many.
    names_of: Vec<(u32, u32)>,
}

struct Writer<'a> {
    builder: &'a Builder,
    names: Vec<u8>,
    name_bytes: Heap,
    strings: Heap,
    digests: Vec<u8>,
    content_bytes: u64,
}

impl Builder {
    /// The finished index as bytes.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.end_layer();
        let mut writer = Writer {
            builder: &self,
            names: Vec::new(),
            name_bytes: Heap::default(),
            strings: Heap::default(),
            digests: Vec::new(),
            content_bytes: 0,
        };
        let placed = writer.place()?;
        let inodes = writer.inodes(&placed)?;
        let (sets, xattrs, xattr_bytes) = self.xattrs()?;
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            header_crc: 0.into(),
            incompat: 0.into(),
            compat: 0.into(),
            file_length: 0.into(),
            content_bytes: writer.content_bytes.into(),
            layers: (self.layer_count() as u32).into(),
            checksums_crc: 0.into(),
            sections: [Span::default(); SECTIONS],
        };
        let parts =
            [inodes, writer.names, writer.name_bytes.0, writer.strings.0, sets, xattrs, xattr_bytes.0, writer.digests];
        Ok(assemble(header, parts))
    }

    /// Write the finished index to `path`: complete and on the disk, or not there at all. What was there is replaced.
    pub fn write_file(self, path: &Path) -> Result<()> {
        const OP: &str = "write index";
        let bytes = self.finish()?;
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        crate::fault::point("index.create")?;
        let mut file =
            tempfile::NamedTempFile::with_prefix_in(".index-", dir).map_err(|e| Error::io(OP, show(path), e))?;
        crate::fault::point("index.write")?;
        file.write_all(&bytes).map_err(|e| Error::io(OP, show(path), e))?;
        crate::fault::point("index.sync")?;
        file.as_file().sync_all().map_err(|e| Error::io(OP, show(path), e))?;
        crate::fault::point("index.rename")?;
        file.persist(path).map_err(|e| Error::io(OP, show(path), e.error))?;
        // A rename is on the disk when its directory is.
        std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(OP, show(dir), e))
    }

    fn xattrs(&self) -> Result<(Vec<u8>, Vec<u8>, Heap)> {
        let (mut sets, mut records, mut bytes) = (Vec::new(), Vec::new(), Heap::default());
        let mut next = 0_u32;
        for set in &self.xattr_sets {
            let list = bytes.0.len() as u32;
            let mut names = Vec::new();
            for xattr in set {
                names.push(bytes.add(&xattr.name)?);
                bytes.add(&[0])?;
            }
            let record = XattrSetRecord {
                list: list.into(),
                list_length: (bytes.0.len() as u32 - list).into(),
                first: next.into(),
                count: (set.len() as u32).into(),
            };
            sets.extend_from_slice(record.as_bytes());
            for (xattr, name) in set.iter().zip(names) {
                let record = XattrRecord {
                    name: name.into(),
                    name_length: (xattr.name.len() as u32).into(),
                    value: bytes.add(&xattr.value)?.into(),
                    value_length: (xattr.value.len() as u32).into(),
                };
                records.extend_from_slice(record.as_bytes());
                next += 1;
            }
        }
        Ok((sets, records, bytes))
    }
}

impl Writer<'_> {
    /// Rows and names, directory by directory, breadth first: what one readdirplus answers lies together.
    fn place(&mut self) -> Result<Placed> {
        let count = self.builder.inodes.len();
        let mut placed = Placed {
            row: vec![NONE; count],
            order: vec![ROOT_ROW],
            nlink: vec![2],
            home: vec![(0, NONE)],
            names_of: vec![(0, 0)],
        };
        placed.row[ROOT_ROW as usize] = 0;
        let mut queue = VecDeque::from([ROOT_ROW]);
        let mut next_name = 0_u32;
        while let Some(directory) = queue.pop_front() {
            let children = self.builder.children(directory).expect("only directories are queued");
            let parent = placed.row[directory as usize];
            placed.names_of[parent as usize] = (next_name, children.len() as u32);
            for (name, link) in children {
                let inode = &self.builder.inodes[link.inode as usize];
                let is_directory = matches!(inode.body, Body::Directory(_));
                let mut row = placed.row[link.inode as usize];
                if row == NONE {
                    row = placed.order.len() as u32;
                    placed.row[link.inode as usize] = row;
                    placed.order.push(link.inode);
                    placed.nlink.push(if is_directory { 2 } else { 1 });
                    placed.home.push((parent, next_name));
                    placed.names_of.push((0, 0));
                } else {
                    placed.nlink[row as usize] += 1;
                }
                if is_directory {
                    placed.nlink[parent as usize] += 1;
                    queue.push_back(link.inode);
                }
                let record = NameRecord {
                    prefix: prefix(name),
                    offset: self.name_bytes.add(name)?.into(),
                    inode: row.into(),
                    length: name.len() as u8,
                    kind: (mode_of(inode) >> 12) as u8,
                    reserved: 0.into(),
                };
                self.names.extend_from_slice(record.as_bytes());
                next_name += 1;
                if next_name as usize >= MAX_ROWS {
                    return Err(limit("it has more than 268,435,456 names"));
                }
            }
        }
        Ok(placed)
    }

    fn inodes(&mut self, placed: &Placed) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(placed.order.len() * size_of::<InodeRecord>());
        for (row, &builder_row) in placed.order.iter().enumerate() {
            let inode = &self.builder.inodes[builder_row as usize];
            let (parent, name) = placed.home[row];
            let (mut first, mut count, mut size, mut rdev_or_digest) = (0, 0, 0, 0);
            match &inode.body {
                Body::Directory(_) => {
                    (first, count) = placed.names_of[row];
                    size = DIRECTORY_SIZE;
                }
                Body::Symlink(target) => {
                    (first, count) = (self.strings.add(target)?, target.len() as u32);
                    size = target.len() as u64;
                }
                Body::File { size: bytes, content, sha256, names } => {
                    size = *bytes;
                    self.content_bytes = self.content_bytes.saturating_add(size);
                    if let Some(digest) = sha256 {
                        self.digests.extend_from_slice(&**digest);
                        rdev_or_digest = (self.digests.len() / 32) as u32;
                    }
                    let mut own = Vec::new();
                    if content.is_some() || !names.is_empty() {
                        self.home_path(placed, row as u32, &mut own)?;
                    }
                    // Of hard links, the name that the content came under: it is there however the layer was unpacked.
                    let place = content.as_ref().or_else(|| names.first());
                    if let Some(place) = place.filter(|p| ***p != *own) {
                        (first, count) = (self.strings.add(place)?, place.len() as u32);
                    }
                }
                Body::Char(rdev) | Body::Block(rdev) => rdev_or_digest = *rdev,
                Body::Fifo | Body::Socket => {}
            }
            let a = inode.attributes;
            let record = InodeRecord {
                mtime_secs: a.mtime.secs.into(),
                size: size.into(),
                mode: mode_of(inode).into(),
                uid: a.uid.into(),
                gid: a.gid.into(),
                nlink: placed.nlink[row].into(),
                mtime_nanos: a.mtime.nanos.into(),
                rdev_or_digest: rdev_or_digest.into(),
                xattrs: a.xattrs.into(),
                parent: parent.into(),
                name: name.into(),
                layer: U16::new(inode.layer),
                reserved: 0.into(),
                first: U32::new(first),
                count: U32::new(count),
            };
            out.extend_from_slice(record.as_bytes());
        }
        Ok(out)
    }

    /// The path of a row's first name.
    fn home_path(&self, placed: &Placed, row: u32, out: &mut Vec<u8>) -> Result<()> {
        let mut names = Vec::new();
        let mut at = row;
        while at != 0 {
            let (parent, name) = placed.home[at as usize];
            names.push(name);
            at = parent;
        }
        for name in names.iter().rev() {
            let record = &self.names[*name as usize * size_of::<NameRecord>()..][..size_of::<NameRecord>()];
            let record = zerocopy::transmute_ref!(
                <&[u8; size_of::<NameRecord>()]>::try_from(record).expect("sliced to this length")
            );
            let record: &NameRecord = record;
            if !out.is_empty() {
                out.push(b'/');
            }
            out.extend_from_slice(&self.name_bytes.0[record.offset.get() as usize..][..record.length as usize]);
        }
        if out.len() > MAX_PATH {
            return Err(limit("a path in it is longer than 4095 bytes"));
        }
        Ok(())
    }
}

fn mode_of(inode: &Inode) -> u32 {
    let kind = match inode.body {
        Body::Directory(_) => S_IFDIR,
        Body::File { .. } => S_IFREG,
        Body::Symlink(_) => S_IFLNK,
        Body::Fifo => S_IFIFO,
        Body::Socket => S_IFSOCK,
        Body::Char(_) => S_IFCHR,
        Body::Block(_) => S_IFBLK,
    };
    kind | inode.attributes.mode as u32
}

fn assemble(mut header: Header, parts: [Vec<u8>; SECTIONS - 1]) -> Vec<u8> {
    let mut out = vec![0; BLOCK];
    for (section, part) in parts.into_iter().enumerate() {
        header.sections[section] = Span { offset: U64::new(out.len() as u64), length: U64::new(part.len() as u64) };
        out.extend_from_slice(&part);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    let at = out.len();
    let mut sums = Vec::with_capacity(at / BLOCK * 4);
    for block in out[BLOCK..].chunks(BLOCK) {
        sums.extend_from_slice(&crc32fast::hash(block).to_le_bytes());
    }
    header.sections[Section::Checksums as usize] =
        Span { offset: U64::new(at as u64), length: U64::new(sums.len() as u64) };
    header.checksums_crc = crc32fast::hash(&sums).into();
    header.file_length = U64::new((at + sums.len()) as u64);
    out.extend_from_slice(&sums);
    out[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    let crc = header_crc(&out[..BLOCK]);
    header.header_crc = crc.into();
    out[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    out
}
