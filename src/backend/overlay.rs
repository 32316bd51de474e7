//! The overlay backend: the kernel's overlayfs over the layers, read-only, or writable with an upper layer that ends with it. A few system calls, and a walk over the directories
//! of the layers where there are several, to find their whiteouts.
//!
//! Nothing is written to a layer. What overlayfs must be told beyond them goes into layers of our own, between and above the
//! image's: whiteouts in its form (device 0:0, opaque directories), and mount points that the image lacks.
//! Mounts inside a layer's directory are not part of the rootfs (the bind backend shows them).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::surplus;
use super::whiteout::{self, HiddenDirs, Mark};
use super::{Backend, Detach, Health, Journal, Support, Traces, Usage, attach};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::host::Host;
use crate::index::Index;
use crate::plan::{BackendKind, Plan, Scratch};
use crate::sys::attrs::{self, At};
use crate::sys::fs::{open_beneath, open_in_root, path_of};
use crate::sys::mount::{self, AttrSet, Piece};
use crate::sys::mountinfo::Table;
use crate::sys::overlay::{self, Failure, Stack, Upper};
use crate::sys::{process, remove, usage};
use crate::volume::{Form, Volume};

/// The overlay backend.
#[derive(Debug)]
pub struct Overlay;

/// Most lower layers of one overlay: OVL_MAX_STACK of Linux. Ours count too.
const MAX_LAYERS: usize = 500;

const OP: &str = "make overlay of";

impl Backend for Overlay {
    fn kind(&self) -> BackendKind {
        BackendKind::Overlay
    }

    fn host_support(&self, host: &Host) -> Support {
        // It is built detached; mount_setattr alone has a substitute.
        let missing: Vec<_> = mount::missing_calls().into_iter().filter(|call| *call != "mount_setattr").collect();
        if host.mount.is_yes() && !missing.is_empty() {
            return Support::no(
                format!("this kernel, or a seccomp filter, lacks {}", missing.join(" and ")),
                "Linux 5.2; or use --backend fuse",
            );
        }
        host.overlay().into()
    }

    fn support(&self, host: &Host, plan: &Plan) -> Support {
        if let Err(e) = plan
            .require_layers()
            .and_then(|()| plan.require_unfiltered())
            .and_then(|()| check_count(plan, most_layers(plan)))
        {
            return Support::no(e.cause(), e.remedy());
        }
        if !plan.ownership.is_identity() {
            return Support::no(
                "overlayfs cannot be idmapped: it presents the owners that the layers have",
                "use --backend fuse, or --backend bind for an image of one layer",
            );
        }
        self.host_support(host)
    }

    fn provision(&self, _: &Host, plan: &Plan, journal: &mut dyn Journal) -> Result<()> {
        plan.require_layers()?;
        let work = plan.state_dir.join(WORK);
        fault::point("overlay.build")?;
        let changes = plan.scratch.as_ref().map(Changes::make).transpose()?;
        let made = build(plan, &work, changes.as_ref())
            .and_then(|root| attach::put_in_place(BackendKind::Overlay, plan, root, &AttrSet::default(), journal));
        made.map_err(|e| {
            e.with_undo(remove::remove_tree(&work).map(|_| ())).with_undo(Changes::remove(plan).map(|_| ()))
        })
    }

    fn destroy(&self, _: &Host, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
        let there = attach::take_away(plan, traces, how)?;
        fault::point("overlay.remove")?;
        let had_layers = remove::remove_tree(&plan.state_dir.join(WORK))?;
        fault::point("overlay.changes")?;
        Ok(Changes::remove(plan)? || had_layers || there)
    }

    fn usage(&self, plan: &Plan) -> Option<Usage> {
        let upper = plan.scratch.as_ref()?.0.join(UPPER);
        usage::measure(&upper).map_err(|e| log::warn!("{e}")).ok()
    }

    fn health(&self, plan: &Plan, traces: &Traces, mounts: &Table) -> Health {
        attach::health(&plan.rootfs, traces, mounts)
    }
}

/// Our own layers lie here, below the plan's `state_dir`.
const WORK: &str = "overlay";

/// Names in the directory of a rootfs's own changes ([`crate::plan::Scratch`]).
const UPPER: &str = "upper";
const UPPER_WORK: &str = "work";

/// Where a writable rootfs's changes go: overlayfs's upper layer and its work directory.
struct Changes {
    upper: OwnedFd,
    work: OwnedFd,
}

impl Changes {
    fn make(scratch: &Scratch) -> Result<Self> {
        const OP: &str = "make directory for changes";
        let top = &scratch.0;
        let make = |path: &Path| {
            // Closed to all others: a setuid program made in the rootfs must not be reached from outside.
            fs::mkdir(path, Mode::RWXU).and_then(|()| open_dir(path)).map_err(|e| Error::sys(OP, show(path), e))
        };
        make(top)?;
        Ok(Changes { upper: make(&top.join(UPPER))?, work: make(&top.join(UPPER_WORK))? })
    }

    /// `false`: there are none.
    fn remove(plan: &Plan) -> Result<bool> {
        let Some(Scratch(top)) = &plan.scratch else { return Ok(false) };
        let (Some(parent), Some(name)) = (top.parent(), top.file_name()) else { return Ok(false) };
        // The sandbox is its user's own: a symlink in its path by now leads where we have no business.
        let parent = match attach::open_resolved_path(parent) {
            Ok(parent) => parent,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(false),
            Err(e) => return Err(Error::sys("delete changes in", show(top), e)),
        };
        remove::remove_tree(&PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(name))
            .map_err(|e| Error::new(e.kind(), "delete changes in", show(top), e.cause()).hint(e.remedy().to_owned()))
    }
}

/// How many layers it may become, with ours. What shows only when they are looked at counts: here `auto` can still take another backend.
/// What layers without an index hide is found by reading them all, and is not asked here.
fn most_layers(plan: &Plan) -> usize {
    let layers = plan.layers.iter().map(|layer| &layer.root).collect::<BTreeSet<_>>().len();
    let whiteouts = usize::from(plan.index.is_some() && plan.has_whiteouts);
    (layers + whiteouts).max(2) + usize::from(!plan.volumes.is_empty())
}

fn check_count(plan: &Plan, layers: usize) -> Result<()> {
    if layers <= MAX_LAYERS {
        return Ok(());
    }
    Err(Error::new(
        Kind::Unsupported,
        OP,
        show(&plan.rootfs),
        format!("it takes {layers} layers, and overlayfs at most {MAX_LAYERS}"),
    )
    .hint("use --backend fuse, or flatten the image"))
}

/// The overlay's mount, detached.
fn build(plan: &Plan, work: &Path, changes: Option<&Changes>) -> Result<Piece> {
    fs::mkdir(work, Mode::RWXU).map_err(|e| Error::sys(OP, show(work), e))?;
    let mut stack = with_whiteouts(plan, without_repeats(plan)?, work)?;
    if stack.len() < 2 {
        // One lower layer alone is refused without an upper one.
        let empty = work.join("empty");
        fs::mkdir(&empty, Mode::from_raw_mode(0o755)).map_err(|e| Error::sys(OP, show(&empty), e))?;
        stack.insert(0, empty);
    }
    let root = mount_stack(plan, &stack, work, None)?;
    match make_skeleton(plan, &root, work)? {
        Some(skeleton) => stack.push(skeleton),
        None if changes.is_none() => return Ok(Piece::Detached(root)),
        None => {}
    }
    if let Some(changes) = changes {
        // It covers the top directory of the image: it must look the same.
        imitate(&root, &changes.upper).map_err(|e| Error::sys(OP, show(&plan.rootfs), e))?;
    }
    drop(root);
    Ok(Piece::Detached(mount_stack(plan, &stack, work, changes)?))
}

/// The layers, bottom first, each once: overlayfs refuses a repeated one (ELOOP), and images have them (empty ones above all).
/// The topmost of its places counts: there it brings and hides all that it brought and hid below.
fn without_repeats(plan: &Plan) -> Result<Vec<PathBuf>> {
    let mut seen = BTreeSet::new();
    let mut layers = Vec::with_capacity(plan.layers.len());
    for layer in plan.layers.iter().rev() {
        let stat = fs::fstat(open_layer(&layer.root)?).map_err(|e| Error::sys(OP, show(&layer.root), e))?;
        if seen.insert((stat.st_dev, stat.st_ino)) {
            layers.push(layer.root.clone());
        }
    }
    layers.reverse();
    Ok(layers)
}

// ---- whiteouts ----

/// The layers, bottom first, with what hides what the image does not have. Its index knows, and one layer of ours on top does it: that is
/// right whoever imported the layers and whoever mounts them (which of two attributes overlayfs heeds depends on that), and for layers
/// that are the lowest here and not in another image.
fn with_whiteouts(plan: &Plan, layers: Vec<PathBuf>, work: &Path) -> Result<Vec<PathBuf>> {
    let Some(file) = &plan.index else { return with_scanned_whiteouts(&layers, work) };
    if !plan.has_whiteouts {
        return Ok(layers);
    }
    let hidden = surplus::find(&Index::open(&file.0)?, &layers, opaque_xattr()?)?;
    let mut stack = layers;
    if !hidden.is_empty() {
        let ours = work.join("whiteouts");
        make_whiteouts(&ours, &hidden, &stack.iter().rev().collect::<Vec<_>>())?;
        stack.push(ours);
    }
    Ok(stack)
}

/// Of layers without an index: ours lie in between: whiteouts that one layer has for those below it lie below it, and what hides
/// the `.wh.` files themselves lies above it. Both are one layer of ours, since the one's above is the other's below.
fn with_scanned_whiteouts(layers: &[PathBuf], work: &Path) -> Result<Vec<PathBuf>> {
    if layers.len() == 1 {
        return Ok(layers.to_vec());
    }
    let mut above: Vec<HiddenDirs> = layers.iter().map(|_| HiddenDirs::new()).collect();
    for (n, layer) in layers.iter().enumerate() {
        let root = open_layer(layer)?;
        for found in whiteout::scan(&root, layer)? {
            above[n].entry(found.dir.clone()).or_default().names.extend(found.name);
            let Some(below) = n.checked_sub(1) else { continue };
            let hidden = above[below].entry(found.dir).or_default();
            match found.mark {
                Mark::Hides(name) => {
                    hidden.names.insert(name);
                }
                Mark::Opaque => hidden.opaque = true,
                Mark::Meta => {}
            }
        }
    }
    let mut stack = Vec::with_capacity(layers.len());
    for (n, layer) in layers.iter().enumerate() {
        stack.push(layer.clone());
        if above[n].is_empty() {
            continue;
        }
        let ours = work.join(format!("whiteouts-{n}"));
        // Directories of ours stand in for those of the layer above where it has them, else for those of the layer itself.
        let models: Vec<&PathBuf> = layers.iter().skip(n).take(2).rev().collect();
        make_whiteouts(&ours, &above[n], &models)?;
        stack.push(ours);
    }
    Ok(stack)
}

fn make_whiteouts(ours: &Path, hidden: &HiddenDirs, models: &[&PathBuf]) -> Result<()> {
    let fail = |e: Errno| Error::sys(OP, show(ours), e);
    fs::mkdir(ours, Mode::RWXU).map_err(fail)?;
    let root = open_dir(ours).map_err(fail)?;
    let models = models.iter().map(|m| open_layer(m)).collect::<Result<Vec<_>>>()?;
    let mut made = BTreeSet::new();
    for (dir, what) in hidden {
        // What is below a name that is gone is gone with it.
        if parts(dir).iter().any(|part| is_hidden(hidden, part)) {
            continue;
        }
        for part in parts(dir) {
            if part.as_os_str() != "." && made.insert(part.clone()) {
                fs::mkdirat(&root, &part, Mode::RWXU).map_err(fail)?;
            }
        }
        let at = open_beneath(&root, dir, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?;
        for name in &what.names {
            // Allowed without privilege since Linux 5.8.
            fs::mknodat(&at, name, FileType::CharacterDevice, Mode::empty(), 0).map_err(fail)?;
        }
        if what.opaque {
            fs::fsetxattr(&at, opaque_xattr()?, b"y", XattrFlags::empty()).map_err(fail)?;
        }
    }
    // Last, and the innermost first: making an entry changes its directory's times.
    made.insert(PathBuf::from("."));
    for dir in made.iter().rev() {
        let model = models.iter().find_map(|m| open_beneath(m, dir, OFlags::PATH | OFlags::DIRECTORY).ok());
        if let Some(model) = model {
            imitate(&model, &open_beneath(&root, dir, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?)
                .map_err(fail)?;
        }
    }
    Ok(())
}

fn is_hidden(hidden: &HiddenDirs, path: &Path) -> bool {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return false };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    hidden.get(dir).is_some_and(|what| what.names.contains(name))
}

/// Outside the first user namespace overlayfs keeps its marks in `user.` attributes (option `userxattr`, Linux 5.11).
fn opaque_xattr() -> Result<&'static str> {
    Ok(if process::in_initial_user_namespace()? { whiteout::TRUSTED_OPAQUE } else { whiteout::USER_OPAQUE })
}

/// A directory of ours covers one of the image: it must look the same.
fn imitate(model: &OwnedFd, ours: &OwnedFd) -> rustix::io::Result<()> {
    let stat = fs::fstat(model)?;
    let fidelity = attrs::copy(At::itself(model), &stat, At::itself(ours))?;
    if fidelity == attrs::Fidelity::Partial {
        log::debug!(target: "fsprov::overlay", "owner or attributes of a directory could not be taken over");
    }
    Ok(())
}

/// The path and its parents, outermost first.
fn parts(path: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = path.ancestors().filter(|p| !p.as_os_str().is_empty()).map(Path::to_path_buf).collect();
    all.reverse();
    all
}

fn open_layer(layer: &Path) -> Result<OwnedFd> {
    fs::open(layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::sys("open layer", show(layer), e))
}

fn open_dir(path: &Path) -> rustix::io::Result<OwnedFd> {
    fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

// ---- missing mount points ----

/// A layer of ours with the mount points that the image lacks; `None`: it has them all. `root` is the overlay without it.
fn make_skeleton(plan: &Plan, root: &OwnedFd, work: &Path) -> Result<Option<PathBuf>> {
    let mut missing = Vec::new();
    for (n, volume) in plan.volumes.iter().enumerate() {
        // Below another volume the image says nothing.
        let below = |outer: &Volume| volume.target.as_path().starts_with(outer.target.as_path());
        if plan.volumes[..n].iter().any(below) {
            continue;
        }
        if let Some(path) = missing_path(root, volume)? {
            missing.push((path, volume.form));
        }
    }
    if missing.is_empty() {
        return Ok(None);
    }
    let skeleton = work.join("skeleton");
    let fail = |e: Errno| Error::sys("make missing mount points in", show(&skeleton), e);
    fs::mkdir(&skeleton, Mode::from_raw_mode(0o755)).map_err(fail)?;
    let ours = open_dir(&skeleton).map_err(fail)?;
    let mut made = BTreeSet::from([PathBuf::from(".")]);
    for (path, form) in &missing {
        for part in parts(path) {
            if *form != Form::Directory && part == *path {
                match make_file(&ours, &part) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(e) => return Err(fail(e)),
                }
            } else if made.insert(part.clone()) {
                fs::mkdirat(&ours, &part, Mode::from_raw_mode(0o755)).map_err(fail)?;
            }
        }
    }
    for dir in made.iter().rev() {
        // Those that the image has must look as they do there.
        let Ok(model) = open_beneath(root, dir, OFlags::PATH | OFlags::DIRECTORY) else { continue };
        imitate(&model, &open_beneath(&ours, dir, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?).map_err(fail)?;
    }
    Ok(Some(skeleton))
}

fn make_file(dir: &OwnedFd, path: &Path) -> rustix::io::Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(dir, path, flags, Mode::from_raw_mode(0o644)).map(drop)
}

/// Where in the image the volume's mount point would have to be, symlinks resolved; `None`: it is there.
fn missing_path(root: &OwnedFd, volume: &Volume) -> Result<Option<PathBuf>> {
    const OP: &str = "mount volume";
    match open_in_root(root, volume.target.relative(), OFlags::PATH) {
        Err(Errno::NOENT) => {}
        // Whatever else is wrong is said when the volume is attached.
        _ => return Ok(None),
    }
    let names: Vec<_> = volume.target.names().collect();
    let mut prefix = PathBuf::new();
    let mut parent = root.try_clone().map_err(|e| Error::io(OP, &volume.target, e))?;
    for (n, name) in names.iter().enumerate() {
        prefix.push(name);
        match open_in_root(root, &prefix, OFlags::PATH) {
            Ok(found) => parent = found,
            Err(Errno::NOENT) => {
                // A symlink that leads nowhere: mounting refuses it by name.
                if fs::statat(&parent, *name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                    return Ok(None);
                }
                // A detached mount has no place in the file tree: the kernel gives the path from its root.
                let real = path_of(&parent)?;
                let relative: PathBuf =
                    real.components().filter(|c| matches!(c, Component::Normal(_))).chain(rest(&names[n..])).collect();
                return Ok(Some(relative));
            }
            Err(e) => return Err(Error::sys(OP, &volume.target, e)),
        }
    }
    Ok(None)
}

fn rest<'a>(names: &'a [&'a OsStr]) -> impl Iterator<Item = Component<'a>> {
    names.iter().map(|name| Component::Normal(name))
}

// ---- mounting ----

/// A detached overlay of `stack`, bottom first; writable where there is a place for `changes`.
fn mount_stack(plan: &Plan, stack: &[PathBuf], work: &Path, changes: Option<&Changes>) -> Result<OwnedFd> {
    check_count(plan, stack.len())?;
    let opened = stack.iter().map(|layer| open_layer(layer)).collect::<Result<Vec<_>>>()?;
    let upper = changes.map(|Changes { upper, work }| Upper { changes: upper.as_fd(), work: work.as_fd() });
    let stack = Stack { lower: &opened, upper };
    match overlay::detached(&stack) {
        Ok(tree) => Ok(tree),
        Err(Failure::NotDetached) => overlay::mount_at(&stack, &work.join("stage")),
        Err(Failure::Refused { errno, said }) => {
            let error = Error::sys(OP, show(&plan.rootfs), errno);
            match said.as_str() {
                "" => Err(error),
                // The words are beside the error, which keeps its errno.
                said => Err(error.hint(format!("the kernel says: {said}"))),
            }
        }
    }
}
