//! How a snapshot is mounted: which directories lie over each other, and what containerd is told of them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use super::{Snapshots, inside, not_found};
use crate::error::{Error, Kind as ErrorKind, Result, show};
use crate::id::ImageId;
use crate::plan::Ownership;
use crate::snapshotter::dirs::{FILES, WORK};
use crate::snapshotter::mapped;
use crate::snapshotter::messages::{Keyed, Mount, Mounts};
use crate::snapshotter::record::{Kind, Record};
use crate::store::{Marks, Store};

/// Most lower layers of one overlay: OVL_MAX_STACK of Linux.
pub(super) const MAX_LAYERS: usize = 500;

/// Longest list of lower directories by their own paths: mount(2) takes a page of options, and the others have room beside it.
const MAX_OWN_PATHS: usize = 3072;
/// Longest list of links, below the directory that they have in common: containerd takes that away, and mounts from there.
pub(super) const MAX_SHORT_PATHS: usize = 3584;
/// What is behind a link, and not the link.
pub(super) const THROUGH_LINK: &str = "/.";

/// How what lies below snapshots is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LowerForm {
    /// As the layers' own directories, and by FUSE where those cannot be mounted.
    Auto,
    /// By FUSE.
    Fuse,
}

/// A directory below a snapshot.
pub(super) struct Lower {
    /// The name of its link.
    pub(super) link: String,
    pub(super) files: PathBuf,
    pub(super) what: What,
    /// Only its index says all.
    pub(super) by_index: bool,
}

/// Whose it is.
pub(super) enum What {
    /// Those of the snapshot of this number.
    Files(u64),
    Layer(ImageId),
}

/// What every overlay of this host is mounted with.
#[derive(Clone, Copy, Debug)]
pub(super) struct OverlayOptions {
    /// The kernel knows `index`: it is switched off, as many overlays share their lower layers.
    index_off: bool,
    /// Not in the first user namespace: marks are kept in `user.` attributes.
    pub(super) userxattr: bool,
    /// The kernel would make directories' entries or files' contents lie elsewhere than in the upper, unless it is told not to.
    redirects: bool,
    metacopies: bool,
}

impl OverlayOptions {
    pub(super) fn of_host() -> Result<Self> {
        // Where it is a module, there are no parameters before somebody wants it.
        let _ = rustix::mount::fsopen("overlay", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC);
        let parameter =
            |name: &str| std::fs::read_to_string(Path::new("/sys/module/overlay/parameters").join(name)).ok();
        let is_on = |name: &str| parameter(name).is_some_and(|value| value.starts_with('Y'));
        Ok(OverlayOptions {
            index_off: parameter("index").is_some(),
            redirects: is_on("redirect_dir"),
            metacopies: is_on("metacopy"),
            userxattr: !crate::sys::process::in_initial_user_namespace()?,
        })
    }

    fn list(self) -> Vec<String> {
        let all = [
            (self.index_off, "index=off"),
            (self.redirects, "redirect_dir=nofollow"),
            (self.metacopies, "metacopy=off"),
            (self.userxattr, "userxattr"),
        ];
        all.into_iter().filter(|(is_set, _)| *is_set).map(|(_, option)| option.to_owned()).collect()
    }
}

/// A directory of a snapshot's stack.
#[derive(Clone, Debug)]
pub(in crate::snapshotter) enum Part {
    /// What the snapshot of this name wrote.
    Files { name: String, at: PathBuf, owners: Ownership },
    /// A layer of the store, and the snapshot that has it.
    Layer { name: String, layer: ImageId, by_index: bool },
}

impl Part {
    /// Is it the same directory? One layer may be that of several snapshots.
    pub(in crate::snapshotter) fn is_same(&self, other: &Part) -> bool {
        match (self, other) {
            (Part::Files { at, .. }, Part::Files { at: other, .. }) => at == other,
            (Part::Layer { layer, .. }, Part::Layer { layer: other, .. }) => layer == other,
            _ => false,
        }
    }
}

impl Snapshots {
    /// `Mounts`.
    pub(crate) fn mounts(&self, asked: &Keyed) -> Result<Mounts> {
        let record = self.find(&asked.key)?;
        if record.kind == Kind::Committed {
            let why = "it is committed, and neither active nor a view";
            return Err(Error::new(ErrorKind::Busy, "mount snapshot", format!("{:?}", asked.key), why));
        }
        let mounts = self.mounts_of(&record)?;
        // Nobody else would take away what was mounted for it.
        if self.find(&asked.key).is_ok_and(|now| now.number == record.number) {
            return Ok(mounts);
        }
        let _changing = self.change();
        self.release_shown(&record);
        Err(not_found(&asked.key))
    }

    /// [`Self::mounts`], if that is a look at the table: nothing is mounted for it, and no link made.
    pub(crate) fn mounts_at_once(&self, asked: &Keyed) -> Option<Result<Mounts>> {
        let plain = |record: &Arc<Record>| record.maps.is_none() && record.kind != Kind::Committed;
        let record = self.find(&asked.key).ok().filter(plain)?;
        let stack = self.stack(&record).ok()?;
        let below = without_repeats(&stack);
        let length: usize = below.iter().map(|lower| lower.files.as_os_str().len() + 1).sum();
        (length <= MAX_OWN_PATHS && !self.must_merge(&below)).then(|| self.mounts_upon(&record, &stack))
    }

    /// How a snapshot is mounted. It need not be there yet.
    pub(super) fn mounts_of(&self, record: &Record) -> Result<Mounts> {
        self.mounts_upon(record, &self.stack(record)?)
    }

    /// The same, with what lies below it.
    fn mounts_upon(&self, record: &Record, stack: &[Lower]) -> Result<Mounts> {
        let below = without_repeats(stack);
        let own = self.dirs.snapshot(record.number);
        let bind = |source: &Path, mode: &str| Mount {
            r#type: "bind".into(),
            source: text(source),
            target: String::new(),
            options: vec![mode.into(), "rbind".into()],
        };
        let overlay = |lower: String| {
            let mut options = self.overlay.list();
            if record.kind == Kind::Active {
                options.push(format!("workdir={}", text(&own.join(WORK))));
                options.push(format!("upperdir={}", text(&own.join(FILES))));
            }
            options.push(format!("lowerdir={lower}"));
            // The kernel takes any source, and shows it in the mount table. Nothing else there tells whose a view is.
            let source = if record.kind == Kind::Active { "overlay".into() } else { text(&own) };
            Mount { r#type: "overlay".into(), source, target: String::new(), options }
        };
        let mount = match (&below[..], record.kind) {
            ([], Kind::View) => bind(&own.join(FILES), "ro"),
            ([], _) => bind(&own.join(FILES), "rw"),
            (below, kind) if self.must_merge(below) => {
                let at = self.show_merged(record, stack)?;
                if kind == Kind::View { bind(&at, "ro") } else { overlay(text(&at)) }
            }
            ([only], Kind::View) => match &record.maps {
                None => bind(&only.files, "ro"),
                Some(maps) => bind(&self.mapped(maps)?.join(self.place_of(only)), "ro"),
            },
            _ => overlay(self.lower_dirs(record, &below)?),
        };
        Ok(Mounts { mounts: vec![mount] })
    }

    /// The lower directories of an overlay, as its option has them: their own paths, if they fit, else by short links. What is named there is a directory, and
    /// no link itself: BuildKit walks it, and finds nothing in a link.
    fn lower_dirs(&self, record: &Record, below: &[&Lower]) -> Result<String> {
        let (links, files): (_, Vec<PathBuf>) = match &record.maps {
            None => (self.dirs.links(), below.iter().map(|lower| lower.files.clone()).collect()),
            Some(maps) => {
                let dir = self.mapped(maps)?;
                let files = below.iter().map(|lower| dir.join(self.place_of(lower))).collect();
                (dir, files)
            }
        };
        let own = files.iter().map(|path| text(path)).collect::<Vec<_>>().join(":");
        if own.len() <= MAX_OWN_PATHS {
            return Ok(own);
        }
        let short = below
            .iter()
            .zip(&files)
            .map(|(lower, files)| self.link(&links, lower, files).map(|link| format!("{link}{THROUGH_LINK}")));
        Ok(short.collect::<Result<Vec<_>>>()?.join(":"))
    }

    /// What lies below a snapshot's own files, topmost first.
    pub(super) fn stack(&self, record: &Record) -> Result<Vec<Lower>> {
        let mut below = Vec::new();
        let of_layer = |record: &Record, below: &mut Vec<Lower>| {
            below.extend(record.layer.as_ref().map(|layer| Lower {
                link: format!("{}s", record.number),
                files: self.store.layer_tree(layer),
                what: What::Layer(layer.clone()),
                by_index: record.by_index,
            }));
        };
        of_layer(record, &mut below);
        let chain = self.read(|table| {
            let mut chain: Vec<Arc<Record>> = Vec::new();
            let mut parent = record.parent.as_str();
            while !parent.is_empty() {
                // A name that came back, as damage can make one, may stand upon itself.
                let is_circle = chain.len() > table.by_name.len();
                let Some(next) = table.by_name.get(parent).filter(|_| !is_circle) else {
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
                let what = What::Files(record.number);
                below.push(Lower { link: record.number.to_string(), files, what, by_index: false });
            }
            of_layer(&record, &mut below);
        }
        Ok(below)
    }

    /// The directory where everything that lies below snapshots is shown with these owners.
    fn mapped(&self, maps: &Ownership) -> Result<PathBuf> {
        let dir = self.dirs.mapped().join(mapped::name(maps));
        let _making = self.mapping.lock().unwrap_or_else(PoisonError::into_inner);
        let sources = [(mapped::STORE, self.store.paths().layers()), (mapped::OWN, self.dirs.snapshots())];
        mapped::show_mapped(&dir, maps, sources).map_err(inside)?;
        Ok(dir)
    }

    /// Where a lower directory is in there.
    fn place_of(&self, lower: &Lower) -> PathBuf {
        match lower.files.strip_prefix(self.dirs.snapshots()) {
            Ok(below) => Path::new(mapped::OWN).join(below),
            Err(_) => Path::new(mapped::STORE)
                .join(lower.files.strip_prefix(self.store.paths().layers()).unwrap_or(&lower.files)),
        }
    }

    /// The short path of a lower directory.
    fn link(&self, dir: &Path, lower: &Lower, files: &Path) -> Result<String> {
        let link = dir.join(&lower.link);
        if std::fs::read_link(&link).ok().as_deref() != Some(files) {
            // Two calls may make it at the same time: each renames its own over it.
            let unique = format!("{}-{:?}", lower.link, std::thread::current().id());
            let fresh = self.dirs.fresh().join(unique.replace(['(', ')'], "-"));
            let fail = |e| inside(Error::io("make link", show(&link), e));
            let _ = std::fs::remove_file(&fresh);
            std::os::unix::fs::symlink(files, &fresh).map_err(fail)?;
            std::fs::rename(&fresh, &link).map_err(fail)?;
        }
        Ok(text(&link))
    }

    /// The number of the snapshot whose files lie at `path`.
    fn number_of(&self, path: &str) -> Option<u64> {
        let below = Path::new(path).strip_prefix(self.dirs.snapshots()).ok()?;
        let number = below.parent()?.to_str()?.parse().ok()?;
        (below.file_name()? == FILES).then_some(number)
    }

    /// The active snapshot whose mounts these are.
    pub(in crate::snapshotter) fn key_of_mounts(&self, mounts: &[Mount]) -> Option<String> {
        let [mount] = mounts else { return None };
        let files = match mount.r#type.as_str() {
            "overlay" => mount.options.iter().find_map(|option| option.strip_prefix("upperdir="))?,
            "bind" => &mount.source,
            _ => return None,
        };
        let number = self.number_of(files)?;
        let is_it = |record: &&Arc<Record>| record.number == number && record.kind == Kind::Active;
        self.read(|table| table.by_name.values().find(is_it).map(|record| record.name.clone()))
    }

    /// The directories that these mounts of ours show, topmost first; a view of nothing has none. `None`: they are not ours.
    pub(in crate::snapshotter) fn parts_of_mounts(&self, mounts: &[Mount]) -> Option<Vec<Part>> {
        let [mount] = mounts else { return mounts.is_empty().then(Vec::new) };
        let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
        let mut paths: Vec<&str> = Vec::new();
        match mount.r#type.as_str() {
            "overlay" => {
                paths.extend(option("upperdir="));
                paths.extend(option("lowerdir=")?.split(':'));
            }
            "bind" => paths.push(&mount.source),
            _ => return None,
        }
        let mut named = Vec::new();
        for path in paths {
            match self.merged.user_of(Path::new(path)) {
                Some(user) => named.extend(self.named_below(user)?),
                None => named.push(self.named(path)?),
            }
        }
        let found: HashMap<u64, Arc<Record>> = self.read(|table| {
            let numbers: HashSet<u64> = named.iter().filter_map(Named::number).collect();
            let wanted = table.by_name.values().filter(|record| numbers.contains(&record.number));
            wanted.map(|record| (record.number, record.clone())).collect()
        });
        let mut parts = Vec::new();
        for one in named {
            match one {
                Named::Files(number) => {
                    let record = found.get(&number).filter(|record| record.has_files)?;
                    if record.kind != Kind::View {
                        let owners = record.maps.clone().unwrap_or_default();
                        parts.push(Part::Files { name: record.name.clone(), at: self.files_of(record), owners });
                    }
                }
                Named::Layer(number) => {
                    let record = found.get(&number)?;
                    let (name, by_index) = (record.name.clone(), record.by_index);
                    parts.push(Part::Layer { name, layer: record.layer.clone()?, by_index });
                }
                Named::Tree(layer) => {
                    let has_it = |record: &&Arc<Record>| record.layer.as_ref() == Some(&layer);
                    let record = self.read(|table| table.by_name.values().find(has_it).cloned())?;
                    parts.push(Part::Layer { name: record.name.clone(), layer, by_index: record.by_index });
                }
            }
        }
        Some(parts)
    }

    /// What the one mount shows that lies below this snapshot.
    fn named_below(&self, number: u64) -> Option<Vec<Named>> {
        let is_it = |record: &&Arc<Record>| record.number == number;
        let record = self.read(|table| table.by_name.values().find(is_it).cloned())?;
        let stack = self.stack(&record).ok()?;
        let named =
            without_repeats(&stack).into_iter().map(|lower| match (&lower.what, lower.link.strip_suffix('s')) {
                (What::Files(number), _) => Some(Named::Files(*number)),
                (What::Layer(_), Some(number)) => number.parse().ok().map(Named::Layer),
                (What::Layer(_), None) => None,
            });
        named.collect()
    }

    /// What a directory in the options of a mount is.
    fn named(&self, path: &str) -> Option<Named> {
        if let Some(link) = path.strip_suffix(THROUGH_LINK) {
            let mapped = Path::new(link).strip_prefix(self.dirs.mapped()).ok().and_then(|below| {
                let map = below.iter().next()?;
                below.strip_prefix(map).ok()
            });
            let link = mapped.or_else(|| Path::new(link).strip_prefix(self.dirs.links()).ok())?.to_str()?;
            return match link.strip_suffix('s') {
                Some(number) => number.parse().ok().map(Named::Layer),
                None => link.parse().ok().map(Named::Files),
            };
        }
        // Shown with other owners, it is still the same.
        let own = Path::new(path).strip_prefix(self.dirs.mapped()).ok().and_then(|below| {
            let mut parts = below.iter().skip(1);
            let base = match parts.next()?.to_str()? {
                mapped::OWN => self.dirs.snapshots(),
                mapped::STORE => self.store.paths().layers(),
                _ => return None,
            };
            Some(parts.fold(base, |path, part| path.join(part)))
        });
        let path = &own.as_deref().map_or(path.into(), text);
        if let Some(number) = self.number_of(path) {
            return Some(Named::Files(number));
        }
        let layer: ImageId = Path::new(path).parent()?.file_name()?.to_str()?.parse().ok()?;
        (self.store.layer_tree(&layer) == Path::new(path)).then_some(Named::Tree(layer))
    }

    /// Is what this part was taken from still there?
    pub(in crate::snapshotter) fn still_has(&self, part: &Part) -> bool {
        match part {
            Part::Files { name, at, .. } => self.find(name).is_ok_and(|record| self.files_of(&record) == *at),
            Part::Layer { layer, .. } => self.is_used(layer),
        }
    }

    /// How overlayfs marks what it hides, in the mounts that we tell of.
    pub(in crate::snapshotter) fn marks(&self) -> Marks {
        if self.overlay.userxattr { Marks::User } else { Marks::Trusted }
    }

    pub(in crate::snapshotter) fn store(&self) -> &Store {
        &self.store
    }
}

/// A layer that comes twice is there once, as overlayfs wants it: the topmost of its places counts, for there it brings and hides all that it brought and
/// hid below.
pub(super) fn without_repeats(stack: &[Lower]) -> Vec<&Lower> {
    let mut seen = HashSet::new();
    let is_new = |lower: &&Lower| match &lower.what {
        What::Layer(layer) => seen.insert(layer.clone()),
        What::Files(_) => true,
    };
    stack.iter().filter(is_new).collect()
}

/// What the path of a [`Part`] says.
enum Named {
    Files(u64),
    Layer(u64),
    Tree(ImageId),
}

impl Named {
    fn number(&self) -> Option<u64> {
        match self {
            Named::Files(number) | Named::Layer(number) => Some(*number),
            Named::Tree(_) => None,
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
