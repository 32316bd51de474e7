//! The OCI runtime: which one, how it is started, and what it says when it fails.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result, show};
use crate::id::ContainerId;
use crate::sys::fs::read_bounded;

/// Those that are looked for, the first first: crun starts in a third of runc's time.
const KNOWN: [&str; 3] = ["crun", "runc", "youki"];
/// The same for root: crun runs without cgroups here, and so without the list of devices that a container of root's may open.
const KNOWN_TO_ROOT: [&str; 3] = ["runc", "youki", "crun"];
/// Where besides PATH: ordinary users' PATH may lack the directories of system programs.
const USUAL_DIRS: &str = "/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin:/bin:/sbin";
/// How much of a runtime's log is read: a failure is a line or two.
const MAX_LOG_BYTES: u64 = 1 << 20;

/// A runtime of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Runtime {
    #[serde(with = "crate::pathtext")]
    path: PathBuf,
}

/// What one container needs of its runtime.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    /// Its name.
    pub(crate) id: &'a ContainerId,
    /// The bundle, with the runtime's own files in it.
    pub(crate) bundle: &'a Path,
}

impl Call<'_> {
    /// The pid of the container's first process, once it was made.
    pub(crate) fn pid_file(&self) -> PathBuf {
        self.bundle.join(super::bundle::PID)
    }

    fn log(&self) -> PathBuf {
        self.bundle.join("runtime.log")
    }

    /// Why the runtime itself failed; `None`: it did not, the program gave the exit code.
    pub(crate) fn failure(&self) -> Option<Failure> {
        let file = std::fs::File::open(self.log()).ok()?;
        let text = read_bounded("read", show(self.log()), file, MAX_LOG_BYTES).ok()?;
        let said = errors(&String::from_utf8_lossy(&text));
        (!said.is_empty()).then(|| Failure { said: said.join("; ") })
    }
}

impl Runtime {
    /// The one asked for, by name or path, or the first there is.
    pub(crate) fn find(asked: Option<&OsStr>) -> Result<Self> {
        const OP: &str = "find runtime";
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places: Vec<PathBuf> = std::env::split_paths(&path).chain(std::env::split_paths(USUAL_DIRS)).collect();
        let is_program = |path: &Path| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
        let look = |name: &OsStr| {
            places.iter().filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(|path| is_program(path))
        };
        let found = match asked {
            Some(asked) if Path::new(asked).components().count() > 1 => {
                let whole = std::path::absolute(asked).map_err(|e| Error::io(OP, show(asked), e))?;
                Some(whole).filter(|path| is_program(path))
            }
            Some(asked) => look(asked),
            None => {
                let known = if crate::sys::process::is_root_of_host()? { KNOWN_TO_ROOT } else { KNOWN };
                known.iter().find_map(|name| look(OsStr::new(name)))
            }
        };
        found.map(|path| Runtime { path }).ok_or_else(|| {
            let is_there = |asked: &OsStr| Path::new(asked).components().count() > 1 && Path::new(asked).exists();
            let (subject, why) = match asked {
                Some(asked) if is_there(asked) => {
                    let why = "it is not a program that you may run";
                    return Error::new(Kind::Unsupported, OP, show(asked), why)
                        .hint("give the path of crun, runc or youki, or leave out --runtime");
                }
                Some(asked) => (show(asked), "there is no such program"),
                None => (String::new(), "there is no crun, runc or youki on this host"),
            };
            Error::new(Kind::Unsupported, OP, subject, why)
                .hint("as root: install the package crun (apt-get install crun, dnf install crun), or runc")
        })
    }

    /// Its program.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its name, for people.
    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Is it crun? That one has switches of its own.
    fn is_crun(&self) -> bool {
        self.name().contains("crun")
    }

    /// Does it refuse a host that has cgroup v1 as well, although it makes no cgroup? youki does without one where it is not root and has v2.
    pub(crate) fn wants_pure_cgroups(&self, is_root: bool) -> bool {
        self.is_crun() || (self.is_youki() && !is_root)
    }

    /// Does it fill a tmpfs with what the image has there (`tmpcopyup`, which runtime-spec leaves to runtimes)? youki 0.7 does not know the word.
    pub(crate) fn copies_up(&self) -> bool {
        !self.is_youki()
    }

    /// Does it wait for ever for a program that ends at once? youki 0.7 blocks SIGCHLD, for which it waits, after it has started the program.
    pub(crate) fn misses_the_end(&self) -> bool {
        self.is_youki()
    }

    /// Can it hand the terminal over and yet wait for the end? runc and youki want `--detach` for that; runc shows it well itself.
    pub(crate) fn hands_over_terminal(&self) -> bool {
        self.is_crun()
    }

    fn is_youki(&self) -> bool {
        self.name().contains("youki")
    }

    fn command(&self, call: &Call<'_>) -> Command {
        let mut command = Command::new(&self.path);
        command
            .arg("--root")
            .arg(call.bundle.join("runtime"))
            .arg("--log")
            .arg(call.log())
            .args(["--log-format", "json"]);
        if self.is_crun() {
            // Limits are the business of engines; without any it needs no rights over cgroups, which differ from host to host.
            command.args(["--cgroup-manager", "disabled"]);
        }
        command
    }

    /// Run a container to its end, with this stdin, or with a terminal that it hands over.
    pub(crate) fn run(&self, call: &Call<'_>, stdin: Option<OwnedFd>) -> Command {
        let mut command = self.command(call);
        command.arg("run").arg("--bundle").arg(call.bundle).arg("--pid-file").arg(call.pid_file());
        if stdin.is_none() {
            command.arg("--console-socket").arg(call.bundle.join(super::console::SOCKET));
        }
        command.arg(call.id.as_str()).stdin(stdin.map_or_else(Stdio::null, Stdio::from));
        command
    }

    /// Forget a container whatever state it is in; it is ended first.
    pub(crate) fn delete(&self, call: &Call<'_>) {
        let mut command = self.command(call);
        command.args(["delete", "--force", call.id.as_str()]);
        let done = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        log::debug!(target: "fsprov::run", "{} delete {}: {done:?}", self.name(), call.id);
    }
}

/// What a runtime said when it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Its words.
    pub(crate) said: String,
}

impl Failure {
    /// As podman tells them apart: 127 for a program that is not there, 126 for one that cannot be run, 125 for all else.
    pub(crate) fn exit_code(&self) -> u8 {
        let said = self.said.to_ascii_lowercase();
        let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
        if !has(&["exec", "executable"]) {
            return super::FAILED;
        }
        if has(&["not found in $path", "no such file or directory", "executable file not found"]) {
            return super::NOT_FOUND;
        }
        if has(&["permission denied", "is a directory", "exec format error"]) { super::NOT_RUN } else { super::FAILED }
    }
}

/// The entries of a log of JSON objects, which crun 1.28 spreads over lines, and others do not.
fn entries(log: &str) -> Vec<serde_json::Value> {
    let (mut all, mut rest) = (Vec::new(), log);
    loop {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter();
        all.extend(values.by_ref().map_while(std::result::Result::ok));
        // Skip a line that holds no JSON.
        rest = rest.get(values.byte_offset()..).unwrap_or_default().trim_start();
        match rest.split_once('\n') {
            Some((_, next)) => rest = next,
            None => return all,
        }
    }
}

/// The messages of errors in a runtime's log.
fn errors(log: &str) -> Vec<String> {
    let failed = entries(log).into_iter().filter(|entry| {
        let level = entry["level"].as_str().unwrap_or_default().to_ascii_lowercase();
        level == "error" || level == "fatal"
    });
    let failed: Vec<_> = failed.collect();
    let mut all: Vec<String> = failed.iter().filter_map(said).collect();
    all.dedup();
    if all.last().is_some_and(|last| last.starts_with(YOUKI)) {
        // Each caller reports the error again: the cause is in the first messages, up to the one with an errno. Without an errno, the last message
        // says most.
        match failed.iter().position(|entry| entry["err"].is_string()) {
            Some(place) => all.truncate(place + 1),
            None => all = all.split_off(all.len() - 1),
        }
        if let Some(first) = all.first_mut().filter(|first| first.starts_with(YOUKI)) {
            first.drain(..YOUKI.len());
        }
    }
    all
}

/// How youki's main program begins its last words.
const YOUKI: &str = "error in executing command: ";

/// What an entry says: `msg` is crun's and runc's, `message` youki's, with a backtrace below it.
fn said(entry: &serde_json::Value) -> Option<String> {
    let text = entry["msg"].as_str().or_else(|| entry["message"].as_str())?;
    let text = text.split("\n\nStack backtrace:").next().unwrap_or(text).trim();
    Some(entry["err"].as_str().map_or_else(|| text.to_owned(), |why| format!("{text}: {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_runtime_says() {
        let log = "{\"level\":\"warning\",\"msg\":\"unable to get oom kill count\",\"time\":\"x\"}\nnot json\n\
                   { \"msg\": \"executable file `nope` not found in $PATH: No such file or directory\", \"level\": \"error\", \"time\": \"y\" }\n";
        assert_eq!(errors(log), ["executable file `nope` not found in $PATH: No such file or directory"]);
        let log = "{\n  \"msg\": \"x\",\n  \"level\": \"warning\"\n}\n{ not json\n{\n  \"msg\": \"mount `tmpfs` to `x`\",\n  \"level\": \"error\"\n}\n";
        assert_eq!(errors(log), ["mount `tmpfs` to `x`"]);
        assert!(errors("{\"level\":\"error\",\"msg\":\"cut").is_empty());
        assert!(errors("{\"level\":\"warning\",\"msg\":\"x\"}").is_empty());
        let log = "{\"level\":\"ERROR\",\"message\":\"failed to run intermediate process x\",\"target\":\"a\"}\n\
                   {\"level\":\"WARN\",\"message\":\"no\",\"target\":\"a\"}\n\
                   {\"level\":\"ERROR\",\"message\":\"error in executing command: failed to create container: x\\n\\nStack backtrace:\\n   0: y\",\"target\":\"youki\"}\n";
        assert_eq!(errors(log), ["failed to create container: x"]);
        let log = "{\"level\":\"ERROR\",\"message\":\"failed to mount x\"}\n{\"level\":\"ERROR\",\"message\":\"failed to prepare rootfs\",\"err\":\"EINVAL\"}\n\
                   {\"level\":\"ERROR\",\"message\":\"error in executing command: y\",\"target\":\"youki\"}\n";
        assert_eq!(errors(log), ["failed to mount x", "failed to prepare rootfs: EINVAL"]);
        for (said, code) in [
            ("executable file `nope` not found in $PATH: No such file or directory", 127),
            (
                "runc run failed: unable to start container process: exec: \"nope\": executable file not found in $PATH",
                127,
            ),
            ("runc run failed: unable to start container process: exec: \"/etc\": is a directory", 126),
            ("open executable: Permission denied", 126),
            ("exec /x: Exec format error", 126),
            ("mount `proc` to `proc`: Operation not permitted", 125),
            ("mount /a: No such file or directory", 125),
        ] {
            assert_eq!(Failure { said: said.into() }.exit_code(), code, "{said}");
        }
    }

    #[test]
    fn what_is_no_program_is_not_told_to_be_missing() {
        for asked in ["/etc/passwd", "/etc"] {
            let error = Runtime::find(Some(OsStr::new(asked))).unwrap_err();
            assert!(error.cause().contains("not a program that you may run"), "{error}");
        }
    }

    #[test]
    fn one_that_is_not_there_is_named_with_the_package() {
        for asked in ["no-such-runtime", "/no/such"] {
            let error = Runtime::find(Some(OsStr::new(asked))).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(
                error.to_string().contains(asked) && error.remedy().contains("install the package crun"),
                "{error}"
            );
        }
    }
}
