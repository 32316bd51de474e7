//! A place: a path of the host opened once. From then on its descriptor is what is used; the path is for messages and the record,
//! since anyone who owns a part of it can make it lead elsewhere at any time.
//!
//! No policy: what is opened, made or refused is the provisioner's business (`provisioner/open.rs`).

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result, show};
use crate::sys::fs::{open_resolved, path_of};
use crate::sys::mount;

/// What tells a file or directory from any other that its path may lead to later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its device (st_dev).
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
    /// When it was made (statx stx_btime), where its file system tells: device numbers may be others after a reboot, and an inode
    /// number is used again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub born: Option<(i64, u32)>,
    /// The mount that it was reached through; says nothing after a reboot, and is not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_id: Option<u64>,
}

impl Identity {
    /// Is it the same file or directory?
    pub fn is_same(&self, other: &Identity) -> bool {
        let same_fs = match (self.born, other.born) {
            (Some(a), Some(b)) => a == b,
            _ => self.dev == other.dev,
        };
        same_fs && self.ino == other.ino
    }
}

/// A file or directory of the host, open as O_PATH: holding it opens nothing and blocks on nothing.
#[derive(Debug)]
pub struct Place {
    fd: OwnedFd,
    path: PathBuf,
    identity: Identity,
    kind: FileType,
    owner: (u32, u32),
    mode: u32,
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Place> for OwnedFd {
    fn from(place: Place) -> OwnedFd {
        place.fd
    }
}

impl Place {
    /// What `fd` refers to; messages call it `path`.
    pub fn new(fd: OwnedFd, path: PathBuf) -> rustix::io::Result<Self> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
        let (identity, mode, owner) = match fs::statx(&fd, "", flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME) {
            Ok(stat) => {
                let has = |flag: StatxFlags| stat.stx_mask & flag.bits() != 0;
                let identity = Identity {
                    dev: fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
                    ino: stat.stx_ino,
                    born: has(StatxFlags::BTIME).then_some((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)),
                    mount_id: has(StatxFlags::MNT_ID).then_some(stat.stx_mnt_id),
                };
                (identity, u32::from(stat.stx_mode), (stat.stx_uid, stat.stx_gid))
            }
            // Before Linux 4.11, or a seccomp filter.
            Err(Errno::NOSYS) => {
                let stat = fs::fstat(&fd)?;
                let identity = Identity { dev: stat.st_dev, ino: stat.st_ino, born: None, mount_id: None };
                (identity, stat.st_mode, (stat.st_uid, stat.st_gid))
            }
            Err(e) => return Err(e),
        };
        Ok(Place { fd, path, identity, kind: FileType::from_raw_mode(mode), owner, mode: mode & 0o7777 })
    }

    /// The place at an absolute path without symlinks. One that is there now is ELOOP.
    pub fn open(path: &Path) -> rustix::io::Result<Self> {
        Place::new(open_resolved(path)?, path.to_owned())
    }

    /// The directory that `path` lies in and its name there, to take away what was made. `None`: the directory is gone, or its path leads
    /// elsewhere by now.
    pub fn parent_of(path: &Path) -> Option<(Self, &OsStr)> {
        let (parent, name) = (path.parent()?, path.file_name()?);
        match Place::open(parent) {
            Ok(parent) => Some((parent, name)),
            Err(Errno::NOENT | Errno::NOTDIR) => None,
            Err(e) => {
                log::warn!("{}: {e}: what was made in it stays", show(parent));
                None
            }
        }
    }

    /// `name` in this directory, which is not a symlink (ELOOP if it is), nor what is mounted on another one.
    pub fn child(&self, name: &OsStr) -> rustix::io::Result<Self> {
        let fd = fs::openat(&self.fd, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let place = Place::new(fd, self.path.join(name))?;
        if place.kind == FileType::Symlink { Err(Errno::LOOP) } else { Ok(place) }
    }

    /// One more descriptor of it.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone().map_err(|e| Error::io("open", show(&self.path), e))?;
        Ok(Place { fd, path: self.path.clone(), ..*self })
    }

    /// Its path, as it was when it was opened. For messages and the record.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What tells it from any other.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Directory, regular file or what else, when it was opened.
    pub fn kind(&self) -> FileType {
        self.kind
    }

    /// User and group that owned it when it was opened.
    pub fn owner(&self) -> (u32, u32) {
        self.owner
    }

    /// Its permission bits when it was opened.
    pub fn mode(&self) -> u32 {
        self.mode
    }

    /// A descriptor that can be read: of this very file or directory, wherever its name leads by now.
    pub fn for_reading(&self) -> rustix::io::Result<OwnedFd> {
        if self.kind.is_dir() {
            return fs::openat(&self.fd, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        fs::open(crate::sys::fs::proc_path(&self.fd), flags, Mode::empty())
    }

    /// Does its path still lead to it, as the kernel tells without following it? Somebody may have renamed a part of it.
    pub fn is_where_it_was(&self) -> Result<bool> {
        Ok(path_of(&self.fd)? == self.path)
    }

    /// The error where it is not what a record says was there.
    pub fn check(&self, what: &str, recorded: Option<&Identity>) -> Result<()> {
        match recorded {
            Some(known) if !known.is_same(&self.identity) => Err(Error::new(
                Kind::Usage,
                format!("open {what}"),
                show(&self.path),
                "another file or directory is there than when the rootfs was made",
            )
            .hint("put back what was there, or unmount the rootfs and mount it again")),
            _ => Ok(()),
        }
    }
}

/// A mount point: a directory, and the one that it lies in, through which what is mounted on it is seen.
#[derive(Debug)]
pub struct Point {
    /// The directory itself; after mounting, what is beneath the mount.
    pub place: Place,
    /// The directory that it lies in.
    pub parent: Place,
    name: OsString,
}

impl Point {
    /// The directory `name` in `parent`.
    pub fn new(parent: Place, name: &OsStr) -> rustix::io::Result<Self> {
        let place = parent.child(name)?;
        if !place.kind.is_dir() {
            return Err(Errno::NOTDIR);
        }
        Ok(Point { place, parent, name: name.to_owned() })
    }

    /// One that came from another process, which opened it.
    pub fn of(place: Place, parent: Place) -> Self {
        let name = place.path.file_name().unwrap_or_default().to_owned();
        Point { place, parent, name }
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        self.place.path()
    }

    /// What is to be seen there now: the root of the topmost mount on it.
    pub fn seen(&self) -> rustix::io::Result<OwnedFd> {
        fs::openat(&self.parent, &self.name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }

    /// After mounting: the mount of this id must be what is seen at the path that was asked for, or somebody moved the directory
    /// away or mounted on it.
    pub fn check_mounted(&self, id: u64) -> Result<()> {
        const OP: &str = "mount on";
        if !self.place.is_where_it_was()? {
            return Err(Error::new(
                Kind::Busy,
                OP,
                show(self.path()),
                "its path was changed meanwhile: it lies elsewhere now",
            ));
        }
        let seen = self.seen().map_err(|e| Error::sys(OP, show(self.path()), e))?;
        if mount::mount_id(seen)? == id {
            return Ok(());
        }
        Err(Error::new(Kind::Busy, OP, show(self.path()), "something else was mounted there meanwhile"))
    }
}

/// Every path of a plan, opened. What is made from the plan is made of these alone.
#[derive(Debug)]
pub struct Places {
    /// The layers' root directories, bottom first.
    pub layers: Vec<Place>,
    /// The image's index.
    pub index: Option<Place>,
    /// A shared lock on the directory that the index lies in: clean-up there sees that it is in use, also when the rootfs was
    /// unmounted lazily and nothing names it any more.
    pub in_use: Option<OwnedFd>,
    /// The volumes' sources, in the plan's order.
    pub volumes: Vec<Place>,
    /// Where the rootfs appears.
    pub point: Point,
    /// The directory for the rootfs's own changes.
    pub scratch: Option<Place>,
    /// The directory of our own for what the backend keeps.
    pub state: Place,
}

/// What the places of a rootfs were when it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identities {
    /// The layers'.
    pub layers: Vec<Identity>,
    /// The index's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Identity>,
    /// The volumes' sources'.
    pub volumes: Vec<Identity>,
    /// The mount point's, beneath the mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<Identity>,
    /// The one's for changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<Identity>,
}

impl Places {
    /// What a record keeps of them.
    pub fn identities(&self) -> Identities {
        let all = |places: &[Place]| places.iter().map(Place::identity).collect();
        Identities {
            layers: all(&self.layers),
            index: self.index.as_ref().map(Place::identity),
            volumes: all(&self.volumes),
            point: Some(self.point.place.identity()),
            scratch: self.scratch.as_ref().map(Place::identity),
        }
    }
}
