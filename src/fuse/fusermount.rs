//! `fusermount3`, which mounts FUSE for users who may not: it gets a socket and sends the open /dev/fuse back over it.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;

use crate::child::channel::receive_descriptor;
use crate::error::{Error, Kind, Result, show};
use crate::sys::mount::Unmount;

/// The variable by which fusermount3 is told its socket (libfuse, util/fusermount.c).
const SOCKET_VARIABLE: &str = "_FUSE_COMMFD";
/// A mount takes a millisecond. A mount point on a file system that does not answer can hold fusermount3 for ever.
const PATIENCE: Duration = Duration::from_secs(20);

/// A value inside fusermount3's comma-separated options: `\` and `,` need a backslash before them.
pub(super) fn escape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, ',' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Mount, and give the connection. On an error nothing is mounted.
pub(super) fn mount(program: &Path, point: &Path, options: &str) -> Result<OwnedFd> {
    const OP: &str = "mount FUSE on";
    let (ours, theirs) = UnixStream::pair().map_err(|e| Error::io("make a socket", "", e))?;
    ours.set_read_timeout(Some(PATIENCE)).map_err(|e| Error::io("set a timeout", "", e))?;
    let args = [OsStr::new("-o"), OsStr::new(options), OsStr::new("--"), point.as_os_str()];
    // Its stdin is the socket: no other descriptor has to be passed on.
    let mut child = start(program, &args, Stdio::from(OwnedFd::from(theirs)))?;
    let received = receive_descriptor(&ours);
    if matches!(received, Err(Errno::AGAIN)) {
        give_up(&mut child);
        return Err(Error::new(Kind::Helper, OP, show(point), format!("{} does not answer", show(program))));
    }
    let complaint = finish(child)?;
    match received {
        Ok(Some(connection)) => Ok(connection),
        Ok(None) | Err(_) => Err(explain(OP, point, &complaint)),
    }
}

/// Unmount.
pub(super) fn unmount(program: &Path, point: &Path, how: Unmount) -> Result<()> {
    let mut args = vec![OsStr::new("-u")];
    if how == Unmount::Lazy {
        args.push(OsStr::new("-z"));
    }
    args.extend([OsStr::new("--"), point.as_os_str()]);
    let child = start(program, &args, Stdio::null())?;
    let complaint = finish(child)?;
    if complaint.failed { Err(explain("unmount", point, &complaint)) } else { Ok(()) }
}

struct Complaint {
    failed: bool,
    text: String,
}

fn start(program: &Path, args: &[&OsStr], stdin: Stdio) -> Result<Child> {
    Command::new(program)
        .args(args)
        .env_clear()
        .env(SOCKET_VARIABLE, "0")
        // fusermount3 starts no program by PATH; umount(8), which it may start where /etc/mtab is a file, does.
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::new(Kind::Unsupported, "run", show(program), "it is not installed")
                .hint("as root: install the package fuse3"),
            _ => Error::io("run", show(program), e),
        })
}

fn finish(child: Child) -> Result<Complaint> {
    let output = child.wait_with_output().map_err(|e| Error::io("wait for", "fusermount3", e))?;
    let text = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Ok(Complaint { failed: !output.status.success(), text })
}

fn give_up(child: &mut Child) {
    // It is setuid: the signal may be refused, and then nobody can wait for it either.
    if child.kill().is_ok() {
        let _ = child.wait();
    }
}

/// What fusermount3 writes (libfuse 3.2 to 3.17), what kind of failure it is, and what helps.
const MEANINGS: [(&str, Kind, &str); 13] = [
    ("user_allow_other", Kind::Unsupported, "as root: echo user_allow_other >> /etc/fuse.conf"),
    ("too many FUSE filesystems", Kind::Limit, "unmount some, or raise mount_max in /etc/fuse.conf"),
    ("fuse device not found", Kind::Unsupported, "as root: modprobe fuse"),
    ("failed to open /dev/fuse", Kind::Unsupported, "as root: chmod 666 /dev/fuse"),
    ("no write access to mountpoint", Kind::Permission, "mount on a directory that you own and may write to"),
    ("not owned by user", Kind::Permission, "mount on a directory that you own"),
    ("mounting over filesystem type", Kind::Unsupported, "mount on a directory of another file system"),
    ("bad mount point", Kind::NotFound, "the mount point must be a directory that exists and that you may reach"),
    (
        "failed to access mountpoint",
        Kind::NotFound,
        "the mount point must be a directory that exists and that you may reach",
    ),
    ("resource busy", Kind::Busy, "end the processes that use it, or unmount with --lazy"),
    ("not found in /etc/mtab", Kind::NotFound, ""),
    ("not found in /proc/mounts", Kind::NotFound, ""),
    (
        "Operation not permitted",
        Kind::Unsupported,
        "fusermount3 must be setuid root (chmod 4755), on a file system without nosuid, and started without no_new_privs",
    ),
];

fn explain(op: &'static str, point: &Path, complaint: &Complaint) -> Error {
    let said = complaint.text.as_str();
    let cause = if said.is_empty() { "fusermount3 failed and said nothing" } else { said };
    match MEANINGS.iter().find(|(words, ..)| said.contains(words)) {
        Some((_, kind, "")) => Error::new(*kind, op, show(point), cause),
        Some((_, kind, hint)) => Error::new(*kind, op, show(point), cause).hint(*hint),
        None => Error::new(Kind::Helper, op, show(point), cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;

    fn fake(dir: &Path, script: &str) -> std::path::PathBuf {
        let path = dir.join("fusermount3");
        let mut file = std::fs::File::create(&path).unwrap();
        writeln!(file, "#!/bin/sh\n{script}").unwrap();
        drop(file);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn what_it_complains_of_becomes_a_kind_and_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        for (said, kind, hint) in [
            (
                "fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf",
                Kind::Unsupported,
                "user_allow_other >>",
            ),
            ("fusermount3: mount failed: Operation not permitted", Kind::Unsupported, "setuid root"),
            ("fusermount3: user has no write access to mountpoint /x", Kind::Permission, "you own"),
            ("fusermount3: too many FUSE filesystems mounted; mount_max=N can be set", Kind::Limit, "mount_max"),
            ("fusermount3: bad mount point /x: No such file or directory", Kind::NotFound, "exists"),
            ("something new", Kind::Helper, "something new"),
        ] {
            let program = fake(dir.path(), &format!("echo \"{said}\" >&2; exit 1"));
            let error = mount(&program, Path::new("/x"), "ro").unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(hint), "{error}");
        }
        let program = fake(dir.path(), "exit 0");
        assert!(mount(&program, Path::new("/x"), "ro").unwrap_err().to_string().contains("said nothing"));
        let error = mount(Path::new("/nonexistent/fusermount3"), Path::new("/x"), "ro").unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    }

    #[test]
    fn arguments_pass_as_bytes_and_the_mount_point_is_never_an_option() {
        use std::os::unix::ffi::OsStrExt as _;
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("args");
        let program = fake(dir.path(), &format!("printf '%s\\0' \"$@\" > {}", out.display()));
        unmount(&program, Path::new(OsStr::from_bytes(b"/a\n\xff,b")), Unmount::Lazy).unwrap();
        assert_eq!(std::fs::read(out).unwrap(), b"-u\0-z\0--\0/a\n\xff,b\0");
    }
}
