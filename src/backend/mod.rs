//! The backend interface: how a plan becomes a rootfs, and how it goes away again.
//!
//! A backend knows mounts, trees and servers. It must not know the store, nor records: what it has to remember it hands to
//! the [`Journal`], before it depends on it. It makes the rootfs of opened places, and finds it again by ids.

mod attach;
pub mod bind;
pub mod copy;
mod copyindex;
mod copyrules;
mod copytree;
mod detach;
pub mod fuse;
pub mod overlay;
mod surplus;
mod whiteout;

use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Kind, Result, show};
use crate::host::{Finding, Host};
use crate::index::Damaged;
use crate::place::Places;
use crate::plan::{BackendKind, Plan, Scratch};
use crate::sys::mountinfo::Table;
use crate::traces::{Journal, Shelved, Traces};

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

pub use crate::sys::usage::Usage;

/// What changes take that are kept there.
fn usage_of_upper(plan: &Plan) -> Option<Usage> {
    let upper = plan.scratch.as_ref()?.0.join(Scratch::UPPER);
    crate::sys::usage::measure(&upper).map_err(|e| log::warn!("{e}")).ok()
}

impl From<&Finding> for Support {
    fn from(finding: &Finding) -> Self {
        match finding {
            Finding::Yes => Support::Yes,
            Finding::No { reason, remedy } => Support::no(reason, remedy),
        }
    }
}

/// How a rootfs fares, from mountinfo and the processes, not from its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Health {
    /// Mounted and answering.
    Ready,
    /// Mounted, and its server was stopped (SIGSTOP): who uses it waits until that goes on.
    Stopped,
    /// Mounted, but its server is dead (ENOTCONN): `unmount` cleans it.
    Dead,
    /// Not mounted (any more) in this mount namespace.
    Gone,
}

/// How hard to take a rootfs away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
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

    /// Make the rootfs of these places: no path of the plan is followed. On an error everything done so far is undone; an undo that
    /// fails is attached to the error.
    fn provision(&self, host: &Host, plan: &Plan, places: &Places, journal: &mut Journal<'_>) -> Result<()>;

    /// Take the rootfs away, wherever it lies by now: its mounts (none that others put there), its server, and what `traces` names.
    /// `false`: there was nothing. Safe to call again after a failure, and after success.
    fn destroy(&self, host: &Host, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool>;

    /// Is something of a rootfs that was complete still there, which [`Backend::revive`] would keep? Else it is destroyed and rebuilt.
    fn is_worth_keeping(&self, _: &Plan, _: &Traces, _: &Places) -> bool {
        false
    }

    /// Put back what a reboot, or others, took away of a rootfs that is worth keeping. The image need not be there.
    fn revive(&self, plan: &Plan, _: &Traces, _: &Places, _: &mut Journal<'_>) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "revive", show(&plan.rootfs), "this backend keeps nothing"))
    }

    /// Go on serving a rootfs whose server died, with what a [`Shelf`](crate::traces::Shelf) kept of it; what is open in it stays good. `false`: this backend
    /// keeps nothing. After an error everything of it that was served is cut off: destroy it.
    fn adopt(&self, _: &Plan, _: &Traces, _: Vec<Shelved>, _: &mut Journal<'_>) -> Result<bool> {
        Ok(false)
    }

    /// What its provisioning put on the [`Shelf`](crate::traces::Shelf).
    fn shelved(&self, _: &Plan) -> Vec<String> {
        Vec::new()
    }

    /// What the rootfs's own changes take on the disk, where they are kept apart from the image.
    fn usage(&self, _: &Plan) -> Option<Usage> {
        None
    }

    /// What `traces` would be if they were noted now: a worker may have been replaced since.
    fn refresh(&self, _: &Plan, traces: &Traces) -> Traces {
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
