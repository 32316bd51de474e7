//! What somebody reads who made a mistake: what failed, why, and what to do about it. One table: a command, its exit code, and
//! those three.
//!
//! `cargo test --test cli_errors`; no privilege needed, nothing is mounted.

use std::path::Path;
use std::process::Command;

/// What the commands find in their directory: a tree, a root filesystem as a tar, a file that is no archive, a directory with something
/// in it, a sandbox with a symlink out of it; and in the store the images `base` and `tree`.
fn prepare(dir: &Path) {
    let make = |name: &str| std::fs::create_dir_all(dir.join(name)).expect("make a directory");
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).expect("write a file");
    ["tree/etc", "full", "sandbox", "home"].into_iter().for_each(make);
    let files = [
        ("tree/etc/f", "file"),
        ("text", "x"),
        ("full/x", "x"),
        ("bad.toml", "rot = 1\n"),
        ("zfs.toml", "backend = \"zfs\"\n"),
    ];
    for (name, text) in files {
        write(name, text);
    }
    std::os::unix::fs::symlink("/etc", dir.join("sandbox/out")).expect("symlink");
    std::os::unix::fs::symlink("nowhere", dir.join("dangling")).expect("symlink");
    let tar = Command::new("tar").args(["-C", "tree", "-cf", "bare.tar", "."]).current_dir(dir).status();
    assert!(tar.expect("run tar").success());
    write("tree/etc/g", "so that the two images differ");
    for (path, name) in [("bare.tar", "base"), ("tree", "tree")] {
        let (code, said) = run(dir, &format!("image import {path} --name {name}"));
        assert_eq!(code, 0, "{said}");
    }
}

/// Run it, words split at spaces (`''` is an empty one), `NAME=VALUE` before it set. Gives the exit code and stderr.
fn run(dir: &Path, line: &str) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsprov"));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LC_ALL", "C");
    command.env("HOME", dir.join("home")).env("FSPROV_ROOT", dir.join("state")).env("FSPROV_CONFIG", "");
    command.current_dir(dir);
    let mut words = line.split(' ').peekable();
    while let Some((name, value)) =
        words.peek().and_then(|word| word.split_once('=')).filter(|(name, _)| !name.starts_with('-'))
    {
        command.env(name, value);
        words.next();
    }
    command.args(words.map(|word| if word == "''" { "" } else { word }));
    let said = command.output().expect("run fsprov");
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    if !said.status.success() {
        assert!(said.stdout.is_empty() || line.starts_with("image rm"), "{line}: errors go to stderr");
    }
    (said.status.code().expect("an exit code"), text)
}

/// A command, its exit code; then: what failed, why, what to do.
const TABLE: &[(&str, i32, [&str; 3])] = &[
    // Commands.
    ("mout x", 2, ["'mout'", "unrecognized", "'mount'"]),
    ("pull debian", 2, ["pull", "no such command", "`fsprov image pull REF`"]),
    ("ps", 2, ["ps", "no such command", "`fsprov list`"]),
    ("exec x", 2, ["exec", "no such command", "`fsprov run -it IMAGE`"]),
    ("import x", 2, ["import", "no such command", "`fsprov image import FILE`"]),
    ("images", 2, ["images", "no such command", "`fsprov image list`"]),
    ("rmi x", 2, ["rmi", "no such command", "`fsprov image rm IMAGE`"]),
    ("man nosuch", 2, ["nosuch", "no such command", "`fsprov --help`"]),
    ("config", 2, ["config", "requires a subcommand", "show, example"]),
    ("completions csh", 2, ["'csh'", "invalid value", "bash, elvish, fish"]),
    ("list extra", 2, ["'extra'", "unexpected argument", "Usage:"]),
    ("run -d debian", 125, ["-d", "no such option", "runs in the foreground"]),
    ("run --memory 1g debian", 125, ["--memory", "no such option", "systemd-run"]),
    ("run -v ./tree:/x:ro,Z base", 125, ["./tree:/x:ro,Z", "sets no labels", "leave it out"]),
    ("run -v ./tree:/x:U base", 125, ["./tree:/x:U", "changes no owners", "--userns=keep-id"]),
    ("run --nonsense debian", 125, ["--nonsense", "unexpected argument", "Usage:"]),
    // Arguments of mount.
    ("mount", 2, ["<IMAGE>", "not provided", "Usage:"]),
    ("mount ./tree", 2, ["<ROOTFS>", "not provided", "Usage:"]),
    ("mount --backend zfs ./tree r", 2, ["--backend", "'zfs'", "auto, bind, fuse, overlay, copy"]),
    ("mount --id a/b ./tree r", 2, ["--id", "a/b", "1 to 128 letters, digits"]),
    ("mount --nosuid --suid ./tree r", 2, ["--nosuid", "cannot be used with", "Usage:"]),
    ("mount --volume-ttl x ./tree r", 2, ["--volume-ttl", "'x'", "from 0 to 86400"]),
    ("mount --uid-map 0:0 ./tree r", 2, ["--uid-map", "three whole numbers", "write CONTAINER:HOST:COUNT"]),
    ("mount --uid-map auto --uid-map 0:0:1 ./tree r", 2, ["--uid-map", "cannot be combined", "give one of them alone"]),
    ("mount --uid-map 0:1:5 --uid-map 3:9:1 ./tree r", 2, ["--uid-map", "two ranges overlap", "make them disjoint"]),
    ("mount --squash 1 ./tree r", 2, ["--squash", "\"1\"", "write UID:GID"]),
    ("mount --squash 1:1 --uid-map 0:0:1 ./tree r", 2, ["--squash", "exclude one another", "leave one of them out"]),
    // Volumes.
    ("mount -v nonsense ./tree r", 2, ["volume nonsense", "it needs SRC and DST", "write SRC:DST"]),
    ("mount -v /tmp:b ./tree r", 2, ["path b", "must be absolute", "for example /data"]),
    ("mount -v /tmp:/ ./tree r", 2, ["path /", "the root itself", "for example /data"]),
    ("mount -v /tmp:/../etc ./tree r", 2, ["/../etc", "component . or ..", "write DST as"]),
    ("mount -v :/etc ./tree r", 2, ["volume :/etc", "the source is empty", "write SRC:DST"]),
    ("mount -v a:/x ./tree r", 2, ["volume /x (a)", "there is no sandbox", "--sandbox DIR, or write ./a"]),
    ("mount -v a/../b:/etc ./tree r", 2, ["a/../b", "cannot have ..", "write ./a/../b"]),
    ("mount -v ./missing:/etc ./tree r", 3, ["missing", "No such file", "create it first"]),
    ("mount -v /tmp:/k,ro ./tree r", 2, ["/tmp:/k,ro", "options follow a colon", "write /tmp:/k:ro"]),
    ("mount -v /tmp:/etc:rx ./tree r", 2, ["volume", "unknown option \"rx\"", "the options are ro, rw"]),
    ("mount -v /tmp:/etc:ro,rw ./tree r", 2, ["volume", "rw is given twice", "the options are"]),
    ("mount -v /tmp:/etc -v /:/etc/ ./tree r", 2, ["volume /etc", "two volumes", "a DST of its own"]),
    ("mount --sandbox text -v a:/etc ./tree r", 2, ["sandbox", "text: it is a file", "--sandbox takes a directory"]),
    (
        "mount --sandbox sandbox -v out:/etc ./tree r",
        2,
        ["sandbox/out", "leads out of the sandbox", "name the place itself"],
    ),
    // Images to mount.
    ("mount nothing r", 3, ["image nothing", "no image of this name or id", "`fsprov image pull`"]),
    ("mount nothing.tar r", 3, ["nothing.tar", "no image of this name or id", "`fsprov image list`"]),
    ("mount bare.tar r", 3, ["bare.tar", "no image of this name or id", "write ./bare.tar"]),
    ("mount ./text r", 1, ["text", "shorter than any tar archive", "fsprov reads tar archives"]),
    ("mount ./nowhere r", 3, ["./nowhere", "No such file", "check the path"]),
    ("mount '' r", 2, ["read image \"\"", "1 to 512 printable", "`fsprov image list`"]),
    ("mount sha512-0c7 r", 3, ["sha512-0c7", "no image of this name or id", "at least 4 digits"]),
    // Mount points.
    ("mount tree full", 1, ["full", "the directory is not empty", "--over"]),
    ("mount tree text", 2, ["text", "not a directory", "name a directory"]),
    ("mount tree text/below", 3, ["text/below", "Not a directory", "choose another ROOTFS"]),
    ("mount tree dangling", 3, ["dangling", "leads nowhere", "choose another ROOTFS"]),
    ("mount tree /", 2, ["mount point /", "over the root of this host", "for example ./rootfs"]),
    ("mount --backend copy tree full", 1, ["full", "the directory is not empty", "choose another ROOTFS"]),
    // Rootfses.
    ("unmount", 2, ["<ROOTFS|ID>", "not provided", "Usage:"]),
    ("unmount --all x", 2, ["--all", "cannot be used with", "Usage:"]),
    ("unmount nothing", 3, ["rootfs nothing", "no such rootfs", "`fsprov list`"]),
    ("unmount nothing ./nowhere", 1, ["./nowhere", "no such rootfs", "2 of 2 failed"]),
    ("inspect nothing", 3, ["rootfs nothing", "no such rootfs", "--root names another"]),
    ("stats nothing", 3, ["rootfs nothing", "no such rootfs", "`fsprov list`"]),
    ("restart nothing", 3, ["rootfs nothing", "no such rootfs", "`fsprov list`"]),
    ("recover --keep a/b", 2, ["--keep", "a/b", "1 to 128 letters"]),
    // Images.
    ("image import nowhere", 3, ["nowhere", "No such file", "check the path"]),
    ("image import text --name t", 1, ["import text", "shorter than any tar archive", "fsprov reads tar archives"]),
    ("image import bare.tar", 1, ["bare.tar", "manifest and rootfs at its top", "--name NAME"]),
    ("image import bare.tar --name tree", 1, ["name image tree", "has this name", "--replace"]),
    ("image import tree", 2, ["import tree", "without a manifest", "--name"]),
    ("image import tree --name ./x", 2, ["\"./x\"", "cannot be a path", "write a name such as"]),
    ("image import tree --name x --expect sha512-0", 2, ["--expect", "sha512-0", "128 lowercase hex digits"]),
    ("image import tree --name x --platform linux", 2, ["--platform", "\"linux\"", "OS/ARCH"]),
    ("image show nothing", 3, ["image nothing", "no image of this name or id", "`fsprov image list`"]),
    ("image show ./tree", 2, ["./tree", "a path", "give a name or id"]),
    ("image rm nothing", 3, ["image nothing", "no image of this name or id", "`fsprov image list`"]),
    ("image rm nothing nowhere", 1, ["image nothing", "no image of this name or id", "2 of 2 failed"]),
    ("image tag tree base", 1, ["name image base", "has this name", "--replace"]),
    ("image export tree text", 1, ["export to text", "it exists", "choose another PATH"]),
    ("image export --format oci tree -", 2, ["standard output", "a directory", "give a PATH"]),
    ("image gc --older-than 3", 2, ["--unused", "not provided", "Usage:"]),
    // Names of registries.
    ("image pull https://docker.io/x", 2, ["https://docker.io/x", "leave out https://", "docker.io/library/debian:12"]),
    ("image pull Debian", 2, ["\"Debian\"", "lowercase letters", "docker.io/library/debian:12"]),
    ("image pull debian@sha256:0", 2, ["digest \"sha256:0\"", "must be `sha256:`", "64 lowercase hex digits"]),
    ("image pull localhost:1/a/b", 1, ["localhost:1/a/b", "Connection refused", "is the server running"]),
    ("image fetch Example.com/X", 2, ["\"Example.com/X\"", "lowercase letters", "example.com/app:1.0"]),
    // The snapshotter.
    ("snapshotter", 2, ["start snapshotter", "no socket to listen on", "--socket PATH"]),
    ("snapshotter --socket text", 1, ["make socket text", "something else than a socket", "choose another path"]),
    ("snapshotter --socket s --state text", 1, ["state directory", "text", "--state"]),
    // Programs in images.
    ("run", 125, ["<IMAGE>", "not provided", "Usage:"]),
    ("run --network bridge base", 125, ["--network", "'bridge'", "host, none"]),
    ("run --runtime nosuch base", 125, ["nosuch", "there is no such program", "install the package crun"]),
    ("run --cap-add root base", 125, ["root", "no such capability", "capabilities(7)"]),
    ("run --tmpfs tmp base", 125, ["--tmpfs", "must be an absolute path", "PATH[:OPTION,...]"]),
    ("run -w src base", 125, ["--workdir", "src", "must be an absolute path"]),
    ("run -e =x base", 125, ["\"=x\"", "the name is empty", "NAME=VALUE"]),
    ("run --env-file nosuch base", 125, ["nosuch", "--env-file", "No such file"]),
    ("run -t base", 125, ["--tty", "stdin is not a terminal", "leave out -t"]),
    ("run containers-storage:x", 125, ["containers-storage", "are not read", "skopeo copy"]),
    ("bundle base", 2, ["<DIR>", "not provided", "Usage:"]),
    ("bundle base no/b", 3, ["no/b", "No such file", "make"]),
    // Configuration.
    ("FSPROV_CONFIG=/nope list", 3, ["/nope", "No such file", "unset that"]),
    ("FSPROV_CONFIG=bad.toml mount tree r", 2, ["bad.toml", "unknown field `rot`", "expected one of"]),
    ("FSPROV_CONFIG=zfs.toml mount tree r", 2, ["zfs.toml", "not a backend", "must be auto, bind"]),
];

#[test]
fn every_error_says_what_why_and_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    prepare(dir.path());
    assert!(TABLE.len() >= 60, "{} rows", TABLE.len());
    let mut wrong = Vec::new();
    for (line, code, texts) in TABLE {
        let (got, said) = run(dir.path(), line);
        let missing: Vec<&&str> = texts.iter().filter(|text| !said.contains(**text)).collect();
        if got != *code || !missing.is_empty() {
            wrong.push(format!("$ fsprov {line}\n  exit {got}, not {code}; does not say {missing:?}:\n  {said}"));
        }
        for tic in ["has not ", "is no ", " but for ", "whoever", "is none", "panicked"] {
            if said.contains(tic) && !said.contains("there is no ") {
                wrong.push(format!("$ fsprov {line}\n  says {tic:?}: {said}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), TABLE.len(), wrong.join("\n"));
    assert!(!dir.path().join("r").exists(), "a refused mount left its mount point");
}
