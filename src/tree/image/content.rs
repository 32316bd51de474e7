//! The bytes of the image's files: opened when read, by path below their layer's root, and kept open in a bounded cache.

use std::cell::RefCell;
use std::fmt;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use rustix::fs::{self, FileType, OFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::index::read::Inode;
use crate::index::{Damaged, Index};
use crate::sys;

/// Files kept open. A server is to stay below 256 descriptors under `ulimit -n 1024`: this leaves 128 for layers, volumes, the
/// control socket and the connection.
const OPEN_FILES: usize = 128;
/// Bytes of a file that are mapped at once, and how many such windows: 16 MiB of a server's memory at most. A window
/// serves 16 reads of 128 KiB, so mapping and unmapping it is little beside them.
const WINDOW: u64 = 2 << 20;
/// See [`WINDOW`].
const WINDOWS: usize = 8;
/// Up to so many bytes are read into a buffer: one pread costs less than mapping, faulting and unmapping a window.
const SMALL: u64 = 64 << 10;
/// Unit of hashing under [`Trust::Digest`].
const HASH_UNIT: usize = 1 << 20;

/// How far a file's bytes are believed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// It must be a regular file of the size that the index says.
    #[default]
    Size,
    /// And, the first time it is opened, have the SHA-256 that the index says (where it says one): the whole file is read then.
    Digest,
}

/// Why a file's bytes were not given.
#[derive(Debug)]
pub(super) enum Refusal {
    Index(Damaged),
    Layer { path: Vec<u8>, layer: u16 },
    Call { path: Vec<u8>, call: &'static str, errno: Errno },
    Changed { path: Vec<u8>, why: &'static str },
}

impl Refusal {
    pub(super) fn errno(&self) -> Errno {
        match self {
            Refusal::Call {
                errno: errno @ (Errno::ACCESS | Errno::PERM | Errno::NFILE | Errno::MFILE | Errno::NOMEM),
                ..
            } => *errno,
            _ => Errno::IO,
        }
    }
}

impl From<Damaged> for Refusal {
    fn from(damage: Damaged) -> Self {
        Refusal::Index(damage)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |path: &[u8]| crate::error::show(std::ffi::OsStr::from_bytes(path));
        match self {
            Refusal::Index(damage) => {
                write!(f, "the index is {damage}; make it again with `fsprov image index IMAGE`")
            }
            Refusal::Layer { path, layer } => write!(f, "read {}: the image has no layer {layer}", show(path)),
            Refusal::Call { path, call, errno } => write!(f, "{call} {} in its layer: {errno}", show(path)),
            Refusal::Changed { path, why } => {
                write!(f, "read {}: {why}; the store was changed: import the image again", show(path))
            }
        }
    }
}

#[derive(Debug)]
struct Opened {
    fd: OwnedFd,
}

#[derive(Debug)]
pub(super) struct Content {
    layers: Vec<OwnedFd>,
    trust: Trust,
    /// By row. Locked for a look-up, never across a system call.
    open: Mutex<LruCache<u32, Arc<Opened>>>,
    /// By row and number of the window.
    windows: Mutex<LruCache<(u32, u64), Arc<memmap2::Mmap>>>,
}

thread_local! {
    /// A path while a file is opened, and a small file's bytes. One of each for a server's thread, however many trees it serves.
    static SCRATCH: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A cache is good after a panic, too: nothing is ever half put into it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn capacity(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN)
}

impl Content {
    pub(super) fn new(layers: Vec<OwnedFd>, trust: Trust) -> Self {
        Content {
            layers,
            trust,
            open: Mutex::new(LruCache::new(capacity(OPEN_FILES))),
            windows: Mutex::new(LruCache::new(capacity(WINDOWS))),
        }
    }

    /// Keep no more than so many files open.
    pub(super) fn keep_open(&self, most: usize) {
        lock(&self.open).resize(capacity(most.min(OPEN_FILES)));
    }

    pub(super) fn open_files(&self) -> usize {
        lock(&self.open).len()
    }

    /// Give `out` the bytes from `offset`, `size` of them or up to the file's end.
    pub(super) fn read(
        &self,
        index: &Index,
        inode: &Inode,
        offset: u64,
        size: u32,
        out: &mut dyn FnMut(&[u8]),
    ) -> Result<(), Refusal> {
        let length = inode.size.saturating_sub(offset).min(size.into());
        if length == 0 {
            out(&[]);
            return Ok(());
        }
        let file = self.opened(index, inode)?;
        if length > SMALL && offset / WINDOW == (offset + length - 1) / WINDOW {
            let window = self.window(index, inode, &file, offset / WINDOW)?;
            let from = (offset % WINDOW) as usize;
            // Handed on untouched: write(2) copies it, and says EFAULT for pages that are gone where we would get SIGBUS.
            if let Some(bytes) = window.get(from..from + length as usize) {
                // Mapped before: a server that is killed while write(2) copies gets no page any more, and the reader EIO in place of an
                // answer by the next server (fuse_dev_do_write in fs/fuse/dev.c). Before Linux 5.14, and for what cannot be read: as it was.
                let _ = window.advise_range(memmap2::Advice::PopulateRead, from, length as usize);
                out(bytes);
                return Ok(());
            }
        }
        SCRATCH.with_borrow_mut(|(_, buffer)| {
            buffer.resize(length as usize, 0);
            let mut done = 0;
            while done < buffer.len() {
                match rustix::io::pread(&file.fd, &mut buffer[done..], offset + done as u64) {
                    Ok(0) => return Err(changed(index, inode, "it is shorter than the index says")),
                    Ok(n) => done += n,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(Refusal::Call { path: path_of(index, inode), call: "read", errno }),
                }
            }
            out(buffer);
            Ok(())
        })
    }

    /// A descriptor of a file of one's own.
    pub(super) fn open(&self, index: &Index, inode: &Inode) -> Result<OwnedFd, Refusal> {
        self.open_file(index, inode).map(|opened| opened.fd)
    }

    fn window(&self, index: &Index, inode: &Inode, file: &Opened, number: u64) -> Result<Arc<memmap2::Mmap>, Refusal> {
        let key = (inode.row, number);
        if let Some(window) = lock(&self.windows).get(&key) {
            return Ok(window.clone());
        }
        let offset = number * WINDOW;
        let length = WINDOW.min(inode.size - offset) as usize;
        let map = sys::raw::map_range(&file.fd, offset, length).map_err(|e| Refusal::Call {
            path: path_of(index, inode),
            call: "map",
            errno: Errno::from_io_error(&e).unwrap_or(Errno::IO),
        })?;
        let map = Arc::new(map);
        // What falls out of the cache is unmapped here, after the lock is given back.
        let _evicted = lock(&self.windows).push(key, map.clone());
        Ok(map)
    }

    fn opened(&self, index: &Index, inode: &Inode) -> Result<Arc<Opened>, Refusal> {
        if let Some(file) = lock(&self.open).get(&inode.row) {
            return Ok(file.clone());
        }
        let file = match self.open_file(index, inode) {
            // Others use the process's descriptors, too, or the limit is small: give back ours and try once more.
            Err(Refusal::Call { errno: Errno::MFILE | Errno::NFILE, .. }) => {
                let all = std::mem::replace(&mut *lock(&self.open), LruCache::new(capacity(OPEN_FILES)));
                drop(all);
                self.open_file(index, inode)?
            }
            other => other?,
        };
        let file = Arc::new(file);
        let _evicted = lock(&self.open).push(inode.row, file.clone());
        Ok(file)
    }

    fn open_file(&self, index: &Index, inode: &Inode) -> Result<Opened, Refusal> {
        let Some(layer) = self.layers.get(usize::from(inode.layer)) else {
            return Err(Refusal::Layer { path: path_of(index, inode), layer: inode.layer });
        };
        let fd = SCRATCH.with_borrow_mut(|(path, _)| {
            index.content_path(inode, path)?;
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
            let file = Path::new(std::ffi::OsStr::from_bytes(path));
            sys::fs::open_beneath(layer, file, flags).map_err(|errno| Refusal::Call {
                path: path.clone(),
                call: "open",
                errno,
            })
        })?;
        let stat =
            fs::fstat(&fd).map_err(|errno| Refusal::Call { path: path_of(index, inode), call: "stat", errno })?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(changed(index, inode, "it is not a regular file any more"));
        }
        if stat.st_size as u64 != inode.size {
            return Err(changed(index, inode, "its size is not the one in the index"));
        }
        if self.trust == Trust::Digest
            && let Some(want) = index.sha256(inode)?
            && digest(&fd).map_err(|errno| Refusal::Call { path: path_of(index, inode), call: "read", errno })? != want
        {
            return Err(changed(index, inode, "its SHA-256 is not the one in the index"));
        }
        Ok(Opened { fd })
    }
}

fn digest(fd: &OwnedFd) -> Result<[u8; 32], Errno> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; HASH_UNIT];
    let mut offset = 0;
    loop {
        match rustix::io::pread(fd, &mut buffer[..], offset) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(n) => {
                hash.update(&buffer[..n]);
                offset += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// The path for a message; empty where even that is damaged.
fn path_of(index: &Index, inode: &Inode) -> Vec<u8> {
    let mut path = Vec::new();
    if index.content_path(inode, &mut path).is_err() {
        path.clear();
    }
    path
}

fn changed(index: &Index, inode: &Inode, why: &'static str) -> Refusal {
    Refusal::Changed { path: path_of(index, inode), why }
}
