//! containerd's content store, as its client: what Apply unpacks is there.

use std::io::Read;
use std::path::Path;

use tokio::runtime::Handle;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Streaming};
use tonic_prost::ProstCodec;

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

const READ: &str = "/containerd.services.content.v1.Content/Read";
/// In which namespace of containerd something is asked for.
const NAMESPACE: &str = "containerd-namespace";

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
        let mut request = Request::new(ReadContent { digest: digest.to_owned(), offset: 0, size: 0 });
        let value = namespace.parse().map_err(|_| fail(format!("{namespace:?} cannot be a namespace")))?;
        request.metadata_mut().insert(NAMESPACE, value);
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
