//! Import of AppC images.
//!
//! A directory is read as the archive that it would be (see `archive/write.rs`): its id is the SHA-512 of that archive, so the same
//! names, kinds, modes, owners, times, attributes, links and contents give the same id, and export gives the archive.

use std::path::PathBuf;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::layout::Layout;
use super::source::{ImageSource, ImportOptions, Imported, origin};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::image::appc::{Checked, Manifest};
use crate::image::signature::Signer;
use crate::index::Index;
use crate::paths::image;
use crate::store::Store;
use crate::store::archive::apart::{self, Place, Task};
use crate::store::archive::digest::Sha512;
use crate::store::archive::input::Archive;
use crate::store::archive::stream::Sink;
use crate::store::meta::{ImageKind, Meta, OnDisk, sha256_hex};
use crate::store::signed::{Signature, same_as_signed, watched};
use crate::store::staging::{Staging, write_index, write_new};

impl Store {
    /// The AppC manifest of an archive, strictly or not, and the id it will have. Nothing is placed.
    pub(crate) fn peek(path: &PathBuf, options: &ImportOptions) -> Result<(ImageId, Manifest)> {
        let name = show(path);
        let producer = Archive::open(path)?.producer(&options.limits, None);
        let (bytes, digest) = apart::peek::<Sha512>(producer, &name, &options.limits)?;
        Ok((ImageId::from_sha512(&digest.into()), Manifest::parse(&bytes, options.strictness)?.manifest))
    }

    pub(super) fn import_archive(
        &self,
        archive: Archive,
        source: &ImageSource,
        options: &ImportOptions,
    ) -> Result<Imported> {
        let signed = match source {
            ImageSource::Archive(path) | ImageSource::Downloaded { path, .. } => {
                self.check_signature(path, &options.signature)?
            }
            _ if self.policy.keyring.is_some() && options.signature != Signature::Waived => {
                let why = "a keyring is configured, and a stream has no signature";
                return Err(Error::new(Kind::Integrity, "check signature of", source, why)
                    .hint("put it into a file first, or take it without one by --no-signature"));
            }
            _ => None,
        };
        let Some(signed) = signed else {
            self.refuse_unsigned(
                source,
                options.signature == Signature::Waived,
                "no keyring is configured to check it by",
            )?;
            let producer = archive.producer(&options.limits, options.progress.clone());
            return self.import_stream(producer, source, options, None);
        };
        let name = archive.name.clone();
        let (archive, state) = watched(archive);
        let producer = archive.producer(&options.limits, options.progress.clone());
        // At the very end of the stream, which every import waits for.
        let checked = move |sink: &mut Sink<'_>| {
            producer(sink)?;
            same_as_signed(&name, &state, &signed.raw)
        };
        self.import_stream(checked, source, options, Some(signed.by))
    }

    pub(in crate::store) fn import_stream(
        &self,
        produce: impl FnOnce(&mut Sink<'_>) -> Result<()> + Send,
        source: &ImageSource,
        options: &ImportOptions,
        signed_by: Option<Signer>,
    ) -> Result<Imported> {
        let staging = Staging::make(&self.paths, "import")?;
        let name = source.to_string();
        let dir = staging.path().join("image");
        // Where it depends on others, the image's index is made of theirs and this one.
        let place = Place { dir: dir.clone(), index: image::OWN_INDEX };
        let task = Task::Image { name: options.name.clone() };
        let (unpacked, digest) = apart::unpack::<Sha512>(produce, task, &place, &name, &options.limits)?;
        if unpacked.is_layout {
            let at = dir.join(image::ROOTFS);
            let why = "it looks like an OCI layout or docker archive, and lacks index.json and manifest.json";
            let layout = Layout::at(&at, &name)?.ok_or_else(|| Error::new(Kind::Invalid, "read", &name, why))?;
            return self.import_layout(&layout, source, options);
        }
        let id = ImageId::from_sha512(&digest.into());
        if let Some(expected) = &options.expected_id
            && *expected != id
        {
            return Err(Error::new(Kind::Integrity, "check id", id.short(), format!("its id is {id}, not {expected}")));
        }
        let Checked { manifest, warnings } = Manifest::parse(&unpacked.manifest, options.strictness)?;
        for warning in &warnings {
            log::warn!("{name}: {warning}");
        }
        if let Some(signer) = &signed_by {
            self.check_signer(signer, &manifest.name)?;
        }
        let mut meta = Meta::new(id, ImageKind::Appc, name);
        meta.signed_by = signed_by;
        meta.origin = origin(source, options);
        let names = [options.name.clone().unwrap_or_else(|| manifest.name.clone())];
        meta.labels = manifest.labels.iter().map(|pair| (pair.name.clone(), pair.value.clone())).collect();
        meta.entries = unpacked.placed.entries;
        meta.bytes = unpacked.placed.bytes;
        meta.manifest_sha256 = Some(sha256_hex(&unpacked.manifest));
        meta.on_disk = if unpacked.placed.is_exact() { OnDisk::Exact } else { OnDisk::IndexOnly };
        if unpacked.placed.xattrs_dropped > 0 {
            log::warn!(
                "{}: {} extended attributes were left out: only user.* and security.capability are taken",
                meta.source,
                unpacked.placed.xattrs_dropped
            );
        }
        fault::point("store.manifest")?;
        write_new(&dir.join(image::MANIFEST), &unpacked.manifest)?;
        fault::point("store.index")?;
        let (own, whole) = (dir.join(image::OWN_INDEX), dir.join(image::INDEX));
        let own_index = Index::open(&own)?;
        if manifest.dependencies.is_empty() && manifest.path_whitelist.is_empty() {
            renameat_with(CWD, &own, CWD, &whole, RenameFlags::NOREPLACE)
                .map_err(|e| Error::sys("name", show(&whole), e))?;
        } else {
            let index = self.render(&mut meta, &manifest, &own_index, staging.path())?;
            write_index(&whole, index)?;
        }
        let gone = || Error::new(Kind::Busy, "publish", source, "what it needs was taken away");
        let (outcome, meta) = self.publish(&staging, &dir, meta, &[], &names, options.held)?.ok_or_else(gone)?;
        Ok(Imported {
            name: meta.called(options.name.as_deref()),
            id: meta.id,
            outcome,
            on_disk: meta.on_disk,
            warnings,
        })
    }
}
