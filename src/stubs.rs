//! Mount points of programs that run others in a rootfs: engines make them where they are missing.

/// What one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stub {
    /// A directory with this mode.
    Directory(u32),
    /// An empty file.
    File,
    /// A symbolic link to there.
    Symlink(&'static str),
}

/// By path, outer before inner: what podman, crun and runc need (seen with podman 4.3 and 5.4).
pub(crate) const STUBS: [(&str, Stub); 12] = [
    ("/dev", Stub::Directory(0o755)),
    ("/etc/hostname", Stub::File),
    ("/etc/hosts", Stub::File),
    ("/etc/mtab", Stub::Symlink("/proc/mounts")),
    ("/etc/resolv.conf", Stub::File),
    ("/proc", Stub::Directory(0o755)),
    ("/run", Stub::Directory(0o755)),
    ("/run/.containerenv", Stub::File),
    ("/run/secrets", Stub::Directory(0o755)),
    ("/sys", Stub::Directory(0o755)),
    ("/tmp", Stub::Directory(0o1777)),
    ("/var/tmp", Stub::Directory(0o1777)),
];

/// The one at a path below the root.
pub(crate) fn at(path: &[u8]) -> Option<Stub> {
    STUBS.iter().find(|(stub, _)| stub.as_bytes()[1..] == *path).map(|(_, stub)| *stub)
}
