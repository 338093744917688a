//! Campaign: whole boots and every class of the guest benchmark in lock-step with the reference configuration.
//!
//! Takes `--seconds N --seed S`; the seed picks what comes first. A case is a block exit found equal. The benchmark takes
//! part if `STRATA_BENCH_INITRD` names the RAM disk that `cargo xtask bench` makes (`target/bench/initrd`).

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// What the guest does, in turns: how much work makes a class short enough to follow.
const SCALE: &str = "0.003";

fn main() -> ExitCode {
    let mut seconds = 600;
    let mut seed = 0;
    let mut arguments = std::env::args().skip(1);
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        match (name.as_str(), value.parse()) {
            ("--seconds", Ok(value)) => seconds = value,
            ("--seed", Ok(value)) => seed = value,
            _ => {
                eprintln!("lockstep: usage: lockstep --seconds N --seed S");
                return ExitCode::from(64);
            }
        }
    }
    match run(Duration::from_secs(seconds), seed) {
        Ok((cases, differences)) => {
            println!("campaign: {cases} cases, {differences} differences, seed {seed}");
            ExitCode::from(u8::from(differences > 0))
        }
        Err(error) => {
            eprintln!("lockstep: {error}");
            ExitCode::from(70)
        }
    }
}

/// Boots until the time is over. Returns block exits compared and runs that differed.
fn run(time: Duration, seed: u64) -> Result<(u64, u64), String> {
    let strata = std::env::current_exe()
        .map_err(|e| e.to_string())?
        .with_file_name("strata");
    let bench = std::env::var_os("STRATA_BENCH_INITRD");
    let end = Instant::now() + time;
    let (mut cases, mut differences, mut turn) = (0, 0, seed);
    while Instant::now() < end {
        let mut command = Command::new(&strata);
        command.args(["run", "--lockstep", "--print-stats", "--memory", "256M"]);
        match &bench {
            Some(initrd) if turn % 2 == 1 => {
                let append =
                    format!("console=ttyS0 quiet cryptomgr.notests bench.args=\"--scale {SCALE}\"");
                command
                    .arg("--initrd")
                    .arg(initrd)
                    .args(["--append", &append]);
            }
            _ => {
                let append = "console=ttyS0 quiet cryptomgr.notests strata.run=/bin/true";
                command
                    .arg("--initrd")
                    .arg(blob("initrd")?)
                    .args(["--append", append]);
            }
        }
        command.arg("--kernel").arg(blob("kernel")?);
        let output = command
            .output()
            .map_err(|e| format!("{}: {e}", strata.display()))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        if let Some(found) = errors.lines().find(|line| line.contains("lock-step")) {
            println!("{found}");
            differences += 1;
        } else if !output.status.success() {
            return Err(format!("a run failed: {errors}"));
        }
        let stats = errors
            .lines()
            .find(|line| line.starts_with('{'))
            .unwrap_or("{}");
        let stats: serde_json::Value = serde_json::from_str(stats).map_err(|e| e.to_string())?;
        let compared = stats["vcpus"][0]["compared-exits"].as_u64().unwrap_or(0);
        println!("run {turn}: {compared} block exits equal");
        cases += compared;
        turn += 1;
    }
    Ok((cases, differences))
}

/// Kernel or RAM disk of the image `tiny` in the user's cache.
fn blob(name: &str) -> Result<std::path::PathBuf, String> {
    let cache = std::env::var_os("STRATA_CACHE").map_or_else(
        || {
            std::path::PathBuf::from(std::env::var_os("HOME").unwrap_or_default())
                .join(".cache/strata")
        },
        Into::into,
    );
    let manifest = cache.join("images/tiny.json");
    let text = std::fs::read_to_string(&manifest).map_err(|e| {
        format!(
            "{}: {e}; `strata image build tiny` makes the image",
            manifest.display()
        )
    })?;
    let manifest: serde_json::Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let digest = manifest[name]["sha256"]
        .as_str()
        .ok_or("the manifest names no files")?;
    Ok(cache.join("blobs/sha256").join(digest))
}
