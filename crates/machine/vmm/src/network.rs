//! A machine's network of its own (`--net user`): one thread that owns the switch, the gateway and the NAT, and exchanges
//! frames with the network card.
//!
//! The thread sleeps until the guest rings (its doorbells end in an eventfd), a socket has something, or a timer runs
//! out. When the guest has no buffers, nothing is read from sockets.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use serde::{Deserialize, Serialize};
use strata_devices::virtio::{Exchange, MTU_MAX, NetCounters, NetHost, NetPort};
use strata_switch::gateway::dhcp4::{Dhcp4Config, Lease};
use strata_switch::gateway::{Gateway, GatewayConfig, Ipv6Config, subnet};
use strata_switch::nat::{Host, Nat, NatConfig, NatCounters, Router};
use strata_switch::packet::Mac;
use strata_switch::{
    Capabilities, PortConfig, PortId, QueueConfig, Switch, SwitchConfig, SwitchError, Time, carry,
};

use crate::config::UserNetwork;

/// The gateway's Ethernet address: locally administered, the same everywhere.
const GATEWAY_MAC: [u8; 6] = [0x02, 0x73, 0x74, 0x72, 0x61, 0x01];
/// Length of an IPv4 subnet's prefix.
const PREFIX: u8 = 24;
/// Frames that each port moves in a round. Sixteen of the largest ones fit into a port's queue.
const BATCH: usize = 16;
/// Flows of one machine at most.
const FLOWS_MAX: usize = 16_384;
/// Bytes that its flows may hold before windows become small.
const FLOW_MEMORY: usize = 64 << 20;
/// Descriptors that are left for all else.
const DESCRIPTORS_LEFT: usize = 256;
/// How long a lease lasts. The gateway lives as long as the machine, so it need not be short.
const LEASE: Duration = Duration::from_secs(24 * 3600);

/// Tokens of what the thread waits for.
const DOORBELL: u64 = 0;
const SOCKETS: u64 = 1;

/// Why a machine has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host gives no thread or descriptor.
    #[error("the host gives no thread or descriptor for it")]
    Host(#[from] io::Error),
    /// The switch takes no port.
    #[error(transparent)]
    Switch(#[from] SwitchError),
    /// The ring to the switch is unusable.
    #[error("the ring of its port on the network is unusable")]
    Ring(#[from] strata_switch::ring::RingError),
    /// No subnet is free.
    #[error("every private IPv4 subnet is in use on this host")]
    NoSubnet,
}

/// What a machine's network has done.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct NetworkStats {
    /// The network card.
    pub card: NetCounters,
    /// Flows there are now.
    pub flows: u64,
    /// TCP connections that the guest began.
    pub tcp_out: u64,
    /// TCP connections to published ports.
    pub tcp_in: u64,
    /// Connections that ended with a reset.
    pub tcp_reset: u64,
    /// Flows of UDP and pings there have been.
    pub datagram_flows: u64,
    /// Flows refused because there were too many.
    pub refused_full: u64,
    /// Sockets that the host did not give.
    pub refused_host: u64,
    /// Packets of the guest dropped on their way out: malformed, in fragments, of other protocols.
    pub dropped_out: u64,
    /// Frames dropped by the switch.
    pub dropped_switch: u64,
}

/// The way to the thread's counters.
#[derive(Clone, Default)]
pub(crate) struct NetworkHandle(pub(crate) Arc<Mutex<NetworkStats>>);

impl NetworkHandle {
    /// What it has done.
    pub(crate) fn stats(&self) -> NetworkStats {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The address of a machine's card if none was chosen: locally administered, from its name, so that it stays the same.
pub fn mac_of(name: &str) -> [u8; 6] {
    // FNV-1a. Machines on one network with the same address would be told apart by their owner.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, d, ..] = hash.to_le_bytes();
    [0x02, 0x73, a, b, c, d]
}

/// Begins the network of a card. The thread ends with the card.
pub(crate) fn start(
    card: NetHost,
    mac: [u8; 6],
    name: &str,
    network: &UserNetwork,
    sockets: Box<dyn Host>,
) -> Result<NetworkHandle, NetworkError> {
    let handle = NetworkHandle::default();
    let mut work = Work::new(card, mac, name, network, sockets, handle.clone())?;
    std::thread::Builder::new()
        .name("network".to_owned())
        .spawn(move || work.run())?;
    Ok(handle)
}

struct Work {
    epoll: std::os::fd::OwnedFd,
    origin: Instant,
    switch: Switch,
    card: (PortId, NetPort),
    router: (PortId, Router),
    handle: NetworkHandle,
}

impl Work {
    fn new(
        card: NetHost,
        mac: [u8; 6],
        name: &str,
        network: &UserNetwork,
        sockets: Box<dyn Host>,
        handle: NetworkHandle,
    ) -> Result<Work, NetworkError> {
        let now = Time::ZERO;
        let own = network
            .gateway
            .and_then(|address| ipnet::Ipv4Net::new(address, PREFIX).ok());
        let ipv4 = own
            .or_else(|| subnet::choose("user", &[]))
            .ok_or(NetworkError::NoSubnet)?;
        let ipv6 = subnet::unique_local("strata", "user").ok_or(NetworkError::NoSubnet)?;
        let (gateway_mac, guest_mac) = (Mac::from_bytes(&GATEWAY_MAC), Mac::from_bytes(&mac));
        let guest4 = guest_of(ipv4.addr());
        let mut gateway = Gateway::new(
            GatewayConfig {
                mac: gateway_mac,
                ipv4: Some(ipv4),
                dhcp4: Some(Dhcp4Config {
                    mtu: MTU_MAX,
                    lease: LEASE,
                    ..Dhcp4Config::whole(ipv4)
                }),
                ipv6: Some(Ipv6Config {
                    network: ipv6,
                    router: true,
                    autonomous: true,
                    managed: false,
                    dns: true,
                }),
                also: Vec::new(),
                domain: String::new(),
                mtu: MTU_MAX,
            },
            now,
        );
        gateway.put_lease(
            Lease {
                mac: guest_mac,
                address: guest4,
                name: Some(name.to_owned()),
                expires: Time::from_nanos(u64::MAX),
                reserved: true,
            },
            now,
        );
        let nat = Nat::new(
            NatConfig {
                mac: gateway_mac,
                gateway4: ipv4.addr(),
                gateway6: ipv6.addr(),
                guest_mac,
                guest4,
                mtu: MTU_MAX,
                flows_max: flows_max(),
                memory_max: FLOW_MEMORY,
            },
            sockets,
        )?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let wait = |token, fd| {
            let token = epoll::EventData::new_u64(token);
            epoll::add(&epoll, fd, token, epoll::EventFlags::IN).map_err(io::Error::from)
        };
        wait(DOORBELL, card.doorbell())?;
        wait(SOCKETS, nat.descriptor())?;
        let mut switch = Switch::new(SwitchConfig::default(), now);
        let port = |name: &str, capabilities| PortConfig {
            name: name.to_owned(),
            capabilities,
            mtu: MTU_MAX,
            queues: QueueConfig::default(),
            ..PortConfig::default()
        };
        let card_port = switch.add_port(port("machine", Capabilities::default()), now)?;
        let router_port = switch.add_port(port("gateway", Capabilities::ALL), now)?;
        Ok(Work {
            epoll,
            origin: Instant::now(),
            switch,
            card: (card_port, NetPort::new(card)),
            router: (router_port, Router::new(gateway, nat)),
            handle,
        })
    }

    fn now(&self) -> Time {
        let since = self.origin.elapsed().as_nanos();
        Time::from_nanos(u64::try_from(since).unwrap_or(u64::MAX))
    }

    fn run(&mut self) {
        let mut at_once = false;
        loop {
            self.wait(at_once);
            let now = self.now();
            let exchanged = self.card.1.exchange(self.switch.pool());
            if exchanged == Exchange::Closed {
                return;
            }
            self.follow_capabilities(now);
            self.switch.tick(now);
            // A guest without buffers gets nothing more; what it sends goes on.
            let open = !self.card.1.has_frames_for_guest();
            self.router.1.set_open(open);
            let mut ports: [(PortId, &mut dyn strata_switch::Port); 2] = [
                (self.card.0, &mut self.card.1),
                (self.router.0, &mut self.router.1),
            ];
            let more = carry(&mut self.switch, &mut ports, BATCH, now);
            let fresh = open && self.card.1.has_frames_for_guest();
            // A card that keeps frames because many wait here has been relieved of a batch of them: that is `more`.
            at_once = fresh || more || exchanged == Exchange::More;
            self.tell();
        }
    }

    /// Sleeps until there is something to do, and takes what the sockets have.
    fn wait(&mut self, at_once: bool) {
        let now = self.now();
        let timeout = if at_once {
            Duration::ZERO
        } else {
            let router = strata_switch::Port::next_deadline(&self.router.1);
            let next = router.map_or(self.switch.next_deadline(), |router| {
                router.min(self.switch.next_deadline())
            });
            next.since(now)
        };
        let timeout = Timespec::try_from(timeout).ok();
        let mut events = Vec::with_capacity(4);
        // An interruption is like a time-out.
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref());
        let now = self.now();
        for event in events {
            match event.data.u64() {
                DOORBELL => self.card.1.host().hush(),
                SOCKETS => self.router.1.service(now, self.switch.pool()),
                _ => {}
            }
        }
    }

    /// The driver says what it takes when it begins, and may change it.
    fn follow_capabilities(&mut self, now: Time) {
        let capabilities = strata_switch::Port::capabilities(&self.card.1);
        if let Some(config) = self.switch.port(self.card.0)
            && config.capabilities != capabilities
        {
            let config = PortConfig {
                capabilities,
                ..config.clone()
            };
            // The port is there.
            let _ = self.switch.configure_port(self.card.0, config, now);
        }
    }

    fn tell(&self) {
        let nat: NatCounters = self.router.1.nat().counters();
        let dropped = |port| {
            let counters = self.switch.counters(port);
            counters.map_or(0, |counters| counters.dropped_total())
        };
        let stats = NetworkStats {
            card: self.card.1.host().counters(),
            flows: nat.flows,
            tcp_out: nat.tcp_out,
            tcp_in: nat.tcp_in,
            tcp_reset: nat.tcp_reset,
            datagram_flows: nat.datagram_flows,
            refused_full: nat.refused_full,
            refused_host: nat.refused_host,
            dropped_out: nat.malformed + nat.checksum + nat.fragments + nat.unknown,
            dropped_switch: dropped(self.card.0) + dropped(self.router.0),
        };
        *self.handle.0.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }
}

/// Flows that there may be: each has a descriptor.
fn flows_max() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let descriptors = usize::try_from(limit.unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
    FLOWS_MAX.min(descriptors.saturating_sub(DESCRIPTORS_LEFT))
}

/// The address of the one guest of a network with this gateway: the next one.
pub fn guest_of(gateway: Ipv4Addr) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(gateway).wrapping_add(1))
}

/// Where clouds give a machine's secrets to whoever asks from there, and which are on no link's own addresses: AWS by IPv6,
/// Alibaba, Azure.
const METADATA: [IpAddr; 3] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
];

/// Whether an address of the host's network is one that a guest may be let reach without being asked: not the host's own
/// loopback, not this link's, no group's, not one that stands for "here", and no cloud's metadata service.
pub fn is_outside(address: IpAddr) -> bool {
    if METADATA.contains(&address) {
        return false;
    }
    match address {
        IpAddr::V4(address) => {
            let [first, ..] = address.octets();
            first != 0
                && !address.is_loopback()
                && !address.is_link_local()
                && !address.is_multicast()
                && !address.is_broadcast()
        }
        IpAddr::V6(address) => match address.to_ipv4() {
            // Mapped and compatible addresses mean IPv4 ones; `::` and `::1` are among the latter.
            Some(_) => false,
            None => !address.is_multicast() && !address.is_unicast_link_local(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_makes_an_address() {
        let mac = mac_of("web");
        assert_eq!(mac, mac_of("web"));
        assert_ne!(mac, mac_of("web2"));
        assert_eq!(mac.first().map(|first| first & 3), Some(2));
    }

    #[test]
    fn the_host_itself_is_not_outside() {
        let inside = [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::127.0.0.1",
            "fe80::1",
            "ff02::1",
            "fd00:ec2::254",
            "100.100.100.200",
            "168.63.129.16",
        ];
        for text in inside {
            assert!(!is_outside(text.parse().unwrap()), "{text}");
        }
        for text in [
            "8.8.8.8",
            "10.1.2.3",
            "192.168.0.1",
            "2001:db8::1",
            "fd00::2",
        ] {
            assert!(is_outside(text.parse().unwrap()), "{text}");
        }
    }
}
