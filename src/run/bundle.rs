//! A bundle: config.json and the files that it names, for a rootfs that is in place.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Access, AtFlags, FileType, Gid, Mode, OFlags, Uid, accessat};
use rustix::io::Errno;

use super::config::{self, Extra, Wanted};
use super::covered::{self, Covered};
use super::files::{self, About};
use super::options::COPY_UP;
use super::user;
use super::{Image, Network, Options, seccomp, users};
use crate::error::{Error, Kind, Result, show};
use crate::id::ContainerId;
use crate::plan::IdRange;
use crate::sys::fs::{explain_named, is_empty, open_in_root, open_named, open_resolved, proc_path};
use crate::sys::mount::mount_id;
use crate::sys::process::ProcessId;
use crate::volume::VolumeSpec;

/// Its name in a rootfs's directory of the state root.
pub(super) const NAME: &str = "bundle";
/// In it: the pid of the container's first process, once it was made.
pub(super) const PID: &str = "pid";
/// In it: which process the runtime is.
const RUNTIME: &str = "runtime.json";

/// The rootfs that a bundle is for.
#[derive(Clone, Debug)]
pub(crate) struct Root {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Can something be made in it? What is mounted on it needs a mount point.
    pub(crate) is_writable: bool,
}

/// A bundle to be written.
#[derive(Debug)]
pub(crate) struct Bundle<'a> {
    /// Its directory, which exists.
    pub(crate) dir: &'a Path,
    /// Its name.
    pub(crate) id: &'a ContainerId,
    /// The rootfs.
    pub(crate) root: &'a Root,
    /// What it is made from.
    pub(crate) image: &'a Image,
    /// What is asked for.
    pub(crate) options: &'a Options,
    /// What is mounted in the rootfs already.
    pub(crate) volumes: &'a [VolumeSpec],
    /// The ids of a user namespace of its own.
    pub(crate) ids: (Vec<IdRange>, Vec<IdRange>),
    /// Who it is where nobody says: the user itself, with `--userns=keep-id`.
    pub(crate) own: Option<(u32, u32)>,
    /// Is it run by root of the machine?
    pub(crate) is_root: bool,
    /// Does the runtime fill a tmpfs with what the image has there?
    pub(crate) copies_up: bool,
    /// The size of the terminal, where that is known.
    pub(crate) console: Option<(u16, u16)>,
    /// Does the runtime start in a mount namespace where volumes are put aside for it?
    pub(crate) puts_aside: bool,
}

/// Where the runtime mounts in any case, and what is below: the kernel's.
const USUAL: [&str; 3] = ["/dev", "/proc", "/sys"];

/// What was written.
#[derive(Debug)]
pub(crate) struct Written {
    args: Vec<String>,
    environment: Vec<String>,
    working_directory: String,
    root: OwnedFd,
    stop_signal: Option<String>,
    covered: Vec<Covered>,
}

impl Bundle<'_> {
    /// Write it.
    pub(crate) fn write(&self) -> Result<Written> {
        let (options, said) = (self.options, &self.image.execution);
        let args = options.args(said)?;
        let working_directory = options.working_directory(said)?;
        let root = open_resolved(&self.root.path).map_err(|e| Error::sys("open rootfs", show(&self.root.path), e))?;
        // It may be another user's: opened once, and what is written replaces what is there.
        let dir = open_named(self.dir).map_err(|e| explain_named("open bundle", self.dir, e))?;
        let identity = self.identity(&root)?;
        let hostname = self.hostname();
        let home = identity.home.clone().unwrap_or_else(|| "/".into());
        let here = |name: &str| std::env::var(name).ok();
        let environment = options.environment(said, &home, &hostname, here);
        let capabilities = options.capabilities()?;
        let (extra, covered) = self.extra(&dir, &root, &hostname)?;
        let seccomp = self.seccomp(&capabilities)?;
        if self.root.is_writable {
            make_directory(&root, &working_directory, users::other_root(&self.ids))?;
        }
        let stop_signal = said.stop_signal.clone();
        let spec = config::spec(&Wanted {
            root: self.root.path.clone(),
            read_only: options.read_only || !self.root.is_writable,
            args: args.clone(),
            environment: environment.clone(),
            working_directory: working_directory.clone(),
            identity,
            terminal: options.terminal,
            hostname,
            network: options.network(),
            ambient: options.ambient()?,
            capabilities,
            extra,
            uids: self.ids.0.clone(),
            gids: self.ids.1.clone(),
            seccomp,
            stop_signal: stop_signal.clone(),
            is_root: self.is_root,
            has_tty_group: users::is_group_mapped(config::TTY_GROUP),
            console: self.console,
        })?;
        config::write(&spec, &dir, self.dir)?;
        Ok(Written { args, environment, working_directory, root, stop_signal, covered })
    }

    fn identity(&self, root: &OwnedFd) -> Result<user::Identity> {
        let files = user::Files::of(root)?;
        if let (None, Some((uid, gid))) = (&self.options.user, self.own) {
            let known = files.find(&uid.to_string())?;
            return Ok(user::Identity { uid, gid, groups: Vec::new(), ..known });
        }
        let said = self.options.user.as_deref().unwrap_or(&self.image.execution.user);
        if said.starts_with('/') {
            // AppC: the owner of that file.
            let path = said.split(':').next().unwrap_or(said);
            let file =
                open_in_root(root, Path::new(path), OFlags::PATH).map_err(|e| Error::sys("find user", path, e))?;
            let stat = rustix::fs::fstat(&file).map_err(|e| Error::sys("find user", path, e))?;
            return Ok(user::Identity { uid: stat.st_uid, gid: stat.st_gid, ..user::Identity::default() });
        }
        let mut identity = files.find(said)?;
        if self.options.user.is_none() {
            identity.groups.extend(&self.image.execution.groups);
        }
        Ok(identity)
    }

    /// Who shares the host's network has its name.
    fn hostname(&self) -> String {
        let of_host = || match self.options.network() {
            Network::Host => Some(rustix::system::uname().nodename().to_string_lossy().into_owned()),
            Network::None => None,
        };
        let id = || self.id.as_str().chars().take(12).collect();
        self.options.hostname.clone().or_else(of_host).filter(|name| !name.is_empty()).unwrap_or_else(id)
    }

    /// What the runtime mounts on top, outer before inner, and the volumes among that.
    fn extra(&self, dir: &OwnedFd, root: &OwnedFd, hostname: &str) -> Result<(Vec<Extra>, Vec<Covered>)> {
        let resolve = |at: &str| covered::resolve(root, Path::new(at));
        let volumes: Vec<PathBuf> =
            self.volumes.iter().map(|volume| covered::resolve(root, volume.target.as_path())).collect();
        let about = About {
            hostname,
            network: self.options.network(),
            id: self.id.as_str(),
            image: &self.image.reference,
            image_id: self.image.id.as_ref().map_or("", |id| id.as_str()),
            is_rootless: !self.is_root,
        };
        let mut all = self.options.tmpfs(&self.image.execution, resolve, &volumes)?;
        if !self.copies_up {
            self.leave_empty(root, &mut all)?;
        }
        let tmpfs: Vec<PathBuf> = all.iter().map(|one| one.at().into()).collect();
        let covered = self.covered(&volumes, &tmpfs)?;
        for file in files::write(dir, self.dir, about)? {
            let place = resolve(file.at());
            if volumes.contains(&place) {
                continue;
            }
            if self.has_point(root, &place, &tmpfs, &volumes) {
                all.push(file);
            } else {
                log::info!(target: super::TARGET, "there is no {}, and it cannot be made: left out", file.at());
            }
        }
        for volume in &covered {
            all.push(volume.extra(root, self.dir)?);
        }
        all.sort_by_key(|one| covered::depth(Path::new(one.at())));
        Ok((all, covered))
    }

    /// The volumes that the runtime would cover.
    fn covered(&self, volumes: &[PathBuf], tmpfs: &[PathBuf]) -> Result<Vec<Covered>> {
        let mut all = Vec::new();
        for volume in volumes {
            let usual = USUAL.iter().map(Path::new);
            let Some(above) = usual.chain(tmpfs.iter().map(PathBuf::as_path)).find(|at| volume.starts_with(at)) else {
                continue;
            };
            let fail = |why: String| Error::new(Kind::Unsupported, "mount volume", show(volume), why);
            if volume == Path::new("/proc") {
                return Err(fail("a container needs the kernel's own /proc".into()).hint("mount it elsewhere"));
            }
            if !self.puts_aside {
                let why = format!("the runtime mounts a file system of its own at {}, on top of it", show(above));
                return Err(fail(why).hint("mount it elsewhere, or use `fsprov run`"));
            }
            all.push(Covered::new(volume.clone(), all.len()));
        }
        Ok(all)
    }

    /// Is there something that a file can be mounted on, or can the runtime make it?
    fn has_point(&self, root: &OwnedFd, at: &Path, tmpfs: &[PathBuf], volumes: &[PathBuf]) -> bool {
        if open_in_root(root, at, OFlags::PATH).is_ok() {
            return true;
        }
        let nearest =
            |all: &[PathBuf]| all.iter().filter(|one| at.starts_with(one)).map(|one| covered::depth(one)).max();
        if nearest(tmpfs) > nearest(volumes) {
            return true;
        }
        let mut above = at.ancestors().skip(1);
        let nearest = above.find_map(|dir| open_in_root(root, dir, OFlags::PATH | OFlags::DIRECTORY).ok());
        // In a volume that is read-only, nothing can be made.
        self.root.is_writable
            && nearest.is_some_and(|dir| accessat(dir, ".", Access::WRITE_OK, AtFlags::empty()).is_ok())
    }

    /// For a runtime that does not fill a tmpfs: refused where someone asked for one upon files of the image.
    fn leave_empty(&self, root: &OwnedFd, all: &mut [Extra]) -> Result<()> {
        for one in all {
            let Extra::Tmpfs { at, options } = one else { continue };
            let path = |text: &str| covered::resolve(root, Path::new(text.split(':').next().unwrap_or("")));
            let is_asked = self.options.tmpfs.iter().any(|text| path(text) == Path::new(at));
            let found = open_in_root(root, Path::new(at), OFlags::RDONLY | OFlags::DIRECTORY);
            let has_files = found.is_ok_and(|dir| !is_empty(dir).unwrap_or(true));
            if is_asked && has_files && options.iter().any(|option| option == COPY_UP) {
                let why = "this runtime does not fill a tmpfs with what the image has there";
                return Err(Error::new(Kind::Unsupported, "make tmpfs", &*at, why)
                    .hint(format!("write --tmpfs {at}:no{COPY_UP} for an empty one, or use --runtime crun or runc")));
            }
            options.retain(|option| option != COPY_UP);
        }
        Ok(())
    }

    fn seccomp(&self, capabilities: &BTreeSet<String>) -> Result<Option<oci_spec::runtime::LinuxSeccomp>> {
        match self.options.seccomp.as_deref() {
            Some("none" | "unconfined") => Ok(None),
            Some(path) => seccomp::load(Path::new(path), capabilities).map(Some),
            None => seccomp::installed().map(|path| seccomp::load(&path, capabilities)).transpose(),
        }
    }
}

impl Written {
    /// The exit code of a program that is not there, or that cannot be run, and why: runtimes have words of their own for it, each others.
    pub(crate) fn check_program(&self) -> Option<(u8, Error)> {
        let name = self.args.first()?;
        let path = self.environment.iter().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or(super::options::PATH);
        let places: Vec<PathBuf> = if name.contains('/') {
            vec![Path::new(&self.working_directory).join(name)]
        } else {
            path.split(':').map(|dir| Path::new(&self.working_directory).join(dir).join(name)).collect()
        };
        let fail = |code, kind, why: &str| Some((code, Error::new(kind, "run", name, why)));
        let mut refused = None;
        for place in &places {
            // What is mounted there is not there yet.
            if ["/proc", "/dev", "/sys"].iter().any(|dir| place.starts_with(dir)) {
                return None;
            }
            let Ok(found) = open_in_root(&self.root, place, OFlags::PATH) else { continue };
            let Ok(stat) = rustix::fs::fstat(&found) else { return None };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile if stat.st_mode & 0o111 != 0 => {
                    let why = self.check_format(&found)?;
                    return fail(super::NOT_RUN, Kind::Invalid, &why);
                }
                FileType::Directory => refused = Some("it is a directory"),
                _ => refused = Some("it is not a program that may be run (no x in its mode)"),
            }
        }
        match refused {
            Some(why) if name.contains('/') => fail(super::NOT_RUN, Kind::Permission, why),
            _ => fail(super::NOT_FOUND, Kind::NotFound, "the image has no such program"),
        }
    }

    /// Why the kernel does not run this file (execve(2), ENOEXEC and ENOENT): a runtime says that when the program is to begin, and exits with 1.
    fn check_format(&self, program: &OwnedFd) -> Option<String> {
        let mut begin = [0; 256];
        // The file that was looked at, whatever its name leads to by now.
        let file = std::fs::File::open(proc_path(program)).ok()?;
        let size = rustix::io::read(&file, &mut begin).ok()?;
        let begin = &begin[..size];
        if let Some(line) = begin.strip_prefix(b"#!") {
            let line = line.split(|b| *b == b'\n').next().unwrap_or_default().trim_ascii();
            let path = Path::new(std::str::from_utf8(line.split(u8::is_ascii_whitespace).next()?).ok()?);
            let is_to_be_mounted = ["/proc", "/dev", "/sys"].iter().any(|dir| path.starts_with(dir));
            let is_missing =
                path.is_absolute() && matches!(open_in_root(&self.root, path, OFlags::PATH), Err(Errno::NOENT));
            return (is_missing && !is_to_be_mounted)
                .then(|| format!("the image lacks its interpreter {}", show(path)));
        }
        // Other formats are registered there (binfmt_misc).
        let others = std::fs::read_dir("/proc/sys/fs/binfmt_misc").map_or(0, Iterator::count);
        let is_program = begin.starts_with(b"\x7fELF") || others > 2;
        (!is_program).then(|| "its format is unknown: it is neither ELF nor a script that begins with #!".to_owned())
    }

    /// The volumes that are to be put aside.
    pub(super) fn covered(&self) -> &[Covered] {
        &self.covered
    }

    /// The signal that the image says stops it.
    pub(crate) fn stop_signal(&self) -> Option<&str> {
        self.stop_signal.as_deref()
    }
}

/// Make a directory in the rootfs with those that it lies in; links are followed within. `owner`: whose they are, if not this process's user's.
fn make_directory(root: &OwnedFd, path: &str, owner: Option<(u32, u32)>) -> Result<()> {
    const OP: &str = "make working directory";
    let mut at = PathBuf::from("/");
    let rootfs = mount_id(root)?;
    for part in Path::new(path).components().filter(|part| matches!(part, Component::Normal(_))) {
        let parent = open_in_root(root, &at, OFlags::PATH | OFlags::DIRECTORY).map_err(|e| Error::sys(OP, path, e))?;
        // What is made in a volume is the user's own.
        let owner = if mount_id(&parent)? == rootfs { owner } else { None };
        let own = || owner.map_or(Ok(()), |owner| give(&parent, part.as_os_str(), owner));
        match rustix::fs::mkdirat(&parent, part.as_os_str(), Mode::from_raw_mode(0o755)).and_then(|()| own()) {
            Ok(()) | Err(Errno::EXIST) => {}
            // A volume that is read-only: the runtime says so, if it matters.
            Err(Errno::ROFS) => return Ok(()),
            Err(e) => return Err(Error::sys(OP, path, e)),
        }
        at.push(part);
    }
    Ok(())
}

fn give(parent: &OwnedFd, name: &std::ffi::OsStr, (uid, gid): (u32, u32)) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

/// Note the runtime, for what takes away what this process leaves.
pub(super) fn note_runtime(bundle: &Path, runtime: ProcessId) -> Result<()> {
    let text = serde_json::to_vec(&runtime).map_err(|e| Error::new(Kind::Io, "write", RUNTIME, e))?;
    std::fs::write(bundle.join(RUNTIME), text).map_err(|e| Error::io("write", show(bundle.join(RUNTIME)), e))
}

/// The runtime that was noted.
pub(super) fn runtime(bundle: &Path) -> Option<ProcessId> {
    serde_json::from_slice(&std::fs::read(bundle.join(RUNTIME)).ok()?).ok()
}

/// How long between two looks for what a runtime tells.
const LOOK: Duration = Duration::from_millis(20);

/// The container's first process. runc writes its pid only after the program has started, so this waits for it while the runtime lives, up to
/// `patience`. `None`: the process has ended, or there never was one.
pub(super) fn first_process_of(bundle: &Path, runtime: Option<ProcessId>, patience: Duration) -> Option<ProcessId> {
    let until = Instant::now() + patience;
    loop {
        // Asked first: it may tell, and end, between two looks.
        let is_alive = runtime.is_some_and(ProcessId::is_alive);
        let first = first_process(bundle);
        if first.is_some() || bundle.join(PID).exists() || !is_alive || Instant::now() >= until {
            return first;
        }
        std::thread::sleep(LOOK);
    }
}

/// The container's first process, if it was made and is still there.
pub(super) fn first_process(bundle: &Path) -> Option<ProcessId> {
    let pid = std::fs::read_to_string(bundle.join(PID)).ok()?.trim().parse().ok()?;
    ProcessId::of(pid).ok().filter(|process| process.is_alive())
}
