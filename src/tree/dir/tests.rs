//! The directory tree through the tree interface, without a mount.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use super::*;
use crate::tree::{Caching, ROOT, Timespec};

const ME: Caller = Caller { uid: 0, gid: 0, pid: 0 };

/// A scratch directory served read-write, acting as the test's own user.
struct Scratch {
    dir: tempfile::TempDir,
    tree: DirTree,
}

fn scratch_with(options: DirOptions) -> Scratch {
    let dir = tempfile::tempdir().unwrap();
    let root = crate::sys::fs::open_path(dir.path()).unwrap();
    let tree = DirTree::open(root, options, FdPool::new().unwrap()).unwrap();
    Scratch { dir, tree }
}

fn scratch() -> Scratch {
    scratch_with(DirOptions { act_as: ActAs::Server, ..DirOptions::volume(Access::Rw) })
}

impl Scratch {
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }
    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
    fn find(&self, parent: Node, name: &str) -> Result<Entry> {
        match self.tree.lookup(&ME, parent, OsStr::new(name))? {
            Lookup::Found(entry) => Ok(entry),
            Lookup::Absent(_) => Err(Errno::NOENT),
        }
    }
    fn node(&self, path: &str) -> Node {
        path.split('/').fold(ROOT, |at, name| self.find(at, name).unwrap().attr.node)
    }
    fn open(&self, node: Node, flags: i32) -> Opened {
        self.tree.open(&ME, node, flags).unwrap()
    }
    fn content(&self, node: Node, handle: Handle) -> Vec<u8> {
        let mut all = Vec::new();
        self.tree.read(node, handle, 0, 1 << 16, &mut |b| all.extend_from_slice(b)).unwrap();
        all
    }
    fn names(&self, node: Node, mode: ListMode) -> Vec<(String, Node, Option<Entry>)> {
        let opened = self.tree.opendir(&ME, node).unwrap();
        let mut all = Vec::new();
        self.tree
            .readdir(&ME, node, opened.handle, 0, mode, &mut |item| {
                all.push((item.name.to_str().unwrap().to_owned(), item.node, item.entry));
                Fit::Taken
            })
            .unwrap();
        self.tree.releasedir(node, opened.handle);
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

fn new(mode: u32) -> New {
    New { mode, umask: 0o022, rdev: 0 }
}

#[test]
fn lookup_getattr_and_both_listings_tell_one_number() {
    let s = scratch();
    s.write("f", "text");
    std::fs::create_dir(s.path("d")).unwrap();
    std::os::unix::fs::symlink("f", s.path("l")).unwrap();
    for mode in [ListMode::Names, ListMode::Plus] {
        let names = s.names(ROOT, mode);
        assert_eq!(names.iter().map(|n| n.0.as_str()).collect::<Vec<_>>(), [".", "..", "d", "f", "l"]);
        for (name, number, entry) in &names[2..] {
            let found = s.find(ROOT, name).unwrap();
            assert_eq!(found.attr.node, *number, "{name}");
            assert_eq!(found.attr.node, std::fs::symlink_metadata(s.path(name)).unwrap().ino(), "{name}");
            assert_eq!(entry.is_some(), mode == ListMode::Plus);
            if let Some(entry) = entry {
                assert_eq!(entry, &found);
                s.tree.forget(*number, 1);
            }
            s.tree.forget(*number, 1);
        }
        assert_eq!((names[0].1, names[1].1), (ROOT, ROOT));
    }
    assert_eq!(s.tree.node_count(), 1, "every reference was given back");
}

#[test]
fn an_entry_that_does_not_fit_is_not_counted() {
    let s = scratch();
    for i in 0..100 {
        s.write(&format!("f{i:03}"), "");
    }
    let opened = s.tree.opendir(&ME, ROOT).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let mut cookie = 0;
    loop {
        let mut page = 0;
        s.tree
            .readdir(&ME, ROOT, opened.handle, cookie, ListMode::Plus, &mut |item| {
                if page == 7 {
                    return Fit::Full;
                }
                page += 1;
                cookie = item.cookie;
                assert!(seen.insert(item.name.to_owned()), "{:?} twice", item.name);
                Fit::Taken
            })
            .unwrap();
        if page == 0 {
            break;
        }
    }
    assert_eq!(seen.len(), 102);
    assert_eq!(s.tree.node_count(), 101);
    for i in 0..100 {
        let found = s.find(ROOT, &format!("f{i:03}")).unwrap();
        s.tree.forget(found.attr.node, 2);
    }
    assert_eq!(s.tree.node_count(), 1, "one lookup by the listing, one by us");
}

#[test]
fn a_position_stays_good_while_entries_come_and_go() {
    let s = scratch();
    for i in 0..2000 {
        s.write(&format!("f{i:04}"), "");
    }
    let opened = s.tree.opendir(&ME, ROOT).unwrap();
    let mut first: Vec<(String, u64)> = Vec::new();
    let page = |from: u64, count: usize, into: &mut Vec<(String, u64)>| {
        let mut left = count;
        s.tree
            .readdir(&ME, ROOT, opened.handle, from, ListMode::Names, &mut |item| {
                if left == 0 {
                    return Fit::Full;
                }
                left -= 1;
                into.push((item.name.to_str().unwrap().to_owned(), item.cookie));
                Fit::Taken
            })
            .unwrap();
    };
    page(0, 1000, &mut first);
    let gone: Vec<_> = first.iter().filter(|(n, _)| n.starts_with('f')).take(300).map(|(n, _)| n.clone()).collect();
    for name in &gone {
        std::fs::remove_file(s.path(name)).unwrap();
    }
    s.write("new", "");
    let mut rest = Vec::new();
    page(first.last().unwrap().1, usize::MAX, &mut rest);
    let all: std::collections::BTreeSet<_> = first.iter().chain(&rest).map(|(n, _)| n).collect();
    assert_eq!(all.len(), first.len() + rest.len(), "none twice");
    assert_eq!(all.iter().filter(|n| n.starts_with('f')).count(), 2000, "what was there all the time shows once");
    // Back to an earlier place: the same entries follow.
    let mut again = Vec::new();
    page(first[499].1, 10, &mut again);
    assert_eq!(again, first[500..510]);
    // From the start: what was made since shows, what went does not.
    let mut fresh = Vec::new();
    page(0, usize::MAX, &mut fresh);
    assert_eq!(fresh.len(), 2 + 1700 + 1);
}

#[test]
fn unlinked_but_known_files_answer_until_forgotten() {
    let s = scratch();
    s.write("f", "text");
    let node = s.node("f");
    let opened = s.open(node, libc::O_RDWR);
    s.tree.unlink(&ME, ROOT, OsStr::new("f")).unwrap();
    assert_eq!(s.tree.getattr(node, None).unwrap().0.nlink, 0);
    assert_eq!(s.tree.write(&Writer::Trusted, node, opened.handle, 4, b" more", 0), Ok(5));
    let change = Change { size: Some(6), mode: Some(0o600), ..Change::default() };
    let (attr, _) = s.tree.setattr(&ME, node, Some(opened.handle), &change).unwrap();
    assert_eq!((attr.size, attr.mode & 0o777), (6, 0o600));
    assert_eq!(s.content(node, opened.handle), b"text m");
    s.tree.release(node, opened.handle);
    // Closed, and still known: a mapping or an O_PATH descriptor holds it.
    assert_eq!(s.tree.getattr(node, None).unwrap().0.size, 6);
    assert_eq!(s.tree.pool.usage().0, 1, "the pin");
    s.tree.forget(node, 1);
    assert_eq!(s.tree.pool.usage().0, 0);
    assert_eq!(s.tree.getattr(node, None), Err(Errno::STALE));
}

#[test]
fn a_file_removed_on_the_host_answers_while_it_is_open_here() {
    let s = scratch();
    s.write("f", "text");
    let node = s.node("f");
    let opened = s.open(node, libc::O_RDONLY);
    std::fs::remove_file(s.path("f")).unwrap();
    assert_eq!(s.tree.getattr(node, None).unwrap().0.nlink, 0);
    assert_eq!(s.content(node, opened.handle), b"text");
    s.tree.release(node, opened.handle);
    assert_eq!(s.tree.getattr(node, None), Err(Errno::STALE));
}

#[test]
fn a_file_replaced_on_the_host_is_stale_and_then_new() {
    let s = scratch();
    s.write("f", "old");
    let node = s.node("f");
    s.write("g", "new one");
    std::fs::rename(s.path("g"), s.path("f")).unwrap();
    assert_eq!(s.tree.getattr(node, None), Err(Errno::STALE));
    assert_eq!(s.tree.open(&ME, node, libc::O_RDONLY), Err(Errno::STALE));
    let fresh = s.find(ROOT, "f").unwrap();
    assert_ne!(fresh.attr.node, node);
    assert_eq!(fresh.attr.size, 7);
}

#[test]
fn hard_links_are_one_node_and_any_name_reaches_it() {
    let s = scratch();
    s.write("a", "x");
    let node = s.node("a");
    let entry = s.tree.link(&ME, node, ROOT, OsStr::new("b")).unwrap();
    assert_eq!((entry.attr.node, entry.attr.nlink), (node, 2));
    std::fs::remove_file(s.path("b")).unwrap();
    assert_eq!(s.tree.getattr(node, None).unwrap().0.nlink, 1, "the other name still leads there");
    s.tree.link(&ME, node, ROOT, OsStr::new("c")).unwrap();
    s.tree.unlink(&ME, ROOT, OsStr::new("a")).unwrap();
    assert_eq!(s.tree.getattr(node, None).unwrap().0.nlink, 1);
    assert_eq!(s.tree.pool.usage().0, 0, "a file with a name left needs no pin");
}

#[test]
fn a_moved_directory_takes_its_children_along() {
    let s = scratch();
    std::fs::create_dir_all(s.path("a/b/c")).unwrap();
    s.write("a/b/c/f", "deep");
    let file = s.node("a/b/c/f");
    s.tree.mkdir(&ME, ROOT, OsStr::new("to"), new(0o755)).unwrap();
    let to = s.node("to");
    s.tree.rename(&ME, (ROOT, OsStr::new("a")), (to, OsStr::new("z")), 0).unwrap();
    // Without the cached descriptors, by name alone.
    s.tree.pool.remove_tree(s.tree.number);
    assert_eq!(s.tree.getattr(file, None).unwrap().0.size, 4);
    assert_eq!(s.text("to/z/b/c/f"), "deep");
}

#[test]
fn rename_keeps_its_flags_and_its_victims() {
    let s = scratch();
    s.write("a", "a");
    s.write("b", "b");
    let (a, b) = (s.node("a"), s.node("b"));
    let name = OsStr::new;
    assert_eq!(s.tree.rename(&ME, (ROOT, name("a")), (ROOT, name("b")), libc::RENAME_NOREPLACE), Err(Errno::EXIST));
    s.tree.rename(&ME, (ROOT, name("a")), (ROOT, name("b")), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((s.find(ROOT, "a").unwrap().attr.node, s.find(ROOT, "b").unwrap().attr.node), (b, a));
    assert_eq!((s.tree.getattr(a, None).unwrap().0.nlink, s.tree.getattr(b, None).unwrap().0.nlink), (1, 1));
    // Where the file system below has whiteouts, one is left, and nothing else of the name.
    s.write("moved", "m");
    let moved = s.node("moved");
    match s.tree.rename(&ME, (ROOT, name("moved")), (ROOT, name("away")), libc::RENAME_WHITEOUT) {
        Ok(()) => {
            assert_eq!(s.find(ROOT, "away").unwrap().attr.node, moved);
            let left = s.find(ROOT, "moved").unwrap().attr;
            assert_eq!((left.mode & libc::S_IFMT, left.rdev), (libc::S_IFCHR, 0));
            assert_ne!(left.node, moved);
        }
        other => assert_eq!(other, Err(Errno::INVAL)),
    }
    s.tree.rename(&ME, (ROOT, name("b")), (ROOT, name("a")), 0).unwrap();
    assert_eq!(s.tree.getattr(b, None).unwrap().0.nlink, 0, "replaced, but known");
    assert_eq!(s.tree.getattr(a, None).unwrap().0.nlink, 1);
    assert_eq!(s.text("a"), "a");
}

#[test]
fn appends_go_to_the_end_that_is() {
    let s = scratch();
    s.write("log", "one\n");
    let node = s.node("log");
    let opened = s.open(node, libc::O_WRONLY | libc::O_APPEND);
    s.write("log", "one\ntwo from the host\n");
    assert_eq!(s.tree.write(&Writer::Trusted, node, opened.handle, 4, b"three\n", libc::O_APPEND), Ok(6));
    assert_eq!(s.text("log"), "one\ntwo from the host\nthree\n");
    // The flag can be cleared (fcntl F_SETFL): then the offset counts.
    assert_eq!(s.tree.write(&Writer::Trusted, node, opened.handle, 0, b"ONE", 0), Ok(3));
    assert_eq!(&s.text("log")[..4], "ONE\n");
}

#[test]
fn an_unchanged_file_keeps_its_cache_and_a_changed_one_does_not() {
    let s = scratch();
    s.write("f", "one");
    let node = s.node("f");
    let cache = || {
        let opened = s.open(node, libc::O_RDONLY);
        s.tree.release(node, opened.handle);
        opened.cache
    };
    assert_eq!((cache(), cache(), cache()), (Caching::Fresh, Caching::Keep, Caching::Keep));
    s.write("f", "other");
    assert_eq!((cache(), cache()), (Caching::Fresh, Caching::Keep));
    let opened = s.open(node, libc::O_WRONLY);
    s.tree.release(node, opened.handle);
    assert_eq!((cache(), cache()), (Caching::Fresh, Caching::Keep));
}

#[test]
fn a_closed_writer_leaves_no_write_descriptor_and_can_go_on() {
    let s = scratch();
    s.write("tool", "#!/bin/true\n");
    std::fs::set_permissions(s.path("tool"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let node = s.node("tool");
    let opened = s.open(node, libc::O_RDWR);
    let run = || std::process::Command::new(s.path("tool")).status().map(|s| s.success());
    assert_eq!(run().map_err(|e| e.raw_os_error()).unwrap_err(), Some(libc::ETXTBSY));
    s.tree.flush(node, opened.handle).unwrap();
    assert!(run().unwrap());
    // A duplicate of the descriptor was closed, not the last one.
    assert_eq!(s.tree.write(&Writer::Trusted, node, opened.handle, 0, b"#", 0), Ok(1));
    assert_eq!(s.content(node, opened.handle), b"#!/bin/true\n");
    s.tree.release(node, opened.handle);
    assert_eq!(s.tree.pool.usage().0, 0);
}

#[test]
fn only_the_close_of_a_program_or_of_what_may_report_is_reported() {
    let s = scratch();
    let silent = super::found::closes_silently(std::fs::File::open(s.dir.path()).unwrap());
    let make = |name: &str, mode: u32| {
        s.tree.create(&ME, ROOT, OsStr::new(name), new(mode | 0o100_000), libc::O_WRONLY).unwrap()
    };
    assert!(!make("program", 0o755).1.closes_silently);
    let (text, writer) = make("text", 0o644);
    assert_eq!(writer.closes_silently, silent);
    let node = text.attr.node;
    let reader = s.open(node, libc::O_RDONLY);
    assert!(reader.closes_silently);
    let content = b"#!/bin/true\n";
    assert_eq!(s.tree.write(&Writer::Trusted, node, writer.handle, 0, content, 0), Ok(content.len()));
    // Made a program after its close, which is not reported: it can be run when the call returns.
    let change = Change { mode: Some(0o755), ..Change::default() };
    s.tree.setattr(&ME, node, None, &change).unwrap();
    assert!(std::process::Command::new(s.path("text")).status().unwrap().success());
    s.tree.release(node, writer.handle);
    s.tree.release(node, reader.handle);
    // Made one on the host.
    for (name, content, mode) in [("script", "#! /bin/true\n", 0o644), ("early", "#!/bin/true\n", 0o755)] {
        let (entry, writer) = make(name, mode);
        let wrote = s.tree.write(&Writer::Trusted, entry.attr.node, writer.handle, 0, content.as_bytes(), 0);
        assert_eq!(wrote, Ok(content.len()));
        let wrote = s.tree.write(&Writer::Trusted, entry.attr.node, writer.handle, wrote.unwrap() as u64, b"#\n", 0);
        assert_eq!((wrote, s.text(name)), (Ok(2), format!("{content}#\n")));
        if mode == 0o755 || !silent {
            s.tree.flush(entry.attr.node, writer.handle).unwrap();
        }
        std::fs::set_permissions(s.path(name), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(std::process::Command::new(s.path(name)).status().unwrap().success(), "{name}");
        s.tree.release(entry.attr.node, writer.handle);
    }
}

#[test]
fn a_read_that_fails_half_way_is_an_error_and_no_end_of_file() {
    // A regular file that can be read up to where nothing is mapped, and then says EIO.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let range = |line: &str| {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        [from, to].map(|at| u64::from_str_radix(at, 16).unwrap())
    };
    let ranges: Vec<_> = maps.lines().filter(|line| line.contains(" rw-p ")).map(range).collect();
    let starts: Vec<_> = maps.lines().map(|line| range(line)[0]).collect();
    // From above, where the stack is: no other test maps anything there.
    let end = ranges.iter().rev().map(|r| r[1]).find(|end| !starts.contains(end)).unwrap();
    let root = crate::sys::fs::open_path(Path::new("/proc/self/mem")).unwrap();
    let options = DirOptions { act_as: ActAs::Server, ..DirOptions::volume(Access::Ro) };
    let tree = DirTree::open(root, options, FdPool::new().unwrap()).unwrap();
    let opened = tree.open(&ME, ROOT, libc::O_RDONLY).unwrap();
    let mut got = 0;
    assert_eq!(tree.read(ROOT, opened.handle, end - 4096, 4096, &mut |bytes| got = bytes.len()), Ok(()));
    assert_eq!(got, 4096);
    assert_eq!(tree.read(ROOT, opened.handle, end - 4096, 8192, &mut |_| panic!("answered")), Err(Errno::IO));
}

#[test]
fn programs_are_known_by_their_first_bytes() {
    use super::files::looks_like_program;
    for yes in ["#!/bin/sh", "#! \t/usr/bin/env x", "\x7fELF\x02"] {
        assert!(looks_like_program(yes.as_bytes()), "{yes:?}");
    }
    for no in ["", "#", "#!", "#![allow(unused)]", "#!  ", "ELF", " #!/bin/sh", "text"] {
        assert!(!looks_like_program(no.as_bytes()), "{no:?}");
    }
}

#[test]
fn made_files_have_the_modes_asked_for() {
    let s = scratch();
    let (entry, opened) = s.tree.create(&ME, ROOT, OsStr::new("f"), new(0o100_666), libc::O_RDWR).unwrap();
    assert_eq!(entry.attr.mode, 0o100_644);
    s.tree.release(entry.attr.node, opened.handle);
    assert_eq!(s.tree.mkdir(&ME, ROOT, OsStr::new("d"), new(0o1777)).unwrap().attr.mode, 0o041_755);
    assert_eq!(s.tree.mknod(&ME, ROOT, OsStr::new("p"), new(0o010_600)).unwrap().attr.mode, 0o010_600);
    let link = s.tree.symlink(&ME, ROOT, OsStr::new("l"), OsStr::new("to/nowhere")).unwrap();
    let mut target = Vec::new();
    s.tree.readlink(link.attr.node, &mut |b| target.extend_from_slice(b)).unwrap();
    assert_eq!(target, b"to/nowhere");
    assert_eq!(link.attr.size, 10);
    let exists = s.tree.create(&ME, ROOT, OsStr::new("f"), new(0o100_666), libc::O_RDWR | libc::O_EXCL);
    assert_eq!(exists.map(|_| ()), Err(Errno::EXIST));
    let again = s.tree.create(&ME, ROOT, OsStr::new("f"), new(0o100_666), libc::O_RDWR).unwrap();
    assert_eq!(again.0.attr.node, entry.attr.node);
}

#[test]
fn fifos_sockets_and_links_are_never_opened() {
    let s = scratch();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        s.path("p"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(s.path("s")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", s.path("l")).unwrap();
    for name in ["p", "s", "l"] {
        let node = s.node(name);
        assert_eq!(s.tree.open(&ME, node, libc::O_RDWR), Err(Errno::NXIO), "{name}");
    }
    assert_eq!(s.tree.create(&ME, ROOT, OsStr::new("p"), new(0o100_600), libc::O_RDWR).map(|_| ()), Err(Errno::NXIO));
    assert_eq!(s.tree.lookup(&ME, s.node("l"), OsStr::new("x")), Err(Errno::NOTDIR));
}

#[test]
fn names_that_are_no_names_are_refused() {
    let s = scratch();
    for (name, want) in
        [("..", Errno::INVAL), (".", Errno::INVAL), ("", Errno::INVAL), ("a/b", Errno::INVAL), ("../x", Errno::INVAL)]
    {
        assert_eq!(s.tree.lookup(&ME, ROOT, OsStr::new(name)), Err(want), "{name:?}");
        assert_eq!(s.tree.mkdir(&ME, ROOT, OsStr::new(name), new(0o755)), Err(want), "{name:?}");
    }
    let longest = "n".repeat(255);
    s.tree.mkdir(&ME, ROOT, OsStr::new(&longest), new(0o755)).unwrap();
    let over = "n".repeat(256);
    assert_eq!(s.tree.mkdir(&ME, ROOT, OsStr::new(&over), new(0o755)), Err(Errno::NAMETOOLONG));
}

#[test]
fn a_directory_deeper_than_a_path_can_be_is_reached() {
    let s = scratch();
    let name = "d".repeat(200);
    let mut at = ROOT;
    for _ in 0..60 {
        at = s.tree.mkdir(&ME, at, OsStr::new(&name), new(0o755)).unwrap().attr.node;
    }
    s.tree.pool.remove_tree(s.tree.number);
    assert_eq!(s.tree.getattr(at, None).unwrap().0.nlink, 2);
    s.tree.mkdir(&ME, at, OsStr::new("end"), new(0o755)).unwrap();
    // tempfile removes by descriptor, so the depth does not matter there.
}

#[test]
fn times_are_set_now_kept_and_before_1970() {
    let s = scratch();
    s.write("f", "");
    let node = s.node("f");
    let set = |atime, mtime| {
        let change = Change { atime, mtime, ..Change::default() };
        s.tree.setattr(&ME, node, None, &change).unwrap().0
    };
    let early = Timespec { secs: -2, nanos: 800_000_000 };
    let attr = set(Some(SetTime::At(early)), Some(SetTime::At(Timespec { secs: 7, nanos: 9 })));
    assert_eq!((attr.atime, attr.mtime), (early, Timespec { secs: 7, nanos: 9 }));
    let attr = set(None, Some(SetTime::Now));
    assert_eq!(attr.atime, early);
    assert!(attr.mtime.secs > 1_700_000_000);
}

#[test]
fn a_read_only_volume_changes_nothing() {
    let s = scratch_with(DirOptions { act_as: ActAs::Server, ..DirOptions::volume(Access::Ro) });
    s.write("f", "text");
    let node = s.node("f");
    let name = OsStr::new("f");
    let change = Change { size: Some(0), ..Change::default() };
    assert_eq!(s.tree.open(&ME, node, libc::O_WRONLY), Err(Errno::ROFS));
    assert_eq!(s.tree.open(&ME, node, libc::O_RDONLY | libc::O_TRUNC), Err(Errno::ROFS));
    assert_eq!(s.tree.setattr(&ME, node, None, &change).map(|_| ()), Err(Errno::ROFS));
    assert_eq!(s.tree.unlink(&ME, ROOT, name), Err(Errno::ROFS));
    assert_eq!(s.tree.rename(&ME, (ROOT, name), (ROOT, OsStr::new("g")), 0), Err(Errno::ROFS));
    assert_eq!(s.tree.setxattr(&ME, node, OsStr::new("user.a"), b"", 0), Err(Errno::ROFS));
    assert_eq!(s.tree.mkdir(&ME, ROOT, OsStr::new("d"), new(0o755)), Err(Errno::ROFS));
    assert_eq!(s.text("f"), "text");
}

#[test]
fn an_immutable_tree_is_read_by_node_without_open_files() {
    let s = scratch_with(DirOptions::image(Ownership::default()));
    s.write("f", "text");
    std::fs::create_dir(s.path("d")).unwrap();
    let node = s.node("f");
    assert_eq!(s.open(node, libc::O_RDONLY), Opened { handle: 0, cache: Caching::Keep, closes_silently: true });
    assert_eq!(s.content(node, 0), b"text");
    assert_eq!(s.tree.handle_count(), 0);
    let mut names = 0;
    s.tree
        .readdir(&ME, ROOT, 0, 0, ListMode::Names, &mut |_| {
            names += 1;
            Fit::Taken
        })
        .unwrap();
    assert_eq!(names, 4);
    assert_eq!(s.find(ROOT, "f").unwrap().entry_ttl, FOREVER);
    assert_eq!(s.tree.lookup(&ME, ROOT, OsStr::new("no")), Ok(Lookup::Absent(FOREVER)));
    assert!(!s.tree.is_live());
}

#[test]
fn a_single_file_is_a_tree_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, "text").unwrap();
    let open = |path: &Path| {
        let root = crate::sys::fs::open_path(path).unwrap();
        let options = DirOptions { act_as: ActAs::Server, ..DirOptions::volume(Access::Rw) };
        DirTree::open(root, options, FdPool::new().unwrap())
    };
    let tree = open(&path).unwrap();
    assert_eq!(tree.getattr(ROOT, None).unwrap().0.size, 4);
    let opened = tree.open(&ME, ROOT, libc::O_RDWR).unwrap();
    assert_eq!(tree.write(&Writer::Trusted, ROOT, opened.handle, 0, b"TEXT", 0), Ok(4));
    tree.release(ROOT, opened.handle);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "TEXT");
    assert_eq!(tree.lookup(&ME, ROOT, OsStr::new("x")), Err(Errno::NOTDIR));
    assert_eq!(tree.opendir(&ME, ROOT), Err(Errno::NOTDIR));
    let socket = dir.path().join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(open(&socket).unwrap_err().kind(), crate::Kind::Usage);
}

#[test]
fn owners_are_presented_and_taken_back() {
    use crate::plan::IdRange;
    let range = |inside, outside| vec![IdRange { inside, outside, count: 1 }];
    let me = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    let ownership = Ownership { uids: range(me, 4000), gids: range(group, 5000), squash: None };
    let s = scratch_with(DirOptions { ownership, act_as: ActAs::Server, ..DirOptions::volume(Access::Rw) });
    s.write("f", "");
    let entry = s.find(ROOT, "f").unwrap();
    assert_eq!((entry.attr.uid, entry.attr.gid), (4000, 5000));
    let give = |uid, gid| {
        let change = Change { uid, gid, ..Change::default() };
        s.tree.setattr(&ME, entry.attr.node, None, &change).map(|(attr, _)| (attr.uid, attr.gid))
    };
    assert_eq!(give(Some(4000), Some(5000)), Ok((4000, 5000)));
    assert_eq!(give(Some(4001), None), Err(Errno::INVAL));
}

#[test]
fn extended_attributes_of_files_and_their_absence() {
    let s = scratch();
    s.write("f", "");
    let node = s.node("f");
    let name = OsStr::new("user.fsprov");
    let large = vec![7_u8; 2000];
    match s.tree.setxattr(&ME, node, name, &large, 0) {
        Err(Errno::OPNOTSUPP) => return, // this file system has none
        result => result.unwrap(),
    }
    let get = |name: &OsStr| {
        let mut value = Vec::new();
        s.tree.getxattr(&ME, node, name, &mut |b| value.extend_from_slice(b)).map(|()| value)
    };
    assert_eq!(get(name), Ok(large));
    assert_eq!(s.tree.setxattr(&ME, node, name, b"x", libc::XATTR_CREATE), Err(Errno::EXIST));
    let mut names = Vec::new();
    s.tree.listxattr(node, &mut |b| names.extend_from_slice(b)).unwrap();
    assert!(names.split(|&b| b == 0).any(|n| n == b"user.fsprov"));
    s.tree.removexattr(&ME, node, name).unwrap();
    assert_eq!(get(name), Err(Errno::NODATA));
}

#[test]
fn descriptors_do_not_grow_with_the_walk() {
    let s = scratch();
    for d in 0..300 {
        std::fs::create_dir(s.path(&format!("d{d}"))).unwrap();
        s.write(&format!("d{d}/f"), "");
    }
    for d in 0..300 {
        s.node(&format!("d{d}/f"));
    }
    assert!(s.tree.pool.cached() <= 128, "{}", s.tree.pool.cached());
    assert_eq!(s.tree.pool.usage().0, 0);
    assert_eq!(s.tree.node_count(), 601);
    for d in 0..300 {
        let parent = s.find(ROOT, &format!("d{d}")).unwrap().attr.node;
        let file = s.find(parent, "f").unwrap().attr.node;
        s.tree.forget(file, 9);
        s.tree.forget(parent, 9);
    }
    assert_eq!((s.tree.node_count(), s.tree.pool.cached()), (1, 0));
}

#[test]
fn an_append_sent_again_is_done_once_through_a_handle_that_cannot_read() {
    use crate::tree::resend::{CurrentRequest, answering};
    let resent = |is_resent| CurrentRequest { unique: 8, is_resent };
    let s = scratch();
    s.write("log", "one\n");
    let node = s.node("log");
    for flags in [libc::O_WRONLY, libc::O_RDWR] {
        s.write("log", "one\n");
        let opened = s.open(node, flags | libc::O_APPEND);
        let write = |data: &[u8]| s.tree.write(&Writer::Trusted, node, opened.handle, 4, data, libc::O_APPEND);
        assert_eq!(write(b"two\n"), Ok(4));
        assert_eq!(answering(resent(true), || write(b"two\n")), Ok(4));
        assert_eq!(s.text("log"), "one\ntwo\n", "done before: not again");
        assert_eq!(answering(resent(true), || write(b"two\nthree\n")), Ok(10));
        assert_eq!(s.text("log"), "one\ntwo\nthree\n", "cut short: the rest");
        assert_eq!(answering(resent(false), || write(b"two\n")), Ok(4));
        assert_eq!(s.text("log"), "one\ntwo\nthree\ntwo\n", "another request of the same bytes");
        s.tree.release(node, opened.handle);
    }
}

#[test]
fn a_file_that_only_its_maker_may_write_can_be_written_through_the_next_server() {
    // As root every file can be opened again; as an ordinary user one of mode 0444 cannot.
    let dir = tempfile::tempdir().unwrap();
    let held = super::model::Held::new();
    let first = held.serve(&dir);
    let made = first.create(&ME, ROOT, OsStr::new("f"), new(0o100_444), libc::O_RDWR).unwrap();
    let (node, handle) = (made.0.attr.node, made.1.handle);
    assert_eq!(first.write(&Writer::Trusted, node, handle, 0, b"first", 0), Ok(5));
    drop(first);
    for round in [b"second", b"third!"] {
        let next = held.serve(&dir);
        assert_eq!(next.write(&Writer::Trusted, node, handle, 0, round, 0), Ok(6));
        assert_eq!(std::fs::read(dir.path().join("f")).unwrap(), round);
    }
    let last = held.serve(&dir);
    last.flush(node, handle).unwrap();
    last.release(node, handle);
    assert!(held.is_empty(), "the descriptor was let go");
    assert_eq!(last.write(&Writer::Trusted, node, handle, 0, b"closed", 0), Err(Errno::BADF));
}

#[test]
fn a_directory_that_may_be_read_but_not_searched_shows_its_names() {
    let s = scratch();
    std::fs::create_dir_all(s.path("d/sub")).unwrap();
    s.write("d/f", "");
    let node = s.node("d");
    std::fs::set_permissions(s.path("d"), std::fs::Permissions::from_mode(0o444)).unwrap();
    for mode in [ListMode::Names, ListMode::Plus] {
        let names: Vec<_> = s.names(node, mode).into_iter().map(|n| n.0).collect();
        assert_eq!(names, [".", "..", "f", "sub"]);
    }
    std::fs::set_permissions(s.path("d"), std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Each change is carried out by one server, which is killed before it answers; the next one is sent the same request again.
#[test]
fn a_change_that_is_sent_again_is_done_once_and_gives_its_first_answer() {
    use crate::tree::resend::{CurrentRequest, answering};
    type Ask<'a> = &'a dyn Fn(&DirTree, Node, Node) -> std::result::Result<(), Errno>;
    let name = OsStr::new;
    let exchange = |t: &DirTree| t.rename(&ME, (ROOT, name("a")), (ROOT, name("b")), libc::RENAME_EXCHANGE);
    let changes: [(&str, Ask<'_>, &str); 9] = [
        ("exchange", &|t, _, _| exchange(t), "a=B b=A d/"),
        ("rename", &|t, _, _| t.rename(&ME, (ROOT, name("a")), (ROOT, name("c")), 0), "b=B c=A d/"),
        ("rename over", &|t, _, _| t.rename(&ME, (ROOT, name("a")), (ROOT, name("b")), 0), "b=A d/"),
        ("unlink", &|t, _, _| t.unlink(&ME, ROOT, name("a")), "b=B d/"),
        ("rmdir", &|t, _, _| t.rmdir(&ME, ROOT, name("d")), "a=A b=B"),
        ("mkdir", &|t, _, _| t.mkdir(&ME, ROOT, name("n"), new(0o755)).map(drop), "a=A b=B d/ n/"),
        (
            "create",
            &|t, _, _| t.create(&ME, ROOT, name("n"), new(0o100_644), libc::O_EXCL | libc::O_WRONLY).map(drop),
            "a=A b=B d/ n=",
        ),
        ("link", &|t, a, _| t.link(&ME, a, ROOT, name("n")).map(drop), "a=A b=B d/ n=A"),
        (
            "append",
            &|t, _, handle| t.write(&Writer::Trusted, 0, handle, 1, b"+", libc::O_APPEND).map(drop),
            "a=A+ b=B d/",
        ),
    ];
    for (what, ask, want) in changes {
        // Killed before it was begun, or after it was done; and the next one once more.
        for deaths in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("a"), "A").unwrap();
            std::fs::write(dir.path().join("b"), "B").unwrap();
            std::fs::create_dir(dir.path().join("d")).unwrap();
            let held = super::model::Held::new();
            let first = held.serve(&dir);
            let find = |t: &DirTree, n: &str| match t.lookup(&ME, ROOT, name(n)).unwrap() {
                Lookup::Found(entry) => entry.attr.node,
                Lookup::Absent(_) => panic!("{what}: no {n}"),
            };
            let (a, b) = (find(&first, "a"), find(&first, "b"));
            let handle = first.open(&ME, a, libc::O_WRONLY | libc::O_APPEND).unwrap().handle;
            for death in 0..deaths {
                let tree = held.serve(&dir);
                answering(CurrentRequest { unique: 40, is_resent: death > 0 }, || ask(&tree, a, handle)).unwrap();
            }
            let last = held.serve(&dir);
            let answer = answering(CurrentRequest { unique: 40, is_resent: true }, || ask(&last, a, handle));
            assert_eq!(answer, Ok(()), "{what}, {deaths} deaths");
            let mut shown: Vec<_> = std::fs::read_dir(dir.path())
                .unwrap()
                .map(|entry| {
                    let (path, name) = (entry.as_ref().unwrap().path(), entry.unwrap().file_name());
                    let name = name.to_str().unwrap();
                    std::fs::read_to_string(path).map_or_else(|_| format!("{name}/"), |text| format!("{name}={text}"))
                })
                .collect();
            shown.sort();
            assert_eq!(shown.join(" "), want, "{what}, {deaths} deaths");
            // What is known by its node is still reached.
            for node in [a, b] {
                assert!(last.getattr(node, None).is_ok(), "{what}, {deaths} deaths");
            }
            // The next request is another one: what is there is in its way.
            let next = answering(CurrentRequest { unique: 42, is_resent: false }, || ask(&last, a, handle));
            let again = match what {
                "exchange" | "append" => Ok(()),
                "mkdir" | "create" | "link" => Err(Errno::EXIST),
                _ => Err(Errno::NOENT),
            };
            assert_eq!(next, again, "{what}, {deaths} deaths");
            // Resent, but never begun by a server: the true answer too.
            let never = answering(CurrentRequest { unique: 44, is_resent: true }, || ask(&last, a, handle));
            assert_eq!(never, again, "{what}, {deaths} deaths");
        }
    }
}
