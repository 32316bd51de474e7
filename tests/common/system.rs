//! Mounts and processes as the kernel lists them. Written for the tests: shares nothing with src/sys.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitIdOptions};

/// One line of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) id: u64,
    pub(crate) point: PathBuf,
    pub(crate) options: String,
    pub(crate) kind: String,
    pub(crate) super_options: String,
}

/// Every mount of this namespace, in mounting order.
pub(crate) fn mounts() -> Vec<Mount> {
    let text = std::fs::read("/proc/self/mountinfo").expect("read /proc/self/mountinfo");
    let mut found = Vec::new();
    for line in text.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
        let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
        let dash = fields.iter().position(|f| *f == b"-").expect("mountinfo: a '-' field");
        let text = |i: usize| String::from_utf8_lossy(fields[i]).into_owned();
        found.push(Mount {
            id: text(0).parse().expect("mountinfo: mount id"),
            point: unescape(fields[4]),
            options: text(5),
            kind: text(dash + 1),
            super_options: text(dash + 3),
        });
    }
    found
}

/// Undo the kernel's octal escapes (proc(5)): `\040` is a space.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut i = 0;
    while i < field.len() {
        let digits =
            field.get(i + 1..i + 4).filter(|d| field[i] == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        if let Some(d) = digits {
            out.push(d.iter().fold(0_u8, |n, b| n.wrapping_mul(8).wrapping_add(b - b'0')));
            i += 4;
        } else {
            out.push(field[i]);
            i += 1;
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// The mounts at `dir` and below it.
pub(crate) fn mounts_below(dir: &Path) -> Vec<Mount> {
    mounts().into_iter().filter(|m| m.point.starts_with(dir)).collect()
}

/// The mounts that no case made: an ordinary user's cases share a mount namespace with each other.
pub(crate) fn mounts_of_others() -> Vec<Mount> {
    let of_a_case = |m: &Mount| m.point.iter().any(|name| name.as_bytes().starts_with(super::stage::PREFIX.as_bytes()));
    mounts().into_iter().filter(|m| !of_a_case(m)).collect()
}

/// One process, from /proc/PID/stat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    /// R, S, D, Z, ...
    pub(crate) state: char,
    pub(crate) command: String,
}

pub(crate) fn processes() -> Vec<Process> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("read /proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(stat) = std::fs::read(entry.path().join("stat")) else { continue };
        let stat = String::from_utf8_lossy(&stat).into_owned();
        // The name stands in parentheses and may hold any byte, `)` too: fields begin after the last one.
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        let mut fields = rest.split_whitespace();
        let state = fields.next().and_then(|f| f.chars().next()).unwrap_or('?');
        let parent = fields.next().and_then(|f| f.parse().ok()).unwrap_or(0);
        let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = cmdline.split(|&b| b == 0).map(String::from_utf8_lossy).collect::<Vec<_>>().join(" ");
        found.push(Process { pid, parent, state, command });
    }
    found
}

/// Every process that descends from this one (orphans too, once this one is their subreaper).
pub(crate) fn descendants_of(root: i32) -> Vec<Process> {
    let all = processes();
    let mut family = vec![root];
    let mut found: Vec<Process> = Vec::new();
    loop {
        let before = found.len();
        for process in &all {
            if family.contains(&process.parent) && !family.contains(&process.pid) {
                family.push(process.pid);
                found.push(process.clone());
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

pub(crate) fn my_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// Collect orphans that ended: they are this process's children, since it is their subreaper.
pub(crate) fn reap() {
    for process in descendants_of(my_pid()) {
        if let (true, 'Z', Some(pid)) = (process.parent == my_pid(), process.state, Pid::from_raw(process.pid)) {
            let how = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            let _ = rustix::process::waitid(rustix::process::WaitId::Pid(pid), how);
        }
    }
}

/// The descendants that still run, after at most `patience` for those that are ending.
pub(crate) fn survivors(patience: Duration) -> Vec<Process> {
    let until = Instant::now() + patience;
    loop {
        reap();
        let left: Vec<_> = descendants_of(my_pid()).into_iter().filter(|p| p.state != 'Z').collect();
        if left.is_empty() || Instant::now() >= until {
            return left;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Kill a process, and wait until it has ended: on a busy machine what comes next would meet it alive.
pub(crate) fn kill(pid: i32) {
    let process =
        Pid::from_raw(pid).and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok());
    send(pid, Signal::KILL);
    if let Some(process) = process {
        let patience = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        let _ = rustix::event::poll(
            &mut [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)],
            Some(&patience),
        );
    }
}

/// Let a process that was stopped go on.
pub(crate) fn go_on(pid: i32) {
    send(pid, Signal::CONT);
}

fn send(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Ask again until it is so, for at most `patience`.
pub(crate) fn eventually(patience: Duration, mut so: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + patience;
    loop {
        if so() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A path, readable in a message whatever bytes it holds.
pub(crate) fn show(path: &Path) -> String {
    path.as_os_str().as_bytes().escape_ascii().to_string()
}
