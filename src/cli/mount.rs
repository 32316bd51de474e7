//! `fsprov mount`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use clap::{Args, ValueEnum as _, ValueHint};
use clap_complete::engine::ArgValueCompleter;
use indicatif::{ProgressBar, ProgressStyle};

use super::image::net::pull;
use super::interrupt::Undoing;
use super::shown::Shown;
use super::{BackendChoice, Format, Global, complete, output, service, settings};
use crate::config::Settings;
use crate::error::{Error, Kind, Result, show};
use crate::id::{ContainerId, ImageRef};
use crate::idmap::{self, MapArg};
use crate::plan::{Live, Restraint};
use crate::provisioner::{Changes, Cover, Request, Whole};
use crate::store::Store;
use crate::traces::Meter;
use crate::volume::{self, ContainerPath, VolumeSpec};

/// Largest `--volume-ttl`: beyond a day a change on the host might as well never be seen.
const MAX_TTL_S: f64 = 86_400.0;

#[derive(Debug, Args)]
#[command(after_help = format!("\
IMAGE is a name or id of `fsprov image list`, or, when it begins with /, ./ or ../, a path: a root filesystem as a directory, a directory \
that holds `manifest` and `rootfs`, an OCI layout, or an archive. NAME:VERSION,LABEL=VALUE,... chooses among AppC images of one name; \
if several fit, the one whose version is `latest` is taken, else the one imported last.

{}

Examples:
  fsprov mount debian /mnt/debian
  fsprov mount --pull -v .:/src debian:12 rootfs
  fsprov mount --sandbox work -v tmp:/tmp -v home:/home -v /etc/resolv.conf:/etc/resolv.conf:ro debian rootfs
  fsprov mount --sandbox work -v var:/var:rw,copy -v etc:/etc:rw,copy debian rootfs
  fsprov mount --backend fuse --foreground ./some/rootfs /mnt/x", volume::help()))]
pub(super) struct Mount {
    /// How to make the rootfs [default: auto, or what the configuration says]
    #[arg(long, value_enum, value_name = "BACKEND")]
    backend: Option<BackendChoice>,
    /// The work directory that volumes' sources lie below (made if missing)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    sandbox: Option<PathBuf>,
    /// Route DST inside the rootfs to SRC on this host (repeatable)
    #[arg(short, long = "volume", value_name = volume::GRAMMAR, add = ArgValueCompleter::new(complete::volumes))]
    volumes: Vec<OsString>,
    /// Pull IMAGE from its registry if the store does not have it
    #[arg(long)]
    pull: bool,
    /// Mount over ROOTFS even if it is not empty; what is in it is hidden until `unmount`
    #[arg(long)]
    over: bool,
    /// Name the rootfs [default: twelve random hex digits]
    #[arg(long, value_name = "ID")]
    id: Option<ContainerId>,
    /// Show user ids CONTAINER.. as HOST.. (repeatable); `auto`: root is you, the rest are your subordinate ids; `none`: as they
    /// are in the image [default: none for root, else auto]
    #[arg(long, value_name = "CONTAINER:HOST:COUNT|auto|none")]
    uid_map: Vec<MapArg>,
    /// Likewise for group ids
    #[arg(long, value_name = "CONTAINER:HOST:COUNT|auto|none")]
    gid_map: Vec<MapArg>,
    /// Show everything in the image as owned by this user and group (fuse)
    #[arg(long, value_name = "UID:GID", value_parser = idmap::parse_squash)]
    squash: Option<(u32, u32)>,
    /// Make all of it writable (overlay, fuse); the changes are kept in --sandbox, and `unmount` deletes them
    #[arg(long)]
    writable: bool,
    /// Make all of it writable, and keep the changes in DIR (made if missing), where the next mount of IMAGE finds them (fuse)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    upper: Option<PathBuf>,
    /// Ignore setuid bits and file capabilities of the image
    #[arg(long, conflicts_with = "suid")]
    nosuid: bool,
    /// Keep the image's device nodes from being opened
    #[arg(long)]
    nodev: bool,
    /// Leave the image's device nodes out (fuse, copy)
    #[arg(long)]
    no_devices: bool,
    /// Let the image's setuid programs and device nodes work even though other users of this host can reach ROOTFS; without it they
    /// work only below a directory that is closed to others (mode 0700)
    #[arg(long)]
    suid: bool,
    /// Make up the mount points that engines need and the image lacks (/etc/hosts, /etc/mtab, /run/.containerenv, ...), for `podman run
    /// --rootfs` and the like (fuse; in a writable rootfs, engines make them)
    #[arg(long)]
    stubs: bool,
    /// How soon the rootfs sees what the host changes in a volume; 0: at once (fuse)
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_ttl)]
    volume_ttl: Duration,
    /// Collect writes to volumes in the kernel: small writes are faster, but the host sees them late (when the file is closed or
    /// synced), and the rootfs does not see the host's changes to an open file (fuse)
    #[arg(long)]
    writeback: bool,
    /// Stay, and unmount on SIGINT or SIGTERM; a dead rootfs of the same --id is cleaned up first. Under systemd, say when it is ready
    /// (Type=notify), and keep in its descriptor store what the next start needs to go on if this one is killed
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    format: Format,
    /// The image
    #[arg(add = ArgValueCompleter::new(complete::images_and_paths))]
    image: OsString,
    /// Where to mount it (made if missing)
    #[arg(value_hint = ValueHint::DirPath)]
    rootfs: PathBuf,
}

impl Mount {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let shelved = if self.foreground { service::shelved() } else { Vec::new() };
        let settings = settings()?;
        let mut request = self.request(&settings)?;
        let provisioner = global.provisioner()?;
        if self.foreground {
            self.pull_if_asked(global, &settings, &request.image)?;
            return service::run(provisioner, &request, shelved, |whole| self.report(whole));
        }
        let pulling = self.pull.then(|| Undoing::on_signal(global, None)).transpose()?;
        self.pull_if_asked(global, &settings, &request.image)?;
        let id = request.id.take().map_or_else(ContainerId::random, Ok)?;
        // A rootfs that has this id is not ours to take back: the request is refused.
        let is_new = !global.paths()?.container(&id).dir().exists();
        let undoing = Undoing::on_signal(global, is_new.then_some(&id))?;
        drop(pulling);
        request.id = Some(id);
        let meter = Arc::new(Meter::default());
        let bar = Bar::show(&meter);
        let new_sandbox = self.missing_sandbox();
        let provisioner = provisioner.metered(meter);
        let record = provisioner.provision(&request)?;
        drop(undoing);
        // What is said next stands where the bar was.
        drop(bar);
        if let Some(sandbox) = new_sandbox {
            output::note(&format!("made the sandbox {}", show(&sandbox)));
        }
        self.report(&provisioner.whole_of(record)?)
    }

    fn request(&self, configured: &Settings) -> Result<Request> {
        let backend = match self.backend {
            Some(choice) => choice,
            None => BackendChoice::from_str(&configured.backend.value, false).map_err(|_| {
                Error::new(Kind::Usage, "read configuration", &configured.backend.origin, "not a backend")
                    .hint("it must be auto, bind, fuse, overlay or copy")
            })?,
        };
        let mut volumes = volumes(&self.volumes)?;
        // What the user says for a place replaces what the configuration says for it.
        let defaults = configured.default_volumes()?;
        volumes.extend(defaults.into_iter().filter(|d| !self.targets(&d.target)));
        Ok(Request {
            image: ImageRef::parse(&self.image)?,
            rootfs: self.rootfs.clone(),
            cover: if self.over { Cover::Allow } else { Cover::Refuse },
            backend: backend.asked(),
            sandbox: self.sandbox.clone(),
            volumes,
            id: self.id.clone(),
            changes: if self.writable || self.upper.is_some() { Changes::Ephemeral } else { Changes::Refused },
            upper: self.upper.clone(),
            ownership: idmap::ownership(
                &self.uid_map,
                &self.gid_map,
                self.squash,
                crate::sys::process::own_ids(),
                idmap::Files::of_host(),
            )?,
            restraint: self.restraint(),
            stubs: self.stubs,
            live: Live { ttl_ms: self.volume_ttl.as_millis() as u64, writeback: self.writeback },
            ends_with: None,
        })
    }

    fn pull_if_asked(&self, global: &Global, settings: &Settings, image: &ImageRef) -> Result<()> {
        if self.pull { pull_missing(global, settings, image) } else { Ok(()) }
    }

    /// The sandbox, if it is still to be made.
    fn missing_sandbox(&self) -> Option<PathBuf> {
        let sandbox = std::path::absolute(self.sandbox.as_ref()?).ok()?;
        std::fs::symlink_metadata(&sandbox).is_err().then_some(sandbox)
    }

    fn restraint(&self) -> Restraint {
        let asked = |held_back: bool| if held_back { Some(true) } else { self.suid.then_some(false) };
        Restraint {
            nosuid: asked(self.nosuid),
            nodev: asked(self.nodev),
            no_devices: self.no_devices,
            for_others: false,
        }
    }

    fn targets(&self, target: &ContainerPath) -> bool {
        self.volumes.iter().any(|v| VolumeSpec::parse(v).is_ok_and(|spec| spec.target == *target))
    }

    fn report(&self, whole: &Whole) -> Result<()> {
        if self.format.json {
            return output::json(&Shown::of(whole));
        }
        let (record, top) = (&whole.base().record, &whole.top.record);
        output::line(&format!(
            "mounted {} at {} (id {}, backend {}){}",
            record.image.name.as_deref().unwrap_or(&record.image.reference),
            show(&top.plan.rootfs),
            record.plan.id,
            top.backend,
            held_back(top.plan.restraint)
        ))
    }
}

/// Pull an image that the store does not have.
pub(super) fn pull_missing(global: &Global, settings: &Settings, image: &ImageRef) -> Result<()> {
    let ImageRef::Name(name) = image else { return Ok(()) };
    let store = Store::open(&global.paths()?)?.with_policy(settings.policy());
    match store.show(image) {
        Err(error) if error.kind() == Kind::NotFound => pull(&store, settings, &name.parse()?, None).map(|_| ()),
        other => other.map(|_| ()),
    }
}

/// The volumes that `-v` says, from this directory and home.
pub(super) fn volumes(said: &[OsString]) -> Result<Vec<VolumeSpec>> {
    let current = std::env::current_dir().map_err(|e| Error::io("find", "the current directory", e))?;
    let home = std::env::home_dir();
    said.iter().map(|v| Ok(VolumeSpec::parse(v)?.from_directory(&current, home.as_deref()))).collect()
}

/// What was held back without being asked for, and how to have it otherwise.
fn held_back(restraint: Restraint) -> &'static str {
    match (restraint.for_others, restraint.nosuid(), restraint.nodev()) {
        (true, true, true) => {
            "; nosuid and nodev, since other users of this host reach it: for its setuid programs and devices to work, use --suid, or \
             mount it below a directory that is closed to others (chmod 700)"
        }
        (true, true, false) => {
            "; nosuid, since other users of this host reach it: for its setuid programs to work, use --suid, or mount it below a \
             directory that is closed to others (chmod 700)"
        }
        (true, false, true) => {
            "; nodev, since other users of this host reach it: for its devices to work, use --suid, or mount it below a directory that \
             is closed to others (chmod 700)"
        }
        _ => "",
    }
}

/// How often the bar is redrawn.
const BAR_PAUSE: Duration = Duration::from_millis(100);

/// Shows on stderr how far copying has come, as long as it lives. Nothing if stderr is not a terminal, or if nothing is copied.
struct Bar {
    done: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Bar {
    fn show(meter: &Arc<Meter>) -> Self {
        let done = Arc::new((Mutex::new(false), Condvar::new()));
        let (meter, ended) = (Arc::clone(meter), Arc::clone(&done));
        let draw = move || {
            let bar = ProgressBar::no_length().with_style(bar_style());
            let mut over = ended.0.lock().unwrap_or_else(PoisonError::into_inner);
            while !*over {
                let all = ended.1.wait_timeout(over, BAR_PAUSE);
                over = all.unwrap_or_else(PoisonError::into_inner).0;
                let (bytes, total) = (meter.bytes.load(Ordering::Relaxed), meter.total_bytes.load(Ordering::Relaxed));
                if bytes > 0 {
                    if total > 0 {
                        bar.set_length(total.max(bytes));
                    }
                    bar.set_position(bytes);
                    let files = meter.files.load(Ordering::Relaxed);
                    let phase = if total > 0 && bytes >= total { ", writing them to disk" } else { "" };
                    bar.set_message(format!("{files} files{phase}"));
                }
            }
            bar.finish_and_clear();
        };
        let is_seen = std::io::IsTerminal::is_terminal(&std::io::stderr());
        Bar { done, thread: is_seen.then(|| std::thread::Builder::new().spawn(draw).ok()).flatten() }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        *self.done.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.done.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("copying {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn parse_ttl(text: &str) -> std::result::Result<Duration, String> {
    match text.parse::<f64>() {
        // The kernel is told milliseconds at the finest.
        Ok(seconds) if (0.0..=MAX_TTL_S).contains(&seconds) => {
            Ok(Duration::from_millis((seconds * 1000.0).round() as u64))
        }
        _ => Err("write a number of seconds from 0 to 86400, for example 0.5".to_owned()),
    }
}
