//! `fsprov list`.

use clap::Args;

use super::shown::Shown;
use super::{Format, Global, output};
use crate::error::{Result, show};

#[derive(Debug, Args)]
#[command(after_help = "\
STATE is one of: ready; changing (being mounted or unmounted right now); stopped (its server was stopped and does not answer); \
interrupted (its mount was cut short), dead (its server died) and gone (unmounted by hand, or this host was rebooted), which \
`fsprov unmount` cleans up; elsewhere (in another mount namespace).

Where `fsprov snapshotter` serves containerd, a second table has the mounts of its snapshots, which are containerd's to unmount.

Examples:
  fsprov list --json
  fsprov list -q")]
pub(super) struct List {
    /// Print the ids alone
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Print the mounts of containerd's snapshots alone
    #[cfg(feature = "containerd")]
    #[arg(long, conflicts_with = "quiet")]
    snapshots: bool,
    #[command(flatten)]
    format: Format,
}

impl List {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        #[cfg(feature = "containerd")]
        if self.snapshots {
            let all = crate::snapshotter::mounted(&global.paths()?)?;
            return if self.format.json { output::json(&all) } else { snapshots(&all) };
        }
        let all = global.provisioner()?.list_whole()?;
        if self.format.json {
            return output::json(&all.iter().map(Shown::of).collect::<Vec<_>>());
        }
        if self.quiet {
            return all.iter().try_for_each(|s| output::line(s.base().record.plan.id.as_str()));
        }
        let rows: Vec<_> = all
            .iter()
            .map(|s| {
                let (top, base) = (&s.top.record, &s.base().record);
                let image = base.image.name.as_deref().unwrap_or(&base.image.reference);
                [
                    base.plan.id.to_string(),
                    s.health().name().to_owned(),
                    top.backend.to_string(),
                    image.to_owned(),
                    show(&top.plan.rootfs),
                ]
            })
            .collect();
        output::table(["ID", "STATE", "BACKEND", "IMAGE", "ROOTFS"], &rows)?;
        #[cfg(feature = "containerd")]
        {
            let mounted = crate::snapshotter::mounted(&global.paths()?)?;
            if !rows.is_empty() && !mounted.is_empty() {
                output::line("")?;
            }
            snapshots(&mounted)?;
        }
        Ok(())
    }
}

/// Digits of a digest that are enough for a person.
#[cfg(feature = "containerd")]
const DIGITS: usize = 12;

#[cfg(feature = "containerd")]
fn snapshots(all: &[crate::snapshotter::Mounted]) -> Result<()> {
    let rows: Vec<_> = all
        .iter()
        .map(|one| {
            let (kind, form) = (one.kind.name().to_owned(), one.form.to_owned());
            [short(&one.snapshot), kind, form, short(&one.image), show(&one.at)]
        })
        .collect();
    output::table(["SNAPSHOT", "KIND", "FORM", "IMAGE", "MOUNTED AT"], &rows)
}

/// A name with what is a whole digest in it cut short.
#[cfg(feature = "containerd")]
fn short(name: &str) -> String {
    let is_digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
    let cut = |part: &str| {
        if part.len() == 64 && part.chars().all(is_digit) { part[..DIGITS].to_owned() } else { part.to_owned() }
    };
    let parts = name.split_inclusive(['/', ':', '@', ' ']).map(|part| {
        let end = part.trim_end_matches(['/', ':', '@', ' ']);
        format!("{}{}", cut(end), &part[end.len()..])
    });
    parts.collect()
}

#[cfg(all(test, feature = "containerd"))]
mod tests {
    use super::*;

    #[test]
    fn digests_are_cut() {
        let digest = "0123456789abcdef".repeat(4);
        for (name, want) in [
            (format!("k8s.io/12/{digest}"), "k8s.io/12/0123456789ab"),
            (format!("sha256:{digest}"), "sha256:0123456789ab"),
            (format!("a@sha256:{digest}/b"), "a@sha256:0123456789ab/b"),
            ("k8s.io/12/web".to_owned(), "k8s.io/12/web"),
            (String::new(), ""),
        ] {
            assert_eq!(short(&name), want);
        }
    }
}
