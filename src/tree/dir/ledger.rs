//! The ledger: what the next server of a mount must know of this one's nodes and open files, kept where it outlives the process.
//!
//! Whoever holds the FUSE connection also holds the ledger: a memory file and a socket pair, made by [`Ledger::make`] and given
//! to each server in turn. Writing it down costs a copy into mapped memory, no system call. A server that is killed leaves
//! whole records: a record counts from the moment the length that includes it is stored.
//!
//! ```text
//! page 0      magic, version, which log is in force, the lengths of both
//! handles     a slot for each open file: node, tree and flags
//! counts      a slot for each node: the references that the kernel holds
//! log 0, 1    records: a node has a name, has lost it, is forgotten, a device was met. One is in force; a full one is written
//!             again without what is no more, into the other
//! ```
//!
//! Descriptors that no name leads to (a file unlinked while it is open), or that could not be opened again (for writing, mode
//! 0444), are sent into the socket pair and stay in its queue: the kernel keeps what is in flight (unix(7), SCM_RIGHTS).
//!
//! Lock order: a guard of the node table, then the ledger's lock. The ledger never touches a node table.

use std::collections::{HashMap, HashSet};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, compiler_fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, fallocate, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::found::Identity;
use super::nodes::Alias;
use crate::sys::raw;
use crate::tree::{Errno, Handle, Node, Result};

const TARGET: &str = "fsprov::tree::ledger";
const MAGIC: u64 = u64::from_le_bytes(*b"fsprovLG");
const VERSION: u64 = 1;

/// Where the handle slots begin: after one page.
const HANDLES_AT: usize = 4096;
/// Open files at once that survive: as many descriptors as a process usually may have at most (fs.nr_open is 2^20).
const HANDLE_SLOTS: usize = 1 << 19;
const SLOT_BYTES: usize = 16;
const COUNTS_AT: usize = HANDLES_AT + HANDLE_SLOTS * SLOT_BYTES;
/// Nodes whose references are known exactly: as many as a tree may have (`MAX_NODES`).
const COUNT_SLOTS: u32 = 8 << 20;
const LOGS_AT: usize = COUNTS_AT + COUNT_SLOTS as usize * 4;
/// Where page 0 has the lengths of the logs, and how many handle and count slots were ever used.
const LENGTHS_WORD: usize = 24;
const HANDLES_WORD: usize = 40;
const COUNTS_WORD: usize = 48;
/// Room of one log: 8 million nodes (`MAX_NODES`) with names of a hundred bytes. Only what is written takes memory.
const LOG_BYTES: usize = 1 << 30;
const FILE_BYTES: usize = LOGS_AT + 2 * LOG_BYTES;
/// A log is written again when it is this long and at least half of it is about what is no more.
const COMPACT_FROM: usize = 4 << 20;
/// Descriptors kept in flight: what fits the socket's buffer (net.core.wmem_default, 212,992 bytes, about 800 each).
const MAX_KEPT: usize = 200;

const NAMED: u8 = 1;
const UNNAMED: u8 = 2;
const FORGOTTEN: u8 = 3;
const DEVICE: u8 = 4;

/// Length (2), kind (1), tree (1), count slot (4), node (8).
const HEAD: usize = 16;
/// Parent (8), device (8), inode (8), generation (4), type (4).
const NAMED_HEAD: usize = HEAD + 32;

/// What the holder of a mount keeps for its servers.
#[derive(Debug)]
pub struct Kept {
    /// The memory file.
    pub memory: OwnedFd,
    /// Both ends of the socket pair.
    pub sockets: (OwnedFd, OwnedFd),
}

/// A node as the ledger has it.
#[derive(Clone, Debug)]
pub(super) struct OldNode {
    pub(super) identity: Identity,
    pub(super) kind: u32,
    pub(super) aliases: Vec<Alias>,
    pub(super) count: CountSlot,
    pub(super) references: u64,
}

/// Where the references of a node are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CountSlot(u32);

impl CountSlot {
    /// Nowhere: there is no ledger, or no slot is left.
    pub(super) const NONE: CountSlot = CountSlot(u32::MAX);
}

/// What an earlier server left for one tree.
#[derive(Debug, Default)]
pub(super) struct Inheritance {
    pub(super) nodes: HashMap<Node, OldNode>,
    pub(super) devices: Vec<u64>,
    pub(super) handles: Vec<(Handle, Node)>,
    pub(super) pins: HashMap<Node, OwnedFd>,
}

/// An open file as the ledger has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OldHandle {
    pub(super) node: Node,
    pub(super) flags: OFlags,
    pub(super) directory: bool,
}

/// What a descriptor in flight is kept for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Keep {
    /// A node that has no name.
    Node(u32, Node),
    /// A handle that could not be opened again.
    Handle(Handle),
}

/// The ledger of one server.
pub struct Ledger {
    pages: Mutex<Pages>,
    flight: Mutex<Flight>,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").finish_non_exhaustive()
    }
}

struct Pages {
    map: memmap2::MmapMut,
    /// Which log is in force.
    log: usize,
    length: usize,
    /// Bytes of the log about what is no more.
    dead: usize,
    free_slots: Vec<u32>,
    next_slot: u32,
    free_counts: Vec<u32>,
    next_count: u32,
    inherited: HashMap<u32, Inheritance>,
    full: bool,
    /// A log that is not in force any more and still takes memory.
    stale: Option<usize>,
    memory: OwnedFd,
}

struct Flight {
    sockets: (OwnedFd, OwnedFd),
    kept: HashSet<Keep>,
    /// Messages in the queue, those that are not wanted any more among them.
    queued: usize,
    inherited_handles: HashMap<Handle, OwnedFd>,
}

impl Ledger {
    /// An empty ledger, for the first server of a mount.
    pub fn make() -> crate::Result<Kept> {
        let fail = |e: Errno| crate::Error::sys("make ledger", "", e);
        let memory = memfd_create("fsprov-ledger", MemfdFlags::CLOEXEC).map_err(fail)?;
        rustix::fs::ftruncate(&memory, FILE_BYTES as u64).map_err(fail)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let sockets = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(fail)?;
        Ok(Kept { memory, sockets })
    }

    /// Take over a ledger: empty, or as an earlier server left it. That server must be gone.
    ///
    /// # Errors
    /// It is none of ours, or of another version.
    pub fn take_over(kept: Kept) -> crate::Result<Arc<Self>> {
        const OP: &str = "take over ledger";
        let size = rustix::fs::fstat(&kept.memory).map_err(|e| crate::Error::sys(OP, "", e))?.st_size;
        if size != FILE_BYTES as i64 {
            return Err(crate::Error::new(crate::Kind::Invalid, OP, "", "it has another size than this version's"));
        }
        // Its only other user, the server before, is gone.
        let map = raw::map_shared(&kept.memory, FILE_BYTES).map_err(|e| crate::Error::io(OP, "", e))?;
        let mut pages = Pages {
            map,
            log: 0,
            length: 0,
            dead: 0,
            free_slots: Vec::new(),
            next_slot: 0,
            free_counts: Vec::new(),
            next_count: 0,
            inherited: HashMap::new(),
            full: false,
            stale: None,
            memory: kept.memory,
        };
        match (pages.word(0), pages.word(8)) {
            (0, 0) => {
                pages.set_word(8, VERSION);
                pages.set_word(0, MAGIC);
            }
            (MAGIC, VERSION) => pages.read_back(),
            _ => return Err(crate::Error::new(crate::Kind::Invalid, OP, "", "it is of another version")),
        }
        let mut flight =
            Flight { sockets: kept.sockets, kept: HashSet::new(), queued: 0, inherited_handles: HashMap::new() };
        flight.read_back(&mut pages);
        Ok(Arc::new(Ledger { pages: Mutex::new(pages), flight: Mutex::new(flight) }))
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flight(&self) -> MutexGuard<'_, Flight> {
        self.flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an earlier server left for this tree: once.
    pub(super) fn inheritance(&self, tree: u32) -> Inheritance {
        self.pages().inherited.remove(&tree).unwrap_or_default()
    }

    /// Count one reference to a new node.
    pub(super) fn new_count(&self) -> CountSlot {
        let mut pages = self.pages();
        let slot = match pages.free_counts.pop() {
            Some(slot) => slot,
            None if pages.next_count < COUNT_SLOTS => {
                pages.next_count += 1;
                let used = u64::from(pages.next_count);
                pages.set_word(COUNTS_WORD, used);
                pages.next_count - 1
            }
            None => return CountSlot::NONE,
        };
        pages.set_count(CountSlot(slot), 1);
        CountSlot(slot)
    }

    pub(super) fn set_count(&self, slot: CountSlot, references: u64) {
        self.pages().set_count(slot, references);
    }

    pub(super) fn named(&self, tree: u32, node: Node, known: &OldNode, parent: Node, name: &[u8]) {
        self.pages().append_name(tree, node, known, parent, name);
    }

    pub(super) fn unnamed(&self, tree: u32, node: Node, parent: Node, name: &[u8]) {
        let mut pages = self.pages();
        // It and the record it undoes.
        pages.dead += 2 * padded(HEAD + 8 + name.len());
        pages.append(UNNAMED, tree, CountSlot::NONE, node, &[&parent.to_ne_bytes(), name]);
    }

    pub(super) fn forgotten(&self, tree: u32, node: Node, count: CountSlot) {
        let mut pages = self.pages();
        // It and about what named the node.
        pages.dead += HEAD + padded(NAMED_HEAD + 16);
        pages.append(FORGOTTEN, tree, CountSlot::NONE, node, &[]);
        if count != CountSlot::NONE {
            pages.free_counts.push(count.0);
        }
    }

    pub(super) fn device(&self, tree: u32, index: u64, dev: u64) {
        self.pages().append(DEVICE, tree, CountSlot::NONE, index, &[&dev.to_ne_bytes()]);
    }

    /// A number for an open file.
    pub(super) fn open_handle(&self, tree: u32, open: OldHandle) -> Result<Handle> {
        let mut pages = self.pages();
        pages.give_back();
        let slot = match pages.free_slots.pop() {
            Some(slot) => slot,
            None if (pages.next_slot as usize) < HANDLE_SLOTS => {
                pages.next_slot += 1;
                pages.next_slot - 1
            }
            None => return Err(Errno::NFILE),
        };
        pages.write_slot(slot, tree, Some(open));
        Ok(Handle::from(slot) + 1)
    }

    pub(super) fn close_handle(&self, handle: Handle) {
        {
            let mut pages = self.pages();
            let Some(slot) = slot_of(handle) else { return };
            if pages.read_slot(slot).is_none() {
                return;
            }
            pages.write_slot(slot, 0, None);
            pages.free_slots.push(slot);
        }
        self.release_fd(Keep::Handle(handle));
    }

    /// An open file of this tree that an earlier server opened.
    pub(super) fn old_handle(&self, tree: u32, handle: Handle) -> Option<OldHandle> {
        let (owner, open) = self.pages().read_slot(slot_of(handle)?)?;
        (owner == tree).then_some(open)
    }

    /// The descriptor that was kept for a handle.
    pub(super) fn old_descriptor(&self, handle: Handle) -> Option<OwnedFd> {
        self.flight().inherited_handles.remove(&handle)
    }

    /// Keep a descriptor for the next server. Where that is not possible, that file alone will not survive.
    pub(super) fn keep_fd(&self, keep: Keep, fd: impl AsFd) {
        let mut flight = self.flight();
        if flight.kept.contains(&keep) {
            return;
        }
        if flight.kept.len() >= MAX_KEPT {
            log::debug!(target: TARGET, "{keep:?}: {MAX_KEPT} descriptors are kept already");
            return;
        }
        match flight.send(keep, fd) {
            Ok(()) => {
                flight.kept.insert(keep);
            }
            Err(e) => log::debug!(target: TARGET, "keep {keep:?}: {e}"),
        }
    }

    /// A descriptor need not be kept any longer. It leaves the queue when enough others do.
    pub(super) fn release_fd(&self, keep: Keep) {
        let mut flight = self.flight();
        if flight.kept.remove(&keep) && flight.queued > 2 * flight.kept.len() + 16 {
            flight.rotate();
        }
    }
}

fn slot_of(handle: Handle) -> Option<u32> {
    u32::try_from(handle.checked_sub(1)?).ok().filter(|&s| (s as usize) < HANDLE_SLOTS)
}

fn padded(length: usize) -> usize {
    length.next_multiple_of(8)
}

impl Pages {
    fn word(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.map[at..at + 8].try_into().expect("eight bytes"))
    }

    fn set_word(&mut self, at: usize, value: u64) {
        // What was written before stands before this does: a killed process stops between two stores, and the compiler may
        // not exchange them.
        compiler_fence(Ordering::SeqCst);
        self.map[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        compiler_fence(Ordering::SeqCst);
    }

    fn start(log: usize) -> usize {
        LOGS_AT + log * LOG_BYTES
    }

    fn append(&mut self, kind: u8, tree: u32, count: CountSlot, node: Node, parts: &[&[u8]]) {
        let bytes: usize = HEAD + parts.iter().map(|p| p.len()).sum::<usize>();
        if self.full {
            return;
        }
        if self.length + padded(bytes) > LOG_BYTES || (self.length > COMPACT_FROM && self.dead > self.length / 2) {
            self.compact();
            if self.length + padded(bytes) > LOG_BYTES {
                self.full = true;
                log::error!(target: TARGET, "the ledger is full: a crash of the server would not go unnoticed");
                return;
            }
        }
        let at = Self::start(self.log) + self.length;
        self.map[at..at + 2].copy_from_slice(&(bytes as u16).to_ne_bytes());
        self.map[at + 2] = kind;
        self.map[at + 3] = tree as u8;
        self.map[at + 4..at + 8].copy_from_slice(&count.0.to_ne_bytes());
        self.map[at + 8..at + HEAD].copy_from_slice(&node.to_ne_bytes());
        let mut to = at + HEAD;
        for part in parts {
            self.map[to..to + part.len()].copy_from_slice(part);
            to += part.len();
        }
        self.length += padded(bytes);
        self.set_word(LENGTHS_WORD + 8 * self.log, self.length as u64);
    }

    fn append_name(&mut self, tree: u32, node: Node, known: &OldNode, parent: Node, name: &[u8]) {
        let mut body = [0_u8; NAMED_HEAD - HEAD];
        body[0..8].copy_from_slice(&parent.to_ne_bytes());
        body[8..16].copy_from_slice(&known.identity.dev.to_ne_bytes());
        body[16..24].copy_from_slice(&known.identity.ino.to_ne_bytes());
        body[24..28].copy_from_slice(&known.identity.generation.to_ne_bytes());
        body[28..32].copy_from_slice(&known.kind.to_ne_bytes());
        self.append(NAMED, tree, known.count, node, &[&body, name]);
    }

    fn set_count(&mut self, slot: CountSlot, references: u64) {
        if slot != CountSlot::NONE {
            let at = COUNTS_AT + slot.0 as usize * 4;
            self.map[at..at + 4].copy_from_slice(&u32::try_from(references).unwrap_or(u32::MAX).to_ne_bytes());
        }
    }

    /// Every record of the log in force, in order.
    fn records(&self) -> impl Iterator<Item = (u8, u32, CountSlot, Node, &[u8])> {
        let log = &self.map[Self::start(self.log)..Self::start(self.log) + self.length];
        let mut at = 0;
        std::iter::from_fn(move || {
            let head = log.get(at..at + HEAD)?;
            let bytes = usize::from(u16::from_ne_bytes([head[0], head[1]]));
            let body = log.get(at + HEAD..at + bytes.max(HEAD))?;
            at += padded(bytes.max(HEAD));
            Some((head[2], u32::from(head[3]), CountSlot(u32_at(head, 4)), u64_at(head, 8), body))
        })
    }

    fn replay(&self) -> HashMap<u32, Inheritance> {
        let mut all: HashMap<u32, Inheritance> = HashMap::new();
        for (kind, tree, count, node, body) in self.records() {
            let old = all.entry(tree).or_default();
            match kind {
                NAMED if body.len() >= NAMED_HEAD - HEAD => {
                    let identity =
                        Identity { dev: u64_at(body, 8), ino: u64_at(body, 16), generation: u32_at(body, 24) };
                    let alias = Alias { parent: u64_at(body, 0), name: body[NAMED_HEAD - HEAD..].into() };
                    let fresh = || OldNode {
                        identity,
                        kind: u32_at(body, 28),
                        aliases: Vec::new(),
                        count,
                        references: match count {
                            CountSlot(slot) if slot < COUNT_SLOTS => {
                                u64::from(u32_at(&self.map, COUNTS_AT + slot as usize * 4))
                            }
                            _ => 1,
                        },
                    };
                    let at = old.nodes.entry(node).or_insert_with(fresh);
                    if at.identity != identity {
                        *at = fresh();
                    }
                    at.aliases.retain(|a| *a != alias);
                    at.aliases.insert(0, alias);
                }
                UNNAMED if body.len() >= 8 => {
                    if let Some(at) = old.nodes.get_mut(&node) {
                        at.aliases.retain(|a| a.parent != u64_at(body, 0) || *a.name != body[8..]);
                    }
                }
                FORGOTTEN => {
                    old.nodes.remove(&node);
                }
                DEVICE if body.len() >= 8 => {
                    let index = node as usize;
                    if index < 256 {
                        old.devices.resize(old.devices.len().max(index + 1), 0);
                        old.devices[index] = u64_at(body, 0);
                    }
                }
                _ => log::error!(target: TARGET, "a record of kind {kind} is passed over"),
            }
        }
        all
    }

    fn read_back(&mut self) {
        self.log = (self.word(16) as usize).min(1);
        self.length = (self.word(LENGTHS_WORD + 8 * self.log) as usize).min(LOG_BYTES);
        self.inherited = self.replay();
        self.next_count = self.word(COUNTS_WORD).min(u64::from(COUNT_SLOTS)) as u32;
        let used: HashSet<u32> = self.inherited.values().flat_map(|t| t.nodes.values().map(|n| n.count.0)).collect();
        self.free_counts = (0..self.next_count).filter(|slot| !used.contains(slot)).collect();
        let highest = self.word(HANDLES_WORD).min(HANDLE_SLOTS as u64) as u32;
        self.next_slot = highest;
        for slot in 0..highest {
            match self.read_slot(slot) {
                Some((tree, open)) => {
                    let old = self.inherited.entry(tree).or_default();
                    old.handles.push((Handle::from(slot) + 1, open.node));
                }
                None => self.free_slots.push(slot),
            }
        }
    }

    /// Write what still holds into the other log, and put that in force.
    fn compact(&mut self) {
        let all = self.replay();
        let before = self.length;
        (self.log, self.length, self.dead) = (1 - self.log, 0, 0);
        self.set_word(LENGTHS_WORD + 8 * self.log, 0);
        for (tree, old) in all {
            for (index, dev) in old.devices.iter().enumerate() {
                self.append(DEVICE, tree, CountSlot::NONE, index as u64, &[&dev.to_ne_bytes()]);
            }
            for (node, old) in old.nodes {
                // The first is the freshest, which the replay puts first again if it comes last.
                for alias in old.aliases.iter().rev() {
                    self.append_name(tree, node, &old, alias.parent, &alias.name);
                }
                if old.aliases.is_empty() {
                    // A node without a name: named and unnamed.
                    self.append_name(tree, node, &old, 0, b"-");
                    self.append(UNNAMED, tree, CountSlot::NONE, node, &[&0_u64.to_ne_bytes(), b"-"]);
                }
            }
        }
        self.set_word(16, self.log as u64);
        self.stale = Some(1 - self.log);
        log::debug!(target: TARGET, "wrote the ledger again: {before} bytes, now {}", self.length);
    }

    /// Give back the memory of a log that was written again. A system call, so not where records are appended: those may come
    /// under a guard of a node table.
    fn give_back(&mut self) {
        if let Some(log) = self.stale.take() {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if let Err(e) = fallocate(&self.memory, flags, Self::start(log) as u64, LOG_BYTES as u64) {
                log::debug!(target: TARGET, "give back a stale log: {e}");
            }
        }
    }

    fn write_slot(&mut self, slot: u32, tree: u32, open: Option<OldHandle>) {
        let at = HANDLES_AT + slot as usize * SLOT_BYTES;
        if let Some(open) = open {
            let flags = open.flags.bits() & 0xffff | u32::from(open.directory) << 16 | tree << 24;
            self.map[at + 8..at + 12].copy_from_slice(&flags.to_ne_bytes());
        }
        // The node last: with 0 the slot is free.
        self.set_word(at, open.map_or(0, |o| o.node));
        if u64::from(slot) >= self.word(HANDLES_WORD) {
            self.set_word(HANDLES_WORD, u64::from(slot) + 1);
        }
    }

    fn read_slot(&self, slot: u32) -> Option<(u32, OldHandle)> {
        let at = HANDLES_AT + slot as usize * SLOT_BYTES;
        let node = self.word(at);
        let flags = u32_at(&self.map[at..at + SLOT_BYTES], 8);
        (node != 0).then_some((
            flags >> 24,
            OldHandle { node, flags: OFlags::from_bits_retain(flags & 0xffff), directory: flags & (1 << 16) != 0 },
        ))
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

impl Keep {
    fn encode(self) -> [u8; 16] {
        let (kind, number) = match self {
            Keep::Node(tree, node) => (1 | u64::from(tree) << 8, node),
            Keep::Handle(handle) => (2, handle),
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&kind.to_ne_bytes());
        bytes[8..].copy_from_slice(&number.to_ne_bytes());
        bytes
    }

    fn decode(bytes: &[u8; 16]) -> Option<Self> {
        let (kind, number) = (u64_at(bytes, 0), u64_at(bytes, 8));
        match kind & 0xff {
            1 => Some(Keep::Node((kind >> 8) as u32, number)),
            2 => Some(Keep::Handle(number)),
            _ => None,
        }
    }
}

impl Flight {
    fn send(&mut self, keep: Keep, fd: impl AsFd) -> Result<()> {
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&self.sockets.0, &[IoSlice::new(&keep.encode())], &mut control, SendFlags::DONTWAIT)?;
        self.queued += 1;
        Ok(())
    }

    fn receive(&mut self) -> Option<(Keep, OwnedFd)> {
        let mut bytes = [0_u8; 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(&self.sockets.1, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).ok()?;
        self.queued = self.queued.saturating_sub(1);
        let fd = control.drain().find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })?;
        (got.bytes == 16).then_some((Keep::decode(&bytes)?, fd))
    }

    /// Take each descriptor out of the queue and put those that are still wanted in again, behind.
    fn rotate(&mut self) {
        let mut seen = HashSet::new();
        for _ in 0..self.queued {
            let Some((keep, fd)) = self.receive() else { break };
            if !self.kept.contains(&keep) || !seen.insert(keep) {
                continue;
            }
            if let Err(e) = self.send(keep, &fd) {
                log::debug!(target: TARGET, "keep {keep:?} longer: {e}");
                self.kept.remove(&keep);
            }
        }
    }

    /// What an earlier server kept, to `pages` for the nodes and to ourselves for the handles.
    fn read_back(&mut self, pages: &mut Pages) {
        let mut found = Vec::new();
        while let Some((keep, fd)) = self.receive() {
            let wanted = match keep {
                Keep::Node(tree, node) => pages.inherited.get(&tree).is_some_and(|old| old.nodes.contains_key(&node)),
                Keep::Handle(handle) => slot_of(handle).is_some_and(|slot| pages.read_slot(slot).is_some()),
            };
            if wanted && !self.kept.contains(&keep) {
                self.kept.insert(keep);
                found.push((keep, fd));
            }
        }
        self.queued = 0;
        for (keep, fd) in found {
            // Again for the server after this one.
            if let Err(e) = self.send(keep, &fd) {
                log::debug!(target: TARGET, "keep {keep:?} longer: {e}");
                self.kept.remove(&keep);
            }
            match keep {
                Keep::Node(tree, node) => {
                    pages.inherited.entry(tree).or_default().pins.insert(node, fd);
                }
                Keep::Handle(handle) => {
                    self.inherited_handles.insert(handle, fd);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(kept: &Kept) -> Kept {
        let clone = |fd: &OwnedFd| fd.try_clone().unwrap();
        Kept { memory: clone(&kept.memory), sockets: (clone(&kept.sockets.0), clone(&kept.sockets.1)) }
    }

    const FILE: Identity = Identity { dev: 7, ino: 9, generation: 3 };

    fn file(ledger: &Ledger, kind: u32) -> OldNode {
        OldNode { identity: FILE, kind, aliases: Vec::new(), count: ledger.new_count(), references: 1 }
    }

    #[test]
    fn the_next_server_knows_what_this_one_knew() {
        let kept = Ledger::make().unwrap();
        let first = Ledger::take_over(again(&kept)).unwrap();
        assert!(first.inheritance(0).nodes.is_empty());
        let (known, gone) = (file(&first, 0o100_000), file(&first, 0o100_000));
        first.named(0, 100, &known, 1, b"a");
        first.named(0, 100, &known, 2, b"b");
        first.set_count(known.count, 77);
        first.named(1, 100, &file(&first, 0o040_000), 1, b"other tree");
        first.named(0, 101, &gone, 1, b"gone");
        first.forgotten(0, 101, gone.count);
        first.unnamed(0, 100, 1, b"a");
        first.device(0, 1, 4711);
        let open = OldHandle { node: 100, flags: OFlags::RDWR, directory: false };
        let (one, two) = (first.open_handle(0, open).unwrap(), first.open_handle(1, open).unwrap());
        first.close_handle(one);
        first.keep_fd(Keep::Node(0, 100), std::fs::File::open("/dev/null").unwrap());
        first.keep_fd(Keep::Handle(two), std::fs::File::open("/dev/zero").unwrap());
        drop(first);

        for _ in 0..3 {
            let next = Ledger::take_over(again(&kept)).unwrap();
            let old = next.inheritance(0);
            assert_eq!(old.nodes.len(), 1);
            assert_eq!((old.nodes[&100].identity, old.nodes[&100].references), (FILE, 77));
            assert_eq!(old.nodes[&100].aliases, [Alias { parent: 2, name: b"b"[..].into() }]);
            assert_eq!(old.devices[1], 4711);
            assert!(old.handles.is_empty());
            assert!(old.pins.contains_key(&100));
            assert_eq!(next.inheritance(1).handles, [(two, 100)]);
            assert_eq!(next.old_handle(1, two), Some(open));
            assert_eq!((next.old_handle(0, two), next.old_handle(0, one)), (None, None));
            assert!(next.old_descriptor(two).is_some() && next.old_descriptor(two).is_none());
        }
        let last = Ledger::take_over(again(&kept)).unwrap();
        assert_eq!(last.open_handle(0, open), Ok(one), "a free slot is used again");
        assert_eq!(last.new_count(), gone.count, "as is a free count");
        last.forgotten(0, 100, known.count);
        last.release_fd(Keep::Node(0, 100));
        assert!(Ledger::take_over(kept).unwrap().inheritance(0).pins.is_empty());
    }

    #[test]
    fn a_long_log_is_written_again_without_what_is_no_more() {
        let kept = Ledger::make().unwrap();
        let ledger = Ledger::take_over(again(&kept)).unwrap();
        let known = file(&ledger, 0o100_000);
        ledger.named(0, 5, &known, 1, b"stays");
        ledger.set_count(known.count, 3);
        ledger.named(0, 6, &file(&ledger, 0o100_000), 1, b"nameless");
        ledger.unnamed(0, 6, 1, b"nameless");
        for round in 0..200_000_u64 {
            let passing = file(&ledger, 0o100_000);
            ledger.named(0, 1000 + round, &passing, 1, b"comes and goes");
            ledger.forgotten(0, 1000 + round, passing.count);
        }
        assert!(ledger.pages().next_count <= 3);
        assert!(ledger.pages().length < 2 * COMPACT_FROM, "{}", ledger.pages().length);
        drop(ledger);
        let old = Ledger::take_over(kept).unwrap().inheritance(0);
        assert_eq!(old.nodes.len(), 2);
        assert_eq!((&*old.nodes[&5].aliases[0].name, old.nodes[&5].references), (&b"stays"[..], 3));
        assert!(old.nodes[&6].aliases.is_empty());
    }

    #[test]
    fn kept_descriptors_are_bounded_and_come_and_go() {
        let ledger = Ledger::take_over(Ledger::make().unwrap()).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        for round in 0..5000 {
            ledger.keep_fd(Keep::Handle(round), &null);
            if round >= 20 {
                ledger.release_fd(Keep::Handle(round - 20));
            }
        }
        let flight = ledger.flight();
        assert_eq!(flight.kept.len(), 20);
        assert!(flight.queued <= 2 * 20 + 17, "{}", flight.queued);
    }

    #[test]
    fn a_foreign_memory_file_is_refused() {
        let kept = Ledger::make().unwrap();
        rustix::io::pwrite(&kept.memory, b"somebody", 0).unwrap();
        assert_eq!(Ledger::take_over(kept).unwrap_err().kind(), crate::Kind::Invalid);
    }
}
