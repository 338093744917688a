//! All streams of a vsock device and the Unix sockets they end in.
//!
//! Sockets are watched edge-triggered: each event is noted in its stream, which then goes on until
//! it would block, so nothing has to be armed again and nothing spins while the guest is slow.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::connection::{BUFFER_BYTES, Connection, Ports};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};

/// Resets owed to the guest for packets of no connection. While there are as many, no packets are
/// taken from the guest: it must first take some.
const RESETS_MAX: usize = 256;
/// Bytes of the line by which a host program says where it wants to go.
const LINE_BYTES_MAX: usize = 32;
/// Ports given to host programs that connect count up from here.
const HOST_PORT_FIRST: u32 = 1 << 30;
/// Events taken at a time.
const EVENTS_MAX: usize = 64;

const LISTENER: u64 = 0;

/// A stream by the number under which its socket is watched.
type Token = u64;

enum Stream {
    /// A host program that has connected and not yet said where to.
    Arriving {
        socket: UnixStream,
        line: Vec<u8>,
    },
    Connected(Connection),
}

/// Connects a guest's program to what the host has at a port.
pub type Dial = dyn FnMut(u32) -> io::Result<UnixStream> + Send;

/// The host's side of a device: where programs of the host arrive, and how those of the guest leave.
pub struct VsockHost {
    listener: UnixListener,
    dial: Box<Dial>,
    /// Removed in the end.
    path: Option<PathBuf>,
}

impl VsockHost {
    /// Listens at `path`, which must not exist and is removed in the end; port P of the host is the Unix socket whose
    /// path has `_P` appended.
    ///
    /// # Errors
    /// If no socket can be made there.
    pub fn at(path: &Path) -> io::Result<VsockHost> {
        let base = path.to_owned();
        let dial = move |port| {
            let mut path = OsString::from(&base);
            path.push(format!("_{port}"));
            Ok(connect_unix(Path::new(&path))?)
        };
        Ok(VsockHost {
            listener: UnixListener::bind(path)?,
            dial: Box::new(dial),
            path: Some(path.to_owned()),
        })
    }

    /// Listens on a socket that somebody else made, and leaves connecting to `dial`.
    pub fn on(
        listener: UnixListener,
        dial: impl FnMut(u32) -> io::Result<UnixStream> + Send + 'static,
    ) -> VsockHost {
        VsockHost {
            listener,
            dial: Box::new(dial),
            path: None,
        }
    }
}

impl Drop for VsockHost {
    fn drop(&mut self) {
        // Nobody listens there any more; if the file is gone already, all the better.
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// All streams of a device.
pub struct Hub {
    guest_cid: u64,
    /// Streams at a time, those that are being set up included.
    streams_max: usize,
    host: VsockHost,
    epoll: OwnedFd,
    /// By age, so that which of them gives way is the same in every run.
    streams: BTreeMap<Token, Stream>,
    by_ports: HashMap<Ports, Token>,
    /// Connections with something for the guest, in the order of their turns.
    ready: VecDeque<Token>,
    resets: VecDeque<Header>,
    next_token: Token,
    next_port: u32,
}

impl Hub {
    /// Between a guest and this host.
    pub fn new(host: VsockHost, guest_cid: u64, streams_max: usize) -> io::Result<Hub> {
        host.listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &host.listener, EventData::new_u64(LISTENER), flags)?;
        Ok(Hub {
            guest_cid,
            streams_max,
            host,
            epoll,
            streams: BTreeMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: LISTENER + 1,
            next_port: HOST_PORT_FIRST,
        })
    }

    /// A descriptor that is readable when [`Hub::poll`] has something to do.
    pub fn ready_fd(&self) -> io::Result<OwnedFd> {
        self.epoll.try_clone()
    }

    /// Forgets every connection; host programs see theirs closed. Arrivals stay.
    pub fn reset(&mut self) {
        self.streams
            .retain(|_, stream| matches!(stream, Stream::Arriving { .. }));
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// Handles events of the host's sockets, a bounded number.
    pub fn poll(&mut self) {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS_MAX);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&now)).is_err() {
            return;
        }
        for event in &events {
            match event.data.u64() {
                LISTENER => self.accept(),
                token => self.socket_event(token, event.flags),
            }
        }
    }

    fn accept(&mut self) {
        loop {
            match self.host.listener.accept() {
                // Beyond the limit a program sees its connection closed.
                Ok((socket, _)) => {
                    if self.has_room() && socket.set_nonblocking(true).is_ok() {
                        let line = Vec::new();
                        self.add(|socket| Stream::Arriving { socket, line }, socket);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    }

    /// Whether there may be one more stream. Connections that only wait for the guest's farewell
    /// give way.
    fn has_room(&mut self) -> bool {
        if self.streams.len() < self.streams_max {
            return true;
        }
        let abandoned = self
            .streams
            .iter()
            .find_map(|(token, stream)| match stream {
                Stream::Connected(connection) if connection.abandoned() => Some(*token),
                _ => None,
            });
        abandoned.inspect(|token| self.remove(*token)).is_some()
    }

    /// Watches a socket and keeps what `make` makes of it.
    fn add(
        &mut self,
        make: impl FnOnce(UnixStream) -> Stream,
        socket: UnixStream,
    ) -> Option<Token> {
        let token = self.next_token;
        self.next_token += 1;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &socket, EventData::new_u64(token), flags).ok()?;
        self.streams.insert(token, make(socket));
        Some(token)
    }

    fn remove(&mut self, token: Token) {
        if let Some(Stream::Connected(connection)) = self.streams.remove(&token) {
            let ports = connection.ports();
            // The ports may belong to a younger connection, if this one was draining.
            if self.by_ports.get(&ports) == Some(&token) {
                self.by_ports.remove(&ports);
            }
        }
    }

    fn socket_event(&mut self, token: Token, flags: EventFlags) {
        if let Some(Stream::Arriving { socket, line }) = self.streams.get_mut(&token) {
            match read_line(socket, line) {
                Line::Partial => return,
                Line::Port(port) => self.connect_to_guest(token, port),
                Line::Bad => return self.remove(token),
            }
        }
        if let Some(Stream::Connected(connection)) = self.streams.get_mut(&token) {
            connection.socket_ready(flags.intersects(EventFlags::HUP | EventFlags::ERR));
            self.settle(token);
        }
    }

    /// A host program said which port of the guest it wants.
    fn connect_to_guest(&mut self, token: Token, guest: u32) {
        let Some(Stream::Arriving { socket, .. }) = self.streams.remove(&token) else {
            return;
        };
        // There are fewer streams than ports, so this ends.
        let ports = loop {
            let ports = Ports {
                host: self.next_port,
                guest,
            };
            self.next_port = self.next_port.checked_add(1).unwrap_or(HOST_PORT_FIRST);
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        let connection = Connection::from_host(ports, self.guest_cid, socket);
        self.streams.insert(token, Stream::Connected(connection));
        self.by_ports.insert(ports, token);
    }

    /// Notes what a connection wants after something happened to it.
    fn settle(&mut self, token: Token) {
        let Some(Stream::Connected(connection)) = self.streams.get_mut(&token) else {
            return;
        };
        if connection.ended() {
            return self.remove(token);
        }
        if !connection.queued && connection.has_packet() {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }

    /// Whether packets can be taken from the guest now.
    pub fn accepts_packets(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// A packet came from the guest.
    pub fn receive(&mut self, header: &Header, data: &[u8]) {
        // Not from the guest or not for us: nobody to answer.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        if header.socket_type != TYPE_STREAM {
            return self.refuse(header);
        }
        match self.by_ports.get(&ports).copied() {
            Some(token) => {
                if let Some(Stream::Connected(connection)) = self.streams.get_mut(&token) {
                    connection.receive(header, data);
                    if header.op == op::RESET {
                        self.by_ports.remove(&ports);
                    }
                }
                self.settle(token);
            }
            None => match header.op {
                op::REQUEST => self.connect_to_host(header, ports),
                op::RESET => {}
                _ => self.refuse(header),
            },
        }
    }

    /// The guest wants a port of the host: a Unix socket named after ours and the port.
    fn connect_to_host(&mut self, request: &Header, ports: Ports) {
        let dialled = match self.has_room() {
            true => (self.host.dial)(ports.host),
            false => return self.refuse(request),
        };
        let watched = dialled.and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
        let Ok(socket) = watched else {
            return self.refuse(request);
        };
        let make = |socket| Stream::Connected(Connection::from_guest(ports, request, socket));
        match self.add(make, socket) {
            Some(token) => {
                self.by_ports.insert(ports, token);
                self.settle(token);
            }
            None => self.refuse(request),
        }
    }

    /// Answers a packet of no connection.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RESET {
            self.resets.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                len: 0,
                socket_type: header.socket_type,
                op: op::RESET,
                flags: 0,
                buf_alloc: BUFFER_BYTES,
                fwd_cnt: 0,
            });
        }
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, its data in the front of `buffer`. Connections take turns.
    pub fn next_packet(&mut self, buffer: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(Stream::Connected(connection)) = self.streams.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            let packet = connection.next_packet(buffer);
            if packet.as_ref().is_some_and(|packet| packet.op == op::RESET) {
                let ports = connection.ports();
                self.by_ports.remove(&ports);
            }
            self.settle(token);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }
}

fn connect_unix(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

enum Line {
    /// Not complete yet.
    Partial,
    /// The guest's port.
    Port(u32),
    /// Not what it should be, or the socket is closed.
    Bad,
}

/// Reads on in the line `CONNECT <port>`. Byte by byte, because what follows the line is data.
fn read_line(socket: &UnixStream, line: &mut Vec<u8>) -> Line {
    loop {
        let mut byte = [0];
        match rustix::io::read(socket, &mut byte) {
            Ok(1) if byte == *b"\n" => return parse_line(line),
            Ok(1) if line.len() < LINE_BYTES_MAX => line.extend(byte),
            Err(Errno::AGAIN) => return Line::Partial,
            Err(Errno::INTR) => {}
            _ => return Line::Bad,
        }
    }
}

fn parse_line(line: &[u8]) -> Line {
    let port = std::str::from_utf8(line)
        .ok()
        .and_then(|line| line.strip_prefix("CONNECT "))
        .and_then(|port| port.trim_end().parse().ok());
    port.map_or(Line::Bad, Line::Port)
}
