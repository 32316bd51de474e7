//! What an archive's bytes are packed in, told by the first of them, and how they are unpacked.

use std::io::{BufRead, Read};

use crate::error::{Error, Result};
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
