//! `fsprov inspect`.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;

use super::shown::{Shown, is_unsupervised};
use super::{Format, Global, complete, output};
use crate::daemon::control::{Question, ask_within};
use crate::error::{Result, show};
use crate::plan::BackendKind;
use crate::provisioner::{Condition, Whole};
use crate::volume::Access;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  fsprov inspect rootfs\n  fsprov inspect --json 3f0c9a61b2d4")]
pub(super) struct Inspect {
    /// Its mount point, its id, or the beginning of its id
    #[arg(value_name = "ROOTFS|ID", add = ArgValueCompleter::new(complete::rootfses))]
    which: OsString,
    #[command(flatten)]
    format: Format,
}

impl Inspect {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let provisioner = global.provisioner()?;
        let whole = provisioner.inspect_whole(&provisioner.select(&self.which)?)?;
        if self.format.json { output::json(&Shown::of(&whole)) } else { output::text(&describe(&whole)) }
    }
}

/// How long a server is waited for: one that is busy answers within milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which walls stand around the worker.
fn walls(told: &serde_json::Value) -> String {
    let stands = |key: &str| told[key].as_bool() == Some(true);
    let mut text: Vec<String> = [
        ("seccomp", format!("{} system calls", told["system_calls"])),
        ("landlock", "landlock".to_owned()),
        ("own_root", "a root of its own".to_owned()),
        ("devices_closed", "no devices".to_owned()),
        ("no_new_privileges", "no new privileges".to_owned()),
    ]
    .into_iter()
    .filter_map(|(key, text)| stands(key).then_some(text))
    .collect();
    text.extend(told["capabilities"].as_str().map(|hex| format!("capabilities {hex}")));
    text.join(", ")
}

fn describe(whole: &Whole) -> String {
    let (record, top, health) = (&whole.base().record, &whole.top.record, whole.health());
    let mut rows = vec![
        ("id", record.plan.id.to_string()),
        ("rootfs", show(&top.plan.rootfs)),
        ("state", health.name().to_owned()),
        ("backend", top.backend.to_string()),
        ("image", record.image.reference.clone()),
    ];
    rows.extend(record.image.id.as_ref().map(|id| ("image id", id.to_string())));
    rows.extend(record.plan.layers.iter().map(|l| ("layer", show(&l.root))));
    rows.extend(record.plan.index.iter().map(|i| ("index", show(&i.0))));
    if record.plan.id != top.plan.id {
        rows.push(("lies over", format!("{} ({})", show(&record.plan.rootfs), record.backend)));
    }
    for volume in &top.plan.volumes {
        let access = match volume.access {
            Access::Ro => "ro",
            Access::Rw => "rw",
        };
        rows.push(("volume", format!("{} <- {} ({access})", volume.target, show(&volume.source))));
    }
    if let (Some(scratch), Some(usage)) = (&top.plan.scratch, whole.top.changes) {
        rows.push(("changes", format!("{} ({}, {} files)", show(&scratch.0), output::size(usage.bytes), usage.files)));
    }
    rows.extend(record.traces.supervisor.map(|p| ("supervisor pid", p.pid.to_string())));
    rows.extend(record.traces.worker.map(|p| ("worker pid", p.pid.to_string())));
    if is_unsupervised(record, health) {
        rows.push((
            "warning",
            "its supervisor died: no other worker follows this one; unmount and mount again".to_owned(),
        ));
    }
    if health == Condition::Stopped {
        rows.push((
            "warning",
            "its worker was stopped and does not answer: kill -CONT lets it go on, fsprov restart puts another in its place"
                .to_owned(),
        ));
    }
    if health == Condition::Ready && record.backend == BackendKind::Fuse {
        match ask_within(&record.plan, &Question::Stats, PATIENCE) {
            Ok(stats) => rows.push(("walls", walls(&stats["worker"]["walls"]))),
            Err(error) => rows.push(("warning", format!("its server does not answer: {error}"))),
        }
    }
    rows.push(("created", record.created.clone()));
    output::fields(rows)
}
