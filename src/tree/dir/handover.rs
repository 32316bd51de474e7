//! What a directory tree writes down so that the next server process goes on where this one was killed: the nodes that the
//! kernel knows with their names, the files and directories it has open, descriptors of files that have no name any more, and
//! what the requests in flight are about to change.
//!
//! A log in two memory files that somebody else holds ([`Handover`]). Each record is whole or not there. A node's record replaces
//! its earlier ones; when the log is mostly old records, the live ones are copied to the other file while both are written to, and
//! the files change places. Writing to a memory file waits for nothing, so it is done under the node table's guards, which is
//! what keeps a node's records in order. Its end is mapped, because most requests write one or more records: what is in the mapping
//! is in the file, also where this process is killed at the next instruction.
//!
//! Lock order: a guard of the node table, then this.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use rustix::fs::{FallocateFlags, fallocate};

use super::found::{Alias, Identity};
use crate::sys::raw;
use crate::tree::resend;
use crate::tree::{Handle, Node};

const TARGET: &str = "fsprov::tree::dir";
/// A log shorter than this is not worth copying.
const SMALL: u64 = 1 << 20;
/// Bytes of a log that are mapped at a time, behind zeros up to there: a multiple of every page size.
const WINDOW: u64 = 1 << 16;
/// Bytes before a record's content: its length, its check sum.
const HEADER: usize = 8;
/// Room for most records at once.
const USUAL_RECORD: usize = 128;
/// Longest record: eight names of 255 bytes and what belongs to them is less than half of it.
const MAX_RECORD: usize = 8192;

/// Where a tree finds what an earlier process left, and leaves its own.
pub struct Handover {
    /// Two memory files, empty for the first process. The process that wrote to them before is dead.
    pub logs: [OwnedFd; 2],
    /// Descriptors that an earlier process gave away ([`Keeper`]), by node.
    pub kept: Vec<(Node, OwnedFd)>,
    /// Who keeps descriptors.
    pub keeper: Arc<dyn Keeper>,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handover").field("logs", &self.logs).field("kept", &self.kept.len()).finish_non_exhaustive()
    }
}

/// Keeps descriptors in a process that lives longer. Neither call may block.
pub trait Keeper: Send + Sync {
    /// Keep this descriptor under `node`, in an earlier one's place. It is kept when the call returns, even if this process
    /// is killed then.
    fn keep(&self, node: Node, fd: BorrowedFd<'_>);
    /// Let it go.
    fn release(&self, node: Node);
}

/// A node as it is written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeNote {
    pub(super) node: Node,
    pub(super) identity: Identity,
    pub(super) kind: u32,
    pub(super) aliases: Vec<Alias>,
}

/// An open file or directory as it is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HandleNote {
    pub(super) node: Node,
    /// Access mode, as open(2) has it.
    pub(super) flags: u32,
    pub(super) directory: bool,
}

/// What a request is about to change, as it was before. Written down before the change, it tells whether a request that is sent
/// again was carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Intent {
    /// What is to be moved or removed.
    pub(super) first: Option<Identity>,
    /// What is at the place that it is moved to.
    pub(super) second: Option<Identity>,
    /// The size of a file that is to be appended to.
    pub(super) size: Option<u64>,
}

/// What an earlier process left.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    /// In the order of their numbers, the root's first.
    pub(super) devices: Vec<u64>,
    pub(super) nodes: HashMap<Node, NodeNote>,
    pub(super) handles: HashMap<Handle, HandleNote>,
    /// Of requests that may not have been answered, by number.
    pub(super) intents: HashMap<u64, Intent>,
}

/// The log of one tree, and what it keeps elsewhere.
pub(super) struct HandoverLog {
    log: Mutex<Log>,
    keeper: Arc<dyn Keeper>,
    kept: Mutex<HashSet<Node>>,
    /// How many are kept: most forgets need not ask.
    kept_count: AtomicUsize,
    /// The log is mostly old records: most calls need not ask.
    is_long: AtomicBool,
}

impl std::fmt::Debug for HandoverLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HandoverLog").field("kept", &self.kept_count).finish_non_exhaustive()
    }
}

struct Log {
    files: [LogFile; 2],
    current: usize,
    /// The other file is being filled: both are written to.
    copying: bool,
    generation: u64,
    /// Length of the current file when it was last copied: what live records take, about.
    live: u64,
    devices: Vec<u64>,
    handles: HashMap<Handle, HandleNote>,
    intents: HashMap<u64, Intent>,
    /// The last request of each thread that has an intent. It is answered when the thread comes with its next one.
    last_of: HashMap<ThreadId, u64>,
    broken: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Begin = 1,
    Complete = 2,
    Device = 3,
    Node = 4,
    Forget = 5,
    Open = 6,
    Close = 7,
    Intent = 8,
}

impl HandoverLog {
    /// Take over. Damage at the end of a log is a record that was being written at the kill.
    pub(super) fn take_over(handover: Handover) -> (Self, Inherited, Vec<(Node, OwnedFd)>) {
        let Handover { logs, kept, keeper } = handover;
        let files = logs.map(File::from);
        let read = files.each_ref().map(Replay::of);
        // Both are complete where the process was killed between finishing one and emptying the other.
        let current = usize::from(read[1].complete && (!read[0].complete || read[1].generation > read[0].generation));
        let [zero, one] = read;
        let chosen = if current == 0 { zero } else { one };
        let mut files = files.map(LogFile::new);
        files[current].cut_at(chosen.length);
        files[1 - current].cut_at(0);
        let log = Log {
            files,
            current,
            copying: false,
            generation: chosen.generation,
            live: chosen.length / 2,
            devices: chosen.inherited.devices.clone(),
            handles: chosen.inherited.handles.clone(),
            intents: chosen.inherited.intents.clone(),
            last_of: HashMap::new(),
            broken: false,
        };
        let nodes = kept.iter().map(|(node, _)| *node).collect::<HashSet<_>>();
        let handover = HandoverLog {
            kept_count: AtomicUsize::new(nodes.len()),
            log: Mutex::new(log),
            keeper,
            kept: Mutex::new(nodes),
            is_long: AtomicBool::new(false),
        };
        (handover, chosen.inherited, kept)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, mut log: MutexGuard<'_, Log>, record: &Record) {
        log.append(record);
        if log.is_long() {
            self.is_long.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn device(&self, dev: u64) {
        let mut log = self.log();
        log.devices.push(dev);
        self.append(log, &Record::new(Kind::Device).number(dev));
    }

    pub(super) fn node(&self, node: Node, identity: Identity, kind: u32, aliases: &[Alias]) {
        self.append(self.log(), &node_record(node, identity, kind, aliases));
    }

    pub(super) fn forget(&self, node: Node) {
        self.append(self.log(), &Record::new(Kind::Forget).number(node));
    }

    pub(super) fn open(&self, handle: Handle, note: HandleNote) {
        let mut log = self.log();
        log.handles.insert(handle, note);
        self.append(log, &handle_record(handle, note));
    }

    pub(super) fn close(&self, handle: Handle) {
        let mut log = self.log();
        if log.handles.remove(&handle).is_some() {
            self.append(log, &Record::new(Kind::Close).number(handle));
        }
    }

    /// This thread's request is about to change something: write down what. Gives what an earlier process wrote down for the
    /// same request; that stays, until this thread comes with its next one and so has answered this one.
    pub(super) fn intend(&self, intent: impl FnOnce() -> Intent) -> Option<Intent> {
        let unique = resend::unique();
        if unique == 0 {
            return None;
        }
        // Before the lock: it asks the disk.
        let intent = intent();
        let mut log = self.log();
        let earlier = log.intents.get(&unique).copied();
        let answered = log.last_of.insert(std::thread::current().id(), unique).filter(|last| *last != unique);
        if let Some(answered) = answered {
            log.intents.remove(&answered);
        }
        let intent = *log.intents.entry(unique).or_insert(intent);
        self.append(log, &intent_record(unique, answered.unwrap_or(0), intent));
        earlier
    }

    /// Keep a descriptor of a node that is about to lose its last name.
    pub(super) fn keep(&self, node: Node, fd: BorrowedFd<'_>) {
        if self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(node) {
            self.kept_count.fetch_add(1, Ordering::Relaxed);
        }
        self.keeper.keep(node, fd);
    }

    pub(super) fn release(&self, node: Node) {
        if self.kept_count.load(Ordering::Relaxed) > 0
            && self.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(&node)
        {
            self.kept_count.fetch_sub(1, Ordering::Relaxed);
            self.keeper.release(node);
        }
    }

    /// Is the log mostly old records? The first to ask copies the live ones: [`Copying`] takes them.
    pub(super) fn start_copying(&self) -> Option<Copying<'_>> {
        if !self.is_long.swap(false, Ordering::Relaxed) {
            return None;
        }
        let mut log = self.log();
        if !log.is_long() {
            return None;
        }
        log.start_copying();
        Some(Copying { handover: self })
    }
}

/// The log's live records on their way to the other file.
pub(super) struct Copying<'a> {
    handover: &'a HandoverLog,
}

impl Copying<'_> {
    /// One live node; under its guard.
    pub(super) fn node(&self, node: Node, identity: Identity, kind: u32, aliases: &[Alias]) {
        let mut log = self.handover.log();
        let other = 1 - log.current;
        log.append_to(other, &node_record(node, identity, kind, aliases));
    }

    /// That were all.
    pub(super) fn finish(self) {
        let mut log = self.handover.log();
        let (old, new) = (log.current, 1 - log.current);
        log.append_to(new, &Record::new(Kind::Complete));
        log.copying = false;
        if log.broken {
            return;
        }
        log.current = new;
        log.live = log.files[new].length;
        log.files[old].cut_at(0);
    }
}

impl Log {
    fn is_long(&self) -> bool {
        !self.copying && !self.broken && self.files[self.current].length >= SMALL + 2 * self.live
    }

    fn append(&mut self, record: &Record) {
        self.append_to(self.current, record);
        if self.copying {
            self.append_to(1 - self.current, record);
        }
    }

    fn append_to(&mut self, file: usize, record: &Record) {
        if let Err(e) = self.files[file].append(record)
            && !std::mem::replace(&mut self.broken, true)
        {
            log::error!(target: TARGET, "write node log: {e}: nodes made from now on will not outlive this process");
        }
    }

    fn start_copying(&mut self) {
        let other = 1 - self.current;
        self.files[other].cut_at(0);
        self.copying = true;
        self.generation += 1;
        self.append_to(other, &Record::new(Kind::Begin).number(self.generation));
        for dev in self.devices.clone() {
            self.append_to(other, &Record::new(Kind::Device).number(dev));
        }
        let handles: Vec<_> = self.handles.iter().map(|(h, n)| handle_record(*h, *n)).collect();
        let intents: Vec<_> = self.intents.iter().map(|(unique, i)| intent_record(*unique, 0, *i)).collect();
        for record in handles.into_iter().chain(intents) {
            self.append_to(other, &record);
        }
    }
}

/// A memory file that is written at its end, through a mapping. Behind the end it is empty or zeros, which is not a record.
struct LogFile {
    file: File,
    /// Where its records end.
    length: u64,
    window: Option<Window>,
}

/// What is mapped of a file: [`WINDOW`] bytes from a multiple of that.
struct Window {
    start: u64,
    map: memmap2::MmapMut,
}

impl LogFile {
    fn new(file: File) -> Self {
        LogFile { file, length: 0, window: None }
    }

    /// Leave only so much of it. What a kill left behind the last whole record goes: a name in it could look like a record.
    fn cut_at(&mut self, length: u64) {
        self.window = None;
        self.length = length;
        if let Err(e) = self.file.set_len(length) {
            log::warn!(target: TARGET, "cut a node log short: {e}");
        }
    }

    fn append(&mut self, record: &Record) -> std::io::Result<()> {
        let mut at = self.length;
        for mut rest in [&record.header()[..], &record.bytes] {
            while !rest.is_empty() {
                let space = &mut self.window(at)?[(at % WINDOW) as usize..];
                let (piece, after) = rest.split_at(rest.len().min(space.len()));
                space[..piece.len()].copy_from_slice(piece);
                at += piece.len() as u64;
                rest = after;
            }
        }
        self.length = at;
        Ok(())
    }

    /// The mapping that `at` lies in.
    fn window(&mut self, at: u64) -> std::io::Result<&mut memmap2::MmapMut> {
        let start = at - at % WINDOW;
        let there = self.window.take().filter(|window| window.start == start);
        let map = || {
            // Their memory is taken here, where its want is an error and no SIGBUS at a touch.
            fallocate(&self.file, FallocateFlags::empty(), start, WINDOW)?;
            raw::map_writable(&self.file, start, WINDOW as usize).map(|map| Window { start, map })
        };
        let window = there.map_or_else(map, Ok)?;
        Ok(&mut self.window.insert(window).map)
    }
}

/// FNV-1a: tells a record that was cut short from a whole one; nobody attacks this file.
fn check_sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum: u32, &b| (sum ^ u32::from(b)).wrapping_mul(0x0100_0193))
}

/// A record's content being written.
struct Record {
    bytes: Vec<u8>,
}

impl Record {
    fn new(kind: Kind) -> Self {
        let mut bytes = Vec::with_capacity(USUAL_RECORD);
        bytes.push(kind as u8);
        Record { bytes }
    }
    fn header(&self) -> [u8; HEADER] {
        let [length, sum] = [self.bytes.len() as u32, check_sum(&self.bytes)].map(u32::to_le_bytes);
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&length);
        header[4..].copy_from_slice(&sum);
        header
    }
    fn number(mut self, value: u64) -> Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn name(mut self, name: &[u8]) -> Self {
        // Names have 255 bytes at most.
        self.bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
        self.bytes.extend_from_slice(name);
        self
    }
}

fn node_record(node: Node, identity: Identity, kind: u32, aliases: &[Alias]) -> Record {
    let mut record = Record::new(Kind::Node)
        .number(node)
        .number(identity.dev)
        .number(identity.ino)
        .number(u64::from(identity.generation) << 32 | u64::from(kind));
    for alias in aliases {
        record = record.number(alias.parent).name(&alias.name);
    }
    record
}

fn handle_record(handle: Handle, note: HandleNote) -> Record {
    Record::new(Kind::Open)
        .number(handle)
        .number(note.node)
        .number(u64::from(note.flags) << 1 | u64::from(note.directory))
}

fn intent_record(unique: u64, answered: u64, intent: Intent) -> Record {
    let mut record = Record::new(Kind::Intent).number(unique).number(answered);
    for identity in [intent.first, intent.second] {
        // No file has the inode number 0.
        let Identity { dev, ino, generation } = identity.unwrap_or(Identity { dev: 0, ino: 0, generation: 0 });
        record = record.number(dev).number(ino).number(u64::from(generation));
    }
    record.number(intent.size.unwrap_or(u64::MAX))
}

/// The request's number, the number of one that was answered before it, and the intent.
fn intent_note(rest: &mut &[u8]) -> Option<(u64, u64, Intent)> {
    let (unique, answered) = (number(rest)?, number(rest)?);
    let mut identity = || Some(Identity { dev: number(rest)?, ino: number(rest)?, generation: number(rest)? as u32 });
    let [first, second] = [identity()?, identity()?].map(|identity| Some(identity).filter(|i| i.ino != 0));
    let size = Some(number(rest)?).filter(|size| *size != u64::MAX);
    Some((unique, answered, Intent { first, second, size }))
}

/// A log read back.
#[derive(Default)]
struct Replay {
    inherited: Inherited,
    generation: u64,
    complete: bool,
    /// Where whole records end.
    length: u64,
}

impl Replay {
    fn of(file: &File) -> Self {
        let length = file.metadata().map_or(0, |m| m.len());
        let mut bytes = vec![0_u8; usize::try_from(length).unwrap_or(0)];
        if let Err(e) = file.read_exact_at(&mut bytes, 0) {
            log::error!(target: TARGET, "read node log: {e}");
            return Replay::default();
        }
        // A file that no copy began is the first one, and needs no end.
        let mut replay = Replay { complete: true, ..Replay::default() };
        let mut rest = &bytes[..];
        while let Some((content, after)) = next_record(rest) {
            if replay.apply(content).is_none() {
                break;
            }
            replay.length += (rest.len() - after.len()) as u64;
            rest = after;
        }
        replay
    }

    fn apply(&mut self, content: &[u8]) -> Option<()> {
        let (&kind, rest) = content.split_first()?;
        let mut rest = rest;
        let inherited = &mut self.inherited;
        match kind {
            k if k == Kind::Begin as u8 => {
                self.generation = number(&mut rest)?;
                self.complete = false;
            }
            k if k == Kind::Complete as u8 => self.complete = true,
            k if k == Kind::Device as u8 => inherited.devices.push(number(&mut rest)?),
            k if k == Kind::Node as u8 => {
                let note = node_note(&mut rest)?;
                inherited.nodes.insert(note.node, note);
            }
            k if k == Kind::Forget as u8 => {
                inherited.nodes.remove(&number(&mut rest)?);
            }
            k if k == Kind::Open as u8 => {
                let (handle, node, packed) = (number(&mut rest)?, number(&mut rest)?, number(&mut rest)?);
                let note = HandleNote { node, flags: (packed >> 1) as u32, directory: packed & 1 == 1 };
                inherited.handles.insert(handle, note);
            }
            k if k == Kind::Close as u8 => {
                inherited.handles.remove(&number(&mut rest)?);
            }
            k if k == Kind::Intent as u8 => {
                let (unique, answered, intent) = intent_note(&mut rest)?;
                inherited.intents.remove(&answered);
                inherited.intents.insert(unique, intent);
            }
            _ => return None,
        }
        Some(())
    }
}

/// The first whole record, and what comes after it.
fn next_record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let sum = u32::from_le_bytes(bytes.get(4..HEADER)?.try_into().ok()?);
    if length == 0 || length > MAX_RECORD {
        return None;
    }
    let content = bytes.get(HEADER..HEADER + length)?;
    (check_sum(content) == sum).then_some((content, &bytes[HEADER + length..]))
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    let (value, after) = rest.split_first_chunk::<8>()?;
    *rest = after;
    Some(u64::from_le_bytes(*value))
}

fn node_note(rest: &mut &[u8]) -> Option<NodeNote> {
    let (node, dev, ino, packed) = (number(rest)?, number(rest)?, number(rest)?, number(rest)?);
    let mut aliases = Vec::new();
    while !rest.is_empty() {
        let parent = number(rest)?;
        let (length, after) = rest.split_first_chunk::<2>()?;
        let (name, after) = after.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
        aliases.push(Alias { parent, name: name.into() });
        *rest = after;
    }
    Some(NodeNote {
        node,
        identity: Identity { dev, ino, generation: (packed >> 32) as u32 },
        kind: packed as u32,
        aliases,
    })
}

#[cfg(test)]
mod tests;
