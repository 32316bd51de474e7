//! Pull from a registry (OCI distribution specification 1.1): manifest, config and layers are put down as an OCI image layout, and
//! that is imported.
//!
//! A blob is kept as `<digest>.part` until all of it is here and has the digest that names it; a later pull goes on where it
//! ends. Layers that the store has are not fetched. What a registry says of sizes, types and digests is believed nowhere: all
//! is checked here, and by the import once more.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::auth::{AuthFiles, Session};
use super::http::{Answer, Client, Failure};
use super::{Options, PARALLEL_DOWNLOADS, Part, Reference};
use crate::error::{Error, Kind, Result, show};
use crate::id::ImageId;
use crate::image::MAX_MANIFEST_BYTES;
use crate::image::oci::{self, Descriptor, Digest, Document, Manifest, Platform, media_type};
use crate::store::{Download, Held, ImageSource, ImportOptions, Imported, Outcome, Store};

/// Tries of one request that fails in a way that may pass, and the pause after the first; it doubles.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);
/// Answers to one blob in all, when each brings some bytes and breaks off.
const MAX_PIECES: u32 = 100;
/// Indexes within indexes that are followed.
const MAX_INDEX_DEPTH: usize = 4;
/// Longest error text of a registry that is shown.
const MAX_SAID_BYTES: u64 = 16 << 10;
const CHUNK: usize = 128 << 10;

/// The manifest of one image, checked, and who has it.
struct Found<'a> {
    session: Session<'a>,
    bytes: Vec<u8>,
    manifest: Manifest,
    digest: Digest,
    /// What the index that led here says it is for.
    platform: Option<Platform>,
}

/// Get an image of a registry into the store.
///
/// ```no_run
/// use fsprov::{StatePaths, Store, pull};
/// let store = Store::open(&StatePaths::new("/var/lib/fsprov".into()))?;
/// let image = pull::pull(&store, &"registry.example.com/team/app:v1".parse()?, &pull::Options::default())?;
/// println!("{}", image.id);
/// # Ok::<(), fsprov::Error>(())
/// ```
///
/// Errors: [`Kind::NotFound`] where the registry has no such image or none for the platform, [`Kind::Permission`] where it wants
/// a login or its certificate is not trusted, [`Kind::Integrity`] where what it sends is not what its digest says,
/// [`Kind::Limit`] past a limit, [`Kind::Io`] where it does not answer.
pub fn pull(store: &Store, reference: &Reference, options: &Options) -> Result<Imported> {
    let client = Client::new(options.hosts.clone());
    let uid = rustix::process::getuid().as_raw();
    let files = AuthFiles::find(options.auth_file.clone(), uid, |name| std::env::var_os(name));
    pull_with(store, reference, options, &client, &files).map_err(|e| e.within("pull", reference))
}

fn pull_with(
    store: &Store,
    reference: &Reference,
    options: &Options,
    client: &Client,
    files: &AuthFiles,
) -> Result<Imported> {
    // Known before anything comes.
    store.refuse_unsigned(reference, false, "a pulled image has no detached signature")?;
    let found = find(reference, options, client, files)?;
    let id = found.digest.id().clone();
    let names = reference.names();
    if let Some(there) = already_there(store, &id, &names)? {
        return Ok(there);
    }
    let download = store.download(id.as_str())?;
    // The process that held it may have brought the image.
    if let Some(there) = already_there(store, &id, &names)? {
        return download.done().map(|()| there);
    }
    let imported = match get(store, &found, &download, reference, options) {
        Ok(imported) => imported,
        // No second try would make it better: nothing is gained by keeping it.
        Err(e) if matches!(e.kind(), Kind::Integrity | Kind::Invalid | Kind::Limit | Kind::Unsupported) => {
            return Err(e.with_undo(download.done()));
        }
        Err(e) => {
            log::info!("what came stays in {}: the next pull goes on there", show(download.path()));
            return Err(e);
        }
    };
    download.done()?;
    store.give_names(&id, &names, Held::Replace)?;
    Ok(imported)
}

fn already_there(store: &Store, id: &ImageId, names: &[String]) -> Result<Option<Imported>> {
    let Some(meta) = store.known(id) else { return Ok(None) };
    store.give_names(id, names, Held::Replace)?;
    Ok(Some(Imported {
        id: meta.id,
        name: names.first().cloned().unwrap_or_default(),
        outcome: Outcome::Existing,
        on_disk: meta.on_disk,
        warnings: Vec::new(),
    }))
}

/// Ask the mirror, where there is one, and else the registry.
fn find<'a>(reference: &Reference, options: &Options, client: &'a Client, files: &'a AuthFiles) -> Result<Found<'a>> {
    let mirror = client.host(reference.host()).and_then(|config| config.mirror.clone());
    if let Some(mirror) = mirror {
        let (host, path) = mirror.split_once('/').map_or((&*mirror, String::new()), |(h, p)| (h, format!("{p}/")));
        let session = Session::new(client, files, host, &format!("{path}{}", reference.repository()));
        match resolve(session, reference, options) {
            Ok(found) => return Ok(found),
            Err(error) => log::warn!("the mirror {mirror} does not help: {error}"),
        }
    }
    resolve(Session::new(client, files, reference.host(), reference.repository()), reference, options)
}

/// From a tag or digest, through indexes, to the manifest for the platform.
fn resolve<'a>(session: Session<'a>, reference: &Reference, options: &Options) -> Result<Found<'a>> {
    let platform = options.platform.clone().unwrap_or_else(Platform::host);
    let mut selector = reference.selector();
    let mut wanted = reference.digest().cloned();
    let mut announced: Option<Descriptor> = None;
    for _ in 0..MAX_INDEX_DEPTH {
        let (bytes, said) = patiently(|| manifest(&session, &selector, reference))?;
        let digest = Digest::from_sha256(&Sha256::digest(&bytes).into());
        if let Some(wanted) = wanted.as_ref().filter(|wanted| **wanted != digest) {
            let why = format!("the registry sends something with the digest {digest}");
            return Err(Error::new(Kind::Integrity, "check manifest", wanted, why));
        }
        if let Some(wanted) = announced.as_ref().filter(|d| d.size != bytes.len() as u64) {
            let why = format!("it has {} bytes, and its index says {}", bytes.len(), wanted.size);
            return Err(Error::new(Kind::Integrity, "check manifest", &digest, why));
        }
        let types = [said.as_deref(), announced.as_ref().map(|d| d.media_type.as_str())];
        let mut document = oci::parse_document(&bytes, None)?;
        for said in types.into_iter().flatten() {
            document = oci::parse_document(&bytes, Some(said))?;
        }
        match document {
            Document::Manifest(manifest) => {
                let platform = announced.and_then(|said| said.platform);
                return Ok(Found { session, bytes, manifest, digest, platform });
            }
            Document::Index(index) => {
                let chosen = oci::choose(&index, None, &platform)?;
                log::info!("for {platform}: {}", chosen.digest);
                selector = chosen.digest.to_string();
                wanted = Some(chosen.digest.clone());
                announced = Some(chosen.clone());
            }
        }
    }
    Err(Error::new(Kind::Invalid, "read index", &selector, format!("more than {MAX_INDEX_DEPTH} are nested")))
}

/// One manifest or index, and the type it is sent as where that says something.
fn manifest(
    session: &Session<'_>,
    selector: &str,
    reference: &Reference,
) -> std::result::Result<(Vec<u8>, Option<String>), Failure> {
    const ACCEPT: &str = concat!(
        "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, ",
        "application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json"
    );
    let url = session.url(&format!("manifests/{selector}"));
    let answer = session.get(&url, &[("Accept", ACCEPT)])?;
    if answer.status == 404 {
        let what = if selector.contains(':') { "" } else { "the tag " };
        let why =
            format!("the registry {} has no {} with {what}{selector}", session.login_host(), session.repository());
        return Err(Error::new(Kind::NotFound, "find", reference, why).hint("is the name right?").into());
    }
    let answer = accepted(session, answer)?;
    let said = answer.header("content-type").map(|text| text.split(';').next().unwrap_or(text).trim().to_owned());
    // Some servers call everything by one of these.
    let said =
        said.filter(|text| !matches!(&**text, "application/json" | "text/plain" | "application/octet-stream" | ""));
    Ok((answer.small(MAX_MANIFEST_BYTES as u64)?, said))
}

/// An answer that brings what was asked for.
fn accepted(session: &Session<'_>, answer: Answer) -> std::result::Result<Answer, Failure> {
    let status = answer.status;
    if matches!(status, 200 | 206) {
        return Ok(answer);
    }
    let url = answer.url.clone();
    if matches!(status, 401 | 403) {
        return Err(session.refused(session.has_login()).into());
    }
    let kind = if status == 404 { Kind::NotFound } else { Kind::Io };
    let said = answer.small(MAX_SAID_BYTES).map(|body| what_it_says(&body)).unwrap_or_default();
    let error = Error::new(kind, "ask", url, format!("it answers {status}{said}"));
    Err(Failure { error, is_passing: status >= 500 || status == 429 || status == 408 })
}

/// The message of a registry's error (distribution specification, "Error codes").
fn what_it_says(body: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let message = json["errors"][0]["message"].as_str().unwrap_or_default();
    let message: String = message.chars().filter(|c| !c.is_control()).take(200).collect();
    if message.is_empty() { message } else { format!(": {message}") }
}

/// Try again what may pass.
fn patiently<T>(mut once: impl FnMut() -> std::result::Result<T, Failure>) -> Result<T> {
    let mut pause = PAUSE;
    for _ in 1..TRIES {
        match once() {
            Ok(done) => return Ok(done),
            Err(failure) if failure.is_passing => log::info!("{}: again in {pause:?}", failure.error),
            Err(failure) => return Err(failure.error),
        }
        std::thread::sleep(pause);
        pause *= 2;
    }
    once().map_err(Into::into)
}

fn get(
    store: &Store,
    found: &Found<'_>,
    download: &Download,
    reference: &Reference,
    options: &Options,
) -> Result<Imported> {
    let manifest = &found.manifest;
    for layer in &manifest.layers {
        if !oci::is_tar_layer(&layer.media_type) {
            let why = format!("its media type {:?} is not a layer that fsprov can unpack", layer.media_type);
            return Err(Error::new(Kind::Unsupported, "pull layer", &layer.digest, why));
        }
    }
    let total = manifest.layers.iter().try_fold(0_u64, |sum, layer| sum.checked_add(layer.size));
    if total.is_none_or(|total| total > options.limits.total_bytes) {
        let why = format!("its layers have more than {} bytes", options.limits.total_bytes);
        return Err(
            Error::new(Kind::Limit, "pull", reference, why).hint("[limits] total_bytes says how many are taken")
        );
    }
    if manifest.config.size > MAX_MANIFEST_BYTES as u64 {
        let why = format!("it has {} bytes: at most {MAX_MANIFEST_BYTES} are taken", manifest.config.size);
        return Err(Error::new(Kind::Limit, "pull config", &manifest.config.digest, why));
    }
    let blobs = Blobs { dir: download.path().join("blobs/sha256"), session: &found.session, options };
    std::fs::create_dir_all(&blobs.dir).map_err(|e| Error::io("make", show(&blobs.dir), e))?;
    blobs.one(&manifest.config, &AtomicBool::new(false))?;
    let config = std::fs::read(blobs.path(&manifest.config.digest)).map_err(|e| Error::io("read", "config", e))?;
    let config = oci::parse_config(&config, manifest.layers.len())?;
    // What an index said of it was chosen by.
    if let (Some(wanted), None) = (&options.platform, &found.platform) {
        config.platform.require(wanted)?;
    }
    put_layout(download.path(), found)?;
    let has = |diff_id: &Digest| store.has_layer(diff_id.id());
    let missing: Vec<&Descriptor> = manifest
        .layers
        .iter()
        .zip(&config.rootfs.diff_ids)
        .filter(|(_, diff)| !has(diff))
        .map(|(blob, _)| blob)
        .collect();
    let names = reference.names();
    let import = ImportOptions {
        name: names.first().cloned(),
        // A pull means what the tag is now.
        held: Held::Replace,
        expected_id: Some(found.digest.id().clone()),
        limits: options.limits.clone(),
        platform: Some(config.platform.clone()),
        progress: options.progress.clone(),
        ..ImportOptions::default()
    };
    let source = ImageSource::Downloaded { path: download.path().into(), from: format!("docker://{reference}") };
    blobs.all(&missing)?;
    match store.import(&source, &import) {
        // A layer that was there is no more.
        Err(e) if e.kind() == Kind::NotFound && missing.len() < manifest.layers.len() => {
            blobs.all(&manifest.layers.iter().collect::<Vec<_>>())?;
            store.import(&source, &import)
        }
        done => done,
    }
}

/// What makes a directory with blobs an image layout.
fn put_layout(dir: &Path, found: &Found<'_>) -> Result<()> {
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).map_err(|e| Error::io("write", show(&path), e))
    };
    let said = found.manifest.media_type.clone().unwrap_or_else(|| media_type::MANIFEST.into());
    let index = oci::Index {
        schema_version: 2,
        media_type: Some(media_type::INDEX.into()),
        manifests: vec![Descriptor {
            media_type: said,
            digest: found.digest.clone(),
            size: found.bytes.len() as u64,
            platform: None,
            annotations: None,
        }],
    };
    let index = serde_json::to_vec(&index).map_err(|e| Error::new(Kind::Io, "make", "index.json", e))?;
    put(&format!("blobs/sha256/{}", found.digest.hex()), &found.bytes)?;
    put("index.json", &index)?;
    put("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
}

struct Blobs<'a> {
    dir: PathBuf,
    session: &'a Session<'a>,
    options: &'a Options,
}

/// A blob on its way.
struct Growing {
    file: File,
    path: PathBuf,
    sha: Sha256,
    length: u64,
}

impl Growing {
    /// What an earlier try left.
    fn open(path: PathBuf, most: u64) -> Result<Self> {
        let fail = |e| Error::io("open", show(&path), e);
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(fail)?;
        let mut growing = if file.metadata().map_err(fail)?.len() > most {
            file.set_len(0).map_err(fail)?;
            Growing { file, path, sha: Sha256::new(), length: 0 }
        } else {
            let mut sha = Sha256::new();
            let length = std::io::copy(&mut file, &mut sha).map_err(fail)?;
            Growing { file, path, sha, length }
        };
        growing.file.seek(std::io::SeekFrom::Start(growing.length)).map_err(|e| Error::io("seek", "", e))?;
        Ok(growing)
    }

    fn restart(&mut self) -> Result<()> {
        self.sha = Sha256::new();
        self.length = 0;
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(|e| Error::io("empty", show(&self.path), e))
    }

    fn add(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(data).map_err(|e| Error::io("write", show(&self.path), e))?;
        self.sha.update(data);
        self.length += data.len() as u64;
        Ok(())
    }
}

impl Blobs<'_> {
    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    /// Fetch several, some at the same time. The first error ends the others at their next piece.
    fn all(&self, wanted: &[&Descriptor]) -> Result<()> {
        let mut queue: VecDeque<&Descriptor> = VecDeque::new();
        for blob in wanted {
            if !queue.iter().any(|have| have.digest == blob.digest) {
                queue.push_back(blob);
            }
        }
        let parallel = if self.options.parallel == 0 { PARALLEL_DOWNLOADS } else { self.options.parallel };
        let threads = parallel.min(queue.len());
        let queue = Mutex::new(queue);
        let stop = AtomicBool::new(false);
        let failed = Mutex::new(None);
        let work = || {
            loop {
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(blob) = next.filter(|_| !stop.load(Ordering::Relaxed)) else { return };
                if let Err(error) = self.one(blob, &stop)
                    && !stop.swap(true, Ordering::Relaxed)
                {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Fetch one, unless it is here, and check it.
    fn one(&self, blob: &Descriptor, stop: &AtomicBool) -> Result<()> {
        let path = self.path(&blob.digest);
        if std::fs::metadata(&path).is_ok_and(|meta| meta.len() == blob.size) {
            return Ok(());
        }
        let mut part = Growing::open(path.with_extension("part"), blob.size)?;
        let mut is_resumed = part.length > 0;
        if is_resumed {
            log::info!("{}: {} of {} bytes were here", blob.digest, part.length, blob.size);
        }
        loop {
            self.fill(blob, &mut part, stop)?;
            let got = Digest::from_sha256(&part.sha.clone().finalize().into());
            if got == blob.digest {
                break;
            }
            part.restart()?;
            if !std::mem::take(&mut is_resumed) {
                let why = format!("the registry sends something with the digest {got}");
                return Err(Error::new(Kind::Integrity, "check blob", &blob.digest, why));
            }
            // What an earlier try left may be what is wrong.
            log::warn!("{}: what was here did not fit: once more from the beginning", blob.digest);
        }
        std::fs::rename(&part.path, &path).map_err(|e| Error::io("rename", show(&part.path), e))
    }

    /// Fetch what is missing of a blob, in as many pieces as the line breaks it into.
    fn fill(&self, blob: &Descriptor, part: &mut Growing, stop: &AtomicBool) -> Result<()> {
        let (mut tries, mut pause) = (1, PAUSE);
        let mut most = part.length;
        for _ in 0..MAX_PIECES {
            if part.length == blob.size {
                return Ok(());
            }
            let failure = match self.piece(blob, part, stop) {
                Ok(()) => continue,
                Err(failure) => failure,
            };
            // What brought something new was worth it.
            if part.length > most {
                (most, tries, pause) = (part.length, 1, PAUSE);
            }
            if !failure.is_passing || tries == TRIES || stop.load(Ordering::Relaxed) {
                return Err(failure.error);
            }
            log::info!("{}: {}: again in {pause:?}", blob.digest, failure.error);
            std::thread::sleep(pause);
            tries += 1;
            pause *= 2;
        }
        let why =
            format!("it broke off {MAX_PIECES} times, the last time after {} of {} bytes", part.length, blob.size);
        Err(Error::new(Kind::Io, "fetch", &blob.digest, why))
    }

    fn piece(&self, blob: &Descriptor, part: &mut Growing, stop: &AtomicBool) -> std::result::Result<(), Failure> {
        let name = blob.digest.to_string();
        let url = self.session.url(&format!("blobs/{name}"));
        let range = format!("bytes={}-", part.length);
        let headers = [("Range", &*range)];
        let answer = self.session.get(&url, if part.length > 0 { &headers } else { &[] })?;
        if answer.status == 416 {
            part.restart()?;
            let error = Error::new(Kind::Integrity, "fetch", &name, "the registry has no more of it");
            return Err(Failure { error, is_passing: true });
        }
        let answer = accepted(self.session, answer)?;
        let starts_there =
            answer.header("content-range").is_some_and(|text| text.starts_with(&format!("bytes {}-", part.length)));
        if answer.status == 200 && part.length > 0 || answer.status == 206 && !starts_there {
            if answer.status == 206 {
                return Err(Error::new(
                    Kind::Invalid,
                    "fetch",
                    &name,
                    "the registry sends another range than asked for",
                )
                .into());
            }
            // It does not do ranges.
            part.restart()?;
        }
        let told: Option<u64> = answer.header("content-length").and_then(|text| text.parse().ok());
        let whole = told.map(|told| told.saturating_add(part.length));
        if let Some(whole) = whole.filter(|whole| *whole != blob.size) {
            let why = format!("the registry has {whole} bytes of it, and its manifest says {}", blob.size);
            return Err(Error::new(Kind::Integrity, "check blob", &name, why).into());
        }
        let mut body = answer.reader();
        let mut buffer = vec![0; CHUNK];
        while part.length < blob.size {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Io, "fetch", &name, "another blob failed").into());
            }
            let count = match body.read(&mut buffer) {
                Ok(count) => count,
                Err(e) => {
                    let error = Error::io("fetch", &name, e).with_kind(Kind::Io);
                    return Err(Failure { error, is_passing: true });
                }
            };
            if count == 0 {
                let why = format!("it ends after {} of {} bytes", part.length, blob.size);
                return Err(Failure { error: Error::new(Kind::Integrity, "fetch", &name, why), is_passing: true });
            }
            if part.length + count as u64 > blob.size {
                part.restart()?;
                let why = format!("the registry sends more than its {} bytes", blob.size);
                return Err(Error::new(Kind::Integrity, "check blob", &name, why).into());
            }
            part.add(&buffer[..count])?;
            if let Some(parts) = &self.options.parts {
                parts(Part { name: &name, read: part.length, total: Some(blob.size) });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_tried_again_and_what_may_not_is_not() {
        for (is_passing, want) in [(true, TRIES), (false, 1)] {
            let mut tries = 0;
            let done: Result<()> = patiently(|| {
                tries += 1;
                Err(Failure { error: Error::new(Kind::Io, "ask", "", "no"), is_passing })
            });
            assert!(done.is_err());
            assert_eq!(tries, want);
        }
    }

    #[test]
    fn a_registrys_words_are_shown_without_what_would_hide_something() {
        assert_eq!(what_it_says(br#"{"errors":[{"code":"X","message":"no\u001b[2J good"}]}"#), ": no[2J good");
        assert_eq!(what_it_says(b"<html>"), "");
    }
}
