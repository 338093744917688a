//! Making whole frames: Ethernet, IP and UDP or ICMP headers around a payload, checksums included.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::checksum;
use crate::fragment::ipv4_checksum;
use crate::frame::Frame;
use crate::packet::{self, ETHERNET_HEADER, Mac, ethertype, protocol};
use crate::pool::Pool;

/// Between whom a frame goes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Ethernet source.
    pub source_mac: Mac,
    /// Ethernet destination.
    pub destination_mac: Mac,
    /// IP source.
    pub source: IpAddr,
    /// IP destination, of the same family.
    pub destination: IpAddr,
}

/// An Ethernet frame with `payload` behind its header.
pub fn ethernet(pool: &mut Pool, to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Frame {
    let mut frame = pool.frame(ETHERNET_HEADER + payload.len());
    let bytes = frame.bytes_mut();
    packet::put(bytes, 0, &to.0);
    packet::put(bytes, 6, &from.0);
    packet::put_u16(bytes, 12, kind);
    packet::put(bytes, ETHERNET_HEADER, payload);
    frame
}

/// An IP packet with room for `len` bytes of transport, zeroed; and where the transport begins. `None` if the addresses
/// are of two families or the packet would be too long.
pub fn ip(
    pool: &mut Pool,
    way: Addresses,
    protocol: u8,
    hops: u8,
    len: usize,
) -> Option<(Frame, usize)> {
    let header = ETHERNET_HEADER;
    let (kind, size) = match (way.source, way.destination) {
        (IpAddr::V4(_), IpAddr::V4(_)) => (ethertype::IPV4, 20),
        (IpAddr::V6(_), IpAddr::V6(_)) => (ethertype::IPV6, 40),
        _ => return None,
    };
    let total = u16::try_from(len.checked_add(if size == 20 { 20 } else { 0 })?).ok()?;
    let transport = header + size;
    let mut frame = pool.frame(transport + len);
    let bytes = frame.bytes_mut();
    bytes.fill(0);
    packet::put(bytes, 0, &way.destination_mac.0);
    packet::put(bytes, 6, &way.source_mac.0);
    packet::put_u16(bytes, 12, kind);
    match (way.source, way.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet::put(bytes, header, &[0x45, 0]);
            packet::put_u16(bytes, header + 2, total);
            // Never fragmented on the way: there is no way. The identifier may be zero then (RFC 6864 section 4.1).
            packet::put_u16(bytes, header + 6, 0x4000);
            packet::put(bytes, header + 8, &[hops, protocol]);
            packet::put(bytes, header + 12, &source.octets());
            packet::put(bytes, header + 16, &destination.octets());
            ipv4_checksum(bytes, header, transport);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet::put(bytes, header, &[0x60, 0, 0, 0]);
            packet::put_u16(bytes, header + 4, total);
            packet::put(bytes, header + 6, &[protocol, hops]);
            packet::put(bytes, header + 8, &source.octets());
            packet::put(bytes, header + 24, &destination.octets());
        }
        _ => return None,
    }
    Some((frame, transport))
}

/// Writes the transport checksum into its field, which lies `field` bytes behind `transport`.
pub fn transport_checksum(
    bytes: &mut [u8],
    way: Addresses,
    protocol: u8,
    transport: usize,
    field: usize,
) {
    packet::put_u16(bytes, transport + field, 0);
    let (source, size) = packet::octets(way.source);
    let (destination, _) = packet::octets(way.destination);
    let data = bytes.get(transport..).unwrap_or_default();
    let pseudo = match protocol {
        protocol::ICMP => 0,
        _ => checksum::pseudo_header(
            source.get(..size).unwrap_or_default(),
            destination.get(..size).unwrap_or_default(),
            protocol,
            data.len(),
        ),
    };
    let value = match checksum::fold(pseudo + checksum::sum(data)) {
        0xffff => 0xffff,
        folded => !folded,
    };
    packet::put_u16(bytes, transport + field, value);
}

/// A UDP datagram.
pub fn udp(pool: &mut Pool, way: Addresses, ports: (u16, u16), payload: &[u8]) -> Option<Frame> {
    let len = payload.len().checked_add(8)?;
    let (mut frame, transport) = ip(pool, way, protocol::UDP, 64, len)?;
    let bytes = frame.bytes_mut();
    packet::put_u16(bytes, transport, ports.0);
    packet::put_u16(bytes, transport + 2, ports.1);
    packet::put_u16(bytes, transport + 4, u16::try_from(len).ok()?);
    packet::put(bytes, transport + 8, payload);
    transport_checksum(bytes, way, protocol::UDP, transport, 6);
    Some(frame)
}

/// An ICMP message of `way`'s family, from its type on; its checksum is written.
pub fn icmp(pool: &mut Pool, way: Addresses, hops: u8, message: &[u8]) -> Option<Frame> {
    let kind = match way.source {
        IpAddr::V4(_) => protocol::ICMP,
        IpAddr::V6(_) => protocol::ICMPV6,
    };
    let (mut frame, transport) = ip(pool, way, kind, hops, message.len())?;
    let bytes = frame.bytes_mut();
    packet::put(bytes, transport, message);
    transport_checksum(bytes, way, kind, transport, 2);
    Some(frame)
}

/// A gratuitous ARP announcement (RFC 5227 section 3): `mac` has `address`.
pub fn gratuitous_arp(pool: &mut Pool, mac: Mac, address: Ipv4Addr) -> Frame {
    let mut message = vec![0, 1, 8, 0, 6, 4, 0, 1];
    message.extend(mac.0);
    message.extend(address.octets());
    message.extend([0; 6]);
    message.extend(address.octets());
    ethernet(pool, Mac::BROADCAST, mac, ethertype::ARP, &message)
}

/// A reverse ARP request (RFC 903), as hypervisors send it for a machine that has moved: it only says where `mac` is.
pub fn rarp(pool: &mut Pool, mac: Mac) -> Frame {
    let mut message = vec![0, 1, 8, 0, 6, 4, 0, 3];
    message.extend(mac.0);
    message.extend([0; 4]);
    message.extend(mac.0);
    message.extend([0; 4]);
    ethernet(pool, Mac::BROADCAST, mac, ethertype::RARP, &message)
}

/// An unsolicited neighbour advertisement (RFC 4861 section 7.2.6): `mac` has `address`.
pub fn unsolicited_advertisement(pool: &mut Pool, mac: Mac, address: Ipv6Addr) -> Option<Frame> {
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac.0);
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let way = Addresses {
        source_mac: mac,
        destination_mac: packet::multicast(all.into())?,
        source: address.into(),
        destination: all.into(),
    };
    icmp(pool, way, 255, &message)
}
