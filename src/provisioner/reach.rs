//! Do other users of the host reach a rootfs? Then a setuid program of its image is one of the host's.

use rustix::fs::{self, Mode, OFlags};

use crate::error::{Error, Result, show};
use crate::host::Host;
use crate::place::Place;
use crate::plan::{BackendKind, Restraint};
use crate::sys::process;

/// Most directories between a mount point and `/`: PATH_MAX holds no more.
const MAX_DEPTH: usize = 2048;

/// What is held back in a rootfs whose mount point lies in `parent`, after what the user `asked`.
pub(super) fn restrain(host: &Host, backend: BackendKind, parent: &Place, asked: Restraint) -> Result<Restraint> {
    // What an ordinary user mounts is nosuid and nodev no matter who reaches it, and what is mounted in a user namespace lets setuid work for those in
    // there alone (mnt_may_suid in fs/namespace.c); a copy lies there as files.
    let matters = backend == BackendKind::Copy || (host.mount.is_yes() && host.initial_user_namespace);
    if !matters || process::is_among_itself() || !is_open_to_others(parent)? {
        return Ok(asked);
    }
    Ok(asked.for_others())
}

/// May users other than root and this one search all directories from `/` down to `dir`? By descriptor, upwards.
fn is_open_to_others(dir: &Place) -> Result<bool> {
    let fail = |e| Error::sys("look who reaches", show(dir.path()), e);
    let me = rustix::process::geteuid().as_raw();
    let mut at = rustix::io::fcntl_dupfd_cloexec(dir, 0).map_err(fail)?;
    for _ in 0..MAX_DEPTH {
        let stat = fs::fstat(&at).map_err(fail)?;
        if is_closed(stat.st_mode, stat.st_uid, me) {
            return Ok(false);
        }
        let up = fs::openat(&at, "..", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        // One that we may not search: somebody else may.
        let Ok(up) = up else { return Ok(true) };
        let above = fs::fstat(&up).map_err(fail)?;
        if (above.st_dev, above.st_ino) == (stat.st_dev, stat.st_ino) {
            return Ok(true);
        }
        at = up;
    }
    Ok(true)
}

/// Does a directory let nobody through but root and `me`? Another owner can change its mode. Where it has an ACL, the group's bits are
/// its mask (acl(5)).
fn is_closed(mode: u32, owner: u32, me: u32) -> bool {
    mode & 0o011 == 0 && (owner == 0 || owner == me)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_directory_is_closed_by_mode_and_owner() {
        for (mode, owner, me, closed) in [
            (0o40700, 0, 0, true),
            (0o40700, 1000, 1000, true),
            (0o40766, 1000, 1000, true),
            (0o40700, 1000, 0, false),
            (0o40710, 0, 0, false),
            (0o40701, 0, 0, false),
            (0o41777, 0, 0, false),
        ] {
            assert_eq!(is_closed(mode, owner, me), closed, "{mode:o} of {owner} for {me}");
        }
    }

    #[test]
    fn one_closed_directory_above_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let open = |mode: u32| {
            std::fs::set_permissions(dir.path().join("a"), std::fs::Permissions::from_mode(mode)).unwrap();
            let inner = Place::open(&std::fs::canonicalize(dir.path().join("a/b")).unwrap()).unwrap();
            is_open_to_others(&inner).unwrap()
        };
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(open(0o755));
        assert!(!open(0o700));
        assert!(open(0o711));
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!open(0o755));
    }
}
