//! Bytes from one process to another through memory that both have: slots, filled and freed in turn.
//!
//! Two pipes carry the rest: the length of each slot that is full, and a byte for each that is free again. A pipe for the bytes themselves would
//! copy them twice, and take a new page for every 4 KiB.
//!
//! * to the unpacker: it has the memory mapped, and sealed (F_SEAL_FUTURE_WRITE, fcntl(2), Linux 5.1), so that it cannot write. What was hashed
//!   is what it gets.
//! * from the decoder, which decodes right into it: what it could change under its reader is copied out first, and then hashed.

use std::fs::File;
use std::io::{ErrorKind, Read, Write as _};
use std::os::fd::OwnedFd;

use memmap2::{Mmap, MmapMut};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::{Error, Result};
use crate::sys::raw;

/// Bytes of a slot: so many that a hand-over costs nothing beside hashing them.
const SLOT: usize = 128 << 10;
/// Slots on the way to an unpacker: what is read ahead of the slower of hashing and unpacking. Large files and small ones come in bursts, and take one
/// of the two longer.
const TO_UNPACKER: usize = 32;
/// From a decoder, which is faster than both.
const FROM_DECODER: usize = 4;

/// What one end is made of: a pipe's end for the lengths, the memory, a pipe's end for what is free.
pub(super) type End = [OwnedFd; 3];

pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::sys("make a pipe", "", e))
}

/// Memory and pipes: the writer's end and the reader's.
fn ends(for_whom: &str, slots: usize) -> Result<(End, End)> {
    let fail = |e| Error::sys("make memory for", for_whom, e);
    let memory = memfd_create("archive", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(fail)?;
    ftruncate(&memory, (slots * SLOT) as u64).map_err(fail)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW).map_err(fail)?;
    let again = memory.try_clone().map_err(|e| Error::io("duplicate descriptor", "", e))?;
    let ((from, lengths), (freed, to)) = (pipe()?, pipe()?);
    Ok(([lengths, memory, freed], [from, again, to]))
}

fn map_writable(memory: &OwnedFd, slots: usize) -> Result<MmapMut> {
    raw::map_writable(memory, 0, slots * SLOT).map_err(|e| Error::io("map memory of", "an archive", e))
}

/// The writer's side of a ring, in this process.
pub(crate) struct Ring {
    memory: MmapMut,
    turns: Option<Turns>,
}

impl Ring {
    /// One that no other process reads.
    pub(crate) fn alone() -> Result<Self> {
        let memory = MmapMut::map_anon(TO_UNPACKER * SLOT).map_err(|e| Error::io("map memory", "", e))?;
        Ok(Ring { memory, turns: None })
    }

    /// One for an unpacker, and its end: for [`Mapped`].
    pub(crate) fn to_unpacker() -> Result<(Self, End)> {
        let (ours, theirs) = ends("an unpacker", TO_UNPACKER)?;
        let ring = Ring::of_end(ours, TO_UNPACKER)?;
        fcntl_add_seals(&theirs[1], SealFlags::FUTURE_WRITE | SealFlags::SEAL)
            .map_err(|e| Error::sys("make memory for", "an unpacker", e))?;
        Ok((ring, theirs))
    }

    /// One that its reader has made: [`Copied::from_decoder`].
    pub(super) fn take(end: End) -> Result<Self> {
        Ring::of_end(end, FROM_DECODER)
    }

    fn of_end([lengths, memory, freed]: End, slots: usize) -> Result<Self> {
        let turns = Turns { lengths: lengths.into(), freed: freed.into(), slots, full: 0, free: 0 };
        Ok(Ring { memory: map_writable(&memory, slots)?, turns: Some(turns) })
    }

    /// Fill slot after slot by `read`, until that gives nothing or nobody takes any more.
    pub(super) fn fill(&mut self, mut read: impl FnMut(&mut [u8]) -> Result<usize>) -> Result<()> {
        let (slots, mut turns) = self.parts();
        let mut slots: Vec<_> = slots.collect();
        for number in (0..slots.len()).cycle() {
            if !turns.as_mut().is_none_or(Turns::wait_for_room) {
                break;
            }
            let count = read(&mut *slots[number])?;
            if count == 0 || !turns.as_mut().is_none_or(|turns| turns.hand_over(count)) {
                break;
            }
        }
        Ok(())
    }

    /// Its slots, to be filled in this order again and again, and whose turn it is.
    pub(super) fn parts(&mut self) -> (impl Iterator<Item = &mut [u8]>, Option<Turns>) {
        (self.memory.chunks_exact_mut(SLOT), self.turns.take())
    }
}

/// Which slots are whose, as the writer knows it.
pub(super) struct Turns {
    lengths: File,
    freed: File,
    slots: usize,
    full: u64,
    free: u64,
}

impl Turns {
    /// Wait until the next slot is free. False: nobody reads any more.
    pub(super) fn wait_for_room(&mut self) -> bool {
        let mut freed = [0; TO_UNPACKER];
        while self.full - self.free >= self.slots as u64 {
            match self.freed.read(&mut freed) {
                // The reader may lie: a slot that changes under it is its own loss.
                Ok(count @ 1..) => self.free = (self.free + count as u64).min(self.full),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return false,
            }
        }
        true
    }

    /// The next slot is full. False: nobody reads any more.
    pub(super) fn hand_over(&mut self, length: usize) -> bool {
        self.full += 1;
        self.lengths.write_all(&(length as u32).to_le_bytes()).is_ok()
    }
}

/// The slot at hand, as a reader knows it.
struct Slot {
    lengths: File,
    freed: File,
    slots: usize,
    number: usize,
    length: usize,
}

impl Slot {
    fn new(lengths: OwnedFd, freed: OwnedFd, slots: usize) -> Self {
        Slot { lengths: lengths.into(), freed: freed.into(), slots, number: slots - 1, length: 0 }
    }

    /// Give it back and wait for the next. False at the end.
    fn next(&mut self) -> std::io::Result<bool> {
        if self.length > 0 {
            // If the writer is gone, the read below says so.
            let _ = self.freed.write_all(&[0]);
        }
        self.length = 0;
        let mut length = [0; 4];
        match self.lengths.read_exact(&mut length) {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(false),
            other => other?,
        }
        self.number = (self.number + 1) % self.slots;
        self.length = (u32::from_le_bytes(length) as usize).min(SLOT);
        Ok(true)
    }
}

/// A reader that trusts the writer: the unpacker.
pub(super) struct Mapped {
    memory: Mmap,
    slot: Slot,
}

impl Mapped {
    pub(super) fn new([lengths, memory, freed]: End) -> Result<Self> {
        let memory =
            raw::map_range(&memory, 0, TO_UNPACKER * SLOT).map_err(|e| Error::io("map memory of", "an archive", e))?;
        Ok(Mapped { memory, slot: Slot::new(lengths, freed, TO_UNPACKER) })
    }

    /// Give back the slot at hand and wait for the next. False at the end.
    pub(super) fn next(&mut self) -> std::io::Result<bool> {
        self.slot.next()
    }

    /// The bytes of the slot at hand.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.slot.number * SLOT..][..self.slot.length]
    }
}

/// A reader that does not trust the writer, and takes a copy.
pub(super) struct Copied {
    memory: OwnedFd,
    slot: Slot,
    at: usize,
}

impl Copied {
    /// What a decoder gives, and its end: for [`Ring::take`].
    pub(super) fn from_decoder() -> Result<(Self, End)> {
        let (theirs, [lengths, memory, freed]) = ends("a decoder", FROM_DECODER)?;
        Ok((Copied { memory, slot: Slot::new(lengths, freed, FROM_DECODER), at: 0 }, theirs))
    }
}

impl Read for Copied {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.slot.length {
            self.at = 0;
            // An empty one would look like the end.
            while self.slot.next()? {
                if self.slot.length > 0 {
                    break;
                }
            }
        }
        let count = out.len().min(self.slot.length - self.at);
        let count = rustix::io::pread(&self.memory, &mut out[..count], (self.slot.number * SLOT + self.at) as u64)?;
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(mut ring: Ring) {
        let mut counts = (1..=100).chain([0]);
        let next = |slot: &mut [u8]| {
            let count: usize = counts.next().unwrap();
            slot[..count].fill(count as u8);
            Ok(count)
        };
        ring.fill(next).unwrap();
    }

    #[test]
    fn every_slot_arrives_in_turn() {
        let (ring, end) = Ring::to_unpacker().unwrap();
        let mut reader = Mapped::new(end).unwrap();
        let writer = std::thread::spawn(|| write(ring));
        for n in 1..=100_u8 {
            assert!(reader.next().unwrap());
            assert_eq!(reader.bytes(), vec![n; usize::from(n)]);
        }
        assert!(!reader.next().unwrap());
        writer.join().unwrap();
    }

    #[test]
    fn what_a_decoder_gives_is_copied_out() {
        let (mut reader, end) = Copied::from_decoder().unwrap();
        let writer = std::thread::spawn(|| write(Ring::take(end).unwrap()));
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        writer.join().unwrap();
        let want: Vec<u8> = (1..=100_u8).flat_map(|n| vec![n; usize::from(n)]).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn a_reader_that_is_gone_is_seen() {
        let (mut ring, end) = Ring::to_unpacker().unwrap();
        let mut turns = ring.parts().1.unwrap();
        (0..TO_UNPACKER).for_each(|_| assert!(turns.wait_for_room() && turns.hand_over(1)));
        drop(end);
        assert!(!turns.wait_for_room());
        assert!(!turns.hand_over(1));
    }

    /// Else it could have the digest of bytes that it put there itself.
    #[test]
    fn an_unpacker_cannot_write() {
        let (_ring, [_, memory, _]) = Ring::to_unpacker().unwrap();
        assert!(raw::map_writable(&memory, 0, SLOT).is_err());
        assert!(rustix::io::pwrite(&memory, b"x", 0).is_err());
        assert!(ftruncate(&memory, 0).is_err());
    }
}
