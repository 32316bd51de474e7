//! `fsprov completions` and `fsprov man`: made from the definition of the command line.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, complete, output};
use crate::error::{Error, Kind, Result, show};

#[derive(Debug, Args)]
#[command(after_help = "\
bash, zsh and fish ask fsprov for names of images and rootfses as you type. `scripts/install` puts all three where the shells look.

Examples:
  source <(fsprov completions bash)
  fsprov completions bash > ~/.local/share/bash-completion/completions/fsprov
  fsprov completions zsh > ~/.local/share/zsh/site-functions/_fsprov
  fsprov completions fish > ~/.config/fish/completions/fsprov.fish")]
pub(super) struct Completions {
    /// For which shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(&self) -> Result<()> {
        if let Some(script) = complete::script(self.shell) {
            return output::text(script);
        }
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "fsprov", &mut script);
        output::text(&String::from_utf8_lossy(&script))
    }
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fsprov man > fsprov.1\n  fsprov man mount | man -l -\n  fsprov man --to ~/.local/share/man/man1"
)]
pub(super) struct Man {
    /// The verb whose page to print [default: fsprov itself]
    verb: Vec<String>,
    /// Write the pages of all verbs to this directory
    #[arg(long, value_name = "DIR", conflicts_with = "verb")]
    to: Option<PathBuf>,
}

/// What every page tells: the same for all verbs.
const EXIT_STATUS: &[(&str, &str)] = &[
    ("0", "Done."),
    ("1", "It failed."),
    ("2", "The command is wrong: an argument, a volume, the configuration."),
    ("3", "Something named does not exist."),
    ("4", "Something is in use."),
    ("5", "This host, or this user, cannot do it."),
    ("130", "It was interrupted, and what it had made was taken back."),
];
const ENVIRONMENT: &[(&str, &str)] = &[
    ("FSPROV_ROOT", "Where images and records are kept, as --root."),
    ("FSPROV_CONFIG", "A configuration file that is read instead of all others; empty: no file is read."),
    ("FSPROV_LOG", "What is logged, as env_logger has it: fsprov=debug."),
    ("XDG_DATA_HOME, XDG_CONFIG_HOME", "Where an ordinary user's images and configuration are, below fsprov/."),
];
const FILES: &[(&str, &str)] = &[
    (
        "/etc/fsprov/config.toml, ~/.config/fsprov/config.toml",
        "The configuration; `fsprov config example` shows every key.",
    ),
    ("/var/lib/fsprov, ~/.local/share/fsprov", "Images and records, of root and of an ordinary user."),
    ("/etc/subuid, /etc/subgid", "Subordinate ids, which an ordinary user's rootfs shows the image's owners as."),
    ("/etc/fuse.conf", "user_allow_other lets other users enter a rootfs that an ordinary user mounted."),
];

impl Man {
    pub(super) fn run(&self) -> Result<()> {
        let mut root = Cli::command();
        root.build();
        if let Some(dir) = &self.to {
            return write_pages(&root, dir, "fsprov");
        }
        let mut command = &root;
        for name in &self.verb {
            command = command.find_subcommand(name).ok_or_else(|| {
                Error::new(Kind::Usage, "find verb", self.verb.join(" "), "fsprov has no such command")
                    .hint("`fsprov --help` lists them")
            })?;
        }
        let mut page = Vec::new();
        render(command, &mut page).map_err(|e| Error::io("write manual page", self.verb.join(" "), e))?;
        output::text(&String::from_utf8_lossy(&page))
    }
}

/// The page of `command`, called `name`, and those of its verbs.
fn write_pages(command: &Command, dir: &Path, name: &str) -> Result<()> {
    let path = dir.join(format!("{name}.1"));
    let mut page = Vec::new();
    render(command, &mut page)
        .and_then(|()| std::fs::write(&path, &page))
        .map_err(|e| Error::io("write manual page", show(&path), e))?;
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help");
    verbs.into_iter().try_for_each(|verb| write_pages(verb, dir, &format!("{name}-{}", verb.get_name())))
}

/// One page: what the definition says, its examples as they are written, and what holds for all verbs.
fn render(command: &Command, page: &mut Vec<u8>) -> std::io::Result<()> {
    let man = clap_mangen::Man::new(command.clone());
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let at = ["Examples:\n", "Example:\n"].iter().find_map(|word| Some((after.find(word)?, word.len())));
    let (text, examples) = at.map_or((&after[..], ""), |(at, skip)| (&after[..at], &after[at + skip..]));
    for paragraph in text.split("\n\n").filter(|p| !p.trim().is_empty()) {
        writeln!(page, ".PP\n{}", escaped(&paragraph.replace('\n', " ")))?;
    }
    man.render_options_section(page)?;
    if command.get_subcommands().any(|verb| !verb.is_hide_set()) {
        man.render_subcommands_section(page)?;
    }
    // What follows the lines of the examples, as the exit codes of the first page, is told below.
    let examples: Vec<_> = examples.lines().map_while(|line| line.strip_prefix("  ")).collect();
    if !examples.is_empty() {
        writeln!(page, ".SH EXAMPLES\n.nf")?;
        for line in examples {
            writeln!(page, "{}", escaped(line))?;
        }
        writeln!(page, ".fi")?;
    }
    for (heading, rows) in [("EXIT STATUS", EXIT_STATUS), ("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)] {
        writeln!(page, ".SH {heading}")?;
        for (name, what) in rows {
            writeln!(page, ".TP\n{}\n{}", escaped(name), escaped(what))?;
        }
    }
    Ok(())
}

/// A line as roff takes it: no backslash, hyphen, dot or quote of it means anything (groff_char(7)).
fn escaped(line: &str) -> String {
    let text = line.replace('\\', "\\e").replace('-', "\\-").replace('`', "\\(ga");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}
