//! What there is to be seen from this process at one moment, for questions about many records.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::path::PathBuf;

use super::Record;
use crate::daemon;
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
    /// Mount namespaces that were looked for, and by what each is kept.
    others: RefCell<HashMap<Namespace, Option<NamespaceKeeper>>>,
}

/// By what a mount namespace is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamespaceKeeper {
    /// This process is in it.
    Process(i32),
    /// This file stands for it (a bind mount of /proc/PID/ns/mnt): setns(2) leads into it.
    File(PathBuf),
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

    /// Made in another mount namespace than ours, which somebody may still enter or is in: who.
    ///
    /// A namespace ends with its last process, and every mount in it with the namespace (mount_namespaces(7)). Servers of ours keep
    /// one and are nobody: with them alone in it no rootfs there can be reached any more.
    pub fn elsewhere(&self, record: &Record) -> Result<Option<NamespaceKeeper>> {
        if !self.is_of_this_boot(record) || record.mount_namespace == self.mount_namespace {
            return Ok(None);
        }
        if let Some(found) = self.others.borrow().get(&record.mount_namespace) {
            return Ok(found.clone());
        }
        let mut found = process::in_mount_namespace(record.mount_namespace, |pid| !daemon::is_server(pid))?
            .map(NamespaceKeeper::Process);
        if found.is_none() {
            found = self
                .mounts()?
                .file_of_namespace(record.mount_namespace.1)
                .map(|file| NamespaceKeeper::File(file.to_owned()));
        }
        self.others.borrow_mut().insert(record.mount_namespace, found.clone());
        Ok(found)
    }
}
