//! Snapshots that are there before they are asked for, with their directories and room for a record: to write that is all that `Prepare` waits
//! for then, and no commit of the file system's journal.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Snapshots, make_dirs};
use crate::error::{Error, Result, show};
use crate::fault;
use crate::snapshotter::record::Record;
use crate::sys::durable::sync_dir;
use crate::sys::remove::remove_tree;

/// How many are wanted: a pod and its container take two.
const WANTED: usize = 8;

/// Those that nobody has yet, by number.
#[derive(Debug, Default)]
pub(super) struct Ready {
    numbers: Mutex<VecDeque<u64>>,
    /// Held while more are made.
    making: Mutex<()>,
}

impl Ready {
    fn numbers(&self) -> MutexGuard<'_, VecDeque<u64>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take(&self) -> Option<u64> {
        self.numbers().pop_front()
    }

    pub(super) fn give_back(&self, number: Option<u64>) {
        if let Some(number) = number {
            self.numbers().push_front(number);
        }
    }
}

impl Snapshots {
    /// Is it time for [`Self::make_ready`]?
    pub(crate) fn lacks_ready(&self) -> bool {
        self.ready.numbers().len() <= WANTED / 2
    }

    /// Make as many as are wanted. Without them `Prepare` takes longer, and that is all.
    pub(crate) fn make_ready(&self) {
        let Ok(_making) = self.ready.making.try_lock() else { return };
        // Asked again meanwhile.
        if !self.lacks_ready() {
            return;
        }
        let missing = WANTED.saturating_sub(self.ready.numbers().len()) as u64;
        let first = {
            let mut next = self.change();
            *next += missing;
            *next - missing
        };
        let numbers: Vec<u64> = (first..first + missing).collect();
        match self.make_blank(&numbers) {
            Ok(()) => self.ready.numbers().extend(numbers),
            Err(error) => {
                log::warn!("{error}");
                for number in numbers {
                    let _ = remove_tree(&self.dirs.fresh().join(number.to_string()));
                    let _ = remove_tree(&self.dirs.snapshot(number));
                }
            }
        }
    }

    /// Bring them to the disk, all at once.
    fn make_blank(&self, numbers: &[u64]) -> Result<()> {
        fault::point("snapshotter.ready")?;
        let mut files = Vec::new();
        for number in numbers {
            let (dir, to) = (self.dirs.fresh().join(number.to_string()), self.dirs.snapshot(*number));
            make_dirs(&dir, true, true)?;
            files.push((Record::make_room(&dir)?, to.clone()));
            std::fs::rename(&dir, &to).map_err(|e| Error::io("publish snapshot", show(&to), e))?;
        }
        for (file, to) in files {
            file.sync_all().map_err(|e| Error::io("publish snapshot", show(&to), e))?;
        }
        sync_dir(&self.dirs.snapshots())
    }

    /// Make one of them what `record` says: whole, or not at all.
    pub(super) fn finish(&self, record: &mut Record) -> Result<()> {
        let dir = self.dirs.snapshot(record.number);
        let done = self.dress(&dir, record).and_then(|is_changed| {
            if is_changed {
                sync_dir(&dir.join(super::FILES))?;
            }
            fault::point("snapshotter.publish")?;
            record.write(&dir)
        });
        done.map_err(|error| {
            let undo = remove_tree(&dir);
            super::inside(error).with_undo(undo.map(|_| ()))
        })
    }
}
