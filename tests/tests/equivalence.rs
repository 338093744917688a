//! The guest suite says the same on the translator and on its reference configuration, and what the manuals say; on
//! KVM the lab runs the same images, and this test too where `/dev/kvm` is of use.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use strata_tests::{Finished, Need, Strata, ready, shared, skip};

/// What a guest writes to the exit device when all is as expected makes this status.
const ALL_RIGHT: i32 = 1;

/// The image, written once per test process.
fn image_here() -> PathBuf {
    static IMAGE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = IMAGE.get_or_init(|| {
        let directory = shared().scratch();
        let path = directory.path().join("suite");
        let status = Command::new(shared().built("strata-guest-suite"))
            .arg(&path)
            .status()
            .expect("the suite's program is built with the tests");
        assert!(status.success());
        shared().give(&path);
        (directory, path)
    });
    path.clone()
}

/// Every guest with its number of CPUs.
fn guests() -> Vec<(String, u32)> {
    let output = Command::new(shared().built("strata-guest-suite"))
        .output()
        .expect("the suite's program is built with the tests");
    let guest = |line: &str| {
        let (name, cpus) = line.split_once(' ')?;
        Some((name.to_owned(), cpus.parse().ok()?))
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(guest)
        .collect()
}

fn run(name: &str, cpus: u32, options: &[&str]) -> Finished {
    Strata::new()
        .args(["run", "--memory", "128M", "--debug-exit", "--on-reboot"])
        .args(["exit", "--cpus", &cpus.to_string()])
        .args(["--append", &format!("{name} {cpus}")])
        .args([
            "--kernel".into(),
            shared().seen(&image_here()).into_os_string(),
        ])
        .args(options.iter().copied())
        .timeout(Duration::from_secs(60))
        .run()
}

/// Runs the guests `which` chooses on both configurations.
fn equal(which: impl Fn(&str) -> bool) {
    if !ready(Need::Program) {
        return;
    }
    let chosen: Vec<_> = guests()
        .into_iter()
        .filter(|(name, _)| which(name))
        .collect();
    assert!(!chosen.is_empty());
    for (name, cpus) in chosen {
        let translated = run(&name, cpus, &["--engine", "translate"]).expect(ALL_RIGHT);
        let last = format!("{name}: ");
        assert!(
            translated
                .text()
                .lines()
                .any(|line| line.starts_with(&last) && line.ends_with(" 0 wrong")),
            "{name} says no sum: {}",
            translated.text()
        );
        let reference = run(&name, cpus, &["--engine", "translate", "--reference"]);
        let reference = reference.expect(ALL_RIGHT);
        assert_eq!(translated.text(), reference.text(), "{name}");
    }
}

#[test]
fn paging_and_exceptions_are_the_same_everywhere() {
    equal(|name| ["paging", "exceptions", "msrs"].contains(&name));
}

#[test]
fn interrupts_and_timers_are_the_same_everywhere() {
    equal(|name| ["interrupts", "timers", "debug"].contains(&name));
}

#[test]
fn code_and_state_are_the_same_everywhere() {
    equal(|name| ["code", "compat", "fpu", "real", "strings"].contains(&name));
}

#[test]
fn several_cpus_are_the_same_everywhere() {
    equal(|name| name == "smp");
}

#[test]
fn kvm_says_the_same() {
    if !ready(Need::Program) {
        return;
    }
    // Not by way of the harness, which hides the device.
    let strata = |arguments: &[&str]| {
        let mut command = Command::new(shared().built("strata"));
        let output = command.args(arguments).output();
        let output = output.expect("the program is built with the tests");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let info: serde_json::Value =
        serde_json::from_str(&strata(&["info", "--json"])).expect("it is JSON");
    if info["host"]["kvm"]["usable"].as_bool() != Some(true) {
        return skip("this host has no KVM of use; `cargo xtask lab` runs the suite on one");
    }
    let directory = tempfile::tempdir().expect("a directory can be made");
    let image = directory.path().join("suite");
    fs::copy(image_here(), &image).expect("the image can be copied");
    let image = image.to_string_lossy().into_owned();
    for (name, cpus) in guests() {
        let says = |engine: &str| {
            let (append, cpus) = (format!("{name} {cpus}"), cpus.to_string());
            let text = strata(&[
                "run",
                "--engine",
                engine,
                "--memory",
                "128M",
                "--debug-exit",
                "--on-reboot",
                "exit",
                "--cpus",
                &cpus,
                "--append",
                &append,
                "--kernel",
                &image,
            ]);
            // What only one engine's model has is absent on the other, and the sum says so.
            let line = |line: &&str| !line.ends_with(" absent") && !line.starts_with(&name);
            text.lines()
                .filter(line)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let (translated, kvm) = (says("translate"), says("kvm"));
        let wrong: Vec<_> = kvm
            .iter()
            .filter(|line| !translated.contains(line))
            .collect();
        assert!(!kvm.is_empty() && wrong.is_empty(), "{name}: {wrong:?}");
    }
}
