//! The local images. Must not know backends.

use std::path::PathBuf;

use crate::error::{Error, Kind, Result, show};
use crate::id::{ImageId, ImageRef};
use crate::paths::StatePaths;

/// The images of one state root.
#[derive(Debug)]
pub struct Store;

/// An image found.
#[derive(Debug)]
pub struct ResolvedImage {
    /// Its id, where it lies in the store.
    pub id: Option<ImageId>,
    /// Its name, where it has one.
    pub name: Option<String>,
    /// Layer roots, bottom first.
    pub layers: Vec<PathBuf>,
    /// Its index.
    pub index: Option<PathBuf>,
}

impl Store {
    /// Open.
    pub fn open(_: &StatePaths) -> Result<Self> {
        Ok(Store)
    }
    /// Hold.
    pub fn lock_shared(&self) -> Result<()> {
        Ok(())
    }
    /// Find.
    pub fn resolve(&self, image: &ImageRef) -> Result<ResolvedImage> {
        match image {
            ImageRef::Path(path) => {
                let root = std::fs::canonicalize(path).map_err(|e| Error::io("find image", show(path), e))?;
                Ok(ResolvedImage { id: None, name: None, layers: vec![root], index: None })
            }
            other => Err(Error::new(Kind::NotFound, "find image", other, "the store has none of this name")),
        }
    }
}
