//! Arrays of which a bounded part lies in memory, and the rest in a file without a name: what an index is put together in.
//!
//! An archive says how many entries it has and how long their names are; so what is held of them must not be memory. Small
//! images never reach the file: it is made when the first page has to go.

use std::fs::File;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::{Error, Kind, Result, show};

/// What goes to the file and comes back at once. Larger ones would move more than a lookup needs.
const PAGE: usize = 16 << 10;
const NOWHERE: u32 = u32::MAX;

struct Frame {
    page: u32,
    is_used: bool,
    is_dirty: bool,
    bytes: Box<[u8]>,
}

/// Pages of bytes, zero at first.
struct Pages {
    frames: Vec<Frame>,
    /// Most frames.
    most: usize,
    /// Frame by page; [`NOWHERE`]: it lies in the file.
    place: Vec<u32>,
    hand: usize,
    file: Option<File>,
    dir: PathBuf,
}

impl Pages {
    fn new(dir: &Path, most_bytes: usize) -> Self {
        let most = (most_bytes / PAGE).max(2);
        Pages { frames: Vec::new(), most, place: Vec::new(), hand: 0, file: None, dir: dir.to_owned() }
    }

    #[inline]
    fn frame(&mut self, page: usize) -> Result<&mut Frame> {
        let frame = match self.place.get(page) {
            Some(frame) if *frame != NOWHERE => *frame as usize,
            _ => self.bring(page)?,
        };
        let frame = &mut self.frames[frame];
        frame.is_used = true;
        Ok(frame)
    }

    #[cold]
    fn bring(&mut self, page: usize) -> Result<usize> {
        let is_new = page >= self.place.len();
        debug_assert!(page <= self.place.len(), "pages come one after another");
        let frame = self.free_frame()?;
        let to = &mut self.frames[frame];
        (to.page, to.is_dirty) = (page as u32, is_new);
        if is_new {
            to.bytes.fill(0);
            self.place.push(frame as u32);
        } else {
            let gone = || Error::new(Kind::Io, "read back", show(&self.dir), "a page was never written");
            let file = self.file.as_ref().ok_or_else(gone)?;
            file.read_exact_at(&mut to.bytes, (page * PAGE) as u64)
                .map_err(|e| Error::io("read back what is held in", show(&self.dir), e))?;
            self.place[page] = frame as u32;
        }
        Ok(frame)
    }

    /// A frame that nothing lies in: a new one, else the first that was not used since the hand passed it (a clock).
    fn free_frame(&mut self) -> Result<usize> {
        if self.frames.len() < self.most {
            let bytes = vec![0; PAGE].into_boxed_slice();
            self.frames.push(Frame { page: NOWHERE, is_used: false, is_dirty: false, bytes });
            return Ok(self.frames.len() - 1);
        }
        while std::mem::take(&mut self.frames[self.hand].is_used) {
            self.hand = (self.hand + 1) % self.frames.len();
        }
        let victim = self.hand;
        self.hand = (self.hand + 1) % self.frames.len();
        let Frame { page, is_dirty, .. } = self.frames[victim];
        if is_dirty {
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(
                    tempfile::tempfile_in(&self.dir).map_err(|e| Error::io("make a file in", show(&self.dir), e))?,
                ),
            };
            file.write_all_at(&self.frames[victim].bytes, u64::from(page) * PAGE as u64)
                .map_err(|e| Error::io("put aside what is held, in", show(&self.dir), e).hint("make room there"))?;
        }
        self.place[page as usize] = NOWHERE;
        Ok(victim)
    }
}

/// Records of one size.
pub(super) struct Table<T> {
    pages: Pages,
    len: u32,
    of: PhantomData<T>,
}

impl<T: FromBytes + IntoBytes + Immutable + KnownLayout> Table<T> {
    const SIZE: usize = size_of::<T>();
    const PER_PAGE: usize = PAGE / Self::SIZE;

    /// Empty; `memory` bytes of it are held, the rest goes to a file in `dir`.
    pub(super) fn new(dir: &Path, memory: usize) -> Self {
        Table { pages: Pages::new(dir, memory), len: 0, of: PhantomData }
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    pub(super) fn dir(&self) -> &Path {
        &self.pages.dir
    }

    #[inline]
    pub(super) fn get(&mut self, row: u32) -> Result<T> {
        debug_assert!(row < self.len);
        let at = row as usize % Self::PER_PAGE * Self::SIZE;
        let frame = self.pages.frame(row as usize / Self::PER_PAGE)?;
        Ok(T::read_from_bytes(&frame.bytes[at..at + Self::SIZE]).expect("its own size"))
    }

    #[inline]
    pub(super) fn set(&mut self, row: u32, value: &T) -> Result<()> {
        debug_assert!(row < self.len);
        let at = row as usize % Self::PER_PAGE * Self::SIZE;
        let frame = self.pages.frame(row as usize / Self::PER_PAGE)?;
        frame.is_dirty = true;
        frame.bytes[at..at + Self::SIZE].copy_from_slice(value.as_bytes());
        Ok(())
    }

    /// Change a record where it lies.
    pub(super) fn change(&mut self, row: u32, change: impl FnOnce(&mut T)) -> Result<()> {
        let mut value = self.get(row)?;
        change(&mut value);
        self.set(row, &value)
    }

    /// Add a record at the end: its row.
    pub(super) fn push(&mut self, value: &T) -> Result<u32> {
        let row = self.len;
        self.len += 1;
        self.set(row, value)?;
        Ok(row)
    }

    /// Add `count` records of zeros.
    pub(super) fn grow(&mut self, count: u32) -> Result<()> {
        let was = self.len as usize;
        self.len += count;
        for page in was.div_ceil(Self::PER_PAGE)..(self.len as usize).div_ceil(Self::PER_PAGE) {
            self.pages.frame(page)?;
        }
        Ok(())
    }
}

/// Bytes, added at the end.
pub(super) struct Heap {
    pages: Pages,
    len: u64,
}

impl Heap {
    /// Empty; `memory` bytes of it are held, the rest goes to a file in `dir`.
    pub(super) fn new(dir: &Path, memory: usize) -> Self {
        Heap { pages: Pages::new(dir, memory), len: 0 }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Add bytes: where they lie.
    pub(super) fn add(&mut self, mut bytes: &[u8]) -> Result<u64> {
        let start = self.len;
        while !bytes.is_empty() {
            let at = (self.len % PAGE as u64) as usize;
            let frame = self.pages.frame((self.len / PAGE as u64) as usize)?;
            let count = bytes.len().min(PAGE - at);
            frame.is_dirty = true;
            frame.bytes[at..at + count].copy_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            self.len += count as u64;
        }
        Ok(start)
    }

    /// Read bytes to the end of `out`.
    pub(super) fn read(&mut self, mut at: u64, mut length: usize, out: &mut Vec<u8>) -> Result<()> {
        debug_assert!(at + length as u64 <= self.len);
        while length > 0 {
            let from = (at % PAGE as u64) as usize;
            let count = length.min(PAGE - from);
            let frame = self.pages.frame((at / PAGE as u64) as usize)?;
            out.extend_from_slice(&frame.bytes[from..from + count]);
            at += count as u64;
            length -= count;
        }
        Ok(())
    }

    /// Are these bytes there?
    pub(super) fn is(&mut self, at: u64, bytes: &[u8]) -> Result<bool> {
        let from = (at % PAGE as u64) as usize;
        if from + bytes.len() <= PAGE {
            return Ok(self.pages.frame((at / PAGE as u64) as usize)?.bytes[from..from + bytes.len()] == *bytes);
        }
        let mut found = Vec::with_capacity(bytes.len());
        self.read(at, bytes.len(), &mut found)?;
        Ok(found == bytes)
    }

    /// Hand out all of it, in order.
    pub(super) fn each(&mut self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        for page in 0..self.len.div_ceil(PAGE as u64) {
            let count = (self.len - page * PAGE as u64).min(PAGE as u64) as usize;
            take(&self.pages.frame(page as usize)?.bytes[..count])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_into_memory_comes_back_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = Table::<u64>::new(dir.path(), 4 * PAGE);
        let mut heap = Heap::new(dir.path(), 2 * PAGE);
        let count = 100_000_u32;
        for n in 0..count {
            table.push(&u64::from(n)).unwrap();
            assert_eq!(heap.add(format!("{n:07}").as_bytes()).unwrap(), u64::from(n) * 7);
        }
        // There and back, so that pages are changed after they came from the file.
        let mut row = 1;
        for _ in 0..count {
            row = (row * 7919 + 1) % count;
            table.change(row, |value| *value += 1 << 32).unwrap();
            assert!(heap.is(u64::from(row) * 7, format!("{row:07}").as_bytes()).unwrap());
        }
        let sum: u64 = (0..count).map(|row| table.get(row).unwrap() & 0xffff_ffff).sum();
        assert_eq!(sum, u64::from(count) * u64::from(count - 1) / 2);
        assert!((0..count).map(|row| table.get(row).unwrap() >> 32).sum::<u64>() == u64::from(count));
        assert_eq!((table.pages.frames.len(), heap.pages.frames.len()), (4, 2));
        let mut all = Vec::new();
        heap.each(|bytes| {
            all.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
        assert_eq!(all.len(), count as usize * 7);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the files have no names");
        // A small one makes no file.
        let mut small = Table::<u64>::new(Path::new("/nonexistent"), 4 * PAGE);
        small.grow(100).unwrap();
        assert_eq!(small.get(99).unwrap(), 0);
    }
}
