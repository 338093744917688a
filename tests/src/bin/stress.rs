//! Campaign: `stress-ng --verify` in the image `workbench` with 1, 2 and 4 vCPUs, on a disk that is kept.
//!
//! Takes `--seconds N --seed S`, and `--cpus N` for that number alone; the time is shared by all classes of stressors. After each machine has powered off its
//! file system has to be clean; then the next one is killed while it writes, and one more has to find everything by the
//! journal. A case is an operation of a stressor; a difference is a verification error, trouble in the guest's kernel
//! log, or a damaged file system. Images and files are those of the tests (`target/release/e2e`).

use std::process::ExitCode;
use std::time::Duration;

use strata_tests::stress::{self, Outcome};
use strata_tests::{Need, RootDisk, WORKBENCH, ready};

/// Numbers of vCPUs, in turns.
const CPUS: &[u32] = &[1, 2, 4];

/// How long a machine may take beyond what was asked for: it boots, and stressors end late on a busy host.
const PATIENCE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let (mut seconds, mut seed, mut only) = (1500, 1, None);
    let mut arguments = std::env::args().skip(1);
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        match (name.as_str(), value.parse()) {
            ("--seconds", Ok(value)) => seconds = value,
            ("--seed", Ok(value)) => seed = value,
            ("--cpus", Ok(value)) => only = u32::try_from(value).ok(),
            _ => {
                eprintln!("stress: usage: stress --seconds N --seed S [--cpus N]");
                return ExitCode::from(64);
            }
        }
    }
    if !ready(Need::Workbench) {
        return ExitCode::from(69);
    }
    let turns = only.as_ref().map_or(CPUS, std::slice::from_ref);
    let each = (seconds / (stress::COUNT * turns.len() as u64)).max(1);
    let (mut cases, mut differences) = (0, 0);
    for &cpus in turns {
        println!("{cpus} vCPUs, {each} s for each class");
        let outcome = round(cpus, each, seed);
        println!(
            "{} operations, {} of them or of their file system wrong",
            outcome.operations,
            outcome.wrong.len()
        );
        cases += outcome.operations;
        differences += outcome.wrong.len();
    }
    println!("campaign: {cases} cases, {differences} differences, seed {seed}");
    ExitCode::from(u8::from(differences > 0))
}

/// All classes, then a power failure, with so many vCPUs.
fn round(cpus: u32, seconds: u64, seed: u64) -> Outcome {
    let disk = RootDisk::copy(WORKBENCH);
    let timeout = PATIENCE + Duration::from_secs(2 * seconds * stress::COUNT);
    let run = disk
        .machine(cpus, &stress::script(seconds, seed))
        .timeout(timeout)
        .run_to_end();
    let mut outcome = match run {
        Ok(finished) => {
            let text = finished.text();
            let mut outcome = Outcome::read(&text);
            if !finished.status.success() {
                outcome
                    .wrong
                    .push(format!("{}: {}", finished.status, finished.stderr));
            }
            if !outcome.wrong.is_empty() {
                println!("{text}");
            }
            outcome
        }
        Err(error) => Outcome {
            operations: 0,
            wrong: vec![error],
        },
    };
    outcome.wrong.extend(disk.problem());
    // A machine that cannot be started for what comes next would be the end of this program.
    for line in &outcome.wrong {
        println!("wrong: {line}");
    }
    let before = outcome.wrong.len();

    disk.kill(cpus);
    let run = disk
        .machine(cpus, RootDisk::LOOK)
        .timeout(PATIENCE)
        .run_to_end();
    match run {
        Ok(finished) if finished.text() == RootDisk::FOUND => {}
        Ok(finished) => outcome
            .wrong
            .push(format!("after the power failure: {}", finished.text())),
        Err(error) => outcome.wrong.push(error),
    }
    outcome.wrong.extend(disk.problem());
    for line in outcome.wrong.iter().skip(before) {
        println!("wrong: {line}");
    }
    outcome
}
