//! What a layer takes away from those below it: whiteouts, opaque directories, and AppC's pathWhitelist.

use super::build::{Builder, HIDDEN_HELD};
use super::entry::{LayerNumber, WHITEOUT_PREFIX, components, refuse};
use super::format::NONE;
use super::paged::Table;
use super::rows::{Hidden, Node, ROOT_ROW, Row};
use crate::error::{Kind, Result};

/// The name that makes its directory opaque.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS keeps its own files below such names (`.wh..wh.plnk`, `.wh..wh.aufs`); old docker layers have them. They hide nothing.
const AUFS_META: &[u8] = b".wh..wh.";

impl Builder {
    /// Note a whiteout for the end of the layer.
    pub(super) fn hide(&mut self, path: &[u8], parent: &[u8], name: &[u8]) -> Result<()> {
        let what = if name == OPAQUE {
            &[][..]
        } else if name.starts_with(AUFS_META) {
            return Ok(());
        } else {
            match &name[WHITEOUT_PREFIX.len()..] {
                b"" | b"." | b".." => return Err(refuse(Kind::Invalid, path, "it is a whiteout of no name")),
                hidden => hidden,
            }
        };
        let directory = self.make_directory(parent)?;
        let at = self.strings.add(what)?;
        self.hidden.push(&Hidden { directory, length: what.len() as u32, at })?;
        Ok(())
    }

    /// Apply the whiteouts of the layer at hand.
    pub(super) fn end_layer(&mut self) -> Result<()> {
        self.find_lost()?;
        self.at_hand = None;
        let layer = self.layer();
        let dir = self.hidden.dir().to_owned();
        let mut hidden = std::mem::replace(&mut self.hidden, Table::new(&dir, HIDDEN_HELD));
        let mut name = Vec::new();
        for row in 0..hidden.len() {
            let Hidden { directory, length, at } = hidden.get(row)?;
            if length > 0 {
                name.clear();
                self.strings.read(at, length as usize, &mut name)?;
                // An entry that came after the whiteout may have replaced its directory; then nothing of the lower is left.
                if let Some((at, _)) = self.child(directory, &name)? {
                    self.hide_lower(at, layer)?;
                }
            } else if self.inodes.get(directory)?.is_directory() {
                self.hide_below(directory, layer)?;
            }
        }
        Ok(())
    }

    /// Remove from a directory what it has from layers below `layer`. True: nothing is left in it.
    fn hide_below(&mut self, directory: Row, layer: LayerNumber) -> Result<bool> {
        let mut at = self.inodes.get(directory)?.first;
        let mut empty = true;
        while at != NONE {
            let name = self.names.get(at)?;
            if name.is_live() {
                empty &= self.hide_lower(at, layer)?;
            }
            at = name.next;
        }
        Ok(empty)
    }

    /// Remove what a name has from layers below `layer`. True: nothing is left of it.
    fn hide_lower(&mut self, at: u32, layer: LayerNumber) -> Result<bool> {
        let mut name = self.names.get(at)?;
        let empty = !name.is_directory() || self.hide_below(name.inode, layer)?;
        if name.layer == layer {
            return Ok(false);
        }
        if empty {
            name.kill();
        } else {
            // The layer has entries below a directory that it hides and does not bring itself: the directory is implied.
            self.inodes.change(name.inode, Node::imply)?;
            name.layer = layer;
        }
        self.names.set(at, &name)?;
        Ok(empty)
    }

    /// Keep only these paths (absolute or relative to the root, as a manifest has them) and the directories that lead to
    /// them: AppC's pathWhitelist. A directory that is listed is kept without what is in it, unless that is listed too.
    /// An empty list keeps everything. What is listed and not there is no error.
    pub fn keep_only<'a>(&mut self, paths: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
        self.end_layer()?;
        let mut listed = false;
        for path in paths {
            listed = true;
            let mut row = ROOT_ROW;
            let mut trail = Vec::new();
            for name in components(path) {
                if matches!(name, b"." | b"..") {
                    return Err(refuse(Kind::Invalid, path, "a whitelisted path has a component . or .."));
                }
                let Some((at, link)) = self.child(row, name)? else {
                    trail.clear();
                    break;
                };
                row = link.inode;
                trail.push(at);
            }
            // Names, not inodes, are listed: of two hard links one may be kept and the other not.
            for at in trail {
                self.names.change(at, |name| {
                    name.keep(true);
                })?;
            }
        }
        if !listed {
            return Ok(());
        }
        self.at_hand = None;
        for at in 0..self.names.len() {
            self.names.change(at, |name| {
                if !name.keep(false) {
                    name.kill();
                }
            })?;
        }
        Ok(())
    }
}
