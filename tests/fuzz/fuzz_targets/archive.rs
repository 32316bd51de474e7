//! Bytes that call themselves a tar archive, read as an import reads them, nothing placed: as they are, and as changes to a
//! good archive, with every checksum made right. What is taken makes an index that holds.
#![no_main]

use std::sync::LazyLock;

use fsprov::internals::index::{Index, read};
use fsprov::store::fuzz;
use libfuzzer_sys::fuzz_target;

mod memory;

#[path = "../../archives/tarball.rs"]
#[allow(dead_code, reason = "a target uses a part of it")]
mod tarball;

/// One of each kind of entry, record and number.
pub static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    use tarball::{CHR, DIR, FIFO, FILE, HARD, Head, SYM, Tar, head, octal};
    let mut tar = Tar::default();
    tar.dir(b"d");
    tar.file(b"d/f", b"content");
    tar.link(HARD, b"d/g", b"d/f");
    tar.link(SYM, b"d/l", b"f");
    tar.pax(&[("path", b"d/p"), ("size", b"3"), ("mtime", b"-1.5"), ("SCHILY.xattr.user.n", b"v")]);
    tar.entry(&head(b"short", FILE), b"pax");
    tar.extension(b'L', b"d/long\0");
    tar.any(FIFO, b"x");
    tar.entry(&Head { major: 1, minor: 3, mode: octal(0o4755, 8), ..head(b"d/c", CHR) }, b"");
    tar.pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9")]);
    tar.entry(&head(b"d/s", FILE), &[&b"1\n2\n3\n"[..], &[0; 506], b"abc"].concat());
    tar.extension(b'g', &tarball::record("comment", b"c"));
    tar.dir(b".wh.d");
    tar.entry(&head(b"d/.wh..wh..opq", DIR), b"");
    tar.end()
});

fn take(bytes: &[u8], data: &[u8]) {
    let Ok(index) = fuzz::read(bytes) else { return };
    // An index costs more than the reading: for some of the inputs.
    if data.len() % 8 == 0 {
        let index = Index::from_bytes(index.finish().expect("what was taken can be written")).expect("it is good");
        index.verify().expect("it is good");
        read::exercise(&index);
    }
}

fuzz_target!(|data: &[u8]| memory::bounded(data, || run(data)));

fn run(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    let mut bytes;
    if how % 4 == 0 {
        bytes = data.to_vec();
    } else {
        bytes = GOOD.clone();
        // Changes: position (2 bytes), value (1 byte), again and again.
        for change in data.chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % bytes.len();
            bytes[at] = change[2];
        }
    }
    if how % 4 != 1 {
        fuzz::seal(&mut bytes);
    }
    take(&bytes, data);
}
