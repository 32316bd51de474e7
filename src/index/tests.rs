use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::format::{BLOCK, S_IFDIR, S_IFMT};
use super::read::InodeKind;
use super::*;
use crate::error::Kind;

pub(super) fn entry(path: &str, what: What) -> Entry {
    Entry {
        path: path.as_bytes().to_vec(),
        what,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Time { secs: 7, nanos: 9 },
        xattrs: Vec::new(),
    }
}

fn file(size: u64) -> What {
    What::File { size, content: None, sha256: None }
}

/// Every path of an index, with its inode.
fn walk(index: &Index) -> BTreeMap<String, read::Inode> {
    let mut found = BTreeMap::new();
    let mut stack = vec![(String::new(), 0)];
    while let Some((path, row)) = stack.pop() {
        let inode = index.inode(row).unwrap();
        if let InodeKind::Directory { first, count } = inode.kind {
            for at in first..first + count {
                let name = index.name(at).unwrap();
                let text = std::str::from_utf8(name.name).unwrap();
                let child = if path.is_empty() { text.to_owned() } else { format!("{path}/{text}") };
                assert_eq!(index.lookup(&inode, name.name).unwrap(), Some(name));
                stack.push((child, name.row));
            }
        }
        found.insert(path, inode);
    }
    found
}

fn names(index: &Index) -> Vec<String> {
    walk(index).into_keys().collect()
}

fn finish(builder: Builder) -> Index {
    let index = Index::from_bytes(builder.finish().unwrap()).unwrap();
    index.verify().unwrap();
    index
}

#[test]
fn everything_of_an_entry_comes_back() {
    let mut builder = Builder::new();
    builder.begin_layer(Whiteouts::Plain).unwrap();
    let xattr = |name: &str, value: &[u8]| Xattr { name: name.into(), value: value.to_vec() };
    let sum = [7; 32];
    builder
        .add(Entry {
            path: b"bin/su".to_vec(),
            what: What::File { size: 70_000, content: Some(b"c/1".to_vec()), sha256: Some(sum) },
            mode: 0o4755,
            uid: 100_000,
            gid: 42,
            mtime: Time { secs: -1, nanos: 999_999_999 },
            xattrs: vec![xattr("user.z", b""), xattr("security.capability", &[1, 0, 2])],
        })
        .unwrap();
    builder.add(entry("dev/null", What::Char(0x103))).unwrap();
    builder.add(entry("dev/sda", What::Block(0x800))).unwrap();
    builder.add(entry("run/f", What::Fifo)).unwrap();
    builder.add(entry("run/s", What::Socket)).unwrap();
    builder.add(entry("sbin", What::Symlink(b"bin".to_vec()))).unwrap();
    builder.add(entry("bin/su2", What::HardLink(b"bin/su".to_vec()))).unwrap();
    let index = finish(builder);

    let su = index.find(b"bin/su").unwrap().unwrap();
    assert_eq!(
        (su.mode, su.uid, su.gid, su.size, su.nlink, su.mtime, su.rdev),
        (0o104_755, 100_000, 42, 70_000, 2, Time { secs: -1, nanos: 999_999_999 }, 0)
    );
    assert_eq!(index.sha256(&su).unwrap(), Some(sum));
    assert_eq!(index.xattr_list(&su).unwrap(), b"security.capability\0user.z\0");
    assert_eq!(index.xattr(&su, b"security.capability").unwrap(), Some(&[1, 0, 2][..]));
    assert_eq!(index.xattr(&su, b"user.z").unwrap(), Some(&[][..]));
    assert_eq!(index.xattr(&su, b"user.y").unwrap(), None);
    let mut path = Vec::new();
    index.content_path(&su, &mut path).unwrap();
    assert_eq!(path, b"c/1");
    assert_eq!(index.find(b"bin/su2").unwrap().unwrap().row, su.row);
    let target = |p: &[u8]| index.target(&index.find(p).unwrap().unwrap()).unwrap();
    assert_eq!((target(b"sbin"), target(b"bin/su")), (Some(&b"bin"[..]), None));
    let device = |p: &[u8]| index.find(p).unwrap().map(|i| (i.mode, i.rdev));
    assert_eq!(device(b"dev/null"), Some((0o020_644, 0x103)));
    assert_eq!(device(b"dev/sda"), Some((0o060_644, 0x800)));
    assert_eq!(device(b"run/f"), Some((0o010_644, 0)));
    assert_eq!(device(b"run/s"), Some((0o140_644, 0)));
    let bin = index.find(b"bin").unwrap().unwrap();
    assert_eq!((bin.mode, bin.nlink, bin.mtime), (0o040_755, 2, Time::default()), "made, as tar makes parents");
    assert_eq!(index.inode(0).unwrap().nlink, 2 + 3);
    assert_eq!((index.inode_count(), index.name_count(), index.content_bytes()), (10, 10, 70_000));
    assert!(index.has_xattrs());
}

#[test]
fn entries_that_are_refused() {
    let refused = |entries: Vec<Entry>| {
        let mut builder = Builder::new();
        builder.begin_layer(Whiteouts::Oci).unwrap();
        let (last, first) = entries.split_last().unwrap();
        for entry in first {
            builder.add(entry.clone()).unwrap();
        }
        builder.add(last.clone()).unwrap_err().kind()
    };
    let long = "x".repeat(256);
    let deep = "d/".repeat(2047) + "ddd";
    for path in ["/a", "a/", "a//b", ".", "a/../b", "..", "a\0b", &long] {
        assert_eq!(refused(vec![entry(path, file(0))]), Kind::Invalid, "{path:?}");
    }
    assert_eq!(refused(vec![entry(&deep, file(0))]), Kind::Limit);
    assert_eq!(refused(vec![entry("", file(0))]), Kind::Invalid);
    assert_eq!(refused(vec![entry("l", What::Symlink(vec![]))]), Kind::Invalid);
    assert_eq!(refused(vec![entry("l", What::Symlink(vec![b'x'; 4096]))]), Kind::Limit);
    assert_eq!(refused(vec![entry("a", What::HardLink(b"b".to_vec()))]), Kind::Invalid);
    assert_eq!(refused(vec![entry("b", What::Directory), entry("a", What::HardLink(b"b".to_vec()))]), Kind::Invalid);
    assert_eq!(refused(vec![entry("a", file(1)), entry("a/b", file(1))]), Kind::Invalid);
    assert_eq!(refused(vec![entry("a/.wh.", file(0))]), Kind::Invalid);
    assert_eq!(refused(vec![entry("a/.wh...", file(0))]), Kind::Invalid);
    assert_eq!(refused(vec![entry("a", file(u64::MAX))]), Kind::Invalid);
    let mut twice = entry("a", file(0));
    twice.xattrs = vec![Xattr { name: b"user.a".to_vec(), value: vec![] }; 2];
    assert_eq!(refused(vec![twice]), Kind::Invalid);
    assert_eq!(Builder::new().add(entry("a", file(0))).unwrap_err().kind(), Kind::Usage);
}

#[test]
fn whiteouts_hide_what_is_below_and_only_that() {
    // Layers bottom first, then the paths that are left.
    let cases: &[(&[&[&str]], &[&str])] = &[
        (&[&["a/x", "a/y", "b"], &["a/.wh.x"]], &["a", "a/y", "b"]),
        (&[&["a/x"], &[".wh.a"]], &[]),
        (&[&["a/x"], &[".wh.a", "a/z"]], &["a", "a/z"]),
        (&[&["a/x"], &["a/z", ".wh.a"]], &["a", "a/z"]),
        (&[&["a/x", "a/d/y"], &["a/n", "a/.wh..wh..opq", "a/d/m"]], &["a", "a/d", "a/d/m", "a/n"]),
        (&[&["a"], &[".wh.a", "a"]], &["a"]),
        (&[&["a"], &["a/b"]], &["a", "a/b"]),
        (&[&["a/b"], &["a"]], &["a"]),
        (&[&["a"], &[".wh.a"], &["a"]], &["a"]),
        (&[&["a"], &[".wh.nothing", "d/.wh.deeper"]], &["a", "d"]),
        (&[&["a"], &[".wh..wh.plnk", ".wh..wh.aufs"]], &["a"]),
        (&[&["a", "b"], &[".wh..wh..opq"]], &[]),
        (&[&["a"], &["=l:a", ".wh.a"]], &["l"]),
    ];
    for (layers, want) in cases {
        let mut builder = Builder::new();
        for layer in *layers {
            builder.begin_layer(Whiteouts::Oci).unwrap();
            for path in *layer {
                match path.strip_prefix('=').and_then(|p| p.split_once(':')) {
                    Some((link, to)) => builder.add(entry(link, What::HardLink(to.into()))).unwrap(),
                    None => builder.add(entry(path, file(1))).unwrap(),
                }
            }
        }
        let mut found = names(&finish(builder));
        found.remove(0);
        assert_eq!(found, *want, "{layers:?}");
    }
}

#[test]
fn content_lies_where_the_layer_has_it() {
    let place = |index: &Index, path: &str| {
        let inode = index.find(path.as_bytes()).unwrap().unwrap();
        let mut out = Vec::new();
        index.content_path(&inode, &mut out).unwrap();
        (inode.layer, String::from_utf8(out).unwrap())
    };
    let mut b = Builder::new();
    b.begin_layer(Whiteouts::Plain).unwrap();
    b.add(entry("a", file(1))).unwrap();
    b.add(entry("b", What::HardLink(b"a".to_vec()))).unwrap();
    b.add(entry("a", file(2))).unwrap();
    b.add(entry("d/e", file(3))).unwrap();
    b.begin_layer(Whiteouts::Oci).unwrap();
    b.add(entry("c", What::HardLink(b"d/e".to_vec()))).unwrap();
    b.add(entry(".wh.d", file(0))).unwrap();
    b.add(entry("a", file(4))).unwrap();
    let index = finish(b);
    assert_eq!(names(&index), ["", "a", "b", "c"]);
    assert_eq!(place(&index, "a"), (1, "a".into()));
    assert_eq!(place(&index, "b"), (0, "b".into()), "the name a leads to the second file on the disk");
    assert_eq!(place(&index, "c"), (0, "d/e".into()), "hidden by name, still there on the disk");
    assert_eq!(index.find(b"b").unwrap().unwrap().nlink, 1);
}

#[test]
fn a_whitelist_keeps_what_it_lists_and_the_way_there() {
    let build = |list: &[&str]| {
        let mut b = Builder::new();
        b.begin_layer(Whiteouts::Plain).unwrap();
        for path in ["a/x", "a/y", "a/d/z", "b"] {
            b.add(entry(path, file(1))).unwrap();
        }
        b.add(entry("h", What::HardLink(b"b".to_vec()))).unwrap();
        b.keep_only(list.iter().map(|p| p.as_bytes())).map(|()| names(&finish(b)))
    };
    assert_eq!(build(&[]).unwrap().len(), 8);
    assert_eq!(build(&["/a/x", "/none"]).unwrap(), ["", "a", "a/x"]);
    assert_eq!(build(&["/a/d", "h"]).unwrap(), ["", "a", "a/d", "h"]);
    assert_eq!(build(&["/none"]).unwrap(), [""]);
    assert_eq!(build(&["/a/../b"]).unwrap_err().kind(), Kind::Invalid);
}

#[test]
fn a_hundred_layers_merge() {
    let mut b = Builder::new();
    for layer in 0..100_u32 {
        b.begin_layer(Whiteouts::Oci).unwrap();
        b.add(entry(&format!("own/{layer}"), file(layer.into()))).unwrap();
        b.add(entry("shared", file(layer.into()))).unwrap();
        if layer > 0 && layer % 2 == 0 {
            b.add(entry(&format!("own/.wh.{}", layer - 1), file(0))).unwrap();
        }
    }
    let index = finish(b);
    assert_eq!(index.layer_count(), 100);
    assert_eq!(index.find(b"shared").unwrap().unwrap().layer, 99);
    assert_eq!(index.inode_count(), 3 + 51, "the odd layers' files but the last are hidden");
    assert_eq!(index.find(b"own/98").unwrap().map(|i| (i.layer, i.size)), Some((98, 98)));
    assert!(index.find(b"own/97").unwrap().is_none());
    let mut b = Builder::new();
    for _ in 0..MAX_LAYERS {
        b.begin_layer(Whiteouts::Plain).unwrap();
    }
    assert_eq!(b.begin_layer(Whiteouts::Plain).unwrap_err().kind(), Kind::Limit);
}

#[test]
fn the_deepest_tree_works_in_a_small_stack() {
    let deep = "d/".repeat(MAX_DEPTH - 1) + "d";
    let run = move || {
        let mut b = Builder::new();
        b.begin_layer(Whiteouts::Plain).unwrap();
        b.add(entry(&deep, What::Directory)).unwrap();
        b.begin_layer(Whiteouts::Oci).unwrap();
        b.add(entry(".wh.d", file(0))).unwrap();
        assert_eq!(names(&finish(b)), [""]);
        let mut b = Builder::new();
        b.begin_layer(Whiteouts::Plain).unwrap();
        b.add(entry(&deep, What::Directory)).unwrap();
        let index = finish(b);
        let mut path = Vec::new();
        index.home_path(&index.inode(MAX_DEPTH as u32).unwrap(), &mut path).unwrap();
        assert_eq!(path, deep.as_bytes());
    };
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}

#[test]
fn a_directory_reads_as_a_layer() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("usr/lib")).unwrap();
    std::fs::write(at("usr/a"), b"hello").unwrap();
    std::fs::hard_link(at("usr/a"), at("usr/lib/b")).unwrap();
    std::fs::set_permissions(at("usr/a"), std::fs::Permissions::from_mode(0o4711)).unwrap();
    symlink("../x y", at("l")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("p"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let has_xattrs = rustix::fs::setxattr(at("usr/a"), "user.k", b"v", rustix::fs::XattrFlags::empty()).is_ok();
    let mut b = Builder::new();
    b.begin_layer(Whiteouts::Plain).unwrap();
    b.add_directory(std::fs::File::open(dir.path()).unwrap()).unwrap();
    let index = finish(b);
    assert_eq!(names(&index), ["", "l", "p", "usr", "usr/a", "usr/lib", "usr/lib/b"]);
    let a = index.find(b"usr/a").unwrap().unwrap();
    let stat = rustix::fs::stat(at("usr/a")).unwrap();
    assert_eq!((a.mode, a.nlink, a.size, a.uid), (0o104_711, 2, 5, stat.st_uid));
    assert_eq!((a.mtime.secs, u64::from(a.mtime.nanos)), (stat.st_mtime, stat.st_mtime_nsec));
    assert_eq!(index.find(b"usr/lib/b").unwrap().unwrap().row, a.row);
    assert_eq!(index.target(&index.find(b"l").unwrap().unwrap()).unwrap(), Some(&b"../x y"[..]));
    if has_xattrs {
        assert_eq!(index.xattr(&a, b"user.k").unwrap(), Some(&b"v"[..]));
    }
}

#[test]
fn an_index_reads_as_a_layer() {
    let mut lower = Builder::new();
    lower.begin_layer(Whiteouts::Plain).unwrap();
    for e in [entry("a", file(1)), entry("d/x", file(2)), entry("d/y", What::HardLink(b"d/x".to_vec()))] {
        lower.add(e).unwrap();
    }
    lower.add(entry("dev/c", What::Char(0x501))).unwrap();
    let mut upper = Builder::new();
    upper.begin_layer(Whiteouts::Plain).unwrap();
    for e in [entry(".wh.a", file(0)), entry("d/z", What::Symlink(b"x".to_vec())), entry("skip/this", file(3))] {
        upper.add(e).unwrap();
    }
    let (lower, upper) = (finish(lower), finish(upper));
    let mut both = Builder::new();
    both.begin_layer(Whiteouts::Oci).unwrap();
    both.add_index(&lower, |_, _| true).unwrap();
    both.begin_layer(Whiteouts::Oci).unwrap();
    both.add_index(&upper, |path, _| !path.starts_with(b"skip")).unwrap();
    let both = finish(both);
    assert_eq!(names(&both), ["", "d", "d/x", "d/y", "d/z", "dev", "dev/c"]);
    let at = |path: &[u8]| both.find(path).unwrap().unwrap();
    assert_eq!((at(b"d/x").row, at(b"d/x").nlink, at(b"d/x").layer), (at(b"d/y").row, 2, 0));
    assert_eq!((at(b"d/z").mode & S_IFMT, at(b"d/z").layer, at(b"dev/c").rdev), (0o120_000, 1, 0x501));
    let mut again = Builder::new();
    again.begin_layer(Whiteouts::Plain).unwrap();
    assert_eq!(again.add_index(&both, |_, _| true).unwrap_err().kind(), Kind::Invalid);
}

fn sample() -> Vec<u8> {
    let mut b = Builder::new();
    b.begin_layer(Whiteouts::Plain).unwrap();
    for i in 0..300 {
        let mut e = entry(&format!("d{}/file-{i}", i % 7), file(i));
        e.xattrs = vec![Xattr { name: b"user.n".to_vec(), value: vec![i as u8 % 5; 40] }];
        b.add(e).unwrap();
    }
    b.add(entry("l", What::Symlink(b"d1/file-1".to_vec()))).unwrap();
    b.finish().unwrap()
}

#[test]
fn a_file_is_written_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    let build = |name: &str| {
        let mut b = Builder::new();
        b.begin_layer(Whiteouts::Plain).unwrap();
        b.add(entry(name, file(1))).unwrap();
        b
    };
    build("one").write_file(&path).unwrap();
    let old = Index::open(&path).unwrap();
    build("two").write_file(&path).unwrap();
    assert!(old.find(b"one").unwrap().is_some(), "a mapped index outlives its replacement");
    assert!(Index::open(&path).unwrap().find(b"two").unwrap().is_some());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    assert!(build("x").write_file(&dir.path().join("none/index")).is_err());
}

#[test]
fn foreign_and_damaged_files_are_refused() {
    let good = sample();
    let kind = |bytes: Vec<u8>| Index::from_bytes(bytes).err().map(|e| e.kind());
    assert_eq!(kind(Vec::new()), Some(Kind::Integrity));
    assert_eq!(kind(vec![0; 100_000]), Some(Kind::Invalid));
    assert_eq!(kind(good[..good.len() - 1].to_vec()), Some(Kind::Integrity));
    assert_eq!(kind(good[..BLOCK].to_vec()), Some(Kind::Integrity));
    let mut longer = good.clone();
    longer.push(0);
    assert_eq!(kind(longer), Some(Kind::Integrity));
    let mut newer = good.clone();
    newer[8] = 2;
    let error = Index::from_bytes(newer).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("version 2"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    std::fs::write(&path, b"#!/bin/sh\n").unwrap();
    let error = Index::open(&path).unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()) && error.contains("shorter"), "{error}");
}

#[test]
fn no_flipped_byte_gives_another_answer() {
    let good = sample();
    let want = walk(&Index::from_bytes(good.clone()).unwrap());
    for at in (0..good.len()).step_by(61).chain(0..300) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x20;
        let Ok(index) = Index::from_bytes(bytes) else { continue };
        assert!(index.verify().is_err(), "byte {at}");
        for (path, inode) in &want {
            if let Ok(found) = index.find(path.as_bytes()) {
                assert_eq!(found, Some(*inode), "byte {at}, {path}");
            }
        }
    }
}

/// What a script does to the image, one step at a time.
#[derive(Clone, Debug)]
enum Step {
    Layer,
    Dir(String),
    File(String),
    Link(String, String),
    Hide(String),
    Opaque(String),
}

fn path_strategy() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|v| v.join("/"))
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        1 => Just(Step::Layer),
        2 => path_strategy().prop_map(Step::Dir),
        4 => path_strategy().prop_map(Step::File),
        2 => (path_strategy(), path_strategy()).prop_map(|(a, b)| Step::Link(a, b)),
        1 => path_strategy().prop_map(Step::Hide),
        1 => path_strategy().prop_map(Step::Opaque),
    ];
    proptest::collection::vec(step, 0..40)
}

/// The oracle: flat maps of whole paths, one for the merged image and one for each layer's directory on the disk. It shares
/// nothing with the builder but the rules.
#[derive(Default)]
struct Oracle {
    /// Path to (identity, directory?, layer of the name).
    tree: BTreeMap<String, (u64, bool, usize)>,
    disk: Vec<BTreeMap<String, u64>>,
    hidden: Vec<(String, bool)>,
}

fn below(path: &str, top: &str) -> bool {
    top.is_empty() || path.strip_prefix(top).is_some_and(|rest| rest.starts_with('/'))
}

impl Oracle {
    fn parents(path: &str) -> Vec<String> {
        path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect()
    }

    fn remove(&mut self, path: &str) {
        self.tree.retain(|p, _| p != path && !below(p, path));
        self.disk.last_mut().unwrap().retain(|p, _| p != path && !below(p, path));
    }

    /// Can the path's parents be directories? Makes them.
    fn lead_to(&mut self, path: &str, id: u64) -> bool {
        let layer = self.disk.len() - 1;
        for parent in Self::parents(path) {
            match self.tree.get(&parent) {
                Some((_, true, _)) => {}
                Some((_, false, l)) if *l == layer => return false,
                _ => {
                    self.remove(&parent);
                    self.tree.insert(parent.clone(), (id + 1_000_000 + parent.len() as u64, true, layer));
                }
            }
        }
        true
    }

    fn end(&mut self) {
        let layer = self.disk.len().saturating_sub(1);
        for (path, whole) in std::mem::take(&mut self.hidden) {
            // The directory a whiteout stands in may be gone again.
            let holder = if whole { path.rsplit_once('/').map_or("", |(d, _)| d).to_owned() } else { path.clone() };
            if !holder.is_empty() && !matches!(self.tree.get(&holder), Some((_, true, _))) {
                continue;
            }
            let doomed: Vec<String> = self
                .tree
                .iter()
                .filter(|(p, (_, _, l))| *l < layer && (below(p, &path) || (whole && **p == path)))
                .map(|(p, _)| p.clone())
                .collect();
            for p in doomed {
                let kept = self.tree.iter().any(|(q, (_, _, l))| *l == layer && below(q, &p));
                if kept {
                    self.tree.get_mut(&p).unwrap().2 = layer;
                } else {
                    self.tree.remove(&p);
                }
            }
        }
    }

    /// Take a step; false: the builder must refuse it.
    fn step(&mut self, step: &Step, id: u64) -> bool {
        let layer = self.disk.len().wrapping_sub(1);
        match step {
            Step::Layer => {
                self.end();
                self.disk.push(BTreeMap::new());
            }
            Step::Dir(path) => {
                if !self.lead_to(path, id) {
                    return false;
                }
                if let Some(found @ (_, true, _)) = self.tree.get_mut(path) {
                    found.2 = layer;
                } else {
                    self.remove(path);
                    self.tree.insert(path.clone(), (id, true, layer));
                }
            }
            Step::File(path) => {
                if !self.lead_to(path, id) {
                    return false;
                }
                self.remove(path);
                self.tree.insert(path.clone(), (id, false, layer));
                self.disk[layer].insert(path.clone(), id);
            }
            Step::Link(path, to) => {
                if !self.lead_to(path, id) {
                    return false;
                }
                let Some(&(target, false, _)) = self.tree.get(to) else { return false };
                if path == to {
                    return true;
                }
                let here = self.disk[layer].values().any(|v| *v == target);
                self.remove(path);
                self.tree.insert(path.clone(), (target, false, layer));
                if here {
                    self.disk[layer].insert(path.clone(), target);
                }
            }
            Step::Hide(path) => {
                if !self.lead_to(path, id) {
                    return false;
                }
                self.hidden.push((path.clone(), true));
            }
            Step::Opaque(path) => {
                if !self.lead_to(&format!("{path}/x"), id) {
                    return false;
                }
                self.hidden.push((path.clone(), false));
            }
        }
        true
    }
}

/// Found by the comparison with the model: the name in the replaced directory was taken for the place of the file's content.
#[test]
fn a_hard_link_outlives_the_directory_of_its_first_name() {
    let mut builder = Builder::new();
    builder.begin_layer(Whiteouts::Oci).unwrap();
    builder.add(entry("c/b", file(1))).unwrap();
    builder.add(entry("a", What::HardLink("c/b".into()))).unwrap();
    builder.add(entry("c", file(3))).unwrap();
    let index = finish(builder);
    let found = walk(&index);
    let (inode, mut place) = (&found["a"], Vec::new());
    index.content_path(inode, &mut place).unwrap();
    assert_eq!((inode.nlink, inode.size, place.as_slice()), (1, 1, &b"a"[..]));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_index_says_what_a_naive_model_says(mut script in steps()) {
        script.insert(0, Step::Layer);
        let mut oracle = Oracle::default();
        let mut builder = Builder::new();
        for (id, step) in script.iter().enumerate() {
            let id = id as u64;
            let did = match step {
                Step::Layer => builder.begin_layer(Whiteouts::Oci).map(|_| ()),
                Step::Dir(p) => builder.add(entry(p, What::Directory)),
                Step::File(p) => builder.add(entry(p, file(id))),
                Step::Link(p, to) => builder.add(entry(p, What::HardLink(to.clone().into()))),
                Step::Hide(p) => {
                    let (dir, name) = p.rsplit_once('/').unwrap_or(("", p));
                    let slash = if dir.is_empty() { "" } else { "/" };
                    builder.add(entry(&format!("{dir}{slash}.wh.{name}"), file(0)))
                }
                Step::Opaque(p) => builder.add(entry(&format!("{p}/.wh..wh..opq"), file(0))),
            };
            prop_assert_eq!(did.is_ok(), oracle.step(step, id), "{:?}", step);
        }
        oracle.end();
        let index = finish(builder);
        let mut found = walk(&index);
        found.remove("");
        prop_assert_eq!(
            found.keys().collect::<Vec<_>>(),
            oracle.tree.keys().collect::<Vec<_>>()
        );
        let mut place = Vec::new();
        let mut rows: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
        for (path, inode) in &found {
            let (id, directory, _) = oracle.tree[path];
            prop_assert_eq!(inode.mode & S_IFMT == S_IFDIR, directory, "{}", path);
            if directory {
                let below_it = oracle.tree.iter().filter(|(p, n)| n.1 && p.rsplit_once('/').map_or("", |(d, _)| d) == path);
                prop_assert_eq!(inode.nlink as usize, 2 + below_it.count());
                continue;
            }
            rows.entry(inode.row).or_default().insert(id);
            prop_assert_eq!(inode.size, id, "{}", path);
            prop_assert_eq!(inode.nlink as usize, oracle.tree.values().filter(|n| n.0 == id).count());
            index.content_path(inode, &mut place).unwrap();
            let on_disk = &oracle.disk[inode.layer as usize];
            prop_assert_eq!(on_disk.get(std::str::from_utf8(&place).unwrap()), Some(&id), "{}", path);
        }
        for ids in rows.values() {
            prop_assert_eq!(ids.len(), 1, "an inode is one file");
        }
    }

    #[test]
    fn crafted_bytes_never_crash_a_reader(at in 0..20_000_usize, with in proptest::collection::vec(any::<u8>(), 1..64)) {
        let mut bytes = sample();
        let at = BLOCK + at % (bytes.len() - BLOCK - 64);
        bytes[at..at + with.len()].copy_from_slice(&with);
        super::read::seal(&mut bytes);
        if let Ok(index) = Index::from_bytes(bytes) {
            super::read::exercise(&index);
        }
    }

    #[test]
    fn a_crafted_header_never_crashes_a_reader(
        at in 0..size_of::<super::format::Header>() - 8,
        with in prop_oneof![any::<u64>(), 0..70_000_u64, (0..20_u64).prop_map(|n| n * BLOCK as u64), any::<u32>().prop_map(|n| u64::from(n).wrapping_neg())],
        cut in 0..BLOCK,
    ) {
        let mut bytes = sample();
        bytes[at..at + 8].copy_from_slice(&with.to_le_bytes());
        bytes.truncate(bytes.len() - cut);
        super::read::seal(&mut bytes);
        if let Ok(index) = Index::from_bytes(bytes) {
            super::read::exercise(&index);
        }
    }
}
