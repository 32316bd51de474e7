//! A test program that runs all of itself in a mount namespace of its own: nothing that it mounts is ever to be seen outside.

#![allow(dead_code, reason = "for tests/kernel_backends and tests/image_tree.rs")]

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

use super::needs::must_run;
use super::{Enter, Need};

/// Set in the process that runs inside.
const INSIDE: &str = "FSPROV_TEST_INSIDE";

pub(crate) type Test = fn() -> Result<(), Failed>;

/// `main` of such a program: as root it runs itself again in a mount namespace, else in a user namespace that owns one. Inside, `prepare` comes
/// first. What is missing shows every test as ignored with the reason; with FSPROV_TEST_MUST_RUN=1 it fails them.
pub(crate) fn main(needs: &[Need], prepare: fn() -> Result<(), String>, tests: &[(&'static str, Test)]) -> ExitCode {
    let arguments = Arguments::from_args();
    let ready = match std::env::var_os(INSIDE) {
        Some(_) => prepare(),
        None if arguments.list => Ok(()),
        None => enter(needs),
    };
    let trial = |(name, test): &(&'static str, Test)| match ready.clone() {
        Ok(()) => Trial::test(*name, *test),
        Err(why) if must_run() => Trial::test(*name, move || Err(why.into())),
        Err(why) => Trial::test(format!("{name} ({why})"), || Ok(())).with_ignored_flag(true),
    };
    libtest_mimic::run(&arguments, tests.iter().map(trial).collect()).exit_code()
}

/// Become this program inside. Comes back with what keeps it out.
fn enter(needs: &[Need]) -> Result<(), String> {
    let enter = if rustix::process::geteuid().is_root() { Enter::Root } else { Enter::Userns };
    for need in needs.iter().chain([&Need::UserNamespaces].into_iter().filter(|_| enter == Enter::Userns)) {
        need.check()?;
    }
    let me = std::env::current_exe().map_err(|e| format!("own path: {e}"))?;
    let error = enter.command(me.as_os_str()).args(std::env::args_os().skip(1)).env(INSIDE, "1").exec();
    Err(format!("unshare: {error}"))
}
