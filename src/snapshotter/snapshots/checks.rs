//! What containerd may call a snapshot, and write on it.

use std::collections::BTreeMap;

use crate::error::{Error, Kind as ErrorKind, Result};

/// Longest key or name. containerd's own are some hundred bytes.
const MAX_KEY_BYTES: usize = 4096;
/// Most labels of a snapshot, and their longest name and value together: containerd's own limit is 4,096 bytes each.
const MAX_LABELS: usize = 256;
const MAX_LABEL_BYTES: usize = 8192;
/// All labels of a snapshot together.
const MAX_LABELS_BYTES: usize = 128 << 10;

pub(super) fn check_key(what: &'static str, key: &str) -> Result<()> {
    let refuse = |why: String| {
        let shown: String = key.chars().take(100).collect();
        Err(Error::new(ErrorKind::Invalid, format!("use {what}"), format!("{shown:?}"), why))
    };
    if key.is_empty() {
        return refuse("it is empty".into());
    }
    if key.len() > MAX_KEY_BYTES {
        return refuse(format!("it is longer than {MAX_KEY_BYTES} bytes"));
    }
    if key.chars().any(char::is_control) {
        return refuse("it has control characters".into());
    }
    Ok(())
}

/// Labels that may be kept. As in containerd, one with an empty value is dropped.
pub(super) fn check_labels(mut labels: BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    labels.retain(|_, value| !value.is_empty());
    let size = |(name, value): (&String, &String)| name.len() + value.len();
    let why = if labels.len() > MAX_LABELS {
        format!("more than {MAX_LABELS}")
    } else if labels.iter().any(|label| size(label) > MAX_LABEL_BYTES) {
        format!("one of them is longer than {MAX_LABEL_BYTES} bytes")
    } else if labels.iter().map(size).sum::<usize>() > MAX_LABELS_BYTES {
        format!("together longer than {MAX_LABELS_BYTES} bytes")
    } else if labels.keys().any(String::is_empty) {
        "one has no name".into()
    } else {
        return Ok(labels);
    };
    Err(Error::new(ErrorKind::Invalid, "use labels", "", why))
}
