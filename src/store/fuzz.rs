//! Entry points for the fuzzer, and for tests: the readers of bytes from outside, with small limits.

use std::io::Read as _;
use std::path::Path;

use sha2::Digest as _;

use super::archive::apart::one_layer;
use super::archive::compression::{Compression, decoder};
use super::archive::digest::Sha512;
use super::archive::input::check_ratio;
use super::archive::read::{BLOCK, Content, EndMarker, Member, TarReader};
use super::archive::unpack::{Again, Placer, normalize};
use super::limits::Limits;
use super::meta::Meta;
use crate::error::{Error, Result, show};
use crate::index::{Builder, Index, What, Whiteouts};

fn limits() -> Limits {
    Limits {
        entries: 1000,
        total_bytes: 1 << 20,
        file_bytes: 1 << 20,
        ratio_floor: 64 << 10,
        extension_bytes: 64 << 10,
        sparse_pieces: 1000,
        ..Limits::default()
    }
}

/// Give every block of an archive the checksum that it should have: how a change gets past it. Gives whole blocks.
pub fn seal(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    for block in archive.chunks_exact_mut(BLOCK).filter(|block| block.iter().any(|b| *b != 0)) {
        block[148..156].fill(b' ');
        let mut sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        for at in (148..154).rev() {
            block[at] = b'0' + (sum & 7) as u8;
            sum >>= 3;
        }
        block[154] = 0;
    }
}

/// Read an archive from memory as an import would, placing nothing; gives the index of what it holds.
pub fn read(archive: &[u8]) -> Result<Builder> {
    let limits = limits();
    let mut tar = TarReader::new(archive, "archive".into(), limits.clone(), EndMarker::Optional);
    let mut index = Builder::new();
    index.begin_layer(Whiteouts::Oci)?;
    while let Some(member) = tar.next()? {
        let path = normalize(&member.path, &limits, true)?;
        let mut at = 0;
        tar.body(|content| {
            at += match content {
                Content::Data(data) => data.len() as u64,
                Content::Hole(length) => length,
            };
            Ok(())
        })?;
        let mut what = member.what;
        match &mut what {
            What::File { size, .. } => assert_eq!(at, *size, "the body is as long as the entry says"),
            What::HardLink(target) => *target = normalize(target, &limits, true)?,
            _ => assert_eq!(at, 0, "only files have a body"),
        }
        let Member { mode, uid, gid, mtime, xattrs, .. } = member;
        index.add(crate::index::Entry { path, what, mode, uid, gid, mtime, xattrs })?;
    }
    tar.finish()?;
    Ok(index)
}

/// Decompress an archive in memory by the decoder of an import, with the limits of one, and hash it. In this thread: what hands the bytes from one
/// process to the next does not look at them.
pub fn stream(archive: &[u8]) -> Result<[u8; 64]> {
    let limits = limits();
    let mut bytes = decoder(Compression::of(archive), archive, &limits, "archive")?;
    let (mut sha, mut buffer, mut grown) = (Sha512::new(), vec![0; 64 << 10], 0);
    loop {
        let count = bytes.read(&mut buffer).map_err(|e| Error::io("read", "archive", e))?;
        if count == 0 {
            return Ok(sha.finalize().into());
        }
        grown += count as u64;
        check_ratio(&limits, "archive", archive.len() as u64, grown)?;
        sha.update(&buffer[..count]);
    }
}

/// Place an archive below `dir`, an empty directory of the caller's, as a layer (`replace`) or as an AppC image's tree is.
pub fn place(archive: &[u8], dir: &Path, replace: bool) -> Result<Index> {
    let limits = limits();
    let root = std::fs::File::open(dir).map_err(|e| Error::io("open", show(dir), e))?;
    let again = if replace { Again::Replace } else { Again::Refuse };
    let mut placer = Placer::new(
        root.into(),
        limits.clone(),
        again,
        one_layer(&std::env::temp_dir())?,
        rustix::process::geteuid().is_root(),
    );
    let mut tar = TarReader::new(archive, "archive".into(), limits.clone(), EndMarker::Optional);
    while let Some(member) = tar.next()? {
        let path = normalize(&member.path, &limits, true)?;
        let target = |raw: &[u8]| normalize(raw, &limits, true);
        placer.place(member, path, target, |take| tar.body(take))?;
    }
    tar.finish()?;
    Index::from_bytes(placer.finish()?.1.finish()?)
}

/// Read `meta.json`.
pub fn meta(bytes: &[u8]) -> Result<Meta> {
    Meta::parse(bytes, "meta.json")
}

/// Read a docker archive's `manifest.json`.
pub fn docker(bytes: &[u8]) -> Result<Vec<crate::image::oci::DockerImage>> {
    crate::image::parse_json("manifest.json", bytes)
}
