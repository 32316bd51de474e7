//! Between the tree's values and fuser's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyEntry, ReplyXattr, TimeOrNow};

use crate::tree::{Attr, Caching, Entry, Handle, Opened, SetTime, Timespec};

/// fuser takes a SystemTime and encodes it right, before 1970 too.
pub(super) fn time_out(time: Timespec) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(time.nanos));
    let whole = if time.secs >= 0 {
        UNIX_EPOCH.checked_add(Duration::from_secs(time.secs.unsigned_abs()))
    } else {
        UNIX_EPOCH.checked_sub(Duration::from_secs(time.secs.unsigned_abs()))
    };
    whole.and_then(|t| t.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// fuser 0.18 makes of (-2 s, 800 ms) the time 2.8 s before 1970 instead of 1.2 s (src/time.rs, `system_time_from_time`):
/// the two numbers the kernel sent are read back from that.
pub(super) fn time_in(time: SystemTime) -> Timespec {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timespec { secs: after.as_secs() as i64, nanos: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            Timespec { secs: 0_i64.wrapping_sub_unsigned(before.as_secs()), nanos: before.subsec_nanos() }
        }
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::SpecificTime(time) => SetTime::At(time_in(time)),
        TimeOrNow::Now => SetTime::Now,
    }
}

pub(super) fn kind_out(mode: u32) -> FileType {
    match mode & 0o170_000 {
        0o040_000 => FileType::Directory,
        0o120_000 => FileType::Symlink,
        0o060_000 => FileType::BlockDevice,
        0o020_000 => FileType::CharDevice,
        0o010_000 => FileType::NamedPipe,
        0o140_000 => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

pub(super) fn attr_out(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.node),
        size: attr.size,
        blocks: attr.blocks,
        atime: time_out(attr.atime),
        mtime: time_out(attr.mtime),
        ctime: time_out(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: kind_out(attr.mode),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: attr.blksize,
        flags: 0,
    }
}

pub(super) fn give_entry(reply: ReplyEntry, entry: &Entry) {
    reply.entry_with_ttls(&entry.attr_ttl, &entry.entry_ttl, &attr_out(&entry.attr), Generation(entry.generation));
}

pub(super) fn file_flags(opened: Opened) -> FopenFlags {
    let caching = match opened.cache {
        Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE,
        Caching::Fresh => FopenFlags::empty(),
        Caching::Direct => FopenFlags::FOPEN_DIRECT_IO,
    };
    // With the write-back cache the kernel asks all the same (fuse_flush in fs/fuse/file.c).
    if opened.closes_silently { caching | FopenFlags::FOPEN_NOFLUSH } else { caching }
}

pub(super) fn directory_flags(cache: Caching) -> FopenFlags {
    match cache {
        // CACHE_DIR alone would drop the cache at each opendir.
        Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR,
        Caching::Fresh | Caching::Direct => FopenFlags::empty(),
    }
}

/// An attribute that is not there, as an entry says it: node 0 and how long that holds.
pub(super) const ABSENT: Attr = Attr {
    node: 0,
    mode: 0o100_000,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    size: 0,
    blocks: 0,
    blksize: 0,
    atime: Timespec { secs: 0, nanos: 0 },
    mtime: Timespec { secs: 0, nanos: 0 },
    ctime: Timespec { secs: 0, nanos: 0 },
};

/// Answer a getxattr or listxattr: the size where that is asked, the bytes where they fit, else ERANGE.
pub(super) fn give_xattr(reply: ReplyXattr, size: u32, bytes: &[u8]) {
    if size == 0 {
        reply.size(bytes.len() as u32);
    } else if bytes.len() <= size as usize {
        reply.data(bytes);
    } else {
        reply.error(fuser::Errno::ERANGE);
    }
}

/// What listxattr(2) tells a caller: `trusted.` names only where it may read them (xattr(7)). We could read all of them for it.
pub(super) fn listed(names: &[u8], may_read_trusted: impl Fn() -> bool) -> std::borrow::Cow<'_, [u8]> {
    let is_trusted = |name: &&[u8]| name.starts_with(b"trusted.");
    let all = || names.split_inclusive(|byte| *byte == 0);
    if !all().any(|name| is_trusted(&name)) || may_read_trusted() {
        return names.into();
    }
    all().filter(|name| !is_trusted(name)).flatten().copied().collect::<Vec<u8>>().into()
}

/// Has a process CAP_SYS_ADMIN (proc_pid_status(5))? One that cannot be seen has not.
pub(super) fn is_admin(pid: u32) -> bool {
    const SYS_ADMIN: u32 = 21;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).is_some_and(|caps| caps >> SYS_ADMIN & 1 == 1)
}

pub(super) fn handle(handle: Option<FileHandle>) -> Option<Handle> {
    handle.map(|h| h.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trusted_names_are_listed_to_who_may_read_them() {
        let names = b"user.a\0trusted.overlay.opaque\0security.capability\0trusted.x\0";
        assert_eq!(&*listed(names, || true), names);
        assert_eq!(&*listed(names, || false), b"user.a\0security.capability\0");
        assert_eq!(&*listed(b"user.a\0", || unreachable!("nothing trusted is in it")), b"user.a\0");
        assert_eq!(
            is_admin(std::process::id()),
            rustix::thread::capabilities(None).unwrap().effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN)
        );
        assert!(!is_admin(0));
    }

    #[test]
    fn times_survive_both_ways() {
        // What fuser 0.18 makes of the two numbers of the kernel.
        let fuser_in = |secs: i64, nanos: u32| {
            if secs >= 0 {
                UNIX_EPOCH + Duration::new(secs as u64, nanos)
            } else {
                UNIX_EPOCH - Duration::new(secs.unsigned_abs(), nanos)
            }
        };
        for (secs, nanos) in [(0, 0), (1, 5), (-1, 0), (-2, 800_000_000), (-1, 999_999_999), (-5_000_000_000, 1)] {
            assert_eq!(time_in(fuser_in(secs, nanos)), Timespec { secs, nanos });
        }
        assert_eq!(time_out(Timespec { secs: -2, nanos: 800_000_000 }), UNIX_EPOCH - Duration::from_millis(1200));
        assert_eq!(
            time_out(Timespec { secs: i64::MIN, nanos: 0 }),
            UNIX_EPOCH.checked_sub(Duration::from_secs(1 << 63)).unwrap()
        );
    }
}
