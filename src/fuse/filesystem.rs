//! fuser's `Filesystem`, request by request.

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, Generation, INodeNo, KernelConfig, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::adapter::FuseAdapter;
use super::answer::failed;
use super::buffers::NO_NODE;
use super::convert::{
    ABSENT, attr_out, directory_flags, file_flags, give_entry, handle, is_admin, kind_out, listed, set_time,
};
use super::counters::Operation;
use crate::tree::{Attr, Caller, Change, DirItem, Errno, Fit, ListMode, Lookup, New, Result, Tree, Writer};

/// Of requests that do not say whether setuid is to be taken away.
fn writer(request: &Request) -> Writer {
    if request.uid() == 0 { Writer::Trusted } else { Writer::Ordinary(caller(request)) }
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

/// A page of a directory's names: was any given?
#[derive(Default)]
struct Page {
    given: bool,
}

impl Page {
    /// One was offered to a reply that says whether it is full.
    fn took(&mut self, is_full: bool) -> Fit {
        self.given |= !is_full;
        if is_full { Fit::Full } else { Fit::Taken }
    }

    /// What the page ends with. What was given counts; the error comes with the next page, if it is still one.
    fn error(self, done: Result<()>) -> Option<Errno> {
        done.err().filter(|_| !self.given)
    }
}

impl Filesystem for FuseAdapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        self.agree(config);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let look = |tree: &dyn Tree| tree.lookup(&caller(request), parent.0, name);
        self.answer(request, Operation::Lookup, parent, reply, look, |reply, found| match found {
            Lookup::Found(entry) => give_entry(reply, &entry),
            Lookup::Absent(ttl) if ttl.is_zero() => reply.error(fuser::Errno::ENOENT),
            Lookup::Absent(ttl) => reply.entry_with_ttls(&Duration::ZERO, &ttl, &attr_out(&ABSENT), Generation(0)),
        });
    }

    fn forget(&self, request: &Request, node: INodeNo, count: u64) {
        self.request(request, Operation::Forget, |tree| tree.forget(node.0, count));
    }

    fn getattr(&self, request: &Request, node: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        self.attr(request, Operation::GetAttr, node, reply, |tree| tree.getattr(node.0, handle(fh)));
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change { mode, uid, gid, size, atime: atime.map(set_time), mtime: mtime.map(set_time) };
        self.attr(request, Operation::SetAttr, node, reply, |tree| {
            tree.setattr(&caller(request), node.0, handle(fh), &change)
        });
    }

    fn readlink(&self, request: &Request, node: INodeNo, reply: ReplyData) {
        self.bytes(request, Operation::ReadLink, node, reply, ReplyData::data, |tree, out| tree.readlink(node.0, out));
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let new = New { mode, umask, rdev };
        self.entry(request, Operation::MkNod, parent, reply, |tree| tree.mknod(&caller(request), parent.0, name, new));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let new = New { mode, umask, rdev: 0 };
        self.entry(request, Operation::MkDir, parent, reply, |tree| tree.mkdir(&caller(request), parent.0, name, new));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.done(request, Operation::Unlink, parent, reply, |tree| tree.unlink(&caller(request), parent.0, name));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.done(request, Operation::RmDir, parent, reply, |tree| tree.rmdir(&caller(request), parent.0, name));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        self.entry(request, Operation::SymLink, parent, reply, |tree| {
            tree.symlink(&caller(request), parent.0, name, target.as_os_str())
        });
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.done(request, Operation::Rename, parent, reply, |tree| {
            tree.rename(&caller(request), (parent.0, name), (new_parent.0, new_name), flags.bits())
        });
    }

    fn link(&self, request: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.entry(request, Operation::Link, node, reply, |tree| tree.link(&caller(request), node.0, parent.0, name));
    }

    fn open(&self, request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if self.no_open {
            return self.request(request, Operation::Open, |_| reply.error(fuser::Errno::ENOSYS));
        }
        let open = |tree: &dyn Tree| self.open_file(tree, &caller(request), node, flags.0);
        self.answer(request, Operation::Open, node, reply, open, |reply, opened| {
            reply.opened(FileHandle(opened.handle), file_flags(opened));
        });
    }

    fn read(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.bytes(request, Operation::Read, node, reply, ReplyData::data, |tree, out| {
            tree.read(node.0, fh.0, offset, size, out)
        });
    }

    fn write(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if node.0 == NO_NODE {
            return self.buffers.handle(data, reply);
        }
        // The kernel asks to take setuid away for everybody without CAP_FSETID; and never for a page, which has no caller.
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let writer = if kill { Writer::Ordinary(caller(request)) } else { Writer::Trusted };
        let is_page = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        // A page written back has its place already: the append was decided when it entered the cache.
        let flags = if is_page { flags.0 & !libc::O_APPEND } else { flags.0 };
        self.written(request, Operation::Write, node, reply, |tree| {
            let mut written = tree.write(&writer, node.0, fh.0, offset, data, flags);
            // The kernel looks at the error alone when it writes pages back (fuse_writepage_end in fs/fuse/file.c): cut short
            // by a full disk, the rest would be lost in silence. Ask for the rest, to get the error.
            while let Ok(done @ 1..) = written
                && is_page
                && done < data.len()
            {
                let rest = tree.write(&writer, node.0, fh.0, offset + done as u64, &data[done..], flags);
                written = rest.and_then(|n| if n == 0 { Err(Errno::IO) } else { Ok(done + n) });
            }
            self.tell_lost_set_id(tree, &writer, node);
            if written.is_ok() && self.must_sync(node.0, fh.0, flags) {
                tree.fsync(node.0, fh.0, flags & libc::O_SYNC != libc::O_SYNC)?;
            }
            written
        });
    }

    fn flush(&self, request: &Request, node: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        // Where opens need no asking nothing is written, so no close has anything to report: never ask again.
        if self.no_open {
            return self.request(request, Operation::Flush, |_| reply.error(fuser::Errno::ENOSYS));
        }
        self.done(request, Operation::Flush, node, reply, |tree| tree.flush(node.0, fh.0));
    }

    fn release(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.request(request, Operation::Release, |tree| {
            self.closed(node.0, fh.0);
            tree.release(node.0, fh.0);
            reply.ok();
        });
    }

    fn fsync(&self, request: &Request, node: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        self.done(request, Operation::FSync, node, reply, |tree| tree.fsync(node.0, fh.0, data_only));
    }

    fn opendir(&self, request: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.no_opendir {
            return self.request(request, Operation::OpenDir, |_| reply.error(fuser::Errno::ENOSYS));
        }
        let open = |tree: &dyn Tree| tree.opendir(&caller(request), node.0);
        self.answer(request, Operation::OpenDir, node, reply, open, |reply, opened| {
            reply.opened(FileHandle(opened.handle), directory_flags(opened.cache));
        });
    }

    fn readdir(&self, request: &Request, node: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.request(request, Operation::ReadDir, |tree| {
            let mut page = Page::default();
            let mut add = |item: &DirItem<'_>| {
                page.took(reply.add(INodeNo(item.node), item.cookie, kind_out(item.kind), item.name))
            };
            let done = tree.readdir(&caller(request), node.0, fh.0, offset, ListMode::Names, &mut add);
            match page.error(done) {
                Some(e) => reply.error(failed(Operation::ReadDir, node, e)),
                None => reply.ok(),
            }
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.request(request, Operation::ReadDirPlus, |tree| {
            let mut page = Page::default();
            let mut add = |item: &DirItem<'_>| {
                // `.` and `..` have no entry; the kernel takes their number and type alone and counts no lookup
                // (fuse_direntplus_link in fs/fuse/readdir.c).
                let bare = Attr { node: item.node, mode: item.kind, ..ABSENT };
                let (attr, ttl, generation) = match &item.entry {
                    // fuser has one time to live for both.
                    Some(entry) => (&entry.attr, entry.entry_ttl.min(entry.attr_ttl), entry.generation),
                    None => (&bare, Duration::ZERO, 0),
                };
                page.took(reply.add(
                    INodeNo(item.node),
                    item.cookie,
                    item.name,
                    &ttl,
                    &attr_out(attr),
                    Generation(generation),
                ))
            };
            let done = tree.readdir(&caller(request), node.0, fh.0, offset, ListMode::Plus, &mut add);
            match page.error(done) {
                Some(e) => reply.error(failed(Operation::ReadDirPlus, node, e)),
                None => reply.ok(),
            }
        });
    }

    fn releasedir(&self, request: &Request, node: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.request(request, Operation::ReleaseDir, |tree| {
            tree.releasedir(node.0, fh.0);
            reply.ok();
        });
    }

    fn fsyncdir(&self, request: &Request, node: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        self.done(request, Operation::FSyncDir, node, reply, |tree| tree.fsyncdir(node.0, fh.0, data_only));
    }

    fn statfs(&self, request: &Request, node: INodeNo, reply: ReplyStatfs) {
        self.answer(
            request,
            Operation::StatFs,
            node,
            reply,
            |tree| tree.statfs(node.0),
            |reply, s| {
                reply.statfs(s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.frsize);
            },
        );
    }

    fn setxattr(
        &self,
        request: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.done(request, Operation::SetXattr, node, reply, |tree| {
            tree.setxattr(&caller(request), node.0, name, value, flags)
        });
    }

    fn getxattr(&self, request: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if self.tree.is_without_xattrs() {
            // Never asked again: `ls -l` asks for each file, and overlayfs does. Lists are asked for by who copies, and wants an answer.
            return self.request(request, Operation::GetXattr, |_| reply.error(fuser::Errno::ENOSYS));
        }
        self.xattrs(request, Operation::GetXattr, node, size, reply, |tree, out| {
            tree.getxattr(&caller(request), node.0, name, out)
        });
    }

    fn listxattr(&self, request: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let may_read_trusted = || request.uid() == 0 && is_admin(request.pid());
        self.xattrs(request, Operation::ListXattr, node, size, reply, |tree, out| {
            tree.listxattr(node.0, &mut |names| out(&listed(names, may_read_trusted)))
        });
    }

    fn removexattr(&self, request: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.done(request, Operation::RemoveXattr, node, reply, |tree| {
            tree.removexattr(&caller(request), node.0, name)
        });
    }

    fn access(&self, request: &Request, node: INodeNo, mask: fuser::AccessFlags, reply: ReplyEmpty) {
        // Asked only where the kernel does not check by itself (default_permissions).
        self.done(request, Operation::Access, node, reply, |tree| tree.access(node.0, mask.bits()));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let new = New { mode, umask, rdev: 0 };
        let create = |tree: &dyn Tree| tree.create(&caller(request), parent.0, name, new, flags);
        self.answer(request, Operation::Create, parent, reply, create, |reply, (entry, opened)| {
            let ttl = entry.entry_ttl.min(entry.attr_ttl);
            let (attr, generation) = (attr_out(&entry.attr), Generation(entry.generation));
            let opened = self.caching_of_new(entry.attr.node, opened, flags);
            reply.created(&ttl, &attr, generation, FileHandle(opened.handle), file_flags(opened));
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.done(request, Operation::FAllocate, node, reply, |tree| {
            let writer = writer(request);
            let done = tree.fallocate(&writer, node.0, fh.0, offset, length, mode);
            self.tell_lost_set_id(tree, &writer, node);
            done
        });
    }

    fn lseek(&self, request: &Request, node: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        // What the kernel has gathered would be a hole below. It then takes all of every file for data.
        if self.options.writeback {
            return self.request(request, Operation::LSeek, |_| reply.error(fuser::Errno::ENOSYS));
        }
        let seek = |tree: &dyn Tree| tree.lseek(node.0, fh.0, offset, whence);
        self.answer(request, Operation::LSeek, node, reply, seek, ReplyLseek::offset);
    }

    fn copy_file_range(
        &self,
        request: &Request,
        node_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        node_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.written(request, Operation::CopyFileRange, node_in, reply, |tree| {
            let (from, to) = ((node_in.0, fh_in.0, offset_in), (node_out.0, fh_out.0, offset_out));
            let writer = writer(request);
            let done = tree.copy_file_range(&writer, from, to, length);
            self.tell_lost_set_id(tree, &writer, node_out);
            done
        });
    }

    // What is not served is answered ENOSYS without a warning each time; the kernel does without: locks are local (right for
    // one host), poll is always ready, ioctl and bmap are refused.
    fn getlk(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        reply: fuser::ReplyLock,
    ) {
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOSYS));
    }

    fn setlk(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOSYS));
    }

    fn bmap(&self, request: &Request, _: INodeNo, _: u32, _: u64, reply: fuser::ReplyBmap) {
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOSYS));
    }

    fn ioctl(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: fuser::ReplyIoctl,
    ) {
        // ENOTTY: "no such ioctl on this file", which programs expect (ioctl(2)).
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOTTY));
    }

    fn poll(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::PollNotifier,
        _: fuser::PollEvents,
        _: fuser::PollFlags,
        reply: fuser::ReplyPoll,
    ) {
        self.request(request, Operation::Other, |_| reply.error(fuser::Errno::ENOSYS));
    }
}
