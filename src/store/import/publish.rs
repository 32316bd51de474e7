//! What was staged gets its place: brought to the disk, then renamed under the store's shared lock, layers first, the image last, so
//! that no clean-up can come between a layer and the image that names it.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::source::Outcome;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::paths::image;
use crate::store::Store;
use crate::store::meta::Meta;
use crate::store::names::Held;
use crate::store::staging::{self, Staging};
use crate::sys::durable::sync_dir;

impl Store {
    /// Bring a staged image, `dir`, and its staged layers to the disk, and give them their places and the image these names. `None`: a
    /// layer that the image needs and that is not among `layers` is no more.
    pub(super) fn publish(
        &self,
        staging: &Staging,
        dir: &Path,
        mut meta: Meta,
        layers: &[(ImageId, PathBuf)],
        names: &[String],
        held: Held,
    ) -> Result<Option<(Outcome, Meta)>> {
        staging.sync()?;
        let to = self.paths.image(&meta.id);
        let _in_use = self.lock_shared()?;
        let naming = self.lock_names()?;
        // One that is there keeps the names that it has.
        if self.check_shallow(&meta.id).is_err() {
            self.settle_names(&mut meta, names, held)?;
        }
        fault::point("store.meta")?;
        meta.write(&dir.join(image::META))?;
        fault::point("store.publish")?;
        self.publish_layers(layers)?;
        let is_gone = |below: &ImageId| self.check_shallow(below).is_err();
        if meta.layers.iter().any(|layer| self.check_layer(layer).is_err()) || meta.dependencies.iter().any(is_gone) {
            return Ok(None);
        }
        // A damaged image may lie in the place: it is moved away, once.
        for _ in 0..2 {
            fault::point("store.rename")?;
            match renameat_with(CWD, dir, CWD, &to, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    let synced = fault::point("store.parent").and_then(|()| sync_dir(&self.paths.images()));
                    // What may not last is not there: the next import starts afresh.
                    if let Err(error) = synced {
                        return Err(error.with_undo(rename_back(&to, dir)));
                    }
                    self.take_from_others(&meta)?;
                    return Ok(Some((Outcome::Created, meta)));
                }
                Err(Errno::EXIST | Errno::NOTEMPTY) => {
                    match self.check_shallow(&meta.id) {
                        Ok(there) => {
                            drop(naming);
                            if meta.signed_by.is_some() && there.signed_by != meta.signed_by {
                                self.change_meta(&meta.id, |there| there.signed_by.clone_from(&meta.signed_by))?;
                            }
                            return Ok(Some((Outcome::Existing, self.give_names(&meta.id, names, held)?)));
                        }
                        Err(error) => log::warn!("{error}: it is replaced by this import"),
                    }
                    staging::remove_aside(&self.paths, &to)?;
                }
                Err(e) => return Err(Error::sys("publish", show(&to), e)),
            }
        }
        Err(Error::new(Kind::Busy, "publish", show(&to), "another process puts damaged images there"))
    }

    /// Give staged layers their places, where they are not taken by the same. Under the shared lock.
    pub(super) fn publish_layers(&self, staged: &[(ImageId, PathBuf)]) -> Result<()> {
        for (id, from) in staged {
            let to = self.paths.layer(id);
            for _ in 0..2 {
                fault::point("store.rename_layer")?;
                match renameat_with(CWD, from, CWD, &to, RenameFlags::NOREPLACE) {
                    Ok(()) => break,
                    Err(Errno::EXIST | Errno::NOTEMPTY) => match self.check_layer(id) {
                        Ok(()) => break,
                        Err(error) => {
                            log::warn!("{error}: it is replaced by this import");
                            staging::remove_aside(&self.paths, &to)?;
                        }
                    },
                    Err(e) => return Err(Error::sys("publish layer", show(&to), e)),
                }
            }
        }
        if staged.is_empty() { Ok(()) } else { sync_dir(&self.paths.layers()) }
    }
}

fn rename_back(from: &Path, to: &Path) -> Result<()> {
    renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(|e| Error::sys("take back", show(from), e))
}
