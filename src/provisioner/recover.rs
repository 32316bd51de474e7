//! After a crash or a reboot: what is on the disk and in mountinfo is the truth, records are made to agree with it.

use serde::Serialize;

use super::{Condition, Making, Provisioner, Record, State, lock, record, refuse_elsewhere, remove_made};
use crate::backend::Detach;
use crate::error::Result;
use crate::id::ContainerId;
use crate::paths::ContainerPaths;

/// What became of one rootfs.
#[derive(Clone, Debug, Serialize)]
pub struct Recovered {
    /// Which.
    pub id: ContainerId,
    /// What was done.
    pub outcome: Outcome,
}

/// What recovery did with one rootfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
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
    /// Bring every rootfs of this state root to an end: in order, or gone. `keep`: the ids that shall live; `None`: all that were
    /// complete. Twice gives the same as once. One that fails does not keep the others from being recovered.
    pub fn recover(&self, keep: Option<&[ContainerId]>) -> Result<Vec<Recovered>> {
        let recover = |id: ContainerId| {
            let wanted = keep.is_none_or(|keep| keep.contains(&id));
            let outcome = self.recover_one(&id, wanted).unwrap_or_else(|error| {
                log::warn!("{error}");
                Outcome::Failed { reason: error.to_string() }
            });
            Recovered { id, outcome }
        };
        Ok(record::ids(&self.paths)?.into_iter().map(recover).collect())
    }

    fn recover_one(&self, id: &ContainerId, wanted: bool) -> Result<Outcome> {
        let container = self.paths.container(id);
        if lock::is_held(container.dir())? {
            return Ok(Outcome::Skipped);
        }
        // Asked before the lock is taken: it says `changing` of a rootfs that is locked.
        let condition = self.status(id)?.map(|status| status.health);
        if condition == Some(Condition::Elsewhere) {
            return Ok(Outcome::Skipped);
        }
        let Some(claim) = lock::directory(container.dir())? else { return Ok(Outcome::Destroyed) };
        let Some(record) = Record::read(&container)? else {
            record::remove(&container)?;
            return Ok(Outcome::Destroyed);
        };
        match condition {
            Some(Condition::Ready) if wanted => return Ok(Outcome::Kept),
            Some(Condition::Dead | Condition::Gone) if wanted => {
                self.clear(&record, Detach::Lazy)?;
                return self.heal(&container, record, claim);
            }
            _ => {}
        }
        refuse_elsewhere(&record)?;
        self.clear(&record, Detach::Lazy)?;
        remove_made(&record)?;
        record::remove(&container)?;
        Ok(Outcome::Destroyed)
    }

    fn heal(&self, container: &ContainerPaths, mut record: Record, claim: lock::DirLock) -> Result<Outcome> {
        record.renew()?;
        record.write(container)?;
        let mut making = Making { container, record, _claim: claim };
        match making.build(&self.host) {
            Ok(()) => Ok(Outcome::Healed),
            Err(error) => {
                // Still known, and gone: what could not be mounted now (its image is being repaired) may be later.
                making.record.state = State::Ready;
                Err(error.with_undo(making.record.write(container)))
            }
        }
    }
}
