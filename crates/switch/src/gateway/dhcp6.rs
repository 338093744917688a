//! A DHCP server for IPv6 (RFC 8415) that needs no memory: a machine's address follows from its Ethernet address, unless
//! its owner has chosen another.

use std::net::Ipv6Addr;

use crate::packet::{self, Mac};

/// Message types (RFC 8415 section 7.3).
mod message {
    pub const SOLICIT: u8 = 1;
    pub const ADVERTISE: u8 = 2;
    pub const REQUEST: u8 = 3;
    pub const CONFIRM: u8 = 4;
    pub const RENEW: u8 = 5;
    pub const REBIND: u8 = 6;
    pub const REPLY: u8 = 7;
    pub const RELEASE: u8 = 8;
    pub const DECLINE: u8 = 9;
    pub const INFORMATION: u8 = 11;
}

/// Options (RFC 8415 section 21, RFC 3646).
mod option {
    pub const CLIENT: u16 = 1;
    pub const SERVER: u16 = 2;
    pub const IA_NA: u16 = 3;
    pub const ADDRESS: u16 = 5;
    pub const STATUS: u16 = 13;
    pub const RAPID_COMMIT: u16 = 14;
    pub const DNS: u16 = 23;
    pub const DOMAINS: u16 = 24;
}

/// Seconds that an address is good for.
const LIFETIME: u32 = 3600;
/// Identity associations of one message that are answered.
const ASSOCIATIONS_MAX: usize = 8;

/// The options of a message, one after the other; ends at the first that does not fit.
fn options(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let kind = packet::get_u16(bytes, 0)?;
        let len = usize::from(packet::get_u16(bytes, 2)?);
        let data = bytes.get(4..4 + len)?;
        bytes = bytes.get(4 + len..)?;
        Some((kind, data))
    })
}

fn put(out: &mut Vec<u8>, kind: u16, data: &[u8]) {
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u16).to_be_bytes());
    out.extend(data);
}

/// What the server says.
#[derive(Clone, Debug)]
pub struct Dhcp6<'a> {
    /// The gateway's Ethernet address: the server's identity follows from it.
    pub mac: Mac,
    /// Address of the machine that asks; `None` if none are given out.
    pub address: Option<Ipv6Addr>,
    /// The resolver.
    pub dns: Option<Ipv6Addr>,
    /// The search domain, or empty.
    pub domain: &'a str,
}

impl Dhcp6<'_> {
    /// DUID-LL of the server (RFC 8415 section 11.4).
    fn identity(&self) -> [u8; 10] {
        let [a, b, c, d, e, f] = self.mac.0;
        [0, 3, 0, 1, a, b, c, d, e, f]
    }

    /// The answer to a client's message.
    pub fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        let (header, rest) = request.split_at_checked(4)?;
        let kind = *header.first()?;
        let find = |wanted| {
            options(rest)
                .find(|(kind, _)| *kind == wanted)
                .map(|(_, data)| data)
        };
        let client = find(option::CLIENT).filter(|duid| (3..=130).contains(&duid.len()));
        let server = find(option::SERVER);
        let ours = server == Some(&self.identity());
        // Who must name the server, and who must not (RFC 8415 section 16).
        let valid = match kind {
            message::SOLICIT | message::CONFIRM | message::REBIND => {
                client.is_some() && server.is_none()
            }
            message::REQUEST | message::RENEW | message::RELEASE | message::DECLINE => {
                client.is_some() && ours
            }
            message::INFORMATION => server.is_none() || ours,
            _ => false,
        };
        if !valid {
            return None;
        }
        let rapid = kind == message::SOLICIT && find(option::RAPID_COMMIT).is_some();
        let answer = match kind {
            message::SOLICIT if !rapid => message::ADVERTISE,
            _ => message::REPLY,
        };
        let mut out = vec![answer];
        out.extend(header.get(1..)?);
        if let Some(client) = client {
            put(&mut out, option::CLIENT, client);
        }
        put(&mut out, option::SERVER, &self.identity());
        if rapid {
            put(&mut out, option::RAPID_COMMIT, &[]);
        }
        let associations = || {
            let all =
                options(rest).filter(|(kind, data)| *kind == option::IA_NA && data.len() >= 12);
            all.map(|(_, data)| data).take(ASSOCIATIONS_MAX)
        };
        match kind {
            message::CONFIRM => {
                let on_link = associations()
                    .all(|one| self.named(one).all(|address| Some(address) == self.address));
                // 0 success, 4 not on link.
                put(&mut out, option::STATUS, &[0, if on_link { 0 } else { 4 }]);
            }
            message::RELEASE | message::DECLINE => put(&mut out, option::STATUS, &[0, 0]),
            message::INFORMATION => {}
            _ => {
                for (index, one) in associations().enumerate() {
                    let own = self.address.filter(|_| index == 0);
                    put(&mut out, option::IA_NA, &self.association(one, own)?);
                }
            }
        }
        if let Some(dns) = self.dns {
            put(&mut out, option::DNS, &dns.octets());
        }
        let domain = super::dns::encode_name(self.domain);
        if let Some(domain) = domain.filter(|name| name.len() > 1) {
            put(&mut out, option::DOMAINS, &domain);
        }
        Some(out)
    }

    /// Addresses that an identity association names.
    fn named<'b>(&self, association: &'b [u8]) -> impl Iterator<Item = Ipv6Addr> + use<'b> {
        options(association.get(12..).unwrap_or_default())
            .filter(|(kind, _)| *kind == option::ADDRESS)
            .filter_map(|(_, data)| {
                Some(Ipv6Addr::from(<[u8; 16]>::try_from(data.get(..16)?).ok()?))
            })
    }

    fn association(&self, asked: &[u8], own: Option<Ipv6Addr>) -> Option<Vec<u8>> {
        let mut out = asked.get(..4)?.to_vec();
        out.extend((LIFETIME / 2).to_be_bytes());
        out.extend((LIFETIME / 8 * 7).to_be_bytes());
        let address = |out: &mut Vec<u8>, address: Ipv6Addr, lifetime: u32| {
            let mut data = address.octets().to_vec();
            data.extend(lifetime.to_be_bytes());
            data.extend(lifetime.to_be_bytes());
            put(out, option::ADDRESS, &data);
        };
        match own {
            Some(own) => address(&mut out, own, LIFETIME),
            // 2: no addresses available.
            None => put(&mut out, option::STATUS, &[0, 2]),
        }
        // What the machine has from elsewhere ends now.
        for other in self
            .named(asked)
            .filter(|other| Some(*other) != own)
            .take(ASSOCIATIONS_MAX)
        {
            address(&mut out, other, 0);
        }
        Some(out)
    }
}
