//! The only place with `unsafe`: one call a block, its SAFETY line says why it is sound.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::io::Errno;

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

// ---- mount.rs ----

/// mount_setattr(2) (Linux 5.12) on the mount that `tree` refers to, and with `recursive` on all below it.
pub(crate) fn mount_setattr(tree: impl AsFd, recursive: bool, attr: &libc::mount_attr) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a static C string, `attr` is a live `mount_attr` and its size is passed with it; the kernel only
    // reads both.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(last_errno()) }
}

/// struct mnt_id_req (linux/mount.h, Linux 6.8).
#[repr(C)]
struct MountIdRequest {
    size: u32,
    spare: u32,
    mnt_id: u64,
    param: u64,
}

/// The beginning of struct statmount (linux/mount.h, Linux 6.8), up to what STATMOUNT_MNT_BASIC fills.
#[repr(C)]
struct StatMount {
    size: u32,
    mnt_opts: u32,
    mask: u64,
    sb_dev_major: u32,
    sb_dev_minor: u32,
    sb_magic: u64,
    sb_flags: u32,
    fs_type: u32,
    mnt_id: u64,
    mnt_parent_id: u64,
    mnt_id_old: u32,
    mnt_parent_id_old: u32,
    rest: [u64; 58],
}

/// statmount(2) (Linux 6.8): the id in the mount table of the mount of this unique id. ENOENT: it is not in this namespace.
pub(crate) fn statmount_id(unique: u64) -> Result<u64, Errno> {
    const STATMOUNT_MNT_BASIC: u64 = 2;
    // The same on every architecture (arch/*/syscall.tbl); the libc crate has it for some.
    const SYS_STATMOUNT: libc::c_long = 457;
    let request = MountIdRequest {
        size: size_of::<MountIdRequest>() as u32,
        spare: 0,
        mnt_id: unique,
        param: STATMOUNT_MNT_BASIC,
    };
    // SAFETY: it is made of plain numbers, for which zero is a value.
    let mut told: StatMount = unsafe { std::mem::zeroed() };
    // SAFETY: both are live for the call; the kernel reads the size it is told of the first and writes at most the size it is told
    // to the second, which holds plain numbers.
    let done = unsafe {
        libc::syscall(
            SYS_STATMOUNT,
            std::ptr::from_ref(&request),
            std::ptr::from_mut(&mut told),
            size_of::<StatMount>(),
            0,
        )
    };
    match done {
        0 if told.mask & STATMOUNT_MNT_BASIC != 0 => Ok(told.mnt_id_old.into()),
        0 => Err(Errno::NOSYS),
        _ => Err(last_errno()),
    }
}

/// listmount(2) (Linux 6.8): the unique ids of all mounts below the one of this unique id.
pub(crate) fn listmount(unique: u64) -> Result<Vec<u64>, Errno> {
    const SYS_LISTMOUNT: libc::c_long = 458;
    let mut all = Vec::new();
    let mut some = [0_u64; 256];
    loop {
        // The parameter is the last id that was told: go on after it.
        let param = all.last().copied().unwrap_or(0);
        let request = MountIdRequest { size: size_of::<MountIdRequest>() as u32, spare: 0, mnt_id: unique, param };
        // SAFETY: both are live for the call; the kernel writes at most as many numbers as it is told that there is room for.
        let count =
            unsafe { libc::syscall(SYS_LISTMOUNT, std::ptr::from_ref(&request), some.as_mut_ptr(), some.len(), 0) };
        match usize::try_from(count) {
            Err(_) => return Err(last_errno()),
            Ok(count) => all.extend_from_slice(&some[..count]),
        }
        if count < some.len() as i64 {
            return Ok(all);
        }
    }
}

// ---- process.rs ----

/// fork(2) into new namespaces. `Ok(None)` is the child: it may call nothing but async-signal-safe system calls.
fn fork_into(namespaces: libc::c_int) -> Result<Option<rustix::process::Pid>, Errno> {
    // SAFETY: without CLONE_VM this is fork(2): the child has its own copy of memory and a stack of its own (null: the same
    // address in the copy). The callers below, in this file, let it make system calls and _exit, nothing else.
    let pid = unsafe { libc::syscall(libc::SYS_clone, namespaces | libc::SIGCHLD, 0, 0, 0, 0) };
    if pid < 0 {
        return Err(last_errno());
    }
    Ok(rustix::process::Pid::from_raw(pid as i32))
}

/// fork(2) into a new user namespace; the child does nothing but wait until `hold` (the read end of a pipe of which the
/// parent keeps the only write end) ends, with every other descriptor closed.
pub(crate) fn fork_in_user_namespace(hold: &OwnedFd, writer: &OwnedFd) -> Result<rustix::process::Pid, Errno> {
    let (hold, writer) = (hold.as_raw_fd(), writer.as_raw_fd());
    fork_into(libc::CLONE_NEWUSER)?.map_or_else(|| wait_for_end_and_exit(hold, writer), Ok)
}

/// fork(2) into a new user and mount namespace; the child makes `/` private there and ends with the errno of that, 0 if it
/// was allowed.
pub(crate) fn fork_and_mount_in_user_namespace() -> Result<rustix::process::Pid, Errno> {
    fork_into(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)?.map_or_else(|| make_root_private_and_exit(), Ok)
}

fn make_root_private_and_exit() -> ! {
    let none = std::ptr::null();
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: strings are static or null, which this operation allows (mount(2)); it happens in a namespace of its own.
    let done = unsafe { libc::mount(none, c"/".as_ptr(), none, flags, std::ptr::null()) };
    // SAFETY: the address of this thread's errno is always valid.
    let errno = if done == 0 { 0 } else { unsafe { *libc::__errno_location() } };
    // SAFETY: _exit(2) ends the process without running anything of the parent's.
    unsafe { libc::_exit(errno) }
}

fn wait_for_end_and_exit(hold: i32, writer: i32) -> ! {
    // SAFETY: close(2) of a descriptor of this process's own table; nothing else runs here.
    unsafe { libc::close(writer) };
    // Other descriptors (locks, /dev/fuse) must not live on in this child should the parent die. Linux 5.9; without it they
    // last as long as the child does.
    for (first, last) in [(0, hold - 1), (hold + 1, i32::MAX)] {
        if first <= last {
            // SAFETY: close_range(2) touches this process's own table only.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
    let mut byte = 0_u8;
    loop {
        // SAFETY: reads at most one byte into a live one.
        let got = unsafe { libc::read(hold, (&raw mut byte).cast(), 1) };
        // SAFETY: the address of this thread's errno is always valid.
        let interrupted = got < 0 && unsafe { *libc::__errno_location() } == libc::EINTR;
        if !interrupted {
            break;
        }
    }
    // SAFETY: _exit(2) ends the process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

// ---- index and image tree: mappings ----

/// Map a whole file, shared and read-only.
pub fn map_file(file: impl AsFd) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is read-only and its owner keeps it as long as it borrows from it. A file that someone changes
    // beneath it shows other bytes, which every reader of ours checks or hands on; one that shrinks is SIGBUS for who
    // touches it, which the callers' docs speak of.
    unsafe { memmap2::MmapOptions::new().map(file.as_fd().as_raw_fd()) }
}

/// Map `length` bytes from `offset` (a multiple of the page size) of a file, shared and read-only.
pub fn map_range(file: impl AsFd, offset: u64, length: usize) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: as for `map_file`.
    unsafe { memmap2::MmapOptions::new().offset(offset).len(length).map(file.as_fd().as_raw_fd()) }
}

/// Map `length` bytes from `offset` (a multiple of the page size) of a file, shared, to be written.
pub fn map_writable(file: impl AsFd, offset: u64, length: usize) -> std::io::Result<memmap2::MmapMut> {
    // SAFETY: as for `map_file`; the caller writes to a memory file that no other process changes while it is mapped, and whose
    // pages are there already.
    unsafe { memmap2::MmapOptions::new().offset(offset).len(length).map_mut(file.as_fd().as_raw_fd()) }
}

/// Have the pages of `bytes` bytes there, writable, from `before` bytes before `inside` on (madvise(2) MADV_POPULATE_WRITE, Linux 5.14).
pub(crate) fn populate_around(inside: &[u8], before: usize, bytes: usize) -> Result<(), Errno> {
    let start = inside.as_ptr().wrapping_sub(before);
    let into_page = start.addr() % rustix::param::page_size();
    let start = start.wrapping_sub(into_page).cast_mut().cast();
    // SAFETY: no content is changed; what is not mapped, or not writable, is an error.
    unsafe { rustix::mm::madvise(start, bytes + into_page, rustix::mm::Advice::LinuxPopulateWrite) }
}

/// Words of memory in a file, shared by all who map it, and left there by those who are gone.
#[derive(Debug)]
pub struct SharedWords(memmap2::MmapRaw);

impl SharedWords {
    /// The first `count` words of a file, which is made as long as that.
    pub fn map(file: impl AsFd, count: usize) -> std::io::Result<Self> {
        let length = count * size_of::<u64>();
        // Their memory is taken here, where its want is an error and no SIGBUS at a touch.
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length as u64)?;
        memmap2::MmapOptions::new().len(length).map_raw(file.as_fd().as_raw_fd()).map(SharedWords)
    }

    /// One of them. Panics behind the last one.
    pub fn at(&self, word: usize) -> &AtomicU64 {
        assert!((word + 1) * size_of::<u64>() <= self.0.len(), "word {word} of {} bytes", self.0.len());
        #[allow(clippy::cast_ptr_alignment, reason = "mappings begin at a page")]
        let first = self.0.as_mut_ptr().cast::<u64>();
        // SAFETY: aligned, as mappings begin at a page; within the mapping, as was just checked, which lives as long as the borrow; others
        // access it atomically too, or are other processes.
        unsafe { AtomicU64::from_ptr(first.add(word)) }
    }
}

/// Take the pages of a file mapping out of this process's page table (madvise(2) MADV_DONTNEED); they stay in the page
/// cache and come back at the next touch.
pub fn drop_resident(map: &memmap2::Mmap) -> std::io::Result<()> {
    // SAFETY: for a shared file mapping MADV_DONTNEED changes no content: the next access reads the same file.
    unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) }
}

// ---- tree::dir: memory, identity of a thread, closing with its error ----

/// Fixes what mallopt(3) calls M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at their first values, 128 KiB. Left alone they grow with
/// what was freed, to 32 and 64 MiB, and so much is then kept at the end of each arena for good.
pub fn fix_malloc_thresholds() {
    // SAFETY: both take a number.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 << 10);
    };
}

/// malloc_trim(3): the allocator's free pages go back to the kernel, also those before what is in use. Other C libraries do that by
/// themselves or not at all.
pub fn give_back_memory() {
    // SAFETY: no memory is passed, and what is in use is not touched.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// SIGCHLD as it is by default. A parent may have ignored it, which execve(2) keeps: then no child can be waited for (ECHILD).
pub(crate) fn wait_for_children() {
    // SAFETY: no handler is installed, and no memory is passed.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

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

/// Does a process go into a new user namespace?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Users {
    /// No.
    Same,
    /// Yes: it has every capability there, until it gives them up.
    New,
}

/// unshare(2) CLONE_NEWNS: a mount namespace of this process's own. Only while it has one thread.
pub(crate) fn unshare_mounts(users: Users) -> rustix::io::Result<()> {
    let mut flags = rustix::thread::UnshareFlags::NEWNS;
    flags.set(rustix::thread::UnshareFlags::NEWUSER, users == Users::New);
    // SAFETY: no descriptor table is unshared, so no thread loses sight of a descriptor.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// unshare(2) CLONE_NEWNS and CLONE_NEWCGROUP: a mount and a cgroup namespace of this thread's own, and its children's.
pub(crate) fn unshare_mounts_and_cgroups() -> rustix::io::Result<()> {
    let flags = rustix::thread::UnshareFlags::NEWNS | rustix::thread::UnshareFlags::NEWCGROUP;
    // SAFETY: no descriptor table is unshared, so no thread loses sight of a descriptor.
    unsafe { rustix::thread::unshare_unsafe(flags) }
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

// ---- daemon ----

/// close_range(2) (Linux 5.9) of every descriptor from `first` on. Only for a program's first steps: the owner of one of them
/// loses it.
pub(crate) fn close_from(first: u32) -> Result<(), Errno> {
    // SAFETY: touches this process's own table only; the caller is the start of a program, before it opened anything.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if done == 0 { Ok(()) } else { Err(last_errno()) }
}

/// fork(2); the parent ends at once with status 0, so that the child belongs to nobody. Returns in the child.
///
/// Only while this process has one thread: the child is a copy of the caller's.
pub(crate) fn fork_and_leave() -> Result<(), Errno> {
    // SAFETY: the callers are the first steps of a program, before it has a second thread: no lock can be held by a thread
    // that the child has not.
    match unsafe { libc::fork() } {
        0 => Ok(()),
        pid if pid < 0 => Err(last_errno()),
        // SAFETY: _exit(2) ends the process; what buffers it has are the child's too.
        _ => unsafe { libc::_exit(0) },
    }
}

/// dup3(2) of `source` over the number `target`, which stays its owner's and now means `source`'s file.
pub(crate) fn dup_over(source: impl AsFd, target: RawFd) -> Result<(), Errno> {
    let source = source.as_fd().as_raw_fd();
    // SAFETY: no memory is passed; the target is open, says the caller, and stays open and owned by its owner.
    let done = unsafe { libc::dup3(source, target, libc::O_CLOEXEC) };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Any system call, for the tests that play a worker that was taken over. A pointer among the arguments is one to something that
/// lives, or none.
#[cfg(feature = "failpoints")]
pub(crate) fn any_call(number: libc::c_long, arguments: [usize; 6]) -> Result<usize, Errno> {
    let [first, second, third, fourth, fifth, sixth] = arguments;
    // SAFETY: the caller's affair, as said above; what is asked for changes no memory that is in use.
    let done = unsafe { libc::syscall(number, first, second, third, fourth, fifth, sixth) };
    if done < 0 { Err(last_errno()) } else { Ok(done as usize) }
}

/// The descriptor that a call gave.
#[cfg(feature = "failpoints")]
pub(crate) fn opened(number: Result<usize, Errno>) -> Result<OwnedFd, Errno> {
    // SAFETY: the callers hand on what openat(2) gave just now, which nobody else owns.
    number.map(|number| unsafe { OwnedFd::from_raw_fd(number as i32) })
}

/// getpid(2) as a program of the 32-bit architecture calls it.
#[cfg(feature = "failpoints")]
pub(crate) fn ia32_getpid() {
    // SAFETY: number 20 of that architecture takes no argument and changes eax alone.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!("int 0x80", inlateout("eax") 20 => _, lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _);
    };
}

// ---- cli ----

/// The descriptors that a service manager passed to this process, with their names (sd_listen_fds_with_names(3)); close-on-exec from
/// now on. The first call owns them, later ones get none.
pub(crate) fn passed_fds() -> std::io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds_with_names()?;
    // SAFETY: LISTEN_PID is this process, so its parent passed these for it to own; each was just found open, and is taken
    // once.
    Ok(passed.map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect())
}
