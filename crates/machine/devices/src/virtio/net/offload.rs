//! The header before each frame (`struct virtio_net_hdr`, virtio 1.2, 5.1.6), read and written.

use strata_switch::{NeedsChecksum, Offload, Segmentation, SegmentationKind};

/// Its bytes.
pub(super) const HEADER_BYTES: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;

/// Reads a driver's header of a frame of `len` bytes; none if it cannot be right.
pub(super) fn parse(header: &[u8; HEADER_BYTES], len: usize) -> Option<Offload> {
    let &[flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = header;
    let (start, offset) = (u16::from_le_bytes([c0, c1]), u16::from_le_bytes([o0, o1]));
    let needs_checksum = (flags & NEEDS_CSUM != 0).then_some(NeedsChecksum { start, offset });
    if needs_checksum.is_some() && usize::from(start) + usize::from(offset) + 2 > len {
        return None;
    }
    let kind = match gso {
        GSO_NONE => None,
        GSO_TCPV4 => Some(SegmentationKind::Tcp4),
        GSO_TCPV6 => Some(SegmentationKind::Tcp6),
        GSO_UDP_L4 => Some(SegmentationKind::Udp),
        _ => return None,
    };
    let size = u16::from_le_bytes([s0, s1]);
    if kind.is_some() && (needs_checksum.is_none() || size == 0) {
        return None;
    }
    Some(Offload {
        needs_checksum,
        segmentation: kind.map(|kind| Segmentation {
            kind,
            size,
            header_len: u16::from_le_bytes([h0, h1]),
        }),
        checksum_valid: false,
    })
}

/// The header for a frame that lies in `buffers` buffers.
pub(super) fn encode(offload: &Offload, buffers: u16) -> [u8; HEADER_BYTES] {
    let (flags, start, offset) = match (offload.needs_checksum, offload.checksum_valid) {
        (Some(missing), _) => (NEEDS_CSUM, missing.start, missing.offset),
        (None, true) => (DATA_VALID, 0, 0),
        (None, false) => (0, 0, 0),
    };
    let (gso, size, headers) = match offload.segmentation {
        None => (GSO_NONE, 0, 0),
        Some(how) => {
            let gso = match how.kind {
                SegmentationKind::Tcp4 => GSO_TCPV4,
                SegmentationKind::Tcp6 => GSO_TCPV6,
                SegmentationKind::Udp => GSO_UDP_L4,
            };
            (gso, how.size, how.header_len)
        }
    };
    let [h0, h1] = headers.to_le_bytes();
    let [s0, s1] = size.to_le_bytes();
    let [c0, c1] = start.to_le_bytes();
    let [o0, o1] = offset.to_le_bytes();
    let [b0, b1] = buffers.to_le_bytes();
    [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, b0, b1]
}
