//! Virtual disks: what a block device reads from and writes to.
//!
//! This crate owns the bytes of a disk and nothing else: it knows no guest memory, no rings and no
//! bus. A device holds an `Arc<dyn DiskBackend>` and moves bytes between it and the guest itself.
//!
//! - [`DiskBackend`] is the contract between devices and storage.
//! - [`RawFile`] is an image file or block device whose bytes are the disk's bytes. It is locked
//!   while it is open, so that two machines cannot write one disk.
//! - [`Qcow2`] is an image in QEMU's format, which grows with its content.
//! - [`Overlay`] puts a temporary, sparse, unnamed file above a backend that is never written, so
//!   that a run leaves its image as it found it.
//!
//! The format of an image is always said by whoever opens it ([`DiskFormat`]) and never guessed
//! from its content: a guest that can write to a raw disk could otherwise turn it into an image of
//! another format that names files of the host.

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
#![forbid(unsafe_code)]

mod backend;
mod error;
mod format;
mod lock;
mod overlay;
mod qcow2;
mod raw;

pub use backend::{DiskBackend, SECTOR_SIZE};
pub use error::DiskError;
pub use format::{DiskFormat, Source, open};
pub use overlay::Overlay;
pub use qcow2::Qcow2;
pub use raw::{Access, RawFile};
