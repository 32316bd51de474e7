//! Configuration: one TOML file of the system and one of the user, each key optional, unknown keys errors.
//!
//! Precedence, strongest first: command line, environment, user's file, system's file, built-in default. [`Settings`] keeps where
//! each value came from, for `fsprov config show`.
//!
//! ```toml
//! root = "/srv/fsprov"                                  # the state root, absolute
//! backend = "fuse"                                      # auto, bind, fuse, overlay or copy
//! volumes = ["/etc/resolv.conf:/etc/resolv.conf:ro"]    # in every rootfs; sources absolute
//! ```

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result, show};
use crate::volume::VolumeSpec;

/// The system's file.
pub const SYSTEM_FILE: &str = "/etc/fsprov/config.toml";
/// The user's file below XDG_CONFIG_HOME (XDG base directory specification; ~/.config where that is not set).
pub const USER_FILE: &str = "fsprov/config.toml";
/// Longest file read: a thousand volumes fit many times.
const MAX_BYTES: u64 = 1 << 20;

/// One file's keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    root: Option<PathBuf>,
    backend: Option<String>,
    volumes: Option<Vec<String>>,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A file.
    File(PathBuf),
    /// An environment variable or an option.
    CommandLine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(path) => f.write_str(&show(path)),
            Origin::CommandLine => f.write_str("command line or environment"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Who set it.
    pub origin: Origin,
}

/// The values in force, but for what a verb's own options say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// The state root; `None`: the built-in default.
    pub root: Setting<Option<PathBuf>>,
    /// The backend preferred.
    pub backend: Setting<String>,
    /// Volumes of every rootfs, as written.
    pub volumes: Setting<Vec<String>>,
}

impl Settings {
    /// Read the files that exist, the strongest last. A file that does not exist is none; one that cannot be read or understood is an
    /// error that names it.
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let mut settings = Settings {
            root: Setting { value: None, origin: Origin::Default },
            backend: Setting { value: "auto".to_owned(), origin: Origin::Default },
            volumes: Setting { value: Vec::new(), origin: Origin::Default },
        };
        for path in files {
            if let Some(file) = read_file(path)? {
                settings.apply(file, &Origin::File(path.clone()));
            }
        }
        Ok(settings)
    }

    fn apply(&mut self, file: File, origin: &Origin) {
        let File { root, backend, volumes } = file;
        if let Some(root) = root {
            self.root = Setting { value: Some(root), origin: origin.clone() };
        }
        if let Some(value) = backend {
            self.backend = Setting { value, origin: origin.clone() };
        }
        if let Some(value) = volumes {
            self.volumes = Setting { value, origin: origin.clone() };
        }
    }

    /// The volumes of every rootfs.
    pub fn default_volumes(&self) -> Result<Vec<VolumeSpec>> {
        self.volumes.value.iter().map(|v| VolumeSpec::parse(v.as_ref())).collect()
    }
}

fn read_file(path: &Path) -> Result<Option<File>> {
    use std::io::Read as _;
    const OP: &str = "read configuration";
    let mut text = String::new();
    match std::fs::File::open(path) {
        Ok(file) => {
            file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|e| Error::io(OP, show(path), e))?;
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(OP, show(path), e)),
    }
    let refuse = |why: String| Error::new(Kind::Usage, OP, show(path), why);
    if text.len() as u64 > MAX_BYTES {
        return Err(refuse("it is longer than 1 MiB".into()));
    }
    let file: File = toml::from_str(&text).map_err(|e| refuse(e.to_string().trim_end().replace('\n', "\n  ")))?;
    if file.root.as_deref().is_some_and(|r| !r.is_absolute()) {
        return Err(refuse("root must be an absolute path".into()));
    }
    for volume in file.volumes.iter().flatten() {
        let spec = VolumeSpec::parse(volume.as_ref()).map_err(|e| refuse(e.to_string()))?;
        if spec.source.is_relative() {
            return Err(refuse(format!("volume {volume:?}: a volume of every rootfs needs an absolute source")));
        }
    }
    Ok(Some(file))
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
        assert_eq!(settings.root, Setting { value: Some("/s".into()), origin: Origin::File(system) });
        assert_eq!(settings.backend, Setting { value: "fuse".into(), origin: Origin::File(user) });
        assert_eq!(settings.default_volumes().unwrap().len(), 1);
        assert_eq!(Settings::read(&[]).unwrap().backend.origin, Origin::Default);
    }

    #[test]
    fn what_is_not_understood_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        for bad in
            ["rot = 1", "root = \"relative\"", "volumes = [\"a:/b\"]", "volumes = [\"/a\"]", "root = ", "root = 3"]
        {
            std::fs::write(&path, bad).unwrap();
            let error = Settings::read(std::slice::from_ref(&path)).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{bad}");
            assert!(error.to_string().contains("config.toml"), "{error}");
        }
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
