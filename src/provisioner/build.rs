//! The rootfs under construction: the backend makes it of the places that were opened, and the record says what there is to undo,
//! until it says that the rootfs is ready.

use super::open::Opened;
use super::{Choice, Provisioner, Record, State, destroy, lock, reach, select};
use crate::backend::{self, Detach};
use crate::error::{Error, Result};
use crate::fault;
use crate::paths::ContainerPaths;
use crate::place::{Identities, Places};
use crate::plan::BackendKind;
use crate::traces::{Journal, Shelved, Traces};

/// A rootfs under construction: its record is on the disk and its directory is locked.
pub(super) struct Making<'a> {
    by: &'a Provisioner,
    container: ContainerPaths,
    pub(super) record: Record,
    _claim: lock::DirLock,
}

impl<'a> Making<'a> {
    pub(super) fn new(by: &'a Provisioner, container: ContainerPaths, record: Record, claim: lock::DirLock) -> Self {
        Making { by, container, record, _claim: claim }
    }

    pub(super) fn write(&self) -> Result<()> {
        self.record.write(&self.container)
    }

    pub(super) fn into_record(self) -> Record {
        self.record
    }

    /// The places are open: what was made for changes is known from here on, and who reaches the rootfs.
    pub(super) fn opened(&mut self, opened: Opened) -> Result<Opened> {
        let Record { plan, backend, places, .. } = &mut self.record;
        *places = Some(Identities { scratch: opened.scratch(), ..Identities::default() });
        plan.restraint = reach::restrain(&self.by.host, *backend, &opened.point.parent, plan.restraint)?;
        Ok(opened)
    }

    /// Have the backend do `work`, which notes its traces in the record before it depends on them.
    fn with_journal<T>(&mut self, work: impl FnOnce(&mut Journal<'_>) -> T) -> T {
        let Making { by, container, record, .. } = self;
        let mut note = |traces: &Traces| {
            record.traces = traces.clone();
            record.write(container)
        };
        work(&mut Journal { note: &mut note, meter: by.meter.clone(), shelf: by.shelf.clone() })
    }

    /// Make it of these places.
    pub(super) fn build(&mut self, places: &Places) -> Result<()> {
        self.record.places = Some(places.identities());
        let (host, plan, backend) = (&self.by.host, self.record.plan.clone(), backend::of(self.record.backend));
        self.with_journal(|journal| backend.provision(host, &plan, places, journal))?;
        fault::point("provision.ready")
            .and_then(|()| self.ready())
            .map_err(|e| e.with_undo(backend.destroy(host, &plan, &self.record.traces, Detach::Lazy).map(|_| ())))
    }

    /// Make it by the backend of `choice`; where `auto` chose one that fails for a reason of this host, by the next one that can.
    pub(super) fn build_by(&mut self, places: &Places, mut choice: Choice, asked: Option<BackendKind>) -> Result<()> {
        loop {
            let error = match self.build(places) {
                Err(error) if asked.is_none() => error,
                other => return other,
            };
            choice = select::choose_after(&self.by.host, &self.record.plan, choice, error)?;
            self.record.backend = choice.backend;
            self.record.traces = Traces::default();
            self.write()?;
        }
    }

    fn ready(&mut self) -> Result<()> {
        let before = self.record.clone();
        self.record.state = State::Ready;
        // They stay, whatever becomes of the rootfs.
        self.record.sources.clear();
        let written = self.write();
        if written.is_err() {
            self.record = before;
        }
        written
    }

    /// Put back what was taken away of it, with what it holds; `earlier` are the traces of its last making.
    pub(super) fn revive(&mut self, places: &Places, earlier: &Traces) -> Result<()> {
        // The image was not opened.
        let Identities { layers, index, .. } = self.record.places.take().unwrap_or_default();
        self.record.places = Some(Identities { layers, index, ..places.identities() });
        let (plan, backend) = (self.record.plan.clone(), backend::of(self.record.backend));
        self.with_journal(|journal| backend.revive(&plan, earlier, places, journal))?;
        self.ready()
    }

    /// Go on serving it with what a shelf kept.
    pub(super) fn adopt(&mut self, shelved: Vec<Shelved>) -> Result<bool> {
        let (plan, traces, backend) =
            (self.record.plan.clone(), self.record.traces.clone(), backend::of(self.record.backend));
        self.with_journal(|journal| backend.adopt(&plan, &traces, shelved, journal))
    }

    /// Nothing of it may be left, since `error` ended its making.
    pub(super) fn undo(&self, error: Error) -> Error {
        let undone = destroy::undo_made(&self.record);
        error.with_undo(undone).with_undo(self.by.forget(&self.record.plan.id, Some(&self.record.plan.rootfs)))
    }
}
