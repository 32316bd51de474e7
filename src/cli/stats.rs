//! `fsprov stats`.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::{Format, Global, output};
use crate::daemon::control::{self, Question};
use crate::error::Result;
use crate::plan::Plan;
use crate::provisioner::Selector;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fsprov stats rootfs\n  fsprov stats --watch 2 rootfs\n  fsprov stats --prometheus rootfs"
)]
pub(super) struct Stats {
    /// Which: its mount point or its id
    #[arg(value_name = "ROOTFS|ID")]
    which: OsString,
    /// Again every so many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = clap::value_parser!(u64).range(1..=86400))]
    watch: Option<u64>,
    /// Print the Prometheus text format
    #[arg(long, conflicts_with = "json")]
    prometheus: bool,
    /// First set how much the server logs: off, error, warn, info, debug, trace
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    #[command(flatten)]
    format: Format,
}

impl Stats {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let plan = global.provisioner()?.inspect(&Selector::parse(&self.which))?.record.plan;
        if let Some(level) = &self.log_level {
            control::ask(&plan, &Question::Level(level.clone()))?;
        }
        loop {
            let stats = control::ask(&plan, &Question::Stats)?;
            if self.format.json {
                output::json(&stats)?;
            } else if self.prometheus {
                output::text(&prometheus(&plan, &stats))?;
            } else {
                output::text(&table(&stats))?;
            }
            let Some(seconds) = self.watch else { return Ok(()) };
            std::thread::sleep(Duration::from_secs(seconds));
        }
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Single figures: name, where, what.
const FIGURES: [(&str, &str, &str); 9] = [
    ("uptime_seconds", "/worker/uptime_s", "Seconds since the worker began."),
    ("restarts_total", "/restarts", "Workers that died and were replaced."),
    ("panics_total", "/worker/panics", "Requests that ended in a panic and EIO."),
    ("nodes", "/worker/nodes", "Files of directory trees that the kernel knows."),
    ("handles", "/worker/handles", "Files and directories open through the mount."),
    ("descriptors_held", "/worker/files_held", "Descriptors held for them."),
    ("image_files_open", "/worker/image_files_open", "Files of the image's layers open."),
    ("worker_resident_bytes", "/worker/memory/resident", "Memory of the worker."),
    ("supervisor_resident_bytes", "/supervisor_memory/resident", "Memory of the supervisor."),
];

fn figure(stats: &Value, pointer: &str) -> u64 {
    stats.pointer(pointer).map_or(0, number)
}

fn requests(stats: &Value) -> impl Iterator<Item = (&String, u64)> {
    stats["worker"]["requests"].as_object().into_iter().flatten().map(|(kind, count)| (kind, number(count)))
}

fn table(stats: &Value) -> String {
    let mut text = String::new();
    for (name, pointer, _) in FIGURES {
        let _ = writeln!(text, "{name:26} {}", figure(stats, pointer));
    }
    for (kind, count) in requests(stats) {
        let _ = writeln!(text, "requests {kind:17} {count}");
    }
    let latencies = stats["worker"]["latency_us_below_power_of_two"].as_array();
    for (power, count) in latencies.into_iter().flatten().map(number).enumerate().filter(|(_, count)| *count > 0) {
        let _ = writeln!(text, "latency < {:<13} us {count}", 1_u64 << power);
    }
    text
}

/// The Prometheus text format: https://prometheus.io/docs/instrumenting/exposition_formats/
fn prometheus(plan: &Plan, stats: &Value) -> String {
    let mut text = String::new();
    let id = &plan.id;
    for (name, pointer, help) in FIGURES {
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        let _ = writeln!(text, "# HELP fsprov_{name} {help}\n# TYPE fsprov_{name} {kind}");
        let _ = writeln!(text, "fsprov_{name}{{id=\"{id}\"}} {}", figure(stats, pointer));
    }
    let _ = writeln!(text, "# HELP fsprov_requests_total FUSE requests by kind.\n# TYPE fsprov_requests_total counter");
    for (kind, count) in requests(stats) {
        let _ = writeln!(text, "fsprov_requests_total{{id=\"{id}\",kind=\"{kind}\"}} {count}");
    }
    let _ = writeln!(
        text,
        "# HELP fsprov_request_seconds How long requests took.\n# TYPE fsprov_request_seconds histogram"
    );
    let mut so_far = 0;
    for (power, count) in
        stats["worker"]["latency_us_below_power_of_two"].as_array().into_iter().flatten().map(number).enumerate()
    {
        so_far += count;
        let below = f64::from(1_u32 << power.min(31)) / 1e6;
        let _ = writeln!(text, "fsprov_request_seconds_bucket{{id=\"{id}\",le=\"{below}\"}} {so_far}");
    }
    let _ = writeln!(text, "fsprov_request_seconds_bucket{{id=\"{id}\",le=\"+Inf\"}} {so_far}");
    let _ = writeln!(text, "fsprov_request_seconds_count{{id=\"{id}\"}} {so_far}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_text_has_each_figure_once_and_cumulative_buckets() {
        let stats = serde_json::json!({
            "worker": {"uptime_s": 5, "requests": {"read": 3, "lookup": 4}, "latency_us_below_power_of_two": [1, 0, 2]},
            "restarts": 2,
        });
        let plan = Plan {
            id: "c1".parse().unwrap(),
            rootfs: "/r".into(),
            layers: Vec::new(),
            index: None,
            is_filtered: false,
            volumes: Vec::new(),
            ownership: crate::plan::Ownership::default(),
            scratch: None,
            live: crate::plan::Live::default(),
            state_dir: "/s".into(),
        };
        let text = prometheus(&plan, &stats);
        for line in [
            "fsprov_uptime_seconds{id=\"c1\"} 5",
            "fsprov_restarts_total{id=\"c1\"} 2",
            "fsprov_requests_total{id=\"c1\",kind=\"read\"} 3",
            "fsprov_request_seconds_bucket{id=\"c1\",le=\"0.000001\"} 1",
            "fsprov_request_seconds_bucket{id=\"c1\",le=\"0.000004\"} 3",
            "fsprov_request_seconds_bucket{id=\"c1\",le=\"+Inf\"} 3",
        ] {
            assert_eq!(text.lines().filter(|l| *l == line).count(), 1, "{line}\n{text}");
        }
    }
}
