//! The Snapshots service.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::{Command, Stdio};

use tonic::Code;

use crate::client::{ACTIVE, COMMITTED, Client, Empty, Labels, VIEW, code, labels};
use crate::served::{Served, wait_for};

crate::tests![
    a_chain_of_snapshots_is_mounted,
    codes_of_errors,
    labels_and_masks,
    lists_with_filters_and_in_parts,
    usage_is_of_the_own_files,
    removed_ones_go_from_the_disk_at_cleanup,
    a_kill_between_calls_loses_nothing,
    snapshots_are_made_before_they_are_asked_for,
    a_kill_within_a_call_leaves_it_done_or_undone,
    a_failure_within_a_call_is_taken_back,
    damaged_records_are_left_out,
    of_two_of_one_name_the_later_counts,
    what_a_power_loss_left_of_one_is_gone,
    only_root_and_the_own_user_may_speak,
    sockets_and_states_of_others_are_refused,
    a_socket_is_passed_by_a_service_manager,
    hostile_requests,
];

/// A committed snapshot with a file of its own name in it.
fn layer(served: &Served, client: &Client, name: &str, parent: &str) {
    let key = format!("extract-{name}");
    let mounts = client.prepare(&key, parent).expect("prepare");
    served.mount(&mounts, &key).write(name, name);
    client.commit(name, &key).expect("commit");
}

fn a_chain_of_snapshots_is_mounted() {
    let served = Served::new();
    let client = served.client();
    let mounts = client.prepare("extract-a", "").expect("prepare");
    assert_eq!((mounts[0].kind.as_str(), &mounts[0].options[..]), ("bind", &["rw".to_owned(), "rbind".to_owned()][..]));
    {
        let at = served.mount(&mounts, "first");
        at.write("same", "a");
        at.write("gone", "a");
        std::fs::set_permissions(at.path("."), std::fs::Permissions::from_mode(0o711)).expect("chmod");
    }
    client.commit("a", "extract-a").expect("commit");
    let mounts = client.prepare("extract-b", "a").expect("prepare");
    assert_eq!(mounts[0].kind, "overlay");
    {
        let at = served.mount(&mounts, "second");
        assert_eq!(at.read("same"), "a");
        at.write("same", "b");
        std::fs::remove_file(at.path("gone")).expect("remove");
    }
    client.commit("b", "extract-b").expect("commit");
    layer(&served, &client, "c", "b");
    let mounts = client.prepare("web", "c").expect("prepare");
    assert_eq!(client.mounts("web").expect("mounts"), mounts);
    let at = served.mount(&mounts, "web");
    assert_eq!((at.read("same").as_str(), at.read("c").as_str(), at.path("gone").exists()), ("b", "c", false));
    let mode = std::fs::metadata(at.path(".")).expect("stat").mode() & 0o7777;
    assert_eq!(mode, 0o711, "the top directory is as below");
    at.write("same", "changed");
    // The same layers for another, which sees nothing of it; and without an upper layer.
    let other = served.mount(&client.prepare("other", "c").expect("prepare"), "other");
    assert_eq!(other.read("same"), "b");
    for (key, parent) in [("look", "c"), ("look-at-one", "a"), ("look-at-nothing", "")] {
        let view = served.mount(&client.view(key, parent).expect("view"), key);
        let refused = std::fs::write(view.path("new"), "").expect_err("a view is read-only");
        assert_eq!(refused.raw_os_error(), Some(30), "{key}: {refused}");
        assert_eq!(view.path("c").exists(), parent == "c");
    }
    let kinds: Vec<_> = ["a", "b", "c", "web", "look"].map(|name| client.stat(name).expect("stat").kind).to_vec();
    assert_eq!(kinds, [COMMITTED, COMMITTED, COMMITTED, ACTIVE, VIEW]);
    let of = client.stat("web").expect("stat");
    assert_eq!((of.parent.as_str(), of.created == of.updated, of.created.is_some()), ("c", true, true));
    let (mut served, at, other) = (served, at, other);
    assert_eq!(served.stop(), Some(0));
    assert_eq!((at.read("same").as_str(), other.read("same").as_str()), ("changed", "b"), "mounts stay");
    assert!(!served.socket().exists(), "it leaves its socket");
}

fn codes_of_errors() {
    let served = Served::new();
    let client = served.client();
    layer(&served, &client, "a", "");
    client.prepare("web", "a").expect("prepare");
    client.view("look", "a").expect("view");
    assert_eq!(code(client.prepare("web", "a")), Code::AlreadyExists);
    assert_eq!(code(client.prepare("a", "")), Code::AlreadyExists);
    assert_eq!(code(client.prepare("x", "nothing")), Code::NotFound);
    assert_eq!(code(client.prepare("x", "web")), Code::InvalidArgument);
    assert_eq!(code(client.view("x", "look")), Code::InvalidArgument);
    assert_eq!(code(client.mounts("nothing")), Code::NotFound);
    assert_eq!(code(client.mounts("a")), Code::FailedPrecondition);
    assert_eq!(code(client.commit("a", "web")), Code::AlreadyExists);
    assert_eq!(code(client.commit("b", "nothing")), Code::NotFound);
    assert_eq!(code(client.commit("b", "look")), Code::FailedPrecondition);
    assert_eq!(code(client.commit("b", "a")), Code::FailedPrecondition);
    assert_eq!(code(client.remove("nothing")), Code::NotFound);
    let error = client.remove("a").expect_err("something stands on it");
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("remove"), "the suite of containerd looks for this word: {error}");
    assert_eq!(code(client.stat("nothing")), Code::NotFound);
    assert_eq!(code(client.usage("nothing")), Code::NotFound);
    assert_eq!(code(client.update("nothing", Labels::new(), &[])), Code::NotFound);
    assert_eq!(
        code(client.call::<_, Empty>("/containerd.services.snapshots.v1.Snapshots/Nothing", Empty {})),
        Code::Unimplemented
    );
    assert_eq!(code(client.call::<_, Empty>("/x/y", Empty {})), Code::Unimplemented);
    let mut names = client.names(&[]);
    names.sort();
    assert_eq!(names, ["a", "look", "web"], "what was refused has left nothing");
}

fn labels_and_masks() {
    let mut served = Served::new();
    let client = served.client();
    client.prepare_with("web", "", labels(&[("a", "1"), ("b", "2"), ("empty", "")])).expect("prepare");
    let before = client.stat("web").expect("stat");
    assert_eq!(before.labels, labels(&[("a", "1"), ("b", "2")]));
    // One label; then all; then without a mask.
    let now = client.update("web", labels(&[("a", "3"), ("c", "x")]), &["labels.a"]).expect("update");
    assert_eq!(now.labels, labels(&[("a", "3"), ("b", "2")]));
    assert!(now.created == before.created && now.updated != before.updated);
    assert_eq!(client.update("web", Labels::new(), &["labels.b"]).expect("update").labels, labels(&[("a", "3")]));
    assert_eq!(
        client.update("web", labels(&[("d.e/f", "4")]), &["labels"]).expect("update").labels,
        labels(&[("d.e/f", "4")])
    );
    assert_eq!(client.update("web", labels(&[("g", "5")]), &[]).expect("update").labels, labels(&[("g", "5")]));
    for field in ["parent", "name", "kind", "created_at", "label", ""] {
        assert_eq!(code(client.update("web", Labels::new(), &["labels", field])), Code::InvalidArgument, "{field}");
    }
    assert_eq!(client.stat("web").expect("stat").labels, labels(&[("g", "5")]));
    // Committed with labels of its own.
    client.commit_with("done", "web", labels(&[("h", "6")])).expect("commit");
    let done = client.stat("done").expect("stat");
    assert_eq!((done.labels.clone(), done.created == done.updated), (labels(&[("h", "6")]), true));
    served.kill();
    served.start(&[]);
    assert_eq!(served.client().stat("done").expect("stat"), done);
}

fn lists_with_filters_and_in_parts() {
    let served = Served::new();
    let client = served.client();
    layer(&served, &client, "a", "");
    for n in 0..250 {
        let even = if n % 2 == 0 { "yes" } else { "no" };
        client.prepare_with(&format!("k8s.io/{n}/x"), "a", labels(&[("fsprov.dev/even", even)])).expect("prepare");
    }
    assert_eq!(client.names(&[]).len(), 251);
    assert_eq!(client.names(&["labels.\"fsprov.dev/even\"==yes"]).len(), 125);
    assert_eq!(client.names(&["labels.\"fsprov.dev/even\"==yes,name~=/^k8s.io\\/2\\d\\//"]).len(), 5);
    assert_eq!(client.names(&["kind==committed"]), ["a"]);
    assert_eq!(client.names(&["parent==\"\""]), ["a"]);
    assert_eq!(client.names(&["name==k8s.io/7/x", "name==k8s.io/8/x", "kind==view"]).len(), 2);
    assert_eq!(client.names(&["name==none"]), Vec::<String>::new());
    for bad in ["name==", "name=x", "(", "name~=\"(\""] {
        assert_eq!(code(client.list(&[bad])), Code::InvalidArgument, "{bad}");
    }
}

fn usage_is_of_the_own_files() {
    let served = Served::new();
    let client = served.client();
    let mounts = client.prepare("extract-a", "").expect("prepare");
    {
        let at = served.mount(&mounts, "a");
        at.write("file", &"x".repeat(100_000));
        std::fs::hard_link(at.path("file"), at.path("link")).expect("link");
    }
    let active = client.usage("extract-a").expect("usage");
    assert!((100_000..130_000).contains(&active.size) && active.inodes == 2, "{active:?}");
    client.commit("a", "extract-a").expect("commit");
    assert_eq!(client.usage("a").expect("usage"), active);
    client.prepare("web", "a").expect("prepare");
    assert_eq!(client.usage("web").expect("usage").inodes, 1);
    client.view("look", "a").expect("view");
    assert_eq!(client.usage("look").expect("usage").size, 0);
}

fn removed_ones_go_from_the_disk_at_cleanup() {
    let mut served = Served::new();
    let client = served.client();
    layer(&served, &client, "a", "");
    layer(&served, &client, "b", "a");
    client.prepare("web", "b").expect("prepare");
    assert_eq!(served.entries("l").len(), 0, "two are named by their own paths");
    for name in ["web", "b", "a"] {
        client.remove(name).expect("remove");
    }
    assert_eq!((served.entries("s").len(), served.entries("gone").len(), served.entries("l").len()), (0, 3, 0));
    assert!(client.names(&[]).is_empty());
    client.cleanup().expect("clean up");
    assert!(served.entries("gone").is_empty());
    // Names are free again, numbers are not used again.
    layer(&served, &client, "a", "");
    let used = served.entries("s");
    client.remove("a").expect("remove");
    served.kill();
    served.start(&[]);
    layer(&served, &served.client(), "a", "");
    assert!(served.entries("gone").is_empty(), "the start cleans up");
    assert_eq!(served.entries("s").len(), 1);
    assert!(used == ["4"] && served.entries("s") >= used, "{used:?} {:?}", served.entries("s"));
}

fn snapshots_are_made_before_they_are_asked_for() {
    let mut served = Served::new();
    let on_disk = |served: &Served| std::fs::read_dir(served.state().join("s")).expect("list").count();
    let client = served.client();
    client.names(&[]);
    assert_eq!((on_disk(&served), served.entries("s").len()), (8, 0));
    for n in 0..4 {
        client.prepare(&format!("n{n}"), "").expect("prepare");
    }
    wait_for("more of them", || on_disk(&served) == 12);
    assert_eq!(served.entries("s"), ["1", "2", "3", "4"]);
    let at = served.mount(&client.mounts("n0").expect("mounts"), "at");
    at.write("file", "x");
    drop(at);
    // Those that nobody asked for are nobody's.
    for _ in 0..3 {
        served.kill();
        served.start(&[]);
        served.client().names(&[]);
        assert_eq!((on_disk(&served), served.entries("s").len()), (12, 4));
    }
    assert!(!served.log().contains("left out"), "{}", served.log());
}

fn a_kill_between_calls_loses_nothing() {
    let mut served = Served::new();
    let client = served.client();
    layer(&served, &client, "a", "");
    layer(&served, &client, "b", "a");
    let mounts = client.prepare("web", "b").expect("prepare");
    let at = served.mount(&mounts, "web");
    at.write("mine", "1");
    let sorted = |client: &Client| client.list(&[]).expect("list");
    let before = sorted(&client);
    for round in 0..5 {
        served.kill();
        assert_eq!(at.read("mine"), format!("{}", round + 1), "a container goes on");
        at.write("mine", &format!("{}", round + 2));
        served.start(&[]);
        // The same client: containerd connects again by itself.
        let client = served.client();
        assert_eq!(sorted(&client), before);
        assert_eq!(client.mounts("web").expect("mounts"), mounts);
    }
    drop(at);
    let again = served.mount(&mounts, "web");
    assert_eq!((again.read("mine").as_str(), again.read("a").as_str()), ("6", "a"));
}

/// With snapshots that are there before they are asked for, and without.
const BEGINNINGS: [&str; 2] = ["", "snapshotter.ready=return(ENOSPC);"];

/// Every step that these calls pass, by what the log says of them.
fn steps(served: &mut Served, beginning: &str, work: impl Fn(&Served, &Client)) -> Vec<String> {
    served.start(&[("FSPROV_LOG", "fsprov::fault=trace"), ("FAILPOINTS", beginning)]);
    let client = served.client();
    client.names(&[]);
    let before = served.log().lines().count();
    work(served, &client);
    // Those of the start are passed first.
    let mut passed = std::collections::BTreeMap::<String, usize>::new();
    let mut steps = Vec::new();
    for (number, line) in served.log().lines().enumerate().filter(|(_, line)| line.contains("fsprov::fault]")) {
        let step = line.rsplit(' ').next().expect("a step").to_owned();
        let count = passed.entry(step.clone()).or_default();
        if number >= before {
            let off = if *count > 0 { format!("{count}*off->") } else { String::new() };
            steps.push(format!("{beginning}{step}={off}1*return(kill)->off"));
        }
        *count += 1;
    }
    served.kill();
    steps
}

/// Prepares, commits, prepares on it, removes: errors are the reader's, who may meet a program that died.
fn story(_: &Served, client: &Client) {
    let _ = client.prepare("extract-a", "");
    let _ = client.commit("a", "extract-a");
    let _ = client.prepare("web", "a");
    let _ = client.update("web", labels(&[("x", "y")]), &["labels.x"]);
    let _ = client.remove("web");
    let _ = client.cleanup();
}

fn a_kill_within_a_call_leaves_it_done_or_undone() {
    if !cfg!(feature = "failpoints") {
        return;
    }
    let all = BEGINNINGS.map(|beginning| steps(&mut Served::stopped(), beginning, story));
    assert!(all[0].len() < all[1].len(), "there are fewer steps: {all:?}");
    let all = all.concat();
    for name in ["snapshotter.make", "snapshotter.publish", "snapshotter.commit", "snapshotter.remove", "durable.sync"]
    {
        assert!(all.iter().any(|step| step.contains(name)), "{name} is not among {all:?}");
    }
    for step in &all {
        let mut served = Served::stopped();
        served.start(&[("FAILPOINTS", step)]);
        story(&served, &served.client());
        served.wait_dead();
        served.start(&[]);
        let client = served.client();
        // What there is, is whole: one of the states between the calls.
        let names = client.names(&[]).join(" ");
        assert!(["", "extract-a", "a", "a web"].contains(&names.as_str()), "{step}: {names}");
        for info in client.list(&[]).expect("list").iter().filter(|info| info.kind != COMMITTED) {
            served.mount(&client.mounts(&info.name).expect("mounts"), "at").write("file", "x");
        }
        assert_eq!(served.entries("s").len(), names.split_whitespace().count(), "{step}: nothing else is on the disk");
        assert!(served.entries("new").is_empty() && served.entries("gone").is_empty(), "{step}");
        // And it goes on from there.
        for name in ["web", "a", "extract-a"] {
            let _ = client.remove(name);
        }
        layer(&served, &client, "a", "");
        assert_eq!(client.names(&[]), ["a"], "{step}");
        assert!(!served.log().contains("panicked"), "{step}: {}", served.log());
    }
}

fn a_failure_within_a_call_is_taken_back() {
    if !cfg!(feature = "failpoints") {
        return;
    }
    for step in BEGINNINGS.map(|beginning| steps(&mut Served::stopped(), beginning, story)).concat() {
        let mut served = Served::stopped();
        served.start(&[("FAILPOINTS", &step.replace("kill", "ENOSPC"))]);
        let client = served.client();
        // Each call fails or is done; who tries again has it.
        let twice = |work: &dyn Fn() -> Result<(), tonic::Status>| {
            work().or_else(|first| {
                assert_eq!(first.code(), Code::Internal, "{step}: {first}");
                match work() {
                    // It was done, and what failed came after.
                    Err(second) if matches!(second.code(), Code::AlreadyExists | Code::NotFound) => Ok(()),
                    other => other,
                }
            })
        };
        let done = [
            twice(&|| client.prepare("extract-a", "").map(drop)),
            twice(&|| client.commit("a", "extract-a")),
            twice(&|| client.prepare("web", "a").map(drop)),
            twice(&|| client.update("web", labels(&[("x", "y")]), &["labels.x"]).map(drop)),
            twice(&|| client.remove("web")),
            twice(&|| client.cleanup()),
        ];
        for (number, one) in done.into_iter().enumerate() {
            assert!(one.is_ok(), "{step}: call {number}: {one:?}\n{}", served.log());
        }
        assert_eq!(client.names(&[]), ["a"], "{step}");
        assert_eq!(served.entries("s").len(), 1, "{step}");
        served.kill();
        served.start(&[]);
        assert_eq!(served.client().names(&[]), ["a"], "{step}: as it is on the disk");
    }
}

/// As a file system without its last transaction has it: the directory, and of the record nothing, or a file without its bytes.
fn what_a_power_loss_left_of_one_is_gone() {
    let mut served = Served::new();
    let make = |number: u32, record: Option<&str>, file: Option<&str>| {
        let dir = served.state().join("s").join(number.to_string());
        std::fs::create_dir_all(dir.join("fs")).expect("make");
        for (path, text) in [("record.json", record), ("fs/data", file)] {
            text.inspect(|text| std::fs::write(dir.join(path), text).expect("write"));
        }
    };
    make(70, None, None);
    make(71, Some(""), None);
    // These are somebody's.
    make(72, Some(""), Some("x"));
    make(73, Some("{"), None);
    served.kill();
    served.start(&[]);
    assert_eq!(served.entries("s"), ["72", "73"]);
    assert_eq!(served.log().matches("the snapshot is left out").count(), 2, "{}", served.log());
    let client = served.client();
    assert!(client.names(&[]).is_empty());
    layer(&served, &client, "a", "");
    assert!(served.state().join("s/74/fs/a").exists(), "no number is given twice");
}

/// A removal that a power loss took back, and what got its name since.
fn of_two_of_one_name_the_later_counts() {
    let mut served = Served::new();
    served.client().prepare("a", "").expect("prepare");
    let [number] = &served.entries("s")[..] else { panic!("one: {:?}", served.entries("s")) };
    let (dir, aside) = (served.state().join("s").join(number), served.path("aside"));
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        assert!(std::process::Command::new("cp").arg("-a").args([from, to]).status().expect("cp").success());
    };
    served.kill();
    copy(&dir, aside.as_ref());
    served.start(&[]);
    let client = served.client();
    client.remove("a").expect("remove");
    client.prepare("a", "").expect("prepare");
    let created = client.stat("a").expect("stat").created;
    served.kill();
    copy(aside.as_ref(), &dir);
    served.start(&[]);
    assert_eq!(served.client().stat("a").expect("stat").created, created);
    assert!(served.log().contains("have the same name"), "{}", served.log());
}

fn damaged_records_are_left_out() {
    let mut served = Served::new();
    let client = served.client();
    layer(&served, &client, "a", "");
    layer(&served, &client, "b", "a");
    layer(&served, &client, "other", "");
    client.prepare("empty", "").expect("prepare");
    served.kill();
    let record = served.state().join("s/1/record.json");
    let text = std::fs::read_to_string(&record).expect("read");
    std::fs::write(&record, text.replace("\"name\": \"a\"", "\"name\": \"z\"")).expect("write");
    std::fs::write(served.state().join("s/3/record.json"), "{").expect("write");
    std::fs::create_dir_all(served.state().join("s/70/fs/x")).expect("make");
    // One in which nothing was written, and of whose record a byte changed.
    let record = served.state().join("s/4/record.json");
    let text = std::fs::read_to_string(&record).expect("read");
    std::fs::write(&record, text.replace("\"name\": \"empty\"", "\"name\": \"emptu\"")).expect("write");
    served.start(&[]);
    let client = served.client();
    assert_eq!(client.names(&[]), ["b"]);
    assert!(served.log().matches("the snapshot is left out").count() == 4, "{}", served.log());
    assert_eq!(
        code(client.prepare("web", "b")),
        Code::Internal,
        "what stands below is missing, and the snapshot is not"
    );
    layer(&served, &client, "c", "");
    assert_eq!(served.entries("s"), ["1", "2", "3", "4", "70", "71"], "the numbers of damaged ones are not used again");
}

fn only_root_and_the_own_user_may_speak() {
    let mut served = Served::new();
    let meta = std::fs::metadata(served.socket()).expect("stat");
    assert_eq!(meta.mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(served.state()).expect("stat").mode() & 0o777, 0o700);
    if !rustix::process::geteuid().is_root()
        || std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|m| m.trim().ends_with(" 1"))
    {
        return;
    }
    // Even where the mode lets them in.
    std::fs::set_permissions(served.socket(), std::fs::Permissions::from_mode(0o666)).expect("chmod");
    std::fs::set_permissions(served.path("."), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
                  s.send(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n'+bytes([0,0,0,4,0,0,0,0,0]))\nprint(len(s.recv(100)))";
    let ask = |user: &str| {
        let said = Command::new("setpriv")
            .args(["--reuid", user, "--regid", user, "--clear-groups", "/usr/bin/python3", "-c", script])
            .arg(served.socket())
            .output()
            .expect("run setpriv");
        (String::from_utf8_lossy(&said.stdout).trim().to_owned(), String::from_utf8_lossy(&said.stderr).into_owned())
    };
    let (answer, said) = ask("12345");
    assert!(answer == "0" || said.contains("ConnectionReset") || said.contains("BrokenPipe"), "{answer} {said}");
    assert!(ask("0").0.parse::<u32>().expect("an answer") > 0);
    assert!(served.log().contains("a connection of user 12345 was refused"), "{}", served.log());
    assert_eq!(served.client().names(&[]).len(), 0);
    served.kill();
}

fn sockets_and_states_of_others_are_refused() {
    let mut served = Served::new();
    let refused = |served: &Served, args: &[&str], code: i32, words: &str| {
        let said = served.fsprov().arg("snapshotter").args(args).stdin(Stdio::null()).output().expect("run");
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.status.code() == Some(code) && text.contains(words), "{args:?}: {:?} {text}", said.status);
    };
    refused(&served, &["--socket", "socket", "--state", "other"], 4, "a program listens on it");
    refused(&served, &["--socket", "second"], 4, "another snapshotter runs on this state directory");
    std::fs::write(served.path("file"), "x").expect("write");
    refused(&served, &["--socket", "file", "--state", "other"], 1, "something else than a socket");
    refused(&served, &["--socket", "none/socket", "--state", "other"], 3, "No such file");
    refused(&served, &["--socket", &"x".repeat(200), "--state", "other"], 2, "its path is longer");
    refused(&served, &[], 2, "--socket PATH");
    assert_eq!(served.client().names(&[]).len(), 0, "the first one goes on");
    // What a dead one left is no obstacle.
    served.kill();
    assert!(served.socket().exists());
    served.start(&[]);
    assert_eq!(served.client().names(&[]).len(), 0);
}

fn a_socket_is_passed_by_a_service_manager() {
    let served = Served::stopped();
    let script = "import os,socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\n\
                  os.dup2(s.fileno(),3)\nos.set_inheritable(3,True)\nos.environ['LISTEN_FDS']='1'\n\
                  os.environ['LISTEN_PID']=str(os.getpid())\nos.execv(sys.argv[2],[sys.argv[2],'snapshotter'])";
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", script])
        .arg(served.socket())
        .arg(crate::served::program())
        .env("FSPROV_ROOT", served.path("root"))
        .env("FSPROV_CONFIG", "")
        .stdin(Stdio::null())
        .spawn()
        .expect("run python3");
    for _ in 0..1000 {
        if served.socket().exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let client = served.client();
    layer(&served, &client, "a", "");
    assert_eq!(client.names(&[]), ["a"]);
    let _ = child.kill();
    let _ = child.wait();
    assert!(served.socket().exists(), "it belongs to the service manager");
}

fn hostile_requests() {
    let served = Served::new();
    let client = served.client();
    for key in ["", "a\0b", "a\nb", "\u{1b}[31m", &"x".repeat(5000)] {
        assert_eq!(code(client.prepare(key, "")), Code::InvalidArgument, "{key:?}");
    }
    // Names that mean something elsewhere are names.
    for key in ["../../../etc/passwd", "/", ".", "a:b,c", "é\u{202e}", "%s%n", "lowerdir=/etc"] {
        let mounts = client.prepare(key, "").expect("prepare");
        assert!(mounts[0].source.starts_with(served.state().to_str().expect("text")), "{mounts:?}");
        client.commit(&format!("{key} done"), key).expect("commit");
        let over = client.prepare(&format!("{key} over"), &format!("{key} done")).expect("prepare");
        assert!(!over[0].options.iter().any(|option| option.contains("/etc")), "{over:?}");
    }
    assert_eq!(code(client.prepare_with("x", "", labels(&[("", "y")]))), Code::InvalidArgument);
    assert_eq!(code(client.prepare_with("x", "", labels(&[("y", &"z".repeat(10_000))]))), Code::InvalidArgument);
    let many: Labels = (0..300).map(|n| (format!("{n}"), "x".to_owned())).collect();
    assert_eq!(code(client.prepare_with("x", "", many)), Code::InvalidArgument);
    let huge: Labels = (0..300).map(|n| (format!("{n}"), "x".repeat(8000))).collect();
    assert_eq!(code(client.prepare_with("x", "", huge)), Code::OutOfRange);
    assert_eq!(code(client.list(&vec!["name==x"; 1000])), Code::InvalidArgument);
    assert_eq!(code(client.list(&["name~=\"((((a{100}){100}){100}){100})\""])), Code::InvalidArgument);
    // Bytes that are no message.
    let broken = Empty {};
    assert_eq!(
        code(client.call::<_, Empty>("/containerd.services.snapshots.v1.Snapshots/Prepare", broken)),
        Code::InvalidArgument
    );
    // Not HTTP at all.
    use std::io::Write as _;
    let mut raw = std::os::unix::net::UnixStream::connect(served.socket()).expect("connect");
    let _ = raw.write_all(&[0xff; 70_000]);
    assert_eq!(client.names(&["name==x"]).len(), 0, "it answers on");
    assert!(!served.log().contains("panicked"), "{}", served.log());
}
