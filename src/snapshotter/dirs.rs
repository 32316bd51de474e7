//! The state directory of a snapshotter, and the only joiner of its paths.
//!
//! ```text
//! <state>/              0700; `--state`, else `snapshotter` in the state root
//! ├── lock              flock: held by the snapshotter that has it. A state directory belongs to one containerd
//! ├── s/<number>/       one snapshot, complete or absent (renamed here from `new`); some are made before they are asked for
//! │   ├── record.json   what it is; of one that nobody asked for yet, blanks
//! │   ├── fs/           its files, unless they are a layer of the store
//! │   └── work/         overlayfs's own, of one that is written to
//! ├── l/<number>        symlink to the files of a committed one, for mounts of so many that their own paths do not fit
//! ├── l/<number>s       the same, to its layer in the store
//! ├── b/<digest>        which layer of the store is in this blob: its diff id, as Apply found it
//! ├── m/<map>/          what lies below snapshots with these owners (see `mapped`)
//! ├── f/                what lies below snapshots in one FUSE mount (see `merged`)
//! ├── new/<number>/     snapshots being made; whatever is here at the start is deleted
//! └── gone/<number>/    removed ones, deleted by Cleanup and at the start
//! ```

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result, show};

/// How long a snapshotter waits for the one before it to end.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// The paths, and the lock.
#[derive(Debug)]
pub(super) struct Dirs {
    state: PathBuf,
    _lock: std::os::fd::OwnedFd,
}

/// Names in the directory of a snapshot.
pub(super) const FILES: &str = "fs";
pub(super) const WORK: &str = "work";

impl Dirs {
    /// Make what is missing of it, and lock it.
    pub(super) fn open(state: &Path) -> Result<Self> {
        let make = |dir: &Path| {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|e| Error::io("make state directory", show(dir), e).hint("choose another with --state"))
        };
        make(state)?;
        let lock = take_lock(state)?;
        let dirs = Dirs { state: state.to_owned(), _lock: lock };
        [dirs.snapshots(), dirs.links(), dirs.mapped(), dirs.blobs(), dirs.fresh(), dirs.gone()]
            .iter()
            .try_for_each(|dir| make(dir))?;
        crate::sys::durable::sync_dir(state)?;
        Ok(dirs)
    }

    pub(super) fn state(&self) -> &Path {
        &self.state
    }
    pub(super) fn snapshots(&self) -> PathBuf {
        self.state.join("s")
    }
    pub(super) fn snapshot(&self, number: u64) -> PathBuf {
        self.snapshots().join(number.to_string())
    }
    pub(super) fn links(&self) -> PathBuf {
        self.state.join("l")
    }
    /// What is shown with other owners.
    pub(super) fn mapped(&self) -> PathBuf {
        self.state.join("m")
    }
    pub(super) fn merged(&self) -> PathBuf {
        self.state.join("f")
    }
    pub(super) fn blobs(&self) -> PathBuf {
        self.state.join("b")
    }
    pub(super) fn fresh(&self) -> PathBuf {
        self.state.join("new")
    }
    pub(super) fn gone(&self) -> PathBuf {
        self.state.join("gone")
    }
}

fn take_lock(state: &Path) -> Result<std::os::fd::OwnedFd> {
    let path = state.join("lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd =
        openat(CWD, &path, flags, Mode::from_raw_mode(0o600)).map_err(|e| Error::sys("open lock", show(&path), e))?;
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(fd),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(Errno::WOULDBLOCK) => {
                let why = "another snapshotter runs on this state directory";
                return Err(Error::new(Kind::Busy, "start snapshotter", show(state), why)
                    .hint("stop that one, or give this one a directory of its own with --state"));
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::sys("lock", show(&path), e)),
        }
    }
}
