//! `fsprov probe`.

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;

use super::{Format, Global, output};
use crate::backend::{self, Support};
use crate::error::Result;
use crate::host::Host;
use crate::plan::BackendKind;

#[derive(Debug, Args)]
#[command(after_help = "\
Each is found by trying, as you, here: in a container or under sudo the answer differs.

Example:
  fsprov probe --json")]
pub(super) struct Probe {
    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Report<'a> {
    auto: Option<BackendKind>,
    backends: Vec<Row>,
    host: &'a Host,
}

#[derive(Serialize)]
struct Row {
    backend: BackendKind,
    #[serde(flatten)]
    answer: Answer,
}

#[derive(Serialize)]
struct Answer {
    works: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Probe {
    pub(super) fn run(&self, _: &Global) -> Result<()> {
        let host = Host::probe();
        let rows: Vec<Row> = [BackendKind::Bind, BackendKind::Fuse, BackendKind::Overlay, BackendKind::Copy]
            .into_iter()
            .map(|backend| Row { backend, answer: answer(backend::of(backend).host_support(&host)) })
            .collect();
        let works = |kind: &BackendKind| rows.iter().any(|r| r.backend == *kind && r.answer.works);
        let auto = backend::AUTO_ORDER.into_iter().find(works);
        if self.format.json {
            return output::json(&Report { auto, backends: rows, host: &host });
        }
        output::text(&describe(auto, &rows))
    }
}

fn answer(support: Support) -> Answer {
    match support {
        Support::Yes => Answer { works: true, reason: None, remedy: None },
        Support::No { reason, remedy } => {
            Answer { works: false, reason: Some(reason), remedy: Some(remedy).filter(|r| !r.is_empty()) }
        }
    }
}

fn describe(auto: Option<BackendKind>, rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let _ = match &row.answer.reason {
            None => writeln!(text, "{:8} yes", row.backend.name()),
            Some(reason) => writeln!(text, "{:8} no: {reason}", row.backend.name()),
        };
        if let Some(remedy) = &row.answer.remedy {
            let _ = writeln!(text, "{:8}     {remedy}", "");
        }
    }
    let works = |kind: &BackendKind| rows.iter().any(|r| r.backend == *kind && r.answer.works);
    // What bind cannot do is the next one's.
    let other = backend::AUTO_ORDER.into_iter().filter(|kind| *kind != BackendKind::Bind).find(works);
    let _ = match (auto, other) {
        (Some(kind), Some(other)) if kind != other => {
            writeln!(text, "auto     {kind} for an image of one layer that has every mount point, else {other}")
        }
        (Some(kind), _) => writeln!(text, "auto     {kind}"),
        (None, _) => writeln!(text, "auto     none works here"),
    };
    text
}
