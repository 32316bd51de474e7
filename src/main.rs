//! Dispatch and exit code. Must not know the domain.

use std::process::ExitCode;

fn main() -> ExitCode {
    fsprov::main(std::env::args_os())
}
