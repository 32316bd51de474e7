//! What names an image in a registry: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]` (distribution specification, "Pulling manifests";
//! docker's convention where there is no host: docker.io, and `library/` before a single word).

use crate::error::{Error, Kind, Result};
use crate::image::oci::Digest;

/// Docker's registry as people name it: the host meant where none is named.
pub(super) const DOCKER_IO: &str = "docker.io";
/// The tag meant where neither tag nor digest is named.
const DEFAULT_TAG: &str = "latest";
/// Longest repository and tag (distribution specification).
const MAX_REPOSITORY: usize = 255;
const MAX_TAG: usize = 128;

/// A validated reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
    written: String,
}

/// `HOST`, `HOST:PORT`, an IPv4 address or an IPv6 address in brackets.
pub(super) fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((ip, rest)) if ip.parse::<std::net::Ipv6Addr>().is_ok() => ("v6", rest),
        Some(_) => return false,
        None => text.split_once(':').map_or((text, ""), |(name, _)| (name, &text[name.len()..])),
    };
    let is_port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0) && !port.starts_with('+');
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 255
        && name.split('.').all(is_label)
        && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` for each of its components.
pub(super) fn is_repository(text: &str) -> bool {
    let is_word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let is_component = |part: &str| {
        let bytes = part.as_bytes();
        let ends = bytes.first().is_some_and(is_word) && bytes.last().is_some_and(is_word);
        let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let fits = |s: &str| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-');
        ends && separators.into_iter().all(fits)
    };
    text.len() <= MAX_REPOSITORY && text.split('/').all(is_component)
}

fn is_tag(text: &str) -> bool {
    let mut bytes = text.bytes();
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= MAX_TAG && bytes.next().is_some_and(word) && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

impl Reference {
    /// The registry's host, with its port where one is named; `docker.io` for docker's own.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The digest, where one is named: then it is what counts.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What a manifest is asked for by: the digest, else the tag.
    pub fn selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.clone().unwrap_or_else(|| DEFAULT_TAG.into()),
        }
    }

    /// The names that the image gets: as it was written, and in full. Without a digest that was named: a name is for people.
    pub fn names(&self) -> Vec<String> {
        let tag = match (&self.tag, &self.digest) {
            (Some(tag), _) => format!(":{tag}"),
            (None, Some(digest)) => format!("@{digest}"),
            (None, None) => format!(":{DEFAULT_TAG}"),
        };
        let mut names = vec![format!("{}/{}{tag}", self.host, self.repository)];
        let written = self.written.split('@').next().unwrap_or_default().to_owned();
        if self.digest.is_none() && !names.contains(&written) {
            names.insert(0, written);
        }
        names
    }
}

impl std::str::FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |why: &'static str| {
            let shown: String = text.chars().take(300).collect();
            Error::new(Kind::Usage, "read reference", format!("{shown:?}"), why)
                .hint("write [HOST[:PORT]/]REPOSITORY[:TAG][@sha256:DIGEST], for example docker.io/library/debian:12")
        };
        let written = text.strip_prefix("docker://").unwrap_or(text);
        let (rest, digest) = match written.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(Digest::try_from(digest.to_owned()).map_err(|e| e.with_kind(Kind::Usage))?))
            }
            None => (written, None),
        };
        let (rest, tag) = match rest.rsplit_once(':') {
            Some((before, tag)) if !tag.contains('/') => (before, Some(tag)),
            _ => (rest, None),
        };
        let (host, repository) = match rest.split_once('/') {
            Some((first, after)) if first.contains(['.', ':']) || first == "localhost" => (first, after.to_owned()),
            Some(_) => (DOCKER_IO, rest.to_owned()),
            None => (DOCKER_IO, format!("library/{rest}")),
        };
        if !is_host(host) {
            return Err(refuse(if written.contains("://") {
                "leave out https://"
            } else {
                "the part before the first slash must be HOST or HOST:PORT"
            }));
        }
        if !is_repository(&repository) {
            return Err(refuse(
                "its repository must be lowercase letters and digits, with . _ - between them and / between parts",
            ));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(refuse("its tag must be letters, digits, _ . and -"));
        }
        Ok(Reference {
            host: if host == "index.docker.io" { DOCKER_IO.into() } else { host.into() },
            repository,
            tag: tag.map(Into::into),
            digest,
            written: written.into(),
        })
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None if self.tag.is_none() => write!(f, ":{DEFAULT_TAG}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, want) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("me/app", "docker.io/me/app:latest"),
            ("docker://localhost:5000/a/b:v1", "localhost:5000/a/b:v1"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("quay.io/a/b__c-d.e", "quay.io/a/b__c-d.e:latest"),
            (&*format!("quay.io/a@{digest}"), &*format!("quay.io/a@{digest}")),
            (&*format!("quay.io/a:t@{digest}"), &*format!("quay.io/a:t@{digest}")),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), want, "{text}");
            assert_eq!(want.parse::<Reference>().unwrap().to_string(), want);
        }
        for bad in [
            "",
            "A",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:b:c",
            "a@sha256:0",
            "-a.b/c",
            "a.b:0/c",
            "a.b:99999/c",
            "a.b:x/c",
            "a_-b",
            "../a",
            "a.b/../c",
            "a.b/c/.",
            "a b",
            "a___b",
            "a:..",
            "u@h.x/a",
            "[::1/a",
            &format!("a.b/{}", "x".repeat(300)),
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_what_was_written_and_in_full() {
        let names = |text: &str| text.parse::<Reference>().unwrap().names();
        assert_eq!(names("debian:12"), ["debian:12", "docker.io/library/debian:12"]);
        assert_eq!(names("quay.io/a:1"), ["quay.io/a:1"]);
        let digest = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(names(&format!("quay.io/a@{digest}")), [format!("quay.io/a@{digest}")]);
        assert_eq!(names(&format!("quay.io/a:1@{digest}")), ["quay.io/a:1"]);
    }
}
