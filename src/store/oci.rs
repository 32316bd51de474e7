//! Import of OCI images: a layout (directory or tar) or a docker archive becomes layers, shared by diff id, and an image that
//! names them, with one index of all.
//!
//! Every byte is checked twice: a blob against the digest that names it, its uncompressed content against its diff id. All
//! is staged, brought to the disk once, and published under one shared lock: layers first, the image last, so no clean-up can
//! come between a layer and the image that names it.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, mkdirat, renameat_with};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::Store;
use super::apart::{self, Place, Task};
use super::import::{ImageSource, ImportOptions, Imported, write_index, write_new};
use super::layer::LayerMeta;
use super::limits::Limits;
use super::meta::{ImageKind, Meta, OnDisk, Origin};
use super::signed::watched;
use super::staging::{self, Staging};
use super::stream::{self, Archive};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::image::oci::{self, Config, Descriptor, Digest, Document, Manifest, media_type};
use crate::image::{MAX_MANIFEST_BYTES, parse_json};
use crate::index::{Builder, Index, Whiteouts};
use crate::paths::image;
use crate::sys::durable::sync_dir;
use crate::sys::fs::{open_beneath, open_in_root};

/// Indexes within indexes that are followed: a platform's index below a name's is the deepest seen.
const MAX_INDEX_DEPTH: usize = 4;

/// Files of a layout, by names of its own.
pub(super) struct Layout {
    root: OwnedFd,
    name: String,
}

/// One image of a layout, all but its layers read.
struct Picked {
    manifest: Vec<u8>,
    config: Vec<u8>,
    names: Vec<String>,
    platform: oci::Platform,
    layers: Vec<Layer>,
}

/// Which layers need not be unpacked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    InStore,
    Nothing,
}

struct Layer {
    path: PathBuf,
    /// What the blob must be, where something says so.
    blob: Option<Descriptor>,
    diff_id: Digest,
}

/// Do these names lie at the top of a layout or docker archive, and not of an ACI?
pub(super) fn is_layout_name(path: &[u8]) -> bool {
    let top = path.split(|b| *b == b'/').next().unwrap_or(path);
    let stem = top.split(|b| *b == b'.').next().unwrap_or(top);
    matches!(top, b"oci-layout" | b"index.json" | b"blobs" | b"manifest.json" | b"repositories")
        || (stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit))
}

impl Layout {
    /// A directory that holds an OCI layout or an unpacked docker archive; `None` if it is neither.
    pub(super) fn at(path: &Path, name: &str) -> Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| Error::sys("open", show(path), e))?;
        let has = |name: &str| open_beneath(&root, Path::new(name), OFlags::PATH).is_ok();
        let is = (has("oci-layout") && has("index.json")) || (has("manifest.json") && !has(image::ROOTFS));
        Ok(is.then(|| Layout { root, name: name.to_owned() }))
    }

    /// A regular file of the layout. Docker archives name one layer twice by a symlink: those stay below the root.
    fn open(&self, path: &Path) -> Result<File> {
        let fail = |e: Errno| Error::sys("open", format!("{} of {}", show(path), self.name), e);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(open_in_root(&self.root, path, flags).map_err(fail)?);
        if !file.metadata().is_ok_and(|meta| meta.is_file()) {
            return Err(Error::new(Kind::Invalid, "open", show(path), "not a regular file"));
        }
        Ok(file)
    }

    fn small(&self, path: &Path) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let most = MAX_MANIFEST_BYTES as u64;
        self.open(path)?.take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::io("read", show(path), e))?;
        if bytes.len() as u64 > most {
            return Err(Error::new(Kind::Limit, "read", show(path), format!("it has more than {most} bytes")));
        }
        Ok(bytes)
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let bytes = self.small(&blob_path(&descriptor.digest))?;
        check_blob(
            &descriptor.digest,
            Some(descriptor.size),
            &Digest::from_sha256(&Sha256::digest(&bytes).into()),
            bytes.len() as u64,
        )?;
        Ok(bytes)
    }

    fn pick(&self, options: &ImportOptions) -> Result<Picked> {
        if open_beneath(&self.root, Path::new("index.json"), OFlags::PATH).is_ok() {
            self.pick_oci(options)
        } else {
            self.pick_docker(options)
        }
    }

    fn pick_oci(&self, options: &ImportOptions) -> Result<Picked> {
        let mut bytes = self.small(Path::new("index.json"))?;
        let (mut announced, mut is_chosen) = (None, false);
        let mut names: Vec<String> = Vec::new();
        for depth in 0..MAX_INDEX_DEPTH {
            match oci::parse_document(&bytes, announced.as_deref())? {
                Document::Manifest(_) if depth == 0 => break,
                Document::Manifest(manifest) => {
                    // What an index said of it was chosen by.
                    let wanted = options.platform.as_ref().filter(|_| !is_chosen);
                    return self.picked(bytes, &manifest, names, wanted);
                }
                Document::Index(index) => {
                    let wanted = options.reference.as_deref().filter(|_| depth == 0);
                    let platform = options.platform.clone().unwrap_or_else(oci::Platform::host);
                    let chosen = oci::choose(&index, wanted, &platform)?;
                    names.extend(chosen.names().map(str::to_owned));
                    is_chosen |= chosen.platform.is_some();
                    announced = Some(chosen.media_type.clone());
                    bytes = self.blob(chosen)?;
                }
            }
        }
        Err(Error::new(
            Kind::Invalid,
            "read",
            "index.json",
            format!("not an index, or more than {MAX_INDEX_DEPTH} of them are nested"),
        ))
    }

    fn picked(
        &self,
        bytes: Vec<u8>,
        manifest: &Manifest,
        names: Vec<String>,
        wanted: Option<&oci::Platform>,
    ) -> Result<Picked> {
        let config_bytes = self.blob(&manifest.config)?;
        let config = oci::parse_config(&config_bytes, manifest.layers.len())?;
        wanted.map_or(Ok(()), |wanted| config.platform.require(wanted))?;
        let layers = manifest.layers.iter().zip(&config.rootfs.diff_ids).map(|(blob, diff_id)| {
            if !oci::is_tar_layer(&blob.media_type) {
                let why = format!("its media type {:?} is not a layer that fsprov can unpack", blob.media_type);
                return Err(Error::new(Kind::Unsupported, "read layer", &blob.digest, why));
            }
            Ok(Layer { path: blob_path(&blob.digest), blob: Some(blob.clone()), diff_id: diff_id.clone() })
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Picked { manifest: bytes, config: config_bytes, names, platform: config.platform, layers })
    }

    /// `manifest.json` of `docker save`. What it has no manifest for gets one: uncompressed layers named by their diff ids.
    fn pick_docker(&self, options: &ImportOptions) -> Result<Picked> {
        let images: Vec<oci::DockerImage> = parse_json("manifest.json", &self.small(Path::new("manifest.json"))?)?;
        let tags = |image: &oci::DockerImage| image.repo_tags.clone().unwrap_or_default();
        let fits: Vec<&oci::DockerImage> = images
            .iter()
            .filter(|image| options.reference.as_ref().is_none_or(|name| tags(image).contains(name)))
            .collect();
        let [image] = fits[..] else {
            let all: Vec<String> = images.iter().flat_map(tags).collect();
            let why = format!("{} of its images fit; it has {}", fits.len(), all.join(", "));
            return Err(Error::new(Kind::Usage, "choose image of", &self.name, why));
        };
        if image.layers.len() > oci::MAX_LAYERS {
            let why = format!("it has more than {} layers", oci::MAX_LAYERS);
            return Err(Error::new(Kind::Limit, "read", "manifest.json", why));
        }
        let config_bytes = self.small(Path::new(&image.config))?;
        let config: Config = oci::parse_config(&config_bytes, image.layers.len())?;
        options.platform.as_ref().map_or(Ok(()), |wanted| config.platform.require(wanted))?;
        let mut layers = Vec::new();
        let mut descriptors = Vec::new();
        for (path, diff_id) in image.layers.iter().zip(&config.rootfs.diff_ids) {
            let path = PathBuf::from(path);
            let size = self.open(&path)?.metadata().map_err(|e| Error::io("stat", show(&path), e))?.len();
            descriptors.push(describe(media_type::LAYER, diff_id.clone(), size));
            layers.push(Layer { path, blob: None, diff_id: diff_id.clone() });
        }
        let config_digest = Digest::from_sha256(&Sha256::digest(&config_bytes).into());
        let made = Manifest {
            schema_version: 2,
            media_type: Some(media_type::MANIFEST.into()),
            config: describe(media_type::CONFIG, config_digest, config_bytes.len() as u64),
            layers: descriptors,
        };
        let manifest = serde_json::to_vec(&made).map_err(|e| Error::new(Kind::Io, "make manifest", &self.name, e))?;
        Ok(Picked { manifest, config: config_bytes, names: tags(image), platform: config.platform, layers })
    }
}

pub(super) fn describe(media_type: &str, digest: Digest, size: u64) -> Descriptor {
    Descriptor { media_type: media_type.into(), digest, size, platform: None, annotations: None }
}

fn blob_path(digest: &Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

fn check_blob(wanted: &Digest, size: Option<u64>, got: &Digest, length: u64) -> Result<()> {
    if let Some(size) = size.filter(|size| *size != length) {
        return Err(Error::new(Kind::Integrity, "check blob", wanted, format!("it has {length} bytes, not {size}")));
    }
    if wanted != got {
        return Err(Error::new(Kind::Integrity, "check blob", wanted, format!("its digest is {got}")));
    }
    Ok(())
}

impl Store {
    /// Import one image of a layout.
    pub(super) fn import_layout(
        &self,
        layout: &Layout,
        source: &ImageSource,
        options: &ImportOptions,
    ) -> Result<Imported> {
        let picked = layout.pick(options)?;
        let id = ImageId::from_sha256(&Sha256::digest(&picked.manifest).into());
        if let Some(expected) = &options.expected_id
            && *expected != id
        {
            return Err(Error::new(Kind::Integrity, "check id", id.short(), format!("its id is {id}, not {expected}")));
        }
        // A clean-up may take a layer that was found; then all are unpacked, whatever is there.
        for known in [Known::InStore, Known::Nothing] {
            if let Some(imported) = self.try_import_layout(layout, &picked, &id, source, options, known)? {
                return Ok(imported);
            }
        }
        Err(Error::new(Kind::Busy, "import", source, "the layers just made were taken away"))
    }

    fn try_import_layout(
        &self,
        layout: &Layout,
        picked: &Picked,
        id: &ImageId,
        source: &ImageSource,
        options: &ImportOptions,
        known: Known,
    ) -> Result<Option<Imported>> {
        let staging = Staging::make(&self.paths, "import")?;
        let mut meta = Meta::new(id.clone(), ImageKind::Oci, source.to_string());
        meta.origin = Origin::of(source, options);
        let mut names: Vec<String> = options.name.iter().cloned().collect();
        // Those of the layout are tags in it: who names the image himself does not mean them.
        if names.is_empty() {
            names.extend(picked.names.iter().cloned());
        }
        let oci::Platform { os, architecture, variant } = picked.platform.clone();
        meta.labels = vec![("os".into(), os), ("arch".into(), architecture)];
        meta.labels.extend(variant.map(|variant| ("variant".into(), variant)));
        let mut index = Builder::in_dir(staging.path());
        let mut fresh: Vec<(ImageId, PathBuf)> = Vec::new();
        for layer in &picked.layers {
            let diff_id = layer.diff_id.id();
            let staged = staged_at(&staging, diff_id);
            let at = if known == Known::InStore && self.check_layer(diff_id).is_ok() {
                self.paths.layer(diff_id)
            } else if fresh.iter().any(|(have, _)| have == diff_id) {
                staged
            } else {
                let subject = format!("{} of {}", diff_id.short(), layout.name);
                unpack_layer(layout, layer, &staged, &options.limits, options.progress.clone())
                    .map_err(|e| e.within("unpack layer", subject))?;
                fresh.push((diff_id.clone(), staged.clone()));
                staged
            };
            fault::point("store.add_layer")?;
            let layer_meta = match add_layer(&mut index, &at) {
                // A clean-up took it since it was found.
                Err(_) if at != staged_at(&staging, diff_id) && !at.exists() => return Ok(None),
                other => other?,
            };
            meta.entries += layer_meta.entries;
            meta.bytes += layer_meta.bytes;
            if layer_meta.on_disk == OnDisk::IndexOnly {
                meta.on_disk = OnDisk::IndexOnly;
            }
            meta.layers.push(diff_id.clone());
        }
        let dir = staging.path().join("image");
        mkdirat(CWD, &dir, Mode::RWXU).map_err(|e| Error::sys("make", show(&dir), e))?;
        fault::point("store.manifest")?;
        write_new(&dir.join(image::MANIFEST), &picked.manifest)?;
        write_new(&dir.join(image::CONFIG), &picked.config)?;
        fault::point("store.index")?;
        write_index(&dir.join(image::INDEX), index)?;
        let published = self.publish(&staging, &dir, meta, &fresh, &names, options.held)?;
        let Some((outcome, meta)) = published else { return Ok(None) };
        Ok(Some(Imported {
            name: meta.called(options.name.as_deref()),
            id: meta.id,
            outcome,
            on_disk: meta.on_disk,
            warnings: Vec::new(),
        }))
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

    /// Is what makes a layer there? Cheap.
    pub(super) fn check_layer(&self, id: &ImageId) -> Result<()> {
        let dir = self.paths.layer(id);
        LayerMeta::read(&dir)?;
        Index::open(&dir.join(image::INDEX))?;
        let root = std::fs::symlink_metadata(dir.join(image::ROOTFS)).map_err(|e| Error::io("use layer", id, e))?;
        if root.is_dir() {
            Ok(())
        } else {
            Err(Error::new(Kind::Integrity, "use layer", id, "its rootfs is not a directory"))
        }
    }
}

/// Where an import unpacks a layer.
fn staged_at(staging: &Staging, diff_id: &ImageId) -> PathBuf {
    staging.path().join(diff_id.as_str())
}

/// Put the index of the layer in the directory `at` upon what is in the index of an image.
pub(super) fn add_layer(index: &mut Builder, at: &Path) -> Result<LayerMeta> {
    let meta = LayerMeta::read(at)?;
    index.begin_layer(Whiteouts::Oci)?;
    let implied = meta.implied()?;
    index.add_index(&Index::open(&at.join(image::INDEX))?, |path, inode| {
        !inode.is_implied && (implied.is_empty() || !implied.contains(path))
    })?;
    Ok(meta)
}

fn unpack_layer(
    layout: &Layout,
    layer: &Layer,
    dir: &Path,
    limits: &Limits,
    progress: Option<stream::ProgressFn>,
) -> Result<()> {
    fault::point("store.layer")?;
    let file = layout.open(&layer.path)?;
    let total = file.metadata().map_err(|e| Error::io("stat", show(&layer.path), e))?.len();
    let name = layer.diff_id.to_string();
    let (archive, state) = watched(Archive { name, input: Box::new(file), total: Some(total) });
    let place = Place { dir: dir.to_owned(), index: image::INDEX };
    let diff_id = layer.diff_id.to_string();
    let (unpacked, got) =
        apart::unpack::<Sha256>(archive.producer(limits, progress), Task::Layer, &place, &diff_id, limits)?;
    let got = Digest::from_sha256(&<[u8; 32]>::from(got));
    if got != layer.diff_id {
        let why = format!("its uncompressed bytes have the digest {got}");
        return Err(Error::new(Kind::Integrity, "check layer", &layer.diff_id, why));
    }
    if let Some(blob) = &layer.blob {
        let (sha, length) = {
            let state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            (state.0.clone(), state.1)
        };
        check_blob(&blob.digest, Some(blob.size), &Digest::from_sha256(&sha.finalize().into()), length)?;
    }
    LayerMeta::new(&unpacked.placed, unpacked.whiteouts).write(dir)
}
