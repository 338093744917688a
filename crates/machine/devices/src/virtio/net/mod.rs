//! The network device (virtio 1.2, section 5.1): several pairs of queues, mergeable receive buffers, checksum and
//! segmentation offloads both ways, receive filters, link status and announcements.
//!
//! The device copies frames and knows nothing of networks. Its host side is one thread that has a [`NetHost`]: doorbells
//! wake it by an eventfd, and it exchanges frames with the device when it likes, in rounds of bounded work. The thread of
//! a virtual CPU moves no frames; it carries out control commands only, for which drivers wait.
//!
//! ```text
//!   driver ──doorbell──▶ notified ──eventfd──▶ host thread ──exchange──▶ host_event: transmit, then receive
//! ```
//!
//! A frame is the switch's [`Frame`]: with it goes what is left to be done to it. A malformed frame is dropped and counted;
//! a malformed ring stops the device.
//!
//! Limitations: no ECN with segmentation, no receive-side scaling by hash keys, no notification coalescing, one link speed.

mod control;
mod filter;
mod host;
mod offload;
mod steer;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use strata_switch::{Capabilities, Frame, MAX_FRAME, Offload, Pool, SegmentationKind};

use super::chain::Chain;
use super::core::HostHandle;
use super::device::{DeviceKind, Io, VirtioDevice};
use super::queue::QueueError;
use crate::{RestoreError, SavedState};
use filter::Filter;
pub use host::{Exchange, NetCounters, NetHost, NetPort};
use host::{Lanes, Shared};
use offload::HEADER_BYTES;
use steer::Steering;

/// Feature bits (5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const CTRL_RX: u64 = 1 << 18;
    pub(super) const CTRL_VLAN: u64 = 1 << 19;
    pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub(super) const GUEST_USO4: u64 = 1 << 54;
    pub(super) const GUEST_USO6: u64 = 1 << 55;
    pub(super) const HOST_USO: u64 = 1 << 56;
    pub(super) const SPEED_DUPLEX: u64 = 1 << 63;
    /// What the driver can change while it runs, by CTRL_GUEST_OFFLOADS.
    pub(super) const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;
}

/// VIRTIO_NET_S_LINK_UP and VIRTIO_NET_S_ANNOUNCE in the configuration's status.
const STATUS_LINK_UP: u16 = 1;
const STATUS_ANNOUNCE: u16 = 2;

/// The largest MTU: what an IP packet can have, less what Linux keeps for headers.
pub const MTU_MAX: u16 = 65_520;
/// The smallest MTU that IPv4 hosts must accept.
pub const MTU_MIN: u16 = 68;
/// The most pairs of queues: as many as fit beside the control queue.
pub const PAIRS_MAX: u16 = 16;

/// Descriptors of a queue for frames. A frame of 64 KiB may need 17 of them each way.
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// Ethernet's header: two addresses and a type.
const ETHERNET_BYTES: usize = 14;

/// What one round moves at most: chains from the driver, chains to it, bytes from it. Less than one call may take.
const ROUND_CHAINS_OUT: u32 = 256;
const ROUND_CHAINS_IN: u32 = 512;
const ROUND_BYTES_OUT: usize = 1 << 20;
/// Frames that wait for the host at most: the rest waits with the driver.
const TO_HOST_MAX: usize = 256;

/// What a network card is like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetOptions {
    /// Its address, until the driver sets another.
    pub mac: [u8; 6],
    /// The largest packet without Ethernet's header, [`MTU_MIN`] to [`MTU_MAX`].
    pub mtu: u16,
    /// Pairs of queues, 1 to [`PAIRS_MAX`]; as many as there are virtual CPUs is a good choice.
    pub pairs: u16,
}

/// The network device.
pub struct Net {
    options: NetOptions,
    queue_sizes: Vec<u16>,
    shared: Arc<Shared>,
    /// Features the driver accepted.
    features: u64,
    /// Those of `feature::GUEST_OFFLOADS` that are on.
    guest_offloads: u64,
    mac: [u8; 6],
    /// Pairs of queues in use.
    pairs: u16,
    filter: Filter,
    steering: Steering,
    /// As in the configuration.
    link_up: bool,
    announce: bool,
    /// The queue that is served first in the next round.
    next_pair: u16,
}

impl Net {
    /// A network card and its host's end. An error is the host's, which has no descriptor for it.
    pub fn new(options: NetOptions) -> std::io::Result<(Net, NetHost)> {
        let options = NetOptions {
            mtu: options.mtu.clamp(MTU_MIN, MTU_MAX),
            pairs: options.pairs.clamp(1, PAIRS_MAX),
            ..options
        };
        let shared = Arc::new(Shared::new()?);
        let mut queue_sizes = vec![QUEUE_SIZE; usize::from(options.pairs) * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let net = Net {
            queue_sizes,
            shared: shared.clone(),
            features: 0,
            guest_offloads: 0,
            mac: options.mac,
            pairs: 1,
            filter: Filter::default(),
            steering: Steering::default(),
            link_up: true,
            announce: false,
            next_pair: 0,
            options,
        };
        Ok((net, NetHost::new(shared)))
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// The control queue is behind all pairs that the driver knows of (5.1.2).
    fn control_queue(&self) -> u16 {
        if self.has(feature::MQ) {
            self.options.pairs * 2
        } else {
            2
        }
    }

    /// What frames for the guest may be left to it.
    fn capabilities(&self) -> Capabilities {
        let has = |feature| self.guest_offloads & feature != 0;
        Capabilities {
            checksum: has(feature::GUEST_CSUM),
            tcp4: has(feature::GUEST_TSO4),
            tcp6: has(feature::GUEST_TSO6),
            udp: has(feature::GUEST_USO4) && has(feature::GUEST_USO6),
        }
    }

    /// Whether a frame may leave so much to the host (5.1.6.2).
    fn may_send(&self, offload: &Offload) -> bool {
        let Some(segmentation) = offload.segmentation else {
            return offload.needs_checksum.is_none() || self.has(feature::CSUM);
        };
        self.has(match segmentation.kind {
            SegmentationKind::Tcp4 => feature::HOST_TSO4,
            SegmentationKind::Tcp6 => feature::HOST_TSO6,
            SegmentationKind::Udp => feature::HOST_USO,
        })
    }

    /// Takes frames from the driver, from all queues in turn, as far as the host takes them. True if there may be more
    /// that it would take.
    fn transmit(&mut self, io: &mut Io<'_>, lanes: &mut Lanes) -> Result<bool, QueueError> {
        let (mut chains, mut bytes) = (0, 0);
        for turn in 0..self.pairs {
            let pair = (self.next_pair + turn) % self.pairs;
            let queue = pair * 2 + 1;
            loop {
                if lanes.to_host.len() >= TO_HOST_MAX {
                    // The host looks again when it has taken some of these.
                    self.next_pair = pair;
                    return Ok(false);
                }
                let Some(chain) = io.pop(queue)? else {
                    break;
                };
                match self.take(&chain, io, &mut lanes.pool) {
                    Some(frame) => {
                        if self.pairs > 1 {
                            self.steering.learn(frame.bytes(), pair);
                        }
                        bytes += frame.len();
                        lanes.counters.frames_from_guest += 1;
                        lanes.counters.bytes_from_guest += frame.len() as u64;
                        lanes.to_host.push_back(frame);
                    }
                    None => lanes.counters.malformed_from_guest += 1,
                }
                io.complete(queue, chain, 0)?;
                chains += 1;
                if chains >= ROUND_CHAINS_OUT || bytes >= ROUND_BYTES_OUT {
                    self.next_pair = (pair + 1) % self.pairs;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The frame in a chain, if it is well-formed.
    fn take(&self, chain: &Chain, io: &Io<'_>, pool: &mut Pool) -> Option<Frame> {
        let mut reader = chain.reader(io.memory());
        let header = reader.read_array::<HEADER_BYTES>().ok()?;
        let len = reader.remaining() as usize;
        if !(ETHERNET_BYTES..=MAX_FRAME).contains(&len) {
            return None;
        }
        let offload = offload::parse(&header, len).filter(|offload| self.may_send(offload))?;
        let mut frame = pool.frame(len);
        reader.read_exact(frame.bytes_mut()).ok()?;
        frame.offload = offload;
        Some(frame)
    }

    /// Gives frames to the driver as far as it has buffers. True if some wait although there may be buffers.
    fn receive(&mut self, io: &mut Io<'_>, lanes: &mut Lanes) -> Result<bool, QueueError> {
        let (mut taken, capabilities) = (0, self.capabilities());
        while let Some(mut frame) = lanes.to_guest.pop_front() {
            if taken >= ROUND_CHAINS_IN {
                lanes.to_guest.push_front(frame);
                return Ok(true);
            }
            if !self.link_up || !self.filter.lets_in(frame.bytes(), &self.mac, self.features) {
                lanes.counters.filtered_to_guest += 1;
            } else if !fit(&mut frame, capabilities) {
                lanes.counters.misfit_to_guest += 1;
            } else {
                let pair = match self.pairs {
                    1 => 0,
                    pairs => self.steering.pair_of(frame.bytes()) % pairs,
                };
                match self.give(&frame, pair * 2, io)? {
                    Given::Yes(chains) => {
                        taken += chains;
                        lanes.counters.frames_to_guest += 1;
                        lanes.counters.bytes_to_guest += frame.len() as u64;
                    }
                    Given::NoBuffers => {
                        lanes.to_guest.push_front(frame);
                        return Ok(false);
                    }
                    Given::Never => lanes.counters.misfit_to_guest += 1,
                }
            }
            lanes.pool.put(frame);
        }
        Ok(false)
    }

    /// Puts a frame into as many of the driver's buffers as it needs (5.1.6.4).
    fn give(&self, frame: &Frame, queue: u16, io: &mut Io<'_>) -> Result<Given, QueueError> {
        let merge = self.has(feature::MRG_RXBUF);
        let needed = HEADER_BYTES + frame.len();
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < needed {
            let more = chains.len() < usize::from(QUEUE_SIZE);
            let Some(chain) = (if more { io.pop(queue)? } else { None }) else {
                while let Some(chain) = chains.pop() {
                    io.undo_pop(queue, chain);
                }
                return Ok(Given::NoBuffers);
            };
            let bytes = chain.writable_bytes() as usize;
            if chains.is_empty() && (bytes < HEADER_BYTES || (!merge && bytes < needed)) {
                // The driver gets it back empty: it would be too small for the next frame, too.
                io.complete(queue, chain, 0)?;
                return Ok(Given::Never);
            }
            room += bytes;
            chains.push(chain);
        }
        let count = chains.len() as u16;
        let header = offload::encode(&frame.offload, count);
        let mut rest = frame.bytes();
        let mut done = Vec::with_capacity(chains.len());
        for (at, chain) in chains.into_iter().enumerate() {
            let mut writer = chain.writer(io.memory());
            if at == 0 {
                writer.write_all(&header)?;
            }
            let (part, others) = rest
                .split_at_checked(writer.remaining() as usize)
                .unwrap_or((rest, &[]));
            writer.write_all(part)?;
            rest = others;
            let written = writer.written();
            done.push((chain, written));
        }
        io.complete_all(queue, done)?;
        Ok(Given::Yes(u32::from(count)))
    }

    /// Takes over what the host's side says of the link.
    fn look_at_link(&mut self, io: &mut Io<'_>, lanes: &mut Lanes) {
        let announce = std::mem::take(&mut lanes.announce) && self.has(feature::GUEST_ANNOUNCE);
        if self.link_up != lanes.link_up || (announce && !self.announce) {
            self.link_up = lanes.link_up;
            self.announce |= announce;
            io.config_changed();
        }
    }
}

/// Makes a frame one that a guest with these capabilities takes; false if that is not possible here.
fn fit(frame: &mut Frame, capabilities: Capabilities) -> bool {
    if !capabilities.checksum && frame.offload.segmentation.is_none() {
        frame.offload.checksum_valid = false;
        return frame.finish_checksum();
    }
    capabilities.takes(&frame.offload)
}

/// What became of a frame for the driver.
enum Given {
    /// It took that many buffers.
    Yes(u32),
    /// The driver has none now.
    NoBuffers,
    /// It fits into none.
    Never,
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Network
    }

    fn features(&self) -> u64 {
        let common = feature::CSUM
            | feature::GUEST_CSUM
            | feature::CTRL_GUEST_OFFLOADS
            | feature::MTU
            | feature::MAC
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::MRG_RXBUF
            | feature::STATUS
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_RX_EXTRA
            | feature::CTRL_VLAN
            | feature::GUEST_ANNOUNCE
            | feature::CTRL_MAC_ADDR
            | feature::GUEST_USO4
            | feature::GUEST_USO6
            | feature::HOST_USO
            | feature::SPEED_DUPLEX;
        if self.options.pairs > 1 {
            common | feature::MQ
        } else {
            common
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// struct virtio_net_config (5.1.4) up to `duplex`. The speed is unknown, the duplex full.
    fn config(&self) -> Vec<u8> {
        let mut status = 0;
        if self.link_up {
            status |= STATUS_LINK_UP;
        }
        if self.announce {
            status |= STATUS_ANNOUNCE;
        }
        let mut config = Vec::with_capacity(17);
        config.extend(self.mac);
        config.extend(status.to_le_bytes());
        config.extend(self.options.pairs.to_le_bytes());
        config.extend(self.options.mtu.to_le_bytes());
        config.extend(u32::MAX.to_le_bytes());
        config.push(1);
        config
    }

    fn attach(&mut self, host: HostHandle) {
        self.shared.attach(host);
    }

    fn activate(&mut self, features: u64, _io: &mut Io<'_>) -> Result<(), QueueError> {
        self.features = features;
        self.guest_offloads = features & feature::GUEST_OFFLOADS;
        self.shared.lock().capabilities = self.capabilities();
        Ok(())
    }

    fn notified(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        if queue == self.control_queue() {
            self.control(queue, io)
        } else {
            self.shared.ring();
            Ok(())
        }
    }

    fn host_event(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let shared = self.shared.clone();
        let mut lanes = shared.lock();
        self.look_at_link(io, &mut lanes);
        if !lanes.attended {
            // Nobody would take what is moved now: whoever does is told to come.
            shared.ring();
            return Ok(());
        }
        let more_out = self.transmit(io, &mut lanes)?;
        let more_in = self.receive(io, &mut lanes)?;
        lanes.more = more_out || more_in;
        Ok(())
    }

    fn reset(&mut self) {
        self.features = 0;
        self.guest_offloads = 0;
        self.mac = self.options.mac;
        self.pairs = 1;
        self.next_pair = 0;
        self.announce = false;
        self.filter = Filter::default();
        self.steering = Steering::default();
        let mut lanes = self.shared.lock();
        lanes.capabilities = Capabilities::default();
        // They were for a driver that is gone.
        lanes.to_guest.clear();
    }

    fn close(&mut self) {
        self.shared.lock().closed = true;
        self.shared.ring();
    }

    fn save(&self) -> SavedState {
        let state = NetStateV1 {
            mac: self.mac,
            pairs: self.pairs,
            guest_offloads: self.guest_offloads,
            announce: self.announce,
            filter: self.filter.clone(),
        };
        SavedState::new("virtio-net", 1, &state)
    }

    fn restore(&mut self, features: u64, state: &SavedState) -> Result<(), RestoreError> {
        let saved: NetStateV1 = state.open("virtio-net", 1)?;
        let misfit = |reason| RestoreError::Mismatch {
            name: "virtio-net".to_owned(),
            reason,
        };
        if saved.pairs == 0 || saved.pairs > self.options.pairs {
            return Err(misfit("it has more queues"));
        }
        if !saved.filter.is_possible() {
            return Err(misfit("its filter is larger than possible"));
        }
        self.features = features;
        self.guest_offloads = saved.guest_offloads & features & feature::GUEST_OFFLOADS;
        self.mac = saved.mac;
        self.pairs = saved.pairs;
        // Where the machine goes on its neighbours are to hear of it.
        self.announce = saved.announce || self.has(feature::GUEST_ANNOUNCE);
        self.filter = saved.filter;
        self.shared.lock().capabilities = self.capabilities();
        Ok(())
    }
}

/// Saved state beyond the queues. Frames in flight are lost, as on any wire.
#[derive(Debug, Serialize, Deserialize)]
pub struct NetStateV1 {
    mac: [u8; 6],
    pairs: u16,
    guest_offloads: u64,
    announce: bool,
    filter: Filter,
}
