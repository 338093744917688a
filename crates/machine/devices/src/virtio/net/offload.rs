//! Frames, and what is left to be done to them: `struct virtio_net_hdr` (virtio 1.2, 5.1.6) as values.

use super::host::NetOffloads;

/// The header before each frame in the driver's buffers.
pub(super) const HEADER_BYTES: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// A frame from Ethernet's destination address on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetFrame {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What is left to be done.
    pub offload: Offload,
}

/// What is left to be done to a frame by whoever sends it on a wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offload {
    /// Where the internet checksum over the frame's rest begins, and where from there it goes; the field holds the sum
    /// of the pseudo header. Both are inside the frame.
    pub checksum: Option<(u16, u16)>,
    /// The checksums were seen to be right by the sender's side.
    pub checked: bool,
    /// Whether and as what it is to be cut into segments. Never without `checksum`.
    pub gso: Gso,
    /// Bytes of payload in a segment; not zero if there are segments.
    pub segment: u16,
    /// Bytes of all headers as the sender says. A hint.
    pub headers: u16,
    /// The first segment has TCP's CWR set.
    pub ecn: bool,
}

/// How a frame is to be cut into segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Gso {
    /// It is one.
    #[default]
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams.
    Udp,
}

impl Offload {
    /// Reads a driver's header of a frame of `len` bytes; none if it cannot be right.
    pub(super) fn parse(header: &[u8; HEADER_BYTES], len: usize) -> Option<Offload> {
        let &[flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = header;
        let (start, offset) = (u16::from_le_bytes([c0, c1]), u16::from_le_bytes([o0, o1]));
        let checksum = (flags & NEEDS_CSUM != 0).then_some((start, offset));
        if checksum.is_some() && usize::from(start) + usize::from(offset) + 2 > len {
            return None;
        }
        let gso = match gso_type & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCPV4 => Gso::Tcp4,
            GSO_TCPV6 => Gso::Tcp6,
            GSO_UDP_L4 => Gso::Udp,
            _ => return None,
        };
        let segment = u16::from_le_bytes([s0, s1]);
        if gso != Gso::None && (checksum.is_none() || segment == 0) {
            return None;
        }
        Some(Offload {
            checksum,
            checked: false,
            gso,
            segment: if gso == Gso::None { 0 } else { segment },
            headers: u16::from_le_bytes([h0, h1]),
            ecn: gso_type & GSO_ECN != 0 && gso != Gso::None,
        })
    }

    /// The header for a frame that lies in `buffers` buffers.
    pub(super) fn encode(&self, buffers: u16) -> [u8; HEADER_BYTES] {
        let (flags, (start, offset)) = match (self.checksum, self.checked) {
            (Some(places), _) => (NEEDS_CSUM, places),
            (None, true) => (DATA_VALID, (0, 0)),
            (None, false) => (0, (0, 0)),
        };
        let gso = match self.gso {
            Gso::None => GSO_NONE,
            Gso::Tcp4 => GSO_TCPV4,
            Gso::Tcp6 => GSO_TCPV6,
            Gso::Udp => GSO_UDP_L4,
        };
        let gso = if self.ecn { gso | GSO_ECN } else { gso };
        let [h0, h1] = self.headers.to_le_bytes();
        let [s0, s1] = self.segment.to_le_bytes();
        let [c0, c1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        let [b0, b1] = buffers.to_le_bytes();
        [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, b0, b1]
    }
}

impl NetFrame {
    /// Makes the frame one that a guest with these offloads takes; false if that is not possible.
    pub(super) fn fit(&mut self, offloads: &NetOffloads) -> bool {
        let taken = match self.offload.gso {
            Gso::None => true,
            Gso::Tcp4 => offloads.tcp4,
            Gso::Tcp6 => offloads.tcp6,
            Gso::Udp => offloads.udp,
        };
        if !taken {
            return false;
        }
        if !offloads.checksum {
            self.offload.checked = false;
            if let Some((start, offset)) = self.offload.checksum.take() {
                return complete_checksum(&mut self.bytes, start, offset).is_some();
            }
        }
        true
    }
}

/// Puts the internet checksum (RFC 1071) of everything from `start` on into its place.
fn complete_checksum(bytes: &mut [u8], start: u16, offset: u16) -> Option<()> {
    let covered = bytes.get_mut(usize::from(start)..)?;
    let mut sum: u64 = 0;
    let (pairs, last) = covered.as_chunks::<2>();
    for pair in pairs {
        sum += u64::from(u16::from_be_bytes(*pair));
    }
    if let [byte] = last {
        sum += u64::from(u16::from_be_bytes([*byte, 0]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Zero would mean "none" in UDP; both ways of writing it are equal elsewhere.
    let sum = match !(sum as u16) {
        0 => 0xffff,
        sum => sum,
    };
    let place = covered.get_mut(usize::from(offset)..)?;
    let (place, _) = place.split_first_chunk_mut::<2>()?;
    *place = sum.to_be_bytes();
    Some(())
}
