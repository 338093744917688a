//! Tests of the switch as a whole: who gets which frame.

use super::*;

const A: Mac = Mac {
    0: [2, 0, 0, 0, 0, 0xa],
};
const B: Mac = Mac {
    0: [2, 0, 0, 0, 0, 0xb],
};

fn frame(to: Mac, from: Mac, rest: &[u8]) -> Frame {
    let mut bytes = [to.0, from.0].concat();
    bytes.extend(rest);
    bytes.resize(bytes.len().max(60), 0);
    Frame::new(&bytes)
}

/// EtherType of an experiment, with a mark.
fn plain(to: Mac, from: Mac) -> Frame {
    frame(to, from, &[0x88, 0xb5, 1, 2, 3])
}

fn tagged(to: Mac, from: Mac, control: u16) -> Frame {
    let mut frame = plain(to, from);
    frame.push_tag(packet::ethertype::VLAN, control);
    frame
}

fn vid(id: u16) -> Vid {
    Vid::new(id).unwrap()
}

fn access(id: u16) -> PortConfig {
    PortConfig {
        vlan: VlanMode::Access(vid(id)),
        ..PortConfig::default()
    }
}

fn trunk(native: Option<u16>, allowed: &[u16]) -> PortConfig {
    PortConfig {
        vlan: VlanMode::Trunk {
            native: native.map(vid),
            allowed: allowed.iter().map(|&id| vid(id)).collect(),
        },
        ..PortConfig::default()
    }
}

fn switch(ports: impl IntoIterator<Item = PortConfig>) -> (Switch, Vec<PortId>) {
    let mut switch = Switch::new(SwitchConfig::default(), Time::ZERO);
    let ids = ports
        .into_iter()
        .map(|config| switch.add_port(config, Time::ZERO).unwrap())
        .collect();
    (switch, ids)
}

fn all(switch: &mut Switch, port: PortId) -> Vec<Frame> {
    std::iter::from_fn(|| switch.take(port, Time::ZERO)).collect()
}

#[test]
fn unknown_addresses_are_flooded_and_known_ones_are_not() {
    let (mut switch, ports) = switch([access(1), access(1), access(1)]);
    switch.receive(ports[0], plain(B, A), Time::ZERO);
    assert_eq!(all(&mut switch, ports[0]), []);
    assert_eq!(all(&mut switch, ports[1]), [plain(B, A)]);
    assert_eq!(all(&mut switch, ports[2]), [plain(B, A)]);
    switch.receive(ports[1], plain(A, B), Time::ZERO);
    assert_eq!(all(&mut switch, ports[0]), [plain(A, B)]);
    assert_eq!(all(&mut switch, ports[2]), []);
    // Behind the port that it came from.
    switch.receive(ports[1], plain(B, A), Time::ZERO);
    switch.receive(ports[1], plain(A, B), Time::ZERO);
    let counters = switch.counters(ports[1]).unwrap();
    assert_eq!(counters.dropped(DropReason::NoReceiver), 2);
}

#[test]
fn addresses_age() {
    let (mut switch, ports) = switch([access(1), access(1), access(1)]);
    switch.receive(ports[1], plain(A, B), Time::ZERO);
    let later = Time::ZERO.after(Duration::from_secs(301));
    assert!(switch.next_deadline() <= later);
    switch.tick(later);
    assert!(switch.addresses().is_empty());
    switch.receive(ports[0], plain(B, A), later);
    assert_eq!(all(&mut switch, ports[2]).len(), 2);
}

#[test]
fn one_port_cannot_fill_the_table() {
    let (mut switch, ports) = switch([access(1), access(1)]);
    for number in 0..20_000u32 {
        let [a, b, c, d] = number.to_be_bytes();
        switch.receive(
            ports[0],
            plain(B, Mac::from_bytes(&[2, 9, a, b, c, d])),
            Time::ZERO,
        );
    }
    assert_eq!(switch.addresses().len(), 1024);
    assert!(switch.counters(ports[0]).unwrap().not_learned > 18_000);
    switch.receive(ports[1], plain(A, B), Time::ZERO);
    assert_eq!(switch.addresses().len(), 1025);
}

#[test]
fn a_removed_port_leaves_nothing() {
    let (mut switch, ports) = switch([access(1), access(1), access(1)]);
    switch.receive(ports[0], plain(B, A), Time::ZERO);
    switch.remove_port(ports[0]);
    assert_eq!(all(&mut switch, ports[1]), []);
    assert!(switch.addresses().is_empty());
    switch.receive(ports[0], plain(B, A), Time::ZERO);
    assert_eq!(switch.add_port(access(1), Time::ZERO).unwrap(), ports[0]);
}

#[test]
fn vlans_are_apart_and_a_trunk_sees_both() {
    let (mut switch, ports) = switch([
        access(10),
        access(20),
        trunk(None, &[10, 20]),
        trunk(Some(20), &[]),
        trunk(None, &[30]),
    ]);
    switch.receive(ports[0], plain(Mac::BROADCAST, A), Time::ZERO);
    assert_eq!(all(&mut switch, ports[1]), []);
    let seen = all(&mut switch, ports[2]);
    assert_eq!(seen[0].bytes(), tagged(Mac::BROADCAST, A, 10).bytes());
    assert_eq!(all(&mut switch, ports[3]), []);
    assert_eq!(all(&mut switch, ports[4]), []);
    // Tagged with a priority: it arrives untagged at the access port, and untagged at the native trunk.
    switch.receive(
        ports[2],
        tagged(Mac::BROADCAST, B, 5 << 13 | 20),
        Time::ZERO,
    );
    assert_eq!(all(&mut switch, ports[0]), []);
    assert_eq!(
        all(&mut switch, ports[1])[0].bytes(),
        plain(Mac::BROADCAST, B).bytes()
    );
    assert_eq!(
        all(&mut switch, ports[3])[0].bytes(),
        plain(Mac::BROADCAST, B).bytes()
    );
    assert_eq!(switch.queue_counters(ports[1]).unwrap()[5].frames, 1);
    // A tag on an access port, a VLAN outside the trunk, no tag and no native VLAN.
    switch.receive(ports[0], tagged(B, A, 10), Time::ZERO);
    switch.receive(ports[4], tagged(B, A, 10), Time::ZERO);
    switch.receive(ports[2], plain(B, A), Time::ZERO);
    for port in [ports[0], ports[4], ports[2]] {
        assert_eq!(switch.counters(port).unwrap().dropped(DropReason::Vlan), 1);
    }
}

#[test]
fn a_priority_is_kept_from_trunk_to_trunk() {
    let (mut switch, ports) = switch([trunk(None, &[7, 4094]), trunk(None, &[7, 4094])]);
    for control in [6 << 13 | 7, 1 << 13 | 4094, 7] {
        switch.receive(ports[0], tagged(B, A, control), Time::ZERO);
        let out = all(&mut switch, ports[1]);
        assert_eq!(packet::tag(out[0].bytes()), Some((0x8100, control)));
    }
}

#[test]
fn customers_tags_pass_a_tunnel() {
    let tunnel = |id| PortConfig {
        vlan: VlanMode::Tunnel(vid(id)),
        ..PortConfig::default()
    };
    let (mut switch, ports) = switch([
        tunnel(100),
        tunnel(200),
        trunk(None, &[100, 200]),
        tunnel(100),
    ]);
    let customer = tagged(Mac::BROADCAST, A, 3 << 13 | 42);
    switch.receive(ports[0], customer.clone(), Time::ZERO);
    assert_eq!(all(&mut switch, ports[1]), []);
    assert_eq!(all(&mut switch, ports[3])[0].bytes(), customer.bytes());
    let double = all(&mut switch, ports[2]).remove(0);
    assert_eq!(packet::tag(double.bytes()), Some((0x8100, 3 << 13 | 100)));
    let mut inner = double.clone();
    inner.pop_tag();
    assert_eq!(inner.bytes(), customer.bytes());
    // And the way back.
    let mut back = tagged(A, B, 42);
    back.push_tag(packet::ethertype::SERVICE_VLAN, 100);
    switch.receive(ports[2], back, Time::ZERO);
    assert_eq!(
        all(&mut switch, ports[0])[0].bytes(),
        tagged(A, B, 42).bytes()
    );
}

#[test]
fn isolated_ports_see_only_others() {
    let isolated = || PortConfig {
        isolated: true,
        ..access(1)
    };
    let (mut switch, ports) = switch([isolated(), isolated(), access(1)]);
    switch.receive(ports[0], plain(Mac::BROADCAST, A), Time::ZERO);
    assert_eq!(all(&mut switch, ports[1]), []);
    assert_eq!(all(&mut switch, ports[2]).len(), 1);
    switch.receive(ports[1], plain(A, B), Time::ZERO);
    assert_eq!(all(&mut switch, ports[0]), []);
    switch.receive(
        ports[2],
        plain(A, Mac::from_bytes(&[2, 0, 0, 0, 0, 3])),
        Time::ZERO,
    );
    assert_eq!(all(&mut switch, ports[0]).len(), 1);
}

#[test]
fn what_no_bridge_forwards_is_counted() {
    let (mut switch, ports) = switch([access(1), access(1)]);
    let spanning_tree = Mac::from_bytes(&[0x01, 0x80, 0xc2, 0, 0, 0]);
    switch.receive(ports[0], plain(spanning_tree, A), Time::ZERO);
    switch.receive(ports[0], plain(B, Mac::BROADCAST), Time::ZERO);
    switch.receive(ports[0], Frame::new(&[1, 2, 3]), Time::ZERO);
    switch.receive(ports[0], Frame::new(&vec![2; MAX_FRAME + 1]), Time::ZERO);
    let counters = switch.counters(ports[0]).unwrap();
    assert_eq!(counters.dropped(DropReason::Reserved), 1);
    assert_eq!(counters.dropped(DropReason::BadSource), 1);
    assert_eq!(counters.dropped(DropReason::Malformed), 2);
    assert_eq!(counters.dropped_total(), 4);
    assert_eq!(all(&mut switch, ports[1]), []);
}

#[test]
fn egress_waits_for_its_rate() {
    let slow = PortConfig {
        egress: Limit {
            bytes: Some(Rate {
                per_second: 60_000,
                burst: 60,
            }),
            packets: None,
        },
        ..access(1)
    };
    let (mut switch, ports) = switch([access(1), slow]);
    for _ in 0..100 {
        switch.receive(ports[0], plain(B, A), Time::ZERO);
    }
    let mut now = Time::ZERO;
    let mut count = 0;
    while count < 100 {
        match switch.take(ports[1], now) {
            Some(_) => count += 1,
            None => {
                let next = switch.next_deadline();
                assert!(next > now);
                now = next;
                switch.tick(now);
                assert_eq!(switch.next_ready(), Some(ports[1]));
            }
        }
    }
    // 100 frames of 60 bytes at 60,000 bytes a second, the first at once.
    let expected = Duration::from_millis(99);
    assert!(now.since(Time::ZERO).abs_diff(expected) < Duration::from_millis(1));
}

#[test]
fn a_storm_is_limited() {
    let limited = PortConfig {
        flood: Some(Rate {
            per_second: 100,
            burst: 10,
        }),
        ..access(1)
    };
    let (mut switch, ports) = switch([limited, access(1)]);
    for _ in 0..50 {
        switch.receive(ports[0], plain(Mac::BROADCAST, A), Time::ZERO);
    }
    assert_eq!(all(&mut switch, ports[1]).len(), 10);
    let dropped = switch
        .counters(ports[0])
        .unwrap()
        .dropped(DropReason::FloodLimit);
    assert_eq!(dropped, 40);
}
