//! Takes the entries of an image's layers and holds the merged tree until it is written.
//!
//! Names and inodes are apart, as on any Unix file system: a directory maps a name to an inode, and hard links are several
//! names of one. All are known by number: a path is put together where it is asked for and held nowhere, since 15,000 directories
//! below one another's full paths are 30 MB, of an archive of 50 KB. This runs at import, never in a server.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::path::Path;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::format::{NONE, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK};
use super::paged::{Heap, Table};
use super::{MAX_DEPTH, MAX_LAYERS, MAX_NAME, MAX_PATH, MAX_ROWS, MAX_TARGET, MAX_XATTR_BYTES, MAX_XATTR_NAME};
use crate::error::{Error, Kind, Result};

/// Position of a layer in the image, 0 at the bottom: names the root directory that a file's content lies below.
pub type LayerNumber = u16;

/// Seconds and nanoseconds since 1970; times before have negative seconds and nanoseconds that count forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub secs: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// An extended attribute: full name (`user.x`, `security.capability`) and value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Xattr {
    /// Its name with its namespace, 1 to 255 bytes, no NUL.
    pub name: Vec<u8>,
    /// Its value, at most 64 KiB.
    pub value: Vec<u8>,
}

/// One entry of a layer, as an archive or a directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path below the root, its components joined by one slash: `usr/bin/env`. Empty for the root itself.
    /// No leading slash, no `.`, `..` or empty component, no NUL.
    pub path: Vec<u8>,
    /// What it is.
    pub what: What,
    /// Permission bits with setuid, setgid and sticky (0o7777).
    pub mode: u16,
    /// Owner, as the image says.
    pub uid: u32,
    /// Group, as the image says.
    pub gid: u32,
    /// Last change.
    pub mtime: Time,
    /// Extended attributes, in any order, no name twice.
    pub xattrs: Vec<Xattr>,
}

/// What an entry is. Device numbers have the kernel's 32-bit encoding
/// (`(minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A directory. One that is there already keeps its children and takes the new attributes.
    Directory,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Where its bytes lie: path below its layer's root directory. `None`: at the entry's own path.
        content: Option<Vec<u8>>,
        /// SHA-256 of its bytes, where known.
        sha256: Option<[u8; 32]>,
    },
    /// A symbolic link with its target, 1 to 4095 bytes, no NUL.
    Symlink(Vec<u8>),
    /// One more name of the inode at this path, which is there already (in this layer or below) and no directory. The
    /// entry's other fields are not looked at: the inode has its own.
    HardLink(Vec<u8>),
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    Char(u32),
    /// A block device.
    Block(u32),
}

/// Are names that begin with `.wh.` whiteouts in this layer?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// No: AppC images, plain directories, the bottom of anything.
    Plain,
    /// Yes, as OCI's layer specification has them: `.wh.NAME` hides NAME of the layers below, `.wh..wh..opq` hides
    /// everything in its directory that comes from below. Neither is an entry of the tree.
    Oci,
}

pub(super) type Row = u32;
pub(super) const ROOT_ROW: Row = 0;

/// Bytes held of each part while an index is put together; the rest goes to a file. Together some 14 MiB, which hold all of an image
/// of 50,000 files, and of a larger one what an archive in its usual order comes back to.
const INODES_HELD: usize = 4 << 20;
const NAMES_HELD: usize = 2 << 20;
const NAME_BYTES_HELD: usize = 2 << 20;
const SLOTS_HELD: usize = 4 << 20;
const STRINGS_HELD: usize = 1 << 20;
const DIGESTS_HELD: usize = 256 << 10;
pub(super) const HIDDEN_HELD: usize = 256 << 10;
const XATTRS_HELD: usize = 1 << 20;

/// An inode in the making. 64 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Node {
    mtime_secs: i64,
    /// File: its bytes. Symlink: where its target lies in the strings. Device: its number.
    pub(super) size: u64,
    /// File: where its content path lies in the strings, if `length` is not 0.
    pub(super) content: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime_nanos: u32,
    /// Row of the xattr set, 0 for none.
    pub(super) xattrs: u32,
    /// Directory: the last of its names, from which the others are reached. File: a name that its layer has it by on the disk.
    pub(super) first: u32,
    /// Directory: the name that it has.
    pub(super) home: u32,
    /// File: position of its digest plus 1, 0 for none.
    pub(super) digest: u32,
    /// Its row in the file, once that is being laid out.
    pub(super) out: u32,
    pub(super) mode: u16,
    /// The layer its content lies in.
    pub(super) layer: LayerNumber,
    /// Bytes of the content path or target.
    pub(super) length: u16,
    /// As in st_mode, shifted by 12.
    pub(super) kind: u8,
    is_implied: u8,
}

impl Node {
    pub(super) fn is_directory(&self) -> bool {
        self.kind == DIRECTORY
    }

    /// Does no entry speak of this directory?
    pub(super) fn is_implied(&self) -> bool {
        self.is_implied != 0
    }

    pub(super) fn mtime(&self) -> Time {
        Time { secs: self.mtime_secs, nanos: self.mtime_nanos }
    }

    /// What a directory gets that no entry speaks of: the parents of an entry are made where they are missing, as tar does.
    pub(super) fn imply(&mut self) {
        (self.mode, self.uid, self.gid, self.xattrs) = (0o755, 0, 0, 0);
        (self.mtime_secs, self.mtime_nanos, self.is_implied) = (0, 0, 1);
    }

    fn new(kind: u32, layer: LayerNumber) -> Self {
        let mut node = Node {
            mtime_secs: 0,
            size: 0,
            content: 0,
            uid: 0,
            gid: 0,
            mtime_nanos: 0,
            xattrs: 0,
            first: NONE,
            home: NONE,
            digest: 0,
            out: NONE,
            mode: 0,
            layer,
            length: 0,
            kind: (kind >> 12) as u8,
            is_implied: 0,
        };
        node.imply();
        node
    }
}

const DIRECTORY: u8 = (S_IFDIR >> 12) as u8;
const FILE: u8 = (S_IFREG >> 12) as u8;

/// A name in a directory. Once made it stays, live or not: what it was called is asked for after it was hidden.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct NameRow {
    pub(super) parent: Row,
    pub(super) inode: Row,
    /// Another name of the directory, [`NONE`] at the end.
    pub(super) next: u32,
    /// Where its bytes lie.
    pub(super) at: u32,
    hash: u32,
    /// The layer that put this name here.
    pub(super) layer: LayerNumber,
    pub(super) length: u8,
    flags: u8,
}

const LIVE: u8 = 1;
/// Listed in a whitelist.
const KEPT: u8 = 2;
const IS_DIRECTORY: u8 = 4;
const IS_WHITEOUT: u8 = 8;

impl NameRow {
    pub(super) fn is_live(&self) -> bool {
        self.flags & LIVE != 0
    }

    pub(super) fn is_directory(&self) -> bool {
        self.flags & IS_DIRECTORY != 0
    }

    pub(super) fn is_whiteout(&self) -> bool {
        self.flags & IS_WHITEOUT != 0
    }

    pub(super) fn kill(&mut self) {
        self.flags &= !LIVE;
    }

    /// Note that it is listed. Gives whether it was.
    pub(super) fn keep(&mut self, keep: bool) -> bool {
        let was = self.flags & KEPT != 0;
        self.flags = self.flags & !KEPT | if keep { KEPT } else { 0 };
        was
    }
}

/// A whiteout of the layer at hand: its directory, and the name that it hides (none: all).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Hidden {
    pub(super) directory: Row,
    pub(super) length: u32,
    pub(super) at: u64,
}

/// Where an xattr set lies: its count, then for each the lengths of name and value, and their bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SetRow {
    pub(super) at: u64,
    pub(super) length: u64,
}

/// The tree of an image while it is being put together.
///
/// Of what entries say a bounded part is held in memory, the rest in files without names ([`Builder::in_dir`]).
///
/// ```
/// use fsprov::internals::index::{Builder, Entry, Index, Time, What, Whiteouts};
/// let entry = |path: &[u8], what, mode| Entry {
///     path: path.to_vec(), what, mode, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new(),
/// };
/// let mut builder = Builder::new();
/// builder.begin_layer(Whiteouts::Plain)?;
/// builder.add(entry(b"etc", What::Directory, 0o755))?;
/// builder.add(entry(b"etc/hostname", What::File { size: 5, content: None, sha256: None }, 0o644))?;
/// let index = Index::from_bytes(builder.finish()?)?;
/// assert_eq!(index.inode_count(), 3);
/// # Ok::<(), fsprov::Error>(())
/// ```
pub struct Builder {
    pub(super) inodes: Table<Node>,
    pub(super) names: Table<NameRow>,
    pub(super) name_bytes: Heap,
    /// Open addressing: rows of `names` plus 1 by their hash, 0 where there is none. A power of two of them.
    slots: Table<u32>,
    hasher: RandomState,
    /// Symlink targets, content paths, names of whiteouts.
    pub(super) strings: Heap,
    pub(super) digests: Table<[u8; 32]>,
    pub(super) xattr_sets: Table<SetRow>,
    pub(super) xattr_bytes: Heap,
    /// Rows of `xattr_sets` by a hash of the set: equal ones are held once.
    xattr_rows: HashMap<u64, u32>,
    layers: usize,
    pub(super) whiteouts: Whiteouts,
    /// Whiteouts of the layer at hand. They are applied at its end: they reach what lies below it only, wherever in the
    /// archive they stand, and a hard link may name what one of them hides.
    pub(super) hidden: Table<Hidden>,
    /// A file of the layer at hand has lost the name that [`Node::first`] has.
    has_lost: bool,
    /// The directory that was looked for last: the next entry mostly lies there too.
    pub(super) at_hand: Option<(Vec<u8>, Row)>,
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("inodes", &self.inodes.len())
            .field("names", &self.names.len())
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// An empty tree: a root directory, no layer begun. What does not fit into memory goes to the directory for temporary files.
    pub fn new() -> Self {
        Self::in_dir(&std::env::temp_dir())
    }

    /// The same; what does not fit into memory goes to files in `dir`, which have no names there.
    pub fn in_dir(dir: &Path) -> Self {
        let mut builder = Builder {
            inodes: Table::new(dir, INODES_HELD),
            names: Table::new(dir, NAMES_HELD),
            name_bytes: Heap::new(dir, NAME_BYTES_HELD),
            slots: Table::new(dir, SLOTS_HELD),
            hasher: RandomState::new(),
            strings: Heap::new(dir, STRINGS_HELD),
            digests: Table::new(dir, DIGESTS_HELD),
            xattr_sets: Table::new(dir, DIGESTS_HELD),
            xattr_bytes: Heap::new(dir, XATTRS_HELD),
            xattr_rows: HashMap::new(),
            layers: 0,
            whiteouts: Whiteouts::Plain,
            hidden: Table::new(dir, HIDDEN_HELD),
            has_lost: false,
            at_hand: None,
        };
        let first = builder.inodes.push(&Node::new(S_IFDIR, 0)).and_then(|_| {
            builder.xattr_sets.push(&SetRow { at: 0, length: 0 })?;
            builder.slots.grow(FEWEST_SLOTS)
        });
        first.expect("the first pages are memory");
        builder
    }

    /// Begin the next layer, on top of those before it: its number, which file records carry.
    pub fn begin_layer(&mut self, whiteouts: Whiteouts) -> Result<LayerNumber> {
        if self.layers == MAX_LAYERS {
            return Err(Error::new(Kind::Limit, "index layer", self.layers, "an image has at most 4096 layers"));
        }
        self.end_layer()?;
        self.layers += 1;
        self.whiteouts = whiteouts;
        Ok(self.layer())
    }

    /// How many layers were begun.
    pub fn layer_count(&self) -> usize {
        self.layers
    }

    pub(super) fn layer(&self) -> LayerNumber {
        self.layers.saturating_sub(1) as LayerNumber
    }

    /// Add an entry to the layer begun last. Missing parents are made (0755, root, 1970). A name that is there already is
    /// replaced, but for a directory on a directory. An entry that is refused leaves the tree as it was, but for parents.
    ///
    /// Errors: [`Kind::Invalid`] for a malformed path, a hard link to what is not there or to a directory, a parent that is
    /// not a directory in this same layer; [`Kind::Limit`] past the limits of [`crate::index`]; [`Kind::Usage`] before
    /// the first layer; [`Kind::Io`] where what does not fit into memory cannot be put aside.
    // By value: callers make an entry for this call alone.
    #[allow(clippy::needless_pass_by_value)]
    pub fn add(&mut self, entry: Entry) -> Result<()> {
        self.add_as(&entry, None).map(drop)
    }

    /// The same, as one more name of the inode `link` if there is one. Gives the inode; none for a whiteout.
    pub(super) fn add_as(&mut self, entry: &Entry, link: Option<Row>) -> Result<Option<Row>> {
        if self.layers == 0 {
            return Err(refuse(Kind::Usage, &entry.path, "no layer was begun"));
        }
        check_path(&entry.path)?;
        let Some((parent, name)) = split(&entry.path) else {
            if !matches!(entry.what, What::Directory) {
                return Err(refuse(Kind::Invalid, b"/", "the root is not a directory"));
            }
            self.set_attributes(ROOT_ROW, entry)?;
            return Ok(Some(ROOT_ROW));
        };
        if self.whiteouts == Whiteouts::Oci && name.starts_with(merge_prefix()) {
            self.hide(&entry.path, parent, name)?;
            return Ok(None);
        }
        let layer = self.layer();
        if link.is_some() || matches!(entry.what, What::HardLink(_)) {
            let parent = self.make_directory(parent)?;
            return self.add_hard_link(entry, parent, name, link).map(Some);
        }
        let mut node = self.node_of(entry, layer)?;
        let parent = self.make_directory(parent)?;
        if node.is_directory()
            && let Some((at, mut link)) = self.child(parent, name)?
        {
            link.layer = layer;
            self.names.set(at, &link)?;
            if link.is_directory() {
                self.set_attributes(link.inode, entry)?;
                return Ok(Some(link.inode));
            }
        }
        self.fill(&mut node, entry)?;
        let row = self.push(&node, &entry.path)?;
        self.put(parent, name, row, node.is_directory())?;
        Ok(Some(row))
    }

    fn add_hard_link(&mut self, entry: &Entry, parent: Row, name: &[u8], link: Option<Row>) -> Result<Row> {
        let row = match (link, &entry.what) {
            (Some(row), _) => row,
            (None, What::HardLink(target)) => {
                check_path(target)?;
                let missing = || {
                    let why = format!("its hard-link target {:?} is not in the image", lossy(target));
                    refuse(Kind::Invalid, &entry.path, why)
                };
                let row = self.find(target)?.ok_or_else(missing)?;
                if *target == entry.path && !self.inodes.get(row)?.is_directory() {
                    return Ok(row);
                }
                row
            }
            _ => unreachable!("the caller has a link"),
        };
        if self.inodes.get(row)?.is_directory() {
            return Err(refuse(Kind::Invalid, &entry.path, "it is a hard link to a directory"));
        }
        self.put(parent, name, row, false)?;
        Ok(row)
    }

    /// Name `row` in `parent`, in place of what was there.
    fn put(&mut self, parent: Row, name: &[u8], row: Row, is_directory: bool) -> Result<()> {
        let layer = self.layer();
        let hash = self.hash(parent, name);
        let mut flags = LIVE | if is_directory { IS_DIRECTORY } else { 0 };
        if name.starts_with(merge_prefix()) {
            flags |= IS_WHITEOUT;
        }
        let at = match self.slot(parent, name, hash)? {
            Ok(at) => {
                let mut have = self.names.get(at)?;
                if have.is_live() && have.inode != row {
                    self.unname(at, have)?;
                }
                (have.inode, have.layer, have.flags) = (row, layer, flags);
                self.names.set(at, &have)?;
                at
            }
            Err(slot) => {
                let to = self.name_bytes.add(name)?;
                let to = u32::try_from(to).map_err(|_| refuse(Kind::Limit, name, "all names take more than 4 GiB"))?;
                if self.names.len() as usize >= MAX_ROWS {
                    return Err(refuse(Kind::Limit, name, "an index has at most 268,435,456 names"));
                }
                let next = self.inodes.get(parent)?.first;
                let length = name.len() as u8;
                let new = NameRow { parent, inode: row, next, at: to, hash, layer, length, flags };
                let at = self.names.push(&new)?;
                self.inodes.change(parent, |node| node.first = at)?;
                self.slots.set(slot, &(at + 1))?;
                self.grow_slots()?;
                at
            }
        };
        let mut node = self.inodes.get(row)?;
        if is_directory {
            node.home = at;
            self.inodes.set(row, &node)?;
        } else if node.kind == FILE && node.first == NONE && node.layer == layer {
            // A name is a place of the content only in the layer that has the content.
            node.first = at;
            self.inodes.set(row, &node)?;
        }
        Ok(())
    }

    /// A name (and all below it) is replaced in this layer: on disk, too, it leads elsewhere now.
    fn unname(&mut self, at: u32, name: NameRow) -> Result<()> {
        let layer = self.layer();
        self.at_hand = None;
        let mut stack = Vec::new();
        let mut next = Some((at, name));
        let top = at;
        while let Some((at, mut name)) = next {
            if at != top {
                // It cannot be reached any more, and must not be taken for a place of a file that another name keeps.
                name.kill();
                self.names.set(at, &name)?;
            }
            let mut node = self.inodes.get(name.inode)?;
            if node.is_directory() {
                stack.push(node.first);
            } else if node.kind == FILE && node.layer == layer && node.first == at {
                (node.first, self.has_lost) = (NONE, true);
                self.inodes.set(name.inode, &node)?;
            }
            next = self.next_below(&mut stack)?;
        }
        Ok(())
    }

    /// The next live name of the directory on top of the stack, or of one below it.
    fn next_below(&mut self, stack: &mut Vec<u32>) -> Result<Option<(u32, NameRow)>> {
        while let Some(top) = stack.last_mut() {
            if *top == NONE {
                stack.pop();
                continue;
            }
            let at = *top;
            let name = self.names.get(at)?;
            *top = name.next;
            if name.is_live() {
                return Ok(Some((at, name)));
            }
        }
        Ok(None)
    }

    /// Visit each directory below the root, parents first: [`Step::Down`] with its name and time, and [`Step::Up`] when all below it
    /// were visited.
    pub(crate) fn each_directory(&mut self, mut visit: impl FnMut(Step<'_>) -> Result<()>) -> Result<()> {
        let mut stack = vec![self.inodes.get(ROOT_ROW)?.first];
        let mut bytes = Vec::new();
        while let Some(top) = stack.last_mut() {
            if *top == NONE {
                stack.pop();
                if !stack.is_empty() {
                    visit(Step::Up)?;
                }
                continue;
            }
            let name = self.names.get(*top)?;
            *top = name.next;
            if name.is_live() && name.is_directory() {
                let node = self.inodes.get(name.inode)?;
                bytes.clear();
                self.name_bytes.read(name.at.into(), name.length.into(), &mut bytes)?;
                visit(Step::Down { name: &bytes, mtime: node.mtime() })?;
                stack.push(node.first);
            }
        }
        Ok(())
    }

    /// Visit the path of each name that begins as a whiteout does, in the order in which they came.
    pub(crate) fn each_whiteout(&mut self, mut visit: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        for at in 0..self.names.len() {
            let name = self.names.get(at)?;
            if name.is_live() && name.is_whiteout() {
                visit(&self.path_of(at)?)?;
            }
        }
        Ok(())
    }

    /// The time of the root.
    pub(crate) fn root_mtime(&mut self) -> Result<Time> {
        Ok(self.inodes.get(ROOT_ROW)?.mtime())
    }

    /// Is there a directory at `path`, and does an entry speak of it?
    pub(crate) fn said(&mut self, path: &[u8]) -> Result<Option<bool>> {
        let Some(row) = self.find(path)? else { return Ok(None) };
        let node = self.inodes.get(row)?;
        Ok(node.is_directory().then_some(!node.is_implied()))
    }

    fn push(&mut self, node: &Node, path: &[u8]) -> Result<Row> {
        if self.inodes.len() as usize >= MAX_ROWS {
            return Err(refuse(Kind::Limit, path, "an index has at most 268,435,456 inodes"));
        }
        self.inodes.push(node)
    }

    fn hash(&self, parent: Row, name: &[u8]) -> u32 {
        self.hasher.hash_one((parent, name)) as u32
    }

    /// The row of a name that is there or was, or else the slot for it.
    fn slot(&mut self, parent: Row, name: &[u8], hash: u32) -> Result<std::result::Result<u32, u32>> {
        let mask = self.slots.len() - 1;
        let mut slot = hash & mask;
        loop {
            let Some(at) = self.slots.get(slot)?.checked_sub(1) else { return Ok(Err(slot)) };
            let have = self.names.get(at)?;
            if have.hash == hash
                && have.parent == parent
                && usize::from(have.length) == name.len()
                && self.name_bytes.is(have.at.into(), name)?
            {
                return Ok(Ok(at));
            }
            slot = (slot + 1) & mask;
        }
    }

    fn grow_slots(&mut self) -> Result<()> {
        if self.names.len() < self.slots.len() / 2 {
            return Ok(());
        }
        let count = self.slots.len() * 2;
        let mut slots = Table::new(self.slots.dir(), SLOTS_HELD);
        slots.grow(count)?;
        for at in 0..self.names.len() {
            let mut slot = self.names.get(at)?.hash & (count - 1);
            while slots.get(slot)? != 0 {
                slot = (slot + 1) & (count - 1);
            }
            slots.set(slot, &(at + 1))?;
        }
        self.slots = slots;
        Ok(())
    }

    /// The name in a directory, and its row.
    pub(super) fn child(&mut self, parent: Row, name: &[u8]) -> Result<Option<(u32, NameRow)>> {
        let hash = self.hash(parent, name);
        let Ok(at) = self.slot(parent, name, hash)? else { return Ok(None) };
        let have = self.names.get(at)?;
        Ok(have.is_live().then_some((at, have)))
    }

    /// The inode at a path, no symlink followed.
    pub(super) fn find(&mut self, path: &[u8]) -> Result<Option<Row>> {
        let (mut row, mut names) = (ROOT_ROW, path);
        if let Some((parent, name)) = split(path)
            && let Some((at_hand, there)) = &self.at_hand
            && at_hand == parent
        {
            (row, names) = (*there, name);
        }
        for name in components(names) {
            match self.child(row, name)? {
                Some((_, link)) => row = link.inode,
                None => return Ok(None),
            }
        }
        Ok(Some(row))
    }

    /// The path by which a name was put, though it may be hidden by now.
    pub(super) fn path_of(&mut self, at: u32) -> Result<Vec<u8>> {
        let mut trail = Vec::new();
        let (mut at, mut length) = (at, 0);
        while at != NONE {
            let name = self.names.get(at)?;
            trail.push((name.at, name.length));
            length += usize::from(name.length) + 1;
            at = self.inodes.get(name.parent)?.home;
        }
        if length > MAX_PATH + 1 {
            return Err(Error::new(Kind::Limit, "write index", "", "a path in it is longer than 4095 bytes"));
        }
        let mut path = Vec::with_capacity(length);
        for (at, length) in trail.into_iter().rev() {
            if !path.is_empty() {
                path.push(b'/');
            }
            self.name_bytes.read(at.into(), length.into(), &mut path)?;
        }
        Ok(path)
    }

    /// The directory at `path`, made with its parents where missing. Anything else there is replaced if it comes
    /// from a layer below.
    pub(super) fn make_directory(&mut self, path: &[u8]) -> Result<Row> {
        if let Some((at_hand, row)) = &self.at_hand
            && at_hand == path
        {
            return Ok(*row);
        }
        let row = self.lead_to(path)?;
        self.at_hand = Some((path.to_vec(), row));
        Ok(row)
    }

    fn lead_to(&mut self, path: &[u8]) -> Result<Row> {
        let layer = self.layer();
        let mut row = ROOT_ROW;
        for name in components(path) {
            row = match self.child(row, name)? {
                Some((_, link)) if link.is_directory() => link.inode,
                Some((_, link)) if link.layer == layer => {
                    return Err(refuse(
                        Kind::Invalid,
                        path,
                        format!("{:?} in it is not a directory in the same layer", lossy(name)),
                    ));
                }
                _ => {
                    let made = self.push(&Node::new(S_IFDIR, layer), path)?;
                    self.put(row, name, made, true)?;
                    made
                }
            };
        }
        Ok(row)
    }

    /// Files that lost the name that was noted may have another in the layer that ends.
    pub(super) fn find_lost(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.has_lost) {
            return Ok(());
        }
        let layer = self.layer();
        for at in 0..self.names.len() {
            let name = self.names.get(at)?;
            if name.is_live() && name.layer == layer && !name.is_directory() {
                let mut node = self.inodes.get(name.inode)?;
                if node.kind == FILE && node.first == NONE && node.layer == layer {
                    node.first = at;
                    self.inodes.set(name.inode, &node)?;
                }
            }
        }
        Ok(())
    }

    fn set_attributes(&mut self, row: Row, entry: &Entry) -> Result<()> {
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
    fn node_of(&mut self, entry: &Entry, layer: LayerNumber) -> Result<Node> {
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

    fn fill(&mut self, node: &mut Node, entry: &Entry) -> Result<()> {
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

/// See [`Builder::each_directory`].
pub(crate) enum Step<'a> {
    Down { name: &'a [u8], mtime: Time },
    Up,
}

/// Slots of an empty tree: a page.
const FEWEST_SLOTS: u32 = 4096;

fn merge_prefix() -> &'static [u8] {
    super::merge::WHITEOUT_PREFIX
}

/// The names of a checked path, from the root down.
pub(super) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&b| b == b'/').filter(|name| !name.is_empty())
}

/// A checked path's parent and name; `None` for the root.
pub(super) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    Some(match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&path[..0], path),
    })
}

/// Refuse a path that is not one of [`Entry::path`]'s form.
pub(super) fn check_path(path: &[u8]) -> Result<()> {
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > MAX_PATH {
        return Err(refuse(Kind::Limit, path, "its path is longer than 4095 bytes"));
    }
    let mut depth = 0;
    for name in path.split(|&b| b == b'/') {
        check_name(name).map_err(|why| refuse(Kind::Invalid, path, why))?;
        depth += 1;
    }
    if depth > MAX_DEPTH {
        return Err(refuse(Kind::Limit, path, "it lies deeper than 2048 directories"));
    }
    Ok(())
}

/// What every name in a directory must be.
pub(super) fn check_name(name: &[u8]) -> std::result::Result<(), &'static str> {
    match name {
        b"" => Err("its path has an empty component"),
        b"." | b".." => Err("its path has a component . or .."),
        _ if name.len() > MAX_NAME => Err("its path has a component longer than 255 bytes"),
        _ if name.contains(&0) || name.contains(&b'/') => Err("a name in its path holds a NUL or a slash"),
        _ => Ok(()),
    }
}

pub(super) fn lossy(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

pub(super) fn refuse(kind: Kind, path: &[u8], why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    use std::os::unix::ffi::OsStrExt as _;
    Error::new(kind, "index", crate::error::show(std::ffi::OsStr::from_bytes(path)), why)
}
