//! Where things are in a frame: headers found once, checked, and named. Nothing is trusted.
//!
//! The formats themselves are `smoltcp::wire`'s, by its checked constructors only. Here is what it lacks or what has to
//! work on a frame in place: tags, the way through IPv6's extension headers, and one look for the hot path.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::{EthernetAddress, Ipv4Packet, Ipv6Packet};

/// An Ethernet address.
pub type Mac = EthernetAddress;

/// EtherTypes.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// Reverse ARP.
    pub const RARP: u16 = 0x8035;
    /// A customer's VLAN tag (802.1Q).
    pub const VLAN: u16 = 0x8100;
    /// A provider's VLAN tag (802.1ad).
    pub const SERVICE_VLAN: u16 = 0x88a8;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// IP protocol numbers.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
}

/// Bytes of an Ethernet header without tags.
pub const ETHERNET_HEADER: usize = 14;

/// IPv6 extension headers that are walked over before a packet counts as malformed.
const EXTENSIONS_MAX: usize = 8;

/// The big-endian 16-bit number at `at`.
pub fn get_u16(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(field.try_into().ok()?))
}

/// The big-endian 32-bit number at `at`.
pub fn get_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(field.try_into().ok()?))
}

/// Writes a big-endian 16-bit number at `at`; false if it lies outside.
pub fn put_u16(bytes: &mut [u8], at: usize, value: u16) -> bool {
    put(bytes, at, &value.to_be_bytes())
}

/// Writes `value` at `at`; false (and nothing written) if it does not fit.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> bool {
    let field = at
        .checked_add(value.len())
        .and_then(|end| bytes.get_mut(at..end));
    field.map(|field| field.copy_from_slice(value)).is_some()
}

/// The destination address.
pub fn destination(frame: &[u8]) -> Option<Mac> {
    frame.get(..6).map(Mac::from_bytes)
}

/// The source address.
pub fn source(frame: &[u8]) -> Option<Mac> {
    frame.get(6..12).map(Mac::from_bytes)
}

/// The outermost tag as (protocol, control), if there is one.
pub fn tag(frame: &[u8]) -> Option<(u16, u16)> {
    let protocol = get_u16(frame, 12)?;
    if protocol == ethertype::VLAN || protocol == ethertype::SERVICE_VLAN {
        // A frame that ends inside its tag has none, and is too short for anything else.
        return Some((protocol, get_u16(frame, 14)?));
    }
    None
}

/// EtherType behind up to two tags, and where its payload begins.
pub fn payload(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = 12;
    for _ in 0..3 {
        let kind = get_u16(frame, at)?;
        if kind != ethertype::VLAN && kind != ethertype::SERVICE_VLAN {
            return Some((kind, at + 2));
        }
        at += 4;
    }
    None
}

/// A packet that contradicts itself or ends too early.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the packet is malformed")]
pub struct Malformed;

/// What is in an untagged frame.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// ARP or RARP.
    Arp,
    /// IPv4 or IPv6.
    Ip(Ip),
    /// Another EtherType, or a tag.
    Other(u16),
}

/// An IP packet inside a frame. Offsets count from the frame's start.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// The transport's protocol number.
    pub protocol: u8,
    /// Where the IP header begins.
    pub header: usize,
    /// Where the transport's header begins; for a later fragment, its data.
    pub transport: usize,
    /// Where the packet ends; what follows is Ethernet's padding.
    pub end: usize,
    /// If it is a part of a packet.
    pub fragment: Option<Fragment>,
}

/// Which part of a packet a fragment is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Which packet.
    pub id: u32,
    /// Bytes of the packet's payload before this part.
    pub offset: u16,
    /// Whether more parts follow.
    pub more: bool,
}

impl Ip {
    /// The transport's bytes within `frame`, the one it was parsed from.
    pub fn payload<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        frame.get(self.transport..self.end).unwrap_or_default()
    }

    /// Whether the transport's header is in this frame: it is not in a later fragment.
    pub fn has_transport(&self) -> bool {
        self.fragment.is_none_or(|fragment| fragment.offset == 0)
    }
}

/// Finds the headers of an untagged frame.
///
/// # Errors
/// Lengths contradict each other or the frame.
pub fn content(frame: &[u8]) -> Result<Content, Malformed> {
    let kind = get_u16(frame, 12).ok_or(Malformed)?;
    match kind {
        ethertype::IPV4 | ethertype::IPV6 => ip(frame, ETHERNET_HEADER).map(Content::Ip),
        ethertype::ARP | ethertype::RARP => Ok(Content::Arp),
        other => Ok(Content::Other(other)),
    }
}

/// Finds the headers of the IP packet that begins at `header`.
///
/// # Errors
/// Lengths contradict each other or the frame.
pub fn ip(frame: &[u8], header: usize) -> Result<Ip, Malformed> {
    let bytes = frame.get(header..).ok_or(Malformed)?;
    match bytes.first().map(|first| first >> 4) {
        Some(4) => ipv4(bytes, header),
        Some(6) => ipv6(bytes, header),
        _ => Err(Malformed),
    }
}

fn ipv4(bytes: &[u8], header: usize) -> Result<Ip, Malformed> {
    let packet = Ipv4Packet::new_checked(bytes).map_err(|_| Malformed)?;
    if packet.header_len() < 20 {
        return Err(Malformed);
    }
    let fragmented = packet.more_frags() || packet.frag_offset() != 0;
    Ok(Ip {
        source: IpAddr::V4(packet.src_addr()),
        destination: IpAddr::V4(packet.dst_addr()),
        protocol: packet.next_header().into(),
        header,
        transport: header.saturating_add(usize::from(packet.header_len())),
        end: header.saturating_add(usize::from(packet.total_len())),
        fragment: fragmented.then(|| Fragment {
            id: u32::from(packet.ident()),
            offset: packet.frag_offset(),
            more: packet.more_frags(),
        }),
    })
}

fn ipv6(bytes: &[u8], header: usize) -> Result<Ip, Malformed> {
    let packet = Ipv6Packet::new_checked(bytes).map_err(|_| Malformed)?;
    let end = packet.total_len();
    let mut next: u8 = packet.next_header().into();
    let mut at = 40usize;
    let mut fragment = None;
    for _ in 0..EXTENSIONS_MAX {
        let field = |offset: usize| {
            let at = at.checked_add(offset)?;
            bytes.get(at).filter(|_| at < end).copied()
        };
        let len = match next {
            // Hop-by-hop options, routing, destination options (RFC 8200 section 4).
            0 | 43 | 60 => (usize::from(field(1).ok_or(Malformed)?) + 1) * 8,
            // Authentication (RFC 4302 section 2.2).
            51 => (usize::from(field(1).ok_or(Malformed)?) + 2) * 4,
            44 => {
                let word = get_u16(bytes, at + 2).ok_or(Malformed)?;
                fragment = Some(Fragment {
                    id: get_u32(bytes, at + 4).ok_or(Malformed)?,
                    offset: word & 0xfff8,
                    more: word & 1 != 0,
                });
                8
            }
            _ => break,
        };
        next = field(0).ok_or(Malformed)?;
        at += len;
        if at > end {
            return Err(Malformed);
        }
        if fragment.is_some_and(|part| part.offset > 0) {
            break;
        }
    }
    if matches!(next, 0 | 43 | 44 | 51 | 60) && fragment.is_none_or(|part| part.offset == 0) {
        return Err(Malformed);
    }
    Ok(Ip {
        source: IpAddr::V6(packet.src_addr()),
        destination: IpAddr::V6(packet.dst_addr()),
        protocol: next,
        header,
        transport: header.saturating_add(at),
        end: header.saturating_add(end),
        fragment,
    })
}

/// The bytes of an address, 4 or 16, in a buffer on the stack.
pub(crate) fn octets(address: IpAddr) -> ([u8; 16], usize) {
    match address {
        IpAddr::V4(address) => {
            let mut whole = [0; 16];
            for (to, from) in whole.iter_mut().zip(address.octets()) {
                *to = from;
            }
            (whole, 4)
        }
        IpAddr::V6(address) => (address.octets(), 16),
    }
}

/// The link-local address that RFC 4862 makes of an Ethernet address (modified EUI-64).
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

/// The Ethernet address of an IPv4 or IPv6 multicast group or broadcast, `None` for a unicast address.
pub fn multicast(address: IpAddr) -> Option<Mac> {
    match address {
        IpAddr::V4(Ipv4Addr::BROADCAST) => Some(Mac::BROADCAST),
        IpAddr::V4(address) if address.is_multicast() => {
            let [_, b, c, d] = address.octets();
            Some(EthernetAddress([0x01, 0x00, 0x5e, b & 0x7f, c, d]))
        }
        IpAddr::V6(address) if address.is_multicast() => {
            let [.., a, b, c, d] = address.octets();
            Some(EthernetAddress([0x33, 0x33, a, b, c, d]))
        }
        _ => None,
    }
}
