//! Which images a text means: by name, by name and labels, by the beginning of an id.

use super::meta::Meta;
use crate::error::{Error, Kind, Result};
use crate::id::{ImageId, ImageRef};
use crate::image::discovery::Wanted;

/// Fewest hex digits of an id's beginning that are taken for one: fewer would often be a name mistyped. With the algorithm
/// before them it is clear that an id is meant.
const MIN_PREFIX: usize = 6;
pub(super) const MIN_PREFIX_AFTER_ALGORITHM: usize = 4;

/// The images that a text means: those of this name; else those of this name and the labels after it
/// (`NAME[:VERSION][,LABEL=VALUE...]`); else those whose id begins so.
pub(super) fn fitting(all: Vec<Meta>, text: &str) -> Vec<Meta> {
    let named = |meta: &Meta, name: &str| meta.names.iter().any(|have| have == name);
    let by_name: Vec<Meta> = all.iter().filter(|meta| named(meta, text)).cloned().collect();
    if !by_name.is_empty() {
        return by_name;
    }
    if let Ok(wanted) = text.parse::<Wanted>() {
        // rkt's rule: the labels asked for must be there; others may be.
        let has = |meta: &Meta| wanted.labels().iter().all(|pair| meta.label(&pair.name) == Some(&*pair.value));
        let by_label: Vec<Meta> = all.iter().filter(|meta| named(meta, wanted.name()) && has(meta)).cloned().collect();
        if !by_label.is_empty() {
            return by_label;
        }
    }
    let (digits, least) = match text.split_once('-') {
        Some(("sha512" | "sha256", digits)) => (digits, MIN_PREFIX_AFTER_ALGORITHM),
        _ => (text, MIN_PREFIX),
    };
    if digits.len() < least || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Vec::new();
    }
    let begins = |id: &ImageId| {
        let id = id.as_str();
        id.starts_with(text) || id.split_once('-').is_some_and(|(_, rest)| rest.starts_with(text))
    };
    all.into_iter().filter(|meta| begins(&meta.id)).collect()
}

pub(super) fn choose(image: &ImageRef, mut found: Vec<Meta>, missing: impl FnOnce() -> Error) -> Result<Meta> {
    if found.len() > 1 {
        // rkt's rule: who names no version means the one called latest.
        let latest: Vec<usize> = (0..found.len()).filter(|i| found[*i].label("version") == Some("latest")).collect();
        if let [only] = latest[..] {
            return Ok(found.swap_remove(only));
        }
        // And where none is called so (or several are), the one imported last. Within one second nobody can tell.
        if !latest.is_empty() {
            found.retain(|meta| meta.label("version") == Some("latest"));
        }
        let last = found.iter().map(|meta| meta.imported_at).max();
        let newest: Vec<usize> = (0..found.len()).filter(|i| Some(found[*i].imported_at) == last).collect();
        if let [only] = newest[..] {
            return Ok(found.swap_remove(only));
        }
        let shown: Vec<String> = found
            .iter()
            .map(|meta| {
                let version = meta.label("version").map_or(String::new(), |version| format!(":{version}"));
                format!("{}{version} ({})", meta.names.first().map_or("", |name| name), meta.id.short())
            })
            .collect();
        return Err(Error::new(Kind::Usage, "find image", image, format!("it may be any of {}", shown.join(", ")))
            .hint("name the version (NAME:VERSION) or the id"));
    }
    found.pop().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::super::meta::ImageKind;
    use super::*;

    fn meta(digit: &str, name: &str, version: Option<&str>) -> Meta {
        let id = format!("sha512-{}", digit.repeat(64)).parse().unwrap();
        let mut meta = Meta::new(id, ImageKind::Appc, String::new());
        meta.names.push(name.into());
        meta.labels.extend(version.map(|v| ("version".to_owned(), v.to_owned())));
        meta
    }

    #[test]
    fn names_versions_and_prefixes() {
        let all = [
            meta("0a", "example.com/a", Some("1")),
            meta("0b", "example.com/a", Some("2")),
            meta("1c", "b", None),
            meta("1d", "c", Some("latest")),
            meta("1e", "c", Some("3")),
            meta("1f", "0b0b0b", None),
        ];
        let find = |text: &str| {
            let image = ImageRef::Name(text.into());
            choose(&image, fitting(all.to_vec(), text), || Error::new(Kind::NotFound, "", "", "")).map(|meta| meta.id)
        };
        let id = |digit: &str| format!("sha512-{}", digit.repeat(64)).parse::<ImageId>().unwrap();
        assert_eq!(find("example.com/a:2").unwrap(), id("0b"));
        assert_eq!(find("b").unwrap(), id("1c"));
        assert_eq!(find("c").unwrap(), id("1d"));
        assert_eq!(find("sha512-0a0a0a").unwrap(), id("0a"));
        assert_eq!(find("1c1c1c1").unwrap(), id("1c"));
        assert_eq!(find("sha512-1c1c").unwrap(), id("1c"));
        assert_eq!(find("0b0b0b").unwrap(), id("1f"), "a name goes before an id");
        let ambiguous = find("example.com/a").unwrap_err();
        assert_eq!(ambiguous.kind(), Kind::Usage);
        assert!(ambiguous.to_string().contains("example.com/a:1 (sha512-0a0a0a0a0a0a)"), "{ambiguous}");
        assert_eq!(find("example.com/a:2,os=linux").unwrap_err().kind(), Kind::NotFound, "a label that it has not");
        let mut newer = all.clone();
        newer[1].imported_at += 1;
        newer[1].labels.push(("os".into(), "linux".into()));
        let find_newer = |text: &str| {
            let image = ImageRef::Name(text.into());
            choose(&image, fitting(newer.to_vec(), text), || Error::new(Kind::NotFound, "", "", "")).map(|meta| meta.id)
        };
        assert_eq!(find_newer("example.com/a").unwrap(), id("0b"), "the one imported last");
        assert_eq!(find_newer("example.com/a,os=linux").unwrap(), id("0b"), "a subset of its labels");
        assert_eq!(find_newer("example.com/a:1").unwrap(), id("0a"));
        for none in ["1c1c1", "zz", "example.com/a:3", "sha512-", "sha256-0a0a0a", "x:1c1c1c"] {
            assert_eq!(find(none).unwrap_err().kind(), Kind::NotFound, "{none}");
        }
    }
}
