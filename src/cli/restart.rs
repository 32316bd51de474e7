//! `fsprov restart`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;

use super::{Format, Global, complete, output};
use crate::daemon::control::{self, Question};
use crate::error::{Error, Result, show};
use crate::plan::BackendKind;
use crate::provisioner::Condition;

#[derive(Debug, Args)]
#[command(after_help = "\
Open files, working directories and running programs stay good; requests in flight are answered by the new worker. The supervisor, \
which only holds the mount, stays the one that mounted.

Examples:
  fsprov restart rootfs
  fsprov restart --all")]
pub(super) struct Restart {
    /// Its mount point, its id, or the beginning of its id
    #[arg(required_unless_present = "all", conflicts_with = "all", value_name = "ROOTFS|ID", add = ArgValueCompleter::new(complete::rootfses))]
    which: Vec<OsString>,
    /// Every rootfs of the fuse backend
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    format: Format,
}

impl Restart {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let provisioner = global.provisioner()?;
        let chosen = if self.all {
            let mut all = provisioner.list_whole()?;
            all.retain(|s| {
                let served = s.base();
                served.record.backend == BackendKind::Fuse
                    && matches!(served.health, Condition::Ready | Condition::Stopped)
            });
            all
        } else {
            self.which.iter().map(|w| provisioner.inspect_whole(&provisioner.select(w)?)).collect::<Result<_>>()?
        };
        let question = Question::Restart(this_program()?);
        let mut answers = Vec::new();
        let mut first_error = None;
        for whole in &chosen {
            let (served, seen) = (&whole.base().record.plan, &whole.top.record.plan);
            // One that fails must not keep the others on the old version.
            match control::ask(served, &question) {
                Ok(answer) => {
                    if !self.format.json {
                        output::line(&format!("restarted {} (worker {})", show(&seen.rootfs), answer["worker"]))?;
                    }
                    answers.push(serde_json::json!({ "id": served.id, "workers": answer }));
                }
                Err(error) => {
                    if let Some(earlier) = first_error.replace(error) {
                        output::complain(&earlier);
                    }
                }
            }
        }
        if self.format.json {
            output::json(&answers)?;
        }
        first_error.map_or(Ok(()), Err)
    }
}

/// The installed program: what this process was started from, or what took its place since.
fn this_program() -> Result<PathBuf> {
    let path = std::env::current_exe().map_err(|e| Error::io("find", "this program", e))?;
    // The kernel marks a file that was replaced (proc(5), /proc/PID/exe); its name has the new one.
    let name = path.to_string_lossy();
    Ok(name.strip_suffix(" (deleted)").map_or_else(|| path.clone(), PathBuf::from))
}
