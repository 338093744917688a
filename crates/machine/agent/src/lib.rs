//! The protocol between a host and the agent inside a guest, and the host's side of it.
//!
//! A connection is a byte stream (vsock port [`PORT`] in the guest). Both ends send a [`Greeting`] at once; what follows
//! are frames, each one [`Message`]. The first message of the host decides what the connection is for: [`Message::Exec`]
//! makes it the session of one process, anything else is a question with one answer. Data has credit in both directions,
//! so that no reader that is slow can hold up another stream, a signal, or the end of the process.
//!
//! ```text
//! host:   greeting  Exec ──────────── Stdin… StdinEof   Signal  Resize  Credit
//! guest:  greeting        Started ─── Stdout… Stderr… Credit ──────────────── Exited
//!                       └ Failed (not found, not executable, …)
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`greeting`] | the first bytes: version and capabilities |
//! | [`message`] | messages and their bytes |
//! | [`endpoint`] | one end of a connection as a state machine without I/O |
//! | [`client`] | the host's end over a pair of blocking streams |
//!
//! The crate opens no sockets but the host's Unix socket of a machine, runs no processes, and depends on nothing but std:
//! the guest's static init is built with it. What the peer sends is not trusted: sizes are bounded before memory is asked
//! for, and what breaks a rule ends the connection with a [`ProtocolError`].

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

pub mod client;
pub mod endpoint;
pub mod error;
pub mod greeting;
pub mod message;

pub use client::{Client, Input, Output, Process};
pub use endpoint::{Endpoint, Event, Role};
pub use error::{ClientError, ProtocolError};
pub use greeting::Greeting;
pub use message::{Exec, ExitStatus, FailReason, Message, Stream};

/// The vsock port the agent listens on.
pub const PORT: u32 = 1024;
