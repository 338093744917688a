//! The jail: what a machine's process cannot do, tried from inside for real, each layer also without the filter.

use serde_json::Value;
use strata_tests::{Need, Strata, ready};

/// The kernel and RAM disk are read before the attempts, so that a whole machine is there.
fn probe(how: &str) -> Vec<Value> {
    let finished = Strata::new()
        .args(["run", "tiny", "--engine", "translate", "--jail-probe", how])
        .run()
        .expect(0);
    finished
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).expect("a line of JSON for each attempt"))
        .collect()
}

/// Whether this host grants a layer; a test that needs it is skipped by name otherwise.
fn granted(layer: &str) -> bool {
    let info = Strata::new().args(["info", "--json"]).run().expect(0);
    let info: Value = serde_json::from_str(&info.text()).expect("JSON");
    let layers = info["jail"].as_array().expect("the layers of the jail");
    let found = layers
        .iter()
        .find(|found| found["name"] == layer)
        .unwrap_or_else(|| panic!("no layer {layer}: {layers:?}"));
    if let Some(reason) = found["refused"].as_str() {
        strata_tests::skip(&format!("this host refuses the layer {layer}: {reason}"));
        return false;
    }
    true
}

#[test]
fn nothing_outside_is_reached_from_inside_on_any_thread() {
    if !ready(Need::Machine) {
        return;
    }
    let attempts = probe("filtered");
    assert!(attempts.len() >= 98, "two threads try: {}", attempts.len());
    for attempt in attempts {
        assert_eq!(attempt["done"], false, "{attempt}");
        // Refused by the filter and nothing else: with an error, or the process would have been stopped.
        let refused = [1, 38].contains(&attempt["error"].as_i64().unwrap_or_default());
        assert!(refused, "{attempt}");
    }
}

#[test]
fn without_the_filter_the_other_layers_hold() {
    if !ready(Need::Machine) || !granted("namespaces") || !granted("empty-root") {
        return;
    }
    let attempts = probe("unfiltered");
    let held = [
        "open a file to read",
        "open a file to write",
        "open its own memory",
        "look at a file",
        "remove a file",
        "connect to TCP",
        "connect to a Unix socket",
        "make a raw socket",
        "run a program",
        "trace its parent",
        "read its parent's memory",
        "signal its parent",
        "signal a thread of another process",
        "mount",
        "change its root",
        "load a kernel module",
        "set the time",
        "get capabilities",
        "open a file by its handle",
        "watch performance",
    ];
    for what in held {
        let mut tried = attempts.iter().filter(|attempt| attempt["what"] == what);
        let (Some(first), Some(second)) = (tried.next(), tried.next()) else {
            panic!("{what} was not tried by two threads");
        };
        for attempt in [first, second] {
            assert_eq!(attempt["done"], false, "{attempt}");
            assert_eq!(attempt["stopped"], false, "{attempt}");
        }
    }
}

#[test]
fn a_machine_that_makes_another_system_call_is_stopped_and_said_to_be() {
    if !ready(Need::Machine) {
        return;
    }
    Strata::new()
        .args([
            "run",
            "tiny",
            "--engine",
            "translate",
            "--jail-probe",
            "stopped",
        ])
        .run()
        .expect_error(
            70,
            &["the machine was stopped by its jail: system call 437"],
        );
}

#[test]
fn a_machine_runs_in_all_layers_that_are_granted() {
    if !ready(Need::Machine) {
        return;
    }
    let info = Strata::new().args(["info", "--json"]).run().expect(0);
    let info: Value = serde_json::from_str(&info.text()).expect("JSON");
    let layers = info["jail"].as_array().expect("the layers of the jail");
    assert_eq!(layers.len(), 7, "{layers:?}");
    let refused: Vec<&str> = layers
        .iter()
        .filter(|layer| !layer["refused"].is_null() || !layer["lacks"].is_null())
        .filter_map(|layer| layer["name"].as_str())
        .collect();
    let run = Strata::new()
        .args(["run", "--require-jail", "tiny", "--", "true"])
        .run();
    if refused.is_empty() {
        run.expect(0);
    } else {
        // Strata fails around a command.
        run.expect_error(125, &refused);
    }
}

#[test]
fn a_host_that_refuses_namespaces_is_named_and_the_filter_holds() {
    if !ready(Need::Machine) || !granted("namespaces") {
        return;
    }
    // Here this host is one that refuses them.
    let script = "unshare -Ur sh -c 'echo 0 > /proc/sys/user/max_mnt_namespaces && \
        strata info && strata run tiny -- echo it runs && \
        strata run tiny --engine translate --jail-probe filtered | grep -c \"\\\"done\\\":true\"; \
        strata run --require-jail tiny -- true'";
    let run = Strata::shell(script).run();
    let text = run.text();
    let lines = [
        "namespaces          refused: No space left on device",
        "empty-root          refused: it needs namespaces",
        "system-call-filter  in place",
        "it runs",
        "\n0\n",
    ];
    for line in lines {
        assert!(text.contains(line), "no `{line}` in {text}");
    }
    let words = "this host refuses a part of the machine's jail: namespaces";
    run.expect_error(125, &[words]);
}

#[test]
fn the_environment_of_a_machine_is_empty_and_it_ends_with_the_process_in_front() {
    if !ready(Need::Machine) {
        return;
    }
    // The machine's process is the one child of the process in front.
    let script = "strata run tiny --name jailed-one -- sh -c 'echo up; sleep 100' > out & \
        while ! grep -q up out; do sleep 0.05; done; \
        machine=$(cat /proc/$!/task/$!/children); \
        test $(wc -w < /proc/$!/task/$!/children) = 1 || exit 1; \
        tr '\\0' ' ' < /proc/${machine% }/cmdline; \
        kill -KILL $!; \
        for i in $(seq 100); do test -d /proc/${machine% } || exit 0; sleep 0.05; done; exit 2";
    let finished = Strata::shell(script).run().expect(0);
    assert_eq!(finished.text(), "strata machine jailed-one ");
}

#[test]
fn the_word_of_the_machines_process_is_not_for_people() {
    if !ready(Need::Program) {
        return;
    }
    Strata::new()
        .args(["machine"])
        .run()
        .expect_error(64, &["is not for people"]);
}
