//! What the command line promises without starting a machine: refusals in one clear sentence, and what the host offers.

use strata_tests::{Need, Strata, ready};

/// Wrong usage, as sysexits has it.
const USAGE: i32 = 64;

#[test]
fn help_names_the_commands() {
    if !ready(Need::Program) {
        return;
    }
    let help = Strata::new().args(["--help"]).run().expect(0).text();
    for command in ["run", "image", "info", "stats", "completions"] {
        assert!(help.contains(command), "`{command}` is not in:\n{help}");
    }
}

#[test]
fn a_size_without_unit_is_refused() {
    if !ready(Need::Program) {
        return;
    }
    for size in [
        "512",
        "0",
        "1.5G",
        "-1G",
        "G",
        "1X",
        "99999999999999999999G",
    ] {
        let run = Strata::new()
            .args(["run", "tiny", &format!("--memory={size}"), "--", "true"])
            .run();
        run.expect_error(USAGE, &[size]);
    }
    Strata::new()
        .args(["run", "tiny", "--memory", "512", "--", "true"])
        .run()
        .expect_error(USAGE, &["512M"]);
}

#[test]
fn a_command_without_dashes_gets_a_hint() {
    if !ready(Need::Program) {
        return;
    }
    Strata::new()
        .args(["run", "tiny", "nproc"])
        .run()
        .expect_error(USAGE, &["-- nproc"]);
}

#[test]
fn an_unknown_image_is_named() {
    if !ready(Need::Program) {
        return;
    }
    let run = Strata::new()
        .args(["run", "no-such-image", "--", "true"])
        .run();
    assert!(run.code().is_some_and(|code| code != 0));
    run.expect_no_panic();
    assert!(run.stderr.contains("no-such-image"), "{}", run.stderr);
}

#[test]
fn missing_files_are_named() {
    if !ready(Need::Program) {
        return;
    }
    for arguments in [["--kernel", "no-such-kernel"], ["--disk", "no-such-disk"]] {
        let mut line = vec!["run"];
        if arguments[0] != "--kernel" {
            line.push("tiny");
        }
        line.extend(arguments);
        let run = Strata::new().args(line).run();
        assert!(run.code().is_some_and(|code| code != 0));
        run.expect_no_panic();
        assert!(run.stderr.contains(arguments[1]), "{}", run.stderr);
    }
}

#[test]
fn info_says_which_engine_and_why() {
    if !ready(Need::Program) {
        return;
    }
    let info = Strata::new().args(["info"]).run().expect(0).text();
    assert!(info.contains("translate"), "{info}");
    let json = Strata::new()
        .args(["info", "--json"])
        .run()
        .expect(0)
        .text();
    serde_json::from_str::<serde_json::Value>(&json)
        .unwrap_or_else(|error| panic!("{error}: {json}"));
}

#[test]
fn lists_come_as_json_too() {
    if !ready(Need::Program) {
        return;
    }
    let json = Strata::new()
        .args(["image", "ls", "--json"])
        .run()
        .expect(0)
        .text();
    let value: serde_json::Value =
        serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
    assert!(value.is_array(), "{json}");
}

#[test]
fn completions_exist_for_common_shells() {
    if !ready(Need::Program) {
        return;
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = Strata::new()
            .args(["completions", shell])
            .run()
            .expect(0)
            .text();
        assert!(script.contains("strata"), "{shell}");
    }
    let check = "strata completions bash | bash -n";
    Strata::shell(check).run().expect(0);
}
