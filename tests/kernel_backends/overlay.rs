//! The overlay backend.

use crate::*;

tests!(
    overlay_merges_layers_with_whiteouts,
    overlay_makes_missing_mount_points,
    overlay_of_one_layer_keeps_its_flags,
    overlay_of_hundreds_of_layers,
    overlay_leaves_nothing_when_it_fails,
);

fn overlay_merges_layers_with_whiteouts() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let mut plan = layered(
        &place,
        &[
            &["etc/a", "etc/b", "opt/x/old", "opt/x/sub/old", "gone/deep/f", "file", "dir/f", "twice"],
            &[
                "etc/.wh.a",
                "etc/c",
                "opt/x/.wh..wh..opq",
                "opt/x/new",
                ".wh.gone",
                "file/now-a-dir",
                ".wh..wh.plnk",
                ".wh.twice",
            ],
            &["etc/a", "gone/back", "dir/.wh.f", "twice", "etc/.wh.none"],
            &["etc/.wh.b", "opt/.wh.x", "opt/x/again"],
        ],
    );
    fill(&place.path("l2"), &["again"], "2");
    fill(&place.path("l3"), &[".wh.again"], "3");
    plan.layers.insert(4, plan.layers[2].clone());
    // Directories must look as they do in the topmost layer that has them, though layers of ours lie on top.
    fs::set_permissions(place.path("l2/dir"), fs::Permissions::from_mode(0o1751)).unwrap();
    fs::set_permissions(place.path("l1/etc"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(place.path("l3/etc"), fs::Permissions::from_mode(0o751)).unwrap();
    let before = fs::metadata(place.path("l3/opt")).unwrap();
    let traces = provision(OVERLAY, &plan);
    let want = [
        ("again", "2"),
        ("dir", "/"),
        ("etc", "/"),
        ("etc/a", "2"),
        ("etc/c", "1"),
        ("file", "/"),
        ("file/now-a-dir", "1"),
        ("gone", "/"),
        ("gone/back", "2"),
        ("opt", "/"),
        ("opt/x", "/"),
        ("opt/x/again", "3"),
        ("twice", "2"),
    ];
    let got = listing(&plan.rootfs);
    assert_eq!(got.iter().map(|(n, t)| (n.as_str(), t.as_str())).collect::<Vec<_>>(), want);
    let mode = |name: &str| fs::metadata(place.rootfs(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("dir"), mode("etc")), (0o1751, 0o755));
    let after = fs::metadata(place.rootfs("opt")).unwrap();
    assert_eq!((after.mtime(), after.mtime_nsec(), after.uid()), (before.mtime(), before.mtime_nsec(), before.uid()));
    assert_eq!(errno(fs::write(place.rootfs("etc/c"), "x")), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_file(place.rootfs("twice"))), Some(libc::EROFS));
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(!destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(OVERLAY.health(&plan, &traces, &mount_table()), Health::Gone);
    assert!(place.mounts().is_empty());
    assert_eq!(fs::read_dir(&plan.state_dir).unwrap().count(), 0);
}

fn overlay_makes_missing_mount_points() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let mut plan = layered(&place, &[&["etc/passwd", "run/"], &["var/lib/", "srv/.wh.x"]]);
    symlink("../run", place.path("l1/var/run")).unwrap();
    symlink("/nowhere", place.path("l1/dangling")).unwrap();
    fs::set_permissions(place.path("l1/var/lib"), fs::Permissions::from_mode(0o710)).unwrap();
    fs::write(place.path("hosts"), "host").unwrap();
    let (a, b, c) = (place.dir("a"), place.dir("b"), place.dir("c"));
    plan.volumes = fsprov::volume::order(vec![
        volume(&a, "/var/run/new/deep", Access::Rw),
        volume(&place.path("hosts"), "/etc/hosts", Access::Ro),
        volume(&b, "/var/lib/db", Access::Rw),
        volume(&c, "/var/lib/db/inner/c", Access::Ro),
        volume(Path::new("/dev/null"), "/made/null", Access::Rw),
    ])
    .unwrap();
    let traces = provision(OVERLAY, &plan);
    fs::write(place.rootfs("run/new/deep/f"), "x").unwrap();
    assert!(a.join("f").exists() && b.join("inner/c").is_dir());
    assert_eq!(fs::read(place.rootfs("etc/hosts")).unwrap(), b"host");
    assert_eq!(fs::read(place.rootfs("etc/passwd")).unwrap(), b"0");
    fs::write(place.rootfs("made/null"), "x").unwrap();
    assert_eq!(fs::metadata(place.rootfs("var/lib")).unwrap().mode() & 0o7777, 0o710);
    assert_eq!(errno(fs::create_dir(place.rootfs("run/x"))), Some(libc::EROFS));
    assert_eq!(traces.parts.as_ref().unwrap().len(), 5);
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty() && a.join("f").exists());
    assert_eq!(fs::read_dir(&plan.state_dir).unwrap().count(), 0);
    plan.volumes = vec![volume(&a, "/dangling", Access::Rw)];
    let error = fail(OVERLAY, &plan);
    assert!(error.to_string().contains("/dangling"), "{error}");
    assert_eq!(fs::read_dir(&plan.state_dir).unwrap().count(), 0);
}

fn overlay_of_one_layer_keeps_its_flags() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let locked = place.dir("locked");
    mount_tmpfs(&locked, MountFlags::NOSUID | MountFlags::NODEV);
    fill(&locked, &["f", ".wh.plain"], "x");
    let mut plan = place.plan(vec![]);
    plan.layers[0].root = locked;
    let traces = provision(OVERLAY, &plan);
    let mount = mountinfo::mounts_at(&plan.rootfs).unwrap().pop().unwrap();
    for option in ["ro", "nosuid", "nodev"] {
        assert!(mount.has_option(option), "{option}: {mount:?}");
    }
    assert_eq!((mount.fs_type.to_str(), mount.source.to_str()), (Some("overlay"), Some("fsprov")));
    assert!(place.rootfs(".wh.plain").exists());
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
}

fn overlay_of_hundreds_of_layers() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::at(Path::new("/tmp/a-place-with-a-rather-long-name-so-that-strings-of-layers-would-overflow"));
    let names: Vec<String> = (0..499).map(|n| format!("d/f{n}")).collect();
    let trees: Vec<Vec<&str>> = names.iter().map(|n| vec![n.as_str(), "top"]).collect();
    let trees: Vec<&[&str]> = trees.iter().map(Vec::as_slice).collect();
    let mut plan = layered(&place, &trees);
    plan.volumes = vec![volume(&place.dir("v"), "/missing", Access::Rw)];
    let all = plan.layers.clone();
    plan.layers.truncate(120);
    let traces = provision(OVERLAY, &plan);
    assert_eq!(fs::read_dir(place.rootfs("d")).unwrap().count(), 120);
    assert_eq!(errno(fs::write(place.rootfs("top"), "x")), Some(libc::EROFS));
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    plan.layers = all;
    let traces = match make(OVERLAY, &plan, &mut Notes::default()) {
        // One page of options is all that mount(2) takes.
        Err(e) if !takes_layers_one_by_one() => {
            assert!(e.to_string().contains("one page of mount options"), "{e}");
            return;
        }
        other => {
            other.unwrap();
            assert!(destroy_any(&plan));
            provision(OVERLAY, &plan)
        }
    };
    assert_eq!(fs::read_dir(place.rootfs("d")).unwrap().count(), 499);
    assert_eq!(fs::read(place.rootfs("top")).unwrap(), b"498");
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    // A repeated layer counts once, at its topmost place.
    plan.layers.insert(3, plan.layers[0].clone());
    let traces = provision(OVERLAY, &plan);
    assert_eq!(fs::read(place.rootfs("top")).unwrap(), b"498");
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    plan.layers[3].root = place.dir("one-more");
    let error = fail(OVERLAY, &plan);
    assert!(error.to_string().contains("it takes 501 layers, and overlayfs at most 500"), "{error}");
    plan.volumes.clear();
    let traces = provision(OVERLAY, &plan);
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty());
}

/// Linux 6.7. Before 6.5 overlayfs has all its options from one string, and takes no descriptor at all.
fn takes_layers_one_by_one() -> bool {
    use rustix::mount::{FsOpenFlags, fsconfig_set_fd, fsconfig_set_string, fsopen};
    let Ok(context) = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) else { return false };
    let etc = fs::File::open("/etc").unwrap();
    fsconfig_set_fd(&context, "lowerdir+", &etc) != Err(rustix::io::Errno::OPNOTSUPP)
        && fsconfig_set_string(&context, "lowerdir+", "/etc").is_ok()
}

fn destroy_any(plan: &Plan) -> bool {
    let top = mountinfo::mounts_at(&plan.rootfs).unwrap().pop().unwrap();
    let traces = Traces { mount_id: Some(top.id), ..Traces::default() };
    destroy(OVERLAY, plan, &traces, Detach::Lazy).unwrap()
}

fn overlay_leaves_nothing_when_it_fails() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let mut plan = layered(&place, &[&["a"], &["b/"]]);
    plan.volumes = vec![volume(&place.path("l0/a"), "/b", Access::Rw)];
    assert_eq!(fail(OVERLAY, &plan).kind(), Kind::Usage);
    plan.volumes.clear();
    for at in 1.. {
        let mut notes = Notes { fail_at: Some(at), ..Notes::default() };
        if make(OVERLAY, &plan, &mut notes).is_ok() {
            assert!(at > 1);
            assert!(destroy(OVERLAY, &plan, &notes.last, Detach::IfIdle).unwrap());
            break;
        }
        assert!(place.mounts().is_empty());
        assert_eq!(fs::read_dir(&plan.state_dir).unwrap().count(), 0);
    }
    plan.layers[0].root = place.path("none");
    assert_eq!(fail(OVERLAY, &plan).kind(), Kind::NotFound);
    plan.layers.clear();
    assert!(fail(OVERLAY, &plan).to_string().contains("the image has no filesystem layer"));
    assert!(place.mounts().is_empty());
}
