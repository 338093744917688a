//! Virtio over PCI, as a modern device only (virtio 1.2, section 4.1).
//!
//! Everything lies in BAR 0, 64-bit memory:
//!
//! | offset   | what                                          |
//! |----------|-----------------------------------------------|
//! | `0x0000` | common configuration (4.1.4.3)                |
//! | `0x1000` | interrupt status (4.1.4.5)                    |
//! | `0x2000` | device configuration (4.1.4.6)                |
//! | `0x3000` | doorbells, four bytes per queue (4.1.4.4)     |
//! | `0x4000` | MSI-X table and pending bits                  |
//!
//! There is one MSI-X vector per queue and one for the configuration. A driver that does not turn
//! MSI-X on finds its interrupts in the interrupt status; there is no INTx.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};
use strata_memory::GuestMemory;

use super::core::{Core, CoreStateV1, NO_VECTOR, SharedCore, VirtioInterrupt};
use super::device::{DeviceKind, VirtioDevice};
use super::queue::QueueLayout;
use crate::bytes::load_le;
use crate::pci::{BarKind, Msix, PciConfig, PciConfigState, PciError, PciFunction, PciIds};
use crate::{Device, InterruptSink, RestoreError, SavedState};

const VENDOR_VIRTIO: u16 = 0x1af4;
/// Device ids of modern devices count from here (4.1.2.1).
const DEVICE_ID_BASE: u16 = 0x1040;

const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const COMMON_BYTES: u64 = 60;
const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const MSIX: u64 = 0x4000;
const WINDOW_BYTES: u64 = 0x1000;
const DOORBELL_BYTES: u64 = 4;

const CAPABILITY_VENDOR: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Offsets inside the configuration access capability (4.1.4.9).
const ACCESS_BAR: u16 = 4;
const ACCESS_OFFSET: u16 = 8;
const ACCESS_LENGTH: u16 = 12;
const ACCESS_DATA: u16 = 16;

const ISR_USED: u8 = 1;
const ISR_CONFIG: u8 = 2;

const STATE_NAME: &str = "virtio-pci";

/// A virtio device as a function on the PCI bus.
pub struct VirtioPci {
    id: String,
    config: PciConfig,
    core: SharedCore,
    interrupt: Arc<PciInterrupt>,
    registers: Registers,
    /// Where the configuration access capability is.
    access: u16,
}

/// Registers of the transport itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
}

struct PciInterrupt {
    msix: Msix,
    isr: AtomicU8,
}

impl PciInterrupt {
    fn raise(&self, vector: u16, cause: u8) {
        if self.msix.enabled() {
            self.msix.signal(vector);
        } else {
            self.isr.fetch_or(cause, Ordering::SeqCst);
        }
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn used(&self, vector: u16) {
        self.raise(vector, ISR_USED);
    }

    fn config(&self, vector: u16) {
        self.raise(vector, ISR_CONFIG);
    }
}

impl VirtioPci {
    /// Puts `device` on PCI. `id` names it among the machine's devices; its interrupts go to `sink`.
    pub fn new(
        id: &str,
        device: impl VirtioDevice + 'static,
        memory: GuestMemory,
        sink: Arc<dyn InterruptSink>,
    ) -> Result<VirtioPci, PciError> {
        let kind = device.kind();
        let queues = device.queue_sizes().len() as u16;
        let mut config = PciConfig::new(PciIds {
            vendor: VENDOR_VIRTIO,
            device: DEVICE_ID_BASE + kind as u16,
            revision: 1,
            class: class(kind),
            subsystem_vendor: VENDOR_VIRTIO,
            subsystem: DEVICE_ID_BASE + kind as u16,
        });
        config.add_bar(BAR, BAR_BYTES, BarKind::Memory64)?;
        let msix = config.add_msix(BAR, MSIX as u32, queues + 1, sink)?;
        let access = add_capabilities(&mut config, queues)?;
        let interrupt = Arc::new(PciInterrupt {
            msix,
            isr: AtomicU8::new(0),
        });
        let core = SharedCore::new(Box::new(device), memory, interrupt.clone());
        let registers = Registers::default();
        Ok(VirtioPci {
            id: id.to_owned(),
            config,
            core,
            interrupt,
            registers,
            access,
        })
    }

    /// The offset in BAR 0 of the doorbell of a queue, for engines that bind doorbells to events.
    pub const fn doorbell(queue: u16) -> u64 {
        DOORBELLS + queue as u64 * DOORBELL_BYTES
    }

    /// Why the device stopped and waits for a reset by its driver, if it did.
    pub fn fault(&self) -> Option<String> {
        self.core.lock().fault().map(ToString::to_string)
    }

    /// Reads the common configuration. Reading has no side effects, so any part can be taken from
    /// an image of the whole.
    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let core = self.core.lock();
        let r = &self.registers;
        let select = |features: u64, half: u32| match half {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let queue = core.queue(r.queue_select);
        let layout = queue.map(|queue| queue.layout).unwrap_or_default();
        let mut image = Vec::with_capacity(COMMON_BYTES as usize);
        image.extend(r.device_feature_select.to_le_bytes());
        image.extend(select(core.device_features(), r.device_feature_select).to_le_bytes());
        image.extend(r.driver_feature_select.to_le_bytes());
        image.extend(select(core.driver_features(), r.driver_feature_select).to_le_bytes());
        image.extend(core.config_vector().to_le_bytes());
        image.extend(core.queue_count().to_le_bytes());
        image.extend([core.status(), core.config_generation()]);
        image.extend(r.queue_select.to_le_bytes());
        image.extend(layout.size.to_le_bytes());
        image.extend(queue.map_or(NO_VECTOR, |queue| queue.vector).to_le_bytes());
        image.extend(u16::from(queue.is_some_and(|queue| queue.enabled())).to_le_bytes());
        image.extend(r.queue_select.to_le_bytes());
        for address in [layout.descriptors, layout.available, layout.used] {
            image.extend(address.to_le_bytes());
        }
        let rest = image.get(offset as usize..).unwrap_or_default();
        let mut bytes = rest.iter().copied();
        data.fill_with(|| bytes.next().unwrap_or(0));
    }

    /// Writes the common configuration. Fields are written whole; 64-bit fields also in halves
    /// (4.1.3.1). Anything else has no effect.
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let value = load_le(data);
        let registers = &mut self.registers;
        let queue = registers.queue_select;
        // Vectors that do not exist read back as none (4.1.5.1.2).
        let vectors = self.interrupt.msix.vectors();
        let existing = |vector: u16| if vector < vectors { vector } else { NO_VECTOR };
        let mut core = self.core.lock();
        match (offset, data.len()) {
            (0, 4) => registers.device_feature_select = value as u32,
            (8, 4) => registers.driver_feature_select = value as u32,
            (12, 4) => write_features(&mut core, registers.driver_feature_select, value as u32),
            (16, 2) => core.set_config_vector(existing(value as u16)),
            (20, 1) => {
                core.set_status(value as u8);
                if value == 0 {
                    self.interrupt.isr.store(0, Ordering::SeqCst);
                }
            }
            (22, 2) => registers.queue_select = value as u16,
            (24, 2) => core.set_queue_layout(queue, |layout| layout.size = value as u16),
            (26, 2) => core.set_queue_vector(queue, existing(value as u16)),
            (28, 2) if value == 1 => core.enable_queue(queue),
            (32..56, 4 | 8) => {
                core.set_queue_layout(queue, |layout| {
                    write_address(layout, offset, value, data.len())
                });
            }
            _ => {}
        }
    }

    /// What the configuration access capability points at: offset and length in BAR 0 (4.1.4.9).
    fn access_window(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        let mut offset = [0; 4];
        let mut length = [0; 4];
        self.config.read(self.access + ACCESS_BAR, &mut bar);
        self.config.read(self.access + ACCESS_OFFSET, &mut offset);
        self.config.read(self.access + ACCESS_LENGTH, &mut length);
        let (offset, length) = (u32::from_le_bytes(offset), u32::from_le_bytes(length));
        let possible = bar == [BAR] && matches!(length, 1 | 2 | 4) && offset % length == 0;
        possible.then_some((u64::from(offset), length as usize))
    }
}

fn class(kind: DeviceKind) -> u32 {
    match kind {
        DeviceKind::Network => 0x02_00_00,
        DeviceKind::Block => 0x01_80_00,
        DeviceKind::Console | DeviceKind::Socket => 0x07_80_00,
        DeviceKind::Entropy => 0xff_00_00,
    }
}

/// Adds the virtio capabilities (4.1.4); returns the offset of the one for configuration access.
fn add_capabilities(config: &mut PciConfig, queues: u16) -> Result<u16, PciError> {
    let doorbell_bytes = u64::from(queues) * DOORBELL_BYTES;
    for (kind, offset, length) in [
        (CFG_COMMON, COMMON, COMMON_BYTES),
        (CFG_ISR, ISR, 4),
        (CFG_DEVICE, DEVICE_CONFIG, WINDOW_BYTES),
    ] {
        config.add_capability(
            CAPABILITY_VENDOR,
            &capability(kind, offset, length, &[]),
            &[],
        )?;
    }
    let multiplier = (DOORBELL_BYTES as u32).to_le_bytes();
    let notify = capability(CFG_NOTIFY, DOORBELLS, doorbell_bytes, &multiplier);
    config.add_capability(CAPABILITY_VENDOR, &notify, &[])?;
    let access = capability(CFG_PCI, 0, 0, &[0; 4]);
    // The driver writes BAR, offset and length. The data are not stored but passed on.
    let writable = [
        0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    config.add_capability(CAPABILITY_VENDOR, &access, &writable)
}

/// struct virtio_pci_cap without its first two bytes.
fn capability(kind: u8, offset: u64, length: u64, tail: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + tail.len() as u8, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(tail);
    body
}

fn write_features(core: &mut Core, half: u32, value: u32) {
    let old = core.driver_features();
    let value = u64::from(value);
    match half {
        0 => core.set_driver_features(old & !0xffff_ffff | value),
        1 => core.set_driver_features(old & 0xffff_ffff | value << 32),
        // Features beyond 64 are not offered; a driver that wants one gets no agreement.
        _ if value != 0 => core.set_driver_features(u64::MAX),
        _ => {}
    }
}

fn write_address(layout: &mut QueueLayout, offset: u64, value: u64, len: usize) {
    let field = match offset {
        32..40 => &mut layout.descriptors,
        40..48 => &mut layout.available,
        _ => &mut layout.used,
    };
    match (offset % 8, len) {
        (0, 8) => *field = value,
        (0, 4) => *field = *field & !0xffff_ffff | value,
        (4, 4) => *field = *field & 0xffff_ffff | value << 32,
        _ => {}
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_mut(&mut self) -> &mut PciConfig {
        &mut self.config
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => self.read_common(offset - COMMON, data),
            // Reading the interrupt status clears it.
            ISR => {
                let status = self.interrupt.isr.swap(0, Ordering::SeqCst);
                data.iter_mut().take(1).for_each(|byte| *byte = status);
            }
            DEVICE_CONFIG..DOORBELLS => {
                self.core.lock().read_config(offset - DEVICE_CONFIG, data);
            }
            _ => {}
        }
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(offset - COMMON, data),
            DEVICE_CONFIG..DOORBELLS => {
                self.core.lock().write_config(offset - DEVICE_CONFIG, data);
            }
            DOORBELLS..MSIX => {
                self.core
                    .lock()
                    .notify(((offset - DOORBELLS) / DOORBELL_BYTES) as u16);
            }
            _ => {}
        }
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if offset == self.access + ACCESS_DATA
            && let Some((at, length)) = self.access_window()
        {
            data.fill(0);
            let length = length.min(data.len());
            return self.bar_read(BAR, at, data.get_mut(..length).unwrap_or_default());
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        if offset == self.access + ACCESS_DATA
            && let Some((at, length)) = self.access_window()
            && let Some(data) = data.get(..length)
        {
            return self.bar_write(BAR, at, data);
        }
        self.config.write(offset, data);
    }
}

/// Saved state of a virtio device on PCI.
#[derive(Debug, Serialize, Deserialize)]
pub struct VirtioPciStateV1 {
    config: PciConfigState,
    registers: Registers,
    isr: u8,
    core: CoreStateV1,
}

impl Device for VirtioPci {
    fn id(&self) -> &str {
        &self.id
    }

    fn reset(&mut self) {
        self.core.lock().reset();
        self.config.reset();
        self.registers = Registers::default();
        self.interrupt.isr.store(0, Ordering::SeqCst);
    }

    fn start(&mut self) {
        self.core.start();
    }

    fn pause(&mut self) {
        self.core.pause();
    }

    fn stop(&mut self) {
        self.core.close();
    }

    fn save(&self) -> SavedState {
        let state = VirtioPciStateV1 {
            config: self.config.save(),
            registers: self.registers,
            isr: self.interrupt.isr.load(Ordering::SeqCst),
            core: self.core.lock().save(),
        };
        SavedState::new(STATE_NAME, 1, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: VirtioPciStateV1 = state.open(STATE_NAME, 1)?;
        let result = self
            .config
            .restore(&state.config)
            .and_then(|()| self.core.lock().restore(&state.core));
        if result.is_err() {
            self.reset();
            return result;
        }
        self.registers = state.registers;
        self.interrupt.isr.store(state.isr, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
