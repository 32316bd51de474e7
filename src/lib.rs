//! Puts a container image's root filesystem in place: read-only, at a path you name, in milliseconds, with or without root.
//!
//! Import an image into a store, mount it, take it away:
//!
//! ```no_run
//! use fsprov::{Provisioner, Request, StatePaths, Store};
//! use fsprov::id::ImageRef;
//! use fsprov::provisioner::{Detach, Selector};
//! use fsprov::store::{ImageSource, ImportOptions};
//! use fsprov::volume::VolumeSpec;
//!
//! fn main() -> fsprov::Result<()> {
//!     // A program that mounts starts its FUSE servers from itself: this line runs them.
//!     if fsprov::dispatch().is_some() {
//!         return Ok(());
//!     }
//!     let paths = StatePaths::new("/var/lib/fsprov".into());
//!     let options = ImportOptions { name: Some("debian".into()), ..ImportOptions::default() };
//!     Store::open(&paths)?.import(&ImageSource::at("debian.tar".as_ref())?, &options)?;
//!
//!     let provisioner = Provisioner::of_host(paths);
//!     let request = Request::new(ImageRef::parse("debian".as_ref())?, "/mnt/debian").volume(VolumeSpec::parse("./project:/src:rw".as_ref())?);
//!     let record = provisioner.provision(&request)?;
//!     // ... use /mnt/debian ...
//!     provisioner.destroy(&Selector::Id(record.plan.id), Detach::IfIdle)?;
//!     Ok(())
//! }
//! ```
//!
//! | task | with |
//! | --- | --- |
//! | import an archive, layout or directory | [`Store::import`] |
//! | pull from a registry, fetch an AppC image | [`pull::pull`], [`pull::fetch`] |
//! | list, show, find, use | [`Store::list`], [`Store::show`], [`Store::resolve`] |
//! | mount, take away, list, recover | [`Provisioner`] |
//! | look for damage, mend it | [`Store::verify`] |
//! | remove, collect, measure | [`Store::remove`], [`Store::gc`], [`Store::usage`] |
//! | export, flatten | [`Store::export_aci`], [`Store::export_tar`], [`Store::export_oci`], [`Store::flatten`] |
//! | an index | [`Store::rebuild_index`] |
//! | read the configuration files | [`config::Settings`] |
//!
//! Programs in `examples/` do each. The feature `cli` (on by default) is the `fsprov` program: a library does without it and without what it
//! needs (`default-features = false`). The feature `signatures` (on by default too) checks OpenPGP signatures, and brings as many crates as all
//! the rest: without it a configured keyring is an error. What is not in these pages is not for use: it changes without notice.

// Which items are used, and which are public for nobody, is asked where the tests' door is open (see `internals`).
#![cfg_attr(
    not(feature = "internals"),
    allow(
        dead_code,
        unreachable_pub,
        unused_imports,
        clippy::struct_field_names,
        clippy::unnecessary_wraps,
        clippy::unused_self
    )
)]

mod backend;
mod child;
#[cfg(feature = "cli")]
mod cli;
pub mod config;
pub mod daemon;
mod error;
mod fault;
mod fuse;
mod host;
pub mod id;
mod idmap;
mod image;
mod index;
mod paths;
mod pathtext;
mod place;
mod plan;
mod printable;
pub mod provisioner;
pub mod pull;
#[cfg(feature = "cli")]
mod run;
#[cfg(feature = "containerd")]
mod snapshotter;
pub mod store;
mod stubs;
mod sys;
mod traces;
mod tree;
pub mod volume;
mod walls;

#[cfg(feature = "cli")]
pub use cli::main;
pub use error::{Error, Kind, Result};
pub use paths::StatePaths;
pub use provisioner::{Provisioner, Request};
pub use store::Store;

/// What the tests and benchmarks of this crate reach, beyond what is public.
#[cfg(feature = "internals")]
#[doc(hidden)]
#[allow(missing_docs)]
pub mod internals {
    macro_rules! open {
        ($($module:ident)+) => { $(pub mod $module { pub use crate::$module::*; })+ };
    }
    open!(backend fault fuse host idmap image index paths place plan sys traces tree);
}

/// To be called first in `main`: runs the hidden verbs of this program's other processes, which are FUSE servers and those that read
/// archives. `None`: the arguments name no such verb.
///
/// A program that calls it is started again for them, as `fsprov` itself is; for another one `fsprov` is looked for on PATH.
pub fn dispatch() -> Option<std::process::ExitCode> {
    let verb = std::env::args_os().nth(1);
    let verb = verb.as_ref().and_then(|verb| verb.to_str()).unwrap_or_default();
    let code = daemon::dispatch(verb).or_else(|| store::dispatch(verb));
    #[cfg(feature = "cli")]
    let code = code.or_else(|| cli::dispatch(verb));
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
