use super::super::write::{END, header, pad};
use super::*;
use crate::index::Entry;

fn entry(what: What) -> Entry {
    Entry { path: Vec::new(), what, mode: 0o644, uid: 1, gid: 2, mtime: Time { secs: 3, nanos: 4 }, xattrs: Vec::new() }
}

fn file(path: &[u8], content: &[u8]) -> Vec<u8> {
    let what = What::File { size: content.len() as u64, content: None, sha256: None };
    let mut bytes = header(path, b"", &entry(what));
    bytes.extend_from_slice(content);
    pad(&mut bytes);
    bytes
}

fn reader(bytes: &[u8]) -> TarReader<&[u8]> {
    TarReader::new(bytes, "test".into(), Limits::default(), EndMarker::Required)
}

fn all(bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>> {
    let mut tar = reader(bytes);
    let mut found = Vec::new();
    while let Some(member) = tar.next()? {
        let mut content = Vec::new();
        tar.body(|piece| {
            match piece {
                Content::Data(data) => content.extend_from_slice(data),
                Content::Hole(length) => content.resize(content.len() + length as usize, 0),
            }
            Ok(())
        })?;
        found.push((member, content));
    }
    tar.finish()?;
    Ok(found)
}

#[test]
fn what_is_written_is_read() {
    let long = [b"d/".repeat(200), vec![b'n'; 200]].concat();
    let mut with = entry(What::Symlink(b"x".repeat(150)));
    with.uid = 3_000_000;
    with.mtime = Time { secs: -1, nanos: 999_999_999 };
    with.xattrs = vec![Xattr { name: b"user.a".to_vec(), value: b"\n\0=".to_vec() }];
    let bytes = [
        file(b"a", b"content"),
        file(&long, &[7; 1024]),
        header(b"link", &b"x".repeat(150), &with),
        header(b"dev", b"", &entry(What::Char(0x0010_0305))),
        END.to_vec(),
    ]
    .concat();
    let found = all(&bytes).unwrap();
    assert_eq!(found[0].0.path, b"a");
    assert_eq!(found[0].1, b"content");
    assert_eq!(found[0].0.mtime, Time { secs: 3, nanos: 4 });
    assert_eq!((found[1].0.path.as_slice(), found[1].1.len()), (&*long, 1024));
    let link = &found[2].0;
    assert_eq!(link.what, What::Symlink(b"x".repeat(150)));
    assert_eq!((link.uid, link.mtime), (3_000_000, Time { secs: -1, nanos: 999_999_999 }));
    assert_eq!(link.xattrs, with.xattrs);
    assert_eq!(found[3].0.what, What::Char(0x0010_0305));
}

#[test]
fn what_tools_disagree_about_is_refused() {
    let good = file(b"a", b"content");
    let mut sum = good.clone();
    sum[512] ^= 1;
    let broken = |change: &dyn Fn(&mut tar::Header)| {
        let mut head = tar::Header::new_ustar();
        head.set_path("a").unwrap();
        head.set_mode(0);
        head.set_uid(0);
        head.set_gid(0);
        head.set_mtime(0);
        head.set_size(0);
        change(&mut head);
        head.set_cksum();
        [head.as_bytes().to_vec(), END.to_vec()].concat()
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("without the end marker", good.clone()),
        ("a part of a block", good[..700].to_vec()),
        ("a lone zero block", [&good[..], &[0; 512], &good[..], &END].concat()),
        (
            "a directory with data",
            broken(&|h| {
                h.set_entry_type(tar::EntryType::Directory);
                h.set_size(512);
            }),
        ),
        (
            "a hard link with data",
            broken(&|h| {
                h.set_entry_type(tar::EntryType::Link);
                h.set_link_name("b").unwrap();
                h.set_size(512);
            }),
        ),
        ("an unknown type", broken(&|h| h.set_entry_type(tar::EntryType::new(b'Z')))),
        ("a symlink without target", broken(&|h| h.set_entry_type(tar::EntryType::Symlink))),
        ("a size with a sign", broken(&|h| h.as_old_mut().size.copy_from_slice(b"+0000000000\0"))),
        (
            "a size past 64 bits",
            broken(&|h| h.as_old_mut().size.copy_from_slice(&[0xff, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])),
        ),
        ("a negative size", broken(&|h| h.as_old_mut().size.copy_from_slice(&[0xff; 12]))),
        ("an owner of -1", broken(&|h| h.as_old_mut().uid.copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]))),
        (
            "a GNU long name of a gigabyte",
            broken(&|h| {
                h.set_entry_type(tar::EntryType::GNULongName);
                h.set_size(1 << 30);
            }),
        ),
        ("a long name and no entry", broken(&|h| h.set_entry_type(tar::EntryType::GNULongName))),
        ("a global size", [ext(b'g', b"9 size=1\n"), good.clone(), END.to_vec()].concat()),
        (
            "two PAX records",
            [ext(b'x', b"10 path=b\n"), ext(b'x', b"10 path=c\n"), good.clone(), END.to_vec()].concat(),
        ),
        ("GNU and PAX names", [ext(b'x', b"10 path=b\n"), ext(b'L', b"c\0"), good.clone(), END.to_vec()].concat()),
        ("malformed PAX", [ext(b'x', b"11 path=b\n"), good.clone(), END.to_vec()].concat()),
    ];
    for (what, bytes) in cases {
        let got = all(&bytes);
        assert!(got.is_err(), "{what}: {got:?}");
    }
    sum[0] ^= 1;
    assert!(all(&[&sum[..], &END].concat()).unwrap_err().to_string().contains("checksum"));
}

fn ext(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut head = tar::Header::new_ustar();
    head.set_entry_type(tar::EntryType::new(kind));
    head.set_size(body.len() as u64);
    head.set_cksum();
    let mut bytes = [head.as_bytes().to_vec(), body.to_vec()].concat();
    pad(&mut bytes);
    bytes
}

#[test]
fn the_pax_size_wins() {
    // ustar says 0 bytes: a reader that believes it takes the content for headers (CVE-2025-62518).
    let mut head = tar::Header::new_ustar();
    head.set_path("outer").unwrap();
    head.set_size(0);
    head.set_mode(0o644);
    head.set_uid(0);
    head.set_gid(0);
    head.set_mtime(0);
    head.set_cksum();
    let inner = file(b"smuggled", b"");
    let size = inner.len();
    let record = format!("{} size={size}\n", 8 + size.to_string().len() + 1);
    let bytes = [ext(b'x', record.as_bytes()), head.as_bytes().to_vec(), inner.clone(), END.to_vec()].concat();
    let found = all(&bytes).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].1, inner);
}

#[test]
fn old_and_pax_sparse_files_are_put_together() {
    let map = b"2\n1024\n4\n4096\n2\n";
    let mut data = map.to_vec();
    pad(&mut data);
    data.extend_from_slice(b"abcdef");
    let size = data.len();
    let mut records = Vec::new();
    for (key, value) in [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "real"),
        ("GNU.sparse.realsize", "5000"),
    ] {
        let mut length = key.len() + value.len() + 4;
        if length + 1 >= 10 {
            length += 1;
        }
        records.extend_from_slice(format!("{length} {key}={value}\n").as_bytes());
    }
    let mut stored = data;
    pad(&mut stored);
    let what = What::File { size: size as u64, content: None, sha256: None };
    let mut plain = entry(what);
    plain.mtime.nanos = 0;
    let bytes = [ext(b'x', &records), header(b"GNUSparseFile.0/real", b"", &plain), stored, END.to_vec()].concat();
    let found = all(&bytes).unwrap();
    assert_eq!(found[0].0.path, b"real");
    let content = &found[0].1;
    assert_eq!(content.len(), 5000);
    assert_eq!((&content[1024..1028], &content[4096..4098]), (&b"abcd"[..], &b"ef"[..]));
    assert_eq!(content.iter().filter(|b| **b != 0).count(), 6);
}

#[test]
fn numbers() {
    for (field, want) in [
        (&b"0000644\0"[..], Some(0o644)),
        (b"    644 ", Some(0o644)),
        (b"\0\0\0\0\0\0\0\0", Some(0)),
        (b"0000648\0", None),
        (b"+000644\0", None),
        (b"64 4    ", None),
        (&[0x80, 0, 0, 0, 0, 0, 1, 0], Some(256)),
        (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe], Some(-2)),
        (&[0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], None),
    ] {
        assert_eq!(parse_number(field), want, "{field:?}");
    }
}

#[test]
fn the_last_padding_may_be_missing_where_another_digest_tells_the_whole() {
    let whole = file(b"a", b"hi\n");
    // Whatever headers come first, the content has the last block.
    let body = whole.len() - BLOCK;
    let unpadded = &whole[..body + 3];
    assert!(all(unpadded).is_err(), "an ACI");
    let read = |bytes| {
        let mut tar: TarReader<&[u8]> = TarReader::new(bytes, "test".into(), Limits::default(), EndMarker::Optional);
        let mut count = 0;
        while tar.next()?.is_some() {
            count += 1;
        }
        tar.finish()?;
        Ok::<_, Error>(count)
    };
    assert_eq!(read(unpadded).unwrap(), 1, "a layer as umoci writes it");
    assert!(read(&whole[..body + 2]).is_err(), "content is missing");
    assert!(read(&whole[..body + 10]).is_err(), "half a padding");
}
