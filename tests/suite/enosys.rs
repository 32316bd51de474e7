//! Old kernels and strict seccomp profiles: the newer system calls answer ENOSYS, and all works without them or says why not.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::walk::{assert_same, picture};
use crate::common::{Need, Stage, system};

/// `enosys CALLS PROGRAM ARGS`; in C, as a filter is raw system calls, which this crate keeps out of its tests. `scripts/enosys` runs
/// the whole suite so.
const FILTER: &str = include_str!("../common/enosys.c");

/// Each alone, as a kernel between two versions has it; the three of the mount API; all; and what overlayfs's options are answered by
/// Linux 6.12, 6.1 and 5.10.
const MISSING: &[&str] = &[
    "openat2",
    "mount_setattr",
    "statx",
    "open_tree,move_mount,mount_setattr",
    "openat2,open_tree,move_mount,mount_setattr,statx",
    "fsconfig_fd=EBADF",
    "fsconfig_fd=EOPNOTSUPP",
    "fsconfig_fd=EOPNOTSUPP,mount_setattr",
    "fsopen,mount_setattr",
];

/// Overlay works all the same without these.
fn is_told_otherwise(missing: &str) -> bool {
    missing.starts_with("fsconfig_fd") || missing.starts_with("fsopen")
}

fn filter(stage: &Stage) -> PathBuf {
    let (source, program) = (stage.write("enosys.c", FILTER), stage.path("enosys"));
    stage.tool("cc", ["-O1", "-Wall", "-o"]).arg(&program).arg(&source).run().ok();
    program
}

/// An ordinary user's filter forbids setuid programs, fusermount3 among them: that lane has nothing to fall back to.
fn lanes(lane: &crate::common::Lane) -> bool {
    on::every_backend(lane) && !(lane.is_fuse() && lane.enter == crate::common::Enter::User)
}

case!("works_without_the_newer_system_calls_or_says_why_not", lanes, &[Need::Tool("cc")], |stage: &Stage| {
    let enosys = filter(stage);
    let image = stage.small_image();
    let without_volumes = |mut picture: crate::common::walk::Picture| {
        picture.retain(|path, _| !path.starts_with(b"data") && !path.starts_with(b"run/lock"));
        picture
    };
    let want = without_volumes(picture(&image));
    let run = |missing: &str, args: &[&OsStr]| {
        let call = stage.tool(&enosys.display().to_string(), [missing]);
        call.arg(crate::common::stage::program()).args(args).run()
    };
    let rootfs = stage.path("rootfs");
    let mut worked = 0;
    for missing in MISSING {
        let mut words: Vec<OsString> = ["mount", "--backend", stage.lane.backend].map(OsString::from).to_vec();
        if stage.lane.has_volumes() {
            words.extend(sandbox(stage));
            words.extend(volume("vol", "/data", "rw"));
            words.extend(volume(stage.mkdir("other"), "/run/lock", "ro"));
        }
        words.extend([image.clone().into_os_string(), rootfs.clone().into_os_string()]);
        let mount = run(missing, &words.iter().map(OsString::as_os_str).collect::<Vec<_>>());
        if mount.code() != Some(0) && !is_told_otherwise(missing) {
            // Not possible on this host, in words that name what is missing: not a bare failure.
            let said = mount.err();
            assert!(
                mount.code() == Some(5) && missing.split(',').any(|call| said.contains(call)),
                "without {missing}: neither works nor says why:\n{}",
                mount.describe()
            );
            stage.assert_nothing_left(missing);
            continue;
        }
        let mount = mount.ok();
        worked += 1;
        assert_same(&want, &without_volumes(picture(&rootfs)), missing);
        let probe = run(missing, &["probe".as_ref(), "--json".as_ref()]).ok().json();
        let says = probe["backends"].as_array().and_then(|all| all.iter().find(|b| b["backend"] == stage.lane.backend));
        assert!(
            says.is_some_and(|b| b["works"] == true),
            "without {missing} it works:\n{}\n{probe:#}",
            mount.describe()
        );
        if stage.lane.backend != "copy" {
            let refused = std::fs::write(rootfs.join("etc/new"), "x").expect_err("read-only");
            assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()), "without {missing}");
        }
        if stage.lane.has_volumes() {
            std::fs::write(rootfs.join("data/kept"), missing).expect("write to a volume");
            let read = std::fs::read_to_string(stage.path("sandbox/vol/kept")).expect("it is on the host");
            assert_eq!(read, *missing);
            std::fs::remove_file(rootfs.join("data/kept")).expect("remove it there");
            let refused = std::fs::write(rootfs.join("run/lock/x"), "x").expect_err("a read-only volume");
            assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()), "without {missing}");
        }
        let listed = run(missing, &["list".as_ref(), "--json".as_ref()]).ok().json();
        let listed = listed.as_array().map_or(0, Vec::len);
        assert_eq!(listed, 1, "without {missing}");
        run(missing, &["unmount".as_ref(), rootfs.as_ref()]).ok();
        let left = system::mounts_below(&rootfs);
        assert!(left.is_empty(), "without {missing}: {left:#?}");
        stage.assert_nothing_left(missing);
    }
    assert!(worked > 0, "{} works without none of {MISSING:?}", stage.lane.backend);
},);
