use std::os::fd::OwnedFd;

use super::*;
use crate::index::{Builder, Entry as Row, Time, What, Whiteouts, Xattr};
use crate::plan::IdRange;
use crate::tree::Writer;

const ASKER: Caller = Caller { uid: 0, gid: 0, pid: 0 };

struct Fixture {
    dir: tempfile::TempDir,
}

fn row(path: &str, what: What) -> Row {
    let (path, mtime) = (path.as_bytes().to_vec(), Time { secs: 5, nanos: 6 });
    Row { path, what, mode: 0o755, uid: 0, gid: 33, mtime, xattrs: Vec::new() }
}

fn file(size: u64) -> What {
    What::File { size, content: None, sha256: None }
}

impl Fixture {
    /// Two layers with a file each, one of them large enough to be mapped.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for layer in ["0", "1"] {
            std::fs::create_dir_all(dir.path().join(layer).join("d")).unwrap();
        }
        std::fs::write(dir.path().join("0/d/small"), b"hello").unwrap();
        std::fs::write(dir.path().join("1/d/large"), Self::large()).unwrap();
        Fixture { dir }
    }

    fn large() -> Vec<u8> {
        (0..5_000_000_u32).map(|i| (i / 7 % 251) as u8).collect()
    }

    fn rows(builder: &mut Builder) {
        builder.begin_layer(Whiteouts::Oci).unwrap();
        let mut small = row("d/small", file(5));
        small.xattrs = [("user.a", "1"), ("trusted.x", "2"), ("security.capability", "3")]
            .map(|(name, value)| Xattr { name: name.into(), value: value.into() })
            .to_vec();
        builder.add(small).unwrap();
        builder.add(row("d/again", What::HardLink(b"d/small".to_vec()))).unwrap();
        builder.add(row("link", What::Symlink(b"d/small".to_vec()))).unwrap();
        builder.add(row("null", What::Char(0x103))).unwrap();
        builder.begin_layer(Whiteouts::Oci).unwrap();
        builder.add(row("d/large", file(5_000_000))).unwrap();
    }

    fn tree_with(&self, ownership: Ownership, trust: Trust, more: &[Row]) -> ImageTree {
        let mut builder = Builder::new();
        Self::rows(&mut builder);
        for row in more {
            builder.add(row.clone()).unwrap();
        }
        let index = Index::from_bytes(builder.finish().unwrap()).unwrap();
        let layers = ["0", "1"].map(|l| OwnedFd::from(std::fs::File::open(self.dir.path().join(l)).unwrap()));
        ImageTree::open(index, layers.into(), ownership, trust).unwrap()
    }

    fn tree(&self) -> ImageTree {
        self.tree_with(Ownership::default(), Trust::Size, &[])
    }
}

fn look(tree: &ImageTree, path: &str) -> Attr {
    let mut node = ROOT;
    let mut attr = tree.getattr(ROOT, None).unwrap().0;
    for name in path.split('/').filter(|n| !n.is_empty()) {
        match tree.lookup(&ASKER, node, OsStr::new(name)).unwrap() {
            Lookup::Found(entry) => {
                assert_eq!((entry.entry_ttl, entry.attr_ttl), (FOREVER, FOREVER));
                attr = entry.attr;
            }
            Lookup::Absent(_) => panic!("{path} is not there"),
        }
        node = attr.node;
    }
    attr
}

fn read(tree: &ImageTree, node: Node, offset: u64, size: u32) -> Result<Vec<u8>> {
    let mut calls = Vec::new();
    tree.read(node, 0, offset, size, &mut |bytes| calls.push(bytes.to_vec()))?;
    assert_eq!(calls.len(), 1);
    Ok(calls.remove(0))
}

fn list(tree: &ImageTree, node: Node, cookie: u64, page: usize) -> Vec<(String, Node, u32, u64, bool)> {
    let mut items = Vec::new();
    tree.readdir(&ASKER, node, 0, cookie, ListMode::Plus, &mut |item| {
        if items.len() == page {
            return Fit::Full;
        }
        if let Some(entry) = item.entry {
            assert_eq!((entry.attr.node, entry.attr.mode & 0o170_000), (item.node, item.kind));
        }
        let name = item.name.to_str().unwrap().to_owned();
        items.push((name, item.node, item.kind, item.cookie, item.entry.is_some()));
        Fit::Taken
    })
    .unwrap();
    items
}

#[test]
fn metadata_is_the_images() {
    let fixture = Fixture::new();
    let tree = fixture.tree();
    let small = look(&tree, "d/small");
    let time = Timespec { secs: 5, nanos: 6 };
    assert_eq!(
        (small.mode, small.nlink, small.uid, small.gid, small.size, small.blocks, small.mtime, small.ctime),
        (0o100_755, 2, 0, 33, 5, 1, time, time)
    );
    assert_eq!(look(&tree, "d/again"), small);
    assert_eq!(look(&tree, "null").rdev, 0x103);
    assert_eq!(tree.lookup(&ASKER, ROOT, OsStr::new("none")), Ok(Lookup::Absent(FOREVER)));
    assert_eq!(tree.lookup(&ASKER, small.node, OsStr::new("x")), Err(Errno::NOTDIR));
    assert_eq!(tree.lookup(&ASKER, ROOT, OsStr::new(&"x".repeat(256))), Err(Errno::NAMETOOLONG));
    for stale in [0, 1000, u64::MAX] {
        assert_eq!(tree.getattr(stale, None).err(), Some(Errno::STALE));
    }
    let mut target = Vec::new();
    tree.readlink(look(&tree, "link").node, &mut |t| target = t.to_vec()).unwrap();
    assert_eq!(target, b"d/small");
    assert_eq!(tree.readlink(small.node, &mut |_| ()), Err(Errno::INVAL));
    assert_eq!(tree.statfs(ROOT).unwrap().files, 6);
    assert!(!tree.is_live() && !tree.is_without_xattrs());
}

#[test]
fn a_directory_is_listed_in_pages_without_loss() {
    let fixture = Fixture::new();
    let tree = fixture.tree();
    let d = look(&tree, "d").node;
    let whole = list(&tree, d, 0, 99);
    let names: Vec<&str> = whole.iter().map(|i| i.0.as_str()).collect();
    assert_eq!(names, [".", "..", "again", "large", "small"]);
    assert_eq!((whole[0].1, whole[1].1), (d, ROOT));
    assert!(!whole[0].4 && !whole[1].4 && whole[2].4);
    let mut paged = Vec::new();
    while let Some(item) = list(&tree, d, paged.last().map_or(0, |i: &(_, _, _, u64, _)| i.3), 1).pop() {
        paged.push(item);
    }
    assert_eq!(paged, whole);
    assert!(list(&tree, d, u64::MAX, 9).is_empty());
}

#[test]
fn content_comes_from_its_layer() {
    let fixture = Fixture::new();
    let tree = fixture.tree();
    let (small, large) = (look(&tree, "d/small").node, look(&tree, "d/large").node);
    let want = Fixture::large();
    assert_eq!(read(&tree, small, 0, 4096).unwrap(), b"hello");
    assert_eq!(read(&tree, small, 3, 1).unwrap(), b"l");
    assert_eq!(read(&tree, small, 5, 9).unwrap(), b"");
    // Within a window, across two, at the end.
    for (offset, size) in [(0, 131_072), ((2 << 20) - 100, 4096), (4_999_000, 131_072), (4 << 20, 4096), (u64::MAX, 1)]
    {
        let from = usize::try_from(offset).unwrap().min(want.len());
        let to = from.saturating_add(size as usize).min(want.len());
        assert_eq!(read(&tree, large, offset, size).unwrap(), &want[from..to], "{offset}");
    }
    assert_eq!(read(&tree, look(&tree, "d").node, 0, 1), Err(Errno::ISDIR));
    assert_eq!(tree.open_files(), 2);
}

#[test]
fn content_that_is_not_the_images_is_refused() {
    let fixture = Fixture::new();
    let sum: [u8; 32] = {
        use sha2::Digest as _;
        sha2::Sha256::digest(b"hello").into()
    };
    let other = |name: &str, size| Row {
        what: What::File { size, content: Some(name.into()), sha256: Some(sum) },
        ..row(&format!("x-{}", name.replace('/', "-")), What::Fifo)
    };
    let at = |name: &str| fixture.dir.path().join("1").join(name);
    std::fs::write(at("good"), b"hello").unwrap();
    std::fs::write(at("other"), b"jello").unwrap();
    std::fs::write(at("longer"), b"hello!").unwrap();
    std::os::unix::fs::symlink("good", at("link")).unwrap();
    std::os::unix::fs::symlink("../0/d", at("way")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let names = ["good", "other", "longer", "link", "way/small", "pipe", "gone"];
    let rows: Vec<Row> = names.iter().map(|n| other(n, 5)).collect();
    let tries = |trust| {
        let tree = fixture.tree_with(Ownership::default(), trust, &rows);
        names.map(|n| read(&tree, look(&tree, &format!("x-{}", n.replace('/', "-"))).node, 0, 9).err())
    };
    let io = Some(Errno::IO);
    assert_eq!(tries(Trust::Size), [None, None, io, io, io, io, io]);
    assert_eq!(tries(Trust::Digest), [None, io, io, io, io, io, io]);
}

#[test]
fn few_files_stay_open() {
    let fixture = Fixture::new();
    let rows: Vec<Row> = (0..300).map(|i| row(&format!("many/{i}"), file(1))).collect();
    std::fs::create_dir(fixture.dir.path().join("1/many")).unwrap();
    for i in 0..300 {
        std::fs::write(fixture.dir.path().join(format!("1/many/{i}")), b"x").unwrap();
    }
    let tree = fixture.tree_with(Ownership::default(), Trust::Size, &rows);
    for i in 0..300 {
        assert_eq!(read(&tree, look(&tree, &format!("many/{i}")).node, 0, 9).unwrap(), b"x");
    }
    assert_eq!(tree.open_files(), 128);
}

#[test]
fn nothing_is_written() {
    let fixture = Fixture::new();
    let tree = fixture.tree();
    let small = look(&tree, "d/small").node;
    assert_eq!(tree.open(&ASKER, small, libc::O_RDWR).err(), Some(Errno::ROFS));
    assert_eq!(tree.open(&ASKER, small, libc::O_TRUNC).err(), Some(Errno::ROFS));
    assert_eq!(tree.open(&ASKER, small, 0), Ok(Opened { handle: 0, cache: Caching::Keep, closes_silently: true }));
    assert_eq!(tree.open(&ASKER, look(&tree, "null").node, 0).err(), Some(Errno::INVAL));
    assert_eq!(tree.unlink(&ASKER, ROOT, OsStr::new("link")), Err(Errno::ROFS));
    assert_eq!(tree.write(&Writer::Trusted, small, 0, 0, b"x", 0), Err(Errno::ROFS));
}

#[test]
fn xattrs_are_the_images_but_trusted_ones() {
    let fixture = Fixture::new();
    let tree = fixture.tree();
    let get = |path: &str, name: &str| {
        let mut value = Vec::new();
        tree.getxattr(&ASKER, look(&tree, path).node, OsStr::new(name), &mut |v| value = v.to_vec()).map(|()| value)
    };
    let mut names = Vec::new();
    tree.listxattr(look(&tree, "d/again").node, &mut |l| names = l.to_vec()).unwrap();
    assert_eq!(names, b"security.capability\0user.a\0");
    assert_eq!(get("d/small", "user.a"), Ok(b"1".to_vec()));
    assert_eq!(get("d/small", "trusted.x"), Err(Errno::NODATA));
    assert_eq!(get("link", "user.a"), Err(Errno::NODATA));
}

#[test]
fn owners_are_mapped_or_squashed() {
    let fixture = Fixture::new();
    let range = |inside, outside| vec![IdRange { inside, outside, count: 10 }];
    let mapped = Ownership { uids: range(0, 100_000), gids: range(0, 5), squash: None };
    let attr = look(&fixture.tree_with(mapped, Trust::Size, &[]), "d/small");
    assert_eq!((attr.uid, attr.gid), (100_000, crate::plan::OVERFLOW_ID));
    let squashed = Ownership { squash: Some((7, 8)), ..Ownership::default() };
    let attr = look(&fixture.tree_with(squashed, Trust::Size, &[]), "d/small");
    assert_eq!((attr.uid, attr.gid), (7, 8));
}

#[test]
fn the_layers_must_be_those_of_the_index() {
    let fixture = Fixture::new();
    let mut builder = Builder::new();
    Fixture::rows(&mut builder);
    let index = Index::from_bytes(builder.finish().unwrap()).unwrap();
    let one = vec![OwnedFd::from(std::fs::File::open(fixture.dir.path()).unwrap())];
    let error = ImageTree::open(index, one, Ownership::default(), Trust::Size).unwrap_err();
    assert_eq!(error.kind(), crate::Kind::Invalid);
}

#[test]
fn device_nodes_may_be_left_out() {
    let fixture = Fixture::new();
    let more = [row("d/a", What::Block(0x800)), row("d/pipe", What::Fifo)];
    let names = |tree: &ImageTree, dir| list(tree, dir, 0, 99).into_iter().map(|item| item.0).collect::<Vec<_>>();
    let tree = fixture.tree_with(Ownership::default(), Trust::Size, &more);
    let d = look(&tree, "d").node;
    let all = names(&tree, d);
    assert!(all.contains(&"a".to_owned()));
    let tree = tree.devices(Devices::LeftOut);
    assert_eq!(tree.lookup(&ASKER, ROOT, OsStr::new("null")), Ok(Lookup::Absent(FOREVER)));
    assert_eq!(tree.lookup(&ASKER, d, OsStr::new("a")), Ok(Lookup::Absent(FOREVER)));
    assert_eq!(look(&tree, "d/pipe").mode & libc::S_IFMT, libc::S_IFIFO);
    assert_eq!(names(&tree, ROOT), [".", "..", "d", "link"]);
    let without: Vec<_> = all.into_iter().filter(|name| name != "a").collect();
    assert_eq!(names(&tree, d), without);
    assert_eq!(tree.names_in(d).unwrap().len(), without.len() - 2);
    // In pages of one, at every position.
    let (mut cookie, mut paged) = (0, Vec::new());
    while let Some(item) = list(&tree, d, cookie, 1).pop() {
        cookie = item.3;
        paged.push(item.0);
    }
    assert_eq!(paged, without);
    assert_eq!(look(&tree, "d").nlink, 2);
}
