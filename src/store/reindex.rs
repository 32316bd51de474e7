//! An index built again from the tree on disk.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{CWD, Mode, OFlags, openat};
use sha2::{Digest as _, Sha256};

use super::Store;
use super::layer::add_layer;
use super::meta::{Meta, OnDisk};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ImageRef;
use crate::index::{Builder, Index, Whiteouts};
use crate::paths::image;

impl Store {
    /// Rebuild the index of an image from its tree, and put it in the place of the old one, which servers that have it
    /// mapped keep. An image of layers gets it from the indexes of those; another is read and hashed again.
    ///
    /// [`Kind::Unsupported`] where the tree on disk does not say all, as the index alone knows owners (an ordinary user's import),
    /// dependencies or a filter; [`Kind::Integrity`] for a file that is not the one that the old index knows.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// store.rebuild_index(&fsprov::id::ImageRef::parse("example.com/debian".as_ref())?)?;
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn rebuild_index(&self, reference: &ImageRef) -> Result<Meta> {
        const OP: &str = "rebuild the index of";
        let _in_use = self.lock_shared()?;
        let meta = self.find(reference)?;
        let dir = self.paths.image(&meta.id);
        let mut builder = Builder::new();
        if !meta.layers.is_empty() {
            // What the layers have is in their own indexes, owners too.
            for layer in &meta.layers {
                add_layer(&mut builder, &self.paths.layer(layer))
                    .map_err(|e| e.within("rebuild the index of", format!("layer {}", layer.short())))?;
            }
        } else if meta.on_disk == OnDisk::IndexOnly || !meta.dependencies.is_empty() || meta.is_filtered {
            return Err(Error::new(
                Kind::Unsupported,
                OP,
                reference,
                "its tree on disk does not say all that its index does (owners, dependencies, or what is left out)",
            )
            .hint("if the index is damaged: `fsprov image verify --repair`, then import the image again"));
        } else {
            let tree = dir.join(image::ROOTFS);
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let root = openat(CWD, &tree, flags, Mode::empty()).map_err(|e| Error::sys(OP, show(&tree), e))?;
            // The old digests, where they can be had: a new index must not make damage look right.
            let old = Index::open(&dir.join(image::INDEX)).ok();
            builder.begin_layer(Whiteouts::Plain)?;
            builder.add_directory_hashed(&root, |path, mut file| {
                let shown = || show(OsStr::from_bytes(path));
                let mut sha = Sha256::new();
                std::io::copy(&mut file, &mut sha).map_err(|e| Error::io("read", shown(), e))?;
                let found: [u8; 32] = sha.finalize().into();
                let was = old.as_ref().and_then(|old| old.sha256(&old.find(path).ok()??).ok()?);
                if was.is_some_and(|was| was != found) {
                    return Err(Error::new(
                        Kind::Integrity,
                        OP,
                        reference,
                        format!("{} is not what was imported", shown()),
                    )
                    .hint("`fsprov image verify --repair` imports the image again"));
                }
                Ok(found)
            })?;
        }
        fault::point("store.reindex")?;
        builder.write_file(&dir.join(image::INDEX))?;
        Ok(meta)
    }
}
