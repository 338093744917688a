//! Tests of the NAT: a guest made of single segments on one side, sockets of this host on the other.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::guest::checksum_is_right;
use super::*;
use crate::gateway::{Gateway, GatewayConfig};
use crate::nat::wire::TCP_HEADER;

const GUEST: Mac = smoltcp::wire::EthernetAddress([2, 0, 0, 0, 0, 2]);
const GATEWAY: Mac = smoltcp::wire::EthernetAddress([2, 0, 0, 0, 0, 1]);

/// Connects to a port of the loopback, whatever address is asked for.
struct Loopback {
    answers: VecDeque<Answer>,
    incoming: Receiver<Answer>,
    bell: OwnedFd,
    refuses: bool,
    peeks: bool,
}

impl Host for Loopback {
    fn ask(&mut self, flow: u64, wish: Wish) -> bool {
        let at = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let socket: Option<OwnedFd> = match wish {
            _ if self.refuses => None,
            Wish::Tcp(to) => TcpStream::connect(at(to.port())).ok().map(Into::into),
            Wish::Udp(to) => UdpSocket::bind(at(0))
                .and_then(|socket| socket.connect(at(to.port())).map(|()| socket.into()))
                .ok(),
            _ => None,
        };
        let socket = socket.map(|socket| (socket, self.peeks));
        self.answers.push_back(Answer::Socket { flow, socket });
        rustix::io::write(&self.bell, &1_u64.to_ne_bytes()).is_ok()
    }

    fn answer(&mut self) -> Option<Answer> {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        self.answers
            .pop_front()
            .or_else(|| self.incoming.try_recv().ok())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

struct Rig {
    nat: Nat,
    pool: Pool,
    origin: Instant,
    /// Time that is skipped.
    ahead: Duration,
    incoming: Sender<Answer>,
}

fn rig(flows_max: usize, refuses: bool) -> Rig {
    rig_with(flows_max, refuses, false)
}

/// With `peeks` and without `SO_PEEK_OFF`, a second look sees the same bytes again.
fn rig_with(flows_max: usize, refuses: bool, peeks: bool) -> Rig {
    let (incoming, receiver) = channel();
    let host = Loopback {
        answers: VecDeque::new(),
        incoming: receiver,
        bell: eventfd(0, EventfdFlags::NONBLOCK).unwrap(),
        refuses,
        peeks,
    };
    let config = NatConfig {
        mac: GATEWAY,
        gateway4: Ipv4Addr::new(10, 0, 0, 1),
        gateway6: "fd00::1".parse().unwrap(),
        guest_mac: GUEST,
        guest4: Ipv4Addr::new(10, 0, 0, 2),
        mtu: 1500,
        flows_max,
        memory_max: 1 << 20,
    };
    Rig {
        nat: Nat::new(config, Box::new(host)).unwrap(),
        pool: Pool::new(16),
        origin: Instant::now(),
        ahead: Duration::ZERO,
        incoming,
    }
}

/// A frame of the guest to 192.0.2.9.
fn from_guest(kind: u8, build: impl FnOnce(&mut Frame, &Ends)) -> Frame {
    let ends = Ends {
        from_mac: GUEST,
        to_mac: GATEWAY,
        from: Ipv4Addr::new(10, 0, 0, 2).into(),
        to: Ipv4Addr::new(192, 0, 2, 9).into(),
    };
    let mut frame = Pool::new(0).frame(2000);
    build(&mut frame, &ends);
    assert_eq!(frame.bytes()[23], kind);
    frame
}

/// What the guest hears.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Got {
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    payload: Vec<u8>,
}

impl Rig {
    fn now(&self) -> Time {
        Time::from_nanos((self.origin.elapsed() + self.ahead).as_nanos() as u64)
    }

    fn say(&mut self, frame: Frame) {
        let now = self.now();
        self.nat.deliver(frame, now, &mut self.pool).unwrap();
    }

    fn send(&mut self, port: u16, seq: u32, ack: u32, flags: u8, payload: &[u8]) {
        self.send_with(port, (seq, ack), flags, 60_000, payload);
    }

    fn send_with(&mut self, port: u16, at: (u32, u32), flags: u8, window: u16, payload: &[u8]) {
        let (seq, ack) = at;
        let frame = from_guest(protocol::TCP, |frame, ends| {
            let segment = Segment {
                from: 40_000,
                to: port,
                seq,
                ack,
                flags,
                window,
                options: &[],
                mss: u16::MAX,
            };
            packet::put(frame.bytes_mut(), ends.headers() + TCP_HEADER, payload);
            wire::tcp(frame, ends, &segment, payload.len());
        });
        self.say(frame);
    }

    fn poll(&mut self) -> Option<Frame> {
        let now = self.now();
        self.nat.poll(now, &mut self.pool)
    }

    /// The next frame, waited for.
    #[track_caller]
    fn frame(&mut self) -> Frame {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(frame) = self.poll() {
                return frame;
            }
            assert!(Instant::now() < end, "nothing came");
            let descriptor = self.nat.descriptor();
            let mut fds = [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
            let _ = poll(
                &mut fds,
                Some(&Timespec {
                    tv_sec: 0,
                    tv_nsec: 10_000_000,
                }),
            );
            let now = self.now();
            self.nat.service(now);
        }
    }

    #[track_caller]
    fn heard(&mut self) -> Got {
        let mut frame = self.frame();
        assert!(frame.finish_checksum());
        let Ok(Content::Ip(ip)) = packet::content(frame.bytes()) else {
            panic!("{frame:?}");
        };
        assert!(
            frame.offload.segmentation.is_some()
                || checksum_is_right(&ip, ip.payload(frame.bytes()))
        );
        let (_, _, heard) = Heard::parse(ip.payload(frame.bytes())).unwrap();
        Got {
            seq: heard.seq,
            ack: heard.ack,
            flags: heard.flags,
            window: heard.window,
            payload: heard.payload.to_vec(),
        }
    }

    /// A connection to `port`: our number, the guest's next, and the host's end.
    #[track_caller]
    fn connect(&mut self, listener: &TcpListener) -> (u32, TcpStream) {
        let port = listener.local_addr().unwrap().port();
        self.send(port, 999, 0, flag::SYN, &[]);
        let answer = self.heard();
        assert_eq!((answer.flags, answer.ack), (flag::SYN | flag::ACK, 1000));
        self.send(port, 1000, answer.seq + 1, flag::ACK, &[]);
        (answer.seq.wrapping_add(1), listener.accept().unwrap().0)
    }
}

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn a_connection_from_its_first_segment_to_its_last() {
    let mut rig = rig(8, false);
    let (listener, port) = listener();
    let (seq, mut peer) = rig.connect(&listener);
    rig.send(port, 1000, seq, flag::ACK | flag::PSH, b"hello");
    assert_eq!(rig.heard().ack, 1005);
    let mut bytes = [0; 5];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");

    peer.write_all(b"world").unwrap();
    let got = rig.heard();
    assert_eq!(
        (got.seq, got.ack, &got.payload[..]),
        (seq, 1005, &b"world"[..])
    );
    rig.send(port, 1005, seq + 5, flag::ACK, &[]);

    // The guest has said all; the peer has not.
    rig.send(port, 1005, seq + 5, flag::ACK | flag::FIN, &[]);
    assert_eq!(rig.heard().ack, 1006);
    assert_eq!(peer.read(&mut bytes).unwrap(), 0);
    peer.write_all(b"!").unwrap();
    assert_eq!(rig.heard().payload, b"!");
    rig.send(port, 1006, seq + 6, flag::ACK, &[]);
    drop(peer);
    let end = rig.heard();
    assert_eq!((end.seq, end.flags), (seq + 6, flag::FIN | flag::ACK));
    rig.send(port, 1006, seq + 7, flag::ACK, &[]);
    assert!(rig.poll().is_none());
    assert_eq!(rig.nat.counters().flows, 0);
}

#[test]
fn a_refused_connection_is_reset() {
    let mut rig = rig(8, true);
    rig.send(9, 50, 0, flag::SYN, &[]);
    let answer = rig.heard();
    assert_eq!((answer.flags, answer.ack), (flag::RST | flag::ACK, 51));
    assert_eq!(rig.nat.counters().flows, 0);
    // So is what belongs to no connection.
    rig.send(9, 50, 77, flag::ACK, b"x");
    let answer = rig.heard();
    assert_eq!((answer.flags, answer.seq), (flag::RST, 77));
}

#[test]
fn nothing_is_acknowledged_that_the_host_has_not_taken() {
    let mut rig = rig(8, false);
    let (listener, port) = listener();
    let (seq, mut peer) = rig.connect(&listener);
    // The peer does not read: sooner or later the host takes no more.
    let piece = [7; 1400];
    let (mut sent, mut acked, mut edge) = (1000_u32, 1000_u32, 1000 + 65_535);
    let mut stalls = 0;
    while stalls < 3 {
        let before = acked;
        while edge - sent >= 1400 {
            rig.send(port, sent, seq, flag::ACK, &piece);
            sent += 1400;
        }
        while let Some(frame) = rig.poll() {
            let Ok(Content::Ip(ip)) = packet::content(frame.bytes()) else {
                panic!()
            };
            let (_, _, heard) = Heard::parse(ip.payload(frame.bytes())).unwrap();
            (acked, edge) = (heard.ack, heard.ack + u32::from(heard.window));
        }
        stalls = if acked == before { stalls + 1 } else { 0 };
    }
    assert!(acked < sent, "some waits here");
    peer.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut taken = vec![0; (acked - 1000) as usize];
    peer.read_exact(&mut taken).unwrap();
    // What was sent and not acknowledged arrives when there is room.
    while acked < sent {
        acked = rig.heard().ack;
        let _ = peer.set_nonblocking(true);
        let _ = peer.read(&mut vec![0; 1 << 20]);
    }
    assert_eq!(acked, sent);
}

#[test]
fn what_may_not_be_kept_is_left_to_be_sent_again() {
    const TOTAL: usize = 8 << 20;
    let mut rig = rig(8, false);
    rig.nat.config.memory_max = 10_000;
    let (listener, port) = listener();
    let (seq, mut peer) = rig.connect(&listener);
    peer.set_nonblocking(true).unwrap();
    let bytes: Vec<u8> = (0..TOTAL).map(|at| (at % 251) as u8).collect();
    let (mut sent, mut acked, mut edge) = (0, 0, 65_535);
    let (mut taken, mut room) = (0, vec![0; 256 << 10]);
    let (mut again, mut kept) = (0, 0);
    while taken < TOTAL {
        let before = acked;
        while sent < TOTAL && edge - sent >= 1400 {
            let piece = &bytes[sent..TOTAL.min(sent + 1400)];
            rig.send(port, 1000 + sent as u32, seq, flag::ACK, piece);
            sent += piece.len();
            kept = kept.max(rig.nat.memory);
        }
        while let Some(frame) = rig.poll() {
            let Ok(Content::Ip(ip)) = packet::content(frame.bytes()) else {
                panic!()
            };
            let (_, _, heard) = Heard::parse(ip.payload(frame.bytes())).unwrap();
            acked = heard.ack as usize - 1000;
            edge = acked + usize::from(heard.window);
        }
        if acked > before {
            continue;
        }
        // The host takes no more: the peer reads, and what was left is sent again.
        while let Ok(count @ 1..) = peer.read(&mut room) {
            assert_eq!(room[..count], bytes[taken..taken + count]);
            taken += count;
        }
        again += usize::from(sent > acked);
        sent = acked;
        let now = rig.now();
        rig.nat.service(now);
    }
    assert!(again > 0 && kept > 10_000 && kept <= 20_000, "{kept}");
    assert_eq!(rig.nat.memory, 0);
}

#[test]
fn a_connection_that_there_is_no_memory_for_is_reset() {
    for peeks in [false, true] {
        let mut rig = rig_with(8, false, peeks);
        let (listener, port) = listener();
        let (seq, mut peer) = rig.connect(&listener);
        if peeks {
            // Looking keeps nothing, sending again would.
            peer.write_all(b"once").unwrap();
            assert_eq!(rig.heard().payload, b"once");
        }
        rig.nat.config.memory_max = 10_000;
        rig.nat.memory += 20_001;
        if peeks {
            rig.ahead += Duration::from_secs(1);
        } else {
            peer.write_all(b"once").unwrap();
        }
        let end = rig.heard();
        assert_eq!(end.flags, flag::RST | flag::ACK);
        assert_eq!(end.seq, seq + 4 * u32::from(peeks));
        assert_eq!((rig.nat.counters().flows, rig.nat.memory), (0, 20_001));
        assert!(peer.read(&mut [0; 9]).is_err(), "the peer is reset");
        // Nothing of a datagram is kept, either.
        let wants = from_guest(protocol::UDP, |frame, ends| {
            wire::udp(frame, ends, 5000, port, 3)
        });
        rig.say(wants);
        assert_eq!((rig.nat.counters().flows, rig.nat.memory), (1, 20_001));
    }
}

#[test]
fn what_the_guest_does_not_acknowledge_is_sent_again() {
    let mut rig = rig(8, false);
    let (listener, port) = listener();
    let (seq, mut peer) = rig.connect(&listener);
    peer.write_all(b"once and again").unwrap();
    assert_eq!(rig.heard().payload, b"once and again");
    // By time.
    rig.ahead += Duration::from_secs(1);
    let again = rig.heard();
    assert_eq!(
        (again.seq, &again.payload[..]),
        (seq, &b"once and again"[..])
    );
    // By three repeated acknowledgements.
    rig.send(port, 1000, seq + 4, flag::ACK, &[]);
    for _ in 0..3 {
        rig.send(port, 1000, seq + 4, flag::ACK, &[]);
    }
    let again = rig.heard();
    assert_eq!(
        (again.seq, &again.payload[..]),
        (seq + 4, &b" and again"[..])
    );
    rig.send(port, 1000, seq + 14, flag::ACK, &[]);
    // The end is sent again, too.
    peer.shutdown(Shutdown::Write).unwrap();
    for _ in 0..2 {
        let end = rig.heard();
        assert_eq!((end.seq, end.flags), (seq + 14, flag::FIN | flag::ACK));
        rig.ahead += Duration::from_secs(20);
    }
}

#[test]
fn the_guests_window_is_kept() {
    let mut rig = rig(8, false);
    let (listener, port) = listener();
    let (seq, mut peer) = rig.connect(&listener);
    let bytes: Vec<u8> = (0..200_000_u32).map(|at| at as u8).collect();
    std::thread::spawn(move || peer.write_all(&bytes).map(|()| peer));
    let mut got = Vec::new();
    while got.len() < 200_000 {
        let piece = rig.heard();
        assert_eq!(piece.seq, seq + got.len() as u32);
        got.extend(piece.payload);
        if got.len().is_multiple_of(60_000) || got.len() == 200_000 {
            assert!(
                rig.poll().is_none() || got.len() == 200_000,
                "the window is full"
            );
            rig.send(port, 1000, seq + got.len() as u32, flag::ACK, &[]);
        }
    }
    assert!(got.iter().enumerate().all(|(at, byte)| *byte == at as u8));
}

#[test]
fn a_closed_window_is_tried_as_long_as_the_guest_answers() {
    let mut rig = rig(8, false);
    let (listener, port) = listener();
    let (seq, mut peer) = rig.connect(&listener);
    let closed = |rig: &mut Rig| rig.send_with(port, (1000, seq), flag::ACK, 0, &[]);
    closed(&mut rig);
    peer.write_all(b"patience").unwrap();
    let mut pauses = Vec::new();
    let from = rig.ahead;
    while rig.ahead - from < Duration::from_secs(3600) {
        let before = rig.ahead;
        while rig.poll().is_none() {
            let now = rig.now();
            rig.nat.service(now);
            rig.ahead += Duration::from_millis(250);
        }
        pauses.push(rig.ahead - before);
        assert_eq!(rig.nat.counters().flows, 1, "{pauses:?}");
        closed(&mut rig);
    }
    let longest = pauses.iter().max().unwrap();
    assert!(
        pauses.len() < 60 && *longest < Duration::from_secs(300),
        "{pauses:?}"
    );
    // The byte that was tried is the first one again, at once.
    rig.send(port, 1000, seq, flag::ACK, &[]);
    let got = rig.heard();
    assert_eq!((got.seq, &got.payload[..1]), (seq, &b"p"[..]));
    // A guest that does not even answer is given up.
    for _ in 0..40 {
        rig.ahead += Duration::from_secs(300);
        while rig.poll().is_some() {}
    }
    assert_eq!(rig.nat.counters().flows, 0);
}

#[test]
fn segments_out_of_order_and_twice_change_nothing() {
    let mut rig = rig(8, false);
    let (listener, port) = listener();
    let (seq, mut peer) = rig.connect(&listener);
    rig.send(port, 1003, seq, flag::ACK, b"def");
    assert_eq!(rig.heard().ack, 1000);
    rig.send(port, 1000, seq, flag::ACK, b"abc");
    rig.send(port, 1000, seq, flag::ACK, b"abc");
    rig.send(port, 1001, seq, flag::ACK, b"bcdef");
    assert_eq!(rig.heard().ack, 1006);
    let mut bytes = [0; 6];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abcdef");
    // A reset outside of the window is nobody's.
    rig.send(port, 1, 0, flag::RST, &[]);
    assert_eq!(rig.nat.counters().flows, 1);
    rig.send(port, 1006, 0, flag::RST, &[]);
    assert_eq!(rig.nat.counters().flows, 0);
    assert!(peer.read(&mut bytes).is_err(), "the peer is reset");
}

#[test]
fn a_peer_of_the_host_connects() {
    let mut rig = rig(8, false);
    let (listener, _) = listener();
    let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, from) = listener.accept().unwrap();
    let connection = Answer::Connection {
        socket: socket.into(),
        peeks: false,
        peer: from,
        port: 80,
    };
    rig.incoming.send(connection).unwrap();
    rig.nat.answers(Time::ZERO);
    let frame = rig.frame();
    let Ok(Content::Ip(ip)) = packet::content(frame.bytes()) else {
        panic!()
    };
    // A peer on the host is the gateway to the guest.
    assert_eq!(ip.source, IpAddr::from([10, 0, 0, 1]));
    assert_eq!(ip.destination, IpAddr::from([10, 0, 0, 2]));
    let (port, to, syn) = Heard::parse(ip.payload(frame.bytes())).unwrap();
    assert_eq!((port, to, syn.flags), (from.port(), 80, flag::SYN));
    let answer = from_guest(protocol::TCP, |frame, ends| {
        let ends = Ends {
            to: Ipv4Addr::new(10, 0, 0, 1).into(),
            ..*ends
        };
        let segment = Segment {
            from: 80,
            to: port,
            seq: 5,
            ack: syn.seq + 1,
            flags: flag::SYN | flag::ACK,
            window: 1000,
            options: &[],
            mss: u16::MAX,
        };
        wire::tcp(frame, &ends, &segment, 0);
    });
    rig.say(answer);
    let ack = rig.heard();
    assert_eq!((ack.flags, ack.ack, ack.seq), (flag::ACK, 6, syn.seq + 1));
    peer.write_all(b"hi").unwrap();
    assert_eq!(rig.heard().payload, b"hi");
    // A guest that falls silent is given up, and the peer hears of it.
    for _ in 0..20 {
        rig.ahead += Duration::from_secs(600);
        while rig.poll().is_some() {}
    }
    assert_eq!(rig.nat.counters().flows, 0);
    assert!(peer.read(&mut [0; 9]).is_err());
}

#[test]
fn datagrams_and_their_time() {
    let mut rig = rig(8, false);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let ask = from_guest(protocol::UDP, |frame, ends| {
        packet::put(frame.bytes_mut(), ends.headers() + 8, b"ask");
        wire::udp(frame, ends, 5000, port, 3);
    });
    rig.say(ask);
    let now = rig.now();
    rig.nat.service(now);
    let mut bytes = [0; 9];
    let (count, from) = server.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"ask");
    server.send_to(b"answer", from).unwrap();
    let mut frame = rig.frame();
    assert!(frame.finish_checksum());
    let Ok(Content::Ip(ip)) = packet::content(frame.bytes()) else {
        panic!()
    };
    let payload = ip.payload(frame.bytes());
    assert!(checksum_is_right(&ip, payload));
    assert_eq!(&payload[8..], b"answer");
    assert_eq!(rig.nat.counters().flows, 1);
    rig.ahead += Duration::from_secs(200);
    assert!(rig.poll().is_none());
    assert_eq!(rig.nat.counters().flows, 0);
}

#[test]
fn flows_are_limited() {
    let mut rig = rig(3, false);
    for port in 1..10 {
        let frame = from_guest(protocol::UDP, |frame, ends| {
            wire::udp(frame, ends, port, 9, 0)
        });
        rig.say(frame);
    }
    let counters = rig.nat.counters();
    assert_eq!((counters.flows, counters.refused_full), (3, 6));
}

#[test]
fn peers_leave_the_guest_half() {
    let mut rig = rig(8, false);
    for port in 1..10 {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let datagram = Answer::Datagram {
            socket: socket.into(),
            peer: SocketAddr::new(Ipv4Addr::new(192, 0, 2, 1).into(), port),
            port: 53,
            payload: vec![1],
        };
        rig.incoming.send(datagram).unwrap();
    }
    rig.nat.answers(Time::ZERO);
    let counters = rig.nat.counters();
    assert_eq!((counters.flows, counters.refused_full), (4, 5));
    for port in 1..10 {
        let frame = from_guest(protocol::UDP, |frame, ends| {
            wire::udp(frame, ends, port, 9, 0)
        });
        rig.say(frame);
    }
    let counters = rig.nat.counters();
    assert_eq!((counters.flows, counters.refused_full), (8, 10));
    // What is over counts no more.
    rig.ahead += Duration::from_secs(200);
    while rig.poll().is_some() {}
    assert_eq!((rig.nat.flows.len(), rig.nat.flows.by_peers()), (0, 0));
}

/// A guest that takes nothing does not stop time, and does not make queues grow.
#[test]
fn a_guest_without_buffers_holds_nothing_up() {
    let mut rig = rig(8, true);
    // The guest opens connections and gives them up before the host has answered.
    for port in 1..1000 {
        rig.send(port, 999, 0, flag::SYN, &[]);
        rig.send(port, 1000, 0, flag::ACK, &[]);
        rig.send(port, 1000, 0, flag::RST, &[]);
        assert_eq!(rig.nat.counters().flows, 0);
        assert!(rig.nat.ready.len() <= flow::QUEUE_MIN + 2);
    }
    rig.send(1, 999, 0, flag::SYN, &[]);
    rig.send(1, 1000, 0, flag::ACK, &[]);
    let config = GatewayConfig {
        mac: GATEWAY,
        ipv4: None,
        dhcp4: None,
        ipv6: None,
        also: vec![],
        domain: String::new(),
        mtu: 1500,
    };
    let now = rig.now();
    let mut router = Router::new(Gateway::new(config, now), rig.nat);
    router.set_open(false);
    assert!(router.poll(now, &mut rig.pool).is_none());
    let deadline = router.next_deadline().unwrap();
    assert!(deadline > now, "there is something, but not now");
    assert!(router.poll(deadline, &mut rig.pool).is_none());
    assert_eq!(router.nat().counters().flows, 0);
    assert!(router.next_deadline().is_none_or(|next| next > deadline));
    // What it is told of that waits until there is room.
    router.set_open(true);
    assert!(router.poll(deadline, &mut rig.pool).is_some());
}

#[test]
fn what_contradicts_itself_is_dropped_and_counted() {
    let mut rig = rig(8, false);
    let mut wrong = from_guest(protocol::UDP, |frame, ends| wire::udp(frame, ends, 1, 9, 4));
    assert!(wrong.finish_checksum());
    wrong.bytes_mut()[43] ^= 1;
    rig.say(wrong);
    let mut fragment = from_guest(protocol::UDP, |frame, ends| wire::udp(frame, ends, 1, 9, 4));
    fragment.bytes_mut()[20] = 0x20;
    rig.say(fragment);
    rig.say(Frame::new(&[0; 20]));
    let counters = rig.nat.counters();
    assert_eq!(
        (counters.checksum, counters.fragments, counters.unknown),
        (1, 1, 1)
    );
    assert_eq!(counters.flows, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn hostile_segments_do_no_harm(
        segments in prop::collection::vec(
            (any::<u8>(), 0..4_u8, any::<u32>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..60), any::<[u8; 2]>()),
            1..40,
        ),
    ) {
        let mut rig = rig(4, false);
        let (listener, port) = listener();
        let (seq, _peer) = rig.connect(&listener);
        for (flags, near, a, b, payload, noise) in segments {
            let (from, ack) = if near > 0 {
                (1000 + (a & 0xff), seq.wrapping_add(b & 7))
            } else {
                (a, b)
            };
            let mut frame = from_guest(protocol::TCP, |frame, ends| {
                let segment = Segment {
                    from: 40_000,
                    to: port,
                    seq: from,
                    ack,
                    flags,
                    window: a as u16,
                    options: &[],
                    mss: u16::MAX,
                };
                packet::put(frame.bytes_mut(), ends.headers() + TCP_HEADER, &payload);
                wire::tcp(frame, ends, &segment, payload.len());
            });
            if near == 3 {
                let len = frame.len();
                frame.bytes_mut()[14 + usize::from(noise[0]) % (len - 14)] = noise[1];
            }
            rig.say(frame);
            let now = rig.now();
            rig.nat.service(now);
            for _ in 0..20 {
                rig.poll();
            }
            rig.ahead += Duration::from_millis(u64::from(noise[0]));
        }
        prop_assert!(rig.nat.counters().flows <= 4);
        prop_assert!(rig.nat.memory <= 4 << 21);
    }
}
