//! Dispatch and exit code. Must not know the domain.

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = fsprov::dispatch() {
        return code;
    }
    fsprov::main(std::env::args_os())
}
