//! What the unpacker is told, what it says, and what it works with.

use std::fs::File;
use std::io::{BufRead, BufWriter, Read};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::ring::Mapped;
use super::super::unpack::{Again, Placed, Placer};
use super::super::whiteout::LayerWhiteouts;
use super::{End, Handed, OP};
use crate::child::channel::Channel;
use crate::error::{Error, Kind, Result};
use crate::index::{Builder, Whiteouts};
use crate::paths::image;
use crate::store::limits::Limits;

/// What is to be made of an archive.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::store) enum Task {
    /// An AppC image, or a root filesystem by itself where a name is given; what turns out to be a layout is placed to be read.
    Image {
        /// The name for an image without a manifest.
        name: Option<String>,
    },
    /// A layer of an OCI image.
    Layer,
    /// Its manifest alone; nothing is placed.
    Manifest,
}

/// What an unpacker is told. With it go the ring to read from (three descriptors) and the file for the manifest; and, where something is placed, the directories for
/// the tree and for what is too much for memory, the file for the index, and the one for opaque directories.
#[derive(Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) task: Task,
    /// What the archive is called in messages.
    pub(super) name: String,
    pub(super) limits: Limits,
    /// Opaque directories are written down: the attribute is for this process to set.
    pub(super) lists_opaque: bool,
    /// Made by root: owners and devices are set as they are.
    pub(super) as_root: bool,
}

impl Job {
    /// Directories that may lie above one another.
    pub(super) fn depth(&self) -> u64 {
        self.limits.depth as u64
    }
}

/// What an archive held.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(in crate::store) struct Unpacked {
    /// It is an OCI layout or a docker archive: its files lie where the tree would.
    pub(in crate::store) is_layout: bool,
    pub(in crate::store) placed: Placed,
    pub(in crate::store) whiteouts: LayerWhiteouts,
    pub(super) manifest_length: u64,
    /// Read by who started the unpacker.
    #[serde(skip)]
    pub(in crate::store) manifest: Vec<u8>,
}

/// The bytes of the archive, and at their end the word whether those were all.
pub(super) struct Bytes<'a> {
    ring: Mapped,
    channel: &'a Channel,
    at: usize,
    ended: bool,
}

impl<'a> Bytes<'a> {
    pub(super) fn take(fds: &mut Handed, channel: &'a Channel) -> Result<Self> {
        let ring = Mapped::new(fds.ring()?)?;
        Ok(Bytes { ring, channel, at: 0, ended: false })
    }
}

impl BufRead for Bytes<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        if self.at == self.ring.bytes().len() && !self.ended {
            self.at = 0;
            self.ended = !self.ring.next()?;
            if self.ended {
                match self.channel.receive::<End>().map_err(std::io::Error::other)? {
                    Some((End::Whole, _)) => {}
                    Some((End::Cut(told), _)) => return Err(std::io::Error::other(Error::from(told))),
                    None => {
                        let gone = Error::new(Kind::Helper, OP, "", "the process that reads it is gone");
                        return Err(std::io::Error::other(gone));
                    }
                }
            }
        }
        Ok(&self.ring.bytes()[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for Bytes<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let data = self.fill_buf()?;
        let count = data.len().min(out.len());
        out[..count].copy_from_slice(&data[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// An index with one layer begun, of which what is too much for memory goes to `dir`.
pub(in crate::store) fn one_layer(dir: &Path) -> Result<Builder> {
    let mut index = Builder::in_dir(dir);
    index.begin_layer(Whiteouts::Plain)?;
    Ok(index)
}

/// What is worked with where something is placed.
pub(super) struct Tools {
    pub(super) root: OwnedFd,
    /// Leads to the directory for what is too much for memory, by its descriptor.
    spill: PathBuf,
    _spill: OwnedFd,
    index: File,
    pub(super) opaque: File,
}

impl Tools {
    pub(super) fn take(fds: &mut Handed) -> Result<Self> {
        let root = fds.next()?;
        let spill = fds.next()?;
        let at = PathBuf::from(format!("/proc/self/fd/{}", spill.as_raw_fd()));
        Ok(Tools { root, spill: at, _spill: spill, index: fds.file()?, opaque: fds.file()? })
    }

    pub(super) fn placer(&self, job: &Job, again: Again) -> Result<Placer> {
        let root = self.root.try_clone().map_err(|e| Error::io("duplicate descriptor", "", e))?;
        Ok(Placer::new(root, job.limits.clone(), again, one_layer(&self.spill)?, job.as_root))
    }

    pub(super) fn write_index(self, index: Builder) -> Result<()> {
        let mut out = BufWriter::with_capacity(64 << 10, self.index);
        index.finish_into(&mut out).map_err(|e| e.within("write", image::INDEX))
    }
}
