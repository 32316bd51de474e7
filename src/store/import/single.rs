//! One layer by itself, as containerd hands it over: unpacked by the same walled readers as an image's, published when its bytes were the ones
//! announced, and claimed before anybody may collect it.

use std::io::Read;
use std::sync::PoisonError;

use sha2::{Digest as _, Sha256};

use super::layout::check_blob;
use crate::error::Result;
use crate::fault;
use crate::id::ImageId;
use crate::image::MAX_MANIFEST_BYTES;
use crate::image::oci::{Digest, Document, parse_document};
use crate::paths::image;
use crate::store::Store;
use crate::store::archive::apart::{self, Place, Task};
use crate::store::archive::input::Archive;
use crate::store::claims::Claims;
use crate::store::layer::LayerMeta;
use crate::store::meta::{ImageKind, read_bounded};
use crate::store::signed::watched;
use crate::store::staging::{self, Staging};

/// A blob that is a layer.
#[derive(Debug)]
pub(crate) struct Blob {
    /// Its digest, as it lies in a registry: compressed.
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl Store {
    /// The layer that is in this blob, as an image of the store says, whose import checked both.
    pub(crate) fn layer_of_blob(&self, blob: &Digest) -> Result<Option<ImageId>> {
        let _in_use = self.lock_shared()?;
        for meta in self.list()?.into_iter().filter(|meta| meta.kind == ImageKind::Oci) {
            let bytes = read_bounded(&self.paths.image(&meta.id).join(image::MANIFEST), MAX_MANIFEST_BYTES as u64)?;
            let Ok(Document::Manifest(manifest)) = parse_document(&bytes, None) else { continue };
            let at = manifest.layers.iter().position(|layer| layer.digest == *blob);
            if let Some(layer) = at.and_then(|at| meta.layers.get(at)) {
                return Ok(Some(layer.clone()));
            }
        }
        Ok(None)
    }
}

impl Claims<'_> {
    /// Unpack a layer, and keep it as [`Claims::claim`] does. Its id is the digest of its uncompressed bytes.
    pub(crate) fn import(&self, blob: &Blob, input: Box<dyn Read + Send>) -> Result<ImageId> {
        let store = self.store();
        let limits = &store.policy.limits;
        staging::clean(&store.paths)?;
        let staging = Staging::make(&store.paths, "layer")?;
        let dir = staging.path().join("layer");
        let name = blob.digest.to_string();
        let (archive, state) = watched(Archive { name: name.clone(), input, total: Some(blob.size) });
        let place = Place { dir: dir.clone(), index: image::INDEX };
        let (unpacked, digest) =
            apart::unpack::<Sha256>(archive.producer(limits, None), Task::Layer, &place, &name, limits)?;
        let (sha, length) = {
            let state = state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.0.clone(), state.1)
        };
        check_blob(&blob.digest, Some(blob.size), &Digest::from_sha256(&sha.finalize().into()), length)?;
        let id = ImageId::from_sha256(&digest.into());
        LayerMeta::new(&unpacked.placed, unpacked.whiteouts).write(&dir)?;
        staging.sync()?;
        fault::point("store.publish")?;
        // Before it can be seen: no collector comes between.
        let in_use = store.lock_shared()?;
        self.note(&id)?;
        store.publish_layers(&[(id.clone(), dir)])?;
        drop(in_use);
        Ok(id)
    }
}
