//! The bytes of an archive, uncompressed: hashed here, and handed to the process that parses and places them.
//!
//! What is hashed and what is parsed are the same bytes: the digest covers every one that was acted on, and those after
//! the end marker too.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use sha2::Digest;
use sha2::digest::Output;

use crate::error::{Error, Kind, Result};

/// Bytes handed over at once: big enough that handing over costs nothing beside hashing.
pub(super) const CHUNK: usize = 256 << 10;
/// How many wait to be hashed at most, which takes longest: a thread does nothing else.
const WAITING: usize = 4;

/// Where the bytes go.
pub(crate) struct Sink<'a> {
    to_hash: SyncSender<Vec<u8>>,
    /// What was hashed, to be filled again.
    hashed: Receiver<Vec<u8>>,
    to: Option<File>,
    pending: Vec<u8>,
    pub(super) produced: u64,
    /// Not all of it was taken: what the digest is of then, nobody knows.
    is_cut: bool,
    /// Told how many bytes were produced, now and then.
    on_way: &'a dyn Fn(u64),
    next_word: u64,
}

/// How many bytes come between two words of how many there were.
const WORD_EVERY: u64 = 32 << 20;

impl Sink<'_> {
    /// Takes what is in `chunk` and leaves it empty. False: nobody takes any more.
    pub(super) fn send(&mut self, chunk: &mut Vec<u8>) -> bool {
        self.produced += chunk.len() as u64;
        if self.produced >= self.next_word {
            self.next_word = self.produced + WORD_EVERY;
            (self.on_way)(self.produced);
        }
        // First: who takes them works meanwhile.
        self.is_cut |= self.to.as_mut().is_some_and(|to| to.write_all(chunk).is_err());
        if self.is_cut {
            return false;
        }
        let mut empty = self.hashed.try_recv().unwrap_or_else(|_| Vec::with_capacity(CHUNK));
        empty.clear();
        // An error: the thread panicked, which is told where it is joined.
        self.to_hash.send(std::mem::replace(chunk, empty)).is_ok()
    }

    fn flush(&mut self) -> bool {
        let mut pending = std::mem::take(&mut self.pending);
        let is_taken = pending.is_empty() || self.send(&mut pending);
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
pub(crate) fn pump<D: Digest + Send>(
    produce: impl FnOnce(&mut Sink<'_>) -> Result<()>,
    to: Option<File>,
    on_way: &dyn Fn(u64),
) -> Result<Output<D>>
where
    Output<D>: Send,
{
    const OP: &str = "read archive";
    let (to_hash, chunks) = sync_channel::<Vec<u8>>(WAITING);
    let (empty, hashed) = channel();
    let hash = move || {
        let mut sha = D::new();
        for chunk in chunks {
            sha.update(&chunk);
            let _ = empty.send(chunk);
        }
        sha.finalize()
    };
    std::thread::scope(|scope| {
        let hasher = std::thread::Builder::new()
            .name("hash".into())
            .spawn_scoped(scope, hash)
            .map_err(|e| Error::io("start thread", "hash", e))?;
        let mut sink = Sink {
            to_hash,
            hashed,
            to,
            pending: Vec::new(),
            produced: 0,
            is_cut: false,
            on_way,
            next_word: WORD_EVERY,
        };
        produce(&mut sink)?;
        sink.flush();
        let is_cut = sink.is_cut;
        // Both ends: the unpacker's pipe, and the thread's.
        drop(sink);
        let digest = hasher.join().map_err(|_| Error::new(Kind::Io, OP, "", "the thread that hashes it panicked"))?;
        if is_cut {
            return Err(Error::new(Kind::Helper, OP, "", "who unpacks it stopped before its end"));
        }
        Ok(digest)
    })
}
