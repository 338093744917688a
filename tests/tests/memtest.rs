//! A guest that is not Linux: Debian's memtest86+ tests all of a machine's memory, told what to do on its serial console.

use std::fs;

use strata_tests::{Need, Session, Strata, WORKBENCH, ready, shared};

/// What memtest86+ says that all chosen tests have been done once, and that no word of memory was wrong.
const PASSED: &str = "Pass:  1        Errors: 0 ";

#[test]
fn memtest_finds_no_error_in_a_pass() {
    if !ready(Need::Workbench) {
        return;
    }
    let directory = shared().scratch();
    let path = directory.path().join("memtest");
    let found = Strata::new()
        .args(["run", WORKBENCH, "--", "cat", "/boot/memtest86+x64.bin"])
        .run()
        .expect(0);
    fs::write(&path, found.stdout).expect("a scratch file");
    let kernel = shared().seen(&path).display().to_string();
    let mut session = Session::start(&Strata::new().args([
        "run",
        "--memory",
        "32M",
        "--kernel",
        &kernel,
        "--append",
        "console=ttyS0,115200 nobench",
    ]));
    // The last test writes, waits for minutes, and reads: it is left out.
    session
        .expect("Pass:  0")
        .send("1")
        .expect("Test selection")
        .send("1")
        .expect("Remove one test")
        .send("2")
        .expect("Enter test #")
        .send("10\r")
        .expect(".********.")
        .send("0")
        .expect("Settings:")
        .send("0")
        .expect(PASSED);
}
