//! PAX extension records (pax(1), "pax Extended Header"): `LENGTH KEY=VALUE\n`, strictly.

use crate::index::{MAX_XATTR_BYTES, MAX_XATTR_NAME, Time, Xattr};
use crate::store::limits::Limits;

/// A run of data of a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// What the records before an entry say of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extension {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u64>,
    pub(crate) gid: Option<u64>,
    pub(crate) mtime: Option<Time>,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) sparse_major: Option<u64>,
    pub(crate) sparse_name: Option<Vec<u8>>,
    pub(crate) sparse_size: Option<u64>,
    pub(crate) sparse_map: Option<Vec<Piece>>,
}

impl Extension {
    /// Says it something that cannot hold for every entry of an archive?
    pub(crate) fn names_one_entry(&self) -> bool {
        self.path.is_some()
            || self.link.is_some()
            || self.size.is_some()
            || self.sparse_name.is_some()
            || self.sparse_size.is_some()
            || self.sparse_map.is_some()
            || self.sparse_major.is_some()
    }

    /// What `over` says goes before what we say.
    pub(crate) fn overlay(&mut self, over: Extension) {
        self.path = over.path.or(self.path.take());
        self.link = over.link.or(self.link.take());
        self.size = over.size.or(self.size);
        self.uid = over.uid.or(self.uid);
        self.gid = over.gid.or(self.gid);
        self.mtime = over.mtime.or(self.mtime);
        for xattr in over.xattrs {
            put_xattr(&mut self.xattrs, xattr);
        }
        self.sparse_major = over.sparse_major.or(self.sparse_major);
        self.sparse_name = over.sparse_name.or(self.sparse_name.take());
        self.sparse_size = over.sparse_size.or(self.sparse_size);
        self.sparse_map = over.sparse_map.or(self.sparse_map.take());
    }
}

fn put_xattr(xattrs: &mut Vec<Xattr>, xattr: Xattr) {
    xattrs.retain(|old| old.name != xattr.name);
    xattrs.push(xattr);
}

/// The attributes that we take from images, and put into them: what programs set on their own files, and file
/// capabilities (`ping` has them in many distributions). Not `trusted.*` and `user.overlay.*`, which are orders to
/// overlayfs (a redirect or a whiteout made by an image would lead it to other files), nor `user.fuseoverlayfs.*` and
/// `user.containers.*`, which are the like for fuse-overlayfs; nor labels (`security.selinux`, `security.ima`), which
/// belong to the host.
pub(crate) fn is_xattr_taken(name: &[u8]) -> bool {
    const REFUSED: [&[u8]; 4] = [b"user.overlay.", b"user.fuseoverlayfs.", b"user.containers.", b"user.fsprov."];
    name == b"security.capability"
        || (name.starts_with(b"user.") && name.len() > 5 && !REFUSED.iter().any(|prefix| name.starts_with(prefix)))
}

/// Read all records. The error says what is wrong, without the place.
pub(crate) fn parse_records(mut data: &[u8], limits: &Limits) -> Result<Extension, String> {
    let mut ext = Extension::default();
    let mut xattr_bytes = 0_usize;
    let mut pieces = Pieces::default();
    while !data.is_empty() {
        let (key, value, rest) = next_record(data).ok_or("a PAX record is malformed")?;
        data = rest;
        let shown = || String::from_utf8_lossy(key).into_owned();
        let number = || decimal(value).ok_or_else(|| format!("PAX {} is not a number", shown()));
        let text = || match value {
            [] => Err(format!("PAX {} is empty", shown())),
            value if value.contains(&0) => Err(format!("PAX {} holds a NUL", shown())),
            value => Ok(Some(value.to_vec())),
        };
        match key {
            b"path" => ext.path = text()?,
            b"linkpath" => ext.link = text()?,
            b"size" => ext.size = Some(number()?),
            b"uid" => ext.uid = Some(number()?),
            b"gid" => ext.gid = Some(number()?),
            b"mtime" => ext.mtime = Some(parse_time(value).ok_or("PAX mtime is not a time")?),
            b"GNU.sparse.major" => ext.sparse_major = Some(number()?),
            b"GNU.sparse.minor" if number()? != 0 => return Err("PAX GNU.sparse.minor is not one we know".into()),
            b"GNU.sparse.name" => ext.sparse_name = text()?,
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => ext.sparse_size = Some(number()?),
            b"GNU.sparse.offset" => pieces.offset(number()?)?,
            b"GNU.sparse.numbytes" => pieces.length(number()?)?,
            b"GNU.sparse.map" => pieces.map(value)?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    xattr_bytes += name.len() + value.len();
                    if xattr_bytes > limits.xattr_bytes || value.len() > MAX_XATTR_BYTES || name.len() > MAX_XATTR_NAME
                    {
                        return Err(format!("the extended attribute {} is too long", String::from_utf8_lossy(name)));
                    }
                    if name.contains(&0) || name.is_empty() {
                        return Err("an extended attribute's name is empty or holds a NUL".into());
                    }
                    put_xattr(&mut ext.xattrs, Xattr { name: name.to_vec(), value: value.to_vec() });
                    if ext.xattrs.len() > limits.xattrs {
                        return Err(format!("it has more than {} extended attributes", limits.xattrs));
                    }
                }
                // Others are comments or vendors' own: pax(1) says to ignore what is not known.
            }
        }
        if pieces.list.len() > limits.sparse_pieces {
            return Err(format!("a sparse file has more than {} pieces", limits.sparse_pieces));
        }
    }
    ext.sparse_map = pieces.finish()?;
    Ok(ext)
}

#[derive(Default)]
struct Pieces {
    list: Vec<Piece>,
    pending: Option<u64>,
    seen: bool,
}

impl Pieces {
    fn offset(&mut self, offset: u64) -> Result<(), String> {
        self.seen = true;
        if self.pending.replace(offset).is_some() {
            Err("a PAX sparse map has an offset without length".into())
        } else {
            Ok(())
        }
    }

    fn length(&mut self, length: u64) -> Result<(), String> {
        let offset = self.pending.take().ok_or("a PAX sparse map has a length without offset")?;
        self.list.push(Piece { offset, length });
        Ok(())
    }

    fn map(&mut self, value: &[u8]) -> Result<(), String> {
        if self.seen {
            return Err("a sparse file has two maps".into());
        }
        self.seen = true;
        let mut numbers = value.split(|b| *b == b',').map(decimal);
        loop {
            match (numbers.next(), numbers.next()) {
                (None, _) => return Ok(()),
                (Some(Some(offset)), Some(Some(length))) => self.list.push(Piece { offset, length }),
                _ if value.is_empty() => return Ok(()),
                _ => return Err("PAX GNU.sparse.map is not a list of pairs".into()),
            }
        }
    }

    fn finish(self) -> Result<Option<Vec<Piece>>, String> {
        if self.pending.is_some() {
            return Err("a PAX sparse map has an offset without length".into());
        }
        Ok(self.seen.then_some(self.list))
    }
}

/// Key, value and what follows the first record; None where it is malformed.
fn next_record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().position(|b| *b == b' ')?;
    // No number of ours has more digits; a longer run is somebody's try at an overflow.
    if space > 10 {
        return None;
    }
    let length = usize::try_from(decimal(&data[..space])?).ok()?;
    let record = data.get(space + 1..length)?;
    let (newline, record) = record.split_last()?;
    let equals = record.iter().position(|b| *b == b'=')?;
    if *newline != b'\n' || equals == 0 {
        return None;
    }
    Some((&record[..equals], &record[equals + 1..], &data[length..]))
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `[-]SECONDS[.FRACTION]`; digits past the nanosecond are dropped, towards the past.
fn parse_time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let secs = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or(b"");
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanos = 0_u32;
    for i in 0..9 {
        nanos = nanos * 10 + u32::from(fraction.get(i).map_or(0, |d| d - b'0'));
    }
    let beyond = fraction.get(9..).is_some_and(|rest| rest.iter().any(|d| *d != b'0'));
    if !negative {
        return Some(Time { secs, nanos });
    }
    let nanos = nanos + u32::from(beyond);
    Some(match nanos {
        0 => Time { secs: -secs, nanos: 0 },
        nanos => Time { secs: (-secs).checked_sub(1)?, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn records_are_read() {
        let data = [
            record("path", b"a/b"),
            record("size", b"12"),
            record("mtime", b"-1.25"),
            record("SCHILY.xattr.user.x", b"\0\n="),
            record("comment", b""),
        ]
        .concat();
        let ext = parse_records(&data, &Limits::default()).unwrap();
        assert_eq!(ext.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(ext.size, Some(12));
        assert_eq!(ext.mtime, Some(Time { secs: -2, nanos: 750_000_000 }));
        assert_eq!(ext.xattrs, [Xattr { name: b"user.x".to_vec(), value: b"\0\n=".to_vec() }]);
    }

    #[test]
    fn malformed_records_are_refused() {
        let cases: [&[u8]; 14] = [
            b"x",
            b"6 a=b",
            b"7 a=b\n",
            b"5 a=b\n",
            b" a=b\n",
            b"0 a=b\n",
            b"+6 a=b\n",
            b"6 ab=\n6 =bc\n",
            b"99999999999999999999 a=b\n",
            b"9 path=\n",
            b"10 size=-1\n",
            b"10 size=0x\n",
            b"22 GNU.sparse.offset=1\n",
            b"13 path=a\0b\n",
        ];
        for bad in cases {
            assert!(parse_records(bad, &Limits::default()).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn times() {
        for (text, want) in [
            ("0", Some((0, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.0000000019", Some((1, 1))),
            ("-0.0000000019", Some((-1, 999_999_998))),
            ("-3", Some((-3, 0))),
            ("", None),
            (".5", None),
            ("1.x", None),
            ("99999999999999999999", None),
        ] {
            let want = want.map(|(secs, nanos)| Time { secs, nanos });
            assert_eq!(parse_time(text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn attributes_that_are_orders_to_the_host_are_not_taken() {
        for (name, want) in [
            ("user.mime_type", true),
            ("security.capability", true),
            ("trusted.overlay.opaque", false),
            ("user.overlay.redirect", false),
            ("user.containers.override_stat", false),
            ("user.fsprov.origin", false),
            ("security.selinux", false),
            ("system.posix_acl_access", false),
            ("user.", false),
        ] {
            assert_eq!(is_xattr_taken(name.as_bytes()), want, "{name}");
        }
    }
}
