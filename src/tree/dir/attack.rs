//! Attacks on confinement: names below the root are swapped for symlinks and other directories while requests are worked on.
//! Nothing outside may be opened, changed or shown.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{RenameFlags, renameat_with};

use super::*;
use crate::tree::ROOT;

/// How long each attack runs. With O_NOFOLLOW and RESOLVE_NO_SYMLINKS taken out by hand an escape shows in it every time.
const ATTACK: Duration = Duration::from_millis(700);
const SECRET: &[u8] = b"outside";
const ME: Caller = Caller { uid: 0, gid: 0, pid: 0 };

fn snapshot(dir: &Path) -> BTreeSet<(String, u64, Vec<u8>)> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::read_dir(dir)
        .unwrap()
        .map(|e| {
            let e = e.unwrap();
            let content = if e.file_type().unwrap().is_file() { std::fs::read(e.path()).unwrap() } else { Vec::new() };
            (e.file_name().to_string_lossy().into_owned(), u64::from(e.metadata().unwrap().mode()), content)
        })
        .collect()
}

/// One round of every request that follows a name, from the root down `path`.
fn requests(tree: &DirTree, path: &[&str], reads: &AtomicU64) -> Result<()> {
    let mut held = Vec::new();
    let mut at = ROOT;
    let work = (|| {
        for name in path {
            match tree.lookup(&ME, at, OsStr::new(name))? {
                Lookup::Found(entry) => {
                    held.push(entry.attr.node);
                    at = entry.attr.node;
                }
                Lookup::Absent(_) => return Err(Errno::NOENT),
            }
        }
        let directory = held[held.len() - 2];
        tree.getattr(at, None).map(|_| ())?;
        let opened = tree.open(&ME, at, libc::O_RDWR)?;
        tree.read(at, opened.handle, 0, 64, &mut |bytes| {
            assert_ne!(bytes, SECRET, "read a file outside");
            reads.fetch_add(1, Ordering::Relaxed);
        })?;
        tree.write(&Writer::Trusted, at, opened.handle, 0, b"inside!", 0)?;
        tree.release(at, opened.handle);
        let change = Change { mode: Some(0o640), size: Some(7), ..Change::default() };
        tree.setattr(&ME, at, None, &change)?;
        let new = New { mode: 0o100_600, umask: 0, rdev: 0 };
        if let Ok((entry, opened)) = tree.create(&ME, directory, OsStr::new("made"), new, libc::O_RDWR) {
            tree.release(entry.attr.node, opened.handle);
            tree.forget(entry.attr.node, 1);
        }
        let _ = tree.rename(&ME, (directory, OsStr::new("made")), (directory, OsStr::new("moved")), 0);
        let _ = tree.unlink(&ME, directory, OsStr::new("moved"));
        let opened = tree.opendir(&ME, directory)?;
        let listed = tree.readdir(&ME, directory, opened.handle, 0, ListMode::Plus, &mut |item| {
            assert_ne!(item.name, "only-outside", "listed a directory outside");
            if let Some(entry) = item.entry {
                held.push(entry.attr.node);
            }
            Fit::Taken
        });
        tree.releasedir(directory, opened.handle);
        listed
    })();
    for node in held {
        tree.forget(node, 1);
    }
    work
}

#[test]
fn swapping_directories_for_symlinks_opens_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
    for d in ["a/b", "spare/b"] {
        std::fs::create_dir_all(root.join(d)).unwrap();
        std::fs::write(root.join(d).join("file"), b"inside!").unwrap();
    }
    std::fs::create_dir_all(outside.join("b")).unwrap();
    for d in [outside.clone(), outside.join("b")] {
        std::fs::write(d.join("file"), SECRET).unwrap();
        std::fs::write(d.join("only-outside"), SECRET).unwrap();
    }
    std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
    std::os::unix::fs::symlink("../outside", root.join("up")).unwrap();
    std::os::unix::fs::symlink("../../../outside/b", root.join("a/deep")).unwrap();
    std::os::unix::fs::symlink(outside.join("file"), root.join("a/b/to-file")).unwrap();
    let before = (snapshot(&outside), snapshot(&outside.join("b")));

    let open = |path: &Path| -> OwnedFd { crate::sys::fs::open_path(path).unwrap() };
    let options = DirOptions { act_as: ActAs::Server, ..DirOptions::volume(Access::Rw) };
    let tree = DirTree::open(open(&root), options, FdPool::new().unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    let (reads, swaps) = (AtomicU64::new(0), AtomicU64::new(0));
    // By descriptor: through a swapped path the attacker would carry the outside in by itself.
    let places =
        [("", "a", "link"), ("", "a", "up"), ("a", "b", "deep"), ("a/b", "file", "to-file"), ("", "a", "spare")]
            .map(|(place, one, other)| (open(&root.join(place)), one, other));
    std::thread::scope(|s| {
        for (place, one, other) in &places {
            let (stop, swaps) = (&stop, &swaps);
            s.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let done = renameat_with(place, *one, place, *other, RenameFlags::EXCHANGE);
                    swaps.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
                }
            });
        }
        let workers: Vec<_> = (0..3)
            .map(|worker| {
                let (tree, reads) = (&tree, &reads);
                s.spawn(move || {
                    let end = Instant::now() + ATTACK;
                    while Instant::now() < end {
                        let _ = requests(tree, [&["a", "b", "file"][..], &["spare", "b", "file"]][worker % 2], reads);
                        if worker == 2 {
                            tree.pool.remove_tree(tree.number);
                        }
                    }
                })
            })
            .collect();
        let results: Vec<_> = workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        stop.store(true, Ordering::Relaxed);
        for result in results {
            if let Err(panic) = result {
                std::panic::resume_unwind(panic);
            }
        }
    });
    assert_eq!(before, (snapshot(&outside), snapshot(&outside.join("b"))), "something outside was changed");
    assert!(reads.load(Ordering::Relaxed) > 10, "the requests were worked on: {reads:?} reads");
    assert!(swaps.load(Ordering::Relaxed) > 100, "the attack was one: {swaps:?} swaps");
    assert_eq!(tree.handle_count(), 0);
    assert_eq!(tree.pool.usage().0, 0, "every pin was given back");
    assert_eq!(tree.node_count(), 1, "every node was given back");
}

#[test]
fn a_million_names_cost_one_request_each_and_then_nothing() {
    // Stands for the process inside that opens names without end: the cap on open files is that of the pool, and what is
    // refused is refused for that request alone.
    let dir = tempfile::tempdir().unwrap();
    let options = DirOptions { act_as: ActAs::Server, ..DirOptions::volume(Access::Rw) };
    let pool = FdPool::with(Shares { open: 50, directories: 128, image: 0 }).unwrap();
    let tree = DirTree::open(crate::sys::fs::open_path(dir.path()).unwrap(), options, pool).unwrap();
    let mut opened = Vec::new();
    let new = New { mode: 0o100_600, umask: 0, rdev: 0 };
    let refused = loop {
        let name = format!("f{}", opened.len());
        match tree.create(&ME, ROOT, OsStr::new(&name), new, libc::O_RDWR) {
            Ok((entry, open)) => opened.push((entry.attr.node, open.handle)),
            Err(e) => break e,
        }
    };
    assert_eq!((refused, opened.len()), (Errno::NFILE, 50));
    assert!(!dir.path().join("f50").exists(), "what could not be opened was not made");
    // Names go all the same: over the cap a removed file has no pin, but it is removed.
    tree.unlink(&ME, ROOT, OsStr::new("f0")).unwrap();
    let (node, handle) = opened.pop().unwrap();
    assert_eq!(tree.write(&Writer::Trusted, node, handle, 0, b"still works", 0), Ok(11));
    tree.release(node, handle);
    let again = tree.open(&ME, node, libc::O_RDWR).unwrap();
    tree.release(node, again.handle);
    for (node, handle) in opened {
        tree.release(node, handle);
        tree.forget(node, 1);
    }
    assert_eq!(tree.pool.usage().0, 0);
}
