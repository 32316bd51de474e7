//! Listing a directory that has routed names: they stand in the place of its own tree's, and those that it lacks come last.

use std::ffi::OsStr;

use super::{DIRECTORY, RouteTree, Routed, TYPE_BITS, tag};
use crate::tree::{Caller, DirItem, Fit, Handle, ListMode, Lookup, NODE_LIMIT, Node, ROOT, Result};

/// Cookies of entries that the tree below does not have, from here on. File systems count up from 0 or hash into 63 bits; ext4
/// ends at 2^63-1 (ext4_get_htree_eof), which is above.
const EXTRA_COOKIE: u64 = (1 << 63) - (1 << 16);

impl RouteTree {
    pub(super) fn list(
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
}
