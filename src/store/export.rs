//! Images out of the store again: as an ACI, as a tar of the tree, as an OCI layout; and many layers made one.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use sha2::{Digest as _, Sha256};

use super::Store;
use super::archive::digest::Hashed;
use super::archive::input::Progress;
use super::import::{ImageSource, ImportOptions, Imported};
use super::meta::{ImageKind, Meta, read_bounded};
use super::names::Held;
use super::tree::Tree;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ImageRef;
use crate::image::appc::{self, Pair};
use crate::image::oci::{Config, Descriptor, Digest, Index, Manifest, Platform, REF_NAME, RootFs, media_type};
use crate::image::{MAX_MANIFEST_BYTES, Strictness};
use crate::paths::image;

impl Store {
    /// Write an image as an ACI: its manifest, or one made for it if it is an OCI image, and its tree in one layer, with true
    /// owners, modes and devices no matter who imported it. What `out` takes is neither compressed nor brought to the disk.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// let image = fsprov::id::ImageRef::parse("example.com/debian".as_ref())?;
    /// // Whole or not there at all:
    /// store.export_aci(&image, &mut std::fs::File::create("debian.aci")?)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn export_aci(&self, image: &ImageRef, out: &mut dyn Write) -> Result<()> {
        let (meta, tree, _in_use) = self.tree(image)?;
        tree.write_aci(&self.appc_manifest(&meta, None)?, out)
    }

    /// Write an image's tree as a tar archive.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// let image = fsprov::id::ImageRef::parse("example.com/debian".as_ref())?;
    /// store.export_tar(&image, &mut std::io::stdout().lock())?;
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn export_tar(&self, image: &ImageRef, out: &mut dyn Write) -> Result<()> {
        let (_, tree, _in_use) = self.tree(image)?;
        tree.write_tar(out)
    }

    /// Write an image as an OCI layout of one layer to `dir`, which must not exist: it appears when it is complete.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// let image = fsprov::id::ImageRef::parse("example.com/debian".as_ref())?;
    /// store.export_oci(&image, "debian-layout".as_ref())?;
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn export_oci(&self, image: &ImageRef, dir: &Path) -> Result<()> {
        self.export_oci_told(image, dir, &|_| Ok(()))
    }

    /// The same, and `told` is told how many bytes are written; its error stops the export, and nothing of that is left.
    pub fn export_oci_told(&self, image: &ImageRef, dir: &Path, told: &dyn Fn(Progress) -> Result<()>) -> Result<()> {
        let fail = |e: std::io::Error| Error::io("write OCI layout", show(dir), e);
        let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let beside = tempfile::Builder::new().prefix(".new-").tempdir_in(parent).map_err(fail)?;
        let made = beside.path().join("layout");
        self.write_layout(image, &made, told)?;
        fault::point("store.export_rename")?;
        renameat_with(CWD, &made, CWD, dir, RenameFlags::NOREPLACE)
            .map_err(|e| Error::sys("write OCI layout", show(dir), e))
    }

    fn write_layout(&self, image: &ImageRef, dir: &Path, told: &dyn Fn(Progress) -> Result<()>) -> Result<()> {
        let (meta, tree, _in_use) = self.tree(image)?;
        let fail = |e: std::io::Error| Error::io("write OCI layout", show(dir), e);
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir(dir).and_then(|()| std::fs::create_dir_all(&blobs)).map_err(fail)?;
        let new_layer = blobs.join(".layer");
        let mut layer = Counting {
            out: Hashed::new(std::io::BufWriter::new(std::fs::File::create(&new_layer).map_err(fail)?)),
            told,
            total: meta.bytes,
        };
        tree.write_tar(&mut layer)?;
        layer.flush().map_err(fail)?;
        let layer_digest = Digest::from_sha256(&layer.out.sha256());
        std::fs::rename(&new_layer, blobs.join(layer_digest.hex())).map_err(fail)?;
        let blob = |media: &str, bytes: &[u8]| {
            fault::point("store.export_blob")?;
            let digest = Digest::from_sha256(&Sha256::digest(bytes).into());
            std::fs::write(blobs.join(digest.hex()), bytes).map_err(fail)?;
            Ok::<_, Error>(Descriptor::new(media, digest, bytes.len() as u64))
        };
        let config = blob(media_type::CONFIG, &self.oci_config(&meta, &layer_digest)?)?;
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type::MANIFEST.into()),
            config,
            layers: vec![Descriptor::new(media_type::LAYER, layer_digest, layer.out.bytes)],
        };
        let mut manifest = blob(media_type::MANIFEST, &json(&manifest)?)?;
        manifest.annotations = meta.names.first().map(|name| [(REF_NAME.to_owned(), name.clone())].into());
        let index = Index { schema_version: 2, media_type: Some(media_type::INDEX.into()), manifests: vec![manifest] };
        std::fs::write(dir.join("index.json"), json(&index)?).map_err(fail)?;
        std::fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(fail)
    }

    /// Make a new image of one layer with the tree of another: the bind backend takes it. `name` is an AC identifier; `held` says what
    /// becomes of it if another image has that name.
    ///
    /// ```no_run
    /// # let store = fsprov::store::Store::open(&fsprov::StatePaths::new("/var/lib/fsprov".into()))?;
    /// let many = fsprov::id::ImageRef::parse("registry.example/app:1".as_ref())?;
    /// let flat = store.flatten(&many, "registry.example/app-flat", fsprov::store::Held::Refuse)?;
    /// println!("{} is one layer", flat.id);
    /// # Ok::<(), fsprov::Error>(())
    /// ```
    pub fn flatten(&self, image: &ImageRef, name: &str, held: Held) -> Result<Imported> {
        let (meta, tree, in_use) = self.tree(image)?;
        let manifest = self.appc_manifest(&meta, Some(name))?;
        let source = ImageSource::Flattened(meta.id.clone());
        let options = ImportOptions { held, ..self.import_options(Strictness::Lenient) };
        let done = self.import_stream(move |sink| tree.write_aci(&manifest, sink), &source, &options, None);
        drop(in_use);
        done.map_err(|e| e.within("flatten", image))
    }

    /// The tree of an image, which stays in the store as long as the descriptor is open. Not by the store's lock: who removes
    /// another image need not wait for a slow reader of this one.
    pub(super) fn tree(&self, image: &ImageRef) -> Result<(Meta, Tree, OwnedFd)> {
        let _found = self.lock_shared()?;
        let meta = self.find(image)?;
        let in_use = crate::sys::fs::hold_directory(&self.paths.image(&meta.id))?;
        let found = self.resolved(meta.clone());
        let index = found.index.ok_or_else(|| Error::new(Kind::Integrity, "read image", image, "it has no index"))?;
        Ok((meta, Tree::open(&index, &found.layers)?, in_use))
    }

    /// The image's own manifest where it is AppC's and describes one layer, else one made of what we know.
    fn appc_manifest(&self, meta: &Meta, name: Option<&str>) -> Result<Vec<u8>> {
        let path = self.paths.image(&meta.id).join(image::MANIFEST);
        if meta.kind == ImageKind::Appc {
            let bytes = read_bounded(&path, MAX_MANIFEST_BYTES as u64)?;
            let mut manifest = appc::Manifest::parse(&bytes, crate::image::Strictness::Lenient)?.manifest;
            if name.is_none() && manifest.dependencies.is_empty() && !meta.is_filtered {
                return Ok(bytes);
            }
            // The tree holds what they give, and no more than they leave.
            manifest.dependencies.clear();
            manifest.path_whitelist.clear();
            if let Some(name) = name {
                manifest.name = appc::Manifest::named(name)?.name;
            }
            return json(&manifest);
        }
        let known = || meta.names.first().map_or("image".to_owned(), |name| ac_identifier(name));
        let mut manifest = appc::Manifest::named(&name.map_or_else(known, str::to_owned))?;
        let platform = Platform {
            architecture: meta.label("arch").unwrap_or_default().into(),
            os: meta.label("os").unwrap_or_default().into(),
            variant: meta.label("variant").map(Into::into),
        };
        let label = |(name, value): &(String, String)| match name.as_str() {
            // AppC's word for the architecture has it within.
            "variant" => None,
            "arch" => Some(Pair { name: name.clone(), value: platform.appc_arch().into() }),
            _ => Some(Pair { name: name.clone(), value: value.clone() }),
        };
        manifest.labels = meta.labels.iter().filter_map(label).collect();
        json(&manifest)
    }

    fn oci_config(&self, meta: &Meta, layer: &Digest) -> Result<Vec<u8>> {
        let rootfs = RootFs { kind: "layers".into(), diff_ids: vec![layer.clone()] };
        if meta.kind == ImageKind::Oci {
            // All that the config says stays, but for the layers.
            let bytes = read_bounded(&self.paths.image(&meta.id).join(image::CONFIG), MAX_MANIFEST_BYTES as u64)?;
            let mut config: serde_json::Map<String, serde_json::Value> =
                crate::image::parse_json("OCI config", &bytes)?;
            let rootfs = serde_json::to_value(&rootfs).map_err(|e| Error::new(Kind::Io, "write", "OCI config", e))?;
            config.insert("rootfs".into(), rootfs);
            config.remove("history");
            return json(&config);
        }
        let platform = meta.label("arch").map_or_else(Platform::host, Platform::from_appc_arch);
        json(&Config { platform, rootfs })
    }
}

/// An AC identifier as near to a name as they allow.
fn ac_identifier(name: &str) -> String {
    let mut text = String::new();
    for c in name.to_lowercase().chars() {
        match c {
            'a'..='z' | '0'..='9' => text.push(c),
            '-' | '.' | '_' | '~' | '/' if text.ends_with(|c: char| c.is_ascii_alphanumeric()) => text.push(c),
            _ if text.ends_with(|c: char| c.is_ascii_alphanumeric()) => text.push('-'),
            _ => {}
        }
    }
    let text = text.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    if text.is_empty() { "image".into() } else { text.into() }
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::new(Kind::Io, "write", "JSON", e))
}

/// Says how much has passed.
struct Counting<'a, W> {
    out: Hashed<W>,
    told: &'a dyn Fn(Progress) -> Result<()>,
    total: u64,
}

impl<W: Write> Write for Counting<'_, W> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let count = self.out.write(data)?;
        let read = self.out.bytes;
        (self.told)(Progress { read, total: Some(self.total.max(read)) }).map_err(std::io::Error::other)?;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_ac_identifiers() {
        for (name, want) in [
            ("debian:12", "debian-12"),
            ("docker.io/library/Debian:12", "docker.io/library/debian-12"),
            ("--x//y--", "x/y"),
            ("::", "image"),
        ] {
            assert_eq!(ac_identifier(name), want);
            assert!(appc::is_ac_identifier(&ac_identifier(name)), "{name}");
        }
    }
}
