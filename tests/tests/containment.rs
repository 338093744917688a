//! Translated code stays inside its guest: every block of whole boots is proven before it runs.

use std::time::Duration;

use strata_tests::{Need, Strata, ready};

/// Boots, runs a command on every CPU, and says how many blocks were translated, all of them proven: one that is not
/// ends the machine.
fn boot(cpus: &str) -> u64 {
    let run = Strata::new()
        .args(["run", "--engine", "translate", "--verify-blocks"])
        .args(["--print-stats", "--cpus", cpus, "tiny", "--", "nproc"])
        .timeout(Duration::from_secs(240))
        .run()
        .expect(0);
    assert_eq!(run.text().trim(), cpus);
    let stats = run.stats();
    let vcpus = stats["vcpus"].as_array().expect("there are CPUs");
    let blocks = |vcpu: &serde_json::Value| vcpu["blocks-translated"].as_u64();
    vcpus.iter().filter_map(blocks).sum()
}

#[test]
fn every_block_of_a_boot_is_proven() {
    if !ready(Need::Machine) {
        return;
    }
    let blocks = boot("2");
    assert!(blocks > 20_000, "only {blocks} blocks");
}
