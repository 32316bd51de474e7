//! The tree interface: what a rootfs answers, in terms of nodes. Testable without `/dev/fuse`; must not know fuser.
//!
//! Four kinds implement it: the image tree (the index), the directory tree (live passthrough), the writable tree (an image with a directory of
//! changes over it), and the route table, which is made of the others and tells which of them a name belongs to.
//!
//! A node id is chosen by its tree, is never 0, stays the same while the kernel knows the node, and is the inode number that
//! programs see. The root of every tree is [`ROOT`]. Ids stay below 2^56: the route table puts the tree's number above.
//! Errors are errnos, since that is what the kernel takes.

pub mod device;
pub mod dir;
pub mod image;
pub mod resend;
pub mod route;
pub mod upper;

use std::ffi::OsStr;
use std::time::Duration;

pub use rustix::io::Errno;

/// Result of a request.
pub type Result<T> = std::result::Result<T, Errno>;

/// A node of one tree.
pub type Node = u64;
/// The root of every tree (FUSE_ROOT_ID).
pub const ROOT: Node = 1;
/// Node ids lie below this.
pub const NODE_LIMIT: Node = 1 << 56;

/// The type bits of a mode (S_IFMT).
pub(crate) const TYPE_BITS: u32 = 0o170_000;
/// Of a directory (S_IFDIR).
pub(crate) const DIRECTORY: u32 = 0o040_000;
/// Of a regular file (S_IFREG).
pub(crate) const REGULAR: u32 = 0o100_000;

/// An open file or directory of one tree; 0 where the tree works by node alone.
pub type Handle = u64;

/// How long an answer about something immutable holds.
pub const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Seconds and nanoseconds since 1970; times before have negative seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timespec {
    /// Whole seconds, rounded down.
    pub secs: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// What stat(2) shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// The node, which is st_ino too.
    pub node: Node,
    /// File type and permission bits, as st_mode has them.
    pub mode: u32,
    /// Hard links.
    pub nlink: u32,
    /// Owner as presented.
    pub uid: u32,
    /// Group as presented.
    pub gid: u32,
    /// Device number of a device node (the kernel's 32-bit encoding: `(minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)`).
    pub rdev: u32,
    /// Bytes.
    pub size: u64,
    /// 512-byte blocks.
    pub blocks: u64,
    /// Preferred I/O size.
    pub blksize: u32,
    /// Last access.
    pub atime: Timespec,
    /// Last change of content.
    pub mtime: Timespec,
    /// Last change of the node.
    pub ctime: Timespec,
}

/// A node found or made. The kernel holds one more reference to it until [`Tree::forget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What stat(2) shows.
    pub attr: Attr,
    /// Tells a reused node id apart (FUSE generation).
    pub generation: u64,
    /// How long the name leads to this node.
    pub entry_ttl: Duration,
    /// How long the attributes hold.
    pub attr_ttl: Duration,
}

/// Answer to a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// It is there.
    Found(Entry),
    /// It is not there, and will not be for so long. Zero: ask again each time.
    Absent(Duration),
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File system user id.
    pub uid: u32,
    /// File system group id.
    pub gid: u32,
    /// Thread id, 0 where it is not visible to us.
    pub pid: u32,
}

/// Who changes a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Who may leave setuid and setgid in place, which is as good as root; or the kernel, which writes a page back for nobody
    /// in particular.
    Trusted,
    /// Takes setuid and setgid away, and gets what the file system gives this caller.
    Ordinary(Caller),
}

/// One entry of a directory.
#[derive(Clone, Copy, Debug)]
pub struct DirItem<'a> {
    /// Its name; `.` and `..` included.
    pub name: &'a OsStr,
    /// Inode number, the same as lookup gives.
    pub node: Node,
    /// File type bits of the mode (S_IFMT), 0 where unknown.
    pub kind: u32,
    /// Where to go on after this entry; never 0.
    pub cookie: u64,
    /// The whole entry, for readdirplus: None for `.` and `..` and in a plain readdir.
    pub entry: Option<Entry>,
}

/// Did the entry fit the reply?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Yes: it counts.
    Taken,
    /// No: it was not taken, and the page ends before it.
    Full,
}

/// Names alone, or names with attributes?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListMode {
    /// readdir
    Names,
    /// readdirplus: every entry taken counts as a lookup.
    Plus,
}

/// An opened file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its handle.
    pub handle: Handle,
    /// What the kernel may keep.
    pub cache: Caching,
    /// Closing it has nothing to tell and nothing to see to: the kernel need not ask (FOPEN_NOFLUSH, Linux 5.16).
    pub closes_silently: bool,
}

/// What the kernel may keep of an opened file's or directory's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// Everything, for ever (FOPEN_KEEP_CACHE, and CACHE_DIR for directories).
    Keep,
    /// What it reads now; it drops what it had before.
    Fresh,
    /// Nothing: every read and write comes here (FOPEN_DIRECT_IO).
    Direct,
}

/// A new time for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// This one.
    At(Timespec),
    /// The time of the call (UTIME_NOW).
    Now,
}

/// What setattr changes; `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of content.
    pub mtime: Option<SetTime>,
}

/// What statvfs(3) shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statfs {
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Blocks free to ordinary users.
    pub bavail: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Block size.
    pub bsize: u32,
    /// Longest name.
    pub namelen: u32,
    /// Fragment size.
    pub frsize: u32,
}

/// Node, mode and device of something to be made (mknod, mkdir, create).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct New {
    /// File type and permission bits, before the umask.
    pub mode: u32,
    /// The caller's umask.
    pub umask: u32,
    /// Device number of a device node.
    pub rdev: u32,
}

/// The answer of [`Tree::access`] for a node of this mode where nothing can be written.
pub(crate) fn access_read_only(mode: u32, mask: i32) -> Result<()> {
    let is_regular = mode & TYPE_BITS == REGULAR;
    if mask & libc::W_OK != 0 {
        return Err(Errno::ROFS);
    }
    if mask & libc::X_OK != 0 && is_regular && mode & 0o111 == 0 {
        return Err(Errno::ACCESS);
    }
    Ok(())
}

/// What a tree answers. Every method may be called from several threads at once and must not block without bound.
///
/// What changes something answers EROFS unless a tree says otherwise: the image tree writes none of these methods.
#[allow(unused_variables)]
pub trait Tree: Send + Sync {
    /// Find `name` in `parent`. A node found counts one reference.
    fn lookup(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<Lookup>;
    /// The kernel gives back `count` references. More than it has is taken as all of them.
    fn forget(&self, node: Node, count: u64) {}
    /// Attributes and how long they hold.
    fn getattr(&self, node: Node, handle: Option<Handle>) -> Result<(Attr, Duration)>;
    /// The target of a symbolic link.
    fn readlink(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()>;
    /// Open a file; `flags` are open(2)'s.
    fn open(&self, caller: &Caller, node: Node, flags: i32) -> Result<Opened>;
    /// Up to `size` bytes from `offset`; fewer only at the end. Calls `out` exactly once on success.
    fn read(&self, node: Node, handle: Handle, offset: u64, size: u32, out: &mut dyn FnMut(&[u8])) -> Result<()>;
    /// The entries of a directory after `cookie` (0: from the start), `.` and `..` first, until `out` says [`Fit::Full`].
    fn readdir(
        &self,
        caller: &Caller,
        node: Node,
        handle: Handle,
        cookie: u64,
        mode: ListMode,
        out: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()>;
    /// The file system that a node lies on.
    fn statfs(&self, node: Node) -> Result<Statfs>;
    /// One extended attribute's value. ENODATA: it has none of this name.
    fn getxattr(&self, caller: &Caller, node: Node, name: &OsStr, out: &mut dyn FnMut(&[u8])) -> Result<()>;
    /// The names of the extended attributes, each with a NUL after it.
    fn listxattr(&self, node: Node, out: &mut dyn FnMut(&[u8])) -> Result<()>;

    /// access(2), for mounts where the kernel does not check permissions itself (no `default_permissions`: one user's own mount);
    /// `mask` is of R_OK, W_OK, X_OK. That user may read all of it; a file without an x bit is not executable for anybody.
    fn access(&self, node: Node, mask: i32) -> Result<()>;

    /// True where a node may change other than through us: the kernel may keep nothing for ever.
    fn is_live(&self) -> bool;
    /// True where names can be made and removed: what may not be is busy then, not read-only.
    fn takes_names(&self) -> bool {
        false
    }
    /// True where every open of a file or directory succeeds and leaves nothing to remember: the kernel need not ask
    /// (FUSE_NO_OPEN_SUPPORT, FUSE_NO_OPENDIR_SUPPORT).
    fn opens_without_asking(&self) -> bool {
        false
    }
    /// The same of directories alone. The kernel then keeps what they list until it changes something in them itself.
    fn opens_directories_without_asking(&self) -> bool {
        self.opens_without_asking()
    }
    /// [`Tree::open`] that may give all the content of a file to the first that opens it: before the answer, and never while another
    /// request for that file waits or its content can change.
    fn open_giving(&self, caller: &Caller, node: Node, flags: i32, give: &mut dyn FnMut(&[u8])) -> Result<Opened> {
        self.open(caller, node, flags)
    }
    /// True where no node has an extended attribute and none can get one: the kernel need not ask.
    fn is_without_xattrs(&self) -> bool {
        false
    }

    /// Open a directory.
    fn opendir(&self, caller: &Caller, node: Node) -> Result<Opened> {
        Ok(Opened { handle: 0, cache: Caching::Keep, closes_silently: true })
    }
    /// Close a directory.
    fn releasedir(&self, node: Node, handle: Handle) {}
    /// A descriptor of the file was closed; errors of delayed writes come back here. Not called where the file closes silently
    /// ([`Opened::closes_silently`]), unless the kernel's write-back cache is on.
    fn flush(&self, node: Node, handle: Handle) -> Result<()> {
        Ok(())
    }
    /// The last descriptor was closed.
    fn release(&self, node: Node, handle: Handle) {}
    /// Bring a file to the disk.
    fn fsync(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        Ok(())
    }
    /// Bring a directory to the disk.
    fn fsyncdir(&self, node: Node, handle: Handle, data_only: bool) -> Result<()> {
        Ok(())
    }
    /// Where data or a hole begins (lseek SEEK_DATA, SEEK_HOLE).
    fn lseek(&self, node: Node, handle: Handle, offset: i64, whence: i32) -> Result<i64> {
        Err(Errno::NOSYS)
    }

    /// Change attributes.
    fn setattr(
        &self,
        caller: &Caller,
        node: Node,
        handle: Option<Handle>,
        change: &Change,
    ) -> Result<(Attr, Duration)> {
        Err(Errno::ROFS)
    }
    /// Make and open a regular file; `flags` are open(2)'s.
    fn create(&self, caller: &Caller, parent: Node, name: &OsStr, new: New, flags: i32) -> Result<(Entry, Opened)> {
        Err(Errno::ROFS)
    }
    /// Make a regular file, FIFO, socket or device node.
    fn mknod(&self, caller: &Caller, parent: Node, name: &OsStr, new: New) -> Result<Entry> {
        Err(Errno::ROFS)
    }
    /// Make a directory.
    fn mkdir(&self, caller: &Caller, parent: Node, name: &OsStr, new: New) -> Result<Entry> {
        Err(Errno::ROFS)
    }
    /// Make a symbolic link.
    fn symlink(&self, caller: &Caller, parent: Node, name: &OsStr, target: &OsStr) -> Result<Entry> {
        Err(Errno::ROFS)
    }
    /// Make a hard link.
    fn link(&self, caller: &Caller, node: Node, parent: Node, name: &OsStr) -> Result<Entry> {
        Err(Errno::ROFS)
    }
    /// Remove a name that is not a directory.
    fn unlink(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        Err(Errno::ROFS)
    }
    /// Remove an empty directory.
    fn rmdir(&self, caller: &Caller, parent: Node, name: &OsStr) -> Result<()> {
        Err(Errno::ROFS)
    }
    /// Rename; `flags` are renameat2(2)'s.
    fn rename(&self, caller: &Caller, from: (Node, &OsStr), to: (Node, &OsStr), flags: u32) -> Result<()> {
        Err(Errno::ROFS)
    }
    /// Write `data` at `offset`, or at the end where `flags` (open(2)'s) have O_APPEND.
    fn write(
        &self,
        writer: &Writer,
        node: Node,
        handle: Handle,
        offset: u64,
        data: &[u8],
        flags: i32,
    ) -> Result<usize> {
        Err(Errno::ROFS)
    }
    /// fallocate(2).
    fn fallocate(
        &self,
        writer: &Writer,
        node: Node,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<()> {
        Err(Errno::ROFS)
    }
    /// Copy between two files of this tree: bytes copied.
    fn copy_file_range(
        &self,
        writer: &Writer,
        from: (Node, Handle, u64),
        to: (Node, Handle, u64),
        length: u64,
    ) -> Result<usize> {
        Err(Errno::ROFS)
    }
    /// Asked after an ordinary writer changed this file: does the kernel know it with setuid or setgid, which are gone now?
    fn lost_set_id(&self, node: Node) -> bool {
        false
    }
    /// Set an extended attribute; `flags` are setxattr(2)'s.
    fn setxattr(&self, caller: &Caller, node: Node, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        Err(Errno::ROFS)
    }
    /// Remove an extended attribute.
    fn removexattr(&self, caller: &Caller, node: Node, name: &OsStr) -> Result<()> {
        Err(Errno::ROFS)
    }
}
