//! Segmentation in software: one large TCP or UDP frame becomes the packets that it stands for.

use crate::frame::{Frame, SegmentationKind};
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
        let how = whole.offload.segmentation.ok_or(SegmentsError::NotAsked)?;
        if how.size < SIZE_MIN {
            return Err(SegmentsError::TooSmall(how.size));
        }
        let bytes = whole.bytes();
        let (_, at) = packet::payload(bytes).ok_or(SegmentsError::WrongHeaders)?;
        let ip = packet::ip(bytes, at).map_err(|_| SegmentsError::WrongHeaders)?;
        let transport = match (how.kind, ip.protocol, ip.source) {
            (SegmentationKind::Tcp4, protocol::TCP, IpAddr::V4(_))
            | (SegmentationKind::Tcp6, protocol::TCP, IpAddr::V6(_)) => {
                let words = bytes.get(ip.transport.saturating_add(12)).map(|at| at >> 4);
                let len = usize::from(words.unwrap_or(0)) * 4;
                if len >= 20 { Some(len) } else { None }
            }
            (SegmentationKind::Udp, protocol::UDP, _) => Some(8),
            _ => None,
        };
        let headers = transport.and_then(|len| ip.transport.checked_add(len));
        let headers = headers
            .filter(|&headers| headers <= ip.end && ip.fragment.is_none())
            .ok_or(SegmentsError::WrongHeaders)?;
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
