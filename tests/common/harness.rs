//! Runs every case on every lane it fits, each in a process of its own: so that a case has its own namespaces, adopts the servers
//! it started (it is their subreaper), and takes nothing with it when it fails.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use super::lane::{Half, LANES};
use super::needs::{must_run, test_user};
use super::{Enter, Lane, Need, Stage, images, system};

/// One thing that must hold.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// The lanes that it is for.
    pub(crate) on: fn(&Lane) -> bool,
    /// What it needs beside what its lane needs.
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn(&Stage),
}

impl Case {
    pub(crate) const fn new(name: &'static str, on: fn(&Lane) -> bool, run: fn(&Stage)) -> Self {
        Case { name, on, needs: &[], run }
    }

    pub(crate) const fn needing(
        name: &'static str,
        on: fn(&Lane) -> bool,
        needs: &'static [Need],
        run: fn(&Stage),
    ) -> Self {
        Case { name, on, needs, run }
    }
}

/// A case, and there it is: what it is called, the lanes that it is for, what else it needs if anything, and what it does.
#[allow(unused_macros, reason = "for tests/documents.rs, which makes its cases of files")]
macro_rules! case {
    ($name:expr, $on:expr, $run:expr $(,)?) => {
        inventory::submit! { crate::common::Case::new($name, $on, $run) }
    };
    ($name:expr, $on:expr, $needs:expr, $run:expr $(,)?) => {
        inventory::submit! { crate::common::Case::needing($name, $on, $needs, $run) }
    };
}
#[allow(unused_imports, reason = "likewise")]
pub(crate) use case;

/// Selectors for [`Case::on`].
pub(crate) mod on {
    use crate::common::{Enter, Lane};

    pub(crate) fn every_backend(lane: &Lane) -> bool {
        !lane.backend.is_empty()
    }
    /// Those whose rootfs is a read-only mount: not the copy, which is writable and no mount at all.
    pub(crate) fn read_only(lane: &Lane) -> bool {
        every_backend(lane) && lane.backend != "copy"
    }
    /// Those that can have volumes.
    pub(crate) fn volumes(lane: &Lane) -> bool {
        every_backend(lane) && lane.has_volumes()
    }
    pub(crate) fn copy(lane: &Lane) -> bool {
        lane.backend == "copy"
    }
    /// Those that make a mount point which the image lacks.
    pub(crate) fn makes_mount_points(lane: &Lane) -> bool {
        ["fuse", "overlay"].contains(&lane.backend)
    }
    pub(crate) fn fuse(lane: &Lane) -> bool {
        lane.is_fuse()
    }
    pub(crate) fn overlay(lane: &Lane) -> bool {
        lane.backend == "overlay"
    }
    pub(crate) fn bind(lane: &Lane) -> bool {
        lane.backend == "bind"
    }
    /// Once for root and once for an ordinary user, with no backend chosen.
    pub(crate) fn once_each(lane: &Lane) -> bool {
        lane.backend.is_empty()
    }
    pub(crate) fn user(lane: &Lane) -> bool {
        lane.backend.is_empty() && lane.enter == Enter::User
    }
}

/// Names the one case that this process is to run: `LANE/CASE`.
const CASE: &str = "FSPROV_TEST_CASE";
/// Names a directory: print what is seen of it and nothing else (a case asks so as another user).
pub(crate) const PICTURE: &str = "FSPROV_TEST_PICTURE";
/// Set in the copy of the unprivileged half that runs as the ordinary user.
const DROPPED: &str = "FSPROV_TEST_DROPPED";
/// Longest that one case may take; the slowest (a Debian image imported and run) takes about 30 s on two busy cores.
const CASE_LIMIT: Duration = Duration::from_secs(240);
/// Another limit in seconds, for the long forms of cases and for emulated machines.
const LIMIT: &str = "FSPROV_TEST_LIMIT";
/// Names the cases to run, `CASE` or `LANE::CASE`, separated by commas: another choice than one part of a name.
const ONLY: &str = "FSPROV_TEST_ONLY";
/// How a line begins that a case says for [`notes`].
pub(crate) const NOTE: &str = "note: ";
static NOTES: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// What a child exits with when its case failed.
const CASE_FAILED: u8 = 101;

/// Whether another process of this program started this one: for one case, or as the ordinary user.
#[allow(dead_code, reason = "for tests/documents.rs")]
pub(crate) fn is_child() -> bool {
    [CASE, DROPPED].iter().any(|name| std::env::var_os(name).is_some())
}

/// What the cases that this process ran since the last call noted, whether they passed or not.
#[allow(dead_code, reason = "for tests/documents.rs")]
pub(crate) fn notes() -> Vec<String> {
    std::mem::take(&mut *NOTES.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// `main` of the test programs.
pub(crate) fn main(half: Half, cases: Vec<&'static Case>) -> ExitCode {
    if let Some(wanted) = std::env::var_os(CASE) {
        return run_one(&wanted.to_string_lossy(), &cases);
    }
    if let Some(dir) = std::env::var_os(PICTURE) {
        let lines = super::walk::to_lines(&super::walk::picture(Path::new(&dir)));
        let _ = std::io::stdout().write_all(lines.as_bytes());
        return ExitCode::SUCCESS;
    }
    let root = rustix::process::geteuid().is_root();
    if half == Half::Unprivileged && root && std::env::var_os(DROPPED).is_none() {
        match run_as_user() {
            Ok(code) => return code,
            // Shown below: every trial then lacks an ordinary user.
            Err(why) => {
                let _ = writeln!(std::io::stderr(), "cannot run as an ordinary user: {why}");
            }
        }
    }
    let arguments = Arguments::from_args();
    let only = std::env::var(ONLY).ok();
    let mut trials = Vec::new();
    for lane in LANES.iter().filter(|lane| lane.half == half) {
        for case in cases.iter().copied().filter(|case| (case.on)(lane)) {
            let name = format!("{}::{}", lane.name, case.name);
            if only.as_ref().is_some_and(|only| !only.split(',').any(|wanted| wanted == case.name || wanted == name)) {
                continue;
            }
            trials.push(Trial::ignorable_test(name, move || trial(lane, case)));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if conclusion.has_failed() { ExitCode::from(CASE_FAILED) } else { ExitCode::SUCCESS }
}

/// Longest that one case may take.
pub(crate) fn case_limit() -> Duration {
    std::env::var(LIMIT).ok().and_then(|s| s.parse().ok()).map_or(CASE_LIMIT, Duration::from_secs)
}

fn trial(lane: &Lane, case: &Case) -> Result<Completion, Failed> {
    for need in lane.needs().iter().chain(case.needs) {
        if let Err(why) = need.check() {
            return if must_run() {
                Err(format!("FSPROV_TEST_MUST_RUN: {why}").into())
            } else {
                Ok(Completion::ignored_with(why))
            };
        }
    }
    let exe = std::env::current_exe().map_err(|e| format!("find the test program: {e}"))?;
    let said = tempfile::NamedTempFile::new().map_err(|e| format!("temp file: {e}"))?;
    let both = || said.reopen().map(|file| Stdio::from(Appending::open(said.path()).unwrap_or(file)));
    let mut command = lane.enter.command(exe.as_os_str());
    command.env(CASE, format!("{}/{}", lane.name, case.name)).stdin(Stdio::null());
    command.stdout(both().map_err(|e| e.to_string())?).stderr(both().map_err(|e| e.to_string())?);
    let mut child = command.spawn().map_err(|e| format!("start {command:?}: {e}"))?;
    let started = Instant::now();
    let limit = case_limit();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if started.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
            _ => break None,
        }
    };
    let text = || String::from_utf8_lossy(&fs::read(said.path()).unwrap_or_default()).into_owned();
    let noted = text().lines().filter_map(|line| line.strip_prefix(NOTE)).map(str::to_owned).collect::<Vec<_>>();
    NOTES.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend(noted);
    match status {
        Some(status) if status.success() => Ok(Completion::Completed),
        Some(status) => Err(format!("{status}\n{}", text()).into()),
        None => {
            let family = system::descendants_of(child.id() as i32);
            for process in &family {
                system::kill(process.pid);
            }
            let _ = child.kill();
            let _ = child.wait();
            Err(format!("not done after {limit:?}; killed it and its processes {family:#?}\n{}", text()).into())
        }
    }
}

/// stdout and stderr of a case share one file, each write at its end.
struct Appending;

impl Appending {
    fn open(path: &Path) -> std::io::Result<fs::File> {
        fs::File::options().append(true).open(path)
    }
}

/// In the child: run one case, look for what it left, take that away.
fn run_one(wanted: &str, cases: &[&Case]) -> ExitCode {
    let found = LANES.iter().zip(std::iter::repeat(cases)).find_map(|(lane, cases)| {
        let name = wanted.strip_prefix(lane.name)?.strip_prefix('/')?;
        Some((*lane, cases.iter().find(|case| case.name == name)?))
    });
    let (lane, case) = found.unwrap_or_else(|| panic!("there is no case {wanted}"));
    // Servers that leave their parent become children of this process, not of pid 1: they can be counted, killed and reaped.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("become the subreaper");
    let said = std::sync::Arc::new(Mutex::new(String::new()));
    let heard = std::sync::Arc::clone(&said);
    std::panic::set_hook(Box::new(move |info| {
        _ = writeln!(heard.lock().unwrap_or_else(std::sync::PoisonError::into_inner), "{info}");
    }));
    let stage = Stage::new(lane);
    let mut result = catch_unwind(AssertUnwindSafe(|| (case.run)(&stage))).map_err(|_| String::new());
    if result.is_ok() {
        result = catch_unwind(AssertUnwindSafe(|| stage.finish())).unwrap_or_else(|_| Err(String::new()));
    }
    if let Err(why) = &result {
        let said = said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = writeln!(std::io::stderr(), "{said}{why}\n--- what it ran ---\n{}", stage.report());
    }
    stage.tear_down();
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(CASE_FAILED) }
}

/// Root started the unprivileged half: run it as the test user, from a place where that user can read and execute it (the
/// checkout may be closed to everyone but root), in a mount namespace of its own.
fn run_as_user() -> Result<ExitCode, String> {
    let user = test_user()?;
    // Made while still root: the cache belongs to root.
    if Need::Minbase.check().is_ok() {
        images::minbase_aci()?;
    }
    let place = tempfile::Builder::new()
        .prefix("fsprov-run.")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir()
        .map_err(|e| format!("temp dir: {e}"))?;
    let copy = |from: &Path, name: &str| {
        let to = place.path().join(name);
        fs::copy(from, &to).map_err(|e| format!("copy {}: {e}", from.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
        Ok::<_, String>(to)
    };
    let exe = copy(&std::env::current_exe().map_err(|e| e.to_string())?, "unprivileged")?;
    let bin = copy(&super::stage::program(), "fsprov")?;

    // Root's toolchain, where that user can read it: bound into the namespace that the half runs in, and gone with it.
    let toolchain = place.path().join("toolchain");
    fs::create_dir(&toolchain).map_err(|e| e.to_string())?;
    let mut command = Enter::Root.command("sh".as_ref());
    command
        .args(["-c", "mount --bind \"$1\" \"$2\"; shift 2; exec \"$@\"", "sh"])
        .args([images::toolchain(), toolchain.clone()]);
    command
        .args(["setpriv", "--reuid", &user.uid, "--regid", &user.gid, "--init-groups"])
        .arg(&exe)
        .args(std::env::args_os().skip(1));
    command
        .env_clear()
        .env("FSPROV_TEST_TOOLCHAIN", &toolchain)
        .env(DROPPED, "1")
        .env("FSPROV_TEST_BIN", &bin)
        .env("LC_ALL", "C")
        .current_dir("/");
    command
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", format!("/home/{}", user.name));
    for (name, value) in std::env::vars_os() {
        let keep = |name: &OsString| name.to_string_lossy().starts_with("FSPROV_TEST_") || name == "LLVM_PROFILE_FILE";
        if keep(&name) && name != "FSPROV_TEST_BIN" {
            command.env(name, value);
        }
    }
    let status = command.status().map_err(|e| format!("start {command:?}: {e}"))?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}
