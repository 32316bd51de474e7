//! `fsprov config`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Format, Global, output};
use crate::config::{EXAMPLE, SetBy};
use crate::error::{Result, show};
use crate::pull::HostConfig;
use crate::store::{Limits, Unsigned};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  fsprov config show\n  fsprov config example > ~/.config/fsprov/config.toml")]
pub(super) struct Config {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print each value in force and where it came from
    Show(Show),
    /// Print a file with every key, and what each means
    Example(Example),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Files, TOML: /etc/fsprov/config.toml, then $XDG_CONFIG_HOME/fsprov/config.toml (~/.config where that is not set), key by key; FSPROV_CONFIG names \
one that is read instead of both (empty: none). `fsprov config example` shows every key; one that is not known is an error.

Example:
  fsprov config show --json")]
struct Show {
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fsprov config example > ~/.config/fsprov/config.toml")]
struct Example {}

impl Config {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        match &self.verb {
            Verb::Show(verb) => verb.run(global),
            Verb::Example(Example {}) => output::text(EXAMPLE),
        }
    }
}

impl Show {
    fn run(&self, global: &Global) -> Result<()> {
        let mut settings = super::settings()?;
        if let Some(root) = &global.root {
            settings.root.value = Some(root.clone());
            settings.root.origin = SetBy::CommandLine;
        }
        if settings.root.value.is_none() {
            settings.root.value = Some(global.paths()?.root().to_owned());
        }
        if self.format.json {
            return output::json(&settings);
        }
        let path = |path: &Option<PathBuf>| path.as_deref().map(show).unwrap_or_default();
        let stores: Vec<String> = settings.mesos_stores.value.iter().map(show).collect();
        let mut rows = vec![
            row("root", path(&settings.root.value), &settings.root.origin),
            row("backend", settings.backend.value.clone(), &settings.backend.origin),
            row("volumes", settings.volumes.value.join(" "), &settings.volumes.origin),
            row("keyring", path(&settings.keyring.value), &settings.keyring.origin),
            row(
                "unsigned",
                if settings.unsigned.value == Unsigned::Refuse { "refuse" } else { "allow" }.to_owned(),
                &settings.unsigned.origin,
            ),
            row("auth_file", path(&settings.auth_file.value), &settings.auth_file.origin),
            row("mesos_stores", stores.join(" "), &settings.mesos_stores.origin),
            row("discovery_prefixes", settings.discovery_prefixes.value.join(" "), &settings.discovery_prefixes.origin),
            row(
                "parallel_downloads",
                settings.parallel_downloads.value.to_string(),
                &settings.parallel_downloads.origin,
            ),
        ];
        for name in Limits::NAMES {
            let (value, origin) = match settings.limits.get(*name) {
                Some(setting) => (setting.value, &setting.origin),
                None => (Limits::default().get(name).unwrap_or_default(), &SetBy::Default),
            };
            rows.push(row(&format!("limits.{name}"), value.to_string(), origin));
        }
        for (host, setting) in &settings.registry {
            let HostConfig { insecure, mirror, ca, auth } = &setting.value;
            let mut said: Vec<String> = insecure.then(|| "insecure".to_owned()).into_iter().collect();
            said.extend(mirror.iter().map(|mirror| format!("mirror {mirror}")));
            said.extend(auth.iter().map(|auth| format!("auth {auth}")));
            said.extend(ca.iter().map(|ca| format!("ca {}", show(ca))));
            rows.push(row(&format!("registry.\"{host}\""), said.join(", "), &setting.origin));
        }
        output::table(["KEY", "VALUE", "FROM"], &rows)
    }
}

fn row(key: &str, value: String, origin: &SetBy) -> [String; 3] {
    [key.to_owned(), value, origin.to_string()]
}
