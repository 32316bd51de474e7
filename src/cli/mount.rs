//! `fsprov mount`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum as _};

use super::shown::Shown;
use super::{BackendChoice, Format, Global, output, settings};
use crate::backend::Detach;
use crate::config::Settings;
use crate::error::{Error, Kind, Result, show};
use crate::id::{ContainerId, ImageRef};
use crate::idmap::{self, MapArg};
use crate::plan::Live;
use crate::provisioner::{Condition, Provisioner, Record, Request, Selector};
use crate::sys::signals::Termination;
use crate::volume::{self, ContainerPath, VolumeSpec};

/// Largest `--volume-ttl`: beyond a day a change on the host might as well never be seen.
const MAX_TTL_S: f64 = 86_400.0;

#[derive(Debug, Args)]
#[command(after_help = format!("\
IMAGE is a path when it begins with /, ./ or ../: a directory that is a root filesystem, a directory holding \
`manifest` and `rootfs`, or an .aci; else a name or id of `fsprov image list`.

{}

Examples:
  fsprov mount debian /mnt/debian
  fsprov mount --sandbox work -v tmp:/tmp -v home:/home -v /etc/resolv.conf:/etc/resolv.conf:ro debian rootfs
  fsprov mount --sandbox work -v var:/var:rw,copy -v etc:/etc:rw,copy debian rootfs
  fsprov mount --backend fuse --foreground ./some/rootfs /mnt/x", volume::help()))]
pub(super) struct Mount {
    /// How to make the rootfs [default: auto, or what the configuration says]
    #[arg(long, value_enum, value_name = "BACKEND")]
    backend: Option<BackendChoice>,
    /// The executor work directory: relative volume sources lie below it
    #[arg(long, value_name = "DIR")]
    sandbox: Option<PathBuf>,
    /// Route DST inside the rootfs to SRC on this host (repeatable)
    #[arg(short, long = "volume", value_name = volume::GRAMMAR)]
    volumes: Vec<OsString>,
    /// Name the rootfs [default: twelve random hex digits]
    #[arg(long, value_name = "ID")]
    id: Option<ContainerId>,
    /// Present user ids CONTAINER.. as HOST.. (repeatable), or `auto`: root is you, the rest are your subordinate ids
    #[arg(long, value_name = "CONTAINER:HOST:COUNT|auto")]
    uid_map: Vec<MapArg>,
    /// Likewise for group ids
    #[arg(long, value_name = "CONTAINER:HOST:COUNT|auto")]
    gid_map: Vec<MapArg>,
    /// Present everything as belonging to this user and group (fuse)
    #[arg(long, value_name = "UID:GID", value_parser = idmap::parse_squash)]
    squash: Option<(u32, u32)>,
    /// See what the host changes in a volume within this time; 0 asks each time (fuse)
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_ttl)]
    volume_ttl: Duration,
    /// Gather writes to volumes in the kernel: small writes get faster, the host sees them late (when the file is closed or
    /// synced), and its own changes of a file in use are not seen inside (fuse)
    #[arg(long)]
    writeback: bool,
    /// Stay, and unmount on SIGINT or SIGTERM
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    format: Format,
    /// The image
    image: OsString,
    /// Where its root filesystem shall appear (made if missing)
    rootfs: PathBuf,
}

impl Mount {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let request = self.request(&settings()?)?;
        let provisioner = global.provisioner()?;
        let record = if self.foreground {
            // Caught before anything is made: a signal that comes meanwhile ends the wait at once.
            let signals = Termination::catch()?;
            let record = provisioner.provision(&request)?;
            self.report(&record)?;
            return stay(&provisioner, &record, &signals);
        } else {
            provisioner.provision(&request)?
        };
        self.report(&record)
    }

    fn request(&self, configured: &Settings) -> Result<Request> {
        let backend = match self.backend {
            Some(choice) => choice,
            None => BackendChoice::from_str(&configured.backend.value, false).map_err(|_| {
                Error::new(Kind::Usage, "read configuration", &configured.backend.origin, "backend names none")
                    .hint("it is one of auto, bind, fuse, overlay, copy")
            })?,
        };
        let mut volumes = self.volumes.iter().map(|v| VolumeSpec::parse(v)).collect::<Result<Vec<_>>>()?;
        // What the user says for a place replaces what the configuration says for it.
        let defaults = configured.default_volumes()?;
        volumes.extend(defaults.into_iter().filter(|d| !self.targets(&d.target)));
        Ok(Request {
            image: ImageRef::parse(&self.image)?,
            rootfs: self.rootfs.clone(),
            backend: backend.asked(),
            sandbox: self.sandbox.clone(),
            volumes,
            id: self.id.clone(),
            ownership: idmap::ownership(
                &self.uid_map,
                &self.gid_map,
                self.squash,
                crate::sys::process::own_ids(),
                idmap::Files::of_host(),
            )?,
            live: Live { ttl_ms: self.volume_ttl.as_millis() as u64, writeback: self.writeback },
        })
    }

    fn targets(&self, target: &ContainerPath) -> bool {
        self.volumes.iter().any(|v| VolumeSpec::parse(v).is_ok_and(|spec| spec.target == *target))
    }

    fn report(&self, record: &Record) -> Result<()> {
        if self.format.json {
            return output::json(&Shown::new(record, Condition::Ready));
        }
        output::line(&format!(
            "mounted {} at {} (id {}, backend {})",
            record.image.name.as_deref().unwrap_or(&record.image.reference),
            show(&record.plan.rootfs),
            record.plan.id,
            record.backend
        ))
    }
}

fn parse_ttl(text: &str) -> std::result::Result<Duration, String> {
    match text.parse::<f64>() {
        // The kernel is told milliseconds at the finest.
        Ok(seconds) if (0.0..=MAX_TTL_S).contains(&seconds) => {
            Ok(Duration::from_millis((seconds * 1000.0).round() as u64))
        }
        _ => Err("it is a number of seconds from 0 to 86400, such as 0.5".to_owned()),
    }
}

/// Wait for a signal, or for the server's end; then take the rootfs away.
fn stay(provisioner: &Provisioner, record: &Record, signals: &Termination) -> Result<()> {
    signals.wait(record.traces.supervisor.or(record.traces.worker))?;
    provisioner.destroy(&Selector::Id(record.plan.id.clone()), Detach::Lazy).map(|_| ())
}
