//! Open files: opening, reading, writing, and what else is done through a handle.

use std::cell::RefCell;
use std::io::IoSlice;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dashmap::DashMap;
use rustix::fs::{self, FallocateFlags, OFlags, SeekFrom};
use rustix::io::ReadWriteFlags;

use super::fds::{FdPool, Held, Use};
use super::found::{self, Found, REGULAR};
use super::handover::{HandleNote, Inherited, Intent};
use super::stream::Stream;
use super::{Caller, DirTree, Errno, Handle, Node, Opened, Result, Writer};
use crate::sys::raw;
use crate::tree::Caching;

/// Largest read answered: fuser's own largest message. The kernel asks for 1 MiB at most.
const MAX_READ: u32 = 16 << 20;
/// Most bytes one copy_file_range request works on: a handler must not be busy without bound, and callers go on from a
/// short count (copy_file_range(2)).
const MAX_COPY: u64 = 64 << 20;

/// Who may run a file: anybody.
pub(super) const ANY_EXECUTE: u32 = 0o111;

/// Among the flags of an open: the kernel opens a program to run it (__FMODE_EXEC, linux/fs.h). No program can ask for it: open(2)
/// drops flags that it does not know, openat2(2) refuses them.
const TO_BE_RUN: OFlags = OFlags::from_bits_retain(0x20);

/// A descriptor is given away under its node, or, with this bit, under its handle. Node ids lie below 2^56.
pub(super) const HANDLE_KEY: u64 = 1 << 63;

/// The open files and directories of a tree.
#[derive(Debug, Default)]
pub(super) struct Handles {
    map: DashMap<Handle, Arc<Open>>,
    /// Opened through an earlier process, and not used since.
    inherited: DashMap<Handle, HandleNote>,
    last: AtomicU64,
}

impl Handles {
    /// Go on with what an earlier process had open.
    pub(super) fn inherit(inherited: &Inherited) -> Self {
        let last = inherited.handles.keys().copied().max().unwrap_or(0);
        Handles {
            map: DashMap::new(),
            inherited: inherited.handles.iter().map(|(h, n)| (*h, *n)).collect(),
            last: AtomicU64::new(last),
        }
    }

    /// Take back a descriptor that an earlier process gave away for an open file; gives the file's node. None: it was closed.
    pub(super) fn restore(&self, handle: Handle, fd: Held) -> Option<Node> {
        let (_, note) = self.inherited.remove(&handle)?;
        self.map.insert(handle, Arc::new(Open::new(fd, OFlags::from_bits_retain(note.flags))));
        Some(note.node)
    }

    pub(super) fn get(&self, handle: Handle) -> Option<Arc<Open>> {
        self.map.get(&handle).map(|open| Arc::clone(&open))
    }

    pub(super) fn add(&self, open: Open) -> Handle {
        // Never 0, which stands for none.
        let handle = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.map.insert(handle, Arc::new(open));
        handle
    }

    pub(super) fn len(&self) -> usize {
        self.map.len() + self.inherited.len()
    }
}

/// One open file or directory.
#[derive(Debug)]
pub(super) struct Open {
    /// What it was opened with: access mode alone.
    flags: OFlags,
    closing: Closing,
    slot: Mutex<Slot>,
    /// Of a directory: where its reader stands.
    pub(super) stream: Mutex<Stream>,
}

/// The descriptor of an open file.
#[derive(Debug)]
struct Slot {
    fd: Arc<Held>,
    /// O_PATH only: a descriptor for writing would make execve(2) of the file fail with ETXTBSY on the host.
    parked: bool,
    /// Somebody may want to run the file once it is closed, so that it must be parked by then.
    is_program: bool,
}

/// What a close of an open file has to tell, and whether we hear of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// An error that the file system below was late with, perhaps. The kernel asks.
    Reported,
    /// Nothing; the kernel asks all the same.
    Silent,
    /// Nothing, and the kernel was told not to ask.
    Unasked,
}

impl Open {
    pub(super) fn new(fd: Held, flags: OFlags) -> Self {
        Self::with(fd, flags, Closing::Reported, true)
    }

    fn with(fd: Held, flags: OFlags, closing: Closing, is_program: bool) -> Self {
        Open {
            flags: flags & OFlags::ACCMODE,
            closing,
            slot: Mutex::new(Slot { fd: Arc::new(fd), parked: false, is_program }),
            stream: Mutex::default(),
        }
    }

    /// A file of which there is no more than an O_PATH descriptor yet: it is opened when it is used.
    fn parked(fd: Held, flags: u32) -> Self {
        let open = Self::new(fd, OFlags::from_bits_retain(flags));
        open.slot().parked = true;
        open
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is it a program, or now one?
    fn becomes_program(&self, now: bool) -> bool {
        let mut slot = self.slot();
        slot.is_program |= now;
        slot.is_program
    }

    pub(super) fn is_writable(&self) -> bool {
        self.flags != OFlags::RDONLY
    }

    /// A descriptor that may be O_PATH: for what needs no access.
    pub(super) fn any(&self) -> Arc<Held> {
        Arc::clone(&self.slot().fd)
    }

    /// The descriptor, if it is no O_PATH one just now.
    pub(super) fn not_parked(&self) -> Option<Arc<Held>> {
        let slot = self.slot();
        (!slot.parked).then(|| Arc::clone(&slot.fd))
    }

    /// The descriptor with the access it was opened with.
    pub(super) fn io(&self, pool: &Arc<FdPool>) -> Result<Arc<Held>> {
        let mut slot = self.slot();
        if slot.parked {
            let fd = pool.reopen(slot.fd.fd(), self.flags | OFlags::NONBLOCK)?;
            (slot.fd, slot.parked) = (Arc::new(pool.hold(fd)?), false);
        }
        Ok(Arc::clone(&slot.fd))
    }

    /// Could it be opened again as it is? Not for writing where its mode is 0444 and we are not root.
    fn can_be_had_again(&self, pool: &FdPool, fd: &Held) -> bool {
        let name = super::fds::fd_name(fd.fd());
        fs::accessat(pool.proc_fd(), name.as_str(), self.access(), fs::AtFlags::EACCESS).is_ok()
    }

    /// Keep the file but not the right to write, as long as that can be had again.
    fn park(&self, pool: &Arc<FdPool>) {
        let mut slot = self.slot();
        // Somebody is writing through it just now, or it could not be opened for writing again (mode 0444).
        let busy = Arc::strong_count(&slot.fd) > 1;
        if slot.parked || busy || !self.can_be_had_again(pool, &slot.fd) {
            return;
        }
        if let Ok(fd) = pool.reopen(slot.fd.fd(), OFlags::PATH).and_then(|fd| pool.hold(fd)) {
            (slot.fd, slot.parked) = (Arc::new(fd), true);
        }
    }

    fn access(&self) -> fs::Access {
        if self.flags == OFlags::RDWR { fs::Access::READ_OK | fs::Access::WRITE_OK } else { fs::Access::WRITE_OK }
    }

    pub(super) fn stat(&self) -> Result<Found> {
        found::stat_fd(self.any().fd())
    }
}

thread_local! {
    /// What a read goes through on its way to the reply.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl DirTree {
    /// The flags to open the file below with: access and truncation. The kernel sees to all others on its own side (O_SYNC by
    /// fsync, O_APPEND with each write, O_DIRECT by not caching), or they are about the name.
    pub(super) fn backing_flags(&self, flags: OFlags) -> OFlags {
        let kept = flags & (OFlags::ACCMODE | OFlags::TRUNC);
        if self.options.writeback && kept.contains(OFlags::WRONLY) {
            // With the write-back cache the kernel reads around what is written.
            kept.difference(OFlags::ACCMODE) | OFlags::RDWR
        } else {
            kept
        }
    }

    pub(super) fn open_file(&self, caller: &Caller, node: Node, flags: OFlags) -> Result<Opened> {
        let changes = flags & OFlags::ACCMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC);
        if changes {
            self.writable()?;
        }
        if self.options.immutable {
            // Read by node: no descriptor for each open file.
            return match self.nodes.kind(node) {
                Some(REGULAR) => Ok(Opened { handle: 0, cache: Caching::Keep, closes_silently: true }),
                Some(_) => Err(Errno::NXIO),
                None => Err(Errno::STALE),
            };
        }
        self.pool.room()?;
        let (fd, found) = self.fd(node)?;
        if found.kind() != REGULAR {
            // Opening a FIFO would block, a device has effects; the kernel serves those itself and never asks.
            return Err(Errno::NXIO);
        }
        let backing = self.backing_flags(flags);
        let open = |backing: OFlags| {
            self.options.act_as.run(caller, || self.pool.reopen(&fd, backing | OFlags::NONBLOCK | OFlags::NOCTTY))
        };
        let file = match open(backing) {
            // Widened for the write-back cache, but it may only be written.
            Err(Errno::ACCESS) if backing & OFlags::ACCMODE != flags & OFlags::ACCMODE => {
                open(flags & (OFlags::ACCMODE | OFlags::TRUNC))
            }
            // A program need not be readable to be run (mode 0711), and that this caller may run it the kernel has seen to: a mount
            // that others than its owner may enter has `default_permissions`.
            Err(Errno::ACCESS) if !changes && flags.contains(TO_BE_RUN) && found.attr.mode & ANY_EXECUTE != 0 => {
                self.pool.reopen(&fd, backing | OFlags::NONBLOCK | OFlags::NOCTTY)
            }
            other => other,
        }?;
        let stamp = (!changes).then_some((found.attr.mtime, found.attr.ctime, found.attr.size));
        let before = self.nodes.swap_stamp(node, stamp);
        let mut opened = self.opened(node, file, flags, &found)?;
        if stamp.is_some() && before == stamp {
            // Unchanged since it was last opened, and not written here since: what the kernel has cached is right.
            opened.cache = Caching::Keep;
        }
        Ok(opened)
    }

    /// A handle for a file just opened, which is `found`.
    pub(super) fn opened(&self, node: Node, fd: OwnedFd, flags: OFlags, found: &Found) -> Result<Opened> {
        let held = self.pool.hold(fd)?;
        let is_program = found.attr.mode & ANY_EXECUTE != 0;
        let closing = if self.silent_device != Some(found.identity.dev) {
            Closing::Reported
        } else if is_program || self.options.writeback {
            // The close of a program lets the host run it at once; and with the write-back cache the kernel always asks.
            Closing::Silent
        } else {
            Closing::Unasked
        };
        let open = Open::with(held, self.backing_flags(flags), closing, is_program);
        let closes_silently = !open.is_writable() || closing == Closing::Unasked;
        let note = HandleNote { node, flags: open.flags.bits(), directory: false };
        let only = open.is_writable() && !open.can_be_had_again(&self.pool, &open.any());
        let only = only.then(|| open.any());
        let handle = self.handles.add(open);
        self.nodes.add_handle(node, handle);
        self.note_handle(handle, note);
        if let (Some(handover), Some(only)) = (&self.handover, only) {
            // The next server could not open it so: it gets this descriptor.
            handover.keep(HANDLE_KEY | handle, only.fd().as_fd());
        }
        Ok(Opened { handle, cache: Caching::Fresh, closes_silently })
    }

    pub(super) fn note_handle(&self, handle: Handle, note: HandleNote) {
        if let Some(handover) = &self.handover {
            handover.open(handle, note);
        }
    }

    pub(super) fn close_handle(&self, node: Node, handle: Handle) {
        self.nodes.remove_handle(node, handle);
        self.handles.inherited.remove(&handle);
        let open = self.handles.map.remove(&handle);
        drop(open); // closed here, outside the map
        if let Some(handover) = &self.handover {
            handover.close(handle);
            handover.release(HANDLE_KEY | handle);
            self.nodes.tidy();
        }
    }

    /// What this handle has open; if an earlier process opened it, it is opened again.
    pub(super) fn handle(&self, handle: Handle) -> Option<Arc<Open>> {
        if let Some(open) = self.handles.get(handle) {
            return Some(open);
        }
        let note = self.handles.inherited.get(&handle).map(|n| *n)?;
        let again = self.open_again_by_node(note);
        let open = again.inspect_err(|e| log::warn!(target: "fsprov::tree::dir", "open a file again: {e}")).ok()?;
        // Another thread may have been faster: then its one counts.
        let open = Arc::clone(&self.handles.map.entry(handle).or_insert_with(|| Arc::new(open)));
        self.handles.inherited.remove(&handle);
        self.nodes.add_handle(note.node, handle);
        Some(open)
    }

    fn open_again_by_node(&self, note: HandleNote) -> Result<Open> {
        if note.directory {
            let place = self.place(note.node)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = self.pool.reopen(&place, flags)?;
            return Ok(Open::new(self.pool.hold(fd)?, OFlags::RDONLY));
        }
        let (fd, _) = self.fd(note.node)?;
        let place = self.pool.reopen(&fd, OFlags::PATH)?;
        Ok(Open::parked(self.pool.hold(place)?, note.flags))
    }

    fn file(&self, node: Node, handle: Handle) -> Result<Descriptor> {
        // Of an immutable tree, or of a file that a tree over this one opened before it was here: by node.
        if handle == 0 {
            return self.content(node).map(Descriptor::Cached);
        }
        self.handle(handle).ok_or(Errno::BADF)?.io(&self.pool).map(Descriptor::Open)
    }

    /// A descriptor of a regular file that is read without open.
    fn content(&self, node: Node) -> Result<Arc<OwnedFd>> {
        if let Some(fd) = self.pool.get(self.number, node, Use::Content) {
            return Ok(fd);
        }
        let (fd, found) = self.fd(node)?;
        if found.kind() != REGULAR {
            return Err(Errno::NXIO);
        }
        let file = Arc::new(self.pool.reopen(&fd, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?);
        self.pool.put(self.number, node, Use::Content, &file);
        Ok(file)
    }

    pub(super) fn read_file(
        &self,
        node: Node,
        handle: Handle,
        offset: u64,
        size: u32,
        out: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        if size > MAX_READ {
            return Err(Errno::INVAL);
        }
        let file = self.file(node, handle)?;
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size as usize {
                buffer.resize(size as usize, 0);
            }
            let wanted = &mut buffer[..size as usize];
            let mut done = 0;
            // A short answer means the end of the file to the kernel, so the file is read until there is no more.
            while done < wanted.len() {
                match rustix::io::pread(file.fd(), &mut wanted[done..], offset + done as u64) {
                    Ok(0) => break,
                    Ok(n) => done += n,
                    Err(Errno::INTR) => {}
                    // Not what was read before it: the kernel would take the file to end there (fuse_short_read in fs/fuse/file.c).
                    Err(e) => return Err(e),
                }
            }
            out(&wanted[..done]);
            Ok(())
        })
    }

    pub(super) fn write_file(
        &self,
        writer: &Writer,
        node: Node,
        handle: Handle,
        offset: u64,
        data: &[u8],
        flags: OFlags,
    ) -> Result<usize> {
        // A test holds a request here.
        let _ = crate::fault::point("serve.write");
        let act_as = self.options.act_as;
        let file = self.file(node, handle)?;
        if flags.contains(OFlags::APPEND)
            && let Some(earlier) = self.intend(|| Intent { size: size_of(file.fd()), ..Intent::default() })
            && let Some(done) = appended_before(&self.pool, file.fd(), earlier.size.unwrap_or(offset), data)
        {
            if done == data.len() {
                return Ok(done);
            }
            // Cut short by the kill: the rest, behind what is there.
            let rest = act_as.run_write(writer, || write_file_now(&file, offset, &data[done..], flags))?;
            return Ok(done + rest);
        }
        let done = act_as.run_write(writer, || write_file_now(&file, offset, data, flags))?;
        drop(file);
        self.written(handle, offset == 0 && looks_like_program(data));
        Ok(done)
    }

    /// The file was written through this handle. What looks like a program will be run, if only after a chmod on the host: where
    /// its close is not heard of, it is parked after each write.
    fn written(&self, handle: Handle, looks_like_program: bool) {
        if let Some(open) = self.handles.get(handle)
            && open.becomes_program(looks_like_program)
            && open.closing == Closing::Unasked
        {
            open.park(&self.pool);
        }
    }

    pub(super) fn flush_file(&self, handle: Handle) -> Result<()> {
        let Some(open) = self.handle(handle) else {
            return Ok(()); // an immutable tree's, which has none
        };
        let is_silent = open.closing != Closing::Reported;
        if !open.is_writable() || (is_silent && !open.becomes_program(false)) {
            return Ok(());
        }
        let result = if is_silent { Ok(()) } else { flush_now(open.any().fd()) };
        open.park(&self.pool);
        result
    }

    /// The file is about to become a program. What wrote it keeps the file but not the right to write, also where its close
    /// is not reported.
    pub(super) fn may_be_run(&self, node: Node) {
        for open in self.nodes.handles(node).into_iter().filter_map(|handle| self.handles.get(handle)) {
            if open.is_writable() {
                open.becomes_program(true);
                open.park(&self.pool);
            }
        }
    }

    pub(super) fn sync(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        if self.options.immutable {
            return Ok(());
        }
        // A test holds a request here.
        let _ = crate::fault::point("serve.sync");
        let file = self.file(node, handle)?;
        if data_only { fs::fdatasync(file.fd()) } else { fs::fsync(file.fd()) }
    }

    pub(super) fn seek(&self, node: Node, handle: Handle, offset: i64, whence: i32) -> Result<i64> {
        let at = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
        let to = match whence {
            libc::SEEK_DATA => SeekFrom::Data(at),
            libc::SEEK_HOLE => SeekFrom::Hole(at),
            _ => return Err(Errno::INVAL),
        };
        // The position it moves is used by nobody: reads and writes name theirs.
        let file = self.file(node, handle)?;
        fs::seek(file.fd(), to).map(|found| found as i64)
    }

    pub(super) fn allocate(
        &self,
        writer: &Writer,
        (node, handle): (Node, Handle),
        offset: u64,
        length: u64,
        mode: FallocateFlags,
    ) -> Result<()> {
        let file = self.file(node, handle)?;
        self.options.act_as.run_write(writer, || fs::fallocate(file.fd(), mode, offset, length))
    }

    pub(super) fn copy_range(
        &self,
        writer: &Writer,
        from: (Node, Handle, u64),
        to: (Node, Handle, u64),
        length: u64,
    ) -> Result<usize> {
        let (source, target) = (self.file(from.0, from.1)?, self.file(to.0, to.1)?);
        let length = length.min(MAX_COPY) as usize;
        let copied = self.options.act_as.run_write(writer, || {
            let (mut from_at, mut to_at) = (from.2, to.2);
            fs::copy_file_range(source.fd(), Some(&mut from_at), target.fd(), Some(&mut to_at), length)
        })?;
        drop(target);
        // What was copied to its start is not seen here.
        self.written(to.1, to.2 == 0);
        Ok(copied)
    }
}

/// A script with an interpreter's path, or ELF: what binfmt_script and binfmt_elf of the kernel take.
pub(super) fn looks_like_program(start: &[u8]) -> bool {
    let interpreter = start.strip_prefix(b"#!").map(<[u8]>::trim_ascii_start);
    start.starts_with(b"\x7fELF") || interpreter.is_some_and(|path| path.starts_with(b"/"))
}

/// The close of a duplicate is where NFS and quota report delayed errors (close(2)).
fn flush_now(fd: &OwnedFd) -> Result<()> {
    fd.try_clone().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO)).and_then(raw::close)
}

fn size_of(fd: &OwnedFd) -> Option<u64> {
    found::stat_fd(fd).ok().map(|found| found.attr.size)
}

/// How much of `data` an earlier server appended for the same request. The file ended at `offset` then: what stands there is this
/// request's, or a host writer's of the same bytes, which is as good. Behind what a host writer appended first it ends the file.
fn appended_before(pool: &FdPool, fd: &OwnedFd, offset: u64, data: &[u8]) -> Option<usize> {
    // Opened again: a log is mostly open for writing alone, and cannot be read through that.
    let Ok(file) = pool.reopen(fd, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) else {
        // It may not be read: the length alone must tell.
        let grown = found::stat_fd(fd).ok()?.attr.size.checked_sub(offset)?;
        return usize::try_from(grown).ok().filter(|&grown| grown > 0 && grown <= data.len());
    };
    let there = read_at(&file, offset, data.len())?;
    if !there.is_empty() && data.starts_with(&there) {
        return Some(there.len());
    }
    let tail = size_of(fd)?.checked_sub(data.len() as u64).filter(|tail| *tail > offset)?;
    (read_at(&file, tail, data.len())? == data).then_some(data.len())
}

/// Up to `length` bytes from `offset`. None: they cannot be read.
fn read_at(file: &OwnedFd, offset: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0_u8; length];
    let mut got = 0;
    while got < length {
        match rustix::io::pread(file, &mut bytes[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    bytes.truncate(got);
    Some(bytes)
}

/// A descriptor to read or write through.
enum Descriptor {
    Open(Arc<Held>),
    Cached(Arc<OwnedFd>),
}

impl Descriptor {
    fn fd(&self) -> &OwnedFd {
        match self {
            Descriptor::Open(held) => held.fd(),
            Descriptor::Cached(fd) => fd,
        }
    }
}

fn write_file_now(file: &Descriptor, offset: u64, data: &[u8], flags: OFlags) -> Result<usize> {
    // At the end as the file system knows it: another writer on the host may have moved it.
    let append = if flags.contains(OFlags::APPEND) { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
    let mut done = 0;
    while done < data.len() {
        let slice = [IoSlice::new(&data[done..])];
        let result = if append.is_empty() {
            rustix::io::pwrite(file.fd(), &data[done..], offset + done as u64)
        } else {
            rustix::io::pwritev2(file.fd(), &slice, offset + done as u64, append)
        };
        match result {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) if done == 0 => return Err(e),
            // What is written is written; the error comes back with the next write.
            Err(_) => break,
        }
    }
    Ok(done)
}
