//! Machines without guests on a hub: they join by its socket and exchange frames over rings.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use strata_switch::gateway::dhcp4::Dhcp4Config;
use strata_switch::gateway::{GatewayConfig, reply};
use strata_switch::packet::{self, Mac};
use strata_switch::ring::{Ring, Side};
use strata_switch::vxlan::{Mapping, VxlanConfig};
use strata_switch::{Capabilities, Frame, Pool};

use super::*;

fn listener(path: &Path) -> OwnedFd {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 16).unwrap();
    socket
}

/// A hub on a thread of its own, in a directory of its own.
struct Running {
    _directory: tempfile::TempDir,
    path: PathBuf,
    thread: JoinHandle<()>,
}

fn start(gateway: bool, uplink: Option<Uplink>) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("network");
    let listener = listener(&path);
    let network = "10.9.8.1/24".parse().unwrap();
    let config = NetworkConfig {
        mtu: 1500,
        gateway: gateway.then(|| GatewayConfig {
            mac: Mac::from_bytes(&[2, 0, 0, 0, 0, 1]),
            ipv4: Some(network),
            dhcp4: Some(Dhcp4Config::whole(network)),
            ipv6: None,
            also: vec![],
            domain: "lab".into(),
            mtu: 1500,
        }),
    };
    let thread =
        std::thread::spawn(move || Hub::new(config, listener, uplink).unwrap().run().unwrap());
    Running {
        _directory: directory,
        path,
        thread,
    }
}

fn request(number: u8, vlans: Vlans) -> PortRequest {
    PortRequest {
        name: format!("machine-{number}"),
        mac: [2, 0, 0, 0, 1, number],
        vlans,
        mtu: 1500,
        offloads: [true; 4],
    }
}

fn cable(running: &Running, number: u8, vlans: Vlans) -> Cable {
    let joined = join(&running.path, request(number, vlans)).unwrap();
    assert_eq!(joined.mtu, 1500);
    Cable::new(joined, Capabilities::ALL).unwrap()
}

/// An UDP frame from one machine to another, or to all.
fn frame(from: u8, to: Option<u8>, payload: &[u8]) -> Frame {
    let mac = |number: u8| Mac::from_bytes(&[2, 0, 0, 0, 1, number]);
    let way = reply::Addresses {
        source_mac: mac(from),
        destination_mac: to.map_or(Mac::BROADCAST, mac),
        source: IpAddr::from([10, 0, 0, from]),
        destination: IpAddr::from([10, 0, 0, to.unwrap_or(255)]),
    };
    reply::udp(&mut Pool::new(1), way, (1, 2), payload).unwrap()
}

fn send(cable: &mut Cable, frame: &Frame) {
    while !cable.send(frame).unwrap() {
        cable.flush();
        std::thread::yield_now();
    }
    cable.flush();
}

/// The next frame, if one comes before the time is over.
fn next(cable: &mut Cable, pool: &mut Pool, time: Duration) -> Option<Frame> {
    let end = Instant::now() + time;
    loop {
        if let Some(frame) = cable.receive(pool).unwrap() {
            cable.flush();
            return Some(frame);
        }
        let left = end.checked_duration_since(Instant::now())?;
        if cable.sleep() {
            let left = Timespec::try_from(left).unwrap();
            poll(
                &mut [PollFd::new(&cable.wake(), PollFlags::IN)],
                Some(&left),
            )
            .unwrap();
        }
    }
}

const SOON: Duration = Duration::from_secs(20);
const NEVER: Duration = Duration::from_millis(100);

#[test]
fn machines_meet_and_vlans_do_not() {
    let running = start(false, None);
    let mut pool = Pool::new(16);
    let mut one = cable(&running, 1, Vlans::Access(10));
    let mut two = cable(&running, 2, Vlans::Access(10));
    let mut other = cable(&running, 3, Vlans::Access(20));
    let mut trunk = cable(&running, 4, Vlans::Trunk(vec![]));
    send(&mut one, &frame(1, None, b"hello"));
    assert_eq!(
        next(&mut two, &mut pool, SOON).unwrap().bytes(),
        frame(1, None, b"hello").bytes()
    );
    let tagged = next(&mut trunk, &mut pool, SOON).unwrap();
    assert_eq!(packet::tag(tagged.bytes()), Some((0x8100, 10)));
    assert_eq!(next(&mut other, &mut pool, NEVER), None);
    // Many, both ways.
    for round in 0..2000u32 {
        send(&mut two, &frame(2, Some(1), &round.to_be_bytes()));
        if round % 100 == 99 {
            for expected in round - 99..=round {
                let got = next(&mut one, &mut pool, SOON).unwrap();
                assert_eq!(got.bytes()[42..], expected.to_be_bytes());
                pool.put(got);
            }
        }
    }
    assert_eq!(next(&mut other, &mut pool, NEVER), None);
    drop((one, two, other, trunk));
    running.thread.join().unwrap();
}

#[test]
fn a_port_goes_with_its_machine_and_an_address_is_taken_once() {
    let running = start(false, None);
    let mut pool = Pool::new(16);
    let mut one = cable(&running, 1, Vlans::Access(1));
    let again = join(&running.path, request(1, Vlans::Access(1)));
    assert!(matches!(again, Err(ProtocolError::Refused(why)) if why.contains("mac=")));
    let bad = join(&running.path, request(2, Vlans::Access(4095)));
    assert!(matches!(bad, Err(ProtocolError::Refused(_))));
    let two = cable(&running, 2, Vlans::Access(1));
    drop(two);
    let end = Instant::now() + SOON;
    let mut two = loop {
        match join(&running.path, request(2, Vlans::Access(1))) {
            Ok(joined) => break Cable::new(joined, Capabilities::ALL).unwrap(),
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    };
    // Somebody else's address does not pass.
    send(&mut one, &frame(7, None, b"I am seven"));
    send(&mut one, &frame(1, None, b"I am one"));
    let got = next(&mut two, &mut pool, SOON).unwrap();
    assert_eq!(got.bytes()[42..50], *b"I am one");
    drop((one, two));
    running.thread.join().unwrap();
}

#[test]
fn a_machine_that_breaks_its_ring_harms_nobody_else() {
    let running = start(false, None);
    let mut pool = Pool::new(16);
    let bad = join(&running.path, request(1, Vlans::Access(1))).unwrap();
    let mut two = cable(&running, 2, Vlans::Access(1));
    let mut three = cable(&running, 3, Vlans::Access(1));
    let memory = std::fs::File::from(bad.ring.try_clone().unwrap());
    // Positions that cannot be, in both directions, and the bell.
    std::os::unix::fs::FileExt::write_all_at(&memory, &[0xff; 1024], 0).unwrap();
    bell::ring(&bad.bell);
    for round in 0..200u8 {
        send(&mut two, &frame(2, Some(3), &[round; 100]));
        let got = next(&mut three, &mut pool, SOON).unwrap();
        assert_eq!(got.bytes()[42..], [round; 100]);
    }
    drop((bad, two, three));
    running.thread.join().unwrap();
}

#[test]
fn a_machine_that_is_never_roused_hangs_nobody() {
    let running = start(false, None);
    let mut pool = Pool::new(16);
    let bad = join(&running.path, request(1, Vlans::Access(1))).unwrap();
    let mut two = cable(&running, 2, Vlans::Access(1));
    let mut three = cable(&running, 3, Vlans::Access(1));
    // It takes nothing from its socket, whose calls may wait as far as it is concerned, and fills the hub's.
    rustix::io::ioctl_fionbio(&bad.bell, false).unwrap();
    let memory = bad.ring.try_clone().unwrap();
    let mut ring = Ring::attach(memory, bad.size, Side::Machine, Capabilities::ALL).unwrap();
    // More than a socket's buffer has room for.
    for round in 0..2000u32 {
        bell::ring(&bad.bell);
        // An answer would come by the socket, once for each of these.
        ring.sleep();
        send(&mut two, &frame(2, None, &round.to_be_bytes()));
        let got = next(&mut three, &mut pool, SOON).unwrap();
        assert_eq!(got.bytes()[42..], round.to_be_bytes());
        let end = Instant::now() + SOON;
        while ring.pop(&mut pool).unwrap().is_none() {
            assert!(Instant::now() < end);
        }
    }
    drop((bad, two, three));
    running.thread.join().unwrap();
}

#[test]
fn a_machine_that_closes_its_bell_has_left() {
    let running = start(false, None);
    let one = join(&running.path, request(1, Vlans::Access(1))).unwrap();
    drop(one.bell);
    let end = Instant::now() + SOON;
    let again = loop {
        match join(&running.path, request(1, Vlans::Access(1))) {
            Ok(joined) => break joined,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    };
    drop((one.connection, again));
    running.thread.join().unwrap();
}

#[test]
fn addresses_of_machines_that_have_left_are_given_again() {
    let running = start(true, None);
    let _stays = cable(&running, 1, Vlans::Access(1));
    // 10.9.8.0/24 has 253 for machines, and one stays.
    for number in 0..600u16 {
        let [high, low] = number.to_be_bytes();
        let request = PortRequest {
            mac: [2, 0, 0, 1, high, low],
            ..request(2, Vlans::Access(1))
        };
        // The one before may not be gone yet; then there is another address.
        join(&running.path, request).unwrap();
    }
}

#[test]
fn a_connection_that_says_nothing_is_dropped() {
    let running = start(false, None);
    let one = cable(&running, 1, Vlans::Access(1));
    let flags = SocketFlags::CLOEXEC;
    let silent = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::net::connect(&silent, &SocketAddrUnix::new(&running.path).unwrap()).unwrap();
    let begin = Instant::now();
    let said = rustix::net::recv(&silent, &mut [0; 1], rustix::net::RecvFlags::empty());
    assert_eq!(said, Ok((0, 0)));
    assert!(begin.elapsed() >= Duration::from_secs(4));
    drop(one);
    running.thread.join().unwrap();
}

#[test]
fn the_gateway_answers() {
    let running = start(true, None);
    let mut pool = Pool::new(16);
    let mut one = cable(&running, 1, Vlans::Access(1));
    let mac = Mac::from_bytes(&[2, 0, 0, 0, 1, 1]);
    let mut question = vec![0, 1, 8, 0, 6, 4, 0, 1];
    question.extend(mac.0);
    question.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
    let question = reply::ethernet(&mut pool, Mac::BROADCAST, mac, 0x0806, &question);
    send(&mut one, &question);
    let answer = next(&mut one, &mut pool, SOON).unwrap();
    assert_eq!(
        packet::source(answer.bytes()),
        Some(Mac::from_bytes(&[2, 0, 0, 0, 0, 1]))
    );
    assert_eq!(answer.bytes()[20..22], [0, 2]);
    // The address that it was not given.
    let mut probe = frame(1, None, b"x");
    send(&mut one, &probe);
    probe = question;
    send(&mut one, &probe);
    assert!(next(&mut one, &mut pool, SOON).is_some());
    drop(one);
    running.thread.join().unwrap();
}

#[test]
fn two_hubs_are_one_network() {
    let socket = || UdpSocket::bind("127.0.0.1:0").unwrap();
    let (first, second) = (socket(), socket());
    let uplink = |socket: UdpSocket, peer: SocketAddr| {
        Some(Uplink {
            config: VxlanConfig {
                mapping: Mapping::Tagged(42),
                peers: vec![peer],
            },
            socket,
        })
    };
    let addresses = [first.local_addr().unwrap(), second.local_addr().unwrap()];
    let here = start(false, uplink(first, addresses[1]));
    let there = start(false, uplink(second, addresses[0]));
    let mut pool = Pool::new(16);
    let mut one = cable(&here, 1, Vlans::Access(10));
    let mut two = cable(&there, 2, Vlans::Access(10));
    let mut other = cable(&there, 3, Vlans::Access(20));
    // UDP may lose; loopback does so only when buffers are full.
    send(&mut one, &frame(1, None, b"over there"));
    let got = next(&mut two, &mut pool, SOON).unwrap();
    assert_eq!(got.bytes(), frame(1, None, b"over there").bytes());
    send(&mut two, &frame(2, Some(1), b"and back"));
    let got = next(&mut one, &mut pool, SOON).unwrap();
    assert_eq!(got.bytes()[42..50], *b"and back");
    assert_eq!(next(&mut other, &mut pool, NEVER), None);
    drop((one, two, other));
    here.thread.join().unwrap();
    there.thread.join().unwrap();
}
