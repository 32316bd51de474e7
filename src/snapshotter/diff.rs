//! containerd's Diff service. Apply: a layer that it downloaded becomes one of the store's, and the snapshot that it asked for is made of that. Diff: what
//! a snapshot has more than the one below becomes a layer in containerd's content store.
//!
//! What this does not do is answered Unimplemented, and containerd's own walking differ does it, on the snapshot's mounts.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use super::chain;
use super::content::Content;
use super::messages::{Mount, Timestamp};
use super::snapshots::{Part, Snapshots};
use crate::error::{Error, Kind, Result, show};
use crate::image::oci::{Digest, is_tar_layer, media_type};
use crate::index::Time;
use crate::plan::Ownership;
use crate::store::{Blob, Compression, Hashed, Upper};

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

/// `DiffRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Diff {
    #[prost(message, repeated, tag = "1")]
    pub(super) left: Vec<Mount>,
    #[prost(message, repeated, tag = "2")]
    pub(super) right: Vec<Mount>,
    #[prost(string, tag = "3")]
    pub(super) media_type: String,
    #[prost(btree_map = "string, string", tag = "5")]
    pub(super) labels: BTreeMap<String, String>,
    /// No time in the layer is later.
    #[prost(message, optional, tag = "6")]
    pub(super) source_date_epoch: Option<Timestamp>,
}

/// `DiffResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Made {
    #[prost(message, optional, tag = "3")]
    pub(super) diff: Option<Descriptor>,
}

const OP: &str = "apply layer";
/// What a layer is where nothing else is asked for.
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// The label that says what is in a compressed blob.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

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
        let applied =
            Descriptor { media_type: media_type::LAYER.into(), digest, size: blob.size, annotations: BTreeMap::new() };
        Ok(Applied { applied: Some(applied) })
    }

    /// `Diff`.
    pub(super) fn diff(&self, asked: Diff) -> Result<Made> {
        let media_type = if asked.media_type.is_empty() { GZIP.into() } else { asked.media_type };
        let compression = match media_type.as_str() {
            media_type::LAYER | "application/vnd.docker.image.rootfs.diff.tar" => Compression::None,
            GZIP | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Compression::Gzip,
            "application/vnd.oci.image.layer.v1.tar+zstd" => Compression::Zstd,
            other => return Err(not_made(format!("the media type {other:?} is not one that it writes"))),
        };
        let part = self.difference(&asked.left, &asked.right)?;
        let (Part::Files { name, .. } | Part::Layer { name, .. }) = &part;
        // It carries no namespace: containerd puts it into the names of snapshots, except of those that we named.
        let namespace = name.split('/').next().filter(|_| !chain::is_our_name(name));
        let namespace = namespace.ok_or_else(|| not_made("whose image it is for is not known"))?;
        let latest = asked.source_date_epoch.map(|time| Time { secs: time.seconds, nanos: time.nanos as u32 });
        let blob = self.content.ingest(namespace)?;
        let mut hashed = Hashed::new(compression.encoder(blob)?);
        self.write(&part, latest, &mut hashed)?;
        if !self.snapshots.still_has(&part) {
            return Err(Error::new(Kind::NotFound, "make layer of", format!("{name:?}"), "it was removed meanwhile"));
        }
        let mut labels = asked.labels;
        let diff_id = format!("sha256:{}", data_encoding::HEXLOWER.encode(&hashed.sha256()));
        labels.insert(UNCOMPRESSED.into(), diff_id);
        let (digest, size) = hashed.out.finish()?.finish(&labels)?;
        Ok(Made { diff: Some(Descriptor { media_type, digest, size, annotations: BTreeMap::new() }) })
    }

    /// The one directory that `right` shows upon `left`.
    fn difference(&self, left: &[Mount], right: &[Mount]) -> Result<Part> {
        let parts = |mounts| self.snapshots.parts_of_mounts(mounts);
        let (Some(left), Some(mut right)) = (parts(left), parts(right)) else {
            return Err(not_made("the mounts are not those of snapshots"));
        };
        let is_upon =
            right.len() == left.len() + 1 && right[1..].iter().zip(&left).all(|(one, other)| one.is_same(other));
        if !is_upon {
            return Err(not_made("the one snapshot does not stand on the other"));
        }
        Ok(right.swap_remove(0))
    }

    fn write(&self, part: &Part, latest: Option<Time>, out: &mut dyn Write) -> Result<()> {
        let store = self.snapshots.store();
        let (at, owners) = match part {
            Part::Files { at, owners, .. } => (at.clone(), owners.clone()),
            Part::Layer { by_index: true, .. } => {
                return Err(not_made("what lies on the disk of this layer is not all of it"));
            }
            // Its whiteouts lie there as those of containers do.
            Part::Layer { layer, .. } => (store.layer_tree(layer), Ownership::default()),
        };
        let upper = Upper::open(&at, self.snapshots.marks(), owners, &store.policy().limits)?;
        upper.write_layer(latest, out).map_err(|e| e.within("make layer of", show(&at)))
    }
}

fn not_made(why: impl Into<String>) -> Error {
    Error::new(Kind::Unsupported, "make layer", "", why.into())
}
