//! From what the user wrote to an image: a path, an id, a part of one, a name, a name with a version.

use std::path::{Path, PathBuf};

use super::archive::input::{Archive, digest};
use super::archive::whiteout::LayerWhiteouts;
use super::choose::{MIN_PREFIX_AFTER_ALGORITHM, choose, fitting};
use super::import::{ImageSource, ImportOptions, Layout, Outcome};
use super::layer::LayerMeta;
use super::meta::{ImageKind, Meta, read_bounded};
use super::names::Held;
use super::{Store, mesos};
use crate::error::{Error, Kind, Result, show};
use crate::id::{ImageId, ImageRef};
use crate::image::Strictness;
use crate::image::execution::Execution;
use crate::paths::image;
use crate::sys::fs::{explain_named, open_named, path_of};

/// An image found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResolvedImage {
    /// Its id, where it lies in the store.
    pub id: Option<ImageId>,
    /// Its name, where it has one.
    pub name: Option<String>,
    /// Layer roots, bottom first; absolute.
    pub layers: Vec<PathBuf>,
    /// Its index, where it lies in the store.
    pub index: Option<PathBuf>,
    /// Its manifest, where it has one.
    pub manifest: Option<PathBuf>,
    /// Do the layers on the disk hold what the image does not show (a pathWhitelist)? Then only a backend that goes by the
    /// index may serve it; flattened, any may.
    pub is_filtered: bool,
    /// May the layers on the disk have whiteouts, or cover directories that look otherwise? Whiteouts and what they hide are not part of the image,
    /// even of one with a single layer: its index tells.
    pub has_whiteouts: bool,
}

impl Store {
    /// Find an image. Who means to use it holds [`Store::lock_shared`] before and until a record names it.
    ///
    /// A path may be a directory that is a root filesystem, a directory that holds `manifest` and `rootfs` (as Mesos's store
    /// has them; it is used where it is), an OCI layout, or an archive. The last two are imported into the store unless
    /// they are there.
    ///
    /// Errors: [`Kind::NotFound`]; [`Kind::Usage`] where several images fit, with their names.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// let in_use = store.lock_shared()?;
    /// let image = store.resolve(&fsprov::id::ImageRef::parse("example.com/debian".as_ref())?)?;
    /// for layer in &image.layers {
    ///     println!("{}", layer.display());
    /// }
    /// drop(in_use);
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn resolve(&self, image: &ImageRef) -> Result<ResolvedImage> {
        match image {
            ImageRef::Path(path) => self.resolve_path(path),
            ImageRef::Id(_) | ImageRef::Name(_) => match self.find(image) {
                Ok(meta) => {
                    let meta = self.check_shallow(&meta.id)?;
                    self.check_recorded(&meta)?;
                    Ok(self.resolved(meta))
                }
                Err(e) if e.kind() == Kind::NotFound => match mesos::find(&self.policy.mesos_stores, image)? {
                    Some(dir) => self.resolve_path(&dir),
                    None if Path::new(&image.to_string()).exists() => {
                        Err(e.hint(format!("for the file or directory of this name here, write ./{image}")))
                    }
                    None => Err(e),
                },
                Err(e) => Err(e),
            },
        }
    }

    /// How an image that was found wants to be run. A directory that is a root filesystem says nothing.
    pub(crate) fn execution(&self, found: &ResolvedImage) -> Result<Execution> {
        let Some(manifest) = &found.manifest else { return Ok(Execution::default()) };
        let read = |path: &Path| read_bounded(path, crate::image::MAX_MANIFEST_BYTES as u64);
        let kind = found.id.as_ref().map(|id| self.meta(id).map(|meta| meta.kind)).transpose()?;
        if kind == Some(ImageKind::Oci) {
            return Execution::of_oci(&read(&manifest.with_file_name(image::CONFIG))?);
        }
        let checked = crate::image::appc::Manifest::parse(&read(manifest)?, Strictness::Lenient)?;
        Ok(Execution::of_appc(&checked.manifest))
    }

    pub(super) fn resolved(&self, meta: Meta) -> ResolvedImage {
        let dir = self.paths.image(&meta.id);
        let layers = if meta.layers.is_empty() {
            let below = meta.dependencies.iter().map(|id| self.paths.image(id).join(image::ROOTFS));
            below.chain([dir.join(image::ROOTFS)]).collect()
        } else {
            meta.layers.iter().map(|layer| self.paths.layer(layer).join(image::ROOTFS)).collect()
        };
        // A record that cannot be read says nothing, and a look at the tree is then the safe choice.
        let may_have = |layer: &ImageId| {
            LayerMeta::read(&self.paths.layer(layer)).map_or(true, |m| m.whiteouts == LayerWhiteouts::Some)
        };
        ResolvedImage {
            name: meta.names.first().cloned(),
            is_filtered: meta.is_filtered,
            has_whiteouts: meta.covers.unwrap_or(meta.layers.len() > 1) || meta.layers.iter().any(may_have),
            id: Some(meta.id),
            layers,
            index: Some(dir.join(image::INDEX)),
            manifest: Some(dir.join(image::MANIFEST)),
        }
    }

    fn resolve_path(&self, path: &Path) -> Result<ResolvedImage> {
        const OP: &str = "find image";
        let whole = std::path::absolute(path).map_err(|e| Error::io(OP, show(path), e))?;
        let at = open_named(&whole).map_err(|e| explain_named(OP, path, e)).and_then(path_of).map_err(|e| {
            let is_missing = e.kind() == Kind::NotFound;
            if is_missing { e.hint("check the path, or give a name of `fsprov image list`") } else { e }
        })?;
        if !at.is_dir() {
            return self.resolve_archive(at);
        }
        let source = ImageSource::Directory(at.clone());
        if Layout::at(&at, &source.to_string())?.is_some() {
            return self.resolve_by_import(&source, &self.import_options(Strictness::Strict));
        }
        self.refuse_unsigned(show(&at), false, "a directory has no bytes that were signed")?;
        let Some(found) = mesos::layout(&at) else {
            return Ok(ResolvedImage {
                id: None,
                name: None,
                layers: vec![at],
                index: None,
                manifest: None,
                is_filtered: false,
                has_whiteouts: false,
            });
        };
        let manifest = at.join(image::MANIFEST);
        // Mesos took this image already: what it let pass, we let pass.
        let bytes = read_bounded(&manifest, crate::image::MAX_MANIFEST_BYTES as u64)?;
        let name = match crate::image::appc::Manifest::parse(&bytes, Strictness::Lenient) {
            Ok(checked) => {
                let needs = |what: &str| {
                    let why = format!("its manifest has {what}, which a store used in place cannot give");
                    Error::new(Kind::Unsupported, "use the Mesos image", show(&at), why)
                        .hint("import it: `tar -cC DIR manifest rootfs | fsprov image import -`")
                };
                if !checked.manifest.dependencies.is_empty() {
                    return Err(needs("dependencies"));
                }
                if !checked.manifest.path_whitelist.is_empty() {
                    return Err(needs("a pathWhitelist"));
                }
                Some(checked.manifest.name)
            }
            Err(error) => {
                log::warn!("{}: {error}", show(&manifest));
                None
            }
        };
        Ok(ResolvedImage {
            id: None,
            name,
            layers: vec![found],
            index: None,
            manifest: Some(manifest),
            is_filtered: false,
            has_whiteouts: false,
        })
    }

    fn resolve_archive(&self, path: PathBuf) -> Result<ResolvedImage> {
        let options = self.import_options(Strictness::Lenient);
        // Hashing alone is far cheaper than placing, and an archive that is mounted once is mounted again.
        let id = ImageId::from_sha512(&digest(Archive::open(&path)?, &options.limits)?);
        if let Ok(meta) = self.check_shallow(&id) {
            // Its bytes are those of an image that is there; whether somebody signed them is asked all the same.
            if self.policy.keyring.is_none() || self.is_signed(&meta) {
                self.check_recorded(&meta)?;
                return Ok(self.resolved(meta));
            }
        }
        let shown = show(&path);
        self.resolve_by_import(&ImageSource::Archive(path), &options).map_err(|e| {
            let wants_name = e.to_string().contains("--name");
            if wants_name { e.hint(format!("import it first: `fsprov image import {shown} --name NAME`")) } else { e }
        })
    }

    pub(super) fn import_options(&self, strictness: Strictness) -> ImportOptions {
        // Nobody gives a name here: it gets its own, unless that means another.
        ImportOptions { strictness, held: Held::Skip, limits: self.policy.limits.clone(), ..ImportOptions::default() }
    }

    fn resolve_by_import(&self, source: &ImageSource, options: &ImportOptions) -> Result<ResolvedImage> {
        let imported = self.import(source, options)?;
        if imported.outcome == Outcome::Created {
            log::info!("{source} was not in the store yet: it is now, as {}", imported.id);
        }
        let meta = self.check_shallow(&imported.id)?;
        Ok(self.resolved(meta))
    }

    /// The one image of the store that `image` means.
    pub(super) fn find(&self, image: &ImageRef) -> Result<Meta> {
        let missing = || missing(image);
        match image {
            ImageRef::Id(id) => self.meta(id).map_err(|e| if e.kind() == Kind::NotFound { missing() } else { e }),
            ImageRef::Path(path) => {
                Err(Error::new(Kind::Usage, "find image", show(path), "this is a path, and not an image in the store")
                    .hint("give a name or id of `fsprov image list`"))
            }
            ImageRef::Name(name) => choose(image, fitting(self.list()?, name), missing),
        }
    }
}

/// The store does not have it: how to get it, or what was meant.
fn missing(image: &ImageRef) -> Error {
    let text = image.to_string();
    let error = Error::new(Kind::NotFound, "find image", &text, "the store has no image of this name or id");
    let digits = text.strip_prefix("sha512-").or_else(|| text.strip_prefix("sha256-"));
    if digits.is_some_and(|digits| digits.len() < MIN_PREFIX_AFTER_ALGORITHM) {
        return error.hint(format!("give at least {MIN_PREFIX_AFTER_ALGORITHM} digits of an id"));
    }
    error.hint(
        "`fsprov image list` shows what it has; `fsprov image pull` gets one from a registry, `fsprov image import` from a file",
    )
}
