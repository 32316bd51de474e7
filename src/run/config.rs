//! `config.json`: from what is wanted to the document of the OCI runtime specification. Data in, data out.
//!
//! It is written as JSON, as the specification shows it, and read as `oci-spec`'s [`Spec`], which knows every name and value. The defaults
//! are those of the specification ("Default Filesystems", "Default Devices") and, where it says nothing, podman's.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxSeccomp, Spec};
use serde_json::{Value, json};

use super::user::Identity;
use crate::error::{Error, Kind, Result};
use crate::plan::IdRange;
use crate::sys::durable::replace_at;

/// The version that every runtime in use reads.
const VERSION: &str = "1.0.2";
/// Group `tty`, whose terminals are, in the form that devpts takes (the specification's example, and every distribution).
pub(super) const TTY_GROUP: u32 = 5;

/// What is held back in /proc and /sys, as podman and containerd have it.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Which network the program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Network {
    /// The host's
    Host,
    /// None but a loopback device of its own
    None,
}

/// A file system or file mounted on top of the rootfs by the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Extra {
    /// A tmpfs with these options.
    Tmpfs {
        /// Where.
        at: String,
        /// tmpfs(5)'s.
        options: Vec<String>,
    },
    /// This file of the host.
    File {
        /// Where.
        at: String,
        /// Which.
        from: PathBuf,
    },
    /// A volume that was put aside.
    Volume {
        /// Where.
        at: String,
        /// Where it is put aside.
        from: PathBuf,
        /// mount(8)'s.
        options: Vec<String>,
    },
}

impl Extra {
    /// Where.
    pub(super) fn at(&self) -> &str {
        match self {
            Extra::Tmpfs { at, .. } | Extra::File { at, .. } | Extra::Volume { at, .. } => at,
        }
    }
}

/// All that the document says.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The rootfs, absolute or from the bundle's directory on.
    pub(crate) root: PathBuf,
    /// Does the runtime make it read-only?
    pub(crate) read_only: bool,
    /// Program and arguments; never empty.
    pub(crate) args: Vec<String>,
    /// `NAME=VALUE`.
    pub(crate) environment: Vec<String>,
    /// Absolute.
    pub(crate) working_directory: String,
    /// Who runs it.
    pub(crate) identity: Identity,
    /// Does it get a terminal of its own?
    pub(crate) terminal: bool,
    /// Its host name.
    pub(crate) hostname: String,
    /// Its network.
    pub(crate) network: Network,
    /// Names with `CAP_`.
    pub(crate) capabilities: BTreeSet<String>,
    /// Those of them that a user other than root has, too: what was asked for.
    pub(crate) ambient: BTreeSet<String>,
    /// On top of the usual ones, in this order; one at a usual one's place goes in its stead.
    pub(crate) extra: Vec<Extra>,
    /// A user namespace of its own with these ids, those outside being the runtime's; empty: the runtime's own namespace.
    pub(crate) uids: Vec<IdRange>,
    /// Likewise for groups.
    pub(crate) gids: Vec<IdRange>,
    /// What system calls it may make; `None`: all.
    pub(crate) seccomp: Option<LinuxSeccomp>,
    /// What the image says stops it: for those who do.
    pub(crate) stop_signal: Option<String>,
    /// Is the runtime root of the machine? Else it may do less.
    pub(crate) is_root: bool,
    /// Has the runtime's own user namespace the group of terminals?
    pub(crate) has_tty_group: bool,
    /// The size of the terminal, rows and columns, where that is known.
    pub(crate) console: Option<(u16, u16)>,
}

/// The document.
pub(crate) fn spec(wanted: &Wanted) -> Result<Spec> {
    const OP: &str = "write config.json";
    serde_json::from_value(document(wanted)).map_err(|e| Error::new(Kind::Invalid, OP, "", e))
}

fn document(wanted: &Wanted) -> Value {
    let mut process = json!({
        "terminal": wanted.terminal,
        "user": { "uid": wanted.identity.uid, "gid": wanted.identity.gid, "umask": 0o022, "additionalGids": wanted.identity.groups },
        "args": wanted.args,
        "env": wanted.environment,
        "cwd": wanted.working_directory,
        "capabilities": capabilities(wanted),
        // Not `noNewPrivileges`, which is false where nothing says so: youki 0.7 loads the seccomp profile too late if it is there (EACCES).
    });
    if !wanted.terminal {
        drop_key(&mut process, "terminal");
    }
    if let (true, Some((rows, columns))) = (wanted.terminal, wanted.console) {
        process["consoleSize"] = json!({ "height": rows, "width": columns });
    }
    let mut linux = json!({
        "namespaces": namespaces(wanted),
        "maskedPaths": MASKED,
        "readonlyPaths": READ_ONLY,
        "rootfsPropagation": "private",
    });
    if !wanted.uids.is_empty() {
        linux["uidMappings"] = mappings(&wanted.uids);
        linux["gidMappings"] = mappings(&wanted.gids);
    }
    if wanted.is_root {
        // No device but those of /dev: runtimes add them (the specification's "Default Devices").
        linux["resources"] = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
    }
    if let Some(seccomp) = &wanted.seccomp {
        linux["seccomp"] = json!(seccomp);
    }
    let mut document = json!({
        "ociVersion": VERSION,
        "process": process,
        "root": { "path": wanted.root, "readonly": wanted.read_only },
        "hostname": wanted.hostname,
        "mounts": mounts(wanted),
        "linux": linux,
    });
    if let Some(signal) = &wanted.stop_signal {
        // Where podman and containerd look for it (image-spec, "annotations").
        document["annotations"] = json!({ "org.opencontainers.image.stopSignal": signal });
    }
    document
}

fn drop_key(object: &mut Value, key: &str) {
    if let Value::Object(map) = object {
        map.remove(key);
    }
}

/// As podman: root has them all; another user can gain them through setuid programs alone, except those that were asked for.
fn capabilities(wanted: &Wanted) -> Value {
    let all = &wanted.capabilities;
    if wanted.identity.uid == 0 {
        return json!({ "bounding": all, "effective": all, "permitted": all });
    }
    let own: BTreeSet<_> = wanted.ambient.intersection(all).collect();
    json!({ "bounding": all, "effective": own, "permitted": own, "inheritable": own, "ambient": own })
}

fn namespaces(wanted: &Wanted) -> Value {
    let mut kinds = vec!["mount", "pid", "ipc", "uts"];
    if wanted.network == Network::None {
        kinds.push("network");
    }
    if !wanted.uids.is_empty() {
        kinds.push("user");
    }
    kinds.iter().map(|kind| json!({ "type": kind })).collect()
}

fn mappings(ranges: &[IdRange]) -> Value {
    let one = |r: &IdRange| json!({ "containerID": r.inside, "hostID": r.outside, "size": r.count });
    ranges.iter().map(one).collect()
}

fn mounts(wanted: &Wanted) -> Value {
    let has_tty_group = if wanted.gids.is_empty() { wanted.has_tty_group } else { maps(&wanted.gids, TTY_GROUP) };
    let mut pts = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    let group = format!("gid={TTY_GROUP}");
    if has_tty_group {
        pts.push(&group);
    }
    let of = |at: &str, kind: &str, options: &[&str]| json!({ "destination": at, "type": kind, "source": kind, "options": options });
    let mut all = vec![
        of("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        of("/dev", "tmpfs", &["nosuid", "noexec", "strictatime", "mode=755", "size=65536k"]),
        of("/dev/pts", "devpts", &pts),
        of("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] }),
        sys(wanted),
    ];
    for one in &wanted.extra {
        // In its place: what is mounted below it comes after it.
        let mount = extra(one, wanted.read_only);
        match all.iter_mut().find(|mount| mount["destination"] == one.at()) {
            Some(usual) => *usual = mount,
            None => all.push(mount),
        }
    }
    Value::Array(all)
}

/// A new sysfs needs the network's own user namespace: a program in another one sees the host's.
fn sys(wanted: &Wanted) -> Value {
    if wanted.network == Network::Host && !(wanted.is_root && wanted.uids.is_empty()) {
        return json!({ "destination": "/sys", "type": "bind", "source": "/sys",
                       "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev", "ro"] });
    }
    json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] })
}

fn extra(extra: &Extra, read_only: bool) -> Value {
    match extra {
        Extra::Tmpfs { at, options } => {
            json!({ "destination": at, "type": "tmpfs", "source": "tmpfs", "options": options })
        }
        Extra::File { at, from } => {
            let mut options = vec!["bind", "rprivate", "nosuid", "nodev"];
            options.extend(read_only.then_some("ro"));
            json!({ "destination": at, "type": "bind", "source": from, "options": options })
        }
        Extra::Volume { at, from, options } => {
            json!({ "destination": at, "type": "bind", "source": from, "options": options })
        }
    }
}

fn maps(ranges: &[IdRange], id: u32) -> bool {
    ranges.iter().any(|r| id.checked_sub(r.inside).is_some_and(|d| d < r.count))
}

/// The file itself.
pub(crate) fn write(spec: &Spec, bundle: impl AsFd, shown: &Path) -> Result<()> {
    let text = serde_json::to_vec_pretty(spec).map_err(|e| Error::new(Kind::Io, "write", NAME, e))?;
    replace_at(bundle, NAME, &shown.join(NAME), &text, None)
}

const NAME: &str = "config.json";

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            root: "/r".into(),
            read_only: false,
            args: vec!["/bin/sh".into()],
            environment: vec!["A=1".into()],
            working_directory: "/w".into(),
            identity: Identity { uid: 0, gid: 0, groups: vec![27], home: None },
            terminal: false,
            hostname: "h".into(),
            network: Network::Host,
            capabilities: ["CAP_CHOWN", "CAP_KILL"].map(Into::into).into(),
            ambient: BTreeSet::new(),
            extra: Vec::new(),
            uids: Vec::new(),
            gids: Vec::new(),
            seccomp: None,
            stop_signal: None,
            is_root: true,
            has_tty_group: true,
            console: None,
        }
    }

    /// The document as a runtime reads it.
    fn written(wanted: &Wanted) -> Value {
        let dir = tempfile::tempdir().unwrap();
        write(&spec(wanted).unwrap(), std::fs::File::open(dir.path()).unwrap(), dir.path()).unwrap();
        serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap()
    }

    /// Sets come in any order.
    fn sorted(value: &Value) -> Vec<String> {
        let mut all: Vec<_> = value.as_array().into_iter().flatten().map(|v| v.as_str().unwrap().to_owned()).collect();
        all.sort();
        all
    }

    fn mount<'a>(config: &'a Value, at: &str) -> &'a Value {
        let mounts = config["mounts"].as_array().unwrap();
        let found: Vec<_> = mounts.iter().filter(|m| m["destination"] == at).collect();
        assert_eq!(found.len(), 1, "{at}: {mounts:?}");
        found[0]
    }

    #[test]
    fn every_name_is_one_that_the_specification_has() {
        let everything = Wanted {
            terminal: true,
            console: Some((33, 101)),
            stop_signal: Some("SIGQUIT".into()),
            network: Network::None,
            uids: vec![IdRange { inside: 0, outside: 1, count: 9 }],
            gids: vec![IdRange { inside: 0, outside: 1, count: 9 }],
            extra: vec![
                Extra::Tmpfs { at: "/t".into(), options: vec!["size=1m".into()] },
                Extra::File { at: "/etc/hosts".into(), from: "/b/hosts".into() },
                Extra::Volume {
                    at: "/t/v".into(),
                    from: "/b/volumes/0".into(),
                    options: vec!["rbind".into(), "ro".into()],
                },
            ],
            ..wanted()
        };
        // What `Spec` does not know it would have dropped.
        let (mut said, mut read) = (document(&everything), written(&everything));
        for set in ["bounding", "effective", "permitted"] {
            let (a, b) = (&mut said["process"]["capabilities"], &mut read["process"]["capabilities"]);
            assert_eq!(sorted(&a[set].take()), sorted(&b[set].take()), "{set}");
        }
        assert_eq!(said, read);
    }

    #[test]
    fn the_usual() {
        let config = written(&wanted());
        assert_eq!(config["process"]["user"], json!({"uid": 0, "gid": 0, "umask": 18, "additionalGids": [27]}));
        assert_eq!(config["process"]["cwd"], "/w");
        assert_eq!(config["root"], json!({"path": "/r", "readonly": false}));
        assert_eq!(sorted(&config["process"]["capabilities"]["effective"]), ["CAP_CHOWN", "CAP_KILL"]);
        let kinds: Vec<_> =
            config["linux"]["namespaces"].as_array().unwrap().iter().map(|n| n["type"].clone()).collect();
        assert_eq!(kinds, ["mount", "pid", "ipc", "uts"]);
        for at in ["/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys"] {
            mount(&config, at);
        }
        assert_eq!(mount(&config, "/sys")["type"], "sysfs");
        assert!(sorted(&mount(&config, "/dev/pts")["options"]).contains(&"gid=5".into()));
        assert!(sorted(&config["linux"]["maskedPaths"]).contains(&"/proc/kcore".into()));
        assert_eq!(config["linux"]["resources"], json!({"devices": [{"allow": false, "access": "rwm"}]}));
        assert!(config.get("annotations").is_none() && config["linux"].get("uidMappings").is_none());
    }

    #[test]
    fn without_the_machines_root_sys_is_the_hosts() {
        for (network, is_root, uids, kind) in [
            (Network::Host, true, 0, "sysfs"),
            (Network::Host, false, 0, "bind"),
            (Network::Host, true, 10, "bind"),
            (Network::None, false, 0, "sysfs"),
            (Network::None, false, 10, "sysfs"),
        ] {
            let ids: Vec<_> =
                (uids > 0).then_some(IdRange { inside: 0, outside: 7, count: uids }).into_iter().collect();
            let config = written(&Wanted { network, is_root, uids: ids.clone(), gids: ids, ..wanted() });
            assert_eq!(mount(&config, "/sys")["type"], kind, "{network:?} {is_root} {uids}");
            let kinds =
                sorted(&config["linux"]["namespaces"].as_array().unwrap().iter().map(|n| n["type"].clone()).collect());
            assert_eq!(kinds.contains(&"user".into()), uids > 0);
            assert_eq!(kinds.contains(&"network".into()), network == Network::None);
            if uids > 0 {
                assert_eq!(config["linux"]["uidMappings"], json!([{"containerID": 0, "hostID": 7, "size": 10}]));
            }
        }
    }

    #[test]
    fn another_user_has_no_capability_but_those_asked_for() {
        let identity = Identity { uid: 33, gid: 33, groups: vec![], home: None };
        let config = written(&Wanted { identity, ambient: ["CAP_KILL".to_owned()].into(), ..wanted() });
        let caps = &config["process"]["capabilities"];
        assert_eq!(sorted(&caps["bounding"]), ["CAP_CHOWN", "CAP_KILL"]);
        for set in ["effective", "permitted", "inheritable", "ambient"] {
            assert_eq!(sorted(&caps[set]), ["CAP_KILL"], "{set}");
        }
    }

    #[test]
    fn what_is_asked_for_takes_the_place_of_the_usual() {
        let shm = Extra::Tmpfs { at: "/dev/shm".into(), options: vec!["size=1g".into()] };
        let config = written(&Wanted { extra: vec![shm], ..wanted() });
        assert_eq!(mount(&config, "/dev/shm")["options"], json!(["size=1g"]));
        let dev = Extra::Volume { at: "/dev".into(), from: "/b/volumes/0".into(), options: vec!["rbind".into()] };
        let config = written(&Wanted { extra: vec![dev], ..wanted() });
        let at: Vec<_> = config["mounts"].as_array().unwrap().iter().map(|m| m["destination"].clone()).collect();
        assert_eq!(at, ["/proc", "/dev", "/dev/pts", "/dev/mqueue", "/dev/shm", "/sys"]);
        assert_eq!(mount(&config, "/dev")["source"], "/b/volumes/0");
    }
}
