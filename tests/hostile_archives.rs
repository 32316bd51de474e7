//! Archives that mean harm, and archives that tar(1) unpacks too: nothing outside is touched, and what is accepted is what GNU
//! tar makes of it. Each hostile import runs in a process of its own, which tells its peak memory.
//!
//! `FSPROV_TEST_ARCHIVES=10000` sets how many random archives are compared with tar (300 otherwise).

#![allow(
    clippy::format_push_string,
    clippy::match_same_arms,
    clippy::maybe_infinite_iter,
    clippy::range_minus_one,
    clippy::range_plus_one,
    clippy::type_complexity,
    clippy::uninlined_format_args,
    clippy::unnecessary_debug_formatting,
    reason = "tables and messages of a test"
)]

#[path = "archives/agree.rs"]
mod agree;
#[path = "archives/hostile.rs"]
mod hostile;
#[path = "archives/tarball.rs"]
mod tarball;
#[path = "archives/tree.rs"]
mod tree;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fsprov::internals::paths::StatePaths;
use fsprov::store::{ImageSource, ImportOptions, Store};
use libtest_mimic::{Arguments, Failed, Trial};

/// Most processor time that one hostile archive may take of an importer itself. Not the time on the wall: other tests share the disk.
const MAX_CPU: Duration = Duration::from_secs(5);
/// And with the kernel's for it. That depends on the disk: an ext4 without a journal looks at every inode deleted in the last minutes before
/// it makes a file (recently_deleted, fs/ext4/ialloc.c), and 20,000 empty files took 0.2 s of it in memory and 3.6 s on such a disk.
const MAX_CPU_WITH_KERNEL: Duration = Duration::from_secs(30);
/// One that takes longer hangs.
const MAX_WALL: Duration = Duration::from_secs(240);
/// Most memory that one may take: the peak resident size, in KiB.
const MAX_KIB: u64 = 64 << 10;
/// The user that hostile archives are imported as when the test runs as root: nobody.
const NOBODY: &str = "65534";

fn main() -> std::process::ExitCode {
    if let Some(code) = fsprov::dispatch() {
        return code;
    }
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|arg| arg == "--import") {
        return import(Path::new(&args[2]), Path::new(&args[3]));
    }
    let is_root = rustix::process::geteuid().is_root();
    let mut trials = vec![
        Trial::test("hostile_archives_as_this_user", || hostile_archives(None)),
        Trial::test("accepted_archives_agree_with_gnu_tar", agree::with_gnu_tar),
        Trial::test("a_directory_has_one_id_and_export_gives_it_back", tree::directory_round_trip),
        Trial::test("damage_is_found_and_named", tree::damage_is_found),
        Trial::test("damage_of_layers_is_found_and_named", tree::damage_of_layers_is_found),
        Trial::test("layers_are_shared_and_collected", tree::layers_are_collected),
    ];
    trials
        .push(Trial::test("hostile_archives_as_nobody", || hostile_archives(Some(NOBODY))).with_ignored_flag(!is_root));
    trials.push(
        Trial::test("an_ordinary_users_store_exports_what_roots_does", tree::exports_agree).with_ignored_flag(!is_root),
    );
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Processor time of this process and those it started, in milliseconds: outside the kernel, and with it (proc_pid_stat(5): utime, stime,
/// cutime, cstime, in ticks of 10 ms).
fn milliseconds() -> (u64, u64) {
    let stat = fs::read_to_string("/proc/self/stat").expect("read /proc/self/stat");
    let behind_the_name = stat.rsplit_once(')').expect("a name").1;
    let ticks: Vec<u64> =
        behind_the_name.split_whitespace().skip(11).take(4).map(|field| field.parse().expect("a number")).collect();
    ((ticks[0] + ticks[2]) * 10, ticks.iter().sum::<u64>() * 10)
}

/// The peak of a process's memory so far, in KiB, and how much of it are pages of files now (proc_pid_status(5): VmHWM, RssFile).
fn peak_of(process: &str) -> Option<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        value.split_whitespace().next()?.parse().ok()
    };
    Some((field("VmHWM:")?, field("RssFile:")?))
}

/// Look at the processes that this one starts, again and again, until `end`; the sum of their peaks, as if all came at one time. Without pages
/// of files: those are the program's own, which they share with this process.
fn watch_children(end: &std::sync::atomic::AtomicBool) -> u64 {
    let mut peaks = std::collections::HashMap::new();
    while !end.load(std::sync::atomic::Ordering::Relaxed) {
        for task in fs::read_dir("/proc/self/task").expect("list /proc/self/task").flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                if let Some((peak, of_files)) = peak_of(child) {
                    peaks.insert(child.to_owned(), peak.saturating_sub(of_files));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    peaks.values().sum()
}

/// The importer that is measured: says what came of it and its peak memory, with that of the processes that it starts.
#[allow(clippy::print_stdout, reason = "it speaks to the test that started it")]
fn import(root: &Path, archive: &Path) -> std::process::ExitCode {
    let end = std::sync::atomic::AtomicBool::new(false);
    let (done, children) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch_children(&end));
        let done = Store::open(&StatePaths::new(root.to_owned()))
            .and_then(|store| store.import(&ImageSource::Archive(archive.to_owned()), &ImportOptions::default()));
        end.store(true, std::sync::atomic::Ordering::Relaxed);
        (done, watcher.join().expect("the watcher"))
    });
    let (own, all) = milliseconds();
    println!("{} {own} {all}", peak_of("self").expect("VmHWM").0 + children);
    match done {
        Ok(imported) => println!("ok {}", imported.id),
        Err(error) => println!("err {:?} {error}", error.kind()),
    }
    std::process::ExitCode::SUCCESS
}

/// Everything that stat and read tell of a tree, but for access times.
pub(crate) fn picture(root: &Path, skip: &Path) -> String {
    use std::fmt::Write as _;
    use std::os::unix::fs::MetadataExt as _;
    let mut text = String::new();
    let mut stack = vec![root.to_owned()];
    while let Some(path) = stack.pop() {
        if path == skip {
            continue;
        }
        let meta = fs::symlink_metadata(&path).expect("stat");
        let is_small = meta.is_file() && meta.len() < 4096;
        let content = if is_small { fs::read(&path).unwrap_or_default() } else { Vec::new() };
        writeln!(
            text,
            "{path:?} {:o} {}:{} {} {}.{} {content:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.nlink(),
            meta.mtime(),
            meta.mtime_nsec()
        )
        .expect("write");
        if meta.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&path).expect("list").map(|e| e.expect("entry").path()).collect();
            names.sort();
            stack.extend(names);
        }
    }
    text
}

fn hostile_archives(user: Option<&str>) -> Result<(), Failed> {
    let top = tempfile::tempdir()?;
    fs::set_permissions(top.path(), fs::Permissions::from_mode(0o755))?;
    let out = top.path().join("out");
    let below = top.path().join("a/b/c");
    fs::create_dir_all(&below)?;
    fs::create_dir(&out)?;
    fs::write(out.join("victim"), "precious")?;
    // Anybody could write there: only the program's own care keeps it as it is.
    for (path, mode) in [(&out, 0o777), (&below, 0o777), (&out.join("victim"), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    let exe = top.path().join("importer");
    fs::copy(std::env::current_exe()?, &exe)?;
    let archive = top.path().join("archive");
    fs::write(&archive, b"")?;
    let state = below.join("state");
    let device = || fs::symlink_metadata("/dev/null").map(|m| m.permissions().mode()).expect("stat /dev/null");
    let null = device();
    let mut problems = Vec::new();
    let corpus = hostile::corpus(&out.to_string_lossy());
    assert!(corpus.len() >= 200, "the corpus has {}", corpus.len());
    let (mut refused, mut slowest, mut largest) = (0, Duration::ZERO, (0, ""));
    for hostile in &corpus {
        fs::write(&archive, &hostile.bytes)?;
        let before = picture(top.path(), &state);
        let mut command = match user {
            Some(id) => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", id, "--regid", id, "--clear-groups"]).arg(&exe);
                command
            }
            None => Command::new(&exe),
        };
        let started = Instant::now();
        let said = command.arg("--import").arg(&state).arg(&archive).current_dir(&below).output()?;
        let took = started.elapsed();
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let mut problem = |what: String| problems.push(format!("{}: {what}", hostile.name));
        let (figures, result) = text.split_once('\n').unwrap_or(("", ""));
        let mut figures = figures.split(' ').map(|figure| figure.parse().unwrap_or(0));
        let peak: u64 = figures.next().unwrap_or(0);
        let mut time = || Duration::from_millis(figures.next().unwrap_or(0));
        let (cpu, with_kernel) = (time(), time());
        if !said.status.success() {
            problem(format!("{}: {}", said.status, String::from_utf8_lossy(&said.stderr)));
        } else if hostile.fate == hostile::Fate::Refused && !result.starts_with("err ") {
            problem("it was imported".into());
        }
        if std::env::var_os("FSPROV_TEST_TELL").is_some() {
            tell(&format!("{took:?} {cpu:?} {peak} KiB {}: {}", hostile.name, result.trim()));
        }
        if took > MAX_WALL || cpu > MAX_CPU || with_kernel > MAX_CPU_WITH_KERNEL || peak > MAX_KIB {
            problem(format!(
                "it took {took:?} (of the processor {cpu:?}, {with_kernel:?} with the kernel) and {peak} KiB"
            ));
        }
        // The directory of the state root changes with it: its time is not looked at.
        let after = picture(top.path(), &state);
        let parent = format!("{:?} ", below);
        let strip = |text: &str| text.lines().filter(|l| !l.starts_with(&parent)).collect::<Vec<_>>().join("\n");
        if strip(&before) != strip(&after) || device() != null || Path::new("/tmp/fsprov-escape").exists() {
            problem("something outside changed".into());
        }
        if fs::read_dir(state.join("staging")).is_ok_and(|mut left| left.next().is_some()) {
            problem("something is left in staging".into());
        }
        refused += usize::from(result.starts_with("err "));
        slowest = slowest.max(cpu);
        largest = largest.max((peak, &hostile.name));
        if state.exists() {
            fsprov::internals::sys::remove::remove_tree(&state).map_err(|e| e.to_string())?;
        }
    }
    let sum = format!(
        "{} archives, {refused} refused, most processor time {slowest:?}, most memory {} KiB ({})",
        corpus.len(),
        largest.0,
        largest.1
    );
    tell(&sum);
    if problems.is_empty() { Ok(()) } else { Err(format!("{sum}\n{}", problems.join("\n")).into()) }
}

#[allow(clippy::print_stderr, reason = "figures for who runs the test")]
pub(crate) fn tell(text: &str) {
    eprintln!("{text}");
}
