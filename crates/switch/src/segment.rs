//! Segmentation in software: one large TCP or UDP frame becomes the packets that it stands for.

use crate::frame::{Frame, Segmentation, SegmentationKind};
use crate::packet::{self, Ip, protocol};
use crate::pool::Pool;
use crate::{checksum, frame};
use std::net::IpAddr;

/// Smallest payload per packet. Less is no network's: a guest that asks for it wants us to do work.
const SIZE_MIN: u16 = 48;

/// Why a frame cannot be segmented.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentsError {
    /// It says that it needs none.
    #[error("the frame asks for no segmentation")]
    NotAsked,
    /// Packets of a few bytes.
    #[error("packets of {0} bytes of payload are too small")]
    TooSmall(u16),
    /// The headers are not those of the transport that was named.
    #[error("the frame's headers are not what its offload says")]
    WrongHeaders,
}

/// What a frame's headers are, whatever its offload says.
#[derive(Debug)]
struct Layout {
    ip: Ip,
    /// Bytes of all headers.
    headers: usize,
    /// Bytes from the transport's header to its checksum.
    field: u16,
}

/// Finds the headers of a frame that is one whole packet of TCP or UDP.
fn layout(bytes: &[u8]) -> Option<Layout> {
    let (_, at) = packet::payload(bytes)?;
    let ip = packet::ip(bytes, at).ok()?;
    let (len, field) = match ip.protocol {
        protocol::TCP => {
            let words = bytes.get(ip.transport.checked_add(12)?)? >> 4;
            (usize::from(words) * 4, 16)
        }
        protocol::UDP => (8, 6),
        _ => return None,
    };
    let headers = ip.transport.checked_add(len)?;
    let whole = headers <= ip.end && ip.fragment.is_none() && len > usize::from(field);
    whole.then_some(Layout { ip, headers, field })
}

/// The layout of a frame that asks for segmentation.
fn segmentable(frame: &Frame) -> Result<(Segmentation, Layout), SegmentsError> {
    let how = frame.offload.segmentation.ok_or(SegmentsError::NotAsked)?;
    if how.size < SIZE_MIN {
        return Err(SegmentsError::TooSmall(how.size));
    }
    let layout = layout(frame.bytes()).ok_or(SegmentsError::WrongHeaders)?;
    let fits = matches!(
        (how.kind, layout.ip.protocol, layout.ip.source),
        (SegmentationKind::Tcp4, protocol::TCP, IpAddr::V4(_))
            | (SegmentationKind::Tcp6, protocol::TCP, IpAddr::V6(_))
            | (SegmentationKind::Udp, protocol::UDP, _)
    );
    fits.then_some((how, layout))
        .ok_or(SegmentsError::WrongHeaders)
}

/// Makes of a sender's offload one that a receiver may believe: positions and lengths are those of the frame's headers. A
/// checksum that is neither TCP's nor UDP's is computed. False if the offload makes no sense.
pub(crate) fn check(frame: &mut Frame) -> bool {
    let Some(missing) = frame.offload.needs_checksum else {
        // A segmented frame has no checksum that could be right.
        return frame.offload.segmentation.is_none();
    };
    let at = |layout: &Layout| {
        usize::from(missing.start) == layout.ip.transport && missing.offset == layout.field
    };
    if frame.offload.segmentation.is_none() {
        return layout(frame.bytes()).is_some_and(|layout| at(&layout))
            || usize::from(missing.start) >= packet::ETHERNET_HEADER && frame.finish_checksum();
    }
    let Ok((_, layout)) = segmentable(frame) else {
        return false;
    };
    let (Some(how), Ok(headers)) = (
        &mut frame.offload.segmentation,
        u16::try_from(layout.headers),
    ) else {
        return false;
    };
    how.header_len = headers;
    at(&layout)
}

/// Yields the packets of a frame, one at a time, so that a large frame never costs more than its own memory.
#[derive(Debug)]
pub struct Segments {
    whole: Frame,
    ip: Ip,
    kind: SegmentationKind,
    /// Bytes of all headers.
    headers: usize,
    size: usize,
    /// Payload bytes already given out.
    done: usize,
    count: u16,
    finished: bool,
}

impl Segments {
    pub(crate) fn new(whole: Frame) -> Result<Segments, SegmentsError> {
        let (how, Layout { ip, headers, .. }) = segmentable(&whole)?;
        Ok(Segments {
            ip,
            kind: how.kind,
            headers,
            size: usize::from(how.size),
            done: 0,
            count: 0,
            finished: false,
            whole,
        })
    }

    /// The next packet: complete, nothing left to do to it.
    pub fn next(&mut self, pool: &mut Pool) -> Option<Frame> {
        if self.finished {
            return None;
        }
        let bytes = self.whole.bytes();
        let payload = bytes.get(self.headers..self.ip.end)?;
        let rest = payload.get(self.done..)?;
        let part = rest.get(..self.size.min(rest.len()))?;
        let last = part.len() == rest.len();
        let mut segment = pool.frame(self.headers.saturating_add(part.len()));
        packet::put(segment.bytes_mut(), 0, bytes.get(..self.headers)?);
        packet::put(segment.bytes_mut(), self.headers, part);
        self.amend(segment.bytes_mut(), last);
        segment.offload = frame::Offload {
            checksum_valid: true,
            ..frame::Offload::default()
        };
        self.done = self.done.saturating_add(part.len());
        self.count = self.count.wrapping_add(1);
        self.finished = last;
        Some(segment)
    }

    /// The frame itself, for its buffer to be used again.
    pub fn into_frame(self) -> Frame {
        self.whole
    }

    /// Makes lengths, numbers, flags and checksums those of one packet.
    fn amend(&self, segment: &mut [u8], last: bool) {
        let (header, transport) = (self.ip.header, self.ip.transport);
        let total = segment.len().saturating_sub(header);
        let len = segment.len().saturating_sub(transport);
        match self.ip.source {
            IpAddr::V4(_) => {
                packet::put_u16(segment, header + 2, total as u16);
                let id = packet::get_u16(segment, header + 4).unwrap_or(0);
                packet::put_u16(segment, header + 4, id.wrapping_add(self.count));
                packet::put_u16(segment, header + 10, 0);
                let sum = segment.get(header..transport).map_or(0, checksum::of);
                packet::put_u16(segment, header + 10, sum);
            }
            IpAddr::V6(_) => {
                packet::put_u16(segment, header + 4, total.saturating_sub(40) as u16);
            }
        }
        let field = match self.kind {
            SegmentationKind::Udp => {
                packet::put_u16(segment, transport + 4, len as u16);
                transport + 6
            }
            SegmentationKind::Tcp4 | SegmentationKind::Tcp6 => {
                let number = packet::get_u32(segment, transport + 4).unwrap_or(0);
                let number = number.wrapping_add(self.done as u32);
                packet::put(segment, transport + 4, &number.to_be_bytes());
                if let Some(flags) = segment.get_mut(transport + 13) {
                    // FIN and PSH belong to the last packet, CWR to the first (RFC 3168 section 6.1.2).
                    if !last {
                        *flags &= !0x09;
                    }
                    if self.done > 0 {
                        *flags &= !0x80;
                    }
                }
                transport + 16
            }
        };
        packet::put_u16(segment, field, 0);
        let (source, size) = packet::octets(self.ip.source);
        let (destination, _) = packet::octets(self.ip.destination);
        let pseudo = checksum::pseudo_header(
            source.get(..size).unwrap_or_default(),
            destination.get(..size).unwrap_or_default(),
            self.ip.protocol,
            len,
        );
        let data = segment.get(transport..).map_or(0, checksum::sum);
        let value = match checksum::fold(pseudo + data) {
            0xffff => 0xffff,
            folded => !folded,
        };
        packet::put_u16(segment, field, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::NeedsChecksum;
    use crate::gateway::reply::{self, Addresses};
    use crate::packet::Mac;
    use crate::{Capabilities, Offload};
    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{IpAddress, Ipv4Packet, TcpPacket, TcpRepr, UdpPacket, UdpRepr};

    /// A frame as a guest's driver makes it: the checksum field holds the pseudo-header's sum.
    fn large(kind: SegmentationKind, v6: bool, len: usize, size: u16, tags: usize) -> Frame {
        let mut pool = Pool::new(4);
        let address = |number: u8| -> IpAddr {
            if v6 {
                IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, number])
            } else {
                IpAddr::from([10, 0, 0, number])
            }
        };
        let way = Addresses {
            source_mac: Mac::from_bytes(&[2, 0, 0, 0, 0, 1]),
            destination_mac: Mac::from_bytes(&[2, 0, 0, 0, 0, 2]),
            source: address(1),
            destination: address(2),
        };
        let tcp = kind != SegmentationKind::Udp;
        let (protocol, header, field) = if tcp {
            (protocol::TCP, 32, 16)
        } else {
            (protocol::UDP, 8, 6)
        };
        let (mut frame, at) = reply::ip(&mut pool, way, protocol, 64, header + len).unwrap();
        let bytes = frame.bytes_mut();
        if tcp {
            packet::put(
                bytes,
                at,
                &[
                    0, 80, 0, 81, 0xff, 0xff, 0xff, 0, 0, 0, 0, 9, 0x80, 0x99, 1, 0,
                ],
            );
            packet::put(bytes, at + 20, &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            packet::put(bytes, at, &[0, 80, 0, 81]);
            packet::put_u16(bytes, at + 4, (header + len) as u16);
        }
        for index in 0..len {
            bytes[at + header + index] = (index * 13 % 256) as u8;
        }
        let (source, size_of) = packet::octets(way.source);
        let (destination, _) = packet::octets(way.destination);
        let pseudo = checksum::pseudo_header(
            &source[..size_of],
            &destination[..size_of],
            protocol,
            header + len,
        );
        packet::put_u16(bytes, at + field, checksum::fold(pseudo));
        frame.offload = Offload {
            needs_checksum: Some(NeedsChecksum {
                start: at as u16,
                offset: field as u16,
            }),
            segmentation: Some(Segmentation {
                kind,
                size,
                header_len: (at + header) as u16,
            }),
            checksum_valid: false,
        };
        for tag in 0..tags {
            frame.push_tag(packet::ethertype::VLAN, tag as u16 + 5);
        }
        frame
    }

    proptest! {
        /// Each packet is whole and right by another library's account, and together they are the payload.
        #[test]
        fn segments_are_what_the_frame_stands_for(
            kind in prop_oneof![Just(SegmentationKind::Tcp4), Just(SegmentationKind::Tcp6), Just(SegmentationKind::Udp)],
            udp6 in any::<bool>(),
            len in 1usize..60_000,
            size in SIZE_MIN..9000,
            tags in 0usize..3,
        ) {
            let v6 = match kind {
                SegmentationKind::Tcp4 => false,
                SegmentationKind::Tcp6 => true,
                SegmentationKind::Udp => udp6,
            };
            let frame = large(kind, v6, len, size, tags);
            let tagged = frame.bytes()[..14 + 4 * tags].to_vec();
            let mut pool = Pool::new(64);
            let mut segments = frame.segments().unwrap();
            let (mut payload, mut count) = (Vec::new(), 0usize);
            while let Some(segment) = segments.next(&mut pool) {
                let bytes = segment.bytes();
                prop_assert_eq!(&bytes[..14 + 4 * tags], &tagged[..]);
                let (_, at) = packet::payload(bytes).unwrap();
                let ip = packet::ip(bytes, at).unwrap();
                prop_assert_eq!(ip.end, bytes.len());
                if !v6 {
                    let header = Ipv4Packet::new_checked(&bytes[at..]).unwrap();
                    prop_assert!(header.verify_checksum());
                    prop_assert_eq!(usize::from(header.ident()), count);
                }
                let (source, destination) = (IpAddress::from(ip.source), IpAddress::from(ip.destination));
                let transport = ip.payload(bytes);
                let data = if kind == SegmentationKind::Udp {
                    let packet = UdpPacket::new_checked(transport).unwrap();
                    UdpRepr::parse(&packet, &source, &destination, &ChecksumCapabilities::default()).unwrap();
                    packet.payload()
                } else {
                    let packet = TcpPacket::new_checked(transport).unwrap();
                    TcpRepr::parse(&packet, &source, &destination, &ChecksumCapabilities::default()).unwrap();
                    let last = payload.len() + packet.payload().len() == len;
                    prop_assert_eq!(packet.fin() && packet.psh(), last);
                    prop_assert_eq!(packet.cwr(), count == 0);
                    prop_assert_eq!(packet.seq_number().0 as u32, 0xffff_ff00u32.wrapping_add(payload.len() as u32));
                    packet.payload()
                };
                prop_assert!(data.len() == usize::from(size) || payload.len() + data.len() == len);
                payload.extend_from_slice(data);
                count += 1;
                pool.put(segment);
            }
            prop_assert_eq!(count, len.div_ceil(usize::from(size)));
            prop_assert!(payload.iter().enumerate().all(|(at, byte)| *byte == (at * 13 % 256) as u8));
        }

        /// A frame of any bytes with any offload makes nobody fall.
        #[test]
        fn nonsense_is_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            start in any::<u16>(),
            offset in any::<u16>(),
            size in any::<u16>(),
        ) {
            for kind in [SegmentationKind::Tcp4, SegmentationKind::Tcp6, SegmentationKind::Udp] {
                let mut frame = Frame::new(&bytes);
                frame.offload.needs_checksum = Some(NeedsChecksum { start, offset });
                frame.offload.segmentation = Some(Segmentation { kind, size, header_len: start });
                let mut whole = frame.clone();
                frame.lower(Capabilities::default(), &mut Pool::new(4), |_| ());
                whole.finish_checksum();
            }
        }
    }

    #[test]
    fn a_missing_checksum_is_finished() {
        for (kind, v6) in [
            (SegmentationKind::Udp, false),
            (SegmentationKind::Tcp6, true),
        ] {
            let mut frame = large(kind, v6, 999, 1000, 1);
            frame.offload.segmentation = None;
            assert!(frame.finish_checksum());
            assert_eq!(frame.offload.needs_checksum, None);
            let (_, at) = packet::payload(frame.bytes()).unwrap();
            let ip = packet::ip(frame.bytes(), at).unwrap();
            let (source, destination) =
                (IpAddress::from(ip.source), IpAddress::from(ip.destination));
            let transport = ip.payload(frame.bytes());
            let right = match kind {
                SegmentationKind::Udp => UdpPacket::new_checked(transport)
                    .unwrap()
                    .verify_checksum(&source, &destination),
                _ => TcpPacket::new_checked(transport)
                    .unwrap()
                    .verify_checksum(&source, &destination),
            };
            assert!(right);
        }
    }

    #[test]
    fn an_offload_is_what_the_headers_say() {
        let good = || large(SegmentationKind::Udp, false, 5000, 1000, 1);
        let mut frame = good();
        frame.offload.segmentation.as_mut().unwrap().header_len = 3;
        assert!(check(&mut frame));
        assert_eq!(frame, good(), "the length is the computed one");
        let changes: [fn(&mut Offload); 5] = [
            |offload| offload.needs_checksum = None,
            |offload| offload.needs_checksum.as_mut().unwrap().start += 2,
            |offload| offload.needs_checksum.as_mut().unwrap().offset += 2,
            |offload| offload.segmentation.as_mut().unwrap().size = SIZE_MIN - 1,
            |offload| offload.segmentation.as_mut().unwrap().kind = SegmentationKind::Tcp4,
        ];
        for change in changes {
            let mut frame = good();
            change(&mut frame.offload);
            assert!(!check(&mut frame), "{:?}", frame.offload);
        }
        // A checksum alone stays missing where it is TCP's or UDP's, and is computed elsewhere.
        let mut frame = good();
        frame.offload.segmentation = None;
        assert!(check(&mut frame) && frame.offload.needs_checksum.is_some());
        frame.offload.needs_checksum.as_mut().unwrap().offset = 8;
        assert!(check(&mut frame) && frame.offload.needs_checksum.is_none());
        for (start, offset) in [(13, 6), (60, u16::MAX), (u16::MAX, 0)] {
            frame.offload.needs_checksum = Some(NeedsChecksum { start, offset });
            assert!(!check(&mut frame));
        }
    }

    #[test]
    fn packets_of_no_size_are_refused() {
        let frame = large(SegmentationKind::Tcp4, false, 1000, 1, 0);
        assert_eq!(frame.segments().unwrap_err(), SegmentsError::TooSmall(1));
        let frame = large(SegmentationKind::Tcp4, true, 1000, 500, 0);
        assert_eq!(frame.segments().unwrap_err(), SegmentsError::WrongHeaders);
    }
}
