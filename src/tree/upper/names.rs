//! Names: looking them up in both halves of a directory, making, moving and removing them.
//!
//! Each change is one of the directory tree's operations, which sees to callers, to files that are open, and to requests that are sent again.
//! Around it go the marks, so that what is shown is at every step what was before or what will be after ([`marks`]). A request that was
//! sent again finds the marks that its first coming made, and makes the others.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::Ordering;

use super::marks::{self, Above, Names};
use super::owners::Owners;
use super::pairs::Joined;
use super::spot::{Spot, is_directory};
use super::{Content, DIRECTORY, MADE, REGULAR, SERVER, Side, TARGET, TYPE_BITS, UpperTree, numbered};
use crate::tree::resend::is_resent;
use crate::tree::{Attr, Caller, Entry, Errno, FOREVER, Lookup, New, Node, Opened, Result, Tree as _};

/// A name that a program may give: not one that would be a mark.
fn proper(name: &OsStr) -> Result<()> {
    if marks::is_reserved(name.as_bytes()) { Err(Errno::INVAL) } else { Ok(()) }
}

impl UpperTree {
    /// What the image has under a name: node and mode.
    pub(super) fn below(&self, lower_dir: Option<Node>, name: &[u8]) -> Result<Option<(Node, u32)>> {
        let Some(dir) = lower_dir else { return Ok(None) };
        match self.lower.lookup(&SERVER, dir, OsStr::from_bytes(name))? {
            Lookup::Found(entry) => Ok(Some((entry.attr.node, entry.attr.mode))),
            Lookup::Absent(_) => Ok(None),
        }
    }

    pub(super) fn find(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<Lookup> {
        if marks::is_reserved(name.as_bytes()) {
            return Ok(Lookup::Absent(FOREVER));
        }
        let halves = self.halves(parent);
        let Some(dir) = halves.upper else {
            return self.lower.lookup(caller, parent, name).and_then(|found| self.found_below(found));
        };
        if let Lookup::Found(entry) = self.upper.lookup(caller, dir, name)? {
            if marks::is_whiteout(entry.attr.mode, entry.attr.rdev) {
                self.upper.forget(entry.attr.node, 1);
                return Ok(Lookup::Absent(FOREVER));
            }
            let place = self.upper.place(dir)?;
            return self.entry_above(halves.lower, &place, name.as_bytes(), entry).map(Lookup::Found);
        }
        let Some(lower_dir) = halves.lower else { return Ok(Lookup::Absent(FOREVER)) };
        match self.lower.lookup(caller, lower_dir, name)? {
            Lookup::Found(_) if self.veils.hides(self.upper.place(dir)?, name.as_bytes())? => {
                Ok(Lookup::Absent(FOREVER))
            }
            found => self.found_below(found),
        }
    }

    fn found_below(&self, found: Lookup) -> Result<Lookup> {
        match found {
            Lookup::Found(entry) => self.entry_below(entry).map(Lookup::Found),
            absent @ Lookup::Absent(_) => Ok(absent),
        }
    }

    /// An entry that the image alone has, told to the kernel.
    pub(super) fn entry_below(&self, mut entry: Entry) -> Result<Entry> {
        let node = entry.attr.node;
        if let Some(upper) = self.pairs.upper(node) {
            // Another name of a file that was copied up under its first.
            if entry.attr.nlink < 2 || is_directory(entry.attr.mode) {
                log::error!(target: TARGET, "a file above was copied from one of the image that is seen too: somebody moved it there");
                return Err(Errno::IO);
            }
            entry.attr = self.attr_above(node, upper, self.upper.getattr(upper, None)?.0)?;
        }
        self.pairs.count(node, 1);
        Ok(entry)
    }

    /// Which node of the image an upper file stands for, which was found as `name`, and whether the image has its content.
    pub(super) fn lower_of(
        &self,
        lower_dir: Option<Node>,
        place: &OwnedFd,
        name: &[u8],
        (upper, mode): (Node, u32),
    ) -> Result<Option<(Node, bool)>> {
        if let Some(lower) = self.pairs.lower(upper) {
            return Ok(Some((lower, self.pairs.is_bare(lower))));
        }
        match mode & TYPE_BITS {
            DIRECTORY => {
                if let Some((lower, mode)) = self.below(lower_dir, name)?
                    && is_directory(mode)
                    && !self.veils.hides(place, name)?
                    && !marks::is_opaque(&marks::path_of(place, name))?
                {
                    return Ok(Some((lower, false)));
                }
            }
            REGULAR => {}
            _ => return Ok(None),
        }
        // A copy, or a directory that was moved.
        let told = self.told(&marks::path_of(place, name), upper)?;
        let is_like_it = |(lower, _): &(Node, bool)| {
            let same = |(attr, _): (Attr, _)| attr.mode & TYPE_BITS == mode & TYPE_BITS;
            *lower & MADE == 0 && self.lower.getattr(*lower, None).is_ok_and(same)
        };
        Ok(told.filter(is_like_it))
    }

    /// The number that an upper file goes by, without telling the kernel of it.
    pub(super) fn number_above(
        &self,
        lower_dir: Option<Node>,
        place: &OwnedFd,
        name: &[u8],
        found: (Node, u32),
    ) -> Result<Node> {
        let lower = self.lower_of(lower_dir, place, name, found)?;
        let is_free = |l: &Node| self.pairs.upper(*l).is_none_or(|upper| upper == found.0);
        Ok(lower.map(|(lower, _)| lower).filter(is_free).unwrap_or(found.0 | MADE))
    }

    /// An upper file found under a name, told to the kernel. Takes the reference that it came with.
    pub(super) fn entry_above(
        &self,
        lower_dir: Option<Node>,
        place: &OwnedFd,
        name: &[u8],
        entry: Entry,
    ) -> Result<Entry> {
        let upper = entry.attr.node;
        if upper & MADE != 0 {
            // More file systems are mounted in the upper directory than numbers tell apart.
            self.upper.forget(upper, 1);
            return Err(Errno::NFILE);
        }
        let told = self.lower_of(lower_dir, place, name, (upper, entry.attr.mode)).and_then(|lower| {
            let Some((lower, is_bare)) = lower else { return Ok(upper | MADE) };
            match self.pairs.join(lower, upper, 1, is_bare) {
                Joined::New => {
                    if is_bare {
                        self.check_bare(lower, upper, &marks::path_of(place, name));
                    }
                    Ok(lower)
                }
                Joined::Known => {
                    self.upper.forget(upper, 1);
                    Ok(lower)
                }
                // Its content is the other's, too: it has none of its own.
                Joined::Taken if is_bare => Err(Errno::IO),
                Joined::Taken => Ok(upper | MADE),
            }
        });
        let node = told.inspect_err(|_| self.upper.forget(upper, 1))?;
        let mut attr = entry.attr;
        self.show_blocks(node, &mut attr);
        if self.owners == Owners::Noted {
            let noted = self.noted(&marks::path_of(place, name), attr.mode);
            self.dress(upper, &mut attr, noted);
        }
        Ok(told_as(node, Entry { attr, ..entry }))
    }

    fn spot<'a>(&'a self, parent: Node, name: &'a OsStr) -> Result<Spot<'a>> {
        self.changes.fetch_add(1, Ordering::Relaxed);
        let dir = match self.side(parent) {
            Side::Upper(upper) => upper,
            Side::Lower(lower) => self.raise_directory(lower)?.ok_or(Errno::NOENT)?,
        };
        let (place, name) = (self.upper.place(dir)?, name.as_bytes());
        let lower_dir = (parent & MADE == 0).then_some(parent);
        let (above, below) = (marks::look(&place, name)?, self.below(lower_dir, name)?);
        let veiled = below.is_some() && self.veils.hides(&place, name)?;
        if let (true, Above::File(_), Some((lower, _))) = (is_resent(), above, below) {
            self.take_over_copy(lower, dir, &place, name)?;
        }
        Ok(Spot { veils: &self.veils, dir, place, lower_dir, name, above, veiled, below })
    }

    /// Make something new under a name by `work`, which is told the upper directory.
    fn make_with<T>(
        &self,
        caller: &Caller,
        spot: &Spot<'_>,
        work: impl FnOnce(Node) -> Result<(Entry, T)>,
    ) -> Result<(Entry, T)> {
        spot.make_room()?;
        let (entry, more) = work(spot.dir).inspect_err(|_| spot.not_taken())?;
        let upper = entry.attr.node;
        let finished = spot.taken(entry.attr.mode).and_then(|()| match self.owners {
            Owners::Set => Ok(entry.attr),
            Owners::Noted => {
                self.note_maker(caller, spot.dir, upper, entry.attr.mode)?;
                self.attr_above(upper | MADE, upper, self.upper.getattr(upper, None)?.0)
            }
        });
        match finished {
            Ok(attr) => Ok((told_as(upper | MADE, Entry { attr, ..entry }), more)),
            Err(e) => {
                self.upper.forget(upper, 1);
                Err(e)
            }
        }
    }

    pub(super) fn make(
        &self,
        caller: &Caller,
        parent: Node,
        name: &OsStr,
        work: impl FnOnce(Node) -> Result<Entry>,
    ) -> Result<Entry> {
        proper(name)?;
        let spot = self.spot(parent, name)?;
        refuse_seen(&spot)?;
        self.make_with(caller, &spot, |dir| work(dir).map(|entry| (entry, ()))).map(|(entry, ())| entry)
    }

    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: Node,
        name: &OsStr,
        new: New,
        flags: i32,
    ) -> Result<(Entry, Opened)> {
        proper(name)?;
        let spot = self.spot(parent, name)?;
        if spot.seen().is_some() && flags & libc::O_EXCL == 0 && !is_resent() {
            // The kernel did not know of it.
            let Lookup::Found(entry) = self.find(caller, parent, name)? else { return Err(Errno::NOENT) };
            let opened = crate::tree::Tree::open(self, caller, entry.attr.node, flags);
            return match opened {
                Ok(opened) => Ok((entry, opened)),
                Err(e) => {
                    crate::tree::Tree::forget(self, entry.attr.node, 1);
                    Err(e)
                }
            };
        }
        refuse_seen(&spot)?;
        self.make_with(caller, &spot, |dir| self.upper.create(caller, dir, name, new, flags))
    }

    pub(super) fn make_link(&self, caller: &Caller, node: Node, parent: Node, name: &OsStr) -> Result<Entry> {
        proper(name)?;
        let upper = self.above(node, Content::Bare)?;
        let spot = self.spot(parent, name)?;
        refuse_seen(&spot)?;
        spot.make_room()?;
        let entry = self.upper.link(caller, upper, spot.dir, name).inspect_err(|_| spot.not_taken())?;
        spot.taken(entry.attr.mode)?;
        self.entry_above(spot.lower_dir, &spot.place, spot.name, entry)
    }

    /// What is about to lose this name has others in the image: copied up with all of them, it counts how many are left.
    fn raise_linked<'a>(&'a self, spot: Spot<'a>, parent: Node, name: &'a OsStr) -> Result<Spot<'a>> {
        match (spot.above, spot.seen(), spot.below) {
            (Above::Nothing, Some(mode), Some((lower, _)))
                if !is_directory(mode) && self.lower.getattr(lower, None)?.0.nlink > 1 =>
            {
                self.raise(lower, Content::Bare)?;
                self.spot(parent, name)
            }
            _ => Ok(spot),
        }
    }

    pub(super) fn remove_file(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        let spot = self.raise_linked(self.spot(parent, name)?, parent, name)?;
        match (spot.seen(), spot.above) {
            (None, _) => removed_before(&spot),
            (Some(mode), _) if is_directory(mode) => Err(Errno::ISDIR),
            (Some(_), Above::File(_)) => {
                spot.cover()?;
                self.upper.unlink(caller, spot.dir, name).inspect_err(|_| spot.not_gone())?;
                spot.gone()
            }
            (Some(_), _) => spot.gone(),
        }
    }

    pub(super) fn remove_directory(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        let spot = self.spot(parent, name)?;
        match (spot.seen(), spot.above) {
            (None, _) => removed_before(&spot),
            (Some(mode), _) if !is_directory(mode) => Err(Errno::NOTDIR),
            (Some(_), Above::File(_)) => {
                let emptied = self.empty(&spot)?;
                self.upper.rmdir(caller, spot.dir, name).inspect_err(|_| spot.put_back(&emptied))?;
                spot.gone()
            }
            (Some(_), _) => {
                if !self.is_empty_below(&spot)? {
                    return Err(Errno::NOTEMPTY);
                }
                spot.gone()
            }
        }
    }

    fn is_empty_below(&self, spot: &Spot<'_>) -> Result<bool> {
        spot.below.map_or(Ok(true), |(lower, _)| Ok(self.lower.names_in(lower)?.is_empty()))
    }

    /// An upper directory that is to go shows nothing: take its marks out of it, behind a veil. Gives what they were.
    fn empty(&self, spot: &Spot<'_>) -> Result<Names> {
        let names = Names::of(marks::open_directory(&spot.place, spot.name)?)?;
        if !names.shown.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        if spot.is_merged()?
            && let Some((lower, _)) = spot.below
            && self.lower.names_in(lower)?.iter().any(|name| !names.hidden.contains(name))
        {
            return Err(Errno::NOTEMPTY);
        }
        spot.cover()?;
        self.veils.clear(marks::open_directory(&spot.place, spot.name)?, &names)?;
        Ok(names)
    }

    pub(super) fn move_name(
        &self,
        caller: &Caller,
        from: (Node, &OsStr),
        to: (Node, &OsStr),
        flags: u32,
    ) -> Result<()> {
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(Errno::INVAL);
        }
        proper(to.1)?;
        let is_exchange = flags & libc::RENAME_EXCHANGE != 0;
        let (mut source, mut target) = (self.spot(from.0, from.1)?, self.spot(to.0, to.1)?);
        let rename = |source: &Spot<'_>, target: &Spot<'_>| {
            // That nothing is seen at the target was seen; a whiteout may be there.
            let flags = flags & !libc::RENAME_NOREPLACE;
            self.upper.rename(caller, (source.dir, from.1), (target.dir, to.1), flags)
        };
        let Some(moved) = source.seen() else {
            if !is_resent() {
                return Err(Errno::NOENT);
            }
            // Carried out when it came first: the directory tree has it written down.
            rename(&source, &target)?;
            source.gone()?;
            return target.unveil();
        };
        let replaced = target.seen();
        match replaced {
            Some(_) if flags & libc::RENAME_NOREPLACE != 0 => return Err(Errno::EXIST),
            None if is_exchange => return Err(Errno::NOENT),
            Some(mode) if !is_exchange && is_directory(mode) != is_directory(moved) => {
                return Err(if is_directory(moved) { Errno::NOTDIR } else { Errno::ISDIR });
            }
            _ => {}
        }
        if source.is_same_file(&target)? {
            return Ok(()); // two links to one file: rename(2) does nothing
        }
        self.raise_to_move(&mut source, from)?;
        if is_exchange {
            self.raise_to_move(&mut target, to)?;
            make_opaque(&source, moved, &target)?;
            make_opaque(&target, replaced.unwrap_or_default(), &source)?;
            return rename(&source, &target);
        }
        target = self.raise_linked(target, to.0, to.1)?;
        let mut emptied = None;
        if is_directory(moved) {
            if matches!(target.above, Above::File(_)) {
                emptied = Some(self.empty(&target)?);
            } else if replaced.is_some() && !self.is_empty_below(&target)? {
                return Err(Errno::NOTEMPTY);
            }
            make_opaque(&source, moved, &target)?;
            // A directory replaces no whiteout.
            target.make_room()?;
        }
        source.cover()?;
        if let Err(e) = rename(&source, &target) {
            source.not_gone();
            match emptied {
                Some(names) => target.put_back(&names),
                None => target.not_taken(),
            }
            return Err(e);
        }
        source.gone()?;
        target.unveil()
    }

    /// What is to be moved lies above from now on, a directory of the image with all that is in it.
    fn raise_to_move(&self, spot: &mut Spot<'_>, (parent, name): (Node, &OsStr)) -> Result<()> {
        let is_of_image = match (spot.above, spot.below) {
            (Above::File(_), _) => spot.is_merged()?,
            (_, Some((_, mode))) => is_directory(mode),
            _ => false,
        };
        if let (true, Some((lower, mode))) = (is_of_image, spot.below) {
            let upper = self.raise_all(lower)?;
            marks::set_opaque(&spot.path())?;
            // The kernel may know it by the image's number, also when another server serves.
            marks::set_origin(&spot.path(), lower, upper)?;
            if marks::origin(&spot.path(), upper)?.is_none_or(|origin| origin.lower != lower) {
                return Err(Errno::XDEV); // without attributes: mv(1) copies
            }
            spot.above = Above::File(mode);
        } else if let (Above::Nothing, Some((lower, mode))) = (spot.above, spot.below) {
            self.raise(lower, Content::Bare)?;
            if marks::look(&spot.place, spot.name)? == Above::Nothing {
                log::error!(target: TARGET, "{} of {parent:x} was copied up and is not there", name.display());
                return Err(Errno::IO);
            }
            spot.above = Above::File(mode);
        }
        Ok(())
    }
}

/// A directory that comes to where the image has one does not show that one.
fn make_opaque(moved: &Spot<'_>, mode: u32, to: &Spot<'_>) -> Result<()> {
    if is_directory(mode) && to.covers_directory() { marks::set_opaque(&moved.path()) } else { Ok(()) }
}

fn refuse_seen(spot: &Spot<'_>) -> Result<()> {
    match spot.seen() {
        // Made when this request came first? The directory tree knows.
        Some(_) if is_resent() && matches!(spot.above, Above::File(_)) => Ok(()),
        Some(_) => Err(Errno::EXIST),
        None => Ok(()),
    }
}

/// Nothing is there to be removed: this request did it, when it came first?
fn removed_before(spot: &Spot<'_>) -> Result<()> {
    if is_resent() { spot.gone() } else { Err(Errno::NOENT) }
}

/// The entry under the node's number.
fn told_as(node: Node, entry: Entry) -> Entry {
    // The same as long as the kernel knows the node, before and after it was copied up.
    let generation = if node & MADE == 0 { 0 } else { entry.generation };
    Entry { attr: numbered(node, entry.attr), generation, ..entry }
}
