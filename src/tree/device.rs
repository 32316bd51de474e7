//! The five harmless devices as volumes: `-v /dev/null:/dev/null`.
//!
//! A mount of an ordinary user is `nodev`: the image's device nodes are there to be seen and cannot be opened (mount(8)), and
//! every `>/dev/null` fails. A volume whose source is one of these devices (mem(4), random(4)) is served as a regular file that
//! behaves like it. The host's device is never opened: the server opens nothing but regular files and directories.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::time::Duration;

use super::{
    Attr, Caching, Caller, Change, DirItem, Errno, FOREVER, Fit, Handle, ListMode, Lookup, Node, Opened, ROOT, Result,
    Statfs, Timespec, Tree, Writer,
};
use crate::volume::Access;

/// Most bytes given in one answer: the kernel asks for at most max_read, and a device may give short answers.
const MAX_ANSWER: u32 = 128 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Null,
    Zero,
    Full,
    Random,
}

impl Device {
    /// Documentation/admin-guide/devices.txt of Linux: major 1.
    fn of(rdev: u64) -> Option<Self> {
        match (rustix::fs::major(rdev), rustix::fs::minor(rdev)) {
            (1, 3) => Some(Device::Null),
            (1, 5) => Some(Device::Zero),
            (1, 7) => Some(Device::Full),
            // random and urandom are one since Linux 5.6.
            (1, 8 | 9) => Some(Device::Random),
            _ => None,
        }
    }
}

/// One device as a tree of one regular file.
#[derive(Debug)]
pub struct DeviceTree {
    device: Device,
    access: Access,
}

impl DeviceTree {
    /// The device that `source` (O_PATH) is a node of. None: not one of the five.
    pub fn of(source: impl AsFd, access: Access) -> Option<Self> {
        let stat = rustix::fs::fstat(source).ok()?;
        let is_node = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device();
        let device = Device::of(stat.st_rdev).filter(|_| is_node)?;
        Some(DeviceTree { device, access })
    }

    fn attr(&self) -> Attr {
        let mode = match self.access {
            Access::Rw => 0o666,
            Access::Ro => 0o444,
        };
        let zero = Timespec::default();
        Attr {
            node: ROOT,
            mode: libc::S_IFREG | mode,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 0,
            blocks: 0,
            blksize: 4096,
            atime: zero,
            mtime: zero,
            ctime: zero,
        }
    }

    fn writable(&self) -> Result<()> {
        match self.access {
            Access::Rw => Ok(()),
            Access::Ro => Err(Errno::ROFS),
        }
    }
}

impl Tree for DeviceTree {
    fn lookup(&self, _: &Caller, _: Node, _: &OsStr) -> Result<Lookup> {
        Err(Errno::NOTDIR)
    }
    fn getattr(&self, _: Node, _: Option<Handle>) -> Result<(Attr, Duration)> {
        Ok((self.attr(), FOREVER))
    }
    fn readlink(&self, _: Node, _: &mut dyn FnMut(&[u8])) -> Result<()> {
        Err(Errno::INVAL)
    }
    fn open(&self, _: &Caller, _: Node, flags: i32) -> Result<Opened> {
        if flags & libc::O_ACCMODE != libc::O_RDONLY {
            self.writable()?;
        }
        // Past the page cache: a device has no size.
        Ok(Opened { handle: 0, cache: Caching::Direct, closes_silently: true })
    }
    fn read(&self, _: Node, _: Handle, _: u64, size: u32, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        if self.device == Device::Null {
            out(&[]);
            return Ok(());
        }
        let mut bytes = vec![0_u8; size.min(MAX_ANSWER) as usize];
        if self.device == Device::Random {
            let mut done = 0;
            while done < bytes.len() {
                done += rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty())?;
            }
        }
        out(&bytes);
        Ok(())
    }
    fn write(&self, _: &Writer, _: Node, _: Handle, _: u64, data: &[u8], _: i32) -> Result<usize> {
        self.writable()?;
        if self.device == Device::Full && !data.is_empty() {
            return Err(Errno::NOSPC);
        }
        Ok(data.len())
    }
    fn setattr(&self, _: &Caller, _: Node, _: Option<Handle>, change: &Change) -> Result<(Attr, Duration)> {
        self.writable()?;
        // `>/dev/null` truncates; touch sets times. Neither changes a device.
        if change.mode.is_some() || change.uid.is_some() || change.gid.is_some() {
            return Err(Errno::PERM);
        }
        Ok((self.attr(), FOREVER))
    }
    fn readdir(
        &self,
        _: &Caller,
        _: Node,
        _: Handle,
        _: u64,
        _: ListMode,
        _: &mut dyn FnMut(&DirItem<'_>) -> Fit,
    ) -> Result<()> {
        Err(Errno::NOTDIR)
    }
    fn statfs(&self, _: Node) -> Result<Statfs> {
        Ok(Statfs { bsize: 4096, frsize: 4096, namelen: 255, ..Statfs::default() })
    }
    fn getxattr(&self, _: &Caller, _: Node, _: &OsStr, _: &mut dyn FnMut(&[u8])) -> Result<()> {
        Err(Errno::NODATA)
    }
    fn listxattr(&self, _: Node, out: &mut dyn FnMut(&[u8])) -> Result<()> {
        out(&[]);
        Ok(())
    }
    fn access(&self, _: Node, mask: i32) -> Result<()> {
        if mask & libc::W_OK != 0 {
            self.writable()?;
        }
        if mask & libc::X_OK != 0 { Err(Errno::ACCESS) } else { Ok(()) }
    }
    fn is_live(&self) -> bool {
        true
    }
    fn is_without_xattrs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn open(path: &str, access: Access) -> Option<DeviceTree> {
        DeviceTree::of(crate::sys::fs::open_path(Path::new(path)).unwrap(), access)
    }

    fn read(tree: &DeviceTree, size: u32) -> Vec<u8> {
        let mut got = Vec::new();
        tree.read(ROOT, 0, 7, size, &mut |bytes| got.extend_from_slice(bytes)).unwrap();
        got
    }

    #[test]
    fn each_behaves_like_its_device() {
        let tree = |path| open(path, Access::Rw).unwrap();
        assert!(read(&tree("/dev/null"), 10).is_empty());
        assert_eq!(read(&tree("/dev/zero"), 10), [0_u8; 10]);
        assert_ne!(read(&tree("/dev/urandom"), 32), read(&tree("/dev/random"), 32));
        assert_eq!(tree("/dev/null").write(&Writer::Trusted, ROOT, 0, 0, b"abc", 0), Ok(3));
        assert_eq!(tree("/dev/full").write(&Writer::Trusted, ROOT, 0, 0, b"abc", 0), Err(Errno::NOSPC));
        assert_eq!(
            open("/dev/null", Access::Ro).unwrap().write(&Writer::Trusted, ROOT, 0, 0, b"abc", 0),
            Err(Errno::ROFS)
        );
    }

    #[test]
    fn nothing_else_is_taken() {
        assert!(open("/dev/tty", Access::Rw).is_none());
        assert!(open("/dev", Access::Rw).is_none());
        assert!(open("/etc/passwd", Access::Rw).is_none());
    }
}
