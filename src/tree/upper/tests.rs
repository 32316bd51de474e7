//! The writable tree through the tree interface, without a mount.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;

use super::*;
use crate::index::{Builder, Entry as Row, Index, Time, What, Whiteouts, Xattr};
use crate::plan::Ownership;
use crate::tree::image::Trust;

const ME: Caller = Caller { uid: 0, gid: 0, pid: 0 };

fn row(path: &str, what: What, mode: u16) -> Row {
    let (path, mtime) = (path.as_bytes().to_vec(), Time { secs: 1_000_000, nanos: 6 });
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Row { path, what, mode, uid, gid, mtime, xattrs: Vec::new() }
}

/// An image of a few files, and a directory for changes.
struct World {
    dir: tempfile::TempDir,
    tree: UpperTree,
    below: Arc<DirTree>,
}

/// Files with their content, by name; a name that ends in `/` is a directory, `=`: a hard link to the name after it.
const IMAGE_FILES: [(&str, &str); 9] = [
    ("d/", ""),
    ("d/a", "in d"),
    ("d/sub/", ""),
    ("d/sub/deep", "deep"),
    ("empty/", ""),
    ("f", "text"),
    ("g", "more"),
    ("h", "=linked/h"),
    ("linked/", ""),
];

fn image(dir: &std::path::Path) -> ImageTree {
    let layer = dir.join("layer");
    std::fs::create_dir_all(&layer).unwrap();
    let mut builder = Builder::new();
    builder.begin_layer(Whiteouts::Plain).unwrap();
    for (name, text) in IMAGE_FILES {
        if let Some(name) = name.strip_suffix('/') {
            std::fs::create_dir_all(layer.join(name)).unwrap();
            builder.add(row(name, What::Directory, 0o755)).unwrap();
        } else if !text.starts_with('=') {
            std::fs::write(layer.join(name), text).unwrap();
            let what = What::File { size: text.len() as u64, content: None, sha256: None };
            let mut file = row(name, what, 0o640);
            file.xattrs = vec![Xattr { name: "user.a".into(), value: "1".into() }];
            builder.add(file).unwrap();
        }
    }
    std::fs::write(layer.join("linked/h"), "linked").unwrap();
    builder.add(row("linked/h", What::File { size: 6, content: None, sha256: None }, 0o644)).unwrap();
    builder.add(row("h", What::HardLink(b"linked/h".to_vec()), 0o644)).unwrap();
    builder.add(row("l", What::Symlink(b"f".to_vec()), 0o777)).unwrap();
    let index = Index::from_bytes(builder.finish().unwrap()).unwrap();
    let layer = OwnedFd::from(std::fs::File::open(layer).unwrap());
    ImageTree::open(index, vec![layer], Ownership::default(), Trust::Size).unwrap()
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        std::fs::create_dir(dir.path().join("changes")).unwrap();
        Self::at(dir)
    }

    fn at(dir: tempfile::TempDir) -> Self {
        let lower = Arc::new(image(dir.path()));
        let place = crate::sys::fs::open_path(&dir.path().join("changes")).unwrap();
        let options = UpperOptions { act_as: ActAs::Server, writeback: false, durable: false };
        let (tree, below) = UpperTree::open(lower, (place, "changes"), options, FdPool::new().unwrap(), None).unwrap();
        World { dir, tree, below }
    }

    /// Another server on the same directories.
    fn again(self) -> Self {
        let World { dir, tree, below } = self;
        drop((tree, below));
        Self::at(dir)
    }

    fn upper(&self, name: &str) -> PathBuf {
        self.dir.path().join("changes/upper").join(name)
    }

    fn find(&self, path: &str) -> Result<Entry> {
        let mut at = None;
        for name in path.split('/') {
            let parent = at.map_or(ROOT, |entry: Entry| entry.attr.node);
            match self.tree.lookup(&ME, parent, OsStr::new(name))? {
                Lookup::Found(entry) => at = Some(entry),
                Lookup::Absent(_) => return Err(Errno::NOENT),
            }
        }
        at.ok_or(Errno::INVAL)
    }

    fn node(&self, path: &str) -> Node {
        self.find(path).unwrap_or_else(|e| panic!("{path}: {e}")).attr.node
    }

    /// A path's directory and name.
    fn split<'a>(&self, path: &'a str) -> (Node, &'a OsStr) {
        match path.rsplit_once('/') {
            Some((dir, name)) => (self.node(dir), OsStr::new(name)),
            None => (ROOT, OsStr::new(path)),
        }
    }

    fn read(&self, path: &str) -> String {
        let node = self.node(path);
        let opened = self.tree.open(&ME, node, libc::O_RDONLY).unwrap();
        let text = self.read_through(node, opened.handle);
        self.tree.release(node, opened.handle);
        text
    }

    fn read_through(&self, node: Node, handle: Handle) -> String {
        let mut all = Vec::new();
        self.tree.read(node, handle, 0, 1 << 16, &mut |b| all.extend_from_slice(b)).unwrap();
        String::from_utf8(all).unwrap()
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let node = self.find(path)?.attr.node;
        let opened = self.tree.open(&ME, node, libc::O_WRONLY)?;
        let change = Change { size: Some(0), ..Change::default() };
        self.tree.setattr(&ME, node, Some(opened.handle), &change)?;
        self.tree.write(&Writer::Trusted, node, opened.handle, 0, text.as_bytes(), 0)?;
        self.tree.release(node, opened.handle);
        Ok(())
    }

    fn create(&self, path: &str, text: &str) -> Result<Node> {
        let (parent, name) = self.split(path);
        let new = New { mode: libc::S_IFREG | 0o644, umask: 0, rdev: 0 };
        let (entry, opened) = self.tree.create(&ME, parent, name, new, libc::O_WRONLY | libc::O_EXCL)?;
        self.tree.write(&Writer::Trusted, entry.attr.node, opened.handle, 0, text.as_bytes(), 0)?;
        self.tree.release(entry.attr.node, opened.handle);
        Ok(entry.attr.node)
    }

    fn mkdir(&self, path: &str) -> Result<Node> {
        let (parent, name) = self.split(path);
        let new = New { mode: 0o755, umask: 0, rdev: 0 };
        self.tree.mkdir(&ME, parent, name, new).map(|entry| entry.attr.node)
    }

    fn unlink(&self, path: &str) -> Result<()> {
        let (parent, name) = self.split(path);
        self.tree.unlink(&ME, parent, name)
    }

    fn rmdir(&self, path: &str) -> Result<()> {
        let (parent, name) = self.split(path);
        self.tree.rmdir(&ME, parent, name)
    }

    fn rename(&self, from: &str, to: &str, flags: u32) -> Result<()> {
        self.tree.rename(&ME, self.split(from), self.split(to), flags)
    }

    /// The names in a directory, each with its number, the same in both listings and by lookup.
    fn names(&self, path: &str) -> Vec<String> {
        let node = if path.is_empty() { ROOT } else { self.node(path) };
        let opened = self.tree.opendir(&ME, node).unwrap();
        let list = |mode| {
            let (mut all, mut cookie) = (Vec::new(), 0);
            loop {
                let mut page = 0;
                self.tree
                    .readdir(&ME, node, opened.handle, cookie, mode, &mut |item| {
                        if page == 3 {
                            return Fit::Full;
                        }
                        page += 1;
                        cookie = item.cookie;
                        all.push((item.name.to_str().unwrap().to_owned(), item.node, item.kind));
                        Fit::Taken
                    })
                    .unwrap();
                if page == 0 {
                    return all;
                }
            }
        };
        let (plain, mut plus) = (list(ListMode::Names), list(ListMode::Plus));
        self.tree.releasedir(node, opened.handle);
        assert_eq!(plain, plus, "{path}");
        plus.retain(|(name, ..)| name != "." && name != "..");
        for (name, number, kind) in &plus {
            let full = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
            let entry = self.find(&full).unwrap();
            assert_eq!((entry.attr.node, entry.attr.mode & TYPE_BITS), (*number, *kind), "{full}");
        }
        let mut names: Vec<_> = plus.into_iter().map(|(name, ..)| name).collect();
        names.sort();
        names
    }
}

const ALL: [&str; 7] = ["d", "empty", "f", "g", "h", "l", "linked"];

#[test]
fn what_is_not_changed_is_the_images() {
    let w = World::new();
    assert_eq!(w.names(""), ALL);
    assert_eq!(w.names("d"), ["a", "sub"]);
    assert_eq!(w.read("d/sub/deep"), "deep");
    assert_eq!(w.node("h"), w.node("linked/h"));
    assert_eq!(std::fs::read_dir(w.upper("")).unwrap().count(), 0, "nothing is copied up by looking");
    assert_eq!(w.find("none").unwrap_err(), Errno::NOENT);
    assert_eq!(w.find(".wh.f").unwrap_err(), Errno::NOENT);
}

#[test]
fn a_file_that_is_written_is_copied_up_and_keeps_its_number() {
    let w = World::new();
    let (number, directory) = (w.node("d/a"), w.node("d"));
    let before = w.find("d").unwrap().attr;
    let early = w.tree.open(&ME, number, libc::O_RDONLY).unwrap();
    assert_eq!(w.read_through(number, early.handle), "in d");
    w.write("d/a", "changed").unwrap();
    assert_eq!((w.node("d/a"), w.node("d")), (number, directory));
    assert_eq!(w.read_through(number, early.handle), "changed", "who opened it before sees what is written");
    let attr = w.find("d/a").unwrap().attr;
    assert_eq!((attr.mode & 0o7777, attr.size, attr.nlink), (0o640, 7, 1));
    let mut value = Vec::new();
    w.tree.getxattr(&ME, number, OsStr::new("user.a"), &mut |v| value.extend_from_slice(v)).unwrap();
    assert_eq!(value, b"1");
    let mut list = Vec::new();
    w.tree.listxattr(number, &mut |v| list.extend_from_slice(v)).unwrap();
    assert_eq!(list, b"user.a\0", "ours do not show");
    let after = w.find("d").unwrap().attr;
    assert_eq!((after.mtime, after.mode), (before.mtime, before.mode), "copying up changes no directory");
    assert_eq!(std::fs::read_to_string(w.upper("d/a")).unwrap(), "changed");
    let w = w.again();
    assert_eq!((w.node("d/a"), w.node("d")), (number, directory));
    assert_eq!(w.read("d/a"), "changed");
    assert_eq!(w.names("d"), ["a", "sub"]);
}

#[test]
fn attributes_change_without_the_content() {
    let w = World::new();
    let node = w.node("f");
    let change = Change { mode: Some(0o600), ..Change::default() };
    let (attr, _) = w.tree.setattr(&ME, node, None, &change).unwrap();
    assert_eq!((attr.node, attr.mode & 0o7777, attr.size), (node, 0o600, 4));
    assert_eq!((attr.mtime.secs, attr.mtime.nanos), (1_000_000, 6));
    assert_eq!(w.read("f"), "text");
    let link = w.node("l");
    let time = Change {
        mtime: Some(super::super::SetTime::At(crate::tree::Timespec { secs: 5, nanos: 0 })),
        ..Change::default()
    };
    assert_eq!(w.tree.setattr(&ME, link, None, &time).unwrap().0.mtime.secs, 5);
    let mut target = Vec::new();
    w.tree.readlink(link, &mut |t| target.extend_from_slice(t)).unwrap();
    assert_eq!(target, b"f");
    for ours in ["user.fsprov.origin", "user.overlay.opaque", "trusted.overlay.opaque", "user.containers.override_stat"]
    {
        assert_eq!(w.tree.setxattr(&ME, node, OsStr::new(ours), b"y", 0), Err(Errno::PERM), "{ours}");
        assert_eq!(w.tree.removexattr(&ME, node, OsStr::new(ours)), Err(Errno::NODATA), "{ours}");
    }
}

#[test]
fn what_is_given_away_is_made_so() {
    let w = World::new();
    let give = |node, uid| {
        let change = Change { uid: Some(uid), ..Change::default() };
        w.tree.setattr(&ME, node, None, &change).unwrap().0
    };
    let other = 1 + rustix::process::geteuid().as_raw();
    let directory = w.find("d").unwrap().attr;
    for (path, text) in [("d/a", "in d"), ("h", "linked")] {
        let (node, before) = (w.node(path), w.find(path).unwrap().attr);
        let attr = give(node, other);
        assert_eq!(
            Attr { ctime: before.ctime, blksize: before.blksize, ..attr },
            Attr { uid: other, ..before },
            "{path}"
        );
        assert_eq!((w.read(path), w.find(path).unwrap().attr), (text.into(), attr));
        assert_eq!(std::fs::read(w.upper(path)).unwrap(), vec![0; text.len()], "{path}: its content stays below");
    }
    assert_eq!(w.find("linked/h").unwrap().attr.uid, other, "it has two names");
    assert_eq!(w.find("d").unwrap().attr.mtime, directory.mtime);
    let mut value = Vec::new();
    w.tree.getxattr(&ME, w.node("d/a"), OsStr::new("user.a"), &mut |v| value.extend_from_slice(v)).unwrap();
    assert_eq!(value, b"1");
    let link = w.node("l");
    assert_eq!((give(link, other).node, w.find("l").unwrap().attr.mode & TYPE_BITS), (link, libc::S_IFLNK));
    // Its name was taken while somebody held it.
    let node = w.node("f");
    w.unlink("f").unwrap();
    let made = w.create("f", "new").unwrap();
    assert_eq!((give(node, other).nlink, w.node("f"), w.read("f")), (0, made, "new".into()));
    assert_eq!(w.tree.getattr(node, None).unwrap().0.uid, other);
    // It stays with another server.
    let w = w.again();
    assert_eq!((w.find("d/a").unwrap().attr.uid, w.read("d/a")), (other, "in d".into()));
    assert_eq!(std::fs::read_dir(w.dir.path().join("changes/work")).unwrap().count(), 0);
}

#[test]
fn content_stays_below_until_it_is_written() {
    let w = World::new();
    let chmod = |w: &World, path: &str, mode| {
        let change = Change { mode: Some(mode), ..Change::default() };
        w.tree.setattr(&ME, w.node(path), None, &change).unwrap().0
    };
    let on_disk = |w: &World, path: &str| std::fs::read_to_string(w.upper(path)).unwrap();
    let blocks = w.find("f").unwrap().attr.blocks;
    assert_eq!(chmod(&w, "f", 0o600).blocks, blocks, "it takes what the image's takes");
    chmod(&w, "h", 0o600);
    assert_eq!((on_disk(&w, "f"), on_disk(&w, "linked/h")), ("\0".repeat(4), "\0".repeat(6)));
    assert_eq!((w.read("f"), w.read("h")), ("text".into(), "linked".into()));
    w.rename("f", "d/moved", 0).unwrap();
    let early = w.tree.open(&ME, w.node("d/moved"), libc::O_RDONLY).unwrap();
    let w = w.again();
    assert_eq!((w.read("d/moved"), w.read("linked/h")), ("text".into(), "linked".into()), "another server knows");
    assert_eq!(w.find("d/moved").unwrap().attr.blocks, blocks);
    // Opened to write: whole, and with the times that it had.
    let node = w.node("d/moved");
    let opened = w.tree.open(&ME, node, libc::O_WRONLY).unwrap();
    assert_eq!(on_disk(&w, "d/moved"), "text");
    assert_eq!(w.find("d/moved").unwrap().attr.mtime.secs, 1_000_000);
    w.tree.write(&Writer::Trusted, node, opened.handle, 0, b"T", 0).unwrap();
    w.tree.release(node, opened.handle);
    assert_eq!(w.read_through(node, early.handle), "Text", "who opened it before sees what is written");
    w.write("h", "new").unwrap();
    assert_eq!((w.read("linked/h"), on_disk(&w, "h")), ("new".into(), "new".into()));
    // Setuid, which a write takes away, comes to what is whole.
    chmod(&w, "g", 0o4755);
    assert_eq!(on_disk(&w, "g"), "more");
    // What somebody copied has its content nowhere.
    chmod(&w, "d/a", 0o600);
    let copied = std::process::Command::new("cp").arg("-a").arg(w.upper("d/a")).arg(w.upper("d/b")).status().unwrap();
    assert!(copied.success());
    let w = w.again();
    assert_eq!((w.find("d/b").unwrap_err(), w.read("d/a")), (Errno::IO, "in d".into()));
}

#[test]
fn hard_links_go_up_together() {
    let w = World::new();
    let node = w.node("h");
    w.write("linked/h", "changed").unwrap();
    assert_eq!((w.read("h"), w.read("linked/h")), ("changed".into(), "changed".into()));
    assert_eq!((w.node("h"), w.find("linked/h").unwrap().attr.nlink), (node, 2));
    let w = w.again();
    assert_eq!((w.node("h"), w.node("linked/h")), (node, node));
    w.unlink("h").unwrap();
    assert_eq!(w.find("linked/h").unwrap().attr.nlink, 1);
    // One that goes before the rest is copied up.
    let w = World::new();
    w.unlink("h").unwrap();
    w.write("linked/h", "alone").unwrap();
    assert_eq!((w.read("linked/h"), w.find("linked/h").unwrap().attr.nlink), ("alone".into(), 1));
    assert_eq!(w.find("h").unwrap_err(), Errno::NOENT);
}

#[test]
fn what_is_removed_stays_away() {
    let w = World::new();
    w.unlink("f").unwrap();
    w.write("g", "changed").unwrap();
    w.unlink("g").unwrap();
    assert_eq!(w.rmdir("d"), Err(Errno::NOTEMPTY));
    w.rmdir("empty").unwrap();
    for path in ["d/sub/deep", "d/a"] {
        w.unlink(path).unwrap();
    }
    assert_eq!((w.unlink("d/sub"), w.rmdir("h")), (Err(Errno::ISDIR), Err(Errno::NOTDIR)));
    w.rmdir("d/sub").unwrap();
    w.rmdir("d").unwrap();
    for name in ["f", "g", "d", "empty"] {
        assert_eq!(w.find(name).unwrap_err(), Errno::NOENT, "{name}");
        assert!(std::fs::symlink_metadata(w.upper(name)).unwrap().rdev() == 0, "a whiteout");
        assert_eq!(w.unlink(name), Err(Errno::NOENT));
    }
    let w = w.again();
    assert_eq!(w.names(""), ["h", "l", "linked"]);
    // Made again: nothing of the image is in it.
    assert!(w.mkdir("d").unwrap() & MADE != 0);
    assert_eq!(w.names("d"), [""; 0]);
    w.create("f", "new").unwrap();
    w.create("d/a", "new").unwrap();
    assert_eq!(w.create("d/a", "new"), Err(Errno::EXIST));
    let w = w.again();
    assert_eq!((w.names("d"), w.read("f"), w.read("d/a")), (vec!["a".into()], "new".into(), "new".into()));
    w.unlink("d/a").unwrap();
    w.rmdir("d").unwrap();
    assert_eq!(w.find("d").unwrap_err(), Errno::NOENT);
    assert_eq!(std::fs::read_dir(w.dir.path().join("changes/work")).unwrap().count(), 0);
}

#[test]
fn moving_names() {
    let w = World::new();
    let (f, g) = (w.node("f"), w.node("g"));
    w.rename("f", "d/f", 0).unwrap();
    assert_eq!((w.node("d/f"), w.find("f").unwrap_err()), (f, Errno::NOENT));
    assert_eq!(w.rename("g", "d/f", libc::RENAME_NOREPLACE), Err(Errno::EXIST));
    w.rename("g", "d/f", 0).unwrap();
    assert_eq!((w.node("d/f"), w.read("d/f")), (g, "more".into()));
    // To where something was, and over what the image has.
    w.rename("d/f", "f", libc::RENAME_NOREPLACE).unwrap();
    w.rename("f", "d/a", 0).unwrap();
    assert_eq!((w.node("d/a"), w.read("d/a")), (g, "more".into()));
    w.rename("d/a", "l", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((w.read("l"), w.find("d/a").unwrap().attr.mode & TYPE_BITS), ("more".into(), libc::S_IFLNK));
    assert_eq!(w.rename("h", "linked/h", 0), Ok(()), "two links to one file");
    assert_eq!((w.read("h"), w.rename("none", "x", 0)), ("linked".into(), Err(Errno::NOENT)));
    // A directory of the image takes all along that is in it.
    let deep = w.node("d/sub/deep");
    w.rename("d", "e", 0).unwrap();
    assert_eq!(
        (w.find("d").unwrap_err(), w.node("e/sub/deep"), w.read("e/sub/deep")),
        (Errno::NOENT, deep, "deep".into())
    );
    w.mkdir("d").unwrap();
    assert_eq!(w.names("d"), [""; 0]);
    w.rename("e/sub", "sub", 0).unwrap();
    let w = w.again();
    assert_eq!((w.node("sub/deep"), w.read("sub/deep"), w.names("d")), (deep, "deep".into(), vec![]));
    w.rename("sub", "e/sub", 0).unwrap();
    w.rename("e", "d", 0).unwrap();
    let w = w.again();
    assert_eq!((w.node("d/sub/deep"), w.names("d/sub")), (deep, vec!["deep".into()]));
    w.mkdir("new").unwrap();
    w.create("new/x", "x").unwrap();
    assert_eq!(w.rename("new", "d", 0), Err(Errno::NOTEMPTY));
    assert_eq!(w.rename("new", "h", 0), Err(Errno::NOTDIR));
    assert_eq!(w.rename("h", "new", 0), Err(Errno::ISDIR));
    w.rename("new", "empty", 0).unwrap();
    w.rmdir("linked").unwrap_err();
    w.unlink("linked/h").unwrap();
    w.rename("empty", "linked", 0).unwrap();
    let w = w.again();
    assert_eq!((w.names("linked"), w.read("linked/x")), (vec!["x".into()], "x".into()));
    assert_eq!(w.names(""), ["d", "h", "l", "linked"]);
    assert_eq!(w.node("l"), g, "the number stays with the file");
    assert_eq!(std::fs::read_dir(w.dir.path().join("changes/work")).unwrap().count(), 0);
}

#[test]
fn a_file_without_a_name_is_changed_without_one() {
    let w = World::new();
    let node = w.node("f");
    w.unlink("f").unwrap();
    let opened = w.tree.open(&ME, node, libc::O_RDWR).unwrap();
    assert_eq!(w.tree.write(&Writer::Trusted, node, opened.handle, 4, b" goes on", 0), Ok(8));
    assert_eq!(w.read_through(node, opened.handle), "text goes on");
    assert_eq!(w.tree.getattr(node, None).unwrap().0.nlink, 0);
    assert_eq!((w.find("f").unwrap_err(), w.names("").contains(&"f".to_owned())), (Errno::NOENT, false));
    w.tree.release(node, opened.handle);
    w.tree.forget(node, 1);
    assert_eq!(w.below.handle_count(), 0);
}

#[test]
fn references_are_given_back() {
    let w = World::new();
    let base = w.below.node_count();
    let node = w.node("f");
    w.write("f", "x").unwrap();
    let made = w.create("n", "y").unwrap();
    assert_eq!(w.below.node_count(), base + 2);
    w.tree.forget(node, 2);
    w.tree.forget(made, 1);
    assert_eq!(w.below.node_count(), base);
    assert_eq!((w.node("f"), w.read("f")), (node, "x".into()), "found again");
}

#[test]
fn a_copy_that_the_kernel_forgot_is_listed_as_it_is() {
    let w = World::new();
    // The upper directory is there, and its names have been read.
    w.create("d/new", "new").unwrap();
    assert_eq!(w.names("d"), ["a", "new", "sub"]);
    let node = w.node("d/a");
    let change = Change { mode: Some(0o600), ..Change::default() };
    w.tree.setattr(&ME, node, None, &change).unwrap();
    w.tree.forget(node, u64::MAX);
    let dir = w.node("d");
    let opened = w.tree.opendir(&ME, dir).unwrap();
    let mut modes = Vec::new();
    let mut see = |item: &DirItem<'_>| {
        modes.extend(item.entry.filter(|_| item.name == "a").map(|entry| entry.attr.mode & 0o7777));
        Fit::Taken
    };
    w.tree.readdir(&ME, dir, opened.handle, 0, ListMode::Plus, &mut see).unwrap();
    w.tree.releasedir(dir, opened.handle);
    assert_eq!(modes, [0o600]);
    w.write("d/a", "changed").unwrap();
    assert_eq!(std::fs::read_to_string(w.upper("d/a")).unwrap(), "changed");
}

#[test]
fn a_directory_moves_while_somebody_is_in_one_that_was_removed_from_it() {
    let w = World::new();
    let sub = w.node("d/sub");
    let opened = w.tree.opendir(&ME, sub).unwrap();
    w.unlink("d/sub/deep").unwrap();
    w.rmdir("d/sub").unwrap();
    w.mkdir("d/sub").unwrap();
    w.rename("d", "e", 0).unwrap();
    assert_eq!((w.names("e"), w.names("e/sub")), (vec!["a".to_owned(), "sub".to_owned()], vec![]));
    w.tree.releasedir(sub, opened.handle);
}

#[test]
fn holes_and_long_files_are_copied() {
    use std::os::unix::fs::FileExt as _;
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let open = |name: &str| {
        let file =
            std::fs::File::options().read(true).write(true).create(true).truncate(false).open(dir.path().join(name));
        file.unwrap()
    };
    let (from, to) = (open("from"), open("to"));
    from.set_len(50 << 20).unwrap();
    for (at, text) in [(0, "start"), (10 << 20, "middle"), ((50 << 20) - 3, "end")] {
        from.write_all_at(text.as_bytes(), at).unwrap();
    }
    let (from, to) = (OwnedFd::from(from), OwnedFd::from(to));
    raise::copy_content(&from, &to, 50 << 20).unwrap();
    assert_eq!(std::fs::read(dir.path().join("from")).unwrap(), std::fs::read(dir.path().join("to")).unwrap());
    let blocks = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().blocks();
    assert!(blocks("to") <= blocks("from") + 64, "{} {}", blocks("to"), blocks("from"));
}

#[test]
fn changes_of_another_image_are_refused() {
    let w = World::new();
    std::fs::write(w.dir.path().join("changes/image"), "0000000000000000\n").unwrap();
    let place = crate::sys::fs::open_path(&w.dir.path().join("changes")).unwrap();
    let options = UpperOptions { act_as: ActAs::Server, writeback: false, durable: true };
    let lower = Arc::new(image(w.dir.path()));
    let refused = UpperTree::open(lower, (place, "changes"), options, FdPool::new().unwrap(), None).unwrap_err();
    assert!(refused.to_string().contains("another image"), "{refused}");
    let _ = std::fs::metadata(w.upper("")).unwrap().permissions().mode();
}
