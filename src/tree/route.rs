//! The route table: volumes over an image, as one tree. It alone knows that there are several.
//!
//! Each target is resolved once, when the table is built, through the tree interface and inside the root: symlinks of the image
//! are followed, absolute ones from the root, `..` never above it. Directories that are missing on the way are made up. After
//! that, a name belongs to another tree exactly where (directory, name) is in the table; all else goes straight through.
//!
//! ```text
//! node id:  bits 56..64  the tree: 0 the image, 1.. the volumes, 255 what was made up
//!           bits  0..56  the node in that tree
//! ```
//!
//! The table is built once and never changes, so requests take no lock here. The nodes it names are looked up once and never
//! forgotten, so they stay known to their trees.

mod build;
mod list;
mod made;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::Duration;

use super::{
    Attr, Caching, Caller, Change, DIRECTORY, DirItem, Entry, Errno, FOREVER, Fit, Handle, ListMode, Lookup,
    NODE_LIMIT, New, Node, Opened, ROOT, Result, Statfs, TYPE_BITS, Tree, Writer, access_read_only,
};
pub use build::target_attr;
use made::MadeUp;

/// Where the tree's number lies in a node id.
const TREE_SHIFT: u32 = 56;
/// The number of what was made up.
const MADE_UP: u64 = 255;

/// A tree's number, the tree, and a node in it.
type TreeNode<'a> = (u64, &'a Arc<dyn Tree>, Node);

/// Why a name is routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// A volume's root: a mount point.
    Volume(Node),
    /// Made up: on the way to one, or for others to mount on.
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

impl RouteTree {
    /// True where a volume may be written: else the file system may be mounted `ro`.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    fn route(&self, parent: Node, name: &OsStr) -> Option<Route> {
        // Most tables have a handful of directories with routed names: for all others this is one failed probe.
        self.routed.get(&parent)?.names.get(name).copied()
    }

    /// The tree that a node belongs to, and the node there. None: it was made up.
    fn tree(&self, node: Node) -> Result<Option<TreeNode<'_>>> {
        match node >> TREE_SHIFT {
            MADE_UP => Ok(None),
            number => {
                let tree = self.trees.get(number as usize).ok_or(Errno::STALE)?;
                Ok(Some((number, tree, node & (NODE_LIMIT - 1))))
            }
        }
    }

    /// The same for what nothing that was made up does.
    fn real(&self, node: Node) -> Result<TreeNode<'_>> {
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
        let is_read_only = match parent >> TREE_SHIFT {
            0 => !self.trees[0].takes_names(),
            number => number == MADE_UP,
        };
        Err(if errno == Errno::BUSY && is_read_only { Errno::ROFS } else { errno })
    }

    /// Both in one tree, or EXDEV.
    fn together(&self, a: Node, b: Node) -> Result<(u64, &Arc<dyn Tree>, Node, Node)> {
        if a >> TREE_SHIFT != b >> TREE_SHIFT {
            return Err(Errno::XDEV);
        }
        let (number, tree, a) = self.real(a)?;
        Ok((number, tree, a, b & (NODE_LIMIT - 1)))
    }

    /// Refuse what would take away a directory that leads to a mount point.
    fn refuse_ancestor(
        &self,
        caller: &Caller,
        (number, tree, parent): TreeNode<'_>,
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
        let Some((_, tree, inner)) = self.tree(node)? else {
            out(self.made(node)?.readlink()?.as_bytes());
            return Ok(());
        };
        tree.readlink(inner, out)
    }

    fn open(&self, caller: &Caller, node: Node, flags: i32) -> Result<Opened> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.open(caller, inner, flags),
            None => self.made(node)?.open(flags),
        }
    }

    fn open_giving(&self, caller: &Caller, node: Node, flags: i32, give: &mut dyn FnMut(&[u8])) -> Result<Opened> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.open_giving(caller, inner, flags, give),
            None => self.made(node)?.open(flags),
        }
    }

    fn read(&self, node: Node, handle: Handle, offset: u64, size: u32, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let Some((_, tree, inner)) = self.tree(node)? else {
            self.made(node)?.open(libc::O_RDONLY)?;
            out(&[]);
            return Ok(());
        };
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
        self.list(caller, node, handle, cookie, mode, out)
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
            None => access_read_only(self.made(node)?.attr.mode, mask),
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

    fn opens_directories_without_asking(&self) -> bool {
        self.trees.iter().all(|tree| tree.opens_directories_without_asking())
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
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.flush(inner, handle),
            None => Ok(()),
        }
    }

    fn release(&self, node: Node, handle: Handle) {
        if let Ok(Some((_, tree, inner))) = self.tree(node) {
            tree.release(inner, handle);
        }
    }

    fn fsync(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.fsync(inner, handle, data_only),
            None => Ok(()),
        }
    }

    fn fsyncdir(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        match self.tree(node)? {
            Some((_, tree, inner)) => tree.fsyncdir(inner, handle, data_only),
            None => Ok(()),
        }
    }

    fn lseek(&self, node: Node, handle: Handle, offset: i64, whence: i32) -> Result<i64> {
        let (_, tree, inner) = self.tree(node)?.ok_or(Errno::NXIO)?;
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

#[cfg(test)]
mod tests;
