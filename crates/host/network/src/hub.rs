//! The loop of a switch's process: one thread that owns the switch and carries frames between rings, gateway and uplink.

use std::collections::BTreeMap;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use strata_switch::gateway::{Gateway, GatewayConfig};
use strata_switch::packet::Mac;
use strata_switch::ring::{Ring, Side};
use strata_switch::vxlan::{Vxlan, VxlanConfig};
use strata_switch::{
    Guard, Port, PortConfig, PortId, Switch, SwitchConfig, SwitchError, Time, Vid, VidSet, VlanMode,
};

use crate::bell;
use crate::protocol::{self, Hello, PortRequest, ProtocolError, VERSION, Welcome};

/// Bytes of each direction of a ring.
const RING: u32 = 2 << 20;
/// Frames that a port moves in a round.
const BATCH: usize = 64;
/// Machines of one network, and connections that have not said what they are.
const PORTS_MAX: usize = 1024;
/// How long the first machine may take to come.
const FIRST_MACHINE: Duration = Duration::from_secs(20);
/// How long a connection may take to say what it is.
const GREETING: Duration = Duration::from_secs(5);
/// Rounds without a look at sockets.
const ROUNDS_MAX: usize = 64;
/// The VLAN in which the gateway is.
const GATEWAY_VLAN: Vid = Vid::DEFAULT;

/// Tokens of what the loop waits for; those of connections follow, two for each.
const LISTENER: u64 = 0;
const UPLINK: u64 = 1;
const FIRST: u64 = 2;

/// What a network is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Longest IP packet.
    pub mtu: u16,
    /// Its gateway, in VLAN 1: gives out addresses and names.
    pub gateway: Option<GatewayConfig>,
}

/// A tunnel to switches on other hosts.
#[derive(Debug)]
pub struct Uplink {
    /// VLANs, networks and peers.
    pub config: VxlanConfig,
    /// The socket, bound, at the port that the peers send to.
    pub socket: UdpSocket,
}

struct Machine {
    connection: OwnedFd,
    since: Time,
    port: Option<Attached>,
}

struct Attached {
    id: PortId,
    mac: Mac,
    ring: Ring,
    /// Our end: it becomes readable when the machine rings.
    bell: OwnedFd,
}

/// A network's switch with all that hangs on it. See the crate's first page.
pub struct Hub {
    config: NetworkConfig,
    epoll: OwnedFd,
    listener: OwnedFd,
    origin: Instant,
    switch: Switch,
    gateway: Option<(PortId, Gateway)>,
    uplink: Option<(PortId, Vxlan, UdpSocket)>,
    machines: BTreeMap<u64, Machine>,
    next: u64,
    /// Room for what the uplink receives.
    datagram: Vec<u8>,
    /// A machine has been there: the hub ends with the last one.
    used: bool,
}

impl Hub {
    /// A network whose machines come to `listener`, a Unix socket that keeps message boundaries and listens.
    ///
    /// # Errors
    /// The host gives no descriptor.
    pub fn new(
        config: NetworkConfig,
        listener: OwnedFd,
        uplink: Option<Uplink>,
    ) -> io::Result<Hub> {
        let now = Time::ZERO;
        let mut switch = Switch::new(SwitchConfig::default(), now);
        let full = |error: SwitchError| io::Error::other(error);
        let gateway = match config.gateway.clone() {
            None => None,
            Some(gateway) => {
                let addresses = gateway
                    .ipv4
                    .map(|network| IpNet::from(std::net::IpAddr::V4(network.addr())));
                let more = gateway
                    .ipv6
                    .map(|ipv6| IpNet::from(std::net::IpAddr::V6(ipv6.network.addr())));
                let link = IpNet::from(std::net::IpAddr::V6(strata_switch::packet::link_local(
                    gateway.mac,
                )));
                let port = PortConfig {
                    name: "gateway".to_owned(),
                    mtu: config.mtu,
                    vlan: VlanMode::Access(GATEWAY_VLAN),
                    addresses: addresses.into_iter().chain(more).chain([link]).collect(),
                    ..PortConfig::default()
                };
                let id = switch.add_port(port, now).map_err(full)?;
                Some((id, Gateway::new(gateway, now)))
            }
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wait = |token, fd, flags| {
            let token = epoll::EventData::new_u64(token);
            epoll::add(&epoll, fd, token, epoll::EventFlags::IN | flags)
        };
        // Told once: connections for which there is no descriptor wait until one is free.
        wait(LISTENER, listener.as_fd(), epoll::EventFlags::ET)?;
        rustix::io::ioctl_fionbio(&listener, true)?;
        let uplink = match uplink {
            None => None,
            Some(uplink) => {
                uplink.socket.set_nonblocking(true)?;
                wait(UPLINK, uplink.socket.as_fd(), epoll::EventFlags::empty())?;
                let port = PortConfig {
                    name: "uplink".to_owned(),
                    mtu: config.mtu,
                    vlan: VlanMode::Trunk {
                        native: None,
                        allowed: VidSet::all(),
                    },
                    ..PortConfig::default()
                };
                let id = switch.add_port(port, now).map_err(full)?;
                Some((id, Vxlan::new(uplink.config), uplink.socket))
            }
        };
        Ok(Hub {
            config,
            epoll,
            listener,
            origin: Instant::now(),
            switch,
            gateway,
            uplink,
            machines: BTreeMap::new(),
            next: 0,
            datagram: vec![0; 65_535],
            used: false,
        })
    }

    fn now(&self) -> Time {
        Time::ZERO.after(self.origin.elapsed())
    }

    /// Carries frames until the last machine has gone, or none has come for a while.
    ///
    /// # Errors
    /// The host refuses to wait.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        let end = |hub: &Hub| {
            hub.machines.is_empty() && (hub.used || hub.origin.elapsed() > FIRST_MACHINE)
        };
        while !end(self) {
            let mut busy = false;
            for _ in 0..ROUNDS_MAX {
                busy = self.round();
                if !busy {
                    break;
                }
            }
            let pause = if busy { Duration::ZERO } else { self.pause() };
            let pause = Timespec::try_from(pause).map_err(io::Error::other)?;
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&pause)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                let token = event.data.u64();
                match token {
                    LISTENER => self.accept(),
                    UPLINK => {}
                    _ if (token - FIRST).is_multiple_of(2) => self.connection((token - FIRST) / 2),
                    _ => {
                        let token = (token - FIRST) / 2;
                        let machine = self.machines.get(&token);
                        let port = machine.and_then(|one| one.port.as_ref());
                        if port.is_some_and(|port| !bell::silence(&port.bell)) {
                            self.leave(token);
                        }
                    }
                }
            }
            self.drop_silent();
        }
        Ok(())
    }

    /// How long the thread may sleep. Only what says that it sleeps is woken, so all must have said so before it does.
    fn pause(&mut self) -> Duration {
        let now = self.now();
        let gateway = self.gateway.as_ref();
        let gateway = gateway.and_then(|(_, gateway)| gateway.next_deadline());
        let deadline = self.switch.next_deadline();
        let mut until = gateway.map_or(deadline, |other| deadline.min(other));
        for machine in self.machines.values() {
            let Some(port) = &machine.port else {
                until = until.min(machine.since.after(GREETING));
                continue;
            };
            // What its limit holds back waits in the ring until then.
            let held = self.switch.may_receive(port.id, now);
            if held > now {
                until = until.min(held);
            } else if !port.ring.sleep() {
                return Duration::ZERO;
            }
        }
        until.since(now)
    }

    /// Takes new connections in.
    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            let connection = match accept_with(&self.listener, flags) {
                Ok(connection) => connection,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                // None is there, or no descriptor: then again when one that leaves has freed some.
                Err(_) => return,
            };
            let token = self.next;
            // One that there is no room for is closed, and sees that.
            if self.machines.len() < PORTS_MAX
                && self.wait(FIRST + 2 * token, connection.as_fd()).is_ok()
            {
                self.next += 1;
                let machine = Machine {
                    connection,
                    since: self.now(),
                    port: None,
                };
                self.machines.insert(token, machine);
            }
        }
    }

    /// Drops connections that do not say what they are.
    fn drop_silent(&mut self) {
        let now = self.now();
        let silent = self
            .machines
            .iter()
            .filter(|(_, machine)| machine.port.is_none() && machine.since.after(GREETING) <= now);
        let silent: Vec<u64> = silent.map(|(token, _)| *token).collect();
        for token in silent {
            self.leave(token);
        }
    }

    fn wait(&self, token: u64, fd: impl AsFd) -> io::Result<()> {
        let token = epoll::EventData::new_u64(token);
        Ok(epoll::add(&self.epoll, fd, token, epoll::EventFlags::IN)?)
    }

    /// A connection has something to say, which it may once, or has gone.
    fn connection(&mut self, token: u64) {
        let Some(machine) = self.machines.get(&token) else {
            return;
        };
        let said = protocol::receive::<Hello>(&machine.connection);
        let refusal = match said {
            Ok(Some((hello, _))) if machine.port.is_none() => match self.attach(token, &hello) {
                Ok(()) => return,
                Err(error) => error.to_string(),
            },
            Ok(None) => return self.leave(token),
            Err(ProtocolError::Connection(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return;
            }
            Ok(Some(_)) => "a port has said already what it is".to_owned(),
            Err(error) => error.to_string(),
        };
        let welcome = Welcome {
            version: VERSION,
            ring: 0,
            mtu: 0,
            refused: Some(refusal),
        };
        if let Some(machine) = self.machines.get(&token) {
            let _ = protocol::send(&machine.connection, &welcome, &[]);
        }
        self.leave(token);
    }

    /// Takes a connection down, with its port. What it waited for ends with its descriptors: nobody else has them.
    fn leave(&mut self, token: u64) {
        if let Some(machine) = self.machines.remove(&token)
            && let Some(port) = machine.port
        {
            self.switch.remove_port(port.id);
            self.give_back(port.mac);
        }
        self.accept();
    }

    /// The address of a machine that has gone is the next one's for which there is no other.
    fn give_back(&mut self, mac: Mac) {
        let now = self.now();
        if let Some((_, gateway)) = &mut self.gateway
            && let Some(server) = gateway.dhcp4()
        {
            server.end(mac, now);
        }
    }

    /// What the switch is told of a machine's port.
    fn port(&mut self, request: &PortRequest, now: Time) -> Result<PortConfig, ProtocolError> {
        let refuse = |why: &str| ProtocolError::Refused(why.to_owned());
        let vlan = request
            .vlans
            .mode()
            .ok_or_else(|| refuse("VLANs have numbers from 1 to 4094"))?;
        let mac = request.mac();
        if !mac.is_unicast() {
            return Err(refuse("its Ethernet address is no station's"));
        }
        let taken = self.switch.ports().any(|(_, port)| {
            port.guard
                .as_ref()
                .is_some_and(|guard| guard.macs.contains(&mac))
        });
        let gateways = self
            .gateway
            .as_ref()
            .is_some_and(|(_, gateway)| gateway.config().mac == mac);
        if taken || gateways {
            return Err(refuse(
                "its Ethernet address is in use on this network: give it another with mac=",
            ));
        }
        // In the gateway's VLAN a machine is held to the addresses that it is given; elsewhere its owner gives them.
        let mut addresses: Vec<IpNet> = Vec::new();
        if vlan == VlanMode::Access(GATEWAY_VLAN)
            && let Some((_, gateway)) = &mut self.gateway
            && gateway.config().dhcp4.is_some()
        {
            let given = gateway.assign(mac, Some(request.name.clone()), now);
            let given = given.ok_or_else(|| refuse("the network has no address left"))?;
            addresses.push(IpNet::from(std::net::IpAddr::V4(given)));
            addresses.extend(
                gateway
                    .ipv6_of(mac)
                    .map(|address| IpNet::from(std::net::IpAddr::V6(address))),
            );
        } else {
            let any = [
                std::net::IpAddr::from([0u8; 4]),
                std::net::IpAddr::from([0u8; 16]),
            ];
            addresses.extend(
                any.into_iter()
                    .filter_map(|address| IpNet::new(address, 0).ok()),
            );
        }
        // A trunk's inner frames are the business of the machine behind it: it is trusted.
        let guard = matches!(vlan, VlanMode::Access(_)).then(|| Guard {
            macs: vec![mac],
            ..Guard::default()
        });
        Ok(PortConfig {
            name: request.name.chars().take(64).collect(),
            capabilities: request.capabilities(),
            mtu: request.mtu.min(self.config.mtu),
            vlan,
            addresses,
            guard,
            ..PortConfig::default()
        })
    }

    fn attach(&mut self, token: u64, hello: &Hello) -> Result<(), ProtocolError> {
        if hello.version != VERSION {
            return Err(ProtocolError::Version(hello.version));
        }
        let now = self.now();
        let ring = Ring::create(RING, Side::Switch, hello.port.capabilities())?;
        let (bell, theirs) = bell::pair()?;
        self.wait(FIRST + 2 * token + 1, bell.as_fd())?;
        let config = self.port(&hello.port, now)?;
        let mac = hello.port.mac();
        let id = self.switch.add_port(config, now).map_err(|error| {
            self.give_back(mac);
            ProtocolError::Refused(error.to_string())
        })?;
        let machine = self
            .machines
            .get_mut(&token)
            .ok_or(ProtocolError::Message("it has gone"))?;
        // From here on whoever takes the connection down takes the port down.
        let port = machine.port.insert(Attached {
            id,
            mac,
            ring,
            bell,
        });
        let welcome = Welcome {
            version: VERSION,
            ring: RING,
            mtu: self.config.mtu,
            refused: None,
        };
        let descriptors = [port.ring.memory().file(), theirs.as_fd()];
        protocol::send(&machine.connection, &welcome, &descriptors)?;
        self.used = true;
        Ok(())
    }

    /// Carries a batch for everybody. True if there is more to do at once.
    fn round(&mut self) -> bool {
        let now = self.now();
        let mut more = false;
        let mut broken = Vec::new();
        self.switch.tick(now);
        for (token, machine) in &mut self.machines {
            let Some(port) = &mut machine.port else {
                continue;
            };
            let mut left = BATCH;
            while left > 0 && self.switch.may_receive(port.id, now) <= now {
                let Some(frame) = port.ring.poll(now, self.switch.pool()) else {
                    break;
                };
                self.switch.receive(port.id, frame, now);
                left -= 1;
            }
            more |= left == 0;
            if port.ring.broken().is_some() {
                broken.push(*token);
            }
        }
        more |= self.carry_uplink(now);
        self.carry_gateway(now);
        for machine in self.machines.values_mut() {
            let Some(port) = &mut machine.port else {
                continue;
            };
            more |= deliver(&mut self.switch, port.id, &mut port.ring, now);
            if port.ring.must_wake() {
                bell::ring(&port.bell);
            }
        }
        for token in broken {
            self.leave(token);
        }
        more
    }

    fn carry_gateway(&mut self, now: Time) {
        let Some((id, gateway)) = &mut self.gateway else {
            return;
        };
        if gateway
            .next_deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            gateway.tick(now, self.switch.pool());
        }
        while let Some(frame) = self.switch.take(*id, now) {
            // There is no way out of this network: what is to be routed ends here.
            if let Some(frame) = gateway.receive(frame, now, self.switch.pool()) {
                self.switch.pool().put(frame);
            }
        }
        while gateway.next_query().is_some() {}
        while let Some(frame) = gateway.next_frame() {
            self.switch.receive(*id, frame, now);
        }
    }

    fn carry_uplink(&mut self, now: Time) -> bool {
        let Some((id, tunnel, socket)) = &mut self.uplink else {
            return false;
        };
        let mut left = BATCH;
        while left > 0 {
            let Ok((len, from)) = socket.recv_from(&mut self.datagram) else {
                break;
            };
            tunnel.receive(
                from,
                self.datagram.get(..len).unwrap_or_default(),
                now,
                self.switch.pool(),
            );
            left -= 1;
        }
        while let Some(frame) = tunnel.poll(now, self.switch.pool()) {
            self.switch.receive(*id, frame, now);
        }
        let more = deliver(&mut self.switch, *id, tunnel, now);
        while let Some((to, frame)) = tunnel.next_datagram() {
            // UDP may lose what the host has no room for.
            let _ = socket.send_to(frame.bytes(), to);
            self.switch.pool().put(frame);
        }
        more || left == 0
    }

    /// The switch, for its counters.
    pub fn switch(&self) -> &Switch {
        &self.switch
    }
}

/// Gives a port a batch of what it is to get. True if there is more that it would take.
fn deliver(switch: &mut Switch, id: PortId, port: &mut impl Port, now: Time) -> bool {
    for _ in 0..2 * BATCH {
        let Some(frame) = switch.take(id, now) else {
            return false;
        };
        if let Err(frame) = port.deliver(frame, now, switch.pool()) {
            switch.put_back(id, frame);
            return false;
        }
    }
    true
}
