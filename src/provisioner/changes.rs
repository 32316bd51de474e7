//! What a writable rootfs changed: listed, or made an image of.
//!
//! The upper directory that its backend keeps is read where it lies; the mount is not looked at, and may be gone. A rootfs of an ordinary user's
//! `fsprov run` has owners that only its user namespace can read: `apart` does it in there.

mod apart;

use std::ffi::OsStr;
use std::path::PathBuf;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use serde::{Deserialize, Serialize};

use super::open::open_kind;
use super::record::{self, Record};
use super::{Condition, Now, Provisioner, Selector};
use crate::error::{Error, Kind, Result, show};
use crate::id::ImageId;
use crate::index::Index;
use crate::place::Identity;
use crate::plan::{BackendKind, Ownership, Scratch};
use crate::store::{Below, Change, Imported, Limits, Marks, Said, Store, Upper};
use crate::sys::fs::open_resolved;
use crate::sys::mount::mount_id;
use crate::sys::mountinfo::Known;
use crate::sys::process::{Namespace, in_initial_user_namespace, user_namespace_of};
use crate::tree::image::{ImageTree, Trust};

pub(crate) use apart::{READER, read_apart};

const OP: &str = "read changes of";

/// Where they are, and what they are upon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Changes {
    at: Scratch,
    /// Who writes them.
    backend: BackendKind,
    /// What the record says was there: its parent may be another user's.
    known: Option<Identity>,
    owners: Ownership,
    limits: Limits,
    below: Lower,
    /// Directories of the image's layers, for the writable tree, which is read here and not elsewhere.
    #[serde(skip)]
    layers: Vec<PathBuf>,
    /// The image, where it lies in the store.
    image: Option<ImageId>,
    /// Whose user namespace they can be read in. `None`: in this one.
    inside: Option<crate::sys::process::ProcessId>,
}

/// What the rootfs shows below them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Lower {
    Index(#[serde(with = "crate::pathtext")] PathBuf),
    Directory(#[serde(with = "crate::pathtext")] PathBuf),
}

impl Changes {
    fn open(&self) -> Result<Upper> {
        let marks = match self.backend {
            BackendKind::Fuse => Marks::Tree,
            _ if in_initial_user_namespace()? => Marks::Trusted,
            _ => Marks::User,
        };
        let place = open_kind("open the directory for changes", &self.at.0, FileType::Directory)?;
        place.check("directory for changes", self.known.as_ref())?;
        let upper = self.at.0.join(Scratch::UPPER);
        Upper::open_in(&place, Scratch::UPPER, &upper, marks, self.owners.clone(), &self.limits)
    }

    /// The same with the image that has the content of files that changed in attributes or names alone.
    fn open_whole(&self) -> Result<Upper> {
        let upper = self.open()?;
        let Lower::Index(index) = &self.below else { return Ok(upper) };
        if self.backend != BackendKind::Fuse {
            return Ok(upper);
        }
        let layers =
            self.layers.iter().map(|layer| open_resolved(layer).map_err(|e| Error::sys("open layer", show(layer), e)));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let image = ImageTree::open(Index::open(index)?, layers, Ownership::default(), Trust::default())?;
        Ok(upper.upon(image))
    }

    fn list(&self) -> Result<Vec<Change>> {
        let below = match &self.below {
            Lower::Index(path) => Below::Index(Index::open(path)?),
            Lower::Directory(path) => Below::directory(path)?,
        };
        self.open()?.list(&below)
    }
}

impl Provisioner {
    /// What a writable rootfs changed upon its image, in the order of the paths.
    pub fn changes(&self, selector: &Selector) -> Result<Vec<Change>> {
        let (record, changes) = self.changes_of(selector)?;
        if record.plan.live.writeback {
            Self::write_out(&record, &changes)?;
        }
        if changes.inside.is_some() { apart::list(&changes) } else { changes.list() }
    }

    /// Make an image of what a writable rootfs was made of and what it changed.
    pub(crate) fn commit(&self, selector: &Selector, said: &Said) -> Result<Imported> {
        let (record, changes) = self.changes_of(selector)?;
        // Without --writeback, too: what was written through mmap(2).
        Self::write_out(&record, &changes)?;
        let Some(image) = &changes.image else {
            let why = "it was made of a directory, and not of an image in the store";
            return Err(Error::new(Kind::Unsupported, "commit", &record.plan.id, why)
                .hint("`fsprov image import ROOTFS --name NAME` makes an image of all that is there"));
        };
        let store = Store::open(&self.paths)?.with_policy(self.policy.clone());
        if changes.inside.is_some() {
            return store.commit(image, &|out| apart::write_layer(&changes, out), said);
        }
        let upper = changes.open_whole()?;
        store.commit(image, &|out| upper.write_layer(None, out), said)
    }

    fn write_out(top: &Record, changes: &Changes) -> Result<()> {
        let answers = top.backend == BackendKind::Fuse && Self::condition(top, &Now::look()?)? == Condition::Ready;
        if answers { settle(top, changes) } else { Ok(()) }
    }

    fn changes_of(&self, selector: &Selector) -> Result<(Record, Changes)> {
        let Some((outer, nested)) = self.with_nested(selector)? else { return Err(self.not_found(selector)) };
        // `fsprov run` of an ordinary user lays what it changes over a read-only rootfs of its own.
        let top = match changes_at(&outer) {
            Some(_) => outer.clone(),
            None => nested
                .iter()
                .filter_map(|id| record::read_or_log(&self.paths.container(id)))
                .find(|record| changes_at(record).is_some() && record.stands_on(&outer))
                .ok_or_else(|| not_to_be_read(&outer))?,
        };
        let below = match self.lower_of(&top) {
            Some(lower) => lower,
            None => top.clone(),
        };
        let at = changes_at(&top).cloned().ok_or_else(|| self.not_found(selector))?;
        let lower = match (&below.plan.index, &below.plan.layers[..]) {
            (Some(index), _) => Lower::Index(index.0.clone()),
            (None, [only]) => Lower::Directory(only.root.clone()),
            (None, _) => {
                let why = "it is of several directories without an index";
                return Err(Error::new(Kind::Unsupported, OP, &top.plan.id, why));
            }
        };
        let changes = Changes {
            at,
            backend: top.backend,
            known: top.places.as_ref().and_then(|places| places.scratch),
            owners: below.plan.ownership.clone(),
            limits: self.policy.limits.clone(),
            below: lower,
            layers: below.plan.layers.iter().map(|layer| layer.root.clone()).collect(),
            image: below.image.id.clone(),
            inside: namespace_of(&top)?,
        };
        Ok((top, changes))
    }

    /// The rootfs that this one is laid over, if it is one of ours.
    fn lower_of(&self, top: &Record) -> Option<Record> {
        let (outer, _) = top.plan.id.as_str().rsplit_once('.')?;
        let outer = record::read_or_log(&self.paths.container(&outer.parse().ok()?))?;
        top.stands_on(&outer).then_some(outer)
    }
}

/// Have the kernel write what it has gathered for the server. The path may lead to another's mount by now, which is not waited for.
fn settle(record: &Record, changes: &Changes) -> Result<()> {
    let rootfs = &record.plan.rootfs;
    let Some(id) = record.traces.mount().and_then(Known::current_id) else { return Ok(()) };
    let Ok(found) = open_resolved(rootfs) else { return Ok(()) };
    if mount_id(&found)? != id {
        return Ok(());
    }
    // Where the server is dead, nothing is gathered.
    let Ok(rootfs) = openat(&found, ".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else { return Ok(()) };
    rustix::fs::syncfs(&rootfs).map_err(|e| Error::sys("write what is gathered for", show(&record.plan.rootfs), e))?;
    // On FUSE that begins all writes and waits for none (sync_inodes_sb, fs/fs-writeback.c); closing a file waits for its own (fuse_flush,
    // fs/fuse/file.c, since Linux 5.8). Not for one that is gone, or may not be read, or has another mount over it, which may be anyone's.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    for file in changes.open()?.files()? {
        drop(openat2(&rootfs, &file, flags, Mode::empty(), how));
    }
    Ok(())
}

/// Where they are kept apart from the image.
fn changes_at(record: &Record) -> Option<&Scratch> {
    record.plan.scratch.as_ref().filter(|_| record.backend != BackendKind::Copy)
}

fn not_to_be_read(record: &Record) -> Error {
    let refuse = |why| Error::new(Kind::Unsupported, OP, &record.plan.id, why);
    match record.backend {
        BackendKind::Copy => refuse("a copy of an image does not keep its changes apart")
            .hint("mount it with --writable --backend overlay, or fuse"),
        _ => refuse("it is read-only").hint("mount it with --writable"),
    }
}

/// The process in whose user namespace its files can be read, if that is not this one.
fn namespace_of(record: &Record) -> Result<Option<crate::sys::process::ProcessId>> {
    let own: Namespace = user_namespace_of(std::process::id() as i32)?;
    if let Some(process) = record.ends_with.filter(|process| process.is_alive()) {
        return Ok((user_namespace_of(process.pid)? != own).then_some(process));
    }
    if Now::look()?.elsewhere(record)?.is_some() {
        let why = "it is mounted in another mount namespace, perhaps with other owners";
        return Err(Error::new(Kind::Unsupported, OP, &record.plan.id, why)
            .hint("run this command in there: `nsenter --target PID --user --mount`"));
    }
    Ok(None)
}

/// What is said of an image that comes of changes.
pub(crate) fn made_by(which: &OsStr, name: &str) -> String {
    format!("fsprov commit {} {name}", show(which))
}
