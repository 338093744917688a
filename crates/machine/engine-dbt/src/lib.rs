//! The software engine: x86-64 on x86-64 by binary translation.
//!
//! It owns everything between guest bytes and their effect: [`table`] says how each instruction is treated,
//! [`translate`] turns blocks of them into host code that [`code`] keeps, [`stubs`] lead in and out of it, and the
//! dispatcher ([`dispatch`]) sends each trap on: to the allocator ([`mmu`], [`apic`]) when an instruction changes
//! what the guest owns, to the interpreter ([`interpret`]) when it is sensitive. It knows no device and no file.
//!
//! Each vCPU has a code cache of its own; [`peers`] is what they owe each other when code changes. Limits today: 64
//! vCPUs; hosts need AVX2 and BMI2.

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
#![allow(clippy::too_many_arguments)]

pub mod apic;
mod asm;
pub mod caches;
pub mod code;
pub mod cpu;
mod debug;
pub mod dispatch;
mod engine;
pub mod env;
pub mod interpret;
pub mod kick;
mod lockstep;
pub mod mmu;
pub mod peers;
mod raw;
mod signals;
mod state;
pub mod stubs;
pub mod table;
#[cfg(test)]
mod tests;
pub mod translate;
pub mod tsc;

pub use engine::{Translator, TranslatorConfig, check_host};
