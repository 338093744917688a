//! One stream between a socket of the guest and a Unix socket of the host.
//!
//! ```text
//!   host connects ──▶ Requested ──RESPONSE──▶ Open ──RST either way──▶ Ended
//!   guest connects ─────────────────────────▶  │                        ▲
//!                                              └─ RST from the guest,   │ all written
//!                                                 bytes left for the    │
//!                                                 host ──▶ Draining ────┘
//! ```
//!
//! Each direction ends by itself: the guest's by SHUTDOWN, the host's by the end of the Unix socket.
//! When the host's end is gone altogether both are shut down and the guest answers with RST. Flow is
//! controlled by credit (virtio 1.2, 5.10.6.3): each side says how much it can buffer and how much it
//! has passed on, modulo 2^32. A guest that sends more than it was allowed is reset.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::packet::{
    HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};

/// Bytes buffered for the host per connection at most: the credit given to the guest.
pub const BUFFER_BYTES: u32 = 128 << 10;

/// The two ports that name a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Requested,
    Open,
    Draining,
    Ended,
}

/// Packets that are owed to the guest: one of each kind is enough.
#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    reset: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

impl Owed {
    fn any(&self) -> bool {
        self.request
            || self.response
            || self.reset
            || self.shutdown
            || self.credit_update
            || self.credit_request
    }
}

/// One stream.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    guest_cid: u64,
    /// None once the host's end is gone.
    socket: Option<UnixStream>,
    phase: Phase,
    owed: Owed,
    /// Whether the hub has it in its list of those with something for the guest.
    pub queued: bool,

    /// Bytes from the guest that the socket has not taken.
    to_host: VecDeque<u8>,
    /// Bytes from the guest passed on, ever.
    forwarded: u32,
    /// `forwarded` as last told to the guest.
    announced: u32,

    /// The socket may have something to read.
    readable: bool,
    /// The host closed its end completely.
    hung_up: bool,
    /// Bytes sent to the guest, ever.
    sent: u32,
    /// The guest's credit fields.
    guest_buffer: u32,
    guest_forwarded: u32,
    /// We asked for credit and have not been given any.
    credit_requested: bool,

    /// What the guest will no longer do.
    guest_shutdown: u32,
    /// What we told the guest, or will, that the host no longer does.
    host_shutdown: u32,
}

impl Connection {
    fn new(ports: Ports, guest_cid: u64, socket: UnixStream, phase: Phase) -> Connection {
        Connection {
            ports,
            guest_cid,
            socket: Some(socket),
            phase,
            owed: Owed::default(),
            queued: false,
            to_host: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            readable: true,
            hung_up: false,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            credit_requested: false,
            guest_shutdown: 0,
            host_shutdown: 0,
        }
    }

    /// The host asks for a connection. `socket` does not block.
    pub fn from_host(ports: Ports, guest_cid: u64, socket: UnixStream) -> Connection {
        let mut connection = Connection::new(ports, guest_cid, socket, Phase::Requested);
        connection.owed.request = true;
        connection
    }

    /// The guest asked for a connection, and `socket`, which does not block, is the other end.
    pub fn from_guest(ports: Ports, request: &Header, socket: UnixStream) -> Connection {
        let mut connection = Connection::new(ports, request.src_cid, socket, Phase::Open);
        connection.owed.response = true;
        connection.take_credit(request);
        connection
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether nothing is left to do.
    pub fn ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Whether the host's end is gone and only the guest's farewell is awaited.
    pub fn abandoned(&self) -> bool {
        self.socket.is_none()
    }

    /// A packet of this connection came from the guest; `data` are its bytes.
    pub fn receive(&mut self, header: &Header, data: &[u8]) {
        if self.owed.reset && header.op != op::RESET {
            return;
        }
        self.take_credit(header);
        match (header.op, self.phase) {
            (op::RESPONSE, Phase::Requested) => self.accepted(),
            (op::RESET, _) => self.end(),
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, _) => self.owed.credit_update = true,
            (op::SHUTDOWN, Phase::Open) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
                    self.shutdown_socket(Shutdown::Read);
                }
                self.after_write();
            }
            (op::DATA, Phase::Open) if self.guest_shutdown & SHUTDOWN_SEND == 0 => {
                self.receive_data(data);
            }
            _ => self.reset(),
        }
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// The guest took the connection: the host is told by the line it waits for.
    fn accepted(&mut self) {
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.ports.host);
        // Nothing was sent on this socket before, so a short write means that it is broken.
        if self.write_socket(line.as_bytes()) != Ok(line.len()) {
            self.reset();
        }
    }

    fn receive_data(&mut self, data: &[u8]) {
        if self.to_host.len() + data.len() > BUFFER_BYTES as usize {
            return self.reset();
        }
        let mut rest = data;
        if self.to_host.is_empty() {
            match self.write_socket(rest) {
                Ok(written) => {
                    self.forwarded = self.forwarded.wrapping_add(written as u32);
                    rest = rest.get(written..).unwrap_or_default();
                }
                Err(_) => {
                    self.forwarded = self.forwarded.wrapping_add(rest.len() as u32);
                    return self.host_stopped_reading();
                }
            }
        }
        self.to_host.extend(rest);
        self.after_write();
    }

    /// Writes what the socket takes now. Without a socket everything is taken and lost.
    fn write_socket(&self, data: &[u8]) -> Result<usize, Errno> {
        let Some(socket) = &self.socket else {
            return Ok(data.len());
        };
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            match send(socket, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => done += sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// The socket has events: it can be read or written, or (`hung_up`) its other end is closed.
    pub fn socket_ready(&mut self, hung_up: bool) {
        self.readable = true;
        self.flush();
        if hung_up && !self.hung_up {
            self.hung_up = true;
            if self.phase == Phase::Requested {
                return self.reset();
            }
            // Bytes that the host left behind are still delivered; the end of them tells the rest.
            if self.host_shutdown & SHUTDOWN_SEND != 0
                || self.guest_shutdown & SHUTDOWN_RECEIVE != 0
            {
                self.host_left();
            }
        }
    }

    fn flush(&mut self) {
        while !self.to_host.is_empty() {
            match self.write_socket(self.to_host.as_slices().0) {
                Ok(0) => break,
                Ok(written) => {
                    self.to_host.drain(..written);
                    self.forwarded = self.forwarded.wrapping_add(written as u32);
                }
                Err(_) => return self.host_stopped_reading(),
            }
        }
        self.after_write();
    }

    /// What follows from bytes having been passed on, or from there being none to pass on.
    fn after_write(&mut self) {
        // The guest must hear of room once it believes that half of the buffer is full.
        let taken = self.forwarded.wrapping_sub(self.announced);
        let outstanding = taken.saturating_add(self.to_host.len() as u32);
        if outstanding > BUFFER_BYTES / 2 && self.forwarded != self.announced {
            self.owed.credit_update = true;
        }
        if !self.to_host.is_empty() {
            return;
        }
        if self.phase == Phase::Draining {
            self.phase = Phase::Ended;
        } else if self.guest_shutdown == SHUTDOWN_BOTH {
            self.reset();
        } else if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            self.shutdown_socket(Shutdown::Write);
        }
    }

    fn shutdown_socket(&self, how: Shutdown) {
        if let Some(socket) = &self.socket {
            // It fails only if the other end is gone, which the socket's events tell.
            let _ = socket.shutdown(how);
        }
    }

    /// The host takes no more bytes: those that wait are lost.
    fn host_stopped_reading(&mut self) {
        self.forwarded = self.forwarded.wrapping_add(self.to_host.len() as u32);
        self.to_host.clear();
        self.tell_shutdown(SHUTDOWN_RECEIVE);
        self.after_write();
    }

    /// The host's end is gone.
    fn host_left(&mut self) {
        self.socket = None;
        self.readable = false;
        self.host_stopped_reading();
        self.tell_shutdown(SHUTDOWN_BOTH);
    }

    fn tell_shutdown(&mut self, what: u32) {
        if self.phase == Phase::Open && self.host_shutdown | what != self.host_shutdown {
            self.host_shutdown |= what;
            self.owed.shutdown = true;
        }
    }

    /// Breaks the connection off: the guest gets an RST and nothing after it.
    fn reset(&mut self) {
        if matches!(self.phase, Phase::Requested | Phase::Open) {
            self.owed = Owed {
                reset: true,
                ..Owed::default()
            };
            self.readable = false;
            if self.to_host.is_empty() {
                self.socket = None;
            }
        }
    }

    /// The guest's end is gone. What it had sent before is still delivered.
    fn end(&mut self) {
        self.owed = Owed::default();
        self.readable = false;
        let left = !self.to_host.is_empty() && self.socket.is_some();
        self.phase = if left { Phase::Draining } else { Phase::Ended };
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        // A guest that claims to have taken more than it was sent gets nothing.
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(in_flight)
    }

    fn may_read(&self) -> bool {
        self.readable
            && self.phase == Phase::Open
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            && self.host_shutdown & SHUTDOWN_SEND == 0
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&mut self) -> bool {
        if self.may_read() && self.credit() == 0 && !self.credit_requested {
            self.credit_requested = true;
            self.owed.credit_request = true;
        }
        self.owed.any() || (self.may_read() && self.credit() > 0)
    }

    /// The next packet for the guest, its data in the front of `buffer`.
    pub fn next_packet(&mut self, buffer: &mut [u8]) -> Option<Header> {
        if std::mem::take(&mut self.owed.reset) {
            let reset = self.header(op::RESET);
            self.end();
            return Some(reset);
        }
        if std::mem::take(&mut self.owed.request) {
            return Some(self.header(op::REQUEST));
        }
        if std::mem::take(&mut self.owed.response) {
            return Some(self.header(op::RESPONSE));
        }
        if let Some(data) = self.read_socket(buffer) {
            return Some(data);
        }
        if std::mem::take(&mut self.owed.shutdown) {
            return Some(Header {
                flags: self.host_shutdown,
                ..self.header(op::SHUTDOWN)
            });
        }
        if std::mem::take(&mut self.owed.credit_request) {
            return Some(self.header(op::CREDIT_REQUEST));
        }
        if self.owed.credit_update {
            return Some(self.header(op::CREDIT_UPDATE));
        }
        None
    }

    /// Reads what the guest has room for.
    fn read_socket(&mut self, buffer: &mut [u8]) -> Option<Header> {
        let room = buffer.len().min(self.credit() as usize);
        if !self.may_read() || room == 0 {
            return None;
        }
        let socket = self.socket.as_ref()?;
        loop {
            match rustix::io::read(socket, buffer.get_mut(..room).unwrap_or_default()) {
                Ok(0) => {
                    self.readable = false;
                    // The end may be seen before the event that says whether it is the end of both
                    // directions.
                    if self.hung_up || is_hung_up(socket) {
                        self.host_left();
                    }
                    self.tell_shutdown(SHUTDOWN_SEND);
                    return None;
                }
                Ok(len) => {
                    self.sent = self.sent.wrapping_add(len as u32);
                    return Some(Header {
                        len: len as u32,
                        ..self.header(op::DATA)
                    });
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    return None;
                }
                Err(_) => {
                    self.host_left();
                    return None;
                }
            }
        }
    }

    /// A header to the guest. Every one carries our credit fields.
    fn header(&mut self, op: u16) -> Header {
        self.announced = self.forwarded;
        self.owed.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: 0,
            socket_type: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded,
        }
    }
}

/// Whether nothing can flow through a socket any more.
fn is_hung_up(socket: &UnixStream) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let polled = poll(&mut fds, Some(&now));
    polled.is_ok()
        && fds
            .iter()
            .any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}
