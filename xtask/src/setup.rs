//! Brings a Debian machine to where the other commands can run: installs the few missing tools, quickly does nothing when all is there.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::shell;

/// A program or file that a command needs, and the Debian package that has it.
#[derive(Copy, Clone)]
pub struct Tool {
    /// A program's name, or a file's absolute path.
    needed: &'static str,
    package: &'static str,
}

impl Tool {
    const fn new(needed: &'static str, package: &'static str) -> Tool {
        Tool { needed, package }
    }

    fn is_missing(&self) -> bool {
        if self.needed.starts_with('/') {
            !Path::new(self.needed).exists()
        } else {
            shell::find(self.needed).is_none()
        }
    }
}

/// What making images needs beyond Rust, git and a linker.
pub const IMAGE_TOOLS: &[Tool] = &[
    Tool::new("apt-get", "apt"),
    Tool::new("dpkg-deb", "dpkg"),
    Tool::new("gpgv", "gpgv"),
    Tool::new(
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
    ),
];

/// With what the tests become an unprivileged user, hide `/dev/kvm`, have a terminal, and make and check disk images.
pub const TEST_TOOLS: &[Tool] = &[
    Tool::new("unshare", "util-linux"),
    Tool::new("setpriv", "util-linux"),
    Tool::new("script", "bsdutils"),
    Tool::new("gdb", "gdb"),
    Tool::new("qemu-img", "qemu-utils"),
    Tool::new("mke2fs", "e2fsprogs"),
    Tool::new("sfdisk", "fdisk"),
];

/// The peer that the benchmark compares with.
pub const BENCH_TOOLS: &[Tool] = &[Tool::new("qemu-system-x86_64", "qemu-system-x86")];

/// The test runner; pinned, so that a release of it cannot break ours.
const NEXTEST_VERSION: &str = "0.9.143";

/// How long to wait for another package manager that holds a lock.
const LOCK_WAIT: Duration = Duration::from_secs(300);

/// Installs what is missing of `tools`.
pub fn ensure(tools: &[Tool]) -> Result<()> {
    let missing: Vec<Tool> = tools.iter().copied().filter(Tool::is_missing).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs = join(missing.iter().map(|tool| tool.needed));
    let mut packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    packages.sort_unstable();
    packages.dedup();
    if shell::find("apt-get").is_none() {
        bail!(
            "{programs} missing, and this is not a Debian system: install them with its package manager"
        );
    }
    let Some(privilege) = Privilege::find()? else {
        bail!(
            "{programs} missing, and installing needs root: type `sudo apt-get install -y {}`",
            packages.join(" ")
        );
    };
    eprintln!("installing {}", packages.join(", "));
    if !lists_present() {
        privilege.apt_get(&["update"])?;
    }
    let mut install = vec!["install", "-y", "--no-install-recommends"];
    install.extend(&packages);
    // Lists may be so old that the package's version is gone from the mirror: refresh once, then try again.
    if privilege.apt_get(&install).is_err() {
        privilege.apt_get(&["update"])?;
        privilege.apt_get(&install)?;
    }
    if let Some(tool) = missing.iter().find(|tool| tool.is_missing()) {
        bail!(
            "{} is still missing after installing {}",
            tool.needed,
            tool.package
        );
    }
    Ok(())
}

/// Checks the parts of the Rust toolchain that are optional, and names the line to type for one that is missing.
pub fn ensure_components() -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let found = shell::cargo()
            .args([subcommand, "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !found.is_ok_and(|status| status.success()) {
            bail!(
                "the Rust toolchain lacks {component}: type `rustup component add {component}` (or `sudo apt-get install -y {component}`)"
            );
        }
    }
    Ok(())
}

/// How tests are run.
pub enum Runner {
    /// `cargo nextest`, with the directory that has to be in front of `PATH`, if any.
    Nextest(Option<std::path::PathBuf>),
    /// Plain `cargo test`: works everywhere, tells no times.
    CargoTest,
}

/// Finds the test runner, or builds it into the target directory; says so when neither works.
pub fn ensure_runner() -> Runner {
    let works = |command: &mut Command| {
        command
            .args(["nextest", "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    if works(&mut shell::cargo()) {
        return Runner::Nextest(None);
    }
    let tools = shell::target_dir().join("tools");
    let bin = tools.join("bin");
    if bin.join("cargo-nextest").is_file() {
        return Runner::Nextest(Some(bin));
    }
    eprintln!(
        "building the test runner cargo-nextest {NEXTEST_VERSION} into {} (once, some minutes)",
        tools.display()
    );
    // Not optimised and without self-update: a runner that only starts processes is built in a third of the time.
    let built = shell::run(
        shell::cargo()
            .args([
                "install",
                "--locked",
                "--debug",
                "--no-default-features",
                "--features",
                "default-no-update",
            ])
            .args(["--version", NEXTEST_VERSION, "cargo-nextest", "--root"])
            .arg(&tools)
            .env("CARGO_TARGET_DIR", tools.join("build"))
            .env("CARGO_PROFILE_DEV_DEBUG", "0"),
    );
    match built {
        Ok(()) => Runner::Nextest(Some(bin)),
        Err(error) => {
            eprintln!(
                "note: {error:#}; the tests run with plain `cargo test`, which tells no times"
            );
            Runner::CargoTest
        }
    }
}

/// How this process may change the system.
enum Privilege {
    Root,
    Sudo,
}

impl Privilege {
    /// `None` when this user may not.
    fn find() -> Result<Option<Privilege>> {
        if shell::output(shell::command("id").arg("-u").current_dir("/"))?.trim() == "0" {
            return Ok(Some(Privilege::Root));
        }
        let sudo = Command::new("sudo")
            .args(["-n", "true"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        Ok(sudo
            .is_ok_and(|status| status.success())
            .then_some(Privilege::Sudo))
    }

    /// Runs `apt-get` without questions; waits while another one holds a lock.
    fn apt_get(&self, arguments: &[&str]) -> Result<()> {
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            let mut command = match self {
                Privilege::Root => Command::new("env"),
                Privilege::Sudo => Command::new("sudo"),
            };
            if matches!(self, Privilege::Sudo) {
                command.args(["-n", "env"]);
            }
            command.args([
                "LC_ALL=C",
                "DEBIAN_FRONTEND=noninteractive",
                "apt-get",
                "-q",
            ]);
            command
                .args([
                    "-o",
                    &format!("DPkg::Lock::Timeout={}", LOCK_WAIT.as_secs()),
                ])
                .args(arguments);
            let output = command
                .stdin(Stdio::null())
                .output()
                .context("cannot start apt-get")?;
            if output.status.success() {
                return Ok(());
            }
            let errors = String::from_utf8_lossy(&output.stderr);
            // apt waits for dpkg's lock by itself but not for the one of the lists.
            if errors.contains("Could not get lock") && Instant::now() < deadline {
                thread::sleep(Duration::from_secs(2));
                continue;
            }
            bail!("apt-get {} failed: {}", arguments.join(" "), errors.trim());
        }
    }
}

/// Whether apt knows any packages: a fresh container image has no lists.
fn lists_present() -> bool {
    fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
    })
}

/// "a", "a and b", "a, b and c", followed by the verb.
fn join<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    match names.as_slice() {
        [] => String::new(),
        [one] => format!("{one} is"),
        [most @ .., last] => format!("{} and {last} are", most.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_programs_read_as_a_sentence() {
        assert_eq!(join(["cpio"].into_iter()), "cpio is");
        assert_eq!(
            join(["cpio", "xz", "cc"].into_iter()),
            "cpio, xz and cc are"
        );
    }

    #[test]
    fn nothing_missing_is_quick_and_silent() {
        ensure(&[Tool::new("sh", "dash"), Tool::new("/bin/sh", "dash")]).unwrap();
    }
}
