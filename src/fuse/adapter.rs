//! From a [`Tree`] to fuser's `Filesystem`: every request is counted, every panic becomes EIO for that request alone.
//!
//! Must not know images, volumes or mounts. What the kernel is asked to cache follows from the tree ([`Tree::is_live`],
//! [`Tree::is_without_xattrs`]) and from [`AdapterOptions`].

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dashmap::DashSet;
use fuser::{INodeNo, InitFlags, KernelConfig, Notifier, Request};

use super::buffers::Buffers;
use super::counters::{Counters, Operation};
use super::inflight::Notes;
use super::pace::Pace;
use crate::fault;
use crate::tree::resend::{self, CurrentRequest};
use crate::tree::{Caching, Caller, Opened, Result, Tree, Writer};

pub(super) const TARGET: &str = "fsprov::fuse";

/// Largest write: the most the kernel sends in one request (FUSE_MAX_MAX_PAGES, 256 pages).
const MAX_WRITE: u32 = 1 << 20;
/// Longest request where files are written: such a write, and its header.
pub const MAX_REQUEST: usize = MAX_WRITE as usize + 4096;
/// Requests that the kernel keeps waiting in the background (readahead, direct I/O): enough for several readers at once,
/// few enough that a foreground request is not behind hundreds. The kernel's own default, 12, starves two readers.
const MAX_BACKGROUND: u16 = 64;

/// What an adapter asks of the kernel beyond what follows from the tree.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdapterOptions {
    /// Writes gather in the kernel (FUSE_WRITEBACK_CACHE): faster small writes, seen late by readers on the host.
    pub writeback: bool,
    /// The kernel evaluates POSIX ACLs (FUSE_POSIX_ACL), at the price of one request for those of each file that somebody
    /// other than its owner uses; of none where no tree has attributes, and then who asks for an ACL gets ENODATA (__fuse_get_acl). Turns `default_permissions` on (process_init_reply in fs/fuse/inode.c): right only where
    /// that is on anyway.
    pub posix_acl: bool,
    /// The file system below takes setuid and setgid away when it should (FUSE_HANDLE_KILLPRIV_V2): true of directory trees,
    /// which write without CAP_FSETID where the kernel asks for it.
    pub kills_privileges: bool,
    /// Mounts of this one may be idmapped (FUSE_ALLOW_IDMAP, Linux 6.12). The kernel then tells who asks only where something is made: right
    /// only where that matters to no tree, and beside `default_permissions`, without which it ends the connection (process_init_reply).
    pub idmappable: bool,
    /// The kernel drops the pages that it has of what is written directly ([`drops_written_pages`]).
    pub drops_pages: bool,
}

/// From which on the kernel drops the pages it has of what is written directly, before the write and after it (fuse_direct_io in fs/fuse/file.c).
/// Earlier ones go on showing what somebody read meanwhile.
const DROPS_PAGES: [u32; 3] = [6, 18, 3];

/// May this kernel be told to write directly? Ask before uname(2) is refused.
pub fn drops_written_pages() -> bool {
    let name = rustix::system::uname();
    is_since(&name.release().to_string_lossy(), DROPS_PAGES)
}

fn is_since(release: &str, version: [u32; 3]) -> bool {
    let numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    numbers.take(3).collect::<Vec<u32>>() >= version.to_vec()
}

/// An offset that means no content at all (fuse_reverse_inval_inode in fs/fuse/inode.c).
const ATTRIBUTES_ALONE: i64 = -1;

/// The bit of a request's number that says that it was sent before (FUSE_UNIQUE_RESEND, linux/fuse.h, Linux 6.9).
const UNIQUE_RESEND: u64 = 1 << 63;

/// A tree as a FUSE file system.
pub struct FuseAdapter {
    pub(super) tree: Arc<dyn Tree>,
    pub(super) options: AdapterOptions,
    counters: Arc<Counters>,
    /// The kernel takes ENOSYS from open for "never ask again".
    pub(super) no_open: bool,
    pub(super) no_opendir: bool,
    gives: bool,
    /// Files that are written directly, by node and handle.
    direct: DashSet<(u64, u64)>,
    pace: Arc<Pace>,
    notes: OnceLock<Notes>,
    notifier: Arc<OnceLock<Notifier>>,
    pub(super) buffers: Arc<Buffers>,
}

thread_local! {
    static IS_ANSWERING: Cell<bool> = const { Cell::new(false) };
}

/// Is this thread in a handler of ours, where a panic is caught?
pub(super) fn is_answering() -> bool {
    IS_ANSWERING.get()
}

impl std::fmt::Debug for FuseAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FuseAdapter").field("options", &self.options).finish_non_exhaustive()
    }
}

impl FuseAdapter {
    /// An adapter for a tree, in a session that is started with these buffers.
    pub fn new(tree: Arc<dyn Tree>, options: AdapterOptions, buffers: Arc<Buffers>) -> Self {
        FuseAdapter {
            tree,
            options,
            counters: Arc::default(),
            no_open: false,
            no_opendir: false,
            gives: false,
            direct: DashSet::new(),
            pace: Arc::default(),
            notes: OnceLock::new(),
            notifier: Arc::default(),
            buffers,
        }
    }

    /// Its counters, which go on counting.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// The buffers that it was made with.
    pub fn buffers(&self) -> Arc<Buffers> {
        Arc::clone(&self.buffers)
    }

    /// How its threads wait for requests: tell it the connection ([`Pace::watch`]).
    pub fn pace(&self) -> Arc<Pace> {
        Arc::clone(&self.pace)
    }

    /// Where its session's notifier belongs, before the session runs.
    pub fn notifier(&self) -> Arc<OnceLock<Notifier>> {
        Arc::clone(&self.notifier)
    }

    /// It is the first server of its connection: no request from before waits, and content may be given with an open.
    pub fn is_first(&mut self) {
        self.gives = true;
    }

    /// Open a file.
    pub(super) fn open_file(&self, tree: &dyn Tree, caller: &Caller, node: INodeNo, flags: i32) -> Result<Opened> {
        if !self.gives {
            return tree.open(caller, node.0, flags);
        }
        tree.open_giving(caller, node.0, flags, &mut |content| {
            // Without one the session has just begun. The tree counts the file as opened all the same.
            let given = self.notifier.get().map(|notifier| notifier.store(node, 0, content));
            if let Some(Err(e)) = given {
                log::debug!(target: TARGET, "give the content of {:x}: {e}", node.0);
            }
        })
    }

    fn writes_directly(&self) -> bool {
        self.options.drops_pages && !self.options.writeback
    }

    /// What the kernel may keep of a file that a create opened. One that is only written is not cached: a cached write is split in two wherever it ends
    /// inside a page, and the first asks for `security.capability`.
    pub(super) fn caching_of_new(&self, node: u64, opened: Opened, flags: i32) -> Opened {
        // The kernel syncs what is written with O_SYNC or O_DSYNC only through its cache. O_SYNC has the bit of O_DSYNC.
        let only_written = flags & (libc::O_ACCMODE | libc::O_APPEND | libc::O_DSYNC) == libc::O_WRONLY;
        if !self.writes_directly() || !only_written {
            return opened;
        }
        self.direct.insert((node, opened.handle));
        Opened { cache: Caching::Direct, ..opened }
    }

    /// A direct write that is to be on the disk (RWF_DSYNC of pwritev2(2)): the kernel leaves that to us.
    pub(super) fn must_sync(&self, node: u64, handle: u64, flags: i32) -> bool {
        // What the server before had open may have been direct.
        flags & libc::O_DSYNC != 0 && self.writes_directly() && (!self.gives || self.direct.contains(&(node, handle)))
    }

    /// A file was closed.
    pub(super) fn closed(&self, node: u64, handle: u64) {
        if self.writes_directly() {
            self.direct.remove(&(node, handle));
        }
    }

    /// An ordinary writer changed a file, which took setuid and setgid away below; the kernel, which left that to us
    /// (FUSE_HANDLE_KILLPRIV_V2), goes on showing them, and running the file with them, until its attributes run out. Before the
    /// reply, so that nobody who has written sees or uses them.
    pub(super) fn tell_lost_set_id(&self, tree: &dyn Tree, writer: &Writer, node: INodeNo) {
        if matches!(writer, Writer::Trusted) || !tree.lost_set_id(node.0) {
            return;
        }
        let told = self.notifier.get().map(|notifier| notifier.inval_inode(node, ATTRIBUTES_ALONE, 0));
        if let Some(Err(e)) = told {
            log::debug!(target: TARGET, "invalidate the attributes of {:x}: {e}", node.0);
        }
    }

    /// Write down which requests are being answered, for a server that cannot ask for them again.
    pub fn note_requests(&self, notes: Notes) {
        // A second call would be for the same connection.
        let _ = self.notes.set(notes);
    }

    /// Count a request, answer it, and keep a panic from ending the thread. A reply that is dropped unanswered while the
    /// panic unwinds says EIO by itself (fuser, `Drop for ReplyRaw`).
    pub(super) fn request(&self, request: &Request, operation: Operation, work: impl FnOnce(&dyn Tree)) {
        let begun = Instant::now();
        // Forgets come in batches, many to one read: there is nothing to wait for between them.
        let paced = operation != Operation::Forget;
        if paced {
            self.pace.begin();
        }
        let unique = request.unique().0;
        let notes = self.notes.get();
        if let Some(notes) = notes {
            // An error here would be the request's, and a test has no use for that.
            let _ = fault::point("serve.read");
            notes.begin(unique, paced);
        }
        self.counters.begin(operation);
        IS_ANSWERING.set(true);
        let asked = CurrentRequest { unique: unique & !UNIQUE_RESEND, is_resent: unique & UNIQUE_RESEND != 0 };
        if catch_unwind(AssertUnwindSafe(|| resend::answering(asked, || work(&*self.tree)))).is_err() {
            self.counters.panicked();
            log::error!(target: TARGET, "{}: the handler panicked; answered EIO", operation.name());
        }
        IS_ANSWERING.set(false);
        self.counters.end(begun.elapsed());
        if paced {
            self.pace.end(!matches!(operation, Operation::Release | Operation::ReleaseDir));
            // After it may have stood aside: now it goes to read.
            if let Some(notes) = notes {
                notes.end();
            }
        }
    }

    /// Agree with the kernel on what a session can do (FUSE_INIT).
    pub(super) fn agree(&mut self, config: &mut KernelConfig) {
        let live = self.tree.is_live();
        let freely = self.tree.opens_without_asking();
        let offered = config.capabilities();
        let mut wanted = vec![
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DO_READDIRPLUS,
            // A symlink's target never changes, not even on a live volume: `ln -sf` makes another inode.
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            // The tree applies the umask, or the file system a default ACL in its place.
            InitFlags::FUSE_DONT_MASK,
        ];
        if live {
            // Not FUSE_ATOMIC_O_TRUNC: truncation would come with the open, before the kernel looks whether the file is a
            // running program (do_open in fs/namei.c: vfs_open, then handle_truncate, which says ETXTBSY), and a refused
            // open(O_RDONLY|O_TRUNC) would have emptied it.
            // On a live tree attributes are asked again soon: only where the reader wants them.
            wanted.push(InitFlags::FUSE_READDIRPLUS_AUTO);
        }
        if self.options.kills_privileges {
            wanted.push(InitFlags::FUSE_HANDLE_KILLPRIV_V2);
        }
        if self.options.posix_acl {
            wanted.push(InitFlags::FUSE_POSIX_ACL);
        }
        if self.options.writeback {
            wanted.push(InitFlags::FUSE_WRITEBACK_CACHE);
        }
        if self.options.idmappable {
            wanted.push(InitFlags::FUSE_ALLOW_IDMAP);
        }
        for flag in wanted {
            // One at a time: a call with several is all or nothing.
            if config.add_capabilities(flag).is_err() {
                log::debug!(target: TARGET, "the kernel does not offer {flag:?}");
            }
        }
        self.no_open = freely && offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT);
        let lists_freely = self.tree.opens_directories_without_asking();
        self.no_opendir = lists_freely && offered.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        let set = |what: &str, result: std::result::Result<(), u32>| {
            if let Err(nearest) = result {
                log::debug!(target: TARGET, "{what}: the nearest possible is {nearest}");
            }
        };
        set("max_write", config.set_max_write(MAX_WRITE).map(|_| ()));
        set("max_background", config.set_max_background(MAX_BACKGROUND).map(|_| ()).map_err(u32::from));
        if let Err(nearest) = config.set_time_granularity(Duration::from_nanos(1)) {
            log::debug!(target: TARGET, "time granularity: the nearest possible is {nearest:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_drop_pages() {
        for (release, drops) in [
            ("6.18.44-fc-v782", true),
            ("6.18.3", true),
            ("6.18.2", false),
            ("6.19.0-rc1", true),
            ("7.0-amd64", true),
            ("6.12.73+deb13-amd64", false),
            ("6.6", false),
            ("5.10.0-39", false),
        ] {
            assert_eq!(is_since(release, DROPS_PAGES), drops, "{release}");
        }
    }
}
