//! `fsprov run` and `fsprov bundle`: a program in an image, by an OCI runtime of this host. No runtime of its own: it writes a bundle, and
//! starts crun, runc or youki on it.
//!
//! ```text
//! fsprov run        finds the image; writes the id maps of an ordinary user; forwards signals; waits
//!    |  a socket
//! fsprov __run      `inside`: in that user's namespaces, makes the rootfs and the bundle, and takes them away
//!    |
//! crun              runs the program
//! ```
//!
//! | file | |
//! | --- | --- |
//! | `options` | what is asked for, and what of it and the image becomes the program: data |
//! | `config` | config.json: data in, data out |
//! | `seccomp`, `files`, `user`, `users`, `auto` | the profile; /etc/hosts and the like; who runs it; id maps |
//! | `bundle` | a bundle from all that |
//! | `runtime` | which runtime, how it is called, what it says |
//! | `inside` | the process in the middle |
//! | `console` | the program's terminal |
//! | `covered` | volumes below what the runtime mounts |
//! | `passage` | its rootfs, for a runtime whose root is nobody here |
//!
//! Either of the two processes ends when the other one does, and takes away what there is: whichever was killed, nothing stays.

mod auto;
mod bundle;
mod config;
mod console;
mod covered;
mod files;
mod inside;
mod options;
mod passage;
mod runtime;
mod seccomp;
mod user;
mod users;

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::termios::{Action, Termios, tcflow, tcgetattr};
use serde::{Deserialize, Serialize};
use signal_hook::consts as signals;

use crate::child::{self, channel::Channel};
use crate::error::{Error, Kind, Result};
use crate::id::{ContainerId, ImageId, ImageRef};
use crate::image::execution::Execution;
use crate::paths::StatePaths;
use crate::store::Store;
use crate::sys::process::{ProcessId, is_root_of_host, not_started, start_thread};
use crate::volume::VolumeSpec;

pub(crate) use bundle::{Bundle, Root};
pub(crate) use config::Network;
pub(crate) use inside::main;
pub(crate) use options::{Options, UserNs, check_environment, entrypoint, env_file};
pub(crate) use runtime::Runtime;
use users::Maps;

/// Hidden verb of the process in the middle.
pub(crate) const VERB: &str = "__run";
const TARGET: &str = "fsprov::run";

/// Exit code: it was not the program that failed.
pub(crate) const FAILED: u8 = 125;
/// Exit code: the program cannot be run.
pub(crate) const NOT_RUN: u8 = 126;
/// Exit code: the program was not found.
pub(crate) const NOT_FOUND: u8 = 127;
/// What a shell adds to the number of the signal that ended a program.
const BY_SIGNAL: u8 = 128;

/// How long a program has to end after its stop signal, and after SIGKILL.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often what is busy is tried again.
const PAUSE: Duration = Duration::from_millis(50);

/// Passed on to the program. SIGTSTP stops this process alone: the terminal is its own.
const FORWARDED: [i32; 9] = [
    signals::SIGHUP,
    signals::SIGINT,
    signals::SIGQUIT,
    signals::SIGTERM,
    signals::SIGUSR1,
    signals::SIGUSR2,
    signals::SIGALRM,
    signals::SIGCONT,
    signals::SIGWINCH,
];

/// Which image, found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Image {
    /// What the user wrote.
    reference: String,
    /// Its id, where it lies in the store.
    id: Option<ImageId>,
    /// Where it lies, where it does not.
    #[serde(with = "path_or_none")]
    path: Option<std::path::PathBuf>,
    /// The index that says what its tree is: the layers on the disk may lack owners.
    #[serde(with = "path_or_none")]
    index: Option<std::path::PathBuf>,
    /// Do the layers hold what the image does not show?
    is_filtered: bool,
    /// How it wants to be run.
    execution: Execution,
}

impl Image {
    /// Look it up, import it if it is an archive or a layout.
    pub(crate) fn find(store: &Store, image: &ImageRef) -> Result<Self> {
        let _in_use = store.lock_shared()?;
        let found = store.resolve(image)?;
        let path = match image {
            ImageRef::Path(path) if found.id.is_none() => {
                Some(std::path::absolute(path).map_err(|e| Error::io("find image", crate::error::show(path), e))?)
            }
            _ => None,
        };
        Ok(Image {
            reference: image.to_string(),
            execution: store.execution(&found)?,
            is_filtered: found.is_filtered,
            index: found.index,
            id: found.id,
            path,
        })
    }

    /// What the user called it.
    pub(crate) fn name(&self) -> &str {
        &self.reference
    }

    /// The image that was found, whatever the name means by now.
    pub(crate) fn reference(&self) -> Result<ImageRef> {
        match (&self.id, &self.path) {
            (Some(id), _) => Ok(ImageRef::Id(id.clone())),
            (None, Some(path)) => Ok(ImageRef::Path(path.clone())),
            (None, None) => ImageRef::parse(self.reference.as_ref()),
        }
    }
}

mod path_or_none {
    use std::path::PathBuf;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(transparent)]
    struct Text(#[serde(with = "crate::pathtext")] PathBuf);

    #[expect(clippy::ref_option, reason = "serde hands the field over so")]
    pub(super) fn serialize<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
        path.clone().map(Text).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<Text>::deserialize(from)?.map(|text| text.0))
    }
}

/// All that the process in the middle is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The state root.
    #[serde(with = "crate::pathtext")]
    pub(crate) root: std::path::PathBuf,
    /// The rootfs's id.
    pub(crate) id: ContainerId,
    /// The image.
    pub(crate) image: Image,
    /// What is asked for.
    pub(crate) options: Options,
    /// Volumes; no source begins with `.`.
    pub(crate) volumes: Vec<VolumeSpec>,
    /// Where volumes' sources lie that are bare names.
    #[serde(with = "path_or_none")]
    pub(crate) sandbox: Option<std::path::PathBuf>,
    /// Is stdin passed on?
    pub(crate) interactive: bool,
    /// The size of its terminal, rows and columns.
    pub(crate) console: Option<(u16, u16)>,
    /// What runs it.
    pub(crate) runtime: Runtime,
    /// The ids of an ordinary user's namespace; `None`: this is root.
    maps: Option<Maps>,
    /// Whose ids `--userns=keep-id` keeps.
    own: (u32, u32),
    /// What is logged (env_logger's words).
    pub(crate) log: String,
    /// Is there nothing to do but to take away what an earlier one has left?
    is_over: bool,
}

impl Job {
    /// Fill in what this process knows of itself.
    pub(crate) fn new(
        root: &StatePaths,
        id: ContainerId,
        image: Image,
        options: Options,
        runtime: Runtime,
    ) -> Result<Self> {
        let own = crate::sys::process::own_ids();
        // Root of a user namespace mounts in it, and has the ids that it has.
        let maps = if rustix::process::geteuid().is_root() { None } else { Some(Maps::of_user()?) };
        if let (None, Some(UserNs::KeepId)) = (&maps, options.userns) {
            return Err(Error::new(Kind::Usage, "run", "--userns=keep-id", "root has every id already")
                .hint("leave it out, or run as an ordinary user"));
        }
        Ok(Job {
            root: root.root().to_owned(),
            id,
            image,
            options,
            volumes: Vec::new(),
            sandbox: None,
            interactive: false,
            console: None,
            runtime,
            maps,
            own,
            log: String::new(),
            is_over: false,
        })
    }
}

/// To the process in the middle.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// The job, in a memory file, and its stdin.
    Begin,
    /// The maps are written.
    Mapped,
    /// This signal came.
    Signal(i32),
}

/// From it.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// It is in a user namespace that has no maps yet.
    Unmapped,
}

/// Run it to its end. Gives the exit code: the program's, or one of ours, which was explained on stderr.
pub(crate) fn run(job: &Job) -> Result<u8> {
    if job.options.terminal {
        // In the background, this stops it until the user calls it to the front (SIGTTOU). The others have no controlling terminal: nothing
        // would keep them from reading what is typed to the shell.
        let _ = tcflow(std::io::stdin(), Action::OOn);
    }
    let before = Terminal::look();
    let caught = signal_hook::iterator::Signals::new(FORWARDED).map_err(|e| Error::io("catch signals", "", e))?;
    let (channel, other) = Channel::pair()?;
    let channel = Arc::new(channel);
    let mut process = start(&channel, other, job)?;
    let to = Arc::clone(&channel);
    let mut caught = caught;
    let passes_on = start_thread("that passes signals on", move || {
        for signal in caught.forever() {
            // It may be gone: then so are we, in a moment.
            let _ = to.send(&Order::Signal(signal), &[]);
        }
    });
    if let Err(e) = passes_on {
        // It ends when nobody holds the other end, and takes away what there is.
        drop(channel);
        let _ = process.wait();
        return Err(e);
    }
    let status = process.wait().map_err(|e| Error::io("wait for", "fsprov __run", e))?;
    before.restore();
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(code as u8),
        (None, signal) => {
            let error = Error::new(
                Kind::Helper,
                "run",
                &job.id,
                format!("fsprov __run was killed by signal {}", signal.unwrap_or(0)),
            );
            Err(error.with_undo(take_away(job)))
        }
    }
}

/// The size of the terminal that stdin is, rows and columns; `None`: nobody has said.
pub(crate) fn console_size() -> Option<(u16, u16)> {
    console::size_of(std::io::stdin()).map(|size| (size.ws_row, size.ws_col))
}

fn start(channel: &Channel, other: OwnedFd, job: &Job) -> Result<Child> {
    const OP: &str = "run";
    let text = serde_json::to_vec(job).map_err(|e| Error::new(Kind::Io, OP, "", e))?;
    let file =
        rustix::fs::memfd_create("fsprov-job", rustix::fs::MemfdFlags::CLOEXEC).map_err(|e| Error::sys(OP, "", e))?;
    let mut file = std::fs::File::from(file);
    std::io::Write::write_all(&mut file, &text).map_err(|e| Error::io(OP, "", e))?;
    let stdin = if job.interactive {
        std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| Error::io("pass on", "stdin", e))?
    } else {
        OwnedFd::from(std::fs::File::open("/dev/null").map_err(|e| Error::io("open", "/dev/null", e))?)
    };
    let program = child::program(OP)?;
    let mut process = Command::new(&program)
        .arg(VERB)
        .stdin(Stdio::from(other))
        .spawn()
        .map_err(|e| not_started("start", "fsprov __run", e))?;
    let begun = channel.send(&Order::Begin, &[file.as_fd(), stdin.as_fd()]).and_then(|()| match &job.maps {
        Some(maps) => match channel.receive::<Answer>()? {
            Some((Answer::Unmapped, _)) => maps.write(process.id()).and_then(|()| channel.send(&Order::Mapped, &[])),
            // It has said why.
            None => Ok(()),
        },
        None => Ok(()),
    });
    if let Err(e) = begun {
        let _ = process.kill();
        let _ = process.wait();
        return Err(e);
    }
    Ok(process)
}

/// What the process in the middle has left, which was killed. Files of subordinate ids are another one's to remove, in namespaces like its own.
fn take_away(job: &Job) -> Result<()> {
    let paths = StatePaths::new(job.root.clone());
    let bundle = paths.container(&job.id).dir().join(bundle::NAME);
    let runtime = bundle::runtime(&bundle);
    if let Some(first) = bundle::first_process_of(&bundle, runtime, PATIENCE) {
        first.send_signal(rustix::process::Signal::KILL)?;
        first.wait_gone(PATIENCE)?;
    }
    // It ends with its program; one that has missed the end does not.
    if let Some(runtime) = runtime
        && !runtime.wait_gone(PAUSE)?
    {
        runtime.send_signal(rustix::process::Signal::CHILD)?;
        if !runtime.wait_gone(PATIENCE)? {
            runtime.send_signal(rustix::process::Signal::KILL)?;
        }
    }
    let (channel, other) = Channel::pair()?;
    let status = start(&channel, other, &Job { is_over: true, ..job.clone() })?.wait();
    match status.map_err(|e| Error::io("wait for", "fsprov __run", e))?.code() {
        Some(0) => Ok(()),
        _ => Err(Error::new(Kind::Helper, "take away", &job.id, "it stays").hint(format!("fsprov unmount {}", job.id))),
    }
}

/// A terminal as it was: a runtime that is killed leaves it raw.
struct Terminal(Option<Termios>);

impl Terminal {
    fn look() -> Self {
        Terminal(tcgetattr(std::io::stdin()).ok())
    }

    fn restore(&self) {
        if let Some(before) = &self.0 {
            console::set(std::io::stdin(), before);
        }
    }
}

/// Is a process that a record ends with still there?
pub(crate) fn this_process() -> Result<ProcessId> {
    ProcessId::current()
}

/// For a bundle: the maps of a namespace with the user's own id, which every runtime may write; for root none.
pub(crate) fn own_ids_alone() -> (Vec<crate::plan::IdRange>, Vec<crate::plan::IdRange>) {
    if rustix::process::geteuid().is_root() {
        return (Vec::new(), Vec::new());
    }
    let (uid, gid) = crate::sys::process::own_ids();
    let alone = |outside| vec![crate::plan::IdRange { inside: 0, outside, count: 1 }];
    (alone(uid), alone(gid))
}

/// Is this root of the machine?
pub(crate) fn is_root() -> bool {
    is_root_of_host().unwrap_or(false)
}
