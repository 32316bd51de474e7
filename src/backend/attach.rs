//! Attaching a rootfs and its volumes: shared by the backends that use kernel mounts. Taking them away is [`super::detach`]'s.
//!
//! Everything inside the rootfs is hostile while this runs: targets are resolved inside the root, by descriptor, with
//! openat2(RESOLVE_IN_ROOT), and mounts are attached on descriptors (runc's CVE-2021-30465 and its successors). Sources and the mount
//! point come as [`Places`], opened before. A mount is found again by its id, wherever it lies by then.

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Detach, Support, detach};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::place::{Place, Places, Point};
use crate::plan::{BackendKind, Plan};
use crate::sys::fs::open_in_root;
use crate::sys::mount::{self, AttrSet, Depth, Piece};
use crate::sys::mountinfo::{self, Known};
use crate::traces::{Journal, Traces};
use crate::volume::{Access, Form, Volume};

const MOUNT_VOLUME: &str = "mount volume";

/// What to do about a volume's mount point that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// The root cannot be written to: refuse, unless it lies in a writable volume.
    Refuse,
    /// Make it in the root as well.
    Make,
}

/// A volume whose source is open and whose mount is ready.
#[derive(Debug)]
pub(super) struct Prepared<'a> {
    volume: &'a Volume,
    piece: Piece,
}

fn attrs_of(volume: &Volume) -> AttrSet<'static> {
    AttrSet {
        read_only: volume.access == Access::Ro,
        nosuid: !volume.powers.suid,
        nodev: !volume.has_devices(),
        noexec: !volume.powers.exec,
        private: true,
        idmap: None,
    }
}

/// `attrs` with what the plan holds back of the image.
pub(super) fn root_attrs<'a>(plan: &Plan, attrs: AttrSet<'a>) -> AttrSet<'a> {
    AttrSet { nosuid: plan.restraint.nosuid(), nodev: plan.restraint.nodev(), ..attrs }
}

/// Build every volume's mount, before anything is attached anywhere.
pub(super) fn prepare<'a>(plan: &'a Plan, places: &Places) -> Result<Vec<Prepared<'a>>> {
    let build = |(volume, source): (&'a Volume, &Place)| {
        let fail = |e| Error::sys(MOUNT_VOLUME, format!("{} ({})", volume.target, show(&volume.source)), e);
        let piece = rustix::io::fcntl_dupfd_cloexec(source, 0)
            .and_then(|fd| Piece::bind(fd, &plan.state_dir, &attrs_of(volume)))
            .map_err(fail)?;
        Ok(Prepared { volume, piece })
    };
    plan.volumes.iter().zip(&places.volumes).map(build).collect()
}

/// Something made on the host as a mount point, to be removed again if provisioning fails.
#[derive(Debug)]
struct Made {
    parent: OwnedFd,
    name: OsString,
    dev: u64,
    ino: u64,
    kind: FileType,
}

/// A rootfs under construction. Dropped without [`Assembly::keep`], the mount points it made go again.
#[derive(Debug)]
pub(super) struct Assembly<'a> {
    backend: BackendKind,
    missing: Missing,
    root: OwnedFd,
    root_id: u64,
    /// Volumes attached so far, and their mounts.
    attached: Vec<(Known, &'a Volume)>,
    made: MadeEntries,
}

impl<'a> Assembly<'a> {
    /// `root`: the root directory in which targets are resolved; a detached mount, an attached one, or a plain directory.
    pub(super) fn new(backend: BackendKind, root: OwnedFd, root_id: u64, missing: Missing) -> Self {
        Assembly { backend, missing, root, root_id, attached: Vec::new(), made: MadeEntries::default() }
    }

    /// The root directory.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The mounts of the volumes, and what came with them.
    pub(super) fn parts(&self) -> Result<Vec<Known>> {
        let table = mountinfo::read()?;
        let mut parts = Vec::new();
        for (volume, _) in &self.attached {
            let below: Vec<_> = volume.unique.map(mountinfo::unique_ids_below).unwrap_or_default();
            for mount in mountinfo::tree_of(table.clone(), volume.id) {
                let unique = if mount.id == volume.id {
                    volume.unique
                } else {
                    below.iter().find(|known| known.id == mount.id).and_then(|known| known.unique)
                };
                // One volume may lie in another.
                if !parts.iter().any(|known: &Known| known.id == mount.id) {
                    parts.push(Known { id: mount.id, unique });
                }
            }
        }
        Ok(parts)
    }

    /// Attach the volumes in their order. `EINVAL` from the first one on a root that is itself detached comes back as
    /// `Ok(Some(rest))`: before Linux 6.15 nothing can be attached there.
    pub(super) fn attach(&mut self, volumes: Vec<Prepared<'a>>, root: RootState) -> Result<Option<Vec<Prepared<'a>>>> {
        let mut waiting = volumes.into_iter();
        while let Some(next) = waiting.next() {
            let target = self.target(next.volume)?;
            if let (RootState::Detached, Piece::Detached(tree)) = (root, &next.piece) {
                fault::point("attach.volume")?;
                match mount::move_mount_to(tree, &target) {
                    Ok(()) => {}
                    Err(Errno::INVAL) if self.attached.is_empty() => {
                        return Ok(Some(std::iter::once(next).chain(waiting).collect()));
                    }
                    Err(e) => return Err(Error::sys(MOUNT_VOLUME, &next.volume.target, e)),
                }
                let known = known(tree)?;
                self.check(next.volume, known.id)?;
                self.attached.push((known, next.volume));
                continue;
            }
            if root == RootState::Detached {
                return Ok(Some(std::iter::once(next).chain(waiting).collect()));
            }
            fault::point("attach.volume")?;
            self.put(next, &target)?;
        }
        Ok(None)
    }

    /// Attach one in the mount namespace.
    fn put(&mut self, Prepared { volume, piece }: Prepared<'a>, target: &OwnedFd) -> Result<OwnedFd> {
        let made = piece.attach(target, &attrs_of(volume), &mut |_| Ok(()))?;
        let known = known(&made)?;
        self.attached.push((known, volume));
        mount::make_private(&made)?;
        self.check(volume, known.id).map(|()| made)
    }

    /// Where the root shows the volumes already, give each a mount of its own, with its flags: a copy of what is there, on itself.
    pub(super) fn cover(&mut self, plan: &'a Plan) -> Result<()> {
        for volume in &plan.volumes {
            let target = self.target(volume)?;
            let piece = rustix::io::fcntl_dupfd_cloexec(&target, 0)
                .and_then(|fd| Piece::bind(fd, &plan.state_dir, &attrs_of(volume)))
                .map_err(|e| Error::sys(MOUNT_VOLUME, &volume.target, e))?;
            fault::point("attach.volume")?;
            let made = self.put(Prepared { volume, piece }, &target)?;
            // It has the flags of what it is a copy of, the root or another volume, which hold back more than was asked for.
            let asked = AttrSet {
                read_only: volume.access == Access::Rw,
                nosuid: volume.powers.suid,
                nodev: volume.powers.dev == Some(true),
                noexec: volume.powers.exec,
                ..AttrSet::default()
            };
            mount::clear_attr(&made, &asked)?;
        }
        Ok(())
    }

    /// After attaching, the target must lead to the volume: somebody may have moved it away in between.
    fn check(&self, volume: &Volume, id: u64) -> Result<()> {
        let found = open_in_root(&self.root, volume.target.relative(), OFlags::PATH)
            .map_err(|e| Error::sys(MOUNT_VOLUME, &volume.target, e))?;
        if mount::mount_id(&found)? == id {
            return Ok(());
        }
        Err(Error::new(Kind::Busy, MOUNT_VOLUME, &volume.target, "its mount point was moved away meanwhile"))
    }

    /// The file or directory that the volume covers, made if it is missing and may be.
    fn target(&mut self, volume: &Volume) -> Result<OwnedFd> {
        let target = match open_in_root(&self.root, volume.target.relative(), OFlags::PATH) {
            Err(Errno::NOENT) => self.make(volume)?,
            other => other.map_err(|e| target_error(volume, e))?,
        };
        let mode = fs::fstat(&target).map_err(|e| target_error(volume, e))?.st_mode;
        check_kinds(volume, FileType::from_raw_mode(mode))?;
        let id = mount::mount_id(&target)?;
        if mount::is_mount_root(&target)? {
            let covered = self.attached.iter().find(|(other, _)| other.id == id);
            if let Some((_, other)) = covered {
                return Err(Error::new(
                    Kind::Usage,
                    MOUNT_VOLUME,
                    &volume.target,
                    format!("in this image it is the same place as volume {}", other.target),
                ));
            }
            if id == self.root_id {
                return Err(Error::new(
                    Kind::Usage,
                    MOUNT_VOLUME,
                    &volume.target,
                    "in this image it leads to the root itself",
                ));
            }
        }
        Ok(target)
    }

    /// An error: `volume`'s mount point is missing in `parent`, and may not be made there.
    fn check_may_make_in(&self, parent: &OwnedFd, volume: &Volume) -> Result<()> {
        let id = mount::mount_id(parent)?;
        let outer = self.attached.iter().find(|(other, _)| other.id == id).map(|(_, outer)| *outer);
        let may = outer.map_or(id == self.root_id && self.missing == Missing::Make, |v| v.access == Access::Rw);
        if may {
            return Ok(());
        }
        let (cause, remedy) = missing_text(self.backend, volume.form, outer);
        Err(Error::new(Kind::Unsupported, MOUNT_VOLUME, &volume.target, cause).hint(remedy))
    }

    /// Make the missing components of a target, one by one, by descriptor.
    fn make(&mut self, volume: &Volume) -> Result<OwnedFd> {
        let fail = |e: Errno| target_error(volume, e);
        let names: Vec<_> = volume.target.names().collect();
        let mut prefix = PathBuf::new();
        let mut parent = self.root.try_clone().map_err(|e| Error::io(MOUNT_VOLUME, &volume.target, e))?;
        for (n, name) in names.iter().enumerate() {
            prefix.push(name);
            match open_in_root(&self.root, &prefix, OFlags::PATH) {
                Ok(found) => {
                    parent = found;
                    continue;
                }
                Err(Errno::NOENT) => {}
                Err(e) => return Err(fail(e)),
            }
            self.check_may_make_in(&parent, volume)?;
            fault::point("attach.make")?;
            let as_dir = n + 1 < names.len() || volume.form == Form::Directory;
            let made = make_entry(&parent, name, as_dir).map_err(|e| match e {
                Errno::EXIST => Error::new(
                    Kind::Usage,
                    MOUNT_VOLUME,
                    &volume.target,
                    format!("{} is a symlink that leads nowhere", show(&prefix)),
                ),
                e => fail(e),
            })?;
            self.made.0.push(made);
            parent = open_in_root(&self.root, &prefix, OFlags::PATH).map_err(fail)?;
        }
        Ok(parent)
    }

    /// The rootfs is there to stay.
    pub(super) fn keep(mut self) {
        self.made.0.clear();
    }
}

/// What identifies the mount that `fd` is the root of.
fn known(fd: &OwnedFd) -> Result<Known> {
    Ok(Known { id: mount::mount_id(fd)?, unique: mount::unique_mount_id(fd) })
}

#[derive(Debug, Default)]
struct MadeEntries(Vec<Made>);

impl Drop for MadeEntries {
    fn drop(&mut self) {
        for made in self.0.drain(..).rev() {
            if let Err(e) = made.remove() {
                log::warn!("remove the mount point {} made for a volume: {e}", show(&made.name));
            }
        }
    }
}

/// Where the root is while volumes are attached below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RootState {
    /// Nowhere: a detached mount.
    Detached,
    /// In the mount namespace.
    Attached,
}

fn make_entry(parent: &OwnedFd, name: &std::ffi::OsStr, as_dir: bool) -> rustix::io::Result<Made> {
    if as_dir {
        fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        fs::openat(parent, name, flags, Mode::from_raw_mode(0o644))?;
    }
    let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = if as_dir { FileType::Directory } else { FileType::RegularFile };
    // A view of the parent on which nothing is mounted, so that the entry is found again under the volume that covers it.
    let bare = mount::open_tree_clone(parent, Depth::One).or_else(|_| rustix::io::fcntl_dupfd_cloexec(parent, 0))?;
    Ok(Made { parent: bare, name: name.to_owned(), dev: stat.st_dev, ino: stat.st_ino, kind })
}

impl Made {
    /// Remove it, if it is still the very thing that was made, and empty.
    fn remove(&self) -> rustix::io::Result<()> {
        let stat = match fs::statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            other => other?,
        };
        if (stat.st_dev, stat.st_ino) != (self.dev, self.ino) || (!self.kind.is_dir() && stat.st_size != 0) {
            return Ok(());
        }
        let flags = if self.kind.is_dir() { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        fs::unlinkat(&self.parent, &self.name, flags)
    }
}

fn target_error(volume: &Volume, errno: Errno) -> Error {
    match errno {
        Errno::NOTDIR => {
            Error::new(Kind::Usage, MOUNT_VOLUME, &volume.target, "a part of this path is not a directory in the image")
        }
        Errno::LOOP => {
            Error::new(Kind::Usage, MOUNT_VOLUME, &volume.target, "too many symlinks, or one of procfs, in this path")
        }
        e => Error::sys(MOUNT_VOLUME, &volume.target, e),
    }
}

fn check_kinds(volume: &Volume, target: FileType) -> Result<()> {
    let why = match (volume.form, target.is_dir()) {
        (Form::Directory, false) => "the source is a directory, and the image has a file there",
        (Form::File | Form::Special, true) => "the source is a file, and the image has a directory there",
        _ => return Ok(()),
    };
    Err(Error::new(Kind::Usage, MOUNT_VOLUME, &volume.target, why)
        .hint("bind a directory onto a directory and a file onto a file"))
}

/// The cause and the remedy for a mount point that the image lacks, or the read-only volume `outer` that it would lie in.
fn missing_text(backend: BackendKind, form: Form, outer: Option<&Volume>) -> (String, Cow<'static, str>) {
    let what = if form == Form::Directory { "directory" } else { "file" };
    if let Some(outer) = outer {
        let remedy = format!("create it in {}, or mount that volume read-write", show(&outer.source));
        return (format!("the read-only volume {} has no such {what}", outer.target), remedy.into());
    }
    let remedy = match (backend, form) {
        (_, Form::Special) => "create it in the image, or use --backend overlay",
        (BackendKind::Fuse, _) => "create it in the image",
        _ => "create it in the image, or use --backend fuse",
    };
    (format!("the image has no such {what}"), remedy.into())
}

/// Would every mount point be found in the one layer at `layer`? A look without mounting, so that another backend can be
/// chosen; mounting checks again.
pub(super) fn targets_support(backend: BackendKind, layer: &Path, volumes: &[Volume]) -> Support {
    for (n, volume) in volumes.iter().enumerate() {
        let target = volume.target.as_path();
        let outer = volumes[..n]
            .iter()
            .rev()
            .find_map(|outer| Some((outer, target.strip_prefix(outer.target.as_path()).ok()?)));
        let (base, relative) = match outer {
            Some((outer, _)) if outer.access == Access::Rw => continue,
            Some((outer, relative)) => (outer.source.as_path(), relative),
            None => (layer, volume.target.relative()),
        };
        let found = crate::sys::fs::open_path(base).and_then(|root| open_in_root(root, relative, OFlags::PATH));
        // Symlinks may lead into another volume: what is missing here can be there once that is mounted.
        if let Err(Errno::NOENT) = found
            && !volumes[..n].iter().any(|v| v.access == Access::Rw)
        {
            let (cause, remedy) = missing_text(backend, volume.form, outer.map(|(outer, _)| outer));
            return Support::no(format!("{MOUNT_VOLUME} {}: {cause}", volume.target), remedy);
        }
    }
    Support::Yes
}

/// Attach a root mount with its volumes on the mount point, writing down what is ours before it is to be seen.
///
/// On an error nothing of it is left.
pub(super) fn put_in_place(
    backend: BackendKind,
    plan: &Plan,
    places: &Places,
    root: Piece,
    root_attrs: &AttrSet<'_>,
    journal: &mut Journal<'_>,
) -> Result<()> {
    let volumes = prepare(plan, places)?;
    let point = &places.point;
    let mut traces = Traces { parent: Some(point.parent.identity()), ..Traces::default() };
    let mut note = |root: BorrowedFd<'_>| -> Result<()> {
        traces.mount_id = Some(mount::mount_id(root)?);
        traces.unique_mount_id = mount::unique_mount_id(root);
        journal.note(&traces)?;
        fault::point("attach.root")
    };
    let (mut assembly, rest) = match root {
        Piece::Detached(tree) if !has_peers(&point.place)? => {
            let id = mount::mount_id(&tree)?;
            let mut assembly = Assembly::new(backend, tree, id, Missing::Refuse);
            let rest = assembly.attach(volumes, RootState::Detached)?;
            note(assembly.root())?;
            mount::move_mount_to(assembly.root(), &point.place)
                .map_err(|e| Error::sys("mount on", show(&plan.rootfs), e))?;
            (assembly, rest)
        }
        alone => {
            let root = alone.attach(&point.place, root_attrs, &mut note)?;
            let id = traces.mount_id.unwrap_or_default();
            (Assembly::new(backend, root, id, Missing::Refuse), Some(volumes))
        }
    };
    match finish(&mut assembly, rest, point, &mut traces, journal) {
        Ok(()) => {
            assembly.keep();
            Ok(())
        }
        Err(e) => {
            // The mount before the mount points that were made below it: dropping `assembly` removes those.
            let undone = detach::take_away(plan, &traces, Detach::Lazy).map(|_| ());
            drop(assembly);
            Err(e.with_undo(undone))
        }
    }
}

/// Is the mount point on a shared mount? What is attached there then gets copies below its peers, in other namespaces maybe.
/// Ours is cut off from those afterwards, and unmounting it takes a copy away only if nothing is mounted on that
/// (mount_namespaces(7)): so the root goes there alone, and volumes follow when it is private.
fn has_peers(point: &Place) -> Result<bool> {
    Ok(mountinfo::by_id(mount::mount_id(point)?)?.is_some_and(|m| m.shared.is_some()))
}

fn finish<'a>(
    assembly: &mut Assembly<'a>,
    rest: Option<Vec<Prepared<'a>>>,
    point: &Point,
    traces: &mut Traces,
    journal: &mut Journal<'_>,
) -> Result<()> {
    mount::make_private(assembly.root())?;
    if let Some(rest) = rest {
        assembly.attach(rest, RootState::Attached)?;
    }
    point.check_mounted(assembly.root_id)?;
    fault::point("attach.note")?;
    traces.parts =
        Some(mountinfo::tree_of(mountinfo::read()?, assembly.root_id).into_iter().skip(1).map(|m| m.id).collect());
    journal.note(traces)
}
