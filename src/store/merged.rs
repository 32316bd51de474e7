//! One index of layers that lie over each other, and together are not an image of the store: what a server shows of them.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, fstat};

use super::Store;
use super::changes::Upper;
use super::layer::{add_layer, any_implied};
use super::tree::damaged;
use crate::error::{Error, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::index::{Builder, IMPLIED_LOOKS, Index, Whiteouts};
use crate::paths::image;
use crate::sys::fs::{open_beneath, open_path};

/// One of the layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stacked {
    /// One of the store's.
    Layer(ImageId),
    /// One that has this index ([`write_own_index`]).
    Other(PathBuf),
}

/// What lies below a layer.
#[derive(Debug)]
pub(crate) enum Under {
    /// A layer of the store.
    Layer(ImageId),
    /// A directory that says all by itself.
    Files(PathBuf),
}

impl Store {
    /// Does the tree of this layer cover directories of those below, topmost first, that look otherwise? See [`add_layer`].
    pub(crate) fn covers(&self, layer: &ImageId, below: &[Under]) -> Result<bool> {
        enum Look {
            Index(Index),
            Files(OwnedFd),
        }
        let index_of = |layer: &ImageId| Index::open(&self.paths.layer(layer).join(image::INDEX));
        let open = |under: &Under| match under {
            Under::Layer(layer) => index_of(layer).map(Look::Index),
            Under::Files(path) => {
                open_path(path).map(Look::Files).map_err(|e| Error::sys("look below layer", show(path), e))
            }
        };
        let mut looks: Option<Vec<Look>> = None;
        any_implied(&index_of(layer)?, |path| {
            let looks = match &mut looks {
                Some(looks) => looks,
                none => none.insert(below.iter().map(open).collect::<Result<_>>()?),
            };
            for look in looks {
                let found = match look {
                    Look::Index(index) => {
                        let inode = index.find(path).map_err(damaged)?;
                        if inode.is_some_and(|inode| inode.is_implied) {
                            continue;
                        }
                        inode.map(|inode| (inode.mode, inode.uid, inode.gid))
                    }
                    Look::Files(root) => {
                        let at = Path::new(if path.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(path) });
                        let found = open_beneath(&*root, at, OFlags::PATH | OFlags::NOFOLLOW).and_then(fstat);
                        found.ok().map(|stat| (stat.st_mode, stat.st_uid, stat.st_gid))
                    }
                };
                // Anything else than a directory is covered whole.
                if let Some((mode, uid, gid)) = found {
                    return Ok(FileType::from_raw_mode(mode) == FileType::Directory
                        && (mode & 0o7777, uid, gid) != IMPLIED_LOOKS);
                }
            }
            Ok(false)
        })
    }

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
