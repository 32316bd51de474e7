//! Which snapshots are mounted where, as this process sees it: from the mount table and the records on the disk. The snapshotter need not run.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::record::{Kind, Record};
use crate::error::{Error, Result, show};
use crate::paths::StatePaths;
use crate::provisioner::{Provisioner, Status};
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

/// Lists the mounts of the snapshots of all snapshotters upon this store.
pub(crate) fn mounted(paths: &StatePaths) -> Result<Vec<Mounted>> {
    let mut states = vec![paths.snapshotter()];
    if let Ok(named) = std::fs::read_dir(paths.snapshotters()) {
        states.extend(named.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok()));
    }
    let mut seen = BTreeSet::new();
    // What is gone has no mounts.
    let states = states.into_iter().filter_map(|state| Some((std::fs::canonicalize(&state).ok()?, state)));
    let states: Vec<_> = states.filter(|(real, _)| seen.insert(real.clone())).collect();
    if states.is_empty() {
        return Ok(Vec::new());
    }
    let table = mountinfo::read()?;
    let mut all = Vec::new();
    for (real, state) in &states {
        all.extend(mounted_of(state, real, &table)?);
    }
    all.sort_by(|a, b| (&a.snapshot, &a.at).cmp(&(&b.snapshot, &b.at)));
    Ok(all)
}

/// Name a state directory that is not the state root's own, so that [`mounted`] finds it. Names of those that are gone go.
pub(super) fn name_state(state: &Path, holder: &str, paths: &StatePaths) -> Result<()> {
    let dir = paths.snapshotters();
    if state == paths.snapshotter() {
        return Ok(());
    }
    let fail = |e| Error::io("name state directory in", show(&dir), e);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(fail)?;
    for entry in std::fs::read_dir(&dir).map_err(fail)?.flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|state| !state.exists()) {
            std::fs::remove_file(entry.path()).map_err(fail)?;
        }
    }
    match std::os::unix::fs::symlink(state, dir.join(holder)) {
        // The name is a hash of what it leads to.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(fail),
    }
}

/// Those of one state directory, as it is named and as it is.
fn mounted_of(state: &Path, real: &Path, table: &[MountInfo]) -> Result<Vec<Mounted>> {
    let places = Places::of(state, real, table);
    let found: Vec<_> = table.iter().filter_map(|mount| Some((mount, places.snapshot(mount)?))).collect();
    let lowers = lowers(&real.join("f"))?;
    let mut all = Vec::new();
    if found.is_empty() && lowers.is_empty() {
        return Ok(all);
    }
    let records = Records::read(&real.join("s"))?;
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
    for lower in lowers {
        let device = table.iter().rfind(|mount| mount.point == lower.at).map(|mount| mount.dev);
        let views =
            table.iter().filter(|mount| Some(mount.dev) == device && mount.is_fuse() && mount.point != lower.at);
        all.extend(views.filter_map(|mount| {
            let record = records.view_of(&lower.image)?;
            let (snapshot, image, at) = (record.name.clone(), records.image_of(record), mount.point.clone());
            Some(Mounted { snapshot, kind: What::View, form: "bind", image, at })
        }));
        all.push(lower);
    }
    Ok(all)
}

/// The FUSE mounts below snapshots.
fn lowers(dir: &Path) -> Result<Vec<Mounted>> {
    if !dir.join("containers").exists() {
        return Ok(Vec::new());
    }
    let all = Provisioner::of_host(StatePaths::new(dir.to_owned())).list()?;
    let lower = |status: Status| {
        let record = status.record;
        let (snapshot, image, at) = (record.plan.id.to_string(), record.image.reference, record.plan.rootfs);
        Mounted { snapshot, kind: What::Lower, form: "fuse", image, at }
    };
    Ok(all.into_iter().map(lower).collect())
}

/// The directories of snapshots, as mounts name them.
struct Places {
    snapshots: [PathBuf; 2],
    /// The device and the path on it.
    on_device: Option<((u32, u32), PathBuf)>,
}

impl Places {
    fn of(state: &Path, real: &Path, table: &[MountInfo]) -> Self {
        let snapshots = real.join("s");
        // The innermost mount that the directory lies on; of those that cover each other, the last.
        let innermost = table
            .iter()
            .filter(|mount| snapshots.starts_with(&mount.point))
            .max_by_key(|mount| mount.point.components().count());
        let on_device =
            innermost.and_then(|mount| Some((mount.dev, mount.root.join(snapshots.strip_prefix(&mount.point).ok()?))));
        Places { snapshots: [state.join("s"), snapshots], on_device }
    }

    /// The number of the snapshot that is mounted there.
    fn snapshot(&self, mount: &MountInfo) -> Option<u64> {
        let files = if mount.fs_type == "overlay" {
            let mut options = mount.super_options.as_bytes().split(|byte| *byte == b',');
            let upper = options.find_map(|option| option.strip_prefix(b"upperdir="));
            let Some(upper) = upper else {
                // A view: its source is its own directory.
                return self.below(Path::new(&mount.source))?.to_str()?.parse().ok();
            };
            self.below(Path::new(OsStr::from_bytes(upper)))?
        } else {
            let (_, below) = self.on_device.as_ref().filter(|(device, _)| *device == mount.dev)?;
            mount.root.strip_prefix(below).ok()?
        };
        let number = files.parent()?.to_str()?.parse().ok()?;
        (files.file_name()? == super::dirs::FILES).then_some(number)
    }

    fn below<'p>(&self, path: &'p Path) -> Option<&'p Path> {
        self.snapshots.iter().find_map(|snapshots| path.strip_prefix(snapshots).ok())
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

    /// The view of what a FUSE mount shows, as that is called. `None`: none, or there are several, and which one is mounted nobody knows.
    fn view_of(&self, shown: &str) -> Option<&Record> {
        let stands_on = |record: &&Record| {
            let parent = self.by_name.get(&record.parent).and_then(|number| self.by_number.get(number));
            let chain = parent.and_then(|parent| parent.chain.as_deref());
            record.kind == Kind::View && (chain == Some(shown) || record.parent == shown)
        };
        let mut views = self.by_number.values().filter(stands_on);
        views.next().filter(|_| views.next().is_none())
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
