//! What a case needs of the machine. What is missing shows as ignored with the reason, and fails with FSPROV_TEST_MUST_RUN=1.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags, ResolveFlags};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    Root,
    NotRoot,
    UserNamespaces,
    DevFuse,
    /// A program on the PATH.
    Tool(&'static str),
    /// The Debian minbase image that scripts/setup caches.
    Minbase,
    /// The ordinary user that root runs tests as.
    TestUser,
    /// The program was built with `--features failpoints`.
    Failpoints,
    /// Loop devices: a file system of the case's own.
    Loop,
    /// open_tree(2) and its kin (Linux 5.2): the overlay backend refuses without them, which `enosys` tests.
    MountCalls,
    /// statx(2) (Linux 4.11): the birth time tells two files that had one inode number after the other.
    Statx,
}

impl Need {
    /// Ok, or what is missing and how to get it.
    pub(crate) fn check(self) -> Result<(), String> {
        let root = rustix::process::geteuid().is_root();
        match self {
            Need::Root if !root => Err("needs root".into()),
            Need::NotRoot if root => Err("needs an ordinary user: scripts/setup makes fsprov-test".into()),
            Need::UserNamespaces => {
                let tried = quietly(Command::new("unshare").args(["--user", "--map-root-user", "--mount", "true"]));
                tried.then_some(()).ok_or_else(|| "needs user namespaces: unshare -Urm true fails here".into())
            }
            Need::DevFuse => std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/fuse")
                .map(drop)
                .map_err(|e| format!("needs /dev/fuse: {e}: scripts/setup")),
            Need::Tool(name) => find_tool(name)
                .map(drop)
                .ok_or_else(|| format!("needs {name}, which is not on the PATH: scripts/setup")),
            Need::Minbase => super::images::minbase_source().map(drop).ok_or_else(|| {
                "needs a Debian minbase tar in /var/cache/fsprov-test or ~/.cache/fsprov-test: scripts/setup".into()
            }),
            Need::TestUser => test_user().map(drop),
            Need::Failpoints if !cfg!(feature = "failpoints") => {
                Err("needs a build with --features failpoints: scripts/test".into())
            }
            Need::Loop => std::fs::File::open("/dev/loop-control")
                .map(drop)
                .map_err(|e| format!("needs loop devices: /dev/loop-control: {e}")),
            Need::MountCalls if !has_mount_calls() => Err("needs open_tree(2): scripts/enosys took it away".into()),
            Need::Statx => {
                let flags = rustix::fs::AtFlags::empty();
                let told = rustix::fs::statx(rustix::fs::CWD, "/", flags, rustix::fs::StatxFlags::BTIME);
                told.map(drop).map_err(|e| format!("needs statx(2): {e}"))
            }
            Need::Root | Need::NotRoot | Need::Failpoints | Need::MountCalls => Ok(()),
        }
    }
}

/// False on kernels before 5.2, and under `scripts/enosys`.
pub(crate) fn has_mount_calls() -> bool {
    let flags = rustix::mount::OpenTreeFlags::OPEN_TREE_CLOEXEC;
    !matches!(rustix::mount::open_tree(rustix::fs::CWD, "/", flags), Err(rustix::io::Errno::NOSYS))
}

/// The kernel's version: what a case expects may differ. The program itself decides nothing by it.
pub(crate) fn kernel() -> (u32, u32) {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// False on kernels before 5.12, by the names of their functions; true where the kernel does not tell those.
pub(crate) fn has_mount_setattr() -> bool {
    let names = std::fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    names.is_empty() || names.contains("sys_mount_setattr")
}

/// What a program said, but for the warnings by what it goes without the newer calls: on an older kernel, or under `scripts/enosys`.
pub(crate) fn without_fallbacks(said: &str) -> String {
    let has_openat2 = !matches!(
        rustix::fs::openat2(rustix::fs::CWD, "/", OFlags::PATH, Mode::empty(), ResolveFlags::empty()),
        Err(rustix::io::Errno::NOSYS)
    );
    let has_calls = has_mount_calls() && has_mount_setattr() && has_openat2;
    let is_meant = |line: &&str| has_calls || !(line.starts_with("[WARN ") && line.contains("this kernel has no "));
    said.lines().filter(is_meant).map(|line| format!("{line}\n")).collect()
}

/// An ordinary user, with ids as text for command lines.
pub(crate) struct TestUser {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) gid: String,
}

/// The ordinary user that root runs tests as.
pub(crate) fn test_user() -> Result<TestUser, String> {
    let name = std::env::var("FSPROV_TEST_USER").unwrap_or_else(|_| "fsprov-test".into());
    let id = |flag: &str| {
        let output = Command::new("id").args([flag, &name]).output().map_err(|e| format!("id: {e}"))?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        text.parse::<u32>().map(|_| text).map_err(|_| format!("needs the user {name}: scripts/setup makes it"))
    };
    Ok(TestUser { uid: id("-u")?, gid: id("-g")?, name })
}

/// Must what is missing fail?
pub(crate) fn must_run() -> bool {
    std::env::var_os("FSPROV_TEST_MUST_RUN").is_some_and(|v| !v.is_empty() && v != "0")
}

pub(crate) fn find_tool(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn quietly(command: &mut Command) -> bool {
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
