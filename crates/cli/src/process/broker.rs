//! Sockets in the user's name: the NAT of a machine's network asks, and the process in front makes them.
//!
//! The machine's process can make no socket, connect none and choose no address. It says what it wants ([`Wish`]) on a
//! line, and gets connected sockets back, if the user's machine may reach that: anything outside, the host's resolvers,
//! the host itself by the gateway's address; the host's loopback only if that was asked for. Connections to published
//! ports are accepted here and handed in.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, bind, connect, getsockname, ipproto,
    listen, recvfrom, recvmsg, sendmsg, socket_with, sockopt,
};
use strata_vmm::config::{PortProtocol, Publish, UserNetwork};
use strata_vmm::nat::{Answer, Host, Wish};
use strata_vmm::{is_outside, subnet};

use crate::exit::{ExitCode, Failure};
use crate::routes::routes;

/// A wish on the line: the flow's number, what is wished, an address and a port.
const WISH_BYTES: usize = 32;
/// What an answer begins with; a datagram's bytes follow.
const ANSWER_BYTES: usize = 32;
/// The largest datagram.
const DATAGRAM_MAX: usize = 65_535;
/// More datagrams than wait in a new socket.
const UNCONNECTED_MAX: usize = 4096;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 256;
/// Where the host's resolvers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";
const DNS_PORT: u16 = 53;
/// An address that belongs to nobody (RFC 5737), to see from which of ours a packet would go there. None is sent.
const SOMEWHERE4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 9);
const SOMEWHERE6: SocketAddr = SocketAddr::new(
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    9,
);

/// Kinds of wishes on the line.
mod wish {
    pub(super) const TCP: u8 = 1;
    pub(super) const UDP: u8 = 2;
    pub(super) const ECHO: u8 = 3;
    pub(super) const HERE_TCP: u8 = 4;
    pub(super) const HERE_UDP: u8 = 5;
    pub(super) const RESOLVER_TCP: u8 = 6;
    pub(super) const RESOLVER_UDP: u8 = 7;
}

/// Kinds of answers on the line.
mod answer {
    pub(super) const REFUSED: u8 = 0;
    pub(super) const SOCKET: u8 = 1;
    pub(super) const CONNECTION: u8 = 2;
    pub(super) const DATAGRAM: u8 = 3;
}

/// SO_PEEK_OFF (socket(7)).
#[derive(Clone, Copy)]
struct PeekOffset;

nix::setsockopt_impl!(
    PeekOffset,
    libc::SOL_SOCKET,
    libc::SO_PEEK_OFF,
    i32,
    nix::sys::socket::sockopt::SetStruct<i32>
);

/// Has looking at data go on where it was; false if this host's kernel does not know that for this kind of socket.
fn peek_goes_on(socket: &OwnedFd) -> bool {
    nix::sys::socket::setsockopt(socket, PeekOffset, &0).is_ok()
}

/// An address of either family as 16 bytes: IPv4 addresses mapped into IPv6 (RFC 4291 section 2.5.5.2).
fn to_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn from_bytes(bytes: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(bytes).to_canonical()
}

/// `{ flow: 8, kind: 1, v6: 1, port: 2, failures: 4, address: 16 }`
fn encode_wish(flow: u64, wanted: Wish) -> [u8; WISH_BYTES] {
    let unspecified = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let (kind, v6, port, failures, address) = match wanted {
        Wish::Tcp(to) => (wish::TCP, false, to.port(), 0, to.ip()),
        Wish::Udp(to) => (wish::UDP, false, to.port(), 0, to.ip()),
        Wish::Echo(to) => (wish::ECHO, false, 0, 0, to),
        Wish::Here {
            tcp: true,
            port,
            v6,
        } => (wish::HERE_TCP, v6, port, 0, unspecified),
        Wish::Here { port, v6, .. } => (wish::HERE_UDP, v6, port, 0, unspecified),
        Wish::Resolver {
            tcp: true,
            failures,
        } => (wish::RESOLVER_TCP, false, 0, failures, unspecified),
        Wish::Resolver { failures, .. } => (wish::RESOLVER_UDP, false, 0, failures, unspecified),
    };
    let mut bytes = [0; WISH_BYTES];
    let parts = flow
        .to_le_bytes()
        .into_iter()
        .chain([kind, u8::from(v6)])
        .chain(port.to_le_bytes())
        .chain(failures.to_le_bytes())
        .chain(to_bytes(address));
    bytes
        .iter_mut()
        .zip(parts)
        .for_each(|(to, from)| *to = from);
    bytes
}

fn decode_wish(bytes: &[u8; WISH_BYTES]) -> Option<(u64, Wish)> {
    let (flow, rest) = bytes.split_first_chunk::<8>()?;
    let (&[kind, v6], rest) = rest.split_first_chunk::<2>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (failures, rest) = rest.split_first_chunk::<4>()?;
    let address = from_bytes(*rest.first_chunk::<16>()?);
    let (port, failures) = (u16::from_le_bytes(*port), u32::from_le_bytes(*failures));
    let (to, v6) = (SocketAddr::new(address, port), v6 != 0);
    let wanted = match kind {
        wish::TCP => Wish::Tcp(to),
        wish::UDP => Wish::Udp(to),
        wish::ECHO => Wish::Echo(address),
        wish::HERE_TCP => Wish::Here {
            tcp: true,
            port,
            v6,
        },
        wish::HERE_UDP => Wish::Here {
            tcp: false,
            port,
            v6,
        },
        wish::RESOLVER_TCP => Wish::Resolver {
            tcp: true,
            failures,
        },
        wish::RESOLVER_UDP => Wish::Resolver {
            tcp: false,
            failures,
        },
        _ => return None,
    };
    Some((u64::from_le_bytes(*flow), wanted))
}

/// `{ kind: 1, peeks: 1, port: 2, peer's port: 2, flow: 8, peer: 16, nothing: 2 }`
fn encode_answer(
    kind: u8,
    peeks: bool,
    flow: u64,
    port: u16,
    peer: SocketAddr,
) -> [u8; ANSWER_BYTES] {
    let mut bytes = [0; ANSWER_BYTES];
    let parts = [kind, u8::from(peeks)]
        .into_iter()
        .chain(port.to_le_bytes())
        .chain(peer.port().to_le_bytes())
        .chain(flow.to_le_bytes())
        .chain(to_bytes(peer.ip()));
    bytes
        .iter_mut()
        .zip(parts)
        .for_each(|(to, from)| *to = from);
    bytes
}

fn decode_answer(bytes: &[u8], socket: Option<OwnedFd>) -> Option<Answer> {
    let (header, payload) = bytes.split_first_chunk::<ANSWER_BYTES>()?;
    let (&[kind, peeks], rest) = header.split_first_chunk::<2>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (peer_port, rest) = rest.split_first_chunk::<2>()?;
    let (flow, rest) = rest.split_first_chunk::<8>()?;
    let peer = from_bytes(*rest.first_chunk::<16>()?);
    let peer = SocketAddr::new(peer, u16::from_le_bytes(*peer_port));
    let (port, flow, peeks) = (
        u16::from_le_bytes(*port),
        u64::from_le_bytes(*flow),
        peeks != 0,
    );
    Some(match kind {
        answer::REFUSED => Answer::Socket { flow, socket: None },
        answer::SOCKET => Answer::Socket {
            flow,
            socket: socket.map(|socket| (socket, peeks)),
        },
        answer::CONNECTION => Answer::Connection {
            socket: socket?,
            peeks,
            peer,
            port,
        },
        answer::DATAGRAM => Answer::Datagram {
            socket: socket?,
            peer,
            port,
            payload: payload.to_vec(),
        },
        _ => return None,
    })
}

/// In the machine's process: the line to the one in front.
pub struct Line {
    line: OwnedFd,
    /// Takes the line's place when nobody is at its other end, which would be readable for ever: it never is.
    quiet: Option<OwnedFd>,
}

impl Line {
    /// On this descriptor.
    ///
    /// # Errors
    /// The host gives no descriptor.
    pub fn new(line: OwnedFd) -> io::Result<Line> {
        let quiet = Some(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok(Line { line, quiet })
    }
}

impl Host for Line {
    fn ask(&mut self, flow: u64, wanted: Wish) -> bool {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::send(&self.line, &encode_wish(flow, wanted), flags).is_ok()
    }

    fn answer(&mut self) -> Option<Answer> {
        let mut bytes = vec![0; ANSWER_BYTES + DATAGRAM_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut received = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = match recvmsg(&self.line, &mut buffers, &mut received, flags) {
            Ok(got) if got.bytes > 0 => got,
            Err(error) if !ends(error) => return None,
            _ => {
                // Whoever waits for the line stops as it is closed.
                self.line = self.quiet.take()?;
                return None;
            }
        };
        let socket = received.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
            _ => None,
        });
        decode_answer(bytes.get(..got.bytes)?, socket)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

/// A published port, open.
struct Published {
    socket: OwnedFd,
    publish: Publish,
}

/// Whether this error of a line means that nobody is at its other end.
fn ends(error: Errno) -> bool {
    matches!(error, Errno::PIPE | Errno::CONNRESET)
}

/// The two ends of a line: the machine's, and that of the process in front.
pub fn line() -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// What the process in front does for a machine's network.
pub struct Broker {
    host_loopback: bool,
    published: Vec<Published>,
}

impl Broker {
    /// Opens the published ports and chooses a subnet. What was left to choose is then known in `network`.
    pub fn open(network: &mut UserNetwork) -> Result<Broker, Failure> {
        network.gateway = network
            .gateway
            .or_else(|| Some(subnet::choose("user", &routes())?.addr()));
        let mut published = Vec::new();
        for publish in &mut network.publish {
            let socket = open(publish).map_err(|error| refused(publish, error))?;
            if let Some(here) = getsockname(&socket).ok().and_then(|at| at.try_into().ok()) {
                publish.host = here;
            }
            published.push(Published {
                socket,
                publish: *publish,
            });
        }
        Ok(Broker {
            host_loopback: network.host_loopback,
            published,
        })
    }

    /// Grants wishes until the machine is gone.
    pub fn serve(self, line: OwnedFd) {
        loop {
            let mut fds = vec![PollFd::new(&line, PollFlags::IN)];
            let published = self.published.iter();
            fds.extend(published.map(|port| PollFd::new(&port.socket, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready.first() == Some(&true) && !self.grant(&line) {
                return;
            }
            for (port, _) in self
                .published
                .iter()
                .zip(ready.get(1..).unwrap_or_default())
                .filter(|(_, r)| **r)
            {
                let told = match port.publish.protocol {
                    PortProtocol::Tcp => port.accept(&line),
                    PortProtocol::Udp => port.first_datagram(&line),
                };
                if told.is_err_and(ends) {
                    return;
                }
            }
        }
    }

    /// One wish; false if there will be no more.
    fn grant(&self, line: &OwnedFd) -> bool {
        let mut bytes = [0; WISH_BYTES];
        match rustix::net::recv(line, &mut bytes, RecvFlags::empty()) {
            Ok((WISH_BYTES, _)) => {}
            Err(Errno::INTR) => return true,
            _ => return false,
        }
        // Whoever sends nonsense has nothing to do with our machines.
        let Some((flow, wanted)) = decode_wish(&bytes) else {
            return false;
        };
        let made = self.make(wanted);
        let peeks = made.as_ref().is_ok_and(peek_goes_on);
        let kind = match made {
            Ok(_) => answer::SOCKET,
            Err(_) => answer::REFUSED,
        };
        let nobody = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        let header = encode_answer(kind, peeks, flow, 0, nobody);
        match say(line, &header, &[], made.ok().as_ref()) {
            Ok(()) => true,
            Err(error) if ends(error) => false,
            // The host has no room for a socket on its way: the flow is to know that there is none.
            Err(_) => {
                let header = encode_answer(answer::REFUSED, false, flow, 0, nobody);
                !say(line, &header, &[], None).is_err_and(ends)
            }
        }
    }

    /// The socket that is wished for, if a guest may have it.
    fn make(&self, wanted: Wish) -> Result<OwnedFd, Errno> {
        let outside = |address: IpAddr| match is_outside(address) {
            true => Ok(()),
            false => Err(Errno::ACCESS),
        };
        let (tcp, to) = match wanted {
            Wish::Tcp(to) => (true, to),
            Wish::Udp(to) => (false, to),
            Wish::Echo(to) => {
                outside(to)?;
                return echo(to);
            }
            Wish::Here { tcp, port, v6 } => {
                return connected(tcp, SocketAddr::new(self.here(v6)?, port));
            }
            Wish::Resolver { tcp, failures } => {
                let resolvers = resolvers();
                let at = failures as usize % resolvers.len().max(1);
                let resolver = *resolvers.get(at).ok_or(Errno::NETUNREACH)?;
                return connected(tcp, SocketAddr::new(resolver, DNS_PORT));
            }
        };
        outside(to.ip())?;
        connected(tcp, to)
    }

    /// Where the host's own services are.
    fn here(&self, v6: bool) -> Result<IpAddr, Errno> {
        if self.host_loopback {
            return Ok(match v6 {
                false => Ipv4Addr::LOCALHOST.into(),
                true => Ipv6Addr::LOCALHOST.into(),
            });
        }
        let probe = connected(false, if v6 { SOMEWHERE6 } else { SOMEWHERE4 })?;
        let own: SocketAddr = getsockname(&probe)?.try_into().map_err(|_| Errno::INVAL)?;
        match is_outside(own.ip()) {
            true => Ok(own.ip()),
            false => Err(Errno::NETUNREACH),
        }
    }
}

impl Published {
    /// Hands a connection in.
    fn accept(&self, line: &OwnedFd) -> Result<(), Errno> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (socket, peer) = rustix::net::acceptfrom_with(&self.socket, flags)?;
        let Some(peer) = peer.and_then(|peer| SocketAddr::try_from(peer).ok()) else {
            return Ok(());
        };
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let peeks = peek_goes_on(&socket);
        let header = encode_answer(answer::CONNECTION, peeks, 0, self.publish.guest, peer);
        say(line, &header, &[], Some(&socket))
    }

    /// Hands in what a new peer has sent, with a socket for what follows.
    fn first_datagram(&self, line: &OwnedFd) -> Result<(), Errno> {
        let mut payload = vec![0; DATAGRAM_MAX];
        let (count, _, peer) = recvfrom(&self.socket, payload.as_mut_slice(), RecvFlags::DONTWAIT)?;
        let Some(peer) = peer.and_then(|peer| SocketAddr::try_from(peer).ok()) else {
            return Ok(());
        };
        let socket = new_socket(false, self.publish.host)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        bind(&socket, &self.publish.host)?;
        connect(&socket, &peer)?;
        // Until it was connected it got what other peers sent, too.
        for _ in 0..UNCONNECTED_MAX {
            if rustix::net::recv(&socket, &mut [0; 1], RecvFlags::DONTWAIT) == Err(Errno::AGAIN) {
                break;
            }
        }
        let header = encode_answer(answer::DATAGRAM, false, 0, self.publish.guest, peer);
        let payload = payload.get(..count).unwrap_or_default();
        say(line, &header, payload, Some(&socket))
    }
}

fn say(
    line: &OwnedFd,
    header: &[u8],
    payload: &[u8],
    socket: Option<&OwnedFd>,
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut sent = SendAncillaryBuffer::new(&mut space);
    let sockets: Vec<_> = socket.iter().map(|socket| socket.as_fd()).collect();
    if !sockets.is_empty() {
        sent.push(SendAncillaryMessage::ScmRights(&sockets));
    }
    let parts = [IoSlice::new(header), IoSlice::new(payload)];
    sendmsg(line, &parts, &mut sent, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn new_socket(tcp: bool, address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let kind = match tcp {
        true => SocketType::STREAM,
        false => SocketType::DGRAM,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(family, kind, flags, None)
}

/// A socket on its way to `to`, or there already.
fn connected(tcp: bool, to: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = new_socket(tcp, to)?;
    if tcp {
        sockopt::set_tcp_nodelay(&socket, true)?;
    }
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// A ping socket, where this host lets its users have some.
fn echo(to: IpAddr) -> Result<OwnedFd, Errno> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
    connect(&socket, &SocketAddr::new(to, 0))?;
    Ok(socket)
}

/// Why guests can ping nothing but their gateway; none if they can.
pub fn ping_refused() -> Option<String> {
    let error = echo(SOMEWHERE4.ip()).err()?;
    match error {
        Errno::ACCESS | Errno::PERM => {
            Some("this host's net.ipv4.ping_group_range does not include the user".to_owned())
        }
        Errno::NETUNREACH | Errno::HOSTUNREACH => None,
        other => Some(io::Error::from(other).to_string()),
    }
}

/// The resolvers of this host, in the order in which they are asked (resolv.conf(5)).
fn resolvers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    parse_resolvers(&text)
}

fn parse_resolvers(text: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        if words.next()? != "nameserver" {
            return None;
        }
        words.next()?.parse().ok()
    };
    let mut found: Vec<IpAddr> = text.lines().filter_map(address).take(3).collect();
    if found.is_empty() {
        // What the C library takes then.
        found.push(Ipv4Addr::LOCALHOST.into());
    }
    found
}

/// Opens a published port.
fn open(publish: &Publish) -> Result<OwnedFd, Errno> {
    let tcp = publish.protocol == PortProtocol::Tcp;
    let socket = new_socket(tcp, publish.host)?;
    if publish.host.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if tcp {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &publish.host)?;
    if tcp {
        listen(&socket, BACKLOG)?;
    } else {
        // For the sockets of its peers, and for nobody else's: it was alone when it was bound.
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    Ok(socket)
}

fn refused(publish: &Publish, error: Errno) -> Failure {
    let host = publish.host;
    let (code, reason) = match error {
        Errno::ADDRINUSE => (
            ExitCode::Busy,
            "it is in use by another program; choose another port".to_owned(),
        ),
        Errno::ADDRNOTAVAIL => (ExitCode::Usage, "this host has no such address".to_owned()),
        Errno::ACCESS | Errno::PERM => (
            ExitCode::Permission,
            "this user may not listen there; choose a port from 1024 on".to_owned(),
        ),
        other => (ExitCode::System, io::Error::from(other).to_string()),
    };
    let protocol = publish.protocol;
    Failure::new(
        code,
        format!(
            "cannot publish the guest's port {} at {host} ({protocol}): {reason}",
            publish.guest
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::buffer::spare_capacity;
    use rustix::event::{Timespec, epoll};
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::{Duration, Instant};

    /// A broker on a thread of its own, and the machine's end of its line.
    fn broker(network: &mut UserNetwork) -> Line {
        let broker = Broker::open(network).unwrap();
        let (ours, theirs) = line().unwrap();
        std::thread::spawn(move || broker.serve(theirs));
        Line::new(ours).unwrap()
    }

    fn answer_of(line: &mut Line) -> Answer {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(answer) = line.answer() {
                return answer;
            }
            assert!(Instant::now() < end, "no answer came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn asked(line: &mut Line, wanted: Wish) -> Option<OwnedFd> {
        assert!(line.ask(7, wanted));
        match answer_of(line) {
            Answer::Socket { flow: 7, socket } => socket.map(|(socket, _)| socket),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn wishes_and_answers_survive_the_line() {
        let to: SocketAddr = "[2001:db8::7]:443".parse().unwrap();
        for wanted in [
            Wish::Tcp("192.0.2.1:80".parse().unwrap()),
            Wish::Udp(to),
            Wish::Echo(to.ip()),
            Wish::Here {
                tcp: true,
                port: 22,
                v6: false,
            },
            Wish::Here {
                tcp: false,
                port: 22,
                v6: true,
            },
            Wish::Resolver {
                tcp: true,
                failures: 0,
            },
            Wish::Resolver {
                tcp: false,
                failures: 70_000,
            },
        ] {
            assert_eq!(
                decode_wish(&encode_wish(u64::MAX, wanted)),
                Some((u64::MAX, wanted))
            );
        }
        assert_eq!(decode_wish(&[99; WISH_BYTES]), None);
        assert!(decode_answer(&[1; 5], None).is_none());
        assert!(decode_answer(&[2; ANSWER_BYTES], None).is_none());
    }

    #[test]
    fn the_hosts_loopback_is_closed_unless_asked_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let here = Wish::Here {
            tcp: true,
            port,
            v6: false,
        };
        let mut closed = broker(&mut UserNetwork::default());
        for address in ["127.0.0.1", "::1", "0.0.0.0", "169.254.169.254"] {
            let to = SocketAddr::new(address.parse().unwrap(), port);
            assert!(asked(&mut closed, Wish::Tcp(to)).is_none(), "{address}");
            assert!(asked(&mut closed, Wish::Udp(to)).is_none(), "{address}");
        }
        let mut open = broker(&mut UserNetwork {
            host_loopback: true,
            ..UserNetwork::default()
        });
        let socket = asked(&mut open, here).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let mut socket = TcpStream::from(socket);
        socket.set_nonblocking(false).unwrap();
        socket.write_all(b"hello").unwrap();
        let mut bytes = [0; 5];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        // By its own address the loopback stays closed.
        let direct = Wish::Tcp(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
        assert!(asked(&mut open, direct).is_none());
    }

    #[test]
    fn connections_and_datagrams_to_published_ports_come_in() {
        let mut network = UserNetwork {
            publish: ["0:80", "0:53/udp"]
                .map(|text| text.parse().unwrap())
                .to_vec(),
            ..UserNetwork::default()
        };
        let mut line = broker(&mut network);
        let [tcp, udp] = [0, 1].map(|at| network.publish[at].host);
        let again = Broker::open(&mut UserNetwork {
            publish: vec![Publish {
                host: udp,
                ..network.publish[1]
            }],
            ..UserNetwork::default()
        });
        let error = again.err().unwrap();
        assert!(
            error.message.contains("in use by another program"),
            "{error:?}"
        );
        let peer = TcpStream::connect(tcp).unwrap();
        match answer_of(&mut line) {
            Answer::Connection {
                peer: from,
                port: 80,
                ..
            } => {
                assert_eq!(from, peer.local_addr().unwrap());
            }
            other => panic!("{other:?}"),
        }
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.send_to(b"one", udp).unwrap();
        let Answer::Datagram {
            socket,
            port: 53,
            payload,
            ..
        } = answer_of(&mut line)
        else {
            panic!("a datagram was sent");
        };
        assert_eq!(payload, b"one");
        peer.send_to(b"two", udp).unwrap();
        let socket = UdpSocket::from(socket);
        socket.set_nonblocking(false).unwrap();
        let mut bytes = [0; 9];
        assert_eq!(socket.recv(&mut bytes).unwrap(), 3);
        socket.send(b"back").unwrap();
        let (count, from) = peer.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..count], from), (&b"back"[..], udp));
    }

    #[test]
    fn a_line_without_another_end_is_silent() {
        let (ours, theirs) = line().unwrap();
        let mut line = Line::new(ours).unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let token = epoll::EventData::new_u64(0);
        epoll::add(&epoll, line.descriptor(), token, epoll::EventFlags::IN).unwrap();
        let events = || {
            let mut events = Vec::with_capacity(4);
            let at_once = Timespec::default();
            epoll::wait(&epoll, spare_capacity(&mut events), Some(&at_once)).unwrap()
        };
        assert_eq!(events(), 0);
        drop(theirs);
        assert_eq!(events(), 1);
        assert!(line.answer().is_none());
        assert_eq!(events(), 0);
        assert!(line.answer().is_none());
        assert!(!line.ask(1, Wish::Echo(IpAddr::V4(Ipv4Addr::LOCALHOST))));
    }

    #[test]
    fn resolvers_are_read() {
        let text =
            "# x\nsearch a\nnameserver 192.0.2.1\nnameserver nonsense\n nameserver fd00::1 # y\n";
        let expected: Vec<IpAddr> = ["192.0.2.1", "fd00::1"].map(|a| a.parse().unwrap()).into();
        assert_eq!(parse_resolvers(text), expected);
        assert_eq!(parse_resolvers(""), [IpAddr::from([127, 0, 0, 1])]);
    }
}
