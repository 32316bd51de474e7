//! A containerd of our own making: its content store, as far as the Diff service speaks to it.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::client::{Empty, Labels};
use crate::images::sha256;
use crate::served::Served;

macro_rules! messages {
    ($($name:ident { $($(#[$how:meta])* $field:ident: $type:ty,)* })*) => {
        $(#[derive(Clone, PartialEq, prost::Message)]
        pub(crate) struct $name { $($(#[$how])* pub(crate) $field: $type,)* })*
    };
}

messages! {
    Lease {
        #[prost(string, tag = "1")]
        id: String,
        #[prost(btree_map = "string, string", tag = "3")]
        labels: Labels,
    }
    AbortAsked {
        #[prost(string, tag = "1")]
        name: String,
    }
    BlobInfo {
        #[prost(string, tag = "1")]
        digest: String,
        #[prost(btree_map = "string, string", tag = "5")]
        labels: Labels,
    }
    Paths {
        #[prost(string, repeated, tag = "1")]
        paths: Vec<String>,
    }
    UpdateAsked {
        #[prost(message, optional, tag = "1")]
        info: Option<BlobInfo>,
        #[prost(message, optional, tag = "2")]
        mask: Option<Paths>,
    }
    WriteAsked {
        #[prost(int32, tag = "1")]
        action: i32,
        #[prost(string, tag = "2")]
        name: String,
        #[prost(int64, tag = "3")]
        total: i64,
        #[prost(string, tag = "4")]
        expected: String,
        #[prost(int64, tag = "5")]
        offset: i64,
        #[prost(bytes = "vec", tag = "6")]
        data: Vec<u8>,
        #[prost(btree_map = "string, string", tag = "7")]
        labels: Labels,
    }
    WriteAnswer {
        #[prost(int32, tag = "1")]
        action: i32,
        #[prost(int64, tag = "4")]
        offset: i64,
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Descriptor {
    #[prost(string, tag = "1")]
    pub(crate) media_type: String,
    #[prost(string, tag = "2")]
    pub(crate) digest: String,
    #[prost(int64, tag = "3")]
    pub(crate) size: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ReadAsked {
    #[prost(string, tag = "1")]
    digest: String,
    #[prost(int64, tag = "2")]
    offset: i64,
    #[prost(int64, tag = "3")]
    size: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ReadAnswer {
    #[prost(int64, tag = "1")]
    offset: i64,
    #[prost(bytes = "vec", tag = "2")]
    data: Vec<u8>,
}

pub(crate) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// What the content store of the other side has, and was asked for.
#[derive(Default)]
pub(crate) struct Blobs {
    pub(crate) by_digest: BTreeMap<String, Vec<u8>>,
    pub(crate) labels: BTreeMap<String, Labels>,
    /// Being written, by their names.
    pub(crate) begun: BTreeMap<String, Vec<u8>>,
    /// Namespaces, and leases with the time they last.
    pub(crate) leases: Vec<(String, Lease)>,
    /// How many more bytes of blobs it takes.
    pub(crate) room: Option<usize>,
    /// How long a part of a blob takes to come.
    pub(crate) wait: std::time::Duration,
    /// Namespace and digest.
    asked: Vec<(String, String)>,
}

#[derive(Clone)]
struct ContentStore(Arc<Mutex<Blobs>>);

type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl Service<http::Request<Body>> for ContentStore {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Later<Result<Self::Response, Self::Error>>;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let blobs = self.0.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/containerd.services.content.v1.Content/Read" => {
                    let mut grpc = tonic::server::Grpc::new(ProstCodec::<ReadAnswer, ReadAsked>::default());
                    grpc.server_streaming(Reads(blobs), request).await
                }
                "/containerd.services.content.v1.Content/Write" => {
                    let mut grpc = tonic::server::Grpc::new(ProstCodec::<WriteAnswer, WriteAsked>::default());
                    grpc.streaming(Writes(blobs), request).await
                }
                "/containerd.services.content.v1.Content/Update" => one(blobs, request, Blobs::update).await,
                "/containerd.services.content.v1.Content/Abort" => one(blobs, request, Blobs::abort).await,
                "/containerd.services.leases.v1.Leases/Create" => one(blobs, request, Blobs::lease).await,
                other => panic!("{other} was called"),
            })
        })
    }
}

struct Reads(Arc<Mutex<Blobs>>);

impl Service<Request<ReadAsked>> for Reads {
    type Response = Response<Pin<Box<dyn tokio_stream::Stream<Item = Result<ReadAnswer, Status>> + Send>>>;
    type Error = Status;
    type Future = std::future::Ready<Result<Self::Response, Status>>;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: Request<ReadAsked>) -> Self::Future {
        let namespace =
            request.metadata().get("containerd-namespace").and_then(|n| n.to_str().ok()).unwrap_or_default();
        let mut blobs = self.0.lock().expect("no panic");
        blobs.asked.push((namespace.to_owned(), request.get_ref().digest.clone()));
        let found = blobs.by_digest.get(&request.get_ref().digest).cloned();
        let wait = blobs.wait;
        std::future::ready(match found {
            Some(bytes) => {
                let parts = tokio_stream::StreamExt::then(Parts { bytes, at: 0 }, move |part| async move {
                    tokio::time::sleep(wait).await;
                    part
                });
                Ok(Response::new(Box::pin(parts)))
            }
            None => Err(Status::not_found("no such blob")),
        })
    }
}

struct Parts {
    bytes: Vec<u8>,
    at: usize,
}

impl tokio_stream::Stream for Parts {
    type Item = Result<ReadAnswer, Status>;
    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let end = self.bytes.len().min(self.at + 100_000);
        if self.at == end {
            return Poll::Ready(None);
        }
        let part = ReadAnswer { offset: self.at as i64, data: self.bytes[self.at..end].to_vec() };
        self.at = end;
        Poll::Ready(Some(Ok(part)))
    }
}

/// A call with one answer.
async fn one<M, A>(
    blobs: Arc<Mutex<Blobs>>,
    request: http::Request<Body>,
    work: fn(&mut Blobs, &str, M) -> Result<A, Status>,
) -> http::Response<Body>
where
    M: prost::Message + Default + 'static,
    A: prost::Message + Default + 'static,
{
    let mut grpc = tonic::server::Grpc::new(ProstCodec::<A, M>::default());
    grpc.unary(One { blobs, work }, request).await
}

struct One<M, A> {
    blobs: Arc<Mutex<Blobs>>,
    work: fn(&mut Blobs, &str, M) -> Result<A, Status>,
}

fn header(request: &tonic::metadata::MetadataMap, name: &str) -> String {
    request.get(name).and_then(|n| n.to_str().ok()).unwrap_or_default().to_owned()
}

impl<M, A> Service<Request<M>> for One<M, A> {
    type Response = Response<A>;
    type Error = Status;
    type Future = std::future::Ready<Result<Self::Response, Status>>;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: Request<M>) -> Self::Future {
        let namespace = header(request.metadata(), "containerd-namespace");
        let answer = (self.work)(&mut self.blobs.lock().expect("no panic"), &namespace, request.into_inner());
        std::future::ready(answer.map(Response::new))
    }
}

impl Blobs {
    fn update(&mut self, _: &str, asked: UpdateAsked) -> Result<Empty, Status> {
        let (info, mask) = (asked.info.unwrap_or_default(), asked.mask.unwrap_or_default());
        let labels = self.labels.get_mut(&info.digest).ok_or_else(|| Status::not_found("no such blob"))?;
        for path in mask.paths {
            let name = path.strip_prefix("labels.").expect("labels alone").to_owned();
            labels.insert(name.clone(), info.labels[&name].clone());
        }
        Ok(Empty {})
    }

    fn abort(&mut self, _: &str, asked: AbortAsked) -> Result<Empty, Status> {
        self.begun.remove(&asked.name).map(|_| Empty {}).ok_or_else(|| Status::not_found("no such ingest"))
    }

    fn lease(&mut self, namespace: &str, lease: Lease) -> Result<Empty, Status> {
        self.leases.push((namespace.to_owned(), lease));
        Ok(Empty {})
    }

    /// What containerd's content service does (services/content/contentserver).
    fn write(&mut self, asked: WriteAsked) -> Result<WriteAnswer, Status> {
        let (name, is_commit) = (asked.name, asked.action == 2);
        if is_commit && self.by_digest.contains_key(&asked.expected) {
            self.begun.remove(&name);
            return Err(Status::already_exists("blob with expected digest exists"));
        }
        if self.room.is_some_and(|room| room < asked.data.len()) {
            return Err(Status::resource_exhausted("no space left on device"));
        }
        let have = self.begun.entry(name.clone()).or_default();
        if asked.offset != have.len() as i64 {
            return Err(Status::out_of_range("write must occur at current offset"));
        }
        have.extend_from_slice(&asked.data);
        let length = have.len() as i64;
        if is_commit {
            let bytes = self.begun.remove(&name).expect("it was begun");
            if asked.expected != sha256(&bytes) || asked.total != length {
                return Err(Status::failed_precondition("unexpected commit digest"));
            }
            self.labels.insert(asked.expected.clone(), asked.labels);
            self.by_digest.insert(asked.expected, bytes);
        }
        Ok(WriteAnswer { action: asked.action, offset: length })
    }
}

struct Writes(Arc<Mutex<Blobs>>);

impl Service<Request<tonic::Streaming<WriteAsked>>> for Writes {
    type Response = Response<Pin<Box<dyn tokio_stream::Stream<Item = Result<WriteAnswer, Status>> + Send>>>;
    type Error = Status;
    type Future = std::future::Ready<Result<Self::Response, Status>>;
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: Request<tonic::Streaming<WriteAsked>>) -> Self::Future {
        let blobs = self.0.clone();
        let (namespace, lease) =
            (header(request.metadata(), "containerd-namespace"), header(request.metadata(), "containerd-lease"));
        let is_leased = |(of, have): &(String, Lease)| *of == namespace && have.id == lease;
        assert!(blobs.lock().expect("no panic").leases.iter().any(is_leased), "{namespace} {lease}");
        let answers = tokio_stream::StreamExt::map(request.into_inner(), move |asked| {
            blobs.lock().expect("no panic").write(asked?)
        });
        std::future::ready(Ok(Response::new(Box::pin(answers))))
    }
}

/// A containerd that has blobs and nothing else.
pub(crate) struct Containerd(pub(crate) Arc<Mutex<Blobs>>);

impl Containerd {
    pub(crate) fn listen(socket: &Path) -> Self {
        let blobs = Arc::new(Mutex::new(Blobs::default()));
        let listener = std::os::unix::net::UnixListener::bind(socket).expect("bind");
        listener.set_nonblocking(true).expect("not blocking");
        let service = ContentStore(blobs.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).expect("listen");
                let incoming = Incoming(listener);
                tonic::transport::Server::builder().serve_with_incoming(service, incoming).await.expect("serve");
            });
        });
        Containerd(blobs)
    }

    /// Put a blob; gives its descriptor.
    pub(crate) fn put(&self, media_type: &str, bytes: Vec<u8>) -> Descriptor {
        let descriptor = Descriptor { media_type: media_type.into(), digest: sha256(&bytes), size: bytes.len() as i64 };
        self.0.lock().expect("no panic").by_digest.insert(descriptor.digest.clone(), bytes);
        descriptor
    }

    pub(crate) fn asked(&self) -> Vec<(String, String)> {
        std::mem::take(&mut self.0.lock().expect("no panic").asked)
    }
}

struct Incoming(tokio::net::UnixListener);

impl tokio_stream::Stream for Incoming {
    type Item = std::io::Result<tokio::net::UnixStream>;
    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_accept(context).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

pub(crate) fn node() -> (Served, Containerd) {
    let served = Served::new();
    let containerd = Containerd::listen(&served.containerd());
    (served, containerd)
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("gzip")
        .arg("-nc")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("run gzip");
    let mut input = child.stdin.take().expect("a pipe");
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || std::io::Write::write_all(&mut input, &bytes));
    let out = child.wait_with_output().expect("wait").stdout;
    writer.join().expect("no panic").expect("write");
    out
}
