//! What the snapshotter did and has, as Prometheus's text format.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::record::Kind;
use super::snapshots::Snapshots;

/// The calls that are counted.
const CALLS: [&str; 13] = [
    "Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "Usage", "Cleanup", "List", "Apply", "Diff",
    "Check",
];

/// Of one call.
#[derive(Debug, Default)]
struct Figures {
    done: AtomicU64,
    failed: AtomicU64,
    micros: AtomicU64,
}

/// How one of them is written.
type Value = fn(&Figures) -> String;

/// Of all calls since the start.
#[derive(Debug)]
pub(super) struct Metrics {
    since: Instant,
    calls: [Figures; CALLS.len()],
}

/// Did a call do what it was asked for? AlreadyExists and NotFound are answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Went {
    Well,
    Wrong,
}

impl Metrics {
    pub(super) fn new() -> Self {
        Metrics { since: Instant::now(), calls: Default::default() }
    }

    pub(super) fn count(&self, call: &str, took: Duration, went: Went) {
        let Some(at) = CALLS.iter().position(|name| *name == call) else { return };
        let figures = &self.calls[at];
        figures.done.fetch_add(1, Relaxed);
        figures.failed.fetch_add(u64::from(went == Went::Wrong), Relaxed);
        figures.micros.fetch_add(took.as_micros() as u64, Relaxed);
    }

    /// All of it.
    pub(super) fn text(&self, snapshots: &Snapshots) -> String {
        let mut text = String::new();
        let counts = snapshots.counts();
        head(&mut text, "snapshots", "gauge", "Snapshots, by what they are.");
        for (kind, count) in [Kind::View, Kind::Active, Kind::Committed].into_iter().zip(counts.by_kind) {
            let _ = writeln!(text, "fsprov_snapshotter_snapshots{{kind=\"{}\"}} {count}", kind.name());
        }
        for (name, what, value) in [
            ("layers", "Layers of the store that snapshots are made of.", counts.layers),
            ("removed", "Removed snapshots that are still on the disk.", counts.removed),
            ("id_maps", "User namespaces for which layers are shown with other owners.", counts.maps),
            ("fuse_mounts", "FUSE mounts of what lies below snapshots.", counts.merged),
        ] {
            head(&mut text, name, "gauge", what);
            let _ = writeln!(text, "fsprov_snapshotter_{name} {value}");
        }
        head(&mut text, "uptime_seconds", "gauge", "Seconds since it began.");
        let _ = writeln!(text, "fsprov_snapshotter_uptime_seconds {}", self.since.elapsed().as_secs());
        let values: [(&str, &str, Value); 3] = [
            ("calls_total", "Calls of containerd.", |figures| figures.done.load(Relaxed).to_string()),
            ("failures_total", "Calls that failed, except those answered NotFound or AlreadyExists.", |figures| {
                figures.failed.load(Relaxed).to_string()
            }),
            ("call_seconds_total", "Time that calls took.", |figures| {
                Duration::from_micros(figures.micros.load(Relaxed)).as_secs_f64().to_string()
            }),
        ];
        for (name, what, of) in values {
            head(&mut text, name, "counter", what);
            for (call, figures) in CALLS.iter().zip(&self.calls) {
                let _ = writeln!(text, "fsprov_snapshotter_{name}{{call=\"{call}\"}} {}", of(figures));
            }
        }
        text
    }
}

fn head(text: &mut String, name: &str, kind: &str, what: &str) {
    let _ = write!(text, "# HELP fsprov_snapshotter_{name} {what}\n# TYPE fsprov_snapshotter_{name} {kind}\n");
}
