//! An AppC image store of Apache Mesos (`<dir>/images/sha512-.../{manifest,rootfs}`), used where it is and never written to.
//!
//! Its ids are what Mesos called the images: nothing is hashed again. What Mesos let pass in a manifest, we let pass.

use std::path::{Path, PathBuf};

use super::choose::{choose, fitting};
use super::meta::{ImageKind, Meta, read_bounded};
use crate::error::{Error, Kind, Result, show};
use crate::id::{ImageId, ImageRef};
use crate::image::appc::Manifest;
use crate::image::{MAX_MANIFEST_BYTES, Strictness};
use crate::paths::image;

/// The directory of the image that is meant, by the rules of our own store. The first of `stores` that has it counts.
pub(super) fn find(stores: &[PathBuf], image: &ImageRef) -> Result<Option<PathBuf>> {
    for store in stores {
        let missing = || Error::new(Kind::NotFound, "find image", image, "not there");
        let found = match image {
            ImageRef::Id(id) => one(store, id).map(|_| id.clone()),
            ImageRef::Name(name) => {
                let fits = fitting(list(store)?, name);
                if fits.is_empty() { None } else { Some(choose(image, fits, missing)?.id) }
            }
            ImageRef::Path(_) => None,
        };
        if let Some(id) = found {
            return Ok(Some(store.join("images").join(id.as_str())));
        }
    }
    Ok(None)
}

fn list(store: &Path) -> Result<Vec<Meta>> {
    let dir = store.join("images");
    let entries = std::fs::read_dir(&dir).map_err(|e| {
        Error::io("list", show(&dir), e)
            .hint("it is configured (mesos_stores): an image store of Apache Mesos has images/sha512-...")
    })?;
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| Error::io("list", show(&dir), e))?.file_name();
        // Mesos has staging directories and the like beside them.
        let Some(id) = name.to_str().and_then(|name| name.parse::<ImageId>().ok()) else { continue };
        found.extend(one(store, &id));
    }
    Ok(found)
}

fn one(store: &Path, id: &ImageId) -> Option<Meta> {
    let dir = store.join("images").join(id.as_str());
    layout(&dir)?;
    let manifest = dir.join(image::MANIFEST);
    let read = read_bounded(&manifest, MAX_MANIFEST_BYTES as u64);
    let manifest = match read.and_then(|bytes| Manifest::parse(&bytes, Strictness::Lenient)) {
        Ok(checked) => checked.manifest,
        Err(error) => {
            log::warn!("{}: {error}", show(&manifest));
            return None;
        }
    };
    let mut meta = Meta::new(id.clone(), ImageKind::Appc, show(&dir));
    meta.names.push(manifest.name.clone());
    meta.labels = manifest.labels.iter().map(|pair| (pair.name.clone(), pair.value.clone())).collect();
    // When Mesos put it there.
    let modified = std::fs::metadata(&dir).and_then(|meta| meta.modified()).ok();
    let since = modified.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    meta.imported_at = since.map_or(0, |since| since.as_secs() as i64);
    Some(meta)
}

/// `dir/rootfs` if `dir` is laid out as Mesos's store has an image, or an unpacked ACI is.
pub(super) fn layout(dir: &Path) -> Option<PathBuf> {
    let rootfs = dir.join(image::ROOTFS);
    let is = |path: &Path, what: fn(&std::fs::FileType) -> bool| {
        std::fs::symlink_metadata(path).is_ok_and(|meta| what(&meta.file_type()))
    };
    (is(&dir.join(image::MANIFEST), std::fs::FileType::is_file) && is(&rootfs, std::fs::FileType::is_dir))
        .then_some(rootfs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_by_name_label_and_id() {
        let dir = tempfile::tempdir().unwrap();
        let put = |digit: &str, text: &str| {
            let id = format!("sha512-{}", digit.repeat(64));
            let image = dir.path().join("images").join(&id);
            std::fs::create_dir_all(image.join("rootfs")).unwrap();
            std::fs::write(image.join("manifest"), text).unwrap();
            image
        };
        // As Mesos's own tests write it: no RFC 3339 time, no user, no exec.
        let text = |version: &str| {
            format!(
                r#"{{"acKind":"ImageManifest","acVersion":"0.6.1","name":"foo.com/bar","labels":[{{"name":"version","value":"{version}"}},
                {{"name":"arch","value":"amd64"}},{{"name":"os","value":"linux"}}],"annotations":[{{"name":"created","value":"1438983392"}}]}}"#
            )
        };
        let first = put("0a", &text("1.0.0"));
        let latest = put("0b", &text("latest"));
        put("0c", "{}");
        std::fs::create_dir(dir.path().join("images/staging")).unwrap();
        let stores = [dir.path().to_owned()];
        let look = |text: &str| find(&stores, &ImageRef::parse(text.as_ref()).unwrap()).unwrap();
        assert_eq!(look("foo.com/bar:1.0.0"), Some(first.clone()));
        assert_eq!(look("foo.com/bar:1.0.0,os=linux"), Some(first.clone()));
        assert_eq!(look("foo.com/bar"), Some(latest));
        assert_eq!(look("sha512-0a0a"), Some(first.clone()));
        assert_eq!(look(&format!("sha512-{}", "0a".repeat(64))), Some(first));
        assert_eq!(look("foo.com/bar:2"), None);
        assert_eq!(look("foo.com/ba"), None);
        let gone = find(&[dir.path().join("none")], &ImageRef::Name("a".into())).unwrap_err();
        assert_eq!(gone.kind(), Kind::NotFound);
    }
}
