//! Running the benchmark on one kind of machine, and reading what it prints.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::shell;

/// What a benchmark runs on.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// As a program of the host.
    Native,
    /// QEMU's translator.
    Tcg,
    /// This project.
    Strata,
}

impl Kind {
    /// As it stands in tables.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Native => "native",
            Kind::Tcg => "tcg",
            Kind::Strata => "strata",
        }
    }
}

/// How one class ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It ran: nanoseconds by the machine's own clock, and a checksum.
    Ran { nanoseconds: u64, checksum: String },
    /// The machine's CPU has not got what the class needs.
    Absent,
    /// It did not end well, and how.
    Failed(String),
}

/// What a run of several classes gave.
#[derive(Debug, Default)]
pub struct Run {
    /// By class, in the order they ran.
    pub outcomes: Vec<(String, Outcome)>,
    /// Why the run ended before it was done, if it did.
    pub early_end: Option<String>,
}

/// The files that the machines run.
pub struct Guest {
    pub program: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub strata: PathBuf,
    pub engine: String,
    pub strata_arguments: Vec<String>,
    /// How long to wait for the next line of output.
    pub patience: Duration,
}

/// How many of the last lines are shown when a machine ends early.
const LAST_LINES: usize = 3;

impl Guest {
    /// Runs `names` with `scale`.
    pub fn run(&self, kind: Kind, names: &[String], scale: &str) -> Result<Run> {
        let arguments = format!("--class {} --scale {scale}", names.join(","));
        let (lines, end) = self.output(kind, &arguments)?;
        Ok(read_run(&lines, names, end))
    }

    /// The time from launch to power-off of a guest that only says that it is there.
    pub fn boot(&self, kind: Kind) -> Result<Duration, String> {
        let start = Instant::now();
        let (lines, end) = self
            .output(kind, "--boot")
            .map_err(|error| format!("{error:#}"))?;
        let time = start.elapsed();
        if lines.iter().any(|line| line == "bench: booted") && end.is_none() {
            Ok(time)
        } else {
            Err(describe_end(&lines, end))
        }
    }

    /// Runs to the end; returns the lines of output, and what was wrong with the end.
    fn output(&self, kind: Kind, arguments: &str) -> Result<(Vec<String>, Option<String>)> {
        let mut command = self.command(kind, arguments);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start `{}`", shell::line(&command)))?;
        let (lines, complete) = read_lines(&mut child, self.patience)?;
        if !complete {
            child.kill().context("cannot stop a machine")?;
        }
        let status = child.wait().context("cannot wait for a machine")?;
        let end = match (complete, status.success()) {
            (true, true) => None,
            (true, false) => Some(format!("it ended with {status}")),
            (false, _) => Some(format!("no output for {} s", self.patience.as_secs())),
        };
        Ok((lines, end))
    }

    fn command(&self, kind: Kind, arguments: &str) -> Command {
        let append = format!("console=ttyS0 quiet panic=-1 bench.args=\"{arguments}\"");
        match kind {
            Kind::Native => {
                let mut command = shell::command(&self.program);
                command.args(arguments.split_whitespace());
                command
            }
            Kind::Tcg => {
                let mut command = shell::command("qemu-system-x86_64");
                command.args([
                    "-accel",
                    "tcg",
                    "-cpu",
                    "max",
                    "-smp",
                    "1",
                    "-m",
                    "512",
                    "-nographic",
                    "-nodefaults",
                ]);
                command.args(["-serial", "stdio", "-no-reboot", "-append", &append]);
                command
                    .arg("-kernel")
                    .arg(&self.kernel)
                    .arg("-initrd")
                    .arg(&self.initrd);
                command
            }
            Kind::Strata => {
                let mut command = shell::command(&self.strata);
                command.args(["run", "--engine", &self.engine, "--memory", "512M"]);
                command.args(["--net", "none", "--on-reboot", "exit", "--append", &append]);
                command
                    .arg("--kernel")
                    .arg(&self.kernel)
                    .arg("--initrd")
                    .arg(&self.initrd);
                command.args(&self.strata_arguments);
                command
            }
        }
    }
}

/// Reads lines until the end of output, or until none comes for `patience`; tells whether it was the end.
fn read_lines(child: &mut Child, patience: Duration) -> Result<(Vec<String>, bool)> {
    let output = child
        .stdout
        .take()
        .context("the machine's output is not ours to read")?;
    let (sender, receiver) = mpsc::channel();
    // Ends with the output, at the latest when the machine is stopped.
    thread::spawn(move || {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    let mut lines = Vec::new();
    loop {
        match receiver.recv_timeout(patience) {
            Ok(line) => lines.push(line),
            Err(RecvTimeoutError::Disconnected) => {
                return Ok((lines, true));
            }
            Err(RecvTimeoutError::Timeout) => {
                return Ok((lines, false));
            }
        }
    }
}

/// Reads `CLASS NANOSECONDS CHECKSUM` and `CLASS absent -` lines and the word that all is done.
fn read_run(lines: &[String], names: &[String], end: Option<String>) -> Run {
    let mut run = Run::default();
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, time, checksum] = words[..] else {
            continue;
        };
        if !names.iter().any(|known| known == name) {
            continue;
        }
        let outcome = match time.parse() {
            Ok(nanoseconds) => Outcome::Ran {
                nanoseconds,
                checksum: checksum.to_owned(),
            },
            Err(_) if time == "absent" => Outcome::Absent,
            Err(_) => continue,
        };
        run.outcomes.push((name.to_owned(), outcome));
    }
    if !lines.iter().any(|line| line == "bench: done") {
        run.early_end = Some(describe_end(lines, end));
    }
    run
}

/// What to say of a machine that ended early.
fn describe_end(lines: &[String], end: Option<String>) -> String {
    let last = lines
        .iter()
        .rev()
        .filter(|line| !line.is_empty())
        .take(LAST_LINES)
        .cloned()
        .collect::<Vec<_>>();
    let last = last.into_iter().rev().collect::<Vec<_>>().join(" / ");
    format!(
        "{}; last output: {last}",
        end.unwrap_or_else(|| "it ended before it was done".to_owned())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Run {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        read_run(
            &lines,
            &["sort".to_owned(), "avx2".to_owned(), "jit".to_owned()],
            None,
        )
    }

    #[test]
    fn results_are_read_among_other_lines() {
        let run = read(
            "SeaBIOS (version 1)\nbench: started\nsort 120 00ab\n[ 1.0] what now\navx2 absent -\nbench: done\n",
        );
        assert_eq!(run.early_end, None);
        let sort = Outcome::Ran {
            nanoseconds: 120,
            checksum: "00ab".to_owned(),
        };
        assert_eq!(
            run.outcomes,
            [
                ("sort".to_owned(), sort),
                ("avx2".to_owned(), Outcome::Absent)
            ]
        );
    }

    #[test]
    fn an_early_end_is_seen() {
        let run = read("sort 120 00ab\nKernel panic - not syncing\n");
        assert_eq!(run.outcomes.len(), 1);
        assert!(run.early_end.unwrap().contains("Kernel panic"));
    }
}
