//! Everything of the platform that is no virtio device: PCI configuration by both of its ways, MSI-X and BARs that
//! move, ACPI registers, serial port, clock, keyboard controller, I/O APIC, panic and exit devices.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use strata_devices::virtio::{Rng, VirtioPci};
use strata_devices::{
    AcpiPm, Bdf, Bus, BusDevice, Cmos, DebugExit, Device, I8042, InterruptSink, IoApic, MsiMessage,
    PciPorts, PciRoot, PowerEvent, PowerSink, PvPanic, Serial,
};
use strata_memory::{Gpa, GuestMemory, Layout, SlotKind};

use super::input::{Input, Script, Sum};
use super::lock;

#[derive(Default)]
struct Sink(Mutex<(u64, u64)>);

impl InterruptSink for Sink {
    fn msi(&self, message: MsiMessage) {
        let mut seen = lock(&self.0);
        seen.0 += 1;
        seen.1 ^= message.address ^ u64::from(message.data);
    }
}

impl PowerSink for Sink {
    fn power(&self, event: PowerEvent) {
        lock(&self.0).1 ^= format!("{event:?}").len() as u64;
    }
}

/// Ports that are worth touching.
const PORTS: &[(u64, u64)] = &[
    (PciPorts::BASE, PciPorts::LEN),
    (Serial::COM1, Serial::LEN),
    (Cmos::BASE, Cmos::LEN),
    (I8042::BASE, I8042::LEN),
    (AcpiPm::BASE, AcpiPm::LEN),
    (PvPanic::BASE, PvPanic::LEN),
    (DebugExit::BASE, DebugExit::LEN),
];

struct Rig {
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    root: Arc<PciRoot>,
    ioapic: Arc<Mutex<IoApic>>,
    devices: Vec<Arc<Mutex<dyn Device>>>,
    sink: Arc<Sink>,
    now: Arc<Mutex<u64>>,
}

fn add<D: Device + BusDevice + 'static>(
    bus: &Bus,
    base: u64,
    len: u64,
    device: D,
    all: &mut Vec<Arc<Mutex<dyn Device>>>,
) -> Option<()> {
    let device = Arc::new(Mutex::new(device));
    bus.insert(base, len, device.clone()).ok()?;
    all.push(device);
    Some(())
}

impl Rig {
    fn new() -> Option<Rig> {
        let sink = Arc::new(Sink::default());
        let now = Arc::new(Mutex::new(0u64));
        let layout = Layout::new(64 << 20, 64 << 20).ok()?;
        let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let root = PciRoot::new(mmio.clone(), Layout::MMIO32, layout.mmio64());
        mmio.insert(Layout::ECAM.start().0, Layout::ECAM.size(), root.clone())
            .ok()?;
        let ioapic = Arc::new(Mutex::new(IoApic::new(sink.clone())));
        mmio.insert(Layout::IOAPIC.start().0, IoApic::LEN, ioapic.clone())
            .ok()?;
        let mut devices: Vec<Arc<Mutex<dyn Device>>> = vec![ioapic.clone()];
        let memory = GuestMemory::new();
        memory.add_slot(Gpa(0), 1 << 20, SlotKind::Ram).ok()?;
        for slot in [1, 2] {
            let device = VirtioPci::new("rng", Rng::host(), memory.clone(), sink.clone()).ok()?;
            root.add(Bdf::new(0, slot, 0), Arc::new(Mutex::new(device)))
                .ok()?;
        }
        let (clock, wall) = (now.clone(), now.clone());
        let clock = Arc::new(move || *lock(&clock));
        let wall = Arc::new(move || Duration::from_nanos(*lock(&wall)));
        let all = &mut devices;
        add(
            &ports,
            PciPorts::BASE,
            PciPorts::LEN,
            PciPorts::new(root.clone(), sink.clone()),
            all,
        )?;
        let serial = Serial::new("serial0", IoApic::line(&ioapic, 4), Box::new(io::sink()));
        add(&ports, Serial::COM1, Serial::LEN, serial, all)?;
        add(&ports, Cmos::BASE, Cmos::LEN, Cmos::new(wall), all)?;
        add(
            &ports,
            I8042::BASE,
            I8042::LEN,
            I8042::new(sink.clone()),
            all,
        )?;
        let pm = AcpiPm::new(clock, IoApic::line(&ioapic, AcpiPm::SCI_GSI), sink.clone());
        add(&ports, AcpiPm::BASE, AcpiPm::LEN, pm, all)?;
        add(
            &ports,
            PvPanic::BASE,
            PvPanic::LEN,
            PvPanic::new(sink.clone()),
            all,
        )?;
        add(
            &ports,
            DebugExit::BASE,
            DebugExit::LEN,
            DebugExit::new(sink.clone()),
            all,
        )?;
        Some(Rig {
            ports,
            mmio,
            root,
            ioapic,
            devices,
            sink,
            now,
        })
    }

    fn step(&self, input: &mut Input, sum: &mut Sum) {
        let kind = input.byte();
        let size = 1usize << (kind >> 4 & 3);
        let value = |input: &mut Input| input.any().to_le_bytes();
        let mut data = [0; 8];
        match kind & 15 {
            0..=2 => {
                let (base, len) = PORTS[usize::from(input.byte()) % PORTS.len()];
                let port = base + input.below(len);
                if kind & 0x40 == 0 {
                    self.ports.write(port, &value(input)[..size.min(4)]);
                } else {
                    self.ports.read(port, &mut data[..size.min(4)]);
                }
            }
            // Configuration of the functions that are there, and of some that are not.
            3..=5 => {
                let function = u64::from(input.byte() % 4);
                let offset = if kind & 0x80 == 0 {
                    input.below(256)
                } else {
                    input.below(4096)
                };
                let address = Layout::ECAM.start().0 + (function << 15) + offset;
                self.mmio.write(address, &value(input)[..size]);
                self.mmio.read(address, &mut data[..size]);
            }
            6 => {
                let address = Layout::ECAM.start().0 + input.any() % Layout::ECAM.size();
                self.mmio.read(address, &mut data[..size]);
            }
            7 | 8 => {
                let address = Layout::IOAPIC.start().0
                    + if kind & 0x40 == 0 {
                        input.below(0x20) & !15
                    } else {
                        input.below(0x1000)
                    };
                self.mmio.write(address, &value(input)[..size]);
                self.mmio.read(address, &mut data[..size]);
            }
            9 => {
                IoApic::line(&self.ioapic, input.byte() & 31).set_level(kind & 0x80 != 0);
                lock(&self.ioapic).eoi(input.byte());
            }
            // Where a BAR is now: what configuration says.
            10 | 11 => {
                let function = input.byte() & 1;
                self.root
                    .config_read(Bdf::new(0, 1 + function, 0), 0x10, &mut data);
                let address = (u64::from_le_bytes(data) & !15) + input.below(0x8000);
                self.mmio.write(address, &value(input)[..size]);
                self.mmio.read(address, &mut data[..size]);
            }
            12 => {
                let (address, bus) = (
                    input.any(),
                    if kind & 0x80 == 0 {
                        &self.mmio
                    } else {
                        &self.ports
                    },
                );
                bus.write(address, &value(input)[..size]);
                bus.read(address, &mut data[..size]);
            }
            13 => {
                let mut now = lock(&self.now);
                *now = now.wrapping_add(input.any() >> 8) & (u64::MAX >> 1);
            }
            14 => {
                let index = usize::from(input.byte()) % self.devices.len();
                let mut device = lock(&self.devices[index]);
                let state = device.save();
                if kind & 0x80 != 0 {
                    device.reset();
                }
                sum.add(u64::from(device.restore(&state).is_ok()));
            }
            _ => {
                for (_, function) in self.root.functions() {
                    lock(&function).reset();
                }
                self.root.remap();
            }
        }
        sum.add(u64::from(data.iter().all(|&byte| byte == 0)) | u64::from(kind & 15) << 1);
    }
}

pub fn run(bytes: &[u8]) -> u64 {
    let Some(rig) = Rig::new() else {
        return 0;
    };
    let mut input = Input::new(bytes);
    let mut sum = Sum::new();
    for _ in 0..500 {
        if input.is_empty() {
            break;
        }
        rig.step(&mut input, &mut sum);
    }
    let seen = lock(&rig.sink.0);
    sum.add(seen.0.min(3));
    sum.0
}

pub fn seeds() -> Vec<Vec<u8>> {
    // Memory on, a BAR moved, MSI-X on with a vector, then the device's status.
    let config = |script: Script, function: u8, offset: u64, value: u64| {
        script
            .byte(3 | 2 << 4)
            .byte(function)
            .number(offset, 2)
            .any(value)
    };
    let script = config(Script::default(), 1, 4, 6);
    let script = config(script, 1, 0x10, 0xc000_0000);
    let script = config(script, 1, 0x14, 0);
    let script = script
        .byte(10 | 2 << 4)
        .byte(0)
        .number(0x4000, 2)
        .any(0xfee0_0000);
    let script = script.byte(10).byte(0).number(20, 2).any(1);
    let whole = script.0;
    // An edge and a level of the I/O APIC.
    let script = Script::default()
        .byte(7 | 2 << 4)
        .number(0, 2)
        .any(0x18)
        .byte(7 | 2 << 4)
        .number(16, 2)
        .any(0x8058);
    let levels = script
        .byte(9 | 0x80)
        .byte(4)
        .byte(0x58)
        .byte(9)
        .byte(4)
        .byte(0x58)
        .0;
    let port = |script: Script, which: u8, offset: u64, value: u64| {
        script.byte(0).byte(which).number(offset, 2).any(value)
    };
    let serial = port(port(port(Script::default(), 1, 3, 0x83), 1, 0, 1), 1, 1, 15).0;
    let acpi = port(port(Script::default(), 4, 2, 0x20), 4, 4, 0x3400).0;
    vec![Vec::new(), whole, levels, serial, acpi]
}
