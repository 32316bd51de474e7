//! Owners as the image has them, of files that lie on the disk with those of a user namespace.

use crate::index::Xattr;
use crate::plan::{IdRange, OVERFLOW_ID, Ownership};

/// The image's id of one on the disk: what [`Ownership::map`] does, turned back.
pub(super) fn of_image(ranges: &[IdRange], id: u32) -> u32 {
    if ranges.is_empty() {
        return id;
    }
    ranges
        .iter()
        .find_map(|r| id.checked_sub(r.outside).filter(|d| *d < r.count).and_then(|d| r.inside.checked_add(d)))
        .unwrap_or(OVERFLOW_ID)
}

/// `vfs_ns_cap_data` of linux/capability.h: revision 3 is revision 2 and the user who is root of the namespace that set it.
const REVISION: usize = 3;
const LENGTH: usize = 24;

/// File capabilities that root of the container's namespace set, as root of the image's has them.
pub(super) fn capability_of_image(owners: &Ownership, mut xattr: Xattr) -> Xattr {
    let value = &xattr.value;
    if xattr.name == b"security.capability" && value.len() == LENGTH && value[3] == 3 {
        let root = u32::from_le_bytes([value[20], value[21], value[22], value[23]]);
        if !owners.uids.is_empty() && of_image(&owners.uids, root) == 0 {
            xattr.value.truncate(LENGTH - 4);
            xattr.value[REVISION] = 2;
        }
    }
    xattr
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped() -> Ownership {
        let ids = vec![
            IdRange { inside: 0, outside: 1000, count: 1 },
            IdRange { inside: 1, outside: 100_000, count: 65_535 },
        ];
        Ownership { uids: ids.clone(), gids: ids, squash: None }
    }

    #[test]
    fn ids_are_turned_back() {
        let owners = mapped();
        for id in [0, 1, 33, 65_534] {
            assert_eq!(of_image(&owners.uids, Ownership::map(&owners.uids, id)), id);
        }
        assert_eq!(of_image(&owners.uids, 5), OVERFLOW_ID);
        assert_eq!(of_image(&[], 5), 5);
    }

    #[test]
    fn capabilities_of_the_namespaces_root_become_the_images() {
        let with = |root: u32| {
            let mut value = vec![1, 0, 0, 3];
            value.extend_from_slice(&[7; 16]);
            value.extend_from_slice(&root.to_le_bytes());
            Xattr { name: b"security.capability".to_vec(), value }
        };
        let ours = capability_of_image(&mapped(), with(1000));
        assert_eq!((ours.value.len(), ours.value[3], ours.value[4]), (20, 2, 7));
        assert_eq!(capability_of_image(&mapped(), with(77)), with(77));
        assert_eq!(capability_of_image(&Ownership::default(), with(0)), with(0));
    }
}
