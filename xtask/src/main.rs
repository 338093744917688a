//! Developer commands of the house, run as `cargo xtask COMMAND`: every habit in one place, the same here and in CI.

mod bench;
mod campaign;
mod demo;
mod figures;
mod guest;
mod lab;
mod phases;
mod setup;
mod shell;
mod suite;
mod test;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of Strata.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Set up, build and boot a machine: a shell with a terminal, a few timed commands without.
    Demo(demo::DemoArguments),
    /// Set up, check formatting and lints, build and run every test.
    Test(test::TestArguments),
    /// Run ready-built conformance images and print a table.
    Suite(suite::SuiteArguments),
    /// Run the guest benchmark natively, under QEMU TCG and under Strata, in turns.
    Bench(bench::BenchArguments),
    /// Run a long comparison with fresh seeds and note it in the ledger.
    Campaign(campaign::CampaignArguments),
    /// Measure sizes, times and memory of `strata` itself.
    Figures(figures::FiguresArguments),
    /// Boot machines on the KVM engine inside an emulated machine that has KVM.
    Lab(lab::LabArguments),
    /// Check the rules of the house; with `--fix`, write what can be generated.
    Tidy(tidy::TidyArguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Suite(arguments) => suite::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Campaign(arguments) => campaign::run(&arguments),
        Command::Figures(arguments) => figures::run(&arguments),
        Command::Lab(arguments) => lab::run(&arguments),
        Command::Tidy(arguments) => tidy::run(&arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
