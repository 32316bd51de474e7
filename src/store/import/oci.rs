//! Import of OCI images: a layout (directory or tar) or a docker archive becomes layers, shared by diff id, and an image that
//! names them, with one index of all.
//!
//! Every byte is checked twice: a blob against the digest that names it, its uncompressed content against its diff id. All
//! is staged, brought to the disk once, and published under one shared lock: layers first, the image last, so no clean-up can
//! come between a layer and the image that names it.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, mkdirat};
use sha2::{Digest as _, Sha256};

use super::layout::{Layer, Layout, Picked, check_blob};
use super::source::{ImageSource, ImportOptions, Imported, origin};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::image::oci::{self, Digest};
use crate::index::Builder;
use crate::paths::image;
use crate::store::Store;
use crate::store::archive::apart::{self, Place, Task};
use crate::store::archive::input::{Archive, ProgressFn};
use crate::store::layer::{LayerMeta, add_layer};
use crate::store::limits::Limits;
use crate::store::meta::{ImageKind, Meta, OnDisk};
use crate::store::signed::watched;
use crate::store::staging::{Staging, write_index, write_new};

/// Which layers need not be unpacked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    InStore,
    Nothing,
}

impl Store {
    /// Import one image of a layout.
    pub(in crate::store) fn import_layout(
        &self,
        layout: &Layout,
        source: &ImageSource,
        options: &ImportOptions,
    ) -> Result<Imported> {
        let picked = layout.pick(options)?;
        let id = ImageId::from_sha256(&Sha256::digest(&picked.manifest).into());
        if let Some(expected) = &options.expected_id
            && *expected != id
        {
            return Err(Error::new(Kind::Integrity, "check id", id.short(), format!("its id is {id}, not {expected}")));
        }
        // A clean-up may take a layer that was found; then all are unpacked, whatever is there.
        for known in [Known::InStore, Known::Nothing] {
            if let Some(imported) = self.try_import_layout(layout, &picked, &id, source, options, known)? {
                return Ok(imported);
            }
        }
        Err(Error::new(Kind::Busy, "import", source, "the layers just made were taken away"))
    }

    fn try_import_layout(
        &self,
        layout: &Layout,
        picked: &Picked,
        id: &ImageId,
        source: &ImageSource,
        options: &ImportOptions,
        known: Known,
    ) -> Result<Option<Imported>> {
        let staging = Staging::make(&self.paths, "import")?;
        let mut meta = Meta::new(id.clone(), ImageKind::Oci, source.to_string());
        meta.origin = origin(source, options);
        let mut names: Vec<String> = options.name.iter().cloned().collect();
        // Those of the layout are tags in it: who names the image himself does not mean them.
        if names.is_empty() {
            names.extend(picked.names.iter().cloned());
        }
        let oci::Platform { os, architecture, variant } = picked.platform.clone();
        meta.labels = vec![("os".into(), os), ("arch".into(), architecture)];
        meta.labels.extend(variant.map(|variant| ("variant".into(), variant)));
        let mut index = Builder::in_dir(staging.path());
        let mut fresh: Vec<(ImageId, PathBuf)> = Vec::new();
        for layer in &picked.layers {
            let diff_id = layer.diff_id.id();
            let staged = staged_at(&staging, diff_id);
            let at = if known == Known::InStore && self.check_layer(diff_id).is_ok() {
                self.paths.layer(diff_id)
            } else if fresh.iter().any(|(have, _)| have == diff_id) {
                staged
            } else {
                let subject = format!("{} of {}", diff_id.short(), layout.name);
                unpack_layer(layout, layer, &staged, &options.limits, options.progress.clone())
                    .map_err(|e| e.within("unpack layer", subject))?;
                fresh.push((diff_id.clone(), staged.clone()));
                staged
            };
            fault::point("store.add_layer")?;
            let (layer_meta, covers) = match add_layer(&mut index, &at) {
                // A clean-up took it since it was found.
                Err(_) if at != staged_at(&staging, diff_id) && !at.exists() => return Ok(None),
                other => other?,
            };
            meta.entries += layer_meta.entries;
            meta.bytes += layer_meta.bytes;
            if layer_meta.on_disk == OnDisk::IndexOnly {
                meta.on_disk = OnDisk::IndexOnly;
            }
            meta.covers = Some(covers || meta.covers == Some(true));
            meta.layers.push(diff_id.clone());
        }
        let dir = staging.path().join("image");
        mkdirat(CWD, &dir, Mode::RWXU).map_err(|e| Error::sys("make", show(&dir), e))?;
        fault::point("store.manifest")?;
        write_new(&dir.join(image::MANIFEST), &picked.manifest)?;
        write_new(&dir.join(image::CONFIG), &picked.config)?;
        fault::point("store.index")?;
        write_index(&dir.join(image::INDEX), index)?;
        let published = self.publish(&staging, &dir, meta, &fresh, &names, options.held)?;
        let Some((outcome, meta)) = published else { return Ok(None) };
        Ok(Some(Imported {
            name: meta.called(options.name.as_deref()),
            id: meta.id,
            outcome,
            on_disk: meta.on_disk,
            warnings: Vec::new(),
        }))
    }
}

/// Where an import unpacks a layer.
fn staged_at(staging: &Staging, diff_id: &ImageId) -> PathBuf {
    staging.path().join(diff_id.as_str())
}

fn unpack_layer(
    layout: &Layout,
    layer: &Layer,
    dir: &Path,
    limits: &Limits,
    progress: Option<ProgressFn>,
) -> Result<()> {
    fault::point("store.layer")?;
    let file = layout.open(&layer.path)?;
    let total = file.metadata().map_err(|e| Error::io("stat", show(&layer.path), e))?.len();
    let name = layer.diff_id.to_string();
    let (archive, state) = watched(Archive { name, input: Box::new(file), total: Some(total) });
    let place = Place { dir: dir.to_owned(), index: image::INDEX };
    let diff_id = layer.diff_id.to_string();
    let (unpacked, got) =
        apart::unpack::<Sha256>(archive.producer(limits, progress), Task::Layer, &place, &diff_id, limits)?;
    let got = Digest::from_sha256(&<[u8; 32]>::from(got));
    if got != layer.diff_id {
        let why = format!("its uncompressed bytes have the digest {got}");
        return Err(Error::new(Kind::Integrity, "check layer", &layer.diff_id, why));
    }
    if let Some(blob) = &layer.blob {
        let (sha, length) = {
            let state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            (state.0.clone(), state.1)
        };
        check_blob(&blob.digest, Some(blob.size), &Digest::from_sha256(&sha.finalize().into()), length)?;
    }
    LayerMeta::new(&unpacked.placed, unpacked.whiteouts).write(dir)
}
