//! Datagrams between the guest and a connected socket of the host: a UDP flow, or ICMP echo through a ping socket.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::flow::Key;
use super::wire::{self, ECHO_HEADER, Ends, UDP_HEADER};
use crate::frame::Frame;
use crate::packet::{self, protocol};
use crate::pool::Pool;

/// What waits for the socket, or for the guest before there was one, at most: datagrams, and their bytes.
const WAITING_MAX: usize = 8;
const WAITING_BYTES_MAX: usize = 64 << 10;
/// The largest payload of UDP over IPv4 (RFC 768).
const PAYLOAD_MAX: usize = 65_535 - 20 - UDP_HEADER;
/// How long a flow lives that nobody has answered, and one that was (RFC 4787 section 4.3 asks for two minutes).
const UNANSWERED: Duration = Duration::from_secs(30);
const ANSWERED: Duration = Duration::from_secs(180);
/// A resolver's time to answer. Clients ask again after five seconds (resolv.conf(5)), then of another one.
const QUESTION: Duration = Duration::from_millis(4500);
/// The longest answer of a resolver.
const ANSWER_MAX: usize = 65_535;

/// A flow of datagrams.
#[derive(Debug, Default)]
pub struct Datagrams {
    socket: Option<OwnedFd>,
    waiting: Vec<Vec<u8>>,
    readable: bool,
    /// Something came back.
    pub answered: bool,
    /// What the peer sent before there was a socket for it.
    first: VecDeque<Vec<u8>>,
}

impl Datagrams {
    /// A peer of the host has sent `first`, and here is the socket for it.
    pub fn by_host(socket: OwnedFd, first: Vec<u8>) -> Datagrams {
        Datagrams {
            socket: Some(socket),
            first: VecDeque::from([first]),
            readable: true,
            ..Datagrams::default()
        }
    }

    /// The peer has sent another datagram before it saw the socket for it.
    pub fn also(&mut self, payload: Vec<u8>) {
        let bytes: usize = self.first.iter().map(Vec::len).sum();
        if self.first.len() < WAITING_MAX && bytes + payload.len() <= WAITING_BYTES_MAX {
            self.first.push_back(payload);
        }
    }

    /// Bytes of ours that it holds.
    pub fn memory(&self) -> usize {
        let waiting = self.waiting.iter().chain(&self.first);
        waiting.map(Vec::len).sum()
    }

    /// Its socket, once the host has given it.
    pub fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    /// The host has given a connected socket.
    pub fn opened(&mut self, socket: OwnedFd) {
        self.socket = Some(socket);
        for payload in std::mem::take(&mut self.waiting) {
            self.send(&payload, false);
        }
    }

    /// Sends a datagram of the guest, if the host takes it now. Without a socket it waits, if it may.
    pub fn send(&mut self, payload: &[u8], may_wait: bool) {
        let Some(socket) = &self.socket else {
            let bytes: usize = self.waiting.iter().map(Vec::len).sum();
            if may_wait
                && self.waiting.len() < WAITING_MAX
                && bytes + payload.len() <= WAITING_BYTES_MAX
            {
                self.waiting.push(payload.to_vec());
            }
            return;
        };
        // An error of an earlier datagram is told by the first try.
        for _ in 0..2 {
            match rustix::net::send(socket, payload, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::CONNREFUSED | Errno::INTR) => self.readable = true,
                _ => return,
            }
        }
    }

    /// Something happened at the socket.
    pub fn ready(&mut self, events: EventFlags) {
        if events.intersects(EventFlags::IN | EventFlags::ERR | EventFlags::HUP) {
            self.readable = true;
        }
    }

    /// The next packet for the guest.
    pub fn next(&mut self, key: &Key, ends: &Ends, pool: &mut Pool) -> Option<Frame> {
        let header = match key.protocol {
            protocol::UDP => UDP_HEADER,
            _ => 0,
        };
        let at = ends.headers() + header;
        if let Some(first) = self.first.pop_front() {
            let mut frame = pool.frame(at + first.len());
            packet::put(frame.bytes_mut(), at, &first);
            return finish(frame, key, ends, first.len());
        }
        while self.readable {
            let socket = self.socket.as_ref()?;
            let mut frame = pool.frame(at + PAYLOAD_MAX);
            let space = frame.bytes_mut().get_mut(at..).unwrap_or_default();
            match rustix::net::recv(socket, space, RecvFlags::DONTWAIT) {
                Ok((count, _)) => {
                    self.answered = true;
                    if let Some(frame) = finish(frame, key, ends, count) {
                        return Some(frame);
                    }
                }
                Err(error) => {
                    pool.put(frame);
                    match error {
                        Errno::CONNREFUSED if key.protocol == protocol::UDP => {
                            let (from, to) = (key.remote.port(), key.guest.port());
                            return Some(wire::port_unreachable(pool, ends, from, to));
                        }
                        Errno::INTR => {}
                        // Errors of the way there are told once each, and then there is no more.
                        Errno::AGAIN => self.readable = false,
                        Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::CONNREFUSED => {}
                        _ => self.readable = false,
                    }
                }
            }
        }
        None
    }

    /// A resolver's answer, if it has come; an error if none will.
    pub fn resolved(&mut self) -> Result<Option<Vec<u8>>, Errno> {
        let Some(socket) = &self.socket else {
            return Ok(None);
        };
        let mut message = vec![0; ANSWER_MAX];
        match rustix::net::recv(socket, message.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((count, _)) => {
                message.truncate(count);
                Ok(Some(message))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How long the flow lives from now on if nothing happens.
    pub fn patience(&self, key: &Key) -> Duration {
        match (key.protocol, self.answered) {
            (0, _) => QUESTION,
            (_, true) => ANSWERED,
            (_, false) => UNANSWERED,
        }
    }
}

/// Headers around `len` bytes from the host.
fn finish(mut frame: Frame, key: &Key, ends: &Ends, len: usize) -> Option<Frame> {
    if key.protocol == protocol::UDP {
        wire::udp(&mut frame, ends, key.remote.port(), key.guest.port(), len);
        return Some(frame);
    }
    // A ping socket gives the whole message, with an identifier of the host's.
    let at = ends.headers();
    let kind = *frame.bytes().get(at)?;
    if len < ECHO_HEADER || !matches!(kind, 0 | 129) {
        return None;
    }
    packet::put_u16(frame.bytes_mut(), at + 4, key.guest.port());
    wire::icmp(&mut frame, ends, len);
    Some(frame)
}
