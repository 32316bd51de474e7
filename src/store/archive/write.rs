//! Writes tar: one canonical form (ustar, PAX records only where ustar cannot say it), so that one tree gives one archive.
//!
//! And reads a directory as an ACI of that form: `manifest`, `rootfs`, then what is below in byte order of the names,
//! parents first. Of a tree it says names, kinds, modes, owners, modification times to the nanosecond, link targets, which
//! names are one file, devices, contents, and the extended attributes that images may have. It does not say holes, other
//! times, inode numbers. Sockets are left out. What is mounted below is not part of the image.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};

use super::pax::is_xattr_taken;
use super::read::BLOCK;
use super::stream::Sink;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::image::appc::Manifest;
use crate::index::{Entry, Time, What, Xattr};
use crate::paths::image;
use crate::store::acl::{self, LeftOut};
use crate::store::limits::Limits;
use crate::sys::fs::{explain_named, open_named, read_bounded};

/// Largest number of an octal field of 8 and of 12 bytes.
const MAX_OCTAL_7: u64 = 0o777_7777;
const MAX_OCTAL_11: u64 = 0o777_7777_7777;

/// What comes after the last entry: two zero blocks.
pub(crate) const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// The blocks before an entry's content. `path` is its name in the archive, `link` the target of a hard or symbolic link.
pub(crate) fn header(path: &[u8], link: &[u8], entry: &Entry) -> Vec<u8> {
    header_after(Vec::new(), path, link, entry)
}

/// Those of a file with holes, in GNU's sparse format 1.0: its content is a map, then the data. `entry` says how long these are together, `size` how
/// long the file is.
pub(crate) fn sparse_header(path: &[u8], entry: &Entry, size: u64) -> Vec<u8> {
    let mut pax = Vec::new();
    for (key, value) in
        [("major", &b"1"[..]), ("minor", b"0"), ("name", path), ("realsize", size.to_string().as_bytes())]
    {
        record(&mut pax, format!("GNU.sparse.{key}").as_bytes(), value);
    }
    // Who does not know the format sees this name.
    let name =
        [b"GNUSparseFile.0/", &path[path.iter().rposition(|b| *b == b'/').map_or(0, |slash| slash + 1)..]].concat();
    header_after(pax, &name[..name.len().min(100)], b"", entry)
}

/// `pax`: records that come first.
fn header_after(mut pax: Vec<u8>, path: &[u8], link: &[u8], entry: &Entry) -> Vec<u8> {
    let (kind, size, device) = match &entry.what {
        What::Directory => (b'5', 0, None),
        What::File { size, .. } => (b'0', *size, None),
        What::Symlink(_) => (b'2', 0, None),
        What::HardLink(_) => (b'1', 0, None),
        What::Fifo | What::Socket => (b'6', 0, None),
        What::Char(rdev) => (b'3', 0, Some(*rdev)),
        What::Block(rdev) => (b'4', 0, Some(*rdev)),
    };
    let mut block = Block([0; BLOCK]);
    if !block.name(path) {
        record(&mut pax, b"path", path);
    }
    if link.len() > 100 {
        record(&mut pax, b"linkpath", link);
    }
    block.text(157, 100, link);
    let mut number = |key: &str, at: usize, len: usize, value: u64, most: u64| {
        if value > most {
            record(&mut pax, key.as_bytes(), value.to_string().as_bytes());
        }
        block.octal(at, len, if value > most { 0 } else { value });
    };
    number("uid", 108, 8, entry.uid.into(), MAX_OCTAL_7);
    number("gid", 116, 8, entry.gid.into(), MAX_OCTAL_7);
    number("size", 124, 12, size, MAX_OCTAL_11);
    let whole = u64::try_from(entry.mtime.secs).ok().filter(|secs| *secs <= MAX_OCTAL_11 && entry.mtime.nanos == 0);
    if whole.is_none() {
        record(&mut pax, b"mtime", time_text(entry.mtime).as_bytes());
    }
    block.octal(136, 12, whole.unwrap_or(0));
    block.octal(100, 8, entry.mode.into());
    let device = device.unwrap_or(0);
    block.octal(329, 8, ((device >> 8) & 0xfff).into());
    block.octal(337, 8, ((device & 0xff) | ((device >> 12) & 0xfff00)).into());
    let mut xattrs: Vec<&Xattr> = entry.xattrs.iter().collect();
    xattrs.sort_unstable();
    for xattr in xattrs {
        record(&mut pax, &[b"SCHILY.xattr.", &*xattr.name].concat(), &xattr.value);
    }
    let mut out = Vec::with_capacity(BLOCK);
    if !pax.is_empty() {
        let mut before = Block([0; BLOCK]);
        before.text(0, 100, b"@PaxHeader");
        for (at, len, value) in [(100, 8, 0o644), (108, 8, 0), (116, 8, 0), (124, 12, pax.len() as u64), (136, 12, 0)] {
            before.octal(at, len, value);
        }
        out.extend_from_slice(&before.seal(b'x'));
        pad(&mut pax);
        out.extend_from_slice(&pax);
    }
    out.extend_from_slice(&block.seal(kind));
    out
}

/// Zeros up to a whole block.
pub(crate) fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
}

fn record(pax: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // The length counts its own digits.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    pax.extend_from_slice(format!("{length} ").as_bytes());
    pax.extend_from_slice(key);
    pax.push(b'=');
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

fn time_text(time: Time) -> String {
    let (negative, secs, nanos) = match time {
        Time { secs, nanos } if secs >= 0 => (false, secs.unsigned_abs(), nanos),
        Time { secs, nanos: 0 } => (true, secs.unsigned_abs(), 0),
        Time { secs, nanos } => (true, (secs + 1).unsigned_abs(), 1_000_000_000 - nanos),
    };
    let sign = if negative { "-" } else { "" };
    let fraction = format!("{nanos:09}");
    match fraction.trim_end_matches('0') {
        "" => format!("{sign}{secs}"),
        fraction => format!("{sign}{secs}.{fraction}"),
    }
}

struct Block([u8; BLOCK]);

impl Block {
    /// As much of `text` as fits.
    fn text(&mut self, at: usize, len: usize, text: &[u8]) {
        let len = len.min(text.len());
        self.0[at..at + len].copy_from_slice(&text[..len]);
    }

    /// False: the name did not fit, with ustar's prefix or without.
    fn name(&mut self, path: &[u8]) -> bool {
        if path.len() <= 100 {
            self.text(0, 100, path);
            return true;
        }
        let fits = |slash: &usize| *slash > 0 && *slash <= 155 && (1..=100).contains(&(path.len() - slash - 1));
        let mut slashes = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| i);
        if let Some(slash) = slashes.rfind(fits) {
            self.text(345, 155, &path[..slash]);
            self.text(0, 100, &path[slash + 1..]);
            return true;
        }
        self.text(0, 100, path);
        false
    }

    fn octal(&mut self, at: usize, len: usize, value: u64) {
        let text = format!("{value:0width$o}", width = len - 1);
        self.text(at, len, text.as_bytes());
    }

    fn seal(mut self, kind: u8) -> [u8; BLOCK] {
        self.0[156] = kind;
        self.text(257, 8, b"ustar\x0000");
        self.0[148..156].fill(b' ');
        let sum: u64 = self.0.iter().map(|b| u64::from(*b)).sum();
        let text = format!("{sum:06o}\0 ");
        self.text(148, 8, text.as_bytes());
        self.0
    }
}

/// A directory that is read as an ACI.
pub(crate) struct DirectoryImage {
    manifest: Vec<u8>,
    root: OwnedFd,
    at: PathBuf,
    depth: usize,
}

const OPEN_DIR: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);
const FILE_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// The manifest of a root filesystem that came without one.
pub(crate) fn made_manifest(name: &str) -> Result<Vec<u8>> {
    let made = Manifest::named(name).map_err(|e| {
        Error::new(Kind::Usage, "name image", format!("{name:?}"), e)
            .hint("a root filesystem without a manifest gets one, and its name must be an AC identifier")
    })?;
    serde_json::to_vec(&made).map_err(|e| Error::new(Kind::Io, "make manifest", name, e))
}

impl DirectoryImage {
    /// `path` holds `manifest` and `rootfs`, or is a root filesystem that gets a manifest with `name`.
    pub(crate) fn open(path: &Path, name: Option<&str>, limits: &Limits) -> Result<Self> {
        const OP: &str = "open";
        // The directory itself may be named through a symlink; nothing below it may. What is in it is opened once, and then looked at:
        // it may be another user's, who exchanges it in between.
        let whole_path = std::path::absolute(path).map_err(|e| Error::io(OP, show(path), e))?;
        let dir = open_named(&whole_path).map_err(|e| explain_named(OP, path, e))?;
        let manifest_at = path.join(image::MANIFEST);
        let manifest = match fs::openat(&dir, image::MANIFEST, FILE_FLAGS, Mode::empty()) {
            Ok(fd) => Some(std::fs::File::from(fd)).filter(|file| file.metadata().is_ok_and(|meta| meta.is_file())),
            Err(_) => None,
        };
        let rootfs = fs::openat(&dir, image::ROOTFS, OPEN_DIR, Mode::empty()).ok();
        fault::point("tarwrite.opened")?;
        let (manifest, root, at) = if let (Some(file), Some(root)) = (manifest, rootfs) {
            let bytes = read_bounded("read", show(&manifest_at), file, limits.manifest_bytes)?;
            (bytes, root, path.join(image::ROOTFS))
        } else {
            let name = name.ok_or_else(|| {
                let why = "it is a root filesystem without a manifest, and no name was given";
                Error::new(Kind::Usage, "import", show(path), why).hint("name it with --name")
            })?;
            let root = fs::openat(&dir, ".", OPEN_DIR, Mode::empty()).map_err(|e| Error::sys(OP, show(path), e))?;
            (made_manifest(name)?, root, path.to_owned())
        };
        Ok(DirectoryImage { manifest, root, at, depth: limits.depth })
    }

    /// Write the archive.
    pub(crate) fn write(self, sink: &mut Sink<'_>) -> Result<()> {
        let root_stat = fs::fstat(&self.root).map_err(|e| Error::sys("stat", show(&self.at), e))?;
        let mut walk = Walk {
            sink,
            at: &self.at,
            device: root_stat.st_dev,
            depth: self.depth,
            links: HashMap::new(),
            acls: LeftOut::default(),
            gone: false,
        };
        let size = self.manifest.len() as u64;
        let manifest = Entry {
            path: Vec::new(),
            what: What::File { size, content: None, sha256: None },
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: Vec::new(),
        };
        let mut bytes = header(image::MANIFEST.as_bytes(), b"", &manifest);
        bytes.extend_from_slice(&self.manifest);
        pad(&mut bytes);
        walk.put(&bytes);
        let root_stat = walk.stat(&self.root, b"rootfs")?;
        let xattrs = walk.xattrs(&self.root, b"")?;
        walk.put(&header(b"rootfs/", b"", &entry_of(&root_stat, What::Directory, xattrs)));
        walk.directory(&self.root, &mut b"rootfs".to_vec(), 0)?;
        walk.put(&END);
        walk.acls.warn(|path| walk.shown(path));
        Ok(())
    }
}

/// The kernel's 32-bit encoding, as entries have it.
pub(crate) fn device(stat: &Stat) -> u32 {
    let (major, minor) = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The path is in the header already.
fn entry_of(stat: &Stat, what: What, xattrs: Vec<Xattr>) -> Entry {
    Entry::of_stat(Vec::new(), what, stat, xattrs)
}

struct Walk<'a, 'b> {
    sink: &'a mut Sink<'b>,
    at: &'a Path,
    device: u64,
    depth: usize,
    /// First name of each file that has several.
    links: HashMap<u64, Vec<u8>>,
    acls: LeftOut,
    /// Nobody takes the bytes any more.
    gone: bool,
}

impl Walk<'_, '_> {
    fn put(&mut self, bytes: &[u8]) {
        self.gone |= self.sink.write_all(bytes).is_err();
    }

    fn shown(&self, path: &[u8]) -> String {
        let inside = path.strip_prefix(b"rootfs").unwrap_or(path);
        show(self.at.join(OsStr::from_bytes(inside.strip_prefix(b"/").unwrap_or(inside))))
    }

    fn fail(&self, op: &'static str, path: &[u8]) -> impl Fn(rustix::io::Errno) -> Error + use<> {
        let shown = self.shown(path);
        move |e| Error::sys(op, &shown, e)
    }

    /// What is open, as an image has it.
    fn stat(&mut self, file: &OwnedFd, path: &[u8]) -> Result<Stat> {
        let mut stat = fs::fstat(file).map_err(self.fail("stat", path))?;
        if acl::leave_out(file, &mut stat).map_err(self.fail("read the ACL of", path))? {
            self.acls.add(path);
        }
        Ok(stat)
    }

    fn changed(&self, path: &[u8]) -> Error {
        Error::new(Kind::Busy, "import", self.shown(path), "it changes while it is read")
    }

    fn directory(&mut self, dir: &OwnedFd, path: &mut Vec<u8>, depth: usize) -> Result<()> {
        if depth >= self.depth {
            let why = format!("it lies more than {} directories deep", self.depth);
            return Err(Error::new(Kind::Limit, "import", format!("{:?}", String::from_utf8_lossy(path)), why));
        }
        let fail = self.fail("list", path);
        let mut names = Vec::new();
        for item in fs::Dir::read_from(dir).map_err(&fail)? {
            let item = item.map_err(&fail)?;
            match item.file_name().to_bytes() {
                b"." | b".." => {}
                name => names.push(name.to_vec()),
            }
        }
        names.sort_unstable();
        for name in names {
            if self.gone {
                return Ok(());
            }
            let length = path.len();
            path.push(b'/');
            path.extend_from_slice(&name);
            self.entry(dir.as_fd(), &name, path, depth)?;
            path.truncate(length);
        }
        Ok(())
    }

    fn entry(&mut self, dir: BorrowedFd<'_>, name: &[u8], path: &mut Vec<u8>, depth: usize) -> Result<()> {
        let fail = self.fail("read", path);
        let os_name = OsStr::from_bytes(name);
        let stat = fs::statat(dir, os_name, AtFlags::SYMLINK_NOFOLLOW).map_err(&fail)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let is_here = stat.st_dev == self.device;
        if kind != FileType::Directory && stat.st_nlink > 1 && kind != FileType::Socket && is_here {
            if let Some(first) = self.links.get(&stat.st_ino) {
                let bytes = header(path, first, &entry_of(&stat, What::HardLink(Vec::new()), Vec::new()));
                self.put(&bytes);
                return Ok(());
            }
            self.links.insert(stat.st_ino, path.clone());
        }
        let what = match kind {
            FileType::Directory => {
                let sub = fs::openat(dir, os_name, OPEN_DIR, Mode::empty()).map_err(&fail)?;
                let stat = if is_here { self.stat(&sub, path)? } else { stat };
                if is_here && stat.st_dev != self.device {
                    return Err(self.changed(path));
                }
                let xattrs = if is_here { self.xattrs(&sub, path)? } else { Vec::new() };
                let bytes = header(&[&**path, b"/"].concat(), b"", &entry_of(&stat, What::Directory, xattrs));
                self.put(&bytes);
                if !is_here {
                    log::warn!(
                        "{}: another file system is mounted there: it is taken as an empty directory",
                        show(self.at)
                    );
                    return Ok(());
                }
                return self.directory(&sub, path, depth + 1);
            }
            FileType::RegularFile => return self.file(dir, os_name, path),
            FileType::Symlink => {
                let target = fs::readlinkat(dir, os_name, Vec::new()).map_err(&fail)?.into_bytes();
                let bytes = header(path, &target, &entry_of(&stat, What::Symlink(Vec::new()), Vec::new()));
                self.put(&bytes);
                return Ok(());
            }
            FileType::Socket => {
                log::warn!("{}: a socket is left out", show(self.at.join(OsStr::from_bytes(path))));
                return Ok(());
            }
            FileType::Fifo => What::Fifo,
            FileType::CharacterDevice => What::Char(device(&stat)),
            FileType::BlockDevice => What::Block(device(&stat)),
            FileType::Unknown => {
                let why = "its kind is unknown";
                return Err(Error::new(Kind::Invalid, "import", show(self.at.join(OsStr::from_bytes(path))), why));
            }
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let place = fs::openat(dir, os_name, flags, Mode::empty()).map_err(&fail)?;
        let stat = self.stat(&place, path)?;
        if FileType::from_raw_mode(stat.st_mode) != kind {
            return Err(self.changed(path));
        }
        self.put(&header(path, b"", &entry_of(&stat, what, Vec::new())));
        Ok(())
    }

    fn file(&mut self, dir: BorrowedFd<'_>, name: &OsStr, path: &[u8]) -> Result<()> {
        let fail = self.fail("read", path);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = fs::openat(dir, name, flags, Mode::empty()).map_err(&fail)?;
        let stat = self.stat(&file, path)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(self.changed(path));
        }
        let xattrs = self.xattrs(&file, path)?;
        let what = What::File { size, content: None, sha256: None };
        let bytes = header(path, b"", &entry_of(&stat, what, xattrs));
        self.gone |= self.sink.write_all(&bytes).is_err();
        let mut left = size;
        while left > 0 && !self.gone {
            let Some(room) = self.sink.room() else { break };
            let want = room.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match rustix::io::read(&file, &mut room[..want]) {
                Ok(0) => return Err(self.changed(path)),
                Ok(count) => {
                    self.gone |= !self.sink.add(count);
                    left -= count as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(fail(e)),
            }
        }
        let padding = vec![0; (size.next_multiple_of(BLOCK as u64) - size) as usize];
        self.put(&padding);
        Ok(())
    }

    /// The attributes that images may have, of an open file or directory.
    fn xattrs(&self, file: impl AsFd, path: &[u8]) -> Result<Vec<Xattr>> {
        read_xattrs(file.as_fd()).map_err(self.fail("read attributes of", path))
    }
}

/// The attributes that images may have, of an open file or directory, by name.
pub(crate) fn read_xattrs(file: BorrowedFd<'_>) -> rustix::io::Result<Vec<Xattr>> {
    use rustix::io::Errno;
    let mut names: Vec<u8> = Vec::with_capacity(crate::index::MAX_XATTR_BYTES);
    match fs::flistxattr(file, rustix::buffer::spare_capacity(&mut names)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    }
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|name| is_xattr_taken(name)) {
        let mut value: Vec<u8> = Vec::with_capacity(crate::index::MAX_XATTR_BYTES);
        match fs::fgetxattr(file, OsStr::from_bytes(name), rustix::buffer::spare_capacity(&mut value)) {
            Ok(_) => found.push(Xattr { name: name.to_vec(), value }),
            // Gone since it was listed.
            Err(Errno::NODATA) => {}
            Err(e) => return Err(e),
        }
    }
    found.sort_unstable();
    Ok(found)
}
