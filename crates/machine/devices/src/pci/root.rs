//! Bus 0: finds functions for configuration accesses and keeps their BARs on the MMIO bus.

use super::config::{Bar, MsixPlace};
use super::{BarKind, Bdf, PciConfig, PciError, PciFunction, PciIds};
use crate::bytes::lock;
use crate::{Bus, BusTarget, Device, RestoreError, SavedState};
use std::sync::{Arc, Mutex};
use strata_memory::{GpaRange, PAGE_SIZE};

type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// The PCI Express root complex with its one bus. As a [`BusTarget`] it is the ECAM region.
///
/// Function 0:0.0 is a host bridge that comes by itself.
pub struct PciRoot {
    mmio: Arc<Bus>,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Few, so a scan finds them fast enough.
    functions: Vec<(Bdf, SharedFunction)>,
    window32: Window,
    window64: Window,
    /// BARs that are on the MMIO bus.
    mapped: Vec<MappedBar>,
}

#[derive(Copy, Clone, Eq, PartialEq)]
struct MappedBar {
    function: Bdf,
    bar: u8,
    base: u64,
    size: u64,
}

/// Addresses handed out from low to high.
struct Window {
    next: u64,
    end: u64,
}

impl Window {
    fn new(range: GpaRange) -> Window {
        Window {
            next: range.start().0,
            end: range.end().0,
        }
    }

    /// No two BARs share a page, so that an engine can map or trap each by itself.
    fn take(&mut self, size: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(size.max(PAGE_SIZE))?;
        let end = start.checked_add(size).filter(|&end| end <= self.end)?;
        self.next = end;
        Some(start)
    }
}

impl PciRoot {
    /// A root whose functions' BARs appear on `mmio`, placed in these two windows.
    pub fn new(mmio: Arc<Bus>, window32: GpaRange, window64: GpaRange) -> Arc<PciRoot> {
        let bridge: SharedFunction = Arc::new(Mutex::new(HostBridge::new()));
        let inner = Inner {
            functions: vec![(Bdf::new(0, 0, 0), bridge)],
            window32: Window::new(window32),
            window64: Window::new(window64),
            mapped: Vec::new(),
        };
        Arc::new(PciRoot {
            mmio,
            inner: Mutex::new(inner),
        })
    }

    /// Puts a function on the bus and places its BARs.
    pub fn add(&self, at: Bdf, function: SharedFunction) -> Result<(), PciError> {
        let mut inner = lock(&self.inner);
        // One bus, and no device with more than one function.
        if at.bits() > 0xff
            || at.bits() & 7 != 0
            || inner.functions.iter().any(|(taken, _)| *taken == at)
        {
            return Err(PciError::BadAddress(at));
        }
        {
            let mut device = lock(&function);
            for bar in device.config().bars().to_vec() {
                let window = match bar.kind {
                    BarKind::Memory32 => &mut inner.window32,
                    BarKind::Memory64 => &mut inner.window64,
                };
                let full = PciError::WindowFull {
                    index: bar.index,
                    size: bar.size,
                };
                let address = window.take(bar.size).ok_or(full)?;
                device.config_mut().place_bar(bar, address);
            }
        }
        inner.functions.push((at, function));
        inner.remap(&self.mmio);
        Ok(())
    }

    /// All functions, the host bridge included: they reset, start, pause, save and restore as devices.
    pub fn functions(&self) -> Vec<(Bdf, Arc<Mutex<dyn PciFunction>>)> {
        lock(&self.inner).functions.clone()
    }

    /// A configuration read by the guest; all ones if there is no such function.
    pub fn config_read(&self, at: Bdf, offset: u16, data: &mut [u8]) {
        let inner = lock(&self.inner);
        match inner.find(at) {
            Some(function) => lock(function).config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A configuration write by the guest.
    pub fn config_write(&self, at: Bdf, offset: u16, data: &[u8]) {
        let mut inner = lock(&self.inner);
        if let Some(function) = inner.find(at) {
            lock(function).config_write(offset, data);
            // Only the command register and BARs move anything.
            let end = usize::from(offset) + data.len();
            if end > 0x04 && offset < 0x28 {
                inner.remap(&self.mmio);
            }
        }
    }

    /// Puts BARs where the functions' configuration spaces say, after those changed behind the root's back: when the
    /// functions of a machine were reset or restored.
    pub fn remap(&self) {
        lock(&self.inner).remap(&self.mmio);
    }
}

impl Inner {
    fn find(&self, at: Bdf) -> Option<&SharedFunction> {
        self.functions
            .iter()
            .find(|(address, _)| *address == at)
            .map(|(_, function)| function)
    }

    /// Takes off the bus what moved, then puts on what is missing. A BAR that the guest put on top of something else
    /// stays off until the place is free.
    fn remap(&mut self, mmio: &Bus) {
        let wanted: Vec<(MappedBar, SharedFunction, Option<MsixPlace>)> = self
            .functions
            .iter()
            .flat_map(|(at, function)| windows(*at, function))
            .collect();
        self.mapped.retain(|old| {
            let keep = wanted.iter().any(|(new, ..)| new == old);
            if !keep {
                mmio.remove(old.base);
            }
            keep
        });
        for (window, function, msix) in wanted {
            if !self.mapped.contains(&window) {
                let target = Arc::new(BarTarget {
                    function,
                    bar: window.bar,
                    msix,
                });
                if mmio.insert(window.base, window.size, target).is_ok() {
                    self.mapped.push(window);
                }
            }
        }
    }
}

/// The BARs of a function that decode, and where.
fn windows(
    at: Bdf,
    function: &SharedFunction,
) -> Vec<(MappedBar, SharedFunction, Option<MsixPlace>)> {
    let device = lock(function);
    let config = device.config();
    let window = |bar: &Bar| {
        let base = config.bar_address(bar)?;
        let mapped = MappedBar {
            function: at,
            bar: bar.index,
            base,
            size: bar.size,
        };
        let msix = config
            .msix_place()
            .filter(|place| place.bar == bar.index)
            .cloned();
        Some((mapped, function.clone(), msix))
    };
    config.bars().iter().filter_map(window).collect()
}

/// One BAR on the MMIO bus.
struct BarTarget {
    function: SharedFunction,
    bar: u8,
    msix: Option<MsixPlace>,
}

impl BarTarget {
    /// The MSI-X table, if it is at this offset, and the offset inside it.
    fn msix(&self, offset: u64) -> Option<(&MsixPlace, u64)> {
        let place = self
            .msix
            .as_ref()
            .filter(|place| place.range.contains(&offset))?;
        Some((place, offset - place.range.start))
    }
}

impl BusTarget for BarTarget {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.msix(offset) {
            Some((place, offset)) => place.msix.read(offset, data),
            None => lock(&self.function).bar_read(self.bar, offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self.msix(offset) {
            Some((place, offset)) => place.msix.write(offset, data),
            None => lock(&self.function).bar_write(self.bar, offset, data),
        }
    }
}

/// Splits an ECAM offset into function and register (PCI Express, 7.2.2).
fn ecam(offset: u64) -> (Bdf, u16) {
    (
        Bdf::from_bits((offset >> 12) as u16),
        (offset & 0xfff) as u16,
    )
}

impl BusTarget for PciRoot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (at, register) = ecam(offset);
        self.config_read(at, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (at, register) = ecam(offset);
        self.config_write(at, register, data);
    }
}

/// Function 0:0.0, which drivers look at to see that there is a bus. It does nothing.
struct HostBridge {
    config: PciConfig,
}

impl HostBridge {
    fn new() -> HostBridge {
        // The generic PCI Express host bridge of the QEMU project's vendor id, which every guest system knows.
        let ids = PciIds {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        HostBridge {
            config: PciConfig::new(ids),
        }
    }
}

const HOST_BRIDGE: &str = "pci-host-bridge";

impl Device for HostBridge {
    fn id(&self) -> &str {
        HOST_BRIDGE
    }

    fn reset(&mut self) {
        self.config.reset();
    }

    fn save(&self) -> SavedState {
        SavedState::new(HOST_BRIDGE, 1, &self.config.save())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.config.restore(&state.open(HOST_BRIDGE, 1)?)
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_mut(&mut self) -> &mut PciConfig {
        &mut self.config
    }

    fn bar_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
}
