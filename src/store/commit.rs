//! An image of one more layer: what a rootfs changed, upon the image that it was made of.
//!
//! An OCI layout is written to the staging directory, with the new layer in it, and imported: what a container wrote goes through the same walls,
//! limits and checks as an archive from outside, except for the one on holes. The layers that the store has are not in that layout, and are not unpacked
//! again.

use std::io::Write as _;
use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::Store;
use super::archive::digest::Hashed;
use super::import::{ImageSource, ImportOptions, Imported, Layout};
use super::meta::{ImageKind, Meta, read_bounded};
use super::names::{Held, check_name};
use super::staging::{self, Staging, create_new, write_new};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::{ImageId, ImageRef};
use crate::image::MAX_MANIFEST_BYTES;
use crate::image::execution::Execution;
use crate::image::oci::{Descriptor, Digest, Document, Index, Manifest, Platform, media_type, parse_document};
use crate::image::{Strictness, appc};
use crate::paths::image;

/// What is said of a layer that is added.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// The image's name.
    pub(crate) name: String,
    /// What becomes of an image that has it.
    pub(crate) held: Held,
    /// Whose changes they are.
    pub(crate) author: Option<String>,
    /// About them.
    pub(crate) message: Option<String>,
    /// What made them.
    pub(crate) created_by: String,
    /// When, RFC 3339.
    pub(crate) created: String,
}

/// Writes the archive of a layer.
pub(crate) type WriteLayer<'a> = &'a dyn Fn(&mut dyn std::io::Write) -> Result<()>;

impl Store {
    /// Make an image of the one with this id and a layer that `layer` writes upon it.
    pub(crate) fn commit(&self, base: &ImageId, layer: WriteLayer<'_>, said: &Said) -> Result<Imported> {
        check_name(&said.name)?;
        staging::clean(&self.paths)?;
        let (meta, tree, _in_use) = self.tree(&ImageRef::Id(base.clone()))?;
        let staging = Staging::make(&self.paths, "commit")?;
        let dir = staging.path().join("layout");
        let blobs = Blobs::make(&dir)?;
        fault::point("store.commit")?;
        let (mut config, mut layers) = match meta.kind {
            ImageKind::Oci => self.oci_base(&meta)?,
            ImageKind::Appc => {
                let own = blobs.layer(&|out| tree.write_tar(out))?;
                (self.appc_base(&meta, &own)?, vec![own])
            }
        };
        let new = blobs.layer(layer)?;
        add(&mut config, layers.len(), &new, said)?;
        layers.push(new);
        let config = blobs.document(media_type::CONFIG, &config)?;
        let manifest = Manifest { schema_version: 2, media_type: Some(media_type::MANIFEST.into()), config, layers };
        let manifest = blobs.document(media_type::MANIFEST, &manifest)?;
        let index = Index { schema_version: 2, media_type: Some(media_type::INDEX.into()), manifests: vec![manifest] };
        write_new(&dir.join("index.json"), &text(&index)?)?;
        write_new(&dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let name = said.name.clone();
        let source = ImageSource::Downloaded { path: dir.clone(), from: said.created_by.clone() };
        let layout = Layout::at(&dir, &source.to_string())?
            .ok_or_else(|| Error::new(Kind::Io, "commit", show(&dir), "the layout that was just written is gone"))?;
        let mut options =
            ImportOptions { name: Some(name), held: said.held, ..self.import_options(Strictness::Lenient) };
        // It is against small archives that grow. This one is not compressed, and its holes are those of files that lie here: /var/log/lastlog of a
        // host with large user ids has gigabytes of them.
        options.limits.ratio_floor = u64::MAX;
        let made = self.import_layout(&layout, &source, &options).map_err(|e| match e.kind() {
            Kind::Exists if e.subject() == said.name => e.hint("choose another name, or take this one with --replace"),
            _ => e,
        });
        made.map_err(|e| e.within("commit", &said.name))
    }

    fn read(&self, meta: &Meta, name: &str) -> Result<Vec<u8>> {
        read_bounded(&self.paths.image(&meta.id).join(name), MAX_MANIFEST_BYTES as u64)
    }

    /// The configuration and the layers of an OCI image.
    fn oci_base(&self, meta: &Meta) -> Result<(Map<String, Value>, Vec<Descriptor>)> {
        let config = crate::image::parse_json("OCI config", &self.read(meta, image::CONFIG)?)?;
        match parse_document(&self.read(meta, image::MANIFEST)?, None)? {
            Document::Manifest(manifest) => Ok((config, manifest.layers)),
            Document::Index(_) => Err(Error::new(Kind::Integrity, "read", &meta.id, "its manifest is an index")),
        }
    }

    /// An OCI configuration that says what an AppC image does, of which `layer` has the tree.
    fn appc_base(&self, meta: &Meta, layer: &Descriptor) -> Result<Map<String, Value>> {
        let manifest = appc::Manifest::parse(&self.read(meta, image::MANIFEST)?, Strictness::Lenient)?.manifest;
        let Platform { architecture, os, variant } =
            meta.label("arch").map_or_else(Platform::host, Platform::from_appc_arch);
        let Execution { entrypoint, environment, working_directory, user, stop_signal, volumes, .. } =
            Execution::of_appc(&manifest);
        let volumes: Map<String, Value> = volumes.into_iter().map(|volume| (volume, json!({}))).collect();
        let config = json!({
            "architecture": architecture, "os": os, "variant": variant,
            "config": {
                "Entrypoint": entrypoint, "Env": environment, "WorkingDir": working_directory, "User": user,
                "StopSignal": stop_signal, "Volumes": volumes,
            },
            "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
            "history": [{ "created_by": format!("fsprov image import {}", manifest.name) }],
        });
        match without_nothing(config) {
            Value::Object(config) => Ok(config),
            _ => Ok(Map::new()),
        }
    }
}

/// Without members that say nothing.
fn without_nothing(value: Value) -> Value {
    let Value::Object(map) = value else { return value };
    let kept = map.into_iter().map(|(name, value)| (name, without_nothing(value)));
    let says = |value: &Value| ![Value::Null, json!(""), json!([]), json!({})].contains(value);
    Value::Object(kept.filter(|(_, value)| says(value)).collect())
}

/// Say in a configuration of `layers` layers that there is one more.
fn add(config: &mut Map<String, Value>, layers: usize, layer: &Descriptor, said: &Said) -> Result<()> {
    let refuse = |why: &str| Error::new(Kind::Invalid, "read", "OCI config", why);
    let diff_ids = config.get_mut("rootfs").and_then(|rootfs| rootfs.get_mut("diff_ids")).and_then(Value::as_array_mut);
    diff_ids.ok_or_else(|| refuse("it has no rootfs.diff_ids"))?.push(json!(layer.digest));
    config.insert("created".into(), json!(said.created));
    if let Some(author) = &said.author {
        config.insert("author".into(), json!(author));
    }
    let history = config.entry("history").or_insert_with(|| json!([]));
    if history.is_null() {
        *history = json!([]);
    }
    let history = history.as_array_mut().ok_or_else(|| refuse("its history is not a list"))?;
    // One for each layer: readers refuse a history that has fewer.
    let is_layer = |entry: &&Value| entry.get("empty_layer").and_then(Value::as_bool) != Some(true);
    for _ in history.iter().filter(is_layer).count()..layers {
        history.push(json!({ "comment": "not told" }));
    }
    let new = json!({
        "created": said.created, "created_by": said.created_by, "author": said.author, "comment": said.message,
    });
    history.push(without_nothing(new));
    Ok(())
}

fn text(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::new(Kind::Io, "write", "JSON", e))
}

/// The blobs of a layout that is being made.
struct Blobs(std::path::PathBuf);

impl Blobs {
    fn make(layout: &Path) -> Result<Self> {
        let dir = layout.join("blobs/sha256");
        std::fs::create_dir_all(&dir).map_err(|e| Error::io("make", show(&dir), e))?;
        Ok(Blobs(dir))
    }

    fn document(&self, media: &str, value: &impl serde::Serialize) -> Result<Descriptor> {
        let bytes = text(value)?;
        let digest = Digest::from_sha256(&Sha256::digest(&bytes).into());
        write_new(&self.0.join(digest.hex()), &bytes)?;
        Ok(Descriptor::new(media, digest, bytes.len() as u64))
    }

    /// A layer, uncompressed: its digest is its diff id.
    fn layer(&self, write: WriteLayer<'_>) -> Result<Descriptor> {
        let made = self.0.join(".layer");
        let mut out = Hashed::new(std::io::BufWriter::new(create_new(&made)?));
        write(&mut out)?;
        out.flush().map_err(|e| Error::io("write", show(&made), e))?;
        let digest = Digest::from_sha256(&out.sha256());
        let to = self.0.join(digest.hex());
        std::fs::rename(&made, &to).map_err(|e| Error::io("write", show(&to), e))?;
        Ok(Descriptor::new(media_type::LAYER, digest, out.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> Descriptor {
        Descriptor::new(media_type::LAYER, Digest::from_sha256(&[7; 32]), 1)
    }

    fn said() -> Said {
        Said {
            name: "a".into(),
            created_by: "fsprov commit web".into(),
            created: "2026-01-02T03:04:05Z".into(),
            message: Some("a note".into()),
            ..Said::default()
        }
    }

    #[test]
    fn what_a_configuration_says_stays_and_its_history_goes_on() {
        let told = |history: Value| {
            let config = json!({
                "architecture": "amd64", "os": "linux", "config": { "Cmd": ["sh"] }, "moby.x": 1,
                "rootfs": { "type": "layers", "diff_ids": ["sha256:1", "sha256:2"] }, "history": history,
            });
            let Value::Object(mut config) = config else { unreachable!() };
            add(&mut config, 2, &layer(), &said()).unwrap();
            config
        };
        let new = json!({ "created": "2026-01-02T03:04:05Z", "created_by": "fsprov commit web", "comment": "a note" });
        let blank = json!({ "comment": "not told" });
        for (history, want) in [
            (
                json!([{"created_by": "1"}, {"empty_layer": true}, {}]),
                json!([{"created_by": "1"}, {"empty_layer": true}, {}, new]),
            ),
            (json!([{"empty_layer": true}, {}]), json!([{"empty_layer": true}, {}, blank, new])),
            (json!([]), json!([blank, blank, new])),
            (Value::Null, json!([blank, blank, new])),
        ] {
            let config = told(history);
            assert_eq!(config["history"], want);
            assert_eq!(config["rootfs"]["diff_ids"][2], json!(layer().digest));
            assert_eq!(
                (&config["config"]["Cmd"], &config["moby.x"], &config["created"]),
                (&json!(["sh"]), &json!(1), &new["created"])
            );
        }
        let mut none = Map::new();
        assert!(add(&mut none, 0, &layer(), &said()).is_err());
    }
}
