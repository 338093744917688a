//! From files to a machine ready to run: what to put where in guest memory, and the first CPU state.
//!
//! This room owns the knowledge of kernel formats (bzImage, ELF, multiboot 1), of the boot protocols that go with them
//! (Linux/x86, PVH, multiboot 1) and of the ACPI tables that describe the `modern` platform. It is pure: bytes and
//! parameters go in, a [`LoadPlan`] comes out. It never touches guest memory, a file or an engine; the vmm carries the
//! plan out. A kernel can also be looked for inside a disk ([`find_kernel`]), which is read only.
//!
//! How a kernel is started is decided by what it is:
//!
//! 1. A bzImage whose payload can be unpacked on the host: the unpacked ELF is loaded at its link address and entered
//!    by Linux's 64-bit protocol. This spares the guest its own decompression (hundreds of millions of instructions).
//!    Without the decompressor there is no KASLR.
//! 2. Any other bzImage: loaded as it is and entered by the 64-bit (or, if that is missing, the 32-bit) protocol.
//! 3. An ELF file with a PVH note: PVH.
//! 4. A file with a multiboot 1 header: multiboot.
//! 5. A 64-bit ELF file without either: Linux's 64-bit protocol.
//!
//! Everything in a kernel or initrd is untrusted: offsets and sizes are checked, allocations are bounded, and each
//! error says in one sentence what was wrong and where.
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

mod entry;
mod error;
mod plan;
mod request;

mod bzimage;
mod decompress;
mod elf;

mod linux;
mod multiboot;
mod pvh;

mod inside;

mod acpi;
mod builder;
mod memory_map;
mod view;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use decompress::extract_vmlinux;
pub use entry::{Entry, Segment as CpuSegment, Table};
pub use error::BootError;
pub use inside::{FindError, FoundKernel, find_kernel};
pub use memory_map::{MemoryKind, MemoryRange};
pub use plan::{Bytes, LoadPlan, Protocol, Segment, plan};
pub use request::{BootRequest, BzImageMode, Platform, ports};
use strata_memory::Gpa;
