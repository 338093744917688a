//! Connection tracking of one port: what belongs to a connection that was let through. Bounded, and timed out.
//!
//! Each port has a table of its own, so a port that opens connections without end only harms itself, and what one
//! machine's rules let out is still subject to the other's.
//!
//! TCP is followed by its flags, not by its sequence numbers: the guards see to it that a neighbour cannot forge them,
//! and the machines' own stacks check the rest.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use foldhash::fast::RandomState;

use super::{Direction, GroupId, Opening, Policy};
use crate::counters::DropReason;
use crate::packet::{self, Content, Ip, protocol};
use crate::time::Time;

/// Packets in fragments whose later parts may pass.
const FRAGMENTS_MAX: usize = 256;
/// How long later fragments may take.
const FRAGMENTS_TIME: Duration = Duration::from_secs(15);
/// Shortest time between two searches of a full table for what has timed out.
const PURGE_EVERY: Duration = Duration::from_millis(500);

/// TCP flags.
mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// How long a connection lives without a packet.
mod timeout {
    use std::time::Duration;

    /// TCP that was not answered, or is half closed.
    pub const TCP_OPENING: Duration = Duration::from_secs(60);
    /// TCP in use (RFC 5382 REQ-5: at least 2 hours and 4 minutes).
    pub const TCP: Duration = Duration::from_secs(7440);
    /// TCP closed by one side (RFC 5382 REQ-5: 4 minutes).
    pub const TCP_HALF_CLOSED: Duration = Duration::from_secs(240);
    /// TCP closed or reset.
    pub const TCP_CLOSED: Duration = Duration::from_secs(30);
    /// UDP that was not answered.
    pub const UDP_OPENING: Duration = Duration::from_secs(30);
    /// UDP in use (RFC 4787 REQ-5: at least 2 minutes).
    pub const UDP: Duration = Duration::from_secs(180);
    /// Anything else.
    pub const OTHER: Duration = Duration::from_secs(60);
}

/// Both ends, seen from the port's machine. Addresses are IPv6 or mapped.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    local: u128,
    remote: u128,
    /// Protocol, local port, remote port.
    ports: u64,
}

#[derive(Copy, Clone, Debug)]
struct Connection {
    expires: Time,
    /// Of the rules that last let it through.
    generation: u64,
    opened: Direction,
    /// The ICMP type that opened it.
    icmp: u8,
    answered: bool,
    /// FIN seen from the machine, from the other side.
    closed: (bool, bool),
    reset: bool,
}

/// The connections of a port.
#[derive(Debug)]
pub(crate) struct Connections {
    table: HashMap<Key, Connection, RandomState>,
    fragments: HashMap<(u128, u128, u32), Time, RandomState>,
    limit: usize,
    purged: Time,
}

fn wide(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn narrow(address: u128) -> IpAddr {
    let address = std::net::Ipv6Addr::from(address);
    address
        .to_ipv4_mapped()
        .map_or(IpAddr::V6(address), IpAddr::V4)
}

impl Key {
    fn new(protocol: u8, local: (IpAddr, u16), remote: (IpAddr, u16)) -> Key {
        Key {
            local: wide(local.0),
            remote: wide(remote.0),
            ports: u64::from(protocol) << 32 | u64::from(local.1) << 16 | u64::from(remote.1),
        }
    }

    /// The opening that this connection had.
    fn opening(&self, connection: &Connection) -> Opening {
        let protocol = (self.ports >> 32) as u8;
        let service = match (protocol, connection.opened) {
            (protocol::ICMP | protocol::ICMPV6, _) => u16::from(connection.icmp),
            (_, Direction::In) => (self.ports >> 16) as u16,
            (_, Direction::Out) => self.ports as u16,
        };
        Opening {
            direction: connection.opened,
            protocol,
            local: narrow(self.local),
            remote: narrow(self.remote),
            service,
        }
    }
}

/// A packet as the table sees it.
struct Seen {
    key: Key,
    direction: Direction,
    icmp: u8,
    flags: u8,
}

/// The ends of a packet from `source` to `destination`, seen from the machine.
fn ends<T>(direction: Direction, source: T, destination: T) -> (T, T) {
    match direction {
        Direction::In => (destination, source),
        Direction::Out => (source, destination),
    }
}

/// The transport of a packet, as far as it is known; `None` if its header is cut off.
fn seen(payload: &[u8], ip: &Ip, direction: Direction) -> Option<Seen> {
    let mut icmp = 0;
    let mut flags = 0;
    let ports = match ip.protocol {
        protocol::TCP => {
            flags = *payload.get(13)?;
            (packet::get_u16(payload, 0)?, packet::get_u16(payload, 2)?)
        }
        protocol::UDP => {
            payload.get(7)?;
            (packet::get_u16(payload, 0)?, packet::get_u16(payload, 2)?)
        }
        protocol::ICMP | protocol::ICMPV6 => {
            icmp = *payload.first()?;
            // Echo and its answer have an identifier, which is as a port on both sides.
            let echo = match ip.protocol {
                protocol::ICMP => matches!(icmp, 0 | 8),
                _ => matches!(icmp, 128 | 129),
            };
            let identifier = packet::get_u16(payload, 4)?;
            if echo {
                (identifier, identifier)
            } else {
                (0, u16::from(icmp))
            }
        }
        _ => (0, 0),
    };
    let (local, remote) = ends(direction, (ip.source, ports.0), (ip.destination, ports.1));
    Some(Seen {
        key: Key::new(ip.protocol, local, remote),
        direction,
        icmp,
        flags,
    })
}

impl Connections {
    /// Empty; at most `limit` connections.
    pub(crate) fn new(limit: usize) -> Connections {
        Connections {
            table: HashMap::default(),
            fragments: HashMap::default(),
            limit,
            purged: Time::ZERO,
        }
    }

    /// Changes how many there may be; those that are there stay.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Connections known.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether an untagged frame may pass the port in this direction; notes the connection it opens.
    pub(crate) fn pass(
        &mut self,
        frame: &[u8],
        content: Content,
        direction: Direction,
        (policy, groups): (&mut Policy, &[GroupId]),
        now: Time,
    ) -> Result<(), DropReason> {
        let refused = match direction {
            Direction::In => DropReason::PolicyIn,
            Direction::Out => DropReason::PolicyOut,
        };
        let ip = match content {
            Content::Arp => return Ok(()),
            Content::Ip(ip) => ip,
            Content::Other(_) => return Err(refused),
        };
        if !ip.has_transport() {
            return self.later_fragment(&ip, now).then_some(()).ok_or(refused);
        }
        let payload = ip.payload(frame);
        let packet = seen(payload, &ip, direction).ok_or(refused)?;
        self.decide(&packet, &ip, payload, (policy, groups), now)
            .map_err(|reason| reason.unwrap_or(refused))?;
        if let Some(fragment) = ip.fragment {
            if self.fragments.len() >= FRAGMENTS_MAX {
                self.fragments.retain(|_, until| *until > now);
            }
            if self.fragments.len() < FRAGMENTS_MAX {
                let key = (wide(ip.source), wide(ip.destination), fragment.id);
                self.fragments.insert(key, now.after(FRAGMENTS_TIME));
            }
        }
        Ok(())
    }

    /// Later fragments pass if the first one did; not if they could overwrite the transport's header (RFC 1858).
    fn later_fragment(&self, ip: &Ip, now: Time) -> bool {
        let offset = ip.fragment.map_or(0, |fragment| fragment.offset);
        let key = (
            wide(ip.source),
            wide(ip.destination),
            ip.fragment.map_or(0, |fragment| fragment.id),
        );
        let header = if ip.protocol == protocol::TCP { 20 } else { 8 };
        offset >= header && self.fragments.get(&key).is_some_and(|until| *until > now)
    }

    /// `Err(None)`: the rules refuse it.
    fn decide(
        &mut self,
        packet: &Seen,
        ip: &Ip,
        payload: &[u8],
        (policy, groups): (&mut Policy, &[GroupId]),
        now: Time,
    ) -> Result<(), Option<DropReason>> {
        let generation = policy.generation();
        if let Some(connection) = self.table.get_mut(&packet.key)
            && connection.expires > now
            && !connection.opens_again(packet)
        {
            if connection.generation != generation {
                if !policy.allows(groups, &packet.key.opening(connection), false) {
                    self.table.remove(&packet.key);
                    return Err(None);
                }
                connection.generation = generation;
            }
            connection.follow(packet, now);
            return Ok(());
        }
        if self.is_related(ip, payload, packet.direction, (policy, groups), now) {
            return Ok(());
        }
        let mut connection = Connection {
            expires: now,
            generation,
            opened: packet.direction,
            icmp: packet.icmp,
            answered: false,
            closed: (false, false),
            reset: false,
        };
        if !policy.allows(groups, &packet.key.opening(&connection), true) {
            return Err(None);
        }
        // A reset opens nothing, and nobody answers to a group.
        if packet.flags & flag::RST != 0 || ip.destination.is_multicast() {
            return Ok(());
        }
        if self.table.len() >= self.limit && !self.table.contains_key(&packet.key) {
            if now.since(self.purged) >= PURGE_EVERY {
                self.purge(now);
            }
            if self.table.len() >= self.limit {
                return Err(Some(DropReason::ConnectionsFull));
            }
        }
        connection.follow(packet, now);
        self.table.insert(packet.key, connection);
        Ok(())
    }

    /// Whether an ICMP error is about a connection that we know.
    fn is_related(
        &mut self,
        ip: &Ip,
        payload: &[u8],
        direction: Direction,
        (policy, groups): (&mut Policy, &[GroupId]),
        now: Time,
    ) -> bool {
        let error = match (ip.protocol, payload.first()) {
            (protocol::ICMP, Some(kind)) => matches!(kind, 3 | 11 | 12),
            (protocol::ICMPV6, Some(kind)) => matches!(kind, 1..=4),
            _ => false,
        };
        if !error {
            return false;
        }
        // The packet that the error is about went the other way. It may be cut off, so its length says nothing.
        let Some(inner) = payload.get(8..).and_then(quoted) else {
            return false;
        };
        let back = match direction {
            Direction::In => Direction::Out,
            Direction::Out => Direction::In,
        };
        let (local, remote) = ends(back, inner.1, inner.2);
        let key = Key::new(inner.0, local, remote);
        let Some(connection) = self.table.get(&key).filter(|one| one.expires > now) else {
            return false;
        };
        connection.generation == policy.generation()
            || policy.allows(groups, &key.opening(connection), false)
    }

    /// Forgets what has timed out.
    pub(crate) fn purge(&mut self, now: Time) {
        self.purged = now;
        self.table.retain(|_, one| one.expires > now);
        self.fragments.retain(|_, until| *until > now);
    }
}

/// Protocol and ends of a packet that an ICMP error quotes.
#[allow(clippy::type_complexity)]
fn quoted(bytes: &[u8]) -> Option<(u8, (IpAddr, u16), (IpAddr, u16))> {
    let (protocol, source, destination, transport) = match bytes.first()? >> 4 {
        4 => {
            let header = usize::from(*bytes.first()? & 15) * 4;
            let address =
                |at: usize| Some(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into());
            (*bytes.get(9)?, address(12)?, address(16)?, header.max(20))
        }
        6 => {
            let address =
                |at: usize| Some(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?.into());
            (*bytes.get(6)?, address(8)?, address(24)?, 40)
        }
        _ => return None,
    };
    let payload = bytes.get(transport..)?;
    let ports = match protocol {
        protocol::TCP | protocol::UDP => {
            (packet::get_u16(payload, 0)?, packet::get_u16(payload, 2)?)
        }
        protocol::ICMP | protocol::ICMPV6 => {
            let identifier = packet::get_u16(payload, 4)?;
            (identifier, identifier)
        }
        _ => (0, 0),
    };
    Some((protocol, (source, ports.0), (destination, ports.1)))
}

impl Connection {
    /// Whether a packet begins a new connection in the place of this one, which has ended.
    fn opens_again(&self, packet: &Seen) -> bool {
        let ended = self.reset || self.closed == (true, true);
        ended && packet.flags & (flag::SYN | flag::ACK) == flag::SYN
    }

    /// Takes a packet in.
    fn follow(&mut self, packet: &Seen, now: Time) {
        let protocol = (packet.key.ports >> 32) as u8;
        if packet.direction != self.opened {
            self.answered = true;
        }
        if protocol == protocol::TCP {
            self.reset |= packet.flags & flag::RST != 0;
            if packet.flags & flag::FIN != 0 {
                match packet.direction {
                    Direction::Out => self.closed.0 = true,
                    Direction::In => self.closed.1 = true,
                }
            }
        }
        let time = match (protocol, self.answered, self.closed) {
            (protocol::TCP, ..) if self.reset => timeout::TCP_CLOSED,
            (protocol::TCP, _, (true, true)) => timeout::TCP_CLOSED,
            (protocol::TCP, true, (false, false)) => timeout::TCP,
            (protocol::TCP, true, _) => timeout::TCP_HALF_CLOSED,
            (protocol::TCP, ..) => timeout::TCP_OPENING,
            (protocol::UDP, true, _) => timeout::UDP,
            (protocol::UDP, ..) => timeout::UDP_OPENING,
            _ => timeout::OTHER,
        };
        self.expires = now.after(time);
    }
}
