//! One index of layers that lie over each other, and together are not an image of the store: what a server shows of them.

use std::path::{Path, PathBuf};

use super::Store;
use super::changes::Upper;
use super::layer::add_layer;
use crate::error::{Error, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::index::{Builder, Index, Whiteouts};
use crate::paths::image;

/// One of the layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stacked {
    /// One of the store's.
    Layer(ImageId),
    /// One that has this index ([`write_own_index`]).
    Other(PathBuf),
}

impl Store {
    /// Write the index of these, bottom first, to `to`: whole or not at all. It is not brought to the disk: after a power loss it is written again.
    pub(crate) fn write_merged_index(&self, stack: &[Stacked], to: &Path) -> Result<()> {
        if self.link_index_of_image(stack, to)? {
            return Ok(());
        }
        let mut index = Builder::in_dir(directory_of(to));
        for one in stack {
            match one {
                Stacked::Layer(id) => {
                    add_layer(&mut index, &self.paths.layer(id))
                        .map_err(|e| e.within("merge the index of", format!("layer {}", id.short())))?;
                }
                Stacked::Other(path) => {
                    index.begin_layer(Whiteouts::Oci)?;
                    index.add_index(&Index::open(path)?, |_, inode| !inode.is_implied)?;
                }
            }
        }
        write(index, to)
    }

    /// An image of just these layers has it already.
    fn link_index_of_image(&self, stack: &[Stacked], to: &Path) -> Result<bool> {
        let layers: Option<Vec<&ImageId>> = stack
            .iter()
            .map(|one| match one {
                Stacked::Layer(id) => Some(id),
                Stacked::Other(_) => None,
            })
            .collect();
        let Some(layers) = layers else { return Ok(false) };
        let _in_use = self.lock_shared()?;
        let Some(meta) = self.list()?.into_iter().find(|meta| meta.layers.iter().eq(layers.iter().copied())) else {
            return Ok(false);
        };
        let from = self.paths.image(&meta.id).join(image::INDEX);
        if Index::open(&from).is_err() {
            return Ok(false);
        }
        match std::fs::hard_link(&from, to) {
            Ok(()) => Ok(true),
            Err(e) => {
                // Another file system, or one without links: it is merged again.
                log::debug!("link {} to {}: {e}", show(&from), show(to));
                Ok(false)
            }
        }
    }
}

/// Write the index of an upper directory that does not change any more.
pub(crate) fn write_own_index(upper: &Upper, to: &Path) -> Result<()> {
    let mut index = Builder::in_dir(directory_of(to));
    upper.write_index(&mut index)?;
    write(index, to)
}

fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

fn write(index: Builder, to: &Path) -> Result<()> {
    let fail = |e| Error::io("write index", show(to), e);
    let file = tempfile::NamedTempFile::with_prefix_in(".index-", directory_of(to)).map_err(fail)?;
    fault::point("merged.write")?;
    let mut out = std::io::BufWriter::with_capacity(64 << 10, file);
    index.finish_into(&mut out).map_err(|e| e.within("write index", show(to)))?;
    let file = out.into_inner().map_err(|e| fail(e.into_error()))?;
    fault::point("merged.rename")?;
    file.persist(to).map(drop).map_err(|e| fail(e.error))
}
