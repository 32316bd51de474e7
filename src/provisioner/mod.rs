//! Provision, destroy, list: the life of one rootfs, a file a step.
//!
//! | step | file | |
//! | --- | --- | --- |
//! | request | [`Request`] | what is asked for, parsed; no path followed |
//! | image | `store/resolve` | which layers, which index |
//! | plan | `planning` | from those and what `look` saw of the paths: data, made without the host |
//! | backend | `select` | the one asked for, or the first that can serve this plan on this host |
//! | claim | `claim` | the record is on the disk: from here on everything can be undone, also after a crash |
//! | open | `open` | every path of the plan, once; what is missing is made. From here on descriptors, no paths. `reach` sees who gets there |
//! | fill | `fill` | `copy` volumes get what the image has |
//! | build | `build` | the backend makes the mount; the record says ready |
//!
//! `destroy` goes back the same way; `recover` goes on from `open` where a rootfs was complete, and comparing what is opened with what
//! the record says was there, else takes back what there is. `resume` is a service that starts again. `record`, `lock`, `points` and `now` are
//! what the steps share.
//!
//! Owns the records. Must not make mounts itself: a plan and its opened places go to a backend, and what the backend leaves in the
//! system comes back as traces for the record.
//!
//! Lock order: the containers directory (short: claim an id and a mount point), then one container's directory (as long as
//! its rootfs is being changed). The store's shared lock is held from resolving an image until the record that names it is
//! on the disk.

mod build;
#[cfg(feature = "cli")]
mod changes;
mod claim;
mod destroy;
mod fill;
mod lock;
mod look;
mod now;
mod open;
mod over;
mod owners;
mod planning;
mod points;
mod reach;
mod record;
mod recover;
mod request;
mod resume;
mod select;

use std::path::Path;
use std::sync::Arc;

pub use crate::backend::Detach;
pub use crate::host::Host;
pub use crate::plan::{BackendKind, IdRange, Live, Ownership, Plan, Restraint};
pub use crate::traces::Traces;
#[cfg(feature = "cli")]
pub(crate) use changes::{READER, made_by, read_apart};
#[doc(hidden)]
pub use now::Now;
#[doc(hidden)]
pub use open::open;
#[cfg(feature = "cli")]
pub(crate) use over::{Whole, upper_id};
pub use record::{ImageNote, Record, State};
pub use recover::{Outcome, Recovered};
pub use request::{Changes, Cover, Request, Selector};
pub use select::{Choice, Rejected};

use crate::backend::{self, Health, Usage};
use crate::error::{Error, Kind, Result, show};
use crate::id::{ContainerId, ImageId};
use crate::paths::StatePaths;
use crate::store::{Policy, ResolvedImage, Store};
use crate::traces::{Meter, Shelf};

/// Fewest characters of an id's beginning that are taken for it.
const MIN_PREFIX: usize = 3;

/// A record and how its rootfs fares now.
#[derive(Clone, Debug, serde::Serialize)]
#[non_exhaustive]
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
#[non_exhaustive]
pub enum Condition {
    /// Mounted and answering.
    Ready,
    /// Being provisioned or destroyed right now.
    Changing,
    /// Its provisioning was cut short: `unmount` cleans it.
    Interrupted,
    /// Mounted, and its server was stopped (SIGSTOP): it does not answer until that goes on.
    Stopped,
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
            Condition::Stopped => "stopped",
            Condition::Dead => "dead",
            Condition::Gone => "gone",
            Condition::Elsewhere => "elsewhere",
        }
    }
}

/// Provisions and destroys the rootfses of one state root.
///
/// ```no_run
/// use fsprov::provisioner::Detach;
/// use fsprov::provisioner::{Provisioner, Request, Selector};
///
/// // A FUSE server is this program again: it must be let through, first of all.
/// if fsprov::dispatch().is_some() {
///     return Ok(());
/// }
/// let paths = fsprov::StatePaths::new("/var/lib/fsprov".into());
/// let provisioner = Provisioner::of_host(paths);
/// // After a crash or reboot: what was mounted is mounted again, what was half-made goes.
/// for one in provisioner.recover(None)? {
///     println!("{one:?}");
/// }
/// let image = fsprov::id::ImageRef::parse("example.com/debian".as_ref())?;
/// let request = Request::new(image, "/srv/web/rootfs")
///     .sandbox("/srv/web/work")
///     .volume(fsprov::volume::VolumeSpec::parse("tmp:/tmp:rw".as_ref())?);
/// let record = provisioner.provision(&request)?;
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
    /// For the rootfses of a state root, on this host, which is asked what it allows.
    pub fn of_host(paths: StatePaths) -> Self {
        Self::new(paths, Host::probe())
    }

    /// Work with the records below `paths`, on this host.
    pub(crate) fn new(paths: StatePaths, host: Host) -> Self {
        Provisioner { paths, host, meter: None, shelf: None, policy: Policy::default() }
    }

    /// Count on `meter` what provisioning copies.
    #[must_use]
    pub(crate) fn metered(mut self, meter: Arc<Meter>) -> Self {
        self.meter = Some(meter);
        self
    }

    /// The same as the one process of a service: what its rootfs needs to outlive all its processes goes to `shelf`, and
    /// [`Provisioner::resume`] goes on with it.
    #[must_use]
    pub(crate) fn on_shelf(self, shelf: Option<Arc<dyn Shelf>>) -> Self {
        Provisioner { shelf, ..self }
    }

    /// The same with this policy for the images it imports.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Provisioner { policy, ..self }
    }

    /// What this host may do.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// Put an image's root filesystem in place. When this returns the rootfs answers; on an error nothing is left.
    ///
    /// The steps, each in the file of its name.
    pub fn provision(&self, request: &Request) -> Result<Record> {
        let store = Store::open(&self.paths)?.with_policy(self.policy.clone());
        // Held until the record names the image: from then on `image rm` and gc see that it is in use.
        let in_use = store.lock_shared()?;
        let image = store.resolve(&request.image)?;
        if self.goes_over_fuse(request, &image)
            && let Some(record) = self.provision_over(request, &image)?
        {
            return Ok(record);
        }
        self.provision_resolved(request, image, in_use)
    }

    /// The same of an image that is found already. `kept`: what keeps it until the record is there.
    pub(crate) fn provision_resolved<K>(&self, request: &Request, image: ResolvedImage, kept: K) -> Result<Record> {
        let id = match &request.id {
            Some(id) => id.clone(),
            None => ContainerId::random()?,
        };
        let ownership = owners::presented(request, &image)?;
        let seen = look::look(request, &|target| fill::form_in(&image, &ownership, target))?;
        look::refuse_lost(&seen, self.paths.root())?;
        let planned = planning::plan(&id, request, ownership, &image, seen, &self.paths.container(&id))?;
        let choice = select::choose(&self.host, &planned.plan, request.backend)?;
        let note = ImageNote { reference: request.image.to_string(), id: image.id, name: image.name };

        let mut record = Record::new(note, choice.backend, &planned)?;
        record.ends_with = request.ends_with;
        let mut making = self.claim(record)?;
        drop(kept);
        let made = open::open_new(&planned)
            .and_then(|opened| making.opened(opened))
            .and_then(|opened| fill::fill(opened, &planned, &self.paths))
            .and_then(|places| making.build_by(&places, choice, request.backend));
        match made {
            Ok(()) => Ok(making.into_record()),
            Err(error) => Err(making.undo(error)),
        }
    }

    /// Every rootfs of this state root, oldest first. A record that cannot be read is logged and left out. An overlay that `auto` laid over a
    /// FUSE mount is two: `ID` and `ID.rootfs`.
    ///
    /// ```no_run
    /// # let paths = fsprov::StatePaths::new("/var/lib/fsprov".into());
    /// let provisioner = fsprov::provisioner::Provisioner::of_host(paths);
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
    /// # let paths = fsprov::StatePaths::new("/var/lib/fsprov".into());
    /// use fsprov::provisioner::{Provisioner, Selector};
    /// let provisioner = Provisioner::of_host(paths);
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

    /// What an argument `ROOTFS|ID` means: an id may be shortened to its beginning, if nothing else begins so.
    pub fn select(&self, text: &std::ffi::OsStr) -> Result<Selector> {
        let selector = Selector::parse(text);
        let Selector::Id(short) = &selector else { return Ok(selector) };
        if short.as_str().len() < MIN_PREFIX || self.find_id(&selector)?.is_some() {
            return Ok(selector);
        }
        let mut found = record::ids(&self.paths)?;
        found.retain(|id| id.as_str().starts_with(short.as_str()));
        found = found.into_iter().map(|id| self.whole(id)).collect();
        found.sort();
        found.dedup();
        match &found[..] {
            [] => Ok(selector),
            [only] => Ok(Selector::Id(only.clone())),
            several => {
                let several = several.iter().map(ContainerId::as_str).collect::<Vec<_>>().join(", ");
                Err(Error::new(Kind::Usage, "find rootfs", short, format!("it may be any of {several}"))
                    .hint("give more of the id"))
            }
        }
    }

    /// A rootfs, and those nested in it, which [`Provisioner::destroy`] takes away with it. `None`: there is none, or it has no record.
    pub fn with_nested(&self, selector: &Selector) -> Result<Option<(Record, Vec<ContainerId>)>> {
        let Some(id) = self.find_id(selector)?.map(|id| self.whole(id)) else { return Ok(None) };
        let Some(record) = record::read_or_log(&self.paths.container(&id)) else { return Ok(None) };
        let mut nested = record::ids(&self.paths)?;
        nested.retain(|other| other.is_nested_in(&id));
        nested.sort();
        Ok(Some((record, nested)))
    }

    /// The error for a selector that names nothing.
    pub fn not_found(&self, selector: &Selector) -> Error {
        Error::new(Kind::NotFound, "find rootfs", selector, "there is no such rootfs").hint(format!(
            "`fsprov list` shows all that are recorded in {}; --root names another state root",
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
        record.traces = backend.refresh(&record.plan, &record.traces);
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
            (Health::Stopped, State::Ready) => Condition::Stopped,
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
        if let Some(id) = look::parent_resolved(wanted).map(|at| self.find_at(&at)).transpose()?.flatten() {
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
}

/// Where each rootfs of a state root is seen. What cannot be read is left out.
#[cfg(feature = "cli")]
pub(crate) fn mount_points(paths: &StatePaths) -> Vec<(ContainerId, std::path::PathBuf)> {
    let records = record::readable(paths).unwrap_or_default();
    let over = over::laid_over(paths, &records.iter().collect::<Vec<_>>());
    let tops = records.iter().enumerate().filter(|(n, _)| !over.contains(&Some(*n)));
    tops.map(|(n, top)| (records[over[n].unwrap_or(n)].plan.id.clone(), top.plan.rootfs.clone())).collect()
}

/// Images that a record below `paths` names, with the rootfs that uses each. A record that cannot be read is an error: who
/// asks is about to delete.
pub fn images_in_use(paths: &StatePaths) -> Result<Vec<(ImageId, ContainerId)>> {
    let records = record::all(paths)?;
    let over = over::laid_over(paths, &records.iter().collect::<Vec<_>>());
    let used = records.into_iter().zip(over).filter(|(_, over)| over.is_none());
    Ok(used.filter_map(|(r, _)| Some((r.image.id?, r.plan.id))).collect())
}
