//! `fsprov run` and `fsprov bundle`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::interrupt::Undoing;
use super::mount::pull_missing;
use super::{Global, log_filter, output, settings, start_log};
use crate::backend::Detach;
use crate::config::Settings;
use crate::error::{Error, Kind, Result, show};
use crate::id::{ContainerId, ImageRef};
use crate::plan::BackendKind;
use crate::provisioner::{Provisioner, Request, Selector};
use crate::run::{self, Bundle, Image, Job, Network, Options, Root, Runtime, UserNs};
use crate::store::Store;
use crate::volume::{self, VolumeSpec};

/// Largest `--env-file`.
const MAX_ENV_FILE_BYTES: u64 = 1 << 20;

// What is asked of the program: the same for `run` and `bundle`. No doc comment, as in `Format`.
#[derive(Debug, Args)]
struct Program {
    /// Set a variable; NAME alone: as it is here (repeatable)
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Set the variables of a file, one a line (repeatable)
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Where the program begins [default: as the image says, else /]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Who runs it, by name or number [default: as the image says, else root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// In place of the image's entry point: a program, or a JSON list of one with arguments; '' for none
    #[arg(long, value_name = "PROGRAM", allow_hyphen_values = true)]
    entrypoint: Option<String>,
    /// Route DST inside the rootfs to SRC on this host (repeatable)
    #[arg(short, long = "volume", value_name = volume::GRAMMAR)]
    volumes: Vec<OsString>,
    /// The work directory that volumes' sources lie below that are bare names (made if missing)
    #[arg(long, value_name = "DIR")]
    sandbox: Option<PathBuf>,
    /// Mount a tmpfs, with what the image has there (repeatable)
    #[arg(long, value_name = "PATH[:OPTION,...]")]
    tmpfs: Vec<String>,
    /// Make the rootfs read-only, except for volumes, /run, /tmp and /var/tmp
    #[arg(long)]
    read_only: bool,
    /// The host name inside [default: this host's; the id with --network none]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// The network inside
    #[arg(long, visible_alias = "net", value_enum, default_value = "host", value_name = "NETWORK")]
    network: Network,
    /// Give a capability, or all of them (repeatable)
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// Take a capability, or all of them (repeatable)
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// Which system calls it may make: a profile of podman's or docker's, or none [default: containers-common's, where it is installed]
    #[arg(long, value_name = "FILE|none")]
    seccomp: Option<String>,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
IMAGE is as for `fsprov mount`; what the store lacks is pulled or imported. docker://NAME, oci:DIR, oci-archive:FILE and docker-archive:FILE \
are taken, too. The rootfs is writable, and ends with the program. What is not asked for comes from the image: entry point, environment, working \
directory, user, stop signal. Options end with IMAGE: what follows is the program's. It runs in the foreground, by crun, runc or youki; for \
containers in the background, networks and limits take podman or containerd.

Exit code: the program's own; 125 if fsprov or the runtime failed, 126 if the program could not be run, 127 if it was not found.

Examples:
  fsprov run -it debian:12
  fsprov run -v .:/src -w /src rust:1 cargo test
  fsprov run --read-only --network none --user nobody alpine id
  fsprov run --userns=keep-id -v ~/work:/work ./rootfs make")]
pub(super) struct Run {
    #[command(flatten)]
    program: Program,
    /// Pass this command's stdin on
    #[arg(short, long)]
    interactive: bool,
    /// Name the rootfs [default: twelve random hex digits]
    #[arg(long, value_name = "ID", visible_alias = "name")]
    id: Option<ContainerId>,
    /// The ids inside [default: host]
    #[arg(long, value_enum, value_name = "MODE")]
    userns: Option<UserNs>,
    /// The runtime, by name or path [default: crun, runc or youki, the first there is]
    #[arg(long, value_name = "RUNTIME")]
    runtime: Option<OsString>,
    /// Nothing: everything ends with the program, always (for those used to podman and docker)
    #[arg(long, hide = true)]
    rm: bool,
    /// The image
    image: OsString,
    /// The program and its arguments [default: as the image says]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Mounts the image at DIR/rootfs and writes DIR/config.json, with what the image says and what is asked for, and the files that it names. \
IMAGE is as for `fsprov run`. As an ordinary user the rootfs is read-only, and its program has the user's id alone. It stays until \
`fsprov unmount DIR/rootfs`.

Examples:
  fsprov bundle debian:12 b -- sh -c 'echo hello'
  crun run --bundle b hello
  fsprov unmount b/rootfs")]
pub(super) struct BundleVerb {
    #[command(flatten)]
    program: Program,
    /// Name the rootfs [default: twelve random hex digits]
    #[arg(long, value_name = "ID")]
    id: Option<ContainerId>,
    /// The image
    image: OsString,
    /// The bundle (made if missing)
    dir: PathBuf,
    /// The program and its arguments [default: as the image says]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Program {
    fn options(&self, command: &[String], volumes: &[VolumeSpec]) -> Result<Options> {
        let mut environment = Vec::new();
        for path in &self.env_file {
            const OP: &str = "read --env-file";
            let file = std::fs::File::open(path).map_err(|e| Error::io(OP, show(path), e))?;
            let bytes = crate::sys::fs::read_bounded(OP, show(path), file, MAX_ENV_FILE_BYTES)?;
            let text = String::from_utf8(bytes).map_err(|e| Error::new(Kind::Invalid, OP, show(path), e))?;
            environment.extend(run::env_file(&text, &show(path))?);
        }
        for pair in &self.env {
            run::check_environment(pair)?;
            environment.push(pair.clone());
        }
        let options = Options {
            entrypoint: self.entrypoint.as_deref().map(run::entrypoint).transpose()?,
            command: command.to_vec(),
            environment,
            working_directory: self.workdir.clone(),
            user: self.user.clone(),
            tmpfs: self.tmpfs.clone(),
            read_only: self.read_only,
            terminal: self.tty,
            hostname: self.hostname.clone(),
            network: Some(self.network),
            userns: None,
            cap_add: self.cap_add.clone(),
            cap_drop: self.cap_drop.clone(),
            seccomp: self.seccomp.clone(),
        };
        // What is wrong in it is said before anything is pulled.
        options.capabilities()?;
        let targets: Vec<PathBuf> = volumes.iter().map(|volume| volume.target.as_path().to_owned()).collect();
        options.tmpfs(&crate::image::execution::Execution::default(), |at| PathBuf::from(at), &targets)?;
        options.working_directory(&crate::image::execution::Execution::default())?;
        Ok(options)
    }

    fn volumes(&self) -> Result<Vec<VolumeSpec>> {
        super::mount::volumes(&self.volumes)
    }
}

/// The image, pulled or imported where the store lacks it.
fn find(global: &Global, settings: &Settings, text: &OsStr) -> Result<Image> {
    let image = image_ref(text)?;
    pull_missing(global, settings, &image)?;
    Image::find(&Store::open(&global.paths()?)?.with_policy(settings.policy()), &image)
}

/// IMAGE, or one with a transport before it as podman and skopeo have them.
fn image_ref(text: &OsStr) -> Result<ImageRef> {
    let Some((transport, rest)) = text.to_str().and_then(|text| text.split_once(':')) else {
        return ImageRef::parse(text);
    };
    match transport {
        "docker" if rest.starts_with("//") => ImageRef::parse(OsStr::new(&rest[2..])),
        "oci" | "oci-archive" | "docker-archive" if !rest.is_empty() => Ok(ImageRef::Path(PathBuf::from(rest))),
        "dir" | "containers-storage" | "docker-daemon" | "ostree" if !rest.is_empty() => Err(Error::new(
            Kind::Usage,
            "find image",
            text.to_string_lossy(),
            format!("images of {transport}: are not read"),
        )
        .hint(format!("skopeo copy {transport}:... oci-archive:FILE, then run oci-archive:FILE"))),
        _ => ImageRef::parse(text),
    }
}

impl Run {
    /// Gives the exit code.
    pub(super) fn run(&self, global: &Global) -> Result<u8> {
        let settings = settings()?;
        let volumes = self.program.volumes()?;
        let mut options = self.program.options(&self.command, &volumes)?;
        options.userns = self.userns;
        let runtime = Runtime::find(self.runtime.as_deref())?;
        if self.program.tty && !std::io::IsTerminal::is_terminal(&std::io::stdin()) {
            return Err(Error::new(Kind::Usage, "run", "--tty", "stdin is not a terminal").hint("leave out -t"));
        }
        let undoing = Undoing::on_signal(global, None)?;
        let image = find(global, &settings, &self.image)?;
        drop(undoing);
        let paths = global.paths()?;
        let id = self.id.clone().map_or_else(ContainerId::random, Ok)?;
        if paths.container(&id).dir().exists() {
            return Err(
                Error::new(Kind::Exists, "run", &id, "there is a rootfs of this id").hint("choose another --id")
            );
        }
        let mut job = Job::new(&paths, id, image, options, runtime)?;
        job.volumes = volumes;
        job.sandbox = self
            .program
            .sandbox
            .as_ref()
            .map(std::path::absolute)
            .transpose()
            .map_err(|e| Error::io("run", "--sandbox", e))?;
        // A terminal is read in any case: its program's is another.
        job.interactive = self.interactive || self.program.tty;
        job.console = if self.program.tty { run::console_size() } else { None };
        job.log = log_filter(global.verbose);
        run::run(&job)
    }
}

/// The process in the middle of `fsprov run`. See [`crate::dispatch`].
pub(crate) fn dispatch(verb: &str) -> Option<ExitCode> {
    (verb == run::VERB).then(|| run::main(start_log, output::complain))
}

impl BundleVerb {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let settings = settings()?;
        let volumes = self.program.volumes()?;
        let options = self.program.options(&self.command, &volumes)?;
        let undoing = Undoing::on_signal(global, None)?;
        let image = find(global, &settings, &self.image)?;
        drop(undoing);
        let dir = std::path::absolute(&self.dir).map_err(|e| Error::io("make", show(&self.dir), e))?;
        let is_new = match std::fs::create_dir(&dir) {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(Error::io("make", show(&dir), e)),
        };
        let id = self.id.clone().map_or_else(ContainerId::random, Ok)?;
        let provisioner = global.provisioner()?;
        let made = self.write(&provisioner, &dir, &id, &image, &options, &volumes);
        if made.is_err() && is_new {
            let _ = std::fs::remove_dir(&dir);
        }
        made?;
        output::line(&format!(
            "wrote {} for {} at {} (id {id})",
            show(dir.join("config.json")),
            image.name(),
            show(dir.join("rootfs"))
        ))
    }

    fn write(
        &self,
        provisioner: &Provisioner,
        dir: &std::path::Path,
        id: &ContainerId,
        image: &Image,
        options: &Options,
        volumes: &[VolumeSpec],
    ) -> Result<()> {
        let is_writable = rustix::process::geteuid().is_root();
        let mut request = Request::new(image.reference()?, dir.join("rootfs")).id(id.clone());
        request.volumes = volumes.to_vec();
        request.sandbox.clone_from(&self.program.sandbox);
        if is_writable {
            request = request.writable().backend(BackendKind::Overlay);
        }
        // Where the links on the way led.
        let root = Root { path: provisioner.provision(&request)?.plan.rootfs, is_writable };
        let written = Bundle {
            dir: root.path.parent().unwrap_or(dir),
            id,
            root: &root,
            image,
            options,
            volumes,
            ids: run::own_ids_alone(),
            own: None,
            is_root: run::is_root(),
            copies_up: true,
            console: None,
            puts_aside: false,
        }
        .write();
        match written {
            Ok(_) => Ok(()),
            Err(e) => Err(e.with_undo(provisioner.destroy(&Selector::Id(id.clone()), Detach::Lazy).map(|_| ()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_by_name_path_and_transport() {
        let name = |text: &str| ImageRef::Name(text.into());
        let path = |text: &str| ImageRef::Path(text.into());
        for (text, want) in [
            ("debian:12", name("debian:12")),
            ("docker://debian:12", name("debian:12")),
            ("localhost:5000/a:1", name("localhost:5000/a:1")),
            ("oci:layout", path("layout")),
            ("oci-archive:/a.tar", path("/a.tar")),
            ("docker-archive:a.tar", path("a.tar")),
            ("./tree", path("./tree")),
            ("oci", name("oci")),
        ] {
            assert_eq!(image_ref(text.as_ref()).unwrap(), want, "{text}");
        }
        let error = image_ref("containers-storage:x".as_ref()).unwrap_err();
        assert!(error.kind() == Kind::Usage && error.remedy().contains("skopeo copy"), "{error}");
    }
}
