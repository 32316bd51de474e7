//! What this machine and this user may do, found by trying, once. No policy: who may use a finding decides what it means.
//!
//! Cheap questions are asked by [`Host::probe`]; those that need a child process or a file system instance are asked when
//! somebody wants the answer, and kept.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{self, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags};
use serde::ser::SerializeStruct as _;
use serde::{Serialize, Serializer};

use crate::error::show;
use crate::plan::BackendKind;
use crate::sys::{mount as sysmount, overlay, process};

/// One finding: possible, or not with the reason and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finding {
    /// It was tried and works.
    Yes,
    /// It was tried and does not.
    No {
        /// What was tried and what came back.
        reason: String,
        /// What would change it; empty where nothing would.
        remedy: String,
    },
}

impl Finding {
    /// A refusal.
    pub fn no(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding::No { reason: reason.into(), remedy: remedy.into() }
    }

    /// Does it work?
    pub fn is_yes(&self) -> bool {
        *self == Finding::Yes
    }
}

/// What this machine and this user may do.
#[derive(Clone, Debug)]
pub struct Host {
    /// Effective user id, as this namespace shows it.
    pub euid: u32,
    /// The kernel's release, for display: nothing is decided by it.
    pub kernel: String,
    /// Is this the machine's first user namespace?
    pub initial_user_namespace: bool,
    /// Is no_new_privs set (prctl(2))? Then no setuid program helps.
    pub no_new_privs: bool,
    /// May this process mount in its mount namespace?
    pub mount: Finding,
    /// Has the kernel open_tree, move_mount and mount_setattr (Linux 5.12)?
    pub new_mount_api: Finding,
    /// Can /dev/fuse be opened?
    pub fuse_device: Finding,
    /// Is there a fusermount3 that may mount for an ordinary user?
    pub fusermount: Finding,
    /// Where it is.
    pub fusermount_path: Option<PathBuf>,
    /// Does /etc/fuse.conf let ordinary users say allow_other?
    pub user_allow_other: Finding,
    missing_calls: Vec<&'static str>,
    user_namespaces: OnceLock<Finding>,
    overlay: OnceLock<Finding>,
    idmapped_mounts: OnceLock<Finding>,
    /// Shared by all copies of this value.
    learned: Arc<Mutex<Vec<(BackendKind, Finding)>>>,
}

impl Host {
    /// Try what is cheap; a millisecond or so.
    pub fn probe() -> Self {
        let no_new_privs = rustix::thread::no_new_privs().unwrap_or(false);
        let missing_calls = sysmount::missing_calls();
        let (fusermount_path, fusermount) = find_fusermount(no_new_privs);
        Host {
            euid: rustix::process::geteuid().as_raw(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            initial_user_namespace: process::in_initial_user_namespace().unwrap_or(false),
            no_new_privs,
            mount: try_mounting(),
            new_mount_api: judge_new_calls(&missing_calls),
            missing_calls,
            fuse_device: try_fuse_device(),
            fusermount,
            fusermount_path,
            user_allow_other: read_fuse_conf(Path::new(FUSE_CONF)),
            user_namespaces: OnceLock::new(),
            overlay: OnceLock::new(),
            idmapped_mounts: OnceLock::new(),
            learned: Arc::default(),
        }
    }

    /// Major and minor number of the kernel; zeros if it does not say.
    pub(crate) fn kernel_version(&self) -> (u32, u32) {
        let mut numbers = self.kernel.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }

    /// Mounting by this backend failed because the kernel lacks something, though it had seemed to work.
    pub fn learn(&self, backend: BackendKind, no: Finding) {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner).push((backend, no));
    }

    /// Why mounting by this backend failed before, if it did.
    pub fn learned(&self, backend: BackendKind) -> Option<Finding> {
        let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        learned.iter().find(|(of, _)| *of == backend).map(|(_, no)| no.clone())
    }

    /// Which of open_tree, move_mount and mount_setattr the kernel, or a seccomp filter, lacks.
    pub fn missing_calls(&self) -> &[&'static str] {
        &self.missing_calls
    }

    /// May this user make a user namespace and mount in it?
    pub fn user_namespaces(&self) -> &Finding {
        self.user_namespaces.get_or_init(try_user_namespaces)
    }

    /// May this process mount overlayfs in its mount namespace?
    pub fn overlay(&self) -> &Finding {
        self.overlay.get_or_init(|| match &self.mount {
            Finding::Yes => try_overlay(!self.initial_user_namespace),
            no @ Finding::No { .. } => no.clone(),
        })
    }

    /// May this process make idmapped mounts of the machine's file systems?
    pub fn idmapped_mounts(&self) -> &Finding {
        self.idmapped_mounts.get_or_init(|| match &self.mount {
            Finding::Yes if self.initial_user_namespace => try_idmap(),
            Finding::Yes => Finding::no(
                "an idmapped mount needs CAP_SYS_ADMIN in the user namespace that mounted the file system",
                "run as root outside the user namespace, or use --backend fuse",
            ),
            no @ Finding::No { .. } => no.clone(),
        })
    }
}

impl Serialize for Host {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_struct("Host", 13)?;
        map.serialize_field("euid", &self.euid)?;
        map.serialize_field("kernel", &self.kernel)?;
        map.serialize_field("initial_user_namespace", &self.initial_user_namespace)?;
        map.serialize_field("no_new_privs", &self.no_new_privs)?;
        map.serialize_field("mount", &self.mount)?;
        map.serialize_field("new_mount_api", &self.new_mount_api)?;
        map.serialize_field("fuse_device", &self.fuse_device)?;
        map.serialize_field("fusermount", &self.fusermount)?;
        map.serialize_field("fusermount_path", &self.fusermount_path.as_ref().map(show))?;
        map.serialize_field("user_allow_other", &self.user_allow_other)?;
        map.serialize_field("user_namespaces", self.user_namespaces())?;
        map.serialize_field("overlay", self.overlay())?;
        map.serialize_field("idmapped_mounts", self.idmapped_mounts())?;
        map.end()
    }
}

/// What helps an ordinary user who may not mount.
fn mount_remedy() -> String {
    match process::user_namespace_switch() {
        None => "run as root, or inside `unshare -Urm`, or use --backend fuse".into(),
        Some(switch) => {
            format!("run as root, or use --backend fuse; this host forbids `unshare -Urm` ({switch})")
        }
    }
}

fn try_mounting() -> Finding {
    // Both calls check the right to mount before anything else and change nothing: an unused file system context goes away
    // with its descriptor; MNT_EXPIRE never unmounts the first time, and this is not a mount point.
    let tried = match mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC) {
        Err(Errno::NOSYS) => match mount::unmount("/proc/self/fdinfo", UnmountFlags::EXPIRE) {
            Err(Errno::INVAL | Errno::AGAIN | Errno::BUSY) => Ok(()),
            other => other,
        },
        other => other.map(drop),
    };
    match tried {
        Ok(()) => Finding::Yes,
        Err(Errno::PERM) => Finding::no("needs root (CAP_SYS_ADMIN over this mount namespace)", mount_remedy()),
        Err(e) => Finding::no(format!("trying to mount: {}", text(e)), mount_remedy()),
    }
}

fn judge_new_calls(missing: &[&str]) -> Finding {
    if missing.is_empty() {
        return Finding::Yes;
    }
    Finding::no(
        format!("this kernel, or a seccomp filter, lacks {}", missing.join(", ")),
        "none needed: mount(2) is used instead; Linux 5.12 closes the moment in which a bind mount is writable",
    )
}

fn try_fuse_device() -> Finding {
    const DEVICE: &str = "/dev/fuse";
    let reason = |e: Errno| format!("open {DEVICE}: {}", text(e));
    match fs::openat(CWD, DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Finding::Yes,
        Err(e @ Errno::NOENT) => Finding::no(
            reason(e),
            "as root: modprobe fuse, or mknod -m 666 /dev/fuse c 10 229; in a container: give it the device",
        ),
        Err(e @ (Errno::NODEV | Errno::NXIO)) => Finding::no(reason(e), "as root: modprobe fuse"),
        Err(e @ Errno::ACCESS) => {
            Finding::no(reason(e), "as root: chmod 666 /dev/fuse, or install the package fuse3, which does so at boot")
        }
        Err(e @ Errno::PERM) => Finding::no(reason(e), "the container's device cgroup forbids it: allow c 10:229"),
        Err(e) => Finding::no(reason(e), ""),
    }
}

const FUSERMOUNT: &str = "fusermount3";
/// Where it is looked for besides PATH: ordinary users' PATH may lack the directories of system programs.
const USUAL_DIRS: &str = "/usr/bin:/bin:/usr/local/bin:/usr/sbin:/sbin";

fn find_fusermount(no_new_privs: bool) -> (Option<PathBuf>, Finding) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(std::env::split_paths(USUAL_DIRS));
    let found = places
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(FUSERMOUNT))
        .find(|path| fs::access(path, fs::Access::EXEC_OK).is_ok() && path.is_file());
    let Some(path) = found else {
        return (None, Finding::no(format!("there is no {FUSERMOUNT}"), "as root: install the package fuse3"));
    };
    let finding = judge_fusermount(&path, no_new_privs);
    (Some(path), finding)
}

fn judge_fusermount(path: &Path, no_new_privs: bool) -> Finding {
    let name = show(path);
    if no_new_privs {
        return Finding::no(
            format!("no_new_privs is set: {name} would not gain the right to mount"),
            "start outside the sandbox that set it, or inside `unshare -Urm`",
        );
    }
    match fs::stat(path) {
        Ok(stat) if stat.st_uid == 0 && stat.st_mode & libc::S_ISUID != 0 => {}
        Ok(_) if has_file_capabilities(path) => {}
        Ok(stat) => {
            let (how, remedy) = if stat.st_mode & libc::S_ISUID == 0 {
                ("is not setuid", format!("as root: chown root {name} && chmod 4755 {name}"))
            } else if crate::sys::process::in_initial_user_namespace().unwrap_or(true) {
                ("is setuid, but not to root", format!("as root: chown root {name} && chmod 4755 {name}"))
            } else {
                (
                    "belongs to nobody in this user namespace",
                    "use a mount namespace of its own, too: `unshare -Urm`".into(),
                )
            };
            return Finding::no(format!("{name} {how}"), remedy);
        }
        Err(e) => return Finding::no(format!("stat {name}: {}", text(e)), ""),
    }
    match fs::statvfs(path) {
        Ok(stat) if stat.f_flag.contains(fs::StatVfsMountFlags::NOSUID) => {
            Finding::no(format!("{name} lies on a mount with nosuid"), "install fuse3 where setuid programs work")
        }
        _ => Finding::Yes,
    }
}

fn has_file_capabilities(path: &Path) -> bool {
    fs::getxattr(path, "security.capability", &mut [0_u8; 64][..]).is_ok()
}

const FUSE_CONF: &str = "/etc/fuse.conf";

fn read_fuse_conf(path: &Path) -> Finding {
    let remedy = format!("as root: echo user_allow_other >> {}", show(path));
    match std::fs::read(path) {
        // On a line by itself (fuse.conf(5)).
        Ok(text) if text.split(|&b| b == b'\n').any(|line| line.trim_ascii() == b"user_allow_other") => Finding::Yes,
        Ok(_) => Finding::no(format!("{} has no line user_allow_other", show(path)), remedy),
        Err(e) => Finding::no(format!("read {}: {e}", show(path)), remedy),
    }
}

fn try_user_namespaces() -> Finding {
    let e = match process::try_mounting_in_user_namespace() {
        Ok(()) => return Finding::Yes,
        Err(e) => e,
    };
    let (reason, remedy) = match e.step {
        process::UserNamespaceStep::Create => ("make a user namespace", process::user_namespace_remedy(e.errno)),
        // Made, but without rights in it: AppArmor's restriction (Ubuntu 23.10 and later) shows like this.
        process::UserNamespaceStep::Mount => (
            "mount inside a user namespace",
            "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with userns",
        ),
    };
    Finding::no(format!("{reason}: {}", text(e.errno)), remedy)
}

/// As provisioning mounts it, with two directories that every machine has and that do not hold each other; it is seen nowhere.
fn try_overlay(userxattr: bool) -> Finding {
    let open = |path| fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let Ok(lower) = ["/usr", "/etc"].into_iter().map(open).collect::<Result<Vec<_>, _>>() else { return Finding::Yes };
    let lower: Vec<_> = lower.iter().map(AsFd::as_fd).collect();
    match overlay::detached(&overlay::Stack {
        lower: &lower,
        upper: None,
        userxattr,
        attrs: sysmount::AttrSet::default(),
    }) {
        Ok(_) => Finding::Yes,
        // Before Linux 5.2 only the list of file systems tells.
        Err(overlay::Failure::NotDetached) => match std::fs::read_to_string("/proc/filesystems") {
            Ok(list) if list.contains("\toverlay\n") => Finding::Yes,
            _ => no_overlay(),
        },
        Err(overlay::Failure::Refused { errno, said }) => judge_overlay(errno, &said),
    }
}

fn judge_overlay(errno: Errno, said: &str) -> Finding {
    match errno {
        Errno::NODEV => no_overlay(),
        Errno::PERM => {
            Finding::no("overlayfs in a user namespace: Operation not permitted", "Linux 5.11, or --backend fuse")
        }
        // The trial's own directories are in the way (on a file system that overlayfs does not take): undecided, and the real attempt
        // will say so.
        Errno::INVAL => {
            log::debug!(target: "fsprov::host", "overlay of /usr and /etc: {said}");
            Finding::Yes
        }
        e => Finding::no(format!("mount an overlay: {}", text(e)), "use --backend fuse"),
    }
}

fn no_overlay() -> Finding {
    Finding::no("this kernel has no overlayfs", "as root: modprobe overlay")
}

fn try_idmap() -> Finding {
    let reason =
        |e: Errno| Finding::no(format!("make an idmapped mount: {}", text(e)), "Linux 5.12, or --backend fuse");
    let tree = match detached_tmpfs() {
        Ok(tree) => tree,
        Err(e) => return reason(e),
    };
    let namespace = process::UserNamespace::with_maps("0 1 1\n", "0 1 1\n").and_then(|held| held.open());
    let namespace = match namespace {
        Ok(fd) => fd,
        Err(e) => return Finding::no(format!("make a user namespace: {}", e.cause()), e.remedy()),
    };
    let attrs = sysmount::AttrSet { idmap: Some(std::os::fd::AsFd::as_fd(&namespace)), ..sysmount::AttrSet::default() };
    match sysmount::set_attr(&tree, &attrs) {
        // tmpfs itself takes it since Linux 6.3 only; ext4 and xfs do since 5.12. The real attempt decides.
        Ok(()) | Err(Errno::INVAL) => Finding::Yes,
        Err(e) => reason(e),
    }
}

fn detached_tmpfs() -> rustix::io::Result<OwnedFd> {
    let context = mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    mount::fsconfig_create(&context)?;
    mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

fn text(errno: Errno) -> String {
    std::io::Error::from(errno).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_answers_and_serializes() {
        let host = Host::probe();
        assert!(!host.kernel.is_empty());
        let json = serde_json::to_value(&host).unwrap();
        for key in
            ["mount", "new_mount_api", "fuse_device", "fusermount", "user_namespaces", "overlay", "idmapped_mounts"]
        {
            let finding = &json[key];
            let why = finding["no"]["reason"].as_str().unwrap_or_default();
            assert!(finding == "yes" || !why.is_empty(), "{key}: {finding}");
        }
    }

    #[test]
    fn an_ordinary_user_may_not_mount_and_is_told_what_helps() {
        let host = Host::probe();
        let has = crate::sys::process::effective_caps().unwrap().contains(rustix::thread::CapabilitySet::SYS_ADMIN);
        if let Finding::No { remedy, .. } = &host.mount {
            assert!(remedy.contains("--backend fuse"));
            assert_eq!(host.overlay(), &host.mount);
            assert_eq!(host.idmapped_mounts(), &host.mount);
        } else {
            assert!(has, "it may mount without the capability");
        }
    }

    #[test]
    fn fuse_conf() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("fuse.conf");
        assert!(!read_fuse_conf(&conf).is_yes());
        for (text, want) in [
            ("", false),
            ("#user_allow_other\n", false),
            ("user_allow_others\n", false),
            ("mount_max = 3\n  user_allow_other \n", true),
        ] {
            std::fs::write(&conf, text).unwrap();
            assert_eq!(read_fuse_conf(&conf).is_yes(), want, "{text:?}");
        }
    }

    #[test]
    fn a_fusermount_that_cannot_gain_rights_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FUSERMOUNT);
        std::fs::write(&file, "").unwrap();
        let reason = |finding| match finding {
            Finding::No { reason, .. } => reason,
            Finding::Yes => "yes".to_owned(),
        };
        assert!(reason(judge_fusermount(&file, false)).ends_with("is not setuid"));
        assert!(reason(judge_fusermount(&file, true)).starts_with("no_new_privs is set"));
        assert!(reason(judge_fusermount(Path::new("/nowhere/x"), false)).starts_with("stat /nowhere/x"));
    }
}
