//! The split virtqueue (virtio 1.2, section 2.7), device side.
//!
//! Everything in the rings is under the control of the guest and is checked when it is read. A ring
//! that cannot be right gives a [`QueueError`]; the device then needs a reset (2.1.2), and until
//! then its queues are not looked at. One call does bounded work: a chain has at most as many
//! descriptors as the queue (or [`INDIRECT_MAX`] through an indirect table), loops are cut there.
//!
//! Limitations: no packed rings, no in-order completion, no reset of single queues.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use strata_memory::{Gpa, GuestMemory, MemoryError};

use super::chain::{Buffer, Chain};

/// The greatest size of a queue (2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// The most descriptors that are followed in an indirect table. The specification allows as many as
/// the queue has; Linux uses more.
pub const INDIRECT_MAX: u32 = 1024;

const DESCRIPTOR_BYTES: u64 = 16;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// A ring that a correct driver does not produce, or a chain that does not hold what it must.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The size is zero, not a power of two, or above the device's limit.
    #[error("a queue of {0} descriptors is not possible")]
    Size(u16),
    /// A ring is not aligned as 2.7 demands, or runs past the end of the address space.
    #[error("a ring cannot lie at {0}")]
    Placement(Gpa),
    /// More chains are available than there are descriptors.
    #[error("{0} chains are available, more than the queue has descriptors")]
    AvailableIndex(u16),
    /// A descriptor index is outside its table.
    #[error("descriptor {0} does not exist")]
    DescriptorIndex(u32),
    /// A chain does not end.
    #[error("a chain has more than {0} descriptors")]
    ChainTooLong(u32),
    /// A chain has 4 GiB or more, or a buffer runs past the end of the address space.
    #[error("the buffers of a chain are too large")]
    ChainTooLarge,
    /// A buffer for the device to read follows one for it to write.
    #[error("a readable buffer follows a writable one")]
    BufferOrder,
    /// An indirect table that is not negotiated, nested, empty, of odd size, or not last.
    #[error("an indirect descriptor is malformed")]
    Indirect,
    /// A chain has fewer bytes than the device needs.
    #[error("a chain is too short")]
    ChainTooShort,
    /// The driver offers more chains than it has descriptors, while we still have all that it had.
    #[error("more chains than there are descriptors")]
    TooManyChains,
    /// A ring or buffer is not in guest memory.
    #[error("a ring or buffer is not in guest memory")]
    Memory(#[from] MemoryError),
}

/// Where a queue's rings are and how many descriptors it has: what the driver sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueueLayout {
    /// Descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the driver's ring (available).
    pub available: u64,
    /// Guest-physical address of the device's ring (used).
    pub used: u64,
}

/// Saved state of a queue that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStateV1 {
    layout: QueueLayout,
    next_available: u16,
    next_used: u16,
    signalled_used: u16,
}

/// A queue in use. Made when the driver enables it, gone at reset.
#[derive(Debug)]
pub struct Queue {
    layout: QueueLayout,
    event_index: bool,
    indirect: bool,
    /// The next entry of the available ring to take.
    next_available: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// `next_used` when the driver was last considered for an interrupt.
    signalled_used: u16,
    /// Chains taken and not handed back: a driver can have no more than descriptors.
    taken: u16,
}

/// What the features negotiated say about all queues of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueFeatures {
    /// VIRTIO_F_EVENT_IDX.
    pub event_index: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
}

impl Queue {
    /// A queue at its beginning. `size_max` is the device's limit.
    pub fn new(
        layout: QueueLayout,
        features: QueueFeatures,
        size_max: u16,
    ) -> Result<Queue, QueueError> {
        let size = layout.size;
        if !size.is_power_of_two() || size > size_max.min(QUEUE_SIZE_MAX) {
            return Err(QueueError::Size(size));
        }
        let entries = u64::from(size);
        for (address, alignment, bytes) in [
            (layout.descriptors, 16, entries * DESCRIPTOR_BYTES),
            (layout.available, 2, 6 + entries * 2),
            (layout.used, 4, 6 + entries * 8),
        ] {
            if !address.is_multiple_of(alignment) || address.checked_add(bytes).is_none() {
                return Err(QueueError::Placement(Gpa(address)));
            }
        }
        Ok(Queue {
            layout,
            event_index: features.event_index,
            indirect: features.indirect,
            next_available: 0,
            next_used: 0,
            signalled_used: 0,
            taken: 0,
        })
    }

    /// A queue as it was saved.
    pub fn restore(
        state: QueueStateV1,
        features: QueueFeatures,
        size_max: u16,
    ) -> Result<Queue, QueueError> {
        let fresh = Queue::new(state.layout, features, size_max)?;
        Ok(Queue {
            next_available: state.next_available,
            next_used: state.next_used,
            signalled_used: state.signalled_used,
            ..fresh
        })
    }

    /// What [`Queue::restore`] needs. Chains taken and not completed are not part of it.
    pub fn save(&self) -> QueueStateV1 {
        QueueStateV1 {
            layout: self.layout,
            next_available: self.next_available,
            next_used: self.next_used,
            signalled_used: self.signalled_used,
        }
    }

    /// Takes the next available chain. When there is none, asks the driver to notify us of the next
    /// one, so a caller that goes on until `None` misses nothing.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        if self.available(memory)? == 0 && !self.arm(memory)? {
            return Ok(None);
        }
        if self.taken >= self.layout.size {
            return Err(QueueError::TooManyChains);
        }
        let slot = u64::from(self.next_available % self.layout.size);
        let head = memory.read_u16(Gpa(self.layout.available + 4 + slot * 2))?;
        let chain = self.walk(memory, head)?;
        self.next_available = self.next_available.wrapping_add(1);
        self.taken += 1;
        Ok(Some(chain))
    }

    /// Gives back the chain that was taken last, as if it had not been.
    pub fn undo_pop(&mut self, _chain: Chain) {
        self.next_available = self.next_available.wrapping_sub(1);
        self.taken = self.taken.saturating_sub(1);
    }

    /// Hands a chain back to the driver, `written` bytes of it filled in.
    pub fn push(
        &mut self,
        memory: &GuestMemory,
        chain: Chain,
        written: u32,
    ) -> Result<(), QueueError> {
        self.push_all(memory, [(chain, written)])
    }

    /// Hands chains back, each with the bytes filled in. The driver sees them all at once.
    pub fn push_all(
        &mut self,
        memory: &GuestMemory,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), QueueError> {
        for (chain, written) in chains {
            self.taken = self.taken.saturating_sub(1);
            let slot = u64::from(self.next_used % self.layout.size);
            // An element is { le32 id; le32 len; } (2.7.8).
            let element = u64::from(written) << 32 | u64::from(chain.head);
            memory.write(Gpa(self.layout.used + 4 + slot * 8), &element.to_le_bytes())?;
            self.next_used = self.next_used.wrapping_add(1);
        }
        memory.store_release_u16(Gpa(self.layout.used + 2), self.next_used)?;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was pushed since this was last asked (2.7.7).
    pub fn needs_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let (old, new) = (self.signalled_used, self.next_used);
        if old == new {
            return Ok(false);
        }
        self.signalled_used = new;
        // The driver first publishes what it wants, then looks at the used index; we do the reverse.
        fence(Ordering::SeqCst);
        if !self.event_index {
            return Ok(memory.read_u16(Gpa(self.layout.available))? & AVAIL_NO_INTERRUPT == 0);
        }
        let used_event = memory.read_u16(Gpa(self.layout.available
            + 4
            + u64::from(self.layout.size) * 2))?;
        Ok(new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Chains that wait to be taken.
    fn available(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let index = memory.load_acquire_u16(Gpa(self.layout.available + 2))?;
        let count = index.wrapping_sub(self.next_available);
        if count > self.layout.size {
            Err(QueueError::AvailableIndex(count))
        } else {
            Ok(count)
        }
    }

    /// Asks for a notification of the next chain; true if one has come meanwhile (2.7.10). Without
    /// VIRTIO_F_EVENT_IDX we never ask the driver to be silent, so there is nothing to ask.
    fn arm(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.event_index {
            return Ok(false);
        }
        let avail_event = Gpa(self.layout.used + 4 + u64::from(self.layout.size) * 8);
        memory.write_u16(avail_event, self.next_available)?;
        fence(Ordering::SeqCst);
        Ok(self.available(memory)? != 0)
    }

    /// Follows a chain from its head.
    fn walk(&self, memory: &GuestMemory, head: u16) -> Result<Chain, QueueError> {
        let mut chain = Chain {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut table = self.layout.descriptors;
        let mut table_len = u32::from(self.layout.size);
        let mut limit = table_len;
        let mut index = u32::from(head);
        let mut in_indirect = false;
        let mut total = 0_u32;
        let mut count = 0;
        while count < limit {
            if index >= table_len {
                return Err(QueueError::DescriptorIndex(index));
            }
            let descriptor = Descriptor::read(memory, table, index)?;
            if descriptor.flags & DESC_INDIRECT != 0 {
                let entries = descriptor.len / DESCRIPTOR_BYTES as u32;
                let whole = u64::from(descriptor.len).is_multiple_of(DESCRIPTOR_BYTES);
                let last = descriptor.flags & DESC_NEXT == 0;
                if !self.indirect || in_indirect || !whole || entries == 0 || !last {
                    return Err(QueueError::Indirect);
                }
                (table, table_len, index) = (descriptor.gpa, entries, 0);
                (in_indirect, limit) = (true, INDIRECT_MAX);
                continue;
            }
            count += 1;
            total = total
                .checked_add(descriptor.len)
                .ok_or(QueueError::ChainTooLarge)?;
            descriptor.append_to(&mut chain)?;
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(chain);
            }
            index = u32::from(descriptor.next);
        }
        Err(QueueError::ChainTooLong(limit))
    }
}

/// A descriptor as it is in guest memory (2.7.5).
struct Descriptor {
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, table: u64, index: u32) -> Result<Descriptor, QueueError> {
        let at = Gpa(table)
            .checked_add(u64::from(index) * DESCRIPTOR_BYTES)
            .ok_or(QueueError::Placement(Gpa(table)))?;
        let mut bytes = [0; DESCRIPTOR_BYTES as usize];
        memory.read(at, &mut bytes)?;
        let raw = u128::from_le_bytes(bytes);
        Ok(Descriptor {
            gpa: raw as u64,
            len: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        })
    }

    fn append_to(&self, chain: &mut Chain) -> Result<(), QueueError> {
        let gpa = Gpa(self.gpa);
        gpa.checked_add(u64::from(self.len))
            .ok_or(QueueError::ChainTooLarge)?;
        let writable = self.flags & DESC_WRITE != 0;
        if !writable && !chain.writable.is_empty() {
            return Err(QueueError::BufferOrder);
        }
        // Empty buffers are legal and hold nothing.
        if self.len > 0 {
            let list = if writable {
                &mut chain.writable
            } else {
                &mut chain.readable
            };
            list.push(Buffer { gpa, len: self.len });
        }
        Ok(())
    }
}
