//! SHA-512 by ring, whose assembly takes a fifth less time than `sha2` (170 MiB: 0.49 s beside 0.63 s): what an import of an ACI waits for.

use ring::digest::{Context, SHA512};
use sha2::digest::consts::U64;
use sha2::digest::{FixedOutput, HashMarker, Output, OutputSizeUser, Update};

/// As `sha2::Sha512`.
pub(in crate::store) struct Sha512(Context);

impl Default for Sha512 {
    fn default() -> Self {
        Sha512(Context::new(&SHA512))
    }
}

impl HashMarker for Sha512 {}

impl OutputSizeUser for Sha512 {
    type OutputSize = U64;
}

impl Update for Sha512 {
    fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }
}

impl FixedOutput for Sha512 {
    fn finalize_into(self, out: &mut Output<Self>) {
        out.copy_from_slice(self.0.finish().as_ref());
    }
}

#[cfg(test)]
mod tests {
    use sha2::Digest as _;

    #[test]
    fn as_sha2_has_it() {
        for length in [0, 1, 111, 112, 127, 128, 129, 300_000] {
            let data: Vec<u8> = (0..length).map(|n: u32| (n % 251) as u8).collect();
            let mut ours = super::Sha512::default();
            data.chunks(1000).for_each(|part| ours.update(part));
            assert_eq!(ours.finalize(), sha2::Sha512::digest(&data), "{length} bytes");
        }
    }
}
