//! What this machine and this user may do, found by trying, once. No policy: who may use a finding decides what it means.

use serde::Serialize;

/// One finding: possible, or not with the reason and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finding {
    /// It was tried and works.
    Yes,
    /// It was tried and does not.
    No {
        /// What was tried and what came back.
        reason: String,
        /// What would change it; empty where nothing would.
        remedy: String,
    },
}

/// What this machine and this user may do.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Effective user id, as this namespace shows it.
    pub euid: u32,
}

impl Host {
    /// Look.
    pub fn probe() -> Self {
        Host { euid: rustix::process::geteuid().as_raw() }
    }
}
