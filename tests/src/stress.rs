//! `stress-ng --verify` in a guest: which stressors, the script that runs them, and what came of it.

/// What is stressed, with the stressors that run at once; 0 means one of them for each CPU. Four of each do not run out of
/// 2 GiB of memory; of `memthrash`, one has a thread for each CPU.
const CLASSES: [(&str, &str); 7] = [
    (
        "cpu",
        "--cpu 0 --vecmath 0 --funccall 0 --longjmp 0 --str 0",
    ),
    (
        "memory",
        "--malloc 0 --malloc-bytes 64k --malloc-max 1024 --memcpy 0 --memthrash 1 --bsearch 0 --qsort 0",
    ),
    (
        "vm",
        "--vm 0 --vm-bytes 30% --vm-method all --vm-rw 0 --shm 0",
    ),
    (
        "signal",
        "--signal 0 --sigfpe 0 --sigsegv 0 --sigq 0 --sigfd 0 --sigrt 0 --sigpending 0 --sigsuspend 0 --sigabrt 0",
    ),
    ("fork", "--fork 0 --vfork 0 --clone 0 --exec 0"),
    (
        "mmap",
        "--mmap 0 --mmap-bytes 20% --mremap 0 --munmap 0 --madvise 0",
    ),
    (
        "atomic",
        "--atomic 0 --cacheline 0 --futex 0 --mutex 0 --membarrier 0 --switch 0",
    ),
];

/// How many classes there are.
pub const COUNT: u64 = CLASSES.len() as u64;

/// What a kernel that is in trouble says.
const TROUBLE: &str = "BUG:|Oops|WARNING:|Call Trace|general protection fault.*\\[#|stall|soft lockup|blocked for more|EXT4-fs error|I/O error|Out of memory|clocksource.*unstable";

/// A shell script for the guest: every class for so many seconds, with random numbers from `seed`; then the kernel's log.
pub fn script(seconds: u64, seed: u64) -> String {
    let mut script = String::from("mkdir -p /root/stress; cd /root/stress\n");
    for (class, stressors) in CLASSES {
        script.push_str(&format!(
            "stress-ng --verify --metrics --seed {seed} --temp-path /root/stress --timeout {seconds}s {stressors} 2>&1; \
             echo \"class {class} status $?\"\n"
        ));
    }
    script.push_str(&format!(
        "dmesg | grep -E '{TROUBLE}' | sed 's/^/kernel: /'\necho end\n"
    ));
    script
}

/// What came of a script.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Operations of all stressors.
    pub operations: u64,
    /// What is wrong, in the words of the guest.
    pub wrong: Vec<String>,
}

impl Outcome {
    /// Reads what the script printed.
    pub fn read(text: &str) -> Outcome {
        let mut outcome = Outcome::default();
        let (mut ended, mut classes) = (false, 0);
        for line in text.lines() {
            if let Some(metrics) = line.split("metrc: ").nth(1) {
                // `[PROCESS] STRESSOR OPERATIONS REAL-TIME …`
                let operations = metrics.split_whitespace().nth(2);
                outcome.operations += operations.and_then(|n| n.parse().ok()).unwrap_or(0);
            } else if let Some(class) = line.strip_prefix("class ") {
                classes += 1;
                if !class.ends_with(" status 0") {
                    outcome.wrong.push(line.to_owned());
                }
            } else if line.contains("fail: ") || line.starts_with("kernel: ") {
                outcome.wrong.push(line.to_owned());
            }
            ended |= line == "end";
        }
        if !ended || classes != COUNT {
            outcome
                .wrong
                .push(format!("it ended after {classes} classes"));
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_any_kind_are_found() {
        let good: String = CLASSES
            .iter()
            .map(|(class, _)| {
                format!("stress-ng: metrc: [1] stressor bogo ops\nstress-ng: metrc: [1] {class} 100 1.0 2.0\nclass {class} status 0\n")
            })
            .collect();
        let whole = format!("{good}end\n");
        let outcome = Outcome::read(&whole);
        assert_eq!((outcome.operations, outcome.wrong.len()), (700, 0));
        let one = |text: &str| assert_eq!(Outcome::read(text).wrong.len(), 1, "{text}");
        one(&good);
        one(&whole.replacen("status 0", "status 2", 1));
        one(&whole.replacen("class cpu", "stress-ng: fail: [1] cpu: wrong\nclass cpu", 1));
        one(&whole.replacen("end", "kernel: [1.0] BUG: unable to handle\nend", 1));
        one(&whole.replacen("class cpu status 0\n", "", 1));
    }
}
