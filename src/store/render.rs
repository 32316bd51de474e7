//! AppC's dependencies: which images of the store lie below one, in which order, and what its pathWhitelist leaves of them.
//!
//! The order is the specification's: each dependency with what it depends on, in turn, then the image itself on top. An image
//! is rendered from what its dependencies were rendered from when they were imported, and those are named by the hash of
//! what they hold: a cycle cannot be made. A whitelist holds for the image that has it and for all below it.

use std::path::Path;

use super::Store;
use super::meta::{ImageKind, Meta, OnDisk, read_bounded};
use crate::error::{Error, Kind, Result};
use crate::id::ImageId;
use crate::image::appc::{Dependency, Manifest};
use crate::image::{MAX_MANIFEST_BYTES, Strictness};
use crate::index::{Builder, Index, Whiteouts};
use crate::paths::image;

/// Most images that one is made of: overlayfs takes 500 layers.
const MAX_IMAGES: usize = 500;

impl Store {
    /// Note in `meta` what lies below an image, and make its index from `own`, which is of its own tree; in `dir` lies what of it is
    /// too much for memory.
    pub(super) fn render(&self, meta: &mut Meta, manifest: &Manifest, own: &Index, dir: &Path) -> Result<Builder> {
        let mut index = Builder::in_dir(dir);
        for dependency in &manifest.dependencies {
            let below = self.find_dependency(dependency)?;
            for (at, id) in below.dependencies.iter().chain([&below.id]).enumerate() {
                meta.dependencies.push(id.clone());
                let mut filters = below.filters.get(at).cloned().unwrap_or_else(|| vec![below.id.clone()]);
                filters.push(meta.id.clone());
                meta.filters.push(filters);
            }
            meta.is_filtered |= below.is_filtered;
            if below.on_disk == OnDisk::IndexOnly {
                meta.on_disk = OnDisk::IndexOnly;
            }
        }
        meta.filters.push(vec![meta.id.clone()]);
        if meta.dependencies.len() >= MAX_IMAGES {
            let why = format!("it is made of more than {MAX_IMAGES} images");
            return Err(Error::new(Kind::Limit, "render", &manifest.name, why));
        }
        for (id, filters) in meta.dependencies.iter().zip(&meta.filters) {
            let mut lists = Vec::new();
            let mut bytes = 0;
            for by in filters {
                let list = if *by == meta.id { Whitelist::of(manifest) } else { self.whitelist_of(by)? };
                bytes += list.as_ref().map_or(0, Whitelist::bytes);
                lists.extend(list);
                if bytes > MAX_LISTED_BYTES {
                    let why =
                        format!("the pathWhitelists of what it is made of have more than {MAX_LISTED_BYTES} bytes");
                    return Err(Error::new(Kind::Limit, "render", &manifest.name, why));
                }
            }
            let dir = self.paths.image(id);
            let alone = dir.join(image::OWN_INDEX);
            let lower = Index::open(&if alone.exists() { alone } else { dir.join(image::INDEX) })?;
            index.begin_layer(Whiteouts::Plain)?;
            index.add_index(&lower, |path, _| keeps(&lists, path))?;
        }
        index.begin_layer(Whiteouts::Plain)?;
        let lists: Vec<Whitelist> = Whitelist::of(manifest).into_iter().collect();
        index.add_index(own, |path, _| keeps(&lists, path))?;
        meta.is_filtered = meta.is_filtered || !manifest.path_whitelist.is_empty();
        Ok(index)
    }

    fn whitelist_of(&self, id: &ImageId) -> Result<Option<Whitelist>> {
        let bytes = read_bounded(&self.paths.image(id).join(image::MANIFEST), MAX_MANIFEST_BYTES as u64)?;
        Ok(Whitelist::of(&Manifest::parse(&bytes, Strictness::Lenient)?.manifest))
    }

    /// The image that a dependency means: by id; else by name with all labels asked for, `latest` before others, then the one
    /// imported last (rkt's rule).
    pub(crate) fn find_dependency(&self, wanted: &Dependency) -> Result<Meta> {
        let has_labels = |meta: &Meta| wanted.labels.iter().all(|l| meta.label(&l.name) == Some(&*l.value));
        let fits = |meta: &Meta| {
            meta.kind == ImageKind::Appc
                && meta.names.contains(&wanted.image_name)
                && wanted.image_id.as_ref().is_none_or(|id| meta.id.as_str().starts_with(id.as_str()))
                && has_labels(meta)
        };
        let best = self
            .list()?
            .into_iter()
            .filter(fits)
            .max_by_key(|meta| (meta.label("version") == Some("latest"), meta.imported_at, meta.id.clone()));
        best.ok_or_else(|| {
            let id = wanted.image_id.as_ref().map_or(String::new(), |id| format!(" with id {id}"));
            let labels: Vec<String> = wanted.labels.iter().map(|l| format!("{}={}", l.name, l.value)).collect();
            let with = if labels.is_empty() { String::new() } else { format!(" and labels {}", labels.join(", ")) };
            Error::new(Kind::NotFound, "find dependency", &wanted.image_name, format!("the store has none{id}{with}"))
                .hint("import it first; `fsprov image fetch` gets an image with all it depends on")
        })
    }
}

/// Most bytes of the whitelists that hold for one image: each is looked into for every path of it.
const MAX_LISTED_BYTES: usize = 8 << 20;

/// The listed paths of a manifest, sorted; none: everything is kept.
struct Whitelist(Vec<Box<[u8]>>);

/// The order of paths by their components: what lies below a path follows it at once, since no name holds a NUL.
fn by_component(path: &[u8]) -> impl Iterator<Item = u8> + '_ {
    path.iter().map(|byte| if *byte == b'/' { 0 } else { *byte })
}

impl Whitelist {
    fn of(manifest: &Manifest) -> Option<Self> {
        let plain = |path: &String| {
            let parts: Vec<&[u8]> = path.as_bytes().split(|b| *b == b'/').filter(|part| !part.is_empty()).collect();
            parts.join(&b'/').into_boxed_slice()
        };
        let mut paths: Vec<Box<[u8]>> = manifest.path_whitelist.iter().map(plain).collect();
        paths.sort_unstable_by(|a, b| by_component(a).cmp(by_component(b)));
        (!paths.is_empty()).then_some(Whitelist(paths))
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(|path| path.len()).sum()
    }

    /// Is it listed, or on the way to what is?
    fn keeps(&self, path: &[u8]) -> bool {
        let at = self.0.partition_point(|listed| by_component(listed).lt(by_component(path)));
        let next = self.0.get(at).and_then(|listed| listed.strip_prefix(path));
        path.is_empty() || next.is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }
}

fn keeps(lists: &[Whitelist], path: &[u8]) -> bool {
    lists.iter().all(|list| list.keeps(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whitelist_keeps_what_it_names_and_what_leads_there() {
        let mut manifest = Manifest::named("a").unwrap();
        assert!(Whitelist::of(&manifest).is_none());
        manifest.path_whitelist = vec!["/etc//ssl/certs/".into(), "/bin".into(), "/etc-x/y".into(), "/etc.d".into()];
        let lists = [Whitelist::of(&manifest).unwrap()];
        for (path, want) in [
            (&b""[..], true),
            (b"etc", true),
            (b"etc/ssl", true),
            (b"etc/ssl/certs", true),
            (b"etc/ssl/certs/x", false),
            (b"etc/ss", false),
            (b"etc/passwd", false),
            (b"etc-x", true),
            (b"etc-", false),
            (b"etc.d", true),
            (b"bin", true),
            (b"bi", false),
            (b"z", false),
        ] {
            assert_eq!(keeps(&lists, path), want, "{}", String::from_utf8_lossy(path));
        }
    }

    /// It took 400 MB, of 277 bytes: each path was held with each of those that lead to it.
    #[test]
    fn a_whitelist_takes_no_more_memory_than_its_text() {
        let mut manifest = Manifest::named("a").unwrap();
        manifest.path_whitelist = vec!["/a".repeat(2000); 100];
        assert_eq!(Whitelist::of(&manifest).unwrap().bytes(), 100 * 3999);
    }
}
