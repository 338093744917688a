//! How interrupts leave devices: as MSI messages, or as the level of a wire to the IOAPIC.

use serde::{Deserialize, Serialize};

/// A message-signalled interrupt: the address and data of the memory write that it stands for.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct MsiMessage {
    /// Guest-physical address, 0xfeex_xxxx on x86.
    pub address: u64,
    /// Vector, delivery mode and trigger mode.
    pub data: u32,
}

/// Takes interrupts to the local APICs.
///
/// Called with device locks held and from any thread: it must not block on a vCPU or call into a device.
pub trait InterruptSink: Send + Sync {
    /// Delivers a message.
    fn msi(&self, message: MsiMessage);
}

/// A wire from a device to an interrupt controller.
pub trait IrqLine: Send + Sync {
    /// Puts the wire at its active (`true`) or inactive level; setting it to what it is does nothing.
    fn set_level(&self, active: bool);

    /// An edge: active, then inactive.
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}

/// A wire that is not connected.
#[derive(Copy, Clone, Debug, Default)]
pub struct NoIrq;

impl IrqLine for NoIrq {
    fn set_level(&self, _active: bool) {}
}
