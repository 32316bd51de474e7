//! Import of AppC images: an archive or a directory becomes `images/<id>`, whole and on the disk, or nothing does.
//!
//! The steps: stage on the store's own file system, hash and place in one pass, check, write manifest and index, `syncfs`
//! with its error checked, write and sync `meta.json`, rename without replacing, sync the directory of images. A rename that
//! finds the image there already is a second import of the same bytes: the one that is there is looked at and used.
//!
//! A directory is read as the archive that it would be (see `tarwrite`): its id is the SHA-512 of that archive, so the same
//! names, kinds, modes, owners, times, attributes, links and contents give the same id, and export gives the archive.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use sha2::Sha512;

use super::apart::{self, Place, Task};
use super::limits::Limits;
use super::meta::{ImageKind, Meta, OnDisk, Origin, sha256_hex};
use super::names::Held;
use super::oci::Layout;
use super::signed::{Signature, same_as_signed, watched};
use super::staging::{self, Staging};
use super::stream::{Archive, ProgressFn, Sink};
use super::{Store, tarwrite};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::{ImageId, ImageRef};
use crate::image::Strictness;
use crate::image::appc::{Checked, Manifest};
use crate::image::oci::Platform;
use crate::image::signature::Signer;
use crate::index::{Builder, Index};
use crate::paths::image;

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageSource {
    /// A file (or FIFO) that is an ACI, an OCI layout, a docker archive, or a root filesystem (then a name must be given): a tar
    /// archive, plain or in gzip, bzip2, xz or zstd; its bytes tell, not its name.
    Archive(PathBuf),
    /// A directory that holds `manifest` and `rootfs`, or that is a root filesystem (then a name must be given).
    Directory(PathBuf),
    /// An ACI on standard input.
    Stdin,
    /// The tree of another image of the store ([`Store::flatten`]).
    Flattened(ImageId),
    /// An archive or OCI layout that was fetched, and where it came from, for people.
    Downloaded {
        /// Where it lies.
        path: PathBuf,
        /// Its URL, or what comes nearest.
        from: String,
    },
}

impl ImageSource {
    /// What lies at `path`; `-` is standard input.
    pub fn at(path: &Path) -> Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(ImageSource::Stdin);
        }
        let meta = std::fs::metadata(path).map_err(|e| {
            let error = Error::io("find", show(path), e);
            if error.kind() == Kind::NotFound {
                error.hint("check the path; `fsprov image pull` gets an image from a registry")
            } else {
                error
            }
        })?;
        Ok(if meta.is_dir() { ImageSource::Directory(path.into()) } else { ImageSource::Archive(path.into()) })
    }
}

impl std::fmt::Display for ImageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ImageSource::Archive(path) | ImageSource::Directory(path) => f.write_str(&show(path)),
            ImageSource::Stdin => f.write_str("standard input"),
            ImageSource::Flattened(id) => write!(f, "the layers of {id}"),
            ImageSource::Downloaded { from, .. } => f.write_str(from),
        }
    }
}

/// How to import.
#[derive(Clone, Default)]
pub struct ImportOptions {
    /// The one name that it gets, in place of those that it came with. Needed for a directory without manifest, where it must be an AC identifier.
    pub name: Option<String>,
    /// What becomes of it if another image holds its name.
    pub held: Held,
    /// The id it must turn out to have.
    pub expected_id: Option<ImageId>,
    /// How strictly its manifest is read.
    pub strictness: Strictness,
    /// What it may ask for.
    pub limits: Limits,
    /// Which image of an OCI index or docker archive: its name there (`debian:12`, or a tag).
    pub reference: Option<String>,
    /// For which platform, of an OCI index; this host's otherwise.
    pub platform: Option<Platform>,
    /// Where its signature is, if the store's policy asks for one.
    pub signature: Signature,
    /// Told of progress.
    pub progress: Option<ProgressFn>,
}

impl std::fmt::Debug for ImportOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImportOptions")
            .field("name", &self.name)
            .field("expected_id", &self.expected_id)
            .field("strictness", &self.strictness)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Did an import make the image?
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Outcome {
    /// It did.
    Created,
    /// The same image was there.
    Existing,
}

/// An image imported.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Imported {
    /// Its id.
    pub id: ImageId,
    /// Its first name.
    pub name: String,
    /// Whether it was there before.
    pub outcome: Outcome,
    /// Whether the tree on disk says all.
    pub on_disk: OnDisk,
    /// Rules that its manifest breaks and that were let pass.
    pub warnings: Vec<String>,
}

impl Store {
    /// Import an image: an AppC archive or directory, an OCI layout, a docker archive. Importers of one image at the same time
    /// all succeed, and one copy is there.
    ///
    /// ```
    /// use fsprov::store::{ImageSource, ImportOptions, Outcome, Store};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let (state_root, rootfs) = (dir.path().join("state"), dir.path().join("rootfs"));
    /// std::fs::create_dir_all(rootfs.join("etc"))?;
    /// std::fs::write(rootfs.join("etc/hostname"), "box")?;
    /// let store = Store::open(&fsprov::StatePaths::new(state_root))?;
    /// let options = ImportOptions { name: Some("example.com/box".into()), ..ImportOptions::default() };
    /// let imported = store.import(&ImageSource::at(&rootfs)?, &options)?;
    /// assert_eq!(imported.outcome, Outcome::Created);
    /// assert_eq!(store.import(&ImageSource::at(&rootfs)?, &options)?.outcome, Outcome::Existing);
    /// assert_eq!(store.list()?[0].names, ["example.com/box"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Errors: [`Kind::Invalid`] for an archive or manifest that breaks the rules, [`Kind::Limit`] past
    /// [`ImportOptions::limits`], [`Kind::Integrity`] if it is not the image expected, [`Kind::Usage`] for a directory
    /// without manifest and name.
    pub fn import(&self, source: &ImageSource, options: &ImportOptions) -> Result<Imported> {
        if let Some(name) = &options.name {
            check_name(name)?;
        }
        staging::clean(&self.paths)?;
        self.import_source(source, options).map_err(|e| e.within("import", source))
    }

    fn import_source(&self, source: &ImageSource, options: &ImportOptions) -> Result<Imported> {
        match source {
            ImageSource::Downloaded { path, .. } if path.is_dir() => {
                self.refuse_unsigned(source, false, "a pulled image has no detached signature")?;
                let why = "not an OCI layout";
                let layout = Layout::at(path, &source.to_string())?;
                let layout = layout.ok_or_else(|| Error::new(Kind::Invalid, "read", source, why))?;
                self.import_layout(&layout, source, options)
            }
            ImageSource::Archive(path) | ImageSource::Downloaded { path, .. } => {
                let archive = Archive::open(path)?;
                self.import_archive(archive, source, options)
            }
            ImageSource::Flattened(id) => Err(Error::new(Kind::Usage, "import", id, "it is in the store")
                .hint("Store::flatten makes one layer of it")),
            ImageSource::Stdin => {
                let input = Box::new(std::io::stdin());
                let archive = Archive { name: source.to_string(), input, total: None };
                self.import_archive(archive, source, options)
            }
            ImageSource::Directory(path) => {
                self.refuse_unsigned(
                    source,
                    options.signature == Signature::Waived,
                    "a directory has no bytes that were signed",
                )?;
                if let Some(layout) = Layout::at(path, &source.to_string())? {
                    return self.import_layout(&layout, source, options);
                }
                if let Signature::File(file) = &options.signature {
                    return Err(Error::new(
                        Kind::Usage,
                        "check signature of",
                        source,
                        "a directory has no bytes that were signed",
                    )
                    .hint(format!("{} is of an archive: import that", show(file))));
                }
                let tree = tarwrite::DirectoryImage::open(path, options.name.as_deref(), &options.limits)?;
                self.import_stream(|sink| tree.write(sink), source, options, None)
            }
        }
    }

    /// The AppC manifest of an archive, strictly or not, and the id it will have. Nothing is placed.
    pub(crate) fn peek(path: &PathBuf, options: &ImportOptions) -> Result<(ImageId, Manifest)> {
        let name = show(path);
        let producer = Archive::open(path)?.producer(&options.limits, None);
        let (bytes, digest) = apart::peek::<Sha512>(producer, &name, &options.limits)?;
        Ok((ImageId::from_sha512(&digest.into()), Manifest::parse(&bytes, options.strictness)?.manifest))
    }

    fn import_archive(&self, archive: Archive, source: &ImageSource, options: &ImportOptions) -> Result<Imported> {
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

    pub(super) fn import_stream(
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
        meta.origin = Origin::of(source, options);
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
                    let synced =
                        fault::point("store.parent").and_then(|()| crate::sys::durable::sync_dir(&self.paths.images()));
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
}

fn rename_back(from: &Path, to: &Path) -> Result<()> {
    renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(|e| Error::sys("take back", show(from), e))
}

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

pub(super) fn create_new(path: &Path) -> Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    fault::point("store.write_new")?;
    let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|e| Error::io("write", show(path), e))
}

pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write as _;
    create_new(path)?.write_all(bytes).map_err(|e| Error::io("write", show(path), e))
}

pub(super) fn write_index(path: &Path, index: Builder) -> Result<()> {
    let mut out = std::io::BufWriter::with_capacity(64 << 10, create_new(path)?);
    index.finish_into(&mut out).map_err(|e| e.within("write", show(path)))
}
