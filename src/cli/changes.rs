//! `fsprov diff` and `fsprov commit`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::process::ExitCode;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use serde::Serialize;

use super::image::report;
use super::interrupt::Undoing;
use super::{Format, Global, complete, log_filter, output, start_log};
use crate::error::{Error, Kind, Result};
use crate::provisioner::{READER, made_by, read_apart};
use crate::store::{Change, Changed, Held, Said};

#[derive(Debug, Args)]
#[command(after_help = "\
Each line is a letter and a path: A was added, C was changed, D was deleted. A directory is there if itself was changed, or something in it. \
The mount points that a runtime makes for itself are left out.

Examples:
  fsprov diff rootfs
  fsprov diff --json web")]
pub(super) struct Diff {
    /// Its mount point, its id, or the beginning of its id
    #[arg(value_name = "ROOTFS|ID", add = ArgValueCompleter::new(complete::rootfses))]
    which: OsString,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The image gets the layers of the one that the rootfs was made of, its configuration and its history, and one layer with what was changed. \
Stop the programs that write to the rootfs, or pause them: a file that changes while it is read is an error, and files that belong together are \
read one after the other.

Examples:
  fsprov commit rootfs example.com/app:2
  fsprov commit --message 'with curl' web debian-curl")]
pub(super) struct Commit {
    /// Its mount point, its id, or the beginning of its id
    #[arg(value_name = "ROOTFS|ID", add = ArgValueCompleter::new(complete::rootfses))]
    which: OsString,
    /// The image's name
    name: String,
    /// Take the name away from the image that has it now
    #[arg(long)]
    replace: bool,
    /// Say whose changes they are
    #[arg(short, long)]
    author: Option<String>,
    /// Say something about them
    #[arg(short, long)]
    message: Option<String>,
    #[command(flatten)]
    format: Format,
}

/// A list as podman has it.
#[derive(Default, Serialize)]
struct Listed {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    changed: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    added: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    deleted: Vec<String>,
}

/// The process that reads changes in another user namespace. See [`crate::dispatch`].
pub(super) fn dispatch(verb: &str) -> Option<ExitCode> {
    (verb == READER).then(|| {
        start_log(&log_filter(0));
        match read_apart() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                output::complain(&error);
                ExitCode::FAILURE
            }
        }
    })
}

impl Diff {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let provisioner = global.provisioner()?;
        let changes = provisioner.changes(&provisioner.select(&self.which)?)?;
        let path = |change: &Change| std::ffi::OsStr::from_bytes(&change.path).to_string_lossy().into_owned();
        if !self.format.json {
            return changes
                .iter()
                .try_for_each(|change| output::line(&format!("{} {}", letter(change.what), path(change))));
        }
        let mut listed = Listed::default();
        for change in &changes {
            let list = match change.what {
                Changed::Changed => &mut listed.changed,
                Changed::Added => &mut listed.added,
                Changed::Deleted => &mut listed.deleted,
            };
            list.push(path(change));
        }
        output::json(&listed)
    }
}

fn letter(what: Changed) -> char {
    match what {
        Changed::Changed => 'C',
        Changed::Added => 'A',
        Changed::Deleted => 'D',
    }
}

impl Commit {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let provisioner = global.provisioner()?;
        let selector = provisioner.select(&self.which)?;
        let created = time::OffsetDateTime::now_utc()
            .format(&time::format_description::well_known::Rfc3339)
            .map_err(|e| Error::new(Kind::Io, "write the time", "", e))?;
        let said = Said {
            name: self.name.clone(),
            held: if self.replace { Held::Replace } else { Held::Refuse },
            author: self.author.clone(),
            message: self.message.clone(),
            created_by: made_by(&self.which, &self.name),
            created,
        };
        let _undoing = Undoing::on_signal(global, None)?;
        report(&provisioner.commit(&selector, &said)?, self.format)
    }
}
