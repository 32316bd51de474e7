//! What is read at the start, and what is deleted.

use std::collections::HashSet;
use std::path::Path;
use std::sync::PoisonError;

use super::table::Table;
use super::{Snapshots, inside};
use crate::error::{Error, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::snapshotter::dirs::{Dirs, FILES, WORK};
use crate::snapshotter::mapped;
use crate::snapshotter::record::Record;
use crate::sys::durable::sync_dir;
use crate::sys::remove::remove_tree;

impl Snapshots {
    /// `Cleanup`: delete what was removed.
    pub(crate) fn cleanup(&self) -> Result<()> {
        let gone = self.dirs.gone();
        if super::is_empty(&gone)? {
            return Ok(());
        }
        // A half of one must not come back.
        sync_dir(&self.dirs.snapshots()).map_err(inside)?;
        Self::clear(&gone)
    }

    /// Delete all that is in one of our directories. What cannot be deleted is logged, and tried again next time.
    pub(super) fn clear(dir: &Path) -> Result<()> {
        for entry in std::fs::read_dir(dir).map_err(|e| inside(Error::io("list", show(dir), e)))? {
            let path = entry.map_err(|e| inside(Error::io("list", show(dir), e)))?.path();
            fault::point("snapshotter.delete")?;
            if let Err(error) = remove_tree(&path) {
                log::warn!("{error}");
            }
        }
        Ok(())
    }

    /// Forget blobs whose layers no snapshot has.
    pub(super) fn clear_blobs(&self) {
        for entry in std::fs::read_dir(self.dirs.blobs()).into_iter().flatten().flatten() {
            let layer = std::fs::read_to_string(entry.path()).ok().and_then(|text| text.parse::<ImageId>().ok());
            if layer.is_none_or(|layer| !self.is_used(&layer)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Take away the mounts of maps that no snapshot has. Under [`Snapshots::change`].
    pub(super) fn clear_mapped(&self) {
        let used: HashSet<String> = self
            .read(|table| table.by_name.values().filter_map(|record| record.maps.as_ref().map(mapped::name)).collect());
        let _making = self.mapping.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in std::fs::read_dir(self.dirs.mapped()).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_none_or(|name| !used.contains(name))
                && let Err(error) = mapped::clear(&entry.path())
            {
                log::warn!("{error}");
            }
        }
    }

    /// Remove links of snapshots that are gone.
    pub(super) fn clear_links(&self) {
        for entry in std::fs::read_dir(self.dirs.links()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.trim_end_matches('s').parse::<u64>().ok());
            if number.is_none_or(|number| !self.dirs.snapshot(number).exists()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Nothing was written to this snapshot.
fn has_no_files(dir: &Path) -> bool {
    [FILES, WORK].iter().all(|name| match std::fs::read_dir(dir.join(name)) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    })
}

/// What a state directory has.
pub(super) struct Loaded {
    pub(super) table: Table,
    /// The number that the next snapshot gets.
    pub(super) next: u64,
    /// No snapshot was left out.
    pub(super) is_whole: bool,
}

/// Read all records.
pub(super) fn load(dirs: &Dirs) -> Result<Loaded> {
    let mut table = Table::default();
    let (mut next, mut is_whole) = (1, true);
    let (live, gone) = (dirs.snapshots(), dirs.gone());
    let mut records = Vec::new();
    for (dir, counts) in [(&live, true), (&gone, false)] {
        for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", show(dir), e))? {
            let path = entry.map_err(|e| Error::io("list", show(dir), e))?.path();
            let number = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<u64>().ok());
            let Some(number) = number else {
                log::warn!("{} is not a snapshot's", show(&path));
                continue;
            };
            next = next.max(number + 1);
            if !counts {
                continue;
            }
            match Record::read(&path) {
                Ok(record) if record.number == number => records.push(record),
                Ok(record) => {
                    is_whole = false;
                    log::error!("{}: its record is of snapshot {}", show(&path), record.number);
                }
                // Made for a `Prepare` that did not come; or a power loss in the midst of one, which was not answered.
                Err(_) if Record::is_unfinished(&path) && has_no_files(&path) => {
                    log::info!("{} was never finished", show(&path));
                    if let Err(error) = remove_tree(&path) {
                        log::warn!("{error}");
                    }
                }
                Err(error) => {
                    is_whole = false;
                    log::error!("{error}: the snapshot is left out, and stays on the disk");
                }
            }
        }
    }
    // Of two of one name the later counts: a power loss brought back the other, whose removal was not on the disk yet.
    records.sort_by_key(|record| std::cmp::Reverse((record.updated, record.number)));
    for record in records {
        match table.by_name.get(&record.name) {
            Some(other) => {
                is_whole = false;
                log::error!(
                    "snapshots {} and {} have the same name: {} is left out, and stays on the disk",
                    other.number,
                    record.number,
                    record.number
                );
            }
            None => table.insert(record),
        }
    }
    Ok(Loaded { table, next, is_whole })
}
