//! Servers that lost what they belong to: their supervisor, or everybody in their mount namespace.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::destroy::{health, only};
use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::{Enter, Lane, Need, Stage, system};

/// How long a server may take to come back, or to go.
const PATIENCE: Duration = Duration::from_secs(30);

fn mounted(stage: &Stage, image: impl AsRef<std::ffi::OsStr>) -> PathBuf {
    stage.mkdir("sandbox/w");
    let mut options = vec!["--id".into(), "k".into()];
    options.extend(sandbox(stage));
    options.extend(volume("w", "/w", "rw"));
    stage.mount(image, "rootfs", options)
}

fn supervisor(stage: &Stage) -> i32 {
    only(stage)["supervisor_pid"].as_i64().expect("a pid") as i32
}

fn worker(stage: &Stage) -> i32 {
    only(stage)["worker_pid"].as_i64().expect("a pid") as i32
}

/// The supervisor alone is killed.
fn lose_supervisor(stage: &Stage) {
    let supervisor = supervisor(stage);
    system::kill(supervisor);
    assert!(system::eventually(PATIENCE, || !stage.servers().iter().any(|p| p.pid == supervisor)), "it lives");
}

// The record keeps the first worker; which one answers now must be known without a supervisor.
case!("a_later_worker_without_supervisor_is_alive", on::fuse, |stage: &Stage| {
    let rootfs = mounted(stage, stage.small_image());
    let mut open = File::create(rootfs.join("w/f")).expect("make");
    let (first, mounts) = (worker(stage), system::mounts_below(&rootfs).len());
    system::kill(first);
    assert!(system::eventually(PATIENCE, || worker(stage) != first), "no later worker");
    open.write_all(b"by the second ").expect("an open file is good");
    let second = worker(stage);
    lose_supervisor(stage);
    open.write_all(b"without supervisor").expect("an open file is good");
    let shown = only(stage);
    assert_eq!(
        (shown["state"].as_str(), shown["worker_pid"].as_i64(), shown["unsupervised"].as_bool()),
        (Some("ready"), Some(i64::from(second)), Some(true)),
        "{shown:#}"
    );
    // Nobody mounts over what is alive.
    let recovered = stage.fsprov(["recover", "--json"]).run().ok().json();
    assert_eq!(recovered[0]["outcome"], "kept", "{recovered:#}");
    assert_eq!(system::mounts_below(&rootfs).len(), mounts);
    assert_eq!(fs::read_to_string(rootfs.join("w/f")).expect("read"), "by the second without supervisor");
    drop(open);
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after the unmount of a rootfs without supervisor");
});

// A worker that was stopped answers nobody, and is not dead.
case!("a_stopped_worker_does_not_answer", on::fuse, |stage: &Stage| {
    let rootfs = mounted(stage, stage.small_image());
    let worker = worker(stage);
    let send = |name: &str| stage.tool("kill", [format!("-{name}"), worker.to_string()]).run().ok();
    send("STOP");
    assert!(system::eventually(PATIENCE, || health(stage) == "stopped"), "{}", health(stage));
    assert!(stage.fsprov(["list"]).run().ok().out().contains("stopped"));
    assert!(stage.fsprov(["inspect", "k"]).run().ok().out().contains("does not answer"));
    let recovered = stage.fsprov(["recover", "--json"]).run().ok().json();
    assert_eq!(recovered[0]["outcome"], "kept", "{recovered:#}");
    send("CONT");
    assert!(system::eventually(PATIENCE, || health(stage) == "ready"), "{}", health(stage));
    assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n");
    // A stopped one can be replaced, and taken away.
    send("STOP");
    stage.fsprov(["restart", "k"]).run().ok();
    assert_eq!(health(stage), "ready");
    stage.tool("kill", ["-STOP".to_owned(), self::worker(stage).to_string()]).run().ok();
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after the unmount of a stopped rootfs");
});

fn has_namespaces(lane: &Lane) -> bool {
    on::fuse(lane) && lane.enter != Enter::User
}

/// `unshare --mount` around a shell script; `"$@"` in it is the mount of a rootfs with the id `k`.
fn in_private_namespace(stage: &Stage, script: &str) -> Command {
    let mount = stage.mount_call(stage.path("image"), "rootfs", ["--id", "k"]).command;
    let mut call = stage.tool("unshare", ["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
    call.command.arg(mount.get_program()).args(mount.get_args());
    call.command.stdin(Stdio::null());
    call.command
}

// Servers keep the mount namespace that they were started in; with them alone in it nobody can reach their rootfs any more.
case!("servers_alone_in_a_mount_namespace_can_be_ended", has_namespaces, &[Need::Tool("unshare")], |stage: &Stage| {
    stage.small_image();
    for (end, how) in [("unmount", &["unmount", "k"][..]), ("lazily", &["unmount", "--lazy", "k"])] {
        assert!(in_private_namespace(stage, "\"$@\"").status().expect("run").success());
        assert_eq!(stage.servers().len(), 2, "they are left behind");
        assert_eq!(health(stage), "gone", "{end}");
        stage.fsprov(how.iter().copied()).run().ok();
        stage.assert_nothing_left(end);
    }
    // `recover` mounts it here, where the caller is.
    assert!(in_private_namespace(stage, "\"$@\"").status().expect("run").success());
    let before: Vec<_> = stage.servers().iter().map(|p| p.pid).collect();
    let recovered = stage.fsprov(["recover", "--json"]).run().ok().json();
    assert_eq!(recovered[0]["outcome"], "healed", "{recovered:#}");
    assert!(!stage.servers().iter().any(|p| before.contains(&p.pid)), "those of the namespace are ended");
    assert_eq!(health(stage), "ready");
    stage.unmount("rootfs");
    assert!(in_private_namespace(stage, "\"$@\"").status().expect("run").success());
    let recovered = stage.fsprov(["recover", "--json", "--keep", "other"]).run().ok().json();
    assert_eq!(recovered[0]["outcome"], "destroyed", "{recovered:#}");
    stage.assert_nothing_left("after recover without it");
},);

// Somebody is in the namespace, or may come back to it: the rootfs is in use there.
case!(
    "a_rootfs_that_is_used_in_its_namespace_stays",
    has_namespaces,
    &[Need::Tool("unshare"), Need::Tool("nsenter")],
    |stage: &Stage| {
        stage.small_image();
        let mut user: Child =
            in_private_namespace(stage, "\"$@\" && exec sleep 300").process_group(0).spawn().expect("start");
        assert!(system::eventually(PATIENCE, || !stage.records().is_empty() && health(stage) == "elsewhere"));
        let pid = user.id().to_string();
        stage.fsprov(["unmount", "k"]).run().fails(4, &[&*format!("process {pid}")]);
        let recovered = stage.fsprov(["recover", "--json"]).run().ok().json();
        assert_eq!(recovered[0]["outcome"], "skipped", "{recovered:#}");
        // A file stands for the namespace, as container runtimes have it.
        let file = stage.write("namespace", "");
        let bound = stage.tool("mount", ["--bind".into(), format!("/proc/{pid}/ns/mnt").into(), file.clone()]).run();
        user.kill().expect("end it");
        user.wait().expect("end it");
        if bound.code() == Some(0) {
            stage.fsprov(["unmount", "k"]).run().fails(4, &["namespace"]);
            let within = stage.tool("nsenter", [format!("--mount={}", file.display())]).arg("cat");
            assert!(within.arg(stage.path("rootfs/etc/hosts")).run().ok().out().contains("localhost"));
            stage.tool("umount", [&file]).run().ok();
        }
        stage.fsprov(["unmount", "k"]).run().ok();
        stage.assert_nothing_left("after the last user");
    },
);

// Out of sight, without a supervisor, and still in use: the worker keeps the image in the store.
case!("a_worker_without_supervisor_holds_its_image", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    fs::write(image.join("usr/share/doc/read"), "from the image").expect("write");
    stage
        .fsprov(["image".as_ref(), "import".as_ref(), image.as_os_str(), "--name".as_ref(), "small".as_ref()])
        .run()
        .ok();
    for restarted in [false, true] {
        let rootfs = mounted(stage, "small");
        if restarted {
            stage.fsprov(["restart", "k"]).run().ok();
        }
        lose_supervisor(stage);
        let mut user = Command::new("sleep")
            .arg("300")
            .current_dir(rootfs.join("usr/share/doc"))
            .stdin(Stdio::null())
            .spawn()
            .expect("start a user");
        stage.fsprov(["unmount", "--lazy", "k"]).run().ok();
        stage.fsprov(["image", "rm", "small"]).run().fails(4, &["use"]);
        let read = fs::read_to_string(format!("/proc/{}/cwd/read", user.id()));
        assert_eq!(read.expect("read"), "from the image", "restarted {restarted}");
        user.kill().expect("end it");
        user.wait().expect("end it");
        assert!(system::survivors(PATIENCE).is_empty(), "the worker ends with the last user");
    }
    stage.fsprov(["image", "rm", "small"]).run().ok();
});
