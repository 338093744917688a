//! MSI-X: the table of messages, masks and pending bits of one function (PCI 3.0, 6.8.2).

use crate::bytes::lock;
use crate::interrupt::{InterruptSink, MsiMessage};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

const ENTRY_BYTES: u64 = 16;
/// The mask bit of a table entry's vector control word.
const ENTRY_MASKED: u32 = 1;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;

/// A function's MSI-X vectors. Clones share them, so that a device's back end can hold one to signal with.
#[derive(Clone)]
pub struct Msix {
    inner: Arc<Mutex<Inner>>,
    vectors: u16,
}

/// MSI-X vectors as saved.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    /// Address low, address high, data, vector control.
    table: Vec<[u32; 4]>,
    pending: Vec<u16>,
}

struct Inner {
    sink: Arc<dyn InterruptSink>,
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
}

#[derive(Copy, Clone)]
struct Entry {
    address_low: u32,
    address_high: u32,
    data: u32,
    control: u32,
    pending: bool,
}

impl Entry {
    /// Vectors come out of reset masked (PCI 3.0, 6.8.2.9).
    const RESET: Entry = Entry {
        address_low: 0,
        address_high: 0,
        data: 0,
        control: ENTRY_MASKED,
        pending: false,
    };

    fn words(&mut self) -> [&mut u32; 4] {
        [
            &mut self.address_low,
            &mut self.address_high,
            &mut self.data,
            &mut self.control,
        ]
    }
}

impl Inner {
    /// Delivers what is pending and no longer masked.
    fn deliver(&mut self) {
        if !self.enabled || self.masked {
            return;
        }
        for entry in &mut self.entries {
            if entry.pending && entry.control & ENTRY_MASKED == 0 {
                entry.pending = false;
                let address = u64::from(entry.address_high) << 32 | u64::from(entry.address_low);
                self.sink.msi(MsiMessage {
                    address,
                    data: entry.data,
                });
            }
        }
    }
}

impl Msix {
    /// `vectors` between 1 and 2048.
    pub(super) fn new(vectors: u16, sink: Arc<dyn InterruptSink>) -> Msix {
        let entries = vec![Entry::RESET; usize::from(vectors)];
        let inner = Inner {
            sink,
            enabled: false,
            masked: false,
            entries,
        };
        Msix {
            inner: Arc::new(Mutex::new(inner)),
            vectors,
        }
    }

    /// How many bytes of a BAR the table and the pending bits take.
    pub const fn bytes(vectors: u16) -> u64 {
        Self::table_bytes(vectors) + (vectors as u64).div_ceil(64) * 8
    }

    /// The offset of the pending bits behind the table.
    pub(super) const fn table_bytes(vectors: u16) -> u64 {
        vectors as u64 * ENTRY_BYTES
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Whether the guest has turned MSI-X on.
    pub fn enabled(&self) -> bool {
        lock(&self.inner).enabled
    }

    /// Interrupts the guest by this vector, or leaves it pending while it is masked. Does nothing if there is no such
    /// vector or MSI-X is off.
    pub fn signal(&self, vector: u16) {
        let mut inner = lock(&self.inner);
        if !inner.enabled {
            return;
        }
        if let Some(entry) = inner.entries.get_mut(usize::from(vector)) {
            entry.pending = true;
            inner.deliver();
        }
    }

    pub(super) fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.enabled = false;
        inner.masked = false;
        inner.entries.fill(Entry::RESET);
    }

    /// The guest wrote the capability's message control word.
    pub(super) fn set_control(&self, control: u16) {
        let mut inner = lock(&self.inner);
        inner.enabled = control & CONTROL_ENABLE != 0;
        inner.masked = control & CONTROL_MASK_ALL != 0;
        inner.deliver();
    }

    /// The writable bits of the message control word.
    pub(super) const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_MASK_ALL;

    /// Reads the table and the pending bits, `offset` counting from the start of the table.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = lock(&self.inner);
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = inner.byte(at, self.vectors);
        }
    }

    /// Writes the table; the pending bits are read-only.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = lock(&self.inner);
        for (&byte, at) in data.iter().zip(offset..) {
            if let Some(word) = inner.word(at) {
                let shift = at % 4 * 8;
                *word = *word & !(0xff << shift) | u32::from(byte) << shift;
            }
        }
        inner.deliver();
    }

    pub(super) fn save(&self) -> MsixState {
        let mut inner = lock(&self.inner);
        let control = if inner.enabled { CONTROL_ENABLE } else { 0 }
            | if inner.masked { CONTROL_MASK_ALL } else { 0 };
        let pending = inner
            .entries
            .iter()
            .zip(0..)
            .filter(|(entry, _)| entry.pending);
        MsixState {
            control,
            pending: pending.map(|(_, vector)| vector).collect(),
            table: inner
                .entries
                .iter_mut()
                .map(|entry| entry.words().map(|word| *word))
                .collect(),
        }
    }

    /// Takes on a state with the same number of vectors; false if it has another.
    #[must_use]
    pub(super) fn restore(&self, state: &MsixState) -> bool {
        let mut inner = lock(&self.inner);
        if state.table.len() != inner.entries.len() {
            return false;
        }
        inner.enabled = state.control & CONTROL_ENABLE != 0;
        inner.masked = state.control & CONTROL_MASK_ALL != 0;
        for ((entry, saved), vector) in inner.entries.iter_mut().zip(&state.table).zip(0u16..) {
            let [address_low, address_high, data, control] = *saved;
            let pending = state.pending.contains(&vector);
            *entry = Entry {
                address_low,
                address_high,
                data,
                control,
                pending,
            };
        }
        true
    }
}

impl Inner {
    /// The table word that holds the byte at `offset`.
    fn word(&mut self, offset: u64) -> Option<&mut u32> {
        let entry = self
            .entries
            .get_mut(usize::try_from(offset / ENTRY_BYTES).ok()?)?;
        entry
            .words()
            .into_iter()
            .nth(usize::try_from(offset % ENTRY_BYTES / 4).ok()?)
    }

    fn byte(&mut self, offset: u64, vectors: u16) -> u8 {
        if let Some(word) = self.word(offset) {
            return (*word >> (offset % 4 * 8)) as u8;
        }
        let first = (offset - Msix::table_bytes(vectors)) * 8;
        let bit = |i: u64| {
            let entry = self
                .entries
                .get(usize::try_from(first + i).unwrap_or(usize::MAX));
            u8::from(entry.is_some_and(|entry| entry.pending)) << i
        };
        (0..8).map(bit).sum()
    }
}
