//! Memory is fuzzed too: an allocator that counts, and a bound that every input must keep.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Most that one input may have us hold at a time: what an import may take in all.
const MOST: usize = 64 << 20;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static WORST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is the system allocator's; the counters do not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller keeps to the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Run one input. One that holds more than any before is written where `FSPROV_FUZZ_MEMORY` says, for scripts/fuzz to tell.
pub fn bounded(data: &[u8], run: impl FnOnce()) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    run();
    let held = PEAK.load(Relaxed).saturating_sub(before);
    if held > WORST.fetch_max(held, Relaxed)
        && let Some(path) = std::env::var_os("FSPROV_FUZZ_MEMORY")
    {
        let mut file = std::fs::File::create(path).expect("a file for the worst input");
        writeln!(file, "{held}").and_then(|()| file.write_all(data)).expect("write the worst input");
    }
    assert!(held <= MOST, "{held} bytes were held for an input of {}", data.len());
}
