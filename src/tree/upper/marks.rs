//! What an upper directory says beside its files: what of the image is hidden, which file of the image a copy stands for, and owners that are
//! noted. Read in every form that overlayfs, podman and fuse-overlayfs write; written in overlayfs's, or in AUFS's where that is refused.
//!
//! A whiteout is a character device 0:0 in a name's place, which any user may make since Linux 5.8, or a file `.wh.NAME` beside it. The
//! second form, the *veil*, is what makes changes of two steps whole: while it stands, what the image has under the name is hidden whether
//! the name is there or not. So a file is removed by veil, unlink, whiteout, unveil: at each step it is there as it was, or gone.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Timespec, XattrFlags};

use super::{DIRECTORY, REGULAR, TYPE_BITS};
use crate::tree::{Errno, Node, Result};

/// Begins the name of a veil, and of other files that are marks and never shown.
pub(super) const VEIL: &[u8] = b".wh.";
/// In a directory: nothing of the image shows in it.
pub(super) const OPAQUE_FILE: &[u8] = b".wh..wh..opq";
/// The same as attributes of it; which of the first two overlayfs heeds depends on who mounts.
const OPAQUE: [&[u8]; 3] = [b"trusted.overlay.opaque", b"user.overlay.opaque", b"user.fuseoverlayfs.opaque"];
/// Which file of the image this one was copied from: its node, and this file's own, without which a copy of this file would say the same.
const ORIGIN: &[u8] = b"user.fsprov.origin";
/// Follows it where this file has no content of its own.
const BARE: &str = "bare";
/// Owner and mode as they are to be shown.
const OWNER: &[u8] = b"user.containers.override_stat";
/// Attributes that are said here and nowhere else: nobody sees them in the rootfs or sets them there.
const OURS: [&[u8]; 5] =
    [b"user.fsprov.", b"user.overlay.", b"trusted.overlay.", b"user.fuseoverlayfs.", b"user.containers.override_stat"];

/// What a list of names, or a value of ours, mostly fits in.
const USUAL: usize = 512;
/// Longest list: XATTR_LIST_MAX (limits.h).
const MAX_LIST: usize = 65_536;

/// Is it an attribute that is kept to ourselves?
pub(super) fn is_ours(name: &[u8]) -> bool {
    OURS.iter().any(|ours| name.starts_with(ours))
}

/// Is it a name that nothing may have that is to be seen?
pub(crate) fn is_reserved(name: &[u8]) -> bool {
    name.starts_with(VEIL)
}

/// Is it a whiteout, by its mode and device number?
pub(super) fn is_whiteout(mode: u32, rdev: u32) -> bool {
    mode & TYPE_BITS == libc::S_IFCHR && rdev == 0
}

/// What a name is in an upper directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Above {
    /// It is not there.
    Nothing,
    /// It is a whiteout.
    Whiteout,
    /// It is there, with this mode.
    File(u32),
}

/// Look at a name.
pub(super) fn look(dir: impl AsFd, name: &[u8]) -> Result<Above> {
    match fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if stat.st_rdev == 0 && is_whiteout(stat.st_mode, 0) => Ok(Above::Whiteout),
        Ok(stat) => Ok(Above::File(stat.st_mode)),
        Err(Errno::NOENT) => Ok(Above::Nothing),
        Err(e) => Err(e),
    }
}

/// Device and inode number of what has a name.
pub(super) fn inode(dir: impl AsFd, name: &[u8]) -> Result<(u64, u64)> {
    fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| (stat.st_dev, stat.st_ino))
}

/// Open a directory to read or change what is in it.
pub(super) fn open_directory(dir: impl AsFd, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(dir, name, flags, Mode::empty())
}

/// What is in a directory. Opened here: `Dir::read_from` asks for the flags of a descriptor, which a worker may not (fcntl(2)).
pub(super) fn entries(dir: impl AsFd) -> Result<fs::Dir> {
    fs::Dir::new(open_directory(dir, b".")?)
}

/// What was to be removed may be gone already.
pub(super) fn gone(removed: Result<()>) -> Result<()> {
    match removed {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// Take a whiteout away that lies in a name's own place.
pub(super) fn take_whiteout(dir: impl AsFd, name: &[u8]) -> Result<()> {
    gone(fs::unlinkat(dir, name, AtFlags::empty()))
}

/// The path of a name in an open directory, for calls that take no directory.
pub(super) fn path_of(dir: impl AsFd, name: &[u8]) -> Vec<u8> {
    [crate::sys::fs::proc_path(dir).as_bytes(), b"/", name].concat()
}

/// Does nothing of the image show in this directory?
pub(crate) fn is_opaque(path: &[u8]) -> Result<bool> {
    let list = names(path)?;
    for name in OPAQUE.iter().filter(|name| has(&list, name)) {
        // Not what overlayfs says of a directory whose files have attributes ("x").
        if value(path, name)?.is_some_and(|value| value == b"y") {
            return Ok(true);
        }
    }
    let file = [path, b"/", OPAQUE_FILE].concat();
    match fs::statat(fs::CWD, &file[..], AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Show nothing of the image in this directory: for every reader, in the form that it heeds.
pub(super) fn set_opaque(path: &[u8]) -> Result<()> {
    // Only root may set the first.
    let set: Vec<_> = OPAQUE[..2].iter().map(|name| fs::setxattr(path, *name, b"y", XattrFlags::empty())).collect();
    if set.iter().any(Result::is_ok) {
        return Ok(());
    }
    make_opaque_file(fs::openat(fs::CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

/// The same by a file in it.
pub(super) fn make_opaque_file(dir: impl AsFd) -> Result<()> {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(dir, OPAQUE_FILE, flags, Mode::RUSR | Mode::WUSR).map(drop)
}

/// Which file of the image an upper file stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) lower: Node,
    /// The upper file that this was written of: on a copy of it, it says nothing.
    pub(super) own: Node,
    /// Does the image still have its content?
    pub(super) is_bare: bool,
    /// Its content comes from the image just now, and this is its modification time.
    pub(super) filling: Option<Timespec>,
}

impl Origin {
    pub(super) fn of_copy(lower: Node, own: Node) -> Self {
        Origin { lower, own, is_bare: false, filling: None }
    }

    /// What the file at `path` says.
    fn read(path: &[u8]) -> Result<Option<Self>> {
        let told = value(path, ORIGIN)?;
        let text = told.as_deref().and_then(|value| std::str::from_utf8(value).ok());
        Ok(text.and_then(Self::parse))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let mut origin = Origin::of_copy(words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        origin.is_bare = words.next() == Some(BARE);
        if let (Some(secs), Some(nanos)) = (words.next(), words.next()) {
            origin.filling = Some(Timespec { tv_sec: secs.parse().ok()?, tv_nsec: nanos.parse().ok()? });
        }
        Some(origin)
    }

    fn text(&self) -> String {
        let bare = if self.is_bare { format!(" {BARE}") } else { String::new() };
        let filling = self.filling.map(|time| format!(" {} {}", time.tv_sec, time.tv_nsec));
        format!("{} {}{bare}{}", self.lower, self.own, filling.unwrap_or_default())
    }

    /// Have the file at `path` say it.
    pub(super) fn write(&self, path: &[u8]) -> Result<()> {
        fs::setxattr(path, ORIGIN, self.text().as_bytes(), XattrFlags::empty())
    }
}

/// Which file of the image the regular file at `path`, which is `upper`, was copied from, or a directory was before it was moved.
pub(super) fn origin(path: &[u8], upper: Node) -> Result<Option<Origin>> {
    let told = Origin::read(path)?;
    match told {
        // A copy of it, that another program made of the upper directory.
        Some(origin) if origin.own != upper && origin.is_bare => Err(Errno::IO),
        told => Ok(told.filter(|origin| origin.own == upper)),
    }
}

/// The node of the image that has the content of the upper file at `path`.
pub(crate) fn content_below(path: &[u8]) -> Result<Option<Node>> {
    Ok(Origin::read(path)?.filter(|origin| origin.is_bare).map(|origin| origin.lower))
}

/// Keep which file of the image it was copied from. Where there are no attributes, its inode number is another one for the next server.
pub(super) fn set_origin(path: &[u8], lower: Node, upper: Node) -> Result<()> {
    match Origin::of_copy(lower, upper).write(path) {
        Err(Errno::OPNOTSUPP | Errno::PERM | Errno::NOSPC | Errno::DQUOT) | Ok(()) => Ok(()),
        Err(e) => Err(e),
    }
}

/// The owner and mode that are noted of the file at `path`, as text; what its type can have no note of has none.
pub(crate) fn noted(path: &[u8], mode: u32) -> Option<Vec<u8>> {
    if !matches!(mode & TYPE_BITS, DIRECTORY | REGULAR) {
        return None;
    }
    value(path, OWNER).ok().flatten()
}

/// The name of the attribute that they are noted in.
pub(super) fn owner_name() -> CString {
    CString::new(OWNER).unwrap_or_default()
}

/// Note them, or that there is nothing to be noted.
pub(super) fn note(path: &[u8], owner: Option<&str>) -> Result<()> {
    match owner {
        Some(owner) => fs::setxattr(path, OWNER, owner.as_bytes(), XattrFlags::empty()),
        None => match fs::removexattr(path, OWNER) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            other => other,
        },
    }
}

/// The names of attributes.
fn names(path: &[u8]) -> Result<Vec<u8>> {
    let mut list = vec![0; USUAL];
    loop {
        match fs::listxattr(path, &mut list[..]) {
            Ok(length) => {
                list.truncate(length);
                return Ok(list);
            }
            Err(Errno::RANGE) if list.len() < MAX_LIST => list.resize(MAX_LIST, 0),
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        }
    }
}

fn has(list: &[u8], name: &[u8]) -> bool {
    list.split(|&b| b == 0).any(|there| there == name)
}

/// A value of ours, which is short. `None`: it is not there, or none that we or others wrote.
fn value(path: &[u8], name: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut value = [0; USUAL];
    match fs::getxattr(path, name, &mut value[..]) {
        Ok(length) => Ok(Some(value[..length].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE | Errno::PERM | Errno::ACCESS) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The names in an upper directory.
#[derive(Debug, Default)]
pub(crate) struct Names {
    /// Files that are to be seen, with the type that the listing tells (0: it does not).
    pub(crate) shown: HashMap<Vec<u8>, u32>,
    /// Names of the image that are hidden.
    pub(crate) hidden: HashSet<Vec<u8>>,
    /// Files that hide them.
    pub(super) marks: Vec<Vec<u8>>,
}

impl Names {
    /// Read them all.
    pub(crate) fn of(dir: impl AsFd) -> Result<Self> {
        let mut names = Names::default();
        for entry in entries(&dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => 0,
                kind => kind.as_raw_mode(),
            };
            if let Some(hidden) = name.strip_prefix(VEIL) {
                if name != OPAQUE_FILE {
                    names.hidden.insert(hidden.to_vec());
                }
                names.marks.push(name.to_vec());
            } else if matches!(kind, 0 | libc::S_IFCHR) && look(&dir, name)? == Above::Whiteout {
                names.hidden.insert(name.to_vec());
                names.marks.push(name.to_vec());
            } else {
                names.shown.insert(name.to_vec(), kind);
            }
        }
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_of_one_file() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let at = crate::sys::fs::open_path(dir.path()).unwrap();
        std::fs::write(dir.path().join("f"), "").unwrap();
        let path = path_of(&at, b"f");
        assert_eq!(origin(&path, 7), Ok(None));
        set_origin(&path, 5, 7).unwrap();
        assert_eq!((origin(&path, 7), origin(&path, 8)), (Ok(Some(Origin::of_copy(5, 7))), Ok(None)));
        let filling = Some(Timespec { tv_sec: -3, tv_nsec: 4 });
        for bare in [
            Origin { is_bare: true, ..Origin::of_copy(5, 7) },
            Origin { is_bare: true, filling, ..Origin::of_copy(5, 7) },
        ] {
            bare.write(&path).unwrap();
            // The content of a copy is nowhere.
            assert_eq!((origin(&path, 7), origin(&path, 8)), (Ok(Some(bare)), Err(Errno::IO)));
        }
        assert!(is_ours(ORIGIN) && is_ours(OWNER) && is_ours(OPAQUE[0]) && !is_ours(b"user.x"));
    }
}
