//! Networks of one host: the switch as a process of its own, and how machines join it.
//!
//! - [`Hub`] is the loop of a switch's process: it owns the [`Switch`](strata_switch::Switch), a packet ring per machine,
//!   the network's gateway (addresses and names) and, if there is one, the uplink to switches on other hosts. It starts
//!   nothing and maps no machine's RAM.
//! - [`join`] is the other side: connects to a hub's socket, says what port is wanted, and gets the ring and the
//!   socket by which either side wakes the other. They can be handed to another process, such as a machine's in its jail.
//!
//! A port lives as long as its connection. A hub ends with its last port. Both sides greet with a version; a ring begins
//! with its own. A machine that breaks a ring's rules, or closes its end of what wakes, loses its port, and nobody else
//! notices: the hub shares no open file with a machine but the ring's memory, and no call of it waits for one.

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

mod bell;
mod hub;
mod join;
mod protocol;

#[cfg(test)]
mod tests;

pub use hub::{Hub, NetworkConfig, Uplink};
pub use join::{Cable, Joined, join};
pub use protocol::{PortRequest, ProtocolError, Vlans};
