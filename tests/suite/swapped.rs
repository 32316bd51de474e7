//! What another user owns is another thing the next moment: the program is stopped at a step, a directory or file in its way is
//! exchanged, and it goes on. Nothing outside may be changed, shown or mounted on.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::volumes::volume;
use crate::common::harness::case;
use crate::common::run::Outcome;
use crate::common::stage::Call;
use crate::common::walk::{Picture, assert_same, picture};
use crate::common::{Enter, Lane, Need, Stage, system};

/// Who owns the sandbox here: nobody's id, and not root's.
pub(crate) const OWNER: u32 = 61_234;

/// Root's own, beside the sandbox. `private` is for root alone.
pub(crate) struct Secret {
    pub(crate) dir: PathBuf,
    before: Picture,
    changed: Vec<(PathBuf, i64, i64)>,
}

impl Secret {
    /// With directories and files of these names in it, whatever is looked for.
    pub(crate) fn new(stage: &Stage, names: &[&str]) -> Self {
        let dir = stage.mkdir("secret");
        stage.write("secret/private", "root's own");
        for name in names {
            let path = dir.join(name);
            if name.ends_with('/') {
                fs::create_dir_all(&path).expect("mkdir");
                fs::write(path.join("private"), "root's own").expect("write");
            } else {
                fs::write(&path, "root's own").expect("write");
                crate::common::images::chmod(&path, 0o600);
            }
        }
        let before = picture(&dir);
        let changed = changes(&dir);
        Secret { dir, before, changed }
    }

    /// Nothing in it was made, removed or changed, not even back again; and nothing is mounted on it or shows it.
    #[track_caller]
    pub(crate) fn assert_untouched(&self, when: &str) {
        assert_same(&self.before, &picture(&self.dir), &format!("{when}: root's directory"));
        assert_eq!(changes(&self.dir), self.changed, "{when}: something in root's directory was changed");
        let on_it = system::mounts_below(&self.dir);
        assert!(on_it.is_empty(), "{when}: mounted on root's directory: {on_it:#?}");
        let own = self.dir.file_name().expect("it has a name").to_string_lossy().into_owned();
        let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let shown =
            table.lines().find(|line| line.split(' ').nth(3).is_some_and(|root| root.split('/').any(|n| n == own)));
        assert!(shown.is_none(), "{when}: a mount shows root's directory: {shown:?}");
    }
}

/// Path and change time of everything below `dir`.
fn changes(dir: &Path) -> Vec<(PathBuf, i64, i64)> {
    let mut all = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let meta = fs::symlink_metadata(&path).expect("stat");
        if meta.is_dir() {
            waiting.extend(fs::read_dir(&path).expect("list").flatten().map(|entry| entry.path()));
        }
        all.push((path, meta.ctime(), meta.ctime_nsec()));
    }
    all.sort();
    all
}

/// Run `call` with the step `point` stopped at (the first time it is passed, by the program or a server that it starts), do
/// `meanwhile`, and let it go on. `false`: it never came there.
pub(crate) fn stopped_at(call: Call<'_>, fault: &str, meanwhile: impl FnOnce()) -> (bool, Outcome) {
    let mut meanwhile = Some(meanwhile);
    let outcome = call.env("FAILPOINTS", fault).run_beside(|| {
        let Some(stopped) = system::descendants_of(system::my_pid()).into_iter().find(|p| p.state == 'T') else {
            return;
        };
        if let Some(meanwhile) = meanwhile.take() {
            meanwhile();
        }
        system::go_on(stopped.pid);
    });
    (meanwhile.is_none(), outcome)
}

/// The same, and it must come there.
#[track_caller]
fn swap_at(call: Call<'_>, point: &str, meanwhile: impl FnOnce()) -> Outcome {
    let (came, outcome) = stopped_at(call, &format!("{point}=1*return(stop)"), meanwhile);
    assert!(came, "it never came to {point}: {}", outcome.describe());
    outcome
}

/// `path` becomes a symlink to `to`; what it was is beside it.
fn replace_by_link(path: &Path, to: &Path) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".old");
    fs::rename(path, aside).expect("rename");
    symlink(to, path).expect("symlink");
}

fn root(lane: &Lane) -> bool {
    lane.enter == Enter::Root && !lane.backend.is_empty()
}

/// `--sandbox DIR` that belongs to another user.
fn others_sandbox(stage: &Stage) -> (PathBuf, [OsString; 2]) {
    let dir = stage.mkdir("sandbox");
    chown(&dir, Some(OWNER), Some(OWNER)).expect("chown");
    (dir.clone(), ["--sandbox".into(), dir.into_os_string()])
}

fn own(path: &Path) {
    chown(path, Some(OWNER), Some(OWNER)).expect("chown");
}

// The mode that the image has at the target goes onto the source that was made, and onto nothing that lies there by then.
case!("a_mode_from_the_image_lands_on_the_source_that_was_made", root, &[Need::Failpoints], |stage: &Stage| {
    let image = stage.small_image();
    let secret = Secret::new(stage, &["key"]);
    let (dir, sandbox) = others_sandbox(stage);
    let options = [&sandbox[..], &volume("tmp", "/tmp", "rw")].concat();
    let call = stage.mount_call(&image, "rootfs", options);
    let outcome = swap_at(call, "open.made", || replace_by_link(&dir.join("tmp"), &secret.dir.join("key")));
    secret.assert_untouched("a new source replaced by a symlink");
    let made = fs::symlink_metadata(dir.join("tmp.old")).expect("stat");
    assert_eq!((made.uid(), made.gid()), (OWNER, OWNER), "a source below a sandbox is its owner's");
    if outcome.code() == Some(0) {
        assert_eq!(made.mode() & 0o7777, 0o1777, "as open as the image's /tmp");
        stage.unmount("rootfs");
    }
    // Where nobody interferes: the image's mode without what makes programs of others run as its owner.
    crate::common::images::chmod(&image.join("data"), 0o6770);
    let options = [&sandbox[..], &volume("data", "/data", "rw")].concat();
    stage.mount(&image, "rootfs", options);
    let made = fs::symlink_metadata(dir.join("data")).expect("stat");
    assert_eq!((made.mode() & 0o7777, made.uid()), (0o770, OWNER));
},);

// No race is needed where a path is kept and used again: days later it leads elsewhere.
case!("recover_mounts_nothing_that_was_put_in_the_way_since", root, |stage: &Stage| {
    let image = stage.mkdir("images/one");
    crate::common::images::make_small_tree(&image);
    let secret = Secret::new(stage, &["b/", "one/", "point/"]);
    let (dir, sandbox) = others_sandbox(stage);
    stage.mkdir("sandbox/a/b");
    stage.mkdir("mounts/point");
    for (what, says) in [("sandbox/a", "volume /data"), ("mounts", "mount point"), ("images", "layer")] {
        for other in ["a symlink", "another directory"] {
            let when = format!("{what} became {other}");
            let options = [&["--id".into(), "one".into()], &sandbox[..], &volume("a/b", "/data", "rw")].concat();
            let rootfs = stage.mount(&image, "mounts/point", options);
            take_away(stage, &rootfs);
            let (path, aside) = (stage.path(what), stage.path("aside"));
            fs::rename(&path, &aside).expect("rename");
            if other == "a symlink" {
                symlink(&secret.dir, &path).expect("symlink");
            } else {
                match what {
                    "images" => drop(stage.tool("cp", ["-a"]).args([&aside, &path]).run().ok()),
                    "mounts" => fs::create_dir_all(path.join("point")).expect("mkdir"),
                    _ => fs::create_dir_all(path.join("b")).expect("mkdir"),
                }
            }
            let outcome = stage.fsprov(["recover"]).run();
            secret.assert_untouched(&when);
            let mounted = system::mounts_below(&stage.dir);
            // A copy does not go back to its image.
            if stage.lane.backend == "copy" && what == "images" {
                outcome.ok();
            } else {
                assert!(mounted.is_empty(), "{when}: {mounted:#?}");
                // One line says which it was.
                outcome.fails_saying(&[says, path.to_str().expect("UTF-8")]);
            }
            stage.servers().iter().for_each(|server| system::kill(server.pid));
            fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path)).expect("remove");
            fs::rename(&aside, &path).expect("rename back");
            // Nothing was lost by it: what is as it was comes back.
            stage.fsprov(["recover"]).run().ok();
            assert!(rootfs.join("etc/hosts").exists() && rootfs.join("data").exists(), "{when}");
            stage.fsprov(["unmount", "one"]).run().ok();
        }
    }
    assert!(dir.join("a/b").is_dir());
});

/// As a crash does it: its servers are dead, or it is unmounted.
fn take_away(stage: &Stage, rootfs: &Path) {
    for server in stage.servers() {
        system::kill(server.pid);
    }
    system::survivors(Duration::from_secs(3));
    let point = if stage.lane.backend == "copy" { rootfs.join("data") } else { rootfs.to_owned() };
    if !stage.lane.is_fuse() {
        stage.tool("umount", ["-R"]).arg(point).run().ok();
    }
}

// What a mount is made of was opened before this step, and is not looked for again.
case!("what_was_opened_is_mounted_whatever_its_path_leads_to_since", root, &[Need::Failpoints], |stage: &Stage| {
    let image = stage.mkdir("images/one");
    crate::common::images::make_small_tree(&image);
    let secret = Secret::new(stage, &["b/", "one/", "point/", "point/etc/", "one/etc/"]);
    let (_, sandbox) = others_sandbox(stage);
    stage.mkdir("sandbox/a/b");
    let point = match stage.lane.backend {
        "bind" => "bind.build",
        "overlay" => "overlay.build",
        "copy" => "copy.layers",
        _ => "fuse.spawn",
    };
    let points = if stage.lane.is_fuse() { vec![point, "fuse.build", "server.mount"] } else { vec![point] };
    for point in points {
        for what in ["sandbox/a", "mounts", "images"] {
            let when = format!("{what} at {point}");
            stage.mkdir("mounts/point");
            let options = [&["--id".into(), "one".into()], &sandbox[..], &volume("a/b", "/data", "rw")].concat();
            let call = stage.mount_call(&image, "mounts/point", options);
            let path = stage.path(what);
            let outcome = swap_at(call, point, || replace_by_link(&path, &secret.dir));
            secret.assert_untouched(&when);
            for rootfs in ["mounts/point", "mounts.old/point"].map(|p| stage.path(p)) {
                let inside = [rootfs.join("data/private"), rootfs.join("private")];
                let shown = inside.iter().find(|path| path.exists() && !path.starts_with(&secret.dir));
                let shown = shown.filter(|path| !fs::canonicalize(path).is_ok_and(|p| p.starts_with(&secret.dir)));
                assert!(shown.is_none(), "{when}: {shown:?} is root's: {}", outcome.describe());
            }
            stage.fsprov(["unmount", "--all"]).run().ok();
            let mut aside = path.clone().into_os_string();
            aside.push(".old");
            fs::remove_file(&path).expect("unlink");
            fs::rename(aside, &path).expect("rename back");
            stage.assert_nothing_left(&when);
            secret.assert_untouched(&when);
        }
    }
},);

// A single file that is filled from the image is made where nobody else can put something in its place.
case!(
    "a_filled_files_owner_and_mode_go_to_that_file",
    |lane| lane.name == "bind-root" || lane.name == "fuse-root",
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = stage.small_image();
        fs::write(image.join("etc/app.db"), vec![7; 3 << 20]).expect("write");
        crate::common::images::chmod(&image.join("etc/app.db"), 0o644);
        let secret = Secret::new(stage, &["key"]);
        let (dir, sandbox) = others_sandbox(stage);
        let options =
            [&["--id".into(), "one".into()], &sandbox[..], &volume("app.db", "/etc/app.db", "rw,copy")].concat();
        let call = stage.mount_call(&image, "rootfs", options);
        swap_at(call, "fill.attributes", || {
            for entry in fs::read_dir(&dir).expect("list").flatten() {
                replace_by_link(&entry.path(), &secret.dir.join("key"));
            }
        });
        secret.assert_untouched("a file being filled replaced by a symlink");
    },
);

// Likewise what the copy backend makes in a directory that is another user's.
case!(
    "a_copied_files_owner_and_mode_go_to_that_file",
    |lane| lane.name == "copy-root",
    &[Need::Failpoints],
    |stage: &Stage| {
        let secret = Secret::new(stage, &["key"]);
        let image = stage.mkdir("image");
        stage.mkdir("tree");
        stage.write("image/file", vec![7; 1 << 20]);
        crate::common::images::chmod(&image.join("file"), 0o644);
        // The second image has an index, by which attributes are set in a pass of their own.
        stage.write("tree/manifest", crate::common::images::manifest("example.com/one"));
        stage.tool("cp", ["-a"]).args([&image, &stage.path("tree/rootfs")]).run().ok();
        let indexed = super::store::pack(stage, &stage.path("tree"), "one.aci");
        for (source, point) in [(&image, "copy.file"), (&indexed, "copy.file"), (&indexed, "copy.index")] {
            let rootfs = stage.mkdir("rootfs");
            own(&rootfs);
            let call = stage.mount_call(source, "rootfs", ["--id", "one"]);
            swap_at(call, point, || {
                for entry in fs::read_dir(&rootfs).expect("list").flatten() {
                    replace_by_link(&entry.path(), &secret.dir.join("key"));
                }
            });
            secret.assert_untouched("a copied file replaced by a symlink");
            stage.fsprov(["unmount", "--all"]).run().ok();
            let _ = fs::remove_dir_all(&rootfs);
        }
    },
);

// What was mounted is unmounted wherever it lies by now.
case!("a_rootfs_whose_directory_was_renamed_is_unmounted", root, |stage: &Stage| {
    let image = stage.small_image();
    let vol = stage.mkdir("vol");
    for lazy in [false, true] {
        let options = [&["--id".into(), "one".into()][..], &volume(&vol, "/data", "rw")].concat();
        stage.mount(&image, "c1/rootfs", options);
        fs::rename(stage.path("c1"), stage.path("c1.x")).expect("rename");
        assert!(!system::mounts_below(&stage.path("c1.x")).is_empty());
        let seen = super::destroy::health(stage);
        let unmount = stage.fsprov(["unmount", "one"]);
        if lazy { unmount.arg("--lazy") } else { unmount }.run().ok();
        let left = system::mounts_below(&stage.dir);
        assert!(left.is_empty(), "unmount said done, and left {left:#?}");
        stage.assert_nothing_left("after unmounting a rootfs that was moved");
        // The files of a copy are looked for where they were put.
        assert_eq!(seen, if stage.lane.backend == "copy" { "gone" } else { "ready" }, "it is mounted and answers");
        let _ = fs::remove_dir_all(stage.path("c1.x"));
    }
});

// overlayfs's directories for changes are made in the one that was made for them.
case!(
    "directories_for_changes_are_made_in_the_one_that_was_made",
    |lane| lane.name == "overlay-root",
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = stage.small_image();
        let secret = Secret::new(stage, &[]);
        let (dir, sandbox) = others_sandbox(stage);
        let options = [&["--id".into(), "one".into(), "--writable".into()], &sandbox[..]].concat();
        let call = stage.mount_call(&image, "rootfs", options);
        swap_at(call, "overlay.upper", || replace_by_link(&dir.join(".fsprov-one"), &secret.dir));
        secret.assert_untouched("the directory for changes replaced by a symlink");
        stage.fsprov(["unmount", "--all"]).run();
        secret.assert_untouched("after unmount");
        let _ = fs::remove_dir_all(dir.join(".fsprov-one.old"));
    },
);

// Root whose HOME is another user's (sudo keeps it) does not do what that user's configuration says.
case!("root_does_not_follow_another_users_configuration", |lane| lane.name == "bind-root", |stage: &Stage| {
    let image = stage.small_image();
    let secret = Secret::new(stage, &[]);
    stage.mkdir("home/.config/fsprov");
    let file = stage.write(
        "home/.config/fsprov/config.toml",
        format!("volumes = [{:?}]\n", format!("{}:/data:rw", secret.dir.display())),
    );
    own(&file);
    let outcome = stage.mount_call(&image, "rootfs", ["--id", "one"]).run().ok();
    assert!(!stage.path("rootfs/data/private").exists(), "another user's configuration chose a volume");
    assert!(outcome.err().contains("config.toml"), "it says so: {}", outcome.describe());
    stage.unmount("rootfs");
    // One's own is followed.
    chown(&file, Some(0), Some(0)).expect("chown");
    stage.mount(&image, "rootfs", ["--id", "one"]);
    assert!(stage.path("rootfs/data/private").exists());
},);

// Likewise an image that is read from another user's directory.
case!(
    "an_image_is_read_from_the_directory_that_was_opened",
    |lane| lane.name == "bind-root",
    &[Need::Failpoints],
    |stage: &Stage| {
        let dir = stage.mkdir("theirs");
        stage.write("theirs/manifest", crate::common::images::manifest("example.com/one"));
        crate::common::images::make_small_tree(&dir.join("rootfs"));
        let secret = Secret::new(stage, &["manifest", "rootfs/"]);
        let call = stage.fsprov(["image", "import"]).arg(&dir);
        swap_at(call, "tarwrite.opened", || {
            replace_by_link(&dir.join("manifest"), &secret.dir.join("manifest"));
            replace_by_link(&dir.join("rootfs"), &secret.dir.join("rootfs"));
        })
        .ok();
        stage.mount("example.com/one", "rootfs", ["--id", "one"]);
        assert!(stage.path("rootfs/etc/hosts").exists() && !stage.path("rootfs/private").exists());
        secret.assert_untouched("an image's directory exchanged");
    },
);

// fusermount3 follows the path that it is given: what it mounted where that led meanwhile is taken away again.
case!(
    "what_fusermount3_mounted_elsewhere_is_taken_away",
    |lane| lane.name == "fuse-user",
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = stage.small_image();
        for (parent, kind) in [("a", "a symlink"), ("b", "another directory")] {
            let (dir, other) = (stage.mkdir(parent), stage.mkdir(format!("other-{parent}")));
            stage.mkdir(format!("{parent}/rootfs"));
            stage.mkdir(format!("other-{parent}/rootfs"));
            stage.write(format!("other-{parent}/rootfs/mine"), "seen");
            let call = stage.mount_call(&image, format!("{parent}/rootfs"), [] as [&str; 0]);
            let said = swap_at(call, "server.mount", || match parent {
                "a" => replace_by_link(&dir, &other),
                _ => {
                    fs::rename(&dir, stage.path("b.old")).expect("rename");
                    fs::rename(&other, &dir).expect("rename");
                }
            });
            said.fails(4, &["mount on", "rootfs", "its path was changed meanwhile"]);
            let left = system::mounts_below(&stage.dir);
            assert!(left.is_empty(), "{kind}: it stays mounted: {left:#?}");
            assert_eq!(
                fs::read_to_string(stage.path(format!("{parent}/rootfs/mine"))).expect("read"),
                "seen",
                "{kind}"
            );
            stage.assert_nothing_left(kind);
        }
    },
);
