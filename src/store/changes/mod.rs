//! What was changed upon an image: an upper directory, read as the kernel's overlayfs or the writable FUSE tree wrote it.
//!
//! [`Upper::write_layer`] makes a layer of it, as an archive that every engine reads; [`Upper::list`] says what is new, changed and gone. One walk
//! ([`walk`]) feeds both, in an order that depends on names alone: one upper directory gives one archive.
//!
//! A container wrote what is in there, and may go on to write. So everything is opened below the upper's own descriptor, no symlink is followed, and
//! what is not as it was a moment ago is an error.

mod below;
#[cfg(feature = "containerd")]
mod indexed;
mod layer;
mod list;
mod owners;
mod walk;

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};

pub(crate) use below::Below;
pub use list::{Change, Changed};

use super::limits::Limits;
use crate::error::{Error, Result, show};
use crate::plan::Ownership;
use crate::tree::image::ImageTree;

/// In which form an upper directory has its marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marks {
    /// `trusted.overlay.`: mounted in the machine's first user namespace.
    Trusted,
    /// `user.overlay.`: mounted with the option `userxattr`. On the other sort of mount a program inside may have set those itself: they mean nothing there.
    User,
    /// As [`crate::tree::upper`] reads and writes them: every form that there is, and owners that are noted.
    Tree,
}

impl Marks {
    /// What is elsewhere than here: a directory's lower entries, a file's content. Our mounts make none of these.
    fn elsewhere(self) -> &'static [&'static CStr] {
        match self {
            Marks::Trusted => &[c"trusted.overlay.redirect", c"trusted.overlay.metacopy"],
            Marks::User => &[c"user.overlay.redirect", c"user.overlay.metacopy"],
            Marks::Tree => &[],
        }
    }
}

/// An upper directory.
#[derive(Debug)]
pub(crate) struct Upper {
    root: OwnedFd,
    /// For messages.
    at: PathBuf,
    marks: Marks,
    /// Ids of the image, as the files have them. They are turned back.
    owners: Ownership,
    limits: Limits,
    /// Has the content of files that changed in attributes or names alone.
    image: Option<ImageTree>,
}

impl Upper {
    /// The one at `at`, which lies in a directory of ours.
    pub(crate) fn open(at: &Path, marks: Marks, owners: Ownership, limits: &Limits) -> Result<Self> {
        Upper::open_in(rustix::fs::CWD, at, at, marks, owners, limits)
    }

    /// The one of this name in a directory; messages call it `at`.
    pub(crate) fn open_in(
        dir: impl AsFd,
        name: impl rustix::path::Arg,
        at: &Path,
        marks: Marks,
        owners: Ownership,
        limits: &Limits,
    ) -> Result<Self> {
        let root =
            openat(dir, name, walk::OPEN_DIR, Mode::empty()).map_err(|e| Error::sys("open changes", show(at), e))?;
        Ok(Upper { root, at: at.to_owned(), marks, owners, limits: limits.clone(), image: None })
    }

    /// Upon this image.
    pub(crate) fn upon(self, image: ImageTree) -> Self {
        Upper { image: Some(image), ..self }
    }

    /// The regular files in it, by their paths below the root.
    pub(crate) fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Files(Vec::new());
        self.walk(&mut files)?;
        Ok(files.0)
    }
}

struct Files(Vec<PathBuf>);

impl walk::Visitor for Files {
    fn found(&mut self, found: &walk::Found<'_>) -> Result<()> {
        if matches!(found.is, walk::Is::File { .. }) {
            self.0.push(OsStr::from_bytes(found.path).into());
        }
        Ok(())
    }

    fn hidden(&mut self, _path: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// For a file: not the program's terminal, and no wait for a FIFO's other end.
const OPEN_FILE: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::NOCTTY).union(OFlags::CLOEXEC);

#[cfg(test)]
mod tests;
