//! Tests of the switch as a whole: who gets which frame.

use super::*;
use crate::guard::Guard;
use crate::port::Capabilities;
use crate::rate::Rate;
use crate::vlan::VlanMode;

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

fn guarded(mac: Mac, addresses: &[&str]) -> PortConfig {
    PortConfig {
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        guard: Some(Guard {
            macs: vec![mac],
            ..Guard::default()
        }),
        ..access(1)
    }
}

fn udp(source: &str, from: Mac, destination: &str, ports: (u16, u16)) -> Frame {
    let destination: IpAddr = destination.parse().unwrap();
    let way = reply::Addresses {
        source_mac: from,
        destination_mac: packet::multicast(destination).unwrap_or(B),
        source: source.parse().unwrap(),
        destination,
    };
    reply::udp(&mut Pool::new(1), way, ports, b"data").unwrap()
}

fn icmp6(source: &str, from: Mac, message: &[u8]) -> Frame {
    let all: IpAddr = "ff02::1".parse().unwrap();
    let way = reply::Addresses {
        source_mac: from,
        destination_mac: packet::multicast(all).unwrap(),
        source: source.parse().unwrap(),
        destination: all,
    };
    reply::icmp(&mut Pool::new(1), way, 255, message).unwrap()
}

#[test]
fn a_guarded_port_is_who_it_is() {
    use crate::gateway::ndp;
    let own = packet::link_local(A).to_string();
    let gateway = PortConfig {
        addresses: vec!["fe80::1/128".parse().unwrap()],
        ..access(1)
    };
    let (mut switch, ports) = switch([
        guarded(A, &["10.0.0.5/32", "fd00::5/128"]),
        access(1),
        gateway,
    ]);
    let arp = |mac, address: [u8; 4]| reply::gratuitous_arp(&mut Pool::new(1), mac, address.into());
    let told = |target: &str, mac| ndp::advertisement(target.parse().unwrap(), mac, false);
    let mut wrong_arp = arp(B, [10, 0, 0, 5]);
    packet::put(wrong_arp.bytes_mut(), 6, &A.0);
    let mut inner_tag = udp("10.0.0.5", A, "10.0.0.9", (1, 2));
    inner_tag.push_tag(packet::ethertype::VLAN, 7);
    inner_tag.push_tag(packet::ethertype::VLAN, 0);
    let cases = [
        (udp("10.0.0.5", A, "10.0.0.9", (1, 2)), None),
        (
            udp("10.0.0.5", B, "10.0.0.9", (1, 2)),
            Some(DropReason::Spoofed),
        ),
        (
            udp("10.0.0.6", A, "10.0.0.9", (1, 2)),
            Some(DropReason::Spoofed),
        ),
        (udp("0.0.0.0", A, "255.255.255.255", (68, 67)), None),
        (
            udp("0.0.0.0", A, "255.255.255.255", (68, 69)),
            Some(DropReason::Spoofed),
        ),
        (
            udp("10.0.0.5", A, "10.0.0.9", (67, 68)),
            Some(DropReason::DhcpGuard),
        ),
        (
            udp("fd00::5", A, "fd00::9", (547, 546)),
            Some(DropReason::DhcpGuard),
        ),
        (udp("fd00::5", A, "fd00::9", (5, 546)), None),
        (
            udp("fd00::6", A, "fd00::9", (5, 546)),
            Some(DropReason::Spoofed),
        ),
        (udp(&own, A, "fd00::9", (5, 546)), None),
        (
            udp("fe80::1", A, "fd00::9", (5, 546)),
            Some(DropReason::Spoofed),
        ),
        (arp(A, [10, 0, 0, 5]), None),
        (arp(A, [10, 0, 0, 1]), Some(DropReason::Spoofed)),
        (wrong_arp, Some(DropReason::Spoofed)),
        (
            icmp6(
                &own,
                A,
                &[134, 0, 0, 0, 64, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0],
            ),
            Some(DropReason::RouterGuard),
        ),
        (icmp6(&own, A, &told("fd00::5", A)), None),
        (
            icmp6(&own, A, &told("fd00::1", A)),
            Some(DropReason::Spoofed),
        ),
        (
            icmp6(&own, A, &told("fe80::1", A)),
            Some(DropReason::Spoofed),
        ),
        (
            icmp6(&own, A, &told("fd00::5", B)),
            Some(DropReason::Spoofed),
        ),
        (
            icmp6("::", A, &ndp::solicitation("fd00::5".parse().unwrap(), A)),
            None,
        ),
        (
            icmp6("::", A, &[128, 0, 0, 0, 0, 0, 0, 0]),
            Some(DropReason::Spoofed),
        ),
        (plain(B, A), Some(DropReason::Spoofed)),
        (inner_tag, Some(DropReason::Vlan)),
    ];
    for (index, (frame, reason)) in cases.into_iter().enumerate() {
        let count = |switch: &Switch| {
            let counters = switch.counters(ports[0]).unwrap();
            (
                counters.dropped_total(),
                reason.map(|reason| counters.dropped(reason)),
            )
        };
        let (total, of_reason) = count(&switch);
        switch.receive(ports[0], frame, Time::ZERO);
        let (total_after, of_reason_after) = count(&switch);
        assert_eq!(
            total_after - total,
            u64::from(reason.is_some()),
            "case {index}"
        );
        assert_eq!(
            of_reason_after,
            of_reason.map(|count| count + 1),
            "case {index}"
        );
        assert_eq!(
            all(&mut switch, ports[1]).len(),
            usize::from(reason.is_none()),
            "case {index}"
        );
    }
}

#[test]
fn link_local_addresses_belong_to_whoever_came_first() {
    let (mut switch, ports) = switch([guarded(A, &[]), guarded(B, &[]), access(1)]);
    let hello = |from, source: &str| icmp6(source, from, &[128, 0, 0, 0, 0, 0, 0, 0]);
    switch.receive(ports[0], hello(A, "fe80::aaaa"), Time::ZERO);
    switch.receive(ports[1], hello(B, "fe80::aaaa"), Time::ZERO);
    assert_eq!(all(&mut switch, ports[2]).len(), 1);
    for number in 0..20 {
        switch.receive(ports[0], hello(A, &format!("fe80::{number}")), Time::ZERO);
    }
    assert_eq!(all(&mut switch, ports[2]).len(), 3);
    switch.remove_port(ports[0]);
    switch.receive(ports[1], hello(B, "fe80::aaaa"), Time::ZERO);
    assert_eq!(all(&mut switch, ports[2]).len(), 1);
}

#[test]
fn a_mirror_sees_both_directions_and_says_nothing() {
    let mirror = PortConfig {
        mirror: Some(Mirror::All),
        ..access(1)
    };
    let (mut switch, ports) = switch([access(1), trunk(None, &[1]), mirror]);
    switch.receive(ports[0], plain(B, A), Time::from_nanos(5));
    let out = all(&mut switch, ports[1]);
    let seen = all(&mut switch, ports[2]);
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0].bytes(), plain(B, A).bytes());
    let first = seen[0].captured.unwrap();
    assert_eq!(
        (first.port, first.direction, first.time.nanos()),
        (ports[0], Direction::In, 5)
    );
    assert_eq!(seen[1].bytes(), out[0].bytes());
    let second = seen[1].captured.unwrap();
    assert_eq!((second.port, second.direction), (ports[1], Direction::Out));
    assert_eq!(all(&mut switch, ports[2]), []);
    switch.receive(ports[2], plain(B, A), Time::ZERO);
    assert_eq!(all(&mut switch, ports[1]), []);
    assert_eq!(
        switch
            .counters(ports[2])
            .unwrap()
            .dropped(DropReason::PortDown),
        1
    );
}

#[test]
fn a_move_is_announced() {
    let (mut switch, ports) = switch([
        guarded(A, &["10.0.0.5/32", "fd00::5/128"]),
        access(1),
        access(1),
    ]);
    switch.receive(ports[1], plain(B, A), Time::ZERO);
    all(&mut switch, ports[2]);
    switch.announce(ports[0], Time::ZERO);
    let said = all(&mut switch, ports[2]);
    let kinds: Vec<_> = said
        .iter()
        .map(|frame| packet::get_u16(frame.bytes(), 12).unwrap())
        .collect();
    assert_eq!(kinds, [0x8035, 0x0806, 0x86dd]);
    assert_eq!(
        switch.addresses().find(vid(1), A, Time::ZERO),
        Some(ports[0])
    );
}

#[test]
fn large_frames_are_cut_only_for_receivers_that_need_it() {
    use crate::{NeedsChecksum, Segmentation, SegmentationKind};
    let takes_all = PortConfig {
        capabilities: Capabilities::ALL,
        ..access(1)
    };
    let (mut switch, ports) = switch([access(1), takes_all, access(1)]);
    let way = reply::Addresses {
        source_mac: A,
        destination_mac: Mac::BROADCAST,
        source: "10.0.0.1".parse().unwrap(),
        destination: "10.0.0.2".parse().unwrap(),
    };
    let mut large = reply::udp(switch.pool(), way, (1, 2), &[7; 10_000]).unwrap();
    large.offload.needs_checksum = Some(NeedsChecksum {
        start: 34,
        offset: 6,
    });
    large.offload.segmentation = Some(Segmentation {
        kind: SegmentationKind::Udp,
        size: 1000,
        header_len: 42,
    });
    switch.receive(ports[0], large.clone(), Time::ZERO);
    let whole = all(&mut switch, ports[1]);
    assert_eq!(whole, [large.clone()]);
    let cut = all(&mut switch, ports[2]);
    assert_eq!(cut.len(), 10);
    assert!(
        cut.iter()
            .all(|frame| frame.len() == 42 + 1000 && frame.offload.needs_checksum.is_none())
    );
    // What a receiver would believe is checked, whatever it takes.
    let mut untrue = large.clone();
    untrue.offload.needs_checksum = Some(NeedsChecksum {
        start: 26,
        offset: 2,
    });
    switch.receive(ports[0], untrue, Time::ZERO);
    let mut too_long = large;
    too_long.offload.segmentation = Some(Segmentation {
        kind: SegmentationKind::Udp,
        size: 1473,
        header_len: 0,
    });
    switch.receive(ports[0], too_long, Time::ZERO);
    let dropped = |port: usize, reason| switch.counters(ports[port]).unwrap().dropped(reason);
    assert_eq!(dropped(0, DropReason::BadOffload), 1);
    assert_eq!(dropped(1, DropReason::TooBig), 1);
    assert_eq!(dropped(2, DropReason::TooBig), 1);
    assert_eq!(all(&mut switch, ports[1]), []);
    // Too long for a wire, and nothing says how to cut it.
    switch.receive(
        ports[0],
        reply::udp(&mut Pool::new(1), way, (1, 2), &[7; 1473]).unwrap(),
        Time::ZERO,
    );
    assert_eq!(
        switch
            .counters(ports[2])
            .unwrap()
            .dropped(DropReason::TooBig),
        2
    );
}

#[test]
fn a_neighbour_keeps_its_share_of_a_port_that_another_floods() {
    let slow = PortConfig {
        egress: Limit {
            bytes: Some(Rate {
                per_second: 12_500_000,
                burst: 15_000,
            }),
            packets: None,
        },
        ..access(1)
    };
    let (mut switch, ports) = switch([access(1), access(1), access(1), slow]);
    let from = |number: u8| Mac::from_bytes(&[2, 0, 0, 0, 1, number]);
    switch.receive(ports[3], plain(B, A), Time::ZERO);
    let mut got = [0u64; 3];
    let mut moment = Time::ZERO;
    for tick in 0..200u64 {
        let now = Time::from_nanos(tick * 1_000_000);
        // A third of what the port takes is 4,166 bytes per millisecond: two ports send a little less, one 100 times that.
        for (number, count) in [(0u8, 400), (1, 4), (2, 4)] {
            for _ in 0..count {
                let mut frame = plain(A, from(number));
                frame.pad(1000);
                switch.receive(ports[usize::from(number)], frame, now);
            }
        }
        moment = moment.max(now);
        while moment < Time::from_nanos((tick + 1) * 1_000_000) {
            switch.tick(moment);
            while let Some(frame) = switch.take(ports[3], moment) {
                got[usize::from(frame.bytes()[11])] += frame.len() as u64;
            }
            moment = switch.next_deadline();
        }
    }
    for neighbour in [got[1], got[2]] {
        assert!(neighbour >= 200 * 4000 * 95 / 100, "{got:?}");
    }
    // And nothing of the port's rate is wasted.
    assert!(
        got.iter().sum::<u64>() >= 12_500_000 / 5 * 99 / 100,
        "{got:?}"
    );
}
