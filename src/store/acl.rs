//! POSIX ACLs of files that become an image. Images have none (`pax::is_xattr_taken`): mode bits stand for them.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Stat, fgetxattr, getxattr};
use rustix::io::Errno;

use crate::index::MAX_XATTR_BYTES;
use crate::sys::fs::proc_path;

/// Who may do what with the file.
const ACCESS: &CStr = c"system.posix_acl_access";
/// What new files of a directory get.
const DEFAULT: &CStr = c"system.posix_acl_default";

/// The form of the attribute, and tags of its entries: linux/posix_acl_xattr.h, linux/posix_acl.h.
const VERSION: u32 = 2;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;

/// Make the mode of `file` one without ACL: nobody may do more. The file may be open as a place only (O_PATH). `true`: there is something to leave out.
pub(super) fn leave_out(file: &OwnedFd, stat: &mut Stat) -> rustix::io::Result<bool> {
    let access = read(file, ACCESS)?;
    if let Some(acl) = &access {
        stat.st_mode = mode_without(acl, stat.st_mode);
    }
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    Ok(access.is_some() || is_directory && read(file, DEFAULT)?.is_some())
}

fn read(file: &OwnedFd, which: &CStr) -> rustix::io::Result<Option<Vec<u8>>> {
    let mut acl = Vec::with_capacity(MAX_XATTR_BYTES);
    let got = match fgetxattr(file, which, rustix::buffer::spare_capacity(&mut acl)) {
        Err(Errno::BADF) => getxattr(proc_path(file), which, rustix::buffer::spare_capacity(&mut acl)),
        other => other,
    };
    match got {
        Ok(_) => Ok(Some(acl)),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The mode of a file that loses this ACL: nobody may do more than before. The group's bits are the ACL's mask until then, so they alone would give
/// the group what was meant for somebody else; and a user or group that the ACL names, to keep it out, falls back to the bits of group and others.
fn mode_without(acl: &[u8], mode: u32) -> u32 {
    let closed = mode & !0o077;
    let Some((version, entries)) = acl.split_first_chunk() else { return closed };
    if u32::from_le_bytes(*version) != VERSION {
        return closed;
    }
    let mask = mode >> 3 & 0o7;
    let (mut group, mut others) = (mask, mode & 0o7);
    for entry in entries.chunks_exact(8) {
        let permissions = u32::from(u16::from_le_bytes([entry[2], entry[3]]));
        match u16::from_le_bytes([entry[0], entry[1]]) {
            GROUP_OBJ => group &= permissions,
            // Perhaps one of the file's group.
            USER => {
                group &= permissions;
                others &= permissions & mask;
            }
            // One of both groups may what either may.
            GROUP => others &= permissions & mask,
            _ => {}
        }
    }
    closed | group << 3 | others
}

/// Those that were left out.
#[derive(Debug, Default)]
pub(super) struct LeftOut {
    first: Option<Vec<u8>>,
    more: u64,
}

impl LeftOut {
    /// That of the file with this path.
    pub(super) fn add(&mut self, path: &[u8]) {
        match &self.first {
            None => self.first = Some(path.to_vec()),
            Some(_) => self.more += 1,
        }
    }

    /// Say so, once; `shown` names a path for people.
    pub(super) fn warn(&self, shown: impl Fn(&[u8]) -> String) {
        let Some(first) = &self.first else { return };
        let more = if self.more > 0 { format!(", and those of {} more", self.more) } else { String::new() };
        log::warn!(
            "{}: its ACL is left out{more}: images have no ACLs. Mode bits give nobody more than the ACLs did",
            shown(first)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16)]) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for (tag, permissions) in entries {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&permissions.to_le_bytes());
            bytes.extend_from_slice(&[0xff; 4]);
        }
        bytes
    }

    #[test]
    fn nobody_may_do_more_without_it() {
        const OWNER: (u16, u16) = (0x01, 6);
        let mask = |permissions| (0x10, permissions);
        let others = |permissions| (0x20, permissions);
        for (entries, mode, want) in [
            // setfacl -m u:2:rw of a file of 0600.
            (vec![OWNER, (USER, 6), (GROUP_OBJ, 0), mask(6), others(0)], 0o660, 0o600),
            // Of 0644: nothing is lost.
            (vec![OWNER, (USER, 6), (GROUP_OBJ, 4), mask(6), others(4)], 0o664, 0o644),
            (vec![OWNER, (GROUP, 6), (GROUP_OBJ, 4), mask(6), others(0)], 0o2660, 0o2640),
            // The mask bounds the group.
            (vec![OWNER, (GROUP_OBJ, 7), mask(4), others(0)], 0o4640, 0o4640),
            // One is kept out who would be of the group or of the others.
            (vec![OWNER, (USER, 0), (GROUP_OBJ, 4), mask(4), others(4)], 0o644, 0o600),
            (vec![OWNER, (GROUP, 0), (GROUP_OBJ, 5), mask(5), others(5)], 0o755, 0o750),
        ] {
            assert_eq!(mode_without(&acl(&entries), mode), want, "{entries:?}");
        }
        assert_eq!(mode_without(b"\x01\0\0\0", 0o1777), 0o1700, "of a form that is not known");
        assert_eq!(mode_without(b"", 0o664), 0o600);
    }
}
