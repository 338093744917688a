//! Security groups against an independent model of what they mean, and cases that a model does not reach.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::gateway::reply::{self, Addresses};
use crate::packet::Mac;
use crate::{DropReason, Frame, Guard, Pool, PortConfig, PortId, Switch, SwitchConfig, Time};

fn mac(machine: usize) -> Mac {
    Mac::from_bytes(&[2, 0, 0, 0, 0, machine as u8])
}

fn address(machine: usize) -> IpAddr {
    IpAddr::from([10, 0, 0, machine as u8])
}

fn config(machine: usize, groups: Option<Vec<GroupId>>) -> PortConfig {
    PortConfig {
        addresses: vec![address(machine).into()],
        guard: Some(Guard {
            macs: vec![mac(machine)],
            ..Guard::default()
        }),
        groups,
        ..PortConfig::default()
    }
}

/// A packet between two machines: transport, ports, TCP flags.
#[derive(Copy, Clone, Debug)]
struct Packet {
    from: usize,
    to: usize,
    protocol: u8,
    ports: (u16, u16),
    icmp: u8,
}

fn frame(packet: Packet, pool: &mut Pool) -> Frame {
    let way = Addresses {
        source_mac: mac(packet.from),
        destination_mac: mac(packet.to),
        source: address(packet.from),
        destination: address(packet.to),
    };
    match packet.protocol {
        protocol::UDP => reply::udp(pool, way, packet.ports, b"hello").unwrap(),
        protocol::ICMP => {
            let [a, b] = packet.ports.0.to_be_bytes();
            reply::icmp(pool, way, 64, &[packet.icmp, 0, 0, 0, a, b, 0, 1]).unwrap()
        }
        other => {
            let (mut frame, at) = reply::ip(pool, way, other, 64, 20).unwrap();
            crate::packet::put_u16(frame.bytes_mut(), at, packet.ports.0);
            crate::packet::put_u16(frame.bytes_mut(), at + 2, packet.ports.1);
            // A plain data segment: the table does not ask for a SYN.
            crate::packet::put(frame.bytes_mut(), at + 12, &[0x50, 0x10]);
            frame
        }
    }
}

/// Machine, its port, other machine, other's port, protocol.
type Ends = (usize, u16, usize, u16, u8);

/// What the documentation of this module says, written down once more, with sets and loops. No code is shared with the
/// implementation but the types of rules.
#[derive(Default)]
struct Model {
    rules: Vec<(GroupId, Vec<Rule>)>,
    groups: Vec<Option<Vec<GroupId>>>,
    /// Connection → opened by the machine itself, ICMP type.
    open: Vec<(Ends, (bool, u8))>,
}

impl Model {
    fn rule_allows(&self, machine: usize, other: usize, outbound: bool, packet: &Packet) -> bool {
        let Some(groups) = &self.groups[machine] else {
            return true;
        };
        if packet.protocol == protocol::UDP && packet.ports.1 == if outbound { 67 } else { 68 } {
            return true;
        }
        let direction = if outbound {
            Direction::Out
        } else {
            Direction::In
        };
        let all: Vec<&Rule> = groups
            .iter()
            .flat_map(|group| self.rules.iter().filter(move |(id, _)| id == group))
            .flat_map(|(_, rules)| rules)
            .filter(|rule| rule.direction == direction)
            .collect();
        if all.is_empty() {
            return outbound;
        }
        all.into_iter().any(|rule| {
            let service = match &rule.service {
                Service::Any => true,
                Service::Tcp(range) => {
                    packet.protocol == 6
                        && (*range.start()..=*range.end()).contains(&packet.ports.1)
                }
                Service::Udp(range) => {
                    packet.protocol == 17
                        && (*range.start()..=*range.end()).contains(&packet.ports.1)
                }
                Service::Icmp(None) => packet.protocol == 1,
                Service::Icmp(Some(kind)) => packet.protocol == 1 && *kind == packet.icmp,
                Service::Protocol(number) => packet.protocol == *number,
            };
            let remote = match &rule.remote {
                Remote::Any => true,
                Remote::Net(network) => {
                    let IpAddr::V4(base) = network.addr() else {
                        return false;
                    };
                    let IpAddr::V4(other) = address(other) else {
                        return false;
                    };
                    let shift = 32 - u32::from(network.prefix_len());
                    u64::from(u32::from(base)) >> shift == u64::from(u32::from(other)) >> shift
                }
                Remote::Group(group) => {
                    self.rules.iter().any(|(id, _)| id == group)
                        && self.groups[other]
                            .as_ref()
                            .is_some_and(|groups| groups.contains(group))
                }
            };
            service && remote
        })
    }

    /// Whether one machine's filter lets a packet pass.
    fn filter(&mut self, machine: usize, other: usize, outbound: bool, packet: &Packet) -> bool {
        if self.groups[machine].is_none() {
            return true;
        }
        let echo = packet.protocol == 1;
        let (sport, dport) = if echo {
            (packet.ports.0, packet.ports.0)
        } else {
            packet.ports
        };
        let (own, others) = if outbound {
            (sport, dport)
        } else {
            (dport, sport)
        };
        let key = (machine, own, other, others, packet.protocol);
        let known = self.open.iter().position(|(known, _)| *known == key);
        let (opener_outbound, icmp) = known.map_or((outbound, packet.icmp), |at| self.open[at].1);
        // The connection as it was opened, under today's rules.
        let opening = Packet {
            icmp,
            ports: match (echo, opener_outbound) {
                (true, _) => packet.ports,
                (false, true) => (own, others),
                (false, false) => (others, own),
            },
            ..*packet
        };
        let allowed = self.rule_allows(machine, other, opener_outbound, &opening);
        match (known, allowed) {
            (Some(at), false) => {
                self.open.swap_remove(at);
            }
            (None, true) => self.open.push((key, (opener_outbound, icmp))),
            _ => {}
        }
        allowed
    }

    fn passes(&mut self, packet: &Packet) -> bool {
        self.filter(packet.from, packet.to, true, packet)
            && self.filter(packet.to, packet.from, false, packet)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Send(Packet),
    SetGroup(u32, Vec<Rule>),
    RemoveGroup(u32),
    Join(usize, Option<Vec<GroupId>>),
}

fn rule() -> impl Strategy<Value = Rule> {
    let ports = || (1u16..6, 0u16..3).prop_map(|(first, more)| first..=first + more);
    let service = prop_oneof![
        Just(Service::Any),
        ports().prop_map(Service::Tcp),
        ports().prop_map(Service::Udp),
        prop::option::of(prop_oneof![Just(0u8), Just(8u8)]).prop_map(Service::Icmp),
        prop_oneof![Just(6u8), Just(17), Just(132)].prop_map(Service::Protocol),
    ];
    let remote = prop_oneof![
        Just(Remote::Any),
        (0usize..4, 28u8..=32).prop_map(|(machine, prefix)| {
            Remote::Net(IpNet::new(address(machine), prefix).unwrap())
        }),
        (0u32..3).prop_map(|group| Remote::Group(GroupId(group))),
    ];
    let direction = prop_oneof![2 => Just(Direction::In), 1 => Just(Direction::Out)];
    (direction, service, remote).prop_map(|(direction, service, remote)| Rule {
        direction,
        service,
        remote,
    })
}

fn packet_strategy() -> impl Strategy<Value = Packet> {
    let protocol = prop_oneof![Just(6u8), Just(17), Just(1)];
    (
        0usize..4,
        1usize..4,
        protocol,
        (1u16..6, 1u16..6),
        prop_oneof![Just(0u8), Just(8)],
    )
        .prop_map(|(from, step, protocol, ports, icmp)| Packet {
            from,
            to: (from + step) % 4,
            protocol,
            ports,
            icmp: if protocol == 1 { icmp } else { 0 },
        })
}

fn groups() -> impl Strategy<Value = Option<Vec<GroupId>>> {
    prop::option::weighted(
        0.8,
        prop::collection::vec((0u32..3).prop_map(GroupId), 0..3),
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => packet_strategy().prop_map(Step::Send),
        2 => (0u32..3, prop::collection::vec(rule(), 0..4)).prop_map(|(id, rules)| Step::SetGroup(id, rules)),
        1 => (0u32..3).prop_map(Step::RemoveGroup),
        1 => (0usize..4, groups()).prop_map(|(machine, groups)| Step::Join(machine, groups)),
    ]
}

/// A switch with four machines whose addresses it knows.
fn network(groups: [Option<Vec<GroupId>>; 4]) -> (Switch, Vec<PortId>) {
    let mut switch = Switch::new(SwitchConfig::default(), Time::ZERO);
    let ports = groups
        .into_iter()
        .enumerate()
        .map(|(machine, groups)| {
            switch
                .add_port(config(machine, groups), Time::ZERO)
                .unwrap()
        })
        .collect();
    (switch, ports)
}

fn drain(switch: &mut Switch, port: PortId, now: Time) -> Vec<Frame> {
    std::iter::from_fn(|| switch.take(port, now)).collect()
}

fn learn(switch: &mut Switch, ports: &[PortId]) {
    for (machine, port) in ports.iter().enumerate() {
        let IpAddr::V4(own) = address(machine) else {
            unreachable!()
        };
        let hello = reply::gratuitous_arp(switch.pool(), mac(machine), own);
        switch.receive(*port, hello, Time::ZERO);
    }
    for port in ports {
        drain(switch, *port, Time::ZERO);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_switch_does_what_the_model_says(
        start in prop::array::uniform4(groups()),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let (mut switch, ports) = network(start.clone());
        let mut model = Model { groups: start.to_vec(), ..Model::default() };
        learn(&mut switch, &ports);
        for step in steps {
            match step {
                Step::SetGroup(id, rules) => {
                    let id = GroupId(id);
                    model.rules.retain(|(other, _)| *other != id);
                    model.rules.push((id, rules.clone()));
                    switch.set_group(id, Group { rules, members: vec![] });
                }
                Step::RemoveGroup(id) => {
                    model.rules.retain(|(other, _)| *other != GroupId(id));
                    switch.remove_group(GroupId(id));
                }
                Step::Join(machine, groups) => {
                    model.groups[machine] = groups.clone();
                    switch.configure_port(ports[machine], config(machine, groups), Time::ZERO).unwrap();
                }
                Step::Send(packet) => {
                    let frame = frame(packet, switch.pool());
                    switch.receive(ports[packet.from], frame.clone(), Time::ZERO);
                    let expected = model.passes(&packet);
                    for (machine, port) in ports.iter().enumerate() {
                        let got = drain(&mut switch, *port, Time::ZERO);
                        let wanted = usize::from(expected && machine == packet.to);
                        prop_assert_eq!(got.len(), wanted, "{:?} at {}", packet, machine);
                    }
                }
            }
        }
    }
}

fn allow(direction: Direction, service: Service, remote: Remote) -> Rule {
    Rule {
        direction,
        service,
        remote,
    }
}

fn udp(from: usize, to: usize, ports: (u16, u16)) -> Packet {
    Packet {
        from,
        to,
        protocol: protocol::UDP,
        ports,
        icmp: 0,
    }
}

fn passes(switch: &mut Switch, ports: &[PortId], packet: Packet, now: Time) -> bool {
    let frame = frame(packet, switch.pool());
    switch.receive(ports[packet.from], frame, now);
    !drain(switch, ports[packet.to], now).is_empty()
}

#[test]
fn a_connection_times_out() {
    let (mut switch, ports) = network([None, Some(vec![]), None, None]);
    learn(&mut switch, &ports);
    let at = |seconds: u64| Time::from_nanos(seconds * 1_000_000_000);
    assert!(!passes(&mut switch, &ports, udp(0, 1, (5, 9)), at(0)));
    assert!(passes(&mut switch, &ports, udp(1, 0, (9, 5)), at(1)));
    assert!(passes(&mut switch, &ports, udp(0, 1, (5, 9)), at(30)));
    assert!(passes(&mut switch, &ports, udp(0, 1, (5, 9)), at(200)));
    assert!(!passes(&mut switch, &ports, udp(0, 1, (5, 9)), at(600)));
    let dropped = switch
        .counters(ports[1])
        .unwrap()
        .dropped(DropReason::PolicyIn);
    assert_eq!(dropped, 2);
    for second in 600..700 {
        switch.tick(at(second));
    }
    assert_eq!(switch.connections(ports[1]), Some(0));
}

#[test]
fn connections_are_bounded() {
    let (mut switch, ports) = network([None, None, None, None]);
    // Nobody else gets what is flooded.
    let web = GroupId(7);
    switch.set_group(
        web,
        Group {
            rules: vec![allow(Direction::In, Service::Udp(1..=9), Remote::Any)],
            members: vec![],
        },
    );
    let port = switch
        .add_port(
            PortConfig {
                connections_max: 100,
                ..config(9, Some(vec![web]))
            },
            Time::ZERO,
        )
        .unwrap();
    let ports = [ports[0], port];
    let mut passed = 0;
    for number in 0..1000u16 {
        let packet = Packet {
            to: 9,
            ..udp(0, 9, (1000 + number, 5))
        };
        let frame = frame(packet, switch.pool());
        switch.receive(ports[0], frame, Time::ZERO);
        passed += drain(&mut switch, ports[1], Time::ZERO).len();
    }
    assert_eq!(passed, 100);
    assert_eq!(
        switch
            .counters(ports[1])
            .unwrap()
            .dropped(DropReason::ConnectionsFull),
        900
    );
    assert_eq!(switch.group(web).unwrap().1, [1000]);
}

#[test]
fn an_error_about_a_connection_passes_and_another_does_not() {
    let (mut switch, ports) = network([None, Some(vec![]), None, None]);
    learn(&mut switch, &ports);
    assert!(passes(&mut switch, &ports, udp(1, 0, (9, 5)), Time::ZERO));
    let mut error = |ports_quoted: (u16, u16)| {
        let quoted = frame(udp(1, 0, ports_quoted), switch.pool());
        let mut message = vec![3, 3, 0, 0, 0, 0, 0, 0];
        message.extend(&quoted.bytes()[14..42]);
        let way = Addresses {
            source_mac: mac(0),
            destination_mac: mac(1),
            source: address(0),
            destination: address(1),
        };
        let error = reply::icmp(switch.pool(), way, 64, &message).unwrap();
        switch.receive(ports[0], error, Time::ZERO);
        drain(&mut switch, ports[1], Time::ZERO).len()
    };
    assert_eq!(error((9, 5)), 1);
    assert_eq!(error((9, 6)), 0);
}

#[test]
fn fragments_follow_their_first() {
    let (mut switch, ports) = network([None, Some(vec![]), None, None]);
    learn(&mut switch, &ports);
    let mut pool = Pool::new(8);
    let send =
        |switch: &mut Switch, from: usize, to: usize, pool: &mut Pool, id: u32| -> Vec<Frame> {
            let way = Addresses {
                source_mac: mac(from),
                destination_mac: mac(to),
                source: address(from),
                destination: address(to),
            };
            let ports = if from == 1 { (9, 5) } else { (5, 9) };
            let mut whole = reply::udp(pool, way, ports, &[7; 4000]).unwrap();
            crate::packet::put_u16(whole.bytes_mut(), 18, id as u16);
            let mut pieces = Vec::new();
            assert!(crate::split(whole, 1500, id, pool, |piece| pieces.push(piece)));
            assert_eq!(pieces.len(), 3);
            let _ = switch;
            pieces
        };
    let pieces = send(&mut switch, 0, 1, &mut pool, 1);
    for piece in pieces {
        switch.receive(ports[0], piece, Time::ZERO);
    }
    assert_eq!(drain(&mut switch, ports[1], Time::ZERO).len(), 0);
    for piece in send(&mut switch, 1, 0, &mut pool, 2) {
        switch.receive(ports[1], piece, Time::ZERO);
    }
    assert_eq!(drain(&mut switch, ports[0], Time::ZERO).len(), 3);
    for piece in send(&mut switch, 0, 1, &mut pool, 3) {
        switch.receive(ports[0], piece, Time::ZERO);
    }
    assert_eq!(drain(&mut switch, ports[1], Time::ZERO).len(), 3);
}

#[test]
fn a_fragment_does_not_overwrite_the_header_that_was_judged() {
    let (mut switch, ports) = network([None, Some(vec![]), None, None]);
    learn(&mut switch, &ports);
    assert!(passes(&mut switch, &ports, udp(1, 0, (9, 5)), Time::ZERO));
    let piece = |id: u16, word: u16| {
        let way = Addresses {
            source_mac: mac(0),
            destination_mac: mac(1),
            source: address(0),
            destination: address(1),
        };
        let mut piece = reply::udp(&mut Pool::new(1), way, (5, 9), &[7; 40]).unwrap();
        crate::packet::put_u16(piece.bytes_mut(), 18, id);
        crate::packet::put_u16(piece.bytes_mut(), 20, word);
        piece
    };
    // The first part, a later one, and one that begins inside TCP's header; in units of eight bytes.
    for (word, expected) in [(0x2000, 1), (6, 1), (2, 0)] {
        let mut piece = piece(77, word);
        if word == 2 {
            crate::packet::put(piece.bytes_mut(), 23, &[protocol::TCP]);
        }
        switch.receive(ports[0], piece, Time::ZERO);
        let passed = drain(&mut switch, ports[1], Time::ZERO).len();
        assert_eq!(passed, expected, "{word:#x}");
    }
}

#[test]
fn a_live_connection_ends_with_its_rule() {
    let group = GroupId(1);
    let (mut switch, ports) = network([None, Some(vec![group]), None, None]);
    learn(&mut switch, &ports);
    let open = Group {
        rules: vec![allow(
            Direction::In,
            Service::Udp(9..=9),
            Remote::Net("10.0.0.0/31".parse().unwrap()),
        )],
        members: vec![],
    };
    switch.set_group(group, open.clone());
    assert!(passes(&mut switch, &ports, udp(0, 1, (5, 9)), Time::ZERO));
    assert!(passes(&mut switch, &ports, udp(1, 0, (9, 5)), Time::ZERO));
    assert!(!passes(&mut switch, &ports, udp(2, 1, (5, 9)), Time::ZERO));
    switch.set_group(group, Group::default());
    assert!(!passes(&mut switch, &ports, udp(0, 1, (5, 9)), Time::ZERO));
    switch.set_group(group, open);
    assert!(passes(&mut switch, &ports, udp(0, 1, (5, 9)), Time::ZERO));
}

#[test]
fn members_elsewhere_count() {
    let (web, db) = (GroupId(1), GroupId(2));
    let (mut switch, ports) = network([None, Some(vec![db]), Some(vec![web]), None]);
    learn(&mut switch, &ports);
    switch.set_group(
        db,
        Group {
            rules: vec![allow(Direction::In, Service::Any, Remote::Group(web))],
            members: vec![],
        },
    );
    switch.set_group(web, Group::default());
    assert!(passes(&mut switch, &ports, udp(2, 1, (1, 2)), Time::ZERO));
    assert!(!passes(&mut switch, &ports, udp(3, 1, (1, 2)), Time::ZERO));
    switch.set_group(
        web,
        Group {
            rules: vec![],
            members: vec![address(3).into()],
        },
    );
    assert!(passes(&mut switch, &ports, udp(3, 1, (1, 2)), Time::ZERO));
}
