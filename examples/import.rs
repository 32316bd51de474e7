//! Import an archive, an OCI layout or a directory, and list what the store has.
//!
//! `cargo run --example import -- STATE_ROOT ARCHIVE NAME`

#![allow(clippy::print_stdout, reason = "an example says what it did")]

use std::process::ExitCode;

use fsprov::store::{ImageSource, ImportOptions};
use fsprov::{StatePaths, Store};

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    // Archives are read by processes of their own, behind walls: this program, started again with a hidden verb.
    if let Some(code) = fsprov::dispatch() {
        return Ok(code);
    }
    let [root, archive, name] = <[String; 3]>::try_from(std::env::args().skip(1).collect::<Vec<_>>())
        .map_err(|_| "usage: import STATE_ROOT ARCHIVE NAME")?;
    let store = Store::open(&StatePaths::new(root.into()))?;
    let options = ImportOptions { name: Some(name), ..ImportOptions::default() };
    let imported = store.import(&ImageSource::at(archive.as_ref())?, &options)?;
    println!("{}: {:?}", imported.name, imported.outcome);
    for image in store.list()? {
        println!("{} {} bytes {}", image.id, image.bytes, image.names.join(" "));
    }
    Ok(ExitCode::SUCCESS)
}
