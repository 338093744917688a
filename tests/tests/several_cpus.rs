//! Machines with several virtual CPUs: all of them are there, share work, and end together.

use std::time::Duration;

use strata_tests::{Need, Strata, ready};

/// Starts everything at once that a small system has for processors to quarrel about: processes, pipes, shared pages.
const QUARREL: &str = "seq 20000 > /tmp/data; for i in 1 2 3 4 5 6 7 8; do \
                       (for j in 1 2 3 4 5; do sort -n /tmp/data | sha256sum; done) & done > /tmp/sums; wait; \
                       nproc; wc -l < /tmp/sums; sort -u /tmp/sums | wc -l; dmesg | grep -c 'clocksource tsc'";

#[test]
fn every_processor_is_used() {
    if !ready(Need::Machine) {
        return;
    }
    for cpus in ["2", "4"] {
        let run = Strata::new()
            .args(["run", "tiny", "--cpus", cpus, "--", "sh", "-c", QUARREL])
            .timeout(Duration::from_secs(120))
            .run()
            .expect(0);
        // All forty sums are there and equal, and the time-stamp counter is still trusted.
        assert_eq!(run.text(), format!("{cpus}\n40\n1\n1\n"));
    }
}

#[test]
fn more_processors_than_the_host_has() {
    if !ready(Need::Machine) {
        return;
    }
    let script = "nproc; for c in $(seq 0 15); do taskset -c $c true && echo ran; done | wc -l";
    let run = Strata::new()
        .args(["run", "tiny", "--cpus", "16", "--", "sh", "-c", script])
        .timeout(Duration::from_secs(120))
        .run()
        .expect(0);
    assert_eq!(run.text(), "16\n16\n");
}

#[test]
fn lock_step_is_for_one_processor() {
    Strata::new()
        .args(["run", "tiny", "--cpus", "2", "--lockstep=1000"])
        .run()
        .expect_error(64, &["lock-step"]);
}
