//! The bytes of an archive, uncompressed: a thread reads and decompresses, another hashes, the caller parses and places.
//!
//! What is hashed and what is parsed are the same chunks: the digest covers every byte that was acted on, and those after
//! the end marker too.

use std::fs::File;
use std::io::{BufRead, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sha2::digest::Output;
use sha2::{Digest, Sha512};

use super::limits::Limits;
use super::tarread::from_io;
use crate::error::{Error, Kind, Result};

/// Bytes handed over at once: big enough that handing over costs nothing beside hashing.
const CHUNK: usize = 256 << 10;
/// Chunks on the way to each taker: with both, the memory of a stream is bounded by 4 MiB.
const DEPTH: usize = 8;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

type Chunk = Arc<Vec<u8>>;

/// Where the chunks go.
pub(crate) struct Sink {
    parse: SyncSender<Result<Chunk>>,
    hash: SyncSender<Chunk>,
    pending: Vec<u8>,
    produced: u64,
}

impl Sink {
    /// False: nobody takes them any more.
    fn send(&mut self, chunk: Vec<u8>) -> bool {
        self.produced += chunk.len() as u64;
        let chunk = Arc::new(chunk);
        self.parse.send(Ok(chunk.clone())).is_ok() && self.hash.send(chunk).is_ok()
    }

    fn flush(&mut self) -> bool {
        let pending = std::mem::take(&mut self.pending);
        pending.is_empty() || self.send(pending)
    }
}

impl std::io::Write for Sink {
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

/// The taker's end.
pub(crate) struct ChunkReader {
    chunks: Receiver<Result<Chunk>>,
    current: Chunk,
    at: usize,
}

impl BufRead for ChunkReader {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        while self.at == self.current.len() {
            match self.chunks.recv() {
                Ok(Ok(chunk)) => {
                    self.current = chunk;
                    self.at = 0;
                }
                Ok(Err(error)) => return Err(std::io::Error::other(error)),
                Err(_) => break,
            }
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for ChunkReader {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let data = self.fill_buf()?;
        let count = data.len().min(out.len());
        out[..count].copy_from_slice(&data[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// Run `produce` beside `take`; gives what `take` gives, and the digest of all that was produced.
pub(crate) fn run<D: Digest, T>(
    produce: impl FnOnce(&mut Sink) -> Result<()> + Send,
    take: impl FnOnce(&mut ChunkReader) -> Result<T>,
) -> Result<(T, Output<D>)>
where
    Output<D>: Send,
{
    let (parse, chunks) = sync_channel(DEPTH);
    let (hash, to_hash) = sync_channel::<Chunk>(DEPTH);
    std::thread::scope(|scope| {
        let hasher = std::thread::Builder::new()
            .name("hash".into())
            .spawn_scoped(scope, move || {
                let mut sha = D::new();
                while let Ok(chunk) = to_hash.recv() {
                    sha.update(&*chunk);
                }
                sha.finalize()
            })
            .map_err(|e| Error::io("start thread", "hash", e))?;
        std::thread::Builder::new()
            .name("read".into())
            .spawn_scoped(scope, move || {
                let mut sink = Sink { parse, hash, pending: Vec::new(), produced: 0 };
                match produce(&mut sink) {
                    Ok(()) => drop(sink.flush()),
                    // Nobody there to tell: the taker has failed and has its own error.
                    Err(error) => drop(sink.parse.send(Err(error))),
                }
            })
            .map_err(|e| Error::io("start thread", "read", e))?;
        let mut reader = ChunkReader { chunks, current: Arc::default(), at: 0 };
        let taken = take(&mut reader);
        // The producer stops at its next chunk, the hasher after it.
        drop(reader);
        let digest = hasher.join().map_err(|_| Error::new(Kind::Io, "hash", "", "the thread panicked"))?;
        Ok((taken?, digest))
    })
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
    ) -> impl FnOnce(&mut Sink) -> Result<()> + Send + use<> {
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

fn decompress(archive: Archive, limits: &Limits, progress: Option<&ProgressFn>, sink: &mut Sink) -> Result<()> {
    let Archive { name, input, total } = archive;
    let read = Arc::new(AtomicU64::new(0));
    let mut input = Counted { input, read: read.clone() };
    let mut first = Vec::with_capacity(MAGIC_BYTES);
    (&mut input).take(MAGIC_BYTES as u64).read_to_end(&mut first).map_err(|e| Error::io("read", &name, e))?;
    let compression = Compression::of(&first);
    log::debug!("{name}: {compression:?}");
    let whole = std::io::BufReader::with_capacity(CHUNK, std::io::Cursor::new(first).chain(input));
    let mut bytes = decoder(compression, whole, limits, &name)?;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let got = (&mut *bytes).take(CHUNK as u64).read_to_end(&mut chunk);
        got.map_err(|e| match (compression, e.raw_os_error()) {
            (Compression::None, _) | (_, Some(_)) => Error::io("read", &name, e),
            _ if asks_too_much(&e) => Error::new(
                Kind::Limit,
                "decompress",
                format!("{name} ({compression:?})"),
                format!("it needs more than {} bytes of memory", limits.decoder_bytes),
            )
            .hint("[limits] decoder_bytes says how many are taken: 68157440 for `xz -9`, 134217728 for `zstd --long`"),
            _ => Error::new(Kind::Invalid, "decompress", format!("{name} ({compression:?})"), e),
        })?;
        if chunk.is_empty() {
            return Ok(());
        }
        let came = read.load(Ordering::Relaxed);
        let grown = sink.produced + chunk.len() as u64;
        check_ratio(limits, &name, came, grown)?;
        if let Some(progress) = progress {
            progress(Progress { read: came, total });
        }
        if !sink.send(chunk) {
            return Ok(());
        }
    }
}

/// Do a decoder's words say that it was refused memory?
fn asks_too_much(error: &std::io::Error) -> bool {
    let is_xz = matches!(error.get_ref().and_then(|e| e.downcast_ref()), Some(liblzma::stream::Error::MemLimit));
    // zstd's errors are text.
    is_xz || error.to_string().contains("too much memory")
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
    let name = archive.name.clone();
    let ((), digest) = run::<Sha512, _>(archive.producer(limits, None), |reader| {
        loop {
            let length = reader.fill_buf().map_err(|e| from_io(&name, e))?.len();
            if length == 0 {
                return Ok(());
            }
            reader.consume(length);
        }
    })?;
    Ok(digest.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

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
