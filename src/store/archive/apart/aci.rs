//! The unpacker at work: parses an archive, and places what it holds below one directory made for it.

use std::io::{BufWriter, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use super::super::read::{Content, EndMarker, Member, TarReader};
use super::super::unpack::{Again, Placer, normalize};
use super::super::whiteout::{Opaque, make_whiteouts};
use super::super::write;
use super::Handed;
use super::work::{Bytes, Job, Task, Tools, Unpacked};
use crate::child::channel::Channel;
use crate::error::{Error, Kind, Result};
use crate::fault;
use crate::index::What;
use crate::store::limits::Limits;

pub(super) fn work(job: &Job, fds: Vec<OwnedFd>, channel: &Channel) -> Result<Unpacked> {
    let mut fds = Handed(fds.into_iter());
    let mut reader = Bytes::take(&mut fds, channel)?;
    let manifest = fds.file()?;
    // The diff id tells a whole layer from one cut off.
    let end = if matches!(job.task, Task::Layer) { EndMarker::Optional } else { EndMarker::Required };
    let tar = TarReader::new(&mut reader, job.name.clone(), job.limits.clone(), end);
    let (mut unpacked, bytes) = match &job.task {
        Task::Image { name } => place_image(tar, job, name.as_deref(), Tools::take(&mut fds)?)?,
        Task::Layer => place_layer(tar, job, Tools::take(&mut fds)?)?,
        Task::Manifest => (Unpacked::default(), find_manifest(tar, job)?),
    };
    manifest.write_all_at(&bytes, 0).map_err(|e| Error::io("write", "manifest", e))?;
    unpacked.manifest_length = bytes.len() as u64;
    Ok(unpacked)
}

fn find_manifest(mut tar: Tar<'_, '_>, job: &Job) -> Result<Vec<u8>> {
    let mut found = None;
    while let Some(member) = tar.next()? {
        if matches!(place_of(&normalize(&member.path, &job.limits, false)?), At::Manifest) {
            found = Some(manifest_bytes(&mut tar, &member, &job.limits)?);
        }
    }
    tar.finish()?;
    found.ok_or_else(|| Error::new(Kind::Invalid, "read archive", &job.name, "it has no manifest: not an AppC image"))
}

type Tar<'a, 'b> = TarReader<&'a mut Bytes<'b>>;

/// What an archive turns out to be, by the first name in it that is not its top.
enum ArchiveKind {
    /// Not known yet; the entry for its top, if there was one.
    Open(Option<Member>),
    /// `manifest` and `rootfs`.
    Appc,
    /// A root filesystem by itself: it gets a manifest.
    Tree,
}

/// Place the tree of an ACI, or all of a layout. A root filesystem by itself is taken where a name is given.
fn place_image(mut tar: Tar<'_, '_>, job: &Job, name: Option<&str>, tools: Tools) -> Result<(Unpacked, Vec<u8>)> {
    fault::point("store.unpack")?;
    let limits = &job.limits;
    let mut placer = tools.placer(job, Again::Refuse)?;
    let mut manifest = None;
    let mut has_root = false;
    let mut kind = ArchiveKind::Open(None);
    while let Some(mut member) = tar.next()? {
        let path = normalize(&member.path, limits, false)?;
        if let ArchiveKind::Open(top) = &mut kind {
            if is_layout_name(&path) {
                place_layout(member, path, &mut tar, placer, limits)?;
                return Ok((Unpacked { is_layout: true, ..Unpacked::default() }, Vec::new()));
            }
            match place_of(&path) {
                At::Top if matches!(member.what, What::Directory) => {
                    *top = Some(member);
                    continue;
                }
                At::Else => {
                    manifest = Some(made_manifest(&member, name)?);
                    has_root = true;
                    if let Some(top) = top.take() {
                        placer.place(top, Vec::new(), |_| Ok(Vec::new()), |_| Ok(()))?;
                    }
                    kind = ArchiveKind::Tree;
                }
                _ => kind = ArchiveKind::Appc,
            }
        }
        let is_tree = matches!(kind, ArchiveKind::Tree);
        match if is_tree { At::Root(&path) } else { place_of(&path) } {
            At::Top if matches!(member.what, What::Directory) => {}
            At::Manifest if matches!(member.what, What::File { .. }) => {
                let bytes = manifest_bytes(&mut tar, &member, limits)?;
                if manifest.replace(bytes).is_some() {
                    return Err(refuse(&member, "the archive has this name twice"));
                }
            }
            At::Manifest => return Err(refuse(&member, "the manifest must be a regular file")),
            At::Root(inside) => {
                has_root = true;
                let inside = inside.to_vec();
                member.path.clear();
                let target = |raw: &[u8]| {
                    let path = normalize(raw, limits, false)?;
                    match if is_tree { At::Root(&path) } else { place_of(&path) } {
                        At::Root(target) if !target.is_empty() => Ok(target.to_vec()),
                        _ => Err(refuse_path(raw, "a hard link's target lies outside the root filesystem")),
                    }
                };
                placer.place(member, inside, target, |take| tar.body(take))?;
            }
            At::Top | At::Else => return Err(refuse(&member, NOTHING_ELSE)),
        }
    }
    tar.finish()?;
    let missing = |what| {
        Error::new(Kind::Invalid, "read archive", &job.name, format!("it has no {what} at its top: not an AppC image"))
    };
    let manifest = manifest.ok_or_else(|| missing("manifest"))?;
    if !has_root {
        return Err(missing("rootfs"));
    }
    let (placed, index) = placer.finish()?;
    tools.write_index(index)?;
    Ok((Unpacked { placed, ..Unpacked::default() }, manifest))
}

/// Do these names lie at the top of a layout or docker archive, and not of an ACI?
fn is_layout_name(path: &[u8]) -> bool {
    let top = path.split(|b| *b == b'/').next().unwrap_or(path);
    let stem = top.split(|b| *b == b'.').next().unwrap_or(top);
    matches!(top, b"oci-layout" | b"index.json" | b"blobs" | b"manifest.json" | b"repositories")
        || (stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit))
}

const NOTHING_ELSE: &str = "an AppC image holds manifest and rootfs at its top, and nothing else";

/// The manifest of a root filesystem that came by itself; `first` is its first entry.
fn made_manifest(first: &Member, name: Option<&str>) -> Result<Vec<u8>> {
    match name {
        Some(name) => write::made_manifest(name),
        None => Err(refuse(first, NOTHING_ELSE).hint("a root filesystem by itself needs a name: --name NAME")),
    }
}

/// Place the files of a layout: they are read from there, since an archive may have them in any order.
fn place_layout(
    first: Member,
    path: Vec<u8>,
    tar: &mut Tar<'_, '_>,
    mut placer: Placer,
    limits: &Limits,
) -> Result<()> {
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

/// Place a layer.
fn place_layer(mut tar: Tar<'_, '_>, job: &Job, tools: Tools) -> Result<(Unpacked, Vec<u8>)> {
    let limits = &job.limits;
    let mut placer = tools.placer(job, Again::Replace)?;
    while let Some(member) = tar.next()? {
        let path = normalize(&member.path, limits, true)?;
        if path.is_empty() && !matches!(member.what, What::Directory) {
            return Err(Error::new(Kind::Invalid, "place entry", "\"/\"", "the root is not a directory"));
        }
        let target = |raw: &[u8]| normalize(raw, limits, true);
        placer.place(member, path, target, |take| tar.body(take))?;
    }
    tar.finish()?;
    let (placed, mut index) = placer.finish()?;
    let mut list = BufWriter::new(&tools.opaque);
    let opaque = if job.lists_opaque { Opaque::Listed(&mut list) } else { Opaque::Set };
    let whiteouts = make_whiteouts(&tools.root, &mut index, opaque)?;
    list.flush().map_err(|e| Error::io("write", "list of opaque directories", e))?;
    drop(list);
    tools.write_index(index)?;
    Ok((Unpacked { placed, whiteouts, ..Unpacked::default() }, Vec::new()))
}

enum At<'a> {
    Top,
    Manifest,
    /// In the tree, at this path.
    Root(&'a [u8]),
    Else,
}

fn place_of(path: &[u8]) -> At<'_> {
    match path {
        b"" => At::Top,
        b"manifest" => At::Manifest,
        b"rootfs" => At::Root(&[]),
        path => path.strip_prefix(b"rootfs/").map_or(At::Else, At::Root),
    }
}

fn refuse(member: &Member, why: &'static str) -> Error {
    refuse_path(&member.path, why)
}

fn refuse_path(path: &[u8], why: &'static str) -> Error {
    let shown = String::from_utf8_lossy(&path[..path.len().min(256)]).into_owned();
    Error::new(Kind::Invalid, "place entry", format!("{shown:?}"), why)
}

fn manifest_bytes(tar: &mut Tar<'_, '_>, member: &Member, limits: &Limits) -> Result<Vec<u8>> {
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
            Content::Data(data) => bytes.extend_from_slice(data),
            Content::Hole(length) => bytes.resize(bytes.len() + length as usize, 0),
        }
        Ok(())
    })?;
    Ok(bytes)
}
