//! The life of a machine: console, shell, power-off, reboot, a panic in the guest.

use strata_tests::{Need, Session, Strata, ready};

/// The end of the console's prompt of root.
const PROMPT: &str = "# ";

#[test]
fn the_console_is_a_shell_of_root() {
    if !ready(Need::Machine) {
        return;
    }
    let mut session = Session::start(&Strata::new().args(["run", "tiny"]));
    session
        .expect(PROMPT)
        .send("echo I am $(id -u), $((6 * 7))\n")
        .expect("I am 0, 42");
    session.expect(PROMPT).send("poweroff\n");
    let (status, output) = session.finish();
    assert_eq!(status.code(), Some(0), "{output}");
}

#[test]
fn a_terminal_gets_an_escape_sequence_and_ctrl_c_goes_to_the_guest() {
    if !ready(Need::Machine) {
        return;
    }
    // `script` gives the program a terminal.
    let mut session = Session::start(&Strata::shell("script -qec 'strata run tiny' /dev/null"));
    session
        .expect("escape")
        .expect(PROMPT)
        // What is printed, not what the line editor echoes, and by the program that Ctrl-C is for: only then has the
        // shell handed the terminal over.
        .send("sh -c 'echo now $((2 + 3)); exec sleep 1000'\n")
        .expect("now 5")
        .send("\u{3}");
    session
        .expect(PROMPT)
        .send("echo still $((1 + 1))\n")
        .expect("still 2")
        .expect(PROMPT)
        .send("poweroff\n");
    let (status, output) = session.finish();
    assert_eq!(status.code(), Some(0), "{output}");
}

#[test]
fn a_command_with_a_terminal_has_one_in_the_guest() {
    if !ready(Need::Machine) {
        return;
    }
    assert_eq!(
        Strata::tiny(["sh", "-c", "test -t 0"]).run().code(),
        Some(1)
    );
    Strata::new()
        .args([
            "run",
            "-t",
            "tiny",
            "--",
            "sh",
            "-c",
            "test -t 0 && test -t 1",
        ])
        .run()
        .expect(0);
    let line = "script -qec 'strata run tiny -- sh -c \"test -t 0 && test -t 1\"' /dev/null";
    Strata::shell(line).run().expect(0);
}

#[test]
fn reboot_starts_again_or_ends() {
    if !ready(Need::Machine) {
        return;
    }
    let mut session =
        Session::start(&Strata::new().args(["run", "tiny", "--on-reboot", "restart"]));
    session
        .expect(PROMPT)
        .send("echo up $((20 + 1)); reboot\n")
        .expect("up 21")
        .expect("BusyBox");
    session
        .expect(PROMPT)
        .send("echo up $((20 + 2)); poweroff\n")
        .expect("up 22");
    assert_eq!(session.finish().0.code(), Some(0));

    let mut session = Session::start(&Strata::new().args(["run", "tiny", "--on-reboot", "exit"]));
    session.expect(PROMPT).send("reboot\n");
    assert_eq!(session.finish().0.code(), Some(0));
}

#[test]
fn a_panic_in_the_guest_is_reported_as_such() {
    if !ready(Need::Machine) {
        return;
    }
    let run = Strata::tiny([
        "sh",
        "-c",
        "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60",
    ])
    .run();
    let run = run.expect_error(125, &["the guest's kernel panicked: sysrq triggered crash"]);
    // The console's last lines follow: none was seen as it came.
    let (_, lines) = run
        .stderr
        .split_once("The console's last lines:\n")
        .unwrap_or_else(|| panic!("no lines: {}", run.stderr));
    assert!((5..=20).contains(&lines.lines().count()), "{lines}");
    assert!(lines.contains("entry_SYSCALL_64_after_hwframe"), "{lines}");
}

#[test]
fn a_panic_behind_the_console_is_reported_with_the_kernels_last_lines() {
    if !ready(Need::Machine) {
        return;
    }
    let mut session = Session::start(&Strata::new().args(["run", "tiny"]));
    session
        .expect(PROMPT)
        .send("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger\n");
    let (status, output) = session.finish();
    assert_eq!(status.code(), Some(76), "{output}");
    let parts = [
        "strata: the guest's kernel panicked: sysrq triggered crash",
        "The console's last lines:",
        "entry_SYSCALL_64_after_hwframe",
    ];
    for part in parts {
        assert!(output.contains(part), "no `{part}` in {output}");
    }
}

#[test]
fn a_kernel_of_ones_own_has_only_its_own_command_line() {
    if !ready(Need::Machine) {
        return;
    }
    let (kernel, initrd) = strata_tests::shared().tiny_files();
    let line = "console=ttyS0 panic=-1 mark=42";
    let strata = Strata::new()
        .args(["run", "--memory", "256M", "--append", line, "--kernel"])
        .args([kernel]);
    let mut session = Session::start(&strata.args(["--initrd"]).args([initrd]));
    session
        .expect("Linux version")
        .expect(&format!("Command line: {line}"))
        .expect("\n");
    assert!(
        session.last_line().ends_with("mark=42"),
        "{}",
        session.last_line()
    );
}

#[test]
fn a_machines_directory_is_private_and_goes_with_it() {
    if !ready(Need::Machine) {
        return;
    }
    let mut session = Session::start(&Strata::new().args(["run", "tiny", "--name", "private-one"]));
    session.expect(PROMPT);
    let line = "find \"$XDG_RUNTIME_DIR\" -type d -path '*private-one*' -printf '%m\\n' | sort -u";
    assert_eq!(Strata::shell(line).run().expect(0).text(), "700\n");
    session.send("poweroff\n");
    session.finish();
    assert_eq!(Strata::shell(line).run().expect(0).text(), "");
}

#[test]
fn a_running_machine_tells_its_statistics() {
    if !ready(Need::Machine) {
        return;
    }
    let mut session = Session::start(&Strata::new().args(["run", "tiny", "--name", "counted-one"]));
    session.expect(PROMPT);
    let json = Strata::new()
        .args(["stats", "counted-one", "--json"])
        .run()
        .expect(0)
        .text();
    serde_json::from_str::<serde_json::Value>(&json)
        .unwrap_or_else(|error| panic!("{error}: {json}"));
    session.send("poweroff\n");
    session.finish();
}

#[test]
fn a_machine_is_watched_until_it_ends() {
    if !ready(Need::Machine) {
        return;
    }
    let mut session = Session::start(&Strata::new().args(["run", "tiny", "--name", "watched-one"]));
    session.expect(PROMPT);
    let mut watches = [&["--json"][..], &[]].map(|more| {
        let watch = ["stats", "watched-one", "--watch", "0.2"];
        Session::start(&Strata::new().args(watch).args(more))
    });
    // Its second look: there are rates by then.
    watches[0].expect("\"halt\":").expect("\n").expect("\n");
    watches[1].expect("tlb-fills").expect("\n").expect("\n");
    session.send("poweroff\n");
    session.finish();
    let [json, lines] = watches.map(Session::finish);
    assert_eq!(json.0.code(), Some(0), "{}", json.1);
    assert_eq!(lines.0.code(), Some(0), "{}", lines.1);
    for line in json.1.lines() {
        let rates: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        assert!(rates["per-second"]["interrupts"].is_number(), "{rates}");
    }
}

#[test]
fn a_killed_machine_leaves_its_name_free() {
    if !ready(Need::Machine) {
        return;
    }
    let named = || Strata::new().args(["run", "tiny", "--name", "killed-one"]);
    let mut session = Session::start(&named());
    session.expect(PROMPT);
    let taken = named().args(["--", "true"]).run();
    assert!(
        taken.code().is_some_and(|code| code != 0),
        "a name is for one machine at a time"
    );
    session.signal("KILL");
    assert_eq!(session.finish().0.code(), None);
    named().args(["--", "true"]).run().expect(0);
}
