//! All processes of a service die, and what is open in its rootfs lives on. The test stands for systemd with its descriptor store
//! (sd_notify(3), FDSTORE=1; sd_listen_fds(3)).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};

use super::destroy::health;
use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::stage::program;
use crate::common::{Need, Stage, system};

/// Longest wait for what a server does at once.
const SOON: Duration = Duration::from_secs(20);
/// Descriptors to be passed on lie here and above, out of the way of where they go.
const ASIDE: i32 = 100;

/// systemd's part.
struct Store {
    kept: Vec<(String, OwnedFd)>,
    socket: UnixDatagram,
}

impl Store {
    fn new(stage: &Stage) -> Self {
        let socket = UnixDatagram::bind(stage.path("notify")).expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("timeout");
        Store { kept: Vec::new(), socket }
    }

    /// One message, and what it says of descriptors done.
    #[track_caller]
    fn hear(&mut self) -> String {
        let mut bytes = [0_u8; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .expect("systemd is told something");
        let said = String::from_utf8_lossy(&bytes[..got.bytes]).into_owned();
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let name = said.lines().find_map(|l| l.strip_prefix("FDNAME=")).unwrap_or_default().to_owned();
        if said.lines().any(|l| l == "FDSTORE=1") {
            assert!(said.lines().any(|l| l == "FDPOLL=0") && !name.is_empty() && fds.len() == 1, "{said}");
            self.kept.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
        } else if said.lines().any(|l| l == "FDSTOREREMOVE=1") {
            self.kept.retain(|(kept, _)| *kept != name);
        }
        said
    }

    #[track_caller]
    fn hear_until(&mut self, word: &str) {
        while !self.hear().lines().any(|l| l == word) {}
    }

    fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.kept.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        names
    }

    /// Start the service with what is kept.
    fn start(&self, stage: &Stage, options: &[OsString], failpoints: &str) -> Child {
        let mut script = "export LISTEN_PID=$$; exec \"$@\"".to_owned();
        let mut passed = Vec::new();
        for (n, (_, fd)) in self.kept.iter().enumerate() {
            let aside = fcntl_dupfd_cloexec(fd, ASIDE).expect("dup");
            let from = std::os::fd::AsRawFd::as_raw_fd(&aside);
            script += &format!(" {}<&{from} {from}<&-", n + 3);
            fcntl_setfd(&aside, FdFlags::empty()).expect("clear close-on-exec");
            passed.push(aside);
        }
        let names: Vec<_> = self.kept.iter().map(|(name, _)| name.as_str()).collect();
        let mut call = stage
            .tool("bash", ["-c".into(), script.into(), "bash".into(), program().into_os_string()])
            .args(["mount", "--backend", "fuse", "--foreground", "--id", "s"])
            .args(options)
            .arg("img")
            .arg(stage.path("rootfs"))
            .env("NOTIFY_SOCKET", stage.path("notify"))
            .env("FAILPOINTS", failpoints);
        if !names.is_empty() {
            call = call.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        let said = File::options().append(true).create(true).open(stage.path("said")).expect("create");
        call.command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).spawn().expect("start")
    }
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("signal");
}

/// Supervisor, worker, mount.
#[track_caller]
fn shown(stage: &Stage) -> (i32, i32, u64) {
    let shown = stage.fsprov(["inspect", "--json", "s"]).run().ok().json();
    let pid = |name: &str| shown[name].as_i64().unwrap_or_else(|| panic!("{name}: {shown:#}")) as i32;
    (pid("supervisor_pid"), pid("worker_pid"), shown["mount_id"].as_u64().expect("mount_id"))
}

/// As `KillMode=mixed` does when the main process was killed.
fn kill_all(stage: &Stage, service: &mut Child) {
    let (supervisor, worker, _) = shown(stage);
    service.kill().expect("kill");
    service.wait().expect("wait");
    system::kill(supervisor);
    system::kill(worker);
    // Not by `system::processes`: the command line of a program that waits for a page of the mount cannot be read.
    let runs = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
    };
    assert!(system::eventually(SOON, || !runs(supervisor) && !runs(worker)));
}

/// SIGTERM: unmounts, and nothing is kept.
#[track_caller]
fn stop(stage: &Stage, store: &mut Store, mut service: Child) {
    signal(service.id() as i32, Signal::TERM);
    store.hear_until("STOPPING=1");
    while !store.kept.is_empty() {
        store.hear();
    }
    let said = || fs::read_to_string(stage.path("said")).unwrap_or_default();
    assert!(service.wait().expect("wait").success(), "{}", said());
    stage.assert_nothing_left("after it was stopped");
}

fn prepare(stage: &Stage) -> Vec<OsString> {
    let image = stage.small_image();
    stage.fsprov(["image".as_ref(), "import".as_ref(), image.as_os_str()]).args(["--name", "img"]).run().ok();
    stage.mkdir("sandbox/w");
    let mut options = sandbox(stage).to_vec();
    options.extend(volume("w", "/w", "rw"));
    options
}

case!("all_processes_die_and_the_next_start_goes_on", on::fuse, &[Need::Tool("bash")], |stage: &Stage| {
    let options = prepare(stage);
    fs::copy("/bin/sh", stage.path("sandbox/w/sh")).expect("copy a shell");
    for name in ["fresh0", "fresh1", "held0", "held1"] {
        stage.write(format!("sandbox/w/{name}"), "fresh");
    }
    let (rootfs, w) = (stage.path("rootfs"), stage.path("rootfs/w"));
    let mut store = Store::new(stage);
    let mut service = store.start(stage, &options, "serve.sync=sleep(60000)");
    store.hear_until("READY=1");
    let names = store.names().join(" ");
    assert!(names.contains("fsprov-connection") && names.contains("fsprov-lock"), "{names}");
    let mount = shown(stage).2;

    // Its program is mapped from the volume, it reads from the image by its working directory.
    let line =
        "n=0; while read -r l <hosts && [ \"$l\" = '127.0.0.1 localhost' ]; do n=$((n+1)); echo $n >\"$0\"; done";
    let mut reader = Command::new(w.join("sh"))
        .args(["-c", line])
        .arg(stage.path("count"))
        .current_dir(rootfs.join("etc"))
        .spawn()
        .expect("run from the volume");
    let count = || fs::read_to_string(stage.path("count")).ok().and_then(|t| t.trim().parse::<u64>().ok());
    let moves = || {
        let before = count();
        system::eventually(SOON, || count() > before)
    };
    assert!(moves(), "it reads");
    // Another process holds what is open: in this one it would be closed, and flushed, by every program it starts meanwhile.
    let script = "exec 7<>$1/w/gone && rm $1/w/gone && exec 8<$1/etc/passwd 9>$1/w/f && echo held && while read -r _; do \
                      read -r line <&8; echo \"$line\"; printf 'more ' >&9 && echo wrote; \
                      printf x >&7 2>/dev/null && echo kept || echo lost; done";
    let mut holder = Command::new("bash")
        .args(["-c", script, "bash"])
        .arg(&rootfs)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start bash");
    let mut answers = BufReader::new(holder.stdout.take().expect("stdout")).lines().map_while(Result::ok);
    assert_eq!(answers.next().as_deref(), Some("held"));

    for round in 0..2 {
        // Read by the worker and not answered, where the build has fault points.
        let mut held = Command::new("sync").arg(w.join(format!("held{round}"))).spawn().expect("start sync");
        std::thread::sleep(Duration::from_millis(300));
        let is_held = held.try_wait().expect("look").is_none();
        assert!(Need::Failpoints.check().is_err() || round > 0 || is_held, "the fault point holds it");
        kill_all(stage, &mut service);
        assert_eq!(health(stage), "dead");
        // Asked for while there is nobody.
        let fresh = w.join(format!("fresh{round}"));
        let mut queued = Command::new("cat").arg(fresh).stdout(Stdio::piped()).spawn().expect("start cat");
        std::thread::sleep(Duration::from_millis(200));
        assert!(queued.try_wait().expect("look").is_none(), "nobody answers");

        service = store.start(stage, &options, "");
        store.hear_until("READY=1");
        let said = || fs::read_to_string(stage.path("said")).unwrap_or_default();
        assert_eq!((shown(stage).2, health(stage).as_str()), (mount, "ready"), "{}", said());
        assert_eq!(store.names().join(" "), names, "what is kept stays kept");
        for (what, child) in [("queued", &mut queued), ("held", &mut held)] {
            let ended = || child.try_wait().expect("look").is_some_and(|status| status.success());
            assert!(system::eventually(SOON, ended), "{what}: a request in flight hangs or fails");
        }
        let mut text = String::new();
        queued.stdout.take().expect("stdout").read_to_string(&mut text).expect("read");
        assert_eq!(text, "fresh");
        assert!(moves(), "the program in it goes on");
        assert!(reader.try_wait().expect("look").is_none());
        holder.stdin.as_mut().expect("stdin").write_all(b"\n").expect("ask");
        let line = answers.next().expect("an answer");
        assert!(round > 0 || line.starts_with("root:"), "an open file of the image is good: {line}");
        assert_eq!(answers.next().as_deref(), Some("wrote"), "an open file of the volume is good");
        assert_eq!(answers.next().as_deref(), Some("lost"), "a file without a name is what is not kept");
        assert_eq!(fs::read_to_string(stage.path("sandbox/w/f")).expect("read"), "more ".repeat(round + 1));
        let count = |dir| fs::read_dir(stage.path(dir)).expect("list").count();
        assert_eq!(count("rootfs/etc"), count("image/etc"));
    }
    // And a worker's death is nobody's business still.
    system::kill(shown(stage).1);
    assert!(moves(), "the program in it goes on");
    drop(holder.stdin.take());
    holder.wait().expect("wait");
    reader.kill().expect("kill");
    reader.wait().expect("wait");
    stop(stage, &mut store, service);
},);

// What was kept is of no use: it is let go, and the rootfs mounted anew.
case!("what_was_kept_of_another_mount_is_let_go", on::fuse, &[Need::Tool("bash")], |stage: &Stage| {
    let options = prepare(stage);
    let mut store = Store::new(stage);
    let mut service = store.start(stage, &options, "");
    store.hear_until("READY=1");
    let names = store.names().join(" ");
    for how in ["no record", "dead connection", "another mount", "nothing kept", "another volume"] {
        let old = store.kept.iter().map(|(n, fd)| (n.clone(), fd.try_clone().expect("dup"))).collect::<Vec<_>>();
        let mut options = options.clone();
        kill_all(stage, &mut service);
        match how {
            "no record" => {
                stage.fsprov(["unmount", "--lazy", "s"]).run().ok();
            }
            "dead connection" => {
                let device = File::options().read(true).write(true).open("/dev/fuse").expect("open");
                for (name, fd) in &mut store.kept {
                    if name == "fsprov-connection" {
                        *fd = device.as_fd().try_clone_to_owned().expect("dup");
                    }
                }
            }
            "another mount" => {
                store.kept.clear();
                service = store.start(stage, &options, "");
                store.hear_until("READY=1");
                kill_all(stage, &mut service);
                store.kept = old.iter().map(|(n, fd)| (n.clone(), fd.try_clone().expect("dup"))).collect();
            }
            "nothing kept" => store.kept.clear(),
            _ => options.extend(volume(stage.mkdir("other"), "/data", "ro")),
        }
        drop(old);
        service = store.start(stage, &options, "");
        store.hear_until("READY=1");
        let more = usize::from(how == "another volume") * 3;
        assert_eq!(store.kept.len(), names.split(' ').count() + more, "{how}: {:?}", store.names());
        assert_eq!(health(stage), "ready", "{how}");
        assert!(stage.path("rootfs/etc/hosts").exists() && stage.path("rootfs/w").exists(), "{how}");
        // In a user namespace setuid works in the rootfs and in no volume: each is a mount of its own.
        let volumes = if stage.lane.name == "fuse-userns" { 1 + usize::from(how == "another volume") } else { 0 };
        assert_eq!(system::mounts_below(&stage.path("rootfs")).len(), 1 + volumes, "{how}");
    }
    stop(stage, &mut store, service);
});

// Some of the processes die.
case!("the_next_start_takes_over_what_lives", on::fuse, &[Need::Tool("bash")], |stage: &Stage| {
    let options = prepare(stage);
    let mut store = Store::new(stage);
    let mut service = store.start(stage, &options, "");
    store.hear_until("READY=1");
    let before = shown(stage);
    let mut file = File::create(stage.path("rootfs/w/f")).expect("make");
    // The main process alone.
    service.kill().expect("kill");
    service.wait().expect("wait");
    let mut service = store.start(stage, &options, "");
    store.hear_until("READY=1");
    assert_eq!(shown(stage), before, "its server lives");
    file.write_all(b"one").expect("write");
    // Another id's place, and a start that is no service, get nothing.
    stage.mount_call("img", "rootfs", ["--foreground", "--id", "s"]).args(&[] as &[&str]).run().fails(4, &["s"]);
    // The supervisor alone: the main process ends, and leaves the rootfs to the next start.
    system::kill(before.0);
    assert_eq!(service.wait().expect("wait").code(), Some(1));
    assert_eq!(health(stage), "ready", "the worker goes on");
    let service = store.start(stage, &options, "");
    store.hear_until("READY=1");
    let after = shown(stage);
    assert!(after.0 != before.0 && after.1 != before.1 && after.2 == before.2, "{before:?} {after:?}");
    file.write_all(b"two").expect("write");
    assert_eq!(fs::read_to_string(stage.path("sandbox/w/f")).expect("read"), "onetwo");
    drop(file);
    stop(stage, &mut store, service);
});
