//! `fsprov diff` and `fsprov commit`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use serde::Serialize;

use super::image::report;
use super::interrupt::Undoing;
use super::{Format, Global, complete, log_filter, output, start_log};
use crate::error::{Error, Kind, Result, show};
use crate::printable;
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
    changed: Vec<Named>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    added: Vec<Named>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    deleted: Vec<Named>,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Named(#[serde(with = "crate::pathtext")] PathBuf);

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
        if !self.format.json {
            return changes.iter().try_for_each(|change| output::line(&told(change)));
        }
        let mut listed = Listed::default();
        for change in &changes {
            let list = match change.what {
                Changed::Changed => &mut listed.changed,
                Changed::Added => &mut listed.added,
                Changed::Deleted => &mut listed.deleted,
            };
            list.push(Named(OsStr::from_bytes(&change.path).into()));
        }
        output::json(&listed)
    }
}

/// The line of a change: two paths never give the same. What would not print as it is, is quoted, and a path begins with no quote.
fn told(change: &Change) -> String {
    let path = OsStr::from_bytes(&change.path);
    let mut shown = show(path);
    if printable::line(&shown) != shown {
        shown = format!("\"{}\"", change.path.escape_ascii());
    }
    format!("{} {shown}", letter(change.what))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_paths_are_told_alike() {
        let of = |path: &[u8]| Change { what: Changed::Added, path: path.to_vec() };
        for (path, want) in [
            (&b"/a b"[..], "A /a b"),
            ("/umläut".as_bytes(), "A /umläut"),
            (b"/\xff", r#"A "/\xff""#),
            (b"/\xfe", r#"A "/\xfe""#),
            (br"/\xff", r"A /\xff"),
            (b"/a\nb", r#"A "/a\nb""#),
            (br"/a\nb", r"A /a\nb"),
            (br#"/a"b"#, r#"A "/a\"b""#),
            ("/a\u{202e}b".as_bytes(), r#"A "/a\xe2\x80\xaeb""#),
            (br"/a\u{202e}b", r"A /a\u{202e}b"),
        ] {
            let told = told(&of(path));
            assert_eq!(told, want);
            assert_eq!(printable::line(&told), want, "it is printed as it is");
        }
        let named = |path: &[u8]| Named(OsStr::from_bytes(path).into());
        let listed = Listed { added: vec![named(b"/a"), named(b"/\xff")], ..Listed::default() };
        let json = serde_json::to_string(&listed).unwrap();
        assert_eq!(json, r#"{"added":["/a",{"bytes":"2fff"}]}"#);
    }
}
