//! `strata completions`: a script that makes a shell complete our command line.

use clap::CommandFactory;

use crate::args::Cli;
use crate::exit::Failure;
use crate::output;

/// Prints the script.
pub fn run(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "strata", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}
