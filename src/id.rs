//! Names that come from outside, validated once: after this they may become part of a path.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Kind, Result};

/// The id of an image in the store: `sha512-` and 128 lowercase hex digits (AppC: SHA-512 of the uncompressed tar), or
/// `sha256-` and 64 (OCI: the manifest digest, its `:` written `-`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId(String);

impl ImageId {
    /// The AppC id of an uncompressed tar with this SHA-512.
    pub fn from_sha512(digest: &[u8; 64]) -> Self {
        ImageId(format!("sha512-{}", data_encoding::HEXLOWER.encode(digest)))
    }

    /// The id of an OCI image whose manifest has this SHA-256.
    pub fn from_sha256(digest: &[u8; 32]) -> Self {
        ImageId(format!("sha256-{}", data_encoding::HEXLOWER.encode(digest)))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first twelve digits, for tables: enough to name it by.
    pub fn digits(&self) -> &str {
        &self.0[7..7 + 12]
    }

    /// The algorithm and the first twelve digits: for people, and for prefixes on the command line.
    pub fn short(&self) -> &str {
        &self.0[..7 + 12]
    }
}

impl FromStr for ImageId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = match text.split_once('-') {
            Some(("sha512", hex)) if hex.len() == 128 => hex,
            Some(("sha256", hex)) if hex.len() == 64 => hex,
            _ => "",
        };
        if digits.is_empty() || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(Error::new(
                Kind::Invalid,
                "read image id",
                format!("{text:?}"),
                "an image id is sha512- and 128 lowercase hex digits, or sha256- and 64",
            ));
        }
        Ok(ImageId(text.to_owned()))
    }
}

impl TryFrom<String> for ImageId {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> String {
        id.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of one provisioned rootfs: 1 to 128 of `[A-Za-z0-9_.-]`, beginning with a letter or digit. `PARENT.CHILD` is nested
/// in `PARENT`, if there is one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// Longest id: it becomes a directory name, and the control socket's path below it must fit in `sun_path` (108 bytes)
    /// through a directory fd.
    pub const MAX_LEN: usize = 128;

    /// A fresh id, twelve hex digits of the kernel's randomness.
    pub fn random() -> Result<Self> {
        let mut bytes = [0_u8; 6];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::sys("read random bytes", "", e))?;
        Ok(ContainerId(data_encoding::HEXLOWER.encode(&bytes)))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id that this one is nested in: `a.b` is the parent of `a.b.c`.
    pub fn parent(&self) -> Option<ContainerId> {
        self.0.rsplit_once('.').and_then(|(parent, _)| parent.parse().ok())
    }

    /// Is it nested in `outer`, directly or not?
    pub fn is_nested_in(&self, outer: &ContainerId) -> bool {
        self.0.strip_prefix(outer.as_str()).is_some_and(|rest| rest.starts_with('.'))
    }
}

impl FromStr for ContainerId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let first = text.bytes().next();
        let fits = first.is_some_and(|b| b.is_ascii_alphanumeric())
            && text.len() <= Self::MAX_LEN
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
        if !fits {
            return Err(Error::new(
                Kind::Usage,
                "read id",
                format!("{text:?}"),
                "an id is 1 to 128 letters, digits, '_', '.' or '-', beginning with a letter or digit",
            ));
        }
        Ok(ContainerId(text.to_owned()))
    }
}

impl TryFrom<String> for ContainerId {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> String {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the user wrote for IMAGE: a path when it begins with `/`, `./` or `../` (or is `.` or `..`), else something in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageRef {
    /// A directory that is a root filesystem, a directory holding `manifest` and `rootfs`, or an archive.
    Path(PathBuf),
    /// A whole image id.
    Id(ImageId),
    /// A name, `name:version`, or a prefix of an id. Never empty, never with control characters.
    Name(String),
}

impl ImageRef {
    /// Longest name taken: AppC and OCI names are far shorter.
    pub const MAX_NAME_LEN: usize = 512;

    /// Read what the user wrote. Touches no file.
    pub fn parse(text: &std::ffi::OsStr) -> Result<Self> {
        let bytes = text.as_encoded_bytes();
        if bytes.starts_with(b"/")
            || bytes.starts_with(b"./")
            || bytes.starts_with(b"../")
            || bytes == b"."
            || bytes == b".."
        {
            return Ok(ImageRef::Path(PathBuf::from(text)));
        }
        let refuse = |why: &'static str| {
            Error::new(Kind::Usage, "read image", crate::error::show(Path::new(text)), why)
                .hint("name an image of `fsprov image list`, or a path beginning with / or ./")
        };
        let text = text.to_str().ok_or_else(|| refuse("an image name is plain text"))?;
        if text.is_empty() || text.len() > Self::MAX_NAME_LEN || text.chars().any(char::is_control) {
            return Err(refuse("an image name is 1 to 512 printable characters"));
        }
        Ok(text.parse().map_or_else(|_| ImageRef::Name(text.to_owned()), ImageRef::Id))
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageRef::Path(path) => f.write_str(&crate::error::show(path)),
            ImageRef::Id(id) => id.fmt(f),
            ImageRef::Name(name) => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_ids() {
        let good = format!("sha512-{}", "0a".repeat(64));
        assert_eq!(good.parse::<ImageId>().unwrap().short(), "sha512-0a0a0a0a0a0a");
        assert!(format!("sha256-{}", "b".repeat(64)).parse::<ImageId>().is_ok());
        for bad in [
            String::new(),
            "sha512-".into(),
            format!("sha512-{}", "A".repeat(128)),
            format!("sha512-{}", "a".repeat(127)),
            format!("sha256-{}", "a".repeat(128)),
            format!("sha512-{}/../x", "a".repeat(123)),
            format!("md5-{}", "a".repeat(128)),
        ] {
            assert!(bad.parse::<ImageId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn container_ids() {
        for good in ["a", "0", "a.b-c_d", &"x".repeat(128)] {
            assert!(good.parse::<ContainerId>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(bad.parse::<ContainerId>().is_err(), "{bad}");
        }
        let id = |text: &str| text.parse::<ContainerId>().unwrap();
        assert_eq!(id("a.b.c").parent(), Some(id("a.b")));
        assert_eq!(id("a").parent(), None);
        assert!(id("a.b.c").is_nested_in(&id("a")) && id("a.b").is_nested_in(&id("a")));
        assert!(
            !id("ab.c").is_nested_in(&id("a")) && !id("a").is_nested_in(&id("a")) && !id("a").is_nested_in(&id("a.b"))
        );
        assert_ne!(ContainerId::random().unwrap(), ContainerId::random().unwrap());
    }

    #[test]
    fn image_references() {
        let path = |t: &str| matches!(ImageRef::parse(t.as_ref()).unwrap(), ImageRef::Path(_));
        assert!(path("/x") && path("./x") && path("../x") && path("."));
        assert!(!path("x/y") && !path("example.com/debian:12"));
        assert!(ImageRef::parse("".as_ref()).is_err());
        assert!(ImageRef::parse("a\nb".as_ref()).is_err());
        let id = format!("sha512-{}", "0".repeat(128));
        assert!(matches!(ImageRef::parse(id.as_ref()).unwrap(), ImageRef::Id(_)));
    }
}
