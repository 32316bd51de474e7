//! What an agent does with many rootfses: nested ones, several verbs at once, mounts that leaked into other namespaces, writable ones.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::process::Stdio;
use std::time::Duration;

use super::destroy::{health, only};
use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::needs::{has_mount_calls, kernel};
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Lane, Need, Stage, system};

const NONE: [&str; 0] = [];

fn ids(stage: &Stage) -> Vec<String> {
    let all = stage.fsprov(["list", "--json"]).run().ok().json();
    let mut ids: Vec<String> =
        all.as_array().expect("array").iter().map(|r| r["id"].as_str().expect("id").into()).collect();
    ids.sort();
    ids
}

case!("nested_ones_go_with_their_parent_and_before_it", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let mount = |id: &str| stage.mount(&image, id, ["--id", id]);
    for id in ["a", "a.b", "a.b.c", "ab", "ab.x"] {
        mount(id);
    }
    if stage.lane.backend != "copy" {
        // The innermost is in use: nothing outside it goes.
        let mut user =
            std::process::Command::new("sleep").arg("60").current_dir(stage.path("a.b.c/etc")).spawn().expect("start");
        stage.fsprov(["unmount", "a"]).run().fails(4, &["a.b.c", &user.id().to_string()]);
        let _ = user.kill();
        let _ = user.wait();
        assert_eq!(ids(stage), ["a", "a.b", "a.b.c", "ab", "ab.x"]);
    }
    stage.fsprov(["unmount", "a"]).run().ok();
    assert_eq!(ids(stage), ["ab", "ab.x"], "and nobody of a name that only begins alike");
    for id in ["a", "a.b", "a.b.c"] {
        assert!(!stage.path(id).exists(), "{id}");
    }
    // An id may be nested in one that is not there; later it is.
    mount("a.b");
    mount("a");
    let said = stage.fsprov(["recover", "--json", "--keep", "ab.x"]).run().ok().json();
    let said: Vec<_> =
        said.as_array().expect("array").iter().map(|r| (r["id"].as_str(), r["outcome"].as_str())).collect();
    assert_eq!(
        said,
        [
            (Some("a"), Some("destroyed")),
            (Some("a.b"), Some("destroyed")),
            (Some("ab"), Some("kept")),
            (Some("ab.x"), Some("kept"))
        ],
        "who is kept keeps its parents"
    );
    stage.fsprov(["unmount", "--all"]).run().ok();
});

// A rootfs on a volume of another: which goes first is told by the paths, whatever the ids.
case!(
    "one_inside_another_is_recovered_in_order",
    |lane: &Lane| on::volumes(lane) && lane.enter != Enter::User,
    |stage: &Stage| {
        let image = stage.small_image();
        let vol = stage.mkdir("vol");
        stage.mount(&image, "outer", [vec!["--id".into(), "zz".into()], volume(&vol, "/data", "rw").into()].concat());
        stage.mount(&image, "outer/data/inner", ["--id", "aa"]);
        stage.mount(&image, "outer/data/inner2", ["--id", "zzz"]);
        stage.write("vol/kept", "kept");
        // Others' mounts in it are named, and it stays.
        stage.fsprov(["unmount", "zz"]).run().fails(4, &["outer/data/inner"]);
        assert!(stage.path("outer/data/inner/etc/hosts").exists());
        stage.fsprov(["recover", "--keep", "none"]).run().ok();
        stage.assert_nothing_left("after recovery");
        assert_eq!(fs::read_to_string(vol.join("kept")).expect("read"), "kept");
        assert!(!stage.path("outer").exists() && !vol.join("inner").exists(), "mount points that were made go");
    },
);

case!("unmount_waits_for_a_mount_in_flight", on::every_backend, &[Need::Failpoints], |stage: &Stage| {
    let image = stage.small_image();
    let mut stopped =
        stage.mount_call(&image, "rootfs", ["--id", "one"]).env("FAILPOINTS", "provision.ready=1*return(stop)");
    let mut mount = stopped.command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start");
    let its = |state: char| {
        let all = system::descendants_of(system::my_pid());
        all.into_iter().find(|p| p.state == state && p.pid == mount.id() as i32)
    };
    assert!(system::eventually(Duration::from_secs(30), || its('T').is_some()));
    assert_eq!(health(stage), "changing");
    // A second of the same id or place is refused at once, a nested one too; recover leaves it alone.
    stage.mount_call(&image, "rootfs", ["--id", "two"]).run().fails(4, &["one"]);
    stage.mount_call(&image, "other", ["--id", "one.child"]).run().fails(4, &["one"]);
    let said = stage.fsprov(["recover", "--json", "--keep", "another"]).run().ok().json();
    assert_eq!(said[0]["outcome"], "skipped", "{said}");
    let mut unmount = stage.fsprov(["unmount", "one"]).command.stdout(Stdio::null()).spawn().expect("start");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(unmount.try_wait().expect("wait"), None, "it did not wait");
    system::go_on(mount.id() as i32);
    assert!(mount.wait().expect("wait").success(), "it was complete before it was taken away");
    assert!(unmount.wait().expect("wait").success());
    stage.assert_nothing_left("after unmount");
    assert!(!stage.path("rootfs").exists() && !stage.path("other").exists());
});

// A namespace made while a rootfs was mounted has a copy of the mount: it must not keep us from taking ours away, nor lead a
// deletion into a volume.
case!("a_mount_leaked_into_another_namespace", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let existing = stage.mkdir("existing");
    for place in ["made", "existing"] {
        let options =
            if stage.lane.has_volumes() { volume(stage.mkdir("vol"), "/data", "rw").to_vec() } else { Vec::new() };
        let rootfs = stage.mount(&image, place, options);
        stage.write("vol-kept", "kept");
        let _ = fs::write(stage.path("vol/kept"), "kept");
        let how: &[&str] =
            if stage.lane.enter == Enter::User { &["--user", "--map-root-user", "--mount"] } else { &["--mount"] };
        let mut holder = std::process::Command::new("unshare")
            .args(how)
            .args(["sh", "-c", "echo ready; exec sleep 60"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start unshare");
        let mut word = [0_u8; 6];
        std::io::Read::read_exact(holder.stdout.as_mut().expect("piped"), &mut word).expect("it starts");
        let said = stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run().ok();
        assert!(said.took < Duration::from_secs(30), "{}", said.describe());
        assert!(system::mounts_below(&rootfs).is_empty(), "{place}");
        assert_eq!(stage.records(), Vec::<std::path::PathBuf>::new());
        if stage.lane.has_volumes() {
            assert_eq!(fs::read_to_string(stage.path("vol/kept")).expect("read"), "kept", "{place}");
        }
        let _ = holder.kill();
        let _ = holder.wait();
        stage.assert_nothing_left(&format!("after the other namespace ended ({place})"));
    }
    assert!(existing.is_dir() && !stage.path("made").exists());
});

case!("a_writable_one_keeps_the_image_as_it_is", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let before = picture(&image);
    let mut options: Vec<OsString> = vec!["--writable".into(), "--id".into(), "one".into()];
    options.extend(sandbox(stage));
    if !["overlay", "copy"].contains(&stage.lane.backend) {
        let why = if stage.lane.is_fuse() {
            ["fuse", "index", "import"]
        } else {
            ["bind", "a writable rootfs", "--backend fuse"]
        };
        stage.mount_call(&image, "rootfs", options).run().fails(5, &why);
        return stage.assert_nothing_left("after a refusal");
    }
    if stage.lane.has_volumes() {
        options.extend(volume("tmp", "/tmp", "rw"));
        options.extend(volume("lib", "/opt/made/up", "ro"));
    }
    for place in ["rootfs", "again"] {
        let rootfs = stage.mount(&image, place, options.clone());
        assert_eq!(
            fs::read_to_string(rootfs.join("etc/hosts")).expect("read"),
            "127.0.0.1 localhost\n",
            "as in the image"
        );
        fs::write(rootfs.join("etc/hosts"), "changed").expect("change");
        fs::write(rootfs.join("new"), vec![1_u8; 100_000]).expect("make");
        fs::remove_file(rootfs.join("bin/tool")).expect("remove");
        fs::rename(rootfs.join("home/u/notes"), rootfs.join("home/notes")).expect("rename");
        let names: Vec<_> = fs::read_dir(&rootfs).expect("read").flatten().map(|e| e.file_name()).collect();
        assert!(names.iter().any(|n| n == "new") && !names.iter().any(|n| n == ".fsprov-one"), "{names:?}");
        let top = |dir: &std::path::Path| std::os::unix::fs::MetadataExt::mode(&fs::metadata(dir).expect("stat"));
        assert_eq!(top(&rootfs), top(&image), "the top directory looks as in the image");
        if stage.lane.backend == "overlay" {
            let shown = only(stage);
            assert!(shown["changes"]["bytes"].as_u64().is_some_and(|b| (100_000..1_000_000).contains(&b)), "{shown}");
            assert!(shown["changes"]["files"].as_u64().is_some_and(|n| n >= 5), "{shown}");
            assert_eq!(shown["changes"]["path"], stage.path("sandbox/.fsprov-one").to_str().expect("text"));
            let text = stage.fsprov(["inspect", "one"]).run().ok().out();
            assert!(text.contains("changes") && text.contains("KiB"), "{text}");
        }
        if stage.lane.has_volumes() {
            fs::write(rootfs.join("tmp/kept"), "kept").expect("write");
        }
        stage.unmount(&rootfs);
        assert!(!stage.path("sandbox/.fsprov-one").exists(), "changes end with the rootfs");
        assert_eq!(stage.path("sandbox/tmp/kept").exists(), stage.lane.has_volumes());
    }
    stage.assert_nothing_left("after unmount");
    assert_same(&before, &picture(&image), "the image");
    if stage.lane.backend == "overlay" {
        // No sandbox: they lie with the record. Something of the name is there: refused. A tree too deep to delete by path: deleted.
        let rootfs = stage.mount(&image, "rootfs", ["--writable"]);
        let mut at = rustix::fs::open(&rootfs, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).expect("open");
        for _ in 0..1000 {
            rustix::fs::mkdirat(&at, "deep", rustix::fs::Mode::RWXU).expect("mkdir");
            at = rustix::fs::openat(&at, "deep", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).expect("open");
        }
        drop(at);
        stage.unmount(&rootfs);
        stage.mkdir("sandbox/.fsprov-one");
        stage.write("sandbox/.fsprov-one/theirs", "theirs");
        stage.mount_call(&image, "rootfs", options).run().fails_saying(&[".fsprov-one"]);
        assert!(stage.path("sandbox/.fsprov-one/theirs").exists());
        fs::remove_dir_all(stage.path("sandbox/.fsprov-one")).expect("remove");
    }
});

// `auto`: overlay where it can, and where nothing can each says why.
case!("auto_of_a_writable_one", on::once_each, |stage: &Stage| {
    let image = stage.small_image();
    let rootfs = stage.path("rootfs");
    let args = [OsStr::new("mount"), "--json".as_ref(), "--writable".as_ref(), image.as_os_str(), rootfs.as_os_str()];
    let said = stage.fsprov(args).run();
    if stage.lane.enter == Enter::User || !has_mount_calls() {
        said.fails(5, &["bind", "overlay", "fuse", "a writable rootfs", "import"]);
        return;
    }
    assert_eq!(said.ok().json()["backend"], "overlay");
    fs::write(rootfs.join("etc/hosts"), "changed").expect("write");
    stage.unmount(&rootfs);
});

// `auto` goes on where a backend that seemed to work fails while mounting: the image lies on as many overlays as the kernel allows, which
// `probe` cannot know.
case!(
    "auto_goes_on_when_mounting_fails",
    |lane| on::once_each(lane) && lane.enter == Enter::Root,
    &[Need::DevFuse, Need::MountCalls],
    |stage: &Stage| {
        let mut image = stage.small_image();
        for name in ["once", "twice"] {
            let (empty, at) = (stage.mkdir(format!("{name}-empty")), stage.mkdir(name));
            let options = format!("lowerdir={}:{}", image.display(), empty.display());
            stage.tool("mount", ["-t", "overlay", "-o", &options, "overlay"]).arg(&at).run().ok();
            image = at;
        }
        let rootfs = stage.path("rootfs");
        let mount = |words: &[&str]| {
            let [v, text] = volume(stage.mkdir("vol"), "/opt/new", "rw");
            let call = stage.fsprov(["--verbose", "mount", "--json"]).args(words).args([v, text]);
            call.arg(&image).arg(&rootfs).run()
        };
        mount(&["--backend", "overlay"]).fails_saying(&["make overlay of", "Invalid argument"]);
        let nothing_left = || assert!(stage.records().is_empty() && !rootfs.exists(), "{:?}", stage.records());
        nothing_left();
        let said = mount(&[]).ok();
        assert_eq!(said.json()["backend"], "fuse");
        assert!(said.err().contains("backend overlay: make overlay of"), "why not overlay: {}", said.describe());
        fs::write(rootfs.join("opt/new/x"), "x").expect("write to the volume");
        let inspected = stage.fsprov(["inspect", "--json"]).arg(&rootfs).run().ok().json();
        assert_eq!(inspected["backend"], "fuse", "{inspected:#}");
        stage.unmount(&rootfs);
        nothing_left();
        // None is left: each says why.
        let writable = stage.fsprov(["mount", "--writable"]).arg(&image).arg(&rootfs).run();
        writable.fails(5, &["the bind backend cannot make a writable rootfs", "overlay: make overlay of", "fuse: "]);
        nothing_left();
        for name in ["twice", "once"] {
            stage.tool("umount", [name]).run().ok();
        }
    },
);

/// An image of two layers, the upper one hiding and adding, in the store as `two`.
fn import_two_layers(stage: &Stage) {
    let layers = [("l0", ["etc/hosts", "etc/gone", "data/x"]), ("l1", ["etc/.wh.gone", "etc/hosts", "etc/new"])];
    let mut diff_ids = Vec::new();
    stage.mkdir("docker");
    for (name, files) in layers {
        for file in files {
            stage.mkdir(std::path::Path::new(name).join(file).parent().expect("parent"));
            stage.write(std::path::Path::new(name).join(file), name);
        }
        let tar = stage.path(format!("docker/{name}.tar"));
        stage
            .tool("tar", ["--owner=0", "--group=0", "-cf"])
            .arg(&tar)
            .arg("-C")
            .arg(stage.path(name))
            .arg(".")
            .run()
            .ok();
        let digest = <sha2::Sha256 as sha2::Digest>::digest(fs::read(&tar).expect("read"));
        diff_ids.push(format!("sha256:{}", data_encoding::HEXLOWER.encode(&digest)));
    }
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": {},
                                    "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let manifest =
        serde_json::json!([{"Config": "config.json", "RepoTags": ["two:latest"], "Layers": ["l0.tar", "l1.tar"]}]);
    stage.write("docker/config.json", config.to_string());
    stage.write("docker/manifest.json", manifest.to_string());
    let archive = stage.path("two.tar");
    let names = ["manifest.json", "config.json", "l0.tar", "l1.tar"];
    stage.tool("tar", ["-cf"]).arg(&archive).arg("-C").arg(stage.path("docker")).args(names).run().ok();
    stage.fsprov(["image", "import", "--name", "two"]).arg(&archive).run().ok();
}

// `auto` for an image of several layers; flattened it is one for bind. Every backend that takes it shows the same.
case!("auto_of_several_layers", |lane: &Lane| on::once_each(lane) || lane.name == "bind-userns", |stage: &Stage| {
    import_two_layers(stage);
    let rootfs = stage.path("rootfs");
    let mount = |image: &str, backend: &str| {
        let args = ["--verbose", "mount", "--json", "--backend", backend, image];
        stage.fsprov(args).arg(&rootfs).run()
    };
    let is_user = stage.lane.enter == Enter::User;
    // In a user namespace from Linux 5.11 on.
    let has_overlay = has_mount_calls() && (stage.lane.enter == Enter::Root || kernel() >= (5, 11));
    let auto = if is_user || !has_overlay { "fuse" } else { "overlay" };
    for (backend, want) in [("auto", auto), ("fuse", "fuse"), ("copy", "copy")] {
        let said = mount("two", backend).ok();
        assert_eq!(said.json()["backend"], want, "{}", said.describe());
        if backend == "auto" && !is_user {
            assert!(said.err().contains("multiple layers"), "why not bind: {}", said.describe());
        }
        for (name, content) in [("etc/hosts", "l1"), ("etc/new", "l1"), ("data/x", "l0")] {
            assert_eq!(fs::read_to_string(rootfs.join(name)).expect("read"), content, "{backend} {name}");
        }
        assert!(!rootfs.join("etc/gone").exists() && !rootfs.join("etc/.wh.gone").exists(), "{backend}");
        stage.unmount(&rootfs);
    }
    mount("two", "bind").fails(5, &[if is_user { "bind" } else { "multiple layers are not supported" }]);
    stage.fsprov(["image", "flatten", "--name", "one", "two"]).run().ok();
    let said = mount("one", "auto").ok();
    assert_eq!(said.json()["backend"], if is_user { "fuse" } else { "bind" }, "{}", said.describe());
    assert!(!rootfs.join("etc/gone").exists() && rootfs.join("etc/new").exists());
},);

const SOAK: &str = include_str!("../../scripts/soak");

// The short form; `scripts/soak` alone is the long one.
case!("soak_many_rounds_leave_nothing", on::once_each, &[Need::Tool("python3"), Need::MountCalls], |stage: &Stage| {
    let script = stage.write("soak", SOAK);
    let run = |args: &[&str]| {
        let call = stage.tool("python3", [&script]).env("FSPROV_BIN", crate::common::stage::program());
        call.args(args).run().ok()
    };
    let said = run(&["60"]);
    assert!(said.out().contains("nothing has grown"), "{}", said.describe());
    if stage.lane.enter == Enter::User {
        let said = run(&["--many", "20"]);
        assert!(said.out().contains("all ready, nothing left"), "{}", said.describe());
    }
},);

// Where the file system can share blocks a copy shares them.
case!(
    "a_copy_shares_blocks_where_it_can",
    |lane: &Lane| on::copy(lane) && lane.is_real_root(),
    &[Need::Tool("mkfs.xfs"), Need::Tool("losetup")],
    |stage: &Stage| {
        const BIG: usize = 48 << 20;
        let (disk, at) = (stage.path("disk"), stage.mkdir("xfs"));
        fs::File::create(&disk).and_then(|f| f.set_len(512 << 20)).expect("make a disk");
        stage.tool("mkfs.xfs", ["-q", "-m", "reflink=1"]).arg(&disk).run().ok();
        stage.tool("mount", ["-o", "loop"]).arg(&disk).arg(&at).run().ok();
        fs::create_dir_all(at.join("image/etc")).expect("mkdir");
        fs::write(at.join("image/etc/hosts"), "h").expect("write");
        let big = crate::common::images::noise(BIG, 7);
        fs::write(at.join("image/big"), &big).expect("write");
        let used = || {
            rustix::fs::sync();
            let stat = rustix::fs::statvfs(&at).expect("statvfs");
            (stat.f_blocks - stat.f_bfree) * stat.f_frsize
        };
        let before = used();
        let rootfs = stage.mount(at.join("image"), "xfs/rootfs", NONE);
        let grown = used().saturating_sub(before);
        assert!(fs::read(rootfs.join("big")).expect("read") == big);
        assert!(grown < BIG as u64 / 4, "a shared copy of {BIG} bytes took {grown}");
        stage.unmount(&rootfs);
        stage.tool("umount", [&at]).run().ok();
    },
);
