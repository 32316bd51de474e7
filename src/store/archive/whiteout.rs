//! How the whiteouts of a layer lie on the disk.
//!
//! A layer's index has the whiteouts as its archive has them (`.wh.NAME`); they take effect when the index of an image is
//! made. On the disk they have the form that the kernel's overlayfs reads: a character device 0:0 of the name that is hidden,
//! and the attribute `overlay.opaque` = `y` on an opaque directory: `trusted.` where we may set it, else `user.` (mount with
//! `userxattr`). Anybody may make that device since Linux 5.8; before, as an ordinary user, the `.wh.` file stays.
//!
//! That form saves overlayfs work and promises nothing: who mounts may heed the other attribute than who imported could set, the
//! layer may be the lowest of one image and not of another, and what it hides is known of the image alone. So the backends
//! that show the disk compare it with the image's index, and [`LayerWhiteouts::None`] says when they need not.

use std::ffi::{CStr, OsStr};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::index::Builder;
use crate::sys::fs::open_beneath;

/// Has a layer whiteouts?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerWhiteouts {
    /// None.
    #[default]
    None,
    /// Some.
    Some,
}

/// What becomes of an opaque directory.
pub(super) enum Opaque<'a> {
    /// It gets the attribute that may be set.
    Set,
    /// Its path is written down, with a NUL after it, for [`set_trusted_opaque`].
    Listed(&'a mut dyn Write),
}

/// Put the whiteouts of a layer on the disk in overlayfs's form. `index` is the layer's, in the making.
pub(super) fn make_whiteouts(root: &OwnedFd, index: &mut Builder, mut opaque: Opaque<'_>) -> Result<LayerWhiteouts> {
    let mut found = LayerWhiteouts::None;
    index.each_whiteout(|path| {
        found = LayerWhiteouts::Some;
        make_whiteout(root, path, &mut opaque)
    })?;
    Ok(found)
}

fn make_whiteout(root: &OwnedFd, path: &[u8], opaque: &mut Opaque<'_>) -> Result<()> {
    let (parent, name) = match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&b"."[..], path),
    };
    crate::fault::point("store.whiteout")?;
    let fail = |e| Error::sys("make whiteout", format!("{:?}", String::from_utf8_lossy(path)), e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let dir = open_beneath(root, Path::new(OsStr::from_bytes(parent)), flags).map_err(fail)?;
    let stat = fs::fstat(&dir).map_err(fail)?;
    let file = OsStr::from_bytes(name);
    if name == b".wh..wh..opq" {
        if !make_opaque(&dir, parent, opaque).map_err(fail)? {
            return Ok(());
        }
    } else if !name.starts_with(b".wh..wh.") {
        let hidden = OsStr::from_bytes(&name[b".wh.".len()..]);
        let mode = Mode::from_raw_mode(0);
        match fs::mknodat(&dir, hidden, FileType::CharacterDevice, mode, fs::makedev(0, 0)) {
            Ok(()) => {}
            // The layer brings its own: that one is what shows, and of a directory nothing of the lower one in it.
            Err(Errno::EXIST) => match open_beneath(&dir, Path::new(hidden), flags | OFlags::NOFOLLOW) {
                Ok(own) => {
                    if !make_opaque(&own, &[parent, b"/", hidden.as_bytes()].concat(), opaque).map_err(fail)? {
                        return Ok(());
                    }
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {}
                Err(e) => return Err(fail(e)),
            },
            Err(Errno::PERM) => return Ok(()),
            Err(e) => return Err(fail(e)),
        }
    }
    fs::unlinkat(&dir, file, AtFlags::empty())
        .or_else(|e| if e == Errno::ISDIR { Ok(()) } else { Err(e) })
        .map_err(fail)?;
    let times = fs::Timestamps {
        last_access: fs::Timespec { tv_sec: 0, tv_nsec: fs::UTIME_OMIT },
        last_modification: fs::Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as i64 },
    };
    fs::futimens(&dir, &times).map_err(fail)
}

/// The attribute that root's overlayfs heeds. To set it takes CAP_SYS_ADMIN.
pub(super) const OPAQUE_TRUSTED: &CStr = c"trusted.overlay.opaque";
const OPAQUE_USER: &CStr = c"user.overlay.opaque";

/// False: neither attribute can be set here, and the `.wh.` file tells who looks.
fn make_opaque(dir: &OwnedFd, path: &[u8], opaque: &mut Opaque<'_>) -> rustix::io::Result<bool> {
    if let Opaque::Listed(list) = opaque {
        let written = list.write_all(path).and_then(|()| list.write_all(&[0]));
        return written.map(|()| true).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO));
    }
    for name in [OPAQUE_TRUSTED, OPAQUE_USER] {
        match fs::fsetxattr(dir, name, b"y", XattrFlags::empty()) {
            Ok(()) => return Ok(true),
            Err(Errno::PERM | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(false)
}

/// Make the directory at `path` below `root` opaque, for root's overlayfs.
pub(super) fn set_trusted_opaque(root: &OwnedFd, path: &[u8]) -> Result<()> {
    let dir = open_beneath(root, Path::new(OsStr::from_bytes(path)), OFlags::RDONLY | OFlags::DIRECTORY);
    dir.and_then(|dir| fs::fsetxattr(dir, OPAQUE_TRUSTED, b"y", XattrFlags::empty()))
        .map_err(|e| Error::sys("make opaque", format!("{:?}", String::from_utf8_lossy(path)), e))
}
