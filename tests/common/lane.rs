//! A lane is one backend for one identity: every backend case runs on every lane that it fits.

use std::ffi::OsStr;
use std::process::Command;

use super::Need;

/// Which half of the suite: `tests/privileged.rs` or `tests/unprivileged.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Privileged,
    Unprivileged,
}

/// Who runs the case, and in which namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Enter {
    /// Root of the first user namespace, in a mount namespace of the case's own.
    Root,
    /// An ordinary user, no namespace: FUSE mounts go through fusermount3.
    User,
    /// An ordinary user in `unshare -Urm`: root of a user namespace that owns its mount namespace.
    Userns,
}

impl Enter {
    /// The command that runs `program` so.
    pub(crate) fn command(self, program: &OsStr) -> Command {
        let with = |args: &[&str]| {
            let mut command = Command::new(args[0]);
            command.args(&args[1..]).arg(program);
            command
        };
        match self {
            Enter::Root => with(&["unshare", "--mount", "--propagation", "private"]),
            Enter::User => Command::new(program),
            Enter::Userns => with(&["unshare", "--user", "--map-root-user", "--mount"]),
        }
    }
}

/// One backend for one identity; or no backend, for what is the same whichever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lane {
    pub(crate) name: &'static str,
    pub(crate) half: Half,
    pub(crate) enter: Enter,
    /// The word for `--backend`; empty where a case picks its own.
    pub(crate) backend: &'static str,
}

const fn lane(name: &'static str, half: Half, enter: Enter, backend: &'static str) -> Lane {
    Lane { name, half, enter, backend }
}

/// Every lane. A new backend is a line here.
pub(crate) const LANES: &[Lane] = &[
    lane("root", Half::Privileged, Enter::Root, ""),
    lane("bind-root", Half::Privileged, Enter::Root, "bind"),
    lane("fuse-root", Half::Privileged, Enter::Root, "fuse"),
    lane("overlay-root", Half::Privileged, Enter::Root, "overlay"),
    lane("copy-root", Half::Privileged, Enter::Root, "copy"),
    lane("user", Half::Unprivileged, Enter::User, ""),
    lane("fuse-user", Half::Unprivileged, Enter::User, "fuse"),
    lane("fuse-userns", Half::Unprivileged, Enter::Userns, "fuse"),
    lane("bind-userns", Half::Unprivileged, Enter::Userns, "bind"),
    lane("overlay-userns", Half::Unprivileged, Enter::Userns, "overlay"),
    lane("copy-user", Half::Unprivileged, Enter::User, "copy"),
];

impl Lane {
    pub(crate) fn is_fuse(&self) -> bool {
        self.backend == "fuse"
    }

    /// A copy's volumes are bind mounts, which an ordinary user may not make.
    pub(crate) fn has_volumes(&self) -> bool {
        self.backend != "copy" || self.enter != Enter::User
    }

    /// True where device nodes can be made and any owner set.
    pub(crate) fn is_real_root(&self) -> bool {
        self.enter == Enter::Root
    }

    pub(crate) fn needs(&self) -> Vec<Need> {
        let mut needs = match self.enter {
            Enter::Root => vec![Need::Root],
            Enter::User => vec![Need::NotRoot],
            Enter::Userns => vec![Need::NotRoot, Need::UserNamespaces],
        };
        if self.is_fuse() {
            needs.push(Need::DevFuse);
            if self.enter == Enter::User {
                needs.push(Need::Tool("fusermount3"));
            }
        }
        if self.backend == "overlay" {
            needs.push(Need::MountCalls);
        }
        needs
    }
}
