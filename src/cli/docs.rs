//! `fsprov completions` and `fsprov man`: made from the definition of the command line.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, output};
use crate::error::{Error, Kind, Result};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fsprov completions bash > ~/.local/share/bash-completion/completions/fsprov")]
pub(super) struct Completions {
    /// For which shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(&self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "fsprov", &mut script);
        output::text(&String::from_utf8_lossy(&script))
    }
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  fsprov man > fsprov.1\n  fsprov man mount | man -l -\n  fsprov man image import")]
pub(super) struct Man {
    /// The verb whose page to print [default: fsprov itself]
    verb: Vec<String>,
}

impl Man {
    pub(super) fn run(&self) -> Result<()> {
        let mut root = Cli::command();
        root.build();
        let mut command = &root;
        for name in &self.verb {
            command = command.find_subcommand(name).ok_or_else(|| {
                Error::new(Kind::Usage, "find verb", self.verb.join(" "), "fsprov has no such command")
                    .hint("`fsprov --help` lists them")
            })?;
        }
        let mut page = Vec::new();
        clap_mangen::Man::new(command.clone())
            .render(&mut page)
            .map_err(|e| Error::io("write manual page", self.verb.join(" "), e))?;
        output::text(&String::from_utf8_lossy(&page))
    }
}
