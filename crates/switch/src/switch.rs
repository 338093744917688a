//! The switch: ports, and the way of a frame from one to others.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use crate::config::{Mirror, PortConfig, PortId, SwitchConfig, SwitchError};
use crate::counters::{DropReason, PortCounters};
use crate::frame::{Captured, Frame, MAX_FRAME, Offload};
use crate::gateway::reply;
use crate::guard::{Claims, Sender};
use crate::packet::{self, Content, Mac};
use crate::policy::{Connections, Direction, Group, GroupId, Policy};
use crate::pool::Pool;
use crate::port::Port;
use crate::queue::{CLASSES, QueueCounters, Queues, class_of};
use crate::rate::{Bucket, Limit};
use crate::segment::{self, Segments};
use crate::table::MacTable;
use crate::time::Time;
use crate::vlan::Vid;

/// How often learned addresses are aged.
const AGE_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct PortState {
    config: PortConfig,
    counters: PortCounters,
    queues: Queues,
    ingress: Bucket,
    egress: Bucket,
    flood: Option<Bucket>,
    connections: Connections,
    /// A frame that its receiver gave back.
    returned: Option<Frame>,
    /// A frame under way in pieces.
    segments: Option<Segments>,
    /// The egress limit holds frames until then.
    held: Option<Time>,
    /// It is in the list of ports with something to take.
    listed: bool,
}

impl PortState {
    fn new(config: PortConfig, now: Time) -> PortState {
        PortState {
            counters: PortCounters::default(),
            queues: Queues::new(config.queues),
            ingress: Bucket::new(config.ingress, now),
            egress: Bucket::new(config.egress, now),
            flood: flood(&config, now),
            connections: Connections::new(config.connections_max),
            returned: None,
            segments: None,
            held: None,
            listed: false,
            config,
        }
    }
}

fn flood(config: &PortConfig, now: Time) -> Option<Bucket> {
    let limit = Limit {
        packets: Some(config.flood?),
        bytes: None,
    };
    Some(Bucket::new(limit, now))
}

/// A frame on its way between ports.
#[derive(Copy, Clone, Debug)]
struct Way {
    from: PortId,
    vid: Vid,
    pcp: u8,
    /// What is in it, if any port wants to know.
    content: Option<Result<Content, packet::Malformed>>,
}

/// A layer-2 switch. See the crate's first page.
#[derive(Debug)]
pub struct Switch {
    config: SwitchConfig,
    ports: Vec<Option<Box<PortState>>>,
    table: MacTable,
    pool: Pool,
    ready: VecDeque<PortId>,
    age_at: Time,
    policy: Policy,
    claims: Claims,
    /// Single addresses of ports, which no other guarded port may take.
    reserved: Vec<(PortId, IpAddr)>,
    /// Ports that get copies, and of what.
    mirrors: Vec<(PortId, Mirror)>,
    /// Whether any port is guarded or filtered.
    inspect: bool,
    /// Port whose connections are timed out next.
    purge_next: usize,
}

impl Switch {
    /// A switch without ports.
    pub fn new(config: SwitchConfig, now: Time) -> Switch {
        Switch {
            ports: Vec::new(),
            table: MacTable::new(config.addresses_max, config.ageing),
            pool: Pool::new(config.pool),
            ready: VecDeque::new(),
            age_at: now.after(AGE_EVERY),
            policy: Policy::default(),
            claims: Claims::default(),
            reserved: Vec::new(),
            mirrors: Vec::new(),
            inspect: false,
            purge_next: 0,
            config,
        }
    }

    /// Adds a port.
    ///
    /// # Errors
    /// There are as many as there may be.
    pub fn add_port(&mut self, config: PortConfig, now: Time) -> Result<PortId, SwitchError> {
        let free = self.ports.iter().position(Option::is_none);
        let index = free.unwrap_or(self.ports.len());
        let id = u32::try_from(index)
            .ok()
            .filter(|_| index < self.config.ports_max);
        let id = id.ok_or(SwitchError::TooManyPorts(index))?;
        let state = Some(Box::new(PortState::new(config, now)));
        match self.ports.get_mut(index) {
            Some(slot) => *slot = state,
            None => self.ports.push(state),
        }
        self.ports_changed();
        Ok(PortId(id))
    }

    /// Changes a port while it is in use. Learned addresses, queues and counters stay; limits begin anew.
    ///
    /// # Errors
    /// There is no such port.
    pub fn configure_port(
        &mut self,
        port: PortId,
        config: PortConfig,
        now: Time,
    ) -> Result<(), SwitchError> {
        let moved = {
            let state = self.state(port).ok_or(SwitchError::NoSuchPort(port.0))?;
            state.queues.configure(config.queues);
            state.ingress = Bucket::new(config.ingress, now);
            state.egress = Bucket::new(config.egress, now);
            state.flood = flood(&config, now);
            state.connections.set_limit(config.connections_max);
            state.held = None;
            let moved = state.config.vlan != config.vlan;
            state.config = config;
            moved
        };
        if moved {
            self.table.forget(port);
            self.claims.forget(port);
        }
        self.ports_changed();
        self.list(port);
        Ok(())
    }

    /// Removes a port and everything that it has waiting anywhere.
    pub fn remove_port(&mut self, port: PortId) {
        if let Some(slot) = self.ports.get_mut(port.index()) {
            *slot = None;
        }
        self.table.forget(port);
        self.claims.forget(port);
        self.ports_changed();
        self.ready.retain(|&other| other != port);
        for state in self.ports.iter_mut().flatten() {
            state.queues.forget(port.index());
        }
    }

    /// Derives what follows from the ports' configuration.
    fn ports_changed(&mut self) {
        let ports = || self.ports.iter().flatten().map(|state| &state.config);
        let groups = ports().map(|config| {
            let groups = config.groups.as_deref().unwrap_or_default();
            (groups, config.addresses.as_slice())
        });
        self.policy.set_members(groups);
        self.inspect = ports().any(|config| config.guard.is_some() || config.groups.is_some());
        self.reserved.clear();
        self.mirrors.clear();
        for (index, state) in self.ports.iter().enumerate() {
            let Some(state) = state else {
                continue;
            };
            let id = PortId(index as u32);
            self.mirrors
                .extend(state.config.mirror.map(|what| (id, what)));
            let single = state.config.addresses.iter();
            let single = single.filter(|network| network.prefix_len() == network.max_prefix_len());
            self.reserved
                .extend(single.map(|network| (id, network.addr())));
        }
    }

    /// Sets what a security group is. It applies at once, to live connections too (see [`crate::policy`]).
    pub fn set_group(&mut self, id: GroupId, group: Group) {
        self.policy.set(id, group);
        self.ports_changed();
    }

    /// Removes a security group.
    pub fn remove_group(&mut self, id: GroupId) {
        self.policy.remove(id);
        self.ports_changed();
    }

    /// What a group is, and how many connections each of its rules has let through.
    pub fn group(&self, id: GroupId) -> Option<(&Group, &[u64])> {
        self.policy.get(id)
    }

    /// Connections that are tracked for a port.
    pub fn connections(&self, port: PortId) -> Option<usize> {
        Some(self.ports.get(port.index())?.as_ref()?.connections.len())
    }

    /// Tells the network where a port's machine is now, after a move: reverse ARP for its Ethernet addresses, gratuitous
    /// ARP and neighbour advertisements for its single IP addresses.
    pub fn announce(&mut self, port: PortId, now: Time) {
        let Some(config) = self.port(port).cloned() else {
            return;
        };
        let macs = config.guard.map(|guard| guard.macs).unwrap_or_default();
        let vids: Vec<Vid> = (1..=4094)
            .filter_map(Vid::new)
            .filter(|vid| config.vlan.carries(*vid))
            .collect();
        for vid in vids {
            for mac in &macs {
                self.table.learn(vid, *mac, port, now);
                let way = Way {
                    from: port,
                    vid,
                    pcp: config.priority & 7,
                    content: None,
                };
                let single = config.addresses.iter();
                let single =
                    single.filter(|network| network.prefix_len() == network.max_prefix_len());
                let mut frames = vec![reply::rarp(&mut self.pool, *mac)];
                frames.extend(single.filter_map(|network| match network.addr() {
                    IpAddr::V4(address) => {
                        Some(reply::gratuitous_arp(&mut self.pool, *mac, address))
                    }
                    IpAddr::V6(address) => {
                        reply::unsolicited_advertisement(&mut self.pool, *mac, address)
                    }
                }));
                for frame in frames {
                    let content = packet::content(frame.bytes());
                    let way = Way {
                        content: self.inspect.then_some(content),
                        ..way
                    };
                    if let Err((frame, _)) = self.flood(way, frame, now) {
                        self.pool.put(frame);
                    }
                }
            }
        }
    }

    /// Gives mirror ports a copy of what `port` sent (in) or gets (out).
    fn mirror(&mut self, port: PortId, direction: Direction, frame: &Frame, now: Time) {
        for index in 0..self.mirrors.len() {
            let Some(&(to, what)) = self.mirrors.get(index) else {
                return;
            };
            let wanted = to != port && matches!(what, Mirror::Port(one) if one == port)
                || what == Mirror::All;
            if !wanted || self.mirrors.iter().any(|(mirror, _)| *mirror == port) {
                continue;
            }
            let mut copy = self.pool.duplicate(frame);
            if direction == Direction::In && !segment::check(&mut copy) {
                // It goes nowhere else, and its bytes are what they are.
                copy.offload = Offload::default();
            }
            copy.captured = Some(Captured {
                port,
                direction,
                time: now,
            });
            let Some(state) = self
                .ports
                .get_mut(to.index())
                .and_then(Option::as_deref_mut)
            else {
                continue;
            };
            let pool = &mut self.pool;
            let dropped = state
                .queues
                .push(port.index(), 1, copy, |frame| pool.put(frame));
            state.counters.drop(DropReason::QueueFull, dropped as u64);
            self.list(to);
        }
    }

    fn state(&mut self, port: PortId) -> Option<&mut PortState> {
        self.ports.get_mut(port.index())?.as_deref_mut()
    }

    /// What a port is configured to be.
    pub fn port(&self, port: PortId) -> Option<&PortConfig> {
        Some(&self.ports.get(port.index())?.as_ref()?.config)
    }

    /// Every port.
    pub fn ports(&self) -> impl Iterator<Item = (PortId, &PortConfig)> {
        let ports = self.ports.iter().enumerate();
        ports.filter_map(|(index, state)| Some((PortId(index as u32), &state.as_ref()?.config)))
    }

    /// What a port has done.
    pub fn counters(&self, port: PortId) -> Option<&PortCounters> {
        Some(&self.ports.get(port.index())?.as_ref()?.counters)
    }

    /// What the classes of a port's egress have done.
    pub fn queue_counters(&self, port: PortId) -> Option<[QueueCounters; CLASSES]> {
        Some(self.ports.get(port.index())?.as_ref()?.queues.counters())
    }

    /// The learned addresses.
    pub fn addresses(&self) -> &MacTable {
        &self.table
    }

    /// The store of buffers, for whoever makes or ends frames on this thread.
    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// When the next frame of this port may come: `now` if at once.
    pub fn may_receive(&mut self, port: PortId, now: Time) -> Time {
        self.state(port)
            .map_or(now, |state| state.ingress.ready(now))
    }

    /// Takes a frame that `port` sends and puts it, or copies of it, into the queues of its receivers.
    pub fn receive(&mut self, port: PortId, frame: Frame, now: Time) {
        let Some(state) = self.state(port) else {
            self.pool.put(frame);
            return;
        };
        state.counters.received.add(frame.len());
        if !self.mirrors.is_empty() {
            self.mirror(port, Direction::In, &frame, now);
        }
        if let Err((frame, reason)) = self.forward(port, frame, now) {
            if let Some(state) = self.state(port) {
                state.counters.drop(reason, 1);
            }
            self.pool.put(frame);
        }
    }

    /// The whole way; a frame that is refused comes back with the reason.
    fn forward(
        &mut self,
        port: PortId,
        mut frame: Frame,
        now: Time,
    ) -> Result<(), (Frame, DropReason)> {
        let (way, destination) = match self.admit(port, &mut frame, now) {
            Ok(admitted) => admitted,
            Err(reason) => return Err((frame, reason)),
        };
        if !destination.is_multicast()
            && let Some(to) = self.table.find(way.vid, destination, now)
        {
            if !self.reaches(way, to) {
                return Err((frame, DropReason::NoReceiver));
            }
            self.enqueue(way, to, frame, now);
            return Ok(());
        }
        self.flood(way, frame, now)
    }

    /// Ingress checks: what the frame is, whether this port may send it, and where it is from.
    fn admit(
        &mut self,
        port: PortId,
        frame: &mut Frame,
        now: Time,
    ) -> Result<(Way, Mac), DropReason> {
        let len = frame.len();
        let bytes = frame.bytes();
        let (Some(destination), Some(source)) = (packet::destination(bytes), packet::source(bytes))
        else {
            return Err(DropReason::Malformed);
        };
        if !(packet::ETHERNET_HEADER..=MAX_FRAME).contains(&len) {
            return Err(DropReason::Malformed);
        }
        if !segment::check(frame) {
            return Err(DropReason::BadOffload);
        }
        if source.is_multicast() || source.0 == [0; 6] {
            return Err(DropReason::BadSource);
        }
        if matches!(destination.0, [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f]) {
            return Err(DropReason::Reserved);
        }
        let tag = packet::tag(frame.bytes());
        let state = self.state(port).ok_or(DropReason::PortDown)?;
        if state.config.mirror.is_some() {
            return Err(DropReason::PortDown);
        }
        let classified = state.config.vlan.classify(tag).ok_or(DropReason::Vlan)?;
        if !state.ingress.pass(len as u64, packets(frame), now) {
            return Err(DropReason::RateLimit);
        }
        let mut way = Way {
            from: port,
            vid: classified.vid,
            pcp: classified.pcp.unwrap_or(state.config.priority & 7),
            content: None,
        };
        if classified.strip {
            frame.pop_tag();
            if frame.len() < packet::ETHERNET_HEADER {
                return Err(DropReason::Malformed);
            }
        }
        if self.inspect {
            way.content = Some(packet::content(frame.bytes()));
            self.may_send(way, frame, now)?;
        }
        if !self.table.learn(way.vid, source, port, now)
            && let Some(state) = self.state(port)
        {
            state.counters.not_learned += 1;
        }
        Ok((way, destination))
    }

    /// Whether the sender is who it says, and its rules let the frame out.
    fn may_send(&mut self, way: Way, frame: &Frame, now: Time) -> Result<(), DropReason> {
        let state = self
            .ports
            .get_mut(way.from.index())
            .and_then(Option::as_deref_mut);
        let state = state.ok_or(DropReason::PortDown)?;
        let (guard, groups) = (&state.config.guard, &state.config.groups);
        if guard.is_none() && groups.is_none() {
            return Ok(());
        }
        let Some(Ok(content)) = way.content else {
            return Err(DropReason::Malformed);
        };
        if let Some(guard) = guard {
            let mut sender = Sender {
                guard,
                port: way.from,
                vid: way.vid,
                addresses: &state.config.addresses,
                reserved: &self.reserved,
                claims: &mut self.claims,
            };
            sender.check(frame.bytes(), content)?;
        }
        if let Some(groups) = groups {
            let rules = (&mut self.policy, groups.as_slice());
            state
                .connections
                .pass(frame.bytes(), content, Direction::Out, rules, now)?;
        }
        Ok(())
    }

    /// Whether a frame on this way may leave through `to`.
    fn reaches(&self, way: Way, to: PortId) -> bool {
        let state = |port: PortId| self.ports.get(port.index())?.as_deref();
        let (Some(from_state), Some(to_state)) = (state(way.from), state(to)) else {
            return false;
        };
        to != way.from
            && to_state.config.mirror.is_none()
            && to_state.config.vlan.carries(way.vid)
            && !(from_state.config.isolated && to_state.config.isolated)
    }

    /// Whether a frame to `destination` can be for a port: a guarded one's addresses are known.
    fn may_be(&self, port: PortId, destination: Mac) -> bool {
        let guard = self.port(port).and_then(|config| config.guard.as_ref());
        destination.is_multicast() || guard.is_none_or(|guard| guard.macs.contains(&destination))
    }

    /// To every port that the frame's VLAN reaches.
    fn flood(&mut self, way: Way, frame: Frame, now: Time) -> Result<(), (Frame, DropReason)> {
        if let Some(state) = self.state(way.from) {
            let bucket = state.flood.as_mut();
            if bucket.is_some_and(|bucket| !bucket.pass(0, 1, now)) {
                return Err((frame, DropReason::FloodLimit));
            }
        }
        let destination = packet::destination(frame.bytes()).unwrap_or(Mac::BROADCAST);
        let mut last = None;
        let mut receivers = 0u64;
        for index in 0..self.ports.len() {
            let to = PortId(index as u32);
            if !self.reaches(way, to) || !self.may_be(to, destination) {
                continue;
            }
            receivers += 1;
            if let Some(to) = last.replace(to) {
                let copy = self.pool.duplicate(&frame);
                self.enqueue(way, to, copy, now);
            }
        }
        let Some(to) = last else {
            return Err((frame, DropReason::NoReceiver));
        };
        if receivers > 1
            && let Some(state) = self.state(way.from)
        {
            state.counters.flooded += 1;
        }
        self.enqueue(way, to, frame, now);
        Ok(())
    }

    /// Into the queue of a port.
    fn enqueue(&mut self, way: Way, to: PortId, mut frame: Frame, now: Time) {
        let Some(state) = self
            .ports
            .get_mut(to.index())
            .and_then(Option::as_deref_mut)
        else {
            self.pool.put(frame);
            return;
        };
        if let Some(groups) = &state.config.groups {
            let rules = (&mut self.policy, groups.as_slice());
            let passed = match way.content {
                Some(Ok(content)) => {
                    let bytes = frame.bytes();
                    state
                        .connections
                        .pass(bytes, content, Direction::In, rules, now)
                }
                _ => Err(DropReason::PolicyIn),
            };
            if let Err(reason) = passed {
                state.counters.drop(reason, 1);
                self.pool.put(frame);
                return;
            }
        }
        if payload_len(&frame) > usize::from(state.config.mtu) {
            state.counters.drop(DropReason::TooBig, 1);
            self.pool.put(frame);
            return;
        }
        if let Some(control) = state.config.vlan.egress_tag(way.vid, way.pcp) {
            frame.push_tag(packet::ethertype::VLAN, control);
        }
        let pool = &mut self.pool;
        let dropped = state
            .queues
            .push(way.from.index(), class_of(way.pcp), frame, |frame| {
                pool.put(frame)
            });
        state.counters.drop(DropReason::QueueFull, dropped as u64);
        if state.held.is_none() {
            self.list(to);
        }
    }

    /// Notes that a port has something to take.
    fn list(&mut self, port: PortId) {
        if let Some(state) = self.state(port)
            && !state.listed
        {
            state.listed = true;
            self.ready.push_back(port);
        }
    }

    /// A port that has something to take, each once: take until there is no more.
    pub fn next_ready(&mut self) -> Option<PortId> {
        let port = self.ready.pop_front()?;
        if let Some(state) = self.state(port) {
            state.listed = false;
        }
        Some(port)
    }

    /// The next frame for `port`, with nothing left to do that its receiver does not take.
    pub fn take(&mut self, port: PortId, now: Time) -> Option<Frame> {
        let frame = self.take_next(port, now)?;
        if !self.mirrors.is_empty() && frame.captured.is_none() {
            self.mirror(port, Direction::Out, &frame, now);
        }
        if let Some(state) = self.state(port) {
            state.counters.sent.add(frame.len());
        }
        Some(frame)
    }

    fn take_next(&mut self, port: PortId, now: Time) -> Option<Frame> {
        let state = self.ports.get_mut(port.index())?.as_deref_mut()?;
        if let Some(frame) = state.returned.take() {
            return Some(frame);
        }
        loop {
            if let Some(segments) = &mut state.segments {
                if let Some(segment) = segments.next(&mut self.pool) {
                    return Some(segment);
                }
                if let Some(segments) = state.segments.take() {
                    self.pool.put(segments.into_frame());
                }
            }
            if state.queues.is_empty() {
                return None;
            }
            let ready = state.egress.ready(now);
            if ready > now {
                state.held = Some(ready);
                return None;
            }
            state.held = None;
            let mut frame = state.queues.pop()?;
            state.egress.charge(frame.len() as u64, packets(&frame));
            let capabilities = state.config.capabilities;
            if capabilities.takes(&frame.offload) {
                return Some(frame);
            }
            if frame.offload.segmentation.is_none() {
                if frame.finish_checksum() {
                    return Some(frame);
                }
                state.counters.drop(DropReason::BadOffload, 1);
                self.pool.put(frame);
                continue;
            }
            match frame.segments() {
                Ok(segments) => state.segments = Some(segments),
                Err(_) => state.counters.drop(DropReason::BadOffload, 1),
            }
        }
    }

    /// Puts back a frame that `take` gave and that the receiver has no room for: it is the next one.
    pub fn put_back(&mut self, port: PortId, frame: Frame) {
        if let Some(state) = self.state(port) {
            let sent = &mut state.counters.sent;
            sent.frames = sent.frames.saturating_sub(1);
            sent.bytes = sent.bytes.saturating_sub(frame.len() as u64);
            state.returned = Some(frame);
        }
    }

    /// When `tick` has something to do.
    pub fn next_deadline(&self) -> Time {
        let held = self.ports.iter().flatten().filter_map(|state| state.held);
        held.fold(self.age_at, Time::min)
    }

    /// Does what time asks for: ages addresses, and lists ports whose limit lets frames go again.
    pub fn tick(&mut self, now: Time) {
        if now >= self.age_at {
            self.table.age(now);
            self.age_at = now.after(AGE_EVERY);
            // A few ports at a time, so that no tick takes long.
            for _ in 0..self.ports.len().div_ceil(4) {
                self.purge_next = (self.purge_next + 1) % self.ports.len().max(1);
                if let Some(state) = self.state(PortId(self.purge_next as u32)) {
                    state.connections.purge(now);
                }
            }
        }
        for index in 0..self.ports.len() {
            let port = PortId(index as u32);
            if let Some(state) = self.state(port)
                && state.held.is_some_and(|until| until <= now)
            {
                state.held = None;
                self.list(port);
            }
        }
    }
}

/// Packets that a frame stands for.
fn packets(frame: &Frame) -> u64 {
    match frame.offload.segmentation {
        Some(how) if how.size > 0 => (frame.len() as u64).div_ceil(u64::from(how.size)),
        _ => 1,
    }
}

/// Bytes behind the Ethernet header and tags of a frame, or of the longest packet that it stands for.
fn payload_len(frame: &Frame) -> usize {
    let len = match frame.offload.segmentation {
        Some(how) => {
            let headers = usize::from(how.header_len);
            frame.len().min(headers.saturating_add(how.size.into()))
        }
        None => frame.len(),
    };
    packet::payload(frame.bytes()).map_or(len, |(_, at)| len.saturating_sub(at))
}

/// One round between a switch and what hangs on its ports: takes up to `batch` frames of each port into the switch, then
/// delivers what is ready. True if there is more to do at once.
pub fn carry(
    switch: &mut Switch,
    ports: &mut [(PortId, &mut dyn Port)],
    batch: usize,
    now: Time,
) -> bool {
    let mut more = false;
    for (id, port) in ports.iter_mut() {
        let mut left = batch;
        while left > 0 && switch.may_receive(*id, now) <= now {
            let Some(frame) = port.poll(now, switch.pool()) else {
                break;
            };
            switch.receive(*id, frame, now);
            left -= 1;
        }
        more |= left == 0;
    }
    for (id, port) in ports.iter_mut() {
        let mut left = batch.saturating_mul(2);
        while left > 0 {
            let Some(frame) = switch.take(*id, now) else {
                break;
            };
            if let Err(frame) = port.deliver(frame, now, switch.pool()) {
                switch.put_back(*id, frame);
                break;
            }
            left -= 1;
        }
        more |= left == 0;
    }
    more
}

#[cfg(test)]
mod tests;
