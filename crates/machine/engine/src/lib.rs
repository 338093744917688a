//! What an engine is: Engine and Vcpu traits, architectural CPU state, exits, CPU models, clocks, inputs, statistics.
//!
//! This crate owns the vocabulary that every engine (binary translation, KVM) and everything above engines share.
//! It never runs a guest instruction itself and knows no device, no node and no file format.
//!
//! The guest architecture is a parameter ([`Arch`]): state and exits of another instruction set are another
//! implementation of that trait, not a second interface.
//!
//! Threads: a [`Vcpu`] belongs to the one thread that calls [`Vcpu::run`]; everything else reaches it through its
//! [`Kicker`] and the engine's [`InterruptSink`]. Devices are called on the vCPU's thread through [`IoBus`].

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

mod clock;
mod inputs;
mod interrupt;
mod stats;
mod vcpu;
pub mod x86;

pub use clock::{ClockState, MachineClock};
pub use inputs::{Input, InputError, InputLog, Inputs};
pub use interrupt::{Doorbell, DoorbellAddress, DoorbellSpace, InterruptSink, MsiMessage};
pub use stats::{ExitCause, VcpuStats};
pub use vcpu::{Arch, Engine, EngineError, Exit, GuestDebug, IoBus, Kicker, Vcpu, VcpuId};
