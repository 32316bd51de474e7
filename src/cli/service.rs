//! `mount --foreground`: one rootfs for as long as this process is let live, and what a service manager is told of it (sd_notify(3)).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;

use crate::backend::Detach;
use crate::daemon::SHELVED_PREFIX as PREFIX;
use crate::daemon::control::{self, Question};
use crate::error::{Error, Kind, Result, show};
use crate::plan::{BackendKind, Plan};
use crate::provisioner::{Condition, Provisioner, Request, Selector, Whole};
use crate::sys::process::start_thread;
use crate::sys::raw;
use crate::sys::signals::{Termination, Woken};
use crate::traces::{Shelf, Shelved};

const TARGET: &str = "fsprov::cli";
/// A sign of life is sent this many times in an interval (sd_watchdog_enabled(3) advises two).
const WATCHDOG_SHARE: u32 = 2;

/// What systemd's descriptor store kept of an earlier start. To be called before anything is opened.
pub(super) fn shelved() -> Vec<Shelved> {
    let mut passed = raw::passed_fds().unwrap_or_else(|e| {
        log::warn!(target: TARGET, "take over descriptors of an earlier start: {e}");
        Vec::new()
    });
    passed.retain(|(name, _)| name.starts_with(PREFIX));
    passed
}

/// Go on with the rootfs or make it, `report`, and keep it until a signal or its server's end.
pub(super) fn run(
    provisioner: Provisioner,
    request: &Request,
    shelved: Vec<Shelved>,
    report: impl FnOnce(&Whole) -> Result<()>,
) -> Result<()> {
    // Caught before anything is made: a signal that comes meanwhile ends the wait at once.
    let signals = Termination::catch()?;
    let store = std::env::var_os("NOTIFY_SOCKET").map(|_| Arc::new(DescriptorStore) as Arc<dyn Shelf>);
    let is_kept = store.is_some();
    let provisioner = provisioner.on_shelf(store);
    let record = match provisioner.resume(request, shelved)? {
        Some(record) => record,
        None => provisioner.provision(request)?,
    };
    let whole = provisioner.whole_of(record)?;
    report(&whole)?;
    tell(&[NotifyState::Ready, NotifyState::Status(&format!("{} is mounted", show(&whole.top.record.plan.rootfs)))]);
    stay(&provisioner, &whole, &signals, is_kept)
}

/// systemd's store (FileDescriptorStoreMax= in systemd.service(5)). It takes what it is told without an answer.
#[derive(Debug)]
struct DescriptorStore;

impl Shelf for DescriptorStore {
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        // Not polled: systemd would wake up with every request on the connection, and an O_PATH descriptor cannot be.
        let state = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
        sd_notify::notify_with_fds(&state, &[fd]).map_err(|e| Error::io("give systemd", name, e))
    }

    fn remove(&self, name: &str) -> Result<()> {
        sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
            .map_err(|e| Error::io("have systemd forget", name, e))
    }
}

/// Tell systemd; nothing where it did not start us (no NOTIFY_SOCKET).
fn tell(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        log::warn!(target: TARGET, "tell systemd: {e}");
    }
}

/// Signs of life for as long as the rootfs's server answers, or it has none.
fn watch(plan: &Plan, pause: Duration) {
    loop {
        match control::ask(plan, &Question::Stats) {
            Err(e) if e.kind() != Kind::NotFound => log::error!(target: TARGET, "{e}"),
            _ => tell(&[NotifyState::Watchdog]),
        }
        std::thread::sleep(pause);
    }
}

/// Wait for a signal, or for the server's end; then take the rootfs away.
fn stay(provisioner: &Provisioner, whole: &Whole, signals: &Termination, is_kept: bool) -> Result<()> {
    let record = &whole.base().record;
    if let Some(interval) = sd_notify::watchdog_enabled() {
        let plan = record.plan.clone();
        start_thread("that watches the server", move || watch(&plan, interval / WATCHDOG_SHARE))?;
    }
    let selector = Selector::Id(record.plan.id.clone());
    let woken = signals.wait(record.traces.supervisor.or(record.traces.worker))?;
    if is_kept && woken == Woken::ByProcess && record.backend == BackendKind::Fuse {
        let status = provisioner.inspect(&selector);
        if status.is_ok_and(|s| matches!(s.health, Condition::Ready | Condition::Stopped | Condition::Dead)) {
            return Err(Error::new(Kind::Helper, "serve", show(&record.plan.rootfs), "its supervisor died")
                .hint("the next start of this service goes on with it (Restart=on-failure)"));
        }
    }
    tell(&[NotifyState::Stopping]);
    provisioner.unshelve_all(record);
    provisioner.destroy(&selector, Detach::Lazy).map(|_| ())
}
