//! An Ethernet frame and what is still to be done to it before it can leave the host.

use crate::config::PortId;
use crate::policy::Direction;
use crate::pool::Pool;
use crate::segment::{Segments, SegmentsError};
use crate::time::Time;
use crate::{checksum, packet};

/// Free bytes in front of a new frame: an outer tag and the headers of a tunnel go there without moving the frame.
pub const HEADROOM: usize = 64;

/// Longest frame: an IP packet of 65,535 bytes behind an Ethernet header and two tags.
pub const MAX_FRAME: usize = 65_535 + 14 + 8;

/// What a sender left to whoever puts the frame on a wire, with the meaning of virtio-net's header.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// A transport checksum is missing: the field holds the sum of the pseudo-header only.
    pub needs_checksum: Option<NeedsChecksum>,
    /// The frame stands for several packets.
    pub segmentation: Option<Segmentation>,
    /// Somebody has checked the transport checksum.
    pub checksum_valid: bool,
}

/// Where a missing checksum goes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct NeedsChecksum {
    /// Bytes from the frame's start to the first one summed.
    pub start: u16,
    /// Bytes from `start` to the checksum field.
    pub offset: u16,
}

/// How a frame is cut into packets.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// The transport.
    pub kind: SegmentationKind,
    /// Payload bytes of each packet but the last.
    pub size: u16,
    /// Bytes of all headers: as the sender says, and from the switch's ingress on as they are.
    pub header_len: u16,
}

/// A transport that can be segmented.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum SegmentationKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either: each packet is a datagram of its own (UDP segmentation, not fragmentation).
    Udp,
}

/// One Ethernet frame, without its check sequence, owned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    buffer: Vec<u8>,
    start: usize,
    /// What is left to do.
    pub offload: Offload,
    /// Where it was seen, if it is a copy for a mirror port.
    pub captured: Option<Captured>,
}

/// Where and when a frame was seen.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The port.
    pub port: PortId,
    /// Into the switch, or out of it.
    pub direction: Direction,
    /// When.
    pub time: Time,
}

impl Frame {
    /// A frame with a copy of `bytes`, in a buffer of its own. [`Pool::copy`] saves the allocation.
    pub fn new(bytes: &[u8]) -> Frame {
        let mut buffer = Vec::with_capacity(bytes.len().saturating_add(HEADROOM));
        buffer.resize(HEADROOM, 0);
        buffer.extend_from_slice(bytes);
        Frame::from_buffer(buffer, HEADROOM)
    }

    pub(crate) fn from_buffer(buffer: Vec<u8>, start: usize) -> Frame {
        Frame {
            start: start.min(buffer.len()),
            buffer,
            offload: Offload::default(),
            captured: None,
        }
    }

    pub(crate) fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }

    /// The frame's bytes from the destination address on.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// The same, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.get_mut(self.start..).unwrap_or_default()
    }

    /// Bytes of the frame.
    pub fn len(&self) -> usize {
        self.buffer.len().saturating_sub(self.start)
    }

    /// Whether there is not a byte in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory that the frame occupies, for limits on queues.
    pub fn memory(&self) -> usize {
        self.buffer.capacity()
    }

    /// Cuts the frame to `len` bytes if it is longer.
    pub fn truncate(&mut self, len: usize) {
        self.buffer.truncate(self.start.saturating_add(len));
    }

    /// Appends zeros up to `len` bytes if it is shorter.
    pub fn pad(&mut self, len: usize) {
        if self.len() < len {
            self.buffer.resize(self.start.saturating_add(len), 0);
        }
    }

    /// Puts `count` bytes in front of the frame, which are left to the caller to fill. The offload's positions move along.
    pub fn push_front(&mut self, count: usize) {
        if self.start >= count {
            self.start -= count;
        } else {
            let more = HEADROOM.max(count);
            self.buffer.splice(0..0, std::iter::repeat_n(0, more));
            self.start = self.start.saturating_add(more).saturating_sub(count);
        }
        self.shift(|at| at.saturating_add(u16::try_from(count).unwrap_or(u16::MAX)));
    }

    /// Takes `count` bytes from the front of the frame, at most all of it. The offload's positions move along.
    pub fn pop_front(&mut self, count: usize) {
        let count = count.min(self.len());
        self.start = self.start.saturating_add(count);
        self.shift(|at| at.saturating_sub(u16::try_from(count).unwrap_or(u16::MAX)));
    }

    fn shift(&mut self, to: impl Fn(u16) -> u16) {
        if let Some(missing) = &mut self.offload.needs_checksum {
            missing.start = to(missing.start);
        }
        if let Some(segmentation) = &mut self.offload.segmentation {
            segmentation.header_len = to(segmentation.header_len);
        }
    }

    /// Puts an 802.1Q tag behind the addresses.
    pub fn push_tag(&mut self, protocol: u16, control: u16) {
        self.push_front(4);
        let bytes = self.bytes_mut();
        if bytes.len() >= 16 {
            bytes.copy_within(4..16, 0);
            packet::put_u16(bytes, 12, protocol);
            packet::put_u16(bytes, 14, control);
        }
    }

    /// Takes the outermost tag away, if the frame is long enough to have one.
    pub fn pop_tag(&mut self) {
        let bytes = self.bytes_mut();
        if bytes.len() >= 18 {
            bytes.copy_within(0..12, 4);
            self.pop_front(4);
        }
    }

    /// Computes the missing checksum, if one is missing. A position outside the frame leaves the frame as it is and
    /// answers false.
    pub fn finish_checksum(&mut self) -> bool {
        let Some(NeedsChecksum { start, offset }) = self.offload.needs_checksum.take() else {
            return true;
        };
        let field = usize::from(start).saturating_add(usize::from(offset));
        let bytes = self.bytes_mut();
        let Some(sum) = bytes.get(usize::from(start)..).map(checksum::sum) else {
            return false;
        };
        // A computed UDP checksum of zero is sent as all ones (RFC 768); for TCP both mean the same.
        let value = match checksum::fold(sum) {
            0xffff => 0xffff,
            folded => !folded,
        };
        packet::put_u16(bytes, field, value)
    }

    /// Cuts the frame into the packets that it stands for, with complete checksums, one by one.
    ///
    /// # Errors
    /// The frame is not what its offload says, or the packets would be uselessly small.
    pub fn segments(self) -> Result<Segments, SegmentsError> {
        Segments::new(self)
    }

    /// Makes of the frame what a port with `capabilities` takes, in software where needed: each packet goes to `sink`.
    /// False if the offload makes no sense.
    pub fn lower(
        mut self,
        capabilities: crate::Capabilities,
        pool: &mut Pool,
        mut sink: impl FnMut(Frame),
    ) -> bool {
        if !capabilities.takes(&self.offload) && self.offload.segmentation.is_some() {
            let Ok(mut segments) = self.segments() else {
                return false;
            };
            while let Some(segment) = segments.next(pool) {
                sink(segment);
            }
            pool.put(segments.into_frame());
            return true;
        }
        if !capabilities.checksum && !self.finish_checksum() {
            return false;
        }
        sink(self);
        true
    }
}
