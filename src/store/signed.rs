//! The store's side of signatures: which file holds the signature of an archive, and that what is imported is what was signed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use super::Store;
use super::archive::Compression;
use super::archive::input::{Archive, check_ratio, plain};
use super::limits::Limits;
use super::meta::{Meta, read_bounded};
use crate::error::{Error, Kind, Result, show};
use crate::image::signature::{Keyring, MAX_SIGNATURE_BYTES, Signer};

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

/// What is asked of images without a signature, where a keyring is configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unsigned {
    /// Archives need one when they come in, and when they are mounted by their path. Directories, layouts and pulled images have none, and
    /// what is in the store is used.
    #[default]
    Allow,
    /// Nothing is imported or used without one by a key of the ring: directories, layouts and pulled images not at all, and of the store what a
    /// key signed that is in the ring now.
    Refuse,
}

/// SHA-256 of an archive's bytes as they lie in its file.
pub(super) type RawDigest = [u8; 32];

/// A good signature: what it is over, and by whom.
#[derive(Clone, Debug)]
pub(crate) struct Signed {
    pub(super) raw: RawDigest,
    pub(crate) by: Signer,
}

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
    /// Refuse what has no signature, if the policy says so. `waived`: the import was told to take it without.
    pub(crate) fn refuse_unsigned(&self, what: impl std::fmt::Display, waived: bool, why: &str) -> Result<()> {
        if self.policy.unsigned == Unsigned::Allow || waived {
            return Ok(());
        }
        let why = format!("{why}, and the configuration says unsigned = \"refuse\"");
        Err(Error::new(Kind::Integrity, "check signature of", what, why)
            .hint("import its archive with a signature; `image import --no-signature` takes it without one, for uses that ask for none"))
    }

    /// May an image of the store be used, by what is recorded of its signature?
    pub(super) fn check_recorded(&self, meta: &Meta) -> Result<()> {
        if self.policy.unsigned == Unsigned::Allow {
            return Ok(());
        }
        let called = meta.called(None);
        let Some(keyring) = &self.policy.keyring else {
            return Err(Error::new(Kind::Usage, "check signature of", called, "unsigned = \"refuse\" needs a keyring")
                .hint("set keyring in the configuration (`fsprov config example`)"));
        };
        match &meta.signed_by {
            None => self.refuse_unsigned(called, false, "no signature of it is recorded"),
            Some(signer) => self.may_sign(&Keyring::load(keyring)?, signer, meta),
        }
    }

    /// Is it recorded that a key signed it that is in the ring now?
    pub(super) fn is_signed(&self, meta: &Meta) -> bool {
        let (Some(keyring), Some(signer)) = (&self.policy.keyring, &meta.signed_by) else { return false };
        Keyring::load(keyring).and_then(|ring| self.may_sign(&ring, signer, meta)).is_ok()
    }

    fn may_sign(&self, ring: &Keyring, signer: &Signer, meta: &Meta) -> Result<()> {
        let own = self.own_name(meta)?;
        ring.may_sign(signer, &own)
            .map_err(|why| Error::new(Kind::Integrity, "check signature of", meta.called(None), why))
    }

    /// The name that an AppC image's manifest has, whatever names it was given here.
    fn own_name(&self, meta: &Meta) -> Result<String> {
        let path = self.paths.image(&meta.id).join(crate::paths::image::MANIFEST);
        let bytes = read_bounded(&path, crate::image::MAX_MANIFEST_BYTES as u64)?;
        Ok(crate::image::appc::Manifest::parse(&bytes, crate::image::Strictness::Lenient)?.manifest.name)
    }

    /// May this key sign an image whose manifest has this name?
    pub(super) fn check_signer(&self, signer: &Signer, name: &str) -> Result<()> {
        let Some(keyring) = &self.policy.keyring else { return Ok(()) };
        let may = Keyring::load(keyring)?.may_sign(signer, name);
        may.map_err(|why| Error::new(Kind::Integrity, "check signature of", name, why))
    }

    /// Check the signature of the archive at `path`, where the policy asks for one. Gives what its bytes must be when they are
    /// imported, and who signed them; `None`: no signature was asked for.
    pub(crate) fn check_signature(&self, path: &Path, signature: &Signature) -> Result<Option<Signed>> {
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
            let input = watched()?;
            let came = input.state.clone();
            let input = plain(input, limits, &show(path))?;
            Ok(Box::new(Bounded { input, came, grown: 0, limits: limits.clone(), name: show(path) }))
        };
        let signer = match ring.check(&bytes, &raw) {
            Err(e) if e.kind() == Kind::Integrity && is_compressed(path)? => ring.check(&bytes, &plain).map_err(|_| e),
            done => done,
        };
        let signer = signer.map_err(|e| e.within("import", show(path)))?;
        log::info!("{}: a good signature by {signer}", show(path));
        let state = digest.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default();
        let sha = state.lock().unwrap_or_else(PoisonError::into_inner).0.clone();
        Ok(Some(Signed { raw: sha.finalize().into(), by: signer }))
    }
}

/// Decompressed bytes, of which there may be so many for each compressed one: a signature is checked before anything is known of who sent
/// the archive.
struct Bounded<R> {
    input: R,
    came: Hashed,
    grown: u64,
    limits: Limits,
    name: String,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.input.read(out)?;
        self.grown += count as u64;
        let came = self.came.lock().unwrap_or_else(PoisonError::into_inner).1;
        check_ratio(&self.limits, &self.name, came, self.grown).map_err(std::io::Error::other)?;
        Ok(count)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Up to 16 signatures of one file are looked at, each over the decompressed bytes: none may cost what a bomb has.
    #[test]
    fn what_a_signature_is_over_does_not_grow_without_bound() {
        let bomb = zstd::encode_all(&vec![0; 8 << 20][..], 1).unwrap();
        let limits = Limits { ratio_floor: 1 << 20, ratio: 100, ..Limits::default() };
        let came = Hashed::default();
        let input = Hashing { input: std::io::Cursor::new(bomb), state: came.clone() };
        let input = plain(input, &limits, "bomb").unwrap();
        let mut bounded = Bounded { input, came, grown: 0, limits, name: "bomb".into() };
        let error = std::io::copy(&mut bounded, &mut std::io::sink()).unwrap_err();
        assert_eq!(crate::store::archive::read::from_io("bomb", error).kind(), Kind::Limit);
    }
}
