//! The server of a FUSE rootfs, as processes: a supervisor that mounts and holds the connection, and a worker that answers.
//!
//! * `spawn`: the caller's side; starts the supervisor and waits until the rootfs answers
//! * `supervise`: the supervisor: one thread, cwd `/`, no file of the store or of its own mount open (closing one would wait for
//!   the worker, which may be dead)
//! * `serve`: the worker: builds the trees, runs the session
//! * `walls`: what the worker may not do
//! * `control`: what can be asked of a running server
//! * `shelf`: what outlives all of them, and lets the next supervisor go on
//! * `protocol`: what they say to each other, and which descriptors they hand over
//! * `figures`, `log`, `sources`, `startup`: what they share; their channel is `child`'s
//!
//! A job reaches the supervisor over a socket, never in its arguments.

pub mod control;
mod figures;
mod log;
mod protocol;
mod serve;
mod shelf;
mod sources;
mod spawn;
mod startup;
mod supervise;
mod walls;

use std::ffi::CStr;
use std::process::ExitCode;

use crate::fuse::mount::Method;
use crate::plan::Plan;
use crate::volume::Form;

pub(crate) use shelf::{PREFIX as SHELVED_PREFIX, names as shelved};
pub(crate) use sources::servable;
pub(crate) use spawn::alive;
pub(crate) use spawn::{Options, adopt, start};
pub(crate) use supervise::is_server;
pub(crate) use supervise::worker_of;

/// What the kernel calls the processes (/proc/PID/comm).
const SUPERVISOR_NAME: &CStr = c"fsprov-super";
/// See [`SUPERVISOR_NAME`].
const WORKER_NAME: &CStr = c"fsprov-worker";

/// Exit code of a worker that lost a thread to a request ([`crate::fuse::poison`]).
const THREAD_LOST: i32 = 71;
/// Exit code of a worker on whose connection somebody waits for a request that is lost: the connection must be aborted.
const REQUEST_LOST: i32 = 72;

const TARGET: &str = "fsprov::daemon";
/// Hidden verb of the supervisor.
const SUPERVISE: &str = "__supervise";
/// Hidden verb of the worker.
const WORK: &str = "__worker";

/// The server process that this verb means; `None`: it means no server. See [`crate::dispatch`].
pub(crate) fn dispatch(verb: &str) -> Option<ExitCode> {
    match verb {
        SUPERVISE => Some(supervise::main()),
        WORK => Some(serve::main()),
        _ => None,
    }
}

/// What the mount table shows as the source of a rootfs's FUSE mount.
pub(crate) fn mount_source(plan: &Plan) -> String {
    format!("fsprov-{}", plan.id)
}

/// Must the volumes be mounts of their own, because some of them have other flags than the rootfs? Then that is mounted nosuid and
/// nodev, until the volumes are mounted over it. What `fusermount3` mounts is one mount with one set of flags.
pub(crate) fn has_mounts_for_volumes(plan: &Plan, method: &Method) -> bool {
    let Method::Kernel { initial_user_namespace } = method else { return false };
    let nosuid = plan.restraint.nosuid();
    let nodev = plan.restraint.nodev() || !initial_user_namespace;
    plan.volumes.iter().any(|volume| {
        // A device is served as a regular file.
        let has_other_devices = volume.form != Form::Special && volume.has_devices() == nodev;
        volume.powers.suid == nosuid || has_other_devices || !volume.powers.exec
    })
}

/// Names in the directory that a backend keeps for a rootfs ([`Plan::state_dir`]).
pub(crate) mod names {
    /// What the server said.
    pub(crate) const LOG: &str = "server.log";
    /// Its control socket.
    pub(crate) const CONTROL: &str = "control.sock";
    /// Which process answers now.
    pub(crate) const WORKER: &str = "worker.json";
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

fn unhex(text: &str) -> crate::Result<Vec<u8>> {
    data_encoding::HEXLOWER
        .decode(text.as_bytes())
        .map_err(|e| crate::Error::new(crate::Kind::Invalid, "read a message of another process of fsprov", "", e))
}
