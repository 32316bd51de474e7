//! The AppC image manifest (AppC specification 0.8.11, "Image Manifest Schema"): parse and validate.
//!
//! Each rule has its own error that names field and value. [`Strictness::Lenient`] takes what Mesos's own fixtures take
//! (a `created` that is no RFC 3339 time, no user or group, `exec: null`) and gives a warning for each breach; what this
//! program acts on (kind, version, name, labels, dependencies, pathWhitelist) is as strict in both.

use serde::{Deserialize, Deserializer, Serialize};

use super::{Strictness, parse_json};
use crate::error::{Error, Kind, Result};
use crate::index::{MAX_NAME, MAX_PATH};

/// The version of the specification that manifests made here name.
pub const AC_VERSION: &str = "0.8.11";
const AC_KIND: &str = "ImageManifest";

/// Operating systems and their architectures (specification, "labels": Go's names).
const PLATFORMS: [(&str, &[&str]); 3] = [
    ("linux", &["amd64", "i386", "aarch64", "aarch64_be", "armv6l", "armv7l", "armv7b", "ppc64", "ppc64le", "s390x"]),
    ("freebsd", &["amd64", "i386", "arm"]),
    ("darwin", &["x86_64", "i386"]),
];

/// Most items of any list: a manifest of 1 MiB holds more, and each is compared with the others.
const MAX_ITEMS: usize = 4096;

/// An AppC image manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always `ImageManifest`.
    pub ac_kind: String,
    /// Version of the specification it follows, SemVer.
    pub ac_version: String,
    /// An AC identifier.
    pub name: String,
    /// Names within one name: `version`, `os`, `arch` and others; no name twice.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<Pair>,
    /// How to run it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app: Option<App>,
    /// Images below this one, the first at the bottom.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub dependencies: Vec<Dependency>,
    /// The paths that remain; empty: all.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub path_whitelist: Vec<String>,
    /// Words about it; no name twice.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<Pair>,
}

/// A name with its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// An AC identifier, for environments any name.
    pub name: String,
    /// Any text.
    pub value: String,
}

/// An image that this one stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Dependency {
    /// Its name.
    pub image_name: String,
    /// Its id, where it must be this very one.
    #[serde(rename = "imageID", default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<String>,
    /// Labels it must have.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<Pair>,
    /// Bytes of its archive, where they are told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// How to run it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct App {
    /// Program and arguments.
    #[serde(default)]
    pub exec: Option<Vec<String>>,
    /// User id, name or path.
    #[serde(default)]
    pub user: Option<String>,
    /// Group id, name or path.
    #[serde(default)]
    pub group: Option<String>,
    /// Group ids.
    #[serde(
        rename = "supplementaryGIDs",
        default,
        deserialize_with = "null_is_empty",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub supplementary_gids: Vec<u32>,
    /// Absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_directory: Option<String>,
    /// Environment.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<Pair>,
    /// Programs at `pre-start` and `post-stop`.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub event_handlers: Vec<EventHandler>,
    /// Where volumes belong.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub mount_points: Vec<MountPoint>,
    /// Ports it listens on.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Limits; their values are for who runs it.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub isolators: Vec<Isolator>,
}

/// A program at an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventHandler {
    /// `pre-start` or `post-stop`.
    pub name: String,
    /// Program and arguments.
    pub exec: Vec<String>,
}

/// Where a volume belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MountPoint {
    /// An AC name.
    pub name: String,
    /// Absolute.
    pub path: String,
    /// Read-only?
    #[serde(default)]
    pub read_only: bool,
}

/// A port that an app listens on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// An AC name.
    pub name: String,
    /// `tcp`, `udp`, ...
    pub protocol: String,
    /// 1 to 65535.
    pub port: u32,
    /// How many from `port` on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// Passed by systemd's protocol.
    #[serde(default)]
    pub socket_activated: bool,
}

/// A limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Isolator {
    /// An AC identifier.
    pub name: String,
    /// Whatever the isolator takes.
    pub value: serde_json::Value,
}

/// Go writes an absent list as null.
fn null_is_empty<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> std::result::Result<Vec<T>, D::Error> {
    Ok(Option::<Vec<T>>::deserialize(from)?.unwrap_or_default())
}

/// A manifest that was read, and what was let pass.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The manifest.
    pub manifest: Manifest,
    /// Rules it breaks that were let pass; empty if read strictly.
    pub warnings: Vec<String>,
}

impl Manifest {
    /// A manifest for a tree that came without one. `name` must be an AC identifier.
    pub fn named(name: &str) -> Result<Self> {
        let manifest = Manifest {
            ac_kind: AC_KIND.into(),
            ac_version: AC_VERSION.into(),
            name: name.into(),
            labels: Vec::new(),
            app: None,
            dependencies: Vec::new(),
            path_whitelist: Vec::new(),
            annotations: Vec::new(),
        };
        Checker { strictness: Strictness::Strict, warnings: Vec::new() }.manifest(&manifest)?;
        Ok(manifest)
    }

    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|pair| pair.name == name).map(|pair| pair.value.as_str())
    }

    /// Read and validate.
    pub fn parse(bytes: &[u8], strictness: Strictness) -> Result<Checked> {
        let manifest: Manifest = parse_json("AppC manifest", bytes)?;
        let mut checker = Checker { strictness, warnings: Vec::new() };
        checker.manifest(&manifest)?;
        Ok(Checked { manifest, warnings: checker.warnings })
    }
}

/// `^[a-z0-9]+([-._~/][a-z0-9]+)*$` (specification, "AC Identifier Type").
pub fn is_ac_identifier(text: &str) -> bool {
    is_ac(text, b"-._~/")
}

/// `^[a-z0-9]+([-][a-z0-9]+)*$` (specification, "AC Name Type").
pub fn is_ac_name(text: &str) -> bool {
    is_ac(text, b"-")
}

fn is_ac(text: &str, separators: &[u8]) -> bool {
    let mut last_is_word = false;
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' => last_is_word = true,
            byte if last_is_word && separators.contains(&byte) => last_is_word = false,
            _ => return false,
        }
    }
    last_is_word
}

/// `sha512-` and at least one, at most 128 hex digits: a dependency may be named by a part of its id.
fn is_image_id(text: &str) -> bool {
    text.strip_prefix("sha512-").is_some_and(|hex| {
        (1..=128).contains(&hex.len()) && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

fn is_rfc3339(text: &str) -> bool {
    time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).is_ok()
}

struct Checker {
    strictness: Strictness,
    warnings: Vec<String>,
}

fn breach(field: &str, value: &str, rule: impl std::fmt::Display) -> String {
    // A value of a megabyte is not worth a megabyte of message.
    let value: String = value.chars().take(128).collect();
    format!("{field} is {value:?}: {rule}")
}

impl Checker {
    fn refuse(text: String) -> Error {
        Error::new(Kind::Invalid, "read", "AppC manifest", text)
    }

    fn must(ok: bool, field: &str, value: &str, rule: &str) -> Result<()> {
        if ok { Ok(()) } else { Err(Self::refuse(breach(field, value, rule))) }
    }

    /// A rule that nothing here depends on.
    fn should(&mut self, ok: bool, field: &str, value: &str, rule: &str) -> Result<()> {
        if ok {
            return Ok(());
        }
        let text = breach(field, value, rule);
        match self.strictness {
            Strictness::Strict => Err(Self::refuse(text).hint("--lenient takes what Mesos takes")),
            Strictness::Lenient => {
                self.warnings.push(text);
                Ok(())
            }
        }
    }

    fn manifest(&mut self, m: &Manifest) -> Result<()> {
        Self::must(m.ac_kind == AC_KIND, "acKind", &m.ac_kind, "it must be ImageManifest")?;
        let version = semver::Version::parse(&m.ac_version);
        Self::must(version.is_ok(), "acVersion", &m.ac_version, "it must be a semantic version")?;
        identifier("name", &m.name)?;
        for (field, count) in [
            ("labels", m.labels.len()),
            ("annotations", m.annotations.len()),
            ("dependencies", m.dependencies.len()),
            ("pathWhitelist", m.path_whitelist.len()),
        ] {
            let rule = format!("at most {MAX_ITEMS} items are taken");
            Self::must(count <= MAX_ITEMS, field, &count.to_string(), &rule)?;
        }
        labels("labels", &m.labels)?;
        self.platform(m)?;
        unique("annotations", &m.annotations)?;
        for pair in &m.annotations {
            self.annotation(pair)?;
        }
        for (i, dependency) in m.dependencies.iter().enumerate() {
            let field = |name: &str| format!("dependencies[{i}].{name}");
            identifier(&field("imageName"), &dependency.image_name)?;
            if let Some(id) = &dependency.image_id {
                Self::must(is_image_id(id), &field("imageID"), id, "it must be sha512- and hex digits, lowercase")?;
            }
            labels(&field("labels"), &dependency.labels)?;
        }
        for (i, path) in m.path_whitelist.iter().enumerate() {
            let plain = path.starts_with('/')
                && !path.contains('\0')
                && !path.split('/').any(|part| matches!(part, "." | ".."));
            let field = format!("pathWhitelist[{i}]");
            Self::must(plain, &field, path, "it must be an absolute path without . and ..")?;
            // An index holds no others.
            let fits = path.len() <= MAX_PATH + 1 && path.split('/').all(|part| part.len() <= MAX_NAME);
            Self::must(fits, &field, path, &format!("at most {MAX_PATH} bytes are taken, {MAX_NAME} a name"))?;
        }
        m.app.as_ref().map_or(Ok(()), |app| self.app(app))
    }

    fn platform(&mut self, m: &Manifest) -> Result<()> {
        let (os, arch) = (m.label("os"), m.label("arch"));
        let Some(os) = os else {
            return self.should(arch.is_none(), "labels.arch", arch.unwrap_or(""), "it needs the label os beside it");
        };
        let Some((_, archs)) = PLATFORMS.iter().find(|(name, _)| *name == os) else {
            return self.should(false, "labels.os", os, "it must be linux, freebsd or darwin");
        };
        let Some(arch) = arch else { return Ok(()) };
        let rule = format!("for {os} it must be one of {}", archs.join(", "));
        self.should(archs.contains(&arch), "labels.arch", arch, &rule)
    }

    fn annotation(&mut self, pair: &Pair) -> Result<()> {
        let field = format!("annotations.{}", pair.name);
        let value = &pair.value;
        self.should(is_ac_identifier(&pair.name), "annotations.name", &pair.name, IDENTIFIER_RULE)?;
        match pair.name.as_str() {
            "created" => self.should(is_rfc3339(value), &field, value, "it must be a time as RFC 3339 writes it"),
            "homepage" | "documentation" => {
                let web = value.starts_with("http://") || value.starts_with("https://");
                self.should(web, &field, value, "it must be an http or https URL")
            }
            _ => Ok(()),
        }
    }

    fn app(&mut self, app: &App) -> Result<()> {
        let empty = app.exec.as_ref().is_some_and(|exec| exec.first().is_some_and(String::is_empty));
        self.should(app.exec.is_some(), "app.exec", "null", "it must be a list")?;
        self.should(!empty, "app.exec[0]", "", "the program must be named")?;
        for (field, value) in [("app.user", &app.user), ("app.group", &app.group)] {
            let value = value.as_deref().unwrap_or("");
            self.should(!value.is_empty(), field, value, "it must be an id, a name or a path")?;
        }
        if let Some(dir) = &app.working_directory {
            // Go writes an absent one as "".
            self.should(dir.starts_with('/') || dir.is_empty(), "app.workingDirectory", dir, "it must be absolute")?;
        }
        unique("app.environment", &app.environment)?;
        for pair in &app.environment {
            let ok = !pair.name.is_empty() && !pair.name.contains(['=', '\0']);
            self.should(ok, "app.environment.name", &pair.name, "it must be a name without =")?;
        }
        let mut seen = std::collections::HashSet::new();
        for handler in &app.event_handlers {
            let name = handler.name.as_str();
            self.should(
                matches!(name, "pre-start" | "post-stop"),
                "app.eventHandlers.name",
                name,
                "it must be pre-start or post-stop",
            )?;
            self.should(seen.insert(name), "app.eventHandlers.name", name, "it is there twice")?;
        }
        let mut seen = std::collections::HashSet::new();
        for point in &app.mount_points {
            self.should(is_ac_name(&point.name), "app.mountPoints.name", &point.name, NAME_RULE)?;
            self.should(point.path.starts_with('/'), "app.mountPoints.path", &point.path, "it must be absolute")?;
            self.should(seen.insert(&point.name), "app.mountPoints.name", &point.name, "it is there twice")?;
        }
        let mut seen = std::collections::HashSet::new();
        for port in &app.ports {
            self.should(is_ac_name(&port.name), "app.ports.name", &port.name, NAME_RULE)?;
            self.should(seen.insert(&port.name), "app.ports.name", &port.name, "it is there twice")?;
            let last = u64::from(port.port) + u64::from(port.count.unwrap_or(1).max(1)) - 1;
            let number = port.port.to_string();
            self.should(port.port >= 1 && last <= 65_535, "app.ports.port", &number, "it must lie in 1 to 65535")?;
        }
        for isolator in &app.isolators {
            self.should(is_ac_identifier(&isolator.name), "app.isolators.name", &isolator.name, IDENTIFIER_RULE)?;
        }
        Ok(())
    }
}

const IDENTIFIER_RULE: &str =
    "it must be an AC identifier: lowercase letters and digits, single - . _ ~ / between them";
const NAME_RULE: &str = "it must be an AC name: lowercase letters and digits, single - between them";

fn identifier(field: &str, value: &str) -> Result<()> {
    Checker::must(is_ac_identifier(value), field, value, IDENTIFIER_RULE)
}

fn unique(field: &str, pairs: &[Pair]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for pair in pairs {
        Checker::must(seen.insert(&pair.name), field, &pair.name, "this name is there twice")?;
    }
    Ok(())
}

fn labels(field: &str, pairs: &[Pair]) -> Result<()> {
    unique(field, pairs)?;
    for pair in pairs {
        identifier(&format!("{field}.name"), &pair.name)?;
        Checker::must(pair.name != "name", field, &pair.name, "no label may have this name")?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "appc_tests.rs"]
mod tests;
