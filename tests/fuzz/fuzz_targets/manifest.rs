//! Manifests from outside: AppC's, OCI's and docker's documents, digests, names. What is taken can be written and read again.
#![no_main]

use fsprov::id::{ImageId, ImageRef};
use fsprov::internals::image::oci::{self, Digest, Document, Platform};
use fsprov::internals::image::{Strictness, appc};
use fsprov::store::fuzz;
use libfuzzer_sys::fuzz_target;

mod memory;

fuzz_target!(|data: &[u8]| memory::bounded(data, || run(data)));

fn run(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    match how % 8 {
        0 | 1 => {
            let strict = appc::Manifest::parse(data, Strictness::Strict);
            let lenient = appc::Manifest::parse(data, Strictness::Lenient);
            if let Ok(strict) = &strict {
                let lenient = lenient.as_ref().expect("lenient takes all that strict does");
                assert_eq!(strict.manifest, lenient.manifest);
            }
            if let Ok(checked) = lenient {
                let text = serde_json::to_vec(&checked.manifest).expect("it can be written");
                let again = appc::Manifest::parse(&text, Strictness::Lenient).expect("it can be read");
                assert_eq!(again.manifest, checked.manifest);
            }
        }
        2 | 3 => match oci::parse_document(data, None) {
            Ok(Document::Index(index)) => {
                let _ = oci::choose(&index, None, &Platform::host());
                let _ = oci::choose(&index, Some("x"), &Platform::host());
            }
            Ok(Document::Manifest(manifest)) => {
                for layer in &manifest.layers {
                    assert!(layer.digest.hex().len() == 64 && !layer.digest.hex().contains('/'));
                }
            }
            Err(_) => {}
        },
        4 => drop(oci::parse_config(data, usize::from(*how / 8))),
        5 => drop(fuzz::docker(data)),
        6 => {
            let Ok(text) = std::str::from_utf8(data) else { return };
            if let Ok(id) = text.parse::<ImageId>() {
                assert!(!id.as_str().contains(['/', '\0']) && id.as_str().len() > 64);
            }
            drop((Digest::try_from(text.to_owned()), ImageRef::parse(text.as_ref()), text.parse::<Platform>()));
            drop((appc::is_ac_identifier(text), text.parse::<fsprov::id::ContainerId>()));
        }
        _ => drop(fuzz::meta(data)),
    }
}
