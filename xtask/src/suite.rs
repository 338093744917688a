//! `cargo xtask suite --from DIR`: runs ready-built conformance images and prints a table. The images are the user's:
//! multiboot or PVH kernels that report on the serial port and end through `isa-debug-exit`, such as those that
//! kvm-unit-tests and QEMU's system tests build. With kvm-unit-tests' `unittests.cfg` beside them, each section of it
//! is one row.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{guest, shell};

/// Options of `cargo xtask suite`.
#[derive(Args)]
pub struct SuiteArguments {
    /// The directory with the images.
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Only these, by name; all if none is given.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Seconds until an image counts as hanging.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    /// One instruction per block, every access through the slow path.
    #[arg(long)]
    reference: bool,
}

/// What kvm-unit-tests' images read of their machine from a module, where there is no firmware configuration device.
const ENVIRONMENT: &str = "NR_CPUS=1\nMEMSIZE=256\n";
/// More than the images are told, so that what they use as device memory is there.
const MEMORY: &str = "512M";

/// One run of an image.
struct Case {
    name: String,
    image: PathBuf,
    arguments: String,
}

/// How it ended.
struct Outcome {
    verdict: &'static str,
    /// What the image says of itself, or Strata of it.
    remark: String,
    seconds: f64,
}

/// Runs the images one after the other.
pub fn run(arguments: &SuiteArguments) -> Result<ExitCode> {
    let directory = fs::canonicalize(&arguments.from)
        .with_context(|| format!("cannot find {}", arguments.from.display()))?;
    let mut cases = cases(&directory)?;
    if !arguments.names.is_empty() {
        cases.retain(|case| arguments.names.contains(&case.name));
    }
    if cases.is_empty() {
        bail!("{} holds no such image", directory.display());
    }
    let strata = guest::build_strata()?;
    let scratch = Scratch::new()?;
    println!("| image | result | seconds | remark |\n|---|---|---|---|");
    let mut passed = 0;
    let mut refused = 0;
    for case in &cases {
        let outcome = run_case(case, &strata, &scratch, arguments)?;
        println!(
            "| {} | {} | {:.1} | {} |",
            case.name, outcome.verdict, outcome.seconds, outcome.remark
        );
        passed += usize::from(outcome.verdict == "pass");
        refused += usize::from(outcome.verdict == "skip");
    }
    println!(
        "\n{passed} of {} pass, {refused} skip themselves",
        cases.len()
    );
    Ok(ExitCode::SUCCESS)
}

/// The images of a directory: the `.flat` files, or else whatever is ELF and executable.
fn cases(directory: &Path) -> Result<Vec<Case>> {
    let mut flat = BTreeSet::new();
    let mut other = BTreeSet::new();
    for entry in
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "flat")
        {
            flat.insert(path);
        } else if is_executable_elf(&path) {
            other.insert(path);
        }
    }
    let images = if flat.is_empty() { other } else { flat };
    let sections = fs::read_to_string(directory.join("unittests.cfg")).unwrap_or_default();
    let mut cases = sections_of(&sections, directory, &images);
    for image in &images {
        if !cases.iter().any(|case| &case.image == image) {
            let name = image
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            cases.push(Case {
                name,
                image: image.clone(),
                arguments: String::new(),
            });
        }
    }
    cases.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(cases)
}

/// ELF, for x86, type EXEC (System V ABI, "ELF Header").
fn is_executable_elf(path: &Path) -> bool {
    let mut header = [0; 20];
    let read = path.is_file()
        && File::open(path)
            .and_then(|mut file| file.read_exact(&mut header))
            .is_ok();
    read && header.starts_with(b"\x7fELF")
        && header[16..18] == [2, 0]
        && matches!(header[18], 3 | 62)
}

/// The sections of `unittests.cfg` whose image is there, without those that repeat another.
fn sections_of(text: &str, directory: &Path, images: &BTreeSet<PathBuf>) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for section in text.split("\n[").skip(usize::from(!text.starts_with('['))) {
        let Some((name, body)) = section.trim_start_matches('[').split_once(']') else {
            continue;
        };
        let value = |key: &str| {
            body.lines().find_map(|line| {
                let (found, value) = line.split_once('=')?;
                (found.trim() == key).then(|| value.trim().to_owned())
            })
        };
        let Some(image) = value("file").map(|file| directory.join(file)) else {
            continue;
        };
        let arguments = value("test_args")
            .unwrap_or_default()
            .replace(['"', '\''], "");
        let repeats = cases
            .iter()
            .any(|case| case.image == image && case.arguments == arguments);
        if images.contains(&image) && !repeats {
            cases.push(Case {
                name: name.to_owned(),
                image,
                arguments,
            });
        }
    }
    cases
}

/// The line an image gets. As after a multiboot loader, its first word is the kernel's name; the one command that
/// `unittests.cfg` uses is answered when the image starts, which compares the time with its own.
fn command_line(case: &Case) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    let arguments = case.arguments.replace("`date +%s`", &now.to_string());
    format!("{} {arguments}", case.name).trim_end().to_owned()
}

/// A directory for the module and the outputs, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch> {
        let path = std::env::temp_dir().join(format!("strata-suite-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        fs::write(path.join("environment"), ENVIRONMENT)?;
        Ok(Scratch(path))
    }

    fn file(&self, name: &str) -> Result<File> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        Ok(options.open(self.0.join(name))?)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run_case(
    case: &Case,
    strata: &Path,
    scratch: &Scratch,
    arguments: &SuiteArguments,
) -> Result<Outcome> {
    let (mut output, mut errors) = (scratch.file("output")?, scratch.file("errors")?);
    let mut command = shell::command(strata);
    command
        .arg("run")
        .arg("--kernel")
        .arg(&case.image)
        .arg("--initrd")
        .arg(scratch.0.join("environment"));
    command.args([
        "--append",
        &command_line(case),
        "--memory",
        MEMORY,
        "--debug-exit",
        "--on-reboot",
        "exit",
    ]);
    if arguments.reference {
        command.arg("--reference");
    }
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(errors.try_clone()?);
    let started = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start `{}`", shell::line(&command)))?;
    let limit = Duration::from_secs(arguments.timeout);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status.code();
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let seconds = started.elapsed().as_secs_f64();
    let (output, errors) = (text(&mut output)?, text(&mut errors)?);
    std::io::stdout().flush()?;
    let (verdict, remark) = judge(status, &output, &errors);
    Ok(Outcome {
        verdict,
        remark,
        seconds,
    })
}

fn text(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Status 1 is what the device makes of 0. kvm-unit-tests adds 77 for "nothing to test here" and 127 for an exception
/// that nobody expected.
fn judge(status: Option<i32>, output: &str, errors: &str) -> (&'static str, String) {
    if let Some(error) = errors
        .lines()
        .find_map(|line| line.strip_prefix("strata: "))
    {
        return ("error", cell(error));
    }
    let lines = || output.lines().map(|line| line.trim_end_matches('\r'));
    let summary = lines()
        .find_map(|line| line.strip_prefix("SUMMARY: "))
        .unwrap_or_default();
    let failures: Vec<&str> = lines()
        .filter_map(|line| line.strip_prefix("FAIL: "))
        .collect();
    let unexpected = lines()
        .find(|line| line.starts_with("Unhandled exception"))
        .unwrap_or_default();
    let remark = [summary, unexpected]
        .into_iter()
        .chain(failures.iter().copied().take(4))
        .filter(|part| !part.is_empty());
    let remark = cell(&remark.collect::<Vec<_>>().join("; "));
    let verdict = match status {
        Some(1) => "pass",
        Some(77) => "skip",
        Some(_) => "fail",
        None => "hang",
    };
    (verdict, remark)
}

/// Text that fits a cell of the table.
fn cell(text: &str) -> String {
    let clean: String = text
        .chars()
        .map(|c| if c == '|' || c.is_control() { ' ' } else { c })
        .collect();
    clean.chars().take(160).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_name_their_images_once() {
        let text = "# comment\n[one]\nfile = a.flat\ntest_args = \"x y\"\n\n[two]\nfile = a.flat\ntest_args = 'x y'\n\n\
            [three]\nfile = a.flat\nsmp = 2\n\n[gone]\nfile = b.flat\n";
        let directory = Path::new("/suite");
        let images = BTreeSet::from([directory.join("a.flat")]);
        let cases = sections_of(text, directory, &images);
        let found: Vec<_> = cases
            .iter()
            .map(|case| (case.name.as_str(), case.arguments.as_str()))
            .collect();
        assert_eq!(found, [("one", "x y"), ("three", "")]);
    }

    #[test]
    fn outcomes_are_told_apart() {
        let output = "PASS: a\r\nFAIL: b | c\r\nSUMMARY: 2 tests, 1 unexpected failures\r\n";
        assert_eq!(
            judge(Some(3), output, ""),
            ("fail", "2 tests, 1 unexpected failures; b   c".into())
        );
        assert_eq!(judge(Some(1), "", "").0, "pass");
        assert_eq!(judge(Some(77), "SUMMARY: 0 tests\n", "").0, "skip");
        assert_eq!(judge(None, "", "").0, "hang");
        assert_eq!(
            judge(Some(65), "", "strata: cannot boot\n"),
            ("error", "cannot boot".into())
        );
    }
}
