//! `fsprov snapshotter` as containerd meets it: the real program, spoken to over gRPC, its mounts mounted.
//!
//! The whole program runs itself again in a mount namespace (root) or in a user namespace that owns one (anybody else), with a
//! tmpfs on /tmp: nothing it mounts or makes is to be seen outside. Where that is not possible every test shows as ignored with the
//! reason; with FSPROV_TEST_MUST_RUN=1 that is a failure.

#![allow(clippy::pedantic, reason = "tests read better with plain loops and format!; every other lint holds")]
#![allow(clippy::print_stdout, reason = "some tests measure, and say what")]

mod claims;
mod client;
mod compare;
mod content;
mod cri;
mod diff;
mod hostile;
mod images;
mod lower;
mod mapped;
mod real;
mod served;
mod service;
mod shown;

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Failed, Trial};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};

const INSIDE: &str = "FSPROV_TEST_INSIDE_NAMESPACE";

type Test = fn();

fn main() -> ExitCode {
    let args = Arguments::from_args();
    let reason = match std::env::var(INSIDE) {
        Ok(_) => empty_tmp().err().map(|e| format!("tmpfs on /tmp: {e}")),
        Err(_) => Some(enter_namespace()),
    };
    let must_run = std::env::var_os("FSPROV_TEST_MUST_RUN").is_some_and(|v| v == "1");
    let mut tests = vec![
        service::TESTS,
        claims::TESTS,
        diff::TESTS,
        compare::TESTS,
        mapped::TESTS,
        lower::TESTS,
        shown::TESTS,
        hostile::TESTS,
    ];
    if std::env::var_os(real::PLACE).is_some() {
        tests = vec![real::TESTS];
    }
    let trials = tests
        .concat()
        .into_iter()
        .map(|(name, test)| match &reason {
            None => Trial::test(name, move || {
                test();
                Ok(())
            }),
            Some(why) if must_run => {
                let why = why.clone();
                Trial::test(name, move || Err(Failed::from(why)))
            }
            Some(why) => Trial::test(format!("{name} ({why})"), || Ok(())).with_ignored_flag(true),
        })
        .collect();
    libtest_mimic::run(&args, trials).exit_code()
}

/// A tmpfs on /tmp; the program stays where it is, also below /tmp.
fn empty_tmp() -> std::io::Result<()> {
    let dir = served::program().parent().expect("a directory").to_owned();
    let is_hidden = dir.starts_with("/tmp");
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let kept = if is_hidden { Some(open_tree(CWD, &dir, clone)?) } else { None };
    mount("tmpfs", "/tmp", "tmpfs", MountFlags::empty(), Some(c"mode=0777"))?;
    if let Some(kept) = kept {
        std::fs::create_dir_all(&dir)?;
        move_mount(kept, "", CWD, &dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    Ok(())
}

/// Becomes this program inside the namespace; returns why that failed.
fn enter_namespace() -> String {
    let root = rustix::process::geteuid().is_root();
    let how: &[&str] = if root { &["-m"] } else { &["-U", "-r", "-m"] };
    let can = Command::new("unshare").args(how).arg("true").output();
    match can {
        Ok(out) if out.status.success() => {}
        Ok(out) => return String::from_utf8_lossy(&out.stderr).trim().to_owned(),
        Err(e) => return format!("unshare: {e}"),
    }
    let me = std::env::current_exe().expect("own path");
    let error = Command::new("unshare").args(how).arg(me).args(std::env::args_os().skip(1)).env(INSIDE, "1").exec();
    format!("exec unshare: {error}")
}

/// The tests of one file, by name.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub(crate) const TESTS: &[(&str, crate::Test)] = &[$((stringify!($name), $name)),*];
    };
}
pub(crate) use tests;
