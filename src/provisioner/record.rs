//! The record: the durable note of one provisioned rootfs, an intent written before the first mount.
//!
//! Anyone who reads one believes mountinfo and the processes, not the record alone: see [`super::Provisioner::list`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::planning::Planned;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::{ContainerId, ImageId};
use crate::paths::{ContainerPaths, StatePaths};
use crate::place::Identities;
use crate::plan::{BackendKind, Plan};
use crate::sys::{self, durable::Survives};
use crate::traces::Traces;

/// Longest record read: 200 volumes of two 4 KiB paths, hex-encoded, fit.
const MAX_BYTES: u64 = 8 << 20;

/// The version of the record's shape that this program writes, and the only one it reads.
const VERSION: u32 = 1;

/// Is the rootfs complete?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum State {
    /// Being made; or what is left of a making that was cut short.
    Pending,
    /// It was complete, and is being rebuilt; or that was cut short.
    Healing,
    /// It answered.
    Ready,
}

/// Which image a rootfs was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ImageNote {
    /// What the user wrote.
    pub reference: String,
    /// Its id, where it lies in the store.
    pub id: Option<ImageId>,
    /// Its name, where it has one.
    pub name: Option<String>,
}

/// The note of one provisioned rootfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Record {
    version: u32,
    /// Which image.
    pub image: ImageNote,
    /// Which backend made it.
    pub backend: BackendKind,
    /// What the backend was told.
    pub plan: Plan,
    /// What it left in the system.
    pub traces: Traces,
    /// Is it complete?
    pub state: State,
    /// When, RFC 3339, UTC, microseconds.
    pub created: String,
    /// /proc/sys/kernel/random/boot_id of the boot it was made in: mounts and processes end with the boot.
    pub boot_id: String,
    /// The mount namespace it was made in.
    pub mount_namespace: sys::process::Namespace,
    /// Directories made for the mount point, outermost first.
    #[serde(with = "path_list")]
    pub made: Vec<PathBuf>,
    /// Directories made as sources of volumes, or for those to lie in, outermost first, as long as it is not complete.
    #[serde(default, with = "path_list", skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<PathBuf>,
    /// What its paths led to. `None`: not opened yet, or made by a program that did not write it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub places: Option<Identities>,
    /// The process that it ends with: once that is gone, [`super::Provisioner::recover`] takes it away. `None`: it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_with: Option<sys::process::ProcessId>,
}

impl Record {
    /// Is it laid over what `other` shows?
    pub(super) fn stands_on(&self, other: &Record) -> bool {
        self.plan.layers.iter().any(|layer| layer.root == other.plan.rootfs)
    }

    /// A pending record of this moment, boot and mount namespace.
    pub(super) fn new(image: ImageNote, backend: BackendKind, planned: &Planned) -> Result<Self> {
        const FORM: &[time::format_description::FormatItem<'_>] =
            time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
        let created =
            time::OffsetDateTime::now_utc().format(FORM).map_err(|e| Error::new(Kind::Io, "write the time", "", e))?;
        Ok(Record {
            version: VERSION,
            image,
            backend,
            plan: planned.plan.clone(),
            traces: Traces::default(),
            state: State::Pending,
            created,
            boot_id: sys::process::boot_id()?,
            mount_namespace: sys::process::mount_namespace()?,
            made: planned.made.clone(),
            sources: planned.sources.clone(),
            places: None,
            ends_with: None,
        })
    }

    /// To be rebuilt, in this boot and mount namespace, with no traces.
    pub(super) fn renew(&mut self) -> Result<()> {
        self.traces = Traces::default();
        self.state = State::Healing;
        self.boot_id = sys::process::boot_id()?;
        self.mount_namespace = sys::process::mount_namespace()?;
        Ok(())
    }

    /// The record of a container; `None` where it has none (yet).
    pub fn read(container: &ContainerPaths) -> Result<Option<Self>> {
        let path = container.record();
        let refuse =
            |e: Error| e.hint(format!("if its rootfs is not mounted any more, delete {}", show(container.dir())));
        let bytes = match std::fs::File::open(&path) {
            Ok(file) => sys::fs::read_bounded("read record", show(&path), file, MAX_BYTES).map_err(refuse)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("open record", show(&path), e)),
        };
        if bytes.is_empty() {
            // Written in the moment of a power loss: what it named ended with that boot.
            return Ok(None);
        }
        let record = Self::parse(&bytes, &show(&path)).map_err(refuse)?;
        if container.dir().file_name() != Some(record.plan.id.as_str().as_ref()) {
            return Err(refuse(Error::new(
                Kind::Invalid,
                "read record",
                show(&path),
                format!("it is the record of {}", record.plan.id),
            )));
        }
        Ok(Some(record))
    }

    /// The record that `bytes` are; `subject` is what messages call it.
    pub fn parse(bytes: &[u8], subject: &str) -> Result<Self> {
        let invalid = |why: String| Error::new(Kind::Invalid, "read record", subject, why);
        let record: Record = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
        if record.version != VERSION {
            let why = format!("it has version {}, this program knows {VERSION}", record.version);
            return Err(invalid(why).hint("use the fsprov that made it"));
        }
        Ok(record)
    }

    /// Write the record: a reader finds all of the new one or all of the old one, also after this process was killed.
    ///
    /// It is brought to the disk only where a power loss would leave something behind that it names: the files of a copy. Mounts
    /// and servers end with the boot, and two syncs would take longer than all the rest of a mount.
    pub fn write(&self, container: &ContainerPaths) -> Result<()> {
        fault::point("record.write")?;
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(Kind::Io, "write record", show(container.record()), e))?;
        let survives = match self.backend {
            BackendKind::Copy => Survives::PowerLoss,
            BackendKind::Bind | BackendKind::Fuse | BackendKind::Overlay => Survives::Crash,
        };
        sys::durable::write_file(&container.record(), &bytes, survives)
    }
}

/// Make a container's directory (0700) and the backend's below it. [`Kind::Exists`] where there is one.
pub(super) fn make(container: &ContainerPaths) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut private = std::fs::DirBuilder::new();
    private.mode(0o700);
    private.create(container.dir()).map_err(|e| Error::io("make", show(container.dir()), e))?;
    private.create(container.backend()).map_err(|e| {
        Error::io("make", show(container.backend()), e)
            .with_undo(std::fs::remove_dir(container.dir()).map_err(|e| Error::io("remove", show(container.dir()), e)))
    })
}

/// Remove a container's directory: all that is in it is ours.
pub(super) fn remove(container: &ContainerPaths) -> Result<()> {
    sys::remove::remove_tree(container.dir()).map(|_| ())
}

/// The ids that have a directory.
pub(super) fn ids(paths: &StatePaths) -> Result<Vec<ContainerId>> {
    let dir = paths.containers();
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("list", show(&dir), e)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| Error::io("list", show(&dir), e))?.file_name();
        match name.to_str().and_then(|n| n.parse().ok()) {
            Some(id) => ids.push(id),
            None => log::warn!("{}: not made by fsprov", show(dir.join(name))),
        }
    }
    Ok(ids)
}

/// Every record. One that cannot be read is an error.
pub(super) fn all(paths: &StatePaths) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for id in ids(paths)? {
        records.extend(Record::read(&paths.container(&id))?);
    }
    Ok(records)
}

/// Every record that can be read; what is wrong with another is logged.
pub(super) fn readable(paths: &StatePaths) -> Result<Vec<Record>> {
    Ok(ids(paths)?.into_iter().filter_map(|id| read_or_log(&paths.container(&id))).collect())
}

/// The record, if it is there and can be read; what is wrong with it is logged.
pub(super) fn read_or_log(container: &ContainerPaths) -> Option<Record> {
    Record::read(container).unwrap_or_else(|error| {
        log::warn!("{error}");
        None
    })
}

mod path_list {
    use std::path::PathBuf;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(transparent)]
    struct One(#[serde(with = "crate::pathtext")] PathBuf);

    pub(super) fn serialize<S: Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
        paths.iter().cloned().map(One).collect::<Vec<_>>().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
        Ok(Vec::<One>::deserialize(from)?.into_iter().map(|One(path)| path).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: &str) -> Record {
        let plan = Plan::new(id.parse().unwrap(), "/mnt/a b\n".into(), "/s".into());
        let image = ImageNote { reference: "./x".into(), id: None, name: None };
        let planned = Planned {
            plan,
            sandbox: None,
            made: vec!["/mnt/a b\n".into()],
            cover: super::super::Cover::Refuse,
            sandbox_made: Vec::new(),
            upper_made: Vec::new(),
            sources: vec!["/s/a".into()],
            fill: std::collections::BTreeSet::new(),
        };
        Record::new(image, BackendKind::Bind, &planned).unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StatePaths::new(dir.path().to_owned());
        std::fs::create_dir(paths.containers()).unwrap();
        let record = sample("one");
        let container = paths.container(&record.plan.id);
        make(&container).unwrap();
        assert_eq!(Record::read(&container).unwrap(), None);
        record.write(&container).unwrap();
        assert_eq!(Record::read(&container).unwrap(), Some(record.clone()));
        assert_eq!(make(&container).unwrap_err().kind(), Kind::Exists);
        assert_eq!(crate::provisioner::Now::look().unwrap().elsewhere(&record).unwrap(), None);

        let text = std::fs::read_to_string(container.record()).unwrap();
        for (damaged, kind) in [
            (text[..text.len() / 2].to_owned(), Kind::Invalid),
            (text.replace("\"version\": 1", "\"version\": 9"), Kind::Invalid),
            (text.replace("\"one\"", "\"two\""), Kind::Invalid),
            (text.replace("\"one\"", "\"../one\""), Kind::Invalid),
            (" ".repeat(MAX_BYTES as usize + 1), Kind::Limit),
        ] {
            std::fs::write(container.record(), damaged).unwrap();
            assert_eq!(Record::read(&container).unwrap_err().kind(), kind);
        }
        assert!(all(&paths).is_err());
        remove(&container).unwrap();
        assert!(all(&paths).unwrap().is_empty());
    }
}
