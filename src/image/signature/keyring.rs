//! Detached OpenPGP signatures (RFC 9580) of AppC archives, checked against a keyring of the user's.
//!
//! A key counts if one of its own certifications holds, it may sign, and it is neither revoked nor expired *now*: the time in a
//! signature is its maker's word, and anyone who has an old key may write an old time. One good signature by such a key is
//! enough. A key may be bound to a beginning of names, as rkt had it: its file lies in `prefix.d/PREFIX` of the keyring, with a
//! comma for each slash of the prefix.

use std::io::Read;
use std::path::Path;

use pgp::composed::{Deserializable, DetachedSignature, SignedPublicKey, SignedPublicSubKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType};
use pgp::types::{KeyDetails, Tag, Timestamp};

use super::Signer;
use crate::error::{Error, Kind, Result, show};

/// Longest file of keys, and most files of a keyring.
const MAX_KEYS_BYTES: u64 = 16 << 20;
const MAX_KEY_FILES: usize = 1024;
/// Most signatures of one file that are looked at: each may cost a pass over the archive.
const MAX_SIGNATURES: usize = 16;
/// How far a signer's clock may be ahead of ours.
const SKEW_SECS: u64 = 24 * 3600;
const BEGIN: &[u8] = b"-----BEGIN PGP PUBLIC KEY BLOCK-----";

/// Keys whose signatures count.
#[derive(Debug)]
pub struct Keyring {
    keys: Vec<(SignedPublicKey, Prefix)>,
    name: String,
}

/// What the names begin with that a key may sign; none: all names.
type Prefix = Option<String>;

/// The directory of a keyring whose directories have keys for some names only.
const PREFIXES: &str = "prefix.d";

/// Can a key sign, and why not?
type Usable = std::result::Result<(), &'static str>;

impl Keyring {
    /// Read a file of keys, armored or binary, or every file of a directory. A file that holds no key is an error: what is in a
    /// keyring is there to count.
    pub fn load(path: &Path) -> Result<Self> {
        let fail = |e| Error::io("read keyring", show(path), e);
        let mut files = vec![(path.to_owned(), None)];
        if std::fs::metadata(path).map_err(fail)?.is_dir() {
            files.clear();
            let mut dirs = vec![(path.to_owned(), None)];
            match std::fs::read_dir(path.join(PREFIXES)) {
                Ok(entries) => {
                    for entry in entries {
                        let entry = entry.map_err(fail)?;
                        let prefix = entry.file_name().to_string_lossy().replace(',', "/");
                        if !crate::image::appc::is_ac_identifier(&prefix) {
                            let why =
                                "not the beginning of a name: write an AC identifier, with a comma for each slash";
                            return Err(Error::new(Kind::Invalid, "read keyring", show(entry.path()), why));
                        }
                        dirs.push((entry.path(), Some(prefix)));
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(fail(e)),
            }
            for (dir, prefix) in dirs {
                for entry in std::fs::read_dir(&dir).map_err(fail)? {
                    let file = entry.map_err(fail)?.path();
                    if std::fs::metadata(&file).is_ok_and(|meta| meta.is_file()) {
                        files.push((file, prefix.clone()));
                    }
                }
            }
            files.sort();
        }
        if files.len() > MAX_KEY_FILES {
            let why = format!("it has more than {MAX_KEY_FILES} files");
            return Err(Error::new(Kind::Limit, "read keyring", show(path), why));
        }
        let mut keys = Vec::new();
        for (file, prefix) in &files {
            keys.extend(read_keys(file)?.into_iter().map(|key| (key, prefix.clone())));
        }
        if keys.is_empty() {
            return Err(Error::new(Kind::NotFound, "read keyring", show(path), "it has no key")
                .hint("`gpg --export KEY > FILE` writes one"));
        }
        Ok(Keyring { keys, name: show(path) })
    }

    /// May a key that is in the ring, and is neither expired nor revoked now, sign an image of this name? Else why not.
    pub fn may_sign(&self, signer: &Signer, name: &str) -> std::result::Result<(), String> {
        let now = now();
        let mut why = format!("the keyring {} has no key {} any more", self.name, signer.key);
        for (key, prefix) in self.keys.iter().filter(|(key, _)| key.primary_key.fingerprint().to_string() == signer.key)
        {
            let fits = |prefix: &String| {
                name.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            };
            match (usable(key, now), prefix) {
                (Err(what), _) => why = format!("the key of {signer} {what}"),
                (Ok(()), Some(prefix)) if !fits(prefix) => {
                    why = format!("the key of {signer} is for names that begin with {prefix}/");
                }
                (Ok(()), _) => return Ok(()),
            }
        }
        Err(why)
    }

    /// Is `signature` (armored or binary) by one of the keys, over what `open` gives? Gives the signer.
    ///
    /// `open` is asked once for each signature that names a key of the ring. Errors: [`Kind::Integrity`], with what is wrong with
    /// each signature.
    pub fn check(&self, signature: &[u8], open: &dyn Fn() -> Result<Box<dyn Read>>) -> Result<Signer> {
        let now = now();
        let refuse = |why: String| Error::new(Kind::Integrity, "check signature", "", why);
        let parsed = DetachedSignature::from_reader_many(signature)
            .map_err(|e| Error::new(Kind::Invalid, "read", "signature", format!("not an OpenPGP signature: {e}")))?;
        let mut wrong = Vec::new();
        for one in parsed.0.take(MAX_SIGNATURES) {
            let one = one.map_err(|e| Error::new(Kind::Invalid, "read", "signature", e.to_string()))?.signature;
            match self.check_one(&one, open, now)? {
                Ok(signer) => return Ok(signer),
                Err(why) => wrong.push(why),
            }
        }
        if wrong.is_empty() {
            return Err(refuse("it has no signature".into()));
        }
        Err(refuse(wrong.join("; ")).hint(format!("the keys that count are in {}", self.name)))
    }

    fn check_one(
        &self,
        signature: &Signature,
        open: &dyn Fn() -> Result<Box<dyn Read>>,
        now: u64,
    ) -> Result<std::result::Result<Signer, String>> {
        let issuer = issuer(signature);
        if signature.typ() != Some(SignatureType::Binary) {
            return Ok(Err(format!("the signature by {issuer} is not one of a file")));
        }
        if !matches!(
            signature.hash_alg(),
            Some(
                HashAlgorithm::Sha256
                    | HashAlgorithm::Sha384
                    | HashAlgorithm::Sha512
                    | HashAlgorithm::Sha3_256
                    | HashAlgorithm::Sha3_512
            )
        ) {
            return Ok(Err(format!("the signature by {issuer} uses a hash that is no longer safe")));
        }
        let Some(created) = signature.created().map(|at| u64::from(at.as_secs())) else {
            return Ok(Err(format!("the signature by {issuer} does not say when it was made")));
        };
        if created > now + SKEW_SECS {
            return Ok(Err(format!("the signature by {issuer} is of the future")));
        }
        if let Some(lifetime) = signature.signature_expiration_time().map(|d| u64::from(d.as_secs()))
            && lifetime > 0
            && created + lifetime < now
        {
            return Ok(Err(format!("the signature by {issuer} has expired")));
        }
        for (key, _) in &self.keys {
            let who = || Signer { key: key.primary_key.fingerprint().to_string(), user: user_of(key) };
            if names(signature, &key.primary_key) {
                if let Err(why) = usable(key, now).and_then(|()| primary_signs(key)) {
                    return Ok(Err(format!("the key of {} {why}", who())));
                }
                return Ok(match signature.verify(&key.primary_key, open()?) {
                    Ok(()) => Ok(who()),
                    Err(e) => Err(format!("the signature by {} does not fit the file ({e})", who())),
                });
            }
            if let Some(subkey) = key.public_subkeys.iter().find(|subkey| names(signature, &subkey.key)) {
                if let Err(why) = usable(key, now).and_then(|()| subkey_signs(key, subkey, now)) {
                    return Ok(Err(format!("the key of {} {why}", who())));
                }
                return Ok(match signature.verify(&subkey.key, open()?) {
                    Ok(()) => Ok(who()),
                    Err(e) => Err(format!("the signature by {} does not fit the file ({e})", who())),
                });
            }
        }
        Ok(Err(format!("the keyring has no key {issuer}")))
    }
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn read_keys(path: &Path) -> Result<Vec<SignedPublicKey>> {
    let file = std::fs::File::open(path).map_err(|e| Error::io("read keys", show(path), e))?;
    let bytes = crate::sys::fs::read_bounded("read keys", show(path), file, MAX_KEYS_BYTES)?;
    let refuse = |why: String| {
        Error::new(Kind::Invalid, "read keys", show(path), why).hint("a keyring holds what `gpg --export` writes")
    };
    // Armored blocks may stand one after another.
    let starts: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(BEGIN)).collect();
    let ends = starts.iter().skip(1).copied().chain([bytes.len()]);
    let mut blocks: Vec<&[u8]> = starts.iter().zip(ends).map(|(from, to)| &bytes[*from..to]).collect();
    if blocks.is_empty() {
        blocks.push(&bytes);
    }
    let mut keys = Vec::new();
    for block in blocks {
        let (found, _) = SignedPublicKey::from_reader_many(block).map_err(|e| refuse(e.to_string()))?;
        for key in found {
            keys.push(key.map_err(|e| refuse(e.to_string()))?);
        }
    }
    if keys.is_empty() { Err(refuse("it has no key".into())) } else { Ok(keys) }
}

fn issuer(signature: &Signature) -> String {
    let fingerprint = signature.issuer_fingerprint().first().map(ToString::to_string);
    let id = || signature.issuer_key_id().first().map(ToString::to_string);
    fingerprint.or_else(id).unwrap_or_else(|| "of nobody".into())
}

fn names(signature: &Signature, key: &impl KeyDetails) -> bool {
    let prints = signature.issuer_fingerprint();
    if prints.is_empty() {
        return signature.issuer_key_id().contains(&&key.legacy_key_id());
    }
    prints.contains(&&key.fingerprint())
}

fn user_of(key: &SignedPublicKey) -> String {
    let user = key.details.users.first().map(|user| String::from_utf8_lossy(user.id.id()).into_owned());
    user.unwrap_or_default().chars().filter(|c| !c.is_control()).take(100).collect()
}

/// What the key says of itself: certifications of its user ids and signatures over the key alone that hold, the newest last.
fn own_signatures(key: &SignedPublicKey) -> Vec<&Signature> {
    let primary = &key.primary_key;
    let users = key.details.users.iter().flat_map(|user| {
        let of_itself = user.signatures.iter().filter(|sig| sig.is_certification() && names(sig, primary));
        of_itself.filter(|sig| sig.verify_certification(primary, Tag::UserId, &user.id).is_ok())
    });
    let direct = key.details.direct_signatures.iter().filter(|sig| sig.verify_key(primary).is_ok());
    let mut all: Vec<&Signature> = users.chain(direct).collect();
    all.sort_by_key(|sig| sig.created().map_or(0, Timestamp::as_secs));
    all
}

fn is_over(created: u64, lifetime: Option<u64>, now: u64) -> bool {
    lifetime.is_some_and(|lifetime| lifetime > 0 && created + lifetime < now)
}

fn usable(key: &SignedPublicKey, now: u64) -> Usable {
    let primary = &key.primary_key;
    if key.details.revocation_signatures.iter().any(|sig| sig.verify_key(primary).is_ok()) {
        return Err("is revoked");
    }
    let Some(own) = own_signatures(key).pop() else { return Err("has no certification of its own") };
    let lifetime = own.key_expiration_time().map(|d| u64::from(d.as_secs()));
    if is_over(u64::from(primary.created_at().as_secs()), lifetime, now) {
        return Err("has expired");
    }
    Ok(())
}

fn primary_signs(key: &SignedPublicKey) -> Usable {
    let may = own_signatures(key).pop().is_some_and(|own| own.key_flags().sign());
    if may { Ok(()) } else { Err("is not one to sign with") }
}

fn subkey_signs(key: &SignedPublicKey, subkey: &SignedPublicSubKey, now: u64) -> Usable {
    let primary = &key.primary_key;
    let mut bindings: Vec<&Signature> =
        subkey.signatures.iter().filter(|sig| sig.verify_subkey_binding(primary, &subkey.key).is_ok()).collect();
    if bindings.iter().any(|sig| sig.typ() == Some(SignatureType::SubkeyRevocation)) {
        return Err("has a signing subkey that is revoked");
    }
    bindings.sort_by_key(|sig| sig.created().map_or(0, Timestamp::as_secs));
    let Some(binding) = bindings.pop() else { return Err("has a subkey that is not its own") };
    let lifetime = binding.key_expiration_time().map(|d| u64::from(d.as_secs()));
    if is_over(u64::from(subkey.key.created_at().as_secs()), lifetime, now) {
        return Err("has a signing subkey that has expired");
    }
    // The subkey must say so too: else anybody could call another's key his own.
    let agrees =
        binding.embedded_signature().is_some_and(|sig| sig.verify_primary_key_binding(&subkey.key, primary).is_ok());
    if binding.key_flags().sign() && agrees { Ok(()) } else { Err("has a subkey that is not one to sign with") }
}
