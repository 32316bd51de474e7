//! Bytes that call themselves an index: as they are, and with the checksums made right, so that the fuzzer reaches the
//! readers behind them. Nothing may panic, loop or read outside.
#![no_main]

use std::sync::LazyLock;

use fsprov::internals::index::{Builder, Entry, Index, Time, What, Whiteouts, Xattr, read};
use libfuzzer_sys::fuzz_target;

mod memory;

/// A good index: most of what the fuzzer makes of it still passes the header's checks.
static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut builder = Builder::new();
    builder.begin_layer(Whiteouts::Plain).expect("the first layer");
    let whats = [
        ("a/f", What::File { size: 10, content: Some(b"elsewhere".to_vec()), sha256: Some([1; 32]) }),
        ("a/g", What::HardLink(b"a/f".to_vec())),
        ("a/l", What::Symlink(b"f".to_vec())),
        ("b/c/d", What::Char(0x103)),
        ("b/p", What::Fifo),
    ];
    for (path, what) in whats {
        let xattrs = vec![Xattr { name: b"user.n".to_vec(), value: vec![1, 2, 3] }];
        let mtime = Time { secs: 1, nanos: 2 };
        let entry = Entry { path: path.into(), what, mode: 0o644, uid: 0, gid: 0, mtime, xattrs };
        builder.add(entry).expect("a good entry");
    }
    builder.finish().expect("within limits")
});

fuzz_target!(|data: &[u8]| memory::bounded(data, || run(data)));

fn run(data: &[u8]) {
    if let Ok(index) = Index::from_bytes(data.to_vec()) {
        read::exercise(&index);
    }
    // Changes to a good index: position (2 bytes), value (1 byte), again and again.
    let mut bytes = GOOD.clone();
    for change in data.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % bytes.len();
        bytes[at] = change[2];
    }
    read::seal(&mut bytes);
    if let Ok(index) = Index::from_bytes(bytes) {
        read::exercise(&index);
    }
}
