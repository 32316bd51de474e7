//! Snapshots of pods with user namespaces (containerd's capability `remap-ids`): what lies below shows the owners that the namespace has, and nothing is copied.
//!
//! Two mounts do it for all snapshots of one map, whatever number of layers they have: the store's layers, and the snapshots' own files, each shown once more
//! with other owners (idmapped mounts, Linux 5.12; as lower layers of an overlay 5.19).
//!
//! ```text
//! m/<map>/store/     the store's layers; <map>: a hash of the map
//! m/<map>/own/       s/
//! m/<map>/<number>   symlinks to the directories in those, as in l/
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Kind, Result, show};
use crate::idmap::MapArg;
use crate::plan::{IdRange, Ownership};
use crate::sys::mount::{AttrSet, Depth, Unmount, is_mount_root, move_mount_to, open_tree_clone, set_attr, unmount};
use crate::sys::process::UserNamespace;

/// Labels of Prepare and View: `INSIDE:OUTSIDE:COUNT`, several separated by commas.
const UIDS: &str = "containerd.io/snapshot/uidmapping";
const GIDS: &str = "containerd.io/snapshot/gidmapping";
/// Most ranges of one map: the kernel's limit (user_namespaces(7)).
const MAX_RANGES: usize = 340;

/// Names in the directory of a map.
pub(super) const STORE: &str = "store";
pub(super) const OWN: &str = "own";

const OP: &str = "map the owners of layers";

/// The maps that these labels ask for.
pub(super) fn of_labels(labels: &BTreeMap<String, String>) -> Result<Option<Ownership>> {
    let refuse = |why: &str| Err(Error::new(Kind::Invalid, "use labels", format!("{UIDS}, {GIDS}"), why));
    let read = |name: &str| labels.get(name).map(|text| ranges(text)).transpose();
    match (read(UIDS)?, read(GIDS)?) {
        (None, None) => Ok(None),
        (Some(uids), Some(gids)) => Ok(Some(Ownership { uids, gids, squash: None })),
        _ => refuse("there must be both or none"),
    }
}

/// Has containerd itself changed the owners in this snapshot? It does where it was not told that we can, and passes the labels all the same.
pub(super) fn is_done(parent: &str, maps: &Ownership) -> bool {
    let first = |ranges: &[IdRange]| ranges.first().map_or(0, |range| range.outside);
    parent.ends_with(&format!("-{}-{}", first(&maps.uids), first(&maps.gids)))
}

fn ranges(text: &str) -> Result<Vec<IdRange>> {
    let read = |one: &str| {
        if let Ok(MapArg::Range(range)) = one.parse::<MapArg>() {
            return Ok(range);
        }
        let shown: String = text.chars().take(100).collect();
        Err(Error::new(Kind::Invalid, "use labels", format!("{shown:?}"), "it is not a map of ids"))
    };
    text.split(',').take(MAX_RANGES + 1).map(read).collect::<Result<Vec<_>>>().and_then(|ranges| {
        if ranges.len() <= MAX_RANGES {
            return Ok(ranges);
        }
        let why = format!("the map has more than {MAX_RANGES} ranges");
        Err(Error::new(Kind::Invalid, "use labels", "", why))
    })
}

/// A name for the map, short: it is in the mount options once for each layer.
pub(super) fn name(maps: &Ownership) -> String {
    let text = format!("{}\n{}", lines(&maps.uids), lines(&maps.gids));
    data_encoding::HEXLOWER.encode(&Sha256::digest(text)[..6])
}

/// As /proc/PID/uid_map has them.
fn lines(ranges: &[IdRange]) -> String {
    ranges.iter().fold(String::new(), |mut text, range| {
        let _ = writeln!(text, "{} {} {}", range.inside, range.outside, range.count);
        text
    })
}

/// Show `sources` with these owners in the directory of their map, where that is not done yet.
pub(super) fn show_mapped(dir: &Path, maps: &Ownership, sources: [(&str, PathBuf); 2]) -> Result<()> {
    let mut namespace: Option<OwnedFd> = None;
    for (name, source) in sources {
        let at = dir.join(name);
        std::fs::create_dir_all(&at).map_err(|e| Error::io("make", show(&at), e))?;
        if is_mount_root(open(&at)?)? {
            continue;
        }
        let users = match &namespace {
            Some(users) => users,
            // It is needed for the moment in which the mount is made.
            None => namespace.insert(UserNamespace::with_maps(&lines(&maps.uids), &lines(&maps.gids))?.open()?),
        };
        let attrs = AttrSet { read_only: true, private: true, idmap: Some(users.as_fd()), ..AttrSet::default() };
        let mounted = open_tree_clone(open(&source)?, Depth::One)
            .and_then(|tree| set_attr(&tree, &attrs).map(|()| tree))
            .map_err(|e| explain(&source, e))?;
        move_mount_to(&mounted, open(&at)?).map_err(|e| Error::sys(OP, show(&at), e))?;
    }
    Ok(())
}

fn explain(source: &Path, errno: Errno) -> Error {
    let error = Error::sys(OP, show(source), errno);
    match errno {
        Errno::INVAL => Error::new(Kind::Unsupported, OP, show(source), "its file system does not take id maps")
            .hint("keep the store and the state directory on ext4, xfs or btrfs (tmpfs from Linux 6.3 on)"),
        Errno::NOSYS => error.hint("id maps need Linux 5.12, and 5.19 below an overlay"),
        Errno::PERM => error.hint("id maps need CAP_SYS_ADMIN where the file system was mounted"),
        _ => error,
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(|e| Error::sys("open", show(path), e))
}

/// Take the mounts of a map away, and its directory. Overlays that use them have them still.
pub(super) fn clear(dir: &Path) -> Result<()> {
    for name in [STORE, OWN] {
        let at = dir.join(name);
        match unmount(&at, Unmount::Lazy) {
            // Not mounted, or not there.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(e) => return Err(Error::sys("unmount", show(&at), e)),
        }
    }
    crate::sys::remove::remove_tree(dir).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_of_labels() {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        assert_eq!(of_labels(&labels(&[("x", "y")])).unwrap(), None);
        let maps = of_labels(&labels(&[(UIDS, "0:200000:65536"), (GIDS, "0:300000:10,10:1:5")])).unwrap().unwrap();
        assert_eq!(maps.uids, [IdRange { inside: 0, outside: 200_000, count: 65_536 }]);
        assert_eq!(lines(&maps.gids), "0 300000 10\n10 1 5\n");
        assert_eq!(name(&maps), name(&maps.clone()));
        assert_ne!(name(&maps), name(&Ownership { uids: maps.gids.clone(), gids: maps.uids.clone(), squash: None }));
        let many = "0:0:1,".repeat(400);
        for bad in ["", "0:1", "a:b:c", "0:0:0", "auto", "none", "0:0:1,", "0:4294967295:1", &many] {
            assert!(of_labels(&labels(&[(UIDS, bad), (GIDS, "0:0:1")])).is_err(), "{bad}");
        }
        assert!(of_labels(&labels(&[(UIDS, "0:0:1")])).is_err());
    }
}
