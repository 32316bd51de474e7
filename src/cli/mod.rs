//! The command line. Must not know system calls.
