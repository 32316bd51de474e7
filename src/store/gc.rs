//! What nobody needs any more: layers without an image, images without a user, what dead importers left.
//!
//! Who is needed is worked out under the exclusive lock (ostree#2808 did it before, and pruned fresh imports); what is not is
//! moved away under it, and deleted after it.

use std::collections::HashSet;
use std::path::Path;

use super::meta::{Meta, now};
use super::staging::{self, Aside};
use super::{Store, Uses, ids_below, lock};
use crate::error::{Error, Kind, Result, show};
use crate::id::ImageId;
use crate::sys::usage::bytes_on_disk;

/// What to collect beside what nobody can use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prune {
    /// Layers that no image names, and what dead importers left.
    #[default]
    Garbage,
    /// Images that nobody uses, too.
    UnusedImages,
    /// Of those, the ones that were imported at least so long ago.
    UnusedOlderThan {
        /// Seconds.
        seconds: u64,
    },
}

/// What was collected.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Collected {
    /// Images removed.
    pub images: Vec<ImageId>,
    /// Layers removed, by diff id.
    pub layers: Vec<ImageId>,
    /// Half-made images of importers that died, and downloads that broke off.
    pub staging: usize,
    /// Damaged images and layers that were set aside: [`Store::remove_set_aside`].
    pub set_aside: usize,
    /// Bytes that the disk got back.
    pub bytes: u64,
}

/// What an image takes on the disk.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Usage {
    /// The image, or the layer.
    pub id: ImageId,
    /// Its names; empty for a layer.
    pub names: Vec<String>,
    /// Bytes on the disk of what is its alone.
    pub own_bytes: u64,
    /// Bytes on the disk of the layers it shares with others.
    pub shared_bytes: u64,
}

impl Store {
    /// Collect garbage; with [`Prune::UnusedImages`] the images that nobody uses, too. An image that cannot be read keeps all layers: what it names is not known.
    ///
    /// ```no_run
    /// # let paths = fsprov::StatePaths::new("/var/lib/fsprov".into());
    /// use fsprov::store::{Prune, Store, Use};
    /// let store = Store::open(&paths)?;
    /// // Asked under the store's lock: what is provisioned meanwhile is in it or waits.
    /// let uses = || {
    ///     let all = fsprov::provisioner::images_in_use(&paths)?;
    ///     Ok(all.into_iter().map(|(image, id)| Use { image, by: format!("rootfs {id}") }).collect())
    /// };
    /// let done = store.gc(Prune::UnusedImages, &uses)?;
    /// println!("{} images, {} bytes", done.images.len(), done.bytes);
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn gc(&self, prune: Prune, uses: Uses<'_>) -> Result<Collected> {
        let (imports, of_imports) = staging::clean(&self.paths)?;
        let (downloads, of_downloads) = self.clean_downloads(std::time::Duration::ZERO)?;
        let (staging, bytes) = (imports + downloads, of_imports + of_downloads);
        let mut done = Collected { staging, bytes, ..Collected::default() };
        let mut gone: Vec<Aside> = Vec::new();
        let held = self.lock_exclusive()?;
        // Anyone who writes one holds the store's lock, too.
        for id in self.ids()? {
            remove_half_written(&self.paths.image(&id));
        }
        let mut used: HashSet<ImageId> = uses()?.into_iter().map(|one| one.image).collect();
        let claimed = self.claimed()?;
        let mut needed: HashSet<ImageId> = claimed.iter().cloned().collect();
        let mut is_whole = true;
        let mut kept = Vec::new();
        for id in self.ids()? {
            match self.meta(&id) {
                Ok(meta) => kept.push(meta),
                Err(error) => {
                    log::warn!("{error}: no layer is collected while this image is damaged");
                    is_whole = false;
                }
            }
        }
        let newest = match prune {
            Prune::Garbage => None,
            Prune::UnusedImages => Some(i64::MAX),
            Prune::UnusedOlderThan { seconds } => Some(now().saturating_sub_unsigned(seconds)),
        };
        if let Some(newest) = newest {
            for meta in &kept {
                if !used.contains(&meta.id)
                    && (super::is_claimed(meta, &claimed) || lock::is_held(&self.paths.image(&meta.id))?)
                {
                    used.insert(meta.id.clone());
                }
            }
            // What an image in use stands on is in use.
            let below: HashSet<ImageId> = kept
                .iter()
                .filter(|meta| used.contains(&meta.id))
                .flat_map(|meta| meta.dependencies.iter().cloned())
                .collect();
            let goes =
                |meta: &Meta| meta.imported_at <= newest && !used.contains(&meta.id) && !below.contains(&meta.id);
            // What a younger image stands on stays with it.
            let stands: HashSet<ImageId> =
                kept.iter().filter(|meta| !goes(meta)).flat_map(|meta| meta.dependencies.iter().cloned()).collect();
            for meta in kept.extract_if(.., |meta| goes(meta) && !stands.contains(&meta.id)) {
                gone.push(staging::move_aside(&self.paths, &self.paths.image(&meta.id))?);
                done.images.push(meta.id);
            }
        }
        needed.extend(kept.into_iter().flat_map(|meta| meta.layers));
        if is_whole {
            for id in ids_below(&self.paths.layers())? {
                if !needed.contains(&id) {
                    gone.push(staging::move_aside(&self.paths, &self.paths.layer(&id))?);
                    done.layers.push(id);
                }
            }
        }
        drop(held);
        for aside in gone {
            done.bytes += bytes_on_disk(aside.path()).unwrap_or(0);
            aside.remove()?;
        }
        Ok(done)
    }

    /// What each image takes on the disk, and each layer that no image names. A layer of several images is in `shared_bytes` of
    /// each.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// for usage in store.usage()? {
    ///     println!("{:?}: {} bytes, and {} shared", usage.names, usage.own_bytes, usage.shared_bytes);
    /// }
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn usage(&self) -> Result<Vec<Usage>> {
        let _in_use = self.lock_shared()?;
        let metas = self.list()?;
        let sharers = |layer: &ImageId| metas.iter().filter(|meta| meta.layers.contains(layer)).count();
        let mut found = Vec::new();
        for meta in &metas {
            let mut own_bytes = bytes_on_disk(&self.paths.image(&meta.id))?;
            let mut shared_bytes = 0;
            let mut seen = HashSet::new();
            for layer in meta.layers.iter().filter(|layer| seen.insert((*layer).clone())) {
                let bytes = bytes_on_disk(&self.paths.layer(layer))?;
                if sharers(layer) > 1 { shared_bytes += bytes } else { own_bytes += bytes }
            }
            found.push(Usage { id: meta.id.clone(), names: meta.names.clone(), own_bytes, shared_bytes });
        }
        for id in ids_below(&self.paths.layers())? {
            if sharers(&id) == 0 {
                let own_bytes = bytes_on_disk(&self.paths.layer(&id))?;
                found.push(Usage { id, names: Vec::new(), own_bytes, shared_bytes: 0 });
            }
        }
        Ok(found)
    }

    /// What all images and layers together take on the disk, each once; and what lies set aside ([`Store::verify`]).
    pub fn total_bytes(&self) -> Result<(u64, u64)> {
        let _in_use = self.lock_shared()?;
        let aside = self.paths.aside();
        let set_aside = if aside.exists() { bytes_on_disk(&aside)? } else { 0 };
        Ok((bytes_on_disk(&self.paths.images())? + bytes_on_disk(&self.paths.layers())?, set_aside))
    }

    /// Images that stand on this one.
    pub(super) fn dependents(&self, id: &ImageId) -> Result<Vec<Meta>> {
        Ok(self.list()?.into_iter().filter(|meta| meta.dependencies.contains(id)).collect())
    }
}

/// Remove what writers that died left beside the files they were to replace.
pub(super) fn remove_half_written(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(super::is_half_written)
            && let Err(error) = std::fs::remove_file(entry.path())
        {
            log::warn!("{}", Error::io("remove", show(entry.path()), error));
        }
    }
}

/// Refuse to remove what others stand on.
pub(super) fn refuse_if_needed(id: &ImageId, by: &[Meta]) -> Result<()> {
    if by.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = by.iter().map(|meta| meta.names.first().map_or(meta.id.short(), |name| name)).collect();
    Err(Error::new(Kind::Busy, "remove", id, format!("it is a dependency of {}", names.join(", ")))
        .hint("remove those first"))
}
