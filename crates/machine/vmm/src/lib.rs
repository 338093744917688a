//! One virtual machine: its configuration, building it, running it, its console and its control socket.
//!
//! A [`MachineConfig`] says everything about a machine as values. [`Machine::build`] makes the memory, the devices and
//! the vCPUs it names; [`Machine::run`] runs them until the machine ends and says how ([`Outcome`]).
//!
//! Threads: each vCPU has one, on which devices are called; one thread (the caller of [`Machine::run`]) owns the
//! lifecycle and everything that changes it, and hears of all else by [`Event`]s; console input, the control
//! socket, gdb and the process in front have threads that only send it requests.
//!
//! This crate knows no image store, no node and no HTTP.

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

pub mod config;
pub mod control;
pub mod engines;

mod bus;
mod cable;
mod chassis;
mod console;
mod error;
mod event;
mod gdb;
mod load;
mod machine;
mod name;
mod network;
mod platform;
mod ring;
mod run_dir;
mod size;
mod state;
mod vcpu;

#[cfg(test)]
mod tests;

pub use cable::Cable;
pub use config::MachineConfig;
pub use console::ConsoleInput;
pub use error::{BuildError, Crash, Outcome};
pub use machine::{HostEnds, Machine, MachineHandle, MachineStats};
pub use name::{MachineName, NameError};
pub use network::{NetworkStats, guest_of, is_outside, mac_of};
pub use platform::vsock_socket;
pub use ring::ConsoleRing;
pub use run_dir::{RunDir, RunDirError};
pub use size::{ByteSize, SizeError};
pub use state::{InstanceState, Transition, TransitionError};
pub use strata_devices::virtio::{NetCounters, VsockHost};
pub use strata_switch::{gateway::subnet, nat};

/// What a network's gateway is told, for programs that start one.
pub mod gateway {
    pub use strata_switch::gateway::GatewayConfig;
    pub use strata_switch::gateway::dhcp4::Dhcp4Config;
    pub use strata_switch::packet::Mac;
}
