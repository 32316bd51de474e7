//! The hardened worker: what it may not do, that it still answers requests of every kind, and what happens at its limits.

use std::fs::{self, File};
use std::io::{IoSlice, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fsprov::internals::fuse::counters::Operation;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, SeekFrom, StatxFlags, XattrFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg, socketpair,
};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::system::eventually;
use crate::common::{Enter, Need, Stage, needs};

fn mounted(stage: &Stage, image: &Path, place: &str, environment: &[(&str, &str)]) -> PathBuf {
    stage.mkdir("sandbox/w");
    let mut options = vec!["--id".into(), place.into()];
    options.extend(sandbox(stage));
    options.extend(volume("w", "/w", "rw"));
    let call = stage.mount_call(image, place, options);
    environment.iter().fold(call, |call, (name, value)| call.env(name, value)).run().ok();
    stage.path(place)
}

#[track_caller]
fn stats(stage: &Stage, id: &str) -> serde_json::Value {
    stage.fsprov(["stats", "--json", id]).run().ok().json()
}

// One of every kind of request, through a real mount of an indexed image and a volume: what the filter of system calls or the
// rules for files refused would show as another error, an answer that is missing, or a worker that died.
case!("every_kind_of_request_is_answered", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    stage
        .fsprov(["image".as_ref(), "import".as_ref(), image.as_os_str(), "--name".as_ref(), "small".as_ref()])
        .run()
        .ok();
    let rootfs = mounted(stage, Path::new("small"), "k", &[]);
    let w = rootfs.join("w");
    let at = |name: &str| w.join(name);
    // The image.
    assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n");
    assert_eq!(fs::read_link(rootfs.join("var/run")).expect("readlink"), Path::new("/run"));
    // The volume.
    fs::create_dir(at("d")).expect("mkdir");
    let mut file = File::options().read(true).write(true).create_new(true).open(at("f")).expect("create");
    file.write_all(b"0123456789").expect("write");
    file.sync_all().expect("fsync");
    fs::set_permissions(at("f"), fs::Permissions::from_mode(0o640)).expect("setattr");
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 65536).expect("fallocate");
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(0)), Ok(0));
    let other = File::create(at("copy")).expect("create");
    assert_eq!(rustix::fs::copy_file_range(&file, Some(&mut 2), &other, Some(&mut 0), 4), Ok(4));
    drop(other);
    // The close of a program is reported, so that the host can run it then; that of other files is not everywhere.
    drop(File::options().write(true).create_new(true).mode(0o755).open(at("program")).expect("create"));
    assert_eq!(fs::read(at("copy")).expect("read"), b"2345");
    let mut byte = [0_u8; 1];
    file.read_at(&mut byte, 3).expect("read");
    assert_eq!(byte, *b"3");
    poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("poll");
    let direct = File::options().read(true).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32).open(at("f"));
    drop(direct.expect("open"));
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    match rustix::fs::statx(&file, "", flags, StatxFlags::BASIC_STATS) {
        // Under scripts/enosys.
        Err(rustix::io::Errno::NOSYS) => rustix::fs::fstat(&file).map(drop),
        other => other.map(drop),
    }
    .expect("getattr");
    drop(file);
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("mknod");
    std::os::unix::fs::symlink("f", at("s")).expect("symlink");
    fs::hard_link(at("f"), at("l")).expect("link");
    fs::rename(at("l"), at("d/l")).expect("rename");
    fs::remove_file(at("d/l")).expect("unlink");
    rustix::fs::setxattr(at("f"), "user.kind", b"value", XattrFlags::empty()).expect("setxattr");
    let mut value = [0_u8; 16];
    assert_eq!(rustix::fs::getxattr(at("f"), "user.kind", &mut value), Ok(5));
    let mut names = [0_u8; 256];
    assert!(rustix::fs::listxattr(at("f"), &mut names).expect("listxattr") > 0);
    rustix::fs::removexattr(at("f"), "user.kind").expect("removexattr");
    for n in 0..1500 {
        fs::write(stage.path(format!("sandbox/w/d/{n:04}-a-name-long-enough-for-several-pages")), "").expect("write");
    }
    // More than a page of names: the kernel asks for the later ones without attributes.
    assert_eq!(fs::read_dir(at("d")).expect("readdir").count(), 1500);
    File::open(at("d")).and_then(|d| d.sync_all()).expect("fsyncdir");
    rustix::fs::statvfs(&w).expect("statfs");
    rustix::fs::access(at("f"), rustix::fs::Access::WRITE_OK).expect("access");
    for (n, entry) in fs::read_dir(at("d")).expect("readdir").enumerate() {
        if n < 20 {
            fs::remove_file(entry.expect("entry").path()).expect("unlink");
        }
    }
    fs::create_dir(at("empty")).and_then(|()| fs::remove_dir(at("empty"))).expect("rmdir");

    let stats = stats(stage, "k");
    // The kernel checks access itself where it may (default_permissions).
    let checked_by_kernel = stage.lane.enter != Enter::User;
    let missing: Vec<_> = Operation::ALL
        .iter()
        .copied()
        .map(Operation::name)
        .filter(|kind| !(*kind == "access" && checked_by_kernel))
        .filter(|kind| stats["worker"]["requests"][*kind].as_u64().unwrap_or(0) == 0)
        .collect();
    assert!(missing.is_empty(), "no request of these kinds was counted: {missing:?}\n{stats:#}");
    assert_eq!((stats["restarts"].as_u64(), stats["worker"]["panics"].as_u64()), (Some(0), Some(0)), "{stats:#}");
    assert_eq!(stats["worker"]["walls"]["seccomp"].as_bool(), Some(true), "{stats:#}");
});

// As the kernel shows it, not as the worker says it.
case!("the_worker_is_confined", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    mounted(stage, &image, "k", &[]);
    let stats = stats(stage, "k");
    let said = stage.fsprov(["inspect", "k"]).run().ok().out();
    assert!(said.contains("no new privileges") && said.contains("system calls"), "{said}");
    let worker = stats["worker_pid"].as_i64().expect("a pid");
    let status = fs::read_to_string(format!("/proc/{worker}/status")).expect("its status");
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name}: {status}")).trim().to_owned()
    };
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");
    let capabilities = u64::from_str_radix(&field("CapPrm"), 16).expect("hex");
    // NET_ADMIN, SYS_MODULE, SYS_RAWIO, SYS_CHROOT, SYS_PTRACE, SYS_BOOT, SYS_RESOURCE (linux/capability.h).
    for number in [12, 16, 17, 18, 19, 22, 24] {
        assert_eq!(capabilities & (1 << number), 0, "capability {number} is left: {capabilities:x}");
    }
    assert_eq!(field("CapEff"), field("CapPrm"));
    assert_eq!((&*field("CapInh"), &*field("CapAmb")), ("0000000000000000", "0000000000000000"));
    if stage.lane.enter == Enter::User {
        assert_eq!(capabilities, 0);
        // The worker of an imported image goes into a user namespace of its own, where it has them all until it gives them up.
        stage.fsprov(["image", "import", "--name", "indexed"]).arg(&image).run().ok();
        stage.fsprov(["mount", "--backend", "fuse", "--id", "i", "indexed"]).arg(stage.path("indexed")).run().ok();
        let walls = super::hardened::stats(stage, "i")["worker"]["walls"].clone();
        assert_eq!(walls["capabilities"], "0", "{walls:#}");
        stage.fsprov(["unmount", "i"]).run().ok();
    } else {
        // No program of any owner gets more.
        assert_eq!(field("CapBnd"), field("CapEff"));
        let can = Some(needs::has_mount_calls());
        assert_eq!(stats["worker"]["walls"]["own_root"].as_bool(), can, "{stats:#}");
        assert_eq!(stats["worker"]["walls"]["devices_closed"].as_bool(), can, "{stats:#}");
        // Its own descriptors, and figures of connections where those are mounted: nothing else has a name.
        let mut seen: Vec<_> = fs::read_dir(format!("/proc/{worker}/root"))
            .expect("its root")
            .map(|e| e.expect("entry").file_name())
            .collect();
        seen.sort();
        let is_own = seen == ["proc", "sources"] || seen == ["proc", "sources", "sys"];
        assert_eq!(Some(is_own), can, "{seen:?}");
    }
    assert_eq!(stats["worker"]["walls"]["no_new_privileges"].as_bool(), Some(true));
    let limits = fs::read_to_string(format!("/proc/{worker}/limits")).expect("its limits");
    let core: Vec<_> =
        limits.lines().find(|l| l.starts_with("Max core file size")).expect("core").split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);
    // Nothing of the caller, nothing of the host but what is served.
    for process in stage.servers() {
        let dir = PathBuf::from(format!("/proc/{}", process.pid));
        assert_eq!(fs::read_link(dir.join("cwd")).expect("cwd"), Path::new("/"));
        for fd in fs::read_dir(dir.join("fd")).expect("fds").flatten() {
            let Ok(to) = fs::read_link(fd.path()) else { continue };
            let is_root = |path: &Path| {
                let meta = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
                meta(path) == meta(Path::new("/"))
            };
            let allowed = !to.starts_with("/")
                // A copy of a mount that is attached nowhere shows its path in itself.
                || (process.pid == worker as i32 && !is_root(&fd.path()))
                || to.starts_with(&stage.dir)
                || ["/dev/null", "/dev/fuse", "/proc"].iter().any(|p| to.starts_with(p))
                || to == crate::common::stage::program()
                || to.to_string_lossy().starts_with("/memfd:");
            assert!(allowed, "{} has {} open", process.command, to.display());
        }
    }
});

// A program that knows or opens very many files gets ENOMEM or ENFILE for that call, and nobody else notices.
case!("at_its_limits_a_call_fails_and_no_more", on::fuse, |stage: &Stage| {
    const NODES: usize = 600;
    let image = stage.small_image();
    // What the server is started with: it may have some 200 files open.
    let limit = Rlimit { current: Some(400), maximum: Some(400) };
    setrlimit(Resource::Nofile, limit).expect("setrlimit");
    let other = mounted(stage, &image, "other", &[]);
    let rootfs = mounted(stage, &image, "k", &[("FSPROV_FUSE_MAX_NODES", &NODES.to_string())]);
    let w = rootfs.join("w");
    let mut open = File::create(w.join("open")).expect("make");
    for n in 0..2 * NODES {
        stage.write(format!("sandbox/w/n{n}"), "x");
    }
    let look = |n: usize| fs::symlink_metadata(w.join(format!("n{n}"))).map(drop).map_err(|e| Errno::from_io_error(&e));
    let answers: Vec<_> = (0..2 * NODES).map(look).collect();
    let refused = answers.iter().filter(|a| **a == Err(Some(Errno::NOMEM))).count();
    assert!(refused > 0, "no name too many");
    assert!(answers.iter().all(|a| a.is_ok() || *a == Err(Some(Errno::NOMEM))), "{answers:?}");
    open.write_all(b"good").expect("what is known is good");
    assert_eq!(fs::read_to_string(other.join("w/n0")).expect("another mount"), "x");
    // What the kernel gives back is there again.
    let known: Vec<_> = (0..2 * NODES).filter(|n| answers[*n].is_ok()).collect();
    let unknown = (0..2 * NODES).find(|n| answers[*n].is_err()).expect("one was refused");
    for n in &known[..100] {
        fs::remove_file(w.join(format!("n{n}"))).expect("unlink");
    }
    assert!(eventually(std::time::Duration::from_secs(10), || look(unknown).is_ok()), "none is free");

    let mut held = Vec::new();
    let refused = loop {
        match File::open(other.join("w/n1199")) {
            Ok(file) => held.push(file),
            Err(e) => break Errno::from_io_error(&e),
        }
        assert!(held.len() < 390, "no file too many");
    };
    assert_eq!(refused, Some(Errno::NFILE), "after {} files", held.len());
    // It still looks, lists, and reads what is open.
    let listed = fs::read_dir(other.join("w")).map(Iterator::count).map_err(|e| Errno::from_io_error(&e));
    assert!(listed.is_ok() || listed == Err(Some(Errno::NFILE)), "{listed:?}");
    assert!(other.join("w/n1198").exists());
    let mut byte = [0_u8; 1];
    held[0].read_at(&mut byte, 0).expect("an open file is good");
    assert_eq!(fs::read_to_string(w.join("open")).expect("another mount"), "good");
    held.clear();
    assert_eq!(fs::read_to_string(other.join("w/n1199")).expect("after they were closed"), "x");
    for id in ["k", "other"] {
        let stats = stats(stage, id);
        assert_eq!(stats["restarts"].as_u64(), Some(0), "{id}: {stats:#}");
    }
});

fn set_limit(soft: u64, hard: u64) {
    setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum: Some(hard) }).expect("setrlimit");
}

/// So many descriptors that were sent and not received.
fn in_flight(count: usize) -> (OwnedFd, OwnedFd) {
    let (one, other) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("socketpair");
    let file = File::open("/dev/null").expect("open");
    let fds = vec![file.as_fd(); count];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(250))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&one, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).expect("sendmsg");
    (one, other)
}

// Where a server may have very few files open, programs that open many take nothing that lookups of others need.
case!("with_few_descriptors_only_opens_are_refused", on::fuse, &[Need::Statx], |stage: &Stage| {
    let image = stage.small_image();
    stage
        .fsprov(["image".as_ref(), "import".as_ref(), image.as_os_str(), "--name".as_ref(), "small".as_ref()])
        .run()
        .ok();
    // As after `ulimit -n 64`, but not for this program: the mount comes first.
    let mine = rustix::process::getrlimit(Resource::Nofile).maximum.expect("a limit");
    let limited = stage.tool("sh", ["-c", "ulimit -n 64; exec \"$@\"", "sh"]);
    stage.mkdir("sandbox/w");
    let mut call = stage.mount_call("small", "k", {
        let mut options = vec!["--id".into(), "k".into()];
        options.extend(sandbox(stage));
        options.extend(volume("w", "/w", "rw"));
        options
    });
    call.command = {
        let mut command = limited.command;
        command.arg(call.command.get_program()).args(call.command.get_args());
        command
    };
    // Of this user's descriptors more are on their way than that, for half a second.
    let on_their_way = in_flight(100);
    let others = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        drop(on_their_way);
    });
    call.run().ok();
    others.join().expect("join");
    set_limit(mine.min(1000), mine);
    let rootfs = stage.path("k");
    let w = rootfs.join("w");
    for n in 0..100 {
        stage.mkdir(format!("sandbox/w/d{n}"));
        stage.write(format!("sandbox/w/d{n}/f"), "x");
    }
    let mut held = Vec::new();
    let refused = loop {
        match File::open(w.join("d0/f")) {
            Ok(file) => held.push(file),
            Err(e) => break Errno::from_io_error(&e),
        }
        assert!(held.len() < 64, "no file too many");
    };
    assert_eq!(refused, Some(Errno::NFILE), "after {} files", held.len());
    assert!(held.len() >= 8, "only {} files", held.len());
    // What opens nothing works, from several callers at once, in more directories than are kept open.
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let w = &w;
            scope.spawn(move || {
                for n in 0..100 {
                    let dir = w.join(format!("d{n}"));
                    let new = dir.join(format!("new{caller}"));
                    assert!(fs::symlink_metadata(dir.join("f")).is_ok(), "look {n}");
                    fs::create_dir(&new).unwrap_or_else(|e| panic!("mkdir {n}: {e}"));
                    let moved = dir.join(format!("moved{caller}"));
                    fs::rename(&new, &moved).unwrap_or_else(|e| panic!("rename {n}: {e}"));
                    fs::set_permissions(&moved, fs::Permissions::from_mode(0o700)).expect("chmod");
                    fs::remove_dir(&moved).unwrap_or_else(|e| panic!("rmdir {n}: {e}"));
                }
            });
        }
    });
    let made = File::create(w.join("made")).map(drop).map_err(|e| Errno::from_io_error(&e));
    assert_eq!(made, Err(Some(Errno::NFILE)), "make a file");
    // The image's files have a share of their own.
    for _ in 0..3 {
        assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n");
        assert_eq!(fs::read(rootfs.join("bin/tool")).map(drop).map_err(|e| e.to_string()), Ok(()));
    }
    let stats = stats(stage, "k");
    assert_eq!(stats["restarts"].as_u64(), Some(0), "{stats:#}");
    held.clear();
    assert!(eventually(std::time::Duration::from_secs(30), || fs::write(w.join("made"), "y").is_ok()));
});

// The supervisor keeps what programs deleted and have open. More than it has room for is lost with a worker; the rootfs is not.
case!("many_deleted_files_that_are_open_do_not_end_the_rootfs", on::fuse, |stage: &Stage| {
    const FILES: usize = 300;
    let image = stage.small_image();
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum.expect("a limit");
    set_limit(128, hard);
    let rootfs = mounted(stage, &image, "k", &[]);
    set_limit(hard.min(4096), hard);
    let w = rootfs.join("w");
    let held: Vec<_> = (0..FILES)
        .map(|n| {
            let path = w.join(format!("n{n}"));
            let file = File::options().read(true).write(true).create_new(true).open(&path).expect("make");
            file.write_all_at(b"still here", 0).expect("write");
            fs::remove_file(&path).expect("unlink");
            file
        })
        .collect();
    // What it was told last is heard by then.
    assert_eq!(stats(stage, "k")["restarts"].as_u64(), Some(0));
    fs::write(w.join("after"), "good").expect("the rootfs serves");
    let kept = stats(stage, "k")["nameless_files_kept"].as_u64().expect("a number");
    assert_eq!(kept, FILES as u64, "all of them outlive the worker");
    crate::common::system::kill(stats(stage, "k")["worker_pid"].as_i64().expect("a pid") as i32);
    for file in &held {
        let mut text = [0_u8; 10];
        file.read_at(&mut text, 0).expect("read after the worker's death");
        assert_eq!(&text, b"still here");
    }
});

/// Which walls are taken away, to see that the others do: `(name, fault points)`.
const WALLS_TAKEN: [(&str, &str); 3] =
    [("all walls", ""), ("no landlock", ";walls.landlock=return"), ("no root of its own", ";walls.root=return")];

// A worker that was taken over tries what it can think of, and gets nowhere; the rootfs goes on serving.
case!("a_worker_that_was_taken_over_gets_nowhere", on::fuse, &[Need::Failpoints], |stage: &Stage| {
    let image = stage.small_image();
    // A neighbour of the same user, with something to steal.
    let host = stage.mkdir("host");
    stage.write("host/secret", "secret");
    let mut neighbour =
        std::process::Command::new("sleep").arg("300").current_dir(&host).spawn().expect("start a neighbour");
    stage.mkdir("sandbox/w");
    stage.write("sandbox/w/moves", "x");
    if stage.lane.is_real_root() {
        let device = stage.path("sandbox/w/device");
        rustix::fs::mknodat(
            CWD,
            device,
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            rustix::fs::makedev(1, 3),
        )
        .expect("mknod");
    }
    // What a second rootfs keeps is another container's.
    let other = mounted(stage, &image, "other", &[]);
    let supervisor = stats(stage, "other")["supervisor_pid"].as_i64().expect("a pid");
    let mut report = String::new();
    // Where copies of mounts cannot be had, landlock is the one wall that keeps files.
    let can_lose = |taken: &str| needs::has_mount_calls() || !taken.contains("landlock");
    for (walls, taken) in WALLS_TAKEN.into_iter().filter(|(_, taken)| can_lose(taken)) {
        let told = format!("worker.escapes=return({supervisor}:{}:{}){taken}", neighbour.id(), host.display());
        let rootfs = mounted(stage, &image, "k", &[("FAILPOINTS", &told)]);
        let stats = stats(stage, "k");
        let landlock = stats["worker"]["walls"]["landlock"].as_bool().expect("a word");
        let own_root = stats["worker"]["walls"]["own_root"].as_bool().expect("a word");
        assert!(walls != "no landlock" || !landlock, "{stats:#}");
        assert!(walls != "no root of its own" || !own_root, "{stats:#}");
        // With neither there is nothing that keeps it from its user's files.
        assert!(landlock || own_root, "{walls}: {stats:#}");
        let tried = stats["worker"]["escapes"].as_array().expect("attempts");
        // A device that lies in a volume is the volume's, where no copy of it can be had in which it is closed.
        let open = stats["worker"]["walls"]["devices_closed"] == false && !needs::has_mount_calls();
        let meant = |a: &serde_json::Value| open && a["what"] == "open a device node of the volume";
        let escaped: Vec<_> = tried.iter().filter(|a| a["escaped"] != false && !meant(a)).collect();
        let line = format!(
            "{}, {walls}: {} tried, {} succeeded; landlock {landlock}, own root {own_root}, {} system calls allowed\n",
            stage.lane.name,
            tried.len(),
            escaped.len(),
            stats["worker"]["walls"]["system_calls"]
        );
        assert!(tried.len() >= 60, "{line}");
        assert!(escaped.is_empty(), "{line}{escaped:#?}");
        report += &line;
        // It goes on.
        assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n");
        fs::write(rootfs.join("w/f"), walls).expect("write");
        assert_eq!(fs::read_to_string(other.join("w/f")).expect("read in the other"), walls);
        assert_eq!(stats["restarts"].as_u64(), Some(0), "{stats:#}");
        stage.unmount(&rootfs);
    }
    assert_eq!(fs::read_to_string(host.join("secret")).expect("read"), "secret");
    assert_eq!(fs::read_dir(&host).expect("list").count(), 1, "something was made");
    assert!(neighbour.try_wait().expect("look").is_none(), "the neighbour was ended");
    neighbour.kill().expect("end it");
    neighbour.wait().expect("end it");
    if let Some(path) = std::env::var_os("FSPROV_TEST_REPORT") {
        let mut file = File::options().append(true).create(true).open(path).expect("open the report");
        file.write_all(report.as_bytes()).expect("write the report");
    }
},);

// Calls by other tables of numbers, which a filter that looks at numbers alone lets through, end the worker; the next one serves.
case!(
    "calls_of_other_architectures_end_the_worker",
    |lane| on::fuse(lane) && cfg!(target_arch = "x86_64"),
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = stage.small_image();
        for table in ["x32", "ia32"] {
            let rootfs = mounted(stage, &image, "k", &[("FAILPOINTS", &format!("worker.escapes=return({table})"))]);
            let mut open = File::create(rootfs.join("w/f")).expect("make");
            stage.fsprov(["stats", "k"]).run().fails_saying(&["does not answer"]);
            open.write_all(b"good").expect("an open file is good");
            assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "127.0.0.1 localhost\n");
            let log = fs::read_to_string(stage.state().join("containers/k/backend/server.log")).expect("the log");
            assert!(log.contains("signal: 31 (SIGSYS)"), "{table}: {log}");
            drop(open);
            stage.unmount(&rootfs);
        }
    },
);
