//! The copy backend.

use crate::*;

tests!(
    copy_is_the_tree_it_was_made_from,
    copy_of_layers_is_what_overlay_shows,
    copy_with_volumes_and_without_losing_them,
    copy_wants_an_empty_directory_and_leaves_one,
);

/// All that stat, readlink, getxattr and read say of a tree, hard links as the first name of their group.
fn describe(dir: &Path) -> Vec<String> {
    fn add(top: &Path, at: &Path, links: &mut std::collections::HashMap<u64, PathBuf>, out: &mut Vec<String>) {
        let meta = fs::symlink_metadata(at).unwrap();
        let name = at.strip_prefix(top).unwrap().to_owned();
        let mut words = vec![
            name.display().to_string(),
            format!("{:o} {}:{} rdev {}", meta.mode(), meta.uid(), meta.gid(), meta.rdev()),
            format!("mtime {}.{:09}", meta.mtime(), meta.mtime_nsec()),
        ];
        if meta.is_symlink() {
            words.push(format!("-> {}", fs::read_link(at).unwrap().display()));
        } else {
            for key in ["user.x", "user.overlay.opaque", "trusted.overlay.opaque"] {
                let mut value = [0_u8; 64];
                if let Ok(length) = rustix::fs::lgetxattr(at, key, &mut value[..]) {
                    words.push(format!("{key}={:?}", &value[..length]));
                }
            }
        }
        if !meta.is_dir() && meta.nlink() > 1 {
            // The count is not compared: overlayfs counts names too that a layer above has replaced.
            match links.get(&meta.ino()) {
                Some(first) => words.push(format!("link {}", first.display())),
                None => drop(links.insert(meta.ino(), name.clone())),
            }
        }
        if meta.is_file() {
            let content = fs::read(at).unwrap();
            let sum = content.iter().fold(content.len() as u64, |sum, &b| sum.wrapping_mul(31).wrapping_add(b.into()));
            words.push(format!("size {} sum {sum}", meta.len()));
        }
        out.push(words.join(" "));
        if meta.is_dir() {
            let mut names: Vec<PathBuf> = fs::read_dir(at).unwrap().map(|e| e.unwrap().path()).collect();
            names.sort();
            for name in names {
                add(top, &name, links, out);
            }
        }
    }
    let mut out = Vec::new();
    add(dir, dir, &mut std::collections::HashMap::new(), &mut out);
    out
}

fn set_mtime(path: &Path, secs: i64, nanos: i64) {
    let time = rustix::fs::Timespec { tv_sec: secs, tv_nsec: nanos };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn copy_is_the_tree_it_was_made_from() {
    let place = Place::new();
    let layer = place.path("layer");
    let root = Host::probe().initial_user_namespace;
    fill(&layer, &["a/b/c/deep", "etc/x"], "content");
    fs::write(layer.join("big"), vec![7_u8; 3_000_001]).unwrap();
    let sparse = fs::File::create(layer.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"data", 32 << 20).unwrap();
    fs::hard_link(layer.join("big"), layer.join("a/b/big-too")).unwrap();
    symlink("nowhere/at all", layer.join("dangling")).unwrap();
    fs::hard_link(layer.join("dangling"), layer.join("a/dangling-too")).unwrap();
    fs::set_permissions(layer.join("etc/x"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(layer.join("a/b"), fs::Permissions::from_mode(0o1500)).unwrap();
    fs::write(layer.join(".wh.not"), "one layer has no whiteouts").unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, layer.join("fifo"), rustix::fs::Mode::from_raw_mode(0o640)).unwrap();
    let _ = rustix::fs::setxattr(layer.join("etc/x"), "user.x", b"v\0w", rustix::fs::XattrFlags::empty());
    if root {
        std::os::unix::fs::chown(layer.join("etc/x"), Some(7), Some(8)).unwrap();
        fs::set_permissions(layer.join("etc/x"), fs::Permissions::from_mode(0o6755)).unwrap();
        std::os::unix::fs::lchown(layer.join("dangling"), Some(9), Some(9)).unwrap();
        let dev = rustix::fs::makedev(1, 3);
        let kind = rustix::fs::FileType::CharacterDevice;
        rustix::fs::mknodat(rustix::fs::CWD, layer.join("null"), kind, rustix::fs::Mode::from_raw_mode(0o666), dev)
            .unwrap();
    }
    for (n, name) in ["a/b/c/deep", "a/b/c", "a/b", "a", "etc/x", "dangling", "fifo", ""].iter().enumerate() {
        set_mtime(&layer.join(name), 1_000_000_000 + n as i64, 123_456_789);
    }
    let plan = place.plan(vec![]);
    let want = describe(&layer);
    let traces = provision(COPY, &plan);
    assert_eq!(describe(&plan.rootfs), want);
    let blocks = fs::metadata(place.rootfs("sparse")).unwrap().blocks();
    assert!(blocks < 1000, "{blocks} blocks of a file with 4 bytes of data");
    // It is the container's own now, and the image never sees it.
    fs::write(place.rootfs("etc/x"), "changed").unwrap();
    fs::write(place.rootfs("new"), "new").unwrap();
    assert_eq!(describe(&layer), want);
    assert!(destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(fs::read_dir(&plan.rootfs).unwrap().count(), 0);
    assert_eq!(fs::metadata(&plan.rootfs).unwrap().mode() & 0o7777, 0o755);
    assert!(!destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(describe(&layer), want);
}

fn copy_of_layers_is_what_overlay_shows() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let mut plan = layered(
        &place,
        &[
            &[
                "etc/a",
                "etc/b",
                "opt/x/old",
                "opt/x/sub/old",
                "gone/deep/f",
                "file",
                "dir/f",
                "twice",
                "d2f/x",
                "keep/k",
            ],
            &[
                "etc/.wh.a",
                "etc/c",
                "opt/x/.wh..wh..opq",
                "opt/x/new",
                ".wh.gone",
                "file/dir",
                ".wh..wh.plnk",
                "d2f",
                "ln",
            ],
            &["etc/a", "gone/back", "dir/.wh.f", "twice", "etc/.wh.none", "d2f/again", "ln"],
            &["etc/.wh.b", "opt/.wh.x", "opt/x/again", "keep/.wh.k"],
        ],
    );
    symlink("/etc", place.path("l0/link")).unwrap();
    fill(&place.path("l2"), &["link/inside"], "2");
    fs::hard_link(place.path("l1/ln"), place.path("l1/ln2")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.path("l3/twice"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::empty(),
        0,
    )
    .unwrap();
    for n in 0..4 {
        for (m, dir) in ["etc", "opt/x", "opt", "dir", "keep", ""].iter().enumerate() {
            let dir = place.path(&format!("l{n}/{dir}"));
            if dir.is_dir() {
                fs::set_permissions(&dir, fs::Permissions::from_mode(0o700 + n * 8 + m as u32)).unwrap();
                set_mtime(&dir, i64::from(n) * 1000 + m as i64, 5);
            }
        }
    }
    let traces = provision(OVERLAY, &plan);
    let want = describe(&plan.rootfs);
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    plan.rootfs = place.dir("copied");
    let traces = provision(COPY, &plan);
    let got = describe(&plan.rootfs);
    assert_eq!(got, want);
    assert!(got.iter().any(|l| l.starts_with("gone/back ")) && !got.iter().any(|l| l.contains("twice")));
    assert!(destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
}

fn copy_with_volumes_and_without_losing_them() {
    let place = Place::new();
    let v = place.dir("v");
    fs::write(v.join("precious"), "data").unwrap();
    fs::write(place.path("file"), "host").unwrap();
    let plan = place.plan(vec![
        volume(&v, "/data", Access::Rw),
        volume(&v, "/made/up", Access::Ro),
        volume(&place.path("file"), "/etc/hosts", Access::Ro),
    ]);
    let traces = provision(COPY, &plan);
    assert_eq!(traces.parts.as_ref().unwrap().len(), 3);
    assert_eq!(fs::read(place.rootfs("made/up/precious")).unwrap(), b"data");
    assert_eq!(errno(fs::write(place.rootfs("made/up/precious"), "x")), Some(libc::EROFS));
    assert_eq!(fs::read(place.rootfs("etc/hosts")).unwrap(), b"host");
    fs::write(place.rootfs("etc/passwd"), "writable").unwrap();
    // A mount of somebody else: nothing is deleted through it.
    let theirs = place.rootfs("tmp");
    mount_tmpfs(&theirs, MountFlags::empty());
    fs::write(theirs.join("f"), "theirs").unwrap();
    for how in [Detach::IfIdle, Detach::Lazy] {
        let error = destroy(COPY, &plan, &traces, how).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("theirs on "), "{error}");
        assert_eq!(fs::read(theirs.join("f")).unwrap(), b"theirs");
        assert!(place.rootfs("etc/passwd").exists());
    }
    rustix::mount::unmount(&theirs, rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(fs::read(v.join("precious")).unwrap(), b"data");
    assert!(place.mounts().is_empty());
    assert_eq!(fs::read_dir(&plan.rootfs).unwrap().count(), 0);
}

fn copy_wants_an_empty_directory_and_leaves_one() {
    let place = Place::new();
    let mut plan = place.plan(vec![]);
    fs::write(place.rootfs("mine"), "x").unwrap();
    let error = fail(COPY, &plan);
    assert_eq!(error.kind(), Kind::Exists);
    assert!(place.rootfs("mine").exists());
    fs::remove_file(place.rootfs("mine")).unwrap();
    // A failure in the midst, and one at each note.
    plan.volumes = vec![volume(&place.path("layer"), "/etc/passwd", Access::Rw)];
    assert_eq!(fail(COPY, &plan).kind(), Kind::Usage);
    assert_eq!(fs::read_dir(&plan.rootfs).unwrap().count(), 0);
    let v = place.dir("v");
    plan.volumes = vec![volume(&v, "/data", Access::Rw), volume(&place.path("layer"), "/data/in/v", Access::Ro)];
    for at in 1..=3 {
        let mut notes = Notes { fail_at: Some(at), ..Notes::default() };
        assert!(make(COPY, &plan, &mut notes).is_err());
        assert_eq!(fs::read_dir(&plan.rootfs).unwrap().count(), 0, "{at}");
        assert_eq!(fs::read_dir(&v).unwrap().count(), 0, "{at}");
        assert!(place.mounts().is_empty());
    }
    plan.volumes.clear();
    plan.layers[0].root = place.path("none");
    assert_eq!(fail(COPY, &plan).kind(), Kind::NotFound);
    // Another directory of the same name is not ours to empty.
    plan.layers[0].root = place.path("layer");
    let traces = provision(COPY, &plan);
    fs::rename(&plan.rootfs, place.path("moved")).unwrap();
    fill(&plan.rootfs, &["stranger"], "x");
    assert!(!destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.rootfs("stranger").exists());
    assert_eq!(COPY.health(&plan, &traces, &mount_table()), Health::Gone);
}
