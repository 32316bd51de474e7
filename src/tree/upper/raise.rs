//! Copying up: what is to be changed is made in the work directory, with content, owner, mode, times and attributes of the image's file, and
//! moved to its place when it is whole. What a killed server left in the work directory is brought to an end by the next one.
//!
//! All names that the image has for one file go up together: first they are links to a copy named `group.NODE` in the work directory, so
//! that after a kill the rest can be made. The times of the directories that copies come to stay as they were.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, Timestamps};

use super::marks::{self, Above, Names};
use super::owners::{self, Owner, Owners, PERMISSION_BITS};
use super::veils::Veils;
use super::{DIRECTORY, MADE, REGULAR, SERVER, Side, TARGET, TYPE_BITS, UPPER, UpperTree, WORK, step};
use crate::sys::attrs::{self, SetId};
use crate::tree::dir::SET_ID;
use crate::tree::image::ImageTree;
use crate::tree::resend::aside;
use crate::tree::{Attr, Caller, Change, Errno, Lookup, Node, ROOT, Result, Tree as _};

/// Begins the name of a copy that has several names to get.
const GROUP: &str = "group.";
/// Bytes read at once where the kernel cannot copy by itself.
const BUFFER: usize = 256 << 10;
/// Bytes asked of one copy_file_range(2).
const RANGE: usize = 64 << 20;

/// How many files can be copied up at once: more than a server has threads.
const FILES: usize = 16;

/// Locks while something is copied up, few of which are held at a time.
#[derive(Debug, Default)]
pub(super) struct Locks {
    directories: Mutex<()>,
    files: [Mutex<()>; FILES],
}

impl Locks {
    /// For a directory, which is quick.
    fn directories(&self) -> MutexGuard<'_, ()> {
        self.directories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For this file.
    pub(super) fn file(&self, node: Node) -> MutexGuard<'_, ()> {
        self.files[node as usize % FILES].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What of a file's content goes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// All of it.
    Whole,
    /// Nothing: it is about to be cut to nothing.
    Empty,
    /// Nothing, where the image can go on to have it: only attributes or names change.
    Bare,
}

/// Where to look whether a name is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// In the upper directory.
    Above,
    /// Nowhere: who gives the name to a copy is told.
    Nowhere,
}

/// A name in an upper directory.
struct Home {
    place: Arc<OwnedFd>,
    dir: Node,
    name: Vec<u8>,
}

/// The names of a file of the image.
#[derive(Default)]
struct Homes {
    /// Those that still lead to it.
    free: Vec<Home>,
    /// One that leads to its copy.
    copied: Option<Home>,
}

/// Make the upper directory itself where it is missing: it looks like the root of the image. Gives what is known of the veils in it.
pub(super) fn make_top(lower: &ImageTree, place: &OwnedFd, work: &OwnedFd, owners: Owners) -> Result<Veils> {
    if marks::look(place, UPPER.as_bytes())? != Above::Nothing {
        return Ok(Veils::unknown());
    }
    empty_work(work, |name| name == UPPER.as_bytes())?;
    fs::mkdirat(work, UPPER, Mode::RWXU)?;
    let made = marks::open_directory(work, UPPER.as_bytes())?;
    imitate(lower, &lower.getattr(ROOT, None)?.0, &made, owners)?;
    fs::renameat(work, UPPER, place, UPPER)?;
    Ok(Veils::none())
}

/// Remove these names from the work directory: files, links, and directories, which are empty there.
fn empty_work(work: &OwnedFd, is_ours: impl Fn(&[u8]) -> bool) -> Result<()> {
    for name in work_names(work)?.iter().filter(|name| is_ours(name)) {
        match fs::unlinkat(work, &name[..], AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => fs::unlinkat(work, &name[..], AtFlags::REMOVEDIR)?,
            other => other?,
        }
    }
    Ok(())
}

fn work_names(work: &OwnedFd) -> Result<Vec<Vec<u8>>> {
    let names = marks::entries(work)?.map(|entry| entry.map(|e| e.file_name().to_bytes().to_vec()));
    Ok(names.collect::<Result<Vec<_>>>()?.into_iter().filter(|n| !matches!(&n[..], b"." | b"..")).collect())
}

/// Give a copy this owner and mode, these times, and the attributes of the image's file. An O_PATH descriptor will do.
fn imitate(lower: &ImageTree, attr: &Attr, copy: impl AsFd, owners: Owners) -> Result<()> {
    let node = attr.node;
    let made = fs::fstat(&copy)?;
    let mut stat = made;
    let owner = Owner::of(attr);
    let mode = match owners {
        Owners::Set => {
            (stat.st_uid, stat.st_gid) = (owner.uid, owner.gid);
            attr.mode
        }
        Owners::Noted => owners::mode_on_disk(attr.mode),
    };
    stat.st_mode = attr.mode & TYPE_BITS | mode & PERMISSION_BITS;
    (stat.st_atime, stat.st_atime_nsec) = (attr.atime.secs as _, attr.atime.nanos.into());
    (stat.st_mtime, stat.st_mtime_nsec) = (attr.mtime.secs as _, attr.mtime.nanos.into());
    let mut xattrs = lower.xattrs_of(node)?;
    let shown = Owner { uid: stat.st_uid, gid: stat.st_gid, mode: mode & PERMISSION_BITS };
    if owners == Owners::Noted && shown != owner && matches!(attr.mode & TYPE_BITS, DIRECTORY | REGULAR) {
        let (uid, gid) = lower.owner_of(node)?;
        xattrs.push((marks::owner_name(), Owner { uid, gid, ..owner }.text().into_bytes()));
    }
    let xattrs: Vec<(CString, &[u8])> = xattrs.iter().map(|(name, value)| (name.clone(), &value[..])).collect();
    if xattrs.is_empty() && stat.st_mode == made.st_mode && mode & SET_ID == 0 {
        return attrs::set_owner_and_times(&stat, copy).map(drop);
    }
    attrs::set(&xattrs, &stat, copy, SetId::Kept).map(drop)
}

/// What the times of a directory were, to be put back.
struct Times(Timestamps);

impl Times {
    fn of(dir: impl AsFd) -> Result<Self> {
        let stat = fs::fstat(dir)?;
        Ok(Times(Timestamps {
            last_access: fs::Timespec { tv_sec: stat.st_atime as _, tv_nsec: stat.st_atime_nsec as _ },
            last_modification: fs::Timespec { tv_sec: stat.st_mtime as _, tv_nsec: stat.st_mtime_nsec as _ },
        }))
    }

    fn put_back(&self, dir: impl AsFd) {
        let path = marks::path_of(dir, b".");
        if let Err(e) = fs::utimensat(fs::CWD, &path[..], &self.0, AtFlags::empty()) {
            log::debug!(target: TARGET, "put a directory's times back: {e}");
        }
    }
}

impl UpperTree {
    /// The upper file of a node of the image, copied up if it was not. One that has no name any more gets none.
    pub(super) fn raise(&self, lower: Node, content: Content) -> Result<Node> {
        if let Some(upper) = self.pairs.upper(lower) {
            return Ok(upper);
        }
        let (attr, _) = self.lower.getattr(lower, None)?;
        if attr.mode & TYPE_BITS == DIRECTORY {
            return self.raise_directory(lower)?.ok_or(Errno::STALE);
        }
        self.raise_file(&attr, &attr, content).map(|(upper, _)| upper)
    }

    /// Copy up a file of the image whose owner alone changes, with the new one from the start. `None`: it takes more than that.
    pub(super) fn raise_given(&self, caller: &Caller, node: Node, change: &Change) -> Result<Option<(Attr, Duration)>> {
        // Whether another may give it away the file system decides.
        let is_owner_alone = Change { uid: None, gid: None, ..*change } == Change::default() && caller.uid == 0;
        let Side::Lower(lower) = self.side(node) else { return Ok(None) };
        if self.owners != Owners::Set || !is_owner_alone {
            return Ok(None);
        }
        let (attr, _) = self.lower.getattr(lower, None)?;
        // A program loses setuid and capabilities when it is given away, and a directory is made in another way.
        let is_plain = attr.mode & TYPE_BITS != DIRECTORY && attr.mode & SET_ID == 0 && !self.has_capability(lower)?;
        if !is_plain {
            return Ok(None);
        }
        let given = Attr { uid: change.uid.unwrap_or(attr.uid), gid: change.gid.unwrap_or(attr.gid), ..attr };
        let (upper, is_made) = self.raise_file(&attr, &given, Content::Bare)?;
        if !is_made {
            return Ok(None);
        }
        // Not while its times are put back.
        let _alone = self.locks.file(lower);
        let (attr, ttl) = self.upper.getattr(upper, None)?;
        // A file system that refuses it is asked once more, for its reason.
        if (attr.uid, attr.gid) != (given.uid, given.gid) {
            return Ok(None);
        }
        Ok(Some((self.attr_above(node, upper, attr)?, ttl)))
    }

    /// The copy of a file of the image, made to look `given` if there was none: was it made?
    fn raise_file(&self, attr: &Attr, given: &Attr, content: Content) -> Result<(Node, bool)> {
        let lower = attr.node;
        let _alone = self.locks.file(lower);
        if let Some(upper) = self.pairs.upper(lower) {
            return Ok((upper, false));
        }
        // A single name is given to the copy only if it is free.
        let look = if attr.nlink == 1 { Look::Nowhere } else { Look::Above };
        let Homes { free, copied } = self.homes(attr, look)?;
        if let Some(home) = copied {
            return Ok((self.pair(lower, home.dir, &home.name, None)?, false));
        }
        let staged = format!("{}", self.staged.fetch_add(1, Ordering::Relaxed));
        let settled =
            self.stage(given, &staged, content).and_then(|is_bare| self.settle(attr, &staged, &free, is_bare));
        if !matches!(settled, Ok((_, true))) {
            let _ = fs::unlinkat(&self.work, &staged, AtFlags::empty());
        }
        settled
    }

    /// The names that the image has for a file.
    fn homes(&self, attr: &Attr, look: Look) -> Result<Homes> {
        let lower = attr.node;
        let mut homes = Homes::default();
        for (dir, name) in self.lower.names_of(lower)? {
            let Some(dir) = self.raise_directory(dir)? else { continue };
            let place = self.upper.place(dir)?;
            let above = match look {
                Look::Above => marks::look(&place, &name)?,
                Look::Nowhere => Above::Nothing,
            };
            match above {
                Above::Nothing if !self.veils.hides(&place, &name)? => homes.free.push(Home { place, dir, name }),
                Above::File(_) if self.is_copy(lower, attr, &place, &name)? => {
                    homes.copied = Some(Home { place, dir, name });
                }
                _ => {}
            }
        }
        Ok(homes)
    }

    /// A server that was killed may have made this copy, and told nobody that it stands for a file that the kernel knows.
    pub(super) fn take_over_copy(&self, lower: Node, dir: Node, place: &OwnedFd, name: &[u8]) -> Result<()> {
        let (attr, _) = self.lower.getattr(lower, None)?;
        let is_known = attr.mode & TYPE_BITS == DIRECTORY || self.pairs.upper(lower).is_some();
        if !is_known && self.is_copy(lower, &attr, place, name)? {
            self.pair(lower, dir, name, None)?;
        }
        Ok(())
    }

    /// Is this upper file the copy of one of the image that a server made which was killed then? What has no attributes is told by all else.
    fn is_copy(&self, lower: Node, attr: &Attr, place: &OwnedFd, name: &[u8]) -> Result<bool> {
        let copy = fs::openat(place, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = fs::fstat(&copy)?;
        if stat.st_mode & TYPE_BITS != attr.mode & TYPE_BITS {
            return Ok(false);
        }
        if stat.st_mode & TYPE_BITS == REGULAR {
            let told = marks::origin(&marks::path_of(place, name), self.upper.number_of(&copy)?)?;
            return Ok(told.is_some_and(|origin| origin.lower == lower));
        }
        let same_time = (stat.st_mtime, stat.st_mtime_nsec as u32) == (attr.mtime.secs, attr.mtime.nanos);
        if stat.st_mode & TYPE_BITS != libc::S_IFLNK {
            return Ok(same_time && stat.st_rdev == crate::tree::dir::device(attr.rdev));
        }
        let mut target = Vec::new();
        self.lower.readlink(lower, &mut |bytes| target.extend_from_slice(bytes))?;
        Ok(same_time && fs::readlinkat(place, name, Vec::new())?.as_bytes() == target)
    }

    /// The upper half of a directory of the image, made where it is missing. `None`: its name leads elsewhere by now.
    pub(super) fn raise_directory(&self, lower: Node) -> Result<Option<Node>> {
        if let Some(upper) = self.pairs.upper(lower) {
            return Ok(Some(upper));
        }
        let (parent, name) = self.lower.home(lower)?;
        let Some(parent) = self.raise_directory(parent)? else { return Ok(None) };
        let _alone = self.locks.directories();
        if let Some(upper) = self.pairs.upper(lower) {
            return Ok(Some(upper));
        }
        let place = self.upper.place(parent)?;
        match self.half(&place, &name)? {
            // There, and nobody asked for it since the server began.
            Some(true) => {}
            Some(false) => self.make_directory(lower, &place, &name)?,
            None => return Ok(None),
        }
        self.pair(lower, parent, &name, None).map(Some)
    }

    /// Has a directory of the image an upper half under this name? `None`: something else has its name.
    fn half(&self, place: &OwnedFd, name: &[u8]) -> Result<Option<bool>> {
        Ok(match marks::look(place, name)? {
            Above::File(mode) if mode & TYPE_BITS == DIRECTORY => {
                (!marks::is_opaque(&marks::path_of(place, name))?).then_some(true)
            }
            Above::Nothing if !self.veils.hides(place, name)? => Some(false),
            _ => None,
        })
    }

    /// Copy up a directory with all that is seen in it. Nothing of the image comes back meanwhile, so all of it is above then.
    pub(super) fn raise_all(&self, top: Node) -> Result<Node> {
        let mut waiting = vec![top];
        while let Some(lower) = waiting.pop() {
            // An opaque one below the top, or what is not a directory above, shows nothing of the image.
            let Some(dir) = self.raise_directory(lower)? else { continue };
            let place = self.upper.place(dir)?;
            let above = Names::of(&place)?;
            for name in self.lower.names_in(lower)?.into_iter().filter(|name| !marks::is_reserved(name)) {
                let Some((child, mode)) = self.below(Some(lower), &name)? else { continue };
                match mode & TYPE_BITS {
                    _ if above.hidden.contains(&name) => {}
                    // Where another has its name, its own half may be one that was removed, and somebody is in it.
                    DIRECTORY if self.half(&place, &name)?.is_none() => {}
                    DIRECTORY => waiting.push(child),
                    _ if above.shown.contains_key(&name) => {}
                    _ => drop(self.raise(child, Content::Bare)?),
                }
                step("upper.raised")?;
            }
        }
        self.pairs.upper(top).ok_or(Errno::STALE)
    }

    fn make_directory(&self, lower: Node, place: &OwnedFd, name: &[u8]) -> Result<()> {
        let staged = format!("{}", self.staged.fetch_add(1, Ordering::Relaxed));
        fs::mkdirat(&self.work, &staged, Mode::RWXU)?;
        let times = Times::of(place)?;
        let made = marks::open_directory(&self.work, staged.as_bytes())
            .and_then(|made| imitate(&self.lower, &self.lower.getattr(lower, None)?.0, made, self.owners))
            .and_then(|()| step("upper.directory"))
            .and_then(|()| fs::renameat_with(&self.work, &staged, place, name, RenameFlags::NOREPLACE));
        times.put_back(place);
        made.inspect_err(|_| {
            let _ = fs::unlinkat(&self.work, &staged, AtFlags::REMOVEDIR);
        })
    }

    /// `name` in the upper directory `dir` stands for a node of the image from now on. `is_bare`: does its content stay in the image? `None`: ask the file.
    fn pair(&self, lower: Node, dir: Node, name: &[u8], is_bare: Option<bool>) -> Result<Node> {
        // Lists that were read before lack it: they would show the image's again once the kernel forgets it, and the pair with it.
        self.changes.fetch_add(1, Ordering::Relaxed);
        let Lookup::Found(entry) = self.upper.lookup(&SERVER, dir, OsStr::from_bytes(name))? else {
            return Err(Errno::STALE);
        };
        let upper = entry.attr.node;
        if upper & MADE != 0 {
            self.upper.forget(upper, 1);
            return Err(Errno::NFILE);
        }
        self.no_set_id.remove(&upper);
        let told = match (is_bare, entry.attr.mode & TYPE_BITS) {
            (Some(is_bare), _) => Ok(is_bare),
            (None, REGULAR) => self
                .upper
                .with_path(upper, |path| marks::origin(path.as_bytes(), upper))
                .map(|told| told.is_some_and(|origin| origin.is_bare)),
            (None, _) => Ok(false),
        };
        let is_bare = told.inspect_err(|_| self.upper.forget(upper, 1))?;
        match self.pairs.join(lower, upper, 0, is_bare) {
            super::pairs::Joined::New => Ok(upper),
            super::pairs::Joined::Known => {
                self.upper.forget(upper, 1);
                Ok(upper)
            }
            super::pairs::Joined::Taken => {
                self.upper.forget(upper, 1);
                self.pairs.upper(lower).ok_or(Errno::STALE)
            }
        }
    }

    /// Make a whole copy in the work directory: does the image keep its content?
    fn stage(&self, attr: &Attr, staged: &str, content: Content) -> Result<bool> {
        let lower = attr.node;
        let mut is_bare = false;
        let kind = FileType::from_raw_mode(attr.mode);
        let path_flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let copy = match kind {
            FileType::RegularFile => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(owners::mode_on_disk(attr.mode & (TYPE_BITS | 0o777)));
                let copy = fs::openat(&self.work, staged, flags, mode)?;
                step("upper.staged")?;
                is_bare = self.stage_content(attr, staged, &copy, content)?;
                copy
            }
            FileType::Symlink => {
                let mut target = Vec::new();
                self.lower.readlink(lower, &mut |bytes| target.extend_from_slice(bytes))?;
                fs::symlinkat(&target[..], &self.work, staged)?;
                fs::openat(&self.work, staged, path_flags, Mode::empty())?
            }
            special => {
                fs::mknodat(&self.work, staged, special, Mode::RUSR | Mode::WUSR, crate::tree::dir::device(attr.rdev))?;
                fs::openat(&self.work, staged, path_flags, Mode::empty())?
            }
        };
        imitate(&self.lower, attr, &copy, self.owners)?;
        if self.durable && kind == FileType::RegularFile {
            fs::fsync(&copy)?;
        }
        step("upper.copied")?;
        Ok(is_bare)
    }

    /// What goes up of a file's content, and what is said of that: does it stay where it is?
    fn stage_content(&self, attr: &Attr, staged: &str, copy: &OwnedFd, content: Content) -> Result<bool> {
        let lower = attr.node;
        let path = marks::path_of(&self.work, staged.as_bytes());
        let upper = self.upper.number_of(copy)?;
        if content == Content::Bare && self.may_be_bare(lower, attr)? {
            let origin = marks::Origin { is_bare: true, ..marks::Origin::of_copy(lower, upper) };
            // Without attributes, or room for one, it is copied.
            if origin.write(&path).is_ok() {
                return fs::ftruncate(copy, attr.size).map(|()| true);
            }
        }
        if content != Content::Empty {
            copy_content(&self.lower.content_fd(lower)?, copy, attr.size)?;
        }
        marks::set_origin(&path, lower, upper).map(|()| false)
    }

    /// Move a whole copy to its place, or its places. False, and the copy that there was, if a server that was killed had made one.
    fn settle(&self, attr: &Attr, staged: &str, homes: &[Home], is_bare: bool) -> Result<(Node, bool)> {
        let lower = attr.node;
        let pair = |dir, name: &[u8]| self.pair(lower, dir, name, Some(is_bare)).map(|upper| (upper, true));
        if let [home] = homes {
            let times = Times::of(&home.place)?;
            let moved = fs::renameat_with(&self.work, staged, &home.place, &home.name[..], RenameFlags::NOREPLACE);
            times.put_back(&home.place);
            match moved {
                Ok(()) => {
                    step("upper.settled")?;
                    return pair(home.dir, &home.name);
                }
                Err(Errno::EXIST) => {
                    if let Some(home) = self.homes(attr, Look::Above)?.copied {
                        return Ok((self.pair(lower, home.dir, &home.name, None)?, false));
                    }
                    // It lost its name meanwhile.
                }
                Err(e) => return Err(e),
            }
        } else if !homes.is_empty() {
            let group = format!("{GROUP}{lower}");
            fs::renameat(&self.work, staged, &self.work, &group)?;
            step("upper.group")?;
            let linked = self.link_group(&group, homes)?;
            if let Some(home) = linked {
                let upper = pair(home.dir, &home.name)?;
                fs::unlinkat(&self.work, &group, AtFlags::empty())?;
                return Ok(upper);
            }
            fs::renameat(&self.work, &group, &self.work, staged)?;
        }
        // Without a name, held as long as somebody has it open.
        let Lookup::Found(work) = self.upper.lookup(&SERVER, ROOT, OsStr::new(WORK))? else { return Err(Errno::STALE) };
        let upper = pair(work.attr.node, staged.as_bytes());
        let removed = aside(|| self.upper.unlink(&SERVER, work.attr.node, OsStr::new(staged)));
        self.upper.forget(work.attr.node, 1);
        removed.and(upper)
    }

    /// Link a copy to its places; gives one of them.
    fn link_group<'a>(&self, group: &str, homes: &'a [Home]) -> Result<Option<&'a Home>> {
        let mut linked = None;
        for home in homes {
            let times = Times::of(&home.place)?;
            let made = fs::linkat(&self.work, group, &home.place, &home.name[..], AtFlags::empty());
            times.put_back(&home.place);
            match made {
                Ok(()) => linked = Some(home),
                // Made by the server that was killed, or taken by another file.
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e),
            }
            step("upper.linked")?;
        }
        Ok(linked)
    }

    /// Bring to an end what an earlier server left in the work directory.
    pub(super) fn finish_work(&self) -> Result<()> {
        for name in work_names(&self.work)? {
            let lower = std::str::from_utf8(&name).ok().and_then(|n| n.strip_prefix(GROUP)?.parse::<Node>().ok());
            if let (Some(lower), Ok(group)) = (lower, std::str::from_utf8(&name)) {
                let homes = self.homes(&self.lower.getattr(lower, None)?.0, Look::Above)?;
                self.link_group(group, &homes.free)?;
            }
        }
        empty_work(&self.work, |_| true)
    }

    /// Go on after an earlier server: of every upper file that the kernel knows, which of the image it stands for.
    pub(super) fn go_on(&self) {
        let known: HashMap<Node, _> = self.upper.known().into_iter().map(|known| (known.node, known)).collect();
        for node in known.keys() {
            let found = self.lower_again(*node, &known, 0);
            if let Err(e) = found {
                log::warn!(target: TARGET, "what {node:x} was copied from: {e}");
            }
        }
    }

    fn lower_again(
        &self,
        upper: Node,
        known: &HashMap<Node, crate::tree::dir::Known>,
        depth: usize,
    ) -> Result<Option<Node>> {
        if let Some(lower) = self.pairs.lower(upper) {
            return Ok(Some(lower));
        }
        let Some(file) = known.get(&upper).filter(|_| depth < crate::index::MAX_DEPTH) else { return Ok(None) };
        let lower = match (file.kind, &file.name) {
            (REGULAR, _) => self.upper.with_path(upper, |path| self.told(path.as_bytes(), upper))?,
            (_, Some((dir, name))) => {
                let lower_dir = self.lower_again(*dir, known, depth + 1)?;
                // Removed, and held by a program that is in it: nothing is looked for in it any more.
                let Ok(place) = self.upper.place(*dir) else { return Ok(None) };
                match self.lower_of(lower_dir, &place, name, (upper, file.kind))? {
                    None if file.kind != DIRECTORY => self.copied_from(lower_dir, &place, name)?,
                    found => found,
                }
            }
            _ => None,
        };
        if let Some((lower, is_bare)) = lower {
            // How often the kernel was told is not known; it gives all back at once, and that is at least one.
            self.pairs.join(lower, upper, 1, is_bare);
        }
        Ok(lower.map(|(lower, _)| lower))
    }

    /// What has no place for an attribute, a FIFO, a device or a symlink: the kernel may know it by the number of the image's.
    fn copied_from(&self, lower_dir: Option<Node>, place: &OwnedFd, name: &[u8]) -> Result<Option<(Node, bool)>> {
        let Some((lower, _)) = self.below(lower_dir, name)? else { return Ok(None) };
        let is_copy = self.is_copy(lower, &self.lower.getattr(lower, None)?.0, place, name)?;
        Ok(is_copy.then_some((lower, false)))
    }
}

/// Copy a file's content with its holes. The file systems share the blocks where they can (copy_file_range(2)).
pub(super) fn copy_content(from: &OwnedFd, to: &OwnedFd, size: u64) -> Result<()> {
    let mut at = 0;
    while at < size {
        let data = match fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            // A file system that does not tell of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e),
        };
        let end = fs::seek(from, SeekFrom::Hole(data)).unwrap_or(size).min(size);
        copy_range(from, to, data, end)?;
        at = end.max(data + 1);
    }
    fs::ftruncate(to, size)
}

fn copy_range(from: &OwnedFd, to: &OwnedFd, start: u64, end: u64) -> Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let length = (end - read_at).min(RANGE as u64) as usize;
        match fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), length) {
            Ok(0) => return Err(Errno::IO),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
                return copy_bytes(from, to, read_at, end);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn copy_bytes(from: &OwnedFd, to: &OwnedFd, mut at: u64, end: u64) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    while at < end {
        let length = (end - at).min(BUFFER as u64) as usize;
        let got = rustix::io::retry_on_intr(|| rustix::io::pread(from, &mut buffer[..length], at))?;
        if got == 0 {
            return Err(Errno::IO);
        }
        let mut rest = &buffer[..got];
        while !rest.is_empty() {
            let done = rustix::io::retry_on_intr(|| rustix::io::pwrite(to, rest, at))?;
            at += done as u64;
            rest = &rest[done..];
        }
    }
    Ok(())
}
