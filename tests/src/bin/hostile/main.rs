//! Campaign: hostile guests. Random code, page tables, descriptor tables, CPU states and device accesses in whole
//! machines, with every translated block proven before it runs.
//!
//! Takes `--seconds N --seed S`. Machines run in a process of their own that this one watches: a panic, a signal, a
//! hang, an error of the engine or memory that keeps growing is a difference. `--seed S --case N` runs one case again.

mod code;
mod device;
mod machine;
mod rng;
mod world;

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use machine::{Files, Totals};

/// A case that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Cases of one process.
const CASES: u64 = 400;
/// Cases after which a process has all the memory that it should ever have, and how much more it may get in MiB.
const SETTLED: u64 = 100;
const GROWTH: u64 = 64;

#[derive(Default)]
struct Arguments {
    seconds: Option<u64>,
    seed: u64,
    case: Option<u64>,
    first: Option<u64>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments {
        seed: 1,
        ..Arguments::default()
    };
    let mut given = std::env::args().skip(1);
    while let (Some(name), Some(value)) = (given.next(), given.next()) {
        match (name.as_str(), value.parse()) {
            ("--seconds", Ok(value)) => arguments.seconds = Some(value),
            ("--seed", Ok(value)) => arguments.seed = value,
            ("--case", Ok(value)) => arguments.case = Some(value),
            ("--first", Ok(value)) => arguments.first = Some(value),
            _ => {
                eprintln!("hostile: usage: hostile --seconds N --seed S | --seed S --case N");
                return ExitCode::from(64);
            }
        }
    }
    let seed = arguments.seed;
    if let Some(first) = arguments.first {
        return work(seed, first, CASES);
    }
    if let Some(case) = arguments.case {
        return work(seed, case, 1);
    }
    match watch(seed, Duration::from_secs(arguments.seconds.unwrap_or(60))) {
        Ok((cases, differences)) => {
            println!("campaign: {cases} cases, {differences} differences, seed {seed}");
            ExitCode::from(u8::from(differences > 0))
        }
        Err(error) => {
            eprintln!("hostile: {error}");
            ExitCode::from(70)
        }
    }
}

/// The process that runs cases: says which one comes next, and what went wrong.
fn work(seed: u64, first: u64, count: u64) -> ExitCode {
    let directory = std::env::temp_dir().join(format!("hostile-{}", std::process::id()));
    let made = std::fs::create_dir_all(&directory).and_then(|()| Files::new(&directory));
    let files = match made {
        Ok(files) => files,
        Err(error) => {
            eprintln!("hostile: {}: {error}", directory.display());
            return ExitCode::from(70);
        }
    };
    let totals = Totals::default();
    let mut failed = false;
    let mut settled = None;
    for case in first..first + count {
        println!("case {case}");
        if let Err(text) = machine::run(seed, case, &files, &totals) {
            println!("difference {case} {}", text.replace('\n', " "));
            failed = true;
        }
        if case - first == SETTLED {
            settled = resident();
        }
    }
    if let (Some(settled), Some(now)) = (settled, resident())
        && now > settled + GROWTH
    {
        println!("difference {first} memory grew from {settled} MiB to {now} MiB");
        failed = true;
    }
    println!(
        "did {} blocks proven with {} checked operands, {} exceptions",
        totals.blocks.load(Ordering::Relaxed),
        totals.accesses.load(Ordering::Relaxed),
        totals.exceptions.load(Ordering::Relaxed),
    );
    let _ = std::fs::remove_dir_all(&directory);
    ExitCode::from(u8::from(failed))
}

/// MiB of this process that are in memory.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * 4 / 1024)
}

/// Runs processes until the time is over. Returns cases and differences.
fn watch(seed: u64, time: Duration) -> Result<(u64, u64), String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let end = Instant::now() + time;
    let (mut next, mut differences) = (0, 0);
    let mut difference = |case: u64, text: &str| {
        differences += 1;
        println!("difference: seed {seed} case {case}: {text}");
    };
    while Instant::now() < end {
        let mut child = Command::new(&program)
            .args(["--seed", &seed.to_string(), "--first", &next.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{}: {e}", program.display()))?;
        let (lines, heard) = channel();
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if lines.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let mut current = next;
        let mut stopped = false;
        loop {
            match heard.recv_timeout(PATIENCE) {
                Ok(line) => {
                    if let Some(case) = line.strip_prefix("case ") {
                        current = case.parse().map_err(|_| format!("what is {line:?}?"))?;
                        next = current + 1;
                        if Instant::now() >= end {
                            stopped = true;
                            next = current;
                            let _ = child.kill();
                            break;
                        }
                    } else if let Some(found) = line.strip_prefix("difference ") {
                        let (case, text) = found.split_once(' ').unwrap_or((found, ""));
                        difference(case.parse().unwrap_or(current), text);
                    } else {
                        println!("{next} cases: {line}");
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    difference(current, "it hangs");
                    stopped = true;
                    let _ = child.kill();
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = child.wait().map_err(|e| e.to_string())?;
        if !stopped && !matches!(status.code(), Some(0 | 1)) {
            difference(current, &format!("the process ended with {status}"));
        }
    }
    Ok((next, differences))
}
