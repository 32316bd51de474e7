//! A writable rootfs in a user namespace of several ids, as `auto` makes it: an overlay of the kernel over a FUSE mount of the image. The index knows
//! owners that an ordinary user's disk does not have; what is read and changed most is the kernel's.
//!
//! Two records: `ID` shows the image, below the state root; `ID.rootfs` is the overlay, where it was asked for. Who uses it knows one rootfs, `ID`
//! ([`Whole`]): the two are listed, recovered and taken away together. The rootfses of an ordinary user's `fsprov run` are made so, too.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fstat};

use super::request::{Changes, Request};
use super::{Condition, Detach, Now, Provisioner, Record, Selector, Status, lock, record, select};
use crate::error::Result;
use crate::id::ContainerId;
use crate::index::Index;
use crate::paths::StatePaths;
use crate::plan::{BackendKind, Ownership};
use crate::store::ResolvedImage;
use crate::sys::fs::{open_beneath, open_resolved};
use crate::sys::process::{ProcessId, has_several_ids, is_among_itself};

/// An overlay in a user namespace takes a FUSE mount as its lower layer since then (trusted by `userxattr`; fs/overlayfs/super.c).
const SINCE: (u32, u32) = (6, 5);

/// A rootfs as who uses it has it.
#[derive(Clone, Debug)]
pub(crate) struct Whole {
    /// What is seen at its mount point.
    pub(crate) top: Status,
    /// What an overlay is laid over, which has the id of both.
    below: Option<Status>,
}

impl Whole {
    /// What has its id and the image, and the server where there is one.
    pub(crate) fn base(&self) -> &Status {
        self.below.as_ref().unwrap_or(&self.top)
    }

    /// How it fares: as the worse of both.
    pub(crate) fn health(&self) -> Condition {
        let of_below = self.below.as_ref().map(|below| below.health);
        of_below.filter(|below| below.badness() > self.top.health.badness()).unwrap_or(self.top.health)
    }
}

impl Condition {
    fn badness(self) -> u8 {
        match self {
            Condition::Ready => 0,
            Condition::Elsewhere => 1,
            Condition::Stopped => 2,
            Condition::Gone => 3,
            Condition::Dead => 4,
            Condition::Interrupted => 5,
            Condition::Changing => 6,
        }
    }
}

impl Provisioner {
    /// Is it better than what the backends make by themselves?
    pub(super) fn goes_over_fuse(&self, request: &Request, image: &ResolvedImage) -> bool {
        let is_asked = request.backend.is_none()
            && request.changes == Changes::Ephemeral
            && request.upper.is_none()
            && request.ownership.is_none()
            && !request.live.writeback
            && self.shelf.is_none();
        is_asked
            && has_several_ids()
            && is_among_itself()
            && self.host.kernel_version() >= SINCE
            && self.host.overlay().is_yes()
            && image.index.as_deref().is_some_and(|index| !has_owners_on_disk(index, &image.layers))
    }

    /// Make it. `None`: not here, for a reason that is logged, and nothing of it is left.
    pub(super) fn provision_over(&self, request: &Request, image: &ResolvedImage) -> Result<Option<Record>> {
        let id = request.id.clone().map_or_else(ContainerId::random, Ok)?;
        // A longer one is an overlay by itself.
        let Ok(top) = upper_id(&id) else { return Ok(None) };
        let shown = self.paths.lower_of(&id);
        let mut lower = Request::new(request.image.clone(), &shown).backend(BackendKind::Fuse).id(id.clone());
        lower.ownership = Some(Ownership::default());
        lower.restraint.no_devices = request.restraint.no_devices;
        // Nobody uses it alone: if this process dies in between, `recover` takes it away.
        lower.ends_with = Some(request.ends_with.map_or_else(ProcessId::current, Ok)?);
        let mut upper = Request { backend: Some(BackendKind::Overlay), id: Some(top), ..request.clone() };
        upper.ownership = Some(Ownership::default());
        upper.restraint.no_devices = false;
        let of_lower = ResolvedImage {
            layers: vec![shown],
            index: None,
            manifest: None,
            is_filtered: false,
            has_whiteouts: false,
            ..image.clone()
        };
        let not_here = |error| {
            if !select::may_go_on(&error) {
                return Err(error);
            }
            log::info!("an overlay over a FUSE mount: {error}");
            Ok(None)
        };
        if let Err(error) = self.provision_resolved(&lower, image.clone(), ()) {
            return not_here(error);
        }
        let made = self.provision_resolved(&upper, of_lower, ());
        made.and_then(|record| self.ends_with(&id, request.ends_with).map(|()| Some(record))).or_else(|error| {
            let gone = self.destroy(&Selector::Id(id), Detach::IfIdle).map(|_| ());
            if gone.is_ok() { not_here(error) } else { Err(error.with_undo(gone)) }
        })
    }

    /// From now on this rootfs ends with that process, or with none.
    fn ends_with(&self, id: &ContainerId, process: Option<ProcessId>) -> Result<()> {
        let container = self.paths.container(id);
        let _lock = lock::directory(container.dir())?;
        let Some(mut record) = Record::read(&container)? else { return Ok(()) };
        record.ends_with = process;
        record.write(&container)
    }

    /// Every rootfs as [`Provisioner::list`] has them, but as those who use them have them.
    #[cfg(feature = "cli")]
    pub(crate) fn list_whole(&self) -> Result<Vec<Whole>> {
        let all = self.list()?;
        let over = laid_over(&self.paths, &all.iter().map(|status| &status.record).collect::<Vec<_>>());
        let tops = all.iter().enumerate().filter(|(n, _)| !over.contains(&Some(*n)));
        Ok(tops.map(|(n, top)| self.of_parts(top.clone(), over[n].map(|below| all[below].clone()))).collect())
    }

    #[cfg(feature = "cli")]
    fn of_parts(&self, mut top: Status, below: Option<Status>) -> Whole {
        let record = &top.record;
        let is_half = below.is_none() && record.plan.rootfs == self.paths.lower_of(&record.plan.id);
        if is_half && record.ends_with.is_some_and(|process| !process.is_alive()) {
            top.health = Condition::Interrupted;
        }
        Whole { top, below }
    }

    /// One rootfs, by the id or the mount point of either part.
    #[cfg(feature = "cli")]
    pub(crate) fn inspect_whole(&self, selector: &Selector) -> Result<Whole> {
        let id = self.find_id(selector)?.map(|id| self.whole(id)).ok_or_else(|| self.not_found(selector))?;
        let now = Now::look()?;
        let status = self.status(&id, &now)?.ok_or_else(|| self.not_found(selector))?;
        let top = self.top_of(&status.record).map(|top| self.status(&top.plan.id, &now)).transpose()?.flatten();
        Ok(match top {
            Some(top) => self.of_parts(top, Some(status)),
            None => self.of_parts(status, None),
        })
    }

    /// What was just made.
    #[cfg(feature = "cli")]
    pub(crate) fn whole_of(&self, record: Record) -> Result<Whole> {
        let ready = |record| Status { record, health: Condition::Ready, changes: None };
        let below = record.plan.id.parent().map(|id| Record::read(&self.paths.container(&id))).transpose()?.flatten();
        let below = below.filter(|below| is_laid_over(&self.paths, &record, below));
        Ok(Whole { top: ready(record), below: below.map(ready) })
    }

    /// Where a rootfs is seen, and which of those nested in it are not a part of it.
    #[cfg(feature = "cli")]
    pub(crate) fn seen(&self, record: &Record, mut nested: Vec<ContainerId>) -> (PathBuf, Vec<ContainerId>) {
        let top = self.top_of(record);
        nested.retain(|id| top.as_ref().is_none_or(|top| top.plan.id != *id));
        (top.map_or_else(|| record.plan.rootfs.clone(), |top| top.plan.rootfs), nested)
    }

    /// The overlay over this one.
    pub(super) fn top_of(&self, below: &Record) -> Option<Record> {
        let top = upper_id(&below.plan.id).ok().filter(|_| below.plan.rootfs == self.paths.lower_of(&below.plan.id))?;
        record::read_or_log(&self.paths.container(&top)).filter(|top| is_laid_over(&self.paths, top, below))
    }

    /// The id of both, of either's.
    pub(super) fn whole(&self, id: ContainerId) -> ContainerId {
        let read = |id: &ContainerId| record::read_or_log(&self.paths.container(id));
        let below = id.parent().filter(|_| id.as_str().ends_with(SUFFIX)).and_then(|id| read(&id));
        let below = below.filter(|below| read(&id).is_some_and(|top| is_laid_over(&self.paths, &top, below)));
        below.map_or(id, |below| below.plan.id)
    }
}

/// Are they the two of one rootfs?
fn is_laid_over(paths: &StatePaths, top: &Record, below: &Record) -> bool {
    let id = &below.plan.id;
    top.plan.id.as_str().strip_prefix(id.as_str()) == Some(SUFFIX)
        && below.plan.rootfs == paths.lower_of(id)
        && top.stands_on(below)
}

/// For each record, which of them it is laid over.
pub(super) fn laid_over(paths: &StatePaths, records: &[&Record]) -> Vec<Option<usize>> {
    let below = |top: &Record| records.iter().position(|below| is_laid_over(paths, top, below));
    records
        .iter()
        .map(|top| Some(top).filter(|top| top.plan.id.as_str().ends_with(SUFFIX)).and_then(|top| below(top)))
        .collect()
}

/// Do the layers on the disk have the owners that the index has, as those that this namespace's root imported? Told by the first file that is not
/// root's.
fn has_owners_on_disk(index: &Path, layers: &[PathBuf]) -> bool {
    let Ok(index) = Index::open(index) else { return false };
    let mut inodes = (0..index.inode_count()).filter_map(|row| index.inode(row).ok());
    let Some(inode) = inodes.find(|inode| (inode.uid, inode.gid) != (0, 0)) else { return true };
    let mut path = Vec::new();
    if index.home_path(&inode, &mut path).is_err() {
        return false;
    }
    // The image chose the path: a symlink on the way leads nowhere.
    let path = Path::new(if path.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(&path) });
    let look = |layer: &PathBuf| fstat(open_beneath(open_resolved(layer)?, path, OFlags::PATH | OFlags::NOFOLLOW)?);
    let on_disk = layers.iter().rev().find_map(|layer| look(layer).ok());
    on_disk.is_some_and(|stat| (stat.st_uid, stat.st_gid) == (inode.uid, inode.gid))
}

/// What the overlay's id has more than that of the FUSE mount.
const SUFFIX: &str = ".rootfs";

/// The id of the overlay over the FUSE mount of this id.
pub(crate) fn upper_id(lower: &ContainerId) -> Result<ContainerId> {
    format!("{lower}{SUFFIX}").parse()
}
