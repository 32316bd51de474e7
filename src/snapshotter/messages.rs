//! What containerd's services say on the wire: the messages of `services/snapshots/v1` and `types` of its API, as far as we read them, by hand. A
//! field's number is its name there; what is not here is passed over, as protobuf has it.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// `google.protobuf.Empty`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Empty {}

/// `google.protobuf.Timestamp`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct Timestamp {
    #[prost(int64, tag = "1")]
    pub(crate) seconds: i64,
    #[prost(int32, tag = "2")]
    pub(crate) nanos: i32,
}

impl Timestamp {
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32 }
    }
}

/// `google.protobuf.FieldMask`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct FieldMask {
    #[prost(string, repeated, tag = "1")]
    pub(crate) paths: Vec<String>,
}

/// `containerd.types.Mount`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Mount {
    #[prost(string, tag = "1")]
    pub(crate) r#type: String,
    #[prost(string, tag = "2")]
    pub(crate) source: String,
    #[prost(string, tag = "3")]
    pub(crate) target: String,
    #[prost(string, repeated, tag = "4")]
    pub(crate) options: Vec<String>,
}

/// `PrepareSnapshotRequest` and `ViewSnapshotRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Prepare {
    #[prost(string, tag = "2")]
    pub(crate) key: String,
    #[prost(string, tag = "3")]
    pub(crate) parent: String,
    #[prost(btree_map = "string, string", tag = "4")]
    pub(crate) labels: BTreeMap<String, String>,
}

/// `PrepareSnapshotResponse`, `ViewSnapshotResponse` and `MountsResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Mounts {
    #[prost(message, repeated, tag = "1")]
    pub(crate) mounts: Vec<Mount>,
}

/// `MountsRequest`, `RemoveSnapshotRequest`, `StatSnapshotRequest` and `UsageRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Keyed {
    #[prost(string, tag = "2")]
    pub(crate) key: String,
}

/// `CommitSnapshotRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Commit {
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    #[prost(string, tag = "3")]
    pub(crate) key: String,
    #[prost(btree_map = "string, string", tag = "4")]
    pub(crate) labels: BTreeMap<String, String>,
}

/// `Info`; kinds are those of [`super::record::Kind`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Info {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) parent: String,
    #[prost(int32, tag = "3")]
    pub(crate) kind: i32,
    #[prost(message, optional, tag = "4")]
    pub(crate) created_at: Option<Timestamp>,
    #[prost(message, optional, tag = "5")]
    pub(crate) updated_at: Option<Timestamp>,
    #[prost(btree_map = "string, string", tag = "6")]
    pub(crate) labels: BTreeMap<String, String>,
}

/// `StatSnapshotResponse` and `UpdateSnapshotResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Told {
    #[prost(message, optional, tag = "1")]
    pub(crate) info: Option<Info>,
}

/// `UpdateSnapshotRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Update {
    #[prost(message, optional, tag = "2")]
    pub(crate) info: Option<Info>,
    #[prost(message, optional, tag = "3")]
    pub(crate) update_mask: Option<FieldMask>,
}

/// `ListSnapshotsRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct List {
    #[prost(string, repeated, tag = "2")]
    pub(crate) filters: Vec<String>,
}

/// `ListSnapshotsResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Listed {
    #[prost(message, repeated, tag = "1")]
    pub(crate) info: Vec<Info>,
}

/// `UsageResponse`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct Usage {
    #[prost(int64, tag = "1")]
    pub(crate) size: i64,
    #[prost(int64, tag = "2")]
    pub(crate) inodes: i64,
}

/// `CleanupRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Cleanup {}
