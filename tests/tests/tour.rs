//! The tour of the README, run as written.

use std::fs;
use std::path::Path;

use strata_tests::{Need, Strata, console_blocks, looks_like, ready};

#[test]
fn the_tour_is_true() {
    if !ready(Need::Machine) {
        return;
    }
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let steps = console_blocks(&fs::read_to_string(readme).expect("there is a README"));
    assert!(!steps.is_empty(), "the README has no tour");
    for (command, expected) in steps {
        let run = Strata::shell(&command).run();
        let printed = run.text();
        assert!(
            looks_like(&expected, &printed),
            "`{command}` should print\n{expected}and prints\n{printed}{}",
            run.stderr
        );
    }
}
