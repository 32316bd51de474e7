//! Claims: layers that somebody outside the store stands on, as containerd's snapshots do. A claimed layer is never collected, and an image of claimed
//! layers stays.
//!
//! `claims/<holder>/<diff id>` is an empty file. It is written, and brought to the disk, before the layer is used; under the store's shared lock,
//! so that no collector comes between. Images and layers go under the exclusive one, after a look at all claims.

use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};

use super::layer::LayerMeta;
use super::meta::OnDisk;
use super::{Store, ids_below};
use crate::error::{Error, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::paths::image;
use crate::sys::durable::{Survives, sync_dir, write_file};

/// What a holder can show of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Showing {
    /// Their trees as they lie on the disk.
    Tree,
    /// What their indexes say, too.
    Index,
}

/// A layer that its holder can show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClaimedLayer {
    pub(crate) diff_id: ImageId,
    /// Only its index says all.
    pub(crate) by_index: bool,
    /// Bytes of its files, and entries.
    pub(crate) usage: (u64, u64),
}

/// The claims of one holder.
#[derive(Debug)]
pub(crate) struct Claims<'a> {
    store: &'a Store,
    dir: PathBuf,
    showing: Showing,
}

impl Store {
    /// The claims of `holder`, a name of one component.
    pub(crate) fn claims_of(&self, holder: &str, showing: Showing) -> Claims<'_> {
        Claims { store: self, dir: self.paths.claims().join(holder), showing }
    }

    /// All claimed layers, no matter whose. An error keeps every layer.
    pub(super) fn claimed(&self) -> Result<BTreeSet<ImageId>> {
        let dir = self.paths.claims();
        let holders = match std::fs::read_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            other => other.map_err(|e| Error::io("list", show(&dir), e))?,
        };
        let mut all = BTreeSet::new();
        for holder in holders {
            all.extend(ids_below(&holder.map_err(|e| Error::io("list", show(&dir), e))?.path())?);
        }
        Ok(all)
    }

    /// The layer that gives this chain id upon layers of the chain id `below` (image-spec, config.md), if the store has it and it
    /// can be shown.
    pub(crate) fn layer_of_chain(&self, below: Option<&str>, chain: &str, showing: Showing) -> Result<Option<ImageId>> {
        let _in_use = self.lock_shared()?;
        let fits = |id: &ImageId| chain_id(below, id).is_some_and(|made| made == chain);
        let found = ids_below(&self.paths.layers())?.into_iter().find(fits);
        Ok(found.filter(|id| self.is_shown(id, showing)))
    }

    /// The layers that have this chain id, bottom first, where an image of the store has them.
    pub(crate) fn layers_of_chain(&self, chain: &str) -> Result<Option<Vec<ImageId>>> {
        let _in_use = self.lock_shared()?;
        for meta in self.list()? {
            let mut below: Option<String> = None;
            for (number, layer) in meta.layers.iter().enumerate() {
                below = chain_id(below.as_deref(), layer);
                if below.as_deref() == Some(chain) {
                    return Ok(Some(meta.layers[..=number].to_vec()));
                }
            }
        }
        Ok(None)
    }

    /// Can all be shown that the layer is?
    fn is_shown(&self, id: &ImageId, showing: Showing) -> bool {
        let is_exact = || LayerMeta::read(&self.paths.layer(id)).is_ok_and(|meta| meta.on_disk == OnDisk::Exact);
        self.check_layer(id).is_ok() && (showing == Showing::Index || is_exact())
    }

    /// Where a layer's tree lies.
    pub(crate) fn layer_tree(&self, id: &ImageId) -> PathBuf {
        self.paths.layer(id).join(image::ROOTFS)
    }
}

/// The chain id of `layer` upon `below`. `None`: it is not a layer of an OCI image.
pub(crate) fn chain_id(below: Option<&str>, layer: &ImageId) -> Option<String> {
    let diff_id = layer.as_str().strip_prefix("sha256-").map(|hex| format!("sha256:{hex}"))?;
    Some(match below {
        None => diff_id,
        Some(below) => {
            let digest = Sha256::digest(format!("{below} {diff_id}"));
            format!("sha256:{}", data_encoding::HEXLOWER.encode(&digest))
        }
    })
}

impl Claims<'_> {
    /// Claim a layer, so that it stays. `None`: it is not there, or cannot be shown.
    pub(crate) fn claim(&self, id: &ImageId) -> Result<Option<ClaimedLayer>> {
        let _in_use = self.store.lock_shared()?;
        if !self.store.is_shown(id, self.showing) {
            return Ok(None);
        }
        let meta = LayerMeta::read(&self.store.paths.layer(id))?;
        self.note(id)?;
        let by_index = meta.on_disk != OnDisk::Exact;
        Ok(Some(ClaimedLayer { diff_id: id.clone(), by_index, usage: (meta.bytes, meta.entries) }))
    }

    pub(super) fn store(&self) -> &Store {
        self.store
    }

    pub(super) fn note(&self, id: &ImageId) -> Result<()> {
        let path = self.dir.join(id.as_str());
        if path.exists() {
            return Ok(());
        }
        if !self.dir.exists() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.dir)
                .map_err(|e| Error::io("make", show(&self.dir), e))?;
            self.dir.parent().map_or(Ok(()), sync_dir)?;
        }
        fault::point("store.claim")?;
        write_file(&path, b"", Survives::PowerLoss)
    }

    /// Give a layer back.
    pub(crate) fn release(&self, id: &ImageId) -> Result<()> {
        fault::point("store.release")?;
        let path = self.dir.join(id.as_str());
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|e| Error::io("release", show(&path), e)),
        }
    }

    /// Hold these, and no others unless `are_all` is false.
    pub(crate) fn set(&self, wanted: &BTreeSet<ImageId>, are_all: bool) -> Result<()> {
        let _in_use = self.store.lock_shared()?;
        super::gc::remove_half_written(&self.dir);
        let have = if self.dir.exists() && are_all { ids_below(&self.dir)? } else { Vec::new() };
        have.iter().filter(|id| !wanted.contains(id)).try_for_each(|id| self.release(id))?;
        wanted.iter().try_for_each(|id| self.note(id))
    }
}
