//! The route table over directory trees, without a mount.

use std::collections::BTreeMap;
use std::path::Path;

use super::*;
use crate::plan::Ownership;
use crate::tree::REGULAR;
use crate::tree::dir::{ActAs, DirOptions, DirTree, FdPool};
use crate::volume::{Access, ContainerPath, Form};

const ME: Caller = Caller { uid: 0, gid: 0, pid: 0 };

struct Fixture {
    dir: tempfile::TempDir,
    pool: Arc<FdPool>,
}

impl Fixture {
    /// An image with `directories`, `files` and `links` (name, target), and volume sources beside it.
    fn new(directories: &[&str], files: &[&str], links: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("image")).unwrap();
        for d in directories {
            std::fs::create_dir_all(dir.path().join("image").join(d)).unwrap();
        }
        for f in files {
            std::fs::write(dir.path().join("image").join(f), f).unwrap();
        }
        for (name, target) in links {
            std::os::unix::fs::symlink(target, dir.path().join("image").join(name)).unwrap();
        }
        Fixture { dir, pool: FdPool::new().unwrap() }
    }

    fn tree(&self, path: &Path, options: DirOptions) -> Arc<dyn Tree> {
        let root = crate::sys::fs::open_path(path).unwrap();
        Arc::new(DirTree::open(root, options, Arc::clone(&self.pool)).unwrap())
    }

    fn image(&self) -> Arc<dyn Tree> {
        self.tree(&self.dir.path().join("image"), DirOptions::image(Ownership::default()))
    }

    /// Volumes named by target; the source of a directory holds one file named `in-SOURCE`.
    fn build(&self, volumes: &[(&str, &str)]) -> crate::Result<RouteTree> {
        let mut all = Vec::new();
        for (source, target) in volumes {
            let path = self.dir.path().join(source);
            let form = if source.contains(".file") {
                std::fs::write(&path, source).unwrap();
                Form::File
            } else {
                std::fs::create_dir_all(&path).unwrap();
                std::fs::write(path.join(format!("in-{source}")), source).unwrap();
                Form::Directory
            };
            let options = DirOptions { act_as: ActAs::Server, ..DirOptions::volume(Access::Rw) };
            let target = ContainerPath::new(OsStr::new(target)).unwrap();
            all.push((target, form, Access::Rw, self.tree(&path, options)));
        }
        RouteTree::build(self.image(), all)
    }
}

fn find(table: &RouteTree, path: &str) -> Result<Entry> {
    let mut at = Entry { attr: table.getattr(ROOT, None)?.0, generation: 0, entry_ttl: FOREVER, attr_ttl: FOREVER };
    for name in path.split('/').filter(|n| !n.is_empty()) {
        at = match table.lookup(&ME, at.attr.node, OsStr::new(name))? {
            Lookup::Found(entry) => entry,
            Lookup::Absent(_) => return Err(Errno::NOENT),
        };
    }
    Ok(at)
}

fn content(table: &RouteTree, path: &str) -> String {
    let node = find(table, path).unwrap().attr.node;
    let opened = table.open(&ME, node, libc::O_RDONLY).unwrap();
    let mut bytes = Vec::new();
    table.read(node, opened.handle, 0, 4096, &mut |b| bytes.extend_from_slice(b)).unwrap();
    table.release(node, opened.handle);
    String::from_utf8(bytes).unwrap()
}

/// Names with number and type, one entry a page: every resumption is exercised.
fn names(table: &RouteTree, path: &str, mode: ListMode) -> BTreeMap<String, (Node, u32)> {
    let node = find(table, path).unwrap().attr.node;
    let opened = table.opendir(&ME, node).unwrap();
    let mut all = BTreeMap::new();
    let mut cookie = 0;
    loop {
        let mut taken = false;
        table
            .readdir(&ME, node, opened.handle, cookie, mode, &mut |item| {
                if taken {
                    return Fit::Full;
                }
                taken = true;
                cookie = item.cookie;
                let old = all.insert(item.name.to_str().unwrap().to_owned(), (item.node, item.kind));
                assert_eq!(old, None, "{:?} twice in {path}", item.name);
                Fit::Taken
            })
            .unwrap();
        if !taken {
            break;
        }
    }
    table.releasedir(node, opened.handle);
    all
}

#[test]
fn targets_are_found_through_links_inside_the_root_only() {
    let fixture = Fixture::new(
        &["run", "var", "tmp", "a/b"],
        &["etc-file"],
        &[
            ("var/run", "/run"),
            ("var/up", "../../../../../tmp"),
            ("var/far", "../../..//./var/run/./"),
            ("a/loop", "loop"),
            ("a/two", "../var/far"),
            ("dangling", "not/there"),
        ],
    );
    for (target, place) in [
        ("/tmp", "tmp"),
        ("/var/run", "run"),
        ("/var/run/x/y", "run/x/y"),
        ("/var/up/z", "tmp/z"),
        ("/a/two/q", "run/q"),
        ("/new/one", "new/one"),
        ("/dangling", "not/there"),
    ] {
        let table = fixture.build(&[("v", target)]).unwrap_or_else(|e| panic!("{target}: {e}"));
        assert_eq!(content(&table, &format!("{place}/in-v")), "v", "{target}");
        let (parent, name) = place.rsplit_once('/').unwrap_or(("", place));
        for mode in [ListMode::Names, ListMode::Plus] {
            let shown = names(&table, parent, mode)[name];
            assert_eq!(shown, (find(&table, place).unwrap().attr.node, DIRECTORY), "{target}");
        }
    }
    for (target, want) in
        [("/a/loop/x", "symbolic links"), ("/etc-file/x", "is a file"), ("/etc-file", "the image has a file there")]
    {
        let error = fixture.build(&[("v", target)]).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains(target), "{error}");
    }
    let error = fixture.build(&[("v.file", "/tmp")]).unwrap_err().to_string();
    assert!(error.contains("the image has a directory there"), "{error}");
    let error = fixture.build(&[("v", "/run/x"), ("w", "/var/run/x")]).unwrap_err().to_string();
    assert!(error.contains("another volume"), "{error}");
}

#[test]
fn made_up_directories_show_once_and_count() {
    let fixture = Fixture::new(&["etc", "usr/lib"], &[], &[]);
    let table = fixture
        .build(&[("a", "/data/deep/a"), ("b", "/data/deep/b"), ("c.file", "/etc/hosts"), ("d", "/usr/lib")])
        .unwrap();
    assert_eq!(names(&table, "", ListMode::Names).keys().collect::<Vec<_>>(), [".", "..", "data", "etc", "usr"]);
    assert_eq!(names(&table, "data/deep", ListMode::Plus).keys().collect::<Vec<_>>(), [".", "..", "a", "b"]);
    assert_eq!(names(&table, "etc", ListMode::Names)["hosts"].1, 0o100_000);
    assert_eq!(content(&table, "etc/hosts"), "c.file");
    let data = find(&table, "data").unwrap().attr;
    assert_eq!((data.mode, data.nlink), (0o040_755, 3));
    assert_eq!(find(&table, "data/deep").unwrap().attr.nlink, 4);
    let without = Fixture::new(&["etc", "usr/lib"], &[], &[]);
    let plain = without.build(&[]).unwrap();
    let root = |t: &RouteTree| t.getattr(ROOT, None).unwrap().0.nlink;
    assert_eq!(root(&table), root(&plain) + 1);
    assert_eq!(find(&table, "usr").unwrap().attr.nlink, find(&plain, "usr").unwrap().attr.nlink);
    let up = names(&table, "data/deep", ListMode::Names);
    assert_eq!((up["."].0, up[".."].0), (find(&table, "data/deep").unwrap().attr.node, data.node));
    assert_eq!(find(&table, "data/none").map(|_| ()), Err(Errno::NOENT));
    assert_eq!(table.mkdir(&ME, data.node, OsStr::new("x"), New { mode: 0o755, umask: 0, rdev: 0 }), Err(Errno::ROFS));
    assert!(table.is_live() && table.is_writable());
    assert!(!plain.is_live() && !plain.is_writable());
}

#[test]
fn nothing_crosses_from_one_tree_to_another() {
    let fixture = Fixture::new(&["a", "b"], &["f"], &[]);
    let table = fixture.build(&[("v", "/a"), ("w", "/b")]).unwrap();
    let node = |path: &str| find(&table, path).unwrap().attr.node;
    let name = OsStr::new;
    let rename = |from: (&str, &str), to: (&str, &str)| {
        table.rename(&ME, (node(from.0), name(from.1)), (node(to.0), name(to.1)), 0)
    };
    assert_eq!(rename(("a", "in-v"), ("b", "x")), Err(Errno::XDEV));
    assert_eq!(rename(("a", "in-v"), ("", "x")), Err(Errno::XDEV));
    assert_eq!(table.link(&ME, node("a/in-v"), node("b"), name("x")), Err(Errno::XDEV));
    assert_eq!(rename(("", "f"), ("", "g")), Err(Errno::ROFS));
    assert_eq!(rename(("", "a"), ("", "c")), Err(Errno::ROFS));
    assert_eq!(rename(("", "f"), ("", "a")), Err(Errno::ROFS));
    assert_eq!(table.rmdir(&ME, ROOT, name("a")), Err(Errno::ROFS));
    assert_eq!(table.unlink(&ME, ROOT, name("f")), Err(Errno::ROFS));
    assert_eq!(table.unlink(&ME, node("a"), name("in-v")), Ok(()));
    assert_eq!(table.mkdir(&ME, ROOT, name("a"), New { mode: 0o755, umask: 0, rdev: 0 }), Err(Errno::EXIST));
    let (a, b) = (node("a") >> TREE_SHIFT, node("b") >> TREE_SHIFT);
    assert_eq!((a, b, node("f") >> TREE_SHIFT), (1, 2, 0));
}

#[test]
fn a_volume_inside_a_volume_moves_with_its_directory_and_holds_it() {
    let fixture = Fixture::new(&["data"], &[], &[]);
    std::fs::create_dir_all(fixture.dir.path().join("outer/sub")).unwrap();
    let table = fixture.build(&[("outer", "/data"), ("inner", "/data/sub/here")]).unwrap();
    assert_eq!(content(&table, "data/sub/here/in-inner"), "inner");
    assert_eq!(names(&table, "data/sub", ListMode::Names).keys().collect::<Vec<_>>(), [".", "..", "here"]);
    let data = find(&table, "data").unwrap().attr.node;
    assert_eq!(table.rmdir(&ME, data, OsStr::new("sub")), Err(Errno::NOTEMPTY));
    table.rename(&ME, (data, OsStr::new("sub")), (data, OsStr::new("moved")), 0).unwrap();
    assert_eq!(content(&table, "data/moved/here/in-inner"), "inner");
    // A directory of that name made on the host afterwards is hidden, and shows once.
    std::fs::create_dir(fixture.dir.path().join("outer/moved/here")).unwrap();
    assert_eq!(names(&table, "data/moved", ListMode::Plus).keys().collect::<Vec<_>>(), [".", "..", "here"]);
    let fresh = New { mode: 0o755, umask: 0, rdev: 0 };
    table.mkdir(&ME, data, OsStr::new("plain"), fresh).unwrap();
    table.rmdir(&ME, data, OsStr::new("plain")).unwrap();
}

#[test]
fn forgetting_everything_leaves_the_routes_in_place() {
    let fixture = Fixture::new(&["var/lib/app"], &[], &[("lib", "var/lib")]);
    let table = fixture.build(&[("v", "/lib/app/data")]).unwrap();
    for _ in 0..3 {
        let mut nodes = vec![ROOT];
        for path in ["lib", "var", "var/lib", "var/lib/app", "var/lib/app/data", "var/lib/app/data/in-v"] {
            nodes.push(find(&table, path).unwrap().attr.node);
        }
        for node in nodes {
            table.forget(node, u64::MAX);
        }
        assert_eq!(content(&table, "var/lib/app/data/in-v"), "v");
    }
}

#[test]
fn the_mode_of_a_target_is_told() {
    use std::os::unix::fs::PermissionsExt as _;
    let fixture = Fixture::new(&["tmp", "var"], &[], &[("var/tmp", "/tmp")]);
    std::fs::set_permissions(fixture.dir.path().join("image/tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    let mode = |target: &str| {
        let target = ContainerPath::new(OsStr::new(target)).unwrap();
        target_attr(&fixture.image(), &target).unwrap().map(|a| a.mode)
    };
    assert_eq!(mode("/tmp"), Some(0o041_777));
    assert_eq!(mode("/var/tmp"), Some(0o041_777));
    assert_eq!(mode("/var/none/at/all"), None);
}

#[test]
fn mount_points_of_engines_are_made_up_where_the_image_has_nothing() {
    let links = [
        ("etc/resolv.conf", "../run/resolve/stub"),
        ("etc/mtab", "../proc/self/mounts"),
        ("var/tmp", "/tmp"),
        ("etc/hostname", "hostname"),
    ];
    let fixture = Fixture::new(&["etc", "dev", "var", "run"], &["sys", "etc/hosts"], &links);
    let table = fixture.build(&[("v", "/run/secrets")]).unwrap().with_stubs();
    let look = |path: &str| find(&table, path).map(|entry| entry.attr.mode);
    for (path, mode) in [
        ("run/.containerenv", 0o100_644),
        ("run/resolve", 0o040_755),
        ("run/resolve/stub", 0o100_644),
        ("proc", 0o040_755),
        ("tmp", 0o041_777),
        // The image's own stay as they are, whatever they are.
        ("etc/resolv.conf", 0o120_777),
        ("etc/mtab", 0o120_777),
        ("etc/hostname", 0o120_777),
        ("var/tmp", 0o120_777),
    ] {
        assert_eq!(look(path), Ok(mode), "{path}");
    }
    assert_eq!(look("sys").unwrap() & TYPE_BITS, REGULAR);
    assert_eq!(look("proc/self"), Err(Errno::NOENT));
    assert_eq!(
        (content(&table, "etc/hosts"), content(&table, "run/.containerenv")),
        ("etc/hosts".into(), String::new())
    );
    assert_eq!(names(&table, "run/secrets", ListMode::Plus).len(), 3);
    for mode in [ListMode::Names, ListMode::Plus] {
        assert_eq!(
            names(&table, "etc", mode).keys().collect::<Vec<_>>(),
            [".", "..", "hostname", "hosts", "mtab", "resolv.conf"]
        );
        let run = names(&table, "run", mode);
        assert_eq!(run.keys().collect::<Vec<_>>(), [".", "..", ".containerenv", "resolve", "secrets"]);
        assert_eq!(run[".containerenv"], (find(&table, "run/.containerenv").unwrap().attr.node, REGULAR));
    }
    // Directories count, files do not.
    let plain = fixture.build(&[]).unwrap();
    let count = |t: &RouteTree, path: &str| find(t, path).unwrap().attr.nlink;
    assert_eq!(count(&table, ""), count(&plain, "") + 2);
    assert_eq!((count(&table, "run"), count(&table, "etc")), (count(&plain, "run") + 2, count(&plain, "etc")));
    assert_eq!((count(&table, "run/resolve"), count(&table, "run/.containerenv")), (2, 1));
    let node = find(&table, "run/.containerenv").unwrap().attr.node;
    assert_eq!(table.open(&ME, node, libc::O_RDWR).err(), Some(Errno::ROFS));
    assert_eq!(table.access(node, libc::X_OK), Err(Errno::ACCESS));
    assert_eq!(table.readlink(node, &mut |_| ()), Err(Errno::INVAL));
    assert_eq!(
        table.unlink(&ME, find(&table, "run").unwrap().attr.node, OsStr::new(".containerenv")),
        Err(Errno::ROFS)
    );
    // What lies in a volume is its own.
    let table = fixture.build(&[("w", "/run")]).unwrap().with_stubs();
    assert_eq!(names(&table, "run", ListMode::Names).len(), 3);
    // A link, as podman makes it; its target is nobody's business here.
    let bare = Fixture::new(&[], &[], &[]);
    let table = bare.build(&[]).unwrap().with_stubs();
    let mtab = find(&table, "etc/mtab").unwrap().attr;
    let mut target = Vec::new();
    table.readlink(mtab.node, &mut |bytes| target.extend_from_slice(bytes)).unwrap();
    assert_eq!((mtab.size, &target[..]), (12, &b"/proc/mounts"[..]));
    assert_eq!(find(&table, "").unwrap().attr.nlink, count(&bare.build(&[]).unwrap(), "") + 7);
}
