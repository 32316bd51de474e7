//! The mount table of a mount namespace, as /proc/PID/mountinfo gives it (proc_pid_mountinfo(5)).
//!
//! Reading it touches no file system that is mounted: it answers for a dead FUSE server's mount too.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::raw;
use crate::error::{Error, Kind, Result, show};

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountInfo {
    /// The mount's id, unique in the system as long as the mount lives; may be used again afterwards.
    pub id: u64,
    /// Id of the mount it is attached to; itself for the top of the tree.
    pub parent: u64,
    /// Major and minor number of the file system's device (st_dev of its files, where it has one device).
    pub dev: (u32, u32),
    /// Which directory or file of that file system appears here.
    pub root: PathBuf,
    /// True where `root` has been removed since (`//deleted` in the table).
    pub root_deleted: bool,
    /// Where it appears, relative to the reader's root.
    pub point: PathBuf,
    /// Options of this mount: `ro,nosuid,relatime`.
    pub options: OsString,
    /// Peer group it sends mounts to and receives them from.
    pub shared: Option<u64>,
    /// Peer group it only receives mounts from.
    pub master: Option<u64>,
    /// File system type, `fuse.fsprov` with its subtype.
    pub fs_type: OsString,
    /// What the file system calls its source.
    pub source: OsString,
    /// Options of the file system, shared by all its mounts.
    pub super_options: OsString,
}

impl MountInfo {
    /// Does this mount have the option (`ro`, `nosuid`, ...)?
    pub fn has_option(&self, name: &str) -> bool {
        self.options.as_bytes().split(|&b| b == b',').any(|o| o == name.as_bytes())
    }

    /// Is it a FUSE mount (`fuse`, `fuse.something`, `fuseblk`)?
    pub fn is_fuse(&self) -> bool {
        let kind = self.fs_type.as_bytes();
        kind == b"fuse" || kind == b"fuseblk" || kind.starts_with(b"fuse.")
    }
}

/// Undo the escapes of the kernel's `mangle()`: backslash and three octal digits stand for one byte. Anything else stays.
pub fn unescape(field: &[u8]) -> Cow<'_, [u8]> {
    if !field.contains(&b'\\') {
        return Cow::Borrowed(field);
    }
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (first, tail) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    Cow::Owned(out)
}

/// What the kernel appends to a path whose file was removed; no real path holds two slashes.
const DELETED: &[u8] = b"//deleted";

fn path_field(field: &[u8]) -> (PathBuf, bool) {
    let whole = unescape(field);
    let (path, deleted) = whole.strip_suffix(DELETED).map_or((&*whole, false), |path| (path, true));
    (PathBuf::from(OsString::from_vec(path.to_vec())), deleted)
}

fn text_field(field: &[u8]) -> OsString {
    OsString::from_vec(unescape(field).into_owned())
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|&b| b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let mut dev = fields.next()?.split(|&b| b == b':');
    let dev = (u32::try_from(number(dev.next()?)?).ok()?, u32::try_from(number(dev.next()?)?).ok()?);
    let (root, root_deleted) = path_field(fields.next()?);
    let (point, _) = path_field(fields.next()?);
    let options = text_field(fields.next()?);
    let mut mount = MountInfo { id, parent, dev, root, root_deleted, point, options, ..MountInfo::default() };
    for tag in fields.by_ref() {
        if tag == b"-" {
            break;
        }
        if let Some(group) = tag.strip_prefix(b"shared:") {
            mount.shared = number(group);
        } else if let Some(group) = tag.strip_prefix(b"master:") {
            mount.master = number(group);
        }
    }
    mount.fs_type = text_field(fields.next()?);
    // An empty source leaves an empty field; the super options are the last one in any case.
    mount.source = text_field(fields.next()?);
    mount.super_options = text_field(fields.next().unwrap_or_default());
    Some(mount)
}

/// Read the lines of a mountinfo file. Fails on a line that is not one, naming it.
pub fn parse(text: &[u8]) -> Result<Vec<MountInfo>> {
    text.split(|&b| b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_line(line).ok_or_else(|| {
                Error::new(
                    Kind::Invalid,
                    "read mount table line",
                    show(OsStr::from_bytes(line)),
                    "it lacks fields of proc_pid_mountinfo(5)",
                )
            })
        })
        .collect()
}

fn read_file(path: &str) -> Result<Vec<MountInfo>> {
    let text = std::fs::read(path).map_err(|e| Error::io("read", path, e).hint("mount /proc"))?;
    parse(&text)
}

/// The mounts that this process sees.
pub fn read() -> Result<Vec<MountInfo>> {
    // The calling thread's: another thread may have unshared its namespace.
    match read_file("/proc/thread-self/mountinfo") {
        Err(e) if e.kind() == Kind::NotFound => read_file("/proc/self/mountinfo"),
        other => other,
    }
}

/// The mounts that another process sees; paths are relative to its root.
pub fn read_of(pid: i32) -> Result<Vec<MountInfo>> {
    read_file(&format!("/proc/{pid}/mountinfo"))
}

/// The mounts exactly at `point`, lowest first, topmost last. `point` is absolute, without symlinks.
pub fn mounts_at(point: &Path) -> Result<Vec<MountInfo>> {
    Ok(stack_at(read()?, point))
}

/// A mount as a record knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its id, which another mount may have by now.
    pub id: u64,
    /// Its id that is never used again, where the kernel told one (Linux 6.8).
    pub unique: Option<u64>,
}

impl Known {
    /// The id that this very mount has now, wherever it lies: `None` where it is gone, or not in this mount namespace.
    ///
    /// Where nothing but an id that may be another's is known, that is what comes back: the caller must compare more.
    pub fn current_id(self) -> Option<u64> {
        let Some(unique) = self.unique else { return Some(self.id) };
        match raw::statmount_id(unique) {
            Ok(id) => Some(id),
            // A seccomp filter that is older than the call.
            Err(Errno::NOSYS | Errno::PERM) => Some(self.id),
            Err(_) => None,
        }
    }

    /// Can the kernel tell this mount from every other?
    pub fn is_certain(self) -> bool {
        self.unique.is_some_and(|unique| !matches!(raw::statmount_id(unique), Err(Errno::NOSYS | Errno::PERM)))
    }
}

/// The mounts on the mount of this unique id, directly or not, as far as the kernel lists them (listmount(2), Linux 6.8).
pub fn unique_ids_below(unique: u64) -> Vec<Known> {
    let found = raw::listmount(unique).unwrap_or_default().into_iter();
    found.filter_map(|unique| Some(Known { id: raw::statmount_id(unique).ok()?, unique: Some(unique) })).collect()
}

/// The mount table of one moment, for many questions: reading and searching it again for each of a thousand rootfses would
/// take seconds.
#[derive(Clone, Debug, Default)]
pub struct Table {
    by_point: HashMap<PathBuf, Vec<MountInfo>>,
    points: HashMap<u64, PathBuf>,
}

impl Table {
    /// The mounts that this process sees.
    pub fn read() -> Result<Self> {
        Ok(Self::of(read()?))
    }

    fn of(mounts: Vec<MountInfo>) -> Self {
        let points = mounts.iter().map(|m| (m.id, m.point.clone())).collect();
        let mut by_point: HashMap<PathBuf, Vec<MountInfo>> = HashMap::with_capacity(mounts.len());
        for mount in mounts {
            by_point.entry(mount.point.clone()).or_default().push(mount);
        }
        for stack in by_point.values_mut().filter(|stack| stack.len() > 1) {
            *stack = parents_first(std::mem::take(stack));
        }
        Table { by_point, points }
    }

    /// The mount of this id.
    pub fn by_id(&self, id: u64) -> Option<&MountInfo> {
        self.at(self.points.get(&id)?).iter().find(|m| m.id == id)
    }

    /// The file that stands for the mount namespace of this inode number, if there is one: it keeps the namespace.
    pub fn file_of_namespace(&self, inode: u64) -> Option<&Path> {
        let root = PathBuf::from(format!("mnt:[{inode}]"));
        let found = self.by_point.values().flatten().find(|m| m.fs_type == "nsfs" && m.root == root);
        found.map(|m| m.point.as_path())
    }

    /// The mounts exactly at `point`, lowest first, topmost last. `point` is absolute, without symlinks.
    pub fn at(&self, point: &Path) -> &[MountInfo] {
        self.by_point.get(point).map_or(&[], Vec::as_slice)
    }
}

/// The mounts strictly below `point`, each after what it is mounted on: take them away from the end.
pub fn mounts_below(point: &Path) -> Result<Vec<MountInfo>> {
    Ok(subtree_below(read()?, point))
}

/// [`mounts_at`] for a table in hand.
pub fn stack_at(table: Vec<MountInfo>, point: &Path) -> Vec<MountInfo> {
    parents_first(table.into_iter().filter(|m| m.point == point).collect())
}

/// [`mounts_below`] for a table in hand.
pub fn subtree_below(table: Vec<MountInfo>, point: &Path) -> Vec<MountInfo> {
    parents_first(table.into_iter().filter(|m| m.point != point && m.point.starts_with(point)).collect())
}

/// The mount `id` and all that is mounted on it, directly or not, each after what it is mounted on.
pub fn tree_of(table: Vec<MountInfo>, id: u64) -> Vec<MountInfo> {
    let mut ids = HashSet::from([id]);
    let mut waiting = table;
    let mut tree = Vec::new();
    loop {
        let (found, rest): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|m| m.id == id || (m.parent != m.id && ids.contains(&m.parent)));
        if found.is_empty() {
            return tree;
        }
        ids.extend(found.iter().map(|m| m.id));
        tree.extend(parents_first(found));
        waiting = rest;
    }
}

/// Each mount after what it is mounted on. The order of the table is the kernel's business (a list up to 6.7, a tree by id since); what counts is who is
/// mounted on whom.
pub fn parents_first(mut waiting: Vec<MountInfo>) -> Vec<MountInfo> {
    let mut ordered = Vec::with_capacity(waiting.len());
    let mut open: HashSet<u64> = waiting.iter().map(|m| m.id).collect();
    while !waiting.is_empty() {
        let before = waiting.len();
        let (ready, rest): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|m| m.parent == m.id || !open.contains(&m.parent));
        for mount in &ready {
            open.remove(&mount.id);
        }
        ordered.extend(ready);
        waiting = rest;
        if waiting.len() == before {
            // A cycle cannot be; a table read while it changed may look like one.
            ordered.append(&mut waiting);
        }
    }
    ordered
}

/// The mount with this id, if this process sees it.
pub fn by_id(id: u64) -> Result<Option<MountInfo>> {
    Ok(read()?.into_iter().find(|m| m.id == id))
}

/// Tells mounts, of any mount namespace, that show a directory of ours or something in it.
pub fn shows(dir: &Path) -> Result<impl Fn(&MountInfo) -> bool> {
    let mount = holding(dir)?;
    let inside = dir.strip_prefix(&mount.point).map_or_else(|_| mount.root.clone(), |rest| mount.root.join(rest));
    Ok(move |m: &MountInfo| m.dev == mount.dev && m.root.starts_with(&inside))
}

/// The mount that holds `path` (absolute, without symlinks): the topmost at its longest mounted prefix.
pub fn holding(path: &Path) -> Result<MountInfo> {
    let table = read()?;
    for prefix in path.ancestors() {
        if table.iter().any(|m| m.point == prefix) {
            if let Some(top) = stack_at(table, prefix).pop() {
                return Ok(top);
            }
            break;
        }
    }
    Err(Error::new(Kind::NotFound, "find the mount of", show(path), "no mount of the table holds it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kernel's escaping, written from proc(5) by itself: blank, tab, newline, backslash; `#` since 6.2 too.
    fn escape(path: &[u8]) -> Vec<u8> {
        path.iter()
            .flat_map(|&b| match b {
                b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{b:03o}").into_bytes(),
                b => vec![b],
            })
            .collect()
    }

    proptest! {
        #[test]
        fn unescape_undoes_escape(bytes in proptest::collection::vec(1_u8..=255, 0..64)) {
            let escaped = escape(&bytes);
            prop_assert_eq!(&*unescape(&escaped), &bytes[..]);
        }

        #[test]
        fn a_line_survives(point in proptest::collection::vec(1_u8..=255, 1..40), root in "[a-z \\\\\n/]{1,20}") {
            let mut line = b"36 35 98:4294967295 ".to_vec();
            line.extend(escape(root.as_bytes()));
            line.push(b' ');
            line.extend(escape(&point));
            line.extend(b" rw,noatime master:1 propagate_from:3 - fuse.x\\040y /dev/\\134 rw,a=b\n");
            let mounts = parse(&line).unwrap();
            prop_assert_eq!(mounts.len(), 1);
            prop_assert_eq!(mounts[0].point.as_os_str().as_bytes(), &point[..]);
            prop_assert_eq!(mounts[0].root.as_os_str().as_bytes(), root.as_bytes());
            prop_assert_eq!(mounts[0].dev, (98, u32::MAX));
        }
    }

    #[test]
    fn fields() {
        let text = b"36 35 0:51 /mnt1//deleted /mnt\\0402 ro,nosuid shared:7 master:1 - fuse.fsprov /dev/root\\011x rw,errors=x\n\
                     1 1 0:2 / / rw - rootfs  rw\n";
        let mounts = parse(text).unwrap();
        let first = &mounts[0];
        assert_eq!((first.id, first.parent, first.dev), (36, 35, (0, 51)));
        assert_eq!((first.root.as_path(), first.root_deleted), (Path::new("/mnt1"), true));
        assert_eq!(first.point, Path::new("/mnt 2"));
        assert_eq!((first.shared, first.master), (Some(7), Some(1)));
        assert_eq!(first.fs_type, "fuse.fsprov");
        assert_eq!(first.source, "/dev/root\tx");
        assert_eq!(first.super_options, "rw,errors=x");
        assert!(first.is_fuse() && first.has_option("ro") && first.has_option("nosuid") && !first.has_option("suid"));
        assert_eq!((mounts[1].source.to_str(), mounts[1].super_options.to_str()), (Some(""), Some("rw")));
    }

    #[test]
    fn lines_that_are_none() {
        for bad in ["x", "1 2 3 / / rw - a b", "1 2 3:4 / / rw shared:1", "1 2 3:4 / / rw -"] {
            assert_eq!(parse(bad.as_bytes()).map_err(|e| e.kind()), Err(Kind::Invalid), "{bad}");
        }
        assert_eq!(parse(b"").unwrap(), []);
    }

    #[test]
    fn stacks_are_ordered_by_parent_whatever_the_order_of_the_table() {
        let mount = |id, parent, point: &str| MountInfo { id, parent, point: point.into(), ..MountInfo::default() };
        let table = vec![
            mount(50, 70, "/r"),
            mount(70, 20, "/r"),
            mount(60, 50, "/r"),
            mount(10, 61, "/r/v/w"),
            mount(61, 60, "/r/v"),
            mount(62, 20, "/r2"),
            mount(20, 20, "/"),
        ];
        let ids = |mounts: Vec<MountInfo>| mounts.iter().map(|m| m.id).collect::<Vec<_>>();
        assert_eq!(ids(stack_at(table.clone(), Path::new("/r"))), [70, 50, 60]);
        assert_eq!(ids(subtree_below(table.clone(), Path::new("/r"))), [61, 10]);
        assert_eq!(ids(stack_at(table.clone(), Path::new("/r2"))), [62]);
        assert_eq!(ids(tree_of(table.clone(), 50)), [50, 60, 61, 10]);
        assert!(tree_of(table.clone(), 99).is_empty());
        assert_eq!(ids(stack_at(table, Path::new("/"))), [20]);
    }

    #[test]
    fn this_process_has_a_root_mount() {
        assert_eq!(holding(Path::new("/")).unwrap().point, Path::new("/"));
        let proc = holding(Path::new("/proc/self/status")).unwrap();
        assert_eq!(by_id(proc.id).unwrap().unwrap(), proc);
    }
}
