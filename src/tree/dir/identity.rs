//! Acting as the caller: file system ids, supplementary groups and umask of the thread that works on a request.
//!
//! With the capability to do so (root, or root of a user namespace) the server takes on the caller's ids for what makes or
//! changes something, so that the kernel decides and owns as it would without a server in between. As a plain user it cannot:
//! then everything is done as that user, and the kernel's check against the presented modes (default_permissions) is what holds.

use std::cell::Cell;
use std::sync::LazyLock;

use rustix::fs::Mode;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities, set_thread_groups};

use super::groups;
use crate::sys::process::in_initial_user_namespace;
use crate::sys::raw;
use crate::tree::{Caller, Errno, Result, Writer};

/// setfsuid(2) of this changes nothing and tells the id in force.
const ASK: u32 = u32::MAX;

/// Whose ids a directory tree acts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActAs {
    /// The server's own.
    Server,
    /// Each caller's.
    Caller,
}

impl ActAs {
    /// The caller's where this process may switch (effective CAP_SETUID and CAP_SETGID), else the server's own.
    pub fn detect() -> Self {
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
        match capabilities(None) {
            Ok(sets) if sets.effective.contains(needed) => ActAs::Caller,
            _ => ActAs::Server,
        }
    }

    /// Do `work` as the caller. It is tried again with the caller's supplementary groups if it is refused without them, so it
    /// must be something that a refusal leaves undone: one system call.
    pub(super) fn run<T>(self, caller: &Caller, work: impl Fn() -> Result<T>) -> Result<T> {
        if self == ActAs::Server || (caller.uid == 0 && caller.gid == 0) {
            return work();
        }
        let _ids = Ids::take(caller)?;
        match work() {
            Err(refused @ (Errno::ACCESS | Errno::PERM | Errno::NOSPC)) => {
                // Reading the groups costs as much as the rest of a request. What is denied to a group but allowed to all
                // others was checked by the kernel before the request came (default_permissions). A full ext4 may keep
                // blocks for a group (mount option resgid).
                let Some(_groups) = Groups::take(caller) else {
                    return Err(refused);
                };
                work()
            }
            other => other,
        }
    }

    /// The same with the caller's groups from the start: where the outcome, not only the permission, depends on them.
    pub(super) fn run_with_groups<T>(self, caller: &Caller, work: impl Fn() -> Result<T>) -> Result<T> {
        if self == ActAs::Server || (caller.uid == 0 && caller.gid == 0) {
            return work();
        }
        let _ids = Ids::take(caller)?;
        let _groups = Groups::take(caller);
        work()
    }
}

impl ActAs {
    /// Do `work`, which changes a file's content, as the writer. Like [`ActAs::run`] it may be tried twice.
    ///
    /// The blocks that a file system keeps for root are root's, and setuid and setgid go, as without a server in between.
    pub(super) fn run_write<T>(self, writer: &Writer, work: impl Fn() -> Result<T>) -> Result<T> {
        match writer {
            Writer::Trusted => work(),
            Writer::Ordinary(caller) if self == ActAs::Caller && caller.uid != 0 => self.run(caller, work),
            // A root without CAP_FSETID; or nobody's ids can be taken on.
            Writer::Ordinary(_) => without_set_id_privilege(work),
        }
    }
}

/// Does CAP_FSETID keep setuid and setgid of a file that is written? Only that of the initial user namespace, except for a setgid that nobody can
/// run the file with (setattr_should_drop_suidgid in fs/attr.c).
static FSETID_COUNTS: LazyLock<bool> = LazyLock::new(|| in_initial_user_namespace().unwrap_or(true));

/// Read from /proc what is asked later, while it is still readable.
pub(crate) fn look_around() {
    LazyLock::force(&FSETID_COUNTS);
}

/// Do `work` without CAP_FSETID, so that the file system takes setuid and setgid away as it does for an ordinary writer.
fn without_set_id_privilege<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    if NO_FSETID.get() || !*FSETID_COUNTS {
        return work();
    }
    let Ok(sets) = capabilities(None) else { return work() };
    if !sets.effective.contains(CapabilitySet::FSETID) {
        // For good, where it is not permitted either: this program enters no user namespace and executes nothing in its place.
        NO_FSETID.set(!sets.permitted.contains(CapabilitySet::FSETID));
        return work();
    }
    let mut without = sets;
    without.effective.remove(CapabilitySet::FSETID);
    if set_capabilities(None, without).is_err() {
        return work();
    }
    let result = work();
    if let Err(e) = set_capabilities(None, sets) {
        log::error!(target: "fsprov::tree::dir", "put CAP_FSETID back: {e}; set-group-id may be lost on later requests");
    }
    result
}

/// This thread's file system ids are the caller's until this is dropped.
struct Ids {
    uid: u32,
    gid: u32,
}

impl Ids {
    fn take(caller: &Caller) -> Result<Self> {
        if !GROUPS_DROPPED.get() {
            // The server's own supplementary groups must not help a caller.
            match set_thread_groups(&[]) {
                // EPERM: a user namespace whose setgroups file says deny; the groups are those of its one user.
                Ok(()) | Err(Errno::PERM) => GROUPS_DROPPED.set(true),
                Err(e) => return Err(e),
            }
        }
        // The group first: afterwards the capability to set it is gone.
        let gid = raw::set_fs_gid(caller.gid);
        let uid = raw::set_fs_uid(caller.uid);
        let taken = Ids { uid, gid };
        // The call tells nothing when an id cannot be set (one that this user namespace does not map, which does not change).
        if TAKEN_BEFORE.get() != Some((caller.uid, caller.gid)) {
            if raw::set_fs_uid(ASK) != caller.uid || raw::set_fs_gid(ASK) != caller.gid {
                return Err(Errno::PERM);
            }
            TAKEN_BEFORE.set(Some((caller.uid, caller.gid)));
        }
        Ok(taken)
    }
}

impl Drop for Ids {
    fn drop(&mut self) {
        raw::set_fs_uid(self.uid);
        raw::set_fs_gid(self.gid);
    }
}

/// This thread's supplementary groups are the caller's until this is dropped; then it has none.
struct Groups;

impl Groups {
    fn take(caller: &Caller) -> Option<Self> {
        let groups = groups::of_thread(caller.pid)?;
        match set_thread_groups(&groups) {
            Ok(()) => Some(Groups),
            Err(e) => {
                // A user namespace whose setgroups file says deny.
                log::debug!(target: "fsprov::tree::dir", "take on the groups of thread {}: {e}", caller.pid);
                None
            }
        }
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        // Never the server's own: no request is decided by those.
        let _ = set_thread_groups(&[]);
    }
}

thread_local! {
    /// True where this thread has given up the supplementary groups that the server was started with.
    static GROUPS_DROPPED: Cell<bool> = const { Cell::new(false) };
    /// Uid and gid that this thread took on last: every write takes them on, and asks whether they hold only once.
    static TAKEN_BEFORE: Cell<Option<(u32, u32)>> = const { Cell::new(None) };
    /// True where this thread has no CAP_FSETID and can get none: each write of an ordinary user would ask.
    static NO_FSETID: Cell<bool> = const { Cell::new(false) };
    /// The umask of this thread, once it is its own.
    static UMASK: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Do `work` under the caller's umask: the file system applies it, or a default ACL in its place (acl(5)).
/// `work` gets the mode bits to take away by itself, where the umask cannot be this thread's own.
pub(super) fn with_umask<T>(umask: u32, work: impl FnOnce(u32) -> T) -> T {
    let mine = UMASK.get().or_else(|| {
        // A umask belongs to the process until CLONE_FS is undone for this thread.
        raw::unshare_fs()
            .ok()
            .map(|()| rustix::process::umask(Mode::empty()).as_raw_mode())
            .inspect(|_| UMASK.set(Some(0)))
    });
    let Some(_) = mine else {
        return work(umask);
    };
    if UMASK.get() != Some(umask) {
        rustix::process::umask(Mode::from_raw_mode(umask));
        UMASK.set(Some(umask));
    }
    work(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn the_umask_of_the_request_holds_and_no_other_threads() {
        let dir = tempfile::tempdir().unwrap();
        for (umask, want) in [(0, 0o666), (0o27, 0o640), (0o77, 0o600), (0o27, 0o640)] {
            let path = dir.path().join(format!("{umask:o}{want:o}"));
            let _ = std::fs::remove_file(&path);
            with_umask(umask, |_| std::fs::File::create(&path).unwrap());
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, want);
        }
        let other = dir.path().join("other");
        std::thread::scope(|s| {
            s.spawn(|| with_umask(0o777, |_| ()));
            s.spawn(|| with_umask(0, |_| std::fs::File::create(&other).unwrap()));
        });
        assert_eq!(std::fs::metadata(&other).unwrap().mode() & 0o777, 0o666);
    }

    #[test]
    fn a_file_made_for_a_caller_is_the_callers() {
        if ActAs::detect() == ActAs::Server {
            return crate::lacks("root: an ordinary user cannot act as another");
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(4321), Some(4322)).unwrap();
        let caller = Caller { uid: 4321, gid: 4322, pid: 0 };
        let path = dir.path().join("f");
        ActAs::Caller.run(&caller, || std::fs::write(&path, b"").map_err(|_| Errno::ACCESS)).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (4321, 4322));
        let stranger = Caller { uid: 999, gid: 999, pid: 0 };
        let denied = ActAs::Caller.run(&stranger, || {
            std::fs::write(dir.path().join("g"), b"").map_err(|e| Errno::from_io_error(&e).unwrap())
        });
        assert_eq!(denied, Err(Errno::ACCESS));
        std::fs::write(dir.path().join("h"), b"").unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("h")).unwrap().uid(), 0);
    }
}
