//! The record of one snapshot: one file, written and brought to the disk before the call that changes it is answered.
//!
//! Why files and not a database: there are some hundreds of snapshots, each changes at most twice, and all are read at the start. A file beside
//! the snapshot's directories goes with them in one rename, and can be read with `cat` when something is wrong.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::messages::{Info, Timestamp};
use crate::error::{Error, Kind as ErrorKind, Result, show};
use crate::id::ImageId;
use crate::plan::Ownership;
use crate::sys::durable::{Survives, make_unknown_file, write_file};

const VERSION: u32 = 1;
/// Longest record read: a key, a parent and labels, each bounded (see [`super::snapshots`]).
const MAX_BYTES: u64 = 1 << 20;
/// Its name in the directory of a snapshot.
pub(super) const RECORD: &str = "record.json";

/// What a snapshot is. The numbers are those of containerd's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Read-only, never to be committed.
    View = 1,
    /// Writable; Commit ends it.
    Active = 2,
    /// Unchangeable: others stand on it.
    Committed = 3,
}

impl Kind {
    /// Its name in filters.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// The number of its directory. Never used again.
    pub(super) number: u64,
    /// Its key, or name once committed.
    pub(super) name: String,
    /// The committed snapshot that it stands on; empty: none.
    pub(super) parent: String,
    pub(super) kind: Kind,
    /// Seconds and nanoseconds since 1970.
    pub(super) created: (i64, i32),
    pub(super) updated: (i64, i32),
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    /// Bytes and inodes of a committed one.
    #[serde(default)]
    pub(super) usage: (u64, u64),
    /// Has it files of its own? They cover what its layer has.
    pub(super) has_files: bool,
    /// The layer of the store that it is, or is made upon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) layer: Option<ImageId>,
    /// Only that layer's index says all: its tree on the disk lacks owners or devices.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) by_index: bool,
    /// The chain id of all up to it, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) chain: Option<String>,
    /// The user namespace of its container: files have the owners that they have outside of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) maps: Option<Ownership>,
}

/// As it lies on the disk.
#[derive(Serialize, Deserialize)]
struct Stored<R> {
    record: R,
    /// SHA-256 of the record as JSON: a changed byte in a name would be a name still.
    check: String,
}

impl Record {
    pub(super) fn new(number: u64, name: String, parent: String, kind: Kind) -> Self {
        let now = now();
        Record {
            version: VERSION,
            number,
            name,
            parent,
            kind,
            created: now,
            updated: now,
            labels: BTreeMap::new(),
            usage: (0, 0),
            has_files: true,
            layer: None,
            by_index: false,
            chain: None,
            maps: None,
        }
    }

    fn check(&self) -> Result<String> {
        let text = serde_json::to_vec(self).map_err(|e| Error::new(ErrorKind::Io, "write snapshot", &self.name, e))?;
        Ok(data_encoding::HEXLOWER.encode(&Sha256::digest(text)))
    }

    fn text(&self) -> Result<Vec<u8>> {
        let stored = Stored { record: self, check: self.check()? };
        serde_json::to_vec_pretty(&stored).map_err(|e| Error::new(ErrorKind::Io, "write snapshot", &self.name, e))
    }

    /// Into a directory that has none yet, and that nobody knows: it is not on the disk before the file that this gives was synced.
    pub(super) fn make(&self, dir: &Path) -> Result<std::fs::File> {
        make_unknown_file(&dir.join(RECORD), &self.text()?)
    }

    /// It was made, and never brought to the disk.
    pub(super) fn is_blank(dir: &Path) -> bool {
        match std::fs::symlink_metadata(dir.join(RECORD)) {
            Ok(meta) => meta.len() == 0,
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        }
    }

    /// In place of the one that is there.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        write_file(&dir.join(RECORD), &self.text()?, Survives::PowerLoss)
    }

    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(RECORD);
        let refuse = |kind, why: String| Error::new(kind, "read snapshot", show(&path), why);
        let file = std::fs::File::open(&path).map_err(|e| Error::io("read snapshot", show(&path), e))?;
        let bytes = crate::sys::fs::read_bounded("read snapshot", show(&path), file, MAX_BYTES)?;
        let Stored { record, check } = serde_json::from_slice::<Stored<Record>>(&bytes)
            .map_err(|e| refuse(ErrorKind::Integrity, e.to_string()))?;
        if record.version != VERSION {
            let why = format!("its version is {} and this program writes {VERSION}", record.version);
            return Err(refuse(ErrorKind::Invalid, why));
        }
        if record.check()? != check {
            return Err(refuse(ErrorKind::Integrity, "its check sum does not hold".into()));
        }
        Ok(record)
    }

    /// It changed just now.
    pub(super) fn touch(&mut self) {
        self.updated = now();
    }

    /// As containerd has it.
    pub(super) fn info(&self) -> Info {
        let time = |(seconds, nanos)| Some(Timestamp { seconds, nanos });
        Info {
            name: self.name.clone(),
            parent: self.parent.clone(),
            kind: self.kind as i32,
            created_at: time(self.created),
            updated_at: time(self.updated),
            labels: self.labels.clone(),
        }
    }
}

pub(super) fn now() -> (i64, i32) {
    let Timestamp { seconds, nanos } = Timestamp::now();
    (seconds, nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_written_and_a_changed_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::new(7, "ns/1/a b".into(), String::new(), Kind::Active);
        record.labels.insert("containerd.io/x".into(), "y\n".into());
        record.make(dir.path()).unwrap();
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), record);
        let path = dir.path().join(RECORD);
        let text = std::fs::read_to_string(&path).unwrap();
        for changed in [text.replace("ns/1/a b", "ns/2/a b"), text[..text.len() / 2].to_owned(), String::new()] {
            std::fs::write(&path, changed).unwrap();
            assert_eq!(Record::read(dir.path()).unwrap_err().kind(), ErrorKind::Integrity);
        }
    }
}
