//! What a program that keeps a store does now and then: look for damage, remove what nobody needs, say how much is left.
//!
//! `cargo run --example upkeep -- STATE_ROOT`

#![allow(clippy::print_stdout, reason = "an example says what it did")]

use fsprov::provisioner::images_in_use;
use fsprov::store::{Prune, Repair, Use};
use fsprov::{StatePaths, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::env::args_os().nth(1).ok_or("usage: upkeep STATE_ROOT")?;
    let paths = StatePaths::new(root.into());
    let store = Store::open(&paths)?;
    for damage in store.verify(Repair::No)? {
        println!(
            "damaged: {} {}: {}",
            damage.id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            damage.part,
            damage.what
        );
    }
    let uses = || {
        let all = images_in_use(&paths)?;
        Ok(all.into_iter().map(|(image, id)| Use { image, by: id.to_string() }).collect())
    };
    let gone = store.gc(Prune::Garbage, &uses)?;
    println!("collected {} bytes", gone.bytes);
    for image in store.usage()? {
        println!("{} {} bytes of its own, {} shared", image.names.join(" "), image.own_bytes, image.shared_bytes);
    }
    Ok(())
}
