//! The backends that use kernel mounts, driven as a library, each test with directories of its own.
//!
//! The whole program runs itself again in a mount namespace (root) or in a user namespace that owns one (anybody else), with a
//! tmpfs on /tmp: nothing it mounts or makes is ever to be seen outside. Where that is not possible every test shows as
//! ignored with the reason; with FSPROV_TEST_MUST_RUN=1 that is a failure.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use fsprov::backend::{self, Backend, Detach, Health, Journal, Support, Traces};
use fsprov::host::Host;
use fsprov::plan::{IdRange, Layer, Ownership, Plan};
use fsprov::sys::mountinfo;
use fsprov::volume::{Access, ContainerPath, Form, Volume};
use fsprov::{Error, Kind, Result};
use libtest_mimic::{Arguments, Failed, Trial};

const INSIDE: &str = "FSPROV_TEST_INSIDE_NAMESPACE";

fn main() -> ExitCode {
    env_logger::init();
    let args = Arguments::from_args();
    let reason = match std::env::var(INSIDE) {
        Ok(_) => prepare_namespace().err(),
        Err(_) => Some(enter_namespace()),
    };
    let must_run = std::env::var_os("FSPROV_TEST_MUST_RUN").is_some_and(|v| v == "1");
    let trials = TESTS
        .iter()
        .map(|&(name, test)| match &reason {
            None => Trial::test(name, move || {
                test();
                Ok(())
            }),
            Some(why) if must_run => {
                let why = why.clone();
                Trial::test(name, move || Err(Failed::from(why)))
            }
            Some(why) => Trial::test(format!("{name} ({why})"), || Ok(())).with_ignored_flag(true),
        })
        .collect();
    libtest_mimic::run(&args, trials).exit_code()
}

/// Becomes this program inside the namespace; returns why that failed.
fn enter_namespace() -> String {
    let root = rustix::process::geteuid().is_root();
    let how: &[&str] = if root { &["-m"] } else { &["-U", "-r", "-m"] };
    let can = Command::new("unshare").args(how).arg("true").output();
    match can {
        Ok(out) if out.status.success() => {}
        Ok(out) => return String::from_utf8_lossy(&out.stderr).trim().to_owned(),
        Err(e) => return format!("unshare: {e}"),
    }
    let me = std::env::current_exe().expect("own path");
    let error = Command::new("unshare").args(how).arg(me).args(std::env::args_os().skip(1)).env(INSIDE, "1").exec();
    format!("exec unshare: {error}")
}

fn prepare_namespace() -> std::result::Result<(), String> {
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", "/tmp", "tmpfs", flags, Some(c"mode=0777")).map_err(|e| format!("tmpfs on /tmp: {e}"))
}

type Test = fn();
macro_rules! tests {
    ($($name:ident),* $(,)?) => { const TESTS: &[(&str, Test)] = &[$((stringify!($name), $name)),*]; };
}
tests!(
    bind_is_read_only_and_goes_away,
    bind_needs_exactly_one_layer,
    volumes_of_each_kind,
    a_read_only_volume_is_so_with_its_submounts,
    volumes_nest_and_missing_mount_points_are_made_in_writable_ones,
    a_missing_mount_point_is_named_with_the_way_out,
    kinds_must_match,
    links_in_the_image_stay_inside,
    two_names_of_one_place_are_refused,
    a_source_that_became_a_symlink_is_refused,
    mounting_on_the_layer_or_in_it,
    paths_of_any_bytes,
    mounts_are_private_even_below_shared_ones,
    flags_of_the_source_stay,
    mounts_of_others_are_left_alone,
    a_rootfs_in_use_stays_whole,
    a_mount_on_top_is_named,
    a_failed_note_leaves_nothing,
    the_mount_of_another_is_not_taken_for_ours,
    id_maps_shift_owners,
    two_hundred_volumes,
    overlay_merges_layers_with_whiteouts,
    overlay_makes_missing_mount_points,
    overlay_of_one_layer_keeps_its_flags,
    overlay_of_hundreds_of_layers,
    overlay_leaves_nothing_when_it_fails,
    copy_is_the_tree_it_was_made_from,
    copy_of_layers_is_what_overlay_shows,
    copy_with_volumes_and_without_losing_them,
    copy_wants_an_empty_directory_and_leaves_one,
);

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
        Plan {
            id: "test".parse().unwrap(),
            rootfs: self.path("rootfs"),
            layers: vec![Layer { root: self.path("layer") }],
            index: None,
            volumes: fsprov::volume::order(volumes).unwrap(),
            ownership: Ownership::default(),
            state_dir: self.path("state"),
        }
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
    Volume { source: source.to_owned(), target: ContainerPath::new(OsStr::new(target)).unwrap(), access, form }
}

/// Keeps what a backend wrote down; fails at the n-th note (from 1) where told to.
#[derive(Default)]
struct Notes {
    last: Traces,
    count: u32,
    fail_at: Option<u32>,
}

impl Journal for Notes {
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

fn provision(backend: &dyn Backend, plan: &Plan) -> Traces {
    let host = Host::probe();
    assert_eq!(backend.support(&host, plan), Support::Yes);
    let mut notes = Notes::default();
    backend.provision(&host, plan, &mut notes).unwrap();
    assert_eq!(backend.health(plan, &notes.last), Health::Ready);
    notes.last
}

fn fail(backend: &dyn Backend, plan: &Plan) -> Error {
    backend.provision(&Host::probe(), plan, &mut Notes::default()).unwrap_err()
}

fn destroy(backend: &dyn Backend, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
    backend.destroy(&Host::probe(), plan, traces, how)
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

fn mount_tmpfs(at: &Path, flags: rustix::mount::MountFlags) {
    rustix::mount::mount("theirs", at, "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
}

fn bind_is_read_only_and_goes_away() {
    let place = Place::new();
    let plan = place.plan(vec![]);
    let traces = provision(BIND, &plan);
    assert_eq!(fs::read(place.rootfs("etc/passwd")).unwrap(), b"image");
    assert_eq!(errno(fs::write(place.rootfs("etc/passwd"), "x")), Some(libc::EROFS));
    assert_eq!(errno(fs::create_dir(place.rootfs("new"))), Some(libc::EROFS));
    assert_eq!(traces.parts.as_deref(), Some(&[][..]));
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(!destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(BIND.health(&plan, &traces), Health::Gone);
    assert!(place.mounts().is_empty());
    assert_eq!(fs::read_dir(place.path("rootfs")).unwrap().count(), 0);
}

fn bind_needs_exactly_one_layer() {
    let place = Place::new();
    let mut plan = place.plan(vec![]);
    plan.layers.push(Layer { root: place.path("layer") });
    let error = fail(BIND, &plan);
    assert!(error.to_string().contains("multiple layers are not supported by the bind backend"), "{error}");
    let Support::No { reason, .. } = BIND.support(&Host::probe(), &plan) else { panic!() };
    assert_eq!(reason, "multiple layers are not supported by the bind backend");
    plan.layers.clear();
    let error = fail(BIND, &plan);
    assert!(error.to_string().contains("the image has no filesystem layer"), "{error}");
    assert!(place.mounts().is_empty());
}

fn volumes_of_each_kind() {
    let place = Place::new();
    for file in ["ro", "rw", "null"] {
        fs::write(place.path("layer/etc").join(file), "image").unwrap();
    }
    let (rw, ro) = (place.dir("rw"), place.dir("ro"));
    fs::write(ro.join("f"), "host").unwrap();
    for file in ["file-ro", "file-rw"] {
        fs::write(place.path(file), "host").unwrap();
    }
    let plan = place.plan(vec![
        volume(&rw, "/data", Access::Rw),
        volume(&ro, "/run", Access::Ro),
        volume(&place.path("file-ro"), "/etc/ro", Access::Ro),
        volume(&place.path("file-rw"), "/etc/rw", Access::Rw),
        volume(Path::new("/dev/null"), "/etc/null", Access::Rw),
    ]);
    let traces = provision(BIND, &plan);
    assert_eq!(traces.parts.as_ref().unwrap().len(), 5);
    fs::write(place.rootfs("data/new"), "inside").unwrap();
    assert_eq!(fs::read(rw.join("new")).unwrap(), b"inside");
    fs::write(rw.join("new"), "outside").unwrap();
    assert_eq!(fs::read(place.rootfs("data/new")).unwrap(), b"outside");
    assert_eq!(fs::read(place.rootfs("run/f")).unwrap(), b"host");
    assert_eq!(errno(fs::write(place.rootfs("run/f"), "x")), Some(libc::EROFS));
    assert_eq!(fs::read(place.rootfs("etc/ro")).unwrap(), b"host");
    assert_eq!(errno(fs::write(place.rootfs("etc/ro"), "x")), Some(libc::EROFS));
    fs::write(place.rootfs("etc/rw"), "inside").unwrap();
    assert_eq!(fs::read(place.path("file-rw")).unwrap(), b"inside");
    fs::write(place.rootfs("etc/null"), "gone").unwrap();
    assert_eq!(errno(fs::write(place.rootfs("etc/passwd"), "x")), Some(libc::EROFS));
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty());
    assert_eq!(fs::read(rw.join("new")).unwrap(), b"outside");
    assert_eq!(fs::read(place.path("layer/etc/rw")).unwrap(), b"image");
}

fn a_read_only_volume_is_so_with_its_submounts() {
    let place = Place::new();
    let source = place.dir("source/sub");
    mount_tmpfs(&source, rustix::mount::MountFlags::empty());
    fs::write(source.join("f"), "deep").unwrap();
    let plan = place.plan(vec![volume(&place.path("source"), "/data", Access::Ro)]);
    let traces = provision(BIND, &plan);
    assert_eq!(fs::read(place.rootfs("data/sub/f")).unwrap(), b"deep");
    assert_eq!(errno(fs::write(place.rootfs("data/sub/f"), "x")), Some(libc::EROFS));
    fs::write(source.join("f"), "still writable").unwrap();
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(fs::read(source.join("f")).unwrap(), b"still writable");
    assert_eq!(place.mounts(), [source]);
}

fn volumes_nest_and_missing_mount_points_are_made_in_writable_ones() {
    let place = Place::new();
    let (outer, inner, deep) = (place.dir("outer"), place.dir("inner"), place.dir("deep"));
    fs::write(place.path("file"), "host").unwrap();
    let plan = place.plan(vec![
        volume(&deep, "/data/a/b/deep", Access::Ro),
        volume(&inner, "/data/a/b", Access::Rw),
        volume(&outer, "/data", Access::Rw),
        volume(&place.path("file"), "/data/x/file", Access::Ro),
    ]);
    let traces = provision(BIND, &plan);
    fs::write(place.rootfs("data/a/b/f"), "1").unwrap();
    assert_eq!(fs::read(inner.join("f")).unwrap(), b"1");
    assert!(outer.join("a/b").is_dir() && inner.join("deep").is_dir() && outer.join("x/file").is_file());
    assert_eq!(errno(fs::write(place.rootfs("data/a/b/deep/f"), "x")), Some(libc::EROFS));
    assert_eq!(fs::read(place.rootfs("data/x/file")).unwrap(), b"host");
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty());
    // In a volume that is not writable nothing is made.
    let plan = place.plan(vec![volume(&outer, "/data", Access::Ro), volume(&inner, "/data/none", Access::Rw)]);
    let error = fail(BIND, &plan);
    assert!(error.to_string().starts_with("mount volume /data/none: the image has no such directory"), "{error}");
    assert!(place.mounts().is_empty() && !outer.join("none").exists());
}

fn a_missing_mount_point_is_named_with_the_way_out() {
    let place = Place::new();
    fs::write(place.path("file"), "host").unwrap();
    for (source, cause) in [("layer", "the image has no such directory"), ("file", "the image has no such file")] {
        let plan = place.plan(vec![volume(&place.path(source), "/none/here", Access::Rw)]);
        let remedy = "create it in the image, or use --backend fuse";
        assert_eq!(fail(BIND, &plan).to_string(), format!("mount volume /none/here: {cause}; {remedy}"));
        assert_eq!(
            BIND.support(&Host::probe(), &plan),
            Support::No { reason: format!("mount volume /none/here: {cause}"), remedy: remedy.to_owned() }
        );
    }
    assert!(place.mounts().is_empty());
}

fn kinds_must_match() {
    let place = Place::new();
    fs::write(place.path("file"), "host").unwrap();
    for (source, target, part) in [
        ("file", "/data", "the source is a file, and the image has a directory there"),
        ("layer", "/etc/passwd", "the source is a directory, and the image has a file there"),
        ("layer", "/etc/passwd/x", "a part of this path is not a directory in the image"),
    ] {
        let error = fail(BIND, &place.plan(vec![volume(&place.path(source), target, Access::Rw)]));
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().starts_with(&format!("mount volume {target}: {part}")), "{error}");
    }
    let mut plan = place.plan(vec![]);
    plan.rootfs = place.path("file");
    assert!(fail(BIND, &plan).to_string().contains("it is not a directory"));
    assert!(place.mounts().is_empty());
}

fn links_in_the_image_stay_inside() {
    let place = Place::new();
    symlink("../../../../../../etc", place.path("layer/out")).unwrap();
    symlink("/etc/passwd", place.path("layer/name")).unwrap();
    symlink("/proc/self/cwd", place.path("layer/magic")).unwrap();
    let source = place.dir("source");
    fs::write(place.path("file"), "host").unwrap();
    let plan =
        place.plan(vec![volume(&source, "/var/run", Access::Rw), volume(&place.path("file"), "/name", Access::Ro)]);
    let traces = provision(BIND, &plan);
    fs::write(place.rootfs("run/f"), "x").unwrap();
    assert!(source.join("f").exists());
    assert_eq!(fs::read(place.rootfs("etc/passwd")).unwrap(), b"host");
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    let plan = place.plan(vec![volume(&source, "/out", Access::Rw)]);
    let traces = provision(BIND, &plan);
    assert_eq!(mountinfo::mounts_at(&place.rootfs("etc")).unwrap().len(), 1);
    assert!(mountinfo::mounts_at(Path::new("/etc")).unwrap().is_empty());
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    let error = fail(BIND, &place.plan(vec![volume(&source, "/magic", Access::Rw)]));
    assert!(error.to_string().starts_with("mount volume /magic: "), "{error}");
    assert!(place.mounts().is_empty());
}

fn two_names_of_one_place_are_refused() {
    let place = Place::new();
    symlink("/", place.path("layer/top")).unwrap();
    let (a, b) = (place.dir("a"), place.dir("b"));
    let error = fail(BIND, &place.plan(vec![volume(&a, "/run", Access::Rw), volume(&b, "/var/run", Access::Rw)]));
    assert_eq!(error.to_string(), "mount volume /var/run: in this image it is the same place as volume /run");
    let error = fail(BIND, &place.plan(vec![volume(&a, "/top", Access::Rw)]));
    assert_eq!(error.to_string(), "mount volume /top: in this image it leads to the root itself");
    assert!(place.mounts().is_empty());
}

fn a_source_that_became_a_symlink_is_refused() {
    let place = Place::new();
    let plan = place.plan(vec![volume(&place.dir("box/v"), "/data", Access::Rw)]);
    fs::remove_dir(place.path("box/v")).unwrap();
    symlink("/etc", place.path("box/v")).unwrap();
    let error = fail(BIND, &plan);
    assert!(error.to_string().contains("a symlink is in it now"), "{error}");
    fs::remove_file(place.path("box/v")).unwrap();
    fs::write(place.path("box/v"), "").unwrap();
    let error = fail(BIND, &plan);
    assert!(error.to_string().contains("the source was replaced by another kind of file"), "{error}");
    assert!(place.mounts().is_empty());
}

fn mounting_on_the_layer_or_in_it() {
    let place = Place::new();
    for rootfs in ["layer", "layer/data"] {
        let mut plan = place.plan(vec![]);
        plan.rootfs = place.path(rootfs);
        let traces = provision(BIND, &plan);
        assert_eq!(fs::read(plan.rootfs.join("etc/passwd")).unwrap(), b"image");
        assert_eq!(errno(fs::write(plan.rootfs.join("etc/passwd"), "x")), Some(libc::EROFS));
        // A second one of the same layer, which holds the first.
        let mut second = place.plan(vec![]);
        second.rootfs = place.path("rootfs");
        let more = provision(BIND, &second);
        assert!(destroy(BIND, &second, &more, Detach::IfIdle).unwrap());
        assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
        assert!(place.mounts().is_empty());
    }
}

fn paths_of_any_bytes() {
    for name in [&b"a b"[..], b"a,b", b"a\nb", b"a\\040b", b"\xff\xfe", b"a:b", b"#a", b"a\tb"] {
        let place = Place::at(&Path::new("/tmp/bytes").join(OsStr::from_bytes(name)));
        let plan = place.plan(vec![volume(&place.dir("data\n x"), "/data", Access::Rw)]);
        let traces = provision(BIND, &plan);
        fs::write(place.rootfs("data/f"), "x").unwrap();
        assert!(place.path("data\n x/f").exists());
        assert_eq!(place.mounts().len(), 2);
        assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
        assert!(place.mounts().is_empty());
        assert!(!destroy(BIND, &plan, &traces, Detach::Lazy).unwrap());
    }
}

fn mounts_are_private_even_below_shared_ones() {
    use rustix::mount::MountPropagationFlags;
    let place = Place::new();
    mount_tmpfs(&place.path("rootfs"), rustix::mount::MountFlags::empty());
    rustix::mount::mount_change(place.path("rootfs"), MountPropagationFlags::SHARED).unwrap();
    // A peer, where what is mounted below the first shows up as well.
    let peer = place.dir("peer");
    rustix::mount::mount_bind(place.path("rootfs"), &peer).unwrap();
    fs::create_dir(place.rootfs("r")).unwrap();
    let mut plan = place.plan(vec![volume(&place.dir("v"), "/data", Access::Rw)]);
    plan.rootfs = place.rootfs("r");
    let traces = provision(BIND, &plan);
    let mine = mountinfo::tree_of(mountinfo::read().unwrap(), traces.mount_id.unwrap());
    assert_eq!(mine.len(), 2);
    assert!(mine.iter().all(|m| m.shared.is_none() && m.master.is_none()), "{mine:?}");
    // The copy that the kernel made below the peer is as read-only, and has no volume.
    assert_eq!(place.mounts().len(), 5, "{:?}", place.mounts());
    assert_eq!(errno(fs::write(peer.join("r/etc/passwd"), "x")), Some(libc::EROFS));
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(place.mounts().len(), 2, "{:?}", place.mounts());
}

fn flags_of_the_source_stay() {
    use rustix::mount::MountFlags;
    let place = Place::new();
    let locked = place.dir("locked");
    mount_tmpfs(&locked, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC);
    fs::create_dir_all(locked.join("layer/data")).unwrap();
    fs::create_dir(locked.join("volume")).unwrap();
    let mut plan = place.plan(vec![volume(&locked.join("volume"), "/data", Access::Rw)]);
    plan.layers[0].root = locked.join("layer");
    let traces = provision(BIND, &plan);
    for (point, access) in [(place.path("rootfs"), "ro"), (place.rootfs("data"), "rw")] {
        let mount = mountinfo::mounts_at(&point).unwrap().pop().unwrap();
        for option in [access, "nosuid", "nodev", "noexec"] {
            assert!(mount.has_option(option), "{option}: {mount:?}");
        }
    }
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
}

fn mounts_of_others_are_left_alone() {
    let place = Place::new();
    let plan = place.plan(vec![volume(&place.dir("v"), "/data", Access::Rw)]);
    let traces = provision(BIND, &plan);
    let (in_image, on_volume) = (place.rootfs("tmp"), place.rootfs("data"));
    for at in [&in_image, &on_volume] {
        mount_tmpfs(at, rustix::mount::MountFlags::empty());
        fs::write(at.join("theirs"), "x").unwrap();
    }
    let before = place.mounts();
    let error = destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    for at in [&in_image, &on_volume] {
        assert!(error.to_string().contains(&format!("theirs on {}", at.display())), "{error}");
        assert!(at.join("theirs").exists());
        rustix::mount::unmount(at, rustix::mount::UnmountFlags::empty()).unwrap();
    }
    assert_eq!(before.len(), place.mounts().len() + 2);
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    // Lazily everything goes out of sight, and what is in it stays for who holds it.
    let traces = provision(BIND, &plan);
    mount_tmpfs(&on_volume, rustix::mount::MountFlags::empty());
    fs::write(on_volume.join("theirs"), "x").unwrap();
    let held = fs::File::open(on_volume.join("theirs")).unwrap();
    assert!(destroy(BIND, &plan, &traces, Detach::Lazy).unwrap());
    assert_eq!(held.metadata().unwrap().nlink(), 1);
    assert!(place.mounts().is_empty());
}

struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A shell that does `what` and then waits.
fn shell(what: &str, cwd: &Path) -> Reaped {
    let mut child = Command::new("sh")
        .args(["-c", &format!("{what}; echo ready; read end")])
        .current_dir(cwd)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0_u8; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
    Reaped(child)
}

fn a_rootfs_in_use_stays_whole() {
    let place = Place::new();
    let plan = place.plan(vec![volume(&place.dir("v"), "/data", Access::Rw)]);
    fs::write(place.path("v/open"), "x").unwrap();
    let traces = provision(BIND, &plan);
    for (what, cwd, how) in [
        (":", place.path("rootfs"), "working directory"),
        (":", place.rootfs("data"), "working directory"),
        ("exec 7<data/open", place.path("rootfs"), "working directory"),
        (&format!("exec 7<'{}'", place.rootfs("data/open").display()), PathBuf::from("/"), "open file 7"),
    ] {
        let child = shell(what, &cwd);
        let before = place.mounts();
        let error = destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        let want = format!("it is used by sh (pid {}, {how})", child.0.id());
        assert!(error.to_string().contains(&want), "{error}");
        assert_eq!(before, place.mounts());
    }
    let child = shell(":", &place.rootfs("data"));
    assert!(destroy(BIND, &plan, &traces, Detach::Lazy).unwrap());
    assert!(place.mounts().is_empty());
    drop(child);
    assert!(place.path("v/open").exists());
}

fn a_mount_on_top_is_named() {
    let place = Place::new();
    let plan = place.plan(vec![]);
    let traces = provision(BIND, &plan);
    mount_tmpfs(&plan.rootfs, rustix::mount::MountFlags::empty());
    for how in [Detach::IfIdle, Detach::Lazy] {
        let error = destroy(BIND, &plan, &traces, how).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("another mount lies on top of it (tmpfs of theirs)"), "{error}");
    }
    rustix::mount::unmount(&plan.rootfs, rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
}

fn a_failed_note_leaves_nothing() {
    let place = Place::new();
    let outer = place.dir("outer");
    let plan =
        place.plan(vec![volume(&outer, "/data", Access::Rw), volume(&place.dir("v"), "/data/made/here", Access::Rw)]);
    let mut fails = 0;
    for at in 1.. {
        let mut notes = Notes { fail_at: Some(at), ..Notes::default() };
        let Err(error) = BIND.provision(&Host::probe(), &plan, &mut notes) else {
            assert!(destroy(BIND, &plan, &notes.last, Detach::IfIdle).unwrap());
            break;
        };
        assert_eq!(error.to_string(), "write record test: planted");
        fails += 1;
        assert!(place.mounts().is_empty(), "{:?}", place.mounts());
        assert!(!outer.join("made").exists(), "note {at}");
    }
    assert!(fails >= 2, "{fails}");
}

fn the_mount_of_another_is_not_taken_for_ours() {
    let place = Place::new();
    let plan = place.plan(vec![]);
    let traces = provision(BIND, &plan);
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    // A free mount id is used again at once: somebody else's mount there may well get ours.
    mount_tmpfs(&plan.rootfs, rustix::mount::MountFlags::empty());
    let theirs = mountinfo::mounts_at(&plan.rootfs).unwrap().pop().unwrap();
    let mistaken = Traces { mount_id: Some(theirs.id), ..traces };
    if mistaken.unique_mount_id.is_some() {
        assert!(!destroy(BIND, &plan, &mistaken, Detach::Lazy).unwrap());
    }
    assert_eq!(mountinfo::mounts_at(&plan.rootfs).unwrap(), [theirs]);
}

fn id_maps_shift_owners() {
    let place = Place::new();
    let mut plan = place.plan(vec![]);
    plan.ownership.uids = vec![IdRange { inside: 0, outside: 4000, count: 10 }];
    plan.ownership.gids =
        vec![IdRange { inside: 0, outside: 5000, count: 1 }, IdRange { inside: 1, outside: 7000, count: 5 }];
    let host = Host::probe();
    if !host.initial_user_namespace || !host.new_mount_api.is_yes() {
        let Support::No { reason, .. } = BIND.support(&host, &plan) else { panic!("it cannot work here") };
        assert!(reason.contains("idmapped mount"), "{reason}");
        return;
    }
    std::os::unix::fs::chown(place.path("layer/etc/passwd"), Some(3), Some(2)).unwrap();
    std::os::unix::fs::chown(place.path("layer/data"), Some(77), Some(0)).unwrap();
    let traces = provision(BIND, &plan);
    let owner = |name: &str| fs::metadata(place.rootfs(name)).map(|m| (m.uid(), m.gid())).unwrap();
    assert_eq!(owner("etc"), (4000, 5000));
    assert_eq!(owner("etc/passwd"), (4003, 7001));
    assert_eq!(owner("data"), (65534, 5000));
    assert_eq!(errno(fs::write(place.rootfs("etc/passwd"), "x")), Some(libc::EROFS));
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    plan.ownership.uids.push(IdRange { inside: 5, outside: 9000, count: 1 });
    let Support::No { reason, .. } = BIND.support(&host, &plan) else { panic!("ranges that overlap") };
    assert!(!reason.is_empty());
    plan.ownership = Ownership { squash: Some((0, 0)), ..Ownership::default() };
    let Support::No { remedy, .. } = BIND.support(&host, &plan) else { panic!("squash") };
    assert!(remedy.contains("--backend fuse"), "{remedy}");
}

fn two_hundred_volumes() {
    let place = Place::new();
    let volumes = (0..200)
        .map(|n| {
            fs::create_dir_all(place.path(&format!("layer/v/{n}"))).unwrap();
            volume(&place.dir(&format!("sources/{n}")), &format!("/v/{n}"), Access::Rw)
        })
        .collect();
    let plan = place.plan(volumes);
    let traces = provision(BIND, &plan);
    assert_eq!(place.mounts().len(), 201);
    fs::write(place.rootfs("v/199/f"), "x").unwrap();
    assert!(place.path("sources/199/f").exists());
    assert!(destroy(BIND, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty());
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

fn overlay_merges_layers_with_whiteouts() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let mut plan = layered(
        &place,
        &[
            &["etc/a", "etc/b", "opt/x/old", "opt/x/sub/old", "gone/deep/f", "file", "dir/f", "twice"],
            &[
                "etc/.wh.a",
                "etc/c",
                "opt/x/.wh..wh..opq",
                "opt/x/new",
                ".wh.gone",
                "file/now-a-dir",
                ".wh..wh.plnk",
                ".wh.twice",
            ],
            &["etc/a", "gone/back", "dir/.wh.f", "twice", "etc/.wh.none"],
            &["etc/.wh.b", "opt/.wh.x", "opt/x/again"],
        ],
    );
    fill(&place.path("l2"), &["again"], "2");
    fill(&place.path("l3"), &[".wh.again"], "3");
    plan.layers.insert(4, plan.layers[2].clone());
    // Directories must look as they do in the topmost layer that has them, though layers of ours lie on top.
    fs::set_permissions(place.path("l2/dir"), fs::Permissions::from_mode(0o1751)).unwrap();
    fs::set_permissions(place.path("l1/etc"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(place.path("l3/etc"), fs::Permissions::from_mode(0o751)).unwrap();
    let before = fs::metadata(place.path("l3/opt")).unwrap();
    let traces = provision(OVERLAY, &plan);
    let want = [
        ("again", "2"),
        ("dir", "/"),
        ("etc", "/"),
        ("etc/a", "2"),
        ("etc/c", "1"),
        ("file", "/"),
        ("file/now-a-dir", "1"),
        ("gone", "/"),
        ("gone/back", "2"),
        ("opt", "/"),
        ("opt/x", "/"),
        ("opt/x/again", "3"),
        ("twice", "2"),
    ];
    let got = listing(&plan.rootfs);
    assert_eq!(got.iter().map(|(n, t)| (n.as_str(), t.as_str())).collect::<Vec<_>>(), want);
    let mode = |name: &str| fs::metadata(place.rootfs(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("dir"), mode("etc")), (0o1751, 0o755));
    let after = fs::metadata(place.rootfs("opt")).unwrap();
    assert_eq!((after.mtime(), after.mtime_nsec(), after.uid()), (before.mtime(), before.mtime_nsec(), before.uid()));
    assert_eq!(errno(fs::write(place.rootfs("etc/c"), "x")), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_file(place.rootfs("twice"))), Some(libc::EROFS));
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(!destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(OVERLAY.health(&plan, &traces), Health::Gone);
    assert!(place.mounts().is_empty());
    assert_eq!(fs::read_dir(&plan.state_dir).unwrap().count(), 0);
}

fn overlay_makes_missing_mount_points() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let mut plan = layered(&place, &[&["etc/passwd", "run/"], &["var/lib/", "srv/.wh.x"]]);
    symlink("../run", place.path("l1/var/run")).unwrap();
    symlink("/nowhere", place.path("l1/dangling")).unwrap();
    fs::set_permissions(place.path("l1/var/lib"), fs::Permissions::from_mode(0o710)).unwrap();
    fs::write(place.path("hosts"), "host").unwrap();
    let (a, b, c) = (place.dir("a"), place.dir("b"), place.dir("c"));
    plan.volumes = fsprov::volume::order(vec![
        volume(&a, "/var/run/new/deep", Access::Rw),
        volume(&place.path("hosts"), "/etc/hosts", Access::Ro),
        volume(&b, "/var/lib/db", Access::Rw),
        volume(&c, "/var/lib/db/inner/c", Access::Ro),
        volume(Path::new("/dev/null"), "/made/null", Access::Rw),
    ])
    .unwrap();
    let traces = provision(OVERLAY, &plan);
    fs::write(place.rootfs("run/new/deep/f"), "x").unwrap();
    assert!(a.join("f").exists() && b.join("inner/c").is_dir());
    assert_eq!(fs::read(place.rootfs("etc/hosts")).unwrap(), b"host");
    assert_eq!(fs::read(place.rootfs("etc/passwd")).unwrap(), b"0");
    fs::write(place.rootfs("made/null"), "x").unwrap();
    assert_eq!(fs::metadata(place.rootfs("var/lib")).unwrap().mode() & 0o7777, 0o710);
    assert_eq!(errno(fs::create_dir(place.rootfs("run/x"))), Some(libc::EROFS));
    assert_eq!(traces.parts.as_ref().unwrap().len(), 5);
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty() && a.join("f").exists());
    assert_eq!(fs::read_dir(&plan.state_dir).unwrap().count(), 0);
    plan.volumes = vec![volume(&a, "/dangling", Access::Rw)];
    let error = fail(OVERLAY, &plan);
    assert!(error.to_string().contains("/dangling"), "{error}");
    assert_eq!(fs::read_dir(&plan.state_dir).unwrap().count(), 0);
}

fn overlay_of_one_layer_keeps_its_flags() {
    if !overlay_works_here() {
        return;
    }
    use rustix::mount::MountFlags;
    let place = Place::new();
    let locked = place.dir("locked");
    mount_tmpfs(&locked, MountFlags::NOSUID | MountFlags::NODEV);
    fill(&locked, &["f", ".wh.plain"], "x");
    let mut plan = place.plan(vec![]);
    plan.layers[0].root = locked;
    let traces = provision(OVERLAY, &plan);
    let mount = mountinfo::mounts_at(&plan.rootfs).unwrap().pop().unwrap();
    for option in ["ro", "nosuid", "nodev"] {
        assert!(mount.has_option(option), "{option}: {mount:?}");
    }
    assert_eq!((mount.fs_type.to_str(), mount.source.to_str()), (Some("overlay"), Some("fsprov")));
    assert!(place.rootfs(".wh.plain").exists());
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
}

fn overlay_of_hundreds_of_layers() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::at(Path::new("/tmp/a-place-with-a-rather-long-name-so-that-strings-of-layers-would-overflow"));
    let names: Vec<String> = (0..499).map(|n| format!("d/f{n}")).collect();
    let trees: Vec<Vec<&str>> = names.iter().map(|n| vec![n.as_str(), "top"]).collect();
    let trees: Vec<&[&str]> = trees.iter().map(Vec::as_slice).collect();
    let mut plan = layered(&place, &trees);
    plan.volumes = vec![volume(&place.dir("v"), "/missing", Access::Rw)];
    let traces = match OVERLAY.provision(&Host::probe(), &plan, &mut Notes::default()) {
        // One page of options is all that mount(2) takes.
        Err(e) if !Host::probe().new_mount_api.is_yes() => {
            assert!(e.to_string().contains("one page of mount options"), "{e}");
            return;
        }
        other => {
            other.unwrap();
            assert!(destroy_any(&plan));
            provision(OVERLAY, &plan)
        }
    };
    assert_eq!(fs::read_dir(place.rootfs("d")).unwrap().count(), 499);
    assert_eq!(fs::read(place.rootfs("top")).unwrap(), b"498");
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    // A repeated layer counts once, at its topmost place.
    plan.layers.insert(3, plan.layers[0].clone());
    let traces = provision(OVERLAY, &plan);
    assert_eq!(fs::read(place.rootfs("top")).unwrap(), b"498");
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    plan.layers[3].root = place.dir("one-more");
    let error = fail(OVERLAY, &plan);
    assert!(error.to_string().contains("it takes 501 layers, and overlayfs at most 500"), "{error}");
    plan.volumes.clear();
    let traces = provision(OVERLAY, &plan);
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.mounts().is_empty());
}

fn destroy_any(plan: &Plan) -> bool {
    let top = mountinfo::mounts_at(&plan.rootfs).unwrap().pop().unwrap();
    let traces = Traces { mount_id: Some(top.id), ..Traces::default() };
    destroy(OVERLAY, plan, &traces, Detach::Lazy).unwrap()
}

fn overlay_leaves_nothing_when_it_fails() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let mut plan = layered(&place, &[&["a"], &["b/"]]);
    plan.volumes = vec![volume(&place.path("l0/a"), "/b", Access::Rw)];
    assert_eq!(fail(OVERLAY, &plan).kind(), Kind::Usage);
    plan.volumes.clear();
    for at in 1.. {
        let mut notes = Notes { fail_at: Some(at), ..Notes::default() };
        if OVERLAY.provision(&Host::probe(), &plan, &mut notes).is_ok() {
            assert!(at > 1);
            assert!(destroy(OVERLAY, &plan, &notes.last, Detach::IfIdle).unwrap());
            break;
        }
        assert!(place.mounts().is_empty());
        assert_eq!(fs::read_dir(&plan.state_dir).unwrap().count(), 0);
    }
    plan.layers[0].root = place.path("none");
    assert_eq!(fail(OVERLAY, &plan).kind(), Kind::NotFound);
    plan.layers.clear();
    assert!(fail(OVERLAY, &plan).to_string().contains("the image has no filesystem layer"));
    assert!(place.mounts().is_empty());
}

/// All that stat, readlink, getxattr and read say of a tree, hard links as the first name of their group.
fn describe(dir: &Path) -> Vec<String> {
    fn add(top: &Path, at: &Path, links: &mut std::collections::HashMap<u64, PathBuf>, out: &mut Vec<String>) {
        let meta = fs::symlink_metadata(at).unwrap();
        let name = at.strip_prefix(top).unwrap().to_owned();
        let mut line = format!(
            "{name:?} {:o} {}:{} rdev {} mtime {}.{:09}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.rdev(),
            meta.mtime(),
            meta.mtime_nsec()
        );
        if meta.is_symlink() {
            line += &format!(" -> {:?}", fs::read_link(at).unwrap());
        } else {
            for key in ["user.x", "user.overlay.opaque", "trusted.overlay.opaque"] {
                let mut value = [0_u8; 64];
                if let Ok(length) = rustix::fs::lgetxattr(at, key, &mut value[..]) {
                    line += &format!(" {key}={:?}", &value[..length]);
                }
            }
        }
        if !meta.is_dir() && meta.nlink() > 1 {
            // The count is not compared: overlayfs counts names too that a layer above has replaced.
            match links.get(&meta.ino()) {
                Some(first) => line += &format!(" link {first:?}"),
                None => drop(links.insert(meta.ino(), name.clone())),
            }
        }
        if meta.is_file() {
            let content = fs::read(at).unwrap();
            let sum = content.iter().fold(content.len() as u64, |sum, &b| sum.wrapping_mul(31).wrapping_add(b.into()));
            line += &format!(" size {} sum {sum}", meta.len());
        }
        out.push(line);
        if meta.is_dir() {
            let mut names: Vec<PathBuf> = fs::read_dir(at).unwrap().map(|e| e.unwrap().path()).collect();
            names.sort();
            for name in names {
                add(top, &name, links, out);
            }
        }
    }
    let mut out = Vec::new();
    add(dir, dir, &mut std::collections::HashMap::new(), &mut out);
    out
}

fn set_mtime(path: &Path, secs: i64, nanos: i64) {
    let time = rustix::fs::Timespec { tv_sec: secs, tv_nsec: nanos };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn copy_is_the_tree_it_was_made_from() {
    let place = Place::new();
    let layer = place.path("layer");
    let root = Host::probe().initial_user_namespace;
    fill(&layer, &["a/b/c/deep", "etc/x"], "content");
    fs::write(layer.join("big"), vec![7_u8; 3_000_001]).unwrap();
    let sparse = fs::File::create(layer.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"data", 32 << 20).unwrap();
    fs::hard_link(layer.join("big"), layer.join("a/b/big-too")).unwrap();
    symlink("nowhere/at all", layer.join("dangling")).unwrap();
    fs::hard_link(layer.join("dangling"), layer.join("a/dangling-too")).unwrap();
    fs::set_permissions(layer.join("etc/x"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(layer.join("a/b"), fs::Permissions::from_mode(0o1500)).unwrap();
    fs::write(layer.join(".wh.not"), "one layer has no whiteouts").unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, layer.join("fifo"), rustix::fs::Mode::from_raw_mode(0o640)).unwrap();
    let _ = rustix::fs::setxattr(layer.join("etc/x"), "user.x", b"v\0w", rustix::fs::XattrFlags::empty());
    if root {
        std::os::unix::fs::chown(layer.join("etc/x"), Some(7), Some(8)).unwrap();
        fs::set_permissions(layer.join("etc/x"), fs::Permissions::from_mode(0o6755)).unwrap();
        std::os::unix::fs::lchown(layer.join("dangling"), Some(9), Some(9)).unwrap();
        let dev = rustix::fs::makedev(1, 3);
        let kind = rustix::fs::FileType::CharacterDevice;
        rustix::fs::mknodat(rustix::fs::CWD, layer.join("null"), kind, rustix::fs::Mode::from_raw_mode(0o666), dev)
            .unwrap();
    }
    for (n, name) in ["a/b/c/deep", "a/b/c", "a/b", "a", "etc/x", "dangling", "fifo", ""].iter().enumerate() {
        set_mtime(&layer.join(name), 1_000_000_000 + n as i64, 123_456_789);
    }
    let plan = place.plan(vec![]);
    let want = describe(&layer);
    let traces = provision(COPY, &plan);
    assert_eq!(describe(&plan.rootfs), want);
    let blocks = fs::metadata(place.rootfs("sparse")).unwrap().blocks();
    assert!(blocks < 1000, "{blocks} blocks of a file with 4 bytes of data");
    // It is the container's own now, and the image never sees it.
    fs::write(place.rootfs("etc/x"), "changed").unwrap();
    fs::write(place.rootfs("new"), "new").unwrap();
    assert_eq!(describe(&layer), want);
    assert!(destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(fs::read_dir(&plan.rootfs).unwrap().count(), 0);
    assert_eq!(fs::metadata(&plan.rootfs).unwrap().mode() & 0o7777, 0o755);
    assert!(!destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(describe(&layer), want);
}

fn copy_of_layers_is_what_overlay_shows() {
    if !overlay_works_here() {
        return;
    }
    let place = Place::new();
    let mut plan = layered(
        &place,
        &[
            &[
                "etc/a",
                "etc/b",
                "opt/x/old",
                "opt/x/sub/old",
                "gone/deep/f",
                "file",
                "dir/f",
                "twice",
                "d2f/x",
                "keep/k",
            ],
            &[
                "etc/.wh.a",
                "etc/c",
                "opt/x/.wh..wh..opq",
                "opt/x/new",
                ".wh.gone",
                "file/dir",
                ".wh..wh.plnk",
                "d2f",
                "ln",
            ],
            &["etc/a", "gone/back", "dir/.wh.f", "twice", "etc/.wh.none", "d2f/again", "ln"],
            &["etc/.wh.b", "opt/.wh.x", "opt/x/again", "keep/.wh.k"],
        ],
    );
    symlink("/etc", place.path("l0/link")).unwrap();
    fill(&place.path("l2"), &["link/inside"], "2");
    fs::hard_link(place.path("l1/ln"), place.path("l1/ln2")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.path("l3/twice"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::empty(),
        0,
    )
    .unwrap();
    for n in 0..4 {
        for (m, dir) in ["etc", "opt/x", "opt", "dir", "keep", ""].iter().enumerate() {
            let dir = place.path(&format!("l{n}/{dir}"));
            if dir.is_dir() {
                fs::set_permissions(&dir, fs::Permissions::from_mode(0o700 + n * 8 + m as u32)).unwrap();
                set_mtime(&dir, i64::from(n) * 1000 + m as i64, 5);
            }
        }
    }
    let traces = provision(OVERLAY, &plan);
    let want = describe(&plan.rootfs);
    assert!(destroy(OVERLAY, &plan, &traces, Detach::IfIdle).unwrap());
    plan.rootfs = place.dir("copied");
    let traces = provision(COPY, &plan);
    let got = describe(&plan.rootfs);
    assert_eq!(got, want);
    assert!(got.iter().any(|l| l.starts_with("\"gone/back\"")) && !got.iter().any(|l| l.contains("twice")));
    assert!(destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
}

fn copy_with_volumes_and_without_losing_them() {
    let place = Place::new();
    let v = place.dir("v");
    fs::write(v.join("precious"), "data").unwrap();
    fs::write(place.path("file"), "host").unwrap();
    let plan = place.plan(vec![
        volume(&v, "/data", Access::Rw),
        volume(&v, "/made/up", Access::Ro),
        volume(&place.path("file"), "/etc/hosts", Access::Ro),
    ]);
    let traces = provision(COPY, &plan);
    assert_eq!(traces.parts.as_ref().unwrap().len(), 3);
    assert_eq!(fs::read(place.rootfs("made/up/precious")).unwrap(), b"data");
    assert_eq!(errno(fs::write(place.rootfs("made/up/precious"), "x")), Some(libc::EROFS));
    assert_eq!(fs::read(place.rootfs("etc/hosts")).unwrap(), b"host");
    fs::write(place.rootfs("etc/passwd"), "writable").unwrap();
    // A mount of somebody else: nothing is deleted through it.
    let theirs = place.rootfs("tmp");
    mount_tmpfs(&theirs, rustix::mount::MountFlags::empty());
    fs::write(theirs.join("f"), "theirs").unwrap();
    for how in [Detach::IfIdle, Detach::Lazy] {
        let error = destroy(COPY, &plan, &traces, how).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("theirs on "), "{error}");
        assert_eq!(fs::read(theirs.join("f")).unwrap(), b"theirs");
        assert!(place.rootfs("etc/passwd").exists());
    }
    rustix::mount::unmount(&theirs, rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
    assert_eq!(fs::read(v.join("precious")).unwrap(), b"data");
    assert!(place.mounts().is_empty());
    assert_eq!(fs::read_dir(&plan.rootfs).unwrap().count(), 0);
}

fn copy_wants_an_empty_directory_and_leaves_one() {
    let place = Place::new();
    let mut plan = place.plan(vec![]);
    fs::write(place.rootfs("mine"), "x").unwrap();
    let error = fail(COPY, &plan);
    assert_eq!(error.kind(), Kind::Exists);
    assert!(place.rootfs("mine").exists());
    fs::remove_file(place.rootfs("mine")).unwrap();
    // A failure in the midst, and one at each note.
    plan.volumes = vec![volume(&place.path("layer"), "/etc/passwd", Access::Rw)];
    assert_eq!(fail(COPY, &plan).kind(), Kind::Usage);
    assert_eq!(fs::read_dir(&plan.rootfs).unwrap().count(), 0);
    plan.volumes = vec![volume(&place.path("layer"), "/data", Access::Rw)];
    for at in 1..=2 {
        let mut notes = Notes { fail_at: Some(at), ..Notes::default() };
        assert!(COPY.provision(&Host::probe(), &plan, &mut notes).is_err());
        assert_eq!(fs::read_dir(&plan.rootfs).unwrap().count(), 0, "{at}");
        assert!(place.mounts().is_empty());
    }
    plan.volumes.clear();
    plan.layers[0].root = place.path("none");
    assert_eq!(fail(COPY, &plan).kind(), Kind::NotFound);
    // Another directory of the same name is not ours to empty.
    plan.layers[0].root = place.path("layer");
    let traces = provision(COPY, &plan);
    fs::rename(&plan.rootfs, place.path("moved")).unwrap();
    fill(&plan.rootfs, &["stranger"], "x");
    assert!(!destroy(COPY, &plan, &traces, Detach::IfIdle).unwrap());
    assert!(place.rootfs("stranger").exists());
    assert_eq!(COPY.health(&plan, &traces), Health::Gone);
}
