//! An OCI layout (directory or unpacked tar) or an unpacked docker archive, and one image of it chosen and read, all but its layers.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::source::ImportOptions;
use crate::error::{Error, Kind, Result, show};
use crate::image::oci::{self, Config, Descriptor, Digest, Document, Manifest, media_type};
use crate::image::{MAX_MANIFEST_BYTES, parse_json};
use crate::paths::image;
use crate::sys::fs::{open_beneath, open_in_root};

/// Indexes within indexes that are followed: a platform's index below a name's is the deepest seen.
const MAX_INDEX_DEPTH: usize = 4;

/// Files of a layout, by names of its own.
pub(in crate::store) struct Layout {
    root: OwnedFd,
    pub(super) name: String,
}

/// One image of a layout, all but its layers read.
pub(super) struct Picked {
    pub(super) manifest: Vec<u8>,
    pub(super) config: Vec<u8>,
    pub(super) names: Vec<String>,
    pub(super) platform: oci::Platform,
    pub(super) layers: Vec<Layer>,
}

pub(super) struct Layer {
    pub(super) path: PathBuf,
    /// What the blob must be, where something says so.
    pub(super) blob: Option<Descriptor>,
    pub(super) diff_id: Digest,
}

impl Layout {
    /// A directory that holds an OCI layout or an unpacked docker archive; `None` if it is neither.
    pub(in crate::store) fn at(path: &Path, name: &str) -> Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| Error::sys("open", show(path), e))?;
        let has = |name: &str| open_beneath(&root, Path::new(name), OFlags::PATH).is_ok();
        let is = (has("oci-layout") && has("index.json")) || (has("manifest.json") && !has(image::ROOTFS));
        Ok(is.then(|| Layout { root, name: name.to_owned() }))
    }

    /// A regular file of the layout. Docker archives name one layer twice by a symlink: those stay below the root.
    pub(super) fn open(&self, path: &Path) -> Result<File> {
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

    pub(super) fn pick(&self, options: &ImportOptions) -> Result<Picked> {
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
            descriptors.push(Descriptor::new(media_type::LAYER, diff_id.clone(), size));
            layers.push(Layer { path, blob: None, diff_id: diff_id.clone() });
        }
        let config_digest = Digest::from_sha256(&Sha256::digest(&config_bytes).into());
        let made = Manifest {
            schema_version: 2,
            media_type: Some(media_type::MANIFEST.into()),
            config: Descriptor::new(media_type::CONFIG, config_digest, config_bytes.len() as u64),
            layers: descriptors,
        };
        let manifest = serde_json::to_vec(&made).map_err(|e| Error::new(Kind::Io, "make manifest", &self.name, e))?;
        Ok(Picked { manifest, config: config_bytes, names: tags(image), platform: config.platform, layers })
    }
}

fn blob_path(digest: &Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

pub(super) fn check_blob(wanted: &Digest, size: Option<u64>, got: &Digest, length: u64) -> Result<()> {
    if let Some(size) = size.filter(|size| *size != length) {
        return Err(Error::new(Kind::Integrity, "check blob", wanted, format!("it has {length} bytes, not {size}")));
    }
    if wanted != got {
        return Err(Error::new(Kind::Integrity, "check blob", wanted, format!("its digest is {got}")));
    }
    Ok(())
}
