//! Who uses a mount or a directory.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::mount;
use super::mountinfo::{self, MountInfo};
use super::process::{Namespace, mount_namespace, mount_namespace_of};
use crate::error::{Error, Result};

/// By what a process holds a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// Its working directory.
    Cwd,
    /// Its root directory.
    Root,
    /// The program it runs.
    Exe,
    /// A mapped file.
    Map,
    /// This open file.
    Fd(i32),
    /// It lives in another mount namespace, which has the directory mounted.
    Namespace,
}

/// A process that uses a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Its pid.
    pub pid: i32,
    /// Its name (/proc/PID/comm).
    pub comm: String,
    /// The first thing found by which it holds the mount.
    pub what: Hold,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.what {
            Hold::Cwd => "working directory".to_owned(),
            Hold::Root => "root directory".to_owned(),
            Hold::Exe => "program".to_owned(),
            Hold::Map => "mapped file".to_owned(),
            Hold::Fd(n) => format!("open file {n}"),
            Hold::Namespace => "mount namespace".to_owned(),
        };
        write!(f, "{} (pid {}, {how})", self.comm, self.pid)
    }
}

/// Most holders that [`name_all`] names.
const NAMED: usize = 5;

/// Holders in one line for people: the first few, and how many more there are.
pub fn name_all(holders: &[Holder]) -> String {
    let mut names: Vec<String> = holders.iter().take(NAMED).map(ToString::to_string).collect();
    if holders.len() > NAMED {
        names.push(format!("and {} more", holders.len() - NAMED));
    }
    names.join(", ")
}

/// How often users of a mount are looked for, or an unmount is tried, before it counts as busy: a process that is just ending, or
/// has just been forked and not yet begun its program, holds what it holds for a moment only.
pub const BUSY_TRIES: u32 = 4;
/// How long between two looks.
pub const BUSY_PAUSE: std::time::Duration = std::time::Duration::from_millis(25);

/// Try [`BUSY_TRIES`] times, with pauses, until `done` says so. Did it?
pub fn patiently(mut done: impl FnMut() -> bool) -> bool {
    for n in 0..BUSY_TRIES {
        if n > 0 {
            std::thread::sleep(BUSY_PAUSE);
        }
        if done() {
            return true;
        }
    }
    false
}

/// Who keeps one of these mounts busy. Best effort: what we may not look at (other users' processes) is not in it. A copy of it in another
/// mount namespace does not: a process that merely lives there is not in it.
///
/// No request goes to a file system: links of /proc/PID are opened as O_PATH, which follows them without a lookup, and
/// compared by mount id; mapped files by path, for processes of our own mount namespace.
pub fn holders(mounts: &[MountInfo]) -> Vec<Holder> {
    find_holders(|pid, same_namespace| uses(pid, mounts, same_namespace), |_| false)
}

/// Who uses a plain directory or what lies in it: by path, and in other mount namespaces also by a mount of it. Best effort,
/// as [`holders`] is.
///
/// Where a link of /proc/PID leads is told as the reader sees it (proc_pid_cwd(5)): for our own namespace that is a path of ours;
/// for another one it is a path there, so the device must be the directory's, too.
pub fn holders_in_directory(dir: &Path) -> Result<Vec<Holder>> {
    let fail = |e| Error::io("look at", crate::error::show(dir), e);
    let dev = std::fs::symlink_metadata(dir).map_err(fail)?.dev();
    let shows = mountinfo::shows(dir)?;
    let leads_there = |link: &Path, same_namespace: bool| {
        std::fs::read_link(link).is_ok_and(|path| path.starts_with(dir))
            && (same_namespace || std::fs::metadata(link).is_ok_and(|meta| meta.dev() == dev))
    };
    Ok(find_holders(
        |pid, same_namespace| {
            let proc = PathBuf::from(format!("/proc/{pid}"));
            for (name, what) in LINKS {
                if leads_there(&proc.join(name), same_namespace) {
                    return Some(what);
                }
            }
            for entry in std::fs::read_dir(proc.join("fd")).into_iter().flatten().flatten() {
                if leads_there(&entry.path(), same_namespace) {
                    return entry.file_name().to_str()?.parse().ok().map(Hold::Fd);
                }
            }
            (same_namespace && maps_file_in(pid, &[dir])).then_some(Hold::Map)
        },
        // Where the directory is a mount itself, a new namespace has a copy of that on the same place: in sight, not in use.
        |pid| mountinfo::read_of(pid).is_ok_and(|table| table.iter().any(|m| m.point != dir && shows(m))),
    ))
}

/// By which of its links a process holds a file system.
const LINKS: [(&str, Hold); 3] = [("cwd", Hold::Cwd), ("root", Hold::Root), ("exe", Hold::Exe)];

/// Every other process of which `uses` (told whether it is of our mount namespace) says how it holds what is asked for, or in
/// whose other mount namespace `has_copy` finds it mounted.
fn find_holders(uses: impl Fn(i32, bool) -> Option<Hold>, has_copy: impl Fn(i32) -> bool) -> Vec<Holder> {
    let mine = mount_namespace();
    let mut namespaces: HashMap<Namespace, bool> = HashMap::new();
    let mut found = Vec::new();
    let Ok(processes) = std::fs::read_dir("/proc") else { return found };
    for pid in processes.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()) {
        if pid == rustix::process::getpid().as_raw_nonzero().get() {
            continue;
        }
        let theirs = mount_namespace_of(pid);
        let same = theirs.is_ok() && theirs.as_ref().ok() == mine.as_ref().ok();
        let what = uses(pid, same).or_else(|| {
            let key = *theirs.as_ref().ok().filter(|_| !same)?;
            let seen = *namespaces.entry(key).or_insert_with(|| has_copy(pid));
            seen.then_some(Hold::Namespace)
        });
        if let Some(what) = what {
            let comm = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.push(Holder { pid, comm: String::from_utf8_lossy(comm.trim_ascii_end()).into_owned(), what });
        }
    }
    found
}

fn uses(pid: i32, mounts: &[MountInfo], same_namespace: bool) -> Option<Hold> {
    let ours = |id: u64| mounts.iter().any(|m| m.id == id);
    for (name, what) in LINKS {
        let link = super::fs::open_path(Path::new(&format!("/proc/{pid}/{name}")));
        if link.ok().and_then(|fd| mount::mount_id(fd).ok()).is_some_and(ours) {
            return Some(what);
        }
    }
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten() {
        let id = std::fs::read_to_string(entry.path()).ok().and_then(|text| mount::fdinfo_mount_id(&text));
        if id.is_some_and(ours) {
            return entry.file_name().to_str()?.parse().ok().map(Hold::Fd);
        }
    }
    let points: Vec<&Path> = mounts.iter().map(|m| m.point.as_path()).collect();
    (same_namespace && maps_file_in(pid, &points)).then_some(Hold::Map)
}

fn maps_file_in(pid: i32, dirs: &[&Path]) -> bool {
    let Ok(text) = std::fs::read(format!("/proc/{pid}/maps")) else { return false };
    text.split(|&b| b == b'\n').any(|line| {
        let Some(at) = line.iter().position(|&b| b == b'/') else { return false };
        // Only a newline is escaped here (proc_pid_maps(5)); undoing the octal form covers it.
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&mountinfo::unescape(&line[at..])));
        dirs.iter().any(|dir| path.starts_with(dir))
    })
}
