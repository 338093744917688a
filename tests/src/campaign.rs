//! Slices of campaigns: the same binaries, for seconds and from the same seed. Longer runs are noted in docs/campaigns.tsv.

use std::path::Path;
use std::process::Command;

/// Runs the campaign `program` for `seconds` from seed 1, which has to find nothing; returns the number of its cases.
#[track_caller]
pub fn slice(program: impl AsRef<Path>, seconds: u32) -> u64 {
    let output = Command::new(program.as_ref())
        .args(["--seconds", &seconds.to_string(), "--seed", "1"])
        .output()
        .expect("the campaign starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text.lines()
        .find_map(|line| line.strip_prefix("campaign: ")?.split(' ').next())
        .and_then(|cases| cases.parse().ok())
        .unwrap_or_else(|| panic!("it said no number of cases: {text}"))
}
