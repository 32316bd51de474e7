//! OCI image documents (image-spec 1.1: descriptor, index, manifest, config) and the docker ones they grew from.
//!
//! A document is read as what its own fields say, and must be what it was announced as: one that could be both an index and
//! a manifest is refused (CVE-2021-41190).

use serde::{Deserialize, Serialize};

use super::parse_json;
use crate::error::{Error, Kind, Result};
use crate::id::ImageId;

/// Most layers of one image; docker stops at 127.
pub const MAX_LAYERS: usize = 512;
/// Most manifests of one index: one a platform and its attestations are below 50.
pub const MAX_MANIFESTS: usize = 1024;

/// The media types that are written and taken.
pub mod media_type {
    /// OCI image index.
    pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// OCI image manifest.
    pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image config.
    pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// OCI layer, uncompressed.
    pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// Docker's index.
    pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker's manifest.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
}

/// A SHA-256 digest, `sha256:` and 64 hex digits: validated before it becomes part of a path (CVE-2024-3727).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(ImageId);

impl Digest {
    /// Of these 32 bytes.
    pub fn from_sha256(digest: &[u8; 32]) -> Self {
        Digest(ImageId::from_sha256(digest))
    }

    /// As the name of a directory of the store.
    pub fn id(&self) -> &ImageId {
        &self.0
    }

    /// Its hex digits.
    pub fn hex(&self) -> &str {
        &self.0.as_str()["sha256-".len()..]
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        let refuse = || {
            let shown: String = text.chars().take(160).collect();
            Error::new(
                Kind::Invalid,
                "read digest",
                format!("{shown:?}"),
                "a digest must be `sha256:` and 64 lowercase hex digits",
            )
        };
        let hex = text.strip_prefix("sha256:").ok_or_else(refuse)?;
        format!("sha256-{hex}").parse().map(Digest).map_err(|_| refuse())
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

/// What an image runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Go's name: `amd64`, `arm64`, ...
    pub architecture: String,
    /// Go's name: `linux`.
    pub os: String,
    /// `v7`, `v8`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// This host's.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Platform { architecture: architecture.into(), os: "linux".into(), variant: None }
    }

    /// The architecture in AppC's words (spec/aci.md, "os" and "arch"), which have a variant within them.
    pub fn appc_arch(&self) -> &str {
        match (self.architecture.as_str(), self.variant.as_deref()) {
            ("386", _) => "i386",
            ("arm64", _) => "aarch64",
            ("arm", Some("v6")) => "armv6l",
            // containerd takes `arm` alone for v7, too.
            ("arm", Some("v7") | None) => "armv7l",
            (other, _) => other,
        }
    }

    /// For Linux, from [`Platform::appc_arch`]'s words.
    pub fn from_appc_arch(arch: &str) -> Self {
        let (architecture, variant) = match arch {
            "i386" => ("386", None),
            "aarch64" => ("arm64", None),
            "armv6l" => ("arm", Some("v6")),
            "armv7l" => ("arm", Some("v7")),
            other => (other, None),
        };
        Platform { architecture: architecture.into(), os: "linux".into(), variant: variant.map(Into::into) }
    }

    /// Refuse an image for `self` where another platform was asked for. Of an image for one platform no index tells it beforehand.
    pub(crate) fn require(&self, wanted: &Platform) -> Result<()> {
        let variant = self.variant.as_ref().and(wanted.variant.clone());
        if self.fits(&Platform { variant, ..wanted.clone() }) {
            return Ok(());
        }
        Err(Error::new(Kind::NotFound, "choose image", format!("for {wanted}"), format!("this image is for {self}"))
            .hint("leave out --platform to take it"))
    }

    /// Does an image for `self` fit where `wanted` is asked for?
    pub fn fits(&self, wanted: &Platform) -> bool {
        self.os == wanted.os
            && self.architecture == wanted.architecture
            && (wanted.variant.is_none() || self.variant == wanted.variant)
    }
}

impl std::str::FromStr for Platform {
    type Err = Error;

    /// `OS/ARCH` or `OS/ARCH/VARIANT`.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None) if !os.is_empty() && !architecture.is_empty() => {
                Ok(Platform { os: os.into(), architecture: architecture.into(), variant: variant.map(Into::into) })
            }
            _ => Err(Error::new(Kind::Usage, "read platform", format!("{text:?}"), "it is OS/ARCH or OS/ARCH/VARIANT")),
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// Where a blob is and what it is said to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is said to be.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// What it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Words about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<std::collections::BTreeMap<String, String>>,
}

impl Descriptor {
    /// Of these bytes, and nothing more said of them.
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Descriptor { media_type: media_type.into(), digest, size, platform: None, annotations: None }
    }
}

/// The annotation of an index's entry that names it.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// containerd's and docker's, with the repository before the tag.
const FULL_NAME: &str = "io.containerd.image.name";

impl Descriptor {
    /// The names it has in its index.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let annotations = self.annotations.as_ref();
        [FULL_NAME, REF_NAME].into_iter().filter_map(move |key| annotations?.get(key)).map(String::as_str)
    }
}

/// An image manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// What it says it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The config.
    pub config: Descriptor,
    /// The layers, bottom first.
    pub layers: Vec<Descriptor>,
}

/// An index: manifests for several platforms or names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// What it says it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests.
    pub manifests: Vec<Descriptor>,
}

/// The part of an image config that matters here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// What it runs on.
    #[serde(flatten)]
    pub platform: Platform,
    /// What its layers are, uncompressed.
    pub rootfs: RootFs,
}

/// The uncompressed layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Digests of the uncompressed layers, bottom first.
    pub diff_ids: Vec<Digest>,
}

/// One image of a docker archive's `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DockerImage {
    /// Path of the config in the archive.
    pub config: String,
    /// Names.
    #[serde(default)]
    pub repo_tags: Option<Vec<String>>,
    /// Paths of the layers in the archive, bottom first.
    pub layers: Vec<String>,
}

/// An index or a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// An index.
    Index(Index),
    /// A manifest.
    Manifest(Manifest),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    #[serde(rename = "fsLayers")]
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// Read an index or a manifest that was announced as `announced`.
pub fn parse_document(bytes: &[u8], announced: Option<&str>) -> Result<Document> {
    let refuse = |why: String| Err(Error::new(Kind::Invalid, "read", "OCI document", why));
    let shape: Shape = parse_json("OCI document", bytes)?;
    if shape.schema_version != 2 || shape.fs_layers.is_some() {
        return refuse(format!("schemaVersion is {}: only 2 is taken", shape.schema_version));
    }
    let is_index = shape.manifests.is_some();
    if is_index == (shape.config.is_some() || shape.layers.is_some()) {
        return refuse("it must be either an index (manifests) or a manifest (config and layers)".into());
    }
    for said in [announced, shape.media_type.as_deref()].into_iter().flatten() {
        let fits = match said {
            media_type::INDEX | media_type::DOCKER_INDEX => is_index,
            media_type::MANIFEST | media_type::DOCKER_MANIFEST => !is_index,
            _ => return refuse(format!("mediaType {said:?} is neither an index's nor a manifest's")),
        };
        if !fits {
            return refuse(format!("mediaType {said:?} does not fit what it holds"));
        }
    }
    if is_index {
        let index: Index = parse_json("OCI index", bytes)?;
        if index.manifests.len() > MAX_MANIFESTS {
            return refuse(format!("it has more than {MAX_MANIFESTS} manifests"));
        }
        return Ok(Document::Index(index));
    }
    let manifest: Manifest = parse_json("OCI manifest", bytes)?;
    if manifest.layers.len() > MAX_LAYERS {
        return refuse(format!("it has more than {MAX_LAYERS} layers"));
    }
    Ok(Document::Manifest(manifest))
}

/// Read a config and check that it speaks of `layers` layers.
pub fn parse_config(bytes: &[u8], layers: usize) -> Result<Config> {
    let config: Config = parse_json("OCI config", bytes)?;
    let refuse = |why: String| Err(Error::new(Kind::Invalid, "read", "OCI config", why));
    if config.rootfs.kind != "layers" {
        return refuse(format!("rootfs.type is {:?}: it must be layers", config.rootfs.kind));
    }
    let diff_ids = config.rootfs.diff_ids.len();
    if diff_ids != layers {
        return refuse(format!("rootfs.diff_ids has {diff_ids} items and the manifest {layers} layers"));
    }
    Ok(config)
}

/// Is this the media type of a layer that is a tar archive, and is it then compressed with gzip or zstd? `None`: it is not.
pub fn is_tar_layer(media_type: &str) -> bool {
    const KNOWN: [&str; 8] = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ];
    KNOWN.contains(&media_type)
}

/// Choose from an index: by name where one is wanted, then by platform; what only says `unknown` (attestations) is not an image.
pub fn choose<'a>(index: &'a Index, name: Option<&str>, platform: &Platform) -> Result<&'a Descriptor> {
    let is_document = |d: &&Descriptor| {
        matches!(
            d.media_type.as_str(),
            media_type::INDEX | media_type::DOCKER_INDEX | media_type::MANIFEST | media_type::DOCKER_MANIFEST
        )
    };
    let named = |d: &&Descriptor| {
        name.is_none_or(|name| {
            d.names().any(|have| have == name || have.rsplit_once(':').is_some_and(|(_, tag)| tag == name))
        })
    };
    let all: Vec<&Descriptor> = index.manifests.iter().filter(is_document).filter(named).collect();
    let fits: Vec<&Descriptor> =
        all.iter().copied().filter(|d| d.platform.as_ref().is_none_or(|have| have.fits(platform))).collect();
    let refuse = |kind, why: String| Err(Error::new(kind, "choose image", name.unwrap_or("of the index"), why));
    let shown = |list: &[&Descriptor]| {
        let one = |d: &&Descriptor| {
            let name = d.names().next().unwrap_or("");
            let platform = d.platform.as_ref().map_or(String::new(), ToString::to_string);
            format!("{name} {platform}").trim().to_owned()
        };
        list.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    match fits[..] {
        [one] => Ok(one),
        [] if all.is_empty() => refuse(Kind::NotFound, "the index has none".into()),
        [] => refuse(Kind::NotFound, format!("there is none for {platform}: there are {}", shown(&all))),
        [first, ref rest @ ..] if rest.iter().all(|d| d.digest == first.digest) => Ok(first),
        // Several variants of one architecture, none asked for: the first, as the image-spec says of its order.
        [first, ref rest @ ..] if name.is_some() || rest.iter().all(|d| d.names().next().is_none()) => Ok(first),
        _ => refuse(Kind::Usage, format!("it may be any of {}", shown(&fits))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

    fn descriptor(media: &str) -> String {
        format!(r#"{{"mediaType":"{media}","digest":"{D}","size":1}}"#)
    }

    #[test]
    fn digests_from_outside_are_validated() {
        for bad in
            ["", "sha256:", "sha256:../../x", "sha512:00", &D.to_uppercase(), &D.replace(':', "-"), &format!("{D}0")]
        {
            assert!(Digest::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        let good = Digest::try_from(D.to_owned()).unwrap();
        assert_eq!(good.to_string(), D);
        assert_eq!(good.id().as_str(), D.replace(':', "-"));
    }

    #[test]
    fn a_document_is_one_thing_and_what_it_was_announced_as() {
        let config = descriptor(media_type::CONFIG);
        let manifest = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#);
        let index = r#"{"schemaVersion":2,"manifests":[]}"#.to_owned();
        let both = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[],"manifests":[]}}"#);
        let old = manifest.replace('2', "1");
        for (text, announced, good) in [
            (&manifest, None, true),
            (&manifest, Some(media_type::MANIFEST), true),
            (&manifest, Some(media_type::INDEX), false),
            (&manifest, Some("text/plain"), false),
            (&index, Some(media_type::DOCKER_INDEX), true),
            (&index, Some(media_type::MANIFEST), false),
            (&both, None, false),
            (&old, None, false),
        ] {
            assert_eq!(parse_document(text.as_bytes(), announced).is_ok(), good, "{text} {announced:?}");
        }
    }

    #[test]
    fn appc_has_its_own_words_for_architectures() {
        for (oci, appc) in [
            ("linux/amd64", "amd64"),
            ("linux/386", "i386"),
            ("linux/arm64", "aarch64"),
            ("linux/arm/v6", "armv6l"),
            ("linux/arm/v7", "armv7l"),
            ("linux/ppc64le", "ppc64le"),
        ] {
            let platform: Platform = oci.parse().unwrap();
            assert_eq!(platform.appc_arch(), appc);
            assert_eq!(Platform::from_appc_arch(appc), platform);
        }
        for (oci, appc) in [("linux/arm64/v8", "aarch64"), ("linux/arm", "armv7l")] {
            assert_eq!(oci.parse::<Platform>().unwrap().appc_arch(), appc);
        }
    }

    #[test]
    fn the_platform_and_the_name_choose() {
        let entry = |arch: &str, digit: &str, name: &str| {
            format!(
                r#"{{"mediaType":"{}","digest":"sha256:{}","size":1,"platform":{{"os":"linux","architecture":"{arch}"}},
                "annotations":{{"{REF_NAME}":"{name}"}}}}"#,
                media_type::MANIFEST,
                digit.repeat(64)
            )
        };
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{}]}}"#,
            entry("amd64", "a", "x:1"),
            entry("arm64", "b", "x:1"),
            entry("amd64", "c", "x:2")
        );
        let index: Index = serde_json::from_str(&text).unwrap();
        let amd: Platform = "linux/amd64".parse().unwrap();
        let pick = |name: Option<&str>, platform: &str| {
            choose(&index, name, &platform.parse().unwrap())
                .map(|d| d.digest.hex()[..1].to_owned())
                .map_err(|e| e.kind())
        };
        assert_eq!(pick(Some("x:1"), "linux/amd64"), Ok("a".into()));
        assert_eq!(pick(Some("1"), "linux/arm64"), Ok("b".into()));
        assert_eq!(pick(None, "linux/arm64"), Ok("b".into()));
        assert_eq!(pick(None, "linux/amd64"), Err(Kind::Usage));
        assert_eq!(pick(Some("x:1"), "linux/s390x"), Err(Kind::NotFound));
        assert!(choose(&index, Some("y"), &amd).is_err());
    }
}
