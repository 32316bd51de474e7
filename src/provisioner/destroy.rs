//! Taking a rootfs away, and those nested in it before it.

use super::{Now, Provisioner, Record, Selector, State, fill, lock, record};
use crate::backend::{self, Detach};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::id::ContainerId;
use crate::plan::BackendKind;

impl Provisioner {
    /// Take a rootfs away, and everything of ours with it: those nested in it (`ID.CHILD`) first. `false`: there is none. Never
    /// touches a volume's content. One that fails stays known, and may be tried again.
    pub fn destroy(&self, selector: &Selector, how: Detach) -> Result<bool> {
        match self.find_id(selector)? {
            Some(id) => self.destroy_id(&id, how),
            None => Ok(false),
        }
    }

    pub(super) fn destroy_id(&self, id: &ContainerId, how: Detach) -> Result<bool> {
        let container = self.paths.container(id);
        // Waits for a provision or destroy of the same rootfs in flight.
        let Some(_lock) = lock::directory(container.dir())? else { return Ok(false) };
        let record = Record::read(&container)?;
        if let Some(record) = &record {
            refuse_elsewhere(record, &Now::look()?)?;
        }
        // From here on no child can be made: it would find its parent locked.
        for child in record::ids(&self.paths)?.into_iter().filter(|other| other.parent().as_ref() == Some(id)) {
            self.destroy_id(&child, how)?;
        }
        match &record {
            Some(record) => {
                self.refuse_with_another_inside(record)?;
                self.clear(record, how)?;
                fault::point("destroy.unmounted")?;
                remove_made(record)?;
            }
            None => log::info!("{id}: no record: its provisioning ended before its first step"),
        }
        fault::point("destroy.forget")?;
        self.forget(id, record.as_ref().map(|r| r.plan.rootfs.as_path()))?;
        Ok(true)
    }

    /// A copy goes with all that lies in its directory, and its volumes go out of sight: not with another rootfs in it. (What
    /// is mounted in a rootfs that is a mount, its backend sees.)
    fn refuse_with_another_inside(&self, record: &Record) -> Result<()> {
        if record.backend != BackendKind::Copy {
            return Ok(());
        }
        let (outer, now) = (&record.plan, Now::look()?);
        for id in record::ids(&self.paths)?.into_iter().filter(|id| *id != outer.id) {
            let Some(other) = record::read_or_log(&self.paths.container(&id)) else { continue };
            if other.plan.rootfs.starts_with(&outer.rootfs) && now.elsewhere(&other)?.is_none() {
                let (inner, at) = (&other.plan.id, show(&other.plan.rootfs));
                return Err(Error::new(
                    Kind::Busy,
                    "unmount",
                    show(&outer.rootfs),
                    format!("rootfs {inner} lies in it: {at}"),
                )
                .hint(format!("`fsprov unmount {inner}` first")));
            }
        }
        Ok(())
    }

    /// Take away what a rootfs left in the system.
    pub(super) fn clear(&self, record: &Record, how: Detach) -> Result<()> {
        let traces = Now::look()?.traces(record);
        backend::of(record.backend).destroy(&self.host, &record.plan, &traces, how).map(|_| ())
    }
}

/// A rootfs in another mount namespace cannot be reached from here, as long as that namespace lives.
pub(super) fn refuse_elsewhere(record: &Record, now: &Now) -> Result<()> {
    let Some(pid) = now.elsewhere(record)? else { return Ok(()) };
    Err(Error::new(
        Kind::Busy,
        "unmount",
        show(&record.plan.rootfs),
        format!("it is mounted in another mount namespace, where process {pid} runs"),
    )
    .hint(format!("run it there: nsenter --preserve-credentials -U -m -t {pid} fsprov unmount {}", record.plan.id)))
}

/// Remove the directories that provisioning made for the mount point, innermost first, as long as they are empty; and what it
/// was copying for a volume when it was stopped.
pub(super) fn remove_made(record: &Record) -> Result<()> {
    if record.state == State::Pending {
        fill::remove_stages(&record.plan)?;
    }
    for dir in record.made.iter().rev() {
        match std::fs::remove_dir(dir) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
                log::info!("{} stays: somebody put something into it", show(dir));
                break;
            }
            Err(e) => return Err(Error::io("remove mount point", show(dir), e)),
        }
    }
    Ok(())
}
