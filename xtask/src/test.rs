//! `cargo xtask test`: set-up, checks, build, all tests, the lab, and a summary that hides nothing.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::phases::Phases;
use crate::setup::{self, Runner};
use crate::{guest, lab, shell, tidy};

/// The environment variable that names the file to which a test that cannot run here appends `name<TAB>reason`.
const SKIPS_VARIABLE: &str = "STRATA_TEST_SKIPS";

/// The environment variable that names the static guest benchmark for the tests that run it in a machine.
const BENCH_VARIABLE: &str = "STRATA_GUEST_BENCH";

/// The name of the phase, and of the filter, for machines on the KVM engine.
const LAB: &str = "lab";

/// How many of the slowest tests are shown.
const SLOWEST: usize = 10;

/// Options of `cargo xtask test`.
#[derive(Args)]
pub struct TestArguments {
    /// Only tests whose name contains one of these; formatting and lints are left out then.
    filters: Vec<String>,
}

/// One test that ran.
#[derive(Debug, PartialEq)]
struct Case {
    name: String,
    seconds: f64,
    failed: bool,
}

/// One test that did not run, and why.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Skip {
    name: String,
    reason: String,
}

/// Everything that was found out.
#[derive(Default)]
struct Report {
    cases: Vec<Case>,
    skips: Vec<Skip>,
    /// Checks that are no tests (formatting, lints, the lab), and whether each passed.
    checks: Vec<(&'static str, bool)>,
}

/// Runs all of it. Fails only after everything has been reported.
pub fn run(arguments: &TestArguments) -> Result<ExitCode> {
    let mut phases = Phases::default();
    let mut report = Report::default();
    let runner = phases.run("set-up", || -> Result<Runner> {
        setup::ensure(setup::IMAGE_TOOLS)?;
        setup::ensure(setup::TEST_TOOLS)?;
        setup::ensure_components()?;
        Ok(setup::ensure_runner())
    })?;
    if arguments.filters.is_empty() {
        let formatted = phases.run("formatting", || {
            passes(shell::cargo().args(["fmt", "--all", "--check"]))
        });
        report.checks.push(("formatting", formatted));
        let linted = phases.run("lints", || {
            passes(shell::cargo().args([
                "clippy",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ]))
        });
        report.checks.push(("lints", linted));
    }
    let bench = phases.run("guest programs", || guest::build("strata-guest-bench"))?;
    let built = phases.run("build", build);
    report.checks.push(("build", built));
    if built {
        phases.run("tests", || {
            run_tests(&runner, &arguments.filters, &bench, &mut report)
        })?;
        // By itself: an emulated machine on a busy host is too slow for what runs in it.
        if arguments.filters.is_empty() || arguments.filters.iter().any(|name| name == LAB) {
            phases.run(LAB, || report.add_lab());
        }
    }
    phases.print();
    Ok(report.print())
}

/// Runs a check with our output; a message says what failed.
fn passes(command: &mut Command) -> bool {
    match shell::run(command) {
        Ok(()) => true,
        Err(error) => {
            eprintln!("error: {error:#}");
            false
        }
    }
}

/// Everything but doc tests and examples, the same for building and for running.
pub const TARGETS: [&str; 4] = ["--workspace", "--bins", "--lib", "--tests"];

/// Builds every test, and the binaries that the end-to-end tests run. Not by the test runner, which would leave those out,
/// and in one go, so that nothing is built twice with different features.
fn build() -> bool {
    passes(shell::cargo().arg("build").args(TARGETS))
}

fn cargo_with(runner: &Runner) -> Command {
    let mut command = shell::cargo();
    if let Runner::Nextest(Some(bin)) = runner {
        let mut path = OsString::from(bin);
        if let Some(rest) = env::var_os("PATH") {
            path.push(":");
            path.push(rest);
        }
        command.env("PATH", path);
    }
    command
}

/// Runs the tests and reads what happened.
fn run_tests(runner: &Runner, filters: &[String], bench: &Path, report: &mut Report) -> Result<()> {
    let skips = shell::target_dir().join("test-skips.tsv");
    fs::write(&skips, "").with_context(|| format!("cannot write {}", skips.display()))?;
    match runner {
        Runner::Nextest(_) => {
            let junit = shell::root().join("target/nextest/default/junit.xml");
            // Of an earlier run; the runner keeps it here wherever Cargo's target directory is.
            let _ = fs::remove_file(&junit);
            let mut command = cargo_with(runner);
            command
                .args(["nextest", "run", "--cargo-quiet", "--no-tests", "pass"])
                .args(TARGETS)
                .args(filters);
            let passed = passes(
                command
                    .env(SKIPS_VARIABLE, &skips)
                    .env(BENCH_VARIABLE, bench),
            );
            let xml = fs::read_to_string(&junit)
                .with_context(|| format!("the test runner left no {}", junit.display()))?;
            report.cases = parse_junit(&xml);
            if !passed && !report.cases.iter().any(|case| case.failed) {
                report.checks.push(("test runner", false));
            }
        }
        Runner::CargoTest => {
            let mut command = shell::cargo();
            command
                .args(["test", "--no-fail-fast"])
                .args(TARGETS)
                .arg("--")
                .args(filters);
            let output = command
                .env(SKIPS_VARIABLE, &skips)
                .env(BENCH_VARIABLE, bench)
                .stderr(std::process::Stdio::inherit())
                .output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            print!("{text}");
            report.cases = parse_libtest(&text);
            if !output.status.success() && !report.cases.iter().any(|case| case.failed) {
                report.checks.push(("test runner", false));
            }
        }
    }
    let skipped = parse_skips(&fs::read_to_string(&skips)?);
    report.cases.retain(|case| {
        case.failed
            || !skipped
                .iter()
                .any(|skip| case.name.ends_with(&format!(" {}", skip.name)))
    });
    report.skips = skipped;
    if filters.is_empty() {
        report.skips.extend(ignored_tests(&shell::root())?);
    }
    report.skips.sort();
    Ok(())
}

impl Report {
    /// Runs the lab, or notes why it cannot run here.
    fn add_lab(&mut self) {
        match lab::obstacle() {
            Some(reason) => self.skips.push(Skip {
                name: LAB.to_owned(),
                reason,
            }),
            None => {
                let result = lab::run_in_tests();
                if let Err(error) = &result {
                    eprintln!("error: {error:#}");
                }
                self.checks.push((LAB, result.is_ok()));
            }
        }
    }

    /// Prints the summary, whose last line has the counts; formatting, lints, build and lab count as one each.
    fn print(&self) -> ExitCode {
        let mut slowest: Vec<&Case> = self.cases.iter().collect();
        slowest.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        if slowest.iter().any(|case| case.seconds > 0.0) {
            println!("\nslowest tests");
            for case in slowest.iter().take(SLOWEST) {
                println!("  {:>8.2} s  {}", case.seconds, case.name);
            }
        }
        if !self.skips.is_empty() {
            println!("\nskipped");
            for skip in &self.skips {
                println!("  {}: {}", skip.name, skip.reason);
            }
        }
        let failed: Vec<&str> = self
            .checks
            .iter()
            .filter(|(_, passed)| !passed)
            .map(|(name, _)| *name)
            .chain(
                self.cases
                    .iter()
                    .filter(|case| case.failed)
                    .map(|case| case.name.as_str()),
            )
            .collect();
        if !failed.is_empty() {
            println!("\nfailed");
            for name in &failed {
                println!("  {name}");
            }
        }
        let total = self.checks.len() + self.cases.len();
        println!(
            "\n{} passed, {} failed, {} skipped",
            total - failed.len(),
            failed.len(),
            self.skips.len()
        );
        if failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Reads the runner's JUnit file: `<testcase name=… classname=… time=…>` with a `<failure` or `<error` inside when it failed.
fn parse_junit(xml: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    for piece in xml.split("<testcase ").skip(1) {
        let Some((head, body)) = piece.split_once('>') else {
            continue;
        };
        let attribute = |name: &str| -> String {
            let key = format!("{name}=\"");
            let start = if head.starts_with(&key) {
                Some(key.len())
            } else {
                head.find(&format!(" {key}")).map(|at| at + 1 + key.len())
            };
            let value = start
                .and_then(|start| head.get(start..))
                .and_then(|rest| rest.split('"').next());
            value
                .unwrap_or_default()
                .replace("&lt;", "<")
                .replace("&gt;", ">")
                .replace("&amp;", "&")
        };
        let inside = if head.ends_with('/') {
            ""
        } else {
            body.split("</testcase>").next().unwrap_or_default()
        };
        cases.push(Case {
            name: format!("{} {}", attribute("classname"), attribute("name")),
            seconds: attribute("time").parse().unwrap_or_default(),
            failed: inside.contains("<failure") || inside.contains("<error"),
        });
    }
    cases
}

/// Reads `test NAME ... ok|FAILED` lines of the plain test harness.
fn parse_libtest(text: &str) -> Vec<Case> {
    let case = |line: &str| {
        let (name, verdict) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
        let failed = match verdict {
            "ok" => false,
            "FAILED" => true,
            _ => return None,
        };
        Some(Case {
            name: format!("test {name}"),
            seconds: 0.0,
            failed,
        })
    };
    text.lines().filter_map(case).collect()
}

/// Reads what tests noted that found they cannot run here; a test that notes several times counts once.
fn parse_skips(text: &str) -> Vec<Skip> {
    let unique: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .collect();
    unique
        .into_iter()
        .map(|(name, reason)| Skip {
            name: name.to_owned(),
            reason: reason.to_owned(),
        })
        .collect()
}

/// Finds the tests marked `#[ignore = "reason"]` in the sources.
fn ignored_tests(root: &Path) -> Result<Vec<Skip>> {
    let mut skips = Vec::new();
    for path in tidy::tracked_files(root)? {
        if path.extension().is_some_and(|extension| extension == "rs") {
            let Ok(text) = fs::read_to_string(root.join(&path)) else {
                continue;
            };
            skips.extend(ignored_in(&path, &text));
        }
    }
    Ok(skips)
}

fn ignored_in(path: &Path, text: &str) -> Vec<Skip> {
    let place: PathBuf = path.to_path_buf();
    let mut skips = Vec::new();
    let mut reason = None;
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("#[ignore") {
            reason = Some(
                rest.split('"')
                    .nth(1)
                    .unwrap_or("no reason given")
                    .to_owned(),
            );
        } else if let Some(name) = line
            .strip_prefix("fn ")
            .and_then(|rest| rest.split('(').next())
            && let Some(reason) = reason.take()
        {
            skips.push(Skip {
                name: format!("{} {name}", place.display()),
                reason,
            });
        }
    }
    skips
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junit_files_are_read() {
        let xml = r#"<testsuite name="a"><testcase name="x::y" classname="a::b" timestamp="t" time="0.250"></testcase>
            <testcase name="z" classname="a" time="1.5"><failure type="f">boom</failure></testcase><testcase name="q" classname="a" time="0.1"/></testsuite>"#;
        let cases = parse_junit(xml);
        let found: Vec<_> = cases
            .iter()
            .map(|case| (case.name.as_str(), case.seconds, case.failed))
            .collect();
        assert_eq!(
            found,
            [
                ("a::b x::y", 0.25, false),
                ("a z", 1.5, true),
                ("a q", 0.1, false)
            ]
        );
    }

    #[test]
    fn plain_test_output_is_read() {
        let cases = parse_libtest(
            "running 3 tests\ntest a ... ok\ntest b::c ... FAILED\ntest d ... ignored, later\n",
        );
        let found: Vec<_> = cases
            .iter()
            .map(|case| (case.name.as_str(), case.failed))
            .collect();
        assert_eq!(found, [("test a", false), ("test b::c", true)]);
    }

    #[test]
    fn skips_and_ignored_tests_keep_their_reason() {
        assert_eq!(
            parse_skips("boot\tno user namespaces\nboot\tno user namespaces\n"),
            [Skip {
                name: "boot".into(),
                reason: "no user namespaces".into()
            }]
        );
        // Put together so that this file is not taken for one with an ignored test.
        let text = format!(
            "#[test]\n#[{} = \"needs a day\"]\nfn long() {{}}\n#[test]\nfn short() {{}}\n",
            "ignore"
        );
        assert_eq!(
            ignored_in(Path::new("a.rs"), &text),
            [Skip {
                name: "a.rs long".into(),
                reason: "needs a day".into()
            }]
        );
    }
}
