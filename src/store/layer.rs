//! The shared layers of the store: what is known of one, and whether it is there.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Store;
use super::archive::unpack::Placed;
use super::archive::whiteout::LayerWhiteouts;
use super::meta::{OnDisk, read_bounded};
use super::tree::damaged;
use crate::error::{Error, Kind, Result, show};
use crate::id::ImageId;
use crate::index::{Builder, Index, Whiteouts};
use crate::paths::image;
use crate::sys::durable::{Survives, write_file};

/// Longest record read: it has a line for each directory that no entry spoke of.
const MAX_BYTES: u64 = 64 << 20;
const VERSION: u32 = 1;

/// What is known of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LayerMeta {
    version: u32,
    pub(super) entries: u64,
    pub(super) bytes: u64,
    pub(super) on_disk: OnDisk,
    pub(super) whiteouts: LayerWhiteouts,
    /// Directories that no entry spoke of, in hex: merged, they leave the lower layer's attributes as they are. Records of before
    /// have it; now the layer's index says it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    implied: Vec<String>,
}

impl LayerMeta {
    pub(super) fn new(placed: &Placed, whiteouts: LayerWhiteouts) -> Self {
        LayerMeta {
            version: VERSION,
            entries: placed.entries,
            bytes: placed.bytes,
            on_disk: if placed.is_exact() { OnDisk::Exact } else { OnDisk::IndexOnly },
            whiteouts,
            implied: Vec::new(),
        }
    }

    pub(super) fn implied(&self) -> Result<HashSet<Vec<u8>>> {
        let decode = |text: &String| data_encoding::HEXLOWER.decode(text.as_bytes());
        let paths: std::result::Result<_, _> = self.implied.iter().map(decode).collect();
        paths.map_err(|e| Error::new(Kind::Integrity, "read", "layer record", e))
    }

    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(image::META);
        let refuse = |why: String| Error::new(Kind::Integrity, "read", show(&path), why);
        let meta: LayerMeta =
            serde_json::from_slice(&read_bounded(&path, MAX_BYTES)?).map_err(|e| refuse(e.to_string()))?;
        if meta.version == VERSION { Ok(meta) } else { Err(refuse(format!("its version is {}", meta.version))) }
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(image::META);
        let text = serde_json::to_vec(self).map_err(|e| Error::new(Kind::Io, "write", show(&path), e))?;
        // Brought to the disk with the rest of the layer, before it is published.
        write_file(&path, &text, Survives::Crash)
    }
}

/// Put the index of the layer in the directory `at` upon what is in the index of an image. Gives what is known of the layer, and whether its tree on the
/// disk covers directories of those below that look otherwise: it has them for what it brings in them, and says nothing of them itself.
pub(super) fn add_layer(index: &mut Builder, at: &Path) -> Result<(LayerMeta, bool)> {
    let meta = LayerMeta::read(at)?;
    index.begin_layer(Whiteouts::Oci)?;
    let implied = meta.implied()?;
    let own = Index::open(&at.join(image::INDEX))?;
    let mut covers = any_implied(&own, |path| index.stands_out(path))?;
    for path in &implied {
        covers = covers || index.stands_out(path)?;
    }
    index.add_index(&own, |path, inode| !inode.is_implied && (implied.is_empty() || !implied.contains(path)))?;
    Ok((meta, covers))
}

/// Does this hold for one of the directories that no entry speaks of?
pub(super) fn any_implied(index: &Index, mut holds: impl FnMut(&[u8]) -> Result<bool>) -> Result<bool> {
    let mut path = Vec::new();
    for row in 0..index.inode_count() {
        let inode = index.inode(row).map_err(damaged)?;
        if inode.is_implied {
            index.home_path(&inode, &mut path).map_err(damaged)?;
            if holds(&path)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

impl Store {
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
