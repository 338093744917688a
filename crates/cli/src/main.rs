//! The strata program: arguments, output, the host's terminal.
//!
//! A run of `main` is: parse, do one command, print at most one sentence of error, end with its status.

mod args;
mod completions;
mod exit;
mod image;
mod info;
mod network;
mod output;
mod ports;
mod process;
mod routes;
mod run;
mod stats;

use std::time::Instant;

use args::{Command, Parsed};
use exit::{ExitCode, Failure};

fn main() {
    let started = Instant::now();
    end_on_panic();
    let status = match dispatch(started) {
        Ok(status) => status,
        Err(failure) => {
            run::terminal::restore();
            // Nobody hears us if standard error is closed.
            let _ = output::error_line(&failure.to_string());
            failure.code as u8
        }
    };
    run::terminal::restore();
    // Threads of a machine that has ended may still be there; nothing of theirs is waited for.
    std::process::exit(i32::from(status));
}

/// A panic in any thread is a fault of ours and ends the program, on a terminal that is as it was.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        run::terminal::restore();
        report(panic);
        std::process::exit(i32::from(ExitCode::Internal as u8));
    }));
}

/// Does what the command line says; gives the exit status.
fn dispatch(started: Instant) -> Result<u8, Failure> {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == process::WORD)
    {
        return process::main();
    }
    let command = match args::parse(std::env::args_os())? {
        Parsed::Command(command) => command,
        Parsed::Text(text) => return output::print(&text).map(|()| 0),
    };
    match command {
        Command::Run(args) => run::run(*args, started),
        Command::Image(command) => image::run(&command).map(|()| 0),
        Command::Network(command) => network::run(&command).map(|()| 0),
        Command::Info(args) => info::run(&args).map(|()| 0),
        Command::Stats(args) => stats::run(&args).map(|()| 0),
        Command::Ports(args) => ports::run(&args).map(|()| 0),
        Command::Completions { shell } => completions::run(shell).map(|()| 0),
    }
}
