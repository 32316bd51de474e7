//! Owners and modes that this process may not set are noted beside the file, in the attribute that podman and fuse-overlayfs share.
//!
//! A process that may give files away (root, or root of a user namespace) does so, and nothing is noted. An ordinary user's files stay the
//! user's, readable and writable by the user whatever mode is shown, and without setuid: what is shown stands in the attribute, if it is
//! anything else.

use std::time::Duration;

use super::{DIRECTORY, REGULAR, TYPE_BITS, UpperTree, marks};
use crate::plan::Ownership;
use crate::tree::dir::{ActAs, SET_ID, unmap};
use crate::tree::{Attr, Caller, Change, Errno, Handle, Node, Result, Tree as _};

/// Permission bits, setuid, setgid and sticky among them.
pub(crate) const PERMISSION_BITS: u32 = 0o7777;
/// What a file's maker keeps of it, whatever mode is shown.
const OWN_FILE: u32 = 0o600;
/// And of a directory.
const OWN_DIRECTORY: u32 = 0o700;
/// Most files of which it is known that they lose nothing.
const MOST_KNOWN: usize = 1 << 16;

/// What becomes of owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owners {
    /// They are set.
    Set,
    /// They are noted.
    Noted,
}

/// Owner and mode of a file as they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Permission bits.
    pub(crate) mode: u32,
}

impl Owners {
    pub(super) fn of(act_as: ActAs) -> Self {
        match act_as {
            ActAs::Caller => Owners::Set,
            ActAs::Server if rustix::process::geteuid().is_root() => Owners::Set,
            ActAs::Server => Owners::Noted,
        }
    }
}

impl Owner {
    pub(super) fn of(attr: &Attr) -> Self {
        Owner { uid: attr.uid, gid: attr.gid, mode: attr.mode & PERMISSION_BITS }
    }

    /// Setuid goes, and setgid where the group may execute: when a file is given away (chown(2)) or an ordinary writer changes it (write(2)).
    fn without_set_id(self) -> Self {
        Owner { mode: self.mode & if self.mode & 0o010 != 0 { !SET_ID } else { !0o4000 }, ..self }
    }

    /// As the attribute has it.
    pub(super) fn text(self) -> String {
        format!("{}:{}:0{:o}", self.uid, self.gid, self.mode)
    }

    /// Fields after the third tell types, which the file itself does.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let mut fields = std::str::from_utf8(text).ok()?.trim_end_matches('\0').split(':');
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let mode = u32::from_str_radix(fields.next()?, 8).ok()? & PERMISSION_BITS;
        Some(Owner { uid, gid, mode })
    }
}

/// The mode on the disk of a file that is shown with `mode`.
pub(super) fn mode_on_disk(mode: u32) -> u32 {
    match mode & TYPE_BITS {
        DIRECTORY => mode & 0o1777 | OWN_DIRECTORY,
        _ => mode & 0o777 | OWN_FILE,
    }
}

impl UpperTree {
    /// Show what is noted of an upper file in place of what is on the disk.
    pub(super) fn dress(&self, upper: Node, attr: &mut Attr, noted: Option<Owner>) {
        let Some(owner) = noted else { return };
        (attr.uid, attr.gid) = (owner.uid, owner.gid);
        attr.mode = attr.mode & TYPE_BITS | owner.mode;
        if owner.mode & SET_ID != 0 {
            self.no_set_id.remove(&upper);
        }
    }

    /// What is noted of the file at `path`, as it is shown. Noted are the image's ids, which other programs know too.
    pub(super) fn noted(&self, path: &[u8], mode: u32) -> Option<Owner> {
        let owner = marks::noted(path, mode).and_then(|text| Owner::parse(&text))?;
        let ownership = self.lower.ownership();
        let mapped = || (Ownership::map(&ownership.uids, owner.uid), Ownership::map(&ownership.gids, owner.gid));
        let (uid, gid) = ownership.squash.unwrap_or_else(mapped);
        Some(Owner { uid, gid, ..owner })
    }

    /// The same the other way. EINVAL: no id of the image is shown so (chown(2)).
    fn in_image(&self, owner: Owner) -> Result<Owner> {
        let ownership = self.lower.ownership();
        if ownership.squash.is_some() {
            return Ok(owner);
        }
        let uid = unmap(&ownership.uids, owner.uid).ok_or(Errno::INVAL)?;
        let gid = unmap(&ownership.gids, owner.gid).ok_or(Errno::INVAL)?;
        Ok(Owner { uid, gid, ..owner })
    }

    /// Have an upper file shown with this owner and mode. What can have no attribute (links, FIFOs, sockets) keeps its owner on the disk, and has
    /// its mode there.
    pub(super) fn note(&self, upper: Node, owner: Owner) -> Result<()> {
        let (real, _) = self.upper.getattr(upper, None)?;
        let can_have_note = matches!(real.mode & TYPE_BITS, DIRECTORY | REGULAR);
        let on_disk = if can_have_note { mode_on_disk(real.mode & TYPE_BITS | owner.mode) } else { owner.mode };
        let differs = owner != Owner { uid: real.uid, gid: real.gid, mode: on_disk & PERMISSION_BITS };
        let text = if differs { Some(self.in_image(owner)?.text()) } else { None };
        let set_mode = || {
            if real.mode & PERMISSION_BITS == on_disk & PERMISSION_BITS {
                return Ok(());
            }
            let change = Change { mode: Some(on_disk & PERMISSION_BITS), ..Change::default() };
            self.upper.setattr(&super::SERVER, upper, None, &change).map(drop)
        };
        match real.mode & TYPE_BITS {
            libc::S_IFLNK => return Ok(()),
            _ if !can_have_note => return set_mode(),
            _ => {}
        }
        let note = || self.upper.with_path(upper, |path| marks::note(path.as_bytes(), text.as_deref()));
        // One that was made a moment ago may be closed to its maker, and so to the note (xattr(7)).
        if real.mode & 0o200 == 0 { set_mode().and_then(|()| note()) } else { note().and_then(|()| set_mode()) }?;
        self.know_set_id(upper, owner.mode & SET_ID != 0);
        Ok(())
    }

    fn know_set_id(&self, upper: Node, has: bool) {
        if has {
            self.no_set_id.remove(&upper);
            return;
        }
        if self.no_set_id.len() >= MOST_KNOWN {
            self.no_set_id.clear();
        }
        self.no_set_id.insert(upper);
    }

    /// An ordinary writer changed this file. Was it shown with setuid or setgid, and lost it by that?
    pub(super) fn lose_noted_set_id(&self, upper: Node) -> bool {
        if self.no_set_id.contains(&upper) {
            return false;
        }
        let lost = self.upper.getattr(upper, None).and_then(|(real, _)| {
            let was = Owner::of(&self.attr_above(upper, upper, real)?);
            let lost = was.without_set_id() != was;
            if lost {
                self.note(upper, was.without_set_id())?;
            }
            self.know_set_id(upper, false);
            Ok(lost)
        });
        lost.unwrap_or_else(|e| {
            log::warn!(target: super::TARGET, "take setuid away from {upper:x}: {e}");
            true
        })
    }

    /// A new file belongs to who made it; in a directory with set-group-id, to the directory's group.
    pub(super) fn note_maker(&self, caller: &Caller, dir: Node, upper: Node, mode: u32) -> Result<()> {
        const SET_GID: u32 = 0o2000;
        let (real, _) = self.upper.getattr(dir, None)?;
        let parent = self.attr_above(dir, dir, real)?;
        let mut owner = Owner { uid: caller.uid, gid: caller.gid, mode: mode & PERMISSION_BITS };
        if parent.mode & SET_GID != 0 {
            owner.gid = parent.gid;
            if mode & TYPE_BITS == DIRECTORY {
                owner.mode |= SET_GID;
            }
        }
        self.note(upper, owner)
    }

    /// Change attributes, owner and mode by noting them.
    pub(super) fn change_noted(
        &self,
        caller: &Caller,
        upper: Node,
        handle: Option<Handle>,
        change: &Change,
    ) -> Result<(Attr, Duration)> {
        if change.mode.is_some() || change.uid.is_some() || change.gid.is_some() {
            let (real, _) = self.upper.getattr(upper, handle)?;
            let was = Owner::of(&self.attr_above(upper, upper, real)?);
            let mut owner = Owner { uid: change.uid.unwrap_or(was.uid), gid: change.gid.unwrap_or(was.gid), ..was };
            let is_given = change.uid.is_some() || change.gid.is_some();
            if is_given && real.mode & TYPE_BITS == REGULAR {
                owner = owner.without_set_id();
            }
            owner.mode = change.mode.map_or(owner.mode, |mode| mode & PERMISSION_BITS);
            self.note(upper, owner)?;
        }
        let rest = Change { mode: None, uid: None, gid: None, ..*change };
        if rest == Change::default() {
            self.upper.getattr(upper, handle)
        } else {
            let changed = self.upper.setattr(caller, upper, handle, &rest)?;
            if change.size.is_some() && caller.uid != 0 {
                self.lose_noted_set_id(upper);
            }
            Ok(changed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_back() {
        let owner = Owner { uid: 33, gid: 0, mode: 0o4755 };
        assert_eq!(owner.text(), "33:0:04755");
        for text in ["33:0:04755", "33:0:4755", "33:0:0104755", "33:0:4755:file", "33:0:4755\0"] {
            assert_eq!(Owner::parse(text.as_bytes()), Some(owner), "{text}");
        }
        for bad in ["", "33", "33:0", "a:0:755", "33:0:9", "-1:0:755"] {
            assert_eq!(Owner::parse(bad.as_bytes()), None, "{bad}");
        }
        for (mode, want) in [(0o100_000, 0o600), (0o104_755, 0o755), (0o040_555, 0o755), (0o041_777, 0o1777)] {
            assert_eq!(mode_on_disk(mode), want, "{mode:o}");
        }
    }
}
