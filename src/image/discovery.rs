//! Where an AppC image of a name is found (AppC specification 0.8.11, "App Container Image Discovery"): what is asked for, the
//! names that simple discovery makes of it, and the templates that a page's `ac-discovery` tags give. Must not know the network.

use std::fmt;
use std::str::FromStr;

use html5gum::{DefaultEmitter, Token, Tokenizer};

use super::appc::{Dependency, Manifest, Pair, is_ac_identifier};
use super::oci::Platform;
use crate::error::{Error, Kind, Result};

/// The version meant where none is named.
const DEFAULT_VERSION: &str = "latest";
/// Most templates of one page that are looked at.
const MAX_TEMPLATES: usize = 16;

/// An image that is wanted: its name and the labels it must have, `NAME[:VERSION][,LABEL=VALUE...]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    name: String,
    labels: Vec<Pair>,
}

impl Wanted {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The labels it must have.
    pub fn labels(&self) -> &[Pair] {
        &self.labels
    }

    fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|pair| pair.name == name).map(|pair| pair.value.as_str())
    }

    fn new(name: &str, labels: Vec<Pair>) -> Result<Self> {
        let wanted = Wanted { name: name.into(), labels };
        let refuse = |why: String| {
            Err(Error::new(Kind::Usage, "read image name", format!("{:?}", wanted.to_string()), why)
                .hint("it is NAME[:VERSION][,LABEL=VALUE...], like example.com/app:1.0,os=linux"))
        };
        if !is_ac_identifier(name) {
            return refuse(
                "its name must be an AC identifier: lowercase letters and digits, single - . _ ~ / between them".into(),
            );
        }
        for (at, label) in wanted.labels.iter().enumerate() {
            if !is_ac_identifier(&label.name) || label.name == "name" {
                return refuse(format!("no label may be called {:?}", label.name));
            }
            if wanted.labels[..at].iter().any(|before| before.name == label.name) {
                return refuse(format!("the label {} is there twice", label.name));
            }
            // It becomes part of a URL or a path.
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~+".contains(&b);
            if label.value.is_empty() || label.value.contains("..") || !label.value.bytes().all(plain) {
                return refuse(format!("the label {} must be letters, digits and single . - _ ~ +", label.name));
            }
        }
        Ok(wanted)
    }

    /// The value of a template's variable: labels, with a default for version, os and arch.
    fn value(&self, variable: &str, platform: &Platform) -> Option<String> {
        match (variable, self.label(variable)) {
            ("name", _) => Some(self.name.clone()),
            (_, Some(value)) => Some(value.to_owned()),
            ("version", None) => Some(DEFAULT_VERSION.into()),
            ("os", None) => Some(platform.os.clone()),
            ("arch", None) => Some(platform.appc_arch().into()),
            _ => None,
        }
    }

    /// What simple discovery asks for, with what stands before it: `PREFIX` `NAME-VERSION-OS-ARCH.aci`.
    pub fn simple(&self, prefix: &str, platform: &Platform) -> String {
        let part = |name: &str| self.value(name, platform).unwrap_or_default();
        format!("{prefix}{}-{}-{}-{}.aci", self.name, part("version"), part("os"), part("arch"))
    }

    /// The pages that meta discovery looks at, without scheme, the first that has a fitting tag counts: the name, then what is above it.
    pub fn pages(&self) -> Vec<String> {
        let mut pages = vec![self.name.clone()];
        let mut at = self.name.as_str();
        while let Some((above, _)) = at.rsplit_once('/') {
            pages.push(above.to_owned());
            at = above;
        }
        pages
    }

    /// A template of a page filled in. `None`: it wants a label that was not named.
    pub fn fill(&self, template: &str, ext: &str, platform: &Platform) -> Option<String> {
        let mut out = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('{') {
            let (variable, after) = after.split_once('}')?;
            out.push_str(before);
            out.push_str(&if variable == "ext" { ext.to_owned() } else { self.value(variable, platform)? });
            rest = after;
        }
        out.push_str(rest);
        Some(out)
    }

    /// Is this manifest that of the image wanted? Every label asked for must be there; os and arch, where nobody asked, must
    /// not be another host's.
    pub fn check(&self, manifest: &Manifest, platform: &Platform) -> Result<()> {
        let refuse = |why: String| Err(Error::new(Kind::Integrity, "check image", self, why));
        if manifest.name != self.name {
            return refuse(format!("what came calls itself {}", manifest.name));
        }
        for label in &self.labels {
            match manifest.label(&label.name) {
                Some(value) if value == label.value => {}
                Some(value) => return refuse(format!("what came has the label {}={value}", label.name)),
                None => return refuse(format!("what came has no label {}", label.name)),
            }
        }
        for (name, here) in [("os", platform.os.as_str()), ("arch", platform.appc_arch())] {
            if let Some(value) = manifest.label(name).filter(|value| self.label(name).is_none() && *value != here) {
                return refuse(format!("what came is for {name}={value}, not {here}"));
            }
        }
        Ok(())
    }
}

impl FromStr for Wanted {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let (name, version) = first.split_once(':').map_or((first, None), |(name, version)| (name, Some(version)));
        let mut labels: Vec<Pair> = Vec::new();
        labels.extend(version.map(|value| Pair { name: "version".into(), value: value.into() }));
        for part in parts {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            labels.push(Pair { name: name.into(), value: value.into() });
        }
        Wanted::new(name, labels)
    }
}

impl TryFrom<&Dependency> for Wanted {
    type Error = Error;

    fn try_from(dependency: &Dependency) -> Result<Self> {
        Wanted::new(&dependency.image_name, dependency.labels.clone())
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(version) = self.label("version") {
            write!(f, ":{version}")?;
        }
        for label in self.labels.iter().filter(|label| label.name != "version") {
            write!(f, ",{}={}", label.name, label.value)?;
        }
        Ok(())
    }
}

/// The templates for `name` of a page's `ac-discovery` tags, in their order. Only its head is read: below, others may have written.
pub fn templates(page: &[u8], name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut emitter = DefaultEmitter::default();
    // What stands in a script or a title is text, whatever it looks like.
    emitter.naively_switch_states(true);
    for token in Tokenizer::new_with_emitter(page, emitter) {
        match token {
            Ok(Token::StartTag(tag)) if *tag.name == b"body"[..] => break,
            Ok(Token::EndTag(tag)) if *tag.name == b"head"[..] => break,
            Ok(Token::StartTag(tag)) if *tag.name == b"meta"[..] => {
                let attribute = |wanted: &[u8]| {
                    let found = tag.attributes.iter().find(|(name, _)| name.as_slice() == wanted);
                    found.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
                };
                if attribute(b"name").as_deref() != Some("ac-discovery") {
                    continue;
                }
                let content = attribute(b"content").unwrap_or_default();
                let mut words = content.split_whitespace();
                if let (Some(prefix), Some(template), None) = (words.next(), words.next(), words.next())
                    && name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                    && found.len() < MAX_TEMPLATES
                {
                    found.push(template.to_owned());
                }
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amd64() -> Platform {
        "linux/amd64".parse().unwrap()
    }

    #[test]
    fn names_versions_and_labels() {
        let wanted: Wanted = "example.com/app:1.0,os=linux,channel=beta".parse().unwrap();
        assert_eq!(wanted.simple("https://", &amd64()), "https://example.com/app-1.0-linux-amd64.aci");
        assert_eq!(wanted.to_string(), "example.com/app:1.0,os=linux,channel=beta");
        let plain: Wanted = "app".parse().unwrap();
        assert_eq!(plain.simple("/srv/", &"linux/arm64".parse().unwrap()), "/srv/app-latest-linux-aarch64.aci");
        assert_eq!(wanted.pages(), ["example.com/app", "example.com"]);
        for bad in [
            "",
            "A",
            "a:",
            "a:1,",
            "a,os",
            "a,os=",
            "a,name=x",
            "a,os=l,os=m",
            "a:1,version=2",
            "a:../x",
            "a:1..2",
            "a:x/y",
            "a:1 2",
            "../a",
            "a,B=1",
        ] {
            assert_eq!(bad.parse::<Wanted>().unwrap_err().kind(), Kind::Usage, "{bad}");
        }
    }

    #[test]
    fn templates_are_those_of_the_head_for_the_name() {
        let page = br#"<!doctype html><html><head><title>x</title>
            <meta name="ac-discovery" content="example.com https://storage.example.com/{os}/{arch}/{name}-{version}.{ext}">
            <META NAME=ac-discovery CONTENT='example.com/app https://b.example.com/{channel}.{ext}'>
            <meta name="ac-discovery" content="example.com/ap https://wrong.example.com/{ext}">
            <meta name="ac-discovery" content="other.com https://wrong.example.com/{ext}">
            <meta name="ac-discovery" content="example.com">
            <meta name="ac-discovery-pubkeys" content="example.com https://example.com/pubkeys.gpg">
            <script>"<meta name='ac-discovery' content='example.com https://script.example.com'>"</script>
            <!-- <meta name="ac-discovery" content="example.com https://comment.example.com"> -->
            </head><body><meta name="ac-discovery" content="example.com https://body.example.com/"></body></html>"#;
        let found = templates(page, "example.com/app");
        assert_eq!(found.len(), 2, "{found:?}");
        let wanted: Wanted = "example.com/app:1.0".parse().unwrap();
        assert_eq!(
            wanted.fill(&found[0], "aci", &amd64()).unwrap(),
            "https://storage.example.com/linux/amd64/example.com/app-1.0.aci"
        );
        assert_eq!(wanted.fill(&found[1], "aci", &amd64()), None, "no channel was named");
        let wanted: Wanted = "example.com/app,channel=beta".parse().unwrap();
        assert_eq!(wanted.fill(&found[1], "aci.asc", &amd64()).unwrap(), "https://b.example.com/beta.aci.asc");
        assert_eq!(wanted.fill("https://x/{ext", "aci", &amd64()), None);
        assert!(templates(b"<html><body><meta name=ac-discovery content='a b'>", "a").is_empty());
    }

    #[test]
    fn what_came_must_be_what_was_wanted() {
        let mut manifest = Manifest::named("example.com/app").unwrap();
        manifest.labels.push(Pair { name: "version".into(), value: "1.0".into() });
        let check = |text: &str, manifest: &Manifest| text.parse::<Wanted>().unwrap().check(manifest, &amd64());
        check("example.com/app", &manifest).unwrap();
        check("example.com/app:1.0", &manifest).unwrap();
        for wrong in ["example.com/ap", "example.com/app:2", "example.com/app,os=linux"] {
            assert_eq!(check(wrong, &manifest).unwrap_err().kind(), Kind::Integrity, "{wrong}");
        }
        manifest.labels.push(Pair { name: "arch".into(), value: "s390x".into() });
        assert!(check("example.com/app", &manifest).is_err());
        check("example.com/app,arch=s390x", &manifest).unwrap();
    }
}
