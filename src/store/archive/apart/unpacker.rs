//! The unpacker, as who started it sees it: it is handed a place and a ring, and what it made is taken over.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags, XattrFlags, fcntl_add_seals, memfd_create, mkdirat};
use sha2::Digest;
use sha2::digest::Output;

use super::super::ring::Ring;
use super::super::stream::{self, Sink};
use super::super::whiteout;
use super::work::{Job, Task, Unpacked};
use super::{Apart, End, OP, Order, Report};
use crate::error::{Error, Kind, Result, show};
use crate::paths::image;
use crate::store::limits::Limits;
use crate::store::staging::create_new;
use crate::sys::process::not_started;

/// Where things are placed.
pub(in crate::store) struct Place {
    /// `rootfs` and the index are made in it.
    pub(in crate::store) dir: PathBuf,
    pub(in crate::store) index: &'static str,
}

/// An empty place's parts, open.
struct Parts {
    root: OwnedFd,
    spill: OwnedFd,
    index: File,
    opaque: File,
}

impl Place {
    fn make(&self) -> Result<Parts> {
        let rootfs = self.dir.join(image::ROOTFS);
        // Beside the image, not in it.
        let spill = self.dir.with_extension("spill");
        for dir in [&self.dir, &rootfs, &spill] {
            mkdirat(CWD, dir, Mode::RWXU).map_err(|e| Error::sys("make", show(dir), e))?;
        }
        let open = |path: &Path| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| Error::sys("open", show(path), e))
        };
        let opaque = tempfile::tempfile_in(&spill).map_err(|e| Error::io("make a file in", show(&spill), e))?;
        Ok(Parts { root: open(&rootfs)?, spill: open(&spill)?, index: create_new(&self.dir.join(self.index))?, opaque })
    }
}

/// Have what `produce` gives unpacked at `place`. Gives what it was, and the digest of all of it.
pub(in crate::store) fn unpack<D: Digest + Send>(
    produce: impl FnOnce(&mut Sink<'_>) -> Result<()> + Send,
    task: Task,
    place: &Place,
    name: &str,
    limits: &Limits,
) -> Result<(Unpacked, Output<D>)>
where
    Output<D>: Send,
{
    let parts = place.make()?;
    let lists_opaque = matches!(task, Task::Layer) && may_set_trusted(&parts.root);
    let job = Job {
        task,
        name: name.to_owned(),
        limits: limits.clone(),
        lists_opaque,
        as_root: rustix::process::geteuid().is_root(),
    };
    let (unpacked, digest) = run::<D>(produce, job, Some(&parts))?;
    if lists_opaque {
        set_opaque(&parts.root, parts.opaque)?;
    }
    Ok((unpacked, digest))
}

/// The manifest of the AppC image that `produce` gives, and the digest of all of it. Nothing is placed.
pub(in crate::store) fn peek<D: Digest + Send>(
    produce: impl FnOnce(&mut Sink<'_>) -> Result<()> + Send,
    name: &str,
    limits: &Limits,
) -> Result<(Vec<u8>, Output<D>)>
where
    Output<D>: Send,
{
    let (task, limits) = (Task::Manifest, limits.clone());
    let job = Job { task, name: name.to_owned(), limits, lists_opaque: false, as_root: false };
    run::<D>(produce, job, None).map(|(unpacked, digest)| (unpacked.manifest, digest))
}

fn run<D: Digest + Send>(
    produce: impl FnOnce(&mut Sink<'_>) -> Result<()> + Send,
    job: Job,
    parts: Option<&Parts>,
) -> Result<(Unpacked, Output<D>)>
where
    Output<D>: Send,
{
    let (ring, theirs) = Ring::to_unpacker()?;
    let manifest = manifest_file(&job.limits)?;
    let mut fds = super::borrow(&theirs);
    fds.push(manifest.as_fd());
    if let Some(Parts { root, spill, index, opaque }) = parts {
        fds.extend([root.as_fd(), spill.as_fd(), index.as_fd(), opaque.as_fd()]);
    }
    let memory = super::memory_to_unpack(&job.limits);
    let apart = Apart::start(Order::Unpack(job), memory, &fds)?;
    // Its end must show here when it is gone.
    drop(theirs);
    std::thread::scope(|scope| {
        let apart = &apart;
        let producer = std::thread::Builder::new()
            .name("read".into())
            .spawn_scoped(scope, move || {
                let produced = stream::pump::<D>(produce, ring, &|bytes| apart.allow_time(bytes));
                let end = produced.as_ref().map_or_else(|error| End::Cut(super::short(error)), |_| End::Whole);
                // It may have failed, and tells itself.
                let _ = apart.channel.send(&end, &[]);
                produced
            })
            .map_err(|e| not_started("start thread", "read", e))?;
        let report = apart.report();
        // Nothing is taken any more: the producer sees it.
        apart.end();
        let produced = producer.join().map_err(|_| Error::new(Kind::Io, "read", "", "the thread panicked"))?;
        let Report::Unpacked(mut unpacked) = report? else {
            return Err(Error::new(Kind::Invalid, OP, "", "the report is another's"));
        };
        let length = unpacked.manifest_length;
        unpacked.manifest = read_back(&manifest, length)?;
        Ok((unpacked, produced?))
    })
}

/// A memory file that is as long as a manifest may be, and stays so.
fn manifest_file(limits: &Limits) -> Result<File> {
    let fail = |e| Error::sys("make memory file", "manifest", e);
    let file = memfd_create("manifest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(fail)?;
    rustix::fs::ftruncate(&file, limits.manifest_bytes).map_err(fail)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(fail)?;
    Ok(file.into())
}

fn read_back(file: &File, length: u64) -> Result<Vec<u8>> {
    let fail = |e| Error::io("read", "manifest", e);
    let most = file.metadata().map_err(fail)?.len();
    let mut bytes = vec![0; length.min(most) as usize];
    file.read_exact_at(&mut bytes, 0).map_err(fail)?;
    Ok(bytes)
}

/// May this process set `trusted.` attributes there? The unpacker may not.
fn may_set_trusted(dir: &OwnedFd) -> bool {
    let set = rustix::fs::fsetxattr(dir, whiteout::OPAQUE_TRUSTED, b"y", XattrFlags::empty());
    set.is_ok() && rustix::fs::fremovexattr(dir, whiteout::OPAQUE_TRUSTED).is_ok()
}

/// Make the listed directories opaque. The unpacker is gone, and nobody changes the tree any more.
fn set_opaque(root: &OwnedFd, mut list: File) -> Result<()> {
    let fail = |e| Error::io("read", "list of opaque directories", e);
    list.rewind().map_err(fail)?;
    let mut list = BufReader::new(list);
    let mut path = Vec::new();
    loop {
        path.clear();
        list.by_ref().take(crate::index::MAX_PATH as u64 + 1).read_until(0, &mut path).map_err(fail)?;
        match path.pop() {
            None => return Ok(()),
            Some(0) => whiteout::set_trusted_opaque(root, &path)?,
            Some(_) => {
                return Err(Error::new(Kind::Invalid, "read", "list of opaque directories", "a path is too long"));
            }
        }
    }
}
