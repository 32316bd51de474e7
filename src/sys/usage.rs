//! What a tree takes on the disk.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result, show};

/// What a tree takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Bytes of its blocks, each inode once.
    pub bytes: u64,
    /// Files, directories and everything else below its top, each inode once.
    pub files: u64,
}

/// Measure everything at and below `top`. What vanishes meanwhile is not counted.
pub fn measure(top: &Path) -> Result<Usage> {
    let fail = |e| Error::io("measure", show(top), e);
    let gone = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    let mut seen = HashSet::new();
    let mut usage = Usage::default();
    let mut stack = vec![top.to_owned()];
    while let Some(path) = stack.pop() {
        let meta = match std::fs::symlink_metadata(&path) {
            Err(e) if gone(&e) => continue,
            other => other.map_err(fail)?,
        };
        if meta.nlink() < 2 || meta.is_dir() || seen.insert((meta.dev(), meta.ino())) {
            usage.bytes += meta.blocks() * 512;
            usage.files += u64::from(path != top);
        }
        if meta.is_dir() {
            match std::fs::read_dir(&path) {
                Err(e) if gone(&e) => {}
                Err(e) => return Err(fail(e)),
                Ok(entries) => {
                    for entry in entries {
                        stack.push(entry.map_err(fail)?.path());
                    }
                }
            }
        }
    }
    Ok(usage)
}

/// Bytes that everything at and below `top` takes.
pub fn bytes_on_disk(top: &Path) -> Result<u64> {
    Ok(measure(top)?.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hard_link_counts_once_and_a_symlink_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("d/f"), vec![1_u8; 100_000]).unwrap();
        std::fs::hard_link(dir.path().join("d/f"), dir.path().join("g")).unwrap();
        std::os::unix::fs::symlink("/usr", dir.path().join("l")).unwrap();
        let usage = measure(dir.path()).unwrap();
        assert_eq!(usage.files, 3);
        assert!((100_000..200_000).contains(&usage.bytes), "{usage:?}");
    }
}
