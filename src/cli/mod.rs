//! The command line: one definition gives parsing, help, man page and completions.
//!
//! Parsing touches no environment but the variables named in the definition; each verb's file resolves and runs it. Must not
//! know system calls.

mod bench;
mod changes;
mod complete;
mod config;
mod docs;
mod image;
mod inspect;
mod interrupt;
mod list;
mod mount;
mod output;
mod probe;
mod recover;
mod restart;
mod run;
mod service;
mod shown;
#[cfg(feature = "containerd")]
mod snapshotter;
mod start;
mod stats;
mod unmount;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::Settings;
use crate::error::{Error, Kind, Result, show};
use crate::paths::StatePaths;
use crate::plan::BackendKind;
use crate::provisioner::Provisioner;

/// Put a container image's root filesystem in place: read-only, at a path you name, with or without root.
#[derive(Debug, Parser)]
#[command(
    name = "fsprov",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Example:\n  fsprov image pull debian:12\n  fsprov mount -v .:/src debian:12 rootfs\n  fsprov unmount rootfs\n\n\
                  Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 busy, 5 not possible on this host."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Global {
    /// Where images and records are kept [default: /var/lib/fsprov for root, else $XDG_DATA_HOME/fsprov]
    #[arg(long, global = true, value_name = "DIR", env = "FSPROV_ROOT", hide_env_values = true)]
    root: Option<PathBuf>,
    /// Say more on stderr: once for what was chosen and why, twice for every step (FSPROV_LOG sets a filter instead)
    #[arg(long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

// Deferred: each start would otherwise build the arguments of every verb, which is a fifth of a mount's time.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Verb {
    /// Mount an image's root filesystem
    Mount(mount::Mount),
    /// Run a program in an image
    Run(run::Run),
    /// Mount an image, and write an OCI runtime's config.json for it
    Bundle(run::BundleVerb),
    /// Unmount a rootfs
    #[command(visible_alias = "umount")]
    Unmount(unmount::Unmount),
    /// List the rootfses
    #[command(visible_alias = "ls")]
    List(list::List),
    /// Show everything about one rootfs
    Inspect(inspect::Inspect),
    /// List what a writable rootfs changed
    Diff(changes::Diff),
    /// Make an image of a writable rootfs
    Commit(changes::Commit),
    /// Show what a rootfs's FUSE server does
    Stats(stats::Stats),
    /// Replace a FUSE server's worker with this program's
    Restart(restart::Restart),
    /// Mount again what a crash or a reboot took away, and clean up
    Recover(recover::Recover),
    /// Show which backends work on this host, and what the others need
    Probe(probe::Probe),
    /// Measure how fast each backend is here, on your image
    Bench(bench::Bench),
    /// Manage images
    Image(image::Image),
    /// Serve containerd, and so Kubernetes and Docker
    #[cfg(feature = "containerd")]
    Snapshotter(snapshotter::Snapshotter),
    /// Show the configuration
    Config(config::Config),
    /// Print shell completions
    Completions(docs::Completions),
    /// Print the manual page
    Man(docs::Man),
    /// Say what can stand where a word is being typed
    #[command(hide = true)]
    Complete(complete::Complete),
    /// Take back what an interrupted command has made
    #[command(hide = true)]
    Undo(interrupt::Undo),
}

/// Processes of this program beside servers. See [`crate::dispatch`].
pub(crate) fn dispatch(verb: &str) -> Option<ExitCode> {
    run::dispatch(verb).or_else(|| changes::dispatch(verb))
}

/// `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BackendChoice {
    /// The first of bind, overlay, fuse that can serve this request here
    Auto,
    /// Kernel bind mount of one layer
    Bind,
    /// Our FUSE server: needs no privilege
    Fuse,
    /// Kernel overlayfs over the layers
    Overlay,
    /// A writable copy
    Copy,
}

impl BackendChoice {
    fn asked(self) -> Option<BackendKind> {
        match self {
            BackendChoice::Auto => None,
            BackendChoice::Bind => Some(BackendKind::Bind),
            BackendChoice::Fuse => Some(BackendKind::Fuse),
            BackendChoice::Overlay => Some(BackendKind::Overlay),
            BackendChoice::Copy => Some(BackendKind::Copy),
        }
    }
}

// `--json`. No doc comment: clap would put it over what the verb says of itself.
#[derive(Clone, Copy, Debug, Args)]
struct Format {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Global {
    /// The state root, absolute.
    fn paths(&self) -> Result<StatePaths> {
        let configured = || Ok::<_, Error>(settings()?.root.value);
        let root = match self.root.clone().map_or_else(configured, |root| Ok(Some(root)))? {
            Some(root) => root,
            None => default_root(|name| std::env::var_os(name), crate::sys::process::is_root_of_host()?)?,
        };
        if root.as_os_str().is_empty() {
            return Err(Error::new(Kind::Usage, "find state root", "", "--root or FSPROV_ROOT is empty"));
        }
        std::path::absolute(&root).map(StatePaths::new).map_err(|e| Error::io("find state root", show(&root), e))
    }

    fn provisioner(&self) -> Result<Provisioner> {
        Ok(Provisioner::new(self.paths()?, crate::host::Host::probe()).with_policy(settings()?.policy()))
    }
}

/// What is logged, in env_logger's words.
fn log_filter(verbose: u8) -> String {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    std::env::var("FSPROV_LOG").unwrap_or_else(|_| format!("fsprov={level}"))
}

fn start_log(filter: &str) {
    let format = |out: &mut env_logger::fmt::Formatter, record: &log::Record<'_>| {
        use std::io::Write as _;
        let (level, target) = (record.level(), record.target());
        let style = out.default_level_style(level);
        // Messages tell names and errors that others wrote.
        let message = record.args().to_string();
        writeln!(out, "[{style}{level:<5}{style:#} {target}] {}", crate::printable::line(&message))
    };
    env_logger::Builder::new().parse_filters(filter).format(format).init();
}

fn settings() -> Result<Settings> {
    crate::config::in_force(|name| std::env::var_os(name))
}

/// The XDG base directory specification: XDG_DATA_HOME, if it is absolute, else ~/.local/share.
fn default_root(env: impl Fn(&str) -> Option<OsString>, is_root: bool) -> Result<PathBuf> {
    if is_root {
        return Ok(PathBuf::from("/var/lib/fsprov"));
    }
    let absolute = |name: &str| env(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let data = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
    data.map(|d| d.join("fsprov")).ok_or_else(|| {
        Error::new(Kind::Usage, "find state root", "", "neither XDG_DATA_HOME nor HOME is an absolute path")
            .hint("give --root DIR or FSPROV_ROOT")
    })
}

/// Parse, run, and say what went wrong: the whole program, except when it runs as a server.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    crate::fault::start();
    crate::sys::process::outlive_file_limit();
    crate::sys::raw::wait_for_children();
    let args = end_options(args.into_iter().collect());
    if args.len() == 1 {
        return match output::text(start::START) {
            Err(error) if !output::is_broken_pipe(&error) => ExitCode::FAILURE,
            _ => ExitCode::SUCCESS,
        };
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            use clap::error::{ContextKind, ContextValue, ErrorKind};
            if error.kind() == ErrorKind::InvalidSubcommand
                && let Some(ContextValue::String(verb)) = error.get(ContextKind::InvalidSubcommand)
                && let Some(hint) = start::hint(verb)
            {
                output::complain(
                    &Error::new(Kind::Usage, "find command", verb, "fsprov has no such command").hint(hint),
                );
                return ExitCode::from(Kind::Usage.exit_code());
            }
            if error.kind() == ErrorKind::UnknownArgument
                && is_about_run(&args)
                && let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg)
                && let Some(hint) = start::hint_of_run(option)
            {
                output::complain(&Error::new(Kind::Usage, "run", option, "fsprov has no such option").hint(hint));
                return ExitCode::from(crate::run::FAILED);
            }
            // Help and version come this way too, with code 0; a closed stdout or stderr is not worth a panic.
            let _ = error.print();
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            // A program's exit codes begin at 0: what is wrong with `run` itself is told apart as podman does.
            return ExitCode::from(if code != 0 && is_about_run(&args) { crate::run::FAILED } else { code });
        }
    };
    // Nothing is logged on a line that is being typed.
    if !matches!(cli.verb, Verb::Complete(_)) {
        start_log(&log_filter(cli.global.verbose));
    }
    // An image may have hundreds of layers, each of them open.
    crate::sys::process::raise_open_files();
    if let Verb::Run(verb) = &cli.verb {
        return ExitCode::from(verb.run(&cli.global).unwrap_or_else(|error| {
            output::complain(&error);
            crate::run::FAILED
        }));
    }
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// Options of `run` end with the image, and those of `bundle` with the directory, as podman's and docker's do: what follows is the
/// program's. clap goes on taking those that it knows until the first word without a dash, so a `--` is put there.
fn end_options(mut args: Vec<OsString>) -> Vec<OsString> {
    use clap::CommandFactory as _;
    // Other verbs need not wait for this.
    if !args.iter().any(|arg| arg == "run" || arg == "bundle") {
        return args;
    }
    let top = Cli::command();
    let (mut verb, mut words_left) = (None::<clap::Command>, 1);
    let mut at = 1;
    while words_left > 0 {
        let Some(arg) = args.get(at).map(|arg| arg.as_encoded_bytes()) else { return args };
        at += 1;
        let takes_value = |is_it: &dyn Fn(&clap::Arg) -> bool| {
            let mut known = verb.iter().chain([&top]).flat_map(clap::Command::get_arguments);
            known.find(|arg| is_it(arg)).is_some_and(|arg| arg.get_action().takes_values())
        };
        match arg {
            b"--" => return args,
            [b'-', b'-', name @ ..] => {
                let named = |arg: &clap::Arg| {
                    arg.get_long_and_visible_aliases().is_some_and(|all| all.iter().any(|one| one.as_bytes() == name))
                };
                at += usize::from(takes_value(&named));
            }
            // Letters in one word: the first that takes a value takes the rest, or the next word.
            [b'-', letters @ ..] if !letters.is_empty() => {
                let takes = |letter: &u8| takes_value(&|arg| arg.get_short() == Some(char::from(*letter)));
                at += usize::from(letters.iter().position(takes).is_some_and(|n| n + 1 == letters.len()));
            }
            name if verb.is_none() => {
                words_left = match name {
                    b"run" => 1,
                    b"bundle" => 2,
                    _ => return args,
                };
                verb = top.find_subcommand(std::str::from_utf8(name).unwrap_or_default()).cloned();
                if let Some(verb) = &mut verb {
                    verb.build();
                }
            }
            _ => words_left -= 1,
        }
    }
    if args.get(at).is_some_and(|next| next != "--") {
        args.insert(at, "--".into());
    }
    args
}

/// Is `run` the command, whatever else is wrong?
fn is_about_run(args: &[OsString]) -> bool {
    use clap::CommandFactory as _;
    let read = Cli::command().ignore_errors(true).try_get_matches_from(args);
    read.is_ok_and(|read| read.subcommand_name() == Some("run"))
}

fn run(cli: &Cli) -> Result<()> {
    let global = &cli.global;
    match &cli.verb {
        Verb::Mount(verb) => verb.run(global),
        Verb::Run(verb) => verb.run(global).map(|_| ()),
        Verb::Bundle(verb) => verb.run(global),
        Verb::Unmount(verb) => verb.run(global),
        Verb::List(verb) => verb.run(global),
        Verb::Inspect(verb) => verb.run(global),
        Verb::Diff(verb) => verb.run(global),
        Verb::Commit(verb) => verb.run(global),
        Verb::Stats(verb) => verb.run(global),
        Verb::Restart(verb) => verb.run(global),
        Verb::Recover(verb) => verb.run(global),
        Verb::Probe(verb) => verb.run(global),
        Verb::Bench(verb) => verb.run(global),
        Verb::Image(verb) => verb.run(global),
        #[cfg(feature = "containerd")]
        Verb::Snapshotter(verb) => verb.run(global),
        Verb::Config(verb) => verb.run(global),
        Verb::Completions(verb) => verb.run(),
        Verb::Man(verb) => verb.run(),
        Verb::Complete(verb) => verb.run(),
        Verb::Undo(verb) => verb.run(global),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_is_the_programs() {
        let ended = |line: &str| {
            let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
            end_options(words(line)).join(std::ffi::OsStr::new(" ")).into_string().unwrap()
        };
        for line in [
            "fsprov run app|--version",
            "fsprov --root r run --root q -e A=1 -itv ./v:/v -w/ --env=B app|-e root",
            "fsprov --verbose run --name x --entrypoint -x --rm -it debian|ls -- -t",
            "fsprov bundle --read-only app dir|-h",
        ] {
            assert_eq!(ended(&line.replace('|', " ")), line.replace('|', " -- "));
        }
        for line in [
            "fsprov run app -- ls -l",
            "fsprov run -- app ls -l",
            "fsprov run -e",
            "fsprov run app",
            "fsprov mount a b --json",
            "fsprov",
        ] {
            assert_eq!(ended(line), line);
        }
    }

    #[test]
    fn a_verbs_help_begins_with_what_the_list_says_of_it() {
        fn check(listed: &clap::Command, built: &clap::Command) {
            for verb in built.get_subcommands().filter(|verb| verb.get_name() != "help" && !verb.is_hide_set()) {
                let Some(before) = listed.find_subcommand(verb.get_name()) else { continue };
                let about = |command: &clap::Command| command.get_about().map(ToString::to_string);
                assert_eq!(about(verb), about(before), "{}", verb.get_name());
                check(before, verb);
            }
        }
        let (listed, mut built) = (Cli::command(), Cli::command());
        built.build();
        check(&listed, &built);
    }

    #[test]
    fn every_verb_has_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if command.get_name() == "help" {
                return;
            }
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{path} --help has no example");
            for sub in command.get_subcommands() {
                check(sub, &path);
            }
        }
        let mut command = Cli::command();
        command.build();
        check(&command, "");
    }

    #[test]
    fn state_root() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v))
        };
        let root = |pairs, is_root| default_root(env(pairs), is_root).map(|p| p.to_str().unwrap().to_owned()).ok();
        assert_eq!(root(&[], true).as_deref(), Some("/var/lib/fsprov"));
        assert_eq!(root(&[("HOME", "/h")], false).as_deref(), Some("/h/.local/share/fsprov"));
        assert_eq!(root(&[("HOME", "/h"), ("XDG_DATA_HOME", "/x")], false).as_deref(), Some("/x/fsprov"));
        assert_eq!(root(&[("HOME", "/h"), ("XDG_DATA_HOME", "x")], false).as_deref(), Some("/h/.local/share/fsprov"));
        assert_eq!(root(&[], false), None);
    }
}
