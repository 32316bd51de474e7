//! The oracle: everything a program can see of a tree, one line a path, from plain system calls.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// What is seen of a tree: for every path below its root (and the root itself, as ""), a line of what stat, readlink, read and
/// listxattr gave. Errors are part of the picture: what the source refuses, the rootfs must refuse in the same words.
pub(crate) type Picture = BTreeMap<Vec<u8>, String>;

/// Look at everything below `root`.
pub(crate) fn picture(root: &Path) -> Picture {
    let mut seen = Picture::new();
    // (dev, ino) -> first path in byte order of those that share it: names the hard-link group.
    let mut groups: BTreeMap<(u64, u64), Vec<Vec<u8>>> = BTreeMap::new();
    let mut stack = vec![PathBuf::new()];
    while let Some(relative) = stack.pop() {
        let path = if relative.as_os_str().is_empty() { root.to_owned() } else { root.join(&relative) };
        let key = relative.as_os_str().as_bytes().to_vec();
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(error) => {
                seen.insert(key, format!("stat: {error}"));
                continue;
            }
        };
        if !meta.is_dir() && meta.nlink() > 1 {
            groups.entry((meta.dev(), meta.ino())).or_default().push(key.clone());
        }
        if meta.is_dir() {
            match fs::read_dir(&path) {
                Ok(entries) => {
                    for entry in entries {
                        let entry = match entry {
                            Ok(entry) => entry,
                            Err(error) => {
                                seen.insert([&key[..], b"/?"].concat(), format!("readdir: {error}"));
                                break;
                            }
                        };
                        let child = relative.join(entry.file_name());
                        // What readdir says must be what stat says.
                        let told = entry.file_type().map(kind_letter);
                        let is = fs::symlink_metadata(root.join(&child)).map(|m| (kind_letter(m.file_type()), m.ino()));
                        if let (Ok(told), Ok((is, ino))) = (told, is) {
                            let same_ino = entry_ino(&entry) == ino;
                            if told != is || !same_ino {
                                let note = format!("readdir says {told}, stat {is}; same inode: {same_ino}");
                                seen.insert([child.as_os_str().as_bytes(), b"/?"].concat(), note);
                            }
                        }
                        stack.push(child);
                    }
                }
                Err(error) => {
                    seen.insert([&key[..], b"/?"].concat(), format!("readdir: {error}"));
                }
            }
        }
        seen.insert(key, describe(&path, &meta));
    }
    for mut members in groups.into_values() {
        members.sort();
        let first = members[0].escape_ascii().to_string();
        for member in &members {
            if let Some(line) = seen.get_mut(member) {
                _ = write!(line, " same-as={first}");
            }
        }
    }
    seen
}

fn entry_ino(entry: &fs::DirEntry) -> u64 {
    use std::os::unix::fs::DirEntryExt as _;
    entry.ino()
}

fn kind_letter(kind: fs::FileType) -> char {
    if kind.is_dir() {
        'd'
    } else if kind.is_file() {
        'f'
    } else if kind.is_symlink() {
        'l'
    } else if kind.is_fifo() {
        'p'
    } else if kind.is_socket() {
        's'
    } else if kind.is_char_device() {
        'c'
    } else if kind.is_block_device() {
        'b'
    } else {
        '?'
    }
}

fn describe(path: &Path, meta: &fs::Metadata) -> String {
    let kind = kind_letter(meta.file_type());
    let (mode, uid, gid) = (meta.mode() & 0o7777, meta.uid(), meta.gid());
    let mut line = format!("{kind} {mode:04o} {uid}:{gid} mtime={}.{:09}", meta.mtime(), meta.mtime_nsec());
    match kind {
        // A directory's size and link count are the file system's own business.
        'd' => {}
        'f' => _ = write!(line, " size={} nlink={} {}", meta.len(), meta.nlink(), content(path)),
        'l' => {
            let target = fs::read_link(path).map_or_else(|e| e.to_string(), |t| shown(t.as_os_str()));
            _ = write!(line, " -> {target}");
        }
        'c' | 'b' => _ = write!(line, " rdev={:#x} nlink={}", meta.rdev(), meta.nlink()),
        _ => _ = write!(line, " nlink={}", meta.nlink()),
    }
    line.push_str(&xattrs(path));
    line
}

fn content(path: &Path) -> String {
    let hash = || {
        let mut file = fs::File::open(path)?;
        let (mut hasher, mut buffer, mut total) = (Sha256::new(), vec![0; 1 << 16], 0_u64);
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                let digest = hasher.finalize();
                return std::io::Result::Ok(format!("read={total} {}", data_encoding::HEXLOWER.encode(&digest[..12])));
            }
            total += n as u64;
            hasher.update(&buffer[..n]);
        }
    };
    hash().unwrap_or_else(|e| format!("read: {e}"))
}

fn xattrs(path: &Path) -> String {
    let mut names = vec![0_u8; 65536];
    let names = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(n) => names[..n].to_vec(),
        // "Can have none" and "has none" look the same to every program that copies attributes.
        Err(rustix::io::Errno::OPNOTSUPP) => return String::new(),
        Err(error) => return format!(" listxattr: {error}"),
    };
    let mut found: Vec<String> = Vec::new();
    for name in names.split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0_u8; 65536];
        let value = match rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]) {
            Ok(n) => value[..n].escape_ascii().to_string(),
            Err(error) => error.to_string(),
        };
        found.push(format!(" {}={value}", name.escape_ascii()));
    }
    found.sort();
    found.concat()
}

fn shown(text: &OsStr) -> String {
    text.as_bytes().escape_ascii().to_string()
}

/// Most differences shown: the first few tell what is wrong.
const SHOWN: usize = 20;

/// Two pictures must be the same.
#[track_caller]
pub(crate) fn assert_same(want: &Picture, got: &Picture, what: &str) {
    let mut text = String::new();
    let mut count = 0;
    for path in want.keys().chain(got.keys().filter(|p| !want.contains_key(*p))) {
        let (a, b) = (want.get(path), got.get(path));
        if a != b {
            count += 1;
            if count <= SHOWN {
                let missing = "(is not there)".to_owned();
                let name = path.escape_ascii();
                _ = writeln!(text, "  /{name}\n    want {}\n    got  {}", a.unwrap_or(&missing), b.unwrap_or(&missing));
            }
        }
    }
    assert!(count == 0, "{what}: {count} of {} paths differ:\n{text}", want.len());
}

/// A picture as text, to be handed from one process to another.
pub(crate) fn to_lines(picture: &Picture) -> String {
    let line = |(path, what): (&Vec<u8>, &String)| format!("{} {what}\n", data_encoding::HEXLOWER.encode(path));
    picture.iter().map(line).collect()
}

pub(crate) fn from_lines(text: &str) -> Picture {
    let line = |line: &str| {
        let (path, what) = line.split_once(' ').expect("a path and what is seen of it");
        (data_encoding::HEXLOWER.decode(path.as_bytes()).expect("hex"), what.to_owned())
    };
    text.lines().map(line).collect()
}
