//! Requests that come a second time: a server that was killed may have carried one out and not answered (FUSE_NOTIFY_RESEND).
//!
//! Whoever makes or removes a name asks [`is_resent`] when it fails with what would be its own earlier success (EEXIST, ENOENT),
//! and looks whether the state is the one that this request makes. The kernel sends only requests that could succeed as it
//! knew the names, and holds the directories locked until they are answered, so nobody else on this mount is in between.

use std::cell::Cell;

thread_local! {
    static RESENT: Cell<bool> = const { Cell::new(false) };
}

/// Is the request that this thread answers one that an earlier server may have carried out?
pub fn is_resent() -> bool {
    RESENT.get()
}

/// Answer a request; it was sent before or not.
pub fn answering<T>(is_resent: bool, work: impl FnOnce() -> T) -> T {
    // Set, not restored: the next request on this thread sets its own, and a panic ends with this one.
    RESENT.set(is_resent);
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_has_its_own() {
        assert!(!is_resent());
        assert!(answering(true, is_resent));
        assert!(!answering(false, is_resent));
        answering(true, || std::thread::spawn(|| assert!(!is_resent())).join().unwrap());
    }
}
