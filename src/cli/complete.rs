//! What can stand where a word is being typed: the shell asks this program, so that completions know images, rootfses and files.
//!
//! The scripts of `fsprov completions` call the hidden verb here with the words of the line. Nothing is made, changed or logged.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::{Args, CommandFactory as _, ValueEnum};
use clap_complete::engine::{CompletionCandidate, PathCompleter, ValueCompleter as _};

use super::{Cli, Global};
use crate::error::{Error, Result};
use crate::paths::StatePaths;
use crate::provisioner;
use crate::store::Store;

/// A shell whose words are asked for here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Asking {
    Bash,
    Zsh,
    Fish,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  fsprov complete bash 2 -- fsprov unmount web")]
pub(super) struct Complete {
    /// The shell that asks
    shell: Asking,
    /// Which word is being typed, counted from 0
    word: usize,
    /// The words of the line
    #[arg(last = true)]
    words: Vec<OsString>,
}

/// The script for a shell that asks here. Others know only the words of the definition.
pub(super) fn script(shell: clap_complete::Shell) -> Option<&'static str> {
    match shell {
        clap_complete::Shell::Bash => Some(include_str!("complete/fsprov.bash")),
        clap_complete::Shell::Zsh => Some(include_str!("complete/fsprov.zsh")),
        clap_complete::Shell::Fish => Some(include_str!("complete/fsprov.fish")),
        _ => None,
    }
}

/// What the line says after `--root`.
static ROOT: OnceLock<PathBuf> = OnceLock::new();

impl Complete {
    pub(super) fn run(&self) -> Result<()> {
        let mut words: Vec<OsString> = self.words.clone();
        words.resize_with(self.word + 1, OsString::new);
        if self.shell == Asking::Bash {
            words = words.into_iter().map(|word| unquoted(&word)).collect();
        }
        if let Some(root) = root_of(&words[..self.word]) {
            let _ = ROOT.set(root);
        }
        let here = std::env::current_dir().ok();
        let typed = words[self.word].clone();
        let found = clap_complete::engine::complete(&mut Cli::command(), words, self.word, here.as_deref());
        let mut found = found.map_err(|e| Error::io("complete", "", e))?;
        // Who has begun no option wants a name.
        if !typed.as_bytes().starts_with(b"-") && found.iter().any(|one| !is_option(one)) {
            found.retain(|one| !is_option(one));
        }
        let mut out = Vec::new();
        for one in &found {
            let value = one.get_value().as_bytes();
            // A line has one.
            if value.contains(&b'\n') {
                continue;
            }
            match self.shell {
                Asking::Bash => out.extend_from_slice(&quoted(value)),
                Asking::Zsh | Asking::Fish => {
                    let help = one.get_help().map(ToString::to_string).unwrap_or_default();
                    out.extend_from_slice(value);
                    out.push(b'\t');
                    out.extend_from_slice(help.lines().next().unwrap_or_default().as_bytes());
                }
            }
            out.push(b'\n');
        }
        std::io::stdout().write_all(&out).map_err(|e| Error::io("write", "standard output", e))
    }
}

fn is_option(one: &CompletionCandidate) -> bool {
    one.get_value().as_bytes().starts_with(b"-")
}

/// `--root DIR` or `--root=DIR`, wherever it stands.
fn root_of(words: &[OsString]) -> Option<PathBuf> {
    let after = words.iter().position(|word| word == "--root").and_then(|at| words.get(at + 1));
    let joined = words.iter().find_map(|word| word.as_bytes().strip_prefix(b"--root="));
    joined.map(|dir| OsStr::from_bytes(dir).into()).or(after.map(PathBuf::from))
}

/// A word as bash would pass it on: without backslashes and quotes.
fn unquoted(word: &OsStr) -> OsString {
    let (mut out, mut quote, mut bytes) = (Vec::new(), None, word.as_bytes().iter());
    while let Some(&byte) = bytes.next() {
        match (byte, quote) {
            (b'\\', None | Some(b'"')) => out.extend(bytes.next()),
            (b'"' | b'\'', None) => quote = Some(byte),
            (_, Some(open)) if byte == open => quote = None,
            _ => out.push(byte),
        }
    }
    OsString::from_vec(out)
}

/// A word as it is typed in bash. A leading `~` stays what it is.
fn quoted(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    for (at, &byte) in word.iter().enumerate() {
        let is_plain = byte.is_ascii_alphanumeric() || b"/._-+:=,@%".contains(&byte) || byte >= 0x80;
        let is_home = at == 0 && byte == b'~';
        if !is_plain && !is_home {
            out.push(b'\\');
        }
        out.push(byte);
    }
    out
}

fn state() -> Option<StatePaths> {
    let root = ROOT.get().cloned().or_else(|| std::env::var_os("FSPROV_ROOT").map(PathBuf::from));
    Global { root, verbose: 0 }.paths().ok()
}

fn begins(value: &str, typed: &OsStr) -> bool {
    value.as_bytes().starts_with(typed.as_bytes())
}

/// Does it begin as a path does?
fn is_path(typed: &OsStr) -> bool {
    matches!(typed.as_bytes().first(), Some(b'.' | b'/' | b'~'))
}

/// The names of the images of the store; and their ids, for who begins one.
pub(super) fn images(typed: &OsStr) -> Vec<CompletionCandidate> {
    // A store that is not there is not made.
    let Some(paths) = state().filter(|paths| paths.images().is_dir()) else { return Vec::new() };
    let all = Store::open(&paths).and_then(|store| store.list()).unwrap_or_default();
    let mut names: Vec<CompletionCandidate> = Vec::new();
    for image in &all {
        for name in image.names.iter().filter(|name| begins(name, typed)) {
            names.push(CompletionCandidate::new(name).help(Some(image.id.short().to_owned().into())));
        }
    }
    names.sort();
    if names.is_empty() && !typed.is_empty() {
        for image in &all {
            let short = image.id.short();
            let digits = short.split_once('-').map_or(short, |(_, digits)| digits);
            let called = image.names.first().cloned().unwrap_or_default();
            let shown = [short, digits].into_iter().find(|id| begins(id, typed));
            names.extend(shown.map(|id| CompletionCandidate::new(id).help(Some(called.into()))));
        }
    }
    names
}

/// An image of the store, or a file or directory.
pub(super) fn images_and_paths(typed: &OsStr) -> Vec<CompletionCandidate> {
    if is_path(typed) { PathCompleter::any().complete(typed) } else { images(typed) }
}

/// The rootfses: their ids, and where they are.
pub(super) fn rootfses(typed: &OsStr) -> Vec<CompletionCandidate> {
    let mut found = Vec::new();
    let here = std::env::current_dir().ok();
    for (id, rootfs) in state().map(|paths| provisioner::mount_points(&paths)).unwrap_or_default() {
        let at = rootfs.display().to_string();
        if begins(id.as_str(), typed) {
            found.push(CompletionCandidate::new(id.as_str()).help(Some(at.into())));
        }
        let near =
            here.as_deref().and_then(|here| rootfs.strip_prefix(here).ok()).filter(|near| *near != Path::new(""));
        let near = near.filter(|_| !typed.as_bytes().starts_with(b"/")).unwrap_or(&rootfs);
        if near.as_os_str().as_bytes().starts_with(typed.as_bytes()) && near.as_os_str() != id.as_str() {
            found.push(CompletionCandidate::new(near).help(Some(id.to_string().into())));
        }
    }
    found
}

/// The ids of the rootfses.
pub(super) fn ids(typed: &OsStr) -> Vec<CompletionCandidate> {
    let all = state().map(|paths| provisioner::mount_points(&paths)).unwrap_or_default();
    let fits = all.into_iter().filter(|(id, _)| begins(id.as_str(), typed));
    fits.map(|(id, at)| CompletionCandidate::new(id.as_str()).help(Some(at.display().to_string().into()))).collect()
}

/// The source of a volume; what comes after its colon lies in the image.
pub(super) fn volumes(typed: &OsStr) -> Vec<CompletionCandidate> {
    if typed.as_bytes().contains(&b':') { Vec::new() } else { PathCompleter::any().complete(typed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_unquoted_and_quoted_as_in_bash() {
        for (typed, word) in [("a\\ b", "a b"), ("\"a b", "a b"), ("'a\\b'c", "a\\bc"), ("debian:12", "debian:12")] {
            assert_eq!(unquoted(typed.as_ref()), word, "{typed}");
        }
        for (word, typed) in [("a b", "a\\ b"), ("~/a$b", "~/a\\$b"), ("debian:12", "debian:12"), ("ü/x", "ü/x")] {
            assert_eq!(String::from_utf8(quoted(word.as_bytes())).unwrap(), typed);
        }
    }

    #[test]
    fn the_root_that_the_line_names_is_found() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(root_of(&words("fsprov --root /r unmount")), Some("/r".into()));
        assert_eq!(root_of(&words("fsprov unmount --root=/q")), Some("/q".into()));
        assert_eq!(root_of(&words("fsprov unmount")), None);
    }
}
