//! The overlay backend: the kernel's overlayfs over the layers, read-only, or writable with an upper layer that ends with it. A few system calls, and a walk over the directories
//! of the layers where there are several, to find their whiteouts.
//!
//! Nothing is written to a layer. What overlayfs must be told beyond them goes into layers of our own, between and above the
//! image's: whiteouts in its form (device 0:0, opaque directories), and mount points that the image lacks.
//! Mounts inside a layer's directory are not part of the rootfs (the bind backend shows them).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::surplus;
use super::whiteout::{self, HiddenDirs, Mark};
use super::{Backend, Detach, Health, Support, Usage, attach, detach, usage_of_upper};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::host::Host;
use crate::index::Index;
use crate::place::{Place, Places};
use crate::plan::{BackendKind, Plan, Scratch};
use crate::sys::attrs;
use crate::sys::fs::{make_private, open_beneath, open_in_root, path_of};
use crate::sys::mount::{AttrSet, Piece};
use crate::sys::mountinfo::Table;
use crate::sys::overlay::{self, Failure, Stack, Upper};
use crate::sys::remove::{remove_tree, remove_tree_at};
use crate::traces::{Journal, Traces};
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
        let missing: Vec<_> = host.missing_calls().iter().filter(|call| **call != "mount_setattr").copied().collect();
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
            .and_then(|()| plan.require_ending(BackendKind::Overlay))
            .and_then(|()| plan.require_as_it_is(BackendKind::Overlay))
            .and_then(|()| check_count(plan, most_layers(plan)))
        {
            return Support::no(e.cause(), e.remedy());
        }
        match self.host_support(host) {
            Support::Yes if !plan.ownership.is_identity() => Support::no(
                "overlayfs cannot be idmapped: it presents the owners that the layers have",
                "use --backend fuse, or --backend bind for an image of one layer",
            ),
            other => other,
        }
    }

    fn provision(&self, host: &Host, plan: &Plan, places: &Places, journal: &mut Journal<'_>) -> Result<()> {
        plan.require_layers()?;
        fault::point("overlay.build")?;
        let clear = || remove_tree_at(&places.state, OsStr::new(WORK), &plan.state_dir.join(WORK)).map(|_| ());
        let made = Making::begin(host, plan, places)
            .and_then(|making| making.build())
            .and_then(|root| attach::put_in_place(self.kind(), plan, places, root, &AttrSet::default(), journal));
        made.map_err(|e| e.with_undo(clear()))
    }

    fn destroy(&self, _: &Host, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
        let there = detach::take_away(plan, traces, how)?;
        fault::point("overlay.remove")?;
        Ok(remove_tree(&plan.state_dir.join(WORK))? || there)
    }

    fn usage(&self, plan: &Plan) -> Option<Usage> {
        usage_of_upper(plan)
    }

    fn health(&self, plan: &Plan, traces: &Traces, mounts: &Table) -> Health {
        detach::health(&plan.rootfs, traces, mounts)
    }
}

/// Our own layers lie here, below the plan's `state_dir`.
const WORK: &str = "overlay";

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

/// A layer: one of the image's, or one of ours.
struct Layer {
    fd: OwnedFd,
    shown: PathBuf,
}

/// An overlay being made.
struct Making<'a> {
    host: &'a Host,
    plan: &'a Plan,
    places: &'a Places,
    /// Our own layers are made here: ours alone, below the state root.
    work: OwnedFd,
    shown: PathBuf,
}

/// Where changes go: overlayfs's upper layer and its work directory.
struct Changes {
    upper: OwnedFd,
    work: OwnedFd,
}

impl Changes {
    fn make(top: &Place) -> Result<Self> {
        const OP: &str = "make directory for changes";
        fault::point("overlay.upper")?;
        let make =
            |name| make_private(top, OsStr::new(name)).map_err(|e| Error::sys(OP, show(top.path().join(name)), e));
        Ok(Changes { upper: make(Scratch::UPPER)?, work: make(Scratch::WORK)? })
    }
}

impl<'a> Making<'a> {
    fn begin(host: &'a Host, plan: &'a Plan, places: &'a Places) -> Result<Self> {
        let shown = plan.state_dir.join(WORK);
        let work = make_private(&places.state, OsStr::new(WORK)).map_err(|e| Error::sys(OP, show(&shown), e))?;
        Ok(Making { host, plan, places, work, shown })
    }

    /// The overlay's mount, detached.
    fn build(&self) -> Result<Piece> {
        let plan = self.plan;
        let changes = self.places.scratch.as_ref().map(Changes::make).transpose()?;
        let mut stack = self.with_whiteouts(self.without_repeats()?)?;
        if stack.len() < 2 {
            // One lower layer alone is refused without an upper one.
            stack.insert(0, self.make_layer("empty", Mode::from_raw_mode(0o755))?);
        }
        let root = self.mount(&stack, None)?;
        match self.make_skeleton(&root)? {
            Some(skeleton) => stack.push(skeleton),
            None if changes.is_none() => return Ok(Piece::Detached(root)),
            None => {}
        }
        if let Some(changes) = &changes {
            // It covers the top directory of the image: it must look the same.
            imitate(&root, &changes.upper).map_err(|e| Error::sys(OP, show(&plan.rootfs), e))?;
        }
        drop(root);
        Ok(Piece::Detached(self.mount(&stack, changes.as_ref())?))
    }

    /// A layer of our own.
    fn make_layer(&self, name: &str, mode: Mode) -> Result<Layer> {
        let shown = self.shown.join(name);
        let fail = |e| Error::sys(OP, show(&shown), e);
        let fd = make_private(&self.work, OsStr::new(name)).map_err(fail)?;
        fs::fchmod(&fd, mode).map_err(fail)?;
        Ok(Layer { fd, shown })
    }

    /// The layers, bottom first, each once: overlayfs refuses a repeated one (ELOOP), and images have them (empty ones above all).
    /// The topmost of its places counts: there it brings and hides all that it brought and hid below.
    fn without_repeats(&self) -> Result<Vec<Layer>> {
        let mut seen = BTreeSet::new();
        let mut layers = Vec::with_capacity(self.places.layers.len());
        for layer in self.places.layers.iter().rev() {
            if seen.insert((layer.identity().dev, layer.identity().ino)) {
                layers.push(Layer { fd: layer.try_clone()?.into(), shown: layer.path().to_owned() });
            }
        }
        layers.reverse();
        Ok(layers)
    }

    /// A detached overlay of `stack`, bottom first; writable where there is a place for `changes`.
    fn mount(&self, stack: &[Layer], changes: Option<&Changes>) -> Result<OwnedFd> {
        check_count(self.plan, stack.len())?;
        let lower: Vec<_> = stack.iter().map(|layer| layer.fd.as_fd()).collect();
        let upper = changes.map(|Changes { upper, work }| Upper { changes: upper.as_fd(), work: work.as_fd() });
        let attrs = attach::root_attrs(self.plan, AttrSet::default());
        let stack = Stack { lower: &lower, upper, userxattr: !self.host.initial_user_namespace, attrs };
        match overlay::detached(&stack) {
            Ok(tree) => Ok(tree),
            Err(Failure::NotDetached) => overlay::mount_at(&stack, &self.shown.join("stage")),
            Err(Failure::Refused { errno, said }) => {
                let error = Error::sys(OP, show(&self.plan.rootfs), errno);
                match said.as_str() {
                    "" => Err(error),
                    // The words are beside the error, which keeps its errno.
                    said => Err(error.hint(format!("the kernel says: {said}"))),
                }
            }
        }
    }

    /// Outside the first user namespace overlayfs keeps its marks in `user.` attributes (option `userxattr`, Linux 5.11).
    fn opaque_xattr(&self) -> &'static str {
        if self.host.initial_user_namespace { whiteout::TRUSTED_OPAQUE } else { whiteout::USER_OPAQUE }
    }

    // ---- whiteouts ----

    /// The layers, bottom first, with what hides what the image does not have, and what makes directories look as they should. Its index knows, and
    /// one layer of ours on top does it: that is right no matter who imported the layers and who mounts them (which of two attributes overlayfs
    /// heeds depends on that), and for layers that are the lowest here and not in another image.
    fn with_whiteouts(&self, layers: Vec<Layer>) -> Result<Vec<Layer>> {
        let Some(file) = &self.places.index else { return self.with_scanned_whiteouts(layers) };
        if !self.plan.has_whiteouts {
            return Ok(layers);
        }
        let index = file.for_reading().map_err(|e| Error::sys("open index", show(file.path()), e))?;
        let named: Vec<_> = layers.iter().map(|layer| (layer.fd.as_fd(), layer.shown.as_path())).collect();
        let hidden = surplus::find(&Index::from_file(&index.into())?, &named, self.opaque_xattr())?;
        let mut stack = layers;
        if !hidden.is_empty() {
            let ours = self.make_whiteouts("whiteouts", &hidden, &stack.iter().rev().collect::<Vec<_>>())?;
            stack.push(ours);
        }
        Ok(stack)
    }

    /// Of layers without an index: ours lie in between: whiteouts that one layer has for those below it lie below it, and what hides
    /// the `.wh.` files themselves lies above it. Both are one layer of ours, since the one's above is the other's below.
    fn with_scanned_whiteouts(&self, layers: Vec<Layer>) -> Result<Vec<Layer>> {
        if layers.len() == 1 {
            return Ok(layers);
        }
        let mut above: Vec<HiddenDirs> = layers.iter().map(|_| HiddenDirs::new()).collect();
        for (n, layer) in layers.iter().enumerate() {
            for found in whiteout::scan(&layer.fd, &layer.shown)? {
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
        let mut ours = Vec::with_capacity(layers.len());
        for (n, hidden) in above.iter().enumerate() {
            // Directories of ours stand in for those of the layer above where it has them, else for those of the layer itself.
            let models: Vec<&Layer> = layers.iter().skip(n).take(2).rev().collect();
            let made = || self.make_whiteouts(&format!("whiteouts-{n}"), hidden, &models);
            ours.push((!hidden.is_empty()).then(made).transpose()?);
        }
        Ok(layers.into_iter().zip(ours).flat_map(|(layer, ours)| std::iter::once(layer).chain(ours)).collect())
    }

    /// A layer of ours that hides these names. `models`: those that it covers, topmost first.
    fn make_whiteouts(&self, name: &str, hidden: &HiddenDirs, models: &[&Layer]) -> Result<Layer> {
        let ours = self.make_layer(name, Mode::RWXU)?;
        let fail = |e: Errno| Error::sys(OP, show(&ours.shown), e);
        let root = &ours.fd;
        let mut made = BTreeSet::new();
        for (dir, what) in hidden {
            // What is below a name that is gone is gone with it.
            if parts(dir).iter().any(|part| is_hidden(hidden, part)) {
                continue;
            }
            for part in parts(dir) {
                if part.as_os_str() != "." && made.insert(part.clone()) {
                    fs::mkdirat(root, &part, Mode::RWXU).map_err(fail)?;
                }
            }
            let at = open_beneath(root, dir, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?;
            for name in &what.names {
                // Allowed without privilege since Linux 5.8.
                fs::mknodat(&at, name, FileType::CharacterDevice, Mode::empty(), 0).map_err(fail)?;
            }
            if what.opaque {
                fs::fsetxattr(&at, self.opaque_xattr(), b"y", XattrFlags::empty()).map_err(fail)?;
            }
        }
        // Last, and the innermost first: making an entry changes its directory's times.
        made.insert(PathBuf::from("."));
        for dir in made.iter().rev() {
            let like = hidden.get(dir).and_then(|what| what.like).map_or(0, |n| models.len() - 1 - n);
            let model =
                models.iter().skip(like).find_map(|m| open_beneath(&m.fd, dir, OFlags::PATH | OFlags::DIRECTORY).ok());
            if let Some(model) = model {
                imitate(&model, &open_beneath(root, dir, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?)
                    .map_err(fail)?;
            }
        }
        Ok(ours)
    }

    // ---- missing mount points ----

    /// A layer of ours with the mount points that the image lacks; `None`: it has them all. `root` is the overlay without it.
    fn make_skeleton(&self, root: &OwnedFd) -> Result<Option<Layer>> {
        let mut missing = Vec::new();
        let volumes = &self.plan.volumes;
        for (n, volume) in volumes.iter().enumerate() {
            // Below another volume the image says nothing.
            let below = |outer: &Volume| volume.target.as_path().starts_with(outer.target.as_path());
            if volumes[..n].iter().any(below) {
                continue;
            }
            if let Some(path) = missing_path(root, volume)? {
                missing.push((path, volume.form));
            }
        }
        if missing.is_empty() {
            return Ok(None);
        }
        let skeleton = self.make_layer("skeleton", Mode::from_raw_mode(0o755))?;
        let fail = |e: Errno| Error::sys("make missing mount points in", show(&skeleton.shown), e);
        let ours = &skeleton.fd;
        let mut made = BTreeSet::from([PathBuf::from(".")]);
        for (path, form) in &missing {
            for part in parts(path) {
                if *form != Form::Directory && part == *path {
                    match make_file(ours, &part) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(e) => return Err(fail(e)),
                    }
                } else if made.insert(part.clone()) {
                    fs::mkdirat(ours, &part, Mode::from_raw_mode(0o755)).map_err(fail)?;
                }
            }
        }
        for dir in made.iter().rev() {
            // Those that the image has must look as they do there.
            let Ok(model) = open_beneath(root, dir, OFlags::PATH | OFlags::DIRECTORY) else { continue };
            imitate(&model, &open_beneath(ours, dir, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?)
                .map_err(fail)?;
        }
        Ok(Some(skeleton))
    }
}

fn is_hidden(hidden: &HiddenDirs, path: &Path) -> bool {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return false };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    hidden.get(dir).is_some_and(|what| what.names.contains(name))
}

/// A directory of ours covers one of the image: it must look the same.
fn imitate(model: &OwnedFd, ours: &OwnedFd) -> rustix::io::Result<()> {
    let stat = fs::fstat(model)?;
    let fidelity = attrs::copy(model, &stat, ours, attrs::SetId::Kept)?;
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
