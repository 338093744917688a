//! IP fragments: putting them together, and cutting a packet for a smaller MTU.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use crate::checksum;
use crate::frame::Frame;
use crate::packet::{self, ETHERNET_HEADER, Ip};
use crate::pool::Pool;
use crate::time::Time;

/// Packets that may be incomplete at a time; the oldest goes for a new one.
const PACKETS_MAX: usize = 64;
/// How long the parts of a packet may take (RFC 1122 section 3.3.2 and RFC 8200 section 4.5: 60 s; nobody waits that long).
const TIMEOUT: Duration = Duration::from_secs(15);
/// Parts of a packet.
const PARTS_MAX: usize = 128;
/// Bytes of an IPv6 fragment header.
const HEADER6: usize = 8;

#[derive(Debug)]
struct Partial {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    id: u32,
    begun: Time,
    /// Ethernet and IP headers of the first part.
    headers: Option<Vec<u8>>,
    data: Vec<u8>,
    /// Received ranges of `data`, disjoint.
    ranges: Vec<(usize, usize)>,
    total: Option<usize>,
}

/// Puts fragments together. Bounded: 64 packets of up to 64 KiB, 15 seconds each. A packet whose parts overlap is given
/// up (RFC 5722), for IPv4 too.
#[derive(Debug, Default)]
pub struct Reassembler {
    partial: VecDeque<Partial>,
}

impl Reassembler {
    /// Takes an untagged frame with its headers as [`packet::content`] found them. Gives a packet that is no fragment back
    /// at once, and a whole one when its last part has come.
    pub fn push(&mut self, frame: Frame, ip: Ip, now: Time, pool: &mut Pool) -> Option<Frame> {
        let Some(fragment) = ip.fragment else {
            return Some(frame);
        };
        while self
            .partial
            .front()
            .is_some_and(|one| now.since(one.begun) > TIMEOUT)
        {
            self.partial.pop_front();
        }
        let whole = self.add(&frame, ip, fragment, now);
        pool.put(frame);
        let at = whole?;
        let done = self.partial.remove(at)?;
        finish(done, pool)
    }

    /// Adds a part; the place of the packet if it is complete now.
    fn add(
        &mut self,
        frame: &Frame,
        ip: Ip,
        fragment: packet::Fragment,
        now: Time,
    ) -> Option<usize> {
        let place = self.partial.iter().position(|one| {
            one.id == fragment.id
                && one.source == ip.source
                && one.destination == ip.destination
                && (one.protocol == ip.protocol || ip.source.is_ipv6())
        });
        let place = place.unwrap_or_else(|| {
            if self.partial.len() >= PACKETS_MAX {
                self.partial.pop_front();
            }
            self.partial.push_back(Partial {
                source: ip.source,
                destination: ip.destination,
                protocol: ip.protocol,
                id: fragment.id,
                begun: now,
                headers: None,
                data: Vec::new(),
                ranges: Vec::new(),
                total: None,
            });
            self.partial.len() - 1
        });
        let one = self.partial.get_mut(place)?;
        if one.add(frame.bytes(), ip, fragment).is_none() {
            self.partial.remove(place);
            return None;
        }
        let received: usize = one.ranges.iter().map(|(start, end)| end - start).sum();
        (one.headers.is_some() && one.total == Some(received)).then_some(place)
    }
}

impl Partial {
    /// `None`: the parts contradict each other.
    fn add(&mut self, bytes: &[u8], ip: Ip, fragment: packet::Fragment) -> Option<()> {
        let part = ip.payload(bytes);
        let start = usize::from(fragment.offset);
        let end = start.checked_add(part.len()).filter(|&end| end <= 65_515)?;
        if fragment.more && (!part.len().is_multiple_of(8) || part.is_empty()) {
            return None;
        }
        if self.ranges.contains(&(start, end)) {
            // The network may deliver twice.
            return Some(());
        }
        let overlaps = self
            .ranges
            .iter()
            .any(|&(from, to)| start < to && from < end);
        if overlaps || self.ranges.len() >= PARTS_MAX {
            return None;
        }
        if !fragment.more && self.total.replace(end).is_some_and(|total| total != end) {
            return None;
        }
        if self
            .total
            .is_some_and(|total| end > total || self.ranges.iter().any(|&(_, to)| to > total))
        {
            return None;
        }
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        packet::put(&mut self.data, start, part);
        self.ranges.push((start, end));
        if fragment.offset == 0 {
            let headers = match ip.source {
                IpAddr::V4(_) => ip.transport,
                IpAddr::V6(_) => ip.transport.checked_sub(HEADER6)?,
            };
            // Other extension headers before the fragment header would have to be kept apart: nobody sends them.
            if ip.source.is_ipv6() && headers != ip.header + 40 {
                return None;
            }
            self.protocol = ip.protocol;
            self.headers = Some(bytes.get(..headers)?.to_vec());
        }
        Some(())
    }
}

/// The whole packet in one frame.
fn finish(done: Partial, pool: &mut Pool) -> Option<Frame> {
    let headers = done.headers?;
    let data = done.data.get(..done.total?)?;
    let mut frame = pool.frame(headers.len() + data.len());
    let bytes = frame.bytes_mut();
    packet::put(bytes, 0, &headers);
    packet::put(bytes, headers.len(), data);
    let header = ETHERNET_HEADER;
    match done.source {
        IpAddr::V4(_) => {
            let total = u16::try_from(bytes.len().checked_sub(header)?).ok()?;
            packet::put_u16(bytes, header + 2, total);
            packet::put_u16(bytes, header + 6, 0);
            ipv4_checksum(bytes, header, headers.len());
        }
        IpAddr::V6(_) => {
            packet::put_u16(bytes, header + 4, u16::try_from(data.len()).ok()?);
            packet::put(bytes, header + 6, &[done.protocol]);
        }
    }
    Some(frame)
}

/// Writes the checksum of the IPv4 header between `header` and `end`.
pub(crate) fn ipv4_checksum(bytes: &mut [u8], header: usize, end: usize) {
    packet::put_u16(bytes, header + 10, 0);
    let sum = bytes.get(header..end).map_or(0, checksum::of);
    packet::put_u16(bytes, header + 10, sum);
}

/// Cuts an untagged frame with a complete checksum into fragments of at most `mtu` bytes of IP packet, if it is longer.
/// `id` tells the fragments of an IPv6 packet from those of others. False if it cannot be cut.
pub fn split(
    frame: Frame,
    mtu: u16,
    id: u32,
    pool: &mut Pool,
    mut sink: impl FnMut(Frame),
) -> bool {
    let bytes = frame.bytes();
    if bytes.len() <= ETHERNET_HEADER + usize::from(mtu) {
        sink(frame);
        return true;
    }
    let Ok(ip) = packet::ip(bytes, ETHERNET_HEADER) else {
        return false;
    };
    let v6 = ip.source.is_ipv6();
    let headers = if v6 { ip.header + 40 } else { ip.transport };
    let extra = if v6 { HEADER6 } else { 0 };
    let room = (ETHERNET_HEADER + usize::from(mtu)).saturating_sub(headers + extra) & !7;
    let Some(data) = bytes.get(headers..ip.end) else {
        return false;
    };
    if room == 0 || ip.fragment.is_some() {
        return false;
    }
    let parts = data.len().div_ceil(room);
    for (index, part) in data.chunks(room).enumerate() {
        let more = index + 1 < parts;
        let offset = (index * room) as u16;
        let mut piece = pool.frame(headers + extra + part.len());
        let to = piece.bytes_mut();
        packet::put(to, 0, bytes.get(..headers).unwrap_or_default());
        packet::put(to, headers + extra, part);
        let total = (to.len() - ETHERNET_HEADER) as u16;
        if v6 {
            let next = bytes.get(ip.header + 6).copied().unwrap_or(0);
            packet::put_u16(to, ip.header + 4, total - 40);
            packet::put(to, ip.header + 6, &[44]);
            packet::put(to, headers, &[next, 0]);
            packet::put_u16(to, headers + 2, offset | u16::from(more));
            packet::put(to, headers + 4, &id.to_be_bytes());
        } else {
            packet::put_u16(to, ip.header + 2, total);
            packet::put_u16(to, ip.header + 6, (offset / 8) | (u16::from(more) << 13));
            ipv4_checksum(to, ip.header, headers);
        }
        sink(piece);
    }
    pool.put(frame);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::reply::{self, Addresses};
    use crate::packet::{Content, Mac, content, protocol};
    use proptest::prelude::*;

    fn way(v6: bool) -> Addresses {
        let address = |number: u8| -> IpAddr {
            if v6 {
                IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, number])
            } else {
                IpAddr::from([10, 0, 0, number])
            }
        };
        Addresses {
            source_mac: Mac::from_bytes(&[2, 0, 0, 0, 0, 1]),
            destination_mac: Mac::from_bytes(&[2, 0, 0, 0, 0, 2]),
            source: address(1),
            destination: address(2),
        }
    }

    fn push(reassembler: &mut Reassembler, frame: &Frame, pool: &mut Pool) -> Option<Frame> {
        let Ok(Content::Ip(ip)) = content(frame.bytes()) else {
            panic!("no IP packet: {:?}", frame.bytes());
        };
        reassembler.push(frame.clone(), ip, Time::ZERO, pool)
    }

    proptest! {
        #[test]
        fn what_is_cut_is_put_together_in_any_order(
            v6 in any::<bool>(),
            len in 0usize..65_000,
            mtu in 1280u16..9000,
            order in any::<u64>(),
        ) {
            let mut pool = Pool::new(64);
            let message: Vec<u8> = (0..len).map(|at| (at * 7 % 251) as u8).collect();
            let (mut whole, at) = reply::ip(&mut pool, way(v6), protocol::UDP, 64, len).unwrap();
            packet::put(whole.bytes_mut(), at, &message);
            let mut pieces = Vec::new();
            prop_assert!(split(whole.clone(), mtu, 7, &mut pool, |piece| pieces.push(piece)));
            if pieces.len() > PARTS_MAX {
                return Ok(());
            }
            for piece in &pieces {
                prop_assert!(piece.len() <= ETHERNET_HEADER + usize::from(mtu));
                let header = &piece.bytes()[14..34];
                prop_assert!(v6 || checksum::of(header) == 0);
            }
            let mut reassembler = Reassembler::default();
            let mut done = None;
            let mut order = order;
            while !pieces.is_empty() {
                let piece = pieces.swap_remove(order as usize % pieces.len());
                order = order.rotate_left(7) ^ 0x9e37_79b9;
                prop_assert!(done.is_none());
                done = push(&mut reassembler, &piece, &mut pool);
                if done.is_none() && order % 3 == 0 {
                    // Twice.
                    prop_assert!(push(&mut reassembler, &piece, &mut pool).is_none());
                }
            }
            let done = done.unwrap();
            prop_assert_eq!(&done.bytes()[at..], &whole.bytes()[at..]);
            let (Ok(Content::Ip(before)), Ok(Content::Ip(after))) = (content(whole.bytes()), content(done.bytes())) else {
                panic!("no IP packet");
            };
            prop_assert_eq!(before, after);
        }
    }

    #[test]
    fn parts_that_overlap_are_given_up() {
        let mut pool = Pool::new(8);
        let (whole, _) = reply::ip(&mut pool, way(false), protocol::UDP, 64, 4000).unwrap();
        let mut pieces = Vec::new();
        assert!(split(whole, 1300, 1, &mut pool, |piece| pieces.push(piece)));
        assert_eq!(pieces.len(), 4);
        let mut reassembler = Reassembler::default();
        assert!(push(&mut reassembler, &pieces[0], &mut pool).is_none());
        // The second part, eight bytes earlier.
        let mut wrong = pieces[1].clone();
        let word = packet::get_u16(wrong.bytes(), 20).unwrap() - 1;
        packet::put_u16(wrong.bytes_mut(), 20, word);
        ipv4_checksum(wrong.bytes_mut(), 14, 34);
        assert!(push(&mut reassembler, &wrong, &mut pool).is_none());
        for piece in &pieces[1..] {
            assert!(push(&mut reassembler, piece, &mut pool).is_none());
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut pool = Pool::new(8);
        let mut reassembler = Reassembler::default();
        for id in 0..5000 {
            let (whole, _) = reply::ip(&mut pool, way(true), protocol::UDP, 64, 60_000).unwrap();
            let mut last = None;
            split(whole, 1300, id, &mut pool, |piece| last = Some(piece));
            assert!(push(&mut reassembler, &last.unwrap(), &mut pool).is_none());
        }
        assert_eq!(reassembler.partial.len(), PACKETS_MAX);
    }
}
