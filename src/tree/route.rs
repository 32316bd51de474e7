//! The route table: volumes over an image, as one tree. It alone knows that there are several.
//!
//! Each target is resolved once, when the table is built, through the tree interface and inside the root: symlinks of the image
//! are followed, absolute ones from the root, `..` never above it. Directories that are missing on the way are made up. After
//! that, a name belongs to another tree exactly where (directory, name) is in the table; all else goes straight through.
//!
//! ```text
//! node id:  bits 56..64  the tree: 0 the image, 1.. the volumes, 255 the directories made up
//!           bits  0..56  the node in that tree
//! ```
//!
//! The table is built once and never changes, so requests take no lock here. The nodes it names are looked up once and never
//! forgotten, so they stay known to their trees.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::Duration;

use super::{
    Attr, Caching, Caller, Change, DirItem, Entry, Errno, FOREVER, Fit, Handle, ListMode, Lookup, NODE_LIMIT, New,
    Node, Opened, ROOT, Result, Statfs, Timespec, Tree, Writer, access_read_only,
};
use crate::error::{Error, Kind};
use crate::volume::{Access, ContainerPath, Form};

/// Symlinks followed on the way to one target: the kernel's own limit (path_resolution(7)).
const MAX_SYMLINKS: u32 = 40;
/// Longest symlink target: PATH_MAX.
const MAX_LINK: usize = 4096;
/// Where the tree's number lies in a node id.
const TREE_SHIFT: u32 = 56;
/// The number of the directories made up.
const MADE_UP: u64 = 255;
/// Cookies of entries that the tree below does not have, from here on. File systems count up from 0 or hash into 63 bits; ext4
/// ends at 2^63-1 (ext4_get_htree_eof), which is above.
const EXTRA_COOKIE: u64 = (1 << 63) - (1 << 16);

const TYPE_BITS: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;

/// The server itself, where no caller asks.
const SERVER: Caller = Caller { uid: 0, gid: 0, pid: 0 };

/// A tree's number, the tree, and a node in it.
type Place<'a> = (u64, &'a Arc<dyn Tree>, Node);

/// Why a name is routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// A volume's root: a mount point.
    Volume(Node),
    /// A directory made up on the way to one.
    MadeUp(Node),
}

impl Route {
    fn node(self) -> Node {
        match self {
            Route::Volume(node) | Route::MadeUp(node) => node,
        }
    }
}

/// The routed names of one directory.
#[derive(Debug, Default)]
struct Routed {
    names: BTreeMap<OsString, Route>,
    /// How many of them are directories that the tree below does not have: they count in st_nlink.
    added_directories: u32,
}

/// A directory that no tree has.
#[derive(Debug)]
struct MadeUp {
    parent: Node,
    attr: Attr,
}

/// The image with its volumes.
pub struct RouteTree {
    trees: Vec<Arc<dyn Tree>>,
    routed: HashMap<Node, Routed>,
    /// Directories that have a routed name in them or below: removing one would take a mount point with it.
    ancestors: HashSet<Node>,
    made_up: Vec<MadeUp>,
    /// What the roots of the volumes looked like when the table was built.
    roots: HashMap<Node, Attr>,
    live: bool,
    writable: bool,
    without_xattrs: bool,
}

impl std::fmt::Debug for RouteTree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RouteTree")
            .field("trees", &self.trees.len())
            .field("routed", &self.routed)
            .field("made_up", &self.made_up)
            .finish_non_exhaustive()
    }
}

/// What a path leads to in a tree, symlinks followed inside the root. None: nothing is there. For one who makes a volume's source
/// to give it the mode that the image has at the target (`/tmp`: 1777).
///
/// # Errors
/// A component is not a directory, too many symlinks, or the tree itself fails.
pub fn target_attr(image: &Arc<dyn Tree>, target: &ContainerPath) -> crate::Result<Option<Attr>> {
    let table = RouteTree::of_image(Arc::clone(image));
    let found = table.walk(target).map_err(|e| Error::sys("look in the image for", target, e))?;
    Ok(match found {
        Walked::Found { entry, .. } => Some(entry.attr),
        Walked::Missing { .. } => None,
    })
}

/// Where a walk ended.
enum Walked {
    /// At something, which is `name` in `parent`; the root has no name.
    Found { at: Option<(Node, OsString)>, entry: Entry, path: Vec<Node> },
    /// Before `missing`, whose first name is not in `parent`.
    Missing { parent: Node, missing: Vec<OsString>, path: Vec<Node> },
}

impl RouteTree {
    fn of_image(image: Arc<dyn Tree>) -> Self {
        RouteTree {
            live: image.is_live(),
            without_xattrs: image.is_without_xattrs(),
            trees: vec![image],
            routed: HashMap::new(),
            ancestors: HashSet::new(),
            writable: false,
            made_up: Vec::new(),
            roots: HashMap::new(),
        }
    }

    /// Route each volume's target to its tree. Outer volumes come before inner ones ([`crate::volume::order`]).
    ///
    /// # Errors
    /// A target cannot be reached inside the root, a directory would lie on a file or the reverse, two volumes end up at one place.
    pub fn build(
        image: Arc<dyn Tree>,
        volumes: Vec<(ContainerPath, Form, Access, Arc<dyn Tree>)>,
    ) -> crate::Result<RouteTree> {
        let mut table = Self::of_image(image);
        for (target, form, access, tree) in volumes {
            let op = "route volume";
            if table.trees.len() as u64 == MADE_UP {
                return Err(Error::new(Kind::Limit, op, target, "more volumes than node ids can tell apart"));
            }
            let walked = table.walk(&target).map_err(|e| match e {
                Errno::NOTDIR => Error::new(Kind::Usage, op, &target, "a component of the path is a file in the image"),
                Errno::LOOP => Error::new(Kind::Usage, op, &target, "more than 40 symbolic links on the way"),
                e => Error::sys(op, &target, e),
            })?;
            let root = tag(table.trees.len() as u64, ROOT);
            table.live |= tree.is_live();
            table.writable |= access == Access::Rw;
            table.without_xattrs &= tree.is_without_xattrs();
            table.trees.push(tree);
            if let Ok((attr, _)) = table.getattr(root, None) {
                table.roots.insert(root, attr);
            }
            match walked {
                Walked::Found { at: None, .. } => {
                    return Err(Error::new(Kind::Usage, op, &target, "it leads to the root of the image"));
                }
                Walked::Found { at: Some((parent, name)), entry, path } => {
                    let refuse = |why: &str| Err(Error::new(Kind::Usage, op, &target, why.to_owned()));
                    match (form, entry.attr.mode & TYPE_BITS) {
                        (Form::Directory, DIRECTORY) => {}
                        (Form::Directory, _) => {
                            return refuse("the source is a directory, but the image has a file there");
                        }
                        (_, DIRECTORY) => return refuse("the source is a file, but the image has a directory there"),
                        _ => {}
                    }
                    if matches!(table.route(parent, &name), Some(Route::Volume(_))) {
                        return refuse(
                            "another volume ends up at the same place; symbolic links in the image lead there",
                        );
                    }
                    table.add(parent, name, Route::Volume(root), false, &path);
                }
                Walked::Missing { mut parent, missing, mut path } => {
                    let (last, between) = missing.split_last().expect("a missing path has a name");
                    for name in between {
                        let node = table.make_up(parent);
                        table.add(parent, name.clone(), Route::MadeUp(node), true, &path);
                        parent = node;
                        path.push(node);
                    }
                    table.add(parent, last.clone(), Route::Volume(root), form == Form::Directory, &path);
                }
            }
        }
        Ok(table)
    }

    /// True where a volume may be written: else the file system may be mounted `ro`.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    fn add(&mut self, parent: Node, name: OsString, route: Route, adds_directory: bool, path: &[Node]) {
        let routed = self.routed.entry(parent).or_default();
        routed.added_directories += u32::from(adds_directory);
        routed.names.insert(name, route);
        self.ancestors.extend(path);
    }

    fn make_up(&mut self, parent: Node) -> Node {
        let node = tag(MADE_UP, self.made_up.len() as u64 + 2);
        // The owner and times of the image's root: what a directory made with the image would have had.
        let root = self.trees[0].getattr(ROOT, None).map(|(attr, _)| attr).ok();
        let time = |pick: fn(&Attr) -> Timespec| root.as_ref().map(pick).unwrap_or_default();
        self.made_up.push(MadeUp {
            parent,
            attr: Attr {
                node,
                mode: DIRECTORY | 0o755,
                nlink: 2,
                uid: root.map_or(0, |r| r.uid),
                gid: root.map_or(0, |r| r.gid),
                rdev: 0,
                size: 0,
                blocks: 0,
                blksize: 4096,
                atime: time(|a| a.atime),
                mtime: time(|a| a.mtime),
                ctime: time(|a| a.ctime),
            },
        });
        node
    }

    /// Walk a path from the root, following symlinks inside it. References counted on the way are kept where the walk ends.
    fn walk(&self, target: &ContainerPath) -> Result<Walked> {
        // Directories from the root down, each with the name that led to it.
        let mut path: Vec<(Node, OsString)> = vec![(ROOT, OsString::new())];
        let mut left: Vec<OsString> = target.names().rev().map(OsStr::to_owned).collect();
        let mut links = 0;
        let nodes = |path: &[(Node, OsString)]| path.iter().map(|(node, _)| *node).collect::<Vec<_>>();
        while let Some(name) = left.pop() {
            if name == ".." {
                if path.len() > 1 {
                    path.pop();
                }
                continue;
            }
            let parent = path.last().expect("the root stays").0;
            let Lookup::Found(entry) = self.lookup(&SERVER, parent, &name)? else {
                left.push(name);
                left.reverse();
                // `..` after a name that does not exist leads nowhere.
                if left.iter().any(|n| n == "..") {
                    return Err(Errno::NOENT);
                }
                return Ok(Walked::Missing { parent, missing: left, path: nodes(&path) });
            };
            let node = entry.attr.node;
            match entry.attr.mode & TYPE_BITS {
                DIRECTORY => path.push((node, name)),
                SYMLINK => {
                    links += 1;
                    if links > MAX_SYMLINKS {
                        return Err(Errno::LOOP);
                    }
                    let mut text = Vec::new();
                    self.readlink(node, &mut |bytes| text.extend_from_slice(bytes))?;
                    self.forget(node, 1);
                    if text.is_empty() || text.len() > MAX_LINK {
                        return Err(Errno::NOENT);
                    }
                    if text[0] == b'/' {
                        path.truncate(1);
                    }
                    let names = text.split(|&b| b == b'/').filter(|n| !matches!(*n, b"" | b"."));
                    left.extend(names.rev().map(|n| OsStr::from_bytes(n).to_owned()));
                }
                _ if left.is_empty() => {
                    return Ok(Walked::Found { at: Some((parent, name)), entry, path: nodes(&path) });
                }
                _ => return Err(Errno::NOTDIR),
            }
        }
        let (node, name) = path.pop().expect("the root stays");
        let at = path.last().map(|&(parent, _)| (parent, name));
        let (attr, ttl) = self.getattr(node, None)?;
        let entry = Entry { attr, generation: 0, entry_ttl: ttl, attr_ttl: ttl };
        Ok(Walked::Found { at, entry, path: nodes(&path) })
    }

    fn route(&self, parent: Node, name: &OsStr) -> Option<Route> {
        // Most tables have a handful of directories with routed names: for all others this is one failed probe.
        self.routed.get(&parent)?.names.get(name).copied()
    }

    /// The tree that a node belongs to, and the node there. None: it was made up.
    fn tree(&self, node: Node) -> Result<Option<Place<'_>>> {
        match node >> TREE_SHIFT {
            MADE_UP => Ok(None),
            number => {
                let tree = self.trees.get(number as usize).ok_or(Errno::STALE)?;
                Ok(Some((number, tree, node & (NODE_LIMIT - 1))))
            }
        }
    }

    /// The same for what a made-up directory does not do.
    fn real(&self, node: Node) -> Result<Place<'_>> {
        self.tree(node)?.ok_or(Errno::ROFS)
    }

    fn made(&self, node: Node) -> Result<&MadeUp> {
        let index = (node & (NODE_LIMIT - 1)).checked_sub(2).ok_or(Errno::STALE)?;
        self.made_up.get(index as usize).ok_or(Errno::STALE)
    }

    fn attr_out(&self, number: u64, mut attr: Attr) -> Attr {
        attr.node = tag(number, attr.node);
        if let Some(routed) = self.routed.get(&attr.node)
            && attr.nlink > 1
        {
            // Not where the file system says 1 for every directory (btrfs): that means "not counted".
            attr.nlink = attr.nlink.saturating_add(routed.added_directories);
        }
        attr
    }

    fn entry_out(&self, number: u64, mut entry: Entry) -> Entry {
        entry.attr = self.attr_out(number, entry.attr);
        entry
    }

    /// The entry that a route leads to. For a volume's root never an error: a name that fails is forgotten by the kernel, with what is
    /// mounted on it (d_invalidate in fs/dcache.c), and a volume's flags are those of a mount of its own.
    fn routed_entry(&self, route: Route) -> Result<Entry> {
        let (attr, ttl) = match (self.getattr(route.node(), None), self.roots.get(&route.node())) {
            (Err(_), Some(&earlier)) => (earlier, Duration::ZERO),
            (answer, _) => answer?,
        };
        // The name leads there as long as the mount lives; the attributes hold as long as the volume says.
        Ok(Entry { attr, generation: 0, entry_ttl: FOREVER, attr_ttl: ttl })
    }

    /// EEXIST where something would be made on a routed name, EBUSY where one would go; EROFS before EBUSY where nothing may go.
    fn refuse_routed(&self, parent: Node, name: &OsStr, errno: Errno) -> Result<()> {
        if self.route(parent, name).is_none() {
            return Ok(());
        }
        let is_image = matches!(parent >> TREE_SHIFT, 0 | MADE_UP);
        Err(if errno == Errno::BUSY && is_image { Errno::ROFS } else { errno })
    }

    /// Both in one tree, or EXDEV.
    fn together(&self, a: Node, b: Node) -> Result<(u64, &Arc<dyn Tree>, Node, Node)> {
        if a >> TREE_SHIFT != b >> TREE_SHIFT {
            return Err(Errno::XDEV);
        }
        let (number, tree, a) = self.real(a)?;
        Ok((number, tree, a, b & (NODE_LIMIT - 1)))
    }

    /// Routed names that the directory's own tree has not: they come after all others.
    fn list_added(
        &self,
        caller: &Caller,
        node: Node,
        routed: &Routed,
        cookie: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        let first = if cookie > EXTRA_COOKIE && cookie < (1 << 63) - 1 { cookie - EXTRA_COOKIE } else { 0 };
        for (index, (name, &route)) in routed.names.iter().enumerate().skip(first as usize) {
            if let Some((_, tree, inner)) = self.tree(node)?
                && let Lookup::Found(hidden) = tree.lookup(caller, inner, name)?
            {
                // Its tree has the name too: it came in its place.
                tree.forget(hidden.attr.node, 1);
                continue;
            }
            let entry = self.routed_entry(route)?;
            let item = DirItem {
                name,
                node: entry.attr.node,
                kind: entry.attr.mode & TYPE_BITS,
                cookie: EXTRA_COOKIE + index as u64 + 1,
                entry: (mode == ListMode::Plus).then_some(entry),
            };
            if out(&item) == Fit::Full {
                break;
            }
        }
        Ok(())
    }

    fn list_made_up(&self, node: Node, cookie: u64, out: &mut dyn FnMut(&DirItem<'_>) -> Fit) -> Result<bool> {
        let parent = self.made(node)?.parent;
        for (name, number, own) in [(".", node, 1), ("..", parent, 2)] {
            let item = DirItem { name: OsStr::new(name), node: number, kind: DIRECTORY, cookie: own, entry: None };
            if cookie < own && out(&item) == Fit::Full {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn tag(tree: u64, node: Node) -> Node {
    tree << TREE_SHIFT | node
}

impl Tree for RouteTree {
    fn lookup(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<Lookup> {
        if let Some(route) = self.route(parent, name) {
            return self.routed_entry(route).map(Lookup::Found);
        }
        let Some((number, tree, inner)) = self.tree(parent)? else {
            self.made(parent)?;
            return Ok(Lookup::Absent(FOREVER));
        };
        Ok(match tree.lookup(caller, inner, name)? {
            Lookup::Found(entry) => Lookup::Found(self.entry_out(number, entry)),
            absent @ Lookup::Absent(_) => absent,
        })
    }

    fn forget(&self, node: Node, count: u64) {
        // The table's own reference keeps what it names: those counts never reach their trees as the last.
        if self.ancestors.contains(&node) {
            return;
        }
        if let Ok(Some((_, tree, inner))) = self.tree(node) {
            tree.forget(inner, count);
        }
    }

    fn getattr(&self, node: Node, handle: Option<Handle>) -> Result<(Attr, Duration)> {
        let Some((number, tree, inner)) = self.tree(node)? else {
            let mut attr = self.made(node)?.attr;
            attr.nlink += self.routed.get(&node).map_or(0, |r| r.added_directories);
            return Ok((attr, FOREVER));
        };
        let (attr, ttl) = tree.getattr(inner, handle)?;
        Ok((self.attr_out(number, attr), ttl))
    }

    fn readlink(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let (_, tree, inner) = self.tree(node)?.ok_or(Errno::INVAL)?;
        tree.readlink(inner, out)
    }

    fn open(&self, caller: &Caller, node: Node, flags: i32) -> Result<Opened> {
        let (_, tree, inner) = self.tree(node)?.ok_or(Errno::ISDIR)?;
        tree.open(caller, inner, flags)
    }

    fn read(&self, node: Node, handle: Handle, offset: u64, size: u32, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let (_, tree, inner) = self.tree(node)?.ok_or(Errno::ISDIR)?;
        tree.read(inner, handle, offset, size, out)
    }

    fn readdir(
        &self,
        caller: &Caller,
        node: Node,
        handle: Handle,
        cookie: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        let routed = self.routed.get(&node);
        let Some((number, tree, inner)) = self.tree(node)? else {
            if !self.list_made_up(node, cookie, out)? {
                return Ok(());
            }
            return match routed {
                Some(routed) => self.list_added(caller, node, routed, cookie, mode, out),
                None => Ok(()),
            };
        };
        let mut full = false;
        if cookie <= EXTRA_COOKIE || cookie == (1 << 63) - 1 {
            tree.readdir(caller, inner, handle, cookie, mode, &mut |item| {
                let route = routed.and_then(|r| r.names.get(item.name)).copied();
                let fit = match route {
                    Some(route) => match self.routed_entry(route) {
                        Ok(entry) => {
                            let fit = out(&DirItem {
                                name: item.name,
                                node: entry.attr.node,
                                kind: entry.attr.mode & TYPE_BITS,
                                cookie: item.cookie,
                                entry: item.entry.map(|_| entry),
                            });
                            if fit == Fit::Taken
                                && let Some(hidden) = item.entry
                            {
                                // The tree below counts it; the kernel was told of another.
                                tree.forget(hidden.attr.node, 1);
                            }
                            fit
                        }
                        Err(_) => Fit::Full,
                    },
                    None => out(&DirItem {
                        node: self.number_out(number, node, item),
                        entry: item.entry.map(|e| self.entry_out(number, e)),
                        ..*item
                    }),
                };
                full = fit == Fit::Full;
                fit
            })?;
        }
        match routed {
            Some(routed) if !full => self.list_added(caller, node, routed, cookie, mode, out),
            _ => Ok(()),
        }
    }

    fn statfs(&self, node: Node) -> Result<Statfs> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.statfs(inner),
            None => self.trees[0].statfs(ROOT),
        }
    }

    fn access(&self, node: Node, mask: i32) -> Result<()> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.access(inner, mask),
            None => access_read_only(DIRECTORY, mask),
        }
    }

    fn getxattr(&self, caller: &Caller, node: Node, name: &OsStr, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.getxattr(caller, inner, name, out),
            None => Err(Errno::NODATA),
        }
    }

    fn listxattr(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        if let Some((_, tree, inner)) = self.tree(node)? {
            return tree.listxattr(inner, out);
        }
        out(&[]);
        Ok(())
    }

    fn is_live(&self) -> bool {
        self.live
    }

    fn opens_without_asking(&self) -> bool {
        self.trees.iter().all(|tree| tree.opens_without_asking())
    }

    fn is_without_xattrs(&self) -> bool {
        self.without_xattrs
    }

    fn opendir(&self, caller: &Caller, node: Node) -> Result<Opened> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.opendir(caller, inner),
            None => Ok(Opened { handle: 0, cache: Caching::Keep, closes_silently: true }),
        }
    }

    fn releasedir(&self, node: Node, handle: Handle) {
        if let Ok(Some((_, tree, inner))) = self.tree(node) {
            tree.releasedir(inner, handle);
        }
    }

    fn flush(&self, node: Node, handle: Handle) -> Result<()> {
        let (_, tree, inner) = self.real(node)?;
        tree.flush(inner, handle)
    }

    fn release(&self, node: Node, handle: Handle) {
        if let Ok(Some((_, tree, inner))) = self.tree(node) {
            tree.release(inner, handle);
        }
    }

    fn fsync(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        let (_, tree, inner) = self.real(node)?;
        tree.fsync(inner, handle, data_only)
    }

    fn fsyncdir(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.fsyncdir(inner, handle, data_only),
            None => Ok(()),
        }
    }

    fn lseek(&self, node: Node, handle: Handle, offset: i64, whence: i32) -> Result<i64> {
        let (_, tree, inner) = self.tree(node)?.ok_or(Errno::INVAL)?;
        tree.lseek(inner, handle, offset, whence)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: Node,
        handle: Option<Handle>,
        change: &Change,
    ) -> Result<(Attr, Duration)> {
        let (number, tree, inner) = self.real(node)?;
        let (attr, ttl) = tree.setattr(caller, inner, handle, change)?;
        Ok((self.attr_out(number, attr), ttl))
    }

    fn create(&self, caller: &Caller, parent: Node, name: &OsStr, new: New, flags: i32) -> Result<(Entry, Opened)> {
        self.refuse_routed(parent, name, Errno::EXIST)?;
        let (number, tree, inner) = self.real(parent)?;
        let (entry, opened) = tree.create(caller, inner, name, new, flags)?;
        Ok((self.entry_out(number, entry), opened))
    }

    fn mknod(&self, caller: &Caller, parent: Node, name: &OsStr, new: New) -> Result<Entry> {
        self.refuse_routed(parent, name, Errno::EXIST)?;
        let (number, tree, inner) = self.real(parent)?;
        Ok(self.entry_out(number, tree.mknod(caller, inner, name, new)?))
    }

    fn mkdir(&self, caller: &Caller, parent: Node, name: &OsStr, new: New) -> Result<Entry> {
        self.refuse_routed(parent, name, Errno::EXIST)?;
        let (number, tree, inner) = self.real(parent)?;
        Ok(self.entry_out(number, tree.mkdir(caller, inner, name, new)?))
    }

    fn symlink(&self, caller: &Caller, parent: Node, name: &OsStr, target: &OsStr) -> Result<Entry> {
        self.refuse_routed(parent, name, Errno::EXIST)?;
        let (number, tree, inner) = self.real(parent)?;
        Ok(self.entry_out(number, tree.symlink(caller, inner, name, target)?))
    }

    fn link(&self, caller: &Caller, node: Node, parent: Node, name: &OsStr) -> Result<Entry> {
        self.refuse_routed(parent, name, Errno::EXIST)?;
        let (number, tree, inner, inner_parent) = self.together(node, parent)?;
        if inner == ROOT {
            return Err(Errno::XDEV); // a file volume's root: its other names lie outside
        }
        Ok(self.entry_out(number, tree.link(caller, inner, inner_parent, name)?))
    }

    fn unlink(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        self.refuse_routed(parent, name, Errno::BUSY)?;
        let (_, tree, inner) = self.real(parent)?;
        tree.unlink(caller, inner, name)
    }

    fn rmdir(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        self.refuse_routed(parent, name, Errno::BUSY)?;
        let (number, tree, inner) = self.real(parent)?;
        self.refuse_ancestor(caller, (number, tree, inner), name, Errno::NOTEMPTY)?;
        tree.rmdir(caller, inner, name)
    }

    fn rename(&self, caller: &Caller, from: (Node, &OsStr), to: (Node, &OsStr), flags: u32) -> Result<()> {
        self.refuse_routed(from.0, from.1, Errno::BUSY)?;
        self.refuse_routed(to.0, to.1, Errno::BUSY)?;
        let (number, tree, inner_from, inner_to) = self.together(from.0, to.0)?;
        if flags & libc::RENAME_EXCHANGE == 0 {
            // A directory with a mount point below may move, and it moves along; it may not be replaced.
            self.refuse_ancestor(caller, (number, tree, inner_to), to.1, Errno::NOTEMPTY)?;
        }
        tree.rename(caller, (inner_from, from.1), (inner_to, to.1), flags)
    }

    fn write(
        &self,
        writer: &Writer,
        node: Node,
        handle: Handle,
        offset: u64,
        data: &[u8],
        flags: i32,
    ) -> Result<usize> {
        let (_, tree, inner) = self.real(node)?;
        tree.write(writer, inner, handle, offset, data, flags)
    }

    fn fallocate(
        &self,
        writer: &Writer,
        node: Node,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<()> {
        let (_, tree, inner) = self.real(node)?;
        tree.fallocate(writer, inner, handle, offset, length, mode)
    }

    fn copy_file_range(
        &self,
        writer: &Writer,
        from: (Node, Handle, u64),
        to: (Node, Handle, u64),
        length: u64,
    ) -> Result<usize> {
        // The caller's kernel copies by itself on EXDEV.
        let (_, tree, inner_from, inner_to) = self.together(from.0, to.0)?;
        tree.copy_file_range(writer, (inner_from, from.1, from.2), (inner_to, to.1, to.2), length)
    }

    fn lost_set_id(&self, node: Node) -> bool {
        self.real(node).is_ok_and(|(_, tree, inner)| tree.lost_set_id(inner))
    }

    fn setxattr(&self, caller: &Caller, node: Node, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        let (_, tree, inner) = self.real(node)?;
        tree.setxattr(caller, inner, name, value, flags)
    }

    fn removexattr(&self, caller: &Caller, node: Node, name: &OsStr) -> Result<()> {
        let (_, tree, inner) = self.real(node)?;
        tree.removexattr(caller, inner, name)
    }
}

impl RouteTree {
    /// The number of an entry as it is shown; a volume's `..` is the directory it is mounted in, which stat(2) tells by itself.
    fn number_out(&self, number: u64, node: Node, item: &DirItem<'_>) -> Node {
        if item.name == ".." && item.node == ROOT && node & (NODE_LIMIT - 1) == ROOT {
            return self.parent_of(node);
        }
        tag(number, item.node)
    }

    fn parent_of(&self, volume: Node) -> Node {
        self.routed
            .iter()
            .find(|(_, routed)| routed.names.values().any(|r| r.node() == volume))
            .map_or(volume, |(&parent, _)| parent)
    }

    /// Refuse what would take away a directory that leads to a mount point.
    fn refuse_ancestor(
        &self,
        caller: &Caller,
        (number, tree, parent): Place<'_>,
        name: &OsStr,
        errno: Errno,
    ) -> Result<()> {
        if !self.ancestors.iter().any(|&node| node >> TREE_SHIFT == number && node != tag(number, ROOT)) {
            return Ok(()); // no volume inside this one
        }
        if let Lookup::Found(entry) = tree.lookup(caller, parent, name)? {
            tree.forget(entry.attr.node, 1);
            if self.ancestors.contains(&tag(number, entry.attr.node)) {
                return Err(errno);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
