//! All snapshots, by what they are asked for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::id::ImageId;
use crate::snapshotter::record::{Kind, Record};

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) by_name: BTreeMap<String, Arc<Record>>,
    /// How many stand on each.
    pub(super) children: HashMap<String, usize>,
    /// Committed ones by their chain id.
    pub(super) chains: HashMap<String, BTreeSet<String>>,
    /// How many are made of each layer of the store.
    pub(super) layers: HashMap<ImageId, usize>,
}

impl Table {
    pub(super) fn insert(&mut self, record: Record) {
        if !record.parent.is_empty() {
            *self.children.entry(record.parent.clone()).or_default() += 1;
        }
        if let Some(layer) = &record.layer {
            *self.layers.entry(layer.clone()).or_default() += 1;
        }
        if let Some(chain) = record.chain.as_ref().filter(|_| record.kind == Kind::Committed) {
            self.chains.entry(chain.clone()).or_default().insert(record.name.clone());
        }
        self.by_name.insert(record.name.clone(), Arc::new(record));
    }

    pub(super) fn remove(&mut self, name: &str) {
        let Some(record) = self.by_name.remove(name) else { return };
        one_less(&mut self.children, &record.parent);
        if let Some(layer) = &record.layer {
            one_less(&mut self.layers, layer);
        }
        if let Some(chain) = &record.chain
            && let Some(names) = self.chains.get_mut(chain)
        {
            names.remove(name);
            if names.is_empty() {
                self.chains.remove(chain);
            }
        }
    }
}

fn one_less<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
