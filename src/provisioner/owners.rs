//! Whose the files of an image seem to be, where the request does not say.
//!
//! Root, also of a user namespace, sees an image's own ids. For an ordinary user those are strangers: in the user namespace that a
//! container gets, every one of them is `nobody`. So the image's root is shown as this user, and the rest as the user's subordinate ids
//! where there are any: `bwrap --uid 0` and `unshare -r` then have root's files as root's.

use super::Request;
use crate::error::{Error, Result, show};
use crate::idmap;
use crate::index::Index;
use crate::plan::{BackendKind, Ownership};
use crate::store::ResolvedImage;
use crate::sys::process::own_ids;

/// How the image's ownership is presented.
pub(super) fn presented(request: &Request, image: &ResolvedImage) -> Result<Ownership> {
    if let Some(said) = &request.ownership {
        return Ok(said.clone());
    }
    // A copy made by an ordinary user is that user's as it is.
    let is_foreign = !rustix::process::geteuid().is_root()
        && matches!(request.backend, None | Some(BackendKind::Fuse))
        && root_directory_owner(image)? == Some(0);
    if is_foreign { idmap::usual(own_ids(), idmap::Files::of_host()) } else { Ok(Ownership::default()) }
}

/// Whose the image's `/` is. A tree that somebody other than root unpacked has the ids of this host, as it has them on the disk.
fn root_directory_owner(image: &ResolvedImage) -> Result<Option<u32>> {
    use std::os::unix::fs::MetadataExt as _;
    if let Some(index) = &image.index {
        let root = Index::open(index)?.inode(0);
        return root.map(|root| Some(root.uid)).map_err(|e| {
            Error::new(crate::error::Kind::Integrity, "read index", show(index), e)
                .hint("`fsprov image verify --repair` imports the image again")
        });
    }
    let Some(top) = image.layers.last() else { return Ok(None) };
    let seen = std::fs::metadata(top).map_err(|e| Error::io("open layer", show(top), e))?;
    Ok(Some(seen.uid()))
}
