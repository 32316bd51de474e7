//! containerd's snapshotter: its Snapshots service over this program's store and the kernel's overlayfs, on a unix socket.
//!
//! Here tokio has its place: waiting for requests is the work. It is up before nothing forks; what a call does runs on threads of its own.

mod chain;
mod content;
mod diff;
mod dirs;
mod filter;
mod messages;
mod record;
mod service;
mod snapshots;
mod socket;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use snapshots::Known;
pub(crate) use socket::Socket;

use crate::error::{Error, Result, show};
use crate::store::Store;
use service::Services;
use snapshots::Snapshots;

/// How long connections may stay open after a signal. A call that is worked on is finished, no matter how long it takes.
const GRACE: Duration = Duration::from_secs(1);

/// Calls that are worked on at the same time; others wait.
const MAX_CALLS: usize = 64;

/// Where things are.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The state directory.
    pub(crate) state: PathBuf,
    /// containerd's own socket: what Apply unpacks is read from there.
    pub(crate) containerd: PathBuf,
}

/// Serve on what `listen` gives until SIGINT or SIGTERM. `ready` is called when requests are answered.
pub(crate) fn serve(
    places: &Places,
    store: Store,
    known: Known,
    listen: impl FnOnce() -> Result<Socket>,
    ready: impl FnOnce(),
) -> Result<()> {
    let fail = |e| Error::io("serve", "", e);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_CALLS)
        .build()
        .map_err(fail)?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
        let (end, mut ended) = tokio::sync::watch::channel(false);
        let ended_for_server = {
            let mut ended = ended.clone();
            async move {
                let _ = ended.wait_for(|is| *is).await;
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            let _ = end.send(true);
        });
        // Last: a client that sees the socket is answered, and a signal is heeded.
        let snapshots = Snapshots::open(&places.state, store, known)?;
        log::info!("{} snapshots in {}", snapshots.count(), show(snapshots.state()));
        let socket = listen()?;
        let accepted = socket.accepted()?;
        let snapshots = Arc::new(snapshots);
        let content = content::Content::of(&places.containerd)?;
        let differ = Arc::new(diff::Differ { snapshots: snapshots.clone(), content });
        ready();
        let served = tonic::transport::Server::builder()
            .max_concurrent_streams(Some(MAX_CALLS as u32))
            .serve_with_incoming_shutdown(Services { snapshots, differ }, accepted, ended_for_server);
        tokio::select! {
            done = served => done.map_err(|e| Error::new(crate::error::Kind::Io, "serve", "", e)),
            // A client that reads nothing keeps its connection for ever.
            () = async {
                let _ = ended.wait_for(|is| *is).await;
                tokio::time::sleep(GRACE).await;
            } => Ok(()),
        }
    })
}
