//! Who writes to a volume, and what that one may: setuid goes, root's blocks stay root's, a full disk is told.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, statvfs};
use rustix::io::Errno;

use super::volumes::volume;
use crate::common::harness::case;
use crate::common::needs::{TestUser, test_user};
use crate::common::run::Outcome;
use crate::common::{Lane, Need, Stage, system};

/// Root's mounts are for everybody. The bind backend shows what the kernel does without a server in between.
fn roots(lane: &Lane) -> bool {
    ["fuse-root", "bind-root"].contains(&lane.name)
}

/// Calls that no program at hand makes one at a time. It says what failed first, with the errno, or `ok`.
const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/falloc.h>
#define BIG (4 << 20)
static char block[4096];
static int no(const char *call) { printf("%s %d\n", call, errno); return 0; }
static int lock(int fd, int command) {
    struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 10 };
    return fcntl(fd, command, &l) ? errno : 0;
}
int main(int argc, char **argv) {
    if (argc < 3) return 9;
    const char *op = argv[1];
    int fd = open(argv[2], O_RDWR | (argc == 3 ? O_CREAT : 0), 0644);
    if (fd < 0) return no("open");
    if (!strcmp(op, "write")) { if (write(fd, "w", 1) != 1) return no(op); }
    else if (!strcmp(op, "truncate")) { if (ftruncate(fd, 4096)) return no(op); }
    else if (!strcmp(op, "allocate")) { if (fallocate(fd, 0, 0, 16384)) return no(op); }
    else if (!strcmp(op, "punch")) { if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096)) return no(op); }
    else if (!strcmp(op, "zero")) { if (fallocate(fd, FALLOC_FL_ZERO_RANGE, 0, 4096)) return no(op); }
    else if (!strcmp(op, "copy")) {
        int from = open(argv[3], O_RDONLY);
        if (from < 0 || copy_file_range(from, 0, fd, 0, 4096, 0) != 4096) return no(op);
    } else if (!strcmp(op, "fill")) {
        long done = 0, n;
        memset(block, 'f', sizeof block);
        while ((n = write(fd, block, sizeof block)) > 0) done += n;
        printf("%ld %d\n", done, errno);
        return 0;
    } else if (!strcmp(op, "sync") || !strcmp(op, "close")) {
        for (int i = 0; i < BIG / 4096; i++) if (write(fd, block, sizeof block) != sizeof block) return no("write");
        if (*op == 's' && fsync(fd)) return no("fsync");
    } else if (!strcmp(op, "map")) {
        if (ftruncate(fd, BIG)) return no("truncate");
        char *p = mmap(0, BIG, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) return no("mmap");
        memset(p, 'm', BIG);
        if (msync(p, BIG, MS_SYNC)) return no("msync");
    } else if (!strcmp(op, "lock")) {
        int other = open(argv[2], O_RDWR), ofd = lock(fd, F_OFD_SETLK), held = lock(other, F_OFD_SETLK);
        close(fd);
        int freed = lock(other, F_OFD_SETLK);
        close(other);
        fd = open(argv[2], O_RDWR);
        int process = lock(fd, F_SETLK), status = 0;
        fflush(stdout);
        if (!fork()) _exit(lock(open(argv[2], O_RDWR), F_SETLK));
        wait(&status);
        printf("ofd %d %d %d process %d %d\n", ofd, held, freed, process, WEXITSTATUS(status));
    }
    if (close(fd)) return no("close");
    puts("ok");
    return 0;
}
"#;

/// [`PROGRAM`], to be run as one user or another.
struct Program<'a> {
    stage: &'a Stage,
    path: PathBuf,
    user: TestUser,
}

impl<'a> Program<'a> {
    fn new(stage: &'a Stage) -> Self {
        let source = stage.write("calls.c", PROGRAM);
        let path = stage.path("calls");
        stage.tool("cc", ["-O1", "-o"]).arg(&path).arg(&source).run().ok();
        Program { stage, path, user: test_user().expect("the test user") }
    }

    fn as_root(&self, args: &[&Path]) -> String {
        self.stage.tool(&self.path.to_string_lossy(), args).run().ok().out().trim().to_owned()
    }

    fn as_user(&self, args: &[&Path]) -> String {
        self.set_ids(&["--clear-groups"], &self.path).args(args).run().ok().out().trim().to_owned()
    }

    /// Another program as the ordinary user: how it ended.
    fn user_runs(&self, groups: &[&str], program: &str, arg: &Path) -> Outcome {
        self.set_ids(groups, program.as_ref()).arg(arg).run()
    }

    fn set_ids(&self, groups: &[&str], program: &Path) -> crate::common::stage::Call<'a> {
        let ids = ["--reuid", &self.user.uid, "--regid", &self.user.gid];
        self.stage.tool("setpriv", ids).args(groups).arg("--").arg(program)
    }
}

fn mount(stage: &Stage, backing: &Path, more: &[&str]) -> PathBuf {
    let mut options: Vec<OsString> = more.iter().map(Into::into).collect();
    let flags = if stage.lane.is_real_root() { "rw,suid" } else { "rw" };
    options.extend(volume(backing, "/data", flags));
    let image = stage.path("image");
    if !image.exists() {
        stage.small_image();
    }
    stage.mount(image, "rootfs", options)
}

/// What is kept back in the kernel is a fuse volume's own.
fn variants(stage: &Stage) -> &'static [&'static [&'static str]] {
    if stage.lane.is_fuse() { &[&[], &["--writeback"]] } else { &[&[]] }
}

case!(
    "whatever_changes_a_file_takes_setuid_away",
    roots,
    &[Need::TestUser, Need::Tool("cc"), Need::Tool("setpriv")],
    |stage: &Stage| {
        let program = Program::new(stage);
        let (plain, backing) = (stage.mkdir("plain"), stage.mkdir("vol"));
        for more in variants(stage) {
            let rootfs = mount(stage, &backing, more);
            let data = rootfs.join("data");
            for op in ["write", "truncate", "allocate", "punch", "zero", "copy"] {
                for who in ["user", "root"] {
                    let name = format!("{op}-{who}");
                    let change = |host: &Path, dir: &Path| {
                        for (name, mode) in [(&*name, 0o6777), ("from", 0o644)] {
                            fs::write(host.join(name), vec![b'x'; 8192]).expect("write");
                            fs::set_permissions(host.join(name), fs::Permissions::from_mode(mode)).expect("chmod");
                        }
                        let (file, from) = (dir.join(&name), dir.join("from"));
                        let args = [Path::new(op), &file, &from];
                        let said = if who == "user" { program.as_user(&args) } else { program.as_root(&args) };
                        let mode = |dir: &Path| fs::metadata(dir.join(&name)).expect("stat").mode() & 0o7777;
                        (said, format!("{:o} {:o}", mode(host), mode(dir)))
                    };
                    let want = change(&plain, &plain);
                    assert_eq!(change(&backing, &data), want, "{op} by {who}, {more:?}");
                    let bits = if who == "user" { "777 777" } else { "6777 6777" };
                    assert!(want.0 != "ok" || want.1 == bits, "{op} by {who} on the directory: {want:?}");
                    fs::remove_file(backing.join(&name)).expect("unlink");
                }
            }
            stage.unmount(&rootfs);
        }
    },
);

// The kernel's own copy of the mode, which execve(2) goes by, and statx(2) where the mode alone is asked for.
case!("setuid_is_gone_at_once", roots, &[Need::TestUser, Need::Tool("cc"), Need::Tool("setpriv")], |stage: &Stage| {
    let program = Program::new(stage);
    let backing = stage.mkdir("vol");
    for more in variants(stage) {
        let mut more = more.to_vec();
        if stage.lane.is_fuse() {
            more.extend(["--volume-ttl", "600"]);
        }
        let rootfs = mount(stage, &backing, &more);
        let data = rootfs.join("data");
        fs::write(data.join("from"), vec![b'x'; 8192]).expect("write");
        for op in ["write", "allocate", "punch", "zero", "copy"] {
            let file = data.join(op);
            fs::write(&file, vec![b'x'; 8192]).expect("write");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o6777)).expect("chmod");
            let mode = || {
                let flags = rustix::fs::AtFlags::empty();
                let stat = rustix::fs::statx(rustix::fs::CWD, &file, flags, rustix::fs::StatxFlags::MODE);
                match stat {
                    Ok(stat) => u32::from(stat.stx_mode) & 0o7777,
                    // Under scripts/enosys.
                    Err(_) => fs::metadata(&file).expect("stat").mode() & 0o7777,
                }
            };
            assert_eq!(mode(), 0o6777, "{op}");
            let said = program.as_user(&[Path::new(op), &file, &data.join("from")]);
            assert!(said == "ok" || op == "zero", "{op}, {more:?}: {said}");
            if said == "ok" {
                assert_eq!(mode(), 0o777, "after {op} by an ordinary user, {more:?}");
            }
        }
        stage.unmount(&rootfs);
    }
},);

case!(
    "a_program_that_may_not_be_read_runs",
    roots,
    &[Need::TestUser, Need::Tool("cc"), Need::Tool("setpriv")],
    |stage: &Stage| {
        let program = Program::new(stage);
        let source = stage.write(
            "who.c",
            "#include <stdio.h>\n#include <unistd.h>\nint main() { printf(\"%d\\n\", geteuid()); return 0; }\n",
        );
        let backing = stage.mkdir("vol");
        stage.tool("cc", ["-O1", "-o"]).arg(backing.join("who")).arg(&source).run().ok();
        let rootfs = mount(stage, &backing, &[]);
        let data = rootfs.join("data");
        let who = data.join("who");
        // Not by setpriv itself, which has root's capabilities until it runs another program.
        let run = |what: &Path| {
            let ran = program.user_runs(&["--clear-groups"], "env", what);
            (ran.code(), ran.out().trim().to_owned())
        };
        for (mode, euid) in [(0o755, &*program.user.uid), (0o711, &program.user.uid), (0o4711, "0")] {
            fs::set_permissions(&who, fs::Permissions::from_mode(mode)).expect("chmod");
            assert_eq!(run(&who), (Some(0), euid.to_owned()), "mode {mode:o}");
            let read = program.user_runs(&["--clear-groups"], "cat", &who).code();
            assert_eq!(read, Some(i32::from(mode & 0o4 == 0)), "read it, mode {mode:o}");
        }
        // What one may not run: 126, as env(1) says it.
        fs::set_permissions(&who, fs::Permissions::from_mode(0o710)).expect("chmod");
        assert_eq!(run(&who).0, Some(126));
        // A script's interpreter reads it: no kernel runs that.
        let script = data.join("script");
        fs::write(&script, "#!/bin/sh\necho read\n").expect("write");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o711)).expect("chmod");
        assert_ne!(run(&script).0, Some(0));
    },
);

// Of a small ext4, a quarter of which is root's.
case!(
    "blocks_kept_for_root_are_not_for_callers",
    roots,
    &[Need::TestUser, Need::Tool("cc"), Need::Tool("setpriv"), Need::Tool("mkfs.ext4"), Need::Loop],
    |stage: &Stage| {
        let program = Program::new(stage);
        let disk = stage.write("disk", "");
        fs::File::options().write(true).open(&disk).and_then(|f| f.set_len(16 << 20)).expect("grow");
        // Without a journal: what is freed is free at once.
        stage.tool("mkfs.ext4", ["-q", "-F", "-m", "25", "-O", "^has_journal"]).arg(&disk).run().ok();
        let backing = stage.mkdir("vol");
        stage.tool("mount", ["-o", "loop"]).arg(&disk).arg(&backing).run().ok();
        fs::set_permissions(&backing, fs::Permissions::from_mode(0o777)).expect("chmod");
        let rootfs = mount(stage, &backing, &[]);
        let data = rootfs.join("data");
        let figures = |path: &Path| statvfs(path).map(|s| (s.f_blocks, s.f_frsize, s.f_files)).expect("statvfs");
        assert_eq!(figures(&data), figures(&backing), "df of the volume");
        assert_ne!(figures(&data), figures(&rootfs), "df of the image");

        let fill = |dir: &Path, fill: &dyn Fn(&[&Path]) -> String| {
            let said = fill(&[Path::new("fill"), &dir.join("full")]);
            let (bytes, errno) = said.split_once(' ').expect("two numbers");
            assert_eq!(errno.parse(), Ok(Errno::NOSPC.raw_os_error()), "{said}");
            bytes.parse::<u64>().expect("bytes")
        };
        let full = || fs::remove_file(backing.join("full")).expect("unlink");
        let direct = fill(&backing, &|args| program.as_user(args));
        full();
        let through = fill(&data, &|args| program.as_user(args));
        // Each needs a block of its own.
        assert_ne!(program.user_runs(&[], "mkdir", &data.join("users")).code(), Some(0), "a directory for the user");
        fs::create_dir(data.join("roots")).expect("a directory for root");
        full();
        let by_root = fill(&data, &|args| program.as_root(args));
        full();
        let slack = 256 << 10;
        assert!(through.abs_diff(direct) <= slack, "bytes of an ordinary user: {direct} directly, {through} here");
        assert!(by_root > direct + (2 << 20), "bytes of root: {by_root}; of others {direct}");
        stage.unmount(&rootfs);
        stage.tool("umount", [&backing]).run().ok();
    },
);

case!(
    "a_full_volume_is_told_and_nothing_else_is_lost",
    roots,
    &[Need::TestUser, Need::Tool("cc"), Need::Tool("setpriv")],
    |stage: &Stage| {
        let program = Program::new(stage);
        let backing = stage.mkdir("vol");
        stage.tool("mount", ["-t", "tmpfs", "-o", "size=2m,mode=777", "none"]).arg(&backing).run().ok();
        let no_space = Errno::NOSPC.raw_os_error();
        for more in variants(stage) {
            let rootfs = mount(stage, &backing, more);
            let data = rootfs.join("data");
            fs::write(data.join("kept"), "earlier").expect("write");
            // Gathered writes fail where they are carried out at last.
            let told = |op: &'static str, late: &'static str| (op, if more.is_empty() { "write" } else { late });
            let mut ways = vec![told("sync", "fsync"), told("close", "close")];
            if stage.lane.is_fuse() {
                ways.push(("map", "msync")); // on tmpfs itself it is SIGBUS
            }
            for (op, call) in ways {
                for who in ["user", "root"] {
                    let args = [Path::new(op), &data.join("big")];
                    let said = if who == "user" { program.as_user(&args) } else { program.as_root(&args) };
                    assert_eq!(said, format!("{call} {no_space}"), "{op} by {who}, {more:?}");
                    assert_eq!(fs::read_to_string(backing.join("kept")).ok().as_deref(), Some("earlier"));
                    assert_eq!(fs::read_to_string(data.join("kept")).ok().as_deref(), Some("earlier"));
                    fs::remove_file(data.join("big")).expect("make room");
                    // A fuse mount's last close is told to the server in the background: the room comes a moment later.
                    let again = || program.as_user(&[Path::new("write"), &data.join("again")]) == "ok";
                    let patience = std::time::Duration::from_secs(30);
                    assert!(system::eventually(patience, again), "no room again after {op} by {who}, {more:?}");
                    assert_eq!(fs::read_to_string(backing.join("again")).ok().as_deref(), Some("w"));
                    fs::remove_file(data.join("again")).expect("unlink");
                }
            }
            stage.unmount(&rootfs);
        }
        stage.tool("umount", [&backing]).run().ok();
    },
);

// A disk whose blocks are promised and not there (a loop device on a full tmpfs): write(2) gathers in the page cache below, and
// only write-back finds out.
case!(
    "an_error_of_the_disk_is_told_at_fsync",
    roots,
    &[Need::TestUser, Need::Tool("cc"), Need::Tool("setpriv"), Need::Tool("mkfs.ext4"), Need::Loop],
    |stage: &Stage| {
        let program = Program::new(stage);
        let (memory, backing) = (stage.mkdir("memory"), stage.mkdir("vol"));
        stage.tool("mount", ["-t", "tmpfs", "-o", "size=3m", "none"]).arg(&memory).run().ok();
        let disk = memory.join("disk");
        fs::File::create(&disk).and_then(|f| f.set_len(64 << 20)).expect("make a disk");
        stage.tool("mkfs.ext4", ["-q", "-O", "^has_journal", "-E", "nodiscard"]).arg(&disk).run().ok();
        stage.tool("mount", ["-o", "loop,errors=continue"]).arg(&disk).arg(&backing).run().ok();
        fs::set_permissions(&backing, fs::Permissions::from_mode(0o777)).expect("chmod");
        for more in variants(stage) {
            let rootfs = mount(stage, &backing, more);
            for who in ["user", "root"] {
                let file = rootfs.join("data").join(who);
                let args = [Path::new("sync"), &file];
                let said = if who == "user" { program.as_user(&args) } else { program.as_root(&args) };
                // A loop device tells what its own file told.
                assert_eq!(said, format!("fsync {}", Errno::NOSPC.raw_os_error()), "by {who}, {more:?}");
                fs::remove_file(&file).expect("unlink");
            }
            stage.unmount(&rootfs);
        }
        stage.tool("umount", [&backing]).run();
        stage.tool("umount", [&memory]).run().ok();
    },
);

/// A group that nobody is in.
const GROUP: &str = "47011";

case!(
    "groups_and_locks_of_callers",
    roots,
    &[Need::TestUser, Need::Tool("cc"), Need::Tool("setpriv")],
    |stage: &Stage| {
        let program = Program::new(stage);
        let (plain, backing) = (stage.mkdir("plain"), stage.mkdir("vol"));
        let rootfs = mount(stage, &backing, &[]);
        let data = rootfs.join("data");
        let answers = |dir: &Path| {
            fs::create_dir(dir.join("dir")).expect("mkdir");
            fs::write(dir.join("file"), "secret").expect("write");
            for (name, mode) in [("dir", 0o770), ("file", 0o040)] {
                chown(dir.join(name), Some(0), Some(GROUP.parse().expect("a number"))).expect("chown");
                fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).expect("chmod");
            }
            // In the group and not, with a name of its own for each.
            let as_user = |groups: &[&str], name: &str| {
                let made = program.user_runs(groups, "touch", &dir.join("dir").join(name)).code();
                (program.user_runs(groups, "cat", &dir.join("file")).code(), made)
            };
            let groups = (as_user(&["--groups", GROUP], "in"), as_user(&["--clear-groups"], "out"));
            let locked = dir.join("dir/locked");
            let lock = [Path::new("lock"), &locked];
            (groups, program.as_user(&lock), {
                fs::set_permissions(dir.join("dir"), fs::Permissions::from_mode(0o777)).expect("chmod");
                program.as_user(&lock)
            })
        };
        let want = answers(&plain);
        assert_eq!(answers(&data), want);
        assert_eq!(want.0, ((Some(0), Some(0)), (Some(1), Some(1))), "on the directory");
        let again = Errno::AGAIN.raw_os_error();
        assert_eq!(want.2, format!("ofd 0 {again} 0 process 0 {again}\nok"));
        let unnamed = rustix::fs::open(&data, OFlags::TMPFILE | OFlags::RDWR, Mode::from_raw_mode(0o600));
        let unnamed = unnamed.map(drop);
        assert_eq!(unnamed, if stage.lane.is_fuse() { Err(Errno::OPNOTSUPP) } else { Ok(()) }, "O_TMPFILE");
    },
);
