//! The store: images come in by their content, are complete or absent, and never reach outside.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::cli::assert_shape;
use super::faults::steps_in;
use crate::common::harness::{case, on};
use crate::common::images::{Maker, make_full_tree, make_small_tree, manifest};
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Lane, Need, Stage, images, needs};

/// Pack `tree` (holding `manifest` and `rootfs`) with GNU tar, as other people's tools would.
#[track_caller]
pub(super) fn pack(stage: &Stage, tree: &Path, archive: &str) -> PathBuf {
    let path = stage.path(archive);
    stage
        .tool("tar", ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--format=posix", "--sort=name", "-C"])
        .arg(tree)
        .arg("-cf")
        .arg(&path)
        .arg("manifest")
        .arg("rootfs")
        .run()
        .ok();
    path
}

/// A directory with a manifest and a small root filesystem, ready to pack.
pub(super) fn small_aci_tree(stage: &Stage, name: &str) -> PathBuf {
    let tree = stage.mkdir(name);
    fs::write(tree.join("manifest"), manifest("example.com/small")).expect("write");
    make_small_tree(&tree.join("rootfs"));
    tree
}

#[track_caller]
fn sha512_id(stage: &Stage, path: &Path) -> String {
    let said = stage.tool("sha512sum", [path]).run().ok().out();
    format!("sha512-{}", said.split_whitespace().next().expect("a digest").trim_start_matches('\\'))
}

/// The images of the store, as `image list --json` shows them.
#[track_caller]
fn images(stage: &Stage) -> Vec<Value> {
    let said = stage.fsprov(["image", "list", "--json"]).run().ok().json();
    said.as_array().expect("image list --json is an array").clone()
}

#[track_caller]
fn import(stage: &Stage, path: &Path) -> Value {
    stage.fsprov(["image", "import", "--json"]).arg(path).run().ok().json()
}

case!(
    "one_image_one_id_whatever_the_compression",
    on::once_each,
    &[Need::Tool("gzip"), Need::Tool("xz"), Need::Tool("zstd"), Need::Tool("bzip2")],
    |stage: &Stage| {
        let tree = small_aci_tree(stage, "tree");
        let plain = pack(stage, &tree, "plain.aci");
        let id = sha512_id(stage, &plain);
        for (tool, name) in
            [("", "plain.aci"), ("gzip", "z.aci"), ("xz", "x.aci"), ("zstd", "s.aci"), ("bzip2", "b.aci")]
        {
            let path = stage.path(name);
            if !tool.is_empty() {
                fs::copy(&plain, stage.path("copy")).expect("copy");
                let said = stage.tool(tool, ["-c", "-f"]).arg(stage.path("copy")).run().ok();
                fs::write(&path, said.stdout).expect("write");
            }
            let imported = import(stage, &path);
            assert_eq!(imported["id"], Value::String(id.clone()), "{name}: {imported:#}");
            // Twice is once.
            import(stage, &path);
            assert_eq!(images(stage).len(), 1, "{name}");
            stage.fsprov(["image", "rm", &id]).run().ok();
            assert_eq!(images(stage).len(), 0, "{name}");
        }
        stage.assert_nothing_left("after imports");
        let left = fs::read_dir(stage.state().join("images")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "image rm leaves nothing");
    },
);

// What is imported is what the archive held: compared with the tree that GNU tar packed.
case!("an_imported_image_shows_the_same_tree", on::every_backend, |stage: &Stage| {
    let tree = stage.mkdir("tree");
    fs::write(tree.join("manifest"), manifest("example.com/full")).expect("write");
    // Where devices cannot be closed to the unpacker it makes none.
    let devices = stage.lane.is_real_root() && needs::has_mount_calls();
    make_full_tree(&tree.join("rootfs"), if devices { Maker::RealRoot } else { Maker::Anyone });
    // tar does not pack sockets, nor (as an ordinary user) what its caller may not read.
    let fix = |name: &str| tree.join("rootfs/usr").join(name);
    fs::remove_file(fix("socket")).expect("unlink");
    if stage.lane.enter == Enter::User {
        for (name, mode) in [("closed", 0o400), ("d311", 0o711), ("d644", 0o744)] {
            images::chmod(&fix(name), mode);
        }
    }
    let archive = pack(stage, &tree, "full.aci");
    let want = picture(&tree.join("rootfs"));
    let imported = import(stage, &archive);
    let id = imported["id"].as_str().expect("an id").to_owned();
    // By name, by id, by a prefix of the id.
    for reference in ["example.com/full", &id, &id[..19]] {
        // A copy that others reach is without setuid programs and devices.
        let options: &[&str] = if stage.lane.backend == "copy" { &["--suid"] } else { &[] };
        let rootfs = stage.mount(reference, "rootfs", options);
        assert_same(&want, &picture(&rootfs), reference);
        stage.unmount(&rootfs);
    }
});

// A root filesystem as mmdebstrap, `docker export` and others pack it: no manifest, its own top.
case!("a_tar_of_a_root_filesystem_by_itself_is_taken_under_a_name", on::every_backend, |stage: &Stage| {
    let tree = stage.mkdir("bare");
    make_small_tree(&tree);
    images::chmod(&tree, 0o751);
    fs::hard_link(tree.join("etc/passwd"), tree.join("etc/passwd-")).expect("link");
    let archive = stage.path("bare.tar");
    stage
        .tool("tar", ["--numeric-owner", "--format=posix", "--sort=name", "-C"])
        .arg(&tree)
        .arg("-cf")
        .arg(&archive)
        .arg(".")
        .run()
        .ok();
    stage.fsprov(["image", "import"]).arg(&archive).run().fails(1, &["bin", "--name"]);
    let id = sha512_id(stage, &archive);
    let named = ["image", "import", "--json", "--name", "example.com/bare"];
    let imported = stage.fsprov(named).arg(&archive).run().ok().json();
    assert_eq!(imported["id"], Value::String(id), "its id is the digest of the tar as it is");
    let rootfs = stage.mount("example.com/bare", "rootfs", [] as [&str; 0]);
    assert_same(&picture(&tree), &picture(&rootfs), "the tree that was packed");
    stage.unmount(&rootfs);
    stage.fsprov(["image", "verify"]).run().ok();
});

// An ordinary user cannot set owners or make devices on the disk; the index keeps them, and FUSE shows them.
case!(
    "an_ordinary_users_import_shows_true_owners_and_devices",
    |lane: &Lane| lane.backend == "fuse" && lane.enter == Enter::User,
    |stage: &Stage| {
        use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
        let archive = stage.path("owners.aci");
        let mut tar = Tar::new();
        tar.file("manifest", manifest("example.com/owners").as_bytes());
        tar.dir("rootfs");
        for dir in ["rootfs/dev", "rootfs/etc", "rootfs/usr"] {
            tar.dir(dir);
        }
        tar.entry(
            b"rootfs/dev/null",
            tar::EntryType::Char,
            |h| {
                h.set_device_major(1).expect("major");
                h.set_device_minor(3).expect("minor");
                h.set_mode(0o666);
            },
            b"",
        );
        tar.entry(b"rootfs/usr/su", tar::EntryType::Regular, |h| h.set_mode(0o4755), b"su");
        tar.entry(
            b"rootfs/etc/shadow",
            tar::EntryType::Regular,
            |h| {
                h.set_mode(0o640);
                h.set_uid(0);
                h.set_gid(42);
            },
            b"secret",
        );
        tar.write(&archive);
        import(stage, &archive);
        let rootfs = stage.mount("example.com/owners", "rootfs", ["--uid-map", "none"]);
        let meta = |name: &str| fs::symlink_metadata(rootfs.join(name)).expect("stat");
        let null = meta("dev/null");
        assert!(null.file_type().is_char_device(), "{null:?}");
        assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
        assert_eq!(meta("usr/su").mode() & 0o7777, 0o4755);
        let shadow = meta("etc/shadow");
        assert_eq!((shadow.uid(), shadow.gid(), shadow.mode() & 0o7777), (0, 42, 0o640));
        stage.unmount(&rootfs);
    },
);

case!("directories_as_images", on::every_backend, |stage: &Stage| {
    // A plain directory, imported: a copy, which does not change with it.
    let plain = stage.path("plain");
    make_small_tree(&plain);
    stage.fsprov(["image", "import", "--name", "example.com/plain"]).arg(&plain).run().ok();
    let want = picture(&plain);
    fs::write(plain.join("etc/hosts"), "changed after the import").expect("write");
    let rootfs = stage.mount("example.com/plain", "rootfs", [] as [&str; 0]);
    assert_same(&want, &picture(&rootfs), "an imported directory");
    stage.unmount(&rootfs);
    // A directory as Mesos keeps images, in place.
    let mesos = small_aci_tree(stage, "mesos");
    let want = picture(&mesos.join("rootfs"));
    let rootfs = stage.mount(&mesos, "rootfs", [] as [&str; 0]);
    assert_same(&want, &picture(&rootfs), "a directory with manifest and rootfs");
    stage.unmount(&rootfs);
    // An archive named on the command line is imported on the way.
    let archive = pack(stage, &mesos, "direct.aci");
    let rootfs = stage.mount(&archive, "rootfs", [] as [&str; 0]);
    assert_same(&want, &picture(&rootfs), "an .aci by its path");
    stage.unmount(&rootfs);
});

case!("an_image_in_use_is_not_removed", on::every_backend, |stage: &Stage| {
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let id = import(stage, &archive)["id"].as_str().expect("an id").to_owned();
    let rootfs = stage.mount("example.com/small", "rootfs", ["--id", "user"]);
    for which in [&*id, "example.com/small"] {
        stage.fsprov(["image", "rm", which]).run().fails(4, &["user"]);
    }
    assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n");
    stage.unmount(&rootfs);
    stage.fsprov(["image", "rm", "example.com/small"]).run().ok();
    stage.fsprov(["image", "rm", "example.com/small"]).run().fails(3, &["example.com/small"]);
    stage.mount_call("example.com/small", "rootfs", [] as [&str; 0]).run().fails(3, &["example.com/small"]);
});

case!("image_list_and_show", on::once_each, |stage: &Stage| {
    assert_eq!(stage.fsprov(["image", "list"]).run().ok().out(), "");
    assert!(images(stage).is_empty());
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let id = sha512_id(stage, &archive);
    let said = stage.fsprov(["image", "import"]).arg(&archive).run().ok();
    assert!(said.out().contains(&id[..19]) && said.out().lines().count() == 1, "{}", said.describe());
    stage.fsprov(["image", "import", "--name", "mine"]).arg(&archive).run().ok();
    for reference in ["example.com/small", "mine", &id, &id[..19]] {
        let shown = stage.fsprov(["image", "show", "--json", reference]).run().ok().json();
        assert_eq!(shown["id"], Value::String(id.clone()), "{reference}");
        let text = stage.fsprov(["image", "show", reference]).run().ok().out();
        assert!(text.contains(&id), "{text}");
    }
    let listed = stage.fsprov(["image", "list"]).run().ok().out();
    assert!(listed.contains("example.com/small") && listed.contains(&id[7..19]), "{listed}");
    stage.fsprov(["image", "show", "nothing"]).run().fails(3, &["nothing"]);
    let listed = images(stage);
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["id"], Value::String(id));
});

// Damage is found and named, set aside on request, and mended by importing again; what is exported is what was imported.
case!("verify_export_flatten_gc_and_du", on::once_each, |stage: &Stage| {
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let id = sha512_id(stage, &archive);
    stage.fsprov(["image", "import"]).arg(&archive).run().ok();
    assert_eq!(stage.fsprov(["image", "verify", "--json"]).run().ok().json(), serde_json::json!([]));

    let index = stage.fsprov(["image", "index", "example.com/small"]);
    if rustix::process::geteuid().is_root() {
        index.run().ok();
        assert_eq!(stage.fsprov(["image", "verify", "--json"]).run().ok().json(), serde_json::json!([]));
        // A changed byte is found after that too, and another index does not hide it.
        let file = stage.path("state/images").join(&id).join("rootfs/etc/hosts");
        let whole = fs::read(&file).expect("read");
        let time = fs::metadata(&file).and_then(|m| m.modified()).expect("its time");
        let mut damaged = whole.clone();
        damaged[0] ^= 1;
        fs::write(&file, damaged).expect("damage");
        stage.fsprov(["image", "index", "example.com/small"]).run().fails(1, &["etc/hosts", "--repair"]);
        assert!(stage.fsprov(["image", "verify"]).run().fails(1, &["2 damaged"]).out().contains("etc/hosts"));
        fs::write(&file, whole).expect("mend");
        File::options().write(true).open(&file).and_then(|f| f.set_modified(time)).expect("set its time");
        stage.fsprov(["image", "verify"]).run().ok();
    } else {
        index.run().fails(5, &["example.com/small", "import"]);
    }
    let exported = stage.path("again.aci");
    stage.fsprov(["image", "export", "example.com/small"]).arg(&exported).run().ok();
    stage.fsprov(["image", "export", "example.com/small"]).arg(&exported).run().fails(1, &["again.aci", "exists"]);
    let layout = stage.path("layout");
    stage.fsprov(["image", "export", "--format", "oci", "example.com/small"]).arg(&layout).run().ok();
    assert!(layout.join("index.json").is_file());
    stage.fsprov(["image", "import", "--name", "oci-small"]).arg(&layout).run().ok();
    // Of an image of layers the index is made of theirs, by anybody.
    let listed = images(stage);
    let listed = listed.iter().find(|image| image.to_string().contains("oci-small")).expect("it is listed");
    let oci = listed["id"].as_str().expect("an id");
    let file = stage.path("state/images").join(oci).join("index");
    let index = fs::read(&file).expect("read the index");
    fs::write(&file, &index[..5000]).expect("damage the index");
    stage.fsprov(["image", "index", "oci-small"]).run().ok();
    assert_eq!(fs::read(&file).expect("read the index"), index);
    let made =
        stage.fsprov(["image", "flatten", "--json", "--name", "example.com/flat", "oci-small"]).run().ok().json();
    assert_eq!(made["name"], "example.com/flat");
    assert_eq!(images(stage).len(), 3);
    let used = stage.fsprov(["image", "du", "--json"]).run().ok().json();
    assert!(used.as_array().is_some_and(|rows| rows.len() >= 3), "{used:#}");

    // Mounted, it is in use: gc takes the others alone.
    stage.fsprov(["mount", "--backend", "fuse", "example.com/flat", "rootfs"]).run().ok();
    stage.fsprov(["image", "gc", "--unused"]).run().ok();
    let left = images(stage);
    assert_eq!(left.len(), 1, "{left:#?}");
    assert_eq!(left[0]["id"], made["id"]);
    stage.fsprov(["unmount", "./rootfs"]).run().ok();

    stage.fsprov(["image", "import"]).arg(&archive).run().ok();
    let file = stage.path("state/images").join(&id).join("manifest");
    fs::write(&file, "{}").expect("damage the manifest");
    let found = stage.fsprov(["image", "verify"]).run().fails(1, &["1 damaged", "--repair"]);
    assert!(found.out().contains(&id[..19]) && found.out().contains("manifest"), "{}", found.describe());
    // From where it came, if that is still there; else it is set aside.
    fs::rename(&archive, stage.path("away")).expect("rename");
    let said = stage.fsprov(["image", "verify", "--repair"]).run().ok();
    assert!(said.out().contains("set aside"), "{}", said.describe());
    assert_eq!(images(stage).len(), 1, "set aside");
    fs::rename(stage.path("away"), &archive).expect("rename");
    stage.fsprov(["image", "import"]).arg(&archive).run().ok();
    stage.fsprov(["image", "verify"]).run().ok();
    assert_eq!(images(stage).len(), 2);
});

// The digest that the user expects is checked against the bytes that were read.
case!("a_wrong_expected_id_is_refused", on::once_each, |stage: &Stage| {
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let id = sha512_id(stage, &archive);
    let wrong = format!("sha512-{}", "0".repeat(128));
    stage.fsprov(["image", "import", "--expect", &wrong]).arg(&archive).run().fails(1, &[&wrong[..19], &id[..19]]);
    assert!(images(stage).is_empty());
    stage.assert_nothing_left("after a refused import");
    stage.fsprov(["image", "import", "--expect", "sha512-xyz"]).arg(&archive).run().fails_saying(&["sha512-xyz"]);
    stage.fsprov(["image", "import", "--expect", &id]).arg(&archive).run().ok();
    assert_eq!(images(stage).len(), 1);
});

/// An archive, byte by byte: what no tool would write.
struct Tar(Vec<u8>);

impl Tar {
    fn new() -> Self {
        Tar(Vec::new())
    }

    fn entry(&mut self, name: &[u8], kind: tar::EntryType, with: impl FnOnce(&mut tar::Header), content: &[u8]) {
        let mut header = tar::Header::new_gnu();
        // Straight into the field: the crate's own setter refuses `..` and absolute names.
        assert!(name.len() <= 100, "the name fits the field");
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_mtime(1);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(content.len() as u64);
        with(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name.as_bytes(), tar::EntryType::Regular, |_| {}, content);
    }

    fn dir(&mut self, name: &str) {
        self.entry(name.as_bytes(), tar::EntryType::Directory, |h| h.set_mode(0o755), b"");
    }

    fn link(&mut self, name: &str, kind: tar::EntryType, target: &str) {
        let set = |h: &mut tar::Header| h.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        self.entry(name.as_bytes(), kind, set, b"");
    }

    fn symlink(&mut self, name: &str, target: &str) {
        self.link(name, tar::EntryType::Symlink, target);
    }

    fn write(&self, path: &Path) {
        let mut bytes = self.0.clone();
        bytes.resize(bytes.len() + 1024, 0);
        fs::write(path, bytes).expect("write archive");
    }
}

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Not imported, whatever else.
    Refused,
    /// Imported or not: but nothing outside changes.
    Harmless,
}

type Hostile = (&'static str, Fate, fn(&mut Tar, outside: &str));

const HOSTILE: &[Hostile] = &[
    ("dotdot", Fate::Refused, |t, _| t.file("rootfs/../../../../../../../../tmp/fsprov-escape", b"x")),
    ("dotdot at the top", Fate::Refused, |t, _| t.file("../escape", b"x")),
    ("absolute", Fate::Refused, |t, _| t.file("/tmp/fsprov-escape", b"x")),
    ("symlink, then a file through it", Fate::Refused, |t, out| {
        t.symlink("rootfs/l", out);
        t.file("rootfs/l/escape", b"x");
    }),
    ("relative symlink, then a file through it", Fate::Refused, |t, out| {
        t.symlink("rootfs/l", &format!("../../../../../../../../../..{out}"));
        t.file("rootfs/l/escape", b"x");
    }),
    ("symlink, then a directory of its name", Fate::Harmless, |t, out| {
        t.symlink("rootfs/l", out);
        t.entry(b"rootfs/l", tar::EntryType::Directory, |h| h.set_mode(0o777), b"");
    }),
    ("symlink to a file, then a file of its name", Fate::Harmless, |t, out| {
        t.symlink("rootfs/l", &format!("{out}/victim"));
        t.file("rootfs/l", b"overwritten");
    }),
    ("the root as a symlink", Fate::Refused, |t, out| {
        t.symlink("rootfs", out);
        t.file("rootfs/escape", b"x");
    }),
    ("hard link to outside", Fate::Refused, |t, out| {
        t.link("rootfs/h", tar::EntryType::Link, &format!("{out}/victim"));
    }),
    ("hard link by dotdot", Fate::Refused, |t, _| {
        t.link("rootfs/h", tar::EntryType::Link, "rootfs/../../../../../../../../etc/passwd");
    }),
    ("hard link to the manifest", Fate::Refused, |t, _| t.link("rootfs/h", tar::EntryType::Link, "manifest")),
    ("hard link through a symlink, then written", Fate::Refused, |t, out| {
        t.symlink("rootfs/s", out);
        t.link("rootfs/h", tar::EntryType::Link, "rootfs/s/victim");
        t.file("rootfs/h", b"overwritten");
    }),
    ("hard link to a missing file", Fate::Refused, |t, _| t.link("rootfs/h", tar::EntryType::Link, "rootfs/missing")),
    ("duplicate", Fate::Refused, |t, _| {
        t.file("rootfs/a", b"1");
        t.file("rootfs/a", b"2");
    }),
    ("second manifest", Fate::Refused, |t, _| t.file("manifest", b"{}")),
    ("something else at the top", Fate::Refused, |t, _| t.file("extra", b"x")),
    ("file where a directory must be", Fate::Refused, |t, _| {
        t.file("rootfs/a", b"1");
        t.file("rootfs/a/b", b"2");
    }),
    ("size that is not there", Fate::Refused, |t, _| {
        t.entry(b"rootfs/a", tar::EntryType::Regular, |h| h.set_size(1 << 40), b"short");
    }),
    ("unknown entry type", Fate::Refused, |t, _| t.entry(b"rootfs/a", tar::EntryType::new(b'Z'), |_| {}, b"")),
    ("broken checksum", Fate::Refused, |t, _| {
        t.file("rootfs/a", b"1");
        let at = t.0.len() - 1024;
        t.0[at] ^= 1;
    }),
    ("malformed PAX", Fate::Refused, |t, _| {
        t.entry(b"pax", tar::EntryType::XHeader, |_| {}, b"99999999999999999999 path=x\n");
        t.file("rootfs/a", b"1");
    }),
    ("PAX path to outside", Fate::Refused, |t, _| {
        t.entry(b"pax", tar::EntryType::XHeader, |_| {}, b"25 path=rootfs/../../esc\n");
        t.file("rootfs/a", b"1");
    }),
    ("NUL in a PAX path", Fate::Refused, |t, _| {
        t.entry(b"pax", tar::EntryType::XHeader, |_| {}, b"18 path=rootfs/a\0\n");
        t.file("rootfs/a", b"1");
    }),
    ("device node", Fate::Harmless, |t, _| {
        t.entry(
            b"rootfs/null",
            tar::EntryType::Char,
            |h| {
                h.set_device_major(1).expect("major");
                h.set_device_minor(3).expect("minor");
            },
            b"",
        );
        // And a file of its name, whose content would go to the device if it were opened.
        t.entry(
            b"rootfs/zero",
            tar::EntryType::Block,
            |h| {
                h.set_device_major(259).expect("major");
                h.set_device_minor(0).expect("minor");
            },
            b"",
        );
    }),
    ("fifo of the same name as a file", Fate::Refused, |t, _| {
        t.entry(b"rootfs/f", tar::EntryType::Fifo, |_| {}, b"");
        t.file("rootfs/f", b"would block for ever");
    }),
];

case!("hostile_archives_reach_nothing_outside", on::once_each, |stage: &Stage| {
    let outside = stage.mkdir("outside");
    let victim = stage.write("outside/victim", "precious");
    images::chmod(&outside, 0o750);
    let before = picture(&outside);
    let escape = Path::new("/tmp/fsprov-escape");
    let _ = fs::remove_file(escape);
    for (name, fate, build) in HOSTILE {
        let mut tar = Tar::new();
        tar.file("manifest", manifest("example.com/hostile").as_bytes());
        if *name != "the root as a symlink" {
            tar.dir("rootfs");
        }
        build(&mut tar, &outside.to_string_lossy());
        let path = stage.path("hostile.aci");
        tar.write(&path);
        let said = stage.fsprov(["image", "import"]).arg(&path).run();
        match fate {
            Fate::Refused => drop(said.clone().fails(1, &["hostile.aci"])),
            Fate::Harmless => assert!(said.code().is_some_and(|c| c <= 1), "{name}: {}", said.describe()),
        }
        assert!(!said.err().contains("panicked"), "{name}: {}", said.describe());
        assert!(said.took.as_secs() < 10, "{name}: {}", said.describe());
        assert_same(&before, &picture(&outside), name);
        assert_eq!(fs::read(&victim).expect("read"), b"precious", "{name}");
        assert!(!escape.exists(), "{name}: {} was written", escape.display());
        stage.assert_nothing_left(name);
        if said.code() == Some(0) {
            stage.fsprov(["image", "rm", "example.com/hostile"]).run().ok();
        }
        assert!(images(stage).is_empty(), "{name}: a refused archive is in the store");
    }
});

type Broken = (&'static str, &'static str, fn(&mut Tar));

const BROKEN: &[Broken] = &[
    ("no manifest", "manifest", |t| t.dir("rootfs")),
    ("no rootfs", "rootfs", |t| t.file("manifest", manifest("example.com/x").as_bytes())),
    ("manifest is not JSON", "manifest", |t| {
        t.file("manifest", b"{ not json");
        t.dir("rootfs");
    }),
    ("wrong kind", "acKind", |t| {
        t.file("manifest", manifest("example.com/x").replace("ImageManifest", "PodManifest").as_bytes());
        t.dir("rootfs");
    }),
    ("wrong version", "acVersion", |t| {
        t.file("manifest", manifest("example.com/x").replace("0.8.11", "eight").as_bytes());
        t.dir("rootfs");
    }),
    ("bad name", "name", |t| {
        t.file("manifest", manifest("Example COM/../x").as_bytes());
        t.dir("rootfs");
    }),
    ("two labels of one name", "label", |t| {
        t.file("manifest", manifest("example.com/x").replace("\"os\"", "\"version\"").as_bytes());
        t.dir("rootfs");
    }),
    ("manifest is a directory", "manifest", |t| {
        t.dir("manifest");
        t.dir("rootfs");
    }),
    ("manifest is a symlink", "manifest", |t| {
        t.symlink("manifest", "/etc/passwd");
        t.dir("rootfs");
    }),
];

case!("broken_images_are_named", on::user, |stage: &Stage| {
    for (name, word, build) in BROKEN {
        let mut tar = Tar::new();
        build(&mut tar);
        tar.write(&stage.path("broken.aci"));
        let said = stage.fsprov(["image", "import", "broken.aci"]).run().fails(1, &["broken.aci"]);
        let text = said.err();
        assert!(text.contains(word), "{name}: the message should say {word}: {text}");
        stage.assert_nothing_left(name);
        assert!(images(stage).is_empty(), "{name}");
    }
    // Cut short, at every interesting place.
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "whole.aci");
    let whole = fs::read(&archive).expect("read");
    for keep in [0, 1, 511, 512, 600, 1024, whole.len() / 2, whole.len() / 2 + 100] {
        fs::write(stage.path("cut.aci"), &whole[..keep]).expect("write");
        stage.fsprov(["image", "import", "cut.aci"]).run().fails(1, &["cut.aci"]);
        stage.assert_nothing_left(&format!("after an archive cut to {keep} bytes"));
    }
    for tool in ["gzip", "xz", "zstd", "bzip2"] {
        if crate::common::needs::find_tool(tool).is_none() {
            continue;
        }
        let packed = stage.tool(tool, ["-c"]).arg(&archive).run().ok().stdout;
        fs::write(stage.path("cut.aci"), &packed[..packed.len() - packed.len() / 3]).expect("write");
        stage.fsprov(["image", "import", "cut.aci"]).run().fails(1, &["cut.aci"]);
        // Bytes changed in the middle: the compressor's own check must be heeded.
        let mut damaged = packed.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 0xff;
        fs::write(stage.path("cut.aci"), &damaged).expect("write");
        stage.fsprov(["image", "import", "cut.aci"]).run().fails(1, &["cut.aci"]);
        stage.assert_nothing_left(tool);
    }
    assert!(images(stage).is_empty());
});

// Names from outside may not become paths.
case!("names_never_become_paths", on::user, |stage: &Stage| {
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    for name in ["../x", "/abs", "./x", "a\nb", "", "."] {
        stage.fsprov(["image", "import", "--name", name]).arg(&archive).run().fails(2, &[]);
        assert!(images(stage).is_empty(), "{name:?}");
    }
    for verb in ["show", "rm"] {
        for name in ["../../etc", "sha512-../../x"] {
            let said = stage.fsprov(["image", verb, name]).run();
            assert!(matches!(said.code(), Some(2 | 3)), "{}", said.describe());
        }
    }
});

// Dies at each step of an import: the store is as before, and the next import works.
case!("import_fails_or_dies_at_each_step", on::once_each, &[Need::Failpoints], |stage: &Stage| {
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let import = || stage.fsprov(["image", "import"]).arg(&archive);
    let text = import().env("FSPROV_LOG", "fsprov::fault=trace").run().ok().err();
    let mut found = steps_in(&text);
    // One wall that cannot be raised does not fail an import: `apart` tries what the others do.
    found.retain(|step| !step.name.starts_with("walls."));
    assert!(found.len() >= 3, "an import passes {} steps", found.len());
    stage.fsprov(["image", "rm", "example.com/small"]).run().ok();
    for step in &found {
        import().env("FAILPOINTS", step.with("ENOSPC")).run().fails(1, &[&step.name]);
        stage.assert_nothing_left(&format!("after {step} failed"));
        assert!(images(stage).is_empty(), "{step}: there is an image");
        let died = import().env("FAILPOINTS", step.with("kill")).run();
        assert_eq!(died.code(), None, "{step}: {}", died.describe());
        // Complete or absent; what a dead import left in staging goes with the next.
        let there = images(stage).len();
        import().run().ok();
        assert_eq!(images(stage).len(), 1, "{step}: {there} before");
        stage.assert_nothing_left(&format!("after {step} died and an import followed"));
        let rootfs = stage.path("rootfs");
        let backend = if stage.lane.enter == Enter::Root { "bind" } else { "fuse" };
        stage.fsprov(["mount", "--backend", backend, "example.com/small"]).arg(&rootfs).run().ok();
        assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n", "{step}");
        stage.fsprov(["unmount".as_ref(), rootfs.as_os_str()]).run().ok();
        stage.fsprov(["image", "rm", "example.com/small"]).run().ok();
    }
});

// Several importers of one image: one copy, all succeed.
case!("importers_at_once_make_one_image", on::once_each, |stage: &Stage| {
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let children: Vec<_> = (0..4)
        .map(|i| {
            let said = fs::File::create(stage.path(format!("said-{i}"))).expect("create");
            let mut call = stage.fsprov(["image", "import"]).arg(&archive);
            call.command.stdout(std::process::Stdio::null()).stderr(said).spawn().expect("start")
        })
        .collect();
    for (i, mut child) in children.into_iter().enumerate() {
        let status = child.wait().expect("wait");
        assert!(status.success(), "{i}: {}", fs::read_to_string(stage.path(format!("said-{i}"))).unwrap_or_default());
    }
    assert_eq!(images(stage).len(), 1);
    stage.assert_nothing_left("after all imported");
});

// Odd names in an archive arrive as they are.
case!("odd_names_survive_the_import", on::every_backend, |stage: &Stage| {
    let tree = small_aci_tree(stage, "tree");
    let dir = tree.join("rootfs/odd");
    fs::create_dir(&dir).expect("mkdir");
    for name in images::odd_names() {
        fs::write(dir.join(&name), name.as_os_str().as_bytes()).expect("write");
        std::os::unix::fs::symlink(&name, dir.join("l").with_extension(format!("{}", name.as_os_str().len()))).ok();
    }
    let archive = pack(stage, &tree, "odd.aci");
    import(stage, &archive);
    let rootfs = stage.mount("example.com/small", "rootfs", [] as [&str; 0]);
    let want = picture(&tree.join("rootfs"));
    assert_same(&want, &picture(&rootfs), "odd names");
});

const IMPORTED: &str = "
    .id string
    .name string
    .on_disk string
    .outcome string
    .warnings[]
";

const LISTED: &str = "
    .bytes number
    .dependencies[]
    .entries number
    .id string
    .imported_at number
    .kind string
    .labels[][] string
    .layers[]
    .manifest_sha256 string
    .names[] string
    .on_disk string
    .origin.path string
    .source string
    .version number
";

const MANIFEST: &str = "
    .manifest.acKind string
    .manifest.acVersion string
    .manifest.labels[].name string
    .manifest.labels[].value string
    .manifest.name string
";

case!("image_json_keeps_its_shape", on::user, |stage: &Stage| {
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let imported = import(stage, &archive);
    assert_shape(&imported, IMPORTED, "image import --json");
    assert_shape(&images(stage)[0], LISTED, "image list --json");
    assert_shape(
        &stage.fsprov(["image", "show", "--json", "example.com/small"]).run().ok().json(),
        &format!("{LISTED}{MANIFEST}"),
        "image show --json",
    );
});
