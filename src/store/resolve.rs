//! From what the user wrote to an image: a path, an id, a part of one, a name, a name with a version.

use std::path::{Path, PathBuf};

use super::layer::{LayerMeta, LayerWhiteouts};
use super::mesos;
use super::oci::Layout;
use super::stream::{Archive, digest};
use super::{Held, ImageSource, ImportOptions, Meta, Outcome, Store};
use crate::error::{Error, Kind, Result, show};
use crate::id::{ImageId, ImageRef};
use crate::image::Strictness;
use crate::image::discovery::Wanted;
use crate::paths::image;
use crate::sys::fs::{explain_named, open_named, path_of};

/// Fewest hex digits of an id's beginning that are taken for one: fewer would often be a name mistyped. With the algorithm
/// before them it is clear that an id is meant.
const MIN_PREFIX: usize = 6;
const MIN_PREFIX_AFTER_ALGORITHM: usize = 4;

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
    /// May the layers on the disk have whiteouts? Those and what they hide are no part of the image, even of one with a single layer:
    /// its index tells.
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
            has_whiteouts: meta.layers.iter().any(may_have),
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
        let bytes = super::meta::read_bounded(&manifest, crate::image::MAX_MANIFEST_BYTES as u64)?;
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

/// The images that a text means: those of this name; else those of this name and the labels after it
/// (`NAME[:VERSION][,LABEL=VALUE...]`); else those whose id begins so.
pub(super) fn fitting(all: Vec<Meta>, text: &str) -> Vec<Meta> {
    let named = |meta: &Meta, name: &str| meta.names.iter().any(|have| have == name);
    let by_name: Vec<Meta> = all.iter().filter(|meta| named(meta, text)).cloned().collect();
    if !by_name.is_empty() {
        return by_name;
    }
    if let Ok(wanted) = text.parse::<Wanted>() {
        // rkt's rule: the labels asked for must be there; others may be.
        let has = |meta: &Meta| wanted.labels().iter().all(|pair| meta.label(&pair.name) == Some(&*pair.value));
        let by_label: Vec<Meta> = all.iter().filter(|meta| named(meta, wanted.name()) && has(meta)).cloned().collect();
        if !by_label.is_empty() {
            return by_label;
        }
    }
    let (digits, least) = match text.split_once('-') {
        Some(("sha512" | "sha256", digits)) => (digits, MIN_PREFIX_AFTER_ALGORITHM),
        _ => (text, MIN_PREFIX),
    };
    if digits.len() < least || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Vec::new();
    }
    let begins = |id: &ImageId| {
        let id = id.as_str();
        id.starts_with(text) || id.split_once('-').is_some_and(|(_, rest)| rest.starts_with(text))
    };
    all.into_iter().filter(|meta| begins(&meta.id)).collect()
}

pub(super) fn choose(image: &ImageRef, mut found: Vec<Meta>, missing: impl FnOnce() -> Error) -> Result<Meta> {
    if found.len() > 1 {
        // rkt's rule: who names no version means the one called latest.
        let latest: Vec<usize> = (0..found.len()).filter(|i| found[*i].label("version") == Some("latest")).collect();
        if let [only] = latest[..] {
            return Ok(found.swap_remove(only));
        }
        // And where none is called so (or several are), the one imported last. Within one second nobody can tell.
        if !latest.is_empty() {
            found.retain(|meta| meta.label("version") == Some("latest"));
        }
        let last = found.iter().map(|meta| meta.imported_at).max();
        let newest: Vec<usize> = (0..found.len()).filter(|i| Some(found[*i].imported_at) == last).collect();
        if let [only] = newest[..] {
            return Ok(found.swap_remove(only));
        }
        let shown: Vec<String> = found
            .iter()
            .map(|meta| {
                let version = meta.label("version").map_or(String::new(), |version| format!(":{version}"));
                format!("{}{version} ({})", meta.names.first().map_or("", |name| name), meta.id.short())
            })
            .collect();
        return Err(Error::new(Kind::Usage, "find image", image, format!("it may be any of {}", shown.join(", ")))
            .hint("name the version (NAME:VERSION) or the id"));
    }
    found.pop().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::super::meta::ImageKind;
    use super::*;

    fn meta(digit: &str, name: &str, version: Option<&str>) -> Meta {
        let id = format!("sha512-{}", digit.repeat(64)).parse().unwrap();
        let mut meta = Meta::new(id, ImageKind::Appc, String::new());
        meta.names.push(name.into());
        meta.labels.extend(version.map(|v| ("version".to_owned(), v.to_owned())));
        meta
    }

    #[test]
    fn names_versions_and_prefixes() {
        let all = [
            meta("0a", "example.com/a", Some("1")),
            meta("0b", "example.com/a", Some("2")),
            meta("1c", "b", None),
            meta("1d", "c", Some("latest")),
            meta("1e", "c", Some("3")),
            meta("1f", "0b0b0b", None),
        ];
        let find = |text: &str| {
            let image = ImageRef::Name(text.into());
            choose(&image, fitting(all.to_vec(), text), || Error::new(Kind::NotFound, "", "", "")).map(|meta| meta.id)
        };
        let id = |digit: &str| format!("sha512-{}", digit.repeat(64)).parse::<ImageId>().unwrap();
        assert_eq!(find("example.com/a:2").unwrap(), id("0b"));
        assert_eq!(find("b").unwrap(), id("1c"));
        assert_eq!(find("c").unwrap(), id("1d"));
        assert_eq!(find("sha512-0a0a0a").unwrap(), id("0a"));
        assert_eq!(find("1c1c1c1").unwrap(), id("1c"));
        assert_eq!(find("sha512-1c1c").unwrap(), id("1c"));
        assert_eq!(find("0b0b0b").unwrap(), id("1f"), "a name goes before an id");
        let ambiguous = find("example.com/a").unwrap_err();
        assert_eq!(ambiguous.kind(), Kind::Usage);
        assert!(ambiguous.to_string().contains("example.com/a:1 (sha512-0a0a0a0a0a0a)"), "{ambiguous}");
        assert_eq!(find("example.com/a:2,os=linux").unwrap_err().kind(), Kind::NotFound, "a label that it has not");
        let mut newer = all.clone();
        newer[1].imported_at += 1;
        newer[1].labels.push(("os".into(), "linux".into()));
        let find_newer = |text: &str| {
            let image = ImageRef::Name(text.into());
            choose(&image, fitting(newer.to_vec(), text), || Error::new(Kind::NotFound, "", "", "")).map(|meta| meta.id)
        };
        assert_eq!(find_newer("example.com/a").unwrap(), id("0b"), "the one imported last");
        assert_eq!(find_newer("example.com/a,os=linux").unwrap(), id("0b"), "a subset of its labels");
        assert_eq!(find_newer("example.com/a:1").unwrap(), id("0a"));
        for none in ["1c1c1", "zz", "example.com/a:3", "sha512-", "sha256-0a0a0a", "x:1c1c1c"] {
            assert_eq!(find(none).unwrap_err().kind(), Kind::NotFound, "{none}");
        }
    }
}
