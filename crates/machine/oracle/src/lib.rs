//! The instruction oracle: the CPU says what is right.
//!
//! Random instructions and short sequences run twice, natively in a child process ([`native`]) and as user code of a
//! guest in the software engine ([`guest`]), from the same registers and the same memory at the same addresses;
//! [`compare`] finds what differs. [`generate`] makes the cases from iced-x86's opcode table and from random bytes,
//! [`exclude`] says what has no native counterpart and why, [`coverage`] counts what was exercised, [`campaign`] puts
//! it together and shrinks what fails.
//!
//! What manuals leave to the processor is either left out ([`exclude`]) or tolerated ([`campaign`]), each with its
//! reason; both lists were made on AMD's processors.
//!
//! A test tool: it may panic, and it needs a host whose Linux lets user code write FS and GS bases.

#![allow(clippy::missing_panics_doc)]

pub mod campaign;
pub mod compare;
pub mod coverage;
pub mod exclude;
pub mod generate;
pub mod guest;
pub mod layout;
pub mod native;
pub mod rng;
pub mod state;
