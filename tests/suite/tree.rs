//! The rootfs shows what the image holds.

use crate::common::harness::{case, on};
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Stage, images, needs};

case!("same_tree_as_the_source", on::every_backend, |stage: &Stage| {
    let image = stage.full_image();
    match (stage.lane.backend, stage.lane.enter) {
        // A directory that one may list but not enter: readdirplus must give attributes with each name, and fuser 0.18 has no way
        // to send a name without them (ReplyDirectoryPlus::add takes one number for node id and d_ino).
        ("fuse", Enter::User) => {
            images::chmod(&image.join("usr/d644"), 0o744);
            // Opening is free where nothing can be written, so what may not be read shows when it is read; kernels after 6.18 (seen on 7.3)
            // make EIO of whatever error a read into the page cache had.
            if needs::kernel() > (6, 18) {
                images::chmod(&image.join("usr/closed"), 0o400);
            }
        }
        // What its user cannot read, a copy cannot hold.
        ("copy", Enter::User) => {
            for (name, mode) in [("closed", 0o400), ("d311", 0o711), ("d644", 0o744)] {
                images::chmod(&image.join("usr").join(name), mode);
            }
        }
        _ => {}
    }
    let want = picture(&image);
    assert!(want.len() > 2000, "the source should have been seen whole: {} paths", want.len());
    // A copy that others reach is without setuid programs and devices.
    let options: &[&str] = if stage.lane.backend == "copy" { &["--suid"] } else { &[] };
    if (stage.lane.backend, stage.lane.enter) == ("overlay", Enter::Userns) && needs::kernel() < (5, 11) {
        stage.mount_call(&image, "rootfs", options).run().fails(5, &["overlayfs in a user namespace", "Linux 5.11"]);
        return stage.assert_nothing_left("after a refusal");
    }
    let rootfs = stage.mount(&image, "rootfs", options);
    // Twice: the second time from the kernel's caches.
    for pass in ["first walk", "second walk"] {
        assert_same(&want, &picture(&rootfs), pass);
    }
    stage.unmount(&rootfs);
    assert_same(&want, &picture(&image), "the image after unmount");
});

// A copy is its user's own: writable, and no change reaches the image.
case!("a_copy_is_writable_and_its_own", on::copy, |stage: &Stage| {
    let image = stage.small_image();
    let before = picture(&image);
    let rootfs = stage.mount(&image, "rootfs", [] as [&str; 0]);
    std::fs::write(rootfs.join("etc/hosts"), "changed").expect("write");
    std::fs::write(rootfs.join("etc/new"), "new").expect("write");
    std::fs::remove_file(rootfs.join("bin/tool")).expect("unlink");
    assert_same(&before, &picture(&image), "the image behind a changed copy");
    stage.unmount(&rootfs);
    assert!(!rootfs.exists(), "unmount takes the copy away");
    stage.assert_nothing_left("after unmount");
    // Without privilege a copy can have no volume: it says so, and who could.
    if stage.lane.enter == Enter::User {
        let volume = super::volumes::volume(stage.mkdir("vol"), "/data", "rw");
        stage.mount_call(&image, "rootfs", volume).run().fails_saying(&["copy", "fuse"]);
        stage.assert_nothing_left("after a refused volume");
    }
});
