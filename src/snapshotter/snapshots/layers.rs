//! Snapshots of the store's layers: claimed when containerd is about to download them, made by Apply, rebuilt after a state directory was lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::mounts::What;
use super::{Snapshots, inside, is_empty};
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::fault;
use crate::id::ImageId;
use crate::image::oci::Digest;
use crate::snapshotter::chain;
use crate::snapshotter::record::{Kind, Record};
use crate::store::{Blob, ClaimedLayer, Showing, Under};
use crate::sys::durable::{Survives, write_file};

impl Snapshots {
    /// Commit the layer that gives the chain id `target` upon `below`, if the store has it. Gives the name that it has: containerd looks for
    /// it by its label and its parent.
    pub(super) fn claim(
        &self,
        target: &str,
        below: Option<&Record>,
        labels: &BTreeMap<String, String>,
        next: &mut u64,
    ) -> Result<Option<String>> {
        let below_chain = match below {
            None => None,
            Some(Record { chain: Some(chain), .. }) => Some(chain.as_str()),
            // What it stands on is not known.
            Some(_) => return Ok(None),
        };
        let parent = below.map(|below| below.name.clone()).unwrap_or_default();
        let found = self.read(|table| {
            let names = table.chains.get(target)?;
            let records = names.iter().filter_map(|name| table.by_name.get(name));
            let is_it = |record: &&Arc<Record>| {
                record.parent == parent && record.labels.get(chain::REFERENCE).is_some_and(|have| have == target)
            };
            records.into_iter().find(is_it).map(|record| record.name.clone())
        });
        if found.is_some() {
            return Ok(found);
        }
        let Some(layer) = self.store.layer_of_chain(below_chain, target, self.showing)? else { return Ok(None) };
        self.commit_layer(&layer, target, &parent, labels.clone(), next)
    }

    /// Make a committed snapshot of a layer of the store. `None`: the layer is gone.
    pub(super) fn commit_layer(
        &self,
        layer: &ImageId,
        chain_id: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
        next: &mut u64,
    ) -> Result<Option<String>> {
        let claims = self.claims();
        let Some(claimed) = claims.claim(layer)? else { return Ok(None) };
        // Made of the chain id, so that a state directory that was lost can be rebuilt. It is taken where others stand on another parent.
        let mut name = chain::name(chain_id);
        if self.find(&name).is_ok() {
            name = format!("{name}/{next}");
        }
        let mut record = Record::new(*next, name.clone(), parent.to_owned(), Kind::Committed);
        record.labels = labels;
        record.has_files = false;
        record.chain = Some(chain_id.to_owned());
        let made = self.dress_in(&mut record, &claimed).and_then(|is_shown| {
            if is_shown {
                self.make(&record)?;
            }
            Ok(is_shown)
        });
        if !made.map_err(|e| e.with_undo(self.release_unused(layer)))? {
            return self.release_unused(layer).map(|()| None);
        }
        *next += 1;
        self.write(|table| table.insert(record));
        Ok(Some(name))
    }

    /// Make a layer that of a snapshot that has none yet. False: a mount cannot show it there.
    fn dress_in(&self, record: &mut Record, claimed: &ClaimedLayer) -> Result<bool> {
        let below: Vec<Under> = self
            .stack(record)?
            .into_iter()
            .map(|lower| match lower.what {
                What::Layer(layer) => Under::Layer(layer),
                What::Files(_) => Under::Files(lower.files),
            })
            .collect();
        record.by_index = claimed.by_index || self.store.covers(&claimed.diff_id, &below)?;
        record.layer = Some(claimed.diff_id.clone());
        record.usage = claimed.usage;
        Ok(!record.by_index || self.showing == Showing::Index)
    }

    pub(super) fn is_used(&self, layer: &ImageId) -> bool {
        self.read(|table| table.layers.contains_key(layer))
    }

    /// A committed snapshot; one of a layer of the store that containerd knows, and this state directory no longer, is rebuilt.
    pub(super) fn find_or_revive(&self, name: &str, next: &mut u64) -> Result<Arc<Record>> {
        let missing = match self.find(name) {
            Ok(record) => return Ok(record),
            Err(error) => error,
        };
        let Some(chain_id) = chain::of_name(name) else { return Err(missing) };
        let Some(layers) = self.store.layers_of_chain(chain_id)? else { return Err(missing) };
        let (mut parent, mut below) = (String::new(), None);
        for layer in &layers {
            let Some(made) = crate::store::chain_id(below.as_deref(), layer) else { return Err(missing) };
            let name = chain::name(&made);
            if self.find(&name).is_err() {
                let labels = BTreeMap::from([(chain::REFERENCE.to_owned(), made.clone())]);
                if self.commit_layer(layer, &made, &parent, labels, next)?.is_none() {
                    return Err(missing);
                }
                log::warn!("the snapshot {name:?} was missing; it is back, of the store's layer");
            }
            (parent, below) = (name, Some(made));
        }
        self.find(name)
    }

    /// The layer that is in this blob, if that is known.
    pub(in crate::snapshotter) fn layer_of_blob(&self, blob: &Digest) -> Result<Option<ImageId>> {
        let noted = std::fs::read_to_string(self.dirs.blobs().join(blob.hex())).ok();
        match noted.and_then(|text| text.parse().ok()) {
            Some(layer) => Ok(Some(layer)),
            None => self.store.layer_of_blob(blob),
        }
    }

    /// Make an active snapshot of this layer of the store. False: the store does not have it, or not so that a mount can show it.
    pub(in crate::snapshotter) fn put_layer(&self, key: &str, layer: &ImageId) -> Result<bool> {
        let _changing = self.change();
        self.put(key, layer)
    }

    /// Unpack a layer into the store and make an active snapshot of it. Gives its diff id.
    pub(in crate::snapshotter) fn import_layer(
        &self,
        key: &str,
        blob: &Blob,
        input: Box<dyn std::io::Read + Send>,
    ) -> Result<ImageId> {
        // Others need not wait for that.
        let layer = self.claims().import(blob, input)?;
        fault::point("snapshotter.apply")?;
        let _changing = self.change();
        if !self.put(key, &layer)? {
            let why = "only FUSE could show it here, and this host has none (`fsprov probe` says why)";
            return Err(Error::new(ErrorKind::Unsupported, "apply layer", &blob.digest, why));
        }
        // What is lost of it is found out again.
        let note = self.dirs.blobs().join(blob.digest.hex());
        if let Err(error) = write_file(&note, layer.as_str().as_bytes(), Survives::Crash) {
            log::warn!("{error}");
        }
        Ok(layer)
    }

    pub(super) fn release_unused(&self, layer: &ImageId) -> Result<()> {
        if !self.is_whole || self.is_used(layer) { Ok(()) } else { self.claims().release(layer) }
    }

    /// Under [`Snapshots::change`]. A claim from before is not relied on: another snapshot's removal may have taken it away.
    fn put(&self, key: &str, layer: &ImageId) -> Result<bool> {
        let Some(claimed) = self.claims().claim(layer)? else { return self.release_unused(layer).map(|()| false) };
        let put = self.put_claimed(key, &claimed).map_err(|e| e.with_undo(self.release_unused(layer)))?;
        if !put {
            self.release_unused(layer)?;
        }
        Ok(put)
    }

    fn put_claimed(&self, key: &str, claimed: &ClaimedLayer) -> Result<bool> {
        let mut record = (*self.find(key)?).clone();
        let refuse = |why: &'static str| Err(Error::new(ErrorKind::Busy, "apply layer to", format!("{key:?}"), why));
        if record.kind != Kind::Active {
            return refuse("it is not active");
        }
        if record.layer.is_some() {
            return refuse("another layer was applied to it");
        }
        if !is_empty(&self.files_of(&record))? {
            return refuse("it has files");
        }
        if !self.dress_in(&mut record, claimed)? {
            return Ok(false);
        }
        record.touch();
        record.write(&self.dirs.snapshot(record.number)).map_err(inside)?;
        self.write(|table| {
            table.remove(key);
            table.insert(record);
        });
        Ok(true)
    }
}
