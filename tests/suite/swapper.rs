//! The swapper: the owner of the sandbox, of the image's directory and of what lies above ROOTFS exchanges a part of every path, at
//! every step of every verb; and, in the second case, as fast as it can while verbs run. Whatever comes of it, nothing of root's may
//! be opened for writing, changed, shown or mounted on.
//!
//! `scripts/swapper` is the long form: FSPROV_TEST_SWAPS=all tries every combination (else a spread of some hundred),
//! FSPROV_TEST_SWAP_SECONDS sets how long the second case runs on each lane (else two seconds); both write what they counted to the file
//! that FSPROV_TEST_REPORT names.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, inotify, renameat_with};
use rustix::mount::UnmountFlags;

use super::faults::steps_in;
use super::swapped::{OWNER, stopped_at};
use super::volumes::volume;
use crate::common::harness::case;
use crate::common::images::make_small_tree;
use crate::common::stage::Call;
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Lane, Need, Stage, system};

/// How many combinations are tried on each lane, of all that there are, where not all are asked for.
const SOME: usize = 120;
/// What lies in every directory of root's, and nowhere else.
const MARK: &str = "root-private";
/// Every part that is exchanged of every path that the verbs are told, below `u`, which another user owns.
const PARTS: [&str; 11] = [
    "u",
    "u/work",
    "u/work/a",
    "u/work/a/b",
    "u/work/f",
    "u/work/f/file",
    "u/work/made",
    "u/mnt",
    "u/mnt/point",
    "u/images",
    "u/images/one",
];
/// Those that are single files.
const FILES: [&str; 1] = ["u/work/f/file"];

#[derive(Clone, Copy, Debug)]
enum Swap {
    /// A symlink to root's directory (or file) of the same shape.
    Link,
    /// Another directory of the same owner.
    Other,
    /// The directory that it lies in is another one, in which it is a symlink to root's.
    Parent,
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    Mount,
    Recover,
    Unmount,
}

/// A directory tree as all three, the user's, the decoy and root's, have it.
fn make_tree(top: &Path, mark: Option<&str>) {
    let u = top.join("u");
    for dir in ["work/a/b", "work/f", "mnt/point"] {
        fs::create_dir_all(u.join(dir)).expect("mkdir");
    }
    fs::write(u.join("work/f/file"), mark.unwrap_or("a file")).expect("write");
    make_small_tree(&u.join("images/one"));
    if let Some(mark) = mark {
        fs::create_dir_all(u.join("work/made")).expect("mkdir");
        for dir in PARTS.iter().filter(|part| !FILES.contains(part)) {
            fs::write(top.join(dir).join(MARK), mark).expect("write");
        }
    }
}

fn own_all(top: &Path) {
    for dir in PARTS.iter().filter(|part| !part.starts_with("u/images/one")) {
        let _ = chown(top.join(dir), Some(OWNER), Some(OWNER));
    }
}

/// Watches root's tree: whoever opens something in it for writing, changes, makes or removes something, is told.
struct Root {
    dir: PathBuf,
    watch: OwnedFd,
}

impl Root {
    fn new(stage: &Stage) -> Self {
        let dir = stage.mkdir("secret");
        make_tree(&dir, Some("root's own"));
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).expect("inotify");
        let mut waiting = vec![dir.clone()];
        while let Some(path) = waiting.pop() {
            let meta = fs::symlink_metadata(&path).expect("stat");
            if meta.is_symlink() {
                continue;
            }
            let flags = inotify::WatchFlags::CLOSE_WRITE
                | inotify::WatchFlags::MODIFY
                | inotify::WatchFlags::ATTRIB
                | inotify::WatchFlags::CREATE
                | inotify::WatchFlags::DELETE
                | inotify::WatchFlags::MOVE
                | inotify::WatchFlags::MOVE_SELF
                | inotify::WatchFlags::DELETE_SELF;
            inotify::add_watch(&watch, &path, flags).expect("watch");
            if meta.is_dir() {
                waiting.extend(fs::read_dir(&path).expect("list").flatten().map(|entry| entry.path()));
            }
        }
        Root { dir, watch }
    }

    /// What happened to it that must not: nothing.
    fn escapes(&self, stage: &Stage) -> Vec<String> {
        let mut found = Vec::new();
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.watch, &mut space);
        while let Ok(event) = events.next() {
            found.push(format!("root's tree: {:?} {:?}", event.events(), event.file_name()));
        }
        let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let name = self.dir.file_name().expect("a name").to_string_lossy().into_owned();
        for line in table.lines() {
            let is_in =
                |field: usize| line.split(' ').nth(field).is_some_and(|path| path.split('/').any(|n| n == name));
            if line.contains(stage.dir.to_str().expect("UTF-8")) && (is_in(3) || is_in(4)) {
                found.push(format!("mounted on root's tree, or showing it: {line}"));
            }
        }
        found.extend(self.shown(&stage.dir, 0));
        found
    }

    /// Root's mark where it does not belong: in a mount, or copied.
    fn shown(&self, dir: &Path, depth: usize) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path == self.dir || path.ends_with("state") {
                continue;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth < 7 => found.extend(self.shown(&path, depth + 1)),
                Ok(kind) if kind.is_file() && entry.file_name() == MARK => {
                    found.push(format!("shown: {}", path.display()))
                }
                Ok(kind)
                    if kind.is_file()
                        && entry.file_name() == "file"
                        && fs::read(&path).is_ok_and(|text| text == b"root's own") =>
                {
                    found.push(format!("shown: {}", path.display()));
                }
                _ => {}
            }
        }
        found
    }
}

/// A symlink that the other user made.
fn their_link(to: &Path, path: &Path) {
    symlink(to, path).expect("symlink");
    std::os::unix::fs::lchown(path, Some(OWNER), Some(OWNER)).expect("lchown");
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".old");
    name.into()
}

/// `false`: the kernel does not let a mount point be renamed.
fn swap(stage: &Stage, root: &Root, part: &str, how: Swap) -> bool {
    let path = stage.path(part);
    // What is not there yet cannot be exchanged, but something can be put where it is to be.
    let move_away = |path: &Path| match fs::rename(path, aside(path)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => true,
        Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => false,
        other => other.map(|()| true).expect("rename"),
    };
    match how {
        Swap::Link => {
            if !move_away(&path) {
                return false;
            }
            their_link(&root.dir.join(part), &path);
        }
        Swap::Other => {
            if !move_away(&path) {
                return false;
            }
            match fs::rename(stage.path("decoy").join(part), &path) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => fs::create_dir(&path).expect("mkdir"),
                other => other.expect("rename"),
            }
        }
        Swap::Parent => {
            let parent = path.parent().expect("a parent");
            // Above `u` is the case's own directory.
            if parent == stage.dir {
                if !move_away(&path) {
                    return false;
                }
            } else {
                move_away(parent);
                fs::create_dir(parent).expect("mkdir");
                let _ = chown(parent, Some(OWNER), Some(OWNER));
            }
            their_link(&root.dir.join(part), &path);
        }
    }
    true
}

fn call<'a>(stage: &'a Stage, verb: Verb) -> Call<'a> {
    match verb {
        Verb::Mount => {
            let mut options: Vec<OsString> = vec!["--id".into(), "one".into(), "--sandbox".into()];
            options.push(stage.path("u/work").into());
            options.extend(volume("a/b", "/data", "rw"));
            options.extend(volume("f/file", "/etc/hosts", "rw"));
            // Made, with the image's mode; filled, a directory and a file.
            options.extend(volume("made/tmp", "/tmp", "rw"));
            options.extend(volume("made/home", "/home", "rw,copy"));
            options.extend(volume("made/passwd", "/etc/passwd", "rw,copy"));
            stage.mount_call(stage.path("u/images/one"), "u/mnt/point", options)
        }
        Verb::Recover => stage.fsprov(["recover"]),
        Verb::Unmount => stage.fsprov(["unmount", "one"]),
    }
}

/// Back to how it was, whatever became of it.
fn reset(stage: &Stage) {
    stage.fsprov(["unmount", "--all", "--lazy"]).run();
    clear(stage);
    for name in fs::read_dir(&stage.dir).expect("list").flatten().map(|entry| entry.file_name()) {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with('u') || name == "decoy" || name == "state" {
            let path = stage.path(&name);
            fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path)).expect("remove");
        }
    }
    make_tree(&stage.dir, None);
    make_tree(&stage.path("decoy"), None);
    own_all(&stage.dir);
    own_all(&stage.path("decoy"));
}

fn clear(stage: &Stage) {
    for server in stage.servers() {
        system::kill(server.pid);
    }
    system::survivors(Duration::from_secs(3));
    for mount in system::mounts_below(&stage.dir).iter().rev() {
        let _ = rustix::mount::unmount(&mount.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }
}

/// As a crash leaves it: for `recover` to go on from.
fn take_away(stage: &Stage) {
    for server in stage.servers() {
        system::kill(server.pid);
    }
    system::survivors(Duration::from_secs(3));
    let at = stage.path("u/mnt/point");
    for mount in system::mounts_below(&at).iter().rev() {
        let _ = rustix::mount::unmount(&mount.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }
}

fn prepare(stage: &Stage, verb: Verb) {
    reset(stage);
    if !matches!(verb, Verb::Mount) {
        call(stage, Verb::Mount).run().ok();
    }
    if matches!(verb, Verb::Recover) {
        take_away(stage);
    }
}

/// The names of the steps that `verb` passes, in it and in the servers that it starts.
fn points(stage: &Stage, verb: Verb) -> Vec<String> {
    prepare(stage, verb);
    let outcome = call(stage, verb).env("FSPROV_LOG", "fsprov::fault=trace").run().ok();
    let mut text = outcome.err();
    for record in stage.records() {
        text.push_str(&fs::read_to_string(record.join("backend/server.log")).unwrap_or_default());
    }
    let mut names: Vec<_> = steps_in(&text).into_iter().filter(|step| step.is_first()).map(|step| step.name).collect();
    // Before the claim nothing is made; what writes the record is passed at each step beside others.
    names.retain(|name| !name.starts_with("durable.") && !name.starts_with("store."));
    names
}

fn root(lane: &Lane) -> bool {
    lane.enter == Enter::Root && !lane.backend.is_empty()
}

fn report(line: &str) {
    let Some(path) = std::env::var_os("FSPROV_TEST_REPORT") else { return };
    let mut file = File::options().append(true).create(true).open(path).expect("open the report");
    writeln!(file, "{line}").expect("write the report");
}

case!("nothing_of_roots_is_reached_whatever_is_exchanged_at_any_step", root, &[Need::Failpoints], |stage: &Stage| {
    let secret = Root::new(stage);
    let before = picture(&secret.dir);
    let mut all = Vec::new();
    for verb in [Verb::Mount, Verb::Recover, Verb::Unmount] {
        for point in points(stage, verb) {
            for part in PARTS {
                for how in [Swap::Link, Swap::Other, Swap::Parent] {
                    all.push((verb, point.clone(), part, how));
                }
            }
        }
    }
    let total = all.len();
    if std::env::var("FSPROV_TEST_SWAPS").as_deref() != Ok("all") {
        // A spread of all of them, the same each time: a stride that has no factor in common with what they are counted by.
        let counted_by = [PARTS.len(), 3];
        let first = (total / SOME).max(1);
        let stride = (first..).find(|n| !counted_by.iter().any(|by| n.is_multiple_of(*by))).expect("there is one");
        all = all.into_iter().step_by(stride).collect();
    }
    let (mut tried, mut passed, mut escapes) = (0, 0, Vec::new());
    for (verb, point, part, how) in all {
        prepare(stage, verb);
        let call = call(stage, verb);
        let mut exchanged = false;
        let (_, outcome) = stopped_at(call, &format!("{point}=1*return(stop)"), || {
            exchanged = swap(stage, &secret, part, how);
        });
        let came = exchanged;
        tried += usize::from(came);
        passed += usize::from(came && outcome.code() == Some(0));
        let found = secret.escapes(stage);
        if !found.is_empty() {
            escapes
                .push(format!("{verb:?} at {point}, {part} exchanged ({how:?}): {found:#?}\n{}", outcome.describe()));
        }
        assert!(outcome.code().is_some(), "{verb:?} at {point}, {part} ({how:?}): {}", outcome.describe());
    }
    report(&format!(
        "{}: {tried} of {total} combinations of step, path and exchange; {passed} went on to the end, {} were refused; {} escapes",
        stage.lane.name,
        tried - passed,
        escapes.len()
    ));
    assert!(tried * 10 >= SOME.min(total) * 5, "only {tried} came to their step");
    assert!(escapes.is_empty(), "{} escapes, the first:\n{}", escapes.len(), escapes[0]);
    reset(stage);
    assert_same(&before, &picture(&secret.dir), "root's tree");
},);

// As fast as it can, with no step to stop at.
case!("nothing_of_roots_is_reached_in_a_tight_loop", root, |stage: &Stage| {
    let secret = Root::new(stage);
    let seconds = std::env::var("FSPROV_TEST_SWAP_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2);
    let (mut rounds, mut passed) = (0, 0);
    let exchanges = AtomicUsize::new(0);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        for part in ["u/work/a", "u/mnt", "u/images", "u/work", "u/work/made", "u/mnt/point"] {
            reset(stage);
            let (path, link) = (stage.path(part), stage.path("u-link"));
            let _ = fs::create_dir(&path);
            their_link(&secret.dir.join(part), &link);
            let stop = AtomicBool::new(false);
            let said: Vec<_> = std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let _ = renameat_with(CWD, &path, CWD, &link, RenameFlags::EXCHANGE);
                        exchanges.fetch_add(1, Ordering::Relaxed);
                    }
                });
                let said = [Verb::Mount, Verb::Recover, Verb::Unmount].map(|verb| {
                    let outcome = call(stage, verb).run();
                    if matches!(verb, Verb::Mount) && outcome.code() == Some(0) {
                        clear(stage);
                    }
                    outcome
                });
                stop.store(true, Ordering::Relaxed);
                said.into()
            });
            rounds += said.len();
            passed += said.iter().filter(|outcome| outcome.code() == Some(0)).count();
            let found = secret.escapes(stage);
            let told: String = said.iter().map(|outcome| outcome.describe()).collect();
            assert!(found.is_empty(), "{part} exchanged in a loop: {found:#?}\n{told}");
        }
    }
    let exchanges = exchanges.load(Ordering::Relaxed);
    report(&format!(
        "{}: {rounds} runs of a verb against {exchanges} exchanges in {seconds} s; {passed} succeeded; 0 escapes",
        stage.lane.name
    ));
    assert!(exchanges > 100, "too few exchanges to tell: {exchanges}");
    reset(stage);
});
