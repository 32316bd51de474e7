//! Every path of a plan, opened once: the layers, the index, each volume's source, the mount point, the place for changes. What is
//! missing and may be made is made on the way, below what was opened before it. After this step no path of the host is followed.
//!
//! The plan's paths hold no symlink ([`super::look`] resolved them): one that is there now is a change, and refused. Anyone who owns a
//! directory on the way may exchange what is in it at any time: what is made there is opened, looked at, and changed by its
//! descriptor alone.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::planning::Planned;
use super::request::Cover;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::place::{Identities, Identity, Place, Places, Point};
use crate::plan::{Layer, Plan};
use crate::sys::fs::{hold_shared, is_empty, make_empty, make_private, open_in_root};
use crate::volume::{ContainerPath, Form, Volume};

const MOUNT_POINT: &str = "open mount point";
const VOLUME: &str = "mount volume";
/// Mode of a directory made for a mount point: what is in a rootfs is the business of who mounts it.
const MADE_POINT: Mode = Mode::RWXU;
/// Mode of a directory made below the sandbox, where the image does not say more.
const MADE: Mode = Mode::from_raw_mode(0o755);
/// What a mode from an image may be on a source: anything but what makes a program run as the owner or group of its file.
pub(super) const FROM_IMAGE: u32 = 0o1777;

/// What a plan's places are compared with.
#[derive(Clone, Copy, Default)]
pub(super) struct Recorded<'a> {
    /// What they were when the rootfs was made; `None`: it is being made.
    pub(super) identities: Option<&'a Identities>,
    /// Was that in an earlier boot? Then mount points made by us, and device nodes, may be new ones.
    pub(super) of_another_boot: bool,
}

impl<'a> Recorded<'a> {
    fn of(&self, pick: impl FnOnce(&'a Identities) -> Option<&'a Identity>) -> Option<&'a Identity> {
        self.identities.and_then(pick)
    }
}

/// The source of a volume.
#[derive(Debug)]
pub(super) enum Source {
    /// It is there.
    There(Place),
    /// It appears in this directory under this name when it is filled.
    ToFill(Place, OsString),
}

/// All that is there before volumes are filled.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) image: Image,
    pub(super) sources: Vec<Source>,
    pub(super) point: Point,
    scratch: Option<Place>,
    state: Place,
}

/// What a rootfs is made from.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) layers: Vec<Place>,
    pub(super) index: Option<Place>,
    in_use: Option<OwnedFd>,
}

impl Opened {
    /// What was made for changes.
    pub(super) fn scratch(&self) -> Option<Identity> {
        self.scratch.as_ref().map(Place::identity)
    }

    /// Everything, once the sources in `sources` are all there.
    pub(super) fn complete(self, volumes: Vec<Place>) -> Places {
        let Image { layers, index, in_use } = self.image;
        Places { layers, index, in_use, volumes, point: self.point, scratch: self.scratch, state: self.state }
    }
}

/// Open what a new rootfs needs, and make what is missing.
pub(super) fn open_new(planned: &Planned) -> Result<Opened> {
    let plan = &planned.plan;
    let image = open_image(plan, Recorded::default())?;
    fault::point("provision.directories")?;
    let point = open_point(plan, &planned.made, Recorded::default())?;
    if planned.cover == Cover::Refuse {
        refuse_full(&point.place)?;
    }
    let sandbox = planned.sandbox.as_deref().map(|path| open_sandbox(path, &planned.sandbox_made)).transpose()?;
    let mut sources = Vec::with_capacity(plan.volumes.len());
    for volume in &plan.volumes {
        sources.push(open_source(planned, volume, sandbox.as_ref(), &image.layers)?);
    }
    let state = open_state(plan)?;
    fault::point("provision.opened")?;
    // The last: where this fails, the directory that is there is not ours.
    let scratch = plan.scratch.as_ref().map(|scratch| {
        if plan.changes_stay {
            open_upper(&scratch.0, &planned.upper_made)
        } else {
            make_scratch(&scratch.0, sandbox.as_ref())
        }
    });
    let scratch = scratch.transpose()?;
    Ok(Opened { image, sources, point, scratch, state })
}

/// Open what a rootfs was made of, to make it again: what is there must be what was there. `made` are the directories that were made
/// for its mount point.
pub(super) fn open_again(plan: &Plan, made: &[PathBuf], recorded: Recorded<'_>, image: Need) -> Result<Places> {
    let image = match image {
        Need::Image => open_image(plan, recorded)?,
        Need::NoImage => Image { layers: Vec::new(), index: None, in_use: None },
    };
    fault::point("provision.directories")?;
    let point = open_point(plan, made, recorded)?;
    let volumes = plan.volumes.iter().enumerate().map(|(n, volume)| {
        let source = open_there(volume)?;
        let is_device = volume.form == Form::Special && recorded.of_another_boot;
        let known = recorded.of(|all| all.volumes.get(n)).filter(|_| !is_device);
        source.check(&format!("the source of volume {}", volume.target), known)?;
        Ok(source)
    });
    let volumes = volumes.collect::<Result<_>>()?;
    let Image { layers, index, in_use } = image;
    let state = open_state(plan)?;
    fault::point("provision.opened")?;
    let scratch = plan.scratch.as_ref().map(|scratch| {
        if !plan.changes_stay {
            return make_scratch(&scratch.0, None);
        }
        let upper = open_upper(&scratch.0, &[])?;
        upper.check("directory for changes", recorded.of(|all| all.scratch.as_ref()))?;
        Ok(upper)
    });
    let scratch = scratch.transpose()?;
    Ok(Places { layers, index, in_use, volumes, point, scratch, state })
}

/// Is the image needed? A copy does without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Image,
    NoImage,
}

/// Open all that a plan names. Everything must be there, except the place for changes, which is made.
pub fn open(plan: &Plan) -> Result<Places> {
    open_again(plan, &[], Recorded::default(), Need::Image)
}

fn open_image(plan: &Plan, recorded: Recorded<'_>) -> Result<Image> {
    let layers = plan.layers.iter().enumerate().map(|(n, Layer { root })| {
        let place = open_kind("open layer", root, FileType::Directory)?;
        // One of the store is told by its path, which is the digest of its content; what was repaired is another directory.
        let known = recorded.of(|all| all.layers.get(n)).filter(|_| plan.index.is_none());
        place.check("layer", known)?;
        Ok(place)
    });
    let layers = layers.collect::<Result<_>>()?;
    let index = plan.index.as_ref().map(|file| open_kind("open index", &file.0, FileType::RegularFile)).transpose()?;
    let in_use = plan.index.as_ref().and_then(|file| file.0.parent()).map(|dir| {
        let fail = |e| Error::sys("lock", show(dir), e);
        Place::open(dir).and_then(|dir| dir.for_reading()).and_then(hold_shared).map_err(fail)
    });
    Ok(Image { layers, index, in_use: in_use.transpose()? })
}

pub(super) fn open_kind(op: &'static str, path: &Path, wanted: FileType) -> Result<Place> {
    let place = Place::open(path).map_err(|e| match e {
        Errno::LOOP | Errno::XDEV => {
            Error::new(Kind::Usage, op, show(path), "its path was changed: a symlink is in it now")
        }
        e => Error::sys(op, show(path), e),
    })?;
    if place.kind() == wanted {
        return Ok(place);
    }
    let what = if wanted == FileType::Directory { "it is not a directory" } else { "it is not a regular file" };
    Err(Error::new(Kind::Usage, op, show(path), what))
}

/// The mount point and the directory that it lies in; `made` are made where they are missing.
fn open_point(plan: &Plan, made: &[PathBuf], recorded: Recorded<'_>) -> Result<Point> {
    let fail = |e: Errno| match e {
        Errno::NOTDIR => Error::new(Kind::Usage, MOUNT_POINT, show(&plan.rootfs), "it is not a directory"),
        Errno::LOOP | Errno::XDEV => {
            Error::new(Kind::Usage, MOUNT_POINT, show(&plan.rootfs), "its path was changed: a symlink is in it now")
        }
        e => Error::sys(MOUNT_POINT, show(&plan.rootfs), e),
    };
    let first = made.first().unwrap_or(&plan.rootfs);
    let (Some(parent), Some(name)) = (first.parent(), plan.rootfs.file_name()) else {
        return Err(Error::new(Kind::Usage, MOUNT_POINT, show(&plan.rootfs), "it has no name"));
    };
    let mut parent = Place::open(parent).map_err(fail)?;
    let mut is_new = false;
    for dir in made {
        let name = dir.file_name().unwrap_or_default();
        match fs::mkdirat(&parent, name, MADE_POINT) {
            Ok(()) => is_new = *dir == plan.rootfs,
            // Healing finds those of the first making.
            Err(Errno::EXIST) => {}
            Err(e) => return Err(Error::sys("make mount point", show(dir), e)),
        }
        if *dir != plan.rootfs {
            parent = parent.child(name).map_err(fail)?;
        }
    }
    let point = Point::new(parent, name).map_err(fail)?;
    let is_remade = is_new || (recorded.of_another_boot && made.contains(&plan.rootfs));
    let known = recorded.of(|all| all.point.as_ref()).filter(|_| !is_remade);
    point.place.check("mount point", known)?;
    Ok(point)
}

/// A mount hides what is below it: a project's directory named by mistake must not vanish in silence.
fn refuse_full(point: &Place) -> Result<()> {
    // One that may not be read tells nothing.
    let is_full = point.for_reading().and_then(is_empty).is_ok_and(|is_empty| !is_empty);
    if !is_full {
        return Ok(());
    }
    Err(Error::new(Kind::Exists, MOUNT_POINT, show(point.path()), "the directory is not empty")
        .hint("choose another ROOTFS, or hide what is in it with --over"))
}

/// The sandbox; `made` are the directories of it that are missing.
fn open_sandbox(path: &Path, made: &[PathBuf]) -> Result<Place> {
    const OP: &str = "open sandbox";
    let Some(parent) = made.first().and_then(|first| first.parent()) else {
        return open_kind(OP, path, FileType::Directory);
    };
    let mut at = open_kind(OP, parent, FileType::Directory)?;
    for dir in made {
        let fail = |e: Errno| Error::sys("make sandbox", show(dir), e);
        let made = make_empty(&at, dir.file_name().unwrap_or_default()).map_err(fail)?;
        fs::fchmod(&made, MADE).map_err(fail)?;
        at = Place::new(made, dir.clone()).map_err(fail)?;
    }
    Ok(at)
}

fn open_state(plan: &Plan) -> Result<Place> {
    // Below the state root, which is ours.
    open_kind("open", &plan.state_dir, FileType::Directory)
}

fn changed(volume: &Volume) -> Error {
    let subject = format!("{} ({})", volume.target, show(&volume.source));
    Error::new(Kind::Usage, VOLUME, subject, "the source's path was changed: a symlink is in it now")
}

fn source_error(volume: &Volume) -> impl Fn(Errno) -> Error + '_ {
    move |e| match e {
        Errno::LOOP | Errno::XDEV => changed(volume),
        e => Error::sys(VOLUME, format!("{} ({})", volume.target, show(&volume.source)), e),
    }
}

pub(super) fn check_form(volume: &Volume, place: Place) -> Result<Place> {
    let form = match place.kind() {
        FileType::Directory => Form::Directory,
        FileType::RegularFile => Form::File,
        _ => Form::Special,
    };
    if form == volume.form {
        return Ok(place);
    }
    let subject = format!("{} ({})", volume.target, show(&volume.source));
    Err(Error::new(Kind::Usage, VOLUME, subject, "the source was replaced by another kind of file"))
}

/// A source that is there.
fn open_there(volume: &Volume) -> Result<Place> {
    check_form(volume, Place::open(&volume.source).map_err(source_error(volume))?)
}

/// The source of a volume, made below the sandbox if it is missing.
fn open_source(planned: &Planned, volume: &Volume, sandbox: Option<&Place>, layers: &[Place]) -> Result<Source> {
    let fail = source_error(volume);
    let below = sandbox.and_then(|sandbox| Some((sandbox, volume.source.strip_prefix(sandbox.path()).ok()?)));
    let below = below.filter(|(_, relative)| !relative.as_os_str().is_empty());
    let is_filled = planned.fill.contains(&volume.target);
    let (Some((sandbox, relative)), Some(name)) = (below, volume.source.file_name()) else {
        if !is_filled {
            return open_there(volume).map(Source::There);
        }
        let (Some(parent), Some(name)) = (volume.source.parent(), volume.source.file_name()) else {
            return Err(Error::new(Kind::Usage, VOLUME, &volume.target, "its source has no name"));
        };
        return Ok(Source::ToFill(Place::open(parent).map_err(fail)?, name.to_owned()));
    };
    let mut at = sandbox.try_clone()?;
    let names: Vec<&OsStr> = relative.iter().collect();
    for (n, part) in names.iter().enumerate() {
        let is_last = n + 1 == names.len();
        if is_last && is_filled {
            break;
        }
        at = match at.child(part) {
            Err(Errno::NOENT) => {
                let path = at.path().join(part);
                if !planned.sources.contains(&path) {
                    return Err(Error::sys(
                        VOLUME,
                        format!("{} ({})", volume.target, show(&volume.source)),
                        Errno::NOENT,
                    ));
                }
                // A new /tmp is as open as the image's /tmp.
                let mode = if is_last { image_mode(layers, &volume.target) } else { None };
                make_source(&at, part, sandbox, mode.map_or(MADE, |mode| Mode::from_raw_mode(mode & FROM_IMAGE)))?
            }
            other => other.map_err(&fail)?,
        };
    }
    if is_filled { Ok(Source::ToFill(at, name.to_owned())) } else { check_form(volume, at).map(Source::There) }
}

/// A new directory `name` in `parent`, which belongs to the sandbox's owner.
fn make_source(parent: &Place, name: &OsStr, sandbox: &Place, mode: Mode) -> Result<Place> {
    const OP: &str = "make volume source";
    let path = parent.path().join(name);
    let fail = |e: Errno| Error::sys(OP, show(&path), e);
    let made = make_empty(parent, name).map_err(fail)?;
    fault::point("open.made")?;
    let (uid, gid) = sandbox.owner();
    let stat = fs::fstat(&made).map_err(fail)?;
    // Some file systems (vfat) have one owner for everything: then it is the one of the directory that it is in.
    if stat.st_uid != rustix::process::geteuid().as_raw() && stat.st_uid != parent.owner().0 {
        return Err(Error::new(Kind::Busy, OP, show(&path), "it was exchanged while it was made"));
    }
    if (stat.st_uid, stat.st_gid) != (uid, gid) {
        fs::fchown(&made, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(fail)?;
    }
    fs::fchmod(&made, mode).map_err(fail)?;
    Place::new(made, path).map_err(|e| Error::sys(OP, show(parent.path()), e))
}

/// Permission bits of the directory at `target` in the topmost layer that has one.
fn image_mode(layers: &[Place], target: &ContainerPath) -> Option<u32> {
    layers.iter().rev().find_map(|layer| {
        let found = open_in_root(layer.as_fd(), target.relative(), OFlags::PATH).ok()?;
        let mode = fs::fstat(&found).ok()?.st_mode;
        FileType::from_raw_mode(mode).is_dir().then_some(mode & 0o7777)
    })
}

/// The directory that the user named for changes; `made` are the directories of it that are missing. Nobody else gets in, for the same
/// reason as in [`make_scratch`].
fn open_upper(path: &Path, made: &[PathBuf]) -> Result<Place> {
    const OP: &str = "open the directory for changes";
    let fail = |e: Errno| Error::sys(OP, show(path), e);
    let mut at = open_kind(OP, made.first().and_then(|first| first.parent()).unwrap_or(path), FileType::Directory)?;
    for dir in made {
        let made = make_private(&at, dir.file_name().unwrap_or_default()).map_err(fail)?;
        at = Place::new(made, dir.clone()).map_err(fail)?;
    }
    if at.owner().0 != rustix::process::geteuid().as_raw() {
        return Err(Error::new(Kind::Usage, OP, show(path), "it belongs to another user"));
    }
    if at.mode() & 0o077 != 0 {
        let why = "other users can enter it, and could run what the rootfs makes setuid";
        return Err(
            Error::new(Kind::Usage, OP, show(path), why).hint(format!("close it to them: chmod 700 {}", show(path)))
        );
    }
    Ok(at)
}

/// The directory for a rootfs's own changes. Closed to all others: a setuid program made in the rootfs must not be reached from
/// outside.
fn make_scratch(path: &Path, sandbox: Option<&Place>) -> Result<Place> {
    const OP: &str = "find a place for changes";
    let fail = |e: Errno| match e {
        Errno::EXIST => Error::new(Kind::Exists, OP, show(path), "something is there already")
            .hint("a rootfs of another state root may use it; if none does, remove it, or choose another --id"),
        e => Error::sys(OP, show(path), e),
    };
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(fail(Errno::INVAL)) };
    let parent = match sandbox.filter(|sandbox| sandbox.path() == parent) {
        Some(sandbox) => sandbox.try_clone()?,
        None => open_kind(OP, parent, FileType::Directory)?,
    };
    fault::point("open.scratch")?;
    let made = make_private(&parent, name).map_err(fail)?;
    Place::new(made, path.to_owned()).map_err(fail)
}
