//! Veils ([`marks`]): `.wh.NAME` hides what the image has under NAME. The tree counts its veils and looks for one only if it has any. It usually
//! has none, and looking for a name that is missing means searching a whole directory.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};

use super::marks::{self, Above, Names, OPAQUE_FILE, VEIL};
use crate::tree::{Errno, Result};

/// Longest name of a file: NAME_MAX of Linux.
const MAX_NAME: usize = 255;

/// The veils of an upper directory, which nobody else changes meanwhile.
#[derive(Debug)]
pub(super) struct Veils {
    /// An upper bound: never too low.
    most: AtomicUsize,
}

/// The name of the veil over a name; `None`: it would be too long.
fn veil_of(name: &[u8]) -> Option<Vec<u8>> {
    (name.len() + VEIL.len() <= MAX_NAME).then(|| [VEIL, name].concat())
}

impl Veils {
    /// Of an upper directory that was just made.
    pub(super) fn none() -> Self {
        Veils { most: AtomicUsize::new(0) }
    }

    /// Of one that was there before.
    pub(super) fn unknown() -> Self {
        Veils { most: AtomicUsize::new(usize::MAX / 2) }
    }

    /// Is what the image has under this name hidden by a veil?
    pub(super) fn hides(&self, dir: impl AsFd, name: &[u8]) -> Result<bool> {
        if self.most.load(Ordering::SeqCst) == 0 {
            return Ok(false);
        }
        veil_of(name).map_or(Ok(false), |veil| Ok(marks::look(dir, &veil)? != Above::Nothing))
    }

    /// Hide what the image has under this name, whatever is there above. A name that is too long for it goes without.
    pub(super) fn veil(&self, dir: impl AsFd, name: &[u8]) -> Result<()> {
        let Some(veil) = veil_of(name) else { return Ok(()) };
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Before it is there.
        self.most.fetch_add(1, Ordering::SeqCst);
        match fs::openat(dir, veil, flags, Mode::RUSR | Mode::WUSR) {
            Err(Errno::EXIST) => {
                self.one_less();
                Ok(())
            }
            // After any other error it may be there.
            made => made.map(drop),
        }
    }

    fn one_less(&self) {
        let _ = self.most.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |most| most.checked_sub(1));
    }

    /// Take the veil away.
    pub(super) fn unveil(&self, dir: impl AsFd, name: &[u8]) -> Result<()> {
        match veil_of(name) {
            Some(veil) if self.most.load(Ordering::SeqCst) > 0 => self.remove(dir, &veil),
            _ => Ok(()),
        }
    }

    fn remove(&self, dir: impl AsFd, veil: &[u8]) -> Result<()> {
        let removed = fs::unlinkat(dir, veil, AtFlags::empty());
        if removed.is_ok() {
            self.one_less();
        }
        marks::gone(removed)
    }

    /// Put a whiteout in a name's place, which is free or has one. Where this file system or kernel refuses the device, a veil hides it.
    pub(super) fn whiten(&self, dir: impl AsFd, name: &[u8]) -> Result<()> {
        match fs::mknodat(&dir, name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => self.unveil(dir, name),
            Err(Errno::EXIST) if marks::look(&dir, name)? == Above::Whiteout => self.unveil(dir, name),
            // A name that is too long for a veil has none.
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL) if veil_of(name).is_some() => self.veil(dir, name),
            Err(e) => Err(e),
        }
    }

    /// Remove what hides names of the image from a directory that is to be removed itself.
    pub(super) fn clear(&self, dir: impl AsFd, names: &Names) -> Result<()> {
        names.marks.iter().try_for_each(|mark| {
            let is_veil = marks::is_reserved(mark) && mark != OPAQUE_FILE;
            if is_veil { self.remove(&dir, mark) } else { marks::take_whiteout(&dir, mark) }
        })
    }

    /// Hide the same names again in a directory whose marks were removed.
    pub(super) fn whiten_again(&self, dir: impl AsFd, names: &Names) -> Result<()> {
        if names.marks.iter().any(|mark| mark == OPAQUE_FILE) {
            marks::make_opaque_file(&dir)?;
        }
        names.hidden.iter().try_for_each(|name| self.whiten(&dir, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_there_is_none_nothing_is_looked_for() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let at = crate::sys::fs::open_path(dir.path()).unwrap();
        let veils = Veils::none();
        std::fs::write(dir.path().join(".wh.foreign"), "").unwrap();
        assert_eq!(veils.hides(&at, b"foreign"), Ok(false), "it was looked for");
        for _ in 0..2 {
            veils.veil(&at, b"one").unwrap();
        }
        veils.veil(&at, b"two").unwrap();
        assert_eq!((veils.hides(&at, b"one"), veils.hides(&at, b"two")), (Ok(true), Ok(true)));
        for _ in 0..2 {
            veils.unveil(&at, b"one").unwrap();
        }
        assert_eq!((veils.hides(&at, b"one"), veils.hides(&at, b"two")), (Ok(false), Ok(true)));
        veils.unveil(&at, b"two").unwrap();
        assert_eq!(veils.most.load(Ordering::SeqCst), 0);

        let veils = Veils::unknown();
        assert_eq!(veils.hides(&at, b"foreign"), Ok(true));
        veils.unveil(&at, b"foreign").unwrap();
        let long = [b'n'; MAX_NAME];
        assert_eq!(
            (veils.veil(&at, &long), veils.hides(&at, &long), veils.unveil(&at, &long)),
            (Ok(()), Ok(false), Ok(()))
        );
        let missing = crate::sys::fs::open_path(dir.path()).unwrap();
        std::fs::remove_dir_all(dir.path()).unwrap();
        let veils = Veils::none();
        assert_eq!(veils.veil(&missing, b"one"), Err(Errno::NOENT));
        assert_eq!(veils.most.load(Ordering::SeqCst), 1, "it may have been made");
    }

    #[test]
    fn every_form_of_a_mark_is_read() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let at = crate::sys::fs::open_path(dir.path()).unwrap();
        for name in ["file", ".wh.veiled", ".wh.both", "both", "sub"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::fs::remove_file(dir.path().join("sub")).unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let veils = Veils::unknown();
        for _ in 0..2 {
            veils.whiten(&at, b"white").unwrap();
        }
        assert_eq!(veils.whiten(&at, b"file"), Err(Errno::EXIST));
        let names = Names::of(&at).unwrap();
        let mut shown: Vec<_> = names.shown.keys().map(|n| String::from_utf8_lossy(n)).collect();
        shown.sort();
        assert_eq!(shown, ["both", "file", "sub"]);
        for (name, veiled, above) in [
            ("file", false, Above::File(0)),
            ("veiled", true, Above::Nothing),
            ("both", true, Above::File(0)),
            ("white", false, Above::Whiteout),
            ("none", false, Above::Nothing),
        ] {
            let found = match marks::look(&at, name.as_bytes()).unwrap() {
                Above::File(_) => Above::File(0),
                other => other,
            };
            assert_eq!((veils.hides(&at, name.as_bytes()).unwrap(), found), (veiled, above), "{name}");
            assert_eq!(names.hidden.contains(name.as_bytes()), veiled || above == Above::Whiteout, "{name}");
        }
        let sub = marks::path_of(&at, b"sub");
        assert_eq!(marks::is_opaque(&sub), Ok(false));
        std::fs::write(dir.path().join("sub/.wh..wh..opq"), "").unwrap();
        assert_eq!(marks::is_opaque(&sub), Ok(true));
        std::fs::remove_file(dir.path().join("sub/.wh..wh..opq")).unwrap();
        marks::set_opaque(&sub).unwrap();
        assert_eq!(marks::is_opaque(&sub), Ok(true));
        veils.clear(&at, &names).unwrap();
        assert_eq!((veils.hides(&at, b"veiled"), marks::look(&at, b"white")), (Ok(false), Ok(Above::Nothing)));
    }
}
