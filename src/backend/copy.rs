//! The copy backend: the layers' files, copied into the rootfs directory, which is writable. Needs nothing of the host but the
//! space (and, for volumes, the right to mount); does not rely on the image afterwards.
//!
//! The directory must be empty at the start. What is in it belongs to the rootfs from then on, whoever writes it, and goes with
//! it; mounts below it that are not ours are never deleted through.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::attach::{self, Assembly, Missing, RootState};
use super::copytree::Copier;
use super::{Backend, Copied, Detach, Health, Journal, Support, Traces};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::host::Host;
use crate::index::Index;
use crate::plan::{BackendKind, Plan};
use crate::sys::durable::{self, Survives};
use crate::sys::process::holders_in_directory;
use crate::sys::{mount, mountinfo, process, remove};

/// The copy backend.
#[derive(Debug)]
pub struct Copy;

const OP: &str = "copy image to";

/// In the plan's `state_dir`, from before the first file is deleted: a copy that has lost some is not one to keep.
const DELETING: &str = "deleting";

impl Backend for Copy {
    fn kind(&self) -> BackendKind {
        BackendKind::Copy
    }

    fn host_support(&self, _: &Host) -> Support {
        Support::Yes
    }

    fn support(&self, host: &Host, plan: &Plan) -> Support {
        if let Err(e) = plan.require_layers().and_then(|()| plan.require_unfiltered()) {
            return Support::no(e.cause(), e.remedy());
        }
        let may_chown = process::effective_caps().is_ok_and(|caps| caps.contains(CapabilitySet::CHOWN));
        if !plan.ownership.is_identity() && !may_chown {
            return Support::no("only root can give files to other users", "run as root, or use --backend fuse");
        }
        match Support::from(&host.mount) {
            Support::No { reason, remedy } if !plan.volumes.is_empty() => {
                Support::no(format!("volumes in a copied rootfs are bind mounts: {reason}"), remedy)
            }
            _ => Support::Yes,
        }
    }

    fn provision(&self, _: &Host, plan: &Plan, journal: &mut dyn Journal) -> Result<()> {
        plan.require_layers()?;
        let root = open_empty(&plan.rootfs)?;
        let _ = std::fs::remove_file(plan.state_dir.join(DELETING));
        let mut traces = Traces { copied: Some(identity(&root)?), ..Traces::default() };
        journal.note(&traces)?;
        let mut assembly = None;
        let made = fill(plan, &root, &mut assembly, &mut traces, journal);
        if made.is_ok() {
            assembly.into_iter().for_each(Assembly::keep);
            return made;
        }
        // The volumes before the mount points that were made in them: dropping `assembly` removes those.
        made.map_err(|e| e.with_undo(take_away(plan, &traces, Detach::Lazy).map(|_| ())))
    }

    fn destroy(&self, _: &Host, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
        take_away(plan, traces, how)
    }

    fn health(&self, plan: &Plan, traces: &Traces, mounts: &mountinfo::Table) -> Health {
        let same = |copied: &Copied| copied.filled && is_there(plan, copied);
        let parts = traces.parts.as_deref().unwrap_or_default();
        // A volume may have brought mounts that lay in it: more parts than volumes.
        let complete = parts.len() >= plan.volumes.len() && parts.iter().all(|id| mounts.has(*id));
        if complete && traces.copied.as_ref().is_some_and(same) { Health::Ready } else { Health::Gone }
    }

    /// The files are still there, and the container's own changes with them: only the volumes are attached anew.
    fn revive(&self, plan: &Plan, traces: &Traces, journal: &mut dyn Journal) -> Result<bool> {
        let Some(copied) = traces.copied.clone().filter(|c| c.filled && is_there(plan, c)) else { return Ok(false) };
        attach::clear_stage(&plan.state_dir)?;
        attach::take_volumes_away(&plan.rootfs, traces, Detach::Lazy)?;
        let mut now = Traces { copied: Some(copied), ..Traces::default() };
        journal.note(&now)?;
        let mut assembly = None;
        match attach_volumes(plan, &mut assembly, &mut now, journal) {
            Ok(()) => {
                assembly.into_iter().for_each(Assembly::keep);
                Ok(true)
            }
            Err(e) => Err(e.with_undo(attach::take_volumes_away(&plan.rootfs, &now, Detach::Lazy).map(|_| ()))),
        }
    }
}

/// The directory that was filled, and nothing was deleted from it by us.
fn is_there(plan: &Plan, copied: &Copied) -> bool {
    let now = open_root(&plan.rootfs).ok().and_then(|root| identity(&root).ok());
    now.is_some_and(|now| now.is_same(copied)) && !plan.state_dir.join(DELETING).exists()
}

fn open_root(rootfs: &Path) -> rustix::io::Result<OwnedFd> {
    let path = attach::open_resolved_path(rootfs)?;
    fs::openat(path, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn open_empty(rootfs: &Path) -> Result<OwnedFd> {
    let fail = |e| Error::sys(OP, show(rootfs), e);
    let root = open_root(rootfs).map_err(fail)?;
    if crate::sys::fs::is_empty(&root).map_err(fail)? {
        return Ok(root);
    }
    Err(Error::new(Kind::Exists, OP, show(rootfs), "the directory is not empty")
        .hint("a copied rootfs needs an empty directory: everything in it is deleted with it"))
}

fn identity(root: &OwnedFd) -> Result<Copied> {
    let stat = fs::fstat(root).map_err(|e| Error::sys(OP, "", e))?;
    let born = fs::statx(root, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME)
        .ok()
        .filter(|x| x.stx_mask & StatxFlags::BTIME.bits() != 0)
        .map(|x| (x.stx_btime.tv_sec, x.stx_btime.tv_nsec));
    Ok(Copied {
        dev: stat.st_dev,
        ino: stat.st_ino,
        born,
        filled: false,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
    })
}

fn fill<'a>(
    plan: &'a Plan,
    root: &OwnedFd,
    assembly: &mut Option<Assembly<'a>>,
    traces: &mut Traces,
    journal: &mut dyn Journal,
) -> Result<()> {
    fault::point("copy.layers")?;
    let layers: Vec<PathBuf> = plan.layers.iter().map(|l| l.root.clone()).collect();
    let index = plan.index.as_ref().map(|file| Index::open(&file.0)).transpose()?;
    Copier::new(root, &plan.ownership).index(index).meter(journal.meter()).run(&layers)?;
    if let Some(copied) = &mut traces.copied {
        copied.filled = true;
    }
    attach_volumes(plan, assembly, traces, journal)
}

fn attach_volumes<'a>(
    plan: &'a Plan,
    assembly: &mut Option<Assembly<'a>>,
    traces: &mut Traces,
    journal: &mut dyn Journal,
) -> Result<()> {
    if plan.volumes.is_empty() {
        traces.parts = Some(Vec::new());
        fault::point("copy.note")?;
        return journal.note(traces);
    }
    journal.note(traces)?;
    let volumes = attach::prepare(plan)?;
    let path = attach::open_mount_point(&plan.rootfs)?;
    let id = mount::mount_id(&path)?;
    let assembly = assembly.insert(Assembly::new(BackendKind::Copy, path, id, Missing::Make));
    assembly.attach(volumes, RootState::Attached)?;
    fault::point("copy.note")?;
    traces.parts = Some(mountinfo::mounts_below(&plan.rootfs)?.iter().map(|m| m.id).collect());
    journal.note(traces)
}

fn take_away(plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
    const OP: &str = "delete copied";
    let Some(copied) = &traces.copied else { return Ok(false) };
    let fail = |e| Error::sys(OP, show(&plan.rootfs), e);
    attach::clear_stage(&plan.state_dir)?;
    let root = match open_root(&plan.rootfs) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(false),
        other => other.map_err(fail)?,
    };
    let now = identity(&root)?;
    if !now.is_same(copied) {
        log::warn!("{} is not the directory that was filled: it stays as it is", show(&plan.rootfs));
        return Ok(false);
    }
    // Nothing of it is deleted under a process; where that was begun already, it goes on.
    if how == Detach::IfIdle && !plan.state_dir.join(DELETING).exists() {
        attach::refuse_in_use(&plan.rootfs, || holders_in_directory(&plan.rootfs))?;
        refuse_mounted_elsewhere(&plan.rootfs)?;
    }
    let had_volumes = attach::take_volumes_away(&plan.rootfs, traces, how)?;
    // On a full disk it must be possible to delete; should we die meanwhile, what is left may then pass for a whole copy.
    if let Err(e) = durable::write_file(&plan.state_dir.join(DELETING), b"", Survives::PowerLoss) {
        log::warn!("{e}");
    }
    fault::point("copy.remove")?;
    let mut had_files = false;
    // By descriptor: this very directory, wherever its name leads by now.
    let inside = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let names: Vec<_> = fs::Dir::read_from(&root)
        .and_then(Iterator::collect::<rustix::io::Result<Vec<_>>>)
        .map_err(fail)?
        .into_iter()
        .map(|entry| {
            std::ffi::OsString::from(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(
                entry.file_name().to_bytes(),
            ))
        })
        .filter(|name| name != "." && name != "..")
        .collect();
    for name in names {
        had_files |= remove::remove_tree(&inside.join(&name)).map_err(|e| {
            Error::new(e.kind(), OP, show(plan.rootfs.join(&name)), e.cause()).hint(e.remedy().to_owned())
        })?;
    }
    restore(&root, copied).map_err(fail)?;
    Ok(had_files || had_volumes)
}

/// Others mounted it, or something in it, on a place of theirs: what is deleted here goes there, too.
fn refuse_mounted_elsewhere(rootfs: &Path) -> Result<()> {
    let shows = mountinfo::shows(rootfs)?;
    let places: Vec<String> = mountinfo::read()?
        .iter()
        .filter(|m| shows(m) && !m.point.starts_with(rootfs))
        .map(|m| show(&m.point))
        .collect();
    if places.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::Busy, "unmount", show(rootfs), format!("it is mounted on {}, too", places.join(", ")))
        .hint("unmount those first"))
}

/// Give the directory back as it was found.
fn restore(root: &OwnedFd, copied: &Copied) -> rustix::io::Result<()> {
    let now = fs::fstat(root)?;
    if (now.st_uid, now.st_gid) != (copied.uid, copied.gid) {
        let (uid, gid) = (fs::Uid::from_raw(copied.uid), fs::Gid::from_raw(copied.gid));
        fs::chownat(root, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    }
    if now.st_mode & 0o7777 != copied.mode {
        fs::fchmod(root, Mode::from_raw_mode(copied.mode))?;
    }
    Ok(())
}
