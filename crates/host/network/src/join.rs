//! The machine's side: joining a network, and its end of the ring.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use strata_switch::ring::{Ring, Side};
use strata_switch::{Capabilities, Frame, Pool};

use crate::bell;
use crate::protocol::{self, DESCRIPTORS, Hello, PortRequest, ProtocolError, Welcome};

/// A port on a network, as descriptors and values that another process can be given.
#[derive(Debug)]
pub struct Joined {
    /// The ring's memory.
    pub ring: OwnedFd,
    /// Bytes of each of its directions.
    pub size: u32,
    /// A socket that keeps message boundaries: a byte wakes the switch, and the switch sends one to wake the machine.
    pub bell: OwnedFd,
    /// The connection: when it is closed, the port goes.
    pub connection: OwnedFd,
    /// Longest IP packet of the network.
    pub mtu: u16,
}

/// Joins the network whose hub listens at `path`.
///
/// # Errors
/// Nobody listens there, the hub is of another version, or it refuses the port.
pub fn join(path: &Path, port: PortRequest) -> Result<Joined, ProtocolError> {
    let flags = SocketFlags::CLOEXEC;
    let connection = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(io::Error::from)?;
    let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
    connect(&connection, &address).map_err(io::Error::from)?;
    let hello = Hello {
        version: protocol::VERSION,
        port,
    };
    protocol::send(&connection, &hello, &[])?;
    let (welcome, descriptors): (Welcome, _) =
        protocol::receive(&connection)?.ok_or(ProtocolError::Message("it hung up"))?;
    if welcome.version != protocol::VERSION {
        return Err(ProtocolError::Version(welcome.version));
    }
    if let Some(why) = welcome.refused {
        return Err(ProtocolError::Refused(why));
    }
    let [ring, bell] = <[OwnedFd; DESCRIPTORS]>::try_from(descriptors)
        .map_err(|_| ProtocolError::Message("descriptors are missing"))?;
    Ok(Joined {
        ring,
        size: welcome.ring,
        bell,
        connection,
        mtu: welcome.mtu,
    })
}

/// The machine's end of a ring, with what wakes either side.
#[derive(Debug)]
pub struct Cable {
    ring: Ring,
    bell: OwnedFd,
    _connection: OwnedFd,
}

impl Cable {
    /// Takes up what [`join`] got, in the same process or another.
    ///
    /// # Errors
    /// The ring is not what the hub said.
    pub fn new(joined: Joined, capabilities: Capabilities) -> Result<Cable, ProtocolError> {
        let ring = Ring::attach(joined.ring, joined.size, Side::Machine, capabilities)?;
        Ok(Cable {
            ring,
            bell: joined.bell,
            _connection: joined.connection,
        })
    }

    /// Sends a frame; false if there is no room now: [`wake`](Cable::wake) becomes readable when there is.
    ///
    /// # Errors
    /// The hub broke the ring's rules.
    pub fn send(&mut self, frame: &Frame) -> Result<bool, ProtocolError> {
        Ok(self.ring.push(frame)?)
    }

    /// The next frame from the network.
    ///
    /// # Errors
    /// The hub broke the ring's rules.
    pub fn receive(&mut self, pool: &mut Pool) -> Result<Option<Frame>, ProtocolError> {
        Ok(self.ring.pop(pool)?)
    }

    /// After a batch of either: wakes the switch if it sleeps.
    pub fn flush(&self) {
        if self.ring.must_wake() {
            bell::ring(&self.bell);
        }
    }

    /// Before waiting for [`wake`](Cable::wake): false if frames are there already.
    pub fn sleep(&self) -> bool {
        // A hub that has gone shows by its ring, in which nothing comes any more.
        let _ = bell::silence(&self.bell);
        self.ring.sleep()
    }

    /// Readable when there is something to look at.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
