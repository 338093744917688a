//! Messages that devices send to vCPUs, and doorbells that vCPUs ring at devices.

use serde::{Deserialize, Serialize};

/// A message-signalled interrupt as PCI devices and the I/O APIC send it (Intel SDM vol. 3, 11.11).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct MsiMessage {
    /// Bits 31:20 are 0xfee; 19:12 the destination; 3 redirection hint; 2 logical mode.
    pub address: u64,
    /// Bits 7:0 vector, 10:8 delivery mode, 14 level, 15 trigger mode.
    pub data: u32,
}

/// Takes interrupts from devices, on any thread, without blocking on guest execution.
pub trait InterruptSink: Send + Sync {
    /// Delivers a message.
    fn msi(&self, message: MsiMessage);
    /// Drives the ExtINT line of an 8259-like controller into vCPU 0: `Some(vector)` asserts, `None` lowers.
    fn ext_int(&self, vector: Option<u8>);
}

/// Which address space a doorbell lives in.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub enum DoorbellSpace {
    /// Guest-physical memory.
    Mmio,
    /// I/O ports.
    Port,
}

/// An address bound to an event.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct DoorbellAddress {
    /// Memory or ports.
    pub space: DoorbellSpace,
    /// Guest-physical address or port.
    pub address: u64,
    /// Only writes of this value ring, when given.
    pub value: Option<u32>,
}

/// What a write to a doorbell calls, on the vCPU's thread.
pub trait Doorbell: Send + Sync {
    /// The guest wrote `value`.
    fn ring(&self, value: u32);
}
