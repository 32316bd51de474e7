//! The local images. Must not know backends.
//!
//! An image in the store is complete or absent: it is made in `staging/` and renamed to `images/<id>`. Anyone who uses one
//! holds the store's shared lock from finding it until a record names it ([`Store::lock_shared`]); who takes one away looks
//! at the records under the exclusive lock ([`Store::remove`]).

mod acl;
mod archive;
#[cfg(feature = "cli")]
mod changes;
mod choose;
mod claims;
#[cfg(feature = "cli")]
mod commit;
mod download;
mod export;
#[doc(hidden)]
#[cfg(any(test, feature = "internals"))]
pub mod fuzz;
mod gc;
mod import;
mod layer;
mod limits;
mod lock;
#[cfg(feature = "containerd")]
mod merged;
mod mesos;
mod meta;
mod names;
mod reindex;
mod render;
mod resolve;
mod signed;
mod staging;
mod tree;
mod verify;

use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;

pub use archive::input::{Progress, ProgressFn};
pub use archive::whiteout::LayerWhiteouts;
#[cfg_attr(not(feature = "containerd"), allow(unused_imports, reason = "who claims is the snapshotter"))]
pub(crate) use claims::{ClaimedLayer, Claims, Showing, chain_id};
pub use download::Download;
pub use gc::{Collected, Prune, Usage};
pub use import::{ImageSource, ImportOptions, Imported, Outcome};
pub use limits::Limits;
pub use lock::StoreLock;
pub use meta::{Before, ImageKind, Meta, OnDisk, Origin};
pub use names::Held;
pub use resolve::ResolvedImage;
pub use signed::{Signature, Unsigned};
pub use verify::{Damage, Repair};

pub(crate) use archive::apart::dispatch;
#[cfg(feature = "containerd")]
pub(crate) use archive::apart::expect_more;
#[cfg(feature = "containerd")]
pub(crate) use archive::{compression::Compression, digest::Hashed};
#[cfg(feature = "cli")]
pub(crate) use changes::{Below, Marks, Upper};
#[cfg(feature = "cli")]
pub use changes::{Change, Changed};
#[cfg(feature = "cli")]
pub(crate) use commit::Said;
#[cfg(feature = "containerd")]
pub(crate) use import::Blob;
#[cfg(feature = "containerd")]
pub(crate) use merged::{Stacked, Under, write_own_index};

pub use crate::image::Strictness;
pub use crate::image::oci::Platform;
pub use crate::image::signature::Signer;

use crate::error::{Error, Kind, Result, show};
use crate::id::{ImageId, ImageRef};
use crate::paths::{StatePaths, image};
use lock::Hold;

/// The images of one state root.
#[derive(Debug)]
pub struct Store {
    paths: StatePaths,
    policy: Policy,
}

/// What a store takes, and where else it looks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What an image may ask for that is imported because somebody mounts it. Other imports have [`ImportOptions::limits`].
    pub limits: Limits,
    /// OpenPGP keys, a file or a directory of files: an archive needs a detached signature by one of them. `None`: none is asked for.
    pub keyring: Option<PathBuf>,
    /// What is asked of images without a signature.
    pub unsigned: Unsigned,
    /// Image stores of Apache Mesos: a name or id that this store has not is looked for there, and used in place.
    pub mesos_stores: Vec<PathBuf>,
}

/// An image in use, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// Which image.
    pub image: ImageId,
    /// Who uses it, for people: "rootfs web-1".
    pub by: String,
}

/// Tells every use of an image; called under the store's exclusive lock. An error keeps every image.
pub type Uses<'a> = &'a dyn Fn() -> Result<Vec<Use>>;

impl Store {
    /// Open the store of a state root; make its directories, 0700, where they are missing: a setuid file of an image must
    /// not be within reach of other users of this host (CVE-2021-41103).
    pub fn open(paths: &StatePaths) -> Result<Self> {
        for dir in [paths.root().to_owned(), paths.images(), paths.staging(), paths.layers()] {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|e| {
                Error::io("make state directory", show(&dir), e).hint("choose another with --root or FSPROV_ROOT")
            })?;
        }
        Ok(Store { paths: paths.clone(), policy: Policy::default() })
    }

    /// The same store with this policy.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Store { policy, ..self }
    }

    /// Its policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Its paths.
    pub fn paths(&self) -> &StatePaths {
        &self.paths
    }

    /// Keep every image where it is until the guard is dropped.
    pub fn lock_shared(&self) -> Result<StoreLock> {
        lock::lock_file(&self.paths.store_lock(), Hold::Shared)
    }

    fn lock_exclusive(&self) -> Result<StoreLock> {
        lock::lock_file(&self.paths.store_lock(), Hold::Exclusive)
    }

    /// All images, by name.
    ///
    /// ```
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let root = dir.path().to_owned();
    /// let store = fsprov::store::Store::open(&fsprov::StatePaths::new(root))?;
    /// for image in store.list()? {
    ///     println!("{} {}", image.id, image.names.join(" "));
    /// }
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    ///
    /// What is damaged is left out and logged.
    pub fn list(&self) -> Result<Vec<Meta>> {
        let mut found = Vec::new();
        for id in self.ids()? {
            match self.meta(&id) {
                Ok(meta) => found.push(meta),
                // Removed since it was listed.
                Err(error) if error.kind() == Kind::NotFound && !self.paths.image(&id).exists() => {}
                Err(error) => log::warn!("{error}"),
            }
        }
        found.sort_by(|a, b| (&a.names, a.imported_at, &a.id).cmp(&(&b.names, b.imported_at, &b.id)));
        Ok(found)
    }

    /// The ids of all images, damaged ones too, sorted.
    pub fn ids(&self) -> Result<Vec<ImageId>> {
        ids_below(&self.paths.images())
    }

    /// What is known of one image.
    pub fn meta(&self, id: &ImageId) -> Result<Meta> {
        let meta = Meta::read(&self.paths.image(id).join(image::META))?;
        if meta.id != *id {
            let why = format!("its record says it is {}", meta.id);
            return Err(Error::new(Kind::Integrity, "read image", id, why));
        }
        Ok(meta)
    }

    /// One image: what is known of it, and its manifest as it came.
    pub fn show(&self, image: &ImageRef) -> Result<(Meta, Vec<u8>)> {
        let _in_use = self.lock_shared()?;
        let meta = self.find(image)?;
        let manifest = self.paths.image(&meta.id).join(image::MANIFEST);
        let bytes = meta::read_bounded(&manifest, crate::image::MAX_MANIFEST_BYTES as u64)?;
        Ok((meta, bytes))
    }

    /// What an OCI image's configuration says, as it came. `None`: an AppC image has its own in the manifest.
    pub fn config(&self, meta: &Meta) -> Result<Option<Vec<u8>>> {
        let path = self.paths.image(&meta.id).join(image::CONFIG);
        match meta.kind {
            ImageKind::Oci => meta::read_bounded(&path, crate::image::MAX_MANIFEST_BYTES as u64).map(Some),
            ImageKind::Appc => Ok(None),
        }
    }

    /// Remove what imports that were cut short have left.
    pub fn clear_staging(&self) -> Result<()> {
        staging::clean(&self.paths).map(|_| ())
    }

    /// Remove one image, whatever names it has.
    ///
    /// ```no_run
    /// # let paths = fsprov::StatePaths::new("/var/lib/fsprov".into());
    /// # let store = fsprov::store::Store::open(&paths)?;
    /// use fsprov::store::Use;
    /// let uses = || {
    ///     let all = fsprov::provisioner::images_in_use(&paths)?;
    ///     Ok(all.into_iter().map(|(image, id)| Use { image, by: format!("rootfs {id}") }).collect())
    /// };
    /// store.remove(&fsprov::id::ImageRef::parse("example.com/debian".as_ref())?, &uses)?;
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    ///
    /// Refused with [`Kind::Busy`] while somebody uses it.
    pub fn remove(&self, image: &ImageRef, uses: Uses<'_>) -> Result<Meta> {
        let held = self.lock_exclusive()?;
        let meta = self.find(image)?;
        gc::refuse_if_needed(&meta.id, &self.dependents(&meta.id)?)?;
        let by: Vec<String> = uses()?.into_iter().filter(|one| one.image == meta.id).map(|one| one.by).collect();
        if !by.is_empty() {
            return Err(Error::new(Kind::Busy, "remove image", image, format!("it is in use by {}", by.join(", ")))
                .hint("unmount what uses it"));
        }
        if is_claimed(&meta, &self.claimed()?) {
            let why = "containerd's snapshots stand on its layers";
            return Err(Error::new(Kind::Busy, "remove image", image, why)
                .hint("remove the image from containerd first; its next collection of garbage gives the layers back"));
        }
        if lock::is_held(&self.paths.image(&meta.id))? {
            return Err(Error::new(
                Kind::Busy,
                "remove image",
                image,
                "the server of a rootfs unmounted lazily still shows it, or it is being exported",
            )
            .hint("that server ends with the last process that uses the rootfs; try again"));
        }
        let gone = staging::move_aside(&self.paths, &self.paths.image(&meta.id))?;
        drop(held);
        gone.remove()?;
        Ok(meta)
    }

    /// What is known of an image, if it is there and looks whole.
    pub(crate) fn known(&self, id: &ImageId) -> Option<Meta> {
        self.check_shallow(id).ok()
    }

    /// Is this layer there, and does it look whole?
    pub(crate) fn has_layer(&self, diff_id: &ImageId) -> bool {
        self.check_layer(diff_id).is_ok()
    }

    /// Is what makes an image there? Cheap: no content is read.
    fn check_shallow(&self, id: &ImageId) -> Result<Meta> {
        let dir = self.paths.image(id);
        let meta = self.meta(id)?;
        let damaged = |what: &str| {
            Error::new(Kind::Integrity, "use image", id, format!("{what} is missing or is not what it should be"))
        };
        let kind = |name: &str| std::fs::symlink_metadata(dir.join(name)).map(|m| m.file_type());
        if !kind(image::MANIFEST).is_ok_and(|t| t.is_file()) {
            return Err(damaged("its manifest"));
        }
        if meta.layers.is_empty() && !kind(image::ROOTFS).is_ok_and(|t| t.is_dir()) {
            return Err(damaged("its rootfs"));
        }
        crate::index::Index::open(&dir.join(image::INDEX)).map_err(|e| damaged(&format!("its index ({e})")))?;
        Ok(meta)
    }
}

/// Do claims hold all layers that an image has, if it has any?
fn is_claimed(meta: &Meta, claimed: &std::collections::BTreeSet<ImageId>) -> bool {
    !meta.layers.is_empty() && meta.layers.iter().all(|layer| claimed.contains(layer))
}

/// Is it the name of a file that was to replace another, and whose writer died? That other is whole.
fn is_half_written(name: &str) -> bool {
    name.starts_with(".new-") || name.starts_with(".index-")
}

fn ids_below(dir: &PathBuf) -> Result<Vec<ImageId>> {
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", show(dir), e))? {
        let name = entry.map_err(|e| Error::io("list", show(dir), e))?.file_name();
        match name.to_str().and_then(|name| name.parse().ok()) {
            Some(id) => ids.push(id),
            None if name.to_str().is_some_and(is_half_written) => {}
            None => log::warn!("{} is not of the store", show(dir.join(name))),
        }
    }
    ids.sort();
    Ok(ids)
}
