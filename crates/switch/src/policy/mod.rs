//! Security groups: who may open a connection to whom.
//!
//! A port in no group is not filtered. To a port in groups nothing may come in but what a rule of one of them lets in,
//! and what belongs to a connection that was let through in either direction. What goes out may go out, unless one of
//! the groups has rules for it: then only what they let out.
//!
//! ARP, neighbour and router discovery, multicast listener reports and DHCP between client and server pass without a
//! rule: a machine could not have an address otherwise. [`Guard`](crate::Guard) is what keeps these honest.
//!
//! A change applies to live connections with their next packet: a connection goes on if the rules as they are now would
//! let it be opened, by the side that did open it, and is dropped otherwise.

mod connections;

#[cfg(test)]
mod tests;

pub(crate) use connections::Connections;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use foldhash::quality::RandomState;
use ipnet::IpNet;

use crate::packet::protocol;

/// A security group.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// Which way, seen from the machine.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the machine.
    In,
    /// From the machine.
    Out,
}

/// Which transports a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    /// All.
    Any,
    /// TCP to these ports.
    Tcp(RangeInclusive<u16>),
    /// UDP to these ports.
    Udp(RangeInclusive<u16>),
    /// ICMP, of the family of the addresses, of one type or all.
    Icmp(Option<u8>),
    /// Another protocol by its number; if it has ports, all.
    Protocol(u8),
}

/// Whom a rule is about: the other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remote {
    /// Everybody.
    Any,
    /// Addresses.
    Net(IpNet),
    /// The members of a group.
    Group(GroupId),
}

/// Lets connections be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// By whom, seen from the member.
    pub direction: Direction,
    /// Of what kind.
    pub service: Service,
    /// From or to whom.
    pub remote: Remote,
}

/// What a group is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// What its members may do, and what may be done to them.
    pub rules: Vec<Rule>,
    /// Addresses of members that are not on this switch.
    pub members: Vec<IpNet>,
}

/// The first packet of a connection, seen from one of the machines.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Who opens it.
    pub direction: Direction,
    /// The transport's protocol number.
    pub protocol: u8,
    /// The machine's address.
    pub local: IpAddr,
    /// The other side's address.
    pub remote: IpAddr,
    /// Port of the side that is opened to, or the ICMP type.
    pub service: u16,
}

#[derive(Debug, Default)]
struct GroupState {
    group: Group,
    hits: Vec<u64>,
    /// Addresses of all members.
    hosts: HashSet<IpAddr, RandomState>,
    networks: Vec<IpNet>,
}

impl GroupState {
    fn contains(&self, address: IpAddr) -> bool {
        self.hosts.contains(&address)
            || self
                .networks
                .iter()
                .any(|network| network.contains(&address))
    }

    fn add(&mut self, network: IpNet) {
        if network.prefix_len() == network.max_prefix_len() {
            self.hosts.insert(network.addr());
        } else {
            self.networks.push(network);
        }
    }
}

/// All groups of a switch.
#[derive(Debug, Default)]
pub struct Policy {
    groups: BTreeMap<GroupId, GroupState>,
    /// Addresses of the ports in each group.
    generation: u64,
}

impl Policy {
    /// Sets what a group is; counters of its rules begin anew.
    pub fn set(&mut self, id: GroupId, group: Group) {
        let state = self.groups.entry(id).or_default();
        state.hits = vec![0; group.rules.len()];
        state.group = group;
        self.generation += 1;
    }

    /// Removes a group: its rules let nothing pass any more.
    pub fn remove(&mut self, id: GroupId) {
        self.groups.remove(&id);
        self.generation += 1;
    }

    /// What a group is, and how many connections each rule has let through.
    pub fn get(&self, id: GroupId) -> Option<(&Group, &[u64])> {
        let state = self.groups.get(&id)?;
        Some((&state.group, &state.hits))
    }

    /// Changes with every change of rules or members.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes in the members on this switch: groups and addresses of every port.
    pub fn set_members<'a>(&mut self, ports: impl Iterator<Item = (&'a [GroupId], &'a [IpNet])>) {
        let mut of_group: HashMap<GroupId, Vec<IpNet>, RandomState> = HashMap::default();
        for (groups, addresses) in ports {
            for group in groups {
                of_group.entry(*group).or_default().extend(addresses);
            }
        }
        for (id, state) in &mut self.groups {
            state.hosts.clear();
            state.networks.clear();
            let outside = state.group.members.clone();
            let inside = of_group.remove(id).unwrap_or_default();
            for network in outside.into_iter().chain(inside) {
                state.add(network);
            }
        }
        self.generation += 1;
    }

    /// Whether the rules of a port in `groups` let a connection be opened. The rule that did is counted if `count`.
    pub fn allows(&mut self, groups: &[GroupId], opening: &Opening, count: bool) -> bool {
        if infrastructure(opening) {
            return true;
        }
        let mut found = None;
        let mut limited = opening.direction == Direction::In;
        'search: for id in groups {
            let Some(state) = self.groups.get(id) else {
                continue;
            };
            for (index, rule) in state.group.rules.iter().enumerate() {
                if rule.direction != opening.direction {
                    continue;
                }
                limited = true;
                if self.matches(rule, opening) {
                    found = Some((*id, index));
                    break 'search;
                }
            }
        }
        let hit = found.filter(|_| count).and_then(|(id, index)| {
            let state = self.groups.get_mut(&id)?;
            state.hits.get_mut(index)
        });
        if let Some(hit) = hit {
            *hit += 1;
        }
        found.is_some() || !limited
    }

    fn matches(&self, rule: &Rule, opening: &Opening) -> bool {
        let service = match &rule.service {
            Service::Any => true,
            Service::Tcp(ports) => {
                opening.protocol == protocol::TCP && ports.contains(&opening.service)
            }
            Service::Udp(ports) => {
                opening.protocol == protocol::UDP && ports.contains(&opening.service)
            }
            Service::Icmp(kind) => {
                let icmp = match opening.remote {
                    IpAddr::V4(_) => protocol::ICMP,
                    IpAddr::V6(_) => protocol::ICMPV6,
                };
                opening.protocol == icmp
                    && kind.is_none_or(|kind| u16::from(kind) == opening.service)
            }
            Service::Protocol(number) => opening.protocol == *number,
        };
        service
            && match &rule.remote {
                Remote::Any => true,
                Remote::Net(network) => network.contains(&opening.remote),
                Remote::Group(group) => self
                    .groups
                    .get(group)
                    .is_some_and(|group| group.contains(opening.remote)),
            }
    }
}

/// What a machine needs in order to have an address at all.
fn infrastructure(opening: &Opening) -> bool {
    let port = opening.service;
    match (opening.protocol, opening.direction) {
        (protocol::ICMPV6, _) if opening.remote.is_ipv6() => matches!(port, 133..=136 | 143),
        // Requests go to 67 and 547, answers come to 68 and 546.
        (protocol::UDP, Direction::Out) => port == if opening.remote.is_ipv4() { 67 } else { 547 },
        (protocol::UDP, Direction::In) => port == if opening.remote.is_ipv4() { 68 } else { 546 },
        _ => false,
    }
}
