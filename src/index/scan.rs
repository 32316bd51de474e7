//! Reads a directory, or another index, as a layer.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::build::Builder;
use super::entry::{Entry, What, Xattr, refuse};
use super::format::{S_IFCHR, S_IFIFO, S_IFMT, S_IFSOCK};
use super::paged::Table;
use super::read::{Damaged, Index, Inode, InodeKind};
use super::rows::Row;
use super::{MAX_DEPTH, MAX_PATH, MAX_TARGET, MAX_XATTR_BYTES};
use crate::error::{Error, Kind, Result};

/// A directory being read. Its descriptor is open as long as it is on the stack, so a tree is at most [`MAX_OPEN_DEPTH`] deep.
struct Frame {
    fd: OwnedFd,
    path: Vec<u8>,
    names: std::vec::IntoIter<Vec<u8>>,
}

/// Descriptors open at once. Half of the usual soft limit of 1024; real trees are below 50.
const MAX_OPEN_DEPTH: usize = if MAX_DEPTH < 512 { MAX_DEPTH } else { 512 };

impl Builder {
    /// Add the tree of a directory to the layer begun last: every name below `root`, with what stat, readlink and listxattr
    /// say. It does not follow symlinks, stays on the directory's file system (what is mounted below is not part of an
    /// image: the mount point is taken as an empty directory) and takes `system.` attributes as they are on the disk.
    /// The tree must not change meanwhile.
    pub fn add_directory(&mut self, root: impl AsFd) -> Result<()> {
        self.add_directory_with(root, |_, _| Ok(None))
    }

    /// The same, with a digest of each regular file: `sha256` is given its path and the file, open for reading.
    pub fn add_directory_hashed(
        &mut self,
        root: impl AsFd,
        mut sha256: impl FnMut(&[u8], std::fs::File) -> Result<[u8; 32]>,
    ) -> Result<()> {
        self.add_directory_with(root, |path, open| sha256(path, open()?).map(Some))
    }

    fn add_directory_with(
        &mut self,
        root: impl AsFd,
        mut sha256: impl FnMut(&[u8], &dyn Fn() -> Result<std::fs::File>) -> Result<Option<[u8; 32]>>,
    ) -> Result<()> {
        let root = root.as_fd();
        let stat = stat_of(root, "")?;
        let device = stat.st_dev;
        let top = reopen(root, &[], &[])?;
        let xattrs = xattrs_of(&top, &[])?;
        self.add(Entry::of_stat(Vec::new(), What::Directory, &stat, xattrs))?;
        let mut links: HashMap<u64, Row> = HashMap::new();
        let names = list(&top, &[])?;
        let mut stack = vec![Frame { fd: top, path: Vec::new(), names }];
        while let Some(frame) = stack.last_mut() {
            let Some(name) = frame.names.next() else {
                stack.pop();
                continue;
            };
            let mut path = frame.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            let stat = stat_of(frame.fd.as_fd(), &name[..]).map_err(|e| fail("stat", &path, &e))?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if stat.st_dev != device {
                if kind == FileType::Directory {
                    self.add(Entry::of_stat(path, What::Directory, &stat, Vec::new()))?;
                }
                continue;
            }
            if kind != FileType::Directory
                && stat.st_nlink > 1
                && let Some(first) = links.get(&stat.st_ino)
            {
                let what = What::File { size: 0, content: None, sha256: None };
                self.add_as(&Entry::of_stat(path, what, &stat, Vec::new()), Some(*first))?;
                continue;
            }
            let rdev = encode_device(fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
            let what = match kind {
                FileType::Directory => {
                    if stack.len() >= MAX_OPEN_DEPTH {
                        return Err(refuse(Kind::Limit, &path, "it lies deeper than 512 directories"));
                    }
                    let parent = stack.last().expect("the loop has a frame");
                    let fd = reopen(parent.fd.as_fd(), &name, &path)?;
                    let xattrs = xattrs_of(&fd, &path)?;
                    self.add(Entry::of_stat(path.clone(), What::Directory, &stat, xattrs))?;
                    let names = list(&fd, &path)?;
                    stack.push(Frame { fd, path, names });
                    continue;
                }
                FileType::RegularFile => {
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                    let open = || match fs::openat(&frame.fd, &name[..], flags, Mode::empty()) {
                        Ok(fd) => Ok(fd.into()),
                        Err(e) => Err(Error::sys("index: open", show(&path), e)),
                    };
                    let sha256 = sha256(&path, &open)?;
                    What::File { size: stat.st_size as u64, content: None, sha256 }
                }
                FileType::Symlink => {
                    let target = fs::readlinkat(&frame.fd, &name[..], Vec::with_capacity(MAX_TARGET))
                        .map_err(|e| Error::sys("index: read link", show(&path), e))?;
                    What::Symlink(target.into_bytes())
                }
                FileType::Fifo => What::Fifo,
                FileType::Socket => What::Socket,
                FileType::CharacterDevice => What::Char(rdev),
                FileType::BlockDevice => What::Block(rdev),
                FileType::Unknown => return Err(refuse(Kind::Invalid, &path, "its file type is unknown")),
            };
            let xattrs = xattrs_at(&frame.fd, &name, &path)?;
            let row = self.add_as(&Entry::of_stat(path, what, &stat, xattrs), None)?;
            if stat.st_nlink > 1 {
                links.extend(row.map(|row| (stat.st_ino, row)));
            }
        }
        Ok(())
    }
}

/// The kernel's 32-bit encoding of a device number (include/linux/kdev_t.h, new_encode_dev).
pub(super) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn show(path: &[u8]) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    crate::error::show(std::ffi::OsStr::from_bytes(path))
}

fn fail(what: &str, path: &[u8], cause: &Error) -> Error {
    Error::new(cause.kind(), format!("index: {what}"), show(path), cause.to_string())
}

fn stat_of(dir: std::os::fd::BorrowedFd<'_>, name: impl rustix::path::Arg) -> Result<fs::Stat> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    fs::statat(dir, name, flags).map_err(|e| Error::sys("stat", "", e))
}

/// Open a directory by its name in its parent; an empty name opens the parent again, for reading.
fn reopen(dir: std::os::fd::BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd> {
    let name = if name.is_empty() { b"." } else { name };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(dir, name, flags, Mode::empty()).map_err(|e| Error::sys("index: open directory", show(path), e))
}

fn list(dir: &OwnedFd, path: &[u8]) -> Result<std::vec::IntoIter<Vec<u8>>> {
    let fail = |e| Error::sys("index: list", show(path), e);
    let mut names = Vec::new();
    for item in fs::Dir::read_from(dir).map_err(fail)? {
        let item = item.map_err(fail)?;
        match item.file_name().to_bytes() {
            b"." | b".." => {}
            name => names.push(name.to_vec()),
        }
    }
    // Sorted, so that the same tree gives the same index (which hard link is first depends on it).
    names.sort_unstable();
    Ok(names.into_iter())
}

/// The xattrs of a name that may not be opened (FIFO, device, symlink): by way of /proc/self/fd, as there is no
/// lgetxattrat before Linux 6.13.
fn xattrs_at(dir: &OwnedFd, name: &[u8], path: &[u8]) -> Result<Vec<Xattr>> {
    use std::os::unix::ffi::OsStrExt as _;
    let mut link = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    link.extend_from_slice(name);
    let link = std::path::Path::new(std::ffi::OsStr::from_bytes(&link));
    collect(path, |buf| fs::llistxattr(link, buf), |name, buf| fs::lgetxattr(link, name, buf))
}

fn xattrs_of(fd: &OwnedFd, path: &[u8]) -> Result<Vec<Xattr>> {
    collect(path, |buf| fs::flistxattr(fd, buf), |name, buf| fs::fgetxattr(fd, name, buf))
}

fn collect(
    path: &[u8],
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&[u8], &mut [u8]) -> rustix::io::Result<usize>,
) -> Result<Vec<Xattr>> {
    // Nearly every file has none, or few and short ones. (An empty buffer would not ask for the size: rustix answers 0.)
    let mut names = vec![0; 512];
    let length = match list(&mut names) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(Errno::RANGE) => {
            names.resize(MAX_XATTR_BYTES, 0);
            list(&mut names)
        }
        other => other,
    }
    .map_err(|e| Error::sys("index: list xattrs", show(path), e))?;
    let mut xattrs = Vec::new();
    let mut value = vec![0; MAX_XATTR_BYTES];
    for name in names[..length].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        match get(name, &mut value) {
            Ok(length) => xattrs.push(Xattr { name: name.to_vec(), value: value[..length].to_vec() }),
            // Listed and not readable for this user (trusted. outside the first namespace), or gone.
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(e) => return Err(Error::sys("index: read xattr", show(path), e)),
        }
    }
    Ok(xattrs)
}

impl Builder {
    /// Add what another index of one layer has to the layer begun last, where `keep` says so of its path and inode (a directory that
    /// is not kept is still made where something below it is). An image of many layers is put together so, from the indexes
    /// that its layers got when they were imported; whiteouts are entries of those ([`Whiteouts::Plain`]) and take effect here.
    ///
    /// [`Whiteouts::Plain`]: super::Whiteouts::Plain
    pub fn add_index(&mut self, index: &Index, mut keep: impl FnMut(&[u8], &Inode) -> bool) -> Result<()> {
        let damaged = |e: Damaged| Error::new(Kind::Integrity, "read index", "", e);
        if index.layer_count() > 1 {
            return Err(Error::new(Kind::Invalid, "merge index", "", "it is of more than one layer"));
        }
        // By row of the index, of inodes of several names: their row here plus 1, once the first name was added.
        let mut seen: Option<Table<u32>> = None;
        // Of each directory above: the names left, and how long its path is.
        let mut stack: Vec<(std::ops::Range<u32>, usize)> = Vec::new();
        let mut path = Vec::new();
        let mut content = Vec::new();
        let mut next = Some(index.inode(0).map_err(damaged)?);
        while let Some(inode) = next {
            if keep(&path, &inode) {
                let is_linked = inode.nlink > 1 && !matches!(inode.kind, InodeKind::Directory { .. });
                let mut link = None;
                if is_linked {
                    let seen = match &mut seen {
                        Some(seen) => seen,
                        none => {
                            let mut all = Table::new(self.names.dir(), LINKS_HELD);
                            all.grow(index.inode_count())?;
                            none.insert(all)
                        }
                    };
                    link = match seen.get(inode.row)? {
                        HIDES => {
                            let why = "it is one more name of a whiteout";
                            return Err(refuse(Kind::Invalid, &path, why));
                        }
                        row => row.checked_sub(1),
                    };
                }
                let added = self.add_as(&entry_of(index, &inode, &path, &mut content).map_err(damaged)?, link)?;
                if let Some(seen) = seen.as_mut().filter(|_| is_linked) {
                    seen.set(inode.row, &added.map_or(HIDES, |row| row + 1))?;
                }
            }
            if let InodeKind::Directory { first, count } = inode.kind {
                if path.len() > MAX_PATH || stack.len() > MAX_DEPTH {
                    return Err(refuse(Kind::Integrity, &path, "a directory in the index lies in itself"));
                }
                stack.push((first..first + count, path.len()));
            }
            next = loop {
                let Some((names, length)) = stack.last_mut() else { break None };
                path.truncate(*length);
                let Some(at) = names.next() else {
                    stack.pop();
                    continue;
                };
                let name = index.name(at).map_err(damaged)?;
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name.name);
                break Some(index.inode(name.row).map_err(damaged)?);
            };
        }
        Ok(())
    }
}

/// For an inode whose first name is a whiteout.
const HIDES: u32 = u32::MAX;

/// Bytes held of the rows of inodes that have several names.
const LINKS_HELD: usize = 512 << 10;

/// What an index says of an inode that has the name `path`.
fn entry_of(index: &Index, inode: &Inode, path: &[u8], content: &mut Vec<u8>) -> std::result::Result<Entry, Damaged> {
    let mut xattrs = Vec::new();
    for xattr in index.xattrs(inode)? {
        let (name, value) = xattr?;
        xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
    }
    let what = match inode.kind {
        InodeKind::Directory { .. } => What::Directory,
        InodeKind::File => {
            index.content_path(inode, content)?;
            let content = (*content != path).then(|| content.clone());
            What::File { size: inode.size, content, sha256: index.sha256(inode)? }
        }
        InodeKind::Symlink => What::Symlink(index.target(inode)?.unwrap_or_default().to_vec()),
        InodeKind::Special => match inode.mode & S_IFMT {
            S_IFIFO => What::Fifo,
            S_IFSOCK => What::Socket,
            S_IFCHR => What::Char(inode.rdev),
            _ => What::Block(inode.rdev),
        },
    };
    Ok(Entry {
        path: path.to_vec(),
        what,
        mode: (inode.mode & 0o7777) as u16,
        uid: inode.uid,
        gid: inode.gid,
        mtime: inode.mtime,
        xattrs,
    })
}
