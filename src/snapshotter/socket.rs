//! The socket: who may speak on it, and where it comes from.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_stream::Stream;

use crate::error::{Error, Kind, Result, show};

/// Longest path of a socket: `sun_path` of unix(7), with the name that it has while it is made.
const MAX_PATH_BYTES: usize = 100;

/// A socket to listen on.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    /// Where we made it, to be removed at the end; `None`: a service manager has it.
    path: Option<PathBuf>,
}

impl Socket {
    /// Take the one that a service manager passed (sd_listen_fds(3)).
    pub(crate) fn passed(fd: OwnedFd) -> Result<Self> {
        let listener = UnixListener::from(fd);
        let fail = |e| Error::io("use the socket that was passed", "", e);
        listener.local_addr().map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        Ok(Socket { listener, path: None })
    }

    /// Make one at `path`, mode 0600. What a dead snapshotter left there is replaced; anything else is not.
    pub(crate) fn make(path: &Path) -> Result<Self> {
        const OP: &str = "make socket";
        let fail = |e| Error::io(OP, show(path), e);
        if path.as_os_str().len() > MAX_PATH_BYTES {
            let why = format!("its path is longer than {MAX_PATH_BYTES} bytes");
            return Err(Error::new(Kind::Usage, OP, show(path), why).hint("choose a shorter one"));
        }
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                let why = "something else than a socket is there";
                return Err(Error::new(Kind::Exists, OP, show(path), why).hint("choose another path"));
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(Error::new(Kind::Busy, OP, show(path), "a program listens on it")
                    .hint("stop that one, or choose another path"));
            }
            _ => {}
        }
        // Made beside and renamed: at no moment can others connect, nor does it have another mode.
        let fresh = path.with_extension(format!("{}", std::process::id()));
        let _ = std::fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh).map_err(fail)?;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        std::fs::rename(&fresh, path).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        Ok(Socket { listener, path: Some(path.to_owned()) })
    }

    /// The connections of those who may speak here. In a runtime.
    pub(super) fn accepted(&self) -> Result<Accepted> {
        let fail = |e| Error::io("listen", "", e);
        let listener = self.listener.try_clone().map_err(fail)?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(fail)?;
        Ok(Accepted { listener, own: rustix::process::geteuid().as_raw() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Connections of root and of our own user; others' are closed.
pub(super) struct Accepted {
    listener: tokio::net::UnixListener,
    own: u32,
}

impl Stream for Accepted {
    type Item = std::io::Result<tokio::net::UnixStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let stream = match self.listener.poll_accept(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok((stream, _))) => stream,
                Poll::Ready(Err(e)) => {
                    // Out of descriptors, or a connection that was given up: those that come later may fare better.
                    log::warn!("accept a connection: {e}");
                    return Poll::Ready(Some(Err(e)));
                }
            };
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == 0 || peer.uid() == self.own => return Poll::Ready(Some(Ok(stream))),
                Ok(peer) => log::warn!("a connection of user {} was refused", peer.uid()),
                Err(e) => log::warn!("a connection of an unknown user was refused: {e}"),
            }
        }
    }
}
