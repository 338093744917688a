//! The memory map told to the guest: which ranges are RAM, which are taken.

use strata_memory::{GpaRange, Layout};

/// Conventional memory ends here (where a PC's extended BIOS data area would begin).
pub(crate) const LOW_USABLE_END: u64 = 0x9_fc00;
/// The ACPI tables lie from here to 1 MiB, where a guest that is told nothing looks for them too.
pub(crate) const ACPI_START: u64 = 0xe_0000;
/// Usable RAM goes on here.
pub(crate) const HIGH_MEMORY_START: u64 = 0x10_0000;

/// What a range of guest-physical memory is; the values are those of the e820 interface (ACPI 6.5, table 15.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM free for the guest.
    Usable = 1,
    /// Not for use as RAM.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// One entry of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// The memory map of a machine, in ascending order and without empty entries.
pub(crate) fn memory_map(layout: &Layout) -> Vec<MemoryRange> {
    let span = |start: u64, end: u64, kind| MemoryRange {
        start,
        size: end.saturating_sub(start),
        kind,
    };
    let range = |range: GpaRange, kind| span(range.start().0, range.end().0, kind);
    let mut map = vec![
        span(0, LOW_USABLE_END, MemoryKind::Usable),
        span(LOW_USABLE_END, ACPI_START, MemoryKind::Reserved),
        span(ACPI_START, HIGH_MEMORY_START, MemoryKind::Acpi),
        span(
            HIGH_MEMORY_START,
            layout.low_ram().end().0,
            MemoryKind::Usable,
        ),
        // Linux uses the configuration space named by the MCFG only if it is reserved here.
        range(Layout::ECAM, MemoryKind::Reserved),
        range(layout.high_ram(), MemoryKind::Usable),
    ];
    map.retain(|entry| entry.size > 0);
    map
}
