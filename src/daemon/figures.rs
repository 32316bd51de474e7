//! What a server process tells of itself. What that is read from is opened once: a worker has no name for it later.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{RawDir, SeekFrom, seek};

fn open(path: &str) -> Option<File> {
    File::open(path).inspect_err(|e| log::info!(target: super::TARGET, "open {path}: {e}")).ok()
}

/// This process's memory in bytes: resident, and of that what is shared with files (proc_pid_statm(5)). First called where /proc is
/// the whole of it.
pub(super) fn memory() -> serde_json::Value {
    static STATM: OnceLock<Option<File>> = OnceLock::new();
    let file = STATM.get_or_init(|| open("/proc/self/statm"));
    let mut text = [0; 128];
    let length = file.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
    let text = String::from_utf8_lossy(&text[..length]);
    let mut pages =
        text.split_ascii_whitespace().map(|n| n.parse::<u64>().unwrap_or(0) * rustix::param::page_size() as u64);
    let (_, resident, shared) = (pages.next(), pages.next().unwrap_or(0), pages.next().unwrap_or(0));
    serde_json::json!({ "resident": resident, "shared": shared })
}

/// How many descriptors this process has. First called in the root that it is to stay in: from a directory of another one a way leads
/// up to that.
pub(super) fn descriptors() -> usize {
    static DIRECTORY: OnceLock<Mutex<Option<File>>> = OnceLock::new();
    // Locked, as its position is moved.
    let directory = DIRECTORY.get_or_init(|| Mutex::new(open("/proc/self/fd")));
    let dir = directory.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(dir) = dir.as_ref().filter(|dir| seek(dir, SeekFrom::Start(0)).is_ok()) else { return 0 };
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(dir, &mut buffer);
    let mut count = 0;
    while let Some(Ok(entry)) = entries.next() {
        count += usize::from(!entry.file_name().to_bytes().starts_with(b"."));
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_and_memory_are_those_of_now() {
        let before = descriptors();
        let more: Vec<_> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
        // Other tests run beside this one.
        assert!(descriptors() >= before + 200, "{before}");
        drop(more);
        assert!(memory()["resident"].as_u64() > Some(1 << 20), "{}", memory());
    }
}
