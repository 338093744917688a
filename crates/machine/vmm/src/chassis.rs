//! The machine's frame: its buses, its interrupt wires, and all devices that were put into it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strata_devices::virtio::{VirtioDevice, VirtioPci};
use strata_devices::{
    Bdf, Bus, BusDevice, BusTarget, Device, InterruptSink, IoApic, IrqLine, PciPorts, PciRoot,
    PowerSink,
};
use strata_engine::MachineClock;
use strata_memory::{GuestMemory, Layout};

use crate::bus::MachineBus;
use crate::error::BuildError;

type SharedDevice = Arc<Mutex<dyn Device>>;

/// Holds devices and what they are made with.
pub(crate) struct Chassis {
    pub(crate) memory: GuestMemory,
    pub(crate) clock: Arc<MachineClock>,
    pub(crate) interrupts: Arc<dyn InterruptSink>,
    pub(crate) power: Arc<dyn PowerSink>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    ioapic: Arc<Mutex<IoApic>>,
    pci: Arc<PciRoot>,
    /// All devices but the PCI functions.
    devices: Vec<SharedDevice>,
}

impl Chassis {
    /// A frame with IOAPIC and PCI root in it.
    pub(crate) fn new(
        memory: GuestMemory,
        layout: &Layout,
        clock: Arc<MachineClock>,
        interrupts: Arc<dyn InterruptSink>,
        power: Arc<dyn PowerSink>,
    ) -> Result<Self, BuildError> {
        let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let ioapic = Arc::new(Mutex::new(IoApic::new(Arc::clone(&interrupts))));
        let pci = PciRoot::new(Arc::clone(&mmio), Layout::MMIO32, layout.mmio64());
        let mut chassis = Self {
            memory,
            clock,
            interrupts,
            power: Arc::clone(&power),
            ports,
            mmio,
            ioapic: Arc::clone(&ioapic),
            pci: Arc::clone(&pci),
            devices: Vec::new(),
        };
        place(
            &chassis.mmio,
            "ioapic",
            Layout::IOAPIC.start().0,
            IoApic::LEN,
            ioapic.clone(),
        )?;
        chassis.devices.push(ioapic);
        let ecam = Layout::ECAM;
        place(
            &chassis.mmio,
            "pci",
            ecam.start().0,
            ecam.size(),
            pci.clone(),
        )?;
        let ports = Arc::new(Mutex::new(PciPorts::new(pci, power)));
        chassis.add_ports(PciPorts::BASE, PciPorts::LEN, &ports)?;
        Ok(chassis)
    }

    /// Puts a device at `len` ports from `base` on.
    pub(crate) fn add_ports<D: Device + BusDevice + 'static>(
        &mut self,
        base: u64,
        len: u64,
        device: &Arc<Mutex<D>>,
    ) -> Result<(), BuildError> {
        let name = lock(device).id().to_owned();
        place(&self.ports, &name, base, len, device.clone())?;
        self.devices.push(device.clone());
        Ok(())
    }

    /// Puts a virtio device on the PCI bus. Slots are part of what a guest may rely on: they are fixed by the caller.
    pub(crate) fn add_virtio(
        &mut self,
        slot: u8,
        id: &str,
        device: impl VirtioDevice + 'static,
    ) -> Result<(), BuildError> {
        let failed = |source| BuildError::Device {
            device: id.to_owned(),
            source: Box::new(source),
        };
        let interrupts = Arc::clone(&self.interrupts);
        let function =
            VirtioPci::new(id, device, self.memory.clone(), interrupts).map_err(failed)?;
        let function = Arc::new(Mutex::new(function));
        self.pci.add(Bdf::new(0, slot, 0), function).map_err(failed)
    }

    /// The wire to a pin of the IOAPIC.
    pub(crate) fn line(&self, gsi: u8) -> Arc<dyn IrqLine> {
        IoApic::line(&self.ioapic, gsi)
    }

    /// The two buses, as engines see them.
    pub(crate) fn bus(&self) -> Arc<MachineBus> {
        Arc::new(MachineBus {
            ports: Arc::clone(&self.ports),
            mmio: Arc::clone(&self.mmio),
            ioapic: Arc::clone(&self.ioapic),
        })
    }

    /// Every device to its power-on state. No vCPU may run.
    pub(crate) fn reset(&self) {
        self.each(&mut |device| device.reset());
        self.pci.remap();
    }

    /// Lets devices act.
    pub(crate) fn start(&self) {
        self.each(&mut |device| device.start());
    }

    /// Holds devices still. No vCPU may run.
    pub(crate) fn pause(&self) {
        self.each(&mut |device| device.pause());
    }

    /// Lets go of what devices have from the host.
    pub(crate) fn stop(&self) {
        self.each(&mut |device| device.stop());
    }

    fn each(&self, act: &mut dyn FnMut(&mut dyn Device)) {
        for device in &self.devices {
            act(&mut *lock(device));
        }
        for (_, function) in self.pci.functions() {
            act(&mut *lock(&function));
        }
    }
}

impl Drop for Chassis {
    fn drop(&mut self) {
        // The root complex is on the bus that it puts BARs on: apart, both can go.
        self.mmio.remove(Layout::ECAM.start().0);
    }
}

fn place(
    bus: &Bus,
    name: &str,
    base: u64,
    len: u64,
    target: Arc<dyn BusTarget>,
) -> Result<(), BuildError> {
    bus.insert(base, len, target)
        .map_err(|source| BuildError::Device {
            device: name.to_owned(),
            source: Box::new(source),
        })
}

fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
