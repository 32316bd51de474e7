//! Callers who mean harm or are slow, many snapshots, and a state directory as a power cut may leave it.

use std::io::{Read as _, Write as _};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tonic::Code;

use crate::client::{Client, Labels, code, labels};
use crate::images::sha256;
use crate::served::Served;

crate::tests![
    many_snapshots_are_listed_in_little_memory,
    a_list_is_sent_as_it_is_read,
    noise_on_the_socket_harms_nobody,
    a_copy_of_the_state_at_any_moment_opens,
];

fn resident_kib(served: &Served) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).expect("status");
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

fn many_snapshots_are_listed_in_little_memory() {
    let count = number("FSPROV_TEST_SNAPSHOTS", 3000);
    let served = Served::new();
    let empty = resident_kib(&served);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let served = &served;
            scope.spawn(move || {
                let client = served.client();
                for number in (worker..count).step_by(4) {
                    let wanted =
                        labels(&[("containerd.io/gc.root", "2026-01-01T00:00:00Z"), ("n", &number.to_string())]);
                    client.prepare_with(&format!("default/{number}/{}", "k".repeat(60)), "", wanted).expect("prepare");
                }
            });
        }
    });
    let full = resident_kib(&served);
    let begin = std::time::Instant::now();
    assert_eq!(served.client().names(&[]).len(), count);
    let took = begin.elapsed();
    // Many who list at once, with filters that hold for none, and some who never read the answer.
    let idle: Vec<Client> = (0..8).map(|_| served.client()).collect();
    std::thread::scope(|scope| {
        for client in &idle {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert_eq!(client.names(&["labels.n~=\"^x.*y$\""]).len(), 0);
                    assert!(client.names(&["labels.n==7"]).len() <= 1);
                }
            });
        }
    });
    let listed = resident_kib(&served);
    println!(
        "{count} snapshots: {empty} KiB empty, {full} KiB full, {listed} KiB after 80 lists; one list took {took:?}"
    );
    assert!(full - empty < 2 * count as u64 + 8192, "{empty} -> {full} KiB for {count}");
    assert!(listed < full + 16 * 1024, "{full} -> {listed} KiB by listing");
}

/// Records of committed snapshots, ten upon each other, as the snapshotter writes them: as many calls that each wait for the disk take hours.
fn seed(served: &Served, count: usize) {
    std::fs::create_dir_all(served.state().join("s")).expect("make");
    let name = |number: usize| format!("k8s.io/{number}/sha256:{number:064x}");
    let write = |number: usize| {
        let dir = served.state().join("s").join(number.to_string());
        std::fs::create_dir(&dir).expect("make");
        std::fs::create_dir(dir.join("fs")).expect("make");
        let parent = if number % 10 == 1 { String::new() } else { name(number - 1) };
        let record = format!(
            r#"{{"version":1,"number":{number},"name":"{}","parent":"{parent}","kind":"committed","created":[1,2],"updated":[3,4],"labels":{{"containerd.io/snapshot/cri.image-ref":"registry.example.com/team/app-{number}:1","n":"{number}","padding":"{}"}},"usage":[8192,2],"has_files":true}}"#,
            name(number),
            "x".repeat(300),
        );
        let check = sha256(record.as_bytes());
        let check = check.trim_start_matches("sha256:");
        std::fs::write(dir.join("record.json"), format!(r#"{{"record":{record},"check":"{check}"}}"#)).expect("write");
    };
    std::thread::scope(|scope| {
        for worker in 0..2 {
            scope.spawn(move || (1..=count).skip(worker).step_by(2).for_each(write));
        }
    });
}

/// The most memory that it had while `work` ran, beyond what it has before.
fn peak_kib(served: &Served, work: impl FnOnce()) -> u64 {
    // Makes the peak what is resident now: Linux 4.0, proc(5).
    std::fs::write(format!("/proc/{}/clear_refs", served.pid()), "5").expect("clear_refs");
    let before = resident_kib(served);
    work();
    let text = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).expect("status");
    let line = text.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
    let peak: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    peak.saturating_sub(before)
}

/// FSPROV_TEST_LISTED: how many; FSPROV_TEST_LIST_DIR: where, as a million does not fit a tmpfs (`scripts/containerd list`).
fn a_list_is_sent_as_it_is_read() {
    /// No matter how many there are: all of 20,000 at once take 38 MiB.
    const MOST_KIB: u64 = 4096;
    let count = number("FSPROV_TEST_LISTED", 20_000);
    let dir = std::env::var_os("FSPROV_TEST_LIST_DIR").map_or_else(|| "/tmp".into(), std::path::PathBuf::from);
    let mut served = Served::stopped_in(&dir);
    let begin = Instant::now();
    seed(&served, count);
    println!("{count} snapshots: written in {:?}", begin.elapsed());
    served.patience = Duration::from_secs(600);
    let begin = Instant::now();
    served.start(&[]);
    println!("started in {:?}, {} KiB", begin.elapsed(), resident_kib(&served));
    let client = served.client();
    let timed = |what: &str, want: usize, filters: &[&str]| {
        let begin = Instant::now();
        let grown = peak_kib(&served, || assert_eq!(client.count(filters).expect("list"), want, "{what}"));
        println!("{what}: {want} in {:?}, {grown} KiB more at its peak", begin.elapsed());
        grown
    };
    // The first one brings what every call needs.
    let _ = timed("all", count, &[]);
    for what in ["all again", "all a third time"] {
        assert!(timed(what, count, &[]) < MOST_KIB, "{what}");
    }
    let one = format!("labels.n=={}", count / 2);
    assert!(timed("one, by a label", 1, &[&one]) < MOST_KIB);
    assert!(timed("none, by an expression", 0, &["labels.padding~=\"^x+y\""]) < MOST_KIB);
    let begin = Instant::now();
    assert_eq!(code(client.count(&["labels.n==\"1"])), Code::InvalidArgument);
    println!("a malformed filter: refused in {:?}", begin.elapsed());
    // Some who stop reading, and one who works meanwhile.
    let slow: Vec<Client> = (0..16).map(|_| served.client()).collect();
    let mut begun = Vec::new();
    let grown = peak_kib(&served, || {
        begun.extend(slow.iter().map(|client| client.begin_list().expect("list")));
        assert!(begun.iter().all(|list| list.read == 100));
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(served.client().count(&[]).expect("list") >= count));
            let mut longest = Duration::ZERO;
            for number in 0..50 {
                let begin = Instant::now();
                client.prepare(&format!("default/{number}/web"), "").expect("prepare");
                longest = longest.max(begin.elapsed());
            }
            println!("50 snapshots made while one lists and 16 do not read on: the longest took {longest:?}");
            assert!(longest < Duration::from_secs(30), "{longest:?}");
        });
    });
    println!("16 who do not read on: {grown} KiB");
    assert!(grown < 16 * 512 + MOST_KIB, "{grown} KiB");
    // They go away in the middle.
    drop((begun, slow));
    assert!(timed("all after that", count + 50, &[]) < MOST_KIB);
}

fn noise_on_the_socket_harms_nobody() {
    let served = Served::new();
    let client = served.client();
    client.prepare("a", "").expect("prepare");
    let before = resident_kib(&served);
    let connect = || std::os::unix::net::UnixStream::connect(served.socket()).expect("connect");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut held = Vec::new();
    for round in 0..200_u32 {
        let mut stream = connect();
        let noise: Vec<u8> =
            (0..5000_u32).map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(round) >> 13) as u8).collect();
        let _ = match round % 4 {
            0 => stream.write_all(&noise),
            // After a right beginning.
            1 => stream.write_all(preface).and_then(|()| stream.write_all(&noise)),
            // Half a beginning, and then nothing.
            2 => stream.write_all(&preface[..10]),
            // A header that never ends.
            _ => stream.write_all(preface).and_then(|()| {
                stream.write_all(&[0, 0, 4, 1, 0, 0, 0, 0, 1, 0x82, 0x86, 0x84, 0x41])?;
                stream.write_all(&[0, 0x40, 0, 9, 0, 0, 0, 0, 1])?;
                stream.write_all(&noise)
            }),
        };
        if round % 4 == 2 {
            held.push(stream);
        } else {
            let _ = stream.set_read_timeout(Some(std::time::Duration::from_millis(20)));
            let _ = stream.read(&mut [0; 100]);
        }
    }
    assert_eq!(client.stat("a").expect("stat").name, "a");
    drop(held);
    assert!(resident_kib(&served) < before + 16 * 1024, "{before} -> {} KiB", resident_kib(&served));
    assert!(!served.log().contains("panicked"), "{}", served.log());
}

/// All that a containerd does, over and over.
fn story(client: &Client, worker: usize, ended: &AtomicBool) {
    let mut parents = vec![String::new()];
    for round in 0.. {
        if ended.load(Ordering::Relaxed) {
            return;
        }
        let key = format!("default/{worker}/{round}");
        client.prepare_with(&key, parents.last().expect("one"), labels(&[("n", "1")])).expect("prepare");
        client.update(&key, labels(&[("n", "2")]), &["labels.n"]).expect("update");
        if round % 3 == 0 {
            client.remove(&key).expect("remove");
        } else {
            client.commit_with(&format!("{key}/done"), &key, Labels::new()).expect("commit");
            parents.push(format!("{key}/done"));
        }
        if parents.len() > 6 {
            while parents.len() > 1 {
                client.remove(&parents.pop().expect("one")).expect("remove");
            }
            client.cleanup().expect("cleanup");
        }
    }
}

fn a_copy_of_the_state_at_any_moment_opens() {
    let copies = number("FSPROV_TEST_COPIES", 12);
    let served = Served::new();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let (served, ended) = (&served, &ended);
            scope.spawn(move || story(&served.client(), worker, ended));
        }
        for copy in 0..copies {
            std::thread::sleep(std::time::Duration::from_millis(20 + (copy as u64 * 7) % 31));
            // What goes away meanwhile is not copied: so it is in a directory that was not brought to the disk.
            let _ = Command::new("cp").arg("-a").arg(served.state()).arg(served.path(&format!("copy-{copy}"))).output();
        }
        ended.store(true, Ordering::Relaxed);
    });
    let mut seen = 0;
    for copy in 0..copies {
        let mut again = Served::stopped();
        std::fs::create_dir_all(again.path("root")).expect("make");
        std::fs::rename(served.path(&format!("copy-{copy}")), again.state())
            .or_else(|_| {
                let done = Command::new("cp")
                    .arg("-a")
                    .arg(served.path(&format!("copy-{copy}")))
                    .arg(again.state())
                    .status()?;
                if done.success() { Ok(()) } else { Err(std::io::Error::other("cp")) }
            })
            .expect("move");
        again.start(&[]);
        let client = again.client();
        let all = client.list(&[]).expect("list");
        for info in &all {
            // A parent may be missing in a copy that took its time; then it says so.
            if info.kind == crate::client::ACTIVE {
                let _ = client.mounts(&info.name);
            }
            let has_parent = info.parent.is_empty() || all.iter().any(|other| other.name == info.parent);
            if has_parent && info.kind == crate::client::COMMITTED {
                let view = format!("look at {}", info.name);
                if let Ok(mounts) = client.view(&view, &info.name) {
                    drop(again.mount(&mounts, "look"));
                    client.remove(&view).expect("remove");
                }
            }
        }
        seen += all.len();
        client.prepare(&format!("new {copy}"), "").expect("prepare");
        client.cleanup().expect("cleanup");
        assert!(again.entries("new").is_empty() && again.entries("gone").is_empty());
        assert!(!again.log().contains("panicked"), "{}", again.log());
    }
    assert!(seen > copies, "{seen} snapshots in {copies} copies");
}
