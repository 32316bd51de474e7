//! Taking a rootfs away: its mounts are found by their ids, wherever they lie by now, and unmounted through the directory that they lie
//! in. Mounts of others are never touched, and what processes use goes as a whole or not at all.

use std::path::Path;

use rustix::io::Errno;

use super::{Detach, Health};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::place::Place;
use crate::plan::Plan;
use crate::sys::holders;
use crate::sys::mount::{self, Unmount};
use crate::sys::mountinfo::{self, MountInfo};
use crate::traces::Traces;

const UNMOUNT: &str = "unmount";

/// Our root mount, wherever it lies by now, and what lies on it. `None`: it is gone, or not in this mount namespace.
fn find(rootfs: &Path, traces: &Traces) -> Result<Option<Vec<MountInfo>>> {
    let Some(known) = traces.mount() else { return Ok(None) };
    let Some(id) = known.current_id() else { return Ok(None) };
    let table = mountinfo::read()?;
    let Some(ours) = table.iter().find(|m| m.id == id).cloned() else { return Ok(None) };
    if !known.is_certain() && !is_certain(&ours, rootfs, traces) {
        return Ok(None);
    }
    if ours.point != rootfs {
        log::info!("{} lies at {} now", show(rootfs), show(&ours.point));
    }
    let stack = mountinfo::stack_at(table.clone(), &ours.point);
    if let Some(top) = stack.last().filter(|top| top.id != id) {
        return Err(Error::new(
            Kind::Busy,
            UNMOUNT,
            show(rootfs),
            format!("another mount lies on top of it ({} of {})", show(&top.fs_type), show(&top.source)),
        )
        .hint(format!("umount {} first", show(&ours.point))));
    }
    Ok(Some(mountinfo::tree_of(table, id)))
}

/// Before Linux 6.8 an id may be used again once its mount is gone (mount ids are the lowest free number). It is ours where it was
/// made, or in the directory that it was made in, which may have been moved.
fn is_certain(mount: &MountInfo, rootfs: &Path, traces: &Traces) -> bool {
    if mount.point == rootfs {
        return true;
    }
    let parent = mount.point.parent().and_then(|parent| Place::open(parent).ok());
    let known = traces.parent.zip(parent).is_some_and(|(known, parent)| known.is_same(&parent.identity()));
    known && mount.point.file_name() == rootfs.file_name()
}

/// Unmount our rootfs, with its volumes. `false`: it is gone already.
pub(super) fn take_away(plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
    let rootfs = plan.rootfs.as_path();
    clear_stage(&plan.state_dir)?;
    let Some(tree) = find(rootfs, traces)? else { return Ok(false) };
    let Some(root) = tree.first() else { return Ok(false) };
    check_foreign(rootfs, &tree[1..], traces.parts.as_deref(), how)?;
    match how {
        Detach::Lazy => unmount_lazily(root)?,
        Detach::IfIdle => unmount_idle(rootfs, &tree)?,
    }
    Ok(true)
}

fn unmount_lazily(found: &MountInfo) -> Result<()> {
    fault::point("attach.unmount")?;
    mount::unmount_found(found, Unmount::Lazy).map_err(|e| Error::sys(UNMOUNT, show(&found.point), e))
}

/// Mounts that were being built in our own directory when we were killed.
pub(super) fn clear_stage(stage: &Path) -> Result<()> {
    let table = mountinfo::read()?;
    let below = mountinfo::subtree_below(table.clone(), stage);
    for mount in mountinfo::stack_at(table, stage).iter().chain(&below).rev() {
        unmount_lazily(mount)?;
    }
    Ok(())
}

/// Unmount the volumes with these ids at or below `rootfs`, which is a plain directory. Returns `false` if no volume was mounted.
pub(super) fn take_volumes_away(rootfs: &Path, traces: &Traces, how: Detach) -> Result<bool> {
    let table = mountinfo::read()?;
    let below = mountinfo::subtree_below(table.clone(), rootfs);
    if below.is_empty() {
        return Ok(false);
    }
    check_foreign(rootfs, &below, traces.parts.as_deref(), how)?;
    let ours = |m: &MountInfo| traces.parts.as_ref().is_none_or(|parts| parts.contains(&m.id));
    match how {
        Detach::IfIdle => unmount_idle(rootfs, &below)?,
        Detach::Lazy => {
            if let Some(foreign) = below.iter().find(|m| !ours(m)) {
                return Err(foreign_error(rootfs, &[foreign]));
            }
            for mount in below.iter().rev() {
                unmount_lazily(mount)?;
            }
        }
    }
    Ok(true)
}

/// Unmount the volumes of a rootfs whose directory was moved. Returns `false` if no volume was mounted.
pub(super) fn take_moved_volumes_away(rootfs: &Path, traces: &Traces, how: Detach) -> Result<bool> {
    let (certain, others): (Vec<_>, Vec<_>) = traces.parts().partition(|part| part.is_certain());
    let table = mountinfo::read()?;
    // Where ids are used again (before Linux 6.8), ours lie in the directory that was filled.
    let was_filled = |dir: &Path| {
        traces.copied.as_ref().zip(Place::open(dir).ok()).is_some_and(|(c, dir)| dir.identity().is_same(&c.directory))
    };
    let is_ours = |m: &&MountInfo| others.iter().any(|part| part.id == m.id) && m.point.ancestors().any(was_filled);
    let others = table.iter().filter(is_ours).map(|m| m.id);
    let ids: Vec<_> = certain.iter().filter_map(|part| part.current_id()).chain(others).collect();
    let ours: Vec<MountInfo> = table.iter().filter(|m| ids.contains(&m.id)).cloned().collect();
    let foreign = |m: &&MountInfo| ids.contains(&m.parent) && !ids.contains(&m.id);
    let foreign: Vec<_> = table.iter().filter(foreign).collect();
    if !foreign.is_empty() {
        return Err(foreign_error(rootfs, &foreign));
    }
    let ordered = mountinfo::parents_first(ours);
    match how {
        Detach::IfIdle => unmount_idle(rootfs, &ordered)?,
        Detach::Lazy => ordered.iter().rev().try_for_each(unmount_lazily)?,
    }
    Ok(!ordered.is_empty())
}

fn foreign_error(rootfs: &Path, foreign: &[&MountInfo]) -> Error {
    let names: Vec<String> = foreign.iter().map(|m| format!("{} on {}", show(&m.source), show(&m.point))).collect();
    Error::new(Kind::Busy, UNMOUNT, show(rootfs), format!("others mounted below it: {}", names.join(", ")))
        .hint("unmount those first; their content is not touched")
}

/// Mounts below a rootfs that are not parts of it: a reason to refuse, or to say that they go out of sight with it.
pub(super) fn check_foreign(rootfs: &Path, below: &[MountInfo], parts: Option<&[u64]>, how: Detach) -> Result<()> {
    let Some(parts) = parts else { return Ok(()) };
    let foreign: Vec<&MountInfo> = below.iter().filter(|m| !parts.contains(&m.id)).collect();
    if foreign.is_empty() {
        return Ok(());
    }
    let error = foreign_error(rootfs, &foreign);
    if how == Detach::IfIdle {
        return Err(error);
    }
    log::warn!("{error}; they go out of sight with the rootfs");
    Ok(())
}

/// Refuse while `find` names someone: a process that is just ending, or has just been forked, gets a moment.
pub(super) fn refuse_in_use(rootfs: &Path, find: impl Fn() -> Result<Vec<holders::Holder>>) -> Result<()> {
    let mut holders = Vec::new();
    for n in 0..holders::BUSY_TRIES {
        if n > 0 {
            std::thread::sleep(holders::BUSY_PAUSE);
        }
        holders = find()?;
        if holders.is_empty() {
            return Ok(());
        }
    }
    let who = holders::name_all(&holders);
    Err(Error::new(Kind::Busy, UNMOUNT, show(rootfs), format!("it is used by {who}"))
        .hint("end those first, or take it out of sight with --lazy"))
}

/// All of it or, as far as can be seen beforehand, nothing of it: a rootfs without its volumes is worse than one that is busy.
fn unmount_idle(rootfs: &Path, tree: &[MountInfo]) -> Result<()> {
    refuse_in_use(rootfs, || Ok(holders::holders(tree)))?;
    tree.iter().rev().try_for_each(unmount_one)
}

fn unmount_one(mount: &MountInfo) -> Result<()> {
    fault::point("attach.unmount")?;
    let mut tried = mount::unmount_found(mount, Unmount::IfIdle);
    for _ in 1..holders::BUSY_TRIES {
        // One that was just forked holds what its parent had open, for a moment.
        if tried != Err(Errno::BUSY) {
            break;
        }
        std::thread::sleep(holders::BUSY_PAUSE);
        tried = mount::unmount_found(mount, Unmount::IfIdle);
    }
    tried.map_err(|e| {
        let error = Error::sys(UNMOUNT, show(&mount.point), e);
        match e {
            Errno::BUSY => error.hint("a process that we may not look at uses it; try again, or use --lazy"),
            _ => error,
        }
    })
}

/// How a kernel mount fares: it is there, wherever it lies, or it is not.
pub(super) fn health(rootfs: &Path, traces: &Traces, mounts: &mountinfo::Table) -> Health {
    let there = traces.mount().is_some_and(|known| {
        let found = known.current_id().and_then(|id| mounts.by_id(id));
        found.is_some_and(|m| known.is_certain() || is_certain(m, rootfs, traces))
    });
    if there { Health::Ready } else { Health::Gone }
}
