//! Layers that hide what lies below them: one tree, whatever the backend, whoever imported them and whoever mounts them.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;

use super::registry::{AsUser, root_once};
use crate::common::harness::{case, on};
use crate::common::needs::has_mount_calls;
use crate::common::oci::{Image, digest};
use crate::common::walk::{Picture, assert_same, from_lines, picture};
use crate::common::{Enter, Lane, Need, Stage};

const BOTTOM: &[&str] = &[
    "a/",
    "a/old",
    "a/sub/",
    "a/sub/x",
    "b/",
    "b/gone",
    "b/keep",
    "b/.wh.void",
    "d/",
    "d/low",
    "d/deep/",
    "d/deep/low",
    "to-file/",
    "to-file/x",
    "to-dir",
    ".wh.nothing",
];
const MIDDLE: &[&str] = &[
    "a/",
    "a/.wh..wh..opq",
    "a/new",
    "a/sub/",
    "a/sub/y",
    "b/",
    "b/.wh.gone",
    "b/.wh.never",
    ".wh.d",
    "d/",
    "d/up",
    "d/deep/",
    "to-file",
    "to-dir/",
    "to-dir/in",
    "fresh/",
    "fresh/.wh.ghost",
    "fresh/f",
];
const TOP: &[&str] =
    &["a/", "a/sub/", "a/sub/z", "b/", "b/gone=back", "b/.wh.keep", "bare/", "bare/.wh..wh..opq", "bare/.wh.x"];
const ALL_ANEW: &[&str] = &[".wh..wh..opq", "only"];

struct Sample {
    name: &'static str,
    layers: &'static [&'static [&'static str]],
    /// What it shows: `DIRECTORY/`, `FILE` (with its path in it) or `FILE=CONTENT`.
    shows: &'static [&'static str],
}

/// They share layers: one that is the lowest here is not there.
const SAMPLES: &[Sample] = &[
    Sample {
        name: "many",
        layers: &[BOTTOM, MIDDLE, TOP],
        shows: &[
            "a/",
            "a/new",
            "a/sub/",
            "a/sub/y",
            "a/sub/z",
            "b/",
            "b/gone=back",
            "bare/",
            "d/",
            "d/deep/",
            "d/up",
            "fresh/",
            "fresh/f",
            "to-dir/",
            "to-dir/in",
            "to-file",
        ],
    },
    Sample {
        name: "lowest",
        layers: &[BOTTOM],
        shows: &[
            "a/",
            "a/old",
            "a/sub/",
            "a/sub/x",
            "b/",
            "b/gone",
            "b/keep",
            "d/",
            "d/low",
            "d/deep/",
            "d/deep/low",
            "to-file/",
            "to-file/x",
            "to-dir",
        ],
    },
    Sample {
        name: "middle",
        layers: &[MIDDLE],
        shows: &[
            "a/",
            "a/new",
            "a/sub/",
            "a/sub/y",
            "b/",
            "d/",
            "d/up",
            "d/deep/",
            "to-file",
            "to-dir/",
            "to-dir/in",
            "fresh/",
            "fresh/f",
        ],
    },
    Sample { name: "anew", layers: &[BOTTOM, ALL_ANEW], shows: &["only"] },
];

fn split(entry: &str) -> (&str, &str) {
    entry.split_once('=').unwrap_or((entry, entry))
}

fn layer(entries: &[&str]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let (path, content) = split(entry);
        let is_dir = path.ends_with('/');
        let content = if is_dir || path.contains(".wh.") { "" } else { content };
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(if is_dir { tar::EntryType::Directory } else { tar::EntryType::Regular });
        header.set_size(content.len() as u64);
        // Open to all: in a user namespace the root of the host's files is somebody else.
        header.set_mode(if is_dir { 0o755 } else { 0o644 });
        header.set_uid(5);
        header.set_gid(6);
        header.set_mtime(1_500_000_000);
        tar.append_data(&mut header, path, content.as_bytes()).expect("tar");
    }
    tar.into_inner().expect("tar")
}

fn layout(stage: &Stage, sample: &Sample) -> PathBuf {
    let tars: Vec<Vec<u8>> = sample.layers.iter().map(|entries| layer(entries)).collect();
    let dir = stage.path(format!("layout-{}", sample.name));
    Image::of(&tars, "amd64").layout(&dir, "v1");
    dir
}

fn import(stage: &Stage) {
    for sample in SAMPLES {
        let import = ["image", "import", "--platform", "linux/amd64", "--name", sample.name];
        stage.fsprov(import).arg(layout(stage, sample)).run().ok();
    }
}

/// Names, kinds and contents alone.
fn shape(of: &Picture) -> Picture {
    const DIGEST: usize = 24;
    let kept = |word: &&str| word.len() == 1 || word.len() == DIGEST || word.starts_with("size=");
    let line = |line: &String| match line.chars().nth(1) {
        Some(' ') => line.split(' ').filter(kept).collect::<Vec<_>>().join(" "),
        _ => line.clone(),
    };
    below_root(of.iter().map(|(path, what)| (path.clone(), line(what))).collect())
}

/// No layer says anything of the root itself.
fn below_root(mut of: Picture) -> Picture {
    of.remove(&b""[..]);
    of
}

fn expected(sample: &Sample) -> Picture {
    let line = |entry: &&str| {
        let (path, content) = split(entry);
        match path.strip_suffix('/') {
            Some(dir) => (dir.as_bytes().to_vec(), "d".to_owned()),
            None => {
                let hash = digest(content.as_bytes());
                let hash = &hash["sha256:".len()..][..24];
                (path.as_bytes().to_vec(), format!("f size={} {hash}", content.len()))
            }
        }
    };
    sample.shows.iter().map(line).collect()
}

#[track_caller]
fn check(stage: &Stage, when: &str) {
    for sample in SAMPLES {
        let want = expected(sample);
        let what = format!("{} {when}", sample.name);
        // Bind refuses, and what `auto` takes shows the same.
        let backend = if stage.lane.backend == "bind" { "auto" } else { stage.lane.backend };
        if backend == "auto" {
            let refused = stage.mount_call(sample.name, "rootfs", [""; 0]).run();
            assert_eq!(refused.code(), Some(5), "{what}: {}", refused.describe());
            let why = if sample.layers.len() > 1 { "multiple layers" } else { "has whiteouts" };
            assert!(refused.err().contains(why), "{what}: {}", refused.err());
        }
        let seen = |backend: &str| {
            let rootfs = stage.path("rootfs");
            // A copy leaves setuid bits out unless it is told otherwise; an ordinary user's FUSE mount refuses to be told so.
            let options: &[&str] = if backend == "copy" { &["--suid"] } else { &[] };
            stage.fsprov(["mount", "--backend", backend]).args(options).arg(sample.name).arg(&rootfs).run().ok();
            let seen = picture(&rootfs);
            stage.unmount("rootfs");
            seen
        };
        let got = seen(backend);
        assert_same(&want, &shape(&got), &what);
        if stage.lane.is_real_root() && !stage.lane.is_fuse() {
            assert_same(&below_root(seen("fuse")), &below_root(got), &format!("{what}, as fuse shows it"));
        }
    }
}

/// The stores that were made before: opaque directories had one attribute, whichever the importer could set, and a directory that
/// came with a whiteout of its own name had none.
fn as_imported_before(state: &Path, from: &str, to: &str) {
    for layer in fs::read_dir(state.join("layers")).expect("list layers").flatten() {
        for name in [".", "a", "bare", "d"] {
            let dir = layer.path().join("rootfs").join(name);
            if rustix::fs::removexattr(&dir, from).is_ok() && name != "d" {
                rustix::fs::setxattr(&dir, to, b"y", XattrFlags::empty()).expect("setxattr");
            }
        }
    }
}

case!("whiteouts_hide_the_same_whatever_the_backend", on::every_backend, &[Need::DevFuse], |stage: &Stage| {
    import(stage);
    check(stage, "as imported");
    stage.fsprov(["image", "verify"]).run().ok();
    if stage.lane.enter == Enter::Root {
        let (trusted, user) = ("trusted.overlay.opaque", "user.overlay.opaque");
        as_imported_before(&stage.state(), trusted, trusted);
        check(stage, "as root's imports were");
        as_imported_before(&stage.state(), trusted, user);
        check(stage, "as a user's imports are");
    }
},);

case!(
    "whiteouts_hide_the_same_whoever_imported",
    root_once,
    &[Need::DevFuse, Need::UserNamespaces, Need::TestUser, Need::Tool("setpriv")],
    |stage: &Stage| {
        const SCRIPT: &str = "\"$1\" mount --backend \"$2\" \"$3\" \"$4\" >&2 && FSPROV_TEST_PICTURE=\"$4\" \"$0\" && \
                              \"$1\" unmount \"$4\" >&2";
        import(stage);
        let user = AsUser::new(stage);
        for sample in SAMPLES {
            let import = ["image", "import", "--platform", "linux/amd64", "--name", sample.name];
            user.call("fsprov").args(import).arg(layout(stage, sample)).run().ok();
        }
        let users = user.dir.join("state");
        let rootfs = stage.path("rootfs");
        for sample in SAMPLES {
            let want = expected(sample);
            for backend in ["auto", "fuse", "overlay", "copy"] {
                if backend == "overlay" && !has_mount_calls() {
                    continue;
                }
                let what = format!("{} by {backend}", sample.name);
                let said = stage
                    .tool("unshare", ["--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT])
                    .arg(std::env::current_exe().expect("exe"))
                    .arg(crate::common::stage::program())
                    .args([backend, sample.name])
                    .arg(&rootfs)
                    .run()
                    .ok()
                    .out();
                assert_same(&want, &shape(&from_lines(&said)), &format!("root's {what} in a user namespace"));
                let mount = stage.fsprov(["mount", "--backend", backend, sample.name]).arg(&rootfs);
                mount.env("FSPROV_ROOT", &users).run().ok();
                let got = picture(&rootfs);
                stage.fsprov(["unmount"]).arg(&rootfs).env("FSPROV_ROOT", &users).run().ok();
                assert_same(&want, &shape(&got), &format!("a user's {what} for root"));
                let leaks = got.iter().find(|(_, line)| line.contains("overlay.opaque"));
                assert_eq!(leaks, None, "{what}: an attribute of the store");
            }
        }
    },
);

fn of_several(lane: &Lane) -> bool {
    on::every_backend(lane) && lane.backend != "bind"
}

// A soft limit of open files is for programs that call select(2): more layers than that are mounted all the same.
case!("more_layers_than_the_soft_limit_of_open_files", of_several, |stage: &Stage| {
    const LAYERS: usize = 70;
    let tars: Vec<_> = (0..LAYERS).map(|n| layer(&[&format!("f{n}"), "last"])).collect();
    Image::of(&tars, "amd64").layout(&stage.path("layout"), "many");
    let limited = |arguments: &[&std::ffi::OsStr]| {
        stage.limited("-Sn 40", &stage.fsprov(arguments)).run().ok();
    };
    let (layout, rootfs) = (stage.path("layout"), stage.path("rootfs"));
    let name = ["--name".as_ref(), "many".as_ref()];
    limited(&[&["image".as_ref(), "import".as_ref(), layout.as_os_str()][..], &name].concat());
    let backend = stage.lane.backend.as_ref();
    limited(&["mount".as_ref(), "--backend".as_ref(), backend, "many".as_ref(), rootfs.as_os_str()]);
    assert_eq!(fs::read_dir(&rootfs).expect("list").count(), LAYERS + 1);
    limited(&["unmount".as_ref(), rootfs.as_os_str()]);
    stage.assert_nothing_left("after unmount");
});

// Bazel's tar, among others, has files without the directories that they lie in: the layer's own tree has those as tar makes them.
case!("a_directory_without_an_entry_covers_none_below", of_several, |stage: &Stage| {
    let tar = |entries: &[(&str, u32, u64)]| {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, mode, owner) in entries {
            let mut header = tar::Header::new_gnu();
            let is_dir = path.ends_with('/');
            header.set_entry_type(if is_dir { tar::EntryType::Directory } else { tar::EntryType::Regular });
            header.set_size(0);
            header.set_mode(*mode);
            header.set_uid(*owner);
            header.set_gid(*owner);
            tar.append_data(&mut header, path, &[][..]).expect("tar");
        }
        tar.into_inner().expect("tar")
    };
    let below: &[_] = &[("home/", 0o755, 0), ("home/app/", 0o750, 5), ("root/", 0o700, 0), ("tmp/", 0o1777, 0)];
    let middle: &[_] = &[("tmp/sub/", 0o711, 0), ("tmp/a", 0o644, 0), ("root/a", 0o644, 0), ("home/app/a", 0o644, 0)];
    let above: &[_] = &[("tmp/sub/b", 0o644, 0), ("root/", 0o710, 0), ("new/b", 0o644, 0)];
    let tars = [tar(below), tar(middle), tar(above)];
    Image::of(&tars, "amd64").layout(&stage.path("layout"), "v1");
    let import = ["image", "import", "--platform", "linux/amd64", "--name", "app"];
    stage.fsprov(import).arg(stage.path("layout")).run().ok();
    let rootfs = stage.path("rootfs");
    stage.fsprov(["mount", "--backend", stage.lane.backend, "app"]).arg(&rootfs).run().ok();
    let mode = |path: &str| fs::symlink_metadata(rootfs.join(path)).expect("stat").mode() & 0o7777;
    let modes = ["tmp", "tmp/sub", "root", "home", "home/app", "new"].map(mode);
    assert_eq!(
        modes,
        [0o1777, 0o711, 0o710, 0o755, 0o750, 0o755],
        "{}",
        modes.map(|mode| format!("{mode:o}")).join(" ")
    );
    assert!(["tmp/a", "tmp/sub/b", "root/a", "new/b"].iter().all(|path| rootfs.join(path).exists()));
    if stage.lane.is_real_root() {
        assert_eq!(fs::metadata(rootfs.join("home/app")).expect("stat").uid(), 5);
    }
    stage.unmount("rootfs");
    stage.assert_nothing_left("after unmount");
});
