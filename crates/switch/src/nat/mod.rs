//! User-mode NAT: a guest's flows become sockets of the host, without privileges and without a TCP stack.
//!
//! ```text
//!   mod        the port; who owns which flow; the host's answers
//!   guest      what the guest sends
//!   tcp        one connection             datagram   one UDP flow, or ICMP echo
//!   flow       the table and its timers   wire       headers
//!   router     the gateway's answers and the NAT as one port
//! ```
//!
//! The NAT makes no sockets. It asks for connected ones ([`Host`]), so it can run where none can be made, and whoever
//! makes them decides whom a guest may reach. On what it was given it only sends, receives and shuts down. It runs on one
//! thread, which waits at [`Nat::descriptor`] and calls [`Nat::service`] when that is readable.
//!
//! What goes to the guest is made when it is asked for ([`Port::poll`]): what the guest has no room for stays in the
//! host's buffers. Flows are limited in number. The memory that they hold is limited, too ([`NatConfig::memory_max`]): beyond
//! the limit only what the host's buffers take at once is taken of the guest, little is under way to the guest, and
//! datagrams wait for nothing; beyond twice the limit a connection that would have to keep more ends with a reset.

mod datagram;
mod flow;
mod guest;
mod router;
mod tcp;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use foldhash::quality::RandomState;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll;

use self::datagram::Datagrams;
use self::flow::{FlowId, Flows, Key, Kind, QUEUE_MIN};
pub use self::router::Router;
use self::tcp::{Fate, Heard, Memory, Next, Tcp};
use self::wire::{Ends, Segment, flag};
use crate::checksum;
use crate::frame::{Frame, SegmentationKind};
use crate::packet::{self, Content, Ip, Mac, protocol};
use crate::pool::Pool;
use crate::port::{Capabilities, Port};
use crate::time::Time;

/// The token of the host's answers among the events; flows have others.
const ANSWERS: u64 = u64::MAX;
/// Events taken at a time.
const EVENTS: usize = 256;
/// Answers taken at a time.
const ANSWERS_AT_ONCE: usize = 64;
/// Frames without a flow that wait for the guest at most.
const LOOSE_MAX: usize = 256;
const DNS_PORT: u16 = 53;

/// What a network of one guest and its gateway is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatConfig {
    /// The gateway's Ethernet address.
    pub mac: Mac,
    /// The gateway's addresses.
    pub gateway4: Ipv4Addr,
    /// The same for IPv6.
    pub gateway6: Ipv6Addr,
    /// The guest that gets what is published.
    pub guest_mac: Mac,
    /// The address that it is given; one that it is seen to use takes its place.
    pub guest4: Ipv4Addr,
    /// The longest packet of the network.
    pub mtu: u16,
    /// Flows at most; half of them if peers of the host began them.
    pub flows_max: usize,
    /// Bytes that all flows together may hold before they are held back. Twice as much is never exceeded by more than one
    /// connection's flight.
    pub memory_max: usize,
}

/// A socket that the NAT asks for. All are connected, and none blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// A TCP connection that is being made.
    Tcp(SocketAddr),
    /// A UDP socket.
    Udp(SocketAddr),
    /// A ping socket.
    Echo(IpAddr),
    /// A TCP connection or a UDP socket to a port of the host itself.
    Here {
        /// TCP, not UDP.
        tcp: bool,
        /// The port.
        port: u16,
        /// Over IPv6.
        v6: bool,
    },
    /// A TCP connection or a UDP socket to one of the host's resolvers; another one the more have not answered.
    Resolver {
        /// TCP, not UDP.
        tcp: bool,
        /// Names not answered since one was.
        failures: u32,
    },
}

/// What the host says.
#[derive(Debug)]
pub enum Answer {
    /// To a wish.
    Socket {
        /// Whose.
        flow: u64,
        /// The socket, and whether looking at its data goes on where it was (`SO_PEEK_OFF`); or nothing.
        socket: Option<(OwnedFd, bool)>,
    },
    /// A peer connected to a published port.
    Connection {
        /// The connection.
        socket: OwnedFd,
        /// As in [`Answer::Socket`].
        peeks: bool,
        /// Who.
        peer: SocketAddr,
        /// The guest's port.
        port: u16,
    },
    /// A peer sent a datagram to a published port.
    Datagram {
        /// Connected to the peer.
        socket: OwnedFd,
        /// Who.
        peer: SocketAddr,
        /// The guest's port.
        port: u16,
        /// What it sent.
        payload: Vec<u8>,
    },
}

/// Who makes sockets.
pub trait Host: Send {
    /// Asks; the answer has the same `flow`. False if that is not possible now.
    fn ask(&mut self, flow: u64, wish: Wish) -> bool;

    /// The next answer, if there is one now.
    fn answer(&mut self) -> Option<Answer>;

    /// Readable when there may be an answer.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// What the NAT has done and has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NatCounters {
    /// Flows now.
    pub flows: u64,
    /// TCP connections that the guest began.
    pub tcp_out: u64,
    /// TCP connections that peers of the host began.
    pub tcp_in: u64,
    /// Connections that ended with a reset, whoever sent it.
    pub tcp_reset: u64,
    /// Times that a connection's data was sent to the guest again.
    pub tcp_again: u64,
    /// UDP flows and pings.
    pub datagram_flows: u64,
    /// Flows that were not made because there were too many.
    pub refused_full: u64,
    /// Sockets that the host did not give.
    pub refused_host: u64,
    /// Packets of the guest that contradict themselves.
    pub malformed: u64,
    /// Packets with a wrong checksum.
    pub checksum: u64,
    /// Fragments, which are not put together here.
    pub fragments: u64,
    /// Packets of other protocols, to groups, or to nobody.
    pub unknown: u64,
}

/// The NAT of one network. It is a port of the network's switch, beside the gateway's answers.
pub struct Nat {
    config: NatConfig,
    host: Box<dyn Host>,
    epoll: OwnedFd,
    flows: Flows,
    /// Flows with something for the guest.
    ready: VecDeque<FlowId>,
    /// Frames that belong to no flow.
    loose: VecDeque<Frame>,
    /// The guest's addresses as seen last.
    guest4: Ipv4Addr,
    guest6: Option<Ipv6Addr>,
    guest_mac: Mac,
    /// Bytes that flows hold, as of their last events.
    memory: usize,
    /// Answers of resolvers, with the tokens of the questions.
    resolved: VecDeque<(u64, Vec<u8>)>,
    dns_failures: u32,
    secret: RandomState,
    counters: NatCounters,
}

impl Nat {
    /// A NAT without flows.
    ///
    /// # Errors
    /// If the system gives no descriptor.
    pub fn new(config: NatConfig, host: Box<dyn Host>) -> io::Result<Nat> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let token = epoll::EventData::new_u64(ANSWERS);
        epoll::add(&epoll, host.descriptor(), token, epoll::EventFlags::IN)?;
        Ok(Nat {
            host,
            epoll,
            flows: Flows::default(),
            ready: VecDeque::new(),
            loose: VecDeque::new(),
            guest4: config.guest4,
            guest6: None,
            guest_mac: config.guest_mac,
            memory: 0,
            resolved: VecDeque::new(),
            dns_failures: 0,
            secret: RandomState::default(),
            counters: NatCounters::default(),
            config,
        })
    }

    /// Readable when [`Nat::service`] has something to do.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// What it has done.
    pub fn counters(&self) -> NatCounters {
        NatCounters {
            flows: self.flows.len() as u64,
            ..self.counters
        }
    }

    /// Whether `poll` has something to do now.
    pub fn has_frames(&self) -> bool {
        !self.ready.is_empty() || !self.loose.is_empty()
    }

    /// Asks one of the host's resolvers.
    pub fn resolve(&mut self, token: u64, message: &[u8], now: Time) {
        let mut datagrams = Datagrams::default();
        datagrams.send(message, true);
        let kind = Kind::Question(Box::new(datagrams), token);
        let wish = Wish::Resolver {
            tcp: false,
            failures: self.dns_failures,
        };
        let (key, mac) = (Key::of_question(token), self.config.mac);
        let bytes = memory(&kind);
        if let Some(id) = self.begin(key, mac, kind, wish, now) {
            self.account(0, bytes);
            self.settle(id, Fate::Lives, now);
        }
    }

    /// A resolver's answer, with the token of the question.
    pub fn next_resolved(&mut self) -> Option<(u64, Vec<u8>)> {
        self.resolved.pop_front()
    }

    /// Takes what has happened at the sockets, some at a time. What is left makes the descriptor readable again.
    pub fn service(&mut self, now: Time) {
        let mut events = Vec::with_capacity(EVENTS);
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // An interruption is like nothing: the descriptor stays readable.
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&at_once));
        for event in events {
            match event.data.u64() {
                ANSWERS => self.answers(now),
                flow => self.event(FlowId::of(flow), event.flags, now),
            }
        }
    }

    fn answers(&mut self, now: Time) {
        for _ in 0..ANSWERS_AT_ONCE {
            match self.host.answer() {
                None => return,
                Some(Answer::Socket { flow, socket }) => {
                    self.opened(FlowId::of(flow), socket, now);
                }
                Some(Answer::Connection {
                    socket,
                    peeks,
                    peer,
                    port,
                }) => {
                    if let Some(key) = self.key_of_peer(protocol::TCP, peer, port) {
                        let tcp = Tcp::by_host(socket, peeks, self.isn(&key, now));
                        self.counters.tcp_in += 1;
                        self.adopt(key, Kind::Tcp(Box::new(tcp)), now);
                    }
                }
                Some(Answer::Datagram {
                    socket,
                    peer,
                    port,
                    payload,
                }) => {
                    if self.kept() == Memory::Ample
                        && let Some(key) = self.key_of_peer(protocol::UDP, peer, port)
                        && !self.also(&key, &payload)
                    {
                        let datagrams = Datagrams::by_host(socket, payload);
                        self.counters.datagram_flows += 1;
                        self.adopt(key, Kind::Datagrams(Box::new(datagrams)), now);
                    }
                }
            }
        }
    }

    /// How the guest sees a flow that a peer of the host begins. A peer on the host itself, and one whose address the
    /// guest has no way to, is the gateway to it.
    fn key_of_peer(&mut self, protocol: u8, peer: SocketAddr, port: u16) -> Option<Key> {
        let (guest, gateway): (IpAddr, IpAddr) = match (peer.is_ipv6(), self.guest6) {
            (true, Some(guest)) => (guest.into(), self.config.gateway6.into()),
            _ => (self.guest4.into(), self.config.gateway4.into()),
        };
        let known = peer.is_ipv4() == guest.is_ipv4() && !peer.ip().is_loopback();
        let remote = if known { peer.ip() } else { gateway };
        let mut key = Key {
            protocol,
            guest: SocketAddr::new(guest, port),
            remote: SocketAddr::new(remote, peer.port()),
        };
        // Several of the host's addresses are one to the guest: then another port is taken.
        for _ in 0..1024 {
            // Datagrams of one peer are of one flow.
            if protocol == protocol::UDP || self.flows.find(&key).is_none() {
                return Some(key);
            }
            let next = key.remote.port().wrapping_add(1).max(1024);
            key.remote.set_port(next);
        }
        None
    }

    /// Gives a datagram of a peer to the flow that it has already.
    fn also(&mut self, key: &Key, payload: &[u8]) -> bool {
        let Some(id) = self.flows.find(key) else {
            return false;
        };
        if let Some(flow) = self.flows.get(id)
            && let Kind::Datagrams(datagrams) = &mut flow.kind
        {
            let before = datagrams.memory();
            datagrams.also(payload.to_vec());
            let after = datagrams.memory();
            self.account(before, after);
        }
        self.list(id);
        true
    }

    /// Takes a flow that begins with a socket.
    fn adopt(&mut self, key: Key, kind: Kind, now: Time) {
        // Whoever they are, the guest keeps half for its own.
        if self.flows.len() >= self.config.flows_max
            || self.flows.by_peers() >= self.config.flows_max.div_ceil(2)
        {
            self.counters.refused_full += 1;
            return;
        }
        self.account(0, memory(&kind));
        let id = self.flows.add(key, self.guest_mac, kind, true, now);
        self.watch(id);
        self.list(id);
        self.settle(id, Fate::Lives, now);
    }

    /// Has the system tell of what happens at a flow's socket.
    fn watch(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id) else {
            return;
        };
        let (socket, flags) = match &flow.kind {
            Kind::Tcp(tcp) => (
                tcp.socket(),
                epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP,
            ),
            Kind::Datagrams(datagrams) | Kind::Question(datagrams, _) => {
                (datagrams.socket(), epoll::EventFlags::IN)
            }
        };
        if let Some(socket) = socket {
            let token = epoll::EventData::new_u64(id.number());
            // If there is no memory for it the flow ends by its time-out.
            let _ = epoll::add(&self.epoll, socket, token, flags | epoll::EventFlags::ET);
        }
    }

    /// Puts a flow into the queue, if it still is and is not in it.
    fn list(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get(id)
            && !flow.listed
        {
            flow.listed = true;
            self.ready.push_back(id);
        }
        // Nothing is taken out while the guest takes nothing, but flows come and go.
        if self.ready.len() > 2 * self.flows.len() + QUEUE_MIN {
            let flows = &mut self.flows;
            self.ready.retain(|&id| flows.get(id).is_some());
        }
    }

    /// When the next timer may run out.
    fn next_timer(&self) -> Option<Time> {
        self.flows.next_timer()
    }

    fn opened(&mut self, id: FlowId, socket: Option<(OwnedFd, bool)>, now: Time) {
        let Some(flow) = self.flows.get(id) else {
            return;
        };
        let Some((socket, peeks)) = socket else {
            self.counters.refused_host += 1;
            return self.settle(id, Fate::Reset, now);
        };
        let before = memory(&flow.kind);
        match &mut flow.kind {
            Kind::Tcp(tcp) => tcp.opened(socket, peeks),
            Kind::Datagrams(datagrams) | Kind::Question(datagrams, _) => datagrams.opened(socket),
        }
        let after = memory(&flow.kind);
        self.account(before, after);
        self.watch(id);
        self.settle(id, Fate::Lives, now);
    }

    fn event(&mut self, id: FlowId, events: epoll::EventFlags, now: Time) {
        let Some(flow) = self.flows.get(id) else {
            return;
        };
        let before = memory(&flow.kind);
        let fate = match &mut flow.kind {
            Kind::Tcp(tcp) => tcp.ready(events),
            Kind::Datagrams(datagrams) => {
                datagrams.ready(events);
                Fate::Lives
            }
            Kind::Question(datagrams, token) => {
                let token = *token;
                match datagrams.resolved() {
                    Ok(None) => Fate::Lives,
                    Ok(Some(message)) => {
                        self.dns_failures = 0;
                        self.resolved.push_back((token, message));
                        Fate::Over
                    }
                    Err(_) => {
                        self.dns_failures = self.dns_failures.wrapping_add(1);
                        Fate::Over
                    }
                }
            }
        };
        self.acted(id, before, fate, now);
    }

    /// After a flow that kept `before` bytes has done something: what follows for all flows, and for itself.
    fn acted(&mut self, id: FlowId, before: usize, fate: Fate, now: Time) {
        let Some(flow) = self.flows.get(id) else {
            return;
        };
        let after = memory(&flow.kind);
        self.account(before, after);
        self.settle(id, fate, now);
        self.list(id);
    }

    /// How much all flows keep, by what they may.
    fn kept(&self) -> Memory {
        match self.memory {
            bytes if bytes > self.config.memory_max.saturating_mul(2) => Memory::Exhausted,
            bytes if bytes > self.config.memory_max => Memory::Scarce,
            _ => Memory::Ample,
        }
    }

    fn account(&mut self, before: usize, after: usize) {
        self.memory = (self.memory + after).saturating_sub(before);
    }

    /// Does to a flow what an event has brought about, and sets its timer.
    fn settle(&mut self, id: FlowId, fate: Fate, now: Time) {
        let Some(flow) = self.flows.get(id) else {
            return;
        };
        if fate == Fate::Lives {
            let patience = match &flow.kind {
                Kind::Tcp(tcp) => tcp.patience(),
                Kind::Datagrams(datagrams) | Kind::Question(datagrams, _) => {
                    datagrams.patience(&flow.key)
                }
            };
            return self.flows.set_timer(id, now.after(patience));
        }
        let Some(mut flow) = self.flows.remove(id) else {
            return;
        };
        self.account(memory(&flow.kind), 0);
        let ends = self.ends(&flow.key, flow.mac);
        if let Kind::Tcp(tcp) = &mut flow.kind
            && fate != Fate::Over
        {
            self.counters.tcp_reset += 1;
            if fate == Fate::Reset {
                let frame = tcp.reset(&flow.key, &ends, &mut Pool::new(0));
                self.say(frame);
            }
            if let Some(socket) = tcp.take_socket() {
                // Closed like that, a socket sends a reset.
                let at_once = Some(std::time::Duration::ZERO);
                let _ = rustix::net::sockopt::set_socket_linger(&socket, at_once);
            }
        }
    }

    /// Sends a frame that belongs to no flow.
    fn say(&mut self, frame: Frame) {
        if self.loose.len() < LOOSE_MAX {
            self.loose.push_back(frame);
        }
    }

    fn ends(&self, key: &Key, mac: Mac) -> Ends {
        Ends {
            from_mac: self.config.mac,
            to_mac: mac,
            from: key.remote.ip(),
            to: key.guest.ip(),
        }
    }

    /// A first sequence number that nobody can guess (RFC 6528).
    fn isn(&self, key: &Key, now: Time) -> u32 {
        (self.secret.hash_one(key) as u32).wrapping_add((now.nanos() >> 12) as u32)
    }

    /// Serves the timers that have run out.
    fn timers(&mut self, now: Time) {
        while let Some(id) = self.flows.expired(now) {
            let kept = self.kept();
            let Some(flow) = self.flows.get(id) else {
                continue;
            };
            let before = memory(&flow.kind);
            let fate = match &mut flow.kind {
                Kind::Tcp(tcp) => {
                    self.counters.tcp_again += 1;
                    tcp.expired(kept)
                }
                Kind::Datagrams(_) => Fate::Over,
                Kind::Question(..) => {
                    self.dns_failures = self.dns_failures.wrapping_add(1);
                    Fate::Over
                }
            };
            self.acted(id, before, fate, now);
        }
    }

    /// What a flow has for the guest; the flow goes to the end of the queue if there may be more.
    fn next_of(&mut self, id: FlowId, now: Time, pool: &mut Pool) -> Option<Frame> {
        let kept = self.kept();
        let (mtu, mac) = (self.config.mtu, self.config.mac);
        let flow = self.flows.get(id)?;
        let ends = Ends {
            from_mac: mac,
            to_mac: flow.mac,
            from: flow.key.remote.ip(),
            to: flow.key.guest.ip(),
        };
        let before = memory(&flow.kind);
        let next = match &mut flow.kind {
            Kind::Tcp(tcp) => tcp.next(&flow.key, &ends, mtu, kept, pool),
            Kind::Datagrams(datagrams) => match datagrams.next(&flow.key, &ends, pool) {
                Some(frame) => Next::Frame(frame),
                None => Next::Nothing,
            },
            Kind::Question(..) => Next::Nothing,
        };
        let after = memory(&flow.kind);
        flow.listed = matches!(next, Next::Frame(_));
        self.account(before, after);
        match next {
            Next::Frame(frame) => {
                self.ready.push_back(id);
                self.settle(id, Fate::Lives, now);
                Some(frame)
            }
            Next::Nothing => None,
            Next::Fate(fate) => {
                self.settle(id, fate, now);
                None
            }
        }
    }
}

/// Bytes of ours that a flow holds.
fn memory(kind: &Kind) -> usize {
    match kind {
        Kind::Tcp(tcp) => tcp.memory(),
        Kind::Datagrams(datagrams) | Kind::Question(datagrams, _) => datagrams.memory(),
    }
}

impl Port for Nat {
    fn deliver(&mut self, frame: Frame, now: Time, pool: &mut Pool) -> Result<(), Frame> {
        self.take(&frame, now);
        pool.put(frame);
        Ok(())
    }

    fn poll(&mut self, now: Time, pool: &mut Pool) -> Option<Frame> {
        self.timers(now);
        loop {
            if let Some(frame) = self.loose.pop_front() {
                return Some(frame);
            }
            let id = self.ready.pop_front()?;
            if let Some(frame) = self.next_of(id, now, pool) {
                return Some(frame);
            }
        }
    }

    fn next_deadline(&self) -> Option<Time> {
        if self.has_frames() {
            Some(Time::ZERO)
        } else {
            self.next_timer()
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::ALL
    }
}
