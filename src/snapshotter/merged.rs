//! What lies below snapshots as one FUSE mount, where the kernel's overlay cannot show the layers as they lie on the disk: there are more than it takes,
//! owners are in their indexes alone, or that is asked for. The server is that of other rootfses, and the mounts have records as those have.
//!
//! ```text
//! f/                  of one boot; in the next it is removed
//! f/boot              which, and where this directory is
//! f/own/<number>      the index of a snapshot's own files
//! f/m/<name>/index    of one mount; <name>: a hash of what it shows
//! f/m/<name>/rootfs/  the mount
//! f/containers/ ...   the records (`crate::paths`)
//! ```
//!
//! A mount is shared by all snapshots that stand on the same layers, and goes with the last of them.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

use crate::backend::{self, Support};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::{ContainerId, ImageRef};
use crate::index::Index;
use crate::paths::StatePaths;
use crate::plan::{BackendKind, Ownership};
use crate::provisioner::{Condition, Detach, Provisioner, Request, Selector};
use crate::store::ResolvedImage;
use crate::sys::durable::{Survives, write_file};
use crate::sys::process::boot_id;
use crate::sys::remove::remove_tree;

/// Digits of a mount's name.
const NAME_BYTES: usize = 16;

/// What one mount is to show.
pub(super) struct Wanted<'a> {
    /// What people call it: a chain id, or the name of the snapshot on top.
    pub(super) label: &'a str,
    /// The directories that files lie in, bottom first.
    pub(super) layers: Vec<PathBuf>,
    /// The owners that it shows.
    pub(super) maps: Option<&'a Ownership>,
    /// Writes its index.
    pub(super) write_index: &'a dyn Fn(&Path) -> Result<()>,
}

impl Wanted<'_> {
    fn name(&self) -> String {
        let mut hash = Sha256::new();
        for layer in &self.layers {
            hash.update(layer.as_os_str().as_encoded_bytes());
            hash.update([0]);
        }
        hash.update(self.maps.map(super::mapped::name).unwrap_or_default());
        data_encoding::HEXLOWER.encode(&hash.finalize()[..NAME_BYTES / 2])
    }
}

/// A mount that answers.
pub(super) struct Shown {
    pub(super) at: PathBuf,
    /// The numbers of snapshots that were mounted upon a server that died: those mounts do not answer any more.
    pub(super) lost: Vec<u64>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Merged {
    dir: PathBuf,
    provisioner: Provisioner,
    /// Which snapshots use which mount, by number. Held while a mount is made or taken away.
    users: Mutex<HashMap<u64, String>>,
}

impl Merged {
    /// Those in this directory. What is there of an earlier boot is removed.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let state = dir.parent().unwrap_or(dir);
        // Plans have paths without symlinks.
        let state = std::fs::canonicalize(state).map_err(|e| Error::io("open", show(state), e))?;
        let dir = state.join(dir.file_name().unwrap_or_default());
        // A copy of a state directory has records of mounts that are another's.
        let (wanted, mark) = (format!("{}\n{}", boot_id()?, show(&dir)), dir.join("boot"));
        if std::fs::read_to_string(&mark).ok().as_deref() != Some(&wanted) {
            remove_tree(&dir)?;
        }
        for part in [dir.clone(), dir.join("own"), dir.join("m")] {
            use std::os::unix::fs::DirBuilderExt as _;
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&part);
            made.map_err(|e| Error::io("make", show(&part), e))?;
        }
        write_file(&mark, wanted.as_bytes(), Survives::Crash)?;
        let provisioner = Provisioner::of_host(StatePaths::new(dir.clone()));
        Ok(Merged { dir, provisioner, users: Mutex::default() })
    }

    /// Can this host mount it?
    pub(super) fn support(&self) -> Support {
        backend::of(BackendKind::Fuse).host_support(self.provisioner.host())
    }

    fn users(&self) -> MutexGuard<'_, HashMap<u64, String>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, name: &str) -> PathBuf {
        self.dir.join("m").join(name)
    }

    fn rootfs(&self, name: &str) -> PathBuf {
        self.place(name).join("rootfs")
    }

    /// Where the index of a snapshot's own files is.
    pub(super) fn own_index(&self, number: u64) -> PathBuf {
        self.dir.join("own").join(number.to_string())
    }

    /// Where it is shown, if it is.
    pub(super) fn rootfs_of(&self, wanted: &Wanted<'_>) -> PathBuf {
        self.rootfs(&wanted.name())
    }

    /// A snapshot that uses the mount at this path.
    pub(super) fn user_of(&self, rootfs: &Path) -> Option<u64> {
        let name = rootfs.strip_prefix(self.dir.join("m")).ok()?.parent()?.to_str()?;
        let users = self.users();
        users.iter().find(|(_, used)| *used == name).map(|(number, _)| *number)
    }

    /// How many mounts there are.
    pub(super) fn count(&self) -> usize {
        self.users().values().collect::<BTreeSet<_>>().len()
    }

    /// Show it for the snapshot of this number: by the mount that is there, if that answers.
    pub(super) fn show(&self, number: u64, wanted: &Wanted<'_>) -> Result<Shown> {
        let name = wanted.name();
        let mut users = self.users();
        let earlier = users.insert(number, name.clone());
        match self.ensure(&name, wanted) {
            Ok(was) => {
                if let Some(earlier) = earlier.as_deref().filter(|earlier| *earlier != name) {
                    self.end_unused(&users, earlier);
                }
                let is_lost = |user: &u64| was == Was::Dead && *user != number;
                let of_it = users.iter().filter(|(_, used)| **used == name).map(|(user, _)| *user);
                Ok(Shown { at: self.rootfs(&name), lost: of_it.filter(is_lost).collect() })
            }
            Err(error) => {
                match earlier {
                    Some(earlier) => drop(users.insert(number, earlier)),
                    None => drop(users.remove(&number)),
                }
                self.end_unused(&users, &name);
                Err(error)
            }
        }
    }

    fn ensure(&self, name: &str, wanted: &Wanted<'_>) -> Result<Was> {
        let id: ContainerId = name.parse()?;
        let selector = Selector::Id(id.clone());
        let was = match self.provisioner.inspect(&selector) {
            Ok(status) if matches!(status.health, Condition::Ready | Condition::Stopped) => return Ok(Was::There),
            Ok(status) => {
                let is_dead = status.health == Condition::Dead;
                log::warn!(
                    "what lies below snapshots on {} is mounted again: it is {}",
                    wanted.label,
                    status.health.name()
                );
                self.provisioner.destroy(&selector, Detach::Lazy)?;
                if is_dead { Was::Dead } else { Was::Missing }
            }
            Err(error) if error.kind() == Kind::NotFound => Was::Missing,
            Err(error) => return Err(error),
        };
        let place = self.place(name);
        std::fs::create_dir_all(&place).map_err(|e| Error::io("make", show(&place), e))?;
        let index = place.join("index");
        if Index::open(&index).is_err() {
            (wanted.write_index)(&index)?;
        }
        fault::point("snapshotter.merged")?;
        let mut request = Request::new(ImageRef::Name(wanted.label.to_owned()), self.rootfs(name));
        request.id = Some(id);
        request.backend = Some(BackendKind::Fuse);
        request.ownership = Some(wanted.maps.cloned().unwrap_or_default());
        let image = ResolvedImage {
            id: None,
            name: None,
            layers: wanted.layers.clone(),
            index: Some(index),
            manifest: None,
            is_filtered: false,
            has_whiteouts: true,
        };
        // Claims keep the layers.
        self.provisioner.provision_resolved(&request, image, ()).map(|_| was)
    }

    /// The snapshot of this number uses none any more.
    pub(super) fn release(&self, number: u64) {
        let mut users = self.users();
        if let Some(name) = users.remove(&number) {
            self.end_unused(&users, &name);
        }
    }

    fn end_unused(&self, users: &HashMap<u64, String>, name: &str) {
        if users.values().any(|used| used == name) {
            return;
        }
        // What cannot be taken away now is at the next start.
        if let Err(error) = self.end(name) {
            log::warn!("{error}");
        }
    }

    /// Out of sight; the server goes on for mounts that still use it.
    fn end(&self, name: &str) -> Result<()> {
        self.provisioner.destroy(&Selector::Id(name.parse()?), Detach::Lazy)?;
        fault::point("snapshotter.unmerged")?;
        remove_tree(&self.place(name)).map(|_| ())
    }

    /// At the start: keep what these use, and nothing else.
    pub(super) fn reconcile(&self, used: impl FnOnce() -> HashMap<u64, String>) {
        let names = |dir: &Path| {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<BTreeSet<_>>()
        };
        let mut there = names(&self.dir.join("m"));
        there.append(&mut names(&self.dir.join("containers")));
        if there.is_empty() {
            return;
        }
        let mut users = self.users();
        *users = used();
        users.retain(|_, name| there.contains(name));
        for name in &there {
            self.end_unused(&users, name);
        }
    }

    /// Forget indexes of snapshots that are gone.
    pub(super) fn clear_indexes(&self, is_there: impl Fn(u64) -> bool) {
        for entry in std::fs::read_dir(self.dir.join("own")).into_iter().flatten().flatten() {
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if !number.is_some_and(&is_there) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// The name of what is to be shown.
    pub(super) fn name_of(wanted: &Wanted<'_>) -> String {
        wanted.name()
    }
}

/// How a mount was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Was {
    There,
    /// It did not answer.
    Dead,
    Missing,
}
