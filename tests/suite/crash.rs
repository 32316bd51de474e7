//! The death of a FUSE server's worker is nobody's business: SIGKILL under readers, writers, programs and changes of names.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::volumes::{sandbox, volume};
use crate::common::harness::on;
use crate::common::{Case, Stage, system};

/// How many times the worker is killed on each lane; there are three. FSPROV_TEST_KILLS says otherwise.
const KILLS: u32 = 34;
/// Longest stall allowed. Measured idle: 30 ms; this is for two busy cores and a debug build.
const LONGEST_STALL: Duration = Duration::from_secs(3);
/// How long a new worker may take to be there.
const COMING_BACK: Duration = Duration::from_secs(20);

#[track_caller]
fn supervisor(stage: &Stage) -> i32 {
    let shown = stage.fsprov(["inspect", "--json", "k"]).run().ok().json();
    i32::try_from(shown["supervisor_pid"].as_i64().expect("it has a supervisor")).expect("a pid")
}

/// The supervisor's child.
fn worker_of(supervisor: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

#[track_caller]
fn new_worker(supervisor: i32, old: i32) -> i32 {
    let end = Instant::now() + COMING_BACK;
    while Instant::now() < end {
        match worker_of(supervisor) {
            Some(pid) if pid != old => return pid,
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    panic!("no worker after {old} within {COMING_BACK:?}");
}

/// Bytes that tell where they belong.
fn content(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(31) ^ at >> 8 ^ seed.wrapping_mul(131)) as u8).collect()
}

#[derive(Default)]
struct Load {
    stop: AtomicBool,
    done: AtomicU64,
    longest_us: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Load {
    fn run(&self, what: &str, mut work: impl FnMut(usize) -> std::io::Result<bool>) {
        let mut round = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            match work(round) {
                Ok(true) => {}
                Ok(false) => self.failed(format!("{what}, round {round}: wrong answer")),
                Err(e) => self.failed(format!("{what}, round {round}: {e}")),
            }
            self.longest_us.fetch_max(begun.elapsed().as_micros() as u64, Ordering::Relaxed);
            self.done.fetch_add(1, Ordering::Relaxed);
            round += 1;
        }
    }
    fn failed(&self, what: String) {
        self.failures.lock().expect("failures").push(what);
    }
}

fn read_all(path: &Path) -> std::io::Result<Vec<u8>> {
    fs::read(path)
}

/// Make, rename, link and remove: each must give its one true answer, though its worker may die in it.
fn names(dir: &Path, round: usize) -> std::io::Result<bool> {
    let at = |name: &str| dir.join(format!("{name}{round}"));
    fs::create_dir(at("d"))?;
    fs::remove_dir(at("d"))?;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(at("a"))?;
    file.write_all(b"x")?;
    drop(file);
    std::os::unix::fs::symlink("x", at("s"))?;
    fs::remove_file(at("s"))?;
    fs::hard_link(at("a"), at("l"))?;
    fs::remove_file(at("l"))?;
    fs::rename(at("a"), at("b"))?;
    fs::remove_file(at("b"))?;
    Ok(fs::read_dir(dir)?.next().is_none())
}

pub(crate) const KILLED_UNSEEN: Case = Case::new("workers_die_unseen", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    stage.mkdir("sandbox/w");
    let big = content(7, 3 << 20);
    stage.write("sandbox/w/big", &big);
    for n in 0..40 {
        stage.write(format!("sandbox/w/r{n}"), content(n, 1 + n * 997));
    }
    for dir in ["names", "list", "cwd"] {
        stage.mkdir(format!("sandbox/w/{dir}"));
    }
    for n in 0..200 {
        stage.write(format!("sandbox/w/list/e{n}"), "");
    }
    let mut options = vec!["--id".into(), "k".into()];
    options.extend(sandbox(stage));
    options.extend(volume("w", "/w", "rw"));
    let rootfs = stage.mount(&image, "rootfs", options);
    let w = rootfs.join("w");
    let supervisor = supervisor(stage);

    let (load, wanted) = (Load::default(), std::env::var("FSPROV_TEST_KILLS").ok().and_then(|n| n.parse().ok()));
    let kills = wanted.unwrap_or(KILLS);
    let mut sleeper = Command::new("sleep")
        .arg("300")
        .current_dir(w.join("cwd"))
        .stdin(File::open(w.join("big")).expect("open big"))
        .stdout(Stdio::null())
        .spawn()
        .expect("start sleep");
    let appended = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            load.run("read small", |n| {
                Ok(read_all(&w.join(format!("r{}", n % 40)))? == content(n % 40, 1 + n % 40 * 997))
            });
        });
        scope.spawn(|| load.run("read big", |_| Ok(read_all(&w.join("big"))? == big)));
        scope.spawn(|| {
            load.run("write", |n| {
                let bytes = content(n, 1 + n % 50 * 2003);
                fs::write(w.join("written"), &bytes)?;
                Ok(read_all(&w.join("written"))? == bytes)
            });
        });
        scope.spawn(|| load.run("names", |n| names(&w.join("names"), n)));
        scope.spawn(|| {
            let mut log = File::options().append(true).create(true).open(w.join("log")).expect("open log");
            load.run("append", |n| {
                log.write_all(format!("{n:08}\n").as_bytes())?;
                appended.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(300));
                Ok(true)
            });
        });
        scope.spawn(|| {
            let mut file =
                File::options().read(true).write(true).create_new(true).open(w.join("nameless")).expect("make");
            file.write_all(b"still here").expect("write");
            fs::remove_file(w.join("nameless")).expect("unlink");
            load.run("nameless", |_| {
                let mut text = String::new();
                file.seek(SeekFrom::Start(0))?;
                file.read_to_string(&mut text)?;
                file.write_all_at(b"still", 0)?;
                std::thread::sleep(Duration::from_micros(500));
                Ok(text == "still here")
            });
        });
        scope.spawn(|| {
            load.run("list", |_| {
                let mut names = Vec::new();
                for entry in fs::read_dir(w.join("list"))? {
                    let entry = entry?;
                    entry.metadata()?;
                    names.push(entry.file_name());
                }
                names.sort();
                names.dedup();
                Ok(names.len() == 200)
            });
        });
        let mut worker = 0;
        for n in 0..kills {
            worker = new_worker(supervisor, worker);
            // From while it begins to well into its work.
            std::thread::sleep(Duration::from_millis(u64::from(n * 37 % 180)));
            system::kill(worker);
        }
        new_worker(supervisor, worker);
        std::thread::sleep(Duration::from_millis(300));
        load.stop.store(true, Ordering::Relaxed);
    });
    assert!(sleeper.try_wait().expect("look at sleep").is_none(), "the program in the mount died");
    let cwd = fs::read_dir(format!("/proc/{}/cwd/..", sleeper.id())).expect("its working directory is good");
    assert!(cwd.count() > 40);
    sleeper.kill().expect("end sleep");
    sleeper.wait().expect("end sleep");

    let failures = load.failures.lock().expect("failures");
    let log = fs::read_to_string(stage.state().join("containers/k/backend/server.log")).unwrap_or_default();
    assert!(
        failures.is_empty(),
        "{} failures, the first: {:#?}\n{log}",
        failures.len(),
        &failures[..failures.len().min(10)]
    );
    let want = (0..appended.load(Ordering::Relaxed)).fold(String::new(), |text, n| text + &format!("{n:08}\n"));
    assert!(fs::read_to_string(stage.path("sandbox/w/log")).expect("the log") == want, "lines are missing or double");
    assert!(load.done.load(Ordering::Relaxed) > 200, "too little was done to tell");
    let longest = Duration::from_micros(load.longest_us.load(Ordering::Relaxed));
    assert!(longest <= LONGEST_STALL, "someone waited for {longest:?}");
    drop(failures);
    stage.fsprov(["unmount", "k"]).run().ok();
    stage.assert_nothing_left("after kills and unmount");
});

pub(crate) const RESTARTED: Case = Case::new("restart_keeps_what_is_open", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    stage.mkdir("sandbox/w");
    let mut options = vec!["--id".into(), "k".into()];
    options.extend(sandbox(stage));
    options.extend(volume("w", "/w", "rw"));
    let rootfs = stage.mount(&image, "rootfs", options);
    let mut open = File::options().read(true).write(true).create_new(true).open(rootfs.join("w/f")).expect("make");
    open.write_all(b"one ").expect("write");
    let supervisor = supervisor(stage);
    let before = worker_of(supervisor).expect("a worker");
    for which in ["k", "--all"] {
        let was = worker_of(supervisor).expect("a worker");
        stage.fsprov(["restart", which]).run().ok();
        assert_ne!(worker_of(supervisor), Some(was), "restart {which}");
        open.write_all(b"more ").expect("the open file is good");
    }
    assert_ne!(worker_of(supervisor), Some(before));
    assert_eq!(fs::read_to_string(stage.path("sandbox/w/f")).expect("read"), "one more more ");
    drop(open);
    let stats = stage.fsprov(["stats", "--json", "k"]).run().ok().json();
    assert_eq!(stats["supervisor_pid"].as_i64(), Some(i64::from(supervisor)));
    assert!(stats["worker"]["requests"]["write"].as_u64() >= Some(1), "{stats:#}");
    let text = stage.fsprov(["stats", "--prometheus", "k"]).run().ok().out();
    assert!(text.contains("fsprov_requests_total{id=\"k\",kind=\"write\"}"), "{text}");
    stage.fsprov(["stats", "--log-level", "loud", "k"]).run().fails(2, &["loud"]);
    stage.fsprov(["unmount", "k"]).run().ok();
    stage.assert_nothing_left("after restart and unmount");
});
