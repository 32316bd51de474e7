//! The node table: which file a node id stands for, by what names it is reached, and how often the kernel holds it.
//!
//! A node id is made of the device and the inode number alone, so it is the same after a forget, a restart or another
//! mount, and a directory's entries carry it without a lookup:
//!
//! ```text
//! bits 48..56   device: 0 for the root's, else its place in the list of devices met
//! bits  0..48   inode number, or a 48-bit hash of one that is larger (overlayfs puts the layer in the high bits)
//! ```
//!
//! Guards of the map are never held across a system call that could wait: what such a call needs is copied out first. What
//! the next process must know is written to the log under the guard ([`super::handover`]), in the order in which it happened.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as MapEntry;

use super::Known;
use super::fds::Held;
use super::found::{Alias, DIRECTORY, Found, Identity, mix};
use super::handover::{HandoverLog, Inherited};
use crate::sys::raw;
use crate::tree::{Errno, Handle, Node, ROOT, Result, Timespec};

/// Most nodes a tree remembers. The kernel gives them back when it needs memory (FORGET); one costs about 200 bytes, so this
/// is 1.6 GiB, more than the dentries and inodes of as many files cost the kernel itself.
const MAX_NODES: usize = 8 << 20;
/// Names remembered of one file with several hard links. Any one of them is enough to reach it.
const MAX_ALIASES: usize = 8;
/// Devices told apart below one root: the number has eight bits.
const MAX_DEVICES: usize = 256;
/// With fewer nodes than this at its fullest the table keeps its memory. Not more: the last nodes that live when memory is given
/// back may each hold pages of its own, which stay when they go.
const SMALL: usize = 128;
/// Bits of the inode number in a node id.
const INO_BITS: u32 = 48;
const INO_MASK: u64 = (1 << INO_BITS) - 1;

/// Modification time, change time and size, as they were when the kernel's cache of the content was last known to be right.
pub(super) type Stamp = (Timespec, Timespec, u64);

/// What few nodes have.
#[derive(Debug, Default)]
struct Extra {
    /// Holds a file that lost its last name here, until the kernel forgets it.
    pin: Option<Arc<Held>>,
    handles: Vec<Handle>,
    stamp: Option<Stamp>,
}

#[derive(Debug)]
struct State {
    identity: Identity,
    kind: u32,
    /// The kernel was shown setuid or setgid of it, perhaps by an earlier process.
    shows_set_id: bool,
    references: u64,
    aliases: Vec<Alias>,
    extra: Option<Box<Extra>>,
}

/// What is needed to reach a node, copied out of the table.
#[derive(Debug)]
pub(super) struct Reach {
    pub(super) identity: Identity,
    pub(super) kind: u32,
    pub(super) aliases: Vec<Alias>,
    pub(super) pin: Option<Arc<Held>>,
    pub(super) handles: Vec<Handle>,
}

#[derive(Debug)]
pub(super) struct NodeTable {
    root: Identity,
    devices: RwLock<Vec<u64>>,
    map: DashMap<Node, State>,
    most: usize,
    /// Nodes in the map: counting them there would look into every shard.
    count: AtomicUsize,
    /// Most there were since memory was last given back.
    peak: AtomicUsize,
    handover: Option<Arc<HandoverLog>>,
}

/// [`MAX_NODES`], or fewer, for tests alone and not in the help.
fn most_nodes(text: Option<&str>) -> usize {
    text.and_then(|text| text.parse().ok()).map_or(MAX_NODES, |most: usize| most.min(MAX_NODES))
}

impl NodeTable {
    pub(super) fn new(root: &Found) -> Self {
        let table = NodeTable {
            root: root.identity,
            devices: RwLock::new(vec![root.identity.dev]),
            map: DashMap::new(),
            most: most_nodes(std::env::var("FSPROV_FUSE_MAX_NODES").ok().as_deref()),
            count: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            handover: None,
        };
        // The kernel's reference to the root is not counted: it has no lookup and gets no forget.
        table.map.insert(ROOT, State::new(root.identity, root.kind(), Vec::new()));
        table.one_more();
        table
    }

    /// A table that goes on with what an earlier process left, and writes down what the next one needs.
    pub(super) fn inherit(root: &Found, inherited: &Inherited, handover: Arc<HandoverLog>) -> Self {
        let mut table = Self::new(root);
        table.devices.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).extend(&inherited.devices);
        for note in inherited.nodes.values() {
            // How many references the kernel holds is not written down. It gives all of them back at once when it evicts an
            // inode, and that is at least one.
            let state = State::new(note.identity, note.kind, note.aliases.clone());
            table.map.insert(note.node, State { shows_set_id: true, ..state });
            table.one_more();
        }
        if let Some(mut root) = table.map.get_mut(&ROOT) {
            root.shows_set_id = !inherited.nodes.is_empty() || !inherited.handles.is_empty();
        }
        table.handover = Some(handover);
        table
    }

    /// Hold a nameless file by a descriptor that was kept elsewhere.
    pub(super) fn pin(&self, node: Node, pin: Held) {
        if let Some(mut state) = self.map.get_mut(&node) {
            state.extra().pin = Some(Arc::new(pin));
        }
    }

    fn write_down(&self, node: Node, state: &State) {
        if let Some(handover) = &self.handover {
            handover.node(node, state.identity, state.kind, &state.aliases);
        }
    }

    /// Shorten the log if it is mostly old records. Takes as long as there are nodes, and no guard for longer than one.
    pub(super) fn tidy(&self) {
        let Some(copying) = self.handover.as_deref().and_then(HandoverLog::start_copying) else { return };
        for state in self.map.iter().filter(|s| *s.key() != ROOT) {
            copying.node(*state.key(), state.identity, state.kind, &state.aliases);
        }
        copying.finish();
    }

    /// Every node but the root.
    pub(super) fn all(&self) -> Vec<Known> {
        let others = self.map.iter().filter(|state| *state.key() != ROOT);
        let known = others.map(|state| Known {
            node: *state.key(),
            kind: state.kind,
            name: state.aliases.first().map(|alias| (alias.parent, alias.name.clone())),
        });
        known.collect()
    }

    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    fn one_more(&self) {
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        if count > self.peak.load(Ordering::Relaxed) {
            self.peak.fetch_max(count, Ordering::Relaxed);
        }
    }

    /// Give memory back once most of many nodes are gone: neither the map nor the allocator does so by itself. For each time it
    /// happens at least seven eighths of the nodes were forgotten, so it costs them next to nothing. No guard may be held.
    fn one_less(&self) {
        let count = self.count.fetch_sub(1, Ordering::Relaxed) - 1;
        let peak = self.peak.load(Ordering::Relaxed);
        let mostly_gone = peak >= SMALL && count < peak / 8;
        if mostly_gone && self.peak.compare_exchange(peak, count, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.map.shrink_to_fit();
            raw::give_back_memory();
        }
    }

    /// The node id of a device and inode number, as a directory entry has them.
    pub(super) fn id(&self, dev: u64, ino: u64) -> Result<Node> {
        if (dev, ino) == (self.root.dev, self.root.ino) {
            return Ok(ROOT);
        }
        let device = self.device(dev)?;
        let number = if ino > INO_MASK || (device == 0 && ino <= ROOT) {
            // No node is 0, and 1 is the root.
            (mix(ino) & INO_MASK).max(ROOT + 1)
        } else {
            ino
        };
        Ok(device << INO_BITS | number)
    }

    fn device(&self, dev: u64) -> Result<u64> {
        if dev == self.root.dev {
            return Ok(0);
        }
        let find = |list: &[u64]| list.iter().position(|&d| d == dev).map(|i| i as u64);
        if let Some(index) = find(&self.devices.read().unwrap_or_else(std::sync::PoisonError::into_inner)) {
            return Ok(index);
        }
        let mut list = self.devices.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(index) = find(&list) {
            return Ok(index);
        }
        if list.len() == MAX_DEVICES {
            return Err(Errno::NFILE);
        }
        list.push(dev);
        if let Some(handover) = &self.handover {
            handover.device(dev);
        }
        Ok(list.len() as u64 - 1)
    }

    /// One reference more to the file found under this name, which becomes known if it was not.
    pub(super) fn remember(&self, found: &Found, parent: Node, name: &[u8]) -> Result<Node> {
        let identity = found.identity;
        let mut node = self.id(identity.dev, identity.ino)?;
        if node == ROOT {
            // A bind mount of the root below itself: the same node, which is never forgotten.
            return Ok(ROOT);
        }
        loop {
            let full = self.len() >= self.most;
            match self.map.entry(node) {
                MapEntry::Occupied(mut at) => {
                    let state = at.get_mut();
                    if (state.identity.dev, state.identity.ino) != (identity.dev, identity.ino) {
                        // Two large inode numbers with one hash: the next number is free, or its own.
                        node = (node & !INO_MASK) | ((node + 1) & INO_MASK).max(ROOT + 1);
                        continue;
                    }
                    let mut changed = false;
                    if state.identity.generation != identity.generation {
                        // The number was reused: no old name leads to the new file. References stay counted, the
                        // kernel gives them back by this number.
                        state.identity = identity;
                        state.aliases.clear();
                        state.extra = None;
                        changed = true;
                    }
                    changed |= state.kind != found.kind();
                    state.kind = found.kind();
                    state.references = state.references.saturating_add(1);
                    changed |= state.add_alias(parent, name);
                    if changed {
                        self.write_down(node, state);
                    }
                    return Ok(node);
                }
                MapEntry::Vacant(at) => {
                    if full {
                        return Err(Errno::NOMEM);
                    }
                    let alias = Alias { parent, name: name.into() };
                    let state = at.insert(State::new(identity, found.kind(), vec![alias]));
                    self.write_down(node, &state);
                    self.one_more();
                    return Ok(node);
                }
            }
        }
    }

    /// The kernel gives back references. True: that was the last, and the node is gone.
    pub(super) fn forget(&self, node: Node, count: u64) -> bool {
        if node == ROOT {
            return false;
        }
        let MapEntry::Occupied(mut at) = self.map.entry(node) else {
            return false;
        };
        let state = at.get_mut();
        // More than it has is taken as all of them: the count comes from outside.
        state.references = state.references.saturating_sub(count);
        if state.references > 0 {
            return false;
        }
        if let Some(handover) = &self.handover {
            handover.forget(node);
        }
        let state = at.remove();
        drop(state); // the pin, and with it its descriptor
        self.one_less();
        true
    }

    /// What is needed to reach a node. ESTALE: it is not known.
    pub(super) fn reach(&self, node: Node) -> Result<Reach> {
        let state = self.map.get(&node).ok_or(Errno::STALE)?;
        let extra = state.extra.as_deref();
        Ok(Reach {
            identity: state.identity,
            kind: state.kind,
            aliases: state.aliases.clone(),
            pin: extra.and_then(|e| e.pin.clone()),
            handles: extra.map(|e| e.handles.clone()).unwrap_or_default(),
        })
    }

    /// A handle of this node, if it has one.
    pub(super) fn a_handle(&self, node: Node) -> Option<Handle> {
        self.map.get(&node)?.extra.as_deref()?.handles.last().copied()
    }

    /// The handles of this node.
    pub(super) fn handles(&self, node: Node) -> Vec<Handle> {
        let state = self.map.get(&node);
        state.and_then(|s| s.extra.as_deref().map(|e| e.handles.clone())).unwrap_or_default()
    }

    /// The type of a known node.
    pub(super) fn kind(&self, node: Node) -> Option<u32> {
        self.map.get(&node).map(|s| s.kind)
    }

    /// The node that this file is known as, if it is.
    pub(super) fn known(&self, found: &Found) -> Option<Node> {
        self.known_by(found.identity)
    }

    /// The node that the file of this identity is known as, if it is.
    pub(super) fn known_by(&self, identity: Identity) -> Option<Node> {
        let node = self.id(identity.dev, identity.ino).ok()?;
        self.map.get(&node).filter(|s| s.identity == identity).map(|_| node)
    }

    /// True where `parent`/`name` is the only name known of the node.
    pub(super) fn is_last_name(&self, node: Node, parent: Node, name: &[u8]) -> bool {
        self.map.get(&node).is_some_and(|s| s.aliases.iter().all(|a| a.parent == parent && *a.name == *name))
    }

    /// A name is gone; `pin` holds the file if that was the last one.
    pub(super) fn remove_name(&self, node: Node, parent: Node, name: &[u8], pin: Option<Arc<Held>>) {
        if let Some(mut state) = self.map.get_mut(&node) {
            state.aliases.retain(|a| a.parent != parent || *a.name != *name);
            if pin.is_some() {
                state.extra().pin = pin;
            }
            self.write_down(node, &state);
        }
    }

    /// A name is there now.
    pub(super) fn add_name(&self, node: Node, parent: Node, name: &[u8]) {
        if let Some(mut state) = self.map.get_mut(&node)
            && state.add_alias(parent, name)
        {
            self.write_down(node, &state);
        }
    }

    pub(super) fn add_handle(&self, node: Node, handle: Handle) {
        if let Some(mut state) = self.map.get_mut(&node) {
            state.extra().handles.push(handle);
        }
    }

    pub(super) fn remove_handle(&self, node: Node, handle: Handle) {
        if let Some(mut state) = self.map.get_mut(&node)
            && let Some(extra) = state.extra.as_deref_mut()
        {
            extra.handles.retain(|&h| h != handle);
        }
    }

    /// The kernel is shown setuid or setgid of this node.
    pub(super) fn show_set_id(&self, node: Node) {
        if let Some(mut state) = self.map.get_mut(&node) {
            state.shows_set_id = true;
        }
    }

    /// Was the kernel shown setuid or setgid of this node, since this was last asked?
    pub(super) fn take_shown_set_id(&self, node: Node) -> bool {
        let shown = self.map.get(&node).is_some_and(|state| state.shows_set_id);
        if shown && let Some(mut state) = self.map.get_mut(&node) {
            state.shows_set_id = false;
        }
        shown
    }

    /// Put a new stamp in place; gives the one before.
    pub(super) fn swap_stamp(&self, node: Node, stamp: Option<Stamp>) -> Option<Stamp> {
        let mut state = self.map.get_mut(&node)?;
        if stamp.is_none() && state.extra.is_none() {
            return None;
        }
        std::mem::replace(&mut state.extra().stamp, stamp)
    }
}

impl State {
    /// With one reference.
    fn new(identity: Identity, kind: u32, aliases: Vec<Alias>) -> Self {
        State { identity, kind, shows_set_id: false, references: 1, aliases, extra: None }
    }

    fn extra(&mut self) -> &mut Extra {
        self.extra.get_or_insert_default()
    }

    /// False: it was known already.
    fn add_alias(&mut self, parent: Node, name: &[u8]) -> bool {
        if let Some(at) = self.aliases.iter().position(|a| a.parent == parent && *a.name == *name) {
            // The freshest name is tried first.
            self.aliases.swap(0, at);
            return false;
        }
        let alias = Alias { parent, name: name.into() };
        if self.kind == DIRECTORY {
            // A directory has one name; an older one is where it was before it was moved.
            self.aliases.clear();
        } else if self.aliases.len() == MAX_ALIASES {
            self.aliases.pop();
        }
        self.aliases.insert(0, alias);
        if let Some(extra) = &mut self.extra {
            // It has a name again (a link to an unlinked open file's descriptor, or a rename back).
            extra.pin = None;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Attr;

    fn found(dev: u64, ino: u64, generation: u32) -> Found {
        let time = Timespec::default();
        Found {
            identity: Identity { dev, ino, generation },
            mount: 0,
            attr: Attr {
                node: 0,
                mode: 0o100_644,
                nlink: 1,
                uid: 0,
                gid: 0,
                rdev: 0,
                size: 0,
                blocks: 0,
                blksize: 0,
                atime: time,
                mtime: time,
                ctime: time,
            },
        }
    }

    #[test]
    fn ids_come_from_device_and_inode_alone() {
        let table = NodeTable::new(&found(7, 2, 0));
        for (dev, ino, want) in [
            (7, 2, ROOT),
            (7, 3, 3),
            (7, INO_MASK, INO_MASK),
            (8, 2, 1 << 48 | 2),
            (8, 1, 1 << 48 | 1),
            (9, 5, 2 << 48 | 5),
            (8, 3, 1 << 48 | 3),
        ] {
            assert_eq!(table.id(dev, ino), Ok(want), "{dev} {ino}");
        }
        let large = table.id(7, 1 << 60 | 5).unwrap();
        assert!(large > ROOT && large <= INO_MASK, "{large:x}");
        let one = table.id(7, 1).unwrap();
        assert!(one > ROOT, "inode 1 is not the root here");
    }

    #[test]
    fn memory_is_given_back_when_most_nodes_are_gone() {
        let table = NodeTable::new(&found(7, 2, 0));
        let many = 64 * SMALL as u64;
        for ino in 10..10 + many {
            table.remember(&found(7, ino, 1), ROOT, b"x").unwrap();
        }
        let (full, keeps) = (table.map.capacity(), many / 8);
        for ino in 10..10 + many - keeps {
            table.forget(ino, 1);
        }
        assert_eq!((table.len() as u64, table.map.len()), (1 + keeps, table.len()));
        assert!(table.map.capacity() > full / 2, "not yet an eighth");
        for ino in 10 + many - keeps..10 + many {
            assert_eq!(table.kind(ino), Some(found(7, ino, 1).kind()));
            table.forget(ino, 1);
        }
        assert_eq!((table.len(), table.map.len()), (1, 1));
        assert!(table.map.capacity() < full / 4, "{} of {full}", table.map.capacity());
    }

    #[test]
    fn references_never_underflow_and_the_last_one_frees() {
        let table = NodeTable::new(&found(7, 2, 0));
        let node = table.remember(&found(7, 3, 1), ROOT, b"a").unwrap();
        assert_eq!(table.remember(&found(7, 3, 1), ROOT, b"b").unwrap(), node);
        assert!(!table.forget(node, 1));
        assert_eq!(table.reach(node).unwrap().aliases.len(), 2);
        assert!(table.forget(node, 1000));
        assert!(!table.forget(node, 1));
        assert_eq!(table.reach(node).map(|_| ()), Err(Errno::STALE));
        assert!(!table.forget(ROOT, u64::MAX));
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_reused_number_is_another_file_with_the_old_references() {
        let table = NodeTable::new(&found(7, 2, 0));
        let node = table.remember(&found(7, 3, 1), ROOT, b"old").unwrap();
        assert_eq!(table.remember(&found(7, 3, 2), ROOT, b"new").unwrap(), node);
        let reach = table.reach(node).unwrap();
        assert_eq!((reach.identity.generation, reach.aliases.len()), (2, 1));
        assert_eq!(*reach.aliases[0].name, *b"new");
        assert!(!table.forget(node, 1));
        assert!(table.forget(node, 1));
    }

    #[test]
    fn too_many_nodes_are_refused_until_some_are_forgotten() {
        let mut table = NodeTable::new(&found(7, 2, 0));
        table.most = 3;
        let node = table.remember(&found(7, 3, 1), ROOT, b"a").unwrap();
        table.remember(&found(7, 4, 1), ROOT, b"b").unwrap();
        assert_eq!(table.remember(&found(7, 5, 1), ROOT, b"c"), Err(Errno::NOMEM));
        // What is known already, and the root, need no room.
        assert_eq!(table.remember(&found(7, 3, 1), ROOT, b"again"), Ok(node));
        assert_eq!(table.remember(&found(7, 2, 0), ROOT, b"root"), Ok(ROOT));
        assert!(table.forget(node, 2));
        assert!(table.remember(&found(7, 5, 1), ROOT, b"c").is_ok());
    }

    #[test]
    fn numbers_with_one_hash_get_two_nodes() {
        let table = NodeTable::new(&found(7, 2, 0));
        let large = found(7, 1 << 60, 1);
        let taken = table.id(7, 1 << 60).unwrap();
        let small = table.remember(&found(7, taken, 1), ROOT, b"small").unwrap();
        assert_eq!(small, taken);
        let other = table.remember(&large, ROOT, b"large").unwrap();
        assert_ne!(other, small);
        assert_eq!(table.reach(other).unwrap().identity.ino, 1 << 60);
    }

    #[test]
    fn aliases_are_bounded_and_the_freshest_comes_first() {
        let table = NodeTable::new(&found(7, 2, 0));
        let file = found(7, 3, 1);
        let mut node = 0;
        for i in 0..20 {
            node = table.remember(&file, ROOT, format!("n{i}").as_bytes()).unwrap();
        }
        let aliases = table.reach(node).unwrap().aliases;
        assert_eq!(aliases.len(), MAX_ALIASES);
        assert_eq!(*aliases[0].name, *b"n19");
    }
}
