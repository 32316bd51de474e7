//! Owner, mode, times and extended attributes of one file, taken from another: as far as this process may. By descriptor: a name may
//! be another file's by then.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

/// Largest value and longest list of names: XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
const MAX_XATTR_BYTES: usize = 64 << 10;

/// Attributes that say something to overlayfs about the place where they are; elsewhere they would be read as orders.
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// The path through which an open file is reached, whatever it was opened for and wherever its name leads by now. A symlink that was
/// opened itself is meant itself.
fn path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Did everything go over?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fidelity {
    /// Yes.
    Whole,
    /// This process may not set the owner, or an attribute, or the file system does not keep it.
    Partial,
}

impl Fidelity {
    fn and(self, other: Fidelity) -> Fidelity {
        if self == Fidelity::Whole { other } else { Fidelity::Partial }
    }
}

/// What becomes of what makes a program run with other rights than its caller's: setuid and setgid bits, file capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetId {
    /// It goes over.
    Kept,
    /// It does not.
    Dropped,
}

/// The attribute that holds a file's capabilities.
pub const CAPABILITY: &[u8] = b"security.capability";

/// Give `to` the owner, extended attributes, mode and times of `from`, whose stat is `stat`. O_PATH descriptors will do for both.
pub fn copy(from: impl AsFd, stat: &Stat, to: impl AsFd, set_id: SetId) -> rustix::io::Result<Fidelity> {
    let (from, to) = (from.as_fd(), to.as_fd());
    // Owner first: changing it clears setuid bits and file capabilities.
    let owner = copy_owner(stat, to)?;
    let xattrs = copy_xattrs(from, to, set_id)?;
    set_mode_and_times(stat, to, owner, set_id)?;
    Ok(owner.and(xattrs))
}

/// Give `to` the owner, mode and times in `stat`, and these extended attributes.
pub fn set(xattrs: &[(CString, &[u8])], stat: &Stat, to: impl AsFd, set_id: SetId) -> rustix::io::Result<Fidelity> {
    let to = to.as_fd();
    let mut fidelity = copy_owner(stat, to)?;
    let owner = fidelity;
    if !xattrs.is_empty() {
        let path = path(to);
        for (name, value) in xattrs.iter().filter(|(name, _)| goes_over(name, set_id)) {
            fidelity = fidelity.and(set_xattr(&path, name, value)?);
        }
    }
    set_mode_and_times(stat, to, owner, set_id)?;
    Ok(fidelity)
}

/// The same, when there are no attributes to set and the mode is already right.
pub fn set_owner_and_times(stat: &Stat, to: impl AsFd) -> rustix::io::Result<Fidelity> {
    let owner = copy_owner(stat, to.as_fd())?;
    copy_times(stat, to.as_fd())?;
    Ok(owner)
}

/// Overlayfs's own attributes never do.
fn goes_over(name: &CStr, set_id: SetId) -> bool {
    let name = name.to_bytes();
    !OVERLAY.iter().any(|prefix| name.starts_with(prefix)) && (set_id == SetId::Kept || name != CAPABILITY)
}

fn set_mode_and_times(stat: &Stat, to: BorrowedFd<'_>, owner: Fidelity, set_id: SetId) -> rustix::io::Result<()> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    // A program must not run as somebody else than the image says: no setuid without the owner, as cp(1) does it.
    let drops = set_id == SetId::Dropped || (kind.is_file() && owner == Fidelity::Partial);
    let allowed = if drops { 0o1777 } else { 0o7777 };
    // Linux keeps no mode of a symlink.
    if !kind.is_symlink() {
        fs::chmod(path(to), Mode::from_raw_mode(stat.st_mode & allowed))?;
    }
    copy_times(stat, to)
}

fn set_xattr(to: &str, name: &CStr, value: &[u8]) -> rustix::io::Result<Fidelity> {
    match fs::setxattr(to, name, value, XattrFlags::empty()) {
        Ok(()) => Ok(Fidelity::Whole),
        Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL) => Ok(Fidelity::Partial),
        Err(e) => Err(e),
    }
}

fn copy_owner(stat: &Stat, to: BorrowedFd<'_>) -> rustix::io::Result<Fidelity> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    match fs::chownat(to, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH) {
        Ok(()) => Ok(Fidelity::Whole),
        // Not ours to give away, or an id that this user namespace does not know.
        Err(Errno::PERM | Errno::INVAL) => Ok(Fidelity::Partial),
        Err(e) => Err(e),
    }
}

/// `stat` with what an image says of a file in place of what the disk does.
pub fn described(mut stat: Stat, (mode, uid, gid): (u32, u32, u32), mtime: Timespec, atime: Timespec) -> Stat {
    (stat.st_mode, stat.st_uid, stat.st_gid) = (mode, uid, gid);
    (stat.st_mtime, stat.st_mtime_nsec) = (mtime.tv_sec as _, mtime.tv_nsec as _);
    (stat.st_atime, stat.st_atime_nsec) = (atime.tv_sec as _, atime.tv_nsec as _);
    stat
}

/// Set the times; after everything else that is done to the file.
fn copy_times(stat: &Stat, to: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime as _, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime as _, tv_nsec: stat.st_mtime_nsec as _ },
    };
    fs::utimensat(fs::CWD, path(to), &times, AtFlags::empty())
}

/// Copy the extended attributes that can be read and set.
fn copy_xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>, set_id: SetId) -> rustix::io::Result<Fidelity> {
    let (from, to) = (path(from), path(to));
    let mut names = vec![0_u8; 0];
    let length = loop {
        match fs::listxattr(&from, &mut names[..]) {
            Ok(_) if names.is_empty() => match fs::listxattr_query(&from)? {
                0 => return Ok(Fidelity::Whole),
                _ => names.resize(MAX_XATTR_BYTES, 0),
            },
            Ok(length) => break length,
            Err(Errno::OPNOTSUPP) => return Ok(Fidelity::Whole),
            Err(e) => return Err(e),
        }
    };
    let mut value = vec![0_u8; MAX_XATTR_BYTES];
    let mut fidelity = Fidelity::Whole;
    for name in names[..length].split_inclusive(|&b| b == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        if !goes_over(name, set_id) {
            continue;
        }
        let copied = fs::getxattr(&from, name, &mut value[..])
            .and_then(|length| fs::setxattr(&to, name, &value[..length], XattrFlags::empty()));
        match copied {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL) => fidelity = Fidelity::Partial,
            Err(e) => return Err(e),
        }
    }
    Ok(fidelity)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn mode_times_and_attributes_go_over_and_overlay_marks_do_not() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        for name in ["a", "b"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        symlink("a", dir.path().join("la")).unwrap();
        symlink("a", dir.path().join("lb")).unwrap();
        let a = dir.path().join("a");
        std::fs::set_permissions(&a, std::fs::Permissions::from_mode(0o4751)).unwrap();
        let has_xattrs = fs::setxattr(&a, "user.x", b"value", XattrFlags::empty()).is_ok();
        let _ = fs::setxattr(&a, "user.overlay.opaque", b"y", XattrFlags::empty());
        let open = |name: &str| {
            let flags = fs::OFlags::PATH | fs::OFlags::NOFOLLOW;
            fs::open(dir.path().join(name), flags, Mode::empty()).unwrap()
        };
        for (from, to) in [("a", "b"), ("la", "lb")] {
            fs::utimensat(
                fs::CWD,
                dir.path().join(from),
                &Timestamps {
                    last_access: Timespec { tv_sec: -5, tv_nsec: 7 },
                    last_modification: Timespec { tv_sec: 1_000_000, tv_nsec: 123_456_789 },
                },
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .unwrap();
            let from = open(from);
            copy(&from, &fs::fstat(&from).unwrap(), open(to), SetId::Kept).unwrap();
            let got = std::fs::symlink_metadata(dir.path().join(to)).unwrap();
            assert_eq!((got.mtime(), got.mtime_nsec(), got.atime()), (1_000_000, 123_456_789, -5), "{to}");
        }
        let b = dir.path().join("b");
        assert_eq!(std::fs::metadata(&b).unwrap().permissions().mode() & 0o7777, 0o4751);
        if has_xattrs {
            let mut value = [0_u8; 16];
            assert_eq!(fs::getxattr(&b, "user.x", &mut value[..]), Ok(5));
            assert_eq!(fs::getxattr(&b, "user.overlay.opaque", &mut value[..]), Err(Errno::NODATA));
        }
        let from = open("a");
        copy(&from, &fs::fstat(&from).unwrap(), open("b"), SetId::Dropped).unwrap();
        assert_eq!(std::fs::metadata(&b).unwrap().permissions().mode() & 0o7777, 0o751);
        assert_eq!(std::fs::read(&a).unwrap(), b"a");
    }
}
