//! Networks that machines share: they meet there by name, VLANs are apart, and the switch ends with its last machine.

use std::thread;
use std::time::{Duration, Instant};

use strata_tests::{Need, Session, Strata, ready};

/// Processes of the switch of this network.
fn switches(network: &str) -> usize {
    let is_switch = |line: &[u8]| line == format!("strata\0machine\0{network}\0").as_bytes();
    let processes = std::fs::read_dir("/proc").expect("there are processes");
    processes
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| is_switch(line))
        .count()
}

fn network(words: &[&str]) -> Strata {
    Strata::new().args(["network"]).args(words.iter().copied())
}

#[test]
fn machines_meet_by_name_and_vlans_are_apart() {
    if !ready(Need::Machine) {
        return;
    }
    network(&["create", "meeting", "--subnet", "10.77.5.1/24"])
        .run()
        .expect(0);
    let web = "mkdir /w; echo from web > /w/index.html; httpd -p 80 -h /w; echo up; cat";
    let command = [
        "run",
        "tiny",
        "--name",
        "meeting-web",
        "--net",
        "meeting",
        "--",
        "sh",
        "-c",
        web,
    ];
    let mut web = Session::start(&Strata::new().args(command));
    web.expect("up\n");
    assert_eq!(switches("meeting"), 1);
    let twin = [
        "run",
        "tiny",
        "--name",
        "meeting-web2",
        "--net",
        "meeting,mac=02:00:00:00:00:05",
        "--",
        "sh",
        "-c",
    ];
    let script = "wget -q -O - http://meeting-web/ && ping -c 2 -s 30000 meeting-web.meeting | grep -c 'bytes from'; \
        ip addr show dev eth0 | grep -o '10.77.5.[0-9]*/24'; cat /sys/class/net/eth0/address";
    let text = Strata::new()
        .args(twin)
        .args([script])
        .run()
        .expect(0)
        .text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.first(), Some(&"from web"), "{text}");
    assert_eq!(lines.get(1), Some(&"2"), "{text}");
    assert_eq!(lines.get(2), Some(&"10.77.5.3/24"), "{text}");
    assert_eq!(lines.get(3), Some(&"02:00:00:00:00:05"), "{text}");
    // In another VLAN there is nobody, even for one who knows the addresses.
    let far = [
        "run",
        "tiny",
        "--name",
        "meeting-far",
        "--net",
        "meeting,vlan=7",
        "--",
        "sh",
        "-c",
    ];
    let script = "ip addr add 10.77.5.9/24 dev eth0; ping -c 1 -W 2 10.77.5.2; ping -c 1 -W 2 10.77.5.1; true";
    let text = Strata::new()
        .args(far)
        .args([script])
        .run()
        .expect(0)
        .text();
    assert_eq!(text.matches("100% packet loss").count(), 2, "{text}");
    web.signal("TERM");
    web.finish();
    let end = Instant::now() + Duration::from_secs(30);
    while switches("meeting") > 0 {
        assert!(Instant::now() < end, "the switch stays without machines");
        thread::sleep(Duration::from_millis(50));
    }
    network(&["rm", "meeting"]).run().expect(0);
}

#[test]
fn networks_are_made_listed_and_removed() {
    if !ready(Need::Program) {
        return;
    }
    network(&["create", "listed", "--subnet", "10.77.6.1/24"])
        .run()
        .expect(0);
    network(&["create", "listed"]).run().expect_error(
        73,
        &["a network 'listed' already", "strata network rm listed"],
    );
    network(&["create", "other", "--subnet", "10.77.6.200/25"])
        .run()
        .expect_error(64, &["overlaps 10.77.6.1/24"]);
    network(&["create", "user"])
        .run()
        .expect_error(64, &["'user' has a meaning of its own"]);
    let listed = network(&["ls"]).run().expect(0).text();
    assert!(
        listed.contains("listed") && listed.contains("10.77.6.1/24"),
        "{listed}"
    );
    network(&["rm", "listed"]).run().expect(0);
    network(&["rm", "listed"])
        .run()
        .expect_error(66, &["there is no network 'listed'"]);
    let run = ["run", "--kernel", "/dev/null", "--net", "listed"];
    Strata::new().args(run).run().expect_error(
        66,
        &[
            "there is no network 'listed'",
            "strata network create listed",
        ],
    );
}
