//! Slots: stretches of guest-physical address space backed by host memory, and immutable tables of them.

use crate::bitmap::AtomicBitmap;
use crate::region::Region;
use crate::{Gpa, GpaRange, MemoryError, PAGE_SHIFT};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// Names a slot for its lifetime; never used again after the slot is gone.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct SlotId(pub u32);

/// What the guest may do with a slot.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum SlotKind {
    /// Read, written and executed.
    Ram,
    /// Read and executed; guest and device writes have no effect on it.
    Rom,
}

/// A stretch of guest-physical memory and the host memory behind it.
///
/// Cheap to clone. The host mapping stays valid as long as any clone (or a [`SlotTable`] holding one) is alive, even
/// after the slot was removed from the machine.
#[derive(Clone)]
pub struct Slot {
    id: SlotId,
    range: GpaRange,
    kind: SlotKind,
    backing: Arc<Backing>,
}

struct Backing {
    region: Region,
    watched: AtomicBitmap,
    dirty: AtomicBitmap,
}

impl Slot {
    pub(crate) fn new(id: SlotId, range: GpaRange, kind: SlotKind) -> Result<Slot, MemoryError> {
        let name = match kind {
            SlotKind::Ram => c"strata-ram",
            SlotKind::Rom => c"strata-rom",
        };
        let pages = range.size() >> PAGE_SHIFT;
        let backing = Backing {
            region: Region::new(name, range.size())?,
            watched: AtomicBitmap::new(pages),
            dirty: AtomicBitmap::new(pages),
        };
        Ok(Slot {
            id,
            range,
            kind,
            backing: Arc::new(backing),
        })
    }

    /// The slot's name.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> Gpa {
        self.range.start()
    }

    /// Bytes, a multiple of 4 KiB.
    pub fn size(&self) -> u64 {
        self.range.size()
    }

    /// The addresses it covers.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// RAM or ROM.
    pub fn kind(&self) -> SlotKind {
        self.kind
    }

    /// Host address of the slot's first byte, for engines. Valid while this `Slot` or a clone of it lives; page
    /// aligned; the bytes are shared with the guest and other threads, so never make a reference to them.
    pub fn host(&self) -> NonNull<u8> {
        self.backing.region.base()
    }

    /// The memfd behind the slot, for reading which parts hold data. Do not map it: only this crate maps guest RAM.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.backing.region.file()
    }

    /// Whether the page (`gpa >> 12`, of the whole guest) is in this slot and watched.
    pub fn is_watched(&self, page: u64) -> bool {
        page.checked_sub(self.gpa().page())
            .is_some_and(|index| self.backing.watched.get(index))
    }

    pub(crate) fn region(&self) -> &Region {
        &self.backing.region
    }

    pub(crate) fn set_watched(&self, page: u64, watched: bool) {
        if let Some(index) = page.checked_sub(self.gpa().page()) {
            match watched {
                true => self.backing.watched.set(index),
                false => self.backing.watched.clear(index),
            }
        }
    }

    /// Marks the pages of `len` bytes at `offset` dirty.
    pub(crate) fn mark_dirty(&self, offset: u64, len: u64) {
        for index in pages(offset, len) {
            self.backing.dirty.set(index);
        }
    }

    /// Whether any page of `len` bytes at `offset` is watched.
    pub(crate) fn any_watched(&self, offset: u64, len: u64) -> bool {
        pages(offset, len).any(|index| self.backing.watched.get(index))
    }

    pub(crate) fn take_dirty(&self) -> Vec<u64> {
        self.backing.dirty.take()
    }
}

/// The page numbers that `len` bytes at `offset` touch.
fn pages(offset: u64, len: u64) -> std::ops::Range<u64> {
    match len {
        0 => 0..0,
        _ => offset >> PAGE_SHIFT..(offset.saturating_add(len - 1) >> PAGE_SHIFT) + 1,
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slot({}, {:?}, {})", self.id.0, self.kind, self.range)
    }
}

/// All slots at one moment, sorted by address and without overlaps. Immutable: a change makes a new table with a
/// higher generation.
#[derive(Clone, Debug, Default)]
pub struct SlotTable {
    slots: Vec<Slot>,
    generation: u64,
}

/// What an access wants to do; ROM can only be read.
#[derive(Copy, Clone, Eq, PartialEq)]
pub(crate) enum Access {
    Read,
    Write,
    /// The machine's builder fills ROM.
    Load,
}

/// The part of an access that falls into one slot.
pub(crate) struct Piece<'a> {
    pub(crate) slot: &'a Slot,
    /// Where in the slot.
    pub(crate) offset: u64,
    /// Where in the caller's buffer.
    pub(crate) done: u64,
    pub(crate) len: u64,
}

impl SlotTable {
    /// The slot that holds `gpa`.
    pub fn find(&self, gpa: Gpa) -> Option<&Slot> {
        let after = self.slots.partition_point(|slot| slot.gpa() <= gpa);
        self.slots
            .get(after.checked_sub(1)?)
            .filter(|slot| slot.range.contains(gpa))
    }

    /// All slots, by address.
    pub fn iter(&self) -> std::slice::Iter<'_, Slot> {
        self.slots.iter()
    }

    /// The slot with this id.
    pub fn get(&self, id: SlotId) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.id == id)
    }

    /// Grows by one at each slot that is added or removed.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The slot that holds `gpa` and the offset in it.
    pub(crate) fn locate(&self, gpa: Gpa) -> Result<(&Slot, u64), MemoryError> {
        let slot = self.find(gpa).ok_or(MemoryError::Unmapped(gpa))?;
        Ok((slot, gpa.0 - slot.gpa().0))
    }

    pub(crate) fn with(&self, slot: Slot) -> Result<SlotTable, MemoryError> {
        if let Some(other) = self
            .slots
            .iter()
            .find(|other| other.range.overlaps(&slot.range))
        {
            return Err(MemoryError::Overlap {
                gpa: slot.gpa(),
                existing: other.gpa(),
            });
        }
        let mut slots = self.slots.clone();
        slots.insert(
            slots.partition_point(|other| other.gpa() < slot.gpa()),
            slot,
        );
        Ok(SlotTable {
            slots,
            generation: self.generation + 1,
        })
    }

    pub(crate) fn without(&self, id: SlotId) -> Result<SlotTable, MemoryError> {
        let mut slots = self.slots.clone();
        slots.retain(|slot| slot.id != id);
        if slots.len() == self.slots.len() {
            return Err(MemoryError::NoSuchSlot(id));
        }
        Ok(SlotTable {
            slots,
            generation: self.generation + 1,
        })
    }

    fn piece(
        &self,
        gpa: Gpa,
        len: u64,
        done: u64,
        access: Access,
    ) -> Result<Piece<'_>, MemoryError> {
        let at = gpa.checked_add(done).ok_or(MemoryError::Unmapped(gpa))?;
        let (slot, offset) = self.locate(at)?;
        if slot.kind == SlotKind::Rom && access == Access::Write {
            return Err(MemoryError::ReadOnly(at));
        }
        Ok(Piece {
            slot,
            offset,
            done,
            len: (len - done).min(slot.size() - offset),
        })
    }

    /// Calls `each` for every slot that `len` bytes at `gpa` touch, in order, after making sure that the whole range
    /// allows the access: an access is done completely or not at all.
    pub(crate) fn pieces(
        &self,
        gpa: Gpa,
        len: u64,
        access: Access,
        mut each: impl FnMut(&Piece<'_>) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        if len == 0 {
            return Ok(());
        }
        let first = self.piece(gpa, len, 0, access)?;
        let mut done = first.len;
        while done < len {
            done += self.piece(gpa, len, done, access)?.len;
        }
        each(&first)?;
        let mut done = first.len;
        while done < len {
            let piece = self.piece(gpa, len, done, access)?;
            each(&piece)?;
            done += piece.len;
        }
        Ok(())
    }
}

impl<'a> IntoIterator for &'a SlotTable {
    type Item = &'a Slot;
    type IntoIter = std::slice::Iter<'a, Slot>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
