//! `fsprov image`.

pub(super) mod net;
mod show;
mod upkeep;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use clap_complete::engine::ArgValueCompleter;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::interrupt::Undoing;
use super::{Format, Global, output, settings};
use crate::cli::complete;
use crate::error::{Kind, Result};
use crate::id::{ImageId, ImageRef};
use crate::image::Strictness;
use crate::image::oci::Platform;
use crate::provisioner::images_in_use;
use crate::store::{
    Held, ImageSource, ImportOptions, Imported, Meta, OnDisk, Outcome, ProgressFn, Signature, Store, Use,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  fsprov image import debian.aci\n  fsprov image list\n  fsprov image rm debian")]
pub(super) struct Image {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Put an image into the store
    Import(Import),
    /// Download an image from an OCI registry
    Pull(net::Pull),
    /// Download an AppC image by its name, with its dependencies
    Fetch(net::Fetch),
    /// List the images
    #[command(visible_alias = "ls")]
    List(List),
    /// Show everything about one image
    Show(show::Show),
    /// Give an image another name
    Tag(Tag),
    /// Remove names of images, and images
    #[command(alias = "remove")]
    Rm(Rm),
    /// Rebuild an image's index from its tree
    Index(upkeep::Index),
    /// Check every byte of every image, and report what is damaged
    Verify(upkeep::Verify),
    /// Remove what nothing uses any more
    Gc(upkeep::Gc),
    /// Show how much space images take on disk
    Du(upkeep::Du),
    /// Write an image as an archive or a layout
    Export(upkeep::Export),
    /// Make a new image of one layer from an image of many
    Flatten(upkeep::Flatten),
}

#[derive(Debug, Args)]
#[command(after_help = "\
PATH is an AppC image (ACI), an OCI layout or a docker archive, each as a tar (plain, gzip, bzip2, xz or zstd, told by its content; - is an ACI on \
standard input) or unpacked as a directory; a directory holding `manifest` and `rootfs`; or a root filesystem by itself, as a directory or a tar (then \
--name is needed). The id of an ACI is sha512- and the SHA-512 of the uncompressed tar, that of an OCI image its manifest's digest. An image that is there \
already is not imported twice.

An image gets the name that you give, or the names that it came with. A name that another image has stays with that one unless you say \
--replace; `fsprov image show NAME` then tells what it meant before.

Examples:
  fsprov image import debian.aci
  fsprov image import ./rootfs --name example.com/debian
  mmdebstrap bookworm debian.tar && fsprov image import debian.tar --name debian
  fsprov image import debian.aci --signature debian.aci.asc
  curl -s https://example.com/debian.aci | fsprov image import - --expect sha512-...")]
struct Import {
    /// The archive or directory
    path: PathBuf,
    /// Name it so, in place of its own name
    #[arg(long)]
    name: Option<String>,
    /// Take the name away from the image that has it now
    #[arg(long)]
    replace: bool,
    /// Refuse the image unless it has this id
    #[arg(long, value_name = "ID")]
    expect: Option<ImageId>,
    /// Which image of an OCI layout or docker archive that has several: its name or tag there
    #[arg(long, value_name = "NAME")]
    reference: Option<String>,
    /// The platform to take of an OCI image for several [default: this host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    /// Accept a manifest that breaks the rules in ways that Apache Mesos accepts, and warn
    #[arg(long)]
    lenient: bool,
    /// The archive's detached OpenPGP signature, if a keyring is configured [default: PATH.asc]
    #[arg(long, value_name = "FILE")]
    signature: Option<PathBuf>,
    /// Accept it without a signature, even though a keyring is configured
    #[arg(long, conflicts_with = "signature")]
    no_signature: bool,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
#[command(
    after_help = "An image with several names has a row for each.\n\nExamples:\n  fsprov image list\n  fsprov image list --json"
)]
struct List {
    /// Print the ids alone
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fsprov image tag docker.io/library/debian:12 base")]
struct Tag {
    /// Its name, its id, or the beginning of its id
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: OsString,
    /// The names it gets beside those it has
    #[arg(required = true)]
    name: Vec<String>,
    /// Take the name from the image that has it
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = "\
A name is taken away; the image goes with its last name, or when its id is given. An image that a rootfs uses stays (exit code 4). \
Layers of an OCI image stay for other images: `fsprov image gc` removes those that no image names.

Examples:
  fsprov image rm debian
  fsprov image rm --force debian
  fsprov image rm $(fsprov image list -q)")]
struct Rm {
    /// Its name, its id, or the beginning of its id
    #[arg(required = true, add = ArgValueCompleter::new(complete::images))]
    image: Vec<OsString>,
    /// Remove the image with all its names, and do not mind if there is none
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    format: Format,
}

impl Image {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let settings = settings()?;
        let store = Store::open(&global.paths()?)?.with_policy(settings.policy());
        let makes = matches!(&self.verb, Verb::Import(_) | Verb::Pull(_) | Verb::Fetch(_) | Verb::Flatten(_));
        let _undoing = makes.then(|| Undoing::on_signal(global, None)).transpose()?;
        match &self.verb {
            Verb::Import(verb) => verb.run(&store),
            Verb::Pull(verb) => verb.run(&store, &settings),
            Verb::Fetch(verb) => verb.run(&store, &settings),
            Verb::List(verb) => verb.run(&store),
            Verb::Show(verb) => verb.run(&store),
            Verb::Tag(verb) => verb.run(&store),
            Verb::Rm(verb) => verb.run(&store),
            Verb::Index(verb) => verb.run(&store),
            Verb::Verify(verb) => verb.run(&store),
            Verb::Gc(verb) => verb.run(&store),
            Verb::Du(verb) => verb.run(&store),
            Verb::Export(verb) => verb.run(&store),
            Verb::Flatten(verb) => verb.run(&store),
        }
    }
}

#[derive(Serialize)]
struct ImportReport<'a> {
    id: &'a ImageId,
    name: &'a str,
    outcome: Outcome,
    on_disk: OnDisk,
    warnings: &'a [String],
}

impl<'a> ImportReport<'a> {
    fn new(done: &'a Imported) -> Self {
        ImportReport {
            id: &done.id,
            name: &done.name,
            outcome: done.outcome,
            on_disk: done.on_disk,
            warnings: &done.warnings,
        }
    }
}

impl Import {
    fn run(&self, store: &Store) -> Result<()> {
        let bar = bar("importing");
        let options = ImportOptions {
            name: self.name.clone(),
            held: if self.replace { Held::Replace } else { Held::Refuse },
            expected_id: self.expect.clone(),
            strictness: if self.lenient { Strictness::Lenient } else { Strictness::Strict },
            reference: self.reference.clone(),
            platform: self.platform.clone(),
            limits: store.policy().limits.clone(),
            signature: match &self.signature {
                Some(file) => Signature::File(file.clone()),
                None if self.no_signature => Signature::Waived,
                None => Signature::Beside,
            },
            progress: Some(show_on(&bar)),
        };
        let imported = store.import(&ImageSource::at(&self.path)?, &options);
        bar.finish_and_clear();
        report(&imported?, self.format)
    }
}

/// Say what was imported.
pub(super) fn report(done: &Imported, format: Format) -> Result<()> {
    if done.on_disk == OnDisk::IndexOnly {
        log::info!("owners, modes or devices that you may not set are kept in the index: the fuse backend shows them");
    }
    if format.json {
        return output::json(&ImportReport::new(done));
    }
    let how = match done.outcome {
        Outcome::Created => "imported",
        Outcome::Existing => "already in the store:",
    };
    output::line(&format!("{how} {} ({})", done.name, done.id))
}

/// A bar for the bytes of what `doing` says.
fn bar(doing: &'static str) -> ProgressBar {
    ProgressBar::no_length().with_style(bar_style()).with_prefix(doing)
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// indicatif draws on stderr, and only if that is a terminal.
fn show_on(bar: &ProgressBar) -> ProgressFn {
    let bar = bar.clone();
    Arc::new(move |progress| {
        if let Some(total) = progress.total {
            bar.set_length(total);
        }
        bar.set_position(progress.read);
    })
}

impl List {
    fn run(&self, store: &Store) -> Result<()> {
        let images = store.list()?;
        if self.format.json {
            return output::json(&images);
        }
        if self.quiet {
            return images.iter().try_for_each(|meta| output::line(meta.id.digits()));
        }
        let row = |name: &str, meta: &Meta| {
            [
                name.to_owned(),
                meta.label("version").unwrap_or("-").to_owned(),
                meta.id.digits().to_owned(),
                output::size(meta.bytes),
                output::date(meta.imported_at),
            ]
        };
        let mut rows = Vec::new();
        for meta in &images {
            rows.extend(meta.names.iter().map(|name| row(name, meta)));
            rows.extend(meta.names.is_empty().then(|| row("-", meta)));
        }
        rows.sort();
        output::table(["NAME", "VERSION", "ID", "SIZE", "IMPORTED"], &rows)
    }
}

impl Tag {
    fn run(&self, store: &Store) -> Result<()> {
        let held = if self.replace { Held::Replace } else { Held::Refuse };
        let meta = store.tag(&ImageRef::parse(&self.image)?, &self.name, held)?;
        if self.format.json {
            return output::json(&meta);
        }
        output::line(&format!("{} is now also named {}", meta.id.short(), self.name.join(", ")))
    }
}

/// What `image rm` did to one argument, as JSON.
#[derive(Serialize)]
struct Removed {
    id: ImageId,
    /// The names that are gone.
    names: Vec<String>,
    /// Is the image gone too?
    image: bool,
}

impl Rm {
    fn run(&self, store: &Store) -> Result<()> {
        let mut removed = Vec::new();
        let done = output::each("remove images", &self.image, |image| {
            let done = match self.remove(store, &ImageRef::parse(image)?) {
                Err(error) if self.force && error.kind() == Kind::NotFound => return Ok(()),
                other => other?,
            };
            if !self.format.json {
                let names = done.names.join(" ");
                output::line(&if done.image {
                    format!("removed {names} ({})", done.id)
                } else {
                    format!("removed the name {names}; {} has others", done.id.short())
                })?;
            }
            removed.push(done);
            Ok(())
        });
        if self.format.json {
            output::json(&removed)?;
        }
        done
    }

    fn remove(&self, store: &Store, image: &ImageRef) -> Result<Removed> {
        if !self.force
            && let Some((name, left)) = store.untag(image)?
        {
            return Ok(Removed { id: left.id, names: vec![name], image: false });
        }
        let gone = store.remove(image, &|| image_uses(store))?;
        Ok(Removed { id: gone.id, names: gone.names, image: true })
    }
}

/// Which images rootfses use.
fn image_uses(store: &Store) -> Result<Vec<Use>> {
    let all = images_in_use(store.paths())?;
    Ok(all.into_iter().map(|(image, by)| Use { image, by: format!("rootfs {by}") }).collect())
}
