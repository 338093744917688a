//! The block verifier: proves of each block of translated code that it stays inside its guest.
//!
//! It owns the judgement alone: it decodes the finished bytes of a block and shares nothing with what emitted them but a
//! [`Layout`] of plain numbers. It never runs, changes or finds code; an engine hands it each block by way of
//! [`Inspect`].

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

mod allow;
mod flow;
mod layout;
mod operand;
mod prove;
mod value;
mod verifier;

pub use layout::{
    Emitted, Field, Inspect, JumpArrays, Layout, Site, Stubs, SystemStubs, TlbArrays, Usage,
};
pub use verifier::{Proof, Verifier, verify};
