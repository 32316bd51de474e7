//! The kubelet's side of CRI (k8s.io/cri-api, runtime/v1), as far as a pod takes it.

use std::path::Path;

use crate::client::{Answer, Client, Empty, Labels};

macro_rules! messages {
    ($($name:ident { $($(#[$how:meta])* $field:ident: $type:ty,)* })*) => {
        $(#[derive(Clone, PartialEq, prost::Message)]
        pub(crate) struct $name { $($(#[$how])* pub(crate) $field: $type,)* })*
    };
}

messages! {
    ImageSpec {
        #[prost(string, tag = "1")]
        image: String,
    }
    PullImage {
        #[prost(message, optional, tag = "1")]
        image: Option<ImageSpec>,
        #[prost(message, optional, tag = "3")]
        sandbox: Option<Sandbox>,
    }
    Reference {
        #[prost(string, tag = "1")]
        id: String,
    }
    OfImage {
        #[prost(message, optional, tag = "1")]
        image: Option<ImageSpec>,
    }
    Metadata {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(string, tag = "2")]
        uid: String,
        #[prost(string, tag = "3")]
        namespace: String,
    }
    IdMapping {
        #[prost(uint32, tag = "1")]
        host_id: u32,
        #[prost(uint32, tag = "2")]
        container_id: u32,
        #[prost(uint32, tag = "3")]
        length: u32,
    }
    Users {
        #[prost(int32, tag = "1")]
        mode: i32,
        #[prost(message, repeated, tag = "2")]
        uids: Vec<IdMapping>,
        #[prost(message, repeated, tag = "3")]
        gids: Vec<IdMapping>,
    }
    Namespaces {
        #[prost(int32, tag = "1")]
        network: i32,
        #[prost(message, optional, tag = "5")]
        users: Option<Users>,
    }
    Security {
        #[prost(message, optional, tag = "1")]
        namespaces: Option<Namespaces>,
    }
    Linux {
        #[prost(message, optional, tag = "2")]
        security: Option<Security>,
    }
    Sandbox {
        #[prost(message, optional, tag = "1")]
        metadata: Option<Metadata>,
        #[prost(string, tag = "3")]
        log_directory: String,
        #[prost(btree_map = "string, string", tag = "6")]
        labels: Labels,
        #[prost(message, optional, tag = "8")]
        linux: Option<Linux>,
    }
    RunSandbox {
        #[prost(message, optional, tag = "1")]
        config: Option<Sandbox>,
    }
    ContainerName {
        #[prost(string, tag = "1")]
        name: String,
    }
    ContainerSecurity {
        #[prost(message, optional, tag = "3")]
        namespaces: Option<Namespaces>,
    }
    ContainerLinux {
        #[prost(message, optional, tag = "2")]
        security: Option<ContainerSecurity>,
    }
    Container {
        #[prost(message, optional, tag = "1")]
        metadata: Option<ContainerName>,
        #[prost(message, optional, tag = "2")]
        image: Option<ImageSpec>,
        #[prost(string, repeated, tag = "3")]
        command: Vec<String>,
        #[prost(string, tag = "11")]
        log_path: String,
        #[prost(message, optional, tag = "15")]
        linux: Option<ContainerLinux>,
    }
    CreateContainer {
        #[prost(string, tag = "1")]
        sandbox_id: String,
        #[prost(message, optional, tag = "2")]
        config: Option<Container>,
        #[prost(message, optional, tag = "3")]
        sandbox: Option<Sandbox>,
    }
    Exec {
        #[prost(string, tag = "1")]
        container_id: String,
        #[prost(string, repeated, tag = "2")]
        command: Vec<String>,
        #[prost(int64, tag = "3")]
        timeout: i64,
    }
    Executed {
        #[prost(bytes = "vec", tag = "1")]
        stdout: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        stderr: Vec<u8>,
        #[prost(int32, tag = "3")]
        exit_code: i32,
    }
}

/// containerd's CRI.
pub(crate) struct Cri(Client);

/// NODE of NamespaceMode: the host's network, for there is no CNI here.
const NODE: i32 = 2;

fn image(name: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: name.into() })
}

pub(crate) fn sandbox(name: &str, logs: &Path) -> Sandbox {
    sandbox_in(name, logs, Namespaces { network: NODE, users: None })
}

/// `hostUsers: false`: with a user namespace, whose first id is this one of the host; and a network of its own, as it must be there.
pub(crate) fn sandbox_of_users(name: &str, logs: &Path, first: u32) -> Sandbox {
    let map = vec![IdMapping { host_id: first, container_id: 0, length: 65_536 }];
    let users = Users { mode: 0, uids: map.clone(), gids: map };
    sandbox_in(name, logs, Namespaces { network: 0, users: Some(users) })
}

fn sandbox_in(name: &str, logs: &Path, namespaces: Namespaces) -> Sandbox {
    Sandbox {
        metadata: Some(Metadata { name: name.into(), uid: format!("{name}-uid"), namespace: "default".into() }),
        log_directory: logs.join(name).to_string_lossy().into_owned(),
        labels: Labels::new(),
        linux: Some(Linux { security: Some(Security { namespaces: Some(namespaces) }) }),
    }
}

impl Cri {
    pub(crate) fn new(socket: &Path) -> Self {
        Cri(Client::new(socket))
    }

    pub(crate) fn pull(&self, name: &str) -> Answer<String> {
        let asked = PullImage { image: image(name), sandbox: None };
        self.0.call::<_, Reference>("/runtime.v1.ImageService/PullImage", asked).map(|done| done.id)
    }

    pub(crate) fn remove_image(&self, name: &str) -> Answer<()> {
        self.0.call::<_, Empty>("/runtime.v1.ImageService/RemoveImage", OfImage { image: image(name) }).map(drop)
    }

    pub(crate) fn run_sandbox(&self, config: &Sandbox) -> Answer<String> {
        let asked = RunSandbox { config: Some(config.clone()) };
        self.0.call::<_, Reference>("/runtime.v1.RuntimeService/RunPodSandbox", asked).map(|done| done.id)
    }

    /// Create and start one. Gives its id.
    pub(crate) fn start(&self, sandbox_id: &str, sandbox: &Sandbox, from: &str, command: &[&str]) -> Answer<String> {
        let security = sandbox.linux.as_ref().and_then(|linux| linux.security.as_ref());
        let namespaces = security.and_then(|security| security.namespaces.clone());
        let linux = ContainerLinux { security: Some(ContainerSecurity { namespaces }) };
        let config = Container {
            metadata: Some(ContainerName { name: "main".into() }),
            image: image(from),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: "main.log".into(),
            linux: Some(linux),
        };
        let asked =
            CreateContainer { sandbox_id: sandbox_id.into(), config: Some(config), sandbox: Some(sandbox.clone()) };
        let id = self.0.call::<_, Reference>("/runtime.v1.RuntimeService/CreateContainer", asked)?.id;
        self.0.call::<_, Empty>("/runtime.v1.RuntimeService/StartContainer", Reference { id: id.clone() })?;
        Ok(id)
    }

    pub(crate) fn exec(&self, container_id: &str, command: &[&str]) -> Answer<String> {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let asked = Exec { container_id: container_id.into(), command, timeout: 20 };
        let done: Executed = self.0.call("/runtime.v1.RuntimeService/ExecSync", asked)?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert_eq!(done.exit_code, 0, "{said} {}", String::from_utf8_lossy(&done.stderr));
        Ok(said)
    }

    pub(crate) fn remove_sandbox(&self, id: &str) -> Answer<()> {
        self.0.call::<_, Empty>("/runtime.v1.RuntimeService/StopPodSandbox", Reference { id: id.into() })?;
        self.0.call::<_, Empty>("/runtime.v1.RuntimeService/RemovePodSandbox", Reference { id: id.into() }).map(drop)
    }
}
