//! Every class of the guest benchmark computes in a machine what it computes here, and each block of translated code is
//! proven before it runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use strata_tests::{Need, Strata, ready, skip};

/// Little work: it is the results that count.
const SCALE: &str = "0.002";

/// Checksums by class; `None` for a class that the CPU has not got.
fn checksums(output: &str) -> BTreeMap<String, Option<String>> {
    let read = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [class, "absent", "-"] => Some((class.to_owned(), None)),
        [class, time, checksum] if time.parse::<u64>().is_ok() => {
            Some((class.to_owned(), Some(checksum.to_owned())))
        }
        _ => None,
    };
    output.lines().filter_map(read).collect()
}

#[test]
fn every_class_computes_the_same() {
    if !ready(Need::Machine) {
        return;
    }
    let Some(program) = std::env::var_os("STRATA_GUEST_BENCH").map(PathBuf::from) else {
        skip(
            "STRATA_GUEST_BENCH does not name a static strata-guest-bench, as `cargo xtask test` makes it",
        );
        return;
    };
    let here = Command::new(&program)
        .args(["--scale", SCALE])
        .output()
        .expect("it runs here");
    let here = checksums(&String::from_utf8_lossy(&here.stdout));
    assert!(here.len() >= 24, "{here:?}");

    let bytes = std::fs::read(&program).expect("it can be read");
    let script =
        format!("cat > /tmp/bench && chmod +x /tmp/bench && exec /tmp/bench --scale {SCALE}");
    // Every block is proven to stay inside the guest before it runs.
    let run = Strata::new()
        .args(["run", "--verify-blocks", "tiny", "--"])
        .args(["sh", "-c", &script])
        .stdin(bytes)
        .timeout(Duration::from_secs(240))
        .run()
        .expect(0);
    let there = checksums(&run.text());
    for (class, checksum) in here {
        match (checksum, there.get(&class)) {
            (None, _) | (_, Some(None)) => println!("{class}: absent"),
            (Some(here), Some(Some(there))) => assert_eq!(here, *there, "{class}"),
            (Some(_), None) => panic!("{class} has no result in the machine:\n{}", run.text()),
        }
    }
}
