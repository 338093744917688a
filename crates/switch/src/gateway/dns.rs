//! DNS for the names of machines, and the book of questions that are forwarded. The asking itself is the owner's.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use foldhash::quality::RandomState;
use smoltcp::wire::{DnsPacket, DnsQueryType, DnsQuestion};

use crate::packet;
use crate::time::Time;

/// Seconds that an answer about a machine may be kept.
const TTL: u32 = 10;
/// Bytes of a header.
const HEADER: usize = 12;
/// Questions that may wait for an answer.
const PENDING_MAX: usize = 512;
/// How long a question waits.
const TIMEOUT: Duration = Duration::from_secs(12);
/// Names that the owner may set.
const NAMES_MAX: usize = 65_536;
/// Largest answer over UDP for a client that says nothing else (RFC 1035 section 4.2.1).
const PLAIN_MAX: usize = 512;

/// Response codes (RFC 1035 section 4.1.1).
mod code {
    pub const OK: u16 = 0;
    pub const FORMAT: u16 = 1;
    pub const NO_SUCH_NAME: u16 = 3;
    pub const NOT_IMPLEMENTED: u16 = 4;
}

/// Whether this is a host's name: one label of letters, digits and hyphens (RFC 1123 section 2.1).
pub fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// A name as it goes over the wire. `None` if a part of it has no or too many letters.
pub fn encode_name(name: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len() + 2);
    for label in name.split('.').filter(|_| !name.is_empty()) {
        let len = u8::try_from(label.len())
            .ok()
            .filter(|len| (1..=63).contains(len))?;
        out.push(len);
        out.extend(label.bytes());
    }
    out.push(0);
    (out.len() <= 255).then_some(out)
}

/// The addresses of a name.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

/// Who has which name in a network, both ways.
#[derive(Debug)]
pub struct Zone {
    domain: String,
    names: HashMap<String, Addresses, RandomState>,
    addresses: HashMap<IpAddr, String, RandomState>,
}

/// What to do with a question.
#[derive(Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Answer with this message.
    Answer(Vec<u8>),
    /// It is about names that are not ours: forward the message.
    Forward,
    /// No question at all.
    Ignore,
}

impl Zone {
    /// A zone without names. Names are known with and without `domain`, which may be empty.
    pub fn new(domain: &str) -> Zone {
        Zone {
            domain: domain.to_ascii_lowercase(),
            names: HashMap::default(),
            addresses: HashMap::default(),
        }
    }

    /// Gives a name its addresses; replaces those it had. False if it is no host's name or there are too many.
    pub fn set(&mut self, name: &str, addresses: Addresses) -> bool {
        let name = name.to_ascii_lowercase();
        if !is_label(&name) || (self.names.len() >= NAMES_MAX && !self.names.contains_key(&name)) {
            return false;
        }
        self.remove(&name);
        let both = [
            addresses.ipv4.map(IpAddr::V4),
            addresses.ipv6.map(IpAddr::V6),
        ];
        for address in both.into_iter().flatten() {
            self.addresses.insert(address, name.clone());
        }
        self.names.insert(name, addresses);
        true
    }

    /// Forgets a name.
    pub fn remove(&mut self, name: &str) {
        let name = name.to_ascii_lowercase();
        if self.names.remove(&name).is_some() {
            self.addresses.retain(|_, other| *other != name);
        }
    }

    /// The addresses of a name, with or without the domain.
    pub fn find(&self, name: &str) -> Option<Addresses> {
        self.names.get(self.host(name)?).copied()
    }

    /// The host's part of a name that can be ours.
    fn host<'a>(&self, name: &'a str) -> Option<&'a str> {
        let host = match name.strip_suffix(self.domain.as_str()) {
            Some(host) if !self.domain.is_empty() && host.ends_with('.') => {
                host.strip_suffix('.')?
            }
            _ => name,
        };
        (!host.contains('.')).then_some(host)
    }

    /// Whether a name is under our domain.
    fn owns(&self, name: &str) -> bool {
        let under = name.strip_suffix(self.domain.as_str());
        !self.domain.is_empty() && under.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    /// Looks at a message from a client.
    pub fn treat(&self, message: &[u8]) -> Treatment {
        let Ok(packet) = DnsPacket::new_checked(message) else {
            return Treatment::Ignore;
        };
        let flags = packet::get_u16(message, 2).unwrap_or(0);
        if flags & 0x8000 != 0 {
            return Treatment::Ignore;
        }
        if flags & 0x7800 != 0 {
            return answer(message, HEADER, code::NOT_IMPLEMENTED, &[]);
        }
        if packet.question_count() != 1 {
            return answer(message, HEADER, code::FORMAT, &[]);
        }
        let questions = packet.payload();
        let Ok((rest, question)) = DnsQuestion::parse(questions) else {
            // Of another class than the Internet's, or malformed: the host's resolver knows better.
            return Treatment::Forward;
        };
        let end = message.len().saturating_sub(rest.len());
        let mut name = String::new();
        for label in packet.parse_name(question.name) {
            let Ok(label) = label.map(|label| label.to_ascii_lowercase()) else {
                return answer(message, HEADER, code::FORMAT, &[]);
            };
            let Ok(label) = std::str::from_utf8(&label) else {
                return Treatment::Forward;
            };
            if !name.is_empty() {
                name.push('.');
            }
            name.push_str(label);
            if name.len() > 255 {
                return answer(message, HEADER, code::FORMAT, &[]);
            }
        }
        // A name in the question that points elsewhere could not be repeated in the answer.
        if question.name.iter().any(|byte| byte & 0xc0 == 0xc0) && question.name.len() < name.len()
        {
            return answer(message, HEADER, code::FORMAT, &[]);
        }
        self.question(message, end, &name, question.type_)
    }

    fn question(&self, message: &[u8], end: usize, name: &str, kind: DnsQueryType) -> Treatment {
        if let Some(address) = reverse(name) {
            return match self.addresses.get(&address) {
                Some(host) => {
                    let full = match self.domain.as_str() {
                        "" => host.clone(),
                        domain => format!("{host}.{domain}"),
                    };
                    let name = encode_name(&full).unwrap_or_default();
                    let known = u16::from(kind) == 12 && !name.is_empty();
                    answer(
                        message,
                        end,
                        code::OK,
                        &if known { vec![(12, name)] } else { vec![] },
                    )
                }
                None => Treatment::Forward,
            };
        }
        let Some(addresses) = self.find(name) else {
            // One label is a machine's name or nobody's: the world's resolvers must not see it.
            return match self.owns(name) || !name.contains('.') && !name.is_empty() {
                true => answer(message, end, code::NO_SUCH_NAME, &[]),
                false => Treatment::Forward,
            };
        };
        let mut records = Vec::new();
        if let Some(address) = addresses
            .ipv4
            .filter(|_| matches!(u16::from(kind), 1 | 255))
        {
            records.push((1, address.octets().to_vec()));
        }
        if let Some(address) = addresses
            .ipv6
            .filter(|_| matches!(u16::from(kind), 28 | 255))
        {
            records.push((28, address.octets().to_vec()));
        }
        answer(message, end, code::OK, &records)
    }
}

/// The address that a name under in-addr.arpa or ip6.arpa stands for.
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0u8; 4];
        let mut labels = rest.split('.');
        for octet in octets.iter_mut().rev() {
            *octet = labels.next()?.parse().ok()?;
        }
        return labels.next().is_none().then(|| IpAddr::from(octets));
    }
    let rest = name.strip_suffix(".ip6.arpa")?;
    let mut bits = 0u128;
    let mut count = 0;
    for label in rest.split('.').rev() {
        let digit = u8::from_str_radix(label, 16)
            .ok()
            .filter(|_| label.len() == 1)?;
        bits = bits << 4 | u128::from(digit);
        count += 1;
    }
    (count == 32).then(|| IpAddr::from(Ipv6Addr::from(bits)))
}

/// An answer to `message`, whose question ends at `end`, with records of (type, data) about the name asked for.
fn answer(message: &[u8], end: usize, code: u16, records: &[(u16, Vec<u8>)]) -> Treatment {
    let Some(asked) = message.get(..end).filter(|asked| asked.len() >= HEADER) else {
        return Treatment::Ignore;
    };
    let mut out = asked.to_vec();
    // An answer with authority; recursion is available. Opcode and "recursion desired" are the question's.
    let flags = packet::get_u16(message, 2).unwrap_or(0) & 0x7900 | 0x8480 | code;
    packet::put_u16(&mut out, 2, flags);
    packet::put_u16(&mut out, 4, u16::from(end > HEADER));
    packet::put_u16(&mut out, 6, records.len() as u16);
    packet::put(&mut out, 8, &[0; 4]);
    for (kind, data) in records {
        // The name is that of the question, which begins at 12.
        out.extend([0xc0, HEADER as u8]);
        out.extend(kind.to_be_bytes());
        out.extend(1u16.to_be_bytes());
        out.extend(TTL.to_be_bytes());
        out.extend((data.len() as u16).to_be_bytes());
        out.extend(data);
    }
    Treatment::Answer(out)
}

/// A question that the owner is to ask a resolver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// Names the question towards [`super::Gateway::dns_answer`].
    pub token: u64,
    /// The client's message, as it came. Whoever sends it over a shared socket gives it a new identifier.
    pub message: Vec<u8>,
}

#[derive(Debug)]
struct Pending<T> {
    client: T,
    message: Vec<u8>,
    until: Time,
}

/// Questions under way, with who asked.
#[derive(Debug)]
pub struct Forwarder<T> {
    pending: BTreeMap<u64, Pending<T>>,
    next: u64,
}

impl<T> Default for Forwarder<T> {
    fn default() -> Self {
        Forwarder {
            pending: BTreeMap::new(),
            next: 0,
        }
    }
}

impl<T> Forwarder<T> {
    /// Notes a client's question. When too many wait, the oldest is given up: its client asks again.
    pub fn ask(&mut self, client: T, message: &[u8], now: Time) -> Query {
        while let Some(oldest) = self.pending.first_entry() {
            if oldest.get().until > now && self.pending.len() < PENDING_MAX {
                break;
            }
            self.pending.pop_first();
        }
        let token = self.next;
        self.next = self.next.wrapping_add(1);
        let pending = Pending {
            client,
            message: message.to_vec(),
            until: now.after(TIMEOUT),
        };
        self.pending.insert(token, pending);
        Query {
            token,
            message: message.to_vec(),
        }
    }

    /// A resolver's answer: who gets it, and what. `None` if nobody waits for it or it answers another question.
    pub fn answer(&mut self, token: u64, answer: &[u8], now: Time) -> Option<(T, Vec<u8>)> {
        let question = question_of(answer);
        let asked = self.pending.get(&token)?;
        let matches = packet::get_u16(answer, 2)? & 0x8000 != 0
            && question.is_some()
            && question == question_of(&asked.message);
        if !matches {
            return None;
        }
        let asked = self
            .pending
            .remove(&token)
            .filter(|asked| asked.until > now)?;
        let mut out = answer.to_vec();
        packet::put_u16(&mut out, 0, packet::get_u16(&asked.message, 0)?);
        if out.len() > size_of(&asked.message) {
            // Truncated: the client asks again over TCP.
            out.truncate(HEADER + question?.len());
            let flags = packet::get_u16(&out, 2)? | 0x0200;
            packet::put_u16(&mut out, 2, flags);
            packet::put(&mut out, 6, &[0; 6]);
        }
        Some((asked.client, out))
    }

    /// Questions under way.
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }
}

/// The question section of a message with one question, in lower case.
fn question_of(message: &[u8]) -> Option<Vec<u8>> {
    let packet = DnsPacket::new_checked(message)
        .ok()
        .filter(|packet| packet.question_count() == 1)?;
    let (rest, _) = DnsQuestion::parse(packet.payload()).ok()?;
    let end = message.len().checked_sub(rest.len())?;
    Some(message.get(HEADER..end)?.to_ascii_lowercase())
}

/// Bytes that the client takes over UDP: what its EDNS record says (RFC 6891 section 6.1.2), which is the last one in
/// every message that programs send.
fn size_of(message: &[u8]) -> usize {
    let Some(question) = question_of(message) else {
        return PLAIN_MAX;
    };
    let counts = message.get(6..HEADER);
    let record = message.get(HEADER + question.len()..).unwrap_or_default();
    let plain = counts != Some(&[0, 0, 0, 0, 0, 1])
        || record.first() != Some(&0)
        || packet::get_u16(record, 1) != Some(41);
    match packet::get_u16(record, 3) {
        Some(size) if !plain => usize::from(size).max(PLAIN_MAX),
        _ => PLAIN_MAX,
    }
}
