//! A guest can be wrong, never the host: a slice of the campaign `hostile`, always from the same seed.

use std::process::Command;

/// Longer runs are noted in docs/campaigns.tsv.
const SECONDS: &str = "120";

#[test]
fn hostile_guests_do_the_host_no_harm() {
    if let Err(error) = strata_engine_dbt::check_host() {
        eprintln!("not run: {error}");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_hostile"))
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
    assert!(cases.is_some_and(|cases| cases >= 100), "{text}");
}
