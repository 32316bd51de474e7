//! A writable rootfs in a user namespace of several ids, as `auto` makes it: an overlay of the kernel over a FUSE mount of the image. The index knows
//! owners that an ordinary user's disk does not have; what is read and changed most is the kernel's.
//!
//! Two rootfses: `ID` shows the image, below the state root; `ID.rootfs` is the overlay, where it was asked for. They are taken away together.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fstat};

use super::request::{Changes, Request};
use super::{Detach, Provisioner, Record, Selector, record, select};
use crate::error::Result;
use crate::id::ContainerId;
use crate::index::Index;
use crate::plan::{BackendKind, Ownership};
use crate::store::ResolvedImage;
use crate::sys::fs::{open_beneath, open_resolved};
use crate::sys::process::{has_several_ids, is_among_itself};

/// An overlay in a user namespace takes a FUSE mount as its lower layer since then (trusted by `userxattr`; fs/overlayfs/super.c).
const SINCE: (u32, u32) = (6, 5);

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
        let shown = self.paths.lower_of(&id);
        let mut lower = Request::new(request.image.clone(), &shown).backend(BackendKind::Fuse).id(id.clone());
        lower.ownership = Some(Ownership::default());
        lower.restraint.no_devices = request.restraint.no_devices;
        lower.ends_with = request.ends_with;
        let mut upper = Request { backend: Some(BackendKind::Overlay), id: Some(upper_id(&id)?), ..request.clone() };
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
        self.provision_resolved(&upper, of_lower, ()).map(Some).or_else(|error| {
            let gone = self.destroy(&Selector::Id(id), Detach::IfIdle).map(|_| ());
            if gone.is_ok() { not_here(error) } else { Err(error.with_undo(gone)) }
        })
    }

    /// Where a rootfs is seen, and which of those nested in it are not a part of it.
    #[cfg(feature = "cli")]
    pub(crate) fn seen(&self, record: &Record, mut nested: Vec<ContainerId>) -> (PathBuf, Vec<ContainerId>) {
        let parts: Vec<_> = nested.extract_if(.., |id| self.whole(id.clone()) == record.plan.id).collect();
        let upper = parts.first().and_then(|id| record::read_or_log(&self.paths.container(id)));
        (upper.map_or_else(|| record.plan.rootfs.clone(), |upper| upper.plan.rootfs), nested)
    }

    /// The id of both, of either's.
    pub(super) fn whole(&self, id: ContainerId) -> ContainerId {
        let Some(parent) = id.parent() else { return id };
        let read = |id: &ContainerId| record::read_or_log(&self.paths.container(id));
        let shown = self.paths.lower_of(&parent);
        let lower = read(&parent).filter(|lower| lower.plan.rootfs == shown);
        if lower.is_some_and(|lower| read(&id).is_some_and(|upper| upper.stands_on(&lower))) { parent } else { id }
    }
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

/// The id of the overlay over the FUSE mount of this id.
pub(crate) fn upper_id(lower: &ContainerId) -> Result<ContainerId> {
    format!("{lower}.rootfs").parse()
}
