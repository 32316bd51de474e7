//! The names of images: who gets one, what becomes of one that another image holds, and what it meant before.
//!
//! A name is an entry to trust: `debian` may be in every script of a host. So an image gets the names that somebody gave it, or those
//! that it came with and that nobody holds; another's it gets only when that is asked for. Names are given under a lock of their own, the
//! one on the directory of images, which is taken after the store's.

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::Store;
use super::lock::{self, Hold, StoreLock};
use super::meta::{Before, ImageKind, Meta, now};
use crate::error::{Error, Kind, Result, show};
use crate::id::{ImageId, ImageRef};
use crate::image::discovery::Wanted;
use crate::paths::image;

/// What becomes of an import whose name another image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Held {
    /// It is refused.
    #[default]
    Refuse,
    /// It gets the name. An AppC image of the same name and other labels keeps it too, and is known by name and version from then on; any other
    /// loses it.
    Replace,
    /// It goes without that name.
    Skip,
}

/// Changes of one name that are remembered.
const MAX_BEFORE: usize = 16;

/// A name that people give: as AC identifiers are, and with `:` and `@` as OCI references have them.
pub(super) fn check_name(name: &str) -> Result<()> {
    let refuse = |why| {
        Err(Error::new(Kind::Usage, "name image", format!("{name:?}"), why)
            .hint("write a name such as debian or example.com/app:1.0"))
    };
    if name.is_empty() || name.len() > ImageRef::MAX_NAME_LEN || name.chars().any(|c| c.is_control() || c == ' ') {
        return refuse("a name is 1 to 512 printable characters without spaces");
    }
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return refuse("a name cannot be a path, or have . or .. between its slashes");
    }
    match ImageRef::parse(name.as_ref())? {
        ImageRef::Path(_) => refuse("a name cannot begin with /, ./ or ../"),
        ImageRef::Id(_) => refuse("it is an image id"),
        ImageRef::Name(_) => Ok(()),
    }
}

impl Store {
    /// Held while names are looked at and given.
    pub(super) fn lock_names(&self) -> Result<StoreLock> {
        let path = self.paths.images();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, &path, flags, Mode::empty()).map_err(|e| Error::sys("open", show(&path), e))?;
        lock::lock(fd, &path, Hold::Exclusive)
    }

    /// Which of the names that `meta` is to get it may have, and what they meant before. Under the lock of names.
    pub(super) fn settle_names(&self, meta: &mut Meta, wanted: &[String], held: Held) -> Result<()> {
        let mut others = self.list()?;
        others.retain(|other| other.id != meta.id);
        let mut before = Vec::new();
        let mut names = meta.names.clone();
        for name in wanted {
            if names.contains(name) {
                continue;
            }
            let holders: Vec<&Meta> = others.iter().filter(|other| other.names.contains(name)).collect();
            if let Some(holder) = holders.iter().max_by_key(|other| other.imported_at) {
                let what = format!("{} has this name", holder.id.short());
                match held {
                    Held::Refuse => {
                        return Err(Error::new(Kind::Exists, "name image", name, what).hint(
                            "give it another with --name, or this one with --replace (`fsprov image show NAME` tells what it means)",
                        ));
                    }
                    Held::Skip => {
                        log::info!("{} does not get the name {name}: {what}", meta.id.short());
                        continue;
                    }
                    Held::Replace => {
                        log::info!("{name} was {} until now", holder.id.short());
                        before.push(Before { name: name.clone(), image: holder.id.clone(), until: now() });
                        // What it meant before that is not forgotten with the image.
                        before
                            .extend(holder.before.iter().filter(|one| one.name == *name).take(MAX_BEFORE - 1).cloned());
                    }
                }
            }
            names.push(name.clone());
        }
        meta.names = names;
        before.append(&mut meta.before);
        meta.before = before;
        Ok(())
    }

    /// Take the names of an image, which it has got, from those that may not have them beside it. Under the lock of names.
    pub(super) fn take_from_others(&self, meta: &Meta) -> Result<()> {
        let loses = |other: &Meta| {
            let stays = meta.kind == ImageKind::Appc && other.kind == ImageKind::Appc && other.labels != meta.labels;
            other.id != meta.id && !stays
        };
        let was = |other: &Meta, name: &String| meta.before.iter().any(|b| b.name == *name && b.image == other.id);
        for other in self.list()?.iter().filter(|other| loses(other)) {
            let goes = |name: &String| meta.names.contains(name) && was(other, name);
            if other.names.iter().any(goes) {
                self.change_meta(&other.id, |have| have.names.retain(|name| !goes(name)))?;
            }
        }
        Ok(())
    }

    /// Give an image that is there these names.
    pub(crate) fn give_names(&self, id: &ImageId, names: &[String], held: Held) -> Result<Meta> {
        let _in_use = self.lock_shared()?;
        let _naming = self.lock_names()?;
        let mut settled = self.meta(id)?;
        let had = settled.names.clone();
        self.settle_names(&mut settled, names, held)?;
        if settled.names == had {
            return Ok(settled);
        }
        let meta = self.change_meta(id, |meta| (meta.names, meta.before) = (settled.names, settled.before))?;
        self.take_from_others(&meta)?;
        Ok(meta)
    }

    /// Give an image more names. One that another image holds is taken from it if `held` says so.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// let image = fsprov::id::ImageRef::parse("docker.io/library/debian:12".as_ref())?;
    /// store.tag(&image, &["base".to_owned()], fsprov::store::Held::Refuse)?;
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn tag(&self, image: &ImageRef, names: &[String], held: Held) -> Result<Meta> {
        names.iter().try_for_each(|name| check_name(name))?;
        let id = self.find(image)?.id;
        self.give_names(&id, names, held)
    }

    /// Take the name that `image` is away from its image, if that has others. `None`: it is the only one, or `image` is not a name.
    pub fn untag(&self, image: &ImageRef) -> Result<Option<(String, Meta)>> {
        let ImageRef::Name(text) = image else { return Ok(None) };
        let _in_use = self.lock_shared()?;
        let _naming = self.lock_names()?;
        let meta = self.find(image)?;
        let wanted = text.parse::<Wanted>();
        let named =
            |name: &&String| *name == text || wanted.as_ref().is_ok_and(|wanted| wanted.name() == name.as_str());
        let Some(name) = meta.names.iter().find(named).filter(|_| meta.names.len() > 1).cloned() else {
            return Ok(None);
        };
        let left = self.change_meta(&meta.id, |meta| meta.names.retain(|have| *have != name))?;
        Ok(Some((name, left)))
    }

    /// Give an image that was imported again what it had: names, even those that others have now, and who signed it.
    pub(super) fn give_back(&self, meta: &Meta) -> Result<()> {
        let _in_use = self.lock_shared()?;
        let _naming = self.lock_names()?;
        self.change_meta(&meta.id, |have| {
            (have.names, have.before) = (meta.names.clone(), meta.before.clone());
            have.signed_by.clone_from(&meta.signed_by);
        })?;
        Ok(())
    }

    pub(super) fn change_meta(&self, id: &ImageId, change: impl FnOnce(&mut Meta)) -> Result<Meta> {
        // Two who change one image read and write after one another. (The lock on the directory is its servers'.)
        let dir = self.paths.image(id);
        let manifest = dir.join(image::MANIFEST);
        let fd = std::fs::File::open(&manifest).map_err(|e| Error::io("open", show(&manifest), e))?;
        let _changing = lock::lock(fd.into(), &manifest, Hold::Exclusive)?;
        let mut meta = self.meta(id)?;
        change(&mut meta);
        meta.write(&dir.join(image::META))?;
        Ok(meta)
    }
}
