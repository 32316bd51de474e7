//! A setuid program of an image, or one made in a container on a volume, is no setuid program of the host; inside it is one where
//! that was asked for, or nobody else gets there.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, makedev};
use rustix::io::Errno;

use super::volumes::{sandbox, volume};
use crate::common::harness::case;
use crate::common::images::{self, chmod};
use crate::common::needs::test_user;
use crate::common::system;
use crate::common::{Enter, Lane, Need, Stage};

const NEEDS: &[Need] = &[Need::TestUser, Need::Tool("setpriv"), Need::Tool("chroot")];

fn as_root(lane: &Lane) -> bool {
    !lane.backend.is_empty() && lane.enter == Enter::Root
}

/// /dev/zero.
fn make_device(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 5))
        .expect("mknod");
    chmod(path, 0o666);
}

/// A shell that is setuid root, at this path.
fn make_shell(path: &Path) {
    fs::copy("/bin/sh", path).expect("copy the shell");
    chmod(path, 0o4755);
}

/// With such a shell and a device; the host's libraries come as volumes.
fn image(stage: &Stage) -> PathBuf {
    let image = stage.small_image();
    for dir in ["usr/lib", "usr/lib64"] {
        fs::create_dir_all(image.join(dir)).expect("make dir");
    }
    for dir in ["lib", "lib64"] {
        symlink(format!("usr/{dir}"), image.join(dir)).expect("symlink");
    }
    make_shell(&image.join("bin/sh"));
    fs::copy("/usr/bin/id", image.join("bin/id")).expect("copy id");
    make_device(&image.join("dev/zero"));
    image
}

/// `more`, and the volumes; `flags` for the one at /data.
fn options(stage: &Stage, more: &[&str], flags: &str) -> Vec<OsString> {
    stage.mkdir("sandbox/data");
    let mut all: Vec<OsString> = more.iter().map(Into::into).collect();
    all.extend(sandbox(stage));
    for dir in ["/usr/lib", "/usr/lib64"] {
        all.extend(volume(dir, dir, "ro"));
    }
    all.extend(volume("data", "/data", flags));
    all
}

/// The user id that the shell at `program` runs as, for the ordinary user; `None`: it cannot be run.
fn id_of(stage: &Stage, program: &Path) -> Option<String> {
    let user = test_user().expect("the test user");
    // Not by setpriv itself, which has root's capabilities until it runs another program.
    let run = ["--clear-groups", "--", "sh", "-c", "exec \"$0\" \"$@\""];
    let call = stage.tool("setpriv", ["--reuid", &user.uid, "--regid", &user.gid]).args(run);
    let outcome = call.arg(program).args(["-p", "-c", "id -u"]).run();
    (outcome.code() == Some(0)).then(|| outcome.out().trim().to_owned())
}

/// The same of one at `program` inside `rootfs`, run there.
fn id_inside(stage: &Stage, rootfs: &Path, program: &str) -> String {
    let user = test_user().expect("the test user");
    let who = format!("--userspec={}:{}", user.uid, user.gid);
    let call = stage.tool("chroot", [who]).arg(rootfs).args([program, "-p", "-c", "/bin/id -u"]);
    call.run().ok().out().trim().to_owned()
}

fn opens(path: &Path) -> Result<(), Option<Errno>> {
    fs::File::open(path).map(drop).map_err(|e| Errno::from_io_error(&e))
}

/// What an ordinary user of the host gets there: nothing more than that user has.
#[track_caller]
fn assert_harmless(stage: &Stage, rootfs: &Path, when: &str) {
    let user = test_user().expect("the test user");
    for program in ["bin/sh", "data/sh"] {
        assert_eq!(id_of(stage, &rootfs.join(program)), Some(user.uid.clone()), "{when}: {program}");
    }
    for device in ["dev/zero", "data/zero"] {
        let refused = opens(&rootfs.join(device)).expect_err(device);
        let is_left_out = stage.lane.backend == "copy" && device == "dev/zero";
        assert_eq!(refused, Some(if is_left_out { Errno::NOENT } else { Errno::ACCESS }), "{when}: {device}");
    }
}

fn kill_servers_and_recover(stage: &Stage, rootfs: &Path) {
    for process in stage.servers() {
        system::kill(process.pid);
    }
    if stage.lane.backend != "copy" {
        stage.tool("umount", ["-l"]).arg(rootfs).run().ok();
    }
    stage.fsprov(["recover"]).run().ok();
}

case!("a_setuid_shell_gives_no_privilege_on_the_host", as_root, NEEDS, |stage: &Stage| {
    let image = image(stage);
    let rootfs = stage.path("rootfs");
    let said = stage.mount_call(&image, "rootfs", options(stage, &[], "rw")).run().ok().out();
    make_shell(&rootfs.join("data/sh"));
    // From the host: a worker without a root of its own, for lack of mount_setattr(2), may make none.
    make_device(&stage.path("sandbox/data/zero"));
    assert_harmless(stage, &rootfs, "mounted");
    assert!(said.contains("nosuid and nodev") && said.contains("--suid"), "{said}");
    kill_servers_and_recover(stage, &rootfs);
    assert_harmless(stage, &rootfs, "recovered");
    stage.unmount(&rootfs);
});

fn has_flag(point: &Path, flag: &str) -> bool {
    let mount = system::mounts().into_iter().rfind(|m| m.point == point).expect("a mount");
    mount.options.split(',').any(|option| option == flag)
}

case!("in_a_closed_directory_setuid_works_inside", as_root, NEEDS, |stage: &Stage| {
    let image = image(stage);
    let user = test_user().expect("the test user").uid;
    let rootfs = stage.mkdir("closed").join("rootfs");
    chmod(&stage.path("closed"), 0o700);
    for more in [&["--suid"][..], &[]] {
        let said = stage.mount_call(&image, "closed/rootfs", options(stage, more, "rw")).run().ok().out();
        assert!(!said.contains("nosuid"), "{said}");
        make_shell(&rootfs.join("data/sh"));
        let check = |when: &str| {
            assert_eq!(id_inside(stage, &rootfs, "/bin/sh"), "0", "{when}: the image's, {more:?}");
            assert_eq!(id_inside(stage, &rootfs, "/data/sh"), user, "{when}: a volume is nosuid");
            assert_eq!(opens(&rootfs.join("dev/zero")), Ok(()), "{when}");
            assert_eq!(id_of(stage, &rootfs.join("bin/sh")), None, "{when}: nobody else gets there");
            assert!(has_flag(&rootfs.join("data"), "nosuid") && has_flag(&rootfs.join("data"), "nodev"), "{when}");
            assert!(stage.lane.backend == "copy" || !has_flag(&rootfs, "nosuid"), "{when}");
        };
        check("mounted");
        if stage.lane.is_fuse() {
            let worker = stage.fsprov(["inspect", "--json"]).arg(&rootfs).run().ok().json()["worker_pid"].as_i64();
            system::kill(worker.expect("a worker") as i32);
            check("another worker");
        }
        kill_servers_and_recover(stage, &rootfs);
        check("recovered");
        stage.unmount(&rootfs);
        stage.assert_nothing_left("after unmount");
    }
    // As it was asked for, a volume alone.
    let options = |more: &[&str], flags: &str| options(stage, more, flags);
    stage.mount(&image, "closed/rootfs", options(&["--nosuid", "--nodev"], "rw,suid,dev,noexec"));
    assert_eq!(id_inside(stage, &rootfs, "/bin/sh"), user);
    assert_ne!(opens(&rootfs.join("dev/zero")), Ok(()));
    assert!(has_flag(&rootfs.join("data"), "noexec") && !has_flag(&rootfs.join("data"), "nodev"));
    stage.unmount(&rootfs);
    stage.mount(&image, "closed/rootfs", options(&["--nosuid"], "rw,suid"));
    assert_eq!(id_inside(stage, &rootfs, "/data/sh"), "0");
    stage.unmount(&rootfs);
});

// A single file, one volume in another, one on a path that is made up, one through a symlink, a device.
case!("every_kind_of_volume_has_its_flags", as_root, NEEDS, |stage: &Stage| {
    let image = stage.small_image();
    stage.mkdir("closed");
    chmod(&stage.path("closed"), 0o700);
    let file = stage.write("file", "a file");
    let mut options = sandbox(stage).to_vec();
    fs::create_dir_all(stage.path("sandbox/outer/in")).expect("make dir");
    let made_up = if crate::common::harness::on::makes_mount_points(&stage.lane) { "/opt/made/up" } else { "/home/u" };
    fs::create_dir_all(image.join("run/lock")).expect("make dir");
    fs::write(image.join("dev/null"), "").expect("write");
    for (source, target, flags) in [
        ("outer", "/data", "rw,suid,dev"),
        ("inner", "/data/in", "rw"),
        ("run", "/var/lock", "rw,noexec"),
        ("up", made_up, "ro"),
    ] {
        options.extend(volume(source, target, flags));
    }
    options.extend(volume(&file, "/etc/hosts", "rw"));
    options.extend(volume("/dev/null", "/dev/null", "rw"));
    let rootfs = stage.mount(&image, "closed/rootfs", options);
    for (target, has, has_not) in [
        ("data", &[][..], &["nosuid", "nodev", "noexec"][..]),
        ("data/in", &["nosuid", "nodev"], &["noexec"]),
        ("run/lock", &["nosuid", "nodev", "noexec"], &[]),
        (&made_up[1..], &["nosuid", "nodev", "ro"], &["noexec"]),
        ("etc/hosts", &["nosuid", "nodev"], &["ro"]),
        // The server shows it as a regular file.
        ("dev/null", &["nosuid"], if stage.lane.is_fuse() { &[] } else { &["nodev"] }),
    ] {
        for flag in has {
            assert!(has_flag(&rootfs.join(target), flag), "{target} should be {flag}");
        }
        for flag in has_not {
            assert!(!has_flag(&rootfs.join(target), flag), "{target} should not be {flag}");
        }
    }
    fs::write(rootfs.join("data/in/mark"), "inner").expect("write");
    fs::write(rootfs.join("var/lock/mark"), "run").expect("write");
    fs::write(rootfs.join("etc/hosts"), "changed").expect("write");
    fs::write(rootfs.join("dev/null"), "gone").expect("write to the device");
    for (path, text) in [("sandbox/inner/mark", "inner"), ("sandbox/run/mark", "run"), ("file", "changed")] {
        assert_eq!(fs::read_to_string(stage.path(path)).expect("read"), text, "{path}");
    }
    // In use, it stays as it was: with its volumes, and what is held back in them.
    let held = fs::File::open(rootfs.join("data/in/mark")).expect("open");
    stage.fsprov(["unmount"]).arg(&rootfs).run().fails(4, &["use", " by "]);
    assert!(has_flag(&rootfs.join("data/in"), "nosuid"));
    drop(held);
    // What others mount in a volume is none of ours.
    let foreign = rootfs.join("data/in/foreign");
    fs::create_dir(&foreign).expect("mkdir");
    stage.tool("mount", ["-t", "tmpfs", "tmpfs"]).arg(&foreign).run().ok();
    stage.fsprov(["unmount"]).arg(&rootfs).run().fails(4, &["foreign"]);
    assert!(has_flag(&rootfs.join("data/in"), "nosuid"));
    stage.tool("umount", [foreign.as_os_str()]).run().ok();
    stage.unmount(&rootfs);
});

// `copy` puts an image's files straight into a directory of the host.
case!("a_filled_volume_holds_no_setuid_file", as_root, NEEDS, |stage: &Stage| {
    let image = image(stage);
    chmod(&image.join("bin/tool"), 0o2755);
    chmod(&image.join("dev"), 0o2755);
    let mode = |path: &str| fs::symlink_metadata(stage.path(path)).expect(path).mode() & 0o7777;
    let with = |flags: &str| {
        let mut options = sandbox(stage).to_vec();
        options.extend(volume("bin", "/bin", flags));
        options.extend(volume("dev", "/dev", flags));
        options.extend(volume("sh", "/bin/sh", flags));
        options
    };
    let said = stage.mount_call(&image, "rootfs", with("rw,copy")).run().ok().err();
    let user = test_user().expect("the test user").uid;
    assert_eq!(id_of(stage, &stage.path("sandbox/bin/sh")), Some(user));
    assert_eq!((mode("sandbox/bin/sh"), mode("sandbox/bin/tool"), mode("sandbox/dev")), (0o755, 0o755, 0o755));
    assert_eq!(mode("sandbox/sh"), 0o755, "a single file");
    assert!(!stage.path("sandbox/dev/zero").exists());
    assert!(said.contains("volume /bin: 2 files") && said.contains("1 device nodes"), "{said}");
    stage.unmount("rootfs");
    stage.tool("rm", ["-r"]).arg(stage.path("sandbox")).run().ok();
    stage.mount(&image, "rootfs", with("rw,copy,suid,dev"));
    assert_eq!((mode("sandbox/bin/sh"), mode("sandbox/bin/tool")), (0o4755, 0o2755));
    assert!(stage.path("sandbox/dev/zero").exists());
});

// What a mount cannot have is refused, and by name.
case!(
    "flags_that_a_mount_cannot_have_are_refused",
    |lane| ["fuse-user", "fuse-userns"].contains(&lane.name),
    |stage: &Stage| {
        let image = stage.small_image();
        let options = volume(stage.mkdir("vol"), "/data", "dev");
        stage.mount_call(&image, "rootfs", options).run().fails(5, &["/data", "dev", "nodev"]);
        let options = volume(stage.mkdir("vol"), "/data", "suid");
        if stage.lane.enter == Enter::User {
            stage.mount_call(&image, "rootfs", options).run().fails(5, &["/data", "suid", "nosuid and nodev"]);
            stage.mount_call(&image, "rootfs", ["--suid"]).run().fails(5, &["--suid", "nosuid and nodev"]);
        } else {
            // In a user namespace setuid works, for those in there, and devices for nobody.
            let rootfs = stage.mount(&image, "rootfs", [] as [&str; 0]);
            assert!(!has_flag(&rootfs, "nosuid") && has_flag(&rootfs, "nodev"));
            stage.unmount(&rootfs);
            stage.mount(&image, "rootfs", options);
            assert!(!has_flag(&rootfs, "nosuid"), "one mount, with the volume");
            stage.unmount(&rootfs);
            let options = volume(stage.path("vol"), "/data", "rw");
            stage.mount(&image, "rootfs", options.iter().cloned().chain(["--nosuid".into()]));
            assert!(has_flag(&rootfs, "nosuid"), "one mount again");
            stage.unmount(&rootfs);
            stage.mount(&image, "rootfs", options);
            assert!(!has_flag(&rootfs, "nosuid") && has_flag(&rootfs.join("data"), "nosuid"), "a volume is nosuid");
            stage.unmount(&rootfs);
        }
        let options = volume(stage.mkdir("vol"), "/data", "noexec");
        let outcome = stage.mount_call(&image, "rootfs", options).run();
        if stage.lane.enter == Enter::User {
            outcome.fails(5, &["/data", "noexec", "same flags"]);
        } else {
            outcome.ok();
            assert!(has_flag(&stage.path("rootfs/data"), "noexec"));
        }
    },
);

// The directories made for a mount point are closed.
case!("directories_of_a_mount_point_are_closed", crate::common::harness::on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let said = stage.mount_call(&image, "made/of/rootfs", [] as [&str; 0]).run().ok().out();
    assert!(!said.contains("nosuid"), "{said}");
    for dir in ["made", "made/of"] {
        let mode = fs::metadata(stage.path(dir)).expect("stat").permissions().mode();
        assert_eq!(mode & 0o7777, 0o700, "{dir}");
    }
});

// `su` of a real Debian, run by an ordinary user inside: with `--suid`, in a directory that is closed to the others of the host.
case!(
    "su_works_inside_where_it_was_asked_for",
    |lane| ["bind-root", "fuse-root"].contains(&lane.name),
    &[Need::Minbase, Need::TestUser, Need::Tool("chroot")],
    |stage: &Stage| {
        let archive = images::minbase_aci().expect("the Debian archive");
        stage.fsprov(["image", "import", "--name", "debian"]).arg(&archive).run().ok();
        stage.mkdir("closed");
        chmod(&stage.path("closed"), 0o700);
        let user = test_user().expect("the test user");
        for (flag, says) in [("--suid", "0\n"), ("--nosuid", "")] {
            let mut options = sandbox(stage).to_vec();
            options.extend(volume("etc", "/etc", "rw,copy"));
            options.push(flag.into());
            let rootfs = stage.mount("debian", "closed/rootfs", options);
            let inside = |who: &str, command: &str| {
                stage.tool("chroot", [&format!("--userspec={who}")]).arg(&rootfs).args(["/bin/sh", "-c", command]).run()
            };
            inside("0:0", "echo root:sesame | chpasswd -c SHA512").ok();
            let who = format!("{}:{}", user.uid, user.gid);
            let said = inside(&who, "echo sesame | su -c 'id -u'");
            assert_eq!(said.out(), says, "{flag}: {}", said.describe());
            stage.unmount(&rootfs);
            fs::remove_dir_all(stage.path("sandbox/etc")).expect("remove the volume's source");
        }
    },
);
