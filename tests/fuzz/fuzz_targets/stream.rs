//! Bytes that call themselves a compressed archive, decompressed and hashed as an import does it.
#![no_main]

use fsprov::store::fuzz;
use libfuzzer_sys::fuzz_target;

mod memory;

/// The first bytes of each form: without them a fuzzer seldom gets to a decoder.
const MAGIC: [&[u8]; 5] = [b"", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"];

fuzz_target!(|data: &[u8]| {
    let Some((how, data)) = data.split_first() else { return };
    let bytes = [MAGIC[usize::from(*how) % MAGIC.len()], data].concat();
    memory::bounded(data, || drop(fuzz::stream(&bytes)));
});
