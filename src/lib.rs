//! Puts a container image's root filesystem in place: read-only, at a path you name, in milliseconds, with or without root.
//!
//! Arrows point one way: `cli -> provisioner -> {store, backend} -> {index, tree, sys} -> error`, and
//! `daemon -> fuse -> tree -> {index, sys}`. Store and backend never see each other: the provisioner hands a
//! [`plan::Plan`] from one to the other.
//!
//! What the program does, the library does:
//!
//! | task | with |
//! | --- | --- |
//! | import an archive, layout or directory | [`store::Store::import`] |
//! | list, show, find, use | [`store::Store::list`], [`store::Store::show`], [`store::Store::resolve`] |
//! | provision, destroy, list, recover | [`provisioner::Provisioner`] |
//! | look for damage, mend it | [`store::Store::verify`] |
//! | remove, collect, measure | [`store::Store::remove`], [`store::Store::gc`], [`store::Store::usage`] |
//! | export, flatten | [`store::Store::export_aci`], [`store::Store::export_tar`], [`store::Store::export_oci`], [`store::Store::flatten`] |
//! | an index, of an image or of any tree | [`store::Store::rebuild_index`], [`index::Builder`] |

pub mod backend;
mod child;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod error;
pub mod fault;
pub mod fuse;
pub mod host;
pub mod id;
pub mod idmap;
pub mod image;
pub mod index;
pub mod paths;
pub mod pathtext;
pub mod place;
pub mod plan;
pub mod printable;
pub mod provisioner;
pub mod pull;
pub mod store;
pub mod sys;
pub mod traces;
pub mod tree;
pub mod volume;
mod walls;

pub use cli::main;
pub use error::{Error, Kind, Result};

/// To be called first in `main`: runs the hidden verbs of this program's other processes, which are FUSE servers and those that read
/// archives. `None`: these arguments are none of them.
///
/// A program that calls it is started again for them, as `fsprov` itself is; for another one `fsprov` is looked for on PATH.
pub fn dispatch() -> Option<std::process::ExitCode> {
    let verb = std::env::args_os().nth(1);
    let verb = verb.as_ref().and_then(|verb| verb.to_str()).unwrap_or_default();
    let code = daemon::dispatch(verb).or_else(|| store::dispatch(verb));
    if code.is_none() {
        child::note_that_it_dispatches();
    }
    code
}

/// For unit tests: this host lacks what a test needs. Under FSPROV_TEST_MUST_RUN that is a failure, as it is for the other tests.
#[cfg(test)]
pub(crate) fn lacks(what: &str) {
    let must = std::env::var_os("FSPROV_TEST_MUST_RUN").is_some_and(|v| !v.is_empty() && v != "0");
    assert!(!must, "FSPROV_TEST_MUST_RUN is set, and this host lacks {what}");
    log::warn!("not tested: this host lacks {what}");
}
