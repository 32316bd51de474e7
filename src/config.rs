//! Configuration: one TOML file of the system and one of the user, each key optional, unknown keys errors.
//!
//! Precedence, strongest first: command line, environment, user's file, system's file, built-in default. A stronger file replaces a
//! key, in `[limits]` each limit and in `[registry]` each host by itself. [`Settings`] keeps where each value came from, for
//! `fsprov config show`; [`EXAMPLE`] shows every key.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result, show};
use crate::pull::HostConfig;
use crate::store::{Limits, Policy, Unsigned};
use crate::sys::fs::read_bounded;
use crate::volume::VolumeSpec;

/// The system's file.
pub const SYSTEM_FILE: &str = "/etc/fsprov/config.toml";
/// The user's file below XDG_CONFIG_HOME (XDG base directory specification; ~/.config where that is not set).
pub const USER_FILE: &str = "fsprov/config.toml";
/// Longest file read: a thousand volumes fit many times.
const MAX_BYTES: u64 = 1 << 20;

/// A file with every key, each at its built-in value or an example of one: `fsprov config example` prints it.
pub const EXAMPLE: &str = include_str!("config_example.toml");

/// One file's keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct File {
    root: Option<PathBuf>,
    backend: Option<String>,
    volumes: Option<Vec<String>>,
    keyring: Option<PathBuf>,
    unsigned: Option<Unsigned>,
    #[serde(rename = "auth_file")]
    logins: Option<PathBuf>,
    mesos_stores: Option<Vec<PathBuf>>,
    discovery_prefixes: Option<Vec<String>>,
    parallel_downloads: Option<usize>,
    #[serde(default)]
    limits: BTreeMap<String, u64>,
    #[serde(default)]
    registry: BTreeMap<String, HostConfig>,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SetBy {
    /// Nobody set it.
    Default,
    /// A file.
    File(PathBuf),
    /// An environment variable or an option.
    CommandLine,
}

impl fmt::Display for SetBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SetBy::Default => f.write_str("default"),
            SetBy::File(path) => f.write_str(&show(path)),
            SetBy::CommandLine => f.write_str("command line or environment"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Who set it.
    pub origin: SetBy,
}

/// The values in force, but for what a verb's own options say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Settings {
    /// The state root; `None`: the built-in default.
    pub root: Setting<Option<PathBuf>>,
    /// The backend preferred.
    pub backend: Setting<String>,
    /// Volumes of every rootfs, as written.
    pub volumes: Setting<Vec<String>>,
    /// OpenPGP keys (a file, or a directory of such files): AppC archives need a signature by one of them. `None`: they need none.
    pub keyring: Setting<Option<PathBuf>>,
    /// What is asked of images without a signature.
    pub unsigned: Setting<Unsigned>,
    /// The registries' logins; `None`: where podman and docker keep theirs.
    pub auth_file: Setting<Option<PathBuf>>,
    /// Image stores of Apache Mesos (AppC) that are looked into, read-only, for what our own store has not.
    pub mesos_stores: Setting<Vec<PathBuf>>,
    /// What simple discovery puts before an AppC image's name; tried in this order.
    pub discovery_prefixes: Setting<Vec<String>>,
    /// Most blobs of one image that are fetched at the same time.
    pub parallel_downloads: Setting<usize>,
    /// What an image may ask for; only those that a file sets.
    pub limits: BTreeMap<String, Setting<u64>>,
    /// How hosts are spoken to, by `HOST` or `HOST:PORT`.
    pub registry: BTreeMap<String, Setting<HostConfig>>,
}

impl<T> Setting<T> {
    fn default(value: T) -> Self {
        Setting { value, origin: SetBy::Default }
    }

    fn replace(&mut self, value: Option<T>, origin: &SetBy) {
        if let Some(value) = value {
            *self = Setting { value, origin: origin.clone() };
        }
    }
}

impl Settings {
    /// Read the files that exist, the strongest last. A file that does not exist counts as empty; one that cannot be read or understood is an
    /// error that names it.
    ///
    /// ```
    /// let settings = fsprov::config::Settings::read(&fsprov::config::files(|name| std::env::var_os(name)))?;
    /// println!("backend {} ({:?})", settings.backend.value, settings.backend.origin);
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let mut settings = Settings {
            root: Setting::default(None),
            backend: Setting::default("auto".to_owned()),
            volumes: Setting::default(Vec::new()),
            keyring: Setting::default(None),
            unsigned: Setting::default(Unsigned::default()),
            auth_file: Setting::default(None),
            mesos_stores: Setting::default(Vec::new()),
            discovery_prefixes: Setting::default(vec!["https://".to_owned()]),
            parallel_downloads: Setting::default(crate::pull::PARALLEL_DOWNLOADS),
            limits: BTreeMap::new(),
            registry: BTreeMap::new(),
        };
        for path in files {
            if let Some(file) = read_file(path)? {
                settings.apply(file, &SetBy::File(path.clone()));
            }
        }
        Ok(settings)
    }

    fn apply(&mut self, file: File, origin: &SetBy) {
        let File {
            root,
            backend,
            volumes,
            keyring,
            unsigned,
            logins,
            mesos_stores,
            discovery_prefixes,
            parallel_downloads,
            limits,
            registry,
        } = file;
        self.root.replace(root.map(Some), origin);
        self.backend.replace(backend, origin);
        self.volumes.replace(volumes, origin);
        self.keyring.replace(keyring.map(Some), origin);
        self.unsigned.replace(unsigned, origin);
        self.auth_file.replace(logins.map(Some), origin);
        self.mesos_stores.replace(mesos_stores, origin);
        self.discovery_prefixes.replace(discovery_prefixes, origin);
        self.parallel_downloads.replace(parallel_downloads, origin);
        let of = |value| Setting { value, origin: origin.clone() };
        self.limits.extend(limits.into_iter().map(|(name, value)| (name, of(value))));
        let of = |value| Setting { value, origin: origin.clone() };
        self.registry.extend(registry.into_iter().map(|(host, value)| (host, of(value))));
    }

    /// What the store takes, and where else it looks.
    ///
    /// ```no_run
    /// let settings = fsprov::config::Settings::read(&["/etc/fsprov/config.toml".into()])?;
    /// let paths = fsprov::StatePaths::new("/var/lib/fsprov".into());
    /// let store = fsprov::store::Store::open(&paths)?.with_policy(settings.policy());
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn policy(&self) -> Policy {
        let mut limits = Limits::default();
        for (name, setting) in &self.limits {
            // Names were looked at when the file was read.
            limits.set(name, setting.value);
        }
        Policy {
            limits,
            keyring: self.keyring.value.clone(),
            unsigned: self.unsigned.value,
            mesos_stores: self.mesos_stores.value.clone(),
        }
    }

    /// The volumes of every rootfs.
    pub fn default_volumes(&self) -> Result<Vec<VolumeSpec>> {
        self.volumes.value.iter().map(|v| VolumeSpec::parse(v.as_ref())).collect()
    }
}

fn read_file(path: &Path) -> Result<Option<File>> {
    const OP: &str = "read configuration";
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            let hint = "is it another user's? set HOME to your own, or FSPROV_CONFIG to the file to read (empty: none)";
            return Err(Error::io(OP, show(path), e).hint(hint));
        }
        Err(e) => return Err(Error::io(OP, show(path), e)),
    };
    if let Some(owner) = stranger(&file).map_err(|e| Error::io(OP, show(path), e))? {
        // sudo keeps HOME: what user 1000 wrote there must not choose what root mounts where.
        log::warn!(
            "{} belongs to user {owner} and is not read: root does not do what another user wrote there",
            show(path)
        );
        return Ok(None);
    }
    let bytes = read_bounded(OP, show(path), file, MAX_BYTES).map_err(|e| e.with_kind(Kind::Usage))?;
    let refuse = |why: String| Error::new(Kind::Usage, OP, show(path), why);
    let text = String::from_utf8(bytes).map_err(|e| refuse(e.to_string()))?;
    let file: File = toml::from_str(&text).map_err(|e| {
        let line = e.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        refuse(format!("line {line}: {}", e.message().trim_end().replace('\n', ", ")))
    })?;
    let single = [("root", &file.root), ("keyring", &file.keyring), ("auth_file", &file.logins)];
    let single = single.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?)));
    let stores = file.mesos_stores.iter().flatten().map(|path| ("mesos_stores", path));
    let ca = file.registry.values().filter_map(|host| Some(("registry.ca", host.ca.as_ref()?)));
    for (key, path) in single.chain(stores).chain(ca) {
        if !path.is_absolute() {
            return Err(refuse(format!("{key} is {}: it must be an absolute path", show(path))));
        }
    }
    for prefix in file.discovery_prefixes.iter().flatten() {
        if !["https://", "http://", "file:///", "/"].iter().any(|start| prefix.starts_with(start)) {
            return Err(refuse(format!(
                "discovery_prefixes has {prefix:?}: it must begin with https://, http://, file:/// or /"
            )));
        }
    }
    if file.parallel_downloads.is_some_and(|count| !(1..=32).contains(&count)) {
        return Err(refuse("parallel_downloads must lie in 1 to 32".into()));
    }
    for (name, value) in &file.limits {
        if !Limits::default().set(name, *value) {
            return Err(refuse(format!("limits.{name} is unknown: there are {}", Limits::NAMES.join(", "))));
        }
    }
    for (host, config) in &file.registry {
        config.check(host).map_err(|e| refuse(e.to_string()))?;
    }
    for volume in file.volumes.iter().flatten() {
        let spec = VolumeSpec::parse(volume.as_ref()).map_err(|e| refuse(e.to_string()))?;
        if spec.source.is_relative() {
            return Err(refuse(format!("volume {volume:?}: a volume of every rootfs needs an absolute source")));
        }
    }
    Ok(Some(file))
}

/// The owner of a file that this user must not follow: root, what is not root's.
fn stranger(file: &std::fs::File) -> std::io::Result<Option<u32>> {
    use std::os::unix::fs::MetadataExt as _;
    let owner = file.metadata()?.uid();
    Ok((rustix::process::geteuid().is_root() && owner != 0).then_some(owner))
}

/// The settings in force: [`Settings::read`] of [`files`], and a file that `FSPROV_CONFIG` names must be there.
pub fn in_force(env: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<Settings> {
    if let Some(only) = env("FSPROV_CONFIG").filter(|only| !only.is_empty()) {
        let path = Path::new(&only);
        std::fs::metadata(path).map_err(|e| {
            Error::io("read configuration", show(path), e)
                .hint("FSPROV_CONFIG names it; unset that, or set it to nothing")
        })?;
    }
    Settings::read(&files(env))
}

/// The files to read, the strongest last. `FSPROV_CONFIG` names one that is read instead of both.
pub fn files(env: impl Fn(&str) -> Option<std::ffi::OsString>) -> Vec<PathBuf> {
    if let Some(only) = env("FSPROV_CONFIG") {
        return if only.is_empty() { Vec::new() } else { vec![only.into()] };
    }
    let absolute = |name: &str| env(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let user = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")));
    let mut files = vec![PathBuf::from(SYSTEM_FILE)];
    files.extend(user.map(|dir| dir.join(USER_FILE)));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stronger_file_wins_key_by_key() {
        let dir = tempfile::tempdir().unwrap();
        let (system, user) = (dir.path().join("system"), dir.path().join("user"));
        std::fs::write(&system, "root = \"/s\"\nbackend = \"bind\"\n").unwrap();
        std::fs::write(&user, "backend = \"fuse\"\nvolumes = [\"/a:/b:ro\"]\n").unwrap();
        let settings = Settings::read(&[system.clone(), user.clone(), dir.path().join("none")]).unwrap();
        assert_eq!(settings.root, Setting { value: Some("/s".into()), origin: SetBy::File(system) });
        assert_eq!(settings.backend, Setting { value: "fuse".into(), origin: SetBy::File(user) });
        assert_eq!(settings.default_volumes().unwrap().len(), 1);
        assert_eq!(Settings::read(&[]).unwrap().backend.origin, SetBy::Default);
    }

    #[test]
    fn what_is_not_understood_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        for bad in [
            "rot = 1",
            "root = \"relative\"",
            "volumes = [\"a:/b\"]",
            "volumes = [\"/a\"]",
            "root = ",
            "root = 3",
            "keyring = \"keys\"",
            "mesos_stores = [\"store\"]",
            "discovery_prefixes = [\"ftp://x\"]",
            "parallel_downloads = 0",
            "[limits]\nentrys = 1",
            "[limits]\nentries = -1",
            "[registry.\"a/b\"]",
            "[registry.a]\ninsecur = true",
            "[registry.a]\nca = \"relative\"",
            "[registry.a]\nmirror = \"https://b\"",
        ] {
            std::fs::write(&path, bad).unwrap();
            let error = Settings::read(std::slice::from_ref(&path)).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{bad}");
            assert!(error.to_string().contains("config.toml"), "{error}");
        }
    }

    #[test]
    fn limits_and_hosts_are_merged_one_by_one_and_the_example_is_understood() {
        let dir = tempfile::tempdir().unwrap();
        let (system, user) = (dir.path().join("system"), dir.path().join("user"));
        std::fs::write(&system, "[limits]\nentries = 5\ndepth = 9\n[registry.a]\ninsecure = true\n[registry.b]\n")
            .unwrap();
        std::fs::write(&user, "[limits]\nentries = 7\n[registry.b]\nmirror = \"m:5000/cache\"\n").unwrap();
        let settings = Settings::read(&[system.clone(), user.clone()]).unwrap();
        let limits = settings.policy().limits;
        assert_eq!((limits.entries, limits.depth, limits.ratio), (7, 9, Limits::default().ratio));
        assert_eq!(settings.limits["depth"].origin, SetBy::File(system));
        assert!(settings.registry["a"].value.insecure);
        assert_eq!(settings.registry["b"].value.mirror.as_deref(), Some("m:5000/cache"));
        // What the example says of a key that is commented out holds too.
        let every = EXAMPLE.lines().map(|l| l.strip_prefix("#:").unwrap_or(l)).collect::<Vec<_>>().join("\n");
        for text in [EXAMPLE, &every] {
            std::fs::write(&user, text).unwrap();
            let settings = Settings::read(std::slice::from_ref(&user)).unwrap();
            assert_eq!(settings.policy().limits, Limits::default(), "the example shows the built-in limits");
        }
        let settings = Settings::read(std::slice::from_ref(&user)).unwrap();
        assert_eq!(settings.limits.len(), Limits::NAMES.len(), "the example shows every limit");
        assert!(settings.keyring.value.is_some() && settings.registry.len() == 2);
    }

    #[test]
    fn where_files_lie() {
        let with = |pairs: &'static [(&str, &str)]| {
            files(move |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into()))
        };
        assert_eq!(with(&[("HOME", "/h")])[1], Path::new("/h/.config/fsprov/config.toml"));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_CONFIG_HOME", "/c")])[1], Path::new("/c/fsprov/config.toml"));
        assert_eq!(with(&[("HOME", "/h"), ("FSPROV_CONFIG", "/x")]), [Path::new("/x")]);
        assert_eq!(with(&[("HOME", "/h"), ("FSPROV_CONFIG", "")]), [] as [&Path; 0]);
        assert_eq!(with(&[]).len(), 1);
    }
}
