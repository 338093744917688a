//! `GuestMemory`: the accessors that devices, loaders and the control path use, and the records of what was written.

use crate::region::Protection;
use crate::slot::{Access, Piece};
use crate::{
    Gpa, GpaRange, Layout, MemoryError, PAGE_SIZE, PHYS_LIMIT, Slot, SlotId, SlotKind, SlotTable,
};
use arc_swap::ArcSwap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Size limit of the buffer between a file and guest memory, bytes.
const BOUNCE_MAX: u64 = 128 << 10;

/// Told of device writes to guest memory, on the thread that wrote and after the bytes are there.
///
/// It may be called with device locks held, so it must not call into devices.
pub trait WriteObserver: Send + Sync {
    /// `len` bytes at `gpa` were written.
    fn device_wrote(&self, gpa: Gpa, len: u64);
}

/// One host mapping of guest memory.
#[derive(Copy, Clone, Debug)]
pub struct Mapping {
    /// The slot it maps.
    pub slot: SlotId,
    /// The guest-physical addresses.
    pub range: GpaRange,
    /// Where they are in this process.
    pub host: NonNull<u8>,
}

/// The memory of one machine. Clones share it.
#[derive(Clone)]
pub struct GuestMemory {
    shared: Arc<Shared>,
}

struct Shared {
    table: ArcSwap<SlotTable>,
    /// Taken by whoever changes the table; holds the id of the next slot.
    next_id: Mutex<u32>,
    dirty_log: AtomicBool,
    observer: RwLock<Option<Arc<dyn WriteObserver>>>,
    recording: AtomicBool,
    recorder: RwLock<Option<Arc<dyn WriteObserver>>>,
}

impl Default for GuestMemory {
    fn default() -> GuestMemory {
        GuestMemory::new()
    }
}

/// Reads and writes of one width: a single access when aligned inside a slot, otherwise bytes.
macro_rules! scalar {
    ($int:ty, $atomic:ident, $read:ident, $write:ident, $bits:literal) => {
        #[doc = concat!("Reads ", $bits, " bits, little endian; in one piece if aligned.")]
        pub fn $read(&self, gpa: Gpa) -> Result<$int, MemoryError> {
            let table = self.shared.table.load();
            let (slot, offset) = table.locate(gpa)?;
            if let Some(cell) = slot.region().$atomic(offset) {
                return Ok(<$int>::from_le(cell.load(Ordering::Relaxed)));
            }
            let mut bytes = [0; size_of::<$int>()];
            self.read(gpa, &mut bytes)?;
            Ok(<$int>::from_le_bytes(bytes))
        }

        #[doc = concat!("Writes ", $bits, " bits, little endian; in one piece if aligned.")]
        pub fn $write(&self, gpa: Gpa, value: $int) -> Result<(), MemoryError> {
            let bytes = value.to_le_bytes();
            self.store(gpa, bytes.len() as u64, Access::Write, |piece| {
                let region = piece.slot.region();
                if piece.len == bytes.len() as u64
                    && let Some(cell) = region.$atomic(piece.offset)
                {
                    cell.store(value.to_le(), Ordering::Relaxed);
                    return Ok(());
                }
                done(
                    part(&bytes, piece).is_some_and(|part| region.copy_in(piece.offset, part)),
                    gpa,
                )
            })
        }
    };
}

/// Slots.
impl GuestMemory {
    /// A machine without memory.
    pub fn new() -> GuestMemory {
        GuestMemory {
            shared: Arc::new(Shared {
                table: ArcSwap::default(),
                next_id: Mutex::new(0),
                dirty_log: AtomicBool::new(false),
                observer: RwLock::new(None),
                recording: AtomicBool::new(false),
                recorder: RwLock::new(None),
            }),
        }
    }

    /// A machine with the RAM that a layout describes.
    pub fn with_layout(layout: &Layout) -> Result<GuestMemory, MemoryError> {
        let memory = GuestMemory::new();
        for range in layout.ram() {
            memory.add_slot(range.start(), range.size(), SlotKind::Ram)?;
        }
        Ok(memory)
    }

    /// Adds `size` bytes of zeros at `gpa`; both are multiples of 4 KiB. Engines see it by the table's generation.
    pub fn add_slot(&self, gpa: Gpa, size: u64, kind: SlotKind) -> Result<SlotId, MemoryError> {
        let bad = MemoryError::BadSlot { gpa, size };
        let Some(range) = GpaRange::new(gpa, size) else {
            return Err(bad);
        };
        if size == 0 || !(gpa.0 | size).is_multiple_of(PAGE_SIZE) || range.end().0 > PHYS_LIMIT {
            return Err(bad);
        }
        let mut next_id = self
            .shared
            .next_id
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let slot = Slot::new(SlotId(*next_id), range, kind)?;
        let id = slot.id();
        let table = self.shared.table.load().with(slot)?;
        self.shared.table.store(Arc::new(table));
        *next_id += 1;
        Ok(id)
    }

    /// Takes a slot away. Accesses that began earlier, and holders of an older table, keep the host mapping alive
    /// until they let go of it; stop engines from using theirs before relying on the memory being free.
    pub fn remove_slot(&self, id: SlotId) -> Result<(), MemoryError> {
        let _changing = self
            .shared
            .next_id
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let table = self.shared.table.load().without(id)?;
        self.shared.table.store(Arc::new(table));
        Ok(())
    }

    /// All slots as they are now. Hold it only as long as needed: it keeps removed slots mapped.
    pub fn slots(&self) -> Arc<SlotTable> {
        self.shared.table.load_full()
    }

    /// The generation of [`GuestMemory::slots`], without taking the table.
    pub fn generation(&self) -> u64 {
        self.shared.table.load().generation()
    }

    /// Every mapping of guest memory in this process.
    pub fn mappings(&self) -> Vec<Mapping> {
        let list = |slot: &Slot| Mapping {
            slot: slot.id(),
            range: slot.range(),
            host: slot.host(),
        };
        self.shared.table.load().iter().map(list).collect()
    }

    /// Changes what this process may do with whole pages of guest memory. Accesses that the new protection forbids
    /// raise SIGSEGV in the thread that makes them: first stop them, or install the handler that resolves them.
    pub fn protect(&self, range: GpaRange, protection: Protection) -> Result<(), MemoryError> {
        whole_pages(range)?;
        self.shared
            .table
            .load()
            .pieces(range.start(), range.size(), Access::Load, |piece| {
                piece
                    .slot
                    .region()
                    .protect(piece.offset, length(piece.len), protection)
            })
    }

    /// Gives whole pages back to the host. They read as zeros from then on; to the dirty log and the observer this is
    /// a device write.
    pub fn drop_pages(&self, range: GpaRange) -> Result<(), MemoryError> {
        whole_pages(range)?;
        self.store(range.start(), range.size(), Access::Write, |piece| {
            piece.slot.region().punch(piece.offset, piece.len)
        })
    }
}

/// Access. Every write here is a device write; see the crate's documentation. An access that leaves the slots fails
/// as a whole, with the first bad address.
impl GuestMemory {
    /// Copies guest memory at `gpa` into `into`.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.shared
            .table
            .load()
            .pieces(gpa, into.len() as u64, Access::Read, |piece| {
                let part = part_mut(into, piece);
                done(
                    part.is_some_and(|part| piece.slot.region().copy_out(piece.offset, part)),
                    gpa,
                )
            })
    }

    /// Copies `from` to guest memory at `gpa`.
    pub fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        self.copy_in(gpa, from, Access::Write)
    }

    /// Like [`GuestMemory::write`], but fills ROM too: for whoever builds the machine.
    pub fn load(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        self.copy_in(gpa, from, Access::Load)
    }

    /// Sets `len` bytes at `gpa` to `value`.
    pub fn fill(&self, gpa: Gpa, len: u64, value: u8) -> Result<(), MemoryError> {
        self.store(gpa, len, Access::Write, |piece| {
            done(
                piece
                    .slot
                    .region()
                    .fill(piece.offset, length(piece.len), value),
                gpa,
            )
        })
    }

    /// Reads `len` bytes of `file` from byte `offset` on into guest memory at `gpa`.
    pub fn read_from_file(
        &self,
        gpa: Gpa,
        file: &File,
        offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        self.check(gpa, len, Access::Write)?;
        bounce(gpa, offset, len, |at, position, part| {
            file.read_exact_at(part, position)
                .map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof => {
                        MemoryError::FileTooShort(offset.saturating_add(len))
                    }
                    _ => MemoryError::File(error),
                })?;
            self.write(at, part)
        })
    }

    /// Writes `len` bytes of guest memory at `gpa` to `file` from byte `offset` on.
    pub fn write_to_file(
        &self,
        gpa: Gpa,
        file: &File,
        offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        self.check(gpa, len, Access::Read)?;
        bounce(gpa, offset, len, |at, position, part| {
            self.read(at, part)?;
            file.write_all_at(part, position).map_err(MemoryError::File)
        })
    }

    /// Reads one byte.
    pub fn read_u8(&self, gpa: Gpa) -> Result<u8, MemoryError> {
        let mut bytes = [0];
        self.read(gpa, &mut bytes)?;
        Ok(u8::from_le_bytes(bytes))
    }

    /// Writes one byte.
    pub fn write_u8(&self, gpa: Gpa, value: u8) -> Result<(), MemoryError> {
        self.write(gpa, &[value])
    }

    scalar!(u16, atomic_u16, read_u16, write_u16, "16");
    scalar!(u32, atomic_u32, read_u32, write_u32, "32");
    scalar!(u64, atomic_u64, read_u64, write_u64, "64");

    /// Reads an aligned 16-bit ring index; what the guest wrote before it stored the index is visible afterwards.
    pub fn load_acquire_u16(&self, gpa: Gpa) -> Result<u16, MemoryError> {
        let table = self.shared.table.load();
        let (slot, offset) = table.locate(gpa)?;
        let cell = slot
            .region()
            .atomic_u16(offset)
            .ok_or(MemoryError::Misaligned(gpa))?;
        Ok(u16::from_le(cell.load(Ordering::Acquire)))
    }

    /// Writes an aligned 16-bit ring index; what was written before is visible to a guest that sees the index.
    pub fn store_release_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryError> {
        self.store(gpa, 2, Access::Write, |piece| {
            let cell = piece.slot.region().atomic_u16(piece.offset);
            cell.ok_or(MemoryError::Misaligned(gpa))?
                .store(value.to_le(), Ordering::Release);
            Ok(())
        })
    }

    fn copy_in(&self, gpa: Gpa, from: &[u8], access: Access) -> Result<(), MemoryError> {
        self.store(gpa, from.len() as u64, access, |piece| {
            let part = part(from, piece);
            done(
                part.is_some_and(|part| piece.slot.region().copy_in(piece.offset, part)),
                gpa,
            )
        })
    }

    fn check(&self, gpa: Gpa, len: u64, access: Access) -> Result<(), MemoryError> {
        self.shared
            .table
            .load()
            .pieces(gpa, len, access, |_| Ok(()))
    }

    /// The one way in which this crate writes guest memory.
    fn store(
        &self,
        gpa: Gpa,
        len: u64,
        access: Access,
        write: impl FnMut(&Piece<'_>) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let table = self.shared.table.load();
        table.pieces(gpa, len, access, write)?;
        self.wrote(&table, gpa, len)
    }

    /// Records a finished write. The bytes come first and the dirty bit after them, so that whoever takes the bit and
    /// then copies the page cannot miss the bytes.
    fn wrote(&self, table: &SlotTable, gpa: Gpa, len: u64) -> Result<(), MemoryError> {
        // Pairs with the fences in `watch_page` and `start_dirty_log`: either this thread sees the bit, or the one
        // that set it sees the bytes written above.
        fence(Ordering::SeqCst);
        let dirty = self.shared.dirty_log.load(Ordering::Relaxed);
        let mut watched = false;
        table.pieces(gpa, len, Access::Load, |piece| {
            if dirty {
                piece.slot.mark_dirty(piece.offset, piece.len);
            }
            watched |= piece.slot.any_watched(piece.offset, piece.len);
            Ok(())
        })?;
        if watched {
            tell(&self.shared.observer, gpa, len);
        }
        if self.shared.recording.load(Ordering::Relaxed) {
            tell(&self.shared.recorder, gpa, len);
        }
        Ok(())
    }
}

/// Watching and dirty tracking.
impl GuestMemory {
    /// Reports device writes to this page (`gpa >> 12`) to the observer. Bytes read after this returns are current:
    /// a later device write to them is reported. Pages outside all slots are ignored.
    pub fn watch_page(&self, page: u64) {
        self.set_watched(page, true);
        fence(Ordering::SeqCst);
    }

    /// Ends what [`GuestMemory::watch_page`] began.
    pub fn unwatch_page(&self, page: u64) {
        self.set_watched(page, false);
    }

    /// Whether device writes to this page are reported.
    pub fn is_watched(&self, page: u64) -> bool {
        self.shared
            .table
            .load()
            .find(page_start(page))
            .is_some_and(|slot| slot.is_watched(page))
    }

    fn set_watched(&self, page: u64, watched: bool) {
        if let Some(slot) = self.shared.table.load().find(page_start(page)) {
            slot.set_watched(page, watched);
        }
    }

    /// Who is told of device writes to watched pages; there is one, and a later call replaces it.
    pub fn set_observer(&self, observer: Arc<dyn WriteObserver>) {
        *self
            .shared
            .observer
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(observer);
    }

    /// Who is told of every device write, watched or not; `None` ends it. A recording of a machine's inputs needs
    /// all of them.
    pub fn set_recorder(&self, recorder: Option<Arc<dyn WriteObserver>>) {
        self.shared
            .recording
            .store(recorder.is_some(), Ordering::SeqCst);
        *self
            .shared
            .recorder
            .write()
            .unwrap_or_else(PoisonError::into_inner) = recorder;
    }

    /// Starts the dirty log with every page clean. Engines must drop their cached permissions to write afterwards.
    pub fn start_dirty_log(&self) {
        for slot in self.slots().iter() {
            slot.take_dirty();
        }
        self.shared.dirty_log.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Stops the dirty log; pages marked so far can still be taken.
    pub fn stop_dirty_log(&self) {
        self.shared.dirty_log.store(false, Ordering::SeqCst);
    }

    /// Whether the dirty log is on.
    pub fn dirty_log_on(&self) -> bool {
        self.shared.dirty_log.load(Ordering::Relaxed)
    }

    /// Marks the pages of `len` bytes at `gpa` dirty if the log is on: for engines, after the guest's own stores.
    pub fn mark_dirty(&self, gpa: Gpa, len: u64) {
        if !self.dirty_log_on() {
            return;
        }
        // A range that is no memory has nothing to mark.
        let _ = self
            .shared
            .table
            .load()
            .pieces(gpa, len, Access::Load, |piece| {
                piece.slot.mark_dirty(piece.offset, piece.len);
                Ok(())
            });
    }

    /// The pages of a slot written since the log started or this was last called, one bit each, the slot's first page
    /// in bit 0 of the first word. Copy the pages after taking the bits.
    pub fn take_dirty(&self, id: SlotId) -> Result<Vec<u64>, MemoryError> {
        let table = self.shared.table.load();
        Ok(table
            .get(id)
            .ok_or(MemoryError::NoSuchSlot(id))?
            .take_dirty())
    }
}

fn tell(observer: &RwLock<Option<Arc<dyn WriteObserver>>>, gpa: Gpa, len: u64) {
    let observer = observer
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    if let Some(observer) = observer {
        observer.device_wrote(gpa, len);
    }
}

fn page_start(page: u64) -> Gpa {
    Gpa(page.saturating_mul(PAGE_SIZE))
}

fn whole_pages(range: GpaRange) -> Result<(), MemoryError> {
    match (range.start().0 | range.size()) % PAGE_SIZE {
        0 => Ok(()),
        _ => Err(MemoryError::Misaligned(range.start())),
    }
}

/// A piece lies inside a mapping, so its length fits.
fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

fn part<'a>(buffer: &'a [u8], piece: &Piece<'_>) -> Option<&'a [u8]> {
    buffer.get(length(piece.done)..)?.get(..length(piece.len))
}

fn part_mut<'a>(buffer: &'a mut [u8], piece: &Piece<'_>) -> Option<&'a mut [u8]> {
    buffer
        .get_mut(length(piece.done)..)?
        .get_mut(..length(piece.len))
}

fn done(ok: bool, gpa: Gpa) -> Result<(), MemoryError> {
    if ok {
        Ok(())
    } else {
        Err(MemoryError::Unmapped(gpa))
    }
}

/// Calls `each` with (guest address, file position, buffer) for consecutive parts of a file transfer.
fn bounce(
    gpa: Gpa,
    offset: u64,
    len: u64,
    mut each: impl FnMut(Gpa, u64, &mut [u8]) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    if offset.checked_add(len).is_none() {
        return Err(MemoryError::FileTooShort(u64::MAX));
    }
    let mut buffer = vec![0; length(len.min(BOUNCE_MAX))];
    let mut done = 0;
    while done < len {
        let count = (len - done).min(BOUNCE_MAX);
        let at = gpa.checked_add(done).ok_or(MemoryError::Unmapped(gpa))?;
        let part = buffer
            .get_mut(..length(count))
            .ok_or(MemoryError::Unmapped(at))?;
        each(at, offset + done, part)?;
        done += count;
    }
    Ok(())
}
