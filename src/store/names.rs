//! The names of images: one more for an image, and the name of a moved tag from one image to the next.

use super::lock::{self, Hold};
use super::meta::ImageKind;
use super::{Meta, Store};
use crate::error::{Error, Result, show};
use crate::id::ImageId;
use crate::paths::image;

impl Store {
    /// Give an image one more name.
    pub(super) fn add_name(&self, id: &ImageId, name: Option<&str>) -> Result<Meta> {
        let meta = self.meta(id)?;
        let Some(name) = name.filter(|name| !meta.names.iter().any(|have| have == name)) else { return Ok(meta) };
        self.change_names(id, |names| {
            if !names.iter().any(|have| have == name) {
                names.push(name.to_owned());
            }
        })
    }

    /// Give an OCI image these names, and take them from every other OCI image: a tag is moved, and means the image that was
    /// pulled last. An image that has no name left is known by its id.
    pub(crate) fn move_names(&self, id: &ImageId, names: &[String]) -> Result<Meta> {
        let _in_use = self.lock_shared()?;
        for name in names {
            self.add_name(id, Some(name))?;
        }
        let has_one = |meta: &Meta| meta.names.iter().any(|have| names.contains(have));
        for other in self.list()?.iter().filter(|meta| meta.kind == ImageKind::Oci && meta.id != *id && has_one(meta)) {
            log::info!("{} was {} until now", names.join(", "), other.id.short());
            self.change_names(&other.id, |have| have.retain(|name| !names.contains(name)))?;
        }
        self.meta(id)
    }

    fn change_names(&self, id: &ImageId, change: impl FnOnce(&mut Vec<String>)) -> Result<Meta> {
        // Two who name one image read and write after one another. (The lock on the directory is its servers'.)
        let dir = self.paths.image(id);
        let manifest = dir.join(image::MANIFEST);
        let _in_use = self.lock_shared()?;
        let fd = std::fs::File::open(&manifest).map_err(|e| Error::io("open", show(&manifest), e))?;
        let _naming = lock::lock(fd.into(), &manifest, Hold::Exclusive)?;
        let mut meta = self.meta(id)?;
        change(&mut meta.names);
        meta.write(&dir.join(image::META))?;
        Ok(meta)
    }
}
