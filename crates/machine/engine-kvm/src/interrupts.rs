//! Interrupt messages from devices into the kernel's local APICs.
//!
//! The I/O APIC is ours, so its pins reach the kernel as messages like everybody else's. Ends of level-triggered
//! interrupts must come back to it, and the kernel reports those of vectors that it finds in its table of routes: each
//! level-triggered message is therefore put there before it is first sent.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_msi,
};
use strata_engine::{InterruptSink, MsiMessage};

use crate::engine::Machine;
use crate::kick::Shared;

/// Pins of the I/O APIC, which is as many routes as the kernel looks at for ends of interrupt.
pub const IOAPIC_PINS: u8 = 24;
/// The bit of a message's data that says level-triggered.
const LEVEL: u32 = 1 << 15;

/// The way into the machine's local APICs.
pub struct Messages {
    machine: Arc<Machine>,
    /// Level-triggered messages that the kernel knows, oldest first.
    levels: Mutex<VecDeque<MsiMessage>>,
    /// vCPU 0, at whose LINT0 an 8259 would be.
    first: OnceLock<Arc<Shared>>,
}

impl Messages {
    /// For this machine.
    pub fn new(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            levels: Mutex::default(),
            first: OnceLock::new(),
        }
    }

    /// vCPU 0 exists.
    pub fn set_first(&self, shared: Arc<Shared>) {
        // Each vCPU is created once: the kernel refuses a second one.
        let _ = self.first.set(shared);
    }

    /// Makes the kernel report the ends of interrupts by this message.
    fn announce(&self, message: MsiMessage) {
        let mut levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        if levels.contains(&message) {
            return;
        }
        // Each pin has one message at a time, so the oldest one of so many is out of use.
        if levels.len() >= usize::from(IOAPIC_PINS) {
            levels.pop_front();
        }
        levels.push_back(message);
        let entries: Vec<_> = (0..)
            .zip(levels.iter())
            .map(|(gsi, message)| route(gsi, *message))
            .collect();
        if let Ok(table) = KvmIrqRouting::from_entries(&entries) {
            // It can only fail for lack of kernel memory; the interrupt itself still arrives.
            let _ = self.machine.vm.set_gsi_routing(&table);
        }
    }
}

fn route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

impl InterruptSink for Messages {
    fn msi(&self, message: MsiMessage) {
        if message.data & LEVEL != 0 {
            self.announce(message);
        }
        // A message to nobody is lost, as on the bus.
        let _ = self.machine.vm.signal_msi(kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        });
    }

    fn ext_int(&self, vector: Option<u8>) {
        if let Some(first) = self.first.get() {
            first.set_ext_int(vector);
        }
    }
}
