//! What openat2(2) does, step by step, for kernels without it, and for what it cannot do: not to follow other users' symlinks. Same
//! guarantees: nothing outside the root is opened.
//!
//! Each component is opened with O_NOFOLLOW relative to the descriptor of the one before; a symlink is read and its target
//! walked; `..` goes back to the descriptor it came from and is never asked of the kernel, so a directory that is moved
//! out of the root meanwhile leads nowhere new.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use rustix::fs::{self, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Most symlinks followed in one path: the kernel's MAXSYMLINKS.
const MAX_SYMLINKS: u32 = 40;
/// Most directories held open at once: a path of PATH_MAX bytes holds at most 2048 of them, targets of symlinks more; this
/// is far above real trees and below the usual limit of 1024 descriptors.
const MAX_DEPTH: usize = 512;

/// Whose symlinks are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Links {
    /// Anyone's.
    Anyones,
    /// Root's alone: what another user made leads where that user wants it to. EXDEV for those.
    Roots,
}

/// `flags` must hold CLOEXEC; `how` is IN_ROOT or BENEATH, with or without NO_SYMLINKS.
pub(super) fn open_by_steps(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    how: ResolveFlags,
    links: Links,
) -> rustix::io::Result<OwnedFd> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(Errno::NOENT);
    }
    let beneath = how.contains(ResolveFlags::BENEATH);
    if beneath && bytes.starts_with(b"/") {
        return Err(Errno::XDEV);
    }
    let mut todo = components(bytes);
    // A slash at the end asks for a directory, and for the target of a symlink.
    let mut must_be_dir = bytes.ends_with(b"/") || bytes.ends_with(b"/.");
    let mut followed = 0;
    let mut held: Vec<OwnedFd> = Vec::new();
    while let Some(name) = todo.pop_front() {
        if name.as_bytes() == b".." {
            if held.pop().is_none() && beneath {
                return Err(Errno::XDEV);
            }
            continue;
        }
        let at = held.last().map_or(root, |fd| std::os::fd::AsFd::as_fd(fd));
        let last = todo.is_empty();
        let found = fs::openat(at, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = fs::fstat(&found)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Symlink {
            if last && !must_be_dir && flags.contains(OFlags::NOFOLLOW) {
                return if flags.contains(OFlags::PATH) { Ok(found) } else { Err(Errno::LOOP) };
            }
            followed += 1;
            // Links of procfs may be magic: they jump to an open file, wherever it is. Which are cannot be told.
            if how.contains(ResolveFlags::NO_SYMLINKS) || followed > MAX_SYMLINKS || is_procfs(&found)? {
                return Err(Errno::LOOP);
            }
            if links == Links::Roots && stat.st_uid != 0 {
                return Err(Errno::XDEV);
            }
            let target = fs::readlinkat(&found, "", Vec::new())?.into_bytes();
            if target.starts_with(b"/") {
                if beneath {
                    return Err(Errno::XDEV);
                }
                held.clear();
            }
            must_be_dir |= last && target.ends_with(b"/");
            for part in components(&target).into_iter().rev() {
                todo.push_front(part);
            }
            continue;
        }
        if last && !must_be_dir && kind != FileType::Directory {
            return reopen(at, &name, &found, flags);
        }
        if kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        if held.len() == MAX_DEPTH {
            return Err(Errno::NAMETOOLONG);
        }
        held.push(found);
    }
    let at = held.last().map_or(root, |fd| std::os::fd::AsFd::as_fd(fd));
    fs::openat(at, ".", flags.difference(OFlags::NOFOLLOW), Mode::empty())
}

/// Open for use what was found as O_PATH: by name, and only if it is still the same file.
fn reopen(at: BorrowedFd<'_>, name: &OsStr, found: &OwnedFd, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let opened = fs::openat(at, name, flags | OFlags::NOFOLLOW, Mode::empty())?;
    let (want, got) = (fs::fstat(found)?, fs::fstat(&opened)?);
    if (want.st_dev, want.st_ino) == (got.st_dev, got.st_ino) { Ok(opened) } else { Err(Errno::AGAIN) }
}

fn components(path: &[u8]) -> VecDeque<OsString> {
    path.split(|&b| b == b'/')
        .filter(|name| !matches!(*name, b"" | b"."))
        .map(|name| OsString::from_vec(name.to_vec()))
        .collect()
}

fn is_procfs(fd: &OwnedFd) -> rustix::io::Result<bool> {
    /// statfs(2): PROC_SUPER_MAGIC.
    const PROC: u64 = 0x9fa0;
    Ok(fs::fstatfs(fd)?.f_type as u64 == PROC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    /// The kernel's openat2 is the oracle.
    #[test]
    fn agrees_with_openat2() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::create_dir_all(dir.path().join("outside")).unwrap();
        std::fs::create_dir(root.join("outside")).unwrap();
        std::fs::write(root.join("a/file"), "x").unwrap();
        for (link, target) in [
            ("abs", "/a/b"),
            ("up", "../../outside"),
            ("a/rel", "../a/file"),
            ("a/slash", "b/"),
            ("a/fileslash", "file/"),
            ("loop", "loop"),
            ("dangling", "nowhere"),
            ("chain", "a/rel"),
            ("exact", ".."),
            ("dot", "."),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        let fd = fs::openat(fs::CWD, &root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let paths = [
            "a",
            "a/",
            "a/b/..",
            "a/b/../file",
            "a/file",
            "a/file/",
            "a/file/x",
            "a/file/..",
            "abs",
            "/abs",
            "/",
            ".",
            "..",
            "../..",
            "../a",
            "a/../../a/b",
            "up",
            "a/rel",
            "a/slash",
            "a/fileslash",
            "loop",
            "dangling",
            "chain",
            "exact",
            "dot",
            "dot/",
            "abs/",
            "a/rel/",
            "chain/",
            "nowhere/..",
            "a//b",
            "./a",
            "a/.",
            "a/file/.",
            "",
            "exact/a",
        ];
        let flag_sets = [
            OFlags::PATH,
            OFlags::PATH | OFlags::NOFOLLOW,
            OFlags::RDONLY,
            OFlags::RDONLY | OFlags::NOFOLLOW,
            OFlags::PATH | OFlags::DIRECTORY,
        ];
        let hows = [
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        ];
        let identity = |opened: rustix::io::Result<OwnedFd>| {
            opened.map(|fd| std::fs::File::from(fd).metadata().unwrap()).map(|m| (m.dev(), m.ino()))
        };
        for path in paths.map(Path::new) {
            for flags in flag_sets.map(|f| f | OFlags::CLOEXEC) {
                for how in hows {
                    let want = identity(fs::openat2(&fd, path, flags, Mode::empty(), how));
                    if want == Err(Errno::NOSYS) {
                        return;
                    }
                    let got = identity(open_by_steps(std::os::fd::AsFd::as_fd(&fd), path, flags, how, Links::Anyones));
                    assert_eq!(got, want, "{} {flags:?} {how:?}", path.display());
                }
            }
        }
    }

    #[test]
    fn magic_links_lead_nowhere() {
        let proc = fs::openat(fs::CWD, "/proc/self", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let opened = open_by_steps(
            std::os::fd::AsFd::as_fd(&proc),
            Path::new("cwd"),
            OFlags::PATH | OFlags::CLOEXEC,
            how,
            Links::Anyones,
        );
        assert_eq!(opened.map(drop), Err(Errno::LOOP));
    }

    #[test]
    fn root_follows_its_own_symlinks_alone() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["ours", "theirs"] {
            symlink("/etc", dir.path().join(name)).unwrap();
        }
        if std::os::unix::fs::lchown(dir.path().join("theirs"), Some(1234), None).is_err() {
            return; // a user namespace of one user
        }
        let top = fs::openat(fs::CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let open = |name: &str, links| {
            let (path, flags) = (dir.path().join(name).join("ssl"), OFlags::PATH | OFlags::CLOEXEC);
            open_by_steps(std::os::fd::AsFd::as_fd(&top), &path, flags, ResolveFlags::IN_ROOT, links).map(drop)
        };
        assert_eq!(open("ours", Links::Roots), open("theirs", Links::Anyones));
        assert_eq!(open("theirs", Links::Roots), Err(Errno::XDEV));
    }
}
