//! Devices of one machine: buses, interrupts, clocks, serial, PCI and virtio.
//!
//! # How a machine is put together
//!
//! There are two [`Bus`]es, ports and MMIO. A port or MMIO device is a [`BusDevice`]; `Arc<Mutex<D>>` of one goes to
//! [`Bus::insert`]. A PCI device is a [`PciFunction`]; it goes to [`PciRoot::add`], which places its BARs on the MMIO bus.
//! Everything with state is a [`Device`], and the machine walks them to reset, start, pause, save and restore.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use strata_devices::*;
//! use strata_memory::Layout;
//!
//! # struct Sink;
//! # impl InterruptSink for Sink { fn msi(&self, _: MsiMessage) {} }
//! # impl PowerSink for Sink { fn power(&self, _: PowerEvent) {} }
//! # let (interrupts, power) = (Arc::new(Sink), Arc::new(Sink));
//! # let layout = Layout::new(64 << 20, 64 << 20)?;
//! let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
//!
//! let root = PciRoot::new(mmio.clone(), Layout::MMIO32, layout.mmio64());
//! mmio.insert(Layout::ECAM.start().0, Layout::ECAM.size(), root.clone())?;
//! let ports = Arc::new(Mutex::new(PciPorts::new(root.clone(), power.clone())));
//! pio.insert(PciPorts::BASE, PciPorts::LEN, ports)?;
//!
//! let ioapic = Arc::new(Mutex::new(IoApic::new(interrupts)));
//! mmio.insert(Layout::IOAPIC.start().0, IoApic::LEN, ioapic.clone())?;
//! let serial = Serial::new("serial0", IoApic::line(&ioapic, 4), Box::new(std::io::stdout()));
//! let serial = Arc::new(Mutex::new(serial));
//! pio.insert(Serial::COM1, Serial::LEN, serial.clone())?;
//!
//! // All of these are walked by the machine.
//! let devices: Vec<Arc<Mutex<dyn Device>>> = vec![ioapic, serial];
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Which thread runs a device
//!
//! The vCPU thread that makes the access, under the device's own lock; host threads with input for a device (a
//! terminal, a socket, a disk's worker) call it under the same lock. A device holds no lock of another device but the IOAPIC's, which it
//! reaches through its [`IrqLine`]; [`InterruptSink`] and [`PowerSink`] never call back.
//!
//! # Reset and restore
//!
//! Reset or restore every device and every function of [`PciRoot::functions`], then call [`PciRoot::remap`].
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]
#![forbid(unsafe_code)]

mod acpi;
mod bus;
mod bytes;
mod cmos;
mod debug_exit;
mod device;
mod i8042;
mod interrupt;
mod ioapic;
pub mod pci;
mod power;
mod pvpanic;
mod serial;
#[cfg(test)]
mod testutil;
pub mod virtio;

pub use acpi::{AcpiPm, MachineNanos};
pub use bus::{Bus, BusDevice, BusError, BusTarget};
pub use cmos::{Cmos, WallClock};
pub use debug_exit::DebugExit;
pub use device::{Device, RestoreError, SavedState};
pub use i8042::I8042;
pub use interrupt::{InterruptSink, IrqLine, MsiMessage, NoIrq};
pub use ioapic::IoApic;
pub use pci::{
    BarKind, Bdf, Msix, PciConfig, PciConfigState, PciError, PciFunction, PciIds, PciPorts, PciRoot,
};
pub use power::{PowerEvent, PowerSink};
pub use pvpanic::PvPanic;
pub use serial::Serial;
