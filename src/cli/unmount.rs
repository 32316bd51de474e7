//! `fsprov unmount`.

use std::ffi::OsString;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;

use super::{Global, complete, output};
use crate::backend::Detach;
use crate::error::{Result, show};
use crate::provisioner::{Condition, Provisioner, Selector};

#[derive(Debug, Args)]
#[command(after_help = "\
Volumes keep their content. Rootfses nested in this one (ID.CHILD: web.v2 is nested in web) go with it. A rootfs in use is refused \
(exit code 4), and the processes that use it are named; --lazy takes it out of sight at once, and it ends with its last user.

Examples:
  fsprov unmount rootfs
  fsprov unmount --lazy 3f0c9a61b2d4
  fsprov unmount --all")]
pub(super) struct Unmount {
    /// Its mount point, its id, or the beginning of its id
    #[arg(required_unless_present = "all", conflicts_with = "all", value_name = "ROOTFS|ID", add = ArgValueCompleter::new(complete::rootfses))]
    which: Vec<OsString>,
    /// Every rootfs of this state root that is mounted in this mount namespace
    #[arg(short, long)]
    all: bool,
    /// Take it out of sight even while it is in use
    #[arg(short, long)]
    lazy: bool,
}

impl Unmount {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let provisioner = global.provisioner()?;
        let how = if self.lazy { Detach::Lazy } else { Detach::IfIdle };
        output::each("unmount", &self.selectors(&provisioner)?, |selector| {
            unmount(&provisioner, selector, how, self.all)
        })
    }

    fn selectors(&self, provisioner: &Provisioner) -> Result<Vec<Selector>> {
        if !self.all {
            return self.which.iter().map(|w| provisioner.select(w)).collect();
        }
        let mut all = provisioner.list_whole()?;
        // The newest first: it may lie inside an older one.
        all.reverse();
        all.retain(|s| s.health() != Condition::Elsewhere);
        Ok(all.iter().map(|s| Selector::Id(s.base().record.plan.id.clone())).collect())
    }
}

fn unmount(provisioner: &Provisioner, selector: &Selector, how: Detach, may_be_gone: bool) -> Result<()> {
    let found = provisioner.with_nested(selector)?.map(|(record, nested)| {
        let (at, nested) = provisioner.seen(&record, nested);
        (at, record.plan.id, nested)
    });
    let is_done = provisioner.destroy(selector, how)?;
    match found {
        Some((at, id, nested)) if is_done => {
            let mut done = vec![format!("unmounted {} (id {id})", show(at))];
            done.extend(nested.iter().map(|id| format!("and {id}, which is nested in it")));
            output::line(&done.join(", "))
        }
        _ if is_done || may_be_gone => Ok(()),
        _ => Err(provisioner.not_found(selector)),
    }
}
