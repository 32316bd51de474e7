//! Which snapshots have what lies below them in one FUSE mount, and what it shows.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::mounts::{Lower, LowerForm, MAX_LAYERS, MAX_SHORT_PATHS, THROUGH_LINK, What, without_repeats};
use super::{Snapshots, inside};
use crate::backend::Support;
use crate::error::{Error, Kind as ErrorKind, Result, show};
use crate::index::Index;
use crate::plan::Ownership;
use crate::snapshotter::merged::{Merged, Wanted};
use crate::snapshotter::record::{Kind, Record};
use crate::store::{Claims, Showing, Stacked, Upper, write_own_index};

impl Snapshots {
    /// Refuse what this host cannot do.
    pub(super) fn check_lower(merged: &Merged, form: LowerForm) -> Result<Showing> {
        match (merged.support(), form) {
            (Support::Yes, _) => Ok(Showing::Index),
            (Support::No { .. }, LowerForm::Auto) => Ok(Showing::Tree),
            (Support::No { reason, remedy }, LowerForm::Fuse) => {
                Err(Error::new(ErrorKind::Unsupported, "start snapshotter", "--lower fuse", reason).hint(remedy))
            }
        }
    }

    /// Our claims in the store.
    pub(super) fn claims(&self) -> Claims<'_> {
        self.store.claims_of(&self.holder, self.showing)
    }

    /// Can these not be the lower directories of an overlay?
    pub(super) fn must_merge(&self, below: &[&Lower]) -> bool {
        let short: usize = below.iter().map(|lower| lower.link.len() + THROUGH_LINK.len() + 1).sum();
        self.lower == LowerForm::Fuse
            || below.len() > MAX_LAYERS
            || short > MAX_SHORT_PATHS
            || below.iter().any(|lower| lower.by_index)
    }

    fn with_wanted<T>(&self, record: &Record, stack: &[Lower], work: impl FnOnce(&Wanted<'_>) -> T) -> Result<T> {
        let real =
            |path: &Path| std::fs::canonicalize(path).map_err(|e| inside(Error::io("find layer", show(path), e)));
        let layers = stack.iter().rev().map(|lower| real(&lower.files)).collect::<Result<_>>()?;
        let label = match &record.parent {
            parent if parent.is_empty() => record.name.clone(),
            parent => self.find(parent)?.chain.clone().unwrap_or_else(|| parent.clone()),
        };
        let write_index = |to: &Path| self.write_merged_index(stack, to);
        Ok(work(&Wanted { label: &label, layers, maps: record.maps.as_ref(), write_index: &write_index }))
    }

    /// Where all of these are shown for a snapshot, by a server that answers.
    pub(super) fn show_merged(&self, record: &Record, stack: &[Lower]) -> Result<PathBuf> {
        let shown =
            self.with_wanted(record, stack, |wanted| self.merged.show(record.number, wanted))?.map_err(inside)?;
        if !shown.lost.is_empty() {
            let is_lost = |other: &Record| shown.lost.contains(&other.number);
            let names = self.read(|table| {
                let lost = table.by_name.values().filter(|other| is_lost(other));
                lost.map(|other| format!("{:?}", other.name)).collect::<Vec<_>>()
            });
            log::error!(
                "the FUSE server below them died, and these do not answer where they are mounted: {}",
                names.join(", ")
            );
        }
        Ok(shown.at)
    }

    fn write_merged_index(&self, stack: &[Lower], to: &Path) -> Result<()> {
        let stacked = stack.iter().rev().map(|lower| match &lower.what {
            What::Layer(layer) => Ok(Stacked::Layer(layer.clone())),
            What::Files(number) => self.own_index(*number, &lower.files).map(Stacked::Other),
        });
        self.store.write_merged_index(&stacked.collect::<Result<Vec<_>>>()?, to)
    }

    /// The index of what a committed snapshot has written: it does not change any more.
    fn own_index(&self, number: u64, files: &Path) -> Result<PathBuf> {
        let at = self.merged.own_index(number);
        if Index::open(&at).is_err() {
            let upper = Upper::open(files, self.marks(), Ownership::default(), &self.store.policy().limits)?;
            write_own_index(&upper, &at)?;
        }
        Ok(at)
    }

    /// What the top directory of a new snapshot must look like, and the maps that do not show in it yet. `None`: nothing lies below.
    pub(super) fn model_of<'a>(&self, record: &'a Record) -> Result<Option<(PathBuf, Option<&'a Ownership>)>> {
        let stack = self.stack(record)?;
        let below = without_repeats(&stack);
        match below.first() {
            None => Ok(None),
            Some(_) if self.must_merge(&below) => {
                self.with_wanted(record, &stack, |wanted| Some((self.merged.rootfs_of(wanted), None)))
            }
            Some(top) => Ok(Some((top.files.clone(), record.maps.as_ref()))),
        }
    }

    /// At the start: mounts that no snapshot needs go, and indexes of those that are gone.
    pub(super) fn reconcile_merged(&self) {
        self.merged.reconcile(|| {
            let records = self.read(|table| {
                let mounted = table.by_name.values().filter(|record| record.kind != Kind::Committed);
                mounted.cloned().collect::<Vec<_>>()
            });
            let name = |record: &Record| {
                let stack = self.stack(record).ok()?;
                if stack.is_empty() || !self.must_merge(&without_repeats(&stack)) {
                    return None;
                }
                self.with_wanted(record, &stack, Merged::name_of).ok()
            };
            records.iter().filter_map(|record| Some((record.number, name(record)?))).collect::<HashMap<_, _>>()
        });
        self.merged.clear_indexes(|number| self.dirs.snapshot(number).exists());
    }
}
