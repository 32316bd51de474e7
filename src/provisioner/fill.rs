//! Filling a new volume source with what the image has at its target (`-v SRC:DST:rw,copy`), as docker and podman fill a new named volume.
//!
//! The content is what the image's tree shows, the same for every backend and layout of layers. It is made beside the source
//! and renamed into its place, so it is there whole or not at all, whatever kills us. Owners, modes, times and attributes go
//! over as far as this user may set them ([`attrs::set`]): an ordinary user's copy belongs to that user.
//!
//! Anyone who owns the directory beside the source may interfere: everything is made inside a directory of ours that nobody else can
//! enter, and gets its owner and mode there, by descriptor.

use std::collections::HashMap;
use std::ffi::{CString, OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Uid};

use super::open::{self, Opened, Source};
use super::planning::Planned;
use super::record;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ContainerId;
use crate::index::Index;
use crate::paths::StatePaths;
use crate::place::{Place, Places};
use crate::plan::{Ownership, Plan};
use crate::store::ResolvedImage;
use crate::sys::attrs::{self, Fidelity, SetId};
use crate::sys::fs::{make_private, open_beneath, open_path};
use crate::sys::remove::remove_tree_at;
use crate::tree::dir::{DirOptions, DirTree, FdPool};
use crate::tree::image::{ImageTree, Trust};
use crate::tree::{self, Attr, Caller, Errno, Fit, ListMode, Node, Tree, route};
use crate::volume::{ContainerPath, Form, Powers, Volume};

const OP: &str = "copy the image's content into volume source";
const TARGET: &str = "fsprov::provisioner";
/// Deepest tree copied: two descriptors are held a level, and the usual limit on open files is 1024.
const MAX_DEPTH: usize = 400;
/// Bytes read at once; a run of so many zeros at such a place becomes a hole.
const PIECE: u32 = 128 << 10;
/// What a directory's owner needs to work in it.
const OPEN: u32 = 0o700;
/// setuid and setgid.
const SET_ID: u32 = 0o6000;
/// Most hard-linked files told apart: above that a copy would cost more memory than any image is worth.
const MAX_LINKED: usize = 1 << 20;
/// The tree does not ask who reads: the image was made readable to its user.
const ME: Caller = Caller { uid: 0, gid: 0, pid: 0 };

/// What a source is that is missing and will be filled from `target`: a directory where the image has none or nothing there. A look at
/// the image, for the plan.
pub(super) fn form_in(image: &ResolvedImage, ownership: &Ownership, target: &ContainerPath) -> Result<Form> {
    if image.layers.is_empty() {
        return Ok(Form::Directory);
    }
    let open = |path: &PathBuf| open_path(path).map_err(|e| Error::sys("open layer", show(path), e));
    let layers = image.layers.iter().map(open).collect::<Result<Vec<_>>>()?;
    let tree = tree_of(image.index.as_deref().map(Index::open).transpose()?, layers, ownership)?;
    match route::target_attr(&tree, target)?.map(|attr| FileType::from_raw_mode(attr.mode)) {
        None | Some(FileType::Directory) => Ok(Form::Directory),
        Some(FileType::RegularFile) => Ok(Form::File),
        Some(_) => Err(Error::new(Kind::Usage, OP, target, "the image has neither a file nor a directory there")),
    }
}

/// The image as a tree, to copy from; owners as `ownership` presents them.
fn tree_of(index: Option<Index>, layers: Vec<OwnedFd>, ownership: &Ownership) -> Result<Arc<dyn Tree>> {
    if let Some(index) = index {
        return Ok(Arc::new(ImageTree::open(index, layers, ownership.clone(), Trust::default())?));
    }
    let [layer] = <[OwnedFd; 1]>::try_from(layers).map_err(|layers| {
        let why = format!("the image has {} layers and no index to merge them by", layers.len());
        Error::new(Kind::Unsupported, OP, "", why).hint("make it with `fsprov image index IMAGE`")
    })?;
    Ok(Arc::new(DirTree::open(layer, DirOptions::image(ownership.clone()), FdPool::new()?)?))
}

fn tree_of_places(image: &open::Image, ownership: &Ownership) -> Result<Arc<dyn Tree>> {
    let fail = |place: &Place, e| Error::sys("open", show(place.path()), e);
    let index = image
        .index
        .as_ref()
        .map(|place| place.for_reading().map_err(|e| fail(place, e)).and_then(|fd| Index::from_file(&fd.into())));
    let layer = |place: &Place| rustix::io::fcntl_dupfd_cloexec(place, 0).map_err(|e| fail(place, e));
    tree_of(index.transpose()?, image.layers.iter().map(layer).collect::<Result<_>>()?, ownership)
}

/// The name beside a source under which its content is made, for the `number`th volume of a rootfs.
fn stage_name(id: &ContainerId, number: usize) -> OsString {
    format!(".fsprov-copy-{id}.{number}").into()
}

/// Take away what a killed process left beside the sources.
pub(super) fn remove_stages(plan: &Plan) -> Result<()> {
    for (number, volume) in plan.volumes.iter().enumerate() {
        if let Some((parent, _)) = Place::parent_of(&volume.source) {
            let stage = stage_name(&plan.id, number);
            remove_tree_at(&parent, &stage, &parent.path().join(&stage))?;
        }
    }
    Ok(())
}

/// Fill the sources that are to be filled; then everything is there. One that was filled stays filled, whatever fails after it: it is
/// as new, and complete.
pub(super) fn fill(mut opened: Opened, planned: &Planned, paths: &StatePaths) -> Result<Places> {
    let plan = &planned.plan;
    let (mut tree, mut places) = (None, Vec::with_capacity(plan.volumes.len()));
    for (number, source) in std::mem::take(&mut opened.sources).into_iter().enumerate() {
        let (parent, name) = match source {
            Source::There(place) => {
                places.push(place);
                continue;
            }
            Source::ToFill(parent, name) => (parent, name),
        };
        let volume = &plan.volumes[number];
        // An empty directory that another rootfs has as a volume is not new: replaced, that one would lose it.
        if !is_used(paths, plan, &volume.source)? {
            let image = match &tree {
                Some(tree) => Arc::clone(tree),
                None => Arc::clone(tree.insert(tree_of_places(&opened.image, &plan.ownership)?)),
            };
            fill_one(&image, plan, number, &parent, &name)?;
        }
        let place = parent.child(&name).map_err(|e| Error::sys(OP, subject(volume), e))?;
        places.push(open::check_form(volume, place)?);
    }
    Ok(opened.complete(places))
}

/// Does another rootfs have this directory as a volume?
fn is_used(paths: &StatePaths, plan: &Plan, source: &Path) -> Result<bool> {
    let has_it = |r: &super::Record| r.plan.id != plan.id && r.plan.volumes.iter().any(|v| v.source == source);
    Ok(record::readable(paths)?.iter().any(has_it))
}

fn subject(volume: &Volume) -> String {
    format!("{} ({})", volume.target, show(&volume.source))
}

/// What is made, in the stage.
const CONTENT: &str = "content";

/// Fill the source of `plan`'s `number`th volume, `name` in `parent`, unless another did meanwhile. What is there and not an empty
/// directory stays.
fn fill_one(image: &Arc<dyn Tree>, plan: &Plan, number: usize, parent: &Place, name: &OsStr) -> Result<()> {
    let volume = &plan.volumes[number];
    let fail = |e: Errno| Error::sys(OP, subject(volume), e);
    let stage_name = stage_name(&plan.id, number);
    let from = route::target_attr(image, &volume.target)?;
    let clear = || remove_tree_at(parent, &stage_name, &parent.path().join(&stage_name)).map(|_| ());
    let filled = (|| {
        fault::point("fill.begin")?;
        // Nobody else can enter it: the owner of the directory that it lies in can only move it as a whole.
        let stage = make_private(parent, &stage_name).map_err(fail)?;
        let mut copy = Filler {
            tree: image,
            powers: volume.powers,
            links: HashMap::new(),
            closed: Vec::new(),
            top: None,
            partial: 0,
            devices: 0,
            left_out: LeftOut::default(),
        };
        let made = match &from {
            Some(attr) if FileType::from_raw_mode(attr.mode).is_file() => {
                let made = copy.file(attr, &stage, OsStr::new(CONTENT), &volume.source)?;
                fault::point("fill.attributes")?;
                copy.attributes(&of_source(attr), &made, &volume.source)?;
                made
            }
            _ => {
                let top = make_private(&stage, OsStr::new(CONTENT)).map_err(fail)?;
                copy.top = Some(top.try_clone().map_err(|e| Error::io(OP, subject(volume), e))?);
                if let Some(attr) = &from {
                    copy.directory(attr.node, &top, Path::new(""), MAX_DEPTH)?;
                    copy.close(&top).map_err(fail)?;
                    // A directory that is closed to its owner could not be moved into place.
                    copy.attributes(&Attr { mode: attr.mode | OPEN, ..of_source(attr) }, &top, Path::new("."))?;
                } else {
                    like_parent(parent, &top).map_err(fail)?;
                }
                top
            }
        };
        copy.tell(&volume.target);
        fault::point("fill.made")?;
        // What is renamed into place is what a power loss must not cut short.
        fs::syncfs(&stage).map_err(fail)?;
        put_in_place(parent, &stage, name, &made, volume)?;
        match &from {
            Some(attr) if of_source(attr).mode & OPEN != OPEN && FileType::from_raw_mode(attr.mode).is_dir() => {
                fs::fchmod(&made, Mode::from_raw_mode(of_source(attr).mode & 0o7777)).map_err(fail)
            }
            _ => Ok(()),
        }
    })();
    filled.map_err(|e| no_room(e, volume, parent).with_undo(clear()))?;
    // Gone already, except for what gave way to another one's content in the place.
    clear()
}

/// A full disk: which volume, which file system, and what it has left.
fn no_room(error: Error, volume: &Volume, parent: &Place) -> Error {
    let Some(Errno::NOSPC | Errno::DQUOT) = error.errno() else { return error };
    let left = parent.for_reading().and_then(fs::fstatvfs).map_or(0, |seen| (seen.f_bavail * seen.f_frsize) >> 20);
    let hint =
        format!("the file system of {} has {left} MiB left; make room, or choose another source", show(parent.path()));
    error.within("fill volume", subject(volume)).hint(hint)
}

/// A source's own mode is an image's choice of a mode on a host file.
fn of_source(attr: &Attr) -> Attr {
    Attr { mode: attr.mode & !(0o7777 & !open::FROM_IMAGE), ..*attr }
}

/// Where the image has nothing: as a missing source without `copy` is made.
fn like_parent(parent: &Place, top: &OwnedFd) -> rustix::io::Result<()> {
    let ((uid, gid), mine) = (parent.owner(), fs::fstat(top)?);
    if (uid, gid) != (mine.st_uid, mine.st_gid) {
        fs::fchown(top, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    fs::fchmod(top, Mode::from_raw_mode(0o755))
}

fn put_in_place(parent: &Place, stage: &OwnedFd, name: &OsStr, made: &OwnedFd, volume: &Volume) -> Result<()> {
    let fail = |e: Errno| Error::sys(OP, subject(volume), e);
    let is_dir = FileType::from_raw_mode(fs::fstat(made).map_err(fail)?.st_mode).is_dir();
    match fs::renameat_with(stage, CONTENT, parent, name, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // It exists. An empty directory is replaced in one step; anything else is somebody's data.
        Err(Errno::EXIST) if is_dir => match fs::renameat(stage, CONTENT, parent, name) {
            Ok(()) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => return Ok(()),
            Err(Errno::BUSY) => {
                return Err(Error::sys(OP, subject(volume), Errno::BUSY).hint(
                    "something is mounted on the source: give a directory below it, which is filled when it is missing",
                ));
            }
            Err(e) => return Err(fail(e)),
        },
        Err(Errno::EXIST) => return Ok(()),
        Err(e) => return Err(fail(e)),
    }
    fault::point("fill.placed")?;
    parent.for_reading().and_then(fs::fsync).map_err(fail)
}

/// What was just made under this name, in a directory that nobody else can enter.
fn open_made(dir: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// What was not copied because the volume's options do not let it work.
#[derive(Default)]
struct LeftOut {
    set_id: u64,
    devices: u64,
}

struct Filler<'a> {
    tree: &'a Arc<dyn Tree>,
    powers: Powers,
    /// First path of each inode with several names, below the top.
    links: HashMap<Node, PathBuf>,
    /// Directories that are closed to their owner, innermost first: open until the end.
    closed: Vec<(PathBuf, u32)>,
    top: Option<OwnedFd>,
    partial: u64,
    devices: u64,
    left_out: LeftOut,
}

/// One entry of a directory, as the tree tells it.
struct Item {
    name: OsString,
    attr: Attr,
}

impl Filler<'_> {
    fn tell(&self, target: &ContainerPath) {
        if self.partial > 0 {
            log::info!(target: TARGET, "volume {target}: {} files keep not all of their owners and attributes: this user may not set them", self.partial);
        }
        if self.devices > 0 {
            log::warn!(target: TARGET, "volume {target}: {} device nodes are left out: this user may not make them", self.devices);
        }
        let LeftOut { set_id, devices } = self.left_out;
        if set_id + devices > 0 {
            log::warn!(
                target: TARGET,
                "volume {target}: {set_id} files and directories are copied without setuid, setgid and capabilities, and {devices} device \
                 nodes are left out: the volume lies on the host, where they would work for everyone who reaches it (options suid and dev \
                 keep them)"
            );
        }
    }

    fn items(&self, node: Node) -> std::result::Result<Vec<Item>, Errno> {
        let opened = self.tree.opendir(&ME, node)?;
        let (mut items, mut cookie) = (Vec::new(), 0);
        let mut read_all = || loop {
            let before = items.len();
            let mut last = cookie;
            self.tree.readdir(&ME, node, opened.handle, cookie, ListMode::Plus, &mut |item| {
                last = item.cookie;
                if let Some(entry) = item.entry {
                    items.push(Item { name: item.name.to_owned(), attr: entry.attr });
                }
                Fit::Taken
            })?;
            if last == cookie || items.len() == before {
                return Ok(());
            }
            cookie = last;
        };
        let result: std::result::Result<(), Errno> = read_all();
        self.tree.releasedir(node, opened.handle);
        result.map(|()| items)
    }

    /// After what is made in it, which changes its times. Its mode waits for the end where it would shut us out.
    fn directory_attributes(&mut self, attr: &Attr, dir: &OwnedFd, path: &Path) -> Result<()> {
        if attr.mode & OPEN != OPEN {
            let kept = if self.powers.suid { 0o7777 } else { 0o1777 };
            self.closed.push((path.to_owned(), attr.mode & kept));
        }
        self.attributes(&Attr { mode: attr.mode | OPEN, ..*attr }, dir, path)
    }

    fn close(&self, top: &OwnedFd) -> rustix::io::Result<()> {
        for (path, mode) in &self.closed {
            let dir = open_beneath(top, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            fs::fchmod(&dir, Mode::from_raw_mode(*mode))?;
        }
        Ok(())
    }

    fn directory(&mut self, node: Node, to: &OwnedFd, path: &Path, depth_left: usize) -> Result<()> {
        let fail = |e| Error::sys(OP, show(Path::new("/").join(path)), e);
        if depth_left == 0 {
            return Err(Error::new(Kind::Limit, OP, show(path), "it is more than 400 levels deep"));
        }
        for Item { name, attr } in self.items(node).map_err(fail)? {
            let path = path.join(&name);
            let copied = self.entry(&attr, to, &name, &path, depth_left);
            self.tree.forget(attr.node, 1);
            copied?;
        }
        Ok(())
    }

    fn entry(&mut self, attr: &Attr, to: &OwnedFd, name: &OsStr, path: &Path, depth_left: usize) -> Result<()> {
        let fail = |e| Error::sys(OP, show(path), e);
        let kind = FileType::from_raw_mode(attr.mode);
        if (kind.is_char_device() || kind.is_block_device()) && self.powers.dev != Some(true) {
            self.left_out.devices += 1;
            return Ok(());
        }
        if !kind.is_dir() && attr.nlink > 1 {
            if let Some(first) = self.links.get(&attr.node) {
                return self.link(first, to, name).map_err(fail);
            }
            if self.links.len() < MAX_LINKED {
                self.links.insert(attr.node, path.to_owned());
            }
        }
        match kind {
            FileType::Directory => {
                fs::mkdirat(to, name, Mode::RWXU).map_err(fail)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let below = fs::openat(to, name, flags, Mode::empty()).map_err(fail)?;
                self.directory(attr.node, &below, path, depth_left - 1)?;
                return self.directory_attributes(attr, &below, path);
            }
            FileType::RegularFile => {
                let made = self.file(attr, to, name, path)?;
                return self.attributes(attr, &made, path);
            }
            FileType::Symlink => {
                let mut text = Vec::new();
                self.tree.readlink(attr.node, &mut |bytes| text.extend_from_slice(bytes)).map_err(fail)?;
                fs::symlinkat(OsString::from_vec(text), to, name).map_err(fail)?;
            }
            special => match fs::mknodat(to, name, special, Mode::RUSR | Mode::WUSR, attr.rdev.into()) {
                Ok(()) => {}
                Err(Errno::PERM) => {
                    self.devices += 1;
                    self.links.remove(&attr.node);
                    return Ok(());
                }
                Err(e) => return Err(fail(e)),
            },
        }
        self.attributes(attr, &open_made(to, name).map_err(fail)?, path)
    }

    fn link(&self, first: &Path, to: &OwnedFd, name: &OsStr) -> rustix::io::Result<()> {
        let top = self.top.as_ref().ok_or(Errno::NOENT)?;
        let (dir, file) = (first.parent().unwrap_or(Path::new("")), first.file_name().unwrap_or_default());
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let dir = open_beneath(top, dir, OFlags::PATH | OFlags::DIRECTORY)?;
        fs::linkat(&dir, file, to, name, AtFlags::empty())
    }

    /// A new file with the content of the image's.
    fn file(&self, attr: &Attr, to: &OwnedFd, name: &OsStr, path: &Path) -> Result<OwnedFd> {
        let fail = |e| Error::sys(OP, show(path), e);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let out = fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        if attr.size == 0 {
            return Ok(out);
        }
        let opened = self.tree.open(&ME, attr.node, libc::O_RDONLY).map_err(fail)?;
        let copied = self.content(attr, opened.handle, &out);
        self.tree.release(attr.node, opened.handle);
        copied.map(|()| out).map_err(fail)
    }

    fn content(&self, attr: &Attr, handle: u64, out: &OwnedFd) -> rustix::io::Result<()> {
        let mut at = 0;
        while at < attr.size {
            let mut read = Ok(0);
            self.tree.read(attr.node, handle, at, PIECE, &mut |bytes| {
                read = if bytes.iter().all(|&b| b == 0) { Ok(bytes.len()) } else { write_all(out, bytes, at) };
            })?;
            match read? {
                // Shorter than its index says: damage, not an end.
                0 => return Err(Errno::IO),
                n => at += n as u64,
            }
        }
        fs::ftruncate(out, attr.size)
    }

    fn attributes(&mut self, attr: &Attr, to: &OwnedFd, path: &Path) -> Result<()> {
        let fail = |e| Error::sys(OP, show(path), e);
        let there = fs::fstat(to).map_err(fail)?;
        let time = |time: tree::Timespec| Timespec { tv_sec: time.secs, tv_nsec: time.nanos.into() };
        let stat = attrs::described(there, (attr.mode, attr.uid, attr.gid), time(attr.mtime), time(attr.atime));
        let xattrs = self.xattrs(attr.node).map_err(fail)?;
        let xattrs: Vec<_> = xattrs.iter().map(|(name, value)| (name.clone(), value.as_slice())).collect();
        let set_id = if self.powers.suid { SetId::Kept } else { SetId::Dropped };
        let is_set_id = attr.mode & SET_ID != 0 && !FileType::from_raw_mode(attr.mode).is_symlink()
            || xattrs.iter().any(|(name, _)| name.as_bytes() == attrs::CAPABILITY);
        self.left_out.set_id += u64::from(set_id == SetId::Dropped && is_set_id);
        let set = attrs::set(&xattrs, &stat, to, set_id).map_err(fail)?;
        self.partial += u64::from(set == Fidelity::Partial);
        Ok(())
    }

    fn xattrs(&self, node: Node) -> rustix::io::Result<Vec<(CString, Vec<u8>)>> {
        if self.tree.is_without_xattrs() {
            return Ok(Vec::new());
        }
        let mut names = Vec::new();
        match self.tree.listxattr(node, &mut |bytes| names.extend_from_slice(bytes)) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        }
        let mut xattrs = Vec::new();
        for name in names.split(|&b| b == 0).filter(|name| !name.is_empty()) {
            let mut value = Vec::new();
            match self.tree.getxattr(&ME, node, OsStr::from_bytes(name), &mut |bytes| value.extend_from_slice(bytes)) {
                Ok(()) => xattrs.push((CString::new(name).map_err(|_| Errno::INVAL)?, value)),
                // Not for us to read (security.*, trusted.*): then it is not for us to set.
                Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(xattrs)
    }
}

fn write_all(out: &OwnedFd, bytes: &[u8], at: u64) -> rustix::io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(out, &bytes[done..], at + done as u64) {
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
