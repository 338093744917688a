//! `cargo xtask demo`: from a fresh clone to a machine of one's own.

use std::io::{IsTerminal, stdin, stdout};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::phases::Phases;
use crate::{guest, setup, shell};

/// Options of `cargo xtask demo`.
#[derive(Args)]
pub struct DemoArguments {
    /// Run the timed commands even when there is a terminal.
    #[arg(long)]
    no_shell: bool,
}

/// What the demo runs in guests when there is nobody to type: each in a machine of its own.
const COMMANDS: &[&[&str]] = &[
    &["uname", "-a"],
    &[
        "sh",
        "-c",
        "grep -m1 'model name' /proc/cpuinfo && grep MemTotal /proc/meminfo",
    ],
    &[
        "sh",
        "-c",
        "ls -l /sys/bus/pci/devices | wc -l && cut -d ' ' -f 1 /proc/uptime",
    ],
];

/// Sets up, builds, makes the image, boots it.
pub fn run(arguments: &DemoArguments) -> Result<ExitCode> {
    let mut phases = Phases::default();
    phases.run("set-up", || setup::ensure(setup::IMAGE_TOOLS))?;
    let strata = phases.run("build", guest::build_strata)?;
    phases.run("image", || guest::build_tiny(&strata))?;
    if !arguments.no_shell && stdin().is_terminal() && stdout().is_terminal() {
        phases.print();
        let status = shell::command(&strata).args(["run", "tiny"]).status()?;
        return Ok(status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .map_or(ExitCode::FAILURE, ExitCode::from));
    }
    for command in COMMANDS {
        phases.run(&format!("boot, `{}`, power-off", command.join(" ")), || {
            run_in_guest(&strata, command)
        })?;
    }
    phases.print();
    println!(
        "for a shell in the guest, run this with a terminal, or type: {} run tiny",
        strata.display()
    );
    Ok(ExitCode::SUCCESS)
}

fn run_in_guest(strata: &Path, guest_command: &[&str]) -> Result<()> {
    shell::run(
        shell::command(strata)
            .args(["run", "tiny", "--"])
            .args(guest_command),
    )
}
