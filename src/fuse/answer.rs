//! Requests by what is answered to them: the one place where an error of a tree becomes an error of a reply.

use std::time::Duration;

use fuser::{
    INodeNo, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request,
};

use super::adapter::{FuseAdapter, TARGET};
use super::convert::{attr_out, give_entry, give_xattr};
use super::counters::Operation;
use crate::tree::{Attr, Entry, Errno, Result, Tree};

/// The error for the kernel.
pub(super) fn failed(operation: Operation, node: INodeNo, errno: Errno) -> fuser::Errno {
    // What programs run into all day is nobody's news.
    log::trace!(target: TARGET, "{} {:x}: {errno}", operation.name(), node.0);
    // The limit that was reached is this process's, not the caller's.
    let errno = if errno == Errno::MFILE { Errno::NFILE } else { errno };
    fuser::Errno::from_i32(errno.raw_os_error())
}

/// A reply that can be an error, which each of fuser's can.
pub(super) trait Refuse {
    fn refuse(self, errno: fuser::Errno);
}

macro_rules! refuse {
    ($($reply:ty),+ $(,)?) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: fuser::Errno) {
                self.error(errno);
            }
        })+
    };
}

refuse!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyEmpty,
    ReplyEntry,
    ReplyLseek,
    ReplyOpen,
    ReplyStatfs,
    ReplyWrite,
    ReplyXattr
);

/// Requests by what is answered to them.
impl FuseAdapter {
    /// With what the tree gives, or with its error.
    pub(super) fn answer<R: Refuse, T>(
        &self,
        request: &Request,
        operation: Operation,
        node: INodeNo,
        reply: R,
        work: impl FnOnce(&dyn Tree) -> Result<T>,
        give: impl FnOnce(R, T),
    ) {
        self.request(request, operation, |tree| match work(tree) {
            Ok(value) => give(reply, value),
            Err(e) => reply.refuse(failed(operation, node, e)),
        });
    }

    /// That it was done.
    pub(super) fn done(
        &self,
        request: &Request,
        operation: Operation,
        node: INodeNo,
        reply: ReplyEmpty,
        work: impl FnOnce(&dyn Tree) -> Result<()>,
    ) {
        self.answer(request, operation, node, reply, work, |reply, ()| reply.ok());
    }

    /// With an entry.
    pub(super) fn entry(
        &self,
        request: &Request,
        operation: Operation,
        parent: INodeNo,
        reply: ReplyEntry,
        work: impl FnOnce(&dyn Tree) -> Result<Entry>,
    ) {
        self.answer(request, operation, parent, reply, work, |reply, entry| give_entry(reply, &entry));
    }

    /// With attributes.
    pub(super) fn attr(
        &self,
        request: &Request,
        operation: Operation,
        node: INodeNo,
        reply: ReplyAttr,
        work: impl FnOnce(&dyn Tree) -> Result<(Attr, Duration)>,
    ) {
        self.answer(request, operation, node, reply, work, |reply, (attr, ttl)| reply.attr(&ttl, &attr_out(&attr)));
    }

    /// With how much was written.
    pub(super) fn written(
        &self,
        request: &Request,
        operation: Operation,
        node: INodeNo,
        reply: ReplyWrite,
        work: impl FnOnce(&dyn Tree) -> Result<usize>,
    ) {
        self.answer(request, operation, node, reply, work, |reply, written| reply.written(written as u32));
    }

    /// With bytes that the tree hands over: the reply is gone once they were given.
    pub(super) fn bytes<R: Refuse>(
        &self,
        request: &Request,
        operation: Operation,
        node: INodeNo,
        reply: R,
        give: impl Fn(R, &[u8]),
        work: impl FnOnce(&dyn Tree, &mut dyn FnMut(&[u8])) -> Result<()>,
    ) {
        self.request(request, operation, |tree| {
            let mut reply = Some(reply);
            let result = work(tree, &mut |bytes| {
                if let Some(reply) = reply.take() {
                    give(reply, bytes);
                }
            });
            if let Some(reply) = reply {
                reply.refuse(failed(operation, node, result.err().unwrap_or(Errno::IO)));
            }
        });
    }

    /// With extended attributes: a value, or a list of names.
    pub(super) fn xattrs(
        &self,
        request: &Request,
        operation: Operation,
        node: INodeNo,
        size: u32,
        reply: ReplyXattr,
        work: impl FnOnce(&dyn Tree, &mut dyn FnMut(&[u8])) -> Result<()>,
    ) {
        self.bytes(request, operation, node, reply, |reply, bytes| give_xattr(reply, size, bytes), work);
    }
}
