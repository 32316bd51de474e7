//! What a shell completes: a real one on a terminal, which is typed to.

#![cfg(feature = "cli")]
#![allow(clippy::pedantic, reason = "tests read better with plain loops and format!; every other lint holds")]

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_fsprov");
/// Longest wait for a shell to answer; it takes some milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// `fsprov` with the state root of `dir`, in `dir`.
fn fsprov(dir: &Path, args: &[&str]) -> Output {
    let said = Command::new(PROGRAM).args(args).current_dir(dir).env("FSPROV_ROOT", dir.join("state")).output();
    said.expect("run fsprov")
}

#[track_caller]
fn done(dir: &Path, args: &[&str]) -> String {
    let said = fsprov(dir, args);
    assert!(said.status.success(), "fsprov {args:?}: {}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).into_owned()
}

/// An image of two names and a copied rootfs of it, `web-1`, which anybody may make.
fn stage() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir_all(dir.path().join("tree/etc")).expect("make the tree");
    std::fs::write(dir.path().join("tree/etc/hostname"), "box").expect("write");
    std::fs::write(dir.path().join("my image.tar"), "").expect("write");
    done(dir.path(), &["image", "import", "tree", "--name", "example.com/other"]);
    done(dir.path(), &["image", "tag", "example.com/other", "example.com/box:1.0"]);
    done(dir.path(), &["mount", "--backend", "copy", "--id", "web-1", "example.com/box:1.0", "rootfs"]);
    dir
}

/// What is offered for the last of these words.
fn offered(dir: &Path, words: &[&str]) -> Vec<String> {
    let last = (words.len() - 1).to_string();
    let text = done(dir, &[&["complete", "bash", &last, "--"], words].concat());
    text.lines().map(str::to_owned).collect()
}

#[test]
fn images_rootfses_and_files_are_offered() {
    let stage = stage();
    let dir = stage.path();
    let has = |words: &[&str], wanted: &[&str]| assert_eq!(offered(dir, words), wanted, "{words:?}");
    has(&["fsprov", "unmount", ""], &["web-1", "rootfs"]);
    has(&["fsprov", "inspect", "w"], &["web-1"]);
    let rootfs = dir.canonicalize().expect("a path").join("rootfs").display().to_string();
    has(&["fsprov", "stats", &rootfs[..rootfs.len() - 2]], &[&rootfs]);
    has(&["fsprov", "recover", "--keep", ""], &["web-1"]);
    has(&["fsprov", "mount", ""], &["example.com/box:1.0", "example.com/other"]);
    has(&["fsprov", "image", "rm", "example.com/b"], &["example.com/box:1.0"]);
    let ids = done(dir, &["image", "list", "-q"]);
    let id = ids.lines().next().expect("an id");
    let short = offered(dir, &["fsprov", "image", "show", &id[..6]]).concat();
    assert!(id.starts_with(&short) && short.len() > 6, "{short:?} of {id}");
    has(&["fsprov", "mount", "./my"], &["./my\\ image.tar"]);
    has(&["fsprov", "mount", "-v", "./tr"], &["./tree/"]);
    has(&["fsprov", "image", "import", "\"my im"], &["my\\ image.tar"]);
    has(&["fsprov", "mount", "--back"], &["--backend"]);
    has(&["fsprov", "mount", "--backend", "ov"], &["overlay"]);
    has(&["fsprov", "unm"], &["unmount"]);
    // Of another state root: nothing, and it is not made.
    has(&["fsprov", "--root", "none", "image", "rm", "e"], &[]);
    assert!(!dir.join("none").exists());
    // For the other shells with what it is.
    let told = done(dir, &["complete", "fish", "2", "--", "fsprov", "unmount", "web"]);
    assert_eq!(told, format!("web-1\t{rootfs}\n"));
}

/// A shell on a terminal.
struct Typed {
    child: std::process::Child,
    shown: Arc<Mutex<String>>,
}

impl Typed {
    fn new(dir: &Path, shell: &str) -> Self {
        let bin = Path::new(PROGRAM).parent().expect("a directory");
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let mut child = Command::new("script")
            .args(["--quiet", "--flush", "--return", "--command", shell, "/dev/null"])
            .current_dir(dir)
            .env("PATH", path)
            .env("FSPROV_ROOT", dir.join("state"))
            .env("HOME", dir)
            .env("TERM", "dumb")
            .env_remove("ZDOTDIR")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run script(1)");
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut from, to) = (child.stdout.take().expect("a pipe"), Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                to.lock().expect("no panic").push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Typed { child, shown }
    }

    /// Type these keys, and wait until the terminal shows `wanted`.
    #[track_caller]
    fn keys(&mut self, keys: &str, wanted: &str) {
        let from = self.shown.lock().expect("no panic").len();
        self.child.stdin.as_mut().expect("a pipe").write_all(keys.as_bytes()).expect("type");
        let started = Instant::now();
        while !self.shown.lock().expect("no panic")[from..].contains(wanted) {
            let shown = self.shown.lock().expect("no panic");
            assert!(started.elapsed() < PATIENCE, "{keys:?} did not show {wanted:?}:\n{shown}");
            drop(shown);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Typed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Types what the three shells complete alike. `fsprov` itself is a function there that says what it was given.
fn type_to(shell: &mut Typed) {
    for (keys, given) in [
        ("fsprov unmou\tw\t\n", "<unmount><web-1>"),
        ("fsprov mount example.com/box:1\tr\t\n", "<mount><example.com/box:1.0><rootfs/>"),
        ("fsprov image import my\t\n", "<image><import><my image.tar>"),
        ("fsprov mount ./tr\tet\t\n", "<mount><./tree/etc/>"),
    ] {
        shell.keys(keys, given);
    }
}

#[test]
fn bash_completes() {
    let stage = stage();
    let start = "PS1='ready> '; unset HISTFILE; bind 'set bell-style none'; bind 'set enable-bracketed-paste off'\n\
                 source <(fsprov completions bash); fsprov() { printf '<%s>' \"$@\"; echo; }\n";
    std::fs::write(stage.path().join(".bashrc"), start).expect("write");
    let mut bash = Typed::new(stage.path(), "bash --noprofile -i");
    bash.keys("", "ready> ");
    type_to(&mut bash);
    // Of several, what they share; then all of them.
    bash.keys("fsprov image show exa\t\t\t", "example.com/other");
    bash.keys("o\t\n", "<image><show><example.com/other>");
    bash.keys("fsprov unmount \t\t", "web-1");
}

/// zsh and fish where they are; scripts/setup installs them for CI.
fn is_here(shell: &str) -> bool {
    let here = Command::new(shell).arg("-c").arg("true").status().is_ok_and(|status| status.success());
    assert!(here || std::env::var_os("FSPROV_TEST_MUST_RUN").is_none(), "FSPROV_TEST_MUST_RUN: needs {shell}");
    here
}

#[test]
fn zsh_completes() {
    if !is_here("zsh") {
        return;
    }
    let stage = stage();
    let functions = stage.path().join("functions");
    std::fs::create_dir(&functions).expect("make");
    std::fs::write(functions.join("_fsprov"), done(stage.path(), &["completions", "zsh"])).expect("write");
    let start = "PS1='ready> '; unsetopt beep zle_bracketed_paste; unset zle_bracketed_paste\n\
                 fpath=($HOME/functions $fpath); autoload -Uz compinit; compinit -D -u\n\
                 fsprov() { printf '<%s>' \"$@\"; echo; }\n";
    std::fs::write(stage.path().join(".zshrc"), start).expect("write");
    let mut zsh = Typed::new(stage.path(), "zsh --no-globalrcs -i");
    zsh.keys("", "ready> ");
    type_to(&mut zsh);
}

#[test]
fn fish_completes() {
    if !is_here("fish") {
        return;
    }
    let stage = stage();
    let config = stage.path().join(".config/fish");
    std::fs::create_dir_all(config.join("completions")).expect("make");
    std::fs::write(config.join("completions/fsprov.fish"), done(stage.path(), &["completions", "fish"]))
        .expect("write");
    let run = |line: &str| {
        let said = Command::new("fish")
            .args(["-c", &format!("complete --do-complete '{line}'")])
            .current_dir(stage.path())
            .env("HOME", stage.path())
            .env("XDG_CONFIG_HOME", stage.path().join(".config"))
            .env("FSPROV_ROOT", stage.path().join("state"))
            .env("PATH", format!("{}:{}", Path::new(PROGRAM).parent().expect("a directory").display(), env!("PATH")))
            .output()
            .expect("run fish");
        String::from_utf8_lossy(&said.stdout).into_owned()
    };
    assert!(run("fsprov unmount w").starts_with("web-1\t"), "{}", run("fsprov unmount w"));
    assert!(run("fsprov mount example.com/box:").starts_with("example.com/box:1.0\t"));
    assert!(run("fsprov image import my").starts_with("my"), "{}", run("fsprov image import my"));
}
