//! containerd's content store, as its client: what Apply unpacks is there, and there goes what Diff makes.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;

use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::messages::{Empty, FieldMask};
use crate::error::{Error, Kind, Result, show};

/// `ReadContentRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct ReadContent {
    #[prost(string, tag = "1")]
    digest: String,
    #[prost(int64, tag = "2")]
    offset: i64,
    #[prost(int64, tag = "3")]
    size: i64,
}

/// `ReadContentResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Part {
    #[prost(int64, tag = "1")]
    offset: i64,
    #[prost(bytes = "vec", tag = "2")]
    data: Vec<u8>,
}

/// `WriteContentRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct WriteContent {
    #[prost(int32, tag = "1")]
    action: i32,
    #[prost(string, tag = "2")]
    r#ref: String,
    #[prost(int64, tag = "3")]
    total: i64,
    #[prost(string, tag = "4")]
    expected: String,
    #[prost(int64, tag = "5")]
    offset: i64,
    #[prost(bytes = "vec", tag = "6")]
    data: Vec<u8>,
    #[prost(btree_map = "string, string", tag = "7")]
    labels: BTreeMap<String, String>,
}

/// `WriteAction`.
const WRITE: i32 = 1;
const COMMIT: i32 = 2;

/// `WriteContentResponse`, as far as it is read.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Written {
    #[prost(int64, tag = "4")]
    offset: i64,
}

/// `UpdateRequest` and its `Info`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct UpdateContent {
    #[prost(message, optional, tag = "1")]
    info: Option<ContentInfo>,
    #[prost(message, optional, tag = "2")]
    update_mask: Option<FieldMask>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct ContentInfo {
    #[prost(string, tag = "1")]
    digest: String,
    #[prost(btree_map = "string, string", tag = "5")]
    labels: BTreeMap<String, String>,
}

/// `AbortRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Abort {
    #[prost(string, tag = "1")]
    r#ref: String,
}

/// `CreateRequest` of leases.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Lease {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(btree_map = "string, string", tag = "3")]
    labels: BTreeMap<String, String>,
}

const UPDATE: &str = "/containerd.services.content.v1.Content/Update";
const ABORT: &str = "/containerd.services.content.v1.Content/Abort";
const WRITE_TO: &str = "/containerd.services.content.v1.Content/Write";
const LEASE: &str = "/containerd.services.leases.v1.Leases/Create";
const READ: &str = "/containerd.services.content.v1.Content/Read";
/// In which namespace of containerd something is asked for.
const NAMESPACE: &str = "containerd-namespace";
/// What keeps a new blob until somebody names it.
const LEASED: &str = "containerd-lease";
/// How long. Diff does not say which lease its client has, and a client names a blob as soon as it has the answer.
const LEASE_TIME: time::Duration = time::Duration::hours(1);
/// Bytes of a blob in one message: containerd takes 16 MiB.
const WRITE_BYTES: usize = 1 << 20;

/// Its content store; connected when it is needed.
#[derive(Clone, Debug)]
pub(super) struct Content {
    channel: Channel,
    runtime: Handle,
}

impl Content {
    /// That of the containerd which listens on `socket`. In a runtime.
    pub(super) fn of(socket: &Path) -> Result<Self> {
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))
            .map_err(|e| Error::new(Kind::Usage, "connect to containerd", show(socket), e))?;
        Ok(Content { channel: endpoint.connect_lazy(), runtime: Handle::current() })
    }

    /// The bytes of a blob. Not in the runtime's own thread.
    pub(super) fn read(&self, namespace: &str, digest: &str) -> Result<Box<dyn Read + Send>> {
        let fail = |why: String| Error::new(Kind::Io, "read from containerd", digest.to_owned(), why);
        let request = asked(ReadContent { digest: digest.to_owned(), offset: 0, size: 0 }, &[(NAMESPACE, namespace)])?;
        let channel = self.channel.clone();
        let stream = self.runtime.block_on(async move {
            let mut grpc = tonic::client::Grpc::new(channel);
            grpc.ready().await.map_err(|e| e.to_string())?;
            let codec = ProstCodec::<ReadContent, Part>::default();
            let answer = grpc.server_streaming(request, PathAndQuery::from_static(READ), codec).await;
            answer.map(tonic::Response::into_inner).map_err(|e| e.to_string())
        });
        let stream = stream.map_err(fail)?;
        Ok(Box::new(Reader { stream, runtime: self.runtime.clone(), part: Vec::new(), at: 0 }))
    }
}

/// A request in a namespace.
fn asked<M>(message: M, headers: &[(&'static str, &str)]) -> Result<Request<M>> {
    let mut request = Request::new(message);
    for (name, value) in headers {
        let value = value.parse().map_err(|_| {
            Error::new(Kind::Invalid, "call containerd", format!("{value:?}"), format!("it cannot be a {name}"))
        })?;
        request.metadata_mut().insert(*name, value);
    }
    Ok(request)
}

fn failed(subject: &str, status: &Status) -> Error {
    Error::new(Kind::Io, "write to containerd", subject, status.to_string())
}

impl Content {
    fn call<Q, A>(&self, path: &'static str, request: Request<Q>) -> std::result::Result<A, Status>
    where
        Q: prost::Message + Default + 'static,
        A: prost::Message + Default + 'static,
    {
        let channel = self.channel.clone();
        self.runtime.block_on(async move {
            let mut grpc = tonic::client::Grpc::new(channel);
            grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
            let codec = ProstCodec::<Q, A>::default();
            grpc.unary(request, PathAndQuery::from_static(path), codec).await.map(tonic::Response::into_inner)
        })
    }

    /// Begin a blob. Not in the runtime's own thread.
    pub(super) fn ingest(&self, namespace: &str) -> Result<Ingest> {
        let name = random_name()?;
        let expires = time::OffsetDateTime::now_utc() + LEASE_TIME;
        let expires = expires
            .format(&time::format_description::well_known::Rfc3339)
            .map_err(|e| Error::new(Kind::Io, "write the time", "", e))?;
        let lease = Lease { id: name.clone(), labels: BTreeMap::from([("containerd.io/gc.expire".into(), expires)]) };
        self.call::<_, Empty>(LEASE, asked(lease, &[(NAMESPACE, namespace)])?).map_err(|e| failed(&name, &e))?;
        let (messages, stream) = mpsc::channel(1);
        let request = asked(ReceiverStream::new(stream), &[(NAMESPACE, namespace), (LEASED, &name)])?;
        Ok(Ingest {
            content: self.clone(),
            namespace: namespace.to_owned(),
            name,
            messages,
            call: Some(request),
            answers: None,
            sha: Sha256::new(),
            offset: 0,
            buffer: Vec::with_capacity(WRITE_BYTES),
            is_done: false,
        })
    }
}

fn random_name() -> Result<String> {
    let mut random = [0_u8; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::sys("read random bytes", "", e))?;
    Ok(format!("fsprov-diff-{}", data_encoding::HEXLOWER.encode(&random)))
}

/// A blob that is being written. Dropped before its end, containerd forgets it.
pub(super) struct Ingest {
    content: Content,
    namespace: String,
    name: String,
    messages: mpsc::Sender<WriteContent>,
    call: Option<Request<ReceiverStream<WriteContent>>>,
    answers: Option<Streaming<Written>>,
    sha: Sha256,
    offset: u64,
    buffer: Vec<u8>,
    is_done: bool,
}

impl Ingest {
    /// Send a message and wait for its answer.
    fn send(&mut self, message: WriteContent) -> std::result::Result<Written, Status> {
        let gone = || Status::unavailable("the connection ended");
        let runtime = self.content.runtime.clone();
        runtime.block_on(async {
            // It takes the first message before it begins to answer.
            self.messages.send(message).await.map_err(|_| gone())?;
            if let Some(request) = self.call.take() {
                let mut grpc = tonic::client::Grpc::new(self.content.channel.clone());
                grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
                let codec = ProstCodec::<WriteContent, Written>::default();
                let answers = grpc.streaming(request, PathAndQuery::from_static(WRITE_TO), codec).await?;
                self.answers = Some(answers.into_inner());
            }
            self.answers.as_mut().ok_or_else(gone)?.message().await?.ok_or_else(gone)
        })
    }

    fn send_data(&mut self) -> std::result::Result<(), Status> {
        let data = std::mem::replace(&mut self.buffer, Vec::with_capacity(WRITE_BYTES));
        let next = self.offset + data.len() as u64;
        let (offset, name) = (self.offset as i64, self.name.clone());
        let written =
            self.send(WriteContent { action: WRITE, r#ref: name, offset, data, ..WriteContent::default() })?;
        if written.offset as u64 != next {
            return Err(Status::data_loss(format!("it has {} bytes, not {next}", written.offset)));
        }
        self.offset = next;
        Ok(())
    }

    /// Commit it. Gives its digest and size.
    pub(super) fn finish(mut self, labels: &BTreeMap<String, String>) -> Result<(String, i64)> {
        let digest = format!("sha256:{}", data_encoding::HEXLOWER.encode(&self.sha.clone().finalize()));
        if !self.buffer.is_empty() {
            self.send_data().map_err(|e| failed(&digest, &e))?;
        }
        let size = self.offset as i64;
        let commit = WriteContent {
            action: COMMIT,
            r#ref: self.name.clone(),
            total: size,
            expected: digest.clone(),
            offset: size,
            labels: labels.clone(),
            ..WriteContent::default()
        };
        match self.send(commit) {
            Ok(_) => self.is_done = true,
            // Somebody has made the same before, and may not have said what is in it.
            Err(e) if e.code() == Code::AlreadyExists => {
                let info = ContentInfo { digest: digest.clone(), labels: labels.clone() };
                let paths = labels.keys().map(|name| format!("labels.{name}")).collect();
                let update = UpdateContent { info: Some(info), update_mask: Some(FieldMask { paths }) };
                let update = asked(update, &[(NAMESPACE, &self.namespace), (LEASED, &self.name)])?;
                self.content.call::<_, Empty>(UPDATE, update).map_err(|e| failed(&digest, &e))?;
            }
            Err(e) => return Err(failed(&digest, &e)),
        }
        Ok((digest, size))
    }
}

impl Write for Ingest {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let count = data.len().min(WRITE_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&data[..count]);
        self.sha.update(&data[..count]);
        if self.buffer.len() == WRITE_BYTES {
            self.send_data().map_err(std::io::Error::other)?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        if self.is_done || self.answers.is_none() {
            return;
        }
        self.answers = None;
        let Ok(abort) = asked(Abort { r#ref: self.name.clone() }, &[(NAMESPACE, &self.namespace)]) else { return };
        match self.content.call::<_, Empty>(ABORT, abort) {
            Err(e) if e.code() != Code::NotFound => log::warn!("{}", failed(&self.name, &e)),
            _ => {}
        }
    }
}

struct Reader {
    stream: Streaming<Part>,
    runtime: Handle,
    part: Vec<u8>,
    at: usize,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.part.len() {
            match self.runtime.block_on(self.stream.message()).map_err(std::io::Error::other)? {
                Some(part) => (self.part, self.at) = (part.data, 0),
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.part.len() - self.at);
        buffer[..count].copy_from_slice(&self.part[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
