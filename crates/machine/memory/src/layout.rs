//! Where things lie in a PC's guest-physical address space.

use crate::{Gpa, GpaRange, PAGE_SIZE};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// RAM below this address, the PCI hole above it.
const LOW_RAM_END: u64 = 3 * GIB;
const HIGH_RAM_START: u64 = 4 * GIB;
/// The 64-bit PCI window starts here or after the hot-plug window, whichever is higher.
const MMIO64_START_MIN: u64 = 64 * GIB;
const MMIO64_SIZE: u64 = 64 * GIB;
/// Highest end of everything: hosts with 46 physical address bits are the least that hold big machines.
const END_MAX: u64 = 1 << 46;

/// Why a machine cannot be laid out.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum LayoutError {
    /// No RAM, or not whole mebibytes.
    #[error("RAM must be a positive number of whole mebibytes, not {0} bytes")]
    BadSize(u64),
    /// The maximum is below the size.
    #[error("the maximum of {max} bytes is less than the {ram} bytes of RAM to start with")]
    MaxBelowSize {
        /// RAM at start, bytes.
        ram: u64,
        /// RAM at most, bytes.
        max: u64,
    },
    /// More than the address space holds.
    #[error("{0} bytes of RAM do not fit the guest's physical address space")]
    TooBig(u64),
}

/// The guest-physical address map of one machine: RAM below 3 GiB and from 4 GiB on, devices between, then a window
/// for RAM plugged in later and one for 64-bit PCI BARs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Layout {
    low_ram: GpaRange,
    high_ram: GpaRange,
    hotplug: GpaRange,
    mmio64: GpaRange,
}

impl Layout {
    /// 32-bit PCI BARs.
    pub const MMIO32: GpaRange = range(0xc000_0000, 512 * MIB);
    /// PCI Express configuration space of segment 0, buses 0 to 255.
    pub const ECAM: GpaRange = range(0xe000_0000, 256 * MIB);
    /// The IOAPIC's registers.
    pub const IOAPIC: GpaRange = range(0xfec0_0000, PAGE_SIZE);
    /// The local APIC's registers, and the addresses of MSI messages.
    pub const LAPIC: GpaRange = range(0xfee0_0000, MIB);

    /// Lays out `ram` bytes of RAM that may grow to `max` bytes; both whole mebibytes.
    pub fn new(ram: u64, max: u64) -> Result<Layout, LayoutError> {
        if let Some(&bad) = [ram, max]
            .iter()
            .find(|&&size| size == 0 || size % MIB != 0)
        {
            return Err(LayoutError::BadSize(bad));
        }
        if max < ram {
            return Err(LayoutError::MaxBelowSize { ram, max });
        }
        if max > END_MAX {
            return Err(LayoutError::TooBig(max));
        }
        let low = ram.min(LOW_RAM_END);
        let high_end = HIGH_RAM_START + (ram - low);
        let hotplug_start = high_end.next_multiple_of(GIB);
        let hotplug_end = hotplug_start + (max - ram).next_multiple_of(GIB);
        let mmio64_start = hotplug_end.max(MMIO64_START_MIN);
        if mmio64_start + MMIO64_SIZE > END_MAX {
            return Err(LayoutError::TooBig(max));
        }
        Ok(Layout {
            low_ram: range(0, low),
            high_ram: range(HIGH_RAM_START, ram - low),
            hotplug: range(hotplug_start, hotplug_end - hotplug_start),
            mmio64: range(mmio64_start, MMIO64_SIZE),
        })
    }

    /// RAM present from the start, by address: one or two ranges.
    pub fn ram(&self) -> impl Iterator<Item = GpaRange> + use<> {
        [self.low_ram, self.high_ram]
            .into_iter()
            .filter(|range| !range.is_empty())
    }

    /// RAM below the PCI hole.
    pub fn low_ram(&self) -> GpaRange {
        self.low_ram
    }

    /// RAM from 4 GiB on; may be empty.
    pub fn high_ram(&self) -> GpaRange {
        self.high_ram
    }

    /// Addresses kept free for RAM plugged in later; empty if the maximum is the size.
    pub fn hotplug(&self) -> GpaRange {
        self.hotplug
    }

    /// 64-bit PCI BARs.
    pub fn mmio64(&self) -> GpaRange {
        self.mmio64
    }

    /// How many physical address bits the guest's CPU model must have to reach all of it.
    pub fn address_bits(&self) -> u32 {
        u64::BITS - (self.mmio64.end().0 - 1).leading_zeros()
    }
}

/// A range whose ends are below 2^47 by construction.
const fn range(start: u64, size: u64) -> GpaRange {
    match GpaRange::new(Gpa(start), size) {
        Some(range) => range,
        // Cannot happen for the sums above; an empty range keeps this total.
        None => GpaRange::EMPTY,
    }
}
