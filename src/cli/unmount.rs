//! `fsprov unmount`.

use std::ffi::OsString;

use clap::Args;

use super::{Global, output};
use crate::backend::Detach;
use crate::error::Result;
use crate::provisioner::{Condition, Provisioner, Selector};

#[derive(Debug, Args)]
#[command(after_help = "\
Volumes' content is never touched. A rootfs in use is refused (exit code 4) with the processes that use it; --lazy takes it out \
of sight at once, and it ends when its last user does.

Examples:
  fsprov unmount rootfs
  fsprov unmount --lazy 3f0c9a61b2d4
  fsprov unmount --all")]
pub(super) struct Unmount {
    /// Which: its mount point or its id
    #[arg(required_unless_present = "all", conflicts_with = "all", value_name = "ROOTFS|ID")]
    which: Vec<OsString>,
    /// Every rootfs of this state root that is mounted in this mount namespace
    #[arg(long)]
    all: bool,
    /// Take it out of sight even while it is in use
    #[arg(long)]
    lazy: bool,
}

impl Unmount {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let provisioner = global.provisioner()?;
        let how = if self.lazy { Detach::Lazy } else { Detach::IfIdle };
        let mut first_error = None;
        for selector in self.selectors(&provisioner)? {
            // One that fails must not keep the others mounted.
            if let Err(error) = unmount(&provisioner, &selector, how, self.all)
                && let Some(earlier) = first_error.replace(error)
            {
                output::complain(&earlier);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn selectors(&self, provisioner: &Provisioner) -> Result<Vec<Selector>> {
        if !self.all {
            return Ok(self.which.iter().map(|w| Selector::parse(w)).collect());
        }
        let mut all = provisioner.list()?;
        // The newest first: it may lie inside an older one.
        all.reverse();
        all.retain(|s| s.health != Condition::Elsewhere);
        Ok(all.into_iter().map(|s| Selector::Id(s.record.plan.id)).collect())
    }
}

fn unmount(provisioner: &Provisioner, selector: &Selector, how: Detach, may_be_gone: bool) -> Result<()> {
    if provisioner.destroy(selector, how)? || may_be_gone { Ok(()) } else { Err(provisioner.not_found(selector)) }
}
