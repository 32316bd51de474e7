//! Apply of the Diff service, with a containerd of our own making behind it that has the blobs.

use std::process::Command;

use tonic::Code;

use crate::client::{Answer, Client, Labels, Mount, code};
use crate::content::{Containerd, Descriptor, GZIP, PLAIN, gzip, node};
use crate::images::{self, Entry::Dir, Entry::File, layers_in_store, sha256};
use crate::served::Served;

crate::tests![
    an_unknown_layer_is_unpacked_into_the_store,
    a_known_layer_is_not_read_again,
    a_removal_beside_an_apply_leaves_the_claim,
    whiteouts_of_applied_layers_hide,
    what_was_not_announced_is_refused,
    hostile_layers_are_refused,
    what_is_not_ours_is_left_to_containerd,
    a_kill_within_apply_leaves_nothing_half,
    two_processes_wait_for_the_next_layer,
    what_waited_outlives_what_started_it,
];

#[derive(Clone, PartialEq, prost::Message)]
struct ApplyAsked {
    #[prost(message, optional, tag = "1")]
    diff: Option<Descriptor>,
    #[prost(message, repeated, tag = "2")]
    mounts: Vec<Mount>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ApplyAnswer {
    #[prost(message, optional, tag = "1")]
    applied: Option<Descriptor>,
}

pub(crate) fn apply(client: &Client, diff: &Descriptor, mounts: &[Mount]) -> Answer<String> {
    let asked = ApplyAsked { diff: Some(diff.clone()), mounts: mounts.to_vec() };
    let answer: ApplyAnswer = client.call("/containerd.services.diff.v1.Diff/Apply", asked)?;
    Ok(answer.applied.expect("a descriptor").digest)
}

fn tar(served: &Served, name: &str, layer: images::Layer<'_>) -> Vec<u8> {
    std::fs::read(images::tar(served, name, layer)).expect("read")
}

fn an_unknown_layer_is_unpacked_into_the_store() {
    let (mut served, containerd) = node();
    let client = served.client();
    let big = "x".repeat(700_000);
    let bytes = tar(&served, "one", &[File("etc/a", "1"), File("big", &big), Dir("tmp", 0o1777), Dir(".", 0o750)]);
    let blob = containerd.put(GZIP, gzip(&bytes));
    let mounts = client.prepare("k8s.io/1/extract", "").expect("prepare");
    assert_eq!(apply(&client, &blob, &mounts).expect("apply"), sha256(&bytes));
    assert_eq!(containerd.asked(), [("k8s.io".to_owned(), blob.digest.clone())]);
    assert_eq!(layers_in_store(&served), 1);
    client.commit(&format!("k8s.io/2/{}", sha256(&bytes)), "k8s.io/1/extract").expect("commit");
    let base = format!("k8s.io/2/{}", sha256(&bytes));
    assert!(client.usage(&base).expect("usage").size >= 700_000);
    let at = served.mount(&client.prepare("web", &base).expect("prepare"), "web");
    assert_eq!((at.read("etc/a").as_str(), at.read("big").len()), ("1", 700_000));
    let mode =
        |name: &str| std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(at.path(name)).expect("stat")) & 0o7777;
    assert_eq!((mode("tmp"), mode(".")), (0o1777, 0o750));
    drop(at);
    // It is the store's, and stays while containerd has it; the blob is known from now on, also after a restart.
    let gc = |served: &Served| assert!(served.fsprov().args(["image", "gc"]).output().expect("run").status.success());
    gc(&served);
    assert_eq!(layers_in_store(&served), 1);
    served.kill();
    served.start(&[]);
    let client = served.client();
    let mounts = client.prepare("default/1/extract", "").expect("prepare");
    assert_eq!(apply(&client, &blob, &mounts).expect("apply"), sha256(&bytes));
    assert!(containerd.asked().is_empty());
    // Files beside the layer are on top of it.
    served.mount(&client.mounts("default/1/extract").expect("mounts"), "beside").write("etc/a", "2");
    client.commit("changed", "default/1/extract").expect("commit");
    let view = served.mount(&client.view("look", "changed").expect("view"), "look");
    assert_eq!((view.read("etc/a").as_str(), view.read("big").len()), ("2", 700_000));
    drop(view);
    for name in ["look", "changed", "web", &base] {
        client.remove(name).expect("remove");
    }
    gc(&served);
    assert_eq!(layers_in_store(&served), 0);
}

/// Of the last snapshot that has the same layer, of another blob.
fn a_removal_beside_an_apply_leaves_the_claim() {
    if !cfg!(feature = "failpoints") {
        return;
    }
    let (mut served, containerd) = node();
    let bytes = tar(&served, "one", &[File("etc/a", "1")]);
    let (packed, plain) = (containerd.put(GZIP, gzip(&bytes)), containerd.put(PLAIN, bytes));
    let client = served.client();
    let mounts = client.prepare("k8s.io/1/extract", "").expect("prepare");
    apply(&client, &packed, &mounts).expect("apply");
    served.kill();
    served.start(&[("FAILPOINTS", "snapshotter.apply=sleep(1000)")]);
    let client = served.client();
    std::thread::scope(|scope| {
        let applied = scope.spawn(|| {
            let client = served.client();
            let mounts = client.prepare("k8s.io/2/extract", "").expect("prepare");
            apply(&client, &plain, &mounts).map(drop)
        });
        std::thread::sleep(std::time::Duration::from_millis(500));
        client.remove("k8s.io/1/extract").expect("remove");
        applied.join().expect("join").expect("apply");
    });
    assert!(served.fsprov().args(["image", "gc"]).output().expect("run").status.success());
    assert_eq!(layers_in_store(&served), 1);
    let at = served.mount(&client.mounts("k8s.io/2/extract").expect("mounts"), "second");
    assert_eq!(at.read("etc/a"), "1");
}

fn a_known_layer_is_not_read_again() {
    let (served, containerd) = node();
    let client = served.client();
    let image = images::make(&served, "base", &[&[File("a", "1")], &[File("b", "2")]]);
    images::import(&served, &image);
    let mut parent = String::new();
    for (number, diff_id) in image.diff_ids.iter().enumerate() {
        let key = format!("default/{number}/extract");
        let mounts = client.prepare(&key, &parent).expect("prepare");
        let size = std::fs::metadata(image.dir.join(format!("{number}.tar"))).expect("stat").len() as i64;
        let blob = Descriptor { media_type: PLAIN.into(), digest: diff_id.clone(), size };
        assert_eq!(&apply(&client, &blob, &mounts).expect("apply"), diff_id);
        parent = format!("default/{number}/{}", image.chains[number]);
        client.commit(&parent, &key).expect("commit");
    }
    assert!(containerd.asked().is_empty());
    let at = served.mount(&client.prepare("web", &parent).expect("prepare"), "web");
    assert_eq!((at.read("a").as_str(), at.read("b").as_str()), ("1", "2"));
    // Its chain is known: a layer that the store has is claimed upon it.
    let asked = client.prepare_with("more", &parent, Labels::new());
    assert!(asked.is_ok());
    let (code, said) = {
        let said = served.fsprov().args(["image", "rm", "-f", "example.com/base:1"]).output().expect("run");
        (said.status.code(), String::from_utf8_lossy(&said.stderr).into_owned())
    };
    assert!(code == Some(4) && said.contains("containerd's snapshots"), "{code:?} {said}");
}

fn whiteouts_of_applied_layers_hide() {
    let (served, containerd) = node();
    let client = served.client();
    let layers: [images::Layer<'_>; 2] = [
        &[File("etc/gone", "x"), File("etc/stays", "s"), File("var/old", "o")],
        &[File("etc/.wh.gone", ""), File("var/.wh..wh..opq", ""), File("var/new", "n")],
    ];
    let mut parent = String::new();
    for (number, layer) in layers.iter().enumerate() {
        let blob = containerd.put(GZIP, gzip(&tar(&served, &format!("w{number}"), layer)));
        let key = format!("default/{number}/extract");
        let mounts = client.prepare(&key, &parent).expect("prepare");
        apply(&client, &blob, &mounts).expect("apply");
        parent = format!("default/{number}/done");
        client.commit(&parent, &key).expect("commit");
    }
    let view = served.mount(&client.view("look", &parent).expect("view"), "look");
    assert_eq!((view.read("etc/stays").as_str(), view.read("var/new").as_str()), ("s", "n"));
    assert!(!view.path("etc/gone").exists() && !view.path("var/old").exists());
}

fn what_was_not_announced_is_refused() {
    let (served, containerd) = node();
    let client = served.client();
    let bytes = gzip(&tar(&served, "one", &[File("a", "1")]));
    let right = containerd.put(GZIP, bytes.clone());
    let mounts = client.prepare("default/1/extract", "").expect("prepare");
    // Another blob's bytes, a part of them, more of them, another size, none at all.
    for (name, served_bytes, size) in [
        ("other", gzip(&tar(&served, "two", &[File("a", "2")])), right.size),
        ("part", bytes[..bytes.len() - 9].to_vec(), right.size),
        ("more", [&bytes[..], b"x"].concat(), right.size),
        ("size", bytes.clone(), right.size + 1),
        ("none", Vec::new(), right.size),
    ] {
        containerd.0.lock().expect("no panic").by_digest.insert(right.digest.clone(), served_bytes);
        let asked = Descriptor { size, ..right.clone() };
        let error = apply(&client, &asked, &mounts).expect_err(name);
        assert!(matches!(error.code(), Code::DataLoss | Code::InvalidArgument), "{name}: {error}");
        assert_eq!(layers_in_store(&served), 0, "{name}");
    }
    containerd.0.lock().expect("no panic").by_digest.clear();
    assert_eq!(code(apply(&client, &right, &mounts)), Code::Internal);
    assert_eq!(std::fs::read_dir(served.path("root/staging")).expect("list").count(), 0, "nothing half-made");
    // And then it comes right.
    containerd.put(GZIP, bytes);
    apply(&client, &right, &mounts).expect("apply");
    assert_eq!(layers_in_store(&served), 1);
}

fn hostile_layers_are_refused() {
    let (served, containerd) = node();
    let client = served.client();
    let archive = served.path("hostile.tar");
    let script = "import tarfile,io,sys\nt=tarfile.open(sys.argv[1],'w')\n\
                  i=tarfile.TarInfo(sys.argv[2]); i.size=1; i.type=sys.argv[3].encode(); i.linkname=sys.argv[4]\n\
                  t.addfile(i, io.BytesIO(b'x') if sys.argv[3]=='0' else None)\nt.close()";
    let mounts = client.prepare("default/1/extract", "").expect("prepare");
    for (path, kind, link) in
        [("../../escaped", "0", ""), ("/x/../../escaped", "0", ""), ("hard", "1", "../../../etc/passwd")]
    {
        let done =
            Command::new("/usr/bin/python3").args(["-c", script]).arg(&archive).args([path, kind, link]).status();
        assert!(done.expect("run python3").success());
        let blob = containerd.put(PLAIN, std::fs::read(&archive).expect("read"));
        assert_eq!(code(apply(&client, &blob, &mounts)), Code::InvalidArgument, "{path}");
    }
    let noise = containerd.put(GZIP, vec![7; 5000]);
    assert_eq!(code(apply(&client, &noise, &mounts)), Code::InvalidArgument);
    assert_eq!(layers_in_store(&served), 0);
    assert!(!served.path("escaped").exists() && !served.log().contains("panicked"));
}

/// The readers of archives that a snapshotter has.
fn readers(pid: u32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<i32> =
        children.flat_map(|all| all.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    let is_reader = |pid: &i32| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"fsprov: archive\0"))
    };
    pids.into_iter().filter(is_reader).collect()
}

fn two_processes_wait_for_the_next_layer() {
    let (mut served, containerd) = node();
    let client = served.client();
    let pid = served.pid();
    assert!(readers(pid).is_empty(), "none before the first");
    let unpack = |n: u32| {
        let text = n.to_string();
        let blob = containerd.put(GZIP, gzip(&tar(&served, &text, &[File("a", &text)])));
        let mounts = client.prepare(&format!("default/{n}/extract"), "").expect("prepare");
        apply(&client, &blob, &mounts).expect("apply");
    };
    // Two, and none of those before.
    let wait = |before: &[i32]| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while readers(pid).len() != 2 || readers(pid).iter().any(|one| before.contains(one)) {
            assert!(std::time::Instant::now() < until, "{:?}", readers(pid));
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        readers(pid)
    };
    unpack(1);
    let first = wait(&[]);
    unpack(2);
    // Each reads one archive.
    let second = wait(&first);
    // One that was killed meanwhile is not taken.
    crate::lower::kill(&second);
    unpack(3);
    let last = wait(&second);
    served.kill();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while last.iter().any(|pid| std::path::Path::new(&format!("/proc/{pid}/cmdline")).exists()) {
        assert!(std::time::Instant::now() < until, "they outlive it");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// The kernel ends a process with the thread that started it, if the process asks for that.
fn what_waited_outlives_what_started_it() {
    if !cfg!(feature = "failpoints") {
        return;
    }
    let mut served = Served::stopped();
    let containerd = Containerd::listen(&served.containerd());
    served.start(&[("FAILPOINTS", "archive.ahead=sleep(300)")]);
    let client = served.client();
    containerd.0.lock().expect("no panic").wait = std::time::Duration::from_millis(200);
    for n in 1..4 {
        let text = n.to_string();
        let blob = containerd.put(PLAIN, tar(&served, &text, &[File("a", &text.repeat(400_000))]));
        let mounts = client.prepare(&format!("default/{n}/extract"), "").expect("prepare");
        apply(&client, &blob, &mounts).unwrap_or_else(|e| panic!("layer {n}: {e}"));
    }
}

fn what_is_not_ours_is_left_to_containerd() {
    let (served, containerd) = node();
    let client = served.client();
    let blob = containerd.put(GZIP, gzip(&tar(&served, "one", &[File("a", "1")])));
    let mounts = client.prepare("default/1/extract", "").expect("prepare");
    let other = Mount { source: served.path("elsewhere").display().to_string(), ..mounts[0].clone() };
    let above = Mount { source: format!("{}/../1/fs", served.state().join("s").display()), ..mounts[0].clone() };
    for wrong in [&[][..], &[other], &[above], &[mounts[0].clone(), mounts[0].clone()]] {
        assert_eq!(code(apply(&client, &blob, wrong)), Code::Unimplemented, "{wrong:?}");
    }
    let kind =
        Descriptor { media_type: "application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into(), ..blob.clone() };
    assert_eq!(code(apply(&client, &kind, &mounts)), Code::Unimplemented);
    let digest = Descriptor { digest: "sha512:00".into(), ..blob.clone() };
    assert_eq!(code(apply(&client, &digest, &mounts)), Code::Unimplemented);
    assert!(containerd.asked().is_empty());
    // One that has files, and one that has a layer.
    served.mount(&mounts, "at").write("file", "x");
    assert_eq!(code(apply(&client, &blob, &mounts)), Code::FailedPrecondition);
    let mounts = client.prepare("default/2/extract", "").expect("prepare");
    apply(&client, &blob, &mounts).expect("apply");
    assert_eq!(code(apply(&client, &blob, &mounts)), Code::FailedPrecondition);
}

fn a_kill_within_apply_leaves_nothing_half() {
    if !cfg!(feature = "failpoints") {
        return;
    }
    for step in [
        "store.stage",
        "store.publish",
        "store.rename_layer",
        "store.claim",
        "durable.sync",
        "durable.rename",
        "durable.sync_dir",
    ] {
        for count in [0, 1, 2, 3] {
            let mut served = Served::stopped();
            let containerd = Containerd::listen(&served.containerd());
            let before = if count == 0 { String::new() } else { format!("{count}*off->") };
            served.start(&[("FAILPOINTS", &format!("{step}={before}1*return(kill)->off"))]);
            let blob = containerd.put(GZIP, gzip(&tar(&served, "one", &[File("a", "1")])));
            let story = |client: &Client| -> Answer<()> {
                let mounts = client.prepare("default/1/extract", "")?;
                apply(client, &blob, &mounts)?;
                client.commit("default/2/done", "default/1/extract")
            };
            let _ = story(&served.client());
            served.kill();
            served.start(&[]);
            let client = served.client();
            if client.stat("default/2/done").is_err() {
                let _ = client.remove("default/1/extract");
                story(&client).unwrap_or_else(|e| panic!("{step} {count}: {e}"));
            }
            let view = served.mount(&client.view("look", "default/2/done").expect("view"), "look");
            assert_eq!(view.read("a"), "1", "{step} {count}");
            drop(view);
            client.remove("look").expect("remove");
            client.remove("default/2/done").expect("remove");
            assert!(served.fsprov().args(["image", "gc"]).output().expect("run").status.success());
            assert_eq!(
                (layers_in_store(&served), std::fs::read_dir(served.path("root/staging")).expect("list").count()),
                (0, 0)
            );
        }
    }
}
