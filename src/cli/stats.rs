//! `fsprov stats`.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

use super::{Format, Global, complete, output};
use crate::daemon::control::{self, Question};
use crate::error::{Error, Result, show};
use crate::plan::Plan;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fsprov stats rootfs\n  fsprov stats --watch 2 rootfs\n  fsprov stats --prometheus rootfs"
)]
pub(super) struct Stats {
    /// Its mount point, its id, or the beginning of its id
    #[arg(value_name = "ROOTFS|ID", add = ArgValueCompleter::new(complete::rootfses))]
    which: OsString,
    /// Repeat every SECONDS, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = clap::value_parser!(u64).range(1..=86400))]
    watch: Option<u64>,
    /// Print the Prometheus text format
    #[arg(long, conflicts_with = "json")]
    prometheus: bool,
    /// First set how much the server logs: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    #[command(flatten)]
    format: Format,
}

impl Stats {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let provisioner = global.provisioner()?;
        let plan = provisioner.inspect_whole(&provisioner.select(&self.which)?)?.base().record.plan.clone();
        if let Some(level) = &self.log_level {
            control::ask(&plan, &Question::Level(level.clone()))?;
        }
        match self.watch {
            None => self.show(&plan, &control::ask(&plan, &Question::Stats)?),
            Some(seconds) => self.watch(&plan, Duration::from_secs(seconds)),
        }
    }

    fn show(&self, plan: &Plan, stats: &Value) -> Result<()> {
        if self.format.json {
            output::json(stats)
        } else if self.prometheus {
            output::text(&prometheus(plan, stats))
        } else {
            output::text(&table(stats))
        }
    }

    /// Show them again and again, until a signal ends it, which it does at once even where the server does not answer.
    fn watch(&self, plan: &Plan, pause: Duration) -> Result<()> {
        let fail = |e| Error::io("watch", show(&plan.rootfs), e);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail)?;
        let asked = Arc::new(plan.clone());
        let done = runtime.block_on(async {
            let mut ticks = tokio::time::interval(pause);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
            loop {
                let next = async {
                    ticks.tick().await;
                    let plan = Arc::clone(&asked);
                    tokio::task::spawn_blocking(move || control::ask(&plan, &Question::Stats)).await
                };
                tokio::select! {
                    _ = terminate.recv() => return Ok(()),
                    _ = interrupt.recv() => return Ok(()),
                    stats = next => match stats {
                        Ok(stats) => self.show(plan, &stats?)?,
                        Err(e) => return Err(fail(std::io::Error::other(e))),
                    },
                }
            }
        });
        // A question that is not answered must not keep us.
        runtime.shutdown_background();
        done
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Single figures: name, where, what.
const FIGURES: [(&str, &str, &str); 11] = [
    ("uptime_seconds", "/worker/uptime_s", "Seconds since the worker began."),
    ("restarts_total", "/restarts", "Workers that died and were replaced."),
    ("panics_total", "/worker/panics", "Requests that ended in a panic and EIO."),
    ("nodes", "/worker/nodes", "Files of directory trees that the kernel knows."),
    ("handles", "/worker/handles", "Files and directories open through the mount."),
    ("descriptors_held", "/worker/files_held", "Descriptors held for them."),
    ("worker_descriptors", "/worker/descriptors", "Descriptors of the worker in all."),
    ("requests_in_progress", "/worker/in_progress", "Requests being answered."),
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
    for (wall, value) in stats["worker"]["walls"].as_object().into_iter().flatten() {
        let value = match value {
            Value::Bool(true) => "yes".to_owned(),
            Value::Bool(false) => "no".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let _ = writeln!(text, "walls {wall:20} {value}");
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
    let sum = Duration::from_micros(figure(stats, "/worker/latency_us_sum")).as_secs_f64();
    let _ = writeln!(text, "fsprov_request_seconds_sum{{id=\"{id}\"}} {sum}");
    let _ = writeln!(text, "fsprov_request_seconds_count{{id=\"{id}\"}} {so_far}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_tells_what_walls_stand_around_the_worker() {
        let walls = serde_json::json!({"seccomp": true, "landlock": false, "system_calls": 98, "capabilities": "0"});
        let text = table(&serde_json::json!({"worker": {"walls": walls}}));
        for line in [
            "walls seccomp              yes",
            "walls landlock             no",
            "walls system_calls         98",
            "walls capabilities         0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }

    #[test]
    fn prometheus_text_has_each_figure_once_and_cumulative_buckets() {
        let stats = serde_json::json!({
            "worker": {"uptime_s": 5, "requests": {"read": 3, "lookup": 4}, "latency_us_below_power_of_two": [1, 0, 2]},
            "restarts": 2,
        });
        let plan = Plan::new("c1".parse().unwrap(), "/r".into(), "/s".into());
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
        check_exposition(&text);
    }

    /// https://prometheus.io/docs/instrumenting/exposition_formats/: every family has one HELP, one TYPE, then its samples, together;
    /// a histogram has cumulative buckets up to +Inf, which equals its count, and a sum.
    fn check_exposition(text: &str) {
        let is_name = |name: &str| {
            !name.starts_with(|c: char| c.is_ascii_digit())
                && !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:".contains(&b))
        };
        assert!(text.ends_with('\n'));
        let (mut families, mut lines) = (std::collections::BTreeSet::new(), text.lines().peekable());
        while let Some(help) = lines.next() {
            let (name, said) = help.strip_prefix("# HELP ").expect(help).split_once(' ').expect(help);
            assert!(is_name(name) && !said.is_empty() && families.insert(name), "{help}");
            let kind = lines.next().and_then(|l| l.strip_prefix(&format!("# TYPE {name} "))).expect(help);
            let (mut samples, mut buckets) = (std::collections::BTreeMap::new(), Vec::new());
            while let Some(line) = lines.next_if(|l| !l.starts_with('#')) {
                let (key, value) = line.rsplit_once(' ').expect(line);
                let value: f64 = value.parse().expect(line);
                let (sample, labels) = key.strip_suffix('}').expect(line).split_once('{').expect(line);
                for label in labels.split(',') {
                    let (label, quoted) = label.split_once('=').expect(line);
                    let inner = quoted.strip_prefix('"').and_then(|q| q.strip_suffix('"')).expect(line);
                    assert!(is_name(label) && !inner.contains(['"', '\\', '\n']), "{line}");
                    if label == "le" {
                        buckets.push((if inner == "+Inf" { f64::INFINITY } else { inner.parse().expect(line) }, value));
                    }
                }
                assert!(samples.insert(key.to_owned(), value).is_none(), "twice: {line}");
                let suffix = sample.strip_prefix(name).expect(line);
                match kind {
                    "counter" => assert!(suffix.is_empty() && name.ends_with("_total") && value >= 0.0, "{line}"),
                    "gauge" => assert!(suffix.is_empty(), "{line}"),
                    "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
                    other => panic!("{other}: {line}"),
                }
            }
            if kind == "histogram" {
                assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{buckets:?}");
                let of = |suffix: &str| {
                    samples.iter().find(|(k, _)| k.starts_with(&format!("{name}{suffix}"))).map(|s| *s.1)
                };
                assert_eq!(buckets.last().copied(), of("_count").map(|count| (f64::INFINITY, count)));
                assert!(of("_sum").is_some());
            }
        }
    }
}
