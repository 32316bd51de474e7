//! More of the corpus: tricks with PAX and sparse files, aliases of one name, bombs of attributes, streams of many members,
//! layouts and layers that mean harm.

use super::super::tarball::{CHR, DIR, FIFO, FILE, HARD, Head, SYM, Tar, head, octal, record};
use super::{Fate, Hostile, add, gzip, zeros};

pub(super) fn add_all(all: &mut Vec<Hostile>, out: &str) {
    aliases(all, out);
    attribute_bombs(all);
    pax_tricks(all);
    sparse(all);
    streams(all);
    layers(all, out);
    layouts(all);
}

/// One thing under several spellings, and one spelling for several things.
fn aliases(all: &mut Vec<Hostile>, out: &str) {
    for alias in ["rootfs/d/.", "rootfs/./d", "rootfs//d", "./rootfs/d/", "rootfs/d/./"] {
        for target in [out, "..", "/"] {
            add(
                all,
                Fate::Harmless,
                format!("{alias} as a symlink to {target}, then a file in it (CVE-2021-29136)"),
                |t| {
                    t.dir(b"rootfs/d");
                    t.link(SYM, alias.as_bytes(), target.as_bytes());
                    t.file(b"rootfs/d/escape", b"x");
                },
            );
        }
        add(all, Fate::Refused, format!("a file {alias} in the place of a directory"), |t| {
            t.dir(b"rootfs/d");
            t.file(b"rootfs/d/inside", b"1");
            t.link(HARD, alias.as_bytes(), b"rootfs/d/inside");
        });
    }
    add(all, Fate::Refused, "a symlink, a directory of its name, a file in that (CVE-2026-33056)", |t| {
        t.link(SYM, b"rootfs/l", out.as_bytes());
        t.entry(&Head { mode: octal(0o7777, 8), ..head(b"rootfs/l/", DIR) }, b"");
        t.file(b"rootfs/l/victim", b"overwritten");
    });
    add(all, Fate::Refused, "a link replaced by a file, and the link again", |t| {
        t.link(SYM, b"rootfs/l", format!("{out}/victim").as_bytes());
        t.file(b"rootfs/l", b"overwritten");
        t.link(SYM, b"rootfs/l", out.as_bytes());
        t.file(b"rootfs/l/victim", b"overwritten");
    });
    add(all, Fate::Refused, "two symlinks that lead out together", |t| {
        t.link(SYM, b"rootfs/a", b"b/..");
        t.link(SYM, b"rootfs/b", b"..");
        t.file(b"rootfs/a/escape", b"x");
    });
    add(all, Fate::Refused, "a hard link to a symlink, and a file through it", |t| {
        t.link(SYM, b"rootfs/l", out.as_bytes());
        t.link(HARD, b"rootfs/h", b"rootfs/l");
        t.file(b"rootfs/h/victim", b"overwritten");
    });
    add(all, Fate::Refused, "a hard link whose target's directory became a symlink", |t| {
        t.dir(b"rootfs/d");
        t.link(SYM, b"rootfs/l", out.as_bytes());
        t.link(HARD, b"rootfs/h", b"rootfs/l/../out/victim");
    });
    add(all, Fate::Refused, "a hard link that names its target with ..", |t| {
        t.file(b"rootfs/first", b"1");
        t.dir(b"rootfs/d");
        t.link(HARD, b"rootfs/h", b"rootfs/d/../first");
    });
    for (kind, what) in [(CHR, "device"), (FIFO, "fifo"), (SYM, "symlink"), (FILE, "file")] {
        add(all, Fate::Refused, format!("a {what} where a directory must be"), |t| {
            t.any(kind, b"rootfs/x");
            t.file(b"rootfs/x/y/z", b"1");
        });
        add(all, Fate::Refused, format!("a directory where a {what} is"), |t| {
            t.any(kind, b"rootfs/x");
            t.dir(b"rootfs/x/");
        });
    }
    for name in
        [&b"rootfs/a\nb"[..], b"rootfs/\x1b[2J", b"rootfs/\xff\xfe", b"rootfs/ ", b"rootfs/-rf", b"rootfs/a\\..\\b"]
    {
        add(all, Fate::Harmless, format!("the name {:?}", String::from_utf8_lossy(name)), |t| {
            t.file(name, b"1");
        });
    }
    add(all, Fate::Harmless, "whiteouts in an ACI", |t| {
        t.file(b"rootfs/.wh.a", b"");
        t.file(b"rootfs/.wh..wh..opq", b"");
        t.file(b"rootfs/.wh.", b"");
        t.file(b"rootfs/.wh...", b"");
    });
}

fn attribute_bombs(all: &mut Vec<Hostile>) {
    let many = |count: usize, bytes: usize| -> Vec<u8> {
        (0..count).flat_map(|n| record(&format!("SCHILY.xattr.user.{n:x}"), &b"v".repeat(bytes))).collect()
    };
    add(all, Fate::Refused, "14,000 tiny attributes", |t| {
        t.extension(b'x', &many(14_000, 0));
        t.file(b"rootfs/a", b"1");
    });
    add(all, Fate::Refused, "14,000 tiny attributes for each of 2,000 entries, by one global record", |t| {
        t.extension(b'g', &many(14_000, 0));
        for n in 0..2000 {
            t.file(format!("rootfs/{n}").as_bytes(), b"");
        }
    });
    add(all, Fate::Refused, "100 KiB of attributes for each of 5,000 entries, by one global record", |t| {
        t.extension(b'g', &many(100, 1000));
        for n in 0..5000 {
            t.file(format!("rootfs/{n}").as_bytes(), b"");
        }
    });
    add(all, Fate::Refused, "100 KiB of attributes, another for each of 5,000 entries", |t| {
        t.extension(b'g', &many(100, 1000));
        for n in 0..5000 {
            t.pax(&[("SCHILY.xattr.user.mine", format!("{n}").as_bytes())]);
            t.file(format!("rootfs/{n}").as_bytes(), b"");
        }
    });
    add(all, Fate::Refused, "one global record after another, each with more attributes", |t| {
        for n in 0..200 {
            t.extension(b'g', &record(&format!("SCHILY.xattr.user.{n}"), &b"v".repeat(4000)));
        }
        for n in 0..1000 {
            t.pax(&[("SCHILY.xattr.user.mine", format!("{n}").as_bytes())]);
            t.file(format!("rootfs/{n}").as_bytes(), b"");
        }
    });
    for (what, name) in [
        ("a NUL", &b"SCHILY.xattr.user.a\0b"[..]),
        ("300 bytes", b"SCHILY.xattr.user.nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn"),
    ] {
        add(all, Fate::Refused, format!("an attribute's name with {what}"), |t| {
            let rest = name.len() + 4;
            let length = (rest..).find(|n| *n == rest - 1 + n.to_string().len()).expect("it counts itself");
            t.extension(b'x', &[format!("{length} ").as_bytes(), name, b"=v\n"].concat());
            t.file(b"rootfs/a", b"1");
        });
    }
    for name in
        ["user.", "user.containers.override_stat", "user.fuseoverlayfs.opaque", "user.overlay.opaque", "security.ima"]
    {
        add(all, Fate::Harmless, format!("attribute {name}"), |t| {
            t.pax(&[(&format!("SCHILY.xattr.{name}"), b"y")]);
            t.dir(b"rootfs/a");
        });
    }
    add(all, Fate::Harmless, "capabilities that are no capabilities", |t| {
        t.pax(&[("SCHILY.xattr.security.capability", b"\xff\xff\xff\xff")]);
        t.file(b"rootfs/a", b"1");
    });
}

fn pax_tricks(all: &mut Vec<Hostile>) {
    add(all, Fate::Refused, "a PAX size that hides an entry (CVE-2026-33055)", |t| {
        let mut inner = Tar::default();
        inner.any(FILE, b"../escape");
        t.pax(&[("size", inner.0.len().to_string().as_bytes())]);
        t.block(&Head { size: octal(0, 12), ..head(b"rootfs/a", DIR) });
        t.0.extend_from_slice(&inner.0);
    });
    add(all, Fate::Harmless, "a PAX size greater than the header's", |t| {
        let mut inner = Tar::default();
        inner.any(FILE, b"../escape");
        t.pax(&[("size", inner.0.len().to_string().as_bytes())]);
        t.block(&Head { size: octal(0, 12), ..head(b"rootfs/a", FILE) });
        t.0.extend_from_slice(&inner.0);
    });
    add(all, Fate::Refused, "a PAX size that is not there", |t| {
        t.pax(&[("size", b"1099511627776")]);
        t.file(b"rootfs/a", b"1");
    });
    add(all, Fate::Refused, "a path, then a worse one in the same record", |t| {
        t.pax(&[("path", b"rootfs/good"), ("path", b"../escape")]);
        t.file(b"rootfs/a", b"1");
    });
    for (name, kind) in [("uid", FILE), ("gid", DIR)] {
        add(all, Fate::Refused, format!("a global {name} past 32 bits"), |t| {
            t.extension(b'g', &record(name, b"4294967296"));
            t.any(kind, b"rootfs/a");
        });
    }
    add(all, Fate::Harmless, "a file of the year 292 billion and one before the flood", |t| {
        for (n, time) in ["9223372036854775807", "-9223372036854775807", "253402300800.999999999"].iter().enumerate() {
            t.pax(&[("mtime", time.as_bytes())]);
            t.file(format!("rootfs/{n}").as_bytes(), b"1");
        }
    });
    add(all, Fate::Harmless, "a PAX record for a PAX record", |t| {
        t.pax(&[("path", b"../escape")]);
        t.extension(b'g', &record("comment", b"c"));
        t.file(b"rootfs/a", b"1");
    });
    add(all, Fate::Refused, "a GNU long name for a PAX record", |t| {
        t.extension(b'L', b"../escape\0");
        t.pax(&[("comment", b"c")]);
        t.file(b"rootfs/a", b"1");
    });
    add(all, Fate::Refused, "a GNU long name with a NUL within", |t| {
        t.extension(b'L', b"rootfs/a\0../escape\0");
        t.file(b"x", b"1");
    });
    add(all, Fate::Harmless, "the charset of another world", |t| {
        t.pax(&[("hdrcharset", b"BINARY"), ("path", b"rootfs/\xc0\xae\xc0\xae")]);
        t.file(b"rootfs/a", b"1");
    });
    add(all, Fate::Harmless, "names with the prefix of ustar", |t| {
        let mut block = [0_u8; 512];
        block[..6].copy_from_slice(b"escape");
        block[100..108].copy_from_slice(&octal(0o644, 8));
        block[156] = FILE;
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[345..347].copy_from_slice(b"..");
        t.seal(block);
    });
}

fn sparse(all: &mut Vec<Hostile>) {
    let map = |map: &'static [u8], size: &'static [u8], content: &'static [u8]| {
        move |t: &mut Tar| {
            t.pax(&[("GNU.sparse.map", map), ("GNU.sparse.size", size), ("GNU.sparse.name", b"rootfs/s")]);
            t.entry(&head(b"rootfs/x", FILE), content);
        }
    };
    for (name, fate, build) in [
        ("a sparse map that overlaps itself", Fate::Refused, map(b"0,4,2,4", b"8", b"abcdefgh")),
        ("a sparse map that goes past the end", Fate::Refused, map(b"4,8", b"8", b"abcdefgh")),
        (
            "a sparse map that wraps",
            Fate::Refused,
            map(b"18446744073709551615,8", b"18446744073709551615", b"abcdefgh"),
        ),
        ("a sparse map with less data than it says", Fate::Refused, map(b"0,100", b"200", b"abc")),
        ("a sparse map with more data than it says", Fate::Refused, map(b"0,1", b"200", b"abc")),
        ("a sparse map with an odd number", Fate::Refused, map(b"0,1,2", b"200", b"a")),
    ] {
        add(all, fate, name, build);
    }
    add(all, Fate::Refused, "a sparse name that leads out", |t| {
        t.pax(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"2"), ("GNU.sparse.name", b"../escape")]);
        t.entry(&head(b"rootfs/x", FILE), b"a");
    });
    add(all, Fate::Refused, "the map of a sparse file on a symlink", |t| {
        t.pax(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"2")]);
        t.entry(&Head { link: b"/etc/passwd".to_vec(), ..head(b"rootfs/x", SYM) }, b"a");
    });
    add(all, Fate::Harmless, "500,000 pieces of a sparse file, each of nothing", |t| {
        let mut records = record("GNU.sparse.size", b"1");
        records.extend(record("GNU.sparse.map", &b"0,0,".repeat(250_000)[..999_999]));
        t.extension(b'x', &records);
        t.file(b"rootfs/s", b"");
    });
    add(all, Fate::Refused, "sparse files of 100 MiB of holes, 2,000 of them", |t| {
        for n in 0..2000 {
            t.pax(&[
                ("GNU.sparse.map", b""),
                ("GNU.sparse.size", b"104857600"),
                ("GNU.sparse.name", format!("rootfs/{n}").as_bytes()),
            ]);
            t.entry(&head(b"rootfs/s", FILE), b"");
        }
    });
}

/// Compressed streams: many members, cut members, one in another.
fn streams(all: &mut Vec<Hostile>) {
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).expect("compress");
    let xz = |bytes: &[u8]| {
        let mut out = liblzma::write::XzEncoder::new(Vec::new(), 1);
        std::io::Write::write_all(&mut out, bytes).expect("compress");
        out.finish().expect("compress")
    };
    let bzip2 = |bytes: &[u8]| {
        let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        std::io::Write::write_all(&mut out, bytes).expect("compress");
        out.finish().expect("compress")
    };
    let good = Tar::aci().end();
    let (front, back) = good.split_at(700);
    let mut bomb = Tar::aci();
    bomb.block(&Head { size: octal((1 << 33) - 1, 12), ..head(b"rootfs/zeros", FILE) });
    let compressors: [(&str, &dyn Fn(&[u8]) -> Vec<u8>); 4] =
        [("gzip", &gzip), ("zstd", &zstd), ("xz", &xz), ("bzip2", &bzip2)];
    for (name, compress) in compressors {
        let mut add = |fate, what: &str, bytes: Vec<u8>| {
            all.push(Hostile { name: format!("{name}: {what}"), fate, bytes });
        };
        add(Fate::Harmless, "one archive in two members", [compress(front), compress(back)].concat());
        add(Fate::Refused, "the second member cut off", {
            let second = compress(back);
            [compress(front), second[..second.len() - 4].to_vec()].concat()
        });
        add(Fate::Refused, "the second member of another kind", {
            let other = if name == "gzip" { zstd(back) } else { gzip(back) };
            [compress(front), other].concat()
        });
        add(
            Fate::Harmless,
            "2,000 members of nothing before the archive",
            [compress(b"").repeat(2000), compress(&good)].concat(),
        );
        // zstd(1) writes a check sum, its library does not: then the bytes are what they are, and so is the id.
        let fate = if name == "zstd" { Fate::Harmless } else { Fate::Refused };
        add(fate, "a changed byte in the middle", {
            let noise: Vec<u8> = (0..60_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            let mut tar = Tar::aci();
            tar.file(b"rootfs/noise", &noise);
            let mut bytes = compress(&tar.end());
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x40;
            bytes
        });
        add(Fate::Refused, "an archive in an archive's place", compress(&compress(&good)));
        if matches!(name, "gzip" | "bzip2") {
            // gzip gives at most 1032 for one: the size of the file within it is what stops it, at the end of the stream.
            add(
                Fate::Refused,
                "a file of 512 MiB of zeros, cut off",
                [compress(&bomb.0), zeros(512, compress)].concat(),
            );
        }
    }
}

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn sha256(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&<sha2::Sha256 as sha2::Digest>::digest(bytes))
}

/// A layout in a tar: blobs by their digests.
struct Layout(Tar);

impl Layout {
    fn new() -> Self {
        let mut tar = Tar::default();
        tar.file(b"oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        Layout(tar)
    }

    /// Add a blob; gives its descriptor.
    fn blob(&mut self, media: &str, bytes: &[u8]) -> String {
        let digest = sha256(bytes);
        self.0.file(format!("blobs/sha256/{digest}").as_bytes(), bytes);
        format!(r#"{{"mediaType":"{media}","digest":"sha256:{digest}","size":{}}}"#, bytes.len())
    }

    fn image(&mut self, layers: &[Vec<u8>]) -> String {
        let diff_ids: Vec<String> = layers.iter().map(|layer| format!("\"sha256:{}\"", sha256(layer))).collect();
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            diff_ids.join(",")
        );
        let config = self.blob(CONFIG, config.as_bytes());
        let layers: Vec<String> = layers.iter().map(|layer| self.blob(LAYER, layer)).collect();
        let manifest = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{}]}}"#, layers.join(","));
        self.blob(MANIFEST, manifest.as_bytes())
    }

    fn end(mut self, descriptors: &str) -> Vec<u8> {
        self.0.file(b"index.json", format!(r#"{{"schemaVersion":2,"manifests":[{descriptors}]}}"#).as_bytes());
        self.0.end()
    }
}

/// Layers of a good layout, each of which means harm.
fn layers(all: &mut Vec<Hostile>, out: &str) {
    let layer = |build: &dyn Fn(&mut Tar)| {
        let mut tar = Tar::default();
        build(&mut tar);
        tar.end()
    };
    let lower = layer(&|t| {
        t.dir(b"d");
        t.file(b"d/f", b"1");
        t.link(SYM, b"l", out.as_bytes());
    });
    let mut image = |fate, name: String, layers: &[Vec<u8>]| {
        let mut layout = Layout::new();
        let descriptor = layout.image(layers);
        all.push(Hostile { name: format!("layer: {name}"), fate, bytes: layout.end(&descriptor) });
    };
    image(Fate::Harmless, "a good one".into(), std::slice::from_ref(&lower));
    for name in [
        "..",
        ".wh...",
        ".wh..",
        "../.wh.victim",
        "d/../../.wh.victim",
        "l/.wh.victim",
        ".wh.l/victim",
        ".wh.",
        ".wh..wh.",
        ".wh..wh..opq/x",
        "/.wh.victim",
        "d/.wh./x",
        ".wh..wh.plnk/1",
        ".wh.d/",
        "d/.wh..wh..opq",
    ] {
        for (kind, what) in [(FILE, "file"), (DIR, "directory"), (CHR, "device"), (SYM, "symlink")] {
            let upper = layer(&|t| t.any(kind, name.as_bytes()));
            image(Fate::Harmless, format!("{what} {name} over a lower layer"), &[lower.clone(), upper]);
        }
    }
    let through = layer(&|t| t.file(b"l/victim", b"overwritten"));
    image(Fate::Harmless, "a file through the lower layer's symlink".into(), &[lower.clone(), through]);
    let replaced = layer(&|t| {
        t.link(SYM, b"x", out.as_bytes());
        t.file(b"x", b"a file");
        t.dir(b"x");
        t.file(b"x/victim", b"overwritten");
        t.link(SYM, b"x/up", b"../..");
        t.file(b"x/up", b"a file");
    });
    image(Fate::Harmless, "a link replaced by a file, by a directory".into(), &[replaced]);
    let in_the_way = layer(&|t| {
        t.dir(b"x");
        t.file(b"x/y", b"1");
        t.link(SYM, b"x", out.as_bytes());
        t.file(b"x/victim", b"overwritten");
    });
    image(Fate::Refused, "a full directory replaced by a symlink".into(), &[in_the_way]);
    let devices = layer(&|t| {
        t.any(CHR, b"null");
        t.file(b"null", b"to the device");
        t.any(FIFO, b"fifo");
        t.file(b"fifo", b"blocks for ever");
        t.entry(&Head { major: 0, minor: 0, ..head(b"whiteout", CHR) }, b"");
    });
    image(Fate::Harmless, "devices replaced by files, and overlay's own whiteout".into(), &[devices]);
    let opaque = layer(&|t| {
        t.pax(&[
            ("SCHILY.xattr.trusted.overlay.redirect", b"/../../../../etc"),
            ("SCHILY.xattr.user.overlay.redirect", b"/etc"),
        ]);
        t.dir(b"d");
    });
    image(Fate::Harmless, "a redirect of overlayfs".into(), &[lower.clone(), opaque]);
    let cut = lower[..600].to_vec();
    image(Fate::Refused, "cut off".into(), &[cut]);
    image(Fate::Refused, "no tar at all".into(), &[b"hello, world".repeat(100)]);
    let copies = vec![lower; 600];
    image(Fate::Refused, "600 times the same".into(), &copies);
}

fn layouts(all: &mut Vec<Hostile>) {
    let mut add = |fate, name: &str, bytes: Vec<u8>| all.push(Hostile { name: format!("layout: {name}"), fate, bytes });
    // An index cannot name itself; it can name others as long as there are any.
    let mut layout = Layout::new();
    let mut at = layout.image(&[Tar::default().end()]);
    for _ in 0..200 {
        at = layout.blob(INDEX, format!(r#"{{"schemaVersion":2,"manifests":[{at}]}}"#).as_bytes());
    }
    add(Fate::Refused, "200 indexes in one another", layout.end(&at));
    let mut layout = Layout::new();
    let good = layout.image(&[Tar::default().end()]);
    let many = vec![good.clone(); 3000].join(",");
    add(Fate::Refused, "3,000 manifests", layout.end(&many));
    for (name, from, to) in [
        ("a manifest announced as an index", MANIFEST, INDEX),
        ("a manifest announced as a layer", MANIFEST, LAYER),
        ("a size that is not the blob's", "\"size\":", "\"size\":1"),
        ("a negative size", "\"size\":", "\"size\":-"),
        ("a digest of another algorithm", "sha256:", "sha512:"),
        ("a digest that is a path", "sha256:", "sha256:../"),
        ("a digest in capitals", "sha256:", "SHA256:"),
    ] {
        let mut layout = Layout::new();
        let good = layout.image(&[Tar::default().end()]);
        add(Fate::Refused, name, layout.end(&good.replacen(from, to, 1)));
    }
    let mut layout = Layout::new();
    let config =
        layout.blob(CONFIG, br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#);
    let both = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[],"manifests":[]}}"#);
    let both = layout.blob(MANIFEST, both.as_bytes());
    add(Fate::Refused, "both index and manifest (CVE-2021-41190)", layout.end(&both));
    let mut layout = Layout::new();
    let lie = layout.blob(LAYER, &Tar::default().end());
    let config = layout.blob(
        CONFIG,
        format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["sha256:{}"]}}}}"#,
            "0".repeat(64)
        )
        .as_bytes(),
    );
    let manifest =
        layout.blob(MANIFEST, format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{lie}]}}"#).as_bytes());
    add(Fate::Refused, "a diff id that the layer has not", layout.end(&manifest));
    let mut layout = Layout::new();
    let digest = "0".repeat(64);
    layout.0.file(format!("blobs/sha256/{digest}").as_bytes(), b"{}");
    let lie = format!(r#"{{"mediaType":"{MANIFEST}","digest":"sha256:{digest}","size":2}}"#);
    add(Fate::Refused, "a blob that is not its digest", layout.end(&lie));
    let mut layout = Layout::new();
    let good = layout.image(&[Tar::default().end()]);
    layout.0.link(SYM, b"blobs/sha256/x", b"/etc/passwd");
    layout.0.any(FIFO, b"fifo");
    add(Fate::Refused, "a fifo among the blobs", layout.end(&good));
    let mut layout = Layout::new();
    let good = layout.image(&[Tar::default().end()]);
    layout.0.file(b"../escape", b"x");
    add(Fate::Refused, "a name that leads out", layout.end(&good));
    let mut tar = Tar::default();
    tar.link(SYM, b"blobs", b"/");
    tar.file(b"blobs/tmp/fsprov-escape", b"x");
    add(Fate::Refused, "blobs is a symlink to /", tar.end());
    let mut tar = Tar::default();
    tar.file(b"manifest.json", br#"[{"Config":"manifest.json","Layers":[]}]"#);
    add(Fate::Refused, "docker: its manifest is its config", tar.end());
    let mut tar = Tar::default();
    tar.file(b"manifest.json", br#"[{"Config":"manifest.json/","Layers":["manifest.json"]}]"#);
    add(Fate::Refused, "docker: a file as a directory", tar.end());
    let mut tar = Tar::default();
    tar.link(SYM, b"c", b"c");
    tar.file(b"manifest.json", br#"[{"Config":"c","Layers":[]}]"#);
    add(Fate::Refused, "docker: a symlink to itself", tar.end());
    let mut tar = Tar::default();
    tar.file(
        b"manifest.json",
        format!(r#"[{{"Config":"c","Layers":[{}]}}]"#, vec!["\"l\""; 5000].join(",")).as_bytes(),
    );
    add(Fate::Refused, "docker: 5,000 layers", tar.end());
    let mut tar = Tar::default();
    tar.file(b"manifest.json", format!("[{}]", vec![r#"{"Config":"c","Layers":[]}"#; 20_000].join(",")).as_bytes());
    add(Fate::Refused, "docker: 20,000 images", tar.end());
}
