//! The strata program: arguments, output, the host's terminal.

fn main() {}
