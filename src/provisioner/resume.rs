//! A service starts again: what its last start left is gone on with, or taken away.
//!
//! Until a rootfs is adopted nobody answers for it while its connection lives on: nothing here looks into the mount, nor follows a
//! path to it.

use super::build::Making;
use super::look::{leads_to, parent_resolved};
use super::{Changes, Condition, Now, Provisioner, Record, Request, State, destroy, lock};
use crate::backend::{self, Detach};
use crate::error::Result;
use crate::plan::BackendKind;
use crate::sys::process::ProcessId;
use crate::traces::Shelved;

impl Provisioner {
    /// The rootfs of the request's id, where an earlier start left it and it can go on: its server lives, or `shelved`, what the shelf
    /// kept, lets another take its place. `None`: provision. What was dead or half-made is gone then.
    ///
    /// One that is alive is taken over only from a start of the same service, which has a shelf.
    pub fn resume(&self, request: &Request, shelved: Vec<Shelved>) -> Result<Option<Record>> {
        let names: Vec<_> = shelved.iter().map(|(name, _)| name.clone()).collect();
        let Some(id) = &request.id else {
            self.unshelve(&names);
            return Ok(None);
        };
        let container = self.paths.container(id);
        let Some(claim) = lock::directory(container.dir())? else {
            self.unshelve(&names);
            return Ok(None);
        };
        let Some(record) = Record::read(&container)? else {
            drop((claim, shelved));
            return self.start_over(request, &names);
        };
        let now = Now::look()?;
        destroy::refuse_elsewhere(&record, &now)?;
        let condition = Self::condition(&record, &now)?;
        let is_same = is_for(&record, request);
        let answers = matches!(condition, Condition::Ready | Condition::Stopped);
        let is_alive = answers && record.traces.supervisor.is_none_or(ProcessId::is_alive);
        if is_alive || answers && self.shelf.is_none() {
            let mut record = record;
            record.traces = backend::of(record.backend).refresh(&record.plan, &record.traces);
            return Ok((is_same && self.shelf.is_some()).then_some(record));
        }
        if is_same && condition == Condition::Gone && record.backend == BackendKind::Copy {
            // What was written into it must not be lost.
            self.heal(&container, record, claim)?;
            return Record::read(&container);
        }
        if is_same
            && matches!(condition, Condition::Ready | Condition::Stopped | Condition::Dead)
            && !shelved.is_empty()
        {
            let mut making = Making::new(self, container, record, claim);
            match making.adopt(shelved) {
                Ok(true) => {
                    log::info!("{id}: its server is replaced, and what was open in it stays good");
                    return Ok(Some(making.into_record()));
                }
                Ok(false) => {}
                Err(error) => log::warn!("{error}: mounting it from the start"),
            }
        } else {
            if !shelved.is_empty() {
                log::warn!("{id}: what was kept for it belongs to another start: mounting it from the start");
            }
            drop((claim, shelved));
        }
        self.start_over(request, &names)
    }

    fn start_over(&self, request: &Request, names: &[String]) -> Result<Option<Record>> {
        self.unshelve(names);
        if let Some(id) = &request.id {
            self.destroy_id(id, Detach::Lazy)?;
        }
        Ok(None)
    }

    /// Have what is kept for this rootfs let go, before it is taken away.
    pub fn unshelve_all(&self, record: &Record) {
        self.unshelve(&backend::of(record.backend).shelved(&record.plan));
    }

    fn unshelve(&self, names: &[String]) {
        let Some(shelf) = &self.shelf else { return };
        let done = names.iter().try_for_each(|name| shelf.remove(name));
        if let Err(error) = done {
            log::warn!("{error}");
        }
    }
}

/// Is it what is asked for?
fn is_for(record: &Record, request: &Request) -> bool {
    let plan = &record.plan;
    let source = |path: &std::path::Path| {
        std::fs::canonicalize(request.sandbox.as_deref().unwrap_or("".as_ref()).join(path)).ok()
    };
    let has_volume = |spec: &crate::volume::VolumeSpec| {
        let mut all = plan.volumes.iter();
        all.any(|v| {
            v.target == spec.target
                && v.access == spec.access
                && v.powers == spec.powers
                && Some(&v.source) == source(&spec.source).as_ref()
        })
    };
    record.state == State::Ready
        && parent_resolved(&request.rootfs).as_ref() == Some(&plan.rootfs)
        && record.image.reference == request.image.to_string()
        && request.backend.is_none_or(|kind| kind == record.backend)
        && plan.scratch.is_some() == (request.changes == Changes::Ephemeral)
        && plan.changes_stay == request.upper.is_some()
        && request.upper.as_deref().is_none_or(|said| {
            let known = record.places.as_ref().and_then(|places| places.scratch);
            known.is_some_and(|known| leads_to(said, &known))
        })
        && request.ownership.as_ref().is_none_or(|said| *said == plan.ownership)
        && plan.stubs == request.stubs
        && plan.live == request.live
        && (request.restraint.nosuid.is_none() || plan.restraint.nosuid == request.restraint.nosuid)
        && (request.restraint.nodev.is_none() || plan.restraint.nodev == request.restraint.nodev)
        && plan.restraint.no_devices == request.restraint.no_devices
        && plan.volumes.len() == request.volumes.len()
        && request.volumes.iter().all(has_volume)
}
