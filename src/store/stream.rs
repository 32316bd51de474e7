//! The bytes of an archive, uncompressed: hashed here, and handed to the process that parses and places them.
//!
//! What is hashed and what is parsed are the same bytes: the digest covers every one that was acted on, and those after
//! the end marker too.

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::digest::Output;
use sha2::{Digest, Sha512};

use super::limits::Limits;
use super::tarread::from_io;
use crate::error::{Error, Kind, Result};

/// Bytes handed over at once: big enough that handing over costs nothing beside hashing.
pub(super) const CHUNK: usize = 256 << 10;
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

/// What the bytes are hidden in. Told by the first bytes, never by a file's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum Compression {
    None,
    Gzip,
    Bzip2,
    Xz,
    Zstd,
}

/// Longest magic number below.
const MAGIC_BYTES: usize = 6;

impl Compression {
    pub(crate) fn of(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Compression::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
            // A frame, or a skippable one before it (pzstd writes those).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }
}

/// Where the bytes go.
pub(crate) struct Sink<'a> {
    hash: &'a mut dyn FnMut(&[u8]),
    to: Option<File>,
    pending: Vec<u8>,
    produced: u64,
    /// Not all of it was taken: what the digest is of then, nobody knows.
    is_cut: bool,
    /// Told how many bytes were produced, now and then.
    on_way: &'a dyn Fn(u64),
    next_word: u64,
}

/// How many bytes come between two words of how many there were.
const WORD_EVERY: u64 = 32 << 20;

impl Sink<'_> {
    /// False: nobody takes them any more.
    fn send(&mut self, data: &[u8]) -> bool {
        self.produced += data.len() as u64;
        if self.produced >= self.next_word {
            self.next_word = self.produced + WORD_EVERY;
            (self.on_way)(self.produced);
        }
        // First: who takes them works meanwhile.
        self.is_cut |= self.to.as_mut().is_some_and(|to| to.write_all(data).is_err());
        if self.is_cut {
            return false;
        }
        (self.hash)(data);
        true
    }

    fn flush(&mut self) -> bool {
        let mut pending = std::mem::take(&mut self.pending);
        let is_taken = pending.is_empty() || self.send(&pending);
        pending.clear();
        self.pending = pending;
        is_taken
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let count = data.len().min(CHUNK - self.pending.len());
        self.pending.extend_from_slice(&data[..count]);
        if self.pending.len() == CHUNK && !Sink::flush(self) {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Run `produce`, whose bytes go to `to`, too; gives their digest, if `to` took every one of them: else one who takes a part could have
/// the digest of a smaller part.
pub(crate) fn pump<D: Digest>(
    produce: impl FnOnce(&mut Sink<'_>) -> Result<()>,
    to: Option<File>,
    on_way: &dyn Fn(u64),
) -> Result<Output<D>> {
    let mut sha = D::new();
    let mut hash = |data: &[u8]| sha.update(data);
    let mut sink =
        Sink { hash: &mut hash, to, pending: Vec::new(), produced: 0, is_cut: false, on_way, next_word: WORD_EVERY };
    produce(&mut sink)?;
    sink.flush();
    if sink.is_cut {
        let why = "who unpacks it stopped before its end";
        return Err(Error::new(Kind::Helper, "read archive", "", why));
    }
    Ok(sha.finalize())
}

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
    let mut chunk = Vec::with_capacity(CHUNK);
    loop {
        chunk.clear();
        (&mut *bytes).take(CHUNK as u64).read_to_end(&mut chunk).map_err(|e| from_io(&name, e))?;
        if chunk.is_empty() {
            return Ok(());
        }
        let came = read.load(Ordering::Relaxed);
        check_ratio(limits, &name, came, sink.produced + chunk.len() as u64)?;
        if let Some(progress) = progress {
            progress(Progress { read: came, total });
        }
        if !sink.send(&chunk) {
            return Ok(());
        }
    }
}

/// The plain bytes of an archive, whatever it is compressed by.
pub(super) fn plain(mut input: impl Read + Send + 'static, limits: &Limits, name: &str) -> Result<Box<dyn Read>> {
    let mut first = Vec::with_capacity(MAGIC_BYTES);
    (&mut input).take(MAGIC_BYTES as u64).read_to_end(&mut first).map_err(|e| Error::io("read", name, e))?;
    let compression = Compression::of(&first);
    log::debug!("{name}: {compression:?}");
    let whole = std::io::Cursor::new(first).chain(input);
    Ok(if compression == Compression::None {
        Box::new(whole)
    } else {
        Box::new(super::apart::decode(compression, whole, limits, name)?)
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

pub(super) fn decoder<'a>(
    compression: Compression,
    input: impl BufRead + Send + 'a,
    limits: &Limits,
    name: &str,
) -> Result<Box<dyn Read + 'a>> {
    let failed = |e: std::io::Error| Error::io("set up decompression of", name, e);
    Ok(match compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
        Compression::Xz => {
            let stream =
                liblzma::stream::Stream::new_stream_decoder(limits.decoder_bytes, liblzma::stream::CONCATENATED)
                    .map_err(|e| failed(e.into()))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream))
        }
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(failed)?;
            // The window is what a zstd stream may ask for.
            decoder.window_log_max(limits.decoder_bytes.ilog2()).map_err(failed)?;
            Box::new(decoder)
        }
    })
}

/// SHA-512 of the uncompressed bytes alone, nothing placed.
pub(crate) fn digest(archive: Archive, limits: &Limits) -> Result<[u8; 64]> {
    Ok(pump::<Sha512>(archive.producer(limits, None), None, &|_| ())?.into())
}

#[cfg(test)]
mod tests {
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
