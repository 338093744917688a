//! A function's configuration space: identity, command register, BARs, capabilities (PCI 3.0, chapter 6).

use super::{Msix, MsixState};
use crate::device::RestoreError;
use crate::interrupt::InterruptSink;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

const SPACE: usize = 4096;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const LAST_CAPABILITY_END: usize = 0x100;

const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory, bus master, parity response, SERR, interrupt disable: what software may set.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_MSIX: u8 = 0x11;

/// Who made a function and what it is.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device, in the vendor's numbering.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface, as 0xBBSSPP.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem, in its vendor's numbering.
    pub subsystem: u16,
}

/// Which memory window a BAR is placed in.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum BarKind {
    /// Below 4 GiB.
    Memory32,
    /// Anywhere; takes two BAR registers.
    Memory64,
}

/// Why a function or its configuration space cannot be built as asked.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum PciError {
    /// A BAR with a bad index or size, or on top of another.
    #[error("BAR {index} of {size:#x} bytes is not possible")]
    BadBar {
        /// Index, 0 to 5.
        index: u8,
        /// Bytes.
        size: u64,
    },
    /// No room for another capability.
    #[error("no room for capability {0:#x} in configuration space")]
    CapabilitySpace(u8),
    /// The MSI-X table does not lie in a BAR, or has no or too many vectors.
    #[error("{vectors} MSI-X vectors do not fit BAR {bar} at {offset:#x}")]
    BadMsix {
        /// The BAR.
        bar: u8,
        /// Where in the BAR.
        offset: u32,
        /// How many.
        vectors: u16,
    },
    /// The address is taken, not on bus 0, or not function 0 of its device.
    #[error("PCI address {0} cannot be used")]
    BadAddress(super::Bdf),
    /// A memory window is full.
    #[error("no room for BAR {index} of {size:#x} bytes")]
    WindowFull {
        /// The BAR.
        index: u8,
        /// Bytes.
        size: u64,
    },
}

/// A BAR as the device declared it.
#[derive(Copy, Clone, Debug)]
pub(super) struct Bar {
    pub(super) index: u8,
    pub(super) size: u64,
    pub(super) kind: BarKind,
}

/// Where in which BAR a function's MSI-X table and pending bits are.
#[derive(Clone)]
pub(super) struct MsixPlace {
    pub(super) msix: Msix,
    pub(super) bar: u8,
    pub(super) range: Range<u64>,
    capability: u16,
}

/// The 4 KiB configuration space of a type 0 function.
pub struct PciConfig {
    bytes: Box<[u8; SPACE]>,
    writable: Box<[u8; SPACE]>,
    /// The bytes after a reset, BARs as placed included: firmware's work is part of our reset.
    reset: Box<[u8; SPACE]>,
    bars: Vec<Bar>,
    msix: Option<MsixPlace>,
    capability_end: usize,
    last_capability: usize,
}

/// A configuration space as saved.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct PciConfigState {
    /// All bytes up to the last one that is not zero.
    bytes: Vec<u8>,
    msix: Option<MsixState>,
}

impl PciConfig {
    /// A function without BARs and capabilities. Declare those before it is added to a root.
    pub fn new(ids: PciIds) -> PciConfig {
        let mut config = PciConfig {
            bytes: Box::new([0; SPACE]),
            writable: Box::new([0; SPACE]),
            reset: Box::new([0; SPACE]),
            bars: Vec::new(),
            msix: None,
            capability_end: FIRST_CAPABILITY,
            last_capability: CAPABILITIES,
        };
        config.declare(0x00, &ids.vendor.to_le_bytes(), &[]);
        config.declare(0x02, &ids.device.to_le_bytes(), &[]);
        config.declare(COMMAND, &[0; 2], &COMMAND_WRITABLE.to_le_bytes());
        config.declare(
            0x08,
            &(ids.class << 8 | u32::from(ids.revision)).to_le_bytes(),
            &[],
        );
        // Cache line size and interrupt line are scratch for software.
        config.declare(0x0c, &[0], &[0xff]);
        config.declare(0x3c, &[0], &[0xff]);
        config.declare(0x2c, &ids.subsystem_vendor.to_le_bytes(), &[]);
        config.declare(0x2e, &ids.subsystem.to_le_bytes(), &[]);
        config
    }

    /// Sets bytes as they are after reset, and which of their bits the guest may write (missing mask bytes: none).
    fn declare(&mut self, offset: usize, bytes: &[u8], writable: &[u8]) {
        let masks = writable.iter().copied().chain(std::iter::repeat(0));
        for ((at, &byte), mask) in (offset..).zip(bytes).zip(masks) {
            set(&mut self.bytes, at, byte);
            set(&mut self.reset, at, byte);
            set(&mut self.writable, at, mask);
        }
    }

    /// Declares a memory BAR of a power of two of at least 16 bytes.
    pub fn add_bar(&mut self, index: u8, size: u64, kind: BarKind) -> Result<(), PciError> {
        let error = Err(PciError::BadBar { index, size });
        let registers = |bar: &Bar| bar.index..=bar.index + u8::from(bar.kind == BarKind::Memory64);
        let bar = Bar { index, size, kind };
        let size_max = match kind {
            BarKind::Memory32 => 1 << 31,
            BarKind::Memory64 => 1 << 40,
        };
        if !size.is_power_of_two() || !(16..=size_max).contains(&size) || *registers(&bar).end() > 5
        {
            return error;
        }
        let mut taken = self.bars.iter().flat_map(registers);
        if taken.any(|register| registers(&bar).contains(&register)) {
            return error;
        }
        let mask = (!(size - 1)).to_le_bytes();
        let at = BAR0 + usize::from(index) * 4;
        match kind {
            BarKind::Memory32 => self.declare(at, &[0; 4], mask.get(..4).unwrap_or_default()),
            BarKind::Memory64 => self.declare(at, &[0b100, 0, 0, 0, 0, 0, 0, 0], &mask),
        }
        self.bars.push(bar);
        Ok(())
    }

    /// Appends a capability: `body` is what follows the id and the link to the next, `writable` the bits of it that
    /// the guest may write (missing bytes: none). Returns its offset.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, PciError> {
        let full = PciError::CapabilitySpace(id);
        let at = self.capability_end;
        let end = at + 2 + body.len();
        let (Ok(link), true) = (u8::try_from(at), end <= LAST_CAPABILITY_END) else {
            return Err(full);
        };
        self.declare(at, &[id, 0], &[]);
        self.declare(at + 2, body, writable);
        self.declare(self.last_capability, &[link], &[]);
        self.declare(STATUS, &STATUS_CAPABILITIES.to_le_bytes(), &[]);
        self.last_capability = at + 1;
        self.capability_end = end.next_multiple_of(4);
        Ok(u16::from(link))
    }

    /// Adds MSI-X: the table at `offset` (a multiple of 8) of a BAR already declared, the pending bits right behind
    /// it, [`Msix::bytes`] in all.
    pub fn add_msix(
        &mut self,
        bar: u8,
        offset: u32,
        vectors: u16,
        sink: Arc<dyn InterruptSink>,
    ) -> Result<Msix, PciError> {
        let start = u64::from(offset);
        let range = start..start + Msix::bytes(vectors);
        let inside = self
            .bars
            .iter()
            .any(|b| b.index == bar && range.end <= b.size);
        let last = vectors.checked_sub(1).filter(|&last| last < 2048);
        let (Some(last), true, 0, None) = (last, inside, offset % 8, &self.msix) else {
            return Err(PciError::BadMsix {
                bar,
                offset,
                vectors,
            });
        };
        let table = offset | u32::from(bar);
        let pending = table + Msix::table_bytes(vectors) as u32;
        let mut body = Vec::with_capacity(10);
        body.extend(last.to_le_bytes());
        body.extend(table.to_le_bytes());
        body.extend(pending.to_le_bytes());
        let writable = Msix::CONTROL_WRITABLE.to_le_bytes();
        let capability = self.add_capability(CAPABILITY_MSIX, &body, &writable)?;
        let msix = Msix::new(vectors, sink);
        self.msix = Some(MsixPlace {
            msix: msix.clone(),
            bar,
            range,
            capability,
        });
        Ok(msix)
    }

    /// The MSI-X vectors, if there are any.
    pub fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref().map(|place| &place.msix)
    }

    pub(super) fn msix_place(&self) -> Option<&MsixPlace> {
        self.msix.as_ref()
    }

    /// Reads without side effects; bytes past the end are all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes what the guest may write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (&byte, at) in data.iter().zip(usize::from(offset)..) {
            let mask = self.writable.get(at).copied().unwrap_or(0);
            let kept = self.bytes.get(at).copied().unwrap_or(0) & !mask;
            set(&mut self.bytes, at, kept | byte & mask);
        }
        self.apply_msix_control();
    }

    fn apply_msix_control(&self) {
        if let Some(place) = &self.msix {
            place
                .msix
                .set_control(self.u16(usize::from(place.capability) + 2));
        }
    }

    fn u16(&self, offset: usize) -> u16 {
        let byte = |at| self.bytes.get(at).copied().map_or(0, u16::from);
        byte(offset) | byte(offset + 1) << 8
    }

    pub(super) fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Places a BAR and turns memory decoding on, now and after each reset: the firmware's work.
    pub(super) fn place_bar(&mut self, bar: Bar, address: u64) {
        let at = BAR0 + usize::from(bar.index) * 4;
        let count = if bar.kind == BarKind::Memory64 { 8 } else { 4 };
        let flags = self.bytes.get(at).map_or(0, |byte| byte & 0xf);
        for (i, byte) in address.to_le_bytes().into_iter().enumerate().take(count) {
            let byte = if i == 0 { byte | flags } else { byte };
            set(&mut self.bytes, at + i, byte);
            set(&mut self.reset, at + i, byte);
        }
        let command = (self.u16(COMMAND) | COMMAND_MEMORY).to_le_bytes();
        for (i, byte) in command.into_iter().enumerate() {
            set(&mut self.bytes, COMMAND + i, byte);
            set(&mut self.reset, COMMAND + i, byte);
        }
    }

    /// Where a BAR is, if the guest lets the function decode memory.
    pub(super) fn bar_address(&self, bar: &Bar) -> Option<u64> {
        if self.u16(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let at = BAR0 + usize::from(bar.index) * 4;
        let words = if bar.kind == BarKind::Memory64 { 4 } else { 2 };
        let value = (0..words)
            .rev()
            .fold(0, |v, i| v << 16 | u64::from(self.u16(at + i * 2)));
        Some(value & !0xf)
    }

    /// Back to the power-on state.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&*self.reset);
        if let Some(place) = &self.msix {
            place.msix.reset();
        }
    }

    /// The state, for inclusion in the function's.
    pub fn save(&self) -> PciConfigState {
        let len = self
            .bytes
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |last| last + 1);
        PciConfigState {
            bytes: self.bytes.iter().copied().take(len).collect(),
            msix: self.msix.as_ref().map(|place| place.msix.save()),
        }
    }

    /// Takes on a state of a function with the same identity, BARs and capabilities. The root moves the BARs when it
    /// is restored itself, after its functions.
    pub fn restore(&mut self, state: &PciConfigState) -> Result<(), RestoreError> {
        let mismatch = |reason| {
            Err(RestoreError::Mismatch {
                name: "pci-config".to_owned(),
                reason,
            })
        };
        if state.bytes.len() > SPACE {
            return mismatch("configuration space is too long");
        }
        let saved = state.bytes.iter().copied().chain(std::iter::repeat(0));
        let same = |((ours, saved), mask): ((&u8, u8), &u8)| (ours ^ saved) & !mask == 0;
        if !self
            .reset
            .iter()
            .zip(saved.clone())
            .zip(self.writable.iter())
            .all(same)
        {
            return mismatch("it is of another PCI function");
        }
        match (&self.msix, &state.msix) {
            (None, None) => {}
            (Some(place), Some(saved)) if place.msix.restore(saved) => {}
            _ => return mismatch("another number of MSI-X vectors"),
        }
        for (byte, saved) in self.bytes.iter_mut().zip(saved) {
            *byte = saved;
        }
        Ok(())
    }
}

fn set(bytes: &mut [u8; SPACE], at: usize, value: u8) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte = value;
    }
}
