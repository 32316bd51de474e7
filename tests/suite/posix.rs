//! A writable volume behaves like the directory behind it: the same operations on both, and the same answers.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink,
};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::volumes::volume;
use crate::common::harness::{case, on};
use crate::common::walk::{assert_same, picture};
use crate::common::{Need, Stage, system};

/// What an operation answered, as a line; errors are answers too.
pub(super) struct Script<'a> {
    dir: &'a Path,
    lines: Vec<String>,
}

impl Script<'_> {
    fn say(&mut self, what: &str, answer: impl std::fmt::Debug) {
        // Paths differ between the two runs; nothing else may.
        let text = format!("{what}: {answer:?}").replace(&*self.dir.to_string_lossy(), "DIR");
        self.lines.push(text);
    }
}

fn io<T>(result: std::io::Result<T>) -> Result<T, Option<Errno>> {
    result.map_err(|e| Errno::from_io_error(&e))
}

type Step = fn(&mut Script<'_>, &Path);

/// Each works in a fresh directory of its own.
const STEPS: &[(&str, Step)] = &[
    ("files", |s, d| {
        let path = d.join("f");
        s.say("write", io(fs::write(&path, "hello")));
        s.say("read", io(fs::read(&path)));
        s.say("exclusive", io(OpenOptions::new().write(true).create_new(true).open(&path).map(drop)));
        s.say("missing", io(File::open(d.join("missing")).map(drop)));
        s.say("not a directory", io(File::open(path.join("x")).map(drop)));
        s.say("is a directory", io(OpenOptions::new().write(true).open(d).map(drop)));
        s.say("name too long", io(File::create(d.join("n".repeat(256))).map(drop)));
        s.say("longest name", io(File::create(d.join("n".repeat(255))).map(drop)));
        s.say("trailing slash", io(File::create(d.join("new/")).map(drop)));
        s.say("no-follow", rustix::fs::open(d.join("f"), OFlags::NOFOLLOW | OFlags::RDONLY, Mode::empty()).map(drop));
        s.say("directory wanted", rustix::fs::open(&path, OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).map(drop));
        s.say("unlink", io(fs::remove_file(&path)));
        s.say("unlink again", io(fs::remove_file(&path)));
    }),
    ("hard links", |s, d| {
        fs::write(d.join("a"), "one").expect("write");
        s.say("link", io(fs::hard_link(d.join("a"), d.join("b"))));
        s.say("link again", io(fs::hard_link(d.join("a"), d.join("b"))));
        let (a, b) = (fs::metadata(d.join("a")).expect("stat"), fs::metadata(d.join("b")).expect("stat"));
        s.say("same inode", (a.ino() == b.ino(), a.nlink(), b.nlink()));
        s.say("write by one", io(fs::write(d.join("b"), "changed")));
        s.say("read by the other", io(fs::read_to_string(d.join("a"))));
        s.say("remove one", io(fs::remove_file(d.join("a"))));
        s.say("the other stays", io(fs::read_to_string(d.join("b"))));
        s.say("count", fs::metadata(d.join("b")).map(|m| m.nlink()).ok());
        s.say("rename onto itself", {
            fs::hard_link(d.join("b"), d.join("c")).expect("link");
            io(fs::rename(d.join("b"), d.join("c")))
        });
        s.say("both stay", (d.join("b").exists(), d.join("c").exists()));
        s.say("link a directory", io(fs::hard_link(d, d.join("dir"))));
    }),
    ("unlinked but open", |s, d| {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(d.join("u")).expect("open");
        s.say("write", io(file.write_all(b"before")));
        s.say("unlink", io(fs::remove_file(d.join("u"))));
        s.say("write after", io(file.write_all(b" after")));
        s.say("links", file.metadata().map(|m| (m.nlink(), m.len())).ok());
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).expect("seek");
        s.say("read", io(file.read_to_string(&mut text)));
        s.say("text", text);
        s.say("truncate", io(file.set_len(3)));
        s.say("chmod", io(file.set_permissions(fs::Permissions::from_mode(0o600))));
        s.say("length", file.metadata().map(|m| (m.len(), m.mode() & 0o7777)).ok());
        // The same name again is another file.
        s.say("new", io(fs::write(d.join("u"), "new")));
        s.say("old is old", file.metadata().map(|m| m.len()).ok());
        s.say("new is new", io(fs::read_to_string(d.join("u"))));
        // Replaced by a rename, open on both sides.
        let old = File::open(d.join("u")).expect("open");
        fs::write(d.join("v"), "renamed over").expect("write");
        s.say("rename over", io(fs::rename(d.join("v"), d.join("u"))));
        let mut text = String::new();
        (&old).read_to_string(&mut text).expect("read");
        s.say("old content", text);
        // A directory, removed while open.
        fs::create_dir(d.join("dir")).expect("mkdir");
        let dir = File::open(d.join("dir")).expect("open");
        s.say("rmdir", io(fs::remove_dir(d.join("dir"))));
        s.say(
            "create in it",
            rustix::fs::openat(&dir, "x", OFlags::CREATE | OFlags::WRONLY, Mode::from_raw_mode(0o644)).map(drop),
        );
        s.say("stat it", dir.metadata().map(|m| m.is_dir()).ok());
    }),
    ("symlinks", |s, d| {
        s.say("symlink", io(symlink("target/does/not/exist", d.join("l"))));
        s.say("readlink", io(fs::read_link(d.join("l"))));
        s.say("open", io(File::open(d.join("l")).map(drop)));
        s.say("absolute", io(symlink("/etc/hosts", d.join("abs"))));
        s.say("longest", io(symlink("x".repeat(4095), d.join("long"))));
        s.say("length", fs::symlink_metadata(d.join("long")).map(|m| m.len()).ok());
        s.say("loop", (io(symlink("loop", d.join("loop"))), io(File::open(d.join("loop")).map(drop))));
        s.say("no-follow", rustix::fs::open(d.join("l"), OFlags::NOFOLLOW | OFlags::RDONLY, Mode::empty()).map(drop));
        fs::write(d.join("f"), "f").expect("write");
        s.say("replace", io(fs::rename(d.join("l"), d.join("f"))));
        s.say("is a link", fs::symlink_metadata(d.join("f")).map(|m| m.is_symlink()).ok());
        s.say("hard link to a symlink", io(fs::hard_link(d.join("f"), d.join("g"))));
        s.say("is a link too", fs::symlink_metadata(d.join("g")).map(|m| (m.is_symlink(), m.nlink())).ok());
    }),
    ("directories", |s, d| {
        s.say("mkdir", io(fs::create_dir(d.join("a"))));
        s.say("mkdir again", io(fs::create_dir(d.join("a"))));
        s.say("mkdir in missing", io(fs::create_dir(d.join("x/y"))));
        fs::write(d.join("a/f"), "f").expect("write");
        s.say("rmdir full", io(fs::remove_dir(d.join("a"))));
        s.say("rmdir file", rustix::fs::rmdir(d.join("a/f")));
        s.say("unlink dir", rustix::fs::unlink(d.join("a")));
        s.say("rename", io(fs::rename(d.join("a"), d.join("b"))));
        s.say("moved", io(fs::read_to_string(d.join("b/f"))));
        s.say("rename into itself", io(fs::rename(d.join("b"), d.join("b/c"))));
        fs::create_dir_all(d.join("full/x")).expect("mkdir");
        s.say("rename onto full", io(fs::rename(d.join("b"), d.join("full"))));
        s.say("rename dir onto file", {
            fs::write(d.join("file"), "x").expect("write");
            io(fs::rename(d.join("b"), d.join("file")))
        });
        s.say("rename file onto dir", io(fs::rename(d.join("file"), d.join("b"))));
        fs::create_dir(d.join("empty")).expect("mkdir");
        s.say("rename onto empty", io(fs::rename(d.join("b"), d.join("empty"))));
        let count = 3000;
        fs::create_dir(d.join("many")).expect("mkdir");
        for i in 0..count {
            fs::write(d.join(format!("many/f{i}")), "").expect("write");
        }
        s.say("many", fs::read_dir(d.join("many")).expect("readdir").count());
        // Removing while reading: every name is seen once, and gone.
        for entry in fs::read_dir(d.join("many")).expect("readdir") {
            fs::remove_file(entry.expect("entry").path()).expect("unlink");
        }
        s.say("emptied", fs::read_dir(d.join("many")).expect("readdir").count());
        s.say("rmdir", io(fs::remove_dir(d.join("many"))));
    }),
    ("rename flags", |s, d| {
        fs::write(d.join("a"), "a").expect("write");
        fs::write(d.join("b"), "b").expect("write");
        let with = |from: &str, to: &str, flags| rustix::fs::renameat_with(CWD, d.join(from), CWD, d.join(to), flags);
        s.say("noreplace", with("a", "b", RenameFlags::NOREPLACE));
        s.say("noreplace to new", with("a", "c", RenameFlags::NOREPLACE));
        s.say("exchange", with("b", "c", RenameFlags::EXCHANGE));
        s.say("swapped", (io(fs::read_to_string(d.join("b"))), io(fs::read_to_string(d.join("c")))));
        s.say("exchange with missing", with("b", "zz", RenameFlags::EXCHANGE));
        s.say("both flags", with("b", "c", RenameFlags::EXCHANGE | RenameFlags::NOREPLACE));
    }),
    ("renames that leave a whiteout", |s, d| {
        for (name, content) in [("a", "a"), ("b", "b"), ("c", "c")] {
            fs::write(d.join(name), content).expect("write");
        }
        fs::create_dir(d.join("other")).expect("mkdir");
        let with = |from: &str, to: &str, flags| {
            rustix::fs::renameat_with(CWD, d.join(from), CWD, d.join(to), RenameFlags::WHITEOUT | flags)
        };
        let is = |name: &str| {
            let kind = fs::symlink_metadata(d.join(name)).map(|m| (m.file_type().is_char_device(), m.rdev()));
            (io(kind), io(fs::read_to_string(d.join(name))).ok())
        };
        s.say("to new", with("a", "n", RenameFlags::empty()));
        s.say("both names", (is("a"), is("n")));
        s.say("over another, elsewhere", with("b", "other/c", RenameFlags::empty()));
        s.say("over a name", with("c", "other/c", RenameFlags::empty()));
        s.say("all names", (is("b"), is("c"), is("other/c")));
        s.say("over a whiteout", with("n", "a", RenameFlags::empty()));
        s.say("both again", (is("n"), is("a")));
        s.say("noreplace", with("a", "b", RenameFlags::NOREPLACE));
        s.say("exchange", with("a", "b", RenameFlags::EXCHANGE));
        s.say("remove", io(fs::remove_file(d.join("b"))));
        s.say("gone", is("b"));
    }),
    ("sizes", |s, d| {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(d.join("t")).expect("open");
        s.say("write", io(file.write_all_at(b"0123456789", 0)));
        s.say("shrink", io(file.set_len(4)));
        s.say("grow", io(file.set_len(8)));
        s.say("content", io(fs::read(d.join("t"))));
        s.say("past the end", io(file.write_all_at(b"end", 100_000)));
        s.say("length", file.metadata().map(|m| m.len()).ok());
        let mut hole = [1_u8; 16];
        s.say("hole", (io(file.read_at(&mut hole, 5000)), hole));
        s.say("read past the end", io(file.read_at(&mut hole, 200_000)));
        s.say("open with truncate", io(File::create(d.join("t")).map(drop)));
        s.say("is empty", file.metadata().map(|m| m.len()).ok());
        s.say("negative", rustix::fs::ftruncate(&file, u64::MAX));
        let text: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
        s.say("large write", io(file.write_all_at(&text, 0)));
        s.say("large read", io(fs::read(d.join("t"))).map(|b| b == text));
        s.say("fallocate", rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 400_000));
        s.say("allocated", file.metadata().map(|m| m.len()).ok());
        s.say("fallocate keep size", rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 500_000));
        s.say("length kept", file.metadata().map(|m| m.len()).ok());
        s.say(
            "punch",
            rustix::fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 4096, 8192),
        );
        let mut hole = [1_u8; 16];
        s.say("punched", (io(file.read_at(&mut hole, 5000)), hole));
        s.say("zero", rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 20_000, 1000));
        s.say("zeroed", (io(file.read_at(&mut hole, 20_990)), hole));
        s.say("zero past the end", rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 400_000, 200_000));
        s.say("longer", file.metadata().map(|m| m.len()).ok());
    }),
    ("holes", |s, d| {
        use rustix::fs::SeekFrom::{Data, Hole};
        let file = File::create(d.join("h")).expect("create");
        s.say("grow", io(file.set_len(1 << 20)));
        s.say("write", (io(file.write_all_at(b"one", 0)), io(file.write_all_at(b"two", 512 << 10))));
        for at in [0, 100, 8192, 512 << 10, (512 << 10) + 8192, 1 << 20, 2 << 20] {
            s.say("data, hole", (at, rustix::fs::seek(&file, Data(at)), rustix::fs::seek(&file, Hole(at))));
        }
    }),
    ("append", |s, d| {
        let path = d.join("log");
        fs::write(&path, "start\n").expect("write");
        let mut one = OpenOptions::new().append(true).open(&path).expect("open");
        let mut two = OpenOptions::new().append(true).open(&path).expect("open");
        for i in 0..3 {
            s.say("one", io(one.write_all(format!("one {i}\n").as_bytes())));
            s.say("two", io(two.write_all(format!("two {i}\n").as_bytes())));
        }
        s.say("all", io(fs::read_to_string(&path)));
        s.say("truncated under them", io(OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(0))));
        s.say("one", io(one.write_all(b"again\n")));
        s.say("all", io(fs::read_to_string(&path)));
        // pwrite on an O_APPEND descriptor appends too (pwrite(2), BUGS).
        s.say("pwrite", io(one.write_all_at(b"end\n", 0)));
        s.say("all", io(fs::read_to_string(&path)));
    }),
    ("attributes", |s, d| {
        let path = d.join("f");
        fs::write(&path, "f").expect("write");
        s.say("none", rustix::fs::listxattr(&path, &mut [0_u8; 4096][..]));
        s.say("get missing", rustix::fs::getxattr(&path, "user.a", &mut [0_u8; 64][..]));
        s.say("set", rustix::fs::setxattr(&path, "user.a", b"value", XattrFlags::empty()));
        s.say("create existing", rustix::fs::setxattr(&path, "user.a", b"v", XattrFlags::CREATE));
        s.say("replace missing", rustix::fs::setxattr(&path, "user.b", b"v", XattrFlags::REPLACE));
        s.say("empty value", rustix::fs::setxattr(&path, "user.e", b"", XattrFlags::empty()));
        let mut value = [0_u8; 64];
        s.say("get", rustix::fs::getxattr(&path, "user.a", &mut value[..]));
        s.say("value", String::from_utf8_lossy(&value[..5]).into_owned());
        s.say("size", rustix::fs::getxattr(&path, "user.a", &mut [0_u8; 0][..]));
        s.say("too small", rustix::fs::getxattr(&path, "user.a", &mut [0_u8; 2][..]));
        let mut names = [0_u8; 4096];
        let n = rustix::fs::listxattr(&path, &mut names[..]).unwrap_or(0);
        let mut list: Vec<_> = names[..n].split(|&b| b == 0).map(|n| String::from_utf8_lossy(n).into_owned()).collect();
        list.sort();
        s.say("names", list);
        s.say("remove", rustix::fs::removexattr(&path, "user.a"));
        s.say("remove again", rustix::fs::removexattr(&path, "user.a"));
        s.say("on a directory", rustix::fs::setxattr(d, "user.d", b"1", XattrFlags::empty()));
        s.say("unknown namespace", rustix::fs::setxattr(&path, "nonsense.a", b"1", XattrFlags::empty()));
        s.say("on a symlink", {
            symlink("f", d.join("l")).expect("symlink");
            rustix::fs::lsetxattr(d.join("l"), "user.a", b"1", XattrFlags::empty())
        });
    }),
    ("modes and times", |s, d| {
        let path = d.join("f");
        fs::write(&path, "f").expect("write");
        for mode in [0o600, 0o4755, 0o2711, 0o000, 0o644] {
            s.say("chmod", io(fs::set_permissions(&path, fs::Permissions::from_mode(mode))));
            s.say("mode", fs::metadata(&path).map(|m| format!("{:o}", m.mode())).ok());
        }
        // (i64::MIN ends a thread of a debug build's server: crash::POISON has it.)
        for secs in [i64::MIN + 1, i64::MAX] {
            let time = Timespec { tv_sec: secs, tv_nsec: 1 };
            let times = Timestamps { last_access: time, last_modification: time };
            s.say("extreme time", rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty()));
            s.say("is", fs::metadata(&path).map(|m| (m.mtime(), m.mtime_nsec())).ok());
        }
        fs::create_dir(d.join("sticky")).expect("mkdir");
        s.say("sticky", io(fs::set_permissions(d.join("sticky"), fs::Permissions::from_mode(0o1777))));
        s.say("mode", fs::metadata(d.join("sticky")).map(|m| format!("{:o}", m.mode())).ok());
        let owner = fs::metadata(&path).map(|m| (m.uid(), m.gid())).expect("stat");
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        s.say("owner is the caller", owner == (uid, gid));
        s.say("chown to self", io(std::os::unix::fs::chown(&path, Some(uid), Some(gid))));
        for (secs, nanos) in [(1, 2), (-5, 999_999_999), (5_000_000_000, 0)] {
            let time = Timespec { tv_sec: secs, tv_nsec: nanos };
            let times = Timestamps { last_access: time, last_modification: time };
            s.say("utimens", rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty()));
            s.say("times", fs::metadata(&path).map(|m| (m.atime(), m.atime_nsec(), m.mtime(), m.mtime_nsec())).ok());
        }
        let omit = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
        let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        s.say(
            "omit",
            rustix::fs::utimensat(
                CWD,
                &path,
                &Timestamps { last_access: omit, last_modification: omit },
                AtFlags::empty(),
            ),
        );
        s.say("kept", fs::metadata(&path).map(|m| (m.atime(), m.mtime())).ok());
        s.say(
            "now",
            rustix::fs::utimensat(
                CWD,
                &path,
                &Timestamps { last_access: omit, last_modification: now },
                AtFlags::empty(),
            ),
        );
        s.say("is now", fs::metadata(&path).map(|m| (m.atime(), m.mtime() > 1_700_000_000)).ok());
        // A write takes setuid away; a read does not.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).expect("chmod");
        s.say("read", io(fs::read(&path)));
        s.say("still setuid", fs::metadata(&path).map(|m| format!("{:o}", m.mode())).ok());
        s.say("umask", {
            let before = rustix::process::umask(Mode::from_raw_mode(0o027));
            let made = (io(fs::write(d.join("masked"), "")), io(fs::create_dir(d.join("masked-dir"))));
            rustix::process::umask(before);
            let modes =
                ["masked", "masked-dir"].map(|n| fs::metadata(d.join(n)).map(|m| format!("{:o}", m.mode())).ok());
            (made, modes)
        });
    }),
    ("sync and status", |s, d| {
        let file = File::create(d.join("f")).expect("create");
        s.say("fsync", io(file.sync_all()));
        s.say("fdatasync", io(file.sync_data()));
        s.say("fsync of a directory", io(File::open(d).and_then(|dir| dir.sync_all())));
        let status = rustix::fs::statvfs(d).expect("statvfs");
        s.say("statfs", (status.f_bsize, status.f_blocks, status.f_namemax, status.f_files > 0));
        s.say("flock", rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive));
        let other = File::open(d.join("f")).expect("open");
        s.say("flock held", rustix::fs::flock(&other, rustix::fs::FlockOperation::NonBlockingLockShared));
        s.say("unlock", rustix::fs::flock(&file, rustix::fs::FlockOperation::Unlock));
        s.say("flock free", rustix::fs::flock(&other, rustix::fs::FlockOperation::NonBlockingLockShared));
        s.say("access", rustix::fs::access(d.join("f"), rustix::fs::Access::WRITE_OK));
        s.say("not executable", rustix::fs::access(d.join("f"), rustix::fs::Access::EXEC_OK));
        s.say("seek data", rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)));
    }),
    ("pipes and sockets", |s, d| {
        let make = |name: &str, kind| rustix::fs::mknodat(CWD, d.join(name), kind, Mode::from_raw_mode(0o644), 0);
        s.say("mkfifo", make("fifo", FileType::Fifo));
        s.say("is a fifo", fs::symlink_metadata(d.join("fifo")).map(|m| m.file_type().is_fifo()).ok());
        // Both ends through the path: the kernel joins them, the server only holds the name.
        let path = d.join("fifo");
        let writer = std::thread::spawn(move || fs::write(path, "through the pipe"));
        s.say("read", io(fs::read_to_string(d.join("fifo"))));
        s.say("written", io(writer.join().expect("writer")));
        let listener = std::os::unix::net::UnixListener::bind(d.join("sock"));
        s.say(
            "bind",
            io(listener
                .as_ref()
                .map(drop)
                .map_err(|e| std::io::Error::from_raw_os_error(e.raw_os_error().unwrap_or(0)))),
        );
        if let Ok(listener) = listener {
            s.say("is a socket", fs::symlink_metadata(d.join("sock")).map(|m| m.file_type().is_socket()).ok());
            let client = std::os::unix::net::UnixStream::connect(d.join("sock"));
            s.say("connect", client.is_ok());
            if let Ok(mut client) = client {
                let (mut server, _) = listener.accept().expect("accept");
                client.write_all(b"hi").expect("send");
                let mut two = [0; 2];
                s.say("received", (io(server.read_exact(&mut two)), two));
            }
        }
        s.say("unlink fifo", io(fs::remove_file(d.join("fifo"))));
        s.say("mknod file", make("plain", FileType::RegularFile));
        s.say("is a file", fs::symlink_metadata(d.join("plain")).map(|m| m.is_file()).ok());
    }),
    ("programs", |s, d| {
        // Copied, run at once (no ETXTBSY from a descriptor that the server keeps), replaced while it runs, and again.
        let copy = |to: &str| io(fs::copy("/bin/sleep", d.join(to)).map(|n| n > 0));
        let run = |name: &str, arg: &str| {
            io(std::process::Command::new(d.join(name)).arg(arg).status().map(|st| st.success()))
        };
        s.say("copy", copy("prog"));
        s.say("run", run("prog", "0"));
        for _ in 0..10 {
            s.say("overwrite and run", (copy("prog"), run("prog", "0")));
        }
        let mut child = std::process::Command::new(d.join("prog")).arg("30").spawn().expect("start");
        s.say("text busy", io(OpenOptions::new().write(true).open(d.join("prog")).map(drop)));
        // Refused too, and what runs is not emptied by the try.
        let emptied = OpenOptions::new().read(true).custom_flags(libc::O_TRUNC).open(d.join("prog"));
        s.say("text busy to O_RDONLY|O_TRUNC", io(emptied.map(drop)));
        s.say("its size", fs::metadata(d.join("prog")).map(|m| m.len()).ok());
        s.say("replace while it runs", (copy("prog2"), io(fs::rename(d.join("prog2"), d.join("prog")))));
        s.say("still runs", child.try_wait().map(|st| st.is_none()).ok());
        let _ = child.kill();
        let _ = child.wait();
        s.say("run the new one", run("prog", "0"));
        fs::write(d.join("script"), "#!/bin/sh\nexit 7\n").expect("write");
        s.say("not executable", run("script", "x"));
        fs::set_permissions(d.join("script"), fs::Permissions::from_mode(0o755)).expect("chmod");
        s.say("script", run("script", "x"));
    }),
];

/// Run every step below `dir`, and say what was answered.
pub(super) fn transcript(dir: &Path) -> Vec<String> {
    let mut script = Script { dir, lines: Vec::new() };
    for (name, step) in STEPS {
        let own = dir.join(name.replace(' ', "-"));
        fs::create_dir(&own).expect("mkdir");
        script.lines.push(format!("== {name}"));
        step(&mut script, &own);
    }
    script.lines
}

case!("a_writable_volume_answers_like_its_directory", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    let (plain, backing) = (stage.mkdir("plain"), stage.mkdir("vol"));
    let rootfs = stage.mount(&image, "rootfs", volume(&backing, "/data", "rw"));
    let want = transcript(&plain);
    let got = transcript(&rootfs.join("data"));
    let mut section = "";
    let mut wrong = Vec::new();
    assert_eq!(want.len(), got.len());
    for (want, got) in want.iter().zip(&got) {
        if want.starts_with("==") {
            section = want;
        }
        if want != got {
            wrong.push(format!("{section}\n  directory {want}\n  volume    {got}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} answers differ:\n{}", wrong.len(), want.len(), wrong.join("\n"));
    // What came to lie on the disk is the same too, but for times, which are those of two runs.
    let still = |dir: &Path| {
        let mut seen = picture(dir);
        for line in seen.values_mut() {
            let words = line.split(' ').filter(|w| !w.starts_with("mtime=")).map(str::to_owned);
            *line = words.collect::<Vec<_>>().join(" ");
        }
        seen
    };
    assert_same(&still(&plain), &still(&backing), "what lies in the backing directory");
    assert_same(&still(&backing), &still(&rootfs.join("data")), "what is seen through the volume");
});

/// Lines that each writer of [`TWO_WRITERS`] appends.
const LINES: usize = 500;

case!("appending_beside_a_writer_on_the_host_loses_nothing", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    let backing = stage.mkdir("vol");
    let rootfs = stage.mount(&image, "rootfs", volume(&backing, "/data", "rw"));
    let append = |path: std::path::PathBuf, who: &'static str| {
        std::thread::spawn(move || {
            let mut file = OpenOptions::new().append(true).create(true).open(path).expect("open");
            for i in 0..LINES {
                file.write_all(format!("{who} {i}\n").as_bytes()).expect("append");
            }
        })
    };
    let threads = [
        append(backing.join("log"), "host"),
        append(rootfs.join("data/log"), "inside"),
        append(rootfs.join("data/log"), "too"),
    ];
    for thread in threads {
        thread.join().expect("writer");
    }
    let text = fs::read_to_string(backing.join("log")).expect("read");
    for who in ["host", "inside", "too"] {
        let mine: Vec<_> = text.lines().filter_map(|l| l.strip_prefix(who)?.trim().parse::<usize>().ok()).collect();
        assert_eq!(mine, (0..LINES).collect::<Vec<_>>(), "{who}");
    }
    let inside = || fs::read_to_string(rootfs.join("data/log")).is_ok_and(|t| t == text);
    assert!(system::eventually(Duration::from_secs(30), inside), "inside and outside agree at last");
});

// Programs that map files: written through a shared mapping, read by the other side. In C: the suite has no unsafe code.
case!("shared_mappings_reach_the_file", on::volumes, &[Need::Tool("cc")], |stage: &Stage| {
    let image = stage.small_image();
    let backing = stage.mkdir("vol");
    let source = stage.write(
            "map.c",
            r#"
            #include <fcntl.h>
            #include <stdio.h>
            #include <string.h>
            #include <sys/mman.h>
            #include <unistd.h>
            int main(int argc, char **argv) {
                if (argc < 2) return 9;
                int fd = open(argv[1], O_RDWR);
                if (fd < 0) { perror("open"); return 1; }
                char *p = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
                if (p == MAP_FAILED) { perror("mmap"); return 2; }
                if (memcmp(p, "before", 6)) { fprintf(stderr, "mapped content is wrong\n"); return 3; }
                memcpy(p + 5000, "mapped", 6);
                if (msync(p, 8192, MS_SYNC)) { perror("msync"); return 4; }
                char buf[6];
                if (pread(fd, buf, 6, 5000) != 6 || memcmp(buf, "mapped", 6)) { fprintf(stderr, "read does not see it\n"); return 5; }
                return 0;
            }
            "#,
        );
    let program = stage.path("map");
    stage.tool("cc", ["-O1", "-o"]).arg(&program).arg(&source).run().ok();
    let rootfs = stage.mount(&image, "rootfs", volume(&backing, "/data", "rw"));
    let mut content = b"before".to_vec();
    content.resize(8192, 0);
    fs::write(rootfs.join("data/mapped"), &content).expect("write");
    stage.tool(&program.to_string_lossy(), [rootfs.join("data/mapped")]).run().ok();
    let seen = fs::read(backing.join("mapped")).expect("read");
    assert_eq!(&seen[5000..5006], b"mapped", "the host sees what was written through the mapping");
    assert_eq!(seen.len(), 8192);
},);

// A handle leads back to a file that the kernel knows, and to nothing else: never to another file.
case!(
    "a_file_handle_is_good_or_stale",
    |lane| on::fuse(lane) && lane.is_real_root(),
    &[Need::Tool("python3")],
    |stage: &Stage| {
        let backing = stage.mkdir("vol");
        stage.write("vol/f", "by its handle");
        stage.write("vol/other", "another");
        let rootfs = stage.mount(stage.small_image(), "rootfs", volume(&backing, "/data", "rw"));
        let program = stage.write("handle.py", HANDLE_PROGRAM);
        let said = stage.tool("python3", [&program, &rootfs.join("data"), Path::new("f")]).run().ok().out();
        assert_eq!(said.lines().collect::<Vec<_>>(), ["by its handle", "ESTALE", "by its handle"]);
    },
);

/// Opens a file by its handle: while it is known, after the kernel forgot it, and by name after that.
const HANDLE_PROGRAM: &str = r#"
import ctypes, errno, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
class Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_char * 128)]
place = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
handle, mount = Handle(bytes=128), ctypes.c_int()
if libc.name_to_handle_at(place, sys.argv[2].encode(), ctypes.byref(handle), ctypes.byref(mount), 0):
    sys.exit(os.strerror(ctypes.get_errno()))
def read():
    fd = libc.open_by_handle_at(place, ctypes.byref(handle), os.O_RDONLY)
    if fd < 0:
        return errno.errorcode[ctypes.get_errno()]
    with os.fdopen(fd) as file:
        return file.read()
print(read())
for _ in range(50):
    with open("/proc/sys/vm/drop_caches", "w") as caches:
        caches.write("2")
    answer = read()
    if answer == "ESTALE":
        break
    time.sleep(0.1)
print(answer)
with open(sys.argv[2], opener=lambda name, flags: os.open(name, flags, dir_fd=place)) as file:
    print(file.read())
"#;
