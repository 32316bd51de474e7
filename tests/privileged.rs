//! The half of the integration tests that needs root; each case runs in a mount namespace of its own.
//!
//! `cargo test --test privileged -- NAME`; see tests/common/harness.rs for FSPROV_TEST_MUST_RUN and FSPROV_TEST_KEEP.

#![allow(clippy::pedantic, reason = "tests read better with plain loops and format!; every other lint holds")]

mod common;
mod suite;

fn main() -> std::process::ExitCode {
    common::harness::main(common::lane::Half::Privileged, suite::cases())
}
