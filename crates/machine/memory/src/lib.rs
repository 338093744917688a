//! Guest-physical memory: addresses, slots of RAM that come and go while a machine runs, and who wrote where.
//!
//! This is the only crate that creates mappings of guest RAM, and it can list, write-protect and drop all of them
//! ([`GuestMemory::mappings`], [`GuestMemory::protect`], [`GuestMemory::drop_pages`]). What later features
//! (live snapshots, post-copy, fork) rely on:
//!
//! - Guest RAM is a sealed memfd, mapped shared between two inaccessible guard ranges.
//! - Every accessor may block, because the page it touches may have to be fetched first: hold no lock that the
//!   fetching side needs.
//! - No system call is ever given a guest address: file transfers go through a bounce buffer, so a page is only ever
//!   populated by a user-mode access (unprivileged userfaultfd serves nothing else).
//! - Every write through [`GuestMemory`] is a *device write*: it takes part in the dirty log and is reported to the
//!   engine when it touches a page that the engine watches because it translated code from it.
//!   Engines write guest RAM by the slot's host address and report with [`GuestMemory::mark_dirty`] themselves.
//!
//! [`SharedMemory`] is for what two processes of the host share, such as a ring of packets: never guest RAM.
//!
//! ```
//! use strata_memory::{Gpa, GuestMemory, Layout};
//!
//! let layout = Layout::new(64 << 20, 64 << 20)?;
//! let memory = GuestMemory::with_layout(&layout)?;
//! memory.write_u32(Gpa(0x1000), 0x1234_5678)?;
//! assert_eq!(memory.read_u16(Gpa(0x1000))?, 0x5678);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]

mod address;
mod bitmap;
mod guest;
mod layout;
mod region;
mod shared;
mod slot;

#[cfg(test)]
mod tests;

pub use address::{Gpa, GpaRange, PAGE_SHIFT, PAGE_SIZE, PHYS_LIMIT};
pub use guest::{GuestMemory, Mapping, WriteObserver};
pub use layout::{Layout, LayoutError};
pub use region::Protection;
pub use shared::SharedMemory;
pub use slot::{Slot, SlotId, SlotKind, SlotTable};

/// Why an access to, or a change of, guest memory failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No slot holds this address, or the access runs past the end of the address space.
    #[error("no guest memory at {0}")]
    Unmapped(Gpa),
    /// A device wrote to read-only memory.
    #[error("guest memory at {0} is read-only")]
    ReadOnly(Gpa),
    /// An atomic access at an address that is not a multiple of its size.
    #[error("misaligned atomic access at {0}")]
    Misaligned(Gpa),
    /// A slot that is empty, not a multiple of 4 KiB or beyond 2^52.
    #[error("a memory slot of {size:#x} bytes cannot be placed at {gpa}")]
    BadSlot {
        /// First address asked for.
        gpa: Gpa,
        /// Size asked for, bytes.
        size: u64,
    },
    /// The new slot overlaps one that exists.
    #[error("a memory slot at {gpa} overlaps the slot at {existing}")]
    Overlap {
        /// First address of the new slot.
        gpa: Gpa,
        /// First address of the slot in the way.
        existing: Gpa,
    },
    /// No slot has this id (any more).
    #[error("there is no memory slot {0:?}")]
    NoSuchSlot(SlotId),
    /// The file ended before the transfer did.
    #[error("the file ends before byte {0}")]
    FileTooShort(u64),
    /// A file that a peer gave us cannot be mapped: its length is not what was agreed, or it can be cut.
    #[error("the shared memory is not a file of {0} bytes that nobody can shrink")]
    NotSealed(u64),
    /// The host refused a file transfer.
    #[error("transfer between guest memory and a file failed")]
    File(#[source] std::io::Error),
    /// The host refused memory or a mapping operation.
    #[error("the host refused {operation} for guest memory")]
    Host {
        /// Which call failed.
        operation: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}
