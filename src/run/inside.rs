//! The process in the middle: in the namespaces of an ordinary user, or root's own, it makes the rootfs and the bundle, has the runtime run
//! it, and takes everything away. It ends with the process that started it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ExitCode, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, Gid, Mode, Stat, Uid, fchmod, fchown, fstat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::Signal;

use super::auto::{self, Spare, Taken};
use super::bundle::{self, Bundle, Root};
use super::console::{Console, Window};
use super::covered::{self, Covered};
use super::passage;
use super::runtime::Call;
use super::users::{self, Maps};
use super::{Answer, BY_SIGNAL, FAILED, Job, Order, PATIENCE, PAUSE, TARGET, UserNs};
use crate::child::{self, channel::Channel};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::host::Host;
use crate::id::{ContainerId, ImageRef};
use crate::paths::StatePaths;
use crate::plan::{BackendKind, IdRange, Ownership, Restraint};
use crate::provisioner::{Detach, Provisioner, Request, Selector, upper_id};
use crate::sys::process::{ProcessId, start_thread};
use crate::sys::raw::{self, Users};

/// Longest job: arguments and environment are below 2 MiB together (execve(2)).
const MAX_JOB_BYTES: u64 = 16 << 20;

/// The umask in which mount points and working directories are made.
const UMASK: u32 = 0o022;

/// Where cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// CGROUP2_SUPER_MAGIC of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// The verb. `start_log` is told what to log, `complain` every error.
pub(crate) fn main(start_log: impl FnOnce(&str), complain: impl Fn(&Error)) -> ExitCode {
    match begin(start_log, &complain) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&error);
            ExitCode::from(FAILED)
        }
    }
}

fn begin(start_log: impl FnOnce(&str), complain: &impl Fn(&Error)) -> Result<u8> {
    fault::start();
    // It came here through `dispatch`, and its servers do.
    child::note_that_it_dispatches();
    let channel = Channel::from(child::take_stdin()?);
    let Some((Order::Begin, fds)) = channel.receive::<Order>()? else { return Ok(FAILED) };
    let mut fds = fds.into_iter();
    let (Some(file), Some(stdin)) = (fds.next(), fds.next()) else { return Ok(FAILED) };
    let job = read_job(file)?;
    // What it and the runtime make in the rootfs is for every user inside, as it is with podman.
    rustix::process::umask(Mode::from_raw_mode(UMASK));
    // No terminal sends it signals: the one who started it says which the program gets, each once.
    rustix::process::setsid().map_err(|e| Error::sys("make a session", "", e))?;
    if job.maps.is_some() && !enter(&channel)? {
        return Ok(FAILED);
    }
    start_log(&job.log);
    crate::sys::process::raise_open_files();
    let watch = Arc::new(Watch::default());
    let (theirs, channel) = (Arc::clone(&watch), channel);
    start_thread("that listens", move || theirs.listen(&channel))?;
    let inside = Inside::new(&job, &watch)?;
    if job.is_over { inside.clear().map(|()| 0) } else { inside.run(stdin, complain) }
}

fn read_job(file: OwnedFd) -> Result<Job> {
    use std::os::unix::fs::FileExt as _;
    const OP: &str = "read job";
    let file = std::fs::File::from(file);
    let length = file.metadata().map_err(|e| Error::io(OP, "", e))?.len();
    if length > MAX_JOB_BYTES {
        return Err(Error::new(Kind::Limit, OP, "", "it is too long"));
    }
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, 0).map_err(|e| Error::io(OP, "", e))?;
    serde_json::from_slice(&text).map_err(|e| Error::new(Kind::Invalid, OP, "", e))
}

/// Into a user and a mount namespace of this user's. `false`: the process that should write the maps is gone.
fn enter(channel: &Channel) -> Result<bool> {
    const OP: &str = "make a user namespace";
    raw::unshare_mounts(Users::New).map_err(|e| {
        Error::sys(OP, "", e).with_kind(Kind::Unsupported).hint(crate::sys::process::user_namespace_remedy(e))
    })?;
    channel.send(&Answer::Unmapped, &[])?;
    let Some((Order::Mapped, _)) = channel.receive::<Order>()? else { return Ok(false) };
    // What the host mounts later is seen here, and not the other way round.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(|e| Error::sys(OP, "", e))?;
    Ok(true)
}

/// How far it is, and what came meanwhile.
#[derive(Debug, Default)]
struct Watch {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The runtime, while it runs.
    runtime: Option<ProcessId>,
    /// Where the container's pid is, from then on.
    bundle: Option<PathBuf>,
    /// The program's terminal, if the runtime hands it over.
    window: Option<Arc<Window>>,
    /// The signal that ends the program.
    stop: Option<Signal>,
    /// A signal that came before there was a program.
    interrupted: Option<i32>,
    /// The process that started this is gone.
    is_alone: bool,
}

impl Watch {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, channel: &Channel) {
        loop {
            match channel.receive::<Order>() {
                Ok(Some((Order::Signal(number), _))) => self.pass_on(number),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break self.end(),
            }
        }
    }

    fn pass_on(&self, number: i32) {
        let mut state = self.state();
        // The kernel tells the program.
        if number == libc::SIGWINCH && state.window.as_ref().is_some_and(|window| window.fit()) {
            return;
        }
        match state.runtime {
            Some(runtime) => {
                let Some(signal) = Signal::from_named_raw(number) else { return };
                if let Err(e) = runtime.send_signal(signal) {
                    log::warn!(target: TARGET, "{e}");
                }
            }
            // A window that changes its size interrupts nothing.
            None if [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT].contains(&number) => {
                state.interrupted.get_or_insert(number);
            }
            None => {}
        }
    }

    /// Nobody waits for the program any more: it ends.
    fn end(&self) {
        let mut state = self.state();
        state.is_alone = true;
        let (bundle, stop, runtime, window) = (state.bundle.clone(), state.stop, state.runtime, state.window.clone());
        drop(state);
        // The terminal as it was, for who reads it now; the program's hangs up.
        if let Some(window) = window {
            window.close();
        }
        let Some(bundle) = bundle else { return };
        let ended = (|| {
            let Some(first) = bundle::first_process_of(&bundle, runtime, PATIENCE) else { return Ok(()) };
            first.send_signal(stop.unwrap_or(Signal::TERM))?;
            if !first.wait_gone(PATIENCE)? {
                first.send_signal(Signal::KILL)?;
            }
            Ok::<(), Error>(())
        })();
        if let Err(e) = ended {
            log::warn!(target: TARGET, "{e}");
        }
        // It waits for that process, and for nothing else.
        if let Some(runtime) = runtime
            && !runtime.wait_gone(PATIENCE).unwrap_or(false)
        {
            let _ = runtime.send_signal(Signal::KILL);
        }
    }
}

/// One run.
struct Inside<'a> {
    job: &'a Job,
    watch: &'a Watch,
    provisioner: Provisioner,
    paths: StatePaths,
    /// What is mounted, of the ids of this namespace.
    ids: (Vec<IdRange>, Vec<IdRange>),
    /// They are this run's alone.
    _taken: Option<Taken>,
}

impl<'a> Inside<'a> {
    fn new(job: &'a Job, watch: &'a Watch) -> Result<Self> {
        let paths = StatePaths::new(job.root.clone());
        let provisioner = Provisioner::new(paths.clone(), Host::probe());
        let is_auto = job.options.userns == Some(UserNs::Auto) && !job.is_over;
        let taken = if is_auto { Some(Self::take_ids(job, &paths)?) } else { None };
        // The ids of a user namespace of the container's own, in those of this one; empty: it has none.
        let ids = match (&taken, job.options.userns, &job.maps) {
            (Some(taken), ..) => (taken.uids.clone(), taken.gids.clone()),
            (None, Some(UserNs::KeepId), Some(Maps { uids, gids })) => {
                (users::keep_id(job.own.0, uids), users::keep_id(job.own.1, gids))
            }
            _ => (Vec::new(), Vec::new()),
        };
        Ok(Inside { job, watch, provisioner, paths, ids, _taken: taken })
    }

    fn take_ids(job: &Job, paths: &StatePaths) -> Result<Taken> {
        let spare = match &job.maps {
            Some(Maps { uids, gids }) => Spare::of_user(uids, gids),
            None => Spare::of_root(crate::idmap::Files::of_host())?,
        };
        let of_files = job.image.index.as_deref().map_or(Ok(0), auto::highest_owner)?;
        let user = job.options.user.as_deref().unwrap_or(&job.image.execution.user);
        let named = user.split(':').filter_map(|id| id.parse().ok()).max().unwrap_or(0);
        auto::take(spare, of_files.max(named), &paths.ids())
    }

    fn run(&self, stdin: OwnedFd, complain: &impl Fn(&Error)) -> Result<u8> {
        let done = self.make_rootfs().and_then(|root| self.run_on(&root, stdin, complain));
        let gone = self.take_away();
        match done {
            Ok(code) => gone.map(|()| code),
            Err(error) => Err(error.with_undo(gone)),
        }
    }

    // ---- the rootfs ----

    fn make_rootfs(&self) -> Result<Root> {
        let (job, dir) = (self.job, self.paths.run());
        std::fs::create_dir_all(&dir).map_err(|e| Error::io("make", show(&dir), e))?;
        let (image, path) = (job.image.reference()?, dir.join(job.id.as_str()).join("rootfs"));
        if self.is_direct() {
            self.provision(self.upper(image, path.clone(), job.id.clone()))?;
        } else {
            // The index knows owners that an ordinary user's disk does not have: the image as its server shows it, below a layer that
            // takes the changes.
            let below = self.paths.lower_of(&job.id);
            let mut lower = Request::new(image, &below).backend(BackendKind::Fuse).id(job.id.clone());
            lower.ownership = Some(Ownership { uids: self.ids.0.clone(), gids: self.ids.1.clone(), squash: None });
            self.provision(lower)?;
            self.provision(self.upper(ImageRef::Path(below), path.clone(), upper_id(&job.id)?))?;
        }
        Ok(Root { path, is_writable: true })
    }

    /// Do the layers on the disk look as the container is to see them?
    fn is_direct(&self) -> bool {
        let image = &self.job.image;
        let is_exact = image.index.is_none() || (self.job.maps.is_none() && !image.is_filtered);
        is_exact && self.ids.0.is_empty()
    }

    fn upper(&self, image: ImageRef, rootfs: PathBuf, id: ContainerId) -> Request {
        let mut request = Request::new(image, rootfs).backend(BackendKind::Overlay).id(id).writable();
        request.volumes.clone_from(&self.job.volumes);
        request.sandbox.clone_from(&self.job.sandbox);
        request.ownership = Some(Ownership::default());
        // Nobody else gets there; and /dev is the runtime's.
        request.restraint = Restraint { nosuid: Some(false), nodev: Some(true), ..Restraint::default() };
        request
    }

    fn provision(&self, mut request: Request) -> Result<()> {
        request.ends_with = Some(super::this_process()?);
        self.provisioner.provision(&request).map(|_| ())
    }

    /// Take away what was made in other namespaces, as soon as the runtime that lives there has ended.
    fn clear(&self) -> Result<()> {
        let end = std::time::Instant::now() + PATIENCE;
        loop {
            match self.take_away() {
                Err(e) if e.kind() == Kind::Busy && std::time::Instant::now() < end => std::thread::sleep(PAUSE),
                other => return other,
            }
        }
    }

    fn take_away(&self) -> Result<()> {
        let selector = Selector::Id(self.job.id.clone());
        let gone = self.provisioner.destroy(&selector, Detach::IfIdle);
        let gone = gone.or_else(|e| {
            log::info!(target: TARGET, "{e}");
            self.provisioner.destroy(&selector, Detach::Lazy)
        });
        gone.map(|_| ())
    }

    // ---- the program ----

    fn run_on(&self, root: &Root, stdin: OwnedFd, complain: &impl Fn(&Error)) -> Result<u8> {
        let job = self.job;
        let dir = self.paths.container(&job.id).dir().join(bundle::NAME);
        std::fs::create_dir(&dir).map_err(|e| Error::io("make", show(&dir), e))?;
        let own = (job.options.userns == Some(UserNs::KeepId)).then_some(job.own);
        let written = Bundle {
            dir: &dir,
            id: &job.id,
            root,
            image: &job.image,
            options: &job.options,
            volumes: &job.volumes,
            ids: self.ids.clone(),
            own,
            is_root: super::is_root(),
            copies_up: job.runtime.copies_up(),
            console: job.console,
            puts_aside: true,
        }
        .write()?;
        if let Some((code, error)) = written.check_program() {
            complain(&error);
            return Ok(code);
        }
        fault::point("run.bundle")?;
        let call = Call { id: &job.id, bundle: &dir };
        let stop = written.stop_signal().and_then(signal_named);
        let _owners = Owners::of_streams(&stdin);
        let status = std::thread::scope(|scope| {
            let runs = std::thread::Builder::new()
                .spawn_scoped(scope, || self.run_apart(&call, root, written.covered(), stdin, stop))
                .map_err(|e| Error::io("start a thread for", "the runtime", e))?;
            runs.join().unwrap_or_else(|_| Err(Error::new(Kind::Helper, "run", &job.id, "its thread ended")))
        })?;
        let Some(status) = status else {
            return Ok(BY_SIGNAL + self.watch.state().interrupted.unwrap_or(libc::SIGTERM) as u8);
        };
        if let (false, Some(failure)) = (status.success(), call.failure()) {
            let why = format!("{}: {}", job.runtime.name(), failure.said);
            complain(&Error::new(Kind::Helper, "run", &job.image.reference, why));
            return Ok(failure.exit_code());
        }
        Ok(status.code().map_or_else(|| BY_SIGNAL + status.signal().unwrap_or(0) as u8, |code| code as u8))
    }

    /// Run the runtime from this thread, which has a mount namespace of its own where that helps. `None`: a signal came before.
    fn run_apart(
        &self,
        call: &Call<'_>,
        root: &Root,
        covered: &[Covered],
        stdin: OwnedFd,
        stop: Option<Signal>,
    ) -> Result<Option<ExitStatus>> {
        let is_mixed = self.job.runtime.wants_pure_cgroups(self.job.maps.is_none()) && !has_pure_cgroups();
        let is_auto = self.job.options.userns == Some(UserNs::Auto);
        if is_mixed || is_auto || !covered.is_empty() {
            be_apart(is_mixed)?;
        }
        if !covered.is_empty() {
            let owner = users::other_root(&self.ids);
            covered::put_aside(&root.path, call.bundle, covered, owner)?;
        }
        if is_mixed {
            show_pure_cgroups()?;
        }
        if is_auto {
            passage::open(self.paths.root(), &[&root.path, call.bundle], self.job.runtime.path())?;
        }
        let has_console = self.job.options.terminal && self.job.runtime.hands_over_terminal();
        let (console, stdin) =
            if has_console { (Some(Console::expect(call.bundle, stdin)?), None) } else { (None, Some(stdin)) };
        let mut command = self.job.runtime.run(call, stdin);
        let mut child = {
            let mut state = self.watch.state();
            if state.is_alone || state.interrupted.is_some() {
                return Ok(None);
            }
            let mut child: Child = command.spawn().map_err(|e| Error::io("start", self.job.runtime.name(), e))?;
            let runtime = ProcessId::of(child.id() as i32)?;
            state.runtime = Some(runtime);
            if let Err(e) = bundle::note_runtime(call.bundle, runtime) {
                log::warn!(target: TARGET, "{e}");
            }
            if self.job.runtime.misses_the_end()
                && let Err(error) = remind(runtime, call.bundle.to_owned())
            {
                return Err(error.with_undo(child.kill().map_err(|e| Error::io("end", self.job.runtime.name(), e))));
            }
            state.bundle = Some(call.bundle.to_owned());
            state.stop = stop;
            state.window = console.as_ref().map(Console::window);
            child
        };
        let status = child.wait().map_err(|e| Error::io("wait for", self.job.runtime.name(), e));
        self.watch.state().runtime = None;
        let was_killed = status.as_ref().is_ok_and(|status| status.signal().is_some());
        if was_killed || self.watch.state().is_alone {
            // The program may go on.
            self.job.runtime.delete(call);
        }
        if let Some(console) = console {
            console.finish(|| {
                let state = self.watch.state();
                state.is_alone || state.interrupted.is_some()
            });
        }
        status.map(Some)
    }
}

/// Tell the runtime of the end of its container's first process, again and again, until it has ended too.
fn remind(runtime: ProcessId, bundle: PathBuf) -> Result<()> {
    start_thread("that reminds the runtime", move || {
        while !runtime.wait_gone(PAUSE).unwrap_or(true) {
            if bundle.join(bundle::PID).exists() && bundle::first_process(&bundle).is_none() {
                let _ = runtime.send_signal(Signal::CHILD);
            }
        }
    })
}

/// To whom the files belong that are the program's stdin, stdout and stderr. Runtimes give them to the program's user; when it has ended
/// they belong to who they did before (`fsprov run -u www-data ... >out`).
struct Owners(Vec<(OwnedFd, Stat)>);

impl Owners {
    fn of_streams(stdin: &OwnedFd) -> Self {
        let streams = [stdin.as_fd(), std::io::stdout().as_fd(), std::io::stderr().as_fd()].map(|fd| {
            let stat = fstat(fd).ok().filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)?;
            Some((fd.try_clone_to_owned().ok()?, stat))
        });
        Owners(streams.into_iter().flatten().collect())
    }
}

impl Drop for Owners {
    fn drop(&mut self) {
        for (file, before) in &self.0 {
            let is_changed = fstat(file).is_ok_and(|now| (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid));
            let ids = (Uid::from_raw(before.st_uid), Gid::from_raw(before.st_gid));
            // While the file was its own, the program could have let everyone write it.
            let restore = || fchmod(file, before.st_mode.into()).and_then(|()| fchown(file, Some(ids.0), Some(ids.1)));
            if is_changed && let Err(e) = restore() {
                log::warn!(target: TARGET, "a file of stdin, stdout or stderr belongs to the program's user now: {e}");
            }
        }
    }
}

/// Is cgroup v2 all there is?
fn has_pure_cgroups() -> bool {
    rustix::fs::statfs(CGROUPS).is_ok_and(|found| found.f_type as u64 == CGROUP2_MAGIC)
}

/// A mount namespace for this thread and what it starts, and a cgroup namespace too. What the host mounts later is seen there.
fn be_apart(has_cgroups: bool) -> Result<()> {
    let done = if has_cgroups { raw::unshare_mounts_and_cgroups() } else { raw::unshare_mounts(Users::Same) };
    done.and_then(|()| mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC))
        .map_err(|e| Error::sys("make a mount namespace for", "the runtime", e))
}

/// For this thread and what it starts, cgroup v2 alone: crun refuses a mixed layout, even where it is to make no cgroup.
fn show_pure_cgroups() -> Result<()> {
    const OP: &str = "mount cgroup2 for the runtime at";
    let fail = |e| Error::sys(OP, CGROUPS, e);
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("cgroup2", CGROUPS, "cgroup2", flags, None).map_err(fail)
}

/// `SIGTERM`, `TERM` or `15`.
fn signal_named(text: &str) -> Option<Signal> {
    const NAMES: [(&str, Signal); 10] = [
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("QUIT", Signal::QUIT),
        ("ABRT", Signal::ABORT),
        ("KILL", Signal::KILL),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
        ("ALRM", Signal::ALARM),
        ("TERM", Signal::TERM),
        ("WINCH", Signal::WINCH),
    ];
    if let Ok(number) = text.parse() {
        return Signal::from_named_raw(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES.iter().find(|(have, _)| *have == name).map(|(_, signal)| *signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        for (text, want) in [
            ("SIGQUIT", Some(Signal::QUIT)),
            ("quit", Some(Signal::QUIT)),
            ("28", Some(Signal::WINCH)),
            ("15", Some(Signal::TERM)),
            ("SIGNO", None),
            ("", None),
        ] {
            assert_eq!(signal_named(text), want, "{text:?}");
        }
    }
}
