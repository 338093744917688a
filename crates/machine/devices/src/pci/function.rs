//! What a PCI function is, and how it is addressed.

use super::PciConfig;
use crate::Device;
use std::fmt;

/// Bus, device and function number.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct Bdf(u16);

impl Bdf {
    /// `device` below 32 and `function` below 8; higher bits are cut off.
    pub const fn new(bus: u8, device: u8, function: u8) -> Bdf {
        Bdf((bus as u16) << 8 | (device as u16 & 31) << 3 | function as u16 & 7)
    }

    /// From the 16-bit form that ECAM addresses and requester ids use.
    pub const fn from_bits(bits: u16) -> Bdf {
        Bdf(bits)
    }

    /// The 16-bit form.
    pub const fn bits(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02x}:{:02x}.{}",
            self.0 >> 8,
            self.0 >> 3 & 31,
            self.0 & 7
        )
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A device on the PCI bus.
///
/// All calls come under the function's lock. The implementor owns a [`PciConfig`], resets it in
/// [`Device::reset`] and includes [`PciConfig::save`] in its saved state. Accesses to the MSI-X table and pending bits
/// never reach `bar_read` and `bar_write`.
pub trait PciFunction: Device {
    /// The configuration space.
    fn config(&self) -> &PciConfig;

    /// The configuration space, to change.
    fn config_mut(&mut self) -> &mut PciConfig;

    /// The guest reads a BAR's memory; every byte of `data` (1, 2, 4 or 8) must be set.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// The guest writes a BAR's memory.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// The guest reads configuration space. Only functions with capabilities that have side effects override it.
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest writes configuration space. An override still passes the write on to [`PciConfig::write`].
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config_mut().write(offset, data);
    }
}
