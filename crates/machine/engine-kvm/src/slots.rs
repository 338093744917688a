//! Guest memory as KVM's memory slots, kept equal to the machine's table.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use strata_engine::EngineError;
use strata_memory::{Gpa, GuestMemory, PAGE_SIZE, Slot, SlotKind};

use crate::engine::failed;

/// The slots of one VM.
pub struct Slots {
    memory: GuestMemory,
    /// What [`Slots::sync`] brought the VM to: the table's generation, doubled, and the dirty log's switch.
    applied: AtomicU64,
    placed: Mutex<Vec<Placed>>,
}

/// A slot that the VM has. Holding [`Slot`] keeps its host memory mapped for as long as the VM uses it.
struct Placed {
    number: u32,
    flags: u32,
    slot: Slot,
}

impl Placed {
    /// Tells the VM. A size of 0 takes the slot away.
    fn tell(&self, vm: &VmFd, size: u64) -> Result<(), EngineError> {
        let region = kvm_userspace_memory_region {
            slot: self.number,
            flags: self.flags,
            guest_phys_addr: self.slot.gpa().0,
            memory_size: size,
            userspace_addr: self.slot.host().as_ptr() as u64,
        };
        // SAFETY: the range is a mapping that `self.slot` keeps alive, and `Slots` keeps `self` until it has taken the
        // slot away; nobody has references to its bytes.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("telling KVM of guest memory"))
    }
}

impl Slots {
    /// The slots of a VM that has none yet.
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            applied: AtomicU64::new(u64::MAX),
            placed: Mutex::default(),
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Brings the VM's slots to the table as it is now; cheap when nothing changed.
    pub fn sync(&self, vm: &VmFd) -> Result<(), EngineError> {
        if self.applied.load(Ordering::Acquire) == self.wanted() {
            return Ok(());
        }
        let mut placed = self.lock();
        let (table, logging) = (self.memory.slots(), self.memory.dirty_log_on());
        let mut kept = Vec::with_capacity(placed.len());
        for old in placed.drain(..) {
            if table.get(old.slot.id()).is_some() {
                kept.push(old);
            } else {
                old.tell(vm, 0)?;
            }
        }
        *placed = kept;
        for slot in table.iter() {
            let flags = match slot.kind() {
                SlotKind::Rom => KVM_MEM_READONLY,
                SlotKind::Ram if logging => KVM_MEM_LOG_DIRTY_PAGES,
                SlotKind::Ram => 0,
            };
            if let Some(known) = placed.iter_mut().find(|known| known.slot.id() == slot.id()) {
                if known.flags != flags {
                    known.flags = flags;
                    known.tell(vm, slot.size())?;
                }
                continue;
            }
            let number = (0..)
                .find(|number| placed.iter().all(|other| other.number != *number))
                .unwrap_or(0);
            let new = Placed {
                number,
                flags,
                slot: slot.clone(),
            };
            new.tell(vm, slot.size())?;
            placed.push(new);
        }
        self.applied.store(
            table.generation() << 1 | u64::from(logging),
            Ordering::Release,
        );
        Ok(())
    }

    /// Moves the kernel's dirty bits into the memory's log.
    pub fn collect_dirty(&self, vm: &VmFd) -> Result<(), EngineError> {
        for placed in self
            .lock()
            .iter()
            .filter(|placed| placed.flags & KVM_MEM_LOG_DIRTY_PAGES != 0)
        {
            let size = usize::try_from(placed.slot.size()).unwrap_or(usize::MAX);
            let bits = vm
                .get_dirty_log(placed.number, size)
                .map_err(failed("reading the dirty log"))?;
            for (index, word) in (0_u64..).zip(bits) {
                let pages = (0..64)
                    .filter(|bit| word >> bit & 1 != 0)
                    .map(|bit| index * 64 + bit);
                for page in pages {
                    self.memory
                        .mark_dirty(Gpa(placed.slot.gpa().0 + page * PAGE_SIZE), PAGE_SIZE);
                }
            }
        }
        Ok(())
    }

    fn wanted(&self) -> u64 {
        self.memory.generation() << 1 | u64::from(self.memory.dirty_log_on())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Placed>> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
