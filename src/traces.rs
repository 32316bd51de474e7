//! What a backend leaves in the system, what outlives its processes, and what it is given to write both down: the words that backend,
//! daemon and record share.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::place::Identity;
use crate::sys::mountinfo::Known;
use crate::sys::process::ProcessId;

/// What a backend left in the system for one rootfs: enough to find it and take it away again, in another process, after a crash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traces {
    /// Id of the rootfs's mount (statx stx_mnt_id, or the first column of mountinfo).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_id: Option<u64>,
    /// The same mount's id that is never used again (statx STATX_MNT_ID_UNIQUE, Linux 6.8).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unique_mount_id: Option<u64>,
    /// The directory that the mount point lies in: tells our mount from another of the same id where ids are used again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Identity>,
    /// Ids of the mounts below it that are part of the rootfs (volumes, and what came with them). `None` while it is being
    /// made: nobody else can have mounted there yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<Vec<u64>>,
    /// The ids of `parts` that are never used again, in the same order; empty where the kernel has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unique_parts: Vec<u64>,
    /// The process that holds the FUSE connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervisor: Option<ProcessId>,
    /// The process that answers FUSE requests (the same one, where nothing supervises it).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<ProcessId>,
    /// The minor number of the FUSE superblock's device: names the connection below /sys/fs/fuse/connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fuse_connection: Option<u32>,
    /// The directory that a copy was made into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied: Option<Copied>,
}

impl Traces {
    /// The rootfs's mount, to be found wherever it lies by now.
    pub fn mount(&self) -> Option<Known> {
        Some(Known { id: self.mount_id?, unique: self.unique_mount_id })
    }

    /// Write down which mounts are part of it.
    pub fn note_parts(&mut self, parts: Vec<Known>) {
        self.unique_parts = parts.iter().map_while(|part| part.unique).collect();
        self.parts = Some(parts.into_iter().map(|part| part.id).collect());
    }

    /// The mounts that are part of it, likewise.
    pub fn parts(&self) -> impl Iterator<Item = Known> {
        let ids = self.parts.as_deref().unwrap_or_default();
        ids.iter().enumerate().map(|(n, &id)| Known { id, unique: self.unique_parts.get(n).copied() })
    }
}

/// A directory that the copy backend filled, and how it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// Which directory.
    #[serde(flatten)]
    pub directory: Identity,
    /// Has it all that the image has? Then what is in it is worth keeping.
    #[serde(default)]
    pub filled: bool,
    /// Its permission bits before.
    pub mode: u32,
    /// Its owner before.
    pub uid: u32,
    /// Its group before.
    pub gid: u32,
}

/// Keeps descriptors by name when every process of ours is dead (systemd's descriptor store).
pub trait Shelf: std::fmt::Debug + Send + Sync {
    /// Keep one more.
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()>;
    /// Let go of all that have this name.
    fn remove(&self, name: &str) -> Result<()>;
}

/// A descriptor that a [`Shelf`] kept, and its name there.
pub type Shelved = (String, OwnedFd);

/// How far copying has come: counted by the backend, read by what shows it.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes of content copied.
    pub bytes: AtomicU64,
    /// Files copied.
    pub files: AtomicU64,
    /// Bytes of content in all; 0: not known.
    pub total_bytes: AtomicU64,
}

/// What a backend is given beside the plan.
pub struct Journal<'a> {
    /// Writes down its [`Traces`] in place of those before; done when the call returns.
    pub note: &'a mut dyn FnMut(&Traces) -> Result<()>,
    /// Where to count what is copied, if anybody wants to know.
    pub meter: Option<Arc<Meter>>,
    /// Where to keep what a dead server's place can be taken with, if there is such a place.
    pub shelf: Option<Arc<dyn Shelf>>,
}

impl Journal<'_> {
    /// Write down `traces`, before anything depends on them.
    pub fn note(&mut self, traces: &Traces) -> Result<()> {
        (self.note)(traces)
    }
}
