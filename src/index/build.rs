//! Takes the entries of an image's layers and holds the merged tree until it is written.
//!
//! Names and inodes are apart, as on any Unix file system: a directory maps a name to an inode, and hard links are several
//! names of one. Memory is some 200 bytes a file; this runs at import, never in a server.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher as _;

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

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) inode: Row,
    /// The layer that put this name here.
    pub(super) layer: LayerNumber,
}

pub(super) type Children = BTreeMap<Box<[u8]>, Link>;

#[derive(Debug)]
pub(super) enum Body {
    Directory(Children),
    File {
        size: u64,
        /// Said by the entry.
        content: Option<Box<[u8]>>,
        sha256: Option<Box<[u8; 32]>>,
        /// Its names in its own layer, once it has more than one (or lost its first): where its bytes can be found.
        names: Vec<Box<[u8]>>,
    },
    Symlink(Box<[u8]>),
    Fifo,
    Socket,
    Char(u32),
    Block(u32),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    /// Row of the xattr set, 0 for none.
    pub(super) xattrs: u32,
}

/// What a directory gets that no entry speaks of: the parents of an entry are made where they are missing, as tar does.
pub(super) const IMPLIED: Attributes =
    Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Time { secs: 0, nanos: 0 }, xattrs: 0 };

#[derive(Debug)]
pub(super) struct Inode {
    pub(super) attributes: Attributes,
    pub(super) body: Body,
    /// The layer its content lies in.
    pub(super) layer: LayerNumber,
}

/// The tree of an image while it is being put together.
///
/// ```
/// use fsprov::index::{Builder, Entry, Index, Time, What, Whiteouts};
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
#[derive(Debug)]
pub struct Builder {
    pub(super) inodes: Vec<Inode>,
    pub(super) xattr_sets: Vec<Vec<Xattr>>,
    /// Rows of `xattr_sets` by a hash of the set: the sets themselves are held once.
    xattr_rows: HashMap<u64, Vec<u32>>,
    xattr_hasher: RandomState,
    layers: usize,
    pub(super) whiteouts: Whiteouts,
    /// Whiteouts of the layer at hand. They are applied at its end: they reach what lies below it only, wherever in the
    /// archive they stand, and a hard link may name what one of them hides.
    pub(super) hidden: Vec<(Row, Option<Box<[u8]>>)>,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// An empty tree: a root directory, no layer begun.
    pub fn new() -> Self {
        let root = Inode { attributes: IMPLIED, body: Body::Directory(Children::new()), layer: 0 };
        Builder {
            inodes: vec![root],
            xattr_sets: vec![Vec::new()],
            xattr_rows: HashMap::new(),
            xattr_hasher: RandomState::new(),
            layers: 0,
            whiteouts: Whiteouts::Plain,
            hidden: Vec::new(),
        }
    }

    /// Begin the next layer, on top of those before it: its number, which file records carry.
    pub fn begin_layer(&mut self, whiteouts: Whiteouts) -> Result<LayerNumber> {
        if self.layers == MAX_LAYERS {
            return Err(Error::new(Kind::Limit, "index layer", self.layers, "an image has at most 4096 layers"));
        }
        self.end_layer();
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
    /// the first layer.
    // By value: callers make an entry for this call alone.
    #[allow(clippy::needless_pass_by_value)]
    pub fn add(&mut self, entry: Entry) -> Result<()> {
        if self.layers == 0 {
            return Err(refuse(Kind::Usage, &entry.path, "no layer was begun"));
        }
        check_path(&entry.path)?;
        let Some((parent, name)) = split(&entry.path) else {
            if !matches!(entry.what, What::Directory) {
                return Err(refuse(Kind::Invalid, b"/", "the root is not a directory"));
            }
            self.inodes[ROOT_ROW as usize].attributes = self.attributes(&entry)?;
            return Ok(());
        };
        if self.whiteouts == Whiteouts::Oci && name.starts_with(merge_prefix()) {
            return self.hide(&entry.path, parent, name);
        }
        let attributes = self.attributes(&entry)?;
        let parent_row = self.make_directory(parent)?;
        if let What::HardLink(target) = &entry.what {
            return self.add_hard_link(&entry.path, parent_row, name, target);
        }
        let layer = self.layer();
        if matches!(entry.what, What::Directory)
            && let Some(link) = self.children_mut(parent_row).get_mut(name)
        {
            let row = link.inode;
            link.layer = layer;
            if matches!(self.inodes[row as usize].body, Body::Directory(_)) {
                self.inodes[row as usize].attributes = attributes;
                return Ok(());
            }
        }
        let body = body_of(&entry)?;
        let row = self.push(Inode { attributes, body, layer }, &entry.path)?;
        self.put(parent_row, name, row, &entry.path);
        Ok(())
    }

    fn add_hard_link(&mut self, path: &[u8], parent: Row, name: &[u8], target: &[u8]) -> Result<()> {
        check_path(target)?;
        let row = self.find(target).ok_or_else(|| {
            refuse(Kind::Invalid, path, format!("its hard-link target {:?} is not in the image", lossy(target)))
        })?;
        let layer = self.layer();
        let inode = &mut self.inodes[row as usize];
        match &mut inode.body {
            Body::Directory(_) => {
                return Err(refuse(Kind::Invalid, path, "it is a hard link to a directory"));
            }
            _ if target == path => return Ok(()),
            Body::File { names, .. } => {
                if names.is_empty() {
                    names.push(target.into());
                }
                // A name is a place of the content only in the layer that has the content.
                if inode.layer == layer {
                    names.push(path.into());
                }
            }
            _ => {}
        }
        self.put(parent, name, row, path);
        Ok(())
    }

    /// Name `row` in `parent`, in place of what was there.
    fn put(&mut self, parent: Row, name: &[u8], row: Row, path: &[u8]) {
        let layer = self.layer();
        let old = self.children_mut(parent).insert(name.into(), Link { inode: row, layer });
        if let Some(old) = old
            && old.inode != row
        {
            self.unname(old.inode, path);
        }
    }

    /// `path` (and all below it) was replaced in this layer: on disk, too, it leads elsewhere now.
    fn unname(&mut self, row: Row, path: &[u8]) {
        let layer = self.layer();
        let mut below = vec![(row, path.to_vec())];
        while let Some((row, path)) = below.pop() {
            let inode = &mut self.inodes[row as usize];
            match &mut inode.body {
                Body::File { names, .. } if inode.layer == layer => names.retain(|n| **n != *path),
                Body::Directory(children) => below
                    .extend(children.iter().map(|(name, link)| (link.inode, [path.as_slice(), b"/", name].concat()))),
                _ => {}
            }
        }
    }

    fn push(&mut self, inode: Inode, path: &[u8]) -> Result<Row> {
        if self.inodes.len() >= MAX_ROWS {
            return Err(refuse(Kind::Limit, path, "an index has at most 268,435,456 inodes"));
        }
        self.inodes.push(inode);
        Ok((self.inodes.len() - 1) as Row)
    }

    pub(super) fn children(&self, row: Row) -> Option<&Children> {
        match &self.inodes[row as usize].body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// The children of a row known to be a directory.
    pub(super) fn children_mut(&mut self, row: Row) -> &mut Children {
        match &mut self.inodes[row as usize].body {
            Body::Directory(children) => children,
            other => unreachable!("row {row} is {other:?}, and its caller knew it for a directory"),
        }
    }

    /// The inode at a path, no symlink followed.
    pub(super) fn find(&self, path: &[u8]) -> Option<Row> {
        let mut row = ROOT_ROW;
        for name in components(path) {
            row = self.children(row)?.get(name)?.inode;
        }
        Some(row)
    }

    /// The directory at `path`, made with its parents where missing. What is no directory is replaced if it comes from a
    /// layer below.
    pub(super) fn make_directory(&mut self, path: &[u8]) -> Result<Row> {
        let layer = self.layer();
        let mut row = ROOT_ROW;
        for name in components(path) {
            let found = self.children_mut(row).get(name).copied();
            row = match found {
                Some(link) if self.children(link.inode).is_some() => link.inode,
                Some(link) if link.layer == layer => {
                    return Err(refuse(
                        Kind::Invalid,
                        path,
                        format!("{:?} in it is not a directory in the same layer", lossy(name)),
                    ));
                }
                _ => {
                    let body = Body::Directory(Children::new());
                    let made = self.push(Inode { attributes: IMPLIED, body, layer }, path)?;
                    self.children_mut(row).insert(name.into(), Link { inode: made, layer });
                    made
                }
            };
        }
        Ok(row)
    }

    fn attributes(&mut self, entry: &Entry) -> Result<Attributes> {
        if entry.mtime.nanos > 999_999_999 {
            return Err(refuse(Kind::Invalid, &entry.path, "its mtime has a billion nanoseconds or more"));
        }
        Ok(Attributes {
            mode: entry.mode & 0o7777,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: self.xattr_set(&entry.path, &entry.xattrs)?,
        })
    }

    fn xattr_set(&mut self, path: &[u8], xattrs: &[Xattr]) -> Result<u32> {
        if xattrs.is_empty() {
            return Ok(0);
        }
        let mut set = xattrs.to_vec();
        set.sort();
        if set.windows(2).any(|w| w[0].name == w[1].name) {
            return Err(refuse(Kind::Invalid, path, "it has an extended attribute twice"));
        }
        let mut list = 0;
        for xattr in &set {
            if xattr.name.is_empty() || xattr.name.contains(&0) {
                return Err(refuse(Kind::Invalid, path, "an extended attribute's name is empty or holds a NUL"));
            }
            list += xattr.name.len() + 1;
            if xattr.name.len() > MAX_XATTR_NAME || xattr.value.len() > MAX_XATTR_BYTES || list > MAX_XATTR_BYTES {
                return Err(refuse(Kind::Limit, path, "its extended attributes are larger than Linux takes"));
            }
        }
        let rows = self.xattr_rows.entry(self.xattr_hasher.hash_one(&set)).or_default();
        if let Some(row) = rows.iter().find(|row| self.xattr_sets[**row as usize] == set) {
            return Ok(*row);
        }
        let row = self.xattr_sets.len() as u32;
        self.xattr_sets.push(set);
        rows.push(row);
        Ok(row)
    }
}

fn merge_prefix() -> &'static [u8] {
    super::merge::WHITEOUT_PREFIX
}

fn body_of(entry: &Entry) -> Result<Body> {
    Ok(match &entry.what {
        What::Directory => Body::Directory(Children::new()),
        What::File { size, content, sha256 } => {
            if *size > i64::MAX as u64 {
                return Err(refuse(Kind::Invalid, &entry.path, "its size is negative"));
            }
            if let Some(content) = content {
                check_path(content)?;
                if content.is_empty() {
                    return Err(refuse(Kind::Invalid, &entry.path, "its content lies at an empty path"));
                }
            }
            Body::File {
                size: *size,
                content: content.as_deref().map(Into::into),
                sha256: sha256.map(Box::new),
                names: Vec::new(),
            }
        }
        What::Symlink(target) => {
            if target.is_empty() || target.contains(&0) {
                return Err(refuse(Kind::Invalid, &entry.path, "its symlink target is empty or holds a NUL"));
            }
            if target.len() > MAX_TARGET {
                return Err(refuse(Kind::Limit, &entry.path, "its symlink target is longer than 4095 bytes"));
            }
            Body::Symlink(target.as_slice().into())
        }
        What::Fifo => Body::Fifo,
        What::Socket => Body::Socket,
        What::Char(rdev) => Body::Char(*rdev),
        What::Block(rdev) => Body::Block(*rdev),
        What::HardLink(_) => unreachable!("hard links have no body: add() took them before"),
    })
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
