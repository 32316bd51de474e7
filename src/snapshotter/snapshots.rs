//! The snapshots: what containerd's Snapshots service promises, on the disk. Knows no gRPC.
//!
//! A call that changes something holds `changing` from its first look to its end; the table, which everybody reads, is locked for the
//! moment in which it changes, after the disk. So a call that only reads never waits for a disk.

mod checks;
mod layers;
mod merge;
mod mounts;
mod ready;
mod table;
mod upkeep;

use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::io::Errno;

use super::chain;
use super::dirs::{Dirs, FILES, WORK};
use super::filter::Filters;
use super::mapped;
use super::merged::Merged;
use super::messages::{Commit, Info, Keyed, Mounts, Prepare, Told, Update, Usage};
use super::mounted;
use super::record::{Kind, Record};
use crate::error::{Error, Kind as ErrorKind, Result, show};
use crate::fault;
use crate::plan::Ownership;
use crate::store::{Showing, Store};
use crate::sys::durable::sync_dir;
use crate::sys::remove::remove_tree;
use crate::sys::usage::measure;
use checks::{check_key, check_labels};
pub(crate) use mounts::LowerForm;
use mounts::OverlayOptions;
pub(super) use mounts::Part;
use ready::Ready;
use table::Table;

/// Most snapshots. Each takes about 1 kB of memory and some inodes.
const MAX_SNAPSHOTS: usize = 1 << 20;
/// Snapshots looked at for one message of List.
const LIST_STEP: usize = 1000;
/// Snapshots in one message of List, as in containerd.
const LIST_MESSAGE: usize = 100;

/// What becomes of a layer that the store has, when containerd says which one it is about to download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// It is committed, and containerd downloads nothing.
    Committed,
    /// It is downloaded all the same: a client that lists or pushes images by their blobs needs those (Docker).
    Downloaded,
}

/// All snapshots of one containerd.
#[derive(Debug)]
pub(crate) struct Snapshots {
    dirs: Dirs,
    store: Store,
    /// Whose our claims in the store are.
    holder: String,
    /// Whether layers of the store are committed when they are asked for.
    known: Known,
    /// How what lies below is shown, and so which layers can be.
    lower: LowerForm,
    showing: Showing,
    merged: Merged,
    overlay: OverlayOptions,
    /// Held while something changes; the number of the next snapshot.
    changing: Mutex<u64>,
    /// Held while layers are shown with other owners.
    mapping: Mutex<()>,
    table: RwLock<Table>,
    ready: Ready,
    /// No snapshot was left out at the start. Else a container may stand on one, and no claim is given up until there is a start without.
    is_whole: bool,
}

/// How many there are.
pub(super) struct Counts {
    /// Views, active ones, committed ones.
    pub(super) by_kind: [usize; 3],
    /// Layers of the store.
    pub(super) layers: usize,
    /// Removed and not deleted.
    pub(super) removed: usize,
    /// Maps of ids.
    pub(super) maps: usize,
    /// FUSE mounts.
    pub(super) merged: usize,
}

/// Files of ours that are not where they should be are not an answer to a question for a snapshot: NotFound means that there is none.
fn inside(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::Exists | ErrorKind::Busy => error.with_kind(ErrorKind::Io),
        _ => error,
    }
}

fn not_found(key: &str) -> Error {
    Error::new(ErrorKind::NotFound, "find snapshot", format!("{key:?}"), "it does not exist")
}

impl Snapshots {
    /// Open a state directory, made where it is missing, and finish or take back what was cut short.
    pub(crate) fn open(state: &Path, store: Store, known: Known, lower: LowerForm) -> Result<Self> {
        let dirs = Dirs::open(state)?;
        let upkeep::Loaded { table, next, is_whole } = upkeep::load(&dirs)?;
        let merged = Merged::open(&dirs.merged())?;
        let holder = chain::holder(state, store.paths());
        if let Err(error) = mounted::name_state(state, &holder, store.paths()) {
            log::warn!("`fsprov list` will not show these snapshots: {error}");
        }
        let all = Snapshots {
            holder,
            showing: Self::check_lower(&merged, lower)?,
            dirs,
            store,
            known,
            lower,
            merged,
            overlay: OverlayOptions::of_host()?,
            changing: Mutex::new(next),
            mapping: Mutex::new(()),
            table: RwLock::new(table),
            ready: Ready::default(),
            is_whole,
        };
        all.claims().set(&all.read(|table| table.layers.keys().cloned().collect()), is_whole)?;
        Self::clear(&all.dirs.fresh())?;
        all.cleanup()?;
        all.clear_links();
        all.clear_mapped();
        all.reconcile_merged();
        all.clear_blobs();
        Ok(all)
    }

    fn change(&self) -> MutexGuard<'_, u64> {
        // Nothing of it is left half-changed by a panic: the disk changes in one rename, the table after it.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T>(&self, work: impl FnOnce(&Table) -> T) -> T {
        work(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, work: impl FnOnce(&mut Table)) {
        work(&mut self.table.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn find(&self, key: &str) -> Result<Arc<Record>> {
        self.read(|table| table.by_name.get(key).cloned()).ok_or_else(|| not_found(key))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.read(|table| table.by_name.len())
    }

    /// What there is, by what it is.
    pub(super) fn counts(&self) -> Counts {
        let removed = std::fs::read_dir(self.dirs.gone()).map_or(0, Iterator::count);
        let merged = self.merged.count();
        self.read(|table| {
            let count = |kind| table.by_name.values().filter(|record| record.kind == kind).count();
            let maps = table.by_name.values().filter_map(|record| record.maps.as_ref().map(mapped::name));
            Counts {
                by_kind: [Kind::View, Kind::Active, Kind::Committed].map(count),
                layers: table.layers.len(),
                removed,
                maps: maps.collect::<std::collections::HashSet<_>>().len(),
                merged,
            }
        })
    }

    /// `Prepare` (kind Active) and `View`.
    pub(crate) fn prepare(&self, asked: Prepare, kind: Kind) -> Result<Mounts> {
        let Prepare { key, parent, labels } = asked;
        check_key("key", &key)?;
        let labels = check_labels(labels)?;
        let mut next = self.change();
        self.check_room()?;
        self.check_free(&key)?;
        let below = if parent.is_empty() { None } else { Some(self.find_or_revive(&parent, &mut next)?) };
        if below.as_ref().is_some_and(|below| below.kind != Kind::Committed) {
            let why = "it is not committed, and nothing can stand on it";
            return Err(Error::new(ErrorKind::Invalid, "use parent", format!("{parent:?}"), why));
        }
        if kind == Kind::Active
            && self.known == Known::Committed
            && let Some(target) = labels.get(chain::REFERENCE).filter(|target| chain::is_chain_id(target))
            && let Some(name) = self.claim(target, below.as_deref(), &labels, &mut next)?
        {
            let why = format!("the store has its layer: it is committed as {name:?}");
            return Err(Error::new(ErrorKind::Exists, "make snapshot", format!("{key:?}"), why));
        }
        let maps = mapped::of_labels(&labels)?.filter(|maps| !mapped::is_done(&parent, maps));
        let ready = if kind == Kind::Active { self.ready.take() } else { None };
        let mut record = Record::new(ready.unwrap_or(*next), key, parent, kind);
        record.maps = maps;
        record.labels = labels;
        let mounts = self.mounts_of(&record).inspect_err(|_| self.ready.give_back(ready))?;
        let made = if ready.is_some() { self.finish(&mut record) } else { self.make(&record) };
        made.inspect_err(|_| self.release_shown(&record))?;
        if ready.is_none() {
            *next += 1;
        }
        self.write(|table| table.insert(record));
        Ok(mounts)
    }

    fn check_room(&self) -> Result<()> {
        if self.count() < MAX_SNAPSHOTS {
            return Ok(());
        }
        let why = format!("there are {MAX_SNAPSHOTS} already");
        Err(Error::new(ErrorKind::Limit, "make snapshot", "", why).hint("remove some"))
    }

    fn check_free(&self, key: &str) -> Result<()> {
        match self.find(key) {
            Ok(_) => Err(Error::new(ErrorKind::Exists, "make snapshot", format!("{key:?}"), "it exists")),
            Err(_) => Ok(()),
        }
    }

    /// Bring a new snapshot to the disk: whole, or not at all.
    fn make(&self, record: &Record) -> Result<()> {
        let dir = self.dirs.fresh().join(record.number.to_string());
        let made = self.fill(&dir, record).and_then(|file| {
            fault::point("snapshotter.publish")?;
            let to = self.dirs.snapshot(record.number);
            let fail = |e| Error::io("publish snapshot", show(&to), e);
            std::fs::rename(&dir, &to).map_err(fail)?;
            // Last: one commit of the journal has all of it. What a power loss leaves before is empty (see [`upkeep::load`]).
            fault::point("durable.sync")?;
            file.sync_all().map_err(fail)?;
            sync_dir(&self.dirs.snapshots())
        });
        made.map_err(|e| {
            // Not known to anybody yet, whichever step failed.
            let undo = remove_tree(&dir).and_then(|_| remove_tree(&self.dirs.snapshot(record.number)));
            inside(e).with_undo(undo.map(|_| ()))
        })
    }

    fn fill(&self, dir: &Path, record: &Record) -> Result<std::fs::File> {
        make_dirs(dir, record.has_files, record.kind == Kind::Active)?;
        fault::point("snapshotter.make")?;
        if record.has_files {
            self.dress(dir, record)?;
        }
        record.make(dir)
    }

    /// A snapshot's own files cover the top directory of what is below: it must look the same. Did that change it?
    fn dress(&self, dir: &Path, record: &Record) -> Result<bool> {
        let files = dir.join(FILES);
        match self.model_of(record)? {
            Some((model, maps)) => imitate(&model, &files, maps),
            None => imitate(&files, &files, record.maps.as_ref()),
        }
    }

    /// Where a snapshot's own files are.
    fn files_of(&self, record: &Record) -> PathBuf {
        self.dirs.snapshot(record.number).join(FILES)
    }

    /// `Commit`.
    pub(crate) fn commit(&self, asked: Commit) -> Result<()> {
        let Commit { name, key, labels } = asked;
        check_key("name", &name)?;
        let labels = check_labels(labels)?;
        let is_active = |record: &Record| {
            let why = "it is not active";
            let refused = || Error::new(ErrorKind::Busy, "commit snapshot", format!("{key:?}"), why);
            if record.kind != Kind::Active {
                return Err(refused());
            }
            if record.maps.is_none() {
                return Ok(());
            }
            let why = "its files have the owners of a user namespace";
            Err(Error::new(ErrorKind::Busy, "commit snapshot", format!("{key:?}"), why)
                .hint("make a layer of it with the Diff service"))
        };
        // It may take long, and nothing else must wait for it.
        let before = self.find(&key)?;
        is_active(&before)?;
        let files = self.files_of(&before);
        let (mut usage, is_empty) = (measured(&files).map_err(inside)?, is_empty(&files)?);
        let _changing = self.change();
        self.check_free(&name)?;
        let mut record = (*self.find(&key)?).clone();
        is_active(&record)?;
        record.touch();
        record.created = record.updated;
        record.kind = Kind::Committed;
        record.name.clone_from(&name);
        // Replaced, not added to, as the reference has it.
        record.labels = labels;
        record.chain = chain::of_commit(&name);
        if record.layer.is_some() {
            // What was written beside the layer covers it; mostly there is nothing.
            record.has_files = !is_empty;
            let own = if is_empty { (0, 0) } else { usage };
            usage = (record.usage.0 + own.0, record.usage.1 + own.1);
        }
        record.usage = usage;
        fault::point("snapshotter.commit")?;
        record.write(&self.dirs.snapshot(record.number)).map_err(inside)?;
        let number = record.number;
        self.write(|table| {
            table.remove(&key);
            table.insert(record);
        });
        self.merged.release(number);
        Ok(())
    }

    /// `Remove`: it is out of sight, and on the disk until [`Self::cleanup`]. One that a power loss brings back before that is nobody's, and containerd
    /// removes it with what else it does not know.
    pub(crate) fn remove(&self, asked: &Keyed) -> Result<()> {
        let _changing = self.change();
        let record = self.find(&asked.key)?;
        if self.read(|table| table.children.contains_key(&asked.key)) {
            let why = "another snapshot stands on it";
            return Err(Error::new(ErrorKind::Busy, "remove snapshot", format!("{:?}", asked.key), why));
        }
        let (from, to) = (self.dirs.snapshot(record.number), self.dirs.gone().join(record.number.to_string()));
        fault::point("snapshotter.remove")?;
        std::fs::rename(&from, &to).map_err(|e| inside(Error::io("remove snapshot", show(&from), e)))?;
        self.write(|table| table.remove(&asked.key));
        for link in [record.number.to_string(), format!("{}s", record.number)] {
            let _ = std::fs::remove_file(self.dirs.links().join(link));
        }
        self.release_shown(&record);
        let _ = std::fs::remove_file(self.merged.own_index(record.number));
        match &record.layer {
            Some(layer) => self.release_unused(layer).map_err(inside),
            None => Ok(()),
        }
    }

    /// What was mounted for a snapshot that is not there, or not any more. Under [`Self::change`].
    fn release_shown(&self, record: &Record) {
        if record.maps.is_some() {
            self.clear_mapped();
        }
        self.merged.release(record.number);
    }

    /// [`Self::stat`] of one that there is.
    pub(crate) fn stat_at_once(&self, asked: &Keyed) -> Option<Result<Told>> {
        self.find(&asked.key).ok().map(|record| Ok(Told { info: Some(record.info()) }))
    }

    /// `Stat`.
    pub(crate) fn stat(&self, asked: &Keyed) -> Result<Told> {
        let record = match self.find(&asked.key) {
            Err(_) if chain::of_name(&asked.key).is_some() => self.find_or_revive(&asked.key, &mut self.change())?,
            other => other?,
        };
        Ok(Told { info: Some(record.info()) })
    }

    /// `Update`: labels, all that may change.
    pub(crate) fn update(&self, asked: Update) -> Result<Told> {
        let Update { info, update_mask } = asked;
        let info = info.unwrap_or_default();
        let _changing = self.change();
        let mut record = (*self.find(&info.name)?).clone();
        let paths = update_mask.unwrap_or_default().paths;
        if paths.is_empty() {
            record.labels.clone_from(&info.labels);
        }
        for path in &paths {
            match path.strip_prefix("labels.") {
                Some(label) => {
                    let value = info.labels.get(label).cloned().unwrap_or_default();
                    record.labels.insert(label.to_owned(), value);
                }
                None if path == "labels" => record.labels.clone_from(&info.labels),
                None => {
                    let why = format!("the field {path:?} cannot be changed");
                    return Err(Error::new(ErrorKind::Invalid, "update snapshot", format!("{:?}", info.name), why));
                }
            }
        }
        record.labels = check_labels(std::mem::take(&mut record.labels))?;
        record.touch();
        record.write(&self.dirs.snapshot(record.number)).map_err(inside)?;
        let told = record.info();
        self.write(|table| {
            table.by_name.insert(record.name.clone(), Arc::new(record));
        });
        Ok(Told { info: Some(told) })
    }

    /// One message of `List`: those after the name `after` for which `filters` hold. `None`: that was the end.
    pub(super) fn list_after(&self, after: Option<&str>, filters: &Filters) -> (Vec<Info>, Option<String>) {
        self.read(|table| {
            let from = after.map_or(Bound::Unbounded, Bound::Excluded);
            let mut found = Vec::new();
            for (looked_at, (name, record)) in table.by_name.range::<str, _>((from, Bound::Unbounded)).enumerate() {
                if filters.hold(record) {
                    found.push(record.info());
                }
                if found.len() == LIST_MESSAGE || looked_at == LIST_STEP {
                    return (found, Some(name.clone()));
                }
            }
            (found, None)
        })
    }

    /// `Usage`.
    pub(crate) fn usage(&self, asked: &Keyed) -> Result<Usage> {
        let record = self.find(&asked.key)?;
        let (size, inodes) = match record.kind {
            Kind::Active => measured(&self.files_of(&record)).map_err(inside)?,
            Kind::View | Kind::Committed => record.usage,
        };
        Ok(Usage { size: size as i64, inodes: inodes as i64 })
    }

    /// The state directory.
    pub(crate) fn state(&self) -> &Path {
        self.dirs.state()
    }
}

/// Bytes on the disk, and inodes, the top directory with them.
fn measured(dir: &Path) -> Result<(u64, u64)> {
    measure(dir).map(|usage| (usage.bytes, usage.files + 1))
}

fn is_empty(dir: &Path) -> Result<bool> {
    let mut entries = std::fs::read_dir(dir).map_err(|e| inside(Error::io("list", show(dir), e)))?;
    Ok(entries.next().is_none())
}

/// The directories of a snapshot that is being made.
fn make_dirs(dir: &Path, has_files: bool, is_written: bool) -> Result<()> {
    // What a process that died here left has this number, too.
    remove_tree(dir)?;
    let mkdir = |dir: &Path, mode| {
        std::fs::DirBuilder::new().mode(mode).create(dir).map_err(|e| Error::io("make", show(dir), e))
    };
    mkdir(dir, 0o700)?;
    if has_files {
        mkdir(&dir.join(FILES), 0o755)?;
    }
    if has_files && is_written {
        mkdir(&dir.join(WORK), 0o711)?;
    }
    Ok(())
}

/// Give a directory the owner and the mode of another, the owner by these maps. Did that change it?
fn imitate(model: &Path, dir: &Path, maps: Option<&Ownership>) -> Result<bool> {
    let fail = |e| Error::io("imitate", show(model), e);
    let (meta, now) = (std::fs::metadata(model).map_err(fail)?, std::fs::metadata(dir).map_err(fail)?);
    let (uid, gid) = maps.map_or((meta.uid(), meta.gid()), |maps| {
        (Ownership::map(&maps.uids, meta.uid()), Ownership::map(&maps.gids, meta.gid()))
    });
    let mode = meta.mode() & 0o7777;
    if (now.uid(), now.gid(), now.mode() & 0o7777) == (uid, gid, mode) {
        return Ok(false);
    }
    match std::os::unix::fs::chown(dir, Some(uid), Some(gid)) {
        // Nobody whom this user namespace has: the container's root stays the owner.
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => log::debug!("own {}: {e}", show(dir)),
        other => other.map_err(fail)?,
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode)).map_err(fail)?;
    Ok(true)
}
