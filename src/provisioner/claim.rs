//! The claim: the container's directory with its record. From here on the id, the mount point and the image are taken, and whatever
//! is done can be undone from what is written down, also after this process was killed.

use std::path::Path;

use super::build::Making;
use super::{Now, Provisioner, Record, State, lock, points, record};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ContainerId;

impl Provisioner {
    /// Write down `record`, and hold its lock.
    pub(super) fn claim(&self, record: Record) -> Result<Making<'_>> {
        let id = &record.plan.id;
        let rootfs = &record.plan.rootfs;
        let containers = self.paths.containers();
        lock::make_private_dir(&containers)?;
        let _all = lock::directory(&containers)?;
        let now = Now::look()?;
        for other in self.records_at(rootfs)? {
            if now.elsewhere(&other)?.is_none() {
                let by = self.whole(other.plan.id);
                return Err(Error::new(
                    Kind::Busy,
                    "provision",
                    show(rootfs),
                    if other.state == State::Pending {
                        format!("the rootfs {by} is being mounted here already, or its mount was cut short")
                    } else {
                        format!("the rootfs {by} is mounted here already")
                    },
                )
                .hint(format!("unmount it first: `fsprov unmount {by}`")));
            }
        }
        self.refuse_shared_changes(&record, &now)?;
        let container = self.paths.container(id);
        if container.dir().exists() {
            return Err(Error::new(Kind::Busy, "provision", id, "a rootfs with this id exists")
                .hint(format!("choose another --id, or `fsprov unmount {id}` first")));
        }
        let forget_point = || points::release(&self.paths, id, Some(rootfs));
        points::take(&self.paths, rootfs, id)?;
        fault::point("provision.claim").map_err(|e| e.with_undo(forget_point()))?;
        record::make(&container).map_err(|e| e.with_undo(forget_point()))?;
        let locked = lock::directory(container.dir())
            .and_then(|l| l.ok_or_else(|| Error::new(Kind::Io, "lock", show(container.dir()), "it vanished")))
            .and_then(|l| record.write(&container).map(|()| l))
            // To destroy the parent is to lock it and then to look for children: either sees the other.
            .and_then(|l| self.refuse_changing_parent(id).map(|()| l));
        let claim = locked.map_err(|e| e.with_undo(self.forget(id, Some(rootfs))))?;
        Ok(Making::new(self, container, record, claim))
    }

    /// Two rootfses would not see what the other one changes, and overwrite it.
    fn refuse_shared_changes(&self, wanted: &Record, now: &Now) -> Result<()> {
        let Some(upper) = wanted.plan.scratch.as_ref().filter(|_| wanted.plan.changes_stay) else { return Ok(()) };
        for id in record::ids(&self.paths)? {
            let Some(other) = record::read_or_log(&self.paths.container(&id)) else { continue };
            if other.plan.scratch.as_ref() == Some(upper) && now.elsewhere(&other)?.is_none() {
                return Err(Error::new(
                    Kind::Busy,
                    "provision",
                    show(&wanted.plan.rootfs),
                    format!("the rootfs {id} keeps its changes in {} already", show(&upper.0)),
                )
                .hint(format!(
                    "name another directory with --upper, or unmount that one first: `fsprov unmount {id}`"
                )));
            }
        }
        Ok(())
    }

    fn refuse_changing_parent(&self, id: &ContainerId) -> Result<()> {
        let Some(parent) = id.parent() else { return Ok(()) };
        if !lock::is_held(self.paths.container(&parent).dir())? {
            return Ok(());
        }
        Err(Error::new(Kind::Busy, "provision", id, format!("its parent {parent} is being made or taken away"))
            .hint("try again when that is done"))
    }

    /// Remove the record and all that is kept for `id`: the last step of its life.
    pub(super) fn forget(&self, id: &ContainerId, rootfs: Option<&Path>) -> Result<()> {
        record::remove(&self.paths.container(id))?;
        points::release(&self.paths, id, rootfs)
    }
}
