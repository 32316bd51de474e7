//! Requests that come a second time: a server that was killed may have carried one out and not answered (FUSE_NOTIFY_RESEND).
//!
//! A tree whose changes outlive the server writes down what it is about to do, by the request's number, before it does it: names
//! that are made, moved and removed, appends, and attributes that are made or removed. Sent again, such a request is looked up,
//! and what is on disk tells whether it was done. Where nothing is written down (no process comes after this one), [`is_resent`]
//! alone must do. The kernel holds the directories locked until a request is answered, so nobody else on this mount is in
//! between; programs on the host may be.
//!
//! Needs no care, because doing it twice is doing it once: setattr, writes at a place, truncation by open, and those forms of
//! fallocate and copy_file_range that the kernel sends (no inserted or collapsed ranges, no overlapping copy: fs/fuse/file.c,
//! fs/read_write.c); the file is locked meanwhile.

use std::cell::Cell;

/// The request that a thread answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CurrentRequest {
    /// Its number, the same each time it is sent, and never another request's on this connection. 0: none.
    pub unique: u64,
    /// An earlier server may have carried it out.
    pub is_resent: bool,
}

thread_local! {
    static CURRENT: Cell<CurrentRequest> = const { Cell::new(CurrentRequest { unique: 0, is_resent: false }) };
}

/// Is the request that this thread answers one that an earlier server may have carried out?
pub fn is_resent() -> bool {
    CURRENT.get().is_resent
}

/// The number of the request that this thread answers; 0: none.
pub fn unique() -> u64 {
    CURRENT.get().unique
}

/// Answer a request.
pub fn answering<T>(asked: CurrentRequest, work: impl FnOnce() -> T) -> T {
    // Set, not restored: the next request on this thread sets its own, and a panic ends with this one.
    CURRENT.set(asked);
    work()
}

/// Do a part of a request that is not the one that is written down: by itself, and any number of times.
pub fn aside<T>(work: impl FnOnce() -> T) -> T {
    let asked = CURRENT.replace(CurrentRequest::default());
    let done = work();
    CURRENT.set(asked);
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_has_its_own() {
        let resent = |is_resent| CurrentRequest { unique: 8, is_resent };
        assert!(!is_resent());
        assert!(answering(resent(true), is_resent));
        assert_eq!(answering(resent(false), || (is_resent(), unique())), (false, 8));
        answering(resent(true), || assert!(!aside(is_resent) && is_resent()));
        answering(resent(true), || std::thread::spawn(|| assert!(!is_resent() && unique() == 0)).join().unwrap());
    }
}
