//! The record of one snapshot: one file, written and brought to the disk before the call that changes it is answered.
//!
//! Why files and not a database: there are some hundreds of snapshots, each changes at most twice, and all are read at the start. A file beside
//! the snapshot's directories goes with them in one rename, and can be read with `cat` when something is wrong.
//!
//! ```text
//! record.json:  two halves of 4096 bytes, each a record and blanks, or blanks alone. The later one that is whole counts
//! ```
//!
//! So a record is written in place, into the half that does not count, which is quicker than a new file by a commit of the journal. One that is too
//! long for a half has a file of its own length.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::messages::{Info, Timestamp};
use crate::error::{Error, Kind as ErrorKind, Result, show};
use crate::id::ImageId;
use crate::plan::Ownership;
use crate::sys::durable::{Survives, make_unknown_file, write_file, write_over};

const VERSION: u32 = 1;
/// Longest record read: a key, a parent and labels, each bounded (see [`super::snapshots`]).
const MAX_BYTES: u64 = 1 << 20;
/// Bytes for one record, of which a file has room for two.
const HALF: usize = 4096;
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
    /// How often it was written again.
    #[serde(default, skip_serializing_if = "is_default")]
    turn: u64,
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
            turn: 0,
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

    /// As it lies on the disk, where it lies alone.
    fn whole(&self) -> Result<Vec<u8>> {
        let mut text = self.text()?;
        if text.len() > HALF {
            // Never as long as two halves: it is not written over in part.
            text.push(b'\n');
            text.resize(text.len().max(2 * HALF + 1), b' ');
            return Ok(text);
        }
        let mut bytes = vec![b' '; 2 * HALF];
        bytes[self.half()..][..text.len()].copy_from_slice(&text);
        Ok(bytes)
    }

    /// Where its half begins: not the one of the record before it.
    fn half(&self) -> usize {
        (self.turn % 2) as usize * HALF
    }

    /// Into a directory that has none yet, and that nobody knows: it is not on the disk before the file that this gives was synced.
    pub(super) fn make(&self, dir: &Path) -> Result<std::fs::File> {
        make_unknown_file(&dir.join(RECORD), &self.whole()?)
    }

    /// The same before there is a record: room for one that [`Self::write`] writes.
    pub(super) fn make_room(dir: &Path) -> Result<std::fs::File> {
        make_unknown_file(&dir.join(RECORD), &[b' '; 2 * HALF])
    }

    /// Nothing was ever written here, or not all of it reached the disk. Of one that does not read; what was whole once has a beginning and an end.
    pub(super) fn is_unfinished(dir: &Path) -> bool {
        match std::fs::read(dir.join(RECORD)) {
            Ok(bytes) if bytes.len() == 2 * HALF => bytes.chunks(HALF).all(|half| {
                let text = half.trim_ascii();
                !(text.starts_with(b"{") && text.ends_with(b"}"))
            }),
            Ok(bytes) => bytes.is_empty(),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        }
    }

    /// In place of the one that is there, and on the disk when this returns.
    pub(super) fn write(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(RECORD);
        self.turn += 1;
        let bytes = self.whole()?;
        let has_room = std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.len() == 2 * HALF as u64);
        if bytes.len() != 2 * HALF || !has_room {
            return write_file(&path, &bytes, Survives::PowerLoss);
        }
        let file = write_over(&path, self.half() as u64, &bytes[self.half()..][..HALF])?;
        // What was before is only for a power loss: where a byte changes later, it must not come back.
        let _ = std::os::unix::fs::FileExt::write_all_at(&file, &[b' '; HALF], (HALF - self.half()) as u64);
        Ok(())
    }

    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(RECORD);
        let file = std::fs::File::open(&path).map_err(|e| Error::io("read snapshot", show(&path), e))?;
        let bytes = crate::sys::fs::read_bounded("read snapshot", show(&path), file, MAX_BYTES)?;
        if bytes.len() != 2 * HALF {
            return Self::parse(&path, &bytes);
        }
        let (first, second) = bytes.split_at(HALF);
        match (Self::parse(&path, first), Self::parse(&path, second)) {
            (Ok(one), Ok(other)) => Ok(if one.turn > other.turn { one } else { other }),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            // An earlier version's, by chance as long as two halves.
            (Err(error), Err(_)) => Self::parse(&path, &bytes).map_err(|_| error),
        }
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let refuse = |kind, why: String| Error::new(kind, "read snapshot", show(path), why);
        let Stored { record, check } =
            serde_json::from_slice::<Stored<Record>>(bytes).map_err(|e| refuse(ErrorKind::Integrity, e.to_string()))?;
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

/// Said by its absence: so earlier versions wrote records, and their check sums hold.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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

    #[test]
    fn a_record_is_written_in_place_by_turns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(RECORD);
        Record::make_room(dir.path()).unwrap();
        assert!(Record::is_unfinished(dir.path()) && Record::read(dir.path()).is_err());
        let mut record = Record::new(7, "ns/1/a".into(), String::new(), Kind::Active);
        for place in [HALF, 0, HALF] {
            record.write(dir.path()).unwrap();
            assert_eq!(Record::read(dir.path()).unwrap(), record);
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!((bytes.len(), bytes.iter().position(|byte| *byte != b' ')), (2 * HALF, Some(place)));
            assert!(!Record::is_unfinished(dir.path()));
        }
        // A power loss left the one before, and of the last a part.
        let (before, mut last) = (std::fs::read(&path).unwrap(), record.clone());
        last.write(dir.path()).unwrap();
        let mut both = before;
        both[..100].copy_from_slice(&std::fs::read(&path).unwrap()[..100]);
        std::fs::write(&path, &both).unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), record);
        // Or of the first one a part.
        both[HALF..].fill(b' ');
        std::fs::write(&path, &both).unwrap();
        assert!(Record::read(dir.path()).is_err() && Record::is_unfinished(dir.path()));
        // One that is too long for a half, by little and by much, and a short one after it.
        for length in [HALF, 2 * HALF, 0] {
            last.labels.insert("x".into(), "y".repeat(length));
            last.write(dir.path()).unwrap();
            assert_eq!(Record::read(dir.path()).unwrap(), last);
            assert_eq!(std::fs::metadata(&path).unwrap().len() == 2 * HALF as u64, length == 0, "{length}");
        }
    }
}
