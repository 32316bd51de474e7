//! Answers from an index file where it lies, allocating nothing.
//!
//! Nothing read from the file is believed: rows, offsets, lengths and names are checked at each use, loops are bounded by
//! counts that were checked, and a block's CRC is checked before its bytes are used ([`super::format`]). What fails is
//! [`Damaged`], and never a wrong answer.
//!
//! The file must not be changed in place or cut short while it is mapped: a reader that touches a page that is gone gets
//! SIGBUS. [`Builder::write_file`](super::Builder::write_file) replaces an index by renaming.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::{FromBytes, Immutable, IntoBytes as _, KnownLayout, Unaligned};

use super::entry::{Time, check_name, check_path, components};
use super::format::{
    BLOCK, Header, IMPLIED, InodeRecord, KNOWN_INCOMPAT, MAGIC, MAX_FILE, NONE, NameRecord, S_IFBLK, S_IFCHR, S_IFDIR,
    S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK, SECTIONS, Section, VERSION, XattrRecord, XattrSetRecord, header_crc,
    prefix,
};
use super::{MAX_DEPTH, MAX_LAYERS, MAX_PATH, MAX_TARGET, MAX_XATTR_BYTES, MAX_XATTR_NAME};
use crate::error::{Error, Kind, Result, show};

/// Pages of the mapping that the process keeps in its page table before it lets them all go (they stay in the page cache):
/// a server's own share of memory is then the same for any image. 24 MiB holds the records of 200,000 files, and touching them again
/// costs a soft fault and a CRC for each 4 KiB.
const RESIDENT_LIMIT: usize = 24 << 20;
/// What one fault brings in (the kernel's fault_around_bytes, 64 KiB by default), in blocks.
const FAULT_AROUND: u32 = 16;

/// The index says what it cannot say. The only thing to do is to refuse the answer (EIO) and make the index again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// Near this byte of the file.
    pub offset: u64,
    /// What is wrong.
    pub why: &'static str,
}

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "damaged at byte {}: {}", self.offset, self.why)
    }
}

impl std::error::Error for Damaged {}

type Answer<T> = std::result::Result<T, Damaged>;

#[derive(Debug)]
enum Bytes {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// An index that was opened.
#[derive(Debug)]
pub struct Index {
    bytes: Bytes,
    /// Offset and length in `bytes`, checked.
    sections: [(usize, usize); SECTIONS],
    content_bytes: u64,
    layers: u32,
    /// One bit a block: checked, and still in the page table as far as we know.
    checked: Box<[AtomicU64]>,
    /// Fault-around windows touched since the pages were let go.
    windows: AtomicU32,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a> {
    /// The name.
    pub name: &'a [u8],
    /// Row of its inode.
    pub row: u32,
    /// Type bits of the mode (S_IFMT).
    pub kind: u32,
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InodeKind {
    /// A directory: its first name and how many.
    Directory {
        /// Position of the first.
        first: u32,
        /// How many.
        count: u32,
    },
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// FIFO, socket or device.
    Special,
}

/// One inode, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Its row: node id less one.
    pub row: u32,
    /// Type and permissions.
    pub mode: u32,
    /// Owner, as in the image.
    pub uid: u32,
    /// Group, as in the image.
    pub gid: u32,
    /// Names.
    pub nlink: u32,
    /// Device number; 0 but for devices.
    pub rdev: u32,
    /// Bytes.
    pub size: u64,
    /// Last change.
    pub mtime: Time,
    /// Row of its xattr set; 0: it has none.
    pub xattrs: u32,
    /// The layer with its content.
    pub layer: u16,
    /// A directory that no entry of its archive speaks of.
    pub is_implied: bool,
    /// What it is.
    pub kind: InodeKind,
    digest: u32,
    parent: u32,
    name: u32,
    first: u32,
    count: u32,
}

impl Index {
    /// Map an index file. The work is the same for any size, except for one CRC over a thousandth of the file.
    ///
    /// Errors: [`Kind::Invalid`] for a file that is not an index, or one of another version, [`Kind::Integrity`] for a damaged one.
    pub fn open(path: &Path) -> Result<Self> {
        let name = || show(path);
        let file = File::open(path).map_err(|e| Error::io("open index", name(), e))?;
        Self::from_file(&file).map_err(|e| name_error(&e, &name()))
    }

    /// Map an index file that is open.
    pub fn from_file(file: &File) -> Result<Self> {
        let length = file.metadata().map_err(|e| Error::io("open index", "", e))?.len();
        if length < BLOCK as u64 {
            return Err(refuse(Kind::Integrity, "the file is shorter than an index's header"));
        }
        let map = crate::sys::raw::map_file(file).map_err(|e| Error::io("map index", "", e))?;
        Self::from(Bytes::Mapped(map))
    }

    /// An index held in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::from(Bytes::Owned(bytes))
    }

    fn from(bytes: Bytes) -> Result<Self> {
        let damaged = |why| refuse(Kind::Integrity, why);
        let Some(block) = bytes.get(..BLOCK) else {
            return Err(damaged("the file is shorter than an index's header"));
        };
        let (header, _) = Header::read_from_prefix(block).map_err(|_| damaged("its header is cut short"))?;
        if header.magic != MAGIC {
            return Err(refuse(Kind::Invalid, "it is not an fsprov index (its first bytes are not fsprovIX)"));
        }
        if header.version != VERSION || header.incompat.get() & !KNOWN_INCOMPAT != 0 {
            let why = format!(
                "it has format version {} with features {:#x}; this program reads version {VERSION}",
                header.version, header.incompat
            );
            return Err(
                Error::new(Kind::Invalid, "open index", "", why).hint("make it again with `fsprov image index IMAGE`")
            );
        }
        if header_crc(block) != header.header_crc.get() {
            return Err(damaged("its header does not have the CRC it names"));
        }
        if header.file_length != bytes.len() as u64 || bytes.len() as u64 > MAX_FILE {
            return Err(damaged("its length is not the one its header names"));
        }
        let mut sections = [(0, 0); SECTIONS];
        let mut end = BLOCK;
        for (span, place) in header.sections.iter().zip(&mut sections) {
            let (offset, length) = (span.offset.get() as usize, span.length.get() as usize);
            // The section before may end in a last block that is not whole: then this offset is past the end.
            if offset != end || bytes.len().checked_sub(offset).is_none_or(|rest| length > rest) {
                return Err(damaged("its sections do not follow one another inside the file"));
            }
            *place = (offset, length);
            // No overflow: offset + length is at most the length of a slice.
            end = (offset + length).next_multiple_of(BLOCK);
        }
        let (sums, sums_length) = sections[Section::Checksums as usize];
        let blocks = sums / BLOCK - 1;
        if sums_length != blocks * 4 || sums + sums_length != bytes.len() {
            return Err(damaged("it has not one checksum for each block"));
        }
        if crc32fast::hash(&bytes[sums..]) != header.checksums_crc.get() {
            return Err(damaged("its checksums do not have the CRC that its header names"));
        }
        let index = Index {
            sections,
            content_bytes: header.content_bytes.get(),
            layers: header.layers.get(),
            checked: (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            windows: AtomicU32::new(0),
            bytes,
        };
        if index.layers as usize > MAX_LAYERS
            || index.records(Section::Inodes, size_of::<InodeRecord>()) >= NONE as usize
            || index.records(Section::Names, size_of::<NameRecord>()) >= NONE as usize
        {
            return Err(damaged("it has more rows or layers than fit"));
        }
        let root = index.inode(0).map_err(|e| damaged(e.why))?;
        if !matches!(root.kind, InodeKind::Directory { .. }) {
            return Err(damaged("its root is not a directory"));
        }
        Ok(index)
    }

    /// Tells it from every other index: the checksum of its header, which has the one of everything else in it.
    pub fn fingerprint(&self) -> u64 {
        let Ok((header, _)) = Header::read_from_prefix(&self.bytes[..BLOCK]) else { return 0 };
        u64::from(header.header_crc.get()) << 32 | u64::from(header.checksums_crc.get())
    }

    fn records(&self, section: Section, size: usize) -> usize {
        self.sections[section as usize].1 / size
    }

    /// How many inodes; rows are 0 to this, not included.
    pub fn inode_count(&self) -> u32 {
        self.records(Section::Inodes, size_of::<InodeRecord>()) as u32
    }

    /// How many names, in all directories.
    pub fn name_count(&self) -> u32 {
        self.records(Section::Names, size_of::<NameRecord>()) as u32
    }

    /// How many layers its files come from.
    pub fn layer_count(&self) -> u32 {
        self.layers
    }

    /// Sum of the sizes of its regular files.
    pub fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// Bytes of the index file itself.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// True where some inode may have an extended attribute.
    pub fn has_xattrs(&self) -> bool {
        self.records(Section::Xattrs, size_of::<XattrRecord>()) > 0
    }

    /// Bytes of a section, from blocks whose CRC is right.
    fn slice(&self, section: Section, offset: u32, length: u32) -> Answer<&[u8]> {
        let (start, size) = self.sections[section as usize];
        let (offset, length) = (offset as usize, length as usize);
        let damaged = |why| Damaged { offset: start as u64, why };
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(damaged("an offset leads out of its section"));
        }
        self.checked_slice(start + offset, length)
    }

    /// `at + length` lies within the sections.
    #[inline]
    fn checked_slice(&self, at: usize, length: usize) -> Answer<&[u8]> {
        if length > 0 {
            for block in at / BLOCK..=(at + length - 1) / BLOCK {
                // Block 0 is the header's, and not in the table.
                let bit = block - 1;
                if self.checked[bit / 64].load(Ordering::Relaxed) & (1 << (bit % 64)) == 0 {
                    self.check_block(block)?;
                }
            }
        }
        Ok(&self.bytes[at..at + length])
    }

    #[cold]
    fn check_block(&self, block: usize) -> Answer<()> {
        let bit = block - 1;
        let sum = self.sections[Section::Checksums as usize].0 + bit * 4;
        let data = &self.bytes[block * BLOCK..(block + 1) * BLOCK];
        if crc32fast::hash(data).to_le_bytes() != self.bytes[sum..sum + 4] {
            return Err(Damaged { offset: (block * BLOCK) as u64, why: "a block does not have the CRC it should" });
        }
        self.touched(bit);
        Ok(())
    }

    /// Note that a block is in our page table now, and let all go past the limit. A block that another thread reads
    /// meanwhile only faults in again.
    fn touched(&self, bit: usize) {
        let window = ((1_u64 << FAULT_AROUND) - 1) << (bit % 64 / FAULT_AROUND as usize * FAULT_AROUND as usize);
        let before = self.checked[bit / 64].fetch_or(1 << (bit % 64), Ordering::Relaxed);
        let Bytes::Mapped(map) = &self.bytes else { return };
        if before & window != 0 {
            return;
        }
        let windows = self.windows.fetch_add(1, Ordering::Relaxed) as usize + 1;
        if windows * FAULT_AROUND as usize * BLOCK > RESIDENT_LIMIT {
            self.windows.store(0, Ordering::Relaxed);
            for word in &self.checked {
                word.store(0, Ordering::Relaxed);
            }
            if let Err(e) = crate::sys::raw::drop_resident(map) {
                log::debug!(target: "fsprov::index", "madvise MADV_DONTNEED on the index: {e}");
            }
        }
    }

    #[inline]
    fn record<T>(&self, section: Section, row: u32) -> Answer<&T>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let (start, size) = self.sections[section as usize];
        let damaged = Damaged { offset: start as u64, why: "a row leads out of its section" };
        let at = (row as usize).checked_mul(size_of::<T>()).ok_or(damaged)?;
        if at + size_of::<T>() > size {
            return Err(damaged);
        }
        T::ref_from_bytes(self.checked_slice(start + at, size_of::<T>())?).map_err(|_| damaged)
    }

    fn at(&self, section: Section, row: u32, size: usize) -> u64 {
        (self.sections[section as usize].0 + row as usize * size) as u64
    }

    /// The inode of a row.
    #[inline]
    pub fn inode(&self, row: u32) -> Answer<Inode> {
        let r: &InodeRecord = self.record(Section::Inodes, row)?;
        let damaged = |why| Err(Damaged { offset: self.at(Section::Inodes, row, size_of::<InodeRecord>()), why });
        let mode = r.mode.get();
        let (first, count) = (r.first.get(), r.count.get());
        let kind = match mode & S_IFMT {
            S_IFDIR => {
                if first.checked_add(count).is_none_or(|end| end > self.name_count()) {
                    return damaged("a directory's names lead out of their section");
                }
                InodeKind::Directory { first, count }
            }
            S_IFREG => InodeKind::File,
            S_IFLNK => InodeKind::Symlink,
            S_IFIFO | S_IFSOCK | S_IFCHR | S_IFBLK => InodeKind::Special,
            _ => return damaged("an inode is of no known type"),
        };
        if mode & !(S_IFMT | 0o7777) != 0 || r.mtime_nanos.get() > 999_999_999 || r.size.get() > i64::MAX as u64 {
            return damaged("an inode's mode, time or size is impossible");
        }
        let rdev_or_digest = r.rdev_or_digest.get();
        let (rdev, digest) = match kind {
            InodeKind::Special => (rdev_or_digest, 0),
            InodeKind::File => (0, rdev_or_digest),
            InodeKind::Directory { .. } | InodeKind::Symlink => (0, 0),
        };
        Ok(Inode {
            row,
            mode,
            uid: r.uid.get(),
            gid: r.gid.get(),
            nlink: r.nlink.get(),
            rdev,
            size: r.size.get(),
            mtime: Time { secs: r.mtime_secs.get(), nanos: r.mtime_nanos.get() },
            xattrs: r.xattrs.get(),
            layer: r.layer.get(),
            is_implied: r.flags.get() & IMPLIED != 0,
            kind,
            digest,
            parent: r.parent.get(),
            name: r.name.get(),
            first,
            count,
        })
    }

    /// The name at a position of the name table. Positions of one directory are `first..first + count` of its [`InodeKind`].
    #[inline]
    pub fn name(&self, position: u32) -> Answer<Name<'_>> {
        let r: &NameRecord = self.record(Section::Names, position)?;
        let name = self.slice(Section::NameBytes, r.offset.get(), r.length.into())?;
        if check_name(name).is_err() {
            let offset = self.at(Section::Names, position, size_of::<NameRecord>());
            return Err(Damaged { offset, why: "a name that no directory may have" });
        }
        Ok(Name { name, row: r.inode.get(), kind: u32::from(r.kind) << 12 })
    }

    /// Find a name in a directory: a binary search over its names. `None`: it has no such name, or is not a directory.
    #[inline]
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Answer<Option<Name<'_>>> {
        let InodeKind::Directory { first, count } = directory.kind else { return Ok(None) };
        let wanted = prefix(name);
        let (mut low, mut high) = (first, first + count);
        while low < high {
            let middle = low + (high - low) / 2;
            let r: &NameRecord = self.record(Section::Names, middle)?;
            let order = match r.prefix.cmp(&wanted) {
                std::cmp::Ordering::Equal => self.slice(Section::NameBytes, r.offset.get(), r.length.into())?.cmp(name),
                order => order,
            };
            match order {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return self.name(middle).map(Some),
            }
        }
        Ok(None)
    }

    /// The inode at a path below the root, its components joined by `/`; no symlink is followed.
    pub fn find(&self, path: &[u8]) -> Answer<Option<Inode>> {
        let mut inode = self.inode(0)?;
        for name in components(path) {
            match self.lookup(&inode, name)? {
                Some(found) => inode = self.inode(found.row)?,
                None => return Ok(None),
            }
        }
        Ok(Some(inode))
    }

    /// Row of the directory that holds an inode's first name; the root's is its own.
    pub fn parent(&self, inode: &Inode) -> u32 {
        if inode.row == 0 { 0 } else { inode.parent }
    }

    /// The target of a symlink; `None` for anything else.
    pub fn target(&self, inode: &Inode) -> Answer<Option<&[u8]>> {
        if inode.kind != InodeKind::Symlink {
            return Ok(None);
        }
        let target = self.slice(Section::Strings, inode.first, inode.count)?;
        if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
            let offset = self.at(Section::Inodes, inode.row, size_of::<InodeRecord>());
            return Err(Damaged { offset, why: "a target that no symlink may have" });
        }
        Ok(Some(target))
    }

    /// Where a file's bytes lie: the path below its layer's root, its components joined by `/`, into `out` (emptied first).
    /// Every component is a proper name: not empty, `.` or `..`.
    pub fn content_path(&self, inode: &Inode, out: &mut Vec<u8>) -> Answer<()> {
        out.clear();
        let offset = self.at(Section::Inodes, inode.row, size_of::<InodeRecord>());
        if inode.kind == InodeKind::File && inode.count > 0 {
            let path = self.slice(Section::Strings, inode.first, inode.count)?;
            if check_path(path).is_err() {
                return Err(Damaged { offset, why: "a content path that no file may have" });
            }
            out.extend_from_slice(path);
            return Ok(());
        }
        self.home_path(inode, out)
    }

    /// The path of an inode's first name below the root, into `out` (emptied first). The root's is empty.
    pub fn home_path(&self, inode: &Inode, out: &mut Vec<u8>) -> Answer<()> {
        out.clear();
        let offset = self.at(Section::Inodes, inode.row, size_of::<InodeRecord>());
        // From the leaf to the root, each name reversed, and the whole reversed at the end: no list of names is needed.
        let (mut row, mut parent, mut name) = (inode.row, inode.parent, inode.name);
        for depth in 0.. {
            if row == 0 {
                break;
            }
            if depth == MAX_DEPTH || out.len() > MAX_PATH {
                return Err(Damaged { offset, why: "a path leads round in a circle or is too long" });
            }
            let bytes = self.name(name)?.name;
            if !out.is_empty() {
                out.push(b'/');
            }
            out.extend(bytes.iter().rev());
            row = parent;
            let next: &InodeRecord = self.record(Section::Inodes, row)?;
            (parent, name) = (next.parent.get(), next.name.get());
        }
        out.reverse();
        Ok(())
    }

    /// SHA-256 of a file's bytes, where it is known.
    pub fn sha256(&self, inode: &Inode) -> Answer<Option<[u8; 32]>> {
        match inode.digest {
            0 => Ok(None),
            digest => self.record::<[u8; 32]>(Section::Digests, digest - 1).copied().map(Some),
        }
    }

    fn xattr_set(&self, inode: &Inode) -> Answer<Option<&XattrSetRecord>> {
        match inode.xattrs {
            0 => Ok(None),
            row => self.record(Section::XattrSets, row).map(Some),
        }
    }

    /// The names of an inode's extended attributes, each with a NUL after it.
    pub fn xattr_list(&self, inode: &Inode) -> Answer<&[u8]> {
        let Some(set) = self.xattr_set(inode)? else { return Ok(&[]) };
        if set.list_length.get() as usize > MAX_XATTR_BYTES {
            return Err(Damaged { offset: self.at(Section::XattrSets, inode.xattrs, 16), why: "a list is too long" });
        }
        self.slice(Section::XattrBytes, set.list.get(), set.list_length.get())
    }

    /// The value of one extended attribute.
    pub fn xattr(&self, inode: &Inode, name: &[u8]) -> Answer<Option<&[u8]>> {
        for position in self.xattr_positions(inode)? {
            let (found, value) = self.xattr_at(position)?;
            if found == name {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// Every extended attribute of an inode: name and value.
    pub fn xattrs(&self, inode: &Inode) -> Answer<impl Iterator<Item = Answer<(&[u8], &[u8])>>> {
        Ok(self.xattr_positions(inode)?.map(|position| self.xattr_at(position)))
    }

    fn xattr_positions(&self, inode: &Inode) -> Answer<std::ops::Range<u32>> {
        let Some(set) = self.xattr_set(inode)? else { return Ok(0..0) };
        let (first, count) = (set.first.get(), set.count.get());
        // Two bytes of the list are the least that an attribute takes.
        if count as usize > MAX_XATTR_BYTES / 2 || first.checked_add(count).is_none() {
            return Err(Damaged { offset: self.at(Section::XattrSets, inode.xattrs, 16), why: "a set is too large" });
        }
        Ok(first..first + count)
    }

    fn xattr_at(&self, position: u32) -> Answer<(&[u8], &[u8])> {
        let r: &XattrRecord = self.record(Section::Xattrs, position)?;
        if r.name_length.get() as usize > MAX_XATTR_NAME || r.value_length.get() as usize > MAX_XATTR_BYTES {
            return Err(Damaged { offset: self.at(Section::Xattrs, position, 16), why: "an xattr is too long" });
        }
        Ok((
            self.slice(Section::XattrBytes, r.name.get(), r.name_length.get())?,
            self.slice(Section::XattrBytes, r.value.get(), r.value_length.get())?,
        ))
    }

    /// Check everything: each block's CRC, and that the records make one tree: names sorted and proper, each row named,
    /// types and link counts right, parents true, content inside its layers.
    pub fn verify(&self) -> Result<()> {
        self.verify_inner().map_err(|e| refuse(Kind::Integrity, e.to_string()))
    }

    fn verify_inner(&self) -> Answer<()> {
        for block in 1..self.sections[Section::Checksums as usize].0 / BLOCK {
            self.check_block(block)?;
        }
        let mut names = vec![0_u32; self.inode_count() as usize];
        let mut subdirectories = vec![0_u32; self.inode_count() as usize];
        let mut path = Vec::new();
        let mut position = 0;
        for row in 0..self.inode_count() {
            let inode = self.inode(row)?;
            let offset = self.at(Section::Inodes, row, size_of::<InodeRecord>());
            let damaged = |why| Err(Damaged { offset, why });
            for xattr in self.xattrs(&inode)? {
                xattr?;
            }
            self.xattr_list(&inode)?;
            self.target(&inode)?;
            self.sha256(&inode)?;
            self.content_path(&inode, &mut path)?;
            self.home_path(&inode, &mut path)?;
            if inode.kind == InodeKind::File && u32::from(inode.layer) >= self.layers {
                return damaged("a file lies in a layer that there is not");
            }
            if row != 0 {
                let parent = self.inode(inode.parent)?;
                let InodeKind::Directory { first, count } = parent.kind else {
                    return damaged("an inode's parent is not a directory");
                };
                if !(first..first + count).contains(&inode.name) || self.name(inode.name)?.row != row {
                    return damaged("an inode's first name is not its own");
                }
            }
            let InodeKind::Directory { first, count } = inode.kind else { continue };
            // Breadth first: the directories' names follow one another.
            if first != position {
                return damaged("the directories' names do not follow one another");
            }
            position += count;
            let mut last: &[u8] = b"";
            for at in first..first + count {
                let name = self.name(at)?;
                if name.name <= last && at > first {
                    return damaged("a directory's names are not sorted");
                }
                last = name.name;
                let child = self.inode(name.row)?;
                names[name.row as usize] += 1;
                if child.mode & S_IFMT != name.kind {
                    return damaged("a name has another type than its inode");
                }
                if matches!(child.kind, InodeKind::Directory { .. }) {
                    subdirectories[row as usize] += 1;
                }
            }
        }
        for row in 0..self.inode_count() {
            let inode = self.inode(row)?;
            let found = names[row as usize];
            let (proper, nlink) = match inode.kind {
                InodeKind::Directory { .. } => (found == u32::from(row != 0), 2 + subdirectories[row as usize]),
                _ => (found > 0, found),
            };
            if !proper || inode.nlink != nlink {
                let offset = self.at(Section::Inodes, row, size_of::<InodeRecord>());
                return Err(Damaged { offset, why: "an inode has more or fewer names than it says" });
            }
        }
        Ok(())
    }
}

fn refuse(kind: Kind, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    let error = Error::new(kind, "open index", "", why);
    if kind == Kind::Integrity {
        return error.hint("make it again with `fsprov image index IMAGE`");
    }
    error
}

/// The same error with the file's name in it.
fn name_error(error: &Error, name: &str) -> Error {
    let text = error.to_string();
    let why = text.strip_prefix("open index: ").or_else(|| text.strip_prefix("map index: ")).unwrap_or(&text);
    Error::new(error.kind(), "open index", name, why.to_owned())
}

/// Give a changed index the checksums it should have: how tests and the fuzzer get past them.
#[doc(hidden)]
pub fn seal(bytes: &mut [u8]) {
    let Ok((mut header, _)) = Header::read_from_prefix(bytes) else { return };
    let sums = header.sections[Section::Checksums as usize].offset.get() as usize;
    if sums.is_multiple_of(BLOCK) && (BLOCK..=bytes.len()).contains(&sums) {
        let (blocks, table) = bytes.split_at_mut(sums);
        for (block, sum) in blocks[BLOCK..].chunks(BLOCK).zip(table.chunks_exact_mut(4)) {
            sum.copy_from_slice(&crc32fast::hash(block).to_le_bytes());
        }
        header.checksums_crc = crc32fast::hash(table).into();
        bytes[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    }
    let Some(block) = bytes.get(..BLOCK) else { return };
    header.header_crc = header_crc(block).into();
    bytes[..size_of::<Header>()].copy_from_slice(header.as_bytes());
}

/// Ask everything of an index, whatever it answers: for tests and the fuzzer.
#[doc(hidden)]
pub fn exercise(index: &Index) {
    let _ = index.verify();
    let mut path = Vec::new();
    for row in 0..index.inode_count().min(10_000) {
        let Ok(inode) = index.inode(row) else { continue };
        let _ = (index.target(&inode), index.sha256(&inode), index.xattr_list(&inode), index.xattr(&inode, b"user.n"));
        let _ = (index.content_path(&inode, &mut path), index.home_path(&inode, &mut path));
        let _ = index.lookup(&inode, b"file-3");
        if let InodeKind::Directory { first, count } = inode.kind {
            // Thousands of directories may claim the same names: the ends of each will do.
            let end = first.saturating_add(count);
            for at in (first..end).take(32).chain(end.saturating_sub(32)..end) {
                let _ = index.name(at).and_then(|n| index.inode(n.row));
            }
        }
    }
}
