//! User namespaces: which ids an ordinary user's container has, and who writes the maps.
//!
//! ```text
//! container          its own namespace, made by the runtime; with `--userns=host` there is none
//!    |  uidMappings
//! this user's root   the namespace that the rootfs is mounted in: 0 is the user, 1.. the subordinate ids
//!    |  newuidmap
//! the host
//! ```

use std::ffi::OsString;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::idmap;
use crate::plan::{IdRange, Ownership};
use crate::sys::process::own_ids;

/// The maps of the namespace that an ordinary user's rootfs is mounted in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Maps {
    /// User ids; the first is the user's own.
    pub(crate) uids: Vec<IdRange>,
    /// Group ids.
    pub(crate) gids: Vec<IdRange>,
}

impl Maps {
    /// This user's: root is the user, the rest the subordinate ids; the user's own alone where there are no others.
    pub(crate) fn of_user() -> Result<Self> {
        let Ownership { mut uids, mut gids, .. } = idmap::usual(own_ids(), idmap::Files::of_host())?;
        let has_more = uids.len() > 1 && gids.len() > 1;
        if !has_more {
            uids.truncate(1);
            gids.truncate(1);
            log::info!(target: "fsprov::run", "this user has no subordinate ids: every file is shown as root's or nobody's");
        }
        Ok(Maps { uids, gids })
    }

    /// Is there but one id?
    pub(crate) fn is_single(&self) -> bool {
        self.uids.len() == 1
    }

    /// Write them for a process of ours that has just entered a user namespace.
    pub(crate) fn write(&self, pid: u32) -> Result<()> {
        if self.is_single() {
            return self.write_own(pid);
        }
        for (program, ranges) in [("newuidmap", &self.uids), ("newgidmap", &self.gids)] {
            let mut args: Vec<OsString> = vec![pid.to_string().into()];
            for range in ranges {
                args.extend([range.inside, range.outside, range.count].map(|n| n.to_string().into()));
            }
            let said = Command::new(program).args(&args).stdin(Stdio::null()).output();
            let fail = |why: String| {
                Error::new(Kind::Unsupported, "map subordinate ids", program, why).hint(
                    "as root: install the package uidmap (shadow-utils), and let /etc/subuid and /etc/subgid give this user ids",
                )
            };
            let said = said.map_err(|e| fail(e.to_string()))?;
            if !said.status.success() {
                return Err(fail(String::from_utf8_lossy(&said.stderr).trim().to_owned()));
            }
        }
        Ok(())
    }

    /// One id needs no help, as long as groups are given up (user_namespaces(7)).
    fn write_own(&self, pid: u32) -> Result<()> {
        let line = |ranges: &[IdRange]| {
            ranges.iter().map(|r| format!("{} {} {}", r.inside, r.outside, r.count)).collect::<Vec<_>>().join("\n")
        };
        for (name, text) in
            [("setgroups", "deny".to_owned()), ("gid_map", line(&self.gids)), ("uid_map", line(&self.uids))]
        {
            let path = format!("/proc/{pid}/{name}");
            std::fs::write(&path, text).map_err(|e| Error::io("write id map", path, e))?;
        }
        Ok(())
    }
}

/// Is this group one of this process's user namespace?
pub(super) fn is_group_mapped(id: u32) -> bool {
    let text = std::fs::read_to_string("/proc/self/gid_map").unwrap_or_default();
    text.lines().any(|line| {
        let numbers: Vec<u32> = line.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
        matches!(numbers[..], [inside, _, count] if id.checked_sub(inside).is_some_and(|below| below < count))
    })
}

/// The container's root with these ids, where root of this namespace is nobody inside: what is made here must belong to it.
pub(super) fn other_root((uids, gids): &(Vec<IdRange>, Vec<IdRange>)) -> Option<(u32, u32)> {
    let root = |all: &[IdRange]| all.iter().find(|range| range.inside == 0).map(|range| range.outside);
    let is_inside = |all: &[IdRange]| all.iter().any(|range| range.outside == 0);
    if is_inside(uids) || is_inside(gids) { None } else { Some((root(uids)?, root(gids)?)) }
}

/// `--userns=keep-id`: inside, `own` is who was 0 in the outer namespace, and every other id one of its others, in order.
pub(crate) fn keep_id(own: u32, outer: &[IdRange]) -> Vec<IdRange> {
    let others = outer.iter().map(|r| r.count).sum::<u32>().saturating_sub(1);
    let below = own.min(others);
    let mut all = Vec::new();
    if below > 0 {
        all.push(IdRange { inside: 0, outside: 1, count: below });
    }
    all.push(IdRange { inside: own, outside: 0, count: 1 });
    if others > below && own < u32::MAX - 1 {
        all.push(IdRange { inside: own + 1, outside: below + 1, count: others - below });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(inside: u32, outside: u32, count: u32) -> IdRange {
        IdRange { inside, outside, count }
    }

    #[test]
    fn whose_what_is_made_must_be() {
        let auto = (vec![range(0, 1024, 1024)], vec![range(0, 2048, 1024)]);
        assert_eq!(other_root(&auto), Some((1024, 2048)));
        let outer = [range(0, 1000, 1), range(1, 100_000, 65_536)];
        assert_eq!(other_root(&(keep_id(1000, &outer), keep_id(1000, &outer))), None);
        assert_eq!(other_root(&(Vec::new(), Vec::new())), None);
    }

    #[test]
    fn the_user_keeps_its_id() {
        let outer = [range(0, 1000, 1), range(1, 100_000, 65_536)];
        let want = [range(0, 1, 1000), range(1000, 0, 1), range(1001, 1001, 64_536)];
        assert_eq!(keep_id(1000, &outer), want);
        assert_eq!(keep_id(0, &outer), [range(0, 0, 1), range(1, 1, 65_536)]);
        assert_eq!(keep_id(70_000, &outer), [range(0, 1, 65_536), range(70_000, 0, 1)]);
        assert_eq!(keep_id(1000, &outer[..1]), [range(1000, 0, 1)], "one id");
        // Nobody is two, inside or outside.
        for own in [0, 1, 1000, 65_535, 65_536, 65_537] {
            let all = keep_id(own, &outer);
            assert_eq!(all.iter().map(|r| r.count).sum::<u32>(), 65_537, "{own}");
            for first in [|r: &IdRange| r.inside, |r: &IdRange| r.outside] {
                let mut sorted = all.clone();
                sorted.sort_by_key(first);
                assert!(sorted.windows(2).all(|p| first(&p[0]) + p[0].count <= first(&p[1])), "{own}: {all:?}");
            }
        }
    }
}
