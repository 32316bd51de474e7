//! Taking a rootfs away, and those nested in it before it.

use std::path::PathBuf;

use rustix::fs::{AtFlags, unlinkat};
use rustix::io::Errno;

use super::now::NamespaceKeeper;
use super::{Now, Provisioner, Record, Selector, State, fill, lock, record};
use crate::backend::{self, Detach};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ContainerId;
use crate::place::Place;
use crate::plan::BackendKind;
use crate::sys::remove::remove_tree_at;

impl Provisioner {
    /// Take a rootfs away, and everything of ours with it: those nested in it (`ID.CHILD`) first. `false`: there is none. Never
    /// touches a volume's content. One that fails stays known, and may be tried again.
    pub fn destroy(&self, selector: &Selector, how: Detach) -> Result<bool> {
        match self.find_id(selector)? {
            Some(id) => self.destroy_id(&self.whole(id), how),
            None => Ok(false),
        }
    }

    pub(super) fn destroy_id(&self, id: &ContainerId, how: Detach) -> Result<bool> {
        let container = self.paths.container(id);
        // Waits for a provision or destroy of the same rootfs in flight.
        let Some(_lock) = lock::directory(container.dir())? else { return Ok(false) };
        let record = Record::read(&container)?;
        if let Some(record) = &record {
            refuse_elsewhere(record, &Now::look()?)?;
        }
        // From here on no child can be made: it would find its parent locked.
        for child in record::ids(&self.paths)?.into_iter().filter(|other| other.parent().as_ref() == Some(id)) {
            self.destroy_id(&child, how)?;
        }
        match &record {
            Some(record) => {
                self.refuse_with_another_inside(record)?;
                self.clear(record, how)?;
                fault::point("destroy.unmounted")?;
                remove_made(record)?;
            }
            None => log::info!("{id}: no record: its provisioning ended before its first step"),
        }
        fault::point("destroy.forget")?;
        self.forget(id, record.as_ref().map(|r| r.plan.rootfs.as_path()))?;
        Ok(true)
    }

    /// A copy goes with all that lies in its directory, and its volumes go out of sight: not with another rootfs in it. (What
    /// is mounted in a rootfs that is a mount, its backend sees.)
    fn refuse_with_another_inside(&self, record: &Record) -> Result<()> {
        if record.backend != BackendKind::Copy {
            return Ok(());
        }
        let (outer, now) = (&record.plan, Now::look()?);
        for id in record::ids(&self.paths)?.into_iter().filter(|id| *id != outer.id) {
            let Some(other) = record::read_or_log(&self.paths.container(&id)) else { continue };
            if other.plan.rootfs.starts_with(&outer.rootfs) && now.elsewhere(&other)?.is_none() {
                let (inner, at) = (&other.plan.id, show(&other.plan.rootfs));
                return Err(Error::new(
                    Kind::Busy,
                    "unmount",
                    show(&outer.rootfs),
                    format!("rootfs {inner} lies in it: {at}"),
                )
                .hint(format!("`fsprov unmount {inner}` first")));
            }
        }
        Ok(())
    }

    /// Take away what a rootfs left in the system.
    pub(super) fn clear(&self, record: &Record, how: Detach) -> Result<()> {
        let traces = Now::look()?.traces(record);
        backend::of(record.backend).destroy(&self.host, &record.plan, &traces, how).map(|_| ())
    }
}

/// A rootfs in another mount namespace cannot be reached from here, as long as that namespace lives.
pub(super) fn refuse_elsewhere(record: &Record, now: &Now) -> Result<()> {
    let (kept, way) = match now.elsewhere(record)? {
        None => return Ok(()),
        Some(NamespaceKeeper::Process(pid)) => {
            (format!("where process {pid} runs"), format!("nsenter --preserve-credentials -U -m -t {pid}"))
        }
        Some(NamespaceKeeper::File(file)) => {
            (format!("which the file {} keeps", show(&file)), format!("nsenter --mount={}", show(&file)))
        }
    };
    Err(Error::new(
        Kind::Busy,
        "unmount",
        show(&record.plan.rootfs),
        format!("it is mounted in another mount namespace, {kept}"),
    )
    .hint(format!("run it there: {way} fsprov unmount {}", record.plan.id)))
}

/// Remove what was made beside the rootfs itself: its changes, the directories made for its mount point, as long as they are empty,
/// and, where it was never complete, what was made or was being copied for its volumes.
pub(super) fn remove_made(record: &Record) -> Result<()> {
    remove_changes(record, Unwritten::MayBeOurs)?;
    remove_empty(record)
}

/// The same without the changes.
fn remove_empty(record: &Record) -> Result<()> {
    if record.state == State::Pending {
        fill::remove_stages(&record.plan)?;
        remove_dirs("remove volume source", &record.sources)?;
    }
    remove_dirs("remove mount point", &record.made)
}

/// A directory for changes that is there, and of which the record says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unwritten {
    /// This process knows that it did not make it.
    IsNotOurs,
    /// One that was killed may have made it, just before it would have written so.
    MayBeOurs,
}

/// After an error in this process: what it made is known.
pub(super) fn undo_made(record: &Record) -> Result<()> {
    remove_changes(record, Unwritten::IsNotOurs)?;
    remove_empty(record)
}

/// Remove the directory that was made for changes, with all that is in it; not another one that is there by now.
pub(super) fn remove_changes(record: &Record, unwritten: Unwritten) -> Result<()> {
    const OP: &str = "delete changes in";
    let Some(scratch) = record.plan.scratch.as_ref().filter(|_| !record.plan.changes_stay) else { return Ok(()) };
    fault::point("destroy.changes")?;
    let Some((parent, name)) = Place::parent_of(&scratch.0) else { return Ok(()) };
    let known = record.places.as_ref().and_then(|places| places.scratch.as_ref());
    let is_ours = match parent.child(name) {
        Ok(there) => known.map_or_else(
            // As it is made: nobody else's, and closed to all others.
            || {
                let is_mine = there.owner().0 == rustix::process::geteuid().as_raw() && there.mode() == 0o700;
                unwritten == Unwritten::MayBeOurs && is_mine
            },
            |known| known.is_same(&there.identity()),
        ),
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::LOOP) => false,
        Err(e) => return Err(Error::sys(OP, show(&scratch.0), e)),
    };
    if !is_ours {
        log::warn!("{} is not the directory that was made for changes: it stays", show(&scratch.0));
        return Ok(());
    }
    remove_tree_at(&parent, name, &scratch.0).map(|_| ()).map_err(|e| e.within(OP, show(&scratch.0)))
}

/// Remove empty directories, innermost first.
fn remove_dirs(op: &'static str, dirs: &[PathBuf]) -> Result<()> {
    for dir in dirs.iter().rev() {
        let Some((parent, name)) = Place::parent_of(dir) else { continue };
        match unlinkat(&parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e @ (Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR)) => {
                log::info!("{} stays: {e}: somebody put something there", show(dir));
                break;
            }
            Err(e) => return Err(Error::sys(op, show(dir), e)),
        }
    }
    Ok(())
}
