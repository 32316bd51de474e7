//! Dispatch and exit code. Must not know the domain.

fn main() {}
