//! What a port may claim to be: its Ethernet and IP addresses, and whether it may act as a DHCP server or a router.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

use foldhash::quality::RandomState;
use ipnet::IpNet;
use smoltcp::wire::{ArpPacket, ArpRepr};

use crate::config::PortId;
use crate::counters::DropReason;
use crate::gateway::ndp::{self, kind};
use crate::packet::{self, Content, ETHERNET_HEADER, Ip, Mac, ethertype, protocol};
use crate::vlan::Vid;

/// Link-local addresses that one port may have beside those that follow from its Ethernet addresses.
const CLAIMS_MAX: usize = 4;
/// ICMPv6 type of a multicast listener report (RFC 3810).
const LISTENER_REPORT: u8 = 143;

/// What a guarded port may be. Its IP addresses are those of its [`PortConfig`](crate::PortConfig).
///
/// Only ARP, IPv4 and IPv6 pass a guarded port, untagged once the port's own tag is off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// Its Ethernet addresses.
    pub macs: Vec<Mac>,
    /// It may answer as a DHCP server.
    pub dhcp_server: bool,
    /// It may advertise itself as a router.
    pub router: bool,
}

/// Link-local addresses that ports have taken for themselves: first come, first served, a few per port.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    holders: HashMap<(Vid, Ipv6Addr), PortId, RandomState>,
}

impl Claims {
    /// Whether `port` may use a link-local address.
    fn claim(&mut self, vid: Vid, address: Ipv6Addr, port: PortId) -> bool {
        if let Some(holder) = self.holders.get(&(vid, address)) {
            return *holder == port;
        }
        let own = self
            .holders
            .values()
            .filter(|holder| **holder == port)
            .count();
        if own >= CLAIMS_MAX {
            return false;
        }
        self.holders.insert((vid, address), port);
        true
    }

    /// Forgets what a port has taken.
    pub(crate) fn forget(&mut self, port: PortId) {
        self.holders.retain(|_, holder| *holder != port);
    }
}

/// Who sends, for the check of one frame.
pub(crate) struct Sender<'a> {
    pub(crate) guard: &'a Guard,
    pub(crate) port: PortId,
    pub(crate) vid: Vid,
    /// The port's addresses.
    pub(crate) addresses: &'a [IpNet],
    /// Addresses of other ports that no port may take.
    pub(crate) reserved: &'a [(PortId, IpAddr)],
    pub(crate) claims: &'a mut Claims,
}

impl Sender<'_> {
    /// Checks an untagged frame.
    pub(crate) fn check(&mut self, frame: &[u8], content: Content) -> Result<(), DropReason> {
        let source = packet::source(frame).ok_or(DropReason::Malformed)?;
        if !self.guard.macs.contains(&source) {
            return Err(DropReason::Spoofed);
        }
        match content {
            Content::Arp => self.arp(frame, source),
            Content::Ip(ip) => self.ip(frame, ip),
            Content::Other(ethertype::VLAN | ethertype::SERVICE_VLAN) => Err(DropReason::Vlan),
            Content::Other(_) => Err(DropReason::Spoofed),
        }
    }

    fn arp(&self, frame: &[u8], source: Mac) -> Result<(), DropReason> {
        let payload = frame.get(ETHERNET_HEADER..).unwrap_or_default();
        let packet = ArpPacket::new_checked(payload).map_err(|_| DropReason::Malformed)?;
        let ArpRepr::EthernetIpv4 {
            source_hardware_addr: mac,
            source_protocol_addr: address,
            ..
        } = ArpRepr::parse(&packet).map_err(|_| DropReason::Malformed)?
        else {
            return Err(DropReason::Malformed);
        };
        // A probe has no sender (RFC 5227 section 2.1.1); neither has a reverse request.
        let honest = mac == source && (address.is_unspecified() || self.has(address.into()));
        if honest {
            Ok(())
        } else {
            Err(DropReason::Spoofed)
        }
    }

    fn has(&self, address: IpAddr) -> bool {
        self.addresses
            .iter()
            .any(|network| network.contains(&address))
    }

    /// Whether a link-local address is this port's.
    fn has_link_local(&mut self, address: Ipv6Addr) -> bool {
        if !matches!(address.segments(), [0xfe80..=0xfebf, ..]) {
            return false;
        }
        let taken = |port: PortId, other: IpAddr| port != self.port && other == IpAddr::V6(address);
        if self
            .reserved
            .iter()
            .any(|&(port, other)| taken(port, other))
        {
            return false;
        }
        self.claims.claim(self.vid, address, self.port)
    }

    fn ip(&mut self, frame: &[u8], ip: Ip) -> Result<(), DropReason> {
        let payload = ip.payload(frame);
        // A first fragment that ends inside the transport's header would hide what the packet is.
        if ip.fragment.is_some() && ip.has_transport() && payload.len() < 8 {
            return Err(DropReason::Malformed);
        }
        let ports = match ip.has_transport() && ip.protocol == protocol::UDP {
            true => (packet::get_u16(payload, 0), packet::get_u16(payload, 2)),
            false => (None, None),
        };
        let icmp6 = match ip.has_transport() && ip.protocol == protocol::ICMPV6 {
            true => payload.first().copied(),
            false => None,
        };
        let own = self.has(ip.source)
            || match ip.source {
                IpAddr::V4(source) => source.is_unspecified() && ports == (Some(68), Some(67)),
                IpAddr::V6(source) if source.is_unspecified() => matches!(
                    icmp6,
                    Some(
                        kind::ROUTER_SOLICITATION | kind::NEIGHBOUR_SOLICITATION | LISTENER_REPORT
                    )
                ),
                IpAddr::V6(source) => self.has_link_local(source),
            };
        if !own {
            return Err(DropReason::Spoofed);
        }
        if matches!(ports, (Some(67), _) | (Some(547), _)) && !self.guard.dhcp_server {
            return Err(DropReason::DhcpGuard);
        }
        let Some(kind) = icmp6 else {
            return Ok(());
        };
        // Discovery is never fragmented (RFC 6980).
        if ip.fragment.is_some() && (133..=137).contains(&kind) {
            return Err(DropReason::RouterGuard);
        }
        match kind {
            kind::ROUTER_ADVERTISEMENT | kind::REDIRECT if !self.guard.router => {
                Err(DropReason::RouterGuard)
            }
            kind::NEIGHBOUR_ADVERTISEMENT => {
                let told = ndp::neighbour(payload).ok_or(DropReason::Malformed)?;
                let own = self.has(told.target.into()) || self.has_link_local(told.target);
                let mac = told.mac.is_none_or(|mac| self.guard.macs.contains(&mac));
                if own && mac {
                    Ok(())
                } else {
                    Err(DropReason::Spoofed)
                }
            }
            kind::NEIGHBOUR_SOLICITATION => {
                let asked = ndp::neighbour(payload).ok_or(DropReason::Malformed)?;
                let mac = asked.mac.is_none_or(|mac| self.guard.macs.contains(&mac));
                if mac {
                    Ok(())
                } else {
                    Err(DropReason::Spoofed)
                }
            }
            kind::ROUTER_SOLICITATION => {
                let mac = ndp::link_address(payload.get(8..).unwrap_or_default(), 1);
                let mac = mac.is_none_or(|mac| self.guard.macs.contains(&mac));
                if mac {
                    Ok(())
                } else {
                    Err(DropReason::Spoofed)
                }
            }
            _ => Ok(()),
        }
    }
}
