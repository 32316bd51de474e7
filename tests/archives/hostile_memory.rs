//! More of the corpus: archives that are small, and would have us hold much.

use super::super::tarball::{DIR, FILE, HARD, SYM, Tar, head, record};
use super::{Fate, Hostile, add};

/// A path of nearly as many bytes as there may be.
fn long(name: &str) -> Vec<u8> {
    [b"rootfs/".to_vec(), format!("{}/", "d".repeat(255)).repeat(15).into_bytes(), name.as_bytes().to_vec()].concat()
}

fn pathed(tar: &mut Tar, kind: u8, path: &[u8], link: &[u8]) {
    let mut records = record("path", path);
    if !link.is_empty() {
        records.extend(record("linkpath", link));
    }
    tar.extension(b'x', &records);
    tar.any(kind, b"x");
}

fn manifest(more: &str) -> String {
    format!(r#"{{"acKind":"ImageManifest","acVersion":"0.8.11","name":"example.com/x",{more}}}"#)
}

pub(super) fn add_all(all: &mut Vec<Hostile>) {
    let mut with = |fate, name: &str, text: String| {
        add(all, fate, name, |t| {
            *t = Tar::default();
            t.file(b"manifest", text.as_bytes());
            t.dir(b"rootfs");
        });
    };
    let list = |paths: Vec<String>| manifest(&format!(r#""pathWhitelist":["{}"]"#, paths.join("\",\"")));
    with(Fate::Refused, "one path of 20,000 components in the pathWhitelist", list(vec!["/a".repeat(20_000)]));
    let many = |count: usize| (0..count).map(|n| format!("{}/{n}", "/a".repeat(2000))).collect();
    with(Fate::Harmless, "240 paths of 2,000 components in the pathWhitelist", list(many(240)));
    let short = (0..5000).map(|n| format!("/{n}")).collect();
    with(Fate::Refused, "5,000 paths in the pathWhitelist", list(short));
    let isolator = |value: String| {
        manifest(&format!(
            r#""app":{{"exec":["/a"],"user":"0","group":"0","isolators":[{{"name":"a","value":[{value}0]}}]}}"#
        ))
    };
    with(Fate::Refused, "140,000 objects in the manifest", isolator(r#"{"":0},"#.repeat(140_000)));
    with(Fate::Refused, "500,000 numbers in the manifest", isolator("0,".repeat(500_000)));
    with(Fate::Harmless, "15,000 objects in the manifest", isolator(r#"{"":0},"#.repeat(15_000)));
    add(all, Fate::Harmless, "15,000 directories, each with a path of 4,000 bytes", |t| {
        for n in 0..15_000 {
            pathed(t, DIR, &long(&n.to_string()), b"");
        }
    });
    add(all, Fate::Harmless, "5,000 links of one file, each with a path of 4,000 bytes", |t| {
        pathed(t, FILE, &long("f"), b"");
        for n in 0..5000 {
            pathed(t, HARD, &long(&n.to_string()), &long("f"));
        }
    });
    add(all, Fate::Harmless, "15,000 symlinks with targets of 4,000 bytes", |t| {
        for n in 0..15_000 {
            pathed(t, SYM, format!("rootfs/{n}").as_bytes(), &b"t".repeat(4000));
        }
    });
    add(all, Fate::Harmless, "24,000 directories that no entry speaks of", |t| {
        for n in 0..100 {
            let path = format!("rootfs/{n}/{}f", "d/".repeat(240));
            pathed(t, FILE, path.as_bytes(), b"");
        }
    });
    add(all, Fate::Refused, "a sparse map of a million pieces", |t| {
        let mut map = b"1000000\n".to_vec();
        (0..1_000_000).for_each(|n| map.extend_from_slice(format!("{n}\n0\n").as_bytes()));
        map.resize(map.len().next_multiple_of(512), 0);
        t.pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"1000000")]);
        t.entry(&head(b"rootfs/s", FILE), &map);
    });
    // More than a dictionary holds, so that all of it is used.
    let mut big = Tar::aci();
    big.file(b"rootfs/f", &b"x".repeat(100 << 20));
    let big = big.end();
    for (preset, fate) in [(8, Fate::Harmless), (9, Fate::Refused)] {
        let mut out = liblzma::write::XzEncoder::new(Vec::new(), preset);
        std::io::Write::write_all(&mut out, &big).expect("compress");
        let bytes = out.finish().expect("compress");
        all.push(Hostile { name: format!("100 MiB by xz -{preset}"), fate, bytes });
    }
    for (log, fate) in [(25, Fate::Harmless), (27, Fate::Refused)] {
        let mut out = zstd::Encoder::new(Vec::new(), 3).expect("compress");
        out.window_log(log).expect("compress");
        std::io::Write::write_all(&mut out, &big).expect("compress");
        let bytes = out.finish().expect("compress");
        all.push(Hostile { name: format!("100 MiB by zstd with a window of 2^{log}"), fate, bytes });
    }
}
