//! Reads a tar stream: ustar, GNU and PAX, sparse files too. Places nothing and trusts nothing.
//!
//! Stricter than tar(1) where tools are known to disagree about one archive, since an archive that two readers read
//! differently is how content is smuggled past a check (CVE-2025-62518, CVE-2026-33055): a malformed PAX record, two
//! records for one thing, data behind an entry that has none, a lone zero block. Memory is bounded by
//! [`Limits::extension_bytes`] whatever the archive says.

use std::io::BufRead;

use super::pax::{Extension, Piece, parse_records};
use crate::error::{Error, Kind, Result};
use crate::index::{Time, What, Xattr};
use crate::store::limits::Limits;

/// For who gave another file.
const TAKEN: &str = "fsprov reads tar archives: AppC images, OCI layouts, docker archives and root filesystems, plain or compressed \
                     with gzip, bzip2, xz or zstd";

/// A tar block.
pub(crate) const BLOCK: usize = 512;

/// One entry as the archive has it. The path is raw: see `unpack::normalize`.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) path: Vec<u8>,
    pub(crate) what: What,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    pub(crate) xattrs: Vec<Xattr>,
}

/// What `TarReader::body` hands out.
pub(crate) enum Content<'a> {
    Data(&'a [u8]),
    Hole(u64),
}

/// Must an archive end with its end marker?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndMarker {
    /// Yes: without it nothing tells a whole archive from one cut off between two entries.
    Required,
    /// No: another digest tells (some builders of OCI layers leave it out).
    Optional,
}

pub(crate) struct TarReader<R> {
    input: R,
    name: String,
    limits: Limits,
    end_marker: EndMarker,
    position: u64,
    global: Extension,
    /// Stored bytes of the entry at hand not yet read, and what pads them.
    left: u64,
    padding: u64,
    size: u64,
    pieces: Option<Vec<Piece>>,
    ended: bool,
}

impl<R: BufRead> TarReader<R> {
    /// `name` is what messages call the archive.
    pub(crate) fn new(input: R, name: String, limits: Limits, end_marker: EndMarker) -> Self {
        TarReader {
            input,
            name,
            limits,
            end_marker,
            position: 0,
            global: Extension::default(),
            left: 0,
            padding: 0,
            size: 0,
            pieces: None,
            ended: false,
        }
    }

    fn refuse(&self, kind: Kind, why: impl Into<String>) -> Error {
        Error::new(kind, "read archive", format!("{} at byte {}", self.name, self.position), why.into())
    }

    fn invalid(&self, why: impl Into<String>) -> Error {
        self.refuse(Kind::Invalid, why)
    }

    fn fill(&mut self) -> Result<&[u8]> {
        self.input.fill_buf().map_err(|e| from_io(&self.name, e))
    }

    fn consume(&mut self, count: usize) {
        self.input.consume(count);
        self.position += count as u64;
    }

    /// A block, or None at the end of the input. A part of one is a truncated archive.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut have = 0;
        while have < BLOCK {
            let chunk = self.fill()?;
            if chunk.is_empty() {
                return match have {
                    0 => Ok(None),
                    // Nothing came before it.
                    _ if self.position < BLOCK as u64 => {
                        Err(self.invalid("it is shorter than any tar archive").hint(TAKEN))
                    }
                    _ => Err(self.invalid("it is cut off in the middle of a block")),
                };
            }
            let count = chunk.len().min(BLOCK - have);
            block[have..have + count].copy_from_slice(&chunk[..count]);
            have += count;
            self.consume(count);
        }
        Ok(Some(block))
    }

    fn need_block(&mut self) -> Result<[u8; BLOCK]> {
        self.block()?.ok_or_else(|| self.invalid("it is cut off in the middle of an entry"))
    }

    fn pass(&mut self, mut count: u64, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        while count > 0 {
            let chunk = self.fill()?;
            if chunk.is_empty() {
                return Err(self.invalid("it is cut off in the middle of an entry"));
            }
            let length = chunk.len().min(usize::try_from(count).unwrap_or(usize::MAX));
            take(&chunk[..length])?;
            self.consume(length);
            count -= length as u64;
        }
        Ok(())
    }

    fn extension_body(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > self.limits.extension_bytes {
            let most = self.limits.extension_bytes;
            return Err(
                self.refuse(Kind::Limit, format!("an extension record of {size} bytes: at most {most} are taken"))
            );
        }
        let mut body = Vec::with_capacity(size as usize);
        self.pass(size, |chunk| {
            body.extend_from_slice(chunk);
            Ok(())
        })?;
        self.pass(padding_of(size), |_| Ok(()))?;
        Ok(body)
    }

    /// The next entry, or None at the end marker. What is left of the entry before is passed over.
    pub(crate) fn next(&mut self) -> Result<Option<Member>> {
        if self.ended {
            return Ok(None);
        }
        self.skip_body()?;
        let mut local: Option<Extension> = None;
        let mut long_path: Option<Vec<u8>> = None;
        let mut long_link: Option<Vec<u8>> = None;
        loop {
            let pending = local.is_some() || long_path.is_some() || long_link.is_some();
            let Some(block) = self.block()? else {
                if pending || self.end_marker == EndMarker::Required {
                    return Err(self.invalid("it ends without the end marker: it is cut off"));
                }
                self.ended = true;
                return Ok(None);
            };
            if block.iter().all(|b| *b == 0) {
                if pending {
                    return Err(self.invalid("an extension record is followed by no entry"));
                }
                // A second zero block, or the end of the input, must follow: tools disagree about what comes after one alone.
                if let Some(next) = self.block()?
                    && next.iter().any(|b| *b != 0)
                {
                    return Err(self.invalid("a lone zero block stands in the middle of it"));
                }
                self.ended = true;
                return Ok(None);
            }
            let header = tar::Header::from_byte_slice(&block);
            if !Fields(header).checksum_holds() {
                let error = self.invalid("an entry's checksum is wrong: not a tar archive, or a damaged one");
                return Err(if self.position == BLOCK as u64 { error.hint(TAKEN) } else { error });
            }
            let kind = header.as_old().linkflag[0];
            let size = Fields(header).size().ok_or_else(|| self.invalid("an entry's size is not a number"))?;
            let size = u64::try_from(size).map_err(|_| self.invalid("an entry's size is negative"))?;
            match kind {
                b'x' | b'X' => {
                    let body = self.extension_body(size)?;
                    let parsed = parse_records(&body, &self.limits).map_err(|why| self.invalid(why))?;
                    if local.replace(parsed).is_some() {
                        return Err(self.invalid("two PAX records stand before one entry"));
                    }
                }
                b'g' => {
                    if pending {
                        return Err(self.invalid("an extension record is followed by no entry"));
                    }
                    let body = self.extension_body(size)?;
                    let parsed = parse_records(&body, &self.limits).map_err(|why| self.invalid(why))?;
                    if parsed.names_one_entry() {
                        return Err(
                            self.invalid("a global PAX record gives path, link target, size or map of every entry")
                        );
                    }
                    self.global.overlay(parsed);
                }
                b'L' | b'K' => {
                    let mut body = self.extension_body(size)?;
                    while body.last() == Some(&0) {
                        body.pop();
                    }
                    let slot = if kind == b'L' { &mut long_path } else { &mut long_link };
                    if slot.replace(body).is_some() {
                        return Err(self.invalid("two long names stand before one entry"));
                    }
                }
                _ => {
                    let mut extension = self.global.clone();
                    extension.overlay(local.unwrap_or_default());
                    for (long, short) in [(long_path, &mut extension.path), (long_link, &mut extension.link)] {
                        if let Some(long) = long
                            && short.replace(long).is_some()
                        {
                            return Err(self.invalid("an entry has both a GNU and a PAX long name"));
                        }
                    }
                    return self.member(header, kind, size, extension).map(Some);
                }
            }
        }
    }

    fn member(&mut self, header: &tar::Header, kind: u8, size: u64, mut ext: Extension) -> Result<Member> {
        let old = header.as_old();
        let path =
            ext.sparse_name.take().or_else(|| ext.path.take()).unwrap_or_else(|| header.path_bytes().into_owned());
        if path.is_empty() || path.contains(&0) {
            return Err(self.invalid("an entry's name is empty or holds a NUL"));
        }
        let shown = String::from_utf8_lossy(&path).into_owned();
        let field = |bytes: &[u8], what: &str| {
            parse_number(bytes).ok_or_else(|| self.invalid(format!("{what} of {shown:?} is not a number")))
        };
        let id = |given: Option<u64>, bytes: &[u8], what: &str| {
            let raw = match given {
                Some(n) => n,
                None => u64::try_from(field(bytes, what)?)
                    .map_err(|_| self.invalid(format!("{what} of {shown:?} is negative")))?,
            };
            // The last one is chown(2)'s "leave it".
            u32::try_from(raw)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| self.invalid(format!("{what} {raw} of {shown:?} is out of range")))
        };
        let uid = id(ext.uid, &old.uid, "the owner")?;
        let gid = id(ext.gid, &old.gid, "the group")?;
        let mode = (field(&old.mode, "the mode")? & 0o7777) as u16;
        let mtime = match ext.mtime {
            Some(time) => time,
            None => Time { secs: field(&old.mtime, "the time")?, nanos: 0 },
        };
        let stored = ext.size.unwrap_or(size);
        let link = || {
            let link = ext.link.clone().or_else(|| header.link_name_bytes().map(Into::into)).unwrap_or_default();
            if link.is_empty() || link.contains(&0) {
                return Err(self.invalid(format!("the link target of {shown:?} is empty or holds a NUL")));
            }
            Ok(link)
        };
        let device = || -> Result<u32> {
            let (major, minor) = Fields(header)
                .device()
                .ok_or_else(|| self.invalid(format!("the device of {shown:?} is not a number")))?;
            // 12 bits of major and 20 of minor: what the kernel's 32-bit dev_t holds.
            if !(0..1 << 12).contains(&major) || !(0..1 << 20).contains(&minor) {
                return Err(self.invalid(format!("the device {major}:{minor} of {shown:?} is out of range")));
            }
            let (major, minor) = (major as u32, minor as u32);
            Ok((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
        };
        let what = match kind {
            b'0' | 0 | b'7' | b'S' if kind == b'S' || !path.ends_with(b"/") => {
                What::File { size: stored, content: None, sha256: None }
            }
            // What tar(1) does, too: before ustar a directory was a file with a slash.
            b'0' | 0 | b'7' | b'5' => What::Directory,
            b'1' => What::HardLink(link()?),
            b'2' => What::Symlink(link()?),
            b'3' => What::Char(device()?),
            b'4' => What::Block(device()?),
            b'6' => What::Fifo,
            other => {
                return Err(self.invalid(format!("{shown:?} is of a type we do not know: {:?}", char::from(other))));
            }
        };
        self.pieces = None;
        self.size = 0;
        self.left = 0;
        self.padding = 0;
        let what = if matches!(what, What::File { .. }) {
            self.left = stored;
            self.padding = padding_of(stored);
            let size = self.sparse_map(header, kind, stored, &mut ext, &shown)?;
            self.check_size(size, &shown)?;
            self.size = size;
            What::File { size, content: None, sha256: None }
        } else if stored != 0 {
            return Err(self.invalid(format!("{shown:?} is not a file, but has {stored} bytes of data")));
        } else {
            what
        };
        Ok(Member { path, what, mode, uid, gid, mtime, xattrs: ext.xattrs })
    }

    fn check_size(&self, size: u64, shown: &str) -> Result<()> {
        if size > self.limits.file_bytes {
            let most = self.limits.file_bytes;
            return Err(self.refuse(Kind::Limit, format!("{shown:?} has {size} bytes: at most {most} are taken")));
        }
        Ok(())
    }

    /// Find the map of a sparse file in whichever of its four forms; gives the file's size with its holes.
    fn sparse_map(
        &mut self,
        header: &tar::Header,
        kind: u8,
        stored: u64,
        ext: &mut Extension,
        shown: &str,
    ) -> Result<u64> {
        let (pieces, size) = if kind == b'S' {
            let gnu =
                header.as_gnu().ok_or_else(|| self.invalid(format!("the sparse file {shown:?} has no GNU header")))?;
            let mut pieces = Vec::new();
            let mut more = gnu.isextended[0] != 0;
            let mut go_on = self.old_gnu_pieces(&gnu.sparse, &mut pieces, shown)?;
            while go_on && more {
                let mut next = tar::GnuExtSparseHeader::new();
                next.as_mut_bytes().copy_from_slice(&self.need_block()?);
                more = next.isextended[0] != 0;
                go_on = self.old_gnu_pieces(&next.sparse, &mut pieces, shown)?;
            }
            (pieces, parse_number(&gnu.realsize).and_then(|n| u64::try_from(n).ok()))
        } else if ext.sparse_major == Some(1) {
            let (pieces, used) = self.map_in_data(stored, shown)?;
            self.left = stored - used;
            (pieces, ext.sparse_size)
        } else if let Some(map) = ext.sparse_map.take() {
            (map, ext.sparse_size)
        } else {
            if ext.sparse_size.is_some() || ext.sparse_major.is_some() {
                return Err(self.invalid(format!("the sparse file {shown:?} has no map that we know")));
            }
            return Ok(stored);
        };
        let size = size.ok_or_else(|| self.invalid(format!("the sparse file {shown:?} has no size")))?;
        let mut end = 0;
        let mut data = 0_u64;
        for piece in &pieces {
            let next = piece.offset.checked_add(piece.length).filter(|next| *next <= size && piece.offset >= end);
            end = next.ok_or_else(|| self.invalid(format!("the map of the sparse file {shown:?} is out of order")))?;
            data += piece.length;
        }
        if data != self.left {
            return Err(self.invalid(format!(
                "the map of the sparse file {shown:?} speaks of {data} bytes and {} are there",
                self.left
            )));
        }
        self.pieces = Some(pieces);
        Ok(size)
    }

    /// Pieces of an old GNU header; false at the first unused field.
    fn old_gnu_pieces(&self, fields: &[tar::GnuSparseHeader], pieces: &mut Vec<Piece>, shown: &str) -> Result<bool> {
        for field in fields {
            if field.is_empty() {
                return Ok(false);
            }
            let number = |bytes: &[u8]| parse_number(bytes).and_then(|n| u64::try_from(n).ok());
            let (Some(offset), Some(length)) = (number(&field.offset), number(&field.numbytes)) else {
                return Err(self.invalid(format!("the map of the sparse file {shown:?} is not a list of numbers")));
            };
            self.push_piece(pieces, Piece { offset, length }, shown)?;
        }
        Ok(true)
    }

    fn push_piece(&self, pieces: &mut Vec<Piece>, piece: Piece, shown: &str) -> Result<()> {
        if pieces.len() >= self.limits.sparse_pieces {
            let most = self.limits.sparse_pieces;
            return Err(self.refuse(Kind::Limit, format!("the sparse file {shown:?} has more than {most} pieces")));
        }
        pieces.push(piece);
        Ok(())
    }

    /// GNU sparse format 1.0: decimal lines before the data, padded to a block: the pieces and the bytes they took.
    fn map_in_data(&mut self, stored: u64, shown: &str) -> Result<(Vec<Piece>, u64)> {
        let bad = || format!("the map of the sparse file {shown:?} is not a list of numbers");
        let mut used = 0;
        let mut numbers: Vec<u64> = Vec::new();
        let mut pieces = Vec::new();
        let mut count: Option<u64> = None;
        let mut digits = 0_u64;
        let mut any = false;
        while count.is_none_or(|count| (pieces.len() as u64) < count) {
            if used + BLOCK as u64 > stored.next_multiple_of(BLOCK as u64) {
                return Err(self.invalid(bad()));
            }
            let block = self.need_block()?;
            used += BLOCK as u64;
            for byte in block {
                match byte {
                    b'0'..=b'9' => {
                        digits = digits
                            .checked_mul(10)
                            .and_then(|n| n.checked_add(u64::from(byte - b'0')))
                            .ok_or_else(|| self.invalid(bad()))?;
                        any = true;
                    }
                    b'\n' if any => {
                        let number = std::mem::take(&mut digits);
                        any = false;
                        if count.is_none() {
                            count = Some(number);
                        } else {
                            numbers.push(number);
                            if let [offset, length] = numbers[..] {
                                self.push_piece(&mut pieces, Piece { offset, length }, shown)?;
                                numbers.clear();
                            }
                        }
                        if count == Some(pieces.len() as u64) {
                            break;
                        }
                    }
                    _ => return Err(self.invalid(bad())),
                }
            }
        }
        if used > stored {
            return Err(self.invalid(bad()));
        }
        Ok((pieces, used))
    }

    /// Hand out the content of the entry at hand, in order.
    pub(crate) fn body(&mut self, mut take: impl FnMut(Content<'_>) -> Result<()>) -> Result<()> {
        let size = self.size;
        let pieces = self.pieces.take().unwrap_or_else(|| vec![Piece { offset: 0, length: size }]);
        let mut at = 0;
        for piece in pieces {
            if piece.offset > at {
                take(Content::Hole(piece.offset - at))?;
            }
            self.pass(piece.length, |chunk| take(Content::Data(chunk)))?;
            self.left -= piece.length;
            at = piece.offset + piece.length;
        }
        if size > at {
            take(Content::Hole(size - at))?;
        }
        Ok(())
    }

    fn skip_body(&mut self) -> Result<()> {
        let rest = std::mem::take(&mut self.left);
        self.pass(rest, |_| Ok(()))?;
        let padding = std::mem::take(&mut self.padding);
        // umoci (0.4) writes layers whose last entry has no padding; with a digest that tells the whole, nothing is missing.
        if padding > 0 && self.end_marker == EndMarker::Optional && self.fill()?.is_empty() {
            return Ok(());
        }
        self.pass(padding, |_| Ok(()))
    }

    /// Read what follows the end marker: it is part of what the digest covers.
    pub(crate) fn finish(&mut self) -> Result<()> {
        loop {
            let length = self.fill()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }
}

fn padding_of(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

/// An error of ours that travelled inside an [`std::io::Error`], or that one.
pub(crate) fn from_io(name: &str, error: std::io::Error) -> Error {
    if error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).is_some() {
        let inner = error.into_inner().and_then(|inner| inner.downcast::<Error>().ok());
        return inner.map_or_else(|| Error::new(Kind::Io, "read", name, "an error was lost"), |boxed| *boxed);
    }
    Error::io("read", name, error)
}

/// The layout is the `tar` crate's; numbers are decoded here, since the crate drops the high bytes of a base-256 number
/// and takes a `+`, where tar(1) refuses both.
struct Fields<'a>(&'a tar::Header);

impl Fields<'_> {
    /// Sum of the bytes, the sum's own field counted as spaces.
    fn checksum_holds(&self) -> bool {
        let bytes = self.0.as_bytes().iter().enumerate();
        let sum: i64 = bytes.map(|(i, b)| i64::from(if (148..156).contains(&i) { b' ' } else { *b })).sum();
        parse_number(&self.0.as_old().cksum) == Some(sum)
    }

    fn size(&self) -> Option<i64> {
        parse_number(&self.0.as_old().size)
    }

    fn device(&self) -> Option<(i64, i64)> {
        let (major, minor) = match (self.0.as_ustar(), self.0.as_gnu()) {
            (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
            (None, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
            (None, None) => return None,
        };
        Some((parse_number(major)?, parse_number(minor)?))
    }
}

/// Octal digits between spaces and NULs, or GNU's base 256 (first bit set; two's complement). An empty field is 0.
fn parse_number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (i, byte) in field.iter().enumerate() {
            let byte = if i == 0 && !negative { byte & 0x7f } else { *byte };
            value = (value << 8) | i128::from(byte);
            // Sign extension alone may fill what lies above 64 bits.
            if i64::try_from(value).is_err() {
                return None;
            }
        }
        return i64::try_from(value).ok();
    }
    let text = field.iter().position(|b| !matches!(b, b' ')).map_or(&[][..], |start| &field[start..]);
    let end = text.iter().position(|b| matches!(b, b' ' | 0)).unwrap_or(text.len());
    if text[end..].iter().any(|b| !matches!(b, b' ' | 0)) {
        return None;
    }
    text[..end].iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
