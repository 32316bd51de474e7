//! Images from the network: OCI registries ([`pull`]) and AppC discovery ([`fetch`]). Must not know backends.
//!
//! What comes is put down below the store's `cache/download/`, checked, and imported from there as any other image is. All waits
//! are in threads of the caller's; nothing of this runs when a rootfs is mounted.

mod appc;
mod auth;
mod http;
mod reference;
mod registry;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

pub use crate::image::discovery::Wanted;
pub use appc::fetch;
pub use http::HostConfig;
pub use reference::Reference;
pub use registry::pull;

use crate::image::Strictness;
use crate::image::oci::Platform;
use crate::store::{Limits, ProgressFn};

/// Blobs of one image fetched at the same time, unless the configuration says otherwise: more gain little on one line, and
/// registries count them.
pub const PARALLEL_DOWNLOADS: usize = 4;

/// How far one part of a download has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// Which part: a digest, or a URL.
    pub name: &'a str,
    /// Bytes that are here.
    pub read: u64,
    /// All of them, where that is known.
    pub total: Option<u64>,
}

/// Told of the parts of a download, from several threads, often.
pub type PartFn = Arc<dyn Fn(Part<'_>) + Send + Sync>;

/// How to get an image.
#[derive(Clone, Default)]
pub struct Options {
    /// For which platform; this host's otherwise.
    pub platform: Option<Platform>,
    /// What the image may ask for.
    pub limits: Limits,
    /// How strictly an AppC manifest is read.
    pub strictness: Strictness,
    /// Most blobs at the same time; 0 is [`PARALLEL_DOWNLOADS`].
    pub parallel: usize,
    /// How hosts are spoken to.
    pub hosts: BTreeMap<String, HostConfig>,
    /// The file of logins; `None`: where podman and docker keep theirs.
    pub auth_file: Option<PathBuf>,
    /// What simple discovery puts before a name; empty: `https://`.
    pub discovery_prefixes: Vec<String>,
    /// Told of the download.
    pub parts: Option<PartFn>,
    /// Told of the import that follows.
    pub progress: Option<ProgressFn>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("platform", &self.platform).field("hosts", &self.hosts).finish_non_exhaustive()
    }
}
