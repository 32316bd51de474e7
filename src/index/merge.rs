//! What a layer takes away from those below it: whiteouts, opaque directories, and AppC's pathWhitelist.

use std::collections::HashSet;

use super::LayerNumber;
use super::build::{Body, Builder, IMPLIED, ROOT_ROW, Row, components, refuse};
use crate::error::{Kind, Result};

/// A name that begins so hides another (image-spec, layer.md, "Whiteouts").
pub(super) const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// The name that makes its directory opaque.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS keeps its own files below such names (`.wh..wh.plnk`, `.wh..wh.aufs`); old docker layers have them. They hide nothing.
const AUFS_META: &[u8] = b".wh..wh.";

impl Builder {
    /// Note a whiteout for the end of the layer.
    pub(super) fn hide(&mut self, path: &[u8], parent: &[u8], name: &[u8]) -> Result<()> {
        let what = if name == OPAQUE {
            None
        } else if name.starts_with(AUFS_META) {
            return Ok(());
        } else {
            match &name[WHITEOUT_PREFIX.len()..] {
                b"" | b"." | b".." => return Err(refuse(Kind::Invalid, path, "it is a whiteout of no name")),
                hidden => Some(hidden.into()),
            }
        };
        let parent = self.make_directory(parent)?;
        self.hidden.push((parent, what));
        Ok(())
    }

    /// Apply the whiteouts of the layer at hand.
    pub(super) fn end_layer(&mut self) {
        let layer = self.layer();
        for (directory, name) in std::mem::take(&mut self.hidden) {
            // An entry that came after the whiteout may have replaced its directory; then nothing of the lower is left.
            let Some(children) = self.children(directory) else { continue };
            let names: Vec<Box<[u8]>> = match name {
                Some(name) => vec![name],
                None => children.keys().cloned().collect(),
            };
            for name in names {
                self.hide_lower(directory, &name, layer);
            }
        }
    }

    /// Remove from `directory` what `name` has from layers below `layer`. True: nothing is left of it.
    fn hide_lower(&mut self, directory: Row, name: &[u8], layer: LayerNumber) -> bool {
        let Some(link) = self.children(directory).and_then(|c| c.get(name)).copied() else { return true };
        let mut empty = true;
        if let Some(children) = self.children(link.inode) {
            let names: Vec<Box<[u8]>> = children.keys().cloned().collect();
            for name in names {
                empty &= self.hide_lower(link.inode, &name, layer);
            }
        }
        if link.layer == layer {
            return false;
        }
        if empty {
            self.children_mut(directory).remove(name);
            return true;
        }
        // The layer has entries below a directory that it hides and does not bring itself: the directory is implied.
        self.inodes[link.inode as usize].attributes = IMPLIED;
        if let Some(link) = self.children_mut(directory).get_mut(name) {
            link.layer = layer;
        }
        false
    }

    /// Keep only these paths (absolute or relative to the root, as a manifest has them) and the directories that lead to
    /// them: AppC's pathWhitelist. A directory that is listed is kept without what is in it, unless that is listed too.
    /// An empty list keeps everything. What is listed and not there is no error.
    pub fn keep_only<'a>(&mut self, paths: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
        self.end_layer();
        let mut keep = HashSet::new();
        let mut listed = false;
        for path in paths {
            listed = true;
            let mut row = ROOT_ROW;
            let mut trail = vec![row];
            let mut found = true;
            for name in components(path) {
                if matches!(name, b"." | b"..") {
                    return Err(refuse(Kind::Invalid, path, "a whitelisted path has a component . or .."));
                }
                let Some(link) = self.children(row).and_then(|c| c.get(name)) else {
                    found = false;
                    break;
                };
                row = link.inode;
                trail.push(row);
            }
            if found {
                // Names, not inodes, are listed: of two hard links one may be kept and the other not.
                let mut parent = ROOT_ROW;
                for (name, row) in components(path).zip(&trail[1..]) {
                    keep.insert((parent, Box::<[u8]>::from(name)));
                    parent = *row;
                }
            }
        }
        if !listed {
            return Ok(());
        }
        for row in 0..self.inodes.len() {
            if let Body::Directory(children) = &mut self.inodes[row].body {
                children.retain(|name, _| keep.contains(&(row as Row, name.clone())));
            }
        }
        Ok(())
    }
}
