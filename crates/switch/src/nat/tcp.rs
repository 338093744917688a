//! One TCP connection between the guest and a socket of the host, without a TCP stack in between.
//!
//! The guest's segments are mapped to the socket and back (RFC 9293): what the guest sends is acknowledged when the host
//! has taken it, and not before, so the guest's window closes when the host's buffer is full. What the host receives
//! stays in its buffer until the guest has acknowledged it: it is looked at (`MSG_PEEK`) to be sent and taken out when it
//! has arrived, so the peer's window closes when the guest's does, and nothing is kept here. Only bytes that have to be
//! sent again move into memory of ours.
//!
//! ```text
//!   Opening ─socket─▶ Connecting ─connected─▶ SynReceived ─ACK─▶ Open        the guest connects
//!                                              SynSent ─SYN ACK─▶ Open       a peer of the host connects
//! ```
//!
//! Limitations: no selective acknowledgements, no timestamps, no urgent data. The link to the guest loses nothing and keeps
//! the order, so segments of the guest that come out of order are left to be sent again.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::flow::Key;
use super::wire::{self, Ends, Segment, TCP_HEADER, flag};
use crate::frame::Frame;
use crate::packet;
use crate::pool::Pool;

/// What the guest may send beyond what the host has taken.
const WINDOW: u32 = 1 << 20;
/// The same while all flows together keep too much.
const WINDOW_SCARCE: u32 = 16 << 10;
/// Our window scale (RFC 7323).
const SHIFT: u8 = 7;
/// The most payload in a frame, so that the packet has at most 65,535 bytes with any headers.
const PAYLOAD_MAX: usize = 65_535 - 40 - TCP_HEADER;
/// The most that is on its way to the guest.
const FLIGHT_MAX: u32 = 4 << 20;
/// The same while all flows together keep too much.
const FLIGHT_SCARCE: u32 = 64 << 10;
/// Bytes that the guest has acknowledged and that are left in the socket, to save system calls.
const LAG_MAX: u32 = 64 << 10;
/// What a peer takes that names no MSS (RFC 9293 section 3.7.1).
const MSS_DEFAULT: u16 = 536;
/// How long the host may take to give a socket, and to connect it.
const OPENING: Duration = Duration::from_secs(20);
const CONNECTING: Duration = Duration::from_secs(180);
/// First time-outs, doubled with each try.
const SYN_RETRY: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(500);
const SYN_TRIES: u32 = 6;
const TRIES: u32 = 9;
/// How long a connection may be silent (RFC 5382 REQ-5: at least 2 hours and 4 minutes); how long if the guest has said
/// all and nobody answers.
const IDLE: Duration = Duration::from_secs(7440);
const IDLE_HALF_CLOSED: Duration = Duration::from_secs(900);

/// A segment of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Heard<'a> {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// See [`flag`].
    pub flags: u8,
    /// Window as it is on the wire.
    pub window: u16,
    /// Options.
    pub options: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> Heard<'a> {
    /// Reads a segment; none if its header is longer than it.
    pub fn parse(segment: &'a [u8]) -> Option<(u16, u16, Heard<'a>)> {
        let words = usize::from(segment.get(12)? >> 4);
        let options = segment.get(TCP_HEADER..words * 4)?;
        Some((
            packet::get_u16(segment, 0)?,
            packet::get_u16(segment, 2)?,
            Heard {
                seq: packet::get_u32(segment, 4)?,
                ack: packet::get_u32(segment, 8)?,
                flags: *segment.get(13)?,
                window: packet::get_u16(segment, 14)?,
                options,
                payload: segment.get(words * 4..)?,
            },
        ))
    }

    fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// Sequence numbers that it takes.
    pub fn len(&self) -> u32 {
        self.payload.len() as u32 + u32::from(self.has(flag::SYN)) + u32::from(self.has(flag::FIN))
    }
}

/// What a SYN says in its options.
fn options(mut rest: &[u8]) -> (u16, Option<u8>) {
    let (mut mss, mut shift) = (MSS_DEFAULT, None);
    while let Some((kind, more)) = rest.split_first() {
        rest = match kind {
            0 => break,
            1 => more,
            _ => {
                let len = usize::from(more.first().copied().unwrap_or(0));
                let Some(next) = rest.get(len.max(2)..).filter(|_| len >= 2) else {
                    break;
                };
                match (kind, more) {
                    (2, [4, high, low, ..]) => mss = u16::from_be_bytes([*high, *low]),
                    (3, [3, count, ..]) => shift = Some((*count).min(14)),
                    _ => {}
                }
                next
            }
        };
    }
    (mss, shift)
}

/// Whether sequence number `a` is before `b`.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Opening,
    Connecting,
    SynReceived,
    SynSent,
    Open,
}

/// How much all flows together keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Memory {
    /// Less than they may.
    Ample,
    /// More: windows are small, and what would have to be kept is left to be sent again.
    Scarce,
    /// Twice that: what cannot be left goes with its connection.
    Exhausted,
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Lives,
    /// It is over, and both sides know.
    Over,
    /// The guest has to be told that it is gone.
    Reset,
    /// The host's peer has to be told.
    Aborted,
}

/// What a connection has for the guest.
#[derive(Debug)]
pub enum Next {
    /// This, and perhaps more.
    Frame(Frame),
    /// Nothing now.
    Nothing,
    /// Its end.
    Fate(Fate),
}

/// A connection.
#[derive(Debug)]
pub struct Tcp {
    phase: Phase,
    socket: Option<OwnedFd>,
    /// Looking at data does not take it, and goes on where it was (`SO_PEEK_OFF`).
    peeks: bool,
    /// What the guest takes in a packet, and how its windows are scaled; none if ours are not.
    mss: u16,
    shift: Option<u8>,

    /// The next sequence number of the guest.
    heard: u32,
    /// The end of the window that it was given.
    edge: u32,
    /// What it sent and the host has not taken.
    pending: VecDeque<u8>,
    guest_ended: bool,
    /// The socket's sending side is shut.
    told_host: bool,
    owes_ack: bool,

    /// Our first sequence number that the guest has not acknowledged, the next to be sent, and the first never sent.
    una: u32,
    next: u32,
    top: u32,
    window: u32,
    /// Acknowledged bytes that are still in the socket.
    lag: u32,
    /// Bytes from `una` on that are not in the socket any more.
    resend: VecDeque<u8>,
    readable: bool,
    host_ended: bool,
    /// The number of our FIN, once it was sent.
    fin_at: Option<u32>,
    fin_heard: bool,
    syn_sent: bool,
    repeated: u32,
    tries: u32,
    /// The guest's window may be tried although it is closed.
    probe: bool,
}

impl Tcp {
    fn new(phase: Phase, isn: u32) -> Tcp {
        Tcp {
            phase,
            socket: None,
            peeks: false,
            mss: MSS_DEFAULT,
            shift: None,
            heard: 0,
            edge: 0,
            pending: VecDeque::new(),
            guest_ended: false,
            told_host: false,
            owes_ack: false,
            una: isn,
            next: isn,
            top: isn,
            window: 0,
            lag: 0,
            resend: VecDeque::new(),
            readable: false,
            host_ended: false,
            fin_at: None,
            fin_heard: false,
            syn_sent: false,
            repeated: 0,
            tries: 0,
            probe: false,
        }
    }

    /// The guest wants to connect.
    pub fn by_guest(syn: &Heard<'_>, isn: u32) -> Tcp {
        let mut tcp = Tcp::new(Phase::Opening, isn);
        tcp.take_syn(syn);
        tcp
    }

    /// A peer of the host has connected.
    pub fn by_host(socket: OwnedFd, peeks: bool, isn: u32) -> Tcp {
        let mut tcp = Tcp::new(Phase::SynSent, isn);
        (tcp.socket, tcp.peeks) = (Some(socket), peeks);
        tcp
    }

    fn take_syn(&mut self, syn: &Heard<'_>) {
        let (mss, shift) = options(syn.options);
        self.mss = mss.max(64);
        self.shift = shift;
        self.heard = syn.seq.wrapping_add(1);
        // The window of a SYN is never scaled.
        self.window = u32::from(syn.window);
        self.edge = self.heard.wrapping_add(u32::from(u16::MAX));
    }

    /// Its socket, once the host has given it.
    pub fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    /// Takes the socket out, to end it.
    pub fn take_socket(&mut self) -> Option<OwnedFd> {
        self.socket.take()
    }

    /// Bytes of ours that it holds.
    pub fn memory(&self) -> usize {
        self.pending.capacity() + self.resend.capacity()
    }

    /// Whether a SYN of the guest begins another connection than this: not one that it has sent before.
    pub fn is_left_by(&self, syn: &Heard<'_>) -> bool {
        self.phase == Phase::Open || self.heard != syn.seq.wrapping_add(1)
    }

    /// The host has given a socket that is being connected.
    pub fn opened(&mut self, socket: OwnedFd, peeks: bool) {
        if self.phase == Phase::Opening {
            self.phase = Phase::Connecting;
            (self.socket, self.peeks) = (Some(socket), peeks);
        }
    }

    /// Something happened at the socket.
    pub fn ready(&mut self, events: EventFlags) -> Fate {
        let Some(socket) = &self.socket else {
            return Fate::Lives;
        };
        let broken = events.intersects(EventFlags::ERR | EventFlags::HUP);
        if self.phase == Phase::Connecting {
            if broken || rustix::net::sockopt::socket_error(socket) != Ok(Ok(())) {
                return Fate::Reset;
            }
            if events.contains(EventFlags::OUT) {
                self.phase = Phase::SynReceived;
            }
        }
        if broken || events.intersects(EventFlags::IN | EventFlags::RDHUP) {
            self.readable = true;
        }
        if broken || events.contains(EventFlags::OUT) {
            return self.flush();
        }
        Fate::Lives
    }

    /// Takes a segment of the guest.
    pub fn segment(&mut self, heard: &Heard<'_>, memory: Memory) -> Fate {
        if heard.has(flag::RST) {
            let possible = match self.phase {
                Phase::SynSent => heard.has(flag::ACK) && heard.ack == self.next,
                _ => !before(heard.seq, self.heard) && !before(self.edge, heard.seq),
            };
            return if possible { Fate::Aborted } else { Fate::Lives };
        }
        match self.phase {
            Phase::Opening | Phase::Connecting => Fate::Lives,
            Phase::SynSent => self.answered(heard),
            Phase::SynReceived | Phase::Open => self.received(heard, memory),
        }
    }

    /// The guest answers our SYN.
    fn answered(&mut self, heard: &Heard<'_>) -> Fate {
        let ours = self.syn_sent && heard.ack == self.una.wrapping_add(1);
        if !heard.has(flag::SYN) || !heard.has(flag::ACK) || !ours {
            return Fate::Lives;
        }
        self.take_syn(heard);
        self.connected(heard);
        self.owes_ack = true;
        self.readable = true;
        Fate::Lives
    }

    fn connected(&mut self, heard: &Heard<'_>) {
        self.phase = Phase::Open;
        (self.una, self.next, self.top) = (heard.ack, heard.ack, heard.ack);
        self.tries = 0;
    }

    fn received(&mut self, heard: &Heard<'_>, memory: Memory) -> Fate {
        if heard.has(flag::SYN) || !heard.has(flag::ACK) {
            // A repeated SYN has missed our answer; others are wrong and get to know where we are.
            if self.phase == Phase::SynReceived {
                self.syn_sent = false;
            }
            self.owes_ack = self.phase == Phase::Open;
            return Fate::Lives;
        }
        let end = heard.seq.wrapping_add(heard.len());
        if before(self.edge, heard.seq) || before(end, self.heard) {
            self.owes_ack = true;
            return Fate::Lives;
        }
        if self.phase == Phase::SynReceived {
            if heard.ack != self.una.wrapping_add(1) {
                return Fate::Lives;
            }
            self.connected(heard);
            self.readable = true;
        }
        if self.acknowledged(heard, memory) == Fate::Reset {
            return Fate::Reset;
        }
        if heard.len() > 0 {
            self.owes_ack = true;
            if self.data(heard, memory) == Fate::Reset {
                return Fate::Reset;
            }
        }
        self.fate()
    }

    /// Takes what the guest says of what we sent.
    fn acknowledged(&mut self, heard: &Heard<'_>, memory: Memory) -> Fate {
        let window = u32::from(heard.window) << self.shift.unwrap_or(0);
        if before(heard.ack, self.una) || before(self.top, heard.ack) {
            // Old, or of what was never sent.
            self.owes_ack |= before(self.top, heard.ack);
            return Fate::Lives;
        }
        let count = heard.ack.wrapping_sub(self.una);
        if count == 0 {
            let repeats = heard.len() == 0 && window == self.window && self.next != self.una;
            let opens = self.window == 0 && window > 0;
            self.window = window;
            if window == 0 {
                // Who answers is there, and may take its time (RFC 9293 section 3.8.6.1).
                self.tries = self.tries.min(TRIES - 1);
            } else if opens {
                // What the window was tried with had no room.
                (self.repeated, self.tries) = (0, 0);
                return self.rewind(memory);
            }
            if repeats {
                self.repeated = self.repeated.saturating_add(1);
                if self.repeated == 3 {
                    return self.rewind(memory);
                }
            }
            return Fate::Lives;
        }
        self.window = window;
        (self.repeated, self.tries) = (0, 0);
        let fin = self
            .fin_at
            .is_some_and(|at| at.wrapping_add(1) == heard.ack);
        self.fin_heard |= fin;
        let bytes = count - u32::from(fin);
        self.una = heard.ack;
        if before(self.next, self.una) {
            self.next = self.una;
        }
        let kept = bytes.min(self.resend.len() as u32);
        self.resend.drain(..kept as usize);
        if self.resend.is_empty() {
            self.resend.shrink_to_fit();
        }
        if self.peeks {
            self.lag += bytes - kept;
        }
        if self.lag >= LAG_MAX || self.una == self.next {
            return self.take_out();
        }
        Fate::Lives
    }

    /// Takes from the socket what the guest has acknowledged.
    fn take_out(&mut self) -> Fate {
        let Some(socket) = &self.socket else {
            return Fate::Lives;
        };
        let mut nowhere = [0; 4096];
        while self.lag > 0 {
            // With MSG_TRUNC the bytes go nowhere (tcp(7)), but a length has to be a buffer's.
            let len = (self.lag as usize).min(nowhere.len());
            let room = nowhere.get_mut(..len).unwrap_or_default();
            match rustix::net::recv(socket, room, RecvFlags::TRUNC | RecvFlags::DONTWAIT) {
                Ok((_, count @ 1..)) => self.lag = self.lag.saturating_sub(count as u32),
                Err(Errno::INTR) => {}
                // The bytes were seen in the socket before.
                _ => return Fate::Reset,
            }
        }
        Fate::Lives
    }

    /// Has everything sent again that the guest has not acknowledged.
    fn rewind(&mut self, memory: Memory) -> Fate {
        if self.take_out() == Fate::Reset {
            return Fate::Reset;
        }
        let fin = self.fin_at.is_some_and(|at| before(at, self.next));
        let bytes = self.next.wrapping_sub(self.una) as usize - usize::from(fin);
        let mut missing = bytes.saturating_sub(self.resend.len());
        if missing > 0 && memory == Memory::Exhausted {
            return Fate::Reset;
        }
        self.resend.reserve_exact(missing);
        let mut piece = [0; 4096];
        while missing > 0 {
            let Some(socket) = &self.socket else {
                break;
            };
            let len = missing.min(piece.len());
            let room = piece.get_mut(..len).unwrap_or_default();
            match rustix::net::recv(socket, room, RecvFlags::DONTWAIT) {
                Ok((_, count @ 1..)) => {
                    self.resend.extend(piece.iter().take(count));
                    missing = missing.saturating_sub(count);
                }
                Err(Errno::INTR) => {}
                _ => return Fate::Reset,
            }
        }
        self.next = self.una;
        Fate::Lives
    }

    /// Takes the payload of a segment that begins in the window.
    fn data(&mut self, heard: &Heard<'_>, memory: Memory) -> Fate {
        let known = self.heard.wrapping_sub(heard.seq);
        // What comes before its time is left to be sent again.
        let Some(fresh) = heard.payload.get(known as usize..) else {
            return Fate::Lives;
        };
        if self.guest_ended {
            return Fate::Lives;
        }
        let room = self.edge.wrapping_sub(self.heard) as usize;
        let mut whole = fresh.len() <= room;
        let mut rest = fresh.get(..room).unwrap_or(fresh);
        if self.pending.is_empty() && !rest.is_empty() {
            match self.write(rest) {
                Ok(count) => {
                    self.heard = self.heard.wrapping_add(count as u32);
                    rest = rest.get(count..).unwrap_or_default();
                }
                Err(_) => return Fate::Reset,
            }
        }
        if memory == Memory::Ample {
            self.heard = self.heard.wrapping_add(rest.len() as u32);
            self.pending.extend(rest);
        } else {
            whole &= rest.is_empty();
        }
        if heard.has(flag::FIN) && whole {
            self.guest_ended = true;
            self.heard = self.heard.wrapping_add(1);
            return self.flush();
        }
        Fate::Lives
    }

    /// Gives bytes to the socket; how many it takes.
    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let Some(socket) = &self.socket else {
            return Ok(0);
        };
        loop {
            match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(0),
                other => return other,
            }
        }
    }

    /// Gives the host what the guest sent, as far as it takes it.
    fn flush(&mut self) -> Fate {
        loop {
            let (first, _) = self.pending.as_slices();
            if first.is_empty() {
                break;
            }
            match self.write(first) {
                Ok(0) => return Fate::Lives,
                Ok(count) => {
                    self.pending.drain(..count);
                    self.owes_ack = true;
                }
                Err(_) => return Fate::Reset,
            }
        }
        self.pending.shrink_to_fit();
        if self.guest_ended && !self.told_host {
            self.told_host = true;
            self.owes_ack = true;
            if let Some(socket) = &self.socket {
                // It fails if the peer is gone, which shows when it is read from.
                let _ = rustix::net::shutdown(socket, Shutdown::Write);
            }
        }
        self.fate()
    }

    fn fate(&self) -> Fate {
        // Once the guest has our last acknowledgement there is nothing left.
        if self.fin_heard && self.told_host && !self.owes_ack {
            Fate::Over
        } else {
            Fate::Lives
        }
    }

    /// The next segment for the guest.
    pub fn next(
        &mut self,
        key: &Key,
        ends: &Ends,
        mtu: u16,
        memory: Memory,
        pool: &mut Pool,
    ) -> Next {
        match self.phase {
            Phase::Opening | Phase::Connecting => return Next::Nothing,
            Phase::SynReceived | Phase::SynSent if self.syn_sent => return Next::Nothing,
            Phase::SynReceived | Phase::SynSent => {
                self.syn_sent = true;
                return Next::Frame(self.syn(key, ends, mtu, pool));
            }
            Phase::Open => {}
        }
        match self.bytes(key, ends, mtu, memory, pool) {
            Next::Nothing => {}
            other => return other,
        }
        let numbers_left = self.fin_at.is_some_and(|at| at == self.next);
        let all_sent = self.host_ended && self.fin_at.is_none();
        if numbers_left || all_sent {
            let segment = self.header(key, flag::FIN | flag::ACK, memory);
            self.fin_at = Some(self.next);
            self.sent(1);
            return Next::Frame(wire::tcp_control(pool, ends, &segment));
        }
        if self.owes_ack {
            let segment = self.header(key, flag::ACK, memory);
            return Next::Frame(wire::tcp_control(pool, ends, &segment));
        }
        match self.fate() {
            Fate::Lives => Next::Nothing,
            fate => Next::Fate(fate),
        }
    }

    fn syn(&mut self, key: &Key, ends: &Ends, mtu: u16, pool: &mut Pool) -> Frame {
        let headers = ends.headers() - packet::ETHERNET_HEADER + TCP_HEADER;
        let [high, low] = mtu.saturating_sub(headers as u16).to_be_bytes();
        let answers = self.phase == Phase::SynReceived;
        // Only who was offered scaling may scale.
        let scaled = [2, 4, high, low, 1, 3, 3, SHIFT];
        let options = if answers && self.shift.is_none() {
            scaled.get(..4)
        } else {
            scaled.get(..)
        };
        let segment = Segment {
            from: key.remote.port(),
            to: key.guest.port(),
            seq: self.una,
            ack: if answers { self.heard } else { 0 },
            flags: if answers {
                flag::SYN | flag::ACK
            } else {
                flag::SYN
            },
            window: u16::MAX,
            options: options.unwrap_or_default(),
            mss: u16::MAX,
        };
        self.next = self.una.wrapping_add(1);
        wire::tcp_control(pool, ends, &segment)
    }

    /// The fields of a segment that goes now; it acknowledges what the host has taken.
    fn header(&mut self, key: &Key, flags: u8, memory: Memory) -> Segment<'static> {
        let owed = u32::from(self.guest_ended && !self.told_host) + self.pending.len() as u32;
        let ack = self.heard.wrapping_sub(owed);
        let window = match (self.shift, memory) {
            (None, Memory::Ample) => u32::from(u16::MAX),
            (Some(_), Memory::Ample) => WINDOW,
            _ => WINDOW_SCARCE,
        };
        let shift = self.shift.map_or(0, |_| SHIFT);
        let field = (window >> shift).min(u32::from(u16::MAX));
        let edge = ack.wrapping_add(field << shift);
        // A window never shrinks (RFC 9293 section 3.8.6).
        let field = if before(edge, self.edge) {
            (self.edge.wrapping_sub(ack) >> shift).min(u32::from(u16::MAX))
        } else {
            self.edge = edge;
            field
        };
        self.owes_ack = false;
        Segment {
            from: key.remote.port(),
            to: key.guest.port(),
            seq: self.next,
            ack,
            flags,
            window: field as u16,
            options: &[],
            mss: self.mss,
        }
    }

    fn sent(&mut self, count: u32) {
        self.next = self.next.wrapping_add(count);
        if before(self.top, self.next) {
            self.top = self.next;
        }
        self.probe = false;
    }

    /// The next segment with data.
    fn bytes(&mut self, key: &Key, ends: &Ends, mtu: u16, memory: Memory, pool: &mut Pool) -> Next {
        if self.fin_at.is_some_and(|at| !before(self.next, at)) {
            return Next::Nothing;
        }
        let flight = self.next.wrapping_sub(self.una);
        let flight_max = match memory {
            Memory::Ample => FLIGHT_MAX,
            Memory::Scarce | Memory::Exhausted => FLIGHT_SCARCE,
        };
        let window = self.window.min(flight_max).max(u32::from(self.probe));
        let room = window.saturating_sub(flight) as usize;
        let again = self.resend.len().saturating_sub(flight as usize);
        if room == 0 || (again == 0 && (!self.readable || self.host_ended)) {
            return Next::Nothing;
        }
        // Without looking, all that is under way is kept here.
        if again == 0 && !self.peeks && memory == Memory::Exhausted {
            return Next::Fate(Fate::Reset);
        }
        let mss = usize::from(
            self.mss
                .min(mtu.saturating_sub(40 + TCP_HEADER as u16))
                .max(1),
        );
        self.mss = mss as u16;
        let whole = PAYLOAD_MAX / mss * mss;
        let most = room.min(if whole == 0 { PAYLOAD_MAX } else { whole });
        let at = ends.headers() + TCP_HEADER;
        let mut frame = pool.frame(at + most);
        let space = frame.bytes_mut().get_mut(at..).unwrap_or_default();
        let count = if again > 0 {
            let count = again.min(most);
            let bytes = self.resend.iter().skip(flight as usize).take(count);
            for (to, from) in space.iter_mut().zip(bytes) {
                *to = *from;
            }
            count
        } else {
            match self.read(space) {
                Ok(Some(count)) => count,
                Ok(None) => {
                    pool.put(frame);
                    return Next::Nothing;
                }
                Err(_) => {
                    pool.put(frame);
                    return Next::Fate(Fate::Reset);
                }
            }
        };
        let flags = if count < most {
            flag::ACK | flag::PSH
        } else {
            flag::ACK
        };
        let segment = self.header(key, flags, memory);
        wire::tcp(&mut frame, ends, &segment, count);
        self.sent(count as u32);
        Next::Frame(frame)
    }

    /// Looks at the socket's next bytes; none if there are none now.
    fn read(&mut self, space: &mut [u8]) -> Result<Option<usize>, Errno> {
        let Some(socket) = &self.socket else {
            return Ok(None);
        };
        let how = if self.peeks {
            RecvFlags::PEEK | RecvFlags::DONTWAIT
        } else {
            RecvFlags::DONTWAIT
        };
        loop {
            match rustix::net::recv(socket, &mut *space, how) {
                Ok((0, _)) => {
                    self.host_ended = true;
                    return Ok(None);
                }
                Ok((count, _)) => {
                    if !self.peeks {
                        self.resend.extend(space.iter().take(count));
                    }
                    return Ok(Some(count));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The segment that tells the guest that there is no such connection (any more).
    pub fn reset(&mut self, key: &Key, ends: &Ends, pool: &mut Pool) -> Frame {
        let segment = Segment {
            flags: flag::RST | flag::ACK,
            window: 0,
            ..self.header(key, 0, Memory::Ample)
        };
        wire::tcp_control(pool, ends, &segment)
    }

    /// Whether there is something that the guest's window keeps back.
    fn waits_for_window(&self) -> bool {
        self.window == 0 && (self.readable || !self.resend.is_empty())
    }

    /// How long may pass until [`Tcp::expired`] is to be called if nothing happens.
    pub fn patience(&self) -> Duration {
        match self.phase {
            Phase::Opening => OPENING,
            Phase::Connecting => CONNECTING,
            Phase::SynReceived | Phase::SynSent => SYN_RETRY * (1 << self.tries.min(SYN_TRIES)),
            Phase::Open if self.next != self.una => RETRY * (1 << self.tries.min(TRIES)),
            Phase::Open if self.waits_for_window() => RETRY * (1 << self.tries.min(TRIES)),
            Phase::Open if self.guest_ended || self.fin_heard => IDLE_HALF_CLOSED,
            Phase::Open => IDLE,
        }
    }

    /// Nothing has happened for too long.
    pub fn expired(&mut self, memory: Memory) -> Fate {
        self.tries += 1;
        match self.phase {
            Phase::Opening | Phase::Connecting => Fate::Reset,
            Phase::SynReceived | Phase::SynSent => {
                self.syn_sent = false;
                if self.tries > SYN_TRIES {
                    Fate::Aborted
                } else {
                    Fate::Lives
                }
            }
            Phase::Open if self.tries > TRIES => Fate::Reset,
            Phase::Open if self.next != self.una => {
                self.probe = self.window == 0;
                self.rewind(memory)
            }
            Phase::Open if self.waits_for_window() => {
                self.probe = true;
                Fate::Lives
            }
            Phase::Open => Fate::Reset,
        }
    }
}
