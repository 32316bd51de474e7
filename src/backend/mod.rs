//! The backend interface: how a plan becomes a rootfs, and how it goes away again.
//!
//! A backend knows mounts, trees and servers. It must not know the store, nor records: what it has to remember it hands to
//! the [`Journal`], before it depends on it.

mod attach;
pub mod bind;
pub mod copy;
mod copyindex;
mod copytree;
pub mod fuse;
pub mod overlay;
mod surplus;
mod whiteout;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result, show};
use crate::host::{Finding, Host};
use crate::index::Damaged;
use crate::plan::{BackendKind, Plan};
use crate::sys::mountinfo::Table;

/// Can a backend serve this plan on this host?
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Support {
    /// It can.
    Yes,
    /// It cannot.
    No {
        /// Why not.
        reason: String,
        /// What the user can do about it; empty where nothing can be done.
        remedy: String,
    },
}

impl Support {
    /// A refusal.
    pub fn no(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Support::No { reason: reason.into(), remedy: remedy.into() }
    }
}

pub use crate::sys::process::ProcessId;
pub use crate::sys::usage::Usage;

impl From<&Finding> for Support {
    fn from(finding: &Finding) -> Self {
        match finding {
            Finding::Yes => Support::Yes,
            Finding::No { reason, remedy } => Support::no(reason, remedy),
        }
    }
}

/// What a backend left in the system for one rootfs: enough to find it and take it away again, in another process, after a crash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traces {
    /// Id of the rootfs's mount (statx stx_mnt_id, or the first column of mountinfo).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_id: Option<u64>,
    /// The same mount's id that is never used again (statx STATX_MNT_ID_UNIQUE, Linux 6.8).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unique_mount_id: Option<u64>,
    /// Ids of the mounts below it that are part of the rootfs (volumes, and what came with them). `None` while it is being
    /// made: nobody else can have mounted there yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<Vec<u64>>,
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

/// How far copying has come: counted by the backend, read by whoever shows it.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes of content copied.
    pub bytes: AtomicU64,
    /// Files copied.
    pub files: AtomicU64,
    /// Bytes of content in all; 0: not known.
    pub total_bytes: AtomicU64,
}

/// A directory that the copy backend filled, and how it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// Its device (st_dev).
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
    /// When it was made (statx stx_btime), where its file system tells: device numbers may be others after a reboot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub born: Option<(i64, u32)>,
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

impl Copied {
    /// Is it the same directory?
    pub fn is_same(&self, other: &Copied) -> bool {
        let same_fs = match (self.born, other.born) {
            (Some(a), Some(b)) => a == b,
            _ => self.dev == other.dev,
        };
        same_fs && self.ino == other.ino
    }
}

/// Where a backend writes down its [`Traces`]; durable when the call returns.
pub trait Journal {
    /// Replace what was written before.
    fn note(&mut self, traces: &Traces) -> Result<()>;

    /// Where to count what is copied, if anybody wants to know.
    fn meter(&self) -> Option<Arc<Meter>> {
        None
    }

    /// Where to keep what a dead server's place can be taken with, if there is such a place.
    fn shelf(&self) -> Option<Arc<dyn Shelf>> {
        None
    }
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

/// How a rootfs fares, from mountinfo and the processes, not from its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Mounted and answering.
    Ready,
    /// Mounted, but its server is dead (ENOTCONN): `unmount` cleans it.
    Dead,
    /// Not mounted (any more) in this mount namespace.
    Gone,
}

/// How hard to take a rootfs away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detach {
    /// Fail with [`crate::error::Kind::Busy`] while a process uses it.
    IfIdle,
    /// Take it out of sight at once; it ends when its last user does (umount2(2) MNT_DETACH).
    Lazy,
}

/// One way to make a rootfs. Synchronous; a call returns when the rootfs answers, or when nothing of it is left.
pub trait Backend {
    /// Which one it is.
    fn kind(&self) -> BackendKind;

    /// Can it serve anything at all on this host? The plan-independent part of [`Backend::support`], for `probe`.
    fn host_support(&self, host: &Host) -> Support;

    /// Can it serve this plan on this host? Decided without changing anything. Includes [`Backend::host_support`].
    fn support(&self, host: &Host, plan: &Plan) -> Support;

    /// Make the rootfs. On an error everything done so far is undone; an undo that fails is attached to the error.
    fn provision(&self, host: &Host, plan: &Plan, journal: &mut dyn Journal) -> Result<()>;

    /// Take the rootfs away: every mount of ours on it (none that others put there), its server, and what `traces` names.
    /// `false`: there was nothing. Safe to call again after a failure, and after success.
    fn destroy(&self, host: &Host, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool>;

    /// Put back what a reboot, or others, took away of a rootfs that was complete, and keep what it holds. `false`: nothing of it is
    /// worth keeping; destroy it and provision it again.
    fn revive(&self, _: &Plan, _: &Traces, _: &mut dyn Journal) -> Result<bool> {
        Ok(false)
    }

    /// Go on serving a rootfs whose server died, with what a [`Shelf`] kept of it; what is open in it stays good. `false`: this backend
    /// keeps nothing. After an error everything of it that was served is cut off: destroy it.
    fn adopt(&self, _: &Plan, _: &Traces, _: Vec<Shelved>, _: &mut dyn Journal) -> Result<bool> {
        Ok(false)
    }

    /// What its provisioning put on the [`Shelf`].
    fn shelved(&self, _: &Plan) -> Vec<String> {
        Vec::new()
    }

    /// What the rootfs's own changes take on the disk, where they are kept apart from the image.
    fn usage(&self, _: &Plan) -> Option<Usage> {
        None
    }

    /// What `traces` would be if they were noted now: a worker may have been replaced since.
    fn refresh(&self, traces: &Traces) -> Traces {
        traces.clone()
    }

    /// How it fares, by this mount table. Never blocks on a server that does not answer.
    fn health(&self, plan: &Plan, traces: &Traces, mounts: &Table) -> Health;
}

/// What an image's index says of `path` cannot be true.
fn damaged_index(op: &'static str, path: &Path, why: &Damaged) -> Error {
    Error::new(Kind::Integrity, op, show(path), format!("the image's index is {why}"))
        .hint("make it again with `fsprov image index IMAGE`")
}

/// The backend of this kind.
pub fn of(kind: BackendKind) -> &'static dyn Backend {
    match kind {
        BackendKind::Bind => &bind::Bind,
        BackendKind::Fuse => &fuse::Fuse,
        BackendKind::Overlay => &overlay::Overlay,
        BackendKind::Copy => &copy::Copy,
    }
}

/// In the order in which `auto` tries them: the cheapest for its user first. `copy` is not among them: its rootfs is writable and
/// costs the bytes of the image, so it is made only when asked for by name.
pub const AUTO_ORDER: [BackendKind; 3] = [BackendKind::Bind, BackendKind::Overlay, BackendKind::Fuse];
