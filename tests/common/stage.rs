//! One case's own directory, state root and commands; and what makes sure that nothing of it stays behind.

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::mount::UnmountFlags;

use super::run::{self, Outcome, words};
use super::system::{self, Process};
use super::{Enter, Lane};

/// How long a process that was told to end may take to be gone.
const ENDING: Duration = Duration::from_secs(20);

/// How the names of cases' directories begin.
pub(crate) const PREFIX: &str = "fsprov-t.";

pub(crate) struct Stage {
    pub(crate) lane: Lane,
    /// The case's own directory. Everything it makes, mounts and starts is below it.
    pub(crate) dir: PathBuf,
    log: RefCell<Vec<String>>,
}

/// The program under test.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("FSPROV_TEST_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_fsprov")), PathBuf::from)
}

impl Stage {
    pub(crate) fn new(lane: Lane) -> Self {
        let parent = std::env::var_os("FSPROV_TEST_TMP").map_or_else(std::env::temp_dir, PathBuf::from);
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(&parent)
            .expect("make the case's directory")
            .keep();
        // As mountinfo will show it.
        let dir = dir.canonicalize().expect("resolve the case's directory");
        fs::create_dir(dir.join("home")).expect("make home");
        Stage { lane, dir, log: RefCell::default() }
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    /// The state root that every command of this case uses.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Make a directory (and those above it) below the case's own.
    pub(crate) fn mkdir(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.dir.join(name);
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("make {}: {e}", path.display()));
        path
    }

    /// Write a file below the case's directory.
    pub(crate) fn write(&self, name: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.join(name);
        fs::write(&path, content).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        path
    }

    fn clean(&self, command: &mut Command) {
        command.env_clear().env("LC_ALL", "C").env("HOME", self.dir.join("home")).env("FSPROV_ROOT", self.state());
        for name in ["PATH", "LLVM_PROFILE_FILE"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.current_dir(&self.dir);
    }

    /// `fsprov ARGS`, not run yet.
    pub(crate) fn fsprov<I: IntoIterator<Item = S>, S: Into<OsString>>(&self, args: I) -> Call<'_> {
        let mut command = Command::new(program());
        command.args(words(args));
        self.clean(&mut command);
        Call { stage: self, command }
    }

    /// Another program, in the same clean environment, not run yet.
    pub(crate) fn tool<I: IntoIterator<Item = S>, S: Into<OsString>>(&self, name: &str, args: I) -> Call<'_> {
        let mut command = Command::new(name);
        command.args(words(args));
        self.clean(&mut command);
        Call { stage: self, command }
    }

    /// `fsprov mount --backend LANE'S OPTIONS... IMAGE ROOTFS`, not run yet. The rootfs is unmounted when the case ends, if it still is there.
    /// The same call under a limit, as `ulimit` of a shell sets it.
    pub(crate) fn limited(&self, limit: &str, call: &Call<'_>) -> Call<'_> {
        let mut limited = self.tool("sh", ["-c", &format!("ulimit {limit}; exec \"$@\""), "sh"]);
        limited.command.arg(call.command.get_program()).args(call.command.get_args());
        limited.command.envs(call.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        limited
    }

    pub(crate) fn mount_call<S: Into<OsString>>(
        &self,
        image: impl AsRef<OsStr>,
        rootfs: impl AsRef<Path>,
        options: impl IntoIterator<Item = S>,
    ) -> Call<'_> {
        assert!(!self.lane.backend.is_empty(), "this case needs a lane with a backend");
        let rootfs = self.dir.join(rootfs);
        let mut args = words(["mount", "--backend", self.lane.backend]);
        args.extend(options.into_iter().map(Into::into));
        args.push(image.as_ref().to_owned());
        args.push(rootfs.into());
        self.fsprov(args)
    }

    /// Mount, and it must work. Gives the rootfs's path.
    #[track_caller]
    pub(crate) fn mount<S: Into<OsString>>(
        &self,
        image: impl AsRef<OsStr>,
        rootfs: impl AsRef<Path>,
        options: impl IntoIterator<Item = S>,
    ) -> PathBuf {
        let at = self.dir.join(rootfs.as_ref());
        self.mount_call(image, rootfs, options).run().ok();
        at
    }

    /// Unmount, and it must work and leave nothing at the place.
    #[track_caller]
    pub(crate) fn unmount(&self, rootfs: impl AsRef<Path>) {
        let rootfs = self.dir.join(rootfs);
        self.fsprov([OsStr::new("unmount"), rootfs.as_os_str()]).run().ok();
        let left = system::mounts_below(&rootfs);
        assert!(left.is_empty(), "unmount left mounts: {left:#?}");
    }

    /// The record files and other things below `state/containers`.
    pub(crate) fn records(&self) -> Vec<PathBuf> {
        let found = fs::read_dir(self.state().join("containers"));
        found.map(|dir| dir.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
    }

    /// What a provision left behind: mounts below the case's directory, processes, records, staging. Empty: nothing.
    pub(crate) fn leftovers(&self, patience: Duration) -> Vec<String> {
        let mut left: Vec<String> = Vec::new();
        left.extend(system::survivors(patience).iter().map(|p| format!("process {}: {}", p.pid, p.command)));
        left.extend(system::mounts_below(&self.dir).iter().map(|m| format!("mount: {m:?}")));
        left.extend(self.records().iter().map(|p| format!("record: {}", p.display())));
        let staging =
            fs::read_dir(self.state().join("staging")).map(|d| d.flatten().map(|e| e.path()).collect::<Vec<_>>());
        // Files here without a record say nothing, but a long-lived state root should not fill with them.
        if self.records().is_empty() {
            let points =
                fs::read_dir(self.state().join("points")).map(|d| d.flatten().map(|e| e.path()).collect::<Vec<_>>());
            left.extend(points.unwrap_or_default().iter().map(|p| format!("mount point taken: {}", p.display())));
        }
        left.extend(staging.unwrap_or_default().iter().map(|p| format!("staging: {}", p.display())));
        left
    }

    #[track_caller]
    pub(crate) fn assert_nothing_left(&self, when: &str) {
        let left = self.leftovers(ENDING);
        assert!(left.is_empty(), "{when}, these were left:\n  {}", left.join("\n  "));
    }

    /// The servers that this case started and that still run.
    #[expect(clippy::unused_self, reason = "a case is one process: its stage's servers are those of the process")]
    pub(crate) fn servers(&self) -> Vec<Process> {
        system::reap();
        system::descendants_of(system::my_pid()).into_iter().filter(|p| p.state != 'Z').collect()
    }

    /// A line for the report that a failing case prints.
    pub(crate) fn note(&self, text: impl Into<String>) {
        self.log.borrow_mut().push(text.into());
    }

    /// The commands run so far, the state of mounts and processes, and what servers logged.
    pub(crate) fn report(&self) -> String {
        let mut text = self.log.borrow().join("");
        _ = writeln!(text, "\nin {}", self.dir.display());
        for mount in system::mounts_below(&self.dir) {
            _ = writeln!(text, "  mount {mount:?}");
        }
        for process in system::descendants_of(system::my_pid()) {
            _ = writeln!(text, "  process {} {} {}", process.pid, process.state, process.command);
        }
        for record in self.records() {
            for name in ["record.json", "backend/server.log"] {
                let file = record.join(name);
                if let Ok(content) = fs::read(&file) {
                    let content = String::from_utf8_lossy(&content[..content.len().min(4000)]).into_owned();
                    _ = writeln!(text, "  {}:\n{content}", file.display());
                }
            }
        }
        text
    }

    /// The case is over and passed: unmount what is still mounted, as a user would; then nothing may be left.
    pub(crate) fn finish(&self) -> Result<(), String> {
        if !self.records().is_empty() {
            let outcome = self.fsprov(["unmount", "--all"]).run();
            if outcome.code() != Some(0) {
                return Err(format!("unmount at the end of the case failed:\n{}", outcome.describe()));
            }
        }
        let left = self.leftovers(ENDING);
        if left.is_empty() { Ok(()) } else { Err(format!("the case left behind:\n  {}", left.join("\n  "))) }
    }

    /// Take away everything that is left, by force, and the directory: only what is below it, and never through a live mount.
    pub(crate) fn tear_down(&self) {
        for process in system::descendants_of(system::my_pid()) {
            system::kill(process.pid);
        }
        system::survivors(ENDING);
        for mount in system::mounts_below(&self.dir).iter().rev() {
            if self.lane.enter == Enter::User {
                let _ = Command::new("fusermount3").arg("-uz").arg(&mount.point).output();
            } else {
                let _ = rustix::mount::unmount(&mount.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            }
        }
        if std::env::var_os("FSPROV_TEST_KEEP").is_some() || !system::mounts_below(&self.dir).is_empty() {
            return;
        }
        open_up(&self.dir);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Give every directory its owner's permission bits back, so that it can be emptied.
fn open_up(dir: &Path) {
    let Ok(meta) = fs::symlink_metadata(dir) else { return };
    if !meta.is_dir() {
        return;
    }
    if meta.permissions().mode() & 0o700 != 0o700 {
        let _ = fs::set_permissions(dir, fs::Permissions::from_mode(0o700));
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

/// A command, not run yet.
pub(crate) struct Call<'a> {
    stage: &'a Stage,
    pub(crate) command: Command,
}

impl Call<'_> {
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn cwd(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    pub(crate) fn run(self) -> Outcome {
        self.run_beside(|| {})
    }

    /// Run it to its end, and do `beside` again and again meanwhile.
    pub(crate) fn run_beside(self, beside: impl FnMut()) -> Outcome {
        let outcome = run::run_beside(self.command, beside);
        self.stage.note(outcome.describe());
        outcome
    }
}
