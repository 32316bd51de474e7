//! What a copy makes of an image's files.

use rustix::fs::{FileType, Stat};

use crate::plan::{Ownership, Plan};
use crate::sys::attrs::SetId;

/// Deepest tree copied: two descriptors are held a level, and the usual limit on open files is 1024.
pub(super) const MAX_DEPTH: usize = 400;

/// What is made of an image's files.
#[derive(Clone)]
pub(super) struct Rules {
    ownership: Ownership,
    pub(super) set_id: SetId,
    /// Are device nodes made?
    pub(super) devices: bool,
}

impl Rules {
    /// A copy lies on the host like any other files: where no mount can hold back setuid programs and devices, they are left out.
    pub(super) fn of(plan: &Plan) -> Self {
        Rules {
            ownership: plan.ownership.clone(),
            set_id: if plan.restraint.nosuid() { SetId::Dropped } else { SetId::Kept },
            devices: !plan.restraint.nodev() && !plan.restraint.no_devices,
        }
    }

    /// Is a file of this kind left out?
    pub(super) fn leaves_out(&self, kind: FileType) -> bool {
        !self.devices && (kind.is_char_device() || kind.is_block_device())
    }

    pub(super) fn presented(&self, mut stat: Stat) -> Stat {
        let ownership = &self.ownership;
        if let Some((uid, gid)) = ownership.squash {
            (stat.st_uid, stat.st_gid) = (uid, gid);
        } else {
            stat.st_uid = Ownership::map(&ownership.uids, stat.st_uid);
            stat.st_gid = Ownership::map(&ownership.gids, stat.st_gid);
        }
        stat
    }
}
