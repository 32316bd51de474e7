//! The JSON shape of a rootfs, for `mount`, `list` and `inspect`: a contract with scripts, whatever the record looks like.

use std::path::Path;

use serde::Serialize;

use crate::backend::Usage;
use crate::plan::{BackendKind, IndexFile, Layer, Ownership};
use crate::provisioner::{Condition, ImageNote, Record, Whole};
use crate::volume::Volume;

#[derive(Serialize)]
pub(super) struct Shown<'a> {
    id: &'a str,
    state: Condition,
    #[serde(serialize_with = "path")]
    rootfs: &'a Path,
    backend: BackendKind,
    image: &'a ImageNote,
    layers: &'a [Layer],
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<&'a IndexFile>,
    volumes: &'a [Volume],
    /// Do the image's setuid programs, and its device nodes, not work?
    nosuid: bool,
    nodev: bool,
    /// Are its device nodes not there?
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    no_devices: bool,
    /// Are mount points of engines made up?
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stubs: bool,
    #[serde(skip_serializing_if = "Ownership::is_identity")]
    ownership: &'a Ownership,
    /// Where the changes of a writable rootfs are kept, and what they take.
    #[serde(skip_serializing_if = "Option::is_none")]
    changes: Option<ShownChanges<'a>>,
    created: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mount_id: Option<u64>,
    /// Inode of /proc/PID/ns/mnt of a process that sees it.
    mount_namespace: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    supervisor_pid: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker_pid: Option<i32>,
    /// Its supervisor died: nobody starts another worker after this one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    unsupervised: bool,
}

#[derive(Serialize)]
struct ShownChanges<'a> {
    #[serde(serialize_with = "path")]
    path: &'a Path,
    #[serde(flatten)]
    usage: Usage,
}

fn path<S: serde::Serializer>(path: &&Path, to: S) -> Result<S::Ok, S::Error> {
    crate::pathtext::serialize(path, to)
}

/// Is it served by a worker whose supervisor died?
pub(super) fn is_unsupervised(record: &Record, state: Condition) -> bool {
    matches!(state, Condition::Ready | Condition::Stopped)
        && record.traces.supervisor.is_some_and(|supervisor| !supervisor.is_alive())
}

impl<'a> Shown<'a> {
    pub(super) fn of(whole: &'a Whole) -> Self {
        let (top, base, state) = (&whole.top.record, &whole.base().record, whole.health());
        Shown {
            id: base.plan.id.as_str(),
            state,
            rootfs: &top.plan.rootfs,
            backend: top.backend,
            image: &base.image,
            layers: &base.plan.layers,
            index: base.plan.index.as_ref(),
            volumes: &top.plan.volumes,
            nosuid: top.plan.restraint.nosuid(),
            nodev: top.plan.restraint.nodev(),
            no_devices: base.plan.restraint.no_devices,
            stubs: top.plan.stubs,
            ownership: &base.plan.ownership,
            changes: top
                .plan
                .scratch
                .as_ref()
                .map(|s| ShownChanges { path: &s.0, usage: whole.top.changes.unwrap_or_default() }),
            created: &base.created,
            mount_id: top.traces.mount_id,
            mount_namespace: top.mount_namespace.1,
            supervisor_pid: base.traces.supervisor.map(|p| p.pid),
            worker_pid: base.traces.worker.map(|p| p.pid),
            unsupervised: is_unsupervised(base, state),
        }
    }
}
