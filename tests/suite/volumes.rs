//! Volumes: routed to host paths, read-only or writable, resolved inside the image and nowhere else.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::common::harness::{case, on};
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Lane, Stage, images, system};

/// `-v SOURCE:TARGET:ACCESS`, with what the grammar takes for a separator escaped.
pub(crate) fn volume(source: impl AsRef<Path>, target: &str, access: &str) -> [OsString; 2] {
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    let escape = |bytes: &[u8]| {
        let mut out = Vec::new();
        for &b in bytes {
            if matches!(b, b':' | b'\\') {
                out.push(b'\\');
            }
            out.push(b);
        }
        out
    };
    let mut text = escape(source.as_ref().as_os_str().as_bytes());
    text.push(b':');
    text.extend(escape(target.as_bytes()));
    text.push(b':');
    text.extend(access.as_bytes());
    ["-v".into(), OsString::from_vec(text)]
}

/// `--sandbox DIR` for a directory below the case's own, made if missing.
pub(crate) fn sandbox(stage: &Stage) -> [OsString; 2] {
    ["--sandbox".into(), stage.mkdir("sandbox").into_os_string()]
}

fn options(parts: &[&[OsString]]) -> Vec<OsString> {
    parts.concat()
}

#[track_caller]
fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
}

#[track_caller]
fn write(path: impl AsRef<Path>, text: &str) {
    let path = path.as_ref();
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}

#[track_caller]
fn refuses(result: std::io::Result<()>, errno: Errno) {
    assert_eq!(result.map_err(|e| Errno::from_io_error(&e)), Err(Some(errno)));
}

// Directory and file, relative and absolute, read-only and writable: all eight in one rootfs.
case!("every_kind_of_volume", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    for name in ["data/dr", "data/dw", "data/ar", "data/aw"] {
        fs::create_dir(image.join(name)).expect("mkdir");
    }
    for name in ["data/fr", "data/fw", "data/gr", "data/gw"] {
        fs::write(image.join(name), "image").expect("write");
    }
    let before = picture(&image);
    for dir in ["sandbox/dr", "sandbox/dw", "abs/ar", "abs/aw"] {
        stage.mkdir(dir);
        stage.write(format!("{dir}/file"), "host");
    }
    for file in ["sandbox/fr", "sandbox/fw", "abs/gr", "abs/gw"] {
        stage.write(file, "host");
    }
    let mut args = options(&[&sandbox(stage)]);
    for name in ["dr", "dw", "fr", "fw"] {
        let access = if name.ends_with('r') { "ro" } else { "rw" };
        args.extend(volume(name, &format!("/data/{name}"), access));
    }
    for name in ["ar", "aw", "gr", "gw"] {
        let access = if name.ends_with('r') { "ro" } else { "rw" };
        args.extend(volume(stage.path("abs").join(name), &format!("/data/{name}"), access));
    }
    let rootfs = stage.mount(&image, "rootfs", args);
    let inside = |name: &str| rootfs.join("data").join(name);
    for (host, name) in [("sandbox/dr", "dr"), ("abs/ar", "ar")] {
        assert_eq!(read(inside(name).join("file")), "host");
        refuses(fs::write(inside(name).join("file"), "x"), Errno::ROFS);
        refuses(fs::write(inside(name).join("new"), "x"), Errno::ROFS);
        refuses(fs::remove_file(inside(name).join("file")), Errno::ROFS);
        refuses(fs::create_dir(inside(name).join("sub")), Errno::ROFS);
        // Read-only for the container, live for the host.
        stage.write(format!("{host}/later"), "made later");
        assert_eq!(read(inside(name).join("later")), "made later");
    }
    for (host, name) in [("sandbox/dw", "dw"), ("abs/aw", "aw")] {
        write(inside(name).join("file"), "changed inside");
        assert_eq!(read(stage.path(host).join("file")), "changed inside");
        write(inside(name).join("new"), "made inside");
        assert_eq!(read(stage.path(host).join("new")), "made inside");
        fs::create_dir(inside(name).join("sub")).expect("mkdir inside");
        assert!(stage.path(host).join("sub").is_dir());
        stage.write(format!("{host}/from-host"), "made on the host");
        assert_eq!(read(inside(name).join("from-host")), "made on the host");
        fs::rename(inside(name).join("new"), inside(name).join("sub/moved")).expect("rename inside");
        assert_eq!(read(stage.path(host).join("sub/moved")), "made inside");
        fs::remove_file(inside(name).join("file")).expect("unlink inside");
        assert!(!stage.path(host).join("file").exists());
    }
    for name in ["fr", "gr"] {
        assert_eq!(read(inside(name)), "host");
        refuses(fs::write(inside(name), "x"), Errno::ROFS);
        refuses(fs::set_permissions(inside(name), fs::Permissions::from_mode(0o600)), Errno::ROFS);
    }
    for (host, name) in [("sandbox/fw", "fw"), ("abs/gw", "gw")] {
        assert_eq!(read(inside(name)), "host");
        write(inside(name), "changed inside");
        assert_eq!(read(stage.path(host)), "changed inside");
        // A host program that appends: the size inside must follow.
        fs::OpenOptions::new()
            .append(true)
            .open(stage.path(host))
            .and_then(|mut f| std::io::Write::write_all(&mut f, b", and on the host"))
            .expect("append");
        let seen = || read(inside(name)) == "changed inside, and on the host";
        assert!(system::eventually(std::time::Duration::from_secs(30), seen), "inside: {:?}", read(inside(name)));
    }
    // Beside the volumes the image is as it was.
    if stage.lane.backend != "copy" {
        refuses(fs::write(rootfs.join("etc/passwd"), "x"), Errno::ROFS);
    }
    stage.unmount(&rootfs);
    assert_same(&before, &picture(&image), "the image after unmount");
    assert_eq!(read(stage.path("sandbox/dw/from-host")), "made on the host");
});

case!("a_missing_relative_source_is_made_below_the_sandbox", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    let args = options(&[&sandbox(stage), &volume("a/b/tmp", "/tmp", "rw"), &volume("lib", "/var/lib", "rw")]);
    let rootfs = stage.mount(&image, "rootfs", args);
    write(rootfs.join("tmp/x"), "x");
    assert_eq!(read(stage.path("sandbox/a/b/tmp/x")), "x");
    let owner = |path: &Path| fs::metadata(path).map(|m| (m.uid(), m.gid())).expect("stat");
    assert_eq!(owner(&stage.path("sandbox/a/b/tmp")), owner(&stage.path("sandbox")));
    // What the image says of /tmp stays true of the volume made for it.
    let mode = fs::metadata(rootfs.join("tmp")).expect("stat").permissions().mode() & 0o7777;
    assert_eq!(mode, 0o1777, "mode of /tmp is {mode:o}");
    stage.unmount(&rootfs);
    assert!(stage.path("sandbox/a/b/tmp/x").exists(), "unmount keeps what is in a volume");
});

case!("nested_volumes_in_any_order", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    for dir in ["outer/inner/deep", "inner/deep", "deep"] {
        stage.mkdir(dir);
    }
    stage.write("outer/o", "outer");
    stage.write("outer/inner/hidden", "hidden");
    stage.write("inner/i", "inner");
    stage.write("deep/d", "deep");
    let outer = volume(stage.path("outer"), "/data", "rw");
    let inner = volume(stage.path("inner"), "/data/inner", "ro");
    let deep = volume(stage.path("deep"), "/data/inner/deep", "rw");
    for args in [options(&[&outer, &inner, &deep]), options(&[&deep, &inner, &outer])] {
        let rootfs = stage.mount(&image, "rootfs", args);
        assert_eq!(read(rootfs.join("data/o")), "outer");
        assert_eq!(read(rootfs.join("data/inner/i")), "inner");
        assert_eq!(read(rootfs.join("data/inner/deep/d")), "deep");
        assert!(!rootfs.join("data/inner/hidden").exists(), "the inner volume hides what it covers");
        write(rootfs.join("data/inner/deep/w"), "w");
        refuses(fs::write(rootfs.join("data/inner/w"), "w"), Errno::ROFS);
        write(rootfs.join("data/w"), "w");
        // A mount point is in use: its name stays.
        for (name, result) in [
            ("rmdir", rustix::fs::rmdir(rootfs.join("data/inner"))),
            ("rename", rustix::fs::rename(rootfs.join("data/inner"), rootfs.join("data/elsewhere"))),
        ] {
            assert!(
                matches!(result, Err(Errno::BUSY | Errno::XDEV | Errno::ROFS)),
                "{name} of a mount point: {result:?}"
            );
        }
        stage.unmount(&rootfs);
        assert_eq!(read(stage.path("outer/inner/hidden")), "hidden");
        for file in ["deep/w", "outer/w"] {
            fs::remove_file(stage.path(file)).expect("the write went to the volume");
        }
    }
});

case!("targets_go_through_the_images_symlinks", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    stage.mkdir("run");
    stage.mkdir("lock");
    stage.write("lock/l", "lock");
    // /var/run -> /run and /var/lock -> ../run/lock: absolute and relative, as Debian has them.
    let args =
        options(&[&volume(stage.path("run"), "/var/run/lock", "rw"), &volume(stage.path("lock"), "/var/lib", "ro")]);
    let rootfs = stage.mount(&image, "rootfs", args);
    write(rootfs.join("run/lock/x"), "through");
    assert_eq!(read(stage.path("run/x")), "through");
    assert_eq!(read(rootfs.join("var/lib/l")), "lock");
    assert_eq!(fs::read_link(rootfs.join("var/run")).expect("still a symlink"), Path::new("/run"));
});

// Symlinks of the image that point at the host: they mean places inside the image, whatever they say.
case!("targets_never_leave_the_image", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    let outside = stage.mkdir("outside");
    let deep_up = "../".repeat(40);
    for (target, name) in [
        ("/etc".to_owned(), "esc-abs"),
        (format!("{deep_up}etc"), "esc-up"),
        (outside.display().to_string(), "esc-outside"),
        (format!("{deep_up}{}", outside.display()), "esc-up-outside"),
        ("esc-b".to_owned(), "esc-a"),
        ("/esc-abs".to_owned(), "esc-b"),
    ] {
        symlink(target, image.join(name)).expect("symlink");
    }
    stage.mkdir("vol");
    stage.write("vol/mark", "volume");
    let host_etc = fs::read_dir("/etc").expect("read /etc").count();
    let before = system::mounts_of_others();
    for name in ["esc-abs", "esc-up", "esc-a"] {
        let rootfs = stage.mount(&image, "rootfs", volume(stage.path("vol"), &format!("/{name}"), "rw"));
        assert_eq!(read(rootfs.join("etc/mark")), "volume", "{name} means the image's own /etc");
        assert!(!Path::new("/etc/mark").exists(), "{name} reached the host's /etc");
        assert_eq!(fs::read_dir("/etc").expect("read /etc").count(), host_etc);
        stage.unmount(&rootfs);
    }
    for name in ["esc-outside", "esc-up-outside", "proc/self/root/etc", "proc/self/cwd"] {
        // The path does not exist inside the image: refused, or made up inside it. Never the host's.
        let call = stage.mount_call(&image, "rootfs", volume(stage.path("vol"), &format!("/{name}"), "rw")).run();
        assert!(call.code().is_some_and(|c| c <= 5), "{}", call.describe());
        assert!(!outside.join("mark").exists(), "{name} reached a directory outside");
        assert!(!Path::new("/etc/mark").exists(), "{name} reached the host's /etc");
        if call.code() == Some(0) {
            stage.unmount("rootfs");
        } else {
            stage.assert_nothing_left("after a refused mount");
        }
    }
    // A symlink loop ends in an error.
    symlink("loop", image.join("loop")).expect("symlink");
    stage.mount_call(&image, "rootfs", volume(stage.path("vol"), "/loop/x", "rw")).run().fails_saying(&["/loop"]);
    assert_eq!(before, system::mounts_of_others(), "mounts outside the case's directory");
});

case!("a_relative_source_never_leaves_the_sandbox", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    let [flag, dir] = sandbox(stage);
    let outside = stage.mkdir("outside");
    symlink(&outside, stage.path("sandbox/abs")).expect("symlink");
    symlink("../outside", stage.path("sandbox/up")).expect("symlink");
    symlink("inside", stage.path("sandbox/fine")).expect("symlink");
    stage.mkdir("sandbox/inside");
    for source in ["abs", "up", "abs/new", "up/new"] {
        let args = options(&[&[flag.clone(), dir.clone()], &volume(source, "/data", "rw")]);
        stage.mount_call(&image, "rootfs", args).run().fails(2, &["sandbox", source]);
        assert_eq!(fs::read_dir(&outside).expect("read").count(), 0, "something was made outside the sandbox");
        stage.assert_nothing_left("after a refused source");
    }
    let args = options(&[&[flag, dir], &volume("fine/new", "/data", "rw")]);
    let rootfs = stage.mount(&image, "rootfs", args);
    write(rootfs.join("data/x"), "x");
    assert_eq!(read(stage.path("sandbox/inside/new/x")), "x");
});

case!("missing_mount_points_are_made_up", on::makes_mount_points, |stage: &Stage| {
    let image = stage.small_image();
    let before = picture(&image);
    stage.mkdir("vol");
    stage.write("vol/mark", "volume");
    let file = stage.write("one", "file volume");
    let args = options(&[
        &volume(stage.path("vol"), "/opt/made/up", "rw"),
        &volume(stage.path("vol"), "/etc/conf.d", "ro"),
        &volume(&file, "/etc/resolv.conf", "rw"),
        &volume(&file, "/opt/made/file", "ro"),
    ]);
    let rootfs = stage.mount(&image, "rootfs", args);
    assert_eq!(read(rootfs.join("opt/made/up/mark")), "volume");
    assert_eq!(read(rootfs.join("etc/conf.d/mark")), "volume");
    assert_eq!(read(rootfs.join("etc/resolv.conf")), "file volume");
    assert_eq!(read(rootfs.join("opt/made/file")), "file volume");
    // They are listed, beside what the image has there.
    let names = |dir: &str| {
        let mut names: Vec<String> = fs::read_dir(rootfs.join(dir))
            .expect("read dir")
            .map(|e| e.expect("entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("opt"), ["made"]);
    assert_eq!(names("opt/made"), ["file", "up"]);
    assert_eq!(names("etc"), ["conf.d", "hosts", "passwd", "resolv.conf"]);
    assert!(names("").contains(&"opt".to_owned()));
    let mode = fs::metadata(rootfs.join("opt/made")).expect("stat").permissions().mode() & 0o7777;
    assert_eq!(mode, 0o755, "made-up directories are 0755, this is {mode:o}");
    write(rootfs.join("opt/made/up/w"), "w");
    assert_eq!(read(stage.path("vol/w")), "w");
    refuses(fs::write(rootfs.join("opt/made/w"), "w"), Errno::ROFS);
    refuses(fs::write(rootfs.join("etc/conf.d/w"), "w"), Errno::ROFS);
    refuses(fs::remove_dir(rootfs.join("opt/made")), Errno::ROFS);
    stage.unmount(&rootfs);
    assert_same(&before, &picture(&image), "the image: made up means in the tree, not on disk");
});

case!("a_missing_mount_point_is_named_with_who_could", on::bind, |stage: &Stage| {
    let image = stage.small_image();
    let before = picture(&image);
    stage.mkdir("vol");
    for target in ["/opt", "/etc/new/deep"] {
        let outcome = stage.mount_call(&image, "rootfs", volume(stage.path("vol"), target, "rw")).run();
        outcome.fails_saying(&[target, "fuse"]);
        stage.assert_nothing_left("after a missing mount point");
    }
    assert_same(&before, &picture(&image), "the image");
});

case!("wrong_volumes_are_refused_and_leave_nothing", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    let dir = stage.mkdir("vol");
    let file = stage.write("one", "file");
    let raw = |text: String| vec![OsString::from("-v"), OsString::from(text)];
    let (d, f) = (dir.display().to_string(), file.display().to_string());
    // What is asked for, the exit code, what the message must name.
    let table: &[(Vec<OsString>, i32, &[&str])] = &[
        (raw(format!("{d}:/data/../etc")), 2, &["/data/../etc", ".."]),
        (raw(format!("{d}:/./data")), 2, &["/./data"]),
        (raw(format!("{d}://data")), 2, &["//data"]),
        (raw(format!("{d}:data")), 2, &["data", "absolute"]),
        (raw(format!("{d}:/")), 2, &["root"]),
        (raw(d.clone()), 2, &["SRC:DST"]),
        (raw(format!("{d}:/data:rx")), 2, &["rx", "SRC:DST"]),
        (raw(format!("{d}:/data:ro,rw")), 2, &["twice"]),
        (raw(format!("{d}:/data:ro:rw")), 2, &["SRC:DST"]),
        (raw("x/../vol:/data".into()), 2, &["x/../vol"]),
        (raw("rel:/data".into()), 2, &["rel", "--sandbox"]),
        (raw(format!("{d}/missing:/data")), 3, &["missing", "create it"]),
        (raw(format!("{d}:/etc/passwd")), 2, &["/etc/passwd", "directory"]),
        (raw(format!("{f}:/data")), 2, &["/data", "directory"]),
        ([raw(format!("{d}:/data")), raw(format!("{d}:/data/:ro"))].concat(), 2, &["/data", "two volumes"]),
        ([raw(format!("{f}:/etc/hosts")), raw(format!("{d}:/etc/hosts/x"))].concat(), 2, &["/etc/hosts"]),
        (vec!["--sandbox".into(), file.clone().into(), "-v".into(), "x:/data".into()], 2, &["one", "--sandbox"]),
    ];
    for (args, code, texts) in table {
        stage.mount_call(&image, "rootfs", args.clone()).run().fails(*code, texts);
        stage.assert_nothing_left("after a refused volume");
        assert!(!stage.path("rootfs").exists(), "a refused mount made the mount point");
    }
});

// Two names for one place: through a symlink of the image, both volumes mean /run.
case!("two_volumes_on_one_place_through_a_symlink_are_refused", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    stage.mkdir("a");
    stage.mkdir("b");
    let args = options(&[&volume(stage.path("a"), "/run", "rw"), &volume(stage.path("b"), "/var/run", "rw")]);
    stage.mount_call(&image, "rootfs", args).run().fails(2, &["/var/run", "/run"]);
    stage.assert_nothing_left("after a refused volume");
});

case!(
    "submounts_of_a_read_only_volume_are_read_only",
    |lane: &Lane| on::volumes(lane) && lane.enter != Enter::User,
    |stage: &Stage| {
        let image = stage.small_image();
        let sub = stage.mkdir("vol/sub");
        stage.tool("mount", ["-t", "tmpfs", "tmpfs"]).arg(&sub).run().ok();
        stage.write("vol/sub/file", "in the submount");
        for access in ["ro", "rw"] {
            let rootfs = stage.mount(&image, "rootfs", volume(stage.path("vol"), "/data", access));
            assert_eq!(read(rootfs.join("data/sub/file")), "in the submount", "{access}");
            let wrote = fs::write(rootfs.join("data/sub/new"), "x");
            if access == "ro" {
                refuses(wrote, Errno::ROFS);
            } else {
                wrote.expect("write to the submount of a writable volume");
                assert_eq!(read(sub.join("new")), "x");
            }
            stage.unmount(&rootfs);
        }
        assert!(sub.join("file").exists(), "the submount is still mounted on the host");
        stage.tool("umount", [&sub]).run().ok();
    },
);

// Paths with every byte that a parser of options, mountinfo or lines could trip over.
case!("odd_paths_everywhere", on::volumes, |stage: &Stage| {
    for (i, name) in images::odd_names().into_iter().enumerate() {
        // A name of 255 bytes leaves no room for a suffix: it is used as it is, for all of them, in directories of their own.
        let dir = stage.mkdir(format!("case-{i}"));
        let at = |kind: &str| {
            let parent = dir.join(kind);
            fs::create_dir(&parent).expect("mkdir");
            parent.join(&name)
        };
        let image = at("image");
        images::make_small_tree(&image);
        let inner: PathBuf = Path::new("data").join(&name);
        fs::create_dir(image.join(&inner)).expect("mkdir");
        let (sandbox, rootfs) = (at("sandbox"), at("rootfs"));
        fs::create_dir(&sandbox).expect("mkdir");
        let mut text = OsString::from("vol:/");
        text.push(escaped(&inner));
        let args = ["--sandbox".into(), sandbox.clone().into_os_string(), "-v".into(), text];
        let rootfs = stage.mount(&image, &rootfs, args);
        assert_eq!(read(rootfs.join("etc/hosts")), "127.0.0.1 localhost\n");
        write(rootfs.join(&inner).join("x"), "x");
        assert_eq!(read(sandbox.join("vol/x")), "x", "{}", system::show(&name));
        stage.unmount(&rootfs);
    }
});

fn escaped(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    let bytes = path.as_os_str().as_bytes().iter();
    OsString::from_vec(bytes.flat_map(|&b| if matches!(b, b':' | b'\\') { vec![b'\\', b] } else { vec![b] }).collect())
}

// The mount is one file system for its user, but not one disk: what cannot be renamed or linked across says EXDEV, so that
// programs fall back to copying. What would change the image says EROFS, whichever is asked first.
case!("rename_and_link_across_trees", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    for dir in ["a", "b"] {
        stage.mkdir(dir);
        stage.write(format!("{dir}/f"), dir);
    }
    fs::create_dir(image.join("data/b")).expect("mkdir");
    let args = options(&[&volume(stage.path("a"), "/data", "rw"), &volume(stage.path("b"), "/home", "rw")]);
    let rootfs = stage.mount(&image, "rootfs", args);
    let (a, b, i) = (rootfs.join("data/f"), rootfs.join("home/g"), rootfs.join("etc/hosts"));
    for (name, result) in
        [("rename volume to volume", rustix::fs::rename(&a, &b)), ("link volume to volume", rustix::fs::link(&a, &b))]
    {
        assert_eq!(result, Err(Errno::XDEV), "{name}");
    }
    for (name, result) in [
        ("rename image to volume", rustix::fs::rename(&i, &b)),
        ("rename volume to image", rustix::fs::rename(&a, rootfs.join("etc/f"))),
        ("link volume to image", rustix::fs::link(&a, rootfs.join("etc/f"))),
        ("link image to volume", rustix::fs::link(&i, &b)),
    ] {
        assert!(matches!(result, Err(Errno::XDEV | Errno::ROFS)), "{name}: {result:?}");
    }
    // mv copies instead.
    stage.tool("mv", [&a, &b]).run().ok();
    assert_eq!(read(stage.path("b/g")), "a");
    assert!(!stage.path("a/f").exists());
    stage.tool("cp", ["-p"]).arg(&i).arg(rootfs.join("data/hosts")).run().ok();
    assert_eq!(read(stage.path("a/hosts")), "127.0.0.1 localhost\n");
});

// `--squash` and `--uid-map` say whose the files of the image seem. Those of a volume are whose they are on the disk.
case!("owners_are_squashed_or_mapped", fuse_here, |stage: &Stage| {
    let (image, backing) = (stage.small_image(), stage.mkdir("vol"));
    let owner = |path: &Path| fs::symlink_metadata(path).map(|m| (m.uid(), m.gid())).expect("stat");
    let own @ (uid, gid) = owner(&image.join("etc/hosts"));
    let map = |from: u32, to: u32| OsString::from(format!("{from}:{to}:1"));
    for (name, args, shown) in [
        ("squash", vec!["--squash".into(), "7:8".into()], (7, 8)),
        ("map", vec!["--uid-map".into(), map(uid, 4000), "--gid-map".into(), map(gid, 5000)], (4000, 5000)),
    ] {
        let rootfs = stage.mount(&image, name, options(&[&args, &volume(&backing, "/data", "rw")]));
        for path in ["", "etc", "etc/hosts", "bin"] {
            assert_eq!(owner(&rootfs.join(path)), shown, "{name}: /{path}");
        }
        let made = rootfs.join("data").join(name);
        write(&made, name);
        assert_eq!((owner(&made), owner(&backing.join(name))), (own, own), "{name}: made in the volume");
        stage.unmount(&rootfs);
    }
    let both =
        stage.fsprov(["mount", "--squash", "7:8", "--uid-map", "0:1:1"]).args([&image, &stage.path("both")]).run();
    both.fails(2, &["exclude one another"]);
    assert!(!stage.path("both").exists());
});

/// Where an id that the case makes up can be seen.
fn fuse_here(lane: &Lane) -> bool {
    on::fuse(lane) && lane.enter != Enter::Userns
}

// `-v DIR:/w` with the rootfs in DIR, and another rootfs there: a worker that comes later finds them mounted in what it serves, and
// must not keep them.
case!("a_rootfs_within_a_volumes_source_ends_when_it_is_unmounted", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    let source = stage.mkdir("vol");
    stage.write("vol/f", "of the volume");
    let mount = |id: &str| {
        let mut options = vec!["--id".into(), id.into()];
        options.extend(volume(&source, "/data", "rw"));
        stage.mount(&image, format!("vol/{id}"), options)
    };
    let (one, two) = (mount("one"), mount("two"));
    for id in ["one", "two"] {
        stage.fsprov(["restart", id]).run().ok();
    }
    for rootfs in [&one, &two] {
        assert_eq!(read(rootfs.join("data/f")), "of the volume");
        write(rootfs.join("data/g"), "written");
        assert_eq!(read(rootfs.join("etc/hosts")), "127.0.0.1 localhost\n");
    }
    // By hand: nobody ends the servers, they end with their mounts.
    let by_hand = |rootfs: &Path| {
        let servers = stage.servers().len();
        match stage.lane.enter {
            Enter::User => stage.tool("fusermount3", ["-u"]),
            _ => stage.tool("umount", ["-R"]),
        }
        .arg(rootfs)
        .run()
        .ok();
        let fewer = || stage.servers().len() + 2 <= servers;
        let patience = std::time::Duration::from_secs(10);
        assert!(system::eventually(patience, fewer), "something keeps {}: {:?}", rootfs.display(), stage.servers());
    };
    by_hand(&two);
    assert_eq!(read(one.join("data/g")), "written");
    by_hand(&one);
    stage.fsprov(["unmount", "--all"]).run().ok();
    stage.assert_nothing_left("after both were unmounted");
});
