//! Snapshots for pods with user namespaces: the labels of `remap-ids`, and what the mounts then show.

use std::os::unix::fs::MetadataExt as _;

use tonic::Code;

use crate::client::{Client, Labels, code, labels};
use crate::content::{PLAIN, node};
use crate::diff::apply;
use crate::images::{self, Entry::Dir, Entry::File};
use crate::served::{Mounted, Served, is_by_fuse};

crate::tests![
    a_copy_with_the_owners_is_left_as_it_is,
    layers_show_the_owners_of_the_namespace,
    mounts_of_maps_come_and_go,
    labels_that_are_no_maps,
];

fn maps(first: u32) -> Labels {
    let map = format!("0:{first}:65536");
    labels(&[("containerd.io/snapshot/uidmapping", &map), ("containerd.io/snapshot/gidmapping", &map)])
}

/// Not in a user namespace: no mount of the host's can be mapped there.
fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.contains("4294967295"))
}

fn owner(at: &Mounted, name: &str) -> (u32, u32) {
    let meta = std::fs::symlink_metadata(at.path(name)).expect("stat");
    (meta.uid(), meta.gid())
}

fn mounts_below(served: &Served) -> usize {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let below = served.state().join("m").display().to_string();
    table.lines().filter(|line| line.contains(&below)).count()
}

/// Two layers of the store, claimed, and one that a snapshot has.
fn base(served: &Served, client: &Client) -> String {
    let layers: [images::Layer<'_>; 2] =
        [&[File("etc/a", "1"), Dir("home", 0o755), Dir(".", 0o755)], &[File("etc/b", "2"), Dir(".", 0o755)]];
    let image = images::make(served, "base", &layers);
    images::import(served, &image);
    let mut parent = String::new();
    for (number, chain) in image.chains.iter().enumerate() {
        let asked = client.prepare_with(
            &format!("k8s.io/{number}/x"),
            &parent,
            labels(&[("containerd.io/snapshot.ref", chain)]),
        );
        assert_eq!(code(asked), Code::AlreadyExists);
        parent = format!("fsprov/{chain}");
    }
    let at = served.mount(&client.prepare("k8s.io/3/x", &parent).expect("prepare"), "own");
    at.write("etc/c", "3");
    std::os::unix::fs::chown(at.path("etc/c"), Some(33), Some(44)).expect("chown");
    drop(at);
    client.commit("k8s.io/3/own", "k8s.io/3/x").expect("commit");
    "k8s.io/3/own".into()
}

fn layers_show_the_owners_of_the_namespace() {
    if !is_root() {
        return;
    }
    let (mut served, containerd) = node();
    let client = served.client();
    let base = base(&served, &client);
    let used = std::process::Command::new("du")
        .args(["-s", "--exclude=m"])
        .arg(served.path("root"))
        .output()
        .expect("du")
        .stdout;
    let mounts = client.prepare_with("k8s.io/4/web", &base, maps(200_000)).expect("prepare");
    let at = served.mount(&mounts, "web");
    for (name, want) in [("", 0), ("etc", 0), ("etc/a", 0), ("etc/b", 0), ("home", 0)] {
        assert_eq!(owner(&at, name), (200_000 + want, 200_000 + want), "{name}");
    }
    assert_eq!(owner(&at, "etc/c"), (200_033, 200_044));
    // What the container writes is its own; a copy made for a change keeps the owner.
    std::os::unix::fs::chown(at.path("etc/a"), Some(200_001), Some(200_002)).expect("chown");
    at.write("etc/c", "changed");
    assert_eq!((owner(&at, "etc/a"), owner(&at, "etc/c")), ((200_001, 200_002), (200_033, 200_044)));
    // Another namespace, and none, on the same layers.
    let other = served.mount(&client.prepare_with("k8s.io/5/other", &base, maps(500_000)).expect("prepare"), "other");
    assert_eq!((owner(&other, "etc/a"), other.read("etc/c")), ((500_000, 500_000), "3".into()));
    let plain = served.mount(&client.prepare("k8s.io/6/plain", &base).expect("prepare"), "plain");
    assert_eq!(owner(&plain, "etc/c"), (33, 44));
    let now = std::process::Command::new("du")
        .args(["-s", "--exclude=m"])
        .arg(served.path("root"))
        .output()
        .expect("du")
        .stdout;
    let kilobytes =
        |text: &[u8]| String::from_utf8_lossy(text).split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
    assert!(kilobytes(&now).expect("du") < kilobytes(&used).expect("du") + 100, "nothing is copied");
    // A layer made of it has the image's owners; it is not committed as it is.
    assert_eq!(code(client.commit("k8s.io/9/done", "k8s.io/4/web")), Code::FailedPrecondition);
    let made = crate::compare::compare(&client, "k8s.io/4/web", PLAIN).expect("compare");
    let mounts = client.prepare("k8s.io/10/extract", &base).expect("prepare");
    apply(&client, &made, &mounts).expect("apply");
    client.commit("k8s.io/10/again", "k8s.io/10/extract").expect("commit");
    let again = served.mount(&client.view("k8s.io/11/v", "k8s.io/10/again").expect("view"), "again");
    assert_eq!((owner(&again, "etc/a"), owner(&again, "etc/c"), owner(&again, "")), ((1, 2), (33, 44), (0, 0)));
    drop(containerd);
    // The snapshotter dies, and comes again: all goes on.
    served.kill();
    assert_eq!(at.read("etc/b"), "2");
    served.start(&[]);
    let client = served.client();
    let twice = served.mount(&client.mounts("k8s.io/5/other").expect("mounts"), "twice");
    assert_eq!(owner(&twice, "etc/b"), (500_000, 500_000));
}

/// As containerd 1.7 does it, where the configuration does not say that we can.
fn a_copy_with_the_owners_is_left_as_it_is() {
    if !is_root() {
        return;
    }
    let served = Served::new();
    let client = served.client();
    let at = served.mount(&client.prepare("k8s.io/1/sha256:0-200000-200000-remap", "").expect("prepare"), "copy");
    at.write("a", "1");
    for name in ["", "a"] {
        std::os::unix::fs::chown(at.path(name), Some(200_000), Some(200_000)).expect("chown");
    }
    drop(at);
    let copy = "k8s.io/2/sha256:0-200000-200000";
    client.commit(copy, "k8s.io/1/sha256:0-200000-200000-remap").expect("commit");
    let at = served.mount(&client.prepare_with("k8s.io/3/web", copy, maps(200_000)).expect("prepare"), "web");
    assert_eq!((owner(&at, ""), owner(&at, "a")), ((200_000, 200_000), (200_000, 200_000)));
    // Another map is another matter.
    let at = served.mount(&client.prepare_with("k8s.io/4/other", copy, maps(300_000)).expect("prepare"), "other");
    assert_eq!(owner(&at, "a"), (65_534, 65_534));
}

fn mounts_of_maps_come_and_go() {
    if !is_root() || is_by_fuse() {
        return;
    }
    let mut served = Served::new();
    let client = served.client();
    let base = base(&served, &client);
    for number in 0..6 {
        client.prepare_with(&format!("k8s.io/1/{number}"), &base, maps(100_000 * (1 + number / 2))).expect("prepare");
    }
    assert_eq!(mounts_below(&served), 6, "two for each map");
    client.remove("k8s.io/1/0").expect("remove");
    assert_eq!(mounts_below(&served), 6);
    client.remove("k8s.io/1/1").expect("remove");
    assert_eq!((mounts_below(&served), served.entries("m").len()), (4, 2));
    // As after a reboot: they are made again when they are asked for.
    for entry in served.entries("m") {
        for name in ["store", "own"] {
            let at = served.state().join("m").join(&entry).join(name);
            assert!(std::process::Command::new("umount").arg(at).status().expect("umount").success());
        }
    }
    served.kill();
    served.start(&[]);
    let client = served.client();
    assert_eq!(mounts_below(&served), 0);
    let at = served.mount(&client.mounts("k8s.io/1/4").expect("mounts"), "at");
    assert_eq!(owner(&at, "etc/b"), (300_000, 300_000));
    drop(at);
    // Killed before a snapshot of a new map was there: its mounts go at the next start.
    for number in 2..6 {
        client.remove(&format!("k8s.io/1/{number}")).expect("remove");
    }
    assert_eq!(mounts_below(&served), 0);
    if cfg!(feature = "failpoints") {
        served.kill();
        served.start(&[("FAILPOINTS", "snapshotter.publish=1*return(kill)->off")]);
        let _ = served.client().prepare_with("k8s.io/1/new", &base, maps(100_000));
        served.wait_dead();
        assert_eq!(mounts_below(&served), 2);
        served.start(&[]);
        assert_eq!((mounts_below(&served), served.entries("m").len()), (0, 0));
    }
}

fn labels_that_are_no_maps() {
    let served = Served::new();
    let client = served.client();
    let uid = "containerd.io/snapshot/uidmapping";
    let gid = "containerd.io/snapshot/gidmapping";
    for pairs in [
        &[(uid, "0:200000:65536")][..],
        &[(uid, "0:200000:65536"), (gid, "x")],
        &[(uid, "0:0:0"), (gid, "0:0:1")],
        &[(uid, "0:4294967295:2"), (gid, "0:0:1")],
    ] {
        assert_eq!(code(client.prepare_with("a", "", labels(pairs))), Code::InvalidArgument, "{pairs:?}");
    }
    assert!(!served.log().contains("panicked"));
}
