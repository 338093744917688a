//! Neighbour and router discovery for IPv6 (RFC 4861), the gateway's side.

use std::net::Ipv6Addr;

use ipnet::Ipv6Net;

use crate::packet::{self, Mac};

/// ICMPv6 types.
pub mod kind {
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// Router solicitation.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Router advertisement.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Redirect.
    pub const REDIRECT: u8 = 137;
}

/// Seconds that an advertised prefix is good for.
const PREFIX_LIFETIME: u32 = 86_400;

/// A neighbour solicitation or advertisement.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The address that is asked for or advertised.
    pub target: Ipv6Addr,
    /// The Ethernet address in its option: of the sender in a solicitation, of the target in an advertisement.
    pub mac: Option<Mac>,
}

/// Options of a discovery message as (type, data behind type and length). Ends at one that does not fit (RFC 4861
/// section 4.6: such a message is dropped; here its earlier options count, which harms nobody).
pub fn options(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(*bytes.get(1)?) * 8;
        let option = bytes.get(..len).filter(|option| !option.is_empty())?;
        bytes = bytes.get(len..)?;
        Some((*option.first()?, option.get(2..)?))
    })
}

/// The Ethernet address in a message's source (1) or target (2) option.
pub fn link_address(rest: &[u8], wanted: u8) -> Option<Mac> {
    let (_, data) = options(rest).find(|(kind, data)| *kind == wanted && data.len() == 6)?;
    Some(Mac::from_bytes(data))
}

/// Takes a neighbour solicitation or advertisement apart, from its ICMPv6 type on.
pub fn neighbour(message: &[u8]) -> Option<Neighbour> {
    let option = match *message.first()? {
        kind::NEIGHBOUR_SOLICITATION => 1,
        kind::NEIGHBOUR_ADVERTISEMENT => 2,
        _ => return None,
    };
    let target = <[u8; 16]>::try_from(message.get(8..24)?).ok()?;
    Some(Neighbour {
        target: target.into(),
        mac: link_address(message.get(24..)?, option),
    })
}

/// A neighbour advertisement, solicited or not, from a router or not; its checksum is still to be written.
pub fn advertisement(target: Ipv6Addr, mac: Mac, solicited: bool) -> Vec<u8> {
    // Router, solicited, override.
    let flags = 0xa0 | if solicited { 0x40 } else { 0 };
    let mut out = vec![kind::NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    out.extend(target.octets());
    out.extend([2, 1]);
    out.extend(mac.0);
    out
}

/// A neighbour solicitation.
pub fn solicitation(target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let mut out = vec![kind::NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    out.extend(target.octets());
    out.extend([1, 1]);
    out.extend(mac.0);
    out
}

/// What a router advertisement says.
#[derive(Clone, Debug)]
pub struct Advertisement<'a> {
    /// The router's Ethernet address.
    pub mac: Mac,
    /// Seconds that it is a default router; zero: it is none.
    pub lifetime: u16,
    /// The network's prefix.
    pub prefix: Ipv6Net,
    /// Whether machines make addresses of their own from it.
    pub autonomous: bool,
    /// Whether there is a DHCPv6 server for addresses.
    pub managed: bool,
    /// The network's MTU.
    pub mtu: u16,
    /// The resolver (RFC 8106).
    pub dns: Option<Ipv6Addr>,
    /// The search domain, or empty.
    pub domain: &'a str,
}

impl Advertisement<'_> {
    /// The message; its checksum is still to be written.
    pub fn message(&self) -> Vec<u8> {
        let flags = if self.managed { 0xc0 } else { 0x40 };
        let mut out = vec![kind::ROUTER_ADVERTISEMENT, 0, 0, 0, 64, flags];
        out.extend(self.lifetime.to_be_bytes());
        out.extend([0; 8]);
        out.extend([1, 1]);
        out.extend(self.mac.0);
        out.extend([5, 1, 0, 0]);
        out.extend(u32::from(self.mtu).to_be_bytes());
        // On link; autonomous only with the interface identifiers of Ethernet (RFC 4862 section 5.5.3).
        let autonomous = self.autonomous && self.prefix.prefix_len() == 64;
        let flags = 0x80 | if autonomous { 0x40 } else { 0 };
        out.extend([3, 4, self.prefix.prefix_len(), flags]);
        out.extend(PREFIX_LIFETIME.to_be_bytes());
        out.extend((PREFIX_LIFETIME / 2).to_be_bytes());
        out.extend([0; 4]);
        out.extend(self.prefix.network().octets());
        if let Some(dns) = self.dns {
            out.extend([25, 3, 0, 0]);
            out.extend(3600u32.to_be_bytes());
            out.extend(dns.octets());
        }
        let domain = super::dns::encode_name(self.domain).filter(|name| name.len() > 1);
        if let Some(mut domain) = domain {
            domain.resize(domain.len().next_multiple_of(8), 0);
            out.extend([31, (domain.len() / 8 + 1) as u8, 0, 0]);
            out.extend(3600u32.to_be_bytes());
            out.extend(domain);
        }
        out
    }
}

/// The group in which an address is asked for (RFC 4291 section 2.7.1).
pub fn solicited_node(target: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = target.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// Whether a discovery message is from this link: its hop limit was never decremented (RFC 4861 section 6.1.1).
pub fn from_this_link(frame: &[u8], header: usize) -> bool {
    packet::get_u16(frame, header + 6).is_some_and(|word| word & 0xff == 255)
}
