//! PCI Express: functions with their configuration space, MSI-X, and the root that guests find them through.
//!
//! - [`PciFunction`] is what a device implements; it keeps a [`PciConfig`] that does the standard work.
//! - [`PciRoot`] is bus 0: ECAM, placement of BARs, and decoding them onto the MMIO [`crate::Bus`].
//! - [`PciPorts`] is the older way in, by ports 0xcf8 to 0xcff, with the reset register at 0xcf9.
//! - [`Msix`] delivers interrupts.

mod config;
mod function;
mod msix;
mod ports;
mod root;

pub use config::{BarKind, PciConfig, PciConfigState, PciError, PciIds};
pub use function::{Bdf, PciFunction};
pub use msix::{Msix, MsixState};
pub use ports::PciPorts;
pub use root::PciRoot;

#[cfg(test)]
mod tests;
