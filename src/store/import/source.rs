//! Where an image comes from, how it is imported, and what came of it.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result, show};
use crate::id::ImageId;
use crate::image::Strictness;
use crate::image::oci::Platform;
use crate::store::archive::input::ProgressFn;
use crate::store::limits::Limits;
use crate::store::meta::{OnDisk, Origin};
use crate::store::names::Held;
use crate::store::signed::Signature;

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
    /// The tree of another image of the store ([`Store::flatten`](crate::store::Store::flatten)).
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

/// What it can be imported from again: a file or directory of this host.
pub(super) fn origin(source: &ImageSource, options: &ImportOptions) -> Option<Origin> {
    let (ImageSource::Archive(path) | ImageSource::Directory(path)) = source else { return None };
    // A FIFO gives its bytes once.
    let path = std::fs::canonicalize(path).ok().filter(|path| path.is_file() || path.is_dir())?;
    Some(Origin { path, reference: options.reference.clone(), platform: options.platform.clone() })
}
