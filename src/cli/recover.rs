//! `fsprov recover`.

use clap::Args;
use clap_complete::engine::ArgValueCompleter;

use super::{Format, Global, complete, output};
use crate::error::{Error, Kind, Result};
use crate::id::ContainerId;
use crate::provisioner::{Outcome, Recovered};

#[derive(Debug, Args)]
#[command(after_help = "\
A rootfs whose server died or whose mount is gone is mounted again; one that was half-made is taken away. With --keep, every rootfs \
that is not named is taken away. Volumes keep their content. It does no harm to run it twice.

Examples:
  fsprov recover
  fsprov recover --keep web --keep db --json")]
pub(super) struct Recover {
    /// Keep this one and destroy those not named (repeatable)
    #[arg(long, value_name = "ID", add = ArgValueCompleter::new(complete::ids))]
    keep: Vec<ContainerId>,
    #[command(flatten)]
    format: Format,
}

impl Recover {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let keep = (!self.keep.is_empty()).then_some(&self.keep[..]);
        let all = global.provisioner()?.recover(keep)?;
        if self.format.json {
            output::json(&all)?;
        } else {
            let rows: Vec<_> = all.iter().map(|r| [r.id.to_string(), describe(&r.outcome)]).collect();
            output::table(["ID", "OUTCOME"], &rows)?;
        }
        let failed = all.iter().filter(|r| matches!(r, Recovered { outcome: Outcome::Failed { .. }, .. })).count();
        if failed > 0 {
            return Err(Error::new(Kind::Io, "recover", format!("{failed} of {}", all.len()), "see above")
                .hint("remove the cause, and run it again"));
        }
        Ok(())
    }
}

fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Kept => "kept".into(),
        Outcome::Healed => "healed".into(),
        Outcome::Destroyed => "destroyed".into(),
        Outcome::Skipped => "skipped: in use by another process or mount namespace".into(),
        Outcome::Failed { reason } => format!("failed: {reason}"),
    }
}
