//! The walk over an upper directory: what each name in it means, told to a [`Visitor`].

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::owners::of_image;
use super::{Marks, OPEN_FILE, Upper};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::index::Xattr;
use crate::plan::Ownership;
use crate::store::acl;
use crate::store::archive::write::read_xattrs;
use crate::sys::fs::proc_path;
use crate::tree::upper::{Owner, PERMISSION_BITS, marks};

pub(super) const OPEN_DIR: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// Something in the upper directory, by its path below the root; the root's is empty.
pub(super) struct Found<'a> {
    pub(super) path: &'a [u8],
    /// Owner and mode are those of the image.
    pub(super) stat: Stat,
    /// It has an ACL. An image has none: the mode gives nobody more than the ACL did.
    pub(super) has_acl: bool,
    pub(super) is: Is<'a>,
}

/// What it is.
pub(super) enum Is<'a> {
    Directory {
        xattrs: Vec<Xattr>,
        shows: Shows,
    },
    File {
        file: &'a OwnedFd,
        xattrs: Vec<Xattr>,
    },
    Symlink(Vec<u8>),
    /// A FIFO or a device.
    Special(FileType),
}

/// Does a directory of the upper show what the layers have there?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shows {
    Both,
    /// It is opaque: only what is in it.
    ItselfAlone,
}

/// Who is told. A directory comes before what is in it; of that, what is hidden comes first, and all in byte order.
pub(super) trait Visitor {
    fn found(&mut self, found: &Found<'_>) -> Result<()>;
    /// The layers' entry of this path is hidden, with all below it.
    fn hidden(&mut self, path: &[u8]) -> Result<()>;
    /// That was all of a directory.
    fn end(&mut self, _directory: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl Upper {
    pub(super) fn shown(&self, path: &[u8]) -> String {
        show(self.at.join(OsStr::from_bytes(path)))
    }

    pub(super) fn changed(&self, path: &[u8]) -> Error {
        Error::new(Kind::Busy, "read changes", self.shown(path), "it changes while it is read")
            .hint("pause or stop the programs that write there, then try again")
    }

    /// Tell `visitor` of everything in it.
    pub(super) fn walk(&self, visitor: &mut dyn Visitor) -> Result<()> {
        let stat = fs::fstat(&self.root).map_err(|e| Error::sys("stat", show(&self.at), e))?;
        let mut walk = Walk { upper: self, visitor, device: stat.st_dev, path: Vec::new(), seen: 0 };
        walk.directory(&self.root, stat, false, 0)
    }
}

/// What is in a directory, sorted.
#[derive(Default)]
struct Names {
    hidden: Vec<Vec<u8>>,
    /// Those of `shown` whose entry in the layers is hidden, whatever it is.
    veiled: BTreeSet<Vec<u8>>,
    shown: Vec<Vec<u8>>,
}

struct Walk<'a> {
    upper: &'a Upper,
    visitor: &'a mut dyn Visitor,
    device: u64,
    path: Vec<u8>,
    /// Entries so far.
    seen: u64,
}

impl Walk<'_> {
    fn shown(&self) -> String {
        self.upper.shown(&self.path)
    }

    fn fail(&self, errno: Errno) -> Error {
        match errno {
            // The only ones who take it away are the programs that write there.
            Errno::NOENT | Errno::LOOP | Errno::NOTDIR => self.changed(),
            e => Error::sys("read changes", self.shown(), e),
        }
    }

    fn changed(&self) -> Error {
        self.upper.changed(&self.path)
    }

    fn refuse(&self, kind: Kind, why: impl Into<String>) -> Error {
        Error::new(kind, "read changes", self.shown(), why.into())
    }

    /// Attributes that an image may have, of an open file or directory.
    fn attributes(&self, fd: &OwnedFd) -> Result<Vec<Xattr>> {
        for mark in self.upper.marks.elsewhere() {
            if has(fd, mark).map_err(|e| self.fail(e))?.is_some() {
                let why = format!("it has the mark {}: what it shows lies elsewhere", mark.to_string_lossy());
                return Err(self.refuse(Kind::Unsupported, why));
            }
        }
        read_xattrs(fd.as_fd()).map_err(|e| self.fail(e))
    }

    fn directory(&mut self, dir: &OwnedFd, stat: Stat, is_veiled: bool, depth: usize) -> Result<()> {
        let limits = &self.upper.limits;
        if depth > limits.depth {
            return Err(self.refuse(Kind::Limit, format!("it lies more than {} directories deep", limits.depth)));
        }
        if stat.st_dev != self.device {
            return Err(self.refuse(Kind::Unsupported, "another file system is mounted there"));
        }
        let xattrs = self.attributes(dir)?;
        let shows = if is_veiled || self.is_opaque(dir)? { Shows::ItselfAlone } else { Shows::Both };
        let (stat, has_acl) = self.as_in_image(stat, Some(dir))?;
        self.visitor.found(&Found { path: &self.path, stat, has_acl, is: Is::Directory { xattrs, shows } })?;
        fault::point("changes.directory")?;
        let Names { hidden, veiled, shown } = self.names(dir)?;
        for name in &hidden {
            self.below(name, |walk| walk.visitor.hidden(&walk.path))?;
        }
        for name in &shown {
            self.below(name, |walk| walk.entry(dir.as_fd(), name, veiled.contains(name), depth))?;
        }
        self.visitor.end(&self.path)
    }

    fn below(&mut self, name: &[u8], work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let length = self.path.len();
        if length > 0 {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        work(self)?;
        self.path.truncate(length);
        Ok(())
    }

    fn is_opaque(&self, dir: &OwnedFd) -> Result<bool> {
        let is = |mark| has(dir, mark).map(|value| value.as_deref() == Some(b"y"));
        match self.upper.marks {
            Marks::Trusted => is(c"trusted.overlay.opaque"),
            Marks::User => is(c"user.overlay.opaque"),
            Marks::Tree => marks::is_opaque(proc_path(dir).as_bytes()),
        }
        .map_err(|e| self.fail(e))
    }

    /// Owner and mode as the image has them, and whether an ACL is left out. `file`: what can have a note of them, or an ACL.
    fn as_in_image(&self, mut stat: Stat, file: Option<&OwnedFd>) -> Result<(Stat, bool)> {
        let noted = file.filter(|_| self.upper.marks == Marks::Tree);
        let noted = noted.and_then(|file| marks::noted(proc_path(file).as_bytes(), stat.st_mode));
        if let Some(Owner { uid, gid, mode }) = noted.as_deref().and_then(Owner::parse) {
            (stat.st_uid, stat.st_gid, stat.st_mode) = (uid, gid, stat.st_mode & !PERMISSION_BITS | mode);
            // That mode counts, and no ACL of the file on the disk.
            return Ok((stat, false));
        }
        let Ownership { uids, gids, .. } = &self.upper.owners;
        (stat.st_uid, stat.st_gid) = (of_image(uids, stat.st_uid), of_image(gids, stat.st_gid));
        let Some(file) = file else { return Ok((stat, false)) };
        let has_acl = acl::leave_out(file, &mut stat).map_err(|e| self.fail(e))?;
        Ok((stat, has_acl))
    }

    fn names(&mut self, dir: &OwnedFd) -> Result<Names> {
        if self.upper.marks == Marks::Tree {
            let all = marks::Names::of(dir).map_err(|e| self.fail(e))?;
            self.count(all.shown.len() + all.hidden.len())?;
            let (veiled, hidden): (BTreeSet<_>, BTreeSet<_>) =
                all.hidden.into_iter().partition(|name| all.shown.contains_key(name));
            let shown: BTreeSet<_> = all.shown.into_keys().collect();
            return Ok(Names { hidden: hidden.into_iter().collect(), veiled, shown: shown.into_iter().collect() });
        }
        let Names { mut hidden, mut shown, veiled } = Names::default();
        for item in fs::Dir::read_from(dir).map_err(|e| self.fail(e))? {
            let item = item.map_err(|e| self.fail(e))?;
            let name = item.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            self.count(1)?;
            let may_hide = matches!(item.file_type(), FileType::CharacterDevice | FileType::Unknown);
            let is_whiteout = may_hide
                && fs::statat(dir, item.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| self.fail(e))
                    .map(|stat| is_whiteout(&stat))?;
            if is_whiteout { &mut hidden } else { &mut shown }.push(name.to_vec());
        }
        hidden.sort_unstable();
        shown.sort_unstable();
        Ok(Names { hidden, veiled, shown })
    }

    fn count(&mut self, entries: usize) -> Result<()> {
        self.seen += entries as u64;
        let most = self.upper.limits.entries;
        if self.seen > most {
            return Err(self.refuse(Kind::Limit, format!("there are more than {most} entries")));
        }
        Ok(())
    }

    fn entry(&mut self, dir: BorrowedFd<'_>, name: &[u8], is_veiled: bool, depth: usize) -> Result<()> {
        if marks::is_reserved(name) {
            // In a layer it would hide what it is not about (image-spec, layer.md, "Whiteouts").
            log::warn!("{} is left out: in a layer, names that begin with .wh. hide others", self.shown());
            return Ok(());
        }
        let os_name = OsStr::from_bytes(name);
        let stat = fs::statat(dir, os_name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| self.fail(e))?;
        let opened = |flags| {
            let fd = fs::openat(dir, os_name, flags, Mode::empty()).map_err(|e| self.fail(e))?;
            let now = fs::fstat(&fd).map_err(|e| self.fail(e))?;
            if (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino) { Ok((fd, now)) } else { Err(self.changed()) }
        };
        let is = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let (fd, stat) = opened(OPEN_DIR)?;
                return self.directory(&fd, stat, is_veiled, depth + 1);
            }
            FileType::RegularFile => {
                let (file, stat) = opened(OPEN_FILE)?;
                let is = Is::File { file: &file, xattrs: self.attributes(&file)? };
                let (stat, has_acl) = self.as_in_image(stat, Some(&file))?;
                return self.visitor.found(&Found { path: &self.path, stat, has_acl, is });
            }
            FileType::Symlink => {
                let target = fs::readlinkat(dir, os_name, Vec::new()).map_err(|e| self.fail(e))?;
                Is::Symlink(target.into_bytes())
            }
            FileType::Socket => {
                log::warn!("{} is left out: a socket is nothing without its program", self.shown());
                // What the image has there it has replaced all the same.
                return self.visitor.hidden(&self.path);
            }
            kind @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice) => Is::Special(kind),
            FileType::Unknown => return Err(self.refuse(Kind::Unsupported, "its kind is unknown")),
        };
        if is_whiteout(&stat) && matches!(is, Is::Special(FileType::CharacterDevice)) {
            // It was something else when the directory was read.
            return Err(self.changed());
        }
        let (stat, has_acl) = match is {
            // Opening it would be heard by its driver, or wait for another end.
            Is::Special(_) => {
                let (place, stat) = opened(OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC))?;
                self.as_in_image(stat, Some(&place))?
            }
            _ => self.as_in_image(stat, None)?,
        };
        self.visitor.found(&Found { path: &self.path, stat, has_acl, is })
    }
}

/// overlayfs's whiteout: a character device 0:0. Programs cannot make one on an overlay.
fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Longest value of a mark that is looked at: a redirect is a path.
const MAX_MARK_BYTES: usize = 4096;

fn has(fd: &OwnedFd, mark: &std::ffi::CStr) -> rustix::io::Result<Option<Vec<u8>>> {
    let mut value = Vec::with_capacity(MAX_MARK_BYTES);
    match fs::fgetxattr(fd, mark, rustix::buffer::spare_capacity(&mut value)) {
        Ok(_) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(Errno::RANGE) => Ok(Some(Vec::new())),
        Err(e) => Err(e),
    }
}
