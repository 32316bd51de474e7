//! How the route table is made: each volume's target is walked to inside the image, and what is missing on the way is made up.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use super::made::{MadeUp, SYMLINK};
use super::{DIRECTORY, MADE_UP, Route, RouteTree, TREE_SHIFT, TYPE_BITS, tag};
use crate::error::{Error, Kind};
use crate::stubs::{STUBS, Stub};
use crate::tree::{Attr, Caller, Entry, Errno, Lookup, Node, ROOT, Result, Tree};
use crate::volume::{Access, ContainerPath, Form};

/// Symlinks followed on the way to one target: the kernel's own limit (path_resolution(7)).
const MAX_SYMLINKS: u32 = 40;
/// Longest symlink target: PATH_MAX.
const MAX_LINK: usize = 4096;

/// The server itself, where no caller asks.
const SERVER: Caller = Caller { uid: 0, gid: 0, pid: 0 };

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
                Walked::Missing { parent, missing, mut path } => {
                    let (parent, last) = table.make_up_between(parent, missing, &mut path);
                    table.add(parent, last, Route::Volume(root), form == Form::Directory, &path);
                }
            }
        }
        Ok(table)
    }

    /// With the mount points that engines make, where the image has nothing there. Nothing of the image changes; what lies in a volume is
    /// its own.
    #[must_use]
    pub fn with_stubs(mut self) -> Self {
        for (path, stub) in STUBS {
            let target = ContainerPath::new(path.as_ref()).expect("a stub is at a path");
            let Ok(Walked::Missing { parent, missing, mut path }) = self.walk(&target) else { continue };
            let is_in_volume = !matches!(parent >> TREE_SHIFT, 0 | MADE_UP);
            // The image may have a link there that leads to nothing yet: to /proc/mounts.
            let is_elsewhere =
                matches!(stub, Stub::Symlink(_)) && missing.last().map(|n| &**n) != target.names().last();
            if is_in_volume || is_elsewhere {
                continue;
            }
            let (parent, last) = self.make_up_between(parent, missing, &mut path);
            let node = self.make_up(parent, stub);
            self.add(parent, last, Route::MadeUp(node), matches!(stub, Stub::Directory(_)), &path);
        }
        self
    }

    /// Make up the directories down to the last name of `missing`. Gives the directory that it is to be in, and the name.
    fn make_up_between(
        &mut self,
        mut parent: Node,
        mut missing: Vec<OsString>,
        path: &mut Vec<Node>,
    ) -> (Node, OsString) {
        let last = missing.pop().expect("a missing path has a name");
        for name in missing {
            let node = self.make_up(parent, Stub::Directory(0o755));
            self.add(parent, name, Route::MadeUp(node), true, path);
            parent = node;
            path.push(node);
        }
        (parent, last)
    }

    fn add(&mut self, parent: Node, name: OsString, route: Route, adds_directory: bool, path: &[Node]) {
        let routed = self.routed.entry(parent).or_default();
        routed.added_directories += u32::from(adds_directory);
        routed.names.insert(name, route);
        self.ancestors.extend(path);
    }

    fn make_up(&mut self, parent: Node, stub: Stub) -> Node {
        let root = self.trees[0].getattr(ROOT, None).map(|(attr, _)| attr).ok();
        let made = MadeUp::new(self.made_up.len(), parent, root, stub);
        let node = made.attr.node;
        self.made_up.push(made);
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
}
