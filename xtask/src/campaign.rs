//! `cargo xtask campaign`: a long comparison with fresh seeds, noted in a ledger whatever its result.
//!
//! A campaign NAME is a binary of the workspace that takes `--seconds N --seed S` and ends with the line
//! `campaign: <count> cases, <differences> differences, seed <seed>`.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;

use crate::shell;

/// Where campaigns are noted, relative to the root.
const LEDGER: &str = "docs/campaigns.tsv";

const LEDGER_HEADING: &str = "date\tcommit\tcampaign\tseed\tseconds\tcases\tdifferences\tresult\n";

/// Options of `cargo xtask campaign`.
#[derive(Args)]
pub struct CampaignArguments {
    /// What to run: the name of a campaign binary, such as `oracle` or `lockstep`.
    name: String,
    /// How long.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Seed to start from; a fresh one by default.
    #[arg(long)]
    seed: Option<u64>,
}

/// The numbers of a campaign's last line.
#[derive(Debug, PartialEq, Eq)]
struct Summary {
    cases: u64,
    differences: u64,
    seed: u64,
}

/// Runs the campaign and appends one line to the ledger.
pub fn run(arguments: &CampaignArguments) -> Result<ExitCode> {
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => u64::try_from(
            SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() & u128::from(u64::MAX >> 1),
        )?,
    };
    let commit = commit()?;
    let binary = ["--release", "--bin", arguments.name.as_str()];
    // Some campaigns run the program itself, which then lies beside them.
    shell::run(
        shell::cargo()
            .arg("build")
            .args(binary)
            .args(["--bin", "strata"]),
    )?;
    let start = Instant::now();
    let seconds = arguments.minutes.saturating_mul(60);
    let mut child = shell::cargo()
        .args(["run", "--quiet"])
        .args(binary)
        .args([
            "--",
            "--seconds",
            &seconds.to_string(),
            "--seed",
            &seed.to_string(),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut summary = None;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line.context("cannot read the campaign's output")?;
            println!("{line}");
            summary = parse_summary(&line).or(summary);
        }
    }
    let status = child.wait().context("cannot wait for the campaign")?;
    let result = match &summary {
        Some(summary) if status.success() && summary.differences == 0 => "passed".to_owned(),
        Some(summary) if summary.differences > 0 => "differences found".to_owned(),
        Some(_) => format!("failed: {status}"),
        None => format!("ended without a summary: {status}"),
    };
    let (cases, differences, seed) = summary.map_or((0, 0, seed), |summary| {
        (summary.cases, summary.differences, summary.seed)
    });
    let date = shell::output(shell::command("date").args(["--utc", "+%Y-%m-%dT%H:%M:%SZ"]))?;
    let entry = format!(
        "{}\t{commit}\t{}\t{seed}\t{}\t{cases}\t{differences}\t{result}\n",
        date.trim(),
        arguments.name,
        start.elapsed().as_secs()
    );
    append(&shell::root().join(LEDGER), &entry)?;
    println!("{}: {result}; noted in {LEDGER}", arguments.name);
    Ok(if result == "passed" {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The commit that is built, with `+` when the work tree differs from it.
fn commit() -> Result<String> {
    let commit = shell::output(shell::command("git").args(["rev-parse", "--short=12", "HEAD"]))?;
    let changed = shell::output(shell::command("git").args([
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        &format!(":!{LEDGER}"),
    ]))?;
    Ok(format!(
        "{}{}",
        commit.trim(),
        if changed.is_empty() { "" } else { "+" }
    ))
}

/// Reads `campaign: <count> cases, <differences> differences, seed <seed>`.
fn parse_summary(line: &str) -> Option<Summary> {
    let mut parts = line.strip_prefix("campaign: ")?.split(", ");
    let cases = parts.next()?.strip_suffix(" cases")?.parse().ok()?;
    let differences = parts.next()?.strip_suffix(" differences")?.parse().ok()?;
    let seed = parts.next()?.strip_prefix("seed ")?.trim().parse().ok()?;
    Some(Summary {
        cases,
        differences,
        seed,
    })
}

fn append(path: &Path, entry: &str) -> Result<()> {
    let open = || -> std::io::Result<()> {
        if !path.exists() {
            fs::write(path, LEDGER_HEADING)?;
        }
        OpenOptions::new()
            .append(true)
            .open(path)?
            .write_all(entry.as_bytes())
    };
    open().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_line_is_read() {
        let summary = parse_summary("campaign: 20000000 cases, 3 differences, seed 17");
        assert_eq!(
            summary,
            Some(Summary {
                cases: 20_000_000,
                differences: 3,
                seed: 17
            })
        );
        assert_eq!(parse_summary("campaign: many cases"), None);
        assert_eq!(parse_summary("20 cases, 3 differences, seed 1"), None);
    }
}
