//! Images made up for the benches.

use fsprov::internals::index::{Builder, Entry, Index, Time, What, Whiteouts};

/// A builder with `directories` directories of `files` files each, named as packages name theirs.
pub(crate) fn image(directories: u32, files: u32) -> Builder {
    let mut builder = Builder::new();
    builder.begin_layer(Whiteouts::Plain).expect("the first layer");
    for d in 0..directories {
        for f in 0..files {
            let path = format!("usr/share/package-{d:05}/module_{f:04}.cpython-311.pyc").into_bytes();
            let what = What::File { size: 4096, content: None, sha256: Some([f as u8; 32]) };
            let mtime = Time { secs: 1_700_000_000, nanos: 0 };
            let entry = Entry { path, what, mode: 0o644, uid: 0, gid: 0, mtime, xattrs: Vec::new() };
            builder.add(entry).expect("a good entry");
        }
    }
    builder
}

/// The index of [`image`], mapped from a file as a server maps it.
#[allow(dead_code)] // not every bench needs one
pub(crate) fn mapped(directories: u32, files: u32) -> Index {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("index");
    image(directories, files).write_file(&path).expect("an index");
    Index::open(&path).expect("the index just written")
}
