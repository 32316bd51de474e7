//! What a file is: identity and attributes in one statx.

use std::os::fd::AsFd;

use rustix::fs::{self, AtFlags, Statx, StatxFlags};

use crate::plan::Ownership;
use crate::tree::{Attr, Errno, Node, Result, Timespec};

pub(super) use crate::tree::{DIRECTORY, REGULAR, TYPE_BITS};

/// The type bits of a symbolic link (S_IFLNK).
pub(super) const SYMLINK: u32 = 0o120_000;

/// What tells a file from every other: the device and inode number, and when the inode was made, since numbers are reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) dev: u64,
    pub(super) ino: u64,
    /// The birth time folded to 32 bits (the kernel keeps so many of a generation); 0 where the file system has none.
    pub(super) generation: u32,
}

/// A name of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Alias {
    pub(super) parent: Node,
    pub(super) name: Box<[u8]>,
}

/// A file found: its identity, the mount it lies on, its attributes with the disk's owner and no node yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) identity: Identity,
    pub(super) mount: u64,
    pub(super) attr: Attr,
}

impl Found {
    pub(super) fn kind(&self) -> u32 {
        self.attr.mode & TYPE_BITS
    }

    /// The attributes as they are shown.
    pub(super) fn shown(&self, node: Node, ownership: &Ownership) -> Attr {
        let mut attr = self.attr;
        attr.node = node;
        if let Some((uid, gid)) = ownership.squash {
            (attr.uid, attr.gid) = (uid, gid);
        } else if !ownership.is_identity() {
            attr.uid = Ownership::map(&ownership.uids, attr.uid);
            attr.gid = Ownership::map(&ownership.gids, attr.gid);
        }
        attr
    }
}

/// What `name` in `dir` is; a symlink is not followed.
pub(super) fn stat_name(dir: impl AsFd, name: &[u8]) -> Result<Found> {
    stat(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
}

/// Has close(2) nothing to tell on the file system of this descriptor? These have no `flush` among their file operations
/// (fs/ext4/file.c, fs/xfs/xfs_file.c, fs/btrfs/file.c, mm/shmem.c); NFS, FUSE, overlayfs and others report delayed errors there.
pub(super) fn closes_silently(fd: impl AsFd) -> bool {
    const SILENT: [u64; 4] = [
        libc::EXT4_SUPER_MAGIC as u64,
        libc::XFS_SUPER_MAGIC as u64,
        libc::BTRFS_SUPER_MAGIC as u64,
        libc::TMPFS_MAGIC as u64,
    ];
    fs::fstatfs(fd).is_ok_and(|s| SILENT.contains(&(s.f_type as u64)))
}

/// What an open file is.
pub(super) fn stat_fd(fd: impl AsFd) -> Result<Found> {
    stat(fd, b"", AtFlags::EMPTY_PATH)
}

fn stat(dir: impl AsFd, name: &[u8], flags: AtFlags) -> Result<Found> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    match fs::statx(&dir, name, flags, wanted) {
        Ok(stat) => Ok(of_statx(&stat)),
        // Filtered by a seccomp profile older than the call: identity loses the birth time, nothing else.
        Err(Errno::NOSYS) => Ok(of_stat(&fs::statat(&dir, name, flags)?)),
        Err(e) => Err(e),
    }
}

fn of_statx(stat: &Statx) -> Found {
    let time = |t: fs::StatxTimestamp| Timespec { secs: t.tv_sec, nanos: t.tv_nsec };
    let generation = if stat.stx_mask & StatxFlags::BTIME.bits() == 0 {
        0
    } else {
        fold(stat.stx_btime.tv_sec as u64 ^ u64::from(stat.stx_btime.tv_nsec).rotate_left(32))
    };
    Found {
        identity: Identity {
            dev: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
            ino: stat.stx_ino,
            generation,
        },
        mount: if stat.stx_mask & StatxFlags::MNT_ID.bits() == 0 { 0 } else { stat.stx_mnt_id },
        attr: Attr {
            node: 0,
            mode: u32::from(stat.stx_mode),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            blksize: stat.stx_blksize,
            atime: time(stat.stx_atime),
            mtime: time(stat.stx_mtime),
            ctime: time(stat.stx_ctime),
        },
    }
}

fn of_stat(stat: &fs::Stat) -> Found {
    Found {
        identity: Identity {
            dev: u64::from(fs::major(stat.st_dev)) << 32 | u64::from(fs::minor(stat.st_dev)),
            ino: stat.st_ino,
            generation: 0,
        },
        mount: 0,
        attr: Attr {
            node: 0,
            mode: stat.st_mode,
            nlink: stat.st_nlink as u32,
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: encode_device(fs::major(stat.st_rdev), fs::minor(stat.st_rdev)),
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            blksize: stat.st_blksize as u32,
            atime: Timespec { secs: stat.st_atime, nanos: stat.st_atime_nsec as u32 },
            mtime: Timespec { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
            ctime: Timespec { secs: stat.st_ctime, nanos: stat.st_ctime_nsec as u32 },
        },
    }
}

/// The kernel's 32-bit encoding of a device number (new_encode_dev in include/linux/kdev_t.h).
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Major and minor of that encoding.
pub(super) fn decode_device(rdev: u32) -> (u32, u32) {
    ((rdev & 0x000f_ff00) >> 8, (rdev & 0xff) | ((rdev >> 12) & 0x000f_ff00))
}

/// 64 bits to 32, never 0.
fn fold(value: u64) -> u32 {
    let mixed = mix(value);
    ((mixed >> 32) as u32 ^ mixed as u32).max(1)
}

/// The finalizer of splitmix64: every input bit changes every output bit.
pub(super) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_both_ways() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (0xfff, 0xf_ffff), (259, 70_000)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
        assert_eq!(encode_device(1, 3), 0x103);
    }

    #[test]
    fn statx_and_stat_tell_the_same() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let by_statx = stat_fd(file.as_file()).unwrap();
        let by_stat = of_stat(&fs::fstat(file.as_file()).unwrap());
        assert_eq!(by_statx.attr, by_stat.attr);
        assert_eq!((by_statx.identity.dev, by_statx.identity.ino), (by_stat.identity.dev, by_stat.identity.ino));
    }
}
