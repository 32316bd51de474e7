//! `fsprov image pull` and `fsprov image fetch`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::super::{Format, output};
use super::{ImportReport, bar, bar_style, report, show_on};
use crate::config::Settings;
use crate::error::Result;
use crate::image::Strictness;
use crate::image::discovery::Wanted;
use crate::image::oci::Platform;
use crate::pull::{self, Options, Part, PartFn, Reference};
use crate::store::{Imported, Store};

#[derive(Debug, Args)]
#[command(after_help = "\
REF is [HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST], as docker writes it: `debian` is docker.io/library/debian:latest. Logins are those of `podman login` \
and `docker login`. Registries are reached by https; one on this host also by http, and others if the configuration calls them insecure. The digest \
of everything that comes is checked, and that of every layer's uncompressed content. A keyring is for AppC images and is not asked about pulled ones.

A pull that broke off goes on where it ended. Pulling again moves the tag to the image that it means now.

Examples:
  fsprov image pull debian:12
  fsprov image pull --platform linux/arm64 registry.example.com:5000/team/app:v1
  fsprov image pull quay.io/app@sha256:...")]
pub(super) struct Pull {
    /// What to pull
    #[arg(value_name = "REF")]
    reference: Reference,
    /// The platform to take of an image for several [default: this host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = "\
NAME[:VERSION][,LABEL=VALUE...] is looked for by AppC discovery: NAME-VERSION-OS-ARCH.aci behind each of the configured discovery_prefixes (https:// \
if there are none), then where the `ac-discovery` tags of https://NAME and of what is above it lead. The version is `latest`, os and arch are this \
host's where they are not named. What comes must have that name and every label asked for; where a keyring is configured, it must have a good signature \
(.aci.asc). Images that it depends on and that the store has not are fetched first.

Examples:
  fsprov image fetch example.com/reduce-worker:1.0.0
  fsprov image fetch example.com/app:2.1,channel=beta")]
pub(super) struct Fetch {
    /// What to fetch
    #[arg(value_name = "NAME")]
    wanted: Wanted,
    /// Accept a manifest that breaks the rules in ways that Apache Mesos accepts, and warn
    #[arg(long)]
    lenient: bool,
    #[command(flatten)]
    format: Format,
}

/// Bars on stderr, one a part, and only if that is a terminal.
struct Bars {
    all: MultiProgress,
    parts: Mutex<HashMap<String, ProgressBar>>,
}

impl Bars {
    fn new() -> Arc<Self> {
        Arc::new(Bars { all: MultiProgress::new(), parts: Mutex::default() })
    }

    fn show(self: &Arc<Self>) -> PartFn {
        let bars = self.clone();
        Arc::new(move |part: Part<'_>| {
            let mut parts = bars.parts.lock().unwrap_or_else(PoisonError::into_inner);
            let bar = parts.entry(part.name.to_owned()).or_insert_with(|| {
                let name = part.name.strip_prefix("sha256:").map_or(part.name, |hex| hex.get(..12).unwrap_or(hex));
                let style =
                    ProgressStyle::with_template("{prefix:12!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}");
                let style = style.unwrap_or_else(|_| bar_style());
                bars.all.add(
                    ProgressBar::no_length().with_style(style).with_prefix(crate::printable::line(name).into_owned()),
                )
            });
            if let Some(total) = part.total {
                bar.set_length(total);
            }
            bar.set_position(part.read);
        })
    }

    fn end(&self) {
        let _ = self.all.clear();
    }
}

fn options(settings: &Settings, bars: &Arc<Bars>) -> Options {
    Options {
        limits: settings.policy().limits,
        parallel: settings.parallel_downloads.value,
        hosts: settings.registry.iter().map(|(host, setting)| (host.clone(), setting.value.clone())).collect(),
        auth_file: settings.auth_file.value.clone(),
        discovery_prefixes: settings.discovery_prefixes.value.clone(),
        parts: Some(bars.show()),
        progress: Some(show_on(&bars.all.add(bar("unpacking")))),
        ..Options::default()
    }
}

impl Pull {
    pub(super) fn run(&self, store: &Store, settings: &Settings) -> Result<()> {
        report(&pull(store, settings, &self.reference, self.platform.clone())?, self.format)
    }
}

/// Pull, with bars.
pub(in crate::cli) fn pull(
    store: &Store,
    settings: &Settings,
    reference: &Reference,
    platform: Option<Platform>,
) -> Result<Imported> {
    let bars = Bars::new();
    let pulled = pull::pull(store, reference, &Options { platform, ..options(settings, &bars) });
    bars.end();
    pulled
}

impl Fetch {
    pub(super) fn run(&self, store: &Store, settings: &Settings) -> Result<()> {
        let bars = Bars::new();
        let strictness = if self.lenient { Strictness::Lenient } else { Strictness::Strict };
        let options = Options { strictness, ..options(settings, &bars) };
        let fetched = pull::fetch(store, &self.wanted, &options);
        bars.end();
        let fetched = fetched?;
        if self.format.json {
            return output::json(&fetched.iter().map(ImportReport::new).collect::<Vec<_>>());
        }
        fetched.iter().try_for_each(|one| report(one, self.format))
    }
}
