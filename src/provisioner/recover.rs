//! After a crash or a reboot: what is on the disk and in mountinfo is the truth, records are made to agree with it.

use serde::Serialize;

use super::build::Making;
use super::destroy::Unwritten;
use super::open::{self, Need, Recorded};
use super::{Condition, Now, Provisioner, Record, destroy, lock, points, record};
use crate::backend::{self, Detach};
use crate::error::Result;
use crate::id::ContainerId;
use crate::paths::ContainerPaths;
use crate::plan::BackendKind;

/// What became of one rootfs.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Recovered {
    /// Which.
    pub id: ContainerId,
    /// What was done.
    pub outcome: Outcome,
}

/// What recovery did with one rootfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Outcome {
    /// It was in order.
    Kept,
    /// It was dead or gone and is mounted again.
    Healed,
    /// It was half-made, or not to be kept: nothing of it is left.
    Destroyed,
    /// It is in another mount namespace, or being changed by another process: not touched.
    Skipped,
    /// It could not be brought to an end; a later try may.
    Failed {
        /// Why.
        reason: String,
    },
}

impl Provisioner {
    /// Bring every rootfs of this state root to an end: in order, or gone. `keep`: the ids to keep; `None`: all that were
    /// complete. Twice gives the same as once. One that fails does not keep the others from being recovered.
    pub fn recover(&self, keep: Option<&[ContainerId]>) -> Result<Vec<Recovered>> {
        // Who keeps a nested one keeps those that it is nested in: they would take it with them.
        let wanted = |id: &ContainerId| keep.is_none_or(|keep| keep.iter().any(|k| k == id || k.is_nested_in(id)));
        let (mut healed, mut destroyed): (Vec<_>, Vec<_>) = self.known()?.into_iter().partition(|(id, _)| wanted(id));
        // What lies inside another goes before it, and comes after it.
        healed.sort_by_key(|(id, depth)| (nesting(id), *depth));
        destroyed.sort_by_key(|(id, depth)| std::cmp::Reverse((*depth, nesting(id))));
        let mut all = Vec::new();
        for (id, wanted) in
            destroyed.into_iter().map(|(id, _)| (id, false)).chain(healed.into_iter().map(|(id, _)| (id, true)))
        {
            let outcome = self.recover_one(&id, wanted).unwrap_or_else(|error| {
                log::warn!("{error}");
                Outcome::Failed { reason: error.to_string() }
            });
            all.push(Recovered { id, outcome });
        }
        if let Some(_all) = lock::directory(&self.paths.containers())? {
            points::tidy(&self.paths)?;
        }
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(all)
    }

    /// Every id, and how deep its mount point lies. Of an overlay over a FUSE mount, the id of both.
    fn known(&self) -> Result<Vec<(ContainerId, usize)>> {
        let depth = |id: &ContainerId| {
            let record = record::read_or_log(&self.paths.container(id));
            record.map_or(0, |r| self.top_of(&r).unwrap_or(r).plan.rootfs.components().count())
        };
        let ids = record::ids(&self.paths)?.into_iter().filter(|id| self.whole(id.clone()) == *id);
        Ok(ids.map(|id| (depth(&id), id)).map(|(depth, id)| (id, depth)).collect())
    }

    /// A rootfs, and the overlay that is laid over it: a new mount below it needs a new overlay.
    fn recover_one(&self, id: &ContainerId, wanted: bool) -> Result<Outcome> {
        let top = record::read_or_log(&self.paths.container(id)).and_then(|record| self.top_of(&record));
        let outcome = self.recover_part(id, wanted, Below::AsItWas)?;
        let below = match outcome {
            Outcome::Kept => Below::AsItWas,
            Outcome::Healed => Below::Anew,
            _ => return Ok(outcome),
        };
        let Some(top) = top else { return Ok(outcome) };
        match self.recover_part(&top.plan.id, wanted, below)? {
            Outcome::Kept => Ok(outcome),
            // It was half-made, and nobody uses what is below alone.
            Outcome::Destroyed => self.destroy_id(id, Detach::Lazy).map(|_| Outcome::Destroyed),
            other => Ok(other),
        }
    }

    fn recover_part(&self, id: &ContainerId, wanted: bool, below: Below) -> Result<Outcome> {
        let container = self.paths.container(id);
        if lock::is_held(container.dir())? {
            return Ok(Outcome::Skipped);
        }
        let Some(claim) = lock::directory(container.dir())? else { return Ok(Outcome::Destroyed) };
        let record = Record::read(&container)?;
        let has_ended = |record: &Record| record.ends_with.is_some_and(|process| !process.is_alive());
        let wanted = wanted && !record.as_ref().is_some_and(has_ended);
        let condition = record.as_ref().map(|record| Self::condition(record, &Now::look()?)).transpose()?;
        match (condition, record) {
            (Some(Condition::Elsewhere), _) => Ok(Outcome::Skipped),
            (Some(Condition::Ready | Condition::Stopped), _) if wanted && below == Below::AsItWas => Ok(Outcome::Kept),
            (Some(Condition::Ready | Condition::Stopped | Condition::Dead | Condition::Gone), Some(record))
                if wanted =>
            {
                self.heal(&container, record, claim)
            }
            _ => {
                drop(claim);
                self.destroy_id(id, Detach::Lazy)?;
                Ok(Outcome::Destroyed)
            }
        }
    }

    /// Make a rootfs again that was complete: of what its record says it was made of, and of nothing else.
    pub(super) fn heal(&self, container: &ContainerPaths, mut record: Record, claim: lock::DirLock) -> Result<Outcome> {
        let now = Now::look()?;
        let (earlier, kept) = (now.traces(&record), record.clone());
        let of_another_boot = !now.is_of_this_boot(&record);
        let mut known = kept.places.clone();
        if let Some(known) = &mut known
            && self.whole(kept.plan.id.clone()) != kept.plan.id
        {
            // It is a FUSE mount below the state root, rebuilt a moment ago.
            known.layers.clear();
        }
        record.renew()?;
        let mut making = Making::new(self, container.clone(), record, claim);
        if kept.backend == BackendKind::Copy {
            // Before anything is cleared: what lies in another directory by now must not be forgotten.
            let recorded = Recorded { identities: known.as_ref(), of_another_boot };
            let places = open::open_again(&kept.plan, &kept.made, recorded, Need::NoImage)?;
            if backend::of(kept.backend).is_worth_keeping(&kept.plan, &earlier, &places) {
                return making.revive(&places, &earlier).map(|()| Outcome::Healed);
            }
            // It may have been made just now.
            if let Some(known) = &mut known {
                known.point = Some(places.point.place.identity());
            }
        }
        self.clear(&kept, Detach::Lazy)?;
        destroy::remove_changes(&kept, Unwritten::MayBeOurs)?;
        if let Some(places) = making.record.places.as_mut().filter(|_| !kept.plan.changes_stay) {
            places.scratch = None;
        }
        making.write()?;
        // On an error it is still known, and gone: what could not be mounted now (its image is being repaired) may be later.
        let recorded = Recorded { identities: known.as_ref(), of_another_boot };
        let places = open::open_again(&kept.plan, &kept.made, recorded, Need::Image)?;
        match making.build(&places) {
            Ok(()) => Ok(Outcome::Healed),
            Err(e) => Err(e.with_undo(destroy::remove_changes(&making.record, Unwritten::IsNotOurs))),
        }
    }
}

/// What lies below an overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Below {
    AsItWas,
    Anew,
}

/// How many ids an id is nested in.
fn nesting(id: &ContainerId) -> usize {
    id.as_str().matches('.').count()
}
