//! Layers that the store has, as snapshots.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use tonic::Code;

use crate::client::{COMMITTED, Client, Labels, code, labels};
use crate::images::{self, Entry::Bare, Entry::Dir, Entry::File, Image, layers_in_store};
use crate::served::{Served, is_by_fuse};

crate::tests![
    layers_of_the_store_are_committed_on_request,
    a_directory_without_an_entry_covers_none_below,
    a_damaged_record_keeps_what_is_claimed,
    without_the_label_nothing_is_claimed,
    chains_that_the_store_does_not_have,
    claimed_images_and_layers_stay,
    a_lost_state_is_made_again_of_the_store,
    a_kill_within_a_claim_leaves_it_done_or_undone,
    one_claim_serves_all_who_ask,
    nothing_is_claimed_where_that_is_switched_off,
];

const REFERENCE: &str = "containerd.io/snapshot.ref";

/// Four layers: files; whiteouts and an opaque directory; an empty one, twice.
fn image(served: &Served, name: &str) -> Image {
    let empty: images::Layer<'_> = &[Dir(".", 0o755)];
    images::make(
        served,
        name,
        &[
            &[
                File("etc/base", name),
                File("etc/gone", "x"),
                File("var/a/old", "x"),
                Dir("tmp", 0o1777),
                Dir(".", 0o751),
            ],
            empty,
            &[
                File("etc/.wh.gone", ""),
                File("var/a/.wh..wh..opq", ""),
                File("var/a/new", "y"),
                File("etc/mid", "m"),
                Dir(".", 0o711),
            ],
            empty,
        ],
    )
}

/// As containerd's unpacker asks: a key of its own, the chain id in the label, the name that it was told as the parent.
fn claim(client: &Client, parent: &str, chain: &str) -> Result<String, tonic::Status> {
    let asked = client.prepare_with(&format!("default/9/extract-1 {chain}"), parent, labels(&[(REFERENCE, chain)]));
    match asked {
        Ok(mounts) => panic!("it is to be unpacked: {mounts:?}"),
        Err(status) if status.code() == Code::AlreadyExists => {}
        Err(status) => return Err(status),
    }
    let found = client.list(&[&format!("labels.\"{REFERENCE}\"=={chain},parent==\"{parent}\"")])?;
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(client.stat(&found[0].name)?.kind, COMMITTED);
    Ok(found[0].name.clone())
}

fn claim_all(client: &Client, image: &Image) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for chain in &image.chains {
        let parent = names.last().cloned().unwrap_or_default();
        names.push(claim(client, &parent, chain).expect("claim"));
    }
    names
}

fn code_of(served: &Served, args: &[&str]) -> (i32, String) {
    let said = served.fsprov().args(args).output().expect("run fsprov");
    let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    (said.status.code().expect("a code"), text)
}

fn layers_of_the_store_are_committed_on_request() {
    let served = Served::new();
    let image = image(&served, "base");
    images::import(&served, &image);
    let client = served.client();
    let names = claim_all(&client, &image);
    let mounts = client.prepare("web", names.last().expect("names")).expect("prepare");
    let lower = mounts[0].options.iter().find(|option| option.starts_with("lowerdir=")).expect("lower layers");
    assert_eq!(lower.split(':').count(), if is_by_fuse() { 1 } else { 3 }, "the empty layer is there once: {lower}");
    // BuildKit walks them: a link would seem to have nothing in it.
    let dirs = &lower["lowerdir=".len()..];
    assert!(dirs.split(':').all(|one| std::fs::symlink_metadata(one).is_ok_and(|meta| meta.is_dir())), "{lower}");
    let at = served.mount(&mounts, "web");
    assert_eq!(
        (at.read("etc/base").as_str(), at.read("etc/mid").as_str(), at.read("var/a/new").as_str()),
        ("base", "m", "y")
    );
    assert!(!at.path("etc/gone").exists() && !at.path("var/a/old").exists() && !at.path("etc/.wh.gone").exists());
    assert_eq!(std::fs::read_dir(at.path("var/a")).expect("list").count(), 1);
    let mode = |name: &str| std::fs::metadata(at.path(name)).expect("stat").mode() & 0o7777;
    assert_eq!((mode("tmp"), mode(".")), (0o1777, 0o755), "as the topmost layer has it");
    at.write("etc/base", "changed");
    // The store's own files are never written to.
    let in_store = images::layer_dir(&served, &image.diff_ids[0]).join("rootfs/etc/base");
    assert_eq!(std::fs::read_to_string(in_store).expect("read"), "base");
    // A view of one layer, and of all.
    let one = served.mount(&client.view("one", &names[0]).expect("view"), "one");
    assert_eq!(one.read("etc/gone"), "x");
    assert!(std::fs::write(one.path("new"), "").is_err() && std::fs::write(one.path("etc/base"), "").is_err());
    let all = served.mount(&client.view("all", &names[3]).expect("view"), "all");
    assert!(all.read("etc/mid") == "m" && std::fs::write(all.path("new"), "").is_err());
    let usage = client.usage(&names[0]).expect("usage");
    assert!(usage.size >= 6 && usage.inodes >= 6, "{usage:?}");
}

/// Claimed, and applied to what containerd unpacked itself.
fn a_directory_without_an_entry_covers_none_below() {
    let served = Served::new();
    let image = images::make(
        &served,
        "bare",
        &[
            &[Dir("tmp", 0o1777), Dir("root", 0o700), Dir("usr", 0o755), File("etc/a", "a"), Dir(".", 0o755)],
            &[Bare("tmp/x"), Bare("root/x")],
            &[Bare("usr/x")],
        ],
    );
    images::import(&served, &image);
    let client = served.client();
    let names = claim_all(&client, &image);
    let check = |key: &str, parent: &str| {
        let mounts = client.prepare(key, parent).expect("prepare");
        let lower = mounts[0].options.iter().any(|option| option.contains("/f/m/"));
        let at = served.mount(&mounts, key);
        let mode = |name: &str| std::fs::metadata(at.path(name)).expect("stat").mode() & 0o7777;
        assert_eq!((mode("tmp"), mode("root"), mode("usr")), (0o1777, 0o700, 0o755), "{key}");
        assert!(at.path("tmp/x").exists() && at.path("root/x").exists());
        lower
    };
    assert!(check("web", &names[1]));
    assert!(check("all", &names[2]));
    // The directory that is covered looks the same: that takes no FUSE.
    let alone = images::make(&served, "same", &[&[Dir("usr", 0o755), File("etc/a", "b")], &[Bare("usr/x")]]);
    images::import(&served, &alone);
    let names = claim_all(&client, &alone);
    let mounts = client.prepare("same", names.last().expect("names")).expect("prepare");
    assert_eq!(mounts[0].options.iter().any(|option| option.contains("/f/m/")), is_by_fuse(), "{mounts:?}");
    // Upon files of the snapshotter's own.
    let files = client.prepare("extract", "").expect("prepare");
    {
        let at = served.mount(&files, "extract");
        for (name, mode) in [("tmp", 0o1777), ("root", 0o700), ("usr", 0o755)] {
            std::fs::create_dir(at.path(name)).expect("make");
            std::fs::set_permissions(at.path(name), std::fs::Permissions::from_mode(mode)).expect("chmod");
        }
    }
    let chain = &image.chains[0];
    client.commit(&format!("default/7/{chain}"), "extract").expect("commit");
    let above = claim(&client, &format!("default/7/{chain}"), &image.chains[1]).expect("claim");
    assert!(check("upon", &above));
}

/// A container may stand on the snapshot that is left out, and then its layers are not to be deleted.
fn a_damaged_record_keeps_what_is_claimed() {
    let mut served = Served::new();
    let image = image(&served, "base");
    images::import(&served, &image);
    let client = served.client();
    claim_all(&client, &image);
    let have = layers_in_store(&served);
    served.kill();
    for number in served.entries("s") {
        let record = served.state().join("s").join(number).join("record.json");
        let text = std::fs::read_to_string(&record).expect("read");
        std::fs::write(&record, text.replace("\"committed\"", "\"commitTed\"")).expect("write");
    }
    served.start(&[]);
    assert!(served.log().contains("is left out"), "{}", served.log());
    code_of(&served, &["image", "rm", "example.com/base:1"]);
    assert_eq!(code_of(&served, &["image", "gc", "--unused"]).0, 0);
    assert_eq!(layers_in_store(&served), have);
}

fn without_the_label_nothing_is_claimed() {
    let served = Served::new();
    let image = image(&served, "base");
    images::import(&served, &image);
    let client = served.client();
    client.prepare(&format!("default/1/extract {}", image.chains[0]), "").expect("prepare");
    client.prepare_with("other", "", labels(&[(REFERENCE, "nonsense")])).expect("prepare");
    client.prepare_with("third", "", labels(&[("containerd.io/snapshot/x", &image.chains[0])])).expect("prepare");
    assert_eq!(client.names(&["kind==committed"]).len(), 0);
    // What containerd unpacks itself, with the label or without, is a snapshot like others, and the next layer may be the store's again.
    let mounts = client.prepare("k8s.io/2/extract", "").expect("prepare");
    served.mount(&mounts, "mine").write("mine", "1");
    let own = format!("k8s.io/3/{}", image.chains[0]);
    client.commit(&own, "k8s.io/2/extract").expect("commit");
    let next = claim(&client, &own, &image.chains[1]).expect("claim");
    let at = served.mount(&client.prepare("web", &next).expect("prepare"), "web");
    assert_eq!(at.read("mine"), "1");
}

fn chains_that_the_store_does_not_have() {
    let served = Served::new();
    let (image, other) = (image(&served, "base"), image(&served, "other"));
    images::import(&served, &image);
    let client = served.client();
    let first = claim(&client, "", &image.chains[0]).expect("claim");
    // A chain that is not in the store; one of the store upon the wrong parent.
    for (key, parent, chain) in [
        ("a", "", &other.chains[0]),
        ("b", "", &image.chains[2]),
        ("c", first.as_str(), &image.chains[2]),
        ("d", first.as_str(), &image.chains[0]),
    ] {
        let mounts = client.prepare_with(key, parent, labels(&[(REFERENCE, chain)])).expect("prepare");
        assert_eq!(mounts[0].options.iter().any(|o| o.starts_with("upperdir=")), !parent.is_empty(), "{key}");
    }
    assert_eq!(code(claim(&client, "nothing", &image.chains[1])), Code::NotFound);
    // A layer that is damaged is unpacked again by containerd.
    std::fs::remove_file(images::layer_dir(&served, &image.diff_ids[2]).join("index")).expect("remove");
    let second = claim(&client, &first, &image.chains[1]).expect("claim");
    client.prepare_with("e", &second, labels(&[(REFERENCE, &image.chains[2])])).expect("prepare");
}

fn claimed_images_and_layers_stay() {
    let mut served = Served::new();
    let image = image(&served, "base");
    images::import(&served, &image);
    let client = served.client();
    let names = claim_all(&client, &image);
    client.prepare("web", &names[3]).expect("prepare");
    for round in 0..2 {
        let (code, said) = code_of(&served, &["image", "rm", "-f", "example.com/base:1"]);
        assert!(code == 1 || code == 4, "{code} {said}");
        assert!(said.contains("containerd's snapshots stand on its layers"), "{said}");
        assert_eq!(code_of(&served, &["image", "gc", "--unused"]).0, 0);
        assert_eq!(layers_in_store(&served), 3, "round {round}");
        // Also while the snapshotter is away.
        served.kill();
    }
    served.start(&[]);
    let client = served.client();
    // One layer less: the image may go, the layers below stay.
    client.remove("web").expect("remove");
    client.remove(&names[3]).expect("remove");
    client.remove(&names[2]).expect("remove");
    assert_eq!(code_of(&served, &["image", "rm", "example.com/base:1"]).0, 0);
    assert_eq!(code_of(&served, &["image", "gc"]).0, 0);
    assert_eq!(layers_in_store(&served), 2);
    let at = served.mount(&client.prepare("again", &names[1]).expect("prepare"), "again");
    assert_eq!(at.read("etc/gone"), "x");
    drop(at);
    for name in ["again", &names[1], &names[0]] {
        client.remove(name).expect("remove");
    }
    assert_eq!(code_of(&served, &["image", "gc"]).0, 0);
    assert_eq!(layers_in_store(&served), 0);
}

fn a_lost_state_is_made_again_of_the_store() {
    let mut served = Served::new();
    let image = image(&served, "base");
    images::import(&served, &image);
    let names = claim_all(&served.client(), &image);
    served.kill();
    served.lose_state();
    served.start(&[]);
    let client = served.client();
    assert_eq!(client.names(&[]), Vec::<String>::new());
    // containerd knows the name, and stands on it.
    let at = served.mount(&client.prepare("web", &names[3]).expect("prepare"), "web");
    assert_eq!((at.read("etc/base").as_str(), at.read("etc/mid").as_str()), ("base", "m"));
    let mut made = client.names(&["kind==committed"]);
    let mut known = names.clone();
    made.sort();
    known.sort();
    assert_eq!(made, known);
    assert_eq!(client.stat(&names[1]).expect("stat").labels, labels(&[(REFERENCE, &image.chains[1])]));
    let other = format!("fsprov/sha256:{}", "0".repeat(64));
    assert_eq!((code(client.prepare("x", &other)), code(client.stat(&other))), (Code::NotFound, Code::NotFound));
    drop(at);
    // The claims, too, are those of the state.
    assert_eq!(code_of(&served, &["image", "gc", "--unused"]).0, 0);
    assert_eq!(layers_in_store(&served), 3);
    served.kill();
    served.lose_state();
    served.start(&[]);
    assert_eq!(code_of(&served, &["image", "gc", "--unused"]).0, 0);
    assert_eq!(layers_in_store(&served), 0, "nobody claims them");
    served.kill();
}

fn a_kill_within_a_claim_leaves_it_done_or_undone() {
    if !cfg!(feature = "failpoints") {
        return;
    }
    for step in [
        "store.claim",
        "durable.write",
        "durable.sync",
        "durable.rename",
        "durable.sync_dir",
        "snapshotter.make",
        "snapshotter.publish",
    ] {
        for count in 0..4 {
            let mut served = Served::stopped();
            let image = images::make(&served, "base", &[&[File("a", "1")], &[File("b", "2")]]);
            images::import(&served, &image);
            let before = if count == 0 { String::new() } else { format!("{count}*off->") };
            served.start(&[("FAILPOINTS", &format!("{step}={before}1*return(kill)->off"))]);
            let client = served.client();
            let story = || -> Result<(), tonic::Status> {
                let first = claim(&client, "", &image.chains[0])?;
                let second = claim(&client, &first, &image.chains[1])?;
                client.remove(&second)?;
                client.remove(&first)
            };
            let _ = story();
            served.kill();
            served.start(&[]);
            let client = served.client();
            let committed = client.list(&[]).expect("list");
            // Claims are as the snapshots are, and what is there can be used.
            assert_eq!(
                std::fs::read_dir(served.path("root/claims/snapshotter")).map_or(0, |all| all.count()),
                committed.len(),
                "{step} {count}"
            );
            assert_eq!(code_of(&served, &["image", "gc", "--unused"]).0, 0);
            for (number, info) in committed.iter().enumerate() {
                let view = served.mount(&client.view(&format!("look-{number}"), &info.name).expect("view"), "look");
                assert_eq!(view.read("a"), "1", "{step} {count}");
            }
            assert!(served.entries("new").is_empty(), "{step} {count}");
        }
    }
}

fn one_claim_serves_all_who_ask() {
    let served = Served::new();
    let image = image(&served, "base");
    images::import(&served, &image);
    let client = served.client();
    let names = claim_all(&client, &image);
    // Another namespace of containerd: the same snapshots.
    assert_eq!(claim_all(&client, &image), names);
    // Upon another parent of the same chain id, one of its own; the layer is claimed once.
    client.prepare("extract", "").expect("prepare");
    let own = format!("k8s.io/3/{}", image.chains[0]);
    client.commit(&own, "extract").expect("commit");
    let other = claim(&client, &own, &image.chains[1]).expect("claim");
    assert_ne!(other, names[1]);
    assert_eq!(client.stat(&other).expect("stat").parent, own);
    client.remove(&other).expect("remove");
    assert!(served.path("root/claims/snapshotter").join(image.diff_ids[1].replace(':', "-")).exists());
    // Its label was taken away: it is not found by it, and another one is made.
    client.update(&names[3], Labels::new(), &["labels"]).expect("update");
    assert_ne!(claim(&client, &names[2], &image.chains[3]).expect("claim"), names[3]);
}

fn nothing_is_claimed_where_that_is_switched_off() {
    let mut served = Served::stopped();
    let image = image(&served, "base");
    images::import(&served, &image);
    served.start_with(&["--no-claims"], &[]);
    let client = served.client();
    client.prepare_with("a", "", labels(&[(REFERENCE, &image.chains[0])])).expect("prepare");
    assert_eq!(client.names(&[]), ["a"]);
    client.remove("a").expect("remove");
    served.kill();
    served.start(&[]);
    claim(&served.client(), "", &image.chains[0]).expect("claim");
}
