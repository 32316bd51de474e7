//! A rootfs goes away whole: no mount, process, directory or record; and nobody else's things with it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::needs::without_fallbacks;
use crate::common::{Enter, Lane, Need, Stage, system};

const NONE: [&str; 0] = [];

/// The one rootfs of this state root, as `list --json` shows it.
#[track_caller]
pub(crate) fn only(stage: &Stage) -> serde_json::Value {
    let all = stage.fsprov(["list", "--json"]).run().ok().json();
    let all = all.as_array().expect("list --json is an array");
    assert_eq!(all.len(), 1, "{all:#?}");
    all[0].clone()
}

#[track_caller]
pub(crate) fn health(stage: &Stage) -> String {
    only(stage)["state"].as_str().expect("state is a word").to_owned()
}

case!("unmount_leaves_nothing", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    for (how, existing) in [("path", false), ("path", true), ("id", false), ("alias", false), ("all", true)] {
        if existing {
            stage.mkdir("rootfs");
        }
        let mut options = vec!["--id".into(), "one".into()];
        options.extend(sandbox(stage));
        options.extend(volume("tmp", "/tmp", "rw"));
        options.extend(volume("lib", "/var/lib", "ro"));
        let rootfs = stage.mount(&image, "rootfs", options);
        assert_eq!(health(stage), "ready");
        assert_eq!(stage.servers().is_empty(), !stage.lane.is_fuse(), "servers: {:?}", stage.servers());
        let path = rootfs.as_os_str();
        let args: Vec<&OsStr> = match how {
            "path" => vec!["unmount".as_ref(), path],
            "id" => vec!["unmount".as_ref(), "one".as_ref()],
            "alias" => vec!["umount".as_ref(), path],
            _ => vec!["unmount".as_ref(), "--all".as_ref()],
        };
        let said = stage.fsprov(args).run().ok();
        assert_eq!(without_fallbacks(&said.err()), "", "nothing to complain about");
        stage.assert_nothing_left(&format!("after unmount by {how}"));
        assert_eq!(rootfs.exists(), existing, "a mount point that was made goes, one that was there stays ({how})");
        assert!(stage.path("sandbox/tmp").is_dir(), "a volume's source stays");
        if existing {
            fs::remove_dir(&rootfs).expect("the mount point is empty again");
        }
    }
});

case!("unmount_twice_says_not_found", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let rootfs = stage.mount(&image, "rootfs", ["--id", "one"]);
    stage.unmount(&rootfs);
    for which in [rootfs.as_os_str(), "one".as_ref(), "/nowhere".as_ref(), stage.dir.as_os_str()] {
        stage.fsprov(["unmount".as_ref(), which]).run().fails(3, &[&which.to_string_lossy()]);
    }
    // Nothing to do is done.
    stage.fsprov(["unmount", "--all"]).run().ok();
    let rootfs = stage.mount(&image, "rootfs", ["--id", "one"]);
    assert!(rootfs.join("etc/hosts").exists(), "the place and the id can be used again");
});

case!("a_taken_mount_point_or_id_is_busy", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let rootfs = stage.mount(&image, "rootfs", ["--id", "one"]);
    let mounts = system::mounts_below(&stage.dir).len();
    stage.mount_call(&image, "rootfs", ["--id", "two"]).run().fails(4, &["rootfs", "one"]);
    stage.mount_call(&image, "other", ["--id", "one"]).run().fails(4, &["one"]);
    assert_eq!(system::mounts_below(&stage.dir).len(), mounts);
    assert_eq!(stage.records().len(), 1);
    assert!(!stage.path("other").exists(), "a refused mount made its mount point");
    assert!(rootfs.join("etc/hosts").exists());
});

case!("a_rootfs_in_use_is_busy_and_lazy_takes_it", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let rootfs = stage.mount(&image, "rootfs", NONE);
    let mut user = Command::new("sleep").arg("60").current_dir(rootfs.join("etc")).spawn().expect("start sleep");
    let pid = user.id().to_string();
    // In a mount namespace of its own, which has a copy of the mount as udev's has: that keeps nothing busy.
    let unshare: &[&str] = if stage.lane.enter == Enter::Root { &["-m"] } else { &["-Urm"] };
    let mut bystander = Command::new("unshare").args(unshare).args(["sleep", "60"]).spawn().expect("start a bystander");
    let of_bystander = format!("/proc/{}/comm", bystander.id());
    let sleeps = || fs::read_to_string(&of_bystander).is_ok_and(|name| name == "sleep\n");
    assert!(system::eventually(Duration::from_secs(10), sleeps), "{of_bystander}");
    let said = stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run().fails(4, &["rootfs", &pid]);
    assert!(!said.err().contains(&format!("pid {}", bystander.id())), "it names the bystander: {}", said.describe());
    let _ = bystander.kill();
    let _ = bystander.wait();
    assert_eq!(health(stage), "ready", "a refused unmount changes nothing");
    assert!(rootfs.join("etc/hosts").exists());
    stage.fsprov(["unmount".as_ref(), "--lazy".as_ref(), rootfs.as_os_str()]).run().ok();
    assert!(system::mounts_below(&rootfs).is_empty());
    assert_eq!(stage.records(), Vec::<std::path::PathBuf>::new());
    let _ = user.kill();
    let _ = user.wait();
    stage.assert_nothing_left("after the last user of a lazily unmounted rootfs ended");
});

// A copy is no mount that the kernel would keep: whoever uses its files must be found.
case!("a_copy_in_use_is_not_deleted", on::copy, |stage: &Stage| {
    let image = stage.small_image();
    fs::copy("/bin/sleep", image.join("etc/sleep")).expect("copy a program");
    let rootfs = stage.mount(&image, "rootfs", NONE);
    let elsewhere = stage.mkdir("elsewhere");
    let unshare: &[&str] = if stage.lane.enter == Enter::Root { &["-m"] } else { &["-Urm"] };
    let open = format!("exec sleep 60 <{}/hosts", rootfs.join("etc").display());
    let bind = format!("mount --bind {} {} && exec sleep 60", rootfs.display(), elsewhere.display());
    let enter = format!("cd {} && exec sleep 60", rootfs.join("etc").display());
    let program = rootfs.join("etc/sleep");
    let users: [(&str, Command); 4] = [
        ("its program", Command::new(&program)),
        ("an open file", Command::new("sh")),
        ("a mount of it in another namespace", Command::new("unshare")),
        ("a working directory, from another namespace", Command::new("unshare")),
    ];
    for (n, (what, mut user)) in users.into_iter().enumerate() {
        match n {
            0 => user.arg("60"),
            1 => user.args(["-c", &open]),
            2 => user.args(unshare).args(["sh", "-c", &bind]),
            _ => user.args(unshare).args(["sh", "-c", &enter]),
        };
        let mut user = user.spawn().expect("start a user");
        let pid = user.id();
        let sleeps = || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n");
        assert!(system::eventually(Duration::from_secs(10), sleeps), "{what}");
        let said = stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run();
        let _ = user.kill();
        let _ = user.wait();
        said.fails(4, &[&format!("(pid {pid},"), "--lazy"]);
        assert_eq!(health(stage), "ready", "{what}: a refused unmount changes nothing");
        assert!(rootfs.join("etc/sleep").exists(), "{what}");
    }
    if stage.lane.enter == Enter::Root {
        stage.tool("mount", ["--bind"]).arg(&rootfs).arg(&elsewhere).run().ok();
        stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run().fails(4, &["elsewhere"]);
        assert!(elsewhere.join("etc/sleep").exists());
        stage.tool("umount", [&elsewhere]).run().ok();
    }
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after its last user ended");
});

// What others mounted below or on top of a rootfs is not ours to take away.
case!(
    "foreign_mounts_are_not_taken_away",
    |lane: &Lane| on::every_backend(lane) && lane.enter != Enter::User,
    |stage: &Stage| {
        let image = stage.small_image();
        let rootfs = stage.mount(&image, "rootfs", NONE);
        // On top: hides ours.
        stage.tool("mount", ["-t", "tmpfs", "on-top"]).arg(&rootfs).run().ok();
        stage.write("rootfs/theirs", "their data");
        stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run().fails(4, &["rootfs"]);
        assert_eq!(fs::read_to_string(rootfs.join("theirs")).expect("their mount is there"), "their data");
        stage.tool("umount", [&rootfs]).run().ok();
        // Below: in a directory of ours.
        stage.tool("mount", ["-t", "tmpfs", "below"]).arg(rootfs.join("data")).run().ok();
        stage.write("rootfs/data/theirs", "their data");
        stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run().fails(4, &["rootfs"]);
        assert_eq!(fs::read_to_string(rootfs.join("data/theirs")).expect("their mount is there"), "their data");
        stage.tool("umount", [rootfs.join("data")]).run().ok();
        stage.unmount(&rootfs);
        stage.assert_nothing_left("after they were gone");
    },
);

case!(
    "a_mount_beneath_the_rootfs_stays",
    |lane: &Lane| on::read_only(lane) && lane.enter != Enter::User,
    |stage: &Stage| {
        let image = stage.small_image();
        let place = stage.mkdir("rootfs");
        stage.tool("mount", ["-t", "tmpfs", "beneath"]).arg(&place).run().ok();
        stage.write("rootfs/theirs", "their data");
        let rootfs = stage.mount(&image, "rootfs", ["--over"]);
        assert!(rootfs.join("etc/hosts").exists());
        stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run().ok();
        assert_eq!(fs::read_to_string(place.join("theirs")).expect("their mount is there"), "their data");
        stage.tool("umount", [&place]).run().ok();
    },
);

// An administrator unmounts by hand: list says gone, unmount removes the rest.
case!("unmounted_by_hand_is_gone_and_cleaned", on::read_only, |stage: &Stage| {
    let image = stage.small_image();
    let rootfs = stage.mount(&image, "rootfs", volume(stage.mkdir("vol"), "/data", "rw"));
    if stage.lane.enter == Enter::User {
        stage.tool("fusermount3", ["-u"]).arg(&rootfs).run().ok();
    } else {
        stage.tool("umount", ["-R"]).arg(&rootfs).run().ok();
    }
    // The server, if there is one, ends by itself.
    assert!(system::survivors(Duration::from_secs(30)).is_empty(), "{:?}", stage.servers());
    assert_eq!(health(stage), "gone");
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after unmount");
});

case!("a_killed_server_is_dead_and_cleaned", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    for round in ["idle", "with an open file"] {
        let rootfs = stage.mount(&image, "rootfs", volume(stage.mkdir("vol"), "/data", "rw"));
        let open = (round != "idle").then(|| fs::File::create(rootfs.join("data/open")).expect("open"));
        let servers = stage.servers();
        assert!(!servers.is_empty(), "a FUSE rootfs has a server");
        for server in &servers {
            system::kill(server.pid);
        }
        assert!(system::survivors(Duration::from_secs(30)).is_empty());
        // The last thread of a killed process may be about to close the connection: a request then is ECONNABORTED.
        let _ = fs::metadata(rootfs.join("etc"));
        let seen = fs::metadata(rootfs.join("etc")).map_err(|e| rustix::io::Errno::from_io_error(&e));
        assert_eq!(seen.err().flatten(), Some(rustix::io::Errno::NOTCONN), "a dead server's mount is ENOTCONN");
        assert_eq!(health(stage), "dead", "{round}");
        stage.fsprov(["inspect".as_ref(), rootfs.as_os_str()]).run().ok();
        // A new mount on the same place says what to do.
        stage.mount_call(&image, "rootfs", NONE).run().fails(4, &["unmount"]);
        drop(open);
        stage.unmount(&rootfs);
        stage.assert_nothing_left("after unmount of a dead server's mount");
        assert!(!rootfs.exists());
    }
});

// The mount point lies in the image, or is the image: the server must not wait for itself.
case!("mounted_over_its_own_image", on::read_only, |stage: &Stage| {
    let image = stage.small_image();
    fs::create_dir(image.join("mnt")).expect("mkdir");
    for place in ["image/mnt", "image"] {
        let mut args = vec!["--over".into()];
        args.extend(volume(stage.mkdir("vol"), "/data", "rw"));
        let rootfs = stage.mount(&image, place, args);
        assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n", "{place}");
        fs::write(rootfs.join("data/x"), place).expect("write to the volume");
        assert_eq!(fs::read_to_string(stage.path("vol/x")).expect("read"), place);
        stage.unmount(&rootfs);
        assert!(image.join("etc/hosts").exists() && image.join("mnt").exists());
    }
});

case!("a_mount_point_must_be_a_directory", on::read_only, |stage: &Stage| {
    let image = stage.small_image();
    let file = stage.write("file", "x");
    stage.mount_call(&image, "file", NONE).run().fails(2, &["file", "not a directory"]);
    stage.mount_call(&image, "file/below", NONE).run().fails_saying(&["file"]);
    stage.mount_call(&image, "/", NONE).run().fails(2, &["/"]);
    assert_eq!(fs::read_to_string(file).expect("read"), "x");
    stage.assert_nothing_left("after refused mount points");
    // Missing parents are made, and go again.
    let rootfs = stage.mount(&image, "a/b/rootfs", NONE);
    assert!(rootfs.join("etc").is_dir());
    stage.unmount(&rootfs);
    assert!(!stage.path("a").exists());
    // What it covers comes back.
    stage.mkdir("full");
    stage.write("full/kept", "kept");
    let rootfs = stage.mount(&image, "full", ["--over"]);
    assert!(!rootfs.join("kept").exists());
    stage.unmount(&rootfs);
    assert_eq!(fs::read_to_string(stage.path("full/kept")).expect("read"), "kept");
    // Through a symlink, and relative to the working directory.
    std::os::unix::fs::symlink("full", stage.path("link")).expect("symlink");
    stage.mount_call(&image, "link", ["--over"]).cwd("/").run().ok();
    assert!(stage.path("full/etc").is_dir());
    stage.fsprov(["unmount", "./link"]).run().ok();
    assert!(stage.path("full/kept").exists());
});

case!("mount_returns_and_keeps_nothing_of_the_caller", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let cwd = stage.mkdir("cwd");
    // A pipe: its reader ends only when every writer closed it, so a server that kept stdout or stderr would hang this.
    let line = format!("timeout 60 {} \"$@\" 2>&1 | cat", super::shell_quote(&crate::common::stage::program()));
    let rootfs = stage.path("rootfs");
    let mut args = vec!["-c".as_ref(), OsStr::new(&line), "sh".as_ref(), "mount".as_ref(), "--backend".as_ref()];
    args.extend([OsStr::new(stage.lane.backend), image.as_os_str(), rootfs.as_os_str()]);
    let said = stage.tool("sh", args).cwd(&cwd).run().ok();
    assert!(said.took < Duration::from_secs(20), "{}", said.describe());
    assert!(said.out().lines().last().is_some_and(|line| line.starts_with("mounted ")), "{}", said.describe());
    assert_eq!(without_fallbacks(&said.out()).lines().count(), 1, "one line: {}", said.describe());
    fs::remove_dir(&cwd).expect("the caller's working directory is free");
    for server in stage.servers() {
        let proc = std::path::PathBuf::from(format!("/proc/{}", server.pid));
        assert_eq!(fs::read_link(proc.join("cwd")).expect("cwd"), std::path::Path::new("/"), "{server:?}");
        let stat = fs::read_to_string(proc.join("stat")).expect("stat");
        let after: Vec<&str> = stat.rsplit_once(')').expect("stat").1.split_whitespace().collect();
        // proc_pid_stat(5): pgrp is field 5, session 6, tty_nr 7; the state is field 3.
        let (session, tty) = (after[3], after[4]);
        assert_eq!(tty, "0", "no controlling terminal: {server:?}");
        let own = fs::read_to_string("/proc/self/stat").expect("stat");
        let own: Vec<&str> = own.rsplit_once(')').expect("stat").1.split_whitespace().collect();
        assert_ne!(session, own[3], "a session of its own: {server:?}");
        for fd in fs::read_dir(proc.join("fd")).expect("fds").flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            let text = target.to_string_lossy();
            assert!(
                !text.starts_with("pipe:") || !["0", "1", "2"].contains(&&*fd.file_name().to_string_lossy()),
                "{server:?}: {text}"
            );
        }
    }
    assert!(rootfs.join("etc/hosts").exists());
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after unmount");
});

case!("foreground_stays_until_a_signal", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    for signal in ["TERM", "INT"] {
        let mut call = stage.mount_call(&image, "rootfs", ["--foreground"]);
        let mut child = call
            .command
            .stdout(std::process::Stdio::null())
            .stderr(fs::File::create(stage.path("said")).expect("create"))
            .spawn()
            .expect("start");
        // The mount is there before the record says that it is complete.
        let there = || stage.path("rootfs/etc/hosts").exists() && health(stage) == "ready";
        assert!(system::eventually(Duration::from_secs(30), there), "the rootfs appears and is ready");
        assert!(child.try_wait().expect("wait").is_none(), "it stays");
        stage.tool("kill", [format!("-{signal}"), child.id().to_string()]).run().ok();
        let mut status = None;
        let ended = || {
            status = child.try_wait().expect("wait");
            status.is_some()
        };
        if !system::eventually(Duration::from_secs(30), ended) {
            let _ = child.kill();
            let _ = child.wait();
            panic!("it did not end on SIG{signal}");
        }
        let said = fs::read_to_string(stage.path("said")).unwrap_or_default();
        assert!(status.is_some_and(|s| s.success()), "SIG{signal}: {status:?}: {said}");
        stage.assert_nothing_left(&format!("after SIG{signal}"));
        assert!(!stage.path("rootfs").exists());
    }
});

// The test stands for systemd: what a unit of Type=notify with a watchdog is told (sd_notify(3)).
case!("systemd_is_told", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let socket = std::os::unix::net::UnixDatagram::bind(stage.path("notify")).expect("bind");
    socket.set_read_timeout(Some(Duration::from_secs(30))).expect("timeout");
    let hear = || {
        let mut message = [0_u8; 4096];
        let size = socket.recv(&mut message).expect("systemd is told something");
        String::from_utf8_lossy(&message[..size]).into_owned()
    };
    let call = stage.mount_call(&image, "rootfs", ["--foreground"]);
    let mut call = call.env("NOTIFY_SOCKET", stage.path("notify")).env("WATCHDOG_USEC", "400000");
    let said = fs::File::create(stage.path("said")).expect("create");
    let mut child = call.command.stdout(std::process::Stdio::null()).stderr(said).spawn().expect("start");
    // What it puts into the descriptor store comes first: `fdstore` has that.
    let ready = std::iter::repeat_with(hear).find(|said| !said.starts_with("FDSTORE=1")).expect("a message");
    assert!(ready.lines().any(|l| l == "READY=1") && ready.contains("STATUS="), "{ready}");
    assert!(stage.path("rootfs/etc/hosts").exists(), "ready means that it answers");
    for _ in 0..3 {
        assert_eq!(hear().trim(), "WATCHDOG=1");
    }
    stage.tool("kill", ["-TERM".to_owned(), child.id().to_string()]).run().ok();
    while hear().trim() != "STOPPING=1" {}
    assert!(child.wait().expect("wait").success());
    stage.assert_nothing_left("after systemd stopped it");
});

// Other users' processes cannot enter a FUSE mount made without allow_other; a rootfs's state is its owner's alone.
case!("the_state_root_is_closed_to_others", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    stage.mount(&image, "rootfs", NONE);
    for path in [stage.state().join("containers"), stage.records()[0].clone()] {
        let mode = fs::metadata(&path).expect("stat").permissions().mode() & 0o777;
        assert_eq!(mode, 0o700, "{}", path.display());
    }
});

case!("twenty_rounds_leave_nothing", on::volumes, &[Need::Tool("true")], |stage: &Stage| {
    let image = stage.small_image();
    let fds = || fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let (mounts, before) = (system::mounts_of_others(), fds());
    for round in 0..20 {
        let rootfs = stage.mount(&image, "rootfs", volume(stage.mkdir("vol"), "/tmp", "rw"));
        fs::write(rootfs.join("tmp/x"), round.to_string()).expect("write");
        stage.unmount(&rootfs);
    }
    stage.assert_nothing_left("after twenty rounds");
    assert_eq!((system::mounts_of_others(), fds()), (mounts, before));
});

/// How many [`AT_ONCE`] has.
const COUNT: usize = 8;

// Several at once, of one image, in one state root.
case!("many_at_once", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let start = |verb: &str, i: usize| {
        let rootfs = stage.path(format!("rootfs-{i}"));
        let mut call = if verb == "mount" {
            stage.mount_call(&image, &rootfs, NONE)
        } else {
            stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()])
        };
        let said = fs::File::create(stage.path(format!("said-{verb}-{i}"))).expect("create");
        let child = call.command.stdout(std::process::Stdio::null()).stderr(said).spawn();
        child.expect("start")
    };
    for verb in ["mount", "unmount"] {
        let children: Vec<_> = (0..COUNT).map(|i| start(verb, i)).collect();
        for (i, mut child) in children.into_iter().enumerate() {
            let status = child.wait().expect("wait");
            let said = fs::read_to_string(stage.path(format!("said-{verb}-{i}"))).unwrap_or_default();
            assert!(status.success(), "{verb} {i}: {status}: {said}");
        }
        if verb == "mount" {
            let all = stage.fsprov(["list", "--json"]).run().ok().json();
            let ready = all.as_array().expect("array").iter().filter(|r| r["state"] == "ready").count();
            assert_eq!(ready, COUNT, "{all:#}");
            for i in 0..COUNT {
                assert!(stage.path(format!("rootfs-{i}/etc/hosts")).exists(), "{i}");
            }
        }
    }
    stage.assert_nothing_left("after all were unmounted");
});
