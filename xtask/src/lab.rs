//! `cargo xtask lab`: the KVM engine proven end to end on hosts without a usable `/dev/kvm`.
//!
//! QEMU's translator emulates a CPU with AMD's virtualisation; in it runs Debian's kernel with its own KVM, and in that
//! the KVM engine: first its unit tests, then machines that boot `tiny`. Slow, and the real thing.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::bench::initrd::push;
use crate::phases::Phases;
use crate::test::TARGETS;
use crate::{guest, setup, shell};

mod suite;

/// Options of `cargo xtask lab`.
#[derive(Args, Clone)]
pub struct LabArguments {
    /// How many CPUs the machines inside have, one run for each.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    cpus: Vec<u32>,
    /// Leave the engine's unit tests out.
    #[arg(long)]
    no_tests: bool,
    /// Run nothing but the engine's unit tests.
    #[arg(long, conflicts_with_all = ["cpus", "no_tests", "suite_only"])]
    tests_only: bool,
    /// Run nothing but the guest suite.
    #[arg(long, conflicts_with_all = ["cpus", "no_tests"])]
    suite_only: bool,
    /// Give up an outer machine after this many seconds.
    #[arg(long, default_value_t = 300)]
    patience: u64,
    /// Build with the whole workspace, as the tests do: nothing is built anew after them.
    #[arg(long, hide = true)]
    workspace: bool,
}

/// What the outer machine's memory and QEMU itself take, in MiB.
const MEMORY_MIB: u64 = 3072 + 512;

/// Installs what the lab needs, and says why it cannot run here if it cannot.
pub fn obstacle() -> Option<String> {
    if let Err(error) = setup::ensure(setup::BENCH_TOOLS) {
        return Some(error.to_string());
    }
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    available
        .map(|kib| kib / 1024)
        .filter(|&mib| mib < MEMORY_MIB)
        .map(|mib| {
            format!(
                "its outer machine needs {MEMORY_MIB} MiB of memory, and {mib} MiB are available"
            )
        })
}

/// The lab as a part of the tests: whole, with what they have built, and the kernel of their image.
pub fn run_in_tests() -> Result<()> {
    let mut command = shell::command(own_path()?);
    command.args(["lab", "--workspace"]);
    let cache = shell::target_dir().join("debug/e2e/cache");
    if cache.join("images/tiny.json").is_file() {
        command.env("STRATA_CACHE", cache);
    }
    shell::run(&mut command)
}

/// Where this program is. The build of the tests may have replaced its file, of which Linux says that it is deleted.
fn own_path() -> Result<PathBuf> {
    let path = env::current_exe().context("xtask has no path")?;
    let replaced = path
        .to_str()
        .and_then(|path| path.strip_suffix(" (deleted)"));
    Ok(replaced.map(PathBuf::from).unwrap_or(path))
}

/// What the script in the outer machine says when a check has passed.
const PASS: &str = "lab: pass ";
/// Modes of files in the RAM disk.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
/// Seconds for one machine inside. On an idle host it takes ten to twenty.
const BOOT_LIMIT: u32 = 120;
/// The check that the guest suite says the same as on the translator.
const SUITE: &str = "guest suite";
/// Where the dynamic linker looks by itself: a machine's process has no environment that says more.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
/// What it says last.
const DONE: &str = "lab: done";

impl LabArguments {
    /// The numbers of CPUs of the machines to boot.
    fn machines(&self) -> &[u32] {
        if self.tests_only || self.suite_only {
            &[]
        } else {
            &self.cpus
        }
    }

    /// Whether the engine's unit tests run.
    fn tests(&self) -> bool {
        !self.no_tests && !self.suite_only
    }

    /// What each outer machine runs. They are fresh ones, because QEMU's emulation has stood still in one that had
    /// run much before.
    fn parts(&self) -> Vec<LabArguments> {
        let tests = self.tests().then(|| LabArguments {
            tests_only: true,
            ..self.clone()
        });
        let machines = self.machines().iter().map(|&cpus| LabArguments {
            cpus: vec![cpus],
            no_tests: true,
            ..self.clone()
        });
        let suite = (!self.tests_only).then(|| LabArguments {
            suite_only: true,
            ..self.clone()
        });
        tests.into_iter().chain(machines).chain(suite).collect()
    }
}

/// Builds everything, runs the outer machine, and judges what it printed.
pub fn run(arguments: &LabArguments) -> Result<ExitCode> {
    let mut phases = Phases::default();
    phases.run("set-up", || {
        setup::ensure(setup::IMAGE_TOOLS)?;
        setup::ensure(setup::BENCH_TOOLS)
    })?;
    let (strata, tests, suite) = phases.run("build", || -> Result<_> {
        let built = Built::build(arguments.workspace)?;
        let tests = arguments.tests().then_some(built.tests);
        Ok((built.strata, tests, suite::Suite::make(&built.suite)?))
    })?;
    let kernel = guest::tiny_kernel(&strata)?;
    let tiny = guest::tiny_initrd(&strata)?;
    let mut passed = Vec::new();
    for part in arguments.parts() {
        let script = script(&part, &suite);
        let files = Files {
            strata: &strata,
            tests: tests.as_deref(),
            suite: &suite.image,
            kernel: &kernel,
            tiny: &tiny,
        };
        let initrd = outer_initrd(&script, &files)?;
        let name = format!("outer machine: {}", checks(&part).join(", "));
        let seen = phases.run(&name, || watch(&kernel, &initrd, part.patience))?;
        passed.extend(seen.passed);
        if part.suite_only && suite.judge(&strata, &seen.said)? {
            passed.push(SUITE.to_owned());
        }
    }
    phases.print();
    let missing: Vec<String> = checks(arguments)
        .into_iter()
        .filter(|check| !passed.contains(check))
        .collect();
    if missing.is_empty() {
        println!("lab: PASSED: {}", passed.join(", "));
        return Ok(ExitCode::SUCCESS);
    }
    println!("lab: FAILED: {}", missing.join(", "));
    Ok(ExitCode::FAILURE)
}

/// The names of all checks, as the script prints them.
fn checks(arguments: &LabArguments) -> Vec<String> {
    let mut checks = Vec::new();
    if arguments.tests() {
        checks.push("unit tests".to_owned());
    }
    for cpus in arguments.machines() {
        checks.push(format!("console with {cpus} CPUs"));
        checks.push(format!("command with {cpus} CPUs"));
    }
    if arguments.suite_only || arguments.parts().iter().any(|part| part.suite_only) {
        checks.push(SUITE.to_owned());
    }
    checks
}

/// Programs of this workspace that the lab needs.
struct Built {
    strata: PathBuf,
    /// The unit tests of the KVM engine.
    tests: PathBuf,
    /// What writes the guest suite's image.
    suite: PathBuf,
}

impl Built {
    /// Builds them, of these packages alone or with the whole workspace.
    fn build(workspace: bool) -> Result<Built> {
        let mut command = shell::cargo();
        command.args(["build", "--message-format=json-render-diagnostics"]);
        if workspace {
            command.args(TARGETS);
        } else {
            for package in ["strata", "strata-engine-kvm", "strata-guest-suite"] {
                command.args(["--package", package]);
            }
            command.args(["--bins", "--lib", "--tests"]);
        }
        let output = command
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("cannot start cargo")?;
        if !output.status.success() {
            bail!("`{}` failed ({})", shell::line(&command), output.status);
        }
        let messages: Vec<Value> = String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let program = |name: &str, test: bool| {
            let of = |message: &&Value| {
                message["target"]["name"] == name && message["profile"]["test"] == test
            };
            let path = |message: &Value| Some(PathBuf::from(message["executable"].as_str()?));
            messages
                .iter()
                .filter(of)
                .find_map(path)
                .with_context(|| format!("cargo names no program {name}"))
        };
        Ok(Built {
            strata: program("strata", false)?,
            tests: program("strata_engine_kvm", true)?,
            suite: program("strata-guest-suite", false)?,
        })
    }
}

/// What the outer machine is given.
struct Files<'a> {
    strata: &'a Path,
    tests: Option<&'a Path>,
    suite: &'a Path,
    kernel: &'a Path,
    tiny: &'a Path,
}

/// The RAM disk of the outer machine: that of `tiny`, with the lab's files on top.
fn outer_initrd(script: &str, files: &Files) -> Result<PathBuf> {
    let &Files {
        strata,
        tests,
        suite,
        kernel,
        tiny,
    } = files;
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    // The kernel unpacks archives one after the other; later files replace earlier ones.
    let mut archive = read(tiny)?;
    archive.resize(archive.len().next_multiple_of(4), 0);
    for directory in ["lab", "lib", LIBRARIES, "lib64"] {
        push(&mut archive, directory, DIRECTORY, &[])?;
    }
    push(&mut archive, "init", PROGRAM, script.as_bytes())?;
    push(&mut archive, "lab/suite", PROGRAM, &read(suite)?)?;
    push(&mut archive, "lab/kernel", PROGRAM, &read(kernel)?)?;
    push(&mut archive, "lab/initrd", PROGRAM, &read(tiny)?)?;
    push(&mut archive, "lab/strata", PROGRAM, &read(strata)?)?;
    if let Some(tests) = tests {
        push(&mut archive, "lab/tests", PROGRAM, &read(tests)?)?;
    }
    for library in libraries(strata)? {
        let name = library
            .file_name()
            .context("a library without a name")?
            .to_string_lossy()
            .into_owned();
        // The dynamic linker is named by its whole path in every program.
        let directory = if name.starts_with("ld-linux") {
            "lib64"
        } else {
            LIBRARIES
        };
        push(
            &mut archive,
            &format!("{directory}/{name}"),
            PROGRAM,
            &read(&library)?,
        )?;
    }
    let package = kernel_package(strata)?;
    for module in [
        "virt/lib/irqbypass",
        "arch/x86/kvm/kvm",
        "arch/x86/kvm/kvm-amd",
    ] {
        let name = Path::new(module)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let module = from_package(&package, &format!("/kernel/{module}.ko"))?;
        push(&mut archive, &format!("lab/{name}.ko"), PROGRAM, &module)?;
    }
    push(&mut archive, "TRAILER!!!", 0, &[])?;
    let directory = shell::target_dir().join("lab");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let path = directory.join("initrd");
    fs::write(&path, archive).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The first program of the outer machine.
fn script(arguments: &LabArguments, suite: &suite::Suite) -> String {
    let mut script = String::from(
        "#!/bin/sh\n\
         export PATH=/bin HOME=/tmp XDG_RUNTIME_DIR=/run\n\
         mount -t devtmpfs dev /dev\n\
         exec </dev/console >/dev/console 2>&1\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp; mount -t tmpfs run /run\n\
         for module in irqbypass kvm kvm-amd; do insmod /lab/$module.ko || echo \"lab: no $module\"; done\n\
         /lab/strata info\n\
         passed() { echo \"lab: pass $1\"; }\n",
    );
    if arguments.tests() {
        script
            .push_str("STRATA_KVM_REQUIRED=1 /lab/tests --test-threads 1 && passed 'unit tests'\n");
    }
    for cpus in arguments.machines() {
        let run = format!(
            "timeout {BOOT_LIMIT} /lab/strata run --engine kvm --cpus {cpus} --kernel /lab/kernel --initrd /lab/initrd"
        );
        let append = "console=ttyS0 cryptomgr.notests panic=-1";
        script.push_str(&format!(
            "{run} --append '{append} strata.run=\"uname -a\"' >/tmp/out; code=$?\n\
             if grep \"^Linux.*$(uname -r)\" /tmp/out && [ $code = 0 ]; then passed 'console with {cpus} CPUs'\n\
             else echo \"exit status $code, the console's last lines:\"; tail -n 20 /tmp/out; fi\n\
             {run} --append '{append} quiet strata.agent=1' -- sh -c 'nproc; exit 7' >/tmp/out; code=$?\n\
             echo \"exit status $code, CPUs $(cat /tmp/out)\"\n\
             [ $code = 7 ] && [ \"$(cat /tmp/out)\" = {cpus} ] && passed 'command with {cpus} CPUs'\n",
        ));
    }
    if arguments.suite_only {
        script.push_str(&suite.script());
    }
    script.push_str(&format!("echo '{DONE}'\npoweroff -f\n"));
    script
}

/// The shared libraries a program needs, the dynamic linker among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = shell::output(shell::command("ldd").arg(program))?;
    // `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`.
    let path = |line: &str| {
        line.split_whitespace()
            .find(|word| word.starts_with('/'))
            .map(PathBuf::from)
    };
    Ok(output.lines().filter_map(path).collect())
}

/// The package that `tiny`'s kernel came from, in the cache that `strata` builds images with.
fn kernel_package(strata: &Path) -> Result<PathBuf> {
    let find = || -> Result<Option<PathBuf>> {
        let releases = guest::cache()?.join("apt");
        let mut found = Vec::new();
        for release in fs::read_dir(&releases).into_iter().flatten().flatten() {
            for package in fs::read_dir(release.path().join("packages"))
                .into_iter()
                .flatten()
                .flatten()
            {
                let name = package.file_name().to_string_lossy().into_owned();
                if name.starts_with("linux-image-") && name.ends_with(".deb") {
                    found.push(package.path());
                }
            }
        }
        found.sort();
        Ok(found.pop())
    };
    if let Some(package) = find()? {
        return Ok(package);
    }
    // An image that came without its packages: building it fetches them.
    shell::run(shell::command(strata).args(["image", "build", "tiny"]))?;
    find()?.context("the image cache holds no kernel package")
}

/// One file of a package, by the end of its path.
fn from_package(package: &Path, suffix: &str) -> Result<Vec<u8>> {
    let mut unpack = shell::command("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let archive = unpack.stdout.take().context("dpkg-deb has no output")?;
    let output = shell::command("tar")
        .args(["-xO", "--wildcards"])
        .arg(format!("*{suffix}"))
        .stdin(archive)
        .output()
        .context("cannot start tar")?;
    unpack.wait().context("cannot wait for dpkg-deb")?;
    if !output.status.success() || output.stdout.is_empty() {
        bail!("{} has no file *{suffix}", package.display());
    }
    Ok(output.stdout)
}

/// What an outer machine printed.
#[derive(Default)]
struct Seen {
    /// Checks that passed.
    passed: Vec<String>,
    /// What guests of the suite said.
    said: Vec<String>,
}

/// Runs the outer machine, prints its console, and returns what counts.
fn watch(kernel: &Path, initrd: &Path, patience: u64) -> Result<Seen> {
    let mut command = shell::command("timeout");
    command.arg(patience.to_string()).arg("qemu-system-x86_64");
    command.args([
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-smp",
        "1",
        "-m",
        "3072",
    ]);
    command.args([
        "-nographic",
        "-nodefaults",
        "-serial",
        "stdio",
        "-no-reboot",
    ]);
    command.args(["-append", "console=ttyS0 quiet cryptomgr.notests panic=-1"]);
    command
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start the outer machine")?;
    let mut output = BufReader::new(
        child
            .stdout
            .take()
            .context("the outer machine has no output")?,
    );
    let start = Instant::now();
    let (mut seen, mut done, mut line) = (Seen::default(), false, Vec::new());
    while output
        .read_until(b'\n', &mut line)
        .is_ok_and(|length| length > 0)
    {
        let text: String = String::from_utf8_lossy(&line)
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        if let Some(said) = text.strip_prefix(suite::SAYS) {
            seen.said.push(said.to_owned());
        } else {
            println!("  {:>6.1} {text}", start.elapsed().as_secs_f64());
        }
        seen.passed
            .extend(text.strip_prefix(PASS).map(str::to_owned));
        done |= text == DONE;
        line.clear();
    }
    child.wait().context("cannot wait for the outer machine")?;
    if !done {
        println!(
            "lab: the outer machine ended early, after {} s",
            start.elapsed().as_secs()
        );
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_can_pass_every_check() {
        let arguments = LabArguments {
            cpus: vec![1, 3],
            no_tests: false,
            tests_only: false,
            suite_only: false,
            patience: 1,
            workspace: false,
        };
        let script = script(&arguments, &suite::Suite::default());
        for check in checks(&arguments) {
            let passes = script.contains(&format!("passed '{check}'"));
            assert!(passes || check == SUITE, "{check}");
        }
        assert!(script.contains(DONE));
    }
}
