//! What an archive's bytes are packed in, told by the first of them, and how they are unpacked.

use std::io::{BufRead, Read, Write};

use crate::error::{Error, Kind, Result};
use crate::store::limits::Limits;

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
pub(super) const MAGIC_BYTES: usize = 6;

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

pub(crate) fn decoder<'a>(
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

/// Fill `room`, or read to the end.
pub(super) fn fill(bytes: &mut dyn Read, room: &mut [u8]) -> std::io::Result<usize> {
    let mut count = 0;
    while count < room.len() {
        match bytes.read(&mut room[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(count)
}

/// Compresses what is written to it.
pub(crate) enum Encoder<W: Write> {
    None(W),
    Gzip(flate2::write::GzEncoder<W>),
    Zstd(zstd::stream::write::Encoder<'static, W>),
}

impl Compression {
    /// Compress into `out`, the same bytes always the same way.
    pub(crate) fn encoder<W: Write>(self, out: W) -> Result<Encoder<W>> {
        match self {
            Compression::None => Ok(Encoder::None(out)),
            Compression::Gzip => Ok(Encoder::Gzip(flate2::write::GzEncoder::new(out, flate2::Compression::default()))),
            Compression::Zstd => {
                let level = zstd::DEFAULT_COMPRESSION_LEVEL;
                let encoder = zstd::stream::write::Encoder::new(out, level);
                encoder.map(Encoder::Zstd).map_err(|e| Error::io("set up", "zstd", e))
            }
            Compression::Bzip2 | Compression::Xz => {
                Err(Error::new(Kind::Unsupported, "compress", "", "layers are compressed with gzip or zstd"))
            }
        }
    }
}

impl<W: Write> Encoder<W> {
    /// Write what is left.
    pub(crate) fn finish(self) -> Result<W> {
        match self {
            Encoder::None(out) => Ok(out),
            Encoder::Gzip(encoder) => encoder.finish().map_err(|e| Error::io("compress", "", e)),
            Encoder::Zstd(encoder) => encoder.finish().map_err(|e| Error::io("compress", "", e)),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        match self {
            Encoder::None(out) => out.write(data),
            Encoder::Gzip(encoder) => encoder.write(data),
            Encoder::Zstd(encoder) => encoder.write(data),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Encoder::None(out) => out.flush(),
            Encoder::Gzip(encoder) => encoder.flush(),
            Encoder::Zstd(encoder) => encoder.flush(),
        }
    }
}
