//! Whatever a guest, a file or a client says, nothing panics, hangs or grows: a slice of the campaign `fuzz`, always from
//! the same seed, after the whole corpus.

use std::process::Command;

/// The issue of longer runs is noted in docs/campaigns.tsv.
const SECONDS: &str = "15";

#[test]
fn no_input_does_harm() {
    let output = Command::new(env!("CARGO_BIN_EXE_fuzz"))
        .args(["--seconds", SECONDS, "--seed", "1"])
        .output()
        .expect("the campaign starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    let cases = text
        .lines()
        .find_map(|line| line.strip_prefix("campaign: ")?.split(' ').next())
        .and_then(|cases| cases.parse::<u64>().ok());
    assert!(cases.is_some_and(|cases| cases >= 1000), "{text}");
}
