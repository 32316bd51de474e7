//! Overlayfs mounts, detached, of directories by descriptor, in the newest way that the kernel has.
//!
//! Provisioning and the host's probe both mount here, so that the one promises what the other can do. What an older kernel answers to
//! a newer way is named here and nowhere else: `Reason`.

use std::fmt::Write as _;
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self, Mode, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{self as calls, FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags};

use super::mount::{self, AttrSet, Depth};
use crate::error::{Error, Kind, Result, show};

const TARGET: &str = "fsprov::overlay";
const SOURCE: &str = "fsprov";

/// What every overlay of ours is told. Layers come from outside: attributes in them that make overlayfs follow paths
/// (redirect_dir) or take data from elsewhere (metacopy) are not heeded.
const OPTIONS: [(&str, &str); 3] = [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off")];

/// For the upper layer: it ends with the mount, so nothing need be brought to the disk, at unmounting above all (Linux 5.10).
const VOLATILE: &str = "volatile";

/// Longest string that fsconfig(2) takes: 256 bytes with its end.
const MAX_STRING: usize = 255;
/// One page of options for mount(2), less its end.
const MAX_OPTIONS: usize = 4095;

/// What to mount over each other.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    /// The lower layers, bottom first: one alone only below an upper one.
    pub lower: &'a [BorrowedFd<'a>],
    /// Where changes go. `None`: the overlay is read-only.
    pub upper: Option<Upper<'a>>,
    /// Keep overlayfs's marks in `user.` attributes, as it must outside the machine's first user namespace (Linux 5.11)?
    pub userxattr: bool,
    /// Flags that its mount has beside those of the layers: nosuid, nodev.
    pub attrs: AttrSet<'a>,
}

/// Two directories of one file system.
#[derive(Clone, Copy, Debug)]
pub struct Upper<'a> {
    /// What was changed.
    pub changes: BorrowedFd<'a>,
    /// What overlayfs works in.
    pub work: BorrowedFd<'a>,
}

/// Why there is no detached overlay.
#[derive(Debug)]
pub enum Failure {
    /// Only mount(2) takes it, which [`mount_at`] does: there is no fsopen(2), or one string for all layers, and they are too many.
    NotDetached,
    /// The kernel refuses it.
    Refused {
        /// With this.
        errno: Errno,
        /// And these words; empty where it has none.
        said: String,
    },
}

/// What a way is refused for: the next older one may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// fsconfig(2) takes a path here, not a descriptor.
    Descriptor,
    /// Overlayfs takes all layers at once, not one by one.
    LayerByLayer,
    /// There are no such system calls.
    Calls,
}

impl Reason {
    /// What the answer to setting a directory means; `None`: it is an answer to this directory.
    fn of_directory(errno: Errno) -> Option<Self> {
        match errno {
            // EINVAL: overlayfs before Linux 6.13. EBADF: an O_PATH descriptor, before 6.15.
            Errno::INVAL | Errno::BADF => Some(Reason::Descriptor),
            // Overlayfs before 6.5, which has all its options from one string.
            Errno::OPNOTSUPP => Some(Reason::LayerByLayer),
            _ => Reason::of_call(errno),
        }
    }

    /// What the answer to a path means: `lowerdir+` is EINVAL before Linux 6.7.
    fn of_path(errno: Errno) -> Option<Self> {
        if errno == Errno::INVAL { Some(Reason::LayerByLayer) } else { Reason::of_call(errno) }
    }

    /// Before Linux 5.2, or a seccomp filter.
    fn of_call(errno: Errno) -> Option<Self> {
        (errno == Errno::NOSYS).then_some(Reason::Calls)
    }
}

/// A way that did not work.
struct Refusal {
    reason: Option<Reason>,
    errno: Errno,
    said: String,
}

impl From<Refusal> for Failure {
    fn from(Refusal { reason, errno, said }: Refusal) -> Self {
        if reason == Some(Reason::Calls) { Failure::NotDetached } else { Failure::Refused { errno, said } }
    }
}

/// The overlay of `stack`, mounted nowhere yet. Its flags (nosuid, nodev, noexec) are those that its layers have together.
pub fn detached(stack: &Stack<'_>) -> std::result::Result<OwnedFd, Failure> {
    match try_detached(stack, Lower::OneByOne) {
        Err(Refusal { reason: Some(Reason::LayerByLayer), .. }) => {}
        other => return other.map_err(Failure::from),
    }
    log::debug!(target: TARGET, "this kernel has no fsconfig lowerdir+ (Linux 6.7): one string for all layers");
    let lower = lowerdir(stack);
    if lower.len() > MAX_STRING {
        return Err(Failure::NotDetached);
    }
    try_detached(stack, Lower::Together(&lower)).map_err(Failure::from)
}

/// How the lower layers are told.
#[derive(Clone, Copy)]
enum Lower<'a> {
    OneByOne,
    Together(&'a str),
}

fn try_detached(stack: &Stack<'_>, lower: Lower<'_>) -> std::result::Result<OwnedFd, Refusal> {
    let early = |errno| Refusal { reason: Reason::of_call(errno), errno, said: String::new() };
    let attrs = flags_of(stack).map_err(early)?;
    let context = calls::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(early)?;
    let fail = |errno| Refusal { reason: Reason::of_call(errno), errno, said: messages(&context) };
    let fail_for = |(reason, errno)| Refusal { reason, errno, said: messages(&context) };
    calls::fsconfig_set_string(&context, "source", SOURCE).map_err(fail)?;
    match lower {
        Lower::OneByOne => {
            for layer in stack.lower.iter().rev() {
                set_directory(&context, "lowerdir+", layer.as_fd()).map_err(fail_for)?;
            }
        }
        Lower::Together(all) => calls::fsconfig_set_string(&context, "lowerdir", all).map_err(fail)?,
    }
    if let Some(Upper { changes, work }) = stack.upper {
        for (key, directory) in [("upperdir", changes), ("workdir", work)] {
            match lower {
                Lower::OneByOne => set_directory(&context, key, directory).map_err(fail_for)?,
                Lower::Together(_) => {
                    calls::fsconfig_set_string(&context, key, magic(directory)).map_err(fail)?;
                }
            }
        }
        calls::fsconfig_set_flag(&context, VOLATILE).map_err(fail)?;
    }
    for (key, value) in OPTIONS {
        calls::fsconfig_set_string(&context, key, value).map_err(fail)?;
    }
    if stack.userxattr {
        calls::fsconfig_set_flag(&context, USERXATTR).map_err(fail)?;
    }
    calls::fsconfig_create(&context).map_err(fail)?;
    calls::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attrs).map_err(fail)
}

fn set_directory(
    context: &OwnedFd,
    key: &str,
    directory: BorrowedFd<'_>,
) -> std::result::Result<(), (Option<Reason>, Errno)> {
    // A descriptor first: the mount table shows the directory's name then, and not our path to it.
    match calls::fsconfig_set_fd(context, key, directory).map_err(|e| (Reason::of_directory(e), e)) {
        Err((Some(Reason::Descriptor), _)) => {
            calls::fsconfig_set_string(context, key, magic(directory)).map_err(|e| (Reason::of_path(e), e))
        }
        other => other,
    }
}

const USERXATTR: &str = "userxattr";

/// The flags that layers' mounts have stay: overlayfs itself forgets them.
fn flags_of(stack: &Stack<'_>) -> rustix::io::Result<MountAttrFlags> {
    let mut attrs = MountAttrFlags::empty();
    attrs.set(MountAttrFlags::MOUNT_ATTR_RDONLY, stack.upper.is_none());
    attrs.set(MountAttrFlags::MOUNT_ATTR_NOSUID, stack.attrs.nosuid);
    attrs.set(MountAttrFlags::MOUNT_ATTR_NODEV, stack.attrs.nodev);
    for layer in stack.lower {
        let flags = fs::fstatvfs(layer)?.f_flag;
        for (has, keeps) in [
            (StatVfsMountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
            (StatVfsMountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
            (StatVfsMountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        ] {
            attrs.set(keeps, attrs.contains(keeps) || flags.contains(has));
        }
    }
    Ok(attrs)
}

/// Short, and without any character that would have to be escaped.
fn magic(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn lowerdir(stack: &Stack<'_>) -> String {
    stack.lower.iter().rev().map(|layer| magic(layer.as_fd())).collect::<Vec<_>>().join(":")
}

/// Most messages read from a file system context, one a read: the kernel keeps eight.
const MAX_MESSAGES: usize = 8;

fn messages(context: &OwnedFd) -> String {
    let Ok(duplicate) = context.try_clone() else { return String::new() };
    let mut file = std::fs::File::from(duplicate);
    let mut said = Vec::new();
    let mut buffer = [0_u8; 512];
    for _ in 0..MAX_MESSAGES {
        match file.read(&mut buffer) {
            Ok(length) if length > 0 => said.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned()),
            _ => break,
        }
    }
    said.join("; ")
}

/// The same by mount(2), built at `stage`, a directory that nobody else can enter, made if it is missing; a detached copy of it comes back.
/// Every flag is there from the first instant, so mount_setattr(2) (Linux 5.12) is not needed.
pub fn mount_at(stack: &Stack<'_>, stage: &Path) -> Result<OwnedFd> {
    const OP: &str = "make overlay at";
    let fail = |e: Errno| Error::sys(OP, show(stage), e);
    let mut options = format!("lowerdir={}", lowerdir(stack));
    for (key, value) in OPTIONS {
        let _ = write!(options, ",{key}={value}");
    }
    if let Some(Upper { changes, work }) = stack.upper {
        let _ = write!(options, ",upperdir={},workdir={},{VOLATILE}", magic(changes), magic(work));
    }
    if stack.userxattr {
        let _ = write!(options, ",{USERXATTR}");
    }
    if options.len() > MAX_OPTIONS {
        let layers = format!("{} layers", stack.lower.len());
        return Err(Error::new(Kind::Unsupported, OP, layers, "one page of mount options is too small")
            .hint("Linux 6.7 takes up to 500 layers; or use --backend fuse"));
    }
    let data = std::ffi::CString::new(options).map_err(|e| Error::new(Kind::Io, OP, show(stage), e))?;
    match fs::mkdir(stage, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(fail(e)),
    }
    let attrs = flags_of(stack).map_err(fail)?;
    calls::mount(SOURCE, stage, "overlay", classic(attrs), Some(data.as_c_str())).map_err(fail)?;
    // Private before it is copied: a copy of a shared mount is its peer.
    let taken = calls::mount_change(stage, MountPropagationFlags::PRIVATE)
        .and_then(|()| fs::open(stage, fs::OFlags::PATH | fs::OFlags::NOFOLLOW | fs::OFlags::CLOEXEC, Mode::empty()))
        .and_then(|root| mount::open_tree_clone(&root, Depth::One))
        .map_err(fail);
    let undone = mount::unmount(stage, mount::Unmount::Lazy).map_err(fail);
    match taken {
        Ok(tree) => undone.map(|()| tree),
        Err(e) => Err(e.with_undo(undone)),
    }
}

fn classic(attrs: MountAttrFlags) -> MountFlags {
    [
        (MountAttrFlags::MOUNT_ATTR_RDONLY, MountFlags::RDONLY),
        (MountAttrFlags::MOUNT_ATTR_NOSUID, MountFlags::NOSUID),
        (MountAttrFlags::MOUNT_ATTR_NODEV, MountFlags::NODEV),
        (MountAttrFlags::MOUNT_ATTR_NOEXEC, MountFlags::NOEXEC),
    ]
    .into_iter()
    .filter(|(attr, _)| attrs.contains(*attr))
    .fold(MountFlags::empty(), |all, (_, flag)| all | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_older_kernels_answer_leads_to_an_older_way() {
        for (errno, directory, path) in [
            (Errno::INVAL, Some(Reason::Descriptor), Some(Reason::LayerByLayer)),
            (Errno::BADF, Some(Reason::Descriptor), None),
            (Errno::OPNOTSUPP, Some(Reason::LayerByLayer), None),
            (Errno::NOSYS, Some(Reason::Calls), Some(Reason::Calls)),
            (Errno::PERM, None, None),
            (Errno::NOENT, None, None),
        ] {
            assert_eq!(Reason::of_directory(errno), directory, "{errno}");
            assert_eq!(Reason::of_path(errno), path, "{errno}");
        }
    }

    #[test]
    fn the_flags_of_layers_become_those_of_mount() {
        let attrs = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        assert_eq!(classic(attrs), MountFlags::RDONLY | MountFlags::NODEV);
    }
}
