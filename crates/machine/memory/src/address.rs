//! Guest-physical addresses and ranges of them.

use std::fmt;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// The granule of slots, watching and dirty tracking, bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// One past the highest guest-physical address x86-64 can have (52 bits).
pub const PHYS_LIMIT: u64 = 1 << 52;

/// A guest-physical address, in bytes.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Default)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The address `bytes` further on, unless that is past the end of 64 bits.
    pub const fn checked_add(self, bytes: u64) -> Option<Gpa> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Gpa(sum)),
            None => None,
        }
    }

    /// The number of the 4 KiB page that holds this address.
    pub const fn page(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }

    /// The offset inside that page, bytes.
    pub const fn offset_in_page(self) -> u64 {
        self.0 & (PAGE_SIZE - 1)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

/// A range of guest-physical addresses whose end does not overflow; may be empty.
#[derive(Copy, Clone, Eq, PartialEq, Hash)]
pub struct GpaRange {
    start: Gpa,
    size: u64,
}

impl GpaRange {
    /// Nothing, at address 0.
    pub const EMPTY: GpaRange = GpaRange {
        start: Gpa(0),
        size: 0,
    };

    /// The `size` bytes from `start`; `None` if they run past the end of 64 bits.
    pub const fn new(start: Gpa, size: u64) -> Option<GpaRange> {
        match start.checked_add(size) {
            Some(_) => Some(GpaRange { start, size }),
            None => None,
        }
    }

    /// First address.
    pub const fn start(&self) -> Gpa {
        self.start
    }

    /// One past the last address.
    pub const fn end(&self) -> Gpa {
        Gpa(self.start.0 + self.size)
    }

    /// Bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether there is nothing in it.
    pub const fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// Whether `gpa` lies inside.
    pub const fn contains(&self, gpa: Gpa) -> bool {
        gpa.0 >= self.start.0 && gpa.0 - self.start.0 < self.size
    }

    /// Whether any address is in both.
    pub const fn overlaps(&self, other: &GpaRange) -> bool {
        !self.is_empty()
            && !other.is_empty()
            && self.start.0 < other.end().0
            && other.start.0 < self.end().0
    }
}

impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end())
    }
}

impl fmt::Debug for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
