//! Attributes, extended attributes, link targets, file system figures.
//!
//! Everything is done on a descriptor of the node. Calls that refuse O_PATH descriptors get its name in /proc/self/fd.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{self, AtFlags, Gid, Mode, OFlags, Timestamps, Uid, XattrFlags};

use super::fds::fd_name;
use super::files::ANY_EXECUTE;
use super::found::{REGULAR, SYMLINK};
use super::handover::Intent;
use super::names::{PERMISSION_BITS, SET_GID};
use super::{Attr, Caller, Change, DirTree, Errno, Handle, Node, Result, SetTime, Statfs};
use crate::plan::IdRange;
use crate::sys::fs::proc_path;
use crate::tree::access_read_only;
use crate::volume::Access;
use std::time::Duration;

/// Longest value and longest name list the kernel takes: XATTR_SIZE_MAX and XATTR_LIST_MAX (limits.h).
const MAX_XATTR: usize = 65_536;
/// What most values fit in, so that one call answers.
const USUAL_XATTR: usize = 512;

/// The id on disk of a presented one. None: no id on disk is presented so.
pub(in crate::tree) fn unmap(ranges: &[IdRange], id: u32) -> Option<u32> {
    if ranges.is_empty() {
        return Some(id);
    }
    ranges.iter().find_map(|r| id.checked_sub(r.outside).filter(|d| *d < r.count).and_then(|d| r.inside.checked_add(d)))
}

impl DirTree {
    /// As the server's own user: where this is asked, that user is the only one who may enter the mount.
    pub(super) fn check_access(&self, node: Node, mask: i32) -> Result<()> {
        let (fd, found) = self.fd(node)?;
        if self.options.access == Access::Ro || found.kind() == SYMLINK {
            return access_read_only(found.attr.mode, mask);
        }
        // The kernel lets a file be run that has an x bit for anybody. The file system below is not asked: we have it `noexec`.
        if mask & libc::X_OK != 0 && found.kind() == REGULAR && found.attr.mode & ANY_EXECUTE == 0 {
            return Err(Errno::ACCESS);
        }
        let mut asked = fs::Access::from_bits_truncate(mask as u32);
        asked.set(fs::Access::EXEC_OK, mask & libc::X_OK != 0 && found.kind() != REGULAR);
        fs::accessat(self.pool.proc_fd(), fd_name(&fd).as_str(), asked, AtFlags::empty())
    }

    pub(super) fn change(
        &self,
        caller: &Caller,
        node: Node,
        handle: Option<Handle>,
        change: &Change,
    ) -> Result<(Attr, Duration)> {
        let act_as = self.options.act_as;
        if change.mode.is_some_and(|mode| mode & ANY_EXECUTE != 0) {
            self.may_be_run(node);
        }
        let open = handle.and_then(|h| self.handle(h));
        let (fd, kind) = self.fd_and_kind(node)?;
        if change.uid.is_some() || change.gid.is_some() {
            let (uid, gid) = self.owner_on_disk(change.uid, change.gid)?;
            if uid.is_some() || gid.is_some() {
                act_as.run(caller, || {
                    fs::chownat(&fd, "", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)
                })?;
            }
        }
        if let Some(mode) = change.mode {
            if kind == SYMLINK {
                return Err(Errno::OPNOTSUPP);
            }
            let bits = Mode::from_raw_mode(mode & PERMISSION_BITS);
            let name = fd_name(&fd);
            let set = || fs::chmodat(self.pool.proc_fd(), name.as_str(), bits, AtFlags::empty());
            if mode & SET_GID == 0 {
                act_as.run(caller, set)?;
            } else {
                // It stays only if the caller is in the file's group (setattr_copy in fs/attr.c).
                act_as.run_with_groups(caller, set)?;
            }
        }
        if let Some(size) = change.size {
            if kind != REGULAR {
                return Err(Errno::INVAL);
            }
            self.nodes.swap_stamp(node, None);
            match &open {
                Some(open) if open.is_writable() => {
                    let file = open.io(&self.pool)?;
                    act_as.run(caller, || fs::ftruncate(file.fd(), size))?;
                }
                _ => {
                    let file = act_as.run(caller, || self.pool.reopen(&fd, OFlags::WRONLY | OFlags::NONBLOCK))?;
                    act_as.run(caller, || fs::ftruncate(&file, size))?;
                }
            }
        }
        let is_writing = open.is_some_and(|open| open.is_writable());
        self.set_times(caller, &fd, change, is_writing)?;
        let found = super::found::stat_fd(&fd)?;
        Ok((self.shown(&found, node), self.options.ttl))
    }

    fn owner_on_disk(&self, uid: Option<u32>, gid: Option<u32>) -> Result<(Option<u32>, Option<u32>)> {
        let ownership = &self.options.ownership;
        if let Some((squashed_uid, squashed_gid)) = ownership.squash {
            // Everything belongs to one owner: giving it to that one changes nothing, to another cannot be shown.
            let stays = uid.is_none_or(|u| u == squashed_uid) && gid.is_none_or(|g| g == squashed_gid);
            return if stays { Ok((None, None)) } else { Err(Errno::PERM) };
        }
        let map = |ranges: &[IdRange], id: Option<u32>| match id {
            None => Ok(None),
            // EINVAL is what chown(2) says of an id that the mount does not map.
            Some(id) => unmap(ranges, id).map(Some).ok_or(Errno::INVAL),
        };
        Ok((map(&ownership.uids, uid)?, map(&ownership.gids, gid)?))
    }

    fn set_times(&self, caller: &Caller, fd: &super::reach::Fd, change: &Change, is_writing: bool) -> Result<()> {
        // A truncation sets the modification time by itself.
        let mtime = change.mtime.filter(|t| change.size.is_none() || *t != SetTime::Now);
        if change.atime.is_none() && mtime.is_none() {
            return Ok(());
        }
        let time = |t: Option<SetTime>| match t {
            None => fs::Timespec { tv_sec: 0, tv_nsec: fs::UTIME_OMIT },
            Some(SetTime::Now) => fs::Timespec { tv_sec: 0, tv_nsec: fs::UTIME_NOW },
            Some(SetTime::At(t)) => fs::Timespec { tv_sec: t.secs, tv_nsec: i64::from(t.nanos) },
        };
        let times = Timestamps { last_access: time(change.atime), last_modification: time(mtime) };
        let set = || match fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH) {
            // Before Linux 5.8 the flag is unknown here.
            Err(Errno::INVAL) => fs::utimensat(self.pool.proc_fd(), fd_name(fd).as_str(), &times, AtFlags::empty()),
            other => other,
        };
        match self.options.act_as.run(caller, set) {
            // With the write-back cache the kernel keeps the time of a write, and brings it when the file is closed with the ids of
            // the process that closes it, which need not own it (fuse_flush_times in fs/fuse/dir.c). What a program itself sets the kernel
            // has checked (default_permissions).
            Err(Errno::PERM) if self.options.writeback && is_writing && change.atime.is_none() => set(),
            other => other,
        }
    }

    pub(super) fn read_link(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let (fd, found) = self.fd(node)?;
        if found.kind() != SYMLINK {
            return Err(Errno::INVAL);
        }
        let target = fs::readlinkat(&fd, "", Vec::with_capacity(256))?;
        out(target.as_bytes());
        Ok(())
    }

    pub(super) fn stat_file_system(&self, node: Node) -> Result<Statfs> {
        let stat = fs::fstatvfs(self.fd(node)?.0)?;
        Ok(Statfs {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: stat.f_bsize as u32,
            namelen: stat.f_namemax as u32,
            frsize: stat.f_frsize as u32,
        })
    }

    pub(super) fn get_xattr(&self, node: Node, name: &OsStr, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        // The kernel asks for security.capability before it writes to a file for the first time, and that one is open.
        let open = self.open_now(node).and_then(|open| open.not_parked());
        if let Some(open) = open {
            return read_sized(out, |buffer| fs::fgetxattr(open.fd(), name.as_bytes(), buffer));
        }
        let (fd, _) = self.fd(node)?;
        let path = proc_path(&fd);
        read_sized(out, |buffer| fs::getxattr(path.as_str(), name.as_bytes(), buffer))
    }

    pub(super) fn list_xattrs(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        let (fd, _) = self.fd(node)?;
        let path = proc_path(&fd);
        read_sized(out, |buffer| fs::listxattr(path.as_str(), buffer))
    }

    pub(super) fn set_xattr(&self, caller: &Caller, node: Node, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        let (fd, _) = self.fd(node)?;
        let path = proc_path(&fd);
        let flags = XattrFlags::from_bits_retain(flags as u32);
        // With groups: a POSIX ACL takes set-group-id away from one who is not in the group (posix_acl_update_mode).
        let set = |flags| {
            self.options.act_as.run_with_groups(caller, || fs::setxattr(path.as_str(), name.as_bytes(), value, flags))
        };
        let earlier = self.intend(Intent::default);
        match set(flags) {
            // Made by this request when it came first: setting it to its value is the rest of it.
            Err(Errno::EXIST) if earlier.is_some() => set(flags.difference(XattrFlags::CREATE)),
            other => other,
        }
    }

    pub(super) fn remove_xattr(&self, caller: &Caller, node: Node, name: &OsStr) -> Result<()> {
        let (fd, _) = self.fd(node)?;
        let path = proc_path(&fd);
        let earlier = self.intend(Intent::default);
        match self.options.act_as.run(caller, || fs::removexattr(path.as_str(), name.as_bytes())) {
            Err(Errno::NODATA) if earlier.is_some() => Ok(()),
            other => other,
        }
    }
}

/// Read something whose size is not known: into a small buffer, and if it is larger, into the largest.
fn read_sized(out: &mut dyn FnMut(&[u8]), read: impl Fn(&mut [u8]) -> Result<usize>) -> Result<()> {
    let mut small = [0_u8; USUAL_XATTR];
    match read(&mut small) {
        Ok(n) => {
            out(&small[..n]);
            Ok(())
        }
        Err(Errno::RANGE) => {
            let mut large = vec![0; MAX_XATTR];
            let n = read(&mut large)?;
            out(&large[..n]);
            Ok(())
        }
        Err(e) => Err(e),
    }
}
