//! Built without the feature `signatures`: where a keyring is configured, nothing is believed.

use std::io::Read;
use std::path::Path;

use super::Signer;
use crate::error::{Error, Kind, Result, show};

/// A keyring that cannot be read, and so never is one.
#[derive(Debug)]
pub enum Keyring {}

impl Keyring {
    /// [`Kind::Unsupported`].
    pub fn load(path: &Path) -> Result<Self> {
        let why = "this program was built without signatures";
        Err(Error::new(Kind::Unsupported, "read keyring", show(path), why)
            .hint("build fsprov with the cargo feature `signatures`, or configure no keyring"))
    }

    /// Never called.
    pub fn may_sign(&self, _: &Signer, _: &str) -> std::result::Result<(), String> {
        match *self {}
    }

    /// Never called.
    pub fn check(&self, _: &[u8], _: &dyn Fn() -> Result<Box<dyn Read>>) -> Result<Signer> {
        match *self {}
    }
}
