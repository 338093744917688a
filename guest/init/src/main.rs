//! The first process of a guest. See the library for what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        if std::env::args_os()
            .nth(1)
            .is_some_and(|word| word == "agent")
        {
            let error = strata_init::agent::run();
            eprintln!("strata-agent: {error}");
            return ExitCode::FAILURE;
        }
        eprintln!("strata-init is the first process of a guest and does nothing elsewhere");
        return ExitCode::from(64);
    }
    let error = strata_init::boot();
    // The kernel panics when its first process ends: the message and the panic are what the host sees.
    eprintln!("strata-init: {error}");
    ExitCode::FAILURE
}
