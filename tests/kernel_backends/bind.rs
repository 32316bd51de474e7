//! The bind backend, and what all of them do with volumes and in taking a rootfs away.

use crate::*;

tests!(
    bind_is_read_only_and_goes_away,
    bind_needs_exactly_one_layer,
    volumes_of_each_kind,
    a_read_only_volume_is_so_with_its_submounts,
    volumes_nest_and_missing_mount_points_are_made_in_writable_ones,
    a_missing_mount_point_is_named_with_the_way_out,
    kinds_must_match,
    links_in_the_image_stay_inside,
    two_names_of_one_place_are_refused,
    a_source_that_became_a_symlink_is_refused,
    mounting_on_the_layer_or_in_it,
    paths_of_any_bytes,
    mounts_are_private_even_below_shared_ones,
    flags_of_the_source_stay,
    mounts_of_others_are_left_alone,
    a_rootfs_in_use_stays_whole,
    a_mount_on_top_is_named,
    a_failed_note_leaves_nothing,
    the_mount_of_another_is_not_taken_for_ours,
    id_maps_shift_owners,
    two_hundred_volumes,
);

struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bind_is_read_only_and_goes_away() {
    let place = Place::new();
    let plan = place.plan(vec![]);
    let traces = provision(BIND, &plan);
    assert_eq!(fs::read(place.rootfs("etc/passwd")).unwrap(), b"image");
    assert_eq!(errno(fs::write(place.rootfs("etc/passwd"), "x")), Some(libc::EROFS));
    assert_eq!(errno(fs::create_dir(place.rootfs("new"))), Some(libc::EROFS));
    assert_eq!(traces.parts.as_deref(), Some(&[][..]));
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(!destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(BIND.health(&plan, &traces, &mount_table()), Health::Gone);
    assert!(place.mounts().is_empty());
    assert_eq!(fs::read_dir(place.path("rootfs")).unwrap().count(), 0);
}

fn bind_needs_exactly_one_layer() {
    let place = Place::new();
    let mut plan = place.plan(vec![]);
    plan.layers.push(Layer { root: place.path("layer") });
    let error = fail(BIND, &plan);
    assert!(error.to_string().contains("multiple layers are not supported by the bind backend"), "{error}");
    let Support::No { reason, .. } = BIND.support(&Host::probe(), &plan) else { panic!() };
    assert_eq!(reason, "multiple layers are not supported by the bind backend");
    plan.layers.clear();
    let error = fail(BIND, &plan);
    assert!(error.to_string().contains("the image has no filesystem layer"), "{error}");
    assert!(place.mounts().is_empty());
}

fn volumes_of_each_kind() {
    let place = Place::new();
    for file in ["ro", "rw", "null"] {
        fs::write(place.path("layer/etc").join(file), "image").unwrap();
    }
    let (rw, ro) = (place.dir("rw"), place.dir("ro"));
    fs::write(ro.join("f"), "host").unwrap();
    for file in ["file-ro", "file-rw"] {
        fs::write(place.path(file), "host").unwrap();
    }
    let plan = place.plan(vec![
        volume(&rw, "/data", Access::Rw),
        volume(&ro, "/run", Access::Ro),
        volume(&place.path("file-ro"), "/etc/ro", Access::Ro),
        volume(&place.path("file-rw"), "/etc/rw", Access::Rw),
        volume(Path::new("/dev/null"), "/etc/null", Access::Rw),
    ]);
    let traces = provision(BIND, &plan);
    assert_eq!(traces.parts.as_ref().unwrap().len(), 5);
    fs::write(place.rootfs("data/new"), "inside").unwrap();
    assert_eq!(fs::read(rw.join("new")).unwrap(), b"inside");
    fs::write(rw.join("new"), "outside").unwrap();
    assert_eq!(fs::read(place.rootfs("data/new")).unwrap(), b"outside");
    assert_eq!(fs::read(place.rootfs("run/f")).unwrap(), b"host");
    assert_eq!(errno(fs::write(place.rootfs("run/f"), "x")), Some(libc::EROFS));
    assert_eq!(fs::read(place.rootfs("etc/ro")).unwrap(), b"host");
    assert_eq!(errno(fs::write(place.rootfs("etc/ro"), "x")), Some(libc::EROFS));
    fs::write(place.rootfs("etc/rw"), "inside").unwrap();
    assert_eq!(fs::read(place.path("file-rw")).unwrap(), b"inside");
    fs::write(place.rootfs("etc/null"), "gone").unwrap();
    assert_eq!(errno(fs::write(place.rootfs("etc/passwd"), "x")), Some(libc::EROFS));
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty());
    assert_eq!(fs::read(rw.join("new")).unwrap(), b"outside");
    assert_eq!(fs::read(place.path("layer/etc/rw")).unwrap(), b"image");
}

fn a_read_only_volume_is_so_with_its_submounts() {
    let place = Place::new();
    let source = place.dir("source/sub");
    mount_tmpfs(&source, MountFlags::empty());
    fs::write(source.join("f"), "deep").unwrap();
    let plan = place.plan(vec![volume(&place.path("source"), "/data", Access::Ro)]);
    let traces = provision(BIND, &plan);
    assert_eq!(fs::read(place.rootfs("data/sub/f")).unwrap(), b"deep");
    assert_eq!(errno(fs::write(place.rootfs("data/sub/f"), "x")), Some(libc::EROFS));
    fs::write(source.join("f"), "still writable").unwrap();
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(fs::read(source.join("f")).unwrap(), b"still writable");
    assert_eq!(place.mounts(), [source]);
}

fn volumes_nest_and_missing_mount_points_are_made_in_writable_ones() {
    let place = Place::new();
    let (outer, inner, deep) = (place.dir("outer"), place.dir("inner"), place.dir("deep"));
    fs::write(place.path("file"), "host").unwrap();
    let plan = place.plan(vec![
        volume(&deep, "/data/a/b/deep", Access::Ro),
        volume(&inner, "/data/a/b", Access::Rw),
        volume(&outer, "/data", Access::Rw),
        volume(&place.path("file"), "/data/x/file", Access::Ro),
    ]);
    let traces = provision(BIND, &plan);
    fs::write(place.rootfs("data/a/b/f"), "1").unwrap();
    assert_eq!(fs::read(inner.join("f")).unwrap(), b"1");
    assert!(outer.join("a/b").is_dir() && inner.join("deep").is_dir() && outer.join("x/file").is_file());
    assert_eq!(errno(fs::write(place.rootfs("data/a/b/deep/f"), "x")), Some(libc::EROFS));
    assert_eq!(fs::read(place.rootfs("data/x/file")).unwrap(), b"host");
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty());
    // In a volume that is not writable nothing is made.
    let plan = place.plan(vec![volume(&outer, "/data", Access::Ro), volume(&inner, "/data/none", Access::Rw)]);
    let error = fail(BIND, &plan);
    let cause = "the read-only volume /data has no such directory";
    let remedy = format!("create it in {}, or mount that volume read-write", outer.display());
    assert_eq!(error.to_string(), format!("mount volume /data/none: {cause}; {remedy}"));
    assert_eq!(
        BIND.support(&Host::probe(), &plan),
        Support::No { reason: format!("mount volume /data/none: {cause}"), remedy }
    );
    assert!(place.mounts().is_empty() && !outer.join("none").exists());
}

fn a_missing_mount_point_is_named_with_the_way_out() {
    let place = Place::new();
    fs::write(place.path("file"), "host").unwrap();
    for (source, cause) in [("layer", "the image has no such directory"), ("file", "the image has no such file")] {
        let plan = place.plan(vec![volume(&place.path(source), "/none/here", Access::Rw)]);
        let remedy = "create it in the image, or use --backend fuse";
        assert_eq!(fail(BIND, &plan).to_string(), format!("mount volume /none/here: {cause}; {remedy}"));
        assert_eq!(
            BIND.support(&Host::probe(), &plan),
            Support::No { reason: format!("mount volume /none/here: {cause}"), remedy: remedy.to_owned() }
        );
    }
    assert!(place.mounts().is_empty());
}

fn kinds_must_match() {
    let place = Place::new();
    fs::write(place.path("file"), "host").unwrap();
    for (source, target, part) in [
        ("file", "/data", "the source is a file, and the image has a directory there"),
        ("layer", "/etc/passwd", "the source is a directory, and the image has a file there"),
        ("layer", "/etc/passwd/x", "a part of this path is not a directory in the image"),
    ] {
        let error = fail(BIND, &place.plan(vec![volume(&place.path(source), target, Access::Rw)]));
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().starts_with(&format!("mount volume {target}: {part}")), "{error}");
    }
    let mut plan = place.plan(vec![]);
    plan.rootfs = place.path("file");
    assert!(fail(BIND, &plan).to_string().contains("it is not a directory"));
    assert!(place.mounts().is_empty());
}

fn links_in_the_image_stay_inside() {
    let place = Place::new();
    symlink("../../../../../../etc", place.path("layer/out")).unwrap();
    symlink("/etc/passwd", place.path("layer/name")).unwrap();
    symlink("/proc/self/cwd", place.path("layer/magic")).unwrap();
    let source = place.dir("source");
    fs::write(place.path("file"), "host").unwrap();
    let plan =
        place.plan(vec![volume(&source, "/var/run", Access::Rw), volume(&place.path("file"), "/name", Access::Ro)]);
    let traces = provision(BIND, &plan);
    fs::write(place.rootfs("run/f"), "x").unwrap();
    assert!(source.join("f").exists());
    assert_eq!(fs::read(place.rootfs("etc/passwd")).unwrap(), b"host");
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    let plan = place.plan(vec![volume(&source, "/out", Access::Rw)]);
    let traces = provision(BIND, &plan);
    assert_eq!(mountinfo::mounts_at(&place.rootfs("etc")).unwrap().len(), 1);
    assert!(mountinfo::mounts_at(Path::new("/etc")).unwrap().is_empty());
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    let error = fail(BIND, &place.plan(vec![volume(&source, "/magic", Access::Rw)]));
    assert!(error.to_string().starts_with("mount volume /magic: "), "{error}");
    assert!(place.mounts().is_empty());
}

fn two_names_of_one_place_are_refused() {
    let place = Place::new();
    symlink("/", place.path("layer/top")).unwrap();
    let (a, b) = (place.dir("a"), place.dir("b"));
    let error = fail(BIND, &place.plan(vec![volume(&a, "/run", Access::Rw), volume(&b, "/var/run", Access::Rw)]));
    assert_eq!(error.to_string(), "mount volume /var/run: in this image it is the same place as volume /run");
    let error = fail(BIND, &place.plan(vec![volume(&a, "/top", Access::Rw)]));
    assert_eq!(error.to_string(), "mount volume /top: in this image it leads to the root itself");
    assert!(place.mounts().is_empty());
}

fn a_source_that_became_a_symlink_is_refused() {
    let place = Place::new();
    let plan = place.plan(vec![volume(&place.dir("box/v"), "/data", Access::Rw)]);
    fs::remove_dir(place.path("box/v")).unwrap();
    symlink("/etc", place.path("box/v")).unwrap();
    let error = fail(BIND, &plan);
    assert!(error.to_string().contains("a symlink is in it now"), "{error}");
    fs::remove_file(place.path("box/v")).unwrap();
    fs::write(place.path("box/v"), "").unwrap();
    let error = fail(BIND, &plan);
    assert!(error.to_string().contains("the source was replaced by another kind of file"), "{error}");
    assert!(place.mounts().is_empty());
}

fn mounting_on_the_layer_or_in_it() {
    let place = Place::new();
    for rootfs in ["layer", "layer/data"] {
        let mut plan = place.plan(vec![]);
        plan.rootfs = place.path(rootfs);
        let traces = provision(BIND, &plan);
        assert_eq!(fs::read(plan.rootfs.join("etc/passwd")).unwrap(), b"image");
        assert_eq!(errno(fs::write(plan.rootfs.join("etc/passwd"), "x")), Some(libc::EROFS));
        // A second one of the same layer, which holds the first.
        let mut second = place.plan(vec![]);
        second.rootfs = place.path("rootfs");
        let more = provision(BIND, &second);
        assert!(destroy(BIND, &second, &more, Detach::IfIdle).unwrap());
        assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
        assert!(place.mounts().is_empty());
    }
}

fn paths_of_any_bytes() {
    for name in [&b"a b"[..], b"a,b", b"a\nb", b"a\\040b", b"\xff\xfe", b"a:b", b"#a", b"a\tb"] {
        let place = Place::at(&Path::new("/tmp/bytes").join(OsStr::from_bytes(name)));
        let plan = place.plan(vec![volume(&place.dir("data\n x"), "/data", Access::Rw)]);
        let traces = provision(BIND, &plan);
        fs::write(place.rootfs("data/f"), "x").unwrap();
        assert!(place.path("data\n x/f").exists());
        assert_eq!(place.mounts().len(), 2);
        assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
        assert!(place.mounts().is_empty());
        assert!(!destroy(BIND, &plan, &traces, Detach::Lazy).unwrap());
    }
}

fn mounts_are_private_even_below_shared_ones() {
    let place = Place::new();
    mount_tmpfs(&place.path("rootfs"), MountFlags::empty());
    rustix::mount::mount_change(place.path("rootfs"), MountPropagationFlags::SHARED).unwrap();
    // A peer, where what is mounted below the first shows up as well.
    let peer = place.dir("peer");
    rustix::mount::mount_bind(place.path("rootfs"), &peer).unwrap();
    fs::create_dir(place.rootfs("r")).unwrap();
    let mut plan = place.plan(vec![volume(&place.dir("v"), "/data", Access::Rw)]);
    plan.rootfs = place.rootfs("r");
    let traces = provision(BIND, &plan);
    let mine = mountinfo::tree_of(mountinfo::read().unwrap(), traces.mount_id.unwrap());
    assert_eq!(mine.len(), 2);
    assert!(mine.iter().all(|m| m.shared.is_none() && m.master.is_none()), "{mine:?}");
    // The copy that the kernel made below the peer is as read-only, and has no volume.
    assert_eq!(place.mounts().len(), 5, "{:?}", place.mounts());
    assert_eq!(errno(fs::write(peer.join("r/etc/passwd"), "x")), Some(libc::EROFS));
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(place.mounts().len(), 2, "{:?}", place.mounts());
}

fn flags_of_the_source_stay() {
    let place = Place::new();
    let locked = place.dir("locked");
    mount_tmpfs(&locked, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC);
    fs::create_dir_all(locked.join("layer/data")).unwrap();
    fs::create_dir(locked.join("volume")).unwrap();
    let mut plan = place.plan(vec![volume(&locked.join("volume"), "/data", Access::Rw)]);
    plan.layers[0].root = locked.join("layer");
    let traces = provision(BIND, &plan);
    for (point, access) in [(place.path("rootfs"), "ro"), (place.rootfs("data"), "rw")] {
        let mount = mountinfo::mounts_at(&point).unwrap().pop().unwrap();
        for option in [access, "nosuid", "nodev", "noexec"] {
            assert!(mount.has_option(option), "{option}: {mount:?}");
        }
    }
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
}

fn mounts_of_others_are_left_alone() {
    let place = Place::new();
    let plan = place.plan(vec![volume(&place.dir("v"), "/data", Access::Rw)]);
    let traces = provision(BIND, &plan);
    let (in_image, on_volume) = (place.rootfs("tmp"), place.rootfs("data"));
    for at in [&in_image, &on_volume] {
        mount_tmpfs(at, MountFlags::empty());
        fs::write(at.join("theirs"), "x").unwrap();
    }
    let before = place.mounts();
    let error = destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    for at in [&in_image, &on_volume] {
        assert!(error.to_string().contains(&format!("theirs on {}", at.display())), "{error}");
        assert!(at.join("theirs").exists());
        rustix::mount::unmount(at, rustix::mount::UnmountFlags::empty()).unwrap();
    }
    assert_eq!(before.len(), place.mounts().len() + 2);
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    // Lazily everything goes out of sight, and what is in it stays for who holds it.
    let traces = provision(BIND, &plan);
    mount_tmpfs(&on_volume, MountFlags::empty());
    fs::write(on_volume.join("theirs"), "x").unwrap();
    let held = fs::File::open(on_volume.join("theirs")).unwrap();
    assert!(destroy(BIND, &plan, &traces, Detach::Lazy).unwrap());
    assert_eq!(held.metadata().unwrap().nlink(), 1);
    assert!(place.mounts().is_empty());
}

/// A shell that does `what` and then waits.
fn shell(what: &str, cwd: &Path) -> Reaped {
    let mut child = Command::new("sh")
        .args(["-c", &format!("{what}; echo ready; read end")])
        .current_dir(cwd)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0_u8; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
    Reaped(child)
}

fn a_rootfs_in_use_stays_whole() {
    let place = Place::new();
    let plan = place.plan(vec![volume(&place.dir("v"), "/data", Access::Rw)]);
    fs::write(place.path("v/open"), "x").unwrap();
    let traces = provision(BIND, &plan);
    for (what, cwd, how) in [
        (":", place.path("rootfs"), "working directory"),
        (":", place.rootfs("data"), "working directory"),
        ("exec 7<data/open", place.path("rootfs"), "working directory"),
        (&format!("exec 7<'{}'", place.rootfs("data/open").display()), PathBuf::from("/"), "open file 7"),
    ] {
        let child = shell(what, &cwd);
        let before = place.mounts();
        let error = destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        let want = format!("it is used by sh (pid {}, {how})", child.0.id());
        assert!(error.to_string().contains(&want), "{error}");
        assert_eq!(before, place.mounts());
    }
    let child = shell(":", &place.rootfs("data"));
    assert!(destroy(BIND, &plan, &traces, Detach::Lazy).unwrap());
    assert!(place.mounts().is_empty());
    drop(child);
    assert!(place.path("v/open").exists());
}

fn a_mount_on_top_is_named() {
    let place = Place::new();
    let plan = place.plan(vec![]);
    let traces = provision(BIND, &plan);
    mount_tmpfs(&plan.rootfs, MountFlags::empty());
    for how in [Detach::IfIdle, Detach::Lazy] {
        let error = destroy(BIND, &plan, &traces, how).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("another mount lies on top of it (tmpfs of theirs)"), "{error}");
    }
    rustix::mount::unmount(&plan.rootfs, rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
}

fn a_failed_note_leaves_nothing() {
    let place = Place::new();
    let outer = place.dir("outer");
    let plan =
        place.plan(vec![volume(&outer, "/data", Access::Rw), volume(&place.dir("v"), "/data/made/here", Access::Rw)]);
    let mut fails = 0;
    for at in 1.. {
        let mut notes = Notes { fail_at: Some(at), ..Notes::default() };
        let Err(error) = make(BIND, &plan, &mut notes) else {
            assert!(destroy(BIND, &plan, &notes.last, Detach::IfIdle).unwrap());
            break;
        };
        assert_eq!(error.to_string(), "write record test: planted");
        fails += 1;
        assert!(place.mounts().is_empty(), "{:?}", place.mounts());
        assert!(!outer.join("made").exists(), "note {at}");
    }
    assert!(fails >= 2, "{fails}");
}

fn the_mount_of_another_is_not_taken_for_ours() {
    let place = Place::new();
    let plan = place.plan(vec![]);
    let traces = provision(BIND, &plan);
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    // A free mount id is used again at once: somebody else's mount there may well get ours.
    mount_tmpfs(&plan.rootfs, MountFlags::empty());
    let theirs = mountinfo::mounts_at(&plan.rootfs).unwrap().pop().unwrap();
    let mistaken = Traces { mount_id: Some(theirs.id), ..traces };
    if mistaken.unique_mount_id.is_some() {
        assert!(!destroy(BIND, &plan, &mistaken, Detach::Lazy).unwrap());
    }
    assert_eq!(mountinfo::mounts_at(&plan.rootfs).unwrap(), [theirs]);
}

fn id_maps_shift_owners() {
    let mapped = |place: &Place| {
        let mut plan = place.plan(vec![]);
        plan.ownership.uids = vec![IdRange { inside: 0, outside: 4000, count: 10 }];
        plan.ownership.gids =
            vec![IdRange { inside: 0, outside: 5000, count: 1 }, IdRange { inside: 1, outside: 7000, count: 5 }];
        plan
    };
    let host = Host::probe();
    // tmpfs takes id maps from Linux 6.3 on; what /var/tmp lies on usually did before.
    let on_disk = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut place = Place::new();
    if matches!(BIND.support(&host, &mapped(&place)), Support::No { reason, .. } if reason.contains("does not take id maps"))
    {
        place = Place::at(on_disk.path());
    }
    let mut plan = mapped(&place);
    if !host.initial_user_namespace || !host.new_mount_api.is_yes() {
        let Support::No { reason, .. } = BIND.support(&host, &plan) else { panic!("it cannot work here") };
        assert!(reason.contains("idmapped mount"), "{reason}");
        return;
    }
    std::os::unix::fs::chown(place.path("layer/etc/passwd"), Some(3), Some(2)).unwrap();
    std::os::unix::fs::chown(place.path("layer/data"), Some(77), Some(0)).unwrap();
    let traces = provision(BIND, &plan);
    let owner = |name: &str| fs::metadata(place.rootfs(name)).map(|m| (m.uid(), m.gid())).unwrap();
    assert_eq!(owner("etc"), (4000, 5000));
    assert_eq!(owner("etc/passwd"), (4003, 7001));
    assert_eq!(owner("data"), (65534, 5000));
    assert_eq!(errno(fs::write(place.rootfs("etc/passwd"), "x")), Some(libc::EROFS));
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    plan.ownership.uids.push(IdRange { inside: 5, outside: 9000, count: 1 });
    let Support::No { reason, .. } = BIND.support(&host, &plan) else { panic!("ranges that overlap") };
    assert!(!reason.is_empty());
    plan.ownership = Ownership { squash: Some((0, 0)), ..Ownership::default() };
    let Support::No { remedy, .. } = BIND.support(&host, &plan) else { panic!("squash") };
    assert!(remedy.contains("--backend fuse"), "{remedy}");
}

fn two_hundred_volumes() {
    let place = Place::new();
    let volumes = (0..200)
        .map(|n| {
            fs::create_dir_all(place.path(&format!("layer/v/{n}"))).unwrap();
            volume(&place.dir(&format!("sources/{n}")), &format!("/v/{n}"), Access::Rw)
        })
        .collect();
    let plan = place.plan(volumes);
    let traces = provision(BIND, &plan);
    assert_eq!(place.mounts().len(), 201);
    fs::write(place.rootfs("v/199/f"), "x").unwrap();
    assert!(place.path("sources/199/f").exists());
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty());
}
