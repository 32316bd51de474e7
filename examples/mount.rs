//! Mount an image of the store, show what is at its top, and take it away again.
//!
//! `cargo run --example mount -- STATE_ROOT IMAGE ROOTFS [SRC:DST[:OPTION,...]]...`

#![allow(clippy::print_stdout, reason = "an example says what it did")]

use std::error::Error;

use fsprov::id::ImageRef;
use fsprov::provisioner::{Detach, Selector};
use fsprov::volume::VolumeSpec;
use fsprov::{Provisioner, Request, StatePaths};

fn main() -> Result<std::process::ExitCode, Box<dyn Error>> {
    // The server of a FUSE rootfs is this program, started again with a hidden verb: let it through before anything else.
    if let Some(code) = fsprov::dispatch() {
        return Ok(code);
    }
    let mut args = std::env::args_os().skip(1);
    let (Some(root), Some(image), Some(rootfs)) = (args.next(), args.next(), args.next()) else {
        return Err("usage: mount STATE_ROOT IMAGE ROOTFS [SRC:DST[:OPTION,...]]...".into());
    };
    let mut request = Request::new(ImageRef::parse(&image)?, rootfs);
    for volume in args {
        request = request.volume(VolumeSpec::parse(&volume)?);
    }
    let provisioner = Provisioner::of_host(StatePaths::new(root.into()));
    let record = provisioner.provision(&request)?;
    println!("{} is at {} by {:?}", record.plan.id, record.plan.rootfs.display(), record.backend);
    let mut names = std::fs::read_dir(&record.plan.rootfs)?
        .map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()))
        .collect::<std::io::Result<Vec<_>>>();
    // Taken away before an error is told.
    provisioner.destroy(&Selector::Id(record.plan.id), Detach::IfIdle)?;
    names.as_mut().map(|names| names.sort()).ok();
    println!("{}", names?.join(" "));
    Ok(std::process::ExitCode::SUCCESS)
}
