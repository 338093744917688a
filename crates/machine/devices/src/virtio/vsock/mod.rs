//! The socket device (virtio 1.2, section 5.10), with Unix sockets on the host's side.
//!
//! - A host program reaches port P of the guest by connecting to the device's Unix socket and
//!   sending `CONNECT P\n`. When a program in the guest takes the connection the answer is
//!   `OK <port>\n`, with the port that the guest sees as its peer's; otherwise the socket is closed.
//!   Bytes sent behind the line before the answer are kept.
//! - A guest program that connects to port P of the host (address 2) reaches the Unix socket whose
//!   path is the device's with `_P` appended, if a program listens there.
//!
//! This is the convention of Firecracker and Cloud Hypervisor. Half-closed streams work in both
//! directions. Everything is bounded: streams in number, bytes per stream towards the host by the
//! credit given to the guest, towards the guest by the credit it gives.
//!
//! Limitations: no seqpacket or datagram sockets. Connections do not survive a restore; the guest is
//! told by a transport reset event (5.10.6.6.4).

mod connection;
mod hub;
mod packet;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::core::HostHandle;
use super::device::{DeviceKind, Io, VirtioDevice};
use super::host::Watcher;
use super::queue::QueueError;
use crate::{RestoreError, SavedState};
use hub::Hub;
pub use hub::VsockHost;
use packet::{HEADER_BYTES, Header};

/// Queues (5.10.2), as the device sees them.
const TO_GUEST: u16 = 0;
const FROM_GUEST: u16 = 1;
const EVENT: u16 = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Connections at a time. Each costs a descriptor, of which a process has 1024 by default.
const STREAMS_MAX: usize = 512;

/// Bytes of data in a packet at most.
const PACKET_BYTES_MAX: usize = 64 << 10;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Addresses below are reserved, and a guest's must fit 32 bits (5.10.4).
const GUEST_CID_FIRST: u64 = 3;

/// Why a vsock device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The address cannot be a guest's.
    #[error("{0} cannot be the address of a guest")]
    GuestCid(u64),
    /// The Unix socket cannot be made.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host has no thread or descriptor for it.
    #[error("cannot watch sockets")]
    Watch(#[source] io::Error),
}

fn listen(path: &Path) -> Result<VsockHost, VsockError> {
    VsockHost::at(path).map_err(|source| VsockError::Listen {
        path: path.to_owned(),
        source,
    })
}

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    hub: Hub,
    /// What the thread waits for, until it is started.
    ready: Option<std::os::fd::OwnedFd>,
    watcher: Option<Watcher>,
    buffer: Vec<u8>,
    /// The guest must be told that its connections are gone.
    owes_reset_event: bool,
}

impl Vsock {
    /// A device for the guest at address `guest_cid`, listening at `path`, which must not exist and
    /// is removed when the device is dropped.
    pub fn new(guest_cid: u64, path: &Path) -> Result<Vsock, VsockError> {
        Vsock::on(guest_cid, listen(path)?)
    }

    /// The same with another host's side.
    pub fn on(guest_cid: u64, host: VsockHost) -> Result<Vsock, VsockError> {
        Vsock::with_limit(guest_cid, host, STREAMS_MAX)
    }

    fn with_limit(
        guest_cid: u64,
        host: VsockHost,
        streams_max: usize,
    ) -> Result<Vsock, VsockError> {
        if !(GUEST_CID_FIRST..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::GuestCid(guest_cid));
        }
        let hub = Hub::new(host, guest_cid, streams_max).map_err(VsockError::Watch)?;
        let ready = Some(hub.ready_fd().map_err(VsockError::Watch)?);
        let buffer = vec![0; PACKET_BYTES_MAX];
        Ok(Vsock {
            guest_cid,
            hub,
            ready,
            watcher: None,
            buffer,
            owes_reset_event: false,
        })
    }

    /// Takes packets from the guest until there are none or it must take resets first.
    fn receive(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        while self.hub.accepts_packets() {
            let Some(chain) = io.pop(FROM_GUEST)? else {
                break;
            };
            self.receive_packet(&chain, io)?;
            io.complete(FROM_GUEST, chain, 0)?;
        }
        Ok(())
    }

    /// Packets that are too short, or say that they hold more than they do, are dropped.
    fn receive_packet(&mut self, chain: &Chain, io: &Io<'_>) -> Result<(), QueueError> {
        let mut reader = chain.reader(io.memory());
        let header = match reader.read_array::<HEADER_BYTES>() {
            Ok(bytes) => Header::from_bytes(bytes),
            Err(QueueError::ChainTooShort) => return Ok(()),
            Err(error) => return Err(error),
        };
        let len = if header.op == packet::op::DATA {
            header.len as usize
        } else {
            0
        };
        let Some(data) = self
            .buffer
            .get_mut(..len)
            .filter(|_| len <= reader.remaining() as usize)
        else {
            return Ok(());
        };
        reader.read_exact(data)?;
        self.hub.receive(&header, data);
        Ok(())
    }

    /// Gives packets to the guest as far as it has buffers for them.
    fn send(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        while self.hub.has_packet() {
            let Some(chain) = io.pop(TO_GUEST)? else {
                break;
            };
            let room = (chain.writable_bytes() as usize).checked_sub(HEADER_BYTES);
            let room = room.ok_or(QueueError::ChainTooShort)?.min(PACKET_BYTES_MAX);
            let buffer = self.buffer.get_mut(..room).unwrap_or_default();
            let Some(header) = self.hub.next_packet(buffer) else {
                io.undo_pop(TO_GUEST, chain);
                break;
            };
            let mut writer = chain.writer(io.memory());
            writer.write_all(&header.to_bytes())?;
            writer.write_all(self.buffer.get(..header.len as usize).unwrap_or_default())?;
            let written = writer.written();
            io.complete(TO_GUEST, chain, written)?;
        }
        Ok(())
    }

    fn send_event(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        if self.owes_reset_event
            && let Some(chain) = io.pop(EVENT)?
        {
            let mut writer = chain.writer(io.memory());
            writer.write_all(&EVENT_TRANSPORT_RESET.to_le_bytes())?;
            let written = writer.written();
            io.complete(EVENT, chain, written)?;
            self.owes_reset_event = false;
        }
        Ok(())
    }

    /// Moves packets both ways until nothing moves. What is taken from the guest can make packets
    /// for it, and what it takes can make room for packets from it.
    fn pump(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        self.send_event(io)?;
        loop {
            self.receive(io)?;
            let stalled = !self.hub.accepts_packets();
            self.send(io)?;
            if !stalled || !self.hub.accepts_packets() {
                return Ok(());
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Socket
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// { le64 guest_cid; } (5.10.4).
    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn attach(&mut self, host: HostHandle) {
        // Without a thread the device works as long as the guest speaks first; there is nobody to
        // tell, and a host that cannot start a thread has louder problems.
        let ready = self.ready.take();
        self.watcher = ready.and_then(|ready| Watcher::spawn("vsock", ready, host).ok());
    }

    fn notified(&mut self, _queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        self.pump(io)
    }

    fn host_event(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        self.hub.poll();
        self.pump(io)
    }

    fn reset(&mut self) {
        self.hub.reset();
        self.owes_reset_event = false;
    }

    fn save(&self) -> SavedState {
        SavedState::new(
            "virtio-vsock",
            1,
            &VsockStateV1 {
                guest_cid: self.guest_cid,
            },
        )
    }

    fn restore(&mut self, _features: u64, state: &SavedState) -> Result<(), RestoreError> {
        let state: VsockStateV1 = state.open("virtio-vsock", 1)?;
        if !(GUEST_CID_FIRST..u64::from(u32::MAX)).contains(&state.guest_cid) {
            return Err(RestoreError::Mismatch {
                name: "virtio-vsock".to_owned(),
                reason: "it has an impossible guest address",
            });
        }
        self.hub.reset();
        // The guest reads its address again when it is told of the reset, so it keeps this device's.
        self.owes_reset_event = true;
        Ok(())
    }
}

/// Saved state beyond the queues. Connections are not part of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct VsockStateV1 {
    guest_cid: u64,
}
