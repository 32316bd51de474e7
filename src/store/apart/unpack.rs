//! The unpacker: parses an archive, and places what it holds below one directory made for it.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags, XattrFlags, fcntl_add_seals, memfd_create, mkdirat};
use serde::{Deserialize, Serialize};
use sha2::Digest;
use sha2::digest::Output;

use super::super::layer::{self, LayerWhiteouts, Opaque};
use super::super::limits::Limits;
use super::super::place::{Again, Placed, Placer, normalize};
use super::super::stream::{self, CHUNK, Sink};
use super::super::tarread::{Content, EndMarker, Member, TarReader};
use super::super::{oci, tarwrite};
use super::{Apart, End, Handed, OP, Order, Report};
use crate::child::channel::Channel;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::index::{Builder, What, Whiteouts};
use crate::paths::image;

/// What is to be made of an archive.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in super::super) enum Task {
    /// An AppC image, or a root filesystem by itself where a name is given; what turns out to be a layout is placed to be read.
    Image {
        /// The name for an image without a manifest.
        name: Option<String>,
    },
    /// A layer of an OCI image.
    Layer,
    /// Its manifest alone; nothing is placed.
    Manifest,
}

/// What an unpacker is told. With it go the pipe to read from and the file for the manifest; and, where something is placed, the directories for
/// the tree and for what is too much for memory, the file for the index, and the one for opaque directories.
#[derive(Serialize, Deserialize)]
pub(super) struct Job {
    task: Task,
    /// What the archive is called in messages.
    name: String,
    limits: Limits,
    /// Opaque directories are written down: the attribute is for this process to set.
    lists_opaque: bool,
    /// Made by root: owners and devices are set as they are.
    pub(super) as_root: bool,
}

impl Job {
    /// Directories that may lie above one another.
    pub(super) fn depth(&self) -> u64 {
        self.limits.depth as u64
    }
}

/// What an archive held.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(in super::super) struct Unpacked {
    /// It is an OCI layout or a docker archive: its files lie where the tree would.
    pub(in super::super) is_layout: bool,
    pub(in super::super) placed: Placed,
    pub(in super::super) whiteouts: LayerWhiteouts,
    manifest_length: u64,
    /// Read by who started the unpacker.
    #[serde(skip)]
    pub(in super::super) manifest: Vec<u8>,
}

/// Where things are placed.
pub(in super::super) struct Place {
    /// `rootfs` and the index are made in it.
    pub(in super::super) dir: PathBuf,
    pub(in super::super) index: &'static str,
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
        Ok(Parts {
            root: open(&rootfs)?,
            spill: open(&spill)?,
            index: super::super::import::create_new(&self.dir.join(self.index))?,
            opaque,
        })
    }
}

/// Have what `produce` gives unpacked at `place`. Gives what it was, and the digest of all of it.
pub(in super::super) fn unpack<D: Digest>(
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
pub(in super::super) fn peek<D: Digest>(
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

fn run<D: Digest>(
    produce: impl FnOnce(&mut Sink<'_>) -> Result<()> + Send,
    job: Job,
    parts: Option<&Parts>,
) -> Result<(Unpacked, Output<D>)>
where
    Output<D>: Send,
{
    let (from, to) = super::pipe(true)?;
    let manifest = manifest_file(&job.limits)?;
    let mut fds = vec![from.as_fd(), manifest.as_fd()];
    if let Some(Parts { root, spill, index, opaque }) = parts {
        fds.extend([root.as_fd(), spill.as_fd(), index.as_fd(), opaque.as_fd()]);
    }
    let memory = super::memory_to_unpack(&job.limits);
    let apart = Apart::start(Order::Unpack(job), memory, &fds)?;
    // Its end must show here when it is gone.
    drop(from);
    std::thread::scope(|scope| {
        let apart = &apart;
        let producer = std::thread::Builder::new()
            .name("read".into())
            .spawn_scoped(scope, move || {
                let produced = stream::pump::<D>(produce, Some(to.into()), &|bytes| apart.allow_time(bytes));
                let end = produced.as_ref().map_or_else(|error| End::Cut(super::short(error)), |_| End::Whole);
                // It may have failed, and tells itself.
                let _ = apart.channel.send(&end, &[]);
                produced
            })
            .map_err(|e| Error::io("start thread", "read", e))?;
        let report = apart.report();
        // Nothing is taken any more: whoever produces sees it.
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
    let set = rustix::fs::fsetxattr(dir, layer::OPAQUE_TRUSTED, b"y", XattrFlags::empty());
    set.is_ok() && rustix::fs::fremovexattr(dir, layer::OPAQUE_TRUSTED).is_ok()
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
            Some(0) => layer::set_trusted_opaque(root, &path)?,
            Some(_) => {
                return Err(Error::new(Kind::Invalid, "read", "list of opaque directories", "a path is too long"));
            }
        }
    }
}

/// The bytes of the pipe, and at their end the word whether those were all.
pub(super) struct PipeReader<'a> {
    pipe: File,
    channel: &'a Channel,
    buffer: Box<[u8]>,
    at: usize,
    length: usize,
    ended: bool,
}

impl<'a> PipeReader<'a> {
    fn new(pipe: File, channel: &'a Channel) -> Self {
        let buffer = vec![0; CHUNK].into_boxed_slice();
        PipeReader { pipe, channel, buffer, at: 0, length: 0, ended: false }
    }
}

impl BufRead for PipeReader<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        if self.at == self.length && !self.ended {
            self.at = 0;
            self.length = loop {
                match self.pipe.read(&mut self.buffer) {
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    other => break other?,
                }
            };
            if self.length == 0 {
                self.ended = true;
                match self.channel.receive::<End>().map_err(std::io::Error::other)? {
                    Some((End::Whole, _)) => {}
                    Some((End::Cut(told), _)) => return Err(std::io::Error::other(Error::from(told))),
                    None => {
                        let gone = Error::new(Kind::Helper, OP, "", "the process that reads it is gone");
                        return Err(std::io::Error::other(gone));
                    }
                }
            }
        }
        Ok(&self.buffer[self.at..self.length])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for PipeReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let data = self.fill_buf()?;
        let count = data.len().min(out.len());
        out[..count].copy_from_slice(&data[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// An index with one layer begun, of which what is too much for memory goes to `dir`.
pub(in super::super) fn one_layer(dir: &Path) -> Result<Builder> {
    let mut index = Builder::in_dir(dir);
    index.begin_layer(Whiteouts::Plain)?;
    Ok(index)
}

/// What is worked with where something is placed.
struct Tools {
    root: OwnedFd,
    /// Leads to the directory for what is too much for memory, by its descriptor.
    spill: PathBuf,
    _spill: OwnedFd,
    index: File,
    opaque: File,
}

impl Tools {
    fn take(fds: &mut Handed) -> Result<Self> {
        let root = fds.next()?;
        let spill = fds.next()?;
        let at = PathBuf::from(format!("/proc/self/fd/{}", spill.as_raw_fd()));
        Ok(Tools { root, spill: at, _spill: spill, index: fds.file()?, opaque: fds.file()? })
    }

    fn placer(&self, job: &Job, again: Again) -> Result<Placer> {
        let root = self.root.try_clone().map_err(|e| Error::io("duplicate descriptor", "", e))?;
        Ok(Placer::new(root, job.limits.clone(), again, one_layer(&self.spill)?, job.as_root))
    }

    fn write_index(self, index: Builder) -> Result<()> {
        let mut out = BufWriter::with_capacity(64 << 10, self.index);
        index.finish_into(&mut out).map_err(|e| e.within("write", image::INDEX))
    }
}

pub(super) fn work(job: &Job, fds: Vec<OwnedFd>, channel: &Channel) -> Result<Unpacked> {
    let mut fds = Handed(fds.into_iter());
    let mut reader = PipeReader::new(fds.file()?, channel);
    let manifest = fds.file()?;
    // The diff id tells a whole layer from one cut off.
    let end = if matches!(job.task, Task::Layer) { EndMarker::Optional } else { EndMarker::Required };
    let tar = TarReader::new(&mut reader, job.name.clone(), job.limits.clone(), end);
    let (mut unpacked, bytes) = match &job.task {
        Task::Image { name } => place_image(tar, job, name.as_deref(), Tools::take(&mut fds)?)?,
        Task::Layer => place_layer(tar, job, Tools::take(&mut fds)?)?,
        Task::Manifest => (Unpacked::default(), find_manifest(tar, job)?),
    };
    manifest.write_all_at(&bytes, 0).map_err(|e| Error::io("write", "manifest", e))?;
    unpacked.manifest_length = bytes.len() as u64;
    Ok(unpacked)
}

fn find_manifest(mut tar: Tar<'_, '_>, job: &Job) -> Result<Vec<u8>> {
    let mut found = None;
    while let Some(member) = tar.next()? {
        if matches!(place_of(&normalize(&member.path, &job.limits, false)?), At::Manifest) {
            found = Some(manifest_bytes(&mut tar, &member, &job.limits)?);
        }
    }
    tar.finish()?;
    found.ok_or_else(|| Error::new(Kind::Invalid, "read archive", &job.name, "it has no manifest: not an AppC image"))
}

type Tar<'a, 'b> = TarReader<&'a mut PipeReader<'b>>;

/// What an archive turns out to be, by the first name in it that is not its top.
enum Form {
    /// Not known yet; the entry for its top, if there was one.
    Open(Option<Member>),
    /// `manifest` and `rootfs`.
    Appc,
    /// A root filesystem by itself: it gets a manifest.
    Tree,
}

/// Place the tree of an ACI, or all of a layout. A root filesystem by itself is taken where a name is given.
fn place_image(mut tar: Tar<'_, '_>, job: &Job, name: Option<&str>, tools: Tools) -> Result<(Unpacked, Vec<u8>)> {
    fault::point("store.unpack")?;
    let limits = &job.limits;
    let mut placer = tools.placer(job, Again::Refuse)?;
    let mut manifest = None;
    let mut has_root = false;
    let mut form = Form::Open(None);
    while let Some(mut member) = tar.next()? {
        let path = normalize(&member.path, limits, false)?;
        if let Form::Open(top) = &mut form {
            if oci::is_layout_name(&path) {
                place_layout(member, path, &mut tar, placer, limits)?;
                return Ok((Unpacked { is_layout: true, ..Unpacked::default() }, Vec::new()));
            }
            match place_of(&path) {
                At::Top if matches!(member.what, What::Directory) => {
                    *top = Some(member);
                    continue;
                }
                At::Else => {
                    manifest = Some(made_manifest(&member, name)?);
                    has_root = true;
                    if let Some(top) = top.take() {
                        placer.place(top, Vec::new(), |_| Ok(Vec::new()), |_| Ok(()))?;
                    }
                    form = Form::Tree;
                }
                _ => form = Form::Appc,
            }
        }
        let is_tree = matches!(form, Form::Tree);
        match if is_tree { At::Root(&path) } else { place_of(&path) } {
            At::Top if matches!(member.what, What::Directory) => {}
            At::Manifest if matches!(member.what, What::File { .. }) => {
                let bytes = manifest_bytes(&mut tar, &member, limits)?;
                if manifest.replace(bytes).is_some() {
                    return Err(refuse(&member, "the archive has this name twice"));
                }
            }
            At::Manifest => return Err(refuse(&member, "the manifest must be a regular file")),
            At::Root(inside) => {
                has_root = true;
                let inside = inside.to_vec();
                member.path.clear();
                let target = |raw: &[u8]| {
                    let path = normalize(raw, limits, false)?;
                    match if is_tree { At::Root(&path) } else { place_of(&path) } {
                        At::Root(target) if !target.is_empty() => Ok(target.to_vec()),
                        _ => Err(refuse_path(raw, "a hard link's target lies outside the root filesystem")),
                    }
                };
                placer.place(member, inside, target, |take| tar.body(take))?;
            }
            At::Top | At::Else => return Err(refuse(&member, NOTHING_ELSE)),
        }
    }
    tar.finish()?;
    let missing = |what| {
        Error::new(Kind::Invalid, "read archive", &job.name, format!("it has no {what} at its top: not an AppC image"))
    };
    let manifest = manifest.ok_or_else(|| missing("manifest"))?;
    if !has_root {
        return Err(missing("rootfs"));
    }
    let (placed, index) = placer.finish()?;
    tools.write_index(index)?;
    Ok((Unpacked { placed, ..Unpacked::default() }, manifest))
}

const NOTHING_ELSE: &str = "an AppC image holds manifest and rootfs at its top, and nothing else";

/// The manifest of a root filesystem that came by itself; `first` is its first entry.
fn made_manifest(first: &Member, name: Option<&str>) -> Result<Vec<u8>> {
    match name {
        Some(name) => tarwrite::made_manifest(name),
        None => Err(refuse(first, NOTHING_ELSE).hint("a root filesystem by itself needs a name: --name NAME")),
    }
}

/// Place the files of a layout: they are read from there, since an archive may have them in any order.
fn place_layout(
    first: Member,
    path: Vec<u8>,
    tar: &mut Tar<'_, '_>,
    mut placer: Placer,
    limits: &Limits,
) -> Result<()> {
    let mut next = Some((first, path));
    while let Some((mut member, path)) = next.take() {
        if !matches!(member.what, What::File { .. } | What::Directory | What::Symlink(_)) {
            return Err(refuse(&member, "a layout has files and directories"));
        }
        // The files are ours to read, whatever their modes.
        (member.mode, member.uid, member.gid) = (0o700, 0, 0);
        member.xattrs.clear();
        if !path.is_empty() {
            placer.place(member, path, |_| Ok(Vec::new()), |take| tar.body(take))?;
        }
        if let Some(member) = tar.next()? {
            let path = normalize(&member.path, limits, false)?;
            next = Some((member, path));
        }
    }
    tar.finish()
}

/// Place a layer.
fn place_layer(mut tar: Tar<'_, '_>, job: &Job, tools: Tools) -> Result<(Unpacked, Vec<u8>)> {
    let limits = &job.limits;
    let mut placer = tools.placer(job, Again::Replace)?;
    while let Some(member) = tar.next()? {
        let path = normalize(&member.path, limits, true)?;
        if path.is_empty() && !matches!(member.what, What::Directory) {
            return Err(Error::new(Kind::Invalid, "place entry", "\"/\"", "the root is not a directory"));
        }
        let target = |raw: &[u8]| normalize(raw, limits, true);
        placer.place(member, path, target, |take| tar.body(take))?;
    }
    tar.finish()?;
    let (placed, mut index) = placer.finish()?;
    let mut list = BufWriter::new(&tools.opaque);
    let opaque = if job.lists_opaque { Opaque::Listed(&mut list) } else { Opaque::Set };
    let whiteouts = layer::make_whiteouts(&tools.root, &mut index, opaque)?;
    list.flush().map_err(|e| Error::io("write", "list of opaque directories", e))?;
    drop(list);
    tools.write_index(index)?;
    Ok((Unpacked { placed, whiteouts, ..Unpacked::default() }, Vec::new()))
}

enum At<'a> {
    Top,
    Manifest,
    /// In the tree, at this path.
    Root(&'a [u8]),
    Else,
}

fn place_of(path: &[u8]) -> At<'_> {
    match path {
        b"" => At::Top,
        b"manifest" => At::Manifest,
        b"rootfs" => At::Root(&[]),
        path => path.strip_prefix(b"rootfs/").map_or(At::Else, At::Root),
    }
}

fn refuse(member: &Member, why: &'static str) -> Error {
    refuse_path(&member.path, why)
}

fn refuse_path(path: &[u8], why: &'static str) -> Error {
    let shown = String::from_utf8_lossy(&path[..path.len().min(256)]).into_owned();
    Error::new(Kind::Invalid, "place entry", format!("{shown:?}"), why)
}

fn manifest_bytes(tar: &mut Tar<'_, '_>, member: &Member, limits: &Limits) -> Result<Vec<u8>> {
    let What::File { size, .. } = member.what else {
        return Err(refuse(member, "the manifest must be a regular file"));
    };
    if size > limits.manifest_bytes {
        let why = format!("the manifest has {size} bytes: at most {} are taken", limits.manifest_bytes);
        return Err(Error::new(Kind::Limit, "read", "manifest", why));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    tar.body(|content| {
        match content {
            Content::Data(data) => bytes.extend_from_slice(data),
            Content::Hole(length) => bytes.resize(bytes.len() + length as usize, 0),
        }
        Ok(())
    })?;
    Ok(bytes)
}
