//! Everyday use: what somebody does in the first hour, and what they get wrong.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::common::harness::{case, on};
use crate::common::stage::Call;
use crate::common::{Enter, Lane, Need, Stage, needs, system};

// The README's first session: the work directory does not exist yet.
case!("a_missing_sandbox_is_made_and_said", on::once_each, |stage: &Stage| {
    let image = stage.small_image();
    let mount = |args: &[&str]| {
        let call = stage.fsprov(["mount", "--id", "one"]).args(args).arg(&image).arg("rootfs");
        // The mode does not depend on the caller's umask.
        let line = format!("umask 077; exec {}", super::in_shell(&call.command));
        stage.tool("sh", ["-c", &line]).run()
    };
    let said = mount(&["--sandbox", "new/work", "-v", "data:/data"]).ok();
    let sandbox = stage.path("new/work");
    assert!(said.err().contains(&format!("made the sandbox {}", sandbox.display())), "{}", said.describe());
    for dir in ["new", "new/work"] {
        let mode = fs::metadata(stage.path(dir)).expect("it was made").permissions().mode();
        assert_eq!(mode & 0o7777, 0o755, "{dir}");
    }
    fs::write(stage.path("rootfs/data/file"), "written").expect("write to the volume");
    assert_eq!(fs::read_to_string(sandbox.join("data/file")).expect("read"), "written");
    stage.fsprov(["unmount", "./rootfs"]).run().ok();
    assert!(sandbox.join("data/file").exists(), "the sandbox stays");
    // The second time there is nothing to say.
    let said = mount(&["--sandbox", "new/work", "-v", "data:/data"]).ok();
    assert_eq!(needs::without_fallbacks(&said.err()), "", "{}", said.describe());
    stage.fsprov(["unmount", "./rootfs"]).run().ok();
    stage.write("file", "");
    mount(&["--sandbox", "file", "-v", "data:/data"]).fails(2, &["file", "--sandbox takes a directory"]);
    stage.assert_nothing_left("after a refused sandbox");
});

// `-v .:/src`, as podman has it.
case!("volumes_relative_to_the_current_directory", on::once_each, |stage: &Stage| {
    let image = stage.small_image();
    let here = stage.mkdir("project/sub");
    stage.mkdir("home/p");
    stage.write("project/sub/name", "sub");
    stage.write("project/name", "project");
    stage.write("home/p/name", "home");
    for (source, name) in [(".", "sub"), ("./", "sub"), ("..", "project"), ("../sub", "sub"), ("~/p", "home")] {
        let volume = format!("{source}:/data");
        let rootfs = stage.path("rootfs");
        stage.fsprov(["mount", "-v", &volume]).arg(&image).arg(&rootfs).cwd(&here).run().ok();
        assert_eq!(fs::read_to_string(rootfs.join("data/name")).expect("read"), name, "{source}");
        fs::write(rootfs.join("data/new"), source).expect("it is writable");
        stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run().ok();
    }
    let refused = [
        ("./missing:/data", 3, &["project/sub/missing", "create it first"][..]),
        ("bare:/data", 2, &["--sandbox DIR", "./bare"]),
        ("/tmp:/data,ro", 2, &["write /tmp:/data:ro"]),
    ];
    for (volume, code, texts) in refused {
        stage.fsprov(["mount", "-v", volume]).arg(&image).arg("rootfs").cwd(&here).run().fails(code, texts);
    }
    stage.assert_nothing_left("after refused volumes");
});

// A container of this user maps one id, its own, to root: what is root's in the image must be root's there.
case!(
    "an_ordinary_user_has_roots_files_as_their_own",
    |lane: &Lane| on::fuse(lane) && lane.enter == Enter::User,
    &[Need::UserNamespaces, Need::Tool("unshare")],
    |stage: &Stage| {
        let tree = stage.mkdir("tree/etc");
        stage.write("tree/etc/roots", "");
        stage.write("tree/etc/daemons", "");
        let tar = |args: &[&str]| stage.tool("tar", args).cwd(stage.path("tree")).run().ok();
        tar(&["--owner=0", "--group=0", "-cf", "../image.tar", "--exclude=./etc/daemons", "."]);
        tar(&["--owner=1", "--group=1", "-rf", "../image.tar", "./etc/daemons"]);
        stage.fsprov(["image", "import", "image.tar", "--name", "tar"]).run().ok();
        stage.fsprov(["image", "import", "tree", "--name", "mine"]).run().ok();
        let uid = rustix::process::getuid().as_raw();
        let subordinate = fs::read_to_string("/etc/subuid").unwrap_or_default();
        let first =
            subordinate.lines().find_map(|line| line.strip_prefix("fsprov-test:")?.split(':').next()?.parse().ok());
        let owners = |image: &str, args: &[&str]| {
            let rootfs = stage.mount(image, "rootfs", args.iter().copied());
            let owner = |name: &str| {
                let on_host = fs::metadata(rootfs.join(name)).map(|m| m.uid()).ok();
                let inside = stage.tool("unshare", ["-r", "stat", "-c", "%u"]).arg(rootfs.join(name)).run().ok().out();
                (on_host, inside.trim().to_owned())
            };
            let found = (owner("etc/roots"), owner("etc/daemons"));
            stage.unmount("rootfs");
            found
        };
        let (roots, daemons) = owners("tar", &[]);
        assert_eq!(roots, (Some(uid), "0".into()));
        assert_eq!(daemons, (Some(first.unwrap_or(65_534)), "65534".into()), "the first of the user's subordinate ids");
        let nobody = "65534".to_owned();
        assert_eq!(owners("tar", &["--uid-map", "none"]), ((Some(0), nobody.clone()), (Some(1), nobody)));
        // What the user unpacked is the user's already.
        assert_eq!(owners("mine", &[]), ((Some(uid), "0".into()), (Some(uid), "0".into())));
        let tree = tree.parent().and_then(Path::to_str).expect("a name");
        assert_eq!(owners(tree, &[]), ((Some(uid), "0".into()), (Some(uid), "0".into())));
    },
);

// Names come and go one by one; the image goes with the last.
case!("image_names_are_given_and_taken_one_by_one", on::user, |stage: &Stage| {
    let image = |args: &[&str]| stage.fsprov(["image"].iter().chain(args).copied()).run();
    let rows = || {
        let said = image(&["list"]).ok().out();
        let row = |line: &str| line.split_whitespace().take(3).map(str::to_owned).collect::<Vec<_>>();
        said.lines().skip(1).map(row).collect::<Vec<_>>()
    };
    stage.small_image();
    image(&["import", "image", "--name", "one"]).ok();
    image(&["tag", "one", "two", "three"]).ok();
    let id = rows()[0][2].clone();
    assert_eq!(id.len(), 12, "short: {id}");
    let row = |name: &str| vec![name.to_owned(), "-".to_owned(), id.clone()];
    assert_eq!(rows(), [row("one"), row("three"), row("two")]);
    assert_eq!(image(&["list", "-q"]).ok().out(), format!("{id}\n"));
    let said = image(&["rm", "two"]).ok();
    assert!(said.out().contains("removed the name two"), "{}", said.describe());
    // One that is not there does not keep the others from going.
    let said = image(&["rm", "nothing", "three"]).fails(1, &["nothing", "1 of 2 failed"]);
    assert!(said.out().contains("removed the name three"), "{}", said.describe());
    image(&["rm", "nothing"]).fails(3, &["nothing"]);
    image(&["rm", "--force", "nothing"]).ok();
    assert_eq!(rows(), [row("one")]);
    fs::create_dir(stage.path("other")).expect("mkdir");
    image(&["import", "other", "--name", "other"]).ok();
    image(&["tag", "other", "one"]).fails(1, &["one", "--replace"]);
    image(&["tag", "other", "./x"]).fails(2, &["./x"]);
    image(&["tag", "other", "again"]).ok();
    let said = image(&["rm", "--force", "again"]).ok();
    assert!(
        said.out().contains("removed again other") || said.out().contains("removed other again"),
        "{}",
        said.describe()
    );
    image(&["tag", "one", "last"]).ok();
    image(&["rm", &id]).ok();
    assert!(rows().is_empty(), "by its id the image goes with all names");
});

case!("ids_of_rootfses_may_be_shortened", on::once_each, |stage: &Stage| {
    let image = stage.small_image();
    for id in ["web", "web.v2", "webster", "other7"] {
        stage.fsprov(["mount", "--id", id]).arg(&image).arg(stage.path(id)).run().ok();
    }
    let id = |text: &str| stage.fsprov(["inspect", "--json", text]).run().ok().json()["id"].as_str().map(str::to_owned);
    assert_eq!(id("othe").as_deref(), Some("other7"));
    assert_eq!(id("web").as_deref(), Some("web"), "a whole id goes before the beginnings of others");
    stage.fsprov(["inspect", "webs"]).run().ok();
    stage.fsprov(["inspect", "web."]).run().ok();
    stage.fsprov(["inspect", "ot"]).run().fails(3, &["ot"]);
    stage.fsprov(["mount", "--id", "other8"]).arg(&image).arg(stage.path("r8")).run().ok();
    stage.fsprov(["unmount", "other"]).run().fails(2, &["other7, other8"]);
    let ids = stage.fsprov(["list", "-q"]).run().ok().out();
    assert_eq!(ids, "web\nweb.v2\nwebster\nother7\nother8\n");
    // What goes along is said, and nothing else goes.
    let said = stage.fsprov(["unmount", "web"]).run().ok();
    assert!(said.out().contains("(id web), and web.v2, which is nested in it"), "{}", said.describe());
    let said = stage.fsprov(["unmount", "nothing", "webster", "other7"]).run().fails(1, &["nothing", "1 of 3 failed"]);
    assert_eq!(said.out().lines().count(), 2, "{}", said.describe());
    stage.fsprov(["unmount", "-a", "-l"]).run().ok();
    assert_eq!(stage.fsprov(["list", "-q"]).run().ok().out(), "");
});

// An import without root leaves an empty file where the image has a device; the copy must not take it for damage, nor keep it.
case!(
    "an_image_with_devices_is_copied_without_privilege",
    |lane: &Lane| on::copy(lane) && lane.enter == Enter::User,
    |stage: &Stage| {
        import_with_device(stage);
        // Closed to others: then the image's devices are not left out from the start.
        let closed = stage.mkdir("closed");
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).expect("chmod");
        for place in ["closed/rootfs", "rootfs"] {
            let rootfs = stage.mount("devices", place, None::<&str>);
            assert!(rootfs.join("etc").is_dir(), "{place}");
            assert!(!rootfs.join("null").exists(), "{place}: an empty file is no device");
            stage.unmount(place);
        }
    },
);

/// A tar with /null, a character device.
fn import_with_device(stage: &Stage) {
    let mut tar = tar::Builder::new(fs::File::create(stage.path("devices.tar")).expect("make the tar"));
    for (name, kind) in [("etc", tar::EntryType::Directory), ("null", tar::EntryType::Char)] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_device_major(1).expect("major");
        header.set_device_minor(3).expect("minor");
        tar.append_data(&mut header, name, std::io::empty()).expect("append");
    }
    tar.finish().expect("end of the tar");
    stage.fsprov(["image", "import", "devices.tar", "--name", "devices"]).run().ok();
}

case!("an_image_for_another_platform_is_refused", on::user, |stage: &Stage| {
    import_with_device(stage);
    stage.fsprov(["image", "export", "--format", "oci", "devices", "layout"]).run().ok();
    let host = if cfg!(target_arch = "aarch64") { "linux/arm64" } else { "linux/amd64" };
    for (platform, code) in [(host, 0), ("linux/s390x", 3), ("windows/amd64", 3)] {
        let said = stage.fsprov(["image", "import", "layout", "--name", "oci", "--platform", platform]).run();
        if code == 0 {
            said.ok()
        } else {
            said.fails(code, &[platform, "this image is for linux/", "--platform"])
        };
    }
});

case!("a_configuration_named_and_missing_is_an_error", on::user, |stage: &Stage| {
    let list = |config: &str| stage.fsprov(["list"]).env("FSPROV_CONFIG", config).run();
    list("/nope").fails(3, &["/nope", "FSPROV_CONFIG"]);
    list("").ok();
    stage.write("config.toml", "");
    list("config.toml").ok();
});

case!("an_export_to_minus_is_standard_output", on::user, |stage: &Stage| {
    import_with_device(stage);
    let said = stage.fsprov(["image", "export", "--format", "tar", "devices", "-"]).run().ok();
    assert!(!stage.path("-").exists(), "a file of that name was made");
    let names: Vec<_> = tar::Archive::new(&said.stdout[..])
        .entries()
        .expect("a tar")
        .map(|entry| entry.expect("an entry").path().expect("a path").display().to_string())
        .collect();
    assert!(names.iter().any(|name| name.trim_end_matches('/').ends_with("null")), "{names:?}");
    stage.fsprov(["image", "export", "--format", "oci", "devices", "-"]).run().fails(2, &["directory"]);
    let said = stage.fsprov(["image", "export", "devices", "out.aci"]).run().ok();
    assert!(said.out().starts_with("exported devices to out.aci ("), "{}", said.describe());
});

case!("what_is_let_pass_is_told_once", on::user, |stage: &Stage| {
    stage.mkdir("image/rootfs");
    let manifest =
        r#"{"acKind":"ImageManifest","acVersion":"0.8.11","name":"a/b","labels":[{"name":"os","value":"plan10"}]}"#;
    stage.write("image/manifest", manifest);
    stage.tool("tar", ["-cf", "bad.aci", "-C", "image", "manifest", "rootfs"]).run().ok();
    let said = stage.fsprov(["image", "import", "--lenient", "bad.aci"]).run().ok();
    assert_eq!(said.err().matches("plan10").count(), 1, "{}", said.describe());
});

// What importers and downloads left behind counts as what it takes.
case!("gc_counts_what_it_takes_away", on::user, |stage: &Stage| {
    stage.fsprov(["image", "list"]).run().ok();
    stage.mkdir("state/staging/boot-import-dead");
    stage.write("state/staging/boot-import-dead/big", vec![1; 3 << 20]);
    let said = stage.fsprov(["image", "gc", "--json"]).run().ok().json();
    assert_eq!(said["staging"], 1);
    assert!(said["bytes"].as_u64() >= Some(3 << 20), "{said}");
    let said = stage.fsprov(["image", "verify"]).run().ok();
    assert!(said.out().contains("verified 0 images"), "{}", said.describe());
});

// Ctrl-C while a rootfs is made: nothing is left, and the same command works again.
case!(
    "ctrl_c_undoes_and_says_so",
    |lane: &Lane| lane.backend == "copy" || lane.backend == "fuse",
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = stage.small_image();
        let call = stage.mount_call(&image, "rootfs", ["--sandbox", "work"]);
        let said =
            interrupted(stage, call.env("FAILPOINTS", "provision.opened=sleep(20000)"), || !stage.records().is_empty());
        assert!(said.contains("interrupted") && said.contains("nothing of it is left"), "{said}");
        assert!(!stage.path("rootfs").exists(), "{said}");
        stage.assert_nothing_left("after Ctrl-C");
        stage.mount(&image, "rootfs", None::<&str>);
        stage.unmount("rootfs");
    },
);

// An export to a directory is taken back, too.
case!("ctrl_c_leaves_nothing_of_an_export", on::user, &[Need::Failpoints], |stage: &Stage| {
    stage.fsprov(["image", "import", "--name", "small"]).arg(stage.small_image()).run().ok();
    stage.mkdir("out");
    let half_made = || {
        let names = fs::read_dir(stage.path("out")).expect("list").flatten().map(|entry| entry.file_name());
        names.map(|name| name.to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let call = stage.fsprov(["image", "export", "--format", "oci", "small", "out/layout"]);
    let said = interrupted(stage, call.env("FAILPOINTS", "store.export=sleep(300)"), || !half_made().is_empty());
    assert!(said.contains("interrupted; nothing of it is left"), "{said}");
    assert_eq!(half_made(), [""; 0]);
    stage.fsprov(["image", "export", "--format", "oci", "small", "out/layout"]).run().ok();
    assert_eq!(half_made(), ["layout"]);
});

/// Run it, end it by SIGTERM once `is_begun`, and give what it said: it ends with 130.
fn interrupted(stage: &Stage, mut call: Call<'_>, is_begun: impl Fn() -> bool) -> String {
    let mut child = call.command.stderr(Stdio::piped()).spawn().expect("start");
    assert!(system::eventually(Duration::from_secs(30), is_begun), "it was not begun");
    stage.tool("kill", ["-TERM", &child.id().to_string()]).run().ok();
    let started = Instant::now();
    assert_eq!(child.wait().expect("wait").code(), Some(130));
    assert!(started.elapsed() < Duration::from_secs(10), "it waited for the work to end");
    std::io::read_to_string(child.stderr.take().expect("a pipe")).expect("read")
}

// What is taken back is what this command made: a rootfs that has the id already stays.
case!(
    "ctrl_c_leaves_a_rootfs_that_was_there",
    |lane: &Lane| lane.backend == "copy" || lane.backend == "fuse",
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = stage.small_image();
        let archive = stage.path("image.aci");
        stage.fsprov(["image", "import", "--name", "small"]).arg(&image).run().ok();
        stage.fsprov(["image", "export", "--format", "aci", "small"]).arg(&archive).run().ok();
        stage.fsprov(["image", "rm", "small"]).run().ok();
        let rootfs = stage.mount(&image, "rootfs", ["--id", "one"]);
        let mut call =
            stage.mount_call(&archive, "other", ["--id", "one"]).env("FAILPOINTS", "store.unpack=sleep(20000)");
        let mut second = call.command.stderr(Stdio::null()).spawn().expect("start");
        let staging = stage.state().join("staging");
        assert!(system::eventually(Duration::from_secs(30), || {
            fs::read_dir(&staging).is_ok_and(|mut entries| entries.next().is_some())
        }));
        stage.tool("kill", ["-TERM", &second.id().to_string()]).run().ok();
        assert_eq!(second.wait().expect("wait").code(), Some(130));
        assert_eq!(super::destroy::health(stage), "ready");
        assert!(rootfs.join("etc/hosts").exists());
        stage.unmount("rootfs");
        stage.assert_nothing_left("after Ctrl-C and unmount");
    },
);

// A bar is wiped out before the line that says what was done: that stood behind it.
case!("a_bar_is_gone_before_what_is_said", on::copy, &[Need::Failpoints, Need::Tool("script")], |stage: &Stage| {
    let image = stage.small_image();
    let command = stage.mount_call(&image, "rootfs", None::<&str>).command;
    let call = stage.tool("script", ["-qefc", &super::in_shell(&command), "/dev/null"]).env("TERM", "xterm");
    let said = call.env("FAILPOINTS", "copy.move=sleep(3000)").run().ok().out();
    let (before, _) = said.split_once("mounted ").expect("it says so");
    let (_, after_bar) = before.rsplit_once("copying").expect("a bar");
    assert!(after_bar.ends_with("\r\u{1b}[2K"), "{said:?}");
    stage.unmount("rootfs");
});

// The verbs of podman and docker, and no verb at all.
case!("words_of_other_tools_get_a_hint", on::user, |stage: &Stage| {
    for (words, hint) in [
        (&["pull", "debian:12"][..], "fsprov image pull"),
        (&["ps"], "fsprov list"),
        (&["exec", "x", "sh"], "fsprov run -it"),
        (&["import", "x.tar"], "fsprov image import"),
        (&["images"], "fsprov image list"),
        (&["rmi", "x"], "fsprov image rm"),
    ] {
        stage.fsprov(words.iter().copied()).run().fails(2, &[words[0], "no such command", hint]);
    }
    stage.fsprov(["umount", "-a"]).run().ok();
    let said = stage.fsprov::<[&str; 0], _>([]).run().ok();
    assert!(said.out().lines().count() < 12 && said.out().contains("fsprov mount"), "{}", said.describe());
});

// A mount point with something in it: a project that would vanish from sight.
case!("a_mount_point_that_is_not_empty_is_refused", on::read_only, |stage: &Stage| {
    let image = stage.small_image();
    let full = stage.mkdir("full");
    stage.write("full/work", "mine");
    let refused = stage.mount_call(&image, "full", None::<&str>).run();
    refused.fails(1, &["full: the directory is not empty", "--over"]);
    stage.assert_nothing_left("after a refused mount point");
    assert_eq!(fs::read_to_string(full.join("work")).expect("read"), "mine");
    stage.mount(&image, "full", ["--over"]);
    // A second one on it is told what is there, not that it is not empty.
    stage.mount_call(&image, "full", None::<&str>).run().fails(4, &["already", "fsprov unmount"]);
    stage.unmount("full");
    assert_eq!(fs::read_to_string(full.join("work")).expect("read"), "mine");
    stage.mkdir("empty");
    stage.mount(&image, "empty", None::<&str>);
    stage.unmount("empty");
});
