//! Volumes: parse, validate, resolve. A volume routes one path of the rootfs to a host path.
//!
//! Parsing touches no environment; [`VolumeSpec::resolve`] looks at the host. Nothing here knows images: where the target
//! lies inside one is found by the backend, inside the root.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Kind, Result, show};

/// Longest container path taken: PATH_MAX of Linux, less the terminating NUL (limits.h).
pub const MAX_TARGET_LEN: usize = 4095;
/// Longest component of a container path: NAME_MAX of Linux.
pub const MAX_NAME_LEN: usize = 255;
/// Most volumes in one rootfs: the route table tags node ids with one byte.
pub const MAX_VOLUMES: usize = 200;

/// An absolute path inside the rootfs with no `.`, `..`, empty component or NUL. Never `/` itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ContainerPath(#[serde(with = "crate::pathtext")] PathBuf);

impl ContainerPath {
    /// Validate. A trailing slash is dropped; `.` and `..` are refused, not folded: symlinks would make folding wrong.
    pub fn new(path: &OsStr) -> Result<Self> {
        let refuse = |why: &'static str| Err(Error::new(Kind::Usage, "read container path", show(path), why));
        let bytes = path.as_bytes();
        if !bytes.starts_with(b"/") {
            return refuse("it must be absolute: it names a place inside the rootfs");
        }
        if bytes.len() > MAX_TARGET_LEN {
            return refuse("it is longer than 4095 bytes");
        }
        if bytes.contains(&0) {
            return refuse("it holds a NUL byte");
        }
        let trimmed = match bytes.iter().rposition(|&b| b != b'/') {
            Some(last) => &bytes[1..=last],
            None => return refuse("the root itself cannot be a volume: mount that directory as the image"),
        };
        for name in trimmed.split(|&b| b == b'/') {
            match name {
                b"" => return refuse("it has an empty component (//)"),
                b"." | b".." => return refuse("it has a component . or .."),
                name if name.len() > MAX_NAME_LEN => return refuse("it has a component longer than 255 bytes"),
                _ => {}
            }
        }
        let mut whole = b"/".to_vec();
        whole.extend_from_slice(trimmed);
        Ok(ContainerPath(PathBuf::from(OsString::from_vec(whole))))
    }

    /// The path, absolute.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The path without its leading slash.
    pub fn relative(&self) -> &Path {
        self.0.strip_prefix("/").unwrap_or(&self.0)
    }

    /// The names from the root down.
    pub fn names(&self) -> impl DoubleEndedIterator<Item = &OsStr> {
        self.0.components().filter_map(|c| match c {
            Component::Normal(name) => Some(name),
            _ => None,
        })
    }
}

impl fmt::Display for ContainerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show(&self.0))
    }
}

/// May the container write to it?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Read-only, with everything mounted below it.
    Ro,
    /// Writable.
    Rw,
}

/// A volume as the user wrote it: `SRC:DST[:OPTION,...]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Host path: absolute, or relative to the sandbox.
    pub source: PathBuf,
    /// Where it appears in the rootfs.
    pub target: ContainerPath,
    /// `ro` or `rw`; `rw` where not said.
    pub access: Access,
}

impl VolumeSpec {
    /// Read `SRC:DST[:OPTION,...]`; `\:` and `\\` stand for a colon and a backslash in a path.
    /// Options: `ro`, `rw`. An unknown or repeated one is an error.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let refuse =
            |why: String| Error::new(Kind::Usage, "read volume", show(text), why).hint("write SRC:DST[:ro|rw]");
        let mut fields = split_fields(text.as_bytes()).into_iter();
        let (Some(source), Some(target), options, None) = (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(refuse("it has not two or three fields separated by ':'".into()));
        };
        if source.is_empty() {
            return Err(refuse("the source is empty".into()));
        }
        if source.contains(&0) {
            return Err(refuse("the source holds a NUL byte".into()));
        }
        let source = PathBuf::from(OsString::from_vec(source));
        if source.is_relative() && !source.components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(refuse("a relative source lies below the sandbox: it may not have . or .. in it".into()));
        }
        let target = ContainerPath::new(OsStr::from_bytes(&target))?;
        let mut access = None;
        for option in options.as_deref().map(|o| o.split(|&b| b == b',')).into_iter().flatten() {
            let value = match option {
                b"ro" => Access::Ro,
                b"rw" => Access::Rw,
                other => {
                    return Err(refuse(format!("unknown option {:?}", String::from_utf8_lossy(other))));
                }
            };
            if access.replace(value).is_some() {
                return Err(refuse("ro or rw is given twice".into()));
            }
        }
        Ok(VolumeSpec { source, target, access: access.unwrap_or(Access::Rw) })
    }

    /// Find the source on the host. A relative one lies below `sandbox` and is made (a directory, with the sandbox's owner)
    /// if it is missing; an absolute one must exist. A symlink may not lead a relative source out of the sandbox.
    pub fn resolve(&self, sandbox: Option<&Path>) -> Result<Resolved> {
        let op = "find the source of volume";
        let mut made = Vec::new();
        let found = if self.source.is_absolute() {
            crate::sys::fs::open_path(&self.source).map_err(|e| {
                Error::sys(op, format!("{} ({})", self.target, show(&self.source)), e)
                    .hint("an absolute source must exist: create it first")
            })?
        } else {
            let sandbox = sandbox.ok_or_else(|| {
                Error::new(
                    Kind::Usage,
                    op,
                    format!("{} ({})", self.target, show(&self.source)),
                    "it is relative and there is no sandbox",
                )
                .hint("give the executor work directory with --sandbox DIR, or an absolute source")
            })?;
            made = missing_below(sandbox, &self.source);
            crate::sys::fs::open_or_make_below(sandbox, &self.source)?
        };
        let stat = rustix::fs::fstat(&found).map_err(|e| Error::sys(op, show(&self.source), e))?;
        let form = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
            rustix::fs::FileType::Directory => Form::Directory,
            rustix::fs::FileType::RegularFile => Form::File,
            // A socket or a device node (a /dev/null, a control socket) is bound as a file, as `docker -v` does.
            rustix::fs::FileType::Socket
            | rustix::fs::FileType::CharacterDevice
            | rustix::fs::FileType::BlockDevice
            | rustix::fs::FileType::Fifo => Form::Special,
            _ => {
                return Err(Error::new(Kind::Usage, op, show(&self.source), "it is neither a file nor a directory"));
            }
        };
        let source = crate::sys::fs::path_of(&found)?;
        let volume = Volume { source, target: self.target.clone(), access: self.access, form };
        Ok(Resolved { volume, made })
    }
}

/// A volume found, and what had to be made for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The volume.
    pub volume: Volume,
    /// Directories made below the sandbox, outermost first; the last one is the source itself.
    pub made: Vec<PathBuf>,
}

fn missing_below(sandbox: &Path, relative: &Path) -> Vec<PathBuf> {
    let below = relative.ancestors().filter(|a| !a.as_os_str().is_empty()).map(|a| sandbox.join(a));
    let mut missing: Vec<_> = below.take_while(|path| std::fs::symlink_metadata(path).is_err()).collect();
    missing.reverse();
    missing
}

fn split_fields(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut fields = vec![Vec::new()];
    let mut rest = bytes.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        match (byte, rest.peek()) {
            (b'\\', Some(&next @ (b':' | b'\\'))) => {
                rest.next();
                fields.last_mut().expect("never empty").push(next);
            }
            (b':', _) => fields.push(Vec::new()),
            (byte, _) => fields.last_mut().expect("never empty").push(byte),
        }
    }
    fields
}

/// Is the source a directory or a single file?
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// A directory: its whole tree appears at the target.
    Directory,
    /// One regular file.
    File,
    /// One socket, FIFO or device node: kernel backends bind it, the FUSE server refuses it.
    Special,
}

/// A volume whose source was found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// Host path, absolute, symlinks resolved.
    #[serde(with = "crate::pathtext")]
    pub source: PathBuf,
    /// Where it appears in the rootfs.
    pub target: ContainerPath,
    /// `ro` or `rw`.
    pub access: Access,
    /// Directory, file or special file.
    pub form: Form,
}

/// Put volumes in mounting order (outer before inner) and refuse two on one path.
pub fn order(mut volumes: Vec<Volume>) -> Result<Vec<Volume>> {
    if volumes.len() > MAX_VOLUMES {
        return Err(Error::new(Kind::Limit, "read volumes", volumes.len(), "at most 200 volumes fit one rootfs"));
    }
    volumes.sort_by(|a, b| a.target.cmp(&b.target));
    for pair in volumes.windows(2) {
        if pair[0].target == pair[1].target {
            return Err(Error::new(
                Kind::Usage,
                "read volume",
                &pair[0].target,
                "two volumes have this container path",
            ));
        }
        if pair[0].form != Form::Directory && pair[1].target.as_path().starts_with(pair[0].target.as_path()) {
            return Err(Error::new(
                Kind::Usage,
                "read volume",
                &pair[1].target,
                format!("it lies below {}, which is a single file", pair[0].target),
            ));
        }
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grammar() {
        let parse = |t: &str| VolumeSpec::parse(t.as_ref());
        let v = parse("tmp:/tmp").unwrap();
        assert_eq!((v.source.to_str(), v.target.as_path().to_str(), v.access), (Some("tmp"), Some("/tmp"), Access::Rw));
        assert_eq!(parse("/h:/home/:ro").unwrap().access, Access::Ro);
        assert_eq!(parse(r"/a\:b\\c:/x").unwrap().source, Path::new(r"/a:b\c"));
        assert_eq!(parse("/a, b:/x y").unwrap().target.as_path(), Path::new("/x y"));
        for bad in [
            "",
            "a",
            "/a:",
            ":/b",
            "a:b",
            "a:/",
            "a:/x:",
            "a:/x:zz",
            "a:/x:ro,rw",
            "a:/x:ro:1",
            "../a:/x",
            "a/../b:/x",
            "a:/x/../y",
            "a:/./x",
            "a://x",
            "a:/x//y",
        ] {
            assert_eq!(parse(bad).map_err(|e| e.kind()), Err(Kind::Usage), "{bad}");
        }
        assert!(parse(&format!("a:/{}", "n".repeat(256))).is_err());
        assert!(parse(&format!("a:{}", "/nn".repeat(1366))).is_err());
    }

    #[test]
    fn bytes_that_are_not_text_pass() {
        let v = VolumeSpec::parse(OsStr::from_bytes(b"/\xff:/\xfe")).unwrap();
        assert_eq!(v.target.as_path().as_os_str().as_bytes(), b"/\xfe");
    }

    #[test]
    fn outer_before_inner_and_no_two_on_one_path() {
        let volume = |target: &str, form| Volume {
            source: "/s".into(),
            target: ContainerPath::new(target.as_ref()).unwrap(),
            access: Access::Rw,
            form,
        };
        let ordered =
            order(vec![volume("/a/b", Form::Directory), volume("/a", Form::Directory), volume("/a-b", Form::File)])
                .unwrap();
        assert_eq!(ordered.iter().map(|v| v.target.to_string()).collect::<Vec<_>>(), ["/a", "/a/b", "/a-b"]);
        assert!(order(vec![volume("/a", Form::File), volume("/a/", Form::File)]).is_err());
        assert!(order(vec![volume("/a/b", Form::File), volume("/a", Form::File)]).is_err());
    }
}
