//! Random archives, unpacked by GNU tar and by us: the same trees.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use fsprov::internals::paths::StatePaths;
use fsprov::store::{ImageSource, ImportOptions, Store};
use libtest_mimic::Failed;

use super::tarball::{CHR, DIR, FIFO, FILE, HARD, Head, SYM, Tar, head, octal};
use super::tell;

/// xorshift64*: a seed printed is an archive found again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.roll(n) == 0
    }
}

fn name(dice: &mut Dice) -> Vec<u8> {
    let length = match dice.roll(20) {
        0 => 255,
        1 => 99 + dice.roll(4),
        _ => 1 + dice.roll(12),
    };
    let any = dice.one_in(6);
    let mut name: Vec<u8> = (0..length)
        .map(|_| match dice.roll(if any { 250 } else { 26 }) as u8 {
            n if any => match n + 1 {
                b'/' => b'_',
                n => n,
            },
            n => b'a' + n,
        })
        .collect();
    if name == b"." || name == b".." {
        name = b"dot".to_vec();
    }
    name
}

/// A random archive: entries below entries, each in a format of its own.
fn random(seed: u64, is_root: bool) -> Tar {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut tar = Tar::aci();
    let mut dirs: Vec<Vec<u8>> = vec![b"rootfs".to_vec()];
    let mut links: Vec<Vec<u8>> = Vec::new();
    let mut taken: std::collections::HashSet<Vec<u8>> = std::collections::HashSet::new();
    for _ in 0..1 + dice.roll(25) {
        let parent = dirs[dice.roll(dirs.len() as u64) as usize].clone();
        let mut path = [&*parent, b"/", &*name(&mut dice)].concat();
        if dice.one_in(8) {
            // Parents that no entry speaks of.
            path = [&*path, b"/", &*name(&mut dice)].concat();
        }
        let prefixes = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| path[..i].to_vec());
        if path.len() > 2000
            || taken.contains(&path)
            || prefixes.into_iter().any(|p| taken.contains(&p) && !dirs.contains(&p))
        {
            continue;
        }
        let kind = match dice.roll(12) {
            0..=4 => FILE,
            5..=7 => DIR,
            8 => SYM,
            9 if !links.is_empty() => HARD,
            10 if is_root => CHR,
            11 => FIFO,
            _ => FILE,
        };
        let mut h = head(&path, kind);
        h.mode = octal(dice.roll(0o10000), 8);
        if !is_root {
            h.mode = octal(0o600 | dice.roll(0o1000), 8);
        }
        if kind == DIR {
            h.mode = octal(0o700 | dice.roll(0o2000), 8);
        }
        let uid = dice.roll(70_000);
        let own = rustix::process::geteuid().as_raw();
        h.uid = octal(if is_root { uid } else { own.into() }, 8);
        h.gid = octal(if is_root { dice.roll(3) } else { rustix::process::getegid().as_raw().into() }, 8);
        h.mtime = octal(dice.roll(2_000_000_000), 12);
        if kind == CHR {
            (h.major, h.minor) = (dice.roll(4000) as u32, dice.roll(200_000) as u32);
        }
        let target = match kind {
            HARD => links[dice.roll(links.len() as u64) as usize].clone(),
            SYM => name(&mut dice),
            _ => Vec::new(),
        };
        h.link.clone_from(&target);
        extend(&mut tar, &mut dice, &mut h, &path, &target);
        let content: Vec<u8> =
            (0..if kind == FILE { dice.roll(3) * dice.roll(2000) } else { 0 }).map(|n| n as u8).collect();
        tar.entry(&h, &content);
        match kind {
            DIR => dirs.push(path.clone()),
            FILE => links.push(path.clone()),
            _ => {}
        }
        taken.insert(path.clone());
        let mut above = path.len();
        while let Some(slash) = path[..above].iter().rposition(|b| *b == b'/') {
            above = slash;
            let parent = path[..slash].to_vec();
            if !dirs.contains(&parent) {
                // It is there now, made by its child; an entry of its own would be no duplicate.
                dirs.push(parent.clone());
                taken.insert(parent);
            }
        }
    }
    tar
}

/// Say what does not fit a header, and now and then what would, by PAX or by GNU's records.
fn extend(tar: &mut Tar, dice: &mut Dice, h: &mut Head, path: &[u8], target: &[u8]) {
    let long = path.len() > 100 || target.len() > 100;
    if dice.one_in(2) && (long || dice.one_in(3)) {
        if path.len() > 100 {
            tar.extension(b'L', &[path, b"\0"].concat());
        }
        if target.len() > 100 {
            tar.extension(b'K', &[target, b"\0"].concat());
        }
        h.is_gnu = true;
        return;
    }
    let mut records: Vec<(&str, Vec<u8>)> = Vec::new();
    if path.len() > 100 || dice.one_in(10) {
        records.push(("path", path.to_vec()));
    }
    if target.len() > 100 {
        records.push(("linkpath", target.to_vec()));
    }
    if dice.one_in(4) {
        let sign = if dice.one_in(4) { "-" } else { "" };
        records.push(("mtime", format!("{sign}{}.{:09}", dice.roll(1 << 31), dice.roll(1_000_000_000)).into_bytes()));
    }
    if dice.one_in(10) && h.kind == FILE {
        records.push(("SCHILY.xattr.user.note", name(dice)));
    }
    if dice.one_in(10) {
        records.push(("comment", b"nothing".to_vec()));
    }
    if !records.is_empty() {
        let records: Vec<(&str, &[u8])> = records.iter().map(|(key, value)| (*key, &**value)).collect();
        tar.pax(&records);
    }
}

/// One line for each path: what stat, readlink, read and getxattr tell. Hard links by the first name of their group.
fn look(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut seen = BTreeMap::new();
    let mut groups: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
    let mut stack = vec![root.to_owned()];
    while let Some(path) = stack.pop() {
        let meta = fs::symlink_metadata(&path).expect("stat");
        let key = path.strip_prefix(root).expect("below").as_os_str().as_bytes().to_vec();
        let what = if meta.is_dir() {
            stack.extend(fs::read_dir(&path).expect("list").map(|e| e.expect("entry").path()));
            String::new()
        } else if meta.is_symlink() {
            format!("-> {:?}", fs::read_link(&path).expect("readlink"))
        } else if meta.is_file() {
            let mut value = vec![0; 65_536];
            let length = rustix::fs::lgetxattr(&path, "user.note", &mut value[..]).unwrap_or(0);
            format!("{:?} note {:?}", fs::read(&path).expect("read"), &value[..length])
        } else {
            format!("device {:x}", meta.rdev())
        };
        if !meta.is_dir() && meta.nlink() > 1 {
            groups.entry(meta.ino()).or_default().push(key.clone());
        }
        // A directory that no entry speaks of has tar's own time, owner and mode: 1970 and root's 0755 here.
        let line =
            format!("{:o} {}:{} {}.{:09} {what}", meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec());
        seen.insert(key, line);
    }
    for group in groups.values_mut() {
        group.sort();
        for key in &*group {
            seen.get_mut(key).expect("seen").push_str(&format!(" linked {:?}", group[0]));
        }
    }
    seen
}

pub(crate) fn with_gnu_tar() -> Result<(), Failed> {
    let count: u64 = std::env::var("FSPROV_TEST_ARCHIVES").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let is_root = rustix::process::geteuid().is_root();
    // In memory where there is such a place: each import syncs its file system.
    let shm = Path::new("/dev/shm");
    let top = if shm.is_dir() { tempfile::tempdir_in(shm)? } else { tempfile::tempdir()? };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() as i64;
    let store = Store::open(&StatePaths::new(top.path().join("state")))?;
    let (mut accepted, mut entries) = (0_u64, 0);
    for seed in 0..count {
        let bytes = random(seed, is_root).end();
        let archive = top.path().join("archive");
        fs::write(&archive, &bytes)?;
        let imported = match store.import(&ImageSource::Archive(archive), &ImportOptions::default()) {
            Ok(imported) => imported,
            Err(error) => return Err(format!("seed {seed}: {error}").into()),
        };
        let want = top.path().join("want");
        fs::create_dir(&want)?;
        let mut tar = Command::new("tar")
            .args([
                "--numeric-owner",
                "--xattrs",
                "--xattrs-include=user.*",
                "--delay-directory-restore",
                "-xpf",
                "-",
                "-C",
            ])
            .arg(&want)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        tar.stdin.take().expect("a pipe").write_all(&bytes)?;
        let said = tar.wait_with_output()?;
        if !said.status.success() {
            let text = String::from_utf8_lossy(&said.stderr).into_owned();
            return Err(format!("seed {seed}: tar refuses what we take: {text}").into());
        }
        let theirs = look(&want.join("rootfs"));
        let ours = look(&store.paths().image(&imported.id).join("rootfs"));
        if theirs.keys().ne(ours.keys()) {
            return Err(format!("seed {seed}: other names").into());
        }
        for (path, line) in &theirs {
            let our = &ours[path];
            let is_implied = our.starts_with("40755 ") && our.contains(" 0.000000000 ");
            let made_now =
                line.split(' ').nth(2).and_then(|t| t.split('.').next()?.parse().ok()).is_some_and(|t: i64| t >= now);
            if line != our && !(is_implied && made_now) {
                return Err(
                    format!("seed {seed}: {:?}\n tar: {line}\n we:  {our}", String::from_utf8_lossy(path)).into()
                );
            }
        }
        entries += theirs.len();
        accepted += 1;
        fsprov::internals::sys::remove::remove_tree(&want)?;
        let image = fsprov::id::ImageRef::Id(imported.id);
        store.remove(&image, &|| Ok(Vec::new()))?;
    }
    tell(&format!("{accepted} archives with {entries} paths are as GNU tar unpacks them"));
    Ok(())
}
