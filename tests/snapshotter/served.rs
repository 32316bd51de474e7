//! The program, running, with directories of its own.

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::{Client, Mount};

/// Longest that the program may take to begin or to end.
const WAIT: Duration = Duration::from_secs(20);

pub(crate) struct Served {
    dir: tempfile::TempDir,
    child: Option<Child>,
    /// Longest that it may take to begin.
    pub(crate) patience: Duration,
}

/// FSPROV_BIN: another build, as for what is measured.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("FSPROV_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_fsprov").into()).into()
}

impl Served {
    /// One that runs.
    pub(crate) fn new() -> Self {
        let mut served = Self::stopped();
        served.start(&[]);
        served
    }

    pub(crate) fn stopped() -> Self {
        // FSPROV_TEST_DIR: elsewhere than in memory, for what is measured.
        let dir = std::env::var_os("FSPROV_TEST_DIR").unwrap_or_else(|| "/tmp".into());
        Self::stopped_in(Path::new(&dir))
    }

    pub(crate) fn stopped_in(dir: &Path) -> Self {
        Served { dir: tempfile::tempdir_in(dir).expect("a directory"), child: None, patience: WAIT }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.path("root/snapshotter")
    }

    /// Where it looks for containerd.
    pub(crate) fn containerd(&self) -> PathBuf {
        self.path("containerd.sock")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    /// `fsprov` with the state root of this one.
    pub(crate) fn fsprov(&self) -> Command {
        let mut command = Command::new(program());
        command.env("FSPROV_ROOT", self.path("root")).env("FSPROV_CONFIG", "").env("LC_ALL", "C");
        command.env_remove("FAILPOINTS").current_dir(self.dir.path());
        command
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = self.fsprov();
        command.arg("snapshotter").arg("--socket").arg(self.socket()).arg("--containerd").arg(self.containerd());
        command
    }

    pub(crate) fn start(&mut self, env: &[(&str, &str)]) {
        self.start_with(&[], env);
    }

    pub(crate) fn start_with(&mut self, args: &[&str], env: &[(&str, &str)]) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).expect("a log");
        let mut command = self.command();
        if let Some(form) = lower().filter(|_| !args.contains(&"--lower")) {
            command.args(["--lower", &form]);
        }
        command.args(args).envs(env.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("start fsprov"));
        let until = Instant::now() + self.patience;
        while !self.is_listening() {
            assert!(Instant::now() < until, "it does not listen: {}", self.log());
            if let Some(status) = self.child.as_mut().expect("it was started").try_wait().expect("wait") {
                // One that a fault kills before it listens.
                assert_eq!(status.signal(), Some(9), "{}", self.log());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// This one: a child of the one before, that has begun and is not another program yet, may still have its socket.
    fn is_listening(&self) -> bool {
        std::os::unix::net::UnixStream::connect(self.socket()).is_ok_and(|socket| {
            let peer = rustix::net::sockopt::socket_peercred(socket).expect("a peer");
            peer.pid.as_raw_nonzero().get() as u32 == self.pid()
        })
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.socket())
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("it was started").id()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// It ended by itself, or was killed by a fault; waits for that.
    pub(crate) fn wait_dead(&mut self) {
        let until = Instant::now() + WAIT;
        let child = self.child.as_mut().expect("it was started");
        while child.try_wait().expect("wait").is_none() {
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.child = None;
    }

    /// SIGTERM; gives the exit code.
    pub(crate) fn stop(&mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("send SIGTERM");
        let until = Instant::now() + WAIT;
        let child = self.child.as_mut().expect("it was started");
        loop {
            if let Some(status) = child.try_wait().expect("wait") {
                self.child = None;
                return status.code();
            }
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Mount what a call answered, as containerd does, and give where.
    pub(crate) fn mount(&self, mounts: &[Mount], name: &str) -> Mounted {
        let at = self.path(name);
        std::fs::create_dir_all(&at).expect("make a mount point");
        let [mount] = mounts else { panic!("one mount was expected: {mounts:?}") };
        // containerd does likewise: options are a page at most.
        let links = format!("{}/", self.state().join("l").display());
        let run = |args: &[&str]| {
            let args: Vec<String> = args.iter().map(|arg| arg.replace(&links, "")).collect();
            let mut command = Command::new("mount");
            if self.state().join("l").exists() {
                command.current_dir(&links);
            }
            let said = command.args(&args).arg(&at).output().expect("run mount");
            assert!(said.status.success(), "mount {args:?}: {}", String::from_utf8_lossy(&said.stderr));
        };
        let options: Vec<&str> = mount.options.iter().map(String::as_str).collect();
        if mount.kind == "bind" {
            assert!(options.contains(&"rbind"), "{options:?}");
            run(&["--rbind", &mount.source]);
            if options.contains(&"ro") {
                run(&["-o", "remount,bind,ro"]);
            }
        } else {
            run(&["-t", &mount.kind, "-o", &options.join(","), &mount.source]);
        }
        Mounted(at)
    }

    /// What is in the directories of the state, by their names, except for snapshots that nobody asked for yet.
    pub(crate) fn entries(&self, dir: &str) -> Vec<String> {
        let names = std::fs::read_dir(self.state().join(dir)).expect("list").flatten();
        let is_asked_for = |dir: &Path| {
            let record = std::fs::read(dir.join("record.json")).unwrap_or_default();
            record.is_empty() || record.iter().any(|byte| *byte != b' ')
        };
        let names = names.filter(|entry| is_asked_for(&entry.path()));
        let mut names: Vec<String> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// Wait until it holds.
pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < until, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What the environment says about `--lower`, for all tests.
pub(crate) fn lower() -> Option<String> {
    std::env::var("FSPROV_TEST_LOWER").ok()
}

/// Is everything that lies below snapshots shown by FUSE?
pub(crate) fn is_by_fuse() -> bool {
    lower().as_deref() == Some("fuse")
}

impl Served {
    /// The FUSE mounts of what lies below snapshots, by their names.
    pub(crate) fn fuse_mounts(&self) -> Vec<String> {
        let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let below = format!("{}/", self.state().join("f/m").display());
        let name = |line: &str| Some(line.split(' ').nth(4)?.strip_prefix(&below)?.strip_suffix("/rootfs")?.to_owned());
        table.lines().filter_map(name).collect()
    }

    /// The processes that serve one of these: the supervisor, and the worker.
    pub(crate) fn fuse_servers(&self, name: &str) -> [i32; 2] {
        let record = self.state().join("f/containers").join(name).join("record.json");
        let text = std::fs::read_to_string(record).expect("a record");
        let record: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        ["supervisor", "worker"].map(|which| record["traces"][which]["pid"].as_i64().expect("a pid") as i32)
    }
}

impl Served {
    /// Their servers end with them.
    fn unmount_fuse(&self) {
        for name in self.fuse_mounts() {
            let _ = Command::new("umount").arg("-l").arg(self.state().join("f/m").join(name).join("rootfs")).status();
        }
    }

    /// Delete the state directory of one that is stopped.
    pub(crate) fn lose_state(&self) {
        self.unmount_fuse();
        std::fs::remove_dir_all(self.state()).expect("remove");
    }
}

impl Served {
    /// SIGKILL of the process that answers for one of these.
    pub(crate) fn kill_worker(&self, name: &str) {
        let which = self.state().join("f/containers").join(name).join("backend/worker.json");
        let text = std::fs::read_to_string(which).expect("which process answers");
        let worker: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let pid = rustix::process::Pid::from_raw(worker["pid"].as_i64().expect("a pid") as i32).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
        self.unmount_fuse();
    }
}

/// Unmounted when dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| format!("{e}"))
    }
    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap_or_else(|e| panic!("write {name}: {e}"));
    }
    #[allow(dead_code, reason = "for tests that look at the mount itself")]
    pub(crate) fn root(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
