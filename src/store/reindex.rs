//! An index made anew from the tree on disk.

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::{Meta, OnDisk, Store};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ImageRef;
use crate::index::{Builder, Whiteouts};
use crate::paths::image;

impl Store {
    /// Make the index of an image anew from its tree, and put it in the place of the old one, which servers that have it
    /// mapped keep. Only where the tree on disk says all: [`Kind::Unsupported`] for an image whose owners, layers or filter
    /// the index alone knows.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::paths::StatePaths::new("/var/lib/fsprov".into()))?;
    /// store.rebuild_index(&fsprov::id::ImageRef::parse("example.com/debian".as_ref())?)?;
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn rebuild_index(&self, reference: &ImageRef) -> Result<Meta> {
        const OP: &str = "rebuild the index of";
        let _in_use = self.lock_shared()?;
        let meta = self.find(reference)?;
        if meta.on_disk == OnDisk::IndexOnly || !meta.layers.is_empty() || meta.is_filtered {
            return Err(Error::new(
                Kind::Unsupported,
                OP,
                reference,
                "its tree on disk does not say all that its index does (owners, layers, or what is left out)",
            )
            .hint("if the index is damaged: `fsprov image verify --repair`, then import the image again"));
        }
        let dir = self.paths.image(&meta.id);
        let tree = dir.join(image::ROOTFS);
        let root =
            openat(CWD, &tree, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| Error::sys(OP, show(&tree), e))?;
        let mut builder = Builder::new();
        builder.begin_layer(Whiteouts::Plain)?;
        builder.add_directory(&root)?;
        fault::point("store.reindex")?;
        builder.write_file(&dir.join(image::INDEX))?;
        Ok(meta)
    }
}
