//! Takes the entries of an image's layers and holds the merged tree until it is written.
//!
//! Names and inodes are apart, as on any Unix file system: a directory maps a name to an inode, and hard links are several
//! names of one. All are known by number: a path is put together where it is asked for and held nowhere, since 15,000 directories
//! below one another's full paths are 30 MB, of an archive of 50 KB. This runs at import, never in a server.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::path::Path;

use super::entry::{
    Entry, LayerNumber, Time, WHITEOUT_PREFIX, What, Whiteouts, check_path, components, lossy, refuse, split,
};
use super::format::{NONE, S_IFDIR};
use super::paged::{Heap, Table};
use super::rows::{FILE, Hidden, IS_DIRECTORY, IS_WHITEOUT, LIVE, NameRow, Node, ROOT_ROW, Row, SetRow};
use super::{MAX_LAYERS, MAX_PATH, MAX_ROWS};
use crate::error::{Error, Kind, Result};

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

/// The tree of an image while it is being put together.
///
/// Of what entries say a bounded part is held in memory, the rest in files without names ([`Builder::in_dir`]).
///
#[cfg_attr(feature = "internals", doc = "```")]
#[cfg_attr(not(feature = "internals"), doc = "```ignore")]
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
    pub(super) hasher: RandomState,
    /// Symlink targets, content paths, names of whiteouts.
    pub(super) strings: Heap,
    pub(super) digests: Table<[u8; 32]>,
    pub(super) xattr_sets: Table<SetRow>,
    pub(super) xattr_bytes: Heap,
    /// Rows of `xattr_sets` by a hash of the set: equal ones are held once.
    pub(super) xattr_rows: HashMap<u64, u32>,
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
        if self.whiteouts == Whiteouts::Oci && name.starts_with(WHITEOUT_PREFIX) {
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
        if name.starts_with(WHITEOUT_PREFIX) {
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

    /// Is there a directory at `path` that an entry speaks of, and that does not look like one of which none does?
    pub(crate) fn stands_out(&mut self, path: &[u8]) -> Result<bool> {
        let Some(row) = self.find(path)? else { return Ok(false) };
        let node = self.inodes.get(row)?;
        let looks = (u32::from(node.mode), node.uid, node.gid);
        Ok(node.is_directory() && !node.is_implied() && looks != super::IMPLIED_LOOKS)
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
}

/// See [`Builder::each_directory`].
pub(crate) enum Step<'a> {
    Down { name: &'a [u8], mtime: Time },
    Up,
}

/// Slots of an empty tree: a page.
const FEWEST_SLOTS: u32 = 4096;
