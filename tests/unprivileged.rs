//! The half of the integration tests that an ordinary user runs, without privilege and in user namespaces. Started by root, it
//! runs itself as the user `fsprov-test`.
//!
//! `cargo test --test unprivileged -- NAME`; see tests/common/harness.rs for FSPROV_TEST_MUST_RUN and FSPROV_TEST_KEEP.

#![allow(clippy::pedantic, reason = "tests read better with plain loops and format!; every other lint holds")]

mod common;
mod suite;

fn main() -> std::process::ExitCode {
    common::harness::main(common::lane::Half::Unprivileged, suite::cases())
}
