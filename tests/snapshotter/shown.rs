//! What people see of it: `fsprov list`, and the figures for Prometheus.

use std::collections::{BTreeMap, BTreeSet};

use tonic::Code;

use crate::client::{code, labels};
use crate::images::{self, Entry::Dir, Entry::File};
use crate::served::{Served, is_by_fuse};

crate::tests![
    list_shows_snapshots_that_are_mounted,
    list_shows_views_and_other_state_directories,
    figures_are_prometheus_and_move,
];

fn list(served: &Served, args: &[&str]) -> String {
    let said = served.fsprov().arg("list").args(args).output().expect("run fsprov");
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).into_owned()
}

fn list_shows_snapshots_that_are_mounted() {
    let mut served = Served::new();
    let layers: [images::Layer<'_>; 2] =
        [&[File("etc/a", "1"), Dir(".", 0o755)], &[File("etc/b", "2"), Dir(".", 0o755)]];
    let image = images::make(&served, "app", &layers);
    images::import(&served, &image);
    let client = served.client();
    let mut top = String::new();
    for (number, chain) in image.chains.iter().enumerate() {
        let pairs = [("containerd.io/snapshot.ref", chain.as_str()), ("containerd.io/snapshot/cri.image-ref", "app:1")];
        let asked = client.prepare_with(&format!("k8s.io/{number}/extract"), &top, labels(&pairs));
        assert_eq!(code(asked), Code::AlreadyExists);
        top = format!("fsprov/{chain}");
    }
    let key = format!("k8s.io/7/{}", "0123456789abcdef".repeat(4));
    let mounts = client.prepare(&key, &top).expect("prepare");
    client.prepare("k8s.io/8/idle", &top).expect("prepare");
    let first = client.prepare("k8s.io/9/first", "").expect("prepare");
    if !is_by_fuse() {
        assert_eq!(list(&served, &[]), "", "none is mounted");
    }
    let (at, alone) = (served.mount(&mounts, "web"), served.mount(&first, "first"));
    served.kill();
    let told: serde_json::Value = serde_json::from_str(&list(&served, &["--snapshots", "--json"])).expect("JSON");
    let mut told: Vec<serde_json::Value> = told.as_array().expect("a list").clone();
    let lower: Vec<_> = told.iter().filter(|one| one["kind"] == "lower").cloned().collect();
    told.retain(|one| one["kind"] != "lower");
    let path = |name: &str| served.path(name).display().to_string();
    let want = [
        serde_json::json!({ "snapshot": key, "kind": "active", "form": "overlay", "image": "app:1", "at": path("web") }),
        serde_json::json!({ "snapshot": "k8s.io/9/first", "kind": "active", "form": "bind", "image": "", "at": path("first") }),
    ];
    assert_eq!(told, want);
    let of_fuse: Vec<_> =
        served.fuse_mounts().into_iter().map(|name| served.state().join("f/m").join(name).join("rootfs")).collect();
    assert_eq!(lower.len(), of_fuse.len());
    for (one, at) in lower.iter().zip(of_fuse) {
        assert_eq!((one["at"].as_str(), one["form"].as_str()), (at.to_str(), Some("fuse")));
        assert_eq!(one["image"].as_str(), image.chains.last().map(String::as_str));
    }
    let table = list(&served, &[]);
    let row = table.lines().find(|line| line.contains("k8s.io/7/")).unwrap_or_else(|| panic!("{table}"));
    let words: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(words, ["k8s.io/7/0123456789ab", "active", "overlay", "app:1", &path("web")]);
    assert!(!table.contains("idle"), "{table}");
    // They are containerd's: no script that ends all rootfses is told of them.
    assert_eq!((list(&served, &["-q"]).as_str(), list(&served, &["--json"]).trim()), ("", "[]"));
    drop((at, alone));
    served.start(&[]);
    assert!(!list(&served, &[]).contains("k8s.io"));
}

fn list_shows_views_and_other_state_directories() {
    let mut served = Served::stopped();
    // By a symlink: as it is named is how it stands in the mount table.
    std::fs::create_dir(served.path("elsewhere")).expect("mkdir");
    std::os::unix::fs::symlink("elsewhere", served.path("link")).expect("symlink");
    let state = served.path("link/state").display().to_string();
    served.start_with(&["--state", &state], &[]);
    let client = served.client();
    for (name, parent) in [("a", ""), ("b", "a")] {
        let mounts = client.prepare("extract", parent).expect("prepare");
        let at = served.mount(&mounts, "extract");
        std::fs::write(at.path(name), name).expect("write");
        drop(at);
        client.commit(name, "extract").expect("commit");
    }
    let mounts = client.view("k8s.io/1/look", "b").expect("view");
    let look = served.mount(&mounts, "look");
    // Of the same layers, and not mounted.
    let idle = client.view("k8s.io/2/idle", "a").expect("view");
    let web = served.mount(&client.prepare("k8s.io/3/web", "b").expect("prepare"), "web");
    assert!(look.path("a").exists() && look.path("b").exists());
    let told = || -> Vec<serde_json::Value> {
        let told: serde_json::Value = serde_json::from_str(&list(&served, &["--snapshots", "--json"])).expect("JSON");
        told.as_array().expect("a list").iter().filter(|one| one["kind"] != "lower").cloned().collect()
    };
    let path = |name: &str| served.path(name).display().to_string();
    let form = if is_by_fuse() { "bind" } else { "overlay" };
    let want = [
        serde_json::json!({ "snapshot": "k8s.io/1/look", "kind": "view", "form": form, "image": "b", "at": path("look") }),
        serde_json::json!({ "snapshot": "k8s.io/3/web", "kind": "active", "form": "overlay", "image": "b", "at": path("web") }),
    ];
    assert_eq!(told(), want);
    let table = list(&served, &[]);
    assert!(table.contains("k8s.io/1/look") && !table.contains("k8s.io/2/idle"), "{table}");
    drop((look, web, idle));
    // What is gone is no error.
    served.stop();
    std::fs::rename(served.path("elsewhere"), served.path("gone")).expect("rename");
    assert_eq!(list(&served, &["--snapshots"]), "");
    std::fs::rename(served.path("gone"), served.path("elsewhere")).expect("rename");
}

/// Prometheus's text format, version 0.0.4: the type of each metric, and each sample's value.
fn parse(text: &str) -> (BTreeMap<String, String>, BTreeMap<String, f64>) {
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let (mut types, mut values, mut helped) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    assert!(text.ends_with('\n'), "the last line ends, too");
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, what) = help.split_once(' ').expect("a text");
            assert!(is_name(name) && !what.is_empty() && helped.insert(name.to_owned()), "{line}");
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            assert!(helped.contains(name) && ["counter", "gauge"].contains(&kind), "{line}");
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        let name = sample.split('{').next().expect("a name");
        assert!(types.contains_key(name), "its type comes first: {line}");
        if let Some(labels) = sample.strip_prefix(name).filter(|labels| !labels.is_empty()) {
            let labels = labels.strip_prefix('{').and_then(|l| l.strip_suffix('}')).unwrap_or_else(|| panic!("{line}"));
            for pair in labels.split(',') {
                let (label, text) = pair.split_once('=').unwrap_or_else(|| panic!("{line}"));
                assert!(is_name(label) && text.len() > 2 && text.starts_with('"') && text.ends_with('"'), "{line}");
            }
        }
        assert!(values.insert(sample.to_owned(), value.parse().expect("a number")).is_none(), "twice: {line}");
    }
    (types, values)
}

fn figures_are_prometheus_and_move() {
    let mut served = Served::new();
    let client = served.client();
    let figures = |served: &Served| {
        let said = served.fsprov().args(["snapshotter", "--metrics", "--socket"]).arg(served.socket()).output();
        let said = said.expect("run fsprov");
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        parse(&String::from_utf8_lossy(&said.stdout))
    };
    let value = |values: &BTreeMap<String, f64>, name: &str| {
        *values.get(&format!("fsprov_snapshotter_{name}")).unwrap_or_else(|| panic!("{name}: {values:?}"))
    };
    let (types, before) = figures(&served);
    for (name, kind) in &types {
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
    }
    client.prepare("extract", "").expect("prepare");
    client.commit("a", "extract").expect("commit");
    client.prepare("web", "a").expect("prepare");
    client.view("look", "a").expect("view");
    // Answers that are no failures, and one that is.
    assert_eq!((code(client.prepare("web", "a")), code(client.stat("none"))), (Code::AlreadyExists, Code::NotFound));
    assert_eq!(code(client.prepare("", "a")), Code::InvalidArgument);
    let (again, after) = figures(&served);
    assert_eq!(types, again);
    let moved = |name: &str| value(&after, name) - value(&before, name);
    for (name, want) in [
        ("snapshots{kind=\"active\"}", 1.0),
        ("snapshots{kind=\"view\"}", 1.0),
        ("snapshots{kind=\"committed\"}", 1.0),
        ("calls_total{call=\"Prepare\"}", 4.0),
        ("calls_total{call=\"Commit\"}", 1.0),
        ("calls_total{call=\"Stat\"}", 1.0),
        ("failures_total{call=\"Prepare\"}", 1.0),
        ("failures_total{call=\"Stat\"}", 0.0),
        ("fuse_mounts", if is_by_fuse() { 1.0 } else { 0.0 }),
        ("removed", 0.0),
    ] {
        assert_eq!(moved(name), want, "{name}");
    }
    assert!(moved("call_seconds_total{call=\"Prepare\"}") > 0.0);
    client.remove("web").expect("remove");
    let (_, last) = figures(&served);
    assert_eq!((value(&last, "removed"), value(&last, "snapshots{kind=\"active\"}")), (1.0, 0.0));
    // Nobody is there to ask.
    served.kill();
    let said = served.fsprov().args(["snapshotter", "--metrics", "--socket"]).arg(served.socket()).output();
    let said = said.expect("run fsprov");
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("is it running?"));
}
