//! Root filesystems to provision: a tree with one of everything, archives of it, and the Debian image that scripts/setup caches.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::Stage;

/// Who makes the tree decides what can be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Maker {
    /// Device nodes and foreign owners too.
    RealRoot,
    Anyone,
}

impl Stage {
    /// A plain directory that is a root filesystem with one of everything, at `image` below the case's directory.
    pub(crate) fn full_image(&self) -> PathBuf {
        let root = self.dir.join("image");
        let maker = if self.lane.is_real_root() { Maker::RealRoot } else { Maker::Anyone };
        make_full_tree(&root, maker);
        root
    }

    /// A small root filesystem: the usual directories, some files, the symlinks that volumes meet.
    pub(crate) fn small_image(&self) -> PathBuf {
        let root = self.dir.join("image");
        make_small_tree(&root);
        root
    }
}

fn file(path: impl AsRef<Path>, content: impl AsRef<[u8]>, mode: u32) {
    let path = path.as_ref();
    fs::write(path, content).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
    chmod(path, mode);
}

pub(crate) fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .unwrap_or_else(|e| panic!("chmod {}: {e}", path.display()));
}

pub(crate) fn make_small_tree(root: &Path) {
    for dir in ["bin", "etc", "tmp", "var/lib", "run/lock", "home/u", "proc", "sys", "dev", "usr/share/doc", "data"] {
        fs::create_dir_all(root.join(dir)).expect("make dir");
    }
    chmod(&root.join("tmp"), 0o1777);
    file(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n", 0o644);
    file(root.join("etc/hosts"), "127.0.0.1 localhost\n", 0o644);
    file(root.join("bin/tool"), "#!/bin/sh\necho tool\n", 0o755);
    file(root.join("home/u/notes"), "from the image\n", 0o666);
    symlink("/run", root.join("var/run")).expect("symlink");
    symlink("../run/lock", root.join("var/lock")).expect("symlink");
}

pub(crate) fn make_full_tree(root: &Path, maker: Maker) {
    make_small_tree(root);
    // Contents: empty, one byte, a page and one more, more than one FUSE request, sparse.
    file(root.join("usr/empty"), "", 0o644);
    file(root.join("usr/one"), "x", 0o600);
    file(root.join("usr/page"), noise(4097, 1), 0o644);
    file(root.join("usr/big"), noise(3 << 20, 2), 0o644);
    let sparse = fs::File::create(root.join("usr/sparse")).expect("create");
    std::os::unix::fs::FileExt::write_at(&sparse, b"end", 5 << 20).expect("write");
    // Modes: a setuid program, unreadable things, a directory that cannot be listed and one that cannot be entered.
    file(root.join("usr/setuid"), "s", 0o4755);
    file(root.join("usr/setgid"), "s", 0o2755);
    file(root.join("usr/closed"), "c", 0o000);
    for (name, mode) in
        [("usr/d700", 0o700), ("usr/d555", 0o555), ("usr/dsgid", 0o2775), ("usr/d311", 0o311), ("usr/d644", 0o644)]
    {
        fs::create_dir(root.join(name)).expect("make dir");
        file(root.join(name).join("inside"), name, 0o644);
        chmod(&root.join(name), mode);
    }
    // Hard links: within a directory, and across two.
    file(root.join("usr/link-a"), "linked", 0o644);
    fs::hard_link(root.join("usr/link-a"), root.join("usr/link-b")).expect("link");
    fs::hard_link(root.join("usr/link-a"), root.join("usr/share/doc/link-c")).expect("link");
    // Symlinks: dangling, absolute, to itself, as long as one may be, out of the root, and one with a hard link.
    for (target, name) in [
        ("nowhere", "usr/dangling"),
        ("/etc/passwd", "usr/absolute"),
        ("self", "usr/self"),
        ("../../../../../../../../etc", "usr/up"),
        ("/", "usr/slash"),
    ] {
        symlink(target, root.join(name)).expect("symlink");
    }
    symlink("l".repeat(4095), root.join("usr/long")).expect("symlink");
    symlink("one", root.join("usr/symlink-a")).expect("symlink");
    fs::hard_link(root.join("usr/symlink-a"), root.join("usr/symlink-b")).expect("link a symlink");
    // Names.
    fs::create_dir(root.join("usr/names")).expect("make dir");
    for name in odd_names() {
        file(root.join("usr/names").join(&name), name.as_os_str().as_bytes(), 0o644);
    }
    // More entries than one readdir page of any size in use.
    fs::create_dir(root.join("usr/many")).expect("make dir");
    for i in 0..2000 {
        fs::write(root.join(format!("usr/many/entry-number-{i:04}")), []).expect("write");
    }
    let deep: PathBuf = std::iter::repeat_n("deep", 60).collect();
    fs::create_dir_all(root.join("usr").join(&deep)).expect("make dir");
    file(root.join("usr").join(&deep).join("bottom"), "bottom", 0o644);
    // Things that are neither.
    let mknod = |name: &str, kind: FileType, device: u64| {
        rustix::fs::mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o640), device)
            .unwrap_or_else(|e| panic!("mknod {name}: {e}"));
    };
    mknod("usr/fifo", FileType::Fifo, 0);
    mknod("usr/socket", FileType::Socket, 0);
    if maker == Maker::RealRoot {
        mknod("dev/null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        mknod("usr/block", FileType::BlockDevice, rustix::fs::makedev(259, 70_000));
        for (name, uid, gid) in [("usr/owned", 1234, 5678), ("usr/owned-high", 3_000_000, 4_000_000_000)] {
            file(root.join(name), name, 0o640);
            std::os::unix::fs::lchown(root.join(name), Some(uid), Some(gid)).expect("chown");
        }
        // Empty and zero: a program given this has no capability, so it is no danger to the machine that runs the tests.
        let caps = [&[1, 0, 0, 2][..], &[0; 16][..]].concat();
        rustix::fs::setxattr(root.join("usr/owned"), "security.capability", &caps, XattrFlags::empty())
            .expect("setxattr");
    }
    // Attributes.
    for (name, value) in
        [("user.note", &b"a value with \0 in it"[..]), ("user.empty", b""), ("user.long", &[b'v'; 2000])]
    {
        rustix::fs::setxattr(root.join("usr/page"), name, value, XattrFlags::empty()).expect("setxattr");
    }
    rustix::fs::setxattr(root.join("usr/share"), "user.dir", b"on a directory", XattrFlags::empty()).expect("setxattr");
    // Times: with nanoseconds, before 1970, after 2038; last, since what is made inside a directory changes its own.
    for (name, secs, nanos) in [
        ("usr/one", 1_000_000_000, 123_456_789),
        ("usr/empty", -86_400, 500_000_000),
        ("usr/page", 4_000_000_000, 1),
        ("usr/names", 1, 0),
    ] {
        set_time(&root.join(name), secs, nanos);
    }
    set_time(&root.join("usr/dangling"), 1_111_111_111, 999_999_999);
}

pub(crate) fn set_time(path: &Path, secs: i64, nanos: i64) {
    let time = Timespec { tv_sec: secs, tv_nsec: nanos as _ };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .unwrap_or_else(|e| panic!("utimens {}: {e}", path.display()));
}

/// Names that trip programs which take them for text, options or fields.
pub(crate) fn odd_names() -> Vec<PathBuf> {
    let mut names: Vec<Vec<u8>> = [
        &b"a space"[..],
        b" leading and trailing ",
        b"comma,in,it",
        b"new\nline",
        b"back\\slash",
        b"octal\\040escape",
        b"not-utf8-\xff\xfe",
        b"colon:in:it",
        b"quote'\"`$(x)",
        b"-rf",
        b"...",
        b"\x01\x7f",
        "umläut-日本".as_bytes(),
    ]
    .iter()
    .map(|name| name.to_vec())
    .collect();
    names.push(vec![b'n'; 255]);
    names.into_iter().map(|name| PathBuf::from(std::ffi::OsString::from(std::ffi::OsStr::from_bytes(&name)))).collect()
}

/// Bytes that no compressor and no lucky guess gets right, the same every time (xorshift64).
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A manifest that keeps every rule of the AppC specification.
pub(crate) fn manifest(name: &str) -> String {
    format!(
        r#"{{"acKind":"ImageManifest","acVersion":"0.8.11","name":"{name}","labels":[{{"name":"version","value":"1.0.0"}},{{"name":"os","value":"linux"}},{{"name":"arch","value":"amd64"}}]}}"#
    )
}

/// The Rust toolchain that built this test: a directory with `bin/cargo` and `bin/rustc`.
pub(crate) fn toolchain() -> PathBuf {
    std::env::var_os("FSPROV_TEST_TOOLCHAIN").map_or_else(
        || Path::new(env!("CARGO")).ancestors().nth(2).expect("cargo lies in a bin directory").to_owned(),
        PathBuf::from,
    )
}

/// Where the cached Debian tar is.
pub(crate) fn minbase_source() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/fsprov-test"));
    let places =
        [std::env::var_os("FSPROV_TEST_CACHE").map(PathBuf::from), Some("/var/cache/fsprov-test".into()), home];
    places.into_iter().flatten().map(|dir| dir.join("minbase.tar")).find(|path| fs::File::open(path).is_ok())
}

/// The Debian image as an ACI: the cached tar with a manifest in front and every name below `rootfs/`. Kept beside the tar where
/// that place can be written, else made in the temporary directory.
pub(crate) fn minbase_aci() -> Result<PathBuf, String> {
    let source = minbase_source().ok_or("there is no minbase.tar: scripts/setup")?;
    let meta = fs::metadata(&source).map_err(|e| e.to_string())?;
    let stamp =
        meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok()).map_or(0, |d| d.as_secs());
    // The name holds what it was made from: another tar makes another archive.
    let name = format!("minbase-{}-{stamp}.aci", meta.len());
    let beside = source.with_file_name(&name);
    if beside.is_file() {
        return Ok(beside);
    }
    let home = source.parent().filter(|dir| rustix::fs::access(*dir, rustix::fs::Access::WRITE_OK).is_ok());
    let target = home.map_or_else(|| std::env::temp_dir().join(&name), |dir| dir.join(&name));
    if target.is_file() {
        return Ok(target);
    }
    let part =
        tempfile::NamedTempFile::new_in(target.parent().unwrap_or(Path::new("/tmp"))).map_err(|e| e.to_string())?;
    rewrite_as_aci(&source, part.as_file()).map_err(|e| format!("make {}: {e}", target.display()))?;
    chmod(part.path(), 0o644);
    part.persist(&target).map_err(|e| e.to_string())?;
    Ok(target)
}

fn rewrite_as_aci(source: &Path, to: &fs::File) -> std::io::Result<()> {
    let below = |path: &Path| {
        let relative: PathBuf = path.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
        Path::new("rootfs").join(relative)
    };
    let mut out = tar::Builder::new(std::io::BufWriter::with_capacity(1 << 20, to));
    let text = manifest("example.com/debian-minbase");
    let mut header = tar::Header::new_gnu();
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    out.append_data(&mut header, "manifest", text.as_bytes())?;
    let mut archive = tar::Archive::new(std::io::BufReader::with_capacity(1 << 20, fs::File::open(source)?));
    for entry in archive.entries()? {
        let entry = entry?;
        let mut header = entry.header().clone();
        let path = below(&entry.path()?);
        match (header.entry_type(), entry.link_name()?) {
            (tar::EntryType::Link, Some(target)) => out.append_link(&mut header, path, below(&target))?,
            (tar::EntryType::Symlink, Some(target)) => out.append_link(&mut header, path, target)?,
            _ => out.append_data(&mut header, path, entry)?,
        }
    }
    out.into_inner()?.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
}
