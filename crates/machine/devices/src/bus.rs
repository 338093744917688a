//! Address ranges and the devices behind them: one `Bus` for ports, one for MMIO.

use crate::bytes::lock;
use arc_swap::ArcSwap;
use std::sync::{Arc, Mutex};

/// A device model that is accessed under its own lock.
///
/// `offset` counts from the start of the range that the device was inserted at, and the access lies wholly inside that
/// range. `data` has the width of the access: 1, 2, 4 or 8 bytes.
pub trait BusDevice: Send {
    /// The guest reads; every byte of `data` must be set.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// What a [`Bus`] holds: something that takes accesses from several threads. `Mutex<D>` of a [`BusDevice`] is one.
pub trait BusTarget: Send + Sync {
    /// As [`BusDevice::read`].
    fn read(&self, offset: u64, data: &mut [u8]);
    /// As [`BusDevice::write`].
    fn write(&self, offset: u64, data: &[u8]);
}

impl<D: BusDevice + ?Sized> BusTarget for Mutex<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(self).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        lock(self).write(offset, data);
    }
}

/// Why a range cannot be inserted.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum BusError {
    /// Empty, or past the end of the address space.
    #[error("a range of {len:#x} bytes at {base:#x} is not a range of addresses")]
    BadRange {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device is there.
    #[error("a range at {base:#x} overlaps the one at {existing:#x}")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// First address of the range in the way.
        existing: u64,
    },
}

#[derive(Clone)]
struct Range {
    base: u64,
    /// Last address, inclusive.
    last: u64,
    target: Arc<dyn BusTarget>,
}

/// Which device answers at which address. Ranges may come and go while vCPUs use it; lookups take no lock.
///
/// Reads of addresses without a device are all ones, writes there are lost, as on a PC.
#[derive(Default)]
pub struct Bus {
    /// Sorted by address, without overlaps.
    ranges: ArcSwap<Vec<Range>>,
    changing: Mutex<()>,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Puts a device at `len` addresses from `base` on.
    pub fn insert(&self, base: u64, len: u64, target: Arc<dyn BusTarget>) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|rest| base.checked_add(rest));
        let last = last.ok_or(BusError::BadRange { base, len })?;
        let _changing = lock(&self.changing);
        let mut ranges = Vec::clone(&self.ranges.load());
        let at = ranges.partition_point(|range| range.last < base);
        if let Some(next) = ranges.get(at).filter(|next| next.base <= last) {
            return Err(BusError::Overlap {
                base,
                existing: next.base,
            });
        }
        ranges.insert(at, Range { base, last, target });
        self.ranges.store(Arc::new(ranges));
        Ok(())
    }

    /// Takes away the range that starts at `base`; whether there was one. Accesses under way still end at the device.
    pub fn remove(&self, base: u64) -> bool {
        let _changing = lock(&self.changing);
        let mut ranges = Vec::clone(&self.ranges.load());
        let before = ranges.len();
        ranges.retain(|range| range.base != base);
        let removed = ranges.len() != before;
        self.ranges.store(Arc::new(ranges));
        removed
    }

    #[cfg(test)]
    pub(crate) fn claims(&self, address: u64) -> bool {
        find(&self.ranges.load(), address).is_some()
    }

    /// The guest reads `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let ranges = self.ranges.load();
        let whole = data.len();
        match find(&ranges, address) {
            Some(range) if fits(range, address, whole) => {
                range.target.read(address - range.base, data);
            }
            None if whole == 1 => data.fill(0xff),
            // Over the edge of a range, which only odd guests do: byte by byte, as the bus of a PC would.
            _ => {
                for (i, byte) in data.iter_mut().enumerate() {
                    let address = address.wrapping_add(i as u64);
                    match find(&ranges, address) {
                        Some(range) => {
                            let byte = std::slice::from_mut(byte);
                            range.target.read(address - range.base, byte);
                        }
                        None => *byte = 0xff,
                    }
                }
            }
        }
    }

    /// The guest writes `data` at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        let ranges = self.ranges.load();
        match find(&ranges, address) {
            Some(range) if fits(range, address, data.len()) => {
                range.target.write(address - range.base, data);
            }
            _ => {
                for (i, byte) in data.iter().enumerate() {
                    let address = address.wrapping_add(i as u64);
                    if let Some(range) = find(&ranges, address) {
                        range
                            .target
                            .write(address - range.base, std::slice::from_ref(byte));
                    }
                }
            }
        }
    }
}

fn find(ranges: &[Range], address: u64) -> Option<&Range> {
    ranges
        .get(ranges.partition_point(|range| range.last < address))
        .filter(|range| range.base <= address)
}

fn fits(range: &Range, address: u64, len: usize) -> bool {
    (len as u64)
        .checked_sub(1)
        .is_none_or(|rest| rest <= range.last - address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Answers with its base and remembers the last write.
    struct Echo(u8, Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.1.push((offset, data.to_vec()));
        }
    }

    fn echo(base: u8) -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(base, Vec::new())))
    }

    #[test]
    fn overlaps_and_bad_ranges_are_refused() {
        let bus = Bus::new();
        bus.insert(0x10, 8, echo(0)).unwrap();
        bus.insert(0x18, 8, echo(0)).unwrap();
        let overlap = |existing, base| Err(BusError::Overlap { base, existing });
        assert_eq!(bus.insert(0x17, 1, echo(0)), overlap(0x10, 0x17));
        assert_eq!(bus.insert(0x0f, 2, echo(0)), overlap(0x10, 0x0f));
        assert_eq!(bus.insert(0, 0x100, echo(0)), overlap(0x10, 0));
        assert!(matches!(
            bus.insert(0x50, 0, echo(0)),
            Err(BusError::BadRange { .. })
        ));
        assert!(matches!(
            bus.insert(u64::MAX, 2, echo(0)),
            Err(BusError::BadRange { .. })
        ));
        bus.insert(u64::MAX, 1, echo(0)).unwrap();
        assert!(bus.remove(0x10) && !bus.remove(0x11));
        bus.insert(0x10, 1, echo(0)).unwrap();
    }

    #[test]
    fn accesses_reach_devices_and_split_at_edges() {
        let bus = Bus::new();
        let (first, second) = (echo(0x40), echo(0x80));
        bus.insert(0x10, 4, first.clone()).unwrap();
        bus.insert(0x14, 4, second.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x10, &mut data);
        assert_eq!(data, [0x40; 4]);
        bus.read(0x12, &mut data);
        assert_eq!(data, [0x42, 0x43, 0x80, 0x81]);
        bus.read(0x0e, &mut data);
        assert_eq!(data, [0xff, 0xff, 0x40, 0x41]);
        bus.read(0x100, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write(0x13, &[1, 2]);
        bus.write(0x14, &[3, 4]);
        bus.write(0x200, &[9]);
        assert_eq!(first.lock().unwrap().1, [(3, vec![1])]);
        assert_eq!(second.lock().unwrap().1, [(0, vec![2]), (0, vec![3, 4])]);
    }

    proptest! {
        #[test]
        fn lookups_agree_with_a_scan(
            ranges in proptest::collection::vec((0u64..200, 1u64..20), 0..12),
            address in 0u64..220,
        ) {
            let bus = Bus::new();
            let mut kept: Vec<(u64, u64)> = Vec::new();
            for (base, len) in ranges {
                let free = kept.iter().all(|&(b, l)| base + len <= b || b + l <= base);
                prop_assert_eq!(bus.insert(base, len, echo(0)).is_ok(), free);
                if free {
                    kept.push((base, len));
                }
            }
            let claimed = kept.iter().any(|&(b, l)| b <= address && address < b + l);
            prop_assert_eq!(bus.claims(address), claimed);
        }
    }
}
