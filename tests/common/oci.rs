//! OCI images made by hand: layers that are given, as a layout on the disk or as what a registry answers.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::server::{Answer, Asked};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", data_encoding::HEXLOWER.encode(&Sha256::digest(bytes)))
}

/// An image: its manifest, and every blob by digest.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) manifest: Vec<u8>,
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    /// Digests of the layers' blobs, bottom first.
    pub(crate) layers: Vec<String>,
}

impl Image {
    /// Of uncompressed tars; every second layer is compressed.
    pub(crate) fn of(tars: &[Vec<u8>], architecture: &str) -> Self {
        let mut blobs = BTreeMap::new();
        let (mut layers, mut descriptors) = (Vec::new(), Vec::new());
        for (at, tar) in tars.iter().enumerate() {
            let (media, bytes) = if at % 2 == 0 {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(tar).expect("gzip");
                (GZIP, gzip.finish().expect("gzip"))
            } else {
                (TAR, tar.clone())
            };
            let name = digest(&bytes);
            descriptors.push(json!({"mediaType": media, "digest": name, "size": bytes.len()}));
            layers.push(name.clone());
            blobs.insert(name, bytes);
        }
        let diff_ids: Vec<String> = tars.iter().map(|tar| digest(tar)).collect();
        let config = json!({"architecture": architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = config.to_string().into_bytes();
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": descriptors, "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()}});
        blobs.insert(digest(&config), config);
        Image { manifest: manifest.to_string().into_bytes(), blobs, layers }
    }

    /// A small one: one layer with one file.
    pub(crate) fn small(content: &str) -> Self {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, "content", content.as_bytes()).expect("tar");
        Image::of(&[tar.into_inner().expect("tar")], "amd64")
    }

    pub(crate) fn digest(&self) -> String {
        digest(&self.manifest)
    }

    pub(crate) fn descriptor(&self, architecture: &str) -> Value {
        json!({"mediaType": MANIFEST, "digest": self.digest(), "size": self.manifest.len(),
            "platform": {"os": "linux", "architecture": architecture}})
    }

    /// Write it as a layout with one tag.
    pub(crate) fn layout(&self, dir: &Path, tag: &str) {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).expect("make layout");
        let put =
            |name: &str, bytes: &[u8]| fs::write(blobs.join(name.trim_start_matches("sha256:")), bytes).expect("write");
        put(&self.digest(), &self.manifest);
        self.blobs.iter().for_each(|(name, bytes)| put(name, bytes));
        let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": MANIFEST, "digest": self.digest(),
            "size": self.manifest.len(), "annotations": {"org.opencontainers.image.ref.name": tag}}]});
        fs::write(dir.join("index.json"), index.to_string()).expect("write");
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write");
    }

    /// What an honest registry answers for this image under the tag `v1` of any repository.
    pub(crate) fn answer(&self, asked: &Asked) -> Answer {
        let last = asked.path.rsplit('/').next().unwrap_or_default();
        if asked.path.contains("/manifests/") && (last == "v1" || last == self.digest()) {
            return Answer::new(200, self.manifest.clone()).with("Content-Type", MANIFEST);
        }
        match self.blobs.get(last).filter(|_| asked.path.contains("/blobs/")) {
            Some(blob) => ranged(blob, asked),
            None => Answer::new(404, r#"{"errors":[{"code":"X","message":"not known here"}]}"#),
        }
    }
}

/// A blob, or what a Range header asks for of it.
pub(crate) fn ranged(blob: &[u8], asked: &Asked) -> Answer {
    let from = asked.header("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match from {
        None => Answer::new(200, blob),
        Some(from) if from >= blob.len() => Answer::new(416, ""),
        Some(from) => Answer::new(206, &blob[from..])
            .with("Content-Range", format!("bytes {from}-{}/{}", blob.len() - 1, blob.len())),
    }
}
