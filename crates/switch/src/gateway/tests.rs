//! Tests of the gateway: what machines ask, and what they are told.

use super::*;
use proptest::prelude::*;
use smoltcp::wire::{
    DhcpMessageType, DhcpPacket, DhcpRepr, DnsFlags, DnsOpcode, DnsPacket, DnsQueryType,
    DnsQuestion, DnsRecord, DnsRecordData, DnsRepr,
};

const GATEWAY: Mac = Mac {
    0: [2, 0x53, 0, 0, 0, 1],
};
const GUEST: Mac = Mac {
    0: [2, 0, 0, 0, 0, 0xa],
};
const OTHER: Mac = Mac {
    0: [2, 0, 0, 0, 0, 0xb],
};

fn gateway() -> (Gateway, Pool) {
    let network: Ipv4Net = "10.1.2.1/24".parse().unwrap();
    let config = GatewayConfig {
        mac: GATEWAY,
        ipv4: Some(network),
        dhcp4: Some(Dhcp4Config {
            domain: "lab.internal".into(),
            ..Dhcp4Config::whole(network)
        }),
        ipv6: Some(Ipv6Config {
            network: "fd12:3456:789a:1::1/64".parse().unwrap(),
            router: true,
            autonomous: true,
            managed: true,
            dns: true,
        }),
        also: vec![],
        domain: "lab.internal".into(),
        mtu: 1500,
    };
    (Gateway::new(config, Time::ZERO), Pool::new(64))
}

fn way(mac: Mac, source: &str, to: Mac, destination: &str) -> Addresses {
    Addresses {
        source_mac: mac,
        destination_mac: to,
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    }
}

fn answers(gateway: &mut Gateway) -> Vec<Frame> {
    std::iter::from_fn(|| gateway.next_frame()).collect()
}

/// Checks a packet's checksums and takes it apart.
fn check(frame: &Frame) -> (Ip, Vec<u8>) {
    let Ok(Content::Ip(ip)) = packet::content(frame.bytes()) else {
        panic!("no IP packet: {frame:?}");
    };
    let payload = ip.payload(frame.bytes()).to_vec();
    let way = Addresses {
        source_mac: GATEWAY,
        destination_mac: GUEST,
        source: ip.source,
        destination: ip.destination,
    };
    let field = match ip.protocol {
        protocol::UDP => 6,
        _ => 2,
    };
    let mut copy = frame.bytes().to_vec();
    copy.truncate(ip.end);
    reply::transport_checksum(&mut copy, way, ip.protocol, ip.transport, field);
    assert_eq!(copy, frame.bytes()[..ip.end]);
    if ip.source.is_ipv4() {
        assert_eq!(crate::checksum::of(&copy[ip.header..ip.transport]), 0);
    }
    (ip, payload)
}

fn dhcp(
    mac: Mac,
    kind: DhcpMessageType,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
) -> Vec<u8> {
    let name = [smoltcp::wire::DhcpOption {
        kind: 12,
        data: b"Web-1",
    }];
    let message = DhcpRepr {
        message_type: kind,
        transaction_id: 0x1234,
        secs: 0,
        client_hardware_address: mac,
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: requested,
        client_identifier: Some(mac),
        server_identifier: server,
        parameter_request_list: Some(&[1, 3, 6]),
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &name,
    };
    let mut bytes = vec![0; message.buffer_len()];
    message
        .emit(&mut DhcpPacket::new_unchecked(&mut bytes))
        .unwrap();
    bytes
}

struct Told {
    kind: DhcpMessageType,
    address: Ipv4Addr,
    to: IpAddr,
}

fn ask_dhcp(
    gateway: &mut Gateway,
    pool: &mut Pool,
    mac: Mac,
    message: &[u8],
    now: Time,
) -> Option<Told> {
    let way = way(mac, "0.0.0.0", Mac::BROADCAST, "255.255.255.255");
    let frame = reply::udp(pool, way, (68, 67), message).unwrap();
    assert_eq!(gateway.receive(frame, now, pool), None);
    let answer = gateway.next_frame()?;
    let (ip, payload) = check(&answer);
    let packet = DhcpPacket::new_checked(&payload[8..]).unwrap();
    let answer = DhcpRepr::parse(&packet).unwrap();
    assert_eq!(answer.transaction_id, 0x1234);
    assert_eq!(answer.server_identifier, Some("10.1.2.1".parse().unwrap()));
    if answer.message_type != DhcpMessageType::Nak {
        assert_eq!(answer.router, Some("10.1.2.1".parse().unwrap()));
        assert_eq!(answer.subnet_mask, Some("255.255.255.0".parse().unwrap()));
        assert_eq!(
            answer.dns_servers.as_deref(),
            Some(&["10.1.2.1".parse().unwrap()][..])
        );
        assert_eq!(answer.lease_duration, Some(3600));
    }
    Some(Told {
        kind: answer.message_type,
        address: answer.your_ip,
        to: ip.destination,
    })
}

fn lease(gateway: &mut Gateway, pool: &mut Pool, mac: Mac, now: Time) -> Ipv4Addr {
    let offer = ask_dhcp(
        gateway,
        pool,
        mac,
        &dhcp(mac, DhcpMessageType::Discover, None, None),
        now,
    )
    .unwrap();
    assert_eq!(offer.kind, DhcpMessageType::Offer);
    assert_eq!(offer.to, IpAddr::V4(offer.address));
    let server = Some("10.1.2.1".parse().unwrap());
    let request = dhcp(mac, DhcpMessageType::Request, Some(offer.address), server);
    let told = ask_dhcp(gateway, pool, mac, &request, now).unwrap();
    assert_eq!(told.kind, DhcpMessageType::Ack);
    assert_eq!(told.address, offer.address);
    offer.address
}

#[test]
fn machines_get_addresses_of_their_own_and_keep_them() {
    let (mut gateway, mut pool) = gateway();
    let first = lease(&mut gateway, &mut pool, GUEST, Time::ZERO);
    let second = lease(&mut gateway, &mut pool, OTHER, Time::ZERO);
    assert_eq!(first, Ipv4Addr::new(10, 1, 2, 2));
    assert_ne!(first, second);
    let later = Time::ZERO.after(Duration::from_secs(100_000));
    assert_eq!(lease(&mut gateway, &mut pool, GUEST, later), first);
    // Somebody else's, and one of another network.
    for wanted in [second, Ipv4Addr::new(192, 168, 0, 5)] {
        let request = dhcp(GUEST, DhcpMessageType::Request, Some(wanted), None);
        let told = ask_dhcp(&mut gateway, &mut pool, GUEST, &request, later).unwrap();
        assert_eq!(told.kind, DhcpMessageType::Nak);
        assert_eq!(told.to, IpAddr::V4(Ipv4Addr::BROADCAST));
    }
    // Another machine's message.
    let message = dhcp(OTHER, DhcpMessageType::Discover, None, None);
    assert!(ask_dhcp(&mut gateway, &mut pool, GUEST, &message, later).is_none());
    assert_eq!(
        gateway.neighbour(first.into(), later, &mut pool),
        Some(GUEST)
    );
}

#[test]
fn leases_outlive_the_gateway() {
    let (mut before, mut pool) = gateway();
    let _ = lease(&mut before, &mut pool, OTHER, Time::ZERO);
    let address = lease(&mut before, &mut pool, GUEST, Time::ZERO);
    let server = before.dhcp4().unwrap();
    assert!(server.take_changed() && !server.take_changed());
    let kept: Vec<Lease> = server.leases().cloned().collect();
    let (mut after, _) = gateway();
    for lease in kept {
        assert!(after.put_lease(lease, Time::ZERO));
    }
    let request = dhcp(GUEST, DhcpMessageType::Request, Some(address), None);
    let told = ask_dhcp(&mut after, &mut pool, GUEST, &request, Time::ZERO).unwrap();
    assert_eq!((told.kind, told.address), (DhcpMessageType::Ack, address));
}

#[test]
fn a_full_pool_gives_out_what_ended_first() {
    let (mut gateway, mut pool) = gateway();
    let mac = |number: u8| Mac::from_bytes(&[2, 1, 0, 0, 0, number]);
    for number in 0..253 {
        let now = Time::from_nanos(u64::from(number));
        lease(&mut gateway, &mut pool, mac(number), now);
    }
    let late = dhcp(GUEST, DhcpMessageType::Discover, None, None);
    assert!(ask_dhcp(&mut gateway, &mut pool, GUEST, &late, Time::from_nanos(500)).is_none());
    let later = Time::ZERO.after(Duration::from_secs(3601));
    let first = Ipv4Addr::new(10, 1, 2, 2);
    assert_eq!(lease(&mut gateway, &mut pool, GUEST, later), first);
    assert_eq!(gateway.dhcp4().unwrap().leases().count(), 253);
}

#[test]
fn a_declined_address_is_left_alone() {
    let (mut gateway, mut pool) = gateway();
    let address = lease(&mut gateway, &mut pool, GUEST, Time::ZERO);
    let server = Some("10.1.2.1".parse().unwrap());
    let decline = dhcp(GUEST, DhcpMessageType::Decline, Some(address), server);
    assert!(ask_dhcp(&mut gateway, &mut pool, GUEST, &decline, Time::ZERO).is_none());
    assert_ne!(lease(&mut gateway, &mut pool, GUEST, Time::ZERO), address);
}

#[test]
fn arp_and_neighbour_discovery_are_answered() {
    let (mut gateway, mut pool) = gateway();
    let question = |target: [u8; 4]| ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: GUEST,
        source_protocol_addr: Ipv4Addr::new(10, 1, 2, 9),
        target_hardware_addr: Mac::from_bytes(&[0; 6]),
        target_protocol_addr: target.into(),
    };
    let other = arp_frame(question([10, 1, 2, 7]), Mac::BROADCAST, GUEST, &mut pool);
    assert_eq!(gateway.receive(other, Time::ZERO, &mut pool), None);
    assert_eq!(gateway.next_frame(), None);
    let own = arp_frame(question([10, 1, 2, 1]), Mac::BROADCAST, GUEST, &mut pool);
    assert_eq!(gateway.receive(own, Time::ZERO, &mut pool), None);
    let answer = gateway.next_frame().unwrap();
    assert_eq!(packet::destination(answer.bytes()), Some(GUEST));
    let told = ArpRepr::parse(&ArpPacket::new_checked(&answer.bytes()[14..]).unwrap()).unwrap();
    assert!(matches!(
        told,
        ArpRepr::EthernetIpv4 {
            source_hardware_addr: GATEWAY,
            ..
        }
    ));
    assert_eq!(
        gateway.neighbour("10.1.2.9".parse().unwrap(), Time::ZERO, &mut pool),
        Some(GUEST)
    );

    let source = packet::link_local(GUEST);
    let target: Ipv6Addr = "fd12:3456:789a:1::1".parse().unwrap();
    let group = ndp::solicited_node(target);
    let way = Addresses {
        source_mac: GUEST,
        destination_mac: packet::multicast(group.into()).unwrap(),
        source: source.into(),
        destination: group.into(),
    };
    let ask = reply::icmp(&mut pool, way, 255, &ndp::solicitation(target, GUEST)).unwrap();
    assert_eq!(gateway.receive(ask, Time::ZERO, &mut pool), None);
    let (ip, payload) = check(&gateway.next_frame().unwrap());
    assert_eq!(ip.destination, IpAddr::V6(source));
    let told = ndp::neighbour(&payload).unwrap();
    assert_eq!((told.target, told.mac), (target, Some(GATEWAY)));
    // From another link.
    let far = reply::icmp(&mut pool, way, 254, &ndp::solicitation(target, GUEST)).unwrap();
    assert_eq!(gateway.receive(far, Time::ZERO, &mut pool), None);
    assert_eq!(gateway.next_frame(), None);

    let solicit = Addresses {
        destination: "ff02::2".parse().unwrap(),
        destination_mac: Mac::from_bytes(&[0x33, 0x33, 0, 0, 0, 2]),
        ..way
    };
    let ask = reply::icmp(&mut pool, solicit, 255, &[133, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    assert_eq!(gateway.receive(ask, Time::ZERO, &mut pool), None);
    let (_, payload) = check(&gateway.next_frame().unwrap());
    let options: Vec<_> = ndp::options(&payload[16..]).map(|(kind, _)| kind).collect();
    assert_eq!(options, [1, 5, 3, 25, 31]);
    assert_eq!(payload.len() % 8, 0);
}

#[test]
fn unknown_neighbours_are_asked_for_once_a_second() {
    let (mut gateway, mut pool) = gateway();
    for address in ["10.1.2.50", "fd12:3456:789a:1::50"] {
        let address: IpAddr = address.parse().unwrap();
        assert_eq!(gateway.neighbour(address, Time::ZERO, &mut pool), None);
        assert_eq!(gateway.neighbour(address, Time::ZERO, &mut pool), None);
        assert_eq!(answers(&mut gateway).len(), 1);
        let later = Time::ZERO.after(Duration::from_secs(2));
        assert_eq!(gateway.neighbour(address, later, &mut pool), None);
        assert_eq!(answers(&mut gateway).len(), 1);
    }
    assert_eq!(
        gateway.neighbour("8.8.8.8".parse().unwrap(), Time::ZERO, &mut pool),
        None
    );
    assert_eq!(answers(&mut gateway), []);
}

#[test]
fn a_ping_of_any_size_is_answered() {
    let (mut gateway, mut pool) = gateway();
    for (source, destination, kind) in [
        ("10.1.2.9", "10.1.2.1", 8u8),
        ("fd12:3456:789a:1::9", "fd12:3456:789a:1::1", 128),
    ] {
        for size in [0usize, 56, 1472, 1473, 60_000] {
            let mut message = vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1];
            message.extend((0..size).map(|at| at as u8));
            let whole = reply::icmp(
                &mut pool,
                way(GUEST, source, GATEWAY, destination),
                64,
                &message,
            )
            .unwrap();
            let mut pieces = Vec::new();
            assert!(fragment::split(whole, 1500, 3, &mut pool, |piece| pieces.push(piece)));
            for piece in pieces {
                assert_eq!(gateway.receive(piece, Time::ZERO, &mut pool), None);
            }
            let mut back = Reassembler::default();
            let mut whole = None;
            for piece in answers(&mut gateway) {
                assert!(piece.len() <= 1514);
                let Ok(Content::Ip(ip)) = packet::content(piece.bytes()) else {
                    panic!()
                };
                whole = back.push(piece, ip, Time::ZERO, &mut pool);
            }
            let (_, payload) = check(&whole.unwrap());
            assert_eq!(payload[0], if kind == 8 { 0 } else { 129 });
            assert_eq!(payload[4..], message[4..]);
        }
    }
}

fn dns_message(name: &[u8], kind: DnsQueryType) -> Vec<u8> {
    let message = DnsRepr {
        transaction_id: 0x77,
        opcode: DnsOpcode::Query,
        flags: DnsFlags::RECURSION_DESIRED,
        question: DnsQuestion { name, type_: kind },
    };
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut DnsPacket::new_unchecked(&mut bytes));
    bytes
}

/// Asks by IPv4; the answer's code and records.
fn ask_dns(gateway: &mut Gateway, pool: &mut Pool, message: &[u8]) -> Option<(u16, Vec<Vec<u8>>)> {
    let way = way(GUEST, "10.1.2.9", GATEWAY, "10.1.2.1");
    let frame = reply::udp(pool, way, (5353, 53), message).unwrap();
    assert_eq!(gateway.receive(frame, Time::ZERO, pool), None);
    let (_, payload) = check(&gateway.next_frame()?);
    let packet = DnsPacket::new_checked(&payload[8..]).unwrap();
    assert_eq!(packet.transaction_id(), 0x77);
    let (mut rest, _) = DnsQuestion::parse(packet.payload()).unwrap();
    let mut records = Vec::new();
    for _ in 0..packet.answer_record_count() {
        let (after, record) = DnsRecord::parse(rest).unwrap();
        rest = after;
        records.push(match record.data {
            DnsRecordData::A(address) => address.octets().to_vec(),
            DnsRecordData::Aaaa(address) => address.octets().to_vec(),
            DnsRecordData::Cname(data) | DnsRecordData::Other(_, data) => data.to_vec(),
        });
    }
    Some((u16::from(u8::from(packet.rcode())), records))
}

#[test]
fn machines_have_names() {
    let (mut gateway, mut pool) = gateway();
    let address = lease(&mut gateway, &mut pool, GUEST, Time::ZERO);
    let v4 = vec![address.octets().to_vec()];
    let v6 = vec![gateway.ipv6_of(GUEST).unwrap().octets().to_vec()];
    for name in [&b"\x05web-1\x00"[..], b"\x05WEB-1\x03lab\x08internal\x00"] {
        assert_eq!(
            ask_dns(&mut gateway, &mut pool, &dns_message(name, DnsQueryType::A)),
            Some((0, v4.clone()))
        );
        assert_eq!(
            ask_dns(
                &mut gateway,
                &mut pool,
                &dns_message(name, DnsQueryType::Aaaa)
            ),
            Some((0, v6.clone()))
        );
        assert_eq!(
            ask_dns(
                &mut gateway,
                &mut pool,
                &dns_message(name, DnsQueryType::Soa)
            ),
            Some((0, vec![]))
        );
    }
    let [a, b, c, d] = address.octets();
    let mut back = Vec::new();
    for label in [d, c, b, a] {
        let label = label.to_string();
        back.push(label.len() as u8);
        back.extend(label.bytes());
    }
    back.extend(b"\x07in-addr\x04arpa\x00");
    assert_eq!(
        ask_dns(
            &mut gateway,
            &mut pool,
            &dns_message(&back, DnsQueryType::from(12))
        ),
        Some((0, vec![b"\x05web-1\x03lab\x08internal\x00".to_vec()]))
    );
    for name in [&b"\x06nobody\x00"[..], b"\x06nobody\x03lab\x08internal\x00"] {
        assert_eq!(
            ask_dns(&mut gateway, &mut pool, &dns_message(name, DnsQueryType::A)),
            Some((3, vec![]))
        );
    }
    // A second machine that says it has the same name does not get it.
    let other = lease(&mut gateway, &mut pool, OTHER, Time::ZERO);
    assert_ne!(other, address);
    let ask = dns_message(b"\x05web-1\x00", DnsQueryType::A);
    assert_eq!(ask_dns(&mut gateway, &mut pool, &ask), Some((0, v4)));
}

#[test]
fn other_names_are_forwarded() {
    let (mut gateway, mut pool) = gateway();
    let message = dns_message(b"\x07example\x03org\x00", DnsQueryType::A);
    assert_eq!(ask_dns(&mut gateway, &mut pool, &message), None);
    let query = gateway.next_query().unwrap();
    assert_eq!(query.message, message);
    // Another question's answer, and a question as the answer.
    let mut other = dns_message(b"\x07example\x03com\x00", DnsQueryType::A);
    other[2] |= 0x80;
    for wrong in [&other, &message] {
        gateway.dns_answer(query.token, wrong, Time::ZERO, &mut pool);
        assert_eq!(gateway.next_frame(), None);
    }
    let mut answer = message.clone();
    answer[0] = 0x99;
    answer[2] |= 0x80;
    answer[7] = 1;
    answer.extend(b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x0a\x00\x04\x01\x02\x03\x04");
    gateway.dns_answer(query.token, &answer, Time::ZERO, &mut pool);
    let (ip, payload) = check(&gateway.next_frame().unwrap());
    assert_eq!(ip.destination.to_string(), "10.1.2.9");
    assert_eq!(payload[..4], [0, 53, 0x14, 0xe9]);
    assert_eq!(payload[8..10], [0, 0x77]);
    assert_eq!(payload[10..], answer[2..]);
    // Once.
    gateway.dns_answer(query.token, &answer, Time::ZERO, &mut pool);
    assert_eq!(gateway.next_frame(), None);
    // Too long for a client that did not say that it takes more.
    assert_eq!(ask_dns(&mut gateway, &mut pool, &message), None);
    let query = gateway.next_query().unwrap();
    answer.resize(600, 0);
    gateway.dns_answer(query.token, &answer, Time::ZERO, &mut pool);
    let (_, payload) = check(&gateway.next_frame().unwrap());
    assert_eq!(payload.len(), 8 + message.len());
    assert_eq!(payload[10] & 2, 2);
}

#[test]
fn dhcp6_gives_the_address_that_the_name_server_knows() {
    let (mut gateway, mut pool) = gateway();
    let mut solicit = vec![1, 7, 8, 9];
    solicit.extend([0, 1, 0, 4, 0, 3, 0, 1]);
    solicit.extend([0, 3, 0, 12, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
    let from = packet::link_local(GUEST).to_string();
    let way = way(
        GUEST,
        &from,
        Mac::from_bytes(&[0x33, 0x33, 0, 1, 0, 2]),
        "ff02::1:2",
    );
    let frame = reply::udp(&mut pool, way, (546, 547), &solicit).unwrap();
    assert_eq!(gateway.receive(frame, Time::ZERO, &mut pool), None);
    let (_, payload) = check(&gateway.next_frame().unwrap());
    let answer = &payload[8..];
    assert_eq!(answer[..4], [2, 7, 8, 9]);
    let own = gateway.ipv6_of(GUEST).unwrap().octets();
    assert!(answer.windows(16).any(|window| window == own));
    // The request names the server.
    let mut request = vec![3, 1, 1, 1];
    request.extend(&answer[4..]);
    let frame = reply::udp(&mut pool, way, (546, 547), &request).unwrap();
    assert_eq!(gateway.receive(frame, Time::ZERO, &mut pool), None);
    let (_, payload) = check(&gateway.next_frame().unwrap());
    assert_eq!(payload[8], 7);
    assert!(payload.windows(16).any(|window| window == own));
}

#[test]
fn the_rest_is_routed() {
    let (mut gateway, mut pool) = gateway();
    let out = way(GUEST, "10.1.2.9", GATEWAY, "192.0.2.1");
    let frame = reply::udp(&mut pool, out, (1000, 53), b"x").unwrap();
    assert_eq!(
        gateway.receive(frame.clone(), Time::ZERO, &mut pool),
        Some(frame)
    );
    assert_eq!(gateway.next_frame(), None);
    // To another machine, and to a group.
    for (to, destination) in [
        (OTHER, "10.1.2.7"),
        (Mac::BROADCAST, "10.1.2.255"),
        (Mac::from_bytes(&[1, 0, 0x5e, 0, 0, 251]), "224.0.0.251"),
    ] {
        let frame = reply::udp(
            &mut pool,
            way(GUEST, "10.1.2.9", to, destination),
            (1000, 53),
            b"x",
        )
        .unwrap();
        assert_eq!(gateway.receive(frame, Time::ZERO, &mut pool), None);
    }
    assert_eq!(gateway.next_frame(), None);
}

proptest! {
    /// No message makes the gateway fall.
    #[test]
    fn nothing_panics(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        ports in prop_oneof![Just((68u16, 67u16)), Just((5353, 53)), Just((546, 547))],
        v6 in any::<bool>(),
        icmp in any::<bool>(),
    ) {
        let (mut gateway, mut pool) = gateway();
        let way = if v6 {
            way(GUEST, "fe80::9", GATEWAY, "fd12:3456:789a:1::1")
        } else {
            way(GUEST, "10.1.2.9", GATEWAY, "10.1.2.1")
        };
        let frame = if icmp {
            reply::icmp(&mut pool, way, 255, &bytes)
        } else {
            reply::udp(&mut pool, way, ports, &bytes)
        };
        gateway.receive(frame.unwrap(), Time::ZERO, &mut pool);
        gateway.receive(Frame::new(&bytes), Time::ZERO, &mut pool);
        for message in answers(&mut gateway) {
            prop_assert!(message.len() <= 1514);
        }
    }
}
