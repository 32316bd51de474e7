//! The only joiner of state paths.
//!
//! ```text
//! <root>/                          0700, `--root` or FSPROV_ROOT
//! ├── store.lock                   flock: shared while using images, exclusive for gc
//! ├── images/<image id>/           complete or absent (renamed here from staging)
//! │   ├── manifest                 the image's manifest, as it came
//! │   ├── meta.json                names, source, sizes, layers: written by us
//! │   ├── rootfs/                  the tree
//! │   └── index                    the layer index
//! ├── layers/<sha256-diff id>/     a layer of OCI images, shared between them: rootfs/ and index
//! ├── staging/<boot id>-…/         half-made images; its maker holds a flock on it
//! ├── aside/                       what verify found damaged and took out of the store
//! ├── cache/index/<key>            indexes of images that are not in the store
//! ├── cache/download/<key>/        what is being downloaded, or broke off; its holder has a flock on it
//! ├── claims/<holder>/<diff id>    layers that somebody outside the store stands on (`crate::store`)
//! ├── snapshotter/                 containerd's snapshots (`crate::snapshotter::dirs`)
//! ├── snapshotters/<holder>        symlink to the state directory of a snapshotter that has another one
//! ├── ids/<number>                  which subordinate ids a run has (`crate::run::auto`)
//! ├── run/<container id>/           where `fsprov run` mounts
//! ├── points/<hash>-<container id> which mount points are taken: `<hash>` of the path
//! └── containers/<container id>/   one provisioned rootfs; a flock on the directory: held to change this rootfs
//!     ├── record.json              the record
//!     ├── bundle/                  what `fsprov run` gave its runtime
//!     └── backend/                 what the backend keeps: the FUSE server's log and control socket ([`crate::daemon::names`]),
//!                                  overlay's own layers
//! ```

use std::path::{Path, PathBuf};

use crate::id::{ContainerId, ImageId};

/// The state root and the paths below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePaths {
    root: PathBuf,
}

impl StatePaths {
    /// `root` must be absolute: servers run with another working directory.
    pub fn new(root: PathBuf) -> Self {
        debug_assert!(root.is_absolute(), "{}", root.display());
        StatePaths { root }
    }

    /// The state root.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// The store's lock file.
    pub fn store_lock(&self) -> PathBuf {
        self.root.join("store.lock")
    }
    /// The directory of images.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }
    /// One image.
    pub fn image(&self, id: &ImageId) -> PathBuf {
        self.images().join(id.as_str())
    }
    /// The directory of layers that images share.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }
    /// One layer, by its diff id.
    pub fn layer(&self, diff_id: &ImageId) -> PathBuf {
        self.layers().join(diff_id.as_str())
    }
    /// Where damaged images and layers are moved.
    pub fn aside(&self) -> PathBuf {
        self.root.join("aside")
    }
    /// The directory where images are made.
    pub fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }
    /// Indexes of images that are not in the store.
    pub fn index_cache(&self) -> PathBuf {
        self.root.join("cache").join("index")
    }
    /// Downloads that are not imported yet.
    pub fn downloads(&self) -> PathBuf {
        self.root.join("cache").join("download")
    }
    /// Who claims which layers.
    pub fn claims(&self) -> PathBuf {
        self.root.join("claims")
    }
    /// The state directory of containerd's snapshotter.
    pub fn snapshotter(&self) -> PathBuf {
        self.root.join("snapshotter")
    }
    /// Where snapshotters' other state directories are named.
    pub fn snapshotters(&self) -> PathBuf {
        self.root.join("snapshotters")
    }
    /// The directory of provisioned rootfses.
    pub fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }
    /// Which mount points are taken.
    pub fn points(&self) -> PathBuf {
        self.root.join("points")
    }
    /// Where the rootfses of `fsprov run` are mounted, by their ids.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }
    /// Where an image is shown that an overlay lies over: the rootfs of this id.
    pub fn lower_of(&self, id: &ContainerId) -> PathBuf {
        self.run().join(id.as_str()).join("image")
    }
    /// Which subordinate ids a `fsprov run --userns=auto` has taken: locks.
    pub fn ids(&self) -> PathBuf {
        self.root.join("ids")
    }
    /// One provisioned rootfs.
    pub fn container(&self, id: &ContainerId) -> ContainerPaths {
        ContainerPaths { dir: self.containers().join(id.as_str()) }
    }
}

/// Names inside one image's directory, in the store and in staging (and in a Mesos store).
pub mod image {
    /// The manifest.
    pub const MANIFEST: &str = "manifest";
    /// What we know about the image beside its manifest.
    pub const META: &str = "meta.json";
    /// The config of an OCI image.
    pub const CONFIG: &str = "config";
    /// The tree.
    pub const ROOTFS: &str = "rootfs";
    /// The layer index.
    pub const INDEX: &str = "index";
    /// The index of an image's own tree alone, where `index` is of its dependencies too or a pathWhitelist filters it.
    pub const OWN_INDEX: &str = "own.index";
}

/// The paths of one provisioned rootfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPaths {
    dir: PathBuf,
}

impl ContainerPaths {
    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// Its record.
    pub fn record(&self) -> PathBuf {
        self.dir.join("record.json")
    }
    /// What its backend keeps.
    pub fn backend(&self) -> PathBuf {
        self.dir.join("backend")
    }
}
