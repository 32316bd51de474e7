//! Is everything in the store what was imported? Each kind of damage is found and named.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, openat, renameat_with, statat};

use super::layer::LayerMeta;
use super::meta::OnDisk;
use super::tree::{Tree, damaged};
use super::{ImageKind, Store, ids_below};
use crate::error::{Error, Kind, Result, show};
use crate::id::ImageId;
use crate::image::{Strictness, appc, oci};
use crate::index::read::{Form, Inode};
use crate::paths::image;
use crate::sys::durable::sync_dir;
use crate::sys::fs::open_beneath;

/// What to do about damage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Tell.
    #[default]
    No,
    /// Move what is damaged out of the store, into `aside/`: the next import brings it anew.
    SetAside,
}

/// Something that is not what was imported.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// The image or layer.
    pub id: ImageId,
    /// Which of its parts: `manifest`, `meta.json`, `index`, `layers`, or a path of its tree.
    pub part: String,
    /// What is wrong.
    pub what: String,
    /// Was it set aside?
    pub set_aside: bool,
}

/// Most findings told of one tree: a lost disk has millions.
const MAX_FINDINGS: usize = 100;

type Findings = Vec<(String, String)>;

impl Store {
    /// Look at every byte of every image and layer. Gives what is damaged; empty: nothing.
    pub fn verify(&self, repair: Repair) -> Result<Vec<Damage>> {
        let mut all = Vec::new();
        let mut bad_layers = HashSet::new();
        {
            let _in_use = self.lock_shared()?;
            for id in ids_below(&self.paths.layers())? {
                let found = self.verify_layer(&id);
                if !found.is_empty() {
                    bad_layers.insert(id.clone());
                }
                all.push((id, true, found));
            }
            for id in self.ids()? {
                let found = self.verify_image(&id, &bad_layers);
                all.push((id, false, found));
            }
        }
        let mut damage = Vec::new();
        for (id, is_layer, found) in all.into_iter().filter(|(_, _, found)| !found.is_empty()) {
            let at = if is_layer { self.paths.layer(&id) } else { self.paths.image(&id) };
            let set_aside = repair == Repair::SetAside && self.set_aside(&at)?;
            damage.extend(found.into_iter().map(|(part, what)| Damage { id: id.clone(), part, what, set_aside }));
        }
        Ok(damage)
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

    fn verify_layer(&self, id: &ImageId) -> Findings {
        let dir = self.paths.layer(id);
        let meta = match LayerMeta::read(&dir) {
            Ok(meta) => meta,
            Err(error) => return vec![(image::META.into(), error.to_string())],
        };
        verify_tree(&dir.join(image::INDEX), &[dir.join(image::ROOTFS)], meta.on_disk, Own::Layer)
    }

    fn verify_image(&self, id: &ImageId, bad_layers: &HashSet<ImageId>) -> Findings {
        let dir = self.paths.image(id);
        let meta = match self.meta(id) {
            Ok(meta) => meta,
            Err(error) => return vec![(image::META.into(), error.to_string())],
        };
        let mut found = Findings::new();
        let manifest = super::meta::read_bounded(&dir.join(image::MANIFEST), crate::image::MAX_MANIFEST_BYTES as u64);
        let checked = manifest.and_then(|bytes| match meta.kind {
            ImageKind::Appc => appc::Manifest::parse(&bytes, Strictness::Lenient).map(drop),
            ImageKind::Oci => {
                let got = ImageId::from_sha256(&<sha2::Sha256 as sha2::Digest>::digest(&bytes).into());
                if got != *id {
                    return Err(Error::new(Kind::Integrity, "check", "manifest", format!("its digest is {got}")));
                }
                oci::parse_document(&bytes, None).map(drop)
            }
        });
        if let Err(error) = checked {
            found.push((image::MANIFEST.into(), error.to_string()));
        }
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
        found.extend(verify_tree(&dir.join(image::INDEX), &layers, meta.on_disk, own));
        found
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

fn verify_tree(index: &Path, layers: &[PathBuf], on_disk: OnDisk, own: Own) -> Findings {
    let mut found = Findings::new();
    let tree = match Tree::open(index, layers) {
        Ok(tree) => tree,
        Err(error) => return vec![(image::INDEX.into(), error.to_string())],
    };
    if let Err(error) = tree.index.verify() {
        return vec![(image::INDEX.into(), error.to_string())];
    }
    if let Err(error) = check_all(&tree, layers, on_disk, own, &mut found) {
        found.push((image::ROOTFS.into(), error.to_string()));
    }
    found
}

fn check_all(tree: &Tree, layers: &[PathBuf], on_disk: OnDisk, own: Own, found: &mut Findings) -> Result<()> {
    let mut names: HashSet<Vec<u8>> = HashSet::new();
    let mut read: HashSet<u32> = HashSet::new();
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
        if inode.form == Form::File
            && read.insert(inode.row)
            && let Err(error) = tree.content(&inode, |_| Ok(()))
        {
            found.push((shown(), error.to_string()));
        }
        if let Some(disk) = &disk {
            if let Some(what) = differs(disk, &path, &inode, tree, on_disk) {
                found.push((shown(), what));
            }
            names.insert(path.clone());
        }
        let Form::Directory { first, count } = inode.form else { continue };
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
fn differs(disk: &std::os::fd::OwnedFd, path: &[u8], inode: &Inode, tree: &Tree, on_disk: OnDisk) -> Option<String> {
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
    if on_disk == OnDisk::Exact {
        let is_link = want == FileType::Symlink;
        if (stat.st_uid, stat.st_gid) != (inode.uid, inode.gid) {
            let have = format!("{}:{}", stat.st_uid, stat.st_gid);
            return Some(format!("its owner is {have}, not {}:{}", inode.uid, inode.gid));
        }
        if !is_link && stat.st_mode & 0o7777 != inode.mode & 0o7777 {
            return Some(format!("its mode is {:o}, not {:o}", stat.st_mode & 0o7777, inode.mode & 0o7777));
        }
    }
    None
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
