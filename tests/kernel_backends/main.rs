//! The backends that use kernel mounts, driven as a library, each test with directories of its own.
//!
//! The program runs in a mount namespace of its own (tests/common/inside.rs), with a tmpfs on /tmp.

mod bind;
#[path = "../common/mod.rs"]
#[allow(dead_code, unused_imports, clippy::pedantic, reason = "what the suites need of it is more")]
mod common;
mod copy;
mod overlay;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use fsprov::internals::backend::{self, Backend, Detach, Health, Support};
use fsprov::internals::host::Host;
use fsprov::internals::plan::{IdRange, Layer, Ownership, Plan};
use fsprov::internals::sys::mountinfo;
use fsprov::internals::traces::{Journal, Traces};
use fsprov::volume::{Access, ContainerPath, Form, Volume};
use fsprov::{Error, Kind, Result};
use rustix::mount::{MountFlags, MountPropagationFlags};

fn main() -> ExitCode {
    env_logger::init();
    common::inside::main(&[], prepare_namespace, &[bind::TESTS, overlay::TESTS, copy::TESTS].concat())
}

fn prepare_namespace() -> std::result::Result<(), String> {
    let flags = MountFlags::empty();
    rustix::mount::mount("tmpfs", "/tmp", "tmpfs", flags, Some(c"mode=0777")).map_err(|e| format!("tmpfs on /tmp: {e}"))
}

/// The tests of one file, by name.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub(crate) const TESTS: &[(&str, crate::common::inside::Test)] = &[$((stringify!($name), || {
            $name();
            Ok(())
        })),*];
    };
}
pub(crate) use tests;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Directories of one test.
struct Place {
    base: PathBuf,
}

impl Place {
    fn new() -> Self {
        Self::at(Path::new(&format!("/tmp/p{}", NEXT.fetch_add(1, Ordering::Relaxed))))
    }

    fn at(base: &Path) -> Self {
        let place = Place { base: base.to_owned() };
        for dir in ["layer/etc", "layer/data", "layer/run", "layer/var", "layer/tmp", "rootfs", "state"] {
            fs::create_dir_all(place.base.join(dir)).unwrap();
        }
        fs::write(place.base.join("layer/etc/passwd"), "image").unwrap();
        fs::set_permissions(place.base.join("layer/etc/passwd"), fs::Permissions::from_mode(0o666)).unwrap();
        symlink("/run", place.base.join("layer/var/run")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.join(name)
    }

    fn rootfs(&self, name: &str) -> PathBuf {
        self.base.join("rootfs").join(name)
    }

    fn dir(&self, name: &str) -> PathBuf {
        let dir = self.base.join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn plan(&self, volumes: Vec<Volume>) -> Plan {
        let mut plan = Plan::new("test".parse().unwrap(), self.path("rootfs"), self.path("state"));
        plan.layers = vec![Layer { root: self.path("layer") }];
        plan.volumes = fsprov::volume::order(volumes).unwrap();
        plan
    }

    /// Mounts below this test's directories.
    fn mounts(&self) -> Vec<PathBuf> {
        mountinfo::mounts_below(&self.base).unwrap().into_iter().map(|m| m.point).collect()
    }
}

fn volume(source: &Path, target: &str, access: Access) -> Volume {
    let meta = fs::metadata(source).unwrap();
    let form = match (meta.is_dir(), meta.is_file()) {
        (true, _) => Form::Directory,
        (_, true) => Form::File,
        _ => Form::Special,
    };
    let target = ContainerPath::new(OsStr::new(target)).unwrap();
    Volume { source: source.to_owned(), target, access, form, powers: fsprov::volume::Powers::default() }
}

/// Keeps what a backend wrote down; fails at the n-th note (from 1) where told to.
#[derive(Default)]
struct Notes {
    last: Traces,
    count: u32,
    fail_at: Option<u32>,
}

impl Notes {
    fn note(&mut self, traces: &Traces) -> Result<()> {
        self.count += 1;
        if self.fail_at == Some(self.count) {
            return Err(Error::new(Kind::Io, "write record", "test", "planted"));
        }
        self.last = traces.clone();
        Ok(())
    }
}

const BIND: &dyn Backend = &backend::bind::Bind;
const COPY: &dyn Backend = &backend::copy::Copy;
const OVERLAY: &dyn Backend = &backend::overlay::Overlay;

/// Open what the plan names, and have the backend make it.
fn make(backend: &dyn Backend, plan: &Plan, notes: &mut Notes) -> Result<()> {
    let places = fsprov::provisioner::open(plan)?;
    let mut note = |traces: &Traces| notes.note(traces);
    backend.provision(&Host::probe(), plan, &places, &mut Journal { note: &mut note, meter: None, shelf: None })
}

fn provision(backend: &dyn Backend, plan: &Plan) -> Traces {
    let host = Host::probe();
    assert_eq!(backend.support(&host, plan), Support::Yes);
    let mut notes = Notes::default();
    make(backend, plan, &mut notes).unwrap();
    assert_eq!(backend.health(plan, &notes.last, &mount_table()), Health::Ready);
    notes.last
}

fn mount_table() -> mountinfo::Table {
    mountinfo::Table::read().unwrap()
}

fn fail(backend: &dyn Backend, plan: &Plan) -> Error {
    make(backend, plan, &mut Notes::default()).unwrap_err()
}

fn destroy(backend: &dyn Backend, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
    backend.destroy(&Host::probe(), plan, traces, how)
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

fn mount_tmpfs(at: &Path, flags: MountFlags) {
    rustix::mount::mount("theirs", at, "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
}

/// Writes `tree` below `dir`: names ending in `/` are directories, others files that hold their own name and `text`.
fn fill(dir: &Path, tree: &[&str], text: &str) {
    for name in tree {
        let path = dir.join(name);
        if name.ends_with('/') {
            fs::create_dir_all(&path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }
}

/// Every name below `dir` with what is in it: `/` a directory, else the file's content.
fn listing(dir: &Path) -> Vec<(String, String)> {
    fn add(top: &Path, dir: &Path, out: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            let name = entry.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
            let meta = fs::symlink_metadata(&entry).unwrap();
            if meta.is_dir() {
                out.push((name, "/".into()));
                add(top, &entry, out);
            } else {
                out.push((name, fs::read_to_string(&entry).unwrap_or_else(|e| e.to_string())));
            }
        }
    }
    let mut out = Vec::new();
    add(dir, dir, &mut out);
    out.sort();
    out
}

fn layered(place: &Place, layers: &[&[&str]]) -> Plan {
    let mut plan = place.plan(vec![]);
    plan.layers.clear();
    for (n, tree) in layers.iter().enumerate() {
        let root = place.dir(&format!("l{n}"));
        fill(&root, tree, &n.to_string());
        plan.layers.push(Layer { root });
    }
    plan
}

/// False only where the calls are missing that this backend is built on (a seccomp filter, in trials of that).
fn overlay_works_here() -> bool {
    match OVERLAY.host_support(&Host::probe()) {
        Support::Yes => true,
        Support::No { reason, .. } => {
            assert!(reason.contains("lacks open_tree"), "{reason}");
            false
        }
    }
}
