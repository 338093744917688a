//! The uplink between switches: frames in VXLAN's format over UDP (RFC 7348). The datagrams themselves are the owner's.
//!
//! On the switch's side it is a trunk port. On the other side each VLAN is a network of its own number (VNI), without its
//! tag; or all VLANs go through one, tags and priorities intact, for a peer that is a switch like this.
//!
//! Datagrams count only from the peers that were configured. There is no authentication in VXLAN: a network between hosts
//! that others can send into needs a tunnel that has it.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use foldhash::quality::RandomState;

use crate::frame::Frame;
use crate::packet::{self, ETHERNET_HEADER, Mac, ethertype};
use crate::pool::Pool;
use crate::port::Port;
use crate::time::Time;
use crate::vlan::Vid;

/// The UDP port (RFC 7348 section 5).
pub const PORT: u16 = 4789;
/// Bytes of VXLAN's header.
pub const HEADER: usize = 8;
/// Bytes that a frame grows by over IPv4: outer IP, UDP, VXLAN and inner Ethernet headers. The MTU inside is that of the
/// network between the hosts less this; 20 more over IPv6.
pub const OVERHEAD: u16 = 20 + 8 + 8 + 14;

/// Datagrams and frames that may wait.
const WAITING_MAX: usize = 1024;
/// Addresses learned at most.
const LEARNED_MAX: usize = 16_384;
/// How long one that is silent stays known.
const AGEING: Duration = Duration::from_secs(300);

/// Which VLAN goes through which network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Each VLAN through a network of its own; tags, and with them priorities, stay here.
    PerVlan(Vec<(Vid, u32)>),
    /// All through one network, tagged as they are.
    Tagged(u32),
}

/// What an uplink is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanConfig {
    /// VLANs and networks. VNIs have 24 bits.
    pub mapping: Mapping,
    /// The other switches. What has no known place goes to all of them.
    pub peers: Vec<SocketAddr>,
}

/// What an uplink has refused.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct VxlanDrops {
    /// From an address that is no peer's.
    pub stranger: u64,
    /// No VXLAN, or no whole frame inside.
    pub malformed: u64,
    /// Of a network that is not mapped.
    pub unmapped: u64,
    /// Too many waited.
    pub full: u64,
}

/// The uplink. See the module's first page.
#[derive(Debug)]
pub struct Vxlan {
    config: VxlanConfig,
    /// Where addresses are: by network and address, a place in `peers`.
    learned: HashMap<(u32, Mac), (usize, Time), RandomState>,
    datagrams: VecDeque<(SocketAddr, Frame)>,
    frames: VecDeque<Frame>,
    drops: VxlanDrops,
}

impl Vxlan {
    /// An uplink that knows its peers and nothing else.
    pub fn new(config: VxlanConfig) -> Vxlan {
        Vxlan {
            config,
            learned: HashMap::default(),
            datagrams: VecDeque::new(),
            frames: VecDeque::new(),
            drops: VxlanDrops::default(),
        }
    }

    /// Changes peers or mapping; what was learned is forgotten.
    pub fn configure(&mut self, config: VxlanConfig) {
        self.learned.clear();
        self.config = config;
    }

    /// What was refused.
    pub fn drops(&self) -> VxlanDrops {
        self.drops
    }

    /// The next datagram to send: to whom, and its bytes. Give the frame back to the pool when it is sent.
    pub fn next_datagram(&mut self) -> Option<(SocketAddr, Frame)> {
        self.datagrams.pop_front()
    }

    fn network_of(&self, tag: Option<(u16, u16)>) -> Option<(u32, bool)> {
        match &self.config.mapping {
            Mapping::Tagged(network) => Some((*network, false)),
            Mapping::PerVlan(pairs) => {
                let (_, control) = tag?;
                let found = pairs.iter().find(|(vid, _)| vid.get() == control & 0xfff)?;
                Some((found.1, true))
            }
        }
    }

    /// Takes a datagram that came from `from`.
    pub fn receive(&mut self, from: SocketAddr, datagram: &[u8], now: Time, pool: &mut Pool) {
        let known = |address: IpAddr| {
            self.config
                .peers
                .iter()
                .position(|peer| peer.ip() == address)
        };
        let Some(peer) = known(from.ip().to_canonical()).or_else(|| known(from.ip())) else {
            self.drops.stranger += 1;
            return;
        };
        let word = packet::get_u32(datagram, 4);
        let inner = datagram
            .get(HEADER..)
            .filter(|inner| inner.len() >= ETHERNET_HEADER);
        let flagged = datagram.first().is_some_and(|flags| flags & 0x08 != 0);
        let (Some(word), Some(inner), true) = (word, inner, flagged) else {
            self.drops.malformed += 1;
            return;
        };
        let network = word >> 8;
        let tag = match &self.config.mapping {
            Mapping::Tagged(own) => (*own == network).then_some(None),
            Mapping::PerVlan(pairs) => {
                let found = pairs.iter().find(|(_, other)| *other == network);
                found.map(|(vid, _)| Some(vid.get()))
            }
        };
        let Some(tag) = tag else {
            self.drops.unmapped += 1;
            return;
        };
        // A tag inside a network of one VLAN is somebody's attempt to be in another (RFC 7348 section 6.1).
        if tag.is_some() && packet::tag(inner).is_some() {
            self.drops.malformed += 1;
            return;
        }
        if self.frames.len() >= WAITING_MAX {
            self.drops.full += 1;
            return;
        }
        if let Some(source) = packet::source(inner).filter(|source| !source.is_multicast()) {
            self.learn((network, source), peer, now);
        }
        let mut frame = pool.copy(inner);
        if let Some(vid) = tag {
            frame.push_tag(ethertype::VLAN, vid);
        }
        self.frames.push_back(frame);
    }

    fn learn(&mut self, key: (u32, Mac), peer: usize, now: Time) {
        if self.learned.len() >= LEARNED_MAX && !self.learned.contains_key(&key) {
            self.learned
                .retain(|_, (_, seen)| now.since(*seen) < AGEING);
            if self.learned.len() >= LEARNED_MAX {
                return;
            }
        }
        self.learned.insert(key, (peer, now));
    }

    fn send(&mut self, peer: usize, network: u32, mut frame: Frame, pool: &mut Pool) {
        let to = self.config.peers.get(peer).copied();
        let Some(to) = to.filter(|_| self.datagrams.len() < WAITING_MAX) else {
            self.drops.full += 1;
            pool.put(frame);
            return;
        };
        frame.push_front(HEADER);
        let [_, a, b, c] = network.to_be_bytes();
        packet::put(frame.bytes_mut(), 0, &[0x08, 0, 0, 0, a, b, c, 0]);
        self.datagrams.push_back((to, frame));
    }
}

impl Port for Vxlan {
    fn deliver(&mut self, mut frame: Frame, now: Time, pool: &mut Pool) -> Result<(), Frame> {
        let tag = packet::tag(frame.bytes());
        let Some((network, strip)) = self.network_of(tag) else {
            self.drops.unmapped += 1;
            pool.put(frame);
            return Ok(());
        };
        if strip {
            frame.pop_tag();
        }
        let destination = packet::destination(frame.bytes()).unwrap_or(Mac::BROADCAST);
        let place = self.learned.get(&(network, destination));
        let place =
            place.filter(|(_, seen)| !destination.is_multicast() && now.since(*seen) < AGEING);
        if let Some((peer, _)) = place {
            self.send(*peer, network, frame, pool);
            return Ok(());
        }
        for peer in 1..self.config.peers.len() {
            let copy = pool.duplicate(&frame);
            self.send(peer, network, copy, pool);
        }
        self.send(0, network, frame, pool);
        Ok(())
    }

    fn poll(&mut self, _now: Time, _pool: &mut Pool) -> Option<Frame> {
        self.frames.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PortConfig, Switch, SwitchConfig, VlanMode, carry};
    use proptest::prelude::*;

    const A: Mac = Mac {
        0: [2, 0, 0, 0, 0, 0xa],
    };
    const B: Mac = Mac {
        0: [2, 0, 0, 0, 0, 0xb],
    };

    fn vid(id: u16) -> Vid {
        Vid::new(id).unwrap()
    }

    fn peer(number: u8) -> SocketAddr {
        SocketAddr::new(IpAddr::from([192, 0, 2, number]), PORT)
    }

    fn frame(to: Mac, from: Mac, control: Option<u16>) -> Frame {
        let mut bytes = [to.0, from.0].concat();
        bytes.extend([0x88, 0xb5, 1, 2, 3]);
        bytes.resize(60, 0);
        let mut frame = Frame::new(&bytes);
        if let Some(control) = control {
            frame.push_tag(ethertype::VLAN, control);
        }
        frame
    }

    /// A switch with an access port in VLAN 10, one in VLAN 20, a trunk, and an uplink to `to`.
    struct Host {
        switch: Switch,
        ports: Vec<crate::PortId>,
        uplink: Vxlan,
    }

    fn host(to: SocketAddr, mapping: Mapping) -> Host {
        let mut switch = Switch::new(SwitchConfig::default(), Time::ZERO);
        let both = || VlanMode::Trunk {
            native: None,
            allowed: [vid(10), vid(20)].into_iter().collect(),
        };
        let modes = [
            VlanMode::Access(vid(10)),
            VlanMode::Access(vid(20)),
            both(),
            both(),
        ];
        let ports = modes.map(|vlan| {
            let config = PortConfig {
                vlan,
                ..PortConfig::default()
            };
            switch.add_port(config, Time::ZERO).unwrap()
        });
        Host {
            switch,
            ports: ports.to_vec(),
            uplink: Vxlan::new(VxlanConfig {
                mapping,
                peers: vec![to],
            }),
        }
    }

    impl Host {
        fn carry(&mut self) {
            let uplink = self.ports[3];
            let ports: &mut [(_, &mut dyn Port)] = &mut [(uplink, &mut self.uplink)];
            carry(&mut self.switch, ports, 64, Time::ZERO);
        }

        fn take(&mut self, port: usize) -> Vec<Vec<u8>> {
            let port = self.ports[port];
            std::iter::from_fn(|| self.switch.take(port, Time::ZERO))
                .map(|frame| frame.bytes().to_vec())
                .collect()
        }
    }

    /// Carries what each has for the other, until there is nothing.
    fn join(one: &mut Host, two: &mut Host) {
        for _ in 0..3 {
            one.carry();
            two.carry();
            while let Some((to, datagram)) = one.uplink.next_datagram() {
                assert_eq!(to, peer(2));
                two.uplink
                    .receive(peer(1), datagram.bytes(), Time::ZERO, two.switch.pool());
            }
            while let Some((_, datagram)) = two.uplink.next_datagram() {
                one.uplink
                    .receive(peer(2), datagram.bytes(), Time::ZERO, one.switch.pool());
            }
        }
    }

    #[test]
    fn two_switches_are_one_and_vlans_stay_apart() {
        let per_vlan = Mapping::PerVlan(vec![(vid(10), 5000), (vid(20), 0xff_ffff)]);
        for (mapping, keeps) in [(per_vlan, false), (Mapping::Tagged(77), true)] {
            let mut one = host(peer(2), mapping.clone());
            let mut two = host(peer(1), mapping);
            one.switch
                .receive(one.ports[0], frame(Mac::BROADCAST, A, None), Time::ZERO);
            join(&mut one, &mut two);
            assert_eq!(two.take(0), [frame(Mac::BROADCAST, A, None).bytes()]);
            assert_eq!(two.take(1).len(), 0);
            assert_eq!(two.take(2), [frame(Mac::BROADCAST, A, Some(10)).bytes()]);
            two.switch
                .receive(two.ports[0], frame(A, B, None), Time::ZERO);
            join(&mut one, &mut two);
            assert_eq!(one.take(0), [frame(A, B, None).bytes()]);
            // From trunk to trunk with a priority.
            let control = 5 << 13 | 20;
            two.switch.receive(
                two.ports[2],
                frame(Mac::BROADCAST, B, Some(control)),
                Time::ZERO,
            );
            join(&mut one, &mut two);
            let expected = if keeps { control } else { 20 };
            one.take(0);
            let seen = one.take(2);
            assert_eq!(
                seen.last().unwrap(),
                frame(Mac::BROADCAST, B, Some(expected)).bytes()
            );
            assert_eq!(one.take(1).len(), 1);
        }
    }

    #[test]
    fn frames_go_where_their_address_was_seen() {
        let mut uplink = Vxlan::new(VxlanConfig {
            mapping: Mapping::Tagged(7),
            peers: vec![peer(1), peer(2), peer(3)],
        });
        let mut pool = Pool::new(8);
        uplink
            .deliver(frame(B, A, None), Time::ZERO, &mut pool)
            .unwrap();
        assert_eq!(std::iter::from_fn(|| uplink.next_datagram()).count(), 3);
        let mut from_b = vec![8, 0, 0, 0, 0, 0, 7, 0];
        from_b.extend(frame(A, B, None).bytes());
        // From another port of a peer: the source port is not fixed (RFC 7348 section 5).
        uplink.receive(
            SocketAddr::new(peer(2).ip(), 50_000),
            &from_b,
            Time::ZERO,
            &mut pool,
        );
        assert_eq!(uplink.poll(Time::ZERO, &mut pool), Some(frame(A, B, None)));
        uplink
            .deliver(frame(B, A, None), Time::ZERO, &mut pool)
            .unwrap();
        let sent: Vec<_> = std::iter::from_fn(|| uplink.next_datagram()).collect();
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].0, peer(2));
    }

    #[test]
    fn what_is_not_ours_is_counted() {
        let mut uplink = Vxlan::new(VxlanConfig {
            mapping: Mapping::PerVlan(vec![(vid(10), 7)]),
            peers: vec![peer(1)],
        });
        let mut pool = Pool::new(8);
        let datagram = |network: u8, flags: u8, frame: &Frame| {
            let mut bytes = vec![flags, 0, 0, 0, 0, 0, network, 0];
            bytes.extend(frame.bytes());
            bytes
        };
        let plain = frame(A, B, None);
        uplink.receive(peer(9), &datagram(7, 8, &plain), Time::ZERO, &mut pool);
        uplink.receive(peer(1), &datagram(8, 8, &plain), Time::ZERO, &mut pool);
        uplink.receive(peer(1), &datagram(7, 0, &plain), Time::ZERO, &mut pool);
        uplink.receive(
            peer(1),
            &datagram(7, 8, &frame(A, B, Some(20))),
            Time::ZERO,
            &mut pool,
        );
        uplink.receive(peer(1), &[8, 0, 0, 0, 0, 0, 7, 0, 1], Time::ZERO, &mut pool);
        uplink
            .deliver(frame(A, B, Some(20)), Time::ZERO, &mut pool)
            .unwrap();
        let expected = VxlanDrops {
            stranger: 1,
            malformed: 3,
            unmapped: 2,
            full: 0,
        };
        assert_eq!(uplink.drops(), expected);
        assert_eq!(uplink.poll(Time::ZERO, &mut pool), None);
        assert_eq!(uplink.next_datagram(), None);
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..100), tagged in any::<bool>()) {
            let mapping = if tagged { Mapping::Tagged(0) } else { Mapping::PerVlan(vec![(vid(1), 0)]) };
            let mut uplink = Vxlan::new(VxlanConfig { mapping, peers: vec![peer(1)] });
            let mut pool = Pool::new(8);
            uplink.receive(peer(1), &bytes, Time::ZERO, &mut pool);
            let _ = uplink.deliver(Frame::new(&bytes), Time::ZERO, &mut pool);
        }
    }
}
