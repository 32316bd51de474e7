//! What the kernel may keep of a volume: names and attributes for `--volume-ttl`, writes with `--writeback`, ACLs.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use super::volumes::volume;
use crate::common::harness::{case, on};
use crate::common::needs::test_user;
use crate::common::{Need, Stage};

fn options(more: &[&str], source: &std::path::Path) -> Vec<std::ffi::OsString> {
    let mut options: Vec<_> = ["--id", "v"].iter().chain(more).map(Into::into).collect();
    options.extend(volume(source, "/data", "rw"));
    options
}

case!("volume_ttl_says_how_long_names_are_kept", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    let backing = stage.mkdir("vol");
    let mode = |path: &std::path::Path| fs::metadata(path).map(|m| m.mode() & 0o777).ok();
    let set = |mode| fs::set_permissions(backing.join("f"), fs::Permissions::from_mode(mode)).expect("chmod");
    stage.write("vol/f", "x");
    for (ttl, late) in [("0", false), ("3600", true)] {
        set(0o600);
        let rootfs = stage.mount(&image, "rootfs", options(&["--volume-ttl", ttl], &backing));
        let file = rootfs.join("data/f");
        assert_eq!(mode(&file), Some(0o600));
        set(0o640);
        assert_eq!(mode(&file) == Some(0o600), late, "{ttl} s: a mode changed on the host");
        // What was not there is asked for each time, whatever is said of names.
        assert_eq!(mode(&rootfs.join("data/later")), None);
        stage.write("vol/later", "");
        assert!(mode(&rootfs.join("data/later")).is_some(), "{ttl} s: made on the host");
        fs::remove_file(backing.join("later")).expect("unlink");
        assert_eq!(mode(&rootfs.join("data/later")).is_some(), late, "{ttl} s: removed on the host");
        // From inside to the host there is no delay.
        fs::write(rootfs.join("data/inside"), "now").expect("write");
        assert_eq!(fs::read_to_string(backing.join("inside")).expect("read"), "now");
        stage.unmount(&rootfs);
    }
    for wrong in ["-1", "x", "1e9", "nan"] {
        let call = stage.mount_call(&image, "rootfs", [format!("--volume-ttl={wrong}")]);
        call.run().fails(2, &["--volume-ttl", "seconds"]);
    }
});

case!("writeback_gathers_writes_until_close_or_sync", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    let backing = stage.mkdir("vol");
    let requests = |kind: &str| {
        let stats = stage.fsprov(["stats", "--json", "v"]).run().ok().json();
        stats["worker"]["requests"][kind].as_u64().unwrap_or(0)
    };
    let mut counts = Vec::new();
    for more in [&[][..], &["--writeback"]] {
        let rootfs = stage.mount(&image, "rootfs", options(more, &backing));
        let path = rootfs.join("data/f");
        let mut file = fs::File::create(&path).expect("create");
        for n in 0..500 {
            file.write_all(format!("line {n:4}\n").as_bytes()).expect("write");
        }
        // What is gathered is data too: cp would copy a hole.
        let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0));
        assert_eq!(data, Ok(0), "{more:?}");
        rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).expect("seek");
        file.sync_all().expect("fsync");
        let text = fs::read_to_string(backing.join("f")).expect("read");
        assert_eq!((text.len(), text.lines().last()), (5000, Some("line  499")), "after fsync");
        drop(file);
        // For writing alone: the kernel must read around what it gathers.
        let mut file = fs::OpenOptions::new().append(true).open(&path).expect("open");
        file.write_all(b"appended\n").expect("write");
        drop(file);
        let text = fs::read_to_string(backing.join("f")).expect("read");
        assert_eq!((text.len(), text.lines().last()), (5009, Some("appended")), "after close");
        // setuid goes with the first write by another than root, gathered or not.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).expect("chmod");
        if !rustix::process::geteuid().is_root() {
            fs::OpenOptions::new().append(true).open(&path).expect("open").write_all(b"x").expect("write");
            assert_eq!(fs::metadata(backing.join("f")).expect("stat").mode() & 0o6000, 0, "{more:?}");
        }
        let mut seen = String::new();
        fs::File::open(&path).expect("open").read_to_string(&mut seen).expect("read");
        assert_eq!(seen, fs::read_to_string(backing.join("f")).expect("read"));
        counts.push(requests("write"));
        stage.unmount(&rootfs);
        fs::remove_file(backing.join("f")).expect("unlink");
    }
    assert!(counts[0] > 500 && counts[1] < 50, "requests to write, without and with --writeback: {counts:?}");
});

// Root's FUSE mount is for everybody, and the kernel checks permissions: it must know the ACLs of the files below.
case!(
    "acls_of_the_backing_decide",
    |lane| ["fuse-root", "bind-root"].contains(&lane.name),
    &[Need::TestUser, Need::Tool("setfacl"), Need::Tool("getfacl")],
    |stage: &Stage| {
        let image = stage.small_image();
        let backing = stage.mkdir("vol");
        let user = test_user().expect("the test user");
        let rootfs = stage.mount(&image, "rootfs", volume(&backing, "/data", "rw"));
        let data = rootfs.join("data");
        let as_user = |script: &str| {
            let call =
                stage.tool("setpriv", ["--reuid", &user.uid, "--regid", &user.gid, "--clear-groups", "sh", "-c"]);
            call.arg(script).cwd(&data).run()
        };
        for name in ["closed", "given", "masked", "denied"] {
            fs::write(data.join(name), "secret").expect("write");
        }
        let acl = |acl: &str, name: &str| {
            stage.tool("setfacl", ["-m", acl]).arg(data.join(name)).run().ok();
        };
        for name in ["closed", "given", "masked"] {
            fs::set_permissions(data.join(name), fs::Permissions::from_mode(0o600)).expect("chmod");
        }
        acl(&format!("u:{}:rw", user.name), "given");
        acl(&format!("u:{}:rw,m::r", user.name), "masked");
        // Everybody but one: mode bits alone would let that one in.
        fs::set_permissions(data.join("denied"), fs::Permissions::from_mode(0o644)).expect("chmod");
        acl(&format!("u:{}:---", user.name), "denied");
        as_user("cat given && echo more >>given && cat masked").ok();
        for refused in ["cat closed", "echo more >>masked", "cat denied", "setfacl -b given"] {
            assert_ne!(as_user(refused).code(), Some(0), "{refused}");
        }
        let inside = stage.tool("getfacl", ["-cn", "given"]).cwd(&data).run().ok().out();
        let outside = stage.tool("getfacl", ["-cn", "given"]).cwd(&backing).run().ok().out();
        assert!(inside == outside && inside.contains(&format!("user:{}:rw-", user.uid)), "{inside}\n{outside}");
        // A default ACL decides in the place of the umask.
        fs::create_dir(data.join("dir")).expect("mkdir");
        acl(&format!("d:u:{}:rwx,d:g::rwx,d:o::---", user.name), "dir");
        fs::write(data.join("dir/made"), "").expect("write");
        fs::write(backing.join("dir/plain"), "").expect("write");
        let acls = ["made", "plain"]
            .map(|name| stage.tool("getfacl", ["-cn"]).arg(backing.join("dir").join(name)).run().ok().out());
        assert!(acls[0].contains(&format!("user:{}:rw", user.uid)) && acls[0].contains("mask::rw-"), "{}", acls[0]);
        assert_eq!(acls[0], acls[1], "made through the mount and on the host");
        // chmod and the mask are one.
        fs::set_permissions(data.join("given"), fs::Permissions::from_mode(0o640)).expect("chmod");
        as_user("cat given").ok();
        assert_ne!(as_user("echo more >>given").code(), Some(0), "the mask is r-- now");
    },
);
