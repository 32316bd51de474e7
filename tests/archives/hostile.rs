//! The corpus: each archive with what it tries. `OUT` in a name stands for a directory that must not change.

#[path = "hostile_memory.rs"]
mod memory;
#[path = "hostile_more.rs"]
mod more;

use std::io::Write as _;

use super::tarball::{BLK, CHR, DIR, FIFO, FILE, HARD, Head, SYM, Tar, head, octal, record};

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Not imported.
    Refused,
    /// Imported or not, but nothing outside changes.
    Harmless,
}

pub(crate) struct Hostile {
    pub(crate) name: String,
    pub(crate) fate: Fate,
    pub(crate) bytes: Vec<u8>,
}

const KINDS: [(u8, &str); 7] = [
    (FILE, "file"),
    (DIR, "directory"),
    (SYM, "symlink"),
    (HARD, "hard link"),
    (CHR, "character device"),
    (BLK, "block device"),
    (FIFO, "fifo"),
];

const BAD_NAMES: [&[u8]; 13] = [
    b"../escape",
    b"..",
    b"rootfs/..",
    b"rootfs/../escape",
    b"rootfs/../../../../../../../../../tmp/fsprov-escape",
    b"rootfs/a/../../../escape",
    b"rootfs//..//..//escape",
    b"rootfs/./../../escape",
    b"./../escape",
    b"/tmp/fsprov-escape",
    b"//tmp/fsprov-escape",
    b"/rootfs/x",
    b"rootfs2/x",
];

pub(crate) fn corpus(out: &str) -> Vec<Hostile> {
    let mut all = Vec::new();
    names(&mut all);
    links(&mut all, out);
    extensions(&mut all);
    numbers(&mut all);
    structure(&mut all, out);
    bombs(&mut all);
    compressed(&mut all);
    more::add_all(&mut all, out);
    memory::add_all(&mut all);
    all
}

fn add(all: &mut Vec<Hostile>, fate: Fate, name: impl Into<String>, build: impl FnOnce(&mut Tar)) {
    let mut tar = Tar::aci();
    build(&mut tar);
    all.push(Hostile { name: name.into(), fate, bytes: tar.end() });
}

fn names(all: &mut Vec<Hostile>) {
    for bad in BAD_NAMES {
        let shown = String::from_utf8_lossy(bad);
        for (kind, what) in KINDS {
            add(all, Fate::Refused, format!("{what} named {shown}"), |t| {
                t.file(b"rootfs/first", b"1");
                t.any(kind, bad);
            });
        }
        add(all, Fate::Refused, format!("PAX path {shown}"), |t| {
            t.pax(&[("path", bad)]);
            t.file(b"rootfs/a", b"escaped");
        });
        add(all, Fate::Refused, format!("GNU long name {shown}"), |t| {
            t.extension(b'L', &[bad, b"\0"].concat());
            t.file(b"rootfs/a", b"escaped");
        });
        add(all, Fate::Refused, format!("hard link to {shown}"), |t| t.link(HARD, b"rootfs/h", bad));
        add(all, Fate::Refused, format!("PAX link path {shown}"), |t| {
            t.pax(&[("linkpath", bad)]);
            t.link(HARD, b"rootfs/h", b"rootfs/first");
        });
    }
}

fn links(all: &mut Vec<Hostile>, out: &str) {
    let deep = format!("../../../../../../../../../../../../../../..{out}");
    let by_proc = format!("/proc/self/root{out}");
    let targets = [out, &deep, &by_proc, "/proc/self/cwd", "/", "..", "../..", "."];
    for target in targets {
        let target = target.as_bytes();
        let shown = String::from_utf8_lossy(target).into_owned();
        for (kind, what) in KINDS {
            add(all, Fate::Refused, format!("{what} through a symlink to {shown}"), |t| {
                t.file(b"rootfs/first", b"1");
                t.link(SYM, b"rootfs/l", target);
                t.any(kind, b"rootfs/l/escape");
            });
            add(all, Fate::Harmless, format!("{what} in the place of a symlink to {shown}"), |t| {
                t.file(b"rootfs/first", b"1");
                t.link(SYM, b"rootfs/l", target);
                t.any(kind, b"rootfs/l");
            });
        }
        add(all, Fate::Refused, format!("hard link through a symlink to {shown}"), |t| {
            t.link(SYM, b"rootfs/l", target);
            t.link(HARD, b"rootfs/h", b"rootfs/l/victim");
        });
        add(all, Fate::Harmless, format!("hard link to a symlink to {shown}/victim, then a file there"), |t| {
            t.link(SYM, b"rootfs/l", &[target, b"/victim"].concat());
            t.link(HARD, b"rootfs/h", b"rootfs/l");
            t.file(b"rootfs/h", b"overwritten");
        });
        add(all, Fate::Refused, format!("rootfs is a symlink to {shown}"), |t| {
            *t = Tar::default();
            t.file(b"manifest", br#"{"acKind":"ImageManifest","acVersion":"0.8.11","name":"x"}"#);
            t.link(SYM, b"rootfs", target);
            t.file(b"rootfs/escape", b"x");
        });
        add(all, Fate::Refused, format!("the archive's own top is a symlink to {shown}"), |t| {
            t.link(SYM, b"./", target);
        });
        add(all, Fate::Refused, format!("rootfs/. is a symlink to {shown}"), |t| t.link(SYM, b"rootfs/.", target));
        add(all, Fate::Refused, format!("manifest is a symlink to {shown}"), |t| {
            *t = Tar::default();
            t.link(SYM, b"manifest", target);
            t.dir(b"rootfs");
        });
    }
}

fn extensions(all: &mut Vec<Hostile>) {
    let malformed: [&[u8]; 16] = [
        b"x",
        b"99 path=rootfs/x\n",
        b"5 a=b\n",
        b" path=a\n",
        b"-9 path=a\n",
        b"+9 path=a\n",
        b"9 path=a",
        b"9 path a\n",
        b"5 =b\n",
        b"18446744073709551617 path=a\n",
        b"9999999999999999999999999999 path=a\n",
        b"9 path=a\n9 path",
        b"0 path=a\n",
        b"9\npath=a\n",
        b"\0\0\0\0\0\0\0\0\0",
        b"10 path=\0a\n",
    ];
    for body in malformed {
        add(all, Fate::Refused, format!("malformed PAX {:?}", String::from_utf8_lossy(body)), |t| {
            t.extension(b'x', body);
            t.file(b"rootfs/a", b"1");
        });
    }
    for (key, value) in [
        ("size", "-1"),
        ("size", "0x10"),
        ("size", "18446744073709551616"),
        ("size", "9223372036854775807"),
        ("uid", "4294967295"),
        ("uid", "99999999999"),
        ("gid", "-5"),
        ("mtime", "now"),
        ("mtime", "99999999999999999999"),
        ("path", ""),
        ("SCHILY.xattr.", "x"),
        ("GNU.sparse.map", "1"),
        ("GNU.sparse.map", "5,5,1,1"),
        ("GNU.sparse.size", "10"),
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.offset", "1"),
    ] {
        add(all, Fate::Refused, format!("PAX {key} = {value:?}"), |t| {
            t.pax(&[(key, value.as_bytes())]);
            t.file(b"rootfs/a", b"1");
        });
    }
    for (name, kinds) in
        [("two x", *b"xx"), ("two L", *b"LL"), ("two K", *b"KK"), ("x then L", *b"xL"), ("L then x", *b"Lx")]
    {
        add(all, Fate::Refused, format!("{name} before one entry"), |t| {
            for kind in kinds {
                let body = if kind == b'x' { record("path", b"rootfs/b") } else { b"rootfs/c\0".to_vec() };
                t.extension(kind, &body);
            }
            t.file(b"rootfs/a", b"1");
        });
    }
    for kind in *b"xLKg" {
        add(
            all,
            if kind == b'g' { Fate::Harmless } else { Fate::Refused },
            format!("{} and no entry", char::from(kind)),
            |t| {
                t.extension(kind, &record("comment", b"c"));
            },
        );
    }
    for key in ["path", "size", "linkpath", "GNU.sparse.name"] {
        add(all, Fate::Refused, format!("global {key}"), |t| {
            t.extension(b'g', &record(key, b"1"));
            t.file(b"rootfs/a", b"1");
        });
    }
    for name in [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "user.overlay.whiteout",
        "security.selinux",
        "system.posix_acl_access",
        "security.capability",
    ] {
        add(all, Fate::Harmless, format!("attribute {name}"), |t| {
            t.pax(&[(&format!("SCHILY.xattr.{name}"), b"y")]);
            t.file(b"rootfs/a", b"1");
        });
    }
    add(all, Fate::Refused, "archive in a file whose ustar size is 0 (CVE-2025-62518)", |t| {
        let mut inner = Tar::default();
        inner.any(FILE, b"../escape");
        t.pax(&[("size", b"0")]);
        t.entry(&head(b"rootfs/a", FILE), &inner.0);
    });
}

fn numbers(all: &mut Vec<Hostile>) {
    let fields: [(&str, fn(&mut Head) -> &mut Vec<u8>); 5] = [
        ("size", |h| &mut h.size),
        ("uid", |h| &mut h.uid),
        ("gid", |h| &mut h.gid),
        ("mode", |h| &mut h.mode),
        ("mtime", |h| &mut h.mtime),
    ];
    let values: [(&str, &[u8]); 5] = [
        ("letters", b"abcdefg\0"),
        ("a sign", b"+000644\0"),
        ("a minus", b"-000644\0"),
        ("an 8", b"0000648\0"),
        ("base 256 past 64 bits", &[0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
    ];
    for (field, at) in fields {
        for (what, value) in values {
            // Eight bytes of base 256 fit: those fields are looked at below.
            let fate =
                if value.len() == 12 && !matches!(field, "size" | "mtime") { Fate::Harmless } else { Fate::Refused };
            add(all, fate, format!("{field} with {what}"), |t| {
                let mut h = head(b"rootfs/a", FILE);
                *at(&mut h) = value.to_vec();
                t.block(&h);
            });
        }
    }
    for (what, size) in [("8 EiB", octal(0, 12)), ("1 TiB that is not there", octal((1 << 33) - 1, 12))] {
        add(all, Fate::Refused, format!("a size of {what}"), |t| {
            let mut h = head(b"rootfs/a", FILE);
            h.size = if what == "8 EiB" {
                vec![0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
            } else {
                size
            };
            t.block(&h);
            t.body(b"short");
        });
    }
    for (kind, what) in [(DIR, "directory"), (SYM, "symlink"), (HARD, "hard link"), (CHR, "device"), (FIFO, "fifo")] {
        add(all, Fate::Refused, format!("{what} with data"), |t| {
            t.file(b"rootfs/first", b"1");
            t.entry(&Head { link: b"rootfs/first".to_vec(), ..head(b"rootfs/a", kind) }, b"data");
        });
    }
}

fn structure(all: &mut Vec<Hostile>, out: &str) {
    let simple: Vec<(&str, Fate, Box<dyn FnOnce(&mut Tar)>)> = vec![
        (
            "the same file twice",
            Fate::Refused,
            Box::new(|t| {
                t.file(b"rootfs/a", b"1");
                t.file(b"rootfs/a", b"2");
            }),
        ),
        (
            "the same file by another spelling",
            Fate::Refused,
            Box::new(|t| {
                t.file(b"rootfs/a", b"1");
                t.file(b"./rootfs//./a", b"2");
            }),
        ),
        (
            "the same directory twice",
            Fate::Refused,
            Box::new(|t| {
                t.dir(b"rootfs/d");
                t.dir(b"rootfs/d/");
            }),
        ),
        ("the root twice", Fate::Refused, Box::new(|t| t.dir(b"rootfs/"))),
        ("two manifests", Fate::Refused, Box::new(|t| t.file(b"manifest", b"{}"))),
        (
            "manifest below rootfs only",
            Fate::Refused,
            Box::new(|t| {
                *t = Tar::default();
                t.file(b"rootfs/manifest", b"{}");
            }),
        ),
        ("something else at the top", Fate::Refused, Box::new(|t| t.file(b"extra", b"x"))),
        (
            "a file, then something below it",
            Fate::Refused,
            Box::new(|t| {
                t.file(b"rootfs/a", b"1");
                t.file(b"rootfs/a/b", b"2");
            }),
        ),
        (
            "a device, then a file of its name",
            Fate::Refused,
            Box::new(|t| {
                t.any(CHR, b"rootfs/null");
                t.file(b"rootfs/null", b"to the device");
            }),
        ),
        (
            "a fifo, then a file of its name",
            Fate::Refused,
            Box::new(|t| {
                t.any(FIFO, b"rootfs/f");
                t.file(b"rootfs/f", b"blocks for ever");
            }),
        ),
        (
            "a fifo and a hard link to it, then a file",
            Fate::Refused,
            Box::new(|t| {
                t.any(FIFO, b"rootfs/f");
                t.link(HARD, b"rootfs/g", b"rootfs/f");
                t.file(b"rootfs/g", b"blocks for ever");
            }),
        ),
        ("a hard link to itself", Fate::Refused, Box::new(|t| t.link(HARD, b"rootfs/h", b"rootfs/h"))),
        (
            "a hard link to a directory",
            Fate::Refused,
            Box::new(|t| {
                t.dir(b"rootfs/d");
                t.link(HARD, b"rootfs/h", b"rootfs/d");
            }),
        ),
        ("a hard link to rootfs", Fate::Refused, Box::new(|t| t.link(HARD, b"rootfs/h", b"rootfs"))),
        ("a hard link to the manifest", Fate::Refused, Box::new(|t| t.link(HARD, b"rootfs/h", b"manifest"))),
        (
            "a hard link to what comes later",
            Fate::Refused,
            Box::new(|t| {
                t.link(HARD, b"rootfs/h", b"rootfs/later");
                t.file(b"rootfs/later", b"x");
            }),
        ),
        (
            "a symlink that is too long",
            Fate::Refused,
            Box::new(|t| {
                t.extension(b'K', &[&b"x".repeat(5000)[..], b"\0"].concat());
                t.link(SYM, b"rootfs/l", b"x");
            }),
        ),
        ("a symlink to nothing", Fate::Refused, Box::new(|t| t.link(SYM, b"rootfs/l", b""))),
        (
            "a name of 300 bytes",
            Fate::Refused,
            Box::new(|t| {
                t.extension(b'L', &[b"rootfs/", &b"n".repeat(300)[..], b"\0"].concat());
                t.file(b"x", b"1");
            }),
        ),
        ("an empty name", Fate::Refused, Box::new(|t| t.file(b"", b"1"))),
        ("an unknown type", Fate::Refused, Box::new(|t| t.entry(&head(b"rootfs/a", b'Q'), b""))),
        ("a multi-volume part", Fate::Refused, Box::new(|t| t.entry(&head(b"rootfs/a", b'M'), b"x"))),
        (
            "a lone zero block",
            Fate::Refused,
            Box::new(|t| {
                t.0.resize(t.0.len() + 512, 0);
                t.any(FILE, b"rootfs/hidden");
            }),
        ),
        (
            "a wrong checksum",
            Fate::Refused,
            Box::new(|t| {
                t.file(b"rootfs/a", b"1");
                let at = t.0.len() - 1000;
                t.0[at] ^= 1;
            }),
        ),
        (
            "a device number past 32 bits",
            Fate::Refused,
            Box::new(|t| {
                t.entry(&Head { major: 0o777_7777, minor: 1, ..head(b"rootfs/d", CHR) }, b"");
            }),
        ),
        (
            "setuid and setgid on everything",
            Fate::Harmless,
            Box::new(|t| {
                for (kind, _) in KINDS.iter().filter(|(kind, _)| !matches!(*kind, HARD | SYM)) {
                    t.entry(&Head { mode: octal(0o7777, 8), ..head(format!("rootfs/{kind}").as_bytes(), *kind) }, b"");
                }
            }),
        ),
        (
            "directories that nobody may enter",
            Fate::Harmless,
            Box::new(|t| {
                t.entry(&Head { mode: octal(0, 8), ..head(b"rootfs/closed", DIR) }, b"");
                t.file(b"rootfs/closed/a", b"1");
                t.entry(&Head { mode: octal(0, 8), ..head(b"rootfs/closed/b", DIR) }, b"");
                t.file(b"rootfs/closed/b/c", b"1");
            }),
        ),
        (
            "another archive after the end",
            Fate::Harmless,
            Box::new(|t| {
                t.0.resize(t.0.len() + 1024, 0);
                t.any(FILE, b"../escape");
            }),
        ),
    ];
    for (name, fate, build) in simple {
        add(all, fate, name, build);
    }
    for manifest in [
        &b""[..],
        b"null",
        b"{",
        b"[]",
        b"{}",
        b"{\"acKind\":\"ImageManifest\"}",
        br#"{"acKind":"ImageManifest","acVersion":"0.8.11","name":"../../x"}"#,
        br#"{"acKind":"ImageManifest","acVersion":"0.8.11","name":"x","pathWhitelist":["/../../etc"]}"#,
        br#"{"acKind":"ImageManifest","acVersion":"0.8.11","name":"x","name":"y"}"#,
        br#"{"acKind":"ImageManifest","acVersion":"99999999999999999999.0.0","name":"x"}"#,
        b"\xff\xfe{}",
    ] {
        add(all, Fate::Refused, format!("manifest {:?}", String::from_utf8_lossy(manifest)), |t| {
            *t = Tar::default();
            t.file(b"manifest", manifest);
            t.dir(b"rootfs");
        });
    }
    add(all, Fate::Refused, "nothing but a symlink in the layout's place", |t| {
        *t = Tar::default();
        t.link(SYM, b"index.json", format!("{out}/victim").as_bytes());
        t.file(b"oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    });
    for digest in ["sha256:../../../../etc/passwd", "sha256:", "md5:00", "sha256:zz"] {
        add(all, Fate::Refused, format!("layout with digest {digest}"), |t| {
            *t = Tar::default();
            t.file(b"oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
            let index = format!(
                r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":1}}]}}"#
            );
            t.file(b"index.json", index.as_bytes());
        });
    }
    for layer in ["../../victim", "/etc/passwd", "l"] {
        add(all, Fate::Refused, format!("docker archive with layer {layer}"), |t| {
            *t = Tar::default();
            t.file(b"manifest.json", format!(r#"[{{"Config":"c","Layers":["{layer}"]}}]"#).as_bytes());
            let config = format!(
                r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["sha256:{}"]}}}}"#,
                "0".repeat(64)
            );
            t.file(b"c", config.as_bytes());
            t.link(SYM, b"l", format!("{out}/victim").as_bytes());
        });
    }
}

fn bombs(all: &mut Vec<Hostile>) {
    add(all, Fate::Refused, "2,000 directories deep", |t| {
        t.extension(b'L', &[b"rootfs/", &b"d/".repeat(2000)[..], b"\0"].concat());
        t.dir(b"x");
    });
    add(all, Fate::Refused, "deeper by one with each entry", |t| {
        for depth in 1..2000 {
            t.extension(b'L', &[b"rootfs/", &b"d/".repeat(depth)[..], b"\0"].concat());
            t.dir(b"x");
        }
    });
    for kind in *b"LKxg" {
        add(all, Fate::Refused, format!("{} record of 2 MiB", char::from(kind)), |t| {
            t.extension(kind, &b"a".repeat(2 << 20));
            t.file(b"rootfs/a", b"1");
        });
        add(all, Fate::Refused, format!("{} record of 8 GiB that is not there", char::from(kind)), |t| {
            t.block(&Head { size: octal((1 << 33) - 1, 12), ..head(b"ext", kind) });
        });
    }
    add(all, Fate::Refused, "a GNU long name of 1 MiB", |t| {
        t.extension(b'L', &[b"rootfs/", &b"a/".repeat(500_000)[..], b"\0"].concat());
        t.file(b"x", b"1");
    });
    add(all, Fate::Harmless, "100,000 PAX records of nothing", |t| {
        t.extension(b'x', &record("a", b"").repeat(100_000));
        t.file(b"rootfs/a", b"1");
    });
    add(all, Fate::Refused, "1,000 attributes", |t| {
        let records: Vec<u8> =
            (0..1000).flat_map(|n| record(&format!("SCHILY.xattr.user.{n}"), &b"v".repeat(500))).collect();
        t.extension(b'x', &records);
        t.file(b"rootfs/a", b"1");
    });
    add(all, Fate::Refused, "a sparse file of 8 EiB", |t| {
        t.pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"rootfs/s"),
            ("GNU.sparse.realsize", b"9223372036854775807"),
        ]);
        t.file(b"rootfs/s", b"0\n");
    });
    add(all, Fate::Refused, "sparse files of 1 TiB each", |t| {
        for n in 0..64 {
            t.pax(&[
                ("GNU.sparse.map", b""),
                ("GNU.sparse.size", b"1099511627776"),
                ("GNU.sparse.name", format!("rootfs/{n}").as_bytes()),
            ]);
            t.entry(&head(b"rootfs/s", FILE), b"");
        }
    });
    add(all, Fate::Refused, "a sparse map of a billion pieces", |t| {
        t.pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"5")]);
        t.file(b"rootfs/s", b"1000000000\n0\n1\n");
    });
    add(all, Fate::Harmless, "an old GNU sparse map that goes on for ever", |t| {
        let mut block = [0_u8; 512];
        block[..8].copy_from_slice(b"rootfs/s");
        block[100..108].copy_from_slice(&octal(0o644, 8));
        block[108..116].copy_from_slice(&octal(0, 8));
        block[116..124].copy_from_slice(&octal(0, 8));
        block[124..136].copy_from_slice(&octal(0, 12));
        block[136..148].copy_from_slice(&octal(0, 12));
        block[156] = b'S';
        block[257..265].copy_from_slice(b"ustar  \0");
        for at in (386..482).step_by(12) {
            block[at..at + 12].copy_from_slice(&octal(0, 12));
        }
        block[482] = 1;
        block[483..495].copy_from_slice(&octal(0, 12));
        t.seal(block);
        for _ in 0..10_000 {
            let mut more = [0_u8; 512];
            for at in (0..504).step_by(12) {
                more[at..at + 12].copy_from_slice(&octal(0, 12));
            }
            more[504] = 1;
            t.0.extend_from_slice(&more);
        }
    });
    add(all, Fate::Refused, "a manifest of 2 MiB", |t| {
        *t = Tar::default();
        t.file(b"manifest", &b" ".repeat(2 << 20));
        t.dir(b"rootfs");
    });
    add(all, Fate::Refused, "a manifest 500,000 levels deep", |t| {
        *t = Tar::default();
        t.file(b"manifest", &b"[".repeat(500_000));
        t.dir(b"rootfs");
    });
    add(all, Fate::Harmless, "20,000 empty files", |t| {
        for n in 0..20_000 {
            t.file(format!("rootfs/{n}").as_bytes(), b"");
        }
    });
    add(all, Fate::Harmless, "10,000 links of one file", |t| {
        t.file(b"rootfs/first", b"1");
        for n in 0..10_000 {
            t.link(HARD, format!("rootfs/{n}").as_bytes(), b"rootfs/first");
        }
    });
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(bytes).expect("compress");
    out.finish().expect("compress")
}

/// A compressed run of zeros, `mib` long: written once, repeated as members (each format allows that).
fn zeros(mib: usize, compress: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    compress(&vec![0; 16 << 20]).repeat(mib / 16)
}

fn compressed(all: &mut Vec<Hostile>) {
    let mut tar = Tar::aci();
    // As much as an octal size can say.
    tar.block(&Head { size: octal((1 << 33) - 1, 12), ..head(b"rootfs/zeros", FILE) });
    let start = tar.0;
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 19).expect("compress");
    let xz = |bytes: &[u8]| {
        let mut out = liblzma::write::XzEncoder::new(Vec::new(), 6);
        out.write_all(bytes).expect("compress");
        out.finish().expect("compress")
    };
    for (name, bytes) in
        [("zstd bomb", [zstd(&start), zeros(2048, zstd)].concat()), ("xz bomb", [xz(&start), zeros(2048, xz)].concat())]
    {
        all.push(Hostile { name: name.into(), fate: Fate::Refused, bytes });
    }
    let good = Tar::aci().end();
    for (name, bytes) in [
        ("gzip cut off", gzip(&good)[..60].to_vec()),
        ("gzip with garbage after it", [gzip(&good), b"garbage".to_vec()].concat()),
        ("gzip of gzip", gzip(&gzip(&good))),
        ("xz header and nothing", b"\xfd7zXZ\0".to_vec()),
        ("zstd header and nothing", vec![0x28, 0xb5, 0x2f, 0xfd]),
        ("zstd that asks for 2 GiB of window", vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0, 0]),
        ("bzip2 header and nothing", b"BZh9".to_vec()),
        ("nothing at all", Vec::new()),
        ("one byte", vec![0]),
        ("zeros only", vec![0; 4096]),
        ("noise", (0..8192_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
        ("no end marker", good[..good.len() - 1024].to_vec()),
    ] {
        all.push(Hostile { name: name.into(), fate: Fate::Refused, bytes });
    }
}
