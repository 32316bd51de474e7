//! What a user asks for, parsed and not looked up: no path in it has been followed yet.

use std::path::PathBuf;

use crate::error::show;
use crate::id::{ContainerId, ImageRef};
use crate::plan::{BackendKind, Live, Ownership, Restraint};
use crate::sys::process::ProcessId;
use crate::volume::VolumeSpec;

/// What a user asks for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Request {
    /// Which image.
    pub image: ImageRef,
    /// Where to mount it; made (mode 0700) if missing, and then removed again by [`super::Provisioner::destroy`].
    pub rootfs: PathBuf,
    /// May a directory that is not empty be mounted over?
    pub cover: Cover,
    /// Which backend; `None`: the first that can, of bind, overlay and fuse.
    pub backend: Option<BackendKind>,
    /// The executor work directory: relative volume sources lie below it. Made (mode 0755) if missing; it stays.
    pub sandbox: Option<PathBuf>,
    /// Volumes, in any order.
    pub volumes: Vec<VolumeSpec>,
    /// The rootfs's id; `None`: a random one.
    pub id: Option<ContainerId>,
    /// How the image's ownership is presented; `None`: as it is, but to an ordinary user the image's root as this user, and the rest as
    /// the user's subordinate ids.
    pub ownership: Option<Ownership>,
    /// Are mount points that engines make to be there in a read-only rootfs (fuse)?
    pub stubs: bool,
    /// How volumes are served (fuse).
    pub live: Live,
    /// What may be changed outside the volumes.
    pub changes: Changes,
    /// Where changes are kept that do not end with the rootfs: made (mode 0700) if missing. `None`: they end with it.
    pub upper: Option<PathBuf>,
    /// What of the image's setuid programs and device nodes may work; what is not said is held back where other users of the host
    /// reach the rootfs.
    pub restraint: Restraint,
    /// The process that it ends with; `None`: it stays until it is taken away.
    pub(crate) ends_with: Option<ProcessId>,
}

impl Request {
    /// An image at a mount point, and nothing else: the fields say what else may be asked for, and the methods ask for it.
    pub fn new(image: ImageRef, rootfs: impl Into<PathBuf>) -> Self {
        Request {
            image,
            rootfs: rootfs.into(),
            cover: Cover::default(),
            backend: None,
            sandbox: None,
            volumes: Vec::new(),
            id: None,
            ownership: None,
            stubs: false,
            live: Live::default(),
            changes: Changes::default(),
            upper: None,
            restraint: Restraint::default(),
            ends_with: None,
        }
    }

    /// With this volume, too.
    #[must_use]
    pub fn volume(mut self, volume: VolumeSpec) -> Self {
        self.volumes.push(volume);
        self
    }

    /// Sources of volumes that are bare names lie below this directory.
    #[must_use]
    pub fn sandbox(self, sandbox: impl Into<PathBuf>) -> Self {
        Request { sandbox: Some(sandbox.into()), ..self }
    }

    /// By this backend and no other.
    #[must_use]
    pub fn backend(self, backend: BackendKind) -> Self {
        Request { backend: Some(backend), ..self }
    }

    /// With this id.
    #[must_use]
    pub fn id(self, id: ContainerId) -> Self {
        Request { id: Some(id), ..self }
    }

    /// Everything may be changed; what was changed ends with the rootfs.
    #[must_use]
    pub fn writable(self) -> Self {
        Request { changes: Changes::Ephemeral, ..self }
    }

    /// Everything may be changed; what was changed is kept below this directory, and is there for the next rootfs that is told it.
    #[must_use]
    pub fn upper(self, upper: impl Into<PathBuf>) -> Self {
        Request { changes: Changes::Ephemeral, upper: Some(upper.into()), ..self }
    }
}

/// What becomes of a mount point with something in it, which the rootfs would hide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cover {
    /// It is refused.
    #[default]
    Refuse,
    /// It is mounted over.
    Allow,
}

/// What may be changed in a rootfs outside its volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Changes {
    /// Nothing, except in a copy.
    #[default]
    Refused,
    /// Everything; what was changed ends with the rootfs, unless [`Request::upper`] says where it is kept.
    Ephemeral,
}

/// Which rootfs: by id, or by where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Selector {
    /// By id.
    Id(ContainerId),
    /// By mount point.
    Rootfs(PathBuf),
}

impl Selector {
    /// An argument `ROOTFS|ID`: a path when it holds a `/` or is `.` or `..`, else an id if it can be one.
    pub fn parse(text: &std::ffi::OsStr) -> Self {
        let id = text.to_str().and_then(|t| t.parse().ok());
        match id {
            Some(id) => Selector::Id(id),
            None => Selector::Rootfs(PathBuf::from(text)),
        }
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Selector::Id(id) => id.fmt(f),
            Selector::Rootfs(path) => f.write_str(&show(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_with_a_slash_is_a_path() {
        let id = |t: &str| matches!(Selector::parse(t.as_ref()), Selector::Id(_));
        assert!(id("abc") && id("a.b-c"));
        assert!(!id("./abc") && !id("/abc") && !id(".") && !id("..") && !id("a b"));
    }
}
