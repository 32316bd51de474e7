//! The fuse backend: our own FUSE server presents the layers and the volumes, read-only except for `rw` volumes, or writable with the changes
//! in a directory of their own.
//!
//! What is done by which process: `daemon`. Here: whether it can be, and taking everything away again, whatever state it is in.

use std::time::Duration;

use rustix::process::Signal;

use super::attach::{Assembly, Missing};
use super::{Backend, Detach, Health, Support, Usage, detach, usage_of_upper};
use crate::daemon::{self, Options};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::fuse::mount::{self, Method};
use crate::host::Host;
use crate::place::Places;
use crate::plan::{BackendKind, Plan};
use crate::sys::mount::{self as sysmount, AttrSet, Unmount};
use crate::sys::mountinfo::{self, Known, MountInfo, Table};
use crate::sys::process::ProcessId;
use crate::traces::{Journal, Shelved, Traces};
use crate::volume::Form;

const TARGET: &str = "fsprov::backend::fuse";

/// The fuse backend.
#[derive(Debug)]
pub struct Fuse;

/// How long a server has to end by itself after its mount is gone.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// And after each stronger word.
const TERM_PATIENCE: Duration = Duration::from_secs(5);
/// And after SIGKILL: only the kernel is in the way.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait after a lazy unmount, which leaves the server to those who still use the rootfs.
const LAZY_PATIENCE: Duration = Duration::from_millis(500);

impl Backend for Fuse {
    fn kind(&self) -> BackendKind {
        BackendKind::Fuse
    }

    fn host_support(&self, host: &Host) -> Support {
        for finding in [&host.fuse_device].into_iter().chain((!host.mount.is_yes()).then_some(&host.fusermount)) {
            if let crate::host::Finding::No { reason, remedy } = finding {
                return Support::no(reason.clone(), remedy.clone());
            }
        }
        Support::Yes
    }

    fn support(&self, host: &Host, plan: &Plan) -> Support {
        if let no @ Support::No { .. } = self.host_support(host) {
            return no;
        }
        if plan.scratch.is_some() && plan.index.is_none() {
            return Support::no(
                "changes are laid over an image's index, and a plain directory has none",
                "import it first: `fsprov image import IMAGE`",
            );
        }
        if plan.restraint.no_devices && plan.index.is_none() {
            return Support::no(
                "an image that is a plain directory is shown with its device nodes",
                "import it first: `fsprov image import IMAGE`",
            );
        }
        if let Err(e) = check_flags(host, plan) {
            return Support::no(e.cause(), e.remedy());
        }
        if let Some(volume) = plan.volumes.iter().find(|v| !daemon::servable(v)) {
            return Support::no(
                format!(
                    "the source of volume {} is a special file, and none of /dev/{{null,zero,full,random,urandom}}",
                    volume.target
                ),
                "use --backend bind, or make the directory that holds it the volume",
            );
        }
        if plan.index.is_none() && plan.layers.len() > 1 {
            return Support::no(
                format!("the image has {} layers and no index to merge them by", plan.layers.len()),
                "make it with `fsprov image index IMAGE`",
            );
        }
        Support::Yes
    }

    fn provision(&self, host: &Host, plan: &Plan, places: &Places, journal: &mut Journal<'_>) -> Result<()> {
        self.provision_with(host, plan, places, journal, &Options::default())
    }

    fn destroy(&self, host: &Host, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
        let ours = match find(plan, traces)? {
            // A server may have mounted without anyone having written down the id.
            None => mountinfo::mounts_at(&plan.rootfs)?.into_iter().rfind(|m| is_of(m, plan)),
            found => found,
        };
        let method = Method::choose(host).ok();
        let mut was_mounted = false;
        if let Some(ours) = &ours {
            let tree = mountinfo::tree_of(mountinfo::read()?, ours.id);
            // Not written down: it was killed while it mounted the volumes, which are of this file system.
            let of_volumes = || tree.iter().filter(|m| m.dev == ours.dev).map(|m| m.id).collect();
            let parts = traces.parts.clone().unwrap_or_else(of_volumes);
            detach::check_foreign(&plan.rootfs, tree.get(1..).unwrap_or_default(), Some(&parts), how)?;
            fault::point("fuse.unmount")?;
            was_mounted = mount::unmount(ours, unmount_of(how), method.as_ref())?;
            fault::point("fuse.unmounted")?;
        }
        let patience = match how {
            Detach::Lazy if was_mounted => LAZY_PATIENCE,
            _ if was_mounted => END_PATIENCE,
            // Without a mount there is nothing that it waits for.
            _ => Duration::ZERO,
        };
        let connection = ours.map(|m| m.dev.1).or(traces.fuse_connection);
        let was_served = end_server(plan, traces, connection, patience, how == Detach::Lazy && was_mounted)?;
        Ok(was_mounted || was_served)
    }

    fn adopt(&self, plan: &Plan, traces: &Traces, shelved: Vec<Shelved>, journal: &mut Journal<'_>) -> Result<bool> {
        daemon::adopt(plan, traces, shelved, &Options::default(), journal).map(|_| true)
    }

    fn shelved(&self, plan: &Plan) -> Vec<String> {
        daemon::shelved(plan)
    }

    fn refresh(&self, plan: &Plan, traces: &Traces) -> Traces {
        let worker = daemon::worker_of(plan, traces).or(traces.worker);
        Traces { worker, ..traces.clone() }
    }

    fn usage(&self, plan: &Plan) -> Option<Usage> {
        usage_of_upper(plan)
    }

    fn health(&self, plan: &Plan, traces: &Traces, mounts: &Table) -> Health {
        let known = traces.mount().map(Known::current_id);
        let is_mounted = match known {
            Some(id) => id.and_then(|id| mounts.by_id(id)).is_some_and(|m| is_of(m, plan)),
            None => mounts.at(&plan.rootfs).iter().any(|m| is_of(m, plan)),
        };
        if !is_mounted {
            return Health::Gone;
        }
        match daemon::worker_of(plan, traces) {
            Some(worker) if worker.is_stopped() => Health::Stopped,
            Some(_) => Health::Ready,
            // Between two workers.
            None if daemon::alive(traces).next().is_some() => Health::Ready,
            None => Health::Dead,
        }
    }
}

impl Fuse {
    /// [`Backend::provision`] with a server that is run as `options` say.
    pub fn provision_with(
        &self,
        host: &Host,
        plan: &Plan,
        places: &Places,
        journal: &mut Journal<'_>,
        options: &Options,
    ) -> Result<()> {
        plan.require_layers()?;
        if let Support::No { reason, remedy } = self.support(host, plan) {
            return Err(Error::new(Kind::Unsupported, "provision", show(&plan.rootfs), reason).hint(remedy));
        }
        let method = Method::choose(host)?;
        let finish = &mut |traces: &mut Traces, journal: &mut Journal<'_>| {
            if !daemon::has_mounts_for_volumes(plan, &method) {
                return Ok(());
            }
            mount_volumes(plan, places, &method, traces)?;
            journal.note(traces)
        };
        daemon::start(plan, places, method.clone(), options, journal, finish).map(drop)
    }
}

/// Give the volumes flags of their own, then the rootfs those that it is to have. Until then it is nosuid and nodev: there is no moment
/// in which a volume lets setuid programs or devices work that it should not.
///
/// The server answers by now, and this is not one of its processes: it may wait for an answer.
fn mount_volumes(plan: &Plan, places: &Places, method: &Method, traces: &mut Traces) -> Result<()> {
    let fail = |e| Error::sys("mount volumes in", show(&plan.rootfs), e);
    let id = traces.mount_id.unwrap_or_default();
    let root = places.point.seen().map_err(fail)?;
    places.point.check_mounted(id)?;
    sysmount::make_private(&root)?;
    let clear = AttrSet { nosuid: !plan.restraint.nosuid(), nodev: !plan.restraint.nodev(), ..AttrSet::default() };
    let mut assembly = Assembly::new(BackendKind::Fuse, root, id, Missing::Refuse);
    assembly.cover(plan)?;
    traces.note_parts(assembly.parts()?);
    fault::point("fuse.volumes")?;
    match method {
        Method::Kernel { initial_user_namespace: true } => sysmount::clear_attr(assembly.root(), &clear)?,
        // Setuid works for those in the namespace alone (mnt_may_suid in fs/namespace.c), devices for nobody.
        Method::Kernel { .. } => sysmount::clear_attr(assembly.root(), &AttrSet { nodev: false, ..clear })?,
        Method::Helper(_) => {}
    }
    assembly.keep();
    Ok(())
}

/// What of the plan's flags an ordinary user's mount, or one in a user namespace, cannot have.
fn check_flags(host: &Host, plan: &Plan) -> Result<()> {
    let may_mount = host.mount.is_yes();
    if may_mount && host.initial_user_namespace {
        return Ok(());
    }
    let why = if may_mount { "in a user namespace" } else { "for an ordinary user" };
    let refuse = |what: String, cause: &str| {
        Err(Error::new(Kind::Unsupported, "mount FUSE", "", format!("{what}: a FUSE mount made {why} {cause}"))
            .hint("leave the option out, or run as root"))
    };
    if !may_mount && plan.restraint.nosuid == Some(false) {
        return refuse("--suid".into(), "is nosuid and nodev");
    }
    for volume in &plan.volumes {
        if volume.powers.suid && !may_mount {
            return refuse(format!("volume {} with suid", volume.target), "is nosuid and nodev");
        }
        if volume.powers.dev == Some(true) && volume.form != Form::Special {
            return refuse(format!("volume {} with dev", volume.target), "is nodev");
        }
        if !volume.powers.exec && !may_mount {
            return refuse(format!("volume {} with noexec", volume.target), "has the same flags everywhere");
        }
    }
    Ok(())
}

/// Is it this rootfs's mount? An id is trusted only together with type and source: kernels before 6.8 use ids again.
fn is_of(mount: &MountInfo, plan: &Plan) -> bool {
    mount::is_ours(mount, &daemon::mount_source(plan))
}

/// The mount that was written down, wherever it lies by now.
fn find(plan: &Plan, traces: &Traces) -> Result<Option<MountInfo>> {
    traces.mount().map_or(Ok(None), |known| mount::find(known, &daemon::mount_source(plan)))
}

fn unmount_of(how: Detach) -> Unmount {
    match how {
        Detach::IfIdle => Unmount::IfIdle,
        Detach::Lazy => Unmount::Lazy,
    }
}

/// See the server's processes out. `false`: there were none.
fn end_server(plan: &Plan, traces: &Traces, connection: Option<u32>, patience: Duration, in_use: bool) -> Result<bool> {
    // A worker may have followed the one that was written down first.
    let mut processes: Vec<ProcessId> = daemon::alive(traces).collect();
    processes.extend(daemon::worker_of(plan, traces).filter(|worker| !processes.contains(worker)));
    if processes.is_empty() {
        return Ok(false);
    }
    if all_gone(&processes, patience)? {
        return Ok(true);
    }
    if in_use {
        log::info!(target: TARGET, "{}: its server goes on for those who still use the rootfs, and ends with the last of them", plan.id);
        return Ok(true);
    }
    // Someone has a copy of the mount in another namespace, or it never mounted.
    fault::point("fuse.stop")?;
    for (signal, patience) in [(Signal::TERM, TERM_PATIENCE), (Signal::KILL, KILL_PATIENCE)] {
        if signal == Signal::KILL
            && let Some(minor) = connection
        {
            // Requests that wait for a server that hangs would keep it from dying.
            let _ = mount::abort(minor);
        }
        for process in &processes {
            process.send_signal(signal)?;
        }
        if all_gone(&processes, patience)? {
            return Ok(true);
        }
        log::warn!(target: TARGET, "{}: its server does not end on {signal:?}", plan.id);
    }
    Err(Error::new(Kind::Busy, "end the server of", &plan.id, "its processes do not end").hint(format!(
        "they are {}; a process that waits for a disk ends when the disk answers",
        processes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )))
}

fn all_gone(processes: &[ProcessId], patience: Duration) -> Result<bool> {
    let end = std::time::Instant::now() + patience;
    for process in processes {
        if !process.wait_gone(end.saturating_duration_since(std::time::Instant::now()))? {
            return Ok(false);
        }
    }
    Ok(true)
}
