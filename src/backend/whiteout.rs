//! Whiteouts, as layers have them on the disk: files named `.wh.NAME` (image-spec, layer.md), which is how they come out of
//! an archive, or in overlayfs's form: character devices 0:0, and an attribute of opaque directories. Of several layers they hide what
//! lies in the layers below; a single layer has nothing to hide. An image's index knows better, where there is one ([`super::surplus`]).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result, show};
use crate::sys::fs::open_beneath;

const PREFIX: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS's own files, found in old docker layers. They hide nothing, and are not to be seen.
const AUFS: &[u8] = b".wh..wh.";

/// Deepest directory looked into: one path of PATH_MAX bytes.
const MAX_PATH_BYTES: usize = 4095;

/// What a name says about the layers below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// This name of the same directory is gone.
    Hides(OsString),
    /// Everything in the same directory is gone.
    Opaque,
    /// Nothing.
    Meta,
}

/// Read a name. `None`: it is an ordinary one.
pub(super) fn read(name: &OsStr) -> Option<Mark> {
    let bytes = name.as_bytes();
    match bytes.strip_prefix(PREFIX)? {
        _ if bytes == OPAQUE => Some(Mark::Opaque),
        _ if bytes.starts_with(AUFS) => Some(Mark::Meta),
        b"" | b"." | b".." => Some(Mark::Meta),
        hidden => Some(Mark::Hides(OsStr::from_bytes(hidden).to_owned())),
    }
}

/// A mark found in a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Its directory, relative to the layer.
    pub(super) dir: PathBuf,
    /// Its own name, where it is a file and no attribute.
    pub(super) name: Option<OsString>,
    /// What it says.
    pub(super) mark: Mark,
}

/// What is to be hidden in one directory.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Hidden {
    pub(super) opaque: bool,
    pub(super) names: BTreeSet<OsString>,
    /// The layer, counted from the lowest, whose directory it looks like. `None`: the topmost one's.
    pub(super) like: Option<usize>,
}

/// By directory, relative to the root, which is `.`.
pub(super) type HiddenDirs = BTreeMap<PathBuf, Hidden>;

/// Attributes of overlayfs's opaque directories: which one it heeds depends on who mounts.
pub(super) const TRUSTED_OPAQUE: &str = "trusted.overlay.opaque";
pub(super) const USER_OPAQUE: &str = "user.overlay.opaque";

/// Has the open directory this attribute, with the value that overlayfs takes?
pub(super) fn has_mark(dir: impl AsFd, name: &str) -> rustix::io::Result<bool> {
    let mut value = [0_u8; 2];
    match fs::fgetxattr(dir, name, &mut value[..]) {
        Ok(length) => Ok(value[..length] == *b"y"),
        // Not readable for this process, not there, no such attributes here, longer than any that counts.
        Err(Errno::PERM | Errno::ACCESS | Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Is the open directory opaque, by either mark?
pub(super) fn is_opaque(dir: impl AsFd) -> rustix::io::Result<bool> {
    Ok(has_mark(&dir, TRUSTED_OPAQUE)? || has_mark(&dir, USER_OPAQUE)?)
}

/// Is it a whiteout in overlayfs's form?
pub(super) fn is_whiteout_device(dir: impl AsFd, name: &OsStr, kind: FileType) -> rustix::io::Result<bool> {
    Ok(kind == FileType::CharacterDevice && fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_rdev == 0)
}

/// What an entry is, asked of the file where the file system's listing does not say.
pub(super) fn kind_of(dir: impl AsFd, name: &OsStr, told: FileType) -> rustix::io::Result<FileType> {
    match told {
        FileType::Unknown => Ok(FileType::from_raw_mode(fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)),
        told => Ok(told),
    }
}

/// All marks in the layer open at `root`: a walk over its directories, not over its files.
pub(super) fn scan(root: impl AsFd, layer: &Path) -> Result<Vec<Found>> {
    const OP: &str = "look for whiteouts in";
    let mut found = Vec::new();
    let mut waiting = vec![PathBuf::from(".")];
    while let Some(at) = waiting.pop() {
        let fail = |e| Error::sys(OP, show(layer.join(&at)), e);
        let dir = open_beneath(&root, &at, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?;
        if is_opaque(&dir).map_err(fail)? {
            found.push(Found { dir: at.clone(), name: None, mark: Mark::Opaque });
        }
        for entry in fs::Dir::read_from(&dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = kind_of(&dir, name, entry.file_type()).map_err(fail)?;
            let mark = match read(name) {
                // Listed as a name of no inode where nothing lies below: it is hidden like the others.
                None if is_whiteout_device(&dir, name, kind).map_err(fail)? => Some(Mark::Hides(name.to_owned())),
                mark => mark,
            };
            match mark {
                Some(mark) => found.push(Found { dir: at.clone(), name: Some(name.to_owned()), mark }),
                None if kind.is_dir() => {
                    let below = if at == Path::new(".") { PathBuf::from(name) } else { at.join(name) };
                    if below.as_os_str().len() > MAX_PATH_BYTES {
                        return Err(Error::new(Kind::Limit, OP, show(layer), "a path in it is longer than 4095 bytes"));
                    }
                    waiting.push(below);
                }
                None => {}
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let hides = |name: &str| Some(Mark::Hides(name.into()));
        for (name, want) in [
            ("x", None),
            (".wh", None),
            (".whx", None),
            (".wh.x", hides("x")),
            (".wh..x", hides(".x")),
            (".wh..wh..opq", Some(Mark::Opaque)),
            (".wh..wh.plnk", Some(Mark::Meta)),
            (".wh.", Some(Mark::Meta)),
            (".wh...", Some(Mark::Meta)),
        ] {
            assert_eq!(read(OsStr::new(name)), want, "{name}");
        }
    }

    #[test]
    fn a_layer_is_searched_to_the_bottom() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/.wh.c"), "").unwrap();
        std::fs::write(dir.path().join(".wh..wh..opq"), "").unwrap();
        // Since Linux 5.8 anybody may make this one.
        let device = dir.path().join("z");
        let has_device = fs::mknodat(fs::CWD, &device, FileType::CharacterDevice, fs::Mode::empty(), 0).is_ok();
        let has_attribute = fs::setxattr(dir.path().join("a"), USER_OPAQUE, b"y", fs::XattrFlags::empty()).is_ok();
        std::os::unix::fs::symlink("/", dir.path().join("out")).unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let mut found = scan(&root, dir.path()).unwrap();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        if has_attribute {
            assert_eq!(found.remove(0), Found { dir: "a".into(), name: None, mark: Mark::Opaque });
        }
        if has_device {
            let want = Found { dir: ".".into(), name: Some("z".into()), mark: Mark::Hides("z".into()) };
            assert_eq!(found.pop(), Some(want));
        }
        assert_eq!(
            found,
            [
                Found { dir: ".".into(), name: Some(".wh..wh..opq".into()), mark: Mark::Opaque },
                Found { dir: "a/b".into(), name: Some(".wh.c".into()), mark: Mark::Hides("c".into()) },
            ]
        );
    }
}
