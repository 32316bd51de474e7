//! The mount that a supervisor answers for, with what the kernel and the first worker agreed on at INIT.

use std::time::Duration;

use super::super::protocol::{Begin, Job};
use super::super::sources::HandoverFiles;
use super::super::{TARGET, has_mounts_for_volumes, hex};
use super::worker::Worker;
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::fuse::mount::{self, Detached, Method, MountOptions, Mounted};
use crate::fuse::session::{self, InFlight};
use crate::place::Point;
use crate::sys::mount::Unmount;
use crate::sys::mountinfo::MountInfo;
use crate::sys::process::start_thread;

/// How long an unmount may take: dirty pages are written back through the worker.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(10);

/// A mount with its agreed INIT.
pub(super) struct LiveMount {
    pub(super) mounted: Mounted,
    pub(super) init: Vec<u8>,
    pub(super) reply: Vec<u8>,
}

/// A mount that nobody sees yet. `None`: it can only be made at once.
pub(super) struct Prepared(Option<(Detached, Vec<u8>)>);

impl Prepared {
    /// On an error nothing is left.
    pub(super) fn new(job: &Job, point: &Point) -> Result<Self> {
        let made = mount::prepare(&job.method, &options(job, &job.source(), point))?;
        let begun = made.map(|detached| session::read_init(&detached.connection).map(|init| (detached, init)));
        begun.transpose().map(Prepared)
    }

    /// The worker may begin: nobody can ask anything until it is mounted.
    pub(super) fn begin(&self, worker: &Worker) -> Result<()> {
        let Some((Detached { connection, minor, .. }, init)) = &self.0 else { return Ok(()) };
        worker.begin(connection, *minor, init, Begin::First)
    }
}

fn options<'a>(job: &Job, source: &'a str, point: &'a Point) -> MountOptions<'a> {
    let held_back = has_mounts_for_volumes(&job.plan, &job.method);
    MountOptions {
        point,
        source,
        read_only: job.is_read_only(),
        others: job.others,
        nosuid: held_back || job.plan.restraint.nosuid(),
        nodev: held_back || job.plan.restraint.nodev(),
    }
}

impl LiveMount {
    /// Mount, and see the worker serve. On an error nothing is mounted.
    pub(super) fn mount(
        job: &Job,
        worker: &mut Worker,
        point: &Point,
        Prepared(prepared): Prepared,
        handover: &mut HandoverFiles,
    ) -> Result<Self> {
        fault::point("server.mount")?;
        let (detached, init) = prepared.unzip();
        let mounted = mount::mount(&job.method, &options(job, &job.source(), point), detached)?;
        let begun = fault::point("server.mounted").and_then(|()| {
            let Some(init) = init else {
                let init = session::read_init(&mounted.connection)?;
                worker.begin(&mounted.connection, mounted.info.dev.1, &init, Begin::First)?;
                return Ok(init);
            };
            Ok(init)
        });
        match begun.and_then(|init| Ok((init, worker.serving(handover)?.0))) {
            Ok((init, reply)) => Ok(LiveMount { mounted, init, reply }),
            Err(error) => {
                Err(error.with_undo(mount::unmount(&mounted.info, Unmount::Lazy, Some(&job.method)).map(drop)))
            }
        }
    }

    /// Let the worker begin on a connection that a dead supervisor held. On an error it is as before.
    pub(super) fn adopt(self, job: &Job, worker: &mut Worker, handover: &mut HandoverFiles) -> Result<Self> {
        let start = Begin::Again { reply: hex(&self.reply), resend: job.resend, with_care: false };
        let (_, in_flight) = self.resume(worker, start, handover)?;
        log::info!(target: TARGET, "{}: adopted, requests in flight: {in_flight:?}", show(&job.plan.rootfs));
        Ok(self)
    }

    /// Let a worker go on with it.
    pub(super) fn resume(
        &self,
        worker: &mut Worker,
        start: Begin,
        handover: &mut HandoverFiles,
    ) -> Result<(Vec<u8>, InFlight)> {
        worker.begin(&self.mounted.connection, self.info().dev.1, &self.init, start)?;
        worker.serving(handover)
    }

    pub(super) fn info(&self) -> &MountInfo {
        &self.mounted.info
    }

    /// Unmount in a thread of its own: writing back dirty pages needs a worker, and there may be none.
    pub(super) fn unmount(&self, how: Unmount, method: &Method) -> Result<()> {
        let (send, done) = std::sync::mpsc::channel();
        let (mount, method) = (self.info().clone(), method.clone());
        start_thread("that unmounts", move || {
            let result = mount::unmount(&mount, how, Some(&method)).or_else(|e| match (e.kind(), how) {
                (Kind::Busy, Unmount::IfIdle) => {
                    log::warn!(target: TARGET, "{e}: unmounting lazily");
                    mount::unmount(&mount, Unmount::Lazy, Some(&method))
                }
                _ => Err(e),
            });
            // The receiver is gone only if it gave up.
            let _ = send.send(result);
        })?;
        match done.recv_timeout(UNMOUNT_PATIENCE) {
            Ok(result) => result.map(drop),
            Err(_) => mount::abort(self.info().dev.1).and_then(|()| {
                done.recv_timeout(UNMOUNT_PATIENCE)
                    .map_err(|e| Error::new(Kind::Io, "unmount", show(&self.info().point), e))?
                    .map(drop)
            }),
        }
    }
}
