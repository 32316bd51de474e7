//! The only place with `unsafe`: one call a block, its SAFETY line says why it is sound.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd as _};

// ---- index and image tree: mappings ----

/// Map a whole file, shared and read-only.
pub fn map_file(file: impl AsFd) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is read-only and its owner keeps it as long as it borrows from it. A file that someone changes
    // beneath it shows other bytes, which every reader of ours checks or hands on; one that shrinks is SIGBUS for who
    // touches it, which the callers' docs speak of.
    unsafe { memmap2::MmapOptions::new().map(file.as_fd().as_raw_fd()) }
}

/// Map `length` bytes from `offset` (a multiple of the page size) of a file, shared and read-only.
pub fn map_range(file: impl AsFd, offset: u64, length: usize) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: as for `map_file`.
    unsafe { memmap2::MmapOptions::new().offset(offset).len(length).map(file.as_fd().as_raw_fd()) }
}

/// Take the pages of a file mapping out of this process's page table (madvise(2) MADV_DONTNEED); they stay in the page
/// cache and come back at the next touch.
pub fn drop_resident(map: &memmap2::Mmap) -> std::io::Result<()> {
    // SAFETY: for a shared file mapping MADV_DONTNEED changes no content: the next access reads the same file.
    unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) }
}
