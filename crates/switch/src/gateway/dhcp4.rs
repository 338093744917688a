//! A DHCP server for IPv4 (RFC 2131): a message in, a message out. Leases are values that the owner keeps.
//!
//! A machine is known by its Ethernet address and not by its client identifier: copies of an image have the same
//! identifier. A lease stays with its machine after it has ended, until its address is needed for another one.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::time::Duration;

use foldhash::quality::RandomState;
use ipnet::Ipv4Net;
use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};

use crate::packet::Mac;
use crate::time::Time;

/// How long an offered address is kept for the answer.
const OFFER: Duration = Duration::from_secs(60);
/// How long an address that a machine found in use is not given out.
const DECLINED: Duration = Duration::from_secs(600);
/// Addresses of a pool that are ever used.
const POOL_MAX: u32 = 65_536;

/// Kinds of options (RFC 2132).
mod option {
    pub const HOST_NAME: u8 = 12;
    pub const DOMAIN_NAME: u8 = 15;
    pub const MTU: u8 = 26;
    pub const BROADCAST: u8 = 28;
    pub const REQUESTED: u8 = 50;
    pub const MESSAGE_TYPE: u8 = 53;
    pub const SERVER: u8 = 54;
}

/// What the server gives out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dhcp4Config {
    /// The gateway's address in its network.
    pub network: Ipv4Net,
    /// First address given out.
    pub first: Ipv4Addr,
    /// Last address given out.
    pub last: Ipv4Addr,
    /// How long a lease lasts.
    pub lease: Duration,
    /// Whether the gateway is the default route.
    pub router: bool,
    /// Addresses in between that belong to somebody else, such as one that stands for the host.
    pub excluded: Vec<Ipv4Addr>,
    /// Resolvers, at most three.
    pub dns: Vec<Ipv4Addr>,
    /// Search domain, or empty.
    pub domain: String,
    /// The network's MTU.
    pub mtu: u16,
}

impl Dhcp4Config {
    /// All of a network but its first and last address and the gateway's, leases of an hour.
    pub fn whole(network: Ipv4Net) -> Dhcp4Config {
        let base = u32::from(network.network());
        let end = u32::from(network.broadcast());
        Dhcp4Config {
            network,
            first: Ipv4Addr::from(base.saturating_add(1).min(end)),
            last: Ipv4Addr::from(end.saturating_sub(1).max(base)),
            lease: Duration::from_secs(3600),
            router: true,
            excluded: Vec::new(),
            dns: vec![network.addr()],
            domain: String::new(),
            mtu: 1500,
        }
    }
}

/// An address and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The machine.
    pub mac: Mac,
    /// Its address.
    pub address: Ipv4Addr,
    /// The name it gave itself, or that its owner gave it.
    pub name: Option<String>,
    /// When it ends. A lease that was kept over a restart begins anew.
    pub expires: Time,
    /// Set by the owner: never given to another.
    pub reserved: bool,
}

/// The server.
#[derive(Debug)]
pub struct Dhcp4 {
    config: Dhcp4Config,
    by_mac: HashMap<Mac, Lease, RandomState>,
    by_address: BTreeMap<Ipv4Addr, Mac>,
    declined: BTreeMap<Ipv4Addr, Time>,
    changed: bool,
}

/// An answer and where it goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The message.
    pub message: Vec<u8>,
    /// IP destination; the Ethernet destination is the client's unless this is broadcast.
    pub to: Ipv4Addr,
}

/// What of a client's message matters.
struct Request {
    kind: DhcpMessageType,
    mac: Mac,
    xid: u32,
    current: Ipv4Addr,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    name: Option<String>,
    broadcast: bool,
}

fn parse(message: &[u8]) -> Option<Request> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    // A request, of Ethernet, with the magic number of DHCP; not by way of a relay.
    let plain = message.get(..3) == Some(&[1, 1, 6])
        && packet.magic_number() == 0x6382_5363
        && packet.relay_agent_ip().is_unspecified();
    if !plain {
        return None;
    }
    let mut request = Request {
        kind: DhcpMessageType::Unknown(0),
        mac: packet.client_hardware_address(),
        xid: packet.transaction_id(),
        current: packet.client_ip(),
        requested: None,
        server: None,
        name: None,
        broadcast: packet.flags().bits() & 0x8000 != 0,
    };
    let address = |data: &[u8]| <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from);
    for one in packet.options() {
        match one.kind {
            option::MESSAGE_TYPE => request.kind = one.data.first().copied().unwrap_or(0).into(),
            option::REQUESTED => request.requested = address(one.data),
            option::SERVER => request.server = address(one.data),
            option::HOST_NAME => request.name = host_name(one.data),
            _ => {}
        }
    }
    Some(request)
}

/// The first label of a name that is fit for DNS, in lower case.
fn host_name(data: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(data).ok()?.trim_end_matches('\0');
    let label = text.split('.').next()?.to_ascii_lowercase();
    // Names with a meaning of their own: a machine that took one could direct others to itself.
    let special = ["localhost", "wpad", "isatap", "gateway"].contains(&label.as_str());
    (super::dns::is_label(&label) && !special).then_some(label)
}

impl Dhcp4 {
    /// A server that has given out nothing.
    pub fn new(config: Dhcp4Config) -> Dhcp4 {
        Dhcp4 {
            config,
            by_mac: HashMap::default(),
            by_address: BTreeMap::new(),
            declined: BTreeMap::new(),
            changed: false,
        }
    }

    /// Every lease, to be kept; those that have ended too, for they are given to the same machine again.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.by_address
            .values()
            .filter_map(|mac| self.by_mac.get(mac))
    }

    /// Whether leases have changed since this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Gives a machine its address before it asks: kept leases, and addresses that the owner has chosen. False if it is
    /// not in the network or another machine's.
    pub fn put(&mut self, lease: Lease, now: Time) -> bool {
        if !self.usable(lease.address)
            || self
                .by_address
                .get(&lease.address)
                .is_some_and(|mac| *mac != lease.mac)
        {
            return false;
        }
        let expires = now.after(self.config.lease);
        self.bind(Lease { expires, ..lease });
        true
    }

    /// Gives a machine that its owner announces an address, and a name, before it asks. `None`: there is no address left.
    pub fn assign(&mut self, mac: Mac, name: Option<String>, now: Time) -> Option<Ipv4Addr> {
        let request = Request {
            kind: DhcpMessageType::Discover,
            mac,
            xid: 0,
            current: Ipv4Addr::UNSPECIFIED,
            requested: None,
            server: None,
            name,
            broadcast: false,
        };
        let address = self.choose(&request, now)?;
        self.grant(&request, address, now, self.config.lease);
        Some(address)
    }

    /// Takes a machine's lease away.
    pub fn remove(&mut self, mac: Mac) {
        if let Some(lease) = self.by_mac.remove(&mac) {
            self.by_address.remove(&lease.address);
            self.changed = true;
        }
    }

    /// Ends a machine's lease now: its address stays with it until another machine needs it. One that its owner chose
    /// stays.
    pub fn end(&mut self, mac: Mac, now: Time) {
        if let Some(lease) = self.by_mac.get_mut(&mac).filter(|lease| !lease.reserved) {
            lease.expires = now;
            self.changed = true;
        }
    }

    /// A machine's lease.
    pub fn lease(&self, mac: Mac) -> Option<&Lease> {
        self.by_mac.get(&mac)
    }

    /// The machine with this address.
    pub fn holder(&self, address: Ipv4Addr) -> Option<&Lease> {
        self.by_mac.get(self.by_address.get(&address)?)
    }

    fn usable(&self, address: Ipv4Addr) -> bool {
        let network = self.config.network;
        network.contains(&address)
            && address != network.addr()
            && !self.config.excluded.contains(&address)
            && (network.prefix_len() >= 31
                || (address != network.network() && address != network.broadcast()))
    }

    fn bind(&mut self, lease: Lease) {
        if let Some(old) = self.by_mac.remove(&lease.mac) {
            self.by_address.remove(&old.address);
        }
        if let Some(old) = self.by_address.insert(lease.address, lease.mac)
            && old != lease.mac
        {
            self.by_mac.remove(&old);
        }
        self.by_mac.insert(lease.mac, lease);
        self.changed = true;
    }

    /// Whether `mac` may have `address`.
    fn free_for(&self, mac: Mac, address: Ipv4Addr, now: Time) -> bool {
        self.usable(address)
            && (self.config.first..=self.config.last).contains(&address)
            && self
                .declined
                .get(&address)
                .is_none_or(|until| *until <= now)
            && self
                .by_address
                .get(&address)
                .is_none_or(|holder| *holder == mac)
    }

    /// The address for a machine: its own, the one it asks for, the first free one, or the one that ended longest ago.
    fn choose(&self, request: &Request, now: Time) -> Option<Ipv4Addr> {
        if let Some(own) = self.by_mac.get(&request.mac) {
            return Some(own.address);
        }
        let free = |address: &Ipv4Addr| self.free_for(request.mac, *address, now);
        let first = u32::from(self.config.first);
        let last = u32::from(self.config.last).min(first.saturating_add(POOL_MAX));
        request
            .requested
            .filter(free)
            .or_else(|| (first..=last).map(Ipv4Addr::from).find(free))
            .or_else(|| {
                let ended = self
                    .by_mac
                    .values()
                    .filter(|lease| !lease.reserved && lease.expires <= now);
                Some(ended.min_by_key(|lease| lease.expires)?.address)
            })
    }

    /// Answers the message of a client whose frame came from `from`.
    pub fn receive(&mut self, message: &[u8], from: Mac, now: Time) -> Option<Answer> {
        let request = parse(message).filter(|request| request.mac == from)?;
        let us = self.config.network.addr();
        let meant = request.server.is_none_or(|server| server == us);
        match request.kind {
            DhcpMessageType::Discover => {
                let address = self.choose(&request, now)?;
                self.grant(&request, address, now, OFFER);
                Some(self.answer(&request, DhcpMessageType::Offer, address))
            }
            // Another server's offer was taken.
            DhcpMessageType::Request if !meant => {
                let offered = self.by_mac.get(&request.mac);
                if offered.is_some_and(|lease| !lease.reserved) {
                    self.remove(request.mac);
                }
                None
            }
            DhcpMessageType::Request => self.request(&request, now),
            DhcpMessageType::Decline if meant => {
                let address = request.requested.filter(|_| request.server.is_some())?;
                let own = self.by_mac.get(&request.mac)?;
                if own.address == address && !own.reserved {
                    self.remove(request.mac);
                    self.declined.retain(|_, until| *until > now);
                    self.declined.insert(address, now.after(DECLINED));
                }
                None
            }
            DhcpMessageType::Release if meant => {
                let lease = self.by_mac.get_mut(&request.mac)?;
                if lease.address == request.current {
                    lease.expires = now;
                    self.changed = true;
                }
                None
            }
            DhcpMessageType::Inform => {
                Some(self.answer(&request, DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED))
            }
            _ => None,
        }
    }

    fn request(&mut self, request: &Request, now: Time) -> Option<Answer> {
        let wanted = match request.requested {
            Some(address) => address,
            None if !request.current.is_unspecified() => request.current,
            None => return None,
        };
        let own = self.by_mac.get(&request.mac).map(|lease| lease.address);
        // A machine that we do not know may keep what it has, if it is free: the leases may have been lost.
        let granted =
            own == Some(wanted) || (own.is_none() && self.free_for(request.mac, wanted, now));
        if granted {
            self.grant(request, wanted, now, self.config.lease);
            Some(self.answer(request, DhcpMessageType::Ack, wanted))
        } else {
            Some(self.answer(request, DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED))
        }
    }

    fn grant(&mut self, request: &Request, address: Ipv4Addr, now: Time, time: Duration) {
        let old = self.by_mac.get(&request.mac);
        let name = match old {
            Some(lease) if lease.reserved => lease.name.clone(),
            old => request.name.clone().or_else(|| old?.name.clone()),
        };
        let reserved = old.is_some_and(|lease| lease.reserved);
        let before = old.map_or(Time::ZERO, |lease| lease.expires);
        self.bind(Lease {
            mac: request.mac,
            address,
            name,
            expires: now
                .after(time)
                .max(before.min(now.after(self.config.lease))),
            reserved,
        });
    }

    fn answer(&self, request: &Request, kind: DhcpMessageType, address: Ipv4Addr) -> Answer {
        let network = self.config.network;
        let refused = kind == DhcpMessageType::Nak;
        let seconds = u32::try_from(self.config.lease.as_secs()).unwrap_or(u32::MAX);
        let timed = (!refused && !address.is_unspecified()).then_some(seconds);
        let mtu = self.config.mtu.to_be_bytes();
        let broadcast = network.broadcast().octets();
        let domain = self.config.domain.as_bytes();
        let name = self
            .by_mac
            .get(&request.mac)
            .and_then(|lease| lease.name.clone());
        let mut more = vec![];
        if !refused {
            more.push(DhcpOption {
                kind: option::MTU,
                data: &mtu,
            });
            more.push(DhcpOption {
                kind: option::BROADCAST,
                data: &broadcast,
            });
            if !domain.is_empty() && domain.len() <= 255 {
                more.push(DhcpOption {
                    kind: option::DOMAIN_NAME,
                    data: domain,
                });
            }
            if let Some(name) = &name {
                more.push(DhcpOption {
                    kind: option::HOST_NAME,
                    data: name.as_bytes(),
                });
            }
        }
        let message = DhcpRepr {
            message_type: kind,
            transaction_id: request.xid,
            secs: 0,
            client_hardware_address: request.mac,
            client_ip: if refused {
                Ipv4Addr::UNSPECIFIED
            } else {
                request.current
            },
            your_ip: address,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: (self.config.router && !refused).then_some(network.addr()),
            subnet_mask: (!refused).then(|| network.netmask()),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: request.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(network.addr()),
            parameter_request_list: None,
            dns_servers: (!refused && !self.config.dns.is_empty())
                .then(|| self.config.dns.iter().copied().take(3).collect()),
            max_size: None,
            lease_duration: timed,
            renew_duration: timed.map(|seconds| seconds / 2),
            rebind_duration: timed.map(|seconds| seconds / 8 * 7),
            additional_options: &more,
        };
        // Old clients expect the size that BOOTP messages have (RFC 1542 section 2.1).
        let mut bytes = vec![0; message.buffer_len().max(300)];
        if message
            .emit(&mut DhcpPacket::new_unchecked(&mut bytes))
            .is_err()
        {
            bytes.clear();
        }
        let to = match () {
            () if !request.current.is_unspecified() && !refused => request.current,
            () if request.broadcast || refused || address.is_unspecified() => Ipv4Addr::BROADCAST,
            () => address,
        };
        Answer { message: bytes, to }
    }
}
