//! Is everything in the store what was imported? Each kind of damage is found and named.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, openat, renameat_with, statat};

use super::archive::input::Progress;
use super::archive::pax::is_xattr_taken;
use super::import::{ImageSource, ImportOptions};
use super::layer::LayerMeta;
use super::meta::{ImageKind, Meta, OnDisk, sha256_hex};
use super::signed::Signature;
use super::tree::{Tree, damaged};
use super::{Store, Uses, ids_below, staging};
use crate::error::{Error, Kind, Result, show};
use crate::id::ImageId;
use crate::image::{Strictness, appc, oci};
use crate::index::read::{Inode, InodeKind};
use crate::paths::image;
use crate::sys::durable::sync_dir;
use crate::sys::fs::open_beneath;

/// What to do about damage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repair {
    /// Tell.
    #[default]
    No,
    /// Move what is damaged out of the store, into `aside/`: the next import brings it back.
    SetAside,
    /// Likewise, and then import again each image that was set aside, from where it came; it must turn out to be the same.
    Reimport,
}

/// Something that is not what was imported.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Damage {
    /// The image or layer; None: something lies in the store that is neither.
    pub id: Option<ImageId>,
    /// Which of its parts: `manifest`, `config`, `meta.json`, `index`, `own.index`, `layers`, a path of its tree (`/...`), another
    /// name that lies beside those, or (without `id`) a name below the state root.
    pub part: String,
    /// What is wrong.
    pub what: String,
    /// Was it set aside?
    pub set_aside: bool,
    /// Is the same there again, from where it came?
    pub reimported: bool,
}

/// Most findings told of one tree: a lost disk has millions.
const MAX_FINDINGS: usize = 100;

type Findings = Vec<(String, String)>;
/// Told of each piece of a file that was read: its bytes.
type Read<'a> = &'a dyn Fn(u64);

impl Store {
    /// Look at every byte of every image and layer. Gives what is damaged; empty: nothing.
    ///
    /// With [`Repair::Reimport`] an image whose source is gone, has changed or is not known stays set aside, as does one whose
    /// `meta.json` cannot be read; [`Damage::reimported`] tells.
    ///
    /// ```no_run
    /// use fsprov::store::{Repair, Store};
    /// let store = Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// for damage in store.verify(Repair::No)? {
    ///     println!("{:?} {}: {}", damage.id, damage.part, damage.what);
    /// }
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn verify(&self, repair: Repair) -> Result<Vec<Damage>> {
        self.verify_told(repair, &|_| {})
    }

    /// The same, and `told` is told how many bytes of files are checked, as they are.
    pub fn verify_told(&self, repair: Repair, told: &dyn Fn(Progress)) -> Result<Vec<Damage>> {
        let layer_bytes = |id: &ImageId| LayerMeta::read(&self.paths.layer(id)).map_or(0, |meta| meta.bytes);
        let image_bytes = |id: &ImageId| self.meta(id).map_or(0, |meta| meta.bytes);
        let layers: u64 = ids_below(&self.paths.layers())?.iter().map(layer_bytes).sum();
        let total = layers + self.ids()?.iter().map(image_bytes).sum::<u64>();
        // Of the parts that are done, and of the one at hand: what of that cannot be read is not waited for.
        let (done, within) = (Cell::new(0), Cell::new(0));
        let read = |bytes: u64| {
            within.set(within.get() + bytes);
            told(Progress { read: done.get() + within.get(), total: Some(total.max(done.get() + within.get())) });
        };
        let end_part = |bytes: u64| {
            done.set(done.get() + bytes);
            within.set(0);
            read(0);
        };
        let mut all: Vec<(Option<ImageId>, PathBuf, Findings)> = Vec::new();
        let mut bad_layers = HashSet::new();
        let mut origins = Vec::new();
        // The lock for one at a time: who removes an image does not wait for all of the store. What is gone meanwhile is well.
        for id in ids_below(&self.paths.layers())? {
            let _in_use = self.lock_shared()?;
            if !self.paths.layer(&id).exists() {
                continue;
            }
            let found = self.verify_layer(&id, &read);
            if !found.is_empty() {
                bad_layers.insert(id.clone());
            }
            end_part(layer_bytes(&id));
            all.push((Some(id.clone()), self.paths.layer(&id), found));
        }
        for id in self.ids()? {
            let _in_use = self.lock_shared()?;
            if !self.paths.image(&id).exists() {
                continue;
            }
            let found = self.verify_image(&id, &bad_layers, &read);
            if !found.is_empty()
                && let Ok(meta) = self.meta(&id)
            {
                origins.push(meta);
            }
            end_part(image_bytes(&id));
            all.push((Some(id.clone()), self.paths.image(&id), found));
        }
        for (dir, name) in [(self.paths.images(), "images"), (self.paths.layers(), "layers")] {
            let _in_use = self.lock_shared()?;
            for stray in strays(&dir, |name| name.parse::<ImageId>().is_ok())? {
                let part = format!("{name}/{}", stray.to_string_lossy());
                all.push((None, dir.join(&stray), vec![(part, "it is not of the store".into())]));
            }
        }
        all.retain(|(_, _, found)| !found.is_empty());
        let mut damage = Vec::new();
        for (id, at, found) in all {
            let set_aside = repair != Repair::No && self.set_aside(&at)?;
            let of = |(part, what)| Damage { id: id.clone(), part, what, set_aside, reimported: false };
            damage.extend(found.into_iter().map(of));
        }
        if repair == Repair::Reimport {
            self.reimport(&origins, &mut damage);
        }
        Ok(damage)
    }

    /// Delete what [`Store::verify`] set aside, but for images in use: a rootfs may still show what is left of one. Gives the
    /// number of deleted images and layers, and the bytes that the disk got back.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// let (count, bytes) = store.remove_set_aside(&|| Ok(Vec::new()))?;
    /// println!("{count} removed, {bytes} bytes");
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn remove_set_aside(&self, uses: Uses<'_>) -> Result<(usize, u64)> {
        let held = self.lock_exclusive()?;
        let used: Vec<ImageId> = uses()?.into_iter().map(|one| one.image).collect();
        // The layers of one that was set aside are not known: while anything is used, layers stay.
        let mut gone = Vec::new();
        let dir = self.paths.aside();
        let entries = match std::fs::read_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((0, 0)),
            other => other.map_err(|e| Error::io("list", show(&dir), e))?,
        };
        for entry in entries {
            let path = entry.map_err(|e| Error::io("list", show(&dir), e))?.path();
            let id = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<ImageId>().ok());
            let is_used = match &id {
                Some(id) if path.join(image::MANIFEST).exists() => used.contains(id),
                _ => !used.is_empty(),
            };
            if is_used || super::lock::is_held(&path)? {
                log::info!("{} stays: it may be in use", show(&path));
                continue;
            }
            gone.push(staging::move_aside(&self.paths, &path)?);
        }
        // As gc does it: nobody waits for the lock while a tree is deleted.
        drop(held);
        let (count, mut bytes) = (gone.len(), 0);
        for one in gone {
            bytes += crate::sys::usage::measure(one.path())?.bytes;
            one.remove()?;
        }
        Ok((count, bytes))
    }

    /// Import what was set aside again. What cannot be had is logged and stays as it is: the finding tells.
    fn reimport(&self, origins: &[Meta], damage: &mut [Damage]) {
        for meta in origins {
            let Some(origin) = &meta.origin else { continue };
            let done = ImageSource::at(&origin.path).and_then(|source| {
                let options = ImportOptions {
                    name: meta.names.first().cloned(),
                    expected_id: Some(meta.id.clone()),
                    reference: origin.reference.clone(),
                    platform: origin.platform.clone(),
                    // It was taken before, and its id is the digest of all that it is.
                    signature: Signature::Waived,
                    ..self.import_options(Strictness::Lenient)
                };
                self.import(&source, &options)?;
                self.give_back(meta)
            });
            match done {
                // Its layers came with it, where those were damaged.
                Ok(()) => damage
                    .iter_mut()
                    .filter(|d| d.id.as_ref().is_some_and(|id| *id == meta.id || meta.layers.contains(id)))
                    .for_each(|d| d.reimported = true),
                Err(error) => log::warn!("{error}"),
            }
        }
    }

    /// Move something damaged to `aside/`. A mount that uses it keeps its descriptors and goes on with what is left.
    fn set_aside(&self, at: &Path) -> Result<bool> {
        let _held = self.lock_exclusive()?;
        let aside = self.paths.aside();
        match std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&aside) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(Error::io("make", show(&aside), e)),
            _ => {}
        }
        let name = at.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for n in 0..10_000 {
            let to = aside.join(format!("{name}.{n}"));
            match renameat_with(CWD, at, CWD, &to, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    sync_dir(&aside)?;
                    return Ok(true);
                }
                Err(rustix::io::Errno::EXIST | rustix::io::Errno::NOTEMPTY) => {}
                Err(rustix::io::Errno::NOENT) => return Ok(false),
                Err(e) => return Err(Error::sys("set aside", show(at), e)),
            }
        }
        Err(Error::new(Kind::Exists, "set aside", show(at), format!("{} is full of others", show(&aside))))
    }

    fn verify_layer(&self, id: &ImageId, read: Read<'_>) -> Findings {
        let dir = self.paths.layer(id);
        let meta = match LayerMeta::read(&dir) {
            Ok(meta) => meta,
            Err(error) => return vec![(image::META.into(), error.to_string())],
        };
        let mut found =
            verify_tree(&dir.join(image::INDEX), &[dir.join(image::ROOTFS)], meta.on_disk, Own::Layer, read);
        found.extend(others(&dir, &[image::META, image::INDEX, image::ROOTFS]));
        found
    }

    fn verify_image(&self, id: &ImageId, bad_layers: &HashSet<ImageId>, read: Read<'_>) -> Findings {
        let dir = self.paths.image(id);
        let meta = match self.meta(id) {
            Ok(meta) => meta,
            Err(error) => return vec![(image::META.into(), error.to_string())],
        };
        let mut found = Findings::new();
        let mut config = None;
        let manifest = super::meta::read_bounded(&dir.join(image::MANIFEST), crate::image::MAX_MANIFEST_BYTES as u64);
        let checked = manifest.and_then(|bytes| match meta.kind {
            ImageKind::Appc => {
                let got = sha256_hex(&bytes);
                if meta.manifest_sha256.as_ref().is_some_and(|want| *want != got) {
                    return Err(Error::new(Kind::Integrity, "check", "manifest", "its bytes are not those imported"));
                }
                appc::Manifest::parse(&bytes, Strictness::Lenient).map(drop)
            }
            ImageKind::Oci => {
                let got = ImageId::from_sha256(&<sha2::Sha256 as sha2::Digest>::digest(&bytes).into());
                if got != *id {
                    return Err(Error::new(Kind::Integrity, "check", "manifest", format!("its digest is {got}")));
                }
                match oci::parse_document(&bytes, None)? {
                    oci::Document::Manifest(manifest) => config = Some(manifest.config.digest),
                    oci::Document::Index(_) => {
                        return Err(Error::new(Kind::Integrity, "check", "manifest", "it is an index"));
                    }
                }
                Ok(())
            }
        });
        if let Err(error) = checked {
            found.push((image::MANIFEST.into(), error.to_string()));
        }
        if let Some(want) = config {
            let bytes = super::meta::read_bounded(&dir.join(image::CONFIG), crate::image::MAX_MANIFEST_BYTES as u64);
            match bytes.map(|bytes| sha256_hex(&bytes)) {
                Ok(got) if got == want.hex() => {}
                Ok(got) => found.push((image::CONFIG.into(), format!("its digest is sha256:{got}"))),
                Err(error) => found.push((image::CONFIG.into(), error.to_string())),
            }
        }
        let own_index = dir.join(image::OWN_INDEX);
        if (!meta.dependencies.is_empty() || own_index.exists())
            && let Err(error) = crate::index::Index::open(&own_index).and_then(|index| index.verify())
        {
            found.push((image::OWN_INDEX.into(), error.to_string()));
        }
        let known = [image::META, image::MANIFEST, image::INDEX, image::ROOTFS, image::CONFIG, image::OWN_INDEX];
        found.extend(others(&dir, &known));
        for layer in &meta.layers {
            if bad_layers.contains(layer) {
                found.push(("layers".into(), format!("{layer} is damaged")));
            } else if let Err(error) = self.check_layer(layer) {
                found.push(("layers".into(), error.to_string()));
            }
        }
        let layers = self.resolved(meta.clone()).layers;
        let own = match (&*meta.layers, &*meta.dependencies) {
            ([], []) if !meta.is_filtered => Own::Whole,
            _ => Own::Merged,
        };
        found.extend(verify_tree(&dir.join(image::INDEX), &layers, meta.on_disk, own, read));
        found
    }
}

/// Names below `dir` that are not among those known.
fn strays(dir: &Path, is_known: impl Fn(&str) -> bool) -> Result<Vec<OsString>> {
    let fail = |e| Error::io("list", show(dir), e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        if !name.to_str().is_some_and(&is_known) {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

/// What lies beside the parts of an image or layer.
fn others(dir: &Path, known: &[&str]) -> Findings {
    // What a writer of meta.json that died left beside it is not damage: the file itself is old or new.
    match strays(dir, |name| known.contains(&name) || super::is_half_written(name)) {
        Ok(names) => {
            names.into_iter().map(|n| (n.to_string_lossy().into_owned(), "not part of an image".into())).collect()
        }
        Err(error) => vec![(".".into(), error.to_string())],
    }
}

/// What of the disk an index must account for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    /// Its one layer, name by name.
    Whole,
    /// Likewise; whiteouts lie on the disk in another form.
    Layer,
    /// The contents it names: other names of the layers may be hidden.
    Merged,
}

fn verify_tree(index: &Path, layers: &[PathBuf], on_disk: OnDisk, own: Own, read: Read<'_>) -> Findings {
    let mut found = Findings::new();
    if let Err(error) = crate::index::Index::open(index).and_then(|index| index.verify()) {
        return vec![(image::INDEX.into(), error.to_string())];
    }
    let tree = match Tree::open(index, layers) {
        Ok(tree) => tree,
        Err(error) => return vec![(image::ROOTFS.into(), error.to_string())],
    };
    if let Err(error) = check_all(&tree, layers, on_disk, own, read, &mut found) {
        found.push((image::ROOTFS.into(), error.to_string()));
    }
    found
}

fn check_all(
    tree: &Tree,
    layers: &[PathBuf],
    on_disk: OnDisk,
    own: Own,
    read: Read<'_>,
    found: &mut Findings,
) -> Result<()> {
    let mut names: HashSet<Vec<u8>> = HashSet::new();
    let mut seen: HashSet<u32> = HashSet::new();
    let mut inodes: HashMap<u32, (u64, u64)> = HashMap::new();
    let root = tree.index.inode(0).map_err(damaged)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let disk = match (own, layers) {
        (Own::Whole | Own::Layer, [only]) => {
            Some(openat(CWD, only, flags, Mode::empty()).map_err(|e| Error::sys("open", show(only), e))?)
        }
        _ => None,
    };
    let mut stack = vec![(Vec::new(), root)];
    while let Some((path, inode)) = stack.pop() {
        if found.len() >= MAX_FINDINGS {
            found.push((image::ROOTFS.into(), format!("and more: only the first {MAX_FINDINGS} are told")));
            return Ok(());
        }
        let shown = || format!("/{}", String::from_utf8_lossy(&path));
        let is_whiteout =
            own == Own::Layer && path.rsplit(|b| *b == b'/').next().is_some_and(|n| n.starts_with(b".wh."));
        if is_whiteout {
            continue;
        }
        if inode.kind == InodeKind::File
            && seen.insert(inode.row)
            && let Err(error) = tree.content(&inode, |data| {
                read(data.len() as u64);
                Ok(())
            })
        {
            found.push((shown(), error.to_string()));
        }
        if let Some(disk) = &disk {
            if let Some(what) = differs(disk, &path, &inode, tree, on_disk, &mut inodes) {
                found.push((shown(), what));
            }
            names.insert(path.clone());
        }
        let InodeKind::Directory { first, count } = inode.kind else { continue };
        for at in first..first + count {
            let name = tree.index.name(at).map_err(damaged)?;
            let child = if path.is_empty() { name.name.to_vec() } else { [&*path, b"/", name.name].concat() };
            stack.push((child, tree.index.inode(name.row).map_err(damaged)?));
        }
    }
    if let (Some(_), [only]) = (&disk, layers) {
        strangers(only, &names, own, found)?;
    }
    Ok(())
}

/// How the disk differs from what the index says of a path.
fn differs(
    disk: &OwnedFd,
    path: &[u8],
    inode: &Inode,
    tree: &Tree,
    on_disk: OnDisk,
    inodes: &mut HashMap<u32, (u64, u64)>,
) -> Option<String> {
    let (parent, name) = match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&b"."[..], if path.is_empty() { &b"."[..] } else { path }),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let dir = match open_beneath(disk, Path::new(OsStr::from_bytes(parent)), flags) {
        Ok(dir) => dir,
        Err(e) => return Some(format!("its directory cannot be opened: {}", std::io::Error::from(e))),
    };
    let stat = match statat(&dir, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT) => return Some("it is missing".into()),
        Err(e) => return Some(std::io::Error::from(e).to_string()),
    };
    let (want, have) = (FileType::from_raw_mode(inode.mode), FileType::from_raw_mode(stat.st_mode));
    let stands_in = on_disk == OnDisk::IndexOnly
        && matches!(want, FileType::CharacterDevice | FileType::BlockDevice)
        && have == FileType::RegularFile;
    if want != have && !stands_in {
        return Some(format!("it is {have:?}, not {want:?}"));
    }
    if want == FileType::Symlink {
        let target =
            rustix::fs::readlinkat(&dir, OsStr::from_bytes(name), Vec::new()).map(std::ffi::CString::into_bytes);
        let wanted = tree.index.target(inode).ok().flatten();
        if target.ok().as_deref() != wanted {
            return Some("it points elsewhere".into());
        }
    }
    let is_directory = want == FileType::Directory;
    let this = (stat.st_dev, stat.st_ino);
    if !is_directory && *inodes.entry(inode.row).or_insert(this) != this {
        return Some("no longer a hard link of the same file".into());
    }
    if !is_directory && stat.st_nlink as u64 > u64::from(inode.nlink) {
        return Some(format!("it has {} names, not {}", stat.st_nlink, inode.nlink));
    }
    if on_disk == OnDisk::Exact {
        if matches!(want, FileType::CharacterDevice | FileType::BlockDevice) && stat.st_rdev != device_of(inode.rdev) {
            return Some("it is another device".into());
        }
        let is_link = want == FileType::Symlink;
        if (stat.st_uid, stat.st_gid) != (inode.uid, inode.gid) {
            let have = format!("{}:{}", stat.st_uid, stat.st_gid);
            return Some(format!("its owner is {have}, not {}:{}", inode.uid, inode.gid));
        }
        if !is_link && stat.st_mode & 0o7777 != inode.mode & 0o7777 {
            return Some(format!("its mode is {:o}, not {:o}", stat.st_mode & 0o7777, inode.mode & 0o7777));
        }
        // Times that every file system can hold; others are clamped by some.
        let in_range = (0..1 << 31).contains(&inode.mtime.secs);
        if in_range && (stat.st_mtime, stat.st_mtime_nsec as u32) != (inode.mtime.secs, inode.mtime.nanos) {
            return Some("it was changed after the import: its time is another".into());
        }
        if is_directory || want == FileType::RegularFile {
            return xattrs_differ(&dir, name, inode, tree);
        }
    }
    None
}

/// The index's device number as stat(2) tells it.
fn device_of(rdev: u32) -> u64 {
    rustix::fs::makedev((rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & 0xfff00))
}

/// How the attributes of a file or directory differ, of those that are taken from images.
fn xattrs_differ(dir: &OwnedFd, name: &[u8], inode: &Inode, tree: &Tree) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fail = |e: rustix::io::Errno| Some(format!("its attributes: {}", std::io::Error::from(e)));
    let file = match openat(dir, OsStr::from_bytes(name), flags, Mode::empty()) {
        Ok(file) => file,
        Err(e) => return fail(e),
    };
    let mut wanted: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    match tree.index.xattrs(inode) {
        Ok(all) => wanted.extend(all.flatten().map(|(name, value)| (name.to_vec(), value.to_vec()))),
        Err(e) => return Some(e.to_string()),
    }
    let mut names = vec![0; crate::index::MAX_XATTR_BYTES];
    match rustix::fs::flistxattr(&file, &mut names[..]) {
        Ok(length) => names.truncate(length),
        Err(rustix::io::Errno::OPNOTSUPP) => return None,
        Err(e) => return fail(e),
    }
    let mut value = vec![0; crate::index::MAX_XATTR_BYTES];
    for name in names.split(|b| *b == 0).filter(|name| is_xattr_taken(name)) {
        let shown = String::from_utf8_lossy(name);
        let length = match rustix::fs::fgetxattr(&file, OsStr::from_bytes(name), &mut value[..]) {
            Ok(length) => length,
            Err(e) => return fail(e),
        };
        match wanted.remove(name) {
            Some(want) if want == value[..length] => {}
            Some(_) => return Some(format!("its attribute {shown} has another value")),
            None => return Some(format!("it has an attribute {shown} too many")),
        }
    }
    wanted.keys().next().map(|name| format!("its attribute {} is missing", String::from_utf8_lossy(name)))
}

/// Names on the disk that the index does not know.
fn strangers(root: &Path, names: &HashSet<Vec<u8>>, own: Own, found: &mut Findings) -> Result<()> {
    let mut stack = vec![Vec::new()];
    while let Some(path) = stack.pop() {
        let dir = root.join(OsStr::from_bytes(&path));
        let fail = |e| Error::io("list", show(&dir), e);
        for entry in std::fs::read_dir(&dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            let child =
                if path.is_empty() { name.as_bytes().to_vec() } else { [&*path, b"/", name.as_bytes()].concat() };
            let kind = entry.file_type().map_err(fail)?;
            let stands_for_one = own == Own::Layer && is_whiteout(&name, kind);
            if !names.contains(&child) && !stands_for_one {
                found.push((format!("/{}", String::from_utf8_lossy(&child)), "the image has no such file".into()));
                if found.len() >= MAX_FINDINGS {
                    return Ok(());
                }
            } else if kind.is_dir() {
                stack.push(child);
            }
        }
    }
    Ok(())
}

/// Is it what stands for a whiteout on the disk?
fn is_whiteout(name: &OsStr, kind: std::fs::FileType) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    kind.is_char_device() || name.as_bytes().starts_with(b".wh.")
}
