//! Tests of the socket device: a guest made of the fake driver, host programs made of Unix sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::connection::BUFFER_BYTES;
use super::packet::{HOST_CID, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::virtio::testutil::{Driver, Token, wait_until};

const CID: u64 = 3;
const ROOM: u32 = 64 << 10;
const LIMIT: usize = 100;

/// A guest's socket layer, with one receive buffer outstanding at a time.
struct Guest {
    driver: Driver,
    dir: TempDir,
    waiting: Option<Token>,
    /// Size of receive buffers.
    room: u32,
}

fn guest() -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let device =
        Vsock::with_limit(CID, VsockHost::at(&dir.path().join("v")).unwrap(), LIMIT).unwrap();
    let mut driver = Driver::new(device);
    driver.start(0);
    Guest {
        driver,
        dir,
        waiting: None,
        room: 4096,
    }
}

impl Guest {
    /// Sends a packet with these fields and ample credit.
    fn send(&mut self, fields: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..fields
        };
        assert!(self.try_send(header, data));
    }

    /// Sends a packet as it is; false if the device does not take it now.
    fn try_send(&mut self, header: Header, data: &[u8]) -> bool {
        let token = self
            .driver
            .submit(FROM_GUEST, &[&header.to_bytes(), data], &[]);
        self.driver.used(FROM_GUEST, token).is_some()
    }

    /// The next packet, if there is one now.
    fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let room = self.room;
        let token = match self.waiting {
            Some(token) => token,
            None => self.driver.submit(TO_GUEST, &[], &[44, room]),
        };
        self.waiting = Some(token);
        let used = self.driver.used(TO_GUEST, token)?;
        self.waiting = None;
        let (header, data) = used.bytes.split_at(HEADER_BYTES);
        let header = Header::from_bytes(header.try_into().unwrap());
        assert_eq!(header.len as usize, data.len());
        Some((header, data.to_vec()))
    }

    #[track_caller]
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut packet = None;
        wait_until(|| {
            packet = self.try_receive();
            packet.is_some()
        });
        packet.unwrap()
    }

    /// The next packet, which must be of this kind.
    #[track_caller]
    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.receive();
        assert_eq!(packet.0.op, op, "{:?}", packet.0);
        assert_eq!((packet.0.src_cid, packet.0.dst_cid), (HOST_CID, CID));
        packet
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.try_receive(), None);
    }

    /// Receives data up to this many bytes.
    #[track_caller]
    fn receive_data(&mut self, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            data.extend(self.expect(op::DATA).1);
        }
        data
    }

    fn connect(&self, line: &str) -> UnixStream {
        let mut socket = UnixStream::connect(self.dir.path().join("v")).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        socket.write_all(line.as_bytes()).unwrap();
        socket
    }

    /// A connection that a host program made to this port, and the header for answers.
    fn connected(&mut self, port: u32) -> (UnixStream, Header) {
        let mut socket = self.connect(&format!("CONNECT {port}\n"));
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        let reply = reply(&request);
        self.send(
            Header {
                op: op::RESPONSE,
                ..reply
            },
            b"",
        );
        let ok = format!("OK {}\n", request.src_port);
        let mut line = vec![0; ok.len()];
        socket.read_exact(&mut line).unwrap();
        assert_eq!(line, ok.as_bytes());
        (socket, reply)
    }

    /// A connection that the guest made to a host program at this port.
    fn connected_to_host(&mut self, port: u32) -> (UnixStream, Header) {
        let listener = self.listen(port);
        let fields = from_guest(port, 1000);
        self.send(
            Header {
                op: op::REQUEST,
                ..fields
            },
            b"",
        );
        let (socket, _) = listener.accept().unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        self.expect(op::RESPONSE);
        (socket, fields)
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }
}

fn from_guest(host_port: u32, guest_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        socket_type: TYPE_STREAM,
        buf_alloc: ROOM,
        ..Header::default()
    }
}

fn reply(header: &Header) -> Header {
    from_guest(header.src_port, header.dst_port)
}

fn data(fields: Header) -> Header {
    Header {
        op: op::DATA,
        ..fields
    }
}

fn read_all(mut socket: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_host_reaches_a_port_of_the_guest() {
    let mut guest = guest();
    assert_eq!(guest.driver.config(0, 8), CID.to_le_bytes());
    let (mut socket, fields) = guest.connected(1024);
    socket.write_all(b"question").unwrap();
    assert_eq!(guest.expect(op::DATA).1, b"question");
    guest.send(data(fields), b"answer");
    let mut answer = [0; 6];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn bytes_behind_the_line_are_kept() {
    let mut guest = guest();
    let _socket = guest.connect("CONNECT 5\nearly");
    let (request, _) = guest.expect(op::REQUEST);
    guest.expect_nothing();
    guest.send(
        Header {
            op: op::RESPONSE,
            ..reply(&request)
        },
        b"",
    );
    assert_eq!(guest.expect(op::DATA).1, b"early");
}

#[test]
fn the_guest_reaches_a_port_of_the_host() {
    let mut guest = guest();
    let (mut socket, fields) = guest.connected_to_host(52);
    guest.send(data(fields), b"hello");
    let mut hello = [0; 5];
    socket.read_exact(&mut hello).unwrap();
    socket.write_all(b"welcome").unwrap();
    assert_eq!(guest.expect(op::DATA).1, b"welcome");
}

#[test]
fn a_port_without_a_listener_is_refused() {
    let mut guest = guest();
    guest.send(
        Header {
            op: op::REQUEST,
            ..from_guest(99, 1000)
        },
        b"",
    );
    let (reset, _) = guest.expect(op::RESET);
    assert_eq!((reset.src_port, reset.dst_port), (99, 1000));
}

#[test]
fn a_guest_without_a_listener_closes_the_socket() {
    let mut guest = guest();
    let socket = guest.connect("CONNECT 1024\n");
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(
        Header {
            op: op::RESET,
            ..reply(&request)
        },
        b"",
    );
    assert_eq!(read_all(&socket), b"");
}

#[test]
fn lines_that_are_wrong_close_the_socket() {
    let mut guest = guest();
    for line in [
        "HELLO\n",
        "CONNECT \n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "CONNECT 1 2\n",
    ] {
        assert_eq!(read_all(&guest.connect(line)), b"", "{line}");
    }
    let mut long = guest.connect("");
    // The device may hang up before all is written.
    let _ = long.write_all(&[b'1'; 100]);
    let mut bytes = Vec::new();
    let _ = long.read_to_end(&mut bytes);
    assert_eq!(bytes, b"");
    guest.expect_nothing();
    let (_socket, _) = guest.connected(7);
}

#[test]
fn connections_before_there_is_a_driver_wait() {
    let mut guest = guest();
    guest.driver.reset();
    guest.waiting = None;
    let _socket = guest.connect("CONNECT 1024\n");
    std::thread::sleep(Duration::from_millis(30));
    guest.driver.start(0);
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 1024);
}

#[test]
fn each_side_can_end_its_direction() {
    let mut guest = guest();
    let (socket, fields) = guest.connected(1);
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    guest.send(data(fields), b"still");
    guest.send(
        Header {
            op: op::SHUTDOWN,
            flags: SHUTDOWN_SEND,
            ..fields
        },
        b"",
    );
    assert_eq!(read_all(&socket), b"still");
    // Nothing can flow any more.
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_BOTH);
    guest.send(
        Header {
            op: op::RESET,
            ..fields
        },
        b"",
    );

    let (socket, fields) = guest.connected(2);
    guest.send(
        Header {
            op: op::SHUTDOWN,
            flags: SHUTDOWN_SEND,
            ..fields
        },
        b"",
    );
    assert_eq!(read_all(&socket), b"");
    (&socket).write_all(b"answer").unwrap();
    assert_eq!(guest.expect(op::DATA).1, b"answer");
    drop(socket);
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_host_that_leaves_is_told_after_its_bytes() {
    let mut guest = guest();
    let (mut socket, fields) = guest.connected(1);
    socket.write_all(b"last words").unwrap();
    drop(socket);
    assert_eq!(guest.expect(op::DATA).1, b"last words");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_BOTH);
    // Data on their way are lost without harm; the guest's farewell ends it.
    guest.send(data(fields), b"too late");
    guest.expect_nothing();
    guest.send(
        Header {
            op: op::RESET,
            ..fields
        },
        b"",
    );
    guest.send(data(fields), b"far too late");
    guest.expect(op::RESET);
}

#[test]
fn a_guest_that_leaves_gets_its_bytes_delivered() {
    let mut guest = guest();
    let (socket, fields) = guest.connected(1);
    let much = vec![7; BUFFER_BYTES as usize];
    // More than the Unix socket takes at once, then as much again as the device buffers.
    let mut sent = 0;
    for part in much.chunks(ROOM as usize) {
        guest.send(data(fields), part);
        sent += part.len();
    }
    guest.send(
        Header {
            op: op::SHUTDOWN,
            flags: SHUTDOWN_BOTH,
            ..fields
        },
        b"",
    );
    assert_eq!(read_all(&socket).len(), sent);
    loop {
        match guest.receive().0.op {
            op::CREDIT_UPDATE => {}
            other => break assert_eq!(other, op::RESET),
        }
    }
}

#[test]
fn bytes_are_delivered_after_a_reset_by_the_guest() {
    let mut guest = guest();
    let (socket, fields) = guest.connected(1);
    let mut sent = 0;
    // Fills the Unix socket, so that something is left in the device.
    for _ in 0..BUFFER_BYTES / 4096 {
        guest.send(data(fields), &[7; 4096]);
        sent += 4096;
    }
    for _ in 0..200 {
        let Some((update, _)) = guest.try_receive() else {
            continue;
        };
        assert_eq!(update.op, op::CREDIT_UPDATE);
    }
    guest.send(
        Header {
            op: op::RESET,
            ..fields
        },
        b"",
    );
    assert_eq!(read_all(&socket).len(), sent);
}

#[test]
fn a_guest_that_stops_receiving_is_not_sent_to() {
    let mut guest = guest();
    let (mut socket, fields) = guest.connected(1);
    guest.send(
        Header {
            op: op::SHUTDOWN,
            flags: SHUTDOWN_RECEIVE,
            ..fields
        },
        b"",
    );
    assert!(socket.write_all(b"x").is_err());
    guest.send(data(fields), b"fine");
    let mut fine = [0; 4];
    socket.read_exact(&mut fine).unwrap();
    drop(socket);
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_host_that_gives_up_before_the_answer_is_forgotten() {
    let mut guest = guest();
    drop(guest.connect("CONNECT 1\n"));
    // Either the guest never hears of it, or it hears both.
    let mut packets = Vec::new();
    wait_until(|| {
        packets.extend(guest.try_receive().map(|(header, _)| header));
        packets.last().is_some_and(|header| header.op == op::RESET)
    });
    let request = packets[0];
    guest.send(
        Header {
            op: op::RESPONSE,
            ..reply(&request)
        },
        b"",
    );
    guest.expect(op::RESET);
}

#[test]
fn the_guests_credit_is_kept() {
    let mut guest = guest();
    let socket = guest.connect("CONNECT 1\n");
    let (request, _) = guest.expect(op::REQUEST);
    let fields = Header {
        buf_alloc: 1000,
        ..reply(&request)
    };
    guest.send(
        Header {
            op: op::RESPONSE,
            ..fields
        },
        b"",
    );
    (&socket).write_all(&[1; 5000]).unwrap();
    assert_eq!(guest.expect(op::DATA).1.len(), 1000);
    guest.expect(op::CREDIT_REQUEST);
    guest.expect_nothing();
    guest.send(
        Header {
            op: op::CREDIT_UPDATE,
            fwd_cnt: 600,
            ..fields
        },
        b"",
    );
    assert_eq!(guest.expect(op::DATA).1.len(), 600);
    guest.expect(op::CREDIT_REQUEST);
    // A claim that cannot be: more taken than was sent.
    guest.send(
        Header {
            op: op::CREDIT_UPDATE,
            fwd_cnt: 5000,
            ..fields
        },
        b"",
    );
    guest.expect_nothing();
    guest.send(
        Header {
            op: op::CREDIT_UPDATE,
            fwd_cnt: 1600,
            buf_alloc: 100_000,
            ..fields
        },
        b"",
    );
    assert_eq!(guest.receive_data(3400).len(), 3400);
}

#[test]
fn a_guest_that_exceeds_its_credit_is_reset() {
    let mut guest = guest();
    let (socket, fields) = guest.connected(1);
    let mut outcome = None;
    for _ in 0..64 {
        guest.send(data(fields), &[7; 16 << 10]);
        if let Some((header, _)) = guest.try_receive()
            && header.op != op::CREDIT_UPDATE
        {
            outcome = Some(header.op);
            break;
        }
    }
    assert_eq!(outcome, Some(op::RESET));
    // What fitted is still there for the host.
    assert!(read_all(&socket).len() >= BUFFER_BYTES as usize);
}

#[test]
fn credit_requests_are_answered() {
    let mut guest = guest();
    let (mut socket, fields) = guest.connected(1);
    guest.send(data(fields), &[7; 100]);
    guest.send(
        Header {
            op: op::CREDIT_REQUEST,
            ..fields
        },
        b"",
    );
    let (update, _) = guest.expect(op::CREDIT_UPDATE);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUFFER_BYTES, 100));
    socket.read_exact(&mut [0; 100]).unwrap();
}

/// Bytes whose order can be checked.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

#[test]
fn much_flows_both_ways_at_once() {
    const BYTES: usize = 3 << 20;
    let mut guest = guest();
    guest.room = 16 << 10;
    let (socket, fields) = guest.connected(1);
    let host = std::thread::spawn(move || {
        let writer = socket.try_clone().unwrap();
        let writing = std::thread::spawn(move || {
            (&writer).write_all(&pattern(BYTES)).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let received = read_all(&socket);
        writing.join().unwrap();
        received
    });
    let outgoing = pattern(BYTES);
    let (mut sent, mut received, mut ended) = (0, Vec::new(), false);
    // The device's credit: what it can hold, and what it has passed on.
    let mut forwarded = 0;
    wait_until(|| {
        let room = (BUFFER_BYTES as usize).saturating_sub(sent - forwarded);
        let len = room.min(BYTES - sent).min(10_000);
        let fields = Header {
            fwd_cnt: received.len() as u32,
            ..fields
        };
        if len > 0 {
            guest.send(data(fields), &outgoing[sent..sent + len]);
            sent += len;
            if sent == BYTES {
                guest.send(
                    Header {
                        op: op::SHUTDOWN,
                        flags: SHUTDOWN_SEND,
                        ..fields
                    },
                    b"",
                );
            }
        }
        while let Some((header, data)) = guest.try_receive() {
            forwarded = header.fwd_cnt as usize;
            match header.op {
                op::DATA => received.extend(data),
                op::SHUTDOWN => ended = true,
                op::CREDIT_UPDATE => {}
                op::CREDIT_REQUEST => {
                    let fields = Header {
                        fwd_cnt: received.len() as u32,
                        ..fields
                    };
                    guest.send(
                        Header {
                            op: op::CREDIT_UPDATE,
                            ..fields
                        },
                        b"",
                    );
                }
                other => panic!("unexpected packet {other}"),
            }
        }
        ended && sent == BYTES
    });
    assert!(received == outgoing);
    assert!(host.join().unwrap() == outgoing);
}

#[test]
fn many_connections_at_once() {
    const COUNT: u32 = LIMIT as u32;
    let mut guest = guest();
    let mut sockets = Vec::new();
    for port in 0..COUNT {
        sockets.push(guest.connected(port));
    }
    for (socket, _) in &sockets {
        (&*socket).write_all(b"ping").unwrap();
    }
    let mut seen = std::collections::HashSet::new();
    for _ in 0..COUNT {
        let (header, bytes) = guest.expect(op::DATA);
        assert_eq!(bytes, b"ping");
        assert!(seen.insert(header.dst_port));
    }
    for (socket, fields) in &sockets {
        guest.send(data(*fields), &fields.src_port.to_le_bytes());
        let mut bytes = [0; 4];
        (&*socket).read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, fields.src_port.to_le_bytes());
    }
}

#[test]
fn streams_are_limited_in_number() {
    let mut guest = guest();
    let listener = guest.listen(5);
    let mut sockets = Vec::new();
    let mut refused = 0;
    for port in 0..LIMIT as u32 + 3 {
        guest.send(
            Header {
                op: op::REQUEST,
                ..from_guest(5, port)
            },
            b"",
        );
        match guest.receive().0.op {
            op::RESPONSE => sockets.push(listener.accept().unwrap().0),
            op::RESET => refused += 1,
            other => panic!("unexpected packet {other}"),
        }
    }
    assert_eq!((sockets.len(), refused), (LIMIT, 3));
    // A connection whose host is gone gives way.
    sockets.pop();
    guest.expect(op::SHUTDOWN);
    guest.send(
        Header {
            op: op::REQUEST,
            ..from_guest(5, 9999)
        },
        b"",
    );
    guest.expect(op::RESPONSE);
}

#[test]
fn resets_owed_are_limited_in_number() {
    let mut guest = guest();
    let stray = data(from_guest(1, 1));
    let mut taken = 0;
    let mut stopped = None;
    while stopped.is_none() {
        let header = stray.to_bytes();
        let token = guest.driver.submit(FROM_GUEST, &[&header], &[]);
        match guest.driver.used(FROM_GUEST, token) {
            Some(_) => taken += 1,
            None => stopped = Some(token),
        }
        assert!(taken < 1000);
    }
    // Once the guest takes resets, its packets are taken again.
    for _ in 0..taken {
        guest.expect(op::RESET);
    }
    assert!(guest.driver.used(FROM_GUEST, stopped.unwrap()).is_some());
}

#[test]
fn packets_that_are_wrong_do_no_harm() {
    let mut guest = guest();
    let (mut socket, fields) = guest.connected(1);
    // Too short, longer than they are, from or to somebody else: nobody to answer.
    guest.driver.request(FROM_GUEST, &[b"short"], &[]);
    assert!(guest.try_send(
        Header {
            len: 100,
            ..data(fields)
        },
        b"less"
    ));
    assert!(guest.try_send(
        Header {
            len: u32::MAX,
            ..data(fields)
        },
        b"less"
    ));
    guest.send(
        Header {
            src_cid: 77,
            ..data(fields)
        },
        b"x",
    );
    guest.send(
        Header {
            dst_cid: 77,
            ..data(fields)
        },
        b"x",
    );
    guest.expect_nothing();
    // Not a stream, or of no connection.
    guest.send(
        Header {
            socket_type: 2,
            ..data(fields)
        },
        b"x",
    );
    assert_eq!(guest.expect(op::RESET).0.socket_type, 2);
    guest.send(
        Header {
            op: 77,
            ..from_guest(8, 8)
        },
        b"",
    );
    guest.expect(op::RESET);
    guest.send(
        Header {
            op: op::RESET,
            ..from_guest(8, 8)
        },
        b"",
    );
    guest.expect_nothing();
    guest.send(data(fields), b"still here");
    socket.read_exact(&mut [0; 10]).unwrap();
    // Nonsense on a connection ends it.
    guest.send(
        Header {
            op: op::REQUEST,
            ..fields
        },
        b"",
    );
    guest.expect(op::RESET);
    assert_eq!(read_all(&socket), b"");
}

#[test]
fn a_reset_of_the_device_closes_connections() {
    let mut guest = guest();
    let (socket, _) = guest.connected(1);
    guest.driver.reset();
    guest.waiting = None;
    assert_eq!(read_all(&socket), b"");
    guest.driver.start(0);
    guest.connected(2);
}

#[test]
fn a_restored_guest_is_told_that_connections_are_gone() {
    let mut before = guest();
    let (_socket, _) = before.connected(1);
    let event = before.driver.submit(EVENT, &[], &[4]);
    let mut after = guest();
    before.driver.move_to(&mut after.driver);
    let used = after.driver.used(EVENT, event).unwrap();
    assert_eq!(used.bytes, EVENT_TRANSPORT_RESET.to_le_bytes());
    after.connected(2);
}

#[test]
fn the_socket_is_made_and_removed() {
    let guest = guest();
    let path = guest.dir.path().join("v");
    assert!(path.exists());
    let error = Vsock::new(CID, &path).err().unwrap();
    assert!(matches!(error, VsockError::Listen { .. }));
    drop(guest.driver);
    assert!(!path.exists());
    for cid in [0, 2, 1 << 32] {
        assert!(matches!(
            Vsock::new(cid, &path),
            Err(VsockError::GuestCid(_))
        ));
    }
}

/// What a hostile guest may try on two connections, one of them made by the host.
fn hostile_packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let fields = (
        prop_oneof![Just(5_u32), Just(1 << 30), any::<u32>()],
        prop_oneof![Just(1000_u32), Just(1024), any::<u32>()],
        0..9_u16,
        0..4_u32,
        any::<u32>(),
        any::<u32>(),
        prop_oneof![3 => Just(None), 1 => any::<u32>().prop_map(Some)],
        prop::collection::vec(any::<u8>(), 0..3000),
    );
    fields.prop_map(|(host, guest, op, flags, buf_alloc, fwd_cnt, len, data)| {
        let len = len.unwrap_or(data.len() as u32);
        let header = from_guest(host, guest);
        (
            Header {
                op,
                flags,
                buf_alloc,
                fwd_cnt,
                len,
                ..header
            },
            data,
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever the guest sends, the device lives, and works for a new connection.
    #[test]
    fn hostile_packets_are_survived(packets in prop::collection::vec(hostile_packet(), 1..60)) {
        let mut guest = guest();
        let listener = guest.listen(5);
        listener.set_nonblocking(true).unwrap();
        let _socket = guest.connect("CONNECT 1024\nsome data");
        let mut host = Vec::new();
        for (header, data) in packets {
            prop_assert!(guest.try_send(header, &data));
            while guest.try_receive().is_some() {}
            host.extend(listener.accept().ok());
            if let Some((socket, _)) = host.last_mut() {
                let _ = socket.write(&[1; 100]);
            }
            prop_assert!(guest.driver.core().fault().is_none());
        }
        drop(host);
        guest.driver.reset();
        guest.waiting = None;
        guest.driver.start(0);
        wait_until(|| {
            let socket = guest.connect("CONNECT 7\n");
            let mut found = false;
            wait_until(|| {
                found = guest.try_receive().is_some_and(|(h, _)| h.op == op::REQUEST && h.dst_port == 7);
                found
            });
            drop(socket);
            found
        });
    }
}
