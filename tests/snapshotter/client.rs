//! containerd's side: its messages and calls, by hand from its API's .proto files, sharing no code with the program.

use std::collections::BTreeMap;
use std::path::Path;

use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

pub(crate) type Labels = BTreeMap<String, String>;
pub(crate) type Answer<T> = Result<T, Status>;

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Empty {}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Time {
    #[prost(int64, tag = "1")]
    pub(crate) seconds: i64,
    #[prost(int32, tag = "2")]
    pub(crate) nanos: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Mount {
    #[prost(string, tag = "1")]
    pub(crate) kind: String,
    #[prost(string, tag = "2")]
    pub(crate) source: String,
    #[prost(string, tag = "3")]
    pub(crate) target: String,
    #[prost(string, repeated, tag = "4")]
    pub(crate) options: Vec<String>,
}

/// Every request of the service, its fields by number: what a call does not have is empty.
#[derive(Clone, PartialEq, prost::Message)]
struct Asked {
    #[prost(string, tag = "1")]
    snapshotter: String,
    #[prost(string, tag = "2")]
    key: String,
    #[prost(string, tag = "3")]
    parent: String,
    #[prost(btree_map = "string, string", tag = "4")]
    labels: Labels,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Info {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) parent: String,
    #[prost(int32, tag = "3")]
    pub(crate) kind: i32,
    #[prost(message, optional, tag = "4")]
    pub(crate) created: Option<Time>,
    #[prost(message, optional, tag = "5")]
    pub(crate) updated: Option<Time>,
    #[prost(btree_map = "string, string", tag = "6")]
    pub(crate) labels: Labels,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MountsAnswer {
    #[prost(message, repeated, tag = "1")]
    mounts: Vec<Mount>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct InfoAnswer {
    #[prost(message, optional, tag = "1")]
    info: Option<Info>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct InfosAnswer {
    #[prost(message, repeated, tag = "1")]
    info: Vec<Info>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Usage {
    #[prost(int64, tag = "1")]
    pub(crate) size: i64,
    #[prost(int64, tag = "2")]
    pub(crate) inodes: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Mask {
    #[prost(string, repeated, tag = "1")]
    paths: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UpdateAsked {
    #[prost(string, tag = "1")]
    snapshotter: String,
    #[prost(message, optional, tag = "2")]
    info: Option<Info>,
    #[prost(message, optional, tag = "3")]
    mask: Option<Mask>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListAsked {
    #[prost(string, tag = "1")]
    snapshotter: String,
    #[prost(string, repeated, tag = "2")]
    filters: Vec<String>,
}

pub(crate) const VIEW: i32 = 1;
pub(crate) const ACTIVE: i32 = 2;
pub(crate) const COMMITTED: i32 = 3;

/// A connection, and what runs it.
pub(crate) struct Client {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

impl Client {
    /// Connected when the first call is made.
    pub(crate) fn new(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).expect("an endpoint");
        let channel = {
            let _inside = runtime.enter();
            endpoint.connect_lazy()
        };
        Client { runtime, channel }
    }

    /// Any call with one answer.
    pub(crate) fn call<Q, A>(&self, path: &'static str, asked: Q) -> Answer<A>
    where
        Q: prost::Message + Default + 'static,
        A: prost::Message + Default + 'static,
    {
        self.runtime.block_on(async {
            let mut grpc = tonic::client::Grpc::new(self.channel.clone());
            grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
            let path = PathAndQuery::from_static(path);
            let answer = grpc.unary(Request::new(asked), path, ProstCodec::<Q, A>::default()).await?;
            Ok(answer.into_inner())
        })
    }

    fn keyed<A: prost::Message + Default + 'static>(&self, path: &'static str, key: &str) -> Answer<A> {
        self.call(path, Asked { snapshotter: "fsprov".into(), key: key.into(), ..Asked::default() })
    }

    fn made(&self, path: &'static str, key: &str, parent: &str, labels: Labels) -> Answer<Vec<Mount>> {
        let asked = Asked { snapshotter: "fsprov".into(), key: key.into(), parent: parent.into(), labels };
        self.call::<_, MountsAnswer>(path, asked).map(|answer| answer.mounts)
    }

    pub(crate) fn prepare(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        self.prepare_with(key, parent, Labels::new())
    }

    pub(crate) fn prepare_with(&self, key: &str, parent: &str, labels: Labels) -> Answer<Vec<Mount>> {
        self.made("/containerd.services.snapshots.v1.Snapshots/Prepare", key, parent, labels)
    }

    pub(crate) fn view(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        self.made("/containerd.services.snapshots.v1.Snapshots/View", key, parent, Labels::new())
    }

    pub(crate) fn mounts(&self, key: &str) -> Answer<Vec<Mount>> {
        self.keyed::<MountsAnswer>("/containerd.services.snapshots.v1.Snapshots/Mounts", key)
            .map(|answer| answer.mounts)
    }

    pub(crate) fn commit(&self, name: &str, key: &str) -> Answer<()> {
        self.commit_with(name, key, Labels::new())
    }

    pub(crate) fn commit_with(&self, name: &str, key: &str, labels: Labels) -> Answer<()> {
        // Its fields are name, key and labels, where those of the others are key, parent and labels.
        let asked = Asked { snapshotter: "fsprov".into(), key: name.into(), parent: key.into(), labels };
        self.call::<_, Empty>("/containerd.services.snapshots.v1.Snapshots/Commit", asked).map(drop)
    }

    pub(crate) fn remove(&self, key: &str) -> Answer<()> {
        self.keyed::<Empty>("/containerd.services.snapshots.v1.Snapshots/Remove", key).map(drop)
    }

    pub(crate) fn stat(&self, key: &str) -> Answer<Info> {
        let answer = self.keyed::<InfoAnswer>("/containerd.services.snapshots.v1.Snapshots/Stat", key)?;
        Ok(answer.info.expect("an info"))
    }

    pub(crate) fn usage(&self, key: &str) -> Answer<Usage> {
        self.keyed("/containerd.services.snapshots.v1.Snapshots/Usage", key)
    }

    pub(crate) fn cleanup(&self) -> Answer<()> {
        self.call::<_, Empty>("/containerd.services.snapshots.v1.Snapshots/Cleanup", Empty {}).map(drop)
    }

    pub(crate) fn update(&self, name: &str, labels: Labels, paths: &[&str]) -> Answer<Info> {
        let mask = Mask { paths: paths.iter().map(|path| (*path).to_owned()).collect() };
        let info = Info { name: name.into(), labels, ..Info::default() };
        let asked = UpdateAsked { snapshotter: "fsprov".into(), info: Some(info), mask: Some(mask) };
        let answer: InfoAnswer = self.call("/containerd.services.snapshots.v1.Snapshots/Update", asked)?;
        Ok(answer.info.expect("an info"))
    }

    async fn stream_of(&self, filters: &[&str]) -> Answer<tonic::Streaming<InfosAnswer>> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let asked = ListAsked { snapshotter: "fsprov".into(), filters };
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
        let path = PathAndQuery::from_static("/containerd.services.snapshots.v1.Snapshots/List");
        let codec = ProstCodec::<ListAsked, InfosAnswer>::default();
        grpc.server_streaming(Request::new(asked), path, codec).await.map(tonic::Response::into_inner)
    }

    pub(crate) fn list(&self, filters: &[&str]) -> Answer<Vec<Info>> {
        self.runtime.block_on(async {
            let mut stream = self.stream_of(filters).await?;
            let mut all = Vec::new();
            while let Some(message) = stream.message().await? {
                all.extend(message.info);
            }
            Ok(all)
        })
    }

    /// How many there are; only one message is held at a time.
    pub(crate) fn count(&self, filters: &[&str]) -> Answer<usize> {
        self.runtime.block_on(async {
            let mut stream = self.stream_of(filters).await?;
            let mut count = 0;
            while let Some(message) = stream.message().await? {
                assert!(message.info.len() <= 100, "no message has more than containerd's have");
                count += message.info.len();
            }
            Ok(count)
        })
    }

    /// Begin to list, and read one message of the answer.
    pub(crate) fn begin_list(&self) -> Answer<Begun> {
        self.runtime.block_on(async {
            let mut stream = self.stream_of(&[]).await?;
            let read = stream.message().await?.map_or(0, |message| message.info.len());
            Ok(Begun { _stream: stream, read })
        })
    }

    pub(crate) fn names(&self, filters: &[&str]) -> Vec<String> {
        self.list(filters).expect("list").into_iter().map(|info| info.name).collect()
    }
}

/// A list of which not all was read.
pub(crate) struct Begun {
    _stream: tonic::Streaming<InfosAnswer>,
    pub(crate) read: usize,
}

/// The code of a call that must fail.
pub(crate) fn code<T: std::fmt::Debug>(answer: Answer<T>) -> Code {
    answer.expect_err("it must fail").code()
}
