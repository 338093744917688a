//! The guest suite in the lab: what it says on the KVM engine, compared with what it says on the translator.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::shell;

/// How the outer machine's script begins a line that a guest said: then come its name, its CPUs and the line.
pub const SAYS: &str = "lab: says ";
/// Differences of a guest that are printed.
const SHOWN: usize = 40;
/// Seconds for one guest.
const LIMIT: u32 = 60;

/// Lines that may differ, by guest and beginning, with the reason. Features that only one model has are `absent` on the
/// other side and need no entry.
const DIFFERENCES: &[(&str, &[&str], &str)] = &[
    (
        "paging",
        &[
            "bit 51 of",
            "bit 13 of",
            "bit 20 of",
            "bit 29 of",
            "bit 63 without NXE",
            "size bit of the last table",
        ],
        "QEMU's page faults by reserved bits leave bit 0 of the error code clear",
    ),
    (
        "paging",
        &[
            "a read into the hole",
            "a pop in the hole",
            "a push in the hole",
            "RBP in the hole",
        ],
        "QEMU looks at an access's first byte only, and not at its segment",
    ),
    (
        "paging",
        &["CR8 bit 4"],
        "QEMU writes CR8 without a look at its upper bits",
    ),
    (
        "exceptions",
        &["a push in the hole"],
        "QEMU does not look at an access's segment",
    ),
    (
        "exceptions",
        &["INT1"],
        "QEMU's CPU has no such instruction",
    ),
    (
        "debug",
        &["INT1", "DR6 of INT1"],
        "QEMU's CPU has no such instruction",
    ),
    ("exceptions", &["EMMS"], "QEMU does not look at CR0 there"),
    (
        "exceptions",
        &[
            "INT to a gate that is not present",
            "INT to a gate of no type",
            "INT 0x47 by user code",
            "INT3 by user code, kernel's gate",
        ],
        "QEMU's error codes for gates are twice what they should be in long mode",
    ),
    (
        "exceptions",
        &["#NP in ", "#DF on its own stack"],
        "QEMU's CPU reports the second fault where KVM's guest has a double fault",
    ),
    (
        "exceptions",
        &["SS: null with privilege 3"],
        "QEMU takes a null SS of any privilege",
    ),
    (
        "exceptions",
        &["misaligned, with CR0.AM"],
        "QEMU checks no alignment",
    ),
    (
        "interrupts",
        &["an illegal vector is an error"],
        "KVM's local APIC has no such error",
    ),
    (
        "timers",
        &["stopped", "not with IF clear", "and comes"],
        "KVM in the lab is late with a timer that was stopped",
    ),
    (
        "compat",
        &[
            "beyond a limit",
            "beyond the stack's limit",
            "a write to code",
            "a null segment",
        ],
        "QEMU checks neither limits nor types of segments",
    ),
    (
        "real",
        &["a word at 0xffff", "its SP"],
        "QEMU checks no limits of segments",
    ),
    (
        "fpu",
        &[
            "FXSAVE: its exponent",
            "FXSAVE again",
            "FXRSTOR: a reserved bit",
            "LDMXCSR: a reserved bit",
            "MMX: exponent",
            "#MF at the next instruction",
            "status: invalid",
            "an exchange with nothing",
            "too many",
            "#XM",
            "denormal: MXCSR",
            "flush to zero",
            "without CR4.OSXMMEXCPT",
        ],
        "QEMU's FPU raises few exceptions and knows no reserved bits",
    ),
    (
        "msrs",
        &[
            "LSTAR in the hole",
            "FS base in the hole",
            "GS base in the hole",
            "kernel's GS base in the hole",
            "WRFSBASE in the hole",
        ],
        "QEMU takes any address into these registers",
    ),
    (
        "msrs",
        &["SYSCALL: flags"],
        "QEMU's SYSCALL clears more flags than it is told",
    ),
];
/// The suite's image and guests.
#[derive(Default)]
pub struct Suite {
    /// The image.
    pub image: PathBuf,
    /// Names and numbers of CPUs.
    guests: Vec<(String, String)>,
}

impl Suite {
    /// Has the image written by the suite's program.
    pub fn make(program: &Path) -> Result<Suite> {
        let directory = shell::target_dir().join("lab");
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let image = directory.join("suite");
        shell::run(shell::command(program).arg(&image))?;
        let guest = |line: &str| {
            let (name, cpus) = line.split_once(' ')?;
            Some((name.to_owned(), cpus.to_owned()))
        };
        let list = shell::output(&mut shell::command(program))?;
        Ok(Suite {
            image,
            guests: list.lines().filter_map(guest).collect(),
        })
    }

    /// What the outer machine does for it.
    pub fn script(&self) -> String {
        let run = |(name, cpus): &(String, String)| {
            format!(
                "timeout {LIMIT} /lab/strata run --engine kvm --cpus {cpus} --memory 128M --debug-exit --on-reboot exit \
                 --kernel /lab/suite --append '{name} {cpus} emulated' >/tmp/out </dev/null 2>/tmp/err; code=$?; cat /tmp/err\n\
                 sed 's/^/{SAYS}{name} {cpus} /' /tmp/out; echo \"{name} with {cpus} CPUs: status $code\"\n"
            )
        };
        self.guests.iter().map(run).collect()
    }

    /// Whether all guests said what they say on the translator; prints what differs.
    pub fn judge(&self, strata: &Path, said: &[String]) -> Result<bool> {
        let mut same = true;
        for (name, cpus) in &self.guests {
            let mut command = shell::command(strata);
            command.args(["run", "--engine", "translate", "--memory", "128M"]);
            command.args(["--debug-exit", "--on-reboot", "exit", "--cpus", cpus]);
            command.arg("--kernel").arg(&self.image);
            command.arg("--append").arg(format!("{name} {cpus}"));
            let output = command
                .output()
                .context("cannot run a guest on the translator")?;
            let translated = String::from_utf8_lossy(&output.stdout).into_owned();
            let prefix = format!("{name} {cpus} ");
            let on_kvm: Vec<&str> = said
                .iter()
                .filter_map(|line| line.strip_prefix(&prefix))
                .collect();
            let different = differences(name, &translated.lines().collect::<Vec<_>>(), &on_kvm);
            if let Some(said) = on_kvm.last() {
                println!("lab: {name} with {cpus} CPUs on KVM: {said}");
            }
            for line in different.iter().take(SHOWN) {
                println!("lab: {name} with {cpus} CPUs differs: {line}");
            }
            same &= different.is_empty();
        }
        Ok(same)
    }
}

/// The lines that are on one side only and may not be.
fn differences(guest: &str, translated: &[&str], on_kvm: &[&str]) -> Vec<String> {
    let sum = format!("{guest}: ");
    let allowed = |line: &str| {
        line.starts_with(&sum)
            || DIFFERENCES
                .iter()
                .filter(|(name, _, _)| *name == guest)
                .any(|(_, beginnings, _)| beginnings.iter().any(|text| line.starts_with(text)))
    };
    // A feature that is absent on one side takes the lines that begin with its name from the other.
    let absent: Vec<&str> = translated
        .iter()
        .chain(on_kvm)
        .filter_map(|line| line.strip_suffix(" absent"))
        .collect();
    let counts = |line: &&&str| !allowed(line) && !absent.iter().any(|name| line.starts_with(name));
    let leaves_out = on_kvm.iter().any(|line| line.ends_with(" absent"));
    let mut rest: Vec<&str> = on_kvm.iter().filter(counts).copied().collect();
    let mut different = Vec::new();
    for line in translated.iter().filter(counts) {
        match rest.iter().position(|other| other == line) {
            Some(at) => {
                rest.remove(at);
            }
            // What a guest leaves out here, it does not say.
            None if leaves_out => {}
            None => different.push(format!("translate: {line}")),
        }
    }
    different.extend(rest.iter().map(|line| format!("kvm: {line}")));
    let summed = on_kvm.iter().any(|line| line.starts_with(&sum));
    if !summed {
        different.push("kvm: it did not reach its end".to_owned());
    }
    different
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_found() {
        let one = [
            "a 0x1",
            "b 0x2",
            "x2APIC 0x1",
            "x2APIC: version 0x14",
            "g: 4 checks, 0 wrong",
        ];
        let other = [
            "a 0x1",
            "b 0x3 WRONG, not 0x2",
            "x2APIC absent",
            "g: 2 checks, 1 wrong",
        ];
        assert_eq!(
            differences("g", &one, &other),
            ["kvm: b 0x3 WRONG, not 0x2"]
        );
        assert_eq!(differences("g", &one, &one), [""; 0]);
        assert!(differences("g", &one, &one[..4])[0].contains("end"));
    }
}
