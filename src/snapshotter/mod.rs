//! containerd's snapshotter: its Snapshots service over this program's store and the kernel's overlayfs, on a unix socket.
//!
//! Here tokio has its place: waiting for requests is the work; what a call does runs on threads of its own. Processes that are started
//! meanwhile are this program again (readers of archives, FUSE servers), or hold a user namespace for the moment in which a mount is made.

mod chain;
mod content;
mod diff;
mod dirs;
mod filter;
mod mapped;
mod merged;
mod messages;
mod metrics;
mod mounted;
mod record;
mod service;
mod snapshots;
mod socket;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub(crate) use mounted::{Mounted, mounted};
pub(crate) use snapshots::{Known, LowerForm};
pub(crate) use socket::Socket;

use crate::error::{Error, Kind, Result, show};
use crate::store::Store;
use service::{METRICS, Services, Text};
use snapshots::Snapshots;

/// How long connections may stay open after a signal. A call that is worked on is finished, no matter how long it takes.
const GRACE: Duration = Duration::from_secs(1);

/// How long a snapshotter is waited for that is asked for its figures.
const PATIENCE: Duration = Duration::from_secs(5);

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

/// What the snapshotter that listens on `socket` did and has, in Prometheus's text format.
pub(crate) fn metrics_of(socket: &Path) -> Result<String> {
    const OP: &str = "ask snapshotter";
    let fail = |why: String| {
        let error = Error::new(Kind::Io, OP, show(socket), why);
        error.hint("is it running? --socket says where it listens")
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| fail(e.to_string()))?;
    let text = runtime.block_on(async {
        let endpoint =
            tonic::transport::Endpoint::try_from(format!("unix://{}", socket.display())).map_err(|e| e.to_string())?;
        let mut grpc = tonic::client::Grpc::new(endpoint.connect_lazy());
        grpc.ready().await.map_err(|e| e.to_string())?;
        let codec = tonic_prost::ProstCodec::<messages::Empty, Text>::default();
        let path = tonic::codegen::http::uri::PathAndQuery::from_static(METRICS);
        let asked = grpc.unary(tonic::Request::new(messages::Empty {}), path, codec);
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => Ok(answer.into_inner().text),
            Ok(Err(status)) => Err(status.to_string()),
            Err(_) => Err("it does not answer".to_owned()),
        }
    });
    text.map_err(fail)
}

/// Serve on what `listen` gives until SIGINT or SIGTERM. `ready` is called when requests are answered.
pub(crate) fn serve(
    places: &Places,
    store: Store,
    (known, lower): (Known, LowerForm),
    listen: impl FnOnce() -> Result<Socket>,
    ready: impl FnOnce(),
) -> Result<()> {
    let fail = |e| Error::io("serve", "", e);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Some of those that wait for containerd leave room for those that it waits for.
        .max_blocking_threads(2 * MAX_CALLS)
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
        let snapshots = Snapshots::open(&places.state, store, known, lower)?;
        log::info!("{} snapshots in {}", snapshots.count(), show(snapshots.state()));
        snapshots.make_ready();
        let socket = listen()?;
        let accepted = socket.accepted()?;
        let snapshots = Arc::new(snapshots);
        let content = content::Content::of(&places.containerd)?;
        let differ = Arc::new(diff::Differ { snapshots: snapshots.clone(), content });
        let metrics = Arc::new(metrics::Metrics::new());
        crate::store::expect_more();
        ready();
        let served = tonic::transport::Server::builder()
            .max_concurrent_streams(Some(MAX_CALLS as u32))
            .serve_with_incoming_shutdown(Services { snapshots, differ, metrics }, accepted, ended_for_server);
        tokio::select! {
            done = served => done.map_err(|e| Error::new(Kind::Io, "serve", "", e)),
            // A client that reads nothing keeps its connection for ever.
            () = async {
                let _ = ended.wait_for(|is| *is).await;
                tokio::time::sleep(GRACE).await;
            } => Ok(()),
        }
    })
}
