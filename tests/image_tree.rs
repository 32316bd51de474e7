//! What the image tree costs its user once it is warm, counted and not timed: requests, memory, descriptors.
//!
//! The server runs in this process, on a FUSE mount in a mount namespace of its own (tests/common/inside.rs).

#[allow(dead_code, unused_imports, clippy::pedantic, reason = "what the suites need of it is more")]
mod common;

use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use common::Need;
use fsprov::internals::fuse::adapter::{AdapterOptions, FuseAdapter};
use fsprov::internals::fuse::buffers::Buffers;
use fsprov::internals::fuse::counters::{Counters, Operation};
use fsprov::internals::fuse::mount::{self, Method, MountOptions, Mounted, OtherUsers};
use fsprov::internals::fuse::session::{self, Start};
use fsprov::internals::host::Host;
use fsprov::internals::index::{Builder, Entry, Index, Time, What, Whiteouts};
use fsprov::internals::place::{Place, Point};
use fsprov::internals::plan::Ownership;
use fsprov::internals::sys::mount::Unmount;
use fsprov::internals::tree::image::{ImageTree, Trust};
use libtest_mimic::Failed;

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        const TESTS: &[(&str, common::inside::Test)] = &[$((stringify!($name), $name)),*];
    };
}
tests! {
    a_second_find_sends_no_request,
    a_cached_file_is_read_without_a_request,
    a_name_that_is_not_there_is_asked_once,
    a_hundred_layers_are_served_as_one,
    a_file_cut_short_is_an_error_and_the_server_lives,
    a_million_files_leave_little_memory,
}

fn main() -> ExitCode {
    common::inside::main(&[Need::DevFuse], || Ok(()), TESTS)
}

/// A mounted image tree, unmounted when it goes.
struct Served {
    dir: tempfile::TempDir,
    mounted: Mounted,
    counters: Arc<Counters>,
    server: Option<std::thread::JoinHandle<fsprov::Result<()>>>,
}

impl Served {
    /// Serve an image: layers are the directories `0`, `1`, ... below `dir`.
    fn new(dir: tempfile::TempDir, builder: Builder) -> Result<Self, Failed> {
        let layers: Vec<OwnedFd> = (0..builder.layer_count())
            .map(|n| {
                std::fs::create_dir_all(dir.path().join(n.to_string()))?;
                Ok::<_, std::io::Error>(std::fs::File::open(dir.path().join(n.to_string()))?.into())
            })
            .collect::<Result<_, _>>()?;
        let file = dir.path().join("index");
        builder.write_file(&file)?;
        Self::with_index(dir, &file, layers)
    }

    fn with_index(dir: tempfile::TempDir, index: &Path, layers: Vec<OwnedFd>) -> Result<Self, Failed> {
        let tree = Arc::new(ImageTree::open(Index::open(index)?, layers, Ownership::default(), Trust::Size)?);
        let buffers = Arc::new(Buffers::new(2, session::MIN_READ_BUFFER));
        let adapter = FuseAdapter::new(tree, AdapterOptions::default(), Arc::clone(&buffers));
        let counters = adapter.counters();
        let point = dir.path().join("mnt");
        std::fs::create_dir(&point)?;
        let point = point.canonicalize()?;
        let parent = Place::open(point.parent().expect("it has a parent"))?;
        let point = Point::new(parent, "mnt".as_ref())?;
        let request = MountOptions {
            point: &point,
            source: "fsprov-test",
            read_only: true,
            others: OtherUsers::Usual,
            nosuid: false,
            nodev: false,
        };
        let method = Method::choose(&Host::probe())?;
        let mounted = mount::mount(&method, &request, mount::prepare(&method, &request)?)?;
        let init = session::read_init(&mounted.connection)?;
        adapter.pace().watch(&mounted.connection, 2)?;
        let running = session::start(adapter, &mounted.connection, &init, Start::First, &buffers)?;
        let server = Some(std::thread::spawn(move || running.wait()));
        Ok(Served { dir, mounted, counters, server })
    }

    fn mount(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Requests but statfs: GNU find asks the root for its file system's type once a run, and the kernel passes each
    /// statfs on (fs/fuse/inode.c, fuse_statfs has no cache).
    fn asked(&self) -> u64 {
        self.counters.total() - self.counters.of(Operation::StatFs)
    }

    fn all(&self) -> String {
        let mut text = String::new();
        for &operation in Operation::ALL.iter().filter(|o| self.counters.of(**o) > 0) {
            let _ = write!(text, "{}={} ", operation.name(), self.counters.of(operation));
        }
        text
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = mount::unmount(&self.mounted.info, Unmount::Lazy, Method::choose(&Host::probe()).ok().as_ref());
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn row(path: String, what: What) -> Entry {
    let mtime = Time { secs: 1_700_000_000, nanos: 1 };
    Entry { path: path.into_bytes(), what, mode: 0o755, uid: 0, gid: 0, mtime, xattrs: Vec::new() }
}

fn file(size: u64) -> What {
    What::File { size, content: None, sha256: None }
}

/// 2,000 files and 100 links in 100 directories, the files on the disk too.
fn sample() -> Result<Served, Failed> {
    let dir = tempfile::tempdir()?;
    let mut builder = Builder::new();
    builder.begin_layer(Whiteouts::Plain)?;
    for d in 0..100 {
        std::fs::create_dir_all(dir.path().join(format!("0/d{d}")))?;
        for f in 0..20 {
            std::fs::write(dir.path().join(format!("0/d{d}/f{f}")), format!("{d} {f}\n"))?;
            builder.add(row(format!("d{d}/f{f}"), file(format!("{d} {f}\n").len() as u64)))?;
        }
        builder.add(row(format!("d{d}/l"), What::Symlink(b"f0".to_vec())))?;
    }
    std::fs::write(dir.path().join("0/large"), vec![7; 3_000_000])?;
    builder.add(row("large".into(), file(3_000_000)))?;
    Served::new(dir, builder)
}

/// Runs a program that must succeed: what it printed.
fn run(program: &str, arguments: &[&str], at: &Path) -> Result<Vec<u8>, Failed> {
    let output = Command::new(program).args(arguments).current_dir(at).output()?;
    if !output.status.success() || !output.stderr.is_empty() {
        return Err(
            format!("{program} {arguments:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into()
        );
    }
    Ok(output.stdout)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, want: &T) -> Result<(), Failed> {
    if found == want { Ok(()) } else { Err(format!("{what}: {found:?}, and should be {want:?}").into()) }
}

/// Another process may drop the machine's caches at any moment: a count above zero must come three times in a row.
fn none(served: &Served, what: &str, mut work: impl FnMut() -> Result<(), Failed>) -> Result<(), Failed> {
    work()?;
    for _ in 0..3 {
        let (before, shown) = (served.asked(), served.all());
        work()?;
        if served.asked() == before {
            return Ok(());
        }
        if !shown.is_empty() {
            log(&format!("{what}: before {shown}, after {}", served.all()));
        }
    }
    Err(format!("{what} asked the server again: {}", served.all()).into())
}

fn log(text: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{text}\n").as_bytes());
}

fn a_second_find_sends_no_request() -> Result<(), Failed> {
    let served = sample()?;
    let mut listed = Vec::new();
    none(&served, "find -ls", || {
        listed = run("find", &[".", "-ls"], &served.mount())?;
        Ok(())
    })?;
    same("lines", &String::from_utf8_lossy(&listed).lines().count(), &2202)
}

fn a_cached_file_is_read_without_a_request() -> Result<(), Failed> {
    let served = sample()?;
    let mut bytes = Vec::new();
    none(&served, "open and read", || {
        bytes = std::fs::read(served.mount().join("large"))?;
        let small = std::fs::read(served.mount().join("d7/f9"))?;
        same("content", &small, &b"7 9\n".to_vec())
    })?;
    same("length", &bytes.len(), &3_000_000)?;
    same("bytes", &bytes.iter().all(|b| *b == 7), &true)
}

fn a_name_that_is_not_there_is_asked_once() -> Result<(), Failed> {
    let served = sample()?;
    let missing = served.mount().join("d3/none");
    let tried = || same("exists", &missing.symlink_metadata().is_ok(), &false);
    tried()?;
    same("lookups of d3 and of the name", &served.counters.of(Operation::Lookup), &2)?;
    none(&served, "stat of a missing name", tried)
}

fn a_hundred_layers_are_served_as_one() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let mut builder = Builder::new();
    for layer in 0..100 {
        builder.begin_layer(Whiteouts::Oci)?;
        let at = dir.path().join(layer.to_string());
        std::fs::create_dir_all(at.join("own"))?;
        for name in [format!("own/{layer}"), "shared".into()] {
            std::fs::write(at.join(&name), format!("{layer:03}"))?;
            builder.add(row(name, file(3)))?;
        }
        if layer % 2 == 1 {
            builder.add(row(format!("own/.wh.{}", layer - 1), file(0)))?;
        }
    }
    let served = Served::new(dir, builder)?;
    same("shared", &std::fs::read(served.mount().join("shared"))?, &b"099".to_vec())?;
    let mut found: Vec<(String, Vec<u8>)> = Vec::new();
    for item in std::fs::read_dir(served.mount().join("own"))? {
        let item = item?;
        found.push((item.file_name().to_string_lossy().into_owned(), std::fs::read(item.path())?));
    }
    found.sort();
    let mut want: Vec<_> =
        (0..100).filter(|l| l % 2 == 1).map(|l| (l.to_string(), format!("{l:03}").into_bytes())).collect();
    want.sort();
    same("own", &found, &want)
}

fn a_file_cut_short_is_an_error_and_the_server_lives() -> Result<(), Failed> {
    let served = sample()?;
    let source = served.dir.path().join("0/large");
    let read = |offset: u64| -> std::io::Result<usize> {
        use std::os::unix::fs::FileExt as _;
        std::fs::File::open(served.mount().join("large"))?.read_at(&mut [0; 4096], offset)
    };
    same("read before", &read(0)?, &4096)?;
    // The server has it open and mapped by now.
    std::fs::File::options().write(true).open(&source)?.set_len(100_000)?;
    same("read behind the new end", &read(2_500_000).map_err(|e| e.raw_os_error()), &Err(Some(libc::EIO)))?;
    same("another file", &std::fs::read(served.mount().join("d0/f0"))?, &b"0 0\n".to_vec())
}

/// The limits of the design: private memory and descriptors of a server after a walk over 1,000,000 files.
const PRIVATE_KIB: u64 = 64 << 10;
const DESCRIPTORS: usize = 256;

/// In three processes: one builds the index, one serves it under the limit and measures itself, this one starts them. So
/// neither the build's memory nor other tests' counts.
fn a_million_files_leave_little_memory() -> Result<(), Failed> {
    const NAME: &str = "a_million_files_leave_little_memory";
    const BUILD: &str = "FSPROV_TEST_BUILD";
    const SERVE: &str = "FSPROV_TEST_SERVE";
    if let Some(to) = std::env::var_os(BUILD) {
        let mut builder = Builder::new();
        builder.begin_layer(Whiteouts::Plain)?;
        for i in 0..1_000_000_u32 {
            builder.add(row(format!("d{:03}/e{:02}/file-{i:07}.txt", i / 10_000, i / 100 % 100), file(0)))?;
        }
        return Ok(builder.write_file(Path::new(&to))?);
    }
    if let Some(index) = std::env::var_os(SERVE) {
        return serve_and_measure(Path::new(&index));
    }
    let dir = tempfile::tempdir()?;
    let index = dir.path().join("made");
    for step in [BUILD, SERVE] {
        let output = Command::new("sh")
            .args(["-c", "ulimit -n 1024 && exec \"$0\" --exact \"$1\""])
            .arg(std::env::current_exe()?)
            .arg(NAME)
            .env(step, &index)
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if !output.status.success() {
            return Err(format!("{step}: {text}\n{}", String::from_utf8_lossy(&output.stdout)).into());
        }
        if step == SERVE {
            log(&text);
        }
    }
    Ok(())
}

fn serve_and_measure(index: &Path) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir(dir.path().join("0"))?;
    let layers = vec![std::fs::File::open(dir.path().join("0"))?.into()];
    let served = Served::with_index(dir, index, layers)?;
    let counted = run("sh", &["-c", "find . -printf '%i %s\\n' | wc -l"], &served.mount())?;
    same("files, 100 directories of 100 directories each, and the root", &counted, &b"1010101\n".to_vec())?;
    let private = private_kib()?;
    let descriptors = std::fs::read_dir("/proc/self/fd")?.count();
    log(&format!("after a walk over 1,000,000 files: {private} KiB private, {descriptors} descriptors"));
    same("private memory within limits", &(private <= PRIVATE_KIB), &true)?;
    same("descriptors within limits", &(descriptors <= DESCRIPTORS), &true)
}

/// Private_Clean and Private_Dirty of this process: a mapping that nobody else has counts, too.
fn private_kib() -> Result<u64, Failed> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let lines = text.lines().filter(|l| l.starts_with("Private_"));
    Ok(lines.filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).sum())
}
