//! Processes started before there is an archive for them. A service reads one layer after the other and each takes two processes, whose start takes
//! as long as a small layer.

use std::process::Child;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{TARGET, spawn};
use crate::child::channel::Channel;

/// A layer's: one that decodes and one that unpacks.
const COUNT: usize = 2;

/// Where some are wanted: those that wait, and where those that ended are told of.
struct Ahead {
    waiting: Vec<(Channel, Child)>,
    ended: Sender<Child>,
}

static AHEAD: Mutex<Option<Ahead>> = Mutex::new(None);

fn ahead() -> MutexGuard<'static, Option<Ahead>> {
    AHEAD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// After each archive, have some waiting for the next. They end with this process.
#[cfg_attr(not(feature = "containerd"), expect(dead_code, reason = "a snapshotter reads one after the other"))]
pub(crate) fn expect_more() {
    let mut ahead = ahead();
    if ahead.is_some() {
        return;
    }
    let (ended, told) = mpsc::channel();
    // It stays: the kernel ends a child with the thread that started it (PR_SET_PDEATHSIG).
    match std::thread::Builder::new().name("ahead".into()).spawn(move || keep(&told)) {
        Ok(_) => *ahead = Some(Ahead { waiting: Vec::new(), ended }),
        Err(e) => log::warn!(target: TARGET, "start thread: {e}"),
    }
}

/// One that waits, if there is one.
pub(super) fn take() -> Option<(Channel, Child)> {
    let mut ahead = ahead();
    let waiting = &mut ahead.as_mut()?.waiting;
    // Someone may have killed it.
    std::iter::from_fn(|| waiting.pop())
        .find_map(|(channel, mut child)| matches!(child.try_wait(), Ok(None)).then_some((channel, child)))
}

/// One was ended: wait for its end. Where some are wanted, others are started then, and nobody waits for that.
pub(super) fn bury(child: Child) {
    let told = ahead().as_ref().map(|ahead| ahead.ended.clone());
    let left = match told {
        Some(ended) => ended.send(child).err().map(|unsent| unsent.0),
        None => Some(child),
    };
    if let Some(mut child) = left {
        let _ = child.wait();
    }
}

fn keep(ended: &Receiver<Child>) {
    for mut child in ended {
        let _ = child.wait();
        while ahead().as_ref().is_some_and(|ahead| ahead.waiting.len() < COUNT) {
            match spawn() {
                Ok(Some(one)) => {
                    if let Some(ahead) = ahead().as_mut() {
                        ahead.waiting.push(one);
                    }
                }
                Ok(None) => break,
                Err(e) => {
                    log::debug!(target: TARGET, "not started ahead: {e}");
                    break;
                }
            }
        }
        #[cfg(feature = "failpoints")]
        fail::fail_point!("archive.ahead");
    }
}
