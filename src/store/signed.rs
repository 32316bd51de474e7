//! The store's side of signatures: which file holds the signature of an archive, and that what is imported is what was signed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use super::Store;
use super::stream::{Archive, Compression, decoder};
use crate::error::{Error, Kind, Result, show};
use crate::image::signature::{Keyring, MAX_SIGNATURE_BYTES};

/// Where the signature of an archive is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Signature {
    /// Beside it, with `.asc` after its name.
    #[default]
    Beside,
    /// In this file.
    File(PathBuf),
    /// Nowhere, and none is asked for, whatever the store's policy says.
    Waived,
}

/// SHA-256 of an archive's bytes as they lie in its file.
pub(super) type RawDigest = [u8; 32];

/// Reads through and hashes what passes.
pub(super) struct Hashing<R> {
    pub(super) input: R,
    pub(super) state: Hashed,
}

/// The hash of what has passed, and how many bytes that were.
pub(super) type Hashed = Arc<Mutex<(Sha256, u64)>>;

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.input.read(out)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0.update(&out[..count]);
        state.1 += count as u64;
        Ok(count)
    }
}

impl Store {
    /// Check the signature of the archive at `path`, where the policy asks for one. Gives what its bytes must be when they are
    /// imported; `None`: no signature was asked for.
    pub(crate) fn check_signature(&self, path: &Path, signature: &Signature) -> Result<Option<RawDigest>> {
        let Some(keyring) = &self.policy.keyring else {
            if let Signature::File(file) = signature {
                let why = "no keyring is configured to check it against";
                return Err(Error::new(Kind::Usage, "check signature", show(file), why)
                    .hint("set keyring in the configuration (`fsprov config example`)"));
            }
            log::debug!("{}: no keyring is configured, no signature is looked for", show(path));
            return Ok(None);
        };
        let file = match signature {
            Signature::Waived => {
                log::warn!("{}: its signature is not looked at", show(path));
                return Ok(None);
            }
            Signature::File(file) => file.clone(),
            Signature::Beside => {
                let mut name = path.as_os_str().to_owned();
                name.push(".asc");
                name.into()
            }
        };
        let mut bytes = Vec::new();
        match File::open(&file) {
            Ok(open) => {
                let mut open = open.take(MAX_SIGNATURE_BYTES);
                open.read_to_end(&mut bytes).map_err(|e| Error::io("read signature", show(&file), e))?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let why =
                    format!("a keyring is configured ({}), and there is no signature {}", show(keyring), show(&file));
                return Err(Error::new(Kind::Integrity, "check signature of", show(path), why)
                    .hint("name it with --signature, or take the image without one by --no-signature"));
            }
            Err(e) => return Err(Error::io("read signature", show(&file), e)),
        }
        let ring = Keyring::load(keyring)?;
        let digest = Arc::new(Mutex::new(None));
        let limits = &self.policy.limits;
        let watched = || {
            let state = Hashed::default();
            *digest.lock().unwrap_or_else(PoisonError::into_inner) = Some(state.clone());
            let input = File::open(path).map_err(|e| Error::io("open", show(path), e))?;
            Ok::<_, Error>(Hashing { input, state })
        };
        let raw = || -> Result<Box<dyn Read>> { Ok(Box::new(watched()?)) };
        // The specification's example signs the tar before it is compressed, rkt's users the file: either says all.
        let plain = || -> Result<Box<dyn Read>> {
            let mut input = watched()?;
            let mut first = Vec::new();
            input.by_ref().take(8).read_to_end(&mut first).map_err(|e| Error::io("read", show(path), e))?;
            let compression = Compression::of(&first);
            let whole = std::io::BufReader::new(std::io::Cursor::new(first).chain(input));
            decoder(compression, whole, limits, &show(path))
        };
        let signer = match ring.check(&bytes, &raw) {
            Err(e) if e.kind() == Kind::Integrity && is_compressed(path)? => ring.check(&bytes, &plain).map_err(|_| e),
            done => done,
        };
        let signer = signer.map_err(|e| e.within("import", show(path)))?;
        log::info!("{}: a good signature by {signer}", show(path));
        let state = digest.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default();
        let sha = state.lock().unwrap_or_else(PoisonError::into_inner).0.clone();
        Ok(Some(sha.finalize().into()))
    }
}

fn is_compressed(path: &Path) -> Result<bool> {
    let mut first = Vec::new();
    let file = File::open(path).map_err(|e| Error::io("open", show(path), e))?;
    file.take(8).read_to_end(&mut first).map_err(|e| Error::io("read", show(path), e))?;
    Ok(Compression::of(&first) != Compression::None)
}

/// An archive whose bytes are hashed as they are read, to be compared with what was signed.
pub(super) fn watched(archive: Archive) -> (Archive, Hashed) {
    let state = Hashed::default();
    let input = Box::new(Hashing { input: archive.input, state: state.clone() });
    (Archive { input, ..archive }, state)
}

/// Were the bytes that passed those that were signed?
pub(super) fn same_as_signed(name: &str, state: &Hashed, signed: &RawDigest) -> Result<()> {
    let sha = state.lock().unwrap_or_else(PoisonError::into_inner).0.clone();
    if <RawDigest>::from(sha.finalize()) == *signed {
        return Ok(());
    }
    Err(Error::new(Kind::Integrity, "import", name, "it was changed after its signature was checked"))
}
