//! Fetch an AppC image by its name: discovery, the archive, its signature, and the images it depends on that are missing.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::http::{Client, Failure, Url};
use super::{Options, Part};
use crate::error::{Error, Kind, Result, show};
use crate::image::appc::Dependency;
use crate::image::discovery::{Wanted, templates};
use crate::image::oci::Platform;
use crate::image::signature::MAX_SIGNATURE_BYTES;
use crate::store::{Download, Held, ImageSource, ImportOptions, Imported, Signature, Store};

/// Longest page that is searched for tags.
const MAX_PAGE_BYTES: u64 = 4 << 20;
/// Images above one another that are fetched, and all images of one fetch: an image stands on 500 at most.
const MAX_DEPTH: usize = 64;
const MAX_IMAGES: usize = 500;
const CHUNK: usize = 128 << 10;

/// Find an image by its name, import it, and before it what it depends on and the store has not. The image itself is the last.
///
/// ```no_run
/// use fsprov::{StatePaths, Store, pull};
/// let store = Store::open(&StatePaths::new("/var/lib/fsprov".into()))?;
/// let images = pull::fetch(&store, &"example.com/app:1.0,os=linux".parse()?, &pull::Options::default())?;
/// # Ok::<(), fsprov::Error>(())
/// ```
///
/// Errors: [`Kind::NotFound`] with every place that was looked at, [`Kind::Integrity`] where what came is not what was asked for
/// or its signature is missing or bad; else as [`super::pull`].
pub fn fetch(store: &Store, wanted: &Wanted, options: &Options) -> Result<Vec<Imported>> {
    let job = Job {
        store,
        options,
        client: Client::new(options.hosts.clone()),
        platform: options.platform.clone().unwrap_or_else(Platform::host),
        active: RefCell::default(),
        fetched: Cell::new(0),
    };
    let mut done = Vec::new();
    job.one(wanted, None, &mut Vec::new(), &mut done)?;
    Ok(done)
}

struct Job<'a> {
    store: &'a Store,
    options: &'a Options,
    client: Client,
    platform: Platform,
    /// Where the images came from that are being taken: one that is met again below itself stands on itself, by whatever labels
    /// it is asked for. Its download is held, too: waiting for it would be for ever.
    active: RefCell<Vec<String>>,
    /// Bytes that came so far, of all images: who names the dependencies could name ever more.
    fetched: Cell<u64>,
}

/// An archive that was found, here.
struct Here {
    /// What discovery made of its name.
    at: String,
    path: PathBuf,
    from: String,
    signature: Signature,
    /// What holds the path, if it was fetched.
    download: Option<Download>,
}

impl Job<'_> {
    fn one(
        &self,
        wanted: &Wanted,
        dependency: Option<&Dependency>,
        above: &mut Vec<String>,
        done: &mut Vec<Imported>,
    ) -> Result<()> {
        let name = wanted.to_string();
        if above.len() >= MAX_DEPTH {
            let why = format!("more than {MAX_DEPTH} images stand on one another");
            return Err(Error::new(Kind::Limit, "fetch", &name, why));
        }
        if done.len() >= MAX_IMAGES {
            let why = format!("more than {MAX_IMAGES} images would be fetched for one");
            return Err(Error::new(Kind::Limit, "fetch", &name, why));
        }
        let here = self.find(wanted, above)?;
        above.push(name);
        self.active.borrow_mut().push(here.at.clone());
        let imported = self.take(wanted, dependency, &here, above, done);
        if let Some(download) = here.download {
            download.done()?;
        }
        done.push(imported.map_err(|e| e.within("fetch", wanted))?);
        above.pop();
        self.active.borrow_mut().pop();
        Ok(())
    }

    fn take(
        &self,
        wanted: &Wanted,
        dependency: Option<&Dependency>,
        here: &Here,
        above: &mut Vec<String>,
        done: &mut Vec<Imported>,
    ) -> Result<Imported> {
        let mut import = ImportOptions {
            strictness: self.options.strictness,
            limits: self.options.limits.clone(),
            signature: here.signature.clone(),
            // It is asked for by this name, here or by an image that stands on it.
            held: Held::Replace,
            progress: self.options.progress.clone(),
            ..ImportOptions::default()
        };
        // Nothing it says is acted on before.
        self.store.check_signature(&here.path, &here.signature)?;
        let (id, manifest) = Store::peek(&here.path, &import)?;
        wanted.check(&manifest, &self.platform)?;
        if let Some(dependency) = dependency {
            let told = dependency.image_id.as_ref().filter(|told| !id.as_str().starts_with(told.as_str()));
            if let Some(told) = told {
                let why = format!("its id is {id}, and what depends on it says {told}");
                return Err(Error::new(Kind::Integrity, "check image", wanted, why));
            }
            let length = std::fs::metadata(&here.path).map_err(|e| Error::io("stat", show(&here.path), e))?.len();
            if let Some(size) = dependency.size.filter(|size| *size != length) {
                let why = format!("its archive has {length} bytes, and what depends on it says {size}");
                return Err(Error::new(Kind::Integrity, "check image", wanted, why));
            }
        }
        for below in &manifest.dependencies {
            match self.store.find_dependency(below) {
                Ok(there) => log::debug!("{} is there: {}", below.image_name, there.id),
                Err(e) if e.kind() == Kind::NotFound => {
                    self.one(&Wanted::try_from(below)?, Some(below), above, done)?;
                }
                Err(e) => return Err(e),
            }
        }
        import.expected_id = Some(id);
        let source = ImageSource::Downloaded { path: here.path.clone(), from: here.from.clone() };
        self.store.import(&source, &import)
    }

    /// Simple discovery with each prefix, then meta discovery.
    fn find(&self, wanted: &Wanted, above: &[String]) -> Result<Here> {
        let not_above = |at: &String| {
            if !self.active.borrow().contains(at) {
                return Ok(());
            }
            let why = format!("it depends on itself: {} -> {wanted}", above.join(" -> "));
            Err(Error::new(Kind::Invalid, "fetch", wanted, why))
        };
        let mut tried = Vec::new();
        let usual = ["https://".to_owned()];
        let prefixes: &[String] =
            if self.options.discovery_prefixes.is_empty() { &usual } else { &self.options.discovery_prefixes };
        for prefix in prefixes {
            let at = wanted.simple(prefix, &self.platform);
            not_above(&at)?;
            if let Some(path) = at.strip_prefix("file://").or(at.starts_with('/').then_some(&*at)) {
                let path = PathBuf::from(path);
                if path.is_file() {
                    let from = show(&path);
                    return Ok(Here { at, path, from, signature: Signature::Beside, download: None });
                }
                tried.push(format!("{}: not there", show(&path)));
                continue;
            }
            let got = self.url(&at).and_then(|url| self.get(&url, &self.url(&format!("{at}.asc"))?, &at));
            match got {
                Ok(here) => return Ok(here),
                Err(error) => tried.push(Self::passed_over(error)?),
            }
        }
        for page in wanted.pages() {
            let (origin, found) = match self.page(&page, wanted.name()) {
                Ok(found) => found,
                Err(error) => {
                    tried.push(Self::passed_over(error)?);
                    continue;
                }
            };
            for template in &found {
                let (aci, asc) =
                    (wanted.fill(template, "aci", &self.platform), wanted.fill(template, "aci.asc", &self.platform));
                let (Some(aci), Some(asc)) = (aci, asc) else {
                    tried.push(format!("{template}: it wants a label that was not named"));
                    continue;
                };
                not_above(&aci)?;
                let told = |text: &str| self.client.told_by(&origin, Url::parse(text)?);
                let got = told(&aci).and_then(|url| self.get(&url, &told(&asc)?, &aci));
                match got {
                    Ok(here) => return Ok(here),
                    Err(error) => tried.push(Self::passed_over(error)?),
                }
            }
            if !found.is_empty() {
                break;
            }
        }
        Err(Error::new(Kind::NotFound, "find", wanted, format!("it is nowhere: {}", tried.join("; ")))
            .hint("discovery_prefixes in the configuration says where else to look"))
    }

    /// A place that has not what we look for is passed over; what came and is wrong is not.
    fn passed_over(error: Error) -> Result<String> {
        match error.kind() {
            Kind::Integrity | Kind::Limit | Kind::Busy => Err(error),
            _ => Ok(error.to_string()),
        }
    }

    fn url(&self, text: &str) -> Result<Url> {
        let mut url = Url::parse(text)?;
        url.is_tls = url.is_tls && self.client.speaks_tls(&url.host);
        Ok(url)
    }

    fn ask(&self, url: &Url) -> Result<super::http::Answer> {
        let answer = self.client.get(url, &[], None).map_err(Error::from)?;
        match answer.status {
            200 => Ok(answer),
            404 | 410 => Err(Error::new(Kind::NotFound, "fetch", url, "not there")),
            401 | 403 => Err(Error::new(Kind::Permission, "fetch", url, "it is not for us")),
            status => Err(Error::new(Kind::Io, "fetch", url, format!("it answers {status}"))),
        }
    }

    /// The templates of a page, and where they are from.
    fn page(&self, page: &str, name: &str) -> Result<(Url, Vec<String>)> {
        let slash = if page.contains('/') { "" } else { "/" };
        let url = self.url(&format!("https://{page}{slash}?ac-discovery=1"))?;
        let answer = self.ask(&url)?;
        // A redirect may have led elsewhere: there is where the page is from.
        let origin = answer.url.clone();
        let bytes = answer.small(MAX_PAGE_BYTES)?;
        let found = templates(&bytes, name);
        if found.is_empty() {
            return Err(Error::new(Kind::NotFound, "discover at", url, "it has no ac-discovery tag for this name"));
        }
        Ok((origin, found))
    }

    /// Fetch an archive, and its signature if a keyring is configured; `at` is what discovery made of its name.
    fn get(&self, url: &Url, asc: &Url, at: &str) -> Result<Here> {
        let answer = self.ask(url)?;
        let from = url.to_string();
        let most = self.options.limits.total_bytes.saturating_sub(self.fetched.get());
        let total: Option<u64> = answer.header("content-length").and_then(|text| text.parse().ok());
        if total.is_some_and(|total| total > most) {
            return Err(too_long(&from, most));
        }
        let key = data_encoding::HEXLOWER.encode(&Sha256::digest(from.as_bytes()));
        let download = self.store.download(&format!("aci-{key}"))?;
        match self.put(answer, total, most, &from, asc, &download) {
            Ok((path, signature)) => Ok(Here { at: at.to_owned(), path, from, signature, download: Some(download) }),
            // What a URL gives may change: there is nothing to go on from.
            Err(error) => Err(error.with_undo(download.done())),
        }
    }

    fn put(
        &self,
        answer: super::http::Answer,
        total: Option<u64>,
        most: u64,
        from: &str,
        asc: &Url,
        download: &Download,
    ) -> Result<(PathBuf, Signature)> {
        let path = download.path().join("image.aci");
        let fail = |e| Error::io("write", show(&path), e);
        let mut file = std::fs::File::create(&path).map_err(fail)?;
        let mut body = answer.reader();
        let mut buffer = vec![0; CHUNK];
        let mut read = 0;
        loop {
            let count = body.read(&mut buffer).map_err(|e| Error::io("fetch", from, e).with_kind(Kind::Io))?;
            if count == 0 {
                break;
            }
            read += count as u64;
            if read > most {
                return Err(too_long(from, most));
            }
            file.write_all(&buffer[..count]).map_err(fail)?;
            if let Some(parts) = &self.options.parts {
                parts(Part { name: from, read, total });
            }
        }
        if let Some(total) = total.filter(|total| *total != read) {
            return Err(Error::new(Kind::Integrity, "fetch", from, format!("it ends after {read} of {total} bytes")));
        }
        self.fetched.set(self.fetched.get() + read);
        let signature = self.signature(asc, download.path())?;
        Ok((path, signature))
    }

    fn signature(&self, url: &Url, dir: &Path) -> Result<Signature> {
        if self.store.policy().keyring.is_none() {
            log::info!("no keyring is configured: the signature {url} is not looked at");
            return Ok(Signature::Beside);
        }
        let missing = |e: Error| {
            Error::new(
                Kind::Integrity,
                "fetch signature",
                url,
                format!("a keyring is configured, and there is no signature: {e}"),
            )
        };
        let bytes = self.ask(url).map_err(missing)?.small(MAX_SIGNATURE_BYTES).map_err(|e: Failure| e.error)?;
        let path = dir.join("image.aci.asc");
        std::fs::write(&path, bytes).map_err(|e| Error::io("write", show(&path), e))?;
        Ok(Signature::File(path))
    }
}

fn too_long(from: &str, most: u64) -> Error {
    Error::new(
        Kind::Limit,
        "fetch",
        from,
        format!("it has more than {most} bytes, which all that is fetched for one image may have"),
    )
    .hint("[limits] total_bytes says how many are taken")
}
