//! Which mount points are taken, by a directory of empty files `<hash of the path>-<id>`: so that the thousandth rootfs is made as
//! fast as the first, without a look at every record.
//!
//! A file is made before its record and removed after it, so a record always has its file; one without a record was left by a
//! crash and says nothing: a reader that finds an id here looks at its record.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{lock, record};
use crate::error::{Error, Result, show};
use crate::id::ContainerId;
use crate::paths::StatePaths;

/// Bytes of the hash in a name: two paths of one hash would only cost a look at one record more.
const HASH_BYTES: usize = 16;

fn hash(rootfs: &Path) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(rootfs.as_os_str().as_bytes())[..HASH_BYTES])
}

fn file(paths: &StatePaths, rootfs: &Path, id: &ContainerId) -> PathBuf {
    paths.points().join(format!("{}-{id}", hash(rootfs)))
}

/// The id in a name; `None`: not a name of ours.
fn id_of(name: &OsString) -> Option<ContainerId> {
    let (hash, id) = name.to_str()?.split_at_checked(2 * HASH_BYTES)?;
    hash.bytes().all(|b| b.is_ascii_hexdigit()).then(|| id.strip_prefix('-')?.parse().ok())?
}

/// The names in the directory; `None`: there is no directory (yet).
fn names(paths: &StatePaths) -> Result<Option<Vec<OsString>>> {
    let dir = paths.points();
    let fail = |e| Error::io("list", show(&dir), e);
    match std::fs::read_dir(&dir) {
        Ok(entries) => entries.map(|e| Ok(e.map_err(fail)?.file_name())).collect::<Result<_>>().map(Some),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(fail(e)),
    }
}

/// The ids that may have this mount point: their records tell.
pub(super) fn ids_at(paths: &StatePaths, rootfs: &Path) -> Result<Vec<ContainerId>> {
    let Some(names) = names(paths)? else { return record::ids(paths) };
    let wanted = hash(rootfs);
    Ok(names.iter().filter(|name| name.as_bytes().starts_with(wanted.as_bytes())).filter_map(id_of).collect())
}

/// Note that `id` has this mount point. Held by the caller: the lock of the containers directory.
pub(super) fn take(paths: &StatePaths, rootfs: &Path, id: &ContainerId) -> Result<()> {
    let make = |rootfs: &Path, id: &ContainerId| {
        let path = file(paths, rootfs, id);
        std::fs::write(&path, "").map_err(|e| Error::io("note mount point", show(path), e))
    };
    let dir = paths.points();
    if !dir.is_dir() {
        lock::make_private_dir(&dir)?;
        for earlier in record::readable(paths)? {
            make(&earlier.plan.rootfs, &earlier.plan.id)?;
        }
    }
    make(rootfs, id)
}

/// Forget the mount point of `id`, whose record is gone.
pub(super) fn release(paths: &StatePaths, id: &ContainerId, rootfs: Option<&Path>) -> Result<()> {
    let remove = |path: &Path| match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("forget mount point", show(path), e)),
        _ => Ok(()),
    };
    match rootfs {
        Some(rootfs) => remove(&file(paths, rootfs, id)),
        None => names(paths)?
            .unwrap_or_default()
            .iter()
            .filter(|name| id_of(name).as_ref() == Some(id))
            .try_for_each(|name| remove(&paths.points().join(name))),
    }
}

/// Remove the files of ids that have no directory. Held by the caller: the lock of the containers directory.
pub(super) fn tidy(paths: &StatePaths) -> Result<()> {
    let known: BTreeSet<_> = record::ids(paths)?.into_iter().collect();
    let stale: BTreeSet<_> = names(paths)?.unwrap_or_default().iter().filter_map(id_of).collect();
    stale.difference(&known).try_for_each(|id| release(paths, id, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_found_and_released() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StatePaths::new(dir.path().to_owned());
        let (a, b): (ContainerId, ContainerId) = ("a".parse().unwrap(), "a-b".parse().unwrap());
        let (one, two) = (Path::new("/mnt/one"), Path::new("/mnt/two"));
        assert!(ids_at(&paths, one).unwrap().is_empty());
        take(&paths, one, &a).unwrap();
        take(&paths, one, &a).unwrap();
        take(&paths, two, &b).unwrap();
        std::fs::write(paths.points().join("stranger"), "").unwrap();
        assert_eq!(ids_at(&paths, one).unwrap(), std::slice::from_ref(&a));
        assert_eq!(ids_at(&paths, two).unwrap(), std::slice::from_ref(&b));
        release(&paths, &a, Some(one)).unwrap();
        release(&paths, &b, None).unwrap();
        assert!(ids_at(&paths, one).unwrap().is_empty() && ids_at(&paths, two).unwrap().is_empty());
        take(&paths, two, &b).unwrap();
        tidy(&paths).unwrap();
        assert!(ids_at(&paths, two).unwrap().is_empty(), "no container of this id");
        assert!(paths.points().join("stranger").exists());
    }
}
