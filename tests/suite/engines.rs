//! What others who run containers ask of a rootfs: no device nodes, which they can neither open nor copy.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use crate::common::Stage;
use crate::common::harness::{case, on};
use crate::common::walk::{Picture, assert_same, picture};

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
            outcome.fails(5, &["leaves no device nodes out", "--backend fuse or copy"]);
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
