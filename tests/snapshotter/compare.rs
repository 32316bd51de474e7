//! Diff of the Diff service: what a snapshot has more than the one below, as a layer in containerd's content store.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use tonic::Code;

use crate::client::{Answer, Client, Labels, Mount, code, labels};
use crate::content::{Descriptor, GZIP, PLAIN, node};
use crate::diff::apply;
use crate::images::{self, Entry::Dir, Entry::File, sha256};
use crate::served::{Served, is_by_fuse};

crate::tests![
    what_a_container_changed_is_a_layer_that_gives_it_again,
    the_same_changes_give_the_same_bytes,
    a_committed_snapshot_is_the_layer_that_it_was,
    tar_and_podman_read_it,
    media_types_and_times,
    what_it_does_not_make_is_left_to_containerd,
    a_content_store_that_fails_leaves_nothing,
    names_that_would_hide_are_left_out,
];

#[derive(Clone, PartialEq, prost::Message)]
struct DiffAsked {
    #[prost(message, repeated, tag = "1")]
    left: Vec<Mount>,
    #[prost(message, repeated, tag = "2")]
    right: Vec<Mount>,
    #[prost(string, tag = "3")]
    media_type: String,
    #[prost(string, tag = "4")]
    reference: String,
    #[prost(btree_map = "string, string", tag = "5")]
    labels: Labels,
    #[prost(message, optional, tag = "6")]
    epoch: Option<crate::client::Time>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DiffAnswer {
    #[prost(message, optional, tag = "3")]
    diff: Option<Descriptor>,
}

fn diff(client: &Client, asked: DiffAsked) -> Answer<Descriptor> {
    let answer: DiffAnswer = client.call("/containerd.services.diff.v1.Diff/Diff", asked)?;
    Ok(answer.diff.expect("a descriptor"))
}

/// As containerd asks (rootfs.CreateDiff): a view of the parent, and the mounts of an active snapshot or a view of a committed one.
pub(crate) fn compare(client: &Client, key: &str, media_type: &str) -> Answer<Descriptor> {
    let info = client.stat(key)?;
    let left = client.view("default/90/left", &info.parent)?;
    let is_active = info.kind == crate::client::ACTIVE;
    let right = if is_active { client.mounts(key)? } else { client.view("default/91/right", key)? };
    let asked = DiffAsked { left, right, media_type: media_type.into(), ..DiffAsked::default() };
    let made = diff(client, asked);
    client.remove("default/90/left")?;
    if !is_active {
        client.remove("default/91/right")?;
    }
    made
}

fn run(command: &mut Command) -> String {
    let said = command.output().expect("run");
    assert!(said.status.success(), "{command:?}: {}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).into_owned()
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(bytes), &mut out).expect("gzip");
    out
}

/// Everything below a directory: a line each, with what a layer can say of it.
fn told(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut waiting = vec![root.to_owned()];
    let mut inodes: Vec<(u64, String)> = Vec::new();
    while let Some(path) = waiting.pop() {
        let meta = std::fs::symlink_metadata(&path).expect("stat");
        let name = path.strip_prefix(root).expect("below").display().to_string();
        let what = match meta.file_type() {
            kind if kind.is_dir() => {
                waiting.extend(std::fs::read_dir(&path).expect("list").map(|entry| entry.expect("entry").path()));
                "dir".to_owned()
            }
            kind if kind.is_symlink() => format!("-> {}", std::fs::read_link(&path).expect("link").display()),
            kind if kind.is_file() => sha256(&std::fs::read(&path).expect("read")),
            kind => format!("{kind:?} {}", meta.rdev()),
        };
        if !meta.is_dir() && meta.nlink() > 1 {
            inodes.push((meta.ino(), name.clone()));
        }
        let attributes = if meta.is_file() || meta.is_dir() {
            run(Command::new("getfattr")
                .args(["--absolute-names", "-d", "-m", "^(user|security)\\.", "-e", "hex"])
                .arg(&path))
            .lines()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
        } else {
            String::new()
        };
        lines.push(format!(
            "{name} {what} {:o} {}:{} {}.{:09} {attributes}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec()
        ));
    }
    inodes.sort();
    for pair in inodes.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        lines.push(format!("{} and {} are one", pair[0].1, pair[1].1));
    }
    lines.sort();
    lines
}

/// A committed snapshot to stand on.
fn base(served: &Served, client: &Client) -> String {
    let image = images::make(
        served,
        "base",
        &[&[
            File("etc/passwd", "root\n"),
            File("etc/gone", "x"),
            File("etc/replaced-by-dir", "x"),
            File("var/cache/a/1", "1"),
            File("var/cache/b", "2"),
            File("opt/old/deep/file", "3"),
            File("usr/bin/tool", "tool"),
            Dir("empty", 0o755),
            Dir("tmp", 0o1777),
            Dir(".", 0o755),
        ]],
    );
    images::import(served, &image);
    let name = image.chains[0].clone();
    let key = "default/1/extract";
    let error = client.prepare_with(key, "", labels(&[("containerd.io/snapshot.ref", &name)]));
    assert_eq!(code(error), Code::AlreadyExists);
    client.names(&["kind==committed"]).pop().expect("one")
}

/// All that a program can do.
fn change(root: &Path) {
    let at = |name: &str| root.join(name);
    std::fs::remove_file(at("etc/gone")).expect("remove");
    std::fs::remove_file(at("etc/replaced-by-dir")).expect("remove");
    std::fs::create_dir(at("etc/replaced-by-dir")).expect("make");
    std::fs::write(at("etc/replaced-by-dir/in"), "in").expect("write");
    std::fs::write(at("etc/passwd"), "root\nuser\n").expect("write");
    std::fs::remove_dir_all(at("var/cache")).expect("remove");
    std::fs::create_dir_all(at("var/cache/new")).expect("make");
    std::fs::remove_dir_all(at("opt/old")).expect("remove");
    std::fs::write(at("opt/old"), "a file now").expect("write");
    std::fs::remove_dir(at("empty")).expect("remove");
    std::fs::set_permissions(at("usr/bin/tool"), std::fs::Permissions::from_mode(0o4755)).expect("chmod");
    std::fs::create_dir_all(at("new/deep")).expect("make");
    std::fs::write(at("new/one"), "linked").expect("write");
    std::fs::hard_link(at("new/one"), at("new/deep/two")).expect("link");
    symlink("../etc/passwd", at("new/link")).expect("link");
    symlink("/nowhere".repeat(40), at("new/long-link")).expect("link");
    let long = "n".repeat(250);
    std::fs::write(at(&format!("new/{long}")), "long").expect("write");
    run(Command::new("mkfifo").arg(at("new/fifo")));
    run(Command::new("setfattr").args(["-n", "user.mine", "-v", "a\nb"]).arg(at("new/one")));
    // A big one with holes, at the begin, within and at the end.
    let holes = std::fs::File::create(at("new/holes")).expect("make");
    holes.set_len(64 << 20).expect("truncate");
    std::os::unix::fs::FileExt::write_all_at(&holes, &[7; 5000], 9 << 20).expect("write");
    std::os::unix::fs::FileExt::write_all_at(&holes, b"x", 30 << 20).expect("write");
    std::fs::File::create(at("new/hole-alone")).expect("make").set_len(5 << 20).expect("truncate");
    std::fs::File::create(at("new/small-hole")).expect("make").set_len(5000).expect("truncate");
    let _socket = std::os::unix::net::UnixListener::bind(at("new/s"));
    std::fs::remove_file(at("new/s")).expect("remove");
    if rustix::process::geteuid().is_root()
        && std::fs::read_to_string("/proc/self/uid_map").expect("map").contains("4294967295")
    {
        run(Command::new("mknod").arg(at("new/null")).args(["c", "1", "3"]));
        run(Command::new("mknod").arg(at("new/disk")).args(["b", "259", "70000"]));
        std::os::unix::fs::chown(at("new/deep"), Some(12_345), Some(4_000_000_000)).expect("chown");
        std::os::unix::fs::chown(root, Some(5), Some(6)).expect("chown");
        run(Command::new("setfattr")
            .args(["-n", "security.capability", "-v", "0x0100000200040000000000000000000000000000"])
            .arg(at("usr/bin/tool")));
    }
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o751)).expect("chmod");
}

fn what_a_container_changed_is_a_layer_that_gives_it_again() {
    let (served, containerd) = node();
    let client = served.client();
    let base = base(&served, &client);
    let at = served.mount(&client.prepare("default/2/web", &base).expect("prepare"), "web");
    change(at.root());
    let want = told(at.root());
    let blob = compare(&client, "default/2/web", "").expect("compare");
    assert_eq!(blob.media_type, GZIP);
    // It lies in the content store, says what is in it, and is kept until it is named.
    let (bytes, said, leases) = {
        let blobs = containerd.0.lock().expect("no panic");
        assert!(blobs.begun.is_empty());
        (blobs.by_digest[&blob.digest].clone(), blobs.labels[&blob.digest].clone(), blobs.leases.clone())
    };
    assert_eq!(blob.size, bytes.len() as i64);
    assert!(bytes.len() < 200_000, "holes are not written: {}", bytes.len());
    assert_eq!(said["containerd.io/uncompressed"], sha256(&gunzip(&bytes)));
    let [(namespace, lease)] = &leases[..] else { panic!("{leases:?}") };
    assert!(namespace == "default" && lease.labels["containerd.io/gc.expire"].ends_with('Z'), "{leases:?}");
    // Applied upon the same parent, it shows the same.
    let mounts = client.prepare("default/3/extract", &base).expect("prepare");
    assert_eq!(apply(&client, &blob, &mounts).expect("apply"), said["containerd.io/uncompressed"]);
    client.commit("default/3/again", "default/3/extract").expect("commit");
    let again = served.mount(&client.view("default/4/look", "default/3/again").expect("view"), "look");
    let got = told(again.root());
    for (want, got) in want.iter().zip(&got) {
        assert_eq!(got, want);
    }
    assert_eq!(got.len(), want.len());
    let holes = std::fs::metadata(again.path("new/holes")).expect("stat");
    // A FUSE mount tells no holes.
    assert!(holes.len() == 64 << 20 && (holes.blocks() < 100 || is_by_fuse()), "{}", holes.blocks());
}

fn the_same_changes_give_the_same_bytes() {
    let (served, containerd) = node();
    let client = served.client();
    let base = base(&served, &client);
    let at = served.mount(&client.prepare("default/2/web", &base).expect("prepare"), "web");
    change(at.root());
    let first = compare(&client, "default/2/web", PLAIN).expect("compare");
    // The second time the content store has it already; its labels are there all the same.
    containerd.0.lock().expect("no panic").labels.insert(first.digest.clone(), Labels::new());
    let second = compare(&client, "default/2/web", PLAIN).expect("compare");
    assert_eq!(first, second);
    let blobs = containerd.0.lock().expect("no panic");
    assert_eq!(blobs.labels[&first.digest]["containerd.io/uncompressed"], first.digest);
    assert!(blobs.begun.is_empty());
}

fn a_committed_snapshot_is_the_layer_that_it_was() {
    let (served, containerd) = node();
    let client = served.client();
    let base = base(&served, &client);
    let at = served.mount(&client.prepare("default/2/web", &base).expect("prepare"), "web");
    change(at.root());
    let before = compare(&client, "default/2/web", PLAIN).expect("compare");
    drop(at);
    client.commit("default/2/done", "default/2/web").expect("commit");
    assert_eq!(compare(&client, "default/2/done", PLAIN).expect("compare"), before);
    // One of the store's: what a downloaded layer was.
    let tar = std::fs::read(images::tar(
        &served,
        "layer",
        &[File("a", "1"), File("etc/.wh.passwd", ""), File("var/.wh..wh..opq", "")],
    ));
    let bytes = tar.expect("read");
    let blob = containerd.put(PLAIN, bytes);
    let mounts = client.prepare("default/6/extract", &base).expect("prepare");
    apply(&client, &blob, &mounts).expect("apply");
    client.commit("default/6/layer", "default/6/extract").expect("commit");
    let made = compare(&client, "default/6/layer", PLAIN).expect("compare");
    let bytes = containerd.0.lock().expect("no panic").by_digest[&made.digest].clone();
    std::fs::write(served.path("made.tar"), bytes).expect("write");
    let listed = run(Command::new("tar").arg("-tf").arg(served.path("made.tar")));
    for name in ["a", "etc/.wh.passwd", "var/.wh..wh..opq"] {
        assert!(listed.lines().any(|line| line == name), "{name}: {listed}");
    }
    // Of one that stands on nothing, from an empty view.
    let alone = served.mount(&client.prepare("default/7/alone", "").expect("prepare"), "alone");
    alone.write("f", "1");
    let made = compare(&client, "default/7/alone", PLAIN).expect("compare");
    std::fs::write(served.path("made.tar"), &containerd.0.lock().expect("no panic").by_digest[&made.digest])
        .expect("write");
    assert_eq!(run(Command::new("tar").arg("-tf").arg(served.path("made.tar"))), "./\nf\n");
}

fn tar_and_podman_read_it() {
    let (served, containerd) = node();
    let client = served.client();
    let at = served.mount(&client.prepare("default/2/web", "").expect("prepare"), "web");
    std::fs::create_dir_all(at.path("d")).expect("make");
    for (name, length, data) in [("begin", 3 << 20, 0), ("middle", 8 << 20, 4 << 20), ("end", 6 << 20, (6 << 20) - 3)] {
        let file = std::fs::File::create(at.path(&format!("d/{name}"))).expect("make");
        file.set_len(length).expect("truncate");
        std::os::unix::fs::FileExt::write_all_at(&file, b"abc", data).expect("write");
    }
    std::fs::File::create(at.path("d/nothing")).expect("make").set_len(2 << 20).expect("truncate");
    let made = compare(&client, "default/2/web", PLAIN).expect("compare");
    std::fs::write(served.path("made.tar"), &containerd.0.lock().expect("no panic").by_digest[&made.digest])
        .expect("write");
    for (name, how) in [
        ("gnu", "tar -xf made.tar -C gnu"),
        ("python", "python3 -c \"import tarfile; tarfile.open('made.tar').extractall('python')\""),
    ] {
        std::fs::create_dir(served.path(name)).expect("make");
        run(Command::new("sh").arg("-c").arg(how).current_dir(served.path("")));
        run(Command::new("diff").arg("-r").arg(at.path("d")).arg(served.path(&format!("{name}/d"))));
    }
}

fn media_types_and_times() {
    let (served, containerd) = node();
    let client = served.client();
    let at = served.mount(&client.prepare("default/2/web", "").expect("prepare"), "web");
    at.write("f", "1");
    let plain = compare(&client, "default/2/web", PLAIN).expect("compare");
    let want = containerd.0.lock().expect("no panic").by_digest[&plain.digest].clone();
    for (media_type, unpack) in [
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "gzip"),
        ("application/vnd.oci.image.layer.v1.tar+zstd", "zstd"),
    ] {
        let made = compare(&client, "default/2/web", media_type).expect("compare");
        assert_eq!(made.media_type, media_type);
        let path = served.path("packed");
        std::fs::write(&path, &containerd.0.lock().expect("no panic").by_digest[&made.digest]).expect("write");
        let said =
            Command::new(unpack).arg("-dc").stdin(std::fs::File::open(&path).expect("open")).output().expect("run");
        assert!(said.status.success() && said.stdout == want, "{media_type}");
    }
    assert_eq!(code(compare(&client, "default/2/web", "application/x-tar")), Code::Unimplemented);
    let _ = client.remove("default/90/left");
    // No time is later than the one asked for.
    let left = client.view("default/8/left", "").expect("view");
    let right = client.mounts("default/2/web").expect("mounts");
    let epoch = Some(crate::client::Time { seconds: 1000, nanos: 0 });
    let asked = DiffAsked { left, right, media_type: PLAIN.into(), epoch, ..DiffAsked::default() };
    let made = diff(&client, asked).expect("diff");
    std::fs::write(served.path("made.tar"), &containerd.0.lock().expect("no panic").by_digest[&made.digest])
        .expect("write");
    let listed = run(Command::new("tar").args(["--utc", "--full-time", "-tvf"]).arg(served.path("made.tar")));
    assert!(listed.lines().count() == 2 && listed.lines().all(|line| line.contains("1970-01-01 00:16:40")), "{listed}");
}

fn what_it_does_not_make_is_left_to_containerd() {
    let (served, containerd) = node();
    let client = served.client();
    let base = base(&served, &client);
    let web = client.prepare("default/2/web", &base).expect("prepare");
    let other = client.prepare("default/3/other", "").expect("prepare");
    let left = client.view("default/4/left", &base).expect("view");
    let nothing = client.view("default/5/nothing", "").expect("view");
    let elsewhere = vec![Mount { source: served.path("").display().to_string(), ..other[0].clone() }];
    let asked = |left: &[Mount], right: &[Mount]| {
        diff(&client, DiffAsked { left: left.to_vec(), right: right.to_vec(), ..DiffAsked::default() })
    };
    for (left, right) in
        [(&left, &other), (&nothing, &web), (&web, &left), (&left, &left), (&elsewhere, &web), (&left, &elsewhere)]
    {
        assert_eq!(code(asked(left, right)), Code::Unimplemented, "{left:?} {right:?}");
    }
    // The layer of the store that was claimed: nobody said for whom.
    assert_eq!(code(asked(&nothing, &left)), Code::Unimplemented);
    assert!(asked(&left, &web).is_ok() && asked(&nothing, &other).is_ok());
    assert_eq!(containerd.0.lock().expect("no panic").leases.len(), 2);
}

fn a_content_store_that_fails_leaves_nothing() {
    let (served, containerd) = node();
    let client = served.client();
    let at = served.mount(&client.prepare("default/2/web", "").expect("prepare"), "web");
    std::fs::write(at.path("big"), vec![7_u8; 5 << 20]).expect("write");
    containerd.0.lock().expect("no panic").room = Some(1000);
    assert_eq!(code(compare(&client, "default/2/web", PLAIN)), Code::Internal);
    {
        let mut blobs = containerd.0.lock().expect("no panic");
        assert!(blobs.begun.is_empty() && blobs.by_digest.is_empty());
        blobs.room = None;
    }
    let _ = client.remove("default/90/left");
    assert!(compare(&client, "default/2/web", PLAIN).is_ok());
    assert!(!served.log().contains("panicked"));
}

fn names_that_would_hide_are_left_out() {
    let (served, containerd) = node();
    let client = served.client();
    let base = base(&served, &client);
    let at = served.mount(&client.prepare("default/2/web", &base).expect("prepare"), "web");
    at.write("etc/.wh.passwd", "");
    std::fs::create_dir(at.path("var/.wh..wh..opq")).expect("make");
    at.write("etc/other", "x");
    let _socket = std::os::unix::net::UnixListener::bind(at.path("etc/s")).expect("bind");
    assert!(std::fs::metadata(at.path("etc/s")).expect("stat").file_type().is_socket());
    let made = compare(&client, "default/2/web", PLAIN).expect("compare");
    std::fs::write(served.path("made.tar"), &containerd.0.lock().expect("no panic").by_digest[&made.digest])
        .expect("write");
    // Of a socket goes what it may have replaced: the layers below are not looked at.
    let names = run(Command::new("tar").arg("-tf").arg(served.path("made.tar")));
    assert_eq!(names, "./\netc/\netc/other\netc/.wh.s\nvar/\n");
    assert!(served.log().contains("etc/.wh.passwd is left out"), "{}", served.log());
}
