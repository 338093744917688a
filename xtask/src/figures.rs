//! `cargo xtask figures`: the figures of SPECIFICATION.md that are no comparison: sizes, times and memory of `strata` itself.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::{guest, shell};

/// Options of `cargo xtask figures`.
#[derive(Args)]
pub struct FiguresArguments {
    /// How often the times are measured; the median counts.
    #[arg(long, default_value_t = 5)]
    turns: usize,
}

/// How the mapping of guest memory is named in `/proc/PID/smaps`.
const GUEST_MEMORY: &str = "memfd:strata-";

/// Measures and prints one line per figure.
pub fn run(arguments: &FiguresArguments) -> Result<ExitCode> {
    let strata = guest::build_strata()?;
    guest::build_tiny(&strata)?;
    let binary = fs::read(&strata).with_context(|| format!("cannot read {}", strata.display()))?;
    let (code, symbols) =
        sizes(&binary).with_context(|| format!("{} is no ELF file", strata.display()))?;
    println!(
        "size of the binary: {}, and {} of symbols for stack traces",
        mebibytes(code),
        mebibytes(symbols)
    );
    println!(
        "memory beyond the guest's RAM, after boot: {}",
        mebibytes(memory(&strata)?)
    );

    let mut first_instruction = Vec::new();
    let mut without_jail = Vec::new();
    let mut translation = Vec::new();
    for _ in 0..arguments.turns.max(1) {
        let report = timed_run(&strata, &[])?;
        first_instruction.extend(find_number(&report, "first_instruction_ms"));
        let report_without = timed_run(&strata, &["--no-jail"])?;
        without_jail.extend(find_number(&report_without, "first_instruction_ms"));
        let spent = find_number(&report, "translation-ns");
        let instructions =
            find_number(&report, "instructions-translated").filter(|count| *count > 0.0);
        translation.extend(
            spent
                .zip(instructions)
                .map(|(spent, instructions)| spent / instructions),
        );
    }
    match median(first_instruction).zip(median(without_jail)) {
        Some((time, without)) => println!(
            "from exec to the first guest instruction: {time:.1} ms, {:.1} ms of it for the jail",
            time - without
        ),
        None => println!("from exec to the first guest instruction: not told by this strata"),
    }
    match median(translation) {
        Some(time) => println!("translation of one guest instruction: {time:.0} ns"),
        None => println!("translation of one guest instruction: not told by this strata"),
    }
    Ok(ExitCode::SUCCESS)
}

/// The bytes of an ELF file that are loaded when it runs, and the rest (System V ABI, "Program Header").
fn sizes(binary: &[u8]) -> Option<(u64, u64)> {
    const LOAD: u64 = 1;
    let number = |at: usize, bytes: usize| -> Option<u64> {
        let field = binary.get(at..at.checked_add(bytes)?)?;
        Some(
            field
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        )
    };
    let (first, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    let mut loaded = 0;
    for index in 0..count {
        let header = usize::try_from(first + index * size).ok()?;
        if number(header, 4)? == LOAD {
            loaded += number(header + 0x20, 8)?;
        }
    }
    Some((loaded, (binary.len() as u64).checked_sub(loaded)?))
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Runs one command and reads the JSON lines that `--timings` and `--print-stats` leave on standard error.
fn timed_run(strata: &Path, options: &[&str]) -> Result<Value> {
    let mut command = shell::command(strata);
    command
        .args([
            "run",
            "--net",
            "none",
            "--engine",
            "translate",
            "tiny",
            "--timings",
            "--print-stats",
        ])
        .args(options)
        .args(["--", "true"])
        .stdin(Stdio::null());
    let output = command
        .output()
        .with_context(|| format!("cannot start `{}`", shell::line(&command)))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("`{}` failed: {}", shell::line(&command), errors.trim());
    }
    Ok(errors
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .collect())
}

/// The first number under this key, however deep.
fn find_number(value: &Value, key: &str) -> Option<f64> {
    match value {
        Value::Object(fields) => {
            let own = fields.get(key).and_then(Value::as_f64);
            own.or_else(|| fields.values().find_map(|field| find_number(field, key)))
        }
        Value::Array(items) => items.iter().find_map(|item| find_number(item, key)),
        _ => None,
    }
}

/// What the process of a booted machine holds besides the guest's memory, in bytes.
fn memory(strata: &Path) -> Result<u64> {
    let mut command: Command = shell::command(strata);
    command
        .args([
            "run",
            "--net",
            "none",
            // Nobody may look into a jailed process.
            "--no-jail",
            "--engine",
            "translate",
            "tiny",
            "--",
            "sh",
            "-c",
            "echo ready; cat",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start `{}`", shell::line(&command)))?;
    let mut line = String::new();
    let output = child.stdout.take().context("its output is ours")?;
    BufReader::new(output)
        .read_line(&mut line)
        .context("cannot read its output")?;
    let smaps = smaps_of_both(child.id()).context("cannot see its memory");
    // The end of its input ends the command, and with it the machine.
    drop(child.stdin.take());
    child.wait().context("cannot wait for it")?;
    if line.trim_end() != "ready" {
        bail!("`{}` did not boot", shell::line(&command));
    }
    Ok(resident_beyond_guest(&smaps?))
}

/// The mappings of a process and of its children: a machine has a process of its own.
fn smaps_of_both(pid: u32) -> Result<String> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let mut smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    for child in children.split_whitespace() {
        smaps.push_str(&fs::read_to_string(format!("/proc/{child}/smaps"))?);
    }
    Ok(smaps)
}

/// Sums the proportional sizes of all mappings but the guest's memory.
fn resident_beyond_guest(smaps: &str) -> u64 {
    let mut guest = false;
    let mut kib = 0;
    for line in smaps.lines() {
        if let Some(size) = line.strip_prefix("Pss:") {
            let size: u64 = size
                .trim()
                .trim_end_matches(" kB")
                .parse()
                .unwrap_or_default();
            kib += if guest { 0 } else { size };
        } else if line
            .split_whitespace()
            .next()
            .is_some_and(|word| word.contains('-') && !word.ends_with(':'))
        {
            guest = line.contains(GUEST_MEMORY);
        }
    }
    kib << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_the_guest_is_left_out() {
        let smaps = "7f00-7f10 rw-p 0 00:00 0 [heap]\nSize: 8 kB\nPss:    4 kB\nPss_Dirty: 9 kB\nVmFlags: rd\n\
            7f20-7f30 rw-s 0 00:01 5 /memfd:strata-ram (deleted)\nPss: 1000 kB\n7f40-7f50 r-xp 0 08:01 9 /bin/strata\nPss: 2 kB\n";
        assert_eq!(resident_beyond_guest(smaps), 6 << 10);
    }

    #[test]
    fn a_binary_has_a_loaded_part() {
        let test = fs::read(std::env::current_exe().unwrap()).unwrap();
        let (loaded, rest) = sizes(&test).unwrap();
        assert_eq!(loaded + rest, test.len() as u64);
        assert!(loaded > 1 << 16);
        assert_eq!(sizes(b"text"), None);
    }

    #[test]
    fn numbers_are_found_at_any_depth() {
        let value: Value =
            serde_json::from_str(r#"[{"a": 1}, {"vcpus": [{"translation-ns": 7.5}]}]"#).unwrap();
        assert_eq!(find_number(&value, "translation-ns"), Some(7.5));
        assert_eq!(find_number(&value, "b"), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
    }
}
