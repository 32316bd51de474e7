//! The only place with `unsafe`: one call a block, its SAFETY line says why it is sound.
#![allow(unsafe_code)]

// ---- tree::dir: identity of a thread, closing with its error ----

/// setfsuid(2) for this thread; gives the id that was in force before. glibc's wrapper is the bare call: one thread only.
pub fn set_fs_uid(uid: u32) -> u32 {
    // SAFETY: no memory is passed; an id that may not be set is ignored by the kernel.
    unsafe { libc::setfsuid(uid) as u32 }
}

/// setfsgid(2) for this thread; gives the id that was in force before.
pub fn set_fs_gid(gid: u32) -> u32 {
    // SAFETY: no memory is passed; an id that may not be set is ignored by the kernel.
    unsafe { libc::setfsgid(gid) as u32 }
}

/// unshare(2) CLONE_FS: a working directory and a umask of this thread's own.
pub fn unshare_fs() -> rustix::io::Result<()> {
    // SAFETY: no descriptor table is unshared, so no thread loses sight of a descriptor.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }
}

/// close(2), with its error: where NFS, FUSE and quota report what became of delayed writes. The descriptor is gone either way.
pub fn close(fd: std::os::fd::OwnedFd) -> rustix::io::Result<()> {
    let raw = std::os::fd::IntoRawFd::into_raw_fd(fd);
    // SAFETY: the descriptor was ours alone, by value, and nobody uses it after this.
    match unsafe { libc::close(raw) } {
        0 => Ok(()),
        _ => Err(rustix::io::Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(rustix::io::Errno::IO)),
    }
}
