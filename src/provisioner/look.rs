//! Where a request's paths lead at this moment: symlinks resolved, what is missing told. Nothing is made, and nothing that was opened
//! is kept: what comes out is data for [`super::planning`]. The paths in it are opened by [`super::open`], without following any
//! symlink: what is put in their way after this look is refused there.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstat, openat, statat};
use rustix::io::Errno;

use super::{Changes, Request};
use crate::error::{Error, Kind, Result, show};
use crate::id::ContainerId;
use crate::place::{Identity, Place};
use crate::sys::fs::{explain_named, is_empty, open_named, open_within, path_of};
use crate::volume::{ContainerPath, Fill, Form, VolumeSpec};

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Where the rootfs will be, absolute; and the directories of it that are missing, outermost first.
    pub(super) rootfs: (PathBuf, Vec<PathBuf>),
    /// The sandbox; and the directories of it that are missing, outermost first.
    pub(super) sandbox: Option<(PathBuf, Vec<PathBuf>)>,
    /// Where changes are kept that do not end with the rootfs, likewise.
    pub(super) upper: Option<(PathBuf, Vec<PathBuf>)>,
    /// For each volume of the request, its source.
    pub(super) sources: Vec<SeenSource>,
}

/// The source of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SeenSource {
    /// Absolute.
    pub(super) path: PathBuf,
    /// How many names at the end of it are not there yet.
    pub(super) missing: usize,
    /// What it is, or what it will be.
    pub(super) form: Form,
    /// Is it a directory with nothing in it?
    pub(super) is_empty: bool,
}

/// Look. `form_in_image` tells what the image has at a target: what a source becomes that is missing and to be filled from there.
pub(super) fn look(request: &Request, form_in_image: &dyn Fn(&ContainerPath) -> Result<Form>) -> Result<Seen> {
    let rootfs = mount_point(&request.rootfs)?;
    let sandbox =
        request.sandbox.as_deref().map(|path| find_directory("open sandbox", "--sandbox", path)).transpose()?;
    let upper = request
        .upper
        .as_deref()
        .map(|path| find_directory("open the directory for changes", "--upper", path))
        .transpose()?;
    if let (Changes::Ephemeral, Some(sandbox), Some(id)) = (request.changes, &sandbox, &request.id) {
        refuse_taken(&sandbox.path.join(changes_name(id)))?;
    }
    let form = |spec: &VolumeSpec| match spec.fill {
        Fill::Once => form_in_image(&spec.target),
        Fill::Never => Ok(Form::Directory),
    };
    let sources = request.volumes.iter().map(|spec| {
        if spec.is_below_sandbox() { relative(spec, sandbox.as_ref(), &form) } else { absolute(spec, &form) }
    });
    let sources = sources.collect::<Result<_>>()?;
    let told = |found: Option<Found>| found.map(|found| (found.path, found.missing));
    Ok(Seen { rootfs, sandbox: told(sandbox), upper: told(upper), sources })
}

/// Changes that are to be kept must not lie where they go away, or cannot be seen.
pub(super) fn refuse_lost(seen: &Seen, state_root: &Path) -> Result<()> {
    let Some((upper, _)) = &seen.upper else { return Ok(()) };
    let why = if std::fs::canonicalize(state_root).is_ok_and(|root| upper.starts_with(root)) {
        "fsprov keeps its own files there, and removes them"
    } else if upper.starts_with(&seen.rootfs.0) {
        "it lies in the rootfs, which covers it"
    } else {
        return Ok(());
    };
    Err(Error::new(Kind::Usage, "keep changes in", show(upper), why).hint("name another directory"))
}

/// Something that is where changes are to be kept.
fn refuse_taken(path: &Path) -> Result<()> {
    if std::fs::symlink_metadata(path).is_err() {
        return Ok(());
    }
    Err(Error::new(Kind::Exists, "find a place for changes", show(path), "something is there already")
        .hint("a rootfs of another state root may use it; if none does, remove it, or choose another --id"))
}

const OP: &str = "find the source of volume";

/// Where a directory is, or will be.
struct Found {
    /// Absolute.
    path: PathBuf,
    /// It, where it is there.
    there: Option<OwnedFd>,
    /// The directories of it that are missing, outermost first.
    missing: Vec<PathBuf>,
}

/// `option` is the one that names it.
fn find_directory(op: &'static str, option: &str, wanted: &Path) -> Result<Found> {
    let nearest = nearest(op, wanted, &|path, e| explain_named(op, path, e))?;
    let fail = |e: Errno| explain_named(op, wanted, e);
    if !FileType::from_raw_mode(fstat(&nearest.found).map_err(fail)?.st_mode).is_dir() {
        return Err(Error::new(
            Kind::Usage,
            op,
            show(&nearest.base),
            format!("it is a file; {option} takes a directory"),
        ));
    }
    let (path, missing) = nearest.beyond();
    let there = missing.is_empty().then_some(nearest.found);
    Ok(Found { path, there, missing })
}

/// Does a path that the user wrote lead to this very file or directory?
pub(super) fn leads_to(wanted: &Path, known: &Identity) -> bool {
    let found = open_named(wanted).and_then(|fd| Place::new(fd, wanted.to_owned()));
    found.is_ok_and(|place| known.is_same(&place.identity()))
}

/// An absolute source exists, or is to be filled and lies in a directory that does.
fn absolute(spec: &VolumeSpec, form: &dyn Fn(&VolumeSpec) -> Result<Form>) -> Result<SeenSource> {
    match open_named(&spec.source) {
        Ok(found) => there(&found, spec),
        // A dangling symlink is not a missing source: it might lead anywhere.
        Err(Errno::NOENT) if spec.fill == Fill::Once && std::fs::symlink_metadata(&spec.source).is_err() => {
            let name = spec.source.file_name().ok_or_else(|| {
                Error::new(Kind::Usage, OP, show(&spec.source), "it is missing and ends with . or ..")
            })?;
            let parent = open_named(spec.source.parent().unwrap_or(Path::new("/"))).map_err(|e| missing(spec, e))?;
            Ok(SeenSource { path: path_of(&parent)?.join(name), missing: 1, form: form(spec)?, is_empty: false })
        }
        Err(e) => Err(missing(spec, e)),
    }
}

fn missing(spec: &VolumeSpec, errno: Errno) -> Error {
    if errno == Errno::XDEV {
        return explain_named(OP, &spec.source, errno);
    }
    Error::sys(OP, format!("{} ({})", spec.target, show(&spec.source)), errno)
        .hint("a source outside the sandbox must exist: create it first")
}

/// A relative source lies below the sandbox: symlinks are followed as long as they stay there.
fn relative(
    spec: &VolumeSpec,
    sandbox: Option<&Found>,
    form: &dyn Fn(&VolumeSpec) -> Result<Form>,
) -> Result<SeenSource> {
    const OP: &str = "make volume source";
    let Some(Found { path, there: sandbox, .. }) = sandbox else {
        let source = show(&spec.source);
        let subject = format!("{} ({source})", spec.target);
        return Err(Error::new(Kind::Usage, self::OP, subject, "it lies below the sandbox, and there is no sandbox")
            .hint(format!("give one with --sandbox DIR, or write ./{source} for a directory below the current one")));
    };
    let Some(sandbox) = sandbox else {
        let missing = spec.source.components().count();
        return Ok(SeenSource { path: path.join(&spec.source), missing, form: form(spec)?, is_empty: false });
    };
    let name = || show(path.join(&spec.source));
    let fail = |e: Errno| match e {
        Errno::XDEV => Error::new(Kind::Usage, OP, name(), "a symlink leads out of the sandbox")
            .hint("name the place itself: an absolute source, or one that begins with ./"),
        e => Error::sys(OP, name(), e),
    };
    match open_within(sandbox, &spec.source, OFlags::PATH) {
        Ok(found) => return there(&found, spec),
        Err(Errno::NOENT) => {}
        Err(e) => return Err(fail(e)),
    }
    let mut at = sandbox.try_clone().map_err(|e| Error::io(OP, name(), e))?;
    let mut prefix = PathBuf::new();
    let mut names = spec.source.components();
    while let Some(next) = names.next() {
        prefix.push(next);
        match open_within(sandbox, &prefix, OFlags::PATH) {
            Ok(found) => at = found,
            Err(Errno::NOENT) if statat(&at, next.as_os_str(), AtFlags::SYMLINK_NOFOLLOW).is_ok() => {
                return Err(Error::new(Kind::NotFound, OP, name(), "a symlink in it leads nowhere")
                    .hint("remove the symlink, or make what it points to"));
            }
            Err(Errno::NOENT) => {
                let rest = names.as_path();
                let mut path = path_of(&at)?.join(next);
                if !rest.as_os_str().is_empty() {
                    path.push(rest);
                }
                return Ok(SeenSource {
                    path,
                    missing: 1 + rest.components().count(),
                    form: form(spec)?,
                    is_empty: false,
                });
            }
            Err(e) => return Err(fail(e)),
        }
    }
    // It came while we looked.
    there(&at, spec)
}

fn there(found: &OwnedFd, spec: &VolumeSpec) -> Result<SeenSource> {
    let fail = |e| Error::sys(OP, show(&spec.source), e);
    let form = match FileType::from_raw_mode(fstat(found).map_err(fail)?.st_mode) {
        FileType::Directory => Form::Directory,
        FileType::RegularFile => Form::File,
        // A socket or a device node (a /dev/null, a control socket) is bound as a file, as `docker -v` does.
        FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo => Form::Special,
        _ => {
            return Err(Error::new(Kind::Usage, OP, show(&spec.source), "it is neither a file nor a directory"));
        }
    };
    let is_empty = spec.fill == Fill::Once
        && form == Form::Directory
        && openat(found, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .and_then(is_empty)
            .map_err(|e| Error::sys("look into volume source", show(&spec.source), e))?;
    Ok(SeenSource { path: path_of(found)?, missing: 0, form, is_empty })
}

/// Where the rootfs will be: the absolute path, and the directories to make for it, outermost first.
fn mount_point(wanted: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    const OP: &str = "find mount point";
    let unusable = |path: &Path, e: Errno| match e {
        Errno::NOTCONN => Error::sys(OP, show(path), e)
            .with_kind(Kind::Busy)
            .hint(format!("a dead FUSE server's mount is there: `fsprov unmount {}` cleans it", show(path))),
        Errno::NOTDIR => Error::sys(OP, show(path), e).hint("something above it is a file; choose another ROOTFS"),
        Errno::NOENT => Error::sys(OP, show(path), e).hint("a symlink in it leads nowhere; choose another ROOTFS"),
        e => explain_named(OP, path, e),
    };
    let nearest = nearest(OP, wanted, &unusable)?;
    let (found, base) = (&nearest.found, &nearest.base);
    // A path is found without asking what lies at its end: a dead mount shows when its root is asked for.
    match fstat(found) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode).is_dir() => {}
        Ok(_) => {
            return Err(Error::new(Kind::Usage, OP, show(base), "it is not a directory")
                .hint("name a directory, or a path that does not exist: it is made"));
        }
        Err(e) => return Err(unusable(base, e)),
    }
    if base == Path::new("/") && nearest.names.is_empty() {
        return Err(Error::new(Kind::Usage, OP, "/", "a rootfs cannot be mounted over the root of this host")
            .hint("choose another directory, for example ./rootfs"));
    }
    Ok(nearest.beyond())
}

/// The end of a path that is there, and what is missing beyond it.
struct Nearest {
    found: OwnedFd,
    /// Where that is, absolute, symlinks resolved.
    base: PathBuf,
    /// The names that are missing, innermost first.
    names: Vec<OsString>,
}

impl Nearest {
    /// The whole path, and the directories of it to make, outermost first.
    fn beyond(&self) -> (PathBuf, Vec<PathBuf>) {
        let mut path = self.base.clone();
        let mut missing = Vec::new();
        for name in self.names.iter().rev() {
            path.push(name);
            missing.push(path.clone());
        }
        (path, missing)
    }
}

/// Find as much of a path as there is.
fn nearest(op: &'static str, wanted: &Path, fail: &dyn Fn(&Path, Errno) -> Error) -> Result<Nearest> {
    let wanted = std::path::absolute(wanted).map_err(|e| Error::io(op, show(wanted), e))?;
    let mut names = Vec::new();
    let mut at = wanted.clone();
    let found = loop {
        match open_named(&at) {
            Ok(found) => break found,
            Err(Errno::NOENT) if std::fs::symlink_metadata(&at).is_err() => {
                let name = at
                    .file_name()
                    .ok_or_else(|| Error::new(Kind::Usage, op, show(&wanted), "a missing part of it is . or .."))?;
                names.push(name.to_owned());
                at.pop();
            }
            Err(e) => return Err(fail(&at, e)),
        }
    };
    let base = path_of(&found)?;
    Ok(Nearest { found, base, names })
}

/// `path` absolute, with symlinks resolved in all but its last component, which may be a mount that does not answer.
pub(super) fn parent_resolved(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let parent = std::fs::canonicalize(path.parent()?).ok()?;
    Some(parent.join(path.file_name()?))
}

/// The name in the sandbox under which a rootfs's own changes are kept.
pub(super) fn changes_name(id: &ContainerId) -> String {
    format!(".fsprov-{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> VolumeSpec {
        VolumeSpec::parse(text.as_ref()).unwrap()
    }

    #[test]
    fn sources_are_found_below_the_sandbox_and_never_outside() {
        let dir = tempfile::tempdir().unwrap();
        let base = std::fs::canonicalize(dir.path()).unwrap();
        std::fs::create_dir_all(base.join("a/b")).unwrap();
        std::os::unix::fs::symlink("/etc", base.join("out")).unwrap();
        std::os::unix::fs::symlink("a/b", base.join("in")).unwrap();
        std::os::unix::fs::symlink("nowhere", base.join("dangling")).unwrap();
        let sandbox = find_directory("open sandbox", "--sandbox", &base).unwrap();
        let find = |text: &str| relative(&spec(text), Some(&sandbox), &|_| Ok(Form::Directory));
        for (text, path, missing) in
            [("a/b:/x", "a/b", 0), ("in:/x", "a/b", 0), ("in/c/d:/x", "a/b/c/d", 2), ("new:/x", "new", 1)]
        {
            let found = find(text).unwrap();
            assert_eq!((found.path, found.missing), (base.join(path), missing), "{text}");
        }
        for bad in ["out:/x", "out/x:/x"] {
            assert_eq!(find(bad).unwrap_err().kind(), Kind::Usage, "{bad}");
        }
        assert_eq!(find("dangling:/x").unwrap_err().kind(), Kind::NotFound);
        let later = find_directory("open sandbox", "--sandbox", &base.join("x/y")).unwrap();
        assert_eq!(later.missing, [base.join("x"), base.join("x/y")]);
        let found = relative(&spec("in/c:/x"), Some(&later), &|_| Ok(Form::Directory)).unwrap();
        assert_eq!((found.path, found.missing), (base.join("x/y/in/c"), 2));
        assert!(!base.join("new").exists() && !base.join("x").exists(), "a look makes nothing");
    }

    #[test]
    fn mount_points_are_absolute_and_say_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let base = std::fs::canonicalize(dir.path()).unwrap();
        std::os::unix::fs::symlink(".", base.join("link")).unwrap();
        let (path, made) = mount_point(&base.join("link/a/b")).unwrap();
        assert_eq!(path, base.join("a/b"));
        assert_eq!(made, [base.join("a"), base.join("a/b")]);
        assert_eq!(mount_point(&base).unwrap(), (base.clone(), vec![]));
        std::fs::write(base.join("file"), "").unwrap();
        assert_eq!(mount_point(&base.join("file")).unwrap_err().kind(), Kind::Usage);
        assert!(mount_point(&base.join("file/below")).is_err());
        std::os::unix::fs::symlink("nowhere", base.join("dangling")).unwrap();
        assert!(mount_point(&base.join("dangling")).is_err());
        assert_eq!(mount_point(Path::new("/")).unwrap_err().kind(), Kind::Usage);
    }
}
