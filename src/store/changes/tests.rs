use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{FileType, XattrFlags, lsetxattr, makedev, mknodat};

use super::list::{Change, Changed};
use super::walk::{Found, Is, Visitor};
use super::{Below, Marks, Upper};
use crate::error::{Kind, Result};
use crate::index::Time;
use crate::plan::{IdRange, Ownership};
use crate::store::Limits;

fn open(at: &Path) -> Upper {
    Upper::open(at, Marks::User, Ownership::default(), &Limits::default()).unwrap()
}

fn write(upper: &Upper) -> Vec<u8> {
    let mut bytes = Vec::new();
    upper.write_layer(None, &mut bytes).unwrap();
    bytes
}

fn whiteout(at: &Path) {
    let mode = rustix::fs::Mode::empty();
    mknodat(rustix::fs::CWD, at, FileType::CharacterDevice, mode, makedev(0, 0)).unwrap();
}

/// False: this file system has no such attributes.
fn set(at: &Path, name: &str, value: &[u8]) -> bool {
    lsetxattr(at, name, value, XattrFlags::empty()).is_ok()
}

/// Each entry: kind, path, link.
fn entries(bytes: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(bytes);
    let told = archive.entries().unwrap().map(|entry| {
        let entry = entry.unwrap();
        let link = entry.link_name().unwrap().map_or(String::new(), |link| format!(" -> {}", link.display()));
        format!("{:?} {}{link}", entry.header().entry_type(), entry.path().unwrap().display())
    });
    told.collect()
}

fn upper(dir: &Path) -> bool {
    let at = |name: &str| dir.join(name);
    for name in ["etc/opaque", "etc/not-opaque", "var"] {
        std::fs::create_dir_all(at(name)).unwrap();
    }
    for (name, text) in [("etc/a", "1"), ("etc/opaque/in", ""), ("etc/.wh.trap", ""), ("var/one", "x")] {
        std::fs::write(at(name), text).unwrap();
    }
    whiteout(&at("etc/gone"));
    whiteout(&at("var/~gone"));
    // The kernel gives one inode to many whiteouts (Linux 5.8).
    std::fs::hard_link(at("var/~gone"), at("var/also-gone")).unwrap();
    std::fs::hard_link(at("var/one"), at("var/two")).unwrap();
    symlink("/etc/passwd", at("var/link")).unwrap();
    mknodat(rustix::fs::CWD, at("var/fifo"), FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    drop(std::os::unix::net::UnixListener::bind(at("var/socket")));
    set(&at("etc/opaque"), "user.overlay.opaque", b"y") && set(&at("etc/not-opaque"), "user.overlay.opaque", b"x")
}

#[test]
fn marks_become_those_of_layers() {
    let dir = tempfile::tempdir().unwrap();
    if !upper(dir.path()) {
        return crate::lacks("attributes of user. in the directory for temporary files");
    }
    set(&dir.path().join("etc/a"), "user.kept", b"k");
    set(&dir.path().join("etc/a"), "user.overlay.origin", b"o");
    let bytes = write(&open(dir.path()));
    assert_eq!(
        entries(&bytes),
        [
            "Directory ./",
            "Directory etc/",
            "Regular etc/.wh.gone",
            "Regular etc/a",
            "Directory etc/not-opaque/",
            "Directory etc/opaque/",
            "Regular etc/opaque/.wh..wh..opq",
            "Regular etc/opaque/in",
            "Directory var/",
            "Regular var/.wh.also-gone",
            "Regular var/.wh.~gone",
            "Fifo var/fifo",
            "Symlink var/link -> /etc/passwd",
            "Regular var/one",
            "Regular var/.wh.socket",
            "Link var/two -> var/one",
        ]
    );
    let has = |text: &[u8]| bytes.windows(text.len()).any(|window| window == text);
    assert!(has(b"SCHILY.xattr.user.kept=k") && !has(b"user.overlay"));
    assert_eq!(write(&open(dir.path())), bytes, "the same again");
    // On the other sort of mount those attributes are a program's own, and mean nothing.
    let other = Upper { marks: Marks::Trusted, ..open(dir.path()) };
    assert!(!entries(&write(&other)).iter().any(|entry| entry.contains(".opq")));
}

#[test]
fn what_lies_elsewhere_is_refused() {
    for (name, mark) in [("d", "user.overlay.redirect"), ("f", "user.overlay.metacopy")] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("f"), "").unwrap();
        if !set(&dir.path().join(name), mark, b"/etc") {
            return crate::lacks("attributes of user. in the directory for temporary files");
        }
        let error = open(dir.path()).write_layer(None, &mut std::io::sink()).unwrap_err();
        assert!(error.kind() == Kind::Unsupported && error.to_string().contains(mark), "{error}");
    }
}

#[test]
fn what_is_too_deep_or_too_much_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut deep = dir.path().to_owned();
    for _ in 0..12 {
        deep.push("d");
    }
    std::fs::create_dir_all(&deep).unwrap();
    for limits in [Limits { depth: 11, ..Limits::default() }, Limits { entries: 11, ..Limits::default() }] {
        let upper = Upper::open(dir.path(), Marks::User, Ownership::default(), &limits).unwrap();
        assert_eq!(upper.write_layer(None, &mut std::io::sink()).unwrap_err().kind(), Kind::Limit);
    }
    let limits = Limits { depth: 12, entries: 12, ..Limits::default() };
    let upper = Upper::open(dir.path(), Marks::User, Ownership::default(), &limits).unwrap();
    upper.write_layer(None, &mut std::io::sink()).unwrap();
}

/// While it is read, somebody puts symlinks in the place of what was listed.
struct Exchanges<'a> {
    root: &'a Path,
    found: Vec<String>,
}

impl Visitor for Exchanges<'_> {
    fn found(&mut self, found: &Found<'_>) -> Result<()> {
        let what = match found.is {
            Is::Symlink(_) => "symlink",
            _ => "other",
        };
        self.found.push(format!("{} {what}", String::from_utf8_lossy(found.path)));
        Ok(())
    }

    fn hidden(&mut self, _: &[u8]) -> Result<()> {
        std::fs::remove_dir_all(self.root.join("dir")).unwrap();
        std::fs::remove_file(self.root.join("file")).unwrap();
        symlink("/etc", self.root.join("dir")).unwrap();
        symlink("/etc/passwd", self.root.join("file")).unwrap();
        Ok(())
    }
}

#[test]
fn no_symlink_is_followed_that_comes_while_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("dir")).unwrap();
    std::fs::write(dir.path().join("dir/in"), "").unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    whiteout(&dir.path().join("gone"));
    let mut visitor = Exchanges { root: dir.path(), found: Vec::new() };
    open(dir.path()).walk(&mut visitor).unwrap();
    assert_eq!(visitor.found, [" other", "dir symlink", "file symlink"]);
}

#[test]
fn holes_times_and_owners() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("upper");
    std::fs::create_dir(&root).unwrap();
    for (name, length, data) in
        [("a", 8 << 20, 3 << 20), ("b", 4 << 20, 0), ("c", (4 << 20) + 1, 4 << 20), ("d", 100, 50)]
    {
        let file = std::fs::File::create(root.join(name)).unwrap();
        file.set_len(length).unwrap();
        file.write_all_at(b"x", data).unwrap();
    }
    std::fs::File::create(root.join("nothing")).unwrap().set_len(3 << 20).unwrap();
    std::fs::File::create(root.join("empty")).unwrap();
    let bytes = write(&open(&root));
    let is_sparse = bytes.len() < 1 << 20;
    let (archive, out) = (dir.path().join("layer.tar"), dir.path().join("out"));
    std::fs::write(&archive, &bytes).unwrap();
    std::fs::create_dir(&out).unwrap();
    assert!(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&out).status().unwrap().success());
    assert!(Command::new("diff").arg("-r").arg(&root).arg(&out).status().unwrap().success());
    if !is_sparse {
        crate::lacks("holes in the directory for temporary files");
    }
    let ids = |id| vec![IdRange { inside: 7, outside: id, count: 1 }];
    let (uid, gid) = crate::sys::process::own_ids();
    let upper = Upper { owners: Ownership { uids: ids(uid), gids: ids(gid), squash: None }, ..open(&root) };
    let mut bytes = Vec::new();
    upper.write_layer(Some(Time { secs: 1000, nanos: 0 }), &mut bytes).unwrap();
    for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
        let header = entry.unwrap().header().clone();
        assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (7, 7, 1000));
    }
}

/// Each change: letter and path.
fn listed(root: &Path, lower: &Path) -> Vec<String> {
    let listed = open(root).list(&Below::directory(lower).unwrap()).unwrap();
    let told = listed.iter().map(|Change { what, path }| {
        let letter = match what {
            Changed::Added => 'A',
            Changed::Changed => 'C',
            Changed::Deleted => 'D',
        };
        format!("{letter} {}", String::from_utf8_lossy(path))
    });
    told.collect()
}

#[test]
fn changes_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (lower, root) = (dir.path().join("lower"), dir.path().join("upper"));
    for name in ["etc/opaque", "same/deep", "touched", "tree/sub"] {
        std::fs::create_dir_all(lower.join(name)).unwrap();
    }
    for name in ["etc/gone", "etc/opaque/old", "etc/opaque/in", "etc/a", "tree/sub/f", "was-file"] {
        std::fs::write(lower.join(name), "").unwrap();
    }
    for name in ["etc/opaque", "same/deep", "touched", "new", "proc", "run/secrets", "was-file"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    for name in ["etc/a", "etc/opaque/in", "etc/hosts", "new/b", "tree"] {
        std::fs::write(root.join(name), "").unwrap();
    }
    whiteout(&root.join("etc/gone"));
    whiteout(&root.join("etc/never-there"));
    if !set(&root.join("etc/opaque"), "user.overlay.opaque", b"y") {
        return crate::lacks("attributes of user. in the directory for temporary files");
    }
    // As the kernel copies directories up: the same in all.
    for name in ["same/deep", "same", "etc", "etc/opaque"] {
        let time = std::fs::metadata(lower.join(name)).unwrap().modified().unwrap();
        std::fs::File::open(root.join(name)).unwrap().set_modified(time).unwrap();
    }
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000);
    std::fs::File::open(lower.join("touched")).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(
        listed(&root, &lower),
        [
            "C /etc",
            "C /etc/a",
            "D /etc/gone",
            "C /etc/opaque",
            "C /etc/opaque/in",
            "D /etc/opaque/old",
            "A /new",
            "A /new/b",
            "C /touched",
            "C /tree",
            "C /was-file",
        ]
    );
}

// Directories made again below a removed one have no mark of their own, and whiteouts may lie in it: each name that is gone is listed, once.
#[test]
fn what_is_gone_below_a_replaced_directory_is_listed_once() {
    let dir = tempfile::tempdir().unwrap();
    let (lower, root) = (dir.path().join("lower"), dir.path().join("upper"));
    for name in ["apt/conf.d/deep", "apt/keys", "apt/was-directory"] {
        std::fs::create_dir_all(lower.join(name)).unwrap();
    }
    for name in ["apt/conf.d/01", "apt/conf.d/70", "apt/conf.d/deep/f", "apt/copyright", "apt/was-file"] {
        std::fs::write(lower.join(name), "").unwrap();
    }
    for name in ["apt/conf.d/deep", "apt/was-file/new"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    for name in ["apt/conf.d/70", "apt/was-directory"] {
        std::fs::write(root.join(name), "").unwrap();
    }
    whiteout(&root.join("apt/copyright"));
    whiteout(&root.join("apt/conf.d/01"));
    whiteout(&root.join("apt/never-there"));
    if !set(&root.join("apt"), "user.overlay.opaque", b"y") {
        return crate::lacks("attributes of user. in the directory for temporary files");
    }
    assert_eq!(
        listed(&root, &lower),
        [
            "C /apt",
            "C /apt/conf.d",
            "D /apt/conf.d/01",
            "C /apt/conf.d/70",
            "C /apt/conf.d/deep",
            "D /apt/conf.d/deep/f",
            "D /apt/copyright",
            "D /apt/keys",
            "C /apt/was-directory",
            "C /apt/was-file",
            "A /apt/was-file/new",
        ]
    );
}

#[test]
fn modes_of_files_with_acls_give_no_more_without() {
    let dir = tempfile::tempdir().unwrap();
    let (lower, root) = (dir.path().join("lower"), dir.path().join("upper"));
    for name in ["same", "with"] {
        std::fs::create_dir_all(lower.join(name)).unwrap();
        std::fs::create_dir_all(root.join(name)).unwrap();
        let time = std::fs::metadata(lower.join(name)).unwrap().modified().unwrap();
        std::fs::File::open(root.join(name)).unwrap().set_modified(time).unwrap();
    }
    std::fs::write(root.join("file"), "").unwrap();
    // user::rwx, user:2:rwx, group::r-x, mask::rwx, other::---
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1_u16, 7_u16, u32::MAX), (2, 7, 2), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 0, u32::MAX)]
    {
        acl.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    let may = set(&root.join("file"), "system.posix_acl_access", &acl);
    if !may || !set(&root.join("with"), "system.posix_acl_default", &acl) {
        return crate::lacks("ACLs in the directory for temporary files");
    }
    let bytes = write(&open(&root));
    let modes: Vec<String> = tar::Archive::new(&bytes[..])
        .entries()
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            format!("{} {:o}", entry.path().unwrap().display(), entry.header().mode().unwrap())
        })
        .collect();
    assert!(modes.contains(&"file 750".to_owned()), "{modes:?}");
    assert_eq!(listed(&root, &lower), ["A /file", "C /with"], "an ACL is a change of a directory");
}
