//! What lies below snapshots, in one FUSE mount.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tonic::Code;

use crate::client::{Client, Mount, code, labels};
use crate::images::{self, Entry::Dir, Entry::File};
use crate::served::Served;

crate::tests![
    more_layers_than_an_overlay_takes,
    long_numbers_that_do_not_fit_a_mount_line,
    a_dead_server_is_replaced,
    one_mount_serves_all_who_stand_on_the_same,
    a_kill_at_any_step_leaves_nothing,
    what_an_index_alone_knows_is_shown,
    another_boot_makes_all_again,
];

const FUSE: &[&str] = &["--lower", "fuse"];
const REFERENCE: &str = "containerd.io/snapshot.ref";

fn fuse() -> Served {
    let mut served = Served::stopped();
    served.start_with(FUSE, &[]);
    served
}

fn option<'a>(mounts: &'a [Mount], name: &str) -> &'a str {
    mounts[0].options.iter().find_map(|option| option.strip_prefix(name)).unwrap_or_else(|| panic!("{name} {mounts:?}"))
}

/// The directory in which changes lie.
fn upper(mounts: &[Mount]) -> std::path::PathBuf {
    let is_bind = mounts[0].kind == "bind";
    (if is_bind { &mounts[0].source } else { option(mounts, "upperdir=") }).into()
}

/// A program of this machine, with its libraries.
fn copy_program(program: &str, to: &Path) {
    let said = Command::new("ldd").arg(program).output().expect("ldd");
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let files = text.split_whitespace().filter(|word| word.starts_with('/')).chain([program]);
    for file in files {
        let at = to.join(&file[1..]);
        std::fs::create_dir_all(at.parent().expect("a parent")).expect("make");
        std::fs::copy(file, at).expect("copy");
    }
}

fn ended(pids: &[i32]) -> bool {
    let is_there =
        |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|text| !text.contains(") Z "));
    let until = Instant::now() + Duration::from_secs(10);
    while pids.iter().any(is_there) {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Kill them, and wait until they have ended.
pub(crate) fn kill(pids: &[i32]) {
    for pid in pids {
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(*pid).expect("a pid"),
            rustix::process::Signal::KILL,
        )
        .expect("kill");
    }
    assert!(ended(pids));
}

/// Nothing is mounted, recorded or written of FUSE mounts.
fn nothing_left(served: &Served) {
    let entries = |dir: &str| if served.state().join(dir).exists() { served.entries(dir) } else { Vec::new() };
    assert_eq!(served.fuse_mounts(), Vec::<String>::new());
    assert_eq!((entries("f/m"), entries("f/containers"), entries("f/points")), (vec![], vec![], vec![]));
}

/// Claim the layers of an image of the store; gives the name of the topmost.
fn claim(client: &Client, image: &images::Image) -> String {
    let mut parent = String::new();
    for (number, chain) in image.chains.iter().enumerate() {
        let key = format!("k8s.io/{number}/extract");
        assert_eq!(code(client.prepare_with(&key, &parent, labels(&[(REFERENCE, chain)]))), Code::AlreadyExists);
        parent = format!("fsprov/{chain}");
    }
    parent
}

/// containerd takes away what the paths have in common, and then refuses more than a page.
fn long_numbers_that_do_not_fit_a_mount_line() {
    let mut served = Served::new();
    served.kill();
    // A number that was taken: those after it have six digits.
    std::fs::create_dir_all(served.state().join("s/900000/fs/x")).expect("make");
    served.start(&[]);
    let client = served.client();
    let mut top = String::new();
    for number in 0..450 {
        let key = format!("k8s.io/{number}/extract");
        let mounts = client.prepare(&key, &top).expect("prepare");
        top = format!("k8s.io/{number}/done");
        client.commit(&top, &key).expect("commit");
        if number % 50 == 49 && !crate::served::is_by_fuse() {
            let line = mounts[0].options.join(",");
            let (_, lower) = line.split_once("lowerdir=").expect("lower layers");
            let links = format!("{}/", served.state().join("l").display());
            let taken = lower.matches(&links).count() * links.len();
            assert!(line.len() - taken < 4096, "{number}: {} of {}", line.len() - taken, line.len());
            assert_eq!(lower.contains("/f/m/"), number >= 399, "{number}");
        }
    }
    nothing_left(&served);
}

fn more_layers_than_an_overlay_takes() {
    let mut served = Served::new();
    let number: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let layers: Vec<[images::Entry<'_>; 3]> =
        number.iter().map(|n| [File("etc/last", n), File("store", n), Dir(".", 0o755)]).collect();
    let layers: Vec<images::Layer<'_>> = layers.iter().map(|layer| &layer[..]).collect();
    let image = images::make(&served, "base", &layers);
    images::import(&served, &image);
    let client = served.client();
    let mut top = claim(&client, &image);
    for number in 0..580 {
        let key = format!("k8s.io/{number}/extract");
        let mounts = client.prepare(&key, &top).expect("prepare");
        if number % 100 == 99 {
            let at = served.mount(&mounts, "step");
            std::fs::remove_file(at.path("etc/by-0")).ok();
            std::fs::remove_dir_all(at.path("old")).ok();
            std::fs::create_dir(at.path("old")).expect("make");
            at.write("old/mark", &number.to_string());
            std::fs::hard_link(at.path("old/mark"), at.path("old/again")).expect("link");
        } else {
            let at = upper(&mounts);
            std::fs::create_dir_all(at.join("etc")).expect("make");
            std::fs::write(at.join("etc").join(format!("by-{number}")), number.to_string()).expect("write");
            std::fs::write(at.join("etc/last"), format!("own {number}")).expect("write");
            if number == 300 {
                copy_program("/bin/cat", &at);
            }
        }
        top = format!("k8s.io/{number}/done");
        client.commit(&top, &key).expect("commit");
        let is_plain = !crate::served::is_by_fuse();
        let lower = option(&mounts, "lowerdir=");
        let is_directory = |one: &str| std::fs::symlink_metadata(one).is_ok_and(|meta| meta.is_dir());
        assert!(
            number % 30 != 0 || lower.contains("/f/m/") || lower.split(':').all(is_directory),
            "no link itself: {lower}"
        );
        assert!(lower.len() < 500 * 50, "{}", lower.len());
        assert!(!is_plain || mounts[0].options.iter().any(|o| o.contains("/f/m/")) == (20 + number > 500), "{number}");
    }
    nothing_left(&served);
    let mounts = client.prepare("k8s.io/1/web", &top).expect("prepare");
    let mut other = client.prepare("k8s.io/1/other", &top).expect("prepare");
    assert_eq!(option(&mounts, "lowerdir="), option(&other, "lowerdir="), "one for both");
    let [name] = &served.fuse_mounts()[..] else { panic!("one mount: {:?}", served.fuse_mounts()) };
    let servers = served.fuse_servers(name);
    let at = served.mount(&mounts, "web");
    let shown = (at.read("store"), at.read("etc/last"), at.read("etc/by-598"), at.read("etc/by-101"));
    assert_eq!(shown.0, "19");
    assert_eq!((shown.1.as_str(), shown.3.as_str()), ("own 579", "101"));
    assert!(shown.2.contains("No such file"), "{}", shown.2);
    assert!(!at.path("etc/by-0").exists(), "a whiteout hides");
    let mut old: Vec<_> = std::fs::read_dir(at.path("old")).expect("list").flatten().map(|e| e.file_name()).collect();
    old.sort();
    assert_eq!((old, at.read("old/again")), (vec!["again".into(), "mark".into()], "499".to_owned()));
    let meta = std::fs::metadata(at.path("old/mark")).expect("stat");
    assert_eq!(meta.nlink(), 2);
    // It runs a program, and takes changes.
    let said = Command::new("chroot").arg(at.root()).args(["/bin/cat", "/etc/last"]).output().expect("chroot");
    assert_eq!(String::from_utf8_lossy(&said.stdout), "own 579", "{}", String::from_utf8_lossy(&said.stderr));
    at.write("etc/last", "changed");
    std::fs::remove_file(at.path("store")).expect("remove");
    let second = served.mount(&other, "other");
    assert_eq!((second.read("etc/last").as_str(), second.read("store").as_str()), ("own 579", "19"));
    let view = served.mount(&client.view("k8s.io/1/view", &top).expect("view"), "view");
    let refused = std::fs::write(view.path("new"), "").expect_err("a view is read-only");
    assert_eq!((refused.raw_os_error(), view.read("etc/last").as_str()), (Some(30), "own 579"));
    // All goes on without the snapshotter; the next one has the same mount.
    served.kill();
    assert_eq!((at.read("etc/last").as_str(), second.read("etc/by-57").as_str()), ("changed", "57"));
    served.start(&[]);
    let client = served.client();
    other = client.mounts("k8s.io/1/other").expect("mounts");
    assert_eq!(option(&mounts, "lowerdir="), option(&other, "lowerdir="));
    assert_eq!(served.fuse_servers(name), servers);
    drop((at, second, view));
    for key in ["web", "other", "view"] {
        client.remove(&format!("k8s.io/1/{key}")).expect("remove");
    }
    nothing_left(&served);
    assert!(ended(&servers), "its server ended");
    for number in (0..580).rev() {
        client.remove(&format!("k8s.io/{number}/done")).expect("remove");
    }
    client.cleanup().expect("cleanup");
    assert_eq!((served.entries("s").len(), served.entries("f/own").len()), (20, 0));
}

/// Two committed snapshots, one on the other.
fn base(served: &Served, client: &Client) -> String {
    for (name, parent) in [("a", ""), ("b", "a")] {
        let key = format!("extract-{name}");
        let at = served.mount(&client.prepare(&key, parent).expect("prepare"), &key);
        at.write(name, name);
        at.write("same", name);
        drop(at);
        client.commit(name, &key).expect("commit");
    }
    "b".into()
}

fn a_dead_server_is_replaced() {
    let mut served = fuse();
    let client = served.client();
    let base = base(&served, &client);
    let at = served.mount(&client.prepare("web", &base).expect("prepare"), "web");
    at.write("mine", "1");
    let name = served.fuse_mounts().pop().expect("a mount");
    // A worker alone: its supervisor starts another, and nobody notices.
    let [supervisor, worker] = served.fuse_servers(&name);
    kill(&[worker]);
    assert_eq!((at.read("a").as_str(), at.read("same").as_str()), ("a", "b"));
    client.prepare("second", &base).expect("prepare");
    let _ = std::fs::read_dir(at.root());
    let worker = std::fs::read_to_string(served.state().join("f/containers").join(&name).join("backend/worker.json"))
        .expect("which process answers");
    let worker: serde_json::Value = serde_json::from_str(&worker).expect("JSON");
    kill(&[supervisor, worker["pid"].as_i64().expect("a pid") as i32]);
    // What was read before is in the page cache.
    let refused = std::fs::read(at.path("b")).expect_err("nobody answers");
    assert!([Some(107), Some(103)].contains(&refused.raw_os_error()), "{refused}");
    for restart in [false, true] {
        if restart {
            served.kill();
            served.start_with(FUSE, &[]);
        }
        let client = served.client();
        let key = format!("new-{restart}");
        let new = served.mount(&client.prepare(&key, &base).expect("prepare"), &key);
        assert_eq!((new.read("a").as_str(), new.read("same").as_str()), ("a", "b"), "a new one has a new server");
        assert_eq!(served.fuse_mounts(), [name.as_str()]);
        let log = served.log();
        assert!(log.contains("do not answer") && log.contains("\"web\"") && log.contains("\"second\""), "{log}");
        if !restart {
            let servers = served.fuse_servers(&name);
            drop(new);
            kill(&servers);
        }
    }
    // The old one, mounted again, has what it wrote.
    let client = served.client();
    drop(at);
    let at = served.mount(&client.mounts("web").expect("mounts"), "web");
    assert_eq!((at.read("a").as_str(), at.read("mine").as_str()), ("a", "1"));
    drop(at);
    for key in ["web", "second", "new-false", "new-true"] {
        client.remove(key).expect("remove");
    }
    nothing_left(&served);
}

fn one_mount_serves_all_who_stand_on_the_same() {
    let mut served = fuse();
    let client = served.client();
    let base = base(&served, &client);
    assert_eq!(served.fuse_mounts().len(), 0, "committed ones need none");
    for key in ["one", "two"] {
        client.prepare(key, &base).expect("prepare");
    }
    client.view("look", &base).expect("view");
    client.prepare("lower", "a").expect("prepare");
    assert_eq!(served.fuse_mounts().len(), 2);
    client.remove("lower").expect("remove");
    client.remove("one").expect("remove");
    client.remove("look").expect("remove");
    let name = served.fuse_mounts().pop().expect("a mount");
    served.kill();
    served.start_with(FUSE, &[]);
    let client = served.client();
    assert_eq!(served.fuse_mounts(), [name.as_str()]);
    // One that was mounted by another form of this program's is not needed any more.
    let servers = served.fuse_servers(&name);
    let at = served.mount(&client.mounts("two").expect("mounts"), "two");
    served.kill();
    served.start_with(&["--lower", "auto"], &[]);
    nothing_left(&served);
    assert_eq!(at.read("a"), "a", "its server goes on for who is mounted upon it");
    assert!(option(&served.client().mounts("two").expect("mounts"), "lowerdir=").contains(':'));
    drop(at);
    assert!(ended(&servers));
}

fn a_kill_at_any_step_leaves_nothing() {
    if !cfg!(feature = "failpoints") {
        return;
    }
    let mut served = fuse();
    let base = base(&served, &served.client());
    served.kill();
    let steps =
        ["merged.write", "merged.rename", "snapshotter.merged", "record.write", "fuse.mounted", "snapshotter.publish"];
    for step in steps {
        for fault in ["kill", "error"] {
            served.start_with(FUSE, &[("FAILPOINTS", &format!("{step}=1*return({fault})->off"))]);
            let asked = served.client().prepare("web", &base);
            if fault == "kill" {
                assert!(asked.is_err(), "{step}");
                served.wait_dead();
                served.start_with(FUSE, &[]);
            } else {
                assert_eq!(code(asked), Code::Internal, "{step}");
            }
            nothing_left(&served);
            let client = served.client();
            let at = served.mount(&client.prepare("web", &base).expect("prepare"), "web");
            assert_eq!(at.read("a"), "a", "{step}");
            drop(at);
            client.remove("web").expect("remove");
            nothing_left(&served);
            served.kill();
        }
    }
    // And while it is taken away.
    for step in ["snapshotter.remove", "fuse.unmount", "fuse.unmounted", "destroy.forget", "snapshotter.unmerged"] {
        served.start_with(FUSE, &[]);
        served.client().prepare("web", &base).expect("prepare");
        served.kill();
        served.start_with(FUSE, &[("FAILPOINTS", &format!("{step}=1*return(kill)->off"))]);
        assert!(served.client().remove("web").is_err(), "{step}");
        served.wait_dead();
        served.start_with(FUSE, &[]);
        let client = served.client();
        if step == "snapshotter.remove" {
            client.remove("web").expect("remove");
        }
        assert_eq!(code(client.stat("web")), Code::NotFound, "{step}");
        nothing_left(&served);
        served.kill();
    }
}

fn what_an_index_alone_knows_is_shown() {
    let served = Served::new();
    let layers: [images::Layer<'_>; 2] =
        [&[File("etc/a", "1"), Dir("tmp", 0o1777), Dir(".", 0o755)], &[File("etc/b", "2"), Dir(".", 0o755)]];
    let image = images::make_of(&served, "base", &layers, Some(33));
    images::import(&served, &image);
    let client = served.client();
    let top = claim(&client, &image);
    let mounts = client.prepare("k8s.io/9/web", &top).expect("prepare");
    // As root the disk has all.
    let is_user = !std::fs::read_to_string("/proc/self/uid_map").expect("maps").contains("4294967295");
    assert_eq!(served.fuse_mounts().len(), usize::from(is_user || crate::served::is_by_fuse()));
    let at = served.mount(&mounts, "web");
    assert_eq!((at.read("etc/a").as_str(), at.read("etc/b").as_str()), ("1", "2"));
    // 33 is nobody in a namespace of one id.
    let want = if is_user { 65534 } else { 33 };
    assert_eq!(std::fs::metadata(at.path("etc/a")).expect("stat").uid(), want);
    at.write("new", "3");
    let view = served.mount(&client.view("k8s.io/9/view", &top).expect("view"), "view");
    assert_eq!(view.read("etc/b"), "2");
    drop((at, view));
    for key in ["web", "view"] {
        client.remove(&format!("k8s.io/9/{key}")).expect("remove");
    }
    nothing_left(&served);
}

fn another_boot_makes_all_again() {
    let mut served = fuse();
    let client = served.client();
    let base = base(&served, &client);
    client.prepare("web", &base).expect("prepare");
    let name = served.fuse_mounts().pop().expect("a mount");
    let servers = served.fuse_servers(&name);
    served.kill();
    // As after a reboot: no mount, no process, the files of an earlier boot, and what a power loss left of them.
    let rootfs = served.state().join("f/m").join(&name).join("rootfs");
    assert!(Command::new("umount").arg(&rootfs).status().expect("umount").success());
    assert!(ended(&servers));
    std::fs::write(served.state().join("f/boot"), "another").expect("write");
    std::fs::write(served.state().join("f/m").join(&name).join("index"), "").expect("write");
    std::fs::write(served.state().join("f/containers").join(&name).join("record.json"), "").expect("write");
    served.start_with(FUSE, &[]);
    nothing_left(&served);
    let client = served.client();
    let at = served.mount(&client.mounts("web").expect("mounts"), "web");
    assert_eq!(at.read("same"), "b");
    drop(at);
    client.remove("web").expect("remove");
    nothing_left(&served);
}
