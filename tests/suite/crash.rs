//! The death of a FUSE server's worker is nobody's business: SIGKILL under readers, writers, programs and changes of names.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::{Need, Stage, needs, system};

/// How many times the worker is killed on each lane; there are three. FSPROV_TEST_KILLS says otherwise, and scripts/crash is the
/// long form, which also limits the longest wait (FSPROV_TEST_MAX_STALL_MS) and writes down what was measured
/// (FSPROV_TEST_REPORT names a file).
const KILLS: u32 = 25;
/// How long a new worker may take to be there.
const COMING_BACK: Duration = Duration::from_secs(20);

/// The options of every rootfs here: `k`, with a writable volume /w.
fn with_w(stage: &Stage) -> Vec<OsString> {
    stage.mkdir("sandbox/w");
    let mut options = vec!["--id".into(), "k".into()];
    options.extend(sandbox(stage));
    options.extend(volume("w", "/w", "rw"));
    options
}

#[track_caller]
pub(super) fn supervisor(stage: &Stage) -> i32 {
    let shown = stage.fsprov(["inspect", "--json", "k"]).run().ok().json();
    i32::try_from(shown["supervisor_pid"].as_i64().expect("it has a supervisor")).expect("a pid")
}

/// The supervisor's child.
pub(super) fn worker_of(supervisor: i32) -> Option<i32> {
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
    /// The longest that one call took, by what it did, in microseconds.
    longest: Mutex<BTreeMap<&'static str, u64>>,
    failures: Mutex<Vec<String>>,
}

/// Ends the load when a case fails: its scope waits for all threads.
struct Ends<'a>(&'a Load);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

impl Load {
    fn run(&self, what: &str, mut work: impl FnMut(usize) -> std::io::Result<bool>) {
        let mut round = 0;
        while !self.stop.load(Ordering::Relaxed) {
            match work(round) {
                Ok(true) => {}
                Ok(false) => self.failed(format!("{what}, round {round}: wrong answer")),
                Err(e) => self.failed(format!("{what}, round {round}: {e}")),
            }
            self.done.fetch_add(1, Ordering::Relaxed);
            round += 1;
        }
    }
    /// One call, and how long it took.
    fn time<T>(&self, what: &'static str, call: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = call();
        let took = begun.elapsed().as_micros() as u64;
        let mut longest = self.longest.lock().expect("longest");
        let so_far = longest.entry(what).or_default();
        *so_far = took.max(*so_far);
        result
    }
    fn failed(&self, what: String) {
        self.failures.lock().expect("failures").push(what);
    }
    /// What was longest since this was asked last.
    fn take_longest(&self) -> BTreeMap<&'static str, u64> {
        std::mem::take(&mut *self.longest.lock().expect("longest"))
    }
}

fn number_of(variable: &str) -> Option<u32> {
    std::env::var(variable).ok().and_then(|n| n.parse().ok())
}

/// Make, rename, exchange, link and remove: each must give its one true answer, though its worker may die in it.
fn names(load: &Load, dir: &Path, round: usize) -> std::io::Result<bool> {
    let at = |name: &str| dir.join(format!("{name}{round}"));
    load.time("mkdir", || fs::create_dir(at("d")))?;
    load.time("rmdir", || fs::remove_dir(at("d")))?;
    for (name, text) in [("a", "of a"), ("x", "of x")] {
        let create = || File::options().write(true).create_new(true).mode(0o600).open(at(name));
        load.time("create", create)?.write_all(text.as_bytes())?;
    }
    load.time("symlink", || std::os::unix::fs::symlink("x", at("s")))?;
    load.time("unlink", || fs::remove_file(at("s")))?;
    load.time("link", || fs::hard_link(at("a"), at("l")))?;
    load.time("unlink", || fs::remove_file(at("l")))?;
    load.time("rename", || fs::rename(at("a"), at("b")))?;
    // Done twice it would be undone.
    load.time("exchange", || renameat_with(CWD, at("b"), CWD, at("x"), RenameFlags::EXCHANGE))?;
    let right = fs::read(at("b"))? == b"of x" && fs::read(at("x"))? == b"of a";
    load.time("rename over", || fs::rename(at("x"), at("b")))?;
    let right = right && fs::read(at("b"))? == b"of a";
    load.time("unlink", || fs::remove_file(at("b")))?;
    Ok(right && fs::read_dir(dir)?.next().is_none())
}

/// A program that runs from the mount and writes a data base there: what it said it wrote must be there in the end.
fn data_base(load: &Load, w: &Path, written: &AtomicU64) {
    let mut sqlite = Command::new(w.join("sqlite3"))
        .arg(w.join("base.db"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run a program from the mount");
    let mut to = sqlite.stdin.take().expect("stdin");
    let mut from = BufReader::new(sqlite.stdout.take().expect("stdout"));
    to.write_all(b"create table t(n integer primary key, text blob);\n").expect("write to sqlite3");
    load.run("data base", |n| {
        load.time("transaction", || {
            let mut line = String::new();
            writeln!(to, "insert into t values({n}, randomblob(3000)); select max(n) from t;")?;
            from.read_line(&mut line)?;
            let right = line.trim() == n.to_string();
            written.store(n as u64 + 1, Ordering::Relaxed);
            Ok(right)
        })
    });
    drop(to);
    assert!(sqlite.wait().expect("wait").success(), "the program in the mount failed");
}

case!("workers_die_unseen", on::fuse, &[Need::Tool("sqlite3")], |stage: &Stage| {
    workers_die(stage, "sandbox/w", || stage.mount(stage.small_image(), "rootfs", with_w(stage)));
});

// What they wrote to is an image's file at first, copied up under them.
case!("workers_of_a_writable_rootfs_die_unseen", on::fuse, &[Need::Tool("sqlite3")], |stage: &Stage| {
    workers_die(stage, "changes/upper/w", || {
        super::upper::import(stage, &stage.path("sandbox"));
        stage.mount("image", "rootfs", ["--id", "k", "--upper", "changes"])
    });
});

/// Kill the server's worker again and again while programs work in `w` of the rootfs, of which `below` has what was written in the end.
fn workers_die(stage: &Stage, below: &str, mount: impl FnOnce() -> PathBuf) {
    if needs::kernel() < (6, 9) {
        // Requests in flight are not sent again there: deaths_cost_what_was_in_flight.
        return;
    }
    stage.mkdir("sandbox/w");
    let big = content(7, 3 << 20);
    stage.write("sandbox/w/big", &big);
    let small: Vec<_> = (0..40).map(|n| content(n, 1 + n * 997)).collect();
    for (n, text) in small.iter().enumerate() {
        stage.write(format!("sandbox/w/r{n}"), text);
    }
    for dir in ["names", "list", "cwd"] {
        stage.mkdir(format!("sandbox/w/{dir}"));
    }
    for n in 0..200 {
        stage.write(format!("sandbox/w/list/e{n}"), "");
    }
    fs::copy(needs::find_tool("sqlite3").expect("sqlite3"), stage.path("sandbox/w/sqlite3")).expect("copy sqlite3");
    let w = mount().join("w");
    let supervisor = supervisor(stage);

    let (load, kills) = (Load::default(), number_of("FSPROV_TEST_KILLS").unwrap_or(KILLS));
    let mut sleeper = Command::new("sleep")
        .arg("300")
        .current_dir(w.join("cwd"))
        .stdin(File::open(w.join("big")).expect("open big"))
        .stdout(Stdio::null())
        .spawn()
        .expect("start sleep");
    let (appended, rows) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut quiet = BTreeMap::new();
    std::thread::scope(|scope| {
        let ends = Ends(&load);
        scope.spawn(|| {
            load.run("read small", |n| {
                let at = n % 40;
                Ok(load.time("read small", || fs::read(w.join(format!("r{at}"))))? == small[at])
            });
        });
        scope.spawn(|| load.run("read big", |_| Ok(load.time("read big", || fs::read(w.join("big")))? == big)));
        scope.spawn(|| {
            load.run("write", |n| {
                let bytes = &big[..1 + n % 50 * 2003];
                load.time("write", || fs::write(w.join("written"), bytes))?;
                Ok(load.time("read back", || fs::read(w.join("written")))? == bytes)
            });
        });
        scope.spawn(|| load.run("names", |n| names(&load, &w.join("names"), n)));
        scope.spawn(|| data_base(&load, &w, &rows));
        scope.spawn(|| {
            let mut log = File::options().append(true).create(true).open(w.join("log")).expect("open log");
            load.run("append", |n| {
                load.time("append", || log.write_all(format!("{n:08}\n").as_bytes()))?;
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
                load.time("read nameless", || file.read_to_string(&mut text))?;
                file.write_all_at(b"still", 0)?;
                std::thread::sleep(Duration::from_micros(500));
                Ok(text == "still here")
            });
        });
        scope.spawn(|| {
            load.run("list", |_| {
                let mut names = Vec::new();
                let entries =
                    load.time("list", || fs::read_dir(w.join("list"))?.collect::<std::io::Result<Vec<_>>>())?;
                for entry in entries {
                    entry.metadata()?;
                    names.push(entry.file_name());
                }
                names.sort();
                names.dedup();
                Ok(names.len() == 200)
            });
        });
        // As long as it would be without a death: what the machine itself makes them wait.
        std::thread::sleep(Duration::from_secs(2));
        quiet = load.take_longest();
        let mut worker = 0;
        for n in 0..kills {
            worker = new_worker(supervisor, worker);
            // From while it begins to well into its work.
            std::thread::sleep(Duration::from_millis(u64::from(n * 37 % 180)));
            system::kill(worker);
        }
        new_worker(supervisor, worker);
        std::thread::sleep(Duration::from_millis(300));
        drop(ends);
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
    let below = stage.path(below);
    assert!(fs::read_to_string(below.join("log")).expect("the log") == want, "lines are missing or double");
    let said = stage.tool("sqlite3", [below.join("base.db")]).arg("pragma integrity_check; select count(*) from t;");
    let rows = rows.load(Ordering::Relaxed);
    assert_eq!(said.run().ok().out(), format!("ok\n{rows}\n"), "what was written to the data base");
    let done = load.done.load(Ordering::Relaxed);
    // Fewer kills take less time, in which less is done; and they are for emulated machines.
    let least = if kills < KILLS { 0 } else { 200 };
    assert!(done > least && rows > 0, "too little was done to tell: {done}, {rows} transactions");
    let longest = load.take_longest();
    report(stage, kills, done, 0, &quiet, &longest);
    if let Some(limit) = number_of("FSPROV_TEST_MAX_STALL_MS") {
        let worst = longest.iter().max_by_key(|(_, us)| **us).expect("something was timed");
        assert!(*worst.1 <= u64::from(limit) * 1000, "the longest wait was {worst:?} us, more than {limit} ms");
    }
    drop(failures);
    stage.fsprov(["unmount", "k"]).run().ok();
    stage.assert_nothing_left("after kills and unmount");
}

fn ms(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64() * 1e3
}

/// Into the file that FSPROV_TEST_REPORT names.
fn report(
    stage: &Stage,
    kills: u32,
    done: u64,
    errors: u64,
    quiet: &BTreeMap<&str, u64>,
    longest: &BTreeMap<&str, u64>,
) {
    let Some(path) = std::env::var_os("FSPROV_TEST_REPORT") else { return };
    let all = longest.values().max().copied().unwrap_or(0);
    let mut text = format!(
        "{}: {kills} SIGKILLs, {done} rounds, {errors} errors, 0 wrong bytes; longest call {:.1} ms (without kills {:.1} ms)\n",
        stage.lane.name,
        ms(all),
        ms(quiet.values().max().copied().unwrap_or(0)),
    );
    for (what, us) in longest {
        let before = ms(quiet.get(what).copied().unwrap_or(0));
        text += &format!("  {what:14} {:8.1} ms (without kills {before:.1} ms)\n", ms(*us));
    }
    let mut file = File::options().append(true).create(true).open(path).expect("open the report");
    file.write_all(text.as_bytes()).expect("write the report");
}

// Where the kernel sends nothing again (before 6.9): a death costs what was in flight, EIO each, and nothing else, however many there are.
case!("deaths_cost_what_was_in_flight", on::fuse, |stage: &Stage| {
    stage.mkdir("sandbox/w/list");
    let small: Vec<_> = (0..40).map(|n| content(n, 1 + n * 997)).collect();
    for (n, text) in small.iter().enumerate() {
        stage.write(format!("sandbox/w/r{n}"), text);
        stage.write(format!("sandbox/w/list/e{n}"), "");
    }
    let call = stage.mount_call(stage.small_image(), "rootfs", with_w(stage)).args(["--volume-ttl", "0"]);
    call.env("FSPROV_FUSE_RESEND", "never").run().ok();
    let (w, supervisor) = (stage.path("rootfs/w"), supervisor(stage));
    let (load, kills) = (Load::default(), number_of("FSPROV_TEST_KILLS").unwrap_or(KILLS));
    let (lost, written) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    // What failed with EIO is counted, what failed otherwise is a failure.
    let seen = |result: std::io::Result<bool>| match result {
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
            lost.fetch_add(1, Ordering::Relaxed);
            Ok(true)
        }
        other => other,
    };
    let mut log = File::options().append(true).create(true).open(w.join("log")).expect("open log");
    let read = |n: usize| Ok(fs::read(w.join(format!("r{}", n % 40)))? == small[n % 40]);
    let list = |_| Ok(fs::read_dir(w.join("list"))?.collect::<std::io::Result<Vec<_>>>()?.len() == 40);
    let write = |n: usize| {
        let bytes = content(n, 1 + n % 50 * 2003);
        fs::write(w.join("written"), &bytes)?;
        Ok(fs::read(w.join("written"))? == bytes)
    };
    let stat = |n: usize| Ok(fs::metadata(w.join(format!("r{}", n % 40)))?.len() == small[n % 40].len() as u64);
    let mut append = |n: usize| {
        log.write_all(format!("{n:08}\n").as_bytes())?;
        written.lock().expect("written").push(n);
        Ok(true)
    };
    const CALLERS: u64 = 6;
    std::thread::scope(|scope| {
        let load = &load;
        let ends = Ends(load);
        scope.spawn(move || load.run("read", |n| load.time("read", || seen(read(n)))));
        scope.spawn(move || load.run("read too", |n| load.time("read", || seen(read(n + 20)))));
        scope.spawn(move || load.run("list", |n| load.time("list", || seen(list(n)))));
        scope.spawn(move || load.run("write", |n| load.time("write", || seen(write(n)))));
        scope.spawn(move || load.run("stat", |n| load.time("stat", || seen(stat(n)))));
        scope.spawn(|| load.run("append", |n| load.time("append", || seen(append(n)))));
        let mut worker = 0;
        for n in 0..kills {
            worker = new_worker(supervisor, worker);
            // Every other one in its work, however slow the machine is.
            let (before, end) = (load.done.load(Ordering::Relaxed), Instant::now() + COMING_BACK);
            while n % 2 == 1 && load.done.load(Ordering::Relaxed) < before + 20 && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(2));
            }
            std::thread::sleep(Duration::from_millis(u64::from(n * 37 % 180)));
            system::kill(worker);
        }
        new_worker(supervisor, worker);
        std::thread::sleep(Duration::from_millis(300));
        drop(ends);
    });
    let failures = load.failures.lock().expect("failures");
    let server_log = fs::read_to_string(stage.state().join("containers/k/backend/server.log")).unwrap_or_default();
    assert!(failures.is_empty(), "{} failures, the first: {:?}\n{server_log}", failures.len(), failures.first());
    let lost = lost.load(Ordering::Relaxed);
    assert!(lost <= u64::from(kills) * CALLERS, "{lost} calls failed of {CALLERS} callers, {kills} deaths");
    let lines: std::collections::BTreeSet<usize> = fs::read_to_string(stage.path("sandbox/w/log"))
        .expect("the log")
        .lines()
        .map(|line| line.parse().expect("a whole line"))
        .collect();
    let written = written.lock().expect("written");
    assert!(written.iter().all(|n| lines.contains(n)), "lines are missing that were written");
    // Nothing of it lasts.
    log.write_all(b"good\n").expect("an open file is good");
    for n in 0..40 {
        assert!(read(n).expect("read") && stat(n).expect("stat") && list(n).expect("list"));
    }
    let stats = stage.fsprov(["stats", "--json", "k"]).run().ok().json();
    assert!(stats["restarts"].as_u64() >= Some(u64::from(kills)), "{stats:#}");
    let done = load.done.load(Ordering::Relaxed);
    assert!(done > 200, "too little was done to tell: {done}");
    report(stage, kills, done, lost, &BTreeMap::new(), &load.take_longest());
    drop(failures);
    drop(log);
    stage.unmount("rootfs");
    stage.assert_nothing_left("after kills and unmount");
});

// As on a kernel before 6.9: a request in flight at the kill fails with EIO, and nothing hangs.
case!("requests_that_cannot_be_sent_again_fail", on::fuse, &[Need::Failpoints], |stage: &Stage| {
    let (rootfs, supervisor) = rootfs_without_resend(stage, "never");
    let open = File::create(rootfs.join("w/open")).expect("make");
    let mut sync = held_in_sync(stage, &rootfs);
    assert!(is_running(&mut sync), "the fault point holds it");
    system::kill(worker_of(supervisor).expect("a worker"));
    assert!(system::eventually(COMING_BACK, || !is_running(&mut sync)), "a request in flight hangs");
    let said = sync.wait_with_output().expect("wait");
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("Input/output error"), "{said:?}");
    (&open).write_all(b"good").expect("an open file is good");
    assert_eq!(fs::read_to_string(rootfs.join("w/open")).expect("read"), "good");
    // Said once the next worker serves, which is after it answered.
    let log = || fs::read_to_string(stage.state().join("containers/k/backend/server.log")).expect("the log");
    let says_so = || log().contains("1 requests in flight when it died were answered EIO");
    assert!(system::eventually(COMING_BACK, says_so), "{}", log());
});

// The same where the worker dies between reading a request and writing down that it did, which it does in every round here.
// A worker answers before it says that it does: a file that it removes then is handed over like any other.
case!("a_file_that_is_removed_while_a_worker_begins_stays_open", on::fuse, &[Need::Failpoints], |stage: &Stage| {
    if needs::kernel() < (6, 9) {
        return; // nothing is sent again
    }
    let image = stage.small_image();
    let call = stage.mount_call(&image, "rootfs", with_w(stage)).env("FAILPOINTS", "worker.serving=sleep(300)");
    call.run().ok();
    let (rootfs, supervisor) = (stage.path("rootfs"), supervisor(stage));
    let mut worker = new_worker(supervisor, 0);
    for round in 0..3 {
        let name = rootfs.join(format!("w/{round}"));
        let mut file = File::options().read(true).write(true).create_new(true).open(&name).expect("create");
        file.write_all(b"still here").expect("write");
        system::kill(worker);
        fs::remove_file(&name).expect("remove");
        worker = new_worker(supervisor, worker);
        system::kill(worker);
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text)).expect("read a file without a name");
        assert_eq!(text, "still here");
        worker = new_worker(supervisor, worker);
    }
    let log = fs::read_to_string(stage.state().join("containers/k/backend/server.log")).expect("the log");
    assert!(!log.contains("unexpected message"), "{log}");
    stage.fsprov(["unmount", "k"]).run().ok();
    stage.assert_nothing_left("after unmount");
});

case!("requests_that_were_read_and_not_noted_fail", on::fuse, &[Need::Failpoints], |stage: &Stage| {
    const ROUNDS: u64 = 5;
    let call = stage.mount_call(stage.small_image(), "rootfs", with_w(stage)).args(["--volume-ttl", "0"]);
    let call = call.env("FSPROV_FUSE_RESEND", "never").env("FAILPOINTS", "serve.read=30*off->1*sleep(60000)->off");
    call.run().ok();
    let (rootfs, supervisor) = (stage.path("rootfs"), supervisor(stage));
    stage.write("sandbox/w/f", "here");
    let open = File::create(rootfs.join("w/open"));
    let log = stage.state().join("containers/k/backend/server.log");
    let times_served = || fs::read_to_string(&log).unwrap_or_default().matches(" serves, ").count();
    for round in 0..ROUNDS {
        // Not in a scope, which would wait for it when this case fails.
        let asked = Arc::new(AtomicU64::new(0));
        let (file, count) = (rootfs.join("w/f"), Arc::clone(&asked));
        let asking = std::thread::spawn(move || {
            loop {
                if let Err(e) = fs::metadata(&file) {
                    return e;
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        let hangs = || {
            let before = asked.load(Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(500));
            before == asked.load(Ordering::Relaxed)
        };
        // On a slow machine it may have been something else that took long: killed again then.
        let end = Instant::now() + 3 * COMING_BACK;
        while !asking.is_finished() {
            assert!(Instant::now() < end, "round {round}: it hangs, or the fault point holds none");
            if hangs() {
                let served = times_served();
                if let Some(worker) = worker_of(supervisor) {
                    system::kill(worker);
                }
                assert!(system::eventually(COMING_BACK, || times_served() > served), "round {round}: none follows");
            }
        }
        let answer = asking.join().expect("join").raw_os_error();
        assert_eq!(answer, Some(rustix::io::Errno::IO.raw_os_error()), "round {round}");
    }
    open.expect("make").write_all(b"good").expect("an open file is good");
    assert_eq!(fs::read_to_string(stage.path("sandbox/w/open")).expect("read"), "good");
    let stats = stage.fsprov(["stats", "--json", "k"]).run().ok().json();
    assert!(stats["restarts"].as_u64() >= Some(ROUNDS), "{stats:#}");
});

// And where not even the request is known: the connection is ended, and says so.
case!(
    "a_lost_request_ends_the_connection",
    |lane| on::fuse(lane) && lane.is_real_root(),
    &[Need::Failpoints],
    |stage: &Stage| {
        // This case's mount namespace is its own.
        if fs::read_dir("/sys/fs/fuse/connections").is_ok_and(|mut d| d.next().is_none()) {
            stage.tool("mount", ["-t", "fusectl", "fusectl", "/sys/fs/fuse/connections"]).run().ok();
        }
        let (rootfs, supervisor) = rootfs_without_resend(stage, "lose");
        let mut sync = held_in_sync(stage, &rootfs);
        system::kill(worker_of(supervisor).expect("a worker"));
        assert!(system::eventually(COMING_BACK, || !is_running(&mut sync)), "a lost request hangs");
        assert!(!sync.wait().expect("wait").success());
        assert!(system::eventually(COMING_BACK, || super::destroy::health(stage) == "dead"), "it is dead");
        let log = fs::read_to_string(stage.state().join("containers/k/backend/server.log")).expect("the log");
        assert!(log.contains("the connection was ended"), "{log}");
        stage.unmount(&rootfs);
        stage.assert_nothing_left("after a lost request");
    },
);

/// `sync FILE` whose request a worker has read: one that was not read is the next worker's. A process of its own, which alone has the file open:
/// before Linux 5.16 (FOPEN_NOFLUSH) a close waits for a sync of the same file, and so would each program that this one starts if it had it open.
fn held_in_sync(stage: &Stage, rootfs: &Path) -> Child {
    let path = rootfs.join("w/held");
    File::create(&path).expect("make");
    let sync = Command::new("sync").arg(path).stderr(Stdio::piped()).spawn().expect("start sync");
    let stats = || stage.fsprov(["stats", "--json", "k"]).run().ok().json();
    let is_read = || stats()["worker"]["requests"]["fsync"].as_u64().is_some_and(|count| count > 0);
    assert!(system::eventually(COMING_BACK, is_read), "{}", stats());
    sync
}

fn is_running(child: &mut Child) -> bool {
    child.try_wait().expect("try wait").is_none()
}

/// A rootfs with a volume /w whose server holds every fsync for a minute, on a kernel without RESEND.
fn rootfs_without_resend(stage: &Stage, resend: &str) -> (std::path::PathBuf, i32) {
    let call = stage.mount_call(stage.small_image(), "rootfs", with_w(stage)).env("FSPROV_FUSE_RESEND", resend);
    call.env("FAILPOINTS", "serve.sync=sleep(60000)").run().ok();
    (stage.path("rootfs"), supervisor(stage))
}

// A request that ends a thread of the FUSE library is answered, by the next worker, and hurts nobody else, however often it
// comes. (Only builds with overflow checks have such a one.)
case!("a_request_that_ends_a_thread_is_answered", on::fuse, |stage: &Stage| {
    use rustix::fs::{AtFlags, Timespec, Timestamps, UTIME_OMIT, utimensat};
    let rootfs = stage.mount(stage.small_image(), "rootfs", with_w(stage));
    let w = rootfs.join("w");
    let mut open = File::create(w.join("open")).expect("make");
    let times = Timestamps {
        last_access: Timespec { tv_sec: i64::MIN, tv_nsec: 0 },
        last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    };
    let mut ended = 0;
    // More often than a worker that dies young is started again.
    for round in 0..15 {
        match utimensat(CWD, w.join("open"), &times, AtFlags::empty()) {
            Err(rustix::io::Errno::IO) => ended += 1,
            other => assert!(other.is_ok(), "round {round}: {other:?}"),
        }
        open.write_all(b"x").expect("an open file is good");
    }
    assert_eq!(fs::read_to_string(w.join("open")).expect("read"), "x".repeat(15));
    assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n");
    let stats = stage.fsprov(["stats", "--json", "k"]).run().ok().json();
    assert_eq!(stats["restarts"].as_u64(), Some(ended), "each of them ends a worker, nothing else does: {stats:#}");
});

// The supervisor alone dies: the worker goes on, and is said to be alone; then it dies too.
case!("a_worker_without_supervisor_goes_on", on::fuse, |stage: &Stage| {
    let rootfs = stage.mount(stage.small_image(), "rootfs", with_w(stage));
    let mut open = File::create(rootfs.join("w/f")).expect("make");
    let supervisor = supervisor(stage);
    let worker = worker_of(supervisor).expect("a worker");
    system::kill(supervisor);
    let shown = || stage.fsprov(["inspect", "--json", "k"]).run().ok().json();
    assert!(system::eventually(COMING_BACK, || shown()["unsupervised"].as_bool() == Some(true)), "{:#}", shown());
    assert_eq!(shown()["state"].as_str(), Some("ready"));
    let said = stage.fsprov(["inspect", "k"]).run().ok().out();
    assert!(said.contains("its supervisor died"), "{said}");
    open.write_all(b"good").expect("an open file is good");
    assert_eq!(fs::read_to_string(rootfs.join("w/f")).expect("read"), "good");
    // It answers for itself.
    let stats = stage.fsprov(["stats", "--json", "k"]).run().ok().json();
    assert_eq!(stats["worker_pid"].as_i64(), Some(i64::from(worker)), "{stats:#}");
    assert!(stats["worker"]["requests"]["write"].as_u64() >= Some(1), "{stats:#}");
    stage.fsprov(["stats", "--log-level", "debug", "k"]).run().ok();
    stage.fsprov(["restart", "k"]).run().fails_saying(&["its supervisor died"]);
    system::kill(worker);
    assert!(system::eventually(COMING_BACK, || super::destroy::health(stage) == "dead"), "it is dead");
    stage.fsprov(["stats", "k"]).run().fails(3, &["no server listens"]);
    drop(open);
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after both died");
});

case!("restart_keeps_what_is_open", on::fuse, |stage: &Stage| {
    let rootfs = stage.mount(stage.small_image(), "rootfs", with_w(stage));
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
    // Again and again, until a signal ends it.
    for name in ["INT", "TERM"] {
        let mut watch = stage.fsprov(["stats", "--watch", "1", "k"]);
        let mut child = watch.command.stdout(std::process::Stdio::piped()).spawn().expect("start");
        let seen = std::io::BufReader::new(child.stdout.take().expect("piped"));
        let times =
            std::io::BufRead::lines(seen).map_while(Result::ok).filter(|line| line.starts_with("uptime_seconds"));
        assert_eq!(times.take(2).count(), 2, "{name}");
        stage.tool("kill", [format!("-{name}"), child.id().to_string()]).run().ok();
        assert!(child.wait().expect("wait").success(), "SIG{name}");
    }
    let text = stage.fsprov(["stats", "--prometheus", "k"]).run().ok().out();
    assert!(text.contains("fsprov_requests_total{id=\"k\",kind=\"write\"}"), "{text}");
    stage.fsprov(["stats", "--log-level", "loud", "k"]).run().fails(2, &["loud"]);
    stage.fsprov(["unmount", "k"]).run().ok();
    stage.assert_nothing_left("after restart and unmount");
});
