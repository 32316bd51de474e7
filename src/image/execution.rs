//! What an image says about how it is run: OCI's `config.config` (image-spec 1.1, "config"; docker's words are the same) and AppC's `app`,
//! in one form.

use serde::{Deserialize, Serialize};

use super::{appc, parse_json};
use crate::error::Result;

/// How an image wants to be run. Nothing in it is checked against the image's files yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Execution {
    /// Always run, unless the user replaces it by `--entrypoint`.
    pub entrypoint: Vec<String>,
    /// What is run, or handed to the entry point, where the user says nothing.
    pub command: Vec<String>,
    /// `NAME=VALUE`, in the image's order.
    pub environment: Vec<String>,
    /// Absolute; `None`: `/`.
    pub working_directory: Option<String>,
    /// `USER[:GROUP]`, names or numbers; empty: root.
    pub user: String,
    /// Further groups, numbers.
    pub groups: Vec<u32>,
    /// What stops it: a name (`SIGTERM`) or a number.
    pub stop_signal: Option<String>,
    /// Directories that are to be written even where the rest is read-only.
    pub volumes: Vec<String>,
}

/// The part of an OCI image's configuration that is about running it.
#[derive(Deserialize)]
struct OciConfig {
    #[serde(default)]
    config: Option<Fields>,
}

/// Go writes an absent list, and an absent map, as null.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Fields {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    volumes: Option<serde_json::Map<String, serde_json::Value>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
}

impl Execution {
    /// From the configuration of an OCI or docker image.
    pub fn of_oci(config: &[u8]) -> Result<Self> {
        let read: OciConfig = parse_json("OCI config", config)?;
        let said = read.config.unwrap_or_default();
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        Ok(Execution {
            entrypoint: said.entrypoint.unwrap_or_default(),
            command: said.cmd.unwrap_or_default(),
            environment: said.env.unwrap_or_default(),
            working_directory: filled(said.working_dir),
            user: said.user.unwrap_or_default(),
            groups: Vec::new(),
            stop_signal: filled(said.stop_signal),
            volumes: said.volumes.unwrap_or_default().into_iter().map(|(path, _)| path).collect(),
        })
    }

    /// From the manifest of an AppC image. Its `exec` is the command: what the user says takes its place, as rkt's `--exec` did.
    pub fn of_appc(manifest: &appc::Manifest) -> Self {
        let Some(app) = &manifest.app else { return Execution::default() };
        let (user, group) = (app.user.as_deref().unwrap_or(""), app.group.as_deref().unwrap_or(""));
        Execution {
            command: app.exec.clone().unwrap_or_default(),
            environment: app.environment.iter().map(|pair| format!("{}={}", pair.name, pair.value)).collect(),
            working_directory: app.working_directory.clone().filter(|dir| !dir.is_empty()),
            user: match (user, group) {
                (user, "") => user.to_owned(),
                ("", group) => format!("0:{group}"),
                (user, group) => format!("{user}:{group}"),
            },
            groups: app.supplementary_gids.clone(),
            volumes: app.mount_points.iter().map(|point| point.path.clone()).collect(),
            ..Execution::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_oci_configuration() {
        let text = br#"{"architecture":"amd64","os":"linux","config":{"User":"www:33","Env":["PATH=/bin","A=b=c"],"Entrypoint":["/e","-x"],
            "Cmd":null,"Volumes":{"/data":{},"/a":{}},"WorkingDir":"/srv","StopSignal":"SIGQUIT","Labels":{"x":"y"}},"rootfs":{"type":"layers"}}"#;
        let got = Execution::of_oci(text).unwrap();
        let want = Execution {
            entrypoint: vec!["/e".into(), "-x".into()],
            command: vec![],
            environment: vec!["PATH=/bin".into(), "A=b=c".into()],
            working_directory: Some("/srv".into()),
            user: "www:33".into(),
            groups: vec![],
            stop_signal: Some("SIGQUIT".into()),
            volumes: vec!["/a".into(), "/data".into()],
        };
        assert_eq!(got, want);
        for nothing in [&b"{}"[..], br#"{"config":null}"#, br#"{"config":{"WorkingDir":"","StopSignal":"","User":""}}"#]
        {
            assert_eq!(Execution::of_oci(nothing).unwrap(), Execution::default());
        }
        assert!(Execution::of_oci(br#"{"config":{"Cmd":"sh"}}"#).is_err());
    }

    #[test]
    fn of_an_appc_manifest() {
        let text = br#"{"acKind":"ImageManifest","acVersion":"0.8.11","name":"a","app":{"exec":["/bin/w","-q"],"user":"100","group":"300",
            "supplementaryGIDs":[400],"workingDirectory":"/opt","environment":[{"name":"D","value":"1"}],
            "mountPoints":[{"name":"work","path":"/var/work"}]}}"#;
        let manifest = appc::Manifest::parse(text, super::super::Strictness::Strict).unwrap().manifest;
        let got = Execution::of_appc(&manifest);
        let want = Execution {
            command: vec!["/bin/w".into(), "-q".into()],
            environment: vec!["D=1".into()],
            working_directory: Some("/opt".into()),
            user: "100:300".into(),
            groups: vec![400],
            volumes: vec!["/var/work".into()],
            ..Execution::default()
        };
        assert_eq!(got, want);
        assert_eq!(Execution::of_appc(&appc::Manifest::named("a").unwrap()), Execution::default());
    }
}
