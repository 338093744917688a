//! Where vCPUs' accesses go that do not hit RAM: the machine's two buses, and the way back of interrupts.

use std::sync::{Arc, Mutex, PoisonError};

use strata_devices::{Bus, InterruptSink, IoApic, MsiMessage};
use strata_engine::IoBus;

/// The machine's ports and device memory as engines see them.
pub(crate) struct MachineBus {
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) ioapic: Arc<Mutex<IoApic>>,
}

impl IoBus for MachineBus {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
    }

    fn port_in(&self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data);
    }

    fn port_out(&self, port: u16, data: &[u8]) {
        self.ports.write(u64::from(port), data);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .eoi(vector);
    }
}

/// Takes devices' messages to the engine.
pub(crate) struct EngineInterrupts(pub(crate) Arc<dyn strata_engine::InterruptSink>);

impl InterruptSink for EngineInterrupts {
    fn msi(&self, message: MsiMessage) {
        self.0.msi(strata_engine::MsiMessage {
            address: message.address,
            data: message.data,
        });
    }
}
