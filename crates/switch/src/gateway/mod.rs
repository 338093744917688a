//! The gateway of a network: it answers for itself, gives out addresses and names, and hands the rest to whoever routes.
//!
//! A [`Gateway`] hangs on a port like a machine does. [`Gateway::receive`] takes a frame from the network; what the
//! gateway answers comes out of [`Gateway::next_frame`], questions for the host's resolvers out of
//! [`Gateway::next_query`]. A packet for somewhere else is given back, whole (fragments are put together before), to be
//! routed. It does no I/O and keeps nothing but the values its owner gives it and takes from it.

pub mod dhcp4;
pub mod dhcp6;
pub mod dns;
pub mod ndp;
mod neighbours;
pub mod reply;
pub mod subnet;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr};

use crate::fragment::{self, Reassembler};
use crate::frame::Frame;
use crate::packet::{self, Content, ETHERNET_HEADER, Ip, Mac, ethertype, protocol};
use crate::pool::Pool;
use crate::time::Time;
use dhcp4::{Dhcp4, Dhcp4Config, Lease};
use dns::{Forwarder, Query, Treatment, Zone};
use neighbours::Neighbours;
use reply::Addresses;

/// Answers that may wait; more are dropped.
const ANSWERS_MAX: usize = 1024;
/// Questions that may wait to be fetched.
const QUERIES_MAX: usize = 256;
/// Time between router advertisements that nobody asked for.
const ADVERTISE_EVERY: Duration = Duration::from_secs(200);
/// Shortest time between two advertisements to all (RFC 4861 section 6.2.6).
const ADVERTISE_PAUSE: Duration = Duration::from_secs(3);

/// What a gateway is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayConfig {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its address and network.
    pub ipv4: Option<Ipv4Net>,
    /// What its DHCP server gives out; `None`: it has none.
    pub dhcp4: Option<Dhcp4Config>,
    /// Its address and network.
    pub ipv6: Option<Ipv6Config>,
    /// Further addresses that it answers for, such as one that stands for the host.
    pub also: Vec<IpAddr>,
    /// Domain of the network's machines, or empty.
    pub domain: String,
    /// Longest IP packet in the network.
    pub mtu: u16,
}

/// IPv6 of a gateway.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Ipv6Config {
    /// Its address and network.
    pub network: Ipv6Net,
    /// Whether it is the default route.
    pub router: bool,
    /// Whether machines make addresses of their own (SLAAC). The network must be a /64.
    pub autonomous: bool,
    /// Whether it gives out addresses by DHCPv6.
    pub managed: bool,
    /// Whether it is the resolver.
    pub dns: bool,
}

/// Who asked a question.
#[derive(Copy, Clone, Debug)]
struct Client {
    way: Addresses,
    port: u16,
}

/// The gateway. See the module's first page.
#[derive(Debug)]
pub struct Gateway {
    config: GatewayConfig,
    dhcp4: Option<Dhcp4>,
    zone: Zone,
    forwarder: Forwarder<Client>,
    neighbours: Neighbours,
    reassembler: Reassembler,
    answers: VecDeque<Frame>,
    queries: VecDeque<Query>,
    advertise_at: Time,
    pause_until: Time,
    identifier: u32,
    dropped: u64,
}

impl Gateway {
    /// A gateway that has given out nothing yet.
    pub fn new(config: GatewayConfig, now: Time) -> Gateway {
        let mut zone = Zone::new(&config.domain);
        let own = dns::Addresses {
            ipv4: config.ipv4.map(|network| network.addr()),
            ipv6: config.ipv6.map(|ipv6| ipv6.network.addr()),
        };
        zone.set("gateway", own);
        let dhcp4 = config.dhcp4.clone().map(|mut dhcp4| {
            dhcp4
                .excluded
                .extend(config.also.iter().filter_map(|address| match address {
                    IpAddr::V4(address) => Some(*address),
                    IpAddr::V6(_) => None,
                }));
            Dhcp4::new(dhcp4)
        });
        Gateway {
            dhcp4,
            zone,
            forwarder: Forwarder::default(),
            neighbours: Neighbours::default(),
            reassembler: Reassembler::default(),
            answers: VecDeque::new(),
            queries: VecDeque::new(),
            advertise_at: now,
            pause_until: now,
            identifier: 0,
            dropped: 0,
            config,
        }
    }

    /// What it is.
    pub fn config(&self) -> &GatewayConfig {
        &self.config
    }

    /// The DHCP server, for its leases.
    pub fn dhcp4(&mut self) -> Option<&mut Dhcp4> {
        self.dhcp4.as_mut()
    }

    /// The names of the network's machines.
    pub fn zone(&mut self) -> &mut Zone {
        &mut self.zone
    }

    /// Answers that were dropped because too many waited.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The IPv6 address that a machine gets by DHCPv6, and makes itself where it follows RFC 4862 to the letter.
    pub fn ipv6_of(&self, mac: Mac) -> Option<Ipv6Addr> {
        let network = self.config.ipv6?.network;
        let prefix = u128::from(network.network());
        let host = u128::from(packet::link_local(mac)) & u128::from(u64::MAX);
        (network.prefix_len() <= 64).then(|| Ipv6Addr::from(prefix | host))
    }

    /// Whether an address is the gateway's own.
    pub fn is_own(&self, address: IpAddr) -> bool {
        let own = match address {
            IpAddr::V4(address) => self
                .config
                .ipv4
                .is_some_and(|network| network.addr() == address),
            IpAddr::V6(address) => self.config.ipv6.is_some_and(|ipv6| {
                ipv6.network.addr() == address || packet::link_local(self.config.mac) == address
            }),
        };
        own || self.config.also.contains(&address)
    }

    /// Whether an address is in the network.
    fn is_local(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self
                .config
                .ipv4
                .is_some_and(|network| network.contains(&address)),
            IpAddr::V6(address) => self
                .config
                .ipv6
                .is_some_and(|ipv6| ipv6.network.contains(&address) || is_link_local(address)),
        }
    }

    /// Takes a frame from the network. Gives back a packet that is to be routed, untagged and whole: not to the gateway,
    /// or to it but to none of its own services (a port that may be published, a message about a connection).
    pub fn receive(&mut self, frame: Frame, now: Time, pool: &mut Pool) -> Option<Frame> {
        let bytes = frame.bytes();
        let ours =
            packet::destination(bytes).is_some_and(|to| to == self.config.mac || to.is_multicast());
        let content = packet::content(bytes);
        match content {
            Ok(Content::Arp) if ours => self.arp(bytes, now, pool),
            Ok(Content::Ip(ip)) if ours => return self.ip(frame, ip, now, pool),
            _ => {}
        }
        pool.put(frame);
        None
    }

    fn answer(&mut self, frame: Frame) {
        if self.answers.len() < ANSWERS_MAX {
            self.answers.push_back(frame);
        } else {
            self.dropped += 1;
        }
    }

    /// Puts a packet with complete checksums on its way into the network, in fragments if it is longer than the MTU.
    pub fn send(&mut self, frame: Frame, pool: &mut Pool) {
        self.identifier = self.identifier.wrapping_add(1);
        let (mtu, id) = (self.config.mtu, self.identifier);
        let mut pieces = Vec::new();
        if frame.len() <= ETHERNET_HEADER + usize::from(mtu) || frame.offload.segmentation.is_some()
        {
            self.answer(frame);
        } else if fragment::split(frame, mtu, id, pool, |piece| pieces.push(piece)) {
            pieces.into_iter().for_each(|piece| self.answer(piece));
        } else {
            self.dropped += 1;
        }
    }

    /// The next frame for the network.
    pub fn next_frame(&mut self) -> Option<Frame> {
        self.answers.pop_front()
    }

    /// The next question for the host's resolvers.
    pub fn next_query(&mut self) -> Option<Query> {
        self.queries.pop_front()
    }

    /// A resolver's answer to the question with this token. What does not answer it is ignored.
    pub fn dns_answer(&mut self, token: u64, message: &[u8], now: Time, pool: &mut Pool) {
        if let Some((client, message)) = self.forwarder.answer(token, message, now)
            && let Some(frame) = reply::udp(pool, client.way, (53, client.port), &message)
        {
            self.send(frame, pool);
        }
    }

    /// When `tick` has something to do.
    pub fn next_deadline(&self) -> Option<Time> {
        self.config.ipv6.map(|_| self.advertise_at)
    }

    /// Does what time asks for: router advertisements.
    pub fn tick(&mut self, now: Time, pool: &mut Pool) {
        if self.config.ipv6.is_some() && now >= self.advertise_at {
            self.advertise_at = now.after(ADVERTISE_EVERY);
            self.pause_until = now.after(ADVERTISE_PAUSE);
            let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            self.advertise(all, Mac::from_bytes(&[0x33, 0x33, 0, 0, 0, 1]), pool);
        }
    }

    /// The Ethernet address of a machine, if it is known; if not, the network is asked, and the packet is best tried
    /// again in a while.
    pub fn neighbour(&mut self, address: IpAddr, now: Time, pool: &mut Pool) -> Option<Mac> {
        let known = self.neighbours.find(address, now);
        let leased = || match address {
            IpAddr::V4(address) => Some(self.dhcp4.as_ref()?.holder(address)?.mac),
            IpAddr::V6(_) => None,
        };
        let found = known.or_else(leased);
        if found.is_none() && self.is_local(address) && self.neighbours.ask(address, now) {
            self.ask(address, pool);
        }
        found
    }

    fn ask(&mut self, address: IpAddr, pool: &mut Pool) {
        let mac = self.config.mac;
        let question = match (address, self.config.ipv4, self.config.ipv6) {
            (IpAddr::V4(target), Some(network), _) => {
                let question = ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Request,
                    source_hardware_addr: mac,
                    source_protocol_addr: network.addr(),
                    target_hardware_addr: Mac::from_bytes(&[0; 6]),
                    target_protocol_addr: target,
                };
                Some(arp_frame(question, Mac::BROADCAST, mac, pool))
            }
            (IpAddr::V6(target), _, Some(_)) => {
                let group = ndp::solicited_node(target);
                let way = Addresses {
                    source_mac: mac,
                    destination_mac: packet::multicast(group.into()).unwrap_or(Mac::BROADCAST),
                    source: packet::link_local(mac).into(),
                    destination: group.into(),
                };
                reply::icmp(pool, way, 255, &ndp::solicitation(target, mac))
            }
            _ => None,
        };
        if let Some(question) = question {
            self.answer(question);
        }
    }

    fn arp(&mut self, bytes: &[u8], now: Time, pool: &mut Pool) {
        let payload = bytes.get(ETHERNET_HEADER..).unwrap_or_default();
        let kind = packet::get_u16(bytes, 12);
        let message = ArpPacket::new_checked(payload).and_then(|packet| ArpRepr::parse(&packet));
        let Ok(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr: mac,
            source_protocol_addr: address,
            target_protocol_addr: target,
            ..
        }) = message
        else {
            return;
        };
        if kind != Some(ethertype::ARP) || packet::source(bytes) != Some(mac) {
            return;
        }
        if self.is_local(address.into()) && !self.is_own(address.into()) {
            self.neighbours.learn(address.into(), mac, now);
        }
        if operation == ArpOperation::Request && self.is_own(target.into()) {
            let answer = ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: self.config.mac,
                source_protocol_addr: target,
                target_hardware_addr: mac,
                target_protocol_addr: address,
            };
            let frame = arp_frame(answer, mac, self.config.mac, pool);
            self.answer(frame);
        }
    }

    fn ip(&mut self, frame: Frame, ip: Ip, now: Time, pool: &mut Pool) -> Option<Frame> {
        let frame = self.reassembler.push(frame, ip, now, pool)?;
        let bytes = frame.bytes();
        let (Ok(Content::Ip(ip)), Some(from)) = (packet::content(bytes), packet::source(bytes))
        else {
            pool.put(frame);
            return None;
        };
        if self.is_local(ip.source) && !self.is_own(ip.source) {
            self.neighbours.learn(ip.source, from, now);
        }
        let own = self.is_own(ip.destination);
        let payload = ip.payload(bytes);
        let ports = (packet::get_u16(payload, 0), packet::get_u16(payload, 2));
        // The length that UDP says, within the packet's.
        let data = packet::get_u16(payload, 4).and_then(|len| payload.get(8..usize::from(len)));
        let way = Addresses {
            source_mac: self.config.mac,
            destination_mac: from,
            source: ip.destination,
            destination: ip.source,
        };
        match (ip.protocol, ports, ip.destination) {
            (protocol::UDP, (Some(68), Some(67)), IpAddr::V4(to)) if own || to.is_broadcast() => {
                self.serve_dhcp4(data, way, now, pool);
            }
            (protocol::UDP, (_, Some(547)), IpAddr::V6(_)) => self.serve_dhcp6(data, way, pool),
            (protocol::UDP, (Some(port), Some(53)), _) if own => {
                self.serve_dns(data, Client { way, port }, now, pool);
            }
            (protocol::ICMPV6, ..)
                if payload
                    .first()
                    .is_some_and(|kind| (133..=137).contains(kind)) =>
            {
                if ndp::from_this_link(bytes, ip.header) {
                    self.discovery(payload, ip, way, now, pool);
                }
            }
            (protocol::ICMP | protocol::ICMPV6, ..) if own && is_echo_request(&ip, payload) => {
                self.echo(payload, way, pool);
            }
            // Groups are not routed.
            (_, _, IpAddr::V4(to))
                if to.is_multicast() || to.is_broadcast() || self.is_broadcast(to) => {}
            (_, _, IpAddr::V6(to)) if to.is_multicast() => {}
            _ => return Some(frame),
        }
        pool.put(frame);
        None
    }

    fn is_broadcast(&self, address: Ipv4Addr) -> bool {
        self.config
            .ipv4
            .is_some_and(|network| network.prefix_len() < 31 && network.broadcast() == address)
    }

    fn serve_dhcp4(&mut self, data: Option<&[u8]>, way: Addresses, now: Time, pool: &mut Pool) {
        let (Some(server), Some(data), Some(network)) = (&mut self.dhcp4, data, self.config.ipv4)
        else {
            return;
        };
        let client = way.destination_mac;
        let before = server.lease(client).and_then(|lease| lease.name.clone());
        let Some(answer) = server.receive(data, client, now) else {
            return;
        };
        let lease = server.lease(client).cloned();
        if let Some(lease) = lease {
            self.name(&lease, before.as_deref());
        }
        let broadcast = answer.to == Ipv4Addr::BROADCAST;
        let way = Addresses {
            destination_mac: if broadcast { Mac::BROADCAST } else { client },
            source: network.addr().into(),
            destination: answer.to.into(),
            ..way
        };
        if let Some(frame) = reply::udp(pool, way, (67, 68), &answer.message) {
            self.send(frame, pool);
        }
    }

    /// Gives a machine the name that its lease says, if it is nobody else's.
    fn name(&mut self, lease: &Lease, before: Option<&str>) {
        let own = Some(lease.address);
        if let Some(before) = before.filter(|before| lease.name.as_deref() != Some(before))
            && self
                .zone
                .find(before)
                .is_some_and(|addresses| addresses.ipv4 == own)
        {
            self.zone.remove(before);
        }
        let Some(name) = &lease.name else {
            return;
        };
        let free = self
            .zone
            .find(name)
            .is_none_or(|addresses| addresses.ipv4 == own);
        if free {
            let ipv6 = self
                .ipv6_of(lease.mac)
                .filter(|_| self.config.ipv6.is_some_and(|ipv6| ipv6.managed));
            self.zone.set(name, dns::Addresses { ipv4: own, ipv6 });
        }
    }

    /// Gives a machine an address and a name before it asks, or back after a restart. False if that cannot be.
    pub fn put_lease(&mut self, lease: Lease, now: Time) -> bool {
        let Some(server) = &mut self.dhcp4 else {
            return false;
        };
        let put = server.put(lease.clone(), now);
        if put {
            self.name(&lease, None);
        }
        put
    }

    /// Gives a machine that its owner announces its address, and a name, before it asks. `None`: there is none to give.
    pub fn assign(&mut self, mac: Mac, name: Option<String>, now: Time) -> Option<Ipv4Addr> {
        let name = name.filter(|name| dns::is_label(name));
        let address = self.dhcp4.as_mut()?.assign(mac, name, now)?;
        if let Some(lease) = self
            .dhcp4
            .as_ref()
            .and_then(|server| server.lease(mac))
            .cloned()
        {
            self.name(&lease, None);
        }
        Some(address)
    }

    fn serve_dhcp6(&mut self, data: Option<&[u8]>, way: Addresses, pool: &mut Pool) {
        let Some((ipv6, data)) = self.config.ipv6.zip(data) else {
            return;
        };
        let server = dhcp6::Dhcp6 {
            mac: self.config.mac,
            address: self.ipv6_of(way.destination_mac).filter(|_| ipv6.managed),
            dns: ipv6.dns.then(|| ipv6.network.addr()),
            domain: &self.config.domain,
        };
        let Some(answer) = server.answer(data) else {
            return;
        };
        let way = Addresses {
            source: packet::link_local(self.config.mac).into(),
            ..way
        };
        if let Some(frame) = reply::udp(pool, way, (547, 546), &answer) {
            self.send(frame, pool);
        }
    }

    fn serve_dns(&mut self, data: Option<&[u8]>, client: Client, now: Time, pool: &mut Pool) {
        let Some(data) = data else {
            return;
        };
        match self.zone.treat(data) {
            Treatment::Answer(message) => {
                if let Some(frame) = reply::udp(pool, client.way, (53, client.port), &message) {
                    self.send(frame, pool);
                }
            }
            Treatment::Forward if self.queries.len() < QUERIES_MAX => {
                let query = self.forwarder.ask(client, data, now);
                self.queries.push_back(query);
            }
            Treatment::Forward => self.dropped += 1,
            Treatment::Ignore => {}
        }
    }

    fn discovery(&mut self, message: &[u8], ip: Ip, way: Addresses, now: Time, pool: &mut Pool) {
        let (Some(_), IpAddr::V6(source)) = (self.config.ipv6, ip.source) else {
            return;
        };
        match message.first() {
            Some(&ndp::kind::ROUTER_SOLICITATION) => {
                // One that asks without an address is answered to all.
                if source.is_unspecified() {
                    self.advertise_at = self.advertise_at.min(self.pause_until.max(now));
                    self.tick(now, pool);
                } else {
                    self.advertise(source, way.destination_mac, pool);
                }
            }
            Some(&ndp::kind::NEIGHBOUR_SOLICITATION) => {
                let asked =
                    ndp::neighbour(message).filter(|asked| self.is_own(asked.target.into()));
                let Some(asked) = asked else {
                    return;
                };
                let probe = source.is_unspecified();
                let to = if probe {
                    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)
                } else {
                    source
                };
                let way = Addresses {
                    source: asked.target.into(),
                    destination: to.into(),
                    destination_mac: packet::multicast(to.into()).unwrap_or(way.destination_mac),
                    ..way
                };
                let message = ndp::advertisement(asked.target, self.config.mac, !probe);
                if let Some(frame) = reply::icmp(pool, way, 255, &message) {
                    self.answer(frame);
                }
            }
            Some(&ndp::kind::NEIGHBOUR_ADVERTISEMENT) => {
                if let Some(told) = ndp::neighbour(message)
                    && !self.is_own(told.target.into())
                    && self.is_local(told.target.into())
                {
                    let mac = told.mac.unwrap_or(way.destination_mac);
                    self.neighbours.learn(told.target.into(), mac, now);
                }
            }
            _ => {}
        }
    }

    fn advertise(&mut self, to: Ipv6Addr, to_mac: Mac, pool: &mut Pool) {
        let Some(ipv6) = self.config.ipv6 else {
            return;
        };
        let message = ndp::Advertisement {
            mac: self.config.mac,
            lifetime: if ipv6.router { 1800 } else { 0 },
            prefix: ipv6.network,
            autonomous: ipv6.autonomous,
            managed: ipv6.managed,
            mtu: self.config.mtu,
            dns: ipv6.dns.then(|| ipv6.network.addr()),
            domain: &self.config.domain,
        }
        .message();
        let way = Addresses {
            source_mac: self.config.mac,
            destination_mac: to_mac,
            source: packet::link_local(self.config.mac).into(),
            destination: to.into(),
        };
        if let Some(frame) = reply::icmp(pool, way, 255, &message) {
            self.answer(frame);
        }
    }

    fn echo(&mut self, request: &[u8], way: Addresses, pool: &mut Pool) {
        let mut message = request.to_vec();
        let answer = match way.source {
            IpAddr::V4(_) => 0,
            IpAddr::V6(_) => ndp::kind::ECHO_REPLY,
        };
        packet::put(&mut message, 0, &[answer]);
        if let Some(frame) = reply::icmp(pool, way, 64, &message) {
            self.send(frame, pool);
        }
    }
}

fn is_link_local(address: Ipv6Addr) -> bool {
    matches!(address.segments(), [0xfe80..=0xfebf, ..])
}

fn is_echo_request(ip: &Ip, message: &[u8]) -> bool {
    let kind = match ip.protocol {
        protocol::ICMP => 8,
        _ => ndp::kind::ECHO_REQUEST,
    };
    message.len() >= 8 && message.first() == Some(&kind)
}

fn arp_frame(message: ArpRepr, to: Mac, from: Mac, pool: &mut Pool) -> Frame {
    let mut bytes = [0; 28];
    message.emit(&mut ArpPacket::new_unchecked(&mut bytes));
    reply::ethernet(pool, to, from, ethertype::ARP, &bytes)
}
