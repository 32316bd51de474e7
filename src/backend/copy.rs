//! The copy backend: the layers' files, copied into the rootfs directory, which is writable. Needs nothing of the host but the
//! space (and, for volumes, the right to mount); does not rely on the image afterwards.
//!
//! The directory must be empty at the start. What is in it belongs to the rootfs from then on, no matter who writes it, and goes
//! with it; mounts below it that are not ours are never deleted through.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{self, AtFlags, Mode, OFlags, RenameFlags, unlinkat};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::attach::{self, Assembly, Missing, RootState};
use super::copyrules::Rules;
use super::copytree::Copier;
use super::{Backend, Detach, Health, Support, detach};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::host::Host;
use crate::index::Index;
use crate::place::{Place, Places};
use crate::plan::{BackendKind, Plan};
use crate::sys::durable::{self, Survives};
use crate::sys::fs::{is_empty, make_private, path_of};
use crate::sys::holders::holders_in_directory;
use crate::sys::mountinfo::Known;
use crate::sys::remove::remove_tree_at;
use crate::sys::{mount, mountinfo, process};
use crate::traces::{Copied, Journal, Traces};

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
        let possible = plan.require_layers().and_then(|()| plan.require_unfiltered());
        if let Err(e) = possible.and_then(|()| plan.require_ending(BackendKind::Copy)) {
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

    fn provision(&self, _: &Host, plan: &Plan, places: &Places, journal: &mut Journal<'_>) -> Result<()> {
        plan.require_layers()?;
        let root = open_empty(&places.point.place)?;
        let _ = unlinkat(&places.state, DELETING, AtFlags::empty());
        let mut traces = Traces { copied: Some(identity(&places.point.place)), ..Traces::default() };
        journal.note(&traces)?;
        let mut assembly = None;
        let made = fill(plan, places, &root, &mut assembly, &mut traces, journal);
        if made.is_ok() {
            assembly.into_iter().for_each(Assembly::keep);
            return made;
        }
        // The volumes before the mount points that were made in them: dropping `assembly` removes those.
        made.map_err(|e| e.with_undo(take_away(plan, Some(&places.point.place), &traces, Detach::Lazy).map(|_| ())))
    }

    fn destroy(&self, _: &Host, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
        take_away(plan, None, traces, how)
    }

    fn health(&self, plan: &Plan, traces: &Traces, mounts: &mountinfo::Table) -> Health {
        let same =
            |copied: &Copied| copied.filled && Place::open(&plan.rootfs).is_ok_and(|now| is_whole(plan, copied, &now));
        let parts: Vec<_> = traces.parts().collect();
        let is_there_yet = |part: &Known| part.current_id().is_some_and(|id| mounts.by_id(id).is_some());
        // A volume may have brought mounts that lay in it: more parts than volumes.
        let complete = parts.len() >= plan.volumes.len() && parts.iter().all(is_there_yet);
        if complete && traces.copied.as_ref().is_some_and(same) { Health::Ready } else { Health::Gone }
    }

    fn is_worth_keeping(&self, plan: &Plan, traces: &Traces, places: &Places) -> bool {
        traces.copied.as_ref().is_some_and(|copied| copied.filled && is_whole(plan, copied, &places.point.place))
    }

    /// The files are still there, and the container's own changes with them: only the volumes are attached again.
    fn revive(&self, plan: &Plan, traces: &Traces, places: &Places, journal: &mut Journal<'_>) -> Result<()> {
        detach::clear_stage(&plan.state_dir)?;
        detach::take_volumes_away(&plan.rootfs, traces, Detach::Lazy)?;
        let mut now = Traces { copied: traces.copied.clone(), ..Traces::default() };
        journal.note(&now)?;
        let mut assembly = None;
        match attach_volumes(plan, places, &mut assembly, &mut now, journal) {
            Ok(()) => {
                assembly.into_iter().for_each(Assembly::keep);
                Ok(())
            }
            Err(e) => Err(e.with_undo(detach::take_volumes_away(&plan.rootfs, &now, Detach::Lazy).map(|_| ()))),
        }
    }
}

/// Is it the directory that was filled, and was nothing deleted from it by us?
fn is_whole(plan: &Plan, copied: &Copied, now: &Place) -> bool {
    now.identity().is_same(&copied.directory) && !plan.state_dir.join(DELETING).exists()
}

fn open_empty(root: &Place) -> Result<OwnedFd> {
    let fail = |e| Error::sys(OP, show(root.path()), e);
    let fd = root.for_reading().map_err(fail)?;
    if is_empty(&fd).map_err(fail)? {
        return Ok(fd);
    }
    Err(Error::new(Kind::Exists, OP, show(root.path()), "the directory is not empty")
        .hint("a copied rootfs needs an empty directory: everything in it is deleted with it"))
}

fn identity(root: &Place) -> Copied {
    let (uid, gid) = root.owner();
    Copied { directory: root.identity(), filled: false, mode: root.mode(), uid, gid }
}

/// Where everything is made before it is moved to its place: the owner of the rootfs directory could exchange what is made in that.
fn stage_name(plan: &Plan) -> OsString {
    format!(".fsprov-copy-{}", plan.id).into()
}

fn fill<'a>(
    plan: &'a Plan,
    places: &'a Places,
    root: &OwnedFd,
    assembly: &mut Option<Assembly<'a>>,
    traces: &mut Traces,
    journal: &mut Journal<'_>,
) -> Result<()> {
    let fail = |e| Error::sys(OP, show(&plan.rootfs), e);
    fault::point("copy.layers")?;
    let index = places.index.as_ref().map(|file| {
        let file = file.for_reading().map_err(|e| Error::sys("open index", show(file.path()), e))?;
        Index::from_file(&file.into())
    });
    let stage_name = stage_name(plan);
    let stage = make_private(root, &stage_name).map_err(fail)?;
    let meter = journal.meter.clone();
    let top = Copier::new(&stage, Rules::of(plan)).index(index.transpose()?).meter(meter).run(&places.layers)?;
    fault::point("copy.move")?;
    for name in names(&stage).map_err(fail)? {
        move_up(&stage, &name, root).map_err(fail)?;
    }
    fs::unlinkat(root, &stage_name, AtFlags::REMOVEDIR).map_err(fail)?;
    top.apply(root)?;
    if let Some(copied) = &mut traces.copied {
        copied.filled = true;
    }
    attach_volumes(plan, places, assembly, traces, journal)
}

/// Moving a directory writes its `..`: it must be open to us for that moment.
fn move_up(stage: &OwnedFd, name: &OsStr, root: &OwnedFd) -> rustix::io::Result<()> {
    let rename = || fs::renameat_with(stage, name, root, name, RenameFlags::NOREPLACE);
    match rename() {
        Err(Errno::ACCESS) => {}
        other => return other,
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = fs::openat(stage, name, flags, Mode::empty())?;
    let mode = Mode::from_raw_mode(fs::fstat(&dir)?.st_mode & 0o7777);
    // chmod refuses O_PATH descriptors; the path through /proc names this very directory.
    let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
    fs::chmod(&path, mode | Mode::RWXU)?;
    rename()?;
    fs::chmod(&path, mode)
}

/// The names in a directory that is open for reading.
fn names(dir: &OwnedFd) -> rustix::io::Result<Vec<OsString>> {
    let entries = fs::Dir::read_from(dir)?.collect::<rustix::io::Result<Vec<_>>>()?;
    let names = entries.iter().map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
    Ok(names.filter(|name| name != "." && name != "..").collect())
}

fn attach_volumes<'a>(
    plan: &'a Plan,
    places: &'a Places,
    assembly: &mut Option<Assembly<'a>>,
    traces: &mut Traces,
    journal: &mut Journal<'_>,
) -> Result<()> {
    if plan.volumes.is_empty() {
        traces.parts = Some(Vec::new());
        fault::point("copy.note")?;
        return journal.note(traces);
    }
    journal.note(traces)?;
    let volumes = attach::prepare(plan, places)?;
    let root = places.point.place.try_clone()?;
    let id = mount::mount_id(&root)?;
    let assembly = assembly.insert(Assembly::new(BackendKind::Copy, root.into(), id, Missing::Make));
    assembly.attach(volumes, RootState::Attached)?;
    traces.note_parts(assembly.parts()?);
    fault::point("copy.note")?;
    if !places.point.place.is_where_it_was()? {
        let why = "its path was changed meanwhile: it lies elsewhere now";
        return Err(Error::new(Kind::Busy, OP, show(&plan.rootfs), why));
    }
    journal.note(traces)
}

/// `opened`: the rootfs directory, where it is open; else it is looked for where it was.
fn take_away(plan: &Plan, opened: Option<&Place>, traces: &Traces, how: Detach) -> Result<bool> {
    const OP: &str = "delete copied";
    let Some(copied) = &traces.copied else { return Ok(false) };
    let fail = |e| Error::sys(OP, show(&plan.rootfs), e);
    detach::clear_stage(&plan.state_dir)?;
    let place = match opened {
        Some(opened) => Some(opened.try_clone()?),
        None => match Place::open(&plan.rootfs) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => None,
            other => Some(other.map_err(fail)?),
        },
    };
    let Some(place) = place.filter(|place| place.identity().is_same(&copied.directory)) else {
        log::warn!(
            "{} is not the directory that was filled: what was copied stays where it is now",
            show(&plan.rootfs)
        );
        return detach::take_moved_volumes_away(&plan.rootfs, traces, how);
    };
    // Where it lies by now, for the table of mounts.
    let rootfs = path_of(&place)?;
    let root = place.for_reading().map_err(fail)?;
    // Nothing of it is deleted under a process; where that was begun already, it goes on.
    if how == Detach::IfIdle && !plan.state_dir.join(DELETING).exists() {
        detach::refuse_in_use(&rootfs, || holders_in_directory(&rootfs))?;
        refuse_mounted_elsewhere(&rootfs)?;
    }
    let had_volumes = detach::take_volumes_away(&rootfs, traces, how)?;
    // On a full disk it must be possible to delete; should we die meanwhile, what is left may then pass for a whole copy.
    if let Err(e) = durable::write_file(&plan.state_dir.join(DELETING), b"", Survives::PowerLoss) {
        log::warn!("{e}");
    }
    fault::point("copy.remove")?;
    let mut had_files = false;
    // By descriptor: this very directory, wherever its name leads by now.
    for name in names(&root).map_err(fail)? {
        let path = plan.rootfs.join(&name);
        had_files |= remove_tree_at(&root, &name, &path)
            .map_err(|e| Error::new(e.kind(), OP, show(&path), e.cause()).hint(e.remedy().to_owned()))?;
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
