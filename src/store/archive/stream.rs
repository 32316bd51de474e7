//! The bytes of an archive, uncompressed: hashed here, and handed to the process that parses and places them.
//!
//! What is hashed and what is parsed are the same bytes: the digest covers every one that was acted on, and those after
//! the end marker too.

use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};

use sha2::Digest;
use sha2::digest::Output;

use super::ring::{Ring, Turns};
use crate::error::{Error, Kind, Result};
use crate::sys::process::not_started;

/// Where the bytes go.
pub(crate) struct Sink<'a> {
    to_hash: Sender<(&'a mut [u8], usize)>,
    /// What was hashed, to be filled again.
    hashed: Receiver<&'a mut [u8]>,
    turns: Option<Turns>,
    /// The slot at hand, and how much of it is filled.
    slot: Option<&'a mut [u8]>,
    filled: usize,
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
    /// Where the next bytes go: never empty. `None`: nobody takes any more.
    pub(super) fn room(&mut self) -> Option<&mut [u8]> {
        if self.slot.is_none() {
            self.is_cut |= self.turns.as_mut().is_some_and(|turns| !turns.wait_for_room());
            if self.is_cut {
                return None;
            }
            // An error: the thread panicked, which is told where it is joined.
            self.slot = self.hashed.recv().ok();
        }
        let filled = self.filled;
        self.slot.as_mut().map(|slot| &mut slot[filled..])
    }

    /// So many bytes were put there. False: nobody takes any more.
    pub(super) fn add(&mut self, count: usize) -> bool {
        self.filled += count;
        self.produced += count as u64;
        if self.produced >= self.next_word {
            self.next_word = self.produced + WORD_EVERY;
            (self.on_way)(self.produced);
        }
        if self.slot.as_ref().is_some_and(|slot| slot.len() == self.filled) { self.hand_over() } else { true }
    }

    fn hand_over(&mut self) -> bool {
        let Some(slot) = self.slot.take() else { return true };
        let length = std::mem::take(&mut self.filled);
        // First: who takes them works meanwhile.
        self.is_cut |= self.turns.as_mut().is_some_and(|turns| !turns.hand_over(length));
        !self.is_cut && self.to_hash.send((slot, length)).is_ok()
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let gone = std::io::ErrorKind::BrokenPipe;
        let room = self.room().ok_or(gone)?;
        let count = data.len().min(room.len());
        room[..count].copy_from_slice(&data[..count]);
        if self.add(count) { Ok(count) } else { Err(gone.into()) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Run `produce`, whose bytes go into `ring`; gives their digest, if the ring's reader took every one of them: else one who takes a part could have
/// the digest of a smaller part.
pub(crate) fn pump<D: Digest + Send>(
    produce: impl FnOnce(&mut Sink<'_>) -> Result<()>,
    mut ring: Ring,
    on_way: &dyn Fn(u64),
) -> Result<Output<D>>
where
    Output<D>: Send,
{
    const OP: &str = "read archive";
    let (slots, turns) = ring.parts();
    let (to_hash, full) = channel::<(&mut [u8], usize)>();
    let (free, hashed) = channel();
    for slot in slots {
        // Its other end is here.
        let _ = free.send(slot);
    }
    let hash = move || {
        let mut sha = D::new();
        for (slot, length) in full {
            sha.update(&slot[..length]);
            let _ = free.send(slot);
        }
        sha.finalize()
    };
    std::thread::scope(|scope| {
        let hasher = std::thread::Builder::new()
            .name("hash".into())
            .spawn_scoped(scope, hash)
            .map_err(|e| not_started("start thread", "hash", e))?;
        let mut sink = Sink {
            to_hash,
            hashed,
            turns,
            slot: None,
            filled: 0,
            produced: 0,
            is_cut: false,
            on_way,
            next_word: WORD_EVERY,
        };
        produce(&mut sink)?;
        if sink.filled > 0 {
            sink.hand_over();
        }
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
