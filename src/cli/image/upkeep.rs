//! `fsprov image verify`, `gc`, `du`, `export`, `flatten`: the store looked after.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use clap_complete::engine::ArgValueCompleter;
use serde::Serialize;

use super::{Format, bar, image_uses, output, show_on};
use crate::cli::complete;
use crate::cli::interrupt::Stopping;
use crate::error::{Error, Kind, Result, show};
use crate::id::ImageRef;
use crate::store::{Held, Progress, Prune, Repair, Store};
use crate::sys::durable::make_file;

#[derive(Debug, Args)]
#[command(after_help = "\
Refused (exit code 5) if the tree on disk lacks owners, modes or devices, as it does after an import without root. A directory that is \
mounted without an import needs no index.

Example:
  fsprov image index example.com/debian")]
pub(super) struct Index {
    /// Its name, its id, or the beginning of its id
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: OsString,
    #[command(flatten)]
    format: Format,
}

impl Index {
    pub(super) fn run(&self, store: &Store) -> Result<()> {
        let meta = store.rebuild_index(&ImageRef::parse(&self.image)?)?;
        if self.format.json {
            return output::json(&[meta.id]);
        }
        output::line(&format!("indexed {} ({})", meta.names.join(" "), meta.id))
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Exit code 1 if anything is left damaged. With --repair, what is damaged is moved out of the way into the state root's `aside` \
directory, and images that came from a file or directory of this host are imported from there again, if it is still the same.

Example:
  fsprov image verify --json")]
pub(super) struct Verify {
    /// Move what is damaged aside, and import it again from where it came
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    format: Format,
}

impl Verify {
    pub(super) fn run(&self, store: &Store) -> Result<()> {
        let bar = bar("verifying");
        let told = show_on(&bar);
        let found = store.verify_told(if self.repair { Repair::Reimport } else { Repair::No }, &*told)?;
        bar.finish_and_clear();
        if self.format.json {
            output::json(&found)?;
        } else {
            let rows: Vec<_> = found
                .iter()
                .map(|d| {
                    let done = match (d.reimported, d.set_aside) {
                        (true, _) => "imported again",
                        (_, true) => "set aside",
                        _ => "-",
                    };
                    [
                        d.id.as_ref().map_or("-", |id| id.short()).to_owned(),
                        show(Path::new(&d.part)),
                        d.what.clone(),
                        done.to_owned(),
                    ]
                })
                .collect();
            output::table(["ID", "PART", "DAMAGE", "REPAIR"], &rows)?;
        }
        let left = found.iter().filter(|d| !d.set_aside).count();
        if left == 0 && self.format.json {
            return Ok(());
        }
        if left == 0 {
            let (bytes, _) = store.total_bytes()?;
            let count = store.ids()?.len();
            if !found.is_empty() {
                return Ok(());
            }
            return output::line(&format!(
                "verified {}, {}: all is well",
                output::counted(count, "image"),
                output::size(bytes)
            ));
        }
        Err(Error::new(Kind::Integrity, "verify the store", "", format!("{left} damaged, see above"))
            .hint("`fsprov image verify --repair` sets the damaged images aside; then import them again"))
    }
}

#[derive(Debug, Args)]
#[command(
    alias = "prune",
    after_help = "\
Removes layers that no image uses and what interrupted imports left behind; with --unused also every image that no rootfs uses, with
--aside also the damaged images that `verify --repair` set aside.

Examples:
  fsprov image gc
  fsprov image gc --unused --json"
)]
pub(super) struct Gc {
    /// Remove images that no rootfs uses, too
    #[arg(long)]
    unused: bool,
    /// Only those imported at least this many days ago
    #[arg(long, value_name = "DAYS", requires = "unused")]
    older_than: Option<u32>,
    /// Remove damaged images that were set aside, too
    #[arg(long)]
    aside: bool,
    #[command(flatten)]
    format: Format,
}

impl Gc {
    pub(super) fn run(&self, store: &Store) -> Result<()> {
        let prune = match (self.unused, self.older_than) {
            (false, _) => Prune::Garbage,
            (true, None) => Prune::UnusedImages,
            (true, Some(days)) => Prune::UnusedOlderThan { seconds: u64::from(days) * 24 * 3600 },
        };
        let mut done = store.gc(prune, &|| image_uses(store))?;
        if self.aside {
            let bytes;
            (done.set_aside, bytes) = store.remove_set_aside(&|| image_uses(store))?;
            done.bytes += bytes;
        }
        if self.format.json {
            return output::json(&done);
        }
        output::line(&format!(
            "removed {}, {}, {}{}: {}",
            output::counted(done.images.len(), "image"),
            output::counted(done.layers.len(), "layer"),
            output::counted(done.staging, "half-made import"),
            if self.aside { format!(", {} set aside", done.set_aside) } else { String::new() },
            output::size(done.bytes)
        ))
    }
}

#[derive(Debug, Args)]
#[command(
    after_help = "OWN is what you get back by removing the image; SHARED is in layers that other images use too.\n\nExample:\n  fsprov image du"
)]
pub(super) struct Du {
    #[command(flatten)]
    format: Format,
}

impl Du {
    pub(super) fn run(&self, store: &Store) -> Result<()> {
        let all = store.usage()?;
        if self.format.json {
            return output::json(&all);
        }
        let mut rows: Vec<_> = all
            .iter()
            .map(|u| {
                [
                    u.id.short().to_owned(),
                    if u.names.is_empty() { "(layer)".to_owned() } else { u.names.join(" ") },
                    output::size(u.own_bytes),
                    output::size(u.shared_bytes),
                ]
            })
            .collect();
        let (total, set_aside) = store.total_bytes()?;
        rows.push(["-".into(), "(all, what is shared once)".into(), output::size(total), String::new()]);
        if set_aside > 0 {
            rows.push(["-".into(), "(set aside as damaged)".into(), output::size(set_aside), String::new()]);
        }
        output::table(["ID", "NAME", "OWN", "SHARED"], &rows)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum ExportFormat {
    /// An AppC image
    #[default]
    Aci,
    /// An OCI image layout, a directory
    Oci,
    /// The root filesystem alone
    Tar,
}

#[derive(Debug, Args)]
#[command(after_help = "\
True owners, modes and devices are written, also of an image that an ordinary user imported. Nothing is compressed. PATH must not exist; \
- is standard output.
Of an OCI image an ACI has the files and the labels, not the command, environment and user; an OCI layout keeps all of them.

Examples:
  fsprov image export example.com/debian debian.aci
  fsprov image export --format tar example.com/debian - | tar -tv
  fsprov image export --format oci example.com/debian ./debian-layout")]
pub(super) struct Export {
    /// As what
    #[arg(long, value_enum, default_value_t)]
    format: ExportFormat,
    /// Its name, its id, or the beginning of its id
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: OsString,
    /// The file or directory to make, or - for standard output
    path: PathBuf,
}

impl Export {
    pub(super) fn run(&self, store: &Store) -> Result<()> {
        let image = ImageRef::parse(&self.image)?;
        if self.path == Path::new("-") {
            return self.to_stdout(store, &image);
        }
        if std::fs::symlink_metadata(&self.path).is_ok() {
            return Err(
                Error::new(Kind::Exists, "export to", show(&self.path), "it exists").hint("choose another PATH")
            );
        }
        let bar = bar("exporting");
        bar.set_length(store.show(&image)?.0.bytes);
        match self.format {
            ExportFormat::Oci => self.to_layout(store, &image, &*show_on(&bar)),
            ExportFormat::Aci => make_file(&self.path, |out| store.export_aci(&image, &mut bar.wrap_write(out))),
            ExportFormat::Tar => make_file(&self.path, |out| store.export_tar(&image, &mut bar.wrap_write(out))),
        }?;
        bar.finish_and_clear();
        let size = output::size(crate::sys::usage::measure(&self.path)?.bytes);
        output::line(&format!("exported {image} to {} ({size})", show(&self.path)))
    }

    /// A directory: one that is half made is taken away again, also when this is interrupted.
    fn to_layout(&self, store: &Store, image: &ImageRef, show: &dyn Fn(Progress)) -> Result<()> {
        let stopping = Stopping::on_signal()?;
        let done = store.export_oci_told(image, &self.path, &|progress| {
            show(progress);
            stopping.check()
        });
        stopping.end(done)
    }

    fn to_stdout(&self, store: &Store, image: &ImageRef) -> Result<()> {
        let refuse = |why: &'static str| Err(Error::new(Kind::Usage, "export to", "standard output", why));
        let out = &mut std::io::stdout().lock();
        if std::io::IsTerminal::is_terminal(out) {
            return refuse("it is a terminal; redirect it, or give a PATH");
        }
        match self.format {
            ExportFormat::Oci => refuse("an OCI layout is a directory; give a PATH, or use --format aci or tar"),
            ExportFormat::Aci => store.export_aci(image, out),
            ExportFormat::Tar => store.export_tar(image, out),
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
The bind backend takes images of one layer only; others show many layers merged.

Example:
  fsprov image flatten registry.example/app --name example.com/app-flat")]
pub(super) struct Flatten {
    /// Its name, its id, or the beginning of its id
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: OsString,
    /// The new image's name
    #[arg(long)]
    name: String,
    /// Take the name from the image that has it
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Flattened {
    id: String,
    name: String,
}

impl Flatten {
    pub(super) fn run(&self, store: &Store) -> Result<()> {
        let held = if self.replace { Held::Replace } else { Held::Refuse };
        let done = store.flatten(&ImageRef::parse(&self.image)?, &self.name, held)?;
        if self.format.json {
            return output::json(&Flattened { id: done.id.to_string(), name: done.name });
        }
        output::line(&format!("made {} ({})", done.name, done.id))
    }
}
