//! The image is read-only: for root too, from the first instant, in every namespace.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use crate::common::harness::{case, on};
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Lane, Need, Stage, images, system};

type Attempt = (&'static str, fn(&Path) -> rustix::io::Result<()>);

fn open(path: &Path, flags: OFlags) -> rustix::io::Result<()> {
    rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map(drop)
}

fn times() -> Timestamps {
    let time = Timespec { tv_sec: 1, tv_nsec: 1 };
    Timestamps { last_access: time, last_modification: time }
}

/// Every way to change a tree, on names that `make_small_tree` makes. Each must say EROFS and nothing else.
const ATTEMPTS: &[Attempt] = &[
    ("open for writing", |r| open(&r.join("etc/passwd"), OFlags::WRONLY)),
    ("open for reading and writing", |r| open(&r.join("etc/passwd"), OFlags::RDWR)),
    ("open to append", |r| open(&r.join("etc/passwd"), OFlags::WRONLY | OFlags::APPEND)),
    ("open and truncate", |r| open(&r.join("home/u/notes"), OFlags::WRONLY | OFlags::TRUNC)),
    ("create", |r| open(&r.join("etc/new"), OFlags::WRONLY | OFlags::CREATE)),
    ("create in a 1777 directory", |r| open(&r.join("tmp/new"), OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)),
    ("mkdir", |r| rustix::fs::mkdir(r.join("etc/newdir"), Mode::from_raw_mode(0o755))),
    ("rmdir", |r| rustix::fs::rmdir(r.join("home/u"))),
    ("unlink", |r| rustix::fs::unlink(r.join("etc/hosts"))),
    ("unlink a symlink", |r| rustix::fs::unlink(r.join("var/run"))),
    ("rename", |r| rustix::fs::rename(r.join("etc/hosts"), r.join("etc/hosts2"))),
    ("rename over", |r| rustix::fs::rename(r.join("etc/hosts"), r.join("etc/passwd"))),
    ("exchange", |r| {
        rustix::fs::renameat_with(CWD, r.join("etc/hosts"), CWD, r.join("etc/passwd"), RenameFlags::EXCHANGE)
    }),
    ("link", |r| rustix::fs::link(r.join("etc/hosts"), r.join("etc/hosts2"))),
    ("symlink", |r| rustix::fs::symlink("x", r.join("etc/link"))),
    ("mknod fifo", |r| rustix::fs::mknodat(CWD, r.join("etc/fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0)),
    ("chmod", |r| rustix::fs::chmod(r.join("etc/passwd"), Mode::from_raw_mode(0o600))),
    ("chmod a directory", |r| rustix::fs::chmod(r.join("etc"), Mode::from_raw_mode(0o700))),
    ("chown", |r| {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        rustix::fs::chownat(CWD, r.join("etc/passwd"), Some(uid), Some(gid), AtFlags::empty())
    }),
    ("truncate", |r| {
        std::fs::File::options().write(true).open(r.join("home/u/notes")).map(drop).map_err(|e| errno(&e))
    }),
    ("utimens", |r| rustix::fs::utimensat(CWD, r.join("etc/passwd"), &times(), AtFlags::empty())),
    ("utimens of a symlink", |r| rustix::fs::utimensat(CWD, r.join("var/run"), &times(), AtFlags::SYMLINK_NOFOLLOW)),
    ("setxattr", |r| rustix::fs::setxattr(r.join("etc/passwd"), "user.x", b"1", XattrFlags::empty())),
    ("removexattr", |r| rustix::fs::removexattr(r.join("etc/passwd"), "user.x")),
];

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[track_caller]
pub(crate) fn assert_read_only(rootfs: &Path, when: &str) {
    let mut wrong = Vec::new();
    for (name, attempt) in ATTEMPTS {
        let got = attempt(rootfs);
        if got != Err(Errno::ROFS) {
            wrong.push(format!("{name}: {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{when}: these should all have been EROFS:\n  {}", wrong.join("\n  "));
}

case!("every_change_is_erofs", on::read_only, |stage: &Stage| {
    let image = stage.small_image();
    rustix::fs::setxattr(image.join("etc/passwd"), "user.x", b"0", XattrFlags::empty()).expect("setxattr");
    let before = picture(&image);
    let rootfs = stage.mount(&image, "rootfs", [] as [&str; 0]);
    assert_read_only(&rootfs, "without volumes");
    stage.unmount(&rootfs);
    // A writable volume means that the superblock of a FUSE rootfs cannot be read-only: the server itself must refuse.
    stage.mkdir("sandbox");
    let sandbox = stage.path("sandbox").into_os_string();
    let rootfs = stage.mount(&image, "rootfs", ["--sandbox".into(), sandbox, "-v".into(), "work:/data".into()]);
    assert_read_only(&rootfs, "beside a writable volume");
    stage.unmount(&rootfs);
    assert_same(&before, &picture(&image), "the image after all attempts");
});

case!("programs_say_read_only_file_system", on::read_only, |stage: &Stage| {
    let image = stage.small_image();
    let rootfs = stage.mount(&image, "rootfs", [] as [&str; 0]);
    let name = |path: &str| rootfs.join(path).into_os_string();
    for (tool, args) in [
        ("touch", vec![name("etc/x")]),
        ("chmod", vec!["600".into(), name("etc/passwd")]),
        ("mkdir", vec![name("etc/d")]),
        ("mv", vec![name("etc/hosts"), name("etc/h")]),
        ("truncate", vec!["-s1".into(), name("etc/hosts")]),
        ("rm", vec!["-f".into(), name("etc/hosts")]),
        ("ln", vec!["-s".into(), "x".into(), name("etc/l")]),
    ] {
        stage.tool(tool, args).run().fails(1, &["Read-only file system"]);
    }
});

// A remount is not propagated: a namespace made before the mount would keep a writable view (facts/mesos-appc.md).
case!(
    "read_only_in_a_slave_namespace_made_earlier",
    |lane: &Lane| lane.backend == "bind" && lane.enter == Enter::Root,
    &[Need::Tool("unshare"), Need::Tool("nsenter")],
    |stage: &Stage| {
        let image = stage.small_image();
        let shared = stage.mkdir("shared");
        stage.tool("mount", ["-t", "tmpfs", "tmpfs"]).arg(&shared).run().ok();
        stage.tool("mount", ["--make-shared"]).arg(&shared).run().ok();
        let mut slave = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "slave", "sleep", "60"])
            .spawn()
            .expect("start the slave namespace");
        let pid = slave.id().to_string();
        let apart = || {
            let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
            of(&pid) != of("self")
        };
        assert!(system::eventually(std::time::Duration::from_secs(5), apart), "the slave has its own namespace");
        let rootfs = stage.mount(&image, "shared/rootfs", [] as [&str; 0]);
        let seen = stage.tool("nsenter", ["-t", &pid, "-m", "touch"]).arg(rootfs.join("etc/passwd")).run();
        // Seen there or not: what must not be is a writable view.
        let image_touched = seen.code() == Some(0);
        stage.unmount(&rootfs);
        let _ = slave.kill();
        let _ = slave.wait();
        stage.tool("umount", ["-l"]).arg(&shared).run().ok();
        assert!(!image_touched, "the slave namespace could write to the image");
        assert!(
            seen.err().contains("Read-only file system") || seen.err().contains("No such file"),
            "{}",
            seen.describe()
        );
    },
);

case!("flags_of_the_source_are_kept", on::bind, |stage: &Stage| {
    let image = stage.mkdir("image");
    stage.tool("mount", ["-t", "tmpfs", "-o", "nosuid,nodev,noexec", "tmpfs"]).arg(&image).run().ok();
    images::make_small_tree(&image);
    let rootfs = stage.mount(&image, "rootfs", [] as [&str; 0]);
    let mount = system::mounts().into_iter().rfind(|m| m.point == rootfs).expect("the rootfs is a mount");
    for flag in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(mount.options.split(',').any(|o| o == flag), "{flag} is missing: {mount:?}");
    }
    stage.unmount(&rootfs);
    stage.tool("umount", [&image]).run().ok();
});

// Programs that copy ask for lists and ACLs, and take EOPNOTSUPP for an error; `ls -l` and overlayfs ask for values, of each file.
case!("attributes_of_an_image_that_has_none", on::fuse, |stage: &Stage| {
    stage.mkdir("tree/etc");
    stage.write("tree/etc/passwd", "root");
    stage.tool("tar", ["-cf", "tree.tar", "-C", "tree", "."]).run().ok();
    stage.fsprov(["image", "import", "--name", "bare", "tree.tar"]).run().ok();
    let file = stage.mount("bare", "rootfs", ["--id", "k"]).join("etc/passwd");
    let asked = || stage.fsprov(["stats", "--json", "k"]).run().ok().json()["worker"]["requests"]["getxattr"].as_u64();
    for round in 0..3 {
        let mut bytes = [0_u8; 64];
        // The kernel remembers the first answer.
        assert_eq!(rustix::fs::getxattr(&file, "user.x", &mut bytes), Err(Errno::OPNOTSUPP), "{round}");
        for acl in ["system.posix_acl_access", "system.posix_acl_default"] {
            assert_eq!(rustix::fs::getxattr(&file, acl, &mut bytes), Err(Errno::NODATA), "{round}: {acl}");
        }
        assert_eq!(rustix::fs::listxattr(&file, &mut bytes), Ok(0), "{round}");
    }
    assert_eq!(asked(), Some(1));
});
