//! What there is to be seen from this process at one moment, for questions about many records.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;

use super::Record;
use crate::error::Result;
use crate::sys::mountinfo::Table;
use crate::sys::process::{self, Namespace};
use crate::traces::Traces;

/// This boot, this mount namespace, its mounts. Each is read once.
#[derive(Debug)]
pub struct Now {
    boot_id: String,
    mount_namespace: Namespace,
    mounts: OnceCell<Table>,
    /// Mount namespaces that were looked for, and a process in each that was found.
    others: RefCell<HashMap<Namespace, Option<i32>>>,
}

impl Now {
    /// Look, as far as every question needs it.
    pub fn look() -> Result<Self> {
        Ok(Now {
            boot_id: process::boot_id()?,
            mount_namespace: process::mount_namespace()?,
            mounts: OnceCell::new(),
            others: RefCell::default(),
        })
    }

    /// The mount table.
    pub fn mounts(&self) -> Result<&Table> {
        if let Some(table) = self.mounts.get() {
            return Ok(table);
        }
        let table = Table::read()?;
        Ok(self.mounts.get_or_init(|| table))
    }

    /// Was it made in this boot?
    pub fn is_of_this_boot(&self, record: &Record) -> bool {
        record.boot_id == self.boot_id
    }

    /// What it left in the system that can still be there: of another boot, files alone. Its mount ids and pids are others' by now.
    pub fn traces(&self, record: &Record) -> Traces {
        if self.is_of_this_boot(record) {
            return record.traces.clone();
        }
        // No mount below it is ours.
        Traces { copied: record.traces.copied.clone(), parts: Some(Vec::new()), ..Traces::default() }
    }

    /// Made in another mount namespace than ours that still lives: a process to point to, that is in it.
    ///
    /// A namespace ends with its last process, and every mount in it with the namespace (mount_namespaces(7)).
    pub fn elsewhere(&self, record: &Record) -> Result<Option<i32>> {
        if !self.is_of_this_boot(record) || record.mount_namespace == self.mount_namespace {
            return Ok(None);
        }
        let mut servers = [record.traces.supervisor, record.traces.worker].into_iter().flatten();
        if let Some(server) = servers.find(|server| server.is_alive()) {
            return Ok(Some(server.pid));
        }
        if let Some(found) = self.others.borrow().get(&record.mount_namespace) {
            return Ok(*found);
        }
        let found = process::in_mount_namespace(record.mount_namespace)?;
        self.others.borrow_mut().insert(record.mount_namespace, found);
        Ok(found)
    }
}
