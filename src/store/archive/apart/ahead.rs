//! Processes started before there is an archive for them. A service reads one layer after the other and each takes two processes, whose start takes
//! as long as a small layer.

use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{TARGET, spawn};
use crate::child::channel::Channel;

/// A layer's: one that decodes and one that unpacks.
const COUNT: usize = 2;

/// `None`: nobody wants any.
static WAITING: Mutex<Option<Vec<(Channel, Child)>>> = Mutex::new(None);

fn waiting() -> MutexGuard<'static, Option<Vec<(Channel, Child)>>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// After each archive, have some waiting for the next. They end with this process.
#[cfg(feature = "containerd")]
pub(crate) fn expect_more() {
    waiting().get_or_insert_default();
}

/// One that waits, if there is one.
pub(super) fn take() -> Option<(Channel, Child)> {
    let mut waiting = waiting();
    let waiting = waiting.as_mut()?;
    // Someone may have killed it.
    std::iter::from_fn(|| waiting.pop())
        .find_map(|(channel, mut child)| matches!(child.try_wait(), Ok(None)).then_some((channel, child)))
}

/// One was ended: wait for its end, and start others. Not while there is work, and nobody waits for it where some are wanted.
pub(super) fn bury(mut child: Child) {
    let mut later = move || {
        let _ = child.wait();
        refill();
    };
    if waiting().is_none() {
        return later();
    }
    if let Err(e) = std::thread::Builder::new().name("ahead".into()).spawn(later) {
        log::warn!(target: TARGET, "start thread: {e}");
    }
}

fn refill() {
    /// Held by who starts some: those who come meanwhile would start too many.
    static ALONE: Mutex<()> = Mutex::new(());
    let Ok(_alone) = ALONE.try_lock() else { return };
    while waiting().as_ref().is_some_and(|all| all.len() < COUNT) {
        match spawn() {
            Ok(Some(one)) => waiting().get_or_insert_default().push(one),
            Ok(None) => return,
            Err(e) => return log::debug!(target: TARGET, "not started ahead: {e}"),
        }
    }
}
