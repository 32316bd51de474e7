//! Which snapshots are mounted where, as this process sees it: from the mount table and the records on the disk. The snapshotter need not run.

use std::collections::{BTreeSet, HashMap};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::record::{Kind, Record};
use crate::error::{Error, Result, show};
use crate::paths::StatePaths;
use crate::provisioner::Provisioner;
use crate::sys::mountinfo::{self, MountInfo};

/// The label of a snapshot that says which image it was pulled for.
const IMAGE: &str = "containerd.io/snapshot/cri.image-ref";

/// A mount of a snapshot, or of what lies below some.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Mounted {
    /// Its key, as containerd has it; of what lies below, the name of the mount.
    pub(crate) snapshot: String,
    /// What it is.
    pub(crate) kind: What,
    /// How: `overlay`, `bind` or `fuse`.
    pub(crate) form: &'static str,
    /// The image, where that is known; else the chain id, or the parent's name.
    pub(crate) image: String,
    /// Where.
    #[serde(with = "crate::pathtext")]
    pub(crate) at: PathBuf,
}

/// What is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum What {
    /// A snapshot that is written to.
    Active,
    /// One that is only read.
    View,
    /// Layers, merged, below snapshots.
    Lower,
}

impl What {
    /// The word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            What::Active => "active",
            What::View => "view",
            What::Lower => "lower",
        }
    }
}

/// Lists the mounts of the snapshots in this state directory; empty if the directory does not exist.
pub(crate) fn mounted(state: &Path) -> Result<Vec<Mounted>> {
    let Ok(state) = std::fs::canonicalize(state) else { return Ok(Vec::new()) };
    let table = mountinfo::read()?;
    let places = Places::of(&state, &table);
    let found: Vec<_> = table.iter().filter_map(|mount| Some((mount, places.snapshot(mount)?))).collect();
    let mut all = Vec::new();
    if !found.is_empty() {
        let records = Records::read(&state.join("s"))?;
        for (mount, number) in found {
            let Some(record) = records.by_number.get(&number) else { continue };
            // A view of one that is committed shows that one's files.
            let kind = if record.kind == Kind::Active { What::Active } else { What::View };
            all.push(Mounted {
                snapshot: record.name.clone(),
                kind,
                form: if mount.fs_type == "overlay" { "overlay" } else { "bind" },
                image: records.image_of(record),
                at: mount.point.clone(),
            });
        }
    }
    let below = state.join("f");
    if below.join("containers").exists() {
        for status in Provisioner::of_host(StatePaths::new(below)).list()? {
            let record = status.record;
            let (snapshot, image, at) = (record.plan.id.to_string(), record.image.reference, record.plan.rootfs);
            all.push(Mounted { snapshot, kind: What::Lower, form: "fuse", image, at });
        }
    }
    all.sort_by(|a, b| (&a.snapshot, &a.at).cmp(&(&b.snapshot, &b.at)));
    Ok(all)
}

/// The directories of snapshots, as mounts name them.
struct Places {
    snapshots: PathBuf,
    /// The device and the path on it.
    on_device: Option<((u32, u32), PathBuf)>,
}

impl Places {
    fn of(state: &Path, table: &[MountInfo]) -> Self {
        let snapshots = state.join("s");
        // The innermost mount that the directory lies on; of those that cover each other, the last.
        let innermost = table
            .iter()
            .filter(|mount| snapshots.starts_with(&mount.point))
            .max_by_key(|mount| mount.point.components().count());
        let on_device =
            innermost.and_then(|mount| Some((mount.dev, mount.root.join(snapshots.strip_prefix(&mount.point).ok()?))));
        Places { snapshots, on_device }
    }

    /// The number of the snapshot that is mounted there.
    fn snapshot(&self, mount: &MountInfo) -> Option<u64> {
        let files = if mount.fs_type == "overlay" {
            let mut options = mount.super_options.as_bytes().split(|byte| *byte == b',');
            let upper = options.find_map(|option| option.strip_prefix(b"upperdir="))?;
            PathBuf::from(std::ffi::OsStr::from_bytes(upper)).strip_prefix(&self.snapshots).ok()?.to_owned()
        } else {
            let (_, below) = self.on_device.as_ref().filter(|(device, _)| *device == mount.dev)?;
            mount.root.strip_prefix(below).ok()?.to_owned()
        };
        let number = files.parent()?.to_str()?.parse().ok()?;
        (files.file_name()? == super::dirs::FILES).then_some(number)
    }
}

/// All records on the disk. One that cannot be read is left out.
struct Records {
    by_number: HashMap<u64, Record>,
    by_name: HashMap<String, u64>,
}

impl Records {
    fn read(dir: &Path) -> Result<Self> {
        let mut all = Records { by_number: HashMap::new(), by_name: HashMap::new() };
        for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", show(dir), e))?.flatten() {
            if let Ok(record) = Record::read(&entry.path()) {
                all.by_name.insert(record.name.clone(), record.number);
                all.by_number.insert(record.number, record);
            }
        }
        Ok(all)
    }

    /// What people call that which a snapshot stands on.
    fn image_of(&self, record: &Record) -> String {
        let mut seen = BTreeSet::new();
        let parent = |record: &Record| self.by_name.get(&record.parent).and_then(|number| self.by_number.get(number));
        let mut next = parent(record);
        while let Some(below) = next.filter(|below| seen.insert(below.number)) {
            if let Some(image) = below.labels.get(IMAGE) {
                return image.clone();
            }
            next = parent(below);
        }
        parent(record).and_then(|below| below.chain.clone()).unwrap_or_else(|| record.parent.clone())
    }
}
