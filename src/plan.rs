//! The plan: all that a backend is told about one rootfs. Pure data; making one touches no mount and no disk.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result, show};
use crate::id::ContainerId;
use crate::volume::Volume;

/// The ways to make a rootfs out of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum BackendKind {
    /// Kernel bind mount of one layer, read-only.
    Bind,
    /// Our FUSE server.
    Fuse,
    /// Kernel overlayfs over the layers.
    Overlay,
    /// A copy of the layers' files.
    Copy,
}

impl BackendKind {
    /// The word for it on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Bind => "bind",
            BackendKind::Fuse => "fuse",
            BackendKind::Overlay => "overlay",
            BackendKind::Copy => "copy",
        }
    }
}

impl std::fmt::Display for BackendKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One run of ids: container ids `inside..inside+count` are host ids `outside..outside+count`
/// (the columns of user_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// First id in the image.
    pub inside: u32,
    /// First id presented on the host.
    pub outside: u32,
    /// How many; at least 1.
    pub count: u32,
}

/// How ownership in the image is presented. Empty lists: as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// User ids; an id outside every range is presented as 65534.
    pub uids: Vec<IdRange>,
    /// Group ids, likewise.
    pub gids: Vec<IdRange>,
    /// Everything belongs to this one user and group (fuse only).
    pub squash: Option<(u32, u32)>,
}

/// The kernel's id for "not mapped" (/proc/sys/kernel/overflowuid).
pub const OVERFLOW_ID: u32 = 65534;

impl Ownership {
    /// True where ids are presented as they are in the image.
    pub fn is_identity(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty() && self.squash.is_none()
    }

    /// The presented id of an id in the image.
    pub fn map(ranges: &[IdRange], id: u32) -> u32 {
        if ranges.is_empty() {
            return id;
        }
        ranges
            .iter()
            .find_map(|r| id.checked_sub(r.inside).filter(|d| *d < r.count).and_then(|d| r.outside.checked_add(d)))
            .unwrap_or(OVERFLOW_ID)
    }
}

/// How volumes are served by the FUSE server; the other backends have the kernel's own coherence and need none of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// How long names and attributes of a volume may be used before they are asked for again: how late a change made on the
    /// host may be seen inside. Absence is never kept.
    pub ttl_ms: u64,
    /// Writes gather in the kernel (`--writeback`): the host sees them late, and its own are not seen inside while a file is in use.
    pub writeback: bool,
}

impl Default for Live {
    fn default() -> Self {
        Live { ttl_ms: 1000, writeback: false }
    }
}

/// What is held back of an image in the rootfs itself; volumes have [`crate::volume::Powers`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Restraint {
    /// Do setuid and setgid bits and file capabilities of the image do nothing? `None`: they do what they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nosuid: Option<bool>,
    /// Can its device nodes not be opened? Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodev: Option<bool>,
    /// Are its device nodes not there at all?
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_devices: bool,
    /// Some of this was not asked for: other users of the host reach the rootfs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub for_others: bool,
}

impl Restraint {
    /// Where other users of the host reach the rootfs: all that nobody has said anything about.
    #[must_use]
    pub fn for_others(self) -> Self {
        if self.nosuid.is_some() && self.nodev.is_some() {
            return self;
        }
        let (nosuid, nodev) = (self.nosuid.unwrap_or(true), self.nodev.unwrap_or(true));
        Restraint { nosuid: Some(nosuid), nodev: Some(nodev), for_others: true, ..self }
    }

    /// Do setuid programs do nothing?
    pub fn nosuid(self) -> bool {
        self.nosuid == Some(true)
    }

    /// Can device nodes not be opened?
    pub fn nodev(self) -> bool {
        self.nodev == Some(true)
    }
}

/// One directory tree of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Absolute host path of the layer's root directory.
    #[serde(with = "crate::pathtext")]
    pub root: PathBuf,
}

/// All that a backend is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Plan {
    /// The rootfs's id.
    pub id: ContainerId,
    /// Absolute host path where the rootfs appears; an existing directory.
    #[serde(with = "crate::pathtext")]
    pub rootfs: PathBuf,
    /// Layers, bottom first.
    pub layers: Vec<Layer>,
    /// The image's index, where it has one: it covers all the layers, merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<IndexFile>,
    /// Does the index leave out files that the layers have (AppC's pathWhitelist)? Then they are not the tree to show.
    #[serde(default)]
    pub is_filtered: bool,
    /// May the layers have whiteouts, or cover directories that look otherwise? Then only the index tells the image's tree from what lies on the disk. A record that does not say
    /// is older than this; then they may.
    #[serde(default = "may_have_whiteouts")]
    pub has_whiteouts: bool,
    /// Volumes, outer before inner (see [`crate::volume::order`]).
    pub volumes: Vec<Volume>,
    /// Presented ownership.
    #[serde(default)]
    pub ownership: Ownership,
    /// Where the rootfs's own changes go: then it is writable, and what was changed ends with it. `None`: it is read-only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<Scratch>,
    /// Changes do not end with the rootfs: the user named the directory for them, which may have some from before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub changes_stay: bool,
    /// Are mount points that engines make there in a read-only rootfs?
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stubs: bool,
    /// How volumes are served.
    #[serde(default)]
    pub live: Live,
    /// What is held back of the image. A record that does not say is older than this: nothing was.
    #[serde(default)]
    pub restraint: Restraint,
    /// A directory of its own for what the backend must keep (below the state root, mode 0700, exists).
    #[serde(with = "crate::pathtext")]
    pub state_dir: PathBuf,
}

fn may_have_whiteouts() -> bool {
    true
}

/// Where the index lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IndexFile(#[serde(with = "crate::pathtext")] pub PathBuf);

/// A directory for a rootfs's own changes; its parent exists. One that the user did not name is made, and removed with the rootfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Scratch(#[serde(with = "crate::pathtext")] pub PathBuf);

impl Scratch {
    /// In it: what was changed, overlayfs's upper layer or one like it.
    pub const UPPER: &str = "upper";
    /// In it: what is on its way there.
    pub const WORK: &str = "work";
}

impl Plan {
    /// A read-only rootfs with nothing in it yet.
    pub fn new(id: ContainerId, rootfs: PathBuf, state_dir: PathBuf) -> Plan {
        Plan {
            id,
            rootfs,
            layers: Vec::new(),
            index: None,
            is_filtered: false,
            has_whiteouts: false,
            volumes: Vec::new(),
            ownership: Ownership::default(),
            scratch: None,
            changes_stay: false,
            stubs: false,
            live: Live::default(),
            restraint: Restraint::default(),
            state_dir,
        }
    }

    /// The error of every backend for an image without a layer.
    pub fn require_layers(&self) -> Result<()> {
        if self.layers.is_empty() {
            return Err(Error::new(
                Kind::Invalid,
                "provision",
                show(&self.rootfs),
                "the image has no filesystem layer",
            ));
        }
        Ok(())
    }

    /// For backends that show the layers themselves: the error where only the index knows what belongs to the tree.
    pub fn require_unfiltered(&self) -> Result<()> {
        if self.is_filtered {
            return Err(Error::new(
                Kind::Unsupported,
                "provision",
                show(&self.rootfs),
                "the image's pathWhitelist leaves files out, which only its index does",
            )
            .hint("use --backend fuse"));
        }
        Ok(())
    }

    /// For backends that show the layers themselves: the error where device nodes are to be left out, or mount points to be there.
    pub fn require_as_it_is(&self, backend: BackendKind) -> Result<()> {
        let (why, hint) = if self.restraint.no_devices {
            ("cannot leave out device nodes", "use --backend fuse or copy; --nodev keeps them from being opened")
        } else if self.stubs && self.scratch.is_none() {
            ("cannot make up mount points for engines", "use --backend fuse, or copy")
        } else {
            return Ok(());
        };
        let why = format!("the {backend} backend {why}");
        Err(Error::new(Kind::Unsupported, "provision", show(&self.rootfs), why).hint(hint))
    }

    /// For backends whose rootfs is read-only: the error where it was asked for writable.
    pub fn require_read_only(&self, backend: BackendKind) -> Result<()> {
        if self.scratch.is_some() {
            return Err(Error::new(
                Kind::Unsupported,
                "provision",
                show(&self.rootfs),
                format!("the {backend} backend cannot make a writable rootfs"),
            )
            .hint("use --backend fuse, or overlay (as root, or inside `unshare -Urm`)"));
        }
        Ok(())
    }

    /// For backends whose changes end with the rootfs: the error where a directory was named that they are to stay in.
    pub fn require_ending(&self, backend: BackendKind) -> Result<()> {
        if self.changes_stay {
            let why = format!("the {backend} backend cannot keep changes after `unmount`");
            return Err(Error::new(Kind::Unsupported, "provision", show(&self.rootfs), why)
                .hint("use --backend fuse, or leave --upper out"));
        }
        Ok(())
    }

    /// The one layer of a single-layer image; `backend` words the error for more.
    pub fn single_layer(&self, backend: BackendKind) -> Result<&Path> {
        self.require_layers()?;
        match self.layers.as_slice() {
            [layer] => Ok(&layer.root),
            _ => Err(Error::new(
                Kind::Unsupported,
                "provision",
                show(&self.rootfs),
                format!("multiple layers are not supported by the {backend} backend"),
            )
            .hint("use --backend fuse, or make it one layer with `fsprov image flatten`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_back_where_others_reach_the_rootfs() {
        for (nosuid, nodev, want) in [
            (None, None, (true, true, true)),
            (Some(true), None, (true, true, true)),
            (Some(false), None, (false, true, true)),
            (None, Some(true), (true, true, true)),
            (Some(false), Some(false), (false, false, false)),
            (Some(true), Some(true), (true, true, false)),
        ] {
            let asked = Restraint { nosuid, nodev, ..Restraint::default() };
            let got = asked.for_others();
            assert_eq!((got.nosuid(), got.nodev(), got.for_others), want, "{asked:?}");
            assert_eq!(asked.nosuid(), nosuid == Some(true), "nobody else there: only what was asked for");
            let text = serde_json::to_string(&got).unwrap();
            assert_eq!(serde_json::from_str::<Restraint>(&text).unwrap(), got, "{text}");
        }
        assert_eq!(serde_json::from_str::<Restraint>("{}").unwrap(), Restraint::default());
    }

    #[test]
    fn ids_map_by_range_and_overflow_outside() {
        let ranges = [
            IdRange { inside: 0, outside: 1000, count: 1 },
            IdRange { inside: 1, outside: 100_000, count: 65_535 },
            IdRange { inside: 70_000, outside: u32::MAX, count: 2 },
        ];
        for (id, want) in [
            (0, 1000),
            (1, 100_000),
            (65_535, 165_534),
            (65_536, OVERFLOW_ID),
            (70_000, u32::MAX),
            (70_001, OVERFLOW_ID),
        ] {
            assert_eq!(Ownership::map(&ranges, id), want, "{id}");
        }
        assert_eq!(Ownership::map(&[], 77), 77);
    }
}
