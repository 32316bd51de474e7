//! Provision, destroy, list: the steps of one rootfs's life, each of which can be undone.
//!
//! Owns the records. Must not make mounts itself: a [`Plan`] goes to a backend, and what the backend leaves in the system comes
//! back as [`Traces`] for the record.
//!
//! Lock order: the containers directory (short: claim an id and a mount point), then one container's directory (as long as
//! its rootfs is being changed). The store's shared lock is held from resolving an image until the record that names it is
//! on the disk.

mod destroy;
mod fill;
mod lock;
mod now;
mod points;
mod record;
mod recover;
mod resume;
mod select;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use now::Now;
pub use record::{ImageNote, Record, State};
pub use recover::{Outcome, Recovered};
pub use select::{Choice, Rejected};

use crate::backend::{self, Detach, Health, Journal, Meter, Shelf, Traces, Usage};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::host::Host;
use crate::id::{ContainerId, ImageId, ImageRef};
use crate::paths::{ContainerPaths, StatePaths};
use crate::plan::{BackendKind, IndexFile, Layer, Live, Ownership, Plan, Scratch};
use crate::store::{Policy, ResolvedImage, Store};
use crate::tree::Tree;
use crate::volume::{self, ContainerPath, Fill, Volume, VolumeSpec};

/// What a user asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which image.
    pub image: ImageRef,
    /// Where its root filesystem shall appear; made (mode 0755) if missing, and then removed again by [`Provisioner::destroy`].
    pub rootfs: PathBuf,
    /// Which backend; `None`: the first of [`backend::AUTO_ORDER`] that can.
    pub backend: Option<BackendKind>,
    /// The executor work directory: relative volume sources lie below it.
    pub sandbox: Option<PathBuf>,
    /// Volumes, in any order.
    pub volumes: Vec<VolumeSpec>,
    /// The rootfs's id; `None`: a random one.
    pub id: Option<ContainerId>,
    /// How ownership is presented.
    pub ownership: Ownership,
    /// How volumes are served (fuse).
    pub live: Live,
    /// What may be changed outside the volumes.
    pub changes: Changes,
}

/// What may be changed in a rootfs outside its volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Changes {
    /// Nothing, but in a copy.
    #[default]
    Refused,
    /// Everything; what was changed ends with the rootfs.
    Ephemeral,
}

/// A record and how its rootfs fares now.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Status {
    /// The record.
    #[serde(flatten)]
    pub record: Record,
    /// What mountinfo and the processes say.
    pub health: Condition,
    /// What its own changes take on the disk, where it keeps them apart from the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changes: Option<Usage>,
}

/// How a rootfs fares, as `list` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// Mounted and answering.
    Ready,
    /// Being provisioned or destroyed right now.
    Changing,
    /// Its provisioning was cut short: `unmount` cleans it.
    Interrupted,
    /// Its server is dead (ENOTCONN): `unmount` cleans it.
    Dead,
    /// No longer mounted here: `unmount` removes what is left of it.
    Gone,
    /// Mounted in another mount namespace.
    Elsewhere,
}

impl Condition {
    /// The word `list` shows.
    pub fn name(self) -> &'static str {
        match self {
            Condition::Ready => "ready",
            Condition::Changing => "changing",
            Condition::Interrupted => "interrupted",
            Condition::Dead => "dead",
            Condition::Gone => "gone",
            Condition::Elsewhere => "elsewhere",
        }
    }
}

/// Which rootfs: by id, or by where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// By id.
    Id(ContainerId),
    /// By mount point.
    Rootfs(PathBuf),
}

impl Selector {
    /// An argument `ROOTFS|ID`: a path when it holds a `/` or is `.` or `..`, else an id if it can be one.
    pub fn parse(text: &std::ffi::OsStr) -> Self {
        let id = text.to_str().and_then(|t| t.parse().ok());
        match id {
            Some(id) => Selector::Id(id),
            None => Selector::Rootfs(PathBuf::from(text)),
        }
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Selector::Id(id) => id.fmt(f),
            Selector::Rootfs(path) => f.write_str(&show(path)),
        }
    }
}

/// Provisions and destroys the rootfses of one state root.
///
/// ```no_run
/// use fsprov::backend::Detach;
/// use fsprov::provisioner::{Provisioner, Request, Selector};
///
/// // A FUSE server is this program again: it must be let through, first of all.
/// if fsprov::daemon::dispatch().is_some() {
///     return Ok(());
/// }
/// let paths = fsprov::paths::StatePaths::new("/var/lib/fsprov".into());
/// let provisioner = Provisioner::new(paths, fsprov::host::Host::probe());
/// // After a crash or reboot: what was mounted is mounted again, what was half-made goes.
/// for one in provisioner.recover(None)? {
///     println!("{one:?}");
/// }
/// let record = provisioner.provision(&Request {
///     image: fsprov::id::ImageRef::parse("example.com/debian".as_ref())?,
///     rootfs: "/srv/web/rootfs".into(),
///     backend: None,
///     sandbox: Some("/srv/web/work".into()),
///     volumes: vec![fsprov::volume::VolumeSpec::parse("tmp:/tmp:rw".as_ref())?],
///     id: None,
///     ownership: Default::default(),
///     changes: Default::default(),
///     live: Default::default(),
/// })?;
/// println!("{} is ready", record.plan.id);
/// provisioner.destroy(&Selector::Id(record.plan.id), Detach::IfIdle)?;
/// # Ok::<(), fsprov::Error>(())
/// ```
#[derive(Debug)]
pub struct Provisioner {
    paths: StatePaths,
    host: Host,
    meter: Option<Arc<Meter>>,
    shelf: Option<Arc<dyn Shelf>>,
    policy: Policy,
}

impl Provisioner {
    /// Work with the records below `paths`, on this host.
    pub fn new(paths: StatePaths, host: Host) -> Self {
        Provisioner { paths, host, meter: None, shelf: None, policy: Policy::default() }
    }

    /// Count on `meter` what provisioning copies.
    #[must_use]
    pub fn metered(mut self, meter: Arc<Meter>) -> Self {
        self.meter = Some(meter);
        self
    }

    /// The same as the one process of a service: what its rootfs needs to outlive all its processes goes to `shelf`, and
    /// [`Provisioner::resume`] goes on with it.
    #[must_use]
    pub fn on_shelf(self, shelf: Option<Arc<dyn Shelf>>) -> Self {
        Provisioner { shelf, ..self }
    }

    /// The same with this policy for the images it imports.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Provisioner { policy, ..self }
    }

    /// What this host may do.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Put an image's root filesystem in place. When this returns the rootfs answers; on an error nothing is left.
    pub fn provision(&self, request: &Request) -> Result<Record> {
        let id = match &request.id {
            Some(id) => id.clone(),
            None => ContainerId::random()?,
        };
        let store = Store::open(&self.paths)?.with_policy(self.policy.clone());
        // Held until the record names the image: from then on `image rm` and gc see that it is in use.
        let in_use = store.lock_shared()?;
        let image = store.resolve(&request.image)?;
        let (rootfs, missing) = mount_point(&request.rootfs)?;
        let mut sources = Sources::default();
        let volumes = sources.resolve(request, &image, &self.paths)?;
        let container = self.paths.container(&id);
        let scratch = match request.changes {
            Changes::Refused => None,
            Changes::Ephemeral => Some(scratch(&id, request.sandbox.as_deref(), &container)?),
        };
        let plan = Plan {
            id: id.clone(),
            rootfs,
            layers: image.layers.iter().map(|root| Layer { root: root.clone() }).collect(),
            index: image.index.clone().map(IndexFile),
            is_filtered: image.is_filtered,
            has_whiteouts: image.has_whiteouts,
            volumes: volume::order(volumes)?,
            ownership: request.ownership.clone(),
            scratch,
            live: request.live,
            state_dir: container.backend(),
        };
        plan.require_layers()?;
        let choice = select::choose(&self.host, &plan, request.backend)?;
        let note = ImageNote { reference: request.image.to_string(), id: image.id, name: image.name };
        let record = Record::new(note, choice.backend, plan, missing)?;

        let claim = self.claim(&record)?;
        drop(in_use);
        let mut making = Making { by: self, container: &container, record, _claim: claim };
        match sources.fill(&making.record.plan).and_then(|()| making.build_by(choice, request.backend)) {
            Ok(()) => {
                sources.keep();
                Ok(making.record)
            }
            Err(error) => Err(making.undo(error)),
        }
    }

    /// Every rootfs of this state root, oldest first. A record that cannot be read is logged and left out.
    ///
    /// ```no_run
    /// # let paths = fsprov::paths::StatePaths::new("/var/lib/fsprov".into());
    /// let provisioner = fsprov::provisioner::Provisioner::new(paths, fsprov::host::Host::probe());
    /// for status in provisioner.list()? {
    ///     println!("{} {}: {}", status.record.plan.id, status.record.plan.rootfs.display(), status.health.name());
    /// }
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn list(&self) -> Result<Vec<Status>> {
        let mut all = Vec::new();
        let now = Now::look()?;
        for id in record::ids(&self.paths)? {
            match self.status(&id, &now) {
                Ok(Some(status)) => all.push(status),
                Ok(None) => {}
                Err(error) => log::warn!("{error}"),
            }
        }
        all.sort_by(|a, b| (&a.record.created, &a.record.plan.id).cmp(&(&b.record.created, &b.record.plan.id)));
        Ok(all)
    }

    /// One rootfs, by its id or its mount point. [`Kind::NotFound`] where there is none.
    ///
    /// ```no_run
    /// # let paths = fsprov::paths::StatePaths::new("/var/lib/fsprov".into());
    /// use fsprov::provisioner::{Provisioner, Selector};
    /// let provisioner = Provisioner::new(paths, fsprov::host::Host::probe());
    /// let status = provisioner.inspect(&Selector::parse("/mnt/debian".as_ref()))?;
    /// println!("{} volumes", status.record.plan.volumes.len());
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn inspect(&self, selector: &Selector) -> Result<Status> {
        let found = match self.find_id(selector)? {
            Some(id) => self.status(&id, &Now::look()?)?,
            None => None,
        };
        found.ok_or_else(|| self.not_found(selector))
    }

    /// The error for a selector that names nothing.
    pub fn not_found(&self, selector: &Selector) -> Error {
        Error::new(Kind::NotFound, "find rootfs", selector, "fsprov provisioned none here").hint(format!(
            "`fsprov list` shows what there is; records are kept in {} (--root chooses another)",
            show(self.paths.root())
        ))
    }

    /// Images that a record names, with the rootfs that uses each.
    pub fn images_in_use(&self) -> Result<Vec<(ImageId, ContainerId)>> {
        images_in_use(&self.paths)
    }

    fn status(&self, id: &ContainerId, now: &Now) -> Result<Option<Status>> {
        let container = self.paths.container(id);
        let Some(mut record) = Record::read(&container)? else { return Ok(None) };
        let backend = backend::of(record.backend);
        record.traces = backend.refresh(&record.traces);
        let health = if lock::is_held(container.dir())? { Condition::Changing } else { Self::condition(&record, now)? };
        let changes = backend.usage(&record.plan);
        Ok(Some(Status { record, health, changes }))
    }

    /// How a rootfs fares that nobody changes right now.
    fn condition(record: &Record, now: &Now) -> Result<Condition> {
        if now.elsewhere(record)?.is_some() {
            return Ok(Condition::Elsewhere);
        }
        let health = backend::of(record.backend).health(&record.plan, &now.traces(record), now.mounts()?);
        Ok(match (health, record.state) {
            (_, State::Pending) => Condition::Interrupted,
            (Health::Ready, State::Ready) => Condition::Ready,
            (Health::Dead, State::Ready) => Condition::Dead,
            (Health::Gone, State::Ready) | (_, State::Healing) => Condition::Gone,
        })
    }

    fn find_id(&self, selector: &Selector) -> Result<Option<ContainerId>> {
        let wanted = match selector {
            Selector::Id(id) => {
                if self.paths.container(id).dir().is_dir() {
                    return Ok(Some(id.clone()));
                }
                Path::new(id.as_str())
            }
            Selector::Rootfs(path) => path,
        };
        // The mount point itself is not looked at first: behind it a dead server may not answer.
        if let Some(id) = parent_resolved(wanted).map(|at| self.find_at(&at)).transpose()?.flatten() {
            return Ok(Some(id));
        }
        Ok(std::fs::canonicalize(wanted).ok().map(|at| self.find_at(&at)).transpose()?.flatten())
    }

    /// The rootfs at this mount point; one of this mount namespace before those of others.
    fn find_at(&self, rootfs: &Path) -> Result<Option<ContainerId>> {
        let now = Now::look()?;
        let mut found = None;
        for record in self.records_at(rootfs)? {
            if now.elsewhere(&record)?.is_none() {
                return Ok(Some(record.plan.id));
            }
            found = found.or(Some(record.plan.id));
        }
        Ok(found)
    }

    fn records_at(&self, rootfs: &Path) -> Result<Vec<Record>> {
        let records = points::ids_at(&self.paths, rootfs)?
            .into_iter()
            .filter_map(|id| record::read_or_log(&self.paths.container(&id)))
            .filter(|record| record.plan.rootfs == rootfs);
        Ok(records.collect())
    }

    /// Make the container's directory with its first record: from here on the id, the mount point and the image are taken.
    fn claim(&self, record: &Record) -> Result<lock::DirLock> {
        let id = &record.plan.id;
        let containers = self.paths.containers();
        lock::make_private_dir(&containers)?;
        let _all = lock::directory(&containers)?;
        let taken = |by: &Record| {
            Err(Error::new(
                Kind::Busy,
                "provision",
                show(&record.plan.rootfs),
                format!("it is the rootfs {} already", by.plan.id),
            )
            .hint(format!("`fsprov unmount {}` takes that away", by.plan.id)))
        };
        let now = Now::look()?;
        for other in self.records_at(&record.plan.rootfs)? {
            if now.elsewhere(&other)?.is_none() {
                return taken(&other);
            }
        }
        let container = self.paths.container(id);
        if container.dir().exists() {
            return Err(Error::new(Kind::Busy, "provision", id, "a rootfs of this id exists")
                .hint(format!("choose another --id, or `fsprov unmount {id}` first")));
        }
        points::take(&self.paths, &record.plan.rootfs, id)?;
        fault::point("provision.claim").map_err(|e| e.with_undo(self.forget_point(record)))?;
        record::make(&container).map_err(|e| e.with_undo(self.forget_point(record)))?;
        let locked = lock::directory(container.dir())
            .and_then(|l| l.ok_or_else(|| Error::new(Kind::Io, "lock", show(container.dir()), "it vanished")))
            .and_then(|l| record.write(&container).map(|()| l))
            // Whoever destroys the parent locks it and then looks for children: either sees the other.
            .and_then(|l| self.refuse_changing_parent(id).map(|()| l));
        locked.map_err(|e| e.with_undo(self.forget(id, Some(&record.plan.rootfs))))
    }

    fn refuse_changing_parent(&self, id: &ContainerId) -> Result<()> {
        let Some(parent) = id.parent() else { return Ok(()) };
        if !lock::is_held(self.paths.container(&parent).dir())? {
            return Ok(());
        }
        Err(Error::new(Kind::Busy, "provision", id, format!("its parent {parent} is being made or taken away"))
            .hint("try again when that is done"))
    }

    fn forget_point(&self, record: &Record) -> Result<()> {
        points::release(&self.paths, &record.plan.id, Some(&record.plan.rootfs))
    }

    /// Remove the record and all that is kept for `id`: the last step of its life.
    fn forget(&self, id: &ContainerId, rootfs: Option<&Path>) -> Result<()> {
        record::remove(&self.paths.container(id))?;
        points::release(&self.paths, id, rootfs)
    }
}

/// Images that a record below `paths` names, with the rootfs that uses each. A record that cannot be read is an error: who
/// asks is about to delete.
pub fn images_in_use(paths: &StatePaths) -> Result<Vec<(ImageId, ContainerId)>> {
    Ok(record::all(paths)?.into_iter().filter_map(|r| Some((r.image.id?, r.plan.id))).collect())
}

/// A rootfs under construction: its record is on the disk and its directory is locked.
struct Making<'a> {
    by: &'a Provisioner,
    container: &'a ContainerPaths,
    record: Record,
    _claim: lock::DirLock,
}

impl Journal for Making<'_> {
    fn note(&mut self, traces: &Traces) -> Result<()> {
        self.record.traces = traces.clone();
        self.record.write(self.container)
    }

    fn meter(&self) -> Option<Arc<Meter>> {
        self.by.meter.clone()
    }

    fn shelf(&self) -> Option<Arc<dyn Shelf>> {
        self.by.shelf.clone()
    }
}

impl Making<'_> {
    /// Build it; where `auto` chose a backend that fails for a reason of this host, by the next one that can.
    fn build_by(&mut self, mut choice: Choice, asked: Option<BackendKind>) -> Result<()> {
        loop {
            let error = match self.build() {
                Err(error) if asked.is_none() => error,
                other => return other,
            };
            choice = select::choose_after(&self.by.host, &self.record.plan, choice, error)?;
            self.record.backend = choice.backend;
            self.record.state = State::Pending;
            self.note(&Traces::default())?;
        }
    }

    fn build(&mut self) -> Result<()> {
        let host = &self.by.host;
        fault::point("provision.directories")?;
        for dir in &self.record.made {
            match std::fs::create_dir(dir) {
                // Healing finds those of the first making.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                other => other.map_err(|e| Error::io("make mount point", show(dir), e))?,
            }
        }
        let plan = self.record.plan.clone();
        backend::of(self.record.backend).provision(host, &plan, self)?;
        fault::point("provision.ready")
            .and_then(|()| {
                self.record.state = State::Ready;
                self.record.write(self.container)
            })
            .map_err(|e| {
                e.with_undo(
                    backend::of(self.record.backend)
                        .destroy(host, &plan, &self.record.traces, Detach::Lazy)
                        .map(|_| ()),
                )
            })
    }

    fn undo(&self, error: Error) -> Error {
        let undone = destroy::remove_made(&self.record);
        error.with_undo(undone).with_undo(self.by.forget(&self.record.plan.id, Some(&self.record.plan.rootfs)))
    }
}

/// Does a rootfs have this directory as a volume?
fn is_used(paths: &StatePaths, source: &Path) -> Result<bool> {
    Ok(record::readable(paths)?.iter().any(|r| r.plan.volumes.iter().any(|v| v.source == source)))
}

/// Volume sources made for this request. Dropped without [`Sources::keep`] they go again, as long as they are empty.
#[derive(Default)]
struct Sources {
    made: Vec<PathBuf>,
    /// Targets of the volumes whose sources are to be filled, and the tree to fill them from.
    fill: Vec<ContainerPath>,
    tree: Option<Arc<dyn Tree>>,
}

impl Sources {
    fn resolve(&mut self, request: &Request, image: &ResolvedImage, paths: &StatePaths) -> Result<Vec<Volume>> {
        let mut volumes = Vec::with_capacity(request.volumes.len());
        for spec in &request.volumes {
            if spec.fill == Fill::Once && self.tree.is_none() && !image.layers.is_empty() {
                self.tree = Some(fill::tree_of(image, &request.ownership)?);
            }
            let tree = self.tree.as_ref();
            let form = || tree.map_or(Ok(volume::Form::Directory), |tree| fill::form_at(tree, &spec.target));
            let resolved = spec.resolve(request.sandbox.as_deref(), form)?;
            let is_new = !resolved.made.is_empty();
            self.made.extend(resolved.made);
            if resolved.fill {
                // An empty directory that another rootfs has as a volume is not new: replaced, that one would lose it.
                if !is_used(paths, &resolved.volume.source)? {
                    self.fill.push(spec.target.clone());
                }
                volumes.push(resolved.volume);
                continue;
            }
            if let (true, Some(mode)) = (is_new, image_mode(&image.layers, &spec.target)) {
                // A new /tmp is as open as the image's /tmp.
                let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
                std::fs::set_permissions(&resolved.volume.source, permissions)
                    .map_err(|e| Error::io("set the mode of volume source", show(&resolved.volume.source), e))?;
            }
            volumes.push(resolved.volume);
        }
        Ok(volumes)
    }

    /// Fill what is to be filled. A source that was filled stays filled, whatever fails after it: it is as new, and complete.
    fn fill(&self, plan: &Plan) -> Result<()> {
        let Some(tree) = &self.tree else { return Ok(()) };
        for (number, volume) in plan.volumes.iter().enumerate() {
            if self.fill.contains(&volume.target) {
                fill::fill(tree, plan, number)?;
            }
        }
        Ok(())
    }

    fn keep(&mut self) {
        self.made.clear();
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        for dir in self.made.iter().rev() {
            if let Err(e) = std::fs::remove_dir(dir) {
                log::info!("{} stays: {e}", show(dir));
            }
        }
    }
}

/// Permission bits of the directory at `target` in the topmost layer that has one.
fn image_mode(layers: &[PathBuf], target: &ContainerPath) -> Option<u32> {
    use rustix::fs::{FileType, OFlags, fstat};
    layers.iter().rev().find_map(|layer| {
        let root = crate::sys::fs::open_path(layer).ok()?;
        let found = crate::sys::fs::open_in_root(&root, target.relative(), OFlags::PATH).ok()?;
        let mode = fstat(&found).ok()?.st_mode;
        FileType::from_raw_mode(mode).is_dir().then_some(mode & 0o7777)
    })
}

/// Where the changes of a rootfs are kept: in the sandbox, where there is one, since they are the executor's bytes.
fn scratch(id: &ContainerId, sandbox: Option<&Path>, container: &ContainerPaths) -> Result<Scratch> {
    const OP: &str = "find a place for changes";
    let Some(sandbox) = sandbox else { return Ok(Scratch(container.backend().join("changes"))) };
    let sandbox = std::fs::canonicalize(sandbox)
        .map_err(|e| Error::io(OP, show(sandbox), e).hint("--sandbox names an existing directory"))?;
    let scratch = sandbox.join(format!(".fsprov-{id}"));
    match std::fs::symlink_metadata(&scratch) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Scratch(scratch)),
        Err(e) => Err(Error::io(OP, show(scratch), e)),
        Ok(_) => Err(Error::new(Kind::Exists, OP, show(&scratch), "something is there already")
            .hint("a rootfs of another state root may use it; if none does, remove it, or choose another --id")),
    }
}

/// Where the rootfs will be: the absolute path, and the directories to make for it, outermost first.
fn mount_point(wanted: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    const OP: &str = "find mount point";
    let unusable = |path: &Path, e: std::io::Error| match e.raw_os_error() {
        Some(libc::ENOTCONN) => Error::io(OP, show(path), e)
            .with_kind(Kind::Busy)
            .hint(format!("a dead FUSE server's mount is there: `fsprov unmount {}` cleans it", show(path))),
        _ => Error::io(OP, show(path), e),
    };
    let wanted = std::path::absolute(wanted).map_err(|e| Error::io(OP, show(wanted), e))?;
    let mut missing = Vec::new();
    let mut at = wanted.clone();
    let base = loop {
        match std::fs::canonicalize(&at) {
            Ok(found) => break found,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && std::fs::symlink_metadata(&at).is_err() => {
                let name = at
                    .file_name()
                    .ok_or_else(|| Error::new(Kind::Usage, OP, show(&wanted), "a missing part of it is . or .."))?;
                missing.push(name.to_owned());
                at.pop();
            }
            Err(e) => return Err(unusable(&at, e)),
        }
    };
    // canonicalize only reads links on the way: a dead mount shows when its root is asked for.
    match std::fs::metadata(&base) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Err(Error::new(Kind::Usage, OP, show(&base), "it is not a directory")),
        Err(e) => return Err(unusable(&base, e)),
    }
    if base == Path::new("/") && missing.is_empty() {
        return Err(Error::new(Kind::Usage, OP, "/", "a rootfs cannot be mounted over the root of this host"));
    }
    let mut made = Vec::new();
    let mut path = base;
    for name in missing.iter().rev() {
        path.push(name);
        made.push(path.clone());
    }
    Ok((path, made))
}

/// `path` absolute, with symlinks resolved in all but its last component, which may be a mount that does not answer.
fn parent_resolved(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let parent = std::fs::canonicalize(path.parent()?).ok()?;
    Some(parent.join(path.file_name()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_with_a_slash_is_a_path() {
        let id = |t: &str| matches!(Selector::parse(t.as_ref()), Selector::Id(_));
        assert!(id("abc") && id("a.b-c"));
        assert!(!id("./abc") && !id("/abc") && !id(".") && !id("..") && !id("a b"));
    }

    #[test]
    fn mount_points_are_absolute_and_say_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let base = std::fs::canonicalize(dir.path()).unwrap();
        std::os::unix::fs::symlink(".", base.join("link")).unwrap();
        let (path, made) = mount_point(&base.join("link/a/b")).unwrap();
        assert_eq!(path, base.join("a/b"));
        assert_eq!(made, [base.join("a"), base.join("a/b")]);
        assert_eq!(mount_point(&base).unwrap(), (base.clone(), vec![]));
        std::fs::write(base.join("file"), "").unwrap();
        assert_eq!(mount_point(&base.join("file")).unwrap_err().kind(), Kind::Usage);
        assert!(mount_point(&base.join("file/below")).is_err());
        std::os::unix::fs::symlink("nowhere", base.join("dangling")).unwrap();
        assert!(mount_point(&base.join("dangling")).is_err());
        assert_eq!(mount_point(Path::new("/")).unwrap_err().kind(), Kind::Usage);
    }
}
