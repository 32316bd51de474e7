//! An archive where it lies: opened, read with word of how far that is, and uncompressed by the decoder.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::apart;
use super::compression::{Compression, MAGIC_BYTES, fill};
use super::digest::Sha512;
use super::read::from_io;
use super::ring::Ring;
use super::stream::{Sink, pump};
use crate::error::{Error, Kind, Result};
use crate::store::limits::Limits;

/// How far an import has come: bytes read of the source, and how many there are where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes read so far, as they lie in the source.
    pub read: u64,
    /// All of them.
    pub total: Option<u64>,
}

/// Told of progress, from another thread, some times a second.
pub type ProgressFn = Arc<dyn Fn(Progress) + Send + Sync>;

/// An archive: where its bytes come from and what it is called in messages.
pub(crate) struct Archive {
    pub(crate) name: String,
    pub(crate) input: Box<dyn Read + Send>,
    pub(crate) total: Option<u64>,
}

impl Archive {
    /// Open a file (or FIFO) that is an archive.
    pub(crate) fn open(path: &PathBuf) -> Result<Self> {
        let name = crate::error::show(path);
        let file = File::open(path).map_err(|e| Error::io("open archive", &name, e))?;
        let meta = file.metadata().map_err(|e| Error::io("open archive", &name, e))?;
        if meta.is_dir() {
            return Err(Error::new(Kind::Usage, "open archive", name, "it is a directory"));
        }
        let total = meta.is_file().then_some(meta.len());
        Ok(Archive { name, input: Box::new(file), total })
    }

    /// The producer of its uncompressed bytes.
    pub(crate) fn producer(
        self,
        limits: &Limits,
        progress: Option<ProgressFn>,
    ) -> impl FnOnce(&mut Sink<'_>) -> Result<()> + Send + use<> {
        let limits = limits.clone();
        move |sink| decompress(self, &limits, progress.as_ref(), sink)
    }
}

struct Counted {
    input: Box<dyn Read + Send>,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.input.read(out)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

fn decompress(archive: Archive, limits: &Limits, progress: Option<&ProgressFn>, sink: &mut Sink<'_>) -> Result<()> {
    let Archive { name, input, total } = archive;
    let read = Arc::new(AtomicU64::new(0));
    let input = Counted { input, read: read.clone() };
    let mut bytes = plain(input, limits, &name)?;
    loop {
        let Some(room) = sink.room() else { return Ok(()) };
        let count = fill(&mut *bytes, room).map_err(|e| from_io(&name, e))?;
        if count == 0 {
            return Ok(());
        }
        let came = read.load(Ordering::Relaxed);
        check_ratio(limits, &name, came, sink.produced + count as u64)?;
        if let Some(progress) = progress {
            progress(Progress { read: came, total });
        }
        if !sink.add(count) {
            return Ok(());
        }
    }
}

/// The plain bytes of an archive, whatever it is compressed by.
pub(in crate::store) fn plain(
    mut input: impl Read + Send + 'static,
    limits: &Limits,
    name: &str,
) -> Result<Box<dyn Read>> {
    let mut first = Vec::with_capacity(MAGIC_BYTES);
    (&mut input).take(MAGIC_BYTES as u64).read_to_end(&mut first).map_err(|e| Error::io("read", name, e))?;
    let compression = Compression::of(&first);
    log::debug!("{name}: {compression:?}");
    let whole = std::io::Cursor::new(first).chain(input);
    Ok(if compression == Compression::None {
        Box::new(whole)
    } else {
        Box::new(apart::decode(compression, whole, limits, name)?)
    })
}

/// Has an archive of `came` bytes grown to more than it may?
pub(crate) fn check_ratio(limits: &Limits, name: &str, came: u64, grown: u64) -> Result<()> {
    if grown > limits.ratio_floor && grown / limits.ratio > came {
        return Err(Error::new(
            Kind::Limit,
            "read",
            name,
            format!("its first {came} bytes grow to more than {grown}, over {} for one", limits.ratio),
        ));
    }
    Ok(())
}

/// SHA-512 of the uncompressed bytes alone, nothing placed.
pub(crate) fn digest(archive: Archive, limits: &Limits) -> Result<[u8; 64]> {
    Ok(pump::<Sha512>(archive.producer(limits, None), Ring::alone()?, &|_| ())?.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use sha2::Digest as _;

    use super::*;

    fn archive(bytes: Vec<u8>) -> Archive {
        Archive { name: "test".into(), input: Box::new(std::io::Cursor::new(bytes)), total: None }
    }

    #[test]
    fn every_compression_is_told_by_its_bytes_and_gives_the_same_digest() {
        let plain: Vec<u8> = (0..700_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let want = <[u8; 64]>::from(Sha512::digest(&plain));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bzip2.write_all(&plain).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 0);
        xz.write_all(&plain).unwrap();
        let cases = [
            (Compression::None, plain.clone()),
            (Compression::Gzip, gzip.finish().unwrap()),
            (Compression::Bzip2, bzip2.finish().unwrap()),
            (Compression::Xz, xz.finish().unwrap()),
            (Compression::Zstd, zstd::encode_all(&plain[..], 1).unwrap()),
        ];
        for (compression, bytes) in cases {
            assert_eq!(Compression::of(&bytes), compression);
            assert_eq!(digest(archive(bytes.clone()), &Limits::default()).unwrap(), want, "{compression:?}");
            if compression != Compression::None {
                let cut = bytes[..bytes.len() - 5].to_vec();
                let error = digest(archive(cut), &Limits::default()).unwrap_err();
                assert_eq!(error.kind(), Kind::Invalid, "{compression:?}: {error}");
            }
        }
    }

    #[test]
    fn a_bomb_is_refused() {
        let limits = Limits { ratio_floor: 1 << 20, ratio: 100, ..Limits::default() };
        let bomb = zstd::encode_all(&vec![0; 8 << 20][..], 1).unwrap();
        assert_eq!(digest(archive(bomb), &limits).unwrap_err().kind(), Kind::Limit);
        digest(archive(vec![0; 8 << 20]), &limits).unwrap();
    }
}
