//! Whiteouts, as layers have them on the disk: files named `.wh.NAME` (image-spec, layer.md), which is how they come out of
//! an archive. Of an image of several layers they hide what lies in the layers below; a single layer has nothing to hide.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, OFlags};

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
    /// Its own name.
    pub(super) name: OsString,
    /// What it says.
    pub(super) mark: Mark,
}

/// All marks in the layer open at `root`: a walk over its directories, not over its files.
pub(super) fn scan(root: impl AsFd, layer: &Path) -> Result<Vec<Found>> {
    const OP: &str = "look for whiteouts in";
    let mut found = Vec::new();
    let mut waiting = vec![PathBuf::from(".")];
    while let Some(at) = waiting.pop() {
        let fail = |e| Error::sys(OP, show(layer.join(&at)), e);
        let dir = open_beneath(&root, &at, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?;
        for entry in fs::Dir::read_from(&dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    FileType::from_raw_mode(fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?.st_mode)
                }
                kind => kind,
            };
            match read(name) {
                Some(mark) => found.push(Found { dir: at.clone(), name: name.to_owned(), mark }),
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
        std::os::unix::fs::symlink("/", dir.path().join("out")).unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let mut found = scan(&root, dir.path()).unwrap();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(
            found,
            [
                Found { dir: ".".into(), name: ".wh..wh..opq".into(), mark: Mark::Opaque },
                Found { dir: "a/b".into(), name: ".wh.c".into(), mark: Mark::Hides("c".into()) },
            ]
        );
    }
}
