//! The snapshots: what containerd's Snapshots service promises, on the disk. Knows no gRPC.
//!
//! A call that changes something holds `changing` from its first look to its end; the table, which everybody reads, is locked for the
//! moment in which it changes, after the disk. So a call that only reads never waits for a disk.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::chain;
use super::dirs::{Dirs, FILES, WORK};
use super::filter::Filters;
use super::messages::{Commit, Info, Keyed, Mount, Mounts, Prepare, Told, Update, Usage};
use super::record::{Kind, Record};
use crate::error::{Error, Kind as ErrorKind, Result, show};
use crate::fault;
use crate::id::ImageId;
use crate::image::oci::Digest;
use crate::store::{Blob, ClaimedLayer, Store};
use crate::sys::durable::{Survives, sync_dir, write_file};
use crate::sys::remove::remove_tree;
use crate::sys::usage::measure;

/// Longest key or name. containerd's own are some hundred bytes.
const MAX_KEY_BYTES: usize = 4096;
/// Most labels of a snapshot, and their longest name and value together: containerd's own limit is 4,096 bytes each.
const MAX_LABELS: usize = 256;
const MAX_LABEL_BYTES: usize = 8192;
/// All labels of a snapshot together.
const MAX_LABELS_BYTES: usize = 128 << 10;
/// Most snapshots. Each takes about 1 kB of memory and some inodes.
const MAX_SNAPSHOTS: usize = 1 << 20;
/// Most lower layers of one overlay: OVL_MAX_STACK of Linux.
const MAX_LAYERS: usize = 500;
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

/// A lower directory of an overlay.
struct Lower {
    /// The name of its link.
    link: String,
    files: PathBuf,
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
    overlay: OverlayOptions,
    /// Held while something changes; the number of the next snapshot.
    changing: Mutex<u64>,
    table: RwLock<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_name: BTreeMap<String, Arc<Record>>,
    /// How many stand on each.
    children: HashMap<String, usize>,
    /// Committed ones by their chain id.
    chains: HashMap<String, BTreeSet<String>>,
    /// How many are made of each layer of the store.
    layers: HashMap<ImageId, usize>,
}

impl Table {
    fn insert(&mut self, record: Record) {
        if !record.parent.is_empty() {
            *self.children.entry(record.parent.clone()).or_default() += 1;
        }
        if let Some(layer) = &record.layer {
            *self.layers.entry(layer.clone()).or_default() += 1;
        }
        if let Some(chain) = record.chain.as_ref().filter(|_| record.kind == Kind::Committed) {
            self.chains.entry(chain.clone()).or_default().insert(record.name.clone());
        }
        self.by_name.insert(record.name.clone(), Arc::new(record));
    }

    fn remove(&mut self, name: &str) {
        let Some(record) = self.by_name.remove(name) else { return };
        one_less(&mut self.children, &record.parent);
        if let Some(layer) = &record.layer {
            one_less(&mut self.layers, layer);
        }
        if let Some(chain) = &record.chain
            && let Some(names) = self.chains.get_mut(chain)
        {
            names.remove(name);
            if names.is_empty() {
                self.chains.remove(chain);
            }
        }
    }
}

fn one_less<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// What every overlay of this host is mounted with.
#[derive(Clone, Copy, Debug)]
struct OverlayOptions {
    /// The kernel knows `index`: it is switched off, as many overlays share their lower layers.
    index_off: bool,
    /// Not in the first user namespace: marks are kept in `user.` attributes.
    userxattr: bool,
}

impl OverlayOptions {
    fn of_host() -> Result<Self> {
        Ok(OverlayOptions {
            index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
            userxattr: !crate::sys::process::in_initial_user_namespace()?,
        })
    }

    fn list(self) -> Vec<String> {
        let index = self.index_off.then_some("index=off");
        index.into_iter().chain(self.userxattr.then_some("userxattr")).map(str::to_owned).collect()
    }
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
    pub(crate) fn open(state: &Path, store: Store, known: Known) -> Result<Self> {
        let dirs = Dirs::open(state)?;
        let (table, next) = load(&dirs)?;
        let holder = chain::holder(state, store.paths());
        store.claims_of(&holder).set(&table.layers.keys().cloned().collect())?;
        let all = Snapshots {
            dirs,
            store,
            holder,
            known,
            overlay: OverlayOptions::of_host()?,
            changing: Mutex::new(next),
            table: RwLock::new(table),
        };
        Self::clear(&all.dirs.fresh())?;
        all.cleanup()?;
        all.clear_links();
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
        let mut record = Record::new(*next, key, parent, kind);
        record.labels = labels;
        let mounts = self.mounts_of(&record)?;
        self.make(&record)?;
        *next += 1;
        self.write(|table| table.insert(record));
        Ok(mounts)
    }

    /// Commit the layer that gives the chain id `target` upon `below`, if the store has it. Gives the name that it has: containerd looks for
    /// it by its label and its parent.
    fn claim(
        &self,
        target: &str,
        below: Option<&Record>,
        labels: &BTreeMap<String, String>,
        next: &mut u64,
    ) -> Result<Option<String>> {
        let below_chain = match below {
            None => None,
            Some(Record { chain: Some(chain), .. }) => Some(chain.as_str()),
            // What it stands on is not known.
            Some(_) => return Ok(None),
        };
        let parent = below.map(|below| below.name.clone()).unwrap_or_default();
        let found = self.read(|table| {
            let names = table.chains.get(target)?;
            let records = names.iter().filter_map(|name| table.by_name.get(name));
            let is_it = |record: &&Arc<Record>| {
                record.parent == parent && record.labels.get(chain::REFERENCE).is_some_and(|have| have == target)
            };
            records.into_iter().find(is_it).map(|record| record.name.clone())
        });
        if found.is_some() {
            return Ok(found);
        }
        let Some(layer) = self.store.layer_of_chain(below_chain, target)? else { return Ok(None) };
        self.commit_layer(&layer, target, &parent, labels.clone(), next)
    }

    /// Make a committed snapshot of a layer of the store. `None`: the layer is gone.
    fn commit_layer(
        &self,
        layer: &ImageId,
        chain_id: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
        next: &mut u64,
    ) -> Result<Option<String>> {
        let claims = self.store.claims_of(&self.holder);
        let Some(claimed) = claims.claim(layer)? else { return Ok(None) };
        // Made of the chain id, so that a state directory that was lost can be rebuilt. It is taken where others stand on another parent.
        let mut name = chain::name(chain_id);
        if self.find(&name).is_ok() {
            name = format!("{name}/{next}");
        }
        let mut record = Record::new(*next, name.clone(), parent.to_owned(), Kind::Committed);
        record.labels = labels;
        record.usage = claimed.usage;
        record.has_files = false;
        record.layer = Some(layer.clone());
        record.chain = Some(chain_id.to_owned());
        self.make(&record).map_err(|e| {
            let undo = if self.is_used(layer) { Ok(()) } else { claims.release(layer) };
            e.with_undo(undo)
        })?;
        *next += 1;
        self.write(|table| table.insert(record));
        Ok(Some(name))
    }

    fn is_used(&self, layer: &ImageId) -> bool {
        self.read(|table| table.layers.contains_key(layer))
    }

    /// A committed snapshot; one of a layer of the store that containerd knows, and this state directory no longer, is rebuilt.
    fn find_or_revive(&self, name: &str, next: &mut u64) -> Result<Arc<Record>> {
        let missing = match self.find(name) {
            Ok(record) => return Ok(record),
            Err(error) => error,
        };
        let Some(chain_id) = chain::of_name(name) else { return Err(missing) };
        let Some(layers) = self.store.layers_of_chain(chain_id)? else { return Err(missing) };
        let (mut parent, mut below) = (String::new(), None);
        for layer in &layers {
            let Some(made) = crate::store::chain_id(below.as_deref(), layer) else { return Err(missing) };
            let name = chain::name(&made);
            if self.find(&name).is_err() {
                let labels = BTreeMap::from([(chain::REFERENCE.to_owned(), made.clone())]);
                if self.commit_layer(layer, &made, &parent, labels, next)?.is_none() {
                    return Err(missing);
                }
                log::warn!("the snapshot {name:?} was missing; it is back, of the store's layer");
            }
            (parent, below) = (name, Some(made));
        }
        self.find(name)
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
        let made = self.fill(&dir, record).and_then(|()| {
            fault::point("snapshotter.publish")?;
            let to = self.dirs.snapshot(record.number);
            std::fs::rename(&dir, &to).map_err(|e| Error::io("publish snapshot", show(&to), e))?;
            sync_dir(&self.dirs.snapshots())
        });
        made.map_err(|e| {
            // Not known to anybody yet, whichever step failed.
            let undo = remove_tree(&dir).and_then(|_| remove_tree(&self.dirs.snapshot(record.number)));
            inside(e).with_undo(undo.map(|_| ()))
        })
    }

    fn fill(&self, dir: &Path, record: &Record) -> Result<()> {
        // What a process that died here left has this number, too.
        remove_tree(dir)?;
        let mkdir = |dir: &Path, mode| {
            std::fs::DirBuilder::new().mode(mode).create(dir).map_err(|e| Error::io("make", show(dir), e))
        };
        mkdir(dir, 0o700)?;
        fault::point("snapshotter.make")?;
        if record.has_files {
            let files = dir.join(FILES);
            mkdir(&files, 0o755)?;
            if record.kind == Kind::Active {
                mkdir(&dir.join(WORK), 0o711)?;
            }
            if let Some(top) = self.below(record)?.first() {
                // It covers the top directory of what is below: it must look the same.
                imitate(&top.files, &files)?;
            }
        }
        record.write(dir)
    }

    /// Where a snapshot's own files are.
    fn files_of(&self, record: &Record) -> PathBuf {
        self.dirs.snapshot(record.number).join(FILES)
    }

    /// `Mounts`.
    pub(crate) fn mounts(&self, asked: &Keyed) -> Result<Mounts> {
        let record = self.find(&asked.key)?;
        if record.kind == Kind::Committed {
            let why = "it is committed, and neither active nor a view";
            return Err(Error::new(ErrorKind::Busy, "mount snapshot", format!("{:?}", asked.key), why));
        }
        self.mounts_of(&record)
    }

    /// How a snapshot is mounted. It need not be there yet.
    fn mounts_of(&self, record: &Record) -> Result<Mounts> {
        let below = self.below(record)?;
        let own = self.dirs.snapshot(record.number);
        let bind = |source: &Path, mode: &str| Mount {
            r#type: "bind".into(),
            source: text(source),
            target: String::new(),
            options: vec![mode.into(), "rbind".into()],
        };
        let mount = match (&below[..], record.kind) {
            ([], Kind::View) => bind(&own.join(FILES), "ro"),
            ([], _) => bind(&own.join(FILES), "rw"),
            ([only], Kind::View) => bind(&only.files, "ro"),
            _ => {
                if below.len() > MAX_LAYERS {
                    let why = format!("it has {} layers, and overlayfs takes at most {MAX_LAYERS}", below.len());
                    return Err(Error::new(ErrorKind::Limit, "mount snapshot", format!("{:?}", record.name), why));
                }
                let mut options = self.overlay.list();
                if record.kind == Kind::Active {
                    options.push(format!("workdir={}", text(&own.join(WORK))));
                    options.push(format!("upperdir={}", text(&own.join(FILES))));
                }
                let links = below.iter().map(|lower| self.link(lower)).collect::<Result<Vec<_>>>()?;
                options.push(format!("lowerdir={}", links.join(":")));
                Mount { r#type: "overlay".into(), source: "overlay".into(), target: String::new(), options }
            }
        };
        Ok(Mounts { mounts: vec![mount] })
    }

    /// What lies below a snapshot's own files, topmost first. A layer that comes twice is there once, as overlayfs wants it: the topmost of its
    /// places counts, for there it brings and hides all that it brought and hid below.
    fn below(&self, record: &Record) -> Result<Vec<Lower>> {
        let mut below = Vec::new();
        let mut seen = HashSet::new();
        let mut of_layer = |record: &Record, below: &mut Vec<Lower>| {
            if let Some(layer) = record.layer.as_ref().filter(|layer| seen.insert((*layer).clone())) {
                below.push(Lower { link: format!("{}s", record.number), files: self.store.layer_tree(layer) });
            }
        };
        of_layer(record, &mut below);
        let chain = self.read(|table| {
            let mut chain: Vec<Arc<Record>> = Vec::new();
            let mut parent = record.parent.as_str();
            while !parent.is_empty() {
                let Some(next) = table.by_name.get(parent) else {
                    return Err(
                        inside(not_found(parent)).within("find what stands below", format!("{:?}", record.name))
                    );
                };
                chain.push(next.clone());
                parent = &next.parent;
            }
            Ok(chain)
        })?;
        for record in chain {
            if record.has_files {
                let files = self.dirs.snapshot(record.number).join(FILES);
                below.push(Lower { link: record.number.to_string(), files });
            }
            of_layer(&record, &mut below);
        }
        Ok(below)
    }

    /// The short path of a lower directory.
    fn link(&self, lower: &Lower) -> Result<String> {
        let link = self.dirs.links().join(&lower.link);
        if std::fs::read_link(&link).ok().as_deref() != Some(&lower.files) {
            // Two calls may make it at the same time: each renames its own over it.
            let unique = format!("{}-{:?}", lower.link, std::thread::current().id());
            let fresh = self.dirs.fresh().join(unique.replace(['(', ')'], "-"));
            let fail = |e| inside(Error::io("make link", show(&link), e));
            let _ = std::fs::remove_file(&fresh);
            std::os::unix::fs::symlink(&lower.files, &fresh).map_err(fail)?;
            std::fs::rename(&fresh, &link).map_err(fail)?;
        }
        Ok(text(&link))
    }

    /// The active snapshot whose mounts these are.
    pub(super) fn key_of_mounts(&self, mounts: &[Mount]) -> Option<String> {
        let [mount] = mounts else { return None };
        let files = match mount.r#type.as_str() {
            "overlay" => mount.options.iter().find_map(|option| option.strip_prefix("upperdir="))?,
            "bind" => &mount.source,
            _ => return None,
        };
        let below = Path::new(files).strip_prefix(self.dirs.snapshots()).ok()?;
        let number: u64 = below.parent()?.to_str()?.parse().ok()?;
        let is_it = |record: &&Arc<Record>| record.number == number && record.kind == Kind::Active;
        self.read(|table| table.by_name.values().find(is_it).map(|record| record.name.clone()))
    }

    /// The layer that is in this blob, if that is known.
    pub(super) fn layer_of_blob(&self, blob: &Digest) -> Result<Option<ImageId>> {
        let noted = std::fs::read_to_string(self.dirs.blobs().join(blob.hex())).ok();
        match noted.and_then(|text| text.parse().ok()) {
            Some(layer) => Ok(Some(layer)),
            None => self.store.layer_of_blob(blob),
        }
    }

    /// Make an active snapshot of this layer of the store. False: the store does not have it, or not so that a mount can show it.
    pub(super) fn put_layer(&self, key: &str, layer: &ImageId) -> Result<bool> {
        let _changing = self.change();
        let Some(claimed) = self.store.claims_of(&self.holder).claim(layer)? else { return Ok(false) };
        self.put(key, &claimed).map(|()| true).map_err(|e| e.with_undo(self.release_unused(layer)))
    }

    /// Unpack a layer into the store and make an active snapshot of it. Gives its diff id.
    pub(super) fn import_layer(&self, key: &str, blob: &Blob, input: Box<dyn std::io::Read + Send>) -> Result<ImageId> {
        // Others need not wait for that.
        let claims = self.store.claims_of(&self.holder);
        let claimed = claims.import(blob, input)?;
        let _changing = self.change();
        let Some(claimed) = claimed else {
            let why = "it has what this user may not put on the disk";
            return Err(Error::new(ErrorKind::Unsupported, "apply layer", &blob.digest, why));
        };
        let put = self.put(key, &claimed);
        put.map_err(|e| e.with_undo(self.release_unused(&claimed.diff_id)))?;
        // What is lost of it is found out again.
        let note = self.dirs.blobs().join(blob.digest.hex());
        if let Err(error) = write_file(&note, claimed.diff_id.as_str().as_bytes(), Survives::Crash) {
            log::warn!("{error}");
        }
        Ok(claimed.diff_id)
    }

    fn release_unused(&self, layer: &ImageId) -> Result<()> {
        if self.is_used(layer) { Ok(()) } else { self.store.claims_of(&self.holder).release(layer) }
    }

    fn put(&self, key: &str, claimed: &ClaimedLayer) -> Result<()> {
        let mut record = (*self.find(key)?).clone();
        let refuse = |why: &'static str| Err(Error::new(ErrorKind::Busy, "apply layer to", format!("{key:?}"), why));
        if record.kind != Kind::Active {
            return refuse("it is not active");
        }
        if record.layer.is_some() {
            return refuse("another layer was applied to it");
        }
        if !is_empty(&self.files_of(&record))? {
            return refuse("it has files");
        }
        record.layer = Some(claimed.diff_id.clone());
        record.usage = claimed.usage;
        record.touch();
        record.write(&self.dirs.snapshot(record.number)).map_err(inside)?;
        self.write(|table| {
            table.remove(key);
            table.insert(record);
        });
        Ok(())
    }

    /// `Commit`.
    pub(crate) fn commit(&self, asked: Commit) -> Result<()> {
        let Commit { name, key, labels } = asked;
        check_key("name", &name)?;
        let labels = check_labels(labels)?;
        let is_active = |record: &Record| {
            let why = "it is not active";
            let refused = || Error::new(ErrorKind::Busy, "commit snapshot", format!("{key:?}"), why);
            if record.kind == Kind::Active { Ok(()) } else { Err(refused()) }
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
        self.write(|table| {
            table.remove(&key);
            table.insert(record);
        });
        Ok(())
    }

    /// `Remove`: it is out of sight, and on the disk until [`Self::cleanup`].
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
        sync_dir(&self.dirs.snapshots()).map_err(inside)?;
        for link in [record.number.to_string(), format!("{}s", record.number)] {
            let _ = std::fs::remove_file(self.dirs.links().join(link));
        }
        match &record.layer {
            Some(layer) if !self.is_used(layer) => self.store.claims_of(&self.holder).release(layer).map_err(inside),
            _ => Ok(()),
        }
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

    /// `Cleanup`: delete what was removed.
    pub(crate) fn cleanup(&self) -> Result<()> {
        Self::clear(&self.dirs.gone())
    }

    /// Delete all that is in one of our directories. What cannot be deleted is logged, and tried again next time.
    fn clear(dir: &Path) -> Result<()> {
        for entry in std::fs::read_dir(dir).map_err(|e| inside(Error::io("list", show(dir), e)))? {
            let path = entry.map_err(|e| inside(Error::io("list", show(dir), e)))?.path();
            fault::point("snapshotter.delete")?;
            if let Err(error) = remove_tree(&path) {
                log::warn!("{error}");
            }
        }
        Ok(())
    }

    /// Forget blobs whose layers no snapshot has.
    fn clear_blobs(&self) {
        for entry in std::fs::read_dir(self.dirs.blobs()).into_iter().flatten().flatten() {
            let layer = std::fs::read_to_string(entry.path()).ok().and_then(|text| text.parse::<ImageId>().ok());
            if layer.is_none_or(|layer| !self.is_used(&layer)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Remove links of snapshots that are gone.
    fn clear_links(&self) {
        for entry in std::fs::read_dir(self.dirs.links()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.trim_end_matches('s').parse::<u64>().ok());
            if number.is_none_or(|number| !self.dirs.snapshot(number).exists()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// The state directory.
    pub(crate) fn state(&self) -> &Path {
        self.dirs.state()
    }
}

/// Read all records. Gives the number that the next snapshot gets, too.
fn load(dirs: &Dirs) -> Result<(Table, u64)> {
    let mut table = Table::default();
    let mut next = 1;
    let (live, gone) = (dirs.snapshots(), dirs.gone());
    let mut records = Vec::new();
    for (dir, counts) in [(&live, true), (&gone, false)] {
        for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", show(dir), e))? {
            let path = entry.map_err(|e| Error::io("list", show(dir), e))?.path();
            let number = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<u64>().ok());
            let Some(number) = number else {
                log::warn!("{} is not a snapshot's", show(&path));
                continue;
            };
            next = next.max(number + 1);
            if !counts {
                continue;
            }
            match Record::read(&path) {
                Ok(record) if record.number == number => records.push(record),
                Ok(record) => log::error!("{}: its record is of snapshot {}", show(&path), record.number),
                Err(error) => log::error!("{error}: the snapshot is left out, and stays on the disk"),
            }
        }
    }
    records.sort_by_key(|record| record.number);
    for record in records {
        match table.by_name.get(&record.name) {
            Some(other) => log::error!("snapshots {} and {} have the same name", other.number, record.number),
            None => table.insert(record),
        }
    }
    Ok((table, next))
}

/// Bytes on the disk, and inodes, the top directory with them.
fn measured(dir: &Path) -> Result<(u64, u64)> {
    measure(dir).map(|usage| (usage.bytes, usage.files + 1))
}

fn is_empty(dir: &Path) -> Result<bool> {
    let mut entries = std::fs::read_dir(dir).map_err(|e| inside(Error::io("list", show(dir), e)))?;
    Ok(entries.next().is_none())
}

/// Give a directory the owner and the mode of another.
fn imitate(model: &Path, dir: &Path) -> Result<()> {
    let fail = |e| Error::io("imitate", show(model), e);
    let meta = std::fs::metadata(model).map_err(fail)?;
    std::os::unix::fs::chown(dir, Some(meta.uid()), Some(meta.gid())).map_err(fail)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(meta.mode() & 0o7777)).map_err(fail)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn check_key(what: &'static str, key: &str) -> Result<()> {
    let refuse = |why: String| {
        let shown: String = key.chars().take(100).collect();
        Err(Error::new(ErrorKind::Invalid, format!("use {what}"), format!("{shown:?}"), why))
    };
    if key.is_empty() {
        return refuse("it is empty".into());
    }
    if key.len() > MAX_KEY_BYTES {
        return refuse(format!("it is longer than {MAX_KEY_BYTES} bytes"));
    }
    if key.chars().any(char::is_control) {
        return refuse("it has control characters".into());
    }
    Ok(())
}

/// Labels that may be kept. An empty value means that there is none, as in containerd.
fn check_labels(mut labels: BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    labels.retain(|_, value| !value.is_empty());
    let size = |(name, value): (&String, &String)| name.len() + value.len();
    let why = if labels.len() > MAX_LABELS {
        format!("more than {MAX_LABELS}")
    } else if labels.iter().any(|label| size(label) > MAX_LABEL_BYTES) {
        format!("one of them is longer than {MAX_LABEL_BYTES} bytes")
    } else if labels.iter().map(size).sum::<usize>() > MAX_LABELS_BYTES {
        format!("together longer than {MAX_LABELS_BYTES} bytes")
    } else if labels.keys().any(String::is_empty) {
        "one has no name".into()
    } else {
        return Ok(labels);
    };
    Err(Error::new(ErrorKind::Invalid, "use labels", "", why))
}
