//! Messages between processes of this program: JSON with descriptors beside it, over a SOCK_SEQPACKET pair. What they mean is the affair of
//! those who speak.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::sys::process::timespec;

/// Most descriptors in one message: the kernel takes 253 (SCM_MAX_FD, net/scm.h).
pub(crate) const MAX_FDS: usize = 250;
/// Longest message: what a job needs goes through a memory file; statistics are a few KiB. The kernel's default send buffer
/// is 208 KiB.
const MAX_MESSAGE: usize = 64 * 1024;

/// How long a full socket is waited for: one end that is stopped must not stop the other.
const SEND_PATIENCE: Duration = Duration::from_secs(2);

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Channel(fd)
    }
}

impl Channel {
    /// A channel, and the descriptor of its other end.
    pub(crate) fn pair() -> Result<(Channel, OwnedFd)> {
        let fail = |e| Error::sys("make a socket pair", "", e);
        let (one, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(fail)?;
        for end in [&one, &other] {
            set_socket_timeout(end, Timeout::Send, Some(SEND_PATIENCE)).map_err(fail)?;
        }
        Ok((Channel(one), other))
    }

    /// Send one message.
    pub(crate) fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<()> {
        const OP: &str = "send a message to another process of fsprov";
        let bytes = serde_json::to_vec(message).map_err(|e| Error::new(Kind::Io, OP, "", e))?;
        if bytes.len() > MAX_MESSAGE {
            return Err(Error::new(Kind::Limit, OP, "", format!("it is longer than {MAX_MESSAGE} bytes")));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Error::new(Kind::Limit, OP, "", "too many descriptors in one message"));
        }
        // By tries, not by the clock, which a process behind walls cannot ask everywhere.
        let mut tries = SEND_PATIENCE.as_millis() / 2;
        loop {
            match sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                // More descriptors of this user are on their way than one process may have open (too_many_unix_fds in net/core/scm.c): until
                // others have received theirs.
                Err(Errno::TOOMANYREFS) if tries > 0 => {
                    tries -= 1;
                    let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 2_000_000 }));
                }
                Err(e) => return Err(Error::sys(OP, "", e)),
            }
        }
    }

    /// The next message; waits for it. `None`: the other end is closed.
    pub(crate) fn receive<M: for<'de> Deserialize<'de>>(&self) -> Result<Option<(M, Vec<OwnedFd>)>> {
        self.next(RecvFlags::empty())
    }

    /// The next message, which must come within this time. `None`: the other end is closed.
    pub(crate) fn receive_within<M: for<'de> Deserialize<'de>>(
        &self,
        patience: Duration,
    ) -> Result<Option<(M, Vec<OwnedFd>)>> {
        let left = timespec(patience);
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        match rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left))) {
            Ok(0) => {
                let why = format!("none came within {} s", patience.as_secs());
                Err(Error::new(Kind::Helper, "wait for a message of another process of fsprov", "", why))
            }
            Ok(_) => self.receive(),
            Err(e) => Err(Error::sys("wait for a message of another process of fsprov", "", e)),
        }
    }

    /// The next message that is there. `None`: there is none, or the other end is closed and nothing is left.
    pub(crate) fn receive_now<M: for<'de> Deserialize<'de>>(&self) -> Result<Option<(M, Vec<OwnedFd>)>> {
        self.next(RecvFlags::DONTWAIT)
    }

    /// Has the other end gone?
    pub(crate) fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }

    fn next<M: for<'de> Deserialize<'de>>(&self, flags: RecvFlags) -> Result<Option<(M, Vec<OwnedFd>)>> {
        const OP: &str = "read a message of another process of fsprov";
        let mut bytes = vec![0_u8; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags | RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET | Errno::AGAIN) => return Ok(None),
                Err(e) => return Err(Error::sys(OP, "", e)),
                Ok(got) => break got,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.bytes == 0 {
            return Ok(None);
        }
        if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            // A descriptor limit that is reached shows as a truncated control message (recvmsg(2), unix(7)).
            return Err(
                Error::new(Kind::Limit, OP, "", "it did not arrive whole").hint("raise the limit of open files")
            );
        }
        let message = serde_json::from_slice(&bytes[..got.bytes]).map_err(|e| Error::new(Kind::Invalid, OP, "", e))?;
        Ok(Some((message, fds)))
    }
}

/// From another program: a message, whatever it says, with one descriptor. `None`: the other end was closed without.
pub(crate) fn receive_descriptor(socket: impl AsFd) -> rustix::io::Result<Option<OwnedFd>> {
    let mut byte = [0_u8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(&mut byte)];
    retry_on_intr(|| recvmsg(&socket, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC))?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_descriptors_and_the_end_shows() {
        let (one, other) = Channel::pair().unwrap();
        let other = Channel::from(other);
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let many: Vec<_> = std::iter::repeat_n(file.as_fd(), MAX_FDS).collect();
        one.send(&"many", &many).unwrap();
        one.send(&"none", &[]).unwrap();
        let (message, fds) = other.receive::<String>().unwrap().unwrap();
        assert!(message == "many" && fds.len() == MAX_FDS);
        let (message, fds) = other.receive::<String>().unwrap().unwrap();
        assert!(message == "none" && fds.is_empty());
        assert!(other.receive_now::<String>().unwrap().is_none());
        drop(one);
        assert!(other.receive::<String>().unwrap().is_none());
        assert!(other.send(&"late", &[]).is_err());
    }
}
