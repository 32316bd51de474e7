//! Archives placed below a directory: nothing beside it changes, and what is taken makes an index that holds. Slow (it makes
//! files, in memory where that can be had).
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use fsprov::store::fuzz;
use libfuzzer_sys::fuzz_target;

mod memory;

#[path = "../../archives/tarball.rs"]
#[allow(dead_code, reason = "a target uses a part of it")]
mod tarball;

static TOP: LazyLock<PathBuf> = LazyLock::new(|| {
    let shm = PathBuf::from("/dev/shm");
    let top = if shm.is_dir() { shm } else { std::env::temp_dir() };
    let top = top.join(format!("fsprov-fuzz-place-{}", std::process::id()));
    fs::create_dir(&top).expect("make a directory of our own");
    fs::write(top.join("victim"), "precious").expect("write");
    top
});

/// Names that meet one another: what a byte chooses from.
const NAMES: [&[u8]; 16] = [
    b"a",
    b"b",
    b"a/b",
    b"a/b/c",
    b"./a",
    b"a/.",
    b"a/../b",
    b"../victim",
    b"/a",
    b"a/",
    b"l",
    b"l/a",
    b"",
    b".",
    b"b/l",
    b"../../victim",
];
const KINDS: &[u8; 8] = b"01234560";

fuzz_target!(|data: &[u8]| memory::bounded(data, || run(data)));

fn run(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    let mut tar = tarball::Tar::default();
    // An entry for each three bytes.
    for entry in data.chunks_exact(3).take(16) {
        let kind = KINDS[usize::from(entry[0] & 7)];
        let mut head = tarball::head(NAMES[usize::from(entry[1] & 15)], kind);
        head.link = NAMES[usize::from(entry[2] & 15)].to_vec();
        head.mode = tarball::octal(u64::from(entry[0]) << 4, 8);
        (head.major, head.minor) = (1, 3);
        tar.entry(&head, if kind == b'0' { &entry[..usize::from(entry[2] >> 6)] } else { b"" });
    }
    let dir = TOP.join("root");
    fs::create_dir(&dir).expect("make the root");
    let taken = fuzz::place(&tar.end(), &dir, how & 1 == 1);
    if let Ok(index) = &taken {
        index.verify().expect("it is good");
    }
    assert_eq!(fs::read(TOP.join("victim")).expect("it is there"), b"precious");
    assert_eq!(fs::read_dir(&*TOP).expect("list").count(), 2, "something lies beside the root");
    fsprov::internals::sys::remove::remove_tree(&dir).expect("remove the root");
}
