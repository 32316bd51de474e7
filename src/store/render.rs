//! AppC's dependencies: which images of the store lie below one, in which order, and what its pathWhitelist leaves of them.
//!
//! The order is the specification's: each dependency with what it depends on, in turn, then the image itself on top. An image
//! is rendered from what its dependencies were rendered from when they were imported, and those are named by the hash of
//! what they hold: a cycle cannot be made. A whitelist holds for the image that has it and for all below it.

use std::collections::HashSet;

use super::meta::{ImageKind, Meta, read_bounded};
use super::{OnDisk, Store};
use crate::error::{Error, Kind, Result};
use crate::id::ImageId;
use crate::image::appc::{Dependency, Manifest};
use crate::image::{MAX_MANIFEST_BYTES, Strictness};
use crate::index::{Builder, Index, Whiteouts};
use crate::paths::image;

/// Most images that one is made of: overlayfs takes 500 layers.
const MAX_IMAGES: usize = 500;

impl Store {
    /// Note in `meta` what lies below an image, and make its index from `own`, which is of its own tree.
    pub(super) fn render(&self, meta: &mut Meta, manifest: &Manifest, own: &Index) -> Result<Vec<u8>> {
        let mut index = Builder::new();
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
            let lists = filters.iter().map(|by| match by {
                by if *by == meta.id => Ok(whitelist(manifest)),
                by => self.whitelist_of(by),
            });
            let lists = lists.collect::<Result<Vec<_>>>()?;
            let dir = self.paths.image(id);
            let alone = dir.join(image::OWN_INDEX);
            let lower = Index::open(&if alone.exists() { alone } else { dir.join(image::INDEX) })?;
            index.begin_layer(Whiteouts::Plain)?;
            index.add_index(&lower, |path| keeps(&lists, path))?;
        }
        index.begin_layer(Whiteouts::Plain)?;
        let lists = [whitelist(manifest)];
        index.add_index(own, |path| keeps(&lists, path))?;
        meta.is_filtered = meta.is_filtered || !manifest.path_whitelist.is_empty();
        index.finish()
    }

    fn whitelist_of(&self, id: &ImageId) -> Result<Option<HashSet<Vec<u8>>>> {
        let bytes = read_bounded(&self.paths.image(id).join(image::MANIFEST), MAX_MANIFEST_BYTES as u64)?;
        Ok(whitelist(&Manifest::parse(&bytes, Strictness::Lenient)?.manifest))
    }

    /// The image that a dependency means: by id; else by name with all labels asked for, `latest` before others, then the one
    /// imported last (rkt's rule).
    pub(crate) fn find_dependency(&self, wanted: &Dependency) -> Result<Meta> {
        let has_labels = |meta: &Meta| wanted.labels.iter().all(|l| meta.label(&l.name) == Some(&*l.value));
        let fits = |meta: &Meta| {
            meta.kind == ImageKind::Appc
                && meta.names.first() == Some(&wanted.image_name)
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

/// The listed paths and the directories that lead to them; None: everything.
fn whitelist(manifest: &Manifest) -> Option<HashSet<Vec<u8>>> {
    let mut kept: HashSet<Vec<u8>> = HashSet::new();
    for path in &manifest.path_whitelist {
        let mut at = Vec::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !at.is_empty() {
                at.push(b'/');
            }
            at.extend_from_slice(part.as_bytes());
            kept.insert(at.clone());
        }
    }
    (!manifest.path_whitelist.is_empty()).then_some(kept)
}

fn keeps(lists: &[Option<HashSet<Vec<u8>>>], path: &[u8]) -> bool {
    path.is_empty() || lists.iter().flatten().all(|list| list.contains(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whitelist_keeps_what_it_names_and_what_leads_there() {
        let mut manifest = Manifest::named("a").unwrap();
        assert!(keeps(&[whitelist(&manifest)], b"anything"));
        manifest.path_whitelist = vec!["/etc/ssl/certs".into(), "/bin".into()];
        let lists = [whitelist(&manifest), None];
        for (path, want) in [
            (&b""[..], true),
            (b"etc", true),
            (b"etc/ssl/certs", true),
            (b"etc/ssl/certs/x", false),
            (b"etc/passwd", false),
            (b"bin", true),
        ] {
            assert_eq!(keeps(&lists, path), want, "{}", String::from_utf8_lossy(path));
        }
    }
}
