//! The JSON shape of a rootfs, for `mount`, `list` and `inspect`: a contract with scripts, whatever the record looks like.

use std::path::Path;

use serde::Serialize;

use crate::backend::Usage;
use crate::plan::{BackendKind, IndexFile, Layer, Ownership};
use crate::provisioner::{Condition, ImageNote, Record, Status};
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
    pub(super) fn new(record: &'a Record, state: Condition, changes: Option<Usage>) -> Self {
        Shown {
            id: record.plan.id.as_str(),
            state,
            rootfs: &record.plan.rootfs,
            backend: record.backend,
            image: &record.image,
            layers: &record.plan.layers,
            index: record.plan.index.as_ref(),
            volumes: &record.plan.volumes,
            nosuid: record.plan.restraint.nosuid(),
            nodev: record.plan.restraint.nodev(),
            no_devices: record.plan.restraint.no_devices,
            stubs: record.plan.stubs,
            ownership: &record.plan.ownership,
            changes: record
                .plan
                .scratch
                .as_ref()
                .map(|s| ShownChanges { path: &s.0, usage: changes.unwrap_or_default() }),
            created: &record.created,
            mount_id: record.traces.mount_id,
            mount_namespace: record.mount_namespace.1,
            supervisor_pid: record.traces.supervisor.map(|p| p.pid),
            worker_pid: record.traces.worker.map(|p| p.pid),
            unsupervised: is_unsupervised(record, state),
        }
    }

    pub(super) fn of(status: &'a Status) -> Self {
        Shown::new(&status.record, status.health, status.changes)
    }
}
