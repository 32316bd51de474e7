//! containerd's Diff service: a layer that it downloaded becomes one of the store's, and the snapshot that it asked for is made of that.
//!
//! What this does not do is answered Unimplemented, and containerd's own walking differ does it, on the snapshot's mounts.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::content::Content;
use super::messages::Mount;
use super::snapshots::Snapshots;
use crate::error::{Error, Kind, Result};
use crate::image::oci::{Digest, is_tar_layer};
use crate::store::Blob;

/// `containerd.types.Descriptor`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Descriptor {
    #[prost(string, tag = "1")]
    pub(super) media_type: String,
    #[prost(string, tag = "2")]
    pub(super) digest: String,
    #[prost(int64, tag = "3")]
    pub(super) size: i64,
    #[prost(btree_map = "string, string", tag = "5")]
    pub(super) annotations: BTreeMap<String, String>,
}

/// `ApplyRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Apply {
    #[prost(message, optional, tag = "1")]
    pub(super) diff: Option<Descriptor>,
    #[prost(message, repeated, tag = "2")]
    pub(super) mounts: Vec<Mount>,
}

/// `ApplyResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Applied {
    #[prost(message, optional, tag = "1")]
    pub(super) applied: Option<Descriptor>,
}

const OP: &str = "apply layer";
/// What an uncompressed layer is.
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// The service.
#[derive(Debug)]
pub(super) struct Differ {
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) content: Content,
}

fn not_ours(digest: &str, why: impl Into<String>) -> Error {
    Error::new(Kind::Unsupported, OP, format!("{digest:?}"), why.into())
}

impl Differ {
    /// `Apply`.
    pub(super) fn apply(&self, asked: Apply) -> Result<Applied> {
        let blob = asked.diff.unwrap_or_default();
        if !is_tar_layer(&blob.media_type) {
            return Err(not_ours(&blob.digest, format!("the media type {:?} is not a layer's", blob.media_type)));
        }
        let digest = Digest::try_from(blob.digest.clone()).map_err(|e| not_ours(&blob.digest, e.to_string()))?;
        // It carries neither a key nor a namespace: its mounts tell the snapshot, and the snapshot's key the namespace.
        let key = self.snapshots.key_of_mounts(&asked.mounts);
        let key = key.ok_or_else(|| not_ours(&blob.digest, "the mounts are not those of an active snapshot"))?;
        let size = u64::try_from(blob.size).unwrap_or_default();
        let applied = match self.snapshots.layer_of_blob(&digest)? {
            Some(layer) if self.snapshots.put_layer(&key, &layer)? => layer,
            _ => {
                let namespace = key.split('/').next().unwrap_or_default().to_owned();
                let input = self.content.read(&namespace, &blob.digest)?;
                self.snapshots.import_layer(&key, &Blob { digest, size }, input)?
            }
        };
        let digest = applied.as_str().replacen('-', ":", 1);
        let applied = Descriptor { media_type: PLAIN.into(), digest, size: blob.size, annotations: BTreeMap::new() };
        Ok(Applied { applied: Some(applied) })
    }
}
