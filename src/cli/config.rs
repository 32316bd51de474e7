//! `fsprov config`.

use clap::{Args, Subcommand};

use super::{Format, Global, output};
use crate::config::Origin;
use crate::error::{Result, show};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fsprov config show")]
pub(super) struct Config {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print each value in force and where it came from
    Show(Show),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Files, TOML: /etc/fsprov/config.toml, then $XDG_CONFIG_HOME/fsprov/config.toml (~/.config where that is not set), key by key; FSPROV_CONFIG names \
one that is read instead of both (empty: none). Keys: root, backend, volumes.

Example:
  fsprov config show --json")]
struct Show {
    #[command(flatten)]
    format: Format,
}

impl Config {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let Verb::Show(Show { format }) = &self.verb;
        let mut settings = super::settings()?;
        if let Some(root) = &global.root {
            settings.root.value = Some(root.clone());
            settings.root.origin = Origin::CommandLine;
        }
        if settings.root.value.is_none() {
            settings.root.value = Some(global.paths()?.root().to_owned());
        }
        if format.json {
            return output::json(&settings);
        }
        let root = settings.root.value.as_deref().map(show).unwrap_or_default();
        let rows = [
            ["root".to_owned(), root, settings.root.origin.to_string()],
            ["backend".to_owned(), settings.backend.value, settings.backend.origin.to_string()],
            ["volumes".to_owned(), settings.volumes.value.join(" "), settings.volumes.origin.to_string()],
        ];
        output::table(["KEY", "VALUE", "FROM"], &rows)
    }
}
