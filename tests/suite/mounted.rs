//! A volume behind a real mount: random operations beside a plain directory and a model, attacks on confinement, too much of everything.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::volumes::volume;
use crate::common::harness::{case, on};
use crate::common::{Need, Stage};

/// Steps of [`MODEL`] where FSPROV_TEST_MODEL_STEPS says nothing: a few seconds.
const STEPS: u64 = 1500;
/// Few names, three levels: so that steps meet.
const NAMES: [&str; 4] = ["a", "b", "long-name-of-something", "\u{e9}"];

/// splitmix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn path(&mut self) -> String {
        let depth = 1 + self.below(3);
        (0..depth).map(|_| NAMES[self.below(4) as usize]).collect::<Vec<_>>().join("/")
    }
}

/// A file's content and mode, as both sides must have it.
#[derive(Debug, PartialEq)]
struct Data {
    bytes: Vec<u8>,
    mode: u32,
}

#[derive(Clone, Debug)]
enum Entry {
    Dir,
    Link(String),
    File(Rc<RefCell<Data>>),
}

/// What the directory must hold: names, and nothing of how file systems work.
#[derive(Default)]
struct Model(BTreeMap<String, Entry>);

impl Model {
    fn below(&self, path: &str) -> Vec<String> {
        let prefix = format!("{path}/");
        self.0.keys().filter(|name| *name == path || name.starts_with(&prefix)).cloned().collect()
    }
    fn take(&mut self, path: &str) -> Vec<(String, Entry)> {
        let names = self.below(path);
        names.into_iter().map(|n| (n[path.len()..].to_owned(), self.0.remove(&n).expect("just listed"))).collect()
    }
    fn put(&mut self, path: &str, entries: Vec<(String, Entry)>) {
        self.0.extend(entries.into_iter().map(|(rest, entry)| (format!("{path}{rest}"), entry)));
    }
    fn same_file(&self, a: &str, b: &str) -> bool {
        matches!((self.0.get(a), self.0.get(b)), (Some(Entry::File(a)), Some(Entry::File(b))) if Rc::ptr_eq(a, b))
    }
    fn links(&self, data: &Rc<RefCell<Data>>) -> u64 {
        self.0.values().filter(|e| matches!(e, Entry::File(d) if Rc::ptr_eq(d, data))).count() as u64
    }

    /// Is `path` below `root` as it is here?
    fn check_path(&self, root: &Path, path: &str) {
        let at = root.join(path);
        let meta = fs::symlink_metadata(&at);
        match (self.0.get(path), meta) {
            (None, Err(e)) => {
                assert!(matches!(e.raw_os_error(), Some(2 | 20)), "{path}: {e}");
            }
            (None, Ok(meta)) => panic!("{}: should not be there: {meta:?}", at.display()),
            (Some(entry), Err(e)) => panic!("{}: should be {entry:?}: {e}", at.display()),
            (Some(Entry::Dir), Ok(meta)) => assert!(meta.is_dir(), "{path}"),
            (Some(Entry::Link(target)), Ok(meta)) => {
                assert!(meta.is_symlink(), "{path}");
                assert_eq!(fs::read_link(&at).expect("readlink"), Path::new(target), "{path}");
            }
            (Some(Entry::File(data)), Ok(meta)) => {
                let want = data.borrow();
                assert_eq!(
                    (meta.len(), meta.mode() & 0o7777, meta.nlink()),
                    (want.bytes.len() as u64, want.mode, self.links(data)),
                    "{}",
                    at.display()
                );
                assert!(fs::read(&at).expect("read") == want.bytes, "{}: content", at.display());
            }
        }
    }

    fn check_all(&self, root: &Path) {
        let mut seen = BTreeSet::new();
        let mut left = vec![String::new()];
        while let Some(dir) = left.pop() {
            for entry in fs::read_dir(root.join(&dir)).expect("readdir") {
                let entry = entry.expect("entry");
                let name = entry.file_name().into_string().expect("a name of ours");
                let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
                if entry.file_type().expect("type").is_dir() {
                    left.push(path.clone());
                }
                assert!(seen.insert(path), "a name twice");
            }
        }
        assert_eq!(seen.iter().collect::<Vec<_>>(), self.0.keys().collect::<Vec<_>>(), "{}", root.display());
        for path in self.0.keys() {
            self.check_path(root, path);
        }
    }
}

/// One file open on both sides.
struct Both {
    volume: File,
    plain: File,
    data: Rc<RefCell<Data>>,
}

struct World {
    /// The volume through the mount, the same through the host, and a directory that is neither.
    volume: PathBuf,
    backing: PathBuf,
    plain: PathBuf,
    model: Model,
    open: Vec<Both>,
    random: Random,
}

type Answer<T> = Result<T, Errno>;

fn io<T>(result: std::io::Result<T>) -> Answer<T> {
    result.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}

impl World {
    /// Do it on both sides; the answers must be the same.
    fn both<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, work: impl Fn(&Path) -> Answer<T>) -> Answer<T> {
        // Now and then the host does it behind the mount's back.
        let at = if self.random.below(8) == 0 { &self.backing } else { &self.volume };
        let (volume, plain) = (work(at), work(&self.plain));
        assert_eq!(volume, plain, "{what} on {} and on the plain directory", at.display());
        volume
    }

    fn both_open(&mut self, path: &str, open: &OpenOptions) -> Answer<(File, File)> {
        let (volume, plain) = (io(open.open(self.volume.join(path))), io(open.open(self.plain.join(path))));
        match (volume, plain) {
            (Ok(volume), Ok(plain)) => Ok((volume, plain)),
            (volume, plain) => {
                assert_eq!(volume.map(drop), plain.as_ref().map(drop).map_err(|e| *e), "open {path}");
                Err(plain.map(drop).err().unwrap_or(Errno::IO))
            }
        }
    }

    /// `rm -r` of something in the top directory; files of it may be open.
    fn remove_one(&mut self, steps: &mut Vec<String>) {
        let tops: Vec<String> = self.model.0.keys().filter(|path| !path.contains('/')).cloned().collect();
        let p = tops[self.random.below(tops.len() as u64) as usize].clone();
        steps.push(format!("rm -r {p}"));
        let remove = |at: &Path| {
            let path = at.join(&p);
            if fs::symlink_metadata(&path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
        };
        self.both("rm -r", |at| io(remove(at))).expect("root and the owner may");
        self.model.take(&p);
    }

    #[expect(clippy::collapsible_match, reason = "a guard that does the operation would hide it in the choosing")]
    fn step(&mut self, steps: &mut Vec<String>) {
        if self.model.0.len() > MOST_NAMES {
            self.remove_one(steps);
        }
        let what = self.random.below(22);
        let (p, q) = (self.random.path(), self.random.path());
        steps.push(format!("{what} {p} {q}"));
        match what {
            0..=2 => {
                let mut how = OpenOptions::new();
                how.read(true).write(true).create_new(true);
                if let Ok((volume, plain)) = self.both_open(&p, &how) {
                    let mode = volume.metadata().expect("fstat").mode() & 0o7777;
                    let data = Rc::new(RefCell::new(Data { bytes: Vec::new(), mode }));
                    self.model.0.insert(p.clone(), Entry::File(Rc::clone(&data)));
                    self.open.push(Both { volume, plain, data });
                }
            }
            3 | 4 => {
                if self.both("mkdir", |at| io(fs::create_dir(at.join(&p)))).is_ok() {
                    self.model.0.insert(p.clone(), Entry::Dir);
                }
            }
            5 => {
                // Leading nowhere: a name has one path here.
                let target = format!("nowhere/{q}");
                if self.both("symlink", |at| io(symlink(&target, at.join(&p)))).is_ok() {
                    self.model.0.insert(p.clone(), Entry::Link(target));
                }
            }
            6 => {
                if self.both("link", |at| io(fs::hard_link(at.join(&p), at.join(&q)))).is_ok() {
                    let entry = self.model.0[&p].clone();
                    self.model.0.insert(q.clone(), entry);
                }
            }
            7 => {
                if self.both("unlink", |at| io(fs::remove_file(at.join(&p)))).is_ok() {
                    self.model.0.remove(&p);
                }
            }
            8 => {
                if self.both("rmdir", |at| io(fs::remove_dir(at.join(&p)))).is_ok() {
                    self.model.0.remove(&p);
                }
            }
            9..=12 => {
                let flags = [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE, RenameFlags::empty()];
                let flags = flags[what as usize - 9];
                let rename = |at: &Path| rustix::fs::renameat_with(CWD, at.join(&p), CWD, at.join(&q), flags);
                // Two links to one symlink are one file too, which this model does not tell: as renames of those do nothing.
                let links = matches!(
                    (self.model.0.get(&p), self.model.0.get(&q)),
                    (Some(Entry::Link(_)), Some(Entry::Link(_)))
                );
                if !links && self.both("rename", rename).is_ok() && p != q && !self.model.same_file(&p, &q) {
                    let (from, to) = (self.model.take(&p), self.model.take(&q));
                    self.model.put(&q, from);
                    if flags == RenameFlags::EXCHANGE {
                        self.model.put(&p, to);
                    }
                }
            }
            13 => {
                let mut how = OpenOptions::new();
                how.read(true).write(true).custom_flags_nofollow();
                if let Ok((volume, plain)) = self.both_open(&p, &how)
                    && let Some(Entry::File(data)) = self.model.0.get(&p)
                {
                    let data = Rc::clone(data);
                    self.open.push(Both { volume, plain, data });
                }
            }
            14 => {
                let mode = [0o600, 0o644, 0o755, 0o4711, 0o2775][self.random.below(5) as usize];
                if let Some(Entry::File(data)) = self.model.0.get(&p).cloned() {
                    let set = |at: &Path| io(fs::set_permissions(at.join(&p), fs::Permissions::from_mode(mode)));
                    if self.both("chmod", set).is_ok() {
                        data.borrow_mut().mode = mode;
                    }
                }
            }
            _ if !self.open.is_empty() => self.use_open_file(what),
            _ => {}
        }
        if self.open.len() > 12 {
            self.open.swap_remove(0);
        }
        for root in [&self.volume, &self.plain] {
            self.model.check_path(root, &p);
            self.model.check_path(root, &q);
        }
    }

    fn use_open_file(&mut self, what: u64) {
        let at = self.random.below(self.open.len() as u64) as usize;
        let (offset, length) = (self.random.below(9000), self.random.below(6000) as usize);
        let fill = self.random.next() as u8;
        let Both { volume, plain, data } = &self.open[at];
        let mut data = data.borrow_mut();
        let bytes = &mut data.bytes;
        match what {
            15 | 16 => {
                let text = vec![fill; length];
                for file in [volume, plain] {
                    file.write_all_at(&text, offset).expect("write");
                }
                let end = offset as usize + length;
                if length > 0 {
                    bytes.resize(bytes.len().max(end), 0);
                    bytes[offset as usize..end].fill(fill);
                    // A write takes set-user-ID away, but not from root.
                    data.mode = volume.metadata().expect("fstat").mode() & 0o7777;
                    assert_eq!(data.mode, plain.metadata().expect("fstat").mode() & 0o7777, "mode after a write");
                }
            }
            17 => {
                for file in [volume, plain] {
                    file.set_len(offset).expect("truncate");
                }
                bytes.resize(offset as usize, 0);
                data.mode = volume.metadata().expect("fstat").mode() & 0o7777;
                assert_eq!(data.mode, plain.metadata().expect("fstat").mode() & 0o7777, "mode after a truncation");
            }
            18 => {
                for file in [volume, plain] {
                    let mut read = vec![0; length];
                    let mut done = 0;
                    while done < length {
                        match file.read_at(&mut read[done..], offset + done as u64).expect("read") {
                            0 => break,
                            n => done += n,
                        }
                    }
                    let from = bytes.len().min(offset as usize);
                    assert!(read[..done] == bytes[from..bytes.len().min(from + length)], "read at {offset}");
                }
            }
            19 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let punched: Vec<_> =
                    [volume, plain].map(|file| rustix::fs::fallocate(file, flags, offset, length as u64 + 1)).to_vec();
                assert_eq!(punched[0], punched[1], "punch a hole");
                if punched[0].is_ok() {
                    let end = bytes.len().min(offset as usize + length + 1);
                    if (offset as usize) < end {
                        bytes[offset as usize..end].fill(0);
                    }
                    data.mode = volume.metadata().expect("fstat").mode() & 0o7777;
                    assert_eq!(data.mode, plain.metadata().expect("fstat").mode() & 0o7777, "mode after a hole");
                }
            }
            20 => {
                let seen = |file: &File| {
                    let meta = file.metadata().expect("fstat");
                    (meta.len(), meta.mode(), meta.nlink())
                };
                assert_eq!(seen(volume), seen(plain), "fstat");
                assert_eq!(seen(volume).0, bytes.len() as u64);
            }
            _ => {
                drop(data);
                self.open.swap_remove(at);
            }
        }
    }
}

trait NoFollow {
    fn custom_flags_nofollow(&mut self) -> &mut Self;
}

impl NoFollow for OpenOptions {
    fn custom_flags_nofollow(&mut self) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, OFlags::NOFOLLOW.bits() as i32)
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// A long run would else look at ever more names: each look at all of them takes longer than the one before.
const MOST_NAMES: usize = 200;

case!("random_operations_do_what_they_do_on_a_directory", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    let (plain, backing) = (stage.mkdir("plain"), stage.mkdir("vol"));
    let mut options: Vec<std::ffi::OsString> = vec!["--volume-ttl".into(), "0".into()];
    options.extend(volume(&backing, "/data", "rw"));
    let rootfs = stage.mount(&image, "rootfs", options);
    let (volume, model, seed) = (rootfs.join("data"), Model::default(), a_seed());
    let mut world = World { volume, backing, plain, model, open: Vec::new(), random: Random(seed) };
    walk_at_random(stage, &mut world, seed, 1);
});

// The same in a writable rootfs, whose image has what such steps left: it is copied up, hidden and moved from then on. The next mount and a
// committed image have it all.
case!("random_operations_in_a_writable_rootfs_do_what_they_do_on_a_directory", on::fuse, |stage: &Stage| {
    let options = ["--id", "k", "--upper", "changes"];
    let world = change_at_random(stage, &options);
    stage.unmount(stage.path("rootfs"));
    let rootfs = stage.mount("image", "rootfs", options);
    world.model.check_all(&rootfs.join("data"));
    check_committed(stage, &world.model);
});

// Where changes end with the rootfs, content comes only when it is written.
case!("random_operations_in_a_writable_rootfs_that_ends_do_what_they_do_on_a_directory", on::fuse, |stage: &Stage| {
    let world = change_at_random(stage, &["--id", "k", "--writable"]);
    check_committed(stage, &world.model);
});

fn check_committed(stage: &Stage, model: &Model) {
    stage.fsprov(["commit", "k", "next"]).run().ok();
    stage.unmount(stage.path("rootfs"));
    let next = stage.mount("next", "next", [] as [&str; 0]);
    model.check_all(&next.join("data"));
    stage.unmount(&next);
}

fn change_at_random(stage: &Stage, options: &[&str]) -> World {
    let (plain, image, seed) = (stage.mkdir("plain"), stage.mkdir("image"), a_seed());
    let before = stage.mkdir("image/data");
    let (volume, backing, model) = (before.clone(), before, Model::default());
    let mut world = World { volume, backing, plain, model, open: Vec::new(), random: Random(seed) };
    for _ in 0..400 {
        world.step(&mut Vec::new());
    }
    world.open.clear();
    super::upper::import(stage, &image);
    let rootfs = stage.mount("image", "rootfs", options);
    world.volume = rootfs.join("data");
    // Nobody else may change what lies in the directory for changes.
    world.backing.clone_from(&world.volume);
    // The kernel goes on with the numbers that it knows.
    for _ in 0..5 {
        walk_at_random(stage, &mut world, seed, 5);
        stage.fsprov(["restart", "k"]).run().ok();
        world.model.check_all(&world.volume);
    }
    world.open.clear();
    world
}

fn a_seed() -> u64 {
    number("FSPROV_TEST_MODEL_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        now.as_nanos() as u64 ^ u64::from(std::process::id()) << 40
    })
}

/// One of so many parts of all steps.
fn walk_at_random(stage: &Stage, world: &mut World, seed: u64, parts: u64) {
    let steps = number("FSPROV_TEST_MODEL_STEPS").unwrap_or(STEPS) / parts;
    let mut last = Vec::new();
    // A long run says every 10,000 steps where it is.
    let told = std::env::var_os("FSPROV_TEST_MODEL_STEPS").map(|_| {
        let path = std::env::var_os("FSPROV_TEST_MODEL_REPORT").map_or_else(|| stage.path("model"), PathBuf::from);
        OpenOptions::new().append(true).create(true).open(path).expect("open the report")
    });
    let tell = |said: &str| {
        if let Some(mut file) = told.as_ref() {
            let line = format!("{}: FSPROV_TEST_MODEL_SEED={seed}: {said} without a difference\n", stage.lane.name);
            file.write_all(line.as_bytes()).expect("report");
        }
    };
    for n in 0..steps {
        if n % 10_000 == 0 && n > 0 {
            tell(&format!("{n} of {steps} steps"));
        }
        let work = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            world.step(&mut last);
            if n % 40 == 0 {
                for root in [&world.volume, &world.plain, &world.backing] {
                    world.model.check_all(root);
                }
            }
        }));
        if work.is_err() {
            // The panic's own message was kept by the harness's hook.
            let tail = last[last.len().saturating_sub(8)..].join("; ");
            panic!("at step {n}; FSPROV_TEST_MODEL_SEED={seed} FSPROV_TEST_MODEL_STEPS={steps}; the last: {tail}");
        }
    }
    stage.note(format!("FSPROV_TEST_MODEL_SEED={seed}: {steps} steps\n"));
    tell(&format!("all {steps} steps"));
}

/// How long [`ATTACKED`] runs where FSPROV_TEST_ATTACK_S says nothing.
const ATTACK: Duration = Duration::from_secs(2);
const SECRET: &str = "outside";

fn snapshot(dir: &Path) -> BTreeMap<String, (u32, u64, Vec<u8>)> {
    let read = |e: std::io::Result<fs::DirEntry>| {
        let e = e.expect("entry");
        let meta = e.metadata().expect("stat");
        let content = if meta.is_file() { fs::read(e.path()).expect("read") } else { Vec::new() };
        (e.file_name().to_string_lossy().into_owned(), (meta.mode(), meta.nlink(), content))
    };
    fs::read_dir(dir).expect("readdir").map(read).collect()
}

/// Everything that a process can do with names, through the mount. Symlinks are not followed on this side, where following
/// them is the kernel's business: what leads outside then is the server's doing.
fn step_by_step(data: &File, path: &str, flags: OFlags) -> rustix::io::Result<std::os::fd::OwnedFd> {
    let (dirs, last) = path.rsplit_once('/').unwrap_or((".", path));
    let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = rustix::fs::openat(data, ".", step, Mode::empty())?;
    for name in dirs.split('/') {
        at = rustix::fs::openat(&at, name, step, Mode::empty())?;
    }
    rustix::fs::openat(&at, last, flags, Mode::empty())
}

fn probe(data: &File, reads: &AtomicU64) {
    let how = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::BENEATH;
    let open = |path: &str, flags| {
        match rustix::fs::openat2(data, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
            // Under scripts/enosys: by hand, a step for each name.
            Err(Errno::NOSYS) => step_by_step(data, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW),
            other => other,
        }
    };
    if let Ok(fd) = open("a/b/file", OFlags::RDWR | OFlags::NOFOLLOW) {
        let mut file = File::from(fd);
        let mut text = String::new();
        if file.read_to_string(&mut text).is_ok() {
            assert_ne!(text, SECRET, "read a file outside");
            reads.fetch_add(1, Ordering::Relaxed);
        }
        let _ = file.write_all_at(b"inside!", 0);
        let _ = file.set_permissions(fs::Permissions::from_mode(0o640));
        let _ = file.set_len(7);
    }
    for place in ["a", "a/b"] {
        let Ok(dir) = open(place, OFlags::RDONLY | OFlags::DIRECTORY) else { continue };
        let mode = Mode::from_raw_mode(0o600);
        let _ = rustix::fs::openat(&dir, "made", OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY, mode);
        let _ = rustix::fs::mkdirat(&dir, "dir", mode);
        let _ = rustix::fs::symlinkat("/etc/passwd", &dir, "sym");
        let _ = rustix::fs::linkat(&dir, "file", &dir, "hard", rustix::fs::AtFlags::empty());
        let _ = rustix::fs::renameat(&dir, "made", &dir, "moved");
        for name in ["moved", "hard", "sym"] {
            let _ = rustix::fs::unlinkat(&dir, name, rustix::fs::AtFlags::empty());
        }
        let _ = rustix::fs::unlinkat(&dir, "dir", rustix::fs::AtFlags::REMOVEDIR);
        for entry in rustix::fs::Dir::read_from(&dir).into_iter().flatten().flatten() {
            assert_ne!(entry.file_name().to_bytes(), b"only-outside", "listed a directory outside");
        }
    }
    let above = rustix::fs::openat(data, "a/../../outside/file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    assert!(above.is_err(), "`..` led out of the rootfs");
}

case!("swapping_names_under_a_mount_opens_nothing_outside", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    let (root, outside) = (stage.mkdir("vol"), stage.mkdir("outside"));
    for dir in ["vol/a/b", "vol/spare/b", "outside/b"] {
        stage.mkdir(dir);
        let text = if dir.starts_with("vol") { "inside!" } else { SECRET };
        stage.write(format!("{dir}/file"), text);
    }
    for dir in [&outside, &outside.join("b")] {
        fs::write(dir.join("file"), SECRET).expect("write");
        fs::write(dir.join("only-outside"), SECRET).expect("write");
    }
    symlink(&outside, root.join("link")).expect("symlink");
    symlink("../outside", root.join("up")).expect("symlink");
    symlink("../../outside/b", root.join("a/deep")).expect("symlink");
    symlink(outside.join("file"), root.join("a/b/to-file")).expect("symlink");
    symlink("/proc/self/cwd/..", root.join("a/magic")).expect("symlink");
    let before = (snapshot(&outside), snapshot(&outside.join("b")));
    let mut options: Vec<std::ffi::OsString> = ["--id", "v", "--volume-ttl", "0"].map(Into::into).to_vec();
    options.extend(volume(&root, "/data", "rw"));
    let rootfs = stage.mount(&image, "rootfs", options);

    let place = |dir: &Path| File::open(dir).expect("open a directory");
    let (stop, swaps, reads) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let lasts = number("FSPROV_TEST_ATTACK_S").map_or(ATTACK, Duration::from_secs);
    let data = place(&rootfs.join("data"));
    // By descriptor, from the host's side and from inside.
    let swapped =
        [("", "a", "link"), ("", "a", "up"), ("a", "b", "deep"), ("a/b", "file", "to-file"), ("a", "b", "magic")];
    let sides = [
        place(&root.join("a/b")),
        place(&root.join("a")),
        place(&root),
        place(&rootfs.join("data/a/b")),
        place(&rootfs.join("data/a")),
        place(&rootfs.join("data")),
    ];
    std::thread::scope(|scope| {
        for (n, (dir, one, other)) in swapped.into_iter().enumerate() {
            let (stop, swaps, sides) = (&stop, &swaps, &sides);
            scope.spawn(move || {
                let side = if n % 2 == 0 { 0 } else { 3 };
                let at = &sides[side
                    + match dir {
                        "a/b" => 0,
                        "a" => 1,
                        _ => 2,
                    }];
                while !stop.load(Ordering::Relaxed) {
                    let done = rustix::fs::renameat_with(at.as_fd(), one, at.as_fd(), other, RenameFlags::EXCHANGE);
                    let count = swaps.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
                    if count % 8 == 0 {
                        // Else two busy CPUs leave nothing for who is to be attacked.
                        std::thread::sleep(Duration::from_micros(100));
                    }
                }
            });
        }
        let probes: Vec<_> = (0..3)
            .map(|_| {
                let (data, reads) = (&data, &reads);
                scope.spawn(move || {
                    let start = Instant::now();
                    // A machine that is busy with others gets as long as it needs to come through at times.
                    let is_slow = || reads.load(Ordering::Relaxed) <= 20 && start.elapsed() < 20 * ATTACK;
                    while start.elapsed() < lasts || is_slow() {
                        probe(data, reads);
                    }
                })
            })
            .collect();
        let outcomes: Vec<_> = probes.into_iter().map(|p| p.join()).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(outcomes.iter().all(Result::is_ok), "a probe got outside");
    });
    assert_eq!((snapshot(&outside), snapshot(&outside.join("b"))), before, "something outside was changed");
    let (swaps, reads) = (swaps.into_inner(), reads.into_inner());
    assert!(swaps > 100 && reads > 10, "an attack that does nothing: {swaps} swaps, {reads} reads");
    stage.note(format!("{swaps} swaps, {reads} reads\n"));
    // Names outside cannot be taken in either.
    let into = |work: rustix::io::Result<()>| assert_eq!(work, Err(Errno::XDEV));
    into(rustix::fs::link(outside.join("file"), rootfs.join("data/hard")));
    into(rustix::fs::rename(outside.join("file"), rootfs.join("data/hard")));
    let stats = stage.fsprov(["stats", "--json", "v"]).run().ok().json();
    assert_eq!(stats["worker"]["panics"].as_u64(), Some(0), "{stats:#}");
});

// More open files than the server may have, and a tree deeper than a path is long: each a refusal of that request, no end of the server.
case!(
    "too_much_is_refused_and_the_server_goes_on",
    |lane| lane.name == "fuse-user",
    &[Need::Tool("prlimit")],
    |stage: &Stage| {
        let image = stage.small_image();
        let backing = stage.mkdir("vol");
        let program = crate::common::stage::program();
        let mut call = stage.tool("prlimit", ["--nofile=400:400", "--"]).arg(program);
        call = call.args(["mount", "--backend", "fuse", "--id", "v"]).args(volume(&backing, "/data", "rw"));
        call.arg(&image).arg(stage.path("rootfs")).run().ok();
        let data = stage.path("rootfs/data");
        for n in 0..600 {
            fs::write(backing.join(format!("f{n}")), "x").expect("write");
        }
        let mut open = Vec::new();
        let refused = loop {
            match File::open(data.join(format!("f{}", open.len()))) {
                Ok(file) => open.push(file),
                Err(e) => break Errno::from_io_error(&e),
            }
            assert!(open.len() < 600, "there is no cap");
        };
        assert_eq!(refused, Some(Errno::NFILE), "after {}", open.len());
        assert!(open.len() >= 64, "{}", open.len());
        // What is open stays good, and names and attributes need no room.
        assert_eq!(open[0].read_at(&mut [0; 4], 0).expect("read"), 1);
        assert_eq!(fs::read_dir(&data).map(Iterator::count).ok(), None, "a directory is an open file too");
        assert_eq!(fs::metadata(data.join("f599")).expect("stat").len(), 1);
        open.truncate(10);
        let again = || File::open(data.join("f599")).is_ok();
        assert!(crate::common::system::eventually(Duration::from_secs(10), again), "closed files make room");
        drop(open);
        // 100 levels of 200 bytes: five times PATH_MAX.
        let name = "d".repeat(200);
        let mut at = File::open(&data).expect("open");
        for _ in 0..100 {
            rustix::fs::mkdirat(&at, &*name, Mode::RWXU).expect("mkdir");
            let next = rustix::fs::openat(&at, &*name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
            at = File::from(next.expect("open"));
        }
        let made = rustix::fs::openat(&at, "deep", OFlags::CREATE | OFlags::RDWR, Mode::RUSR).expect("create");
        rustix::io::write(&made, b"bottom").expect("write");
        drop((made, at));
        let count = stage.tool("find", ["-name", "deep"]).cwd(&data).run().ok().out();
        assert_eq!(count.len(), 100 * 201 + "./deep\n".len());
        stage.tool("rm", ["-r"]).arg(data.join(&name)).run().ok();
        assert!(!backing.join(&name).exists());
        let stats = stage.fsprov(["stats", "--json", "v"]).run().ok().json();
        assert_eq!(stats["worker"]["panics"].as_u64(), Some(0), "{stats:#}");
    },
);
