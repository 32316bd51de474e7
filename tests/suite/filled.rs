//! `-v SRC:DST:rw,copy`: a new source gets what the image has at its target, whole or not at all, once.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::images::{Maker, make_full_tree, manifest};
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Need, Stage};

/// Names beside a source that a copy made and did not take away.
fn stages(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(".fsprov-copy")).collect()
}

/// An image that has one of everything below /all, and a few small things beside.
fn image(stage: &Stage) -> std::path::PathBuf {
    let image = stage.small_image();
    make_full_tree(&image.join("all"), if stage.lane.is_real_root() { Maker::RealRoot } else { Maker::Anyone });
    // What its owner may not read cannot be copied from a plain directory; an image in the store has an index.
    stage.tool("chmod", ["-R", "u+rwX"]).arg(image.join("all")).run().ok();
    fs::set_permissions(image.join("data"), fs::Permissions::from_mode(0o2750)).expect("chmod");
    if !keeps_set_id(stage) {
        stage.tool("chmod", ["-R", "a-s"]).arg(image.join("all")).run().ok();
    }
    symlink("all", image.join("link")).expect("symlink");
    // Holes stay holes.
    let sparse = fs::File::create(image.join("all/sparse")).expect("create");
    sparse.set_len(64 << 20).expect("grow");
    image
}

/// Can a volume have the option `suid`? What an ordinary user mounts by FUSE cannot.
fn keeps_set_id(stage: &Stage) -> bool {
    !stage.lane.is_fuse() || stage.lane.enter == Enter::Root
}

case!("a_new_source_is_filled_from_the_image", on::every_backend, |stage: &Stage| {
    if stage.lane.name == "copy-user" {
        return; // it has no volumes
    }
    let image = image(stage);
    let want = picture(&image.join("all"));
    let mut options = sandbox(stage).to_vec();
    options.extend(volume("new/all", "/link", if keeps_set_id(stage) { "rw,copy,suid,dev" } else { "rw,copy" }));
    options.extend(volume(stage.path("absolute"), "/data", "copy"));
    options.extend(volume("hosts", "/etc/hosts", "copy,rw"));
    if on::makes_mount_points(&stage.lane) {
        options.extend(volume("nothing", "/is/not/there", "copy"));
    }
    let rootfs = stage.mount(&image, "rootfs", options.clone());
    let filled = stage.path("sandbox/new/all");
    assert_same(&want, &picture(&filled), "the filled source");
    assert_same(&want, &picture(&rootfs.join("all")), "what is seen in the volume");
    assert!(fs::metadata(filled.join("sparse")).expect("stat").blocks() < 1000, "a hole was filled");
    assert_eq!(fs::metadata(stage.path("absolute")).expect("stat").mode() & 0o7777, 0o750);
    assert_eq!(fs::read_to_string(stage.path("sandbox/hosts")).expect("read"), "127.0.0.1 localhost\n");
    if on::makes_mount_points(&stage.lane) {
        assert_eq!(fs::read_dir(stage.path("sandbox/nothing")).expect("it is made").count(), 0);
    }
    assert!(stages(&stage.path("sandbox")).is_empty() && stages(&stage.path("sandbox/new")).is_empty());
    // A volume, and none of the image.
    fs::write(rootfs.join("all/written"), "inside").expect("write");
    fs::remove_file(rootfs.join("all/sparse")).expect("unlink");
    fs::write(rootfs.join("etc/hosts"), "changed").expect("write");
    assert_eq!(fs::read_to_string(filled.join("written")).expect("read"), "inside");
    assert!(image.join("all/sparse").exists() && !image.join("all/written").exists());
    stage.unmount(&rootfs);
    // The second time there is something: it stays as it is.
    let rootfs = stage.mount(&image, "rootfs", options);
    assert!(rootfs.join("all/written").exists() && !rootfs.join("all/sparse").exists());
    assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "changed");
});

case!("only_an_empty_source_is_filled", on::volumes, |stage: &Stage| {
    let image = image(stage);
    let (empty, full, link) = (stage.mkdir("empty"), stage.mkdir("full"), stage.path("sandbox/link"));
    stage.write("full/mine", "mine");
    let sandbox = sandbox(stage);
    symlink("elsewhere", &link).expect("symlink");
    stage.mkdir("sandbox/used");
    let rootfs = stage.mount(&image, "first", [&sandbox[..], &volume("used", "/tmp", "rw")].concat());
    let mut options = sandbox.to_vec();
    options.extend(volume(&empty, "/all", if keeps_set_id(stage) { "rw,copy,suid,dev" } else { "rw,copy" }));
    options.extend(volume(&full, "/etc", "rw,copy"));
    // Empty, but the volume of another rootfs, which would lose it.
    options.extend(volume("used", "/home", "rw,copy"));
    let second = stage.mount(&image, "second", options);
    assert_same(&picture(&image.join("all")), &picture(&empty), "the empty source");
    assert_eq!(fs::read_dir(&full).expect("readdir").count(), 1, "what was there stays, and nothing is added");
    assert!(!second.join("home/u").exists(), "a source in use is not replaced");
    fs::write(rootfs.join("tmp/alive"), "x").expect("write");
    assert!(second.join("home/alive").exists(), "both have the same directory");
    // A dangling symlink is no missing source: it might lead anywhere.
    let refused = stage.mount_call(&image, "third", [&sandbox[..], &volume("link", "/tmp", "rw,copy")].concat());
    refused.run().fails_saying(&["link"]);
    assert!(!stage.path("sandbox/elsewhere").exists());
    let refused = stage.mount_call(&image, "third", [&sandbox[..], &volume("a", "/tmp", "rw,copied")].concat());
    refused.run().fails(2, &["copied", "ro, rw, copy"]);
});

// Killed or failing at any step, the source is missing or complete, and nothing is left beside it.
case!(
    "a_copy_cut_short_is_no_copy",
    |lane| ["fuse-user", "bind-root"].contains(&lane.name),
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = image(stage);
        let want = picture(&image.join("all"));
        let source = stage.path("sandbox/all");
        let mount = |fault: &str| {
            let flags = if keeps_set_id(stage) { "rw,copy,suid,dev" } else { "rw,copy" };
            let options = [&sandbox(stage)[..], &volume("all", "/all", flags)].concat();
            stage.mount_call(&image, "rootfs", options).env("FAILPOINTS", fault).run()
        };
        for point in ["fill.begin", "fill.made", "fill.placed"] {
            for what in ["ENOSPC", "kill"] {
                let outcome = mount(&format!("{point}=return({what})"));
                assert_ne!(outcome.code(), Some(0), "{}", outcome.describe());
                assert_eq!(outcome.code().is_none(), what == "kill", "{}", outcome.describe());
                stage.fsprov(["recover"]).run().ok();
                assert!(stages(&stage.path("sandbox")).is_empty(), "{point} {what}: left beside the source");
                if point == "fill.placed" {
                    assert_same(&want, &picture(&source), "a source in its place");
                    fs::rename(&source, stage.path(format!("sandbox/{what}"))).expect("move away");
                } else {
                    assert!(fs::symlink_metadata(&source).is_err(), "{point} {what}: a source that is not complete");
                }
                stage.assert_nothing_left(point);
            }
        }
        mount("").ok();
        assert_same(&want, &picture(&source), "the filled source");
    },
);

// Modes, and owners where the user may set them, come from the index: a plain user's store has not got them on the disk.
case!("an_archives_owners_and_modes_are_filled_in", on::volumes, |stage: &Stage| {
    let mut archive = tar::Builder::new(fs::File::create(stage.path("image.aci")).expect("create"));
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, owner: u64, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, path, content).expect("append");
    };
    add("manifest", tar::EntryType::Regular, 0o644, 0, manifest("example.com/owned").as_bytes());
    add("rootfs", tar::EntryType::Directory, 0o755, 0, b"");
    add("rootfs/srv", tar::EntryType::Directory, 0o700, 33, b"");
    add("rootfs/srv/closed", tar::EntryType::Directory, 0o000, 0, b"");
    add("rootfs/srv/closed/file", tar::EntryType::Regular, 0o000, 34, b"content");
    add("rootfs/srv/setuid", tar::EntryType::Regular, 0o4755, 0, b"program");
    archive.finish().expect("finish");
    stage.fsprov(["image", "import"]).arg(stage.path("image.aci")).run().ok();
    let options = [&sandbox(stage)[..], &volume("srv", "/srv", "rw,copy")].concat();
    stage.mount("example.com/owned", "rootfs", options);
    let source = stage.path("sandbox/srv");
    let stat = |name: &str| fs::symlink_metadata(source.join(name)).expect("stat");
    assert_eq!((stat(".").mode() & 0o7777, stat("closed").mode() & 0o7777), (0o700, 0o000));
    assert_eq!((stat(".").mtime(), stat("setuid").mtime()), (1_000_000_000, 1_000_000_000));
    if stage.lane.enter == Enter::Root {
        assert_eq!((stat(".").uid(), stat("closed/file").gid(), stat("setuid").mode() & 0o7777), (33, 34, 0o755));
    } else {
        let me = rustix::process::geteuid().as_raw();
        assert_eq!(stat(".").uid(), me);
        assert_eq!(stat("setuid").mode() & 0o7777, 0o755);
    }
    if !rustix::process::geteuid().is_root() {
        fs::set_permissions(source.join("closed"), fs::Permissions::from_mode(0o700)).expect("chmod");
        fs::set_permissions(source.join("closed/file"), fs::Permissions::from_mode(0o600)).expect("chmod");
    }
    assert_eq!(fs::read(source.join("closed/file")).expect("read"), b"content");
});
