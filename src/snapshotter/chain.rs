//! Chain ids (image-spec, config.md): what containerd calls a layer with all below it, and how our snapshots of the store's layers are named.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::paths::StatePaths;

/// The label of Prepare that names the chain id which is to be unpacked. Who sends it takes AlreadyExists for "it is committed"; who does not would
/// try again for ever.
pub(super) const REFERENCE: &str = "containerd.io/snapshot.ref";

/// How the names of snapshots begin that are layers of the store. containerd's own begin with a namespace and a number.
const PREFIX: &str = "fsprov/";

pub(super) fn is_chain_id(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// The name of the snapshot that is a layer of the store and what is below it.
pub(super) fn name(chain_id: &str) -> String {
    format!("{PREFIX}{chain_id}")
}

/// Did we give a snapshot this name, or one like it? containerd's begin with a namespace and a number.
pub(super) fn is_our_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|rest| rest.starts_with("sha256:"))
}

/// The chain id in such a name.
pub(super) fn of_name(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX).filter(|chain_id| is_chain_id(chain_id))
}

/// The chain id in the name that containerd gives what it unpacked: `NAMESPACE/NUMBER/CHAIN ID`. It has checked that.
pub(super) fn of_commit(name: &str) -> Option<String> {
    name.rsplit('/').next().filter(|last| is_chain_id(last)).map(str::to_owned)
}

/// Whose claims those of a state directory are, however its path was written.
pub(super) fn holder(state: &Path, paths: &StatePaths) -> String {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let state = real(state);
    if state == real(&paths.snapshotter()) {
        return "snapshotter".into();
    }
    let digest = Sha256::digest(state.as_os_str().as_encoded_bytes());
    format!("snapshotter-{}", data_encoding::HEXLOWER.encode(&digest[..8]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_chains() {
        let id = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(of_name(&name(&id)), Some(&id[..]));
        assert_eq!(of_commit(&format!("k8s.io/7/{id}")), Some(id.clone()));
        for other in ["", "fsprov/", "fsprov/sha256:0a", "k8s.io/7/web", &format!("k8s.io/7/{id}0")] {
            assert_eq!((of_name(other), of_commit(other)), (None, None), "{other}");
        }
        assert!(is_our_name(&name(&id)) && is_our_name(&format!("{}/7", name(&id))));
        assert!(!is_our_name(&format!("fsprov/7/{id}")), "a namespace of that name");
        let paths = StatePaths::new("/r".into());
        assert_eq!(holder(Path::new("/r/snapshotter"), &paths), "snapshotter");
        assert_ne!(holder(Path::new("/a"), &paths), holder(Path::new("/b"), &paths));
    }
}
