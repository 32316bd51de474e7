//! `--userns=auto`: subordinate ids that no other run has, as many as the image needs.
//!
//! Ids are given out in blocks of [`BLOCK`]. A block is taken by a flock(2) on a file of its number, which ends with the process that
//! holds it.

use std::fs::File;
use std::path::Path;

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result, show};
use crate::idmap;
use crate::index::Index;
use crate::plan::{IdRange, OVERFLOW_ID};

/// Ids of one block: the fewest that a run gets, as of podman (its `AUTO_USERNS_MIN`).
const BLOCK: u32 = 1024;
/// The most that a run gets: an image says how many it needs. As of podman, too (`AUTO_USERNS_MAX`).
const MOST: u32 = 65_536;
const OP: &str = "take ids for --userns=auto";
const MORE: &str = "give this user more in /etc/subuid and /etc/subgid";

/// Ids that may be given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spare {
    uids: IdRange,
    gids: IdRange,
}

impl Spare {
    /// Of the maps of an ordinary user's namespace: all but the first, which is the user's own.
    pub(super) fn of_user(uids: &[IdRange], gids: &[IdRange]) -> Self {
        let others = |all: &[IdRange]| {
            let count = all.iter().map(|r| r.count).fold(0, u32::saturating_add).saturating_sub(1);
            IdRange { inside: 0, outside: 1, count }
        };
        Spare { uids: others(uids), gids: others(gids) }
    }

    /// Of root: those of the name `containers` in /etc/subuid and /etc/subgid, which podman takes, too.
    pub(super) fn of_root(files: idmap::Files<'_>) -> Result<Self> {
        const NAME: &str = "containers";
        let ranges = |file| {
            let all = idmap::subordinate_of(NAME, file)?;
            // No id beyond 4294967294: what comes after it would be root's again.
            let within = |r: IdRange| IdRange { count: r.count.min(u32::MAX - r.outside), ..r };
            all.into_iter().map(within).max_by_key(|r| r.count).ok_or_else(|| {
                Error::new(Kind::NotFound, OP, show(file), format!("it gives the name {NAME} no ids"))
                    .hint(format!("echo {NAME}:2147483647:2147483648 >> {}", show(file)))
            })
        };
        Ok(Spare { uids: ranges(files.subuid)?, gids: ranges(files.subgid)? })
    }
}

/// Ids that are taken, as long as this is there.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) uids: Vec<IdRange>,
    pub(super) gids: Vec<IdRange>,
    #[expect(dead_code, reason = "held, not used")]
    locks: Vec<File>,
}

/// Take enough of them for the ids up to `highest`.
pub(super) fn take(spare: Spare, highest: u32, locks: &Path) -> Result<Taken> {
    std::fs::create_dir_all(locks).map_err(|e| Error::io("make", show(locks), e))?;
    let wanted = highest / BLOCK + 1;
    let all = spare.uids.count.min(spare.gids.count) / BLOCK;
    let needs = format!("the image needs {} ids", u64::from(wanted) * u64::from(BLOCK));
    let refuse = |why: String| Error::new(Kind::Limit, OP, "", format!("{needs}; {why}"));
    let exhausted = || {
        refuse(format!("of the {} that there are, no such range is free", u64::from(all) * u64::from(BLOCK)))
            .hint(format!("wait for another run to end, or {MORE}"))
    };
    if wanted > all {
        return Err(refuse(format!("there are {}", all * BLOCK)).hint(MORE));
    }
    if wanted > MOST / BLOCK {
        return Err(refuse(format!("a run gets {MOST} at most")).hint("leave out --userns=auto"));
    }
    let (mut first, mut held) = (0, Vec::new());
    while held.len() < wanted as usize {
        let next = first + held.len() as u32;
        if next >= all {
            return Err(exhausted());
        }
        if let Some(file) = lock(&locks.join(next.to_string()))? {
            held.push(file);
        } else {
            (first, held) = (next + 1, Vec::new());
        }
    }
    let range =
        |spare: IdRange| vec![IdRange { inside: 0, outside: spare.outside + first * BLOCK, count: wanted * BLOCK }];
    Ok(Taken { uids: range(spare.uids), gids: range(spare.gids), locks: held })
}

fn lock(path: &Path) -> Result<Option<File>> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file =
        openat(CWD, path, flags, Mode::from_raw_mode(0o600)).map_err(|e| Error::sys("open lock", show(path), e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file.into())),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(Error::sys("lock", show(path), e)),
    }
}

/// The highest id that a file of the image belongs to. "Nobody" needs none: an id that is not mapped is shown so.
pub(super) fn highest_owner(index: &Path) -> Result<u32> {
    let index = Index::open(index)?;
    let mut highest = 0;
    for row in 0..index.inode_count() {
        let inode = index.inode(row).map_err(|e| Error::new(Kind::Invalid, OP, "", e))?;
        for id in [inode.uid, inode.gid] {
            highest = if id == OVERFLOW_ID { highest } else { highest.max(id) };
        }
    }
    Ok(highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_has_anothers_ids() {
        let dir = tempfile::tempdir().unwrap();
        let outer =
            |own| [IdRange { inside: 0, outside: own, count: 1 }, IdRange { inside: 1, outside: 100_000, count: 5000 }];
        let spare = Spare::of_user(&outer(1000), &outer(100));
        let take = |highest| take(spare, highest, dir.path());
        let first = take(0).unwrap();
        assert_eq!(first.uids, [IdRange { inside: 0, outside: 1, count: 1024 }]);
        assert_eq!(first.uids, first.gids);
        let second = take(1024).unwrap();
        assert_eq!(second.uids, [IdRange { inside: 0, outside: 1025, count: 2048 }], "1024 itself is one more block");
        let third = take(1023).unwrap();
        assert_eq!(third.uids[0].outside, 1 + 3 * 1024);
        let error = take(0).unwrap_err();
        assert!(error.kind() == Kind::Limit && error.to_string().contains("4096"), "{error}");
        drop((first, third));
        assert_eq!(take(1024).unwrap_err().kind(), Kind::Limit, "two blocks, but not beside each other");
        assert_eq!(take(999).unwrap().uids[0].outside, 1);
        drop(second);
        assert_eq!(take(4095).unwrap().uids[0].count, 4096);
    }

    #[test]
    fn an_image_does_not_say_how_many_locks_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let spare = IdRange { inside: 0, outside: 1 << 31, count: 1 << 31 };
        let take = |highest| take(Spare { uids: spare, gids: spare }, highest, dir.path());
        let error = take(70_000).unwrap_err();
        assert!(error.kind() == Kind::Limit && error.to_string().contains("65536 at most"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(take(65_535).unwrap().uids[0].count, 65_536);
    }

    #[test]
    fn what_subuid_gives_ends_with_the_last_id() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("subid");
        std::fs::write(&file, "containers:4294964000:4294967295\n").unwrap();
        let spare = Spare::of_root(idmap::Files { passwd: &file, subuid: &file, subgid: &file }).unwrap();
        let taken: Vec<_> = (0..3).map(|_| take(spare, 0, dir.path()).unwrap()).collect();
        assert_eq!(taken[2].uids[0].outside, 4_294_964_000 + 2048);
        assert_eq!(take(spare, 0, dir.path()).unwrap_err().kind(), Kind::Limit, "the next would reach root's");
    }

    #[test]
    fn a_user_of_one_id_has_none_to_spare() {
        let dir = tempfile::tempdir().unwrap();
        let own = [IdRange { inside: 0, outside: 1000, count: 1 }];
        assert_eq!(take(Spare::of_user(&own, &own), 0, dir.path()).unwrap_err().kind(), Kind::Limit);
    }
}
