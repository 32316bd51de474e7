//! The gRPC side: which call is which, by hand. What a call does is [`super::snapshots`]'s.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio_stream::Stream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::{Grpc, NamedService};
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;

use super::diff::Differ;
use super::filter::Filters;
use super::messages::{Cleanup, Empty, Keyed, List, Listed};
use super::metrics::{Metrics, Went};
use super::record::Kind;
use super::snapshots::Snapshots;
use crate::error::{Error, Kind as ErrorKind, Result};

/// Longest request. containerd's are some kilobytes: keys and labels.
const MAX_REQUEST_BYTES: usize = 1 << 20;

/// How long after a call of `Prepare`: a container has started by then.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(500);

type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The services on one socket.
#[derive(Clone, Debug)]
pub(super) struct Services {
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) differ: Arc<Differ>,
    pub(super) metrics: Arc<Metrics>,
}

/// Our own: an empty message, and [`Text`] as the answer.
pub(super) const METRICS: &str = "/fsprov.snapshotter.v1.Snapshotter/Metrics";

/// Text.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Text {
    #[prost(string, tag = "1")]
    pub(super) text: String,
}

const DIFF: &str = "containerd.services.diff.v1.Diff";
const HEALTH: &str = "grpc.health.v1.Health";

/// `HealthCheckResponse` of grpc.health.v1.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
struct Healthy {
    #[prost(int32, tag = "1")]
    status: i32,
}

impl Healthy {
    const SERVING: i32 = 1;
}

impl NamedService for Services {
    const NAME: &'static str = "containerd.services.snapshots.v1.Snapshots";
}

impl Service<http::Request<Body>> for Services {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Later<std::result::Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let services = self.clone();
        Box::pin(async move {
            let (metrics, begin) = (services.metrics.clone(), std::time::Instant::now());
            let call = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
            let answer = services.answer(request).await;
            metrics.count(&call, begin.elapsed(), went(&answer));
            Ok(answer)
        })
    }
}

fn went(answer: &http::Response<Body>) -> Went {
    match Status::from_header_map(answer.headers()).map_or(Code::Ok, |status| status.code()) {
        Code::Ok | Code::NotFound | Code::AlreadyExists => Went::Well,
        _ => Went::Wrong,
    }
}

impl Services {
    async fn answer(self, request: http::Request<Body>) -> http::Response<Body> {
        let path = request.uri().path().to_owned();
        let Some((service, method)) = path.trim_start_matches('/').split_once('/') else {
            return Status::unimplemented(path).into_http();
        };
        let all = self.snapshots;
        match (service, method) {
            (Self::NAME, "Prepare") => {
                let answer = unary(all.clone(), request, |all, asked| all.prepare(asked, Kind::Active)).await;
                if all.lacks_ready() {
                    tokio::spawn(make_ready(all));
                }
                answer
            }
            (Self::NAME, "View") => unary(all, request, |all, asked| all.prepare(asked, Kind::View)).await,
            (Self::NAME, "Mounts") => {
                let work = |all: &Snapshots, asked: Keyed| all.mounts(&asked);
                unary_or_at_once(all, request, Snapshots::mounts_at_once, work).await
            }
            (Self::NAME, "Commit") => unary(all, request, |all, asked| all.commit(asked).map(|()| Empty {})).await,
            (Self::NAME, "Remove") => unary(all, request, |all, asked| all.remove(&asked).map(|()| Empty {})).await,
            (Self::NAME, "Stat") => {
                let work = |all: &Snapshots, asked: Keyed| all.stat(&asked);
                unary_or_at_once(all, request, Snapshots::stat_at_once, work).await
            }
            (Self::NAME, "Update") => unary(all, request, Snapshots::update).await,
            (Self::NAME, "Usage") => unary(all, request, |all, asked| all.usage(&asked)).await,
            (Self::NAME, "Cleanup") => unary(all, request, |all, Cleanup {}| all.cleanup().map(|()| Empty {})).await,
            (Self::NAME, "List") => {
                let mut grpc =
                    Grpc::new(ProstCodec::<Listed, List>::default()).max_decoding_message_size(MAX_REQUEST_BYTES);
                grpc.server_streaming(Lister(all), request).await
            }
            (HEALTH, "Check") => unary(all, request, |_, Empty {}| Ok(Healthy { status: Healthy::SERVING })).await,
            (DIFF, "Diff") => unary(self.differ, request, Differ::diff).await,
            (DIFF, "Apply") => unary(self.differ, request, Differ::apply).await,
            _ if path == METRICS => {
                let asked = Arc::new((all, self.metrics));
                unary(asked, request, |(all, metrics), Empty {}| Ok(Text { text: metrics.text(all) })).await
            }
            _ => Status::unimplemented(path).into_http(),
        }
    }
}

/// Make snapshots for the next calls of `Prepare`, when what follows this one is done.
async fn make_ready(all: Arc<Snapshots>) {
    tokio::time::sleep(PAUSE).await;
    let _ = tokio::task::spawn_blocking(move || all.make_ready()).await;
}

/// One call with one answer, on a thread that may wait for a disk.
async fn unary<T, M, R>(all: Arc<T>, request: http::Request<Body>, work: fn(&T, M) -> Result<R>) -> http::Response<Body>
where
    T: Send + Sync + 'static,
    M: prost::Message + Default + 'static,
    R: prost::Message + Default + 'static,
{
    unary_or_at_once(all, request, |_, _| None, work).await
}

/// [`unary`]; what `at_once` answers takes less time than to wake that thread.
async fn unary_or_at_once<T, M, R>(
    all: Arc<T>,
    request: http::Request<Body>,
    at_once: fn(&T, &M) -> Option<Result<R>>,
    work: fn(&T, M) -> Result<R>,
) -> http::Response<Body>
where
    T: Send + Sync + 'static,
    M: prost::Message + Default + 'static,
    R: prost::Message + Default + 'static,
{
    let mut grpc = Grpc::new(ProstCodec::<R, M>::default()).max_decoding_message_size(MAX_REQUEST_BYTES);
    grpc.unary(Call { all, at_once, work }, request).await
}

struct Call<T, M, R> {
    all: Arc<T>,
    at_once: fn(&T, &M) -> Option<Result<R>>,
    work: fn(&T, M) -> Result<R>,
}

impl<T: Send + Sync + 'static, M: Send + 'static, R: Send + 'static> Service<Request<M>> for Call<T, M, R> {
    type Response = Response<R>;
    type Error = Status;
    type Future = Later<std::result::Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<M>) -> Self::Future {
        if let Some(answer) = (self.at_once)(&self.all, request.get_ref()) {
            return Box::pin(std::future::ready(answer.map(Response::new).map_err(|error| status(&error))));
        }
        let (all, work) = (self.all.clone(), self.work);
        Box::pin(async move {
            let done = tokio::task::spawn_blocking(move || work(&all, request.into_inner())).await;
            match done {
                Ok(Ok(answer)) => Ok(Response::new(answer)),
                Ok(Err(error)) => Err(status(&error)),
                Err(e) => Err(Status::internal(e.to_string())),
            }
        })
    }
}

/// What an error is to containerd, which goes by the code.
fn status(error: &Error) -> Status {
    let code = match error.kind() {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Exists => Code::AlreadyExists,
        ErrorKind::Usage | ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Busy => Code::FailedPrecondition,
        ErrorKind::Limit => Code::ResourceExhausted,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Permission => Code::PermissionDenied,
        ErrorKind::Integrity => Code::DataLoss,
        ErrorKind::Io | ErrorKind::Helper => Code::Internal,
    };
    let level = if code == Code::Internal || code == Code::DataLoss { log::Level::Error } else { log::Level::Debug };
    log::log!(level, "{error}");
    Status::new(code, error.to_string())
}

struct Lister(Arc<Snapshots>);

impl Service<Request<List>> for Lister {
    type Response = Response<Listing>;
    type Error = Status;
    type Future = std::future::Ready<std::result::Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<List>) -> Self::Future {
        let filters = Filters::parse(&request.into_inner().filters).map_err(|e| status(&e));
        std::future::ready(
            filters.map(|filters| Response::new(Listing { all: self.0.clone(), filters, after: None, is_done: false })),
        )
    }
}

/// The answer to List, made as it is read: a reader who stops costs a name.
struct Listing {
    all: Arc<Snapshots>,
    filters: Filters,
    after: Option<String>,
    is_done: bool,
}

impl Stream for Listing {
    type Item = std::result::Result<Listed, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_done {
            return Poll::Ready(None);
        }
        let (info, after) = self.all.list_after(self.after.as_deref(), &self.filters);
        self.is_done = after.is_none();
        self.after = after;
        match (info.is_empty(), self.is_done) {
            (true, true) => Poll::Ready(None),
            // Nothing among those looked at: others have their turn first.
            (true, false) => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
            _ => Poll::Ready(Some(Ok(Listed { info }))),
        }
    }
}
