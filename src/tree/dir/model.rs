//! Random requests against a model that shares no code with the tree: a directory as a table of inodes in memory. After each
//! step the answer, and every so often the whole directory, must be the model's. Among the steps are what a kernel does too
//! (forgetting) and what it does not see (a server that dies and is replaced).
//!
//! `FSPROV_MODEL_STEPS=100000` sets the number of steps, `FSPROV_MODEL_SEED` the seed, which is printed.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use proptest::collection::vec;
use proptest::prelude::any;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::tree::ROOT;

const ME: Caller = Caller { uid: 0, gid: 0, pid: 0 };
/// Few names, so that steps meet.
const NAMES: [&str; 5] = ["a", "b", "c", "long-name-of-something", "\u{e9}"];
/// Steps of one sequence.
const STEPS: usize = 250;
/// Steps in all where nothing else is asked for: a few seconds.
const USUAL_STEPS: usize = 10_000;

/// The model. Inode 0 is the root.
#[derive(Clone, Debug)]
enum Body {
    File(Vec<u8>),
    Link(String),
    Dir(BTreeMap<&'static str, usize>),
}

#[derive(Clone, Debug)]
struct Inode {
    body: Body,
    /// Names of a file; of a directory, 1 while it has its name.
    names: u32,
    parent: usize,
}

#[derive(Debug)]
struct Model(Vec<Inode>);

impl Model {
    fn dir(&self, at: usize) -> &BTreeMap<&'static str, usize> {
        match &self.0[at].body {
            Body::Dir(names) => names,
            _ => panic!("{at} is a directory"),
        }
    }
    fn dir_mut(&mut self, at: usize) -> &mut BTreeMap<&'static str, usize> {
        match &mut self.0[at].body {
            Body::Dir(names) => names,
            _ => panic!("{at} is a directory"),
        }
    }
    fn is_dir(&self, at: usize) -> bool {
        matches!(self.0[at].body, Body::Dir(_))
    }
    fn get(&self, dir: usize, name: &str) -> Option<usize> {
        self.dir(dir).get(name).copied()
    }
    /// Is `above` the directory `at` or one above it?
    fn holds(&self, above: usize, mut at: usize) -> bool {
        loop {
            if at == above {
                return true;
            }
            if at == 0 {
                return false;
            }
            at = self.0[at].parent;
        }
    }
    fn directories(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|&i| self.is_dir(i) && (i == 0 || self.0[i].names > 0)).collect()
    }
    fn add(&mut self, dir: usize, name: &'static str, body: Body) -> Result<usize> {
        if self.0[dir].names == 0 && dir != 0 {
            return Err(Errno::NOENT);
        }
        if self.get(dir, name).is_some() {
            return Err(Errno::EXIST);
        }
        self.0.push(Inode { body, names: 1, parent: dir });
        let at = self.0.len() - 1;
        self.dir_mut(dir).insert(name, at);
        Ok(at)
    }
    fn link(&mut self, at: usize, dir: usize, name: &'static str) -> Result<()> {
        if self.get(dir, name).is_some() {
            return Err(Errno::EXIST);
        }
        if self.is_dir(at) {
            return Err(Errno::PERM);
        }
        if self.0[at].names == 0 {
            return Err(Errno::NOENT);
        }
        self.0[at].names += 1;
        self.dir_mut(dir).insert(name, at);
        Ok(())
    }
    fn remove(&mut self, dir: usize, name: &str, directory: bool) -> Result<()> {
        let at = self.get(dir, name).ok_or(Errno::NOENT)?;
        match (self.is_dir(at), directory) {
            (true, false) => return Err(Errno::ISDIR),
            (false, true) => return Err(Errno::NOTDIR),
            (true, true) if !self.dir(at).is_empty() => return Err(Errno::NOTEMPTY),
            _ => {}
        }
        self.dir_mut(dir).remove(name);
        self.0[at].names -= 1;
        Ok(())
    }
    /// In the order in which the kernel checks (do_renameat2 and vfs_rename in fs/namei.c).
    fn rename(&mut self, from: (usize, &'static str), to: (usize, &'static str), flags: u32) -> Result<()> {
        let (noreplace, exchange) = (flags == libc::RENAME_NOREPLACE, flags == libc::RENAME_EXCHANGE);
        let source = self.get(from.0, from.1).ok_or(Errno::NOENT)?;
        let target = self.get(to.0, to.1);
        if noreplace && target.is_some() {
            return Err(Errno::EXIST);
        }
        if exchange && target.is_none() {
            return Err(Errno::NOENT);
        }
        if from.0 != to.0 {
            if self.is_dir(source) && self.holds(source, to.0) {
                return Err(Errno::INVAL);
            }
            if target.is_some_and(|t| self.is_dir(t) && self.holds(t, from.0)) {
                return Err(if exchange { Errno::INVAL } else { Errno::NOTEMPTY });
            }
        }
        if target == Some(source) {
            return Ok(());
        }
        if let Some(target) = target.filter(|_| !exchange) {
            match (self.is_dir(source), self.is_dir(target)) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                (true, true) if !self.dir(target).is_empty() => return Err(Errno::NOTEMPTY),
                _ => {}
            }
            self.0[target].names -= 1;
        }
        self.dir_mut(from.0).remove(from.1);
        self.dir_mut(to.0).insert(to.1, source);
        self.0[source].parent = to.0;
        if let Some(target) = target.filter(|_| exchange) {
            self.dir_mut(from.0).insert(from.1, target);
            self.0[target].parent = from.0;
        }
        Ok(())
    }
}

/// The tree under test, with what a kernel knows of it.
struct World {
    dir: tempfile::TempDir,
    held: Held,
    tree: DirTree,
    model: Model,
    /// By inode of the model: its node and how many references the kernel has.
    known: BTreeMap<usize, (Node, u64)>,
    /// Open files.
    open: Vec<(usize, Handle)>,
}

/// What outlives a server: its logs, and the descriptors it gave away.
pub(super) struct Held {
    logs: [OwnedFd; 2],
    keeper: Arc<Kept>,
}

#[derive(Default)]
struct Kept(Mutex<BTreeMap<Node, OwnedFd>>);

impl Keeper for Kept {
    fn keep(&self, node: Node, fd: BorrowedFd<'_>) {
        self.0.lock().unwrap().insert(node, fd.try_clone_to_owned().unwrap());
    }
    fn release(&self, node: Node) {
        self.0.lock().unwrap().remove(&node);
    }
}

impl Held {
    pub(super) fn new() -> Self {
        let memory = || memfd_create("fsprov-model", MemfdFlags::CLOEXEC).unwrap();
        Held { logs: [memory(), memory()], keeper: Arc::default() }
    }

    /// Is no descriptor given away?
    pub(super) fn is_empty(&self) -> bool {
        self.keeper.0.lock().unwrap().is_empty()
    }

    /// The next server. Dropping the one before writes nothing down, so it is as good as a kill.
    pub(super) fn serve(&self, dir: &tempfile::TempDir) -> DirTree {
        let clone = |fd: &OwnedFd| fd.try_clone().unwrap();
        let kept = self.keeper.0.lock().unwrap().iter().map(|(node, fd)| (*node, clone(fd))).collect();
        let logs = [clone(&self.logs[0]), clone(&self.logs[1])];
        let handover = Handover { logs, kept, keeper: Arc::clone(&self.keeper) as Arc<dyn Keeper> };
        let root = crate::sys::fs::open_path(dir.path()).unwrap();
        let options = DirOptions { act_as: ActAs::Server, ..DirOptions::volume(Access::Rw) };
        DirTree::open_again(root, options, FdPool::new().unwrap(), Some(handover)).unwrap()
    }
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let held = Held::new();
        let tree = held.serve(&dir);
        let root = Inode { body: Body::Dir(BTreeMap::new()), names: 1, parent: 0 };
        World { dir, held, tree, model: Model(vec![root]), known: BTreeMap::new(), open: Vec::new() }
    }

    fn learn(&mut self, at: usize, node: Node) {
        let known = self.known.entry(at).or_insert((node, 0));
        assert_eq!(known.0, node, "inode {at} has one node");
        known.1 += 1;
    }

    /// The node of a directory or file that has a name, looked up from the root down where the kernel does not know it.
    fn node(&mut self, at: usize) -> Node {
        if at == 0 {
            return ROOT;
        }
        if let Some((node, _)) = self.known.get(&at) {
            return *node;
        }
        let (dir, name) = self
            .model
            .directories()
            .into_iter()
            .find_map(|d| self.model.dir(d).iter().find(|(_, i)| **i == at).map(|(name, _)| (d, *name)))
            .expect("it has a name");
        let parent = self.node(dir);
        match self.tree.lookup(&ME, parent, OsStr::new(name)).unwrap() {
            Lookup::Found(entry) => {
                self.learn(at, entry.attr.node);
                entry.attr.node
            }
            Lookup::Absent(_) => panic!("{name} is there"),
        }
    }

    /// The node that a name leads to. A kernel uses no name that it has not looked up, by whatever other name it knows the file.
    fn look_up(&mut self, dir: usize, name: &str) -> Option<(usize, Node)> {
        let (at, parent) = (self.model.get(dir, name), self.node(dir));
        match self.tree.lookup(&ME, parent, OsStr::new(name)).unwrap() {
            Lookup::Found(entry) => {
                let at = at.unwrap_or_else(|| panic!("{name} is not there"));
                self.learn(at, entry.attr.node);
                Some((at, entry.attr.node))
            }
            Lookup::Absent(_) => {
                assert_eq!(at, None, "{name} is there");
                None
            }
        }
    }

    fn check_attr(&self, at: usize, attr: &Attr) {
        let inode = &self.model.0[at];
        let (kind, size, nlink) = match &inode.body {
            Body::File(bytes) => (found::REGULAR, Some(bytes.len()), inode.names),
            Body::Link(target) => (found::SYMLINK, Some(target.len()), inode.names),
            Body::Dir(names) => {
                let below = names.values().filter(|&&i| self.model.is_dir(i)).count() as u32;
                (found::DIRECTORY, None, 2 + below)
            }
        };
        assert_eq!(attr.mode & found::TYPE_BITS, kind, "type of {at}");
        assert_eq!(size.map(|s| s as u64), size.map(|_| attr.size), "size of {at}");
        // Some file systems do not count directories.
        if kind != found::DIRECTORY || (attr.nlink > 1 && inode.names > 0) {
            assert_eq!(attr.nlink, nlink, "links of {at}");
        }
    }

    fn made(&mut self, made: Result<Entry>, expected: Result<usize>) {
        assert_eq!(made.map(|_| ()), expected.map(|_| ()));
        if let (Ok(entry), Ok(at)) = (made, expected) {
            self.learn(at, entry.attr.node);
            self.check_attr(at, &entry.attr);
        }
    }

    fn content(&mut self, at: usize) -> Option<&mut Vec<u8>> {
        match &mut self.model.0[at].body {
            Body::File(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// One step, told by four numbers.
    fn step(&mut self, [what, one, two, three]: [u8; 4]) {
        let directories = self.model.directories();
        let pick = |n: u8| directories[n as usize % directories.len()];
        let (dir, other) = (pick(one), pick(three));
        let (name, to) = (NAMES[two as usize % 5], NAMES[three as usize / 7 % 5]);
        let os = OsStr::new;
        let new = |mode: u32| New { mode, umask: 0o22, rdev: 0 };
        match what % 20 {
            0 | 1 => {
                let parent = self.node(dir);
                let flags = libc::O_RDWR | libc::O_EXCL;
                let made = self.tree.create(&ME, parent, os(name), new(0o100_644), flags);
                let expected = self.model.add(dir, name, Body::File(Vec::new()));
                if let (Ok((_, opened)), Ok(at)) = (&made, &expected) {
                    self.open.push((*at, opened.handle));
                }
                self.made(made.map(|(entry, _)| entry), expected);
            }
            2 => {
                let parent = self.node(dir);
                let made = self.tree.mkdir(&ME, parent, os(name), new(0o755));
                let expected = self.model.add(dir, name, Body::Dir(BTreeMap::new()));
                self.made(made, expected);
            }
            3 => {
                let parent = self.node(dir);
                let made = self.tree.symlink(&ME, parent, os(name), os(to));
                let expected = self.model.add(dir, name, Body::Link(to.to_owned()));
                self.made(made, expected);
            }
            4 => {
                let Some((at, node)) = self.look_up(dir, name) else { return };
                let parent = self.node(other);
                let made = self.tree.link(&ME, node, parent, os(to));
                let expected = self.model.link(at, other, to).map(|()| at);
                self.made(made, expected);
            }
            5 | 6 => {
                let parent = self.node(dir);
                let removed = self.tree.unlink(&ME, parent, os(name));
                assert_eq!(removed, self.model.remove(dir, name, false));
            }
            7 => {
                let parent = self.node(dir);
                let removed = self.tree.rmdir(&ME, parent, os(name));
                assert_eq!(removed, self.model.remove(dir, name, true));
            }
            8..=10 => {
                let flags = [0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE][what as usize % 20 - 8];
                let (from_node, to_node) = (self.node(dir), self.node(other));
                let moved = self.tree.rename(&ME, (from_node, os(name)), (to_node, os(to)), flags);
                assert_eq!(moved, self.model.rename((dir, name), (other, to), flags), "rename with {flags}");
            }
            11 => {
                let Some((at, node)) = self.look_up(dir, name) else { return };
                match self.tree.open(&ME, node, libc::O_RDWR) {
                    Ok(opened) => self.open.push((at, opened.handle)),
                    Err(e) => assert!(e == Errno::NXIO && self.content(at).is_none(), "open: {e}"),
                }
            }
            12 | 13 => {
                let Some(&(at, handle)) = self.open.get(one as usize % self.open.len().max(1)) else { return };
                let (node, append) = (self.known[&at].0, what % 20 == 13);
                let (offset, data) = (usize::from(two) * 40, vec![three; usize::from(three) * 13]);
                let flags = if append { libc::O_APPEND } else { 0 };
                assert_eq!(
                    self.tree.write(&Writer::Trusted, node, handle, offset as u64, &data, flags),
                    Ok(data.len())
                );
                let bytes = self.content(at).expect("only files are open");
                let offset = if append { bytes.len() } else { offset };
                if !data.is_empty() {
                    bytes.resize(bytes.len().max(offset + data.len()), 0);
                    bytes[offset..offset + data.len()].copy_from_slice(&data);
                }
            }
            14 => {
                let Some(&(at, handle)) = self.open.get(one as usize % self.open.len().max(1)) else { return };
                let size = usize::from(two) * 37;
                let change = Change { size: Some(size as u64), ..Change::default() };
                let (attr, _) = self.tree.setattr(&ME, self.known[&at].0, Some(handle), &change).unwrap();
                self.content(at).expect("only files are open").resize(size, 0);
                self.check_attr(at, &attr);
            }
            15 => {
                let Some(&(at, handle)) = self.open.get(one as usize % self.open.len().max(1)) else { return };
                let (node, offset) = (self.known[&at].0, usize::from(two) * 11);
                let mut read = Vec::new();
                self.tree.read(node, handle, offset as u64, 5000, &mut |b| read.extend_from_slice(b)).unwrap();
                let bytes = self.content(at).expect("only files are open");
                assert_eq!(read, bytes[offset.min(bytes.len())..bytes.len().min(offset + 5000)]);
                let (attr, _) = self.tree.getattr(node, Some(handle)).unwrap();
                self.check_attr(at, &attr);
                self.check_attr(at, &self.tree.getattr(node, None).unwrap().0);
            }
            16 if !self.open.is_empty() => {
                let (at, handle) = self.open.swap_remove(one as usize % self.open.len());
                self.tree.flush(self.known[&at].0, handle).unwrap();
                self.tree.release(self.known[&at].0, handle);
            }
            17 => self.evict(one),
            18 if three % 4 == 0 => {
                // The server dies; the next one takes over.
                self.tree = self.held.serve(&self.dir);
            }
            _ => self.check_directory(dir),
        }
    }

    /// The kernel drops an inode that nothing uses: no open file, no known child.
    fn evict(&mut self, which: u8) {
        let idle: Vec<usize> = self
            .known
            .keys()
            .copied()
            .filter(|at| self.open.iter().all(|(open, _)| open != at))
            .filter(|&at| !self.model.is_dir(at) || self.model.dir(at).values().all(|c| !self.known.contains_key(c)))
            .collect();
        if let Some(at) = idle.get(which as usize % idle.len().max(1)) {
            let (node, count) = self.known.remove(at).expect("it is known");
            self.tree.forget(node, count);
        }
    }

    fn check_directory(&mut self, dir: usize) {
        let node = self.node(dir);
        let opened = self.tree.opendir(&ME, node).unwrap();
        let mut listed = BTreeMap::new();
        let mut entries = Vec::new();
        self.tree
            .readdir(&ME, node, opened.handle, 0, ListMode::Plus, &mut |item| {
                if let Some(entry) = item.entry {
                    let name = NAMES.into_iter().find(|n| item.name == *n).expect("a name of ours");
                    assert!(listed.insert(name, item.node).is_none(), "{name} twice");
                    entries.push((name, entry));
                }
                Fit::Taken
            })
            .unwrap();
        self.tree.releasedir(node, opened.handle);
        assert_eq!(listed.keys().collect::<Vec<_>>(), self.model.dir(dir).keys().collect::<Vec<_>>());
        for (name, entry) in entries {
            let at = self.model.get(dir, name).expect("compared above");
            self.learn(at, entry.attr.node);
            self.check_attr(at, &entry.attr);
            if let Body::Link(target) = &self.model.0[at].body {
                let mut text = Vec::new();
                self.tree.readlink(entry.attr.node, &mut |b| text.extend_from_slice(b)).unwrap();
                assert_eq!(text, target.as_bytes());
            }
        }
    }

    /// Everything is as the model has it, and everything is given back.
    fn finish(mut self) {
        for dir in self.model.directories() {
            self.check_directory(dir);
        }
        for (at, handle) in std::mem::take(&mut self.open) {
            self.tree.release(self.known[&at].0, handle);
        }
        for (node, count) in std::mem::take(&mut self.known).into_values() {
            self.tree.forget(node, count);
        }
        assert_eq!((self.tree.node_count(), self.tree.handle_count()), (1, 0), "nodes and handles left");
        assert_eq!(self.tree.pool.usage().0, 0, "descriptors left");
        assert!(self.held.is_empty(), "descriptors given away and not taken back");
    }
}

#[test]
fn random_requests_are_answered_as_the_model_answers() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let steps = number("FSPROV_MODEL_STEPS").unwrap_or(USUAL_STEPS as u64);
    let seed = number("FSPROV_MODEL_SEED").unwrap_or_else(|| {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
        u64::from_ne_bytes(bytes)
    });
    // Seen where the test fails, or with --nocapture.
    #[allow(clippy::print_stdout)]
    {
        println!("FSPROV_MODEL_SEED={seed} FSPROV_MODEL_STEPS={steps}");
    }
    let mut whole = [0_u8; 32];
    whole[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: steps.div_ceil(STEPS as u64) as u32,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &whole));
    runner
        .run(&vec(any::<[u8; 4]>(), 1..=2 * STEPS), |sequence| {
            let mut world = World::new();
            let work = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for &step in &sequence {
                    world.step(step);
                }
                world.finish();
            }));
            work.map_err(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
                TestCaseError::fail(text.unwrap_or_else(|| "panicked".to_owned()))
            })
        })
        .unwrap();
}
