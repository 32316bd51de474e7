//! The supplementary groups of a caller: from /proc, or, in a process that has none, from one that has.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::fs::Gid;

/// Supplementary groups taken on: NGROUPS_MAX of Linux (limits.h).
const MAX_GROUPS: usize = 65_536;
/// Longest wait for the other process, which has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who is asked. `Some(None)`: nobody any more.
static CURRENT: OnceLock<Mutex<Option<File>>> = OnceLock::new();

/// A socket to [`answer`] at, and one to [`ask_at`].
pub fn pair() -> std::io::Result<(UnixStream, OwnedFd)> {
    let (answering, asking) = UnixStream::pair()?;
    asking.set_read_timeout(Some(PATIENCE))?;
    asking.set_write_timeout(Some(PATIENCE))?;
    Ok((answering, asking.into()))
}

/// From now on, ask at this socket.
pub fn ask_at(socket: OwnedFd) {
    // As a file: read(2) and write(2), which a worker may call, where a socket has calls of its own.
    let _ = CURRENT.set(Mutex::new(Some(File::from(socket))));
}

/// Answer until the other end is closed. What is told is what /proc/TID/status tells everybody.
pub fn answer(mut socket: UnixStream) {
    let mut thread = [0; 4];
    while socket.read_exact(&mut thread).is_ok() {
        let groups = read(u32::from_ne_bytes(thread)).unwrap_or_default();
        let numbers = std::iter::once(groups.len() as u32).chain(groups.iter().map(|group| group.as_raw()));
        let bytes: Vec<u8> = numbers.flat_map(u32::to_ne_bytes).collect();
        if socket.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// The supplementary groups of a thread that waits for our answer. None: it has none, or they cannot be told.
pub(super) fn of_thread(thread: u32) -> Option<Vec<Gid>> {
    if thread == 0 {
        return None;
    }
    let groups = match CURRENT.get() {
        None => read(thread),
        Some(asked) => {
            let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
            let answer = ask(asked.as_mut()?, thread);
            if let Err(e) = &answer {
                // What comes late would be taken for the next one's answer.
                log::warn!(target: "fsprov::tree::dir", "ask for the groups of callers: {e}: they count no more");
                *asked = None;
            }
            answer.ok()
        }
    };
    groups.filter(|groups| !groups.is_empty())
}

fn ask(mut file: &File, thread: u32) -> std::io::Result<Vec<Gid>> {
    file.write_all(&thread.to_ne_bytes())?;
    let mut count = [0; 4];
    file.read_exact(&mut count)?;
    let count = u32::from_ne_bytes(count) as usize;
    if count > MAX_GROUPS {
        return Err(std::io::Error::other(format!("{count} groups are told")));
    }
    let mut bytes = vec![0; 4 * count];
    file.read_exact(&mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|b| Gid::from_raw(u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))).collect())
}

/// proc_pid_status(5)
fn read(thread: u32) -> Option<Vec<Gid>> {
    let status = std::fs::read(format!("/proc/{thread}/status")).ok()?;
    let line = status.split(|&b| b == b'\n').find_map(|l| l.strip_prefix(b"Groups:"))?;
    let words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    Some(words.take(MAX_GROUPS).filter_map(|g| g.parse().ok().map(Gid::from_raw)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_end_tells_what_proc_tells() {
        let me = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let (far, near) = pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| answer(far));
            let file = File::from(near);
            assert_eq!(ask(&file, me).unwrap(), read(me).unwrap());
            assert_eq!(ask(&file, u32::MAX).unwrap(), [], "no such thread");
            assert_eq!(ask(&file, me).unwrap(), read(me).unwrap());
        });
    }
}
