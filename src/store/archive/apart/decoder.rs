//! The decoder: compressed bytes in, plain ones out. Decoders in C are among them.

use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

use super::super::compression::{Compression, decoder, fill};
use super::super::ring::{Copied, Ring, pipe};
use super::{Apart, Handed, Order};
use crate::error::{Error, Kind, Result};
use crate::store::limits::Limits;
use crate::sys::process::not_started;

/// What a decoder is told. With it go the pipe to read from and the ring to write to.
#[derive(Serialize, Deserialize)]
pub(super) struct Job {
    compression: Compression,
    limits: Limits,
    /// What the archive is called in messages.
    name: String,
}

/// How many bytes come between two raises of the limit of processor time.
const RAISE_EVERY: u64 = 32 << 20;
/// What is read at once of the archive: more would be fetched of a bomb before it is known to be one.
const FEED: usize = 64 << 10;

/// The plain bytes of `input`.
pub(in crate::store) fn decode(
    compression: Compression,
    input: impl Read + Send + 'static,
    limits: &Limits,
    name: &str,
) -> Result<Decoded> {
    let (compressed, feed_to) = pipe()?;
    let (plain, [lengths, memory, freed]) = Copied::from_decoder()?;
    let job = Job { compression, limits: limits.clone(), name: name.to_owned() };
    let apart = Apart::start(
        Order::Decode(job),
        super::memory_to_decode(limits),
        &super::borrow(&[compressed, lengths, memory, freed]),
    )?;
    let feeder = std::thread::Builder::new()
        .name("feed".into())
        .spawn(move || feed(input, feed_to))
        .map_err(|e| not_started("start thread", "feed", e))?;
    Ok(Decoded { plain, apart, feeder: Some(feeder), given: 0, next_raise: RAISE_EVERY })
}

/// Hand all of `input` to the decoder, as long as that takes it.
fn feed(mut input: impl Read, to: OwnedFd) -> std::io::Result<()> {
    let mut to = File::from(to);
    let mut buffer = vec![0; FEED];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            // It has what it wants, or has failed and tells.
            Ok(count) if to.write_all(&buffer[..count]).is_err() => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Plain bytes, as the decoder gives them.
pub(in crate::store) struct Decoded {
    plain: Copied,
    apart: Apart,
    feeder: Option<JoinHandle<std::io::Result<()>>>,
    given: u64,
    next_raise: u64,
}

impl Decoded {
    /// All was read: did the archive, too, come to its end?
    fn end(&mut self) -> std::io::Result<()> {
        let Some(feeder) = self.feeder.take() else { return Ok(()) };
        // An archive that could not be read is what the decoder would call cut off.
        feeder.join().unwrap_or_else(|_| Err(std::io::Error::other("the thread that reads panicked")))?;
        self.apart.report().map(drop).map_err(std::io::Error::other)
    }
}

impl Read for Decoded {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.plain.read(out)?;
        self.given += count as u64;
        if self.given >= self.next_raise {
            self.next_raise = self.given + RAISE_EVERY;
            self.apart.allow_time(self.given);
        }
        if count == 0 && !out.is_empty() {
            self.end()?;
        }
        Ok(count)
    }
}

pub(super) fn work(job: &Job, fds: Vec<OwnedFd>) -> Result<()> {
    let mut fds = Handed(fds.into_iter());
    let (input, mut out) = (fds.file()?, Ring::take(fds.ring()?)?);
    let Job { compression, limits, name } = job;
    let mut bytes = decoder(*compression, std::io::BufReader::with_capacity(FEED, input), limits, name)?;
    // Each slot to its end: a decoder gives a block or less at a time, and a ring of those holds little.
    out.fill(|slot| {
        fill(&mut *bytes, slot).map_err(|e| match e.raw_os_error() {
            Some(_) => Error::io("read", name, e),
            None if asks_too_much(&e) => Error::new(
                Kind::Limit,
                "decompress",
                format!("{name} ({compression:?})"),
                format!("it needs more than {} bytes of memory", limits.decoder_bytes),
            )
            .hint("[limits] decoder_bytes says how many are taken: 68157440 for `xz -9`, 134217728 for `zstd --long`"),
            None => Error::new(Kind::Invalid, "decompress", format!("{name} ({compression:?})"), e),
        })
    })
}

/// Do a decoder's words say that it was refused memory?
fn asks_too_much(error: &std::io::Error) -> bool {
    let is_xz = matches!(error.get_ref().and_then(|e| e.downcast_ref()), Some(liblzma::stream::Error::MemLimit));
    // zstd's errors are text.
    is_xz || error.to_string().contains("too much memory")
}
