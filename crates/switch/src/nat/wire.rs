//! Frames for the guest: Ethernet, IP and transport headers around a payload that is there already.

use std::net::IpAddr;

use crate::checksum;
use crate::frame::{Frame, NeedsChecksum, Segmentation, SegmentationKind};
use crate::packet::{self, ETHERNET_HEADER, Mac, ethertype, protocol};
use crate::pool::Pool;

/// Bytes of a TCP header without options.
pub const TCP_HEADER: usize = 20;
/// Bytes of a UDP header.
pub const UDP_HEADER: usize = 8;
/// Bytes of an ICMP echo header.
pub const ECHO_HEADER: usize = 8;
/// What routers begin with.
const HOP_LIMIT: u8 = 64;

/// TCP flags (RFC 9293 section 3.1).
pub mod flag {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Sequence numbers begin.
    pub const SYN: u8 = 2;
    /// The connection is gone.
    pub const RST: u8 = 4;
    /// Give it to the program at once.
    pub const PSH: u8 = 8;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 16;
}

/// Between whom a frame goes.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// The gateway's Ethernet address.
    pub from_mac: Mac,
    /// The guest's.
    pub to_mac: Mac,
    /// Whom the guest takes for the sender. Of the same family as `to`.
    pub from: IpAddr,
    /// The guest.
    pub to: IpAddr,
}

impl Ends {
    /// Bytes of the Ethernet and IP headers.
    pub fn headers(&self) -> usize {
        ETHERNET_HEADER + if self.to.is_ipv4() { 20 } else { 40 }
    }

    fn pseudo_header(&self, kind: u8, len: usize) -> u64 {
        let ((from, count), (to, _)) = (packet::octets(self.from), packet::octets(self.to));
        let from = from.get(..count).unwrap_or_default();
        let to = to.get(..count).unwrap_or_default();
        checksum::pseudo_header(from, to, kind, len)
    }

    /// Fills in Ethernet and IP headers of a frame that carries `len` bytes of `kind` behind them.
    fn fill(&self, frame: &mut [u8], kind: u8, len: usize) {
        packet::put(frame, 0, &self.to_mac.0);
        packet::put(frame, 6, &self.from_mac.0);
        let at = ETHERNET_HEADER;
        match (self.from, self.to) {
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                packet::put_u16(frame, 12, ethertype::IPV6);
                packet::put(frame, at, &[0x60, 0, 0, 0]);
                packet::put_u16(frame, at + 4, len as u16);
                packet::put(frame, at + 6, &[kind, HOP_LIMIT]);
                packet::put(frame, at + 8, &from.octets());
                packet::put(frame, at + 24, &to.octets());
            }
            (from, to) => {
                packet::put_u16(frame, 12, ethertype::IPV4);
                let total = ((len + 20) as u16).to_be_bytes();
                // Nothing is fragmented on the way to the guest, so identification means nothing (RFC 6864).
                let [high, low] = total;
                packet::put(frame, at, &[0x45, 0, high, low, 0, 0, 0x40, 0]);
                packet::put(frame, at + 8, &[HOP_LIMIT, kind, 0, 0]);
                for (place, address) in [(at + 12, from), (at + 16, to)] {
                    if let IpAddr::V4(address) = address {
                        packet::put(frame, place, &address.octets());
                    }
                }
                let sum = frame.get(at..at + 20).map_or(0, checksum::of);
                packet::put_u16(frame, at + 10, sum);
            }
        }
    }
}

/// What a TCP segment says besides its payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct Segment<'a> {
    /// The sender's port.
    pub from: u16,
    /// The guest's port.
    pub to: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// See [`flag`].
    pub flags: u8,
    /// Window as it is on the wire.
    pub window: u16,
    /// Options, a multiple of four bytes.
    pub options: &'a [u8],
    /// Payload bytes of each packet if the frame stands for several.
    pub mss: u16,
}

/// Makes of `frame`, which has `len` bytes of payload behind room for all headers without options, a TCP segment. The
/// checksum is left to do.
pub fn tcp(frame: &mut Frame, ends: &Ends, segment: &Segment<'_>, len: usize) {
    let at = ends.headers();
    let header = TCP_HEADER + segment.options.len();
    frame.truncate(at + header + len);
    let bytes = frame.bytes_mut();
    ends.fill(bytes, protocol::TCP, header + len);
    packet::put_u16(bytes, at, segment.from);
    packet::put_u16(bytes, at + 2, segment.to);
    packet::put(bytes, at + 4, &segment.seq.to_be_bytes());
    packet::put(bytes, at + 8, &segment.ack.to_be_bytes());
    packet::put(bytes, at + 12, &[(header as u8 / 4) << 4, segment.flags]);
    packet::put_u16(bytes, at + 14, segment.window);
    let sum = ends.pseudo_header(protocol::TCP, header + len);
    packet::put_u16(bytes, at + 16, checksum::fold(sum));
    packet::put_u16(bytes, at + 18, 0);
    packet::put(bytes, at + TCP_HEADER, segment.options);
    frame.offload.needs_checksum = Some(NeedsChecksum {
        start: at as u16,
        offset: 16,
    });
    if len > usize::from(segment.mss) {
        frame.offload.segmentation = Some(Segmentation {
            kind: match ends.to {
                IpAddr::V4(_) => SegmentationKind::Tcp4,
                IpAddr::V6(_) => SegmentationKind::Tcp6,
            },
            size: segment.mss,
            header_len: (at + header) as u16,
        });
    }
}

/// A TCP segment without payload.
pub fn tcp_control(pool: &mut Pool, ends: &Ends, segment: &Segment<'_>) -> Frame {
    let mut frame = pool.frame(ends.headers() + TCP_HEADER + segment.options.len());
    tcp(&mut frame, ends, segment, 0);
    frame
}

/// Makes of `frame`, which has `len` bytes of payload behind room for all headers, a UDP datagram. The checksum is left
/// to do.
pub fn udp(frame: &mut Frame, ends: &Ends, from: u16, to: u16, len: usize) {
    let at = ends.headers();
    frame.truncate(at + UDP_HEADER + len);
    let bytes = frame.bytes_mut();
    ends.fill(bytes, protocol::UDP, UDP_HEADER + len);
    packet::put_u16(bytes, at, from);
    packet::put_u16(bytes, at + 2, to);
    packet::put_u16(bytes, at + 4, (UDP_HEADER + len) as u16);
    let sum = ends.pseudo_header(protocol::UDP, UDP_HEADER + len);
    packet::put_u16(bytes, at + 6, checksum::fold(sum));
    frame.offload.needs_checksum = Some(NeedsChecksum {
        start: at as u16,
        offset: 6,
    });
}

/// Makes of `frame`, which has an ICMP message of `len` bytes behind room for the headers, a whole packet. The message's
/// checksum is computed.
pub fn icmp(frame: &mut Frame, ends: &Ends, len: usize) {
    let at = ends.headers();
    frame.truncate(at + len);
    let (kind, mut sum) = match ends.to {
        IpAddr::V4(_) => (protocol::ICMP, 0),
        IpAddr::V6(_) => (protocol::ICMPV6, ends.pseudo_header(protocol::ICMPV6, len)),
    };
    let bytes = frame.bytes_mut();
    ends.fill(bytes, kind, len);
    packet::put_u16(bytes, at + 2, 0);
    sum += bytes.get(at..).map_or(0, checksum::sum);
    packet::put_u16(bytes, at + 2, !checksum::fold(sum));
}

/// Tells the guest that a UDP datagram of its was refused: ICMP's "port unreachable" (RFC 792, RFC 4443).
pub fn port_unreachable(pool: &mut Pool, ends: &Ends, from: u16, to: u16) -> Frame {
    let at = ends.headers();
    let quoted = at - ETHERNET_HEADER + UDP_HEADER;
    let mut frame = pool.frame(at + 8 + quoted);
    let kind: [u8; 8] = match ends.to {
        IpAddr::V4(_) => [3, 3, 0, 0, 0, 0, 0, 0],
        IpAddr::V6(_) => [1, 4, 0, 0, 0, 0, 0, 0],
    };
    // The packet of the guest that it is about, as far as it has to be told again.
    let mut about = vec![0; at + UDP_HEADER];
    let back = Ends {
        from: ends.to,
        to: ends.from,
        ..*ends
    };
    back.fill(&mut about, protocol::UDP, UDP_HEADER);
    packet::put_u16(&mut about, at, to);
    packet::put_u16(&mut about, at + 2, from);
    packet::put_u16(&mut about, at + 4, UDP_HEADER as u16);
    let bytes = frame.bytes_mut();
    packet::put(bytes, at, &kind);
    packet::put(
        bytes,
        at + 8,
        about.get(ETHERNET_HEADER..).unwrap_or_default(),
    );
    icmp(&mut frame, ends, 8 + quoted);
    frame
}
