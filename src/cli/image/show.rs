//! `fsprov image show`.

use std::ffi::OsString;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use serde::Serialize;
use serde_json::Value;

use super::super::{Format, output};
use crate::cli::complete;
use crate::error::Result;
use crate::id::ImageRef;
use crate::store::{Meta, OnDisk, Store};

/// Longest step of a history that is shown: what made a layer may be a whole script.
const MAX_STEP_CHARS: usize = 100;

#[derive(Debug, Args)]
#[command(after_help = "\
Shows what the image says about running it (command, environment, user, ...), which fsprov does not do, and how its layers were made. \
--json also has the manifest and, of an OCI image, the configuration as they came.

Example:
  fsprov image show debian")]
pub(super) struct Show {
    /// Its name, its id, or the beginning of its id
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: OsString,
    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    meta: &'a Meta,
    /// As it came; a string where it is not JSON.
    manifest: Value,
    /// As it came (OCI).
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<Value>,
}

impl Show {
    pub(super) fn run(&self, store: &Store) -> Result<()> {
        let (meta, manifest) = store.show(&ImageRef::parse(&self.image)?)?;
        let (manifest, config) = (as_json(&manifest), store.config(&meta)?.as_deref().map(as_json));
        if self.format.json {
            return output::json(&Report { meta: &meta, manifest, config });
        }
        let mut rows = known(&meta);
        rows.extend(match &config {
            Some(config) => of_oci(config),
            None => of_appc(&manifest["app"]),
        });
        let pretty = serde_json::to_string_pretty(&manifest).unwrap_or_default();
        output::text(&format!("{}manifest\n{}\n", output::fields(rows), crate::printable::json(&pretty)))
    }
}

fn as_json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(bytes).into_owned()))
}

type Row = (&'static str, String);

/// What the store knows.
fn known(meta: &Meta) -> Vec<Row> {
    let exact = match meta.on_disk {
        OnDisk::Exact => "exact",
        OnDisk::IndexOnly => "some owners, modes or devices in the index alone",
    };
    let mut rows = vec![
        ("id", meta.id.to_string()),
        ("names", meta.names.join(" ")),
        ("labels", meta.labels.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(" ")),
        ("source", meta.source.clone()),
        ("signed by", meta.signed_by.as_ref().map_or("-".to_owned(), ToString::to_string)),
        ("imported", output::date(meta.imported_at)),
        ("entries", meta.entries.to_string()),
        ("size", output::size(meta.bytes)),
        ("tree on disk", exact.to_owned()),
    ];
    rows.extend(
        meta.before
            .iter()
            .map(|one| ("before", format!("{} was {} until {}", one.name, one.image, output::date(one.until)))),
    );
    rows
}

/// The words of a list, or a text by itself.
fn words(value: &Value) -> Option<String> {
    match value {
        Value::Array(all) => {
            let word = |word: &Value| word.as_str().map_or_else(|| word.to_string(), quoted);
            Some(all.iter().map(word).collect::<Vec<_>>().join(" ")).filter(|text| !text.is_empty())
        }
        Value::String(text) => Some(text.clone()).filter(|text| !text.is_empty()),
        _ => None,
    }
}

fn quoted(word: &str) -> String {
    let is_plain = !word.is_empty() && !word.contains(|c: char| c.is_whitespace() || "'\"\\$`".contains(c));
    if is_plain { word.to_owned() } else { format!("{word:?}") }
}

/// The image-spec's config.
fn of_oci(config: &Value) -> Vec<Row> {
    let run = &config["config"];
    let mut rows: Vec<Row> =
        [("entry point", "Entrypoint"), ("command", "Cmd"), ("user", "User"), ("working dir", "WorkingDir")]
            .into_iter()
            .filter_map(|(name, key)| Some((name, words(&run[key])?)))
            .collect();
    let variables = run["Env"].as_array().into_iter().flatten();
    rows.extend(variables.filter_map(|one| Some(("environment", one.as_str()?.to_owned()))));
    for step in config["history"].as_array().into_iter().flatten() {
        let made_by = step["created_by"].as_str().or(step["comment"].as_str()).unwrap_or("-");
        let made_by = made_by.split_whitespace().collect::<Vec<_>>().join(" ");
        let cut = made_by.char_indices().nth(MAX_STEP_CHARS).map(|(at, _)| at);
        let made_by = cut.map_or_else(|| made_by.clone(), |at| format!("{}...", &made_by[..at]));
        let day = step["created"].as_str().and_then(|time| time.get(..10)).unwrap_or("-");
        let empty = if step["empty_layer"].as_bool() == Some(true) { " (no layer)" } else { "" };
        rows.push(("history", format!("{day} {made_by}{empty}")));
    }
    rows
}

/// The `app` of an AppC manifest.
fn of_appc(app: &Value) -> Vec<Row> {
    let mut rows: Vec<Row> =
        [("command", "exec"), ("user", "user"), ("group", "group"), ("working dir", "workingDirectory")]
            .into_iter()
            .filter_map(|(name, key)| Some((name, words(&app[key])?)))
            .collect();
    for one in app["environment"].as_array().into_iter().flatten() {
        if let (Some(name), Some(value)) = (one["name"].as_str(), one["value"].as_str()) {
            rows.push(("environment", format!("{name}={value}")));
        }
    }
    rows
}
