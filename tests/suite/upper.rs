//! The writable FUSE rootfs: what was changed lies in a directory of its own, and looks as it would in a copy of the image, or through the
//! kernel's overlayfs.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, XattrFlags, renameat_with};
use rustix::io::{Errno, ReadWriteFlags};

use super::posix::transcript;
use crate::common::harness::{case, on};
use crate::common::walk::{Picture, assert_same, picture};
use crate::common::{Enter, Need, Stage, system};

/// Import a directory as `image`, so that it has an index.
pub(super) fn import(stage: &Stage, root: &Path) {
    stage.tool("tar", ["-C"]).arg(root).args(["--xattrs", "-cf", "image.tar", "."]).run().ok();
    stage.fsprov(["image", "import", "--name", "image", "image.tar"]).run().ok();
}

fn upper() -> [OsString; 4] {
    ["--id".into(), "k".into(), "--upper".into(), "changes".into()]
}

case!("a_writable_fuse_rootfs_keeps_its_changes", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    fs::create_dir(image.join("usr/many")).expect("mkdir");
    for n in 0..300 {
        fs::write(image.join(format!("usr/many/{n}")), "").expect("write");
    }
    fs::write(image.join("usr/link-a"), "linked").expect("write");
    fs::hard_link(image.join("usr/link-a"), image.join("usr/share/doc/link-c")).expect("link");
    import(stage, &image);
    let rootfs = stage.mount("image", "rootfs", upper());
    let first = picture(&rootfs);
    let number = fs::metadata(rootfs.join("etc/hosts")).expect("stat").ino();
    fs::write(rootfs.join("etc/hosts"), "changed").expect("write");
    fs::create_dir(rootfs.join("made")).expect("mkdir");
    fs::write(rootfs.join("made/file"), "made").expect("write");
    fs::remove_file(rootfs.join("bin/tool")).expect("remove");
    fs::remove_dir_all(rootfs.join("usr/many")).expect("remove");
    fs::rename(rootfs.join("home/u/notes"), rootfs.join("home/notes")).expect("rename");
    OpenOptions::new()
        .append(true)
        .open(rootfs.join("usr/link-a"))
        .and_then(|mut f| f.write_all(b"!"))
        .expect("append");
    // As dpkg and git make files.
    for mode in [0, 0o444] {
        let (path, open) =
            (rootfs.join("etc/closed"), OpenOptions::new().write(true).create_new(true).mode(mode).to_owned());
        open.open(&path).and_then(|mut file| file.write_all(b"x")).expect("make a file that its owner may not write");
        assert_eq!(fs::metadata(&path).expect("stat").mode() & 0o7777, mode);
        fs::remove_file(&path).expect("remove");
    }
    assert_eq!(fs::metadata(rootfs.join("etc/hosts")).expect("stat").ino(), number, "the same file");
    assert_eq!(fs::read_to_string(rootfs.join("usr/share/doc/link-c")).expect("read"), "linked!", "one file");
    stage
        .mount_call("image", "other", ["--upper", "changes"])
        .run()
        .fails(4, &["keeps its changes", "changes already"]);
    let shown = stage.fsprov(["inspect", "--json", "k"]).run().ok().json();
    assert_eq!(shown["changes"]["path"], stage.path("changes").to_str().expect("text"), "{shown:#}");
    assert!(shown["changes"]["files"].as_u64() >= Some(5), "{shown:#}");
    let seen = picture(&rootfs);
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after unmount");
    // The next mount finds it all, and another image none of it.
    let rootfs = stage.mount("image", "rootfs", upper());
    assert_same(&seen, &picture(&rootfs), "mounted again");
    assert_eq!(fs::metadata(rootfs.join("etc/hosts")).expect("stat").ino(), number, "the same number");
    stage.fsprov(["restart", "k"]).run().ok();
    assert_same(&seen, &picture(&rootfs), "served by another worker");
    stage.unmount(&rootfs);
    fs::write(image.join("more"), "another image").expect("write");
    stage.tool("tar", ["-C"]).arg(&image).args(["-cf", "other.tar", "."]).run().ok();
    stage.fsprov(["image", "import", "--name", "other", "other.tar"]).run().ok();
    stage.mount_call("other", "rootfs", upper()).run().fails_saying(&["another image"]);
    stage.assert_nothing_left("after a refusal");
    // Without a name they end with the rootfs.
    let rootfs = stage.mount("image", "rootfs", ["--writable"]);
    assert_same(&first, &picture(&rootfs), "the image as it was");
    fs::write(rootfs.join("new"), "new").expect("write");
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after unmount");
    fs::set_permissions(stage.path("changes"), fs::Permissions::from_mode(0o755)).expect("chmod");
    stage.mount_call("image", "rootfs", upper()).run().fails(2, &["chmod 700"]);
});

// They have no place for an attribute that says what they were copied from.
case!("changes_of_special_files_outlive_a_worker", on::fuse, |stage: &Stage| {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let image = stage.small_image();
    stage.tool("mkfifo", ["-m", "644"]).arg(image.join("data/fifo")).run().ok();
    import(stage, &image);
    let rootfs = stage.mount("image", "rootfs", upper());
    let fifo = rootfs.join("data/fifo");
    fs::set_permissions(&fifo, fs::Permissions::from_mode(0o600)).expect("chmod");
    let seen = || {
        let now = statx(CWD, &fifo, AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS).expect("statx");
        (now.stx_mode & 0o7777, now.stx_ino)
    };
    let before = seen();
    assert_eq!(before.0, 0o600);
    stage.fsprov(["restart", "k"]).run().ok();
    assert_eq!(seen(), before);
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after a restart");
});

case!("a_writable_fuse_rootfs_answers_like_a_directory", on::fuse, |stage: &Stage| {
    import(stage, &stage.small_image());
    let plain = stage.mkdir("plain");
    let rootfs = stage.mount("image", "rootfs", ["--writable"]);
    let want = transcript(&plain);
    fs::create_dir(rootfs.join("opt")).expect("mkdir");
    let got = transcript(&rootfs.join("opt"));
    let (mut section, mut wrong) = ("", Vec::new());
    for (want, got) in want.iter().zip(&got) {
        if want.starts_with("==") {
            section = want;
        }
        // RENAME_WHITEOUT is refused, as overlayfs does.
        if want != got && section != "== renames that leave a whiteout" {
            wrong.push(format!("{section}\n  directory {want}\n  rootfs    {got}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} answers differ:\n{}", wrong.len(), want.len(), wrong.join("\n"));
    assert_eq!(want.len(), got.len());
});

// Also of one that nobody looked at since it was copied up, or since the server began: the kernel keeps the attributes that it was told before.
case!("a_writer_takes_setuid_away_as_in_a_directory", on::fuse, |stage: &Stage| {
    const MODES: [u32; 4] = [0o4755, 0o2775, 0o2664, 0o755];
    let (image, plain) = (stage.small_image(), stage.mkdir("plain"));
    for at in [&image, &plain] {
        for (n, mode) in MODES.iter().enumerate() {
            for how in ["written", "cut", "later"] {
                let path = at.join(format!("{how}-{n}"));
                fs::write(&path, "text").expect("write");
                fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).expect("chmod");
            }
        }
    }
    import(stage, &image);
    let rootfs = stage.mount("image", "rootfs", upper());
    let mut later = Vec::new();
    let modes = |when: &str| {
        for (n, mode) in MODES.iter().enumerate() {
            for how in ["written", "cut", "later"] {
                let name = format!("{how}-{n}");
                let [want, got] =
                    [&plain, &rootfs].map(|at| fs::metadata(at.join(&name)).expect("stat").mode() & 0o7777);
                assert_eq!(format!("{got:o}"), format!("{want:o}"), "{when}: {name}, which was {mode:o}");
            }
        }
    };
    modes("at first");
    for at in [&rootfs, &plain] {
        for n in 0..MODES.len() {
            let open = |how: &str| OpenOptions::new().write(true).open(at.join(format!("{how}-{n}"))).expect("open");
            open("written").write_all(b"x").expect("write");
            open("cut").set_len(1).expect("truncate");
            later.push(open("later"));
        }
    }
    modes("changed");
    stage.fsprov(["restart", "k"]).run().ok();
    for file in &mut later {
        file.write_all(b"x").expect("write");
    }
    modes("changed after a restart");
    drop(later);
    stage.fsprov(["restart", "k"]).run().ok();
    modes("at last");
    stage.unmount(&rootfs);
});

/// What there is in each kit: what the image has, and what is made of it before a row of the table.
fn make_kit(kit: &Path) {
    for dir in ["dir", "empty", "gone-dir", "opaque"] {
        fs::create_dir_all(kit.join(dir)).expect("mkdir");
    }
    for (name, text) in [
        ("file", "in the image"),
        ("dir/inside", "inside"),
        ("gone", "to go"),
        ("gone-dir/inside", "to go"),
        ("copied", "to be copied up"),
        ("opaque/inside", "to go"),
        ("hard", "two names"),
        ("bare", "attributes alone"),
    ] {
        fs::write(kit.join(name), text).expect("write");
    }
    fs::hard_link(kit.join("hard"), kit.join("hard-too")).expect("link");
    symlink("file", kit.join("link")).expect("symlink");
}

/// Of a kit in a writable rootfs: the rest of [`ITEMS`].
fn prepare(kit: &Path) {
    fs::write(kit.join("upper"), "made").expect("write");
    fs::create_dir(kit.join("upper-dir")).expect("mkdir");
    fs::write(kit.join("upper-dir/inside"), "made").expect("write");
    OpenOptions::new().append(true).open(kit.join("copied")).and_then(|mut f| f.write_all(b"!")).expect("append");
    fs::set_permissions(kit.join("bare"), fs::Permissions::from_mode(0o604)).expect("chmod");
    fs::remove_file(kit.join("gone")).expect("remove");
    fs::remove_dir_all(kit.join("gone-dir")).expect("remove");
    fs::remove_dir_all(kit.join("opaque")).expect("remove");
    fs::create_dir(kit.join("opaque")).expect("mkdir");
    fs::write(kit.join("opaque/new"), "new").expect("write");
}

const ITEMS: [&str; 14] = [
    "file",
    "dir",
    "empty",
    "link",
    "hard",
    "hard-too",
    "upper",
    "upper-dir",
    "copied",
    "bare",
    "gone",
    "gone-dir",
    "opaque",
    "never",
];

type Op = Box<dyn Fn(&Path) -> String>;

/// An errno as one word, where the table tells of it.
fn word(errno: Errno) -> String {
    if errno == Errno::XDEV { "XDEV".to_owned() } else { format!("{errno:?}") }
}

fn said<T: std::fmt::Debug>(result: std::io::Result<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(e) => Errno::from_io_error(&e).map_or_else(|| e.to_string(), word),
    }
}

/// Every row of the table: what it is called, and what it does in a kit.
fn rows(items: &[&'static str]) -> Vec<(String, Op)> {
    let mut rows: Vec<(String, Op)> = Vec::new();
    let flags: [(&str, i32); 13] = [
        ("r", libc::O_RDONLY),
        ("w", libc::O_WRONLY),
        ("rw", libc::O_RDWR),
        ("w trunc", libc::O_WRONLY | libc::O_TRUNC),
        ("r trunc", libc::O_RDONLY | libc::O_TRUNC),
        ("append", libc::O_RDWR | libc::O_APPEND),
        ("creat", libc::O_RDWR | libc::O_CREAT),
        ("creat excl", libc::O_RDWR | libc::O_CREAT | libc::O_EXCL),
        ("creat trunc", libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC),
        ("directory", libc::O_RDONLY | libc::O_DIRECTORY),
        ("nofollow", libc::O_RDWR | libc::O_NOFOLLOW),
        ("path", libc::O_PATH),
        ("creat directory", libc::O_RDONLY | libc::O_CREAT | libc::O_DIRECTORY),
    ];
    for &item in items {
        for (what, flags) in flags {
            let op = move |kit: &Path| {
                let mode = rustix::fs::Mode::from_raw_mode(0o640);
                let open = rustix::fs::open(kit.join(item), rustix::fs::OFlags::from_bits_retain(flags as u32), mode);
                let mut file = match open {
                    Ok(fd) => File::from(fd),
                    Err(e) => return format!("{e:?}"),
                };
                let mut text = String::new();
                let read = said(file.read_to_string(&mut text));
                let wrote = said(file.write(b"written"));
                format!("open, read {read} {text:?}, write {wrote}")
            };
            rows.push((format!("open {item} {what}"), Box::new(op)));
        }
        let mut one = |what: &str, op: fn(&Path, &Path) -> String| {
            rows.push((format!("{what} {item}"), Box::new(move |kit| op(&kit.join(item), kit))));
        };
        one("unlink", |path, _| said(fs::remove_file(path)));
        one("rmdir", |path, _| said(fs::remove_dir(path)));
        one("rm -r", |path, _| said(fs::remove_dir_all(path)));
        one("mkdir", |path, _| said(fs::create_dir(path)));
        one("symlink", |path, _| said(symlink("target", path)));
        one("mkfifo", |path, _| {
            let mode = rustix::fs::Mode::from_raw_mode(0o640);
            format!("{:?}", rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, mode, 0))
        });
        one("chmod", |path, _| said(fs::set_permissions(path, fs::Permissions::from_mode(0o711))));
        one("truncate", |path, _| {
            let open = OpenOptions::new().write(true).open(path);
            said(open.and_then(|f| f.set_len(3)))
        });
        one("set times", |path, _| {
            let time = std::time::UNIX_EPOCH + Duration::from_secs(77);
            said(File::open(path).and_then(|f| f.set_times(fs::FileTimes::new().set_modified(time))))
        });
        one("setxattr", |path, _| format!("{:?}", rustix::fs::setxattr(path, "user.x", b"1", XattrFlags::CREATE)));
        one("link away", |path, kit| said(fs::hard_link(path, kit.join("linked"))));
        one("link here", |path, kit| said(fs::hard_link(kit.join("file"), path)));
        one("make again", |path, _| {
            let gone = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            format!("{} {}", said(gone), said(fs::create_dir(path).and_then(|()| fs::write(path.join("x"), "x"))))
        });
        one("unlinked but open", |path, _| {
            let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else { return "not opened".into() };
            let gone = said(fs::remove_file(path));
            let wrote = said(file.write_at(b"after", 0));
            let mut text = vec![0; 5];
            let read = said(file.read_at(&mut text, 0));
            format!(
                "{gone} {wrote} {read} {:?} {}",
                String::from_utf8_lossy(&text),
                file.metadata().map_or(9, |m| m.nlink())
            )
        });
        for other in ITEMS {
            let with_flags = ["file", "dir", "upper", "gone", "opaque"].contains(&other);
            let kinds = [
                ("", RenameFlags::empty()),
                (" noreplace", RenameFlags::NOREPLACE),
                (" exchange", RenameFlags::EXCHANGE),
            ];
            for (what, flags) in &kinds[..if with_flags { 3 } else { 1 }] {
                let flags = *flags;
                let op = move |kit: &Path| {
                    let moved = renameat_with(CWD, kit.join(item), CWD, kit.join(other), flags);
                    said(moved.map_err(std::io::Error::from))
                };
                rows.push((format!("rename{what} {item} {other}"), Box::new(op)));
            }
        }
        let into = move |kit: &Path| said(fs::rename(kit.join(item), kit.join("upper-dir").join(item)));
        rows.push((format!("move {item} away"), Box::new(into)));
        let into = move |kit: &Path| said(fs::rename(kit.join(item), kit.join("dir/inside")));
        rows.push((format!("move {item} over the image's"), Box::new(into)));
    }
    rows
}

/// What each row answered, and what lies in its kit then.
fn run_table(rows: &[(String, Op)], root: &Path) -> Vec<(String, Picture)> {
    let mut all = Vec::new();
    for (number, (_, op)) in rows.iter().enumerate() {
        let kit = kit(root, number);
        prepare(&kit);
        let answer = op(&kit);
        all.push((answer, still(&kit)));
    }
    all
}

/// What is seen, without the times, which are those of two runs, and without the sizes of names.
fn still(dir: &Path) -> Picture {
    let mut seen = picture(dir);
    for line in seen.values_mut() {
        *line =
            line.split(' ').filter(|w| !w.starts_with("mtime=") || w.contains("=77.")).collect::<Vec<_>>().join(" ");
    }
    seen
}

fn compare(rows: &[(String, Op)], want: &[(String, Picture)], got: &[(String, Picture)], who: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for ((name, _), (want, got)) in rows.iter().zip(want.iter().zip(got)) {
        if want.0 != got.0 {
            wrong.push(format!("{name}: {who} {}, rootfs {}", want.0, got.0));
        } else if want.1 != got.1 {
            let keys: std::collections::BTreeSet<_> = want.1.keys().chain(got.1.keys()).collect();
            let differ = keys.into_iter().filter(|key| want.1.get(*key) != got.1.get(*key));
            let lines: Vec<_> = differ
                .map(|key| {
                    format!("    {}: {who} {:?}, rootfs {:?}", key.escape_ascii(), want.1.get(key), got.1.get(key))
                })
                .collect();
            wrong.push(format!("{name}:\n{}", lines.join("\n")));
        }
    }
    wrong
}

// Every operation on everything that can be in a directory, compared with a copy of the image, and with the kernel's overlayfs where it can be
// mounted: equal, or listed here with the reason.
case!("operations_on_everything_answer_as_in_a_copy_and_as_overlayfs", on::fuse, |stage: &Stage| {
    let rows = rows(&ITEMS);
    make_kits(stage, rows.len());
    let image = stage.path("image");
    let of_copy = run_table(&rows, &stage.path("copy"));
    let rootfs = stage.mount("image", "rootfs", upper());
    let got = run_table(&rows, &rootfs);
    let wrong = compare(&rows, &of_copy, &got, "copy");
    assert!(wrong.is_empty(), "{} of {} rows differ:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    if stage.lane.enter != Enter::User {
        let dirs = ["o-upper", "o-work", "merged"].map(|name| stage.mkdir(name));
        let options =
            format!("lowerdir={},upperdir={},workdir={}", image.display(), dirs[0].display(), dirs[1].display());
        let of_user = if stage.lane.is_real_root() { ",redirect_dir=on" } else { ",userxattr" };
        let mounted = stage.tool("mount", ["-t", "overlay", "-o", &format!("{options},index=on{of_user}"), "overlay"]);
        mounted.arg(&dirs[2]).run().ok();
        let of_overlay = run_table(&rows, &dirs[2]);
        stage.tool("umount", [&dirs[2]]).run().ok();
        let mut wrong = compare(&rows, &of_overlay, &got, "overlayfs");
        if !stage.lane.is_real_root() {
            // With userxattr overlayfs has no index, and breaks hard links (Documentation/filesystems/overlayfs.rst); ours are the copy's.
            let has_links = |line: &String| {
                line.starts_with("link ") || line.split([' ', ':']).take(4).any(|w| w.starts_with("hard"))
            };
            wrong.retain(|line| !has_links(line));
            // Nor does it rename directories of the image.
            wrong.retain(|line| !line.contains(": overlayfs XDEV, "));
        }
        assert!(wrong.is_empty(), "{} of {} rows differ:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    }
    let seen = still(&rootfs);
    stage.unmount(&rootfs);
    let rootfs = stage.mount("image", "rootfs", upper());
    assert_same(&seen, &still(&rootfs), "mounted again");
    let left = fs::read_dir(stage.path("changes/work")).expect("list").count();
    assert_eq!(left, 0, "the work directory is empty");
    let veils: Vec<PathBuf> = veils(&stage.path("changes/upper"));
    assert!(veils.is_empty(), "{veils:?}");
});

// In a rootfs whose changes end with it, content stays below where only attributes or names change.
case!("operations_on_files_of_the_image_in_a_rootfs_that_ends_answer_as_in_a_copy", on::fuse, |stage: &Stage| {
    let rows = rows(&["file", "dir", "hard", "hard-too", "copied", "bare"]);
    make_kits(stage, rows.len());
    let of_copy = run_table(&rows, &stage.path("copy"));
    let rootfs = stage.mount("image", "rootfs", ["--writable"]);
    let wrong = compare(&rows, &of_copy, &run_table(&rows, &rootfs), "copy");
    assert!(wrong.is_empty(), "{} of {} rows differ:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    stage.unmount(&rootfs);
});

/// Requests of one kind so far.
fn requests(stage: &Stage, kind: &str) -> u64 {
    let stats = stage.fsprov(["stats", "--json", "k"]).run().ok().json();
    stats["worker"]["requests"][kind].as_u64().unwrap_or(0)
}

case!("content_goes_with_the_first_open", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    fs::create_dir(image.join("many")).expect("mkdir");
    let text = |n: usize| format!("{n} ").repeat(1 + n * 37);
    for n in 0..200 {
        fs::write(image.join(format!("many/{n}")), text(n)).expect("write");
    }
    fs::write(image.join("most"), vec![5; 128 << 10]).expect("write");
    fs::write(image.join("large"), vec![7; 300_000]).expect("write");
    import(stage, &image);
    let rootfs = stage.mount("image", "rootfs", ["--id", "k", "--writable"]);
    let read = |name: String| fs::read(rootfs.join(name)).expect("read");
    let look = |from: usize, to: usize| {
        for n in from..to {
            assert_eq!(read(format!("many/{n}")), text(n).as_bytes(), "{n}");
        }
    };
    look(0, 100);
    assert_eq!(read("most".into()), [5; 128 << 10]);
    assert_eq!(requests(stage, "read"), 0, "of 101 small files");
    assert_eq!(read("large".into()), [7; 300_000]);
    let large = requests(stage, "read");
    assert!(large > 0);
    // One that was written to, cut, or of which an attribute changed before anybody opened it.
    OpenOptions::new().append(true).open(rootfs.join("many/100")).expect("open").write_all(b"more").expect("write");
    assert_eq!(read("many/100".into()), [text(100).as_bytes(), b"more"].concat());
    File::options().write(true).open(rootfs.join("many/101")).expect("open").set_len(3).expect("cut");
    assert_eq!(read("many/101".into()), &text(101).as_bytes()[..3]);
    fs::set_permissions(rootfs.join("many/102"), fs::Permissions::from_mode(0o600)).expect("chmod");
    assert_eq!(read("many/102".into()), text(102).as_bytes());
    // A server that is not the first gives nothing: what the kernel waits for may have come from before.
    stage.fsprov(["restart", "k"]).run().ok();
    look(103, 200);
    assert!(requests(stage, "read") >= 97);
    look(0, 100);
    stage.unmount(&rootfs);
});

// What makes a file and only writes it asks for nothing else; who reads it meanwhile sees each write.
case!("writes_to_a_new_file_come_whole", on::fuse, |stage: &Stage| {
    const BLOCK: usize = 10_240;
    let writers = [("etc/new", false), ("vol/new", false), ("etc/appended", true)];
    import(stage, &stage.small_image());
    let volume = format!("{}:/vol:rw", stage.mkdir("volume").display());
    let rootfs = stage.mount("image", "rootfs", ["--id", "k", "--writable", "-v", &volume]);
    for (name, appends) in writers {
        let before = ["write", "getxattr"].map(|kind| requests(stage, kind));
        let path = rootfs.join(name);
        let mut file = OpenOptions::new().create_new(true).write(true).append(appends).open(&path).expect("create");
        let reader = File::open(&path).expect("open");
        let mut seen = vec![0; BLOCK];
        for n in 1..=20_u8 {
            file.write_all(&[n; BLOCK]).expect("write");
            let (last, first) = ((usize::from(n) - 1) * BLOCK, usize::from(!appends) * usize::from(n));
            reader.read_exact_at(&mut seen, last as u64).expect("read");
            assert_eq!(seen, [n; BLOCK], "{name}: as it was written");
            if first > 0 {
                // Over what the reader has in its pages.
                file.write_all_at(&[n + 100; BLOCK], 0).expect("write");
                reader.read_exact_at(&mut seen, 0).expect("read");
                assert_eq!(seen, [n + 100; BLOCK], "{name}: over what was read");
            }
        }
        let asked = ["write", "getxattr"].map(|kind| requests(stage, kind));
        if !appends && crate::common::needs::kernel() >= (6, 18) {
            assert_eq!([asked[0] - before[0], asked[1] - before[1]], [40, 0], "{name}: one request a write");
        }
        drop(file);
        // What takes the file up again goes on as it always does.
        OpenOptions::new().append(true).open(&path).expect("open").write_all(b"end").expect("append");
        let all = fs::read(&path).expect("read");
        assert_eq!((all.len(), &all[all.len() - 4..]), (20 * BLOCK + 3, &b"\x14end"[..]), "{name}");
    }
    stage.unmount(&rootfs);
});

// A shell's limit for its own files kills who goes beyond it (SIGXFSZ): that must not be the server of all.
case!("a_limit_of_file_size_where_it_was_mounted_is_not_its_users", on::fuse, |stage: &Stage| {
    import(stage, &stage.small_image());
    let volume = format!("{}:/vol:rw", stage.mkdir("volume").display());
    let call = stage.mount_call("image", "rootfs", ["--id", "k", "--writable", "-v", &volume]);
    stage.limited("-S -f 100", &call).run().ok();
    for name in ["etc/large", "vol/large"] {
        fs::write(stage.path("rootfs").join(name), vec![1; 300_000]).expect("write");
    }
    stage.unmount("rootfs");
    // A hard limit stays one, and is the writer's error.
    stage.limited("-f 100", &call).run().ok();
    let error = fs::write(stage.path("rootfs/vol/larger"), vec![1; 300_000]).expect_err("write");
    assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
    assert_eq!(fs::metadata(stage.path("rootfs/vol/large")).expect("stat").len(), 300_000);
    let stats = stage.fsprov(["stats", "k"]).run().ok().out();
    assert!(stats.lines().any(|line| line.split_whitespace().eq(["restarts_total", "0"])), "{stats}");
    stage.unmount("rootfs");
    // An import says what went wrong, and leaves nothing.
    let refused =
        stage.limited("-f 4", &stage.fsprov(["image", "import", "--name", "more"]).arg(stage.path("image"))).run();
    assert!(refused.code() > Some(0) && refused.err().contains("File too large"), "{}", refused.describe());
    assert_eq!(fs::read_dir(stage.state().join("staging")).map_or(0, Iterator::count), 0);
});

case!("changes_are_not_kept_where_they_would_be_lost", on::fuse, |stage: &Stage| {
    import(stage, &stage.small_image());
    for (within, why) in
        [(stage.state().join("containers/x"), "its own files"), (stage.path("rootfs/x"), "lies in the rootfs")]
    {
        let refused = stage.mount_call("image", "rootfs", [OsString::from("--upper"), within.clone().into()]).run();
        assert!(refused.code() == Some(2) && refused.err().contains(why), "{}", refused.describe());
        assert!(!within.exists());
    }
    stage.assert_nothing_left("after it was refused");
});

// Also by one that reads the end of the file all the time, so that its pages are there when the next write comes.
case!("a_reader_of_the_end_sees_each_write", on::fuse, |stage: &Stage| {
    const PIECE: usize = 5000;
    import(stage, &stage.small_image());
    let rootfs = stage.mount("image", "rootfs", ["--id", "k", "--writable"]);
    let path = rootfs.join("etc/new");
    let mut file = OpenOptions::new().create_new(true).write(true).open(&path).expect("create");
    let reader = File::open(&path).expect("open");
    let is_done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seen = vec![0; 3 * PIECE];
            while !is_done.load(std::sync::atomic::Ordering::Relaxed) {
                let size = reader.metadata().expect("stat").len();
                reader.read_at(&mut seen, size.saturating_sub(PIECE as u64)).expect("read");
            }
        });
        let written = (0..2000_usize).try_for_each(|n| {
            let byte = 1 + (n % 250) as u8;
            file.write_all(&[byte; PIECE]).expect("write");
            let mut seen = vec![0; PIECE];
            reader.read_exact_at(&mut seen, (n * PIECE) as u64).expect("read");
            let wrong = seen.iter().filter(|seen| **seen != byte).count();
            if wrong == 0 { Ok(()) } else { Err(format!("{wrong} bytes of piece {n} are not as they were written")) }
        });
        is_done.store(true, std::sync::atomic::Ordering::Relaxed);
        written.expect("read back");
    });
    drop((file, reader));
    stage.unmount(&rootfs);
});

case!("what_is_to_be_on_the_disk_is_synced", on::fuse, |stage: &Stage| {
    import(stage, &stage.small_image());
    stage.mkdir("volume");
    let volume = format!("{}:/vol:rw", stage.path("volume").display());
    let rootfs = stage.mount("image", "rootfs", ["--id", "k", "-v", &volume]);
    // The kernel asks for it, but not for what is written directly.
    let synced = || stage.fsprov(["stats", "--json", "k"]).run().ok().json()["worker"]["requests"]["fsync"].as_u64();
    for (flag, name) in [(libc::O_DSYNC, "dsync"), (libc::O_SYNC, "sync")] {
        let before = synced();
        let mut file = OpenOptions::new();
        let mut file =
            file.create_new(true).write(true).custom_flags(flag).open(rootfs.join("vol").join(name)).expect("create");
        file.write_all(b"one").expect("write");
        file.write_all(b"two").expect("write");
        assert_eq!(synced().unwrap_or(0), before.unwrap_or(0) + 2, "{name}");
    }
    stage.unmount(&rootfs);
});

case!("a_write_that_asks_to_be_on_the_disk_is_synced", on::fuse, &[Need::Failpoints], |stage: &Stage| {
    import(stage, &stage.small_image());
    stage.mkdir("volume");
    let volume = format!("{}:/vol:rw", stage.path("volume").display());
    let slow = stage.mount_call("image", "rootfs", ["--id", "k", "-v", &volume]);
    slow.env("FAILPOINTS", "serve.sync=sleep(4000)").run().ok();
    let file = File::create(stage.path("rootfs/vol/f")).expect("create");
    for (flags, waits) in
        [(ReadWriteFlags::empty(), false), (ReadWriteFlags::DSYNC, true), (ReadWriteFlags::SYNC, true)]
    {
        let begin = Instant::now();
        rustix::io::pwritev2(&file, &[std::io::IoSlice::new(b"text")], 0, flags).expect("write");
        assert_eq!(begin.elapsed() >= Duration::from_secs(4), waits, "{flags:?}: {:?}", begin.elapsed());
    }
    drop(file);
    stage.unmount(stage.path("rootfs"));
});

// Nobody reads what another is being given, and nothing that was given covers what somebody writes.
case!("many_open_a_file_as_the_first", on::fuse, |stage: &Stage| {
    const FILES: usize = 300;
    let image = stage.small_image();
    fs::create_dir(image.join("many")).expect("mkdir");
    let old = |n: usize| format!("old {n} ").repeat(500);
    for n in 0..FILES {
        fs::write(image.join(format!("many/{n}")), old(n)).expect("write");
    }
    import(stage, &image);
    let rootfs = stage.mount("image", "rootfs", ["--id", "k", "--writable"]);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (rootfs, old) = (&rootfs, &old);
            scope.spawn(move || {
                for n in 0..FILES {
                    let path = rootfs.join(format!("many/{n}"));
                    match (thread, n % 3) {
                        (0, 0) => fs::write(&path, format!("new {n}")).expect("write"),
                        (0, 1) => {
                            let mut file = OpenOptions::new().append(true).open(&path).expect("open");
                            file.write_all(b"new").expect("append");
                        }
                        (0, _) => fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod"),
                        _ => {
                            let seen = fs::read_to_string(&path).expect("read");
                            let (old, new) = (old(n), format!("new {n}"));
                            // The kernel fills up a read that comes back short while the file is being cut (fuse_short_read).
                            let is_cut = n % 3 == 0 && seen.bytes().all(|byte| byte == 0);
                            assert!(
                                is_cut || seen == old || new.starts_with(&seen) || seen == format!("{old}new"),
                                "{n}: {} bytes that begin with {:?}",
                                seen.len(),
                                &seen[..seen.len().min(20)]
                            );
                        }
                    }
                }
            });
        }
    });
    for n in 0..FILES {
        let want = match n % 3 {
            0 => format!("new {n}"),
            1 => format!("{}new", old(n)),
            _ => old(n),
        };
        assert_eq!(fs::read_to_string(rootfs.join(format!("many/{n}"))).expect("read"), want, "{n}");
    }
    stage.unmount(&rootfs);
});

case!("what_ends_with_the_rootfs_is_not_synced", on::fuse, &[Need::Failpoints], |stage: &Stage| {
    import(stage, &stage.small_image());
    for (options, is_synced) in [(&["--writable"][..], false), (&["--upper", "changes"], true)] {
        let slow = stage.mount_call("image", "rootfs", options).env("FAILPOINTS", "serve.sync=sleep(3000)");
        slow.run().ok();
        let rootfs = stage.path("rootfs");
        let file = File::create(rootfs.join("etc/made")).expect("create");
        let begin = Instant::now();
        file.sync_all().expect("fsync");
        file.sync_data().expect("fdatasync");
        assert_eq!(begin.elapsed() >= Duration::from_secs(3), is_synced, "{options:?}: {:?}", begin.elapsed());
        drop(file);
        stage.unmount(&rootfs);
    }
});

/// Files that stand for whiteouts while a change is made.
fn veils(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).expect("list").flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b".wh.") {
            all.push(entry.path());
        } else if entry.file_type().expect("type").is_dir() {
            all.extend(veils(&entry.path()));
        }
    }
    all
}

/// A change in a kit.
type Change = fn(&Path) -> std::io::Result<()>;

/// What dies at each step.
const DYING: &[(&str, Change)] = &[
    ("copy up", |kit| OpenOptions::new().append(true).open(kit.join("file"))?.write_all(b"!")),
    ("copy up a group", |kit| fs::set_permissions(kit.join("hard"), fs::Permissions::from_mode(0o600))),
    ("give away", |kit| std::os::unix::fs::chown(kit.join("file"), Some(rustix::process::geteuid().as_raw()), None)),
    ("unlink", |kit| fs::remove_file(kit.join("copied"))),
    ("unlink the image's", |kit| fs::remove_file(kit.join("file"))),
    ("rmdir", |kit| {
        fs::remove_file(kit.join("dir/inside"))?;
        fs::remove_dir(kit.join("dir"))
    }),
    ("create again", |kit| fs::write(kit.join("gone"), "again")),
    ("mkdir again", |kit| fs::create_dir(kit.join("gone-dir"))),
    ("rename", |kit| fs::rename(kit.join("file"), kit.join("copied"))),
    ("rename to what was gone", |kit| fs::rename(kit.join("file"), kit.join("gone"))),
    ("rename a directory", |kit| fs::rename(kit.join("upper-dir"), kit.join("gone-dir"))),
    ("rename the image's directory", |kit| fs::rename(kit.join("dir"), kit.join("moved"))),
    ("rename over an empty one", |kit| fs::rename(kit.join("upper-dir"), kit.join("empty"))),
    ("exchange", |kit| Ok(renameat_with(CWD, kit.join("file"), CWD, kit.join("upper-dir"), RenameFlags::EXCHANGE)?)),
    ("link", |kit| fs::hard_link(kit.join("file"), kit.join("gone"))),
];

/// The steps of a change, but for those of which each server passes one alone.
const STEPS: [&str; 13] = [
    "upper.directory",
    "upper.staged",
    "upper.copied",
    "upper.settled",
    "upper.group",
    "upper.linked",
    "upper.raised",
    "upper.veiled",
    "upper.room",
    "upper.taken",
    "upper.covered",
    "upper.gone",
    "upper.moved",
];
/// A request that takes longer is taken to be held by a fault point. Where it is not, a worker dies all the same.
const HELD: Duration = Duration::from_millis(150);

// The worker is killed at each step of each change: who asked gets the one true answer from the next worker, and what lies there then is what
// an undisturbed change leaves.
case!("a_worker_that_dies_in_a_change_leaves_it_done", on::fuse, &[Need::Failpoints], |stage: &Stage| {
    make_kits(stage, STEPS.len() * DYING.len());
    let rootfs = stage.mount("image", "rootfs", upper());
    for number in 0..STEPS.len() * DYING.len() {
        prepare(&kit(&rootfs, number));
    }
    stage.unmount(&rootfs);
    let mut died = 0;
    for (at, step) in STEPS.iter().enumerate() {
        // The first passing in each process arms it.
        let points = format!("{step}=1*off->1*sleep(60000)->off");
        stage.mount_call("image", "rootfs", upper()).env("FAILPOINTS", &points).run().ok();
        let supervisor = super::crash::supervisor(stage);
        for (number, (what, change)) in DYING.iter().enumerate() {
            let (dying, plain) =
                (kit(&rootfs, at * DYING.len() + number), kit(&stage.path("copy"), at * DYING.len() + number));
            let answer = through_deaths(supervisor, || change(&dying));
            answer.unwrap_or_else(|e| panic!("{what} at {step}: {e}"));
            prepare(&plain);
            change(&plain).unwrap_or_else(|e| panic!("{what} in the copy: {e}"));
            let seen = through_deaths(supervisor, || Ok(still(&dying))).expect("look");
            assert_same(&still(&plain), &seen, &format!("{what} at {step}"));
        }
        let stats = stage.fsprov(["stats", "--json", "k"]).run().ok().json();
        died += stats["restarts"].as_u64().unwrap_or(0);
        stage.unmount(&rootfs);
    }
    // What the kernel remembered is not what is looked at here.
    stage.mount("image", "rootfs", upper());
    for number in 0..STEPS.len() * DYING.len() {
        let what = format!("{} at {}, mounted again", DYING[number % DYING.len()].0, STEPS[number / DYING.len()]);
        assert_same(&still(&kit(&stage.path("copy"), number)), &still(&kit(&rootfs, number)), &what);
    }
    stage.unmount(&rootfs);
    assert!(died >= 20, "only {died} workers died");
    let left = fs::read_dir(stage.path("changes/work")).expect("list").count();
    assert_eq!((left, veils(&stage.path("changes/upper"))), (0, Vec::new()), "nothing is left on its way");
});

fn kit(root: &Path, number: usize) -> PathBuf {
    root.join(format!("kits/{number:04}"))
}

/// An image of so many kits, and a copy of it.
fn make_kits(stage: &Stage, count: usize) {
    let image = stage.mkdir("image");
    for number in 0..count {
        make_kit(&kit(&image, number));
    }
    import(stage, &image);
    stage.tool("cp", ["-a", "image", "copy"]).run().ok();
}

/// What dies at each step where content stays below until it is written.
const DYING_BARE: &[(&str, Change)] = &[
    ("chmod", |kit| fs::set_permissions(kit.join("file"), fs::Permissions::from_mode(0o600))),
    ("chmod a group, and write", |kit| {
        fs::set_permissions(kit.join("hard"), fs::Permissions::from_mode(0o600))?;
        OpenOptions::new().append(true).open(kit.join("hard-too"))?.write_all(b"!")
    }),
    ("open to write", |kit| OpenOptions::new().write(true).open(kit.join("bare")).map(drop)),
    ("write", |kit| OpenOptions::new().append(true).open(kit.join("bare"))?.write_all(b"!")),
    ("empty", |kit| fs::write(kit.join("bare"), "")),
    ("move, and cut", |kit| {
        fs::rename(kit.join("file"), kit.join("moved"))?;
        OpenOptions::new().write(true).open(kit.join("moved"))?.set_len(3)
    }),
];
const STEPS_BARE: [&str; 8] = [
    "upper.staged",
    "upper.copied",
    "upper.settled",
    "upper.group",
    "upper.linked",
    "upper.filling",
    "upper.filled",
    "upper.whole",
];

case!("a_worker_that_dies_when_content_comes_leaves_it_done", on::fuse, &[Need::Failpoints], |stage: &Stage| {
    make_kits(stage, STEPS_BARE.len() * DYING_BARE.len());
    let mut died = 0;
    for (at, step) in STEPS_BARE.iter().enumerate() {
        let points = format!("{step}=1*off->1*sleep(60000)->off");
        stage.mount_call("image", "rootfs", ["--writable", "--id", "k"]).env("FAILPOINTS", &points).run().ok();
        let (rootfs, supervisor) = (stage.path("rootfs"), super::crash::supervisor(stage));
        for (number, (what, change)) in DYING_BARE.iter().enumerate() {
            let number = at * DYING_BARE.len() + number;
            let (dying, plain) = (kit(&rootfs, number), kit(&stage.path("copy"), number));
            // Each server's first time goes by, and is not this one.
            let changed = through_deaths(supervisor, || {
                prepare(&dying);
                change(&dying)
            });
            changed.unwrap_or_else(|e| panic!("{what} at {step}: {e}"));
            prepare(&plain);
            change(&plain).unwrap_or_else(|e| panic!("{what} in the copy: {e}"));
            let seen = through_deaths(supervisor, || Ok(still(&dying))).expect("look");
            assert_same(&still(&plain), &seen, &format!("{what} at {step}"));
            if *what == "open to write" {
                let time = |kit: &Path| fs::metadata(kit.join("bare")).and_then(|meta| meta.modified()).expect("stat");
                assert_eq!(time(&dying), time(&plain), "{what} at {step}: its time is as it was");
            }
        }
        died += stage.fsprov(["stats", "--json", "k"]).run().ok().json()["restarts"].as_u64().unwrap_or(0);
        stage.unmount(&rootfs);
    }
    assert!(died >= 12, "only {died} workers died");
    stage.assert_nothing_left("after all");
});

/// Do `work`; a worker that a fault point holds is killed.
fn through_deaths<T: Send>(supervisor: i32, work: impl FnOnce() -> std::io::Result<T> + Send) -> std::io::Result<T> {
    std::thread::scope(|scope| {
        let (working, mut held) = (scope.spawn(work), HELD);
        while !working.is_finished() {
            let begun = Instant::now();
            while !working.is_finished() && begun.elapsed() < held {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !working.is_finished()
                && let Some(worker) = super::crash::worker_of(supervisor)
            {
                system::kill(worker);
                // The next may need longer than that to begin.
                held *= 2;
            }
        }
        working.join().expect("it does not panic")
    })
}
