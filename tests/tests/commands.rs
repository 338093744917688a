//! `strata run tiny -- CMD`: output, exit statuses, signals, input, all as if the command ran here.

use std::time::Duration;

use strata_tests::{Need, Session, Strata, random_bytes, ready, sha256};

#[test]
fn uname_prints_only_the_release() {
    if !ready(Need::Machine) {
        return;
    }
    let run = Strata::tiny(["uname", "-r"]).run().expect(0);
    let text = run.text();
    let release = text.strip_suffix('\n').expect("one line");
    assert!(
        release.ends_with("-cloud-amd64") && !release.contains(char::is_whitespace),
        "{text:?}"
    );
    assert_eq!(run.stderr, "");
}

#[test]
fn exit_status_is_ours() {
    if !ready(Need::Machine) {
        return;
    }
    Strata::tiny(["sh", "-c", "exit 7"]).run().expect(7);
    Strata::tiny(["true"]).run().expect(0);
    Strata::tiny(["false"]).run().expect(1);
    Strata::tiny(["sh", "-c", "exit 255"]).run().expect(255);
}

#[test]
fn a_signal_in_the_guest_is_128_and_its_number() {
    if !ready(Need::Machine) {
        return;
    }
    Strata::tiny(["sh", "-c", "kill -TERM $$"])
        .run()
        .expect(128 + 15);
    Strata::tiny(["sh", "-c", "kill -KILL $$"])
        .run()
        .expect(128 + 9);
}

#[test]
fn a_signal_to_strata_reaches_the_command() {
    if !ready(Need::Machine) {
        return;
    }
    let script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut session = Session::start(&Strata::tiny(["sh", "-c", script]));
    session.expect("ready").signal("TERM").expect("caught");
    let (status, _) = session.finish();
    assert_eq!(status.code(), Some(9));
}

#[test]
fn what_cannot_run_is_126_or_127() {
    if !ready(Need::Machine) {
        return;
    }
    Strata::tiny(["no-such-command"])
        .run()
        .expect_error(127, &["no-such-command"]);
    Strata::tiny(["/proc/cpuinfo"])
        .run()
        .expect_error(126, &["/proc/cpuinfo"]);
}

#[test]
fn output_and_errors_stay_apart() {
    if !ready(Need::Machine) {
        return;
    }
    let run = Strata::tiny(["sh", "-c", "echo out; echo err >&2; echo more"])
        .run()
        .expect(0);
    assert_eq!(run.text(), "out\nmore\n");
    assert_eq!(run.stderr, "err\n");
}

#[test]
fn arguments_arrive_as_they_are() {
    if !ready(Need::Machine) {
        return;
    }
    let run = Strata::tiny(["printf", "%s|", "a b", "", "$HOME", "ä\n\"", "-x", "--"])
        .run()
        .expect(0);
    assert_eq!(run.text(), "a b||$HOME|ä\n\"|-x|--|");
}

#[test]
fn input_ends_when_ours_does() {
    if !ready(Need::Machine) {
        return;
    }
    assert_eq!(Strata::tiny(["cat"]).run().expect(0).text(), "");
    assert_eq!(
        Strata::tiny(["wc", "-c"])
            .stdin("hello")
            .run()
            .expect(0)
            .text()
            .trim(),
        "5"
    );
}

#[test]
fn much_input_and_output_arrives_whole() {
    if !ready(Need::Machine) {
        return;
    }
    let bytes = random_bytes(8 << 20, 5);
    let digest = sha256(&bytes);
    let time = Duration::from_secs(240);
    let counted = Strata::tiny(["sha256sum"])
        .stdin(bytes.clone())
        .timeout(time)
        .run()
        .expect(0);
    assert_eq!(
        counted.text().split_whitespace().next(),
        Some(digest.as_str())
    );
    let copied = Strata::tiny(["cat"])
        .stdin(bytes)
        .timeout(time)
        .run()
        .expect(0);
    assert_eq!(sha256(&copied.stdout), digest);
}

#[test]
fn a_command_that_ignores_its_input_does_not_hang() {
    if !ready(Need::Machine) {
        return;
    }
    Strata::tiny(["true"])
        .stdin(random_bytes(1 << 20, 7))
        .run()
        .expect(0);
}

#[test]
fn the_machine_has_what_was_asked_for() {
    if !ready(Need::Machine) {
        return;
    }
    let run = Strata::new()
        .args([
            "run",
            "tiny",
            "--memory",
            "256M",
            "--",
            "cat",
            "/proc/meminfo",
        ])
        .run()
        .expect(0);
    let text = run.text();
    let kib = text.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()
    });
    assert!(
        kib.is_some_and(|kib| (180 << 10..=256 << 10).contains(&kib)),
        "{kib:?}"
    );
    assert_eq!(Strata::tiny(["nproc"]).run().expect(0).text(), "1\n");
}

#[test]
fn several_machines_run_at_once() {
    if !ready(Need::Machine) {
        return;
    }
    let runs: Vec<_> = (0..3)
        .map(|number| {
            std::thread::spawn(move || Strata::tiny(["echo".to_owned(), number.to_string()]).run())
        })
        .collect();
    for (number, run) in runs.into_iter().enumerate() {
        assert_eq!(
            run.join().expect("it ran").expect(0).text(),
            format!("{number}\n")
        );
    }
}
