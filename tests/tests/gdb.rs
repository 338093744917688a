//! A machine under gdb, the real one: a small guest of a few instructions, and Debian's kernel.

use std::fs;

use strata_tests::{Finished, Need, Strata, ready, shared};

/// Where the small guest is loaded.
const BASE: u32 = 0x10_0000;

/// Counts in EAX and at 0x200000 until 0x201000 is not zero, then ends the machine with status 7.
const CODE: [u8; 22] = [
    0x31, 0xc0, // 10000c: xor eax, eax
    0x40, // 10000e: inc eax
    0xa3, 0, 0, 0x20, 0, // 10000f: mov [0x200000], eax
    0x83, 0x3d, 0, 0x10, 0x20, 0, 0, // 100014: cmp dword [0x201000], 0
    0x74, 0xf1, // 10001b: je 10000e
    0xb0, 3, // 10001d: mov al, 3
    0xe6, 0xf4, // 10001f: out 0xf4, al
    0xf4, // 100021: hlt
];

/// An ELF file of 32 bits with one segment: a multiboot header, and the code.
fn kernel() -> Vec<u8> {
    let header: [u32; 3] = [0x1bad_b002, 0, 0x1bad_b002_u32.wrapping_neg()];
    let mut segment: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    segment.extend(CODE);
    let size = segment.len() as u32;
    let mut elf = b"\x7fELF\x01\x01\x01".to_vec();
    elf.resize(16, 0);
    let half = |elf: &mut Vec<u8>, words: &[u16]| {
        elf.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    let word = |elf: &mut Vec<u8>, words: &[u32]| {
        elf.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    half(&mut elf, &[2, 3]);
    word(&mut elf, &[1, BASE + 12, 52, 0, 0]);
    half(&mut elf, &[52, 32, 1, 0, 0, 0]);
    word(&mut elf, &[1, 84, BASE, BASE, size, size, 7, 1]);
    elf.extend(segment);
    elf
}

/// The small guest in a file, as the program under test names it, and the directory that holds it.
fn counter() -> (tempfile::TempDir, String) {
    let directory = shared().scratch();
    let path = directory.path().join("counter.elf");
    fs::write(&path, kernel()).expect("a scratch file");
    let seen = shared().seen(&path).display().to_string();
    (directory, seen)
}

/// Runs `strata run MACHINE` under gdb with these commands; what gdb printed, and the status of strata in the end.
fn debug(machine: &str, commands: &[&str]) -> Finished {
    let mut script = format!(
        "command -v gdb >/dev/null || exit 42; place=$(mktemp -d); \
         strata run --gdb $place/gdb {machine} 2>$place/errors & \
         until grep -q 'waiting for gdb' $place/errors; do kill -0 $! || {{ cat $place/errors >&2; exit 99; }}; sleep 0.05; done; \
         timeout 60 gdb -nx -batch -ex 'set architecture i386:x86-64' -ex \"target remote $place/gdb\""
    );
    for command in commands {
        script.push_str(&format!(" -ex '{command}'"));
    }
    script.push_str(" 2>&1; wait $!; echo \"status $?\"; rm -r $place");
    Strata::shell(&script).run()
}

/// False, and said, where there is no gdb.
fn found(run: &Finished) -> bool {
    if run.code() == Some(42) {
        strata_tests::skip("gdb is not installed");
        return false;
    }
    true
}

#[track_caller]
fn says(run: &Finished, parts: &[&str]) {
    let text = run.text();
    let mut rest = text.as_str();
    for part in parts {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => panic!("no `{part}` there in\n{text}\n{}", run.stderr),
        }
    }
}

#[test]
fn breakpoints_steps_memory_and_the_end() {
    if !ready(Need::Program) {
        return;
    }
    let (_directory, kernel) = counter();
    let machine = format!("--debug-exit --engine translate --kernel {kernel}");
    let run = debug(
        &machine,
        &[
            "info threads",
            "break *0x100014",
            "continue",
            "print $eax",
            "continue",
            "continue",
            "print $eax",
            "x/1wx 0x200000",
            "stepi",
            "stepi",
            "print/x $rip",
            // It is not in the guest's code.
            "x/2bx 0x100014",
            "set var $eax = 1000",
            "continue",
            "print $eax",
            "delete",
            "set {int}0x201000 = 1",
            "continue",
        ],
    );
    if !found(&run) {
        return;
    }
    let parts = [
        "CPU 0",
        "0x000000000010000c",
        "Breakpoint 1",
        "$1 = 1",
        "Breakpoint 1",
        "Breakpoint 1",
        "$2 = 3",
        "0x200000:\t0x00000003",
        "$3 = 0x10000e",
        "0x100014:\t0x83\t0x3d",
        "Breakpoint 1",
        "$4 = 1001",
        "exited normally",
        "status 7",
    ];
    says(&run, &parts);
}

#[test]
fn ctrl_c_stops_and_kill_ends_the_machine() {
    if !ready(Need::Program) {
        return;
    }
    let (_directory, kernel) = counter();
    let machine = format!("--engine translate --kernel {kernel}");
    let run = debug(
        &machine,
        &[
            // gdb is the parent of its shell.
            "shell (sleep 1; kill -INT $PPID) &",
            "continue",
            "print $eax > 1000",
            "kill",
        ],
    );
    if !found(&run) {
        return;
    }
    says(&run, &["SIGINT", "$1 = 1", "status 0"]);
}

#[test]
fn a_kernel_stops_at_its_system_call() {
    if !ready(Need::Machine) {
        return;
    }
    let symbols = Strata::new()
        .args(["run", "tiny", "--append", "nokaslr", "--"])
        .args(["grep", " __do_sys_newuname$", "/proc/kallsyms"])
        .run()
        .expect(0)
        .text();
    let address = symbols.split(' ').next().expect("an address");
    let at = format!("hbreak *0x{address}");
    let run = debug(
        "--engine translate tiny --append nokaslr -- uname -s",
        &[&at, "continue", "print/x $rip", "stepi", "delete", "detach"],
    );
    if !found(&run) {
        return;
    }
    let rip = format!("$1 = 0x{address}");
    says(
        &run,
        &["Breakpoint 1", &rip, "detached", "Linux", "status 0"],
    );
}
