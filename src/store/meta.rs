//! `meta.json`: what we know about an image beside its manifest. Written last, so that its being there says the rest is.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Kind, Result, show};
use crate::id::ImageId;
use crate::image::oci::Platform;
use crate::image::signature::Signer;
use crate::sys::durable::{Survives, write_file};

/// Longest meta.json read: some hundred names and layers.
const MAX_BYTES: u64 = 4 << 20;
/// The format's number: another one is another program's.
const VERSION: u32 = 1;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ImageKind {
    /// An AppC image.
    Appc,
    /// An OCI image.
    Oci,
}

/// Does the tree on disk say all, or does the index?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDisk {
    /// Owners, modes and devices on disk are the image's.
    Exact,
    /// Some are in the index alone, since who imported it could not set them.
    IndexOnly,
}

/// What an image was imported from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Origin {
    /// The archive, layout or directory; absolute.
    #[serde(with = "crate::pathtext")]
    pub path: PathBuf,
    /// Which image of a layout or docker archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// For which platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// What we know about an image beside its manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Meta {
    version: u32,
    /// Its id.
    pub id: ImageId,
    /// What sort it is.
    pub kind: ImageKind,
    /// Its names: those that were given at the import, else those that it came with. The first is what it is called.
    pub names: Vec<String>,
    /// What its names meant before it got them, the last first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<Before>,
    /// Its labels (`version`, `os`, `arch`, ...).
    #[serde(default)]
    pub labels: Vec<(String, String)>,
    /// When it was imported, seconds since 1970.
    pub imported_at: i64,
    /// Where it came from, for people.
    pub source: String,
    /// Who signed its archive, with which key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<Signer>,
    /// Where it can be had again, if it was a file or directory of this host: what `verify --repair` imports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Entries of its archives.
    pub entries: u64,
    /// Bytes of its files, holes counted.
    pub bytes: u64,
    /// SHA-256 of its manifest, in hex (AppC; an OCI image's id is that of its own).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest_sha256: Option<String>,
    /// Whether the tree on disk says all.
    pub on_disk: OnDisk,
    /// Its layers in `layers/`, bottom first; empty: its tree is its own `rootfs`.
    #[serde(default)]
    pub layers: Vec<ImageId>,
    /// The images below its own tree, bottom first, as its dependencies led to them (AppC).
    #[serde(default)]
    pub dependencies: Vec<ImageId>,
    /// For each of its layers, `dependencies` and then its own: the images whose pathWhitelist holds for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) filters: Vec<Vec<ImageId>>,
    /// Does a pathWhitelist hide something that lies on the disk? Then the index alone tells what is in the image.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_filtered: bool,
    /// Do layers on the disk cover directories of others that look otherwise? Then its index alone tells how those look. A record that does not say is
    /// older than this; then they may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) covers: Option<bool>,
}

/// What a name meant until an image got it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// The name.
    pub name: String,
    /// The image that it meant.
    pub image: ImageId,
    /// Until when, seconds since 1970.
    pub until: i64,
}

impl Meta {
    pub(super) fn new(id: ImageId, kind: ImageKind, source: String) -> Self {
        Meta {
            version: VERSION,
            id,
            kind,
            names: Vec::new(),
            before: Vec::new(),
            labels: Vec::new(),
            imported_at: now(),
            source,
            signed_by: None,
            origin: None,
            entries: 0,
            bytes: 0,
            manifest_sha256: None,
            on_disk: OnDisk::Exact,
            layers: Vec::new(),
            dependencies: Vec::new(),
            filters: Vec::new(),
            is_filtered: false,
            covers: None,
        }
    }

    /// What it is called: `name`, if it got that, else by its first name, else by its id.
    pub(super) fn called(&self, name: Option<&str>) -> String {
        let named = name.filter(|name| self.names.iter().any(|have| have == name));
        named.or(self.names.first().map(String::as_str)).unwrap_or(self.id.short()).to_owned()
    }

    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let stored = Stored { meta: self, check: Some(self.check()?) };
        let mut text = serde_json::to_vec_pretty(&stored).map_err(|e| Error::new(Kind::Io, "write", show(path), e))?;
        text.push(b'\n');
        write_file(path, &text, Survives::PowerLoss)
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        Self::parse(&read_bounded(path, MAX_BYTES)?, &show(path))
    }

    pub(super) fn parse(bytes: &[u8], subject: &str) -> Result<Self> {
        let refuse = |kind, why: String| Error::new(kind, "read", subject, why);
        let Stored { meta, check } =
            serde_json::from_slice::<Stored<Meta>>(bytes).map_err(|e| refuse(Kind::Invalid, e.to_string()))?;
        if meta.version != VERSION {
            let why = format!("its version is {} and this program writes {VERSION}", meta.version);
            return Err(refuse(Kind::Invalid, why));
        }
        if check.is_some_and(|check| meta.check().is_ok_and(|right| right != check)) {
            return Err(refuse(Kind::Integrity, "it is not what was written: its check sum does not hold".into()));
        }
        Ok(meta)
    }

    /// SHA-256 of what is known, in hex: a changed byte in a name would be a name still.
    fn check(&self) -> Result<String> {
        let text = serde_json::to_vec(self).map_err(|e| Error::new(Kind::Io, "write", &self.id, e))?;
        Ok(sha256_hex(&text))
    }
}

/// `meta.json` as it lies on the disk.
#[derive(Serialize, Deserialize)]
struct Stored<M> {
    #[serde(flatten)]
    meta: M,
    /// [`Meta::check`]; stores of before it have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    check: Option<String>,
}

/// Seconds since 1970.
pub(super) fn now() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

pub(super) fn sha256_hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}

/// A whole regular file, no longer than `most`.
pub(super) fn read_bounded(path: &Path, most: u64) -> Result<Vec<u8>> {
    let failed = |e| Error::io("read", show(path), e);
    // Never a FIFO or a device that somebody put there.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let file =
        std::os::unix::fs::OpenOptionsExt::custom_flags(std::fs::OpenOptions::new().read(true), flags.bits() as i32)
            .open(path)
            .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Error::new(Kind::Invalid, "read", show(path), "not a regular file"));
    }
    crate::sys::fs::read_bounded("read", show(path), file, most)
}
