//! Mounting FUSE ourselves, and taking only our own mounts away again.
//!
//! Never touches the file system that is mounted: the process that holds the connection must not wait for itself. What there is to know
//! about a mount comes from the mount table.

use std::ffi::CString;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags};
use serde::{Deserialize, Serialize};

use super::fusermount;
use crate::error::{Error, Kind, Result, show};
use crate::host::{Finding, Host};
use crate::place::Point;
use crate::sys::holders::{self, Hold};
use crate::sys::mount as sysmount;
use crate::sys::mount::{AttrSet, Unmount, move_mount_to};
use crate::sys::mountinfo::{self, Known, MountInfo};

const TARGET: &str = "fsprov::fuse";
const DEVICE: &str = "/dev/fuse";
const SUBTYPE: &str = "fsprov";
/// What the mount table shows as our mounts' type.
pub const FS_TYPE: &str = "fuse.fsprov";
/// Largest read the kernel sends: what its limit of 256 pages a request comes to (FUSE_MAX_MAX_PAGES, fs/fuse/fuse_i.h).
const MAX_READ: u32 = 1024 * 1024;

/// Who mounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// This process: it may mount.
    Kernel {
        /// In the machine's first user namespace, where setuid programs and devices of the image may work.
        initial_user_namespace: bool,
    },
    /// `fusermount3`, at this path.
    Helper(#[serde(with = "crate::pathtext")] PathBuf),
}

impl Method {
    /// What this host and user can use. The error says what is missing and what would help.
    pub fn choose(host: &Host) -> Result<Self> {
        const OP: &str = "mount FUSE";
        let refuse = |finding: &Finding| match finding {
            Finding::Yes => None,
            Finding::No { reason, remedy } => {
                Some(Error::new(Kind::Unsupported, OP, "", reason.clone()).hint(remedy.clone()))
            }
        };
        if let Some(error) = refuse(&host.fuse_device) {
            return Err(error);
        }
        if host.mount.is_yes() {
            return Ok(Method::Kernel { initial_user_namespace: host.initial_user_namespace });
        }
        match (&host.fusermount_path, refuse(&host.fusermount)) {
            (Some(path), None) => Ok(Method::Helper(path.clone())),
            (_, error) => Err(error.unwrap_or_else(|| {
                Error::new(Kind::Unsupported, OP, "", "fusermount3 is not installed")
                    .hint("as root: install the package fuse3")
            })),
        }
    }
}

/// May users other than the one who mounts enter? The kernel checks the files' permissions in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OtherUsers {
    /// Yes for root and inside a user namespace, where nobody outside is meant; else no.
    #[default]
    Usual,
    /// Yes. An ordinary user needs `user_allow_other` in /etc/fuse.conf.
    Allowed,
    /// No, not even root.
    Refused,
}

/// What to mount.
#[derive(Clone, Debug)]
pub struct MountOptions<'a> {
    /// Where.
    pub point: &'a Point,
    /// What the mount table shows as the source.
    pub source: &'a str,
    /// Is nothing in it writable? An `ro` superblock keeps reads from invalidating cached times.
    pub read_only: bool,
    /// Who may enter.
    pub others: OtherUsers,
    /// Do setuid programs do nothing? Always so, where this process is not in the first user namespace.
    pub nosuid: bool,
    /// Can devices not be opened? Likewise.
    pub nodev: bool,
}

/// A FUSE mount that was made and waits for a server to answer INIT.
#[derive(Debug)]
pub struct Mounted {
    /// The connection: an open /dev/fuse.
    pub connection: OwnedFd,
    /// The mount, as the table has it.
    pub info: MountInfo,
    /// Its id that is never used again, where the kernel tells one (Linux 6.8).
    pub unique: Option<u64>,
}

/// A FUSE mount that lies nowhere yet: its connection is good, and it is gone when this is dropped.
#[derive(Debug)]
pub struct Detached {
    /// The connection: an open /dev/fuse.
    pub connection: OwnedFd,
    /// Which one it is: the minor number of the file system.
    pub minor: u32,
    mount: OwnedFd,
}

/// Make a mount that [`mount`] attaches. `None`: this kernel, or this user, can only mount at once.
pub fn prepare(method: &Method, request: &MountOptions<'_>) -> Result<Option<Detached>> {
    let request = match method {
        Method::Kernel { initial_user_namespace: true } => request.clone(),
        Method::Kernel { .. } => MountOptions { nodev: true, ..request.clone() },
        Method::Helper(_) => return Ok(None),
    };
    let connection = open_device()?;
    match detached(&request, &connection) {
        Ok((mount, minor)) => Ok(Some(Detached { connection, minor, mount })),
        Err(Errno::NOSYS) => Ok(None),
        Err(e) => Err(explain(&request, e)),
    }
}

/// Mount, what was prepared if it could be. On an error nothing is mounted.
pub fn mount(method: &Method, request: &MountOptions<'_>, prepared: Option<Detached>) -> Result<Mounted> {
    let point = request.point;
    let connection = match (prepared, method) {
        (Some(Detached { connection, mount, .. }), _) => {
            move_mount_to(&mount, &point.place).map_err(|e| explain(request, e))?;
            connection
        }
        (None, Method::Kernel { initial_user_namespace: true }) => mount_classic(request)?,
        (None, Method::Kernel { .. }) => mount_classic(&MountOptions { nodev: true, ..request.clone() })?,
        // It follows the path, as the user who may only mount where that user may write: what it mounted on is compared.
        (None, Method::Helper(program)) => fusermount::mount(program, point.path(), &helper_options(request))?,
    };
    match find_mounted(request) {
        Ok((info, unique)) => {
            log::debug!(target: TARGET, "mounted {} as mount {}", show(point.path()), info.id);
            Ok(Mounted { connection, info, unique })
        }
        Err(error) => {
            // Wherever it lies: its source names this rootfs alone.
            let undone = mountinfo::read().and_then(|table| {
                let wrong = table.into_iter().rfind(|m| is_ours(m, request.source));
                wrong.map_or(Ok(()), |m| unmount(&m, Unmount::Lazy, Some(method)).map(drop))
            });
            Err(error.with_undo(undone))
        }
    }
}

/// The mount that was just made: what is seen at the mount point now, which still is where it was.
fn find_mounted(request: &MountOptions<'_>) -> Result<(MountInfo, Option<u64>)> {
    const OP: &str = "mount FUSE on";
    let point = request.point;
    let seen = point.seen().map_err(|e| Error::sys(OP, show(point.path()), e))?;
    let (id, unique) = (sysmount::mount_id(&seen)?, sysmount::unique_mount_id(&seen));
    drop(seen);
    point.check_mounted(id)?;
    match mountinfo::by_id(id)?.filter(|m| is_ours(m, request.source)) {
        Some(info) => Ok((info, unique)),
        // Someone unmounted it, or mounted over it, between two of our calls.
        None => Err(Error::new(Kind::Io, OP, show(point.path()), "the mount is not to be seen there")
            .hint("another process changes mounts or directories there: try again")),
    }
}

/// Is this one of our mounts, made with this source?
pub fn is_ours(info: &MountInfo, source: &str) -> bool {
    info.fs_type == FS_TYPE && info.source == source
}

fn helper_options(request: &MountOptions<'_>) -> String {
    let mut options =
        format!("fsname={},subtype={SUBTYPE},nosuid,nodev,max_read={MAX_READ}", fusermount::escape(request.source));
    if request.read_only {
        options.push_str(",ro");
    }
    if request.others == OtherUsers::Allowed {
        options.push_str(",allow_other,default_permissions");
    }
    options
}

fn open_device() -> Result<OwnedFd> {
    fs::openat(CWD, DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::sys("open", DEVICE, e).hint("as root: modprobe fuse; chmod 666 /dev/fuse"))
}

fn explain(request: &MountOptions<'_>, errno: Errno) -> Error {
    let error = Error::sys("mount FUSE on", show(request.point.path()), errno);
    match errno {
        Errno::PERM => error.hint(
            "this user namespace, or a seccomp filter, does not let FUSE be mounted: leave it and use fusermount3",
        ),
        _ => error,
    }
}

/// The options that both ways of mounting take, as name and value; a flag has none.
fn kernel_options(request: &MountOptions<'_>, connection: &OwnedFd) -> Vec<(&'static str, Option<String>)> {
    let mut options = vec![
        ("fd", Some(connection.as_raw_fd().to_string())),
        ("rootmode", Some(format!("{:o}", libc::S_IFDIR))),
        ("user_id", Some(rustix::process::geteuid().as_raw().to_string())),
        ("group_id", Some(rustix::process::getegid().as_raw().to_string())),
        ("max_read", Some(MAX_READ.to_string())),
    ];
    if request.others != OtherUsers::Refused {
        options.push(("allow_other", None));
        // Always beside allow_other: without it every user could read every file. Where the mounting user alone may enter, the files
        // are that user's own whatever the image says of owners: checks against those would keep the user from reading /root, and
        // would say EACCES before the tree can say EROFS.
        options.push(("default_permissions", None));
    }
    options
}

/// fsopen, fsmount (Linux 5.2): no option can be injected through a name, and the mount goes to the very directory that was opened.
/// NOSYS also where what is needed later is missing.
fn detached(request: &MountOptions<'_>, connection: &OwnedFd) -> rustix::io::Result<(OwnedFd, u32)> {
    let context = mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    mount::fsconfig_set_string(&context, "source", request.source)?;
    mount::fsconfig_set_string(&context, "subtype", SUBTYPE)?;
    for (name, value) in kernel_options(request, connection) {
        match value {
            Some(value) => mount::fsconfig_set_string(&context, name, value)?,
            None => mount::fsconfig_set_flag(&context, name)?,
        }
    }
    if request.read_only {
        mount::fsconfig_set_flag(&context, "ro")?;
    }
    mount::fsconfig_create(&context)?;
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, request.read_only);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, request.nosuid);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, request.nodev);
    let detached = mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // Is there a move_mount? Names nothing, moves nothing.
    if mount::move_mount(&detached, "", &detached, "", MoveMountFlags::empty()) == Err(Errno::NOSYS) {
        return Err(Errno::NOSYS);
    }
    // Sends no request: nobody would answer yet.
    let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let minor = fs::statx(&detached, "", flags, StatxFlags::empty())?.stx_dev_minor;
    Ok((detached, minor))
}

fn mount_classic(request: &MountOptions<'_>) -> Result<OwnedFd> {
    log::info!(target: TARGET, "this kernel has no fsopen, no move_mount or no statx: mounting with mount(2)");
    let connection = open_device()?;
    attach_classic(request, &connection).map_err(|e| explain(request, e))?;
    Ok(connection)
}

fn attach_classic(request: &MountOptions<'_>, connection: &OwnedFd) -> rustix::io::Result<()> {
    let options: Vec<String> = kernel_options(request, connection)
        .into_iter()
        .map(|(name, value)| value.map_or_else(|| name.to_owned(), |v| format!("{name}={v}")))
        .collect();
    let data = CString::new(options.join(",")).map_err(|_| Errno::INVAL)?;
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, request.read_only);
    flags.set(MountFlags::NOSUID, request.nosuid);
    flags.set(MountFlags::NODEV, request.nodev);
    // Through /proc/self/fd: the directory that was opened, whatever its name means by now.
    let target = crate::sys::fs::proc_path(&request.point.place);
    mount::mount(request.source, target, FS_TYPE, flags, Some(data.as_c_str()))
}

/// The mount that a record knows, wherever it lies by now, if it is one of ours made with `source`.
pub fn find(known: Known, source: &str) -> Result<Option<MountInfo>> {
    let Some(id) = known.current_id() else { return Ok(None) };
    Ok(mountinfo::by_id(id)?.filter(|m| is_ours(m, source)))
}

/// Take our mount away, wherever it lies by now; `method` is how this user mounts. `false`: it is gone already.
pub fn unmount(ours: &MountInfo, how: Unmount, method: Option<&Method>) -> Result<bool> {
    const OP: &str = "unmount";
    let Some(ours) = mountinfo::by_id(ours.id)?.filter(|m| m.dev == ours.dev) else { return Ok(false) };
    let name = || show(&ours.point);
    let stack = mountinfo::mounts_at(&ours.point)?;
    match stack.iter().position(|m| m.id == ours.id) {
        None => return Ok(false),
        Some(at) if at + 1 < stack.len() => {
            let top = &stack[stack.len() - 1];
            return Err(Error::new(
                Kind::Busy,
                OP,
                name(),
                format!("another mount lies on top of it: {} of type {}", show(&top.source), show(&top.fs_type)),
            )
            .hint("unmount that one first"));
        }
        Some(_) => {}
    }
    let how = if how == Unmount::IfIdle { release_volumes(&ours)? } else { how };
    let once = || match sysmount::unmount_found(&ours, how) {
        Err(e @ (Errno::PERM | Errno::ACCESS)) => match method {
            Some(Method::Helper(program)) => fusermount::unmount(program, &ours.point, how),
            _ => Err(Error::sys(OP, name(), e).hint("unmount it as the user, and in the namespace, that mounted it")),
        },
        other => other.map_err(|e| Error::sys(OP, name(), e)),
    };
    let mut done = once();
    for _ in 1..holders::BUSY_TRIES {
        if !matches!(&done, Err(e) if e.kind() == Kind::Busy) {
            break;
        }
        std::thread::sleep(holders::BUSY_PAUSE);
        done = once();
    }
    match done {
        Ok(()) => Ok(true),
        // Someone else took it away meanwhile.
        Err(_) if mountinfo::by_id(ours.id)?.is_none_or(|m| m.dev != ours.dev) => Ok(false),
        Err(e) if e.kind() == Kind::Busy => Err(busy(&ours)),
        Err(e) => Err(e),
    }
}

/// Unmount the volumes of ours that are mounts of their own (of the same file system), if nobody uses any of it. Without them the rootfs
/// would let their setuid programs work, should it stay: so it stops doing so first. What comes back is how to unmount the rootfs.
fn release_volumes(ours: &MountInfo) -> Result<Unmount> {
    let tree = mountinfo::tree_of(mountinfo::read()?, ours.id);
    let volumes: Vec<_> = tree.iter().skip(1).filter(|m| m.dev == ours.dev).collect();
    if volumes.is_empty() {
        return Ok(Unmount::IfIdle);
    }
    let in_use = || holders::holders(&tree).into_iter().filter(|h| h.what != Hold::Namespace).collect::<Vec<_>>();
    if !holders::patiently(|| in_use().is_empty()) {
        return Err(busy_with(ours, &in_use()));
    }
    let fail = |m: &MountInfo, e| Error::sys("unmount", show(&m.point), e);
    let root = sysmount::seen_at(&ours.point).map_err(|e| fail(ours, e))?;
    let held_back = AttrSet { nosuid: true, nodev: true, ..AttrSet::default() };
    sysmount::add_attr(&root, &held_back)?;
    drop(root);
    for volume in volumes.into_iter().rev() {
        let mut done = Ok(());
        holders::patiently(|| {
            done = sysmount::unmount_found(volume, Unmount::IfIdle);
            done != Err(Errno::BUSY)
        });
        match done {
            Ok(()) => {}
            // Its server is dead: no path leads through it, and nobody can use it.
            Err(Errno::NOTCONN | Errno::CONNABORTED) => return Ok(Unmount::Lazy),
            Err(Errno::BUSY) => return Err(busy(volume)),
            Err(e) => return Err(fail(volume, e)),
        }
    }
    Ok(Unmount::IfIdle)
}

fn busy(ours: &MountInfo) -> Error {
    let error = |who: String| Error::new(Kind::Busy, "unmount", show(&ours.point), who);
    let below: Vec<String> =
        mountinfo::mounts_below(&ours.point).unwrap_or_default().iter().map(|m| show(&m.point)).collect();
    if !below.is_empty() {
        return error(format!("something is mounted inside it: {}", below.join(", "))).hint("unmount that first");
    }
    busy_with(ours, &holders::holders(std::slice::from_ref(ours)))
}

fn busy_with(ours: &MountInfo, holders: &[holders::Holder]) -> Error {
    let error = |who: String| Error::new(Kind::Busy, "unmount", show(&ours.point), who);
    if holders.is_empty() {
        return error("it is in use by a process that this user may not look at".into())
            .hint("end that process, or unmount with --lazy");
    }
    let names = holders::name_all(holders);
    let hint = if names.contains("fsprov-super") {
        "a server of fsprov holds it: unmount the rootfs that is made of it first (`fsprov list`)"
    } else {
        "end them, or unmount with --lazy"
    };
    error(format!("it is in use by {names}")).hint(hint)
}

/// Abort the connection of a FUSE superblock (its device's minor number): every request fails, waiting ones too
/// (Documentation/filesystems/fuse.rst). For a server that cannot be ended otherwise.
pub fn abort(minor: u32) -> Result<()> {
    let path = format!("/sys/fs/fuse/connections/{minor}/abort");
    std::fs::write(&path, "1").map_err(|e| {
        Error::io("abort the FUSE connection", path, e).hint("mount -t fusectl fusectl /sys/fs/fuse/connections")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Place;

    fn point() -> Point {
        Point::new(Place::open("/".as_ref()).unwrap(), "proc".as_ref()).unwrap()
    }

    #[test]
    fn options_for_the_helper() {
        let point = point();
        let mut request = MountOptions {
            point: &point,
            source: "a,b\\c",
            read_only: false,
            others: OtherUsers::Usual,
            nosuid: false,
            nodev: false,
        };
        assert_eq!(helper_options(&request), "fsname=a\\,b\\\\c,subtype=fsprov,nosuid,nodev,max_read=1048576");
        request.read_only = true;
        request.others = OtherUsers::Allowed;
        assert!(helper_options(&request).ends_with(",ro,allow_other,default_permissions"));
    }

    #[test]
    fn allow_other_never_without_default_permissions() {
        let device = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        for others in [OtherUsers::Usual, OtherUsers::Allowed, OtherUsers::Refused] {
            let point = point();
            let request =
                MountOptions { point: &point, source: "s", read_only: true, others, nosuid: false, nodev: false };
            let names: Vec<_> = kernel_options(&request, &device).into_iter().map(|o| o.0).collect();
            assert_eq!(names.contains(&"default_permissions"), names.contains(&"allow_other"));
            assert_eq!(names.contains(&"allow_other"), others != OtherUsers::Refused);
        }
    }

    #[test]
    fn only_a_mount_of_our_type_and_source_is_ours() {
        let info = |fs_type: &str, source: &str| MountInfo {
            fs_type: fs_type.into(),
            source: source.into(),
            ..MountInfo::default()
        };
        for (mount, want) in [
            (info("fuse.fsprov", "fsprov-a"), true),
            (info("fuse.fsprov", "fsprov-b"), false),
            (info("fuse.sshfs", "fsprov-a"), false),
            (info("ext4", "fsprov-a"), false),
        ] {
            assert_eq!(is_ours(&mount, "fsprov-a"), want, "{mount:?}");
        }
    }
}
