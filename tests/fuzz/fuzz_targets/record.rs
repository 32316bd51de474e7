//! The record of a rootfs, as another program may have left it: what is taken can be written and is then read as the same.
#![no_main]

use fsprov::provisioner::Record;
use libfuzzer_sys::fuzz_target;

mod memory;

fuzz_target!(|data: &[u8]| memory::bounded(data, || run(data)));

fn run(data: &[u8]) {
    if let Ok(record) = Record::parse(data, "record.json") {
        let id = record.plan.id.as_str();
        assert!(!id.is_empty() && !id.contains(['/', '\0']) && id != "." && id != "..");
        let text = serde_json::to_vec(&record).expect("it can be written");
        assert_eq!(Record::parse(&text, "record.json").expect("it can be read"), record);
    }
}
