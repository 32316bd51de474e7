//! What others who run containers ask of a rootfs: no device nodes, which they can neither open nor copy, and the mount points that they
//! would make.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::Path;

use serde_json::json;

use super::volumes::volume;
use crate::common::harness::{case, on};
use crate::common::run::Outcome;
use crate::common::walk::{Picture, assert_same, picture};
use crate::common::{Enter, Need, Stage};

/// Import the small image as `image`, with device nodes, a FIFO, and a directory that has nothing else.
fn import(stage: &Stage) {
    let mut tar = tar::Builder::new(fs::File::create(stage.path("image.tar")).expect("create"));
    tar.follow_symlinks(false);
    tar.append_dir_all("", stage.small_image()).expect("append");
    for (path, kind, device) in [
        ("dev/null", tar::EntryType::Char, (1, 3)),
        ("dev/pipe", tar::EntryType::Fifo, (0, 0)),
        ("dev/sda", tar::EntryType::Block, (8, 0)),
        ("dev/zzz", tar::EntryType::Regular, (0, 0)),
        ("etc/devices/null", tar::EntryType::Char, (1, 3)),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(0);
        header.set_device_major(device.0).and_then(|()| header.set_device_minor(device.1)).expect("set a device");
        tar.append_data(&mut header, path, &b""[..]).expect("append");
    }
    tar.into_inner().expect("finish");
    stage.fsprov(["image", "import", "--name", "image", "image.tar"]).run().ok();
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("list").map(|entry| entry.expect("entry").file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().expect("text")).collect();
    names.sort();
    names
}

const DEVICES: [&str; 3] = ["dev/null", "dev/sda", "etc/devices/null"];

fn assert_without(rootfs: &Path, all: &Picture, when: &str) {
    assert_eq!(names(&rootfs.join("dev")), ["pipe", "zzz"], "{when}");
    assert_eq!(names(&rootfs.join("etc/devices")), [""; 0], "{when}");
    for path in DEVICES {
        let found = fs::symlink_metadata(rootfs.join(path)).map_err(|e| e.kind());
        assert_eq!(found.err(), Some(std::io::ErrorKind::NotFound), "{when}: {path}");
    }
    assert!(fs::symlink_metadata(rootfs.join("dev/pipe")).expect("stat").file_type().is_fifo(), "{when}");
    let mut want = all.clone();
    want.retain(|path, _| !DEVICES.iter().any(|device| path.ends_with(device.as_bytes())));
    assert_same(&want, &picture(rootfs), when);
}

case!("a_rootfs_without_the_images_device_nodes", on::fuse, |stage: &Stage| {
    import(stage);
    let rootfs = stage.mount("image", "rootfs", ["--id", "all"]);
    let all = picture(&rootfs);
    assert_eq!(names(&rootfs.join("dev")), ["null", "pipe", "sda", "zzz"]);
    stage.unmount(&rootfs);
    let rootfs = stage.mount("image", "rootfs", ["--no-devices", "--id", "none"]);
    assert_without(&rootfs, &all, "mounted");
    let shown = stage.fsprov(["inspect", "--json", "none"]).run().ok().json();
    assert_eq!(shown["no_devices"], true, "{shown:#}");
    stage.fsprov(["restart", "none"]).run().ok();
    assert_without(&rootfs, &all, "another worker");
    for process in stage.servers() {
        crate::common::system::kill(process.pid);
    }
    stage.fsprov(["recover"]).run().ok();
    assert_without(&rootfs, &all, "recovered");
    stage.unmount(&rootfs);
    stage.mount_call("./image", "rootfs", ["--no-devices"]).run().fails(5, &["plain directory", "image import"]);
    stage.assert_nothing_left("after a refusal");
});

case!("the_name_of_a_device_node_that_is_left_out_is_free", on::fuse, |stage: &Stage| {
    import(stage);
    let options = ["--no-devices", "--upper", "changes", "--id", "k"];
    let rootfs = stage.mount("image", "rootfs", options);
    let device = rootfs.join("dev/null");
    let mut made = fs::File::options();
    made.write(true).create_new(true).open(&device).expect("make a file");
    assert_eq!(names(&rootfs.join("dev")), ["null", "pipe", "zzz"]);
    fs::write(&device, "text").expect("write");
    fs::create_dir(rootfs.join("dev/sda")).expect("make a directory");
    assert_eq!(fs::read_dir(rootfs.join("dev/sda")).expect("list").count(), 0);
    fs::rename(rootfs.join("dev/zzz"), rootfs.join("etc/devices/null")).expect("rename");
    let seen = picture(&rootfs);
    stage.fsprov(["restart", "k"]).run().ok();
    assert_same(&seen, &picture(&rootfs), "another worker");
    assert_eq!(
        stage.fsprov(["diff", "k"]).run().ok().out(),
        "C /dev\nC /dev/null\nC /dev/sda\nD /dev/zzz\nC /etc\nC /etc/devices\nC /etc/devices/null\n"
    );
    fs::remove_file(&device).expect("remove");
    fs::remove_dir(rootfs.join("dev/sda")).expect("remove");
    fs::remove_file(rootfs.join("etc/devices/null")).expect("remove");
    assert_eq!(names(&rootfs.join("dev")), ["pipe"]);
    // It shows nothing: it can go.
    fs::remove_dir(rootfs.join("etc/devices")).expect("remove");
    assert!(!rootfs.join("etc/devices").exists());
    stage.unmount(&rootfs);
    let rootfs = stage.mount("image", "rootfs", options);
    assert_eq!(names(&rootfs.join("dev")), ["pipe"], "mounted again");
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after unmount");
});

case!("device_nodes_are_left_out_by_a_backend_that_can", on::every_backend, |stage: &Stage| {
    import(stage);
    match stage.lane.backend {
        "bind" | "overlay" => {
            let outcome = stage.mount_call("image", "rootfs", ["--no-devices"]).run();
            outcome.fails(5, &["backend cannot leave out device nodes", "--backend fuse or copy"]);
        }
        _ => {
            let rootfs = stage.mount("image", "rootfs", ["--no-devices"]);
            assert_eq!(names(&rootfs.join("dev")), ["pipe", "zzz"]);
            stage.unmount(&rootfs);
        }
    }
    // `auto` takes another.
    if stage.lane.is_fuse() {
        let rootfs = stage.path("rootfs");
        let made = stage.fsprov(["mount", "--json", "--no-devices", "image"]).arg(&rootfs).run().ok().json();
        assert_eq!(made["backend"], "fuse");
        stage.unmount(&rootfs);
    }
    stage.assert_nothing_left("after all");
});

/// An image that has nothing to mount on, except for a link to nowhere; the host's programs come as a volume.
fn bare(stage: &Stage) {
    let root = stage.mkdir("bare");
    for dir in ["etc", "usr", "var/lib"] {
        fs::create_dir_all(root.join(dir)).expect("make dir");
    }
    for dir in ["bin", "lib", "lib64"] {
        symlink(format!("usr/{dir}"), root.join(dir)).expect("symlink");
    }
    symlink("../run/systemd/resolve/stub-resolv.conf", root.join("etc/resolv.conf")).expect("symlink");
    super::upper::import(stage, &root);
}

const STUBS: [&str; 14] = [
    "dev",
    "etc/hostname",
    "etc/hosts",
    "etc/mtab",
    "proc",
    "run",
    "run/.containerenv",
    "run/secrets",
    "run/systemd",
    "run/systemd/resolve",
    "run/systemd/resolve/stub-resolv.conf",
    "sys",
    "tmp",
    "var/tmp",
];

case!("mount_points_of_engines_are_made_up", on::fuse, |stage: &Stage| {
    bare(stage);
    let rootfs = stage.mount("image", "rootfs", [""; 0]);
    let mut want = picture(&rootfs);
    stage.unmount(&rootfs);
    let rootfs = stage.mount("image", "rootfs", ["--stubs", "--id", "s"]);
    let check = |when: &str| {
        let mut seen = picture(&rootfs);
        for stub in STUBS {
            assert!(seen.remove(stub.as_bytes()).is_some(), "{when}: {stub} is not there");
        }
        // Directories with a new directory in them have one link more.
        for dir in ["", "run", "var"] {
            seen.remove(dir.as_bytes());
            want.remove(dir.as_bytes());
        }
        assert_same(&want, &seen, when);
    };
    let mut check = check;
    check("mounted");
    let owner =
        |path: &str| fs::symlink_metadata(rootfs.join(path)).map(|m| (m.uid(), m.gid(), m.mtime())).expect("stat");
    assert_eq!(owner("run/secrets"), owner(""));
    assert_eq!(fs::read_link(rootfs.join("etc/mtab")).expect("read"), Path::new("/proc/mounts"));
    assert_eq!(fs::read(rootfs.join("etc/hosts")).expect("read"), b"");
    // As podman asks for it.
    let made = symlink("/proc/mounts", rootfs.join("etc/mtab")).map_err(|e| e.kind());
    assert_eq!(made, Err(std::io::ErrorKind::AlreadyExists));
    let refused = fs::write(rootfs.join("etc/hosts"), "x").map_err(|e| e.kind());
    assert_eq!(refused, Err(std::io::ErrorKind::ReadOnlyFilesystem));
    stage.fsprov(["restart", "s"]).run().ok();
    check("another worker");
    for process in stage.servers() {
        crate::common::system::kill(process.pid);
    }
    stage.fsprov(["recover"]).run().ok();
    check("recovered");
    stage.unmount(&rootfs);
    // A writable one is the engine's to make them in, and what it makes is no change.
    let rootfs = stage.mount("image", "rootfs", ["--stubs", "--writable", "--id", "w"]);
    assert!(!rootfs.join("etc/hosts").exists());
    symlink("/proc/mounts", rootfs.join("etc/mtab")).expect("symlink");
    fs::write(rootfs.join("etc/hosts"), "").expect("write");
    fs::create_dir(rootfs.join("proc")).expect("mkdir");
    assert_eq!(stage.fsprov(["diff", "w"]).run().ok().out(), "");
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after all");
});

case!("who_makes_up_no_mount_points_says_so", on::every_backend, |stage: &Stage| {
    bare(stage);
    let outcome = stage.mount_call("image", "rootfs", ["--stubs"]).run();
    match stage.lane.backend {
        "bind" | "overlay" => outcome.fails(5, &["cannot make up mount points", "--backend fuse"]),
        _ => outcome.ok(),
    };
});

/// Something is mounted on each of them, and read by a program inside.
const LOOK: &str = "set -e; for f in /etc/hosts /etc/hostname /etc/resolv.conf /run/.containerenv; do cat $f; done
    test -d /proc/self && test -c /dev/null && echo x >/tmp/x && cat /run/secrets/text && readlink /etc/mtab";

fn mounted_over(stage: &Stage, by: impl Fn(&Path, &[(&str, &Path)]) -> Outcome) {
    bare(stage);
    let text = stage.write("text", "text\n");
    fs::create_dir(stage.path("secrets")).expect("mkdir");
    stage.write("secrets/text", "secret\n");
    let secrets = stage.path("secrets");
    let mut binds: Vec<(&str, &Path)> =
        ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv"].map(|to| (to, &*text)).into();
    binds.push(("/run/secrets", &secrets));
    let mount = |stubs: &[&str]| {
        let mut options = volume("/usr", "/usr", "ro").to_vec();
        options.extend(stubs.iter().map(Into::into));
        stage.mount("image", "rootfs", options)
    };
    let rootfs = mount(&[]);
    by(&rootfs, &binds).fails_saying(&["Read-only file system"]);
    stage.unmount(&rootfs);
    let rootfs = mount(&["--stubs"]);
    assert_eq!(by(&rootfs, &binds).ok().out(), "text\ntext\ntext\ntext\nsecret\n/proc/mounts\n");
    stage.unmount(&rootfs);
}

case!("bubblewrap_mounts_over_stubs", on::fuse, &[Need::Tool("bwrap")], |stage: &Stage| {
    mounted_over(stage, |rootfs, binds| {
        let mut call = stage
            .tool("bwrap", ["--unshare-all", "--ro-bind"])
            .arg(rootfs)
            .args(["/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]);
        for (to, from) in binds {
            call = call.arg("--ro-bind").arg(from).arg(to);
        }
        call.args(["sh", "-c", LOOK]).run()
    });
});

case!("crun_mounts_over_stubs", on::fuse, &[Need::Tool("crun"), Need::UserNamespaces], |stage: &Stage| {
    mounted_over(stage, |rootfs, binds| {
        let mut mounts = vec![json!({"destination": "/proc", "type": "proc", "source": "proc"})];
        for (to, mode) in [("/dev", "mode=755"), ("/tmp", "mode=1777")] {
            mounts.push(json!({"destination": to, "type": "tmpfs", "source": "tmpfs", "options": [mode]}));
        }
        for (to, from) in binds {
            mounts.push(json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", "ro"]}));
        }
        let namespaces = ["mount", "pid", "ipc", "uts"].map(|kind| json!({"type": kind}));
        let config = json!({
            "ociVersion": "1.0.2", "root": {"path": rootfs, "readonly": true}, "mounts": mounts, "linux": {"namespaces": namespaces},
            "process": {"cwd": "/", "args": ["sh", "-c", LOOK], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        });
        stage.mkdir("bundle");
        stage.write("bundle/config.json", config.to_string());
        // It takes no hybrid of the two versions of control groups.
        let clean = "mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec crun --cgroup-manager disabled \"$@\"";
        let how: &[&str] = if stage.lane.enter == Enter::User { &["-Ur", "-mC"] } else { &["-mC"] };
        let call = stage.tool("unshare", how).args(["sh", "-c", clean, "sh", "--root"]).arg(stage.path("crun"));
        call.args(["run", "--bundle", "bundle", &format!("stubs-{}", std::process::id())]).run()
    });
});
