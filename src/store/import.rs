//! Import of AppC images: an archive or a directory becomes `images/<id>`, whole and on the disk, or nothing does.
//!
//! The steps: stage on the store's own file system, hash and place in one pass, check, write manifest and index, `syncfs`
//! with its error checked, write and sync `meta.json`, rename without replacing, sync the directory of images. A rename that
//! finds the image there already is a second import of the same bytes: the one that is there is looked at and used.
//!
//! A directory is read as the archive that it would be (see `tarwrite`): its id is the SHA-512 of that archive, so the same
//! names, kinds, modes, owners, times, attributes, links and contents give the same id, and export gives the archive.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, RenameFlags, mkdirat, renameat_with};
use rustix::io::Errno;

use sha2::Sha512;

use super::limits::Limits;
use super::meta::{ImageKind, Meta, OnDisk, Origin, sha256_hex};
use super::names::Held;
use super::oci::Layout;
use super::place::{Again, Placed, Placer, normalize};
use super::signed::{Signature, same_as_signed, watched};
use super::staging::{self, Staging};
use super::stream::{self, Archive, ChunkReader, ProgressFn, Sink};
use super::tarread::{EndMarker, Member, TarReader};
use super::{Store, tarwrite};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::{ImageId, ImageRef};
use crate::image::Strictness;
use crate::image::appc::{Checked, Manifest};
use crate::image::oci::Platform;
use crate::image::signature::Signer;
use crate::index::{Builder, Index, What, Whiteouts};
use crate::paths::image;

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// A file (or FIFO) that is an ACI, an OCI layout, a docker archive, or a root filesystem (then a name must be given): a tar
    /// archive, plain or in gzip, bzip2, xz or zstd; its bytes tell, not its name.
    Archive(PathBuf),
    /// A directory that holds `manifest` and `rootfs`, or that is a root filesystem (then a name must be given).
    Directory(PathBuf),
    /// An ACI on standard input.
    Stdin,
    /// The tree of another image of the store ([`Store::flatten`]).
    Flattened(ImageId),
    /// An archive or OCI layout that was fetched, and where it came from, for people.
    Downloaded {
        /// Where it lies.
        path: PathBuf,
        /// Its URL, or what comes nearest.
        from: String,
    },
}

impl ImageSource {
    /// What lies at `path`; `-` is standard input.
    pub fn at(path: &Path) -> Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(ImageSource::Stdin);
        }
        let meta = std::fs::metadata(path).map_err(|e| {
            let error = Error::io("find", show(path), e);
            if error.kind() == Kind::NotFound {
                error.hint("check the path; `fsprov image pull` gets an image from a registry")
            } else {
                error
            }
        })?;
        Ok(if meta.is_dir() { ImageSource::Directory(path.into()) } else { ImageSource::Archive(path.into()) })
    }
}

impl std::fmt::Display for ImageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ImageSource::Archive(path) | ImageSource::Directory(path) => f.write_str(&show(path)),
            ImageSource::Stdin => f.write_str("standard input"),
            ImageSource::Flattened(id) => write!(f, "the layers of {id}"),
            ImageSource::Downloaded { from, .. } => f.write_str(from),
        }
    }
}

/// How to import.
#[derive(Clone, Default)]
pub struct ImportOptions {
    /// The one name that it gets, in place of those that it came with. Needed for a directory without manifest, where it must be an AC identifier.
    pub name: Option<String>,
    /// What becomes of it if another image holds its name.
    pub held: Held,
    /// The id it must turn out to have.
    pub expected_id: Option<ImageId>,
    /// How strictly its manifest is read.
    pub strictness: Strictness,
    /// What it may ask for.
    pub limits: Limits,
    /// Which image of an OCI index or docker archive: its name there (`debian:12`, or a tag).
    pub reference: Option<String>,
    /// For which platform, of an OCI index; this host's otherwise.
    pub platform: Option<Platform>,
    /// Where its signature is, if the store's policy asks for one.
    pub signature: Signature,
    /// Told of progress.
    pub progress: Option<ProgressFn>,
}

impl std::fmt::Debug for ImportOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImportOptions")
            .field("name", &self.name)
            .field("expected_id", &self.expected_id)
            .field("strictness", &self.strictness)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Did an import make the image?
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It did.
    Created,
    /// The same image was there.
    Existing,
}

/// An image imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Its id.
    pub id: ImageId,
    /// Its first name.
    pub name: String,
    /// Whether it was there before.
    pub outcome: Outcome,
    /// Whether the tree on disk says all.
    pub on_disk: OnDisk,
    /// Rules that its manifest breaks and that were let pass.
    pub warnings: Vec<String>,
}

/// What one pass over an archive gave.
enum Unpacked {
    Appc(Box<Appc>),
    /// It is an OCI layout or a docker archive, unpacked to be read.
    Layout(PathBuf),
}

struct Appc {
    manifest: Vec<u8>,
    placed: Placed,
    index: Builder,
}

impl Store {
    /// Import an image: an AppC archive or directory, an OCI layout, a docker archive. Importers of one image at the same time
    /// all succeed, and one copy is there.
    ///
    /// ```
    /// use fsprov::store::{ImageSource, ImportOptions, Outcome, Store};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let (state_root, rootfs) = (dir.path().join("state"), dir.path().join("rootfs"));
    /// std::fs::create_dir_all(rootfs.join("etc"))?;
    /// std::fs::write(rootfs.join("etc/hostname"), "box")?;
    /// let store = Store::open(&fsprov::paths::StatePaths::new(state_root))?;
    /// let options = ImportOptions { name: Some("example.com/box".into()), ..ImportOptions::default() };
    /// let imported = store.import(&ImageSource::at(&rootfs)?, &options)?;
    /// assert_eq!(imported.outcome, Outcome::Created);
    /// assert_eq!(store.import(&ImageSource::at(&rootfs)?, &options)?.outcome, Outcome::Existing);
    /// assert_eq!(store.list()?[0].names, ["example.com/box"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Errors: [`Kind::Invalid`] for an archive or manifest that breaks the rules, [`Kind::Limit`] past
    /// [`ImportOptions::limits`], [`Kind::Integrity`] if it is not the image expected, [`Kind::Usage`] for a directory
    /// without manifest and name.
    pub fn import(&self, source: &ImageSource, options: &ImportOptions) -> Result<Imported> {
        if let Some(name) = &options.name {
            check_name(name)?;
        }
        staging::clean(&self.paths)?;
        self.import_source(source, options).map_err(|e| e.within("import", source))
    }

    fn import_source(&self, source: &ImageSource, options: &ImportOptions) -> Result<Imported> {
        match source {
            ImageSource::Downloaded { path, .. } if path.is_dir() => {
                self.refuse_unsigned(source, false, "a pulled image has no detached signature")?;
                let why = "not an OCI layout";
                let layout = Layout::at(path, &source.to_string())?;
                let layout = layout.ok_or_else(|| Error::new(Kind::Invalid, "read", source, why))?;
                self.import_layout(&layout, source, options)
            }
            ImageSource::Archive(path) | ImageSource::Downloaded { path, .. } => {
                let archive = Archive::open(path)?;
                self.import_archive(archive, source, options)
            }
            ImageSource::Flattened(id) => Err(Error::new(Kind::Usage, "import", id, "it is in the store")
                .hint("Store::flatten makes one layer of it")),
            ImageSource::Stdin => {
                let input = Box::new(std::io::stdin());
                let archive = Archive { name: source.to_string(), input, total: None };
                self.import_archive(archive, source, options)
            }
            ImageSource::Directory(path) => {
                self.refuse_unsigned(
                    source,
                    options.signature == Signature::Waived,
                    "a directory has no bytes that were signed",
                )?;
                if let Some(layout) = Layout::at(path, &source.to_string())? {
                    return self.import_layout(&layout, source, options);
                }
                if let Signature::File(file) = &options.signature {
                    return Err(Error::new(
                        Kind::Usage,
                        "check signature of",
                        source,
                        "a directory has no bytes that were signed",
                    )
                    .hint(format!("{} is of an archive: import that", show(file))));
                }
                let tree = tarwrite::DirectoryImage::open(path, options.name.as_deref(), &options.limits)?;
                self.import_stream(|sink| tree.write(sink), source, options, None)
            }
        }
    }

    /// The AppC manifest of an archive, strictly or not, and the id it will have. Nothing is placed.
    pub(crate) fn peek(path: &PathBuf, options: &ImportOptions) -> Result<(ImageId, Manifest)> {
        let name = show(path);
        let producer = Archive::open(path)?.producer(&options.limits, None);
        let (bytes, digest) = stream::run::<Sha512, _>(producer, |reader| {
            let mut tar = TarReader::new(reader, name.clone(), options.limits.clone(), EndMarker::Required);
            let mut found = None;
            while let Some(member) = tar.next()? {
                if matches!(place_of(&normalize(&member.path, &options.limits, false)?), Place::Manifest) {
                    found = Some(manifest_bytes(&mut tar, &member, &options.limits)?);
                }
            }
            tar.finish()?;
            found.ok_or_else(|| {
                Error::new(Kind::Invalid, "read archive", &name, "it has no manifest: not an AppC image")
            })
        })?;
        Ok((ImageId::from_sha512(&digest.into()), Manifest::parse(&bytes, options.strictness)?.manifest))
    }

    fn import_archive(&self, archive: Archive, source: &ImageSource, options: &ImportOptions) -> Result<Imported> {
        let signed = match source {
            ImageSource::Archive(path) | ImageSource::Downloaded { path, .. } => {
                self.check_signature(path, &options.signature)?
            }
            _ if self.policy.keyring.is_some() && options.signature != Signature::Waived => {
                let why = "a keyring is configured, and a stream has no signature";
                return Err(Error::new(Kind::Integrity, "check signature of", source, why)
                    .hint("put it into a file first, or take it without one by --no-signature"));
            }
            _ => None,
        };
        let Some(signed) = signed else {
            self.refuse_unsigned(
                source,
                options.signature == Signature::Waived,
                "no keyring is configured to check it by",
            )?;
            let producer = archive.producer(&options.limits, options.progress.clone());
            return self.import_stream(producer, source, options, None);
        };
        let name = archive.name.clone();
        let (archive, state) = watched(archive);
        let producer = archive.producer(&options.limits, options.progress.clone());
        // At the very end of the stream, which every import waits for.
        let checked = move |sink: &mut Sink| {
            producer(sink)?;
            same_as_signed(&name, &state, &signed.raw)
        };
        self.import_stream(checked, source, options, Some(signed.by))
    }

    pub(super) fn import_stream(
        &self,
        produce: impl FnOnce(&mut Sink) -> Result<()> + Send,
        source: &ImageSource,
        options: &ImportOptions,
        signed_by: Option<Signer>,
    ) -> Result<Imported> {
        let staging = Staging::make(&self.paths, "import")?;
        let name = source.to_string();
        let (unpacked, digest) =
            stream::run::<Sha512, _>(produce, |reader| unpack(reader, &name, staging.path(), options))?;
        let unpacked = match unpacked {
            Unpacked::Appc(unpacked) => *unpacked,
            Unpacked::Layout(at) => {
                let why = "it looks like an OCI layout or docker archive, and lacks index.json and manifest.json";
                let layout = Layout::at(&at, &name)?.ok_or_else(|| Error::new(Kind::Invalid, "read", &name, why))?;
                return self.import_layout(&layout, source, options);
            }
        };
        let id = ImageId::from_sha512(&digest.into());
        if let Some(expected) = &options.expected_id
            && *expected != id
        {
            return Err(Error::new(Kind::Integrity, "check id", id.short(), format!("its id is {id}, not {expected}")));
        }
        let Checked { manifest, warnings } = Manifest::parse(&unpacked.manifest, options.strictness)?;
        for warning in &warnings {
            log::warn!("{name}: {warning}");
        }
        if let Some(signer) = &signed_by {
            self.check_signer(signer, &manifest.name)?;
        }
        let mut meta = Meta::new(id, ImageKind::Appc, name);
        meta.signed_by = signed_by;
        meta.origin = Origin::of(source, options);
        let names = [options.name.clone().unwrap_or_else(|| manifest.name.clone())];
        meta.labels = manifest.labels.iter().map(|pair| (pair.name.clone(), pair.value.clone())).collect();
        meta.entries = unpacked.placed.entries;
        meta.bytes = unpacked.placed.bytes;
        meta.manifest_sha256 = Some(sha256_hex(&unpacked.manifest));
        meta.on_disk = if unpacked.placed.is_exact() { OnDisk::Exact } else { OnDisk::IndexOnly };
        if unpacked.placed.xattrs_dropped > 0 {
            log::warn!(
                "{}: {} extended attributes were left out: only user.* and security.capability are taken",
                meta.source,
                unpacked.placed.xattrs_dropped
            );
        }
        fault::point("store.manifest")?;
        let dir = staging.path().join("image");
        write_new(&dir.join(image::MANIFEST), &unpacked.manifest)?;
        fault::point("store.index")?;
        let mut index = unpacked.index;
        if !manifest.dependencies.is_empty() || !manifest.path_whitelist.is_empty() {
            let own = dir.join(image::OWN_INDEX);
            write_index(&own, index)?;
            index = self.render(&mut meta, &manifest, &Index::open(&own)?, staging.path())?;
        }
        write_index(&dir.join(image::INDEX), index)?;
        let gone = || Error::new(Kind::Busy, "publish", source, "what it needs was taken away");
        let (outcome, meta) = self.publish(&staging, &dir, meta, &[], &names, options.held)?.ok_or_else(gone)?;
        Ok(Imported {
            name: meta.called(options.name.as_deref()),
            id: meta.id,
            outcome,
            on_disk: meta.on_disk,
            warnings,
        })
    }

    /// Bring a staged image, `dir`, and its staged layers to the disk, and give them their places and the image these names. `None`: a
    /// layer that the image needs and that is not among `layers` is no more.
    pub(super) fn publish(
        &self,
        staging: &Staging,
        dir: &Path,
        mut meta: Meta,
        layers: &[(ImageId, PathBuf)],
        names: &[String],
        held: Held,
    ) -> Result<Option<(Outcome, Meta)>> {
        staging.sync()?;
        let to = self.paths.image(&meta.id);
        let _in_use = self.lock_shared()?;
        let naming = self.lock_names()?;
        // One that is there keeps the names that it has.
        if self.check_shallow(&meta.id).is_err() {
            self.settle_names(&mut meta, names, held)?;
        }
        fault::point("store.meta")?;
        meta.write(&dir.join(image::META))?;
        fault::point("store.publish")?;
        self.publish_layers(layers)?;
        let is_gone = |below: &ImageId| self.check_shallow(below).is_err();
        if meta.layers.iter().any(|layer| self.check_layer(layer).is_err()) || meta.dependencies.iter().any(is_gone) {
            return Ok(None);
        }
        // A damaged image may lie in the place: it is moved away, once.
        for _ in 0..2 {
            fault::point("store.rename")?;
            match renameat_with(CWD, dir, CWD, &to, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    let synced =
                        fault::point("store.parent").and_then(|()| crate::sys::durable::sync_dir(&self.paths.images()));
                    // What may not last is not there: the next import starts afresh.
                    if let Err(error) = synced {
                        return Err(error.with_undo(rename_back(&to, dir)));
                    }
                    self.take_from_others(&meta)?;
                    return Ok(Some((Outcome::Created, meta)));
                }
                Err(Errno::EXIST | Errno::NOTEMPTY) => {
                    match self.check_shallow(&meta.id) {
                        Ok(there) => {
                            drop(naming);
                            if meta.signed_by.is_some() && there.signed_by != meta.signed_by {
                                self.change_meta(&meta.id, |there| there.signed_by.clone_from(&meta.signed_by))?;
                            }
                            return Ok(Some((Outcome::Existing, self.give_names(&meta.id, names, held)?)));
                        }
                        Err(error) => log::warn!("{error}: it is replaced by this import"),
                    }
                    staging::remove_aside(&self.paths, &to)?;
                }
                Err(e) => return Err(Error::sys("publish", show(&to), e)),
            }
        }
        Err(Error::new(Kind::Busy, "publish", show(&to), "another process puts damaged images there"))
    }
}

fn rename_back(from: &Path, to: &Path) -> Result<()> {
    renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(|e| Error::sys("take back", show(from), e))
}

/// A name that people give: as AC identifiers are, and with `:` and `@` as OCI references have them.
pub(super) fn check_name(name: &str) -> Result<()> {
    let refuse = |why| {
        Err(Error::new(Kind::Usage, "name image", format!("{name:?}"), why)
            .hint("write a name such as debian or example.com/app:1.0"))
    };
    if name.is_empty() || name.len() > ImageRef::MAX_NAME_LEN || name.chars().any(|c| c.is_control() || c == ' ') {
        return refuse("a name is 1 to 512 printable characters without spaces");
    }
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return refuse("a name cannot be a path, or have . or .. between its slashes");
    }
    match ImageRef::parse(name.as_ref())? {
        ImageRef::Path(_) => refuse("a name cannot begin with /, ./ or ../"),
        ImageRef::Id(_) => refuse("it is an image id"),
        ImageRef::Name(_) => Ok(()),
    }
}

fn create_new(path: &Path) -> Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    fault::point("store.write_new")?;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|e| Error::io("write", show(path), e))
}

pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write as _;
    create_new(path)?.write_all(bytes).map_err(|e| Error::io("write", show(path), e))
}

pub(super) fn write_index(path: &Path, index: Builder) -> Result<()> {
    let mut out = std::io::BufWriter::with_capacity(64 << 10, create_new(path)?);
    index.finish_into(&mut out).map_err(|e| e.within("write", show(path)))
}

/// What an archive turns out to be, by the first name in it that is not its top.
enum Form {
    /// Not known yet; the entry for its top, if there was one.
    Open(Option<Member>),
    /// `manifest` and `rootfs`.
    Appc,
    /// A root filesystem by itself: it gets a manifest.
    Tree,
}

/// Place an ACI in `staging/image`, its tree in `staging/image/rootfs`; what turns out to be a layout in `staging/layout`.
/// A root filesystem by itself is taken where a name is given.
fn unpack(reader: &mut ChunkReader, name: &str, staging: &Path, options: &ImportOptions) -> Result<Unpacked> {
    fault::point("store.unpack")?;
    let limits = &options.limits;
    let rootfs = staging.join("image").join(image::ROOTFS);
    for dir in [&staging.join("image"), &rootfs] {
        mkdirat(CWD, dir, Mode::RWXU).map_err(|e| Error::sys("make", show(dir), e))?;
    }
    let root = std::fs::File::open(&rootfs).map_err(|e| Error::io("open", show(&rootfs), e))?;
    let mut placer = Placer::new(root.into(), limits.clone(), Again::Refuse, one_layer(staging)?);
    let mut tar = TarReader::new(reader, name.to_owned(), limits.clone(), EndMarker::Required);
    let mut manifest = None;
    let mut has_root = false;
    let mut form = Form::Open(None);
    while let Some(mut member) = tar.next()? {
        let path = normalize(&member.path, limits, false)?;
        if let Form::Open(top) = &mut form {
            if super::oci::is_layout_name(&path) {
                let at = staging.join("layout");
                unpack_layout(member, path, &mut tar, &at, limits)?;
                return Ok(Unpacked::Layout(at));
            }
            match place_of(&path) {
                Place::Top if matches!(member.what, What::Directory) => {
                    *top = Some(member);
                    continue;
                }
                Place::Else => {
                    manifest = Some(made_manifest(&member, options)?);
                    has_root = true;
                    if let Some(top) = top.take() {
                        placer.place(top, Vec::new(), |_| Ok(Vec::new()), |_| Ok(()))?;
                    }
                    form = Form::Tree;
                }
                _ => form = Form::Appc,
            }
        }
        let is_tree = matches!(form, Form::Tree);
        match if is_tree { Place::Root(&path) } else { place_of(&path) } {
            Place::Top if matches!(member.what, What::Directory) => {}
            Place::Manifest if matches!(member.what, What::File { .. }) => {
                let bytes = manifest_bytes(&mut tar, &member, limits)?;
                if manifest.replace(bytes).is_some() {
                    return Err(refuse(&member, "the archive has this name twice"));
                }
            }
            Place::Manifest => return Err(refuse(&member, "the manifest must be a regular file")),
            Place::Root(inside) => {
                has_root = true;
                let inside = inside.to_vec();
                member.path.clear();
                let target = |raw: &[u8]| {
                    let path = normalize(raw, limits, false)?;
                    match if is_tree { Place::Root(&path) } else { place_of(&path) } {
                        Place::Root(target) if !target.is_empty() => Ok(target.to_vec()),
                        _ => Err(refuse_path(raw, "a hard link's target lies outside the root filesystem")),
                    }
                };
                placer.place(member, inside, target, |take| tar.body(take))?;
            }
            Place::Top | Place::Else => return Err(refuse(&member, NOTHING_ELSE)),
        }
    }
    tar.finish()?;
    let missing = |what| {
        Error::new(Kind::Invalid, "read archive", name, format!("it has no {what} at its top: not an AppC image"))
    };
    let manifest = manifest.ok_or_else(|| missing("manifest"))?;
    if !has_root {
        return Err(missing("rootfs"));
    }
    let (placed, index) = placer.finish()?;
    Ok(Unpacked::Appc(Box::new(Appc { manifest, placed, index })))
}

/// An index with one layer begun, of which what is too much for memory goes to `dir`.
pub(super) fn one_layer(dir: &Path) -> Result<Builder> {
    let mut index = Builder::in_dir(dir);
    index.begin_layer(Whiteouts::Plain)?;
    Ok(index)
}

const NOTHING_ELSE: &str = "an AppC image holds manifest and rootfs at its top, and nothing else";

/// The manifest of a root filesystem that came by itself; `first` is its first entry.
fn made_manifest(first: &Member, options: &ImportOptions) -> Result<Vec<u8>> {
    match &options.name {
        Some(name) => tarwrite::made_manifest(name),
        None => Err(refuse(first, NOTHING_ELSE).hint("a root filesystem by itself needs a name: --name NAME")),
    }
}

/// Place the files of a layout below `at`: they are read from there, since an archive may have them in any order.
fn unpack_layout(
    first: Member,
    path: Vec<u8>,
    tar: &mut TarReader<&mut ChunkReader>,
    at: &Path,
    limits: &Limits,
) -> Result<()> {
    mkdirat(CWD, at, Mode::RWXU).map_err(|e| Error::sys("make", show(at), e))?;
    let root = std::fs::File::open(at).map_err(|e| Error::io("open", show(at), e))?;
    let mut placer = Placer::new(root.into(), limits.clone(), Again::Refuse, one_layer(at)?);
    let mut next = Some((first, path));
    while let Some((mut member, path)) = next.take() {
        if !matches!(member.what, What::File { .. } | What::Directory | What::Symlink(_)) {
            return Err(refuse(&member, "a layout has files and directories"));
        }
        // The files are ours to read, whatever their modes.
        (member.mode, member.uid, member.gid) = (0o700, 0, 0);
        member.xattrs.clear();
        if !path.is_empty() {
            placer.place(member, path, |_| Ok(Vec::new()), |take| tar.body(take))?;
        }
        if let Some(member) = tar.next()? {
            let path = normalize(&member.path, limits, false)?;
            next = Some((member, path));
        }
    }
    tar.finish()
}

enum Place<'a> {
    Top,
    Manifest,
    /// In the tree, at this path.
    Root(&'a [u8]),
    Else,
}

fn place_of(path: &[u8]) -> Place<'_> {
    match path {
        b"" => Place::Top,
        b"manifest" => Place::Manifest,
        b"rootfs" => Place::Root(&[]),
        path => path.strip_prefix(b"rootfs/").map_or(Place::Else, Place::Root),
    }
}

fn refuse(member: &Member, why: &'static str) -> Error {
    refuse_path(&member.path, why)
}

fn refuse_path(path: &[u8], why: &'static str) -> Error {
    let shown = String::from_utf8_lossy(&path[..path.len().min(256)]).into_owned();
    Error::new(Kind::Invalid, "place entry", format!("{shown:?}"), why)
}

fn manifest_bytes(tar: &mut TarReader<&mut ChunkReader>, member: &Member, limits: &Limits) -> Result<Vec<u8>> {
    let What::File { size, .. } = member.what else {
        return Err(refuse(member, "the manifest must be a regular file"));
    };
    if size > limits.manifest_bytes {
        let why = format!("the manifest has {size} bytes: at most {} are taken", limits.manifest_bytes);
        return Err(Error::new(Kind::Limit, "read", "manifest", why));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    tar.body(|content| {
        match content {
            super::tarread::Content::Data(data) => bytes.extend_from_slice(data),
            super::tarread::Content::Hole(length) => bytes.resize(bytes.len() + length as usize, 0),
        }
        Ok(())
    })?;
    Ok(bytes)
}
