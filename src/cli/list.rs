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

Examples:
  fsprov list --json
  fsprov list -q")]
pub(super) struct List {
    /// Print the ids alone
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    #[command(flatten)]
    format: Format,
}

impl List {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let all = global.provisioner()?.list()?;
        if self.format.json {
            return output::json(&all.iter().map(Shown::of).collect::<Vec<_>>());
        }
        if self.quiet {
            return all.iter().try_for_each(|s| output::line(s.record.plan.id.as_str()));
        }
        let rows: Vec<_> = all
            .iter()
            .map(|s| {
                let image = s.record.image.name.as_deref().unwrap_or(&s.record.image.reference);
                [
                    s.record.plan.id.to_string(),
                    s.health.name().to_owned(),
                    s.record.backend.to_string(),
                    image.to_owned(),
                    show(&s.record.plan.rootfs),
                ]
            })
            .collect();
        output::table(["ID", "STATE", "BACKEND", "IMAGE", "ROOTFS"], &rows)
    }
}
