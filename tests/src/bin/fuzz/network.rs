//! The data plane: frames that a machine sends into a switch and to its gateway, datagrams from another host, and the
//! packet ring of a peer that writes what it likes.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use strata_switch::gateway::dhcp4::Dhcp4Config;
use strata_switch::gateway::reply::{self, Addresses};
use strata_switch::gateway::{Gateway, GatewayConfig, Ipv6Config};
use strata_switch::nat::{Answer, Host, Nat, NatConfig, Wish};
use strata_switch::packet::Mac;
use strata_switch::policy::{Direction, Group, GroupId, Remote, Rule, Service};
use strata_switch::ring::{Ring, Side};
use strata_switch::vxlan::{Mapping, Vxlan, VxlanConfig};
use strata_switch::{
    Capabilities, DropReason, Frame, Guard, MAX_FRAME, Mirror, NeedsChecksum, Pool, Port,
    PortConfig, PortId, Rate, Segmentation, SegmentationKind, Switch, SwitchConfig, Time, Vid,
    VidSet, VlanMode, pcapng, split,
};

use super::input::{Input, Script, Sum};

/// Bytes of a packet ring.
const RING: u32 = 256 << 10;

fn mac(number: u8) -> Mac {
    Mac::from_bytes(&[2, 0, 0, 0, 0, number])
}

fn way(from: u8, to: u8, v6: bool) -> Addresses {
    let address = |number: u8| -> IpAddr {
        match v6 {
            true => IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, number]),
            false => IpAddr::from([10, 0, 0, number]),
        }
    };
    Addresses {
        source_mac: mac(from),
        destination_mac: mac(to),
        source: address(from),
        destination: address(to),
    }
}

/// A frame as the input says: bytes, and now and then something left to do.
fn frame(input: &mut Input) -> Frame {
    let kind = input.byte();
    let long = if kind & 0x80 == 0 { 1 } else { 40 };
    let count = input.number(2) as usize;
    let mut frame = Frame::new(input.take(count % 4096));
    frame.pad(frame.len() * long);
    frame.truncate(MAX_FRAME + 1);
    if kind & 1 != 0 {
        frame.offload.needs_checksum = Some(NeedsChecksum {
            start: input.number(2) as u16,
            offset: input.number(2) as u16,
        });
    }
    let kinds = [
        SegmentationKind::Tcp4,
        SegmentationKind::Tcp6,
        SegmentationKind::Udp,
    ];
    if let Some(&kind) = kinds
        .get(usize::from(kind >> 1 & 3))
        .filter(|_| kind & 8 != 0)
    {
        frame.offload.segmentation = Some(Segmentation {
            kind,
            size: input.number(2) as u16,
            header_len: input.number(2) as u16,
        });
    }
    frame
}

/// As [`frame`] reads it.
fn script(script: Script, frame: &Frame) -> Script {
    let script = script.byte(6).number(frame.len() as u64, 2);
    let bytes = frame.bytes().iter();
    bytes.fold(script, |script, &byte| script.byte(byte))
}

fn network() -> (Switch, Vec<PortId>) {
    let mut switch = Switch::new(
        SwitchConfig {
            pool: 64,
            ..SwitchConfig::default()
        },
        Time::ZERO,
    );
    let guarded = |number: u8| PortConfig {
        addresses: [way(number, 0, false).source, way(number, 0, true).source]
            .map(Into::into)
            .to_vec(),
        guard: Some(Guard {
            macs: vec![mac(number)],
            ..Guard::default()
        }),
        groups: Some(vec![GroupId(u32::from(number))]),
        connections_max: 64,
        ..PortConfig::default()
    };
    let trunk = PortConfig {
        vlan: VlanMode::Trunk {
            native: Vid::new(1),
            allowed: VidSet::all(),
        },
        capabilities: Capabilities::ALL,
        ..PortConfig::default()
    };
    let tunnel = PortConfig {
        vlan: VlanMode::Tunnel(Vid::DEFAULT),
        isolated: true,
        flood: Some(Rate {
            per_second: 1000,
            burst: 100,
        }),
        ..PortConfig::default()
    };
    let mirror = PortConfig {
        mirror: Some(Mirror::All),
        capabilities: Capabilities::ALL,
        ..PortConfig::default()
    };
    let configs = [
        guarded(1),
        guarded(2),
        PortConfig::default(),
        trunk,
        tunnel,
        mirror,
    ];
    let ports = configs
        .into_iter()
        .flat_map(|config| switch.add_port(config, Time::ZERO))
        .collect();
    (switch, ports)
}

fn rule(input: &mut Input) -> Rule {
    let port = input.number(2) as u16;
    let byte = input.byte();
    Rule {
        direction: if byte & 1 == 0 {
            Direction::In
        } else {
            Direction::Out
        },
        service: match byte >> 1 & 3 {
            0 => Service::Any,
            1 => Service::Udp(port..=port.saturating_add(1000)),
            2 => Service::Tcp(0..=port),
            _ => Service::Icmp(None),
        },
        remote: match byte >> 3 & 3 {
            0 => Remote::Group(GroupId(1)),
            1 => Remote::Net(way(2, 0, byte & 0x20 != 0).source.into()),
            _ => Remote::Any,
        },
    }
}

/// Frames into every port of a switch, in any order, with changes of rules and time between them.
pub fn switch(bytes: &[u8]) -> u64 {
    let mut input = Input::new(bytes);
    let mut sum = Sum::new();
    let (mut switch, ports) = network();
    let mut capture = pcapng::Writer::new(std::io::sink(), 0).ok();
    let mut now = Time::ZERO;
    while !input.is_empty() {
        let op = input.byte();
        let Some(&port) = ports.get(usize::from(op & 7) % ports.len()) else {
            break;
        };
        match op >> 3 {
            0 => {
                now = Time::from_nanos(now.nanos().saturating_add(input.any()));
                switch.tick(now);
            }
            1 => {
                let rules = (0..input.byte() % 4).map(|_| rule(&mut input)).collect();
                switch.set_group(
                    GroupId(u32::from(op & 3)),
                    Group {
                        rules,
                        members: vec![],
                    },
                );
            }
            2 => switch.announce(port, now),
            _ => {
                let frame = frame(&mut input);
                switch.receive(port, frame, now);
            }
        }
        for &port in &ports {
            while let Some(mut frame) = switch.take(port, now) {
                assert!(frame.len() <= MAX_FRAME + 8);
                if let Some(capture) = &mut capture {
                    let _ = capture.write(&mut frame, "port");
                }
                switch.pool().put(frame);
            }
        }
    }
    for &port in &ports {
        if let Some(counters) = switch.counters(port) {
            for reason in DropReason::ALL {
                sum.add(counters.dropped(reason).min(2));
            }
            sum.add(counters.sent.frames.min(3));
        }
        sum.add(switch.connections(port).unwrap_or(0).min(3) as u64);
    }
    sum.0
}

/// Frames of the kinds that a machine sends.
fn frames() -> Vec<Frame> {
    let mut pool = Pool::new(4);
    let mut frames = vec![
        reply::rarp(&mut pool, mac(1)),
        reply::gratuitous_arp(&mut pool, mac(1), [10, 0, 0, 1].into()),
    ];
    // A request for an address of the gateway's, and a DHCP discovery.
    let mut ask = vec![
        0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 9,
    ];
    frames.push(reply::ethernet(
        &mut pool,
        Mac::BROADCAST,
        mac(1),
        0x0806,
        &ask,
    ));
    ask.clear();
    let mut discover = vec![1, 1, 6, 0, 1, 2, 3, 4];
    discover.resize(28, 0);
    discover.extend(mac(1).0);
    discover.resize(236, 0);
    discover.extend([99, 130, 83, 99, 53, 1, 1, 12, 3, b'w', b'e', b'b', 255]);
    let mut request = discover.clone();
    request.splice(240.., [53, 1, 3, 50, 4, 10, 0, 0, 2, 255]);
    for message in [&discover, &request] {
        let all = Addresses {
            source_mac: mac(1),
            destination_mac: Mac::BROADCAST,
            source: IpAddr::from([0, 0, 0, 0]),
            destination: IpAddr::from([255, 255, 255, 255]),
        };
        frames.extend(reply::udp(&mut pool, all, (68, 67), message));
    }
    let question =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x03lab\x00\x00\x01\x00\x01";
    let solicit = [
        1, 1, 1, 1, 0, 1, 0, 4, 0, 3, 0, 1, 0, 3, 0, 12, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    for v6 in [false, true] {
        let to_gateway = way(1, 9, v6);
        frames.extend(reply::udp(&mut pool, to_gateway, (5353, 53), question));
        frames.extend(reply::udp(&mut pool, to_gateway, (546, 547), &solicit));
        frames.extend(reply::udp(&mut pool, way(1, 2, v6), (1000, 2000), b"hello"));
        let echo = if v6 { 128 } else { 8 };
        frames.extend(reply::icmp(
            &mut pool,
            to_gateway,
            64,
            &[echo, 0, 0, 0, 0, 1, 0, 1, 5, 5],
        ));
        if let Some((mut frame, at)) = reply::ip(&mut pool, way(1, 2, v6), 6, 64, 32) {
            frame.bytes_mut()[at..at + 14]
                .copy_from_slice(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 0, 0x80, 2]);
            frames.push(frame);
        }
        if let Some(whole) = reply::udp(&mut pool, way(1, 9, v6), (1000, 2000), &[3; 3000]) {
            split(whole, 1300, 5, &mut pool, |piece| frames.push(piece));
        }
    }
    let mut discovery = vec![
        135, 0, 0, 0, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 1, 1,
    ];
    discovery.extend(mac(1).0);
    frames.extend(reply::icmp(&mut pool, way(1, 9, true), 255, &discovery));
    frames.extend(reply::icmp(
        &mut pool,
        way(1, 9, true),
        255,
        &[133, 0, 0, 0, 0, 0, 0, 0],
    ));
    let mut tagged = frames.clone();
    tagged.truncate(4);
    for frame in &mut tagged {
        frame.push_tag(0x8100, 0xa001);
    }
    frames.extend(tagged);
    frames
}

/// Each kind of frame alone, and all of them.
pub fn seeds() -> Vec<Vec<u8>> {
    let frames = frames();
    let mut seeds: Vec<Vec<u8>> = frames
        .iter()
        .map(|frame| script(Script::default().byte(3 << 3), frame).0)
        .collect();
    let rules = Script::default()
        .byte(1 << 3 | 1)
        .byte(1)
        .number(2000, 2)
        .byte(2);
    seeds.push(
        frames
            .iter()
            .enumerate()
            .fold(rules, |all, (index, frame)| {
                script(all.byte((3 << 3) | (index as u8 % 5)), frame)
            })
            .0,
    );
    seeds
}

fn new_gateway() -> Option<Gateway> {
    let network = "10.0.0.9/24".parse().ok()?;
    let config = GatewayConfig {
        mac: mac(9),
        ipv4: Some(network),
        dhcp4: Some(Dhcp4Config::whole(network)),
        ipv6: Some(Ipv6Config {
            network: "fd00::9/64".parse().ok()?,
            router: true,
            autonomous: true,
            managed: true,
            dns: true,
        }),
        also: vec![],
        domain: "lab".into(),
        mtu: 1500,
    };
    Some(Gateway::new(config, Time::ZERO))
}

/// Frames to a gateway, answers of resolvers, time.
pub fn gateway(bytes: &[u8]) -> u64 {
    let mut input = Input::new(bytes);
    let mut sum = Sum::new();
    let Some(mut gateway) = new_gateway() else {
        return 0;
    };
    let mut pool = Pool::new(16);
    let mut now = Time::ZERO;
    let mut asked = None;
    while !input.is_empty() {
        let op = input.byte();
        match op >> 3 {
            0 => {
                now = Time::from_nanos(now.nanos().saturating_add(input.any()));
                gateway.tick(now, &mut pool);
            }
            1 => {
                let count = usize::from(input.byte());
                gateway.dns_answer(u64::from(op & 7), input.take(count), now, &mut pool);
            }
            2 => {
                let address = IpAddr::from([10, 0, 0, input.byte()]);
                sum.add(u64::from(
                    gateway.neighbour(address, now, &mut pool).is_some(),
                ));
            }
            _ => {
                let frame = frame(&mut input);
                let routed = gateway.receive(frame, now, &mut pool);
                sum.add(u64::from(routed.is_some()));
            }
        }
        while let Some(frame) = gateway.next_frame() {
            assert!(frame.len() <= 1514, "an answer of {} bytes", frame.len());
            sum.add(frame.bytes().get(13).copied().unwrap_or(0).into());
            sum.add(frame.bytes().get(23).copied().unwrap_or(0).into());
        }
        while let Some(query) = gateway.next_query() {
            asked = Some(query);
        }
        // A resolver that answers with the question.
        if let Some(query) = asked.as_mut().filter(|_| op & 1 != 0) {
            if let Some(flags) = query.message.get_mut(2) {
                *flags |= 0x80;
            }
            gateway.dns_answer(query.token, &query.message, now, &mut pool);
            sum.add(1);
        }
    }
    if let Some(server) = gateway.dhcp4() {
        sum.add(server.leases().count().min(4) as u64);
    }
    sum.0
}

/// Datagrams from peers and strangers, and frames for them.
pub fn vxlan(bytes: &[u8]) -> u64 {
    let mut input = Input::new(bytes);
    let mut sum = Sum::new();
    let peers: Vec<SocketAddr> = (1..4)
        .map(|number| (IpAddr::from([192, 0, 2, number]), 4789).into())
        .collect();
    let vids = [(1, 1), (10, 10), (4094, 0xff_ffff)];
    let mapping = match input.byte() & 1 {
        0 => Mapping::Tagged(1),
        _ => Mapping::PerVlan(
            vids.iter()
                .flat_map(|&(vid, vni)| Some((Vid::new(vid)?, vni)))
                .collect(),
        ),
    };
    let mut uplink = Vxlan::new(VxlanConfig {
        mapping,
        peers: peers.clone(),
    });
    let mut pool = Pool::new(16);
    while !input.is_empty() {
        let op = input.byte();
        let frame = frame(&mut input);
        match peers.get(usize::from(op & 7)) {
            Some(peer) => uplink.receive(*peer, frame.bytes(), Time::ZERO, &mut pool),
            None => {
                let _ = uplink.deliver(frame, Time::ZERO, &mut pool);
            }
        }
        while let Some(frame) = uplink.poll(Time::ZERO, &mut pool) {
            sum.add(frame.bytes().get(12).copied().unwrap_or(0).into());
        }
        while let Some((to, datagram)) = uplink.next_datagram() {
            assert!(datagram.len() >= 8);
            sum.add(
                u64::from(to.port()) + u64::from(datagram.bytes().get(6).copied().unwrap_or(0)),
            );
        }
    }
    let drops = uplink.drops();
    for count in [drops.stranger, drops.malformed, drops.unmapped] {
        sum.add(count.min(2));
    }
    sum.0
}

/// Datagrams with a frame of each kind in them.
pub fn vxlan_seeds() -> Vec<Vec<u8>> {
    let datagrams = frames().into_iter().map(|mut frame| {
        frame.push_front(8);
        frame.bytes_mut()[..8].copy_from_slice(&[8, 0, 0, 0, 0, 0, 1, 0]);
        script(Script::default().byte(0).byte(1), &frame).0
    });
    datagrams.collect()
}

/// A peer that pushes frames as it should, and writes into the memory of the ring as it should not.
pub fn ring(bytes: &[u8]) -> u64 {
    let mut input = Input::new(bytes);
    let mut sum = Sum::new();
    let attached = || {
        let switch = Ring::create(RING, Side::Switch, Capabilities::ALL).ok()?;
        let file = switch.memory().file().try_clone_to_owned().ok()?;
        let machine = Ring::attach(file, RING, Side::Machine, Capabilities::ALL).ok()?;
        Some((switch, machine))
    };
    let Some((mut switch, mut machine)) = attached() else {
        return 0;
    };
    let mut pool = Pool::new(16);
    while !input.is_empty() {
        let op = input.byte();
        match op >> 5 {
            0 | 1 => {
                let _ = machine.push(&frame(&mut input));
            }
            2 => {
                let _ = switch.push(&frame(&mut input));
            }
            3 => {
                let offset = u64::from(op & 31) * 64;
                let _ = machine.memory().write(offset, &input.any().to_le_bytes());
            }
            4 => {
                let offset = input.any() % machine.memory().size();
                let count = usize::from(input.byte() & 63);
                let _ = machine.memory().write(offset, input.take(count));
            }
            _ => {
                let _ = machine.pop(&mut pool);
            }
        }
        for _ in 0..8 {
            match switch.pop(&mut pool) {
                Ok(Some(frame)) => {
                    assert!(frame.len() <= MAX_FRAME);
                    sum.add(u64::from(frame.offload.segmentation.is_some()));
                    pool.put(frame);
                }
                Ok(None) => break,
                Err(error) => {
                    sum.text(&error.to_string());
                    return sum.0;
                }
            }
        }
        sum.add(u64::from(switch.must_wake()) + 2 * u64::from(switch.sleep()));
    }
    sum.0
}

/// Sockets for the NAT: ends of pairs, whose other ends say what the input says.
struct Pairs {
    answers: VecDeque<Answer>,
    bell: UnixDatagram,
    never: UnixDatagram,
    peers: Arc<Mutex<Vec<UnixStream>>>,
}

impl Host for Pairs {
    fn ask(&mut self, flow: u64, wish: Wish) -> bool {
        let pair = UnixStream::pair()
            .ok()
            .filter(|_| wish != Wish::Echo(way(0, 7, false).destination));
        let socket = pair.map(|(ours, theirs)| {
            let _ = theirs.set_nonblocking(true);
            let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
            peers.truncate(32);
            peers.insert(0, theirs);
            (ours.into(), false)
        });
        self.answers.push_back(Answer::Socket { flow, socket });
        self.bell.send(&[0]).is_ok()
    }

    fn answer(&mut self) -> Option<Answer> {
        let _ = self.never.recv(&mut [0]);
        self.answers.pop_front()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.never.as_fd()
    }
}

/// Frames into a NAT, bytes from its peers, and time.
pub fn nat(bytes: &[u8]) -> u64 {
    let (Ok((bell, never)), peers) = (UnixDatagram::pair(), Arc::new(Mutex::new(Vec::new())))
    else {
        return 0;
    };
    let _ = (bell.set_nonblocking(true), never.set_nonblocking(true));
    let host = Pairs {
        answers: VecDeque::new(),
        bell,
        never,
        peers: peers.clone(),
    };
    let config = NatConfig {
        mac: mac(9),
        gateway4: [10, 0, 0, 9].into(),
        gateway6: [0xfd00, 0, 0, 0, 0, 0, 0, 9].into(),
        guest_mac: mac(1),
        guest4: [10, 0, 0, 1].into(),
        mtu: 1500,
        flows_max: 16,
        memory_max: 1 << 16,
    };
    let Ok(mut nat) = Nat::new(config, Box::new(host)) else {
        return 0;
    };
    let (mut input, mut sum, mut pool) = (Input::new(bytes), Sum::new(), Pool::new(16));
    let (mut now, mut heard) = (Time::ZERO, 0);
    while !input.is_empty() {
        match input.byte() >> 5 {
            0 => now = Time::from_nanos(now.nanos().saturating_add(input.any())),
            1 => {
                let count = input.number(1) as usize;
                let words = input.take(count);
                let mut peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
                match peers.first_mut() {
                    Some(peer) if count > 0 => drop(peer.write_all(words)),
                    _ => drop(peers.pop()),
                }
            }
            2 => {
                // The guest answers what it heard last, as a connection's other end would.
                let mut frame = Frame::new(&segment(&mut input, heard));
                frame.offload.checksum_valid = true;
                let _ = nat.deliver(frame, now, &mut pool);
            }
            _ => {
                let mut frame = frame(&mut input);
                frame.offload.checksum_valid = true;
                let _ = nat.deliver(frame, now, &mut pool);
            }
        }
        nat.service(now);
        for _ in 0..32 {
            let Some(frame) = nat.poll(now, &mut pool) else {
                break;
            };
            assert!(frame.len() <= MAX_FRAME);
            let number = frame
                .bytes()
                .get(38..42)
                .and_then(|bytes| bytes.try_into().ok());
            heard = number.map_or(heard, u32::from_be_bytes);
            sum.add(u64::from(frame.bytes().get(47).copied().unwrap_or(0)));
            pool.put(frame);
        }
    }
    let counters = nat.counters();
    assert!(counters.flows <= 16);
    for count in [
        counters.flows,
        counters.tcp_out,
        counters.tcp_reset,
        counters.malformed,
    ] {
        sum.add(count.min(3));
    }
    sum.0
}

/// A TCP segment of the guest to one of few places.
fn segment(input: &mut Input, heard: u32) -> Vec<u8> {
    let (flags, near) = (input.byte(), input.byte());
    let (seq, ack) = match near & 1 {
        0 => (
            u32::from(input.byte()),
            heard.wrapping_add(u32::from(input.byte() & 3)),
        ),
        _ => (input.any() as u32, input.any() as u32),
    };
    let count = input.number(1) as usize;
    let payload = input.take(count).to_vec();
    let mut bytes = vec![0; 54];
    bytes[..6].copy_from_slice(&mac(9).0);
    bytes[6..12].copy_from_slice(&mac(1).0);
    bytes[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    bytes[16..18].copy_from_slice(&(40 + payload.len() as u16).to_be_bytes());
    bytes[22..24].copy_from_slice(&[64, 6]);
    bytes[26..34].copy_from_slice(&[10, 0, 0, 1, 192, 0, 2, near >> 6]);
    bytes[34..38].copy_from_slice(&[1, 0, 0, 80 + (near >> 5 & 1)]);
    bytes[38..42].copy_from_slice(&seq.to_be_bytes());
    bytes[42..46].copy_from_slice(&ack.to_be_bytes());
    bytes[46..50].copy_from_slice(&[0x50, flags, near, seq as u8]);
    bytes.extend(payload);
    bytes
}

/// A connection that is made, used and ended.
pub fn nat_seeds() -> Vec<Vec<u8>> {
    let say = |script: Script, flags: u8, seq: u8, more: u8, count: u8| {
        let script = script
            .byte(2 << 5)
            .byte(flags)
            .byte(0x40)
            .byte(seq)
            .byte(more);
        (0..count).fold(script.number(u64::from(count), 1), |script, byte| {
            script.byte(byte)
        })
    };
    let open = || say(say(Script::default(), 2, 9, 0, 0), 16, 10, 1, 0);
    let talk = say(
        open().byte(1 << 5).number(3, 1).byte(1).byte(2).byte(3),
        24,
        10,
        3,
        9,
    );
    let end = say(say(open(), 17, 10, 1, 0), 4, 10, 0, 0);
    let mut seeds = vec![open().0, talk.0, end.0];
    seeds.extend(seeds_of_frames());
    seeds
}

fn seeds_of_frames() -> Vec<Vec<u8>> {
    let alone = |frame: &Frame| script(Script::default().byte(7 << 5), frame).0;
    frames().iter().map(alone).collect()
}
