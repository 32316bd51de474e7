//! Places entries below one directory, by directory descriptor: nothing an archive says leads out of it.
//!
//! Every parent is opened one name at a time with O_NOFOLLOW|O_DIRECTORY from the parent before it, so what counts is what
//! is on disk, never a string (a symlink replaced by a directory of the same name: CVE-2026-33056). That is what openat2's
//! RESOLVE_BENEATH|RESOLVE_NO_SYMLINKS promises, and it works where openat2 is missing. Nothing that exists is ever opened for
//! writing, and no device or FIFO is ever opened at all.
//!
//! As root the tree on disk is the image's. Elsewhere owners, setuid bits, devices and attributes that cannot be set are
//! left to the index: a file has at least u+rw and a directory u+rwx, so that we can read them back; a device is an empty
//! regular file that holds its name. [`Placed::is_exact`] tells which it was.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::pax::is_xattr_taken;
use super::read::{Content, Member};
use crate::error::{Error, Kind, Result};
use crate::fault;
use crate::index::{Builder, Entry, MAX_NAME, MAX_PATH, MAX_TARGET, Step, Time, What};
use crate::store::limits::Limits;

/// What happens to a second entry of one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    /// It is an error: AppC says so.
    Refuse,
    /// It replaces the first, as tar(1) does, but for a directory that is not empty.
    Replace,
}

/// What was placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Placed {
    pub(crate) entries: u64,
    /// Bytes of all files, holes counted.
    pub(crate) bytes: u64,
    /// Entries whose owner, device, setuid bit or attribute is in the index alone.
    pub(crate) index_only: u64,
    /// Extended attributes that are not on the list of those taken.
    pub(crate) xattrs_dropped: u64,
}

impl Placed {
    /// Is the tree on disk the image's, with nothing left to the index?
    pub(crate) fn is_exact(&self) -> bool {
        self.index_only == 0
    }
}

const OPEN_DIR: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

pub(crate) struct Placer {
    root: OwnedFd,
    /// The directory at hand and those above it, below the root.
    open: Vec<(Vec<u8>, OwnedFd)>,
    /// What was placed, by number: which directories there are, who spoke of them, and their times.
    index: Builder,
    limits: Limits,
    again: Again,
    placed: Placed,
    /// Directories made that no entry had spoken of.
    made: u64,
    data_bytes: u64,
    hole_bytes: u64,
    xattr_bytes: u64,
    /// Not told by the user id: who places for root may have one of its own.
    as_root: bool,
}

/// A path of an archive as components joined by one slash: no `.`, `..` or empty one, not absolute unless `strip_root`.
/// Empty for the archive's own top.
pub(crate) fn normalize(path: &[u8], limits: &Limits, strip_root: bool) -> Result<Vec<u8>> {
    let refuse = |kind, why: String| Err(Error::new(kind, "place entry", format!("{:?}", lossy(path)), why));
    if path.first() == Some(&b'/') && !strip_root {
        return refuse(Kind::Invalid, "its name is absolute".into());
    }
    let mut out = Vec::with_capacity(path.len().min(MAX_PATH + 1));
    let mut depth = 0;
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return refuse(Kind::Invalid, "its name has a component ..".into()),
            part if part.len() > MAX_NAME => {
                return refuse(Kind::Limit, format!("its name has a component of more than {MAX_NAME} bytes"));
            }
            part => {
                depth += 1;
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(part);
            }
        }
        if out.len() > MAX_PATH {
            return refuse(Kind::Limit, format!("its name has more than {MAX_PATH} bytes"));
        }
        if depth > limits.depth {
            return refuse(Kind::Limit, format!("it lies more than {} directories deep", limits.depth));
        }
    }
    if out.contains(&0) {
        return refuse(Kind::Invalid, "its name holds a NUL".into());
    }
    Ok(out)
}

fn lossy(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    // A name of a megabyte is not worth a megabyte of message.
    String::from_utf8_lossy(&bytes[..bytes.len().min(256)])
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

fn timestamps(mtime: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.secs, tv_nsec: i64::from(mtime.nanos) },
    }
}

impl Placer {
    /// `root` is an empty directory of ours, and `index` an empty one: a layer in it is begun, and has no whiteouts. `as_root`: what is placed
    /// is root's, and owners are set as they are.
    pub(crate) fn new(root: OwnedFd, limits: Limits, again: Again, index: Builder, as_root: bool) -> Self {
        Placer {
            root,
            open: Vec::new(),
            index,
            limits,
            again,
            placed: Placed::default(),
            made: 0,
            data_bytes: 0,
            hole_bytes: 0,
            xattr_bytes: 0,
            as_root,
        }
    }

    /// Place one member of an archive at `path` (normalized, below our root; empty: the root itself), and put it into the index.
    /// `body` hands out a file's content.
    pub(crate) fn place(
        &mut self,
        member: Member,
        path: Vec<u8>,
        link_target: impl FnOnce(&[u8]) -> Result<Vec<u8>>,
        body: impl FnOnce(&mut dyn FnMut(Content<'_>) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        fault::point("store.place")?;
        self.placed.entries += 1;
        let shown = format!("{:?}", lossy(&path));
        let refuse = |kind, why: String| Err(Error::new(kind, "place entry", &shown, why));
        self.check_entries(&path)?;
        if let What::File { size, .. } = member.what {
            self.placed.bytes = self.placed.bytes.saturating_add(size);
            if self.placed.bytes > self.limits.total_bytes {
                return refuse(Kind::Limit, format!("the files have more than {} bytes", self.limits.total_bytes));
            }
        }
        let Member { path: _, what, mode, uid, gid, mtime, mut xattrs } = member;
        let before = xattrs.len();
        xattrs.retain(|x| is_xattr_taken(&x.name));
        self.placed.xattrs_dropped += (before - xattrs.len()) as u64;
        self.xattr_bytes += xattrs.iter().map(|x| (x.name.len() + x.value.len() + 128) as u64).sum::<u64>();
        if self.xattr_bytes > self.limits.xattrs_total_bytes {
            let most = self.limits.xattrs_total_bytes;
            return refuse(Kind::Limit, format!("all extended attributes together have more than {most} bytes"));
        }
        let mut entry = Entry { path, what, mode, uid, gid, mtime, xattrs };
        let (parent_path, name) = split(&entry.path);
        if name.is_empty() {
            if !matches!(entry.what, What::Directory) {
                return refuse(Kind::Invalid, "the root is not a directory".into());
            }
        } else {
            self.enter(parent_path)?;
        }
        let name = name.to_vec();
        match &entry.what {
            What::Directory => self.directory(&entry, &name)?,
            What::File { size, .. } => {
                let size = *size;
                let sha256 = self.file(&entry, &name, size, body)?;
                entry.what = What::File { size, content: None, sha256: Some(sha256) };
            }
            What::Symlink(target) => {
                if target.len() > MAX_TARGET {
                    return refuse(Kind::Limit, format!("its target has more than {MAX_TARGET} bytes"));
                }
                let target = OsStr::from_bytes(target);
                self.make(&entry, &name, |at| fs::symlinkat(target, at, OsStr::from_bytes(&name)))?;
                self.attributes_by_name(&entry, &name, false)?;
            }
            What::HardLink(target) => {
                let target = link_target(target)?;
                self.hard_link(&entry, &name, &target)?;
                entry.what = What::HardLink(target);
            }
            What::Fifo => {
                self.make(&entry, &name, |at| {
                    fs::mknodat(at, OsStr::from_bytes(&name), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                })?;
                self.attributes_by_name(&entry, &name, true)?;
            }
            What::Char(_) | What::Block(_) => self.device(&entry, &name)?,
            What::Socket => return refuse(Kind::Invalid, "it is a socket".into()),
        }
        self.index.add(entry)
    }

    /// A directory that is only on the way to an entry costs as much as one of its own.
    fn check_entries(&self, path: &[u8]) -> Result<()> {
        let most = self.limits.entries;
        if self.placed.entries + self.made <= most {
            return Ok(());
        }
        let why = format!("the archive has more than {most} entries, with the directories on the way to them");
        Err(Error::new(Kind::Limit, "place entry", format!("{:?}", lossy(path)), why))
    }

    fn failed(entry: &Entry) -> impl Fn(Errno) -> Error + '_ {
        |e| {
            let error = Error::sys("place entry", format!("{:?}", lossy(&entry.path)), e);
            match e {
                Errno::EXIST => Error::new(
                    Kind::Invalid,
                    "place entry",
                    format!("{:?}", lossy(&entry.path)),
                    "the archive has this name twice",
                ),
                Errno::NOSPC | Errno::DQUOT => {
                    error.hint("make room below the state root, or choose another with --root")
                }
                _ => error,
            }
        }
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.open.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd())
    }

    /// Make the directory at `path` the one at hand; make what is missing of it.
    fn enter(&mut self, path: &[u8]) -> Result<()> {
        let wanted = || path.split(|b| *b == b'/').filter(|part| !part.is_empty());
        let same = self.open.iter().zip(wanted()).take_while(|((have, _), want)| have == want).count();
        self.open.truncate(same);
        for (depth, part) in wanted().enumerate().skip(same) {
            let end = wanted().take(depth + 1).map(|p| p.len() + 1).sum::<usize>() - 1;
            let refuse = |e: Errno| {
                let subject = format!("{:?}", lossy(path));
                match e {
                    Errno::LOOP | Errno::NOTDIR => Error::new(
                        Kind::Invalid,
                        "place entry below",
                        subject,
                        format!("{:?} is not a directory there, or is a symbolic link", lossy(&path[..end])),
                    ),
                    e => Error::sys("place entry below", subject, e),
                }
            };
            let name = OsStr::from_bytes(part);
            let fd = match fs::openat(self.here(), name, OPEN_DIR, Mode::empty()) {
                Err(Errno::NOENT) => {
                    fs::mkdirat(self.here(), name, Mode::RWXU).map_err(refuse)?;
                    let fd = fs::openat(self.here(), name, OPEN_DIR, Mode::empty()).map_err(refuse)?;
                    // What the index, too, says of a directory that no entry speaks of.
                    fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(refuse)?;
                    self.made += 1;
                    self.check_entries(path)?;
                    fd
                }
                other => other.map_err(refuse)?,
            };
            self.open.push((part.to_vec(), fd));
        }
        Ok(())
    }

    /// Make something new; what is there already is refused, or taken away first.
    fn make<T>(
        &mut self,
        entry: &Entry,
        name: &[u8],
        make: impl Fn(BorrowedFd<'_>) -> rustix::io::Result<T>,
    ) -> Result<T> {
        let failed = Self::failed(entry);
        match make(self.here()) {
            Err(Errno::EXIST) if self.again == Again::Replace => {
                let name = OsStr::from_bytes(name);
                match fs::unlinkat(self.here(), name, AtFlags::empty()) {
                    Err(Errno::ISDIR) => {
                        // ENOTEMPTY stays an error: what lies in it has been told of already.
                        fs::unlinkat(self.here(), name, AtFlags::REMOVEDIR).map_err(&failed)?;
                    }
                    other => other.map_err(&failed)?,
                }
                make(self.here()).map_err(failed)
            }
            other => other.map_err(failed),
        }
    }

    fn directory(&mut self, entry: &Entry, name: &[u8]) -> Result<()> {
        let failed = Self::failed(entry);
        match self.index.said(&entry.path)? {
            Some(true) if self.again == Again::Refuse => return Err(failed(Errno::EXIST)),
            None => self.make(entry, name, |at| fs::mkdirat(at, OsStr::from_bytes(name), Mode::RWXU))?,
            Some(_) => {}
        }
        let opened;
        let dir = if name.is_empty() {
            self.root.as_fd()
        } else {
            opened = fs::openat(self.here(), OsStr::from_bytes(name), OPEN_DIR, Mode::empty()).map_err(&failed)?;
            opened.as_fd()
        };
        let exact = set_attributes(dir, entry, 0o700, self.as_root).map_err(&failed)?;
        // The time is set at the end: what is placed in it changes it again.
        self.placed.index_only += u64::from(!exact);
        Ok(())
    }

    fn file(
        &mut self,
        entry: &Entry,
        name: &[u8],
        size: u64,
        body: impl FnOnce(&mut dyn FnMut(Content<'_>) -> Result<()>) -> Result<()>,
    ) -> Result<[u8; 32]> {
        let failed = Self::failed(entry);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            self.make(entry, name, |at| fs::openat(at, OsStr::from_bytes(name), flags, Mode::from_raw_mode(0o600)))?;
        let mut sha = Sha256::new();
        let mut at = 0_u64;
        let mut has_hole = false;
        let (ratio, floor) = (self.limits.ratio, self.limits.ratio_floor);
        let (data_bytes, holes) = (&mut self.data_bytes, &mut self.hole_bytes);
        fault::point("store.write")?;
        body(&mut |content| {
            match content {
                Content::Data(data) => {
                    fault::point("store.data")?;
                    sha.update(data);
                    write_at(&file, data, at, has_hole).map_err(&failed)?;
                    at += data.len() as u64;
                    *data_bytes += data.len() as u64;
                }
                Content::Hole(length) => {
                    // Holes are zeros once they are hashed or copied: a bomb without a compressor.
                    *holes = holes.saturating_add(length);
                    if *holes > floor && *holes / ratio > *data_bytes {
                        let why = format!(
                            "the holes of sparse files are more than {floor} bytes, and over {ratio} for each byte of data"
                        );
                        return Err(Error::new(Kind::Limit, "place entry", format!("{:?}", lossy(&entry.path)), why));
                    }
                    hash_zeros(&mut sha, length);
                    has_hole = true;
                    at += length;
                }
            }
            Ok(())
        })?;
        debug_assert_eq!(at, size);
        if has_hole {
            fs::ftruncate(&file, size).map_err(&failed)?;
        }
        fault::point("store.attributes")?;
        let exact = set_attributes(file.as_fd(), entry, 0o600, self.as_root).map_err(&failed)?;
        fs::futimens(&file, &timestamps(entry.mtime)).map_err(&failed)?;
        self.placed.index_only += u64::from(!exact);
        Ok(sha.finalize().into())
    }

    fn hard_link(&mut self, entry: &Entry, name: &[u8], target: &[u8]) -> Result<()> {
        let failed = Self::failed(entry);
        let refuse = |why: String| Error::new(Kind::Invalid, "place entry", format!("{:?}", lossy(&entry.path)), why);
        let (parent, target_name) = split(target);
        // The target's own parents, one name at a time as ever.
        let mut at = self.root.try_clone().map_err(|e| Error::io("duplicate descriptor", "", e))?;
        for part in parent.split(|b| *b == b'/').filter(|part| !part.is_empty()) {
            at = fs::openat(&at, OsStr::from_bytes(part), OPEN_DIR, Mode::empty())
                .map_err(|_| refuse(format!("its target {:?} is not there yet", lossy(target))))?;
        }
        let target_name = OsStr::from_bytes(target_name);
        let stat = fs::statat(&at, target_name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|_| refuse(format!("its target {:?} is not there yet", lossy(target))))?;
        // One more name of a symlink is taken: GNU tar packs those. What it points to is not looked at, by us or by linkat.
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(refuse(format!("its target {:?} is a directory", lossy(target))));
        }
        if target == entry.path {
            return Err(refuse("it is a hard link to itself".into()));
        }
        // Without AT_SYMLINK_FOLLOW: were it a symlink by now, the link itself would be linked.
        self.make(entry, name, |here| fs::linkat(&at, target_name, here, OsStr::from_bytes(name), AtFlags::empty()))
            .map_err(|e| match e.errno() {
                Some(Errno::MLINK) => failed(Errno::MLINK).hint("the file system below the store allows no more links"),
                _ => e,
            })
    }

    fn device(&mut self, entry: &Entry, name: &[u8]) -> Result<()> {
        let (kind, rdev) = match entry.what {
            What::Char(rdev) => (FileType::CharacterDevice, rdev),
            What::Block(rdev) => (FileType::BlockDevice, rdev),
            _ => unreachable!("only devices come here"),
        };
        let (major, minor) = ((rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & 0xfff00));
        let os_name = OsStr::from_bytes(name);
        let mode = Mode::from_raw_mode(0o600);
        let made = self.make(entry, name, |at| {
            match fs::mknodat(at, os_name, kind, mode, fs::makedev(major, minor)) {
                // Not allowed, in a user namespace too; a nodev file system has no say here.
                Err(Errno::PERM | Errno::ACCESS | Errno::INVAL | Errno::OPNOTSUPP) => {
                    fs::mknodat(at, os_name, FileType::RegularFile, mode, 0).map(|()| false)
                }
                other => other.map(|()| true),
            }
        })?;
        if made {
            self.attributes_by_name(entry, name, true)
        } else {
            self.placed.index_only += 1;
            let at = self.here();
            fs::utimensat(at, os_name, &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(Self::failed(entry))
        }
    }

    /// Owner, mode, attributes and time of what must not be opened.
    fn attributes_by_name(&mut self, entry: &Entry, name: &[u8], has_mode: bool) -> Result<()> {
        let failed = Self::failed(entry);
        let name = OsStr::from_bytes(name);
        let at = self.here();
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        let owned = match fs::chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(()) => true,
            Err(Errno::PERM | Errno::INVAL) => false,
            Err(e) => return Err(failed(e)),
        };
        let mut exact = owned;
        if has_mode {
            // fchmodat(2) follows symlinks and fchmod(2) refuses O_PATH; the path through /proc names this very inode.
            let node = fs::openat(at, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                .map_err(&failed)?;
            let link = format!("/proc/self/fd/{}", node.as_raw_fd());
            let bits = disk_mode(entry.mode, owned, 0o600);
            exact &= bits == entry.mode;
            fs::chmod(&link, Mode::from_raw_mode(bits.into())).map_err(&failed)?;
        }
        // The file systems that hold stores refuse `user.*` on what is not a file or directory (xattr(7)).
        exact &= entry.xattrs.is_empty();
        fs::utimensat(at, name, &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(&failed)?;
        self.placed.index_only += u64::from(!exact);
        Ok(())
    }

    /// Set the times of the directories. Gives what was placed, and its index.
    pub(crate) fn finish(self) -> Result<(Placed, Builder)> {
        fault::point("store.times")?;
        let Placer { root, mut index, placed, .. } = self;
        if index.said(&[])? != Some(true) {
            fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(|e| Error::sys("set mode", "\"/\"", e))?;
        }
        let fail = |e: Errno| Error::sys("set the times of directories", "", e);
        fs::futimens(&root, &timestamps(index.root_mtime()?)).map_err(fail)?;
        let mut above = vec![root];
        index.each_directory(|step| {
            match step {
                Step::Down { name, mtime } => {
                    let at = above.last().expect("the root stays");
                    let dir = fs::openat(at, OsStr::from_bytes(name), OPEN_DIR, Mode::empty()).map_err(fail)?;
                    fs::futimens(&dir, &timestamps(mtime)).map_err(fail)?;
                    above.push(dir);
                }
                Step::Up => drop(above.pop()),
            }
            Ok(())
        })?;
        Ok((placed, index))
    }
}

/// Permission bits that go on disk: setuid and setgid only with the owner they were meant for.
fn disk_mode(mode: u16, owned: bool, least: u16) -> u16 {
    if owned { mode } else { (mode & 0o1777) | least }
}

/// Owner, mode and attributes of an open file or directory of ours. False where some are left to the index.
fn set_attributes(file: BorrowedFd<'_>, entry: &Entry, least: u16, as_root: bool) -> rustix::io::Result<bool> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    let owned = match fs::fchown(file, Some(uid), Some(gid)) {
        Ok(()) => true,
        // Not ours to give, or no id of this user namespace.
        Err(Errno::PERM | Errno::INVAL) => false,
        Err(e) => return Err(e),
    };
    // Whose files these are is told by the chown; an ordinary user's own get no setuid bit and stay readable all the same.
    let owned = owned && as_root;
    let bits = disk_mode(entry.mode, owned, least);
    let mut exact = owned && bits == entry.mode;
    fs::fchmod(file, Mode::from_raw_mode(bits.into()))?;
    for xattr in &entry.xattrs {
        let Ok(name) = CString::new(&*xattr.name) else { return Err(Errno::INVAL) };
        match fs::fsetxattr(file, &name, &xattr.value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL | Errno::RANGE | Errno::TOOBIG) => {
                exact = false;
            }
            // ext4 has room for one block of them and says ENOSPC when that is full: the disk itself may not be.
            Err(Errno::NOSPC) if !entry.xattrs.is_empty() => exact = false,
            Err(e) => return Err(e),
        }
    }
    Ok(exact)
}

fn write_at(file: &OwnedFd, mut data: &[u8], mut at: u64, positioned: bool) -> rustix::io::Result<()> {
    while !data.is_empty() {
        let written = if positioned { rustix::io::pwrite(file, data, at) } else { rustix::io::write(file, data) };
        match written {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                data = &data[count..];
                at += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn hash_zeros(sha: &mut Sha256, mut length: u64) {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while length > 0 {
        let count = length.min(ZEROS.len() as u64);
        sha.update(&ZEROS[..count as usize]);
        length -= count;
    }
}
