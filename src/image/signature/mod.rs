//! Signatures of AppC archives: who made one, and the keyring that says whose count.
//!
//! Checking them is the cargo feature `signatures`: OpenPGP brings more crates than all the rest of the library.

#[cfg(feature = "signatures")]
mod keyring;
#[cfg(not(feature = "signatures"))]
#[path = "without.rs"]
mod keyring;

pub use keyring::Keyring;

/// Longest signature read: one is below 1 KiB, a file may hold those of several people.
pub const MAX_SIGNATURE_BYTES: u64 = 64 << 10;

/// Who made a good signature.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Signer {
    /// The fingerprint of the (primary) key, in hex.
    pub key: String,
    /// The first user id of the key, as it says itself.
    pub user: String,
}

impl std::fmt::Display for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.user, self.key)
    }
}
