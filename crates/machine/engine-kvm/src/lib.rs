//! The hardware engine: the same vCPUs on `/dev/kvm`, and the probe that says whether it is worth using.
//!
//! The local APICs are the kernel's, everything else of the machine is ours ("split irqchip"): devices, the I/O APIC
//! and saved state are the same as with the translator. A vCPU halts inside the kernel and comes back only for device
//! accesses, ends of level-triggered interrupts and kicks.
//!
//! This crate never decodes an instruction, never touches a device, and keeps no guest state of its own: what a vCPU
//! is can be read from the kernel at any time between two runs.

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

mod cpuid;
mod doorbells;
mod engine;
mod interrupts;
mod kick;
mod lapic;
pub mod probe;
mod slots;
mod state;
mod time;
mod vcpu;

#[cfg(test)]
mod tests;

pub use engine::{Kvm, KvmConfig};
