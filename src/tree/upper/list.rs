//! Directories: the names that the image has come first, in its order, then those that only the upper directory has. So a name that is
//! copied up, hidden or shown again while somebody lists its directory keeps its place.

use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::marks::{self, Names};
use super::{Halves, MADE, TYPE_BITS, UpperTree};
use crate::tree::{Caller, DirItem, Entry, Fit, Handle, ListMode, Lookup, Node, Result, Tree as _};

/// Cookies of the image's names, from here on; below are the upper directory's own. ext4 hashes names into 63 bits, and hits one of these
/// with one name in 2^29; others count up from 0. The route table has those above for itself.
const OF_IMAGE: u64 = (1 << 63) - (1 << 35);
const OF_IMAGE_END: u64 = OF_IMAGE + (1 << 33);

/// Most directories whose names are kept while they are listed.
pub(super) const LISTINGS: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// What an upper directory had when so many changes had been made.
#[derive(Debug)]
pub(super) struct Listing {
    version: u64,
    names: Arc<Names>,
}

impl UpperTree {
    pub(super) fn list(
        &self,
        caller: &Caller,
        (node, handle): (Node, Handle),
        cookie: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        let halves = self.halves(node);
        let is_in_image = (OF_IMAGE..OF_IMAGE_END).contains(&cookie);
        if let Some(lower) = halves.lower
            && (cookie == 0 || is_in_image)
        {
            let from = cookie.saturating_sub(OF_IMAGE);
            let above = self.names_above(halves.upper)?;
            if self.list_image(caller, (node, lower), &above, from, mode, out)? == Fit::Full {
                return Ok(());
            }
        }
        let Some(upper) = halves.upper else { return Ok(()) };
        let from = if is_in_image { 0 } else { cookie };
        self.list_upper(caller, (node, upper, handle), halves, from, mode, out)
    }

    /// What an upper directory has: read when a listing begins, and after a change, not for each page.
    fn names_above(&self, upper: Option<Node>) -> Result<Arc<Names>> {
        let Some(upper) = upper else { return Ok(Arc::default()) };
        let listings = || self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        let version = self.changes.load(Ordering::Relaxed);
        if let Some(known) = listings().get(&upper).filter(|known| known.version == version) {
            return Ok(Arc::clone(&known.names));
        }
        let names = Arc::new(Names::of(self.upper.place(upper)?)?);
        listings().push(upper, Listing { version, names: Arc::clone(&names) });
        Ok(names)
    }

    fn list_image(
        &self,
        caller: &Caller,
        (node, lower): (Node, Node),
        above: &Names,
        from: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<Fit> {
        let (mut fit, mut failed) = (Fit::Taken, None);
        self.lower.readdir(caller, lower, 0, from, mode, &mut |item| {
            let cookie = OF_IMAGE + item.cookie;
            let name = item.name.as_bytes();
            // It may have been copied up since the names above were read.
            let is_copied = || !matches!(name, b"." | b"..") && self.pairs.upper(item.node).is_some();
            let is_covered = above.shown.contains_key(name) || is_copied();
            if marks::is_reserved(name) || above.hidden.contains(name) && !is_covered {
                return Fit::Taken;
            }
            let shown = if is_covered || item.entry.is_some() {
                let entry = match item.entry {
                    Some(entry) if !is_covered => self.entry_below(entry),
                    _ => match self.find(caller, node, item.name) {
                        Ok(Lookup::Found(entry)) => Ok(entry),
                        Ok(Lookup::Absent(_)) => return Fit::Taken,
                        Err(e) => Err(e),
                    },
                };
                match entry {
                    Ok(entry) => self.offer(&DirItem { cookie, ..*item }, entry, mode, out),
                    Err(e) => {
                        failed = Some(e);
                        Fit::Full
                    }
                }
            } else {
                out(&DirItem { cookie, ..*item })
            };
            fit = shown;
            shown
        })?;
        failed.map_or(Ok(fit), Err)
    }

    /// Offer an entry that was told; take it back if it does not fit, or if only its number was wanted.
    fn offer(&self, item: &DirItem<'_>, entry: Entry, mode: ListMode, out: &mut dyn FnMut(&DirItem<'_>) -> Fit) -> Fit {
        let is_counted = mode == ListMode::Plus;
        let fit = out(&DirItem {
            node: entry.attr.node,
            kind: entry.attr.mode & TYPE_BITS,
            entry: is_counted.then_some(entry),
            ..*item
        });
        if fit == Fit::Full || !is_counted {
            self.forget(entry.attr.node, 1);
        }
        fit
    }

    fn list_upper(
        &self,
        caller: &Caller,
        (node, upper, handle): (Node, Node, Handle),
        halves: Halves,
        from: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        let place = self.upper.place(upper)?;
        let mut failed = None;
        self.upper.readdir(caller, upper, handle, from, mode, &mut |item| {
            let name = item.name.as_bytes();
            let skip = |entry: Option<Entry>| {
                if let Some(entry) = entry {
                    self.upper.forget(entry.attr.node, 1);
                }
                Fit::Taken
            };
            if matches!(name, b"." | b"..") {
                // The image's half came with its own.
                return match halves.lower {
                    Some(_) => Fit::Taken,
                    None if name == b"." => out(&DirItem { node, ..*item }),
                    None => out(&DirItem { node: self.pairs.lower(item.node).unwrap_or(item.node | MADE), ..*item }),
                };
            }
            if marks::is_reserved(name) {
                return skip(item.entry);
            }
            let is_whiteout = match item.entry {
                Some(entry) => marks::is_whiteout(entry.attr.mode, entry.attr.rdev),
                None => {
                    matches!(item.kind, 0 | libc::S_IFCHR) && marks::look(&place, name) == Ok(marks::Above::Whiteout)
                }
            };
            if is_whiteout || matches!(self.below(halves.lower, name), Ok(Some(_))) {
                return skip(item.entry);
            }
            match item.entry {
                Some(entry) => match self.entry_above(halves.lower, &place, name, entry) {
                    Ok(entry) => self.offer(item, entry, mode, out),
                    Err(e) => {
                        failed = Some(e);
                        Fit::Full
                    }
                },
                None => match self.number_above(halves.lower, &place, name, (item.node, item.kind)) {
                    Ok(number) => out(&DirItem { node: number, ..*item }),
                    Err(e) => {
                        failed = Some(e);
                        Fit::Full
                    }
                },
            }
        })?;
        failed.map_or(Ok(()), Err)
    }
}
