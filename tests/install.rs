//! `scripts/install` puts everything where it belongs, and takes it away again.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Every file below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

fn install(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new("bash");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/install")).args(args);
    command.args(["--binary", env!("CARGO_BIN_EXE_fsprov")]);
    command.env("DESTDIR", dir).env("HOME", "/home/u").env_remove("PREFIX").env_remove("XDG_CONFIG_HOME");
    let said = command.output().expect("run scripts/install");
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).into_owned()
}

#[test]
fn what_is_installed_is_there_and_goes_again() {
    for (whose, prefix, unit) in [
        ("--system", "usr/local", "usr/local/lib/systemd/system/fsprov@.service"),
        ("--user", "home/u/.local", "home/u/.config/systemd/user/fsprov@.service"),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        install(dir.path(), &[whose]);
        let read = |name: &str| {
            let path = dir.path().join(name);
            std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{whose}: {}: {e}", path.display()))
        };
        assert!(dir.path().join(prefix).join("bin/fsprov").exists());
        assert!(read(unit).contains(&format!("ExecStart=/{prefix}/bin/fsprov mount --foreground")), "{whose}");
        for name in [
            "bash-completion/completions/fsprov",
            "zsh/site-functions/_fsprov",
            "fish/vendor_completions.d/fsprov.fish",
            "doc/fsprov/config.toml",
        ] {
            assert!(read(&format!("{prefix}/share/{name}")).len() > 100, "{whose} {name}");
        }
        for (page, words) in [
            ("fsprov", &["EXIT STATUS", "ENVIRONMENT", "FILES", "FSPROV_CONFIG"][..]),
            ("fsprov-mount", &["EXIT STATUS", "EXAMPLES"]),
            ("fsprov-image-import", &["EXAMPLES"]),
        ] {
            let text = read(&format!("{prefix}/share/man/man1/{page}.1"));
            for word in words {
                assert!(text.contains(word), "{whose} {page}.1 does not say {word}:\n{text}");
            }
        }
        // Again over the first, then away.
        install(dir.path(), &[whose]);
        install(dir.path(), &[whose, "--uninstall"]);
        assert_eq!(files(dir.path()), [] as [PathBuf; 0], "{whose}");
    }
}

/// As `man` shows them: an example is a line of its own.
#[test]
fn manual_pages_keep_examples_as_they_are_written() {
    let page = Command::new(env!("CARGO_BIN_EXE_fsprov")).args(["man", "mount"]).output().expect("run fsprov");
    let text = String::from_utf8_lossy(&page.stdout).into_owned();
    let (_, examples) = text.split_once(".SH EXAMPLES").expect("a section");
    assert!(examples.contains(".nf") && examples.contains("\nfsprov mount debian /mnt/debian\n"), "{examples}");
    assert!(!text.contains("fsprov\\-undo"), "hidden commands are not told");
}
